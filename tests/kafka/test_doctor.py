"""`bourse doctor`: a line for each thing, right when all is well and when each of them is broken in turn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # not in its __all__

from bourse_cli import logs
from bourse_cli.topics import apply_topics, plan_topics
from bourse_producer.doctor import doctor
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.processes import spawn
from bourse_sandbox.registry import serve_registry
from bourse_sandbox.serving import Server
from bourse_schemas.codec import avro_schema
from bourse_schemas.compatibility import compatible
from bourse_schemas.events import FeedState, Outcome, Phase, PollMarker
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TOPICS, TRADES

pytestmark = pytest.mark.kafka
SECRET, NID = "never-to-be-shown", "0123456789"
NOBODY = "127.0.0.1:9"
SOURCE = "finnotech/trades-realtime"


class Found(NamedTuple):
    """What the command said, and how it ended."""

    code: int
    checks: Mapping[str, Mapping[str, str]]
    text: str

    def status(self, name: str) -> str:
        """Return how a check ended."""
        return self.checks[name]["status"]

    def words(self, name: str) -> str:
        """Return what a check said, advice included."""
        return f"{self.checks[name]['message']}: {self.checks[name]['advice']}"


@dataclass
class Place:
    """Everything a producer needs, in good order."""

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
        assert "Traceback" not in run.stderr
        assert SECRET not in run.stdout + run.stderr
        assert NID not in run.stdout + run.stderr
        said = json.loads(run.stdout)
        assert said["ok"] is (run.returncode == 0)
        return Found(run.returncode, {check["name"]: check for check in said["checks"]}, run.stderr)

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


def test_all_is_well(place: Place, wait_for: Callable[..., Any]) -> None:
    """Every check says so; who leads and how far each group is behind are told; nothing secret is shown."""
    found = place.look("--call", "--clock", "response")
    assert found.code == 0
    assert {"ok", "warn"} >= {check["status"] for check in found.checks.values()}
    for name in ("exchange", "token", "scopes", "call", "kafka", "topics", "lead", "last poll", "registry", "subjects"):
        assert found.status(name) == "ok", found.checks[name]
    assert "rows, 0 rejected" in found.words("call")
    assert "bourse:trades-realtime:get" in found.words("scopes")
    assert "is free" in found.words("lead")
    assert "(environment)" in found.words("--client-id")
    assert "(command line)" in found.words("--clock")
    assert "(default)" in found.words("--environment")

    command, variables = place.command("produce", "--schedule", "always", "--poll-seconds", "1", "--clock", "response")
    with spawn(command, env=variables, stdout=place.folder / "log", stderr=place.folder / "log"):
        group = f"{place.cluster.prefix}-producer"
        admin = place.cluster.admin()
        wait_for(
            lambda: any(
                member.assignment and member.assignment.topic_partitions
                for member in admin.describe_consumer_groups([group])[group].result().members
            ),
            30,
        )
        assert "is held by bourse-stream at" in place.look().words("lead")


def test_the_producers_own_line_is_taken(place: Place) -> None:
    """Whatever `bourse produce` takes, the doctor takes, and looks at it."""
    found = place.look("--schedule", "always", "--poll-seconds", "5", "--rights", "--clock", "response")
    assert found.code == 0
    assert "5.0 (command line)" in found.words("--poll-seconds")


def test_a_registry_that_is_none(place: Place) -> None:
    """It is not taken for one without subjects."""
    found = place.look(BOURSE_REGISTRY_URL=place.exchange)
    assert "does not answer like a schema registry" in found.words("registry")


def test_lines_for_people(place: Place) -> None:
    """A line a check; what bourse.toml says of the producer and of all commands is read, and named."""
    (place.folder / "bourse.toml").write_text(
        f'registry_url = "{place.cluster.registry_url}"\n[produce]\nclient_id = "practice"\npoll_seconds = 5\n'
    )
    command, variables = place.command("doctor", BOURSE_CLIENT_ID=None, BOURSE_REGISTRY_URL=None)
    run = subprocess.run(
        command, env=variables, cwd=place.folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    assert all(line.split()[0] in {"ok", "warn"} for line in lines)
    assert "practice (bourse.toml)" in run.stdout
    assert f"{place.cluster.registry_url} (bourse.toml)" in run.stdout
    assert "\x1b" not in run.stdout


ACCOUNT: list[tuple[dict[str, str | None], int, str, str, str]] = [
    ({"BOURSE_CLIENT_SECRET": "wrong"}, 1, "token", "FAIL", "check --client-id, the client secret"),
    ({"BOURSE_CLIENT_ID": None}, 2, "token", "skip", "no client id: set --client-id"),
    ({"BOURSE_NID_FILE": "nowhere"}, 1, "--nid-file", "FAIL", "nowhere (environment) is not there"),
    ({"BOURSE_ADDRESS": f"http://{NOBODY}"}, 1, "exchange", "FAIL", "check --address"),
    ({"BOURSE_ADDRESS": f"http://me:{SECRET}@h"}, 1, "--address", "FAIL", "no address such as"),
    ({"BOURSE_PROXY": f"http://me:{SECRET}@{NOBODY}"}, 1, "exchange", "FAIL", "--proxy"),
    ({"BOURSE_REGISTRY_URL": f"http://{NOBODY}"}, 1, "registry", "FAIL", "is --registry-url right?"),
    ({"BOURSE_CAPTURE": "/etc/passwd/captures"}, 1, "disk", "FAIL", "cannot be written"),
]


@pytest.mark.parametrize("case", ACCOUNT, ids=[case[4] for case in ACCOUNT])
def test_each_thing_broken(place: Place, case: tuple[dict[str, str | None], int, str, str, str]) -> None:
    """It is named, with what to do; the other checks are made all the same."""
    changes, code, name, status, advice = case
    found = place.look(**changes)
    assert (found.status(name), found.code) == (status, code), found.checks
    assert advice in found.words(name)
    assert found.status("lead") == "ok"
    assert found.status("calendar") in {"ok", "warn"}


def test_an_exchange_that_is_none(place: Place) -> None:
    """Something else answers at the address."""
    found = place.look(BOURSE_ADDRESS=place.cluster.registry_url)
    assert (found.code, found.status("exchange"), found.status("token")) == (1, "ok", "FAIL")


def test_no_broker(place: Place) -> None:
    """What hangs on Kafka is skipped, the rest is looked at, and all of it is over soon."""
    began = time.monotonic()
    found = place.look(BOURSE_BOOTSTRAP_SERVERS=NOBODY, BOURSE_REGISTRY_URL=f"http://{NOBODY}")
    assert time.monotonic() - began < 20
    assert (found.code, found.status("kafka"), found.status("token")) == (1, "FAIL", "ok")
    assert "is --bootstrap-servers right?" in found.words("kafka")
    assert {found.status(name) for name in ("topics", "lead", "last poll", "subjects")} == {"skip"}
    assert found.text == ""


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
    assert (found.code, found.status("topics")) == (1, "FAIL")
    assert f"{trades}: retention.ms" in found.words("topics")
    assert "run `bourse topics apply`" in found.words("topics")
    for done in admin.delete_topics([trades], operation_timeout=10).values():
        done.result()
    assert f"not there: {trades}: is --topic-prefix right?" in place.look().words("topics")
    elsewhere = place.look(BOURSE_TOPIC_PREFIX=f"{place.cluster.prefix}x")
    assert (elsewhere.code, elsewhere.status("topics"), elsewhere.status("last poll")) == (1, "FAIL", "skip")


def test_subjects(place: Place) -> None:
    """A missing one, one whose registered schema is another, and one that would not be kept compatible."""
    schema = {"type": "record", "name": "TradeEvent", "fields": [{"name": "x", "type": "int"}]}
    with serve_registry(compatible=compatible) as registry:
        assert "is not registered" in place.look(BOURSE_REGISTRY_URL=registry.url).words("subjects")
    for level, said in (("FULL_TRANSITIVE", "version 1 cannot read it"), ("NONE", "compatibility is NONE")):
        with serve_registry(compatible=compatible) as registry:
            for topic in TOPICS:
                subject = topic.subject(place.cluster.prefix)
                httpx.put(f"{registry.url}/config/{subject}", json={"compatibility": level}).raise_for_status()
                body = {"schema": json.dumps(schema if level != "NONE" else avro_schema(topic.event))}
                httpx.post(f"{registry.url}/subjects/{subject}/versions", json=body).raise_for_status()
            found = place.look(BOURSE_REGISTRY_URL=registry.url)
            assert (found.code, found.status("subjects")) == (1, "FAIL")
            assert said in found.words("subjects")


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"next_poll_at": datetime(2026, 11, 21, 7, 0, tzinfo=UTC)}, "FAIL", "is `bourse produce` running?"),
        (
            {
                "feed_state": FeedState.DOWN,
                "outcome": Outcome.FAILED,
                "error_kind": "quota",
                "error_message": "no more",
            },
            "FAIL",
            "quota: no more",
        ),
        ({"feed_state": FeedState.FROZEN}, "FAIL", "feed FROZEN"),
        ({"feed_state": FeedState.PARTIAL}, "warn", "feed PARTIAL"),
    ],
)
def test_the_last_poll(place: Place, changes: dict[str, Any], status: str, said: str) -> None:
    """Late, failed, or of a market that stands still."""
    place.publish(poll_sequence=2, **changes)
    found = place.look()
    assert (found.status("last poll"), found.code) == (status, int(status == "FAIL"))
    assert said in found.words("last poll")


def test_a_group_that_nobody_runs(place: Place) -> None:
    """Offsets are there, records too, and nobody reads them."""
    name = POLLS.full_name(place.cluster.prefix)
    consumer = place.cluster.consumer(f"{place.cluster.prefix}-alerts", auto_offset_reset="earliest")
    consumer.subscribe([name])
    while (message := consumer.poll(0.1)) is None:
        pass
    consumer.commit(message=message, asynchronous=False)
    consumer.close()
    for number in range(2, 5):
        place.publish(poll_sequence=number)
    found = place.look()
    assert found.status("consumer group") == "warn"
    assert "-alerts is" in found.words("consumer group")


def test_a_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little space is said in time, too little is wrong."""
    from click.testing import CliRunner

    monkeypatch.setattr(logs, "configure_logging", lambda _: None)  # it would last
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**8))
    _, variables = place.command()
    run = CliRunner().invoke(doctor, ["--json", "--topic-prefix", place.cluster.prefix], env=variables)
    disk = next(check for check in json.loads(run.stdout)["checks"] if check["name"] == "disk")
    assert (run.exit_code, disk["status"]) == (1, "FAIL")
