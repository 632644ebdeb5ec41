"""`bourse dead-letters`: what could not be used, why, and its bytes; sent again at most once, and to nobody twice."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bourse_cli.dead_letters import dead_letters
from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.kafka import Kafka
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS

pytestmark = pytest.mark.kafka
NOW = datetime(2026, 11, 21, 6, 0, tzinfo=UTC)


def letter(number: int, **changes: Any) -> DeadLetter:
    """Return a record that a consumer put aside, or, with other values, a row of the exchange."""
    usual: dict[str, Any] = {
        "reason": Reason.REJECTED,
        "message": f"too odd {number}",
        "stage": Stage.CONSUME,
        "origin": f"bourse.trades-0-{number}",
        "consumer": "alerts",
        "payload": b"\x00\xff" + bytes([number]),
        "original_topic": "bourse.trades",
        "original_key": b"IRO1MADN0001",
        "original_partition": 0,
        "original_offset": number,
        "original_headers": {"ce_id": b"x"},
        "failed_at": NOW + timedelta(hours=number),
    }
    return DeadLetter(**{**usual, **changes})


ROW = letter(30, stage=Stage.PARSE, reason=Reason.INVALID_VALUE, consumer=None, original_topic=None, payload=b'{"a":1}')


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return topics with four dead letters."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    serializer = cluster.registry().serializer(DEAD_LETTERS, prefix)
    producer = cluster.transactional_producer(f"{prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    for each in (letter(1), letter(2, consumer="archive"), letter(3), ROW):
        record = serializer(each)
        producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
    producer.commit_transaction()
    producer.close()
    return cluster


def run(cluster: Cluster, *words: str, answer: str | None = None) -> Result:
    """Run the command."""
    where = ["--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url]
    return CliRunner().invoke(dead_letters, [*words, *where, "--topic-prefix", cluster.prefix], input=answer)


def test_list_and_its_filters(cluster: Cluster) -> None:
    """A line each, the newest last; by stage, reason, consumer and day; the newest only; JSON."""
    lines = run(cluster, "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert lines[0].split() == [
        *("0", "2026-11-21", "07:00:00", "REJECTED", "alerts"),
        "bourse.trades-0-1",
        "too",
        "odd",
        "1",
    ]

    def offsets(*words: str) -> list[int]:
        return [int(line.split()[0]) for line in run(cluster, "list", *words).stdout.splitlines()]

    assert offsets("--stage", "PARSE") == offsets("--reason", "INVALID_VALUE") == offsets("--day", "2026-11-22") == [3]
    assert offsets("--consumer", "archive") == [1]
    assert offsets("--limit", "2") == [2, 3]
    shown = [json.loads(line) for line in run(cluster, "list", "--json").stdout.splitlines()]
    assert [(each["offset"], each["message"]) for each in shown][:2] == [(0, "too odd 1"), (1, "too odd 2")]
    assert "2026-11-45" in run(cluster, "list", "--day", "2026-11-45").output


def test_show(cluster: Cluster) -> None:
    """All that is known; bytes that are no text in hexadecimal; the very bytes for other programs."""
    shown = run(cluster, "show", "0").stdout
    assert "payload           00 ff 01" in shown
    assert "original_offset   1" in shown
    assert 'payload           {"a":1}' in run(cluster, "show", "3").stdout
    assert run(cluster, "show", "0", "--raw").stdout_bytes == b"\x00\xff\x01"
    missing = run(cluster, "show", "99").exception
    assert isinstance(missing, ConfigurationError)
    assert "no dead letter 99" in str(missing)
