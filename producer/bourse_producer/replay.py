"""`bourse replay`: the events again, from captured bytes, and whether the topics hold exactly these."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec

from bourse_cli.options import cluster_options
from bourse_producer.beats import Beats
from bourse_producer.calendar import Calendar
from bourse_producer.capture import Head, read_capture
from bourse_producer.diff import InstrumentCode
from bourse_producer.markers import COUNTS, History, Poll, Timing, mark
from bourse_producer.responses import PROFILES, Answer, Derived, Reading, derive
from bourse_schemas.errors import ConfigurationError, ExchangeError, Undecodable, UnknownSchema, counted
from bourse_schemas.events import Candle, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TRADES, Topic

SHOWN = 10
# Responses that wait for their poll: a poll that is published again comes after its responses.
KEPT_RESPONSES = 100


class Replay:
    """Derives events from captures; `notes` collects what an operator should know.

    A poll counts if it was published: `committed` are the track ids on the topic, if that is known. Otherwise the next
    record of the capture shows it, and the last poll of a capture counts.
    """

    def __init__(self, committed: set[str] | None = None) -> None:
        self.events: list[TradeEvent] = []
        self.markers: list[PollMarker] = []
        self.polls: set[int] = set()
        self.notes: Counter[str] = Counter()
        self._committed = committed
        self._known: dict[InstrumentCode, Candle] = {}
        self._begun = False
        self._beats, self._history = Beats(), History()

    def capture(self, paths: Sequence[Path]) -> None:
        """Take the files of a capture, oldest first."""
        bodies: dict[str, bytes] = {}
        pending: Sequence[Answer] = ()
        for head, body in (record for path in paths for record in read_capture(path, self.notes)):
            if head.kind == "response":
                bodies[head.track_id] = body
                if len(bodies) > KEPT_RESPONSES:
                    del bodies[next(iter(bodies))]
                continue
            if pending and self._was_published(pending, head):
                self._publish(pending)
            pending = ()
            if head.kind == "poll":
                pending = [(bodies.get(reading.track_id, b""), reading) for reading in head.readings]
            elif head.kind == "state":
                candles = {each.instrument: each for each in msgspec.json.decode(body, type=list[Candle])}
                if self._begun and candles != self._known:
                    self.notes[f"before poll {head.poll_sequence + 1} more is known than was captured"] += 1
                self._known, self._begun = candles, True
        if pending and self._was_published(pending):
            self._publish(pending)

    def day(self, path: Path) -> None:
        """Take a day in the format of the shared data: a line per response, with the rows that changed."""
        calendar = Calendar()
        rows: dict[str, dict[str, Any]] = {}
        try:
            with gzip.open(path) as lines:
                for number, line in enumerate(lines, 1):
                    response = json.loads(line)
                    rows.update((row["TseSymbolCode"], row) for row in response["changed"])
                    at = datetime.fromisoformat(response["received_at"]).astimezone(UTC)
                    whole = sorted(rows.values(), key=lambda row: row["CoID"])
                    body = msgspec.json.encode({"trackId": "replay", "result": whole, "state": "DONE"})
                    reading = Reading(number, at, at, calendar.session_day(at), is_right=False, track_id="replay")
                    self._publish([(body, reading)], marked=False)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is not a captured day, or it is damaged: {error}") from error

    def _was_published(self, answers: Sequence[Answer], following: Head | None = None) -> bool:
        """Return whether a poll was published, by the topic or by the record that follows it in the capture."""
        ids = {reading.track_id for _, reading in answers}
        if self._committed is not None:
            return bool(ids & self._committed)
        if following is not None and following.poll_ids is not None:
            return bool(ids & set(following.poll_ids))
        # Without a restore between them the sequence goes on only after a commit.
        return following is None or following.kind == "state" or following.poll_sequence > answers[0][1].poll_sequence

    def _publish(self, answers: Sequence[Answer], *, marked: bool = True) -> None:
        """Derive a poll's events and marker as the service did, and take its candles for known."""
        try:
            derived = derive(self._known, answers)
        except ExchangeError as error:
            raise ConfigurationError(f"poll {answers[0][1].poll_sequence} cannot be derived again: {error}") from error
        self._known.update((candle.instrument, candle) for candle in derived.changes.candles)
        self.events += derived.changes.events
        self.polls.add(answers[0][1].poll_sequence)
        if marked:
            self._mark(answers, derived)

    def _mark(self, answers: Sequence[Answer], derived: Derived) -> None:
        """Derive a poll's marker, as of a producer with the default interval that asked when the answers arrived."""
        readings = [reading for _, reading in answers]
        at, last = (pick(reading.received_at for reading in readings) for pick in (min, max))
        ids: dict[bool, str | None] = {reading.is_right: reading.track_id for reading in readings}
        poll = Poll(0, at, 0.0, list(answers), ids)
        timing = Timing(self._beats, last, last + timedelta(seconds=self._beats.interval(last)))
        history = replace(self._history, poll_sequence=readings[0].poll_sequence - 1)
        markers, self._history = mark(poll, derived, history, timing, PROFILES[readings[0].profile].source)
        self.markers += markers


