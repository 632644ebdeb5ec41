"""Provable from the bytes: what a producer captured gives exactly the events on the topic, byte for byte."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import spawn
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import POLLS, TRADES

pytestmark = pytest.mark.kafka
BOURSE = [sys.executable, "-m", "bourse_cli"]


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return topics and schemas of this test's own, which take records of any time."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return cluster


def environment(cluster: Cluster) -> dict[str, str]:
    """Return the variables that point our commands at the cluster, and at an account."""
    account = {"BOURSE_CLIENT_ID": "practice", "BOURSE_CLIENT_SECRET": "practice", "BOURSE_NID": "0123456789"}
    where = {"BOURSE_BOOTSTRAP_SERVERS": "127.0.0.1:9", "BOURSE_REGISTRY_URL": cluster.registry_url}
    return {**os.environ, **account, **where, "BOURSE_TOPIC_PREFIX": cluster.prefix}


def replayed(cluster: Cluster, folder: Path) -> tuple[int, dict[str, int], str]:
    """Return the exit code, the counts and the words of a replay against the topics."""
    command = [*BOURSE, "replay", str(folder), "--against", cluster.bootstrap_servers]
    run = subprocess.run(command, env=environment(cluster), capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, json.loads(run.stdout.splitlines()[-1]), run.stderr


def test_a_captured_run_is_what_the_topics_hold(cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Though the producer was killed again and again; and one event too many is found out."""
    practice = practice_exchange("real", "poll")
    folder, log = tmp_path / "capture", tmp_path / "log"
    options = ["--clock", "response", "--schedule", "always", "--poll-seconds", "0", "--capture", str(folder)]
    reach = {**environment(cluster), "BOURSE_BOOTSTRAP_SERVERS": cluster.bootstrap_servers}
    with practice.serve() as server, ExitStack() as stack:
        for kills in range(4):
            before = practice.served
            command = [*BOURSE, "produce", "--address", server.url, *options]
            child = stack.enter_context(spawn(command, env=reach, stdout=log, stderr=log))
            wait_for(lambda before=before, kills=kills: practice.served > before + 2 + kills, 40)
            if kills < 3:
                child.kill()
        child.send(signal.SIGTERM)
        assert child.wait(10) == 0, log.read_text()
    values = [record.value for record in read(cluster, TRADES.full_name(cluster.prefix))]
    code, counts, notes = replayed(cluster, folder)
    assert counts == {
        "derived": len(values),
        "found": len(values),
        "equal": len(values),
        "different": 0,
        "missing": 0,
        "extra": 0,
    }, notes
    assert code == 0
    # A foreign record is named and changes nothing.
    registry, producer = cluster.registry(), cluster.transactional_producer("forger")
    producer.init_transactions(10)
    for topic in (TRADES, POLLS):
        producer.begin_transaction()
        producer.produce(topic.full_name(cluster.prefix), b"junk", b"x", 0)
        producer.commit_transaction()
    code, again, notes = replayed(cluster, folder)
    assert (code, again) == (0, counts)
    for topic in (TRADES, POLLS):
        assert re.search(
            rf"{re.escape(topic.full_name(cluster.prefix))}-0-\d+: not in the Confluent wire format", notes
        )
    # A topic that holds something else is found out, event by event and field by field.
    event = registry.deserializer(TradeEvent)(values[0])
    producer.begin_transaction()
    record = registry.serializer(TRADES, cluster.prefix)(event)
    producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
    producer.commit_transaction()
    code, counts, notes = replayed(cluster, folder)
    assert (code, counts["extra"], counts["equal"]) == (1, 1, len(values))
    assert f"{event.event_id}: on the topic, and not derived again" in notes
    # A record whose schema is lost may be a poll's: nothing is proved without it.
    producer.begin_transaction()
    producer.produce(POLLS.full_name(cluster.prefix), b"\0\0\x0f\x42\x3f\x02", b"x", 0)
    producer.commit_transaction()
    producer.close()
    command = [*BOURSE, "replay", str(folder), "--against", cluster.bootstrap_servers]
    run = subprocess.run(command, env=environment(cluster), capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert re.search(r"Error: \S+\.polls-0-\d+: schema id 999999 is unknown to the registry", run.stderr)
