"""Rules tried out on past polls, with the engine that runs live: what would have fired, when, and how often."""

from __future__ import annotations

import ast
import gzip
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bourse_consumers.alerts.engine import Engine, Poll, columns_of
from bourse_consumers.alerts.expressions import limits
from bourse_consumers.alerts.rendering import millis
from bourse_consumers.alerts.rule import Rule
from bourse_schemas.errors import ConfigurationError, counted
from bourse_schemas.events import TEHRAN, AlertState, FeedState, Outcome, Phase, PollMarker, PriceAlert, TradeEvent

TICK_MS = 10_000
LONGEST_SILENCE_MS = 24 * 3_600_000
LINE = 1 << 20
GZIP = b"\x1f\x8b"


class Past(NamedTuple):
    """A poll that was: its marker and its events."""

    marker: PollMarker
    events: Sequence[TradeEvent]


class Episodes(NamedTuple):
    """What a rule raised: the begins of its episodes, and how long those that ended were, the shortest first."""

    rule: Rule
    fired: Sequence[PriceAlert]
    lengths: Sequence[timedelta]

    @property
    def instruments(self) -> int:
        """Return how many instruments had one."""
        return len({alert.instrument for alert in self.fired})

    @property
    def median(self) -> str:
        """Return the median length."""
        return str(self.lengths[len(self.lengths) // 2]).split(".")[0] if self.lengths else "–"


# --- what to try them on ----------------------------------------------------------------------------------------------


def real_day() -> Path:
    """Return the real day that ships with the sandbox."""
    found = find_spec("bourse_sandbox")
    path = Path(found.origin).parent / "data" / "day-2019-08-21.ndjson.gz" if found and found.origin else None
    if path is None or not path.is_file():
        raise ConfigurationError("the real day is part of the sandbox, which is not installed; name files")
    return path


def read(paths: Sequence[Path], days: Collection[date] = ()) -> Iterator[TradeEvent | PollMarker]:
    """Yield the events and markers of captures, captured days, archives, or what `--json` of tail and replay print.

    `-` is standard input. Files may be compressed with gzip. Of archives only the `days` are read, if there are any.
    """
    captures = []
    for path in paths:
        try:
            if path == Path("-"):
                yield from _events(sys.stdin.buffer, "standard input")
            elif tables := [each.parent for each in path.glob("*/_delta_log")]:
                for table, kind, column in (("trades", TradeEvent, "trading_day"), ("polls", PollMarker, "_day")):
                    for each in tables:
                        if each.name.rpartition(".")[2] == table:
                            yield from _archived(each, kind, column, days)
            elif path.is_dir() or not _printed(path):
                captures.append(path)
            else:
                with _opened(path) as lines:
                    yield from _events(lines, str(path))
        except (OSError, EOFError) as error:
            raise ConfigurationError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if captures:
        yield from _replayed(captures)


def _opened(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(len(GZIP)) == GZIP
    return gzip.open(path) if zipped else path.open("rb")


def _printed(path: Path) -> bool:
    with _opened(path) as lines:
        first = lines.readline(LINE)
    return b'"event_id"' in first or b'"outcome"' in first


def _archived(table: Path, kind: type[Any], column: str, days: Collection[date]) -> Iterator[Any]:
    """Yield the events of a table of the archive."""
    import polars as pl

    rows = pl.scan_delta(str(table))
    if days:
        rows = rows.filter(pl.col(column).is_in(sorted(days)))
    for row in rows.sort("_partition", "_offset").collect().iter_rows(named=True):
        yield msgspec.convert(row, kind)


def _replayed(paths: Sequence[Path]) -> Iterator[TradeEvent | PollMarker]:
    """Yield what `bourse replay` derives: producer and consumers do not import each other."""
    command = [sys.executable, "-m", "bourse_cli", "replay", "--json", "--markers", *map(str, paths)]
    with TemporaryFile() as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child:
        yield from _events(child.stdout or (), "bourse replay")
        child.wait()
        errors.seek(0)
        why = errors.read().decode(errors="replace").strip()
    if child.returncode:
        raise ConfigurationError(why.removeprefix("Error: ") or f"{paths[0]} cannot be replayed")


def _events(lines: Iterable[bytes], name: str) -> Iterator[TradeEvent | PollMarker]:
    decoders: Any = {kind: msgspec.json.Decoder(kind) for kind in (TradeEvent, PollMarker)}
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield decoders[TradeEvent if b'"event_id"' in line else PollMarker].decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{name}:{number}: neither a trade event nor a marker: {error}; give captures, "
                "or what `bourse replay --json` and `bourse tail trades --json` print"
            ) from error


def day_of(marker: PollMarker) -> date:
    """Return the Tehran date of a marker."""
    return (marker.received_at or marker.requested_at).astimezone(TEHRAN).date()


def polls_of(events: Iterable[TradeEvent | PollMarker], days: Collection[date] = ()) -> list[Past]:
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
    polls = [Past(markers[sequence], found.get(sequence, [])) for sequence in sorted(markers)]
    return [poll for poll in polls if not days or day_of(poll.marker) in days]


def past(files: Sequence[Path], days: Collection[date] = ()) -> list[Past]:
    """Return the whole polls of files, by default of the real day."""
    return polls_of(read(files or [real_day()], days), days)


def days_of(polls: Iterable[Past]) -> set[date]:
    """Return the days of polls."""
    return {day_of(poll.marker) for poll in polls}


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
    """What rules make of polls. `alerts` are in their order."""

    rules: Sequence[Rule]
    alerts: list[PriceAlert] = field(default_factory=list)
    polls: int = 0
    events: int = 0
    days: Counter[date] = field(default_factory=Counter)
    # Per rule that never fired, and quantity: the nearest that it came to what is wanted, and that.
    reached: dict[str, dict[str, tuple[float, float]]] = field(default_factory=lambda: defaultdict(dict))
    symbols: dict[str, str] = field(default_factory=dict)
    prices: dict[str, list[tuple[datetime, int]]] = field(default_factory=lambda: defaultdict(list))

    def run(self, polls: Sequence[Past]) -> Trial:
        """Judge polls in order, as live, but many rows at once; return itself."""
        self._engine = engine = Engine(self.rules)
        before: PollMarker | None = None
        for marker, events in polls:
            if before is not None:
                if day_of(before) != day_of(marker):
                    self._finish_day()
                self._wait(before, marker)
            self.alerts += engine.take(Poll(marker, columns_of(events, engine.columns)), defer=True)
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
        return self

    def _wait(self, before: PollMarker, marker: PollMarker) -> None:
        """Let the clock go on while no marker came."""
        if before.next_poll_at is not None:
            due = millis(before.next_poll_at)
            for at in range(due + TICK_MS, min(millis(marker.requested_at), due + LONGEST_SILENCE_MS), TICK_MS):
                self.alerts += self._engine.tick(at, 0)

    def _finish_day(self) -> None:
        self.alerts += self._engine.finish()
        fired = {alert.rule for alert in self.alerts}
        for n, rule in enumerate(self.rules):
            view = self._engine.view_of(n) if rule.scope != "feed" and rule.name not in fired else None
            if view is not None:
                self._note(rule, view)

    def _note(self, rule: Rule, view: Any) -> None:
        """Keep the nearest that each quantity came to the number it is compared with."""
        sides = {ast.unparse(side.tree): side.node for side in rule.when.sides}
        for text, low, high in limits(rule.when.tree, ast.And):
            if text in sides:
                upwards, unit = low > -np.inf, 1000 if sides[text].kind == "time" else 1
                before, _ = self.reached[rule.name].get(text, (np.nan, 0))
                with np.errstate(all="ignore"):
                    values = np.append(np.asarray(sides[text].run(view), float) / unit, before)
                nearest = float((np.fmax if upwards else np.fmin).reduce(values, None))
                self.reached[rule.name][text] = nearest, (low if upwards else high) / unit

    # --- the summary --------------------------------------------------------------------------------------------------

    def episodes(self) -> list[Episodes]:
        """Return what each rule raised."""
        fired: dict[str, dict[str, PriceAlert]] = defaultdict(dict)
        lengths: dict[str, list[timedelta]] = defaultdict(list)
        for alert in self.alerts:
            if alert.state is AlertState.FIRING:
                fired[alert.rule][alert.alert_id] = alert
            elif alert.alert_id in fired[alert.rule]:
                lengths[alert.rule].append(alert.raised_at - fired[alert.rule][alert.alert_id].raised_at)
        return [Episodes(rule, [*fired[rule.name].values()], sorted(lengths[rule.name])) for rule in self.rules]

    def summary(self) -> Iterator[str]:
        """Yield the summary for people: first what never fired."""
        days = ", ".join(f"{day} ({counted(count, 'event')})" for day, count in sorted(self.days.items()))
        yield f"{counted(self.polls, 'poll')}, {counted(self.events, 'event')}: {days or 'no trading day'}"
        found = sorted(self.episodes(), key=lambda each: -len(each.fired))
        silent = [each.rule.name for each in found if not each.fired]
        yield from [""] * bool(silent)
        for name in silent:
            near = [
                f"{text} reached {value:,.4g}, wanted {wanted:,.4g}"
                for text, (value, wanted) in self.reached[name].items() if not np.isnan(value)
            ]  # fmt: skip
            yield f"never fired: {name}" + (f" ({'; '.join(near)})" if near else "")
        fired = [alert.raised_at.astimezone(TEHRAN) for each in found for alert in each.fired]
        minutes = Counter(f"{at:%Y-%m-%d %H:%M}" for at in fired)
        if minutes:
            yield from ("", f"{'episodes':>8}  {'instruments':>11}  {'median':>8}  {'first':<19}  rule")
        for each in found[: len(found) - len(silent)]:
            times = ", ".join(f"{alert.raised_at.astimezone(TEHRAN):%H:%M:%S}" for alert in each.fired[:2])
            yield f"{len(each.fired):>8,}  {each.instruments:>11,}  {each.median:>8}  {times:<19}  {each.rule.name}"
        sent = Counter(channel for alert in self.alerts if alert.message is not None for channel in alert.channels)
        for channel, count in sorted(sent.items()):
            yield f"messages to {channel}: {count:,}"
        for minute, most in minutes.most_common(1):
            yield f"{counted(sum(minutes.values()), 'alert')}, at most {most:,} in a minute ({minute[-5:]})"
