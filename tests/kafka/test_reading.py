"""Reading topics on real Kafka: where the end is, what a deadline's error names, where a day starts, what a lag is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import NewPartitions, NewTopic  # type: ignore[attr-defined]  # not in its __all__

from bourse_sandbox.kafka import Kafka
from bourse_schemas import reading
from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.kafka import Cluster, abandon
from bourse_schemas.reading import LAST, Batch, GroupLag, Partition, day_start, follow, group_lag, offsets, read
from bourse_schemas.topics import TRADES
from tests.kafka.test_election import Lost

pytestmark = pytest.mark.kafka
# 07:00 on Saturday, 2026-11-21, in Tehran.
MORNING = int(datetime(2026, 11, 21, 3, 30, tzinfo=UTC).timestamp() * 1000)
HOUR, DAY = 3_600_000, 86_400_000


class Topic:
    """A topic of two partitions, and a transactional producer of its records."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = TRADES.full_name(cluster.prefix)
        self.admin = cluster.admin()
        settings = {"retention.ms": "-1", "message.timestamp.after.max.ms": str(2**63 - 1)}
        for done in self.admin.create_topics([NewTopic(self.name, 2, 1, config=settings)]).values():
            done.result(10)
        self.producer = self.new_producer("main")

    def new_producer(self, name: str) -> Producer:
        """Return an initialised producer."""
        producer = self.cluster.transactional_producer(f"{self.cluster.prefix}-{name}", 10_000)
        producer.init_transactions(10)
        return producer

    def send(self, *values: str, partition: int = 0, at: int = MORNING, producer: Producer | None = None) -> None:
        """Put records into the open transaction."""
        for value in values:
            (producer or self.producer).produce(self.name, value, "k", partition, timestamp=at, headers={"h": b"x"})

    def publish(self, *values: str, partition: int = 0, at: int = MORNING, commit: bool = True) -> None:
        """Publish records in one transaction, or abort it."""
        self.producer.begin_transaction()
        self.send(*values, partition=partition, at=at)
        self.producer.flush(10)
        (self.producer.commit_transaction if commit else self.producer.abort_transaction)(10)

    def values(self, **how: object) -> list[str]:
        """Read the topic to its end and return the values."""
        return [(record.value or b"").decode() for record in read(self.cluster, self.name, timeout=5, **how)]  # type: ignore[arg-type]

    def place(self, partition: int = 0) -> Partition:
        """Return the name of a partition."""
        return self.name, partition


@pytest.fixture
def topic(kafka: Kafka, prefix: str) -> Iterator[Topic]:
    """Return an empty topic."""
    topic = Topic(Cluster(kafka.bootstrap_servers, "http://127.0.0.1:9", prefix))
    yield topic
    abandon(topic.producer)


def test_all_that_is_committed_to_the_end(topic: Topic) -> None:
    """Records come in order per partition with all they have; an empty topic and its empty partitions end at once."""
    assert topic.values() == []
    topic.publish("a", "b")
    topic.publish("c")
    records = list(read(topic.cluster, topic.name, timeout=5))
    assert [(record.place, record.offset, record.value) for record in records] == [
        (topic.place(), 0, b"a"),
        (topic.place(), 1, b"b"),
        (topic.place(), 3, b"c"),
    ]
    assert (records[0].key, records[0].timestamp, records[0].headers) == (b"k", MORNING, {"h": b"x"})


def test_a_part_of_a_topic(topic: Topic) -> None:
    """From given offsets, up to given offsets, or the last offsets of each partition."""
    topic.publish("a", "b", "c")
    topic.publish("x", partition=1)
    assert topic.values(start={topic.place(): 1}) == ["b", "c"]
    assert topic.values(start={topic.place(): 0}, end={topic.place(): 2}) == ["a", "b"]
    assert sorted(topic.values(tail=2)) == ["c", "x"]
    assert topic.values(start={topic.place(): 9}) == []
    assert topic.values(start={}) == []


@pytest.mark.parametrize("aborted", [1, 3000])
def test_aborted_records_at_the_end_are_passed_over(topic: Topic, aborted: int) -> None:
    """The end is reached although no record of ours is there."""
    topic.publish("a")
    topic.publish(*("never",) * aborted, commit=False)
    assert topic.values() == ["a"]
    assert topic.values(pending=True) == ["a"]
    topic.publish("b")
    assert topic.values() == ["a", "b"]


