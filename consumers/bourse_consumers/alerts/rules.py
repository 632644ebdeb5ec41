"""What the alert rules mean: pure, in the time of the data. docs/alerts.md says the same for people.

One engine sees one partition. Its time is the latest `observed_at` in it; what falls due by an event's time comes
before what the event itself brings. A rule's condition holds or not, per instrument and direction; an episode begins
(FIRING, once) when it has held as long as the rule wants, and ends (RESOLVED, once) when it no longer holds, or without
a record with the day. Nothing outlasts the Tehran day of the partition's time, so all of it can be folded again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from fnmatch import translate
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from math import ceil, floor
from typing import Any, ClassVar, Literal, NamedTuple, cast
from uuid import UUID, uuid5

from bourse_schemas.events import (
    TEHRAN,
    AlertKind,
    AlertState,
    FeedState,
    PollMarker,
    PriceAlert,
    ResolvedBy,
    Severity,
    TradeEvent,
    Unit,
)

__all__ = [
    "MESSAGE_FIELDS",
    "PRICES",
    "Band",
    "Cancelled",
    "Change",
    "Crossing",
    "Direction",
    "Engine",
    "Feed",
    "Match",
    "Quiet",
    "Rule",
    "Test",
    "Trade",
    "Traded",
]

NAMESPACE = UUID("5a0e6c0e-6f0f-5c53-9a51-0d8f1b1f7d11")
EPOCH = date(1970, 1, 1).toordinal()
DAY_MS = 86_400_000
NEVER = 1 << 62
PRICES = ("open_price", "high_price", "low_price", "last_price", "closing_price", "previous_close")


class Direction(Enum):
    """Which way a price goes; the value is its sign. NONE is for rules without one."""

    UP = 1
    DOWN = -1
    NONE = 0


class Trade(NamedTuple):
    """What rules look at in a TradeEvent: its fields, instants in milliseconds and days as numbers since 1970."""

    event_id: str
    op: str
    instrument: str
    trading_day: int
    traded_at: int
    observed_at: int
    poll_sequence: int
    source: str
    symbol: str
    title: str
    is_right: bool
    open_price: int | None
    high_price: int | None
    low_price: int | None
    last_price: int | None
    closing_price: int | None
    previous_close: int | None
    volume: int
    value: int
    volume_delta: int
    value_delta: int
    trade_count_delta: int

    @classmethod
    def of(cls, event: TradeEvent) -> Trade:
        """Return what rules look at in an event."""
        values: dict[str, Any] = {name: getattr(event, name) for name in cls._fields}
        values["trading_day"] = event.trading_day.toordinal() - EPOCH
        values["traded_at"], values["observed_at"] = _millis(event.traded_at), _millis(event.observed_at)
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Match:
    """Which instruments a rule is about: any where nothing is named. Symbols and patterns are normalised."""

    instruments: frozenset[str] = frozenset()
    symbols: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    rights: bool | None = None

    def named(self, instrument: str, symbol: str) -> bool:
        """Say whether an instrument of any kind is meant."""
        if not (self.instruments or self.symbols or self.patterns):
            return True
        if instrument in self.instruments or symbol in self.symbols:
            return True
        return any(_pattern(pattern)(text) for pattern in self.patterns for text in (instrument, symbol))

    def __call__(self, event: Any) -> bool:
        """Say whether the rule is about the instrument of an event, a candle or a Trade."""
        return self.rights in {None, event.is_right} and self.named(event.instrument, event.symbol)


@dataclass(frozen=True, slots=True)
class Change:
    """The price moved by at least `threshold`, in percent or rial; over when by less than `resolve`.

    `since` is a window (compared is the price in force that long ago: of the last event at or before then, or the day's
    first while the day is younger), or what the price is compared with.
    """

    threshold: Fraction
    resolve: Fraction
    unit: Unit
    since: timedelta | Literal["open", "previous_close", "last_alert"]
    kind: ClassVar[AlertKind] = AlertKind.CHANGE


@dataclass(frozen=True, slots=True)
class Crossing:
    """The price came to `level` from the other side, over when it is `margin` back on that side.

    The day's first price is compared with the previous close, where there is one.
    """

    level: int
    margin: Fraction
    kind: ClassVar[AlertKind] = AlertKind.CROSSING


@dataclass(frozen=True, slots=True)
class Band:
    """The price is outside, or inside, low…high, both part of the band; over when back by `margin`."""

    low: int
    high: int
    outside: bool
    margin: Fraction
    kind: ClassVar[AlertKind] = AlertKind.BAND


@dataclass(frozen=True, slots=True)
class Traded:
    """Volume or value, of the day or within a window, is at least `threshold`; over when less than `resolve`.

    With `times` the threshold is a multiple of the instrument's own pace today, before the window.
    """

    kind: AlertKind
    threshold: Fraction
    resolve: Fraction
    times: bool
    window: timedelta | None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Trades of at least so many shares, rial or trades were annulled at once."""

    threshold: int
    unit: Unit
    kind: ClassVar[AlertKind] = AlertKind.CANCELLED


