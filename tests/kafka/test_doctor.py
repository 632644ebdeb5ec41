"""`bourse doctor`: what it finds when everything is in order, and when each thing is broken in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # not in its __all__

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import spawn
from bourse_sandbox.registry import serve_registry
from bourse_sandbox.serving import Server
from bourse_schemas.codec import avro_schema
from bourse_schemas.compatibility import gate
from bourse_schemas.events import FeedState, Outcome, Phase, PollMarker
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TOPICS, TRADES

pytestmark = pytest.mark.kafka
SECRET, NID = "never-to-be-shown", "0123456789"
NOBODY = "127.0.0.1:9"
SOURCE = "finnotech/trades-realtime"


class Found(NamedTuple):
    """What the command found, and how it ended."""

    code: int
    findings: Mapping[str, Mapping[str, str]]

    def status(self, name: str) -> str:
        """Return how a check ended."""
        return self.findings[name]["status"]

    def words(self, name: str) -> str:
        """Return what a check reported, advice included."""
        return f"{self.findings[name]['message']}; {self.findings[name]['advice']}"


@dataclass
class Place:
    """Everything a producer needs, in order."""

    cluster: Cluster
    exchange: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *options: str, **environment: str | None) -> tuple[list[str], dict[str, str]]:
        """Return a command line of `bourse` and its environment."""
        variables: dict[str, str | None] = {
            "PATH": "/usr/bin:/bin",
            "BOURSE_ADDRESS": self.exchange,
            "BOURSE_CLIENT_ID": "practice",
            "BOURSE_CLIENT_SECRET": SECRET,
            "BOURSE_NID": NID,
            "BOURSE_BOOTSTRAP_SERVERS": self.cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": self.cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": self.cluster.prefix,
            **environment,
        }
        command = [sys.executable, "-m", "bourse_cli", *options]
        return command, {name: value for name, value in variables.items() if value is not None}

    def look(self, *options: str, **environment: str | None) -> Found:
        """Run `bourse doctor --json`."""
        command, variables = self.command("doctor", "--json", *options, **environment)
        run = subprocess.run(
            command, env=variables, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert SECRET not in run.stdout + run.stderr
        assert NID not in run.stdout + run.stderr
        shown = json.loads(run.stdout)
        assert shown["ok"] is (run.returncode == 0)
        assert run.stderr == ""
        return Found(run.returncode, {finding["name"]: finding for finding in shown["findings"]})

    def publish(self, **changes: Any) -> None:
        """Put a poll's marker on the topic, of a poll a moment ago."""
        now = datetime.now(UTC)
        usual: dict[str, Any] = {
            "poll_sequence": 1,
            "source": SOURCE,
            "outcome": Outcome.PUBLISHED,
            "phase": Phase.OPEN,
            "feed_state": FeedState.FRESH,
            "requested_at": now,
            "received_at": now,
            "next_poll_at": now + timedelta(minutes=1),
            "day_final": False,
            **dict.fromkeys(("opened", "traded", "revised", "cancelled"), 0),
            **{f"{kind}_rows": 0 for kind in ("stale", "rejected", "duplicate")},
            "rows": 600,
            "simulated": False,
            "charged_calls": 1,
        }
        record = self.cluster.registry().serializer(POLLS, self.cluster.prefix)(PollMarker(**{**usual, **changes}))
        producer = self.cluster.transactional_producer(f"{self.cluster.prefix}-test")
        producer.init_transactions(10)
        producer.begin_transaction()
        producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers)
        producer.commit_transaction()
        producer.close()


@pytest.fixture
def exchange() -> Iterator[Server]:
    """Run a practice exchange in the middle of a session."""
    with practice_exchange(client_secret=SECRET).serve() as server:
        yield server


@pytest.fixture
def place(kafka: Kafka, small_registry: str, prefix: str, exchange: Server, tmp_path: Path) -> Place:
    """Return a place where all is well; the last poll was a moment ago."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    place = Place(cluster, exchange.url, tmp_path)
    place.publish()
    return place


NAMES = {"exchange", "token", "kafka", "topics", "settings", "schemas", "last poll", "sources", "calendar"}


def test_everything_in_order(place: Place, wait_for: Callable[..., Any]) -> None:
    """All checks are ok, but for a clock of the practice exchange's own; nothing secret is shown."""
    found = place.look()
    assert found.code == 0
    assert found.findings.keys() == NAMES
    assert {name for name in NAMES if found.status(name) != "ok"} <= {"exchange", "calendar"}
    assert "bourse:trades-realtime:get" in found.words("token")

    command, variables = place.command("produce", "--schedule", "always", "--poll-seconds", "1", "--clock", "response")
    with spawn(command, env=variables, stdout=place.folder / "log", stderr=place.folder / "log"):
        wait_for(lambda: "1 running" in place.look().findings.get("producers", {}).get("message", ""), 30)


