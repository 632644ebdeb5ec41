"""What the runner promises, on both of its streams: in memory and on real Kafka. One suite keeps the fake honest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pytest

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Own, Rebuild, Reject, Resume, Retry, Start
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, MemoryStream, trade
from bourse_schemas import reading
from bourse_schemas.events import DeadLetter, Event, Reason, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS, TRADES, Topic

WaitFor = Callable[..., Any]


class Bus(Protocol):
    """A place to publish to and to run members of one group on; all records of a test go to one partition."""

    def publish(self, *values: Event | bytes) -> None: ...
    def member(self, consumer: Consumer) -> Runner: ...
    def read(self, topic: Topic) -> list[Any]: ...


class InMemory:
    """The fake."""

    def __init__(self) -> None:
        self.memory = Memory(markers=True)

    def publish(self, *values: Event | bytes) -> None:
        for value in values:
            if isinstance(value, bytes):
                self.memory.append_bytes(TradeEvent, value)
            else:
                self.memory.append(value)

    def member(self, consumer: Consumer) -> Runner:
        return Runner(consumer, MemoryStream(self.memory, consumer.topics), name="test")

    def read(self, topic: Topic) -> list[Any]:
        return [emit.event for emit in self.memory.emitted if emit.topic is topic]


class OnKafka:
    """The real one."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self.cluster = cluster
        self.stack = stack
        apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
        cluster.registry().register_all(cluster.prefix)
        self.last: KafkaStream | None = None

    def publish(self, *values: Event | bytes) -> None:
        serialize = self.cluster.registry().serializer(TRADES, self.cluster.prefix)
        producer = self.cluster.transactional_producer(f"{self.cluster.prefix}-test")
        producer.init_transactions(10)
        producer.begin_transaction()
        for value in values:
            if isinstance(value, bytes):
                producer.produce(TRADES.full_name(self.cluster.prefix), value, b"IRO1MADN0001")
            else:
                record = serialize(value)
                producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        producer.commit_transaction()
        producer.close()

    def member(self, consumer: Consumer) -> Runner:
        if self.last is not None:
            # The one before was dropped; only its membership is given up, so that the test need not wait for that.
            self.last.close()
        self.last = KafkaStream(self.cluster, f"{self.cluster.prefix}-group", consumer.topics, consumer.emits)
        self.stack.callback(self.last.close)
        return Runner(consumer, self.last, name="test")

    def read(self, topic: Topic) -> list[Any]:
        decode = self.cluster.registry().deserializer(topic.event)
        records = reading.read(self.cluster, topic.full_name(self.cluster.prefix))
        return [decode(record.value) for record in records if (record.value or b"")[:1] == b"\0"]


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def bus(request: pytest.FixtureRequest, prefix: str) -> Iterator[Bus]:
    """Return each kind of bus in turn."""
    with ExitStack() as stack:
        if request.param == "memory":
            yield InMemory()
        else:
            kafka, registry = (request.getfixturevalue(name) for name in ("kafka", "small_registry"))
            yield OnKafka(Cluster(kafka.bootstrap_servers, registry, prefix), stack)


class Total(Consumer):
    """Publishes for each event not its own how many it has seen; the count is rebuilt."""

    emits: Sequence[Topic] = (TRADES,)

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.live: list[int] = []

    def open(self, assigned: Assignment) -> Start:
        self.seen = []
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        emits = []
        for event in batch.events:
            if event.source != "total":
                self.seen.append(event.sequence)
                if not batch.replay:
                    self.live.append(event.sequence)
                emits.append(Emit(TRADES, trade(source="total", sequence=event.sequence, volume=len(self.seen))))
        return emits


def totals(bus: Bus) -> list[tuple[int, int]]:
    return [(event.sequence, event.volume) for event in bus.read(TRADES) if event.source == "total"]


def some(count: int, first: int = 1) -> list[TradeEvent]:
    """Return events of one day: a new group begins with the last."""
    start = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
    numbers = range(first, first + count)
    return [trade(sequence=number, observed_at=start + timedelta(seconds=number)) for number in numbers]


def until(runner: Runner, condition: Callable[[], Any], wait_for: WaitFor) -> None:
    """Let the runner do rounds until the condition holds and nothing more comes."""
    wait_for(lambda: not runner.step(0.05) and condition(), 30)


