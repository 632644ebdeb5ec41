"""Records as they come from Kafka: where they are, when they are of, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

__all__ = ["Offsets", "Partition", "Places", "Record", "Records"]


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
