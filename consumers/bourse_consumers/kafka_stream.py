"""A stream of records on Kafka: group membership, offsets, transactions.

`process` runs in the thread that polls. librdkafka's own threads send the heartbeats, so only `max.poll.interval.ms`
limits how long it may take; that is long. The price: a member that hangs holds up a rebalance for as long.

Offsets are committed in the transaction if there is anything to publish, and else without one (a transaction for
offsets alone takes ten times as long). The brokers refuse both once the group has given the partitions to another
member: a transaction carries the generation of the assignment, and a plain commit is not sent under another member id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any
from uuid import uuid4

from confluent_kafka import OFFSET_END, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka import Consumer as Client

from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Decoders, Emit
from bourse_consumers.records import Offsets, Partition, Places, Record, Records
from bourse_consumers.runner import Poll, StreamBroken
from bourse_consumers.transactions import ASK_SECONDS, HANG_SECONDS, Transactions
from bourse_schemas import reading
from bourse_schemas.codec import Deserializer
from bourse_schemas.errors import BourseError, ConfigurationError, Undecodable, Unreachable
from bourse_schemas.kafka import Cluster, Contact, abandon
from bourse_schemas.topics import DEAD_LETTERS, Topic
from bourse_schemas.watchdog import deadline

SESSION_MS = 10_000
LONGEST_PROCESS_MS = 1_800_000


@lru_cache(4096)
def _partition(topic: str, number: int) -> Partition:
    """Return a partition, the same object for the same one."""
    return Partition(topic, number)


class KafkaBase:
    """What both kinds of streams do: decode, fetch, ask for offsets, publish, and sort errors of the brokers."""

    def __init__(
        self, cluster: Cluster, group: str, reads: Sequence[Topic], emits: Sequence[Topic], transactional_id: str
    ) -> None:
        self._cluster, self._group = cluster, group
        self._log = get_logger(group=group)
        publishes = list(dict.fromkeys((*emits, DEAD_LETTERS)))
        self._reads = [topic.full_name(cluster.prefix) for topic in reads]
        cluster.require_topics(self._reads, [topic.full_name(cluster.prefix) for topic in publishes])
        self._registry = cluster.registry()
        self._by_topic: dict[str, Deserializer[Any]] = {
            name: self._registry.deserializer(topic.event) for name, topic in zip(self._reads, reads, strict=True)
        }
        # The same for the life of the process: its next producer settles what the one before left open.
        self._transactions = Transactions(cluster, transactional_id, publishes)
        self._contact: Contact | None = None

    def _fetch(self, client: Client, timeout: float, limit: int) -> list[Message]:
        """Return what comes within `timeout` seconds; raise StreamBroken if the client has lost its brokers."""
        self._contact = self._contact or Contact()
        try:
            self._contact.require(client, self._reads[0])
        except KafkaException as error:
            self._contact = None
            raise StreamBroken(error.args[0].str()) from error
        # `consume` waits for the whole batch or the whole time; a first `poll` returns as soon as there is anything.
        first = client.poll(timeout)
        return [] if first is None else [first, *client.consume(limit - 1, 0)]

    def _records(self, messages: Sequence[Message]) -> Poll:
        """Return messages as records, and the positions after them; raise errors that do not pass by themselves."""
        good: list[Any] = [message for message in messages if message.error() is None]
        positions: dict[Partition, int] = {}
        for message in messages if len(good) < len(messages) else ():
            error = message.error()
            if error is None:
                continue
            if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                # The end is beyond the last record if a transaction marker follows it.
                positions[_partition(message.topic(), message.partition())] = message.offset() or 0
            else:
                self._note(error, message.topic() or "")
        partitions = [_partition(message.topic(), message.partition()) for message in good]
        timestamps = [message.timestamp()[1] for message in good]
        offsets, values = [message.offset() for message in good], [message.value() for message in good]
        places = Places(partitions, offsets, timestamps, values)
        for partition, at in places.ends().items():
            positions[partition] = max(at, positions.get(partition, 0))
        return Poll(Records(places, lambda: list(map(_record, partitions, good))), positions)

    def _note(self, error: KafkaError, topic: str) -> None:
        """Raise an error that does not pass by itself, log any other."""
        if error.code() == KafkaError._FATAL:  # noqa: SLF001  # its name; `fatal()` is false for it
            raise BourseError(f"this client of Kafka cannot go on: {error.str()}")
        if refusal := self._cluster.refusal(error, topic=topic, group=self._group):
            raise refusal
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001  # the client's public name for it
            raise StreamBroken(error.str())
        self._log.warning("kafka", error=error.str())

    def _watermarks(self, client: Client, partition: Partition) -> tuple[int, int]:
        """Return a partition's first offset and its end. Faster than an administration client, which has to connect."""
        try:
            with deadline("get_watermark_offsets", HANG_SECONDS):
                return client.get_watermark_offsets(TopicPartition(*partition), ASK_SECONDS)
        except KafkaException as error:
            raise StreamBroken(error.args[0].str()) from error

    def _asked(self, partitions: Iterable[Partition], which: int, **how: Any) -> dict[Partition, int]:
        """Return offsets as `reading.offsets` does. Raises Unreachable; ConfigurationError if a topic is gone."""
        wanted: dict[tuple[str, int], int] = dict.fromkeys(partitions, which)
        try:
            found = reading.offsets(self._cluster, wanted, timeout=ASK_SECONDS, **how)
        except Unreachable:
            raise
        except ConfigurationError as error:
            # A broker may not know yet a partition that was added.
            self._cluster.require_topics(self._reads)
            raise StreamBroken(str(error)) from error
        return {Partition(*place): at for place, at in found.items()}

    def _day_start(self, before: dict[Partition, int | None]) -> dict[Partition, int]:
        bounds: dict[tuple[str, int], int | None] = dict(before.items())
        found = reading.day_start(self._cluster, bounds, timeout=ASK_SECONDS)
        return {Partition(*place): at for place, at in found.items()}

    def _committed(self, client: Client, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return what the group has committed, below 0 if nothing. Call it after `prepare`, which settles the last."""
        if not partitions:
            return {}
        try:
            with deadline("committed", HANG_SECONDS):
                found = client.committed([TopicPartition(*partition) for partition in partitions], ASK_SECONDS)
        except KafkaException as error:
            # The call times out; that the right on the group is missing is reported by the next poll.
            message = client.poll(0)
            raise self._broken((message.error() if message is not None else None) or error.args[0]) from error
        return {Partition(each.topic, each.partition): each.offset for each in found}

    def _read(self, topic: Topic) -> Iterator[Any]:
        """Yield the committed events of a topic; see Assignment.read."""
        name, decode = topic.full_name(self._cluster.prefix), self._registry.deserializer(topic.event)
        start = None
        if topic.cleanup == "delete":
            partitions = range(self._cluster.require_topics([name])[name])
            start = reading.day_start(self._cluster, {(name, number): None for number in partitions})
        # With what is still in a transaction: ours may be committed for the group and not yet on this topic.
        for record in reading.read(self._cluster, name, start=start, pending=True):
            with suppress(Undecodable):
                if record.value is not None:
                    yield decode(record.value)

    def _broken(self, error: KafkaError) -> BourseError:
        return self._cluster.refusal(error, group=self._group) or StreamBroken(error.str())


class KafkaStream(KafkaBase):
    """One member of a consumer group, and its transactions; see `bourse_consumers.runner.Stream`."""

    def __init__(
        self, cluster: Cluster, group: str, topics: Sequence[Topic], emits: Sequence[Topic], *, from_end: bool = False
    ) -> None:
        super().__init__(cluster, group, topics, emits, f"{group}-{uuid4()}")
        self.decoders = Decoders(self._by_topic)
        # A consumer that publishes only dead letters need not wait for a producer.
        self._emits, self._from_end = bool(emits), from_end
        self._join()

    def _join(self) -> None:
        self._client: Client = self._cluster.consumer(
            self._group,
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
        self._member, self._membership = "", None
        self._changed = False
        # The failure of a plain commit.
        self._uncommitted: KafkaError | None = None
        revoked = self._on_revoke
        self._client.subscribe(self._reads, on_assign=self._on_assign, on_revoke=revoked, on_lost=revoked)

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return an assignment, or the records that came within `timeout` seconds and the positions after them."""
        self._transactions.poll()
        messages = self._fetch(self._client, timeout, limit)
        if self._changed:  # what came along is read again from where the consumer begins
            self._changed = False
            return Poll(assigned=self._assignment())
        if self._uncommitted is not None:
            error, self._uncommitted = self._uncommitted, None
            raise self._broken(error)
        poll = self._records(messages)
        self._next.update(poll.positions)
        return poll

    def seek(self, offsets: Offsets) -> None:
        """Read all partitions of the assignment from these offsets."""
        for partition, at in offsets.items():
            if at > self._ends[partition] and at > (end := self._watermarks(self._client, partition)[1]):
                raise ConfigurationError(
                    f"{partition.topic}-{partition.number} ends at offset {end}, but its sink has stored up to {at}: "
                    "the topic was created again, or this is another cluster; store its data elsewhere"
                )
        self._next = dict(offsets)
        self._client.assign([TopicPartition(*partition, at) for partition, at in offsets.items()])

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Stay a member without fetching; return False as soon as the assignment changed or `stopped()`."""
        held = [TopicPartition(*partition) for partition in self._assigned]
        self._client.pause(held)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._changed and not stopped():
            message = self._client.poll(min(left, 0.1))
            if message is not None and not self._changed and self._records([message]).records:
                raise StreamBroken("a record came although its partition is paused")
        self._client.resume(held)  # also after a rebalance: a partition that comes back would stay paused
        return not self._changed and not stopped()

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish emits and commit offsets, in one transaction if there is anything to publish."""
        if self._changed or self._client.memberid() != self._member:
            raise StreamBroken("the group gave our partitions away")
        positions = [TopicPartition(*partition, at) for partition, at in offsets.items()]
        try:
            if emits:
                self._transactions.commit(emits, positions, self._membership)
            elif positions:
                # Waiting for the answer could take as long as the broker is unreachable. The next `poll` raises a
                # failure; `close` waits, with a deadline.
                self._client.commit(offsets=positions, asynchronous=True)
        except KafkaException as error:
            raise self._broken(error.args[0]) from error

    def _on_commit(self, error: KafkaError | None, _: list[TopicPartition]) -> None:
        self._uncommitted = error or self._uncommitted

    def reset(self) -> None:
        """Begin with the same partitions again, with a producer that settles the last one's transaction."""
        self._transactions.suspect()
        if self._contact is None:
            lost = self._client
            self._join()
            abandon(lost)
        self._uncommitted = None
        self._changed = self._changed or bool(self._assigned)

    def lag(self) -> int:
        """Return how many offsets are between the positions and the ends; asks the brokers."""
        ends = {partition: self._watermarks(self._client, partition)[1] for partition in self._assigned}
        return sum(max(0, end - self._next.get(partition, end)) for partition, end in ends.items())

    def close(self) -> None:
        """Leave the group; not reaching the brokers does not hold it up."""
        abandon(self._client, self._transactions)

    # --- membership ---------------------------------------------------------------------------------------------------

    def _on_assign(self, client: Client, partitions: list[TopicPartition]) -> None:
        self._changes([Partition(each.topic, each.partition) for each in partitions])
        # Capture both now: brokers accept commits from a client that has no member id.
        self._member, self._membership = client.memberid(), client.consumer_group_metadata()
        # Where to begin is decided in a moment; nothing is read before.
        client.assign([TopicPartition(*partition, OFFSET_END) for partition in self._assigned])

    def _on_revoke(self, client: Client, _: list[TopicPartition]) -> None:
        if client is self._client:  # not one that was replaced, and is closed meanwhile
            self._changes([])
        client.unassign()

    def _changes(self, assigned: list[Partition]) -> None:
        self._assigned, self._changed, self._uncommitted = assigned, True, None
        self._transactions.suspect()

    def _assignment(self) -> Assignment:
        if self._emits and self._assigned:
            # First, since it settles what the last producer left open: only then it is certain what is committed.
            self._transactions.prepare()
        begin = self._committed(self._client, self._assigned)
        first: dict[Partition, int] = {}
        ends: dict[Partition, int] = {}
        fresh: list[Partition] = []
        for partition, at in begin.items():
            first[partition], self._ends[partition] = self._watermarks(self._client, partition)
            if first[partition] <= at <= self._ends[partition]:
                continue
            about = {"topic": partition.topic, "partition": partition.number}
            if at < 0 and self._from_end:
                begin[partition] = ends[partition] = self._ends[partition]
                self._log.info("beginning at the end", **about, offset=begin[partition])
            else:
                begin[partition] = first[partition]
                fresh.append(partition)
                if at >= 0:
                    gone = "the topic no longer has the committed offset: beginning at its start"
                    self._log.warning(gone, **about, committed=at, start=first[partition])
        self.commit((), ends)
        self._next = dict(begin)  # the lag counts from here while the consumer waits for its store
        before: dict[Partition, int | None] = {**begin, **dict.fromkeys(fresh)}
        ask: dict[str, Any] = {"read": self._read, "identity": self._cluster.identity}
        return Assignment(begin, lambda: self._day_start(before), first, fresh=fresh, **ask)


def _record(partition: Partition, message: Any) -> Record:
    headers = {name: value or b"" for name, value in message.headers() or ()}
    return Record(partition, message.offset(), message.timestamp()[1], message.key(), message.value(), headers)
