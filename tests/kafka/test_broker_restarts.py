"""A restart of the brokers, at any moment, followed by emits: every consumer goes on, or ends loudly and goes on."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException
from structlog.testing import capture_logs

from bourse_consumers.api import Batch, Consumer, Emit
from bourse_consumers.kafka_market import KafkaMarket
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_consumers.testing import trade
from bourse_consumers.transactions import TRANSACTION_MS
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import Child, spawn
from bourse_schemas.errors import Unreachable
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import DEAD_LETTERS, POLLS, TRADES, Topic
from reliability.brokers import Brokers
from tests.kafka.test_election import Lost
from tests.kafka.test_market import Counting, Producing, declared, letter

pytestmark = pytest.mark.kafka
# Longer than the brokers leave a transaction open.
IDLE_SECONDS = TRANSACTION_MS / 1000 + 2

RUN = """
import sys
from bourse_consumers.kafka_market import KafkaMarket
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner, connect
from bourse_cli.health import Monitor
from bourse_schemas.watchdog import stop_on_signals
from bourse_schemas.kafka import Cluster
from tests.kafka.test_broker_restarts import Copy
from tests.kafka.test_market import Counting

servers, registry, prefix, kind = sys.argv[1:]
cluster, stop, monitor = Cluster(servers, registry, prefix), stop_on_signals(), Monitor("test")
consumer = Counting() if kind == "market" else Copy()
group = f"{prefix}-{kind}"
stream = connect(
    lambda: KafkaMarket(cluster, group, consumer.emits)
    if kind == "market"
    else KafkaStream(cluster, group, consumer.topics, consumer.emits),
    "test", stop, monitor
)
if stream:
    Runner(consumer, stream, name="test", stop=stop, monitor=monitor).run()
"""


@pytest.fixture
def single(own_kafka: Callable[[], Kafka], small_registry: str, prefix: str) -> tuple[Kafka, Cluster]:
    """Return a broker of the test's own with our topics."""
    kafka = own_kafka()
    return kafka, declared(Cluster(kafka.bootstrap_servers, small_registry, prefix))


class Copy(Consumer):
    """Publishes the id of each event."""

    emits: Sequence[Topic] = (DEAD_LETTERS,)

    def process(self, batch: Batch) -> list[Emit]:
        return [letter(event.event_id) for event in batch.events]


class Supervised:
    """A consumer in a process that is started again when it ends, as by systemd."""

    def __init__(self, cluster: Cluster, kind: str, log: Path) -> None:
        arguments = [cluster.bootstrap_servers, cluster.registry_url, cluster.prefix, kind]
        self._command, self.log = [sys.executable, "-c", RUN, *arguments], log
        self._cluster, self.kind, self.ends = cluster, kind, list[int]()
        self._child: Child = spawn(self._command, stdout=log, stderr=log)

    def ready(self) -> bool:
        """Return whether it has begun: what is published from now on is news to it."""
        begun = r"\bactive\b" if self.kind == "market" else "partitions"
        return re.search(begun, self.log.read_text("utf-8")) is not None

    def published(self) -> list[str]:
        """Return what it has published: the market's messages have two words."""
        return [each for each in messages(self._cluster) if (" " in each) == (self.kind == "market")]

    def answered(self, count: int) -> bool:
        """Return whether it has published as many; start it again if it has ended."""
        if (code := self._child.poll()) is not None:
            self.ends.append(code)
            self._child = spawn(self._command, stdout=self.log, stderr=self.log)
        return len(self.published()) >= count

    def stop(self) -> tuple[int, float]:
        """Return the exit code and how long it took."""
        began = time.monotonic()
        self._child.send(signal.SIGTERM)
        return self._child.wait(20), time.monotonic() - began

    def close(self) -> None:
        self._child.kill()


