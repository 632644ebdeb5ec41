"""The runtime of a consumer: batches, back-off, dead letters, transactions, rebalances, shutdown, lag.

`Runner` is policy and knows no broker; it works over a `Stream`, which `kafka_stream.py` (Kafka) and `testing.py`
(memory) implement.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from bourse_consumers.api import (
    Assignment,
    Batch,
    Consumer,
    Emit,
    Offsets,
    Own,
    Partition,
    Rebuild,
    Record,
    Reject,
    Retry,
    Rewind,
)
from bourse_schemas.errors import BourseError, Undecodable, Unreachable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.telemetry import get_logger
from bourse_schemas.topics import DEAD_LETTERS

__all__ = ["Poll", "Runner", "Stream", "StreamBroken", "patiently"]

S = TypeVar("S")

IDLE_SECONDS = 0.5
HINT_SECONDS = 1.0
REPORT_SECONDS = 60.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0


class StreamBroken(BourseError):
    """A transaction failed: everything since the last commit is void, go on from what is committed."""


@dataclass(frozen=True, slots=True)
class Poll:
    """What a stream has to say: a new assignment, or records and the positions after them."""

    records: Sequence[Record] = ()
    positions: Offsets = field(default_factory=dict)
    assigned: Assignment | None = None


class Stream(Protocol):
    """Where records come from and emits go to; used from one thread."""

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return what came within `timeout` seconds; an assignment comes alone, before any record of it."""

    def seek(self, offsets: Offsets) -> None:
        """Go on from these offsets, whatever was fetched before."""

    def wait(self, seconds: float) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed."""

    def commit(self, emits: Iterable[Emit], offsets: Offsets) -> None:
        """Publish emits and commit offsets in one transaction. Raises StreamBroken, after which `reset` is due."""

    def hint(self, offsets: Offsets) -> None:
        """Commit offsets for dashboards only."""

    def reset(self) -> None:
        """Throw the transactional producer away; the assignment comes again from `poll`."""

    def lag(self) -> int:
        """Return how many offsets lie between the positions and the ends."""

    def close(self) -> None:
        """Leave the group."""


class Runner:
    """Runs one consumer over one stream until it is told to stop."""

    def __init__(
        self,
        consumer: Consumer,
        stream: Stream,
        decode: Callable[[Record], Any],
        *,
        name: str,
        batch_size: int = 1000,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._consumer = consumer
        self._stream = stream
        self._decode = decode
        self._name = name
        self._batch_size = batch_size
        self._now = now
        self._stop = threading.Event()
        self._log = get_logger(consumer=name)
        self._own = False
        self._committed: dict[Partition, int] = {}
        self._hinted: dict[Partition, int] = {}
        self._hint_due = self._idle_due = 0.0
        self._report_due = time.monotonic() + REPORT_SECONDS
        self._rows = self._emitted = 0

    def stop(self) -> None:
        """Ask it to end after the batch in hand."""
        self._stop.set()

    def stop_on_signals(self) -> None:
        """Stop on SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def run(self) -> None:
        """Run until stopped. An error of the consumer ends it; what is uncommitted is delivered again."""
        try:
            while not self._stop.is_set():
                try:
                    self.step()
                except StreamBroken as error:
                    self._log.warning("starting over from what is committed", error=str(error))
                    self._stream.reset()
            self._consumer.close()
            if self._own:
                self._hint(force=True)
        finally:
            self._stream.close()
        self._log.info("stopped", rows=self._rows, emitted=self._emitted)

    def step(self, timeout: float = 0.2) -> bool:
        """Do one round: an assignment or a batch, then what is due by time; return whether anything came."""
        poll = self._stream.poll(timeout, self._batch_size)
        if poll.assigned is not None:
            self._begin(poll.assigned)
        elif poll.positions:
            for batch in self._batches(poll):
                self._take(batch)
        self._by_time()
        return poll.assigned is not None or bool(poll.records)

    # --- assignment ---------------------------------------------------------------------------------------------------

    def _begin(self, assigned: Assignment) -> None:
        start = self._consumer.open(assigned)
        self._own = isinstance(start, Own)
        self._committed = dict(assigned)
        self._hinted = {}
        if isinstance(start, Own | Rebuild):
            self._stream.seek({partition: start.offsets.get(partition, at) for partition, at in assigned.items()})
        self._log.info("assigned", partitions=len(assigned), start=type(start).__name__)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, poll: Poll) -> Iterable[Batch]:
        """Yield the records as batches: for a rebuild what lies below the committed offsets is a batch of its own."""
        old = [] if self._own else [r for r in poll.records if r.offset < self._committed.get(r.partition, 0)]
        if old:
            last = {record.partition: record.offset + 1 for record in old}
            yield Batch(old, last, replay=True, decode=self._decoded)
        new = poll.records if not old else [r for r in poll.records if r.offset >= self._committed.get(r.partition, 0)]
        ahead = {p: at for p, at in poll.positions.items() if self._own or at > self._committed.get(p, 0)}
        if new or (ahead and not self._own):
            yield Batch(new, ahead, decode=self._decoded)

    def _decoded(self, record: Record) -> Any:
        try:
            return self._decode(record)
        except Undecodable as error:
            raise _Unreadable(record, str(error)) from error
        except Unreachable as error:
            raise Retry(str(error)) from error

    def _take(self, batch: Batch) -> None:
        """Bring a batch through: again after Retry, without the record after Reject, elsewhere after Rewind."""
        letters: list[DeadLetter] = []
        pause = FIRST_WAIT_SECONDS
        while True:
            try:
                emits = (self._consumer.process(batch) if batch.records else None) or ()
                break
            except Retry as error:
                seconds = error.after if error.after is not None else pause * random.uniform(0.5, 1.0)  # noqa: S311
                self._log.warning("trying again", error=str(error), wait_seconds=round(seconds, 1))
                pause = min(pause * 2, LONGEST_WAIT_SECONDS)
                if self._stop.is_set() or not self._stream.wait(seconds):
                    return
            except Reject as error:
                letters.append(self._letter(error))
                rest = [record for record in batch.records if record is not error.record]
                if len(rest) == len(batch.records):
                    raise RuntimeError("Reject names a record that is not in the batch") from error
                batch = Batch(rest, batch.next, batch.replay, self._decoded)
            except Rewind as error:
                self._log.warning("rewinding", reason=str(error))
                self._stream.seek(error.offsets)
                return
        if batch.replay:
            return
        self._rows += len(batch.records)
        self._publish([*emits, *(Emit(DEAD_LETTERS, letter) for letter in letters)], batch.next)

    def _publish(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        if emits or not self._own:
            self._stream.commit(emits, {} if self._own else offsets)
        self._emitted += len(emits)
        if not self._own:
            self._committed.update(offsets)

    def _letter(self, rejected: Reject) -> DeadLetter:
        record = rejected.record
        topic, number = record.partition
        unreadable = isinstance(rejected, _Unreadable)
        self._log.warning("dead letter", topic=topic, partition=number, offset=record.offset, reason=str(rejected))
        return DeadLetter(
            reason=Reason.UNDECODABLE if unreadable else Reason.REJECTED,
            message=str(rejected),
            stage=Stage.CONSUME,
            origin=f"{topic}-{number}-{record.offset}",
            consumer=self._name,
            payload=record.value or b"",
            original_topic=topic,
            original_key=record.key,
            original_partition=number,
            original_offset=record.offset,
            original_headers=dict(record.headers),
            failed_at=self._now().replace(microsecond=0),
        )

    # --- time ---------------------------------------------------------------------------------------------------------

    def _by_time(self) -> None:
        now = time.monotonic()
        if now >= self._idle_due:
            self._idle_due = now + IDLE_SECONDS
            try:
                emits = self._consumer.idle(self._now())
            except Retry as error:
                self._log.warning("trying again", error=str(error))
            except Rewind as error:
                self._log.warning("rewinding", reason=str(error))
                self._stream.seek(error.offsets)
            else:
                if emits:
                    self._publish(emits, {})
        if self._own and now >= self._hint_due:
            self._hint_due = now + HINT_SECONDS
            self._hint()
        if now >= self._report_due:
            self._report_due = now + REPORT_SECONDS
            self._log.info("running", rows=self._rows, emitted=self._emitted, lag=self._stream.lag())

    def _hint(self, *, force: bool = False) -> None:
        durable = dict(self._consumer.durable())
        if durable and (force or durable != self._hinted):
            self._stream.hint(durable)
            self._hinted = durable


class _Unreadable(Reject):
    """A record whose bytes are not what its topic promises."""


def patiently(connect: Callable[[], S], name: str) -> S | None:
    """Return what `connect` gives as soon as broker and registry answer; None when a signal came first."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    pause = 1.0
    while not stop.is_set():
        try:
            return connect()
        except (Unreachable, StreamBroken) as error:
            get_logger(consumer=name).warning("waiting", error=str(error), wait_seconds=round(pause, 1))
            stop.wait(pause)
            pause = min(pause * 2, 15.0)
    return None
