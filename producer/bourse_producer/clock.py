"""Time, injected: the real clock, or that of a practice market as its responses report it."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

__all__ = ["Clock", "PracticeClock", "SystemClock"]


class Clock(Protocol):
    """The market's time, the time that nobody sets, and waiting."""

    def now(self) -> datetime:
        """Return the market's time: UTC, whole milliseconds."""

    def monotonic(self) -> float:
        """Return seconds of a clock that never jumps."""

    def wait(self, seconds: float) -> bool:
        """Wait, or until a stop is requested; return whether it was."""


class SystemClock:
    """This machine's clock; `stop` ends every wait."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def now(self) -> datetime:
        """Return the time, cut to milliseconds as the events hold it."""
        now = datetime.fromtimestamp(time.time(), UTC)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)

    def monotonic(self) -> float:
        """Return the monotonic clock's seconds."""
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        """Wait at most this long; return True as soon as a stop is requested."""
        return self._stop.wait(max(0.0, seconds))


class PracticeClock(SystemClock):
    """The time of a simulated market: this machine's, moved by what the last response's Date header told."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(stop)
        self.offset = timedelta()

    def now(self) -> datetime:
        """Return the simulated time."""
        return super().now() + self.offset
