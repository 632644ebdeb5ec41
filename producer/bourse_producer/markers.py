"""The markers of polls, and what the markers so far amount to: pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any

from msgspec import structs

from bourse_producer.beats import Beats
from bourse_producer.freshness import GOOD, Freshness
from bourse_producer.responses import Answer, Derived
from bourse_schemas.errors import ExchangeError
from bourse_schemas.events import TEHRAN, DeadLetter, FeedState, Op, Outcome, Phase, PollMarker

COUNTS = {"opened": Op.OPENED, "traded": Op.TRADED, "revised": Op.REVISED, "cancelled": Op.CANCELLED}
ODD = ("stale_rows", "rejected_rows", "duplicate_rows")
ZEROS = dict.fromkeys(("rows", "charged_calls", *COUNTS, *ODD), 0) | {"day_final": False}


@dataclass(slots=True)
class Poll:
    """What was asked and what came, in hand until it is published.

    `term` is the leader's, `started` a monotonic time. The poll sequence of the answers is not known yet; `track_ids`
    and `errors` are by whether the call is that of the rights.
    """

    term: int
    requested_at: datetime
    started: float
    answers: list[Answer] = field(default_factory=list)
    track_ids: dict[bool, str | None] = field(default_factory=dict)
    errors: dict[bool, ExchangeError] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Return whether no call was made at all."""
        return not self.answers and bool(self.errors) and all(error.held for error in self.errors.values())

    def numbered(self, poll_sequence: int) -> list[Answer]:
        """Return the answers as those of this poll sequence."""
        return [(body, replace(reading, poll_sequence=poll_sequence)) for body, reading in self.answers]


@dataclass(frozen=True, slots=True)
class History:
    """What the markers of a prefix amount to, one after another.

    `polled_day` is the last day with a good poll in its session, `final_day` the last one with a final poll.
    """

    freshness: Freshness = field(default_factory=Freshness)
    poll_sequence: int = 0
    last: PollMarker | None = None
    last_good_at: datetime | None = None
    final_day: date | None = None
    polled_day: date | None = None
    charged_day: date | None = None
    charged_calls: int = 0

    def after(self, marker: PollMarker) -> History:
        """Return the history with one more marker."""
        good = marker.outcome in GOOD
        in_session = good and marker.phase in {Phase.OPEN, Phase.AFTER_CLOSE}
        day = marker.requested_at.astimezone(TEHRAN).date()
        return History(
            freshness=self.freshness.after(marker),
            poll_sequence=marker.poll_sequence,
            last=marker,
            last_good_at=marker.received_at if good else self.last_good_at,
            final_day=marker.session_day if marker.day_final else self.final_day,
            polled_day=marker.session_day if in_session else self.polled_day,
            charged_day=day,
            charged_calls=marker.charged_calls + (self.charged_calls if day == self.charged_day else 0),
        )

    def charged(self, now: datetime) -> int:
        """Return how many calls of this Tehran day were charged."""
        return self.charged_calls if now.astimezone(TEHRAN).date() == self.charged_day else 0


def was_committed(poll: Poll, markers: Iterable[PollMarker]) -> bool:
    """Return whether one of these markers is the poll's own."""
    ids = {track_id for track_id in poll.track_ids.values() if track_id is not None}
    return any(ids & {marker.poll_id, marker.rights_poll_id} for marker in markers)


def was_overtaken(poll: Poll, markers: Iterable[PollMarker]) -> bool:
    """Return whether a poll that began later, or at the same instant, is committed."""
    return any(marker.requested_at >= poll.requested_at for marker in markers)


@dataclass(frozen=True, slots=True)
class Timing:
    """When a poll is published, and what happened since the last one; `next_beat` is the beat after `now`.

    `missed` are the beats on which no call was made, because of `why`. `dropped` means that a poll was given up.
    """

    beats: Beats
    now: datetime
    next_beat: datetime
    missed: Sequence[datetime] = ()
    why: str = ""
    dropped: bool = False


def mark(
    poll: Poll, derived: Derived, history: History, timing: Timing, source: str
) -> tuple[list[PollMarker], History]:
    """Return the markers of the beats missed and of the poll, in order, and the history after them."""
    beats = timing.beats
    found = []
    for beat in timing.missed:
        moment = beats.moment(beat, beat + timedelta(seconds=beats.poll_seconds), history.final_day)
        error = {"error_kind": "internal", "error_message": timing.why}
        found.append(moment | {"outcome": Outcome.SKIPPED, "requested_at": beat} | error)
    found.append(_fields(poll, derived, history, timing))
    usual: dict[str, Any] = {"source": source, "simulated": beats.simulated, "feed_state": FeedState.UNKNOWN, **ZEROS}
    judged = []
    for fields in found:
        marker = PollMarker(poll_sequence=history.poll_sequence + 1, **(usual | fields))
        judged.append(structs.replace(marker, feed_state=history.freshness.after(marker).state))
        history = history.after(judged[-1])
    return judged, history


def _fields(poll: Poll, derived: Derived, history: History, timing: Timing) -> dict[str, Any]:
    """Return the fields of a poll's marker that differ from poll to poll."""
    snapshot, beats = derived.snapshot, timing.beats
    now = snapshot.received_at if snapshot else timing.now
    errors = dict(sorted({**poll.errors, **derived.errors}.items()))
    # Without the rows of one of two calls the day is not complete.
    final = snapshot is not None and not errors and beats.final(now, history.final_day, history.polled_day)
    moment = beats.moment(now, timing.next_beat, beats.calendar.session_day(now) if final else history.final_day)
    requested_at = min(poll.requested_at, now)
    error = next(iter(errors.values()), None)
    named = "; ".join(f"{'rights' if is_right else 'shares'}: {error}" for is_right, error in errors.items())
    fields = moment | {
        "outcome": Outcome.SKIPPED if poll.held else Outcome.FAILED,
        "requested_at": requested_at,
        "poll_id": poll.track_ids.get(False),
        "rights_poll_id": poll.track_ids.get(True),
        "charged_calls": len(poll.answers),
        "error_kind": error and error.kind,
        "error_code": error and error.code,
        "error_message": error and (named if len(poll.track_ids) > 1 else str(error)),
    }
    if snapshot is None:
        return fields
    failed = history.last is not None and history.last.outcome not in GOOD
    gap = beats.gap(history.last_good_at, requested_at, timing.missed, history.final_day)
    return fields | {
        "outcome": Outcome.PUBLISHED if derived.changes.candles else Outcome.UNCHANGED,
        "received_at": snapshot.received_at,
        "day_final": final,
        "latest_traded_at": max((candle.traded_at for candle in snapshot.candles.values()), default=None),
        "rows": snapshot.rows,
        **{name: derived.changes.count(op) for name, op in COUNTS.items()},
        "stale_rows": derived.changes.stale_rows,
        "rejected_rows": len(snapshot.rejected),
        "duplicate_rows": snapshot.duplicate_rows,
        "gap_from": history.last_good_at if timing.dropped or failed or gap else None,
    }


@dataclass(frozen=True, slots=True)
class Trial:
    """A poll worked out and not published: what it changes, what it leaves, and the history after it."""

    derived: Derived
    markers: Sequence[PollMarker]
    letters: Sequence[DeadLetter]
    history: History
