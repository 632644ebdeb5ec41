"""The same work in quixstreams, as a good engineer would write it: same arguments, lines and output as ours.py.

It flushes where the product commits a transaction, which is less of a promise and less work. Runs in .venv/bench.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
from quixstreams import Application  # type: ignore[import-not-found]  # in an environment of its own
from quixstreams.models.serializers.avro import AvroSerializer  # type: ignore[import-not-found]
from quixstreams.models.serializers.schema_registry import SchemaRegistryClientConfig as Registry  # type: ignore[import-not-found]
from quixstreams.models.topics import Topic, TopicType  # type: ignore[import-not-found]

from benchmarks.plain import Fields, records

AVRO = Path(__file__).parent.parent / "schemas" / "bourse_schemas" / "avro"


def main(exchange: str, bootstrap_servers: str, registry: str, prefix: str) -> None:
    """Poll and publish for every line of stdin; print the poll's seconds: to get, to work out, to publish."""
    logging.disable(logging.WARNING)

    def topic(name: str, schema: str) -> Any:
        text = (AVRO / f"{schema}.avsc").read_text("utf-8")
        avro = AvroSerializer(json.loads(text), schema_registry_client_config=Registry(url=registry))
        # Not app.topic(): it asks for the topic's settings, which the mock cluster cannot tell.
        return Topic(f"{prefix}.{name}", TopicType.REGULAR, key_serializer="str", value_serializer=avro)

    topics = {"trades": topic("trades", "TradeEvent"), "candles": topic("candles", "Candle")}
    topics["polls"] = topic("polls", "PollMarker")
    settings = {"compression.type": "lz4", "enable.idempotence": True, "acks": "all"}
    app = Application(broker_address=bootstrap_servers, producer_extra_config=settings)
    url = f"{exchange}/bourse/v2/clients/bench/trades/realtime"
    known: dict[str, Fields] = {}
    with httpx2.Client(headers={"Authorization": "Bearer token"}) as client, app.get_producer() as producer:
        for poll, _ in enumerate(sys.stdin, 1):
            began = time.perf_counter()
            track_id = uuid4().hex
            asked = {"trackId": track_id, "isTimePeriod": "false", "precedencyRight": "false"}
            response = client.get(url, params=asked).raise_for_status()
            got = time.perf_counter()
            received = parsedate_to_datetime(response.headers["Date"])
            changed = list(records(known, response.json()["result"], poll, track_id, received))
            worked_out = time.perf_counter()
            for record in changed:
                to = topics[record.topic]
                message = to.serialize(record.key, record.value, record.headers, record.timestamp)
                producer.produce(to.name, message.value, message.key, message.headers, timestamp=message.timestamp)
            if producer.flush():
                raise SystemExit("not everything was delivered")
            print(json.dumps((got - began, worked_out - got, time.perf_counter() - worked_out)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
