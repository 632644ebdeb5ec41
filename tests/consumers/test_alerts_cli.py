"""`bourse alerts`, and rules that change while they run."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from msgspec.structs import asdict

from bourse_cli.root import bourse
from bourse_consumers.alerts.consumer import Alerts
from bourse_consumers.alerts.rules import Engine
from bourse_consumers.alerts.ruleset import load, schema, strangers
from bourse_consumers.api import Emit
from bourse_consumers.archive.parquet import ParquetArchive
from bourse_consumers.archive.store import Folder
from bourse_consumers.testing import Memory, MemoryStream, run, trade
from bourse_producer.replay import Replay
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.codec import to_json
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import AlertState, FeedState, Outcome, Phase, PollMarker, PriceAlert, ResolvedBy
from bourse_schemas.topics import partition_of

RULES = Path(__file__).parents[2] / "examples" / "rules.yaml"
OPENED = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
HEAD = "version: 1\nrules:\n"
FIRING, RESOLVED = AlertState.FIRING, AlertState.RESOLVED


def file_of(folder: Path, *rules: str) -> Path:
    path = folder / "rules.yaml"
    path.write_text(HEAD + "".join(f"  - {{{rule}}}\n" for rule in rules), "utf-8")
    return path


def published(memory: Memory) -> list[PriceAlert]:
    return [emit.event for emit in memory.emitted if isinstance(emit.event, PriceAlert)]


def said(memory: Memory) -> list[tuple[str, AlertState, ResolvedBy | None]]:
    return [(alert.rule, alert.state, alert.resolved_by) for alert in published(memory)]


def prices(*values: int, first: int = 1) -> list[Any]:
    return [trade(sequence=number, last_price=price, previous_close=100) for number, price in enumerate(values, first)]


ABOVE = "name: a, type: crossing, level: 105, direction: up"
BELOW = "name: b, type: band, low: 50, high: 104"


class Running:
    """A consumer over memory that goes on when more is there."""

    def __init__(self, path: Path, memory: Memory) -> None:
        self.memory, self.consumer = memory, Alerts(path)
        self.stream = MemoryStream(memory, self.consumer.topics)
        self.idle_at = datetime(2026, 11, 23, tzinfo=UTC)

    def go(self) -> None:
        """Do what is there, then what is due by time, as often as anything comes."""
        from bourse_consumers.runner import Runner

        runner = Runner(self.consumer, self.stream, self.memory.decode, name="test")
        self.stream.reset()
        while runner.step():
            pass
        runner._idle_due = 0.0
        runner.step()
        while runner.step():
            pass
        runner._idle_due = 0.0
        runner.step()


def test_a_rule_that_is_gone_resolves_its_episodes_once(tmp_path: Path) -> None:
    """Whether it went while running or while nothing ran, and however often one starts again."""
    path, memory = file_of(tmp_path, ABOVE, BELOW), Memory()
    memory.append(*prices(100, 106))
    running = Running(path, memory)
    running.go()
    assert said(memory) == [("a", FIRING, None), ("b", FIRING, None)]
    file_of(tmp_path, BELOW)
    running.go()
    gone = ("a", RESOLVED, ResolvedBy.RULE_REMOVED)
    assert said(memory)[2:] == [gone]
    Running(path, memory).go()
    assert said(memory)[2:] == [gone]
    file_of(tmp_path, "name: b, type: band, low: 50, high: 103")
    Running(path, memory).go()
    assert said(memory)[3:] == [("b", RESOLVED, ResolvedBy.RULE_REMOVED)]
    first, *_, last = (alert for alert in published(memory) if alert.rule == "b")
    assert (first.alert_id, first.started_at) == (last.alert_id, last.started_at)


def test_a_new_rule_knows_the_day_and_is_silent_about_it(tmp_path: Path) -> None:
    """What it would have said stays unsaid, and so does the end of that; what comes later is said."""
    path, memory = file_of(tmp_path, BELOW), Memory()
    memory.append(*prices(100, 106))
    running = Running(path, memory)
    running.go()
    file_of(tmp_path, BELOW, ABOVE)
    running.go()
    memory.append(*prices(100, 107, first=3))
    running.go()
    assert said(memory) == [
        ("b", FIRING, None),
        ("b", RESOLVED, ResolvedBy.CONDITION),
        ("b", FIRING, None),
        ("a", FIRING, None),
    ]


def test_a_bad_new_file_leaves_the_old_rules_in_force(tmp_path: Path) -> None:
    """Loudly: it is a trouble until the file is good again."""
    path, memory = file_of(tmp_path, ABOVE), Memory()
    running = Running(path, memory)
    running.go()
    assert running.consumer.trouble() is None
    path.write_text("version: 1\nrules: [{name: a}]\n", "utf-8")
    running.go()
    assert "rules[1].type: is missing" in str(running.consumer.trouble())
    memory.append(*prices(100, 106))
    running.go()
    assert said(memory) == [("a", FIRING, None)]
    path.unlink()
    running.go()
    assert "cannot read the rules" in str(running.consumer.trouble())
    file_of(tmp_path, ABOVE)
    running.go()
    assert running.consumer.trouble() is None
    assert said(memory) == [("a", FIRING, None)]


NUMBERS = {"rows", "opened", "traded", "revised", "cancelled", "stale_rows", "rejected_rows", "duplicate_rows"}


def marker(minute: int, state: FeedState = FeedState.FRESH, **more: Any) -> PollMarker:
    at = OPENED + timedelta(minutes=minute)
    values: dict[str, Any] = {
        "poll_sequence": minute + 1,
        "source": "x",
        "outcome": Outcome.PUBLISHED,
        "phase": Phase.OPEN,
        "feed_state": state,
        "requested_at": at,
        "received_at": at,
        "next_poll_at": at + timedelta(minutes=1),
        "day_final": False,
        "charged_calls": 1,
        "simulated": False,
        **dict.fromkeys(NUMBERS, 0),
        **more,
    }
    return PollMarker(**values)


def test_the_feed_is_bad_silent_and_well_again(tmp_path: Path) -> None:
    """By the markers alone; the clock on the wall only says earlier what the next marker would."""
    rules = load(
        file_of(tmp_path, "name: bad, type: feed, states: [DOWN], for: 2m", "name: silent, type: feed, silent: 3m")
    )
    down = FeedState.DOWN
    markers = [marker(0), marker(1, down), marker(2, down), marker(3, down), marker(4), marker(20)]

    def what(alerts: list[PriceAlert]) -> list[tuple[str, AlertState, int]]:
        return [(a.rule, a.state, int((a.raised_at - OPENED) / timedelta(minutes=1))) for a in alerts]

    engine = Engine(rules)
    expected = [("bad", FIRING, 3), ("bad", RESOLVED, 4), ("silent", FIRING, 8), ("silent", RESOLVED, 20)]
    assert what([alert for each in markers for alert in engine.take(each)]) == expected
    engine = Engine(rules)
    before = [alert for each in markers[:-1] for alert in engine.take(each)]
    assert engine.silence(OPENED + timedelta(minutes=7)) == []
    (overdue,) = engine.silence(OPENED + timedelta(minutes=9))
    assert engine.silence(OPENED + timedelta(minutes=10)) == []
    assert what([*before, overdue, *engine.take(markers[-1])]) == expected
    # Restarted in the silence: what is on the topic is not said again.
    engine = Engine(rules)
    for each in markers[:-1]:
        engine.take(each)
    engine.mute({overdue.alert_id})
    assert engine.silence(OPENED + timedelta(minutes=9)) == []
    assert what(engine.take(markers[-1])) == expected[-1:]


def test_since_the_last_alert_is_since_either_direction(tmp_path: Path) -> None:
    """Every further step up or down is an alert of its own."""
    engine = Engine(load(file_of(tmp_path, "name: step, type: change, percent: 10, since: last_alert")))
    found = [(a.event_id, a.state, a.reference_price) for e in prices(100, 110, 115, 121, 108) for a in engine.take(e)]
    assert [(str(event)[-1], state, reference) for event, state, reference in found] == [
        ("2", FIRING, 100), ("3", RESOLVED, 110), ("4", FIRING, 110), ("5", RESOLVED, 121), ("5", FIRING, 121),
    ]  # fmt: skip


MISTAKES = {
    "name: a, type: change, percent: 101, direction: down, window: 5m": "percent: can never hold",
    "name: a, type: change, percent: 3, window: 25h": "window: can never be over",
    "name: a, type: change, percent: 3, window: 5m, resolve: {percent: 4}": "resolve must not be above the threshold",
    "name: a, type: change, percent: 3, window: 5m, resolve: {amount: 4}": "resolve must be in the unit of the rule",
    "name: a, type: band, low: 9, high: 3": "low: always holds",
    "name: a, type: band, low: 9, high: 3, side: inside": "low: never holds",
    "name: a, type: band, low: 1, high: 9, resolve: {amount: 5}": "resolve: never resolves",
    "name: a, type: crossing, level: 100, resolve: {amount: 100}": "resolve: never resolves",
    "name: a, type: volume, times: 3": "window: is missing",
    "name: a, type: cancelled, shares: 1, for: 1m": "for: can never hold",
    "name: a, type: quiet, after: 5 days": "after: give a duration",
    "name: a, type: quiet, after: 5m, active: 12:00-09:00": "active: never holds",
    "name: a, type: feed, states: [FRESH, STALE, FROZEN, PARTIAL, DOWN, IDLE]": "states: always holds",
    "name: a, type: crosing, level: 5": "no type 'crosing'; did you mean crossing?",
    "name: a, type: [crossing], level: 5": "type: no type",
    f"name: a, type: quiet, after: {'9' * 30}m": "after: can never be over",
    f"name: a, type: change, window: 5m, percent: {'9' * 400}": "percent: give a number",
    "name: a, type: crossing, level: 5, notify: true": "notify: Input should be a valid list",
    "name: a, level: 5": "type: is missing; there are change, crossing",
    "name: a, type: crossing, level: 5, match: {symbol: [x]}": "match.symbol: unknown key; did you mean symbols?",
    "name: a, type: crossing, level: 5, match: {instruments: [فولاد]}": "is no code",
    "name: a, type: crossing, level: 5, match: {lists: [none.txt]}": "cannot read the list none.txt",
    "name: a, type: crossing, level: 5, notify: [dsek]": "no channel 'dsek'; did you mean desk?",
}


@pytest.mark.parametrize(("rule", "hint"), MISTAKES.items())
def test_check_names_the_mistake(tmp_path: Path, rule: str, hint: str) -> None:
    """With file and line, and exit code 2."""
    path = file_of(tmp_path, rule)
    with pytest.raises(ConfigurationError) as caught:
        load(path, ["desk"])
    assert str(caught.value).startswith(f"{path}:3: rules[1]")
    assert hint in str(caught.value)


def test_a_key_that_is_there_twice_is_a_mistake(tmp_path: Path) -> None:
    """YAML would take the last one in silence."""
    path = file_of(tmp_path, "name: a, type: crossing, level: 5, level: 7", "name: b, type: crossing, level: none")
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    first, *others = str(caught.value).splitlines()
    assert first == f"{path}:3: level: is there twice"
    assert [other.partition("level")[0] for other in others] == [f"{path}:4: rules[2]."]


def test_a_newer_version_is_no_list_of_mistakes(tmp_path: Path) -> None:
    """One line says what to do."""
    path = tmp_path / "rules.yaml"
    path.write_text("version: 2\nrules: [{kind: new}]\n", "utf-8")
    with pytest.raises(ConfigurationError, match=r"rules.yaml:1: version: 2 is newer .* upgrade"):
        load(path)


def test_rules_about_nothing_are_named_with_the_nearest_symbol(tmp_path: Path) -> None:
    """A misspelt symbol must not stay silent for ever; a list in a file counts as written."""
    (tmp_path / "mine.txt").write_text("# mine\nIRO1MADN0001\nومعادن\n", "utf-8")
    rules = load(
        file_of(
            tmp_path,
            "name: a, type: crossing, level: 5, match: {symbols: [ومعاذن]}",
            "name: b, type: crossing, level: 5, match: {lists: [mine.txt]}",
            "name: c, type: crossing, level: 5, match: {patterns: ['خ*']}",
            "name: d, type: crossing, level: 5, match: {patterns: ['IRO1MAD*', 'و*ن']}",
            "name: e, type: crossing, level: 5, match: {rights: true}",
        )
    )
    assert list(strangers(rules, [trade()])) == [
        ("a", "no instrument ومعاذن; did you mean ومعادن?"),
        ("c", "matches no instrument"),
        ("e", "matches no instrument"),
    ]


def test_the_schema_takes_what_we_take() -> None:
    """An editor and the program agree about the example."""
    validator = Draft202012Validator(schema())
    example = yaml.safe_load(RULES.read_text("utf-8"))
    assert list(validator.iter_errors(example)) == []
    example["rules"][0]["percnt"] = 3
    assert list(validator.iter_errors(example))


def test_partitions_are_those_of_kafka() -> None:
    """Known values of Kafka's own tests of murmur2, made positive."""
    known = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536}
    for key, hashed in known.items():
        assert partition_of(key, 1 << 31) == hashed & 0x7FFFFFFF


