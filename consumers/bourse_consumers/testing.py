"""Test a consumer without Kafka, with the real runner.

    memory = Memory()
    memory.append(trade(last_price=5500), trade(sequence=2, last_price=5800))
    run(MyConsumer(), memory)
    assert [emit.event.rule for emit in memory.emitted] == ["..."]

`ConsumerContract` is a test suite to inherit from: it checks that a consumer loses and repeats nothing through
restarts, kills, rebalances, failed transactions, a second writer, bad records and any size of batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, time, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from bourse_consumers.api import Assignment, Consumer, Decoders, Emit, MarketConsumer, Offsets, Partition, Record
from bourse_consumers.market import CHECK_SECONDS, Polls
from bourse_consumers.runner import Poll, Runner, StreamBroken
from bourse_schemas.codec import Deserializer, Serializer, avro_schema
from bourse_schemas.events import TEHRAN, DeadLetter, Event, Op, Outcome, PollMarker, TradeEvent
from bourse_schemas.topics import DEFAULT_PREFIX, POLLS, TOPICS, TRADES, Topic, event_id, topic_of

__all__ = ["ConsumerContract", "Memory", "MemoryMarket", "MemoryStream", "marker", "run", "stream_of", "trade"]

POLLS_0 = Partition(POLLS.full_name(), 0)
# How often a consumer may ask to wait in a test.
PATIENCE = 100
SERIALIZERS: dict[type[Event], Serializer[Any]] = {
    topic.event: Serializer(topic, number, DEFAULT_PREFIX) for number, topic in enumerate(TOPICS, 1)
}
SCHEMAS = {number: avro_schema(topic.event) for number, topic in enumerate(TOPICS, 1)}
DECODERS: dict[str, Deserializer[Any]] = {
    topic.full_name(): Deserializer(topic.event, SCHEMAS.__getitem__) for topic in TOPICS
}
PLAUSIBLE = msgspec.json.decode(Path(__file__).with_name("plausible.json").read_bytes())
TRADE, MARKER = msgspec.convert(PLAUSIBLE["trade"], TradeEvent), msgspec.convert(PLAUSIBLE["marker"], PollMarker)


def trade(**fields: Any) -> TradeEvent:
    """Return a plausible TradeEvent; any field can be given, times, totals and `event_id` are derived from others."""
    day, sequence = fields.get("trading_day", TRADE.trading_day), fields.get("sequence", 1)
    at = fields.get("observed_at", datetime.combine(day, time(5, 30), UTC) + timedelta(minutes=sequence))
    derived: dict[str, Any] = {name: getattr(TRADE, name) * sequence for name in ("volume", "value", "trade_count")}
    derived |= {"observed_at": at, "traded_at": at, "poll_sequence": sequence}
    derived["event_id"] = event_id(fields.get("instrument", TRADE.instrument), day, sequence)
    derived["op"] = Op.OPENED if sequence == 1 else Op.TRADED
    return structs.replace(TRADE, **{**derived, **fields})


def marker(*events: TradeEvent, **fields: Any) -> PollMarker:
    """Return a plausible marker of the poll that these events belong to; any field can be given."""
    at = fields.get("requested_at", events[0].observed_at if events else MARKER.requested_at)
    counted = (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)
    derived: dict[str, Any] = {op.lower(): sum(event.op == op for event in events) for op in counted}
    derived |= {"requested_at": at, "received_at": at, "next_poll_at": at + timedelta(minutes=1), "rows": len(events)}
    derived["session_day"] = at.astimezone(TEHRAN).date()
    if events:
        derived |= {"poll_sequence": events[0].poll_sequence, "outcome": Outcome.PUBLISHED}
    return structs.replace(MARKER, **{**derived, **fields})


class Memory:
    """A broker in memory: what was appended, what the group has committed, what was published.

    With `markers` each append takes one offset more, as a transaction does: offsets have holes, and the end of a
    partition is beyond its last record.
    """

    decoders = Decoders(DECODERS)

    def __init__(self, partitions: int = 1, *, markers: bool = False) -> None:
        self.partitions, self.markers = partitions, markers
        self.records: dict[Partition, list[Record | None]] = {}
        self.committed: dict[Partition, int] = {}
        self.emitted: list[Emit] = []
        # Which assignment is the last one: the group refuses commits of earlier ones.
        self.generation = 0

    def append(self, *events: Event, partition: int = 0) -> None:
        """Append events to a partition of their topic, as bytes."""
        for event in events:
            made = SERIALIZERS[type(event)](event)
            self._append(made.topic, partition, made.timestamp, made.key, made.value)

    def append_bytes(self, event: type[Event], value: bytes, partition: int = 0) -> None:
        """Append a record of any bytes to the topic of an event type."""
        self._append(topic_of(event).full_name(), partition, 0, None, value)

    def _append(self, topic: str, number: int, timestamp: int, key: bytes | None, value: bytes) -> None:
        partition = Partition(topic, number)
        log = self.records.setdefault(partition, [])
        log.append(Record(partition, len(log), timestamp, key, value, {}))
        if self.markers:
            log.append(None)

    def read(self, topic: Topic) -> Iterator[Event]:
        """Yield the events of a topic: those appended, and those published."""
        for place, log in self.records.items():
            if place.topic == topic.full_name():
                yield from (self.decoders.event(record) for record in log if record is not None)
        yield from (emit.event for emit in self.emitted if emit.topic == topic)


class MemoryStream:
    """One member that reads everything in a Memory; see `bourse_consumers.runner.Stream`.

    `failing` is how many of the next commits fail; `waited` holds the seconds it was asked to wait, and did not.
    """

    def __init__(self, memory: Memory, topics: Sequence[Topic], *, from_end: bool = False) -> None:
        self._memory, self._from_end = memory, from_end
        names = [topic.full_name() for topic in topics]
        self._partitions = [Partition(name, number) for name in names for number in range(memory.partitions)]
        self.decoders = memory.decoders
        self._next: dict[Partition, int] = {}
        self._changed = True
        self._generation = self.failing = 0
        self.waited: list[float] = []

    def poll(self, timeout: float, limit: int) -> Poll:  # noqa: ARG002  # nothing arrives later
        """Return the assignment, then what is there."""
        if self._changed:
            self._changed = False
            self._generation = self._memory.generation = self._memory.generation + 1
            return Poll(assigned=self._assignment())
        records: list[Record] = []
        positions: dict[Partition, int] = {}
        for partition, at in self._next.items():
            for entry in self._memory.records.get(partition, [])[at:]:
                if entry is not None:
                    if len(records) == limit:
                        break
                    records.append(entry)
                positions[partition] = positions.get(partition, at) + 1
        self._next |= positions
        return Poll(records, positions)

    def _assignment(self) -> Assignment:
        committed = self._memory.committed
        if self._from_end:
            for partition in self._partitions:
                committed.setdefault(partition, len(self._memory.records.get(partition, [])))
        start = dict.fromkeys(self._partitions, 0)
        begin = {partition: committed.get(partition, 0) for partition in self._partitions}
        fresh = [partition for partition in self._partitions if partition not in committed]
        return Assignment(begin, lambda: start, start, fresh=fresh, read=self._memory.read)

    def seek(self, offsets: Offsets) -> None:
        """Read from these offsets."""
        self._next = dict(offsets)

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Note that it would wait."""
        self.waited.append(seconds)
        assert len(self.waited) <= PATIENCE, f"the consumer has asked to wait {PATIENCE} times: does it ever get on?"
        return not self._changed and not stopped()

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish and commit, at once."""
        if self.failing:
            self.failing -= 1
            raise StreamBroken("this commit was to fail")
        if self._changed or self._generation != self._memory.generation:
            raise StreamBroken("the group gave our partitions away")
        for topic, event in emits:
            SERIALIZERS[topic.event](event)  # what cannot be encoded could not be published
        self._memory.emitted += emits
        self._memory.committed.update(offsets)

    def reset(self) -> None:
        """Begin with the same partitions again, as after a rebalance or a failed transaction."""
        self._changed = True

    def lag(self) -> int:
        """Return how many offsets were not read."""
        return sum(len(log) - self._next.get(partition, 0) for partition, log in self._memory.records.items())

    def close(self) -> None:
        """Do nothing."""


class MemoryMarket(MemoryStream):
    """The active member of a market consumer's group; a group without committed polls begins at their end."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory, [POLLS], from_end=True)
        self._partitions = [POLLS_0]
        self._trades = [Partition(TRADES.full_name(), number) for number in range(memory.partitions)]
        self.decoders: Polls = Polls(DECODERS, POLLS_0)

    def seek(self, offsets: Offsets) -> None:
        """Read polls from this offset, and all trades."""
        self.decoders.clear()
        self._next = {**offsets, **dict.fromkeys(self._trades, 0)}

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return the assignment, then the markers of whole polls; what is missing now is missing for good."""
        poll, polls = super().poll(timeout, 1_000_000), self.decoders
        if poll.assigned is not None:
            return poll
        polls.add(poll.records)
        ready = polls.ready(limit) or polls.lost(0.0, self._next, dict) or polls.lost(CHECK_SECONDS, self._next, dict)
        at = ready[-1].offset + 1 if ready else self._next[POLLS_0]
        return Poll(ready, {POLLS_0: at} if ready or not len(polls) else {})


def stream_of(consumer: Consumer | MarketConsumer, memory: Memory) -> MemoryStream:
    """Return the stream that a consumer needs. A market consumer's group has committed polls: it gets all as new."""
    if isinstance(consumer, MarketConsumer):
        memory.committed.setdefault(POLLS_0, 0)
        return MemoryMarket(memory)
    return MemoryStream(memory, consumer.topics, from_end=consumer.from_end)


