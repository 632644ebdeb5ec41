"""The events on the topics, field for field as in `avro/*.avsc` (which say what each field means).

Prices and values are whole rial, instants are aware datetimes in UTC with millisecond precision, days are Tehran days.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import date, datetime
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

import msgspec

__all__ = [
    "TEHRAN",
    "AlertState",
    "Candle",
    "Change",
    "DeadLetter",
    "Event",
    "FeedState",
    "Op",
    "Outcome",
    "Phase",
    "PollMarker",
    "PriceAlert",
    "Reason",
    "ResolvedBy",
    "Scope",
    "Severity",
    "Stage",
    "TradeEvent",
    "tidy",
]


TEHRAN = ZoneInfo("Asia/Tehran")


class Op(StrEnum):
    """What kind of change a TradeEvent is."""

    OPENED = "OPENED"
    TRADED = "TRADED"
    REVISED = "REVISED"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"


class Outcome(StrEnum):
    """How a poll ended."""

    PUBLISHED = "PUBLISHED"
    UNCHANGED = "UNCHANGED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"
    UNKNOWN = "UNKNOWN"


class Phase(StrEnum):
    """Phase of the trading session, by the calendar."""

    CLOSED = "CLOSED"
    PRE_OPEN = "PRE_OPEN"
    OPEN = "OPEN"
    AFTER_CLOSE = "AFTER_CLOSE"
    UNKNOWN = "UNKNOWN"


class FeedState(StrEnum):
    """How far the feed can be trusted."""

    FRESH = "FRESH"
    STALE = "STALE"
    FROZEN = "FROZEN"
    PARTIAL = "PARTIAL"
    DOWN = "DOWN"
    IDLE = "IDLE"
    UNKNOWN = "UNKNOWN"


class AlertState(StrEnum):
    """Begin or end of an alert's episode."""

    FIRING = "FIRING"
    RESOLVED = "RESOLVED"
    UNKNOWN = "UNKNOWN"


class Severity(StrEnum):
    """How urgent a rule's author finds it."""

    INFO = "INFO"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"
    UNKNOWN = "UNKNOWN"


class Scope(StrEnum):
    """What an alert's rule judges."""

    INSTRUMENT = "INSTRUMENT"
    MARKET = "MARKET"
    FEED = "FEED"
    UNKNOWN = "UNKNOWN"


class ResolvedBy(StrEnum):
    """What ended an alert's episode."""

    CONDITION = "CONDITION"
    DAY_END = "DAY_END"
    RULE_REMOVED = "RULE_REMOVED"
    UNKNOWN = "UNKNOWN"


class Reason(StrEnum):
    """Why a row or record could not be used."""

    MALFORMED_ROW = "MALFORMED_ROW"
    INVALID_VALUE = "INVALID_VALUE"
    FUTURE_ROW = "FUTURE_ROW"
    UNDECODABLE = "UNDECODABLE"
    REJECTED = "REJECTED"
    NOTIFICATION_FAILED = "NOTIFICATION_FAILED"
    UNKNOWN = "UNKNOWN"


class Stage(StrEnum):
    """Where a dead letter was found."""

    PARSE = "PARSE"
    CONSUME = "CONSUME"
    NOTIFY = "NOTIFY"
    UNKNOWN = "UNKNOWN"


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What every record on a topic is: an immutable value."""


class Candle(Event, frozen=True, kw_only=True, gc=False):
    """The trading day's running candle of one instrument."""

    instrument: str
    sequence: int
    trading_day: date
    trading_day_jalali: str | None = None
    traded_at: datetime
    traded_at_estimated: bool
    observed_at: datetime
    poll_sequence: int
    source: str
    company_id: int | None = None
    symbol: str
    symbol_raw: str
    title: str
    is_right: bool
    open_price: int | None = None
    high_price: int | None = None
    low_price: int | None = None
    last_price: int | None = None
    closing_price: int | None = None
    previous_close: int | None = None
    volume: int
    value: int
    trade_count: int
    closing_change: int | None = None
    closing_change_percent: float | None = None
    shares_outstanding: int | None = None
    market_value: int | None = None
    exchange_type: str | None = None


