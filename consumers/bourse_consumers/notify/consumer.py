"""The consumer that sends alerts to one channel: in order, every message its own commit, each alert at least once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import Batch, Consumer, Emit, Record, Retry
from bourse_consumers.notify.channels import Channel
from bourse_consumers.notify.policy import Message, message
from bourse_consumers.notify.sending import NotSent
from bourse_schemas.events import DeadLetter, PriceAlert, Reason, Stage
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, Topic

__all__ = ["Notify"]

MINUTE_SECONDS = 60.0


class Notify(Consumer):
    """Sends what is in hand as one message; a group of its own for each channel, so none holds up another."""

    topics: Sequence[Topic] = (ALERTS,)
    from_end = True

    def __init__(
        self,
        name: str,
        channels: Mapping[str, Channel],
        *,
        max_age: timedelta | None = timedelta(hours=1),
        patience: timedelta = timedelta(minutes=15),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._name, self._channel, self._channels = name, channels[name], channels
        self._max_age, self._patience, self._now = max_age, patience.total_seconds(), now
        self._sent: deque[float] = deque(maxlen=self._channel.policy.limit)
        # Since when the message in hand fails.
        self._failing: float | None = None
        self._unknown: set[tuple[str, str]] = set()
        self._log = get_logger(consumer="notify", channel=name)

    def process(self, batch: Batch) -> list[Emit]:
        """Send the alerts that the channel wants. Raises Retry while it is quiet, has its limit or does not answer."""
        policy, names = self._channel.policy, frozenset(self._channels)
        wanted = [
            (record, alert)
            for record, alert in zip(batch.records, batch.events, strict=True)
            if policy.wants(alert, names)
        ]
        self._warn(batch.events)
        if not wanted:
            return []
        now = self._now()
        if policy.quiet is not None and (seconds := policy.quiet.seconds(now)):
            if policy.quiet.drop:
                return []
            raise Retry("the channel has quiet hours", after=seconds)
        if len(self._sent) == policy.limit and (wait := self._sent[0] + MINUTE_SECONDS - time.monotonic()) > 0:
            raise Retry(f"the channel has had {policy.limit} messages in a minute", after=wait)
        return self._send(message([alert for _, alert in wanted], policy.manner, now, self._max_age), wanted)

    def _send(self, text: Message, wanted: Sequence[tuple[Record, PriceAlert]]) -> list[Emit]:
        try:
            self._channel.sender.send(text.text, text)
        except NotSent as error:
            self._count("failed")
            self._failing = self._failing or time.monotonic()
            if not error.permanent and time.monotonic() - self._failing < self._patience:
                raise Retry(str(error)) from error
            self._failing = None
            self._count("given_up")
            self._log.error("given up: dead letters", count=len(wanted), reason=str(error))
            self._fall_back(text)
            return [Emit(DEAD_LETTERS, self._letter(record, str(error))) for record, _ in wanted]
        self._failing = None
        self._sent.append(time.monotonic())
        seconds = (self._now() - text.alerts[0].raised_at).total_seconds()
        self._log.info("sent", kind=text.kind, alerts=len(text.alerts), age_seconds=round(seconds, 2))
        self._count("sent")
        if isinstance(self.monitor, Monitor):
            self.monitor.notify.seconds.labels(self._name).observe(seconds)
        return []

    def _fall_back(self, text: Message) -> None:
        """Send the message to the fallback; if that fails too, only the dead letters have it."""
        other = self._channels.get(self._channel.fallback or "")
        if other is None:
            return
        try:
            other.sender.send(text.text, text)
        except NotSent as error:
            self._log.error("the fallback failed, too", fallback=other.policy.name, error=str(error))

    def _letter(self, record: Record, why: str) -> DeadLetter:
        return DeadLetter(
            reason=Reason.NOTIFICATION_FAILED,
            message=f"channel {self._name}: {why}",
            stage=Stage.NOTIFY,
            origin=record.origin,
            consumer="notify",
            payload=record.value or b"",
            original_topic=record.partition.topic,
            original_key=record.key,
            original_partition=record.partition.number,
            original_offset=record.offset,
            original_headers=dict(record.headers),
            failed_at=self._now().replace(microsecond=0),
        )

    def _warn(self, alerts: Sequence[PriceAlert]) -> None:
        for alert in alerts:
            for name in alert.channels:
                if name not in self._channels and (alert.rule, name) not in self._unknown:
                    self._unknown.add((alert.rule, name))
                    self._log.warning("unknown channel", rule=alert.rule, unknown=name, known=list(self._channels))

    def _count(self, outcome: str) -> None:
        if isinstance(self.monitor, Monitor):
            self.monitor.notify.messages.labels(self._name, outcome).inc()
