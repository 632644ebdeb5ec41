"""An archive in PostgreSQL: rows and offsets in one transaction, fenced by the offsets.

A batch moves the offsets of its partitions from where this writer believes them to be; if another one has moved them,
nothing of the batch is written, and the writer goes on behind the other.
"""

from __future__ import annotations

import base64
import json
import os
import weakref
from typing import Any, NoReturn, cast

import polars as pl
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bourse_cli.logs import get_logger
from bourse_consumers.api import Assignment, Batch, Consumer, Offsets, Own, Partition, Record, Reject, Reopen, Retry
from bourse_consumers.postgres.tables import Tables
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import Topic

__all__ = ["PostgresArchive", "connect", "require_address", "words"]

# A server that is gone, or a writer that sleeps in the middle of a transaction, is noticed in so long.
PATIENCE: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "bourse-stream",
}
TIMEOUTS = "-c statement_timeout=60s -c lock_timeout=10s -c idle_in_transaction_session_timeout=15s"


def connect(dsn: str) -> psycopg.Connection[Any]:
    """Return a connection that commits only what `transaction()` holds; what the address sets goes before ours.

    Raises psycopg.Error, and ConfigurationError where it is no address: libpq's own words would quote the password.
    """
    given = require_address(dsn, "--dsn")
    options = f"{TIMEOUTS} {given.get('options') or os.environ.get('PGOPTIONS', '')}".strip()
    own = {**PATIENCE, **given, "options": options, "client_encoding": "utf8"}
    return psycopg.connect(make_conninfo("", **own), autocommit=True)


def require_address(dsn: str, option: str) -> dict[str, Any]:
    """Return the parts of an address. Raises ConfigurationError where it is none, without a word of it."""
    try:
        parts = dict(conninfo_to_dict(dsn))
        # A host with an @ is the end of a password that holds one; with nothing before it, a socket.
        sound = "@" not in str(parts.get("host", "")).removeprefix("@")
    except psycopg.Error:
        sound = False
    if not sound:
        raise ConfigurationError(
            f"{option} is no address such as postgresql://user@host:5432/database; in a password, % is written %25, "
            "@ is written %40, / is written %2F"
        )
    return parts


