"""Events of a market as tests of readers need them: one of each kind, with what matters to a test replaced."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec

from bourse_schemas.events import (
    AlertState,
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

__all__ = ["AT", "DAY", "SYMBOL", "alert", "event", "letter", "marker"]

DAY = date(2019, 8, 24)
AT = datetime(2019, 8, 24, 5, 0, tzinfo=UTC)  # 09:30 in Tehran, which had summer time then
SYMBOL = "سرمایه\u200cگذاری"


def event(**changes: Any) -> TradeEvent:
    """Return a TradeEvent, up by 2.5 percent."""
    base = TradeEvent(
        event_id="IRO1MADN0001-20190824-1",
        op=Op.TRADED,
        instrument="IRO1MADN0001",
        sequence=1,
        trading_day=DAY,
        traded_at=AT,
        traded_at_estimated=False,
        observed_at=AT,
        poll_sequence=1,
        source="finnotech/trades-realtime",
        symbol=SYMBOL,
        symbol_raw=SYMBOL,
        title=SYMBOL,
        is_right=False,
        open_price=1000,
        last_price=1025,
        previous_close=1000,
        volume=1_234_567,
        value=1_265_431_175,
        trade_count=321,
        volume_delta=1200,
        value_delta=1_230_000,
        trade_count_delta=3,
        last_price_delta=5,
    )
    return msgspec.structs.replace(base, **changes)


def marker(sequence: int, **changes: Any) -> PollMarker:
    """Return the marker of a poll, a minute after the one before it."""
    at = AT + timedelta(minutes=sequence)
    base = PollMarker(
        poll_sequence=sequence,
        source="finnotech/trades-realtime",
        outcome=Outcome.PUBLISHED,
        phase=Phase.OPEN,
        feed_state=FeedState.FRESH,
        session_day=DAY,
        requested_at=at,
        received_at=at,
        next_poll_at=at + timedelta(seconds=60),
        day_final=False,
        rows=500,
        opened=10,
        traded=100,
        revised=2,
        cancelled=1,
        stale_rows=0,
        rejected_rows=0,
        duplicate_rows=0,
        charged_calls=1,
        simulated=False,
    )
    return msgspec.structs.replace(base, **changes)


def alert(**changes: Any) -> PriceAlert:
    """Return a firing alert."""
    base = PriceAlert(
        alert_id="a",
        state=AlertState.FIRING,
        rule="fast",
        severity=Severity.WARNING,
        scope=Scope.INSTRUMENT,
        trading_day=DAY,
        source="finnotech/trades-realtime",
        instrument="IRO1MADN0001",
        symbol=SYMBOL,
        poll_sequence=1,
        when="percent(last_price, 5m) >= 3",
        values={"percent(last_price, 5m)": 3.2},
        last_price=1025,
        since=AT,
        raised_at=AT,
        labels={},
        channels=[],
    )
    return msgspec.structs.replace(base, **changes)


def letter() -> DeadLetter:
    """Return a dead letter."""
    return DeadLetter(
        reason=Reason.INVALID_VALUE,
        message="a price with a fraction",
        stage=Stage.PARSE,
        origin="x",
        payload=b"",
        original_headers={},
        failed_at=AT,
    )
