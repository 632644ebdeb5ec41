"""Whole polls out of markers and events, and the consumer that hands them on: no broker in here.

`Polls` collects what was read and returns polls in the markers' order as soon as they are complete. `Market` lets a
`MarketConsumer` run on the ordinary runner: its records are the markers of the polls that are whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import (
    Assignment,
    Batch,
    Consumer,
    Day,
    Emit,
    MarketConsumer,
    Rebuild,
    Resume,
    Start,
    WholePoll,
)
from bourse_consumers.records import Partition, Places, Record
from bourse_consumers.runner import dead_letter
from bourse_schemas.errors import Undecodable
from bourse_schemas.events import PollMarker, Reason, TradeEvent
from bourse_schemas.topics import DEAD_LETTERS, POLLS

if TYPE_CHECKING:
    import polars as pl

    from bourse_consumers.columns import Decoded

__all__ = ["Market", "Polls"]

# A poll that waits so long for its events is checked against the ends of the topic.
CHECK_SECONDS = 5.0


class _Piece(NamedTuple):
    """Events of one poll that were read together: these rows of records, and the same by columns."""

    records: Sequence[Record]
    rows: Sequence[int]
    frame: pl.DataFrame


class Polls:
    """Collects markers and trade events; the caller says what time it is.

    Records come in order per partition, but partitions come in any order: events of a poll may be read long after its
    marker, and after markers of later polls.
    """

    def __init__(self, decode: Callable[[Record], Any], columns: Callable[[Places], Decoded | None]) -> None:
        self._decode, self._columns = decode, columns
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.letters: list[tuple[Record, str]] = []
        self._markers: deque[tuple[Record, PollMarker]] = deque()
        self._pieces: dict[int, list[_Piece]] = {}
        self._newest: dict[Partition, int] = {}
        self._ready: dict[int, WholePoll] = {}
        self._taken, self._checked = 0, -1
        self._waiting_since: float | None = None

    def __len__(self) -> int:
        """Return how many markers wait for their events."""
        return len(self._markers)

    def add_markers(self, records: Sequence[Record]) -> None:
        """Add records of the polls topic. Raises Unreachable."""
        self._markers.extend(self._decodable(records))

    def add_trades(self, records: Sequence[Record]) -> None:
        """Add records of the trades topic. Raises Unreachable; then none was added."""
        from bourse_consumers.columns import to_frame

        found = self._columns(Places.of(records)) if records else None
        if found is not None:
            frame = found.frame
        else:
            good = self._decodable(records)
            records, frame = [record for record, _ in good], to_frame([event for _, event in good], TradeEvent)
        rows: dict[int, list[int]] = {}
        sequences = frame["poll_sequence"].to_list()
        for row, (partition, sequence) in enumerate(zip(Places.of(records).partitions, sequences, strict=True)):
            rows.setdefault(sequence, []).append(row)
            self._newest[partition] = max(sequence, self._newest.get(partition, 0))
        for sequence, mine in rows.items():
            if sequence > self._taken:
                piece = _Piece(records, mine, frame if len(rows) == 1 else frame[mine])
                self._pieces.setdefault(sequence, []).append(piece)

    def _decodable(self, records: Sequence[Record]) -> list[tuple[Record, Any]]:
        """Return the records that can be decoded, with their events; the others become dead letters."""
        good = []
        for record in records:
            try:
                good.append((record, self._decode(record)))
            except Undecodable as error:
                self.letters.append((record, str(error)))
        return good

    def ready(self, limit: int) -> list[Record]:
        """Return the markers of the next polls that are complete, in order; `take` returns the polls."""
        found: list[Record] = []
        while self._markers and len(found) < limit and self._missing(self._markers[0][1]) <= 0:
            found.append(self._next(complete=True))
        return found

    def give_up(self) -> Record:
        """Return the marker of the next poll although events are missing."""
        _, marker = self._markers[0]
        get_logger().error("incomplete poll", poll_sequence=marker.poll_sequence, missing=self._missing(marker))
        return self._next(complete=False)

    def to_check(self, now: float) -> bool:
        """Return whether the next poll has waited so long for its events that the topic's ends have to be asked for.

        Then the caller asks, and calls `checked`; polls whose markers were read before need no other check.
        """
        if self._waiting_since is None:
            self._waiting_since = now
        return not self.is_checked and now - self._waiting_since >= CHECK_SECONDS

    def checked(self) -> None:
        """Note that the ends were asked for after all markers here were read."""
        self._checked = self._markers[-1][0].offset

    @property
    def is_checked(self) -> bool:
        """Return whether the ends were asked for after the next poll's marker was read."""
        return self._markers[0][0].offset <= self._checked

    def is_past(self, partition: Partition) -> bool:
        """Return whether an event of a poll after the next one was read from a partition."""
        return self._newest.get(partition, 0) > self._markers[0][1].poll_sequence

    def take(self, offset: int, *, replay: bool) -> WholePoll:
        """Return the poll whose marker has this offset."""
        return replace(self._ready[offset], replay=replay)

    def done(self, offset: int) -> None:
        """Forget the polls up to this offset."""
        self._ready = {at: poll for at, poll in self._ready.items() if at > offset}

    def _missing(self, marker: PollMarker) -> int:
        expected = marker.events
        return expected - sum(len(piece.rows) for piece in self._pieces.get(marker.poll_sequence, ()))

    def _next(self, *, complete: bool) -> Record:
        record, marker = self._markers.popleft()
        pieces = self._pieces.pop(marker.poll_sequence, [])
        self._taken, self._waiting_since = marker.poll_sequence, None
        self._pieces = {sequence: kept for sequence, kept in self._pieces.items() if sequence > marker.poll_sequence}

        def events() -> Sequence[TradeEvent]:
            return [self._decode(piece.records[row]) for piece in pieces for row in piece.rows]

        def frame() -> pl.DataFrame:
            import polars as pl

            from bourse_consumers.columns import to_frame

            return pl.concat([piece.frame for piece in pieces]) if pieces else to_frame((), TradeEvent)

        self._ready[record.offset] = WholePoll(marker, False, complete, events, frame)
        return record


