"""The runner on real Kafka: groups, transactions, rebalances, restarts."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Producer, TopicPartition

from bourse_cli.health import Monitor
from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Offsets, Own, Partition, Rebuild, Retry
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_consumers.testing import trade
from bourse_consumers.transactions import Transactions
from bourse_sandbox.kafka import Kafka, free_port
from bourse_sandbox.processes import Child, spawn
from bourse_schemas import reading
from bourse_schemas.errors import BourseError, ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS, TOPICS, TRADES

pytestmark = pytest.mark.kafka
GROUP = "group"


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return a cluster with our topics under a prefix of the test's own."""
    return declared(Cluster(kafka.bootstrap_servers, small_registry, prefix))


def declared(cluster: Cluster) -> Cluster:
    """Make the topics and register the schemas."""
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(cluster.prefix)
    return cluster


class Copy(Consumer):
    """Publishes each event of others again on the same topic, as from the source `copy`."""

    emits = (TRADES, DEAD_LETTERS)

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.replayed = 0
        self.opened = 0

    def open(self, assigned: Assignment) -> Rebuild:
        self.opened += 1
        self.replayed = 0
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        events = [event for event in batch.events if event.source != "copy"]
        if batch.replay:
            self.replayed += len(events)
        else:
            self.seen += [event.event_id for event in events]
        return [Emit(TRADES, trade(**{**_fields(event), "source": "copy"})) for event in events]


def _fields(event: TradeEvent) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("instrument", "sequence", "trading_day", "observed_at")}


def publish(cluster: Cluster, events: Sequence[TradeEvent], *, commit: bool = True) -> None:
    """Publish events in one transaction, or leave it open."""
    serializer = cluster.registry().serializer(TRADES, cluster.prefix)
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    for event in events:
        record = serializer(event)
        producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
    if commit:
        producer.commit_transaction()
    else:
        producer.flush(10)
        producer.abort_transaction()
    producer.close()


@contextmanager
def running(cluster: Cluster, consumer: Consumer, stream: KafkaStream | None = None) -> Iterator[Runner]:
    """Run a consumer in a thread until the block ends."""
    stream = stream or KafkaStream(cluster, f"{cluster.prefix}-{GROUP}", consumer.topics, consumer.emits)
    runner = Runner(consumer, stream, name="test")
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        yield runner
    finally:
        runner.stop()
        thread.join(15)
        assert not thread.is_alive()


def committed(cluster: Cluster, source: str) -> list[str]:
    """Return the event ids of a source, as a read_committed consumer sees them."""
    decode = cluster.registry().deserializer(TradeEvent)
    records = reading.read(cluster, TRADES.full_name(cluster.prefix))
    events = [decode(record.value) for record in records if (record.value or b"")[:1] == b"\0"]
    return [event.event_id for event in events if event.source == source]


def market(count: int, first: int = 1) -> list[TradeEvent]:
    start = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
    return [
        trade(
            instrument=f"IRO1TEST{number % 20:04d}",
            sequence=number,
            observed_at=start + timedelta(seconds=number),
        )
        for number in range(first, first + count)
    ]


