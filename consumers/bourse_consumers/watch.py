"""`bourse watch`: market, feed and consumers live on a terminal, from Kafka alone.

`View` is a fold over records and `render` a function of it: both pure. Durations are measured on the monotonic clock
given as `now` (seconds): the market's own clock may be a simulated one, or one of years ago.
"""

from __future__ import annotations

import heapq
import math
import queue
import sys
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import date, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from unicodedata import bidirectional

import click

from bourse_cli.options import cluster_options, stop_on_signals
from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.events import (
    TEHRAN,
    AlertState,
    Candle,
    DeadLetter,
    Op,
    Phase,
    PollMarker,
    PriceAlert,
    TradeEvent,
)
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, CANDLES, DEAD_LETTERS, POLLS, TOPICS, TRADES

if TYPE_CHECKING:
    from rich.text import Text

    from bourse_schemas.reading import GroupLag, TopicRecord

__all__ = ["Group", "View", "groups_of", "render", "summary", "watch"]

FRAME_SECONDS = 0.25
PROBE_SECONDS = 3.0
CATCH_UP_SECONDS = 10.0
SUMMARY_SECONDS = 10.0
LATE_SECONDS = 120.0
# Per partition, how many records before its end to begin with; candles are read from their beginning. The markers'
# number covers a session of polls every second, so that the day's totals are right however late the view joins.
BACKLOG = {TRADES.name: 50, POLLS.name: 50_000, ALERTS.name: 1_000, DEAD_LETTERS.name: 10_000}
OPS = (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)
GOOD, BAD, FAINT = "green", "bold red", "dim"
STYLES = {
    **dict.fromkeys(("OPEN", "FRESH", "PUBLISHED", "RESOLVED"), GOOD),
    **dict.fromkeys(("DOWN", "FAILED", "FROZEN", "STALE", "FIRING", "CANCELLED"), BAD),
    **dict.fromkeys(("PRE_OPEN", "PARTIAL", "SKIPPED", "REVISED"), "yellow"),
}
LRM = "\u200e"
ALLOWED = {LRM, "\u200c"}  # and the zero-width non-joiner, which Persian words are written with
Partition = tuple[str, int]


class Gone(NamedTuple):
    """A tombstone on the candles: an operator took the instrument out."""

    instrument: str


class Group(NamedTuple):
    """A consumer group of ours, without the prefix: has it members, and how many offsets is it behind."""

    name: str
    alive: bool
    lag: int


# --- state ------------------------------------------------------------------------------------------------------------


