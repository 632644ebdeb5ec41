"""`bourse calendar`: trading days and phases, Gregorian and Jalali; and the operator's calendar file."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import click

from bourse_cli.inputs import read_text
from bourse_cli.logs import get_logger
from bourse_producer.calendar import HOURS, Calendar, parse_calendar, parse_day
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN

MAX_DAYS = 3660
SHOWN_DAYS = 14


class CalendarFile:
    """The calendar of a file with closures and extra openings, read again whenever it is asked for.

    An invalid new file is logged once and ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._fault = path, ""
        self._calendar = Calendar() if path is None else _read(path)

    def calendar(self) -> Calendar:
        """Return the present calendar."""
        if self._path is None:
            return self._calendar
        try:
            found, fault = _read(self._path), ""
        except ConfigurationError as error:
            found, fault = self._calendar, str(error)
        if fault not in {"", self._fault}:
            get_logger().error("calendar file ignored", error=fault)
        elif found != self._calendar:
            get_logger().info("calendar changed", file=str(self._path))
        self._calendar, self._fault = found, fault
        return found


def _read(path: Path) -> Calendar:
    try:
        return parse_calendar(read_text(path, "--calendar"))
    except ValueError as error:
        raise ConfigurationError(f"--calendar {path}: {error}") from error


# Adds `--calendar FILE`; the command gets `calendar_file: CalendarFile`.
calendar_option = click.option(
    "--calendar",
    "calendar_file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="BOURSE_CALENDAR",
    callback=lambda _, __, path: CalendarFile(path),
    help="Closures, extra openings and hours, in TOML; read again when it changes.",
)


@click.command
@click.argument("days", metavar="[DATE|FROM..TO]", required=False)
@calendar_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per day.")
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
    if days is None:
        today = datetime.now(TEHRAN).date()
        return today, today + timedelta(days=SHOWN_DAYS - 1)
    begin, _, end = days.partition("..")
    try:
        first, last = parse_day(begin), parse_day(end or begin)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if not 0 <= (last - first).days < MAX_DAYS:
        raise ConfigurationError(f"{days}: name the earlier day first, and ten years at most")
    return first, last
