"""The archive in a Delta table: every event once, in a folder or a bucket, whatever fails, also with other writers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from bourse_cli.health import Monitor
from bourse_consumers.api import Assignment, Batch, Consumer, Decoders, Partition, Places, Reopen, Retry
from bourse_consumers.archive import sink
from bourse_consumers.archive.maintenance import optimize
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.archive.storage import Storage, StoreError
from bourse_consumers.archive.table import Table
from bourse_consumers.runner import Runner
from bourse_consumers.testing import ConsumerContract, Memory, MemoryStream, run, trade
from bourse_schemas.codec import FRAME, Deserializer, Serializer, avro_schema
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN, TradeEvent
from bourse_schemas.topics import CANDLES, POLLS, TOPICS, TRADES
from tests.strategies import one

TRADES_0, TRADES_1 = Partition("bourse.trades", 0), Partition("bourse.trades", 1)
OPENED = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
TODAY, TOMORROW = date(2026, 11, 23), date(2026, 11, 24)
KEPT = [topic for topic in TOPICS if topic is not CANDLES]


def events(count: int, **fields: Any) -> list[TradeEvent]:
    """Return one event a minute of one instrument."""
    return [
        trade(sequence=number, last_price=100 + number, observed_at=OPENED + timedelta(minutes=number), **fields)
        for number in range(1, count + 1)
    ]


def archived(to: object, *more: TradeEvent, **options: Any) -> Memory:
    """Archive events, five of one day if none are given, in commits of two; return their topic."""
    memory = Memory()
    memory.append(*(more or events(5)))
    run(DeltaArchive(str(to), **{"commit_rows": 2, **options}), memory, batch_size=2)
    return memory


def batch(memory: Memory, begin: int, end: int) -> Batch:
    """Return the records of a range."""
    records = [record for record in memory.records[TRADES_0][begin:end] if record is not None]
    return Batch(records, {TRADES_0: end}, memory.decoders)


def table(to: object, topic: str = "bourse.trades") -> Table:
    """Return a topic's table."""
    found = Table.open(f"{to}/{topic}")
    assert found is not None
    return found


def ids(to: object) -> list[str]:
    """Return the ids of all events archived, in the order of their offsets."""
    opened = Table.open(f"{to}/bourse.trades")
    return opened.arrow(opened.files())["event_id"].to_pylist() if opened else []


def settle(writer: DeltaArchive) -> None:
    """Wait for what is being written, whatever comes of it."""
    if writer._writing is not None:
        wait([writer._writing])


