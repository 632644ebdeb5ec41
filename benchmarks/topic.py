"""The topics that readers are timed on: the polls of real days, over and over, each time of other instruments."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import msgspec

from bourse_consumers.alerts.trial import polls_of
from bourse_producer.replay import Replay
from bourse_schemas.codec import Serializer
from bourse_schemas.events import PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TRADES

__all__ = ["days", "events", "fill"]

# Next to the checkout, if it is there: docs/reliability.md.
SHARED = Path(__file__).parents[2] / "shared" / "data" / "day-2019-08-24.ndjson.gz"
# With these there are 5,000 instruments.
COPIES = 9


def days() -> list[Path]:
    """Return the real days there are."""
    with resources.as_file(resources.files("bourse_sandbox") / "data" / "day-2019-08-21.ndjson.gz") as ours:
        return [ours, *([SHARED] if SHARED.exists() else [])]


def events(count: int) -> list[TradeEvent]:
    """Return `count` events in the order of their times; each of COPIES repetitions or more has its own instruments."""
    replay, originals, polls = Replay(), list[TradeEvent](), 0
    for path in days():
        before = len(replay.events)
        replay.day(path)
        # Each day's polls count from one.
        for event in replay.events[before:]:
            originals.append(msgspec.structs.replace(event, poll_sequence=polls + event.poll_sequence))
        polls = originals[-1].poll_sequence
    copies = max(COPIES, -(-count // len(originals)))
    found = [again for number in range(copies) for again in _copy(originals, number)]
    found.sort(key=lambda event: event.observed_at)
    return found[:count]


def _copy(originals: list[TradeEvent], number: int) -> Iterator[TradeEvent]:
    for event in originals:
        code = event.instrument
        code = f"{code[:8]}{chr(ord('A') + number)}{code[9:]}" if number else code
        event_id = f"{code}-{event.trading_day:%Y%m%d}-{event.sequence}"
        yield msgspec.structs.replace(event, instrument=code, event_id=event_id)


def fill(cluster: Cluster, found: list[TradeEvent]) -> None:
    """Publish them as the producer does: each poll a transaction with its marker, partitioned by instrument."""
    registry, prefix = cluster.registry(), cluster.prefix
    trades = Serializer[TradeEvent](TRADES, registry.register(TRADES, prefix), prefix)
    marks = Serializer[PollMarker](POLLS, registry.register(POLLS, prefix), prefix)
    producer = cluster.transactional_producer("benchmark")
    producer.init_transactions(30)
    for marker, events in polls_of(found):
        producer.begin_transaction()
        for record in (*map(trades, events), marks(marker)):
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
        producer.commit_transaction(30)
