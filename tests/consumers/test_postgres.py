"""An archive in PostgreSQL: rows and offsets together, whatever breaks, also with other writers."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bourse_cli.health import Monitor
from bourse_consumers.api import Assignment, Batch, Consumer, Partition, Places, Reject, Reopen, Retry
from bourse_consumers.archive.proof import Kept, Report
from bourse_consumers.archive_cli import archive
from bourse_consumers.postgres import proof
from bourse_consumers.postgres.command import archive_postgres
from bourse_consumers.postgres.sink import PostgresArchive, connect, transaction
from bourse_consumers.postgres.tables import Tables
from bourse_consumers.rows import to_table
from bourse_consumers.testing import ConsumerContract, Memory, marker, run, trade
from bourse_producer.replay import Replay
from bourse_sandbox.kafka import free_port
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import spawn
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.topics import ALERTS, CANDLES, POLLS, TOPICS, TRADES, Topic
from tests.strategies import one

TRADES_0 = Partition("bourse.trades", 0)


def rows(dsn: str, query: str = "SELECT event_id FROM bourse.trades ORDER BY _partition, _offset") -> list[Any]:
    """Return what a query finds: the first column, or whole rows where there are more."""
    with psycopg.connect(dsn) as connection:
        found = connection.execute(query).fetchall()
    return [row[0] if len(row) == 1 else row for row in found]


def archived(dsn: str, **options: Any) -> PostgresArchive:
    """Return an archive of trades."""
    return PostgresArchive(dsn, TRADES, apply_schema=True, **options)


def events(count: int, **fields: Any) -> list[TradeEvent]:
    """Return events of one instrument."""
    return [trade(sequence=number, **fields) for number in range(1, count + 1)]


def batch(memory: Memory, begin: int, end: int) -> Batch:
    """Return the records of a range."""
    records = [record for record in memory.records[TRADES_0][begin:end] if record is not None]
    return Batch(records, {TRADES_0: end}, memory.decoders)


def kept(memory: Memory, topic: Topic = TRADES) -> Kept:
    """Return what the topic in memory still has."""
    name = topic.full_name()
    logs = {place.number: log for place, log in memory.records.items() if place.topic == name}

    def of_topic(number: int, start: int, end: int) -> Iterator[Any]:
        if there := [record for record in logs[number][start:end] if record is not None]:
            yield to_table([memory.decoders.event(record) for record in there], Places.of(there))

    return Kept({number: (0, len(log)) for number, log in logs.items()}, of_topic)


def verify(dsn: str, memory: Memory | None = None) -> Report:
    """Verify the table of trades, against the topic in memory if it is given."""
    of_topic = (lambda topic, _: kept(memory, topic)) if memory else None
    (report,) = proof.verify(dsn, "trades", schema="bourse", prefix="bourse", kept=of_topic)
    return report


class TestContract(ConsumerContract):
    """Every event is in the table once, whatever is stopped, killed or moved."""

    @pytest.fixture(autouse=True)
    def _reach(self, dsn: str) -> None:
        self.dsn = dsn

    def make(self, folder: Path) -> Consumer:
        self.schema = f"s{abs(hash(folder))}"
        return archived(self.dsn, schema=self.schema)

    def events(self) -> Sequence[TradeEvent]:
        return [*events(4), *events(3, trading_day=date(2026, 12, 1))]

    def outcome(self, memory: Memory, folder: Path) -> object:
        return rows(self.dsn, f"SELECT event_id FROM s{abs(hash(folder))}.trades ORDER BY event_id")


def test_a_real_day(dsn: str) -> None:
    """Every value as it was, and the views agree with the exchange."""
    replay = Replay()
    replay.day(REAL_DAY)
    memory = Memory(markers=True)
    memory.append(*replay.events)
    run(archived(dsn), memory, batch_size=2_000)
    assert rows(dsn) == [event.event_id for event in replay.events]
    names = [name for name in TradeEvent.__struct_fields__ if name != "op"]
    some = rows(dsn, f"SELECT {', '.join(names)} FROM bourse.trades WHERE _offset = 20_000")
    expected = replay.events[10_000]
    assert some == [tuple(getattr(expected, name) for name in names)]
    last = {event.instrument: event for event in replay.events}
    assert dict(rows(dsn, "SELECT instrument, last_price FROM bourse.last_candle")) == {
        code: event.last_price for code, event in last.items()
    }
    bars = rows(dsn, "SELECT instrument, open, high, low, volume, trade_count FROM bourse.daily_bars")
    assert {bar[0]: bar[1:] for bar in bars} == {
        code: (event.open_price, event.high_price, event.low_price, event.volume, event.trade_count)
        for code, event in last.items()
    }
    assert rows(dsn, "SELECT first, next FROM bourse.offsets") == [(0, 2 * len(replay.events))]


def test_the_example_in_the_manual_runs(dsn: str) -> None:
    """Exactly as printed."""
    manual = (Path(__file__).parents[2] / "docs" / "archive.md").read_text("utf-8")
    (example,) = re.findall(r"^```sql\n(.*?)^```$", manual, re.MULTILINE | re.DOTALL)
    memory = Memory()
    memory.append(trade(sequence=1, trading_day=date(2019, 8, 21)))
    run(archived(dsn), memory)
    assert len(rows(dsn, example)) == 1


def different(dsn: str, topic: Topic, memory: Memory) -> list[str]:
    """Return the findings of rows that differ from the topic."""
    of_topic = lambda each, _: kept(memory, each)  # noqa: E731
    (report,) = proof.verify(dsn, topic.name, schema="bourse", prefix="bourse", kept=of_topic)
    return [each["what"] for each in report.findings if "different" in each["what"]]


@pytest.mark.parametrize("topic", [each for each in TOPICS if each is not CANDLES], ids=lambda topic: topic.name)
def test_every_topic_can_be_archived(dsn: str, topic: Any) -> None:
    """Maps and lists are JSON, and the proof compares them with the topic."""
    memory = Memory()
    memory.append(one(topic.event))
    run(PostgresArchive(dsn, topic, apply_schema=True), memory)
    table = topic.name.replace("-", "_")
    assert rows(dsn, f"SELECT _partition, _offset FROM bourse.{table}") == [(0, 0)]
    if table == "alerts":
        assert rows(dsn, "SELECT labels, channels FROM bourse.alerts") == [({"k": "x"}, ["x"])]
    assert different(dsn, topic, memory) == []
    changed = {"alerts": 'labels = \'{"k": "y"}\'', "dead-letters": "original_headers = '{}'"}.get(topic.name)
    if changed:
        with psycopg.connect(dsn) as connection:
            connection.execute(f"UPDATE bourse.{table} SET {changed}")
        assert different(dsn, topic, memory) == ["rows different from the topic: 1"]


@pytest.fixture
def pooled(dsn: str, demand: Callable[[str], None], tmp_path: Path, wait_for: Callable[..., Any]) -> Iterator[str]:
    """Run PgBouncer in transaction mode, which shares two connections; return its address."""
    demand("pgbouncer")
    parts, port = conninfo_to_dict(dsn), free_port()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": 2,
    }
    config = tmp_path / "pgbouncer.ini"
    database = f"{parts['dbname']} = host={parts['host']} user={parts['user']}"
    lines = [f"{name} = {value}" for name, value in settings.items()]
    config.write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines]), "utf-8")
    # It refuses to run as root, and the socket is the server's own.
    user = ["-u", Path(str(parts["host"])).owner()] if os.getuid() == 0 else []
    with spawn(["pgbouncer", *user, config], stdout=tmp_path / "log", stderr=tmp_path / "log") as child:
        address = f"postgresql://anyone@127.0.0.1:{port}/{parts['dbname']}"

        def ready() -> bool:
            assert child.poll() is None, child.log_tail()
            with suppress(psycopg.OperationalError):
                connect(address).close()
                return True
            return False

        wait_for(ready, 30)
        yield address


def test_through_a_pooler_in_transaction_mode(dsn: str, pooled: str) -> None:
    """Two writers whose transactions alternate between two servers' connections; and the proof."""
    memory = Memory()
    memory.append(*events(40), trade(sequence=41, title="x\0y"))
    writers = [archived(pooled) for _ in range(3)]
    at = writers[0].open(Assignment({TRADES_0: 0})).offsets[TRADES_0]
    for number, end in enumerate(range(5, 41, 5)):
        writer = writers[number % 3]
        assert writer.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: at}
        writer.process(batch(memory, at, end))
        at = end
    with pytest.raises(Reject, match="0x00"):
        writer.process(batch(memory, 40, 41))
    assert len(rows(dsn)) == 40
    memory.records[TRADES_0].pop()
    assert verify(pooled, memory).findings == []