@dataclass(frozen=True, slots=True)
class Quiet:
    """The instrument has not traded for `after` while its market, the partition, has."""

    after: timedelta
    kind: ClassVar[AlertKind] = AlertKind.QUIET


@dataclass(frozen=True, slots=True)
class Feed:
    """The feed is in one of `states`, or no marker came for `silent` after the last one's `next_poll_at`."""

    states: frozenset[FeedState]
    silent: timedelta | None
    kind: ClassVar[AlertKind] = AlertKind.FEED


Test = Change | Crossing | Band | Traded | Cancelled | Quiet | Feed
NO_TIME = timedelta()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, read and checked. `version` is 12 hexadecimal digits of the sha256 of its normalised form.

    `hold` is how long the condition must hold, `keep` how long an episode goes on without it, `cooldown` how long after
    an alert the next may begin; `active` the minutes of the Tehran day in which one may begin, the last excluded.
    """

    name: str
    version: str
    test: Test
    directions: tuple[Direction, ...] = (Direction.NONE,)
    match: Match = field(default_factory=Match)
    price: str = "last_price"
    hold: timedelta = NO_TIME
    keep: timedelta = NO_TIME
    cooldown: timedelta = NO_TIME
    once: bool = False
    active: tuple[int, int] | None = None
    severity: Severity = Severity.INFO
    labels: Mapping[str, str] = field(default_factory=dict)
    channels: Sequence[str] = ()
    message: str | None = None

    @property
    def kind(self) -> AlertKind:
        """Return what kind of alerts it raises."""
        return self.test.kind

    def condition(self, direction: Direction) -> str:
        """Return the rule in words."""
        way, test = direction.name.lower(), self.test
        match test:
            case Change():
                by = _plain(test.threshold) + ("%" if test.unit is Unit.PERCENT else " rial")
                since = f"within {_span(test.since)}" if isinstance(test.since, timedelta) else (
                    f"since the {test.since.replace('_', ' ')}")  # fmt: skip
                said = f"{self.price} {way} by {by} or more {since}"
            case Crossing():
                said = f"{self.price} {way} to {test.level:,} rial"
            case Band():
                said = f"{self.price} {'outside' if test.outside else 'inside'} {test.low:,} to {test.high:,} rial"
            case Traded():
                unit = "shares" if test.kind is AlertKind.VOLUME else "rial"
                much = f"{_plain(test.threshold)} times its pace" if test.times else f"{_plain(test.threshold)} {unit}"
                within = f"within {_span(test.window)}" if test.window else "today"
                said = f"{test.kind.lower()} of {much} or more {within}"
            case Cancelled():
                unit = {Unit.SHARES: "shares", Unit.RIAL: "rial", Unit.COUNT: "trades"}[test.unit]
                said = f"{test.threshold:,} {unit} or more annulled"
            case Quiet():
                said = f"no trade for {_span(test.after)}"
            case Feed():
                states = " or ".join(sorted(test.states))
                said = f"feed {states}" if test.silent is None else f"no poll for {_span(test.silent)} after it was due"
        return f"{said}, for {_span(self.hold)}" if self.hold else said


# --- what a rule sees of one instrument -------------------------------------------------------------------------------


class _Series:
    """Of one column and window: what is in force a window ago, or the day's first while the day is younger."""

    __slots__ = ("begin", "column", "first", "span", "steps")

    def __init__(self, column: int, span: timedelta) -> None:
        self.column = column
        self.span = _length(span)
        self.steps: deque[tuple[int, int]] = deque()
        self.first: tuple[int, int] | None = None
        self.begin = 0

    def take(self, trade: Any, now: int) -> None:
        """Take an event's value; a null leaves the one before in force."""
        self.begin = begin = now - self.span
        steps, value = self.steps, trade[self.column]
        if value is not None:
            if self.first is None:
                self.first = now, value
            steps.append((now, value))
        while len(steps) > 1 and steps[1][0] <= begin:
            steps.popleft()


