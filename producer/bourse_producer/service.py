"""The producer as a service: lead or stand by, poll, publish, and wait for the next beat."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Protocol

from bourse_cli.health import Monitor
from bourse_producer.beats import Beats
from bourse_producer.calendar import Calendar
from bourse_producer.clock import Clock
from bourse_producer.diff import Changes, InstrumentCode
from bourse_producer.finnotech import Reply
from bourse_producer.freshness import Freshness
from bourse_producer.markers import History, Poll, Timing, Trial, mark, was_committed, was_overtaken
from bourse_producer.patience import Call
from bourse_producer.publisher import NoRoom, State
from bourse_producer.refusals import clock_skew
from bourse_producer.reporting import Reporter
from bourse_producer.responses import TRADES_REALTIME, Answer, Memo, Profile, Reading, derive
from bourse_schemas.election import Election
from bourse_schemas.errors import ConfigurationError, ExchangeError, Fenced, PublishError, Unreachable
from bourse_schemas.events import TEHRAN, Candle, DeadLetter, Phase, PollMarker

LONGEST_WAIT_SECONDS = 60.0
# Longer than any step without a sign of life: a wait, a call, a commit, the restore of a large state.
ALIVE_SECONDS = 180.0
# After this many turns without a term it is another instance that leads.
STANDBY_SECONDS, STANDBY_TURNS = 1.0, 7
# One-shot commands give up within 10 seconds, their own start included.
ONCE_SECONDS = 7.0
# An instance may be elected while it pauses, and then nobody polls until the pause ends.
MAX_PAUSE_SECONDS = 5.0
JUMP_SECONDS = 2.0
# Without beats a poll of which nothing came, or for which no call may be made, is repeated after this time.
UNHURRIED_SECONDS = 1.0
MOMENT_SECONDS = 0.001
NEVER_RAN, IN_FLIGHT = "no instance was running", "the poll before was still under way"


class Exchange(Protocol):
    """Where responses come from; `fetch` raises ExchangeError if a call gave none, `held` if it was not made."""

    def begin(self, charged_today: int, final: bool) -> None:
        """Start a poll: `charged_today` calls are spent; the day's `final` poll may use the calls kept for it."""

    def fetch(self, call: Call, *, until: float) -> Reply:
        """Return the last state of all shares or rights; calls are repeated until this monotonic time."""

    def renew(self) -> None:
        """Renew the token early if it ends soon."""


class Publication(Protocol):
    """Where polls go, all or nothing; raises PublishError, after which the instance is void."""

    def restore(self) -> State:
        """Fence any older instance, then return what is committed."""

    def require_room_for(self, instant: datetime) -> None:
        """Raise NoRoom if records of this time would not stay."""

    def publish(self, changes: Changes, letters: Sequence[DeadLetter], markers: Sequence[PollMarker]) -> None:
        """Publish one poll in one transaction."""

    def idle(self) -> None:
        """Serve the client's callbacks while nothing is published."""

    def close(self) -> None:
        """Give the instance up."""


class Capture(Protocol):
    """Where the bytes that a poll is made of are kept."""

    def restored(self, state: State) -> None:
        """Keep what the next polls start from."""

    def poll(self, poll_sequence: int, readings: Sequence[Reading], known: Mapping[InstrumentCode, Candle]) -> None:
        """Make the responses durable, how they are read, and what they are compared with."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service runs.

    `always` ignores closed hours. A response with a larger share of bad rows than `max_rejected_share` is not
    published. `max_calls_per_day` is the budget, of which only what is left is measured here.
    """

    profile: Profile = TRADES_REALTIME
    rights: bool = False
    poll_seconds: float = 60.0
    always: bool = False
    calendar: Callable[[], Calendar] = Calendar
    freshness: Freshness = field(default_factory=Freshness)
    max_rejected_share: float = 0.2
    max_calls_per_day: int | None = None


