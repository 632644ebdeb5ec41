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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from bourse_consumers.records import Offsets, Partition, Places, Record, Records
from bourse_schemas.errors import BourseError
from bourse_schemas.events import Event, PollMarker, TradeEvent
from bourse_schemas.topics import POLLS, TRADES, Topic

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from bourse_cli.health import Monitor
    from bourse_consumers.columns import Decoded

__all__ = [
    "Assignment",
    "Batch",
    "Consumer",
    "Day",
    "Emit",
    "Hold",
    "MarketConsumer",
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
    "WholePoll",
]


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


@dataclass(frozen=True)
class WholePoll:
    """A poll of the whole market: its marker and all events with its `poll_sequence`, in any order.

    `replay` is set for polls that are already committed: they only rebuild state, and what is returned for them is
    dropped. If `complete` is false, events are missing for good: do not judge the poll, use its events, and judge the
    next one as after a gap.
    """

    marker: PollMarker
    replay: bool = False
    complete: bool = True
    load_events: Callable[[], Sequence[TradeEvent]] = field(default=lambda: (), repr=False)
    load_frame: Callable[[], pl.DataFrame] | None = field(default=None, repr=False)

    @cached_property
    def events(self) -> Sequence[TradeEvent]:
        """Return the poll's trade events, decoded when they are first accessed."""
        return self.load_events()

    def frame(self) -> pl.DataFrame:
        """Return the poll's trade events as a polars frame with all columns, also if it is empty."""
        if self.load_frame is not None:
            return self.load_frame()
        from bourse_consumers.columns import to_frame

        return to_frame(self.events, TradeEvent)


@dataclass(frozen=True, slots=True)
class Day:
    """The trading day under way when a market consumer becomes active.

    `date` is the Tehran date of the last committed poll, None if the topic has no polls. `read` is `Assignment.read`.
    """

    date: date | None
    read: Callable[[Topic], Iterable[Event]] = lambda _: ()


class MarketConsumer(ABC):
    """A consumer that gets every poll of the whole market, in order, as one unit.

    One member of the group is active; the others are on standby and take over. The polls processed and what was emitted
    for them are one Kafka transaction. Raises Retry and Reopen like any other; `Reject` is not for it.
    """

    topics: Sequence[Topic] = (POLLS, TRADES)
    emits: Sequence[Topic] = ()
    """The topics it publishes, besides dead letters. They are checked at the start; other topics are refused."""
    batch_size: int = 1000
    """The most records it gets at a time, unless the operator sets --batch-size."""
    monitor: Monitor | None = None
    """The service's health; set before the first call."""

    def idle(self, now: datetime) -> Sequence[Emit] | None:  # noqa: ARG002
        """Do what is due by time, such as timers and flushing by age; return what to publish. `now` is in UTC."""
        return None

    def trouble(self) -> str | None:
        """Return what an operator has to fix although the consumer goes on, else None; called before each `idle`."""
        return None

    def close(self) -> None:  # noqa: B027  # most consumers hold nothing
        """Release resources. For `Own`: store what is buffered."""

    @abstractmethod
    def open(self, day: Day) -> None:
        """Begin: clear all state. The polls of the day up to the committed one come next, with `replay` set."""

    @abstractmethod
    def process_poll(self, poll: WholePoll) -> Sequence[Emit] | None:
        """Process a poll; return what to publish."""