class _Watch:
    """One rule and direction for one instrument and day. `look` is all that differs between the types.

    It returns True where the condition holds, False where it is over, None where it is as it was.
    """

    __slots__ = (
        "alert_id", "began", "code", "column", "direction", "due", "holds", "muted", "number", "raised", "reference",
        "rule", "seen", "sign", "since",
    )  # fmt: skip
    # An episode of a moment: it is over with the instrument's next event.
    momentary = False

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        self.number, self.rule, self.direction, self.code = number, rule, direction, state.code
        self.column = Trade._fields.index(rule.price)
        self.sign = direction.value
        self.holds = self.muted = False
        self.alert_id: str | None = None
        # When the condition came to hold, by which event; when the last alert was raised, what falls due and when.
        self.since, self.began = now, ""
        self.raised: int | None = None
        self.due: int | None = None
        # The event whose values stand in an alert: the last that could be judged.
        self.seen: Any = None
        self.reference: int | None = None

    def look(self, trade: Any, now: int) -> bool | None:
        raise NotImplementedError

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:
        """Return what was observed at the last look, the threshold and their unit."""
        raise NotImplementedError

    def price(self) -> int | None:
        """Return the price at the last look."""
        return cast("int | None", self.seen[self.column]) if isinstance(self.seen, Trade) else None

    def fired(self) -> None:
        """Take note that an alert was raised."""


class _ChangeWatch(_Watch):
    __slots__ = ("anchors", "begin_a", "begin_b", "end_a", "end_b", "other", "percent", "series")

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        super().__init__(number, rule, direction, state, now)
        test = rule.test
        assert isinstance(test, Change)  # noqa: S101  # for the type checker
        # moved ≥ threshold, in integers: moved · a ≥ reference · b, the reference counting in percent only.
        self.percent = test.unit is Unit.PERCENT
        hundred = 100 if self.percent else 1
        self.begin_a, self.begin_b = test.threshold.denominator * hundred, test.threshold.numerator
        self.end_a, self.end_b = test.resolve.denominator * hundred, test.resolve.numerator
        self.series = state.series(self.column, test.since) if isinstance(test.since, timedelta) else None
        self.other = {"open": Trade._fields.index("open_price"), "previous_close": 16}.get(str(test.since))
        self.anchors = state.anchors

    @property
    def momentary(self) -> bool:  # type: ignore[override]  # of this type by what it compares with
        return self.series is None and self.other is None

    def look(self, trade: Any, now: int) -> bool | None:  # noqa: ARG002
        price: int | None = trade[self.column]
        if price is None:
            return None
        if self.series is not None:
            reference: int | None = self.series.steps[0][1]
        elif self.other is not None:
            reference = trade[self.other]
        else:
            reference = self.anchors.setdefault(self.number, price)
        if not reference:
            return None
        self.seen, self.reference = trade, reference
        moved = self.sign * (price - reference)
        scale = reference if self.percent else 1
        if moved * self.begin_a >= scale * self.begin_b:
            return True
        return False if moved * self.end_a < scale * self.end_b or self.momentary else None

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:  # noqa: ARG002
        test: Any = self.rule.test
        price, reference = self.price() or 0, self.reference or 1
        moved = float(Fraction((price - reference) * 100, reference) if self.percent else price - reference)
        return moved, self.sign * float(test.threshold), test.unit

    def fired(self) -> None:
        if self.momentary:
            self.anchors[self.number] = self.seen[self.column]


class _CrossingWatch(_Watch):
    __slots__ = ("back", "level", "near")

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        super().__init__(number, rule, direction, state, now)
        test: Any = rule.test
        # Prices are whole: so is what they are compared with.
        self.level, self.back = test.level, min(0, ceil(-test.margin))
        # Whether the price was last on the side it has to come from; None while that is unknown.
        self.near: bool | None = None

    def look(self, trade: Any, now: int) -> bool | None:  # noqa: ARG002
        price: int | None = trade[self.column]
        if price is None:
            return None
        if self.near is None and trade.previous_close:
            self.near = self.sign * (trade.previous_close - self.level) < 0
            self.reference = trade.previous_close
        else:
            self.reference = self.price()
        self.seen = trade
        beyond = self.sign * (price - self.level)
        if beyond >= 0:
            came, self.near = self.near, False
            return True if came else None
        if self.near is None or beyond < self.back:
            self.near = True
        return False if self.near else None

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:  # noqa: ARG002
        return float(self.price() or 0), float(self.level), Unit.RIAL