class TradeEvent(Candle, frozen=True, kw_only=True, gc=False):
    """One change of one instrument between two polls: the candle after it, its kind, and the differences."""

    event_id: str
    op: Op
    volume_delta: int
    value_delta: int
    trade_count_delta: int
    last_price_delta: int | None = None
    closing_price_delta: int | None = None


class Change(NamedTuple):
    """What a TradeEvent has beyond the candle after it."""

    event_id: str
    op: Op
    volume_delta: int
    value_delta: int
    trade_count_delta: int
    last_price_delta: int | None
    closing_price_delta: int | None


class PollMarker(Event, frozen=True, kw_only=True, gc=False):
    """One poll of the exchange, good or bad."""

    poll_sequence: int
    simulated: bool
    poll_id: str | None = None
    rights_poll_id: str | None = None
    source: str
    outcome: Outcome
    phase: Phase
    feed_state: FeedState
    session_day: date | None = None
    requested_at: datetime
    received_at: datetime | None = None
    next_poll_at: datetime | None = None
    day_final: bool
    latest_traded_at: datetime | None = None
    rows: int
    opened: int
    traded: int
    revised: int
    cancelled: int
    stale_rows: int
    rejected_rows: int
    duplicate_rows: int
    charged_calls: int
    gap_from: datetime | None = None
    error_kind: str | None = None
    error_code: str | None = None
    error_message: str | None = None

    @property
    def events(self) -> int:
        """Return how many events the poll published."""
        return self.opened + self.traded + self.revised + self.cancelled


class PriceAlert(Event, frozen=True, kw_only=True, gc=False):
    """The begin or end of an alert's episode."""

    alert_id: str
    state: AlertState
    rule: str
    title: str | None = None
    severity: Severity
    scope: Scope
    trading_day: date
    source: str
    instrument: str | None = None
    symbol: str | None = None
    instrument_title: str | None = None
    poll_sequence: int
    when: str
    values: dict[str, float]
    last_price: int | None = None
    traded_at: datetime | None = None
    since: datetime
    raised_at: datetime
    resolved_by: ResolvedBy | None = None
    message: dict[str, str] | None = None
    labels: dict[str, str]
    channels: list[str]


class DeadLetter(Event, frozen=True, kw_only=True, gc=False):
    """A row or record that could not be used, with the reason and the bytes."""

    reason: Reason
    message: str
    stage: Stage
    origin: str
    consumer: str | None = None
    payload: bytes
    original_topic: str | None = None
    original_key: bytes | None = None
    original_partition: int | None = None
    original_offset: int | None = None
    original_headers: dict[str, bytes]
    poll_sequence: int | None = None
    poll_id: str | None = None
    failed_at: datetime


_ZWNJ = "\u200c"
_LETTERS = str.maketrans(
    {"ي": "ی", "ى": "ی", "ك": "ک"} | {chr(zero + digit): str(digit) for zero in (0x0660, 0x06F0) for digit in range(10)}
)


@lru_cache(1 << 16)
def tidy(text: str) -> str:
    """Normalise Persian text as `symbol` and `title` are.

    NFC; ي and ى become ی, ك becomes ک; Arabic and Persian digits become 0-9; invisible marks (category Cf) are removed,
    but for a single ZWNJ between letters; white space becomes single spaces.
    """
    text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    text = "".join(char for char in text if char == _ZWNJ or unicodedata.category(char) != "Cf")
    text = re.sub(f"{_ZWNJ}+", _ZWNJ, text)
    return re.sub(f"{_ZWNJ}?\\s[\\s{_ZWNJ}]*", " ", text).strip(f" {_ZWNJ}")
