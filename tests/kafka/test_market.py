"""Whole polls on real Kafka: take-overs, fences, standbys, late brokers, added partitions, lost offsets."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]  # not in its __all__

from bourse_cli.health import Monitor
from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.api import Day, Emit, MarketConsumer, WholePoll
from bourse_consumers.kafka_market import KafkaMarket
from bourse_consumers.runner import Runner
from bourse_consumers.testing import marker, trade
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import Child, spawn
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import DeadLetter, Event, Reason, Stage
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import DEAD_LETTERS, POLLS, TRADES, Topic
from reliability.brokers import Brokers

pytestmark = pytest.mark.kafka
OPEN = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
GROUP = "market"


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return a cluster with our topics under a prefix of the test's own."""
    return declared(Cluster(kafka.bootstrap_servers, small_registry, prefix))


def declared(cluster: Cluster, replicas: int = 1) -> Cluster:
    """Make the topics and register the schemas."""
    apply_topics(cluster, plan_topics(cluster, {}, replicas, any_time=True))
    cluster.registry().register_all(cluster.prefix)
    return cluster


class Producing:
    """Publishes polls, each as one transaction unless more of them are to go together."""

    def __init__(self, cluster: Cluster) -> None:
        registry = cluster.registry()
        self._serializers: dict[type[Event], Any] = {
            topic.event: registry.serializer(topic, cluster.prefix) for topic in (TRADES, POLLS)
        }
        self._producer = cluster.transactional_producer(f"{cluster.prefix}-test")
        self._producer.init_transactions(10)

    def polls(self, first: int, last: int, instruments: int = 20, together: int = 1) -> None:
        """Publish polls with these sequences, an event of each instrument in each."""
        for start in range(first, last + 1, together):
            self._producer.begin_transaction()
            for sequence in range(start, min(start + together, last + 1)):
                self._produce(sequence, instruments)
            self._producer.commit_transaction(30)

    def _produce(self, sequence: int, instruments: int) -> None:
        at = OPEN + timedelta(minutes=sequence)
        fields: dict[str, Any] = {"sequence": sequence, "observed_at": at, "poll_sequence": sequence}
        events = [trade(instrument=f"IRO1TEST{number:04}", **fields) for number in range(instruments)]
        for event in (*events, marker(*events)):
            record = self._serializers[type(event)](event)
            self._producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)


class Counting(MarketConsumer):
    """Publishes for each poll a record that names it and how many events the day has had."""

    emits: Sequence[Topic] = (DEAD_LETTERS,)

    def __init__(self) -> None:
        self.opened: list[float] = []
        self.polls: list[tuple[int, bool, bool]] = []
        self.total = 0

    def open(self, day: Day) -> None:
        self.opened.append(time.monotonic())
        self.total = 0

    def process_poll(self, poll: WholePoll) -> list[Emit]:
        self.total += poll.frame().height
        self.polls.append((poll.marker.poll_sequence, poll.replay, poll.complete))
        return [letter(f"{poll.marker.poll_sequence} {self.total}")]

    def live(self) -> list[int]:
        return [sequence for sequence, replay, _ in self.polls if not replay]


def letter(message: str) -> Emit:
    fields: dict[str, Any] = {"reason": Reason.REJECTED, "stage": Stage.CONSUME, "origin": "test", "payload": b""}
    return Emit(DEAD_LETTERS, DeadLetter(message=message, original_headers={}, failed_at=OPEN, **fields))


@contextmanager
def running(cluster: Cluster, consumer: MarketConsumer) -> Iterator[Runner]:
    """Run a member of the group in a thread until the block ends."""
    stream = KafkaMarket(cluster, f"{cluster.prefix}-{GROUP}", consumer.emits)
    runner = Runner(consumer, stream, name="test")
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        yield runner
    finally:
        runner.stop()
        thread.join(15)
        assert not thread.is_alive()


def published(cluster: Cluster) -> list[str]:
    """Return what was published, as a read_committed consumer sees it."""
    decode = cluster.registry().deserializer(DeadLetter)
    records = read(cluster, DEAD_LETTERS.full_name(cluster.prefix))
    return [decode(record.value).message for record in records]


