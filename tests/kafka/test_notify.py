"""Notifications on real Kafka: killed at the worst moments, given up, and how soon an alert is with its channel."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, TopicPartition
from msgspec import structs

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.notify import words
from bourse_consumers.notify.channels import Channel
from bourse_consumers.notify.consumer import Notify
from bourse_consumers.notify.policy import Policy
from bourse_consumers.notify.sending import Apprised, Webhook
from bourse_consumers.runner import Runner
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import spawn
from bourse_schemas.events import DeadLetter, PriceAlert, Reason
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, DEAD_LETTERS
from tests.web import Web, serving

pytestmark = pytest.mark.kafka


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return topics without records."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return cluster


class Publisher:
    """Publishes alerts, those of a poll in one transaction, to the only partition."""

    def __init__(self, cluster: Cluster) -> None:
        self._serializer = cluster.registry().serializer(ALERTS, cluster.prefix)
        self._producer = cluster.transactional_producer(f"{cluster.prefix}-test")
        self._producer.init_transactions(10)

    def publish(self, alerts: Sequence[PriceAlert]) -> float:
        """Return when they could be read, by the monotonic clock."""
        self._producer.begin_transaction()
        for alert in alerts:
            record = self._serializer(alert)
            self._producer.produce(record.topic, record.value, record.key, 0, timestamp=record.timestamp)
        self._producer.commit_transaction()
        return time.monotonic()


def poll(number: int, count: int = 5) -> list[PriceAlert]:
    """Return the alerts of one poll, of several instruments."""
    example = words.example(datetime.now(UTC))
    return [
        structs.replace(
            example,
            alert_id=f"alert-{number}-{index}",
            rule=f"rule-{number}-{index}-",
            message={"en": f"rule-{number}-{index}-"},
            instrument=f"IRO1TEST{index:04}",
            poll_sequence=number,
            channels=["robot", "phone"],
        )
        for index in range(count)
    ]


CHANNELS = """
version: 1
defaults: {language: en, limit: 600}
channels:
  robot: {webhook: {env: ROBOT}}
  phone: {url: {env: PHONE}}
