"""Repair a table from its topic: days and partitions that have findings are written again, in one commit."""

from __future__ import annotations

from datetime import date

import pyarrow as pa
import pyarrow.compute as pc

from bourse_consumers.archive.proof import Kept, Report
from bourse_consumers.archive.storage import StoreError
from bourse_consumers.archive.table import Table
from bourse_consumers.archive.verify import readable

__all__ = ["repair"]


def repair(table: Table, report: Report, kept: Kept) -> tuple[set[date], set[date]]:
    """Write the rows below the stored offsets again; return the days repaired, and those no longer whole on the topic.

    All files of a day are replaced: the rows of partitions without findings are copied.
    """
    table.refresh()
    ends, damaged = table.ends(), report.damaged

    def whole(day: date, number: int) -> bool:
        """Return whether the topic still has all rows of a day, whose records follow those of earlier days."""
        if number not in ends or number not in kept.ends:
            return False
        start, following = kept.ends[number][0], ends[number][1]
        oldest = next(kept.rows(number, start, following), None) if start > ends[number][0] else None
        return start <= ends[number][0] or (
            oldest is not None and table.with_day(oldest)[table.day_column][0].as_py() < day
        )

    lost = {day for day, number in damaged if not whole(day, number)}
    damaged = {(day, number) for day, number in damaged if day not in lost}
    files = [file for file in table.files() if file.day in {day for day, _ in damaged}]
    again = Report(table.name)
    copied = readable(table, files, again)
    known = {each["file"] for each in report.findings}
    for each in again.findings:
        if each["file"] not in known:
            raise StoreError(f"{each['file']} was damaged since it was verified")
    adds = []
    for number in sorted({number for _, number in damaged}):
        days = pa.array([day for day, each in damaged if each == number], pa.date32())
        chunks = map(table.with_day, kept.rows(number, kept.ends[number][0], ends[number][1]))
        rows = [chunk.filter(pc.is_in(chunk[table.day_column], days)) for chunk in chunks]
        adds += table.write(pa.concat_tables(rows, promote_options="permissive")) if rows else []
        damaged_here = pc.and_(pc.equal(copied["_partition"], number), pc.is_in(copied[table.day_column], days))
        copied = copied.filter(pc.invert(damaged_here))
    if damaged:
        table.commit([*adds, *table.write(copied)], files)
    return {day for day, _ in damaged}, lost
