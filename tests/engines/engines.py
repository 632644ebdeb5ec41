"""Engines compute bars and movers of the real day: each bar is that of the definition in the contract.

`make test-engines` runs this file; pytest does not collect it by itself, because the engines are 900 MB. They are
installed once, in `.venv/engines`. Java 17, Maven and Node must be there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import fastavro
import polars as pl
import pytest
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # not in its __all__
from deltalake import DeltaTable
from msgspec.structs import replace

from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.testing import Memory
from bourse_consumers.testing import run as archive_all
from bourse_producer.replay import Replay
from bourse_sandbox.jars import fetch, read_lock
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import spawn
from bourse_sandbox.registry import serve_registry
from bourse_schemas.codec import FRAME
from bourse_schemas.compatibility import gate
from bourse_schemas.events import Outcome, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import POLLS, TRADES
from scripts.bootstrap import uv_environ
from scripts.sizing import BYTES
from tests.kafka.test_examples import at, prepare, publish

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES, AVRO = ROOT / "examples", ROOT / "schemas" / "bourse_schemas" / "avro"
PAGE, ARCHIVE_PAGE = ((ROOT / "docs" / name).read_text("utf-8") for name in ("engines.md", "archive.md"))
DAY = datetime(2019, 8, 21, tzinfo=UTC).date()

Bar = tuple[int | None, int | None, int | None, int | None, int, int, int]
Bars = dict[tuple[str, datetime], Bar]
Movers = list[tuple[str, int, float]]


class Truth(NamedTuple):
    """What every engine must compute."""

    bars: Bars
    movers: Movers


# --- what is true -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events() -> list[TradeEvent]:
    """Return the real day's events."""
    replay = Replay()
    replay.day(REAL_DAY)
    return list(replay.events)


@pytest.fixture(scope="module")
def truth(events: list[TradeEvent]) -> Truth:
    """Return the day's bars by the definition in the contract, and its ten largest rises."""
    minutes: dict[tuple[str, datetime], list[TradeEvent]] = {}
    for event in events:
        minutes.setdefault((event.instrument, event.observed_at.replace(second=0, microsecond=0)), []).append(event)
    found: Bars = {}
    for key, minute in minutes.items():
        prices = [event.last_price for event in minute if event.last_price is not None]
        four = (prices[0], max(prices), min(prices), prices[-1]) if prices else (None, None, None, None)
        volume, value = (sum(getattr(event, f"{name}_delta") for event in minute) for name in ("volume", "value"))
        found[key] = (*four, volume, value, sum(event.trade_count_delta for event in minute))
    assert (len(found), sum(bar[4] for bar in found.values())) == (18_721, 4_884_324_087)
    last = {event.instrument: event for event in events}
    rises = [
        (100 * (event.last_price - event.previous_close) / event.previous_close, event)
        for event in last.values()
        if event.last_price is not None and event.previous_close
    ]
    rises.sort(key=lambda rise: (-rise[0], rise[1].instrument))
    return Truth(found, [(event.symbol, event.last_price or 0, change) for change, event in rises[:10]])


@pytest.fixture(scope="module")
def day(kafka: Kafka, events: list[TradeEvent]) -> Iterator[Cluster]:
    """Return a cluster with the day, an event of a later day, which closes the last windows, and two more markers."""
    with serve_registry(compatible=gate) as registry:
        cluster = Cluster(kafka.bootstrap_servers, registry.url, "engines")
        prepare(cluster)
        publish(cluster, REAL_DAY)
        later = timedelta(days=3)
        last = max(events, key=lambda event: event.observed_at)
        serialize = cluster.registry().serializer(TRADES, cluster.prefix)
        mark = cluster.registry().serializer(POLLS, cluster.prefix)
        decode = cluster.registry().deserializer(PollMarker)
        *_, marker = (decode(record.value or b"") for record in read(cluster, POLLS.full_name(cluster.prefix)))
        nothing = replace(marker, poll_sequence=marker.poll_sequence + 1, outcome=Outcome.UNCHANGED)
        failed = replace(
            marker, poll_sequence=marker.poll_sequence + 2, outcome=Outcome.FAILED, error_message="no answer within 8 s"
        )
        producer = cluster.transactional_producer("engines-later")
        producer.init_transactions(20)
        producer.begin_transaction()
        event = replace(last, trading_day=last.trading_day + later, observed_at=last.observed_at + later, sequence=1)
        for record in (serialize(event), mark(nothing), mark(failed)):
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        producer.commit_transaction(20)
        yield cluster