class _BandWatch(_Watch):
    __slots__ = ("high", "low", "outside", "over_high", "over_low")

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        super().__init__(number, rule, direction, state, now)
        test: Any = rule.test
        self.low, self.high, self.outside = test.low, test.high, test.outside
        margin = test.margin if self.outside else -test.margin
        self.over_low, self.over_high = ceil(self.low + margin), floor(self.high - margin)

    def look(self, trade: Any, now: int) -> bool | None:  # noqa: ARG002
        price: int | None = trade[self.column]
        if price is None:
            return None
        self.seen = trade
        inside = self.low <= price <= self.high
        if inside is not self.outside:
            return True
        over = self.over_low <= price <= self.over_high
        return False if over is self.outside else None

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:  # noqa: ARG002
        price = self.price() or 0
        return (
            float(price),
            float(self.low if abs(price - self.low) <= abs(price - self.high) else self.high),
            Unit.RIAL,
        )


class _TradedWatch(_Watch):
    """Compares in integers: amount · divisor ≥ threshold, both with the threshold's denominator."""

    __slots__ = ("amount", "begin", "divisor", "end", "of", "scale", "series", "times")

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        super().__init__(number, rule, direction, state, now)
        test: Any = rule.test
        self.of = Trade._fields.index(test.kind.lower())
        self.times = test.times
        self.series = state.series(self.of, test.window) if test.window else None
        self.scale = test.threshold.denominator * test.resolve.denominator
        self.begin, self.end = int(test.threshold * self.scale), int(test.resolve * self.scale)
        self.amount, self.divisor = 0, 1

    def look(self, trade: Any, now: int) -> bool | None:  # noqa: ARG002
        amount: int = trade[self.of]
        divisor = 1
        series = self.series
        if series is not None:
            before = series.steps[0][1]
            began, first = series.first  # type: ignore[misc]  # a total is never null
            amount -= before
            if self.times:
                # Its pace: what was traded from the day's first event to the window's begin.
                age, so_far = series.begin - began, before - first
                if age < series.span or so_far <= 0:
                    return None
                amount, divisor = amount * age, so_far * series.span
        self.seen, self.amount, self.divisor = trade, amount, divisor
        amount *= self.scale
        if amount >= self.begin * divisor:
            return True
        return False if amount < self.end * divisor else None

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:  # noqa: ARG002
        test: Any = self.rule.test
        unit = Unit.NONE if test.times else Unit.SHARES if test.kind is AlertKind.VOLUME else Unit.RIAL
        return float(Fraction(self.amount, self.divisor)), float(test.threshold), unit


class _CancelledWatch(_Watch):
    __slots__ = ("annulled", "of")
    momentary = True

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        super().__init__(number, rule, direction, state, now)
        test: Any = rule.test
        names = {Unit.SHARES: "volume_delta", Unit.RIAL: "value_delta", Unit.COUNT: "trade_count_delta"}
        self.of = Trade._fields.index(names[test.unit])
        self.annulled = 0

    def look(self, trade: Any, now: int) -> bool | None:  # noqa: ARG002
        self.seen = trade
        if trade.op != "CANCELLED":
            self.annulled = 0
            return False
        self.annulled = -trade[self.of]
        return self.annulled >= self.rule.test.threshold  # type: ignore[union-attr]

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:  # noqa: ARG002
        test: Any = self.rule.test
        return float(self.annulled), float(test.threshold), test.unit


class _Still(_Watch):
    """A condition that time alone brings about: `after` milliseconds past `base`."""

    __slots__ = ("after", "base", "queued")

    def __init__(self, number: int, rule: Rule, direction: Direction, state: _State, now: int) -> None:
        super().__init__(number, rule, direction, state, now)
        test: Any = rule.test
        self.after = _length(test.after if isinstance(test, Quiet) else test.silent)
        self.base: int | None = None
        # It stands in the heap once, for this time, at or before its real one: a trade need not push.
        self.queued: int | None = None

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:
        waited = None if self.base is None else (at - self.base) / 1000
        return waited, self.after / 1000, Unit.SECONDS