@pytest.fixture(scope="module")
def day() -> list[Any]:
    replay = Replay()
    replay.day(REAL_DAY)
    return replay.events


def test_trying_out_says_what_a_live_run_says(day: list[Any], tmp_path: Path) -> None:
    """The same alerts, in every field, over a whole real day: back-test by lines of JSON, live by columns of Avro."""
    memory = Memory(6)
    for event in day:
        memory.append(event, partition=partition_of(event.instrument, 6))
    run(Alerts(RULES), memory)
    live = [to_json(asdict(emit.event)) for emit in memory.emitted]
    lines = tmp_path / "day.ndjson"
    lines.write_text("".join(to_json(asdict(event)) + "\n" for event in day), "utf-8")
    done = CliRunner().invoke(bourse, ["alerts", "test", str(RULES), "--events", str(lines), "--json"])
    assert done.exit_code == 0, done.output
    assert sorted(done.stdout.splitlines()) == sorted(live)
    assert len(live) > 100
    assert {json.loads(line)["kind"] for line in live} >= {"CHANGE", "VOLUME", "VALUE"}
    table = CliRunner().invoke(bourse, ["alerts", "test", str(RULES), "--events", str(lines)]).stdout
    assert "  دسبحا  0 times  volume of 10 times its pace or more within 5m" in table
    assert "  شلرد  103,703,145,830 rial  value of" in table
    assert f"{len(day):,} events, {sum(alert.state is FIRING for alert in published(memory)):,} alerts" in table


