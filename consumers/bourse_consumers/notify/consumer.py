"""The consumer that tells people: each channel at its own pace, each alert at least once.

What is committed is how far the slowest channel is, and beside the offset how far each of the others is: the commit's
own metadata. A channel is handed its next message only when the last one's progress is committed, so that a death
repeats one message for each channel at most. How far a channel is that the metadata do not name is the offset itself.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from bourse_cli.health import NOTIFICATIONS, NOTIFY_SECONDS, Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Hold, Offsets, Partition
from bourse_consumers.notify import words
from bourse_consumers.notify.channels import Channel
from bourse_consumers.notify.lane import Lane, Message
from bourse_consumers.notify.sending import NotSent
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, Topic

__all__ = ["Notify"]

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
STOP_SECONDS = 4.0


class _Delivery:
    """One message on its way to one channel, in a thread of its own: again until it is there, or given up."""

    def __init__(
        self, channel: Channel, message: Message, fallback: Channel | None, patience: timedelta, monitor: Monitor
    ) -> None:
        self.channel, self.message, self._fallback, self._monitor = channel, message, fallback, monitor
        self._patience = patience.total_seconds()
        self._log = get_logger(consumer="notify", channel=channel.policy.name)
        self._stop = threading.Event()
        self.over = False
        self.failures = 0
        self.why: str | None = None
        self.bug: BaseException | None = None
        # A daemon: what is on its way must not keep a stopped process alive; it comes again.
        self._thread = threading.Thread(target=self._run, name=f"notify-{channel.policy.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask it not to try again."""
        self._stop.set()

    def join(self, until: float) -> None:
        """Wait for the attempt under way, until a moment of the monotonic clock."""
        self._thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        try:
            self._bring()
        except Exception as error:  # it is raised where the consumer runs
            self.bug = error
            self.over = True

    def _bring(self) -> None:
        message, began, pause = self.message, time.monotonic(), FIRST_WAIT_SECONDS
        while True:
            try:
                self.channel.sender.send(message.text, message)
            except NotSent as error:
                self.failures += 1
                self._count("failed")
                self._unready(str(error))
                wait = pause * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
                given_up = time.monotonic() + wait - began > self._patience
                self._log.warning("not sent", error=str(error), failures=self.failures, given_up=given_up)
                if given_up:
                    self._count("given_up")
                    self._tell(str(error))
                    self.why, self.over = str(error), True
                    return
                if self._stop.wait(wait):
                    return
                pause = min(pause * 2, LONGEST_WAIT_SECONDS)
            else:
                seconds = (datetime.now(UTC) - message.entries[0].seen).total_seconds()
                self._log.info("sent", kind=message.kind, alerts=len(message.entries), waited_seconds=round(seconds, 2))
                self._count("sent")
                self._monitor.observe(NOTIFY_SECONDS, seconds, channel=self.channel.policy.name)
                self._unready(None)
                self.over = True
                return

    def _count(self, outcome: str) -> None:
        self._monitor.count(NOTIFICATIONS, channel=self.channel.policy.name, outcome=outcome)

    def _unready(self, why: str | None) -> None:
        name = f"channel {self.channel.policy.name}"
        self._monitor.unready(name, None if why is None else f"takes nothing: {why}")

    def _tell(self, why: str) -> None:
        """Say on another channel that this one takes nothing; where that fails too, only the dead letters do."""
        other = self._fallback
        if other is None:
            return
        name, count = self.channel.policy.name, len(self.message.entries)
        try:
            other.sender.send(words.trouble(name, count, why, other.policy.manner))
        except NotSent as error:
            self._log.error("the fallback takes nothing either", fallback=other.policy.name, error=str(error))