class _QuietWatch(_Still):
    __slots__ = ()

    def look(self, trade: Any, now: int) -> bool | None:
        if not _is_trade(trade):
            return None
        self.seen, self.base = trade, now
        return False


class _SilentWatch(_Still):
    __slots__ = ()

    def look(self, trade: PollMarker, now: int) -> bool | None:  # noqa: ARG002
        self.seen = trade
        self.base = None if trade.next_poll_at is None else _millis(trade.next_poll_at)
        return False


class _FeedWatch(_Watch):
    __slots__ = ()

    def look(self, trade: PollMarker, now: int) -> bool | None:  # noqa: ARG002
        self.seen = trade
        return trade.feed_state in self.rule.test.states  # type: ignore[union-attr]

    def observed(self, at: int) -> tuple[float | None, float | None, Unit]:  # noqa: ARG002
        return None, None, Unit.NONE


def _watch(rule: Rule) -> type[_Watch]:
    match rule.test:
        case Change():
            return _ChangeWatch
        case Crossing():
            return _CrossingWatch
        case Band():
            return _BandWatch
        case Traded():
            return _TradedWatch
        case Cancelled():
            return _CancelledWatch
        case Quiet():
            return _QuietWatch
        case Feed(silent=None):
            return _FeedWatch
    return _SilentWatch


class _State:
    """What is known of one instrument on its trading day, or of one source of polls."""

    __slots__ = ("all_series", "anchors", "code", "day", "stills", "watches")

    def __init__(self, code: str, day: int) -> None:
        self.code, self.day = code, day
        self.watches: list[_Watch] = []
        self.stills: list[_Still] = []
        self.all_series: list[_Series] = []
        # Per rule the price of its last alert, or the day's first.
        self.anchors: dict[int, int] = {}

    def series(self, column: int, span: timedelta) -> _Series:
        """Return the series of a column and window: rules share them."""
        for each in self.all_series:
            if each.column == column and each.span == _length(span):
                return each
        self.all_series.append(_Series(column, span))
        return self.all_series[-1]


# --- the engine -------------------------------------------------------------------------------------------------------


class _Index:
    """Rules by what they are about: those that cannot match cost nothing."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.feeds = [each for each in enumerate(rules) if isinstance(each[1].test, Feed)]
        self._any: list[tuple[int, Rule]] = []
        self._by_name: dict[str, list[tuple[int, Rule]]] = {}
        self._found: dict[tuple[str, str, bool], list[tuple[int, Rule]]] = {}
        for number, rule in enumerate(rules):
            if isinstance(rule.test, Feed):
                continue
            if rule.match.patterns or not (rule.match.instruments or rule.match.symbols):
                self._any.append((number, rule))
            else:
                for name in {*rule.match.instruments, *rule.match.symbols}:
                    self._by_name.setdefault(name, []).append((number, rule))

    def about(self, trade: Trade) -> list[tuple[int, Rule]]:
        """Return the rules about an event's instrument, in the order of the file."""
        key = trade.instrument, trade.symbol, trade.is_right
        if key not in self._found:
            named = (*self._by_name.get(trade.instrument, ()), *self._by_name.get(trade.symbol, ()))
            found = {number: rule for number, rule in (*self._any, *named) if rule.match(trade)}
            self._found[key] = sorted(found.items())
        return self._found[key]


