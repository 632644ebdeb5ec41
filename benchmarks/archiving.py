"""The archive's table by itself: how long a commit takes, also with many active files, and how small rows become."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable

from benchmarks.figures import Figure
from benchmarks.topic import events
from bourse_consumers.archive.maintenance import optimize, unoptimized
from bourse_consumers.archive.table import Table
from bourse_consumers.records import Partition, Places
from bourse_consumers.rows import to_table

__all__ = ["archiving"]

ROWS, COMMITS, FILES = 50_000, 10, 600
# One a minute while the market is open, for a year.
YEAR = 75_000
TRADES_0 = Partition("bourse.trades", 0)


def archiving() -> Iterator[Figure]:
    """Yield the figures of commits of 50,000 real events."""
    found = events(ROWS)
    rows = to_table(found, Places([TRADES_0] * ROWS, range(ROWS), [0] * ROWS, []))
    del found
    with tempfile.TemporaryDirectory() as folder:
        empty = _commits(_table(Path(folder, "empty")), rows)
        full = _table(Path(folder, "full"))
        for number in range(FILES):
            full.commit(full.write(_numbered(rows.slice(0, 20), number * 20)), transactions={"bourse.trades-0": number})
        seconds = _commits(full, rows)
        slowest = max(*empty, *seconds)
        what = f"Commit of {ROWS:,} rows until it is on the disk, the slowest of {2 * COMMITS}"
        yield Figure(what, f"{slowest:.2f} s", "≤ 1 s", slowest <= 1, {"empty": empty, "full": seconds})
        ratio = statistics.median(empty) / statistics.median(seconds)
        what = f"The same with {FILES} active files, compared with an empty table"
        yield Figure(what, f"**{ratio:.2f}**", "≥ 0.7", ratio >= 0.7, {"ratio": round(ratio, 2)})
        table, part = _table(Path(folder, "merged")), ROWS // 5
        for at in range(0, ROWS, part):
            table.commit(table.write(rows.slice(at, part)), transactions={"bourse.trades-0": at + part})
        for day, *_, findings in optimize(table, unoptimized(table, date.max)):
            if findings:
                raise SystemExit(f"error: {day} is not merged: {findings}")
        opening = _opened(Path(folder, "full"))
        what = f"Open a table after {YEAR:,} commits, with {FILES} active files, median of 5"
        yield Figure(what, f"{opening:.2f} s", "≤ 1 s", opening <= 1, {"seconds": round(opening, 3)})
        size = sum(file.size for file in table.files()) / ROWS
        yield Figure("Bytes a row after a merge", f"{size:.0f}", "≤ 50", size <= 50, {"bytes": round(size, 1)})


def _table(path: Path) -> Table:
    table = Table.open(str(path)) or Table.create(str(path), "bourse.trades")
    table.describe(first={"0": 0})
    return table


def _opened(path: Path) -> float:
    """Return the seconds it takes to open a table whose last commits have the numbers of a year later."""
    table, log = DeltaTable(path), path / "_delta_log"
    table.create_checkpoint()
    last, about = table.version(), json.loads((log / "_last_checkpoint").read_text("utf-8"))
    commit = (log / f"{last:020}.json").read_bytes()
    for version in range(last + 1, YEAR):
        (log / f"{version:020}.json").write_bytes(commit)
        if not version % 100:
            shutil.copy(log / f"{last:020}.checkpoint.parquet", log / f"{version:020}.checkpoint.parquet")
            about["version"] = version
    (log / "_last_checkpoint").write_text(json.dumps(about), "utf-8")
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        found = Table.open(str(path), recover=True)
        seconds.append(time.perf_counter() - began)
        if found is None or found.delta.version() != YEAR - 1:
            raise SystemExit("error: the table has not the commits of a year")
    return statistics.median(seconds)


def _commits(table: Table, rows: pa.Table) -> list[float]:
    """Return the seconds of each commit, from rows in memory to durable."""
    seconds = []
    for number in range(COMMITS):
        began = time.perf_counter()
        table.refresh()
        adds = table.write(_numbered(rows, number * ROWS))
        table.commit(adds, transactions={"bourse.trades-0": (number + 1) * ROWS})
        seconds.append(round(time.perf_counter() - began, 3))
    return seconds


def _numbered(rows: pa.Table, start: int) -> pa.Table:
    offsets = pa.array(range(start, start + rows.num_rows), pa.int64())
    return rows.set_column(rows.schema.get_field_index("_offset"), "_offset", offsets)