def test_the_producers_own_command_line_is_taken(place: Place) -> None:
    """Its options, environment and table of bourse.toml."""
    (place.folder / "bourse.toml").write_text(
        f'registry_url = "{place.cluster.registry_url}"\n[produce]\nclient_id = "practice"\npoll_seconds = 5\n'
    )
    options = ("--schedule", "always", "--rights", "--clock", "response")
    assert place.look(*options, BOURSE_CLIENT_ID=None, BOURSE_REGISTRY_URL=None).code == 0


def test_something_else_at_the_registrys_address(place: Place) -> None:
    """It is not taken for a registry without subjects."""
    found = place.look(BOURSE_REGISTRY_URL=place.exchange)
    assert "does not answer like a schema registry" in found.words("schemas")


def test_lines_for_people(place: Place) -> None:
    """What is ok is counted, and shown with --verbose only."""

    def lines(*options: str) -> list[str]:
        command, variables = place.command("doctor", *options)
        run = subprocess.run(
            command, env=variables, cwd=place.folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == 0, run.stdout
        assert "\x1b" not in run.stdout
        return run.stdout.splitlines()

    *shown, last = lines()
    assert not any(line.startswith("ok") for line in shown)
    assert last.startswith(f"{len(NAMES)} checks: ")
    assert len(lines("--verbose")) == len(NAMES) + 1


ACCOUNT: list[tuple[dict[str, str | None], str, str]] = [
    ({"BOURSE_CLIENT_SECRET": "wrong"}, "token", "check --client-id, the client secret"),
    ({"BOURSE_CLIENT_ID": None}, "token", "no client id: set --client-id"),
    ({"BOURSE_NID_FILE": "nowhere"}, "token", "nowhere"),
    ({"BOURSE_ADDRESS": f"http://{NOBODY}"}, "exchange", "check --address"),
    ({"BOURSE_ADDRESS": f"http://me:{SECRET}@h"}, "exchange", "not an address like"),
    ({"BOURSE_PROXY": f"http://me:{SECRET}@{NOBODY}"}, "exchange", "--proxy"),
    ({"BOURSE_REGISTRY_URL": f"http://{NOBODY}"}, "schemas", "is --registry-url right?"),
]


@pytest.mark.parametrize("case", ACCOUNT, ids=[case[2] for case in ACCOUNT])
def test_each_thing_broken(place: Place, case: tuple[dict[str, str | None], str, str]) -> None:
    """It is named, with what to do; the other checks are made all the same."""
    changes, name, advice = case
    found = place.look(**changes)
    assert (found.status(name), found.code) == ("failed", 1), found.findings
    assert advice in found.words(name)
    assert found.status("topics") == "ok"


def test_something_else_at_the_exchanges_address(place: Place) -> None:
    """Something else answers at the address."""
    found = place.look(BOURSE_ADDRESS=place.cluster.registry_url)
    assert (found.code, found.status("token")) == (1, "failed")
    assert found.status("exchange") in {"ok", "warning"}


def test_no_broker(place: Place) -> None:
    """What hangs on Kafka is skipped, the rest is looked at, and all of it is over soon."""
    began = time.monotonic()
    found = place.look(BOURSE_BOOTSTRAP_SERVERS=NOBODY, BOURSE_REGISTRY_URL=f"http://{NOBODY}")
    assert time.monotonic() - began < 20
    assert (found.code, found.status("kafka"), found.status("token")) == (1, "failed", "ok")
    assert "is --bootstrap-servers right?" in found.words("kafka")
    assert (found.status("topics"), found.status("polls")) == ("skipped", "skipped")
    assert found.words("polls") == "it needs: topics; "


def test_topics_that_are_not_as_declared(place: Place) -> None:
    """Missing ones, and ones with other partitions or settings."""
    admin, trades = place.cluster.admin(), TRADES.full_name(place.cluster.prefix)

    def recreate(**settings: str) -> None:
        for done in admin.delete_topics([trades], operation_timeout=10).values():
            done.result()
        apply_topics(place.cluster, plan_topics(place.cluster, {}, 1, any_time=True))
        for done in admin.delete_topics([trades], operation_timeout=10).values():
            done.result()
        for done in admin.create_topics([NewTopic(trades, 6, 1, config=settings)]).values():
            done.result()

    recreate()
    found = place.look()
    assert (found.code, found.status("topics"), found.status("settings")) == (1, "ok", "failed")
    assert f"{trades}: retention.ms" in found.words("settings")
    assert "run `bourse topics apply`" in found.words("settings")
    for done in admin.delete_topics([trades], operation_timeout=10).values():
        done.result()
    assert f"missing: {trades}; is --topic-prefix right?" in place.look().words("topics")
    elsewhere = place.look(BOURSE_TOPIC_PREFIX=f"{place.cluster.prefix}x")
    assert (elsewhere.code, elsewhere.status("topics"), elsewhere.status("polls")) == (1, "failed", "skipped")


def test_subjects(place: Place) -> None:
    """A missing one, one whose registered schema is another, and one that would not be kept compatible."""
    schema = {"type": "record", "name": "TradeEvent", "fields": [{"name": "x", "type": "int"}]}
    with serve_registry(compatible=gate) as registry:
        assert "is not registered" in place.look(BOURSE_REGISTRY_URL=registry.url).words("schemas")
    for level, reported in (("FULL_TRANSITIVE", "compared with version 1, "), ("NONE", "compatibility is NONE")):
        with serve_registry(compatible=gate) as registry:
            for topic in TOPICS:
                subject = topic.subject(place.cluster.prefix)
                httpx2.put(f"{registry.url}/config/{subject}", json={"compatibility": level}).raise_for_status()
                body = {"schema": json.dumps(schema if level != "NONE" else avro_schema(topic.event))}
                httpx2.post(f"{registry.url}/subjects/{subject}/versions", json=body).raise_for_status()
            found = place.look(BOURSE_REGISTRY_URL=registry.url)
            assert (found.code, found.status("schemas")) == (1, "failed")
            assert reported in found.words("schemas")


def test_the_last_poll(place: Place) -> None:
    """Late, unless its time is simulated, or of a market that does not move."""
    place.publish(poll_sequence=2, feed_state=FeedState.FROZEN)
    found = place.look()
    assert (found.status("last poll"), found.code) == ("failed", 1)
    assert "feed FROZEN" in found.words("last poll")
    then = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)
    old = {"requested_at": then, "received_at": then, "next_poll_at": then + timedelta(minutes=1)}
    place.publish(poll_sequence=3, **old)
    assert "is `bourse produce` running?" in place.look().words("last poll")
    place.publish(poll_sequence=4, simulated=True, **old)
    assert place.look().status("last poll") == "ok"