def test_a_restart_repeats_nothing_and_rebuilds_its_state(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Emits and offsets are one transaction; what was published is replayed and not published again."""
    publish(cluster, market(100))
    first = Copy()
    with running(cluster, first):
        wait_for(lambda: len(first.seen) == 100, 20)
    publish(cluster, market(50, first=101))
    second = Copy()
    with running(cluster, second):
        wait_for(lambda: len(second.seen) == 50, 20)
    assert second.replayed == 100
    expected = sorted(event.event_id for event in market(150))
    assert sorted(committed(cluster, "copy")) == expected


def test_aborted_records_are_never_seen(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """A transaction that was given up leaves no trace for a consumer."""
    publish(cluster, market(10), commit=False)
    publish(cluster, market(10, first=11))
    consumer = Copy()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.seen) >= 10, 20)
    assert sorted(consumer.seen) == sorted(event.event_id for event in market(10, first=11))


def test_two_members_share_the_partitions_and_double_nothing(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """A rebalance in the middle loses and repeats nothing."""
    one, two = Copy(), Copy()
    with running(cluster, one):
        publish(cluster, market(200))
        wait_for(lambda: one.seen, 20)
        with running(cluster, two):
            wait_for(lambda: two.opened, 20)
            publish(cluster, market(200, first=201))
            wait_for(lambda: len(committed(cluster, "copy")) >= 400, 30)
        publish(cluster, market(50, first=401))
        wait_for(lambda: len(committed(cluster, "copy")) >= 450, 30)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(450))


def test_a_record_that_cannot_be_decoded_becomes_a_dead_letter(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """It is published with its bytes, and the consumer goes on."""
    from bourse_schemas.events import DeadLetter

    producer = cluster.transactional_producer(f"{cluster.prefix}-bad")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(TRADES.full_name(cluster.prefix), b"not ours", b"IRO1TEST0001", headers=[("who", b"me")])
    producer.commit_transaction()
    producer.close()
    publish(cluster, market(5))
    consumer = Copy()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.seen) == 5, 20)
    reader = cluster.consumer()
    reader.assign([TopicPartition(DEAD_LETTERS.full_name(cluster.prefix), 0, OFFSET_BEGINNING)])
    message = wait_for(lambda: reader.poll(0.2), 10)
    reader.close()
    letter = cluster.registry().deserializer(DeadLetter)(message.value())
    assert (letter.payload, letter.original_key, letter.consumer) == (b"not ours", b"IRO1TEST0001", "test")
    assert letter.original_headers == {"who": b"me"}


def test_the_group_reaches_the_end(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Transaction markers take offsets too: a consumer that has read everything has no lag."""
    publish(cluster, market(30))
    consumer = Copy()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.seen) == 30 and lag(cluster) == 0, 30)


