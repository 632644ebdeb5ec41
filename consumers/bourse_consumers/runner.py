"""The runtime of a consumer: batches, back-off, dead letters, transactions, rebalances, shutdown, lag.

`Runner` is policy and knows no broker; it works over a `Stream`, which `kafka_stream.py` (Kafka) and `testing.py`
(memory) implement.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from bourse_cli.health import BATCH_SECONDS, DEAD_LETTERS_TOTAL, EMITTED, LAG, RETRIES, ROWS, TROUBLE, Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import (
    Assignment,
    Batch,
    Consumer,
    Emit,
    Hold,
    Offsets,
    Own,
    Partition,
    Places,
    Rebuild,
    Record,
    Reject,
    Reopen,
    Retry,
    Rewind,
)
from bourse_schemas.errors import BourseError, Undecodable, Unreachable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.topics import DEAD_LETTERS

__all__ = ["Poll", "Runner", "Stream", "StreamBroken", "patiently"]

S = TypeVar("S")

IDLE_SECONDS = 0.5
SETTLE_SECONDS = 1.0
REPORT_SECONDS = 60.0
# Of the topic's retention, in what is unread.
RETENTION_WARNED, RETENTION_UNREADY = 0.5, 0.9
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
LONGEST_CONNECT_SECONDS = 15.0
# What a turn of the loop may take before it counts as dead, and what a call of the consumer (see api.py) or a commit,
# which ends only when the broker is back.
TURN_SECONDS, CALL_SECONDS = 120.0, 1_860.0
# The share of rejected records is judged over so many records, once so many were rejected.
JUDGED_RECORDS, FEW_RECORDS = 200, 20
NO_NOTES: Mapping[Partition, str] = MappingProxyType({})
# A record may be as large as brokers allow (1 MiB); its letter, which says more, has to pass as well.
LETTER_BYTES = 900_000


class StreamBroken(BourseError):
    """The broker failed us: everything since the last commit is void, go on from what is committed."""


@dataclass(frozen=True, slots=True)
class Poll:
    """What a stream has to say: a new assignment, or records and the positions after them.

    A position may lie beyond the last record, and may move without one: transaction markers take offsets too.
    """

    records: Sequence[Record] = ()
    positions: Offsets = field(default_factory=dict)
    assigned: Assignment | None = None


class Stream(Protocol):
    """Where records come from and emits go to; used from one thread. Any call may raise StreamBroken."""

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return what came within `timeout` seconds; an assignment comes alone, before any record of it."""

    def seek(self, offsets: Offsets) -> None:
        """Go on from these offsets, whatever was fetched before; partitions not named go on after what was polled."""

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed or `stopped()`."""

    def commit(self, emits: Sequence[Emit], offsets: Offsets, notes: Mapping[Partition, str] = NO_NOTES) -> None:
        """Publish emits and commit offsets with their notes, all or nothing.

        Refused where the partitions are no longer ours.
        """

    def hint(self, offsets: Offsets) -> None:
        """Commit offsets for dashboards, without waiting."""

    def reset(self) -> None:
        """Settle whatever transaction was left; the assignment comes again from `poll`, with what is committed."""

    def lag(self) -> int:
        """Return how many offsets lie between the positions and the ends."""

    def aging(self) -> float:
        """Return how much of a topic's retention has passed for what is unread: at 1 it is being deleted."""

    def close(self) -> None:
        """Leave the group."""


class _Backoff:
    """Waits that grow, with jitter, until it is reset."""

    def __init__(self, first: float = FIRST_WAIT_SECONDS, longest: float = LONGEST_WAIT_SECONDS) -> None:
        self._first = self._pause = first
        self._longest = longest

    def seconds(self) -> float:
        pause, self._pause = self._pause, min(self._pause * 2, self._longest)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311  # no secret

    def reset(self) -> None:
        self._pause = self._first


