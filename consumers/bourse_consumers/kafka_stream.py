"""A stream of records on Kafka: group membership, offsets, transactions.

`process` runs in the thread that polls. librdkafka's own threads send the heartbeats, so only `max.poll.interval.ms`
limits how long it may take; that is long. The price: a member that hangs holds up a rebalance for as long.

Offsets are committed in the transaction if there is anything to publish, and else without one (a transaction for
offsets alone takes ten times as long). The brokers refuse both once the group has given the partitions to another
member: a transaction carries the generation of the assignment, and a plain commit is not sent under another member id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any
from uuid import uuid4

from confluent_kafka import OFFSET_END, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka import Consumer as Client

from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Emit
from bourse_consumers.records import Offsets, Partition, Places, Record, Records
from bourse_consumers.runner import Poll, StreamBroken
from bourse_consumers.transactions import ASK_SECONDS, HANG_SECONDS, Transactions
from bourse_schemas.codec import Deserializer
from bourse_schemas.errors import BourseError, ConfigurationError, Undecodable, Unreachable
from bourse_schemas.kafka import Cluster, abandon
from bourse_schemas.reading import day_start, read
from bourse_schemas.topics import DEAD_LETTERS, Topic
from bourse_schemas.watchdog import deadline

__all__ = ["KafkaStream", "partition_of", "read_events", "record_of", "watermarks"]

SESSION_MS = 10_000
LONGEST_PROCESS_MS = 1_800_000


@lru_cache(4096)
def partition_of(topic: str, number: int) -> Partition:
    """Return a partition, the same object for the same one."""
    return Partition(topic, number)


class KafkaStream:
    """One member of a consumer group, and its transactions."""

    def __init__(
        self, cluster: Cluster, group: str, topics: Sequence[Topic], emits: Sequence[Topic], *, from_end: bool = False
    ) -> None:
        self._cluster, self._group = cluster, group
        self._log = get_logger(group=group)
        names = [topic.full_name(cluster.prefix) for topic in topics]
        publishes = {*emits, DEAD_LETTERS}
        cluster.require_topics(names, [topic.full_name(cluster.prefix) for topic in publishes])
        self._registry = cluster.registry()
        self._decoders: dict[str, Deserializer[Any]] = {
            name: self._registry.deserializer(topic.event) for name, topic in zip(names, topics, strict=True)
        }
        self._columns: dict[str, Any] = {}
        # The same for the life of the process: its next producer settles what the one before left open.
        self._transactions = Transactions(cluster, f"{group}-{uuid4()}", list(publishes))
        # A consumer that publishes only dead letters need not wait for a producer.
        self._emits, self._from_end = bool(emits), from_end
        self._client: Client = cluster.consumer(
            group,
            # A committed offset that the topic no longer has is never skipped silently.
            auto_offset_reset="error",
            enable_partition_eof=True,
            session_timeout_ms=SESSION_MS,
            max_poll_interval_ms=LONGEST_PROCESS_MS,
            error_cb=self._transactions.suspect,
            on_commit=self._on_commit,
        )
        self._assigned: list[Partition] = []
        self._ends: dict[Partition, int] = {}
        self._next: dict[Partition, int] = {}
        self._member = ""
        self._membership: Any = None
        self._changed = False
        # Whether a failed plain commit matters, and the failure of one that does.
        self._strict = False
        self._uncommitted: KafkaError | None = None
        self._client.subscribe(names, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)

    def decode(self, record: Record) -> Any:
        """Return the record's event. Raises Undecodable; Unreachable while the registry is."""
        return self._decoders[record.partition.topic](record.value)

    def columns(self, places: Places) -> Any:
        """Return records of one topic by columns, None if they have to be decoded one by one."""
        return self._reader(places).read(places)

    def unknown(self, places: Places) -> Any:
        """Return the fields of newer writers that this release does not know, None if there are none."""
        return self._reader(places).unknown(places)

    def _reader(self, places: Places) -> Any:
        from bourse_consumers.columns import Columns

        topic = places.partitions[0].topic
        if topic not in self._columns:
            self._columns[topic] = Columns(self._decoders[topic])
        return self._columns[topic]

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return an assignment, or the records that came within `timeout` seconds and the positions after them."""
        self._transactions.poll()
        # `consume` waits for the whole batch or the whole time; a first `poll` returns as soon as there is anything.
        first = self._client.poll(timeout)
        messages = [] if first is None else [first, *self._client.consume(limit - 1, 0)]
        if self._changed:
            # What came along with the assignment is fetched again from where the consumer begins.
            assigned = self._assignment()
            self._changed = False
            return Poll(assigned=assigned)
        if self._uncommitted is not None:
            error, self._uncommitted = self._uncommitted, None
            raise self._broken(error)
        positions: dict[Partition, int] = {}
        good = [message for message in messages if message.error() is None]
        if len(good) < len(messages):
            self._handle_errors(messages, positions)
        partitions = [partition_of(message.topic(), message.partition()) for message in good]
        offsets: list[Any] = [message.offset() for message in good]
        timestamps = [message.timestamp()[1] for message in good]
        values: list[Any] = [message.value() for message in good]
        places = Places(partitions, offsets, timestamps, values)
        for partition, at in places.ends().items():
            positions[partition] = max(at, positions.get(partition, 0))
        self._next.update(positions)
        return Poll(Records(places, lambda: list(map(record_of, partitions, good))), positions)

    def _handle_errors(self, messages: Sequence[Message], positions: dict[Partition, int]) -> None:
        """Note where partitions end; raise errors that do not pass by themselves."""
        for message in messages:
            error = message.error()
            if error is None:
                continue
            if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                # The end is beyond the last record if a transaction marker follows it.
                positions[partition_of(message.topic(), message.partition())] = int(message.offset() or 0)
            elif error.fatal():
                raise KafkaException(error)
            elif refusal := self._refusal(error, message.topic() or ""):
                raise refusal
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001  # the client's public name for it
                raise StreamBroken(error.str())
            else:
                self._log.warning("kafka", error=error.str())

    def seek(self, offsets: Offsets) -> None:
        """Continue at these offsets; partitions not named stay where they are."""
        for partition, at in offsets.items():
            if at > self._ends.get(partition, at) and at > (end := self._watermarks(partition)[1]):
                raise ConfigurationError(
                    f"{partition.topic}-{partition.number} ends at offset {end}, but its sink has stored up to {at}: "
                    "the topic was created again, or this is another cluster; store its data elsewhere"
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
        self._client.resume(held)  # also after a rebalance: a partition that comes back would stay paused
        return not self._changed and not stopped()

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish emits and commit offsets, in one transaction if there is anything to publish."""
        if self._changed or self._client.memberid() != self._member:
            raise StreamBroken("the group gave our partitions away")
        positions = [TopicPartition(*partition, at) for partition, at in offsets.items()]
        if emits:
            self._transactions.commit(emits, positions, self._membership)
        elif positions:
            # A failure is raised by the next `poll`.
            self._strict = True
            self._commit(positions)

    def hint(self, offsets: Offsets) -> None:
        """Commit offsets for dashboards."""
        if positions := [TopicPartition(*each, at) for each, at in offsets.items() if each in self._assigned]:
            self._strict = False
            self._commit(positions)

    def _commit(self, positions: list[TopicPartition]) -> None:
        # Waiting for the answer could take as long as the broker is unreachable; `close` waits, with a deadline.
        try:
            self._client.commit(offsets=positions, asynchronous=True)
        except KafkaException as error:
            raise self._broken(error.args[0]) from error

    def _on_commit(self, error: KafkaError | None, _: list[TopicPartition]) -> None:
        if error is not None and self._strict:
            self._uncommitted = error

    def reset(self) -> None:
        """Begin with the same partitions again, with a producer that settles the last one's transaction."""
        self._transactions.suspect()
        self._uncommitted = None
        self._changed = self._changed or bool(self._assigned)

    def lag(self) -> int:
        """Return how many offsets are between the positions and the ends."""
        lag = 0
        for partition in self._assigned:
            _, high = self._client.get_watermark_offsets(TopicPartition(*partition), cached=True)
            lag += max(0, high - self._next[partition])
        return lag

    def close(self) -> None:
        """Leave the group; not reaching the brokers does not hold it up."""
        abandon(self._client)
        self._transactions.close()

    def _refusal(self, error: KafkaError, topic: str = "") -> ConfigurationError | None:
        return self._cluster.refusal(error, topic=topic, group=self._group)

    def _broken(self, error: KafkaError) -> BourseError:
        return self._refusal(error) or StreamBroken(error.str())

    # --- membership ---------------------------------------------------------------------------------------------------

    def _on_assign(self, client: Client, partitions: list[TopicPartition]) -> None:
        self._assigned = [Partition(p.topic, p.partition) for p in partitions]
        # Capture both now: brokers accept commits from a client that has no member id.
        self._member, self._membership = client.memberid(), client.consumer_group_metadata()
        self._gone()
        # Where to begin is decided in a moment; nothing is read before.
        client.assign([TopicPartition(p.topic, p.partition, OFFSET_END) for p in partitions])

    def _on_revoke(self, client: Client, _: list[TopicPartition]) -> None:
        self._assigned = []
        self._gone()
        client.unassign()

    def _gone(self) -> None:
        self._transactions.suspect()
        self._uncommitted = None
        self._changed = True

    def _assign(self) -> None:
        self._client.assign([TopicPartition(*partition, self._next[partition]) for partition in self._assigned])

    def _assignment(self) -> Assignment:
        if self._emits and self._assigned:
            # First, since it settles what the last producer left open: only then it is certain what is committed.
            self._transactions.prepare()
        committed: dict[Partition, int | None] = {}
        begin: dict[Partition, int] = {}
        first: dict[Partition, int] = {}
        for found in self._committed():
            partition, at = Partition(found.topic, found.partition), found.offset
            low, self._ends[partition] = self._watermarks(partition)
            first[partition] = low
            fits = low <= at <= self._ends[partition]
            if at >= 0 and not fits:
                self._log.warning(
                    "the topic no longer has the committed offset: beginning at its start",
                    topic=partition.topic,
                    partition=partition.number,
                    committed=at,
                    start=low,
                )
            if at < 0 and self._from_end:
                at, fits = self._ends[partition], True
                self._log.info("beginning at the end", topic=partition.topic, partition=partition.number, offset=at)
                self._commit([TopicPartition(*partition, at)])
            committed[partition] = at if fits else None
            begin[partition] = at if fits else low
        self._next = dict(begin)
        self._assign()
        fresh = [partition for partition, at in committed.items() if at is None]
        return Assignment(
            begin,
            lambda: self._day_start(committed),
            first,
            fresh=fresh,
            read=partial(read_events, self._cluster),
            identity=self._cluster.identity,
        )

    def _committed(self) -> list[TopicPartition]:
        """Return what the group has committed, after transactions that hold offsets of ours are settled."""
        if not self._assigned:
            return []
        try:
            with deadline("committed", HANG_SECONDS):
                return self._client.committed([TopicPartition(*partition) for partition in self._assigned], ASK_SECONDS)
        except KafkaException as error:
            raise self._broken(error.args[0]) from error

    def _watermarks(self, partition: Partition) -> tuple[int, int]:
        return watermarks(self._client, partition)

    def _day_start(self, committed: dict[Partition, int | None]) -> dict[Partition, int]:
        before: dict[tuple[str, int], int | None] = dict(committed.items())
        try:
            return {Partition(*place): at for place, at in day_start(self._cluster, before).items()}
        except Unreachable as error:
            raise StreamBroken(str(error)) from error


def watermarks(client: Client, partition: Partition) -> tuple[int, int]:
    """Return a partition's first offset and its end. Raises StreamBroken."""
    try:
        with deadline("get_watermark_offsets", HANG_SECONDS):
            return client.get_watermark_offsets(TopicPartition(*partition), ASK_SECONDS)
    except KafkaException as error:
        raise StreamBroken(error.args[0].str()) from error


def read_events(cluster: Cluster, topic: Topic) -> Iterator[Any]:
    """Yield the committed events of a topic; see Assignment.read."""
    name, decode = topic.full_name(cluster.prefix), cluster.registry().deserializer(topic.event)
    try:
        start = None
        if topic.cleanup == "delete":
            partitions = range(cluster.require_topics([name])[name])
            start = day_start(cluster, {(name, number): None for number in partitions})
        # With what is still in a transaction: ours may be committed for the group and not yet on this topic.
        for record in read(cluster, name, start=start, pending=True):
            with suppress(Undecodable):
                if record.value is not None:
                    yield decode(record.value)
    except Unreachable as error:
        raise StreamBroken(str(error)) from error


def record_of(partition: Partition, message: Message) -> Record:
    """Return a message as a record."""
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
