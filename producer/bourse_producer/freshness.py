"""How far the feed can be trusted after a poll: a pure state machine over markers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta

from bourse_schemas.events import TEHRAN, FeedState, Outcome, Phase, PollMarker

__all__ = ["GOOD", "Freshness"]

GOOD = frozenset({Outcome.PUBLISHED, Outcome.UNCHANGED})


@dataclass(frozen=True, slots=True)
class Freshness:
    """The state after a poll, and what the next judgement needs of the polls before.

    FROZEN is an open session in which nothing changed for `frozen_after`. PARTIAL is a poll of which a call failed, or
    with fewer rows than `partial_below` of those of the poll before it on the same day.
    """

    frozen_after: timedelta = timedelta(seconds=180)
    partial_below: float = 0.5
    state: FeedState = FeedState.UNKNOWN
    session_day: date | None = None
    rows: int = 0
    moved_at: datetime | None = None

    def after(self, marker: PollMarker) -> Freshness:
        """Return the state after one more poll, whatever its marker itself says of it."""
        if marker.outcome not in GOOD:
            return replace(self, state=FeedState.DOWN)
        # Before the open the exchange empties its table: few rows are no sign of anything then.
        in_session = marker.phase in {Phase.OPEN, Phase.AFTER_CLOSE} and marker.session_day == self.session_day
        short = in_session and marker.rows < self.partial_below * self.rows
        # The first poll of an open session starts the clock: what happened before it is not known.
        moved = marker.outcome is Outcome.PUBLISHED or self.moved_at is None or marker.session_day != self.session_day
        at = marker.requested_at
        moved_at = None if marker.phase is not Phase.OPEN else at if moved else self.moved_at
        state = FeedState.FRESH
        if marker.error_kind is not None or short:
            state = FeedState.PARTIAL
        elif marker.phase is not Phase.OPEN:
            state = FeedState.IDLE
        elif marker.latest_traded_at is not None and _tehran_day(marker.latest_traded_at) != marker.session_day:
            state = FeedState.STALE
        # Beats are whole seconds apart, but for the moment it takes to act on them.
        elif moved_at is not None and round((at - moved_at).total_seconds()) >= self.frozen_after.total_seconds():
            state = FeedState.FROZEN
        rows = max(marker.rows, self.rows if short else 0)
        return replace(self, state=state, session_day=marker.session_day, rows=rows, moved_at=moved_at)


def _tehran_day(instant: datetime) -> date:
    return instant.astimezone(TEHRAN).date()
