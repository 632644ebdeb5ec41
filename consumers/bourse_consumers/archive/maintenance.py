"""Closed days become few files, old days are removed. Both change the table in one commit each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from tempfile import TemporaryFile
from typing import IO, Any

import polars as pl

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_consumers.api import Health
from bourse_consumers.archive.proof import Report, Stored, prove
from bourse_consumers.archive.storage import store_errors
from bourse_consumers.archive.table import ORDER, File, Table
from bourse_consumers.archive.verify import readable
from bourse_schemas.events import TEHRAN

__all__ = ["Optimizer", "forget", "optimize", "unoptimized"]

# About 50 MB each.
FILE_ROWS = 1_000_000
FIRST_SECONDS, PAUSE_SECONDS = 60.0, 3_600.0


def unoptimized(table: Table, before: date, day: date | None = None) -> dict[date, list[File]]:
    """Return the files of the days before `before`, or of one of them, that have more of them than necessary."""
    days: dict[date, list[File]] = {}
    for file in table.files(day):
        if file.day < before:
            days.setdefault(file.day, []).append(file)
    return {each: files for each, files in days.items() if len(files) > 1 + sum(f.rows for f in files) // FILE_ROWS}


def optimize(table: Table, days: Iterable[date]) -> Iterator[tuple[date, int, int, list[Any]]]:
    """Write each day's files again as few ones; yield the day, the numbers of files before and after, and findings.

    A day is verified first, and is not touched if there is any finding. Readers and writers may go on meanwhile. The
    replaced files are deleted after seven days, so that readers of older snapshots can finish.
    """
    for day in days:
        table.refresh()
        files = table.files(day)
        report = Report(table.name)
        rows = readable(table, files, report)
        prove(Stored(table.ends(), table.about["holes"], [rows]), report)
        if not report.findings:
            # Rows of an instrument next to each other take half the space.
            order = [name for name in ("instrument", *ORDER) if name in rows.column_names]
            rows = rows.sort_by([(name, "ascending") for name in order])
            adds = [
                add
                for at in range(0, rows.num_rows, FILE_ROWS)
                for add in table.write(rows.slice(at, FILE_ROWS), level=9)
            ]
            table.commit(adds, files, rewrites=True)
        yield day, len(files), len(files) if report.findings else len(adds), report.findings
    with store_errors():
        table.delta.vacuum(dry_run=False, full=True)  # what failed commits left, too
    table.refresh()
    table.sync()


def forget(table: Table, before: date) -> list[File]:
    """Remove all days before `before`; return their files. They are deleted by the next optimization."""
    table.refresh()
    files = [file for file in table.files() if file.day < before]
    if files:
        rows = table.arrow(files, ["_partition", "_offset"])
        last = pl.DataFrame(rows).group_by("_partition").max().iter_rows()
        table.describe({f"{number}": at + 1 for number, at in last})
        table.commit(removes=files)
    return files


class Optimizer:
    """Optimizes a topic's closed days in a child process, about once an hour."""

    def __init__(self, to: str, topic: str) -> None:
        command = f"-m bourse_cli archive optimize --json --topic {topic} --to"
        self._command = [sys.executable, *command.split(), to]
        self._due = time.monotonic() + FIRST_SECONDS
        # The child, and the file with what it prints: a pipe would stop it when it is full.
        self._child: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None

    def step(self, monitor: Health | None) -> None:
        """Start the child if it is due; if it has ended, export what it found."""
        if self._child is None and time.monotonic() >= self._due:
            self._due = time.monotonic() + PAUSE_SECONDS
            file = TemporaryFile()  # noqa: SIM115  # closed when the child has ended
            self._child = subprocess.Popen(self._command, stdout=file), file
        elif self._child is not None and (code := self._child[0].poll()) is not None:
            with self._child[1] as output:
                output.seek(0)
                text = output.read().decode(errors="replace")
            self._child = None
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            if code or found is None:
                get_logger().warning("closed days are not optimized", exit_code=code, output=text[:1000])
            if isinstance(monitor, Monitor) and found is not None:
                monitor.archive.findings.set(len(found["findings"]))
                if found["verified_day"]:
                    day = datetime.fromisoformat(found["verified_day"]).replace(tzinfo=TEHRAN)
                    monitor.archive.verified_day.set(day.timestamp())

    def stop(self) -> None:
        """End the child; what it has not committed has no effect."""
        if self._child is not None:
            child, output = self._child
            child.kill()
            child.wait()
            output.close()