class Engine:
    """Folds the events of one partition into alerts."""

    def __init__(self, rules: Sequence[Rule] | _Index) -> None:
        self._index = rules if isinstance(rules, _Index) else _Index(rules)
        self._states: dict[str, _State] = {}
        self._feeds: dict[str, _State] = {}
        # When, then what orders those of one time; True where a `_Still` may have been still for long enough.
        self._timers: list[tuple[int, str, int, int, int, bool, _Watch]] = []
        # The open episodes that were said before: their begin is not said again.
        self._said: Collection[str] = ()
        self._pushed = 0
        self._now = -NEVER
        self._day_begin = self._day_end = -NEVER
        # The market: when it last traded, and per `after` when it last went on after as long a rest.
        self._traded = NEVER
        self._resumed: dict[int, int] = {}

    def sibling(self) -> Engine:
        """Return a new engine for another partition; what the rules are about is worked out once."""
        return Engine(self._index)

    @property
    def day(self) -> date | None:
        """Return the Tehran day of the partition's time, None before the first event."""
        return None if self._now == -NEVER else _instant(self._now).astimezone(TEHRAN).date()

    @property
    def now(self) -> datetime:
        """Return the partition's time: the latest `observed_at` in it."""
        return _instant(self._now)

    def take(self, event: TradeEvent | PollMarker) -> list[PriceAlert]:
        """Return the alerts that fall due by this event's time, then those that it raises and resolves."""
        return self.mark(event) if isinstance(event, PollMarker) else self.fold(Trade.of(event))

    def fold(self, trade: Trade) -> list[PriceAlert]:
        """Do as `take` does, with what rules look at in a trade event."""
        alerts: list[PriceAlert] = []
        if trade.observed_at > self._now:
            self._advance(trade.observed_at, alerts)
        now = self._now
        state = self._states.get(trade.instrument)
        if state is None or state.day != trade.trading_day:
            if state is not None and trade.trading_day < state.day:
                return alerts
            state = self._begin(trade, state)
        if _is_trade(trade):
            self._traded = now
        for series in state.all_series:
            series.take(trade, now)
        for watch in state.watches:
            verdict = watch.look(trade, now)
            if verdict or (verdict is False and watch.holds):
                self._judge(watch, now, alerts, verdict=verdict)
        for still in state.stills:
            self._move(still, trade, now, alerts)
        return alerts

    def mark(self, marker: PollMarker) -> list[PriceAlert]:
        """Do as `take` does, with a poll's marker."""
        alerts: list[PriceAlert] = []
        at = _millis(marker.received_at or marker.requested_at)
        if at > self._now:
            self._advance(at, alerts)
        state = self._feeds.get(marker.source)
        if state is None:
            state = self._feeds[marker.source] = _State(marker.source, 0)
            self._watch_all(state, self._index.feeds)
        for watch in state.watches:
            self._judge(watch, self._now, alerts, verdict=bool(watch.look(marker, self._now)))
        # The times of a simulated market say nothing about when its next poll is due.
        for still in state.stills if not marker.simulated else ():
            self._move(still, marker, self._now, alerts)
        return alerts

    def silence(self, now: datetime) -> list[PriceAlert]:
        """Return the alerts about polls that are overdue by the wall clock: a marker would bring the same, later."""
        alerts: list[PriceAlert] = []
        at = _millis(now)
        for state in self._feeds.values():
            for watch in state.stills:
                if not watch.holds and watch.base is not None and watch.base + watch.after <= at:
                    self._turn(watch, verdict=True, at=watch.base + watch.after, alerts=alerts)
                if watch.due is not None and watch.due <= at:
                    self._fall_due(watch, watch.due, alerts)
        return alerts

    def open_episodes(self) -> set[str]:
        """Return the ids of the alerts that are firing."""
        return {watch.alert_id for watch in self._watches() if watch.alert_id is not None}

    def knows(self, code: str) -> bool:
        """Say whether this partition had anything of an instrument, or source, today."""
        return code in self._states or code in self._feeds

    def mute(self, said: Collection[str]) -> None:
        """Take over what was said before: these ids are open. Of what was not said, the end is not said either."""
        self._said = said
        for watch in self._watches():
            watch.muted = watch.alert_id is not None and watch.alert_id not in said

    def _watches(self) -> Iterator[_Watch]:
        for state in (*self._states.values(), *self._feeds.values()):
            yield from state.watches
            yield from state.stills

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, trade: Trade, old: _State | None) -> _State:
        if old is not None:
            _forget(old)
        state = self._states[trade.instrument] = _State(trade.instrument, trade.trading_day)
        self._watch_all(state, self._index.about(trade))
        return state

    def _watch_all(self, state: _State, rules: Iterable[tuple[int, Rule]]) -> None:
        for number, rule in rules:
            for direction in rule.directions:
                watch = _watch(rule)(number, rule, direction, state, self._now)
                if not isinstance(watch, _Still):
                    state.watches.append(watch)
                    continue
                state.stills.append(watch)
                if isinstance(watch, _QuietWatch):
                    self._resumed.setdefault(watch.after, -NEVER)

    def _judge(self, watch: _Watch, now: int, alerts: list[PriceAlert], *, verdict: bool) -> None:
        if verdict is not watch.holds:
            self._turn(watch, verdict=verdict, at=now, alerts=alerts)
        elif verdict and watch.momentary and watch.alert_id is not None:
            self._turn(watch, verdict=False, at=now, alerts=alerts)
            self._turn(watch, verdict=True, at=now, alerts=alerts)

    def _move(self, still: _Still, event: Any, now: int, alerts: list[PriceAlert]) -> None:
        """Let what was waited for be there, and wait for the next."""
        if still.look(event, now) is not None and still.holds:
            self._turn(still, verdict=False, at=now, alerts=alerts)
        if still.base is not None and (still.queued is None or still.base + still.after < still.queued):
            self._wait(still, still.base + still.after)

    def _turn(self, watch: _Watch, *, verdict: bool, at: int, alerts: list[PriceAlert]) -> None:
        """Go over to holding, or to not holding any more."""
        watch.holds = verdict
        watch.due = None
        if watch.alert_id is None:
            if verdict:
                watch.since, watch.began = at, _identity(watch.seen)
                self._fall_due_at(watch, self._earliest(watch), at, alerts)
        elif not verdict:
            self._fall_due_at(watch, at + _length(watch.rule.keep), at, alerts)

    def _earliest(self, watch: _Watch) -> int:
        """Return when the episode may begin, if the condition holds until then."""
        rule = watch.rule
        due = watch.since + _length(rule.hold)
        if watch.raised is not None:
            due = NEVER if rule.once else max(due, watch.raised + _length(rule.cooldown))
        if rule.active is not None and due < NEVER:
            begin, end = (_clock(due, minutes) for minutes in rule.active)
            due = max(due, begin) if due < end else NEVER
        return due

    def _fall_due_at(self, watch: _Watch, due: int, at: int, alerts: list[PriceAlert]) -> None:
        if due <= at:
            self._fall_due(watch, at, alerts)
        elif due < NEVER:
            watch.due = due
            self._push(due, watch)

    def _fall_due(self, watch: _Watch, at: int, alerts: list[PriceAlert]) -> None:
        """Fire, or resolve."""
        watch.due = None
        if watch.alert_id is None:
            rule = watch.rule
            seed = f"{rule.name}\n{rule.version}\n{watch.code}\n{watch.began}\n{watch.direction.name}"
            watch.alert_id, watch.raised = str(uuid5(NAMESPACE, seed)), at
            if watch.alert_id not in self._said:
                alerts.append(_alert(watch, watch.alert_id, AlertState.FIRING, at))
            watch.fired()
        else:
            if not watch.muted:
                alerts.append(_alert(watch, watch.alert_id, AlertState.RESOLVED, at))
            watch.alert_id, watch.muted = None, False

    def _wait(self, still: _Still, due: int) -> None:
        still.queued = due
        self._push(due, still, still=True)

    def _push(self, due: int, watch: _Watch, *, still: bool = False) -> None:
        self._pushed += 1
        heappush(self._timers, (due, watch.code, watch.number, -watch.sign, self._pushed, still, watch))

    def _advance(self, at: int, alerts: list[PriceAlert]) -> None:
        """Let time pass: what is due by then comes first, unless its day is over."""
        if at >= self._day_end:
            self._new_day(at)
        rest = at - self._traded
        for after in self._resumed:
            if rest >= after:
                self._resumed[after] = at
        timers = self._timers
        while timers and timers[0][0] <= at:
            due, *_, still, watch = heappop(timers)
            if still and isinstance(watch, _Still):
                if watch.queued == due:
                    self._be_still(watch, due, alerts)
            elif watch.due == due:
                self._fall_due(watch, due, alerts)
        self._now = at

    def _be_still(self, watch: _Still, due: int, alerts: list[PriceAlert]) -> None:
        """Begin where nothing came for as long; else stand in the heap again for when that may be."""
        watch.queued = None
        if watch.base is None or watch.holds:
            return
        base = watch.base
        if isinstance(watch, _QuietWatch):
            base = max(base, self._resumed[watch.after])
        if base + watch.after > due:
            self._wait(watch, base + watch.after)
        else:
            self._turn(watch, verdict=True, at=due, alerts=alerts)

    def _new_day(self, at: int) -> None:
        local = _instant(at).astimezone(TEHRAN)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0)
        self._day_begin = _millis(midnight)
        self._day_end = _millis(midnight + timedelta(days=1))
        self._states.clear()
        self._timers.clear()
        self._traded = NEVER
        self._resumed.clear()
        for source, old in self._feeds.items():
            state = self._feeds[source] = _State(source, 0)
            self._watch_all(state, self._index.feeds)
            for number, still in enumerate(old.stills):
                # Polls that were to come on this day, announced the day before, may be overdue already.
                if still.base is not None and still.base + still.after >= self._day_begin:
                    state.stills[number] = still
                    still.queued = None
                    if not still.holds:
                        self._wait(still, still.base + still.after)


