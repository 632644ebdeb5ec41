"""The events again, from the bytes, and whether the topics hold exactly these."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from bourse_producer import capture
from bourse_producer.calendar import Calendar
from bourse_producer.derive import derive
from bourse_producer.diff import Changes, InstrumentCode
from bourse_producer.freshness import GOOD
from bourse_producer.responses import Reading
from bourse_schemas.codec import encoder
from bourse_schemas.errors import ConfigurationError, ExchangeError
from bourse_schemas.events import Candle, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TRADES

__all__ = ["Replay", "Topics"]

SHOWN_DIFFERENCES = 10
Calls = Sequence[tuple[bytes, Reading]]


class Poll(NamedTuple):
    """A poll as captured: its sequence and what it was made of."""

    sequence: int
    calls: Calls


@dataclass
class Replay:
    """Derives events from captures; `said` collects what an operator should know."""

    markers: dict[int, PollMarker] | None = None
    events: list[TradeEvent] = field(default_factory=list)
    polls: set[int] = field(default_factory=set)
    said: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._known: dict[InstrumentCode, Candle] = {}
        self._begun = False

    def capture(self, paths: Sequence[Path]) -> None:
        """Take the files of a capture, oldest first."""
        bodies: dict[str, bytes] = {}
        pending: Poll | None = None
        for record in (record for path in paths for record in capture.read(path, self.said)):
            head, sequence = record.head, record.head.poll_sequence or 0
            if head.kind == "state":
                candles = record.candles()
                # What was read back afterwards says whether the last poll before was committed.
                if pending is not None and sequence >= pending.sequence:
                    self._settle(pending, candles)
                pending = None
                if self._begun and candles != self._known:
                    self.said[f"before poll {sequence + 1} more is known than was captured"] += 1
                self._known, self._begun = candles, True
            elif head.kind == "response":
                bodies[head.track_id or ""] = record.body
            elif head.kind == "poll":
                if pending is not None and pending.sequence != sequence:
                    self._settle(pending, None)
                calls = [(bodies.pop(context.track_id, b""), context) for context in head.calls]
                pending = Poll(sequence, calls)
                bodies.clear()
            elif head.kind == "committed" and pending is not None and pending.sequence == sequence:
                if head.outcome in GOOD:
                    self._publish(pending)
                pending = None
        if pending is not None:
            self._settle(pending, None)

    def day(self, path: Path) -> None:
        """Take a day in the format of the shared data: a line a response, with the rows that changed."""
        calendar = Calendar()
        rows: dict[str, dict[str, Any]] = {}
        try:
            with gzip.open(path) as lines:
                for number, line in enumerate(lines, 1):
                    said = json.loads(line)
                    rows.update((row["TseSymbolCode"], row) for row in said["changed"])
                    at = datetime.fromisoformat(said["received_at"]).astimezone(UTC)
                    whole = sorted(rows.values(), key=lambda row: row["CoID"])
                    body = msgspec.json.encode({"trackId": "replay", "result": whole, "state": "DONE"})
                    context = Reading(number, at, at, calendar.session_day(at), is_right=False, track_id="replay")
                    self._publish(Poll(number, [(body, context)]))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is not a captured day, or it is damaged: {error}") from error

    def _settle(self, poll: Poll, after: dict[InstrumentCode, Candle] | None) -> None:
        """Decide on a poll whose outcome was not noted: by what was known afterwards, else by the topic's markers."""
        if not poll.calls:
            return
        if after is not None:
            if {**self._known, **_latest(self._derive(poll))} == after:
                self._publish(poll)
        elif self.markers is not None:
            marker = self.markers.get(poll.sequence)
            ids = {context.track_id for _, context in poll.calls}
            if marker is not None and marker.outcome in GOOD and ids & {marker.poll_id, marker.rights_poll_id}:
                self._publish(poll)
        else:
            self.said[f"poll {poll.sequence} is undecided, and left out: --against asks the topic"] += 1

    def _derive(self, poll: Poll) -> Changes:
        try:
            return derive(self._known, poll.calls).changes
        except ExchangeError as error:
            raise ConfigurationError(f"poll {poll.sequence} cannot be derived again: {error}") from error

    def _publish(self, poll: Poll) -> None:
        if poll.calls:
            changes = self._derive(poll)
            self._known.update(_latest(changes))
            self.events += changes.events
        self.polls.add(poll.sequence)


def _latest(changes: Changes) -> dict[InstrumentCode, Candle]:
    return {candle.instrument: candle for candle in changes.candles}


class Topics:
    """What the topics hold of the polls and their events."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.markers = {marker.poll_sequence: marker for _, marker in self._read(POLLS, PollMarker)}

    def _read(self, topic: Any, event: type[Any]) -> Iterator[tuple[bytes, Any]]:
        from bourse_schemas.reading import read

        decode = self._cluster.registry().deserializer(event)
        for record in read(self._cluster, topic.full_name(self._cluster.prefix)):
            if record.value is not None:
                yield record.value[5:], decode(record.value)

    def compare(self, derived: Replay) -> dict[str, int]:
        """Say what differs between the polls derived and the same polls on the topic; return the counts."""
        encode = encoder(TradeEvent)
        ours = {event.event_id: event for event in derived.events}
        counts = Counter(derived=len(derived.events), found=0, equal=0, different=0, missing=0, extra=0)
        seen: Counter[str] = Counter()
        for payload, event in self._read(TRADES, TradeEvent):
            if event.poll_sequence not in derived.polls:
                continue
            counts["found"] += 1
            seen[event.event_id] += 1
            expected = ours.get(event.event_id)
            if expected is None or seen[event.event_id] > 1:
                counts["extra"] += 1
                self._say(
                    counts, f"{event.event_id}: on the topic, and not derived" + " again" * (expected is not None)
                )
            elif encode(expected) == payload:
                counts["equal"] += 1
            else:
                counts["different"] += 1
                names = [name for name in event.__struct_fields__ if getattr(event, name) != getattr(expected, name)]
                for name in names or ["its bytes"]:
                    values = f"{getattr(event, name, '')!r}, derived {getattr(expected, name, '')!r}"
                    self._say(counts, f"{event.event_id}: {name} is {values}")
        for event_id in ours.keys() - seen.keys():
            counts["missing"] += 1
            self._say(counts, f"{event_id}: derived, and not on the topic")
        return dict(counts)

    @staticmethod
    def _say(counts: Counter[str], words: str) -> None:
        if counts["different"] + counts["missing"] + counts["extra"] <= SHOWN_DIFFERENCES:
            click.echo(words, err=True)
