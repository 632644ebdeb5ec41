"""Our transaction and a bare one, in turn: BOOTSTRAP REGISTRY PREFIX ROUNDS; prints their seconds.

Both have the same records, headers and settings, encoded beforehand. The bare one is what the client's documentation
shows: produce and commit. A third one has no headers, which shows what they cost. Printed too: a record's bytes, and
those of its headers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from io import BytesIO

import fastavro

from benchmarks.market import received_at, rows
from benchmarks.plain import records
from bourse_cli.logs import configure_logging
from bourse_producer.publisher import Publisher
from bourse_schemas.codec import Record, schema_text
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS


def prepare(cluster: Cluster) -> list[Record]:
    """Return the records of a poll of 2,000 changes, encoded."""
    topics = {topic.name: topic for topic in TOPICS}
    schemas = {name: fastavro.parse_schema(json.loads(schema_text(topic.event))) for name, topic in topics.items()}
    found = []
    for plain in records({}, rows(1, 2000), 1, "bench", received_at(1)):
        body = BytesIO()
        fastavro.schemaless_writer(body, schemas[plain.topic], plain.value)
        name = topics[plain.topic].full_name(cluster.prefix)
        value = bytes(5) + body.getvalue()
        found.append(Record(name, plain.key.encode(), value, plain.timestamp, list(plain.headers.items())))
    return found


def main(bootstrap_servers: str, registry: str, prefix: str, rounds: str) -> None:
    """Time both."""
    configure_logging("warning")
    cluster = Cluster(bootstrap_servers, registry, prefix)
    ready = prepare(cluster)
    weights = [sum(len(name) + len(value or b"") for name, value in record.headers) for record in ready]
    publisher = Publisher(cluster)
    publisher.restore()
    bare = cluster.transactional_producer("bare")
    bare.init_transactions(30)

    def ours() -> None:
        publisher._producer.poll(0)
        publisher._do(publisher._producer.begin_transaction)
        for record in ready:
            publisher._produce(record)
        publisher._do(lambda: publisher._producer.commit_transaction(30))

    def theirs() -> None:
        bare.begin_transaction()
        for record in ready:
            bare.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
        bare.commit_transaction(30)

    def headless() -> None:
        bare.begin_transaction()
        for record in ready:
            bare.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        bare.commit_transaction(30)

    def lap(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    laps = [(lap(ours), lap(theirs), lap(headless)) for _ in range(10 + int(rounds))][10:]
    sizes = sum(len(record.value) + len(record.key) for record in ready) / len(ready), sum(weights) / len(ready)
    print(json.dumps([*zip(*laps, strict=True), sizes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
