"""The examples in other languages: the real day's counts, the same values as ours, mistakes in a line, evolution."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import confluent_kafka
import httpx
import pytest

from bourse_producer.finnotech import SOURCE, Credentials, Finnotech
from bourse_producer.publisher import Publisher
from bourse_producer.service import Producer, Settings
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.registry import serve_registry
from bourse_schemas.codec import avro_schema
from bourse_schemas.commands import apply_topics, plan_topics
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.registry import compatible

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
EXAMPLES, SCHEMAS = ROOT / "examples", ROOT / "schemas" / "bourse_schemas" / "avro"
SECOND_DAY = ROOT.parent / "shared" / "data" / "day-2019-08-24.ndjson.gz"
OPS = ("OPENED", "TRADED", "REVISED", "CANCELLED", "UNKNOWN")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LANGUAGES = ["java", "go", "python"]
Commands = dict[str, list[str]]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, demand: Callable[[str], None]) -> Callable[[str], list[str]]:
    """Return `build(language)`: how its example is called; it is built once, outside the checkout."""
    built: Commands = {"python": [sys.executable, str(EXAMPLES / "python" / "bourse_example.py")]}

    def build(language: str) -> list[str]:
        if language not in built:
            folder = tmp_path_factory.mktemp(language) / "project"
            shutil.copytree(EXAMPLES / language, folder, ignore=shutil.ignore_patterns("target"))
            if language == "java":
                demand("mvn")
                _run(["mvn", "-B", "-q", f"-Dschemas={SCHEMAS}", "package"], folder)
                built[language] = ["java", "-jar", str(folder / "target" / "bourse-example.jar")]
            else:
                demand("go")
                _run(["go", "build", "-o", "bourse-example", "."], folder)
                built[language] = [str(folder / "bourse-example"), "-schemas", str(SCHEMAS)]
        return built[language]

    return build


def _run(command: list[str], folder: Path) -> None:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(params=LANGUAGES)
def program(request: pytest.FixtureRequest, build: Callable[[str], list[str]]) -> list[str]:
    """Return how one language's example is called."""
    return build(request.param)


@pytest.fixture
def cluster(kafka: Kafka, prefix: str) -> Iterator[Cluster]:
    """Return topics and schemas of this test's own, which take records of any time."""
    with serve_registry(compatible=compatible) as registry:
        cluster = Cluster(kafka.bootstrap_servers, registry.url, prefix)
        prepare(cluster)
        yield cluster


def prepare(cluster: Cluster) -> None:
    """Create the topics and register the schemas."""
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(cluster.prefix)


def at(cluster: Cluster) -> list[str]:
    """Return the options that name a cluster: the examples' are those of `bourse`."""
    servers, registry = cluster.bootstrap_servers, cluster.registry_url
    return ["--bootstrap-servers", servers, "--registry-url", registry, "--topic-prefix", cluster.prefix]


def example(program: list[str], cluster: Cluster, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run an example until it has read all there is."""
    command = [*program, *at(cluster), "--exit-at-end"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=timeout, check=False)


def publish(cluster: Cluster, day: Path) -> None:
    """Publish a real day whole, through exchange and producer."""
    practice = practice_exchange(day, "poll")
    settings = Settings(poll_seconds=0, always=True, response_clock=True)
    with practice.serve() as server, httpx.Client() as client:
        exchange = Finnotech(client, server.url, Credentials("practice", "practice", "0123456789"))
        producer = Producer(exchange, lambda: Publisher(cluster, SOURCE), settings)
        for _ in range(practice.state()["responses"]):
            producer._recoverable(producer._poll_once)
        producer._close()


def ours(cluster: Cluster, topic: str) -> list[dict[str, Any]]:
    """Return what our own tool reads, decoded by our own codec."""
    command = [sys.executable, "-m", "bourse_schemas", "tail", topic, "--from-beginning", "--exit-at-end", "--json"]
    ran = subprocess.run([*command, *at(cluster)], capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def canonical(record: dict[str, Any]) -> str:
    """Return a trade in the canonical form of examples/README.md, from `bourse tail --json`."""

    def text(value: Any, kind: Any) -> str:
        if value is None or isinstance(value, bool):
            return json.dumps(value)
        if isinstance(kind, dict) and kind.get("logicalType") == "date":
            return str((date.fromisoformat(value) - EPOCH.date()).days)
        if isinstance(kind, dict) and kind.get("logicalType") == "timestamp-millis":
            return str((datetime.fromisoformat(value) - EPOCH) // timedelta(milliseconds=1))
        if "double" in kind:
            return struct.pack(">d", value).hex()
        return f'"{value}"' if isinstance(value, str) else str(value)

    fields = avro_schema(TradeEvent)["fields"]
    return "\t".join(text(record[field["name"]], field["type"]) for field in fields)


def expected(trades: list[dict[str, Any]], candles: list[dict[str, Any]]) -> list[str]:
    """Return what an example must print, to the letter."""
    table = {candle["instrument"]: candle for candle in candles}
    rows = sorted(table.values(), key=lambda candle: (-candle["value"], candle["instrument"]))[:10]
    columns = ("symbol", "last_price", "closing_price", "volume", "value", "trade_count")
    lines = ["symbol\tlast\tclosing\tvolume\tvalue\ttrades"]
    lines += ["\t".join("-" if row[column] is None else str(row[column]) for column in columns) for row in rows]
    for day in sorted({trade["trading_day"] for trade in trades}):
        ops = Counter(trade["op"] for trade in trades if trade["trading_day"] == day)
        lines.append(f"{day} {' '.join(f'{op}={ops[op]}' for op in OPS)} total={ops.total()}")
    hashes = (int(hashlib.sha256(canonical(trade).encode()).hexdigest(), 16) for trade in trades)
    return [*lines, f"candles={len(table)} trades={len(trades)} digest={sum(hashes) % 2**256:064x}"]


DAYS = [
    pytest.param(REAL_DAY, "2019-08-21 OPENED=548 TRADED=18711 REVISED=2 CANCELLED=85 UNKNOWN=0 total=19346", id="21"),
    pytest.param(
        SECOND_DAY,
        "2019-08-24 OPENED=541 TRADED=41293 REVISED=16 CANCELLED=80 UNKNOWN=0 total=41930",
        id="24",
        marks=pytest.mark.skipif(not SECOND_DAY.exists(), reason=f"{SECOND_DAY.name} is not beside the checkout"),
    ),
]


@pytest.mark.parametrize(("day", "counts"), DAYS)
def test_all_read_a_real_day_field_by_field_as_we_do(
    cluster: Cluster, build: Callable[[str], list[str]], day: Path, counts: str
) -> None:
    """The day's exact counts, the same table, and one digest over every field of every trade."""
    publish(cluster, day)
    wanted = expected(ours(cluster, "trades"), ours(cluster, "candles"))
    assert wanted[-2] == counts
    for language in LANGUAGES:
        ran = example(build(language), cluster)
        assert (ran.returncode, ran.stderr) == (0, ""), language
        assert ran.stdout.splitlines() == wanted, language


def test_the_pinned_client_is_the_tested_one() -> None:
    """The Python example runs here in our environment, and without our package."""
    example = EXAMPLES / "python"
    assert f"=={confluent_kafka.__version__}" in (example / "requirements.txt").read_text("utf-8")
    assert "import bourse" not in (example / "bourse_example.py").read_text("utf-8")
