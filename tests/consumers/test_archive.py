"""An archive of Parquet files: every event once, in a folder or a bucket, whoever else writes there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from bourse_consumers.api import Assignment, Batch, Consumer, Partition, Reopen, Retry
from bourse_consumers.archive.files import Range, catalog, count_rows, read, write
from bourse_consumers.archive.parquet import ParquetArchive
from bourse_consumers.archive.store import Folder, Store, open_store
from bourse_consumers.testing import ConsumerContract, Memory, run, trade
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.topics import TOPICS
from tests.strategies import one

TRADES_0 = Partition("bourse.trades", 0)
OPENED = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
TOMORROW = date(2026, 11, 24)


def events(count: int, **fields: Any) -> list[TradeEvent]:
    """Return one event a minute of one instrument."""
    return [
        trade(sequence=number, last_price=100 + number, observed_at=OPENED + timedelta(minutes=number), **fields)
        for number in range(1, count + 1)
    ]


def batch(memory: Memory, begin: int, end: int) -> Batch:
    """Return the records of a range."""
    records = [record for record in memory.records[TRADES_0][begin:end] if record is not None]
    return Batch(records, {TRADES_0: end}, decode=memory.decode)


def settled(writer: ParquetArchive) -> None:
    """Wait for what is being written, whatever comes of it."""
    if writer._writing is not None:
        wait([writer._writing])


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty place of either kind."""
    return open_store(str(tmp_path / "archive") if request.param == "folder" else request.getfixturevalue("bucket"))


class Contract(ConsumerContract):
    """Every event is in a file once, whatever is stopped, killed or moved."""

    before: ParquetArchive | None = None

    def made(self, store: Store) -> Consumer:
        """Return a writer; what the one before it had begun to write is written: the dead do not go on."""
        if self.before is not None:
            settled(self.before)
        self.before = ParquetArchive(store, max_rows=2)
        return self.before

    def events(self) -> Sequence[TradeEvent]:
        """Return events of two days."""
        return [*events(4), *events(3, trading_day=TOMORROW)]


class TestFolder(Contract):
    """In a folder."""

    def make(self, folder: Path) -> Consumer:
        return self.made(Folder(folder))

    def outcome(self, memory: Memory, folder: Path) -> object:
        store = Folder(folder)
        return sorted(read(store)["event_id"].to_pylist()) if store.paths() else []


class TestBucket(Contract):
    """In a bucket."""

    @pytest.fixture(autouse=True)
    def _reach(self, bucket: str) -> None:
        self.bucket = bucket

    def make(self, folder: Path) -> Consumer:
        return self.made(open_store(f"{self.bucket}/{folder.name}"))

    def outcome(self, memory: Memory, folder: Path) -> object:
        store = open_store(f"{self.bucket}/{folder.name}")
        return sorted(read(store)["event_id"].to_pylist()) if store.paths() else []


def test_a_file_holds_one_range_of_one_day_and_ranges_join(store: Store) -> None:
    """The start of each file is exactly the end of the one before it."""
    memory = Memory()
    memory.append(*events(5), *events(2, trading_day=TOMORROW))
    run(ParquetArchive(store, max_rows=2), memory, batch_size=2)
    found = sorted(catalog(store), key=lambda file: file.ranges)
    assert [file.ranges[0][1:] for file in found] == [(0, 2), (2, 4), (4, 5), (5, 7)]
    assert [f"{file.day}" for file in found] == ["2026-11-23"] * 3 + ["2026-11-24"]
    assert {file.schema_ids for file in found} == {(1,)}
    assert read(store)["event_id"].to_pylist() == [
        *(f"IRO1MADN0001-20261123-{n}" for n in (1, 2, 3, 4, 5)),
        *(f"IRO1MADN0001-20261124-{n}" for n in (1, 2)),
    ]


def test_of_two_writers_at_the_same_place_one_wins(store: Store) -> None:
    """A zombie with the same rows in its buffer begins again where the other one ended."""
    memory = Memory()
    memory.append(*events(4))
    zombie, heir = ParquetArchive(store), ParquetArchive(store)
    for writer in (zombie, heir):
        writer.open(Assignment({TRADES_0: 0}))
    zombie.process(batch(memory, 0, 2))
    heir.process(batch(memory, 0, 3))
    heir.close()
    with pytest.raises(Reopen):
        zombie.close()
    assert zombie.open(Assignment({TRADES_0: 0})).offsets == {TRADES_0: 3}
    zombie.process(batch(memory, 3, 4))
    zombie.close()
    assert len(read(store)) == count_rows(store) == 4


