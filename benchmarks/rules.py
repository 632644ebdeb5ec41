"""A hundred alert rules, five about each instrument: as a file for the product, and by hand for the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

__all__ = ["by_hand", "write"]

GROUPS = 20
WINDOW_MS = 300_000


def group_of(symbol: str) -> int:
    """Return the group of a symbol: each group has five rules of its own."""
    return sum(symbol.encode()) % GROUPS


def numbers(group: int) -> dict[str, int]:
    """Return the thresholds of a group: percent, a level and a band in rial, shares, rial of value."""
    return {
        "percent": 2 + group % 3,
        "level": 2_000 + 500 * group,
        "low": 1_000 + 100 * group,
        "high": 6_000 + 1_000 * group,
        "shares": 500_000 * (1 + group),
        "rial": 5_000_000_000 * (1 + group),
    }


def write(path: Path, symbols: Iterable[str]) -> Path:
    """Write the rules."""
    lines = ["version: 1", "rules:"]
    for group in range(GROUPS):
        members = json.dumps([each for each in sorted(symbols) if group_of(each) == group], ensure_ascii=False)
        of, move = numbers(group), "abs(percent(last_price, 5m))"
        tests = [
            f'when: "{move} >= {of["percent"]}", until: "{move} < {of["percent"] / 2}"',
            f'when: "crossed_up(last_price, {of["level"]}) or crossed_down(last_price, {of["level"]})"',
            f"when: last_price < {of['low']} or last_price > {of['high']}",
            f"when: volume >= {of['shares']}",
            f"when: value >= {of['rial']}",
        ]
        lines += [
            f"  - {{name: r{group}-{n}, {test}, match: {{symbols: {members}}}}}"
            for n, test in enumerate(tests)
            if members != "[]"
        ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def by_hand(event: dict[str, Any], known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the alerts of an event by the five rules of its group; `known` is what is kept of its instrument's day."""
    if known.get("day") != event["trading_day"]:
        known.clear()
        known.update(day=event["trading_day"], window=[], open={}, before=event["previous_close"])
    group = group_of(event["symbol"])
    of, price, now = numbers(group), event["last_price"], int(event["observed_at"].timestamp() * 1000)
    held: list[tuple[str, bool, bool]] = []
    if price is not None:
        window = known["window"]
        while len(window) > 1 and window[1][0] <= now - WINDOW_MS:
            window.pop(0)
        window.append((now, price))
        then, before = window[0][1], known["before"]
        percent = abs((price - then) / then * 100) if then else None
        held.append(("0", percent is not None and percent >= of["percent"], (percent or 0) < of["percent"] / 2))
        crossed = before is not None and (before < of["level"]) != (price < of["level"])
        held.append(("1", crossed, not crossed))
        outside = price < of["low"] or price > of["high"]
        held.append(("2", outside, not outside))
        known["before"] = price
    for rule, name, limit in (("3", "volume", "shares"), ("4", "value", "rial")):
        held.append((rule, event[name] >= of[limit], event[name] < of[limit]))
    for rule, begins, ends in held:
        if begins and rule not in known["open"]:
            known["open"][rule] = event["event_id"], now
            yield _alert(event, f"r{group}-{rule}", "FIRING", known["open"][rule])
        elif ends and rule in known["open"]:
            yield _alert(event, f"r{group}-{rule}", "RESOLVED", known["open"].pop(rule))


def _alert(event: dict[str, Any], rule: str, state: str, began: tuple[str, int]) -> dict[str, Any]:
    same = ("trading_day", "source", "instrument", "symbol", "poll_sequence", "last_price", "traded_at")
    return {
        **{name: event[name] for name in same},
        "alert_id": str(uuid5(NAMESPACE_OID, f"{rule} {began[0]}")),
        "state": state,
        "rule": rule,
        "severity": "INFO",
        "scope": "INSTRUMENT",
        "instrument_title": event["title"],
        "when": rule,
        "values": {},
        "since": datetime.fromtimestamp(began[1] / 1000, UTC),
        "raised_at": event["observed_at"],
        "message": {"en": f"{event['symbol']} {rule} {event['last_price']}"},
        "labels": {},
        "channels": [],
    }