# --- the engines ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(demand: Callable[[str], None]) -> Path:
    """Return the environment with Flink and Spark; it is made once."""
    demand("java")
    environment, lock = ROOT / ".venv" / "engines", HERE / "requirements.lock"
    done = environment / ".installed"
    if not done.exists() or done.read_text("utf-8") != lock.read_text("utf-8"):
        uv = Path(sys.executable).with_name("uv")
        environ = uv_environ(Path(sys.base_exec_prefix) / "bin" / "python3")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment], check=True)
        install: list[str | Path] = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            environment / "bin" / "python",
            "--no-deps",
        ]
        subprocess.run([*install, "--require-hashes", "-r", lock], env=environ, check=True)
        done.write_text(lock.read_text("utf-8"), "utf-8")
    return environment


@pytest.fixture(scope="module")
def jars() -> list[Path]:
    """Return the connectors of Flink and Spark."""
    return fetch(read_lock(HERE / "jars.lock"), "connectors of Flink and Spark")


def run(command: list[str | Path], folder: Path, environ: dict[str, str] | None = None) -> str:
    """Run a program to its end; return what it printed."""
    ran = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, encoding="utf-8", timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def ours(cluster: Cluster, *words: str) -> str:
    """Return what our own command line prints about a cluster."""
    return run([sys.executable, "-m", "bourse_cli", *words, *at(cluster)], ROOT)


def table_of(bars: pl.DataFrame) -> Bars:
    """Return the bars in a frame that has the columns of the examples."""
    prices = ("open_price", "high_price", "low_price", "close_price")
    start = pl.col("minute_start").cast(pl.Datetime("us", "UTC"))
    frame = bars.select("instrument", start, *prices, "volume", "trade_value", "trade_count")
    return {(row[0], row[1]): row[2:] for row in frame.iter_rows()}


def rows_of(printed: str) -> Movers:
    """Return the lines that have three columns."""
    rows = [line.split("\t") for line in printed.splitlines()]
    return [(row[0], int(row[1]), float(row[2])) for row in rows if len(row) == 3]


def here(text: str, cluster: Cluster) -> str:
    """Return a file of an example for this cluster."""
    for said, now in {
        "127.0.0.1:9092": cluster.bootstrap_servers,
        "http://127.0.0.1:8081": cluster.registry_url,
        "'bourse.": f"'{cluster.prefix}.",
        "prefix=bourse": f"prefix={cluster.prefix}",
    }.items():
        text = text.replace(said, now)
    return text


def create_topic(cluster: Cluster, name: str, **settings: str) -> str:
    """Create a derived topic that keeps records of any time."""
    topic = NewTopic(f"{cluster.prefix}.{name}", 6, 1, config={"retention.ms": "-1", **settings})
    admin = cluster.admin()
    admin.create_topics([topic])[topic.topic].result(20)
    return topic.topic


def of_the_day(found: Bars) -> Bars:
    """Leave out what follows from the event of a later day."""
    return {key: bar for key, bar in found.items() if key[1].date() == DAY}


def test_flink(day: Cluster, engines: Path, jars: list[Path], truth: Truth, tmp_path: Path) -> None:
    """The SQL client runs both files on the table that `bourse schemas ddl` prints."""
    (home,) = engines.glob("lib/python*/site-packages/pyflink")
    (line,) = re.findall(r"^ALTER TABLE .*;$", (EXAMPLES / "flink" / "README.md").read_text("utf-8"), re.MULTILINE)
    (tmp_path / "trades.sql").write_text(ours(day, "schemas", "ddl", "flink", "trades") + line, "utf-8")
    for jar in jars:
        if jar.name.startswith("flink-sql-gateway"):
            shutil.copy(jar, home / "opt")  # in Flink's distribution, but not in the wheel
    connectors = [jar for jar in jars if re.match(r"flink-sql-(connector|avro)", jar.name)]
    command: list[str | Path] = [
        "bash",
        home / "bin" / "sql-client.sh",
        "-Dexecution.target=local",
        "-hist",
        "history",
        "-i",
        "trades.sql",
    ]
    command += [word for jar in connectors for word in ("-j", jar)]
    environ = os.environ | {"FLINK_HOME": str(home)}

    def flink(file: str) -> str:
        (tmp_path / file).write_text(here((EXAMPLES / "flink" / file).read_text("utf-8"), day), "utf-8")
        printed = run([*command, "-f", file], tmp_path, environ)
        assert "[ERROR]" not in printed, printed
        return printed

    topic = create_topic(day, "bars")
    flink("bars.sql")
    found: Bars = {}
    schema_of = cache(day.registry().schema)
    for record in read(day, topic):
        value = record.value or b""
        schema = schema_of(FRAME.unpack_from(value)[1])
        _, start, *bar = fastavro.schemaless_reader(BytesIO(value[FRAME.size :]), schema).values()  # type: ignore[union-attr]
        assert ((record.key or b"").decode(), start) not in found
        found[(record.key or b"").decode(), start] = tuple(bar)
    assert of_the_day(found) == truth.bars
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in flink("movers.sql").splitlines() if "|" in line]
    assert [(symbol, int(price), float(change)) for symbol, price, change in rows[1:]] == truth.movers