def test_readiness_names_the_database_until_it_is_back(dsn: str) -> None:
    """Not Kafka: /readyz has the server's reason, and becomes ready with the next batch."""
    memory = Memory()
    memory.append(*events(2))
    writer = archived(dsn)
    writer.monitor = monitor = Monitor("archive")
    monitor.unready("starting", None)
    writer.open(Assignment({TRADES_0: 0}))
    _terminate(dsn, writer._connection)
    with pytest.raises(Retry, match="PostgreSQL: terminating connection"):
        writer.process(batch(memory, 0, 2))
    assert "PostgreSQL: terminating connection" in monitor.reasons()["database"]
    writer.process(batch(memory, 0, 2))
    assert monitor.reasons() == {}


def test_a_database_that_is_away_at_start_is_waited_for(dsn: str) -> None:
    """As Kafka is; it is checked as soon as it answers. No password is shown."""
    away, secret = free_port(), "never-to-be-shown"
    writer = PostgresArchive(f"postgresql://me:{secret}@127.0.0.1:{away}/x", TRADES)
    writer.monitor = monitor = Monitor("archive")
    with pytest.raises(Retry, match="Connection refused"):
        writer.open(Assignment({TRADES_0: 0}))
    assert "Connection refused" in monitor.reasons()["database"]
    assert secret not in str(monitor.reasons())
    writer.close()
    writer._dsn = dsn
    with pytest.raises(ConfigurationError, match="no table of trades: add --apply-schema"):
        writer.open(Assignment({TRADES_0: 0}))
    archived(dsn).close()
    assert writer.open(Assignment({TRADES_0: 7}, first={TRADES_0: 7})).offsets == {TRADES_0: 7}
    assert "database" not in monitor.reasons()


