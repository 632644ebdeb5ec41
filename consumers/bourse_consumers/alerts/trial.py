"""Rules tried out on past events, with the engine that runs live: pure but for reading what it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import msgspec
import yaml

from bourse_consumers.alerts.rules import Engine, Rule
from bourse_consumers.yaml_file import parse
from bourse_schemas.codec import LONGEST
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN, AlertState, PollMarker, PriceAlert, TradeEvent, tidy
from bourse_schemas.topics import TRADES, event_id, partition_of

__all__ = ["Summary", "Trial", "cases", "read_events"]

Event = TradeEvent | PollMarker


class Trial:
    """What rules would have said: events in the order of their topic, partitioned as the topic is."""

    def __init__(self, rules: Sequence[Rule], partitions: int = TRADES.partitions) -> None:
        first = Engine(rules)
        self._trades = [first.sibling() for _ in range(partitions)]
        self._polls = first.sibling()

    def take(self, event: Event) -> list[PriceAlert]:
        """Return the alerts of an event."""
        if isinstance(event, PollMarker):
            return self._polls.take(event)
        return self._trades[partition_of(event.instrument, len(self._trades))].take(event)


def read_events(lines: Iterable[bytes], name: str) -> Iterator[Event]:
    """Yield trade events and markers from lines as `bourse replay --json` and `bourse tail --json` print them."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kind: type[Event] = TradeEvent if b'"event_id"' in line else PollMarker
            event = msgspec.json.decode(line, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{name}:{number}: neither a trade event nor a poll's marker: {error}; "
                "give what `bourse replay … --json` or `bourse tail trades --json` prints"
            ) from error
        yield event


@dataclass
class Summary:
    """Counts of what was said."""

    fired: Counter[tuple[date, str]] = field(default_factory=Counter)
    noisiest: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, list[timedelta]] = field(default_factory=dict)
    unresolved: Counter[str] = field(default_factory=Counter)

    def add(self, alert: PriceAlert) -> None:
        """Count an alert."""
        if alert.state is AlertState.FIRING:
            self.fired[alert.raised_at.astimezone(TEHRAN).date(), alert.rule] += 1
            self.noisiest[alert.rule, alert.symbol or alert.source] += 1
            self.unresolved[alert.rule] += 1
        else:
            self.lengths.setdefault(alert.rule, []).append(alert.raised_at - alert.started_at)
            self.unresolved[alert.rule] -= 1

    def lines(self, rules: Sequence[Rule]) -> Iterator[str]:
        """Yield the summary for people."""
        yield "alerts per rule and day"
        for (day, rule), count in sorted(self.fired.items()):
            yield f"  {day}  {count:>6,}  {rule}"
        silent = [rule.name for rule in rules if not any(name == rule.name for _, name in self.fired)]
        if silent:
            yield f"never fired: {', '.join(silent)}"
        if self.noisiest:
            yield "noisiest"
            for (rule, who), count in self.noisiest.most_common(5):
                yield f"  {count:>6,}  {rule}  {who}"
        if self.fired:
            yield "length of episodes: middle, longest; those that lasted until the day's end"
        for rule in sorted({name for _, name in self.fired}):
            lengths = sorted(self.lengths.get(rule, []))
            said = (
                f"{_span(lengths[len(lengths) // 2]):>9} {_span(lengths[-1]):>9}" if lengths else f"{'–':>9} {'–':>9}"
            )
            yield f"  {said}  {self.unresolved[rule]:>6,}  {rule}"


def _span(length: timedelta) -> str:
    return str(length - timedelta(microseconds=length.microseconds))


# --- cases: unit tests for rules --------------------------------------------------------------------------------------


def cases(path: Path, rules: Sequence[Rule]) -> Iterator[tuple[str, list[str]]]:
    """Yield each case of a file and what is wrong with it; docs/alerts.md has the format."""
    _, data = parse(path, "the cases")
    found = data.get("cases") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(case, dict) for case in found):
        raise ConfigurationError(f"{path}: no cases; it has a list `cases` of name, events and alerts")
    for number, case in enumerate(found, 1):
        name = str(case.get("name") or f"case {number}")
        where = f"{path}: {name}"
        if unknown := case.keys() - {"name", "day", "events", "alerts"}:
            raise ConfigurationError(
                f"{where}: unknown key {min(map(str, unknown))}; there are name, day, events, alerts"
            )
        day = case.get("day", date(2026, 11, 23))
        if not isinstance(day, date):
            raise ConfigurationError(f"{where}: day: give one such as 2026-11-23")
        trial = Trial(rules, 1)
        said = [alert for event in _case_events(case.get("events"), day, where) for alert in trial.take(event)]
        yield name, list(_differences(said, case.get("alerts") or [], day, where))


