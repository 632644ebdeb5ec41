"""An archive of Parquet files that keeps its offsets with its data.

A file holds one range [start, next) of one partition and one trading day. Its name is topic, partition and start; its
metadata says both ends. The start is exactly the `next` of the file before it, and a file is created only if absent, so
of two writers at the same place one wins and the other rewinds. A file is visible when it is complete, and not before.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import ClassVar, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bourse_consumers.api import Assignment, Batch, Consumer, Offsets, Own, Partition, Retry, Rewind
from bourse_consumers.rows import dictionary_columns
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import TRADES, Topic

__all__ = ["ParquetArchive", "count_rows", "files", "read"]

METADATA = b"bourse.range"
NAME = re.compile(r"(?P<topic>.+)-(?P<partition>\d+)-(?P<start>\d{20})\.parquet")


class File(NamedTuple):
    """A file of the archive, by its name."""

    path: Path
    partition: Partition
    start: int

    def next(self) -> int:
        """Return the end of its range, from its metadata."""
        try:
            metadata = pq.read_metadata(self.path).metadata or {}
            return int(json.loads(metadata[METADATA])["next"])
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise ConfigurationError(
                f"{self.path} is not a file of this archive ({error!r}): move it elsewhere"
            ) from error


@dataclass
class _Buffer:
    """Rows of one partition and day that are not in a file yet: the range [start, next)."""

    partition: Partition
    day: date
    start: int
    next: int
    since: float = field(default_factory=time.monotonic)
    tables: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    size: int = 0

    def add(self, table: pa.Table, end: int) -> None:
        self.tables.append(table)
        self.rows += table.num_rows
        self.size += table.nbytes
        self.next = end


class _Covered(Exception):
    """Another writer's file covers the range already."""


class ParquetArchive(Consumer):
    """Writes every event of `bourse.trades` to Parquet under a folder, exactly once.

    Taking rows over never fails; writing does, and happens before a batch is looked at. So a batch that comes again
    after Retry was not taken over before.
    """

    topics: ClassVar[tuple[Topic, ...]] = (TRADES,)

    def __init__(self, root: Path, max_rows: int, max_bytes: int, max_age_seconds: float) -> None:
        self._root = root
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._open: dict[Partition, _Buffer] = {}
        self._full: list[_Buffer] = []
        self._next: dict[Partition, int] = {}
        self._staging = root / ".incomplete"
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            probe = self._staging / uuid4().hex
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigurationError(f"--to {root}: cannot write there: {error.strerror}") from error

    def open(self, assigned: Assignment) -> Own:
        """Begin where the files end; what was buffered is read again."""
        self._open, self._full = {}, []
        ends = _ends(self._root)
        self._next = {partition: ends.get(partition, 0) for partition in assigned}
        return Own(dict(self._next))

    def process(self, batch: Batch) -> None:
        """Write what is full, then take the batch over."""
        self._write()
        table = batch.table()
        for number in pc.unique(table["_partition"]).to_pylist():
            part = table.filter(pc.equal(table["_partition"], number))
            partition = Partition(batch.records[0].partition.topic, number)
            for day, rows in _days(part):
                self._take(partition, day, rows)
            # The range reaches to the consumer's position: transaction markers take offsets too.
            buffer = self._open[partition]
            buffer.next = self._next[partition] = max(buffer.next, batch.next.get(partition, 0))

    def _take(self, partition: Partition, day: date, rows: pa.Table) -> None:
        first, last = rows["_offset"][0].as_py(), rows["_offset"][-1].as_py()
        buffer = self._open.get(partition)
        if buffer is not None and buffer.day != day:
            buffer.next = self._next[partition] = first
            self._close(buffer)
            buffer = None
        if buffer is None:
            start = self._next[partition]
            buffer = self._open[partition] = _Buffer(partition, day, start, start)
        buffer.add(rows, last + 1)
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
            try:
                self._create(self._full[0])
            except _Covered as error:
                self._open, self._full = {}, []
                ends = _ends(self._root)
                self._next = {partition: ends.get(partition, 0) for partition in self._next}
                raise Rewind(dict(self._next), f"{error} was written by another one") from error
            except OSError as error:
                raise Retry(f"cannot write to {self._root}: {error.strerror or error}") from error
            self._full.pop(0)

    def _create(self, buffer: _Buffer) -> None:
        """Make a buffer a file, whole or not at all, only where nothing covers its range yet."""
        folder = self._root / f"trading_day={buffer.day}"
        topic, number = buffer.partition
        final = folder / f"{topic}-{number}-{buffer.start:020d}.parquet"
        before = [file for file in files(self._root) if file.partition == buffer.partition]
        if any(file.start >= buffer.start for file in before) or (
            before and max(before, key=lambda file: file.start).next() > buffer.start
        ):
            raise _Covered(final)
        table = pa.concat_tables(buffer.tables)
        about = {"topic": topic, "partition": number, "start": buffer.start, "next": buffer.next}
        table = table.replace_schema_metadata({METADATA: json.dumps(about).encode()})
        staged = self._staging / f"{uuid4().hex}.part"
        try:
            with staged.open("wb") as file:
                pq.write_table(table, file, compression="zstd", use_dictionary=dictionary_columns(table.schema))
                file.flush()
                os.fsync(file.fileno())
            folder.mkdir(exist_ok=True)
            try:
                os.link(staged, final)
            except FileExistsError as error:
                raise _Covered(final) from error
            _sync(folder)
        finally:
            staged.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _days(table: pa.Table) -> Iterator[tuple[date, pa.Table]]:
    """Yield runs of rows of the same trading day, in order."""
    days = table["trading_day"].to_pylist()
    start = 0
    for index in range(1, len(days) + 1):
        if index == len(days) or days[index] != days[start]:
            yield days[start], table.slice(start, index - start)
            start = index


def files(root: Path) -> list[File]:
    """Return the archive's files; one that is not ours is a ConfigurationError."""
    found = []
    for path in root.glob("trading_day=*/*.parquet"):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise ConfigurationError(f"{path} is not a file of this archive: move it elsewhere")
        found.append(File(path, Partition(name["topic"], int(name["partition"])), int(name["start"])))
    return found


def _ends(root: Path) -> dict[Partition, int]:
    last: dict[Partition, File] = {}
    for file in files(root):
        if file.partition not in last or file.start > last[file.partition].start:
            last[file.partition] = file
    return {partition: file.next() for partition, file in last.items()}


def count_rows(root: Path) -> int:
    """Return how many rows the archive holds, by reading the files' columns back."""
    return sum(pq.read_table(file.path, columns=["_offset"]).num_rows for file in files(root))


def read(root: Path) -> pa.Table:
    """Return the whole archive as one table, in the order of partitions and offsets."""
    ordered = sorted(files(root), key=lambda file: (file.partition, file.start))
    return pa.concat_tables([pq.read_table(file.path, partitioning=None) for file in ordered])
