"""The runtime of a consumer: batches, back-off, dead letters, transactions, rebalances, shutdown, lag.

`Runner` holds the policy and knows no broker: it works on a `Stream`, which kafka_stream.py implements on Kafka and
testing.py in memory.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, TypeVar

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Own, Rebuild, Reject, Reopen, Retry
from bourse_consumers.records import Offsets, Partition, Places, Record
from bourse_schemas.errors import BourseError, Undecodable, Unreachable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.topics import DEAD_LETTERS

__all__ = ["Poll", "Runner", "Stream", "StreamBroken", "connect", "dead_letter"]

S = TypeVar("S")

IDLE_SECONDS, SETTLE_SECONDS, LAG_SECONDS = 0.5, 1.0, 10.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, LONGEST_OUTAGE_WAIT_SECONDS = 0.5, 60.0, 15.0
# How long the service counts as alive: for one turn of the loop, whose calls to the broker have deadlines, and for one
# call of the consumer (see api.py).
TURN_SECONDS, CALL_SECONDS = 60.0, 1_860.0
# The share of rejected records is that of the last JUDGED_RECORDS, once FEW_RECORDS were rejected.
JUDGED_RECORDS, FEW_RECORDS = 200, 20
# A dead letter must fit where its record did (1 MB): one budget for all its parts, of which headers get a share.
PAYLOAD_BYTES, HEADER_BYTES, TEXT_BYTES = 750_000, 100_000, 10_000


class StreamBroken(Unreachable):
    """The broker failed: everything since the last commit is void, continue from what is committed."""


@dataclass(frozen=True, slots=True)
class Poll:
    """What a stream returns: a new assignment, or records and the positions after them.

    A position may be beyond the last record, and may move without one: transaction markers take offsets, too.
    """

    records: Sequence[Record] = ()
    positions: Offsets = field(default_factory=dict)
    assigned: Assignment | None = None


class Stream(Protocol):
    """Where records come from and emits go to; used from one thread. Any call may raise Unreachable."""

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return what came within `timeout` seconds; an assignment comes alone, before any record of it."""

    def seek(self, offsets: Offsets) -> None:
        """Continue at these offsets and drop what was fetched; partitions not named stay where they are."""

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed or `stopped()`."""

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish emits and commit offsets, all or nothing; refused if the assignment has changed."""

    def reset(self) -> None:
        """Settle a transaction that was left open; `poll` returns the assignment again, with what is committed."""

    def lag(self) -> int:
        """Return how many offsets are between the positions and the ends; asks the brokers."""

    def close(self) -> None:
        """Leave the group."""


def _waits(longest: float = LONGEST_WAIT_SECONDS) -> Iterator[float]:
    """Yield seconds to wait that double, with jitter."""
    pause = FIRST_WAIT_SECONDS
    while True:
        yield pause * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        pause = min(pause * 2, longest)


class _GivenUp(Exception):
    """The batch in hand is given up, because of a stop, a rebalance or Reopen: what was polled with it is void, too."""


class _Unreadable(Reject):
    """A record whose bytes are not what its topic promises."""