@contextmanager
def both(cluster: Cluster, folder: Path, wait_for: Callable[..., Any]) -> Iterator[list[Supervised]]:
    """Run a consumer of records and one of whole polls next to each other; neither repeats anything or ends oddly."""
    children = [Supervised(cluster, kind, folder / kind) for kind in ("copy", "market")]
    try:
        wait_for(lambda: all(child.ready() for child in children), 60)
        yield children
    finally:
        for child in children:
            child.close()
    for child in children:
        found = child.published()
        print(f"{child.kind}: {len(found)} published, ends {child.ends}")
        assert len(found) == len(set(found))
        assert set(child.ends) <= {1}


def goes_on(children: Sequence[Supervised], polls: int, wait_for: Callable[..., Any]) -> None:
    """Wait until all of these polls, of 20 events, were answered: within a minute, or after a restart."""
    sent = time.monotonic()
    for child in children:
        count = polls * (20 if child.kind == "copy" else 1)
        wait_for(lambda child=child, count=count: child.answered(count), 150)
        assert time.monotonic() - sent < 60 or child.ends, child.log.read_text("utf-8")[-2000:]
        assert len(child.published()) == count


def messages(cluster: Cluster) -> list[str]:
    decode = cluster.registry().deserializer(DEAD_LETTERS.event)
    found: list[Any] = [decode(each.value) for each in read(cluster, DEAD_LETTERS.full_name(cluster.prefix))]
    return [each.message for each in found]


