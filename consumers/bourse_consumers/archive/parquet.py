"""The consumer that writes an archive of Parquet files and keeps its offsets with its data.

The start of a file's range is exactly the `next` of the file before it, and a file is created only if absent, so of two
writers at the same place one wins and the other rewinds. A file is visible when it is complete, and not before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import date, datetime

import pyarrow as pa
import pyarrow.compute as pc

from bourse_consumers.api import Assignment, Batch, Consumer, Offsets, Own, Partition, Places, Retry, Rewind
from bourse_consumers.archive.files import TEHRAN, Range, describe, ends, plain_path, rivals, runs, write
from bourse_consumers.archive.store import Store, StoreError
from bourse_schemas.codec import FRAME
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.telemetry import get_logger
from bourse_schemas.topics import TRADES, Topic

__all__ = ["ParquetArchive"]


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


class _Covered(Exception):
    """Another writer's file covers the range already."""


class ParquetArchive(Consumer):
    """Writes every event of a topic to Parquet files, exactly once.

    Taking rows over never fails; writing does, and happens before a batch is looked at. So a batch that comes again
    after Retry was not taken over before.
    """

    def __init__(  # the command's options
        self,
        store: Store,
        topic: Topic = TRADES,
        *,
        max_rows: int = 50_000,
        max_bytes: int = 64 << 20,
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
        store.require()

    def open(self, assigned: Assignment) -> Own:
        """Begin where the files end; what was buffered is read again."""
        self._open, self._full = {}, []
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
            empty = _Buffer(partition, datetime.now(TEHRAN).date(), start, first)
            nothing = pa.table({"_partition": pa.array([], pa.int32()), "_offset": pa.array([], pa.int64())})
            self._create(empty, nothing, lost=True)

    def process(self, batch: Batch) -> None:
        """Write what is full, then take the batch over."""
        self._write()
        table = batch.table()
        places = Places.of(batch.records)
        ids = {FRAME.unpack_from(value)[1] for value in {(value or b"")[: FRAME.size] for value in places.values}}
        numbers = {partition.number for partition in places.partitions}
        for number in sorted(numbers):
            part = table if len(numbers) == 1 else table.filter(pc.equal(table["_partition"], number))
            partition = Partition(places.partitions[0].topic, number)
            for day, rows in runs(part):
                self._take(partition, day, rows, ids)
            # The range reaches to the consumer's position: transaction markers take offsets too.
            buffer = self._open[partition]
            buffer.next = self._next[partition] = max(buffer.next, batch.next.get(partition, 0))

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
        self._write()

    def durable(self) -> Offsets:
        """Return the ends of what is in files."""
        buffered = {buffer.partition: buffer.start for buffer in reversed([*self._full, *self._open.values()])}
        return {**self._next, **buffered}

    def close(self) -> None:
        """Write everything."""
        for buffer in list(self._open.values()):
            self._close(buffer)
        self._write()

    def _close(self, buffer: _Buffer) -> None:
        del self._open[buffer.partition]
        self._full.append(buffer)

    def _write(self) -> None:
        """Write the buffers that are full. Raises Retry, Rewind; what it did write stays written."""
        for buffer in list(self._open.values()):
            if buffer.rows >= self._max_rows or buffer.size >= self._max_bytes:
                self._close(buffer)
        while self._full:
            buffer = self._full[0]
            try:
                try:
                    self._create(buffer, pa.concat_tables(buffer.tables), schema_ids=sorted(buffer.schema_ids))
                except _Covered as error:
                    held = self.durable()
                    self._open, self._full = {}, []
                    found = ends(self._store, buffer.partition.topic)
                    self._next = {partition: found.get(partition, at) for partition, at in held.items()}
                    raise Rewind(dict(self._next), f"{error} was written by another one") from error
            except StoreError as error:
                raise Retry(f"cannot write: {error}") from error
            self._full.pop(0)

    def _create(self, buffer: _Buffer, table: pa.Table, **more: object) -> None:
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
                raise _Covered(path)
        if not write(self._store, final, table, [span], **more):
            raise _Covered(final)
