"""What a plug-in's author needs to test it without Kafka.

    memory = Memory()
    memory.append(trade(last_price=5500), trade(sequence=2, last_price=5800))
    run(MyConsumer(), memory)
    assert [emit.event.rule for emit in memory.emitted] == ["..."]

`ConsumerContract` is a test suite to inherit from: it says whether a consumer keeps what the SDK promises through
restarts, kills, rebalances, failed transactions and any size of batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from msgspec import structs

from bourse_consumers.api import Assignment, Consumer, Emit, Offsets, Partition, Record
from bourse_consumers.runner import NO_NOTES, Poll, Runner, StreamBroken
from bourse_schemas.codec import Deserializer, Serializer, avro_schema
from bourse_schemas.events import DeadLetter, Event, Op, TradeEvent
from bourse_schemas.topics import DEFAULT_PREFIX, TOPICS, Topic, event_id, topic_of

__all__ = ["ConsumerContract", "Memory", "MemoryStream", "run", "trade"]

# How often a consumer may ask to wait in a test.
PATIENCE = 100
SERIALIZERS: dict[type[Event], Serializer[Any]] = {
    topic.event: Serializer(topic, number, DEFAULT_PREFIX) for number, topic in enumerate(TOPICS, 1)
}
SCHEMAS = {number: avro_schema(topic.event) for number, topic in enumerate(TOPICS, 1)}
DECODERS: dict[str, Deserializer[Any]] = {
    topic.full_name(): Deserializer(topic.event, SCHEMAS.__getitem__) for topic in TOPICS
}


def trade(**fields: Any) -> TradeEvent:
    """Return a plausible TradeEvent; any field can be given, `event_id` follows from the others."""
    trading_day = fields.get("trading_day", date(2026, 11, 23))
    sequence = fields.get("sequence", 1)
    instrument = fields.get("instrument", "IRO1MADN0001")
    opened = datetime(trading_day.year, trading_day.month, trading_day.day, 5, 30, tzinfo=UTC)
    observed_at = opened + timedelta(minutes=sequence)
    plausible: dict[str, Any] = {
        "event_id": event_id(instrument, trading_day, sequence),
        "op": Op.OPENED if sequence == 1 else Op.TRADED,
        "instrument": instrument,
        "sequence": sequence,
        "trading_day": trading_day,
        "traded_at": fields.get("observed_at", observed_at),
        "traded_at_estimated": False,
        "observed_at": observed_at,
        "poll_sequence": sequence,
        "source": "finnotech/trades-realtime",
        "symbol": "ومعادن",
        "symbol_raw": "ومعادن",
        "title": "سرمایه گذاری توسعه معادن و فلزات",
        "is_right": False,
        "last_price": 5488,
        "closing_price": 5477,
        "previous_close": 5477,
        "volume": 51205 * sequence,
        "value": 281013040 * sequence,
        "trade_count": 16 * sequence,
        "volume_delta": 51205,
        "value_delta": 281013040,
        "trade_count_delta": 16,
    }
    return TradeEvent(**{**plausible, **fields})


class Memory:
    """A broker in memory: what was appended, what a group has committed, what was published.

    With `markers` each append takes one offset more, as a transaction does: offsets have holes, and a partition's end
    lies beyond its last record.
    """

    def __init__(self, partitions: int = 1, *, markers: bool = False) -> None:
        self.partitions = partitions
        self.markers = markers
        self.records: dict[Partition, list[Record | None]] = {}
        self.committed: dict[Partition, int] = {}
        self.notes: dict[Partition, str] = {}
        self.emitted: list[Emit] = []

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
                yield from (self.decode(record) for record in log if record is not None)
        yield from (emit.event for emit in self.emitted if emit.topic == topic)

    @staticmethod
    def decode(record: Record) -> Any:
        """Return the record's event; raises Undecodable."""
        return DECODERS[record.partition.topic](record.value)