def _forget(state: _State) -> None:
    """Let nothing of a day that is over fall due."""
    for watch in (*state.watches, *state.stills):
        watch.due = None
    for still in state.stills:
        still.base = None


def _is_trade(trade: Trade) -> bool:
    return trade.op in {"TRADED", "OPENED"}


def _identity(event: Any) -> str:
    return event.event_id if isinstance(event, Trade) else f"{event.source}-{event.poll_sequence}"


def _alert(watch: _Watch, alert_id: str, state: AlertState, at: int) -> PriceAlert:
    rule, last, price = watch.rule, watch.seen, watch.price()
    trade: Trade | None = last if isinstance(last, Trade) else None
    observed, threshold, unit = watch.observed(at)
    values: dict[str, Any] = {
        "rule": rule.name,
        "state": state.value,
        "severity": rule.severity.value,
        "condition": rule.condition(watch.direction),
        "instrument": trade and trade.instrument,
        "symbol": trade and trade.symbol,
        "title": trade and trade.title,
        "price": price,
        "reference_price": watch.reference,
        "observed": None if observed is None else round(observed, 2),
        "threshold": threshold,
    }
    return PriceAlert(
        alert_id=alert_id,
        state=state,
        kind=rule.kind,
        rule=rule.name,
        rule_version=rule.version,
        severity=rule.severity,
        trading_day=(date.fromordinal(trade.trading_day + EPOCH) if trade else _instant(at).astimezone(TEHRAN).date()),
        source=last.source,
        instrument=values["instrument"],
        symbol=values["symbol"],
        title=values["title"],
        event_id=trade and trade.event_id,
        poll_sequence=last.poll_sequence,
        condition=values["condition"],
        observed=observed,
        threshold=threshold,
        unit=unit,
        price=price,
        reference_price=watch.reference,
        traded_at=_instant(trade.traded_at) if trade else None,
        started_at=_instant(watch.since),
        raised_at=_instant(at),
        resolved_by=ResolvedBy.CONDITION if state is AlertState.RESOLVED else None,
        message=None if rule.message is None else fill(rule.message, values),
        labels=dict(rule.labels),
        channels=list(rule.channels),
    )


