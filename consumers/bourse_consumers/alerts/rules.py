"""What the alert rules mean: pure, in the time of the data.

An episode of a rule, a direction and an instrument begins when the rule's condition comes to hold (FIRING, once) and
ends when it no longer holds by the rule's hysteresis (RESOLVED, once), or without a record with its trading day. All
state lives in the trading day of its instrument, so it can be rebuilt by folding the day's events again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from enum import Enum
from fractions import Fraction
from typing import Any
from uuid import UUID, uuid5

from bourse_schemas.events import AlertKind, AlertState, PriceAlert, ResolvedBy, Severity, TradeEvent, Unit

__all__ = ["Change", "Crossing", "Direction", "Engine", "Match", "Rule"]

NAMESPACE = UUID("5a0e6c0e-6f0f-5c53-9a51-0d8f1b1f7d11")


class Direction(Enum):
    """Which way a price goes; the value is its sign."""

    UP = 1
    DOWN = -1


@dataclass(frozen=True, slots=True)
class Match:
    """Which instruments a rule is about: None is any; symbols are normalised."""

    instruments: frozenset[str] | None = None
    symbols: frozenset[str] | None = None
    rights: bool | None = None

    def __call__(self, event: TradeEvent) -> bool:
        """Say whether the rule is about the event's instrument."""
        named = self.instruments is None and self.symbols is None
        if self.instruments is not None and event.instrument in self.instruments:
            named = True
        if self.symbols is not None and event.symbol in self.symbols:
            named = True
        return named and self.rights in {None, event.is_right}


@dataclass(frozen=True, slots=True)
class Change:
    """The price moved by at least `threshold` within `window`, in percent or rial.

    It is compared with the price in force a window ago: that of the last event at or before then, or the day's first
    while the day is younger. It ends below `resolve`.
    """

    threshold: Fraction
    resolve: Fraction
    unit: Unit
    window: timedelta


@dataclass(frozen=True, slots=True)
class Crossing:
    """The price came to `level` from the other side; it ends when it is `margin` back on that side.

    The day's first price is compared with the previous close, where there is one.
    """

    level: int
    margin: Fraction


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, read and checked. `version` is 12 hexadecimal digits of the sha256 of its normalised form."""

    name: str
    version: str
    test: Change | Crossing
    directions: tuple[Direction, ...]
    match: Match = field(default_factory=Match)
    price: str = "last_price"
    severity: Severity = Severity.INFO
    labels: Mapping[str, str] = field(default_factory=dict)
    channels: Sequence[str] = ()
    message: str | None = None

    @property
    def kind(self) -> AlertKind:
        """Return what kind of alerts it raises."""
        return AlertKind.CHANGE if isinstance(self.test, Change) else AlertKind.CROSSING

    def condition(self, direction: Direction) -> str:
        """Return the rule in words."""
        test = self.test
        way = "up" if direction is Direction.UP else "down"
        if isinstance(test, Change):
            unit = "%" if test.unit is Unit.PERCENT else " rial"
            return f"{self.price} {way} by {_plain(test.threshold)}{unit} or more within {_span(test.window)}"
        return f"{self.price} {way} to {test.level:,} rial"


@dataclass(slots=True)
class _Episode:
    """What is known of one rule, direction and instrument on one day."""

    alert_id: str | None = None
    started_at: datetime | None = None
    # Crossing: whether the price was on the far side of the level before; None while it has not been seen.
    beyond: bool | None = None


@dataclass(slots=True)
class _Instrument:
    """The state of one instrument on one trading day."""

    day: date
    rules: Sequence[tuple[int, Rule]]
    episodes: dict[tuple[int, Direction], _Episode] = field(default_factory=dict)
    # Per price and window: what happened in it, preceded by the price in force when it began.
    windows: dict[tuple[str, timedelta], deque[tuple[datetime, int]]] = field(default_factory=dict)


class Engine:
    """Folds trade events into alerts. The cost of an event depends only on the rules about its instrument."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(enumerate(rules))
        self._instruments: dict[str, _Instrument] = {}

    def take(self, event: TradeEvent) -> list[PriceAlert]:
        """Return the alerts that this event raises or resolves."""
        state = self._instruments.get(event.instrument)
        if state is None or state.day != event.trading_day:
            if state is not None and event.trading_day < state.day:
                return []
            rules = [(number, rule) for number, rule in self._rules if rule.match(event)]
            state = self._instruments[event.instrument] = _Instrument(event.trading_day, rules)
        alerts: list[PriceAlert] = []
        seen: dict[tuple[str, timedelta], int] = {}
        for number, rule in state.rules:
            price: int | None = getattr(event, rule.price)
            if price is None:
                continue
            if isinstance(rule.test, Change):
                key = rule.price, rule.test.window
                reference = seen.get(key)
                if reference is None:
                    reference = seen[key] = _reference(state.windows.setdefault(key, deque()), event, price, key[1])
            else:
                reference = None
            for direction in rule.directions:
                episode = state.episodes.setdefault((number, direction), _Episode())
                alert = _judge(rule, direction, episode, event, price=price, reference=reference)
                if alert is not None:
                    alerts.append(alert)
        return alerts