def test_cases_that_fail_say_how(tmp_path: Path) -> None:
    """What is missing and what nobody expected; exit 1. Bad files are exit 2's."""
    rules, cases = file_of(tmp_path, ABOVE), tmp_path / "cases.yaml"
    events = "events: [{at: '09:00', last_price: 100}, {at: 9:05, last_price: 106}]"
    cases.write_text(f"cases: [{{name: one, {events}, alerts: [{{rule: a, price: 107}}]}}]\n", "utf-8")
    done = CliRunner().invoke(bourse, ["alerts", "test", str(rules), "--cases", str(cases)])
    assert done.exit_code == 1
    assert done.output.splitlines()[:2] == ["FAILED  one", "    missing: {rule: a, price: 107, state: FIRING}"]
    assert "not expected: {raised_at: '09:05:00', state: FIRING, rule: a" in done.output
    for event, hint in (f"at: {'9' * 30}", "give a time in Tehran"), (f"at: '09:00', volume: {'9' * 30}", "64 bits"):
        cases.write_text(f"cases: [{{events: [{{{event}}}]}}]\n", "utf-8")
        with pytest.raises(ConfigurationError, match=hint):
            bourse.main(["alerts", "test", str(rules), "--cases", str(cases)], standalone_mode=False)
    cases.write_text(f"cases: [{{name: one, {events}, alerts: [{{rule: a, prise: 107}}]}}]\n", "utf-8")
    with pytest.raises(ConfigurationError, match="no field 'prise'"):
        CliRunner().invoke(bourse, ["alerts", "test", str(rules), "--cases", str(cases)], catch_exceptions=False)


