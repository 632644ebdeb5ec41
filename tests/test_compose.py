"""docker-compose.yml and the image, as far as they can be tested without Docker."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bourse_cli.health import Monitor
from bourse_sandbox.jars import fetch, read_lock
from bourse_sandbox.kafka import Kafka, free_port, java
from bourse_sandbox.processes import spawn

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RUNNING = ("producer", "standby", "alerts", "archive", "archive-polls", "board")
OURS = {"setup", "exchange", *RUNNING}


def filled_in(text: str, **variables: str) -> str:
    """Return the text as compose reads it: `${NAME:-default}` filled in, `$$` a dollar."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1]) or match[2], text)
    assert not re.search(r"(?<!\$)\$(?!\$)", text), "a variable without a default"
    return text.replace("$$", "$")


def seconds(duration: str) -> int:
    """Return a duration such as 30s."""
    assert duration.endswith("s")
    return int(duration[:-1])


def test_it_follows_the_compose_specification() -> None:
    """The specification's own JSON schema, as check-jsonschema ships it, reports no error."""
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(yaml.safe_load(filled_in(TEXT)))] == []
    assert list(validator.iter_errors({"services": {"broken": {"ports": 1}}})), "the schema must be able to fail"


def test_practice_needs_no_account_and_no_variable() -> None:
    """Only the exchange waits for the profile, and every file that practice names is there."""
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"exchange"}
    assert SERVICES["exchange"]["profiles"] == ["practice"]
    practice = yaml.safe_load(filled_in(TEXT))
    named = [
        *(secret["file"] for secret in practice["secrets"].values()),
        *(file for service in practice["services"].values() for file in service.get("env_file", [])),
        *(
            source
            for service in practice["services"].values()
            for volume in service.get("volumes", [])
            if (source := volume.split(":")[0]).startswith(".")
        ),
    ]
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert (ROOT / "compose/practice/rules/rules.yaml").is_file()


def test_a_live_account_is_one_variable_away_and_stays_out_of_the_repository() -> None:
    """MARKET=live takes settings, secrets and alert rules from a folder that git ignores, for every service."""
    live = yaml.safe_load(filled_in(TEXT, MARKET="live"))
    assert all(live["services"][name]["env_file"] == ["compose/live/settings.env"] for name in OURS)
    assert live["services"]["alerts"]["volumes"] == ["./compose/live/rules:/etc/bourse/rules:ro"]
    assert {secret["file"] for secret in live["secrets"].values()} == {
        "./compose/live/client-secret",
        "./compose/live/nid",
    }
    ignored = (ROOT / "compose/live/.gitignore").read_text("utf-8").split("\n")
    assert "*" in ignored
    assert (ROOT / "compose/live/settings.env.example").is_file()


def test_what_it_starts_with() -> None:
    """Every image can be replaced by a variable; ours are the versions that the tests run."""
    images = {name: service["image"] for name, service in SERVICES.items()}
    assert images["kafka"] == "${KAFKA_IMAGE:-apache/kafka:4.2.2}"
    assert images["registry"] == "${REGISTRY_IMAGE:-apicurio/apicurio-registry:3.3.3}"
    assert {images[name] for name in OURS} == {"${STREAM_IMAGE:-bourse-stream:local}"}
    assert set(SERVICES) == {"kafka", "registry", *OURS}


def test_every_port_is_bound_to_this_machine() -> None:
    """Nothing is reachable from another machine."""
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)


def test_it_starts_in_order_and_comes_back() -> None:
    """Kafka, then the registry, then topics and schemas, then everyone; services come back, the one-shot does not."""
    healthy, done = {"condition": "service_healthy"}, {"condition": "service_completed_successfully"}
    assert SERVICES["registry"]["depends_on"] == {"kafka": healthy}
    assert SERVICES["setup"]["depends_on"] == {"kafka": healthy, "registry": healthy}
    for name in RUNNING:
        assert SERVICES[name]["depends_on"] == {"setup": done}
    assert {name for name, service in SERVICES.items() if "healthcheck" in service} == {*SERVICES} - {"setup"}
    assert {name for name, service in SERVICES.items() if service["restart"] != "unless-stopped"} == {"setup"}


def test_a_service_answers_its_health_check_and_its_metrics_port() -> None:
    """The check asks /livez, so that a service that only waits is not restarted; each metrics port is on loopback."""
    ports = [SERVICES[name]["ports"] for name in RUNNING]
    assert ports == [[f"127.0.0.1:{port}:8080"] for port in (9101, 9102, 9103, 9104, 9105, 8090)]
    for name in RUNNING:
        service = SERVICES[name]
        command, (cmd, python, flag, code) = service["command"], service["healthcheck"]["test"]
        assert (cmd, python, flag) == ("CMD", "python", "-c")
        assert "/livez" in code
        with Monitor(name).serve(command[command.index("--http") + 1].replace("8080", "0")) as url:
            asked = code.replace("http://127.0.0.1:8080", str(url).replace("0.0.0.0", "127.0.0.1"))
            assert asked != code
            assert subprocess.run([sys.executable, "-c", asked], timeout=30, check=False).returncode == 0
        assert subprocess.run(
            [sys.executable, "-c", asked], timeout=30, check=False, stderr=subprocess.DEVNULL
        ).returncode


