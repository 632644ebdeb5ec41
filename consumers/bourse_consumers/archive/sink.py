"""The consumer that writes a topic to its Delta table, rows and offsets in one commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import pyarrow as pa

import bourse_consumers.columns  # noqa: F401  # now, not when the first batch is there
from bourse_cli.logs import get_logger
from bourse_cli.root import UNATTENDED
from bourse_consumers.api import Assignment, Batch, Consumer, Offsets, Own, Partition, Reopen, Retry
from bourse_consumers.archive.maintenance import Optimizer
from bourse_consumers.archive.storage import Storage, StoreError
from bourse_consumers.archive.table import Table
from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.topics import TRADES, Topic

__all__ = ["DeltaArchive"]


T = TypeVar("T")
# A store that has not answered for this long is at fault; before, it is slow.
SILENT_SECONDS = 60.0


class _Task(Future[T]):
    """What a thread does in the store, which may never answer."""

    def __init__(self) -> None:
        super().__init__()
        self.since = time.monotonic()

    @property
    def silent(self) -> bool:
        return not self.done() and time.monotonic() - self.since >= SILENT_SECONDS


@dataclass
class _Chunk:
    """Rows that are not committed yet; `begin` and `next` are the offsets before and after them."""

    begin: dict[Partition, int]
    next: dict[Partition, int] = field(default_factory=dict)
    tables: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    since: float = field(default_factory=time.monotonic)
    adds: list[Any] | None = None


class DeltaArchive(Consumer):
    """Writes every event of a topic to a Delta table, exactly once.

    A thread writes and commits one chunk while the next one is filled. Taking a batch over never fails: what came of
    the writing is raised before, so a batch that is delivered again was not taken over. A store that does not answer
    within `patience` seconds is waited for in the next turn: a stop in between gives up what is not committed.
    """

    batch_size = 3000

    def __init__(
        self,
        to: str,
        topic: Topic = TRADES,
        *,
        commit_seconds: float = 60.0,
        commit_rows: int = 50_000,
        accept_loss: bool = False,
        optimize: bool = False,
        patience: float | None = None,
    ) -> None:
        if topic.cleanup == "compact":
            raise ConfigurationError(
                f"--topic {topic.name}: Kafka compacts this topic, so an archive of it cannot be proved; use trades, "
                "they have every change"
            )
        self.topics = (topic,)
        self._to = to
        self._commit_seconds, self._commit_rows, self._accept_loss = commit_seconds, commit_rows, accept_loss
        self._optimizer = Optimizer(to, topic.name) if optimize else None
        # How long to wait for the store before a turn ends, so that a stop is noticed.
        self._patience = patience
        self._table: Table | None = None
        # What the table has stored per partition, None if nothing, and the next offset to read.
        self._stored: dict[Partition, int | None] = {}
        self._next: dict[Partition, int] = {}
        self._chunk: _Chunk | None = None
        self._full: _Chunk | None = None
        self._opening: tuple[Assignment, _Task[Table]] | None = None
        self._writing: _Task[None] | None = None
        # The store failed, and has done nothing since.
        self._failed = False
        self._required = False
        try:
            self._require()
        except Unreachable as error:
            get_logger().warning("the archive is unreachable, it is tried again", error=str(error))

    def open(self, assigned: Assignment) -> Own:
        """Begin at the offsets that the table has stored; what was buffered is read again."""
        if self._opening is None or self._opening[0] is not assigned:
            self._wait(self._writing)
            self._chunk = self._full = self._writing = None
            self._stored, self._next = {}, {}
            if not assigned:
                return Own({})
            self._opening = assigned, _start(self._opened, assigned)
        task = self._opening[1]
        self._wait(task)
        self._opening = None
        try:
            table = self._table = task.result()
        except (StoreError, Unreachable) as error:
            self._failed = True
            raise Retry(str(error)) from error
        self._failed = False
        self._stored = {partition: table.stored(partition) for partition in assigned}
        first = table.about["first"]
        self._next = {each: at or first[f"{each.number}"] for each, at in self._stored.items()}
        return Own(dict(self._next))

    def _require(self) -> None:
        """Check the store once."""
        if not self._required:
            Storage(self._to).require()
            self._required = True

    def _opened(self, assigned: Assignment) -> Table:
        """Open or create the topic's table, refuse that of another topic, and note where partitions begin."""
        self._require()
        topic = next(iter(assigned)).topic
        cluster, topic_id = assigned.identity(topic)
        uri = f"{self._to.rstrip('/')}/{topic}"
        table = Table.open(uri, recover=True) or Table.create(uri, topic, cluster, topic_id)
        table.require_from(topic, cluster, topic_id)
        first = table.about["first"]
        for partition in assigned:
            number, oldest = f"{partition.number}", assigned.first.get(partition, 0)
            at = table.stored(partition) or first.get(number, oldest)
            first.setdefault(number, at)
            if at < oldest:
                self._note_loss(table, partition, at, oldest)
        table.describe(first)
        table.sync()
        return table

    def _note_loss(self, table: Table, partition: Partition, start: int, end: int) -> None:
        """Stop if the topic has deleted what comes next; or let the table's offset move over the hole."""
        where = f"{partition.topic}-{partition.number}: offsets {start} to {end - 1}"
        if not self._accept_loss:
            raise ConfigurationError(
                f"the topic has deleted what this archive lacks, {where}: the archiver was down for longer than the "
                "topic keeps its records; --accept-loss goes on and records the hole in the table"
            )
        get_logger().error("lost, and recorded in the table as a hole", where=where)
        table.describe(hole=[partition.number, start, end])
        table.commit(transactions={f"{partition.topic}-{partition.number}": end})

    def process(self, batch: Batch) -> None:
        """Raise what came of the writing, then take the batch over."""
        self._submit()
        self._collect()
        rows = batch.all_fields()
        chunk = self._chunk = self._chunk or _Chunk(dict(self._next))
        chunk.tables.append(rows)
        chunk.rows += rows.num_rows
        chunk.next.update(batch.next)
        self._next.update(batch.next)
        self._submit()

    def idle(self, now: datetime) -> None:  # noqa: ARG002  # ages are durations: the wall clock may jump
        """Commit what is old enough; the member that has partition 0 optimizes closed days."""
        self._submit()
        self._collect()
        if self._optimizer is not None and any(partition.number == 0 for partition in self._next):
            self._optimizer.step(self.monitor)

    def durable(self) -> Offsets:
        """Return the offsets of what is committed and synced."""
        waiting = self._full or self._chunk
        return {**self._next, **(waiting.begin if waiting is not None else {})}

    def close(self) -> None:
        """Commit everything."""
        if self._optimizer is not None:
            self._optimizer.stop()
        self._submit(everything=True)
        self._collect(everything=True)

    def _wait(self, task: _Task[Any] | None) -> None:
        """Raise Retry if the store does not answer in this turn."""
        if task is None or wait([task], self._patience).done:
            return
        if self._failed or task.silent:
            raise Retry(f"the store has not answered for {time.monotonic() - task.since:.0f} s")
        raise Retry("the store is slow", after=0.1, fault=False)

    def _submit(self, *, everything: bool = False) -> None:
        """Give the writer the chunk that is due, or the one that failed."""
        if self._full is None and self._chunk is not None and (everything or self._is_due(self._chunk)):
            self._full, self._chunk = self._chunk, None
        if self._full is not None and self._writing is None:
            self._writing = _start(self._write, self._full)

    def _collect(self, *, everything: bool = False) -> None:
        """Raise what the writing came to; wait for it if the store failed or is silent, or if the next chunk is due."""
        while self._writing is not None and (
            everything
            or self._failed
            or self._writing.done()
            or self._writing.silent
            or (self._chunk is not None and self._is_due(self._chunk))
        ):
            self._wait(self._writing)
            try:
                self._writing.result()
            except StoreError as error:
                self._writing, self._failed = None, True
                raise Retry(f"cannot write: {error}") from error
            self._full, self._writing, self._failed = None, None, False
            self._submit(everything=everything)

    def _is_due(self, chunk: _Chunk) -> bool:
        return chunk.rows >= self._commit_rows or time.monotonic() - chunk.since >= self._commit_seconds

    def _write(self, chunk: _Chunk) -> None:
        """Write a chunk's files and commit them with its offsets (the writer's thread)."""
        table = self._table
        if table is None:
            return
        table.refresh()
        if chunk.adds is None:
            chunk.adds = table.write(pa.concat_tables(chunk.tables, promote_options="permissive"))
        table.refresh()
        self._guard(table, chunk.next)
        try:
            table.commit(chunk.adds, transactions={f"{p.topic}-{p.number}": at for p, at in chunk.next.items()})
        except StoreError:
            table.refresh()
            self._guard(table, chunk.next)
            raise
        self._stored.update(chunk.next)

    def _guard(self, table: Table, moved: Mapping[Partition, int]) -> None:
        """Raise Reopen unless the table ends, on its snapshot, exactly at our rows' begin."""
        for partition in moved:
            if table.stored(partition) != self._stored[partition]:
                raise Reopen(f"{partition.topic}-{partition.number} was written by another archiver")


def _start(work: Callable[..., T], *args: Any) -> _Task[T]:
    """Do something in a thread of its own, which does not hold up the end of the process."""
    task = _Task[T]()

    def run() -> None:
        try:
            task.set_result(work(*args))
        except BaseException as error:  # the other thread raises it
            task.set_exception(error)

    threading.Thread(target=run, name=UNATTENDED, daemon=True).start()
    return task
