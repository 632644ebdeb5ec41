"""The Tehran exchange's trading days and the phases of a session: pure, all of it configuration."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from zoneinfo import ZoneInfo

from bourse_schemas.events import Phase

__all__ = ["TEHRAN", "Calendar", "official_holiday"]

TEHRAN = ZoneInfo("Asia/Tehran")
DAY = timedelta(days=1)
# Longer than any run of closed days (Nowruz with its weekends).
HORIZON_DAYS = 30


@cache
def _holidays() -> Callable[[date], bool]:
    import holidays

    # Asked for one country the package imports all 250: 14 MB more at the peak of the producer's memory.
    spec = spec_from_file_location("holidays_iran", f"{holidays.__path__[0]}/countries/iran.py")
    try:
        module = module_from_spec(spec) if spec else None
        if spec is None or spec.loader is None or module is None:
            raise FileNotFoundError
        spec.loader.exec_module(module)
        days: Container[date] = module.Iran()
    except FileNotFoundError:  # kept elsewhere by another version: dearer, and right
        days = holidays.country_holidays("IR")
    return days.__contains__


def official_holiday(day: date) -> bool:
    """Say whether the day is an official Iranian holiday (lunar ones are estimated from 2027 on)."""
    return _holidays()(day)


@dataclass(frozen=True, slots=True)
class Calendar:
    """Trading days and, in Tehran's local time, the phases of a session.

    `weekdays` are Python's (Monday is 0). Continuous trading is [opens, closes); trading at the last price ends at
    `at_last_until`; corrections arrive until `corrected_until`.
    """

    weekdays: frozenset[int] = frozenset({5, 6, 0, 1, 2})
    pre_opens: time = time(8, 45)
    opens: time = time(9)
    closes: time = time(12, 30)
    at_last_until: time = time(13)
    corrected_until: time = time(17)
    is_holiday: Callable[[date], bool] = official_holiday

    def is_trading_day(self, day: date) -> bool:
        """Say whether the exchange trades on this day."""
        return day.weekday() in self.weekdays and not self.is_holiday(day)

    def phase(self, now: datetime) -> Phase:
        """Return the phase of the session at an aware instant."""
        local = now.astimezone(TEHRAN)
        clock = local.time()
        if not self.pre_opens <= clock < self.corrected_until or not self.is_trading_day(local.date()):
            return Phase.CLOSED
        if clock < self.opens:
            return Phase.PRE_OPEN
        return Phase.OPEN if clock < self.closes else Phase.AFTER_CLOSE

    def session_day(self, now: datetime) -> date | None:
        """Return the latest trading day whose continuous session had begun, None if there was none in a month."""
        local = now.astimezone(TEHRAN)
        today = local.date() if local.time() >= self.opens else local.date() - DAY
        days = (today - DAY * back for back in range(HORIZON_DAYS))
        return next((day for day in days if self.is_trading_day(day)), None)

    def trades_at_last(self, now: datetime) -> bool:
        """Say whether trades, at whatever price, can still happen in this session."""
        return now.astimezone(TEHRAN).time() < self.at_last_until

    def next_session(self, now: datetime) -> datetime:
        """Return when the next session's pre-open begins, after `now`, in UTC."""
        local = now.astimezone(TEHRAN)
        first = local.date() if local.time() < self.pre_opens else local.date() + DAY
        days = (first + DAY * ahead for ahead in range(HORIZON_DAYS))
        day = next((day for day in days if self.is_trading_day(day)), first)
        return datetime.combine(day, self.pre_opens, TEHRAN).astimezone(UTC)
