"""The engine against one that looks at the whole history each time, over all types of rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from bourse_consumers.alerts.rules import (
    Band,
    Cancelled,
    Change,
    Crossing,
    Direction,
    Engine,
    Match,
    Quiet,
    Rule,
    Test,
    Traded,
)
from bourse_consumers.testing import trade
from bourse_schemas.events import TEHRAN, AlertKind, AlertState, Op, PriceAlert, TradeEvent, Unit

OPENED = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
CODES = "IRO1AAAA0001", "IRO1BBBB0001"
MINUTE = timedelta(minutes=1)
Said = tuple[str, str, str, AlertState, datetime, datetime]

# --- what is looked at ------------------------------------------------------------------------------------------------

PRICE = st.one_of(st.none(), st.integers(94, 106), st.integers(94, 106), st.just(0))
EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "code": st.sampled_from(CODES),
            "seconds": st.sampled_from([0, 0, 20, 60, 60, 60, 120, 120, 300, -60, 3 * 3600, 86_400]),
            "last_price": PRICE,
            "open_price": st.sampled_from([None, 0, 100]),
            "previous_close": st.sampled_from([None, 0, 100, 106]),
            "op": st.sampled_from([Op.TRADED] * 5 + [Op.OPENED, Op.REVISED, Op.CANCELLED, Op.CANCELLED, Op.UNKNOWN]),
            "amount": st.integers(0, 8),
            "stale": st.sampled_from([False] * 12 + [True]),
        }
    ),
    min_size=1,
    max_size=45,
)


def events_of(rows: Sequence[dict[str, Any]]) -> list[TradeEvent]:
    """Return events of a partition: totals that add up, a day's rows about that day or, rarely, the one before."""
    events: list[TradeEvent] = []
    at, totals = OPENED, dict.fromkeys(CODES, 0)
    latest = at
    for sequence, row in enumerate(rows, 1):
        at += timedelta(seconds=row["seconds"])
        latest = max(latest, at)
        delta = {Op.CANCELLED: -min(row["amount"], totals[row["code"]]), Op.REVISED: 0}.get(row["op"], row["amount"])
        totals[row["code"]] += delta
        day = latest.astimezone(TEHRAN).date()
        known = any((event.instrument, event.trading_day) == (row["code"], day) for event in events)
        day -= timedelta(days=row["stale"] and known)
        events.append(
            trade(
                instrument=row["code"],
                symbol=row["code"],
                sequence=sequence,
                op=row["op"],
                observed_at=at,
                trading_day=day,
                last_price=row["last_price"],
                open_price=row["open_price"],
                previous_close=row["previous_close"],
                volume=totals[row["code"]],
                value=totals[row["code"]] * 10,
                volume_delta=delta,
                value_delta=delta * 10,
                trade_count_delta=delta,
            )
        )
    return events


FRACTIONS = st.sampled_from([Fraction(1), Fraction(3), Fraction(5), Fraction(7, 2)])
WINDOWS = st.sampled_from([MINUTE, 3 * MINUTE, 5 * MINUTE])
TESTS: st.SearchStrategy[Test] = st.one_of(
    st.builds(
        lambda threshold, half, unit, since: Change(threshold, threshold * half, unit, since),
        FRACTIONS,
        st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1)]),
        st.sampled_from([Unit.PERCENT, Unit.RIAL]),
        WINDOWS | st.sampled_from(["open", "previous_close", "last_alert"]),
    ),
    st.builds(Crossing, st.integers(98, 102), st.sampled_from([Fraction(0), Fraction(3), Fraction(1, 2)])),
    st.builds(
        Band, st.integers(94, 99), st.integers(101, 106), st.booleans(), st.sampled_from([Fraction(0), Fraction(2)])
    ),
    st.builds(
        lambda kind, threshold, share, window: Traded(kind, threshold, threshold * share, False, window),
        st.sampled_from([AlertKind.VOLUME, AlertKind.VALUE]),
        st.sampled_from([Fraction(6), Fraction(20)]),
        st.sampled_from([Fraction(1), Fraction(1, 2)]),
        st.none() | WINDOWS,
    ),
    st.builds(
        lambda threshold, share, window: Traded(AlertKind.VOLUME, threshold, threshold * share, True, window),
        st.sampled_from([Fraction(2), Fraction(1, 2)]),
        st.sampled_from([Fraction(1), Fraction(1, 2)]),
        WINDOWS,
    ),
    st.builds(Cancelled, st.integers(1, 4), st.sampled_from([Unit.SHARES, Unit.COUNT])),
    st.builds(Quiet, st.sampled_from([2 * MINUTE, 4 * MINUTE])),
)
SPANS = st.sampled_from([timedelta(), timedelta(), timedelta(seconds=90), timedelta(seconds=330)])


