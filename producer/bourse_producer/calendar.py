"""The Tehran exchange's trading days and the phases of a session: pure, all of it configuration."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from difflib import get_close_matches
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from typing import Any

from bourse_schemas.events import TEHRAN, Phase

__all__ = ["HOURS", "TEHRAN", "Calendar", "parse_calendar", "parse_day"]

DAY = timedelta(days=1)
# From the year after on the lunar holidays of the package are estimates.
LUNAR_KNOWN_UNTIL = date(2026, 12, 31)
# Longer than any run of closed days (Nowruz with its weekends).
HORIZON_DAYS = 30


# Python's numbers of them.
WEEKDAYS = {"monday": 0, "tuesday": 1, "wednesday": 2, "thursday": 3, "friday": 4, "saturday": 5, "sunday": 6}
HOURS = ("pre_opens", "opens", "closes", "at_last_until", "corrected_until")


@cache
def _holidays() -> Mapping[date, str]:
    import holidays

    # Asked for one country the package imports all 250: 14 MB more at the peak of the producer's memory.
    spec = spec_from_file_location("holidays_iran", f"{holidays.__path__[0]}/countries/iran.py")
    try:
        module = module_from_spec(spec) if spec else None
        if spec is None or spec.loader is None or module is None:
            raise FileNotFoundError
        spec.loader.exec_module(module)
        days: Mapping[date, str] = module.Iran()
    except FileNotFoundError:  # kept elsewhere by another version: dearer, and right
        days = holidays.country_holidays("IR")
    return days


def official_holiday(day: date) -> str | None:
    """Return the name of the official Iranian holiday on this day (lunar ones are estimated from 2027 on)."""
    return _holidays().get(day)


@dataclass(frozen=True, slots=True)
class Calendar:
    """Trading days and, in Tehran's local time, the phases of a session.

    `weekdays` are Python's (Monday is 0). Continuous trading is [opens, closes); trading at the last price ends at
    `at_last_until`; corrections arrive until `corrected_until`. `closed` and `opened` are days told at short notice.
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
        """Say whether the exchange trades on this day."""
        return self.why_closed(day) is None

    def why_closed(self, day: date) -> str | None:
        """Return why the exchange does not trade on this day, None where it does."""
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
        """Say whether trades, at whatever price, can still happen in this session."""
        return now.astimezone(TEHRAN).time() < self.at_last_until

    def next_session(self, now: datetime) -> datetime:
        """Return when the next session's pre-open begins, after `now`, in UTC."""
        local = now.astimezone(TEHRAN)
        first = local.date() if local.time() < self.pre_opens else local.date() + DAY
        days = (first + DAY * ahead for ahead in range(HORIZON_DAYS))
        day = next((day for day in days if self.is_trading_day(day)), first)
        return datetime.combine(day, self.pre_opens, TEHRAN).astimezone(UTC)


def parse_day(text: str) -> date:
    """Return the day of YYYY-MM-DD, Gregorian, or Jalali where the year is below 1700; raise ValueError."""
    found = re.fullmatch(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})", text.strip())
    try:
        year, month, day = (int(part) for part in found.groups()) if found else (0, 0, 0)
        if year >= 1700:
            return date(year, month, day)
        from persiantools.jdatetime import JalaliDate

        gregorian: date = JalaliDate(year, month, day).to_gregorian()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, OverflowError):
        why = "there is no such day" if found else "it is no day such as 2026-12-05 or 1405-09-14"
        raise ValueError(f"{text!r}: {why}") from None
    return gregorian


def parse_calendar(text: str) -> Calendar:
    """Return the calendar that a file of the operator's makes of the usual one; raise ValueError with what is wrong."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    hours = _require(given.pop("hours", {}), dict, "hours")
    closed, opened = (frozenset(_days(given.pop(name, []), name)) for name in ("closed", "open"))
    if both := closed & opened:
        raise ValueError(f"{min(both)} is both closed and open: leave one out")
    changes: dict[str, Any] = {"closed": closed, "opened": opened}
    if "weekdays" in given:
        named = _require(given.pop("weekdays"), list, "weekdays")
        if unknown := [each for each in named if str(each).lower() not in WEEKDAYS]:
            raise ValueError(f"weekdays: {unknown[0]!r} is none of {', '.join(WEEKDAYS)}")
        changes["weekdays"] = frozenset(WEEKDAYS[str(each).lower()] for each in named)
    if "known_until" in given:
        changes["known_until"] = _days([given.pop("known_until")], "known_until")[0]
    _no_others(given, ["closed", "open", "hours", "weekdays", "known_until"], "")
    for name in HOURS:
        if name in hours:
            value = hours.pop(name)
            try:
                changes[name] = value if isinstance(value, time) else time.fromisoformat(str(value))
            except ValueError:
                raise ValueError(f"hours.{name}: {value!r} is no time such as 08:45") from None
    _no_others(hours, list(HOURS), "hours.")
    calendar = Calendar(**changes)
    for before, after in pairwise(HOURS):
        if getattr(calendar, before) > getattr(calendar, after):
            raise ValueError(f"hours.{after} comes before hours.{before}")
    return calendar


def _days(given: Any, name: str) -> list[date]:
    days = []
    for each in _require(given, list, name):
        try:
            is_day = isinstance(each, date) and not isinstance(each, datetime)
            days.append(each if is_day else parse_day(str(each)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return days


def _require(given: Any, kind: type, name: str) -> Any:
    if not isinstance(given, kind):
        raise ValueError(f"{name} must be {'a list' if kind is list else 'a table'}")
    return given


def _no_others(given: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in given:
        near = get_close_matches(name, known, 1)
        raise ValueError(f"unknown key {where}{name}" + (f": is {where}{near[0]} meant?" if near else ""))
