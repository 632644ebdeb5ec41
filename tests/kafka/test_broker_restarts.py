"""A restart of the brokers, at any moment, followed by emits: every consumer goes on, or ends loudly and goes on."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException

from bourse_consumers.api import Batch, Consumer, Emit
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_consumers.testing import trade
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import Child, spawn
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import DEAD_LETTERS, POLLS, TRADES, Topic
from reliability.brokers import Brokers
from tests.kafka.test_market import Producing, declared, letter

pytestmark = pytest.mark.kafka

RUN = """
import sys
from bourse_consumers.kafka_market import KafkaMarket
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.market import Market
from bourse_consumers.runner import Runner, connect
from bourse_cli.health import Monitor
from bourse_cli.options import stop_on_signals
from bourse_schemas.kafka import Cluster
from tests.kafka.test_broker_restarts import Copy
from tests.kafka.test_market import Counting

servers, registry, prefix, kind = sys.argv[1:]
cluster, stop, monitor = Cluster(servers, registry, prefix), stop_on_signals(), Monitor("test")
if kind == "market":
    made = Counting()
    stream = connect(lambda: KafkaMarket(cluster, prefix + "-market", made.emits), "test", stop, monitor)
    consumer = stream and Market(made, stream.polls, "test")
else:
    consumer = Copy()
    stream = connect(lambda: KafkaStream(cluster, prefix + "-copy", Copy.topics, Copy.emits), "test", stop, monitor)
if stream:
    Runner(consumer, stream, stream.decode, name="test", stop=stop, monitor=monitor).run()
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
        self.ends: list[int] = []
        self._child: Child = spawn(self._command, stdout=log, stderr=log)

    def ready(self) -> bool:
        """Return whether it has begun: what is published from now on is news to it."""
        begun = r"\bactive\b" if self._command[-1] == "market" else "partitions"
        return re.search(begun, self.log.read_text("utf-8")) is not None

    def look(self) -> None:
        if (code := self._child.poll()) is not None:
            self.ends.append(code)
            self._child = spawn(self._command, stdout=self.log, stderr=self.log)

    def stop(self) -> tuple[int, float]:
        """Return the exit code and how long it took."""
        began = time.monotonic()
        self._child.send(signal.SIGTERM)
        return self._child.wait(20), time.monotonic() - began

    def close(self) -> None:
        self._child.kill()


def messages(cluster: Cluster) -> list[str]:
    decode = cluster.registry().deserializer(DEAD_LETTERS.event)
    found: list[Any] = [decode(each.value) for each in read(cluster, DEAD_LETTERS.full_name(cluster.prefix))]
    return [each.message for each in found]


@pytest.mark.parametrize("kind", ["copy", "market"])
@pytest.mark.parametrize("pause", [0.0, 20.0], ids=["at once", "idle for long"])
def test_the_only_broker_restarts_and_emits_follow(
    single: tuple[Kafka, Cluster], tmp_path: Path, kind: str, pause: float, wait_for: Callable[..., Any]
) -> None:
    """Three times, killed and stopped; the first emits come at once or long after the broker is back."""
    kafka, cluster = single
    child = Supervised(cluster, kind, tmp_path / "log")
    try:
        wait_for(child.ready, 60)
        Producing(cluster).polls(1, 1)
        count = 1 if kind == "market" else 20
        wait_for(lambda: len(messages(cluster)) == count, 60)
        for number in (2, 3, 4):
            (kafka.kill if number % 2 else kafka.stop)()
            kafka.start()
            back = time.monotonic()
            while time.monotonic() < back + pause:
                child.look()
                threading.Event().wait(0.2)
            Producing(cluster).polls(number, number)
            sent = time.monotonic()

            def arrived(number: int = number) -> bool:
                child.look()
                return len(messages(cluster)) >= number * count

            wait_for(arrived, 150)
            took = time.monotonic() - sent
            print(f"{kind} {pause}: went on after {took:.1f} s, ends {child.ends}")
            assert took < 60 or child.ends
        code, seconds = child.stop()
    finally:
        child.close()
    found = messages(cluster)
    assert len(found) == len(set(found)) == 4 * count
    assert set(child.ends) <= {1}
    assert (code, seconds < 5) == (0, True), child.log.read_text()[-2000:]


