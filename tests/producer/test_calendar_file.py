"""Closures and extra openings at a day's notice, and the command that shows the calendar."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time
from pathlib import Path

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from bourse_producer.calendar import Calendar, parse_calendar, parse_day
from bourse_producer.calendar_command import CalendarFile, calendar
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN, Phase

SATURDAY, THURSDAY = date(2026, 12, 5), date(2026, 12, 10)
GOOD = """
closed = [2026-12-05]
open = ["1405-09-19"]
known_until = 2027-03-20
[hours]
opens = "09:30"
closes = 12:45:00
"""


def test_closures_and_openings() -> None:
    """A closed Saturday, an open Thursday, other hours; the rest is as usual."""
    known = parse_calendar(GOOD)
    assert (known.is_trading_day(SATURDAY), known.why_closed(SATURDAY)) == (False, "closed at short notice")
    assert (parse_day("1405-09-19"), known.is_trading_day(THURSDAY)) == (THURSDAY, True)
    assert (known.opens, known.closes, known.pre_opens) == (time(9, 30), time(12, 45), Calendar().pre_opens)
    assert known.why_closed(date(2026, 12, 11)) == "weekend"
    assert known.why_closed(date(2026, 3, 21)) not in {None, "weekend"}
    at_ten = datetime.combine(THURSDAY, time(10), TEHRAN).astimezone(UTC)
    assert (known.phase(at_ten), Calendar().phase(at_ten)) == (Phase.OPEN, Phase.CLOSED)
    assert known.days_known(date(2027, 3, 1)) == 19
    assert Calendar().days_known(date(2026, 12, 1)) == 30
    assert parse_calendar("weekdays = ['Sunday']").weekdays == {6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("closed = [", "not TOML"),
        ("closed = 2026-12-05", "closed must be a list"),
        ("closed = ['soon']", "closed: 'soon' is not a date like 2026-12-05 or 1405-09-14"),
        ("closed = ['1405-13-01']", "closed: '1405-13-01' is not a date like"),
        ("closed = [2026-12-05]\nopen = [2026-12-05]", "2026-12-05 is both closed and open"),
        ("close = []", "unknown key close; did you mean closed?"),
        ("hours = 5", "hours must be a table"),
        ("[hours]\nopen = '09:00'", "unknown key hours.open; did you mean hours.opens?"),
        ("[hours]\nopens = 'nine'", "hours.opens: 'nine' is not a time like 08:45"),
        ("[hours]\nopens = '13:30'", "hours.closes comes before hours.opens"),
        ("weekdays = ['Someday']", "weekdays: 'Someday' is not one of monday"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    """With the key; at the start they are the operator's to change."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_calendar(text)
    assert message in str(caught.value)
    file = tmp_path / "calendar.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"--calendar .*calendar\.toml: "):
        CalendarFile(file)


def test_a_changed_file_counts_at_once_and_a_bad_one_not_at_all(tmp_path: Path) -> None:
    """Without a restart; the old calendar stays if the new file cannot be used, which is logged once."""
    file = tmp_path / "calendar.toml"
    file.write_text("")
    kept = CalendarFile(file)
    assert kept.calendar().is_trading_day(SATURDAY)
    file.write_text("closed = [2026-12-05]")
    assert not kept.calendar().is_trading_day(SATURDAY)
    with capture_logs() as lines:
        file.write_text("closed = [2026-12-05")
        for _ in range(3):
            assert not kept.calendar().is_trading_day(SATURDAY)
        file.unlink()
        for _ in range(3):
            assert not kept.calendar().is_trading_day(SATURDAY)
    assert [line["event"] for line in lines] == ["calendar file ignored"] * 2
    file.write_text("closed = []")
    assert kept.calendar().is_trading_day(SATURDAY)
    assert CalendarFile(None).calendar() == Calendar()
    with pytest.raises(ConfigurationError, match="cannot read"):
        CalendarFile(tmp_path / "missing.toml")


def test_the_command(tmp_path: Path) -> None:
    """Days with both dates, open or why not; phases and the end of what is known below."""
    file = tmp_path / "calendar.toml"
    file.write_text(GOOD)
    shown = CliRunner().invoke(calendar, ["2026-12-04..1405-09-19", "--calendar", str(file)])
    lines = shown.output.splitlines()
    assert shown.exit_code == 0
    assert lines[0].split() == ["2026-12-04", "1405-09-13", "Friday", "closed:", "weekend"]
    assert lines[1].split()[:3] == ["2026-12-05", "1405-09-14", "Saturday"]
    assert lines[1].endswith("closed: closed at short notice")
    assert lines[6].endswith("open, an extra trading day")
    assert "opens 09:30, closes 12:45" in shown.output
    assert "known until 2027-03-20" in lines[-1]
    objects = CliRunner().invoke(calendar, ["2026-12-05", "--json"]).output
    assert json.loads(objects) == {
        "date": "2026-12-05",
        "jalali": "1405-09-14",
        "weekday": "Saturday",
        "open": True,
        "why_closed": None,
    }
    assert len(CliRunner().invoke(calendar, []).output.splitlines()) == 17


@pytest.mark.parametrize("days", ["yesterday", "2026-12-05..2026-12-01", "2026-02-30", "1000-01-01..2026-01-01"])
def test_the_command_and_bad_days(days: str) -> None:
    """One line says what a day looks like."""
    assert isinstance(CliRunner().invoke(calendar, [days]).exception, ConfigurationError)
