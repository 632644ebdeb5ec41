"""The diff against its promises: property by property, over arbitrary days of an arbitrary small market."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from bourse_producer.diff import PROVENANCE, Changes, Snapshot, diff
from bourse_schemas.events import Candle, Op, TradeEvent

DAY = date(2026, 11, 21)
TEN = datetime(2026, 11, 21, 6, 30, tzinfo=UTC)
TOTALS = ("volume", "value", "trade_count")


def candle(instrument: str = "IRO1MADN0001", day: int = 0, minute: int = 0, **fields: object) -> Candle:
    """Return a candle of the day `day` days after DAY, traded `minute` minutes after ten."""
    basis = Candle(
        instrument=instrument,
        sequence=0,
        trading_day=DAY + timedelta(days=day),
        traded_at=TEN + timedelta(days=day, minutes=minute),
        traded_at_estimated=False,
        observed_at=TEN + timedelta(days=day, minutes=minute),
        poll_sequence=1,
        source="test",
        symbol="x",
        symbol_raw="x",
        title="x",
        is_right=False,
        last_price=100,
        closing_price=100,
        volume=10,
        value=1000,
        trade_count=1,
    )
    return structs.replace(basis, **fields)


def snapshot(*candles: Candle, session_day: date | None = None) -> Snapshot:
    """Return a response with these candles."""
    return Snapshot({each.instrument: each for each in candles}, TEN, session_day)


def apply(known: dict[str, Candle], changes: Changes) -> dict[str, Candle]:
    """Return what is known once the changes are committed."""
    return known | {each.instrument: each for each in changes.candles}


def business(candle: Candle) -> dict[str, object]:
    """Return what a change can be of."""
    return {name: value for name, value in structs.asdict(candle).items() if name not in PROVENANCE}


@pytest.mark.parametrize(("known", "now"), [(True, True), (True, False), (False, True)])
def test_estimated_times_are_not_compared_within_a_day(known: bool, now: bool) -> None:
    """A clock that was once two hours ahead, or a change of profile, must not hide a day's changes as stale."""
    ahead = {"IRO1MADN0001": candle(minute=120, sequence=1, traded_at_estimated=known)}
    later = candle(minute=1, volume=20, traded_at_estimated=now)
    changes = diff(ahead, snapshot(later))
    assert ([event.op for event in changes.events], changes.stale_rows) == ([Op.TRADED], 0)
    yesterday = candle(day=-1, volume=20, traded_at_estimated=now)
    assert diff(ahead, snapshot(yesterday)).stale_rows == 1


def test_an_older_exact_time_is_stale() -> None:
    """Both times are the exchange's own: the row is older than what is known."""
    known = {"IRO1MADN0001": candle(minute=2, sequence=1)}
    changes = diff(known, snapshot(candle(minute=1, volume=20)))
    assert (changes.events, changes.stale_rows) == ([], 1)


small = st.integers(0, 3)
price = st.none() | st.integers(99, 101)
candles = st.builds(
    candle,
    instrument=st.sampled_from(["IRO1AAAA0001", "IRO1BBBB0001", "IRR1AAAA0001"]),
    day=st.integers(0, 2),
    minute=small,
    volume=small,
    value=small,
    trade_count=small,
    last_price=price,
    closing_price=price,
    title=st.sampled_from(["x", "y"]),
    closing_change_percent=st.sampled_from([None, 0.0, 1.5]),
)
responses = st.builds(
    lambda found, back: snapshot(*found, session_day=None if back is None else DAY + timedelta(days=back)),
    st.lists(candles, max_size=4),
    st.none() | st.integers(0, 2),
)


def usable(known: dict[str, Candle], now: Snapshot) -> dict[str, Candle]:
    """Return the rows that are not stale, in other words than the diff's."""
    return {
        code: each
        for code, each in now.candles.items()
        if (now.session_day is None or each.trading_day >= now.session_day)
        and (
            code not in known or (each.trading_day, each.traded_at) >= (known[code].trading_day, known[code].traded_at)
        )
    }


@given(st.lists(responses, max_size=12))
def test_a_history_keeps_every_promise(history: Sequence[Snapshot]) -> None:
    """State, emptiness of a repetition, sequences, ids, deltas and operations hold along any history."""
    known: dict[str, Candle] = {}
    events: list[TradeEvent] = []
    for now in history:
        changes = diff(known, now)
        wanted = usable(known, now)
        after = apply(known, changes)
        assert {code: business(after[code]) for code in wanted} == {
            code: business(each) for code, each in wanted.items()
        }
        assert {code: each for code, each in after.items() if code not in wanted} == {
            code: each for code, each in known.items() if code not in wanted
        }
        assert changes.stale_rows == len(now.candles) - len(wanted)
        assert not diff(after, now).events
        for event, candle_after in zip(changes.events, changes.candles, strict=True):
            assert {name: getattr(event, name) for name in Candle.__struct_fields__} == structs.asdict(candle_after)
            check_op(known.get(event.instrument), event)
        events += changes.events
        known = after
    check_totals(events)
    restarted = {each.instrument: each for each in known.values()}
    for now in history:
        assert diff(restarted, now) == diff(known, now)


