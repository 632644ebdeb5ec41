"""An archive in PostgreSQL: rows and offsets together, whoever else writes there and whatever breaks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bourse_consumers.api import Assignment, Batch, Consumer, Partition, Places, Reject, Reopen, Retry
from bourse_consumers.archive.care import Topics
from bourse_consumers.archive.files import Range
from bourse_consumers.postgres import proof
from bourse_consumers.postgres.command import archive_postgres
from bourse_consumers.postgres.sink import PostgresArchive, connect
from bourse_consumers.postgres.tables import Tables
from bourse_consumers.rows import to_table
from bourse_consumers.testing import ConsumerContract, Memory, run, trade
from bourse_producer.replay import Replay
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import PollMarker, TradeEvent
from bourse_schemas.topics import ALERTS, POLLS, TOPICS, TRADES
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
    return Batch(records, {TRADES_0: end}, decode=memory.decode)


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
    """As it stands."""
    manual = (Path(__file__).parents[2] / "docs" / "archive.md").read_text("utf-8")
    (example,) = re.findall(r"^```sql\n(.*?)^```$", manual, re.MULTILINE | re.DOTALL)
    memory = Memory()
    memory.append(trade(sequence=1, trading_day=date(2019, 8, 21)))
    run(archived(dsn), memory)
    assert len(rows(dsn, example)) == 1


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_every_topic_can_be_kept(dsn: str, topic: Any) -> None:
    """Maps and lists are JSON."""
    memory = Memory()
    memory.append(one(topic.event))
    run(PostgresArchive(dsn, topic, apply_schema=True), memory)
    table = topic.name.replace("-", "_")
    assert rows(dsn, f"SELECT _partition, _offset FROM bourse.{table}") == [(0, 0)]
    if table == "alerts":
        assert rows(dsn, "SELECT labels, channels FROM bourse.alerts") == [({"k": "x"}, ["x"])]


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
    heir.process(Batch(second, {other: 2}, decode=memory.decode))
    both = [*batch(memory, 0, 2).records, *second]
    with pytest.raises(Reopen):
        zombie.process(Batch(both, {TRADES_0: 2, other: 2}, decode=memory.decode))
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
        except BaseException as error:  # told by the test
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
    write = writer._write

    def break_off(found: pl.DataFrame) -> None:
        write(found)
        _terminate(dsn, writer._connection)

    monkeypatch.setattr(writer, "_write", break_off)
    with pytest.raises(Retry):
        writer.process(batch(memory, 0, 3))
    assert (rows(dsn), writer.durable()) == ([], {TRADES_0: 0})
    monkeypatch.setattr(writer, "_write", write)
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
        """Commit, and lose the connection before it is said."""
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


def test_a_row_the_database_does_not_take_is_a_dead_letter(dsn: str) -> None:
    """That one, and no other: text with a NUL, a key that is there already."""
    memory = Memory()
    memory.append(*events(2), trade(sequence=3, title="x\0y"), trade(sequence=1), *events(1, instrument="IRO1FOLD0001"))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    whole = batch(memory, 0, 5)
    for culprit, said in ((2, "0x00"), (3, "duplicate key")):
        with pytest.raises(Reject, match=said) as caught:
            writer.process(whole)
        assert caught.value.record.offset == culprit
        whole = Batch([r for r in whole.records if r is not caught.value.record], whole.next, decode=memory.decode)
    writer.process(whole)
    assert rows(dsn, "SELECT _offset FROM bourse.trades ORDER BY 1") == [0, 1, 4]


def test_months_are_partitions_made_on_demand(dsn: str) -> None:
    """December and January, and what lies between transactions that failed."""
    memory = Memory()
    for day in (date(2026, 12, 31), date(2027, 1, 1), date(2026, 11, 1)):
        memory.append(trade(sequence=1, trading_day=day))
    run(archived(dsn), memory)
    tables = rows(dsn, "SELECT relname FROM pg_class WHERE relname LIKE 'trades_2%' AND relkind = 'r' ORDER BY 1")
    assert tables == ["trades_2026_11", "trades_2026_12", "trades_2027_01"]


def test_tables_are_made_only_when_told_and_grow_with_a_release(dsn: str) -> None:
    """A column that came later is added; one of another type, or a newer version, is not touched."""
    with pytest.raises(ConfigurationError, match="--apply-schema makes it"):
        PostgresArchive(dsn, TRADES)
    archived(dsn).close()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP VIEW bourse.last_candle; DROP VIEW bourse.daily_bars")
        connection.execute("ALTER TABLE bourse.trades DROP COLUMN exchange_type")
        with pytest.raises(ConfigurationError, match="lacks exchange_type: --apply-schema adds"):
            PostgresArchive(dsn, TRADES)
        archived(dsn).close()
        PostgresArchive(dsn, TRADES).close()
        connection.execute("UPDATE bourse.meta SET value = '99'")
        with pytest.raises(ConfigurationError, match="newer version: upgrade"):
            PostgresArchive(dsn, TRADES)
        connection.execute("CREATE SCHEMA mine; CREATE TABLE mine.trades (volume text)")
        with pytest.raises(ConfigurationError, match="not ours: give another --schema"):
            PostgresArchive(dsn, TRADES, schema="mine")
        connection.execute("UPDATE bourse.meta SET value = '1'")
        connection.execute("CREATE TABLE bourse.alerts (alert_id bigint)")
        with pytest.raises(ConfigurationError, match="alerts lacks"):
            PostgresArchive(dsn, next(topic for topic in TOPICS if topic.name == "alerts"))


def call(*words: str, **variables: str) -> str:
    """Return what the command refuses, without a traceback."""
    result = CliRunner().invoke(archive_postgres, list(words), env=variables, standalone_mode=False)
    assert isinstance(result.exception, ConfigurationError), result.exception
    return str(result.exception)


def test_what_cannot_be_reached_is_named_at_start(dsn: str) -> None:
    """And no password with it."""
    secret = "never-to-be-shown"
    assert "PGPASSFILE" in call("--dsn", f"postgresql://me:{secret}@127.0.0.1/x")
    assert "no address such as" in call("--dsn", f"postgresql://me:{secret}@[h/x")
    away = call(BOURSE_DSN=f"postgresql://me:{secret}@127.0.0.1:9/x")
    assert "--dsn" in away
    assert secret not in away
    nobody = call(BOURSE_DSN=dsn.replace("postgres:@", f"nobody:{secret}@"))
    assert "nobody" in nobody
    assert secret not in nobody
    assert "does not exist" in call("--dsn", dsn.replace(dsn.partition("?")[0].rpartition("/")[2], "nowhere"))
    with psycopg.connect(dsn, autocommit=True) as connection:
        archived(dsn).close()
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on")
    assert "may only read" in call("--dsn", dsn)


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
def test_an_address_that_is_none_is_not_repeated(address: str) -> None:
    """It comes from the environment, password and all, and libpq's own words would quote it."""
    said = call(BOURSE_DSN=address)
    assert "no address such as" in said
    assert "hunter2" not in said


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
    assert "holds a password" in call("--dsn", f"postgresql://me@127.0.0.1:9/x?{secret}=hunter2")


