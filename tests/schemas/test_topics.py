"""What the declared topics derive from events: names, keys, ids, timestamps."""

from __future__ import annotations

from datetime import date, datetime, timedelta

import msgspec
import pytest

from bourse_schemas.topics import ALERTS, CANDLES, DEAD_LETTERS, POLLS, TOPICS, TRADES, Topic, event_id, topic_of
from tests.samples import AT, alert, event, letter, marker

LATER = AT + timedelta(seconds=1)


def test_names_and_subjects() -> None:
    """As the contract's table has them; the prefix is the operator's."""
    assert [topic.full_name() for topic in TOPICS] == [
        "bourse.trades",
        "bourse.candles",
        "bourse.polls",
        "bourse.alerts",
        "bourse.dead-letters",
    ]
    assert [topic.partitions for topic in TOPICS] == [6, 6, 1, 1, 1]
    assert [topic.cleanup for topic in TOPICS] == ["delete", "compact", "delete", "delete", "delete"]
    assert TRADES.subject("tehran") == "tehran.trades-value"
    assert [topic_of(topic.event) for topic in TOPICS] == list(TOPICS)
    assert event_id("IRO1MADN0001", date(2019, 8, 4), 17) == "IRO1MADN0001-20190804-17"


def test_keys_ids_and_timestamps_come_from_the_event() -> None:
    """The same fact has the same id; the record's time is the event's."""
    trade = event(event_id="IRO1MADN0001-20190824-17", observed_at=LATER)
    assert _derived(TRADES, trade) == ("IRO1MADN0001", "IRO1MADN0001-20190824-17", LATER)
    assert _derived(CANDLES, trade) == ("IRO1MADN0001", None, LATER)
    failed = marker(3, requested_at=AT, received_at=None)
    assert _derived(POLLS, failed) == (failed.source, "finnotech/trades-realtime-3", AT)
    assert _derived(POLLS, msgspec.structs.replace(failed, received_at=LATER))[2] == LATER
    feed = alert(alert_id="a1", instrument=None, raised_at=LATER)
    assert _derived(ALERTS, feed) == (feed.source, "a1-FIRING", LATER)
    assert _derived(ALERTS, msgspec.structs.replace(feed, instrument="I"))[0] == "I"
    assert _derived(DEAD_LETTERS, letter()) == (letter().origin, None, AT)


def _derived(topic: Topic, event: object) -> tuple[str, str | None, datetime]:
    return topic.key(event), topic.identity and topic.identity(event), topic.timestamp(event)


@pytest.mark.parametrize(("replicas", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (4, "2")])
def test_settings(replicas: int, in_sync: str) -> None:
    """Three replicas lose one and go on; retention is 30 days, or none if records are of any time."""
    month = str(30 * 24 * 3600 * 1000)
    assert TRADES.settings(replicas=replicas, any_time=False) == {
        "cleanup.policy": "delete",
        "min.insync.replicas": in_sync,
        "retention.ms": month,
        "message.timestamp.after.max.ms": "3600000",
    }
    at_any_time = TRADES.settings(replicas=replicas, any_time=True)
    assert (at_any_time["retention.ms"], at_any_time["message.timestamp.after.max.ms"]) == ("-1", str(2**63 - 1))
    assert CANDLES.settings(replicas=replicas, any_time=True)["cleanup.policy"] == "compact"
    assert "retention.ms" not in CANDLES.settings(replicas=replicas, any_time=False)
