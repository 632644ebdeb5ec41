"""The runner over a stream in memory: what it promises to every consumer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

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
    Reject,
    Resume,
    Retry,
    Rewind,
    Start,
)
from bourse_consumers.runner import Runner, StreamBroken
from bourse_consumers.testing import ConsumerContract, Memory, MemoryStream, run, trade
from bourse_schemas.errors import Unreachable
from bourse_schemas.events import Reason, Stage, TradeEvent
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, TRADES

TRADES_0 = Partition("bourse.trades", 0)


class Echo(Consumer):
    """Publishes what it reads."""

    emits = (TRADES,)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def process(self, batch: Batch) -> list[Emit]:
        self.batches.append([event.sequence for event in batch.events])
        return [Emit(ALERTS, event) for event in batch.events]


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
            emits.append(Emit(ALERTS, trade(sequence=event.sequence, volume=self.seen)))
        return emits


class Lines(Consumer):
    """A sink that keeps its offset with its data, in one file; it buffers two records."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "lines"
        self.buffer: list[str] = []

    def lines(self) -> list[str]:
        return self.file.read_text().split() if self.file.exists() else []

    def open(self, assigned: Assignment) -> Own:
        self.buffer = []
        return Own({partition: len(self.lines()) for partition in assigned})

    def process(self, batch: Batch) -> None:
        self.buffer += [event.event_id for event in batch.events]
        if len(self.buffer) > 2:
            self.close()

    def durable(self) -> Offsets:
        return {TRADES_0: len(self.lines())}

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


class TestOwnSkipsNothing(ConsumerContract):
    """The contract holds for a sink of its own."""

    def make(self, folder: Path) -> Consumer:
        return Lines(folder)

    def events(self) -> Sequence[TradeEvent]:
        return some(5)

    def outcome(self, memory: Memory, folder: Path) -> object:
        return Lines(folder).lines()

    def test_an_undecodable_record_does_not_stop_it(self, tmp_path: Path) -> None:
        """This little sink counts lines as offsets, so a record it never sees would shift it."""


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
    stream = MemoryStream(memory, ["bourse.trades"])
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

    stream = MemoryStream(memory, ["bourse.trades"])
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
    assert letter.payload == memory.records[TRADES_0][1].value  # type: ignore[attr-defined]
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

    stream = MemoryStream(memory, ["bourse.trades"])
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

        def process(self, batch: Batch) -> None:
            if not self.lost:
                self.lost = True
                self.file.write_text("theirs")
                raise Rewind({TRADES_0: 1})
            super().process(batch)

    memory = Memory()
    memory.append(*some(3))
    run(Loser(tmp_path), memory)
    assert Lines(tmp_path).lines() == ["theirs", *(event.event_id for event in some(2, first=2))]


def test_a_broken_transaction_starts_over_and_loses_nothing() -> None:
    """After any error of a transaction everything since the last commit is void and comes again."""

    class Breaking(MemoryStream):
        breaks = 2

        def commit(self, emits: Any, offsets: Offsets) -> None:
            if self.breaks:
                self.breaks -= 1
                raise StreamBroken("fenced")
            super().commit(emits, offsets)
            if self._memory.committed[TRADES_0] == 3:
                runner.stop()

    memory, consumer = Memory(), Summing()
    memory.append(*some(3))
    runner = Runner(consumer, Breaking(memory, ["bourse.trades"]), memory.decode, name="test")
    runner.run()
    assert [emit.event.volume for emit in memory.emitted] == [1, 2, 3]  # type: ignore[attr-defined]


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
            return [Emit(ALERTS, trade(sequence=self.ticks))]

    memory, consumer = Memory(), Ticking()
    runner = Runner(consumer, MemoryStream(memory, ["bourse.trades"]), memory.decode, name="test")
    wait_for(lambda: runner.step() is False and consumer.ticks >= 2)
    assert len(memory.emitted) == consumer.ticks
