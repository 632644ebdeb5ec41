"""The consumers that send alerts to one channel: every message is its own commit, each alert arrives at least once."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Rebuild, Record, Reopen, Retry, Start
from bourse_consumers.notify.channels import Channel, NotSent, Refused, Unacceptable
from bourse_consumers.notify.words import Writer, example
from bourse_consumers.records import dead_letter
from bourse_schemas.events import AlertState, PriceAlert, Reason, ResolvedBy, Stage
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, Topic

# How long a stop waits for the answer to the message in hand.
STOP_SECONDS = 1.0


class Notify(Consumer):
    """Sends the alerts in hand as one message. Each channel has a group of its own, so none holds up another."""

    topics: Sequence[Topic] = (ALERTS,)

    def __init__(
        self, name: str, channels: Mapping[str, Channel], *, max_age: timedelta = timedelta.max,
        give_up: timedelta = timedelta(minutes=15), from_start: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self.from_end = not from_start
        self._name, self._channel, self._channels = name, channels[name], channels
        self._sender = self._channel.sender
        self._max_age, self._give_up, self._now = max_age, give_up.total_seconds(), now
        self._writer = Writer(self._channel.language)
        # The records in hand, and the parts of their message that are not delivered once one of them is.
        self._hand: Sequence[str] = ()
        self._left: Sequence[Any] = ()
        self._failing: float | None = None
        self._waited = False
        self._log = get_logger(consumer="notify", channel=name)

    def process(self, batch: Batch) -> list[Emit]:
        """Send the alerts that the channel gets. Raises Retry outside its hours and while it does not accept them."""
        pairs = zip(batch.records, batch.events, strict=True)
        wanted = [(record, alert) for record, alert in pairs if self._wants(alert)]
        if not wanted:
            return []
        if seconds := self._channel.wait(self._now()):
            self._waited = True
            raise Retry("outside the active hours", after=seconds, fault=False)
        if self._waited:
            self._waited = False
            raise Reopen("the active hours begin", fault=False)  # all that has come meanwhile becomes one message
        alerts = [alert for _, alert in wanted]
        try:
            self._deliver(alerts, [record.origin for record, _ in wanted])
        except NotSent as error:
            return self._refused(wanted, error)
        self._failing = None
        age = (self._now() - alerts[0].raised_at).total_seconds()
        self._log.info("sent", alerts=len(alerts), age_seconds=round(age, 2))
        self._count("sent")
        if isinstance(self.monitor, Monitor):
            self.monitor.notify.seconds.labels(self._name).observe(age)
        return []

    def test(self) -> str:
        """Send a sample and return its text. Raises NotSent."""
        alert = example(self._now())
        try:
            self._deliver([alert])
        except NotSent as error:
            raise NotSent(f"channel {self._name}: {error}") from error
        finally:
            self.close()
        return f"{self._writer.title(alert)}\n{self._writer.text(alert)}"

    def close(self) -> None:
        """Release the way to the channel."""
        self._sender.close()

    def _wants(self, alert: PriceAlert) -> bool:
        """Return whether there is a message about it: not about the day's end, nor the end of a single moment."""
        ended = alert.state is AlertState.RESOLVED
        silent = not self._channel.resolved or alert.message is None or alert.resolved_by is ResolvedBy.DAY_END
        return not (ended and silent) and self._channel.selects(self._name, alert, self._channels)

    def _deliver(self, alerts: Sequence[PriceAlert], hand: Sequence[str] = ()) -> None:
        # Until a part is delivered the message is written again, with the age that its alerts have by then.
        left = self._left if hand == self._hand and self._left else self._parts(self._channel, alerts)
        self._hand, self._left = hand, ()
        while left:
            self._call(self._sender.send, left[0])
            left = self._left = left[1:]

    def _call(self, send: Callable[..., None], *args: Any) -> None:
        """Call what may take long, in a thread that a stop does not wait for. Raises NotSent."""
        done, left = Future[None](), STOP_SECONDS

        def work() -> None:
            try:
                send(*args)
                done.set_result(None)
            except Exception as error:  # raised in the other thread
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        while not wait([done], 0.1).done:
            if self.stopped() and (left := left - 0.1) < 0:
                raise Retry("the channel does not answer, and the process has to end")
        done.result()

    def _parts(self, channel: Channel, alerts: Sequence[PriceAlert]) -> Any:
        message = Writer(channel.language).message(alerts, self._now(), channel.digest_above, self._max_age)
        return channel.sender.parts(message)

    def _refused(self, wanted: Sequence[tuple[Record, PriceAlert]], error: NotSent) -> list[Emit]:
        """Raise Retry if the failure may pass; else send the alerts to the fallback, and return their dead letters."""
        self._count("failed")
        self._failing = self._failing or time.monotonic()
        if not isinstance(error, Refused) and time.monotonic() - self._failing < self._give_up:
            raise Retry(str(error)) from error
        self._failing, self._left = None, ()
        self._count("given_up")
        alerts = [alert for _, alert in wanted]
        fallback = self._channel.fallback
        self._log.error("given up: dead letters", alerts=len(alerts), fallback=fallback, error=str(error))
        if fallback not in {None, self._name}:
            try:
                for part in self._parts(self._channels[fallback], alerts):
                    self._call(self._channels[fallback].sender.send, part)
            except NotSent as failure:
                self._log.error("the fallback failed, too", fallback=fallback, error=str(failure))
        why, at = f"channel {self._name}: {error}", self._now()
        letters = [dead_letter(record, Reason.NOTIFICATION_FAILED, why, "notify", at) for record, _ in wanted]
        return [Emit(DEAD_LETTERS, replace(letter, stage=Stage.NOTIFY)) for letter in letters]

    def _count(self, outcome: str) -> None:
        if isinstance(self.monitor, Monitor):
            self.monitor.notify.messages.labels(self._name, outcome).inc()


