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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Own, Rebuild, Reject, Reopen, Retry
from bourse_consumers.records import Offsets, Partition, Places, Record
from bourse_schemas.errors import BourseError, Undecodable, Unreachable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.topics import DEAD_LETTERS

__all__ = ["Poll", "Runner", "Stream", "StreamBroken", "connect"]

S = TypeVar("S")

IDLE_SECONDS = 0.5
SETTLE_SECONDS = 1.0
REPORT_SECONDS = 60.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
LONGEST_CONNECT_SECONDS = 15.0
# How long the service counts as alive: for one turn of the loop, whose calls to the broker have deadlines, and for one
# call of the consumer (see api.py).
TURN_SECONDS, CALL_SECONDS = 60.0, 1_860.0
# The share of rejected records is that of the last JUDGED_RECORDS, once FEW_RECORDS were rejected.
JUDGED_RECORDS, FEW_RECORDS = 200, 20
# A dead letter must fit where its record did (1 MB): one budget for all its parts, of which headers get a share.
LETTER_BYTES, HEADER_BYTES, TEXT_BYTES = 900_000, 100_000, 10_000


class StreamBroken(BourseError):
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
    """Where records come from and emits go to; used from one thread. Any call may raise StreamBroken."""

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return what came within `timeout` seconds; an assignment comes alone, before any record of it."""

    def seek(self, offsets: Offsets) -> None:
        """Continue at these offsets and drop what was fetched; partitions not named stay where they are."""

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed or `stopped()`."""

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish emits and commit offsets, all or nothing; refused if the assignment has changed."""

    def hint(self, offsets: Offsets) -> None:
        """Commit offsets for dashboards; a failure does not matter."""

    def reset(self) -> None:
        """Settle a transaction that was left open; `poll` returns the assignment again, with what is committed."""

    def lag(self) -> int:
        """Return how many records are between the positions and the ends."""

    def close(self) -> None:
        """Leave the group."""


class _Backoff:
    """Waits that double, with jitter, until it is reset."""

    def __init__(self, first: float = FIRST_WAIT_SECONDS, longest: float = LONGEST_WAIT_SECONDS) -> None:
        self._first = self._pause = first
        self._longest = longest

    def seconds(self) -> float:
        pause, self._pause = self._pause, min(self._pause * 2, self._longest)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311  # no secret

    def reset(self) -> None:
        self._pause = self._first


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
        self._consumer = consumer
        self._stream = stream
        self._decode, self._columns, self._unknown = decode, columns, unknown
        self._name = name
        self._batch_size = batch_size or consumer.batch_size
        self._monitor = consumer.monitor = monitor or Monitor(name)
        self._now = now
        self._stop = stop or threading.Event()
        self._log = get_logger(consumer=name)
        self._publishes = {*consumer.emits, DEAD_LETTERS}
        self._limit = _RejectLimit(max_rejected_share)
        # An assignment was opened and has not changed since; its consumer stores offsets of its own.
        self._opened = self._own = False
        self._events: dict[tuple[Partition, int], Any] = {}
        self._committed: dict[Partition, int] = {}
        self._replaying: set[Partition] = set()
        # Positions beyond the last record; for `Own` also the ends of the records taken over, and the last hint.
        self._reached: dict[Partition, int] = {}
        self._taken: dict[Partition, int] = {}
        self._hinted: dict[Partition, int] = {}
        self._settle_due = self._idle_due = 0.0
        self._report_due = time.monotonic() + REPORT_SECONDS
        self._idle_backoff, self._broken_backoff = _Backoff(), _Backoff(longest=LONGEST_CONNECT_SECONDS)
        self._rows = self._emitted = 0
        metrics = self._monitor.consumer
        self._rows_total, self._emitted_total = metrics.rows.labels(name), metrics.emitted.labels(name)
        self._letters_total, self._retries_total = metrics.dead_letters.labels(name), metrics.retries.labels(name)

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
                except StreamBroken as error:
                    self._start_over(error)
            self._finish()
        finally:
            self._stream.close()
        self._log.info("stopped", rows=self._rows, emitted=self._emitted)

    def step(self, timeout: float = 0.2) -> bool:
        """Do one turn: an assignment or batches, then what is due by time; return whether anything came."""
        self._monitor.beat(TURN_SECONDS)
        poll = self._stream.poll(timeout, self._batch_size)
        if poll.assigned is not None:
            self._begin(poll.assigned)
        elif poll.positions and not all(map(self._take, self._batches(poll))):
            return True  # stopped, or the assignment is gone: nothing may be done in its name
        self._by_time()
        return poll.assigned is not None or bool(poll.records)

    def _start_over(self, error: StreamBroken) -> None:
        self._opened = False
        while not self._stop.is_set():
            pause = self._broken_backoff.seconds()
            self._log.warning("starting over from what is committed", error=str(error), wait_seconds=round(pause, 1))
            self._monitor.unready("starting over", f"Kafka: {error}")
            self._monitor.beat(pause + TURN_SECONDS)
            try:
                self._stream.wait(pause, self._stop.is_set)
                self._stream.reset()
            except StreamBroken as again:
                error = again
            else:
                return

    def _finish(self) -> None:
        self._monitor.unready("stopping", "stopping")
        try:
            self._consumer.close()
        except (Retry, Reopen) as error:
            self._log.warning("not everything is stored: the rest is delivered again", error=str(error))
        try:
            if self._opened:
                self._settle()
        except StreamBroken as error:
            self._log.warning("the last offsets are not committed: some work is repeated", error=str(error))

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
        self._monitor.beat(TURN_SECONDS)
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
        self._taken, self._reached, self._hinted = begin, {}, {}
        self._opened = True
        for subject in ("starting", "starting over", "retrying"):
            self._monitor.unready(subject, None)
        self._monitor.unready("rebuilding", "rebuilding the day" if self._replaying else None)
        self._log.info("assigned", partitions=len(assigned), start=type(start).__name__)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, poll: Poll) -> Iterator[Batch]:
        """Yield what came as batches of one topic each, those below the committed offsets of a rebuild first."""
        self._events.clear()
        old: Sequence[Record] = ()
        new = poll.records
        if self._replaying:
            old = [record for record in poll.records if not self._is_new(record.partition, record.offset)]
            new = [record for record in poll.records if self._is_new(record.partition, record.offset)]
        ahead = {partition: at for partition, at in poll.positions.items() if self._is_new(partition, at)}
        for records in _by_topic(old):
            yield self._batch(records, Places.of(records).ends(), replay=True)
        if self._replaying:
            self._replaying.difference_update(ahead)
            if not self._replaying:
                self._monitor.unready("rebuilding", None)
        batches = list(_by_topic(new))
        having = {partition for records in batches for partition in Places.of(records).partitions}
        self._reached.update((partition, at) for partition, at in ahead.items() if partition not in having)
        for records in batches:
            partitions = set(Places.of(records).partitions)
            yield self._batch(records, {partition: ahead[partition] for partition in partitions})

    def _batch(self, records: Sequence[Record], ends: Offsets, *, replay: bool = False) -> Batch:
        return Batch(records, ends, replay, self._decoded, self._by_columns, self._unknown_fields)

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

    def _by_columns(self, places: Places) -> Any:
        try:
            return self._columns(places)
        except Unreachable as error:
            raise Retry(str(error)) from error

    def _unknown_fields(self, places: Places) -> Any:
        try:
            return self._unknown(places)
        except Unreachable as error:
            raise Retry(str(error)) from error

    def _take(self, batch: Batch) -> bool:
        """Process a batch: again after Retry, without the record after Reject.

        Return False if it was given up, because of a stop, a rebalance or Reopen: what was polled with it is void, too.
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
                batch = self._batch(rest, batch.next, replay=batch.replay)
                if batch.replay:
                    continue
                rejected.update((letter.origin, letter.message) for letter in found)
                self._limit.judge(records, rejected)
                self._log.warning("dead letters", count=len(found), first=found[0].origin, reason=str(error))
                letters += [Emit(DEAD_LETTERS, letter) for letter in found]
                if self._own:
                    # Publish them now: the sink may store its offsets before the next commit.
                    self._publish(letters, {})
                    letters = []
            except Reopen as error:
                self._reopen(error)
                return False
        self._monitor.unready("retrying", None)
        if batch.replay:
            return True
        self._rows += len(batch.records)
        if self._own:
            self._taken.update(Places.of(batch.records).ends())
            self._reached.update(batch.next)
        self._publish([*emits, *letters], batch.next)
        self._limit.add(records, rejected)
        self._rows_total.inc(len(batch.records))
        self._letters_total.inc(len(rejected))
        self._monitor.consumer.batch_seconds.labels(self._name).observe(time.monotonic() - began)
        return True

    def _wait(self, error: Retry, backoff: _Backoff) -> bool:
        """Wait as the error asks; return False after a stop or a rebalance."""
        seconds = backoff.seconds() if error.after is None else error.after
        self._log.warning("retrying", error=str(error), wait_seconds=round(seconds, 1))
        self._retries_total.inc()
        self._monitor.unready("retrying", str(error))
        self._monitor.beat(seconds + TURN_SECONDS)
        goes_on = not self._stop.is_set() and self._stream.wait(seconds, self._stop.is_set)
        self._opened = self._opened and (goes_on or self._stop.is_set())
        return goes_on

    def _reopen(self, error: Reopen) -> None:
        self._log.info("reopening", reason=str(error))
        self._opened = False
        self._stream.reset()

    def _publish(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish, and commit if the offsets are the group's: emits without a batch come with what is committed.

        So a member that lost its partitions publishes nothing.
        """
        self._monitor.beat(TURN_SECONDS)
        if undeclared := {emit.topic.name for emit in emits if emit.topic not in self._publishes}:
            raise RuntimeError(f"{type(self._consumer).__name__} publishes on {undeclared}: add it to its `emits`")
        if self._own:
            if emits:
                self._stream.commit(emits, {})
        elif emits or offsets:
            self._stream.commit(emits, offsets or self._committed)
            self._committed.update(offsets)
        self._emitted += len(emits)
        self._emitted_total.inc(len(emits))
        self._broken_backoff.reset()

    # --- dead letters -------------------------------------------------------------------------------------------------

    def _without(self, records: Sequence[Record], rejected: Reject) -> tuple[list[Record], list[DeadLetter]]:
        """Return the records without the rejected one, and its dead letter.

        If it could not be decoded the others are decoded, too: such a record is rarely alone.
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

    def _letter(self, rejected: Reject) -> DeadLetter:
        reason = Reason.UNDECODABLE if isinstance(rejected, _Unreadable) else Reason.REJECTED
        return dead_letter(rejected.record, reason, str(rejected), self._name, self._now())

    # --- time ---------------------------------------------------------------------------------------------------------

    def _by_time(self) -> None:
        now = time.monotonic()
        # State that is being rebuilt is not complete enough to act on.
        if self._opened and not self._replaying and now >= self._idle_due:
            self._idle_due = now + IDLE_SECONDS
            self._idle(now)
        if self._opened and now >= self._settle_due:
            self._settle_due = now + SETTLE_SECONDS
            self._settle()
            self._monitor.consumer.lag.labels(self._name).set(self._stream.lag())
        if now >= self._report_due:
            self._report_due = now + REPORT_SECONDS
            self._log.info("running", rows=self._rows, emitted=self._emitted, lag=self._stream.lag())

    def _idle(self, now: float) -> None:
        self._monitor.beat(CALL_SECONDS)
        trouble = self._consumer.trouble()
        self._monitor.unready("trouble", trouble)
        self._monitor.consumer.trouble.labels(self._name).set(trouble is not None)
        try:
            emits = self._consumer.idle(self._now())
        except Retry as error:
            seconds = self._idle_backoff.seconds() if error.after is None else error.after
            self._log.warning("retrying", error=str(error), wait_seconds=round(seconds, 1))
            self._retries_total.inc()
            self._monitor.unready("retrying when idle", str(error))
            self._idle_due = now + seconds
        except Reopen as error:
            self._reopen(error)
        else:
            self._idle_backoff.reset()
            self._monitor.unready("retrying when idle", None)
            if emits:
                self._publish(emits, {})

    def _settle(self) -> None:
        """Commit positions without records; for a sink with its own offsets, hint how far it is."""
        self._monitor.beat(TURN_SECONDS)
        if not self._own:
            if ahead := {partition: at for partition, at in self._reached.items() if at > self._committed[partition]}:
                self._publish((), ahead)
            return
        hint = dict(self._consumer.durable())
        for partition, at in self._reached.items():
            # Only transaction markers are between the last record and the position.
            if hint.get(partition, 0) >= self._taken[partition]:
                hint[partition] = max(at, hint.get(partition, 0))
        if hint != self._hinted:
            self._stream.hint(hint)
            self._hinted = hint


class _Unreadable(Reject):
    """A record whose bytes are not what its topic promises."""


class _RejectLimit:
    """Stops a consumer that rejects too many records: a changed schema must not empty a topic into dead letters."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        # For each of the last records why it was rejected, None if it was not.
        self._last: deque[str | None] = deque(maxlen=JUDGED_RECORDS)

    def add(self, records: Sequence[Record], rejected: Mapping[str, str]) -> None:
        """Add a processed batch: why records were rejected, by their origin. Raises BourseError if it is too much."""
        self._last = self._with(records, rejected)

    def judge(self, records: Sequence[Record], rejected: Mapping[str, str]) -> None:
        """Raise BourseError if these would be too much."""
        self._with(records, rejected)

    def _with(self, records: Sequence[Record], rejected: Mapping[str, str]) -> deque[str | None]:
        last = self._last.copy()
        if not rejected:
            last.extend([None] * min(len(records), JUDGED_RECORDS))
            return last
        for left, record in zip(range(len(records) - 1, -1, -1), records, strict=True):
            last.append(rejected.get(record.origin))
            if len(last) < JUDGED_RECORDS and left:
                continue
            bad = len(last) - last.count(None)
            if bad >= FEW_RECORDS and bad > self._max_share * len(last):
                first = next(why for why in last if why is not None)
                raise BourseError(
                    f"{bad / len(last):.0%} of the last {len(last)} records were rejected, the first because: {first}. "
                    "The consumer stops; what it has not published is not committed and is delivered again. Has the "
                    "schema changed? See `bourse dead-letters list` for those before, upgrade and start it again; "
                    "--max-rejected-share 1 sends all of them to the dead letters"
                )
        return last


def dead_letter(record: Record, reason: Reason, message: str, consumer: str, now: datetime) -> DeadLetter:
    """Return a record as a dead letter that fits where the record did: what is too long is cut, and says so."""
    message, key = message[:TEXT_BYTES], record.key if record.key is None else record.key[:TEXT_BYTES]
    headers: dict[str, bytes] = {}
    left = HEADER_BYTES
    for name, value in record.headers.items():
        if (left := left - len(name.encode()) - len(value)) < 0:
            message += f" ({len(record.headers) - len(headers)} of {len(record.headers)} headers left out)"
            break
        headers[name] = value
    value = record.value or b""
    room = LETTER_BYTES - HEADER_BYTES - 5 * TEXT_BYTES
    if len(value) > room:
        message += f" (the first {room} of {len(value)} bytes)"
    return DeadLetter(
        reason=reason,
        message=message,
        stage=Stage.CONSUME,
        origin=record.origin,
        consumer=consumer,
        payload=value[:room],
        original_topic=record.partition.topic,
        original_key=key,
        original_partition=record.partition.number,
        original_offset=record.offset,
        original_headers=headers,
        failed_at=now.replace(microsecond=0),
    )


def _by_topic(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Yield records by topic, in their order; those of a single topic as they are."""
    topics = list(dict.fromkeys(partition.topic for partition in Places.of(records).partitions))
    if len(topics) == 1:
        yield records
        return
    for topic in topics:
        yield [record for record in records if record.partition.topic == topic]


def connect(make: Callable[[], S], name: str, stop: threading.Event, monitor: Monitor) -> S | None:
    """Return what `make` returns as soon as broker and registry answer; None if `stop` came first."""
    backoff = _Backoff(1.0, LONGEST_CONNECT_SECONDS)
    while not stop.is_set():
        try:
            return make()
        except (Unreachable, StreamBroken) as error:
            pause = backoff.seconds()
            get_logger(consumer=name).warning("waiting", error=str(error), wait_seconds=round(pause, 1))
            monitor.unready("starting", str(error))
            monitor.beat(pause + TURN_SECONDS)
            stop.wait(pause)
    return None
