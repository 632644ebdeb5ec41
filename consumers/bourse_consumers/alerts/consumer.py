"""The consumer that raises alerts: an engine per partition of `bourse.trades` and `bourse.polls`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
from msgspec import structs

from bourse_cli.logs import get_logger
from bourse_consumers.alerts.rules import Engine, Rule, Trade
from bourse_consumers.alerts.ruleset import load, strangers
from bourse_consumers.api import Assignment, Batch, Consumer, Emit, Partition, Places, Rebuild, Reopen
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN, AlertState, PollMarker, PriceAlert, ResolvedBy
from bourse_schemas.topics import ALERTS, CANDLES, POLLS, TRADES, Topic

__all__ = ["Alerts", "trades_of"]

INSTANTS = {"traded_at", "observed_at"}


def trades_of(frame: pl.DataFrame) -> Iterable[Trade]:
    """Return what rules look at in the trade events of a frame, in its order."""
    physical = frame.select(
        pl.col(name).to_physical()
        if name == "trading_day"
        else pl.col(name).dt.epoch("ms")
        if name in INSTANTS
        else name
        for name in Trade._fields
    )
    return map(Trade._make, physical.iter_rows())


class Alerts(Consumer):
    """Raises alerts by rules. Its state is the trading day's, rebuilt from the topics: a restart forgets nothing.

    Rules of a file are read again when it changes, or when `reload` is set; a bad file leaves the old rules in force.
    """

    topics: Sequence[Topic] = (TRADES, POLLS)
    emits: Sequence[Topic] = (ALERTS,)
    batch_size = 5000  # a transaction each, while it catches up

    def __init__(self, rules: Sequence[Rule] | Path) -> None:
        self._path = rules if isinstance(rules, Path) else None
        self._seen = self._look()
        self._rules = load(rules) if isinstance(rules, Path) else rules
        self._first = Engine(self._rules)
        self._engines: dict[Partition, Engine] = {}
        # The open episodes on the alerts topic, by their ids, and the engines that have not taken them over yet.
        self._said: dict[str, PriceAlert] = {}
        self._rebuilt: set[Partition] = set()
        # When, by a clock of ours, the last marker of a partition came: the producer's silence is ours to measure.
        self._marked: dict[Partition, float] = {}
        self._resolved_gone = self._compared = False
        self._trouble: str | None = None
        # Set at SIGHUP: read the rules again, changed or not.
        self.reload = False
        self._log = get_logger(consumer="alerts")

    def open(self, assigned: Assignment) -> Rebuild:
        """Begin with the trading day under way; what was said of it before stays as it was said."""
        self._engines = {partition: self._first.sibling() for partition in assigned}
        self._rebuilt, self._marked = set(), {}
        self._resolved_gone = False
        self._said = {}
        ended = set()
        for alert in assigned.read(ALERTS) if assigned else ():
            assert isinstance(alert, PriceAlert)  # noqa: S101  # for the type checker
            if alert.state is AlertState.FIRING:
                self._said[alert.alert_id] = alert
            else:
                ended.add(alert.alert_id)
        for alert_id in ended:
            self._said.pop(alert_id, None)
        if assigned and not self._compared:
            self._compared = True
            for rule, why in strangers(self._rules, assigned.read(CANDLES)):
                self._log.warning("a rule about nothing", rule=rule, error=why)
        return Rebuild(assigned.day_start())

    def process(self, batch: Batch) -> list[Emit]:
        """Return the alerts that these events raise and resolve."""
        places = Places.of(batch.records)
        trades, polls = _split(batch, places)
        if not batch.replay:
            self._take_over({*places.partitions})
        alerts = [alert for partition, trade in trades for alert in self._engines[partition].fold(trade)]
        for partition, marker in polls:
            alerts += self._engines[partition].mark(marker)
            self._marked[partition] = time.monotonic()
        return [] if batch.replay else self._emits(alerts)

    def idle(self, now: datetime) -> list[Emit]:  # noqa: ARG002  # the clock of a replayed day is another
        """Read the rules again where they changed; resolve what rules that are gone left; miss overdue polls."""
        self._read_again()
        self._take_over(set(self._engines))
        alerts = [] if self._resolved_gone else self._gone()
        self._resolved_gone = True
        for partition, since in self._marked.items():
            engine = self._engines[partition]
            alerts += engine.silence(engine.now + timedelta(seconds=time.monotonic() - since))
        return self._emits(alerts)

    def trouble(self) -> str | None:
        """Return why the rules of the file are not those in force."""
        return self._trouble

    # --- inside -------------------------------------------------------------------------------------------------------

    def _look(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does."""
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None

    def _read_again(self) -> None:
        if self._path is None or (self._look() == self._seen and not self.reload):
            return
        self._seen = self._look()
        self.reload = False
        try:
            rules = load(self._path)
        except ConfigurationError as error:
            self._trouble = f"the rules before are in force: {error}"
            self._log.error("the new rules are bad, those before stay in force", error=str(error))
            return
        self._trouble = None
        if rules != self._rules:
            self._rules, self._first, self._compared = rules, Engine(rules), False
            raise Reopen(f"{len(rules)} rules read anew from {self._path}")
        self._log.info("the rules are as they were", path=str(self._path))

    def _take_over(self, partitions: set[Partition]) -> None:
        for partition in partitions - self._rebuilt:
            self._engines[partition].mute(self._said.keys())
        self._rebuilt |= partitions

    def _gone(self) -> list[PriceAlert]:
        """Return the ends of the day's episodes, of our instruments, whose rules are no longer as they were."""
        versions = {(rule.name, rule.version) for rule in self._rules}
        alerts = []
        for alert in self._said.values():
            code = alert.instrument or alert.source
            engine = next((each for each in self._engines.values() if each.knows(code)), None)
            if (
                engine is not None
                and (alert.rule, alert.rule_version) not in versions
                and engine.day == alert.raised_at.astimezone(TEHRAN).date()
            ):
                gone = {"state": AlertState.RESOLVED, "resolved_by": ResolvedBy.RULE_REMOVED, "raised_at": engine.now}
                alerts.append(structs.replace(alert, **gone))
        return alerts

    def _emits(self, alerts: Sequence[PriceAlert]) -> list[Emit]:
        for alert in alerts:
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
        return [Emit(ALERTS, alert) for alert in alerts]


def _split(
    batch: Batch, places: Places
) -> tuple[Iterable[tuple[Partition, Trade]], Iterable[tuple[Partition, PollMarker]]]:
    """Return trades and markers with their partitions."""
    if places.partitions[0].topic.endswith(f".{POLLS.name}"):
        return (), zip(places.partitions, batch.events, strict=True)
    return zip(places.partitions, trades_of(batch.frame()), strict=True), ()
