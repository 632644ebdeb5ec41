"""Reading topics without a real broker: librdkafka's mock cluster, and no cluster at all."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from bourse_sandbox.kafka import MockKafka
from bourse_schemas import kafka
from bourse_schemas.errors import Unreachable
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import FIRST, LAST, day_start, follow, group_lag, offsets, read
from bourse_schemas.topics import TRADES


@pytest.fixture
def cluster(mock_kafka: MockKafka, prefix: str) -> Cluster:
    """Return a topic with two committed records in its first partition."""
    cluster = Cluster(mock_kafka.bootstrap_servers, "http://127.0.0.1:9", prefix)
    producer = cluster.transactional_producer(f"{prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    for number in range(2):
        producer.produce(TRADES.full_name(prefix), b"%d" % number, b"key", 0, timestamp=1000 + number)
    producer.commit_transaction(10)
    producer.close()
    return cluster


def test_read(cluster: Cluster) -> None:
    """To the end, and a part."""
    name = TRADES.full_name(cluster.prefix)
    records = list(read(cluster, name, timeout=5))
    assert [(record.place, record.timestamp, record.key, record.value) for record in records] == [
        ((name, 0), 1000, b"key", b"0"),
        ((name, 0), 1001, b"key", b"1"),
    ]
    assert [record.value for record in read(cluster, name, tail=2, timeout=5)] == [b"1"]
    assert [record.value for record in read(cluster, name, start={(name, 0): 0}, end={(name, 0): 1}, timeout=5)] == [
        b"0"
    ]


def test_follow(cluster: Cluster) -> None:
    """Until all partitions, the empty ones too, have reached their ends, and on."""
    name = TRADES.full_name(cluster.prefix)
    seen = []
    for batch in follow(cluster, {name: None}, timeout=5):
        seen += [record.value for record in batch.records]
        if not batch.behind:
            break
    assert seen == [b"0", b"1"]


def test_offsets(cluster: Cluster) -> None:
    """The mock cluster does not know offsets by time: the day begins with the first record."""
    place = (TRADES.full_name(cluster.prefix), 0)
    assert offsets(cluster, {place: FIRST}) == {place: 0}
    assert offsets(cluster, {place: LAST}) == {place: 3}
    assert offsets(cluster, {}) == {}
    assert day_start(cluster, {place: None}) == {place: 0}


def test_groups_of_a_broker_that_cannot_list_them(cluster: Cluster) -> None:
    """There are none."""
    assert group_lag(cluster, timeout=5) == []


def test_no_broker() -> None:
    """The error comes at the deadline and names what was asked for."""
    place = ("bourse.trades", 3)
    nobody = Cluster("127.0.0.1:9", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"offsets of bourse\.trades-3"):
        list(read(nobody, place[0], start={place: 0}, timeout=0.2))


def test_without_click() -> None:
    """Subscribers can use the module without the command line's libraries."""
    code = "import sys, bourse_schemas.reading; sys.exit('click' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Silent(Cluster):
    """A cluster whose administration client never answers."""

    def _connect(self, timeout: float = 1.0, *, every_broker: bool = False) -> Any:
        admin = SimpleNamespace(
            describe_topics=lambda names, **_: {"t": Future()},
            describe_configs=lambda resources, **_: dict.fromkeys(resources, Future()),
            poll=lambda _: 0,
        )
        metadata = SimpleNamespace(controller_id=1, brokers={1: SimpleNamespace(id=1, host="h", port=9)}, topics={})
        if every_broker:
            self._require_brokers(admin, kafka._Failures(), metadata)  # type: ignore[arg-type]
        return admin, metadata


def test_an_answer_that_never_comes_is_waited_for_by_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an external failure like any other, with a name, and no traceback."""
    monkeypatch.setattr(kafka, "ANSWER_SECONDS", 0.01)
    cluster = Silent("h:9", "http://h")
    with pytest.raises(Unreachable, match="cannot describe t: no answer"):
        cluster.topics(["t"])
    with pytest.raises(Unreachable, match="broker 1 cannot be reached at h:9"):
        cluster.topics(["t"], every_broker=True)