class Runner:
    """Runs one consumer on one stream until it is stopped."""

    def __init__(
        self,
        consumer: Consumer,
        stream: Stream,
        decode: Callable[[Record], Any],
        *,
        columns: Callable[[Places], Any] = lambda _: None,
        unknown: Callable[[Places], Any] = lambda _: None,
        name: str,
        batch_size: int | None = None,
        max_rejected_share: float = 0.5,
        stop: threading.Event | None = None,
        monitor: Monitor | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._consumer, self._stream = consumer, stream
        self._decode, self._columns, self._unknown = decode, columns, unknown
        self._name, self._now = name, now
        self._batch_size = batch_size or consumer.batch_size
        self._monitor = consumer.monitor = monitor or Monitor(name)
        self._metrics = metrics = self._monitor.consumer
        for counter in (metrics.rows, metrics.emitted, metrics.dead_letters, metrics.retries):
            counter.labels(name)  # it is 0 from the start
        self._stop = stop or threading.Event()
        self._log = get_logger(consumer=name)
        self._publishes = {*consumer.emits, DEAD_LETTERS}
        self._max_rejected_share = max_rejected_share
        # For each of the last records why it was rejected, None if it was not.
        self._judged: deque[str | None] = deque(maxlen=JUDGED_RECORDS)
        # An assignment was opened and has not changed since; its consumer stores offsets of its own.
        self._opened = self._own = False
        self._events: dict[tuple[Partition, int], Any] = {}
        self._committed: dict[Partition, int] = {}
        self._replaying: set[Partition] = set()
        # How far all records were processed.
        self._reached: dict[Partition, int] = {}
        self._idle_due = self._settle_due = self._lag_due = 0.0
        self._outage_waits = _waits(LONGEST_OUTAGE_WAIT_SECONDS)
        self._rows = self._emitted = 0

    @property
    def owns_offsets(self) -> bool:
        """Return whether the consumer stores its own offsets (`Own`)."""
        return self._own

    def stop(self) -> None:
        """End after the batch in hand; may be called from any thread."""
        self._stop.set()

    def run(self) -> None:
        """Run until stopped. An error of the consumer ends it; what is not committed is delivered again."""
        # Reference counts free what a batch makes; the collector would visit it again and again.
        gc.set_threshold(20_000, 20)
        try:
            while not self._stop.is_set():
                try:
                    self.step()
                except Unreachable as error:
                    self._start_over(error)
            self._finish()
        finally:
            self._stream.close()
        self._log.info("stopped", rows=self._rows, emitted=self._emitted)

    def step(self, timeout: float = 0.2) -> bool:
        """Do one turn: an assignment or batches, then what is due by time; return whether anything came."""
        self._monitor.beat(TURN_SECONDS)
        poll = self._stream.poll(timeout, self._batch_size)
        try:
            if poll.assigned is not None:
                self._begin(poll.assigned)
            for batch in self._batches(poll):
                self._take(batch)
            self._by_time()
        except _GivenUp:  # nothing more may be done in the assignment's name
            return True
        except Reopen as error:
            self._log.info("reopening", reason=str(error))
            self._opened = False
            self._stream.reset()
            return True
        return poll.assigned is not None or bool(poll.records)

    def _start_over(self, error: Unreachable) -> None:
        self._opened = False
        pause = next(self._outage_waits)
        self._log.warning("starting over from what is committed", error=str(error), wait_seconds=round(pause, 1))
        self._monitor.unready("starting over", f"Kafka: {error}")
        self._monitor.beat(pause + TURN_SECONDS)
        self._stream.wait(pause, self._stop.is_set)
        self._stream.reset()

    def _finish(self) -> None:
        self._monitor.unready("stopping", "stopping")
        try:
            self._consumer.close()
        except (Retry, Reopen) as error:
            self._log.warning("not everything is stored: the rest is delivered again", error=str(error))
        try:
            if self._opened:
                self._settle()
        except Unreachable as error:
            self._log.warning("the last offsets are not committed: some work is repeated", error=str(error))

    # --- assignment ---------------------------------------------------------------------------------------------------

    def _begin(self, assigned: Assignment) -> None:
        self._opened = False
        start = self._call(lambda: self._consumer.open(assigned))
        begin = dict(assigned)
        if isinstance(start, Rebuild | Own):
            begin.update((partition, start.offsets[partition]) for partition in assigned if partition in start.offsets)
        if isinstance(start, Rebuild):
            # Nobody has seen the records of a fresh partition: they are new from where the rebuild begins.
            assigned.update((partition, begin[partition]) for partition in assigned.fresh)
            begin = {partition: min(at, assigned[partition]) for partition, at in begin.items()}
        if begin != assigned or (isinstance(start, Rebuild) and assigned.fresh):
            self._stream.seek(begin)
        self._own = isinstance(start, Own)
        self._committed = dict(assigned)
        self._replaying = set() if self._own else {p for p, at in begin.items() if at < assigned[p]}
        self._reached = {}
        self._opened, self._lag_due = True, 0.0
        for subject in ("starting", "starting over"):
            self._monitor.unready(subject, None)
        self._monitor.unready("rebuilding", "rebuilding the day" if self._replaying else None)
        self._log.info("assigned", partitions=len(assigned), start=type(start).__name__)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, poll: Poll) -> Iterator[Batch]:
        """Yield what came as batches of one topic each, those below the committed offsets of a rebuild first."""
        self._events.clear()
        topics = {partition.topic for partition in Places.of(poll.records).partitions}
        old, new = dict[str, Sequence[Record]](), dict[str, Sequence[Record]]()
        if len(topics) == 1 and not self._replaying:  # the records need not be made
            new[topics.pop()] = poll.records
        else:
            for record in poll.records:
                side = new if self._is_new(record.partition, record.offset) else old
                side.setdefault(record.partition.topic, []).append(record)  # type: ignore[attr-defined]  # a list
        for records in old.values():
            yield self._batch(records, Places.of(records).ends(), replay=True)
        ahead = {partition: at for partition, at in poll.positions.items() if self._is_new(partition, at)}
        self._replaying.difference_update(ahead)
        self._monitor.unready("rebuilding", "rebuilding the day" if self._replaying else None)
        for records in new.values():
            yield self._batch(
                records, {partition: ahead[partition] for partition in set(Places.of(records).partitions)}
            )
        self._reached.update(ahead)  # all batches were processed

    def _batch(self, records: Sequence[Record], ends: Offsets, *, replay: bool = False) -> Batch:
        columns, unknown = partial(self._ask, self._columns), partial(self._ask, self._unknown)
        return Batch(records, ends, replay, self._decoded, columns, unknown)

    def _is_new(self, partition: Partition, offset: int) -> bool:
        return partition not in self._replaying or offset >= self._committed[partition]

    def _decoded(self, record: Record) -> Any:
        """Return the record's event, from memory if the batch is delivered again."""
        place = record.partition, record.offset
        if place not in self._events:
            try:
                self._events[place] = self._decode(record)
            except Undecodable as error:
                raise _Unreadable(record, str(error)) from error
            except Unreachable as error:
                raise Retry(str(error)) from error
        return self._events[place]

    @staticmethod
    def _ask(read: Callable[[Places], Any], places: Places) -> Any:
        try:
            return read(places)
        except Unreachable as error:
            raise Retry(str(error)) from error

    def _take(self, batch: Batch) -> None:
        """Process a batch: again after Retry, without the record after Reject."""
        letters: list[Emit] = []
        records, rejected, began = batch.records, dict[str, str](), time.monotonic()
        while True:
            try:
                emits = (self._call(partial(self._consumer.process, batch)) if batch.records else None) or ()
                break
            except Reject as error:
                found = [error, *self._unreadable_after(batch.records, error)]
                batch = self._batch(_without(batch.records, found), batch.next, replay=batch.replay)
                if batch.replay:
                    continue
                fresh = [self._letter(each) for each in found]
                rejected.update((letter.origin, letter.message) for letter in fresh)
                _judge(self._judged, records, rejected, self._max_rejected_share)
                self._log.warning("dead letters", count=len(fresh), first=fresh[0].origin, reason=str(error))
                letters += [Emit(DEAD_LETTERS, letter) for letter in fresh]
                if self._own:
                    # Publish them now: the sink may store its offsets before the next commit.
                    self._publish(letters, {})
                    letters = []
        if batch.replay:
            return
        self._publish([*emits, *letters], batch.next)
        self._judged = _judge(self._judged, records, rejected, self._max_rejected_share)
        self._rows += len(batch.records)
        self._metrics.rows.labels(self._name).inc(len(batch.records))
        self._metrics.dead_letters.labels(self._name).inc(len(rejected))
        self._metrics.batch_seconds.labels(self._name).observe(time.monotonic() - began)

    def _call(self, method: Callable[[], S]) -> S:
        """Return what a method of the consumer returns, however often it asks to wait.

        Raises _GivenUp after a stop or a rebalance meanwhile.
        """
        waits = _waits()
        while True:
            self._monitor.beat(CALL_SECONDS)
            try:
                result = method()
            except Retry as error:
                seconds = next(waits) if error.after is None else error.after
                self._log.warning("retrying", error=str(error), wait_seconds=round(seconds, 1))
                self._metrics.retries.labels(self._name).inc()
                self._monitor.unready("retrying", str(error))
                self._measure_lag()
                self._monitor.beat(seconds + TURN_SECONDS)
                if self._stop.is_set() or not self._stream.wait(seconds, self._stop.is_set):
                    self._opened = self._opened and self._stop.is_set()
                    raise _GivenUp from error
            else:
                self._monitor.unready("retrying", None)
                self._monitor.beat(TURN_SECONDS)
                return result

    def _publish(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish, and commit if the offsets are the group's: emits without a batch come with what is committed.

        So a member that lost its partitions publishes nothing.
        """
        self._monitor.beat(TURN_SECONDS)
        if undeclared := {emit.topic.name for emit in emits if emit.topic not in self._publishes}:
            raise RuntimeError(f"{type(self._consumer).__name__} publishes on {undeclared}: add it to its `emits`")
        if emits or (offsets and not self._own):
            self._stream.commit(emits, {} if self._own else offsets or self._committed)
            self._committed.update({} if self._own else offsets)
        self._emitted += len(emits)
        self._metrics.emitted.labels(self._name).inc(len(emits))
        self._outage_waits = _waits(LONGEST_OUTAGE_WAIT_SECONDS)

    # --- dead letters -------------------------------------------------------------------------------------------------

    def _unreadable_after(self, records: Sequence[Record], rejected: Reject) -> Iterator[Reject]:
        """Yield the records after one that could not be decoded that cannot be decoded either: it is rarely alone."""
        if not isinstance(rejected, _Unreadable):
            return
        for record in records[[id(each) for each in records].index(id(rejected.record)) + 1 :]:
            try:
                self._decoded(record)
            except _Unreadable as error:
                yield error
            except Retry:
                return

    def _letter(self, rejected: Reject) -> DeadLetter:
        reason = Reason.UNDECODABLE if isinstance(rejected, _Unreadable) else Reason.REJECTED
        return dead_letter(rejected.record, reason, str(rejected), self._name, self._now())

    # --- time ---------------------------------------------------------------------------------------------------------

    def _by_time(self) -> None:
        now = time.monotonic()
        # State that is being rebuilt is not complete enough to act on.
        if self._opened and not self._replaying and now >= self._idle_due:
            self._idle_due = now + IDLE_SECONDS
            self._idle()
        if self._opened and now >= self._settle_due:
            self._settle_due = now + SETTLE_SECONDS
            self._settle()
        if self._opened and now >= self._lag_due:
            self._lag_due = now + LAG_SECONDS
            self._measure_lag()

    def _idle(self) -> None:
        trouble = self._consumer.trouble()
        self._monitor.unready("trouble", trouble)
        self._metrics.trouble.labels(self._name).set(trouble is not None)
        if emits := self._call(lambda: self._consumer.idle(self._now())):
            self._publish(emits, {})

    def _settle(self) -> None:
        """Commit positions without records; for a sink with its own offsets, how far it is, for dashboards."""
        self._monitor.beat(TURN_SECONDS)
        ends = self._consumer.durable() if self._own else self._reached
        if moved := {each: at for each, at in ends.items() if at != self._committed.get(each, at)}:
            self._stream.commit((), moved)
            self._committed.update(moved)

    def _measure_lag(self) -> None:
        with suppress(Unreachable):  # the last figure remains
            self._metrics.lag.labels(self._name).set(self._stream.lag())


def _without(records: Sequence[Record], rejected: Sequence[Reject]) -> list[Record]:
    gone = {id(each.record) for each in rejected}
    rest = [record for record in records if id(record) not in gone]
    if len(rest) + len(gone) != len(records):
        raise RuntimeError("Reject names a record that is not in the batch") from rejected[0]
    return rest


def _judge(
    judged: deque[str | None], records: Sequence[Record], rejected: Mapping[str, str], max_share: float
) -> deque[str | None]:
    """Return the last records' judgements with those of these; `rejected` are reasons by origin.

    Raises BourseError if too many were rejected: a changed schema must not empty a topic into dead letters.
    """
    last = judged.copy()
    if not rejected:
        last.extend([None] * min(len(records), JUDGED_RECORDS))
        return last
    for left, record in zip(range(len(records) - 1, -1, -1), records, strict=True):
        last.append(rejected.get(record.origin))
        bad = len(last) - last.count(None)
        if (len(last) == JUDGED_RECORDS or not left) and bad >= FEW_RECORDS and bad > max_share * len(last):
            first = next(why for why in last if why is not None)
            raise BourseError(
                f"{bad / len(last):.0%} of the last {len(last)} records were rejected, the first because: {first}. "
                "The consumer stops; what it has not published is not committed and is delivered again. Has the "
                "schema changed? See `bourse dead-letters list` for those before, upgrade and start it again; "
                "--max-rejected-share 1 sends all of them to the dead letters"
            )
    return last


def dead_letter(record: Record, reason: Reason, message: str, consumer: str, now: datetime) -> DeadLetter:
    """Return a record as a dead letter that fits where the record did; its message names what was left out."""
    message, headers, left = message[:TEXT_BYTES], dict[str, bytes](), HEADER_BYTES
    for name, value in record.headers.items():
        if (left := left - len(name.encode()) - len(value)) >= 0:
            headers[name] = value
    if missing := len(record.headers) - len(headers):
        message += f" ({missing} of {len(record.headers)} headers left out)"
    payload = record.value or b""
    if len(payload) > PAYLOAD_BYTES:
        message += f" (the first {PAYLOAD_BYTES} of {len(payload)} bytes)"
    return DeadLetter(
        reason=reason,
        message=message,
        stage=Stage.CONSUME,
        origin=record.origin,
        consumer=consumer,
        payload=payload[:PAYLOAD_BYTES],
        original_topic=record.partition.topic,
        original_key=record.key if record.key is None else record.key[:TEXT_BYTES],
        original_partition=record.partition.number,
        original_offset=record.offset,
        original_headers=headers,
        failed_at=now.replace(microsecond=0),
    )


def connect(make: Callable[[], S], name: str, stop: threading.Event, monitor: Monitor) -> S | None:
    """Return what `make` returns as soon as broker and registry answer; None if `stop` came first."""
    waits = _waits(LONGEST_OUTAGE_WAIT_SECONDS)
    while not stop.is_set():
        try:
            return make()
        except Unreachable as error:
            pause = next(waits)
            get_logger(consumer=name).warning("waiting", error=str(error), wait_seconds=round(pause, 1))
            monitor.unready("starting", str(error))
            monitor.beat(pause + TURN_SECONDS)
            stop.wait(pause)
    return None