def begun(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Let the group commit the beginning of the empty topic: a group without committed polls begins at the end."""
    consumer = Counting()
    with running(cluster, consumer):
        wait_for(lambda: consumer.opened, 30)


def expected(polls: int, instruments: int = 20) -> list[str]:
    return [f"{sequence} {sequence * instruments}" for sequence in range(1, polls + 1)]


def test_a_successor_rebuilds_the_day_and_repeats_nothing(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """What was published and the committed poll are one transaction; the rest of the day is only rebuilt."""
    producing = Producing(cluster)
    begun(cluster, wait_for)
    producing.polls(1, 10)
    first, second = Counting(), Counting()
    with running(cluster, first):
        wait_for(lambda: len(first.live()) == 10, 30)
    producing.polls(11, 12)
    with running(cluster, second):
        wait_for(lambda: len(published(cluster)) == 12, 30)
    assert second.polls == [(number, number <= 10, True) for number in range(1, 13)]
    assert published(cluster) == expected(12)


def test_a_new_group_begins_at_the_last_poll(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Also when its offsets have expired: the day is rebuilt silently, and nothing of the past is published."""
    producing = Producing(cluster)
    producing.polls(1, 5)
    first = Counting()
    with running(cluster, first):
        wait_for(lambda: len(first.polls) == 5, 30)
        producing.polls(6, 6)
        wait_for(lambda: published(cluster) == ["6 120"], 30)
    admin, group = cluster.admin(), f"{cluster.prefix}-{GROUP}"
    admin.delete_consumer_groups([group])[group].result(10)
    second = Counting()
    with running(cluster, second):
        wait_for(lambda: len(second.polls) == 6, 30)
        producing.polls(7, 7)
        wait_for(lambda: len(published(cluster)) == 2, 30)
    assert published(cluster) == ["6 120", "7 140"]
    assert second.live() == [7]


def test_a_day_is_rebuilt_in_seconds(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """300 polls with 143 events each."""
    producing = Producing(cluster)
    producing.polls(1, 300, 143, together=30)
    consumer = Counting()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.polls) == 300, 60)
        took = time.monotonic() - consumer.opened[0]
    print(f"rebuilt in {took:.2f} s")
    assert consumer.total == 300 * 143
    assert took < 6  # two seconds on a machine that does nothing else