def test_records_on_polls_that_are_no_markers(place: Place) -> None:
    """They are named by their place and hide nothing; one of a lost schema stops every producer."""

    def produce_plain(value: bytes) -> None:
        producer = place.cluster.transactional_producer(f"{place.cluster.prefix}-test")
        producer.init_transactions(10)
        producer.begin_transaction()
        producer.produce(POLLS.full_name(place.cluster.prefix), value, b"x", 0)
        producer.commit_transaction()
        producer.close()

    produce_plain(b"junk")
    found = place.look()
    assert (found.code, found.status("polls"), found.status("last poll")) == (0, "warning", "ok")
    assert f"{POLLS.full_name(place.cluster.prefix)}-0 at offset 2: " in found.words("polls")
    assert found.words("sources") == f"{SOURCE}; "
    produce_plain(b"\0\0\x0f\x42\x3f\x02")
    found = place.look()
    assert (found.code, found.status("polls"), found.status("last poll")) == (1, "failed", "ok")
    assert "schema id 999999 is unknown" in found.words("polls")
    assert "restore the registry's schemas" in found.words("polls")


def test_a_second_source(place: Place) -> None:
    """A prefix belongs to one producer at a time."""
    place.publish(poll_sequence=2, source="finnotech/other")
    found = place.look()
    assert (found.status("sources"), found.code) == ("failed", 1)
    assert f"finnotech/other and {SOURCE} published within 10 min" in found.words("sources")


def test_consumer_groups(place: Place, wait_for: Callable[..., Any]) -> None:
    """A group that read everything has no lag, whatever transaction markers follow; a stopped one with lag is named."""
    group = f"{place.cluster.prefix}-alerts"
    consumer = place.cluster.consumer(group, auto_offset_reset="earliest")
    consumer.subscribe([POLLS.full_name(place.cluster.prefix)])
    message = wait_for(lambda: consumer.poll(0.1), 20)
    consumer.commit(message=message, asynchronous=False)
    found = place.look()
    assert (found.status("consumer"), found.words("consumer")) == ("ok", f"{group}: 1 running, no lag; ")
    consumer.close()
    for number in range(2, 5):
        place.publish(poll_sequence=number)
    found = place.look()
    assert found.status("consumer") == "warning"
    assert f"{group}: 0 running, lag 6 offsets, oldest unread record 0 min old; start it" in found.words("consumer")
