"""Records as they come from Kafka: where they are, their bytes, and those that are bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from bourse_schemas.events import DeadLetter, Reason, Stage

__all__ = ["Offsets", "Partition", "Places", "Record", "Records", "dead_letter"]

# A dead letter must fit where its record did (1 MB): one budget for all its parts, of which headers get a share.
PAYLOAD_BYTES, HEADER_BYTES, TEXT_BYTES = 750_000, 100_000, 10_000


class Partition(NamedTuple):
    """One partition of one topic, by the topic's full name."""

    topic: str
    number: int


Offsets = Mapping[Partition, int]
"""For each partition the offset of the next record to read."""


class Record(NamedTuple):
    """A Kafka record; `timestamp` is in milliseconds since 1970."""

    partition: Partition
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes]

    @property
    def origin(self) -> str:
        """Return `topic-partition-offset`."""
        return f"{self.partition.topic}-{self.partition.number}-{self.offset}"


class Places(NamedTuple):
    """Records by columns."""

    partitions: Sequence[Partition]
    offsets: Sequence[int]
    timestamps: Sequence[int]
    values: Sequence[bytes | None]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Places:
        """Return the columns of records."""
        if isinstance(records, Records):
            return records.places
        each = [(record.partition, record.offset, record.timestamp, record.value) for record in records]
        return cls(*zip(*each, strict=True)) if each else cls((), (), (), ())

    def ends(self) -> Offsets:
        """Return, for each partition, the offset after its last record."""
        return {partition: offset + 1 for partition, offset in zip(self.partitions, self.offsets, strict=True)}


class Records(Sequence[Record]):
    """Records that are made when the first of them is accessed: many consumers need the columns only."""

    def __init__(self, places: Places, make: Callable[[], list[Record]]) -> None:
        self.places, self._make = places, make

    def __len__(self) -> int:
        return len(self.places.offsets)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._made)

    @cached_property
    def _made(self) -> list[Record]:
        return self._make()


def dead_letter(record: Record, reason: Reason, message: str, consumer: str, now: datetime) -> DeadLetter:
    """Return a record as a dead letter that fits where the record did; its message names what was left out."""
    message, headers, left = message[:TEXT_BYTES], dict[str, bytes](), HEADER_BYTES
    for name, value in record.headers.items():
        if (left := left - len(name.encode()) - len(value)) >= 0:
            headers[name] = value
    if missing := len(record.headers) - len(headers):
        message += f" ({missing} of {len(record.headers)} headers left out)"
    payload = record.value or b""
    if len(payload) > PAYLOAD_BYTES:
        message += f" (the first {PAYLOAD_BYTES} of {len(payload)} bytes)"
    return DeadLetter(
        reason=reason,
        message=message,
        stage=Stage.CONSUME,
        origin=record.origin,
        consumer=consumer,
        payload=payload[:PAYLOAD_BYTES],
        original_topic=record.partition.topic,
        original_key=record.key if record.key is None else record.key[:TEXT_BYTES],
        original_partition=record.partition.number,
        original_offset=record.offset,
        original_headers=headers,
        failed_at=now.replace(microsecond=0),
    )
