"""The most memory that this process had resident."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["peak_mb"]


def peak_mb(process: int | str = "self") -> float | None:
    """Return megabytes (2^20); None where there is no /proc: what else there is counts the parent's memory too."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text("utf-8"), re.MULTILINE) if status.exists() else None
    return int(found[1]) / 1024 if found else None
