"""The runtime of a consumer: batches, back-off, dead letters, transactions, rebalances, shutdown, lag.

`Runner` holds the policy and knows no broker: it works on a `Stream`, which kafka_stream.py implements on Kafka and
testing.py in memory.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import (
    Assignment,
    Batch,
    Consumer,
    Decoders,
    Emit,
    MarketConsumer,
    Own,
    Rebuild,
    Reject,
    Reopen,
    Resume,
    Retry,
    Unreadable,
)
from bourse_consumers.market import Market
from bourse_consumers.records import Offsets, Partition, Places, Record, dead_letter
from bourse_schemas.errors import BourseError, Unreachable
from bourse_schemas.events import Reason
from bourse_schemas.topics import DEAD_LETTERS
from bourse_schemas.watchdog import deadline

P = ParamSpec("P")
S = TypeVar("S")

IDLE_SECONDS, SETTLE_SECONDS, LAG_SECONDS = 0.5, 1.0, 10.0
# A call into Kafka that takes longer will not return: the process ends.
HANG_SECONDS = 120.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, LONGEST_OUTAGE_WAIT_SECONDS = 0.5, 60.0, 15.0
# How long the service counts as alive: for one turn of the loop, whose calls to the broker have deadlines, and for one
# call of the consumer (see api.py).
TURN_SECONDS, CALL_SECONDS = 60.0, 1_860.0
# The share of rejected records is that of the last JUDGED_RECORDS, once FEW_RECORDS were rejected.
JUDGED_RECORDS, FEW_RECORDS = 200, 20


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

    @property
    def decoders(self) -> Decoders:
        """What makes events of the records."""

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return what came within `timeout` seconds; an assignment comes alone, and `seek` follows it."""

    def seek(self, offsets: Offsets) -> None:
        """Read all partitions of the assignment from these offsets."""

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
    """The batch in hand is given up, because of a stop or a rebalance: what was polled with it is void, too."""


