"""The product's consumers as `bourse consume` runs them, timed: KIND BOOTSTRAP REGISTRY COUNT WHERE.

KIND is parquet, postgres or executemany (postgres without COPY). They begin at the topic's start and end when
so many events are through. Printed: seconds from the first batch to what is durable, and the most memory resident.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

from benchmarks.peak import peak_mb
from bourse_cli.logs import configure_logging
from bourse_consumers.api import Batch, Consumer, Emit
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_schemas.kafka import Cluster

if TYPE_CHECKING:
    import polars as pl

    from bourse_consumers.postgres.sink import PostgresArchive


def make(kind: str, where: str) -> Consumer:
    """Return a consumer as its command makes it."""
    consumer: Consumer
    if kind == "executemany":
        consumer = make("postgres", where)
        consumer._write = partial(executemany, consumer)  # type: ignore[attr-defined,arg-type]  # its only difference
    elif kind == "parquet":
        from bourse_consumers.archive.command import archive

        consumer = archive.main(["--to", where], standalone_mode=False)
    else:
        from bourse_consumers.postgres.command import archive_postgres

        schema = f"ours_{uuid4().hex[:8]}"
        consumer = archive_postgres.main(["--dsn", where, "--schema", schema, "--apply-schema"], standalone_mode=False)
    return consumer


def executemany(sink: PostgresArchive, rows: pl.DataFrame) -> None:
    """Write rows as one does without COPY, in the transaction under way."""
    sink._tables.make_room(sink._connection, set(rows["trading_day"].unique()))
    names, marks = ", ".join(rows.columns), ", ".join(["%s"] * rows.width)
    into = f"INSERT INTO {sink._tables.rows.as_string(sink._connection)} ({names}) VALUES ({marks})"
    with sink._connection.cursor() as cursor:
        cursor.executemany(into, rows.iter_rows())


def main(kind: str, bootstrap_servers: str, registry: str, count: str, where: str) -> None:
    """Run one consumer once."""
    configure_logging("warning")
    consumer, cluster = make(kind, where), Cluster(bootstrap_servers, registry)
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
    runner = Runner(consumer, stream, stream.decode, columns=stream.columns, name=kind)
    runner.run()
    print(json.dumps({"seconds": ended - began, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