def check_op(before: Candle | None, event: TradeEvent) -> None:
    """Compare an event's kind with the contract's words."""
    if before is None or event.trading_day > before.trading_day:
        assert (event.op, event.sequence, event.last_price_delta, event.closing_price_delta) == (
            Op.OPENED,
            1,
            None,
            None,
        )
        return
    moves = [getattr(event, name) - getattr(before, name) for name in TOTALS]
    fell, rose = any(move < 0 for move in moves), any(move > 0 for move in moves)
    assert event.op is (Op.CANCELLED if fell else Op.TRADED if rose else Op.REVISED)
    assert event.sequence == before.sequence + 1
    for name in ("last_price", "closing_price"):
        old, new = getattr(before, name), getattr(event, name)
        assert getattr(event, f"{name}_delta") == (None if old is None or new is None else new - old)


def check_totals(events: Sequence[TradeEvent]) -> None:
    """Per instrument and day: sequences 1, 2, 3 …, deltas that add up, and ids that are unique over all."""
    days: dict[tuple[str, date], list[TradeEvent]] = {}
    for event in events:
        days.setdefault((event.instrument, event.trading_day), []).append(event)
    for (instrument, day), found in days.items():
        assert [event.sequence for event in found] == list(range(1, len(found) + 1))
        assert [event.event_id for event in found] == [f"{instrument}-{day:%Y%m%d}-{n + 1}" for n in range(len(found))]
        for name in TOTALS:
            assert sum(getattr(event, f"{name}_delta") for event in found) == getattr(found[-1], name)
        assert found[0].op is Op.OPENED
        assert all(event.op is not Op.OPENED for event in found[1:])


def ops(*rows: Candle, session_day: date | None = None) -> list[tuple[Op, int]]:
    """Return kind and sequence of the events of one row after the other."""
    known: dict[str, Candle] = {}
    found = []
    for row in rows:
        changes = diff(known, snapshot(row, session_day=session_day))
        known = apply(known, changes)
        found += [(event.op, event.sequence) for event in changes.events]
    return found


def test_back_and_forth_is_three_events() -> None:
    """A → B → A is an opening and two revisions."""
    a, b = candle(title="a"), candle(title="b")
    assert ops(a, b, a) == [(Op.OPENED, 1), (Op.REVISED, 2), (Op.REVISED, 3)]


def test_a_new_day_starts_at_one() -> None:
    """The first candle of a day opens it, equal to the day before's or not."""
    assert ops(candle(), candle(minute=1, volume=11), candle(day=1)) == [
        (Op.OPENED, 1),
        (Op.TRADED, 2),
        (Op.OPENED, 1),
    ]


@pytest.mark.parametrize("total", TOTALS)
def test_any_total_that_falls_is_a_cancellation(total: str) -> None:
    """One total that falls decides, even where the others rise."""
    fallen = candle(**{**dict.fromkeys(TOTALS, 5000), total: 0})  # type: ignore[arg-type]
    assert ops(candle(), fallen) == [(Op.OPENED, 1), (Op.CANCELLED, 2)]
    change = diff({"IRO1MADN0001": candle(sequence=1)}, snapshot(fallen)).events[0]
    assert getattr(change, f"{total}_delta") < 0


def test_where_only_provenance_differs_the_candle_known_stays() -> None:
    """No event, and the older trade time goes on to rule what is stale."""
    known = {"IRO1MADN0001": candle(sequence=4)}
    later = candle(minute=2, poll_sequence=9, source="other", trading_day_jalali="1405/08/30", traded_at_estimated=True)
    assert diff(known, snapshot(later)) == Changes([], [], 0)
    between = candle(minute=1, volume=11)
    assert diff(known, snapshot(between)).events[0].op is Op.TRADED


def test_older_rows_are_stale_and_equal_times_are_not() -> None:
    """An earlier trade time or day makes no event; the same time with other values is a change."""
    known = {"IRO1MADN0001": candle(minute=5, sequence=1)}
    assert diff(known, snapshot(candle(minute=4, volume=99))) == Changes([], [], 1)
    assert diff(known, snapshot(candle(day=-1, minute=9, volume=99))) == Changes([], [], 1)
    assert diff(known, snapshot(candle(minute=5, volume=99))).count(Op.TRADED) == 1


def test_rows_from_before_the_session_are_stale_even_unknown() -> None:
    """Yesterday's prices after the open are no opening, today's and later ones are."""
    yesterday, today, tomorrow = candle(day=-1), candle("IRO1BBBB0001"), candle("IRO1CCCC0001", day=1)
    changes = diff({}, snapshot(yesterday, today, tomorrow, session_day=DAY))
    assert ([event.instrument for event in changes.events], changes.stale_rows) == (["IRO1BBBB0001", "IRO1CCCC0001"], 1)


def test_a_missing_instrument_makes_no_event() -> None:
    """An instrument that a response leaves out is as it was."""
    assert diff({"IRO1MADN0001": candle(sequence=1)}, snapshot()) == Changes([], [], 0)


def test_another_company_is_a_revision() -> None:
    """The exchange reassigns CoID: it is an attribute."""
    assert ops(candle(company_id=1), candle(company_id=2)) == [(Op.OPENED, 1), (Op.REVISED, 2)]