class Runner:
    """Runs one consumer on one stream until it is stopped."""

    def __init__(
        self,
        consumer: Consumer | MarketConsumer,
        stream: Stream,
        *,
        name: str,
        batch_size: int | None = None,
        max_rejected_share: float = 0.5,
        stop: threading.Event | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._monitor = consumer.monitor = monitor or Monitor(name)
        self._metrics = metrics = self._monitor.consumer
        for counter in (metrics.rows, metrics.emitted, metrics.dead_letters, metrics.retries):
            counter.labels(name)  # it is 0 from the start
        self._consumer = consumer if isinstance(consumer, Consumer) else Market(consumer, name, metrics)
        self._stream, self._name = stream, name
        self._batch_size = batch_size or self._consumer.batch_size
        self._stop = stop or threading.Event()
        consumer.stopped = self._stop.is_set
        self._log = get_logger(consumer=name)
        self._publishes = {*consumer.emits, DEAD_LETTERS}
        self._max_rejected_share = max_rejected_share
        # For each of the last records why it was rejected, None if it was not.
        self._judged: deque[str | None] = deque(maxlen=JUDGED_RECORDS)
        # An assignment was opened and has not changed since; its consumer stores offsets of its own.
        self._opened = self._own = False
        self._committed: dict[Partition, int] = {}
        self._replaying: set[Partition] = set()
        # How far all records were processed.
        self._reached: dict[Partition, int] = {}
        self._jobs = {self._idle: IDLE_SECONDS, self._settle: SETTLE_SECONDS, self._measure_lag: LAG_SECONDS}
        self._due: dict[Callable[[], None], float] = {}
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
            self._kafka(self._stream.close)
        self._log.info("stopped", rows=self._rows, emitted=self._emitted)

    def step(self, timeout: float = 0.2) -> bool:
        """Do one turn: an assignment or batches, then what is due by time; return whether anything came."""
        poll = self._kafka(self._stream.poll, timeout, self._batch_size)
        try:
            if poll.assigned is not None:
                self._begin(poll.assigned)
            for batch in self._batches(poll):
                self._take(batch)
            self._by_time(time.monotonic())
        except _GivenUp:  # nothing more may be done in the assignment's name
            return True
        except Reopen as error:
            self._start_over(error)
            return True
        return poll.assigned is not None or bool(poll.records)

    def _start_over(self, error: BourseError) -> None:
        self._opened = False
        pause = next(self._outage_waits)
        if isinstance(error, Reopen) and not error.fault:
            self._log.info("opening again", reason=str(error), wait_seconds=round(pause, 1))
        else:
            self._log.warning("starting over from what is committed", error=str(error), wait_seconds=round(pause, 1))
            self._monitor.unready("starting over", str(error))
        self._monitor.beat(pause + TURN_SECONDS)
        with suppress(Unreachable):
            self._stream.wait(pause, self._stop.is_set)
        self._kafka(self._stream.reset)

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

    # --- calls --------------------------------------------------------------------------------------------------------

    def _kafka(self, call: Callable[P, S], *args: P.args, **kwargs: P.kwargs) -> S:
        """Return what a method of the stream returns; end the process if it does not return."""
        self._monitor.beat(TURN_SECONDS)
        with deadline(getattr(call, "__qualname__", ""), HANG_SECONDS):
            return call(*args, **kwargs)

    def _call(self, method: Callable[[], S]) -> S:
        """Return what a method of the consumer returns, however often an external system fails.

        Raises _GivenUp after a stop or a rebalance meanwhile.
        """
        waits = _waits()
        while True:
            self._monitor.beat(CALL_SECONDS)
            try:
                result = method()
            except (Retry, Unreachable) as error:
                after, fault = (error.after, error.fault) if isinstance(error, Retry) else (None, True)
                if self._stop.is_set():
                    raise _GivenUp from error
                seconds = next(waits) if after is None else after
                if fault:
                    self._log.warning("retrying", error=str(error), wait_seconds=round(seconds, 1))
                    self._metrics.retries.labels(self._name).inc()
                else:
                    self._log.info("waiting", reason=str(error), wait_seconds=round(seconds, 1))
                self._monitor.unready("retrying", str(error) if fault else None)
                self._due.pop(self._measure_lag, None)
                if not self._stream.wait(seconds, self._should_stop):
                    self._opened = self._opened and self._stop.is_set()
                    raise _GivenUp from error
            else:
                self._monitor.unready("retrying", None)
                return result

    def _should_stop(self) -> bool:
        """Return whether a wait is to end; it may last for hours: give signs of life and measure the lag meanwhile."""
        self._monitor.beat(TURN_SECONDS)
        if (now := time.monotonic()) >= self._due.get(self._measure_lag, 0.0):
            self._due[self._measure_lag] = now + LAG_SECONDS
            self._measure_lag()
        return self._stop.is_set()

    # --- assignment ---------------------------------------------------------------------------------------------------

    def _begin(self, assigned: Assignment) -> None:
        self._opened = False
        start = self._call(lambda: self._consumer.open(assigned))
        begin = dict(assigned)
        if not isinstance(start, Resume):
            begin.update((partition, start.offsets[partition]) for partition in assigned if partition in start.offsets)
        if isinstance(start, Rebuild):
            # Nobody has seen the records of a fresh partition: they are new from where the rebuild begins.
            assigned.update((partition, begin[partition]) for partition in assigned.fresh)
            begin = {partition: min(at, assigned[partition]) for partition, at in begin.items()}
        self._kafka(self._stream.seek, begin)
        self._own = isinstance(start, Own)
        self._committed = dict(assigned)
        self._replaying = set() if self._own else {p for p, at in begin.items() if at < assigned[p]}
        self._reached = {}
        self._opened = True
        self._due.pop(self._measure_lag, None)
        for subject in ("starting", "starting over"):
            self._monitor.unready(subject, None)
        self._show_rebuild()
        self._log.info("assigned", partitions=len(assigned), start=type(start).__name__)

    def _show_rebuild(self) -> None:
        self._monitor.unready("rebuilding", "rebuilding the day" if self._replaying else None)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, poll: Poll) -> Iterator[Batch]:
        """Yield what came as batches of one topic each, those below the committed offsets of a rebuild first."""
        split = defaultdict[tuple[bool, str], list[Record]](list)
        topics = {partition.topic for partition in Places.of(poll.records).partitions}
        whole = len(topics) == 1 and not self._replaying  # the records need not be made
        for record in () if whole else poll.records:
            split[self._is_new(record.partition, record.offset), record.partition.topic].append(record)
        for (new, _), records in split.items():
            if not new:
                yield Batch(records, Places.of(records).ends(), self._stream.decoders, replay=True)
        ahead = {partition: at for partition, at in poll.positions.items() if self._is_new(partition, at)}
        self._replaying.difference_update(ahead)
        self._show_rebuild()
        for each in [poll.records] if whole else [records for (new, _), records in split.items() if new]:
            ends = {partition: ahead[partition] for partition in set(Places.of(each).partitions)}
            yield Batch(each, ends, self._stream.decoders)
        self._reached.update(ahead)  # all batches were processed

    def _is_new(self, partition: Partition, offset: int) -> bool:
        return partition not in self._replaying or offset >= self._committed[partition]

    def _take(self, batch: Batch) -> None:
        """Process a batch: again without the records that are bad, which become dead letters."""
        letters: list[Emit] = []
        records, rejected, began = batch.records, dict[str, str](), time.monotonic()
        while True:
            try:
                emits = (self._call(partial(self._consumer.process, batch)) if batch.records else None) or ()
                break
            except Reject as error:
                reason, bad = Reason.REJECTED, [(error.record, str(error))]
            except Unreadable as error:
                reason, bad = Reason.UNDECODABLE, list(error.bad)
            batch = batch.without([record for record, _ in bad])
            if batch.replay:
                continue
            rejected.update((record.origin, why) for record, why in bad)
            _judge(self._judged, records, rejected, self._max_rejected_share)
            self._log.warning("dead letters", count=len(bad), first=bad[0][0].origin, reason=bad[0][1])
            now = datetime.now(UTC)
            letters += [Emit(DEAD_LETTERS, dead_letter(each, reason, why, self._name, now)) for each, why in bad]
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

    def _publish(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish, and commit if the offsets are the group's: emits without a batch come with what is committed.

        So a member that lost its partitions publishes nothing.
        """
        if undeclared := {emit.topic.name for emit in emits if emit.topic not in self._publishes}:
            raise RuntimeError(f"{type(self._consumer).__name__} publishes on {undeclared}: add it to its `emits`")
        if self._own:
            offsets = {}
        if emits or offsets:
            self._commit(emits, offsets if offsets or self._own else self._committed)
        self._emitted += len(emits)
        self._metrics.emitted.labels(self._name).inc(len(emits))
        self._outage_waits = _waits(LONGEST_OUTAGE_WAIT_SECONDS)

    def _commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        self._kafka(self._stream.commit, emits, offsets)
        self._committed.update(offsets)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _by_time(self, now: float) -> None:
        for job, seconds in self._jobs.items():
            if self._opened and now >= self._due.get(job, 0.0):
                self._due[job] = now + seconds
                job()

    def _idle(self) -> None:
        if self._replaying:  # the state is not complete enough to act on
            return
        trouble = self._consumer.trouble()
        self._monitor.unready("trouble", trouble)
        self._metrics.trouble.labels(self._name).set(trouble is not None)
        if emits := self._call(lambda: self._consumer.idle(datetime.now(UTC))):
            self._publish(emits, {})

    def _settle(self) -> None:
        """Commit positions without records; for a sink with its own offsets, how far it is, for dashboards."""
        ends = self._consumer.durable() if self._own else self._reached
        if moved := {each: at for each, at in ends.items() if at != self._committed.get(each, at)}:
            self._commit((), moved)

    def _measure_lag(self) -> None:
        with suppress(Unreachable):  # the last figure remains
            self._metrics.lag.labels(self._name).set(self._kafka(self._stream.lag))


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
        # Only a full window or a whole batch is judged: a start in a short bad spell would stop every time.
        if (len(last) == JUDGED_RECORDS or not left) and bad >= FEW_RECORDS and bad > max_share * len(last):
            first = next(why for why in last if why is not None)
            raise BourseError(
                f"{bad / len(last):.0%} of the last {len(last)} records were rejected, the first because: {first}. "
                "The consumer stops; what it has not published is not committed and is delivered again. Has the "
                "schema changed? See `bourse dead-letters list` for those before, upgrade and start it again; "
                "--max-rejected-share 1 sends all of them to the dead letters"
            )
    return last


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
