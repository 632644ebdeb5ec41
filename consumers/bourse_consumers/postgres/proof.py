"""Whether the tables hold exactly what they must."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import polars as pl
import psycopg
import pyarrow as pa
from psycopg import sql

from bourse_consumers.api import Partition
from bourse_consumers.archive.care import Report, Topics, compare, prove_sequences, row_hashes
from bourse_consumers.archive.files import Range
from bourse_consumers.postgres.sink import connect, words
from bourse_consumers.postgres.tables import Tables
from bourse_consumers.rows import WHERE, arrow_schema
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import Topic

__all__ = ["verify"]

CHUNK = 50_000
NEEDED = ["event_id", "instrument", "trading_day", "sequence", "_partition", "_offset"]
TOTALS = [name for total in ("volume", "value", "trade_count") for name in (total, f"{total}_delta")]


def verify(dsn: str, topic: Topic, *, schema: str, prefix: str, topics: Topics | None) -> Report:
    """Look at a topic's table; beside the topic, where given. JSON columns are left out of the comparison."""
    report, tables = Report(days=0), Tables(topic, schema)
    name = f"{schema}.{topic.name.replace('-', '_')}"
    try:
        with connect(dsn) as connection:
            tables.require(connection)
            parts: list[pl.DataFrame] = []
            ends = tables.ends(connection, topic.full_name(prefix))
            for number, (first, end) in sorted(ends.items()):
                digest, partition = sha256(), Partition(topic.full_name(prefix), number)
                for start in range(first, end, CHUNK):
                    span = Range(partition, start, min(start + CHUNK, end))
                    ours = _rows(connection, tables, span)
                    digest.update(row_hashes(ours))
                    report.rows += ours.num_rows
                    compare(name, ours, span, topics, report)
                    if set(TOTALS) <= tables.columns.keys() and "volume_delta" in tables.columns:
                        parts.append(pl.DataFrame(ours.select([*NEEDED, *TOTALS])))
                about = {"start": first, "next": end, "digest": digest.hexdigest()}
                report.partitions[f"{partition.topic}-{number}"] = about
            # In one statement, that is of one moment: a writer may be at work.
            outside = sql.SQL(
                "SELECT count(*) FROM {} r WHERE NOT EXISTS (SELECT FROM {} o WHERE o.topic = %s "
                "AND o.partition = r._partition AND r._offset >= o.first AND r._offset < o.next)"
            )
            found = connection.execute(outside.format(tables.rows, tables.offsets), [topic.full_name(prefix)])
            for (count,) in found.fetchall():
                if count:
                    report.fault(f"{count} rows outside the offsets that were written", name)
            lost = sql.SQL("SELECT coalesce(sum(next - start), 0)::bigint FROM {} WHERE topic = %s")
            for (holes,) in connection.execute(lost.format(tables.holes), [topic.full_name(prefix)]).fetchall():
                report.holes = holes
            if parts:
                rows = pl.concat(parts).with_columns(_file=pl.lit(name))
                report.days = rows["trading_day"].n_unique()
                late = any(first for first, _ in ends.values())
                prove_sequences(rows, report, late=late)
    except psycopg.Error as error:
        raise ConfigurationError(f"--to: {words(error)}") from error
    return report


def _rows(connection: psycopg.Connection[Any], tables: Tables, span: Range) -> pa.Table:
    flat = [name for name, kind in tables.columns.items() if kind != "jsonb"]
    query = sql.SQL(
        "SELECT {} FROM {} WHERE _partition = %s AND _offset >= %s AND _offset < %s ORDER BY _offset"
    ).format(sql.SQL(", ").join(map(sql.Identifier, flat)), tables.rows)
    with connection.cursor(binary=True) as cursor:
        found = cursor.execute(query, [span.partition.number, span.start, span.next]).fetchall()
    schema = pa.schema([*arrow_schema(tables.topic.event), *WHERE])
    values: Iterator[Any] = zip(*found, strict=True) if found else iter([()] * len(flat))
    kinds = [schema.field(name) for name in flat]
    return pa.Table.from_arrays(
        [pa.array(column, kind.type) for column, kind in zip(values, kinds, strict=True)], schema=pa.schema(kinds)
    )
