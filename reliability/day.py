"""The real day's exact events, as `bourse replay` derives them, and what topics hold."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec

from bourse_sandbox.market import REAL_DAY
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import Topic

__all__ = ["expected_events", "held"]


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
