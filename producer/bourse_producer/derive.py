"""From the bytes of a poll's responses to its events: the one way, live and in `bourse replay`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bourse_producer.diff import Changes, InstrumentCode, Snapshot, diff
from bourse_producer.responses import Reading, merge, parse
from bourse_schemas.events import Candle

__all__ = ["Derived", "derive"]


@dataclass(frozen=True, slots=True)
class Derived:
    """What a poll amounts to."""

    snapshot: Snapshot
    changes: Changes


def derive(known: Mapping[InstrumentCode, Candle], calls: Sequence[tuple[bytes, Reading]]) -> Derived:
    """Return what these responses change. Raises ExchangeError if one of them is not a response."""
    snapshot = merge([parse(body, context) for body, context in calls])
    return Derived(snapshot, diff(known, snapshot))
