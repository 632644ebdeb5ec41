"""A hundred alert rules of five types, five about any one instrument: for us, and for who writes them by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

__all__ = ["GROUPS", "WINDOW_MS", "group_of", "parameters", "write"]

GROUPS = 20
WINDOW_MS = 300_000


def group_of(symbol: str) -> int:
    """Return the group of a symbol: each group has five rules of its own."""
    return sum(symbol.encode()) % GROUPS


def parameters(group: int) -> dict[str, int]:
    """Return the thresholds of a group: percent, a level and a band in rial, shares, rial of value."""
    return {
        "percent": 2 + group % 3,
        "level": 2_000 + 500 * group,
        "low": 1_000 + 100 * group,
        "high": 6_000 + 1_000 * group,
        "shares": 500_000 * (1 + group),
        "rial": 5_000_000_000 * (1 + group),
    }


def write(path: Path, symbols: Iterable[str], foreign: int = 0) -> Path:
    """Write the rules, and so many more about instruments that do not occur."""
    groups: list[list[str]] = [[] for _ in range(GROUPS)]
    for symbol in sorted(set(symbols)):
        groups[group_of(symbol)].append(symbol)
    lines = ["version: 1", "rules:"]
    for group, members in enumerate(groups):
        lines += _five(group, group, f"symbols: {json.dumps(members, ensure_ascii=False)}")
    for number in range(foreign // 5):
        lines += _five(GROUPS + number, number % GROUPS, f"instruments: [IRX0{number:08}]")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _five(name: int, group: int, match: str) -> list[str]:
    what = parameters(group)
    percent, level = what["percent"], what["level"]
    tests = [
        f'when: "abs(percent(last_price, 5m)) >= {percent}", until: "abs(percent(last_price, 5m)) < {percent / 2}"',
        f'when: "crossed_up(last_price, {level}) or crossed_down(last_price, {level})"',
        f"when: last_price < {what['low']} or last_price > {what['high']}",
        f"when: volume >= {what['shares']}",
        f"when: value >= {what['rial']}",
    ]
    return [f"  - {{name: r{name}-{number}, {test}, match: {{{match}}}}}" for number, test in enumerate(tests)]
