"""The examples in other languages: the real day's counts, the same values as ours, mistakes in a line, evolution."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import confluent_kafka
import fastavro
import httpx2
import pytest

from bourse_cli.topics import apply_topics, plan_topics
from bourse_producer.clock import PracticeClock
from bourse_producer.finnotech import Credentials, Finnotech
from bourse_producer.publisher import Publisher
from bourse_producer.service import Producer, Settings
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import spawn
from bourse_sandbox.registry import serve_registry
from bourse_schemas.codec import FRAME, avro_schema
from bourse_schemas.compatibility import gate
from bourse_schemas.errors import ConfigurationError, SchemaIncompatible
from bourse_schemas.events import Candle, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import CANDLES, TOPICS, TRADES
from reliability.alone import Alone
from tests.samples import DAY, event

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
EXAMPLES, SCHEMAS = ROOT / "examples", ROOT / "schemas" / "bourse_schemas" / "avro"
SECOND_DAY = ROOT.parent / "shared" / "data" / "day-2019-08-24.ndjson.gz"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
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


@pytest.fixture(scope="session")
def programs(build: Callable[[str], list[str]]) -> Commands:
    """Return the examples by language; those whose tool chain is missing are left out, and the summary names them."""
    found: Commands = {}
    for language in ("java", "go", "python"):
        with suppress(pytest.skip.Exception):
            found[language] = build(language)
    return found


def _run(command: list[str], folder: Path) -> None:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture
def cluster(kafka: Kafka, prefix: str) -> Iterator[Cluster]:
    """Return topics and schemas of this test's own, which take records of any time."""
    with serve_registry(compatible=gate) as registry:
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
    settings, clock = Settings(poll_seconds=0, always=True), PracticeClock()
    with practice.serve() as server, httpx2.Client() as client:
        exchange = Finnotech(client, server.url, Credentials("practice", "practice", "0123456789"), clock=clock)
        producer = Producer(exchange, lambda: Publisher(cluster), settings, clock, leadership=Alone())
        for _ in range(practice.state()["responses"]):
            producer.poll()
        producer._close()


