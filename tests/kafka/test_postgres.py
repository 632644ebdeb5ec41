"""The archive in PostgreSQL on real Kafka: writers of different groups, and the proof against the topic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.archive.verify import kept_by
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.postgres.proof import verify
from bourse_consumers.postgres.sink import PostgresArchive
from bourse_consumers.runner import Runner
from bourse_consumers.testing import trade
from bourse_sandbox.kafka import Kafka
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TRADES

pytestmark = pytest.mark.kafka


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return topics without records."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return cluster


def events(first: int, last: int) -> list[TradeEvent]:
    """Return events of a few instruments, so of several partitions, with the totals that their deltas make."""
    return [
        trade(
            instrument=f"IRO1TEST000{code}",
            sequence=number,
            volume_delta=51205,
            value_delta=281013040,
            trade_count_delta=16,
        )
        for number in range(first, last + 1)
        for code in range(4)
    ]


def publish(cluster: Cluster, found: list[TradeEvent]) -> None:
    """Publish events, a transaction for every thirty of them."""
    serializer = cluster.registry().serializer(TRADES, cluster.prefix)
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    for start in range(0, len(found), 30):
        producer.begin_transaction()
        for record in map(serializer, found[start : start + 30]):
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        producer.commit_transaction()
    producer.close()


def member(cluster: Cluster, dsn: str, group: str) -> Runner:
    """Return an archive in a group of its own; all groups write one table."""
    consumer = PostgresArchive(dsn, TRADES, apply_schema=True)
    stream = KafkaStream(cluster, f"{cluster.prefix}-{group}", consumer.topics, consumer.emits)
    return Runner(consumer, stream, name=group, batch_size=50)


def count(dsn: str) -> int:
    """Return how many rows there are."""
    with psycopg.connect(dsn) as connection:
        return int(connection.execute("SELECT count(*) FROM bourse.trades").fetchall()[0][0])


def test_a_writer_that_was_outrun_takes_over_from_the_faster(
    cluster: Cluster, dsn: str, wait_for: Callable[..., Any]
) -> None:
    """It stays assigned, rewinds to where the other is, and writes what comes then; each event is there once."""
    slow, fast = member(cluster, dsn, "slow"), member(cluster, dsn, "fast")
    publish(cluster, events(1, 20))

    def step(runner: Runner, rows: int) -> Callable[[], bool]:
        return lambda: bool(runner.step() or True) and count(dsn) >= rows

    wait_for(step(slow, 1), 30)
    wait_for(step(fast, 80), 30)
    fast.stop()
    fast.run()
    publish(cluster, events(21, 40))
    wait_for(step(slow, 160), 30)
    slow.stop()
    slow.run()
    (report,) = verify(dsn, "trades", schema="bourse", prefix=cluster.prefix, kept=partial(kept_by, cluster))
    assert (report.rows, report.compared, report.findings) == (160, 160, [])