class View:
    """What the records so far add up to. Until `go_live` they are a backlog: they count for state, not for rates."""

    def __init__(self) -> None:
        self.live_since: float | None = None
        self.marker: PollMarker | None = None
        self.marker_at = 0.0
        self.totals: Counter[Op] = Counter()
        self.candles: dict[str, Candle | TradeEvent] = {}
        self.events: deque[TradeEvent] = deque(maxlen=300)
        self.alerts: deque[PriceAlert] = deque(maxlen=300)
        self.alert_counts: Counter[tuple[date, AlertState]] = Counter()
        self.dead_letters = 0
        self.last_letter: DeadLetter | None = None
        self.undecodable = 0
        self.groups: Sequence[Group] | None = None
        self.troubles: dict[str, str] = {}
        self.finished: tuple[float, date, list[str]] | None = None
        self.news: deque[str] = deque(maxlen=1000)
        self._day: date | None = None
        self._summarised: date | None = None
        self._said_silent = False
        self._arrived: Counter[int] = Counter()

    @property
    def day(self) -> date | None:
        """Return the session's day: the newest marker's, or without markers the newest candle's."""
        return self._day or max((candle.trading_day for candle in self.candles.values()), default=None)

    def go_live(self, now: float) -> None:
        """Take what comes from now on as happening now."""
        if self.live_since is None:
            self.live_since = now
            # Up to here partitions came one after the other.
            self.events = deque(sorted(self.events, key=lambda event: event.observed_at), maxlen=self.events.maxlen)
            self.alerts = deque(sorted(self.alerts, key=lambda alert: alert.raised_at), maxlen=self.alerts.maxlen)
            if self.marker:
                self.news.append(_poll_line(self, self.marker))

    def add(self, event: object, now: float) -> None:
        """Fold one event in, whatever its topic."""
        match event:
            case TradeEvent():
                self.events.append(event)
                self._candle(event)
                if self.live_since is not None:
                    self._arrived[int(now)] += 1
            case Candle():
                self._candle(event)
            case PollMarker():
                self._marker(event, now)
            case PriceAlert():
                self.alerts.append(event)
                self.alert_counts[event.trading_day, event.state] += 1
                if self.live_since is not None:
                    self.news.append(_alert_line(event))
            case Gone():
                self.candles.pop(event.instrument, None)
            case DeadLetter():
                self.dead_letters += 1
                self.last_letter = event

    def _candle(self, candle: Candle | TradeEvent) -> None:
        known = self.candles.get(candle.instrument)
        if known is None or (known.trading_day, known.sequence) <= (candle.trading_day, candle.sequence):
            self.candles[candle.instrument] = candle

    def _marker(self, marker: PollMarker, now: float) -> None:
        before, live = self.marker, self.live_since is not None
        if marker.session_day and marker.session_day != self._day:
            if live and self._day:
                self._close_day(now)
            self._day = marker.session_day
            self.totals.clear()
        self.marker, self.marker_at, self._said_silent = marker, now, False
        self.totals.update(_counts(marker))
        if live:
            self.news.append(_poll_line(self, marker))
            if before and before.phase is Phase.OPEN and marker.phase is not Phase.OPEN:
                self._close_day(now)

    def _close_day(self, now: float) -> None:
        if self._day and self._day != self._summarised:
            self._summarised = self._day
            self.finished = (now, self._day, summary(self))
            self.news.append("; ".join([f"summary of {self._day}", *self.finished[2]]))

    def rate(self, now: float) -> float:
        """Return TradeEvents per second, over a poll's interval at least."""
        if self.live_since is None:
            return 0.0
        window = min(max(10.0, self._interval()), 60.0)
        for second in [second for second in self._arrived if second < now - 61]:
            del self._arrived[second]
        counted = sum(count for second, count in self._arrived.items() if second > now - window)
        return counted / max(1.0, min(window, now - self.live_since))

    def silent(self, now: float) -> float | None:
        """Return for how many seconds no marker has come, where one was due long ago; None where all is well."""
        if self.live_since is None:
            return None
        seconds, interval = now - max(self.marker_at, self.live_since), self._interval()
        # The next one may be due tomorrow; who waits a night for it need not wait another.
        return seconds if seconds > interval + min(interval, LATE_SECONDS) + 5 else None

    def tell_silence(self, now: float) -> None:
        """Add a line to the news when the producer has fallen silent."""
        if not self._said_silent and (seconds := self.silent(now)):
            self._said_silent = True
            self.news.append(f"no poll for {_age(seconds)}")

    def _interval(self) -> float:
        """Return the seconds between polls: both times are of one clock, and their difference passes in ours."""
        marker = self.marker
        if marker is None or marker.next_poll_at is None:
            return 60.0
        return max(1.0, (marker.next_poll_at - (marker.received_at or marker.requested_at)).total_seconds())

    def trouble(self, what: str, text: str | None) -> None:
        """Note what is wrong, None: no longer."""
        if text is None:
            if self.troubles.pop(what, None):
                self.news.append(f"{what}: well again")
        elif self.troubles.get(what) != text:
            self.troubles[what] = text
            self.news.append(_clean(f"{what}: {text}"))

    def movers(self, count: int) -> tuple[list[tuple[float, Candle | TradeEvent]], ...]:
        """Return the day's instruments that rose and those that fell most, with their change in percent."""
        changes = self.changes()
        up = heapq.nlargest(count, (pair for pair in changes if pair[0] > 0), key=lambda pair: pair[0])
        down = heapq.nsmallest(count, (pair for pair in changes if pair[0] < 0), key=lambda pair: pair[0])
        return up, down

    def changes(self) -> list[tuple[float, Candle | TradeEvent]]:
        """Return the day's candles with their change in percent since the previous close, else since the open."""
        day = self.day
        return [
            (100 * (candle.last_price - base) / base, candle)
            for candle in self.candles.values()
            if candle.trading_day == day
            and candle.last_price is not None
            and (base := candle.previous_close or candle.open_price)
        ]