def test_members_on_standby_come_and_go_unnoticed(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Ten of them cause neither a rebuild nor a pause."""
    producing = Producing(cluster)
    begun(cluster, wait_for)
    active = Counting()
    with running(cluster, active):
        wait_for(lambda: active.opened, 30)
        for number in range(1, 11):
            standby = Counting()
            with running(cluster, standby) as other:
                wait_for(lambda other=other: other._opened, 20)
                producing.polls(number, number)
                wait_for(lambda number=number: active.live()[-1:] == [number], 10)
            assert standby.opened == []
        assert len(active.opened) == 1
    assert published(cluster) == expected(10)


def test_a_clean_stop_hands_over_within_two_seconds(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """The fastest of three, since the machine may be busy; none takes as long as a session."""
    begun(cluster, wait_for)
    took = []
    for _ in range(3):
        active, standby = Counting(), Counting()
        with running(cluster, active) as leader:
            wait_for(lambda active=active: active.opened, 30)
            with running(cluster, standby) as other:
                wait_for(lambda other=other: other._opened, 20)
                stopped = time.monotonic()
                leader.stop()
                wait_for(lambda standby=standby: standby.opened, 10)
                took.append(standby.opened[0] - stopped)
    print("handed over in", *(f"{seconds:.2f} s" for seconds in took))
    assert min(took) < 2
    assert max(took) < 6


def test_partitions_that_are_added_are_read(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """While it runs: no poll is incomplete for that."""
    producing = Producing(cluster)
    begun(cluster, wait_for)
    consumer = Counting()
    with running(cluster, consumer):
        producing.polls(1, 2)
        wait_for(lambda: len(consumer.live()) == 2, 30)
        name = TRADES.full_name(cluster.prefix)
        admin = cluster.admin()
        admin.create_partitions([NewPartitions(name, 12)])[name].result(10)
        producing = Producing(cluster)  # a producer that knows them
        producing.polls(3, 5, 60)
        wait_for(lambda: len(consumer.live()) == 5, 60)
    assert [complete for *_, complete in consumer.polls] == [True] * 5


def test_a_quiet_market_stays_ready_and_a_lost_topic_is_noticed(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """No poll for longer than a connection may be idle; then trades are deleted, which ends also the standby."""
    settings = {"statistics.interval.ms": "200", "connections.max.idle.ms": "4000"}
    monitors, streams, errors = [Monitor("one"), Monitor("two")], list[KafkaMarket](), list[str]()

    def run(runner: Runner) -> None:
        try:
            runner.run()
        except ConfigurationError as error:
            errors.append(str(error))

    for monitor in monitors:
        watched = replace(cluster, settings=settings, on_statistics=monitor.statistics)
        consumer = Counting()
        streams.append(stream := KafkaMarket(watched, f"{cluster.prefix}-{GROUP}", consumer.emits))
        runner = Runner(consumer, stream, name="test", monitor=monitor)
        threading.Thread(target=run, args=(runner,), daemon=True).start()
    wait_for(lambda: all(monitor.reasons() == {} for monitor in monitors), 30)
    wait_for(lambda: sorted(stream._reader is None for stream in streams) == [False, True], 30)
    quiet = time.monotonic() + 6
    while time.monotonic() < quiet:
        assert [monitor.reasons() for monitor in monitors] == [{}, {}]
        threading.Event().wait(0.1)
    name, admin = TRADES.full_name(cluster.prefix), cluster.admin()
    admin.delete_topics([name])[name].result(10)

    def noticed() -> bool:
        for stream in streams:
            stream._refreshed = 0.0  # it is time to ask again
        return len(errors) == 2

    wait_for(noticed, 30)
    assert all(f"no topic {name}" in error and "bourse topics apply" in error for error in errors)


CHILD = """
import sys, time
from pathlib import Path
from bourse_consumers.kafka_market import KafkaMarket
from bourse_consumers.runner import Runner
from bourse_consumers.transactions import Transactions
from bourse_schemas.kafka import Cluster
from tests.kafka.test_market import Counting

servers, registry, prefix, group, folder, where = sys.argv[1:]

class Watched(Transactions):
    def _transact(self, producer, records, offsets, group):
        if not records or where != "transaction":
            return super()._transact(producer, records, offsets, group)
        producer.begin_transaction()
        for record in records:
            self._produce(producer, record)
        producer.send_offsets_to_transaction(list(offsets), group)
        producer.flush(10)
        (Path(folder) / "mark").touch()
        time.sleep(60)

class Marking(Counting):
    def open(self, day):
        super().open(day)
        (Path(folder) / "active").touch()
    def process_poll(self, poll):
        if where == "process" and not poll.replay and poll.marker.poll_sequence == 2:
            (Path(folder) / "mark").touch()
            for _ in range(30):
                time.sleep(0.1)
        return super().process_poll(poll)

cluster = Cluster(servers, registry, prefix)
consumer = Marking()
stream = KafkaMarket(cluster, group, consumer.emits)
stream._transactions.__class__ = Watched
Runner(consumer, stream, name="child").run()
"""


@contextmanager
def child(cluster: Cluster, folder: Path, where: str) -> Iterator[Child]:
    """Run a member in a process of its own; files show when it is active and when it is at the given place."""
    arguments = (cluster.bootstrap_servers, cluster.registry_url, cluster.prefix, f"{cluster.prefix}-{GROUP}", folder)
    command = [sys.executable, "-c", CHILD, *map(str, arguments), where]
    with spawn(command, stdout=folder / "log", stderr=folder / "log") as process:
        yield process


@pytest.mark.parametrize("where", ["transaction", "process"])
def test_a_kill_hands_over_within_twelve_seconds(
    cluster: Cluster, tmp_path: Path, where: str, wait_for: Callable[..., Any]
) -> None:
    """kill -9 in the middle of a poll, or after everything was sent and before the commit: nothing is lost or twice."""
    producing = Producing(cluster)
    begun(cluster, wait_for)
    standby = Counting()
    with child(cluster, tmp_path, where) as process:
        wait_for((tmp_path / "active").exists, 30)
        with running(cluster, standby):
            producing.polls(1, 3)
            wait_for((tmp_path / "mark").exists, 30)
            process.kill()
            killed = time.monotonic()
            wait_for(lambda: standby.opened, 30)
            assert time.monotonic() - killed < 12
            wait_for(lambda: len(published(cluster)) >= 3, 30)
            producing.polls(4, 4)
            wait_for(lambda: len(published(cluster)) >= 4, 30)
    assert published(cluster) == expected(4)


def test_an_active_member_that_slept_publishes_nothing(
    cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Stopped in the middle of a poll until another member is active, and woken: its transaction is fenced."""
    producing = Producing(cluster)
    begun(cluster, wait_for)
    standby = Counting()
    with child(cluster, tmp_path, "process") as process:
        wait_for((tmp_path / "active").exists, 30)
        with running(cluster, standby):
            producing.polls(1, 3)
            wait_for((tmp_path / "mark").exists, 30)
            process.send(signal.SIGSTOP)
            wait_for(lambda: len(published(cluster)) >= 3, 40)
            process.send(signal.SIGCONT)
            wait_for(lambda: "starting over" in (tmp_path / "log").read_text("utf-8"), 40)
            producing.polls(4, 6)
            wait_for(lambda: len(published(cluster)) >= 6, 40)
    assert published(cluster) == expected(6)


def test_a_backlog_behind_a_slow_broker_has_no_incomplete_poll(
    small_registry: str, prefix: str, wait_for: Callable[..., Any]
) -> None:
    """300 polls; one broker of three answers a tenth of the time only, and its partitions come late."""
    with Brokers() as brokers:
        cluster = declared(Cluster(brokers.bootstrap_servers, small_registry, prefix), 3)
        begun(cluster, wait_for)
        Producing(cluster).polls(1, 300, together=30)
        slow, over = brokers._children[2], threading.Event()
        assert slow is not None

        def hold_up() -> None:
            while not over.is_set():
                slow.send(signal.SIGSTOP)
                over.wait(1.2)
                slow.send(signal.SIGCONT)
                over.wait(0.1)

        thread = threading.Thread(target=hold_up)
        thread.start()
        consumer = Counting()
        try:
            with running(cluster, consumer):
                wait_for(lambda: len(consumer.live()) >= 300, 120)
        finally:
            over.set()
            thread.join()
        assert [each for each in consumer.polls if not each[2]] == []
        wait_for(lambda: published(cluster) == expected(300), 30)
