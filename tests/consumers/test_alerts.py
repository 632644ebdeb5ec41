"""Alerts keep the contract that every plug-in is held to, and mean what their rules say."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bourse_consumers.alerts.consumer import Alerts
from bourse_consumers.alerts.rules import Change, Crossing, Direction, Engine, Rule
from bourse_consumers.alerts.ruleset import load
from bourse_consumers.api import Consumer
from bourse_consumers.testing import ConsumerContract, trade
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import AlertKind, AlertState, TradeEvent, Unit

OPENED = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
RULES = Path(__file__).parents[2] / "examples" / "rules.yaml"


def priced(prices: Sequence[int | None], *, seconds: int = 60, **fields: Any) -> list[TradeEvent]:
    """Return one event a minute with these last prices."""
    return [
        trade(sequence=number, last_price=price, observed_at=OPENED + timedelta(seconds=seconds * number), **fields)
        for number, price in enumerate(prices, 1)
    ]


def change(percent: int = 3, minutes: int = 5, direction: Direction = Direction.UP) -> Rule:
    test = Change(Fraction(percent), Fraction(percent, 2), Unit.PERCENT, timedelta(minutes=minutes))
    return Rule(name="move", version="0" * 12, test=test, directions=(direction,))


def crossing(level: int) -> Rule:
    return Rule(name="level", version="0" * 12, test=Crossing(level, Fraction()), directions=(Direction.UP,))


def states(rule: Rule, events: Sequence[TradeEvent]) -> list[tuple[int | None, AlertState]]:
    """Return which event raised what."""
    engine = Engine([rule])
    return [(event.sequence, alert.state) for event in events for alert in engine.take(event)]


FIRING, RESOLVED = AlertState.FIRING, AlertState.RESOLVED


class TestAlerts(ConsumerContract):
    """Alerts come once, whatever is stopped, killed or moved."""

    def make(self, folder: Path) -> Consumer:
        return Alerts([change(), crossing(105)])

    def events(self) -> Sequence[TradeEvent]:
        return priced([100, 101, 104, 106, 106, 104, 103, 103, 108, 108], previous_close=100)


def test_a_change_is_measured_against_the_price_in_force_a_window_ago() -> None:
    """Not against the oldest event inside the window, nor the day's first once the day is older."""
    assert states(change(), priced([100, 100, 100, 100, 100, 101, 102, 103, 104])) == [(8, FIRING)]
    # Slowly up: never 3 % within five minutes, though 5 % in all.
    assert states(change(), priced([1000 + 5 * minute for minute in range(12)])) == []


def test_an_episode_fires_once_and_resolves_once_below_its_hysteresis() -> None:
    """A price that wavers around the threshold raises one alert, not one an event."""
    wavering = [100, 103, 102, 103, 102, 103, 102, 102, 102, 102]
    assert states(change(), priced(wavering)) == [(2, FIRING), (7, RESOLVED)]


def test_a_level_is_crossed_from_the_side_of_the_previous_close() -> None:
    """The day's first price counts as a crossing where the previous close lay on the other side."""
    assert states(crossing(105), priced([106, 104, 105], previous_close=100)) == [
        (1, FIRING),
        (2, RESOLVED),
        (3, FIRING),
    ]
    assert states(crossing(105), priced([106, 104, 105], previous_close=110)) == [(3, FIRING)]
    assert states(crossing(105), priced([106, 107], previous_close=None)) == []


def test_an_episode_ends_with_its_day_without_a_record() -> None:
    """The next day begins anew."""
    today = priced([100, 104], previous_close=100)
    tomorrow = [trade(sequence=1, trading_day=date(2026, 11, 24), last_price=100)]
    assert states(change(), [*today, *tomorrow]) == [(2, FIRING)]


def test_an_unknown_price_is_no_price() -> None:
    """Null raises nothing and ends nothing."""
    assert states(change(), priced([100, None, 104, None])) == [(3, FIRING)]