def test_an_open_transaction(topic: Topic) -> None:
    """What follows an open transaction is not committed yet: left out, or waited for."""
    topic.publish("a")
    other = topic.new_producer("other")
    other.begin_transaction()
    topic.send("open", producer=other)
    other.flush(10)
    topic.publish("behind")
    assert topic.values() == ["a"]
    with pytest.raises(Unreachable) as caught:
        list(read(topic.cluster, topic.name, pending=True, timeout=5))
    state, advice = str(caught.value).splitlines()
    assert state.startswith(f"{topic.name}-0: no progress from offset 2 to 5 within 5 s: ")
    assert "a transaction is open there" in state
    assert f"kafka-transactions.sh --bootstrap-server {topic.cluster.bootstrap_servers} abort" in advice
    assert f"abort --topic {topic.name} --partition 0 --start-offset" in advice
    found: list[str] = []
    began = threading.Event()

    def first_then_rest() -> None:
        for record in read(topic.cluster, topic.name, pending=True, timeout=20):
            found.append((record.value or b"").decode())
            began.set()

    reading = threading.Thread(target=first_then_rest)
    reading.start()
    assert began.wait(10)
    assert found == ["a"]
    other.commit_transaction(10)
    reading.join(20)
    abandon(other)
    assert found == ["a", "open", "behind"]


def test_a_reader_that_is_stopped(topic: Topic) -> None:
    """A service that is asked to stop does not wait for the deadline, and does not take a part for the whole."""
    topic.publish("a")
    with pytest.raises(Unreachable, match=f"reading {topic.name} was stopped"):
        list(read(topic.cluster, topic.name, stopped=lambda: True))


def test_deleted_records(topic: Topic) -> None:
    """What the topic deleted is passed over, or an error, as asked."""
    topic.publish("a", "b", "c")
    for done in topic.admin.delete_records([TopicPartition(topic.name, 0, 2)]).values():
        done.result(10)
    assert topic.values() == ["c"]
    with pytest.raises(Unreachable, match=f"{topic.name}-0: the records from offset 0 on were deleted"):
        topic.values(start={topic.place(): 0}, reset="error")
    assert topic.values(start={topic.place(): 2}, reset="error") == ["c"]