class Runner:
    """Runs one consumer over one stream until it is told to stop."""

    def __init__(
        self,
        consumer: Consumer,
        stream: Stream,
        decode: Callable[[Record], Any],
        *,
        columns: Callable[[Places], Any] = lambda _: None,
        name: str,
        batch_size: int | None = None,
        max_rejected_share: float = 0.5,
        stop: threading.Event | None = None,
        monitor: Monitor | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._consumer = consumer
        self._stream = stream
        self._decode, self._columns = decode, columns
        self._name = name
        self._batch_size = batch_size or consumer.batch_size
        self._max_rejected_share = max_rejected_share
        self._monitor = consumer.monitor = monitor or Monitor(name)
        self._now = now
        self._stop = stop or threading.Event()
        self._log = get_logger(consumer=name)
        self._publishes = {*consumer.emits, DEAD_LETTERS}
        # Whether the consumer keeps its own offsets, and whether it says when a batch is done.
        self._opened = self._own = self._hold = False
        self._events: dict[tuple[Partition, int], Any] = {}
        self._committed: dict[Partition, int] = {}
        self._replaying: set[Partition] = set()
        # Positions beyond the last record. For `Own` and `Hold` also the ends of the records taken over, and what was
        # hinted or noted last.
        self._reached: dict[Partition, int] = {}
        self._taken: dict[Partition, int] = {}
        self._hinted: dict[Partition, int] = {}
        self._noted: Mapping[Partition, str] = NO_NOTES
        self._settle_due = self._idle_due = 0.0
        self._report_due = time.monotonic() + REPORT_SECONDS
        self._idle_backoff, self._broken_backoff = _Backoff(), _Backoff()
        self._rows = self._emitted = 0
        # Per record why it was rejected, None where it was not.
        self._judged: deque[str | None] = deque(maxlen=JUDGED_RECORDS)
        for metric in (ROWS, EMITTED, DEAD_LETTERS_TOTAL, RETRIES):
            self._monitor.count(metric, 0, consumer=name)

    def stop(self) -> None:
        """Ask it to end after the batch in hand; may be called from any thread."""
        self._stop.set()

    def run(self) -> None:
        """Run until stopped. An error of the consumer ends it; what is uncommitted is delivered again."""
        # What a batch makes is freed by reference counts; the collector would look through it again and again.
        gc.set_threshold(20_000, 20)
        try:
            while not self._stop.is_set():
                try:
                    self.step()
                except StreamBroken as error:
                    self._start_over(error)
            self._finish()
        finally:
            self._stream.close()
        self._log.info("stopped", rows=self._rows, emitted=self._emitted)

    def step(self, timeout: float = 0.2) -> bool:
        """Do one round: an assignment or a batch, then what is due by time; return whether anything came."""
        self._monitor.beat(TURN_SECONDS)
        poll = self._stream.poll(timeout, self._batch_size)
        if poll.assigned is not None:
            self._begin(poll.assigned)
        elif poll.positions:
            for batch in self._batches(poll):
                if not self._take(batch):
                    break
        self._by_time()
        return poll.assigned is not None or bool(poll.records)

    def _start_over(self, error: StreamBroken) -> None:
        while not self._stop.is_set():
            pause = self._broken_backoff.seconds()
            self._log.warning("starting over from what is committed", error=str(error), wait_seconds=round(pause, 1))
            self._monitor.unready("starting over", f"Kafka: {error}")
            self._monitor.beat(pause + CALL_SECONDS)
            try:
                self._stream.wait(pause, self._stop.is_set)
                self._stream.reset()
            except StreamBroken as again:
                error = again
            else:
                return

    def _finish(self) -> None:
        self._monitor.unready("stopping", "stopping")
        self._monitor.beat(CALL_SECONDS)
        try:
            self._consumer.close()
        except (Retry, Rewind) as error:
            self._log.warning("not everything is durable: the rest comes again", error=str(error))
        try:
            self._settle()
        except StreamBroken as error:
            self._log.warning("the last offsets are not committed: some work comes again", error=str(error))

    # --- assignment ---------------------------------------------------------------------------------------------------

    def _begin(self, assigned: Assignment) -> None:
        self._opened = False
        backoff = _Backoff()
        while True:
            self._monitor.beat(CALL_SECONDS)
            try:
                start = self._consumer.open(assigned)
                break
            except Retry as error:
                if not self._wait(error, backoff):
                    return
        begin = dict(assigned)
        if isinstance(start, Rebuild | Own):
            begin.update((partition, start.offsets[partition]) for partition in assigned if partition in start.offsets)
        if isinstance(start, Rebuild):
            # What nobody has seen yet is new, from there on.
            assigned.update((partition, begin[partition]) for partition in assigned.fresh)
            begin = {partition: min(at, assigned[partition]) for partition, at in begin.items()}
        if begin != assigned or (isinstance(start, Rebuild) and assigned.fresh):
            self._stream.seek(begin)
        self._own, self._hold = isinstance(start, Own), isinstance(start, Hold)
        self._committed = dict(assigned)
        self._replaying = set() if self._own else {p for p, at in begin.items() if at < assigned[p]}
        self._taken, self._reached, self._hinted = begin, {}, {}
        self._noted = assigned.notes
        self._opened = True
        for subject in ("starting", "starting over", "trying again"):
            self._monitor.unready(subject, None)
        self._monitor.unready("rebuilding the day", "rebuilding the day" if self._replaying else None)
        self._log.info("assigned", partitions=len(assigned), start=type(start).__name__)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, poll: Poll) -> Iterator[Batch]:
        """Yield what came as batches: what lies below the committed offsets of a rebuild is one of its own."""
        self._events.clear()
        old: list[Record] = []
        new = poll.records
        if self._replaying:
            old = [record for record in poll.records if not self._is_new(record.partition, record.offset)]
            new = [record for record in poll.records if self._is_new(record.partition, record.offset)]
        ahead = {partition: at for partition, at in poll.positions.items() if self._is_new(partition, at)}
        if old:
            ends = {record.partition: record.offset + 1 for record in old}
            yield Batch(old, ends, replay=True, decode=self._decoded, columns=self._table)
        if self._replaying:
            self._replaying.difference_update(ahead)
            if not self._replaying:
                self._monitor.unready("rebuilding the day", None)
        if new:
            yield Batch(new, ahead, decode=self._decoded, columns=self._table)
        else:
            self._reached.update(ahead)

    def _is_new(self, partition: Partition, offset: int) -> bool:
        return partition not in self._replaying or offset >= self._committed[partition]

    def _decoded(self, record: Record) -> Any:
        """Return the record's event, from memory where the batch comes again."""
        place = record.partition, record.offset
        if place not in self._events:
            try:
                self._events[place] = self._decode(record)
            except Undecodable as error:
                raise _Unreadable(record, str(error)) from error
            except Unreachable as error:
                raise Retry(str(error)) from error
        return self._events[place]

    def _table(self, places: Places) -> Any:
        try:
            return self._columns(places)
        except Unreachable as error:
            raise Retry(str(error)) from error

    def _take(self, batch: Batch) -> bool:
        """Bring a batch through: again after Retry, without the record after Reject.

        Returns False where it was given up: a stop, a rebalance, a Rewind. Then nothing that was polled with it counts.
        """
        letters: list[Emit] = []
        backoff = _Backoff()
        records, rejected, began = batch.records, dict[str, str](), time.monotonic()
        while True:
            self._monitor.beat(CALL_SECONDS)
            try:
                emits = (self._consumer.process(batch) if batch.records else None) or ()
                break
            except Retry as error:
                if not self._wait(error, backoff):
                    return False
            except Reject as error:
                rest, found = self._without(batch.records, error)
                batch = Batch(rest, batch.next, batch.replay, self._decoded, self._table)
                if batch.replay:
                    continue
                rejected.update((letter.origin, letter.message) for letter in found)
                self._judge(records, rejected)
                self._log.warning("dead letters", count=len(found), first=found[0].origin, reason=str(error))
                letters += [Emit(DEAD_LETTERS, letter) for letter in found]
                if self._own or self._hold:
                    # A sink that keeps its offsets may be past this batch before we could say what it lacks.
                    self._publish(letters, {})
                    letters = []
            except Reopen as error:
                self._log.info("beginning anew", reason=str(error))
                self._stream.reset()
                return False
            except Rewind as error:
                first = {record.partition: record.offset for record in reversed(batch.records)}
                self._rewind(error, first)
                return False
        self._monitor.unready("trying again", None)
        if batch.replay:
            return True
        self._rows += len(batch.records)
        if self._own or self._hold:
            self._taken.update(Places.of(batch.records).ends())
            self._reached.update(batch.next)
        self._publish([*emits, *letters], batch.next)
        self._judged = self._judge(records, rejected)
        self._monitor.count(ROWS, len(batch.records), consumer=self._name)
        self._monitor.count(DEAD_LETTERS_TOTAL, len(rejected), consumer=self._name)
        self._monitor.observe(BATCH_SECONDS, time.monotonic() - began, consumer=self._name)
        return True

    def _wait(self, error: Retry, backoff: _Backoff) -> bool:
        seconds = backoff.seconds() if error.after is None else error.after
        self._log.warning("trying again", error=str(error), wait_seconds=round(seconds, 1))
        self._monitor.count(RETRIES, consumer=self._name)
        self._monitor.unready("trying again", str(error))
        self._monitor.beat(seconds + TURN_SECONDS)
        return not self._stop.is_set() and self._stream.wait(seconds, self._stop.is_set)

    def _rewind(self, error: Rewind, first: Offsets) -> None:
        if not self._own:
            raise RuntimeError("Rewind is for consumers that keep their own offsets") from error
        self._log.warning("rewinding", reason=str(error))
        offsets = {**first, **error.offsets}
        self._stream.seek(offsets)
        self._taken.update(offsets)
        self._reached.clear()

    def _publish(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish, and commit where the offsets are the group's: emits without a batch come with what is committed.

        So a member that lost its partitions publishes nothing.
        """
        self._monitor.beat(CALL_SECONDS)
        if undeclared := {emit.topic.name for emit in emits if emit.topic not in self._publishes}:
            raise RuntimeError(f"{type(self._consumer).__name__} publishes on {undeclared}: add it to its `emits`")
        if self._own:
            if emits:
                self._stream.commit(emits, {})
        elif self._hold:
            self._commit_held(emits)
        elif emits or offsets:
            self._stream.commit(emits, offsets or self._committed)
            self._committed.update(offsets)
        self._emitted += len(emits)
        self._monitor.count(EMITTED, len(emits), consumer=self._name)
        self._broken_backoff.reset()

    # --- dead letters -------------------------------------------------------------------------------------------------

    def _without(self, records: Sequence[Record], rejected: Reject) -> tuple[list[Record], list[DeadLetter]]:
        """Return the records without the rejected one, and its letter.

        Where it could not be decoded the others are looked at as well: such a record is rarely alone.
        """
        if not isinstance(rejected, _Unreadable):
            rest = [record for record in records if record is not rejected.record]
            if len(rest) == len(records):
                raise RuntimeError("Reject names a record that is not in the batch") from rejected
            return rest, [self._letter(rejected)]
        rest, letters = [], []
        for index, record in enumerate(records):
            try:
                self._decoded(record)
            except _Unreadable as error:
                letters.append(self._letter(error))
            except Retry:
                return [*rest, *records[index:]], letters
            else:
                rest.append(record)
        return rest, letters

    def _judge(self, records: Sequence[Record], rejected: Mapping[str, str]) -> deque[str | None]:
        """Return what is judged when this batch is through; raise BourseError where too much of it was rejected.

        A changed schema must not empty a topic into the dead letters.
        """
        judged = self._judged.copy()
        if not rejected:
            judged.extend([None] * min(len(records), JUDGED_RECORDS))
            return judged
        for left, record in zip(range(len(records) - 1, -1, -1), records, strict=True):
            judged.append(rejected.get(_origin(record)))
            if len(judged) < JUDGED_RECORDS and left:
                continue
            bad = len(judged) - judged.count(None)
            if bad >= FEW_RECORDS and bad > self._max_rejected_share * len(judged):
                first = next(why for why in judged if why is not None)
                raise BourseError(
                    f"{bad / len(judged):.0%} of the last {len(judged)} records were rejected, the first because: "
                    f"{first}. The consumer stops; what it has not published stays uncommitted "
                    "and comes again. Has the schema changed? See `bourse dead-letters list` for those before, "
                    "upgrade and start it again; --max-rejected-share 1 puts them all aside"
                )
        return judged

    def _letter(self, rejected: Reject) -> DeadLetter:
        record = rejected.record
        payload, message = record.value or b"", str(rejected)
        if len(payload) > LETTER_BYTES:
            message += f" (the first {LETTER_BYTES} of {len(payload)} bytes)"
        return DeadLetter(
            reason=Reason.UNDECODABLE if isinstance(rejected, _Unreadable) else Reason.REJECTED,
            message=message,
            stage=Stage.CONSUME,
            origin=_origin(record),
            consumer=self._name,
            payload=payload[:LETTER_BYTES],
            original_topic=record.partition.topic,
            original_key=record.key,
            original_partition=record.partition.number,
            original_offset=record.offset,
            original_headers=dict(record.headers),
            failed_at=self._now().replace(microsecond=0),
        )

    # --- time ---------------------------------------------------------------------------------------------------------

    def _by_time(self) -> None:
        now = time.monotonic()
        # A state that is being rebuilt is not one to judge by.
        if self._opened and not self._replaying and now >= self._idle_due:
            # Whoever waited for a commit of what it holds goes on at once.
            self._idle_due = now + (0 if self._hold else IDLE_SECONDS)
            self._idle(now)
        if self._opened and now >= self._settle_due:
            self._settle_due = now + SETTLE_SECONDS
            self._settle()
            self._monitor.set(LAG, self._stream.lag(), consumer=self._name)
        if now >= self._report_due:
            self._report_due = now + REPORT_SECONDS
            self._log.info("running", rows=self._rows, emitted=self._emitted, lag=self._stream.lag())
            self._watch_retention()

    def _watch_retention(self) -> None:
        """Say when the topic's retention is about to overtake us."""
        used = self._stream.aging()
        said = f"{used:.0%} of the topic's retention have passed for what is still to be read: it will be deleted"
        if used >= RETENTION_WARNED:
            self._log.warning("falling behind", error=said)
        self._monitor.unready("falling behind", said if used >= RETENTION_UNREADY else None)

    def _idle(self, now: float) -> None:
        self._monitor.beat(CALL_SECONDS)
        trouble = self._consumer.trouble()
        self._monitor.unready("trouble", trouble)
        self._monitor.set(TROUBLE, trouble is not None, consumer=self._name)
        try:
            emits = self._consumer.idle(self._now())
        except Retry as error:
            seconds = self._idle_backoff.seconds() if error.after is None else error.after
            self._log.warning("trying again", error=str(error), wait_seconds=round(seconds, 1))
            self._monitor.count(RETRIES, consumer=self._name)
            self._monitor.unready("trying again when idle", str(error))
            self._idle_due = now + seconds
        except Reopen as error:
            self._log.info("beginning anew", reason=str(error))
            self._stream.reset()
        except Rewind as error:
            self._rewind(error, {})
        else:
            self._idle_backoff.reset()
            self._monitor.unready("trying again when idle", None)
            if emits or self._hold:
                self._publish(emits or (), {})

    def _settle(self) -> None:
        """Commit positions that no batch brought; for a sink of its own, tell the group how far it is."""
        if self._hold:
            self._commit_held(())
            return
        if not self._own:
            ahead = {partition: at for partition, at in self._reached.items() if at > self._committed[partition]}
            if ahead:
                self._publish((), ahead)
            return
        hint = self._durable()
        if hint != self._hinted:
            self._stream.hint(hint)
            self._hinted = hint

    def _durable(self) -> dict[Partition, int]:
        done = dict(self._consumer.durable())
        for partition, at in self._reached.items():
            # Nothing but transaction markers lies between the last record and the position.
            if done.get(partition, 0) >= self._taken[partition]:
                done[partition] = max(at, done.get(partition, 0))
        return done

    def _commit_held(self, emits: Sequence[Emit]) -> None:
        """Commit what is done by now, with what is remembered beside it and what is to be published."""
        done, notes = self._durable(), self._consumer.notes()
        if emits or notes != self._noted or any(at > self._committed[each] for each, at in done.items()):
            self._stream.commit(emits, {**self._committed, **done}, notes)
            self._committed.update(done)
            self._noted = dict(notes)


class _Unreadable(Reject):
    """A record whose bytes are not what its topic promises."""


def _origin(record: Record) -> str:
    topic, number = record.partition
    return f"{topic}-{number}-{record.offset}"


def _sleep(seconds: float, stop: threading.Event) -> None:
    """Sleep, in slices: a signal's handler may set the event while we hold its lock in `Event.wait`."""
    until = time.monotonic() + seconds
    while not stop.is_set() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def patiently(connect: Callable[[], S], name: str, stop: threading.Event, monitor: Monitor) -> S | None:
    """Return what `connect` gives as soon as broker and registry answer; None when `stop` came first."""
    backoff = _Backoff(1.0, LONGEST_CONNECT_SECONDS)
    while not stop.is_set():
        try:
            return connect()
        except (Unreachable, StreamBroken) as error:
            pause = backoff.seconds()
            get_logger(consumer=name).warning("waiting", error=str(error), wait_seconds=round(pause, 1))
            monitor.unready("starting", str(error))
            _sleep(pause, stop)
    return None
