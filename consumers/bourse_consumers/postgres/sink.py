"""An archive in PostgreSQL: rows and offsets in one transaction, fenced by the offsets.

A batch moves the offsets of its partitions from what this writer knows; if another writer has moved them, nothing of
the batch is written, and this writer continues after the other. Works behind a pooler in transaction mode: nothing
depends on a session.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any, NoReturn

import polars as pl
import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Offsets, Own, Partition, Reject, Reopen, Retry
from bourse_consumers.postgres.tables import Connection, Tables
from bourse_consumers.rows import plain_json
from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.topics import Topic
from bourse_schemas.watchdog import deadline

__all__ = ["PostgresArchive", "connect", "reason", "require_address", "transaction"]

# A server that is unreachable is noticed within these times.
PATIENCE = "connect_timeout=5 keepalives_idle=10 keepalives_interval=5 keepalives_count=3 tcp_user_timeout=30000"
# Of one transaction, if the address, the user or the server sets none: poolers refuse them at connect.
LIMITS = """
SELECT set_config(n, coalesce(nullif(current_setting(n), '0'), v), true) FROM (VALUES
    ('statement_timeout', '60s'), ('lock_timeout', '10s'), ('idle_in_transaction_session_timeout', '15s')) AS t (n, v)
"""
# Messages of libpq if no server answers, or one that will accept connections later.
AWAY = re.compile(
    r"Connection refused|Connection reset|timed out|timeout expired|closed the connection|unreachable|No route to host|"
    r"resolve host|failed: No such file|starting up|shutting down|recovery mode|not yet accepting|too many|slots are"
)


def connect(dsn: str) -> Connection:
    """Return a connection that commits only what `transaction` holds; what the address sets takes precedence.

    Raises psycopg.Error, and ConfigurationError if it is not an address: libpq's own message would quote the password.
    """
    known = {"application_name": "bourse-stream", **require_address(dsn, "--dsn"), "client_encoding": "utf8"}
    return psycopg.connect(make_conninfo(PATIENCE, **known), autocommit=True, prepare_threshold=None)


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Hold a transaction with limits; the process ends if it hangs all the same."""
    with deadline("a transaction in PostgreSQL", 150), connection.transaction():
        connection.execute(LIMITS)
        yield


def require_address(dsn: str, option: str) -> dict[str, Any]:
    """Return the parts of an address. Raises ConfigurationError if it is not one, and does not quote it."""
    try:
        parts = dict(conninfo_to_dict(dsn))
        # A host with an @ is the end of a password that contains one; with nothing before it, it is a socket.
        valid = "@" not in str(parts.get("host", "")).removeprefix("@")
    except psycopg.Error:
        valid = False
    if not valid:
        example = "postgresql://user@host:5432/database (in a password, write %25 for %, %40 for @, %2F for /)"
        raise ConfigurationError(f"{option} is not an address such as {example}")
    return parts