class Alertmanager(Notify):
    """Posts all open alerts again and again: Alertmanager ends an alert that nobody posts."""

    interval = 60.0
    keep = timedelta(minutes=5)

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # The open alerts, and which of them Alertmanager has accepted since the start.
        self._open: dict[str, PriceAlert] = {}
        self._accepted: set[str] = set()
        self._due = 0.0
        self._unposted: str | None = None

    def open(self, assigned: Assignment) -> Start:
        """Begin with the day's first alert, to know which ones are open."""
        self._open, self._accepted, self._due, self._unposted = {}, set(), 0.0, None
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        """Post what changed."""
        if not batch.replay:
            return super().process(batch)
        self._fold([alert for alert in batch.events if self._wants(alert)])
        return []

    def idle(self, now: datetime) -> None:
        """Post all open alerts when it is time. A failure holds up no new alert: they are posted the next time.

        An alert that was refused before a restart, or is too much for this Alertmanager, is refused once more at most.
        """
        if not self._open or time.monotonic() < self._due:
            return
        self._unposted = None
        try:
            self._post(list(self._open.values()), now)
        except NotSent as error:
            self._count("failed")
            self._log.warning("not all open alerts were posted", alerts=len(self._open), error=str(error))
            gone = {alert.alert_id for alert in getattr(error, "alerts", ())} - self._accepted
            self._open = {alert_id: alert for alert_id, alert in self._open.items() if alert_id not in gone}
            self._unposted = f"not all open alerts were posted: {error}" if not gone else None
        self._due = time.monotonic() + self.interval

    def trouble(self) -> str | None:
        """Return why the open alerts were not posted the last time."""
        return self._unposted if self._open else None

    def _wants(self, alert: PriceAlert) -> bool:
        return self._channel.selects(self._name, alert, self._channels)

    def _deliver(self, alerts: Sequence[PriceAlert], _: Sequence[str] = ()) -> None:
        try:
            self._post(alerts, self._now())
        except Unacceptable as error:
            self._fold([alert for alert in alerts if alert not in error.alerts])
            raise
        self._fold(alerts)

    def _refused(self, wanted: Sequence[tuple[Record, PriceAlert]], error: NotSent) -> list[Emit]:
        if isinstance(error, Unacceptable):
            return super()._refused([each for each in wanted if each[1] in error.alerts], error)
        letters = super()._refused(wanted, error)
        self._fold([alert for _, alert in wanted])
        return letters

    def _fold(self, alerts: Sequence[PriceAlert]) -> None:
        for alert in alerts:
            if alert.state is AlertState.RESOLVED:
                self._open.pop(alert.alert_id, None)
                self._accepted.discard(alert.alert_id)
            else:
                self._open.setdefault(alert.alert_id, alert)

    def _post(self, alerts: Sequence[PriceAlert], now: datetime) -> None:
        """Post alerts. Raises NotSent; Unacceptable with those that are refused themselves, found by halves."""
        try:
            self._call(self._sender.post, json.dumps([self._posted(alert, now) for alert in alerts]), {})
        except Unacceptable as error:
            half, bad = len(alerts) // 2, list(alerts) if len(alerts) == 1 else []
            for part in (alerts[:half], alerts[half:]) if half else ():
                try:
                    self._post(part, now)
                except Unacceptable as among:
                    bad += among.alerts
            if bad:
                raise Unacceptable(str(error), bad) from None
        self._accepted.update(alert.alert_id for alert in alerts)

    def _posted(self, alert: PriceAlert, now: datetime) -> dict[str, Any]:
        # Other labels, as after a symbol was renamed, would be another alert.
        first = self._open.get(alert.alert_id, alert)
        ends = now if alert.state is AlertState.RESOLVED else now + self.keep
        labels = {re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII): text for name, text in first.labels.items()}
        labels |= {"alertname": first.rule, "severity": first.severity.lower(), "scope": first.scope.lower()}
        labels |= {"instrument": first.instrument or "", "symbol": first.symbol or "", "source": first.source}
        annotations = {"summary": self._writer.title(alert), "description": self._writer.text(alert)}
        times = {"startsAt": min(first.raised_at, now).isoformat(), "endsAt": ends.isoformat()}
        return {"labels": labels, "annotations": annotations, **times}


def consumer_of(name: str, channels: Mapping[str, Channel], **options: Any) -> Notify:
    """Return the consumer for a channel."""
    return (Alertmanager if channels[name].alertmanager else Notify)(name, channels, **options)
