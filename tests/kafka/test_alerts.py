"""`bourse consume alerts` on real Kafka: killed, its rules changed, and the same as a trial says."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec import structs

from bourse_cli.root import bourse
from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.alerts.trial import Past, polls_of
from bourse_consumers.testing import trade
from bourse_producer.replay import Replay
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import Child, spawn
from bourse_schemas.codec import to_json
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Candle, Event
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import topic_of
from reliability.chaos_alerts import feed, run

pytestmark = pytest.mark.kafka

EXAMPLE = Path(__file__).parents[2] / "examples" / "rules.yaml"
ABOVE = "  - {name: above, when: last_price >= 105, match: {symbols: [نماد]}}\n"
BELOW = "  - {name: below, when: last_price <= 95}\n"
NINE = datetime(2019, 8, 24, 4, 30, tzinfo=UTC)


class Place:
    """A prefix of the test's own on the session's broker."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.rules = cluster, folder, folder / "rules.yaml"
        self.options = [
            *("--bootstrap-servers", cluster.bootstrap_servers),
            *("--registry-url", cluster.registry_url),
            *("--topic-prefix", cluster.prefix),
        ]

    def publish(self, events: Sequence[Event]) -> None:
        """Publish events in one transaction."""
        registry = self.cluster.registry()
        producer = self.cluster.transactional_producer(f"{self.cluster.prefix}-test")
        producer.init_transactions(10)
        producer.begin_transaction()
        for event in events:
            record = registry.serializer(topic_of(type(event)), self.cluster.prefix)(event)
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
            producer.poll(0)
        producer.commit_transaction(10)
        producer.close()

    def price(self, sequence: int, price: int) -> None:
        """Publish a poll with a price."""
        at = NINE + timedelta(minutes=sequence)
        event = trade(
            sequence=sequence, poll_sequence=sequence, symbol="نماد", last_price=price, previous_close=100,
            trading_day=NINE.date(), observed_at=at, traded_at=at,
        )  # fmt: skip
        self.publish([event, practice(polls_of([event]))[0].marker])

    def is_active(self) -> bool:
        """Return whether the consumer has begun: a new group begins with the next poll."""
        return '"event": "active"' in (self.folder / "log").read_text("utf-8")

    def write(self, *rules: str) -> None:
        """Write the rules."""
        self.rules.write_text("version: 1\nrules:\n" + "".join(rules), "utf-8")

    def alerts(self, *options: str) -> list[dict[str, Any]]:
        """Return the alerts on the topic."""
        done = CliRunner().invoke(bourse, ["alerts", "list", "--json", *options, *self.options])
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    def states(self) -> list[tuple[str, str, str | None]]:
        """Return rule, state and reason of each."""
        return [(alert["rule"], alert["state"], alert["resolved_by"]) for alert in self.alerts()]

    @contextmanager
    def consuming(self, rules: Path) -> Iterator[Child]:
        """Run the consumer."""
        log = self.folder / "log"
        command = [sys.executable, "-m", "bourse_cli", "consume", "alerts", "--rules", rules, *self.options]
        with spawn([*map(str, command)], stdout=log, stderr=log, env=dict(os.environ)) as child:
            yield child
            child.terminate()


def practice(polls: Sequence[Past]) -> list[Past]:
    """Return polls of a market of long ago: nothing is judged by the clock."""
    return [
        Past(structs.replace(marker, simulated=True, traded=len(events)), events) for marker, events in polls
    ]  # fmt: skip


