"""The producer as a service: poll, diff, publish, and wait for the next beat."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Protocol

from bourse_producer.calendar import Calendar
from bourse_producer.diff import Changes, InstrumentCode, RejectedRow, Snapshot, diff
from bourse_producer.finnotech import Context, Reply, merge, parse
from bourse_producer.freshness import Freshness, Poll
from bourse_producer.publisher import State
from bourse_schemas.errors import ExchangeError, Fenced, PublishError, Unreachable
from bourse_schemas.events import Candle, DeadLetter, Op, Outcome, Phase, PollMarker, Stage
from bourse_schemas.telemetry import get_logger

__all__ = ["Exchange", "Producer", "Publication", "Settings"]

STOP_WITHIN_SECONDS = 4.5
# After the last trade only corrections come, until the evening: calls are charged.
SLOW_SECONDS = 300.0
LONGEST_WAIT_SECONDS = 60.0


class Exchange(Protocol):
    """Where snapshots come from; raises ExchangeError when a call gave none."""

    def realtime(self, *, rights: bool) -> Reply:
        """Return the last state of all shares, or of all subscription rights."""


class Publication(Protocol):
    """Where polls go, all or nothing; raises PublishError, after which the instance is void."""

    def restore(self) -> State:
        """Fence any older instance, then return what is committed."""

    def require_room_for(self, instant: datetime) -> None:
        """Raise ConfigurationError where records of this time would not stay."""

    def publish(self, changes: Changes, letters: list[DeadLetter], marker: PollMarker) -> None:
        """Publish one poll in one transaction."""

    def close(self) -> None:
        """Give the instance up."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service runs: `always` ignores closed hours, `response_clock` takes the time from the responses."""

    source: str
    poll_seconds: float = 60.0
    always: bool = False
    response_clock: bool = False
    rights: bool = False
    calendar: Calendar = field(default_factory=Calendar)


class _Stopped(BaseException):
    """A signal came where nothing is lost by stopping at once."""


