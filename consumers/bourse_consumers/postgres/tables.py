"""The tables of an archive in PostgreSQL, derived from the events' Avro schemas."""

from __future__ import annotations

from datetime import date
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from bourse_consumers.api import Partition
from bourse_consumers.rows import WHERE, arrow_schema
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import TRADES, Topic

__all__ = ["Connection", "Tables"]

Connection = psycopg.Connection[Any]

# Maps and lists are JSON.
TYPES = {pa.string(): "text", pa.int64(): "bigint", pa.int32(): "integer", pa.float64(): "double precision"} | {
    pa.bool_(): "boolean",
    pa.binary(): "bytea",
    pa.date32(): "date",
    pa.timestamp("ms", "UTC"): "timestamp with time zone",
}
# A table with these columns is partitioned by month.
BY_MONTH, BY_DAY = ("instrument", "trading_day", "sequence"), " PARTITION BY RANGE (trading_day)"
LOCK = 0x62_6F_75_72_73_65  # of all who create tables
BOOKS = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE IF NOT EXISTS {offsets}
    (topic text, partition integer, first bigint NOT NULL, next bigint NOT NULL, PRIMARY KEY (topic, partition));
CREATE TABLE IF NOT EXISTS {holes} (topic text, partition integer, start bigint, next bigint NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (topic, partition, start));
"""
VIEWS = """
CREATE OR REPLACE VIEW {last_candle} AS SELECT DISTINCT ON (instrument) instrument, symbol, trading_day, sequence,
    traded_at, open_price, high_price, low_price, last_price, closing_price, previous_close, volume, value, trade_count
    FROM {rows} ORDER BY instrument, trading_day DESC, sequence DESC;
CREATE OR REPLACE VIEW {daily_bars} AS SELECT DISTINCT ON (instrument, trading_day) instrument, symbol, trading_day,
    open_price AS open, high_price AS high, low_price AS low, last_price AS last, closing_price AS close, volume, value,
    trade_count FROM {rows} ORDER BY instrument, trading_day, sequence DESC;