# --- text -------------------------------------------------------------------------------------------------------------


def _clock(instant: datetime | None) -> str:
    return f"{instant.astimezone(TEHRAN):%H:%M:%S}" if instant else "-"


def _age(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"


def _number(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _short(number: float, sign: str = "-") -> str:
    """Return a number in five characters and its sign, which is always there with `sign="+"`: 51.2K, -3.07M."""
    for unit in ("", "K", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:{sign}.3g}{unit}"
        number /= 1000
    return f"{number:{sign}.4g}T"


def _clean(text: str) -> str:
    """Replace what could steer a terminal or turn the line around: control and direction characters."""
    return "".join(c if c.isprintable() or c in ALLOWED else " " for c in text)


def _fit(text: str, width: int) -> str:
    """Return the text in at most `width` cells.

    Text with right-to-left letters stands between left-to-right marks: where a terminal reorders, what follows on the
    line (padding, borders, numbers) stays where it is. The marks take no cell anywhere, unlike the newer isolates,
    which some terminals draw as boxes.
    """
    from rich.cells import cell_len, set_cell_size

    text = _clean(text)
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return f"{LRM}{text}{LRM}" if any(bidirectional(c) in {"R", "AL"} for c in text) else text


def _mover(pair: tuple[float, Candle | TradeEvent]) -> str:
    return f"{pair[1].instrument} {pair[0]:+.2f} % {_fit(pair[1].symbol, 20)}"


def summary(view: View) -> list[str]:
    """Return the day so far in a few phrases."""
    day, changes = view.day, view.changes()
    today = [candle for candle in view.candles.values() if candle.trading_day == day]
    rose, fell = sum(change > 0 for change, _ in changes), sum(change < 0 for change, _ in changes)
    up, down = view.movers(1)
    alerts = {state: view.alert_counts[day, state] if day else 0 for state in AlertState}
    return [
        *(f"{view.totals[op]:,} {op.lower()}" for op in OPS),
        f"{len(today)} instruments: {rose} up, {fell} down",
        f"{_short(sum(candle.value for candle in today))} rial traded",
        *(f"most up {_mover(pair)}" for pair in up),
        *(f"most down {_mover(pair)}" for pair in down),
        f"alerts {alerts[AlertState.FIRING]} fired, {alerts[AlertState.RESOLVED]} resolved",
    ]


def _counts(marker: PollMarker) -> dict[Op, int]:
    return dict(zip(OPS, (marker.opened, marker.traded, marker.revised, marker.cancelled), strict=True))


def _error(marker: PollMarker) -> str:
    return ": ".join(filter(None, (marker.error_kind, marker.error_code, marker.error_message)))


def _poll_line(view: View, marker: PollMarker) -> str:
    at = (marker.received_at or marker.requested_at).astimezone(TEHRAN)
    parts = [
        f"{at:%Y-%m-%d %H:%M:%S} {marker.phase} {marker.feed_state} poll {marker.poll_sequence} {marker.outcome}",
        ", ".join([f"{marker.rows} rows", *(f"{count} {op.lower()}" for op, count in _counts(marker).items())]),
        *(["lag " + ", ".join(f"{_clean(group.name)} {group.lag}" for group in view.groups)] if view.groups else []),
        *([f"{view.dead_letters} dead letters"] if view.dead_letters else []),
        *([f"{view.undecodable} undecodable"] if view.undecodable else []),
        *([f"error {_error(marker)}"] if marker.error_kind else []),
    ]
    return _clean("; ".join(parts))


def _alert_line(alert: PriceAlert) -> str:
    what = [_observed(alert), alert.rule, alert.when, alert.symbol or ""]
    about = alert.instrument or alert.source
    return f"{_clock(alert.raised_at)} {alert.state} {about} " + "; ".join(_fit(part, 200) for part in what if part)


def _observed(alert: PriceAlert) -> str:
    """Return the first quantity that the rule compares."""
    return next((f"{value:,.10g}" for value in alert.values.values()), "")


# --- screen -----------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """A column of a table: those with the highest `drop` go first when it gets narrow, 0 stays."""

    head: str
    width: int
    right: bool = False
    drop: int = 0


Cell = str | tuple[str, str]
_LAST_COLUMN = 7  # cells a table keeps for its last column, which holds the Persian text and takes what is left

_CODE, _PRICE = _Column("code", 12), _Column("last", 9, right=True)
_MOVERS = (_CODE, _Column("%", 7, True), _PRICE, _Column("volume", 6, True, 1), _Column("value", 6, True, 2))
_EVENTS = (
    *(_Column("time", 8, drop=2), _Column("op", 9), _CODE, _PRICE),
    *(_Column("change", 8, True, 1), _Column("volume", 7, True, 3), _Column("trades", 7, True, 4)),
)
_ALERTS = (
    *(_Column("time", 8, drop=1), _Column("state", 10), _CODE, _Column("value", 8, True)),
    *(_Column("price", 9, True, 2), _Column("rule", 16, drop=3)),
)


def _table(title: str, columns: Sequence[_Column], rows: Sequence[Sequence[Cell]], width: int) -> list[Text]:
    """Return heading and rows, each one line of at most `width` cells; a row's last cell is beyond the columns."""
    from rich.text import Text

    kept = list(columns)
    while sum(column.width + 1 for column in kept) + _LAST_COLUMN > width and any(column.drop for column in kept):
        kept.remove(max(kept, key=lambda column: column.drop))
    rest = max(0, width - sum(column.width + 1 for column in kept))
    shown = [columns.index(column) for column in kept]
    named = (title, *(column.head for column in kept[1:]), "symbol")
    lines = []
    for row in (named, *([row[i] for i in (*shown, -1)] for row in rows)):
        line = Text(no_wrap=True, overflow="crop", style="bold" if row is named else "")
        for cell, column in zip(row, (*kept, None), strict=True):
            text, style = cell if isinstance(cell, tuple) else (cell, "")
            fitted = _fit(text, column.width if column else rest)
            if column:
                padding = " " * (column.width - Text(fitted).cell_len)
                fitted = f"{padding}{fitted} " if column.right else f"{fitted}{padding} "
            line.append(fitted, style)
        lines.append(line)
    return lines


def _flow(parts: Sequence[Cell], width: int) -> list[Text]:
    """Return the parts side by side, two cells apart, on as many lines as they need."""
    from rich.text import Text

    lines: list[Text] = []
    for part in parts:
        text, style = part if isinstance(part, tuple) else (part, "")
        piece = Text(_fit(text, width), style, no_wrap=True, overflow="crop")
        if lines and lines[-1].cell_len + 2 + piece.cell_len <= width:
            lines[-1].append("  ").append_text(piece)
        else:
            lines.append(Text(no_wrap=True, overflow="crop").append_text(piece))
    return lines


def _header(view: View, width: int, now: float) -> list[Text]:
    marker, lines = view.marker, []
    for what, trouble in view.troubles.items():
        lines += _flow([(line, BAD) for line in textwrap.wrap(_clean(f"{what}: {trouble}"), width)[:2]], width)
    silent = view.silent(now)
    state: list[Cell] = []
    if marker:
        at = (marker.received_at or marker.requested_at).astimezone(TEHRAN)
        here = view.live_since is not None and view.marker_at > view.live_since
        seen = f"{_age(now - view.marker_at)} ago" if here else "before this view"
        state = [
            *((word.value, STYLES.get(word.value, "")) for word in (marker.phase, marker.feed_state)),
            f"{at:%a %Y-%m-%d %H:%M:%S}",
            (f"poll {marker.poll_sequence} {marker.outcome}", STYLES.get(marker.outcome, "")),
            (f"no poll for {_age(silent)}", BAD) if silent else (seen, FAINT),
        ]
        if marker.latest_traded_at:
            state.append((f"newest trade {_clock(marker.latest_traded_at)}", FAINT))
        if marker.gap_from:
            state.append((f"polls missed since {_clock(marker.gap_from)}", "yellow"))
    elif view.live_since is not None:
        state = [("no poll on this cluster yet: is `bourse produce` running?", BAD if silent else "yellow")]
    if view.live_since is None:
        state.append(("reading…", "yellow"))
    lines += _flow(state, width)
    if marker and marker.error_kind:
        lines += _flow([(line, BAD) for line in textwrap.wrap(_clean(_error(marker)), width)[:2]], width)
    letters: Cell = f"dead letters {view.dead_letters:,}"
    if view.last_letter:
        letters = (f"{letters} ({view.last_letter.reason} {_clock(view.last_letter.failed_at)})", BAD)
    counts: list[Cell] = [f"{op.lower()} {view.totals[op]:,}" for op in OPS]
    lines += _flow([*counts, (f"{view.rate(now):,.1f} events/s", "bold"), letters], width)
    groups: list[Cell] = [
        (f"{_clean(group.name)} {group.lag:,}{'' if group.alive else ' (stopped)'}", "" if group.alive else "yellow")
        for group in view.groups or ()
    ]
    if view.undecodable:
        groups.append((f"undecodable {view.undecodable:,}", BAD))
    lines += _flow([("lag", FAINT), *(groups or [("no consumer groups" if view.groups == [] else "-", FAINT)])], width)
    return lines


def _rule(title: str, width: int) -> Text:
    from rich.text import Text

    return Text(f"── {title} ".ljust(width, "─")[:width], "bold", no_wrap=True, overflow="crop")


def _mover_row(style: str, change: float, candle: Candle | TradeEvent) -> tuple[Cell, ...]:
    amounts = _short(candle.volume), _short(candle.value)
    return candle.instrument, (f"{change:+.2f}", style), _number(candle.last_price), *amounts, candle.symbol


def _event_row(event: TradeEvent) -> tuple[Cell, ...]:
    what = _clock(event.traded_at), (event.op.value, STYLES.get(event.op, "")), event.instrument
    deltas = f"{event.last_price_delta or 0:+,}", _short(event.volume_delta, "+"), f"{event.trade_count_delta:+,}"
    return *what, _number(event.last_price), *deltas, event.symbol


def _alert_row(alert: PriceAlert) -> tuple[Cell, ...]:
    state = ("● FIRING" if alert.state is AlertState.FIRING else f"○ {alert.state}", STYLES.get(alert.state, ""))
    what = _clock(alert.raised_at), state, alert.instrument or alert.source
    return *what, _observed(alert), _number(alert.last_price), alert.rule, alert.symbol or alert.when


def render(view: View, width: int, height: int, now: float) -> list[Text]:
    """Return the screen: at most `height` lines of at most `width` cells."""
    from rich.text import Text

    head = _header(view, width, now)
    closed = view.marker is not None and view.marker.phase is not Phase.OPEN and view.totals.total() > 0
    if closed and view.day:
        head += [_rule(f"summary of {view.day}", width), *_flow(summary(view), width)]
    elif view.finished and now - view.finished[0] < SUMMARY_SECONDS:
        head += [_rule(f"summary of {view.finished[1]}", width), *_flow(view.finished[2], width)]
    # On a short terminal the state comes before the tables, but never alone.
    lines = head[: max(3, height - 6)]
    rest = max(0, height - len(lines))
    count = 1 if width < 110 else 2 if width < 165 else 3
    each = (width - 3 * (count - 1)) // count
    risen, fallen = view.movers(rest)
    up = _table("most up", _MOVERS, [_mover_row(GOOD, *pair) for pair in risen], each)
    down = _table("most down", _MOVERS, [_mover_row("red", *pair) for pair in fallen], each)
    alerts = _table("alerts", _ALERTS, [_alert_row(alert) for alert in islice(reversed(view.alerts), rest)], each)
    events = _table("events", _EVENTS, [_event_row(event) for event in islice(reversed(view.events), rest)], each)
    columns = ([[up, down, alerts, events]], [[up, down], [alerts, events]], [[up, down], [events], [alerts]])
    blocks = [_stack(column, rest) for column in columns[count - 1]]
    for row in range(max(map(len, blocks))):
        line = Text(no_wrap=True, overflow="crop")
        for number, block in enumerate(blocks):
            piece = block[row] if row < len(block) else Text()
            line.append_text(piece)
            if number < len(blocks) - 1:
                line.append(" " * (each - piece.cell_len)).append(" │ ", FAINT)
        lines.append(line)
    for line in lines:
        line.truncate(width)
    return lines[:height]


def _stack(tables: Sequence[list[Text]], height: int) -> list[Text]:
    """Return the tables below each other, each with a fair share of the height; one without room is left out."""
    tables = tables[: max(1, height // 2)]
    lines: list[Text] = []
    for number, table in enumerate(tables):
        share = (height - len(lines)) // (len(tables) - number)
        lines += table[:share]
    return lines


# --- Kafka ------------------------------------------------------------------------------------------------------------

Change = Callable[[View, float], None]


class _Feed:
    """Reads Kafka in two threads, so that nothing it waits for holds up the screen; `changes` is what the view gets."""

    def __init__(self, cluster: Cluster) -> None:
        """Raise ConfigurationError where broker or registry do not answer or topics are missing."""
        from confluent_kafka.schema_registry.error import SchemaRegistryError

        self._cluster = cluster
        self._topics = {topic.full_name(cluster.prefix): topic for topic in TOPICS}
        cluster.require_topics(list(self._topics))
        self._registry = cluster.registry()
        with suppress(Undecodable, SchemaRegistryError):
            self._registry.schema(0)  # there is none with this id, but the registry answers, or it does not
        self._decode = {name: self._registry.deserializer(topic.event) for name, topic in self._topics.items()}
        self._stop = threading.Event()
        self.changes: queue.Queue[Change | BaseException] = queue.Queue(maxsize=100)
        jobs = (self._read, self._probe)
        self._threads = [threading.Thread(target=self._run, args=(job,), daemon=True) for job in jobs]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(1.0)  # one that waits for a lost broker is left to the end of the process

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # raised again where the screen is
            self._put(error)

    def _put(self, change: Change | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self.changes.put(change, timeout=0.2)
                return

    def _read(self) -> None:
        from bourse_schemas.reading import follow

        candles = CANDLES.full_name(self._cluster.prefix)
        topics = {name: BACKLOG.get(topic.name) for name, topic in self._topics.items()}
        behind = True
        # A partition whose broker is unreachable must not hold up the others.
        for batch in follow(self._cluster, topics, timeout=math.inf):
            events, undecodable = [], 0
            for record in batch.records:
                if record.place[0] == candles and record.value is None:
                    events.append(Gone((record.key or b"").decode(errors="replace")))
                # A live candle repeats what its event contains.
                elif behind or record.place[0] != candles:
                    event = self._event(record)
                    events.append(event)
                    undecodable += event is None
            caught_up = behind and not batch.behind
            behind = behind and not caught_up
            if self._stop.is_set():
                return
            self._put(_batch(events, undecodable, batch.trouble, caught_up))

    def _event(self, record: TopicRecord) -> Any:
        """Return the record's event, None if it is undecodable; wait while the registry does not say its schema."""
        from confluent_kafka.schema_registry.error import SchemaRegistryError

        failed = False
        while not self._stop.is_set():
            try:
                event = self._decode[record.place[0]](record.value)
            except Undecodable:
                event = None
            except (ConfigurationError, SchemaRegistryError) as error:
                failed = True
                self._put(_trouble("registry", str(error)))
                self._stop.wait(1.0)
                continue
            if failed:
                self._put(_trouble("registry", None))
            return event
        return None

    def _probe(self) -> None:
        """Ask for the groups' lag every few seconds; the answer also shows that the brokers are reachable."""
        from bourse_schemas.reading import group_lag

        prefix = f"{self._cluster.prefix}-"
        while not self._stop.is_set():
            trouble, groups = None, None
            try:
                found = group_lag(self._cluster, timeout=PROBE_SECONDS)
                groups = groups_of(found, prefix)
            except ConfigurationError as error:
                trouble = f"lag unknown, trying again ({error})"
            self._put(_groups(groups, trouble))
            self._stop.wait(PROBE_SECONDS)


def groups_of(found: Sequence[GroupLag], prefix: str) -> list[Group]:
    """Return the groups that have offsets; a market consumer has its members in a group of their own."""
    alive = {each.group.removesuffix("-election") for each in found if each.members}
    return [
        Group(each.group.removeprefix(prefix), each.group in alive, each.lag) for each in found if each.lag is not None
    ]


def _trouble(what: str, text: str | None) -> Change:
    return lambda view, _: view.trouble(what, text)


def _groups(groups: Sequence[Group] | None, trouble: str | None) -> Change:
    def change(view: View, _: float) -> None:
        view.trouble("kafka", trouble)
        view.groups = groups if groups is not None else view.groups

    return change


def _batch(events: list[Any], undecodable: int, trouble: str | None, caught_up: bool) -> Change:
    def change(view: View, now: float) -> None:
        for event in events:
            view.add(event, now)
        view.undecodable += undecodable
        view.trouble("reading", trouble)
        if caught_up:
            view.go_live(now)

    return change


# --- command ----------------------------------------------------------------------------------------------------------


@click.command()
@cluster_options
@click.option("--seconds", type=click.FloatRange(min=0), help="End after N seconds. [default: at Ctrl-C]")
def watch(cluster: Cluster, seconds: float | None) -> None:
    """Show the market, the feed and the consumers live, from Kafka alone.

    On a terminal a screen that fits its size; otherwise a line for every poll and every alert.
    """
    try:
        from rich.console import Console
        from rich.console import Group as Lines
        from rich.live import Live
    except ModuleNotFoundError as error:
        raise ConfigurationError("`bourse watch` needs rich: pip install 'bourse-stream[watch]'") from error
    from bourse_schemas.kafka import kafka_logger

    kafka_logger().disabled = True  # the view says itself what is wrong, once
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal cannot show Persian, but all the rest
    console, view = Console(), View()
    on_screen = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
    screen = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    stop = stop_on_signals()
    with _Feed(cluster) as feed, screen if on_screen else nullcontext() as live:
        began, drawn = time.monotonic(), None
        while not stop.is_set() and (seconds is None or time.monotonic() - began < seconds):
            frame, changed = time.monotonic() + FRAME_SECONDS, False
            while (wait := frame - time.monotonic()) > 0:
                try:
                    change = feed.changes.get(timeout=wait)
                except queue.Empty:
                    break
                if isinstance(change, BaseException):
                    raise change
                change(view, time.monotonic())
                changed = True
            now = time.monotonic()
            if now - began > CATCH_UP_SECONDS:
                view.go_live(now)  # a partition without a leader must not hold up the others
            view.tell_silence(now)
            if live is None:
                for line in view.news:
                    click.echo(line)
            elif changed or drawn != (int(now), console.size):
                drawn = (int(now), console.size)
                live.update(Lines(*render(view, console.width, console.height, now)), refresh=True)
            view.news.clear()
