"""`bourse consume alerts` on real Kafka: killed, its rules changed, and the same as a back-test says."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import asdict

from bourse_cli.root import bourse
from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.testing import trade
from bourse_producer.replay import Replay
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import Child, spawn
from bourse_schemas.codec import to_json
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Candle, Event, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import topic_of
from reliability.chaos_alerts import run

pytestmark = pytest.mark.kafka

EXAMPLE = Path(__file__).parents[2] / "examples" / "rules.yaml"
ABOVE = "  - {name: above, type: crossing, level: 105, direction: up, match: {symbols: [نماد]}}\n"
BELOW = "  - {name: below, type: crossing, level: 95, direction: down}\n"


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
        topic = topic_of(type(events[0]))
        serializer = self.cluster.registry().serializer(topic, self.cluster.prefix)
        producer = self.cluster.transactional_producer(f"{self.cluster.prefix}-test")
        producer.init_transactions(10)
        producer.begin_transaction()
        for event in events:
            record = serializer(event)
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
            producer.poll(0)
        producer.commit_transaction()
        producer.close()

    def write(self, *rules: str) -> None:
        self.rules.write_text("version: 1\nrules:\n" + "".join(rules), "utf-8")

    def alerts(self) -> list[dict[str, Any]]:
        done = CliRunner().invoke(bourse, ["alerts", "list", "--json", *self.options])
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    def said(self) -> list[tuple[str, str, str | None]]:
        return [(alert["rule"], alert["state"], alert["resolved_by"]) for alert in self.alerts()]

    @contextmanager
    def consuming(self, rules: Path) -> Iterator[Child]:
        log = self.folder / "log"
        command = [sys.executable, "-m", "bourse_cli", "consume", "alerts", "--rules", rules, *self.options]
        with spawn([*map(str, command)], stdout=log, stderr=log, env=dict(os.environ)) as child:
            yield child
            child.terminate()


@pytest.fixture
def place(kafka: Kafka, small_registry: str, prefix: str, tmp_path: Path) -> Place:
    """Return a place with topics and schemas."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return Place(cluster, tmp_path)


def prices(*values: int, first: int) -> list[TradeEvent]:
    return [
        trade(sequence=sequence, symbol="نماد", last_price=price, previous_close=100)
        for sequence, price in enumerate(values, first)
    ]


def test_an_alert_comes_once_through_a_kill_and_new_rules(place: Place, wait_for: Callable[..., Any]) -> None:
    """Its end comes after the kill; the end of another when its rule goes; a bad file changes nothing."""
    place.write(ABOVE, BELOW)
    place.publish(prices(100, 106, first=1))
    fired, ended = ("above", "FIRING", None), ("above", "RESOLVED", "CONDITION")
    with place.consuming(place.rules) as child:
        wait_for(lambda: place.said() == [fired], 30)
        child.kill()
    place.publish(prices(94, first=3))
    with place.consuming(place.rules) as child:
        wait_for(lambda: len(place.said()) == 3, 30)
        assert sorted(place.said()) == sorted([fired, ended, ("below", "FIRING", None)])
        place.rules.write_text("version: 1\nrules: 7\n", "utf-8")
        wait_for(lambda: "stay in force" in (place.folder / "log").read_text("utf-8"), 30)
        child.send(signal.SIGHUP)
        place.publish(prices(106, first=4))
        wait_for(lambda: len(place.said()) == 5, 30)
        place.write(BELOW)
        wait_for(lambda: len(place.said()) == 6, 30)
    assert place.said()[5] == ("above", "RESOLVED", "RULE_REMOVED")
    with place.consuming(place.rules):
        place.publish(prices(94, first=5))
        wait_for(lambda: len(place.said()) == 7, 30)
    assert place.said()[6] == ("below", "FIRING", None)


def test_a_live_run_says_what_a_back_test_says(place: Place, wait_for: Callable[..., Any]) -> None:
    """A real day over six partitions of real Kafka, in every field of every alert."""
    replay = Replay()
    replay.day(REAL_DAY)
    place.publish(replay.events)
    lines = place.folder / "day.ndjson"
    lines.write_text("".join(to_json(asdict(event)) + "\n" for event in replay.events), "utf-8")
    done = CliRunner().invoke(bourse, ["alerts", "test", str(EXAMPLE), "--events", str(lines), "--json"])
    expected = sorted(done.stdout.splitlines())
    with place.consuming(EXAMPLE):
        wait_for(lambda: len(place.alerts()) >= len(expected), 60)
    found = CliRunner().invoke(bourse, ["alerts", "list", "--json", *place.options]).stdout.splitlines()
    assert sorted(found) == expected
    is_open = CliRunner().invoke(bourse, ["alerts", "list", "--open", "--json", *place.options]).stdout.splitlines()
    firing = {json.loads(line)["alert_id"] for line in expected}
    firing -= {json.loads(line)["alert_id"] for line in expected if '"RESOLVED"' in line}
    assert {json.loads(line)["alert_id"] for line in is_open} == firing


def partition_of(key: str, partitions: int) -> int:
    """Return the partition a key goes to: Kafka's murmur2, as `partitioner=murmur2_random` and Java's clients do it."""
    data, mask, mix = key.encode(), 0xFFFFFFFF, 0x5BD1E995
    result = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * mix & mask
        result = (result * mix & mask) ^ ((word ^ word >> 24) * mix & mask)
    if rest := data[whole:]:
        result = (result ^ int.from_bytes(rest, "little")) * mix & mask
    result = (result ^ result >> 13) * mix & mask
    return ((result ^ result >> 15) & 0x7FFFFFFF) % partitions


def test_check_knows_the_instruments_and_partitions_are_the_brokers(place: Place) -> None:
    """A misspelt symbol is named with the nearest one; keys go where a back-test puts them."""
    names = Candle.__struct_fields__
    events = [trade(instrument=f"IRO1TEST{number:04d}") for number in range(20)]
    place.publish([Candle(**{name: getattr(event, name) for name in names}) for event in events])
    place.publish(events)
    place.write("  - {name: a, type: crossing, level: 5, match: {symbols: [ومعادم]}}\n")
    with pytest.raises(ConfigurationError, match="a: no instrument ومعادم; did you mean ومعادن"):
        CliRunner().invoke(bourse, ["alerts", "check", str(place.rules), *place.options], catch_exceptions=False)
    place.write("  - {name: a, type: crossing, level: 5, match: {symbols: [ومعادن]}}\n")
    done = CliRunner().invoke(bourse, ["alerts", "check", str(place.rules), *place.options])
    assert (done.exit_code, done.stdout) == (0, f"{place.rules}: 1 rules, well\n")
    arguments = ["tail", "trades", "--from-beginning", "--exit-at-end", "--json", "--with-metadata", *place.options]
    shown = [json.loads(line) for line in CliRunner().invoke(bourse, arguments).stdout.splitlines()]
    assert [each["_partition"] for each in shown] == [partition_of(each["_key"], 6) for each in shown]
    assert len(shown) == 20


@pytest.mark.timeout(300)
def test_ten_strikes_change_nothing(kafka: Kafka, tmp_path: Path) -> None:
    """Killed and frozen while the real day is produced, a group says what it says undisturbed."""
    assert kafka.bootstrap_servers
    result = run(10, 1, 3, tmp_path)
    assert result["kills"] + result["freezes"] == 10
    assert result["expected"] > 100
    assert {name: result[name] for name in ("found", "lost", "twice", "wrong")} == {
        "found": result["expected"],
        "lost": 0,
        "twice": 0,
        "wrong": 0,
    }
