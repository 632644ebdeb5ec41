"""The runner over a stream in memory: what it promises to every consumer."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import httpx2
import pytest

from bourse_cli.health import Monitor
from bourse_consumers.api import (
    Assignment,
    Batch,
    Consumer,
    Day,
    Decoders,
    Emit,
    MarketConsumer,
    Offsets,
    Own,
    Partition,
    Rebuild,
    Record,
    Reject,
    Reopen,
    Resume,
    Retry,
    Start,
    WholePoll,
)
from bourse_consumers.records import dead_letter
from bourse_consumers.runner import Runner, StreamBroken, connect
from bourse_consumers.testing import DECODERS, SERIALIZERS, ConsumerContract, Memory, MemoryStream, marker, run, trade
from bourse_consumers.transactions import Transactions
from bourse_schemas.errors import BourseError, Unreachable
from bourse_schemas.events import DeadLetter, Event, Reason, Stage, TradeEvent
from bourse_schemas.topics import DEAD_LETTERS, POLLS, TRADES, Topic

TRADES_0 = Partition("bourse.trades", 0)


class Echo(Consumer):
    """Publishes what it reads."""

    emits: Sequence[Topic] = (TRADES,)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def process(self, batch: Batch) -> list[Emit]:
        self.batches.append([event.sequence for event in batch.events])
        return [Emit(TRADES, event) for event in batch.events]


class Summing(Consumer):
    """Publishes with each event the number of events so far: state that only a rebuild gives back."""

    emits = (TRADES,)
    seen = 0

    def open(self, assigned: Assignment) -> Rebuild:
        self.seen = 0
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        emits = []
        for event in batch.events:
            self.seen += 1
            emits.append(Emit(TRADES, trade(sequence=event.sequence, volume=self.seen)))
        return emits


class Lines(Consumer):
    """A sink that keeps its offset with its data, in one file; it buffers two records."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "lines"
        self.buffer: list[str] = []

    def lines(self) -> list[str]:
        return self.file.read_text().split() if self.file.exists() else []

    def ids(self) -> list[str]:
        return [line.split("@")[0] for line in self.lines()]

    def next(self) -> int:
        return max((int(line.split("@")[1]) + 1 for line in self.lines()), default=0)

    def open(self, assigned: Assignment) -> Own:
        self.buffer = []
        return Own(dict.fromkeys(assigned, self.next()))

    def process(self, batch: Batch) -> list[Emit] | None:
        self.buffer += [
            f"{event.event_id}@{record.offset}" for record, event in zip(batch.records, batch.events, strict=True)
        ]
        if len(self.buffer) > 2:
            self.close()
        return None

    def durable(self) -> Offsets:
        return {TRADES_0: self.next()}

    def close(self) -> None:
        self.file.write_text("\n".join([*self.lines(), *self.buffer]))
        self.buffer = []


def some(count: int, first: int = 1) -> list[TradeEvent]:
    return [trade(sequence=sequence) for sequence in range(first, first + count)]


class TestResume(ConsumerContract):
    """The contract holds for a consumer without state."""

    def make(self, folder: Path) -> Consumer:
        return Echo()

    def events(self) -> Sequence[TradeEvent]:
        return some(5)


class TestRebuild(ConsumerContract):
    """The contract holds for a consumer that rebuilds its state."""

    def make(self, folder: Path) -> Consumer:
        return Summing()

    def events(self) -> Sequence[TradeEvent]:
        return some(5)


class Table(Consumer):
    """A sink that moves its offset and writes its rows in one transaction, if the offset is where it left it."""

    fenced = True

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(folder / "db", isolation_level=None)
        self.db.execute("CREATE TABLE IF NOT EXISTS rows (id TEXT)")
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS ends (topic TEXT, number INT, next INT, PRIMARY KEY (topic, number))"
        )
        self.next: dict[Partition, int] = {}

    def stored(self, partition: Partition) -> int | None:
        found = self.db.execute("SELECT next FROM ends WHERE topic = ? AND number = ?", partition).fetchone()
        return found and int(found[0])

    def open(self, assigned: Assignment) -> Own:
        self.next = {each: self.stored(each) or assigned.first[each] for each in assigned}
        return Own(self.next)

    def process(self, batch: Batch) -> None:
        ids = [(event.event_id,) for event in batch.events]
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            for partition, at in batch.next.items():
                if self.fenced and (self.stored(partition) or self.next[partition]) != self.next[partition]:
                    raise Reopen("another writer was faster")
                self.db.execute("INSERT OR REPLACE INTO ends VALUES (?, ?, ?)", (*partition, at))
            self.db.executemany("INSERT INTO rows VALUES (?)", ids)
        self.next.update(batch.next)

    def durable(self) -> Offsets:
        return self.next

    def close(self) -> None:
        self.db.close()