def ours(cluster: Cluster, topic: str) -> list[str]:
    """Return what our own tool reads, decoded by our own codec, as lines of JSON."""
    command = [sys.executable, "-m", "bourse_cli", "tail", topic, "--from-beginning", "--exit-at-end", "--json"]
    ran = subprocess.run([*command, *at(cluster)], capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def fields(line: str) -> dict[str, Any]:
    """Return a trade from an example's JSON: days and instants as numbers, however a language writes them."""
    trade = json.loads(line)
    for field in avro_schema(TradeEvent)["fields"]:
        match field["type"]:
            case {"logicalType": "date"}:
                trade[field["name"]] = trade[field["name"]][:10]
            case {"logicalType": "timestamp-millis"}:
                instant = datetime.fromisoformat(trade[field["name"]])
                trade[field["name"]] = (instant - EPOCH) // timedelta(milliseconds=1)
    return trade  # type: ignore[no-any-return]  # a JSON object


def in_order(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return trades whatever the order of partitions was."""
    return sorted(map(fields, lines), key=lambda trade: (trade["event_id"], trade["sequence"]))


def ranking(candles: Iterable[str]) -> list[str]:
    """Return the table as examples print it."""
    table = {candle["instrument"]: candle for candle in map(json.loads, candles)}
    rows = sorted(table.values(), key=lambda candle: -candle["value"])[:10]
    columns = ("symbol", "last_price", "closing_price", "volume", "value", "trade_count")
    return ["symbol\tlast\tclosing\tvolume\tvalue\ttrades", *("\t".join(str(row[c]) for c in columns) for row in rows)]


DAYS = [
    pytest.param(
        REAL_DAY,
        [f"2019-08-21 {each}" for each in ("CANCELLED 85", "OPENED 548", "REVISED 2", "TRADED 18711")],
        id="21",
    ),
    pytest.param(
        SECOND_DAY,
        [f"2019-08-24 {each}" for each in ("CANCELLED 80", "OPENED 541", "REVISED 16", "TRADED 41293")],
        id="24",
        marks=pytest.mark.skipif(not SECOND_DAY.exists(), reason=f"{SECOND_DAY.name} is not next to the checkout"),
    ),
]


@pytest.mark.parametrize(("day", "counts"), DAYS)
def test_all_read_a_real_day_field_by_field_as_we_do(
    cluster: Cluster, programs: Commands, day: Path, counts: list[str]
) -> None:
    """The day's exact counts, the same table, and every field of every trade."""
    publish(cluster, day)
    shown = [*ranking(ours(cluster, "candles")), *counts]
    trades = in_order(ours(cluster, "trades"))
    assert len(trades) == sum(int(line.split()[2]) for line in counts)
    for language, program in programs.items():
        ran = example(program, cluster)
        assert (ran.returncode, ran.stderr, ran.stdout.splitlines()) == (0, "", shown), language
        ran = example([*program, "--json"], cluster)
        assert (ran.returncode, ran.stderr) == (0, ""), language
        assert in_order(ran.stdout.splitlines()) == trades, language


def test_the_newest_of_an_instruments_candles_is_shown(cluster: Cluster, programs: Commands) -> None:
    """After partitions were added an instrument may have candles in two of them; these are read in any order."""
    encode = cluster.registry().serializer(CANDLES, cluster.prefix)

    def candle(name: str, day: date, sequence: int, value: int) -> Candle:
        whole = event(instrument=name, symbol=name, trading_day=day, sequence=sequence, value=value)
        return Candle(**{field: getattr(whole, field) for field in Candle.__struct_fields__})

    here = candle("A", DAY, 9, 2_000), candle("B", DAY, 9, 5_000)
    there = candle("A", DAY, 8, 5_000), candle("B", DAY + timedelta(days=1), 1, 1_000)
    producer = cluster.transactional_producer(f"{cluster.prefix}-other")
    producer.init_transactions(20)
    producer.begin_transaction()
    for partition, candles in enumerate((here, there)):
        for each in candles:
            record = encode(each)
            producer.produce(record.topic, record.value, record.key, partition)
    producer.commit_transaction(20)
    for language, program in programs.items():
        ran = example(program, cluster)
        assert (ran.returncode, ran.stderr) == (0, ""), language
        rows = [line.split("\t") for line in ran.stdout.splitlines()[1:]]
        assert [(row[0], row[4]) for row in rows] == [("A", "2000"), ("B", "1000")], language


def test_the_pinned_client_is_the_tested_one() -> None:
    """The Python example runs here in our environment, and without our package."""
    example = EXAMPLES / "python"
    assert f"=={confluent_kafka.__version__}" in (example / "requirements.txt").read_text("utf-8")
    assert "import bourse" not in (example / "bourse_example.py").read_text("utf-8")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def send(cluster: Cluster, *values: bytes | None, commit: bool = True) -> None:
    """Put values on the trades in one transaction."""
    producer = cluster.transactional_producer(f"{cluster.prefix}-other")
    producer.init_transactions(20)
    producer.begin_transaction()
    for value in values:
        producer.produce(TRADES.full_name(cluster.prefix), value, "IRO1MADN0001")
    if commit:
        producer.commit_transaction(20)
    else:
        producer.flush(20)
        producer.abort_transaction(20)


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("broker", "127.0.0.1:9"),
        ("topic", "nosuch.trades"),
        ("registry", "127.0.0.1:9"),
        ("record", ".trades"),
        ("null", ".trades"),
        ("id", "4040404"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(cluster: Cluster, programs: Commands, mistake: str, named: str) -> None:
    """Within seconds, never a hang: what is wrong, and with which record."""
    wrong = {
        "broker": replace(cluster, bootstrap_servers="127.0.0.1:9"),
        "topic": replace(cluster, prefix="nosuch"),
        "registry": replace(cluster, registry_url="http://127.0.0.1:9"),
    }
    values = {"record": b"another program's", "null": None}
    send(cluster, values.get(mistake, FRAME.pack(0, 4_040_404) + b"x"))
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda program: example(program, wrong.get(mistake, cluster), 30), programs.values()))
    for ran in runs:
        assert ran.returncode == 1, ran
        assert named in ran.stderr, ran
        assert ran.stderr.count("\n") == 1, ran
        assert ran.stderr.startswith("error: "), ran
        assert ran.stdout == ""


def test_kcat_shows_what_is_committed_and_names_mistakes(cluster: Cluster, demand: Callable[[str], None]) -> None:
    """Keys and offsets of what is there, and a line if the topic is not found."""
    demand("kcat")
    send(cluster, b"one", b"two")
    send(cluster, b"never", commit=False)
    topic = TRADES.full_name(cluster.prefix)
    command = [str(EXAMPLES / "kcat.sh"), topic, cluster.bootstrap_servers]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [(line[1], line[2]) for line in lines] == [("0", "IRO1MADN0001"), ("1", "IRO1MADN0001")]
    for arguments, named in (("nosuch", cluster.bootstrap_servers), "nosuch"), ((topic, "127.0.0.1:9"), "127.0.0.1:9"):
        ran = subprocess.run([command[0], *arguments], capture_output=True, text=True, timeout=30, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
        assert named in ran.stderr


# --- evolution --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["small", "apicurio"])
def any_registry(request: pytest.FixtureRequest, cluster: Cluster) -> Cluster:
    """Return the cluster with our registry and with Apicurio."""
    if request.param == "small":
        return cluster
    other = replace(cluster, registry_url=request.getfixturevalue("apicurio_url"))
    other.registry().register_all(other.prefix)
    return other


def offer(cluster: Cluster, schema: dict[str, Any]) -> httpx2.Response:
    """Ask the registry to take a schema for the trades."""
    url = f"{cluster.registry_url}/subjects/{TRADES.subject(cluster.prefix)}/versions"
    return httpx2.post(url, json={"schema": json.dumps(schema)})


def trade(cluster: Cluster, schema: dict[str, Any], sequence: int, **values: Any) -> bytes:
    """Return a trade as a producer with this schema writes it."""
    nothing = {"string": "x", "long": 7, "int": 18_000, "boolean": False}
    record: dict[str, Any] = {}
    for field in schema["fields"]:
        kind = field["type"]["type"] if isinstance(field["type"], dict) else field["type"]
        record[field["name"]] = None if isinstance(kind, list) else nothing.get(kind)
    record |= {"op": "TRADED", "instrument": "IRO1MADN0001", "sequence": sequence, "traded_at": 1_566_372_600_123}
    body = BytesIO()
    fastavro.schemaless_writer(
        body, fastavro.parse_schema(schema), record | {"observed_at": 1_566_372_601_001} | values
    )
    return FRAME.pack(0, offer(cluster, schema).raise_for_status().json()["id"]) + body.getvalue()


def test_who_was_built_for_version_1_reads_version_2_without_a_restart(
    any_registry: Cluster, programs: Commands, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """A new optional field and a new symbol reach running consumers; a forbidden change does not get that far."""
    cluster = any_registry
    first = avro_schema(TradeEvent)
    second, forbidden = deepcopy(first), deepcopy(first)
    second["fields"].append({"name": "venue", "type": ["null", "string"], "default": None})
    next(field for field in second["fields"] if field["name"] == "op")["type"]["symbols"].append("SUSPENDED")
    next(field for field in forbidden["fields"] if field["name"] == "volume")["type"] = "string"

    tail = [sys.executable, "-m", "bourse_cli", "tail", "trades", "--from-beginning", "--json"]
    commands = {**{language: [*program, "--json"] for language, program in programs.items()}, "ours": tail}
    send(cluster, trade(cluster, first, 1), trade(cluster, first, 2, closing_change_percent=-1.37))

    def read(name: str) -> list[str]:
        return (tmp_path / name).read_text("utf-8").splitlines()

    with ExitStack() as stack:
        running = {}
        for name, command in commands.items():
            child = spawn([*command, *at(cluster)], stdout=tmp_path / name, stderr=tmp_path / f"{name}.err")
            running[name] = stack.enter_context(child)

        def all_have_read(number: int) -> bool:
            for name, child in running.items():
                assert child.poll() is None, (tmp_path / f"{name}.err").read_text("utf-8")
            return all(len(read(name)) == number for name in running)

        wait_for(lambda: all_have_read(2), 40)
        assert offer(cluster, second).is_success
        send(cluster, trade(cluster, second, 3, op="SUSPENDED", venue="TSE"), trade(cluster, second, 4, venue="IFB"))
        wait_for(lambda: all_have_read(4), 20)
        refused = offer(cluster, forbidden)
        assert refused.status_code == 409, refused.text
        send(cluster, trade(cluster, first, 5))  # a producer that was not upgraded yet
        wait_for(lambda: all_have_read(5), 20)
        for child in running.values():
            child.send(signal.SIGINT)
        for child in running.values():
            child.wait(20)

    trades = in_order(read("ours"))
    assert sorted(trade["op"] for trade in trades) == ["TRADED"] * 4 + ["UNKNOWN"]
    for language in programs:
        assert in_order(read(language)) == trades, language
        assert (tmp_path / f"{language}.err").read_text("utf-8") == "", language


def test_our_own_side_refuses_a_subject_with_a_forbidden_schema(any_registry: Cluster) -> None:
    """`register` does not go over it, and a service does not start on it."""
    cluster = replace(any_registry, prefix=f"{any_registry.prefix}x")
    other = deepcopy(avro_schema(TradeEvent))
    next(field for field in other["fields"] if field["name"] == "volume")["type"] = "string"
    assert offer(cluster, other).is_success
    with pytest.raises(ConfigurationError, match="has no version equal to this release's schema"):
        cluster.registry().serializer(TRADES, cluster.prefix)
    with pytest.raises(SchemaIncompatible, match=TRADES.subject(cluster.prefix)):
        cluster.registry().register(TRADES, cluster.prefix)


def test_golden_bytes_are_read_by_javas_avro(build: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Every release's bytes with today's schema and today's with every release's, and with one that has grown."""
    golden = ROOT / "tests" / "golden"
    lines, expected = [], []
    for topic in TOPICS:
        grown = deepcopy(avro_schema(topic.event))
        grown["fields"].append({"name": "venue", "type": ["null", "string"], "default": None})
        for each in grown["fields"]:
            if isinstance(each["type"], dict) and each["type"]["type"] == "enum":
                each["type"]["symbols"].append("LATER")
        later = tmp_path / f"{topic.event.__name__}.later.avsc"
        later.write_text(json.dumps(grown), "utf-8")
        today = SCHEMAS / f"{topic.event.__name__}.avsc"
        releases = sorted(golden.glob(f"{topic.event.__name__}.v*.avsc"))
        latest = releases[-1].with_suffix(".hex").read_text().splitlines()
        for release in releases:
            lines += [(release, today, body) for body in release.with_suffix(".hex").read_text().splitlines()]
            lines += [(today, release, body) for body in latest]
        lines += [(today, later, body) for body in latest]
        for body in latest:
            full: Any = fastavro.schemaless_reader(BytesIO(bytes.fromhex(body)), avro_schema(topic.event), grown)
            lines.append((later, today, _encoded(grown, {**full, "venue": "x"})))
    for writer, reader, body in lines:
        schemas = [json.loads(path.read_text("utf-8")) for path in (writer, reader)]
        found = fastavro.schemaless_reader(BytesIO(bytes.fromhex(body)), *schemas)
        expected.append(found)
    jar = build("java")[-1]
    given = "".join(f"{writer} {reader} {body}\n" for writer, reader, body in lines)
    command = ["java", "-cp", jar, str(Path(__file__).with_name("Golden.java"))]
    ran = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    read = zip(lines, ran.stdout.splitlines(), strict=True)
    schemas = [json.loads(reader.read_text("utf-8")) for _, reader, _ in lines]
    # Decoded again: the entries of a map have no order.
    assert [
        fastavro.schemaless_reader(BytesIO(bytes.fromhex(body)), schema)
        for (_, body), schema in zip(read, schemas, strict=True)
    ] == expected


def _encoded(schema: dict[str, Any], record: Any) -> str:
    out = BytesIO()
    fastavro.schemaless_writer(out, schema, record)
    return out.getvalue().hex()
