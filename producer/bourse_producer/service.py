"""The producer as a service: lead or stand by, poll, diff, publish, and wait for the next beat."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Protocol

from msgspec import structs

from bourse_cli import health as m
from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_producer.calendar import Calendar
from bourse_producer.derive import Derived
from bourse_producer.diff import Changes, InstrumentCode, RejectedRow, Snapshot, diff
from bourse_producer.finnotech import Reply
from bourse_producer.freshness import GOOD, Freshness
from bourse_producer.publisher import State
from bourse_producer.responses import TRADES_REALTIME, Profile, Reading, merge, parse
from bourse_schemas.errors import (
    ConfigurationError,
    ExchangeError,
    ExchangeNonsense,
    ExchangeRefused,
    ExchangeUnavailable,
    Fenced,
    PublishError,
    Unreachable,
)
from bourse_schemas.events import TEHRAN, Candle, DeadLetter, FeedState, Op, Outcome, Phase, PollMarker, Stage

__all__ = ["Capture", "Exchange", "Leadership", "Producer", "Publication", "Settings"]

STOP_WITHIN_SECONDS = 4.5
# After the last trade only corrections come, until the evening: calls are charged.
SLOW_SECONDS = 300.0
LONGEST_WAIT_SECONDS = 60.0
STANDBY_SECONDS = 1.0
# One-shot commands give up within 10 seconds, their own start included.
ONCE_SECONDS = 7.0
# A refused account is asked again at longer and longer intervals: it is rarely put right within a minute.
REFUSED_SECONDS = 60.0
PRACTICE_HOLD_SECONDS = 2.0
MOST_SKIPPED = 1000
# With fewer bad rows than this a response is not taken for a changed API; so many of them are kept as a sample.
FEW_REJECTED, SAMPLE = 20, 3
# The Date header is cut to the second, and a response takes its time.
SKEW_SECONDS = 5.0
JUMP_SECONDS = 2.0
# What rounding may take from a beat's time.
TICK_SECONDS = 0.01
KNOWN_DAYS = 30
COUNTS = {"opened": Op.OPENED, "traded": Op.TRADED, "revised": Op.REVISED, "cancelled": Op.CANCELLED}
ODD = ("stale_rows", "rejected_rows", "duplicate_rows")


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

    def publish(self, changes: Changes, letters: Sequence[DeadLetter], markers: Sequence[PollMarker]) -> None:
        """Publish one poll in one transaction."""

    def close(self) -> None:
        """Give the instance up."""


class Leadership(Protocol):
    """Who of several instances polls."""

    def term(self, wait_seconds: float = 0.0) -> int | None:
        """Return the term in which this instance leads, None where it does not."""

    def resign(self) -> None:
        """Stand for election anew."""

    def close(self) -> None:
        """Leave it to others."""


class Capture(Protocol):
    """Where the bytes a poll was made of are kept; raises PublishError where nothing may be published without them."""

    def restored(self, state: State) -> None:
        """Keep what the next polls start from."""

    def poll(self, poll_sequence: int, contexts: Sequence[Reading], known: Mapping[InstrumentCode, Candle]) -> None:
        """Make the responses durable, how they are read, and what they are compared with."""

    def committed(self, poll_sequence: int, outcome: Outcome) -> None:
        """Note that the poll is published."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service runs.

    `always` ignores closed hours, `response_clock` takes the time from the responses. `retry_seconds` is the first
    pause before a failed call is repeated within its beat, 0 for never; `quota_seconds` how long an account without
    calls is left alone. A response of which more than `max_rejected_share` cannot be used is not published.
    """

    source: str = TRADES_REALTIME.source
    poll_seconds: float = 60.0
    always: bool = False
    response_clock: bool = False
    rights: bool = False
    profile: Profile = TRADES_REALTIME
    calendar: Callable[[], Calendar] = Calendar
    freshness: Freshness = field(default_factory=Freshness)
    retry_seconds: float = 1.0
    quota_seconds: float = 3600.0
    max_rejected_share: float = 0.2


@dataclass(slots=True)
class _Attempt:
    """A poll on its way: what was asked, and what came of it."""

    sequence: int
    requested_at: datetime
    contexts: list[Reading] = field(default_factory=list)
    parts: list[Snapshot] = field(default_factory=list)
    suspects: list[RejectedRow] = field(default_factory=list)
    track_ids: dict[bool, str | None] = field(default_factory=dict)
    errors: dict[bool, ExchangeError] = field(default_factory=dict)
    held: bool = False

    @property
    def error(self) -> ExchangeError | None:
        """Return the first call's error, if any."""
        return next(iter(self.errors.values()), None)

    @property
    def rejected(self) -> list[RejectedRow]:
        """Return the rows that could not be used, and the sample of those of a refused response."""
        return [*self.suspects, *(row for part in self.parts for row in part.rejected)]