def test_what_other_partitions_hold_in_memory_is_read_again(store: Store) -> None:
    """The one partition another writer took must not cost the others their rows."""
    other = Partition("bourse.trades", 1)
    memory = Memory(partitions=2)
    memory.append(*events(3))
    memory.append(*events(3, instrument="IRO1FOLD0001"), partition=1)
    zombie, heir = ParquetArchive(store), ParquetArchive(store)
    zombie.open(Assignment({TRADES_0: 0, other: 0}))
    heir.open(Assignment({TRADES_0: 0}))
    both = [record for log in (memory.records[TRADES_0], memory.records[other]) for record in log if record is not None]
    zombie.process(Batch(both, {TRADES_0: 3, other: 3}, decode=memory.decode))
    heir.process(batch(memory, 0, 3))
    heir.close()
    with pytest.raises(Reopen):
        zombie.close()
    assert zombie.open(Assignment({TRADES_0: 0, other: 0})).offsets == {TRADES_0: 3, other: 0}


def test_a_disk_that_fails_is_waited_for(tmp_path: Path) -> None:
    """What could not be written stays, and is written once it can be."""
    memory = Memory()
    memory.append(*events(2))
    store = Folder(tmp_path)
    writer = ParquetArchive(store, max_rows=1)
    writer.open(Assignment({TRADES_0: 0}))
    blocker = tmp_path / "trading_day=2026-11-23"
    blocker.write_text("in the way of the folder")
    writer.process(batch(memory, 0, 1))
    for _ in range(2):
        settled(writer)
        with pytest.raises(Retry):
            writer.process(batch(memory, 1, 2))
    assert writer.durable() == {TRADES_0: 0}
    blocker.unlink()
    writer.process(batch(memory, 1, 2))
    writer.close()
    assert writer.durable() == {TRADES_0: 2}
    assert count_rows(store) == 2


def test_other_readers_take_the_folder_as_one_table(tmp_path: Path) -> None:
    """The columns are the contract's, with exact types."""
    memory = Memory()
    memory.append(*events(1, value=2**60))
    run(ParquetArchive(Folder(tmp_path)), memory)
    table = pyarrow.dataset.dataset(tmp_path).to_table()
    (row,) = table.to_pylist()
    assert (row["last_price"], row["trading_day"], row["op"], row["value"]) == (101, OPENED.date(), "OPENED", 2**60)
    assert str(table.schema.field("observed_at").type) == "timestamp[ms, tz=UTC]"
    assert table.schema.field("last_price").metadata[b"description"]


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_every_topic_can_be_kept(store: Store, topic: Any) -> None:
    """Poll markers are part of the proof; alerts and dead letters have maps and lists."""
    memory = Memory(markers=True)
    memory.append(one(topic.event))
    run(ParquetArchive(store, topic), memory)
    (row,) = read(store).to_pylist()
    assert row.items() >= {"_partition": 0, "_offset": 0}.items()
    assert set(topic.event.__struct_fields__) <= row.keys()
    with pytest.raises(ConfigurationError, match="a place of its own"):
        ParquetArchive(store, TOPICS[TOPICS.index(topic) - 1]).open(
            Assignment({Partition(TOPICS[TOPICS.index(topic) - 1].full_name(), 0): 0})
        )


def test_rows_are_sorted_so_that_an_instrument_is_found_at_once(tmp_path: Path) -> None:
    """By instrument, then in their order; numbers are packed, names kept once."""
    memory = Memory()
    for number in range(1, 4):
        for code in ("IRO1ZZZZ0001", "IRO1AAAA0001"):
            memory.append(trade(instrument=code, sequence=number))
    store = Folder(tmp_path)
    run(ParquetArchive(store), memory)
    (path,) = store.paths()
    rows = pq.read_table(tmp_path / path, partitioning=None).select(["instrument", "sequence"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (code, n) for code in ("IRO1AAAA0001", "IRO1ZZZZ0001") for n in (1, 2, 3)
    ]
    group = pq.ParquetFile(tmp_path / path).metadata.row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    assert "DELTA_BINARY_PACKED" in encodings["volume"]
    assert "RLE_DICTIONARY" in encodings["instrument"]


def test_what_the_topic_has_deleted_is_no_small_matter(store: Store) -> None:
    """The consumer stops and says which offsets; told to go on it leaves a file that says so."""
    memory = Memory()
    memory.append(*events(2))
    run(ParquetArchive(store), memory)
    assigned = Assignment({TRADES_0: 9}, first={TRADES_0: 9})
    with pytest.raises(ConfigurationError, match=r"bourse\.trades-0: offsets 2 to 8.*--accept-loss"):
        ParquetArchive(store).open(assigned)
    assert ParquetArchive(store, accept_loss=True).open(assigned).offsets == {TRADES_0: 9}
    (hole,) = [file for file in catalog(store) if file.lost]
    assert (hole.ranges, hole.rows) == ((Range(TRADES_0, 2, 9),), 0)
    assert ParquetArchive(store).open(assigned).offsets == {TRADES_0: 9}
    assert count_rows(store) == 2


def test_an_archive_that_begins_late_has_lost_nothing(store: Store) -> None:
    """What was deleted before it was there is none of its business; what the group committed neither."""
    late = Assignment({TRADES_0: 30}, first={TRADES_0: 20})
    assert ParquetArchive(store).open(late).offsets == {TRADES_0: 20}


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing"])
def test_a_foreign_file_is_named_at_start(tmp_path: Path, content: bytes) -> None:
    """It might be anything: better to ask than to count it."""
    writer = ParquetArchive(Folder(tmp_path))
    folder = tmp_path / "trading_day=2026-11-23"
    folder.mkdir()
    for name in ("mine.parquet", "bourse.trades-0-00000000000000000000.parquet"):
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match=name):
            writer.open(Assignment({TRADES_0: 0}))
        (folder / name).unlink()


