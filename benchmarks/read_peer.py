"""The same work in quixstreams, as a good engineer would write it: same arguments and output as read_ours.py.

It commits where the product does: behind files of 50,000 rows, or often between alerts. Runs in .venv/bench.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from quixstreams import Application  # type: ignore[import-not-found]  # in an environment of its own
from quixstreams.models.serializers.avro import AvroDeserializer, AvroSerializer  # type: ignore[import-not-found]
from quixstreams.models.serializers.schema_registry import SchemaRegistryClientConfig as Registry  # type: ignore[import-not-found]
from quixstreams.sinks.community.file.formats import ParquetFormat  # type: ignore[import-not-found]
from quixstreams.sinks.community.file.local import LocalFileSink  # type: ignore[import-not-found]

from benchmarks.peak import peak_mb
from benchmarks.rules import by_hand

ROWS = 50_000
AVRO = Path(__file__).parent.parent / "schemas" / "bourse_schemas" / "avro"


def main(kind: str, bootstrap_servers: str, registry: str, count: str, where: str) -> None:
    """Read so many events once."""
    logging.disable(logging.WARNING)
    app = Application(
        bootstrap_servers,
        consumer_group=f"bench-{uuid4().hex}",
        auto_offset_reset="earliest",
        commit_every=ROWS if kind == "parquet" else 10_000,
        commit_interval=60,
        consumer_extra_config={"isolation.level": "read_committed"},
    )
    registered = Registry(url=registry)
    topic = app.topic("bourse.trades", value_deserializer=AvroDeserializer(schema_registry_client_config=registered))
    began, left = 0.0, int(count)
    rows = app.dataframe(topic)
    if kind == "alerts":
        text = (AVRO / "PriceAlert.avsc").read_text("utf-8")
        alerts = AvroSerializer(json.loads(text), schema_registry_client_config=registered)
        # In memory: its own store, which a restart finds again, takes a millisecond an event.
        days: dict[str, dict[str, Any]] = {}
        published = 0

        def judge(event: dict[str, Any]) -> list[dict[str, Any]]:
            nonlocal began, left, published
            began, left = began or time.perf_counter(), left - 1
            if not left:
                app.stop()
            found = list(by_hand(event, days.setdefault(event["instrument"], {})))
            published += len(found)
            return found

        rows.apply(judge, expand=True).to_topic(app.topic("bourse.alerts", value_serializer=alerts))
        app.run()
        print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak_mb(), "alerts": published}))
        return
    Path(where).mkdir()
    os.chdir(where)  # it takes no other folder than one with a simple name
    sink = LocalFileSink(directory="files", format=ParquetFormat(compression="zstd"))
    add = sink.add

    def timed(*values: Any, **named: Any) -> Any:
        nonlocal began
        began, sink.add = time.perf_counter(), add
        return add(*values, **named)

    sink.add = timed
    rows.sink(sink)
    app.run(count=int(count), collect=False)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
