"""The SDK: what a consumer of the bus implements. The runner does everything else.

The runner makes all calls from one thread:

1. `open(assigned)` with all partitions of this member, which may be none: at the start, after every rebalance and after
   a failed transaction. State that earlier calls left in memory is void.
2. `process(batch)` with records of those partitions and of one topic, in order per partition. It may block for up to
   half an hour; the runner keeps the membership alive. When it returns, the batch is processed (`Resume`, `Rebuild`) or
   taken over (`Own`). When it raises, the same records are delivered again, so it must not keep any effect of them.
3. `idle(now)` about twice a second, also without batches; not while `process` runs or waits after `Retry`, and not
   while state is rebuilt.
4. `durable()` for `Own` only: the offsets below which everything is stored.
5. `close()` once, at an orderly stop; only `durable()` is called afterwards.

A `MarketConsumer` gets whole polls in place of batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bourse_consumers.records import Offsets, Partition, Places, Record, Records
from bourse_schemas.errors import BourseError, Undecodable
from bourse_schemas.events import Event, PollMarker, TradeEvent
from bourse_schemas.topics import POLLS, TRADES, Topic

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from bourse_consumers.columns import Columns
    from bourse_schemas.codec import Deserializer

__all__ = [
    "Assignment",
    "Batch",
    "Consumer",
    "Day",
    "Emit",
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
    "WholePoll",
]


# --- where to begin ---------------------------------------------------------------------------------------------------


class Assignment(dict[Partition, int]):
    """The partitions of this member; the value is the offset that the group has committed.

    `fresh` are the partitions for which the group has committed nothing: their value is `first`, the oldest offset that
    the topic still has.
    """

    def __init__(
        self,
        committed: Offsets,
        day_start: Callable[[], Offsets] = dict,
        first: Offsets | None = None,
        *,
        fresh: Collection[Partition] = (),
        read: Callable[[Topic], Iterable[Event]] = lambda _: (),
        identity: Callable[[str], tuple[str, str]] = lambda _: ("", ""),
    ) -> None:
        super().__init__(committed)
        self.day_start = day_start
        """Return offsets at or before the first record of the trading day under way at the committed offsets.

        That is where to rebuild state that lives for one trading day. Asks the broker.
        """
        self.read = read
        """Yield the committed events of another topic, with all that this group has published there.

        For a compacted topic these are all events; otherwise those of the trading day of each partition's last record.
        Events that cannot be decoded are left out.
        """
        self.identity = identity
        """Return the ids of the cluster and of a topic by its full name; "" if they are not known. Asks the broker."""
        self.first: Offsets = first or {}
        self.fresh = fresh


@dataclass(frozen=True, slots=True)
class Resume:
    """Begin at the group's committed offsets. The emits of a batch and its offsets are one Kafka transaction."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Begin at earlier offsets, to fold records into memory again; partitions not named begin where `Resume` does.

    Batches below the committed offsets have `replay` set: what `process` returns for them is dropped. A batch is either
    entirely below the committed offsets or entirely above. Of a fresh partition every record counts as new.
    """

    offsets: Offsets


@dataclass(frozen=True, slots=True)
class Own:
    """Begin at offsets that the sink stores with its data; partitions not named begin where `Resume` does.

    The group's offsets are only a hint for dashboards. What the consumer publishes is not tied to its sink: after a
    crash it may be missing or duplicated. Dead letters are never missing.
    """

    offsets: Offsets


Start = Resume | Rebuild | Own


# --- what is delivered ------------------------------------------------------------------------------------------------


class Emit(NamedTuple):
    """An event to publish on one of the declared topics."""

    topic: Topic
    event: Event


class Decoders:
    """Decodes records, by the full names of their topics. Any call may raise Unreachable."""

    def __init__(self, by_topic: Mapping[str, Deserializer[Any]]) -> None:
        self._by_topic, self._by_columns = by_topic, dict[str, "Columns"]()

    def event(self, record: Record) -> Any:
        """Return a record's event. Raises Undecodable."""
        return self._by_topic[record.partition.topic](record.value)

    def frame(self, places: Places) -> pl.DataFrame | None:
        """Return the events of records of one topic by columns, None if they have to be decoded one by one."""
        return self._columns(places).read(places.values)

    def table(self, places: Places) -> pa.Table | None:
        """Return the same as an Arrow table, with `_partition`, `_offset` and `_timestamp`."""
        if (frame := self.frame(places)) is None:
            return None
        from bourse_consumers.rows import as_table  # not every consumer needs pyarrow, and it is 40 MB

        return as_table(frame, self._by_topic[places.partitions[0].topic].event, places)

    def unknown(self, places: Places) -> pa.Table | None:
        """Return the fields of newer writers that this release does not know, None if there are none."""
        return self._columns(places).unknown(places.values)

    def _columns(self, places: Places) -> Columns:
        from bourse_consumers.columns import Columns  # needs polars

        topic = places.partitions[0].topic
        if topic not in self._by_columns:
            self._by_columns[topic] = Columns(self._by_topic[topic])
        return self._by_columns[topic]