@st.composite
def rules_of(draw: st.DrawFn) -> Rule:
    """Return any rule on trades."""
    test = draw(TESTS)
    directions = draw(st.sampled_from([(Direction.UP,), (Direction.DOWN,), (Direction.UP, Direction.DOWN)]))
    momentary = isinstance(test, Cancelled) or (isinstance(test, Change) and test.since == "last_alert")
    if not isinstance(test, Change | Crossing):
        directions = (Direction.NONE,)
    elif momentary:
        directions = directions[:1]  # since the last alert in either direction: the oracle looks at one at a time
    return Rule(
        name=draw(st.sampled_from(["a", "b"])),
        version="0" * 12,
        test=test,
        directions=directions,
        match=draw(st.sampled_from([Match(), Match(instruments=frozenset(CODES[:1])), Match(patterns=("*BBBB*",))])),
        hold=timedelta() if isinstance(test, Cancelled) else draw(SPANS),
        keep=timedelta() if momentary else draw(SPANS),
        cooldown=draw(SPANS),
        once=draw(st.sampled_from([False, True])),
        # Tehran is 3:30 ahead: the first events are at 09:00.
        active=draw(st.sampled_from([None, None, (9 * 60 + 3, 9 * 60 + 20)])),
    )


# --- the oracle -------------------------------------------------------------------------------------------------------

Seen = list[tuple[datetime, TradeEvent]]


def price_then(history: Seen, value: str, at: datetime) -> Any:
    """Return the value in force at a time, or the first."""
    known = [(when, getattr(event, value)) for when, event in history if getattr(event, value) is not None]
    before = [found for when, found in known if when <= at]
    return before[-1] if before else known[0][1]


def side(rule: Rule, sign: int, history: Seen) -> bool | None:
    """Say whether a price was last near (True) or beyond (False) the level, by all that was judged."""
    test: Any = rule.test
    judged = [event for _, event in history if event.last_price is not None]
    near: bool | None = None
    for number, event in enumerate(judged):
        if number == 0 and event.previous_close:
            near = sign * (event.previous_close - test.level) < 0
        beyond = sign * (event.last_price - test.level)
        if beyond >= 0:
            near = False
        elif near is None or beyond < -test.margin or test.margin == 0:
            near = True
    return near


def verdict(rule: Rule, sign: int, history: Seen, said: list[tuple[AlertState, datetime, int | None]]) -> bool | None:
    """Say what the last event of an instrument's history means for a condition."""
    now, event = history[-1]
    test: Any = rule.test
    price = event.last_price
    if isinstance(test, Cancelled):
        annulled = -(event.volume_delta if test.unit is Unit.SHARES else event.trade_count_delta)
        return event.op is Op.CANCELLED and annulled >= test.threshold
    if isinstance(test, Traded):
        name = test.kind.lower()
        amount = Fraction(getattr(event, name))
        if test.window:
            before = price_then(history, name, now - test.window)
            amount -= before
            if test.times:
                first_at, first = history[0][0], getattr(history[0][1], name)
                age = now - test.window - first_at
                if age < test.window or before <= first:
                    return None
                amount /= (
                    Fraction(before - first)
                    * Fraction(test.window / MINUTE)
                    / Fraction(age / MINUTE).limit_denominator(10**6)
                )
        return True if amount >= test.threshold else False if amount < test.resolve else None
    if price is None:
        return None
    if isinstance(test, Band):
        outside = price < test.low or price > test.high
        if outside == test.outside:
            return True
        far = min(price - test.low, test.high - price)
        return False if (far >= test.margin if test.outside else -far > test.margin) else None
    if isinstance(test, Crossing):
        beyond = sign * (price - test.level) >= 0
        before = side(rule, sign, history[:-1])
        judged = [each for _, each in history if each.last_price is not None]
        if len(judged) == 1 and event.previous_close:
            before = sign * (event.previous_close - test.level) < 0
        if beyond:
            return True if before else None
        return False if side(rule, sign, history) else None
    if isinstance(test.since, timedelta):
        reference = price_then(history, "last_price", now - test.since)
    elif test.since == "last_alert":
        fired = [at for state, _, at in said if state is AlertState.FIRING]
        prices = [each.last_price for _, each in history if each.last_price is not None]
        reference = fired[-1] if fired else prices[0]
    else:
        reference = event.open_price if test.since == "open" else event.previous_close
    if not reference:
        return None
    moved = Fraction(sign * (price - reference))
    if test.unit is Unit.PERCENT:
        moved = moved * 100 / reference
    return True if moved >= test.threshold else False if moved < test.resolve or test.since == "last_alert" else None


