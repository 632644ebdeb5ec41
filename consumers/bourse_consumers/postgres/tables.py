"""The tables of an archive in PostgreSQL: derived from the events' Avro schemas, made and migrated when told to."""

from __future__ import annotations

from datetime import date
from typing import Any

import psycopg
from psycopg import sql

from bourse_consumers.api import Partition
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


def _span(day: date) -> tuple[sql.Composable, sql.Composable]:
    """Return where the month of a day begins and ends; the last one of all has no end."""
    begin = day.replace(day=1)
    if (begin.year, begin.month) == (date.max.year, date.max.month):
        return sql.Literal(f"{begin}"), sql.SQL("MAXVALUE")
    return sql.Literal(f"{begin}"), sql.Literal(f"{date(begin.year + begin.month // 12, begin.month % 12 + 1, 1)}")


class Tables:
    """The tables of one topic in a schema of the database: its rows, and how far each partition is written."""

    def __init__(self, topic: Topic, schema: str) -> None:
        self.topic = topic
        self._schema = schema
        fields = avro_schema(topic.event)["fields"]
        self.columns = {field["name"]: _type(field["type"]) for field in fields} | WHERE
        self._optional = {field["name"] for field in fields if isinstance(field["type"], list)}
        self._months = set(BY_MONTH) <= self.columns.keys()
        self.rows = self.beside(topic.name.replace("-", "_"))
        self.offsets, self.holes = self.beside("offsets"), self.beside("holes")
        self._known_months: set[str] = set()

    def beside(self, name: str) -> sql.Identifier:
        """Return a table of the schema."""
        return sql.Identifier(self._schema, name)

    # --- made and looked at -------------------------------------------------------------------------------------------

    def apply(self, connection: psycopg.Connection[Any]) -> None:
        """Make what is missing; add columns that a newer release has. Repeating it changes nothing."""
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self._schema)))
            if self._found(connection) or self._version(connection) is not None:
                self._require_ours(connection)
            meta = sql.SQL("CREATE TABLE IF NOT EXISTS {} (name text PRIMARY KEY, value text NOT NULL)")
            connection.execute(meta.format(self.beside("meta")))
            version = sql.SQL("INSERT INTO {} VALUES ('version', %s) ON CONFLICT DO NOTHING")
            connection.execute(version.format(self.beside("meta")), [str(VERSION)])
            offsets = sql.SQL(
                "CREATE TABLE IF NOT EXISTS {} (topic text, partition integer, first bigint NOT NULL, "
                "next bigint NOT NULL, PRIMARY KEY (topic, partition))"
            )
            connection.execute(offsets.format(self.offsets))
            holes = sql.SQL(
                "CREATE TABLE IF NOT EXISTS {} (topic text, partition integer, start bigint, next bigint NOT NULL, "
                "noted_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (topic, partition, start))"
            )
            connection.execute(holes.format(self.holes))
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
            # What lacks more than that is another table, and stays as it is: the check below undoes all of this.
            for name in self._optional - self._found(connection).keys():
                more = sql.SQL("ALTER TABLE {} ADD COLUMN {} {}")
                connection.execute(more.format(self.rows, sql.Identifier(name), sql.SQL(self.columns[name])))
            self.require(connection)
            if self.topic is TRADES:
                self._views(connection)

    def _views(self, connection: psycopg.Connection[Any]) -> None:
        last = sql.SQL(
            "CREATE OR REPLACE VIEW {} AS SELECT DISTINCT ON (instrument) instrument, symbol, trading_day, sequence, "
            "traded_at, open_price, high_price, low_price, last_price, closing_price, previous_close, volume, value, "
            "trade_count FROM {} ORDER BY instrument, trading_day DESC, sequence DESC"
        )
        connection.execute(last.format(self.beside("last_candle"), self.rows))
        bars = sql.SQL(
            "CREATE OR REPLACE VIEW {} AS SELECT DISTINCT ON (instrument, trading_day) "
            "instrument, symbol, trading_day, open_price AS open, high_price AS high, low_price AS low, "
            "last_price AS last, closing_price AS close, "
            "volume, value, trade_count FROM {} ORDER BY instrument, trading_day, sequence DESC"
        )
        connection.execute(bars.format(self.beside("daily_bars"), self.rows))

    def _found(self, connection: psycopg.Connection[Any]) -> dict[str, str]:
        found = connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
            [self.rows.as_string(connection)],
        )
        return dict(found.fetchall())

    def require(self, connection: psycopg.Connection[Any]) -> None:
        """Raise ConfigurationError where the tables are not those of this release."""
        found = self._found(connection)
        if not found:
            raise ConfigurationError(
                f"the schema {self._schema} has no table for {self.topic.name}: --apply-schema makes it"
            )
        self._require_ours(connection)
        if missing := self.columns.keys() - found.keys():
            help_ = "--apply-schema adds them" if missing <= self._optional else "it is not ours: give another --schema"
            raise ConfigurationError(f"{self.topic.name} lacks {', '.join(sorted(missing))}: {help_}")
        for name, kind in self.columns.items():
            if found[name] != kind:
                raise ConfigurationError(
                    f"{self.topic.name}: {name} is {found[name]}, not {kind}: give another --schema"
                )

    def _require_ours(self, connection: psycopg.Connection[Any]) -> None:
        version = self._version(connection)
        where = f"the schema {self._schema}"
        if version is None:
            raise ConfigurationError(f"{where} has a table {self.topic.name} that is not ours: give another --schema")
        if version > VERSION:
            raise ConfigurationError(f"{where} was written by a newer version: upgrade bourse-stream")

    def _version(self, connection: psycopg.Connection[Any]) -> int | None:
        """Return the version of the tables, None where nothing of ours says it."""
        meta = self.beside("meta")
        if connection.execute("SELECT to_regclass(%s)", [meta.as_string(connection)]).fetchone() == (None,):
            return None
        row = connection.execute(sql.SQL("SELECT value FROM {} WHERE name = 'version'").format(meta)).fetchone()
        return int(row[0]) if row else None

    def require_rights(self, connection: psycopg.Connection[Any]) -> None:
        """Raise ConfigurationError where this user may not do what a writer does."""
        rows, offsets = self.rows.as_string(connection), self.offsets.as_string(connection)
        checks = [
            (f"INSERT on {rows}", "SELECT has_table_privilege(%s, 'INSERT')", [rows]),
            *(
                (f"{right} on {offsets}", "SELECT has_table_privilege(%s, %s)", [offsets, right])
                for right in ("SELECT", "INSERT", "UPDATE")
            ),
        ]
        if self._months:
            # Only who owns a table may give it a month.
            owner = "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(%s)"
            checks.append((f"the ownership of {rows}", owner, [rows]))
            checks.append(("CREATE in its schema", "SELECT has_schema_privilege(%s, 'CREATE')", [self._schema]))
        for what, query, about in checks:
            if connection.execute(query, about).fetchone() != (True,):
                raise ConfigurationError(f"--dsn: this user lacks {what}: grant it, or give another user")

    # --- written and read ---------------------------------------------------------------------------------------------

    def make_room(self, connection: psycopg.Connection[Any], days: set[date]) -> None:
        """Make the months of these days, in the transaction under way."""
        for day in sorted(days) if self._months else ():
            month = f"{self.topic.name}_{day:%Y_%m}"
            if month in self._known_months:
                continue
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            known = "SELECT 1 FROM pg_inherits WHERE inhparent = to_regclass(%s) AND inhrelid = to_regclass(%s)"
            each = self.beside(month)
            if not connection.execute(known, [part.as_string(connection) for part in (self.rows, each)]).fetchone():
                # CREATE … PARTITION OF would wait for whoever reads the table, and make all others wait; this does not.
                connection.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(each, self.rows))
                attach = sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})")
                connection.execute(attach.format(self.rows, each, *_span(day)))
            self._known_months.add(month)

    def forget_months(self) -> None:
        """Look for months anew: what a transaction made that failed is not there."""
        self._known_months.clear()

    def ends(self, connection: psycopg.Connection[Any], topic: str) -> dict[int, tuple[int, int]]:
        """Return, per partition of a topic by its full name, the first offset written and the next one."""
        query = sql.SQL("SELECT topic, partition, first, next FROM {}").format(self.offsets)
        found = connection.execute(query).fetchall()
        for other in {each for each, *_ in found if each != topic and each.endswith(f".{self.topic.name}")}:
            raise ConfigurationError(
                f"the schema {self._schema} holds {other}, not {topic}: give another --schema, or the other prefix"
            )
        return {number: (first, at) for each, number, first, at in found if each == topic}

    def note_hole(self, connection: psycopg.Connection[Any], partition: Partition, start: int, first: int) -> None:
        """Move the offsets over what can no longer be had, in the transaction under way; say so where we did."""
        move = sql.SQL("UPDATE {} SET next = %s WHERE topic = %s AND partition = %s AND next = %s")
        if connection.execute(move.format(self.offsets), [first, *partition, start]).rowcount:
            noted = sql.SQL("INSERT INTO {} (topic, partition, start, next) VALUES (%s, %s, %s, %s)")
            connection.execute(noted.format(self.holes), [*partition, start, first])
