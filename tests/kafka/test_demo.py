"""The whole chain: `bourse demo` and `bourse sandbox up`, as a newcomer runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from playwright.sync_api import Page, expect

from bourse_sandbox.kafka import Kafka, free_port
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.stack import NO_ALERTS, Stack
from bourse_schemas.errors import BourseError
from tests.consumers.test_board_page import browser, visit  # noqa: F401  # fixtures

pytestmark = pytest.mark.kafka
BOURSE = (sys.executable, "-m", "bourse_cli")
SHARED_DAY = Path(__file__).parents[3] / "shared" / "data" / "day-2019-08-24.ndjson.gz"


def bourse(*arguments: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [*BOURSE, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def last_object(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON object on the last line of stdout."""
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def events(opened: int, traded: int, revised: int, cancelled: int) -> dict[str, int]:
    """Return event counts as the demo gives them."""
    total = opened + traded + revised + cancelled
    return {"OPENED": opened, "TRADED": traded, "REVISED": revised, "CANCELLED": cancelled, "total": total}


def check_day(summary: dict[str, Any], expected: dict[str, int]) -> None:
    """Compare a replayed day with what it must give."""
    assert summary["events"] == expected
    assert summary["archived_rows"] == expected["total"]
    assert summary["dead_letters"] == 0
    assert (summary["alerts"] > 0) == (summary["broker"] != "mock")
    assert set(summary) == {
        *("broker", "polls", "rows", "events", "alerts", "archived_rows"),
        *("dead_letters", "visible_ms", "seconds", "proof"),
    }
    total = expected["total"]
    assert summary["proof"] == {
        **dict.fromkeys(("derived", "kafka", "archive"), total),
        **dict.fromkeys(("lost", "twice", "unknown"), 0),
    }


@pytest.mark.usefixtures("kafka")
def test_the_real_day_that_ships(tmp_path: Path) -> None:
    """2019-08-21 through real Kafka, alerts and archive gives exactly its events."""
    summary = last_object(bourse("demo", "--speed", "max", "--broker", "kafka", "--json", cwd=tmp_path))
    check_day(summary, events(548, 18_711, 2, 85))
    assert summary["broker"] == "kafka"
    assert 0 < summary["visible_ms"]["p50"] <= summary["visible_ms"]["p99"]
    (log,) = tmp_path.glob("data/demo-*/logs/alerts.log")
    rules = {json.loads(line).get("rule", "") for line in log.read_text("utf-8").splitlines() if line.startswith("{")}
    assert "annulled" in rules
    assert not any("feed" in rule for rule in rules), "the feed of a replay is healthy"


@pytest.mark.usefixtures("kafka")
@pytest.mark.skipif(not SHARED_DAY.is_file(), reason=f"the second real day is not there: {SHARED_DAY}")
def test_the_other_real_day(tmp_path: Path) -> None:
    """2019-08-24 likewise."""
    summary = last_object(bourse("demo", "--replay", str(SHARED_DAY), "--speed", "max", "--json", cwd=tmp_path))
    check_day(summary, events(541, 41_293, 16, 80))


@pytest.mark.usefixtures("kafka")
def test_an_exchange_that_misbehaves_gives_the_same_day(tmp_path: Path) -> None:
    """A bad answer is fetched again; none ends the demo or makes another event."""
    faulty = ["truncated:0.1", "half:0.1", "nan@5", "reset@9", "old-response@20-22", "duplicates@40-42"]
    faults = [word for fault in faulty for word in ("--fault", fault)]
    options = ["--speed", "max", "--broker", "kafka", "--json", *faults]
    summary = last_object(bourse("demo", *options, cwd=tmp_path))
    check_day(summary, events(548, 18_711, 2, 85))
    assert summary["polls"] > 98 + 5


def test_the_mock_cluster_will_do(tmp_path: Path) -> None:
    """If no jar is available the chain still runs, names its broker, and reports that it raises no alerts."""
    ran = bourse("demo", "--speed", "max", "--broker", "mock", "--json", cwd=tmp_path)
    assert "raises no alerts" in ran.stderr
    summary = last_object(ran)
    check_day(summary, events(548, 18_711, 2, 85))
    assert summary["broker"] == "mock"


def test_without_jars_auto_falls_back_and_says_so(tmp_path: Path) -> None:
    """A machine without a way to Maven Central gets the mock cluster, in one plain line."""
    nowhere = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "BOURSE_MAVEN_REPOSITORY": "http://127.0.0.1:9"}
    command = [*BOURSE, "demo", "--seconds", "4", "--json"]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert last_object(ran)["broker"] == "mock"
    assert "mock cluster" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.usefixtures("kafka")