class Producer:
    """Polls an exchange and publishes what changed; what is in memory is only ever what is committed.

    A poll whose publication failed stays in hand, for one term at most: it is published again after what is committed
    was read back, instead of another charged call.
    """

    def __init__(
        self,
        exchange: Exchange,
        publication: Callable[[], Publication],
        settings: Settings,
        clock: Clock,
        *,
        leadership: Election,
        capture: Capture | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._exchange, self._new_publication, self._settings, self._clock = exchange, publication, settings, clock
        self._leadership, self._capture = leadership, capture
        self._reporter = Reporter(monitor or Monitor("producer"), settings.profile.source, lambda: clock.now().date())
        self._monitor, self._metrics, self._log = self._reporter.monitor, self._reporter.metrics, self._reporter.log
        self._beats = Beats(settings.poll_seconds, settings.always, clock.simulated, settings.calendar())
        # While this instance leads: its connection, its term, and what is committed.
        self._publication: Publication | None = None
        self._term: int | None = None
        self._known: dict[InstrumentCode, Candle] = {}
        self._history = History(settings.freshness)
        self._in_hand: Poll | None = None
        self._unpublished: Counter[date] = Counter()
        self._last_started: float | None = None
        self._not_before = 0.0
        # Why beats are missed, and what has been reported already: a bad row once a run and day.
        self._reason, self._dropped = NEVER_RAN, False
        self._pause = 1.0
        self._started = self._published = self._resting = False
        self._standby_turns = 0
        self._lettered: set[tuple[date | None, str]] = set()
        self._memos: Mapping[bool, Memo] = {}
        # Computed at each request: also while the service is stuck.
        self._metrics.session_open.set_function(lambda: settings.calendar().phase(clock.now()) is Phase.OPEN)
        self._metrics.leader.set_function(lambda: self._leadership.leads)
        late = "no poll was published in time"
        self._monitor.check("polls", lambda: late if self._leadership.overdue() else None)

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Stand by until elected, then poll on every beat; return when a stop is requested."""
        # What a poll makes is freed by reference counts; the collector would look through it forty times a poll.
        gc.set_threshold(20_000, 20)
        try:
            while not self._clock.wait(0.0):
                self.alive()
                with self._recovery():
                    if not self._leads():
                        continue
                    if not (seconds := self._due_in()):
                        self.poll()
                        self._exchange.renew()
                        continue
                    if self._publication is not None:
                        self._publication.idle()
                    self._clock.wait(min(seconds, LONGEST_WAIT_SECONDS))
        finally:
            self._close()
            self._leadership.close()
        self._log.info("stopped")

    def run_once(self) -> PollMarker | None:
        """Poll once; raise what fails."""
        try:
            self._connect()
            if (term := self._leadership.term(ONCE_SECONDS)) is None:
                reason = "another instance leads this prefix (or was killed a moment ago)"
                raise ConfigurationError(f"{reason}: leave the polling to it, or stop it first")
            self._take_over(term)
            return self.poll()
        finally:
            self._close()
            self._leadership.close()

    def poll(self) -> PollMarker | None:
        """Publish the poll in hand, or else a new one; return its marker, None if a stop was requested meanwhile."""
        if self._term is None:
            self._take_over(0)
        repeated = self._in_hand is not None
        poll = self._in_hand = self._in_hand or self._fetch(self._term or 0)
        if not poll.answers and self._clock.wait(0.0):
            return None
        marker = self._publish(poll)
        if not repeated:
            self._reason = IN_FLIGHT
        return marker

    def try_out(self, state: State) -> Trial:
        """Poll once and work out what would be published after this state; publish nothing."""
        self._know(state)
        return self._work_out(self._fetch(0))

    def alive(self) -> None:
        """Give a sign of life."""
        self._monitor.beat(ALIVE_SECONDS)

    # --- leading ------------------------------------------------------------------------------------------------------

    def _leads(self) -> bool:
        """Return whether this instance leads and knows what is committed; otherwise stand by, connected."""
        term = self._leadership.term()
        if term is not None and term == self._term:
            return True
        if self._term is not None:
            self._close()
        # Configuration errors show now, and after the election only the state has to be read.
        publication = self._connect()
        if term is None:
            publication.idle()
            term = self._leadership.term(STANDBY_SECONDS)
        if term is None:
            self._stand_by()
            return False
        self._take_over(term)
        return True

    def _stand_by(self) -> None:
        self._leadership.owe(None)
        self._standby_turns += 1
        if self._standby_turns == STANDBY_TURNS:
            self._log.info("standing by", reason="another instance of this prefix leads")
            self._started = True
        if self._started:
            # What this instance saw last is the leader's to report.
            for subject in ("starting", "exchange", "feed"):
                self._monitor.unready(subject, None)

    def _take_over(self, term: int) -> None:
        """Fence the instance that led before, and read what is committed."""
        began, self._standby_turns = self._clock.monotonic(), 0
        publication = self._connect()
        state = publication.restore()
        if self._in_hand is not None:
            self._keep_or_drop(self._in_hand, term, state)
        if state.poll_sequence != self._history.poll_sequence:
            # Another instance polled meanwhile: no call was made since its last marker, not since our poll.
            self._last_started = None
            self._reason = NEVER_RAN if self._reason == IN_FLIGHT else self._reason
        self._know(state)
        self._metrics.foreign_records.inc(state.foreign)
        last, now = self._history.last, self._clock.now()
        self._not_before = 0.0
        if last is not None and self._beats.served(last.requested_at, now) and not self._in_hand:
            self._not_before = self._next_beat()
            self._leadership.owe(self._not_before - self._clock.monotonic())
        if self._capture is not None:
            self._capture.restored(state)
        self._term, self._started = term, True
        self._monitor.unready("starting", None)
        seconds = self._clock.monotonic() - began
        self._metrics.restore_seconds.set(seconds)
        counts = {"instruments": len(self._known), "poll_sequence": state.poll_sequence}
        self._log.info("leadership acquired", term=term, restore_seconds=round(seconds, 2), **counts)

    def _know(self, state: State) -> None:
        self._known, self._history = state.candles, History(self._settings.freshness)
        for marker in state.markers:
            self._history = self._history.after(marker)
        self._history = replace(self._history, poll_sequence=state.poll_sequence)

    def _keep_or_drop(self, poll: Poll, term: int, state: State) -> None:
        """Keep the poll in hand only if it is of this term, was not committed, and nothing later was."""
        if was_committed(poll, state.markers):
            reason = None  # its publication had succeeded
        elif poll.term != term:
            reason = "another term began"
        elif was_overtaken(poll, state.markers):
            reason = "a later poll is committed"
        else:
            return
        self._in_hand = None
        if reason is not None:
            self._dropped = True
            # These calls are billed, although no marker counts them.
            self._unpublished[_day(poll.requested_at)] += len(poll.answers)
            self._log.warning("poll dropped", reason=reason, poll_id=poll.track_ids.get(False))

    def _connect(self) -> Publication:
        if self._publication is None:
            self._publication = self._new_publication()
        return self._publication

    def _close(self) -> None:
        """Give the connection up; what is committed is read back before the next poll."""
        self._term = None
        if self._publication is not None:
            self._publication.close()
            self._publication = None

    @contextmanager
    def _recovery(self) -> Iterator[None]:
        """After a failure give everything up but the poll in hand, and wait; only a mistake at the start is raised."""
        try:
            yield
        except Fenced:
            self._close()
            self._metrics.fenced.inc()
            self._reason = "fenced by another instance"
            self._log.warning("fenced", reason="another instance took over; nothing was published")
            self._leadership.resign()
        except (PublishError, ConfigurationError) as error:
            proven = self._published if isinstance(error, NoRoom) else self._started
            if not (proven or isinstance(error, PublishError | Unreachable)):
                raise
            step = "restore" if self._term is None else "publish"
            self._close()
            self._metrics.failures.labels(step).inc()
            self._reason = f"{step} failed: {error}"
            self._monitor.unready("kafka", self._reason)
            self._log.error(f"{step} failed", error=str(error), wait_seconds=round(self._pause, 1))
            self._clock.wait(self._pause)
            self._pause = min(self._pause * 2, MAX_PAUSE_SECONDS) * random.uniform(0.8, 1.0)  # noqa: S311  # jitter
        else:
            # If the restore fails until the term is given up, waiting for the next term is not success.
            if self._term is not None or self._standby_turns >= STANDBY_TURNS:
                self._monitor.unready("kafka", None)
                self._pause = 1.0

    # --- time ---------------------------------------------------------------------------------------------------------

    def _due_in(self) -> float:
        """Return the seconds until the next poll; 0 if it is due."""
        if self._in_hand is not None:
            return 0.0
        self._beats, now = replace(self._beats, calendar=self._settings.calendar()), self._clock.now()
        self._reporter.known_days(self._beats.calendar.days_known(_day(now)))
        if self._beats.due(now, self._history.final_day):
            if self._resting:
                # A transactional id that rests for a week expires, and closed days can be that many.
                self._resting = False
                self._close()
                self._leadership.owe(0.0)
                return MOMENT_SECONDS
            return max(0.0, self._not_before - self._clock.monotonic())
        # Each new term owes a poll at first.
        self._leadership.owe(None)
        begins = self._beats.calendar.next_session(now)
        if not self._resting:
            self._resting = True
            self._log.info("session closed", next_session=begins.isoformat())
            for subject in ("exchange", "feed"):
                self._monitor.unready(subject, None)
        return max(MOMENT_SECONDS, (begins - now).total_seconds())

    def _next_beat(self) -> float:
        """Return the monotonic time of the next beat."""
        return self._clock.monotonic() + self._clock.seconds_to_beat(self._beats.interval(self._clock.now()))

    def _missed_beats(self, poll: Poll) -> list[datetime]:
        """Return the beats of the open session on which nothing was asked since the last poll."""
        if (last := self._history.last) is None:
            return []
        since = last.requested_at
        if self._last_started is not None and not self._clock.simulated:
            # Elapsed time does not depend on a clock that may have been set.
            since = poll.requested_at - timedelta(seconds=poll.started - self._last_started)
            jump = (since - last.requested_at).total_seconds()
            if abs(jump) > JUMP_SECONDS:
                self._log.warning("the clock was set", by_seconds=round(jump, 1))
        return self._beats.missed(since, poll.requested_at)

    def _is_late(self, poll: Poll) -> bool:
        """Return whether a simulated market was not polled for a while: its own times do not show that."""
        seconds = self._settings.poll_seconds
        if not (self._clock.simulated and seconds and self._history.last):
            return False
        return self._last_started is None or poll.started - self._last_started > 2 * seconds + 5

    # --- one poll -----------------------------------------------------------------------------------------------------

    def _fetch(self, term: int) -> Poll:
        """Call the exchange, and again while the beat lasts if that may help."""
        poll = Poll(term, self._clock.now(), self._clock.monotonic())
        history, now = self._history, poll.requested_at
        self._exchange.begin(self._charged(now), self._beats.final(now, history.final_day, history.polled_day))
        until = self._next_beat()
        for call in (Call.SHARES, Call.RIGHTS) if self._settings.rights else (Call.SHARES,):
            is_right = call is Call.RIGHTS
            self.alive()
            try:
                reply = self._exchange.fetch(call, until=until)
            except ExchangeError as error:
                poll.errors[is_right], poll.track_ids[is_right] = error, error.track_id
            else:
                poll.track_ids[is_right] = reply.track_id
                poll.answers.append(self._answer(reply, is_right))
        return poll

    def _charged(self, now: datetime) -> int:
        """Return how many calls of this Tehran day were charged, as far as this instance knows."""
        return self._history.charged(now) + self._unpublished[_day(now)]

    def _answer(self, reply: Reply, is_right: bool) -> Answer:
        if reply.dated is not None and not self._clock.simulated:
            self._reporter.clocks(clock_skew(reply.requested_at, reply.received_at, reply.dated))
        received_at = self._clock.arrived(reply.received_at, reply.dated)
        reading = Reading(
            poll_sequence=0,
            received_at=received_at,
            dated=reply.dated or received_at,
            session_day=self._beats.calendar.session_day(received_at),
            is_right=is_right,
            track_id=reply.track_id,
            profile=self._settings.profile.name,
        )
        return reply.body, reading

    def _work_out(self, poll: Poll) -> Trial:
        """Return what a poll amounts to, compared with what is committed."""
        missed = self._missed_beats(poll)
        sequence = self._history.poll_sequence + len(missed) + 1
        derived = derive(self._known, poll.numbered(sequence), self._settings.max_rejected_share, self._memos)
        self._memos = derived.memos
        now = self._clock.now()
        next_beat = now + timedelta(seconds=self._next_beat() - self._clock.monotonic())
        timing = Timing(self._beats, now, next_beat, missed, self._reason, self._dropped or self._is_late(poll))
        markers, history = mark(poll, derived, self._history, timing, self._settings.profile.source)
        day = markers[-1].session_day
        new = {row.identity: row.letter for row in derived.rejected if (day, row.identity) not in self._lettered}
        return Trial(derived, markers, list(new.values()), history)

    def _publish(self, poll: Poll) -> PollMarker:
        """Publish a poll in one transaction, and only then take it for known."""
        publication, trial = self._connect(), self._work_out(poll)
        began = self._clock.monotonic()
        derived, marker = trial.derived, trial.markers[-1]
        if derived.snapshot is not None:
            publication.require_room_for(derived.snapshot.received_at)
        if self._capture is not None:
            used = poll.numbered(marker.poll_sequence)
            readings = [reading for _, reading in used if reading.is_right not in derived.errors]
            self._capture.poll(marker.poll_sequence, readings, self._known)
        publication.publish(derived.changes, trial.letters, trial.markers)
        # Committed.
        self._in_hand, self._last_started, self._history = None, poll.started, trial.history
        self._known.update((candle.instrument, candle) for candle in derived.changes.candles)
        self._dropped, self._published = False, True
        today = {each for each in self._lettered if each[0] == marker.session_day}
        self._lettered = today | {(marker.session_day, row.identity) for row in derived.rejected}
        self._not_before = self._next_beat()
        if not self._settings.poll_seconds and derived.snapshot is None:
            self._not_before += UNHURRIED_SECONDS
        self._leadership.owe(max(0.0, self._not_before - self._clock.monotonic()))
        self._reporter.poll(trial, began - poll.started, self._clock.monotonic() - began)
        if (budget := self._settings.max_calls_per_day) is not None:
            self._metrics.calls_left.set(max(0, budget - self._charged(self._clock.now())))
        return marker


def _day(now: datetime) -> date:
    return now.astimezone(TEHRAN).date()