def run(
    consumer: Consumer | MarketConsumer,
    memory: Memory,
    *,
    batch_size: int = 1000,
    rounds: int | None = None,
    stream: MemoryStream | None = None,
) -> Runner:
    """Run a consumer over what is in memory, then stop it in good order; return its runner.

    With `rounds` it is dropped after that many rounds (an assignment or a batch each), as by kill -9.
    """
    stream = stream or stream_of(consumer, memory)
    runner = Runner(consumer, stream, name="test", batch_size=batch_size)
    for _ in count() if rounds is None else range(rounds):
        try:
            if not runner.step() and rounds is None:
                break
        except StreamBroken:
            stream.reset()
    if rounds is None:
        runner.stop()
        runner.run()
    return runner


class ConsumerContract:
    """Inherit from it, implement `make` and `events`, and pytest runs the tests; a sink also implements `outcome`.

    A consumer passes if its outcome depends on the records alone: not on the size of batches, and not on stops, kills,
    rebalances, failed transactions and second writers.
    """

    def make(self, folder: Path) -> Consumer | MarketConsumer:
        """Return a new consumer; `folder` is the same for one that takes over from another."""
        raise NotImplementedError

    def events(self) -> Sequence[Event]:
        """Return events that make the consumer do something; a poll's marker comes after its events."""
        raise NotImplementedError

    def outcome(self, memory: Memory, folder: Path) -> object:  # noqa: ARG002  # for sinks
        """Return the consumer's whole outcome: by default what it published."""
        return [structs.astuple(emit.event) for emit in memory.emitted]

    def test_has_an_outcome(self, tmp_path: Path) -> None:
        """The other tests compare outcomes: an empty one would prove nothing."""
        assert self._undisturbed(tmp_path)

    def test_the_size_of_batches_does_not_matter(self, tmp_path: Path) -> None:
        """One record at a time gives the same as all at once."""
        self._survives(tmp_path, "one by one", lambda memory, make, _: run(make(), memory, batch_size=1), 1)

    def test_a_stop_and_a_start_lose_and_repeat_nothing(self, tmp_path: Path) -> None:
        """Stopped after any event and started again, the outcome is that of an undisturbed run."""

        def stop(memory: Memory, make: Make, events: int) -> None:
            memory.records.clear()
            memory.append(*self.events()[:events])
            run(make(), memory)
            memory.append(*self.events()[events:])

        self._survives(tmp_path, "stopped", stop)

    def test_a_kill_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """Killed between any two batches, the outcome is that of an undisturbed run."""
        self._survives(tmp_path, "killed", lambda memory, make, n: run(make(), memory, batch_size=1, rounds=n))

    def test_a_rebalance_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """Opened again between any two batches, it knows only what is committed or in its sink."""
        self._survives(tmp_path, "rebalanced", lambda memory, make, n: _interrupted(make(), memory, n, fails=False))

    def test_a_failed_transaction_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """What could not be committed is delivered again, after `open`."""
        self._survives(tmp_path, "failed", lambda memory, make, n: _interrupted(make(), memory, n, fails=True))

    def test_a_redelivery_changes_nothing(self, tmp_path: Path) -> None:
        """If the group's offsets are lost, a sink goes on at its own."""

        def lose(memory: Memory, make: Make, _: int) -> None:
            if run(make(), memory).owns_offsets:
                memory.committed.clear()

        self._survives(tmp_path, "redelivered", lose, 1)

    def test_two_writers_lose_and_repeat_nothing(self, tmp_path: Path) -> None:
        """A member that does not know yet that it was replaced goes on; the group refuses its commits, not its sink's.

        A sink with its own offsets has to notice that another writer was faster, and raise Reopen.
        """

        def double(memory: Memory, make: Make, rounds: int) -> None:
            old, new = writers = [run(make(), memory, batch_size=1, rounds=0) for _ in range(2)]
            for _ in range(rounds):
                old.step()
            new.step()
            for _ in range(len(self.events()) + 5):
                for writer in list(writers):
                    try:
                        writer.step()
                    except StreamBroken:  # the group refused the commit: nothing of this writer was kept
                        writers.remove(writer)
            for writer in writers:
                writer.stop()
                writer.run()

        self._survives(tmp_path, "a second writer", double)

    def test_an_undecodable_record_does_not_stop_it(self, tmp_path: Path) -> None:
        """It becomes a dead letter, and the rest is consumed as if it were not there."""
        events, memory = self.events(), self._filled()
        memory.records.clear()
        memory.append(*events[:1])
        memory.append_bytes(type(events[0]), b"not ours")
        memory.append(*events[1:])
        run(self.make(tmp_path / "found"), memory)
        letters = [emit.event for emit in memory.emitted if isinstance(emit.event, DeadLetter)]
        memory.emitted = [emit for emit in memory.emitted if not isinstance(emit.event, DeadLetter)]
        assert [letter.payload for letter in letters] == [b"not ours"]
        assert self.outcome(memory, tmp_path / "found") == self._undisturbed(tmp_path / "expected")

    def _filled(self) -> Memory:
        memory = Memory(markers=True)
        memory.committed[POLLS_0] = 0
        memory.append(*self.events())
        return memory

    def _undisturbed(self, folder: Path) -> object:
        memory = self._filled()
        run(self.make(folder), memory)
        return self.outcome(memory, folder)

    def _survives(
        self, tmp_path: Path, what: str, disturb: Callable[[Memory, Make, int], object], times: int = 0
    ) -> None:
        """Assert that a successor makes the outcome what it is undisturbed, after however many rounds it happened."""
        expected = self._undisturbed(tmp_path / "expected")
        for late in range(times or len(self.events()) + 2):
            memory, folder = self._filled(), tmp_path / str(late)
            disturb(memory, lambda folder=folder: self.make(folder), late)  # type: ignore[misc]  # a default, no parameter
            run(self.make(folder), memory)
            assert self.outcome(memory, folder) == expected, f"{what} after {late}"


Make = Callable[[], Consumer | MarketConsumer]


def _interrupted(consumer: Consumer | MarketConsumer, memory: Memory, rounds: int, *, fails: bool) -> None:
    """Run it; after some rounds its next transaction fails, or its partitions are assigned again."""
    stream = stream_of(consumer, memory)
    run(consumer, memory, batch_size=1, rounds=rounds, stream=stream)
    if fails:
        stream.failing = 1
    else:
        stream.reset()
    run(consumer, memory, batch_size=1, stream=stream)