def _committed(cluster: Cluster, topic: Topic, event: type[Any]) -> Iterator[tuple[bytes, Any]]:
    from bourse_schemas.reading import read

    name, decode = topic.full_name(cluster.prefix), cluster.registry().deserializer(event)
    for record in read(cluster, name):
        try:
            yield (record.value or b"")[5:], decode(record.value)
        except UnknownSchema as error:
            # Without the polls of a lost schema nothing would be compared, and nothing would differ.
            raise UnknownSchema(f"{name}-{record.place[1]}-{record.offset}: {error}") from error
        except Undecodable as error:
            click.echo(f"{name}-{record.place[1]}-{record.offset}: {error}", err=True)


def _track_ids(cluster: Cluster) -> set[str]:
    markers: Iterable[PollMarker] = (marker for _, marker in _committed(cluster, POLLS, PollMarker))
    return {each for marker in markers for each in (marker.poll_id, marker.rights_poll_id) if each is not None}


def compare(cluster: Cluster, derived: Replay) -> dict[str, int]:
    """Print what differs between the polls derived and the same polls on the topic; return the counts."""
    from bourse_schemas.codec import encoder

    encode = encoder(TradeEvent)
    ours = {event.event_id: event for event in derived.events}
    missing = dict(ours)
    found, extra, different = 0, list[str](), list[str]()
    for payload, event in _committed(cluster, TRADES, TradeEvent):
        if event.poll_sequence not in derived.polls:
            continue
        found += 1
        expected = missing.pop(event.event_id, None)
        if expected is None:
            extra.append(f"{event.event_id}: on the topic, and not derived" + " again" * (event.event_id in ours))
        elif encode(expected) != payload:
            names = [name for name in event.__struct_fields__ if getattr(event, name) != getattr(expected, name)]
            values = [f"{name} is {getattr(event, name)!r}, derived {getattr(expected, name)!r}" for name in names]
            different.append(f"{event.event_id}: {'; '.join(values) or 'its bytes differ'}")
    for message in [*different, *extra, *(f"{each}: derived, and not on the topic" for each in missing)][:SHOWN]:
        click.echo(message, err=True)
    counts = {"different": len(different), "missing": len(missing), "extra": len(extra)}
    return {"derived": len(derived.events), "found": found, "equal": found - len(different) - len(extra), **counts}


@click.command
@click.argument("captures", nargs=-1, required=True, metavar="CAPTURE…", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One event per line, as `bourse tail --json` shows them.")
@click.option("--markers", is_flag=True, help="With --json: also the markers of a capture's polls.")
@click.option("--against", metavar="HOST:PORT", help="Compare with the topics of these brokers.")
@cluster_options
@click.pass_context
def replay(
    ctx: click.Context,
    cluster: Cluster,
    captures: tuple[Path, ...],
    *,
    as_json: bool,
    markers: bool,
    against: str | None,
) -> None:
    """Derive the events again, from a producer's captures or from captured days (*.ndjson.gz).

    The same bytes give the same events. With --against they are compared with the topics; exit 1 if they differ.
    """
    from msgspec.structs import asdict

    from bourse_schemas.codec import to_json

    files = [file for path in captures for file in (sorted(path.glob("capture-*.gz")) if path.is_dir() else [path])]
    if missing := [path for path in files if not path.is_file()]:
        raise ConfigurationError(f"{missing[0]}: no such file")
    if not files:
        raise ConfigurationError(f"{captures[0]} holds no capture-*.gz")
    cluster = replace(cluster, bootstrap_servers=against or cluster.bootstrap_servers)
    derived = Replay(_track_ids(cluster) if against else None)
    days = [file for file in files if file.name.endswith(".ndjson.gz")]
    derived.capture([file for file in files if file not in days])
    for file in days:
        derived.day(file)
    for note in derived.notes:
        click.echo(note, err=True)
    if against:
        counts = compare(cluster, derived)
        click.echo(json.dumps(counts))
        ctx.exit(int(counts["equal"] != counts["derived"] or counts["found"] != counts["derived"]))
    if as_json:
        for event in (*derived.events, *(derived.markers if markers else ())):
            click.echo(to_json(asdict(event)))
        return
    by_day: dict[date, Counter[str]] = {}
    for event in derived.events:
        by_day.setdefault(event.trading_day, Counter())[event.op] += 1
    for day, count in sorted(by_day.items()):
        ops = "  ".join(f"{count[op]:>7,} {op}" for op in COUNTS.values())
        click.echo(f"{day}  {counted(count.total(), 'event'):>15}  {ops}")
    click.echo(f"{counted(len(derived.polls), 'poll')}, {counted(len(derived.events), 'event')}")
