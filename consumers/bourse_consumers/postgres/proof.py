"""Whether the tables hold exactly what they must."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import polars as pl
import psycopg
import pyarrow as pa
from psycopg import sql

from bourse_consumers.archive.proof import COUNTED, UNCOMPARED, Kept, Markers, Report, Stored, prove
from bourse_consumers.postgres.sink import connect, reason
from bourse_consumers.postgres.tables import Connection, Tables
from bourse_consumers.rows import WHERE, arrow_schema, as_json
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import POLLS, TOPICS, TRADES, Topic

__all__ = ["archived_there", "verify"]

CHUNK = 20_000


def verify(dsn: str, topic: Topic, *, schema: str, prefix: str, kept: Callable[[], Kept] | None) -> Report:
    """Check a topic's table against the topic, if it is given, and against the table of polls, if there is one."""
    tables, name, report = Tables(topic, schema), topic.full_name(prefix), Report(topic.full_name(prefix))
    holes = sql.SQL("SELECT partition, start, next FROM {} WHERE topic = %s").format(tables.holes)
    try:
        # All of it as of one moment: a writer may be at work.
        with connect(dsn) as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            connection.execute("SET LOCAL statement_timeout = 0")
            tables.require(connection)
            lost = connection.execute(holes, [name]).fetchall()
            stored = Stored(tables.ends(connection, name), lost, _parts(connection, tables))
            markers = _markers(connection, Tables(POLLS, schema), prefix)
            # The topic has all rows of the polls read before it.
            prove(stored, report, kept and kept(), markers)
            if topic is TRADES and markers is None:
                report.notes.append(f"{UNCOMPARED}: the schema {schema} has no table of polls")
    except psycopg.Error as error:
        raise ConfigurationError(f"--to: {reason(error)}") from error
    return report


def archived_there(dsn: str, schema: str) -> list[Topic]:
    """Return the topics that have a table; raise ConfigurationError if there is none."""
    try:
        with connect(dsn) as connection:
            found = [topic for topic in TOPICS if topic.cleanup == "delete" and Tables(topic, schema).exist(connection)]
    except psycopg.Error as error:
        raise ConfigurationError(f"--to: {reason(error)}") from error
    if not found:
        raise ConfigurationError(f"--to: the schema {schema} has no table of a topic: use another --schema")
    return found


def _markers(connection: Connection, polls: Tables, prefix: str) -> Markers | None:
    if not polls.exist(connection):
        return None
    names = ["poll_sequence", *COUNTED.values()]
    query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(map(sql.Identifier, names)), polls.rows)
    found = pl.DataFrame(connection.execute(query).fetchall(), dict.fromkeys(names, pl.Int64), orient="row")
    first = [first for first, _ in polls.ends(connection, POLLS.full_name(prefix)).values()]
    return Markers(found, from_start=first == [0])


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