def _to_millis(instant: datetime) -> datetime:
    return instant.replace(microsecond=instant.microsecond // 1000 * 1000)


class Producer:
    """Polls an exchange and publishes what changed; what is in memory is only ever what is committed."""

    def __init__(self, exchange: Exchange, publication: Callable[[], Publication], settings: Settings) -> None:
        self._exchange = exchange
        self._new_publication = publication
        self._settings = settings
        self._publication: Publication | None = None
        self._known: dict[InstrumentCode, Candle] = {}
        self._sequence = 0
        self._last_good_at: datetime | None = None
        self._missed = False
        self._freshness = Freshness()
        # Between the time of the responses and our clock; None until a response told it.
        self._skew: timedelta | None = None
        self._lettered: set[tuple[date | None, str]] = set()
        self._stop = threading.Event()
        self._interruptible = False
        self._log = get_logger(source=settings.source)

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Poll on every beat until SIGTERM or SIGINT; return after the transaction in flight."""
        self._catch_signals()
        try:
            self._interruptible = True
            # At once, whatever the hour: a mistake is told now, not when the session begins.
            self._recoverable(lambda: None)
            while not self._stop.is_set():
                if self._wait_for_session():
                    self._recoverable(self._poll_once)
                    self._sleep(self._next_beat() - time.time())
        except _Stopped:
            pass
        finally:
            self._interruptible = False
            self._close()
        self._log.info("stopped")

    def run_once(self) -> PollMarker:
        """Poll once; raise what goes wrong."""
        try:
            self._open()
            return self._poll_once()
        finally:
            self._close()

    def _catch_signals(self) -> None:
        def stop(number: int, _: object) -> None:
            if self._stop.is_set():
                return
            self._stop.set()
            self._log.info("stopping", signal=signal.Signals(number).name)
            if self._interruptible:
                raise _Stopped

        def last_resort(signalled: int) -> None:
            os.read(signalled, 1)
            time.sleep(STOP_WITHIN_SECONDS)
            os._exit(0 if self._interruptible else 3)

        # While librdkafka waits for brokers no handler runs, only this pipe is written. Nothing is lost with a commit
        # that is not waited for: the next start settles it and reads back what it came to.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        threading.Thread(target=last_resort, args=[reading], daemon=True).start()
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def _recoverable(self, step: Callable[[], object]) -> None:
        """Do a step; after a failed transaction throw everything away and read back what is committed."""
        pause = 1.0
        while not self._stop.is_set():
            try:
                if self._publication is None:
                    self._open()
                step()
            except Fenced:
                self._close()
                raise
            except (PublishError, Unreachable) as error:
                self._missed = True
                self._log.error("cannot publish, starting over", error=str(error), wait_seconds=round(pause, 1))
                self._close()
                self._sleep(pause)
                pause = min(pause * 2, 30.0) * random.uniform(0.8, 1.0)  # noqa: S311  # jitter is no secret
            else:
                return

    def _open(self) -> None:
        publication = self._new_publication()
        self._publication = publication
        state = publication.restore()
        self._known, self._sequence = state.candles, state.poll_sequence
        self._last_good_at = state.last_good_at
        self._log.info("ready", instruments=len(self._known), poll_sequence=self._sequence)

    def _close(self) -> None:
        if self._publication is not None:
            self._publication.close()
            self._publication = None

    # --- time ---------------------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return _to_millis(datetime.now(UTC) + (self._skew or timedelta()))

    def _interval(self, now: datetime) -> float:
        seconds = self._settings.poll_seconds
        calendar = self._settings.calendar
        after = (
            not self._settings.always and calendar.phase(now) is Phase.AFTER_CLOSE and not calendar.trades_at_last(now)
        )
        return max(seconds, SLOW_SECONDS) if after else seconds

    def _next_beat(self) -> float:
        """Return the next beat, in seconds since the epoch: beats lie on multiples of the interval, so none drifts."""
        interval = self._interval(self._now())
        return (math.floor(time.time() / interval) + 1) * interval if interval else time.time()

    def _wait_for_session(self) -> bool:
        """Return whether it is time to poll; outside of sessions wait a while, and start the next one afresh."""
        if self._settings.always or self._settings.calendar.phase(self._now()) is not Phase.CLOSED:
            return True
        if self._settings.response_clock:
            # Only a response knows how far its night has come.
            self._sleep(0.0 if self._skew is None else min(self._settings.poll_seconds, LONGEST_WAIT_SECONDS))
            return not self._stop.is_set()
        begins = self._settings.calendar.next_session(self._now())
        if self._publication is not None:
            # A transactional id that rests for a week expires, and closed days can be that many.
            self._close()
            self._log.info("session closed", next_session=begins.isoformat())
        self._sleep(min((begins - self._now()).total_seconds(), LONGEST_WAIT_SECONDS))
        return False

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(max(0.0, min(seconds, max(self._settings.poll_seconds, SLOW_SECONDS))))

    # --- one poll -----------------------------------------------------------------------------------------------------

    def _poll_once(self) -> PollMarker:
        publication = self._publication
        if publication is None:
            raise PublishError("not open")
        began = time.perf_counter()
        requested_at = self._now()
        snapshot, track_ids, errors = self._fetch()
        fetched = time.perf_counter()
        # From here to the end of the transaction a signal waits.
        self._interruptible = False
        try:
            if self._stop.is_set():
                raise _Stopped
            if snapshot is None:
                changes, letters = Changes([], [], 0), []
            else:
                publication.require_room_for(snapshot.received_at)
                changes = diff(self._known, snapshot)
                letters = self._letters(snapshot, track_ids)
            marker, freshness = self._marker(requested_at, snapshot, changes, track_ids, errors)
            publication.publish(changes, letters, marker)
            self._committed(snapshot, changes, letters, marker, freshness)
        finally:
            self._interruptible = True
        self._report(marker, snapshot, errors, fetched - began, time.perf_counter() - fetched)
        return marker

    def _fetch(self) -> tuple[Snapshot | None, dict[bool, str | None], dict[bool, ExchangeError]]:
        """Return the snapshot, None if no call gave one, and per call (is it for rights?) its trackId and its error."""
        parts: list[Snapshot] = []
        track_ids: dict[bool, str | None] = {}
        errors: dict[bool, ExchangeError] = {}
        for is_right in (False, True) if self._settings.rights else (False,):
            try:
                reply = self._exchange.realtime(rights=is_right)
                track_ids[is_right] = reply.track_id
                if self._settings.response_clock and reply.dated is not None:
                    self._skew = reply.dated - reply.received_at
                received_at = _to_millis(reply.received_at + (self._skew or timedelta()))
                context = Context(
                    poll_sequence=self._sequence + 1,
                    received_at=received_at,
                    dated=reply.dated or received_at,
                    session_day=self._settings.calendar.session_day(received_at),
                    is_right=is_right,
                    track_id=reply.track_id,
                )
                parts.append(parse(reply.body, context))
            except ExchangeError as error:
                errors[is_right] = error
                track_ids.setdefault(is_right, error.track_id)
        return (merge(parts) if parts else None), track_ids, errors

    def _letters(self, snapshot: Snapshot, track_ids: dict[bool, str | None]) -> list[DeadLetter]:
        """Return the dead letters of rejected rows: the same bad row once a run and day, not every minute."""
        fresh = {
            row.identity: row for row in snapshot.rejected if (snapshot.session_day, row.identity) not in self._lettered
        }
        return [self._letter(row, snapshot.received_at, track_ids.get(False)) for row in fresh.values()]

    def _letter(self, row: RejectedRow, failed_at: datetime, poll_id: str | None) -> DeadLetter:
        return DeadLetter(
            reason=row.reason,
            message=row.message,
            stage=Stage.PARSE,
            origin=self._settings.source,
            payload=row.payload,
            original_headers={},
            poll_sequence=self._sequence + 1,
            poll_id=poll_id,
            failed_at=failed_at,
        )

    def _marker(
        self,
        requested_at: datetime,
        snapshot: Snapshot | None,
        changes: Changes,
        track_ids: dict[bool, str | None],
        errors: dict[bool, ExchangeError],
    ) -> tuple[PollMarker, Freshness]:
        received_at = snapshot.received_at if snapshot else None
        now = received_at or requested_at
        calendar = self._settings.calendar
        phase, session_day = calendar.phase(now), calendar.session_day(now)
        outcome = Outcome.FAILED if snapshot is None else Outcome.PUBLISHED if changes.events else Outcome.UNCHANGED
        candles = snapshot.candles.values() if snapshot else ()
        latest = max((candle.traded_at for candle in candles), default=None)
        next_beat = _to_millis(now + timedelta(seconds=max(0.0, self._next_beat() - time.time())))
        freshness = self._freshness.after(
            Poll(
                outcome=outcome,
                phase=phase,
                at=now,
                session_day=session_day,
                rows=snapshot.rows if snapshot else 0,
                latest_traded_day=max((candle.trading_day for candle in candles), default=None),
                partial=bool(errors),
            )
        )
        error = next(iter(errors.values()), None)
        named = [f"{'rights' if is_right else 'shares'}: {error}" for is_right, error in errors.items()]
        marker = PollMarker(
            poll_sequence=self._sequence + 1,
            poll_id=track_ids.get(False),
            rights_poll_id=track_ids.get(True),
            source=self._settings.source,
            outcome=outcome,
            phase=phase,
            feed_state=freshness.state,
            session_day=session_day,
            requested_at=requested_at if received_at is None else min(requested_at, received_at),
            received_at=received_at,
            next_poll_at=self._in_session(next_beat),
            day_final=phase is not Phase.CLOSED and calendar.phase(next_beat) is Phase.CLOSED,
            latest_traded_at=latest,
            rows=snapshot.rows if snapshot else 0,
            opened=changes.count(Op.OPENED),
            traded=changes.count(Op.TRADED),
            revised=changes.count(Op.REVISED),
            cancelled=changes.count(Op.CANCELLED),
            stale_rows=changes.stale_rows,
            rejected_rows=len(snapshot.rejected) if snapshot else 0,
            duplicate_rows=snapshot.duplicate_rows if snapshot else 0,
            backfilled_rows=0,
            gap_from=self._gap_from(requested_at, phase) if snapshot else None,
            error_kind=error.kind if error else None,
            error_code=error.code if error else None,
            error_message="; ".join(named) if self._settings.rights and named else str(error) if error else None,
        )
        return marker, freshness

    def _gap_from(self, requested_at: datetime, phase: Phase) -> datetime | None:
        """Return the last good poll's time where beats were missed since."""
        before = self._last_good_at
        if before is None or phase is Phase.CLOSED:
            return None
        due = self._in_session(before + timedelta(seconds=self._interval(before)))
        # Between runs only the clocks can tell; a simulated one passes at another pace than the beats.
        late = requested_at > due + timedelta(seconds=self._settings.poll_seconds / 2 + 5)
        return before if self._missed or (late and not self._settings.response_clock) else None

    def _in_session(self, beat: datetime) -> datetime:
        """Return when the poll of a beat takes place: the beats of closed hours wait for the next session."""
        calendar = self._settings.calendar
        waits = not self._settings.always and calendar.phase(beat) is Phase.CLOSED
        return calendar.next_session(beat) if waits else beat

    def _committed(
        self,
        snapshot: Snapshot | None,
        changes: Changes,
        letters: list[DeadLetter],
        marker: PollMarker,
        freshness: Freshness,
    ) -> None:
        self._freshness = freshness
        self._known.update((candle.instrument, candle) for candle in changes.candles)
        self._sequence = marker.poll_sequence
        self._missed = snapshot is None
        if snapshot is not None:
            self._last_good_at = snapshot.received_at
            if letters:
                self._lettered.update((snapshot.session_day, row.identity) for row in snapshot.rejected)

    def _report(
        self,
        marker: PollMarker,
        snapshot: Snapshot | None,
        errors: dict[bool, ExchangeError],
        fetch_seconds: float,
        publish_seconds: float,
    ) -> None:
        """Log the poll in one line: what is zero is left out."""
        counts = {name: getattr(marker, name) for name in ("opened", "traded", "revised", "cancelled")}
        odd = {name: getattr(marker, name) for name in ("stale_rows", "rejected_rows", "duplicate_rows")}
        odd |= dict(snapshot.oddities) if snapshot else {}
        line = {
            "sequence": marker.poll_sequence,
            "outcome": marker.outcome.value,
            "feed": marker.feed_state.value,
            "phase": marker.phase.value,
            "rows": marker.rows,
            **{name: count for name, count in {**counts, **odd}.items() if count},
            "fetch_ms": round(fetch_seconds * 1000),
            "publish_ms": round(publish_seconds * 1000),
        }
        if marker.gap_from is not None:
            line["gap_from"] = marker.gap_from.isoformat()
        if errors:
            self._log.warning("poll", **line, error_kind=marker.error_kind, error=marker.error_message)
        elif snapshot is not None and "foreign_track_id" in snapshot.oddities:
            self._log.warning("poll", **line)
        else:
            self._log.info("poll", **line)
