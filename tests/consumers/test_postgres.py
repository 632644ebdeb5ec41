"""An archive in PostgreSQL: rows and offsets together, whoever else writes there and whatever breaks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from bourse_consumers.api import Assignment, Batch, Consumer, Partition, Reject, Retry, Rewind
from bourse_consumers.postgres.plugin import archive_postgres
from bourse_consumers.postgres.sink import PostgresArchive, connect
from bourse_consumers.postgres.tables import Tables
from bourse_consumers.testing import ConsumerContract, Memory, run, trade
from bourse_producer.replay import Replay
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.topics import TOPICS, TRADES
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
    """The other one rewinds to where the first is, and writes nothing of its batch."""
    memory = Memory()
    memory.append(*events(4))
    zombie, heir = archived(dsn), archived(dsn)
    for writer in (zombie, heir):
        assert writer.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: 0}
    heir.process(batch(memory, 0, 3))
    with pytest.raises(Rewind) as caught:
        zombie.process(batch(memory, 0, 2))
    assert caught.value.offsets == {TRADES_0: 3}
    assert zombie.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: 3}
    zombie.process(batch(memory, 3, 4))
    assert zombie.durable() == {TRADES_0: 4}
    assert len(rows(dsn)) == 4


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
                except Rewind as error:
                    at = error.offsets[TRADES_0]
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

    def break_off(found: Sequence[Any]) -> None:
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