class TestOwn(ConsumerContract):
    """The contract holds for a sink that stores its own offsets."""

    def make(self, folder: Path) -> Consumer:
        return Table(folder)

    def events(self) -> Sequence[TradeEvent]:
        return some(3)

    def outcome(self, memory: Memory, folder: Path) -> object:
        with closing(sqlite3.connect(folder / "db")) as db:
            return db.execute("SELECT id FROM rows").fetchall()


class Unfenced(Table):
    """Does not check whether another writer was faster."""

    fenced = False


def test_the_contract_finds_a_sink_without_fencing(tmp_path: Path) -> None:
    """Two writers write the same rows."""

    class Suite(TestOwn):
        __test__ = False

        def make(self, folder: Path) -> Consumer:
            return Unfenced(folder)

    Suite().test_a_kill_loses_and_repeats_nothing(tmp_path / "kill")
    with pytest.raises(AssertionError, match="a second writer"):
        Suite().test_two_writers_lose_and_repeat_nothing(tmp_path)


class Breadth(MarketConsumer):
    """Publishes for each poll how many events the day has had."""

    emits: Sequence[Topic] = (TRADES,)

    def __init__(self) -> None:
        self.total = 0
        self.polls: list[tuple[int, int, bool, bool]] = []

    def open(self, day: Day) -> None:
        self.total = 0

    def process_poll(self, poll: WholePoll) -> list[Emit]:
        self.total += len(poll.events)
        assert poll.frame().height == len(poll.events)
        self.polls.append((poll.marker.poll_sequence, len(poll.events), poll.replay, poll.complete))
        return [Emit(TRADES, trade(source="breadth", sequence=poll.marker.poll_sequence, volume=self.total))]


def polls(count: int, first: int = 1) -> list[Event]:
    """Return polls of two instruments: events, then the marker."""
    found: list[Event] = []
    for sequence in range(first, first + count):
        events = [trade(sequence=sequence, instrument=f"IRO1TEST000{number}") for number in range(2)]
        found += [*events, marker(*events)]
    return found


class TestMarket(ConsumerContract):
    """The contract holds for a consumer of whole polls."""

    def make(self, folder: Path) -> MarketConsumer:
        return Breadth()

    def events(self) -> Sequence[Event]:
        return polls(4)


class Forgetful(Summing):
    """Counts, and resumes without its count."""

    def open(self, assigned: Assignment) -> Start:  # type: ignore[override]
        self.seen = 0
        return Resume()


def test_the_contract_finds_a_consumer_that_forgets(tmp_path: Path) -> None:
    """A suite that passes everything would be worth nothing."""

    class Suite(TestRebuild):
        __test__ = False

        def make(self, folder: Path) -> Consumer:
            return Forgetful()

    with pytest.raises(AssertionError, match="stopped after 1"):
        Suite().test_a_stop_and_a_start_lose_and_repeat_nothing(tmp_path)


def test_batches_are_no_larger_than_asked_for() -> None:
    """The operator's batch size is an upper limit."""
    memory, echo = Memory(), Echo()
    memory.append(*some(5))
    run(echo, memory, batch_size=2)
    assert echo.batches == [[1, 2], [3, 4], [5]]


def test_no_batch_straddles_the_committed_offset() -> None:
    """What is replayed and what is new come apart, so that emits can be dropped by the batch."""

    class Watching(Summing):
        def __init__(self) -> None:
            self.calls: list[tuple[bool, list[int]]] = []

        def process(self, batch: Batch) -> list[Emit]:
            self.calls.append((batch.replay, [event.sequence for event in batch.events]))
            return super().process(batch)

    memory, consumer = Memory(), Watching()
    memory.append(*some(5))
    memory.committed[TRADES_0] = 3
    run(consumer, memory)
    assert consumer.calls == [(True, [1, 2, 3]), (False, [4, 5])]
    assert [emit.event.volume for emit in memory.emitted] == [4, 5]  # type: ignore[attr-defined]


def test_retry_brings_the_same_batch_again_after_a_growing_wait() -> None:
    """An external system failed: nothing is skipped, and it is not hammered."""
    memory = Memory()
    memory.append(*some(2))

    class Flaky(Echo):
        failures = 4

        def process(self, batch: Batch) -> list[Emit]:
            if self.failures:
                self.failures -= 1
                raise Retry("the database is down")
            return super().process(batch)

    consumer = Flaky()
    stream = MemoryStream(memory, [TRADES])
    runner = Runner(consumer, stream, name="test")
    runner.step()
    runner.step()
    assert consumer.batches == [[1, 2]]
    assert len(stream.waited) == 4
    assert 0.25 <= stream.waited[0] <= 0.5
    assert 2.0 <= stream.waited[3] <= 4.0
    assert memory.committed == {TRADES_0: 2}


