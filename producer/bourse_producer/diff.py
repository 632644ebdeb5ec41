"""What changed between the candles known and a response: pure, the same after a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from operator import attrgetter
from typing import Any, NamedTuple

from msgspec import structs

from bourse_schemas.events import Candle, Change, DeadLetter, Op, TradeEvent
from bourse_schemas.topics import event_id

InstrumentCode = str

# What a change is not: when and by whom a row was seen.
PROVENANCE = {
    "traded_at",
    "traded_at_estimated",
    "trading_day_jalali",
    "observed_at",
    "poll_sequence",
    "sequence",
    "source",
}
_business = attrgetter(*(name for name in Candle.__struct_fields__ if name not in PROVENANCE))


class Rejected(NamedTuple):
    """A row that could not be used: `identity` is equal for the same mistake of the same instrument."""

    identity: str
    letter: DeadLetter


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A response of the exchange: per instrument its candle, with no sequence yet.

    `session_day` is the latest trading day whose continuous session had begun at `received_at`. `rows` counts what the
    response held, `duplicate_rows` those with a better one of the same instrument; `oddities` counts what was
    unusual and still used, by name. `seen` is the poll and the receipt of shares and of rights: an unchanged row
    may have the candle of an earlier poll. `memo` makes parsing the same call's next response faster.
    """

    candles: Mapping[InstrumentCode, Candle]
    received_at: datetime
    session_day: date | None
    rejected: Sequence[Rejected] = ()
    rows: int = 0
    duplicate_rows: int = 0
    oddities: Mapping[str, int] = field(default_factory=dict)
    seen: Mapping[bool, tuple[int, datetime]] = field(default_factory=dict)
    memo: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed: candles as they are now, how each changed (`each[i]` led to `candles[i]`), and the stale rows."""

    candles: Sequence[Candle]
    each: Sequence[Change]
    stale_rows: int

    @property
    def events(self) -> list[TradeEvent]:
        """Return the changes as they are on the topic; publishing them does not need this."""
        pairs = zip(self.candles, self.each, strict=True)
        return [TradeEvent(**structs.asdict(candle), **change._asdict()) for candle, change in pairs]

    def count(self, op: Op) -> int:
        """Return how many changes are of this kind."""
        return sum(change.op is op for change in self.each)


def diff(known: Mapping[InstrumentCode, Candle], now: Snapshot) -> Changes:
    """Return what changed from the candles known to those of the snapshot, in the snapshot's order."""
    candles: list[Candle] = []
    changes: list[Change] = []
    stale = 0
    for instrument, candle in now.candles.items():
        if now.session_day is not None and candle.trading_day < now.session_day:
            stale += 1
            continue
        before = known.get(instrument)
        if before is None or candle.trading_day > before.trading_day:
            before = None
        elif candle.trading_day < before.trading_day or (
            # An estimated time is only that of a receipt and proves nothing.
            candle.traded_at < before.traded_at and not (candle.traded_at_estimated or before.traded_at_estimated)
        ):
            stale += 1
            continue
        elif candle.volume == before.volume and _business(candle) == _business(before):
            continue
        poll, observed_at = now.seen.get(candle.is_right, (candle.poll_sequence, candle.observed_at))
        sequence = before.sequence + 1 if before else 1
        after = structs.replace(candle, sequence=sequence, poll_sequence=poll, observed_at=observed_at)
        candles.append(after)
        changes.append(_change(before, after))
    return Changes(candles, changes, stale)


def _change(before: Candle | None, after: Candle) -> Change:
    change_id = event_id(after.instrument, after.trading_day, after.sequence)
    if before is None:
        return Change(change_id, Op.OPENED, after.volume, after.value, after.trade_count, None, None)
    volume, value = after.volume - before.volume, after.value - before.value
    count = after.trade_count - before.trade_count
    op = Op.TRADED if volume or value or count else Op.REVISED
    if volume < 0 or value < 0 or count < 0:
        op = Op.CANCELLED
    last, closing = _less(after.last_price, before.last_price), _less(after.closing_price, before.closing_price)
    return Change(change_id, op, volume, value, count, last, closing)


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
