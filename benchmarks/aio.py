"""The same work with aiokafka and fastavro, a transaction a poll: same arguments, lines and output as ours.py.

Runs in .venv/bench.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import sys
import time
from email.utils import parsedate_to_datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import fastavro
import httpx2
from aiokafka import AIOKafkaProducer  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.plain import Fields, Record, records

AVRO = Path(__file__).parent.parent / "schemas" / "bourse_schemas" / "avro"
SCHEMAS = {"trades": "TradeEvent", "candles": "Candle", "polls": "PollMarker"}


async def work(exchange: str, bootstrap_servers: str, registry: str, prefix: str) -> None:
    """Poll and publish for every line of stdin; print the poll's seconds: to get, to work out, to publish."""
    logging.disable(logging.WARNING)
    texts = {name: (AVRO / f"{schema}.avsc").read_text("utf-8") for name, schema in SCHEMAS.items()}
    parsed: dict[str, Any] = {name: fastavro.parse_schema(json.loads(text)) for name, text in texts.items()}
    known: dict[str, Fields] = {}
    url = f"{exchange}/bourse/v2/clients/bench/trades/realtime"
    settings = {"compression_type": "lz4", "transactional_id": "bench", "acks": "all", "max_batch_size": 1 << 20}
    async with (
        httpx2.AsyncClient(headers={"Authorization": "Bearer token"}) as client,
        AIOKafkaProducer(bootstrap_servers=bootstrap_servers, **settings) as producer,
    ):
        frames = {}
        for name, text in texts.items():
            address = f"{registry}/subjects/{prefix}.{name}-value/versions"
            answer = await client.post(address, json={"schema": text}, headers={"Authorization": ""})
            frames[name] = struct.pack(">bI", 0, answer.raise_for_status().json()["id"])

        async def publish(record: Record) -> Any:
            body = BytesIO(frames[record.topic])
            body.seek(0, 2)
            fastavro.schemaless_writer(body, parsed[record.topic], record.value)
            return await producer.send(
                f"{prefix}.{record.topic}",
                body.getvalue(),
                record.key.encode(),
                timestamp_ms=record.timestamp,
                headers=list(record.headers.items()),
            )

        for poll, _ in enumerate(sys.stdin, 1):
            began = time.perf_counter()
            track_id = uuid4().hex
            asked = {"trackId": track_id, "isTimePeriod": "false", "precedencyRight": "false"}
            response = (await client.get(url, params=asked)).raise_for_status()
            got = time.perf_counter()
            received = parsedate_to_datetime(response.headers["Date"])
            changed = list(records(known, response.json()["result"], poll, track_id, received))
            worked_out = time.perf_counter()
            async with producer.transaction():
                await asyncio.gather(*[await publish(record) for record in changed])
            print(json.dumps((got - began, worked_out - got, time.perf_counter() - worked_out)), flush=True)


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