def test_a_killed_producer_ctrl_c_and_what_the_demo_prints(
    tmp_path: Path,
    wait_for: Callable[..., Any],
    visit: Callable[..., Page],  # noqa: F811
) -> None:
    """A check list, the board, a producer to kill, a proof at Ctrl-C, and commands that work from that folder.

    The page has the proof too when the demo has ended.
    """
    out = tmp_path / "out"
    command = [*BOURSE, "demo", "--broker", "kafka", "--speed", "300"]
    environment = {**os.environ, "OF_THE_USER": "a secret of another program"}
    with spawn(command, env=environment, cwd=tmp_path, stdout=out, stderr=tmp_path / "err") as demo:

        def shown() -> str:
            return out.read_text("utf-8") if out.is_file() else ""

        pid = wait_for(lambda: re.search(r"kill -9 (\d+)", shown()), 90)[1]
        page = wait_for(lambda: re.search(r"moment: (\S+)", shown()), 10)[1]
        tab = visit(page)
        assert [line.split()[1].rstrip(",:") for line in shown().splitlines() if line.startswith("  ✓")] == [
            *("Kafka", "board", "archive", "alerts", "exchange", "producer"),
        ]
        os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: re.search("was killed[^\x00]* events of ", shown()), 60)
        wait_for(lambda: " FIRING " in shown(), 60)
        assert wait_for(lambda: httpx2.get(f"{page}api/snapshot").json()["gaps"], 20)
        wait_for(lambda: [*tmp_path.glob("data/*/archive/bourse.trades/_delta_log/*2.json")], 60)
        expect(tab.locator("#notice")).to_be_hidden()
        demo.send(signal.SIGINT)
        assert demo.wait(30) == 0, shown() + (tmp_path / "err").read_text("utf-8")
    written = [path.read_bytes() for path in tmp_path.glob("data/*/logs/*")]
    assert written
    assert not any(b"of another program" in each for each in written)
    proof = re.search("Proof: (.*)\\.", shown())
    assert proof
    tab.click("#lang")
    expect(tab.locator("#notice span")).to_have_text(f"Proof: {proof[1]}")
    text = shown()
    assert "Traceback" not in text + (tmp_path / "err").read_text("utf-8")
    real = "21 August 2019", "Nothing here is live", "Simulated:", "Ctrl-C"
    for part in (*real, "\nStopping; comparing every event …\n", "lost 0, twice 0, unknown 0"):
        assert part in text
    commands = re.findall(r"^  (\S*(?:bourse|python) .*)$", text.partition("\nNext:\n")[2], re.MULTILINE)
    assert [re.search("replay|python|verify|sandbox up", each)[0] for each in commands] == [  # type: ignore[index]
        *("replay", "python", "verify", "sandbox up"),
    ]
    for pasted, part in zip(commands[:3], ("IRO", "last_price", "ok: nothing is missing"), strict=True):
        ran = subprocess.run(["bash", "-c", pasted], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert part in ran.stdout, ran.stderr
    port = str(free_port())
    up = commands[3].replace("9092", str(free_port())).replace("8081", port)
    with spawn(["bash", "-c", f"exec {up}"], cwd=tmp_path, stdout=tmp_path / "up", stderr=tmp_path / "up") as child:
        wait_for(lambda: "Ctrl-C" in (tmp_path / "up").read_text("utf-8"), 60)
        child.send(signal.SIGINT)
        assert child.wait(20) == 0


@pytest.mark.parametrize(
    ("command", "sign"),
    [("demo --broker mock", "✓ Kafka"), ("demo --broker kafka", "Ctrl-C ends it"), ("sandbox up", "")],
)
def test_ctrl_c_while_it_starts(tmp_path: Path, wait_for: Callable[..., Any], command: str, sign: str) -> None:
    """Exit code 0, no error, no addresses; while Kafka starts too, and nothing of it is left."""
    out, err = tmp_path / "out", tmp_path / "err"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with spawn([*BOURSE, *command.split()], cwd=tmp_path, env=environment, stdout=out, stderr=err) as demo:
        wait_for(lambda: out.is_file() and sign in out.read_text("utf-8"), 40)
        if "mock" not in command:
            wait_for(lambda: [*tmp_path.glob("bourse-kafka-*/kafka.log")], 40)
        demo.send(signal.SIGINT)
        assert demo.wait(30) == 0
    assert err.read_text("utf-8").strip() in {"", NO_ALERTS}
    assert "kcat" not in out.read_text("utf-8")
    assert not [*tmp_path.glob("bourse-*")]


def test_demos_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    """Eight at once; each makes its folder and fails at its broker."""
    eight = "import os; from bourse_sandbox.demo import demo; [os.fork() for _ in range(3)]"
    script = f"{eight}; demo(['--json', '--broker', 'nonsense'], standalone_mode=False)"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert ran.stderr.count(b"ConfigurationError: --broker nonsense") == 8
    assert len([*tmp_path.glob("data/demo-*/logs")]) == 8


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--speed", "0"], "--speed"),
        (["--speed", "fast"], "--speed"),
        (["--speed", "nan"], "--speed"),
        (["--replay", "nowhere.gz"], "nowhere.gz"),
        (["--broker", "nonsense"], "HOST:PORT"),
        (["--broker", "http://127.0.0.1:9"], "--broker http://127.0.0.1:9: give"),
        (["--rules", "nowhere.yaml"], "nowhere.yaml"),
        (["--broker", "127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_mistakes_are_named_in_a_line_or_two(tmp_path: Path, arguments: list[str], hint: str) -> None:
    """Exit code 2 and what to change, no traceback."""
    ran = bourse("demo", "--json", *arguments, cwd=tmp_path, timeout=30)
    assert ran.returncode == 2, ran.stderr
    assert hint in ran.stderr
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.splitlines()) <= 2


def test_a_mistake_in_the_rules_is_reported_as_a_whole_before_anything_starts(tmp_path: Path) -> None:
    """With its place, as `bourse alerts check` does."""
    (tmp_path / "rules.yaml").write_text("version: 1\nrules:\n  - {name: a, when: lastprice > 1}\n")
    ran = bourse("demo", "--rules", "rules.yaml", cwd=tmp_path, timeout=30)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("Error: rules.yaml:3:")
    assert "last_price" in ran.stderr


@pytest.mark.parametrize("command", [["demo"], ["sandbox", "up"], ["sandbox", "exchange"]])
def test_an_unknown_fault_is_reported_before_anything_starts(tmp_path: Path, command: list[str]) -> None:
    """Exit code 2 and two lines."""
    ran = bourse(*command, "--fault", "htm:0.2", cwd=tmp_path, timeout=30)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("Error: --fault htm:0.2: unknown kind of fault; did you mean html?\n")
    assert len(ran.stderr.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_what_is_replayed_must_be_a_capture(tmp_path: Path) -> None:
    """A file of another kind is named before anything starts."""
    (tmp_path / "day.gz").write_bytes(b"not a capture")
    ran = bourse("demo", "--json", "--broker", "mock", "--replay", "day.gz", cwd=tmp_path, timeout=40)
    assert ran.returncode == 2, ran.stderr
    assert "day.gz" in ran.stderr
    assert "Traceback" not in ran.stderr


@contextmanager
def sandbox(folder: Path, wait_for: Callable[..., Any], *options: str) -> Iterator[tuple[Child, dict[str, str]]]:
    """Run `bourse sandbox up --json`; give its process and its addresses."""
    out, err = folder / "up.json", folder / "up.err"
    with spawn([*BOURSE, "sandbox", "up", "--json", *options], cwd=folder, stdout=out, stderr=err) as child:
        wait_for(lambda: child.poll() is not None or (out.is_file() and out.read_text("utf-8").endswith("\n")), 40)
        yield child, json.loads(out.read_text("utf-8").splitlines()[0])


def test_the_sandbox_may_have_a_producer_and_ports_of_its_own(
    kafka: Kafka, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """With them the documents' commands can be pasted: events come without a second terminal."""
    ports = free_port(), free_port()
    asked = ["--produce", "--kafka-port", str(ports[0]), "--registry-port", str(ports[1])]
    with sandbox(tmp_path, wait_for, *asked) as (child, addresses):
        at = ["--bootstrap-servers", f"127.0.0.1:{ports[0]}", "--registry-url", f"http://127.0.0.1:{ports[1]}"]
        assert [addresses["bootstrap_servers"], addresses["registry_url"]] == [at[1], at[3]]
        tail = ["tail", "trades", "--from-beginning", "--exit-at-end", "--json", *at]
        wait_for(lambda: bourse(*tail, cwd=tmp_path).stdout, 60)
        child.send(signal.SIGINT)
        assert child.wait(20) == 0
    taken = kafka.bootstrap_servers.rpartition(":")[2]
    ran = bourse("sandbox", "up", "--kafka-port", taken, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (2, f"Error: port {taken} is taken: choose another one for Kafka\n")


@pytest.mark.usefixtures("kafka")
def test_the_sandbox_serves_producers_and_subscribers(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Its first line has everything that a producer, `bourse tail` and kcat need."""
    with sandbox(tmp_path, wait_for) as (child, addresses):
        assert set(addresses) == {
            *("bootstrap_servers", "registry_url", "exchange_url", "client_id", "client_secret_file", "nid"),
        }
        assert Path(addresses["client_secret_file"]).stat().st_mode & 0o777 == 0o600
        at = ["--bootstrap-servers", addresses["bootstrap_servers"], "--registry-url", addresses["registry_url"]]
        nid = tmp_path / "nid"
        nid.write_text(addresses["nid"])
        account = ["--client-id", addresses["client_id"], "--client-secret-file", addresses["client_secret_file"]]
        poll = ["produce", "--once", "--schedule", "always", "--clock", "response", "--address"]
        produce = [*poll, addresses["exchange_url"], *account, "--nid-file", str(nid), *at]

        def market_is_open() -> bool:
            ran = bourse(*produce, cwd=tmp_path)
            assert ran.returncode == 0, ran.stderr
            return '"outcome": "PUBLISHED"' in ran.stderr

        wait_for(market_is_open, 60)
        tail = bourse(
            "tail", "trades", "--from-beginning", "--exit-at-end", "--json", "--with-metadata", *at, cwd=tmp_path
        )
        assert tail.returncode == 0, tail.stderr
        records = [json.loads(line) for line in tail.stdout.splitlines()]
        assert records
        assert {record["op"] for record in records} <= {"OPENED", "TRADED", "REVISED", "CANCELLED"}
        assert all(record["_key"] == record["instrument"] for record in records)
        if shutil.which("kcat") is None:
            assert os.environ.get("CI") != "true", "kcat is missing, and CI demands it"
        else:
            keys = [
                "kcat",
                "-b",
                addresses["bootstrap_servers"],
                "-t",
                "bourse.trades",
                "-C",
                "-e",
                "-q",
                "-f",
                "%k\\n",
            ]
            ran = subprocess.run(keys, capture_output=True, text=True, timeout=30, check=True)
            assert sorted(ran.stdout.split()) == sorted(record["instrument"] for record in records)
        child.send(signal.SIGINT)
        assert child.wait(20) == 0


@pytest.mark.usefixtures("kafka")
def test_a_sandbox_whose_kafka_dies_ends_with_1(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """It does not keep an exchange and a registry for a broker that is gone; the reason is on stderr."""
    with sandbox(tmp_path, wait_for, "--data", str(tmp_path / "kept")) as (child, addresses):
        port = addresses["bootstrap_servers"].rpartition(":")[2]
        (pid,) = java_with(tmp_path / "kept", port)
        os.kill(pid, signal.SIGKILL)
        assert child.wait(10) == 1
    errors = (tmp_path / "up.err").read_text("utf-8")
    assert "Apache Kafka has ended with exit code -9; " in errors
    assert "Traceback" not in errors
    assert "WARNING:" not in errors


def java_with(data: Path, port: str) -> list[int]:
    """Return the processes that run in this folder and listen on this port."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                if (process / "cwd").readlink() == data and b"kafka.Kafka" in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
    assert port in (data / "server.properties").read_text("utf-8")
    return found


@pytest.mark.usefixtures("kafka")
def test_a_stack_notices_that_its_registry_has_ended() -> None:
    """As it does for Kafka."""
    with Stack("mock") as stack:
        stack.require_running()
        assert stack._registry is not None
        stack._registry.close()
        with pytest.raises(BourseError, match="the schema registry has ended"):
            stack.require_running()


@pytest.mark.usefixtures("kafka")
def test_data_keeps_records_and_schema_ids(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """After a restart on the same folder old records are still readable: ids mean the same schemas."""
    kept = ["--data", str(tmp_path / "kept")]
    subjects: list[dict[str, int]] = []
    texts = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        producing = ["--produce"] if run == "one" else []
        with sandbox(tmp_path / run, wait_for, *kept, *producing) as (child, addresses):
            at = ["--bootstrap-servers", addresses["bootstrap_servers"], "--registry-url", addresses["registry_url"]]
            tail = ["tail", "trades", "--from-beginning", "--exit-at-end", "--json", *at]
            texts.append(wait_for(lambda tail=tail: bourse(*tail, cwd=tmp_path).stdout, 60))
            with SchemaRegistryClient({"url": addresses["registry_url"]}) as client:
                names = client.get_subjects()
                subjects.append({name: client.get_latest_version(name).schema_id or 0 for name in names})
            child.send(signal.SIGINT)
            assert child.wait(20) == 0
    assert len(subjects[0]) == 5
    assert subjects[0] == subjects[1]
    assert set(texts[0].splitlines()) <= set(texts[1].splitlines())
