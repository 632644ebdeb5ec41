"""Reading topics: to their end or following them, the start of a trading day, and how far a consumer group is behind.

The rule for the end: brokers are asked once where each partition ends, and a partition is done when a record or the
broker's end-of-partition event shows that this end was reached. It is the last stable offset, where read_committed
consumers stop; with `pending` it is the end of the log, and open transactions are waited for. Offsets of records alone
never decide: transaction markers take offsets and are never delivered.

The rule for deadlines: a call fails with Unreachable once it has waited `timeout` seconds without progress on what it
still needs; the caller's own time between two records does not count. The error names what was waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]  # not in its __all__

from bourse_schemas.errors import Unreachable
from bourse_schemas.events import TEHRAN
from bourse_schemas.kafka import PERMANENT, Cluster, abandon, error_code
from bourse_schemas.topics import TOPICS

Partition = tuple[str, int]
Offsets = Mapping[Partition, int]

TIMEOUT = 15.0
STEP_SECONDS = 0.1
# How often `follow` asks whether its topics still exist and have new partitions.
REFRESH_SECONDS, REFRESH_TIMEOUT = 10.0, 2.0
CHUNK = 1000
# How far before an offset the last record is searched for at first: transaction markers take offsets too.
LOOK_BACK = 100
# The values of `OffsetSpec`.
FIRST, LAST = -2, -1


class TopicRecord(NamedTuple):
    """A committed record as it is on its topic; `timestamp` is in milliseconds."""

    place: Partition
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes]


class Batch(NamedTuple):
    """What came within a step; `behind` are the partitions that have not reached their first known end yet."""

    records: list[TopicRecord]
    behind: Offsets
    trouble: str | None


class GroupLag(NamedTuple):
    """A consumer group: its members, its lag in offsets, and the time (ms) of the oldest record it has not read.

    The lag counts from the first unread record to the last stable offset: it is 0 if only transaction markers or
    aborted records follow the committed offset, and None if the group has no offsets on our topics.
    """

    group: str
    members: int
    lag: int | None
    oldest: int | None


# --- records ----------------------------------------------------------------------------------------------------------


def read(
    cluster: Cluster,
    name: str,
    *,
    tail: int | None = None,
    start: Offsets | None = None,
    end: Offsets | None = None,
    pending: bool = False,
    reset: str = "earliest",
    timeout: float = TIMEOUT,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[TopicRecord]:
    """Yield the committed records of a topic to its present end, in order per partition.

    Every partition is read from its beginning, or from `tail` offsets before its end. With `start` only the partitions
    named there are read, from these offsets. `end` ends partitions earlier. With `reset="error"` records that were
    deleted before they were read are an error, and not passed over.
    Raises ConfigurationError if the topic does not exist or may not be read; Unreachable if it is not read in time, or
    `stopped()` became true.
    """
    partitions = _partitions(cluster, [name]) if start is None else start
    ends = offsets(cluster, dict.fromkeys(partitions, LAST), pending=pending, timeout=timeout)
    starts = _starts(ends, {name: tail}) if start is None else start
    ends = {place: min(at, (end or ends).get(place, at)) for place, at in ends.items()}
    with _Reader(cluster, starts, ends, timeout, reset, pending=pending) as reader:
        while reader.behind:
            if stopped():
                raise Unreachable(f"reading {name} was stopped")
            yield from reader.step_within(ends)


def read_values(
    cluster: Cluster, place: Partition, start: int, end: int, *, count: int, timeout: float = TIMEOUT
) -> Iterator[tuple[list[int], list[int], list[bytes | None]]]:
    """Yield offsets, timestamps (ms) and values of a partition between two offsets, at least `count` at a time.

    It is faster than `read`. Records that were deleted before they were read are an error.
    """
    with _Reader(cluster, {place: start}, {place: end}, timeout, "error") as reader:
        found: list[Any] = []
        while reader.behind:
            found += [message for message in reader.messages() if (message.offset() or 0) < end]
            if found and (len(found) >= count or not reader.behind):
                offsets, values = ([getattr(each, name)() for each in found] for name in ("offset", "value"))
                yield offsets, [message.timestamp()[1] for message in found], values
                found = []


def follow(
    cluster: Cluster, topics: Mapping[str, int | None], *, starts: Offsets | None = None, timeout: float = TIMEOUT
) -> Iterator[Batch]:
    """Yield what is committed on topics as it comes: several times a second a batch, an empty one if nothing came.

    `topics` gives per topic how many offsets before its end to begin, None for its beginning; `starts` gives partitions
    another start. Until each partition has reached its first known end the deadline holds; from then on silence is
    normal.
    """
    ends = offsets(cluster, dict.fromkeys(_partitions(cluster, topics), LAST), timeout=min(timeout, TIMEOUT))
    with _Reader(cluster, {**_starts(ends, topics), **(starts or {})}, ends, timeout) as reader:
        # Partitions without records are waited for too: only an answer shows that their broker is reachable.
        reader.behind = dict(ends)
        refreshed = time.monotonic()
        while True:
            yield Batch(reader.step(), reader.behind, reader.trouble)
            if time.monotonic() - refreshed > REFRESH_SECONDS:
                reader.refresh(topics)
                refreshed = time.monotonic()


def _partitions(cluster: Cluster, names: Iterable[str]) -> list[Partition]:
    counts = cluster.require_topics(list(names))
    return [(name, number) for name, count in counts.items() for number in range(count)]


def _starts(ends: Offsets, tails: Mapping[str, int | None]) -> dict[Partition, int]:
    return {place: 0 if (tail := tails[place[0]]) is None else max(0, end - tail) for place, end in ends.items()}


@dataclass(eq=False)
class _Reader:
    """A read_committed consumer of some partitions, and which of them are behind their ends."""

    cluster: Cluster
    starts: Offsets
    ends: Offsets
    timeout: float
    reset: str = "earliest"
    pending: bool = False

    def __post_init__(self) -> None:
        self.behind = {place: end for place, end in self.ends.items() if self.starts[place] < end}
        self.trouble: str | None = None
        self._at, self._waited = dict(self.starts), 0.0
        self._begin()

    def _begin(self) -> None:
        self._consumer = self.cluster.consumer(enable_partition_eof=True, auto_offset_reset=self.reset)
        self._consumer.assign([TopicPartition(*place, at) for place, at in self._at.items()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        abandon(self._consumer)

    def step_within(self, ends: Offsets) -> list[TopicRecord]:
        """Return what comes within a moment before these offsets."""
        return [record for record in self.step() if record.offset < ends[record.place]]

    def step(self) -> list[TopicRecord]:
        """Return what comes within a moment; raise Unreachable if there was no progress for too long."""
        return list(map(_record, self.messages()))

    def messages(self) -> list[Message]:
        """Return the same as the client has it."""
        began = time.monotonic()
        # `consume` waits for the whole batch or the whole time; a first `poll` returns as soon as there is anything.
        first = self._consumer.poll(STEP_SECONDS)
        self._waited += time.monotonic() - began
        good = []
        for message in [] if first is None else [first, *self._consumer.consume(CHUNK - 1, 0)]:
            if (error := message.error()) is None:
                good.append(message)
            else:
                self._note((message.topic() or "", message.partition() or 0), message.offset() or 0, error)
        for place, at in {(each.topic() or "", each.partition() or 0): each.offset() or 0 for each in good}.items():
            self._reached(place, at + 1)
        if self.behind and self._waited >= self.timeout:
            (name, number), end = next(iter(self.behind.items()))
            at = self._at[name, number]
            reason = "its broker is unreachable" + self._open_transaction(name, number) * self.pending
            stuck = f"{name}-{number}: no progress from offset {at} to {end} within {self.timeout:.0f} s"
            raise Unreachable(f"{stuck}: {self.trouble or reason}")
        return good

    def _open_transaction(self, name: str, number: int) -> str:
        """Return how to end a transaction that its coordinator lost, as a broker that was killed can leave it."""
        tool = f"kafka-transactions.sh --bootstrap-server {self.cluster.bootstrap_servers}"
        place = f"--topic {name} --partition {number}"
        return (
            ", or a transaction is open there\n"
            f"if this repeats, `{tool} describe-producers {place}` prints where the transaction starts, "
            f"and `{tool} abort {place} --start-offset OFFSET` ends it"
        )

    def refresh(self, names: Iterable[str]) -> None:
        """Read partitions that were added to these topics too; raise ConfigurationError if a topic was deleted.

        A client that reaches no broker is replaced: it may have lost them for good, see `Contact`.
        """
        try:
            for name in names:
                found = self._consumer.list_topics(name, REFRESH_TIMEOUT).topics[name]
                if found.error is not None:
                    raise self.cluster.failure(found.error, f"{name} cannot be read", topic=name)
                added = [(name, number) for number in found.partitions if (name, number) not in self._at]
                if added:
                    self._at |= dict.fromkeys(added, 0)
                    self._consumer.incremental_assign([TopicPartition(*place, 0) for place in added])
        except KafkaException as error:
            self.trouble = error.args[0].str()
            abandon(self._consumer)
            self._begin()

    def _reached(self, place: Partition, at: int) -> None:
        self._at[place] = at
        if place in self.behind:
            self._waited, self.trouble = 0.0, None
            if at >= self.behind[place]:
                del self.behind[place]

    def _note(self, place: Partition, at: int, error: KafkaError) -> None:
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # its public name
            self._reached(place, at)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001  # its public name
            raise Unreachable(f"{place[0]}-{place[1]}: the records from offset {self._at[place]} on were deleted")
        # A consumer that was assigned its partitions needs no group.
        elif error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
            if error.code() in PERMANENT or self.cluster.refusal(error):
                raise self.cluster.failure(error, f"{place[0]} cannot be read", topic=place[0])
            self.trouble = error.str()


def _record(message: Message) -> TopicRecord:
    pairs: Any = message.headers() or ()
    return TopicRecord(
        (message.topic() or "", message.partition() or 0),
        message.offset() or 0,
        message.timestamp()[1],
        _bytes(message.key()),
        _bytes(message.value()),
        {name: _bytes(header) or b"" for name, header in pairs},
    )


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


# --- offsets ----------------------------------------------------------------------------------------------------------


def offsets(
    cluster: Cluster, wanted: Offsets, *, pending: bool = False, timeout: float = TIMEOUT
) -> dict[Partition, int]:
    """Return offsets by partition. Wanted is FIRST, LAST, or a time in ms: the first offset at or after it, else -1.

    LAST is the last stable offset; with `pending` it is the end of the log.
    """
    if not wanted:
        return {}
    admin = cluster.admin()  # kept until it has answered
    try:  # a client without metadata may look for leaders only after three seconds
        admin.list_topics(timeout=timeout)
    except KafkaException as error:
        name, number = next(iter(wanted))
        raise cluster.failure(error.args[0], f"offsets of {name}-{number}", topic=name) from error
    answers = admin.list_offsets(
        {TopicPartition(*place): OffsetSpec(which) for place, which in wanted.items()},  # type: ignore[abstract]
        isolation_level=IsolationLevel.READ_UNCOMMITTED if pending else IsolationLevel.READ_COMMITTED,
        request_timeout=timeout,
    )
    found = {}
    for each, answer in answers.items():
        what = f"offsets of {each.topic}-{each.partition}"
        found[each.topic, each.partition] = cluster.answer(answer, what, timeout, topic=each.topic).offset
    return found


def day_start(
    cluster: Cluster, before: Mapping[Partition, int | None], *, timeout: float = TIMEOUT
) -> dict[Partition, int]:
    """Return per partition where the Tehran day of the last record before this offset (None: before the end) begins.

    It is the partition's first offset if there is no such record. In a market of another time it may be earlier:
    transaction markers count as records here, and carry the brokers' time.
    """
    starts = offsets(cluster, dict.fromkeys(before, FIRST), timeout=timeout)
    ends = offsets(cluster, dict.fromkeys(before, LAST), timeout=timeout)
    ends |= {place: at for place, at in before.items() if at is not None}
    last = {place: record.timestamp for place, record in _last_before(cluster, starts, ends, timeout).items()}
    found = offsets(cluster, {place: _midnight(at) for place, at in last.items()}, timeout=timeout)
    # The mock cluster knows no offsets by time and answers -1.
    begins = {place: min(at, ends[place]) for place, at in found.items() if at >= starts[place]}
    return {**starts, **begins}


def _midnight(timestamp: int) -> int:
    day = datetime.fromtimestamp(timestamp / 1000, TEHRAN).replace(hour=0, minute=0, second=0, microsecond=0)
    return max(0, round(day.timestamp() * 1000))


def _last_before(cluster: Cluster, starts: Offsets, ends: Offsets, timeout: float) -> dict[Partition, TopicRecord]:
    last: dict[Partition, TopicRecord] = {}
    searched, reach = 0, LOOK_BACK
    while wanted := [each for each, first in starts.items() if each not in last and ends[each] - searched > first]:
        bounds = {place: ends[place] for place in wanted}
        begins = {place: max(starts[place], end - reach) for place, end in bounds.items()}
        with _Reader(cluster, begins, bounds, timeout) as reader:
            while reader.behind:
                last |= {record.place: record for record in reader.step_within(bounds)}
        searched, reach = reach, reach * 20
    return last


# --- consumer groups --------------------------------------------------------------------------------------------------


def group_lag(cluster: Cluster, groups: Iterable[str] | None = None, *, timeout: float = TIMEOUT) -> list[GroupLag]:
    """Return members and lag on our topics of these groups, by default of all named like the prefix, "-" and more.

    A broker that cannot list groups (the mock cluster) has none.
    """
    admin, found = cluster.admin(), cluster.metadata(timeout).topics
    ours = {topic.full_name(cluster.prefix) for topic in TOPICS} & found.keys()
    # Asked before the groups are: a group that keeps up has no lag.
    places = [(name, number) for name in ours for number in found[name].partitions]
    ends = offsets(cluster, dict.fromkeys(places, LAST), timeout=timeout)
    names = sorted(_groups(cluster, admin, timeout) if groups is None else groups)
    if not names:
        return []
    described = admin.describe_consumer_groups(names, request_timeout=timeout)
    lags = []
    for name in names:
        asked = [ConsumerGroupTopicPartitions(name)]
        answer = admin.list_consumer_group_offsets(asked, request_timeout=timeout)[name]
        positions = cluster.answer(answer, f"the offsets of group {name}", timeout, group=name).topic_partitions
        committed = {(each.topic, each.partition): each.offset for each in positions if each.offset >= 0}
        known = {place: at for place, at in committed.items() if place in ends}
        unread = _first_unread(cluster, known, {place: ends[place] for place in known}, timeout)
        lags.append(
            GroupLag(
                name,
                len(cluster.answer(described[name], f"group {name}", timeout, group=name).members),
                sum(ends[place] - record.offset for place, record in unread.items()) if known else None,
                min((record.timestamp for record in unread.values()), default=None),
            )
        )
    return lags


def _groups(cluster: Cluster, admin: AdminClient, timeout: float) -> list[str]:
    listing = admin.list_consumer_groups(request_timeout=timeout)
    if error_code(listing, timeout) == KafkaError._UNSUPPORTED_FEATURE:  # noqa: SLF001  # its public name
        return []
    listed = cluster.answer(listing, "the consumer groups", timeout)
    return [each.group_id for each in listed.valid if each.group_id.startswith(f"{cluster.prefix}-")]


def _first_unread(cluster: Cluster, starts: Offsets, ends: Offsets, timeout: float) -> dict[Partition, TopicRecord]:
    unread: dict[Partition, TopicRecord] = {}
    if any(at < ends[place] for place, at in starts.items()):
        with _Reader(cluster, starts, ends, timeout) as reader:
            while reader.behind:
                for record in reader.step_within(ends):
                    unread.setdefault(record.place, record)
                    reader.behind.pop(record.place, None)
    return unread
