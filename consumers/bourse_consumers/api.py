"""The SDK: what a consumer of the bus implements. Everything else is the runner's.

A consumer's life, all calls from one thread:

1. `open(assigned)` whenever the partitions assigned have changed, with all of them, which may be none: what was in
   memory before is void. After a failed transaction it is called as well.
2. `process(batch)` with records of those partitions, in order per partition. It may block, half an hour at most; the
   group's membership is kept alive meanwhile. When it returns, the batch is done (`Resume`, `Rebuild`) or taken over
   (`Own`, `Hold`). When it raises, the batch comes again: nothing of it may have been kept.
3. `idle(now)` at least once a second, batches or not; not while `process` runs or waits for its Retry, nor while state
   is rebuilt.
4. `durable()` for `Own` and `Hold` only: what is safe so far. For `Hold` also `notes()`.
5. `close()` once, at a clean stop; only `durable()` may be called afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

from bourse_schemas.errors import BourseError
from bourse_schemas.events import Event
from bourse_schemas.topics import TRADES, Topic

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from bourse_cli.health import Monitor
    from bourse_consumers.columns import Decoded

__all__ = [
    "Assignment",
    "Batch",
    "Consumer",
    "Emit",
    "Hold",
    "Offsets",
    "Own",
    "Partition",
    "Places",
    "Rebuild",
    "Record",
    "Records",
    "Reject",
    "Reopen",
    "Resume",
    "Retry",
    "Rewind",
    "Start",
]


class Partition(NamedTuple):
    """One partition of one topic, by the topic's full name."""

    topic: str
    number: int


Offsets = Mapping[Partition, int]
"""Per partition the offset of the next record to read."""


class Assignment(dict[Partition, int]):
    """The partitions assigned and, for each, the offset the group has committed (the topic's start where none is).

    `day_start()` gives, per partition, an offset at or before the first record of the trading day that is under way at
    the committed offset: where to rebuild state that lives at most a trading day. `first` is, per partition, the oldest
    offset that the topic still has; `notes` what `Consumer.notes` said when the offsets were committed; `fresh` are
    those of which the group has committed nothing yet.
    """

    def __init__(
        self,
        committed: Offsets,
        day_start: Callable[[], Offsets] | None = None,
        first: Offsets | None = None,
        *,
        notes: Mapping[Partition, str] | None = None,
        fresh: Collection[Partition] = (),
        read: Callable[[Topic], Iterable[Event]] = lambda _: (),
    ) -> None:
        super().__init__(committed)
        self._day_start = day_start
        self._read = read
        self.first: Offsets = first or {}
        self.notes: Mapping[Partition, str] = notes or {}
        self.fresh = fresh

    def day_start(self) -> Offsets:
        """Return where the current trading day of each partition begins; may ask the broker."""
        return self._day_start() if self._day_start else dict.fromkeys(self, 0)

    def read(self, topic: Topic) -> Iterable[Event]:
        """Yield what is committed on another topic, with all that this group committed before it was assigned these.

        Of a compacted topic all of it; else, per partition, the trading day of its last record. What cannot be decoded
        is left out.
        """
        return self._read(topic)


@dataclass(frozen=True, slots=True)
class Resume:
    """Begin at the group's committed offsets. Emits and input offsets of a batch are one Kafka transaction."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Begin earlier, to fold records into memory again.

    Batches below the committed offsets have `replay=True`: what `process` returns for them is dropped and nothing is
    committed. No batch straddles the committed offset. Where nothing is committed yet, it all counts as new.
    """

    offsets: Offsets


@dataclass(frozen=True, slots=True)
class Own:
    """Begin at offsets kept with the sink's own data; the group's offsets are a hint for dashboards.

    What such a consumer publishes is not tied to its sink: after a crash it may be missing or be there twice. Dead
    letters are never missing.
    """

    offsets: Offsets


@dataclass(frozen=True, slots=True)
class Hold:
    """Begin at the group's committed offsets; what `process` took over is done when `durable()` says so.

    After each call of `process`, `idle` and `close` the runner commits `durable()` and `notes()` as far as they are
    new, in one transaction with what the call returned. Dead letters of the runner's own may be there twice.
    """


Start = Resume | Rebuild | Own | Hold


class Record(NamedTuple):
    """A Kafka record as it came."""

    partition: Partition
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes]


class Places(NamedTuple):
    """Records by columns: where they are, when they are of, and their bytes."""

    partitions: Sequence[Partition]
    offsets: Sequence[int]
    timestamps: Sequence[int]
    values: Sequence[bytes | None]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Places:
        """Return the places of records."""
        if isinstance(records, Records):
            return records.places
        each = [(record.partition, record.offset, record.timestamp, record.value) for record in records]
        return cls(*zip(*each, strict=True)) if each else cls((), (), (), ())

    def ends(self) -> Offsets:
        """Return, per partition, the offset after its last record."""
        return {partition: offset + 1 for partition, offset in zip(self.partitions, self.offsets, strict=True)}


