"""How far the feed can be trusted after a poll: pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta

from bourse_schemas.events import FeedState, Outcome, Phase

__all__ = ["Freshness", "Poll"]

FROZEN_AFTER = timedelta(seconds=180)
# A response with fewer rows than this share of the one before it on the same day is a part of the market.
PARTIAL_BELOW = 0.5


@dataclass(frozen=True, slots=True)
class Poll:
    """What a poll says about freshness; `partial`: one of its calls failed."""

    outcome: Outcome
    phase: Phase
    at: datetime
    session_day: date | None
    rows: int = 0
    latest_traded_day: date | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Freshness:
    """The state after a poll, and what the next judgement needs of the polls before."""

    state: FeedState = FeedState.UNKNOWN
    session_day: date | None = None
    rows: int = 0
    moved_at: datetime | None = None

    def after(self, poll: Poll) -> Freshness:
        """Return the state after one more poll."""
        if poll.outcome in {Outcome.FAILED, Outcome.SKIPPED}:
            return Freshness(FeedState.DOWN, self.session_day, self.rows, self.moved_at)
        # Before the open the exchange empties its table: few rows are no sign of anything then.
        in_session = poll.phase in {Phase.OPEN, Phase.AFTER_CLOSE} and poll.session_day == self.session_day
        short = in_session and poll.rows < PARTIAL_BELOW * self.rows
        # The first poll of an open session starts the clock: what happened before it is not known.
        moved = poll.outcome is Outcome.PUBLISHED or self.moved_at is None or poll.session_day != self.session_day
        moved_at = None if poll.phase is not Phase.OPEN else poll.at if moved else self.moved_at
        state = FeedState.FRESH
        if poll.partial or short:
            state = FeedState.PARTIAL
        elif poll.phase is not Phase.OPEN:
            state = FeedState.IDLE
        elif poll.rows and poll.latest_traded_day != poll.session_day:
            state = FeedState.STALE
        elif moved_at is not None and poll.at - moved_at > FROZEN_AFTER:
            state = FeedState.FROZEN
        return Freshness(state, poll.session_day, max(poll.rows, self.rows if short else 0), moved_at)