def spark(program: str, engines: Path, jars: list[Path], folder: Path, *arguments: str | Path) -> str:
    """Run spark-submit or spark-sql on two cores."""
    binaries = engines / "bin"
    connectors = ",".join(str(jar) for jar in jars if not jar.name.startswith("flink"))
    command: list[str | Path] = [binaries / program, "--master", "local[2]", "--jars", connectors]
    for setting in ("shuffle.partitions=4", "catalogImplementation=in-memory"):
        command += ["--conf", f"spark.sql.{setting}"]
    environ = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYSPARK_PYTHON": str(binaries / "python")}
    return run([*command, "--conf", "spark.ui.enabled=false", *arguments], folder, os.environ | environ)


def test_spark(day: Cluster, engines: Path, jars: list[Path], truth: Truth, tmp_path: Path) -> None:
    """The bars of every window that closed, once; the movers' query on the view that `bourse schemas ddl` prints."""
    options = ["--bootstrap-servers", day.bootstrap_servers, "--topic-prefix", day.prefix, "--exit-at-end"]
    spark("spark-submit", engines, jars, tmp_path, EXAMPLES / "spark" / "bars.py", *options)
    assert of_the_day(table_of(pl.read_parquet(tmp_path / "bars" / "*.parquet"))) == truth.bars

    (tmp_path / "trades.sql").write_text(ours(day, "schemas", "ddl", "spark", "trades"), "utf-8")
    files: list[str | Path] = ["-i", "trades.sql", "-f", EXAMPLES / "spark" / "movers.sql"]
    assert rows_of(spark("spark-sql", engines, jars, tmp_path, *files)) == truth.movers


def test_kafka_streams(
    day: Cluster, truth: Truth, tmp_path: Path, demand: Callable[[str], None], wait_for: Callable[..., Any]
) -> None:
    """The newest record of each key is the bar; SIGTERM ends the program."""
    demand("mvn")
    folder = tmp_path / "streams"
    shutil.copytree(EXAMPLES / "streams", folder, ignore=shutil.ignore_patterns("target"))
    run(["mvn", "-B", "-q", "package"], folder)
    settings = here((folder / "bars.properties").read_text("utf-8"), day)
    (folder / "bars.properties").write_text(settings.replace("../../schemas/bourse_schemas/avro", str(AVRO)), "utf-8")
    topic = create_topic(day, "bars-table", **{"cleanup.policy": "compact"})
    command = ["java", "-jar", "target/bourse-bars.jar", "bars.properties"]
    found: Bars = {}

    def all_are_there() -> bool:
        assert child.poll() is None, (tmp_path / "log").read_text("utf-8")[-3000:]
        for record in read(day, topic):
            instrument, start = (record.key or b"").decode().split("@")
            found[instrument, datetime.fromisoformat(start)] = tuple(json.loads(record.value or b"").values())
        return of_the_day(found) == truth.bars

    with spawn(command, cwd=folder, stdout=tmp_path / "log", stderr=tmp_path / "log") as child:
        wait_for(all_are_there, 120)
        child.send(signal.SIGTERM)
        child.wait(30)
    printed = run(["java", "-cp", "target/bourse-bars.jar", "bourse.Movers", "bars.properties"], folder)
    assert rows_of(printed) == truth.movers


