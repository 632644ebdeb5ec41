"""Which alerts a channel gets and when, and what is sent at once: pure, time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from enum import StrEnum
from hashlib import sha256

from bourse_consumers.notify import words
from bourse_consumers.notify.words import TEHRAN, Manner, Text
from bourse_schemas.events import AlertState, PriceAlert, Severity

__all__ = ["Kind", "Message", "Policy", "Quiet", "message"]


@dataclass(frozen=True, slots=True)
class Quiet:
    """Hours of each day, in Tehran, in which nothing is sent; `drop` discards what they hold back."""

    start: time
    end: time
    drop: bool = False

    def seconds(self, now: datetime) -> float:
        """Return how long it stays quiet, 0 if it is not; hours may run over midnight."""
        at = now.astimezone(TEHRAN)
        clock = at.time()
        quiet = self.start <= clock < self.end if self.start <= self.end else not self.end <= clock < self.start
        if not quiet:
            return 0.0
        end = at.replace(hour=self.end.hour, minute=self.end.minute, second=0, microsecond=0)
        return ((end if end > at else end + timedelta(days=1)) - at).total_seconds()


@dataclass(frozen=True, slots=True)
class Policy:
    """Which alerts a channel gets, and how they are written.

    It takes alerts whose rules name it (`named`), and those whose rules name no channel there is (`unnamed`), of these
    severities and with these labels (each with one of its values). An alert of an unknown severity is taken.
    """

    name: str
    named: bool = True
    unnamed: bool = False
    severities: frozenset[Severity] = frozenset(Severity)
    labels: Mapping[str, frozenset[str]] = field(default_factory=dict)
    resolved: bool = True
    limit: int = 20
    quiet: Quiet | None = None
    manner: Manner = field(default_factory=Manner)

    def wants(self, alert: PriceAlert, channels: frozenset[str]) -> bool:
        """Return whether the channel gets an alert; `channels` are the names of all."""
        # The end of an alert that holds for one poll only has no message.
        if alert.state is AlertState.RESOLVED and (not self.resolved or alert.message is None):
            return False
        if alert.severity is not Severity.UNKNOWN and alert.severity not in self.severities:
            return False
        if any(alert.labels.get(label) not in values for label, values in self.labels.items()):
            return False
        if self.name in alert.channels:
            return self.named
        return self.unnamed and channels.isdisjoint(alert.channels)


class Kind(StrEnum):
    """What a message holds."""

    ALERTS = "alerts"
    DIGEST = "digest"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent to a channel at once. The same alerts give the same id."""

    kind: Kind
    alerts: Sequence[PriceAlert]
    text: Text

    @property
    def id(self) -> str:
        """Return what distinguishes a repetition from another message."""
        published = sorted(f"{alert.alert_id}-{alert.state}" for alert in self.alerts)
        return sha256("\n".join((self.kind, *published)).encode()).hexdigest()[:32]

    @property
    def severity(self) -> Severity:
        """Return the highest severity among those that fire, INFO where nothing does."""
        firing = [alert.severity for alert in self.alerts if alert.state is not AlertState.RESOLVED]
        return max(firing, key=words.RANKS.__getitem__, default=Severity.INFO)


def message(alerts: Sequence[PriceAlert], manner: Manner, now: datetime, max_age: timedelta | None) -> Message:
    """Return alerts as one message: those of one poll one by one, those of several as a digest, old ones as a count."""
    if max_age is not None and all(now - alert.raised_at > max_age for alert in alerts):
        return Message(Kind.STALE, alerts, words.stale(alerts, manner, max_age))
    if (
        len({(alert.source, alert.poll_sequence, alert.poll_sequence is None and alert.raised_at) for alert in alerts})
        > 1
    ):
        return Message(Kind.DIGEST, alerts, words.digest(alerts, manner))
    return Message(Kind.ALERTS, alerts, words.group(alerts, manner))
