"""Whole polls out of markers and events, and the consumer that hands them on: no broker in here.

`Polls` collects what was read and returns the markers of polls, in order, as soon as these are complete. To the runner
they are records, and a marker's event is its whole poll. So `Market` runs a `MarketConsumer` on the ordinary runner.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from bourse_cli.health import ConsumerMetrics
from bourse_cli.logs import get_logger
from bourse_consumers.api import (
    Assignment,
    Batch,
    Consumer,
    Day,
    Decoders,
    Emit,
    MarketConsumer,
    Rebuild,
    Resume,
    Start,
    WholePoll,
)
from bourse_consumers.records import Offsets, Partition, Places, Record, dead_letter
from bourse_schemas.codec import Deserializer
from bourse_schemas.errors import Undecodable
from bourse_schemas.events import PollMarker, Reason, TradeEvent
from bourse_schemas.topics import DEAD_LETTERS, POLLS

if TYPE_CHECKING:
    import polars as pl

# A poll that waits so long for its events is checked against the ends of the topic.
CHECK_SECONDS = 5.0


class _Piece(NamedTuple):
    """Events of one poll that were read together: these rows of records, and the same by columns."""

    records: Sequence[Record]
    rows: Sequence[int]
    frame: pl.DataFrame


class Polls(Decoders):
    """Collects markers and trade events; the caller gives the time.

    Records come in order per partition, but partitions come in any order: events of a poll may be read long after its
    marker, and after markers of later polls.
    """

    def __init__(self, by_topic: Mapping[str, Deserializer[Any]], marks: Partition) -> None:
        super().__init__(by_topic)
        self._marks = marks
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._markers: deque[tuple[Record, PollMarker]] = deque()
        self._pieces: defaultdict[int, list[_Piece]] = defaultdict(list)
        self._bad: list[tuple[Record, str]] = []
        self._newest: dict[Partition, int] = {}
        self._ready: dict[int, WholePoll] = {}
        self._taken, self._checked = 0, -1
        self._ends: Offsets | None = None
        self._waiting_since: float | None = None

    def __len__(self) -> int:
        """Return how many markers wait for their events."""
        return len(self._markers)

    def event(self, record: Record) -> WholePoll:
        """Return, once, the poll whose marker this record is."""
        return self._ready.pop(record.offset)

    def add(self, records: Sequence[Record]) -> None:
        """Add records of both topics. Raises Unreachable; then what was read has to be read again."""
        trades, markers = records, list[Record]()
        if self._marks in Places.of(records).partitions:  # otherwise the records need not be made
            markers = [record for record in records if record.partition == self._marks]
            trades = [record for record in records if record.partition != self._marks]
        self._markers.extend(self._decodable(markers))
        if trades:
            self._add_trades(trades)

    def _add_trades(self, records: Sequence[Record]) -> None:
        from bourse_consumers.columns import to_frame

        frame = self.frame(Places.of(records))
        if frame is None:
            good = self._decodable(records)
            records, frame = [record for record, _ in good], to_frame([event for _, event in good], TradeEvent)
        rows = defaultdict[int, list[int]](list)
        sequences = frame["poll_sequence"].to_list()
        for row, (partition, sequence) in enumerate(zip(Places.of(records).partitions, sequences, strict=True)):
            rows[sequence].append(row)
            self._newest[partition] = max(sequence, self._newest.get(partition, 0))
        for sequence, mine in rows.items():
            if sequence > self._taken:
                self._pieces[sequence].append(_Piece(records, mine, frame if len(rows) == 1 else frame[mine]))

    def _decodable(self, records: Sequence[Record]) -> list[tuple[Record, Any]]:
        """Return the records that can be decoded, with their events; the others become dead letters."""
        good = []
        for record in records:
            try:
                good.append((record, super().event(record)))
            except Undecodable as error:
                self._bad.append((record, str(error)))
        return good

    def ready(self, limit: int) -> list[Record]:
        """Return the markers of the next polls that are complete."""
        found: list[Record] = []
        while self._markers and len(found) < limit and self._missing(self._markers[0][1]) <= 0:
            found.append(self._next(complete=True))
        return found

    def lost(self, now: float, positions: Offsets, ends: Callable[[], Offsets | None]) -> list[Record]:
        """Return the next poll's marker if its events are missing for good: they are nowhere up to the topic's ends.

        A poll that waits for long is checked: `ends` is asked where the trades end, once for all polls whose markers
        were read before. `now` is in seconds, `positions` is how far the topics were read.
        """
        if not self._markers:
            return []
        record, marker = self._markers[0]
        if self._waiting_since is None:
            self._waiting_since = now
        if record.offset > self._checked and now - self._waiting_since >= CHECK_SECONDS:
            self._ends = ends()
            if self._ends is not None:
                self._checked = self._markers[-1][0].offset
        if self._ends is None or record.offset > self._checked:
            return []
        # A partition with an event of a later poll has no more of this one.
        if any(
            positions[at] < end and self._newest.get(at, 0) <= marker.poll_sequence for at, end in self._ends.items()
        ):
            return []
        get_logger().error("incomplete poll", poll_sequence=marker.poll_sequence, missing=self._missing(marker))
        return [self._next(complete=False)]

    def _missing(self, marker: PollMarker) -> int:
        return marker.events - sum(len(piece.rows) for piece in self._pieces.get(marker.poll_sequence, ()))

    def _next(self, *, complete: bool) -> Record:
        record, marker = self._markers.popleft()
        self._taken, self._waiting_since = marker.poll_sequence, None
        pieces = self._pieces.get(self._taken, [])
        for sequence in [each for each in self._pieces if each <= self._taken]:
            del self._pieces[sequence]
        bad, self._bad = self._bad, []

        def events() -> Sequence[TradeEvent]:
            return [super(Polls, self).event(piece.records[row]) for piece in pieces for row in piece.rows]

        def frame() -> pl.DataFrame:
            import polars as pl

            from bourse_consumers.columns import to_frame

            return pl.concat([piece.frame for piece in pieces]) if pieces else to_frame((), TradeEvent)

        self._ready[record.offset] = WholePoll(marker, False, complete, bad, events, frame)
        return record


class Market(Consumer):
    """Hands whole polls to a market consumer, each once and in order, also when a batch of markers is retried."""

    topics = (POLLS,)
    batch_size = 50  # polls in one transaction while catching up

    def __init__(self, consumer: MarketConsumer, name: str, metrics: ConsumerMetrics) -> None:
        self._consumer, self._name, self._metrics = consumer, name, metrics
        self.trouble, self.close = consumer.trouble, consumer.close  # type: ignore[method-assign]  # handed on
        self._active = False
        self._emits: list[Emit] = []
        self._bad: list[tuple[Record, str]] = []
        # The offset of the last poll that was handed on.
        self._done = -1

    def open(self, assigned: Assignment) -> Start:
        """Begin with the trading day under way; a member on standby has no partitions."""
        self._active, self._done, self._emits, self._bad = bool(assigned), -1, [], []
        if not self._active:
            return Resume()
        self._consumer.open(Day(assigned.read))
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        """Hand on the polls of these markers."""
        for record, each in zip(batch.records, batch.events, strict=True):
            if record.offset > self._done:
                poll = replace(each, replay=batch.replay)
                self._emits += self._consumer.process_poll(poll) or ()
                self._metrics.incomplete.labels(self._name).inc(not (poll.complete or poll.replay))
                self._bad += poll.undecodable
                if poll.replay:  # those of its time were published when it was processed
                    self._bad = [(bad, why) for bad, why in self._bad if bad.timestamp > record.timestamp]
                self._done = record.offset
        emits, self._emits = self._emits, []
        if not batch.replay:
            now = datetime.now(UTC)
            letters = [dead_letter(bad, Reason.UNDECODABLE, why, self._name, now) for bad, why in self._bad]
            emits += [Emit(DEAD_LETTERS, letter) for letter in letters]
            self._bad = []
        return emits

    def idle(self, now: datetime) -> Sequence[Emit] | None:
        """Let an active consumer do what is due."""
        return self._consumer.idle(now) if self._active else None