def test_what_the_address_sets_goes_before_ours(dsn: str) -> None:
    """A slow server, or one that wants options of its own."""
    with connect(make_conninfo(dsn, options="-c statement_timeout=7s", connect_timeout=33)) as connection:
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
    """An operator has put it aside while the writer runs; no record is to blame."""
    memory = Memory()
    memory.append(*events(4))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 2))
    with psycopg.connect(dsn) as connection:
        connection.execute("DROP TABLE bourse.trades_2026_11")
    with pytest.raises(Retry):
        writer.process(batch(memory, 2, 4))
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
    """Another's table, tables of a newer version: they are as they were."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.alerts (id bigint)")
        with pytest.raises(ConfigurationError, match="give another --schema"):
            PostgresArchive(dsn, ALERTS, schema="public", apply_schema=True)
        assert columns(dsn, "public", "alerts") == ["id"]
        assert columns(dsn, "public", "meta") == []
        connection.execute("CREATE SCHEMA bourse")
        archived(dsn).close()
        # In a schema of ours as well.
        connection.execute("CREATE TABLE bourse.alerts (id bigint)")
        with pytest.raises(ConfigurationError, match=r"alerts lacks .* it is not ours"):
            PostgresArchive(dsn, ALERTS, apply_schema=True)
        assert columns(dsn, "bourse", "alerts") == ["id"]
        connection.execute("UPDATE bourse.meta SET value = '99'")
        connection.execute("DROP VIEW bourse.last_candle, bourse.daily_bars")
        connection.execute("ALTER TABLE bourse.trades DROP COLUMN exchange_type")
        with pytest.raises(ConfigurationError, match="newer version: upgrade"):
            archived(dsn)
        assert "exchange_type" not in columns(dsn, "bourse", "trades")


def test_a_user_needs_the_rights_of_a_writer(dsn: str) -> None:
    """It is said at start, one after the other; who has them can write."""
    archived(dsn).close()
    user = f"u{conninfo_to_dict(dsn)['dbname']}"
    theirs = make_conninfo(dsn, user=user)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {user} LOGIN")
        connection.execute(f"GRANT USAGE ON SCHEMA bourse TO {user}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA bourse TO {user}")
        for lacks, grant in (
            ("INSERT on .*trades", "GRANT INSERT ON bourse.trades TO {}"),
            ("INSERT on .*offsets", "GRANT INSERT ON bourse.offsets TO {}"),
            ("UPDATE on .*offsets", "GRANT UPDATE ON bourse.offsets TO {}"),
            ("the ownership of .*trades", "ALTER TABLE bourse.trades OWNER TO {}"),
            ("CREATE in its schema", "GRANT CREATE ON SCHEMA bourse TO {}"),
        ):
            with pytest.raises(ConfigurationError, match=f"lacks {lacks}"):
                PostgresArchive(theirs, TRADES)
            connection.execute(grant.format(user))
    memory = Memory()
    memory.append(*events(2))
    run(PostgresArchive(theirs, TRADES), memory)
    assert len(rows(dsn)) == 2


def test_the_proof_beside_a_writer(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while it looks is no fault; what the offsets do not know is one."""
    memory = Memory()
    memory.append(*events(6))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 3))
    look = proof._rows

    def look_slowly(*about: Any) -> Any:
        writer.process(batch(memory, 3, 6))
        return look(*about)

    monkeypatch.setattr(proof, "_rows", look_slowly)
    assert proof.verify(dsn, TRADES, schema="bourse", prefix="bourse", topics=None).faults == []
    monkeypatch.undo()
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE bourse.offsets SET next = 4")
    (fault,) = proof.verify(dsn, TRADES, schema="bourse", prefix="bourse", topics=None).faults
    assert fault["what"] == "2 rows outside the offsets that were written"


