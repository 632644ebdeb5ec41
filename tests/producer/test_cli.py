"""`bourse produce` as an operator meets it: every mistake is a line or two and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer as KafkaProducer

from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import MockKafka, free_port
from bourse_sandbox.processes import spawn
from bourse_sandbox.registry import serve_registry
from bourse_sandbox.serving import Server
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import CANDLES, DEAD_LETTERS, POLLS, TRADES

SECRET = "never-to-be-shown"
GOOD = {"BOURSE_CLIENT_ID": "practice", "BOURSE_CLIENT_SECRET": SECRET, "BOURSE_NID": "0123456789"}
NOBODY = "127.0.0.1:9"
COMMAND = [sys.executable, "-m", "bourse_cli", "produce"]


Variables = Mapping[str, str | None]


def environment(changes: Variables) -> dict[str, str]:
    """Return an environment in which all is well with the account, but for the changes; None leaves one out."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BOURSE_")}
    away = {"BOURSE_BOOTSTRAP_SERVERS": NOBODY, "BOURSE_REGISTRY_URL": f"http://{NOBODY}"}
    return {**clean, **{name: value for name, value in {**GOOD, **away, **changes}.items() if value is not None}}


def produce(variables: Variables, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [*COMMAND, *options]
    return subprocess.run(
        command, env=environment(variables), cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def errors(run: subprocess.CompletedProcess[str]) -> str:
    """Return what it says was wrong: the lines that are no log."""
    assert "Traceback" not in run.stderr
    assert SECRET not in run.stderr + run.stdout
    lines = [line for line in run.stderr.splitlines() if not line.startswith("{")]
    return "\n".join(lines)


MISTAKES: list[tuple[Sequence[str], dict[str, str | None], str]] = [
    ([], {"BOURSE_CLIENT_ID": None}, "no client id: set --client-id or BOURSE_CLIENT_ID"),
    ([], {"BOURSE_CLIENT_SECRET": None}, "no client secret in BOURSE_CLIENT_SECRET: set"),
    ([], {"BOURSE_CLIENT_SECRET": " \n"}, "no client secret"),
    ([], {"BOURSE_NID": None}, "no national id in BOURSE_NID: set"),
    ([], {"BOURSE_NID": "123"}, "must be 10 digits"),
    ([], {"BOURSE_NID": "۰۱۲۳۴۵۶۷۸۹"}, "must be 10 digits"),
    (["--client-secret-file", "missing"], {}, "--client-secret-file: cannot read missing: No such file"),
    (["--nid-file", "binary"], {}, "--nid-file: binary is not UTF-8 text"),
    (["--nid-file", "empty"], {}, "no national id in --nid-file empty"),
    (["--client-secret-file", "."], {}, "is a directory"),
    (["--address", "exchange.example"], {}, "--address is not an address"),
    (["--address", "ftp://exchange.example"], {}, "--address is not an address"),
    (["--address", "http://"], {}, "--address is not an address"),
    (["--address", "http://h:99999"], {}, "--address is not an address"),
    (["--address", f"http://me:{SECRET}@h"], {}, "--address is not an address"),
    (["--proxy", f"nonsense://me:{SECRET}@h"], {}, "--proxy is not a proxy address"),
    (["--proxy", f"http://me:{SECRET}@h:port"], {}, "--proxy is not a proxy address"),
    (["--poll-seconds", "-1"], {}, "not in the range"),
    (["--poll-seconds", "1e9"], {}, "not in the range"),
    (["--schedule", "never"], {}, "'never' is not one of"),
    (["--environment", "moon"], {}, "'moon' is not one of"),
    (["--clock", "sundial"], {}, "'sundial' is not one of"),
    (["--no-such-option"], {}, "No such option"),
    (["-X", "no.such.setting=1"], {}, "no.such.setting"),
]


@pytest.mark.parametrize(("options", "variables", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_mistakes(options: list[str], variables: dict[str, str | None], message: str, tmp_path: Path) -> None:
    """Each is reported at once, without a secret."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_bytes(b"")
    with serve_registry() as registry:
        Cluster(NOBODY, registry.url).registry().register_all("bourse")
        variables = {"BOURSE_REGISTRY_URL": registry.url, **variables}
        run = produce(variables, "--once", *options, cwd=tmp_path)
    assert (run.returncode, message in errors(run)) == (2, True), run.stderr
    assert len([line for line in errors(run).splitlines() if not line.startswith(("Usage:", "Try "))]) <= 3


def test_no_broker() -> None:
    """--once gives up within 10 s and names the address and the option."""
    with serve_registry() as registry:
        Cluster(NOBODY, registry.url).registry().register_all("bourse")
        began = time.monotonic()
        run = produce({"BOURSE_REGISTRY_URL": registry.url}, "--once")
        took = time.monotonic() - began
    assert run.returncode == 2
    assert f"Kafka at {NOBODY} does not answer" in errors(run)
    assert "--bootstrap-servers" in errors(run)
    assert took < 10


@pytest.fixture
def silent() -> Iterator[int]:
    """Return the port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_no_registry(kind: str, silent: int) -> None:
    """Likewise, where nobody listens and where somebody does but never answers."""
    began = time.monotonic()
    run = produce({"BOURSE_REGISTRY_URL": f"http://127.0.0.1:{silent if kind == 'silent' else 9}"}, "--once")
    assert run.returncode == 2
    assert "the schema registry at" in errors(run)
    assert "--registry-url" in errors(run)
    assert time.monotonic() - began < 12


@pytest.fixture
def ready(mock_kafka: MockKafka, prefix: str) -> Iterator[dict[str, str]]:
    """Return the variables of a mock cluster with topics and schemas of the test's own."""
    holder = KafkaProducer({"bootstrap.servers": mock_kafka.bootstrap_servers})
    for topic in (TRADES, CANDLES, POLLS, DEAD_LETTERS):
        holder.list_topics(topic.full_name(prefix), 10)
    with serve_registry() as registry:
        cluster = Cluster(mock_kafka.bootstrap_servers, registry.url, prefix)
        cluster.registry().register_all(prefix)
        yield {
            "BOURSE_BOOTSTRAP_SERVERS": cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": prefix,
        }


@pytest.fixture
def exchange() -> Iterator[Server]:
    """Run a practice exchange that knows the secret."""
    practice = practice_exchange("real", "poll", client_secret=SECRET, nid="0123456789")
    with practice.serve() as server:
        yield server


def test_missing_subjects(ready: dict[str, str]) -> None:
    """The subject and the command that registers it."""
    with serve_registry() as empty:
        run = produce({**ready, "BOURSE_REGISTRY_URL": empty.url}, "--once")
    assert run.returncode == 2
    assert "is not registered" in errors(run)
    assert "bourse schemas register" in errors(run)


@pytest.mark.parametrize("service", [False, True])
@pytest.mark.kafka
def test_missing_topics(kafka: Any, prefix: str, small_registry: str, service: bool) -> None:
    """The topics and the command that creates them; a service says it at once too, whatever the hour."""
    Cluster(kafka.bootstrap_servers, small_registry, prefix).registry().register_all(prefix)
    variables = {"BOURSE_BOOTSTRAP_SERVERS": kafka.bootstrap_servers, "BOURSE_REGISTRY_URL": small_registry}
    run = produce({**variables, "BOURSE_TOPIC_PREFIX": prefix}, *([] if service else ["--once"]))
    assert run.returncode == 2
    assert f"no topic {prefix}.trades" in errors(run)
    assert "bourse topics apply" in errors(run)


def test_the_exit_code_of_once(ready: dict[str, str], exchange: Server) -> None:
    """0 published, 1 failed, 2 refused: with the exchange's words and what to check."""
    usual = ["--once", "--clock", "response", "--address"]
    good = produce(ready, *usual, exchange.url)
    assert good.returncode == 0, good.stderr
    line = next(json.loads(line) for line in good.stderr.splitlines() if '"poll published"' in line)
    assert (line["outcome"], line["sequence"], line["opened"] > 100) == ("PUBLISHED", 1, True)
    again = produce(ready, *usual, exchange.url)
    line = next(json.loads(line) for line in again.stderr.splitlines() if '"poll published"' in line)
    assert (again.returncode, line["sequence"], "opened" in line) == (0, 2, line.get("opened", 0) > 0)
    failed = produce(ready, *usual, f"http://{NOBODY}")
    assert (failed.returncode, errors(failed)) == (1, "")
    assert '"outcome": "FAILED"' in failed.stderr
    refused = produce({**ready, "BOURSE_CLIENT_SECRET": "wrong"}, *usual, exchange.url)
    assert refused.returncode == 2
    assert "invalid client credentials" in errors(refused)
    assert "national id" in errors(refused)
    assert len(errors(refused).splitlines()) == 2


def test_a_service_waits_for_broker_and_registry(
    exchange: Server, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """It logs that, continues by itself when they come, and ends with 0 on a signal."""
    log, port = tmp_path / "log", free_port()
    options = ["--address", exchange.url, "--clock", "response", "--schedule", "always"]
    variables = environment({"BOURSE_REGISTRY_URL": f"http://127.0.0.1:{port}"})
    schemas = tmp_path / "schemas.json"
    with serve_registry(file=schemas) as registry:
        Cluster(NOBODY, registry.url).registry().register_all("bourse")
    with MockKafka() as mock:
        variables["BOURSE_BOOTSTRAP_SERVERS"] = mock.bootstrap_servers
        for topic in (TRADES, CANDLES, POLLS, DEAD_LETTERS):
            KafkaProducer({"bootstrap.servers": mock.bootstrap_servers}).list_topics(topic.full_name(), 10)
        with spawn([*COMMAND, *options], env=variables, stdout=log, stderr=log) as child:
            wait_for(lambda: "does not answer" in log.read_text(), 20)
            with serve_registry(port=port, file=schemas):
                wait_for(lambda: '"PUBLISHED"' in log.read_text(), 30)
                child.send(signal.SIGTERM)
                assert child.wait(5) == 0, log.read_text()
    assert '"stopped"' in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_service_that_waits_can_be_stopped(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Within 5 s and with 0, though no handler runs while Kafka's client waits for a broker."""
    log = tmp_path / "log"
    with serve_registry() as registry:
        Cluster(NOBODY, registry.url).registry().register_all("bourse")
        variables = environment({"BOURSE_REGISTRY_URL": registry.url})
        with spawn([*COMMAND, "--schedule", "always"], env=variables, stdout=log, stderr=log) as child:
            wait_for(lambda: log.exists() and "does not answer" in log.read_text(), 20)
            asks_again = time.monotonic() + 2
            wait_for(lambda: time.monotonic() > asks_again)
            began = time.monotonic()
            child.send(signal.SIGTERM)
            assert child.wait(10) == 0, log.read_text()
            assert time.monotonic() - began < 5
    assert "Traceback" not in log.read_text()