@dataclass(frozen=True)
class Batch:
    """Records of one topic, in order per partition, all decodable.

    `events` are the typed values, decoded when they are first accessed, `table()` and `frame()` the same by columns.
    `next` is, per partition, the offset after the batch. It may be beyond the last record: transaction markers take
    offsets, too.
    """

    records: Sequence[Record]
    next: Offsets
    decoders: Decoders = field(repr=False)
    replay: bool = False

    @cached_property
    def events(self) -> Sequence[Any]:
        """Return the records' events, in the records' order."""
        events, bad = [], []
        for record in self.records:
            try:
                events.append(self.decoders.event(record))
            except Undecodable as error:
                bad.append((record, str(error)))
        if bad:
            raise Unreadable(bad)
        return events

    def without(self, bad: Collection[Record]) -> Batch:
        """Return the batch without some of its records."""
        gone = {id(record) for record in bad}
        kept = [n for n, record in enumerate(self.records) if id(record) not in gone]
        if len(kept) + len(gone) != len(self.records):
            raise RuntimeError("Reject names a record that is not in the batch")
        rest = replace(self, records=[self.records[n] for n in kept])
        if "events" in self.__dict__:
            rest.__dict__["events"] = [self.events[n] for n in kept]
        return rest

    def all_fields(self) -> pa.Table:
        """Return `table()`, with the fields of newer writers that this release does not know."""
        table, more = self.table(), self.decoders.unknown(Places.of(self.records))
        for name, column in zip(more.column_names, more.columns, strict=True) if more is not None else ():
            table = table.append_column(name, column)
        return table

    def table(self) -> pa.Table:
        """Return the events as an Arrow table, with `_partition`, `_offset` and `_timestamp`. Needs pyarrow."""
        places = Places.of(self.records)
        if "events" not in self.__dict__ and (found := self.decoders.table(places)) is not None:
            return found
        from bourse_consumers.rows import to_table

        return to_table(self.events, places)

    def frame(self) -> pl.DataFrame:
        """Return the events as a polars frame. Needs polars only."""
        if "events" not in self.__dict__ and (found := self.decoders.frame(Places.of(self.records))) is not None:
            return found
        from bourse_consumers.columns import to_frame

        return to_frame(self.events)


@dataclass(frozen=True)
class WholePoll:
    """A poll of the whole market: its marker and all events with its `poll_sequence`, in any order.

    `replay` is set for polls that are already committed: they only rebuild state, and what is returned for them is
    dropped. If `complete` is false, events are missing for good: do not judge the poll, use its events, and judge the
    next one as after a gap. `undecodable` are bad records that were read before it, and why; they
    become dead letters.
    """

    marker: PollMarker
    replay: bool = False
    complete: bool = True
    undecodable: Sequence[tuple[Record, str]] = ()
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
    """The trading day under way when a market consumer becomes active; `read` is `Assignment.read`."""

    read: Callable[[Topic], Iterable[Event]] = lambda _: ()


