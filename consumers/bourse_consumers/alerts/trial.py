"""Rules tried out on past polls, with the engine that runs live: what would have fired, when, and how often."""

from __future__ import annotations

import ast
import gzip
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bourse_consumers.alerts.engine import Engine, Poll, columns_of, millis
from bourse_consumers.alerts.expressions import limits
from bourse_consumers.alerts.rule import Rule
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import (
    TEHRAN,
    AlertState,
    FeedState,
    Outcome,
    Phase,
    PollMarker,
    PriceAlert,
    TradeEvent,
)

__all__ = ["Past", "Reached", "Trial", "polls_of", "read", "real_day"]

TICK_MS = 10_000
LONGEST_SILENCE_MS = 24 * 3_600_000
LINE = 1 << 20


class Past(NamedTuple):
    """A poll that was: its marker and its events."""

    marker: PollMarker
    events: Sequence[TradeEvent]


class Reached(NamedTuple):
    """How near a quantity came to what a rule that never fired wants."""

    text: str
    value: float
    wanted: float


# --- what to try them on ----------------------------------------------------------------------------------------------


def real_day() -> Path:
    """Return the real day that ships with the sandbox."""
    found = find_spec("bourse_sandbox")
    path = Path(found.origin).parent / "data" / "day-2019-08-21.ndjson.gz" if found and found.origin else None
    if path is None or not path.is_file():
        raise ConfigurationError("the real day is part of the sandbox, which is not installed; name files")
    return path


def read(paths: Sequence[Path]) -> Iterator[TradeEvent | PollMarker]:
    """Yield the events and markers of files: captures, captured days, or what `--json` of tail and replay print.

    `-` is standard input. Files may be compressed with gzip.
    """
    captures = []
    for path in paths:
        if path == Path("-"):
            yield from _events(sys.stdin.buffer, "standard input")
            continue
        try:
            kind = "capture" if path.is_dir() else _kind(path)
        except (OSError, EOFError) as error:
            raise ConfigurationError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if kind == "capture":
            captures.append(path)
            continue
        with gzip.open(path) if _zipped(path) else path.open("rb") as lines:
            yield from _events(lines, str(path))
    if captures:
        yield from _replayed(captures)


def _zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _kind(path: Path) -> str:
    with gzip.open(path) if _zipped(path) else path.open("rb") as lines:
        first = lines.readline(LINE)
    return "events" if b'"event_id"' in first or b'"outcome"' in first else "capture"


def _replayed(paths: Sequence[Path]) -> Iterator[TradeEvent | PollMarker]:
    """Yield what `bourse replay` derives: producer and consumers do not import each other."""
    command = [sys.executable, "-m", "bourse_cli", "replay", "--json", *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout and child.stderr  # noqa: S101, PT018  # for the type checker
        yield from _events(child.stdout, "bourse replay")
        why = child.stderr.read().decode(errors="replace").strip()
    if child.returncode:
        raise ConfigurationError(why.removeprefix("Error: ") or f"{paths[0]} cannot be replayed")


def _events(lines: Iterable[bytes], name: str) -> Iterator[TradeEvent | PollMarker]:
    decoders = {kind: msgspec.json.Decoder(kind) for kind in (TradeEvent, PollMarker)}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield decoders[TradeEvent if b'"event_id"' in line else PollMarker].decode(line)  # type: ignore[misc]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{name}:{number}: neither a trade event nor a marker: {error}; give captures, "
                "or what `bourse replay --json` and `bourse tail trades --json` print"
            ) from error


def polls_of(events: Iterable[TradeEvent | PollMarker]) -> list[Past]:
    """Return the whole polls of events and markers, in order; events without a marker get one made of them."""
    markers: dict[int, PollMarker] = {}
    found: dict[int, list[TradeEvent]] = defaultdict(list)
    for event in events:
        if isinstance(event, PollMarker):
            markers[event.poll_sequence] = event
        else:
            found[event.poll_sequence].append(event)
    for sequence, some in found.items():
        if sequence not in markers:
            markers[sequence] = _marker(sequence, some)
    return [Past(markers[sequence], found.get(sequence, [])) for sequence in sorted(markers)]


def _marker(sequence: int, events: Sequence[TradeEvent]) -> PollMarker:
    at = max(event.observed_at for event in events)
    clock = f"{at.astimezone(TEHRAN):%H:%M}"
    phase = Phase.PRE_OPEN if clock < "09:00" else Phase.OPEN if clock < "12:30" else Phase.AFTER_CLOSE
    counts = [name for name, kind in PollMarker.__annotations__.items() if kind == "int" and name != "poll_sequence"]
    numbers: dict[str, Any] = dict.fromkeys(counts, 0) | {"traded": len(events)}
    return PollMarker(
        poll_sequence=sequence, simulated=False, source=events[0].source, outcome=Outcome.PUBLISHED, phase=phase,
        feed_state=FeedState.FRESH, requested_at=at, received_at=at, day_final=False,
        **numbers,
    )  # fmt: skip