class _Stopped(BaseException):
    """A signal came where nothing is lost by stopping at once."""


def _to_millis(instant: datetime) -> datetime:
    return instant.replace(microsecond=instant.microsecond // 1000 * 1000)


class Producer:
    """Polls an exchange and publishes what changed; what is in memory is only ever what is committed."""

    def __init__(
        self,
        exchange: Exchange,
        publication: Callable[[], Publication],
        settings: Settings,
        *,
        leadership: Leadership | None = None,
        capture: Capture | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._exchange = exchange
        self._new_publication = publication
        self._settings = settings
        self._leadership = leadership
        self._capture = capture
        self._monitor = monitor or Monitor("producer")
        self._term: int | None = None
        self._standing_by = False
        self._publication: Publication | None = None
        self._restored = False
        self._calendar = settings.calendar()
        self._known: dict[InstrumentCode, Candle] = {}
        self._sequence = 0
        self._last: PollMarker | None = None
        self._last_good_at: datetime | None = None
        self._freshness = settings.freshness
        # Between the time of the responses and our clock; None until a response told it.
        self._skew: timedelta | None = None
        self._lettered: set[tuple[date | None, str]] = set()
        # Why beats may have been missed, and when, by both clocks, the last poll of this run began.
        self._excuse = "no instance was running"
        self._broken = False
        self._polled_at: tuple[float, float] | None = None
        self._refusals = 0
        self._hold_until = 0.0
        self._hold_for: ExchangeError | None = None
        self._warned: dict[str, date] = {}
        self._stop = threading.Event()
        self._interruptible = False
        self._log = get_logger(source=settings.source)

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Poll on every beat until SIGTERM or SIGINT; return after the transaction in flight."""
        self._catch_signals()
        # What a poll makes is freed by reference counts; the collector would look through it forty times a poll.
        gc.set_threshold(20_000, 20)
        try:
            self._interruptible = True
            while not self._stop.is_set():
                self._give_sign_of_life()
                if self._leads() and self._is_due() and self._recoverable(self._poll_once):
                    self._sleep(self._next_beat() - time.time())
        except _Stopped:
            pass
        finally:
            self._interruptible = False
            self._close()
            if self._leadership is not None:
                self._leadership.close()
        self._log.info("stopped")

    def _give_sign_of_life(self) -> None:
        self._monitor.beat(self._interval(self._now()) + 2 * LONGEST_WAIT_SECONDS)

    def run_once(self) -> PollMarker:
        """Poll once; raise what goes wrong."""
        try:
            self._prepare()
            if self._leadership is not None and self._leadership.term(ONCE_SECONDS) is None:
                raise ConfigurationError(
                    "another instance of this source leads (or was killed a moment ago): leave the polling to it, or "
                    "stop it first"
                )
            self._restore()
            return self._poll_once()
        finally:
            self._close()
            if self._leadership is not None:
                self._leadership.close()

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

    def _leads(self) -> bool:
        """Return whether this instance is the one that polls; once elected it reads back what is committed."""
        term = self._leadership.term() if self._leadership else 0
        if term is not None and term == self._term:
            return True
        if self._term is not None:
            self._close()
            self._term = None
            # What it saw of them last is the next leader's to judge.
            self._monitor.unready("exchange", None)
            self._monitor.unready("feed", None)
        if term is None and self._leadership is not None:
            # Warm: whatever can be wrong is said now, and all but the state is at hand.
            self._recoverable(lambda: None, lead=False)
            term = self._leadership.term(STANDBY_SECONDS if self._standing_by else ONCE_SECONDS)
        self._monitor.set(m.LEADER, term is not None)
        if term is None:
            if not self._standing_by:
                self._log.info("standing by: another instance of this source leads")
            # It does what it is there for.
            self._monitor.unready("starting", None)
            self._standing_by = True
            return False
        self._term, self._standing_by = term, False
        return self._recoverable(lambda: None)

    def _recoverable(self, step: Callable[[], object], *, lead: bool = True) -> bool:
        """Do a step as the leader; after a failed transaction throw everything away and read back what is committed.

        Returns False where a signal or another leader came first.
        """
        pause = 1.0
        while not self._stop.is_set():
            if lead and self._leadership is not None and self._leadership.term() != self._term:
                return False
            # Waiting for brokers is no reason to be started again.
            self._give_sign_of_life()
            try:
                self._prepare()
                if lead:
                    self._restore()
                    step()
            except Fenced:
                self._close()
                self._monitor.count(m.FENCED)
                if self._leadership is None:
                    raise
                self._log.warning("fenced: another instance took over; nothing was published, standing for election")
                self._excuse = "fenced by another instance"
                self._leadership.resign()
                return False
            except (PublishError, Unreachable) as error:
                self._excuse, self._broken = f"cannot publish: {error}", True
                self._log.error("cannot publish, starting over", error=str(error), wait_seconds=round(pause, 1))
                self._monitor.unready("kafka", self._excuse)
                self._close()
                self._sleep(pause)
                pause = min(pause * 2, 30.0) * random.uniform(0.8, 1.0)  # noqa: S311  # jitter is no secret
            else:
                self._monitor.unready("kafka", None)
                return True
        return False

    def _prepare(self) -> None:
        """Connect; nothing is written yet."""
        if self._publication is None:
            self._publication = self._new_publication()

    def _restore(self) -> None:
        """Take over: fence whoever led before, and make what is committed what is known."""
        if self._restored or self._publication is None:
            return
        began = time.perf_counter()
        state = self._publication.restore()
        if state.poll_sequence != self._sequence:
            # Another instance polled meanwhile: its last marker tells since when nothing was asked, not our own poll.
            self._polled_at = None
        self._known, self._sequence = state.candles, state.poll_sequence
        self._freshness, self._last_good_at = self._settings.freshness, None
        self._last = state.markers[-1] if state.markers else None
        for marker in state.markers:
            self._freshness = self._freshness.after(marker)
            if marker.outcome in GOOD:
                self._last_good_at = marker.received_at
        if self._capture is not None:
            self._capture.restored(state)
        self._restored = True
        seconds = time.perf_counter() - began
        self._monitor.set(m.RESTORE_SECONDS, seconds)
        self._monitor.unready("starting", None)
        self._log.info(
            "ready", instruments=len(self._known), poll_sequence=self._sequence, restore_seconds=round(seconds, 2)
        )

    def _close(self) -> None:
        self._restored = False
        if self._publication is not None:
            self._publication.close()
            self._publication = None

    # --- time ---------------------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return _to_millis(datetime.fromtimestamp(time.time(), UTC) + (self._skew or timedelta()))

    def _interval(self, now: datetime) -> float:
        seconds, calendar = self._settings.poll_seconds, self._calendar
        after = calendar.phase(now) in {Phase.AFTER_CLOSE, Phase.CLOSED} and not calendar.trades_at_last(now)
        return max(seconds, SLOW_SECONDS) if after and not self._settings.always else seconds

    def _next_beat(self) -> float:
        """Return the next beat, in seconds since the epoch: beats lie on multiples of the interval, so none drifts."""
        interval = self._interval(self._now())
        if not interval:
            # Without beats there is nothing to leave a marker for while the exchange is left alone.
            return time.time() + max(0.0, self._hold_until - time.monotonic())
        return (math.floor(time.time() / interval) + 1) * interval

    def _is_due(self) -> bool:
        """Return whether it is time to poll; outside of sessions wait a while, and start the next one afresh."""
        self._calendar = self._settings.calendar()
        now = self._now()
        self._watch_calendar(now)
        if self._settings.always or self._calendar.phase(now) is not Phase.CLOSED or self._owes_final(now):
            return True
        if self._settings.response_clock:
            # Only a response knows how far its night has come.
            self._sleep(0.0 if self._skew is None else min(self._settings.poll_seconds, LONGEST_WAIT_SECONDS))
            return not self._stop.is_set()
        begins = self._calendar.next_session(now)
        if self._restored:
            # A transactional id that rests for a week expires, and closed days can be that many.
            self._close()
            self._log.info("session closed", next_session=begins.isoformat())
        self._monitor.unready("exchange", None)
        self._monitor.unready("feed", None)
        self._sleep(min((begins - now).total_seconds(), LONGEST_WAIT_SECONDS))
        return False

    def _owes_final(self, now: datetime) -> bool:
        """Say whether the day's last poll was missed, and can still be had: the exchange shows it until midnight."""
        day = self._calendar.session_day(now)
        if self._settings.response_clock or day != now.astimezone(TEHRAN).date():
            return False
        last = self._last
        return self._calendar.phase(now) is Phase.CLOSED and not (
            last is not None and last.session_day == day and last.day_final
        )

    def _watch_calendar(self, now: datetime) -> None:
        is_open = self._calendar.phase(now) is Phase.OPEN
        days = self._calendar.days_known(now.astimezone(TEHRAN).date())
        self._monitor.set(m.SESSION_OPEN, is_open)
        self._monitor.set(m.CALENDAR_DAYS_KNOWN, days)
        if days <= KNOWN_DAYS:
            self._warn_daily(now, "the calendar's knowledge ends soon: name the next holidays in --calendar", days=days)

    def _warn_daily(self, now: datetime, event: str, **words: object) -> None:
        if self._warned.get(event) != now.date():
            self._warned[event] = now.date()
            self._log.warning(event, **words)

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(max(0.0, min(seconds, max(self._settings.poll_seconds, SLOW_SECONDS))))

    def _missed_beats(self, now: datetime) -> list[datetime]:
        """Return the beats of the open session at which nothing was asked since the last poll."""
        interval = self._settings.poll_seconds
        if self._last is None or not interval or self._settings.response_clock:
            # A simulated market passes at another pace than the beats.
            return []
        since = self._last.requested_at.timestamp()
        if self._polled_at is not None:
            # What passed while we ran is told by the clock that nobody sets.
            wall, steady = self._polled_at
            since = time.time() - (time.monotonic() - steady)
            if abs(jump := since - wall) > JUMP_SECONDS:
                self._log.warning("the clock was set", by_seconds=round(jump, 1))
        beats = range(math.floor((since + TICK_SECONDS) / interval) + 1, math.floor(now.timestamp() / interval))[
            -MOST_SKIPPED:
        ]
        missed = [datetime.fromtimestamp(beat * interval, UTC) for beat in beats]
        day = self._calendar.session_day(now)
        return [
            beat
            for beat in missed
            if self._calendar.phase(beat) is Phase.OPEN and self._calendar.session_day(beat) == day
        ]

    # --- one poll -----------------------------------------------------------------------------------------------------

    def _poll_once(self) -> PollMarker:
        publication = self._publication
        if publication is None or not self._restored:
            raise PublishError("not open")
        began, started = time.perf_counter(), (time.time(), time.monotonic())
        requested_at = self._now()
        missed = self._missed_beats(requested_at)
        attempt = _Attempt(self._sequence + len(missed) + 1, requested_at)
        gap_from = self._gap_from(requested_at, missed)
        self._fetch(attempt)
        fetched = time.perf_counter()
        # From here to the end of the transaction a signal waits.
        self._interruptible = False
        try:
            if self._stop.is_set():
                raise _Stopped
            snapshot = merge(attempt.parts) if attempt.parts else None
            derived = None
            if snapshot is not None:
                publication.require_room_for(snapshot.received_at)
                derived = Derived(snapshot, diff(self._known, snapshot))
            markers, freshness = self._markers(attempt, missed, derived, gap_from)
            letters = self._letters(attempt, markers[-1])
            if self._capture is not None:
                self._capture.poll(attempt.sequence, attempt.contexts, self._known)
            publication.publish(derived.changes if derived else Changes([], [], 0), letters, markers)
            self._polled_at = started
            self._committed(attempt, derived, markers[-1], freshness)
        finally:
            self._interruptible = True
        self._report(attempt, derived, markers, (fetched - began, time.perf_counter() - fetched))
        return markers[-1]

    def _fetch(self, attempt: _Attempt) -> None:
        """Call the exchange, and again while the beat lasts where that may help."""
        if self._hold_for is not None and time.monotonic() < self._hold_until:
            attempt.held = True
            attempt.errors[False] = self._hold_for
            return
        until = time.monotonic() + self._next_beat() - time.time()
        for is_right in (False, True) if self._settings.rights else (False,):
            try:
                reply = self._persistently(lambda is_right=is_right: self._exchange.realtime(rights=is_right), until)  # type: ignore[misc]
                attempt.track_ids[is_right] = reply.track_id
                context = self._context(attempt, reply, is_right)
                part = parse(reply.body, context)
                self._require_most(attempt, part, reply.track_id)
                attempt.contexts.append(context)
                attempt.parts.append(part)
            except ExchangeError as error:
                attempt.errors[is_right] = error
                attempt.track_ids.setdefault(is_right, error.track_id)
        self._hold(attempt.error)

    def _persistently(self, call: Callable[[], Reply], until: float) -> Reply:
        pause = self._settings.retry_seconds
        while True:
            try:
                return call()
            except ExchangeUnavailable as error:
                wait = error.retry_after or pause * random.uniform(0.5, 1.0)  # noqa: S311  # jitter is no secret
                if not pause or time.monotonic() + wait >= until:
                    raise
                self._log.warning("calling again", error_kind=error.kind, error=str(error), wait_seconds=round(wait, 1))
                if self._stop.wait(wait):
                    raise
                pause *= 2

    def _hold(self, error: ExchangeError | None) -> None:
        """Leave the exchange alone for as long as it said, or as calling it again is of no use."""
        refused = isinstance(error, ExchangeRefused) and error.kind in {"token", "scope", "address"}
        self._refusals = self._refusals + 1 if refused else 0
        seconds = 0.0
        if error is not None:
            if error.retry_after:
                seconds = error.retry_after
            elif error.kind == "quota":
                seconds = self._settings.quota_seconds
            elif self._refusals > 1:
                seconds = min(REFUSED_SECONDS * 2 ** (self._refusals - 1), SLOW_SECONDS) - REFUSED_SECONDS / 2
        if self._settings.response_clock:
            # Where the market's time is not ours, its patience is not either.
            seconds = min(seconds, PRACTICE_HOLD_SECONDS)
        self._hold_for, self._hold_until = None, 0.0
        if error is not None and seconds:
            again = datetime.fromtimestamp(time.time() + seconds, TEHRAN)
            said = f"not called before {again:%H:%M:%S}: {error}"
            self._hold_for = ExchangeRefused(error.kind, said, code=error.code)
            self._hold_until = time.monotonic() + seconds

    def _context(self, attempt: _Attempt, reply: Reply, is_right: bool) -> Reading:
        if reply.dated is not None:
            skew = reply.dated - reply.received_at
            self._monitor.set(m.CLOCK_SKEW, skew.total_seconds())
            if self._settings.response_clock:
                self._skew = skew
            elif abs(skew.total_seconds()) > SKEW_SECONDS:
                self._warn_daily(
                    attempt.requested_at,
                    "our clock and the exchange's differ: set this machine's by NTP",
                    seconds=round(skew.total_seconds()),
                )
        received_at = _to_millis(reply.received_at + (self._skew or timedelta()))
        return Reading(
            poll_sequence=attempt.sequence,
            received_at=received_at,
            dated=reply.dated or received_at,
            session_day=self._calendar.session_day(received_at),
            is_right=is_right,
            track_id=reply.track_id,
            profile=self._settings.profile.name,
        )

    def _require_most(self, attempt: _Attempt, part: Snapshot, track_id: str) -> None:
        """Refuse a response most of which cannot be used: a changed API must not pour the market into dead letters."""
        bad = len(part.rejected)
        if bad >= FEW_REJECTED and bad > self._settings.max_rejected_share * part.rows:
            attempt.suspects += part.rejected[:SAMPLE]
            said = (
                f"{bad} of {part.rows} rows cannot be used: has the API changed? The first: {part.rejected[0].message}"
            )
            raise ExchangeNonsense("nonsense", said, track_id=track_id)

    def _letters(self, attempt: _Attempt, marker: PollMarker) -> list[DeadLetter]:
        """Return the dead letters of rejected rows: the same bad row once a run and day, not every minute."""
        fresh = {
            row.identity: row for row in attempt.rejected if (marker.session_day, row.identity) not in self._lettered
        }
        return [
            DeadLetter(
                reason=row.reason,
                message=row.message,
                stage=Stage.PARSE,
                origin=self._settings.source,
                payload=row.payload,
                original_headers={},
                poll_sequence=attempt.sequence,
                poll_id=row.track_id,
                failed_at=marker.received_at or marker.requested_at,
            )
            for row in fresh.values()
        ]

    def _markers(
        self, attempt: _Attempt, missed: Sequence[datetime], derived: Derived | None, gap_from: datetime | None
    ) -> tuple[list[PollMarker], Freshness]:
        """Return the markers of the beats missed and of this poll, and the freshness after them."""
        freshness = self._freshness
        markers = []
        for number, beat in enumerate(missed, self._sequence + 1):
            ended = beat + timedelta(seconds=self._settings.poll_seconds)
            bare = self._bare(number, Outcome.SKIPPED, beat, beat, ended)
            bare = structs.replace(bare, error_kind="internal", error_message=self._excuse)
            freshness = freshness.after(bare)
            markers.append(structs.replace(bare, feed_state=freshness.state))
        marker = self._marker(attempt, derived, gap_from)
        freshness = freshness.after(marker)
        return [*markers, structs.replace(marker, feed_state=freshness.state)], freshness

    def _bare(
        self, sequence: int, outcome: Outcome, requested_at: datetime, now: datetime, next_poll_at: datetime
    ) -> PollMarker:
        return PollMarker(
            poll_sequence=sequence,
            simulated=self._settings.response_clock,
            source=self._settings.source,
            outcome=outcome,
            phase=self._calendar.phase(now),
            feed_state=FeedState.UNKNOWN,
            session_day=self._calendar.session_day(now),
            requested_at=requested_at,
            next_poll_at=next_poll_at,
            day_final=False,
            **dict.fromkeys(("rows", "charged_calls", *COUNTS, *ODD), 0),  # type: ignore[arg-type]  # these are numbers
        )

    def _marker(self, attempt: _Attempt, derived: Derived | None, gap_from: datetime | None) -> PollMarker:
        received_at = derived.snapshot.received_at if derived else None
        now = received_at or self._now()
        next_beat = _to_millis(now + timedelta(seconds=max(0.0, self._next_beat() - time.time())))
        requested_at = attempt.requested_at if received_at is None else min(attempt.requested_at, received_at)
        outcome = Outcome.SKIPPED if attempt.held else Outcome.FAILED
        if derived is not None:
            outcome = Outcome.PUBLISHED if derived.changes.events else Outcome.UNCHANGED
        bare = self._bare(attempt.sequence, outcome, requested_at, now, self._in_session(next_beat))
        error = attempt.error
        if error is not None:
            named = [f"{'rights' if right else 'shares'}: {error}" for right, error in attempt.errors.items()]
            bare = structs.replace(
                bare,
                error_kind=error.kind,
                error_code=error.code,
                error_message="; ".join(named) if self._settings.rights else str(error),
            )
        bare = structs.replace(bare, poll_id=attempt.track_ids.get(False), rights_poll_id=attempt.track_ids.get(True))
        if derived is None:
            return bare
        snapshot, changes = derived.snapshot, derived.changes
        ends = self._calendar.phase(next_beat) is Phase.CLOSED
        return structs.replace(
            bare,
            received_at=received_at,
            day_final=ends and (bare.phase is not Phase.CLOSED or self._owes_final(now)),
            latest_traded_at=max((candle.traded_at for candle in snapshot.candles.values()), default=None),
            rows=snapshot.rows,
            **{name: changes.count(op) for name, op in COUNTS.items()},
            stale_rows=changes.stale_rows,
            rejected_rows=len(snapshot.rejected),
            duplicate_rows=snapshot.duplicate_rows,
            charged_calls=len(attempt.contexts),
            gap_from=gap_from,
        )

    def _gap_from(self, requested_at: datetime, missed: Sequence[datetime]) -> datetime | None:
        """Return the last good poll's time where beats were missed since."""
        before = self._last_good_at
        if before is None or self._calendar.phase(requested_at) is Phase.CLOSED:
            return None
        due = self._in_session(before + timedelta(seconds=self._interval(before)))
        # Between runs only the clocks can tell; a simulated one passes at another pace than the beats.
        late = requested_at > due + timedelta(seconds=self._settings.poll_seconds / 2 + 5)
        failed = self._last is not None and self._last.outcome not in GOOD
        return before if missed or failed or self._broken or (late and not self._settings.response_clock) else None

    def _in_session(self, beat: datetime) -> datetime:
        """Return when the poll of a beat takes place: the beats of closed hours wait for the next session."""
        waits = not self._settings.always and self._calendar.phase(beat) is Phase.CLOSED
        return self._calendar.next_session(beat) if waits else beat

    def _committed(self, attempt: _Attempt, derived: Derived | None, marker: PollMarker, freshness: Freshness) -> None:
        self._freshness, self._last, self._sequence = freshness, marker, marker.poll_sequence
        self._excuse, self._broken = "the poll before was still under way", False
        if derived is not None:
            self._last_good_at = marker.received_at
            self._known.update((candle.instrument, candle) for candle in derived.changes.candles)
        today = {told for told in self._lettered if told[0] == marker.session_day}
        self._lettered = today | {(marker.session_day, row.identity) for row in attempt.rejected}
        if self._capture is not None:
            self._capture.committed(marker.poll_sequence, marker.outcome)

    def _report(
        self, attempt: _Attempt, derived: Derived | None, markers: Sequence[PollMarker], seconds: tuple[float, float]
    ) -> None:
        """Log the poll in one line, in which what is zero is left out, and tell those who watch us."""
        marker = markers[-1]
        odd = dict(derived.snapshot.oddities) if derived else {}
        line = {
            "sequence": marker.poll_sequence,
            "outcome": marker.outcome.value,
            "feed": marker.feed_state.value,
            "phase": marker.phase.value,
            "rows": marker.rows,
            **{name: count for name in (*COUNTS, *ODD) if (count := getattr(marker, name))},
            **odd,
            "fetch_ms": round(seconds[0] * 1000),
            "publish_ms": round(seconds[1] * 1000),
        }
        if len(markers) > 1:
            line["skipped_beats"] = len(markers) - 1
        if marker.gap_from is not None:
            line["gap_from"] = marker.gap_from.isoformat()
        if marker.error_kind is not None:
            self._log.warning("poll", **line, error_kind=marker.error_kind, error=marker.error_message)
        elif "foreign_track_id" in odd:
            self._log.warning("poll", **line)
        else:
            self._log.info("poll", **line)
        self._measure(attempt, derived, markers, seconds)

    def _measure(
        self, attempt: _Attempt, derived: Derived | None, markers: Sequence[PollMarker], seconds: tuple[float, float]
    ) -> None:
        monitor, marker = self._monitor, markers[-1]
        for each in markers:
            monitor.count(m.POLLS, outcome=each.outcome.value)
        monitor.set(m.POLL_SEQUENCE, marker.poll_sequence)
        for state in FeedState:
            monitor.set(m.FEED_STATE, state is marker.feed_state, state=state.value)
        monitor.observe(m.FETCH_SECONDS, seconds[0])
        monitor.observe(m.PUBLISH_SECONDS, seconds[1])
        error = attempt.error
        monitor.unready("exchange", None if error is None else f"{error.kind}: {marker.error_message}")
        bad_feed = marker.feed_state in {FeedState.STALE, FeedState.FROZEN, FeedState.PARTIAL}
        monitor.unready("feed", f"the feed is {marker.feed_state.value}" if bad_feed else None)
        if derived is None:
            return
        for name, op in COUNTS.items():
            monitor.count(m.EVENTS, getattr(marker, name), op=op.value)
        for metric, count in (
            (m.REJECTED_ROWS, marker.rejected_rows),
            (m.STALE_ROWS, marker.stale_rows),
        ):
            monitor.count(metric, count)
        monitor.set(m.LAST_GOOD_POLL, derived.snapshot.received_at.timestamp())
        if derived.changes.events:
            monitor.set(m.LAST_CHANGE, derived.snapshot.received_at.timestamp())
