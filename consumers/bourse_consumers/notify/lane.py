"""What one channel still has to be told, and what it is told next: pure, time arrives as an argument.

A lane's only memory that matters is how far it is in each partition: the offset of the first alert it still has to
tell. Alerts therefore leave it in the order of their partition, and nothing is ever told out of turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple

from bourse_consumers.api import Offsets, Partition, Record
from bourse_consumers.notify import words
from bourse_consumers.notify.words import TEHRAN, Manner, Text
from bourse_schemas.events import AlertState, PriceAlert, Severity

__all__ = ["Entry", "Kind", "Lane", "Message", "Policy", "Quiet"]

# How long the rest of a poll's alerts is waited for after each (they come in one transaction, or in a few right after
# another, from several partitions), and how long after the first at most.
LINGER, PATIENCE = timedelta(seconds=0.25), timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Quiet:
    """Hours of each day, in Tehran, in which nothing is sent; `drop` says whether it is sent afterwards."""

    start: time
    end: time
    drop: bool = False

    def holds(self, now: datetime) -> bool:
        """Tell whether it is quiet; hours may run over midnight."""
        at = now.astimezone(TEHRAN).time()
        if self.start <= self.end:
            return self.start <= at < self.end
        return at >= self.start or at < self.end


@dataclass(frozen=True, slots=True)
class Policy:
    """What a channel is told, and how.

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
        """Tell whether the channel is to be told; `channels` are all there are."""
        if alert.state is AlertState.RESOLVED and not self.resolved:
            return False
        if alert.severity is not Severity.UNKNOWN and alert.severity not in self.severities:
            return False
        if any(alert.labels.get(label) not in values for label, values in self.labels.items()):
            return False
        if self.name in alert.channels:
            return self.named
        return self.unnamed and channels.isdisjoint(alert.channels)


class Kind(StrEnum):
    """What a message is about."""

    ALERTS = "alerts"
    DIGEST = "digest"
    STALE = "stale"


class Entry(NamedTuple):
    """An alert that a channel has yet to be told, and when it was read."""

    record: Record
    alert: PriceAlert
    seen: datetime
    stale: bool


@dataclass(frozen=True, slots=True)
class Message:
    """What is handed to a channel at once. The same alerts give the same id."""

    kind: Kind
    entries: Sequence[Entry]
    text: Text

    @property
    def alerts(self) -> list[PriceAlert]:
        """Return its alerts, in the order in which they were read."""
        return [entry.alert for entry in self.entries]

    @property
    def id(self) -> str:
        """Return what tells a repetition from another message."""
        told = sorted(f"{alert.alert_id}-{alert.state}" for alert in self.alerts)
        return sha256("\n".join((self.kind, *told)).encode()).hexdigest()[:32]

    @property
    def severity(self) -> Severity:
        """Return the highest severity among those that fire, INFO where nothing does."""
        firing = [alert.severity for alert in self.alerts if alert.state is not AlertState.RESOLVED]
        return max(firing, key=words.RANKS.__getitem__, default=Severity.INFO)


class Lane:
    """One channel's alerts in turn. `start` says, per partition, from which offset on it has to be told."""

    def __init__(self, policy: Policy, channels: frozenset[str], start: Offsets, max_age: timedelta | None) -> None:
        self._policy, self._channels, self._max_age = policy, channels, max_age
        self._next = dict(start)
        self._pending: list[Entry] = []
        self._sent: list[datetime] = []
        self._in_hand: Message | None = None
        # Alerts had to wait: what has piled up is told in one digest. So is what a lane finds at its start: what was in
        # hand when its predecessor died then comes again in one message, whatever came after it.
        self._behind = True

    def take(self, record: Record, alert: PriceAlert, now: datetime) -> None:
        """Take a record that was read; what the channel has been told before, or does not want, is passed over."""
        if record.offset < self._next[record.partition]:
            return
        self._next[record.partition] = record.offset + 1
        if self._policy.wants(alert, self._channels):
            stale = self._max_age is not None and now - alert.raised_at > self._max_age
            self._pending.append(Entry(record, alert, now, stale))

    def progress(self) -> dict[Partition, int]:
        """Return, per partition, the offset below which the channel has been told everything."""
        first = dict(self._next)
        for entry in reversed(self._pending):
            first[entry.record.partition] = entry.record.offset
        return first

    def due(self, now: datetime) -> Message | None:
        """Return what is to be sent now; it stays in hand until `done`."""
        if self._in_hand is not None or not self._pending:
            return None
        quiet = self._policy.quiet
        if quiet is not None and quiet.holds(now):
            if quiet.drop:
                self._pending.clear()
            self._behind = bool(self._pending)
            return None
        self._sent = [at for at in self._sent if now - at < MINUTE]
        first = self._pending[0]
        if len(self._sent) >= self._policy.limit:
            self._behind = True
            return None
        if first.stale:
            chosen, kind = self._in_turn(lambda entry: entry.stale), Kind.STALE
        elif self._behind:
            chosen = self._in_turn(lambda entry: not entry.stale)
            kind = Kind.DIGEST if len({_poll(entry.alert) for entry in chosen}) > 1 else Kind.ALERTS
        else:
            poll = _poll(first.alert)
            chosen, kind = self._in_turn(lambda entry: not entry.stale and _poll(entry.alert) == poll), Kind.ALERTS
        waited = now - chosen[-1].seen >= LINGER
        # A backlog of old ones is read to its end before it is summed up.
        if not waited and (kind is Kind.STALE or now - first.seen < PATIENCE):
            return None
        self._behind = self._behind and kind is Kind.STALE
        self._sent.append(now)
        self._in_hand = Message(kind, tuple(chosen), self._text(kind, [entry.alert for entry in chosen]))
        return self._in_hand

    def done(self, *, late: bool = False) -> None:
        """Let go of what was in hand: the channel has it, or never will. Where it came `late` others had to wait."""
        if self._in_hand is None:
            raise RuntimeError("nothing is in hand")
        told = {(entry.record.partition, entry.record.offset) for entry in self._in_hand.entries}
        self._pending = [each for each in self._pending if (each.record.partition, each.record.offset) not in told]
        self._in_hand = None
        self._behind = (self._behind or late) and bool(self._pending)

    def _in_turn(self, fits: Callable[[Entry], bool]) -> list[Entry]:
        """Return the entries that fit and before which, in their partition, no other waits."""
        chosen, blocked = [], set[Partition]()
        for entry in self._pending:
            if entry.record.partition not in blocked:
                if fits(entry):
                    chosen.append(entry)
                else:
                    blocked.add(entry.record.partition)
        return chosen

    def _text(self, kind: Kind, alerts: Sequence[PriceAlert]) -> Text:
        manner = self._policy.manner
        if kind is Kind.STALE and self._max_age is not None:
            return words.stale(alerts, manner, self._max_age)
        return words.digest(alerts, manner) if kind is Kind.DIGEST else words.group(alerts, manner)


def _poll(alert: PriceAlert) -> Hashable:
    """Return what alerts of one poll have in common; those of none stand together with what was raised with them."""
    return alert.source, alert.raised_at if alert.poll_sequence is None else alert.poll_sequence
