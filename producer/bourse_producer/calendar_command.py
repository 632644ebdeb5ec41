"""`bourse calendar`: trading days and phases, Gregorian and Jalali."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import click

from bourse_producer.calendar import HOURS, TEHRAN, parse_day
from bourse_producer.calendar_file import CalendarFile, calendar_option
from bourse_schemas.errors import ConfigurationError

__all__ = ["calendar"]

MOST_DAYS = 3660
SHOWN_DAYS = 14


@click.command
@click.argument("days", metavar="[DATE|FROM..TO]", required=False)
@calendar_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a day.")
def calendar(days: str | None, calendar_file: CalendarFile, *, as_json: bool) -> None:
    """Show trading days; a DATE is Gregorian or Jalali, such as 2026-12-05 or 1405-09-14."""
    from persiantools.jdatetime import JalaliDate

    known = calendar_file.calendar()
    first, last = _range(days)
    for number in range((last - first).days + 1):
        day = first + timedelta(days=number)
        why = known.why_closed(day)
        jalali = str(JalaliDate(day))  # type: ignore[no-untyped-call]
        if as_json:
            shown = {"date": f"{day}", "jalali": jalali, "weekday": f"{day:%A}", "open": why is None, "why_closed": why}
            click.echo(json.dumps(shown, ensure_ascii=False))
        else:
            extra = "open, an extra trading day" if day in known.opened else "open"
            extra += " (holidays not known yet)" * (day > known.known_until)
            click.echo(f"{day}  {jalali}  {day:%A}".ljust(36) + (f"closed: {why}" if why else extra))
    if not as_json:
        hours = ", ".join(f"{name.replace('_', ' ')} {getattr(known, name):%H:%M}" for name in HOURS)
        phase = known.phase(datetime.now(UTC)).value.replace("_", " ").lower()
        click.echo(f"\nTehran time: {hours}; now, at {datetime.now(TEHRAN):%H:%M}: {phase}.")
        click.echo(f"Holidays are known until {known.known_until}; lunar ones after that are estimates.")


def _range(days: str | None) -> tuple[date, date]:
    try:
        if days is None:
            today = datetime.now(TEHRAN).date()
            return today, today + timedelta(days=SHOWN_DAYS - 1)
        begin, dots, end = days.partition("..")
        first = parse_day(begin)
        last = parse_day(end) if dots else first
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if not 0 <= (last - first).days < MOST_DAYS:
        raise ConfigurationError(f"{days}: give the earlier day first, and ten years at most")
    return first, last
