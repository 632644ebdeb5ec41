"""What the service reports of itself: a log line and metrics per poll, and why it is not ready."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_producer.markers import COUNTS, ODD, Trial
from bourse_schemas.events import FeedState, Outcome

KNOWN_DAYS = 30
# Two clocks kept by NTP may differ by this much.
SKEW_SECONDS = 1.0


class Reporter:
    """Writes the log and the metrics of one service; `today` returns the date that daily warnings go by."""

    def __init__(self, monitor: Monitor, source: str, today: Callable[[], date]) -> None:
        self.monitor, self.metrics, self._today = monitor, monitor.producer, today
        self.log = get_logger(source=source)
        self._warned: dict[str, date] = {}

    def known_days(self, days: int) -> None:
        """Report for how many days holidays are known."""
        self.metrics.calendar_days_known.set(days)
        if days < KNOWN_DAYS:
            self._warn_daily("calendar ends soon", days=days, advice="add the next holidays to --calendar")

    def clocks(self, skew: float) -> None:
        """Report by how many seconds at least the exchange's clock is ahead of ours."""
        self.metrics.clock_skew.set(skew)
        if abs(skew) > SKEW_SECONDS:
            self._warn_daily("clocks differ", seconds=round(skew), advice="synchronise this machine's clock by NTP")

    def poll(self, trial: Trial, fetch_seconds: float, publish_seconds: float) -> None:
        """Log a published poll in one line, in which what is zero is left out, and measure it."""
        marker = trial.markers[-1]
        odd = dict(trial.derived.snapshot.oddities) if trial.derived.snapshot else {}
        line = {
            "sequence": marker.poll_sequence,
            "outcome": marker.outcome.value,
            "feed": marker.feed_state.value,
            "phase": marker.phase.value,
            "rows": marker.rows,
            **{name: count for name in (*COUNTS, *ODD) if (count := getattr(marker, name))},
            **odd,
            "fetch_ms": round(fetch_seconds * 1000),
            "publish_ms": round(publish_seconds * 1000),
            "skipped_beats": len(trial.markers) - 1 or None,
            "gap_from": marker.gap_from and marker.gap_from.isoformat(),
            "error_kind": marker.error_kind,
            "error": marker.error_message,
        }
        log = self.log.warning if marker.error_kind or "foreign_track_id" in odd else self.log.info
        log("poll published", **{name: value for name, value in line.items() if value is not None})
        metrics = self.metrics
        for each in trial.markers:
            metrics.polls.labels(each.outcome.value).inc()
        metrics.fetch_seconds.observe(fetch_seconds)
        metrics.publish_seconds.observe(publish_seconds)
        metrics.poll_sequence.set(marker.poll_sequence)
        for state in FeedState:
            metrics.feed_state.labels(state.value).set(state is marker.feed_state)
        for name, op in COUNTS.items():
            metrics.events.labels(op.value).inc(getattr(marker, name))
        metrics.rejected_rows.inc(marker.rejected_rows)
        metrics.stale_rows.inc(marker.stale_rows)
        for kind, count in odd.items():
            metrics.contradictions.labels(kind).inc(count)
        if marker.received_at is not None:
            metrics.last_good_poll.set(marker.received_at.timestamp())
            if marker.outcome is Outcome.PUBLISHED:
                metrics.last_change.set(marker.received_at.timestamp())
        refused = f"{marker.error_kind}: {marker.error_message}" if marker.error_kind else None
        self.monitor.unready("exchange", refused)
        bad_feed = marker.feed_state in {FeedState.STALE, FeedState.FROZEN, FeedState.PARTIAL}
        self.monitor.unready("feed", f"the feed is {marker.feed_state.value}" if bad_feed else None)

    def _warn_daily(self, event: str, **details: object) -> None:
        if self._warned.get(event) != self._today():
            self._warned[event] = self._today()
            self.log.warning(event, **details)