class Records(Sequence[Record]):
    """Records that are made when the first of them is looked at: many consumers need their columns only."""

    def __init__(self, places: Places, make: Callable[[], list[Record]]) -> None:
        self.places = places
        self._make = make
        self._made: list[Record] | None = None

    def __len__(self) -> int:
        return len(self.places.offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._all())

    def _all(self) -> list[Record]:
        if self._made is None:
            self._made = self._make()
        return self._made


class Emit(NamedTuple):
    """An event to publish on one of the declared topics."""

    topic: Topic
    event: Event


@dataclass(frozen=True)
class Batch:
    """Records of one or more partitions, in order per partition, all decodable.

    `events` are the typed values, decoded when first asked for; `table()` is the same as one Arrow table with the
    schema's columns, plus `_partition`, `_offset` and `_timestamp`, `frame()` as a polars frame of the schema's columns
    only. `next` is, per partition in the batch, the offset after it: the consumer's position, which may lie beyond the
    last record by transaction markers.
    """

    records: Sequence[Record]
    next: Offsets
    replay: bool = False
    decode: Callable[[Record], Any] = field(default=lambda record: record.value, repr=False)
    columns: Callable[[Places], Decoded | None] = field(default=lambda _: None, repr=False)

    @cached_property
    def events(self) -> Sequence[Any]:
        """Return the records' events, in the records' order."""
        return [self.decode(record) for record in self.records]

    def table(self) -> pa.Table:
        """Return the records, at least one and all of one topic, as one Arrow table. Needs the extra `archive`."""
        if found := self._by_columns():
            return found.table()
        from bourse_consumers.rows import to_table

        return to_table(self.events, Places.of(self.records))

    def frame(self) -> pl.DataFrame:
        """Return the same, without where the records are, as a polars frame: cheaper where no Arrow is needed."""
        if found := self._by_columns():
            return found.frame
        import polars as pl

        from bourse_consumers.rows import WHERE

        return cast("pl.DataFrame", pl.from_arrow(self.table().drop_columns([field.name for field in WHERE])))

    def _by_columns(self) -> Decoded | None:
        return None if "events" in self.__dict__ else self.columns(Places.of(self.records))


class Retry(BourseError):
    """The world is at fault: the same batch again, later, with the partitions paused meanwhile.

    `after` is the wait in seconds; by default the runner backs off by itself.
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Reject(BourseError):
    """This record is at fault: it becomes a dead letter, and the batch comes again without it."""

    def __init__(self, record: Record, message: str) -> None:
        super().__init__(message)
        self.record = record


class Reopen(BourseError):
    """What it is made of has changed: begin anew, with `open`, from what is committed. Not for `Own`."""


class Rewind(BourseError):
    """`Own` only: someone else got there first; go on from these offsets.

    Partitions not named go on where the batch in hand began.
    """

    def __init__(self, offsets: Offsets, message: str = "another writer was faster") -> None:
        super().__init__(message)
        self.offsets = offsets


class Consumer(ABC):
    """A consumer of the bus. Errors but those above end the process; uncommitted work comes again."""

    topics: Sequence[Topic] = (TRADES,)
    """What it reads."""
    emits: Sequence[Topic] = ()
    """What it publishes, dead letters apart: looked at before it starts, and it may publish nothing else."""
    batch_size: int = 1000
    """Most records it gets at a time, where the operator says nothing else."""
    monitor: Monitor | None = None
    """Where it may count, and say that it is not ready: what --http shows. Set before the first call."""

    def open(self, assigned: Assignment) -> Start:  # noqa: ARG002
        """Begin with these partitions; called anew at every rebalance."""
        return Resume()

    @abstractmethod
    def process(self, batch: Batch) -> Sequence[Emit] | None:
        """Take a batch; return what to publish."""

    def idle(self, now: datetime) -> Sequence[Emit] | None:  # noqa: ARG002
        """Do what is due by time: timers, closing files by age. `now` is the wall clock, in UTC."""
        return None

    def trouble(self) -> str | None:
        """Return what an operator should mend though it goes on, None where all is well; asked as often as `idle`."""
        return None

    def durable(self) -> Offsets:
        """Return, for `Own` and `Hold`, the offsets below which everything is safe."""
        return {}

    def notes(self) -> Mapping[Partition, str]:
        """Return, for `Hold`, what is to be remembered beside the offsets of `durable()`: a short text, 4 kB at most.

        The next member gets it as `Assignment.notes`.
        """
        return {}

    def close(self) -> None:  # noqa: B027  # most consumers hold nothing
        """Release what is held. For `Own` and `Hold`: make durable what is buffered."""