def test_node(day: Cluster, truth: Truth, tmp_path: Path, demand: Callable[[str], None]) -> None:
    """LZ4 and 64 bits are read; "no change" is not "no data"."""
    demand("npm")
    folder = tmp_path / "node"
    shutil.copytree(EXAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], folder)
    command: list[str | Path] = ["node", "gainers.js", "--exit-at-end", "--schemas", AVRO]
    lines = run([*command, *at(day)], folder).splitlines()
    *polls, changed, failed = [line for line in lines if "T" in line[:11]]
    assert len(polls) == 98
    assert changed.endswith("no change: the exchange answered, nothing moved")
    assert failed.endswith("no data: no answer within 8 s")
    assert rows_of("\n".join(lines)) == truth.movers
    assert int(lines[-1].split("\t")[1]) > 2**43


def test_the_figures_of_the_sizing_table(day: Cluster, kafka: Kafka, events: list[TradeEvent]) -> None:
    """Bytes on the broker's disk per record, compressed: within a tenth of those that the table is computed from."""
    for name, records in (("trades", len(events)), ("candles", len(events)), ("polls", 98)):
        logs = list(kafka.data.glob(f"log/{day.prefix}.{name}-*/*.log"))
        assert sum(log.stat().st_size for log in logs) / records == pytest.approx(BYTES[name], rel=0.1), name


PYTHON = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
def test_polars_and_duckdb(day: Cluster, truth: Truth, tmp_path: Path, engine: str) -> None:
    """The programs of the page, on what `bourse tail` prints."""
    (program,) = (program for program in PYTHON if f"import {engine}" in program)
    tail = ["tail", "trades", "--from-beginning", "--exit-at-end", "--json"]
    (tmp_path / "trades.ndjson").write_text(ours(day, *tail), "utf-8")
    print_rows = (
        "\nrows = movers.rows() if hasattr(movers, 'rows') else movers.fetchall()\nimport json; print(json.dumps(rows))"
    )
    printed = run([sys.executable, "-c", program + print_rows], tmp_path)
    assert of_the_day(table_of(pl.read_parquet(tmp_path / "bars.parquet"))) == truth.bars
    assert [tuple(row) for row in json.loads(printed.splitlines()[-1])] == truth.movers


def test_delta_tables(events: list[TradeEvent], engines: Path, jars: list[Path], tmp_path: Path) -> None:
    """Spark and DuckDB count the same rows in the archive's table, before and after its files were merged."""
    memory = Memory()
    memory.append(*events)
    archive_all(DeltaArchive(str(tmp_path / "before"), commit_rows=5_000), memory)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    run([sys.executable, "-m", "bourse_cli", "archive", "optimize", "--to", tmp_path / "after"], ROOT)
    tables = [str(tmp_path / folder / "bourse.trades") for folder in ("before", "after")]
    files = [len(DeltaTable(table).file_uris()) for table in tables]
    assert files[0] > files[1]

    columns = ("op", "symbol", "observed_at", "volume_delta")
    expected = sorted((event.op.value, event.symbol, event.observed_at, event.volume_delta) for event in events)
    (page,) = re.findall(r"^```pyspark\n(.*?)^```$", ARCHIVE_PAGE, re.MULTILINE | re.DOTALL)
    program = (
        page.split("trades = ")[0]
        + f"""
for number, table in enumerate({tables}):
    trades = spark.read.format("delta").load(table).select{columns}
    trades.coalesce(1).write.parquet(f"{tmp_path}/spark-{{number}}")
"""
    )
    (tmp_path / "read.py").write_text(program, "utf-8")
    spark("spark-submit", engines, jars, tmp_path, "read.py")
    for number, table in enumerate(tables):
        trades = DeltaTable(table).to_pyarrow_dataset()  # noqa: F841  # DuckDB finds it by its name
        with duckdb.connect() as duck:
            duck.execute("SET TimeZone = 'UTC'")
            found = duck.sql(f"SELECT {', '.join(columns)} FROM trades").to_arrow_table()
        for frame in (pl.DataFrame(found), pl.read_parquet(tmp_path / f"spark-{number}" / "*.parquet")):
            rows = frame.with_columns(pl.col("observed_at").cast(pl.Datetime("us")).dt.replace_time_zone("UTC"))
            assert sorted(rows.iter_rows()) == expected