def _reference(window: deque[tuple[datetime, int]], event: TradeEvent, price: int, span: timedelta) -> int:
    """Take a price into the window; return the one in force a window ago, or the day's first."""
    begin = event.observed_at - span
    while len(window) > 1 and window[1][0] <= begin:
        window.popleft()
    window.append((event.observed_at, price))
    return window[0][1]


def _judge(
    rule: Rule, direction: Direction, episode: _Episode, event: TradeEvent, *, price: int, reference: int | None
) -> PriceAlert | None:
    """Return the alert of one rule and direction, None where nothing begins or ends."""
    test, sign = rule.test, direction.value
    if isinstance(test, Change):
        if not reference:
            return None
        moved = Fraction(sign * (price - reference) * (100 if test.unit is Unit.PERCENT else 1))
        scale = reference if test.unit is Unit.PERCENT else 1
        begins = moved >= test.threshold * scale
        ends = moved < test.resolve * scale
        observed, threshold, unit = float(sign * moved / scale), sign * float(test.threshold), test.unit
    else:
        reference = event.previous_close
        if episode.beyond is None and reference is not None:
            episode.beyond = sign * (reference - test.level) >= 0
        beyond = sign * (price - test.level) >= 0
        begins = beyond and episode.beyond is False
        ends = sign * (price - test.level) < -test.margin
        # With a margin the price is only then back when it is a margin back.
        if beyond or ends or episode.beyond is None:
            episode.beyond = beyond
        observed, threshold, unit = float(price), float(test.level), Unit.RIAL
    if episode.alert_id is None and begins:
        state, resolved_by = AlertState.FIRING, None
        seed = f"{rule.name}\n{rule.version}\n{event.instrument}\n{event.event_id}\n{direction.name}"
        episode.alert_id, episode.started_at = str(uuid5(NAMESPACE, seed)), event.observed_at
    elif episode.alert_id is not None and ends:
        state, resolved_by = AlertState.RESOLVED, ResolvedBy.CONDITION
    else:
        return None
    alert_id, started_at = episode.alert_id, episode.started_at or event.observed_at
    if state is AlertState.RESOLVED:
        episode.alert_id = episode.started_at = None
    values: dict[str, Any] = {
        "rule": rule.name,
        "state": state.value,
        "severity": rule.severity.value,
        "condition": rule.condition(direction),
        "instrument": event.instrument,
        "symbol": event.symbol,
        "title": event.title,
        "price": price,
        "reference_price": reference,
        "observed": round(observed, 2),
        "threshold": threshold,
    }
    return PriceAlert(
        alert_id=alert_id,
        state=state,
        kind=rule.kind,
        rule=rule.name,
        rule_version=rule.version,
        severity=rule.severity,
        trading_day=event.trading_day,
        source=event.source,
        instrument=event.instrument,
        symbol=event.symbol,
        title=event.title,
        event_id=event.event_id,
        poll_sequence=event.poll_sequence,
        condition=values["condition"],
        observed=observed,
        threshold=threshold,
        unit=unit,
        price=price,
        reference_price=reference,
        traded_at=event.traded_at,
        started_at=started_at,
        raised_at=event.observed_at,
        resolved_by=resolved_by,
        message=None if rule.message is None else rule.message.format_map(values),
        labels=dict(rule.labels),
        channels=list(rule.channels),
    )


# What a message template may name, with a value of the kind it will have.
MESSAGE_FIELDS: Mapping[str, str | int | float] = {
    **dict.fromkeys(("rule", "state", "severity", "condition", "instrument", "symbol", "title"), "text"),
    **dict.fromkeys(("price", "reference_price"), 1),
    **dict.fromkeys(("observed", "threshold"), 1.5),
}


def _plain(number: Fraction) -> str:
    return f"{float(number):g}"


def _span(window: timedelta) -> str:
    seconds = int(window.total_seconds())
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
