"""What a running service answers over HTTP, and the alarms that are raised from it."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx2
import pytest
import yaml
from click.testing import CliRunner

from bourse_cli.health import Monitor
from bourse_cli.options import http_option
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster

ALERTS = yaml.safe_load((Path(__file__).parents[2] / "prometheus-alerts.yaml").read_text("utf-8"))
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]


class Declared(NamedTuple):
    """A metric as it is declared."""

    kind: str
    documentation: str
    labels: tuple[str, ...]


def declared() -> dict[str, Declared]:
    """Return every metric by its name, as Prometheus reads it."""
    monitor = Monitor("test")
    found = {}
    for group in (monitor.producer, monitor.consumer, monitor.notify, monitor.archive, monitor.board, monitor.kafka):
        for metric in vars(group).values():
            (family,) = metric.describe()
            name = family.name + "_total" * (family.type == "counter")
            found[name] = Declared(family.type, family.documentation, metric._labelnames)
    return found


METRICS = declared()


@pytest.fixture
def monitor() -> Monitor:
    return Monitor("test")


@pytest.fixture
def get(monitor: Monitor) -> Iterator[Callable[[str], httpx2.Response]]:
    """Return `get(path)`: what the monitor answers on a free port."""
    with monitor.serve("0") as url, httpx2.Client(base_url=str(url), trust_env=False) as client:
        yield client.get


def samples(get: Callable[[str], httpx2.Response]) -> dict[str, float]:
    """Return the metrics as Prometheus would read them, by name and labels."""
    lines = [line for line in get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_a_service_is_ready_when_no_reason_is_left(monitor: Monitor, get: Callable[[str], httpx2.Response]) -> None:
    """Each subject has one reason, a line each; only the service itself takes it back."""
    assert (get("/readyz").status_code, get("/readyz").text) == (503, "starting\n")
    monitor.unready("starting", None)
    assert (get("/readyz").status_code, get("/readyz").text) == (200, "ready\n")
    monitor.unready("Kafka", "no connection")
    monitor.unready("trying again", "disk\nfull")
    monitor.unready("Kafka", "no answer")
    assert (get("/readyz").status_code, get("/readyz").text) == (503, "Kafka: no answer\ntrying again: disk full\n")
    assert monitor.reasons() == {"Kafka": "no answer", "trying again": "disk\nfull"}


def test_what_is_computed_at_the_request(monitor: Monitor, get: Callable[[str], httpx2.Response]) -> None:
    """A gauge and a reason not to be ready that need no help of a service that may be stuck."""
    monitor.unready("starting", None)
    state: list[str | None] = [None]
    monitor.check("polls", lambda: state[0])
    monitor.producer.session_open.set_function(lambda: float(state[0] is not None))
    assert (get("/readyz").text, samples(get)["bourse_session_open"]) == ("ready\n", 0.0)
    state[0] = "no recent poll"
    assert (get("/readyz").text, samples(get)["bourse_session_open"]) == ("polls: no recent poll\n", 1.0)


def test_alive_until_no_sign_of_life_came_in_time(
    monitor: Monitor, get: Callable[[str], httpx2.Response], wait_for: Callable[..., Any]
) -> None:
    """A service that is not ready is alive all the same; one that promised a sign and gave none is not."""
    assert get("/livez").status_code == 200
    monitor.beat(0.05)
    dead = wait_for(lambda: (answer := get("/livez")).status_code == 503 and answer)
    assert re.fullmatch(r"no sign of life for \d+ s\n", dead.text)
    monitor.beat(60)
    assert get("/livez").status_code == 200
    assert get("/nothing").status_code == 404


def test_metrics_are_what_was_counted(monitor: Monitor, get: Callable[[str], httpx2.Response]) -> None:
    """Counters add up, gauges keep the last value, histograms count; without labels a counter starts at 0."""
    monitor.producer.events.labels("TRADED").inc(3)
    monitor.producer.events.labels("TRADED").inc()
    monitor.producer.leader.set(0)
    monitor.producer.leader.set(1)
    monitor.producer.fetch_seconds.observe(0.5)
    monitor.producer.fetch_seconds.observe(1.5)
    found = samples(get)
    assert found['bourse_events_total{op="TRADED"}'] == 4
    assert found["bourse_leader"] == 1
    assert (found["bourse_fetch_seconds_count"], found["bourse_fetch_seconds_sum"]) == (2, 2)
    assert found["bourse_fenced_total"] == 0
    assert math.isnan(found["bourse_calls_left"])
    assert get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_a_service_reports_its_own_metrics_and_its_build(
    monitor: Monitor, get: Callable[[str], httpx2.Response]
) -> None:
    """A consumer has no leader; two services of one process share nothing."""
    monitor.consumer.rows.labels("x").inc()
    with Monitor("producer").serve("0") as url:
        assert "bourse_leader" not in httpx2.get(f"{url}/metrics", trust_env=False).text
    found = samples(get)
    assert "bourse_leader" not in found
    assert found['bourse_consumer_rows_total{consumer="x"}'] == 1
    assert found[f'bourse_build_info{{version="{version("bourse-stream")}"}}'] == 1


def test_every_metric_has_a_proper_name_a_cause_and_a_consequence() -> None:
    """Names as Prometheus wants them; the documentation is two sentences."""
    assert len(METRICS) > 30
    for name, metric in METRICS.items():
        assert re.fullmatch(r"bourse(_[a-z]+)+", name)
        assert metric.kind != "histogram" or name.endswith("_seconds")
        assert re.fullmatch(r"[A-Z1].*[^.]\. [A-Z`].*\.", metric.documentation), name


def statistics(client: str, brokers: dict[str, dict[str, Any]]) -> str:
    """Return librdkafka's statistics, as far as they are looked at."""
    return json.dumps({"type": client, "brokers": brokers})


