"""The consumer that raises alerts: the engine over `bourse.trades`."""

from __future__ import annotations

from collections.abc import Sequence

from bourse_consumers.alerts.rules import Engine, Rule
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Rebuild
from bourse_schemas.events import PriceAlert
from bourse_schemas.telemetry import get_logger
from bourse_schemas.topics import ALERTS, TRADES, Topic

__all__ = ["Alerts"]


class Alerts(Consumer):
    """Raises alerts by rules. Its state is the trading day's, rebuilt from the topic: a restart forgets nothing."""

    topics: Sequence[Topic] = (TRADES,)
    emits: Sequence[Topic] = (ALERTS,)

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._engine = Engine(rules)
        self._log = get_logger(consumer="alerts")

    def open(self, assigned: Assignment) -> Rebuild:
        """Begin with the trading day under way; what was said of it before stays unsaid."""
        self._engine = Engine(self._rules)
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        """Return the alerts that these events raise and resolve."""
        alerts = [alert for event in batch.events for alert in self._engine.take(event)]
        if not batch.replay:
            for alert in alerts:
                self._report(alert)
        return [Emit(ALERTS, alert) for alert in alerts]

    def _report(self, alert: PriceAlert) -> None:
        self._log.info(
            alert.state.value,
            rule=alert.rule,
            instrument=alert.instrument,
            symbol=alert.symbol,
            condition=alert.condition,
            observed=None if alert.observed is None else round(alert.observed, 2),
            price=alert.price,
            reference_price=alert.reference_price,
            at=alert.raised_at.isoformat(),
            message=alert.message,
        )
