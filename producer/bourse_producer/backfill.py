"""From the responses of a poll to its events: what `diff` makes of them, missed minutes included. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import attrgetter

from msgspec import structs

from bourse_producer.diff import Changes, InstrumentCode, Snapshot, diff
from bourse_producer.finnotech import Context, merge, parse, parse_minutes
from bourse_schemas.events import Candle, TradeEvent

__all__ = ["Derived", "derive", "diff_with_minutes"]

Known = Mapping[InstrumentCode, Candle]

_totals = attrgetter("volume", "value", "trade_count")


@dataclass(frozen=True, slots=True)
class Derived:
    """What a poll amounts to; of the minute rows `backfilled_rows` were used and `dropped_rows` were not."""

    snapshot: Snapshot
    changes: Changes
    backfilled_rows: int = 0
    dropped_rows: int = 0


def derive(known: Known, calls: Sequence[tuple[bytes, Context]]) -> Derived:
    """Return what these responses change; raises ExchangeError where one of them is no response."""
    snapshot = merge([parse(body, context) for body, context in calls if not context.minutes])
    minutes = [candle for body, context in calls if context.minutes for candle in parse_minutes(body, context)]
    return diff_with_minutes(known, snapshot, minutes)


def diff_with_minutes(known: Known, snapshot: Snapshot, minutes: Sequence[Candle]) -> Derived:
    """Return what changed, the missed minutes first.

    It is not documented whether the totals of minute rows are cumulative or the minute's own: they are read the way
    that fits more instruments, and used only for those whose totals then lie between the candles around the gap.
    """
    if not minutes:
        return Derived(snapshot, diff(known, snapshot))
    by_instrument = [
        (code, list(rows))
        for code, rows in groupby(sorted(minutes, key=attrgetter("instrument", "traded_at")), attrgetter("instrument"))
    ]
    readings = [
        [filled for code, rows in by_instrument for filled in _between(known.get(code), rows, snapshot, reading)]
        for reading in (_as_they_are, _summed)
    ]
    filled = sorted(max(readings, key=lambda found: len({candle.instrument for candle in found})), key=_traded_at)
    state = dict(known)
    events: list[TradeEvent] = []
    candles: list[Candle] = []
    for candle in filled:
        step = diff(state, replace(snapshot, candles={candle.instrument: candle}))
        events += [structs.replace(event, backfilled=True) for event in step.events]
        candles += step.candles
        state.update((after.instrument, after) for after in step.candles)
    last = diff(state, snapshot)
    changes = Changes([*events, *last.events], [*candles, *last.candles], last.stale_rows)
    return Derived(snapshot, changes, len(filled), len(minutes) - len(filled))


_traded_at = attrgetter("traded_at")


def _as_they_are(_: Candle | None, rows: Sequence[Candle]) -> Sequence[Candle]:
    return rows


def _summed(before: Candle | None, rows: Sequence[Candle]) -> Sequence[Candle]:
    """Read each row as its minute alone, and return the day's running candles."""
    running, candles = before, []
    for row in rows:
        if running is not None:
            highs = [price for price in (running.high_price, row.high_price) if price is not None]
            lows = [price for price in (running.low_price, row.low_price) if price is not None]
            volume, value, count = (a + b for a, b in zip(_totals(running), _totals(row), strict=True))
            row = structs.replace(  # noqa: PLW2901  # it is the day's row from here on
                row,
                open_price=row.open_price if running.open_price is None else running.open_price,
                high_price=max(highs, default=None),
                low_price=min(lows, default=None),
                volume=volume,
                value=value,
                trade_count=count,
            )
        candles.append(row)
        running = row
    return candles


def _between(
    known: Candle | None,
    rows: Sequence[Candle],
    snapshot: Snapshot,
    reading: Callable[[Candle | None, Sequence[Candle]], Sequence[Candle]],
) -> Sequence[Candle]:
    """Return the rows strictly inside the gap, as read; none of them where one does not fit."""
    after = snapshot.candles.get(rows[0].instrument)
    if after is None or (known is not None and known.trading_day > after.trading_day):
        return []
    before = known if known is not None and known.trading_day == after.trading_day else None
    inside = [
        row
        for row in rows
        if row.trading_day == after.trading_day
        and row.traded_at < after.traded_at
        and (before is None or row.traded_at > before.traded_at)
    ]
    read = reading(before, inside)
    chain = [_totals(before) if before else (0, 0, 0), *map(_totals, read), _totals(after)]
    rises = all(a <= b for step in pairwise(chain) for a, b in zip(*step, strict=True))
    if not rises:
        return []
    # Seen when the snapshot was: a time of the data never runs backwards within an instrument.
    seen = {"observed_at": after.observed_at, "poll_sequence": after.poll_sequence}
    return [structs.replace(row, **seen) for row in read if _totals(row) != _totals(after)]