@pytest.mark.parametrize("kind", ["copy", "market"])
def test_the_only_broker_restarts_in_the_middle_of_transactions(
    single: tuple[Kafka, Cluster], tmp_path: Path, kind: str, wait_for: Callable[..., Any]
) -> None:
    """Polls keep coming as fast as they can; what was published is what was committed, each once."""
    kafka, cluster = single
    child, over, sequence = Supervised(cluster, kind, tmp_path / "log"), threading.Event(), 0

    def produce() -> None:
        nonlocal sequence
        while not over.is_set():
            with suppress(KafkaException):
                producing = Producing(cluster)
                while not over.is_set():
                    sequence += 1  # not used again, as it may have been committed
                    producing.polls(sequence, sequence)

    def complete() -> bool:
        child.look()
        events = [
            record.value for record in read(cluster, (TRADES if kind == "copy" else POLLS).full_name(cluster.prefix))
        ]
        return bool(events) and len(messages(cluster)) == len(events)

    try:
        wait_for(child.ready, 60)
        thread = threading.Thread(target=produce)
        thread.start()
        for number in range(3):
            seen = sequence
            wait_for(lambda seen=seen: sequence > seen + 10, 60)
            (kafka.kill if number % 2 else kafka.stop)()
            kafka.start()
        seen = sequence
        wait_for(lambda: sequence > seen + 10, 60)
        over.set()
        thread.join(60)
        wait_for(complete, 150)
    finally:
        over.set()
        child.close()
    found = messages(cluster)
    assert len(found) == len(set(found))
    assert set(child.ends) <= {1}
    print(f"{kind}: {len(found)} published, ends {child.ends}")


@pytest.mark.parametrize("kind", ["copy", "market"])
def test_brokers_of_three_restart_one_after_the_other(
    small_registry: str, prefix: str, tmp_path: Path, kind: str, wait_for: Callable[..., Any]
) -> None:
    """While events keep coming: nothing is lost, nothing twice, and it goes on each time."""
    with Brokers() as brokers:
        cluster = declared(Cluster(brokers.bootstrap_servers, small_registry, prefix), 3)
        child = Supervised(cluster, kind, tmp_path / "log")
        count = 1 if kind == "market" else 20
        try:
            wait_for(child.ready, 60)
            producing = Producing(cluster)
            producing.polls(1, 1)
            wait_for(lambda: len(messages(cluster)) == count, 60)
            for node in range(3):
                brokers.kill(node)
                producing.polls(node + 2, node + 2)
                sent = time.monotonic()

                def arrived(node: int = node) -> bool:
                    child.look()
                    return len(messages(cluster)) >= (node + 2) * count

                wait_for(arrived, 150)
                print(f"{kind}: went on after {time.monotonic() - sent:.1f} s, ends {child.ends}")
                assert time.monotonic() - sent < 60 or child.ends
                brokers.start(node)
                brokers.await_all()
        finally:
            child.close()
        found = messages(cluster)
        assert len(found) == len(set(found)) == 4 * count


@pytest.mark.parametrize("kind", ["copy", "market"])
def test_a_signal_ends_it_within_five_seconds_while_the_broker_is_stopped(
    single: tuple[Kafka, Cluster], tmp_path: Path, kind: str, wait_for: Callable[..., Any]
) -> None:
    """A broker that does not answer and does not hang up is the worst case."""
    kafka, cluster = single
    child = Supervised(cluster, kind, tmp_path / "log")
    try:
        wait_for(child.ready, 60)
        Producing(cluster).polls(1, 1)
        wait_for(lambda: messages(cluster), 60)
        assert kafka._child is not None
        kafka._child.send(signal.SIGSTOP)
        threading.Event().wait(1)
        _, seconds = child.stop()
        kafka._child.send(signal.SIGCONT)
    finally:
        child.close()
    assert seconds < 5.5


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
        Runner(consumer, stream, stream.decode, name="test").run()


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
    runner = Runner(consumer, stream, stream.decode, name="test")
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: len(consumer.seen) == 20 and len(messages(cluster)) == 1, 30)
    finally:
        runner.stop()
        thread.join(15)
    assert "1 of 1 headers left out" in messages(cluster)[0]