def test_a_newer_versions_archive_is_left_alone(tmp_path: Path) -> None:
    """Whatever it means by what it writes."""
    memory, store = Memory(), Folder(tmp_path)
    memory.append(*events(1))
    run(ParquetArchive(store), memory)
    write(store, "trading_day=2026-11-24/bourse.trades-0-00000000000000000001.parquet", read(store),
          [Range(TRADES_0, 1, 2)], version=99)  # fmt: skip
    with pytest.raises(ConfigurationError, match="newer version: upgrade"):
        ParquetArchive(store).open(Assignment({TRADES_0: 0}))


@pytest.mark.parametrize(
    ("to", "hint"),
    [
        ("{tmp}/file", "cannot write there"),
        ("s3://", "name a bucket"),
        ("gs://bucket/x", "give a folder or s3://"),
        ("s3:/bucket/x", "give a folder or s3://"),
        ("s3://no-such-bucket-here/x", "see the bucket's name and AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_at_start(bucket: str, tmp_path: Path, to: str, hint: str) -> None:
    """A file in the place of the folder, a bucket that is not there."""
    assert bucket
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--to") as caught:
        ParquetArchive(open_store(to.format(tmp=tmp_path)))
    assert hint in str(caught.value)
    assert "whatever" not in str(caught.value)


def test_a_server_that_is_away_is_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken for written that is not."""
    memory = Memory()
    memory.append(*events(2))
    here = open_store(bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    away = open_store(bucket)
    writer = ParquetArchive(here, max_rows=1)
    writer.open(Assignment({TRADES_0: 0}))
    writer._store = away
    writer.process(batch(memory, 0, 1))
    settled(writer)
    with pytest.raises(Retry, match="cannot write"):
        writer.process(batch(memory, 1, 2))
    assert writer.durable() == {TRADES_0: 0}
    writer._store = here
    writer.process(batch(memory, 1, 2))
    writer.close()
    assert count_rows(here) == 2


FULL = """
import resource, sys
from pathlib import Path
from bourse_consumers.api import Assignment, Retry
from bourse_consumers.archive.files import count_rows
from bourse_consumers.archive.parquet import ParquetArchive
from bourse_consumers.archive.store import Folder
from bourse_consumers.testing import Memory
from tests.consumers.test_archive import TRADES_0, batch, events, settled

memory = Memory()
memory.append(*events(2))
store = Folder(Path(sys.argv[1]))
writer = ParquetArchive(store, max_rows=1)
writer.open(Assignment({TRADES_0: 0}))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
writer.process(batch(memory, 0, 1))
settled(writer)
try:
    writer.process(batch(memory, 1, 2))
except Retry as error:
    print(error)
assert store.paths() == [], store.paths()
assert writer.durable() == {TRADES_0: 0}
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
writer.process(batch(memory, 1, 2))
writer.close()
print(count_rows(store))
"""


def test_a_disk_that_takes_no_more_is_waited_for(tmp_path: Path) -> None:
    """Half a file is never seen, and nothing of it is lost."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said, rows = ran.stdout.splitlines()[-2:]
    assert said.startswith("cannot write: ")
    assert "File too large" in said
    assert rows == "2"


class _Gate(BaseHTTPRequestHandler):
    """Passes requests on to the S3 server, until the credentials have expired."""

    def do_PUT(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if server.expired:
            code = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            answer = httpx2.Response(403, content=code)
        else:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "accept-encoding"}
            answer = httpx2.request(self.command, f"{server.behind}{self.path}", headers=headers, content=body)
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


def test_credentials_that_expire_are_told_and_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start it is the operator's to mend; later it is tried again, and nothing counts as written."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Gate)
    server.behind, server.expired = os.environ["AWS_ENDPOINT_URL"], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        memory = Memory()
        memory.append(*events(2))
        store = open_store(bucket)
        writer = ParquetArchive(store, max_rows=1)
        writer.open(Assignment({TRADES_0: 0}))
        server.expired = True
        writer.process(batch(memory, 0, 1))
        settled(writer)
        with pytest.raises(Retry, match="ExpiredToken"):
            writer.process(batch(memory, 1, 2))
        assert writer.durable() == {TRADES_0: 0}
        with pytest.raises(ConfigurationError, match=r"--to .*ExpiredToken"):
            ParquetArchive(open_store(bucket))
        server.expired = False
        writer.process(batch(memory, 1, 2))
        writer.close()
        assert count_rows(store) == 2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