class PostgresArchive(Consumer):
    """Writes every event of a topic to a table, exactly once."""

    batch_size = 4000

    def __init__(
        self, dsn: str, topic: Topic, *, schema: str = "bourse", apply_schema: bool = False, accept_loss: bool = False
    ) -> None:
        self.topics = (topic,)
        self._dsn = dsn
        self._tables = Tables(topic, schema)
        self._apply_schema, self._accept_loss = apply_schema, accept_loss
        self._next: dict[Partition, int] = {}
        # A commit may or may not have moved the offsets.
        self._unsure = False
        self._refused: dict[tuple[Partition, int], str] = {}
        self._required = False
        try:
            self._require()
        except Unreachable as error:
            get_logger().warning("the database is unreachable, it is tried again", error=str(error))

    def _require(self) -> None:
        """Connect and check the database once. Raises ConfigurationError, and Unreachable if it may come back."""
        if self._required:
            return
        try:
            connection = self._connection = self._connect()
            try:
                self._check(connection)
            except psycopg.Error:
                connection.close()
                raise
        except psycopg.Error as error:
            kind = Unreachable if _may_come_back(error) else ConfigurationError
            raise kind(f"--dsn: {reason(error)}") from error
        self._required = True

    def _check(self, connection: Connection) -> None:
        with transaction(connection):
            if connection.execute("SHOW transaction_read_only").fetchone() == ("on",):
                raise ConfigurationError("--dsn: this server or user is read-only")
            if connection.execute("SHOW server_encoding").fetchone() != ("UTF8",):
                raise ConfigurationError("--dsn: this database cannot hold Persian text: create it with UTF8")
            if self._apply_schema:
                self._tables.apply(connection)
            self._tables.require(connection)
            # What a writer does, undone: a right that is missing is known now.
            with connection.transaction(force_rollback=True):
                nowhere = Partition("", -1)
                for _ in range(2):
                    self._tables.advance(connection, nowhere, 0, 0)
                self._tables.note_hole(connection, nowhere, 0, 0)
                self._tables.create_months(connection, {date.max})
                self._copy(pl.DataFrame(schema=dict.fromkeys(self._tables.columns, pl.Date)))

    def _connect(self) -> Connection:
        connection = connect(self._dsn)
        weakref.finalize(self, connection.close)  # also without close()
        return connection

    def open(self, assigned: Assignment) -> Own:
        """Begin at the stored offsets; a partition that has none begins at its oldest record."""
        self._next = {partition: assigned.first.get(partition, 0) for partition in assigned}
        self._unsure, self._refused = False, {}
        try:
            self._require()
        except Unreachable as error:
            self._healthy(str(error))
            raise Retry(str(error)) from error
        try:
            with transaction(self._connection):
                self._next |= self._ends(assigned)
                for partition, first in assigned.first.items():
                    self._skip_lost(partition, first)
        except psycopg.Error as error:
            self._reconnect(error)
        self._healthy(None)
        return Own(dict(self._next))

    def _skip_lost(self, partition: Partition, first: int) -> None:
        """Stop if the topic no longer has the next record; with --accept-loss record the hole and go on after it."""
        start = self._next[partition]
        if start >= first:
            return
        lost = f"{partition.topic}-{partition.number}: offsets {start} to {first - 1}"
        if not self._accept_loss:
            raise ConfigurationError(f"{lost} are deleted and not archived: --accept-loss records the hole and goes on")
        get_logger().error("records lost, hole recorded", offsets=lost)
        if self._tables.advance(self._connection, partition, start, first):
            self._tables.note_hole(self._connection, partition, start, first)
        self._next[partition] = first

    def _ends(self, partitions: Any) -> dict[Partition, int]:
        found = {topic: self._tables.ends(self._connection, topic) for topic in {each.topic for each in partitions}}
        return {each: found[each.topic][each.number][1] for each in partitions if each.number in found[each.topic]}

    def process(self, batch: Batch) -> None:
        """Write a batch and move the offsets, or neither."""
        self._reject(batch)
        try:
            rows = self._rows(batch)
            with transaction(self._connection):
                # After a lost answer to a commit the offsets show whether the batch is stored.
                if not (self._unsure and self._ends(batch.next) == batch.next):
                    self._move(batch.next)
                    self._store(rows, batch)
        except psycopg.Error as error:
            self._unsure = True
            self._reconnect(error)
        self._unsure = False
        self._healthy(None)
        self._reject(batch)
        self._refused = {}
        self._next |= batch.next

    def _reject(self, batch: Batch) -> None:
        """Raise Reject for the first record that the database is known to refuse."""
        for record in batch.records if self._refused else ():
            if (why := self._refused.get((record.partition, record.offset))) is not None:
                raise Reject(record, f"PostgreSQL refuses it: {why}")

    def _store(self, rows: pl.DataFrame, batch: Batch) -> None:
        """Write rows, or nothing if some have to be rejected; record the offsets that have no row as holes."""
        known = len(self._refused)
        for index, error in self._write(rows):
            record = batch.records[index]
            if self._tables.months and isinstance(error, errors.UniqueViolation):
                # The same event_id is the same event.
                get_logger().warning("event is already stored", record=record.origin)
                self._tables.note_hole(self._connection, record.partition, record.offset, record.offset + 1)
            else:
                self._refused[record.partition, record.offset] = reason(error)
        if len(self._refused) > known:
            raise psycopg.Rollback
        for partition, offset in self._refused:
            self._tables.note_hole(self._connection, partition, offset, offset + 1)

    def _move(self, ends: Offsets) -> None:
        # All writers use one order, so that there is no deadlock.
        for partition, at in sorted(ends.items()):
            if not self._tables.advance(self._connection, partition, self._next[partition], at):
                raise Reopen("another writer has moved the offsets")

    def _rows(self, batch: Batch) -> pl.DataFrame:
        """Return a batch as PostgreSQL can read it from CSV."""
        table = batch.table()
        columns = []
        for name, kind in self._tables.columns.items():
            column = pl.Series(name, plain_json(table[name]) if kind == "jsonb" else table[name])
            columns.append(("\\x" + column.bin.encode("hex") if kind == "bytea" else column).alias(name))
        return pl.DataFrame(columns)

    def _write(self, rows: pl.DataFrame, first: int = 0) -> Iterator[tuple[int, psycopg.Error]]:
        """Write rows but those that the database refuses, found by bisection; yield their indexes and errors."""
        try:
            with self._connection.transaction():
                self._copy(rows)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if rows.height == 1:
                yield first, error
                return
            half = rows.height // 2
            yield from self._write(rows[:half], first)
            yield from self._write(rows[half:], first + half)

    def _copy(self, rows: pl.DataFrame) -> None:
        if self._tables.months:
            self._tables.create_months(self._connection, set(rows["trading_day"].unique()))
        names = sql.SQL(", ").join(map(sql.Identifier, rows.columns))
        # As text: the server reads it about as fast as its binary format, and making that takes ten times as long.
        into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT CSV)").format(self._tables.rows, names)
        with self._connection.cursor() as cursor, cursor.copy(into) as copy:
            # With quotes around everything but numbers, an empty field is NULL and "" is a text.
            copy.write(rows.write_csv(include_header=False, quote_style="non_numeric"))

    def durable(self) -> Offsets:
        """Return what is committed."""
        return dict(self._next)

    def close(self) -> None:
        """Close the connection."""
        if self._required:
            self._connection.close()

    def _healthy(self, why: str | None) -> None:
        if self.monitor:
            self.monitor.unready("database", why)

    def _reconnect(self, error: psycopg.Error) -> NoReturn:
        """Ask for the batch again, over a new connection: the old one may not know yet that it is broken."""
        try:
            self._connection.close()
            self._connection = self._connect()
        except psycopg.Error as again:
            error = again
        message = f"PostgreSQL: {reason(error)}"
        self._healthy(message)
        raise Retry(message) from error


def _may_come_back(error: psycopg.Error) -> bool:
    """Return whether the server did not answer, or had no time; libpq has no SQLSTATE of a failed connection."""
    if error.sqlstate:
        return isinstance(error, psycopg.OperationalError) and not error.sqlstate.startswith("28")  # authorization
    return AWAY.search(str(error)) is not None


def reason(error: psycopg.Error) -> str:
    """Return what the server or the library reports, in a line."""
    text = (error.diag.message_primary if error.diag else None) or str(error) or type(error).__name__
    return text.strip().partition("\n")[0]
