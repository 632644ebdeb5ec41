"""The product's consumers as `bourse consume` runs them, timed: KIND BOOTSTRAP REGISTRY COUNT WHERE.

KIND is delta, postgres, executemany (postgres without COPY) or alerts. They begin at the topic's start and end when
COUNT events are through. Printed: seconds from the first batch to what is durable, and the most memory resident.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

from confluent_kafka import OFFSET_END, TopicPartition

from benchmarks.peak import peak_mb
from bourse_cli.logs import configure_logging
from bourse_consumers.alerts.command import consume
from bourse_consumers.api import Batch, Consumer, Emit, WholePoll
from bourse_consumers.kafka_market import KafkaMarket
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import ALERTS, POLLS

if TYPE_CHECKING:
    import polars as pl

    from bourse_consumers.postgres.sink import PostgresArchive


def make(kind: str, where: str) -> Consumer:
    """Return a consumer as its command makes it."""
    consumer: Consumer
    if kind == "executemany":
        consumer = make("postgres", where)
        consumer._copy = partial(executemany, consumer)  # type: ignore[attr-defined,arg-type]  # its only difference
    elif kind == "delta":
        from bourse_consumers.archive.command import consume_archive

        consumer = consume_archive.main(["--to", where, "--no-optimize"], standalone_mode=False)
    else:
        from bourse_consumers.postgres.command import archive_postgres

        schema = f"ours_{uuid4().hex[:8]}"
        consumer = archive_postgres.main(["--dsn", where, "--schema", schema, "--apply-schema"], standalone_mode=False)
    return consumer


def executemany(sink: PostgresArchive, rows: pl.DataFrame) -> None:
    """Write rows as one does without COPY, in the transaction under way."""
    sink._tables.create_months(sink._connection, set(rows["trading_day"].unique()))
    names, marks = ", ".join(rows.columns), ", ".join(["%s"] * rows.width)
    into = f"INSERT INTO {sink._tables.rows.as_string(sink._connection)} ({names}) VALUES ({marks})"
    with sink._connection.cursor() as cursor:
        cursor.executemany(into, rows.iter_rows())


def alerts(cluster: Cluster, count: int, rules: str) -> dict[str, float | None]:
    """Judge so many events by rules, whole polls; return the figures."""
    consumer = consume.main(["--rules", rules], standalone_mode=False)
    # A group that has committed nothing begins at the end; and what other laps published would be continued.
    group, admin = f"bench-{uuid4().hex}", cluster.admin()
    client = cluster.consumer(group)
    client.commit(offsets=[TopicPartition(POLLS.full_name(cluster.prefix), 0, 0)], asynchronous=False)
    client.close()
    for deleted in admin.delete_records([TopicPartition(ALERTS.full_name(cluster.prefix), 0, OFFSET_END)]).values():
        deleted.result(30)
    process_poll, began, left = consumer.process_poll, 0.0, count

    def timed(poll: WholePoll) -> Sequence[Emit] | None:
        nonlocal began, left
        began = began or time.perf_counter()
        emits: Sequence[Emit] | None = process_poll(poll)
        left -= poll.marker.traded
        if left <= 0:
            runner.stop()
        return emits

    consumer.process_poll = timed
    stream = KafkaMarket(cluster, group, consumer.emits)
    runner = Runner(consumer, stream, name="alerts")
    runner.run()
    seconds = time.perf_counter() - began
    published = sum(1 for _ in read(cluster, ALERTS.full_name(cluster.prefix)))
    return {"seconds": seconds, "peak_mb": peak_mb(), "alerts": published}


def main(kind: str, bootstrap_servers: str, registry: str, count: str, where: str) -> None:
    """Run one consumer once."""
    configure_logging("warning")
    cluster = Cluster(bootstrap_servers, registry)
    if kind == "alerts":
        print(json.dumps(alerts(cluster, int(count), where)))
        return
    consumer = make(kind, where)
    process, close = consumer.process, consumer.close
    began = ended = 0.0
    left = int(count)

    def timed(batch: Batch) -> Sequence[Emit] | None:
        nonlocal began, left
        began = began or time.perf_counter()
        emits = process(batch)
        left -= len(batch.records)
        if left <= 0:
            runner.stop()
        return emits

    def closed() -> None:
        nonlocal ended
        close()
        ended = time.perf_counter()

    consumer.process, consumer.close = timed, closed  # type: ignore[method-assign]  # nothing else is changed
    group = f"bench-{uuid4().hex}"
    stream = KafkaStream(cluster, group, consumer.topics, consumer.emits)
    runner = Runner(consumer, stream, name=kind)
    runner.run()
    print(json.dumps({"seconds": ended - began, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
