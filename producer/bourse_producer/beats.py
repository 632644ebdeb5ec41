"""When polls are due, which beats were missed, and which poll is a day's last: pure.

A beat is an instant at which a poll is due: the multiples of the interval, by this machine's clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

from bourse_producer.calendar import Calendar
from bourse_schemas.events import TEHRAN, Phase

# After the last trade only corrections arrive, until the evening; calls are charged.
SLOW_SECONDS = 300.0
MAX_SKIPPED = 1000
# A poll may begin this long before its beat: clocks are slewed.
TICK_SECONDS = 0.05
# A leader that owes a poll leaves after three beats, four minutes at most; a lawful poll, two calls of 55 s, must fit.
OWED_BEATS, MIN_OWED_SECONDS, MAX_OWED_SECONDS = 3, 130.0, 240.0


@dataclass(frozen=True, slots=True)
class Beats:
    """The beats of a producer: every `poll_seconds`, every five minutes after the last trade, none while it is closed.

    With `always` closed hours are polled like open ones. The time of a `simulated` market passes at another pace than
    the beats: nothing is concluded from a distance between two of its instants.
    """

    poll_seconds: float = 60.0
    always: bool = False
    simulated: bool = False
    calendar: Calendar = field(default_factory=Calendar)

    def interval(self, now: datetime) -> float:
        """Return the seconds from one beat to the next."""
        slow = self.calendar.phase(now) in {Phase.AFTER_CLOSE, Phase.CLOSED} and not self.calendar.trades_at_last(now)
        least = SLOW_SECONDS if slow and not (self.always or self.simulated) else 0.0
        return max(self.poll_seconds, least)

    def owed_seconds(self) -> float:
        """Return for how long a leader may owe a poll."""
        return min(max(OWED_BEATS * self.poll_seconds, MIN_OWED_SECONDS), MAX_OWED_SECONDS)

    def due(self, now: datetime, final_day: date | None) -> bool:
        """Return whether polls take place at this time; `final_day` is the last day that is final."""
        return self.simulated or self._in_session(now, final_day)

    def served(self, last: datetime, now: datetime) -> bool:
        """Return whether a poll that began at `last` was this beat's."""
        interval = self.interval(now)
        return bool(interval) and not self.simulated and _beat(last, interval) == _beat(now, interval)

    def moment(self, now: datetime, beat: datetime, final_day: date | None) -> dict[str, Any]:
        """Return what a marker holds of `now` by the calendar; `beat` is the next one."""
        next_poll_at = beat if self._in_session(beat, final_day) else self.calendar.next_session(beat)
        phase, day = self.calendar.phase(now), self.calendar.session_day(now)
        return {"phase": phase, "session_day": day, "next_poll_at": next_poll_at}

    def missed(self, since: datetime, now: datetime) -> list[datetime]:
        """Return the beats of `now`'s open session between the poll that began at `since` and this one."""
        if not self.poll_seconds or self.simulated:
            return []
        numbers = range(_beat(since, self.poll_seconds) + 1, _beat(now, self.poll_seconds))[-MAX_SKIPPED:]
        beats = (datetime.fromtimestamp(number * self.poll_seconds, UTC) for number in numbers)
        wanted = Phase.OPEN, self.calendar.session_day(now)
        return [beat for beat in beats if (self.calendar.phase(beat), self.calendar.session_day(beat)) == wanted]

    def gap(
        self, last_good_at: datetime | None, now: datetime, missed: Sequence[datetime], final_day: date | None
    ) -> bool:
        """Return whether polls are missing between the last good one and this one, by the calendar."""
        if last_good_at is None or self.calendar.phase(now) is Phase.CLOSED:
            return False
        beat = last_good_at + timedelta(seconds=self.interval(last_good_at))
        due = beat if self._in_session(beat, final_day) else self.calendar.next_session(beat)
        late = now > due + timedelta(seconds=self.poll_seconds / 2 + 5)
        return bool(missed) or (late and not self.simulated)

    def final(self, now: datetime, final_day: date | None, polled_day: date | None) -> bool:
        """Return whether a good poll of this time is its day's last: the first one at or after the end of corrections.

        `polled_day` is the last day that was polled in its session: the next morning no other one is called final.
        """
        day = self.calendar.session_day(now)
        if day is None or (final_day is not None and final_day >= day):
            return False
        corrected = datetime.combine(day, self.calendar.corrected_until, TEHRAN)
        return now >= corrected and (self.calendar.phase(now) is Phase.CLOSED or polled_day == day)

    def _in_session(self, now: datetime, final_day: date | None) -> bool:
        return self.always or self.calendar.phase(now) is not Phase.CLOSED or self._owes_final(now, final_day)

    def _owes_final(self, now: datetime, final_day: date | None) -> bool:
        """Return whether today's final poll is still to come: the exchange shows the day until midnight."""
        day = self.calendar.session_day(now)
        today = day is not None and day == now.astimezone(TEHRAN).date()
        return today and self.final(now, final_day, day)


def _beat(at: datetime, interval: float) -> int:
    return math.floor((at.timestamp() + TICK_SECONDS) / interval)
