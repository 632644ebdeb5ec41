"""Missed minutes: totals come out as if nothing had been missed, whichever way the exchange means its minute rows."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from bourse_producer.backfill import diff_with_minutes
from bourse_producer.diff import Snapshot, diff
from bourse_schemas.events import Candle, Op

DAY = date(2026, 11, 21)
OPENS = datetime(2026, 11, 21, 5, 30, tzinfo=UTC)
TOTALS = ("volume", "value", "trade_count")


def candle(code: str, minute: int, totals: tuple[int, int, int], **fields: Any) -> Candle:
    """Return a candle of a minute of the day."""
    usual: dict[str, Any] = {"last_price": 100 + minute, "high_price": 100 + minute, "low_price": 90, "open_price": 95}
    usual |= dict(zip(TOTALS, totals, strict=True)) | {"instrument": code, "symbol": code, "symbol_raw": code}
    usual |= {"trading_day": DAY, "traded_at": OPENS + timedelta(minutes=minute), "observed_at": OPENS}
    usual |= {"traded_at_estimated": False, "poll_sequence": 1, "source": "s", "title": code, "is_right": False}
    return Candle(sequence=0, **{**usual, **fields})


def snapshot(candles: list[Candle], minute: int = 60) -> Snapshot:
    """Return a response with these candles."""
    seen = OPENS + timedelta(minutes=minute)
    return Snapshot({c.instrument: structs.replace(c, observed_at=seen, poll_sequence=9) for c in candles}, seen, DAY)


Minute = tuple[int, int, int]
market = st.dictionaries(
    st.sampled_from(["IRO1AAAA0001", "IRO1BBBB0001", "IRO1CCCC0001"]),
    st.lists(st.tuples(*[st.integers(1, 50)] * 3), min_size=3, max_size=12),
    min_size=1,
)


@given(market, st.booleans(), st.integers(0, 4))
def test_as_if_nothing_had_been_missed(days: dict[str, list[Minute]], cumulative: bool, known_minutes: int) -> None:
    """Events in sequence, deltas that add up, the snapshot's own last, the minutes between flagged."""
    known, now, minutes, truth = {}, [], [], 0
    for code, steps in days.items():
        seen = min(known_minutes, len(steps) - 2)
        totals = list(accumulate(steps, lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] + b[2])))
        chain = [candle(code, minute, total) for minute, total in enumerate(totals)]
        if seen:
            known[code] = structs.replace(chain[seen - 1], sequence=seen)
        now.append(chain[-1])
        inside = range(seen, len(steps))
        minutes += [chain[n] if cumulative else candle(code, n, steps[n]) for n in inside]
        truth += len(inside) - 1
    derived = diff_with_minutes(known, snapshot(now), minutes)
    events = derived.changes.events
    used = {event.instrument for event in events if event.backfilled}
    # With the other reading the totals may happen to fit as well; what is used must fit either way.
    assert derived.backfilled_rows + derived.dropped_rows == len(minutes)
    if cumulative:
        assert derived.backfilled_rows == truth
        assert len(used) == len(days)
    for code in days:
        chain_of = [event for event in events if event.instrument == code]
        before = known.get(code)
        start = before.sequence if before else 0
        assert [event.sequence for event in chain_of] == list(range(start + 1, start + 1 + len(chain_of)))
        for total in TOTALS:
            deltas = sum(getattr(event, f"{total}_delta") for event in chain_of)
            assert (getattr(before, total) if before else 0) + deltas == getattr(chain_of[-1], total)
        assert not chain_of[-1].backfilled
        assert all(event.op is not Op.CANCELLED for event in chain_of)
        assert all(a.traded_at < b.traded_at for a, b in pairwise(chain_of))
    plain = diff(known, snapshot(now)).events
    ends = {event.instrument: event for event in events}
    for event in plain:
        for name in ("volume", "value", "trade_count", "last_price", "observed_at", "poll_sequence"):
            assert getattr(ends[event.instrument], name) == getattr(event, name)


def test_minutes_of_their_own_are_summed() -> None:
    """Rows of a minute each become the day's running candle: totals added, high and low of the day kept."""
    code = "IRO1AAAA0001"
    known = {code: candle(code, 0, (100, 1000, 10), high_price=130, low_price=70, open_price=80)}
    rows = [candle(code, n, (5, 50, 1), high_price=110, low_price=60, open_price=99) for n in (1, 2)]
    derived = diff_with_minutes(known, snapshot([candle(code, 3, (120, 1200, 13))]), rows)
    first, second, last = derived.changes.events
    assert [(e.volume, e.value, e.trade_count) for e in (first, second)] == [(105, 1050, 11), (110, 1100, 12)]
    assert (first.high_price, first.low_price, first.open_price) == (130, 60, 80)
    assert (last.volume_delta, last.backfilled) == (10, False)
    assert (derived.backfilled_rows, derived.dropped_rows) == (2, 0)


def test_what_fits_neither_way_is_dropped() -> None:
    """A total above the snapshot's is nobody's: no event is made of it, and it is counted."""
    code = "IRO1AAAA0001"
    known = {code: candle(code, 0, (100, 1000, 10))}
    rows = [candle(code, 1, (500, 5000, 50)), candle(code, 2, (501, 5001, 51))]
    derived = diff_with_minutes(known, snapshot([candle(code, 3, (120, 1200, 13))]), rows)
    assert [event.backfilled for event in derived.changes.events] == [False]
    assert (derived.backfilled_rows, derived.dropped_rows) == (0, 2)


def test_rows_outside_the_gap_are_no_news() -> None:
    """What the candle before or the snapshot already says makes no event of its own."""
    code, other = "IRO1AAAA0001", "IRO1ZZZZ0001"
    known = {code: candle(code, 5, (100, 1000, 10))}
    now = [candle(code, 8, (120, 1200, 13))]
    rows = [candle(code, 5, (100, 1000, 10)), candle(code, 8, (120, 1200, 13)), candle(other, 6, (1, 1, 1))]
    derived = diff_with_minutes(known, snapshot(now), rows)
    assert [(event.instrument, event.backfilled) for event in derived.changes.events] == [(code, False)]
    assert attrgetter("backfilled_rows", "dropped_rows")(derived) == (0, 3)