@pytest.mark.parametrize(
    ("message", "waits"),
    [
        ("connection failed: FATAL:  the database system is starting up", True),
        ("connection failed: FATAL:  sorry, too many clients already", True),
        ("failed to resolve host 'db': [Errno -2] Name or service not known", True),
        ("connection timeout expired", True),
        ('connection failed: FATAL:  password authentication failed for user "me"', False),
        ('invalid sslmode value: "x"', False),
        ('could not open certificate file "x": No such file or directory', False),
    ],
)
def test_what_the_operator_has_to_change_is_not_waited_for(
    message: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the messages of libpq."""

    def connect(_: str) -> None:
        raise psycopg.OperationalError(message)

    monkeypatch.setattr("bourse_consumers.postgres.sink.connect", connect)
    with nullcontext() if waits else pytest.raises(ConfigurationError, match="--dsn"):
        PostgresArchive("postgresql://", TRADES)


def test_of_two_writers_at_the_same_place_one_wins(dsn: str) -> None:
    """The other one begins again where the first is, and writes nothing of its batch."""
    memory = Memory()
    memory.append(*events(4))
    zombie, heir = archived(dsn), archived(dsn)
    for writer in (zombie, heir):
        assert writer.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: 0}
    heir.process(batch(memory, 0, 3))
    with pytest.raises(Reopen):
        zombie.process(batch(memory, 0, 2))
    assert zombie.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: 3}
    zombie.process(batch(memory, 3, 4))
    assert zombie.durable() == {TRADES_0: 4}
    assert len(rows(dsn)) == 4


def test_what_was_moved_with_a_fenced_partition_is_not_believed(dsn: str) -> None:
    """Two partitions, one of them taken by another: neither is skipped."""
    other = Partition("bourse.trades", 1)
    memory = Memory(partitions=2)
    memory.append(*events(2))
    memory.append(*events(2, instrument="IRO1FOLD0001"), partition=1)
    zombie, heir = archived(dsn), archived(dsn)
    for writer in (zombie, heir):
        writer.open(Assignment({TRADES_0: 0, other: 0}))
    second = [record for record in memory.records[other] if record is not None]
    heir.process(Batch(second, {other: 2}, memory.decoders))
    both = [*batch(memory, 0, 2).records, *second]
    with pytest.raises(Reopen):
        zombie.process(Batch(both, {TRADES_0: 2, other: 2}, memory.decoders))
    assert zombie.open(Assignment({TRADES_0: 0, other: 0})).offsets == {TRADES_0: 0, other: 2}


def test_writers_that_fight_double_and_lose_nothing(dsn: str) -> None:
    """At the same time, over and over."""
    memory = Memory()
    memory.append(*events(200))
    failures: list[BaseException] = []

    def fight() -> None:
        try:
            writer = archived(dsn)
            at = writer.open(Assignment({TRADES_0: 0})).offsets[TRADES_0]
            while at < 200:
                try:
                    writer.process(batch(memory, at, at + 7))
                    at = min(at + 7, 200)
                except Reopen:
                    at = writer.open(Assignment({TRADES_0: 0})).offsets[TRADES_0]
            writer.close()
        except BaseException as error:  # raised by the test
            failures.append(error)

    threads = [threading.Thread(target=fight) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert rows(dsn) == [event.event_id for event in events(200)]


def _terminate(dsn: str, connection: Any) -> None:
    with psycopg.connect(dsn) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])


def test_a_connection_that_breaks_before_the_commit(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the batch is there; it comes again, over a new connection."""
    memory = Memory()
    memory.append(*events(3))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    copy = writer._copy

    def break_off(found: pl.DataFrame) -> None:
        copy(found)
        _terminate(dsn, writer._connection)

    monkeypatch.setattr(writer, "_copy", break_off)
    with pytest.raises(Retry):
        writer.process(batch(memory, 0, 3))
    assert (rows(dsn), writer.durable()) == ([], {TRADES_0: 0})
    monkeypatch.setattr(writer, "_copy", copy)
    writer.process(batch(memory, 0, 3))
    assert (len(rows(dsn)), writer.durable()) == (3, {TRADES_0: 3})


def test_a_commit_whose_answer_is_lost_is_not_repeated(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it went through is read back, not guessed."""
    memory = Memory()
    memory.append(*events(3))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))

    @contextmanager
    def deaf() -> Iterator[None]:
        """Commit, and lose the connection before the answer arrives."""
        with psycopg.Connection.transaction(writer._connection):
            yield
        _terminate(dsn, writer._connection)
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(writer._connection, "transaction", deaf)
    with pytest.raises(Retry):
        writer.process(batch(memory, 0, 3))
    monkeypatch.undo()
    writer.process(batch(memory, 0, 3))
    assert (len(rows(dsn)), writer.durable()) == (3, {TRADES_0: 3})


def test_rows_that_the_database_refuses_are_found_in_one_pass(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is a dead letter, no other row is; the proof knows that their offsets have no rows."""
    memory = Memory()
    bad = {17, 500, 501, 999}
    memory.append(*(trade(sequence=n + 1, title="x\0y" if n in bad else "x") for n in range(1000)))
    writer = archived(dsn)
    copies = 0
    copy = writer._copy

    def count(found: pl.DataFrame) -> None:
        nonlocal copies
        copies += 1
        copy(found)

    monkeypatch.setattr(writer, "_copy", count)
    run(writer, memory, batch_size=1000)
    letters: list[Any] = [emit.event for emit in memory.emitted]
    assert [letter.original_offset for letter in letters] == sorted(bad)
    assert all("PostgreSQL refuses it" in letter.message and "0x00" in letter.message for letter in letters)
    assert rows(dsn, "SELECT _offset FROM bourse.trades ORDER BY 1") == [n for n in range(1000) if n not in bad]
    # A bisection for four rows, and the final write.
    assert copies < 4 * 2 * 11 + 2
    report = verify(dsn, memory)
    assert (report.findings, report.lost, report.rows) == ([], 4, 996)


def test_the_same_event_twice_is_not_an_error(dsn: str) -> None:
    """A topic that has an event twice, in one batch or in two, does not make a dead letter."""
    memory = Memory()
    memory.append(*events(3), trade(sequence=2), trade(sequence=4), trade(sequence=1))
    run(archived(dsn), memory, batch_size=4)
    assert memory.emitted == []
    assert rows(dsn, "SELECT sequence, _offset FROM bourse.trades ORDER BY 2") == [(1, 0), (2, 1), (3, 2), (4, 4)]
    report = verify(dsn, memory)
    assert (report.findings, report.lost) == ([], 2)


def test_rows_are_refused_again_after_a_new_assignment(dsn: str) -> None:
    """What was known of a batch is forgotten when the partitions are assigned again."""
    memory = Memory()
    memory.append(trade(sequence=1), trade(sequence=2, title="x\0y"))
    writer = archived(dsn)
    for _ in range(2):
        writer.open(Assignment({TRADES_0: 0}))
        with pytest.raises(Reject, match="0x00"):
            writer.process(batch(memory, 0, 2))
    assert rows(dsn) == []


def test_months_are_partitions_made_on_demand(dsn: str) -> None:
    """December, January and November."""
    memory = Memory()
    for day in (date(2026, 12, 31), date(2027, 1, 1), date(2026, 11, 1)):
        memory.append(trade(sequence=1, trading_day=day))
    run(archived(dsn), memory)
    tables = rows(dsn, "SELECT relname FROM pg_class WHERE relname LIKE 'trades_2%' AND relkind = 'r' ORDER BY 1")
    assert tables == ["trades_2026_11", "trades_2026_12", "trades_2027_01"]


def test_tables_are_created_only_on_request_and_grow_with_a_release(dsn: str) -> None:
    """A column that came later is added; one of another type is not touched."""
    with pytest.raises(ConfigurationError, match="no table of trades: add --apply-schema"):
        PostgresArchive(dsn, TRADES)
    archived(dsn).close()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP VIEW bourse.last_candle; DROP VIEW bourse.daily_bars")
        connection.execute("ALTER TABLE bourse.trades DROP COLUMN exchange_type")
        with pytest.raises(ConfigurationError, match="lacks exchange_type: add --apply-schema"):
            PostgresArchive(dsn, TRADES)
        archived(dsn).close()
        PostgresArchive(dsn, TRADES).close()
        connection.execute("CREATE SCHEMA mine; CREATE TABLE mine.trades (volume text)")
        with pytest.raises(ConfigurationError, match="it is another table: use another --schema"):
            PostgresArchive(dsn, TRADES, schema="mine")
        connection.execute("CREATE TABLE bourse.alerts (alert_id bigint)")
        with pytest.raises(ConfigurationError, match="alerts lacks"):
            PostgresArchive(dsn, ALERTS)


def call(*words: str, **variables: str) -> str:
    """Return what the command refuses, without a traceback."""
    result = CliRunner().invoke(archive_postgres, list(words), env=variables, standalone_mode=False)
    assert isinstance(result.exception, ConfigurationError), result.exception
    return str(result.exception)


def test_what_cannot_be_reached_is_named_at_start(dsn: str) -> None:
    """And no password with it."""
    secret = "never-to-be-shown"
    assert "PGPASSFILE" in call("--dsn", f"postgresql://me:{secret}@127.0.0.1/x")
    assert "is not an address such as" in call("--dsn", f"postgresql://me:{secret}@[h/x")
    nobody = call(BOURSE_DSN=dsn.replace("postgres:@", f"nobody:{secret}@"))
    assert "nobody" in nobody
    assert secret not in nobody
    assert "does not exist" in call("--dsn", dsn.replace(dsn.partition("?")[0].rpartition("/")[2], "nowhere"))
    with psycopg.connect(dsn, autocommit=True) as connection:
        archived(dsn).close()
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on")
    assert "is read-only" in call("--dsn", dsn)


def test_the_columns_are_those_of_the_schema(dsn: str) -> None:
    """Exact types, instants with their zone."""
    with connect(dsn) as connection:
        tables = Tables(TRADES, "bourse")
        tables.apply(connection)
        assert tables._found(connection) == tables.columns
    assert tables.columns["value"] == "bigint"
    assert tables.columns["traded_at"] == "timestamp with time zone"
    memory = Memory()
    memory.append(trade(sequence=1, traded_at=datetime(2026, 11, 23, 5, 30, 0, 123_000, UTC), value=2**62))
    run(archived(dsn), memory)
    assert rows(dsn, "SELECT traded_at, value FROM bourse.trades") == [
        (datetime(2026, 11, 23, 5, 30, 0, 123_000, UTC), 2**62)
    ]


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:hunter2@[h/x",
        "postgresql://me:hunter2%zz@h/x",
        "postgresql://me:x@hunter2@h/x",
        "host=h user=me password=a hunter2",
    ],
)
def test_an_invalid_address_is_not_quoted(address: str) -> None:
    """It comes from the environment, password and all, and libpq's own message would quote it."""
    message = call(BOURSE_DSN=address)
    assert "is not an address such as" in message
    assert "hunter2" not in message


def test_an_address_may_be_left_to_the_environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with any client of PostgreSQL."""
    parts = conninfo_to_dict(dsn)
    for variable, part in (("PGHOST", "host"), ("PGUSER", "user"), ("PGDATABASE", "dbname")):
        monkeypatch.setenv(variable, str(parts[part]))
    with connect("postgresql://") as connection:
        assert connection.info.dbname == parts["dbname"]


@pytest.mark.parametrize("secret", ["password", "sslpassword"])
def test_no_secret_on_the_command_line(secret: str) -> None:
    """Others can see it there."""
    assert "contains a password" in call("--dsn", f"postgresql://me@127.0.0.1:9/x?{secret}=hunter2")


def test_what_the_address_sets_takes_precedence(dsn: str) -> None:
    """A slow server, or one that wants options of its own."""
    slow = make_conninfo(dsn, options="-c statement_timeout=7s", connect_timeout=33)
    with connect(slow) as connection, transaction(connection):
        assert connection.execute("SHOW statement_timeout").fetchone() == ("7s",)
        assert connection.execute("SHOW lock_timeout").fetchone() == ("10s",)
        assert connection.info.get_parameters()["connect_timeout"] == "33"


def test_days_at_the_ends_of_time(dsn: str) -> None:
    """Odd as they are, they are days."""
    memory = Memory()
    memory.append(*(trade(sequence=1, trading_day=day) for day in (date(9999, 12, 31), date.min)))
    run(archived(dsn), memory)
    assert rows(dsn, "SELECT _offset FROM bourse.trades ORDER BY trading_day") == [1, 0]


def test_a_month_that_is_dropped_is_made_again(dsn: str) -> None:
    """An operator has dropped it while the writer runs; no record is rejected."""
    memory = Memory()
    memory.append(*events(4))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 2))
    with psycopg.connect(dsn) as connection:
        connection.execute("DROP TABLE bourse.trades_2026_11")
    writer.process(batch(memory, 2, 4))
    assert rows(dsn, "SELECT _offset FROM bourse.trades ORDER BY 1") == [2, 3]


def test_a_month_can_be_made_while_somebody_reads(dsn: str) -> None:
    """A report or a dump that takes an hour stops nobody."""
    memory = Memory()
    memory.append(*events(2), trade(sequence=1, trading_day=date(2026, 12, 1)))
    patient = make_conninfo(dsn, options="-c lock_timeout=1s")
    writer = archived(patient)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 2))
    with psycopg.connect(dsn) as reader:
        reader.execute("SELECT count(*) FROM bourse.trades")
        writer.process(batch(memory, 2, 3))
    assert len(rows(dsn)) == 3


def columns(dsn: str, schema: str, table: str) -> list[str]:
    """Return the columns of a table."""
    where = f"table_schema = '{schema}' AND table_name = '{table}'"
    return rows(dsn, f"SELECT column_name FROM information_schema.columns WHERE {where}")


def test_apply_schema_touches_nothing_that_it_refuses(dsn: str) -> None:
    """Another's tables are as they were."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.alerts (id bigint)")
        with pytest.raises(ConfigurationError, match="use another --schema"):
            PostgresArchive(dsn, ALERTS, schema="public", apply_schema=True)
        assert columns(dsn, "public", "alerts") == ["id"]
        assert columns(dsn, "public", "offsets") == []
        connection.execute("CREATE SCHEMA bourse")
        archived(dsn).close()
        # In a schema of ours as well.
        connection.execute("CREATE TABLE bourse.alerts (id bigint)")
        with pytest.raises(ConfigurationError, match=r"alerts lacks .* it is another table"):
            PostgresArchive(dsn, ALERTS, apply_schema=True)
        assert columns(dsn, "bourse", "alerts") == ["id"]


def test_a_user_needs_the_rights_of_a_writer(dsn: str) -> None:
    """Missing ones are named at start, one after the other; a user that has them can write."""
    archived(dsn).close()
    user = f"u{conninfo_to_dict(dsn)['dbname']}"
    theirs = make_conninfo(dsn, user=user)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {user} LOGIN")
        connection.execute(f"GRANT USAGE ON SCHEMA bourse TO {user}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA bourse TO {user}")
        for lacks, grant in (
            ("permission denied for table offsets", "GRANT INSERT ON bourse.offsets TO {}"),
            ("permission denied for table offsets", "GRANT UPDATE ON bourse.offsets TO {}"),
            ("permission denied for table holes", "GRANT INSERT ON bourse.holes TO {}"),
            ("permission denied for schema bourse", "GRANT CREATE ON SCHEMA bourse TO {}"),
            ("must be owner of table trades", "ALTER TABLE bourse.trades OWNER TO {}"),
        ):
            with pytest.raises(ConfigurationError, match=f"--dsn: {lacks}"):
                PostgresArchive(theirs, TRADES)
            connection.execute(grant.format(user))
    memory = Memory()
    memory.append(*events(2))
    run(PostgresArchive(theirs, TRADES), memory)
    assert len(rows(dsn)) == 2


def test_the_proof_while_a_writer_works(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while it checks is not a finding; rows that the offsets do not cover are."""
    memory = Memory()
    memory.append(*events(6))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 3))
    parts = proof._parts

    def slow_parts(*about: Any) -> Any:
        writer.process(batch(memory, 3, 6))
        return parts(*about)

    monkeypatch.setattr(proof, "_parts", slow_parts)
    report = verify(dsn, memory)
    assert (report.findings, report.behind) == ([], 3)
    monkeypatch.undo()
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE bourse.offsets SET next = 4")
    (finding,) = verify(dsn).findings
    assert finding["what"] == "rows outside the committed offsets: 2"


def test_what_the_topic_has_deleted_is_not_skipped_silently(dsn: str) -> None:
    """It stops; with --accept-loss it goes on and records the hole."""
    memory = Memory()
    memory.append(*events(8))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 3))
    later = Assignment({TRADES_0: 3}, first={TRADES_0: 5})
    with pytest.raises(ConfigurationError, match=r"offsets 3 to 4 are deleted .*--accept-loss"):
        writer.open(later)
    writer = archived(dsn, accept_loss=True)
    assert writer.open(later).offsets == {TRADES_0: 5}
    writer.process(batch(memory, 5, 8))
    assert rows(dsn, "SELECT topic, partition, start, next FROM bourse.holes") == [("bourse.trades", 0, 3, 5)]
    assert rows(dsn, "SELECT _offset FROM bourse.trades ORDER BY 1") == [0, 1, 2, 5, 6, 7]
    assert archived(dsn).open(later).offsets == {TRADES_0: 8}
    report = verify(dsn)
    assert (report.lost, report.findings) == (2, [])


def test_two_prefixes_do_not_share_a_table(dsn: str) -> None:
    """The same offsets, and the same keys, would be of different events."""
    memory = Memory()
    memory.append(*events(1))
    run(archived(dsn), memory)
    with pytest.raises(ConfigurationError, match=r"holds bourse\.trades, not demo\.trades: use another --schema"):
        archived(dsn).open(Assignment({Partition("demo.trades", 0): 0}))


def test_a_database_that_cannot_hold_persian_text(dsn: str) -> None:
    """Every record would be a dead letter."""
    name = f"l{conninfo_to_dict(dsn)['dbname']}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    with pytest.raises(ConfigurationError, match="create it with UTF8"):
        archived(make_conninfo(dsn, dbname=name))


def test_the_command_verifies_all_tables(dsn: str) -> None:
    """As of a folder; and it prints that polls were not compared if they have no table."""
    words = ["verify", "--to", dsn, "--no-topic"]
    nothing = CliRunner().invoke(archive, words, standalone_mode=False)
    assert "has no table of a topic" in str(nothing.exception)
    memory = Memory()
    memory.append(*events(2))
    run(archived(dsn), memory)
    alone = CliRunner().invoke(archive, words)
    assert "NOT CHECKED: whether each poll has its rows: there is no table of polls" in alone.stdout
    PostgresArchive(dsn, POLLS, apply_schema=True).close()
    both = CliRunner().invoke(archive, [*words, "--json"])
    assert {json.loads(line)["topic"] for line in both.stdout.splitlines()} == {"bourse.polls", "bourse.trades"}


DAMAGE = {
    "rows deleted": ("DELETE FROM bourse.trades WHERE _offset = 4", "rows missing that the topic has: 1"),
    "the last rows deleted": ("DELETE FROM bourse.trades WHERE _offset > 4", "rows missing that the topic has: 3"),
    "a partition deleted": (
        "DELETE FROM bourse.trades WHERE _partition = 1; DELETE FROM bourse.offsets WHERE partition = 1",
        "partition 1 missing, rows on the topic: 8",
    ),
    "the rows of a partition deleted": (
        "DELETE FROM bourse.trades WHERE _partition = 1",
        "rows missing that the topic has: 8",
    ),
    "everything deleted": (
        "DELETE FROM bourse.trades; DELETE FROM bourse.offsets",
        "archive empty, rows on the topic: 16",
    ),
    "the offsets deleted": ("DELETE FROM bourse.offsets", "rows outside the committed offsets: 8"),
    "a value changed": ("UPDATE bourse.trades SET title = 'x' WHERE _offset = 4", "rows different from the topic: 1"),
    "a row doubled": (
        (
            "CREATE TEMP TABLE t AS SELECT * FROM bourse.trades WHERE _offset = 4 AND _partition = 0; "
            "UPDATE t SET sequence = 9; INSERT INTO bourse.trades SELECT * FROM t"
        ),
        "rows stored twice: 2",
    ),
}
FOR_EVER = {
    "rows deleted": ("DELETE FROM bourse.trades WHERE _offset = 4", "rows out of the sequence of their instrument: 1"),
    "a total changed": (
        "UPDATE bourse.trades SET volume = volume + 1 WHERE _offset = 4",
        "rows whose totals are not the sum of the deltas: 2",
    ),
    "the first poll deleted": (
        "DELETE FROM bourse.polls WHERE poll_sequence = 1",
        "polls without the rows that their marker counts: 1",
    ),
    "a poll without its rows": (
        "DELETE FROM bourse.trades WHERE poll_sequence = 5",
        "5 has 0 of 0 opened, 0 of 2 traded",
    ),
}


@pytest.mark.parametrize(("kind", "with_topic"), [*((k, True) for k in DAMAGE), *((k, False) for k in FOR_EVER)])
def test_damage_is_found_and_named(dsn: str, kind: str, with_topic: bool) -> None:
    """Whatever was deleted, changed or doubled: while the topic has it, and after it."""
    memory = Memory(partitions=2)
    for number in range(1, 9):
        both = [trade(sequence=number, instrument=f"IRO1MADN000{partition}") for partition in range(2)]
        for partition, event in enumerate(both):
            memory.append(event, partition=partition)
        memory.append(marker(*both))
    run(archived(dsn), memory)
    run(PostgresArchive(dsn, POLLS, apply_schema=True), memory)
    found = memory if with_topic else None
    assert verify(dsn, found).findings == []
    query, message = (DAMAGE if with_topic else FOR_EVER)[kind]
    with psycopg.connect(dsn) as connection:
        connection.execute(query)
    findings = [each["what"] for each in verify(dsn, found).findings]
    assert any(message in what for what in findings), findings


def test_a_database_that_becomes_read_only_is_waited_for(dsn: str) -> None:
    """After a failover, or on a full disk: nothing is taken for written, and it goes on by itself."""
    memory = Memory()
    memory.append(*events(2))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 1))
    name = conninfo_to_dict(dsn)["dbname"]
    server = make_conninfo(dsn, dbname="postgres")

    def may_write(yes: str) -> None:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {yes}")
        _terminate(dsn, writer._connection)

    may_write("on")
    for _ in range(2):
        with pytest.raises(Retry, match="PostgreSQL"):
            writer.process(batch(memory, 1, 2))
    assert writer.durable() == {TRADES_0: 1}
    with pytest.raises(ConfigurationError, match="is read-only"):
        PostgresArchive(dsn, TRADES)
    may_write("off")
    with pytest.raises(Retry):
        writer.process(batch(memory, 1, 2))
    writer.process(batch(memory, 1, 2))
    assert len(rows(dsn)) == 2