class Notify(Consumer):
    """Tells each channel the alerts that it wants."""

    topics: Sequence[Topic] = (ALERTS,)

    def __init__(
        self,
        channels: Mapping[str, Channel],
        *,
        max_age: timedelta | None = timedelta(hours=1),
        patience: timedelta = timedelta(minutes=15),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._channels = dict(channels)
        self._max_age, self._patience, self._now = max_age, patience, now
        self._lanes: dict[str, Lane] = {}
        self._deliveries: dict[str, _Delivery] = {}
        self._unknown: set[tuple[str, str]] = set()
        self._log = get_logger(consumer="notify")

    def open(self, assigned: Assignment) -> Hold:
        """Begin for each channel where it was."""
        # What is under way for partitions that may be another member's now: it is settled before anything else is sent.
        self._settle()
        self._deliveries = {}
        told = {partition: _parsed(assigned.notes.get(partition, "")) for partition in assigned}
        names = frozenset(self._channels)
        self._lanes = {
            name: Lane(
                channel.policy,
                names,
                {partition: max(at, told[partition].get(name, at)) for partition, at in assigned.items()},
                self._max_age,
            )
            for name, channel in self._channels.items()
        }
        return Hold()

    def process(self, batch: Batch) -> list[Emit]:
        """Hand each alert to the channels that want it."""
        now = self._now()
        for record, alert in zip(batch.records, batch.events, strict=True):
            for lane in self._lanes.values():
                lane.take(record, alert, now)
            for name in alert.channels:
                if name not in self._channels and (alert.rule, name) not in self._unknown:
                    self._unknown.add((alert.rule, name))
                    self._log.warning("no such channel", rule=alert.rule, channel=name, there_are=list(self._channels))
        return self._go_on(now)

    def idle(self, now: datetime) -> list[Emit]:
        """Send what is due."""
        return self._go_on(now)

    def durable(self) -> Offsets:
        """Return how far the slowest channel is."""
        everywhere = [lane.progress() for lane in self._lanes.values()]
        return (
            {partition: min(each[partition] for each in everywhere) for partition in everywhere[0]}
            if everywhere
            else {}
        )

    def notes(self) -> Mapping[Partition, str]:
        """Return how far the channels are that are further than the slowest."""
        ahead: dict[Partition, dict[str, int]] = {}
        slowest = self.durable()
        for name, lane in self._lanes.items():
            for partition, at in lane.progress().items():
                if at > slowest[partition]:
                    ahead.setdefault(partition, {})[name] = at
        return {
            partition: json.dumps(channels, ensure_ascii=False, separators=(",", ":"))
            for partition, channels in ahead.items()
        }

    def close(self) -> None:
        """Wait a moment for what is under way; what is not there by then comes again."""
        self._settle()
        for name, delivery in self._deliveries.items():
            if delivery.over and delivery.why is None and delivery.bug is None:
                self._lanes[name].done()

    def _go_on(self, now: datetime) -> list[Emit]:
        emits: list[Emit] = []
        for name, lane in self._lanes.items():
            delivery = self._deliveries.get(name)
            if delivery is None:
                if (message := lane.due(now)) is not None:
                    channel = self._channels[name]
                    fallback = self._channels.get(channel.fallback or "")
                    monitor = self.monitor or Monitor("notify")
                    self._deliveries[name] = _Delivery(channel, message, fallback, self._patience, monitor)
            elif delivery.over:
                if delivery.bug is not None:
                    raise delivery.bug
                if delivery.why is not None:
                    emits += self._letters(name, delivery, now)
                # The next message waits until this one's progress is committed: for the next call.
                lane.done(late=delivery.failures > 0)
                del self._deliveries[name]
        return emits

    def _settle(self) -> None:
        until = time.monotonic() + STOP_SECONDS
        for delivery in self._deliveries.values():
            delivery.stop()
        for delivery in self._deliveries.values():
            delivery.join(until)

    def _letters(self, name: str, delivery: _Delivery, now: datetime) -> list[Emit]:
        """Return what did not get there as dead letters, a record each."""
        count = len(delivery.message.entries)
        self._log.error("given up: dead letters", channel=name, count=count, reason=delivery.why)
        return [
            Emit(
                DEAD_LETTERS,
                DeadLetter(
                    reason=Reason.NOTIFICATION_FAILED,
                    message=f"channel {name}: {delivery.why}",
                    stage=Stage.NOTIFY,
                    origin=f"{record.partition.topic}-{record.partition.number}-{record.offset}",
                    consumer="notify",
                    payload=record.value or b"",
                    original_topic=record.partition.topic,
                    original_key=record.key,
                    original_partition=record.partition.number,
                    original_offset=record.offset,
                    original_headers=dict(record.headers),
                    failed_at=now.replace(microsecond=0),
                ),
            )
            for record in (entry.record for entry in delivery.message.entries)
        ]


def _parsed(note: str) -> dict[str, Any]:
    """Return what a note says; someone else's, or one that was cut off, says nothing."""
    try:
        found = json.loads(note)
    except ValueError:
        return {}
    return {name: at for name, at in found.items() if isinstance(at, int)} if isinstance(found, dict) else {}