def test_emits_and_offsets_go_together(bus: Bus, wait_for: WaitFor) -> None:
    """Dropped at any moment, the successor rebuilds in silence and goes on where it was committed."""
    bus.publish(*some(5))
    first = Total()
    until(bus.member(first), lambda: len(first.live) == 5, wait_for)
    bus.publish(*some(3, first=6))
    second = Total()
    until(bus.member(second), lambda: len(second.live) == 3, wait_for)
    assert (second.seen, second.live) == ([1, 2, 3, 4, 5, 6, 7, 8], [6, 7, 8])
    assert totals(bus) == [(number, number) for number in range(1, 9)]


def test_a_retried_batch_comes_again_once(bus: Bus, wait_for: WaitFor) -> None:
    """Nothing is skipped meanwhile, nothing comes twice afterwards."""

    class Flaky(Total):
        failures = 3

        def process(self, batch: Batch) -> list[Emit]:
            if self.failures:
                self.failures -= 1
                raise Retry("the database is down", after=0.05)
            return super().process(batch)

    bus.publish(*some(2000))
    consumer = Flaky()
    until(bus.member(consumer), lambda: len(consumer.live) == 2000, wait_for)
    assert totals(bus) == [(number, number) for number in range(1, 2001)]


def test_bad_records_become_dead_letters(bus: Bus, wait_for: WaitFor) -> None:
    """Undecodable or rejected: the bytes are kept, the others go on, and a successor does not see them again."""

    class Picky(Total):
        def process(self, batch: Batch) -> list[Emit]:
            for record, event in zip(batch.records, batch.events, strict=True):
                if event.sequence == 2 and event.source != "total":
                    raise Reject(record, "no twos")
            return super().process(batch)

    bus.publish(*some(2), b"not ours", *some(2, first=3))
    first, second = Picky(), Picky()
    until(bus.member(first), lambda: len(first.live) == 3, wait_for)
    until(bus.member(second), lambda: second.seen == [1, 3, 4], wait_for)
    letters: list[DeadLetter] = bus.read(DEAD_LETTERS)
    assert sorted((letter.reason, letter.payload[:1]) for letter in letters) == [
        (Reason.REJECTED, b"\0"),
        (Reason.UNDECODABLE, b"n"),
    ]
    assert totals(bus) == [(1, 1), (3, 2), (4, 3)]


def test_a_sink_goes_on_at_its_own_offsets(bus: Bus, wait_for: WaitFor) -> None:
    """Whatever the group has committed."""

    class Sink(Consumer):
        """Keeps ids and offsets in a list that outlives it."""

        def __init__(self, store: dict[Any, list[tuple[int, int]]]) -> None:
            self.store = store

        def open(self, assigned: Assignment) -> Own:
            return Own({partition: rows[-1][0] + 1 for partition, rows in self.store.items()})

        def process(self, batch: Batch) -> None:
            for record, event in zip(batch.records, batch.events, strict=True):
                self.store.setdefault(record.partition, []).append((record.offset, event.sequence))

    store: dict[Any, list[tuple[int, int]]] = {}

    def rows() -> list[int]:
        return [sequence for kept in store.values() for _, sequence in kept]

    bus.publish(*some(5))
    until(bus.member(Sink(store)), lambda: len(rows()) == 5, wait_for)
    for kept in store.values():
        del kept[3:]  # as if it had been restored from a back-up
    until(bus.member(Sink(store)), lambda: len(rows()) == 5, wait_for)
    assert rows() == [1, 2, 3, 4, 5]


def test_a_plain_consumer_resumes(bus: Bus, wait_for: WaitFor) -> None:
    """Nothing is published, and the offsets are committed all the same."""

    class Reader(Consumer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def open(self, assigned: Assignment) -> Start:
            return Resume()

        def process(self, batch: Batch) -> None:
            self.seen += [event.sequence for event in batch.events]

    first, second = Reader(), Reader()
    bus.publish(*some(3))
    until(bus.member(first), lambda: first.seen == [1, 2, 3], wait_for)
    bus.publish(*some(2, first=4))
    until(bus.member(second), lambda: second.seen, wait_for)
    assert second.seen == [4, 5]
