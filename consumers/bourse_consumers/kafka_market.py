"""Whole polls from Kafka: one member of the group is active, elected like the producer's leader.

The active member reads all partitions of polls and trades without joining a group, and commits only the polls
partition, always in a transaction. The transactional id is the group: a new active member fences its predecessor and
settles what that left open. The offset is committed for the group, which has no members; the election has a group of
its own. So members that come and go on standby disturb nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaException, TopicPartition

from bourse_consumers.api import Assignment, Decoders, Emit
from bourse_consumers.kafka_stream import KafkaBase
from bourse_consumers.market import Polls
from bourse_consumers.records import Offsets, Partition
from bourse_consumers.runner import Poll, StreamBroken
from bourse_consumers.transactions import ASK_SECONDS
from bourse_schemas.election import Election
from bourse_schemas.errors import Undecodable, Unreachable
from bourse_schemas.kafka import FENCED, Cluster, abandon
from bourse_schemas.reading import LAST, read
from bourse_schemas.topics import POLLS, TRADES, Topic

CHUNK = 2000
# An active member that does not come back to the stream for so long leaves the election.
OWED_SECONDS = 120.0
# Partitions and topics change rarely; the offsets of a group without members expire after seven days.
REFRESH_SECONDS, RECOMMIT_SECONDS = 30.0, 86_400.0
# Clocks are set back by less than this between a request and its events.
SLACK_MS = 60_000


class KafkaMarket(KafkaBase):
    """A member of a market consumer's group, active or on standby; see `bourse_consumers.runner.Stream`.

    Its records are the markers of polls that are whole.
    """

    def __init__(self, cluster: Cluster, group: str, emits: Sequence[Topic]) -> None:
        super().__init__(cluster, group, (TRADES, POLLS), emits, group)
        self._trades, polls = self._reads
        self._marks = Partition(polls, 0)
        self._polls = Polls(self._by_topic, self._marks)
        self.decoders: Decoders = self._polls
        self._election = Election(cluster, f"{group}-election", OWED_SECONDS)
        self._reader: Client | None = None
        self._term: int | None = None
        self._changed = True
        self._position: dict[Partition, int] = {}
        self._committed_at, self._commit_time, self._refreshed = 0, 0.0, time.monotonic()

    def poll(self, timeout: float, limit: int) -> Poll:
        """Return a change of the active member, or the markers of the next whole polls."""
        self._election.owe(0.0)
        term = self._election.term(0.0 if self._changed or self._reader else timeout)
        if self._changed or term != self._term:
            self._deactivate()
            self._term, self._changed = term, False
            return Poll(assigned=Assignment({}) if term is None else self._activate())
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refresh()
        if self._reader is None:
            return Poll()
        self._transactions.poll()
        poll = self._records(self._fetch(self._reader, timeout, CHUNK))
        self._position.update(poll.positions)
        self._polls.add(poll.records)  # if this fails, what was read is read again
        if ready := self._polls.ready(limit) or self._polls.lost(time.monotonic(), self._position, self._trades_ends):
            return Poll(ready, {self._marks: ready[-1].offset + 1})
        if time.monotonic() - self._commit_time > RECOMMIT_SECONDS:
            self.commit((), {self._marks: self._committed_at})
        # Only transaction markers are beyond the last poll.
        return Poll(positions={} if len(self._polls) else {self._marks: self._position[self._marks]})

    def seek(self, offsets: Offsets) -> None:
        """Continue at this marker, and at the first event that may belong to its poll.

        The ends of trades are asked for first: if no event is as late as the poll, its events come after these ends.
        """
        if self._reader is None:
            return
        trades = self._partitions()
        bounds = {partition: self._watermarks(self._reader, partition) for partition in trades}
        since = self._requested(offsets[self._marks])
        found = {} if since is None else self._asked(trades, max(0, since - SLACK_MS))
        self._polls.clear()
        self._position = dict(offsets)
        for partition, (first, end) in bounds.items():
            at = found.get(partition, -1)
            self._position[partition] = max(first, end if at < 0 else at)
        self._assign(self._reader)

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Wait while this member stays active, or on standby."""
        until = time.monotonic() + seconds
        while (goes_on := not stopped() and self._election.term() == self._term) and time.monotonic() < until:
            self._election.owe(0.0)
            time.sleep(max(0.0, min(until - time.monotonic(), 0.1)))
        return goes_on

    def commit(self, emits: Sequence[Emit], offsets: Offsets) -> None:
        """Publish emits and commit the polls, in one transaction; refused if another member is active."""
        if self._reader is None or self._changed or self._election.term() != self._term:
            raise StreamBroken("this member is no longer active")
        reader, at = self._reader, offsets.get(self._marks, self._committed_at)

        def renewed() -> None:
            # A new producer fences a member that was elected meanwhile, if this member does not know yet: then it must
            # not go on with what it has in memory.
            if self._committed_poll(reader) != self._committed_at:
                raise StreamBroken("another member was active meanwhile")

        try:
            positions = [TopicPartition(*self._marks, at)]
            self._transactions.commit(emits, positions, reader.consumer_group_metadata(), renewed)
        except StreamBroken as error:
            cause = error.__cause__
            if isinstance(cause, KafkaException) and cause.args[0].code() in FENCED:
                # It must not own the election's partition without publishing.
                self._election.resign()
            raise
        self._committed_at, self._commit_time = at, time.monotonic()

    def reset(self) -> None:
        """Become active again, with a producer that settles the last transaction."""
        self._changed = True

    def lag(self) -> int:
        """Return how many offsets of the polls topic were not processed; asks the brokers."""
        if self._reader is None:
            return 0
        _, end = self._watermarks(self._reader, self._marks)
        return len(self._polls) + max(0, end - self._position.get(self._marks, self._committed_at))

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
        self._polls.clear()
        self._position = {}

    def _activate(self) -> Assignment:
        # First of all: it fences the predecessor, and only then it is certain what is committed.
        self._transactions.prepare()
        self._reader = reader = self._cluster.consumer(
            self._group,
            enable_partition_eof=True,
            auto_offset_reset="earliest",
            error_cb=self._transactions.suspect,
        )
        at = self._committed_poll(reader)
        low, high = self._watermarks(reader, self._marks)
        if not low <= at <= high:
            if at >= 0:
                self._log.warning("the topic no longer has the committed poll", committed=at, start=low, end=high)
            # What happened before is only rebuilt: nobody wants alerts of last week.
            self._log.info("beginning at the last poll", offset=high)
            at = high
            self._transactions.commit((), [TopicPartition(*self._marks, at)], reader.consumer_group_metadata())
        self._committed_at, self._commit_time = at, time.monotonic()
        self._log.info("active", committed=at)
        return Assignment({self._marks: at}, lambda: self._day_start({self._marks: at}), read=self._read)

    def _committed_poll(self, reader: Client) -> int:
        return self._committed(reader, [self._marks])[self._marks]

    def _requested(self, begin: int) -> int | None:
        """Return when the first poll from an offset on was requested, in milliseconds; None if there is none yet."""
        start: dict[tuple[str, int], int] = {self._marks: begin}
        for record in read(self._cluster, self._marks.topic, start=start, timeout=ASK_SECONDS):
            try:
                return int(self._by_topic[self._marks.topic](record.value).requested_at.timestamp() * 1000)
            except Undecodable:
                continue
        return None

    def _assign(self, reader: Client) -> None:
        reader.assign([TopicPartition(*partition, at) for partition, at in self._position.items()])

    # --- while it runs ------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read partitions that were added to trades, too, from their beginning; on standby find lost topics."""
        self._refreshed = time.monotonic()
        try:
            found = self._partitions()
        except Unreachable as error:
            self._log.warning("kafka", error=str(error))
            return
        added = [each for each in found if each not in self._position]
        if self._reader is not None and self._position and added:
            self._log.info("partitions were added", partitions=[partition.number for partition in added])
            self._position.update(dict.fromkeys(added, 0))
            self._assign(self._reader)

    def _partitions(self) -> list[Partition]:
        """Return the partitions of trades. Raises ConfigurationError if a topic or a right on it is gone."""
        topics = self._cluster.metadata(ASK_SECONDS).topics
        if all(name in topics for name in self._reads):
            return [Partition(self._trades, number) for number in topics[self._trades].partitions]
        return [
            Partition(self._trades, number) for number in range(self._cluster.require_topics(self._reads)[self._trades])
        ]

    def _trades_ends(self) -> Offsets | None:
        """Return where trades end, open transactions included; None if a broker does not answer."""
        self._refresh()
        try:
            return self._asked([each for each in self._position if each != self._marks], LAST, pending=True)
        except Unreachable as error:
            self._log.warning("kafka", error=str(error))
            return None