def test_what_the_topic_has_deleted_is_not_passed_over_in_silence(dsn: str) -> None:
    """It stops; told to, it goes on and leaves a record of the hole."""
    memory = Memory()
    memory.append(*events(8))
    writer = archived(dsn)
    writer.open(Assignment({TRADES_0: 0}))
    writer.process(batch(memory, 0, 3))
    later = Assignment({TRADES_0: 3}, first={TRADES_0: 5})
    with pytest.raises(ConfigurationError, match=r"offsets 3 to 4: .*--accept-loss"):
        writer.open(later)
    told = archived(dsn, accept_loss=True)
    assert told.open(later).offsets == {TRADES_0: 5}
    told.process(batch(memory, 5, 8))
    assert rows(dsn, "SELECT topic, partition, start, next FROM bourse.holes") == [("bourse.trades", 0, 3, 5)]
    assert rows(dsn, "SELECT _offset FROM bourse.trades ORDER BY 1") == [0, 1, 2, 5, 6, 7]
    assert archived(dsn).open(later).offsets == {TRADES_0: 8}
    assert proof.verify(dsn, TRADES, schema="bourse", prefix="bourse", topics=None).holes == 2


def test_two_prefixes_do_not_share_a_table(dsn: str) -> None:
    """The same offsets, and the same keys, would stand for different events."""
    memory = Memory()
    memory.append(*events(1))
    run(archived(dsn), memory)
    with pytest.raises(ConfigurationError, match=r"holds bourse\.trades, not demo\.trades: give another --schema"):
        archived(dsn).open(Assignment({Partition("demo.trades", 0): 0}))