def test_the_only_broker_restarts_and_emits_follow(
    single: tuple[Kafka, Cluster], tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Killed or stopped; the first emits come at once, or when every transaction has timed out since."""
    kafka, cluster = single
    with both(cluster, tmp_path, wait_for) as children:
        Producing(cluster).polls(1, 1)
        goes_on(children, 1, wait_for)
        # Stopped and killed in the middle of polls: the next test.
        restarts = [(kafka.kill, 0), (kafka.stop, IDLE_SECONDS)]
        for number, (end, idle) in enumerate(restarts, 2):
            end()
            kafka.start()
            threading.Event().wait(idle)
            Producing(cluster).polls(number, number)
            goes_on(children, number, wait_for)
        for child in children:
            code, seconds = child.stop()
            assert (code, seconds < 5) == (0, True), child.log.read_text("utf-8")[-2000:]


def test_the_only_broker_restarts_in_the_middle_of_transactions(
    single: tuple[Kafka, Cluster], tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Polls keep coming as fast as they can; what was published is what was committed, each once."""
    kafka, cluster = single
    over, sequence = threading.Event(), 0

    def produce() -> None:
        nonlocal sequence
        while not over.is_set():
            with suppress(KafkaException):
                producing = Producing(cluster)
                while not over.is_set():
                    sequence += 1  # not used again, as it may have been committed
                    producing.polls(sequence, sequence)

    def complete(child: Supervised) -> bool:
        topic = TRADES if child.kind == "copy" else POLLS
        try:
            count = sum(1 for _ in read(cluster, topic.full_name(cluster.prefix)))
            return child.answered(count) and len(child.published()) == count > 0
        except Unreachable:
            return False  # a broker that has just started is asked again

    with both(cluster, tmp_path, wait_for) as children:
        thread = threading.Thread(target=produce)
        thread.start()
        try:
            for end in (kafka.stop, kafka.kill, None):
                seen = sequence
                wait_for(lambda seen=seen: sequence > seen + 10, 60)
                if end is not None:
                    end()
                    kafka.start()
        finally:
            over.set()
            thread.join(60)
        wait_for(lambda: all(map(complete, children)), 150)


def test_brokers_of_three_restart_one_after_the_other(
    small_registry: str, prefix: str, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """While events keep coming: nothing is lost, nothing twice, and it goes on each time."""
    with Brokers() as brokers:
        cluster = declared(Cluster(brokers.bootstrap_servers, small_registry, prefix), 3)
        with both(cluster, tmp_path, wait_for) as children:
            producing = Producing(cluster)
            producing.polls(1, 1)
            goes_on(children, 1, wait_for)
            for node in range(3):
                brokers.kill(node)
                producing.polls(node + 2, node + 2)
                goes_on(children, node + 2, wait_for)
                brokers.start(node)
                brokers.await_all()


def test_a_signal_ends_it_within_five_seconds_while_the_broker_is_stopped(
    single: tuple[Kafka, Cluster], tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """A broker that does not answer and does not hang up is the worst case."""
    kafka, cluster = single
    with both(cluster, tmp_path, wait_for) as children:
        Producing(cluster).polls(1, 1)
        goes_on(children, 1, wait_for)
        assert kafka._child is not None
        kafka._child.send(signal.SIGSTOP)
        threading.Event().wait(1)
        seconds = [child.stop()[1] for child in children]
        kafka._child.send(signal.SIGCONT)
        assert max(seconds) < 5.5


@pytest.mark.parametrize("kind", ["stream", "market"])
def test_a_client_that_has_lost_its_brokers_is_replaced(
    single: tuple[Kafka, Cluster], kind: str, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    """Otherwise the consumer is silent until it is started again."""
    monkeypatch.setattr("bourse_schemas.kafka.LOST_SECONDS", 1.0)
    _, cluster = single
    lost, group = Lost(cluster.bootstrap_servers, cluster.registry_url, cluster.prefix), f"{cluster.prefix}-lost"
    lost.consumer()  # those without a group are right
    consumer: Any = Counting() if kind == "market" else Copy()
    stream = (
        KafkaMarket(lost, group, consumer.emits)
        if kind == "market"
        else KafkaStream(lost, group, [TRADES], consumer.emits)
    )
    runner = Runner(consumer, stream, name="test")
    thread = threading.Thread(target=runner.run)
    with capture_logs() as lines:
        thread.start()
        try:
            begun = "active" if kind == "market" else "assigned"
            wait_for(lambda: any(line["event"] == begun for line in lines), 60)
            Producing(cluster).polls(1, 1)
            wait_for(lambda: messages(cluster), 30)
        finally:
            runner.stop()
            thread.join(15)


def test_an_event_that_is_too_large_ends_the_consumer_and_is_named(
    kafka: Kafka, small_registry: str, prefix: str, wait_for: Callable[..., Any]
) -> None:
    """Trying again for ever would be silent."""

    class Large(Consumer):
        emits = (TRADES,)

        def process(self, batch: Batch) -> list[Emit]:
            return [Emit(TRADES, trade(title="x" * 2_000_000))]

    cluster = declared(Cluster(kafka.bootstrap_servers, small_registry, prefix))
    Producing(cluster).polls(1, 1)
    consumer = Large()
    stream = KafkaStream(cluster, f"{prefix}-large", consumer.topics, consumer.emits)
    with pytest.raises(
        Exception, match=r"an event of 20\d+ bytes is larger than .*\.trades accepts \(key IRO1MADN0001\)"
    ):
        Runner(consumer, stream, name="test").run()


def test_a_record_whose_dead_letter_would_be_too_large_does_not_stop_it(
    kafka: Kafka, small_registry: str, prefix: str, wait_for: Callable[..., Any]
) -> None:
    """A megabyte that cannot be decoded, a third of it in a header."""

    class Seeing(Consumer):
        def __init__(self) -> None:
            self.seen: list[TradeEvent] = []

        def process(self, batch: Batch) -> None:
            self.seen += batch.events

    cluster = declared(Cluster(kafka.bootstrap_servers, small_registry, prefix))
    producer = cluster.transactional_producer(f"{prefix}-bad")
    producer.init_transactions(10)
    producer.begin_transaction()
    headers: list[tuple[str, str | bytes | None]] = [("trace", b"y" * 330_000)]
    producer.produce(TRADES.full_name(prefix), b"x" * 600_000, b"k", 0, headers=headers)
    producer.commit_transaction(10)
    Producing(cluster).polls(1, 1)
    consumer = Seeing()
    stream = KafkaStream(cluster, f"{prefix}-letters", consumer.topics, consumer.emits)
    runner = Runner(consumer, stream, name="test")
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: len(consumer.seen) == 20 and len(messages(cluster)) == 1, 30)
    finally:
        runner.stop()
        thread.join(15)
    assert "1 of 1 headers left out" in messages(cluster)[0]