@pytest.fixture(params=["folder", "bucket"])
def to(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an empty place of either kind."""
    return str(tmp_path / "archive") if request.param == "folder" else str(request.getfixturevalue("bucket"))


class Contract(ConsumerContract):
    """Every event is in the table once, whatever is stopped, killed or moved."""

    before: DeltaArchive | None = None

    def made(self, to: str) -> Consumer:
        """Return a writer; what the one before it had begun to write is written: the dead do not go on."""
        if self.before is not None:
            settle(self.before)
        self.before = DeltaArchive(to, commit_rows=2)
        return self.before

    def events(self) -> Sequence[TradeEvent]:
        """Return events of two days."""
        return [*events(4), *events(3, trading_day=TOMORROW)]


class TestFolder(Contract):
    """In a folder."""

    def make(self, folder: Path) -> Consumer:
        return self.made(str(folder))

    def outcome(self, memory: Memory, folder: Path) -> object:
        return ids(folder)


class TestBucket(Contract):
    """In a bucket."""

    @pytest.fixture(autouse=True)
    def _reach(self, bucket: str) -> None:
        self.bucket = bucket

    def make(self, folder: Path) -> Consumer:
        return self.made(f"{self.bucket}/{folder.name}")

    def outcome(self, memory: Memory, folder: Path) -> object:
        return ids(f"{self.bucket}/{folder.name}")


def test_rows_and_offsets_are_one_commit(to: str) -> None:
    """A file holds rows of one day; statistics name its offsets; the description says what the table is."""
    archived(to, *events(3), *events(2, trading_day=TOMORROW), commit_rows=100)
    found = table(to)
    assert [(file.day, file.rows, file.offsets) for file in found.files()] == [
        (TODAY, 3, (0, 2)),
        (TOMORROW, 2, (3, 4)),
    ]
    assert found.stored(TRADES_0) == 5
    assert found.about == {"topic": "bourse.trades", "cluster": "", "topic_id": "", "first": {"0": 0}, "holes": []}
    assert found.arrow(found.files(TOMORROW), ["event_id", "trading_day"]).to_pylist() == [
        {"event_id": f"IRO1MADN0001-20261124-{number}", "trading_day": TOMORROW} for number in (1, 2)
    ]


def test_files_have_page_checksums_and_exact_types(tmp_path: Path) -> None:
    """A flipped byte is an error, not another price."""
    archived(tmp_path, trade(value=2**60), commit_rows=10)
    found = table(tmp_path)
    (file,) = found.files()
    (row,) = found.arrow([file]).to_pylist()
    assert (row["value"], row["trading_day"], row["op"]) == (2**60, TODAY, "OPENED")
    assert row["observed_at"] == trade().observed_at
    path = tmp_path / "bourse.trades" / file.path
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="CRC checksum verification failed"):
        found.arrow([file])


@pytest.mark.parametrize("topic", KEPT, ids=lambda topic: topic.name)
def test_every_topic_with_all_its_records_can_be_archived(tmp_path: Path, topic: Any) -> None:
    """Poll markers are part of the proof; alerts and dead letters have maps and lists; each row has a day."""
    memory = Memory()
    memory.append(one(topic.event))
    run(DeltaArchive(str(tmp_path), topic), memory)
    found = table(tmp_path, topic.full_name())
    (row,) = found.arrow(found.files()).to_pylist()
    assert set(topic.event.__struct_fields__) <= row.keys()
    assert (row["_partition"], row["_offset"]) == (0, 0)
    if topic is POLLS:
        assert row["_day"] == row["requested_at"].astimezone(TEHRAN).date()
    assert row[found.day_column] is not None


def test_candles_are_refused(tmp_path: Path) -> None:
    """Kafka compacts them."""
    with pytest.raises(ConfigurationError, match="Kafka compacts this topic, so an archive of it cannot be proved"):
        DeltaArchive(str(tmp_path), CANDLES)


def newer(event: TradeEvent) -> bytes:
    """Return a record of a later release, with a field that we do not know."""
    schema = {**avro_schema(TradeEvent)}
    schema["fields"] = [*schema["fields"], {"name": "yield_ppm", "type": ["null", "long"], "default": None, "doc": ""}]
    assert schema["fields"][-2]["name"] != "yield_ppm"
    serializer: Serializer[TradeEvent] = Serializer(TRADES, 1, "bourse")
    value = serializer(event).value
    assert value is not None
    return FRAME.pack(0, 99) + value[FRAME.size :] + b"\x02\x54"  # the second branch, 42


def test_a_field_of_a_newer_release_is_kept(tmp_path: Path) -> None:
    """An archiver that is upgraded after the producer loses nothing: the table gets the column, older rows are null."""
    schema = {**avro_schema(TradeEvent)}
    schema["fields"] = [*schema["fields"], {"name": "yield_ppm", "type": ["null", "long"], "default": None}]
    writers = {1: avro_schema(TradeEvent), 99: schema}
    decoders = Decoders({"bourse.trades": Deserializer(TradeEvent, writers.__getitem__)})
    other = Table.create(f"{tmp_path}/bourse.trades", "bourse.trades")
    memory = Memory()
    memory.append(*events(3))
    records = [record for record in memory.records[TRADES_0] if record is not None]
    records[1] = records[1]._replace(value=newer(events(3)[1]))
    writer = DeltaArchive(str(tmp_path))
    for at in range(3):  # a commit each
        writer.open(Assignment({TRADES_0: at}))
        part = Batch(records[at : at + 1], {TRADES_0: at + 1}, decoders)
        assert Places.of(part.records).offsets == (at,)
        other.refresh()
        other.describe(first={"9": at})  # another member changes the metadata meanwhile
        writer.process(part)
        writer.close()
    found = table(tmp_path)
    assert found.arrow(found.files(), ["yield_ppm", "_offset"])["yield_ppm"].to_pylist() == [None, 42, None]


# --- several writers --------------------------------------------------------------------------------------------------


def test_of_two_writers_at_the_same_place_one_wins(to: str) -> None:
    """A member that was replaced, with the same rows in its buffer, begins again where the other one ended."""
    memory = Memory()
    memory.append(*events(4))
    zombie, heir = DeltaArchive(to), DeltaArchive(to)
    for writer in (zombie, heir):
        writer.open(Assignment({TRADES_0: 0}))
    zombie.process(batch(memory, 0, 2))
    heir.process(batch(memory, 0, 3))
    heir.close()
    with pytest.raises(Reopen, match="was written by another archiver"):
        zombie.close()
    assert zombie.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: 3}
    zombie.process(batch(memory, 3, 4))
    zombie.close()
    assert len(ids(to)) == len(set(ids(to))) == 4


def test_what_other_partitions_buffered_is_read_again(to: str) -> None:
    """If another writer took one partition, the others keep their rows."""
    memory = Memory(partitions=2)
    memory.append(*events(3))
    memory.append(*events(3, instrument="IRO1FOLD0001"), partition=1)
    zombie, heir = DeltaArchive(to), DeltaArchive(to)
    zombie.open(Assignment({TRADES_0: 0, TRADES_1: 0}, first={TRADES_0: 0, TRADES_1: 0}))
    heir.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    both = [record for place in (TRADES_0, TRADES_1) for record in memory.records[place] if record is not None]
    zombie.process(Batch(both, {TRADES_0: 3, TRADES_1: 3}, memory.decoders))
    heir.process(batch(memory, 0, 3))
    heir.close()
    with pytest.raises(Reopen):
        zombie.close()
    again = Assignment({TRADES_0: 0, TRADES_1: 0}, first={TRADES_0: 0, TRADES_1: 0})
    assert zombie.open(again).offsets == {TRADES_0: 3, TRADES_1: 0}


def test_a_repetition_from_a_newer_snapshot_is_noticed(tmp_path: Path) -> None:
    """delta-rs accepts it; the guard does not."""
    archived(tmp_path)
    found = table(tmp_path)
    adds = found.write(found.arrow(found.files()))
    found.commit(adds, transactions={"bourse.trades-0": 5})
    assert len(ids(tmp_path)) == 10
    stale = DeltaArchive(str(tmp_path / "two"))
    memory = archived(tmp_path / "two")
    stale.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    stale._stored[TRADES_0] = 3
    stale.process(batch(memory, 3, 5))
    with pytest.raises(Reopen):
        stale.close()


def test_files_are_replaced_once(tmp_path: Path) -> None:
    """A second compaction from a stale snapshot is refused; an append in between is kept."""
    archived(tmp_path)
    first, second, third = (table(tmp_path) for _ in range(3))
    files = first.files()
    third.commit(transactions={"bourse.trades-0": 6})
    for maintainer in (first, second):
        adds = maintainer.write(maintainer.arrow(files))
        if maintainer is second:
            with pytest.raises(StoreError, match="Concurrent transaction failed"):
                maintainer.commit(adds, files, rewrites=True)
        else:
            maintainer.commit(adds, files, rewrites=True)
    assert len(ids(tmp_path)) == 5
    assert (table(tmp_path).stored(TRADES_0), len(table(tmp_path).files())) == (6, 1)


def test_files_that_were_replaced_are_not_removed(tmp_path: Path) -> None:
    """Although the snapshot is new: their rows are in other files."""
    archived(tmp_path)
    late = table(tmp_path)
    files = late.files()
    list(optimize(table(tmp_path), [TODAY]))
    late.refresh()
    adds = late.write(late.arrow(files))
    with pytest.raises(StoreError, match="another writer has replaced files meanwhile"):
        late.commit(adds, files)
    assert len(ids(tmp_path)) == 5


# --- what the operator has to know ------------------------------------------------------------------------------------


def test_what_the_topic_has_deleted_stops_the_archiver(to: str) -> None:
    """It prints which offsets; with --accept-loss it goes on, and the hole is in the table."""
    archived(to, *events(2))
    later = Assignment({TRADES_0: 9}, first={TRADES_0: 9})
    with pytest.raises(ConfigurationError, match=r"bourse\.trades-0: offsets 2 to 8.*--accept-loss"):
        DeltaArchive(to).open(later)
    assert DeltaArchive(to, accept_loss=True).open(later).offsets == {TRADES_0: 9}
    assert table(to).about["holes"] == [[0, 2, 9]]
    assert DeltaArchive(to).open(later).offsets == {TRADES_0: 9}
    assert len(ids(to)) == 2


def test_an_archive_that_begins_late_has_lost_nothing(to: str) -> None:
    """What was deleted before it began is not its business, and neither is what the group has committed."""
    late = Assignment({TRADES_0: 30}, first={TRADES_0: 20})
    assert DeltaArchive(to).open(late).offsets == {TRADES_0: 20}
    assert table(to).about["first"] == {"0": 20}


def identified(cluster: str, topic: str) -> Assignment:
    """Return an assignment on a cluster that has ids."""
    return Assignment({TRADES_0: 0}, first={TRADES_0: 0}, identity=lambda _: (cluster, topic))


@pytest.mark.parametrize(
    ("cluster", "topic", "message"),
    [
        ("B", "one", "was written from cluster A, this is B: use a new folder"),
        ("A", "two", "bourse.trades was deleted and created again since .* was begun: use a new folder"),
        ("A", "one", None),
        ("A", "", None),
    ],
)
def test_another_cluster_and_a_recreated_topic_are_refused(
    tmp_path: Path, cluster: str, topic: str, message: str | None
) -> None:
    """From the first start on, also while the table is empty; a cluster without ids is accepted."""
    DeltaArchive(str(tmp_path)).open(identified("A", "one"))
    if message:
        with pytest.raises(ConfigurationError, match=message):
            DeltaArchive(str(tmp_path)).open(identified(cluster, topic))
    else:
        DeltaArchive(str(tmp_path)).open(identified(cluster, topic))


def test_the_table_of_another_topic_or_program_is_refused(tmp_path: Path) -> None:
    """Even if somebody renames folders, and while it is empty."""
    polls = Partition("bourse.polls", 0)
    DeltaArchive(str(tmp_path), POLLS).open(Assignment({polls: 0}, first={polls: 0}))
    (tmp_path / "bourse.polls").rename(tmp_path / "bourse.trades")
    with pytest.raises(ConfigurationError, match=r"is the table of bourse\.polls, not of bourse\.trades"):
        DeltaArchive(str(tmp_path)).open(Assignment({TRADES_0: 0}))
    write_deltalake(tmp_path / "x" / "bourse.trades", pa.table({"a": [1]}))
    with pytest.raises(ConfigurationError, match="is a Delta table of another program"):
        DeltaArchive(str(tmp_path / "x")).open(Assignment({TRADES_0: 0}))


@pytest.mark.parametrize(
    ("to", "hint"),
    [
        ("{tmp}/file", "cannot write there"),
        ("/proc/bourse", "cannot write there"),
        ("ftp://bucket/x", "use a folder, s3://BUCKET/PREFIX"),
        ("s3:/bucket/x", "use a folder, s3://BUCKET/PREFIX"),
        ("s3://no-such-bucket-here/x", "check the bucket's name and the variables"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_at_start(bucket: str, tmp_path: Path, to: str, hint: str) -> None:
    """A file in the place of the folder, a read-only file system, a bucket that does not exist; one line each."""
    assert bucket
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--to") as caught:
        DeltaArchive(to.format(tmp=tmp_path))
    assert hint in str(caught.value)
    assert "whatever" not in str(caught.value)  # the secret key
    assert "\n" not in str(caught.value)


# --- what fails while it runs -----------------------------------------------------------------------------------------


def test_a_disk_that_fails_is_waited_for(tmp_path: Path) -> None:
    """What could not be written is kept, and written later."""
    memory = Memory()
    memory.append(*events(2))
    writer = DeltaArchive(str(tmp_path), commit_rows=1)
    writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    blocker = tmp_path / "bourse.trades" / "trading_day=2026-11-23"
    blocker.write_text("a file in the place of the folder")
    writer.process(batch(memory, 0, 1))
    for _ in range(2):
        settle(writer)
        with pytest.raises(Retry, match="cannot write"):
            writer.process(batch(memory, 1, 2))
    assert writer.durable() == {TRADES_0: 0}
    blocker.unlink()
    writer.process(batch(memory, 1, 2))
    writer.close()
    assert writer.durable() == {TRADES_0: 2}
    assert len(ids(tmp_path)) == 2


FULL = """
import resource, sys
from bourse_consumers.api import Assignment, Retry
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.testing import Memory
from tests.consumers.test_archive_table import TRADES_0, batch, events, ids, settle

memory = Memory()
memory.append(*events(2))
writer = DeltaArchive(sys.argv[1], commit_rows=1)
writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
writer.process(batch(memory, 0, 1))
settle(writer)
try:
    writer.process(batch(memory, 1, 2))
except Retry as error:
    print(error)
assert ids(sys.argv[1]) == []
assert writer.durable() == {TRADES_0: 0}
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
writer.process(batch(memory, 1, 2))
writer.close()
print(len(ids(sys.argv[1])))
"""


def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    """Half a file is never part of the table, and nothing of it is lost."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    message, rows = ran.stdout.splitlines()[-2:]
    assert message.startswith("cannot write: ")
    assert "File too large" in message
    assert rows == "2"


SILENT = """
import atexit, sys, threading
from bourse_cli.root import bourse, main
from bourse_consumers.api import Assignment, Retry
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.archive.table import Table
from bourse_consumers.testing import Memory
from bourse_schemas.errors import ConfigurationError
from tests.consumers.test_archive_table import TRADES_0, batch, events

_, to, step, end = sys.argv
sys.argv[1:] = ["end"]
memory = Memory()
memory.append(*events(2))
writer = DeltaArchive(to, patience=0.2)
assigned = Assignment({TRADES_0: 0}, first={TRADES_0: 0})
if step == "close":
    DeltaArchive(to).open(assigned)
    while not writer._next:
        try:
            writer.open(assigned)
        except Retry:
            pass
    writer.process(batch(memory, 0, 2))
Table.open = Table.commit = lambda *_, **__: threading.Event().wait()
atexit.register(print, "Python ended while the store was at work")

@bourse.command("end")
def _():
    try:
        writer.close() if step == "close" else writer.open(assigned)
    except Retry as error:
        print(error)
    if end != "None":
        raise {"ConfigurationError": ConfigurationError, "KeyError": KeyError}[end]("the last commit")

main()
"""


@pytest.mark.parametrize(
    ("step", "end", "code"),
    [("close", None, 0), ("close", ConfigurationError, 2), ("close", KeyError, 1), ("open", ConfigurationError, 2)],
)
def test_a_store_that_does_not_answer_does_not_hold_up_the_end(
    tmp_path: Path, step: str, end: type[Exception] | None, code: int
) -> None:
    """The process ends with the code of what ended it, and what was not committed is read again."""
    command = [sys.executable, "-c", SILENT, str(tmp_path), step, end.__name__ if end else "None"]
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (code, "the store is slow\n"), ran.stderr
    assert ("the last commit" in ran.stderr, "Traceback" in ran.stderr) == (code > 0, code == 1)
    memory = Memory()
    memory.append(*events(2))
    run(DeltaArchive(str(tmp_path)), memory)
    assert len(ids(tmp_path)) == 2


class _Busy(MemoryStream):
    """Holds up the commits of a table until the archiver has waited for them three times."""

    def __init__(self, memory: Memory, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        super().__init__(memory, [TRADES])
        self.monitor, self.waits = Monitor("test"), list[tuple[float, dict[str, str]]]()
        self.began, self.answers, self.fails = threading.Event(), threading.Event(), fails
        commit = Table.commit

        def late(*args: Any, **options: Any) -> None:
            if self.fails:
                self.fails = False
                raise StoreError("the disk is full")
            self.began.set()
            assert self.answers.wait(60)
            commit(*args, **options)

        monkeypatch.setattr(Table, "commit", late)

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Note the wait, and what readiness is meanwhile."""
        if self.began.is_set():
            self.waits.append((seconds, self.monitor.reasons()))
            if len(self.waits) == 3:
                self.answers.set()
        return super().wait(seconds, stopped)

    def archive(self, to: Path) -> float:
        """Archive all there is; return how many retries were counted."""
        consumer = DeltaArchive(str(to), commit_rows=1, patience=0.2)
        runner = Runner(consumer, self, name="test", batch_size=1, monitor=self.monitor)
        while runner.step():
            pass
        consumer._patience = None
        runner.stop()
        runner.run()
        return self.monitor.registry.get_sample_value("bourse_consumer_retries_total", {"consumer": "test"}) or 0.0


def test_a_slow_store_is_waited_for_without_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To catch up, with a chunk due while the one before it is written, is no fault: no metric, and ready."""
    memory = Memory()
    memory.append(*events(4))
    stream = _Busy(memory, monkeypatch)
    assert stream.archive(tmp_path) == 0
    assert stream.waits[:3] == [(0.1, {})] * 3
    assert len(ids(tmp_path)) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_store_that_is_silent_or_has_failed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It is a fault if there is no answer for a minute, or none yet after an error."""
    memory = Memory()
    memory.append(*events(4))
    if not fails:
        monkeypatch.setattr(sink, "SILENT_SECONDS", 0.0)
    stream = _Busy(memory, monkeypatch, fails=fails)
    assert stream.archive(tmp_path) >= 3
    assert [list(reasons) for _, reasons in stream.waits[:3]] == [["retrying"]] * 3
    assert "the store has not answered for" in stream.waits[0][1]["retrying"]
    assert stream.monitor.reasons() == {"stopping": "stopping"}
    assert len(ids(tmp_path)) == 4


def test_a_silent_store_is_reported_if_nothing_more_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    """The day's last chunk is not followed by one that would wait for it."""
    memory = Memory()
    memory.append(*events(1))
    monkeypatch.setattr(sink, "SILENT_SECONDS", 0.0)
    stream = _Busy(memory, monkeypatch)
    consumer = DeltaArchive(str(tmp_path), commit_rows=1, patience=0.2)
    runner = Runner(consumer, stream, name="test", monitor=stream.monitor)
    wait_for(lambda: (runner.step(), stream.waits)[1], 60)
    assert "retrying" in stream.waits[0][1]
    assert consumer.durable() == {TRADES_0: 1}


class _Gate(BaseHTTPRequestHandler):
    """Passes requests on to the S3 server, until the credentials have expired; may drop `If-None-Match`."""

    def do_PUT(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.paths.append(self.path)
        if server.busy:
            answer = httpx2.Response(503)
        elif server.expired:
            code = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            answer = httpx2.Response(403, content=code)
        else:
            dropped = {"accept-encoding", *server.dropped}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            answer = server.client.request(self.command, f"{server.behind}{self.path}", headers=headers, content=body)
        self.send_response_only(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in {"connection", "content-length", "transfer-encoding"}:
                self.send_header(name, value)
        length = answer.headers.get("content-length", "0") if self.command == "HEAD" else len(answer.content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    do_GET = do_HEAD = do_POST = do_DELETE = do_PUT  # noqa: N815  # the names the base class looks for


@contextmanager
def gate(monkeypatch: pytest.MonkeyPatch, *dropped: str) -> Iterator[Any]:
    """Run a gate in front of the S3 server."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Gate)
    server.behind, server.expired, server.dropped = os.environ["AWS_ENDPOINT_URL"], False, dropped
    server.client, server.paths, server.busy = httpx2.Client(trust_env=False), [], False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.client.close()


def test_expired_credentials_are_reported_and_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start they are the operator's to change; later it is tried again, and nothing counts as written."""
    with gate(monkeypatch) as server:
        memory = Memory()
        memory.append(*events(2))
        writer = DeltaArchive(bucket, commit_rows=1)
        writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
        server.expired = True
        writer.process(batch(memory, 0, 1))
        settle(writer)
        with pytest.raises(Retry, match="ExpiredToken"):
            writer.process(batch(memory, 1, 2))
        assert writer.durable() == {TRADES_0: 0}
        with pytest.raises(ConfigurationError, match=r"--to .*ExpiredToken"):
            DeltaArchive(bucket)
        server.expired = False
        writer.process(batch(memory, 1, 2))
        writer.close()
        assert len(ids(bucket)) == 2


def test_a_conflict_and_then_a_failed_listing_lose_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffered rows are dropped only together with their offsets."""
    memory = Memory(partitions=2)
    memory.append(*events(3))
    memory.append(*events(3, instrument="IRO1FOLD0001"), partition=1)
    assigned = Assignment({TRADES_0: 0, TRADES_1: 0}, first={TRADES_0: 0, TRADES_1: 0})
    writer, other = DeltaArchive(bucket), DeltaArchive(bucket)
    for each in (writer, other):
        each.open(assigned)
    both = [record for place in (TRADES_0, TRADES_1) for record in memory.records[place] if record is not None]
    writer.process(Batch(both, {TRADES_0: 3, TRADES_1: 3}, memory.decoders))
    other.process(batch(memory, 0, 3))
    other.close()
    with pytest.raises(Reopen):
        writer.close()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(Retry):
            writer.open(assigned)
        assert writer.durable() == {}
    assert writer.open(assigned).offsets == {TRADES_0: 3, TRADES_1: 0}


def test_a_restart_reads_the_log_and_no_data(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files the bucket has."""
    archived(bucket, *events(20), commit_rows=1)
    with gate(monkeypatch) as server:
        assert DeltaArchive(bucket).open(Assignment({TRADES_0: 0}, first={TRADES_0: 0})).offsets == {TRADES_0: 20}
        assert server.paths
        assert [path for path in server.paths if "trading_day" in path] == []


def test_a_server_that_is_unreachable_is_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is unreachable when the archiver starts, or when the partitions come."""
    archived(bucket, *events(2))
    before = DeltaArchive(bucket)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        at_start = DeltaArchive(bucket)
        for writer in (before, at_start):
            with pytest.raises(Retry, match=r"127\.0\.0\.1:9"):
                writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    for writer in (before, at_start):
        assert writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0})).offsets == {TRADES_0: 2}


def test_a_server_that_is_unreachable_at_start_is_checked_later(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot do ends the archiver then."""
    with gate(monkeypatch, "if-none-match") as server:
        server.busy = True
        writer = DeltaArchive(bucket)
        server.busy = False
        with pytest.raises(ConfigurationError, match="the server ignores If-None-Match"):
            writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))


def test_a_server_that_ignores_if_none_match_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would let two archivers overwrite each other's commits."""
    with (
        gate(monkeypatch, "if-none-match"),
        pytest.raises(ConfigurationError, match="the server ignores If-None-Match"),
    ):
        DeltaArchive(bucket)


def test_what_is_old_enough_is_committed(tmp_path: Path) -> None:
    """Without further records too."""
    memory = Memory()
    memory.append(*events(1))
    writer = DeltaArchive(str(tmp_path), commit_seconds=1e-9)
    writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    writer.process(batch(memory, 0, 1))
    for _ in range(2):
        writer.idle(OPENED)
        settle(writer)
    assert writer.durable() == {TRADES_0: 1}
    assert len(ids(tmp_path)) == 1


# --- power cuts -------------------------------------------------------------------------------------------------------


def log(to: Path) -> list[Path]:
    """Return the commits."""
    return sorted((to / "bourse.trades" / "_delta_log").glob("*.json"))


@pytest.mark.parametrize("content", [b"", b'{"add":{"path":"tra', b"\0\0\0\0"], ids=["empty", "torn", "zeros"])
def test_a_torn_newest_commit_is_written_again(tmp_path: Path, content: bytes) -> None:
    """Its rows are read from Kafka again, from the offsets before it."""
    memory = archived(tmp_path)
    log(tmp_path)[-1].write_bytes(content)
    run(DeltaArchive(str(tmp_path)), memory)
    assert ids(tmp_path) == [f"IRO1MADN0001-20261123-{number}" for number in range(1, 6)]


@pytest.mark.parametrize("content", [b"", b'{"add":{"path":"tra'], ids=["empty", "torn"])
def test_only_an_archiver_removes_a_torn_commit(tmp_path: Path, content: bytes) -> None:
    """Others do not read the table until then."""
    memory = archived(tmp_path)
    newest = log(tmp_path)[-1]
    newest.write_bytes(content)
    with pytest.raises(StoreError, match="is torn: start the archiver"):
        table(tmp_path)
    assert newest.read_bytes() == content
    run(DeltaArchive(str(tmp_path)), memory)
    assert len(ids(tmp_path)) == 5


def test_a_commit_that_cannot_be_read_is_not_torn(tmp_path: Path) -> None:
    """It may be good: the archiver waits."""
    archived(tmp_path)
    newest, good = log(tmp_path)[-1], tmp_path / "good"
    newest.rename(good)
    newest.symlink_to(newest)  # reading it fails with ELOOP
    with pytest.raises(Retry, match="symbolic links"):
        DeltaArchive(str(tmp_path)).open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    good.replace(newest)
    assert len(ids(tmp_path)) == 5


def test_a_torn_creation_begins_again(tmp_path: Path) -> None:
    """The very first commit is no exception."""
    memory = archived(tmp_path)
    for commit in log(tmp_path)[1:]:
        commit.unlink()
    log(tmp_path)[0].write_bytes(b"")
    run(DeltaArchive(str(tmp_path)), memory)
    assert len(ids(tmp_path)) == 5


def test_a_torn_checkpoint_is_removed_if_its_commits_exist(tmp_path: Path) -> None:
    """And if they do not, the operator is asked to restore them."""
    memory = archived(tmp_path)
    table(tmp_path).delta.create_checkpoint()
    folder = tmp_path / "bourse.trades" / "_delta_log"
    (checkpoint,) = folder.glob("*.checkpoint.parquet")
    checkpoint.write_bytes(b"")
    run(DeltaArchive(str(tmp_path)), memory)
    assert len(ids(tmp_path)) == 5
    assert not checkpoint.exists()
    table(tmp_path).delta.create_checkpoint()
    (folder / "_last_checkpoint").write_bytes(b"")
    run(DeltaArchive(str(tmp_path)), memory)
    assert len(ids(tmp_path)) == 5
    checkpoint.write_bytes(b"PAR1")
    log(tmp_path)[0].unlink()
    with pytest.raises(ConfigurationError, match="is damaged and the commits before it are gone"):
        DeltaArchive(str(tmp_path)).open(Assignment({TRADES_0: 0}))


def test_an_empty_commit_in_the_middle_is_a_fault(tmp_path: Path) -> None:
    """delta-rs reads it as "nothing was added"; the archiver stops."""
    archived(tmp_path)
    log(tmp_path)[-2].write_bytes(b"")
    with pytest.raises(ConfigurationError, match="is empty: what it committed is lost"):
        DeltaArchive(str(tmp_path)).open(Assignment({TRADES_0: 0}))


@pytest.mark.parametrize("until", range(4))
def test_whatever_was_not_synced_may_be_torn(tmp_path: Path, until: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after N syncs of a commit: every file that was not synced is empty, and nothing is lost."""
    memory = archived(tmp_path, *events(2))
    memory.append(*events(5)[2:])
    synced: list[Path] = []
    before = {path for path in (tmp_path / "bourse.trades").rglob("*") if path.is_file()}

    def cut(path: Path) -> None:
        if len(synced) == until:
            raise OSError("the power is cut")
        if path.is_file() and path not in before:
            synced.append(path)

    writer = DeltaArchive(str(tmp_path), commit_rows=100)
    writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    for module in ("storage", "table"):
        monkeypatch.setattr(f"bourse_consumers.archive.{module}.sync", cut)
    writer.process(batch(memory, 2, 5))
    if until < 3:
        with pytest.raises((Retry, Reopen)):
            writer.close()
    else:
        writer.close()
    durable = writer.durable()[TRADES_0]
    for path in (tmp_path / "bourse.trades").rglob("*"):
        if path.is_file() and path not in before and path not in synced:
            path.write_bytes(b"")
    monkeypatch.undo()
    found = DeltaArchive(str(tmp_path)).open(Assignment({TRADES_0: 0}, first={TRADES_0: 0})).offsets[TRADES_0]
    assert found >= durable
    run(DeltaArchive(str(tmp_path)), memory)
    assert len(ids(tmp_path)) == len(set(ids(tmp_path))) == 5


def test_the_first_commit_of_each_kind_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits, checkpoints, data files and their folders."""
    synced: set[Path] = set()
    monkeypatch.setattr("bourse_consumers.archive.table.sync", synced.add)
    monkeypatch.setattr("bourse_consumers.archive.storage.sync", synced.add)
    archived(tmp_path, *events(200), commit_rows=1)
    files = {path for path in (tmp_path / "bourse.trades").rglob("*") if path.is_file()}
    assert [path.name for path in files if "checkpoint" in path.name]
    assert files <= synced
    assert {path.parent for path in files} <= synced


def test_a_storage_lists_what_it_holds(to: str) -> None:
    """Files by path, and folders by name."""
    archived(to)
    storage = Storage(f"{to}/bourse.trades")
    for file in table(to).files():
        assert len(storage.get(file.path)) == file.size
    with pytest.raises(StoreError, match="file is missing"):
        storage.get("nothing")
    assert Storage(to).folders() == ["bourse.trades"]
    assert Storage(f"{to}/nothing").folders() == []
