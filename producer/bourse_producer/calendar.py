"""The Tehran exchange's trading days and the phases of a session: pure, all of it configuration."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from typing import Any, cast

from bourse_schemas.errors import did_you_mean
from bourse_schemas.events import TEHRAN, Phase

DAY = timedelta(days=1)
# From the year after on the lunar holidays of the package are estimates.
LUNAR_KNOWN_UNTIL = date(2026, 12, 31)
# Longer than any run of closed days (Nowruz with its weekends).
HORIZON_DAYS = 30
# In the order of Python's numbers.
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
A_DATE = "a date like 2026-12-05 or 1405-09-14"
HOURS = ("pre_opens", "opens", "closes", "at_last_until", "corrected_until")


@cache
def _holidays() -> Mapping[date, str]:
    import holidays

    # Asked for one country the package imports all 250: 14 MB more at the peak of the producer's memory.
    spec = spec_from_file_location("holidays_iran", f"{holidays.__path__[0]}/countries/iran.py")
    try:
        module = module_from_spec(spec)  # type: ignore[arg-type]  # a .py file has one, and a loader
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return cast("Mapping[date, str]", module.Iran())
    except (FileNotFoundError, AttributeError):  # another version keeps it elsewhere
        return holidays.country_holidays("IR")


def official_holiday(day: date) -> str | None:
    """Return the name of the official Iranian holiday on this day (lunar ones are estimated from 2027 on)."""
    return _holidays().get(day)


@dataclass(frozen=True, slots=True)
class Calendar:
    """Trading days and, in Tehran's local time, the phases of a session.

    `weekdays` are Python's (Monday is 0). Continuous trading is [opens, closes); trading at the last price ends at
    `at_last_until`; corrections arrive until `corrected_until`. `closed` and `opened` are days by name.
    """

    weekdays: frozenset[int] = frozenset({5, 6, 0, 1, 2})
    pre_opens: time = time(8, 45)
    opens: time = time(9)
    closes: time = time(12, 30)
    at_last_until: time = time(13)
    corrected_until: time = time(17)
    closed: frozenset[date] = frozenset()
    opened: frozenset[date] = frozenset()
    known_until: date = LUNAR_KNOWN_UNTIL
    holiday: Callable[[date], str | None] = official_holiday

    def is_trading_day(self, day: date) -> bool:
        """Return whether the exchange trades on this day."""
        return self.why_closed(day) is None

    def why_closed(self, day: date) -> str | None:
        """Return why the exchange does not trade on this day, None if it does."""
        if day in self.opened:
            return None
        if day in self.closed:
            return "closed at short notice"
        return "weekend" if day.weekday() not in self.weekdays else self.holiday(day)

    def days_known(self, today: date) -> int:
        """Return for how many days from today on holidays are more than estimates."""
        return (self.known_until - today).days

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
        """Return whether trades, at whatever price, can still happen in this session."""
        return now.astimezone(TEHRAN).time() < self.at_last_until

    def next_session(self, now: datetime) -> datetime:
        """Return when the next session's pre-open begins, after `now`, in UTC."""
        local = now.astimezone(TEHRAN)
        first = local.date() if local.time() < self.pre_opens else local.date() + DAY
        days = (first + DAY * ahead for ahead in range(HORIZON_DAYS))
        day = next((day for day in days if self.is_trading_day(day)), first)
        return datetime.combine(day, self.pre_opens, TEHRAN).astimezone(UTC)


def parse_day(text: str) -> date:
    """Return the day of YYYY-MM-DD, Gregorian, or Jalali if the year is below 1700; raise ValueError."""
    from persiantools.jdatetime import JalaliDate

    try:
        year, month, day = map(int, re.split("[-/]", text))
        gregorian: date = date(year, month, day) if year >= 1700 else JalaliDate(year, month, day).to_gregorian()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{text!r} is not {A_DATE}") from None
    return gregorian


# The keys of an operator's file: the calendar's field, how a value is read, and what it must be.
KEYS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "closed": ("closed", parse_day, A_DATE),
    "open": ("opened", parse_day, A_DATE),
    "weekdays": ("weekdays", WEEKDAYS.index, f"one of {', '.join(WEEKDAYS)}"),
    "known_until": ("known_until", parse_day, A_DATE),
    **{f"hours.{name}": (name, time.fromisoformat, "a time like 08:45") for name in HOURS},
}
LISTS = {"closed", "open", "weekdays"}


def parse_calendar(text: str) -> Calendar:
    """Return the usual calendar as an operator's file changes it; raise ValueError that names the mistake."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from None
    hours = given.pop("hours", {})
    if not isinstance(hours, dict):
        raise ValueError("hours must be a table")
    changes: dict[str, Any] = {}
    for key, value in (given | {f"hours.{name}": value for name, value in hours.items()}).items():
        if key not in KEYS:
            raise ValueError(f"unknown key {key}{did_you_mean(key, KEYS)}")
        if key in LISTS and not isinstance(value, list):
            raise ValueError(f"{key} must be a list")
        changes[KEYS[key][0]] = frozenset(_parse(key, each) for each in value) if key in LISTS else _parse(key, value)
    calendar = Calendar(**changes)
    if both := calendar.closed & calendar.opened:
        raise ValueError(f"{min(both)} is both closed and open: leave one out")
    for before, after in pairwise(HOURS):
        if getattr(calendar, before) > getattr(calendar, after):
            raise ValueError(f"hours.{after} comes before hours.{before}")
    return calendar


def _parse(key: str, value: object) -> Any:
    _, parse, expected = KEYS[key]
    try:
        # TOML has dates and times of its own.
        return parse(str(value).lower())
    except ValueError:
        raise ValueError(f"{key}: {value!r} is not {expected}") from None