def test_a_second_producer_stands_by() -> None:
    """With the same command, account and limits; only its metrics port differs."""
    producer, standby = dict(SERVICES["producer"]), dict(SERVICES["standby"])
    assert producer.pop("ports") != standby.pop("ports")
    assert producer == standby


def test_no_container_takes_the_machine() -> None:
    """Memory and logs are limited, and processors of our own services; logs are rotated."""
    for name, service in SERVICES.items():
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}, name
        assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert {SERVICES[name]["cpus"] for name in OURS} == {1.0}


def test_each_archive_has_a_group_of_its_own_and_both_have_one_folder() -> None:
    """Trades and polls: next to each other, so that `archive verify` compares the two."""
    commands = [SERVICES[name]["command"] for name in ("archive", "archive-polls")]
    assert ["--topic" in command for command in commands] == [False, True]
    assert commands[1][commands[1].index("--topic") + 1] == "polls"
    assert "--group" in commands[1]
    for command, service in zip(commands, ("archive", "archive-polls"), strict=True):
        assert SERVICES[service]["volumes"] == [f"archive:{command[command.index('--to') + 1]}"]
        assert seconds(SERVICES[service]["stop_grace_period"]) > 10


def test_our_containers_have_no_more_rights_than_they_need() -> None:
    """No root, no capability, nothing to write to but what they keep; secrets are files, never variables."""
    for name in OURS:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "user" not in service
    assert SERVICES["producer"]["secrets"] == ["client-secret", "nid"]
    settings = [*(ROOT / "compose").rglob("settings.env*"), ROOT / "docker-compose.yml"]
    assert len(settings) == 3
    assert not any(re.search(r"BOURSE_(?:CLIENT_SECRET|NID)\b\s*[=:]", file.read_text("utf-8")) for file in settings)


def test_data_outlives_the_containers() -> None:
    """Kafka and the archives write to named volumes; the registry keeps its schemas in Kafka."""
    assert set(COMPOSE["volumes"]) == {"kafka", "archive"}
    kafka = SERVICES["kafka"]
    assert kafka["volumes"] == [f"kafka:{kafka['environment']['KAFKA_LOG_DIRS']}"]
    assert SERVICES["registry"]["environment"]["APICURIO_STORAGE_KIND"] == "kafkasql"


def test_the_image_runs_as_nobody_and_installs_from_the_lock() -> None:
    """The image's user is no root, and its base can be replaced."""
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"]
    last = dockerfile.rpartition("FROM ")[2]
    assert re.search(r"^USER 10001$", last, re.MULTILINE)
    assert "requirements.lock" in dockerfile
    wanted = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").split() if line.startswith("!")}
    assert {path for path in wanted if not (ROOT / path).exists()} == set()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {package.partition("/")[0] for package in packages["packages"]} <= wanted


@pytest.mark.kafka
def test_a_real_broker_starts_with_these_settings(kafka: Kafka, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Kafka takes the settings as the image writes them: KAFKA_NODE_ID becomes node.id. Only the addresses differ."""
    environment = dict(SERVICES["kafka"]["environment"])
    identity = environment.pop("CLUSTER_ID")
    assert len(base64.urlsafe_b64decode(identity + "==")) == 16
    settings = {name.removeprefix("KAFKA_").lower().replace("_", "."): text for name, text in environment.items()}
    ports = {name: free_port() for name in ("19092", "9092", "9093")}
    for name in ("listeners", "advertised.listeners", "controller.quorum.voters"):
        settings[name] = re.sub(r"\b\d{4,5}\b", lambda match: str(ports[match[0]]), settings[name])
        settings[name] = re.sub(r"(//|@)(?:kafka|localhost|127\.0\.0\.1)?:", r"\g<1>127.0.0.1:", settings[name])
    settings["log.dirs"] = str(tmp_path / "log")
    properties = tmp_path / "server.properties"
    properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    jars = fetch(read_lock(ROOT / "sandbox" / "bourse_sandbox" / "jars.lock"), "Apache Kafka")
    base: list[str | Path] = [java(), "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", ":".join(map(str, jars))]
    log = tmp_path / "output"

    def launch(*arguments: str | Path) -> Any:
        return spawn([*base, *arguments], stdout=log, stderr=log)

    with launch("kafka.tools.StorageTool", "format", "-t", identity, "-c", properties) as formatted:
        assert formatted.wait(60) == 0, formatted.log_tail()
    with launch("kafka.Kafka", properties) as broker:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        client = AdminClient({"bootstrap.servers": f"127.0.0.1:{ports['9092']}", "log_level": 0})

        def answer() -> Any:
            assert broker.poll() is None, broker.log_tail()
            try:
                return client.list_topics(timeout=0.5)
            except KafkaException:
                return None

        found = wait_for(answer, 60)
        assert [str(member) for member in found.brokers.values()] == [f"127.0.0.1:{ports['9092']}/1"]
        assert found.cluster_id == identity
