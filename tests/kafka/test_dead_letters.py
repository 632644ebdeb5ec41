"""`bourse dead-letters`: what could not be used, why, and its bytes; sent again at most once, and to nobody twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # not in its __all__

from bourse_sandbox.kafka import Kafka
from bourse_schemas.commands import apply_topics, plan_topics, read_topic
from bourse_schemas.dead_letters import dead_letters
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


def sent(cluster: Cluster, target: str) -> list[tuple[Any, Any, Any]]:
    """Return what a topic holds: value, key, headers."""
    return [(message.value(), message.key(), message.headers()) for message in read_topic(cluster, target)]


def test_redrive_at_most_once(cluster: Cluster) -> None:
    """The very bytes, key and headers, to a topic of the operator's; a second time there is nothing to do."""
    target = f"{cluster.prefix}-repair"
    admin = cluster.admin()
    for done in admin.create_topics([NewTopic(target, 1, 1)]).values():
        done.result()
    assert run(cluster, "redrive", "0", "--to", target, answer="n\n").exit_code == 0
    assert sent(cluster, target) == []
    run(cluster, "redrive", "0", "--to", target, "--yes")
    both = [("ce_id", b"x"), ("bourse_redriven", b"0")]
    assert sent(cluster, target) == [(b"\x00\xff\x01", b"IRO1MADN0001", both)]
    again = run(cluster, "redrive", "--all", "--to", target, "--yes")
    assert "2 records to" in again.stderr
    assert "1 are there already" in again.stderr
    assert [value for value, _, _ in sent(cluster, target)] == [bytes([0, 255, number]) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0", "--to", "{prefix}.trades"], "every other subscriber"),
        (["0", "--to", "nowhere"], "no topic nowhere"),
        (["--to", "x"], "give offsets"),
        (["0", "--all", "--to", "x"], "give offsets"),
        (["3", "--to", "x"], "is a row of the exchange"),
        (["77", "--to", "x"], "no dead letter 77"),
    ],
)
def test_redrive_refuses(cluster: Cluster, words: Sequence[str], said: str) -> None:
    """What would reach others twice, or makes no sense, before anything is sent."""
    refused = run(cluster, "redrive", *(word.format(prefix=cluster.prefix) for word in words), "--yes").exception
    assert isinstance(refused, ConfigurationError)
    assert said in str(refused)
