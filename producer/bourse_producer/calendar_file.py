"""The operator's calendar: a file with closures and extra openings, re-read whenever it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bourse_producer.calendar import Calendar, parse_calendar
from bourse_schemas.errors import ConfigurationError

__all__ = ["CalendarFile", "calendar_option"]


class CalendarFile:
    """The calendar as the file has it; an invalid new file is logged once and ignored."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._calendar = Calendar()
        if path is not None:
            try:
                self._seen, self._calendar = self._read(path)
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"--calendar {path}: {_words(error)}") from error

    def calendar(self) -> Calendar:
        """Return the calendar as of now."""
        from bourse_cli.logs import get_logger

        if self._path is not None:
            try:
                if _stamp(self._path) != self._seen:
                    self._seen = _stamp(self._path)
                    self._seen, self._calendar = self._read(self._path)
                    get_logger().info("the calendar has changed", file=str(self._path))
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError) or self._seen is not None:
                    get_logger().error("the calendar stays as it was", file=str(self._path), error=_words(error))
                if isinstance(error, OSError):
                    self._seen = None
        return self._calendar

    @staticmethod
    def _read(path: Path) -> tuple[tuple[int, int], Calendar]:
        stamp = _stamp(path)
        return stamp, parse_calendar(path.read_text("utf-8-sig"))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot read it: {error.strerror}"
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def _open(_: click.Context, __: click.Parameter, path: Path | None) -> CalendarFile:
    return CalendarFile(path)


def calendar_option(command: Any) -> Any:
    """Add `--calendar FILE`; the command gets `calendar_file: CalendarFile`."""
    return click.option(
        "--calendar",
        "calendar_file",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="BOURSE_CALENDAR",
        callback=_open,
        help="Closures, extra openings and hours, in TOML; re-read when it changes.",
    )(command)
