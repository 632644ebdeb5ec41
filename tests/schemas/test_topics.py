"""What the declared topics derive from events: names, keys, ids, timestamps."""

from __future__ import annotations

from datetime import UTC, date, datetime

import msgspec
import pytest

from bourse_schemas.events import (
    AlertState,
    Candle,
    DeadLetter,
    FeedState,
    Op,
    Outcome,
    Phase,
    PollMarker,
    PriceAlert,
    Reason,
    Scope,
    Severity,
    Stage,
    TradeEvent,
)
from bourse_schemas.topics import ALERTS, CANDLES, DEAD_LETTERS, POLLS, TOPICS, TRADES, Topic, event_id, topic_of

AT = datetime(2019, 8, 24, 6, 30, 0, 123_000, UTC)
LATER = datetime(2019, 8, 24, 6, 30, 1, 0, UTC)
CANDLE = Candle(
    instrument="IRO1MADN0001",
    sequence=17,
    trading_day=date(2019, 8, 24),
    traded_at=AT,
    traded_at_estimated=False,
    observed_at=LATER,
    poll_sequence=3,
    source="finnotech/trades-realtime",
    symbol="ومعادن",
    symbol_raw="ومعادن",
    title="توسعه معادن",
    is_right=False,
    volume=1,
    value=2,
    trade_count=3,
)
MARKER = PollMarker(
    poll_sequence=3,
    source="finnotech/trades-realtime",
    outcome=Outcome.FAILED,
    phase=Phase.OPEN,
    feed_state=FeedState.DOWN,
    requested_at=AT,
    day_final=False,
    rows=0,
    opened=0,
    traded=0,
    revised=0,
    cancelled=0,
    stale_rows=0,
    rejected_rows=0,
    duplicate_rows=0,
    charged_calls=1,
    simulated=False,
)
ALERT = PriceAlert(
    alert_id="a1",
    state=AlertState.FIRING,
    rule="r",
    severity=Severity.INFO,
    scope=Scope.FEED,
    trading_day=date(2019, 8, 24),
    source="finnotech/trades-realtime",
    poll_sequence=1,
    when="c",
    values={},
    since=AT,
    raised_at=LATER,
    labels={},
    channels=[],
)
LETTER = DeadLetter(
    reason=Reason.REJECTED,
    message="m",
    stage=Stage.CONSUME,
    origin="bourse.trades-0-17",
    payload=b"x",
    original_headers={},
    failed_at=AT,
)


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
    trade = msgspec.convert(
        {
            **msgspec.structs.asdict(CANDLE),
            "event_id": "IRO1MADN0001-20190824-17",
            "op": Op.TRADED,
            "volume_delta": 1,
            "value_delta": 2,
            "trade_count_delta": 3,
        },
        TradeEvent,
    )
    assert _derived(TRADES, trade) == ("IRO1MADN0001", "IRO1MADN0001-20190824-17", LATER)
    assert _derived(CANDLES, CANDLE) == ("IRO1MADN0001", None, LATER)
    assert _derived(POLLS, MARKER) == (MARKER.source, "finnotech/trades-realtime-3", AT)
    assert _derived(POLLS, msgspec.structs.replace(MARKER, received_at=LATER))[2] == LATER
    assert _derived(ALERTS, ALERT) == (ALERT.source, "a1-FIRING", LATER)
    assert _derived(ALERTS, msgspec.structs.replace(ALERT, instrument="I"))[0] == "I"
    assert _derived(DEAD_LETTERS, LETTER) == (LETTER.origin, None, AT)


def _derived(topic: Topic, event: object) -> tuple[str, str | None, datetime]:
    return topic.key(event), topic.identity and topic.identity(event), topic.timestamp(event)


@pytest.mark.parametrize(("replicas", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (4, "2")])
def test_settings(replicas: int, in_sync: str) -> None:
    """Three replicas lose one and go on; retention is 30 days, or none where records are of any time."""
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
