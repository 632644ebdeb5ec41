"""Whole polls from Kafka: one member of the group is active, elected like the producer's leader.

The active member reads all partitions of polls and trades without joining a group, and commits only the polls
partition, always in a transaction. The transactional id is the group: a new active member fences its predecessor and
settles what that left open. The offset is committed for the group, which has no members; the election has a group of
its own. So members that come and go on standby disturb nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from typing import Any

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Emit
from bourse_consumers.columns import Columns
from bourse_consumers.kafka_stream import partition_of, read_events, record_of, watermarks
from bourse_consumers.market import MarketAssignment, Polls
from bourse_consumers.records import Offsets, Partition, Places, Record
from bourse_consumers.runner import Poll, StreamBroken
from bourse_consumers.transactions import ASK_SECONDS, HANG_SECONDS, Transactions
from bourse_schemas.codec import Deserializer
from bourse_schemas.election import Election
from bourse_schemas.errors import Undecodable, Unreachable
from bourse_schemas.events import TEHRAN
from bourse_schemas.kafka import Cluster, abandon
from bourse_schemas.reading import FIRST, LAST, day_start, offsets, read
from bourse_schemas.topics import DEAD_LETTERS, POLLS, TRADES, Topic
from bourse_schemas.watchdog import deadline

__all__ = ["KafkaMarket"]

CHUNK = 2000
# An active member that does not come back to the stream for so long leaves the election.
OWED_SECONDS = 120.0
# Partitions are added rarely; the offsets of a group without members expire after seven days.
REFRESH_SECONDS, RECOMMIT_SECONDS = 30.0, 86_400.0
# Clocks are set back by less than this between a request and its events.
SLACK_MS = 60_000
FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}  # noqa: SLF001  # its names


class KafkaMarket:
    """A member of a market consumer's group, active or on standby; see `bourse_consumers.runner.Stream`.

    Its records are the markers of polls that are whole; `polls` has the polls.
    """

    def __init__(self, cluster: Cluster, group: str, emits: Sequence[Topic]) -> None:
        self._cluster, self._group = cluster, group
        self._log = get_logger(group=group)
        self._trades, name = (topic.full_name(cluster.prefix) for topic in (TRADES, POLLS))
        self._marks = Partition(name, 0)
        publishes = [*dict.fromkeys((*emits, DEAD_LETTERS))]
        cluster.require_topics([self._trades, name], [topic.full_name(cluster.prefix) for topic in publishes])
        registry = cluster.registry()
        self._decoders: dict[str, Deserializer[Any]] = {
            each.full_name(cluster.prefix): registry.deserializer(each.event) for each in (TRADES, POLLS)
        }
        self.polls = Polls(self.decode, Columns(self._decoders[self._trades]).read)
        self._transactions = Transactions(cluster, group, publishes)
        self._election = Election(cluster, f"{group}-election", OWED_SECONDS)
        self._reader: Client | None = None
        self._term: int | None = None
        self._changed = True
        self._begin: int | None = None
        self._position: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._refreshed = 0.0
        self._committed, self._committed_at = 0, 0.0

    def decode(self, record: Record) -> Any:
        """Return the record's event. Raises Undecodable; Unreachable while the registry is."""
        return self._decoders[record.partition.topic](record.value)

    def columns(self, places: Places) -> None:
        """Return None: markers are decoded one by one."""

    unknown = columns

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return a change of the active member, or the markers of the next whole polls."""
        self._election.owe(0.0)
        term = self._election.term(0.0 if self._changed or self._reader else timeout)
        if self._changed or term != self._term:
            self._deactivate()
            assigned = Assignment({}) if term is None else self._activate()
            self._term, self._changed = term, False
            return Poll(assigned=assigned)
        if self._reader is None:
            return Poll()
        self._transactions.poll()
        if self._begin is not None:
            self._go_to(self._reader, self._begin)
        self._read(self._reader, timeout)
        ready = self.polls.ready(limit) or self._check()
        if ready:
            return Poll(ready, {self._marks: ready[-1].offset + 1})
        if time.monotonic() - self._committed_at > RECOMMIT_SECONDS:
            self.commit((), {self._marks: self._committed})
        # Only transaction markers are beyond the last poll.
        return Poll(positions={} if len(self.polls) else {self._marks: self._position.get(self._marks, 0)})

    def seek(self, offsets: Offsets) -> None:
        """Continue at this marker, and at the first event that may belong to its poll."""
        self._begin = offsets[self._marks]

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Wait while this member stays active, or on standby."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not stopped() and self._election.term() == self._term:
            self._election.owe(0.0)
            time.sleep(min(left, 0.1))
        return not stopped() and self._election.term() == self._term

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish emits and commit the polls, in one transaction; refused if another member is active."""
        if self._reader is None or self._changed or self._election.term() != self._term:
            raise StreamBroken("this member is no longer active")
        if self._transactions.damaged:
            # A new producer fences whoever was elected meanwhile, if this member does not know yet: then it must not
            # go on with what it has in memory.
            self._transactions.prepare()
            if self._found_committed(self._reader) != self._committed:
                raise StreamBroken("another member was active meanwhile")
        try:
            positions = [TopicPartition(*partition, at) for partition, at in offsets.items()]
            self._transactions.commit(emits, positions, self._reader.consumer_group_metadata())
        except StreamBroken as error:
            cause = error.__cause__
            if isinstance(cause, KafkaException) and cause.args[0].code() in FENCED:
                # It must not own the election's partition without publishing.
                self._election.resign()
            raise
        self._committed, self._committed_at = offsets.get(self._marks, self._committed), time.monotonic()

    def hint(self, offsets: Offsets) -> None:
        """Do nothing: a market consumer has no offsets of its own."""

    def reset(self) -> None:
        """Become active again, with a producer that settles the last transaction."""
        self._changed = True

    def lag(self) -> int:
        """Return how many polls were not processed."""
        if self._reader is None:
            return 0
        _, high = self._reader.get_watermark_offsets(TopicPartition(*self._marks), cached=True)
        return len(self.polls) + max(0, high - self._position.get(self._marks, high))

    def close(self) -> None:
        """Leave the election, so that another member becomes active at once."""
        abandon(self._transactions, self._election, *([self._reader] if self._reader else []))

    # --- becoming active ----------------------------------------------------------------------------------------------

    def _deactivate(self) -> None:
        if self._reader is not None:
            abandon(self._reader)
            self._reader = None
            self._log.info("standing by")
        self._transactions.close()
        self.polls.clear()

    def _activate(self) -> MarketAssignment:
        self._transactions.suspect()
        # First of all: it fences the predecessor, and only then it is certain what is committed.
        self._transactions.prepare()
        self._reader = reader = self._cluster.consumer(
            self._group,
            enable_partition_eof=True,
            auto_offset_reset="earliest",
            error_cb=self._transactions.suspect,
        )
        try:
            at = self._found_committed(reader)
            low, high = watermarks(reader, self._marks)
            self._committed, self._committed_at = at, time.monotonic()
            if not low <= at <= high:
                if at >= 0:
                    self._log.warning("the topic no longer has the committed poll", committed=at, start=low, end=high)
                # What happened before is only rebuilt: nobody wants alerts of last week.
                self._log.info("beginning at the last poll", offset=high)
                self._committed = high
                positions = [TopicPartition(*self._marks, high)]
                self._transactions.commit((), positions, reader.consumer_group_metadata())
            begin = day_start(self._cluster, {self._marks: self._committed}, timeout=ASK_SECONDS)[self._marks]
            day = self._day(begin)
        except KafkaException as error:
            raise StreamBroken(error.args[0].str()) from error
        except Unreachable as error:
            raise StreamBroken(str(error)) from error
        self._begin = self._committed
        self._log.info("active", committed=self._committed, day_start=begin, day=str(day))
        return MarketAssignment(
            {self._marks: self._committed}, {self._marks: begin}, day, partial(read_events, self._cluster)
        )

    def _found_committed(self, reader: Client) -> int:
        try:
            with deadline("committed", HANG_SECONDS):
                return int(reader.committed([TopicPartition(*self._marks)], ASK_SECONDS)[0].offset)
        except KafkaException as error:
            # The call times out; that the right on the group is missing is reported by the next poll.
            message = reader.poll(0)
            reported = message.error() if message is not None else None
            refusal = self._cluster.refusal(reported or error.args[0], group=self._group)
            raise refusal or StreamBroken(error.args[0].str()) from error

    def _day(self, begin: int) -> date | None:
        """Return the Tehran date of the last committed poll."""
        start: dict[tuple[str, int], int] = {self._marks: begin}
        end: dict[tuple[str, int], int] = {self._marks: self._committed}
        day: date | None = None
        for record in read(self._cluster, self._marks.topic, start=start, end=end) if begin < self._committed else ():
            with suppress(Undecodable):
                day = self._decoders[self._marks.topic](record.value).requested_at.astimezone(TEHRAN).date()
        return day

    def _go_to(self, reader: Client, begin: int) -> None:
        """Assign all partitions: polls at this offset, trades at the first event that may belong to its poll.

        The ends of trades are asked for first: if no event is as late as the poll, its events come after these ends.
        """
        try:
            trades = self._partitions(reader)
            ends = offsets(self._cluster, dict.fromkeys(trades, LAST), timeout=ASK_SECONDS)
            firsts = offsets(self._cluster, dict.fromkeys(trades, FIRST), timeout=ASK_SECONDS)
            since = self._requested(begin)
            found = dict(ends)
            if since is not None:
                by_time = offsets(self._cluster, dict.fromkeys(trades, max(0, since - SLACK_MS)), timeout=ASK_SECONDS)
                found.update({place: at for place, at in by_time.items() if at >= 0})
        except Unreachable as error:
            raise StreamBroken(str(error)) from error
        self.polls.clear()
        self._ends = {}
        self._position = {self._marks: begin, **{each: max(found[each], firsts[each]) for each in trades}}
        self._assign(reader)
        self._begin, self._refreshed = None, time.monotonic()

    def _requested(self, begin: int) -> int | None:
        """Return when the first poll from an offset on was requested, in milliseconds; None if there is none yet."""
        for record in read(self._cluster, self._marks.topic, start={self._marks: begin}, timeout=ASK_SECONDS):
            try:
                marker = self._decoders[self._marks.topic](record.value)
            except Undecodable:
                continue
            return int(marker.requested_at.timestamp() * 1000)
        return None

    def _assign(self, reader: Client) -> None:
        reader.assign([TopicPartition(*partition, at) for partition, at in self._position.items()])

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, reader: Client, timeout: float) -> None:
        """Read what comes within `timeout` seconds into `polls`."""
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refresh(reader)
        first = reader.poll(timeout)
        messages = [] if first is None else [first, *reader.consume(CHUNK - 1, 0)]
        markers: list[Record] = []
        trades: list[Record] = []
        for message in messages:
            error, partition = message.error(), partition_of(message.topic(), message.partition())
            offset = int(message.offset() or 0)
            if error is None:
                self._position[partition] = offset + 1
                (markers if partition == self._marks else trades).append(record_of(partition, message))
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                self._position[partition] = offset
            elif refusal := self._cluster.refusal(error, topic=message.topic() or "", group=self._group):
                raise refusal
            elif error.fatal():
                raise StreamBroken(error.str())
            else:
                self._log.warning("kafka", error=error.str())
        try:
            self.polls.add_trades(trades)
            self.polls.add_markers(markers)
        except Unreachable as error:  # what was read is read again
            raise StreamBroken(str(error)) from error

    def _refresh(self, reader: Client) -> None:
        """Read partitions that were added to trades, too, from their beginning."""
        self._refreshed = time.monotonic()
        try:
            found = self._partitions(reader)
        except StreamBroken as error:
            self._log.warning("kafka", error=str(error))
            return
        if added := [each for each in found if each not in self._position]:
            self._log.info("partitions were added", partitions=[partition.number for partition in added])
            self._position.update(dict.fromkeys(added, 0))
            self._assign(reader)

    def _partitions(self, reader: Client) -> list[Partition]:
        try:
            with deadline("list_topics", HANG_SECONDS):
                found = reader.list_topics(self._trades, ASK_SECONDS).topics[self._trades].partitions
        except KafkaException as error:
            raise StreamBroken(error.args[0].str()) from error
        return [Partition(self._trades, number) for number in found]

    def _check(self) -> list[Record]:
        """Return the next poll's marker if its events are missing for good: they are nowhere up to the topic's ends."""
        if not len(self.polls) or self._reader is None:
            return []
        if self.polls.to_check(time.monotonic()):
            self._refresh(self._reader)
            trades = [partition for partition in self._position if partition != self._marks]
            try:
                ends = offsets(self._cluster, dict.fromkeys(trades, LAST), pending=True, timeout=ASK_SECONDS)
            except Unreachable as error:
                self._log.warning("kafka", error=str(error))
                return []
            self._ends = {Partition(*place): at for place, at in ends.items()}
            self.polls.checked()
        if not self.polls.is_checked:
            return []
        reached = all(self._position[each] >= end or self.polls.is_past(each) for each, end in self._ends.items())
        return [self.polls.give_up()] if reached else []