@pytest.fixture
def place(kafka: Kafka, small_registry: str, prefix: str, tmp_path: Path) -> Place:
    """Return a place with topics and schemas."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return Place(cluster, tmp_path)


def test_an_alert_comes_once_through_a_kill_and_new_rules(place: Place, wait_for: Callable[..., Any]) -> None:
    """Its end comes after the kill; the end of another when its rule goes; a wrong file changes nothing."""
    place.write(ABOVE, BELOW)
    fired, ended = ("above", "FIRING", None), ("above", "RESOLVED", "CONDITION")
    with place.consuming(place.rules) as child:
        wait_for(place.is_active, 60)
        place.price(1, 100)
        place.price(2, 106)
        wait_for(lambda: place.states() == [fired], 60)
        child.kill()
    place.price(3, 94)
    with place.consuming(place.rules) as child:
        wait_for(lambda: len(place.states()) == 3, 60)
        assert sorted(place.states(), key=repr) == sorted([fired, ended, ("below", "FIRING", None)], key=repr)
        assert [alert["rule"] for alert in place.alerts("--open")] == ["below"]
        place.rules.write_text("version: 1\nrules: 7\n", "utf-8")
        wait_for(lambda: "rules of before are in force" in (place.folder / "log").read_text("utf-8"), 30)
        child.send(signal.SIGHUP)
        place.price(4, 106)
        wait_for(lambda: len(place.states()) == 5, 30)
        place.write(BELOW)
        wait_for(lambda: "1 rules were read again" in (place.folder / "log").read_text("utf-8"), 30)
        place.price(5, 107)
        wait_for(lambda: len(place.states()) == 6, 60)
    assert place.states()[5] == ("above", "RESOLVED", "RULE_REMOVED")
    with place.consuming(place.rules):
        place.price(6, 94)
        wait_for(lambda: len(place.states()) == 7, 60)
    assert place.states()[6] == ("below", "FIRING", None)


def test_a_live_run_says_what_a_trial_says(place: Place, wait_for: Callable[..., Any]) -> None:
    """A real day over real Kafka, in every field of every alert."""
    replay = Replay()
    replay.day(REAL_DAY)
    polls = practice(polls_of(replay.events))
    events = [event for past in polls for event in (*past.events, past.marker)]
    lines = place.folder / "day.ndjson"
    lines.write_text("".join(to_json(structs.asdict(event)) + "\n" for event in events), "utf-8")
    done = CliRunner().invoke(bourse, ["alerts", "test", str(EXAMPLE), str(lines), "--json"])
    expected = sorted(done.stdout.splitlines())
    with place.consuming(EXAMPLE):
        wait_for(place.is_active, 60)
        feed(place.cluster, polls, 0.0, threading.Event())
        wait_for(lambda: len(place.alerts()) >= len(expected), 120)
    found = CliRunner().invoke(bourse, ["alerts", "list", "--json", *place.options]).stdout.splitlines()
    assert sorted(found) == expected
    live = CliRunner().invoke(bourse, ["alerts", "test", str(EXAMPLE), "--topics", "--json", *place.options])
    assert sorted(live.stdout.splitlines()) == expected
    now = CliRunner().invoke(bourse, ["alerts", "try", "plp >= 4.9 and quiet >= 10m", *place.options]).output
    assert "holds now for " in now


def test_check_knows_the_instruments(place: Place) -> None:
    """A misspelt symbol is named with the nearest one."""
    event = trade(symbol="ومعادن")
    place.publish([Candle(**{name: getattr(event, name) for name in Candle.__struct_fields__})])
    place.write("  - {name: a, when: plp > 3, match: {symbols: [ومعادم]}}\n")
    done = CliRunner().invoke(bourse, ["alerts", "check", str(place.rules), *place.options])
    assert isinstance(done.exception, ConfigurationError)
    assert "did you mean ومعادن?" in str(done.exception)
    assert CliRunner().invoke(bourse, ["alerts", "check", str(place.rules)]).exit_code == 0


@pytest.mark.timeout(300)
def test_ten_strikes_change_nothing(kafka: Kafka, tmp_path: Path) -> None:
    """Killed and frozen while the real day is produced, a group raises what it raises undisturbed."""
    assert kafka.bootstrap_servers
    result = run(10, 1, 3, tmp_path)
    assert result["kills"] + result["freezes"] >= 5
    assert result["expected"] > 50
    assert {name: result[name] for name in ("found", "lost", "twice", "wrong")} == {
        "found": result["expected"],
        "lost": 0,
        "twice": 0,
        "wrong": 0,
    }
