"""A real day while producers die: exact all the same. And the comparison that says so would notice otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from bourse_schemas.events import Candle, FeedState, Outcome, Phase, PollMarker, TradeEvent
from reliability.chaos import Options, compare, run
from reliability.day import expected_events

Topics = tuple[list[TradeEvent], list[Candle], list[PollMarker]]


@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_ten_kills(kafka: object) -> None:
    """Leaders and standbys killed or frozen, transactions in flight included; a broker restarted; a dripping answer."""
    result = run(Options(kills=10, seed=7))
    assert result["kills"] + result["freezes"] + result["broker_restarts"] + result["drips"] == 10
    assert result["broker_restarts"] >= 1
    assert result["drips"] == 1
    assert result["found"] == result["expected"] >= 19_346
    assert {name: result[name] for name in ("lost", "twice", "wrong", "holes")} == dict.fromkeys(
        ("lost", "twice", "wrong", "holes"), 0
    )
    # Elected within a session's time, initialised, restored; this machine is not always quick.
    assert result["takeover_s"]["count"] >= 1
    assert result["takeover_s"]["max"] < 15
    # The same while the brokers' group forms again after a restart.
    assert result["recovery_s"]["max"] < 60


@pytest.fixture(scope="module")
def day() -> Topics:
    """Return what the topics hold after an undisturbed day."""
    events = expected_events()
    candles = {event.instrument: event for event in events}
    fields = Candle.__struct_fields__
    kept = [Candle(**{name: getattr(event, name) for name in fields}) for event in candles.values()]
    markers = []
    for sequence in sorted({event.poll_sequence for event in events}):
        counts: dict[str, Any] = dict.fromkeys(
            ("rows", "opened", "revised", "cancelled", "stale_rows", "rejected_rows"), 0
        )
        counts |= dict.fromkeys(("duplicate_rows", "charged_calls"), 0)
        markers.append(
            PollMarker(
                poll_sequence=sequence,
                simulated=True,
                source="s",
                outcome=Outcome.PUBLISHED,
                phase=Phase.OPEN,
                feed_state=FeedState.FRESH,
                requested_at=events[0].observed_at,
                day_final=False,
                traded=sum(event.poll_sequence == sequence for event in events),
                **counts,
            )
        )
    return events, kept, markers


def missing(topics: Topics) -> Topics:
    """Lose an event."""
    events, candles, markers = topics
    return events[:500] + events[501:], candles, markers


def doubled(topics: Topics) -> Topics:
    """Have one twice."""
    events, candles, markers = topics
    return [*events, events[7]], candles, markers


def altered(topics: Topics) -> Topics:
    """Have another price."""
    events, candles, markers = topics
    return [structs.replace(events[0], last_price=1), *events[1:]], candles, markers


def foreign(topics: Topics) -> Topics:
    """Have one that nobody expected."""
    events, candles, markers = topics
    return [*events, structs.replace(events[0], event_id="another")], candles, markers


def without_marker(topics: Topics) -> Topics:
    """Have a poll without its marker."""
    events, candles, markers = topics
    return events, candles, [*markers[:3], *markers[4:]]


def old_candle(topics: Topics) -> Topics:
    """Have a candle that is not the last event's."""
    events, candles, markers = topics
    return events, [structs.replace(candles[0], volume=0), *candles[1:]], markers


def no_candle(topics: Topics) -> Topics:
    """Have none of an instrument."""
    events, candles, markers = topics
    return events, candles[1:], markers


def test_an_undisturbed_day_is_right(day: Topics) -> None:
    """Nothing lost, twice, wrong, and no hole."""
    assert compare(day[0], *day) == {
        "expected": 19_346,
        "found": 19_346,
        "lost": 0,
        "twice": 0,
        "wrong": 0,
        "holes": 0,
    }


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        (missing, {"lost", "holes"}),
        (doubled, {"twice", "holes"}),
        (altered, {"wrong"}),
        (foreign, {"wrong", "holes"}),
        (without_marker, {"holes"}),
        (old_candle, {"holes"}),
        (no_candle, {"holes"}),
    ],
)
def test_damage_is_noticed(day: Topics, damage: Callable[[Topics], Topics], noticed: set[str]) -> None:
    """Each kind is counted as what it is."""
    counts = compare(day[0], *damage(day))
    assert {name for name in ("lost", "twice", "wrong", "holes") if counts[name]} == noticed
