"""From the bytes of a poll's responses to its events: the same way live, in a dry run and in `bourse replay`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bourse_producer.diff import Changes, InstrumentCode, RejectedRow, Snapshot, diff
from bourse_producer.responses import Memo, Reading, merge, parse
from bourse_schemas.errors import ExchangeError, ExchangeNonsense
from bourse_schemas.events import Candle

__all__ = ["Answer", "Derived", "derive"]

# A response's bytes, and how they are read.
Answer = tuple[bytes, Reading]
# With fewer bad rows than this a response is not taken for a changed API; else this many rows are kept as a sample.
FEW_REJECTED, SAMPLE = 20, 3


@dataclass(frozen=True, slots=True)
class Derived:
    """What a poll's responses amount to; `snapshot` is None if none of them can be used.

    `rejected` are the rows that could not be used, `errors` why a whole response is not used, by whether it is that
    of the rights. `memos` make the next poll faster.
    """

    snapshot: Snapshot | None
    changes: Changes
    rejected: Sequence[RejectedRow] = ()
    errors: Mapping[bool, ExchangeError] = field(default_factory=dict)
    memos: Mapping[bool, Memo] = field(default_factory=dict)


def derive(
    known: Mapping[InstrumentCode, Candle],
    answers: Sequence[Answer],
    max_rejected_share: float = 1.0,
    memos: Mapping[bool, Memo] | None = None,
) -> Derived:
    """Return what the responses of a poll change. A response with a larger share of bad rows is not used."""
    parts: list[Snapshot] = []
    rejected: list[RejectedRow] = []
    errors: dict[bool, ExchangeError] = {}
    memos = dict(memos or {})
    for body, reading in answers:
        try:
            part = parse(body, reading, memos.get(reading.is_right))
        except ExchangeError as error:
            errors[reading.is_right] = error
            continue
        memos[reading.is_right] = part.memo
        bad = len(part.rejected)
        if bad >= FEW_REJECTED and bad > max_rejected_share * part.rows:
            # A changed API must not pour the market into dead letters.
            rejected += part.rejected[:SAMPLE]
            first = part.rejected[0].message
            message = f"{bad} of {part.rows} rows cannot be used: has the API changed? The first: {first}"
            errors[reading.is_right] = ExchangeNonsense("nonsense", message, track_id=reading.track_id)
        else:
            rejected += part.rejected
            parts.append(part)
    snapshot = merge(parts) if parts else None
    return Derived(snapshot, diff(known, snapshot) if snapshot else Changes([], [], 0), rejected, errors, memos)
