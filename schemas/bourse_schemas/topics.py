"""The topics, declared once: what they hold, their keys, partitions, clean-up and retention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

from bourse_schemas.events import Candle, DeadLetter, Event, PollMarker, PriceAlert, TradeEvent

DEFAULT_PREFIX = "bourse"
HOUR_MS, DAY_MS = 3_600_000, 86_400_000


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as declared. `key`, `timestamp` and `identity` derive those of a record from its event.

    `identity` and `cloudevents_type` are None if records have no CloudEvents headers: candles are a table.
    """

    name: str
    event: type[Event]
    key: Callable[[Any], str]
    key_doc: str
    timestamp: Callable[[Any], datetime]
    doc: str
    identity: Callable[[Any], str] | None = None
    cloudevents_type: str | None = None
    partitions: int = 1
    cleanup: Literal["delete", "compact"] = "delete"
    retention_ms: int | None = 30 * DAY_MS

    def settings(self, *, replicas: int, any_time: bool) -> dict[str, str]:
        """Return the topic's settings on a cluster; with `any_time` records may be of any past or future day."""
        settings = {"cleanup.policy": self.cleanup, "min.insync.replicas": "2" if replicas >= 3 else "1"}
        if self.retention_ms is not None:
            settings["retention.ms"] = "-1" if any_time else str(self.retention_ms)
        if self.cleanup == "compact":
            # Only closed segments are compacted, and a restart reads what is left: the shorter, the sooner it is ready.
            settings |= {"segment.ms": str(HOUR_MS), "min.cleanable.dirty.ratio": "0.1"}
        # Event time is the record's time: brokers allow an hour ahead of theirs by default.
        settings["message.timestamp.after.max.ms"] = str(2**63 - 1 if any_time else HOUR_MS)
        return settings

    def full_name(self, prefix: str = DEFAULT_PREFIX) -> str:
        """Name on the cluster, e.g. `bourse.trades`."""
        return f"{prefix}.{self.name}"

    def subject(self, prefix: str = DEFAULT_PREFIX) -> str:
        """Subject of the value's schema in the registry, e.g. `bourse.trades-value`."""
        return f"{self.full_name(prefix)}-value"


def event_id(instrument: str, trading_day: date, sequence: int) -> str:
    """Return the id of a change, e.g. `IRO1MADN0001-20190824-17`: the same change always has the same one."""
    return f"{instrument}-{_compact(trading_day)}-{sequence}"


@lru_cache(64)
def _compact(day: date) -> str:
    return f"{day:%Y%m%d}"


TRADES = Topic(
    name="trades",
    event=TradeEvent,
    key=attrgetter("instrument"),
    key_doc="instrument",
    timestamp=attrgetter("observed_at"),
    identity=attrgetter("event_id"),
    partitions=6,
    doc="every change of every instrument",
    cloudevents_type="ir.bourse.trade.v1",
)
CANDLES = Topic(
    name="candles",
    event=Candle,
    key=attrgetter("instrument"),
    key_doc="instrument",
    timestamp=attrgetter("observed_at"),
    partitions=6,
    cleanup="compact",
    retention_ms=None,
    doc="the day's running candle of every instrument",
)
POLLS = Topic(
    name="polls",
    event=PollMarker,
    key=attrgetter("source"),
    key_doc="source",
    timestamp=lambda marker: marker.received_at or marker.requested_at,
    identity=lambda marker: f"{marker.source}-{marker.poll_sequence}",
    doc="one record per poll, good or bad",
    cloudevents_type="ir.bourse.poll.v1",
)
ALERTS = Topic(
    name="alerts",
    event=PriceAlert,
    key=lambda alert: alert.instrument or alert.source,
    key_doc="instrument, or source for market and feed alerts",
    timestamp=attrgetter("raised_at"),
    identity=lambda alert: f"{alert.alert_id}-{alert.state}",
    doc="alerts raised and resolved",
    cloudevents_type="ir.bourse.alert.v1",
)
DEAD_LETTERS = Topic(
    name="dead-letters",
    event=DeadLetter,
    key=attrgetter("origin"),
    key_doc="origin",
    timestamp=attrgetter("failed_at"),
    doc="rows and records that could not be used, with the reason and the bytes",
)
TOPICS = (TRADES, CANDLES, POLLS, ALERTS, DEAD_LETTERS)


def topic_of(event: type[Event]) -> Topic:
    """Return the topic that holds events of this type."""
    return next(topic for topic in TOPICS if topic.event is event)