def test_a_restart_at_the_end_of_a_day_is_quick(day: list[Any]) -> None:
    """The day is folded again in far less than the two seconds that are allowed, and nothing is said of it."""
    memory = Memory(6)
    for event in day:
        memory.append(event, partition=partition_of(event.instrument, 6))
    run(Alerts(RULES), memory)
    before: list[Emit] = list(memory.emitted)
    began = datetime.now(UTC)
    run(Alerts(RULES), memory)
    assert datetime.now(UTC) - began < timedelta(seconds=2)
    assert memory.emitted == before
    assert {alert.trading_day for alert in published(memory)} == {date(2019, 8, 21)}


def test_an_archive_is_tried_like_its_events(day: list[Any], tmp_path: Path) -> None:
    """The same rows from Parquet give the same alerts; a day that is not there is the operator's mistake."""
    memory, archive = Memory(6), tmp_path / "archive"
    for event in day:
        memory.append(event, partition=partition_of(event.instrument, 6))
    run(Alerts(RULES), memory)
    run(ParquetArchive(Folder(archive)), memory)
    arguments = ["alerts", "test", str(RULES), "--archive", str(archive), "--json", "--days"]
    done = CliRunner().invoke(bourse, [*arguments, "2019-08-01..2019-08-31"])
    assert done.exit_code == 0, done.output
    expected = [to_json(asdict(alert)) for alert in published(memory)]
    assert sorted(done.stdout.splitlines()) == sorted(expected)
    with pytest.raises(ConfigurationError, match="nothing of these days"):
        CliRunner().invoke(bourse, [*arguments, "2019-09-01"], catch_exceptions=False)