class MemoryStream:
    """One member reading everything in a Memory; see `bourse_consumers.runner.Stream`.

    `failing` says how many of the next commits fail; `waited` holds the seconds it was asked to wait, and did not.
    """

    def __init__(self, memory: Memory, topics: Sequence[Topic]) -> None:
        self._memory = memory
        names = [topic.full_name() for topic in topics]
        self._partitions = [Partition(name, number) for name in names for number in range(memory.partitions)]
        self._next: dict[Partition, int] = {}
        self._changed = True
        self.failing = 0
        self.waited: list[float] = []

    def poll(self, timeout: float, limit: int) -> Poll:  # noqa: ARG002  # nothing arrives later
        """Return the assignment, then what is there."""
        if self._changed:
            self._changed = False
            self._next = {partition: self._memory.committed.get(partition, 0) for partition in self._partitions}
            fresh = [partition for partition in self._partitions if partition not in self._memory.committed]
            start = dict.fromkeys(self._partitions, 0)
            notes = dict(self._memory.notes)
            assigned = Assignment(self._next, lambda: start, notes=notes, fresh=fresh, read=self._memory.read)
            return Poll(assigned=assigned)
        records: list[Record] = []
        positions: dict[Partition, int] = {}
        for partition in self._partitions:
            for entry in self._memory.records.get(partition, [])[self._next[partition] :]:
                if entry is not None:
                    if len(records) == limit:
                        break
                    records.append(entry)
                self._next[partition] += 1
                positions[partition] = self._next[partition]
        return Poll(records, positions)

    def seek(self, offsets: Offsets) -> None:
        """Go on from these offsets."""
        self._next.update(offsets)

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Note that it would wait."""
        self.waited.append(seconds)
        if len(self.waited) > PATIENCE:
            raise AssertionError(f"the consumer has asked to wait {PATIENCE} times: does it ever get on?")
        return not self._changed and not stopped()

    def commit(self, emits: Sequence[Emit], offsets: Offsets, notes: Mapping[Partition, str] = NO_NOTES) -> None:
        """Publish and commit, at once."""
        if self.failing:
            self.failing -= 1
            raise StreamBroken("told to fail")
        for topic, event in emits:
            SERIALIZERS[topic.event](event)  # what cannot be encoded could not be published
        self._memory.emitted += emits
        self._memory.committed.update(offsets)
        self._memory.notes.update({partition: notes.get(partition, "") for partition in offsets})

    def hint(self, offsets: Offsets) -> None:
        """Commit for dashboards."""
        self._memory.committed.update(offsets)

    def reset(self) -> None:
        """Begin with the same partitions anew, as after a rebalance or a failed transaction."""
        self._changed = True

    def lag(self) -> int:
        """Return how many offsets were not read."""
        return sum(len(log) - self._next.get(partition, 0) for partition, log in self._memory.records.items())

    def aging(self) -> float:
        """Return 0: memory deletes nothing."""
        return 0.0

    def close(self) -> None:
        """Do nothing."""


def run(
    consumer: Consumer,
    memory: Memory,
    *,
    batch_size: int = 1000,
    rounds: int | None = None,
    stream: MemoryStream | None = None,
) -> None:
    """Run a consumer over what is in memory, then stop it in good order.

    With `rounds` it is dropped after so many rounds (an assignment or a batch each), as by kill -9.
    """
    stream = stream or MemoryStream(memory, consumer.topics)
    runner = Runner(consumer, stream, memory.decode, name="test", batch_size=batch_size)
    for _ in range(rounds) if rounds is not None else count():
        try:
            if not runner.step() and rounds is None:
                break
        except StreamBroken:
            stream.reset()
    if rounds is None:
        runner.stop()
        runner.run()


class ConsumerContract:
    """Inherit from it, give `make` and `events`, and pytest runs the tests. A sink of its own also gives `outcome`.

    A consumer passes when what it brings about depends on the records alone: not on how they came in batches, nor on
    stops, kills, rebalances and failed transactions in between.
    """

    def make(self, folder: Path) -> Consumer:
        """Return a new consumer; `folder` is the same for one that takes over from another."""
        raise NotImplementedError

    def events(self) -> Sequence[Event]:
        """Return events, of one topic, that make the consumer do something."""
        raise NotImplementedError

    def outcome(self, memory: Memory, folder: Path) -> object:  # noqa: ARG002  # a sink looks at its folder
        """Return all that the consumer brought about: by default what it published."""
        return [structs.astuple(emit.event) for emit in memory.emitted]

    def _memory(self, *, markers: bool = False) -> Memory:
        memory = Memory(markers=markers)
        memory.append(*self.events())
        return memory

    def _expected(self, folder: Path) -> object:
        memory = self._memory()
        run(self.make(folder), memory)
        return self.outcome(memory, folder)

    def test_brings_something_about(self, tmp_path: Path) -> None:
        """The other tests compare outcomes: an empty one would prove nothing."""
        assert self._expected(tmp_path)

    def test_the_size_of_batches_does_not_matter(self, tmp_path: Path) -> None:
        """One record at a time gives the same as all at once."""
        memory = self._memory()
        run(self.make(tmp_path / "found"), memory, batch_size=1)
        assert self.outcome(memory, tmp_path / "found") == self._expected(tmp_path / "expected")

    def test_a_stop_and_a_start_lose_and_repeat_nothing(self, tmp_path: Path) -> None:
        """Stopped after any event and started again, the outcome is that of an undisturbed run."""
        expected, events = self._expected(tmp_path / "expected"), self.events()
        for split in range(len(events) + 1):
            memory, folder = Memory(markers=True), tmp_path / str(split)
            memory.append(*events[:split])
            run(self.make(folder), memory)
            memory.append(*events[split:])
            run(self.make(folder), memory)
            assert self.outcome(memory, folder) == expected, f"stopped after {split} events"

    def test_a_kill_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """Dropped between any two batches, without a word, the outcome is that of an undisturbed run."""
        expected = self._expected(tmp_path / "expected")
        for rounds in range(1, len(self.events()) + 2):
            memory, folder = self._memory(markers=True), tmp_path / str(rounds)
            run(self.make(folder), memory, batch_size=1, rounds=rounds)
            run(self.make(folder), memory)
            assert self.outcome(memory, folder) == expected, f"killed after {rounds} rounds"

    def test_a_rebalance_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """Opened anew between any two batches, it knows no more than what is committed or in its sink."""
        expected = self._expected(tmp_path / "expected")
        for rounds in range(1, len(self.events()) + 2):
            memory, folder = self._memory(), tmp_path / str(rounds)
            consumer = self.make(folder)
            stream = MemoryStream(memory, consumer.topics)
            run(consumer, memory, batch_size=1, rounds=rounds, stream=stream)
            stream.reset()
            run(consumer, memory, stream=stream)
            assert self.outcome(memory, folder) == expected, f"rebalanced after {rounds} rounds"

    def test_a_failed_transaction_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """What could not be committed comes again, to a consumer that was opened anew."""
        expected = self._expected(tmp_path / "expected")
        for rounds in range(len(self.events()) + 1):
            memory, folder = self._memory(), tmp_path / str(rounds)
            consumer = self.make(folder)
            stream = MemoryStream(memory, consumer.topics)
            run(consumer, memory, batch_size=1, rounds=rounds, stream=stream)
            stream.failing = 1
            run(consumer, memory, batch_size=1, stream=stream)
            assert self.outcome(memory, folder) == expected, f"failed after {rounds} rounds"

    def test_an_undecodable_record_does_not_stop_it(self, tmp_path: Path) -> None:
        """It becomes a dead letter, and the rest is consumed as if it were not there."""
        memory, folder = Memory(), tmp_path / "found"
        events = self.events()
        memory.append(*events[:1])
        memory.append_bytes(type(events[0]), b"not ours")
        memory.append(*events[1:])
        run(self.make(folder), memory)
        letters = [emit.event for emit in memory.emitted if isinstance(emit.event, DeadLetter)]
        memory.emitted = [emit for emit in memory.emitted if not isinstance(emit.event, DeadLetter)]
        assert [letter.payload for letter in letters] == [b"not ours"]
        assert self.outcome(memory, folder) == self._expected(tmp_path / "expected")
