"""A stream of records over Kafka: group membership, offsets, transactions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from bourse_consumers.api import Assignment, Emit, Offsets, Partition, Record
from bourse_consumers.runner import Poll, StreamBroken
from bourse_schemas.codec import Deserializer, Serializer
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import Topic

__all__ = ["KafkaStream"]

TEHRAN = ZoneInfo("Asia/Tehran")
SESSION_MS = 10_000
# A slow `process` holds the thread that polls; the heartbeat goes on in librdkafka's own.
LONGEST_PROCESS_MS = 1_800_000
TRANSACTION_MS = 10_000
ASK_SECONDS = 10.0
POSITION_SECONDS = 1.0
# How far before an offset the last record is looked for at first: transaction markers lie between.
LOOK_BACK = 100


class KafkaStream:
    """One member of a consumer group, with a transactional producer beside it."""

    def __init__(self, cluster: Cluster, group: str, topics: Sequence[Topic], emits: Sequence[Topic]) -> None:
        self._cluster = cluster
        self._group = group
        self._registry = cluster.registry()
        self._serializers = {topic: self._registry.serializer(topic, cluster.prefix) for topic in emits}
        self._names = [topic.full_name(cluster.prefix) for topic in topics]
        self._decoders: dict[str, Deserializer[Any]] = {
            topic.full_name(cluster.prefix): self._registry.deserializer(topic.event) for topic in topics
        }
        cluster.require_topics([*self._names, *(topic.full_name(cluster.prefix) for topic in emits)])
        self._producer = self._new_producer()
        self._client: Client = cluster.consumer(
            group,
            auto_offset_reset="earliest",
            enable_partition_eof=True,
            session_timeout_ms=SESSION_MS,
            max_poll_interval_ms=LONGEST_PROCESS_MS,
        )
        self._assigned: list[Partition] = []
        self._next: dict[Partition, int] = {}
        self._changed = False
        self._positions: dict[Partition, int] = {}
        self._position_due = 0.0
        self._client.subscribe(
            self._names, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    def decode(self, record: Record) -> Any:
        """Return the record's event; raises Undecodable, or Unreachable while the registry is away."""
        return self._decoders[record.partition.topic](record.value)

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return an assignment, or the records that came within `timeout` seconds and the positions after them."""
        # `consume` waits for the whole batch or the whole time; a first `poll` returns as soon as there is anything.
        first = self._client.poll(timeout)
        messages = [] if first is None else [first, *self._client.consume(limit - 1, 0)]
        if self._changed:
            # What came along with the assignment is fetched again from where the consumer wants to begin.
            self._changed = False
            return Poll(assigned=self._assignment())
        records = []
        for message in messages:
            error = message.error()
            partition = Partition(str(message.topic()), int(message.partition() or 0))
            if error is None:
                records.append(_record(partition, message))
                self._positions[partition] = self._next[partition] = int(message.offset() or 0) + 1
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                # The end lies beyond the last record where a transaction marker follows it.
                self._positions[partition] = max(self._positions.get(partition, 0), int(message.offset() or 0))
            elif error.fatal():
                raise KafkaException(error)
        now = time.monotonic()
        if not records and now < self._position_due:
            return Poll()
        self._position_due = now + POSITION_SECONDS
        positions, self._positions = self._positions, {}
        return Poll(records, positions)

    def seek(self, offsets: Offsets) -> None:
        """Go on from these offsets; those not named go on after what was delivered."""
        self._positions = {}
        self._next.update(offsets)
        self._client.assign([TopicPartition(p.topic, p.number, self._next[p]) for p in self._assigned])

    def wait(self, seconds: float) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed."""
        held = [TopicPartition(partition.topic, partition.number) for partition in self._assigned]
        self._client.pause(held)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self._changed:
            self._client.poll(min(left, 0.1))
        if self._changed:
            return False
        self._client.resume(held)
        return True

    def commit(self, emits: Iterable[Emit], offsets: Offsets) -> None:
        """Publish emits and commit offsets, in one transaction where there is anything to publish."""
        positions = [TopicPartition(partition.topic, partition.number, at) for partition, at in offsets.items()]
        records = [self._serializer(emit.topic)(emit.event) for emit in emits]
        try:
            if not records:
                self._client.commit(offsets=positions, asynchronous=False)
                return
            self._producer.begin_transaction()
            for record in records:
                self._producer.produce(
                    record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers
                )
            if positions:
                self._producer.send_offsets_to_transaction(positions, self._client.consumer_group_metadata())
            self._producer.commit_transaction()
        except (KafkaException, BufferError) as error:
            raise StreamBroken(str(error)) from error

    def hint(self, offsets: Offsets) -> None:
        """Commit offsets for dashboards only."""
        positions = [TopicPartition(p.topic, p.number, at) for p, at in offsets.items() if p in self._assigned]
        if positions:
            self._client.commit(offsets=positions, asynchronous=True)

    def reset(self) -> None:
        """Throw the producer away, make a new one, and begin with the same partitions anew."""
        self._producer.close()
        self._producer = self._new_producer()
        self._changed = bool(self._assigned)

    def lag(self) -> int:
        """Return how many offsets lie between the positions and the ends."""
        lag = 0
        for position in self._client.position([TopicPartition(p.topic, p.number) for p in self._assigned]):
            _, high = self._client.get_watermark_offsets(position, cached=True)
            lag += max(0, high - position.offset) if position.offset >= 0 else max(0, high)
        return lag

    def close(self) -> None:
        """Leave the group."""
        self._client.close()
        self._producer.close()

    # --- within -------------------------------------------------------------------------------------------------------

    def _new_producer(self) -> Producer:
        producer = self._cluster.transactional_producer(f"{self._group}-{uuid4()}", TRANSACTION_MS)
        try:
            producer.init_transactions(ASK_SECONDS)
        except KafkaException as error:
            raise StreamBroken(str(error)) from error
        return producer

    def _serializer(self, topic: Topic) -> Serializer[Any]:
        if topic not in self._serializers:
            self._serializers[topic] = self._registry.serializer(topic, self._cluster.prefix)
        return self._serializers[topic]

    def _on_assign(self, _: Client, partitions: list[TopicPartition]) -> None:
        self._assigned = [Partition(p.topic, p.partition) for p in partitions]
        self._changed = True
        self._client.assign(partitions)

    def _on_revoke(self, _: Client, __: list[TopicPartition]) -> None:
        self._assigned = []
        self._changed = True
        self._client.unassign()

    def _assignment(self) -> Assignment:
        asked = [TopicPartition(partition.topic, partition.number) for partition in self._assigned]
        found = {Partition(p.topic, p.partition): p.offset for p in self._client.committed(asked, ASK_SECONDS)}
        begin = {p: at if at >= 0 else self._low(p) for p, at in found.items()}
        self._next = {}
        self.seek(begin)
        return Assignment(begin, lambda: {p: self._day_start(p, at if at >= 0 else None) for p, at in found.items()})

    def _low(self, partition: Partition) -> int:
        return self._client.get_watermark_offsets(TopicPartition(*partition), ASK_SECONDS)[0]

    def _day_start(self, partition: Partition, committed: int | None) -> int:
        """Return where the trading day of the last record before `committed` begins (of the last one where None)."""
        client = self._cluster.consumer(enable_partition_eof=True)
        try:
            low, high = client.get_watermark_offsets(TopicPartition(*partition), ASK_SECONDS)
            end = high if committed is None else committed
            last = _last_before(client, partition, low, end)
            if last is None:
                return low
            day = datetime.fromtimestamp(last / 1000, TEHRAN).replace(hour=0, minute=0, second=0, microsecond=0)
            midnight = round(day.timestamp() * 1000)
            found = client.offsets_for_times([TopicPartition(*partition, midnight)], ASK_SECONDS)[0].offset
            return min(found, end) if found >= low else low
        finally:
            client.close()


def _last_before(client: Client, partition: Partition, low: int, end: int) -> int | None:
    """Return the timestamp of the last record before `end`, None where there is none."""
    reach = LOOK_BACK
    while end > low:
        begin = max(low, end - reach)
        client.assign([TopicPartition(*partition, begin)])
        last = None
        deadline = time.monotonic() + ASK_SECONDS
        while time.monotonic() < deadline:
            message = client.poll(0.2)
            if message is None:
                continue
            if message.error() is not None or int(message.offset() or 0) >= end:
                break
            last = int(message.timestamp()[1])
        if last is not None or begin == low:
            return last
        reach *= 20
    return None


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