def earliest(rule: Rule, since: datetime, raised: datetime | None) -> datetime | None:
    """Return when an episode may begin."""
    due = since + rule.hold
    if raised is not None:
        if rule.once:
            return None
        due = max(due, raised + rule.cooldown)
    if rule.active:
        midnight = due.astimezone(TEHRAN).replace(hour=0, minute=0, second=0, microsecond=0)
        begin, end = (midnight + minutes * MINUTE for minutes in rule.active)
        return max(due, begin) if due < end else None
    return due


def naive(
    rule: Rule, direction: Direction, code: str, events: Sequence[TradeEvent]
) -> Iterator[tuple[AlertState, datetime, datetime]]:
    """Yield what a rule must say of an instrument: what it looked like each time, from the day's begin."""
    sign, test = direction.value, rule.test
    day: date | None = None
    now = datetime.min.replace(tzinfo=UTC)
    market: Seen = []
    resumed: datetime | None = None
    since = off = raised = resumed
    since_said = now
    said: list[tuple[AlertState, datetime, int | None]] = []
    firing = False
    for event in events:
        at = max(now, event.observed_at)
        if at.astimezone(TEHRAN).date() != day:
            day = at.astimezone(TEHRAN).date()
            market, resumed, since, off, raised, said, firing = [], None, None, None, None, [], False
        trades = [when for when, each in market if each.op in (Op.TRADED, Op.OPENED)]
        ours = [(when, each) for when, each in market if each.instrument == code]
        if isinstance(test, Quiet) and at > now and trades and at - trades[-1] >= test.after:
            resumed = at
        while at > now:
            due = (off + rule.keep if off else None) if firing else earliest(rule, since, raised) if since else None
            quiet = None
            own = [when for when, each in ours if each.op in (Op.TRADED, Op.OPENED)]
            if isinstance(test, Quiet) and own and (since is None or off is not None):
                quiet = max(own[-1], resumed or own[-1]) + test.after
            if due is not None and due <= at and (quiet is None or due <= quiet):
                if firing:
                    yield AlertState.RESOLVED, since_said, due
                    firing, off = False, None
                    since = None
                else:
                    assert since is not None
                    since_said = since
                    raised, firing = due, True
                    last = [each.last_price for _, each in ours if each.last_price is not None]
                    said.append((AlertState.FIRING, due, last[-1] if last else None))
                    yield AlertState.FIRING, since_said, due
                continue
            if quiet is not None and quiet <= at:
                since, off = (since if firing else quiet), None
                continue
            break
        now = at
        if event.trading_day < day:
            continue
        market.append((now, event))
        if event.instrument != code:
            continue
        history = [*ours, (now, event)]
        means: bool | None
        if isinstance(test, Quiet):
            means = False if event.op in (Op.TRADED, Op.OPENED) else None
        else:
            means = verdict(rule, sign, history, said)
        momentary = isinstance(test, Cancelled) or (isinstance(test, Change) and test.since == "last_alert")
        if firing and means is not None and (not means or momentary):
            if off is None:
                off = now
            if off + rule.keep <= now:
                yield AlertState.RESOLVED, since_said, off
                firing, off, since = False, None, None
        elif firing and means:
            off = None
        if not firing and means is not None:
            since = (since or now) if means else None
            if since is not None:
                due = earliest(rule, since, raised)
                if due is not None and due <= now:
                    since_said, raised, firing, off = since, now, True, None
                    said.append((AlertState.FIRING, now, event.last_price))
                    yield AlertState.FIRING, since_said, now


def said_by(alerts: Sequence[PriceAlert]) -> list[tuple[str, str, AlertState, datetime, datetime]]:
    """Return what matters of alerts, sorted."""
    return sorted((a.rule, a.instrument or "", a.state, a.started_at, a.raised_at) for a in alerts)


@settings(max_examples=1000, deadline=None)
@given(rows=EVENTS, rule=rules_of())
def test_the_engine_agrees_with_one_that_looks_at_the_whole_history(rows: list[dict[str, Any]], rule: Rule) -> None:
    """Heaps, windows and integers are optimisations, not another meaning."""
    events = events_of(rows)
    engine = Engine([rule])
    found = said_by([alert for event in events for alert in engine.take(event)])
    expected = sorted(
        (rule.name, code, *each)
        for code in CODES
        for direction in rule.directions
        if rule.match.named(code, code)
        for each in naive(rule, direction, code, events)
    )
    assert found == expected
