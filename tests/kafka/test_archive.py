"""The archive on real Kafka: members killed and frozen while a day is produced, and the proof against the topic."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not in its __all__
    OffsetSpec,
)

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.archive.table import Table
from bourse_consumers.archive_cli import archive
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner, StreamBroken
from bourse_producer.replay import Replay
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TRADES
from reliability.chaos_archive import Options, run

pytestmark = pytest.mark.kafka


@pytest.mark.usefixtures("kafka")
def test_ten_strikes_at_each_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is missing or stored twice; all at once, as most of it is waiting."""
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
        monkeypatch.setenv(f"AWS_{name}", "")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def strike(sink: str) -> dict[str, Any]:
        folder = tmp_path / sink
        folder.mkdir()
        return run(Options(kills=10, seed=1, sink=sink, members=2), folder)

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(strike, ["delta", "s3", "postgres"]):
            assert found["kills"] + found["freezes"] + found["broker_restarts"] + found["power_cuts"] == 10
            assert (found["missing"], found["twice"], found["verify"]) == (0, 0, "ok"), found
            assert found.get("wrong_reads", 0) == 0
            assert found["rows"] == found["expected"] > 19_000


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return topics without records."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return cluster


def publish(cluster: Cluster, events: list[TradeEvent], *junk: bytes) -> None:
    """Publish events in transactions of a few hundred, and bytes that are no event."""
    serializer = cluster.registry().serializer(TRADES, cluster.prefix)
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    for start in range(0, len(events), 300):
        producer.begin_transaction()
        for event in events[start : start + 300]:
            record = serializer(event)
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        for value in junk:
            producer.produce(TRADES.full_name(cluster.prefix), value, b"junk")
        producer.commit_transaction()
    producer.close()


def keep(cluster: Cluster, to: Path, rows: int, **limits: Any) -> None:
    """Run the archive until it has taken over so many rows."""
    consumer = DeltaArchive(str(to), **limits)
    stream = KafkaStream(cluster, f"{cluster.prefix}-archive", consumer.topics, consumer.emits)
    runner = Runner(consumer, stream, name="archive", batch_size=2_000)
    while runner._rows < rows:
        try:
            runner.step()
        except StreamBroken:  # a busy broker did not answer in time
            stream.reset()
    runner.stop()
    runner.run()


def where(cluster: Cluster) -> list[str]:
    """Return the options that name the cluster."""
    return ["--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url]


def verify(cluster: Cluster, to: Path, *more: str) -> Result:
    """Run `bourse archive verify`."""
    return CliRunner().invoke(archive, ["verify", "--to", str(to), *where(cluster), "--json", *more])


def damage(table: Table) -> None:
    """Delete a data file."""
    table.refresh()
    (file,) = table.files()
    assert table.storage.folder is not None
    (table.storage.folder / file.path).unlink()


def again_and_again(step: Callable[[], object]) -> None:
    """Do it until it raises, for ten seconds at most."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        step()


def test_what_the_topic_deletes_is_noticed(cluster: Cluster, tmp_path: Path) -> None:
    """What is gone is not skipped silently."""
    name = TRADES.full_name(cluster.prefix)
    replay = Replay()
    replay.day(REAL_DAY)
    publish(cluster, replay.events[:900])
    admin = cluster.admin()
    consumer = DeltaArchive(str(tmp_path))
    stream = KafkaStream(cluster, f"{cluster.prefix}-archive", consumer.topics, consumer.emits)
    runner = Runner(consumer, stream, name="archive", batch_size=100)
    while not runner._rows:
        runner.step()
    consumer.close()
    ends = {TopicPartition(name, number, 10_000_000) for number in range(6)}
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    found = admin.list_offsets(dict.fromkeys(ends, latest))
    cut = [TopicPartition(each.topic, each.partition, at.result().offset) for each, at in found.items()]
    for done in admin.delete_records(cut).values():
        done.result()
    stream.seek(dict.fromkeys(stream._assigned, 0))
    with pytest.raises(StreamBroken):
        again_and_again(lambda: stream.poll(0.2, 100))
    stream.reset()
    with pytest.raises(ConfigurationError, match=r"the topic has deleted what this archive lacks.*--accept-loss"):
        again_and_again(runner.step)
    stream.close()


def test_a_real_day_is_proved_against_its_topic(cluster: Cluster, tmp_path: Path) -> None:
    """Equal row by row, before and after its files are merged; records that are not events are dead letters."""
    replay = Replay()
    replay.day(REAL_DAY)
    publish(cluster, replay.events, b"junk")
    keep(cluster, tmp_path, len(replay.events), commit_rows=2_000)
    result = verify(cluster, tmp_path)
    report = json.loads(result.stdout)
    assert (result.exit_code, report["findings"]) == (0, [])
    assert report["rows"] == report["compared"] == len(replay.events) == 19_346
    about = Table.open(f"{tmp_path}/{TRADES.full_name(cluster.prefix)}")
    assert about is not None
    assert about.about["cluster"]
    assert about.about["topic_id"]
    assert len(about.files()) > 5
    ran = CliRunner().invoke(archive, ["optimize", "--to", str(tmp_path), "--json"])
    merged = json.loads(ran.stdout)
    assert (ran.exit_code, merged["files"], merged["verified_day"]) == (0, 1, "2019-08-21")
    again = json.loads(verify(cluster, tmp_path).stdout)
    assert (again["files"], again["findings"], again["compared"]) == (1, [], 19_346)
    damage(about)
    assert verify(cluster, tmp_path).exit_code == 1
    repaired = CliRunner().invoke(archive, ["repair", "--to", str(tmp_path), "--from-topic", *where(cluster)])
    assert repaired.exit_code == 0, repaired.output
    assert "written again: 2019-08-21" in repaired.stdout
    assert json.loads(verify(cluster, tmp_path).stdout)["compared"] == 19_346


def test_a_topic_that_was_created_again_is_refused(
    cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Although it has as many records as before."""
    name = TRADES.full_name(cluster.prefix)
    replay = Replay()
    replay.day(REAL_DAY)
    publish(cluster, replay.events[:300])
    keep(cluster, tmp_path, 300)
    admin = cluster.admin()
    admin.delete_topics([name], operation_timeout=10)[name].result(15)
    wait_for(lambda: name not in cluster.metadata().topics, 15)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    publish(cluster, replay.events[:600])
    with pytest.raises(ConfigurationError, match=r"was deleted and created again since .*: use a new folder"):
        keep(cluster, tmp_path, 300)