def test_a_database_that_cannot_hold_persian_text(dsn: str) -> None:
    """Every record would be a dead letter."""
    name = f"l{conninfo_to_dict(dsn)['dbname']}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    with pytest.raises(ConfigurationError, match="ENCODING 'UTF8'"):
        archived(make_conninfo(dsn, dbname=name))


NO_TRADES = {"trade_count": 0, "trade_count_delta": 0}
DAMAGE = {
    "a row deleted": ("DELETE FROM bourse.trades WHERE _offset = 4", "sequence 6 where 5 is due"),
    "a value changed": ("UPDATE bourse.trades SET volume = volume + 1 WHERE _offset = 4", "volume is not the sum"),
    "a text changed": (
        "UPDATE bourse.trades SET title = 'x' WHERE _offset = 4",
        "title at offset 4 is 'x', on the topic",
    ),
    "a row doubled": (
        (
            "CREATE TEMP TABLE t AS SELECT * FROM bourse.trades WHERE _offset = 4; UPDATE t SET sequence = 9; "
            "INSERT INTO bourse.trades SELECT * FROM t"
        ),
        "offset 4 stands there twice",
    ),
    "rows nobody wrote": ("UPDATE bourse.offsets SET next = 6", "2 rows outside the offsets"),
    "rows that are not there": ("UPDATE bourse.offsets SET next = 9", "offset 8 is on the topic, and not here"),
    "a poll without a marker": ("DELETE FROM bourse.polls", "poll 1 has changes here and no marker"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(dsn: str, kind: str) -> None:
    """Whatever was deleted, changed or doubled, with the table and the range."""
    memory = Memory()
    for number in range(1, 9):
        memory.append(trade(sequence=number, volume=10 * number, volume_delta=10, value=0, value_delta=0, **NO_TRADES))
    memory.append(*(one(PollMarker, poll_sequence=n, outcome="PUBLISHED", opened=1, traded=1) for n in range(1, 9)))
    run(archived(dsn), memory)
    run(PostgresArchive(dsn, POLLS, apply_schema=True), memory)
    memory.append(trade(sequence=9))

    def of_topic(span: Range) -> Any:
        there = [record for record in memory.records[TRADES_0][span.start : span.next] if record is not None]
        return to_table([memory.decode(record) for record in there], Places.of(there)) if there else None

    topics = Topics({TRADES_0: 0}, of_topic)

    def faults(**more: Any) -> list[str]:
        return [fault["what"] for fault in _proof(dsn, topics=topics, **more).faults]

    assert faults() == []
    query, said = DAMAGE[kind]
    with psycopg.connect(dsn) as connection:
        connection.execute(query)
    found_faults = faults()
    assert any(said in what for what in found_faults), found_faults


def test_one_day_of_a_table(dsn: str) -> None:
    """The others are left alone."""
    memory = Memory()
    memory.append(*events(3), *events(2, trading_day=date(2026, 12, 1)))
    run(archived(dsn), memory)
    report = _proof(dsn, topics=None, day=date(2026, 12, 1))
    assert (report.rows, report.days) == (2, 1)
    with pytest.raises(ConfigurationError, match="nothing of 2020-01-01"):
        _proof(dsn, topics=None, day=date(2020, 1, 1))
    with pytest.raises(ConfigurationError, match="polls has no trading days"):
        proof.verify(dsn, POLLS, schema="bourse", prefix="bourse", topics=None, day=date(2026, 12, 1))


def _proof(dsn: str, **more: Any) -> Any:
    return proof.verify(dsn, TRADES, schema="bourse", prefix="bourse", **more)


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
    with pytest.raises(ConfigurationError, match="may only read"):
        PostgresArchive(dsn, TRADES)
    may_write("off")
    with pytest.raises(Retry):
        writer.process(batch(memory, 1, 2))
    writer.process(batch(memory, 1, 2))
    assert len(rows(dsn)) == 2