# --- words and numbers ------------------------------------------------------------------------------------------------

# What a message template may name, with a value of the kind it will have.
MESSAGE_FIELDS: Mapping[str, str | int | float] = {
    **dict.fromkeys(("rule", "state", "severity", "condition", "instrument", "symbol", "title"), "text"),
    **dict.fromkeys(("price", "reference_price"), 1),
    **dict.fromkeys(("observed", "threshold"), 1.5),
}


class _Unknown:
    """A value that is not there: written as a dash whatever its format, so that no alert fails by its words."""

    def __format__(self, _: str) -> str:
        return "–"


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Return a message; what is null in it is a dash."""
    return template.format_map({name: _Unknown() if value is None else value for name, value in values.items()})


@lru_cache(4096)
def _pattern(pattern: str) -> Any:
    return re.compile(translate(pattern)).match


def _millis(instant: datetime) -> int:
    return round(instant.timestamp() * 1000)


def _instant(millis: int) -> datetime:
    return datetime.fromtimestamp(millis / 1000, UTC)


@lru_cache(4096)
def _length(span: timedelta) -> int:
    return round(span.total_seconds() * 1000)


def _clock(at: int, minutes: int) -> int:
    """Return when on the day of an instant a clock in Tehran shows so many minutes after midnight."""
    midnight = _instant(at).astimezone(TEHRAN).replace(hour=0, minute=0, second=0, microsecond=0)
    return _millis(midnight + timedelta(minutes=minutes))


def _plain(number: Fraction) -> str:
    return f"{number.numerator:,}" if number.denominator == 1 else f"{float(number):,.10g}"


def _span(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