def test_added_partitions(topic: Topic, wait_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read like the others, also by a reader that was there before."""
    monkeypatch.setattr(reading, "REFRESH_SECONDS", 0.2)
    topic.publish("a")
    following = follow(topic.cluster, {topic.name: 0})
    assert wait_for(lambda: not next(following).behind)
    for done in topic.admin.create_partitions([NewPartitions(topic.name, 3)]).values():
        done.result(10)
    wait_for(lambda: len(topic.admin.list_topics(topic.name, 5).topics[topic.name].partitions) == 3)
    abandon(topic.producer)
    topic.producer = topic.new_producer("main")
    topic.publish("new", partition=2)
    wait_for(lambda: sorted(topic.values()) == ["a", "new"])
    assert day_start(topic.cluster, {topic.place(2): None}) == {topic.place(2): 0}
    assert [record.value for record in wait_for(lambda: next(following).records)] == [b"new"]


def test_a_topic_that_does_not_exist(topic: Topic) -> None:
    """It is named."""
    with pytest.raises(ConfigurationError, match="nowhere"):
        list(read(topic.cluster, "nowhere"))
    with pytest.raises(ConfigurationError, match="nowhere"):
        next(follow(topic.cluster, {"nowhere": None}))


def test_a_topic_that_is_deleted_while_it_is_followed(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Following ends with an error."""
    monkeypatch.setattr(reading, "REFRESH_SECONDS", 0.2)
    topic.publish("a")
    with pytest.raises(ConfigurationError, match=f"{topic.name} cannot be read"):  # noqa: PT012  # each step waits
        for batch in follow(topic.cluster, {topic.name: None}):
            if batch.records:
                for done in topic.admin.delete_topics([topic.name], operation_timeout=10).values():
                    done.result(10)


def test_a_topic_that_is_deleted_while_it_is_read(topic: Topic) -> None:
    """The error names it."""
    topic.publish(*map(str, range(5000)))
    with pytest.raises((ConfigurationError, Unreachable), match=topic.name):  # noqa: PT012  # each step waits
        for number, _ in enumerate(read(topic.cluster, topic.name, timeout=5)):
            if number == 0:
                for done in topic.admin.delete_topics([topic.name], operation_timeout=10).values():
                    done.result(10)


def test_a_broker_that_is_gone(own_kafka: Callable[..., Kafka], prefix: str) -> None:
    """Each call ends at its deadline and names what it asked for."""
    broker = own_kafka()
    topic = Topic(Cluster(broker.bootstrap_servers, "http://127.0.0.1:9", prefix))
    topic.publish("a")
    abandon(topic.producer)
    following = follow(topic.cluster, {topic.name: None}, timeout=15)
    assert next(batch.records for batch in following if batch.records)[0].value == b"a"
    broker.stop()
    assert next(following).records == []
    for ask in (
        lambda: offsets(topic.cluster, {topic.place(): LAST}, timeout=1),
        lambda: list(read(topic.cluster, topic.name, start={topic.place(): 0}, timeout=1)),
    ):
        with pytest.raises(Unreachable, match=f"offsets of {topic.name}-0"):
            ask()
    with pytest.raises(Unreachable):
        group_lag(topic.cluster, timeout=1)


def test_following(topic: Topic, prefix: str) -> None:
    """From the beginning, the last offsets or the end; `behind` empties at the first known end; then what is new."""

    def until(batches: Iterable[Batch], value: str) -> list[str]:
        seen = []
        for batch in batches:
            seen += [(record.value or b"").decode() for record in batch.records]
            if value in seen and not batch.behind:
                return seen
        raise AssertionError(seen)

    topic.publish("a", "b")
    whole, some, new = (follow(topic.cluster, {topic.name: tail}) for tail in (None, 2, 0))
    assert until(whole, "b") == ["a", "b"]
    assert until(some, "b") == ["b"]
    assert next(batch.records for batch in new if not batch.behind) == []
    topic.publish("c", partition=1)
    assert [until(batches, "c") for batches in (whole, some, new)] == [["c"]] * 3


def test_following_with_a_client_that_has_lost_its_brokers(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced; nothing is missing."""
    monkeypatch.setattr(reading, "REFRESH_SECONDS", 0.2)
    topic.publish("a")
    lost = Lost(topic.cluster.bootstrap_servers, topic.cluster.registry_url, topic.cluster.prefix)
    batches = follow(lost, {topic.name: None})
    assert [record.value for record in next(batch.records for batch in batches if batch.records)] == [b"a"]
    topic.publish("b")
    assert [record.value for record in next(batch.records for batch in batches if batch.records)] == [b"b"]


def test_where_a_day_starts(topic: Topic) -> None:
    """The Tehran day of the last record before an offset, behind however many markers, aborted or empty partitions."""
    midnight = MORNING - 7 * HOUR
    topic.publish("yesterday", at=midnight - 1)
    topic.publish("first", at=midnight)
    topic.publish("later", at=MORNING)
    for _ in range(3):
        topic.publish(*("never",) * 60, commit=False)
    # The marker of yesterday's transaction was written today.
    assert day_start(topic.cluster, {topic.place(): None, topic.place(1): None}) == {
        topic.place(): 1,
        topic.place(1): 0,
    }
    assert topic.values(start={topic.place(): 1}) == ["first", "later"]
    assert day_start(topic.cluster, {topic.place(): 4}) == {topic.place(): 1}
    assert day_start(topic.cluster, {topic.place(): 2}) == {topic.place(): 0}
    assert day_start(topic.cluster, {topic.place(): 0}) == {topic.place(): 0}
    for done in topic.admin.delete_records([TopicPartition(topic.name, 0, 4)]).values():
        done.result(10)
    assert day_start(topic.cluster, {topic.place(): None}) == {topic.place(): 4}


def test_the_lag_of_a_group(topic: Topic) -> None:
    """0 when all is read, although a transaction marker follows; else counted from the oldest unread record."""
    group = f"{topic.cluster.prefix}-copy"
    topic.publish("a", "b")
    topic.publish("never", commit=False)
    member = topic.cluster.consumer(group, auto_offset_reset="earliest")
    member.subscribe([topic.name])
    while (message := member.poll(1)) is None or message.value() != b"b":
        pass
    assert group_lag(topic.cluster) == [GroupLag(group, 1, None, None)]
    topic.producer.begin_transaction()
    position = TopicPartition(topic.name, 0, 2)
    topic.producer.send_offsets_to_transaction([position], member.consumer_group_metadata(), 10)
    topic.producer.commit_transaction(10)
    assert group_lag(topic.cluster) == [GroupLag(group, 1, 0, None)]
    member.close()
    topic.publish("c", "d", at=MORNING + HOUR)
    topic.publish("e", at=MORNING + DAY)
    (found,) = group_lag(topic.cluster, [group])
    # c, d, a marker, e and a marker.
    assert found == GroupLag(group, 0, 5, MORNING + HOUR)
    assert group_lag(topic.cluster, [f"{topic.cluster.prefix}-unknown"])[0].lag is None
