"""The tables of an archive in PostgreSQL: derived from the events' Avro schemas, made and migrated when told to."""

from __future__ import annotations

from datetime import date
from typing import Any

import psycopg
from psycopg import sql

from bourse_schemas.codec import avro_schema
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import TRADES, Topic

__all__ = ["Tables"]

VERSION = 1
TYPES = {
    "long": "bigint",
    "int": "integer",
    "string": "text",
    "double": "double precision",
    "boolean": "boolean",
    "bytes": "bytea",
}
WHERE = {"_partition": "integer", "_offset": "bigint", "_timestamp": "timestamp with time zone"}
# Whose rows are found by instrument and day, a partition a month.
BY_MONTH = ("instrument", "trading_day", "sequence")
LOCK = 0x62_6F_75_72_73_65  # for whoever makes tables; any number will do


def _type(avro: Any) -> str:
    match avro:
        case ["null", inner]:
            return _type(inner)
        case {"logicalType": "timestamp-millis"}:
            return "timestamp with time zone"
        case {"logicalType": "date"}:
            return "date"
        case {"type": "enum"}:
            return "text"
        case {"type": "map" | "array"}:
            return "jsonb"
    return TYPES[avro]


class Tables:
    """The tables of one topic in a schema of the database: its rows, and how far each partition is written."""

    def __init__(self, topic: Topic, schema: str) -> None:
        self.topic = topic
        self._schema = schema
        fields = avro_schema(topic.event)["fields"]
        self.columns = {field["name"]: _type(field["type"]) for field in fields} | WHERE
        self._optional = {field["name"] for field in fields if isinstance(field["type"], list)}
        self._months = set(BY_MONTH) <= self.columns.keys()
        self.rows = self._named(topic.name.replace("-", "_"))
        self.offsets = self._named("offsets")
        self._known_months: set[str] = set()

    def _named(self, name: str) -> sql.Identifier:
        return sql.Identifier(self._schema, name)

    # --- made and looked at -------------------------------------------------------------------------------------------

    def apply(self, connection: psycopg.Connection[Any]) -> None:
        """Make what is missing; add columns that a newer release has. Repeating it changes nothing."""
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self._schema)))
            meta = sql.SQL("CREATE TABLE IF NOT EXISTS {} (name text PRIMARY KEY, value text NOT NULL)")
            connection.execute(meta.format(self._named("meta")))
            version = sql.SQL("INSERT INTO {} VALUES ('version', %s) ON CONFLICT DO NOTHING")
            connection.execute(version.format(self._named("meta")), [str(VERSION)])
            offsets = sql.SQL(
                "CREATE TABLE IF NOT EXISTS {} (topic text, partition integer, first bigint NOT NULL, "
                "next bigint NOT NULL, PRIMARY KEY (topic, partition))"
            )
            connection.execute(offsets.format(self.offsets))
            key = BY_MONTH if self._months else ("_partition", "_offset")
            lines = [
                sql.SQL("{} {}{}").format(
                    sql.Identifier(name), sql.SQL(kind), sql.SQL("" if name in self._optional else " NOT NULL")
                )
                for name, kind in self.columns.items()
            ]
            lines.append(sql.SQL("PRIMARY KEY ({})").format(sql.SQL(", ").join(map(sql.Identifier, key))))
            partitioned = sql.SQL(" PARTITION BY RANGE (trading_day)" if self._months else "")
            table = sql.SQL("CREATE TABLE IF NOT EXISTS {} ({}){}")
            connection.execute(table.format(self.rows, sql.SQL(", ").join(lines), partitioned))
            for name in self._optional - self._found(connection).keys():
                more = sql.SQL("ALTER TABLE {} ADD COLUMN {} {}")
                connection.execute(more.format(self.rows, sql.Identifier(name), sql.SQL(self.columns[name])))
            if self.topic is TRADES:
                self._views(connection)

    def _views(self, connection: psycopg.Connection[Any]) -> None:
        last = sql.SQL(
            "CREATE OR REPLACE VIEW {} AS SELECT DISTINCT ON (instrument) instrument, symbol, trading_day, sequence, "
            "traded_at, open_price, high_price, low_price, last_price, closing_price, previous_close, volume, value, "
            "trade_count FROM {} ORDER BY instrument, trading_day DESC, sequence DESC"
        )
        connection.execute(last.format(self._named("last_candle"), self.rows))
        bars = sql.SQL(
            "CREATE OR REPLACE VIEW {} AS SELECT DISTINCT ON (instrument, trading_day) "
            "instrument, symbol, trading_day, open_price AS open, high_price AS high, low_price AS low, "
            "last_price AS last, closing_price AS close, "
            "volume, value, trade_count FROM {} ORDER BY instrument, trading_day, sequence DESC"
        )
        connection.execute(bars.format(self._named("daily_bars"), self.rows))

    def _found(self, connection: psycopg.Connection[Any]) -> dict[str, str]:
        found = connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
            [self.rows.as_string(connection)],
        )
        return dict(found.fetchall())

    def require(self, connection: psycopg.Connection[Any]) -> None:
        """Raise ConfigurationError where the tables are not those of this release."""
        where = f"the schema {self._schema}"
        found = self._found(connection)
        if not found:
            raise ConfigurationError(f"{where} has no table for {self.topic.name}: --apply-schema makes it")
        query = sql.SQL("SELECT value FROM {} WHERE name = 'version'").format(self._named("meta"))
        try:
            row = connection.execute(query).fetchone()
        except psycopg.errors.UndefinedTable:
            row = None
        if row is None:
            raise ConfigurationError(f"{where} has a table {self.topic.name} that is not ours: give another --schema")
        if int(row[0]) > VERSION:
            raise ConfigurationError(f"{where} was written by a newer version: upgrade bourse-stream")
        if missing := self.columns.keys() - found.keys():
            raise ConfigurationError(f"{self.topic.name} lacks {', '.join(sorted(missing))}: --apply-schema adds them")
        for name, kind in self.columns.items():
            if found[name] != kind:
                raise ConfigurationError(
                    f"{self.topic.name}: {name} is {found[name]}, not {kind}: give another --schema"
                )

    # --- written and read ---------------------------------------------------------------------------------------------

    def make_room(self, connection: psycopg.Connection[Any], days: set[date]) -> None:
        """Make the months of these days, in the transaction under way."""
        for day in sorted(days) if self._months else ():
            month = f"{self.topic.name}_{day:%Y_%m}"
            if month in self._known_months:
                continue
            begin = day.replace(day=1)
            end = date(begin.year + begin.month // 12, begin.month % 12 + 1, 1)
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            made = sql.SQL("CREATE TABLE IF NOT EXISTS {} PARTITION OF {} FOR VALUES FROM ({}) TO ({})")
            connection.execute(
                made.format(self._named(month), self.rows, sql.Literal(f"{begin}"), sql.Literal(f"{end}"))
            )
            self._known_months.add(month)

    def forget_months(self) -> None:
        """Look for months anew: what a transaction made that failed is not there."""
        self._known_months.clear()

    def ends(self, connection: psycopg.Connection[Any], topic: str) -> dict[int, tuple[int, int]]:
        """Return, per partition of a topic by its full name, the first offset written and the next one."""
        query = sql.SQL("SELECT partition, first, next FROM {} WHERE topic = %s").format(self.offsets)
        return {number: (first, at) for number, first, at in connection.execute(query, [topic])}