def test_retry_after_is_honoured() -> None:
    """A consumer that knows how long it takes sets the wait."""
    memory = Memory()
    memory.append(*some(1))

    class Once(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            if not self.batches:
                self.batches.append([])
                raise Retry("rate limit", after=7)
            return super().process(batch)

    stream = MemoryStream(memory, [TRADES])
    runner = Runner(Once(), stream, name="test")
    runner.step()
    runner.step()
    assert stream.waited == [7]


def test_a_rejected_record_becomes_a_dead_letter_and_the_rest_is_processed() -> None:
    """One bad record must not hold up the market."""

    class Picky(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            for record, event in zip(batch.records, batch.events, strict=True):
                if event.sequence == 2:
                    raise Reject(record, "no twos")
            return super().process(batch)

    memory, consumer = Memory(), Picky()
    memory.append(*some(3))
    run(consumer, memory)
    letters = [emit.event for emit in memory.emitted if emit.topic is DEAD_LETTERS]
    assert consumer.batches == [[1, 3]]
    (letter,) = letters
    assert (letter.reason, letter.stage, letter.message) == (Reason.REJECTED, Stage.CONSUME, "no twos")  # type: ignore[attr-defined]
    assert (letter.origin, letter.original_offset) == ("bourse.trades-0-1", 1)  # type: ignore[attr-defined]
    rejected = memory.records[TRADES_0][1]
    assert rejected
    assert letter.payload == rejected.value  # type: ignore[attr-defined]
    assert memory.committed == {TRADES_0: 3}


def test_an_unreachable_registry_is_waited_for_and_makes_no_dead_letter() -> None:
    """A record is not at fault when its schema cannot be looked up just now."""
    memory, consumer = Memory(), Echo()
    memory.append(*some(1))
    failures = [Unreachable("the registry is unreachable")] * 2

    class Failing(Decoders):
        def event(self, record: Record) -> Any:
            if failures:
                raise failures.pop()
            return super().event(record)

    stream = MemoryStream(memory, [TRADES])
    stream.decoders = Failing(DECODERS)
    runner = Runner(consumer, stream, name="test")
    runner.step()
    runner.step()
    assert consumer.batches == [[1]]
    assert len(stream.waited) == 2
    assert all(emit.topic is not DEAD_LETTERS for emit in memory.emitted)


def test_reopen_begins_again_with_what_the_sink_has(tmp_path: Path) -> None:
    """Another writer was faster: what it wrote is skipped, what it did not is read again."""

    class Loser(Lines):
        lost = False

        def process(self, batch: Batch) -> list[Emit] | None:
            if not self.lost:
                self.lost = True
                self.file.write_text("theirs@0")
                raise Reopen("another writer was faster")
            return super().process(batch)

    memory = Memory()
    memory.append(*some(3))
    run(Loser(tmp_path), memory)
    assert Lines(tmp_path).ids() == ["theirs", *(event.event_id for event in some(2, first=2))]


@pytest.mark.parametrize("start", [Resume(), Rebuild({TRADES_0: 0})])
def test_reopen_works_for_every_start(start: Start) -> None:
    """The same records are delivered again, from what is committed."""

    class Once(Echo):
        opened = 0

        def open(self, assigned: Assignment) -> Start:
            self.opened += 1
            return start

        def process(self, batch: Batch) -> list[Emit]:
            if self.opened == 1:
                raise Reopen("the rules have changed")
            return super().process(batch)

    memory, consumer = Memory(), Once()
    memory.append(*some(2))
    run(consumer, memory)
    assert (consumer.opened, consumer.batches, len(memory.emitted)) == (2, [[1, 2]], 2)


def test_reopen_again_and_again_waits_longer_each_time() -> None:
    """Two writers that get into each other's way must not do so as fast as they can."""

    class Loser(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            raise Reopen("another writer was faster")

    memory = Memory()
    memory.append(*some(1))
    stream = MemoryStream(memory, [TRADES])
    run(Loser(), memory, rounds=8, stream=stream)
    assert len(stream.waited) == 4
    assert stream.waited[3] > 2 * stream.waited[0]


def test_a_call_into_kafka_that_hangs_ends_the_process() -> None:
    """It prints the call: a service that hangs and looks alive is worse than one that ended."""
    code = """
import time
from bourse_consumers import runner
from bourse_consumers.api import Consumer
from bourse_consumers.testing import Memory, MemoryStream
from bourse_schemas.topics import TRADES
runner.HANG_SECONDS = 0.5
class Hanging(MemoryStream):
    def poll(self, timeout, limit):
        time.sleep(60)
class Echo(Consumer):
    def process(self, batch):
        return None
runner.Runner(Echo(), Hanging(Memory(), [TRADES]), name="test").run()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert ran.returncode == 1
    assert "Hanging.poll did not return within 0.5 s: the process ends, start it again" in ran.stderr


def test_a_batch_given_up_takes_what_was_polled_with_it_along() -> None:
    """After a rebalance in the middle of a replay nothing new may be processed on half a state."""

    class Stuck(Summing):
        replays: ClassVar[list[bool]] = []

        def process(self, batch: Batch) -> list[Emit]:
            self.replays.append(batch.replay)
            if batch.replay and len(self.replays) == 1:
                stream.reset()
                raise Retry("not yet")
            return super().process(batch)

    memory, consumer = Memory(), Stuck()
    memory.append(*some(5))
    memory.committed[TRADES_0] = 3
    stream = MemoryStream(memory, consumer.topics)
    run(consumer, memory, stream=stream)
    assert consumer.replays == [True, True, False]
    assert [emit.event.volume for emit in memory.emitted] == [4, 5]  # type: ignore[attr-defined]


def test_a_stop_ends_the_waiting_and_commits_nothing() -> None:
    """A consumer whose database is down can be stopped, and asks no broker that may be unreachable too."""

    class Down(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            runner.stop()
            raise Retry("the database is down", after=3600)

    class Asked(MemoryStream):
        lags = 0

        def lag(self) -> int:
            self.lags += 1
            return super().lag()

    memory = Memory()
    memory.append(*some(1))
    stream = Asked(memory, [TRADES])
    runner = Runner(Down(), stream, name="test")
    runner.step()
    stream.lags = 0
    runner.run()
    assert (memory.committed, stream.waited, stream.lags) == ({}, [], 0)


def test_a_broken_transaction_starts_over_and_loses_nothing() -> None:
    """After any error of a transaction everything since the last commit is void and comes again."""

    class Until(MemoryStream):
        def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
            super().commit(emits, offsets)
            if memory.committed[TRADES_0] == 3:
                runner.stop()

    memory, consumer = Memory(), Summing()
    memory.append(*some(3))
    stream = Until(memory, [TRADES])
    stream.failing = 2
    runner = Runner(consumer, stream, name="test")
    runner.run()
    assert [emit.event.volume for emit in memory.emitted] == [1, 2, 3]  # type: ignore[attr-defined]
    assert stream.waited[1] > stream.waited[0]


def test_a_store_that_is_down_at_the_start_is_waited_for() -> None:
    """`open` may ask for patience, too."""

    class Late(Echo):
        failures = 3

        def open(self, assigned: Assignment) -> Start:
            if self.failures:
                self.failures -= 1
                raise Retry("the database is down")
            return super().open(assigned)

    memory, consumer = Memory(), Late()
    memory.append(*some(2))
    run(consumer, memory)
    assert consumer.batches == [[1, 2]]


def test_many_undecodable_records_are_one_transaction_of_letters() -> None:
    """A topic full of rubbish is got through, and each record's bytes are kept."""
    memory, consumer = Memory(), Echo()
    calls: list[int] = []
    memory.append(*some(1))
    for number in range(500):
        memory.append_bytes(TradeEvent, b"%d" % number)
    memory.append(*some(1, first=2))

    class Counting(Decoders):
        def event(self, record: Record) -> Any:
            calls.append(record.offset)
            return super().event(record)

    stream = MemoryStream(memory, [TRADES])
    stream.decoders = Counting(DECODERS)
    runner = Runner(consumer, stream, name="test", max_rejected_share=1)
    runner.step()
    runner.step()
    assert consumer.batches == [[1, 2]]
    assert [emit.event.payload for emit in memory.emitted[2:]] == [b"%d" % number for number in range(500)]  # type: ignore[attr-defined]
    assert len(calls) < 510
    assert memory.committed == {TRADES_0: 502}


def test_a_letter_is_published_before_a_sink_of_its_own_goes_on(tmp_path: Path) -> None:
    """The sink's offsets may pass the record for good: by then its letter has to be out."""

    class Watching(Lines):
        def process(self, batch: Batch) -> list[Emit] | None:
            super().process(batch)
            self.close()
            raise ZeroDivisionError

    memory = Memory()
    memory.append_bytes(TradeEvent, b"not ours")
    memory.append(*some(1))
    with pytest.raises(ZeroDivisionError):
        run(Watching(tmp_path), memory)
    assert [emit.topic for emit in memory.emitted] == [DEAD_LETTERS]


def test_a_letter_of_a_huge_record_fits() -> None:
    """All its parts together fit where the record did; what is too long is cut, and the message reports it."""
    headers = {"trace": b"y" * 330_000, "who": b"me"}
    record = Record(TRADES_0, 7, 0, b"k" * 20_000, b"x" * 1_000_000, headers)
    letter = dead_letter(record, Reason.REJECTED, "no" * 50_000, "test", datetime.now(UTC))
    assert len(SERIALIZERS[DeadLetter](letter).value) < 950_000
    assert (len(letter.payload), letter.original_headers) == (750_000, {})
    assert letter.message.endswith("(2 of 2 headers left out) (the first 750000 of 1000000 bytes)")
    few = dead_letter(
        record._replace(headers={"who": b"me"}, value=None), Reason.REJECTED, "no", "test", letter.failed_at
    )
    assert (few.original_headers, few.payload, few.message) == ({"who": b"me"}, b"", "no")


def test_what_is_not_declared_is_not_published() -> None:
    """A topic that was not checked at the start would fail in the middle of the day."""

    class Undeclared(Echo):
        emits: Sequence[Topic] = ()

    memory = Memory()
    memory.append(*some(1))
    with pytest.raises(RuntimeError, match="trades"):
        run(Undeclared(), memory)


def test_markers_after_the_last_record_are_committed() -> None:
    """The group's offsets reach the end."""
    memory = Memory(markers=True)
    memory.append(*some(3))
    run(Echo(), memory)
    assert memory.committed == {TRADES_0: 6}


def test_a_hint_covers_no_more_than_what_is_safe(tmp_path: Path) -> None:
    """What a sink still buffers counts as lag."""
    memory, lines = Memory(markers=True), Lines(tmp_path)
    memory.append(*some(2))
    run(lines, memory, rounds=2)
    assert memory.committed.get(TRADES_0, 0) == 0


def test_idle_waits_for_the_state(wait_for: Callable[..., Any]) -> None:
    """A timer that looks at half a rebuilt day would raise false alarms."""

    class Ticking(Summing):
        seen_by_idle: ClassVar[list[int]] = []

        def idle(self, now: datetime) -> None:
            self.seen_by_idle.append(self.seen)

    memory, consumer = Memory(markers=True), Ticking()
    memory.append(*some(4))
    memory.committed[TRADES_0] = 8
    runner = Runner(consumer, MemoryStream(memory, [TRADES]), name="test", batch_size=1)
    wait_for(lambda: runner.step() is False and consumer.seen_by_idle)
    assert set(consumer.seen_by_idle) == {4}


def test_idle_that_asks_to_wait_is_called_again() -> None:
    """A database that is down is not asked, and not logged, twice a second; meanwhile it is not ready."""

    class Impatient(Echo):
        failures = 2

        def idle(self, now: datetime) -> None:
            reasons.append(monitor.reasons())
            if self.failures:
                self.failures -= 1
                raise Retry("the database is down", after=30)

    reasons: list[dict[str, str]] = []
    memory, monitor = Memory(), Monitor("test")
    stream = MemoryStream(memory, [TRADES])
    Runner(Impatient(), stream, name="test", monitor=monitor).step()
    assert stream.waited == [30, 30]
    assert reasons == [{}, *[{"retrying": "the database is down"}] * 2]
    assert monitor.reasons() == {}


def test_any_other_error_ends_it_and_commits_nothing() -> None:
    """A bug must not eat records."""

    class Buggy(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            raise ZeroDivisionError

    memory = Memory()
    memory.append(*some(1))
    with pytest.raises(ZeroDivisionError):
        run(Buggy(), memory)
    assert memory.committed == {}
    assert memory.emitted == []


def test_idle_is_called_without_batches_and_its_emits_are_published(wait_for: Callable[..., Any]) -> None:
    """Timers run when the market is quiet."""

    class Ticking(Echo):
        ticks = 0

        def idle(self, now: datetime) -> list[Emit]:
            self.ticks += 1
            return [Emit(TRADES, trade(sequence=self.ticks))]

    memory, consumer = Memory(), Ticking()
    runner = Runner(consumer, MemoryStream(memory, [TRADES]), name="test")
    wait_for(lambda: runner.step() is False and consumer.ticks >= 2)
    assert len(memory.emitted) == consumer.ticks


class Strict(Echo):
    """Rejects one record at a time: those whose sequence is divisible."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def process(self, batch: Batch) -> list[Emit]:
        for record, event in zip(batch.records, batch.events, strict=True):
            if event.sequence % self.by == 0:
                raise Reject(record, f"divisible by {self.by}")
        return super().process(batch)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_a_few_bad_records_among_many_go_on(batch_size: int) -> None:
    """A third of a hundred becomes dead letters, and everything else is processed."""
    memory, consumer = Memory(), Strict(3)
    memory.append(*some(100))
    run(consumer, memory, batch_size=batch_size)
    assert [emit.topic for emit in memory.emitted].count(DEAD_LETTERS) == 33
    assert sum(map(len, consumer.batches)) == 67
    assert memory.committed == {TRADES_0: 100}


@pytest.mark.parametrize(("bad", "letters"), [(19, 19), (20, 0)])
def test_too_many_bad_records_stop_it_before_anything_of_the_batch_is_published(bad: int, letters: int) -> None:
    """A changed schema must not empty the topic into the dead letters: the operator is asked, nothing is lost."""
    memory = Memory()
    for _ in range(bad):
        memory.append_bytes(TradeEvent, b"of another schema")
    if letters:
        run(Echo(), memory)
    else:
        with pytest.raises(
            BourseError, match=r"100% of the last 20 records .* wire format .* `bourse dead-letters list`"
        ):
            run(Echo(), memory)
    assert [emit.topic for emit in memory.emitted] == [DEAD_LETTERS] * letters
    assert memory.committed.get(TRADES_0, 0) == letters


def test_the_share_is_of_the_last_records_only() -> None:
    """A long good past does not cover up for a topic that is bad from now on; a bad spell that ended is forgiven."""
    memory, echo = Memory(), Echo()
    memory.append(*some(1000))
    for number in range(150):
        memory.append_bytes(TradeEvent, b"%d" % number)
    memory.append(*some(1000, first=1001))
    with pytest.raises(BourseError, match="50% of the last 200 records"):
        run(echo, memory, batch_size=10)
    assert len([emit for emit in memory.emitted if emit.topic is DEAD_LETTERS]) == 100
    assert memory.committed == {TRADES_0: 1100}
    for share, dead in ((0.75, 150), (1, 150)):
        memory.emitted, memory.committed = [], {}
        stream = MemoryStream(memory, [TRADES])
        runner = Runner(Echo(), stream, name="test", batch_size=10, max_rejected_share=share)
        while runner.step():
            pass
        assert len([emit for emit in memory.emitted if emit.topic is DEAD_LETTERS]) == dead


def test_a_sink_of_its_own_stops_as_well(tmp_path: Path) -> None:
    """Its letters go out before it goes on: not one of them may where all are bad."""
    memory = Memory()
    memory.append(*some(2))
    for _ in range(50):
        memory.append_bytes(TradeEvent, b"of another schema")
    with pytest.raises(BourseError, match="of the last 52 records"):
        run(Lines(tmp_path), memory)
    assert memory.emitted == []


def test_a_start_in_a_short_bad_spell_goes_on() -> None:
    """Nothing is judged yet then: the good records of the same batch count too, or every start would stop there."""
    memory, echo = Memory(), Echo()
    for number in range(20):
        memory.append_bytes(TradeEvent, b"%d" % number)
    memory.append(*some(980))
    run(echo, memory)
    assert len([emit for emit in memory.emitted if emit.topic is DEAD_LETTERS]) == 20
    assert memory.committed == {TRADES_0: 1000}


def test_a_batch_that_comes_again_is_judged_once() -> None:
    """A broken transaction makes no record worse."""
    memory = Memory()
    for number in range(15):
        memory.append_bytes(TradeEvent, b"%d" % number)
    memory.append(*some(10))
    stream = MemoryStream(memory, [TRADES])
    stream.failing = 3
    runner = Runner(Echo(), stream, name="test", batch_size=15)
    for _ in range(10):
        try:
            runner.step()
        except StreamBroken:
            stream.reset()
    assert memory.committed == {TRADES_0: 25}


def test_why_it_is_not_ready_and_when_it_is() -> None:
    """It is ready once it is assigned, does not wait and does not rebuild; a member on standby is ready, too."""
    seen: list[dict[str, str]] = []

    class Troubled(Summing):
        failures = 2

        def open(self, assigned: Assignment) -> Rebuild:
            seen.append(monitor.reasons())
            if self.failures == 2:
                self.failures -= 1
                raise Retry("the database is down")
            return super().open(assigned)

        def process(self, batch: Batch) -> list[Emit]:
            seen.append(monitor.reasons())
            if not batch.replay and self.failures:
                self.failures -= 1
                raise Retry("the disk is full")
            return super().process(batch)

    memory, monitor = Memory(), Monitor("test")
    memory.append(*some(5))
    memory.committed[TRADES_0] = 3
    runner = Runner(Troubled(), MemoryStream(memory, [TRADES]), name="test", monitor=monitor)
    assert monitor.reasons() == {"starting": "starting"}
    runner.step()
    assert monitor.reasons() == {"rebuilding": "rebuilding the day"}
    runner.step()
    assert monitor.reasons() == {}
    assert seen == [
        {"starting": "starting"},
        {"starting": "starting", "retrying": "the database is down"},
        {"rebuilding": "rebuilding the day"},
        {},
        {"retrying": "the disk is full"},
    ]
    idle, nothing = Monitor("standby"), Memory(partitions=0)
    Runner(Echo(), MemoryStream(nothing, [TRADES]), name="test", monitor=idle).step()
    assert idle.reasons() == {}


def test_a_broken_transaction_is_reported_until_the_partitions_are_back() -> None:
    """While it starts over it is alive, and not ready."""

    class Watching(MemoryStream):
        def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
            seen.append(monitor.reasons())
            return super().wait(seconds, stopped)

        def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
            super().commit(emits, offsets)
            seen.append(monitor.reasons())
            runner.stop()

    seen: list[dict[str, str]] = []
    memory, monitor = Memory(), Monitor("test")
    memory.append(*some(1))
    stream = Watching(memory, [TRADES])
    stream.failing = 1
    runner = Runner(Echo(), stream, name="test", monitor=monitor)
    runner.run()
    assert seen == [{"starting over": "this commit was to fail"}, {}]
    assert monitor.reasons() == {"stopping": "stopping"}


def test_its_figures() -> None:
    """Prometheus gets what happened."""
    memory, monitor, consumer = Memory(), Monitor("test"), Strict(10)
    memory.append(*some(30))
    names = ("rows_total", "emitted_total", "dead_letters_total", "retries_total", "batch_seconds_count", "lag")

    with monitor.serve("0") as url:
        runner = Runner(consumer, MemoryStream(memory, [TRADES]), name="me", monitor=monitor)

        def reported() -> list[float]:
            text = httpx2.get(f"{url}/metrics", trust_env=False).text
            found = dict(line.rsplit(" ", 1) for line in text.splitlines() if 'consumer="me"' in line)
            return [float(found.get(f'bourse_consumer_{name}{{consumer="me"}}', -1)) for name in names]

        assert reported() == [0, 0, 0, 0, -1, -1]
        runner.step()
        assert reported() == [0, 0, 0, 0, -1, 30]
        runner.step()
        runner._due.clear()
        runner.step()
        assert reported() == [27, 30, 3, 0, 1, 0]


def test_alive_while_the_loop_turns(wait_for: Callable[..., Any]) -> None:
    """A long call of the consumer counts as alive, and so does waiting for a broker; a loop that stops does not."""
    promised: list[float] = []

    class Listening(Monitor):
        def beat(self, within_seconds: float) -> None:
            promised.append(within_seconds)

    class Slow(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            at_call.append(promised[-1])
            if len(at_call) == 1:
                raise Retry("later", after=500)
            return super().process(batch)

    class Waiting(MemoryStream):
        def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
            goes_on = super().wait(seconds, stopped)
            in_wait.append(promised[-1])
            return goes_on

        def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
            at_call.append(promised[-1])
            super().commit(emits, offsets)

        def reset(self) -> None:
            at_call.append(promised[-1])
            super().reset()

    at_call, in_wait = list[float](), list[float]()
    memory = Memory()
    memory.append(*some(1))
    stream = Waiting(memory, [TRADES])
    runner = Runner(Slow(), stream, name="test", monitor=Listening("test"))
    runner.step()
    runner.step()
    runner._start_over(StreamBroken("the broker is unreachable"))
    assert at_call[0] > 1800  # the consumer's own call
    assert max(at_call[2:]) < 90  # calls to the broker
    assert len(at_call) == 4
    assert in_wait[0] < 100  # however long it waits, it looks whether it goes on
    promised.clear()
    runner.step()
    assert promised[0] < 300


def test_waiting_for_a_broker_at_the_start_is_reported(wait_for: Callable[..., Any]) -> None:
    """The service answers already: not ready, and for what it waits."""
    monitor, stop = Monitor("test"), threading.Event()

    def nowhere() -> None:
        raise Unreachable("Kafka at nowhere:1 does not answer")

    thread = threading.Thread(target=connect, args=(nowhere, "test", stop, monitor))
    thread.start()
    wait_for(lambda: monitor.reasons() == {"starting": "Kafka at nowhere:1 does not answer"})
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_a_batch_holds_records_of_one_topic() -> None:
    """So that it has columns: a consumer of two topics gets a batch of each."""

    class Both(Consumer):
        topics: Sequence[Topic] = (TRADES, POLLS)

        def __init__(self) -> None:
            self.heights: list[tuple[str, int, int]] = []

        def process(self, batch: Batch) -> None:
            topic = batch.records[0].partition.topic
            self.heights.append((topic, batch.frame().height, batch.table().num_rows))

    memory, consumer = Memory(), Both()
    memory.append(*polls(3))
    run(consumer, memory)
    assert consumer.heights == [("bourse.trades", 6, 6), ("bourse.polls", 3, 3)]
    assert memory.committed == {TRADES_0: 6, Partition("bourse.polls", 0): 3}


def test_a_frame_needs_no_pyarrow(tmp_path: Path) -> None:
    """Also for events that are decoded one by one, and for every type of event."""
    code = """
import sys
sys.modules["pyarrow"] = None
from bourse_consumers.columns import to_frame
from bourse_consumers.testing import marker, trade
from datetime import UTC, datetime
from bourse_schemas.events import DeadLetter, PriceAlert, Reason, Stage
assert to_frame([trade(), trade(sequence=2)])["sequence"].to_list() == [1, 2]
assert to_frame([marker()])["outcome"].to_list() == ["UNCHANGED"]
letter = DeadLetter(reason=Reason.REJECTED, message="m", stage=Stage.CONSUME, origin="o", payload=b"x",
    original_headers={"a": b"b"}, original_partition=3, failed_at=datetime(2026, 1, 1, tzinfo=UTC))
assert to_frame([letter])["original_headers"].to_list() == [[{"key": "a", "value": b"b"}]]
assert to_frame([], PriceAlert).height == 0
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_nothing_is_done_for_an_assignment_that_is_gone() -> None:
    """After a rebalance while a batch waits, neither timers nor positions are committed until `open` was called."""

    class Down(Echo):
        idles = 0

        def process(self, batch: Batch) -> list[Emit]:
            stream.reset()
            raise Retry("not yet")

        def idle(self, now: datetime) -> list[Emit]:
            self.idles += 1
            return [Emit(TRADES, trade())]

    class Counting(MemoryStream):
        commits = 0

        def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
            self.commits += 1
            super().commit(emits, offsets)

    memory, consumer = Memory(markers=True), Down()
    memory.append(*some(2))
    stream = Counting(memory, [TRADES])
    running = Runner(consumer, stream, name="test")
    running.step()
    idles = consumer.idles
    running._due.clear()
    stream.commits = 0
    running.step()
    assert (consumer.idles, stream.commits) == (idles, 0)


def test_a_member_that_was_replaced_commits_nothing() -> None:
    """Its group has given the partitions to another one, and it does not know yet."""
    memory = Memory()
    memory.append(*some(2))
    old = Runner(Echo(), MemoryStream(memory, [TRADES]), name="old", batch_size=1)
    new = Runner(Echo(), MemoryStream(memory, [TRADES]), name="new")
    old.step()
    new.step()
    with pytest.raises(StreamBroken):
        old.step()
    new.step()
    assert (memory.committed, len(memory.emitted)) == ({TRADES_0: 2}, 2)


def test_a_new_producer_is_noticed_whenever_it_is_made() -> None:
    """It fences a successor: what it would publish has to be looked at first, also if a broker was lost just now."""
    calls: list[str] = []

    class Client:
        def poll(self, _: float) -> None:
            if calls == ["init"]:
                transactions.suspect()

        def init_transactions(self, _: float) -> None:
            calls.append("init")

        def begin_transaction(self) -> None:
            calls.append("begin")

        def close(self) -> None:
            calls.append("close")

    def renewed() -> None:
        calls.append("renewed")
        raise StreamBroken("another member was active meanwhile")

    nothing = SimpleNamespace(registry=lambda: None, transactional_producer=lambda *_, **__: Client())
    transactions = Transactions(cast("Any", nothing), "id", [])
    assert transactions.prepare()
    with pytest.raises(StreamBroken):
        transactions.commit([], [], None, renewed)
    assert calls == ["init", "close", "init", "renewed"]
