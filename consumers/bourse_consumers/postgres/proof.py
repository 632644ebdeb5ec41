"""Whether the tables hold exactly what they must."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from hashlib import sha256
from typing import Any

import polars as pl
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from bourse_consumers.api import Partition
from bourse_consumers.archive.care import MARKED, Report, Topics, compare, prove_polls, prove_sequences, row_hashes
from bourse_consumers.archive.files import Range
from bourse_consumers.postgres.sink import connect, words
from bourse_consumers.postgres.tables import Tables
from bourse_consumers.rows import WHERE, arrow_schema
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import Topic

__all__ = ["verify"]

CHUNK = 50_000
NEEDED = ["event_id", "op", "poll_sequence", "instrument", "trading_day", "sequence", "_partition", "_offset"]
TOTALS = [name for total in ("volume", "value", "trade_count") for name in (total, f"{total}_delta")]
Connection = psycopg.Connection[Any]


def verify(
    dsn: str, topic: Topic, *, schema: str, prefix: str, topics: Topics | None, day: date | None = None
) -> Report:
    """Look at a topic's table, or at one day of it; beside the topic, where given, and the table of polls, where it is.

    JSON columns are left out of the comparison.
    """
    tables = Tables(topic, schema)
    if day and "trading_day" not in tables.columns:
        raise ConfigurationError(f"--day: {topic.name} has no trading days: leave it out")
    try:
        with connect(dsn) as connection:
            tables.require(connection)
            connection.execute("SET statement_timeout = 0")
            with connection.transaction():
                # All of it as of one moment: a writer may be at work.
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                return _verify(connection, tables, topic.full_name(prefix), _of_day(topics, day), day)
    except psycopg.Error as error:
        raise ConfigurationError(f"--to: {words(error)}") from error


def _verify(connection: Connection, tables: Tables, topic: str, topics: Topics | None, day: date | None) -> Report:
    report, parts, name = Report(), [], tables.rows.as_string(connection)
    ends = tables.ends(connection, topic)
    for number, (first, end) in sorted(ends.items()):
        digest, partition, last = sha256(), Partition(topic, number), -1
        for span, ours in _rows(connection, tables, Range(partition, first, end), day):
            digest.update(row_hashes(ours))
            report.rows += ours.num_rows
            for offset in ours["_offset"].to_pylist():
                if offset == last:
                    report.fault(f"offset {offset} stands there twice", name, span)
                last = offset
            compare(name, ours, span, topics, report)
            if "volume_delta" in tables.columns:
                parts.append(pl.DataFrame(ours.select([*NEEDED, *TOTALS])))
        report.partitions[f"{topic}-{number}"] = {"start": first, "next": end, "digest": digest.hexdigest()}
    outside = sql.SQL(
        "SELECT count(*) FROM {} r WHERE NOT EXISTS (SELECT FROM {} o WHERE o.topic = %s "
        "AND o.partition = r._partition AND r._offset >= o.first AND r._offset < o.next)"
    )
    for (count,) in connection.execute(outside.format(tables.rows, tables.offsets), [topic]):
        if count:
            report.fault(f"{count} rows outside the offsets that were written", name)
    lost = sql.SQL("SELECT coalesce(sum(next - start), 0)::bigint FROM {} WHERE topic = %s")
    for (holes,) in connection.execute(lost.format(tables.holes), [topic]):
        report.holes = holes
    if day and not report.rows:
        raise ConfigurationError(f"{name} has nothing of {day}")
    rows = pl.concat(parts).with_columns(_file=pl.lit(name)) if parts else pl.DataFrame()
    for (each,), of_day in sorted(rows.group_by("trading_day") if rows.height else ()):
        report.days += 1
        begins = not any(first for first, _ in ends.values())
        prove_sequences(of_day, report, late=not begins and (day is not None or report.days == 1))
        markers = _markers(connection, tables)
        if markers is not None:
            prove_polls(of_day, each, markers, report)
    return report


def _of_day(topics: Topics | None, day: date | None) -> Topics | None:
    """Return what the topic has of a day."""
    if topics is None or day is None:
        return topics

    def rows(span: Range) -> pa.Table | None:
        found = topics.rows(span)
        return None if found is None else found.filter(pc.field("trading_day") == day)

    return Topics(topics.first, rows)


def _markers(connection: Connection, tables: Tables) -> pl.DataFrame | None:
    """Return the markers of the polls, None where they are not kept beside."""
    polls = tables.beside("polls")
    if connection.execute("SELECT to_regclass(%s)", [polls.as_string(connection)]).fetchone() == (None,):
        return None
    columns = sql.SQL(", ").join(map(sql.Identifier, MARKED))
    found = connection.execute(sql.SQL("SELECT {} FROM {}").format(columns, polls)).fetchall()
    return pl.DataFrame(found, schema=MARKED, orient="row")


def _rows(connection: Connection, tables: Tables, whole: Range, day: date | None) -> Iterator[tuple[Range, pa.Table]]:
    """Yield a partition's rows in the order of offsets, each part with the range that it fills."""
    flat = [name for name, kind in tables.columns.items() if kind != "jsonb"]
    query = sql.SQL("SELECT {} FROM {} WHERE _partition = %s AND _offset >= %s AND _offset < %s {} ORDER BY _offset")
    only = sql.SQL("AND trading_day = {}").format(sql.Literal(day)) if day else sql.SQL("")
    schema = pa.schema([*arrow_schema(tables.topic.event), *WHERE])
    kinds = [schema.field(name) for name in flat]
    with connection.cursor("proof") as cursor:
        what = query.format(sql.SQL(", ").join(map(sql.Identifier, flat)), tables.rows, only)
        cursor.execute(what, [whole.partition.number, whole.start, whole.next], binary=True)
        start, found = whole.start, [()] * CHUNK
        while len(found) == CHUNK:
            found = cursor.fetchmany(CHUNK)
            values: Iterator[Any] = zip(*found, strict=True) if found else iter([()] * len(flat))
            table = pa.table(
                [pa.array(each, kind.type) for each, kind in zip(values, kinds, strict=True)], pa.schema(kinds)
            )
            end = max(table["_offset"][-1].as_py() + 1, start) if len(found) == CHUNK else whole.next
            yield Range(whole.partition, start, end), table
            start = end