# --- what a consumer raises -------------------------------------------------------------------------------------------


class Retry(BourseError):
    """An external system failed: deliver the same batch again later; its partitions are paused meanwhile.

    `after` is the wait in seconds; without it the runner doubles the wait from half a second up to a minute. If nothing
    is at `fault`, the wait is not counted as a failure, and the service stays ready.
    """

    def __init__(self, message: str, after: float | None = None, *, fault: bool = True) -> None:
        super().__init__(message)
        self.after, self.fault = after, fault


class Reject(BourseError):
    """This record is bad: the runner sends it to the dead letters and delivers the batch again without it.

    `record` must be one of `batch.records`.
    """

    def __init__(self, record: Record, message: str) -> None:
        super().__init__(message)
        self.record = record


class Unreadable(Undecodable):
    """Records of the batch cannot be decoded, and why: what `Batch.events` raises, and the runner handles."""

    def __init__(self, bad: Sequence[tuple[Record, str]]) -> None:
        super().__init__(bad[0][1])
        self.bad = bad


class Reopen(BourseError):
    """The state is void, for example because another writer was faster or rules changed: call `open` again.

    If nothing is at `fault`, it is logged as information, and the service stays ready.
    """

    def __init__(self, message: str, *, fault: bool = True) -> None:
        super().__init__(message)
        self.fault = fault


# --- what is implemented ----------------------------------------------------------------------------------------------


class Health(Protocol):
    """What a consumer may use of the service's health: `unready("database", "is down")`, and None when it is over."""

    def unready(self, subject: str, why: str | None) -> None:
        """Name a reason for not being ready, or withdraw the one of this subject."""


class Member(ABC):  # noqa: B024  # its subclasses have abstract methods
    """What every consumer has. Errors other than the three above end the process; uncommitted work is redelivered."""

    emits: Sequence[Topic] = ()
    """The topics it publishes, besides dead letters. They are checked at the start; other topics are refused."""
    batch_size: int = 1000
    """The most records it gets at a time, unless the operator sets --batch-size."""
    monitor: Health | None = None
    """The service's health; set before the first call."""
    stopped: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the service has to end within five seconds: a call that takes longer raises `Retry` then."""

    def idle(self, now: datetime) -> Sequence[Emit] | None:  # noqa: ARG002
        """Do what is due by time, such as timers and flushing by age; return what to publish. `now` is in UTC."""
        return None

    def trouble(self) -> str | None:
        """Return what an operator has to fix although the consumer goes on, else None; called before each `idle`."""
        return None

    def close(self) -> None:  # noqa: B027  # most consumers hold nothing
        """Release resources. For `Own`: store what is buffered."""


class Consumer(Member):
    """A consumer that gets records in batches."""

    topics: Sequence[Topic] = (TRADES,)
    """The topics it reads."""
    from_end: bool = False
    """Whether a group that has committed nothing begins at the end of its topics instead of at their start."""

    def open(self, assigned: Assignment) -> Start:  # noqa: ARG002
        """Begin with these partitions."""
        return Resume()

    @abstractmethod
    def process(self, batch: Batch) -> Sequence[Emit] | None:
        """Process a batch; return what to publish."""

    def durable(self) -> Offsets:
        """Return, for `Own`, the offsets below which everything is stored."""
        return {}


class MarketConsumer(Member):
    """A consumer that gets every poll of the whole market, in order, as one unit.

    One member of the group is active; the others are on standby and take over. The polls processed and what was emitted
    for them are one Kafka transaction. Raises Retry and Reopen like any other; `Reject` is not for it.
    """

    topics: Sequence[Topic] = (POLLS, TRADES)

    @abstractmethod
    def open(self, day: Day) -> None:
        """Begin: clear all state. The polls of the day up to the committed one come next, with `replay` set."""

    @abstractmethod
    def process_poll(self, poll: WholePoll) -> Sequence[Emit] | None:
        """Process a poll; return what to publish."""
