"""What rules cost: python -m benchmarks.alerts. A real day as 300 polls; CPU time in seconds and milliseconds.

A hundred wide rules (all instruments), then ten thousand narrow ones (three instruments each): a day judged at once as
in a trial, a silent rebuild, and live polls with their alerts and messages.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from benchmarks.figures import ROOT, Figure
from bourse_consumers.alerts.engine import Engine, Poll, columns_of
from bourse_consumers.alerts.rule import Match, Rule
from bourse_consumers.alerts.rules_file import compile_rule
from bourse_consumers.alerts.trial import polls_of, read, real_day
from bourse_schemas.events import PollMarker, TradeEvent

__all__ = ["day", "judging", "main", "rules"]

POLLS = 300
SHAPES = (
    "abs(percent(last_price, {w}m)) >= {x}",
    "plp >= {x} and quiet >= {w}m",
    "percent(last_price, closing_price) <= -{x} and value >= {x}e9",
    "change(volume, {w}m) >= {x} * pace(volume, {w}m) and change(volume, {w}m) >= 1_000_000",
    "last_price > before(highest(last_price, {w}m)) and percent(last_price, {w}m) >= {x}",
    "crossed_up(last_price, {x} * 1000)",
    "annulled(volume) >= {x} * 100_000",
    "change(value, {w}m) >= {x}e9",
    "last_price <= (1 - {x} / 100) * mean(last_price, {w}m)",
    "quiet >= {w}m and value > {x}e8",
)
WINDOWS = (3, 5, 10, 15, 30)


def day() -> list[tuple[PollMarker, list[TradeEvent]]]:
    """Return the bundled day as 300 polls a minute apart, each with half the events of a real one."""
    real = polls_of(read([real_day()]))
    begin = real[0].marker.requested_at
    polls = []
    for n in range(POLLS):
        marker, events = real[n * len(real) // POLLS]
        at = begin + timedelta(minutes=n)
        polls.append((
            structs.replace(marker, poll_sequence=n + 1, requested_at=at, received_at=at),
            [event for k, event in enumerate(events) if k % 2 == n % 2],
        ))  # fmt: skip
    return polls


def rules(number: int, match: Callable[[int], Match]) -> list[Rule]:
    """Return rules of ten shapes and five windows."""
    found = []
    for n in range(number):
        rule = compile_rule(SHAPES[n % 10].format(w=WINDOWS[n // 10 % 5], x=2 + n // 50 % 10 * 0.5))
        hold = 0 if rule.momentary else 120_000
        found.append(replace(rule, name=f"r{n}", hold=hold, cooldown=900_000, match=match(n)))
    return found


def measure(some: Sequence[Rule], polls: Sequence[tuple[PollMarker, list[TradeEvent]]]) -> dict[str, Any]:
    """Return the figures of some rules."""
    names = Engine(some).columns
    taken = [Poll(marker, columns_of(events, names)) for marker, events in polls]
    engine = Engine(some)
    engine.open()
    for poll in taken:
        engine.take(poll, defer=True)
    began = time.process_time()
    changes = engine._judge()
    judged = time.process_time() - began
    again = Engine(some)
    again.open()
    began = time.process_time()
    for poll in taken[:-1]:
        again.take(poll._replace(replay=True))
    again.take(taken[-1])
    rebuilt = time.process_time() - began
    live = Engine(some)
    live.open()
    judging, lasted, alerts = list[float](), list[float](), 0
    for poll in taken:
        began = time.process_time()
        live.take(poll, defer=True)
        found = live._judge()
        judging.append((time.process_time() - began) * 1000)
        alerts += len(live._render(found))
        lasted.append((time.process_time() - began) * 1000)
    return {
        "pairs": live._pairs.count,
        "alerts": alerts,
        "changes": len(changes),
        "judge_day_s": round(judged, 2),
        "rebuild_s": round(rebuilt, 2),
        "live_median_ms": round(float(np.median(judging)), 1),
        "live_p99_ms": round(float(np.percentile(judging, 99)), 1),
        "with_texts_median_ms": round(float(np.median(lasted)), 1),
        "with_texts_p99_ms": round(float(np.percentile(lasted, 99)), 1),
        "text_us": round((sum(lasted) - sum(judging)) * 1000 / max(alerts, 1)),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def judging() -> Iterator[Figure]:
    """Yield the figures of the engine alone, measured in a process of its own."""
    ran = subprocess.run([sys.executable, "-m", "benchmarks.alerts"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    for found in map(json.loads, ran.stdout.splitlines()):
        seconds, p99, kind = found["judge_day_s"], found["with_texts_p99_ms"], found["rules"]
        what = f"{kind} alert rules, a stored day of {POLLS} polls"
        yield Figure(what, f"{seconds:.2f} s", "≤ 1 s", seconds <= 1, found)
        found_p99 = f"p99 {p99:.1f} ms, median {found['with_texts_median_ms']:.1f} ms"
        yield Figure(f"{kind} alert rules, a live poll with its alerts", found_p99, "p99 ≤ 30 ms", p99 <= 30, {})


def main() -> None:
    """Print the figures, a line of JSON each."""
    polls = day()
    codes = sorted({event.instrument for _, events in polls for event in events})
    pick = count()
    wide = rules(100, lambda _: Match())
    print(json.dumps({"rules": "100 wide"} | measure(wide, polls)))
    narrow = rules(10_000, lambda _: Match(frozenset(codes[next(pick) * 7 % len(codes)] for _ in range(3))))
    print(json.dumps({"rules": "10,000 narrow"} | measure(narrow, polls)))


if __name__ == "__main__":
    assert Path("benchmarks").is_dir(), "run it from the project's folder"
    main()
