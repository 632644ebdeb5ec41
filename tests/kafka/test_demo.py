"""The whole chain: `bourse demo` and `bourse sandbox up`, as a newcomer runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyarrow import dataset

from bourse_sandbox.faults import KINDS
from bourse_sandbox.kafka import Kafka, free_port
from bourse_sandbox.market import REAL_DAY, CapturedDay
from bourse_sandbox.processes import Child, spawn

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
    assert summary["alerts"] > 0
    assert set(summary) == {
        *("broker", "polls", "rows", "events", "alerts", "archived_rows"),
        *("dead_letters", "visible_ms", "seconds"),
    }


@pytest.mark.usefixtures("kafka")
def test_the_real_day_that_ships(tmp_path: Path) -> None:
    """2019-08-21 through real Kafka, alerts and archive gives exactly its events."""
    summary = last_object(
        bourse("demo", "--replay", "real", "--speed", "max", "--broker", "kafka", "--json", cwd=tmp_path)
    )
    check_day(summary, events(548, 18_711, 2, 85))
    assert summary["broker"] == "kafka"
    assert 0 < summary["visible_ms"]["p50"] <= summary["visible_ms"]["p99"]


@pytest.mark.usefixtures("kafka")
@pytest.mark.skipif(not SHARED_DAY.is_file(), reason=f"the second real day is not there: {SHARED_DAY}")
def test_the_other_real_day(tmp_path: Path) -> None:
    """2019-08-24 likewise."""
    summary = last_object(bourse("demo", "--replay", str(SHARED_DAY), "--speed", "max", "--json", cwd=tmp_path))
    check_day(summary, events(541, 41_293, 16, 80))


@pytest.mark.usefixtures("kafka")
def test_services_that_are_killed_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """What a killed producer had fetched and not published is in its successor's first response: totals are exact."""
    options = ["--replay", "real", "--speed", "max", "--broker", "kafka", "--kill-every", "4", "--json"]
    summary = last_object(bourse("demo", *options, cwd=tmp_path))
    assert summary["kills"] >= 1
    assert (summary["lost"], summary["twice"], summary["dead_letters"]) == (0, 0, 0)
    assert summary["archived_rows"] == summary["events"]["total"]
    assert summary["events"]["OPENED"] == 548
    (archive,) = tmp_path.glob("data/demo-*/archive")
    table = dataset.dataset(archive).to_table(["instrument", "volume_delta"])
    traded = table.unify_dictionaries().group_by("instrument").aggregate([("volume_delta", "sum")]).to_pydict()
    day = CapturedDay.load(REAL_DAY)
    shares = day.rows(day.times[-1], rights=False)
    assert dict(zip(traded["instrument"], traded["volume_delta_sum"], strict=True)) == {
        row["TseSymbolCode"]: row["TradeVolume"] for row in shares
    }


@pytest.mark.usefixtures("kafka")
def test_an_exchange_that_misbehaves_gives_the_same_day(tmp_path: Path) -> None:
    """What it spoils is fetched again; none of it ends the demo or makes another event."""
    spoilt = ["truncated:0.1", "half:0.1", "nan@5", "reset@9", "old-response@20-22", "duplicates@40-42"]
    faults = [word for fault in spoilt for word in ("--fault", fault)]
    options = ["--replay", "real", "--speed", "max", "--broker", "kafka", "--json", *faults]
    summary = last_object(bourse("demo", *options, cwd=tmp_path))
    check_day(summary, events(548, 18_711, 2, 85))
    assert summary["polls"] > 98 + 5


def test_the_mock_cluster_will_do(tmp_path: Path) -> None:
    """Where no jar can be had the chain still runs, and says on what."""
    summary = last_object(
        bourse("demo", "--replay", "real", "--speed", "max", "--broker", "mock", "--json", cwd=tmp_path)
    )
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


def test_ctrl_c_ends_a_simulated_day_in_good_order(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Exit code 0, a summary, the files, what to do next, and no process left."""
    out = tmp_path / "out"
    with spawn([*BOURSE, "demo", "--broker", "mock"], cwd=tmp_path, stdout=out, stderr=tmp_path / "err") as demo:
        wait_for(lambda: out.is_file() and "poll" in out.read_text("utf-8"), 40)
        demo.send(signal.SIGINT)
        assert demo.wait(30) == 0
    text = out.read_text("utf-8")
    assert "rows archived" in text
    assert "Parquet files:" in text
    assert all(step in text for step in ("bourse tail", "rules.yaml", "--client-id"))
    assert "Traceback" not in text + (tmp_path / "err").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--speed", "max"], "--replay"),
        (["--speed", "0"], "--speed"),
        (["--speed", "fast"], "--speed"),
        (["--replay", "nowhere.gz"], "nowhere.gz"),
        (["--broker", "nonsense"], "HOST:PORT"),
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


@pytest.mark.parametrize("command", [["demo"], ["sandbox", "up"], ["sandbox", "exchange"]])
def test_an_unknown_fault_is_told_with_all_there_are(tmp_path: Path, command: list[str]) -> None:
    """Exit code 2, a line each, before anything starts."""
    ran = bourse(*command, "--fault", "nosuch", cwd=tmp_path, timeout=30)
    assert ran.returncode == 2, ran.stderr
    assert all(kind in ran.stderr for kind in KINDS)
    assert "Traceback" not in ran.stderr
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
    """With them the documents' commands can be pasted: events come without another terminal's doing."""
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
    """Its first line is all that a producer, `bourse tail` and kcat need."""
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
