"""The consumer that writes an archive of Parquet files and keeps its offsets with its data.

The start of a file's range is exactly the `next` of the file before it, and a file is created only if absent, so of two
writers at the same place one wins and the other opens again. A file is visible when it is complete, and not before.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date, datetime

import pyarrow as pa

import bourse_consumers.columns  # noqa: F401  # now, not when the first batch is there
from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Offsets, Own, Partition, Places, Reopen, Retry
from bourse_consumers.archive.files import (
    Range,
    compact,
    describe,
    ends,
    own,
    plain_path,
    rivals,
    runs,
    write,
)
from bourse_consumers.archive.store import Store, StoreError
from bourse_schemas.codec import FRAME
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN
from bourse_schemas.topics import TRADES, Topic

__all__ = ["ParquetArchive"]


# Buffers that may be full before the one who reads waits for the one who writes.
WAITING = 2


@dataclass
class _Buffer:
    """Rows of one partition and day that are not in a file yet: the range [start, next)."""

    partition: Partition
    day: date
    start: int
    next: int
    since: float = field(default_factory=time.monotonic)
    tables: list[pa.Table] = field(default_factory=list)
    schema_ids: set[int] = field(default_factory=set)
    rows: int = 0
    size: int = 0

    def add(self, table: pa.Table, end: int, schema_ids: set[int]) -> None:
        self.tables.append(table)
        self.rows += table.num_rows
        self.size += table.nbytes
        self.schema_ids |= schema_ids
        self.next = end


class ParquetArchive(Consumer):
    """Writes every event of a topic to Parquet files, exactly once.

    Files are written by a thread of their own, one after the other; taking rows over never fails, and what writing came
    to is looked at before a batch is. So a batch that comes again after Retry was not taken over before.
    """

    batch_size = 3000

    def __init__(  # the command's options
        self,
        store: Store,
        topic: Topic = TRADES,
        *,
        max_rows: int = 50_000,
        max_bytes: int = 16 << 20,
        max_age_seconds: float = 300.0,
        accept_loss: bool = False,
    ) -> None:
        self.topics = (topic,)
        self._store = store
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._accept_loss = accept_loss
        self._open: dict[Partition, _Buffer] = {}
        self._full: list[_Buffer] = []
        self._next: dict[Partition, int] = {}
        # Compressing and uploading take their time, and one of them at a time is enough.
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._failed = False
        store.require()

    def open(self, assigned: Assignment) -> Own:
        """Begin where the files end; what was buffered is read again."""
        if self._writing is not None:
            wait([self._writing])
        self._open, self._full, self._writing = {}, [], None
        self._next = {}
        if not assigned:
            return Own({})
        try:
            found = ends(self._store, next(iter(assigned)).topic)
            self._note_loss({p: (found[p], at) for p, at in assigned.first.items() if p in found and found[p] < at})
        except StoreError as error:
            raise Retry(str(error)) from error
        # A partition that is new here begins where it begins, whatever the group has committed.
        self._next = {p: max(found.get(p, 0), assigned.first.get(p, 0)) for p in assigned}
        return Own(dict(self._next))

    def _note_loss(self, lost: dict[Partition, tuple[int, int]]) -> None:
        """Stop where the topic no longer has what comes next; or leave an empty file that says so."""
        for partition, (start, first) in lost.items():
            where = f"{partition.topic}-{partition.number}: offsets {start} to {first - 1}"
            if not self._accept_loss:
                raise ConfigurationError(
                    f"the topic has deleted what this archive lacks, {where}: it was away for longer than the topic "
                    "keeps its records; --accept-loss goes on, and leaves a record of the hole"
                )
            get_logger().error("lost for ever, and noted in the archive", where=where)
            nothing = pa.table({"_partition": pa.array([], pa.int32()), "_offset": pa.array([], pa.int64())})
            day = datetime.now(TEHRAN).date()
            self._create(_Buffer(partition, day, start, first, tables=[nothing]), lost=True)

    def process(self, batch: Batch) -> None:
        """See that what was full is written, then take the batch over."""
        self._hand_over()
        self._collect()
        table = batch.table()
        places = Places.of(batch.records)
        ids = {FRAME.unpack_from(value)[1] for value in {(value or b"")[: FRAME.size] for value in places.values}}
        topic = places.partitions[0].topic
        for number, day, rows in runs(table):
            self._take(Partition(topic, number), day, own(compact(rows)), ids)
        # The range reaches to the consumer's position: transaction markers take offsets too.
        for partition in set(places.partitions):
            buffer = self._open[partition]
            buffer.next = self._next[partition] = max(buffer.next, batch.next.get(partition, 0))
        self._hand_over()

    def _take(self, partition: Partition, day: date, rows: pa.Table, schema_ids: set[int]) -> None:
        first, last = rows["_offset"][0].as_py(), rows["_offset"][-1].as_py()
        buffer = self._open.get(partition)
        if buffer is not None and buffer.day != day:
            buffer.next = self._next[partition] = first
            self._close(buffer)
            buffer = None
        if buffer is None:
            start = self._next[partition]
            buffer = self._open[partition] = _Buffer(partition, day, start, start)
        buffer.add(rows, last + 1, schema_ids)
        self._next[partition] = last + 1

    def idle(self, now: datetime) -> None:  # noqa: ARG002  # ages are durations: the wall clock may jump
        """Write what is full or old enough."""
        for buffer in list(self._open.values()):
            if time.monotonic() - buffer.since >= self._max_age_seconds:
                self._close(buffer)
        self._hand_over()
        self._collect()

    def durable(self) -> Offsets:
        """Return the ends of what is in files."""
        buffered = {buffer.partition: buffer.start for buffer in reversed([*self._full, *self._open.values()])}
        return {**self._next, **buffered}

    def close(self) -> None:
        """Write everything."""
        for buffer in list(self._open.values()):
            self._close(buffer)
        self._hand_over()
        self._collect(all_of_it=True)

    def _close(self, buffer: _Buffer) -> None:
        del self._open[buffer.partition]
        self._full.append(buffer)

    def _hand_over(self) -> None:
        """Close what is full, and have the oldest of it written."""
        for buffer in list(self._open.values()):
            if buffer.rows >= self._max_rows:
                self._close(buffer)
        while sum(buffer.size for buffer in self._open.values()) >= self._max_bytes:
            self._close(max(self._open.values(), key=lambda buffer: buffer.size))
        if self._full and self._writing is None:
            self._writing = self._writer.submit(self._create, self._full[0])

    def _collect(self, *, all_of_it: bool = False) -> None:
        """See what came of the writing; wait where too much is due, or it failed last. Raises Retry, Reopen."""
        while self._writing is not None and (
            all_of_it or self._failed or len(self._full) > WAITING or self._writing.done()
        ):
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except StoreError as error:
                self._failed = True
                raise Retry(f"cannot write: {error}") from error
            self._failed = False
            del self._full[0]
            self._hand_over()

    def _create(self, buffer: _Buffer, *, lost: bool = False) -> None:
        """Make a buffer a file, whole or not at all, only where nothing covers its range yet.

        Whatever holds the record the range begins with is a file of the same day.
        """
        span = Range(buffer.partition, buffer.start, buffer.next)
        final = plain_path(buffer.day, buffer.partition, buffer.start)
        for path in rivals(self._store, buffer.day, span):
            if any(
                other.partition == span.partition and other.next > span.start
                for other in describe(self._store, path).ranges
            ):
                raise Reopen(f"{path} was written by another one")
        if not write(
            self._store, final, pa.concat_tables(buffer.tables), [span], schema_ids=sorted(buffer.schema_ids), lost=lost
        ):
            raise Reopen(f"{final} was written by another one")