def _case_events(rows: Any, day: date, where: str) -> Iterator[Event]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigurationError(f"{where}: events: give a list of them, at least one")
    sequences: Counter[str] = Counter()
    totals: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows, 1):
        values = dict(row)
        at = _at(values.pop("at", None), day, f"{where}: event {number}")
        made: dict[str, Any]
        kind: type[Event]
        if "feed_state" in values:
            sequences[""] += 1
            counts = "rows opened traded revised cancelled stale_rows rejected_rows duplicate_rows charged_calls"
            made = dict.fromkeys(counts.split(), 0) | {
                "poll_sequence": sequences[""],
                "simulated": False,
                "source": "case",
                "outcome": "PUBLISHED",
                "phase": "OPEN",
                "requested_at": at,
                "received_at": at,
                "next_poll_at": at + timedelta(minutes=1),
                "day_final": False,
            }
            if "next_poll_at" in values:
                values["next_poll_at"] = _at(values["next_poll_at"], day, f"{where}: event {number}")
            kind = PollMarker
        else:
            symbol = tidy(str(values.get("symbol", "نماد")))
            instrument = str(values.get("instrument") or f"CASE{partition_of(symbol, 10**8):08d}")
            sequences[instrument] += 1
            before = totals.get(instrument, {})
            now = {name: values.get(name, before.get(name, 0)) for name in ("volume", "value", "trade_count")}
            totals[instrument] = now
            first = sequences[instrument] == 1
            made = {
                "event_id": event_id(instrument, day, sequences[instrument]),
                "op": "OPENED" if first else "TRADED",
                "instrument": instrument,
                "sequence": sequences[instrument],
                "trading_day": day,
                "traded_at": at,
                "traded_at_estimated": False,
                "observed_at": at,
                "poll_sequence": number,
                "source": "case",
                "symbol_raw": symbol,
                "title": symbol,
                "is_right": False,
                **now,
            }
            try:
                made |= {f"{name}_delta": now[name] - before.get(name, 0) for name in now}
            except TypeError:
                raise ConfigurationError(
                    f"{where}: event {number}: volume, value and trade_count are numbers"
                ) from None
            if any(made[f"{name}_delta"] < 0 for name in now):
                made["op"] = "CANCELLED"
            values["symbol"] = symbol
            kind = TradeEvent
        if unknown := values.keys() - set(kind.__struct_fields__):
            raise ConfigurationError(f"{where}: event {number}: no field {min(map(str, unknown))!r}")
        if any(isinstance(value, int) and not LONGEST[0] <= value <= LONGEST[1] for value in values.values()):
            raise ConfigurationError(f"{where}: event {number}: a number is longer than 64 bits")
        try:
            yield msgspec.convert(made | values, kind)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{where}: event {number}: {error}") from error


def _at(value: Any, day: date, where: str) -> datetime:
    try:
        if isinstance(value, int):
            # YAML 1.1 reads 12:05 and 12:05:30 as numbers to the base of 60.
            clock = timedelta(minutes=value) if value < 24 * 60 else timedelta(seconds=value)
        else:
            found = time.fromisoformat(str(value))
            clock = timedelta(hours=found.hour, minutes=found.minute, seconds=found.second)
        return (datetime.combine(day, time(), TEHRAN) + clock).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigurationError(f'{where}: at: give a time in Tehran such as "09:05" or "09:05:30", quoted') from None


def _differences(said: Sequence[PriceAlert], wanted: Any, day: date, where: str) -> Iterator[str]:
    if not isinstance(wanted, list) or not all(isinstance(each, Mapping) for each in wanted):
        raise ConfigurationError(f"{where}: alerts: give a list of what is to be said; [] where nothing is")
    rest = list(said)
    for each in wanted:
        fields = dict(each)
        if "at" in fields:
            fields["raised_at"] = _at(fields.pop("at"), day, where)
        if unknown := fields.keys() - set(PriceAlert.__struct_fields__):
            raise ConfigurationError(f"{where}: alerts: no field {min(map(str, unknown))!r}")
        fields.setdefault("state", "FIRING")
        if "symbol" in fields:
            fields["symbol"] = tidy(str(fields["symbol"]))
        found = next(
            (alert for alert in rest if all(getattr(alert, key) == value for key, value in fields.items())), None
        )
        if found is None:
            yield f"missing: {_brief(fields)}"
        else:
            rest.remove(found)
    for alert in rest:
        names = ("raised_at", "state", "rule", "symbol", "observed", "price", "reference_price")
        yield f"not expected: {_brief({name: getattr(alert, name) for name in names})}"


def _brief(fields: Mapping[str, Any]) -> str:
    plain = {
        key: f"{value.astimezone(TEHRAN):%H:%M:%S}" if isinstance(value, datetime) else value
        for key, value in fields.items()
        if value is not None
    }
    return yaml.safe_dump({key: str(value) if isinstance(value, str) else value for key, value in plain.items()},
                          default_flow_style=True, allow_unicode=True, sort_keys=False, width=1000).strip()  # fmt: skip