"""


def repeated(messages: list[list[str]]) -> int:
    """Return how many messages tell something that was told before."""
    seen: set[str] = set()
    again = 0
    for told in messages:
        again += not seen.isdisjoint(told)
        seen.update(told)
    return again


def test_a_kill_loses_nothing_and_repeats_one_message_at_most(
    cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """kill -9 when a message was handed over and nobody knows; one channel is behind, the other ahead."""
    (tmp_path / "channels.yaml").write_text(CHANNELS, "utf-8")
    publisher, kills = Publisher(cluster), 2
    expected = {alert.alert_id for number in range(5) for alert in poll(number, 2)}

    def robots() -> list[list[str]]:
        return [[alert["alert_id"] for alert in body["alerts"]] for body in robot.bodies()]

    def phones() -> list[list[str]]:
        texts = [body["message"] for body in phone.bodies()]
        return [[each for each in sorted(expected) if each.replace("alert", "rule") + "-" in text] for text in texts]

    def start() -> Any:
        where = ["--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url]
        command = [
            sys.executable,
            "-m",
            "bourse_cli",
            "consume",
            "notify",
            "--topic-prefix",
            cluster.prefix,
            *where,
        ]
        log = tmp_path / "log"
        secrets = {"ROBOT": robot.url + "/robot-secret", "PHONE": phone.url.replace("http", "ntfy") + "/phone-secret"}
        return spawn(
            [*command, "--channels", str(tmp_path / "channels.yaml")], stdout=log, stderr=log, env=os.environ | secrets
        )

    def kill_at(web: Web, count: int, process: Any) -> threading.Event:
        """Kill the process when it has handed over so many messages to a server, before that has answered."""
        dead = threading.Event()

        def strike() -> None:
            if len(web.asked) == count and not dead.is_set():
                process.kill()
                dead.set()

        web.then = strike
        return dead

    with serving() as robot, serving() as phone:
        phone.status = 500
        with start() as process:
            dead = kill_at(robot, 2, process)
            # A new channel begins at the end of the topic.
            wait_for(lambda: (tmp_path / "log").read_text("utf-8").count('"event": "assigned"') == 2, 30)
            publisher.publish(poll(0, 2))
            wait_for(lambda: robot.asked, 30)
            wait_for(lambda: '"retrying"' in (tmp_path / "log").read_text("utf-8"), 30)  # the other channel
            publisher.publish(poll(1, 2))
            publisher.publish(poll(2, 2))
            wait_for(dead.is_set, 30)
        assert (len(robot.asked), len(phone.asked)) == (2, 0)
        phone.status = 200
        with start() as process:
            dead = kill_at(phone, 2, process)
            wait_for(lambda: phone.asked, 40)
            publisher.publish(poll(3, 2))
            wait_for(dead.is_set, 30)
        with start() as process:
            publisher.publish(poll(4, 2))
            wait_for(lambda: expected <= {each for told in robots() for each in told}, 40)
            wait_for(lambda: expected <= {each for told in phones() for each in told}, 40)
            assert process.terminate() == 0
    assert repeated(robots()) in range(1, kills + 1)
    assert repeated(phones()) in range(1, kills + 1)
    said = (tmp_path / "log").read_text("utf-8")
    assert "secret" not in said
    assert "Traceback" not in said


def test_soon_with_one_channel_while_another_is_given_up(
    cluster: Cluster, wait_for: Callable[..., Any], tmp_path: Path
) -> None:
    """Within two seconds of being readable; what the other does not accept goes to its fallback and dead letters."""
    publisher = Publisher(cluster)
    with serving() as robot, serving() as other, serving() as phone, ExitStack() as stack:
        phone.status = 503
        channels = {
            "robot": Channel(Policy("robot", limit=1000), Webhook(robot.url)),
            "phone": Channel(Policy("phone"), Apprised(phone.url.replace("http", "ntfy") + "/metals"), "other"),
            "other": Channel(Policy("other"), Webhook(other.url)),
        }
        for name in ("robot", "phone"):
            stack.enter_context(running(cluster, name, channels, wait_for))
        took = []
        for number in range(12):
            visible = publisher.publish(poll(number))
            wait_for(lambda number=number: len(robot.asked) == number + 1)
            took.append(robot.asked[-1].at - visible)
            assert len(robot.bodies()[-1]["alerts"]) == 5, "of one poll"
        letters = wait_for(lambda: len(found := dead_letters(cluster)) >= 5 and found, 20)
        assert max(took) < 2.0
        assert {letter.reason for letter in letters} == {Reason.NOTIFICATION_FAILED}
        assert {letter.payload for letter in letters} <= alerts_on(cluster)
        assert other.bodies()[0]["alerts"][0]["alert_id"].startswith("alert-")


@contextmanager
def running(
    cluster: Cluster, name: str, channels: Mapping[str, Channel], wait_for: Callable[..., Any]
) -> Iterator[None]:
    """Run the consumer of a channel in a thread."""
    consumer = Notify(name, channels, patience=timedelta(seconds=1))
    group = f"{cluster.prefix}-notify-{name}"
    stream = KafkaStream(cluster, group, consumer.topics, consumer.emits, from_end=consumer.from_end)
    runner = Runner(consumer, stream, stream.decode, name=name)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: runner._opened, 20)
        yield
    finally:
        runner.stop()
        thread.join(15)


def alerts_on(cluster: Cluster) -> set[bytes]:
    """Return the bytes of all alerts."""
    return {value for value, _ in records(cluster, ALERTS.full_name(cluster.prefix), ALERTS.partitions)}


def dead_letters(cluster: Cluster) -> list[DeadLetter]:
    """Return the dead letters there are."""
    decode = cluster.registry().deserializer(DeadLetter)
    return [decode(value) for value, _ in records(cluster, DEAD_LETTERS.full_name(cluster.prefix), 1)]


def records(cluster: Cluster, topic: str, partitions: int) -> list[tuple[bytes, int]]:
    """Return all records of a topic: value and partition."""
    client = cluster.consumer(enable_partition_eof=True)
    client.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(partitions)])
    found, ended = [], 0
    while ended < partitions:
        message = client.poll(1)
        if message is not None and message.error() is not None:
            ended += 1
        elif message is not None:
            value = message.value()
            assert isinstance(value, bytes)
            found.append((value, int(message.partition() or 0)))
    client.close()
    return found
