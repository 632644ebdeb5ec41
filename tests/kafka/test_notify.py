"""Notifications on real Kafka: killed at the worst moments, next to channels that refuse, hang or are not there."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, TopicPartition
from msgspec import structs

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.notify.words import example
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


def poll(number: int, count: int = 2) -> list[PriceAlert]:
    """Return the alerts of one poll, of several instruments."""
    return [
        structs.replace(
            example(datetime.now(UTC)),
            alert_id=f"alert-{number}-{index}",
            rule=f"rule-{number}-{index}-",
            message={"en": f"rule-{number}-{index}-"},
            instrument=f"IRO1TEST{index:04}",
            poll_sequence=number,
        )
        for index in range(count)
    ]


CHANNELS = """
version: 1
defaults: {language: en, fallback: rescue}
channels:
  robot: {webhook: {env: ROBOT}}
  phone: {url: {env: PHONE}}
  refusing: {webhook: {env: REFUSING}}
  hanging: {webhook: {env: HANGING}}
  lost: {webhook: {env: LOST}}
  rescue: {webhook: {env: RESCUE}, severity: critical}
"""


def repeated(messages: list[list[str]]) -> int:
    """Return how many messages have an alert that was in an earlier one."""
    seen: set[str] = set()
    again = 0
    for ids in messages:
        again += not seen.isdisjoint(ids)
        seen.update(ids)
    return again


def ids(web: Web) -> list[list[str]]:
    """Return the alerts of each message that a webhook got."""
    return [[alert["alert_id"] for alert in body["data"]["alerts"]] for body in web.bodies()]


def test_kills_and_bad_channels(cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """kill -9 while a message is handed over loses nothing and repeats one message at most.

    A channel that refuses (its alerts go to the fallback and to dead letters), one that hangs and one whose host does
    not exist do not affect the others, which get an alert soon after it is visible. A stop does not wait for them.
    """
    (tmp_path / "channels.yaml").write_text(CHANNELS, "utf-8")
    publisher, log = Publisher(cluster), tmp_path / "log"
    expected = {alert.alert_id for number in range(9) for alert in poll(number)}

    def phones() -> list[list[str]]:
        texts = [body["message"] for body in phone.bodies()]
        return [[each for each in sorted(expected) if each.replace("alert", "rule") + "-" in text] for text in texts]

    def start() -> Any:
        command = [sys.executable, "-m", "bourse_cli", "consume", "notify", "--topic-prefix", cluster.prefix]
        command += ["--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url]
        webs = {"ROBOT": robot, "REFUSING": refusing, "HANGING": hanging, "RESCUE": rescue}
        secrets = {name: f"{web.url}/{name.lower()}-secret" for name, web in webs.items()}
        secrets |= {"PHONE": phone.url.replace("http", "ntfy") + "/phone-secret", "LOST": "http://lost.invalid/secret"}
        return spawn(
            [*command, "--channels", str(tmp_path / "channels.yaml")], stdout=log, stderr=log, env=os.environ | secrets
        )

    def kill_at(web: Web, count: int, process: Any) -> threading.Event:
        """Kill the process when it has handed over this number of messages to a server, before that has answered."""
        dead = threading.Event()

        def strike() -> None:
            if len(web.asked) == count and not dead.is_set():
                process.kill()
                dead.set()

        web.then = strike
        return dead

    released = threading.Event()
    with serving() as robot, serving() as phone, serving() as refusing, serving() as hanging, serving() as rescue:
        phone.status, refusing.status, hanging.then = 500, 401, lambda: (released.wait(120), None)[1]
        with start() as process:
            dead = kill_at(robot, 2, process)
            # A new channel begins at the end of the topic.
            wait_for(lambda: log.read_text("utf-8").count('"event": "assigned"') == 6, 60)
            publisher.publish(poll(0))
            wait_for(lambda: robot.asked, 30)
            wait_for(lambda: "error=500" in log.read_text("utf-8"), 60)  # the phone
            publisher.publish(poll(1))
            publisher.publish(poll(2))
            wait_for(dead.is_set, 30)
        assert (len(robot.asked), len(phone.asked)) == (2, 0)
        phone.status = 200
        with start() as process:
            dead = kill_at(phone, 2, process)
            wait_for(lambda: phone.asked, 60)
            publisher.publish(poll(3))
            wait_for(dead.is_set, 60)
        with start() as process:
            publisher.publish(poll(4))
            wait_for(lambda: expected & {f"alert-4-{n}" for n in range(2)} <= set().union(*ids(robot)), 60)
            took = []
            for number in range(5, 9):
                visible = publisher.publish(poll(number))
                wait_for(lambda number=number: f"alert-{number}-0" in ids(robot)[-1], 30)
                took.append(robot.asked[-1].at - visible)
            wait_for(lambda: expected <= set().union(*phones()), 60)
            letters = wait_for(lambda: len(found := dead_letters(cluster)) >= len(expected) and found, 60)
            assert process.terminate() == 0, "one channel hangs"
            released.set()
    assert expected == set().union(*ids(robot)) == set().union(*ids(rescue))
    assert repeated(ids(robot)) in (1, 2)
    assert repeated(phones()) in (1, 2)
    assert min(took) < 2.0
    assert {letter.reason for letter in letters} == {Reason.NOTIFICATION_FAILED}
    assert {letter.payload for letter in letters} == alerts_on(cluster)
    assert {letter.message for letter in letters} == {"channel refusing: 127.0.0.1 answers 401 Unauthorized"}
    text = log.read_text("utf-8")
    assert "secret" not in text
    assert "Traceback" not in text


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
