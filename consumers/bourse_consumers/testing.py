"""What a plug-in's author needs to test it without Kafka.

    memory = Memory()
    memory.append(trade(last_price=5500), trade(sequence=2, last_price=5800))
    run(MyConsumer(), memory)
    assert [emit.event.rule for emit in memory.emitted] == ["..."]

`ConsumerContract` is a test suite to inherit from: it says whether a consumer keeps what the SDK promises through
restarts, kills and any size of batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from msgspec import structs

from bourse_consumers.api import Assignment, Consumer, Emit, Offsets, Partition, Record
from bourse_consumers.runner import Poll, Runner
from bourse_schemas.codec import Deserializer, Serializer, avro_schema
from bourse_schemas.events import Event, Op, TradeEvent
from bourse_schemas.topics import DEFAULT_PREFIX, TOPICS, event_id, topic_of

__all__ = ["ConsumerContract", "Memory", "run", "trade"]

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
        "backfilled": False,
    }
    return TradeEvent(**{**plausible, **fields})


class Memory:
    """A broker in memory: what was appended, what a group has committed, what was published."""

    def __init__(self, partitions: int = 1) -> None:
        self.partitions = partitions
        self.records: dict[Partition, list[Record]] = {}
        self.committed: dict[Partition, int] = {}
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

    @staticmethod
    def decode(record: Record) -> Any:
        """Return the record's event; raises Undecodable."""
        return DECODERS[record.partition.topic](record.value)


class MemoryStream:
    """One member reading everything in a Memory; see `bourse_consumers.runner.Stream`."""

    def __init__(self, memory: Memory, topics: Iterable[str]) -> None:
        self._memory = memory
        self._partitions = [Partition(topic, number) for topic in topics for number in range(memory.partitions)]
        self._next: dict[Partition, int] = {}
        self._changed = True
        self.waited: list[float] = []

    def poll(self, timeout: float, limit: int) -> Poll:  # noqa: ARG002  # nothing arrives later
        """Return the assignment, then what is there."""
        if self._changed:
            self._changed = False
            self._next = {partition: self._memory.committed.get(partition, 0) for partition in self._partitions}
            return Poll(assigned=Assignment(self._next, lambda: dict.fromkeys(self._partitions, 0)))
        records: list[Record] = []
        for partition in self._partitions:
            log = self._memory.records.get(partition, [])
            part = log[self._next[partition] : self._next[partition] + limit - len(records)]
            records += part
            self._next[partition] += len(part)
        return Poll(records, {record.partition: record.offset + 1 for record in records})

    def seek(self, offsets: Offsets) -> None:
        """Go on from these offsets."""
        self._next.update(offsets)

    def wait(self, seconds: float) -> bool:
        """Note that it would wait."""
        self.waited.append(seconds)
        return True

    def commit(self, emits: Iterable[Emit], offsets: Offsets) -> None:
        """Publish and commit, at once."""
        self._memory.emitted += emits
        self._memory.committed.update(offsets)

    def hint(self, offsets: Offsets) -> None:
        """Commit for dashboards."""
        self._memory.committed.update(offsets)

    def reset(self) -> None:
        """Begin with the same partitions anew."""
        self._changed = True

    def lag(self) -> int:
        """Return how many records were not read."""
        return sum(len(log) - self._next.get(partition, 0) for partition, log in self._memory.records.items())

    def close(self) -> None:
        """Do nothing."""


def run(consumer: Consumer, memory: Memory, *, batch_size: int = 1000, rounds: int | None = None) -> None:
    """Run a consumer over what is in memory, then stop it in good order.

    With `rounds` it is dropped after so many rounds (an assignment or a batch each), as by kill -9.
    """
    stream = MemoryStream(memory, [topic.full_name() for topic in consumer.topics])
    runner = Runner(consumer, stream, memory.decode, name="test", batch_size=batch_size)
    if rounds is not None:
        for _ in range(rounds):
            runner.step()
        return
    while runner.step():
        pass
    runner.stop()
    runner.run()


class ConsumerContract:
    """Inherit from it, give `make` and `events`, and pytest runs the tests. A sink of its own also gives `outcome`."""

    def make(self, folder: Path) -> Consumer:
        """Return a new consumer; `folder` is the same for one that takes over from another."""
        raise NotImplementedError

    def events(self) -> Sequence[Event]:
        """Return events that make the consumer do something."""
        raise NotImplementedError

    def outcome(self, memory: Memory, folder: Path) -> object:  # noqa: ARG002  # a sink looks at its folder
        """Return all that the consumer brought about: by default what it published."""
        return [structs.astuple(emit.event) for emit in memory.emitted]

    def _undisturbed(self, folder: Path) -> object:
        memory = Memory()
        memory.append(*self.events())
        run(self.make(folder), memory)
        return self.outcome(memory, folder)

    def test_brings_something_about(self, tmp_path: Path) -> None:
        """The other tests compare outcomes: an empty one would prove nothing."""
        assert self._undisturbed(tmp_path)

    def test_the_size_of_batches_does_not_matter(self, tmp_path: Path) -> None:
        """One record at a time gives the same as all at once."""
        expected = self._undisturbed(tmp_path / "expected")
        memory = Memory()
        memory.append(*self.events())
        run(self.make(tmp_path / "found"), memory, batch_size=1)
        assert self.outcome(memory, tmp_path / "found") == expected

    def test_a_stop_and_a_start_lose_and_repeat_nothing(self, tmp_path: Path) -> None:
        """Stopped after any event and started again, the outcome is that of an undisturbed run."""
        expected = self._undisturbed(tmp_path / "expected")
        events = self.events()
        for split in range(len(events) + 1):
            memory, folder = Memory(), tmp_path / str(split)
            memory.append(*events[:split])
            run(self.make(folder), memory)
            memory.append(*events[split:])
            run(self.make(folder), memory)
            assert self.outcome(memory, folder) == expected, f"stopped after {split} events"

    def test_a_kill_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        """Dropped between any two batches, without a word, the outcome is that of an undisturbed run."""
        expected = self._undisturbed(tmp_path / "expected")
        for rounds in range(1, len(self.events()) + 2):
            memory, folder = Memory(), tmp_path / str(rounds)
            memory.append(*self.events())
            run(self.make(folder), memory, batch_size=1, rounds=rounds)
            run(self.make(folder), memory)
            assert self.outcome(memory, folder) == expected, f"killed after {rounds} rounds"

    def test_an_undecodable_record_does_not_stop_it(self, tmp_path: Path) -> None:
        """It becomes a dead letter, and the rest is consumed as if it were not there."""
        expected = self._undisturbed(tmp_path / "expected")
        memory, folder = Memory(), tmp_path / "found"
        events = self.events()
        memory.append(*events[:1])
        memory.append_bytes(type(events[0]), b"not ours")
        memory.append(*events[1:])
        run(self.make(folder), memory)
        letters = [emit for emit in memory.emitted if emit.topic.name == "dead-letters"]
        memory.emitted = [emit for emit in memory.emitted if emit.topic.name != "dead-letters"]
        assert [letter.event.payload for letter in letters] == [b"not ours"]  # type: ignore[attr-defined]
        assert self.outcome(memory, folder) == expected