class Market(Consumer):
    """Hands whole polls to a market consumer, each once and in order, also when a batch of markers is retried."""

    topics = (POLLS,)
    batch_size = 50  # polls in one transaction while catching up

    def __init__(self, consumer: MarketConsumer, polls: Polls, name: str) -> None:
        self._consumer, self._polls, self._name = consumer, polls, name
        self.emits = consumer.emits
        self._active = False
        self._next = self._replayed = 0
        self._emits: list[Emit] = []

    def open(self, assigned: Assignment) -> Start:
        """Begin with the trading day under way; a member on standby has no partitions."""
        self._consumer.monitor = self.monitor
        self._active, self._next, self._replayed, self._emits = bool(assigned), 0, 0, []
        if not self._active:
            return Resume()
        self._consumer.open(Day(assigned.read))
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        """Hand on the polls of these markers."""
        for record in batch.records:
            if record.offset >= self._next:
                poll = self._polls.take(record.offset, replay=batch.replay)
                self._emits += self._consumer.process_poll(poll) or ()
                if not poll.complete and not poll.replay and isinstance(self.monitor, Monitor):
                    self.monitor.consumer.incomplete.labels(self._name).inc()
                self._next = record.offset + 1
        self._polls.done(self._next - 1)
        if batch.replay:
            self._replayed, self._emits = batch.records[-1].timestamp, []
            return []
        for record, why in self._polls.letters:
            # Those of polls that are only replayed were published when they were processed.
            if not record.timestamp or record.timestamp > self._replayed:
                letter = dead_letter(record, Reason.UNDECODABLE, why, self._name, datetime.now(UTC))
                self._emits.append(Emit(DEAD_LETTERS, letter))
        self._polls.letters.clear()
        emits, self._emits = self._emits, []
        return emits

    def idle(self, now: datetime) -> Sequence[Emit] | None:
        """Let an active consumer do what is due."""
        return self._consumer.idle(now) if self._active else None

    def trouble(self) -> str | None:
        """Return the consumer's trouble."""
        return self._consumer.trouble()

    def close(self) -> None:
        """Close the consumer."""
        self._consumer.close()
