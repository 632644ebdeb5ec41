"""What people write: files and durations."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

from bourse_schemas.errors import ConfigurationError

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def read_text(path: Path, origin: str) -> str:
    """Return a file's text, UTF-8 with or without a byte order mark.

    Raises ConfigurationError that begins with `origin`: the option, variable or key that names the file.
    """
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{origin}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{origin}: {path} is not UTF-8 text") from error


def parse_duration(text: str) -> timedelta:
    """Return a duration such as 30s, 5m, 1h or 2d; raise ValueError for anything else and for 0."""
    found = re.fullmatch(r"(\d{1,6})\s*([smhd])", text.strip())
    if found is None or not int(found[1]):
        raise ValueError(f"{text!r} is not a duration such as 30s, 5m, 1h or 2d")
    return timedelta(**{UNITS[found[2]]: int(found[1])})
