"""The same work with confluent-kafka and its AvroDeserializer: same arguments and output as read_ours.py.

delta writes with write_deltalake; postgres is the product's own loop, with executemany where that has COPY. Offsets are
committed behind what is written. Runs in .venv/bench.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from confluent_kafka import Consumer
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from benchmarks.peak import peak_mb

ROWS = 50_000
Rows = list[dict[str, Any]]


def delta(folder: str) -> Callable[[Rows], None]:
    """Return what appends rows to a table."""
    import pyarrow as pa
    from deltalake import write_deltalake

    def write(rows: Rows) -> None:
        write_deltalake(folder, pa.Table.from_pylist(rows), mode="append", partition_by=["trading_day"])

    return write


def main(_: str, bootstrap_servers: str, registry: str, count: str, where: str) -> None:
    """Read so many events once."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": f"bench-{uuid4().hex}",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe(["bourse.trades"])
    decode = AvroDeserializer(SchemaRegistryClient({"url": registry}))
    context = SerializationContext("bourse.trades", MessageField.VALUE)
    write = delta(where)
    rows: Rows = []
    began, left = 0.0, int(count)
    while left:
        messages = consumer.consume(1000, 0.1)
        if messages:
            began = began or time.perf_counter()
        for message in messages:
            if (error := message.error()) is not None:
                raise SystemExit(error.str())
            row = decode(message.value(), context)
            rows.append({**row, "_partition": message.partition(), "_offset": message.offset()})
            left -= 1
        if len(rows) >= ROWS or (rows and not left):
            write(rows)
            consumer.commit(asynchronous=False)
            rows = []
    seconds = time.perf_counter() - began
    consumer.close()
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