class PostgresArchive(Consumer):
    """Writes every event of a topic to a table, exactly once."""

    batch_size = 4000

    def __init__(
        self,
        dsn: str,
        topic: Topic,
        *,
        schema: str = "bourse",
        apply_schema: bool = False,
        accept_loss: bool = False,
    ) -> None:
        self.topics = (topic,)
        self._dsn = dsn
        self._tables = Tables(topic, schema)
        self._accept_loss = accept_loss
        self._next: dict[Partition, int] = {}
        # Where a commit may or may not have brought the offsets.
        self._unsure = False
        try:
            self._connection = self._connect()
            if self._connection.execute("SHOW transaction_read_only").fetchone() == ("on",):
                raise ConfigurationError("--dsn: this server or user may only read")
            if self._connection.execute("SHOW server_encoding").fetchone() != ("UTF8",):
                raise ConfigurationError("--dsn: this database cannot hold Persian text: make one with ENCODING 'UTF8'")
            if apply_schema:
                self._tables.apply(self._connection)
            self._tables.require(self._connection)
            self._tables.require_rights(self._connection)
        except psycopg.Error as error:
            raise ConfigurationError(f"--dsn: {words(error)}") from error

    def _connect(self) -> psycopg.Connection[Any]:
        connection = connect(self._dsn)
        weakref.finalize(self, connection.close)  # also where nobody says good-bye
        return connection

    def open(self, assigned: Assignment) -> Own:
        """Begin where the offsets table is; a partition that is new there begins at its oldest record."""
        self._next = {partition: assigned.first.get(partition, 0) for partition in assigned}
        self._unsure = False
        try:
            found = self._ends()
            lost = {each: (found[each], at) for each, at in assigned.first.items() if found.get(each, at) < at}
            self._note_loss(lost)
        except psycopg.Error as error:
            self._reconnect(error)
        self._next.update({each: max(at, assigned.first.get(each, 0)) for each, at in found.items()})
        return Own(dict(self._next))

    def _note_loss(self, lost: dict[Partition, tuple[int, int]]) -> None:
        """Stop where the topic no longer has what comes next; or go on behind the hole, and note it."""
        for partition, (start, first) in lost.items():
            where = f"{partition.topic}-{partition.number}: offsets {start} to {first - 1}"
            if not self._accept_loss:
                raise ConfigurationError(
                    f"the topic has deleted what this archive lacks, {where}: it was away for longer than the topic "
                    "keeps its records; --accept-loss goes on, and leaves a record of the hole"
                )
            get_logger().error("lost for ever, and noted in the archive", where=where)
            with self._connection.transaction():
                self._tables.note_hole(self._connection, partition, start, first)

    def _ends(self) -> dict[Partition, int]:
        found = {topic: self._tables.ends(self._connection, topic) for topic in {each.topic for each in self._next}}
        return {each: found[each.topic][each.number][1] for each in self._next if each.number in found[each.topic]}

    def process(self, batch: Batch) -> None:
        """Write a batch and move the offsets behind it, or nothing of both."""
        ends = {partition: batch.next[partition] for partition in {record.partition for record in batch.records}}
        try:
            if self._unsure:
                found = self._ends()
                self._unsure = False
                if all(found.get(partition) == at for partition, at in ends.items()):
                    self._next.update(ends)
                    return
            rows = self._rows(batch)
            with self._connection.transaction():
                self._move(ends)
                self._write(rows)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            self._blame(batch, error)
        except psycopg.Error as error:
            self._unsure = True
            self._reconnect(error)
        self._next.update(ends)

    def _move(self, ends: Offsets) -> None:
        known = sql.SQL("INSERT INTO {} VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING").format(self._tables.offsets)
        move = sql.SQL("UPDATE {} SET next = %s WHERE topic = %s AND partition = %s AND next = %s")
        # In one order for all, so that nobody waits for each other.
        for partition, at in sorted(ends.items()):
            start = self._next[partition]
            self._connection.execute(known, [*partition, start, start])
            moved = self._connection.execute(move.format(self._tables.offsets), [at, *partition, start])
            if moved.rowcount != 1:
                raise Reopen("another writer has moved the offsets")

    def _rows(self, batch: Batch) -> pl.DataFrame:
        """Return a batch as PostgreSQL can read it from CSV."""
        table = batch.table()
        columns = []
        for name, kind in self._tables.columns.items():
            if kind == "jsonb":
                columns.append(pl.Series(name, [json.dumps(_plain(value)) for value in table[name].to_pylist()]))
                continue
            column = cast("pl.Series", pl.from_arrow(table[name]))
            columns.append(("\\x" + column.bin.encode("hex") if kind == "bytea" else column).alias(name))
        return pl.DataFrame(columns)

    def _write(self, rows: pl.DataFrame) -> None:
        if "trading_day" in rows.columns:
            self._tables.make_room(self._connection, set(rows["trading_day"].unique()))
        names = sql.SQL(", ").join(map(sql.Identifier, rows.columns))
        # As text: the server reads it about as fast as its binary format, and making that takes ten times as long.
        into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT CSV)").format(self._tables.rows, names)
        with self._connection.cursor() as cursor, cursor.copy(into) as copy:
            # With quotes around whatever is no number, nothing between two commas is NULL, and "" is a text.
            copy.write(rows.write_csv(include_header=False, quote_style="non_numeric"))

    def _blame(self, batch: Batch, error: psycopg.Error) -> NoReturn:
        """Find the record that the database does not take: it becomes a dead letter."""
        self._tables.forget_months()  # one may have been dropped meanwhile
        culprit: Record | None = None
        try:
            with self._connection.transaction(force_rollback=True):
                rows = self._rows(batch)
                for index, culprit in enumerate(batch.records):  # noqa: B007  # looked at when it has failed
                    self._write(rows[index])
        except (psycopg.DataError, psycopg.IntegrityError) as found:
            if culprit is not None:
                raise Reject(culprit, f"PostgreSQL does not take it: {words(found)}") from found
        except psycopg.Error as lost:
            self._reconnect(lost)
        finally:
            self._tables.forget_months()  # those just made were rolled back
        raise Retry(f"PostgreSQL: {words(error)}") from error

    def durable(self) -> Offsets:
        """Return what is committed."""
        return dict(self._next)

    def close(self) -> None:
        """Leave the server."""
        self._connection.close()

    def _reconnect(self, error: psycopg.Error) -> NoReturn:
        """Ask for the batch again, over a new connection: the old one may not know yet that it is broken."""
        self._tables.forget_months()
        try:
            self._connection.close()
            self._connection = self._connect()
        except psycopg.Error as again:
            error = again
        raise Retry(f"PostgreSQL: {words(error)}") from error


def _plain(value: Any) -> Any:
    """Return a map or a list as JSON can have it; bytes as base64."""
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):
        return {key: _plain(inner) for key, inner in value}
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def words(error: psycopg.Error) -> str:
    """Return what the server, or the library, has to say, in a line."""
    text = (error.diag.message_primary if error.diag else None) or str(error) or type(error).__name__
    return text.strip().partition("\n")[0]