def broker(nodeid: int, state: str) -> dict[str, Any]:
    return {"nodeid": nodeid, "state": state, "txerrs": 1, "rxerrs": 2, "rtt": {"avg": 1500}}


def test_a_broker_that_is_gone_is_reported(monitor: Monitor, get: Callable[[str], httpx2.Response]) -> None:
    """librdkafka forgets a broker it cannot reach, and leaves it out."""
    monitor.unready("starting", None)
    monitor.statistics(statistics("consumer", {"a/1": broker(1, "UP"), "GroupCoordinator": broker(-1, "UP")}))
    found = samples(get)
    assert found['bourse_kafka_broker_up{broker="1",client="consumer"}'] == 1
    assert found['bourse_kafka_request_errors{broker="1",client="consumer"}'] == 3
    assert found['bourse_kafka_round_trip_seconds{broker="1",client="consumer"}'] == 0.0015
    assert get("/readyz").status_code == 200
    monitor.statistics(statistics("consumer", {"a/bootstrap": broker(-1, "TRY_CONNECT")}))
    assert samples(get)['bourse_kafka_broker_up{broker="1",client="consumer"}'] == 0
    assert get("/readyz").text == "Kafka: no connection to any broker\n"
    monitor.statistics(statistics("producer", {"a/1": broker(1, "DOWN")}))
    monitor.statistics(statistics("consumer", {"a/1": broker(1, "UP")}))
    assert get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "address", ["", "x", "127.0.0.1", "127.0.0.1:x", ":-1", ":65536", "nowhere.invalid:0", "a..b:0", "::1:0", "[x]:0"]
)
def test_an_address_that_cannot_be_is_an_operators_mistake(monitor: Monitor, address: str) -> None:
    """The line names the option."""
    with pytest.raises(ConfigurationError, match="--http"), monitor.serve(address):
        pass


def test_a_port_that_is_taken_is_an_operators_mistake(monitor: Monitor) -> None:
    """Two services on one machine need two ports."""
    with Monitor("first").serve("0") as url:
        port = str(url).rpartition(":")[2]
        with (
            pytest.raises(ConfigurationError, match=f"--http :{port}: cannot listen on this address"),
            monitor.serve(f":{port}"),
        ):
            pass
    with monitor.serve(port):
        pass


def test_it_listens_on_loopback_by_default(monitor: Monitor) -> None:
    """Nothing is reachable from another machine by default, and nothing listens without the option."""
    for address in ("0", ":0", "127.0.0.1:0"):
        with monitor.serve(address) as url:
            assert str(url).startswith("http://127.0.0.1:")
    with monitor.serve("[::1]:0") as url:
        assert str(url).startswith("http://[::1]:")
        assert httpx2.get(f"{url}/livez", trust_env=False).text == "alive\n"
    with monitor.serve("0.0.0.0:0") as url:
        assert str(url).startswith("http://0.0.0.0:")
    with Monitor("none").serve(None) as url:
        assert url is None


def test_a_silent_caller_delays_nobody(monitor: Monitor, get: Callable[[str], httpx2.Response]) -> None:
    """Each caller has a thread of its own, and the end waits for none of them."""
    with monitor.serve("0") as url:
        host, _, port = str(url).removeprefix("http://").partition(":")
        silent = socket.create_connection((host, int(port)))
        assert httpx2.get(f"{url}/livez", trust_env=False).status_code == 200
        began = time.monotonic()
    assert time.monotonic() - began < 3
    silent.close()


def test_the_option_comes_from_the_command_line_or_the_environment() -> None:
    """One option for all services."""

    @click.command
    @http_option
    def command(http: str | None) -> None:
        click.echo(repr(http))

    for args, environment, expected in (
        ([], {}, "None"),
        (["--http", "1"], {}, "'1'"),
        ([], {"BOURSE_HTTP": ":2"}, "':2'"),
    ):
        assert CliRunner().invoke(command, args, env=environment).output == f"{expected}\n"


def test_a_cluster_reports_its_statistics_only_if_it_is_asked_to() -> None:
    """Two clusters are equal, whatever they report to."""
    cluster = Cluster("x:1", "http://x:2")
    reporting = replace(cluster, on_statistics=print)
    assert cluster == reporting
    assert "print" not in repr(reporting)
    assert (cluster._statistics(), reporting._statistics()["stats_cb"]) == ({}, print)


def test_alarms_are_of_metrics_there_are() -> None:
    """Every name in every expression is one that a service reports, with labels that it has."""
    known = {name: set(metric.labels) for name, metric in METRICS.items()}
    used = set()
    for rule in RULES:
        found = re.findall(r"(bourse_[a-z_]+)(?:\{([^}]*)\})?", rule["expr"])
        assert found, rule["alert"]
        for name, matchers in found:
            base = re.sub(r"_(?:bucket|sum|count)$", "", name)
            assert base in known, rule["alert"]
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= known[base], rule["alert"]
            used.add(base)
        assert rule["expr"].count("(") == rule["expr"].count(")")
    assert len(used) >= 14


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alarm_has_severity_cause_and_remedy(rule: dict[str, Any]) -> None:
    """Someone is woken by it."""
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert set(rule["annotations"]) == {"summary", "description", "action"}
    assert all(len(text) > 15 for text in rule["annotations"].values())
    assert re.fullmatch(r"\d+[mh]", rule.get("for", "0m"))
    assert rule["alert"].startswith("Bourse")


def test_no_alarm_twice() -> None:
    """Each has a name of its own."""
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
