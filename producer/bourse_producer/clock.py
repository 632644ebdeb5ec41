"""Time, injected: the real clock, or that of a practice market as its responses report it."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

# Linux counts the time in which the machine was suspended only here.
BOOT_TIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# A wait may end this long before its beat: clocks are slewed.
TICK_SECONDS = 0.05


def to_millis(instant: datetime) -> datetime:
    """Cut an instant to milliseconds, as the events hold it."""
    return instant.replace(microsecond=instant.microsecond // 1000 * 1000)


class Clock:
    """The market's time, elapsed time, and waiting: this machine's; `stop` ends every wait."""

    simulated = False

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._stop = stop or threading.Event()

    def now(self) -> datetime:
        """Return the market's time: UTC, cut to milliseconds as the events hold it."""
        return to_millis(datetime.fromtimestamp(time.time(), UTC))

    def monotonic(self) -> float:
        """Return seconds of a clock that is never set; the time of a suspended machine counts."""
        return time.clock_gettime(BOOT_TIME)

    def wait(self, seconds: float) -> bool:
        """Wait at most this long; return True as soon as a stop is requested."""
        return self._stop.wait(max(0.0, seconds))

    def seconds_to_beat(self, interval: float) -> float:
        """Return the seconds until the next multiple of the interval; one that is all but reached does not count."""
        return interval - (time.time() + TICK_SECONDS) % interval + TICK_SECONDS if interval else 0.0

    def arrived(self, received_at: datetime, dated: datetime | None) -> datetime:  # noqa: ARG002  # that of a practice market
        """Return when the response arrived: our clock counts, whatever the sender's is."""
        return to_millis(received_at)


class PracticeClock(Clock):
    """The time of a simulated market: this machine's, moved to the Date header of the last response."""

    simulated = True

    def __init__(self, stop: threading.Event | None = None) -> None:
        super().__init__(stop)
        self.offset = timedelta()

    def now(self) -> datetime:
        """Return the simulated time."""
        return super().now() + self.offset

    def arrived(self, received_at: datetime, dated: datetime | None) -> datetime:
        """Return when the response was dated, and let the market's time go on from there."""
        if dated is None:
            return to_millis(received_at)
        self.offset = dated - super().now()
        return to_millis(dated)