# --- the trial --------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """What rules say of polls. `alerts` are in their order."""

    rules: Sequence[Rule]
    alerts: list[PriceAlert] = field(default_factory=list)
    polls: int = 0
    events: int = 0
    days: Counter[date] = field(default_factory=Counter)
    reached: dict[str, dict[str, Reached]] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    prices: dict[str, list[tuple[datetime, int]]] = field(default_factory=lambda: defaultdict(list))
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = Engine(self.rules)
        self.engine.open()

    def run(self, polls: Sequence[Past]) -> None:
        """Judge polls in order: as live, but many rows at once."""
        before: PollMarker | None = None
        day: date | None = None
        for marker, events in polls:
            today = (marker.received_at or marker.requested_at).astimezone(TEHRAN).date()
            if day not in {None, today}:
                self._finish_day()
            day = today
            if before is not None and before.next_poll_at is not None:
                self._wait(before, marker)
            self.alerts += self.engine.take(Poll(marker, columns_of(events, self.engine.columns)), defer=True)
            before = marker
            self.polls += 1
            self.events += len(events)
            for event in events:
                self.days[event.trading_day] += 1
                self.symbols[event.instrument] = event.symbol
                if event.last_price is not None:
                    self.prices[event.instrument].append((event.observed_at, event.last_price))
        self._finish_day()
        self.alerts.sort(key=lambda alert: alert.raised_at)

    def _wait(self, before: PollMarker, marker: PollMarker) -> None:
        """Let the clock go on while no marker came."""
        due = before.next_poll_at
        now, end = millis(due or before.requested_at), millis(marker.requested_at)
        for at in range(now + TICK_MS, min(end, now + LONGEST_SILENCE_MS), TICK_MS):
            self.alerts += self.engine.tick(at, 0)

    def _finish_day(self) -> None:
        self.alerts += self.engine.finish()
        fired = {alert.rule for alert in self.alerts if alert.state is AlertState.FIRING}
        for n, rule in enumerate(self.rules):
            if rule.scope != "feed" and rule.name not in fired:
                self._note(rule, n)

    def _note(self, rule: Rule, n: int) -> None:
        """Keep the nearest that each quantity came to the number it is compared with."""
        found = self.engine.view_of(n)
        if found is None:
            return
        sides = {ast.unparse(side.tree): side.node for side in rule.when.sides}
        for text, low, high in limits(rule.when.tree, ast.And):
            if text not in sides:
                continue
            with np.errstate(all="ignore"):
                values = np.asarray(sides[text].run(found), float) / (1000 if sides[text].kind == "time" else 1)
            upwards = low > -np.inf
            nearest = np.fmax.reduce(values, None) if upwards else np.fmin.reduce(values, None)
            wanted = (low if upwards else high) / (1000 if sides[text].kind == "time" else 1)
            before = self.reached.setdefault(rule.name, {}).get(text)
            if before is not None:
                nearest = (max if upwards else min)(nearest, before.value)
            if not np.isnan(nearest):
                self.reached[rule.name][text] = Reached(text, float(nearest), wanted)

    # --- the summary --------------------------------------------------------------------------------------------------

    def fired(self, rule: str) -> list[PriceAlert]:
        """Return the begins of a rule's episodes."""
        return [alert for alert in self.alerts if alert.rule == rule and alert.state is AlertState.FIRING]

    def lengths(self, rule: str) -> list[timedelta]:
        """Return how long a rule's episodes lasted, as far as they ended."""
        return [
            alert.raised_at - begun[alert.alert_id]
            for begun in [{each.alert_id: each.raised_at for each in self.fired(rule)}]
            for alert in self.alerts
            if alert.rule == rule and alert.state is AlertState.RESOLVED and alert.alert_id in begun
        ]

    def summary(self) -> Iterator[str]:
        """Yield the summary for people."""
        fired = {rule.name: self.fired(rule.name) for rule in self.rules}
        days = ", ".join(f"{day} ({count:,} events)" for day, count in sorted(self.days.items()))
        yield f"{self.polls:,} polls, {self.events:,} events: {days or 'no trading day'}"
        silent = [name for name, found in fired.items() if not found]
        if silent:
            yield ""
        for name in silent:
            near = "; ".join(
                f"{each.text} reached {each.value:,.4g}, wanted {each.wanted:,.4g}"
                for each in self.reached.get(name, {}).values()
            )
            yield f"never fired: {name}" + (f" ({near})" if near else "")
        if any(fired.values()):
            yield ""
            yield f"{'episodes':>8}  {'instruments':>11}  {'median':>8}  {'first':<19}  rule"
        for name, found in sorted(fired.items(), key=lambda each: -len(each[1])):
            if found:
                lengths = self.lengths(name)
                middle = (
                    str(timedelta(seconds=int(median(each.total_seconds() for each in lengths)))) if lengths else "–"
                )
                times = ", ".join(f"{alert.raised_at.astimezone(TEHRAN):%H:%M:%S}" for alert in found[:2])
                who = len({alert.instrument for alert in found})
                yield f"{len(found):>8,}  {who:>11,}  {middle:>8}  {times:<19}  {name}"
        sent = Counter(channel for alert in self.alerts if alert.message is not None for channel in alert.channels)
        for channel, count in sorted(sent.items()):
            yield f"messages to {channel}: {count:,}"
        minutes = Counter(
            alert.raised_at.replace(second=0, microsecond=0) for found in fired.values() for alert in found
        )
        if minutes:
            minute, most = minutes.most_common(1)[0]
            yield f"{sum(minutes.values()):,} alerts, at most {most:,} in a minute ({minute.astimezone(TEHRAN):%H:%M})"