def test_both_records_of_an_episode_carry_one_id_and_what_tripped_them() -> None:
    """Who stores alerts elsewhere can pair them."""
    engine = Engine([change()])
    raised, resolved = [alert for event in priced([100, 104, 100]) for alert in engine.take(event)]
    assert (raised.alert_id, raised.started_at) == (resolved.alert_id, resolved.started_at)
    assert (raised.price, raised.reference_price, raised.observed, raised.threshold) == (104, 100, 4.0, 3.0)
    assert (raised.event_id, resolved.event_id) == ("IRO1MADN0001-20261123-2", "IRO1MADN0001-20261123-3")


def test_the_example_rules_are_read() -> None:
    """What we ship is right, in every field."""
    rules = {rule.name: rule for rule in load(RULES)}
    assert {rule.kind for rule in rules.values()} == {*AlertKind} - {AlertKind.UNKNOWN}
    assert rules["steel-and-copper"].match.symbols == frozenset({"فولاد", "فملی"})


HEAD = "version: 1\nrules:\n"
MISTAKES = {
    HEAD
    + "  - {name: a, type: change, percnt: 3, window: 5m}\n": ":3: rules[1].percnt: unknown key; did you mean percent?",
    HEAD
    + "  - name: a\n    type: change\n    percent: 3\n    window: 5 days\n": ":6: rules[1].window: give a duration",
    HEAD + "  - {name: a, type: change, percent: 3}\n": ":3: rules[1].window: give either window or since",
    HEAD + "  - {name: a, type: crossing, level: -5}\n": ":3: rules[1].level:",
    HEAD + "  - {name: a, type: jump}\n": ":3: rules[1]",
    "version: 2\nrules: []\n": ":1: version:",
    "version: 1\nrules: 5\n": ":2: rules: Input should be a valid list",
    HEAD + "\t- a\n": ":3: not YAML",
    "": "this is not the rules",
    HEAD + "  - {name: a, type: crossing, level: 5, message: '{nobody}'}\n": "{nobody} is unknown",
    HEAD + "  - {name: a, type: crossing, level: 5, message: '{symbol:d}'}\n": ":3: rules[1].message:",
    HEAD + "  - {name: a, type: crossing, level: 5, message: '{price:{symbol}}'}\n": "another field",
    HEAD + "  - {name: a, type: crossing, level: 5, message: '{symbol.__class__}'}\n": "message:",
    HEAD + "  - {name: a, type: crossing, level: 5}\n  - {name: a, type: crossing, level: 6}\n": "'a'",
}


@pytest.mark.parametrize(("text", "hint"), MISTAKES.items())
def test_a_mistake_in_the_rules_is_named_with_line_and_key(tmp_path: Path, text: str, hint: str) -> None:
    """Whoever writes rules is told where and what."""
    path = tmp_path / "rules.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert hint in str(caught.value)


def test_a_symbol_may_be_written_as_the_exchange_writes_it(tmp_path: Path) -> None:
    """Arabic letters, stray spaces and ZWNJ in a rule mean the symbol on the topic."""
    path = tmp_path / "rules.yaml"
    path.write_text(f"{HEAD}  - {{name: a, type: crossing, level: 5, match: {{symbols: [' فملي\u200c ']}}}}\n", "utf-8")
    (rule,) = load(path)
    assert rule.match(trade(symbol="فملی"))
    assert not rule.match(trade(symbol="فولاد"))


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    """Nobody mends a file one error at a time."""
    path = tmp_path / "rules.yaml"
    path.write_text(
        "version: 1\nrules:\n  - {name: a, type: change, percent: 3}\n  - {name: b, type: crossing}\n", "utf-8"
    )
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_message_is_filled_in(tmp_path: Path) -> None:
    """Formats fit the kinds of the values they are for."""
    path = tmp_path / "rules.yaml"
    message = "{symbol} {observed:.1f} % from {reference_price:,} to {price:,}"
    path.write_text(f"{HEAD}  - {{name: a, type: change, percent: 3, window: 5m, message: '{message}'}}\n", "utf-8")
    engine = Engine(load(path))
    (alert,) = [alert for event in priced([5000, 5200]) for alert in engine.take(event)]
    assert alert.message == "ومعادن 4.0 % from 5,000 to 5,200"
