"""The runner over a stream in memory: what it promises to every consumer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

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
    Resume,
    Retry,
    Rewind,
    Start,
)
from bourse_consumers.runner import Runner
from bourse_consumers.testing import ConsumerContract, Memory, MemoryStream, run, trade
from bourse_schemas.errors import Unreachable
from bourse_schemas.events import Reason, Stage, TradeEvent
from bourse_schemas.topics import DEAD_LETTERS, TRADES, Topic

TRADES_0 = Partition("bourse.trades", 0)


class Echo(Consumer):
    """Publishes what it reads."""

    emits: ClassVar[Sequence[Topic]] = (TRADES,)

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


class TestOwn(ConsumerContract):
    """The contract holds for a sink of its own."""

    def make(self, folder: Path) -> Consumer:
        return Lines(folder)

    def events(self) -> Sequence[TradeEvent]:
        return some(5)

    def outcome(self, memory: Memory, folder: Path) -> object:
        return Lines(folder).ids()


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

    with pytest.raises(AssertionError, match="stopped after 1 events"):
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
    """The world is at fault: nothing is skipped, and it is not hammered."""
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
    runner = Runner(consumer, stream, memory.decode, name="test")
    runner.step()
    runner.step()
    assert consumer.batches == [[1, 2]]
    assert len(stream.waited) == 4
    assert 0.25 <= stream.waited[0] <= 0.5
    assert 2.0 <= stream.waited[3] <= 4.0
    assert memory.committed == {TRADES_0: 2}


def test_retry_after_is_honoured() -> None:
    """A consumer that knows how long it takes says so."""
    memory = Memory()
    memory.append(*some(1))

    class Once(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            if not self.batches:
                self.batches.append([])
                raise Retry("rate limit", after=7)
            return super().process(batch)

    stream = MemoryStream(memory, [TRADES])
    runner = Runner(Once(), stream, memory.decode, name="test")
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
    failures = [Unreachable("the registry is away")] * 2

    def decode(record: Any) -> Any:
        if failures:
            raise failures.pop()
        return memory.decode(record)

    stream = MemoryStream(memory, [TRADES])
    runner = Runner(consumer, stream, decode, name="test")
    runner.step()
    runner.step()
    assert consumer.batches == [[1]]
    assert len(stream.waited) == 2
    assert all(emit.topic is not DEAD_LETTERS for emit in memory.emitted)


def test_rewind_goes_on_from_the_offsets_named(tmp_path: Path) -> None:
    """Another writer was faster: what it wrote is skipped, what it did not is read again."""

    class Loser(Lines):
        lost = False

        def process(self, batch: Batch) -> list[Emit] | None:
            if not self.lost:
                self.lost = True
                self.file.write_text("theirs@0")
                raise Rewind({TRADES_0: 1})
            return super().process(batch)

    memory = Memory()
    memory.append(*some(3))
    run(Loser(tmp_path), memory)
    assert Lines(tmp_path).ids() == ["theirs", *(event.event_id for event in some(2, first=2))]


def test_rewind_loses_nothing_of_partitions_it_does_not_name() -> None:
    """What was polled with the batch in hand was not taken over."""

    class Once(Echo):
        lost = False

        def open(self, assigned: Assignment) -> Own:
            return Own({})

        def process(self, batch: Batch) -> list[Emit]:
            if not self.lost:
                self.lost = True
                raise Rewind({TRADES_0: 1})
            self.batches.append([event.sequence for event in batch.events])
            return []

    memory, consumer = Memory(partitions=2), Once()
    memory.append(*some(2))
    memory.append(*some(2, first=3), partition=1)
    run(consumer, memory)
    assert consumer.batches == [[2, 3, 4]]


def test_rewind_of_a_consumer_without_offsets_of_its_own_is_a_bug() -> None:
    """Its offsets are the group's: going elsewhere would lose or repeat."""

    class Wrong(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            raise Rewind({TRADES_0: 0})

    memory = Memory()
    memory.append(*some(1))
    with pytest.raises(RuntimeError, match="keep their own offsets"):
        run(Wrong(), memory)


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
    """A consumer whose database is down can be stopped."""

    class Down(Echo):
        def process(self, batch: Batch) -> list[Emit]:
            runner.stop()
            raise Retry("the database is down", after=3600)

    memory = Memory()
    memory.append(*some(1))
    runner = Runner(Down(), MemoryStream(memory, [TRADES]), memory.decode, name="test")
    runner.run()
    assert memory.committed == {}


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
    runner = Runner(consumer, stream, memory.decode, name="test")
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

    def decode(record: Record) -> Any:
        calls.append(record.offset)
        return memory.decode(record)

    runner = Runner(consumer, MemoryStream(memory, [TRADES]), decode, name="test")
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
    """What is larger than a topic takes is cut, and says so."""
    memory = Memory()
    memory.append_bytes(TradeEvent, b"x" * 1_000_000)
    run(Echo(), memory)
    (letter,) = (emit.event for emit in memory.emitted)
    assert len(letter.payload) == 900_000  # type: ignore[attr-defined]
    assert letter.message.endswith("(the first 900000 of 1000000 bytes)")  # type: ignore[attr-defined]


def test_what_is_not_declared_is_not_published() -> None:
    """A topic that was not looked at before the start would fail in the middle of the day."""

    class Undeclared(Echo):
        emits: ClassVar[Sequence[Topic]] = ()

    memory = Memory()
    memory.append(*some(1))
    with pytest.raises(RuntimeError, match="trades"):
        run(Undeclared(), memory)


def test_markers_after_the_last_record_are_no_lag(tmp_path: Path) -> None:
    """The group's offsets reach the end, for sinks of their own as well."""
    for consumer in (Echo(), Lines(tmp_path)):
        memory = Memory(markers=True)
        memory.append(*some(3))
        run(consumer, memory)
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
    runner = Runner(consumer, MemoryStream(memory, [TRADES]), memory.decode, name="test", batch_size=1)
    wait_for(lambda: runner.step() is False and consumer.seen_by_idle)
    assert set(consumer.seen_by_idle) == {4}


def test_idle_that_asks_to_wait_is_left_alone(wait_for: Callable[..., Any]) -> None:
    """A database that is down is not asked, and not logged, twice a second."""

    class Impatient(Echo):
        calls = 0

        def idle(self, now: datetime) -> None:
            self.calls += 1
            raise Retry("the database is down", after=3600)

    memory, consumer = Memory(), Impatient()
    runner = Runner(consumer, MemoryStream(memory, [TRADES]), memory.decode, name="test")
    began = time.monotonic()
    wait_for(lambda: runner.step() is False and time.monotonic() > began + 0.6)
    assert consumer.calls == 1


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
    runner = Runner(consumer, MemoryStream(memory, [TRADES]), memory.decode, name="test")
    wait_for(lambda: runner.step() is False and consumer.ticks >= 2)
    assert len(memory.emitted) == consumer.ticks
