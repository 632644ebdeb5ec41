"""Whether the tables hold exactly what they must."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import polars as pl
import psycopg
import pyarrow as pa
from psycopg import sql

from bourse_consumers.archive.proof import COUNTED, Kept, Markers, Report, Stored, prove
from bourse_consumers.postgres.sink import connect, reason
from bourse_consumers.postgres.tables import Connection, Tables
from bourse_consumers.rows import WHERE, arrow_schema, as_json
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import POLLS, TOPICS, TRADES, Topic

__all__ = ["verify"]

CHUNK = 20_000


def verify(
    dsn: str, topic: str | None, *, schema: str, prefix: str, kept: Callable[[Topic, str], Kept] | None
) -> list[Report]:
    """Check a topic's table, or all that there are, against the topics, if `kept` is given, and against the polls."""
    reports = []
    try:
        with connect(dsn) as connection:
            for each in TOPICS:
                tables = Tables(each, schema)
                if each.cleanup == "delete" and (each.name == topic or (not topic and tables.exist(connection))):
                    reports.append(_verify(connection, tables, each.full_name(prefix), Tables(POLLS, schema), kept))
    except psycopg.Error as error:
        raise ConfigurationError(f"--to: {reason(error)}") from error
    if not reports:
        raise ConfigurationError(f"--to: the schema {schema} has no table of a topic: use another --schema")
    return reports


def _verify(
    connection: Connection, tables: Tables, name: str, polls: Tables, kept: Callable[[Topic, str], Kept] | None
) -> Report:
    report, holes = Report(name), sql.SQL("SELECT partition, start, next FROM {} WHERE topic = %s").format(tables.holes)
    # All of it as of one moment: a writer may be at work.
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute("SET LOCAL statement_timeout = 0")
        tables.require(connection)
        lost, ends = connection.execute(holes, [name]).fetchall(), tables.ends(connection, name)
        markers: Markers | str = ""
        if tables.topic is TRADES:
            markers = _markers(connection, polls, f"{name.removesuffix(TRADES.name)}{POLLS.name}")
        prove(Stored(ends, lost, _parts(connection, tables), markers), report, kept and kept(tables.topic, name))
    return report


def _markers(connection: Connection, polls: Tables, topic: str) -> Markers | str:
    if not polls.exist(connection):
        return "there is no table of polls"
    names = ["poll_sequence", *COUNTED.values()]
    query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(map(sql.Identifier, names)), polls.rows)
    found = pl.DataFrame(connection.execute(query).fetchall(), dict.fromkeys(names, pl.Int64), orient="row")
    return Markers(found, from_start=[first for first, _ in polls.ends(connection, topic).values()] == [0])


def _parts(connection: Connection, tables: Tables) -> Iterator[pa.Table]:
    """Yield the rows of each trading day, or of each partition if the topic has no trading days."""
    fields = [*arrow_schema(tables.topic.event), *WHERE]
    columns = sql.SQL(", ").join(sql.Identifier(field.name) for field in fields)
    key = sql.Identifier("trading_day" if tables.months else "_partition")
    query = sql.SQL("SELECT {} FROM {} WHERE {} = %s").format(columns, tables.rows, key)
    keys = sql.SQL("SELECT DISTINCT {} FROM {} ORDER BY 1").format(key, tables.rows)
    for value in connection.execute(keys).fetchall():
        with connection.cursor("proof") as cursor:
            cursor.execute(query, value, binary=True)
            chunks = []
            while chunk := cursor.fetchmany(CHUNK):
                chunks.append(_table(chunk, fields))
        yield pa.concat_tables(chunks)


def _table(rows: list[tuple[object, ...]], fields: list[pa.Field]) -> pa.Table:
    columns = {}
    for field, values in zip(fields, zip(*rows, strict=True), strict=True):
        nested = pa.types.is_nested(field.type)
        columns[field.name] = pa.array(map(as_json, values), pa.string()) if nested else pa.array(values, field.type)
    return pa.table(columns)
