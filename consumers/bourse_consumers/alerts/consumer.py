"""The consumer that raises alerts: the engine on whole polls from Kafka."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import polars as pl

from bourse_cli.logs import get_logger
from bourse_consumers.alerts.board import Named
from bourse_consumers.alerts.engine import Engine, Poll
from bourse_consumers.alerts.rendering import millis
from bourse_consumers.alerts.rules_file import RuleFiles, strangers
from bourse_consumers.api import Day, Emit, MarketConsumer, Reopen, WholePoll
from bourse_schemas.events import Candle, PriceAlert
from bourse_schemas.topics import ALERTS, CANDLES, Topic


def columns(frame: pl.DataFrame, names: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """Return a frame's columns as the engine takes them."""
    instants = frame.with_columns(pl.col("traded_at").dt.epoch("ms"))
    return {name: instants[name].to_list() for name in names}


class Alerts(MarketConsumer):
    """Raises alerts by rules. Its state is the trading day's, rebuilt from the topics: a restart forgets nothing.

    Changed files of rules are read within a second, or when `reload` is set; a wrong one keeps its rules of before.
    """

    emits: Sequence[Topic] = (ALERTS,)

    def __init__(self, files: RuleFiles) -> None:
        self._files = files
        self._engine = Engine(files.rules)
        self._arrived = time.monotonic()
        self._reported: str | None = None
        # Set at SIGHUP: read the rules again, changed or not.
        self.reload = False
        self._log = get_logger(consumer="alerts")

    def open(self, day: Day) -> None:
        """Begin with the trading day under way; episodes published on it continue."""
        self._files.refresh()
        candles = [candle for candle in day.read(CANDLES) if isinstance(candle, Candle)]
        known = {candle.instrument: Named(0, candle.symbol, candle.title, candle.is_right) for candle in candles}
        if known:
            for text in strangers(self._files.rules, {code: each.symbol or "" for code, each in known.items()}):
                self._log.warning("rule names an unknown instrument", error=text)
        self._engine = Engine(self._files.rules, known)
        self._engine.open(alert for alert in day.read(ALERTS) if isinstance(alert, PriceAlert))

    def process_poll(self, poll: WholePoll) -> list[Emit]:
        """Return the alerts that the poll begins and ends."""
        marker = poll.marker
        counted = marker.events
        events = columns(poll.frame(), self._engine.columns) if counted else {}
        self._arrived = time.monotonic()
        alerts = self._engine.take(Poll(marker, events, poll.replay, poll.complete))
        return [] if poll.replay else self._emits(alerts)

    def idle(self, now: datetime) -> list[Emit]:
        """Read changed rules; judge the rules about the feed by the clock."""
        changed, self.reload = self._files.refresh(force=self.reload), False
        if self._files.trouble != self._reported:
            self._reported = self._files.trouble
            if self._reported:
                self._log.error("new rules are wrong, the rules of before are in force", error=self._reported)
        if changed:
            raise Reopen(f"{len(self._files.rules)} rules were read again")
        return self._emits(self._engine.tick(millis(now), round((time.monotonic() - self._arrived) * 1000)))

    def trouble(self) -> str | None:
        """Return which files of rules are wrong."""
        return self._files.trouble

    def _emits(self, alerts: Sequence[PriceAlert]) -> list[Emit]:
        for alert in alerts:
            self._log.info(
                alert.state.value, rule=alert.rule, instrument=alert.instrument, symbol=alert.symbol, when=alert.when,
                values={name: round(value, 4) for name, value in alert.values.items()}, last_price=alert.last_price,
                at=alert.raised_at.isoformat(), resolved_by=alert.resolved_by,
            )  # fmt: skip
        return [Emit(ALERTS, alert) for alert in alerts]
