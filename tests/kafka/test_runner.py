"""The runner on real Kafka: groups, transactions, rebalances, restarts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Rebuild
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_consumers.testing import trade
from bourse_sandbox.kafka import Kafka
from bourse_schemas.commands import apply_topics, plan_topics
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS, TOPICS, TRADES

pytestmark = pytest.mark.kafka
GROUP = "group"


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return a cluster with our topics under a prefix of the test's own."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return cluster


class Copy(Consumer):
    """Publishes each event of others again on the same topic, as from the source `copy`."""

    emits = (TRADES, DEAD_LETTERS)

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.replayed = 0
        self.opened = 0

    def open(self, assigned: Assignment) -> Rebuild:
        self.opened += 1
        self.replayed = 0
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        events = [event for event in batch.events if event.source != "copy"]
        if batch.replay:
            self.replayed += len(events)
        else:
            self.seen += [event.event_id for event in events]
        return [Emit(TRADES, trade(**{**_fields(event), "source": "copy"})) for event in events]


def _fields(event: TradeEvent) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("instrument", "sequence", "trading_day", "observed_at")}


def publish(cluster: Cluster, events: Sequence[TradeEvent], *, commit: bool = True) -> None:
    """Publish events in one transaction, or leave it open."""
    serializer = cluster.registry().serializer(TRADES, cluster.prefix)
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    for event in events:
        record = serializer(event)
        producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
    if commit:
        producer.commit_transaction()
    else:
        producer.flush(10)
        producer.abort_transaction()
    producer.close()


@contextmanager
def running(cluster: Cluster, consumer: Consumer) -> Iterator[Runner]:
    """Run a consumer in a thread until the block ends."""
    stream = KafkaStream(cluster, f"{cluster.prefix}-{GROUP}", consumer.topics, consumer.emits)
    runner = Runner(consumer, stream, stream.decode, name="test")
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        yield runner
    finally:
        runner.stop()
        thread.join(15)
        assert not thread.is_alive()


def committed(cluster: Cluster, source: str) -> list[str]:
    """Return the event ids of a source, as a read_committed consumer sees them."""
    from confluent_kafka import OFFSET_BEGINNING, KafkaError, TopicPartition

    decode = cluster.registry().deserializer(TradeEvent)
    consumer = cluster.consumer(enable_partition_eof=True)
    consumer.assign([TopicPartition(TRADES.full_name(cluster.prefix), n, OFFSET_BEGINNING) for n in range(6)])
    found: list[str] = []
    ended: set[int | None] = set()
    while len(ended) < 6:
        for message in consumer.consume(500, 0.1):
            error = message.error()
            if error is None:
                value = message.value()
                assert isinstance(value, bytes)
                if value[:1] == b"\0" and (event := decode(value)).source == source:
                    found.append(event.event_id)
            elif error.code() == KafkaError._PARTITION_EOF:
                ended.add(message.partition())
    consumer.close()
    return found


def market(count: int, first: int = 1) -> list[TradeEvent]:
    start = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
    return [
        trade(
            instrument=f"IRO1TEST{number % 20:04d}",
            sequence=number,
            observed_at=start + timedelta(seconds=number),
        )
        for number in range(first, first + count)
    ]


def test_a_restart_repeats_nothing_and_rebuilds_its_state(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Emits and offsets are one transaction; what was said is replayed in silence."""
    publish(cluster, market(100))
    first = Copy()
    with running(cluster, first):
        wait_for(lambda: len(first.seen) == 100, 20)
    publish(cluster, market(50, first=101))
    second = Copy()
    with running(cluster, second):
        wait_for(lambda: len(second.seen) == 50, 20)
    assert second.replayed == 100
    expected = sorted(event.event_id for event in market(150))
    assert sorted(committed(cluster, "copy")) == expected


def test_aborted_records_are_never_seen(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """A transaction that was given up leaves no trace for a consumer."""
    publish(cluster, market(10), commit=False)
    publish(cluster, market(10, first=11))
    consumer = Copy()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.seen) >= 10, 20)
    assert sorted(consumer.seen) == sorted(event.event_id for event in market(10, first=11))


def test_two_members_share_the_partitions_and_double_nothing(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """A rebalance in the middle loses and repeats nothing."""
    one, two = Copy(), Copy()
    with running(cluster, one):
        publish(cluster, market(200))
        wait_for(lambda: one.seen, 20)
        with running(cluster, two):
            wait_for(lambda: two.opened, 20)
            publish(cluster, market(200, first=201))
            wait_for(lambda: len(committed(cluster, "copy")) >= 400, 30)
        publish(cluster, market(50, first=401))
        wait_for(lambda: len(committed(cluster, "copy")) >= 450, 30)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(450))


def test_a_record_that_cannot_be_decoded_becomes_a_dead_letter(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """It is published with its bytes, and the consumer goes on."""
    from confluent_kafka import OFFSET_BEGINNING, TopicPartition

    from bourse_schemas.events import DeadLetter

    producer = cluster.transactional_producer(f"{cluster.prefix}-bad")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(TRADES.full_name(cluster.prefix), b"not ours", b"IRO1TEST0001", headers=[("who", b"me")])
    producer.commit_transaction()
    producer.close()
    publish(cluster, market(5))
    consumer = Copy()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.seen) == 5, 20)
    reader = cluster.consumer()
    reader.assign([TopicPartition(DEAD_LETTERS.full_name(cluster.prefix), 0, OFFSET_BEGINNING)])
    message = wait_for(lambda: reader.poll(0.2), 10)
    reader.close()
    letter = cluster.registry().deserializer(DeadLetter)(message.value())
    assert (letter.payload, letter.original_key, letter.consumer) == (b"not ours", b"IRO1TEST0001", "test")
    assert letter.original_headers == {"who": b"me"}


def test_the_group_reaches_the_end(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Transaction markers take offsets too: a consumer that has read everything has no lag."""
    from confluent_kafka import TopicPartition

    publish(cluster, market(30))
    consumer = Copy()
    with running(cluster, consumer):
        probe = cluster.consumer(f"{cluster.prefix}-{GROUP}")
        partitions = [TopicPartition(TRADES.full_name(cluster.prefix), number) for number in range(6)]

        def lag() -> int:
            ends = [probe.get_watermark_offsets(partition, 5)[1] for partition in partitions]
            offsets = [max(found.offset, 0) for found in probe.committed(partitions, 5)]
            return sum(ends) - sum(offsets)

        wait_for(lambda: len(consumer.seen) == 30 and lag() == 0, 30)
        probe.close()


def test_a_missing_topic_names_the_command_that_makes_it(kafka: Kafka, small_registry: str, prefix: str) -> None:
    """The operator is told what to do."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    cluster.registry().register_all(prefix)
    with pytest.raises(ConfigurationError, match="bourse topics apply"):
        KafkaStream(cluster, GROUP, [TRADES], [])


def test_a_missing_subject_names_the_command_that_registers_it(kafka: Kafka, small_registry: str, prefix: str) -> None:
    """Services never register by themselves."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    with pytest.raises(ConfigurationError, match="bourse schemas register"):
        KafkaStream(cluster, GROUP, [TRADES], TOPICS)