def test_a_sink_that_stops_commits_what_is_durable(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """What `close` stored does not count as lag."""

    class Sink(Copy):
        def __init__(self) -> None:
            super().__init__()
            self.ends: dict[Partition, int] = {}
            self.buffered: dict[Partition, int] = {}

        def open(self, assigned: Assignment) -> Own:  # type: ignore[override]
            return Own({})

        def process(self, batch: Batch) -> list[Emit]:
            self.buffered |= {record.partition: record.offset + 1 for record in batch.records}
            self.seen += [event.event_id for event in batch.events]
            return []

        def durable(self) -> Offsets:
            return self.ends

        def close(self) -> None:
            self.ends |= self.buffered

    publish(cluster, market(30))
    consumer = Sink()
    stream = KafkaStream(cluster, f"{cluster.prefix}-{GROUP}", consumer.topics, consumer.emits)
    with running(cluster, consumer, stream):
        wait_for(lambda: len(consumer.seen) == 30, 20)
        assert lag(cluster) == 36
    # The markers, one a partition, follow what is durable: no record is unread.
    assert reading.group_lag(cluster, [f"{cluster.prefix}-{GROUP}"])[0].lag == 0


def lag(cluster: Cluster) -> int:
    """Return how many offsets the group has before it."""
    probe = cluster.consumer(f"{cluster.prefix}-{GROUP}")
    partitions = [TopicPartition(TRADES.full_name(cluster.prefix), number) for number in range(6)]
    ends = [probe.get_watermark_offsets(partition, 5)[1] for partition in partitions]
    offsets = [max(found.offset, 0) for found in probe.committed(partitions, 5)]
    probe.close()
    return sum(ends) - sum(offsets)


def test_a_missing_topic_names_the_command_that_makes_it(kafka: Kafka, small_registry: str, prefix: str) -> None:
    """The error names what to do."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    cluster.registry().register_all(prefix)
    with pytest.raises(ConfigurationError, match="bourse topics apply"):
        KafkaStream(cluster, GROUP, [TRADES], [])


def test_a_missing_subject_names_the_command_that_registers_it(kafka: Kafka, small_registry: str, prefix: str) -> None:
    """Services never register by themselves."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    with pytest.raises(ConfigurationError, match="bourse schemas register"):
        KafkaStream(cluster, GROUP, [TRADES], TOPICS)


class Broken(Transactions):
    """Its transactions break: the first before it is committed, the second after."""

    transactions = 0

    def _transact(self, producer: Producer, records: Any, offsets: Any, group: Any) -> None:
        self.transactions += 1
        if self.transactions == 1:
            producer.begin_transaction()
            for record in records:
                producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
            producer.send_offsets_to_transaction(offsets, group)
            producer.flush(10)
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        super()._transact(producer, records, offsets, group)
        if self.transactions == 2:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


def test_a_broken_transaction_loses_and_repeats_nothing(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Whether it was committed is not guessed: what is committed is read back."""
    publish(cluster, market(100))
    consumer = Copy()
    stream = KafkaStream(cluster, f"{cluster.prefix}-{GROUP}", consumer.topics, consumer.emits)
    stream._transactions = Broken(cluster, f"{cluster.prefix}-broken", [TRADES, DEAD_LETTERS])
    with running(cluster, consumer, stream):
        wait_for(lambda: consumer.opened >= 3 and len(committed(cluster, "copy")) >= 100, 30)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(100))


def test_yesterday_is_not_replayed(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """The trading day under way begins at Tehran's midnight, whatever the day in London."""
    # 20:30 UTC is midnight in Tehran.
    yesterday = datetime(2026, 11, 22, 20, 29, tzinfo=UTC)
    publish(cluster, [_at(yesterday + timedelta(seconds=n), n + 1) for n in range(59)])
    publish(cluster, [_at(yesterday + timedelta(minutes=1, seconds=n), n + 60) for n in range(10)])
    first, second = Copy(), Copy()
    with running(cluster, first):
        # A new group begins with the day under way, and all of it is new.
        wait_for(lambda: len(committed(cluster, "copy")) == 10, 20)
    assert first.replayed == 0
    with running(cluster, second):
        wait_for(lambda: second.replayed == 10, 20)
        publish(cluster, [_at(yesterday + timedelta(hours=1), 70)])
        wait_for(lambda: second.seen, 20)
    assert second.replayed == 10


def _at(observed_at: datetime, sequence: int) -> TradeEvent:
    return trade(instrument="IRO1TEST0001", sequence=sequence, observed_at=observed_at)


def test_a_retry_holds_the_records_and_the_membership(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """While it waits nothing is fetched, nothing is lost, and a rebalance gets through."""

    class Down(Copy):
        away = down = True
        tries = 0

        def open(self, assigned: Assignment) -> Rebuild:
            if self.away:
                raise Retry("the database is away", after=0.2)
            return super().open(assigned)

        def process(self, batch: Batch) -> list[Emit]:
            self.tries += 1
            if self.down:
                raise Retry("the database is down", after=0.2)
            return super().process(batch)

    publish(cluster, market(3000))
    one, two = Down(), Copy()
    with running(cluster, one) as runner:

        def lag() -> float:
            return runner._monitor.registry.get_sample_value("bourse_consumer_lag", {"consumer": "test"}) or 0

        wait_for(lambda: lag() >= 3000, 20)
        one.away = False
        wait_for(lambda: one.tries >= 3 and lag() > 1000, 20)
        before = lag()
        publish(cluster, market(200, first=3001))
        # The brokers are asked: nothing is fetched that could show it.
        wait_for(lambda: lag() >= before + 200, 20)
        with running(cluster, two):
            wait_for(lambda: one.opened >= 2 and two.seen, 30)
            one.down = False
            wait_for(lambda: len(one.seen) + len(two.seen) >= 3200, 30)
        publish(cluster, market(300, first=3201))
        wait_for(lambda: len(committed(cluster, "copy")) >= 3500, 30)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(3500))


def test_a_broker_that_restarts_during_a_batch_is_waited_for(
    own_kafka: Callable[[], Kafka], small_registry: str, prefix: str, wait_for: Callable[..., Any]
) -> None:
    """kill -9 of the only broker while a batch is processed: the consumer goes on, and nothing is lost or doubled."""

    class Held(Copy):
        free, held = threading.Event(), threading.Event()

        def process(self, batch: Batch) -> list[Emit]:
            if not batch.replay and any(event.sequence > 100 for event in batch.events if event.source != "copy"):
                self.held.set()
                assert self.free.wait(60)
            return super().process(batch)

    kafka = own_kafka()
    cluster = declared(Cluster(kafka.bootstrap_servers, small_registry, prefix))
    publish(cluster, market(100))
    consumer = Held()
    with running(cluster, consumer):
        wait_for(lambda: len(committed(cluster, "copy")) == 100, 30)
        publish(cluster, market(100, first=101))
        wait_for(consumer.held.is_set, 30)
        kafka.kill()
        kafka.start()
        consumer.free.set()
        wait_for(lambda: len(committed(cluster, "copy")) >= 200, 60)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(200))


def test_a_fatal_error_while_it_waits_ends_it(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Another member with the same static id: the client is dead, and must not wait for its database for ever."""

    class Down(Copy):
        tries = 0

        def process(self, batch: Batch) -> list[Emit]:
            self.tries += 1
            raise Retry("the database is down", after=0.1)

    publish(cluster, market(10))
    static = replace(cluster, settings={"group.instance.id": "one"})
    consumer, errors = Down(), list[BaseException]()

    def run() -> None:
        stream = KafkaStream(static, f"{cluster.prefix}-{GROUP}", consumer.topics, consumer.emits)
        try:
            Runner(consumer, stream, name="test").run()
        except BourseError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for(lambda: consumer.tries > 2, 30)
    with running(static, Copy()):
        wait_for(lambda: errors, 30)
    assert "Static consumer fenced by other consumer with same group.instance.id" in str(errors[0])


def test_a_broker_that_is_unreachable_is_reported(
    own_kafka: Callable[[], Kafka], small_registry: str, prefix: str, wait_for: Callable[..., Any]
) -> None:
    """A consumer that has nothing to do still reports that it lost its broker, and that it is back."""
    kafka, monitor, consumer = own_kafka(), Monitor("test"), Copy()
    monitor.unready("starting", None)
    cluster = declared(Cluster(kafka.bootstrap_servers, small_registry, prefix, {"statistics.interval.ms": "200"}))
    watched = replace(cluster, on_statistics=monitor.statistics)
    stream = KafkaStream(watched, f"{prefix}-{GROUP}", consumer.topics, consumer.emits)
    with running(watched, consumer, stream) as runner:
        wait_for(lambda: runner._opened and monitor.reasons() == {}, 20)
        kafka.kill()
        wait_for(lambda: monitor.reasons() == {"Kafka": "no connection to any broker"})
        kafka.start()
        wait_for(lambda: monitor.reasons() == {}, 30)


def test_a_topic_that_was_created_again_is_read_from_its_start(cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """A committed offset beyond the end belongs to a topic that is gone."""
    commit_offsets(cluster, 1_000)
    publish(cluster, market(20))
    consumer = Copy()
    with running(cluster, consumer):
        wait_for(lambda: len(consumer.seen) == 20, 20)


def commit_offsets(cluster: Cluster, offset: int) -> None:
    """Commit an offset for each partition in the group's name."""
    client = cluster.consumer(f"{cluster.prefix}-{GROUP}")
    name = TRADES.full_name(cluster.prefix)
    client.commit(offsets=[TopicPartition(name, number, offset) for number in range(6)], asynchronous=False)
    client.close()


def test_a_sink_that_is_ahead_of_its_topic_is_an_operators_mistake(cluster: Cluster) -> None:
    """Its data are of another topic or cluster: going on would hide rows."""

    class Ahead(Copy):
        def open(self, assigned: Assignment) -> Own:  # type: ignore[override]
            return Own(dict.fromkeys(assigned, 1_000))

    publish(cluster, market(20))
    consumer = Ahead()
    stream = KafkaStream(cluster, f"{cluster.prefix}-{GROUP}", consumer.topics, consumer.emits)
    with pytest.raises(ConfigurationError, match="ends at"):
        Runner(consumer, stream, name="test").run()


CHILD = """
import sys, time
from pathlib import Path
from bourse_consumers.api import Consumer, Emit
from bourse_consumers.kafka_stream import KafkaStream
from bourse_consumers.runner import Runner
from bourse_consumers.testing import trade
from bourse_consumers.transactions import Transactions
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS, TRADES

servers, registry, prefix, group, mark, where = sys.argv[1:]

class Watched(Transactions):
    def _transact(self, producer, records, offsets, group):
        producer.begin_transaction()
        for record in records:
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        producer.send_offsets_to_transaction(offsets, group)
        producer.flush(10)
        Path(mark).touch()
        if where == "transaction":
            time.sleep(60)
        producer.commit_transaction()

class Copy(Consumer):
    emits = (TRADES,)
    def process(self, batch):
        events = [event for event in batch.events if event.source != "copy"]
        if where == "process" and events:
            Path(mark).touch()
            for _ in range(30):  # once woken, long enough to hear that the group has forgotten us
                time.sleep(0.1)
        fields = "instrument", "sequence", "trading_day", "observed_at"
        return [Emit(TRADES, trade(source="copy", **{f: getattr(e, f) for f in fields})) for e in events]

cluster = Cluster(servers, registry, prefix)
stream = KafkaStream(cluster, group, Copy.topics, Copy.emits)
stream._transactions = Watched(cluster, group + "-child", [TRADES, DEAD_LETTERS])
Runner(Copy(), stream, name="child").run()
"""


@contextmanager
def child(cluster: Cluster, folder: Path, where: str) -> Iterator[tuple[Child, Path]]:
    """Run a member of the group in a process of its own; it makes a file when it is where it is to be stopped."""
    mark = folder / "mark"
    arguments = (cluster.bootstrap_servers, cluster.registry_url, cluster.prefix, f"{cluster.prefix}-{GROUP}", mark)
    with spawn(
        [sys.executable, "-c", CHILD, *map(str, arguments), where], stdout=folder / "log", stderr=folder / "log"
    ) as process:
        yield process, mark


def test_a_kill_in_the_middle_of_a_transaction(cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """kill -9 after everything was sent, before the commit: the successor waits until that is settled."""
    publish(cluster, market(100))
    consumer = Copy()
    with child(cluster, tmp_path, "transaction") as (process, mark):
        wait_for(mark.exists, 20)
        process.kill()
    with running(cluster, consumer):
        wait_for(lambda: len(committed(cluster, "copy")) >= 100, 60)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(100))


def test_a_member_that_slept_publishes_nothing(cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Stopped in the middle of a batch until the group has forgotten it, and woken: its transaction is refused."""
    publish(cluster, market(100))
    consumer = Copy()
    with child(cluster, tmp_path, "process") as (process, mark):
        wait_for(mark.exists, 20)
        process.send(signal.SIGSTOP)
        with running(cluster, consumer):
            wait_for(lambda: len(committed(cluster, "copy")) >= 100, 60)
            process.send(signal.SIGCONT)
            wait_for(lambda: "starting over" in (tmp_path / "log").read_text("utf-8"), 30)
            publish(cluster, market(50, first=101))
            wait_for(lambda: len(committed(cluster, "copy")) >= 150, 60)
    assert sorted(committed(cluster, "copy")) == sorted(event.event_id for event in market(150))


def consume(cluster: Cluster, folder: Path, *more: str) -> Child:
    """Start `bourse consume archive` as an operator would."""
    command = [sys.executable, "-m", "bourse_cli", "consume", "archive", "--to", str(folder / "archive")]
    where = ["--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url]
    names = ["--topic-prefix", cluster.prefix, *more]
    return spawn([*command, *where, *names], stdout=folder / "log", stderr=folder / "log")


def answering(log: Path) -> str | None:
    """Return the address that a service reports."""
    found = re.search(r'"url": "(\S+)", "event": "answering"', log.read_text("utf-8")) if log.exists() else None
    return found and found[1]


def test_a_signal_ends_the_process_in_good_order(
    cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """It is ready, and reports its figures and librdkafka's; SIGTERM: exit code 0, and it leaves the group."""
    publish(cluster, market(50))
    log, http = tmp_path / "log", ["--http", "0", "-X", "statistics.interval.ms=200"]
    with consume(cluster, tmp_path, "--group", f"{cluster.prefix}-{GROUP}", *http) as process:
        url = wait_for(lambda: answering(log), 20)
        wait_for(lambda: httpx2.get(f"{url}/readyz", trust_env=False).text == "ready\n", 20)
        assert httpx2.get(f"{url}/livez", trust_env=False).status_code == 200
        reported = {"bourse_consumer_rows_total{", "bourse_kafka_broker_up{", "bourse_consumer_lag{"}
        wait_for(lambda: all(name in httpx2.get(f"{url}/metrics", trust_env=False).text for name in reported))
        process.send(signal.SIGTERM)
        assert process.wait(5) == 0, process.log_tail()
    assert "stopped" in log.read_text("utf-8")
    with running(cluster, Copy()) as runner:
        # The group was left: a successor gets the partitions without waiting for a session to end.
        wait_for(lambda: runner._opened, 5)


def test_a_broker_that_is_not_there_yet_is_waited_for(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """A service reports for what it waits, is alive, and can be stopped meanwhile."""
    cluster = Cluster(f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}", "nowhere")
    log = tmp_path / "log"
    with consume(cluster, tmp_path, "--http", "0") as process:
        url = wait_for(lambda: answering(log), 20)
        wait_for(lambda: "does not answer" in httpx2.get(f"{url}/readyz", trust_env=False).text, 20)
        assert httpx2.get(f"{url}/livez", trust_env=False).status_code == 200
        assert "waiting" in log.read_text("utf-8")
        process.send(signal.SIGINT)
        assert process.wait(5) == 0, process.log_tail()


def test_a_port_that_is_taken_ends_the_process_with_what_to_do(tmp_path: Path) -> None:
    """Before anything else is tried: one line, exit code 2."""
    with Monitor("other").serve("0") as url:
        cluster = Cluster(f"127.0.0.1:{free_port()}", "http://127.0.0.1:1", "nowhere")
        with consume(cluster, tmp_path, "--http", str(url).removeprefix("http://")) as process:
            assert process.wait(20) == 2
    log = (tmp_path / "log").read_text("utf-8")
    assert "--http 127.0.0.1:" in log
    assert "Traceback" not in log


def test_a_changed_schema_ends_the_process_and_loses_nothing(
    cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Exit code 1 and what to do; not one dead letter, and the share that lets them all through is a word away."""
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    for _ in range(60):
        producer.produce(TRADES.full_name(cluster.prefix), b"not ours", b"key")
    producer.commit_transaction()
    producer.close()
    with consume(cluster, tmp_path) as process:
        assert process.wait(30) == 1, process.log_tail()
    log = (tmp_path / "log").read_text("utf-8")
    assert re.search(r"100% of the last \d+ records were rejected.*`bourse dead-letters list`", log)
    assert "Traceback" not in log
    assert letters(cluster) == 0
    with consume(cluster, tmp_path, "--max-rejected-share", "1"):
        wait_for(lambda: letters(cluster) == 60, 30)


def letters(cluster: Cluster) -> int:
    """Return how many dead letters there are."""
    client = cluster.consumer(enable_partition_eof=True)
    client.assign([TopicPartition(DEAD_LETTERS.full_name(cluster.prefix), 0, OFFSET_BEGINNING)])
    found = 0
    while (message := client.poll(5)) is not None and message.error() is None:
        found += 1
    client.close()
    return found


def test_a_missing_topic_ends_the_process_with_what_to_do(kafka: Kafka, small_registry: str, tmp_path: Path) -> None:
    """One or two lines, exit code 2."""
    with consume(Cluster(kafka.bootstrap_servers, small_registry, "undeclared"), tmp_path) as process:
        assert process.wait(20) == 2
    log = (tmp_path / "log").read_text("utf-8")
    assert "bourse topics apply" in log
    assert "Traceback" not in log