"""


class Tables:
    """The tables of one topic in a schema of the database: its rows, and the next offset of each partition."""

    def __init__(self, topic: Topic, schema: str) -> None:
        self.topic = topic
        self._schema = schema
        fields = [*arrow_schema(topic.event), *WHERE]
        self.columns = {field.name: TYPES.get(field.type, "jsonb") for field in fields}
        self._optional = {field.name for field in arrow_schema(topic.event) if field.nullable}
        self.months = set(BY_MONTH) <= self.columns.keys()
        self.rows = self.named(topic.name.replace("-", "_"))
        self.offsets, self.holes = map(self.named, ("offsets", "holes"))

    def named(self, name: str) -> sql.Identifier:
        """Return a table of the schema."""
        return sql.Identifier(self._schema, name)

    # --- created and checked ------------------------------------------------------------------------------------------

    def apply(self, connection: Connection) -> None:
        """Create what is missing and add columns of a newer release, in the transaction under way.

        Tables that are not ours are found after that: the transaction is rolled back.
        """
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        names = {"schema": sql.Identifier(self._schema), "offsets": self.offsets, "holes": self.holes}
        connection.execute(sql.SQL(BOOKS).format(**names))
        kinds = {
            name: sql.SQL(kind + " NOT NULL" * (name not in self._optional)) for name, kind in self.columns.items()
        }
        columns = [sql.SQL("{} {}").format(sql.Identifier(name), kind) for name, kind in kinds.items()]
        key = sql.SQL(", ").join(map(sql.Identifier, BY_MONTH if self.months else ("_partition", "_offset")))
        create = sql.SQL("CREATE TABLE IF NOT EXISTS {} ({}, PRIMARY KEY ({}))" + BY_DAY * self.months)
        connection.execute(create.format(self.rows, sql.SQL(", ").join(columns), key))
        for name in sorted(self._optional):
            add = sql.SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} {}")
            connection.execute(add.format(self.rows, sql.Identifier(name), kinds[name]))
        self.require(connection)
        if self.topic is TRADES:
            views = {name: self.named(name) for name in ("last_candle", "daily_bars")}
            connection.execute(sql.SQL(VIEWS).format(rows=self.rows, **views))

    def _found(self, connection: Connection) -> dict[str, str]:
        query = (
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped"
        )
        return dict(connection.execute(query, [self.rows.as_string(connection)]).fetchall())

    def exist(self, connection: Connection) -> bool:
        """Return whether there is a table of the topic."""
        return bool(self._found(connection))

    def require(self, connection: Connection) -> None:
        """Raise ConfigurationError if the tables are not those of this release."""
        found, name = self._found(connection), self.topic.name
        if not found:
            raise ConfigurationError(f"the schema {self._schema} has no table of {name}: add --apply-schema")
        if missing := self.columns.keys() - found.keys():
            advice = "add --apply-schema" if missing <= self._optional else "it is another table: use another --schema"
            raise ConfigurationError(f"{name} lacks {', '.join(sorted(missing))}: {advice}")
        for column, kind in self.columns.items():
            if found[column] != kind:
                raise ConfigurationError(f"{name}: {column} is {found[column]}, not {kind}: use another --schema")

    # --- written and read ---------------------------------------------------------------------------------------------

    def create_months(self, connection: Connection, days: set[date]) -> None:
        """Create the partitions of these days, in the transaction under way."""
        known = "SELECT 1 FROM pg_inherits WHERE inhparent = to_regclass(%s) AND inhrelid = to_regclass(%s)"
        for begin in sorted({day.replace(day=1) for day in days}) if self.months else ():
            month = self.named(f"{self.topic.name}_{begin:%Y_%m}")
            names = [table.as_string(connection) for table in (self.rows, month)]
            if connection.execute(known, names).fetchone():
                continue
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            if connection.execute(known, names).fetchone():
                continue
            # CREATE … PARTITION OF would wait for everyone who reads the table, and block all others; this does not.
            connection.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(month, self.rows))
            end: sql.Composable = sql.SQL("MAXVALUE")
            if (begin.year, begin.month) != (date.max.year, date.max.month):
                end = sql.Literal(f"{date(begin.year + begin.month // 12, begin.month % 12 + 1, 1)}")
            attach = sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})")
            connection.execute(attach.format(self.rows, month, sql.Literal(f"{begin}"), end))

    def ends(self, connection: Connection, topic: str) -> dict[int, tuple[int, int]]:
        """Return, per partition of a topic by its full name, the first offset written and the next one."""
        query = sql.SQL("SELECT topic, partition, first, next FROM {}").format(self.offsets)
        found = connection.execute(query).fetchall()
        for other in {each for each, *_ in found if each != topic and each.endswith(f".{self.topic.name}")}:
            raise ConfigurationError(
                f"the schema {self._schema} holds {other}, not {topic}: use another --schema, or the other prefix"
            )
        return {number: (first, at) for each, number, first, at in found if each == topic}

    def advance(self, connection: Connection, partition: Partition, start: int, end: int) -> bool:
        """Move a partition's offset, in the transaction under way; return False if it is not where it is expected."""
        move = sql.SQL(
            "INSERT INTO {0} AS known VALUES (%s, %s, %s, %s) ON CONFLICT (topic, partition) DO UPDATE "
            "SET next = EXCLUDED.next WHERE known.next = EXCLUDED.first"
        )
        return connection.execute(move.format(self.offsets), [*partition, start, end]).rowcount == 1

    def note_hole(self, connection: Connection, partition: Partition, start: int, end: int) -> None:
        """Record that the table has no rows of these offsets, in the transaction under way."""
        noted = sql.SQL("INSERT INTO {} (topic, partition, start, next) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING")
        connection.execute(noted.format(self.holes), [*partition, start, end])
