"""The real day's exact events, as `bourse replay` derives them, and what topics hold."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from confluent_kafka import KafkaException

from bourse_sandbox.market import REAL_DAY
from bourse_schemas.codec import Record
from bourse_schemas.errors import BourseError
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import Topic

__all__ = ["expected_events", "feed", "held"]

CALL_SECONDS = 10.0


def expected_events() -> list[TradeEvent]:
    """Return the events of the bundled day, in order."""
    command = [sys.executable, "-m", "bourse_cli", "replay", str(REAL_DAY), "--json"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    return [msgspec.json.decode(line, type=TradeEvent) for line in lines]


def held(cluster: Cluster, topic: Topic) -> list[Any]:
    """Return what a topic holds, in order per partition; of a compacted topic the latest record of each key."""
    decode = cluster.registry().deserializer(topic.event)
    records = list(read(cluster, topic.full_name(cluster.prefix), pending=True, timeout=60))
    if topic.cleanup == "compact":
        records = list({record.key: record for record in records}.values())
    return [decode(record.value) for record in records if record.value is not None]


def feed(cluster: Cluster, polls: Sequence[Sequence[Record]], seconds: float, fed: threading.Event) -> None:
    """Publish polls, a transaction each, within about this time, each once although brokers restart; then set `fed`."""
    done, producer = 0, None
    while done < len(polls):
        try:
            if producer is None:
                producer = cluster.transactional_producer(f"{cluster.prefix}-feeder")
                producer.init_transactions(CALL_SECONDS)
                # A failed commit may have succeeded.
                done = _published(cluster, polls)
                continue
            producer.begin_transaction()
            for record in polls[done]:
                producer.produce(
                    record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers
                )
            producer.commit_transaction(CALL_SECONDS)
            done += 1
        except (KafkaException, BourseError, BufferError):
            producer = None
        time.sleep(seconds / len(polls))
    fed.set()


def _published(cluster: Cluster, polls: Sequence[Sequence[Record]]) -> int:
    """Return how many of the polls are committed."""
    topics = {record.topic for poll in polls for record in poll}
    count = sum(1 for topic in topics for _ in read(cluster, topic, pending=True, timeout=60))
    for number, poll in enumerate(polls):
        if count <= 0:
            return number
        count -= len(poll)
    return len(polls)
