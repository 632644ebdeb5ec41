"""A stream of records over Kafka: group membership, offsets, transactions.

`process` runs in the thread that polls: librdkafka's own threads keep the heartbeat, and only `max.poll.interval.ms`
bounds how long it may take, so that is long. Its price: a member that hangs holds up a rebalance for as long.

Offsets are committed plainly where nothing is published (a transaction for offsets alone takes ten times as long), and
within the transaction otherwise. The order of the two is safe: a broker never lets an older commit, which settles late,
replace a newer one. Both are refused once the group has given the partitions to another member: a transaction carries
the generation in which the partitions were assigned, and a plain commit is not sent under any other member id.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any
from uuid import uuid4

from confluent_kafka import OFFSET_END, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka import Consumer as Client
from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # not in its __all__

from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Emit, Offsets, Partition, Places, Record, Records
from bourse_consumers.runner import NO_NOTES, Poll, StreamBroken
from bourse_schemas import codec, reading
from bourse_schemas.codec import Deserializer
from bourse_schemas.errors import BourseError, ConfigurationError, Undecodable, Unreachable
from bourse_schemas.kafka import Cluster, abandon
from bourse_schemas.topics import DEAD_LETTERS, Topic

__all__ = ["KafkaStream"]

SESSION_MS = 10_000
LONGEST_PROCESS_MS = 1_800_000
TRANSACTION_MS = 10_000
# The brokers give a transaction up after its time; without an end of its own the client may go on asking for minutes
# after they are back. Whether it was committed is not guessed: the next producer settles it, and it is read back.
COMMIT_SECONDS = 12.0
# Short enough to stop within five seconds; whatever takes longer is asked for again.
ASK_SECONDS = 3.0
# Another topic, to its end; a transaction that is open there ends within TRANSACTION_MS.
READ_SECONDS = 15.0


@lru_cache(4096)
def _partition(topic: str, number: int) -> Partition:
    return Partition(topic, number)


class KafkaStream:
    """One member of a consumer group, with a transactional producer beside it."""

    def __init__(self, cluster: Cluster, group: str, topics: Sequence[Topic], emits: Sequence[Topic]) -> None:
        self._cluster, self._group = cluster, group
        self._log = get_logger(group=group)
        names = [topic.full_name(cluster.prefix) for topic in topics]
        publishes = {*emits, DEAD_LETTERS}
        cluster.require_topics(names, [topic.full_name(cluster.prefix) for topic in publishes])
        self._registry = registry = cluster.registry()
        self._serializers = {topic: registry.serializer(topic, cluster.prefix) for topic in publishes}
        self._decoders: dict[str, Deserializer[Any]] = {
            name: registry.deserializer(topic.event) for name, topic in zip(names, topics, strict=True)
        }
        self._columns: dict[str, Any] = {}
        # The same for the life of the process: its next producer settles what the one before it left behind.
        self._transactional_id = f"{group}-{uuid4()}"
        # Who publishes dead letters only need not wait for a producer.
        self._producer = self._new_producer() if emits else None
        self._client: Client = cluster.consumer(
            group,
            # What the topic deleted before we came to it is never skipped in silence.
            auto_offset_reset="error",
            enable_partition_eof=True,
            session_timeout_ms=SESSION_MS,
            max_poll_interval_ms=LONGEST_PROCESS_MS,
        )
        self._assigned: list[Partition] = []
        self._ends: dict[Partition, int] = {}
        self._next: dict[Partition, int] = {}
        # The time of the last record of each partition, and each topic's retention, in milliseconds.
        self._read_until: dict[Partition, int] = {}
        self._retention: dict[str, float] = {}
        self._member = ""
        self._membership: Any = None
        self._changed = False
        self._client.subscribe(names, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)

    def decode(self, record: Record) -> Any:
        """Return the record's event; raises Undecodable, or Unreachable while the registry is away."""
        return self._decoders[record.partition.topic](record.value)

    def columns(self, places: Places) -> Any:
        """Return records of one topic by columns, None where they have to be decoded one by one."""
        from bourse_consumers.columns import Columns

        topic = places.partitions[0].topic
        if topic not in self._columns:
            self._columns[topic] = Columns(self._decoders[topic])
        return self._columns[topic].read(places)

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return an assignment, or the records that came within `timeout` seconds and the positions after them."""
        if self._producer is not None:
            self._producer.poll(0)  # what it has to say piles up otherwise
        # `consume` waits for the whole batch or the whole time; a first `poll` returns as soon as there is anything.
        first = self._client.poll(timeout)
        messages = [] if first is None else [first, *self._client.consume(limit - 1, 0)]
        if self._changed:
            # What came along with the assignment is fetched again from where the consumer wants to begin.
            self._changed = False
            return Poll(assigned=self._assignment())
        positions: dict[Partition, int] = {}
        good = [message for message in messages if message.error() is None]
        if len(good) < len(messages):
            self._look_at(messages, positions)
        topics = [message.topic() for message in good]
        partitions = list(map(_partition, topics, [message.partition() for message in good]))
        offsets: list[Any] = [message.offset() for message in good]
        timestamps = [message.timestamp()[1] for message in good]
        values: list[Any] = [message.value() for message in good]
        places = Places(partitions, offsets, timestamps, values)
        for partition, at in places.ends().items():
            positions[partition] = max(at, positions.get(partition, 0))
        self._next.update(positions)
        self._read_until.update(zip(partitions, timestamps, strict=True))
        return Poll(Records(places, lambda: list(map(_record, partitions, good))), positions)

    def _look_at(self, messages: Sequence[Message], positions: dict[Partition, int]) -> None:
        """Note where partitions end, and raise what has to be raised."""
        for message in messages:
            error = message.error()
            if error is None:
                continue
            if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                # The end lies beyond the last record where a transaction marker follows it.
                positions[_partition(message.topic(), message.partition())] = int(message.offset() or 0)
            elif error.fatal():
                raise KafkaException(error)
            elif refusal := self._refusal(error, message.topic()):
                raise refusal
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001  # the client's public name for it
                raise StreamBroken(error.str())
            else:
                self._log.warning("kafka", error=error.str())

    def seek(self, offsets: Offsets) -> None:
        """Go on from these offsets; those not named go on after what was polled."""
        for partition, at in offsets.items():
            if at > self._ends.get(partition, at) and at > (end := self._watermarks(partition)[1]):
                raise ConfigurationError(
                    f"{partition.topic}-{partition.number} ends at {end}, what is kept of it at {at}: "
                    "the topic was made anew, or this is another cluster; keep its data elsewhere"
                )
        self._next.update(offsets)
        self._assign()

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed or `stopped()`."""
        held = [TopicPartition(*partition) for partition in self._assigned]
        self._client.pause(held)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._changed and not stopped():
            self._client.poll(min(left, 0.1))
        self._client.resume(held)
        return not self._changed and not stopped()

    def commit(self, emits: Sequence[Emit], offsets: Offsets, notes: Mapping[Partition, str] = NO_NOTES) -> None:
        """Publish emits and commit offsets, in one transaction where there is anything to publish."""
        positions = [TopicPartition(*place, at, notes.get(place, "")) for place, at in offsets.items()]
        records = [self._serializers[emit.topic](emit.event) for emit in emits]
        try:
            if records:
                self._producer = self._producer or self._new_producer()
                self._transact(self._producer, records, positions)
            elif self._client.memberid() == self._member:
                self._client.commit(offsets=positions, asynchronous=False)
            else:
                raise StreamBroken("the group gave our partitions away")
        except KafkaException as error:
            raise self._broken(error.args[0]) from error

    def hint(self, offsets: Offsets) -> None:
        """Commit offsets for dashboards, without waiting; `close` waits for what is under way."""
        positions = [TopicPartition(*partition, at) for partition, at in offsets.items() if partition in self._assigned]
        if positions:
            self._client.commit(offsets=positions, asynchronous=True)

    def reset(self) -> None:
        """Throw the producer away, make a new one, and begin with the same partitions anew.

        What is committed is certain only when the new producer has settled the old one's transaction.
        """
        if self._producer is not None:
            abandon(self._producer)
            self._producer = self._new_producer()
        self._changed = bool(self._assigned)

    def lag(self) -> int:
        """Return how many offsets lie between the positions and the ends."""
        lag = 0
        for partition in self._assigned:
            _, high = self._client.get_watermark_offsets(TopicPartition(*partition), cached=True)
            lag += max(0, high - self._next[partition])
        return lag

    def aging(self) -> float:
        """Return how much of a topic's retention has passed for what is unread: at 1 it is being deleted."""
        behind = [place for place in self._assigned if place in self._read_until and self._is_behind(place)]
        now = time.time() * 1000
        return max(((now - self._read_until[each]) / self._keeps(each.topic) for each in behind), default=0.0)

    def _is_behind(self, partition: Partition) -> bool:
        _, high = self._client.get_watermark_offsets(TopicPartition(*partition), cached=True)
        return high > self._next[partition]

    def _keeps(self, topic: str) -> float:
        """Return a topic's retention in milliseconds, infinite where it cannot be told."""
        if topic not in self._retention:
            self._retention[topic] = math.inf
            resource = ConfigResource(ResourceType.TOPIC, topic)
            # Kept until it has answered.
            admin = self._cluster.admin()
            try:
                found = admin.describe_configs([resource], request_timeout=ASK_SECONDS)[resource].result()
                kept = int(found["retention.ms"].value)
                compacted = "delete" not in found["cleanup.policy"].value
                self._retention[topic] = math.inf if kept < 0 or compacted else float(max(kept, 1))
            except (KafkaException, KeyError) as error:
                self._log.warning("how long the topic keeps its records is not told", topic=topic, error=str(error))
        return self._retention[topic]

    def close(self) -> None:
        """Leave the group."""
        self._client.close()
        if self._producer is not None:
            abandon(self._producer)

    def _refusal(self, error: KafkaError, topic: str | None = None) -> ConfigurationError | None:
        return self._cluster.refusal(
            error, topic=topic or "", group=self._group, transactional_id=self._transactional_id
        )

    def _broken(self, error: KafkaError) -> BourseError:
        return self._refusal(error) or StreamBroken(error.str())

    # --- publishing ---------------------------------------------------------------------------------------------------

    def _new_producer(self) -> Producer:
        producer = self._cluster.transactional_producer(self._transactional_id, TRANSACTION_MS)
        try:
            producer.init_transactions(ASK_SECONDS)
        except KafkaException as error:
            abandon(producer)
            raise self._broken(error.args[0]) from error
        return producer

    def _transact(
        self, producer: Producer, records: Sequence[codec.Record], positions: Sequence[TopicPartition]
    ) -> None:
        producer.begin_transaction()
        for record in records:
            while True:
                try:
                    producer.produce(
                        record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers
                    )
                    break
                except BufferError:
                    producer.poll(0.1)
        if positions:
            producer.send_offsets_to_transaction(list(positions), self._membership, COMMIT_SECONDS)
        producer.commit_transaction(COMMIT_SECONDS)

    # --- membership ---------------------------------------------------------------------------------------------------

    def _on_assign(self, client: Client, partitions: list[TopicPartition]) -> None:
        self._assigned = [Partition(p.topic, p.partition) for p in partitions]
        # As of now: a member that was thrown out has neither, and a broker refuses nothing to a client without.
        self._member, self._membership = client.memberid(), client.consumer_group_metadata()
        self._changed = True
        # Where to begin is decided in a moment; nothing is read before.
        client.assign([TopicPartition(p.topic, p.partition, OFFSET_END) for p in partitions])

    def _on_revoke(self, client: Client, _: list[TopicPartition]) -> None:
        self._assigned = []
        self._changed = True
        client.unassign()

    def _assign(self) -> None:
        self._client.assign([TopicPartition(*partition, self._next[partition]) for partition in self._assigned])

    def _assignment(self) -> Assignment:
        committed: dict[Partition, int | None] = {}
        begin: dict[Partition, int] = {}
        first: dict[Partition, int] = {}
        notes: dict[Partition, str] = {}
        if self._assigned:
            asked = [TopicPartition(*partition) for partition in self._assigned]
            try:
                # Waits until transactions that hold offsets of ours are settled.
                answer = self._client.committed(asked, ASK_SECONDS)
            except KafkaException as error:
                raise self._broken(error.args[0]) from error
            for told in answer:
                partition, at = Partition(told.topic, told.partition), told.offset
                low, self._ends[partition] = self._watermarks(partition)
                first[partition] = low
                fits = low <= at <= self._ends[partition]
                if at >= 0 and not fits:
                    self._log.warning(
                        "the committed offset is gone: beginning at the topic's start",
                        topic=partition.topic,
                        partition=partition.number,
                        committed=at,
                        start=low,
                    )
                committed[partition] = at if fits else None
                begin[partition] = at if fits else low
                if fits and told.metadata:
                    notes[partition] = told.metadata
        self._next = dict(begin)
        self._assign()
        fresh = [partition for partition, at in committed.items() if at is None]
        return Assignment(begin, lambda: self._day_start(committed), first, notes=notes, fresh=fresh, read=self._read)

    def _watermarks(self, partition: Partition) -> tuple[int, int]:
        try:
            low, high = self._client.get_watermark_offsets(TopicPartition(*partition), ASK_SECONDS)
        except KafkaException as error:
            raise self._broken(error.args[0]) from error
        return low, high

    # --- other topics -------------------------------------------------------------------------------------------------

    def _read(self, topic: Topic) -> Iterator[Any]:
        """Yield what is committed on a topic; see Assignment.read."""
        name = topic.full_name(self._cluster.prefix)
        decode = self._registry.deserializer(topic.event)
        try:
            start = None
            if topic.cleanup == "delete":
                places = [(name, number) for number in range(self._cluster.require_topics([name])[name])]
                start = reading.day_start(self._cluster, dict.fromkeys(places), timeout=READ_SECONDS)
            # Open transactions too: ours may be committed for the group and not yet on this topic.
            for record in reading.read(self._cluster, name, start=start, pending=True, timeout=READ_SECONDS):
                with suppress(Undecodable):
                    yield decode(record.value)
        except Unreachable as error:
            raise StreamBroken(str(error)) from error

    def _day_start(self, committed: dict[Partition, int | None]) -> dict[Partition, int]:
        """Return where the trading day of the last record before each offset begins (of the last one if None)."""
        asked = {(topic, number): at for (topic, number), at in committed.items()}
        try:
            found = reading.day_start(self._cluster, asked, timeout=ASK_SECONDS)
        except Unreachable as error:
            raise StreamBroken(str(error)) from error
        return {Partition(*place): at for place, at in found.items()}


def _record(partition: Partition, message: Message) -> Record:
    key, value = message.key(), message.value()
    pairs: Any = message.headers() or ()
    return Record(
        partition,
        int(message.offset() or 0),
        int(message.timestamp()[1]),
        key.encode() if isinstance(key, str) else key,
        value.encode() if isinstance(value, str) else value,
        {name: header or b"" for name, header in pairs},
    )
