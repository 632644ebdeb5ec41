"""How far the feed can be trusted after a poll: a pure state machine over markers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta

from bourse_schemas.events import TEHRAN, FeedState, Outcome, Phase, PollMarker

GOOD = frozenset({Outcome.PUBLISHED, Outcome.UNCHANGED})


@dataclass(frozen=True, slots=True)
class Freshness:
    """The state after a poll, and what the next judgement needs of the polls before.

    FROZEN is an open session in which nothing changed for `frozen_after`. PARTIAL is a poll of which a call failed, or
    with fewer rows than `partial_below` of those of the poll before it on the same day, stale ones not counted. STALE
    is a poll of an open session whose rows are all of another day, or all older than what is known.
    """

    frozen_after: timedelta = timedelta(seconds=180)
    partial_below: float = 0.5
    state: FeedState = FeedState.UNKNOWN
    session_day: date | None = None
    rows: int = 0
    moved_at: datetime | None = None

    def after(self, marker: PollMarker) -> Freshness:
        """Return the state after one more poll, whatever its marker itself names."""
        if marker.outcome not in GOOD:
            return replace(self, state=FeedState.DOWN)
        same_day = marker.session_day == self.session_day
        # Before the open the exchange empties its table: few rows mean nothing then.
        in_session = marker.phase in {Phase.OPEN, Phase.AFTER_CLOSE}
        short = in_session and same_day and marker.rows < self.partial_below * self.rows
        moved_at = self._moved_at(marker, same_day)
        state = FeedState.FRESH
        if marker.phase is Phase.OPEN and _is_stale(marker):
            state = FeedState.STALE
        elif marker.error_kind is not None or short:
            state = FeedState.PARTIAL
        elif marker.phase is not Phase.OPEN:
            state = FeedState.IDLE
        # Beats are whole seconds apart, but for the moment it takes to act on them.
        elif moved_at and round((marker.requested_at - moved_at).total_seconds()) >= self.frozen_after.total_seconds():
            state = FeedState.FROZEN
        # Stale rows do not show how many rows a whole response has.
        rows = max(marker.rows - marker.stale_rows, self.rows if short else 0)
        if state is FeedState.STALE:
            rows = self.rows if same_day else 0
        return replace(self, state=state, session_day=marker.session_day, rows=rows, moved_at=moved_at)

    def _moved_at(self, marker: PollMarker, same_day: bool) -> datetime | None:
        """Return when the open session's market last moved; its first poll, and a clock set back, begin again."""
        if marker.phase is not Phase.OPEN:
            return None
        at, before = marker.requested_at, self.moved_at
        begins = before is None or not same_day or at < before
        return at if begins or marker.outcome is Outcome.PUBLISHED else before


def _is_stale(marker: PollMarker) -> bool:
    latest = marker.latest_traded_at
    other_day = latest is not None and latest.astimezone(TEHRAN).date() != marker.session_day
    usable = marker.rows - marker.rejected_rows - marker.duplicate_rows
    return other_day or 0 < usable <= marker.stale_rows
