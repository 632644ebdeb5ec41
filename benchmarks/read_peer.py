"""The same work in quixstreams, as a good engineer would write it: same arguments and output as read_ours.py.

It commits where the product does: behind files of 50,000 rows. Runs in .venv/bench.
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
from quixstreams.models.serializers.avro import AvroDeserializer  # type: ignore[import-not-found]
from quixstreams.models.serializers.schema_registry import SchemaRegistryClientConfig as Registry  # type: ignore[import-not-found]
from quixstreams.sinks.community.file.formats import ParquetFormat  # type: ignore[import-not-found]
from quixstreams.sinks.community.file.local import LocalFileSink  # type: ignore[import-not-found]

from benchmarks.peak import peak_mb

ROWS = 50_000
AVRO = Path(__file__).parent.parent / "schemas" / "bourse_schemas" / "avro"


def main(_: str, bootstrap_servers: str, registry: str, count: str, where: str) -> None:
    """Read so many events once."""
    logging.disable(logging.WARNING)
    app = Application(
        bootstrap_servers,
        consumer_group=f"bench-{uuid4().hex}",
        auto_offset_reset="earliest",
        commit_every=ROWS,
        commit_interval=60,
        consumer_extra_config={"isolation.level": "read_committed"},
    )
    registered = Registry(url=registry)
    topic = app.topic("bourse.trades", value_deserializer=AvroDeserializer(schema_registry_client_config=registered))
    began = 0.0
    rows = app.dataframe(topic)
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
