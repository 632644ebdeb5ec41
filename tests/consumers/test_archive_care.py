"""An archive of a real day is proved, spoilt and found out, compacted and proved again, and made into bars."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from bourse_consumers.api import Partition, Places
from bourse_consumers.archive.bars import day_bars, minute_bars
from bourse_consumers.archive.care import Report, Topics, compact, verify
from bourse_consumers.archive.files import Range, describe, read, write
from bourse_consumers.archive.parquet import ParquetArchive
from bourse_consumers.archive.store import Folder, Store, StoreError, open_store
from bourse_consumers.archive_cli import archive
from bourse_consumers.rows import to_table
from bourse_consumers.testing import DECODERS, Memory, run, trade
from bourse_producer.replay import Replay
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import PollMarker, TradeEvent
from bourse_schemas.topics import POLLS, TRADES
from tests.strategies import one

DAY, NEXT = date(2019, 8, 21), date(2019, 8, 22)
PARTITIONS = 3


@pytest.fixture(scope="module")
def events() -> list[TradeEvent]:
    """Return the events of the real day that ships with the sandbox."""
    replay = Replay()
    replay.day(REAL_DAY)
    return replay.events


@pytest.fixture(scope="module")
def memory(events: list[TradeEvent]) -> Memory:
    """Return a topic with that day, and markers between its transactions."""
    memory = Memory(partitions=PARTITIONS, markers=True)
    for event in events:
        memory.append(event, partition=hash(event.instrument) % PARTITIONS)
    return memory


@pytest.fixture(scope="module")
def whole(memory: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an archive of the day, in many files."""
    folder = tmp_path_factory.mktemp("archive")
    run(ParquetArchive(Folder(folder), max_rows=1_500), memory, batch_size=700)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of that archive, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "archive"))


def topics(memory: Memory, first: int = 0) -> Topics:
    """Return a topic in memory that has deleted what lies before an offset."""

    def rows(span: Range) -> pa.Table | None:
        found = [record for record in memory.records[span.partition][span.start : span.next] if record is not None]
        decoded = [DECODERS[span.partition.topic](record.value) for record in found]
        return to_table(decoded, Places.of(found)) if found else None

    return Topics(dict.fromkeys(memory.records, first), rows)


def rewrite(folder: Path, path: str, change: Callable[[pa.Table], pa.Table], **more: Any) -> None:
    """Write a file anew, changed."""
    store = Folder(folder)
    file = describe(store, path)
    table = change(read(store, [file]))
    store.delete(path)
    write(store, path, table, file.ranges, **more)


def middle(folder: Path) -> str:
    """Return a file in the middle of a partition."""
    of_first = [path for path in Folder(folder).paths() if "-0-0" in path]
    return of_first[len(of_first) // 2]


def test_a_real_day_is_proved(folder: Path, memory: Memory, events: list[TradeEvent]) -> None:
    """Every row is there, equal to the topic's; the digests depend on the rows alone, not on the files."""
    report = verify(Folder(folder), topics=topics(memory))
    assert report.faults == []
    assert (report.rows, report.compared, report.days) == (len(events), len(events), 1)
    assert len(report.partitions) == PARTITIONS
    again = verify(Folder(folder), DAY)
    assert again.partitions == report.partitions
    with pytest.raises(ConfigurationError, match="nothing of 2019-08-22"):
        verify(Folder(folder), NEXT)


def _deleted(folder: Path, path: str) -> None:
    (folder / path).unlink()


def _truncated(folder: Path, path: str) -> None:
    (folder / path).write_bytes((folder / path).read_bytes()[:-100])


def _half(folder: Path, path: str) -> None:
    whole = (folder / path).read_bytes()
    (folder / path).write_bytes(whole[:100] + bytes(2_000) + whole[2_100:])


def _doubled(folder: Path, path: str) -> None:
    start, suffix = path[:-26], path[-26:]
    shutil.copy(folder / path, folder / f"{start}-{int(suffix[-20 - 8 : -8] or 0) + 1:020d}.parquet")


def _elsewhere(folder: Path, path: str) -> None:
    (folder / f"trading_day={NEXT}").mkdir()
    shutil.copy(folder / path, folder / f"trading_day={NEXT}" / Path(path).name)


def _changed(folder: Path, path: str) -> None:
    def more(table: pa.Table) -> pa.Table:
        at = table.column_names.index("volume")
        return table.set_column(at, table.schema.field("volume"), pc.add(table["volume"], 1))

    rewrite(folder, path, more)


def _row_gone(folder: Path, path: str) -> None:
    rewrite(folder, path, lambda table: pa.concat_tables([table.slice(0, 5), table.slice(6)]))


def _row_twice(folder: Path, path: str) -> None:
    rewrite(folder, path, lambda table: pa.concat_tables([table, table.slice(5, 1)]))


DAMAGES: list[tuple[Callable[[Path, str], None], str]] = [
    (_deleted, "offsets are missing"),
    (_truncated, "or damaged"),
    (_half, "cannot be read"),
    (_doubled, "its name and its metadata do not agree"),
    (_elsewhere, "rows of another day"),
    (_changed, "volume is not the sum of its changes"),
    (_row_gone, "is due"),
    (_row_twice, "twice"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[damage.__name__[1:] for damage, _ in DAMAGES])
def test_damage_is_found_and_named(folder: Path, damage: Callable[[Path, str], None], said: str) -> None:
    """Without the topic: the file and the range."""
    path = middle(folder)
    damage(folder, path)
    report = verify(Folder(folder))
    assert any(said in fault["what"] for fault in report.faults), report.faults
    assert any(fault["file"] and (fault["range"] or "damaged" in fault["what"]) for fault in report.faults)
    if damage not in {_deleted, _doubled, _elsewhere}:
        assert path in {fault["file"] for fault in report.faults}


def test_what_only_the_topic_knows(folder: Path, memory: Memory) -> None:
    """A name that was changed adds up all the same."""
    path = middle(folder)

    def rename(table: pa.Table) -> pa.Table:
        at = table.column_names.index("title")
        return table.set_column(at, table.schema.field("title"), pa.array(["x"] * table.num_rows, pa.string()))

    rewrite(folder, path, rename)
    assert verify(Folder(folder)).faults == []
    (fault,) = verify(Folder(folder), topics=topics(memory)).faults
    assert fault["file"] == path
    assert "title at offset" in fault["what"]


def test_what_the_topic_has_deleted_is_not_missed(folder: Path, memory: Memory, events: list[TradeEvent]) -> None:
    """The archive outlives the topic: only what both have is compared."""
    report = verify(Folder(folder), topics=topics(memory, first=10_001))
    assert report.faults == []
    assert 0 < report.compared < len(events)


def test_an_accepted_hole_is_told_and_no_fault(tmp_path: Path) -> None:
    """It is on record."""
    log = Memory()
    log.append(*(trade(sequence=n, volume=n, volume_delta=1, value=0, value_delta=0, trade_count=0, trade_count_delta=0)
                 for n in (1, 2)))  # fmt: skip
    store = Folder(tmp_path)
    run(ParquetArchive(store), log)
    from bourse_consumers.api import Assignment

    place = Partition("bourse.trades", 0)
    ParquetArchive(store, accept_loss=True).open(Assignment({place: 9}, first={place: 9}))
    report = verify(store)
    assert (report.faults, report.holes) == ([], 7)


# --- compaction -------------------------------------------------------------------------------------------------------


def proved(store: Store, memory: Memory) -> Report:
    """Return the report of an archive that is well."""
    report = verify(store, topics=topics(memory))
    assert report.faults == []
    return report


def test_many_files_become_one(folder: Path, memory: Memory, events: list[TradeEvent]) -> None:
    """Sorted, at 50 bytes a row at most; proved before and after; a second time there is nothing to do."""
    store = Folder(folder)
    before = proved(store, memory)
    assert before.files > 10
    assert list(compact(store, DAY)) == []
    assert list(compact(store, NEXT)) == [(DAY, before.files, 1)]
    (path,) = store.paths()
    assert (folder / path).stat().st_size / len(events) <= 50
    after = proved(store, memory)
    assert {name: about["digest"] for name, about in after.partitions.items()} == {
        name: about["digest"] for name, about in before.partitions.items()
    }
    assert list(compact(store, NEXT)) == [(DAY, 1, 1)]
    instruments = pl.read_parquet(folder / path, hive_partitioning=False)["instrument"]
    assert instruments.is_sorted()
    # What comes late is put to it.
    late = Memory(partitions=PARTITIONS, markers=True)
    late.records = {place: [*log] for place, log in memory.records.items()}
    last = max((event for event in events), key=lambda event: event.sequence)
    from msgspec.structs import replace

    late.append(
        replace(last, sequence=last.sequence + 1, volume_delta=0, value_delta=0, trade_count_delta=0),
        partition=hash(last.instrument) % PARTITIONS,
    )
    run(ParquetArchive(store), late)
    assert len(store.paths()) == 2
    assert list(compact(store, NEXT)) == [(DAY, 2, 1)]
    assert proved(store, late).rows == len(events) + 1


class Dying(Folder):
    """A folder whose user is killed after so many changes."""

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)
        self.changes = changes

    def _die(self) -> None:
        self.changes -= 1
        if self.changes < 0:
            raise StoreError("killed")

    def create(self, *args: Any) -> bool:
        self._die()
        return super().create(*args)

    def delete(self, path: str) -> None:
        self._die()
        super().delete(path)


@settings(max_examples=6, deadline=None)
@given(changes=st.integers(0, 20))
def test_compaction_may_die_at_any_point(changes: int, whole: Path, memory: Memory, tmp_path_factory: Any) -> None:
    """Every row is there once for whoever reads the catalogue, and the next run ends what the first began."""
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("dying") / "archive"))
    try:
        list(compact(Dying(folder, changes), NEXT))
    except StoreError:
        proved(Folder(folder), memory)
    list(compact(Folder(folder), NEXT))
    proved(Folder(folder), memory)
    assert len(Folder(folder).paths()) == 1
    shutil.rmtree(folder)


def test_a_writer_that_slept_through_compaction_doubles_nothing(tmp_path: Path) -> None:
    """What it holds in memory is in a compacted file by now."""
    from bourse_consumers.api import Assignment, Batch, Reopen

    log, store, place = Memory(), Folder(tmp_path), Partition("bourse.trades", 0)
    log.append(*(trade(sequence=n, trading_day=DAY) for n in (1, 2, 3, 4)))
    records = [record for record in log.records[place] if record is not None]
    zombie = ParquetArchive(store)
    zombie.open(Assignment({place: 0}))
    zombie.process(Batch(records[:3], {place: 3}, decode=log.decode))
    run(ParquetArchive(store, max_rows=2), log, batch_size=2)
    list(compact(store, NEXT))
    with pytest.raises(Reopen):
        zombie.close()
    assert zombie.open(Assignment({place: 0})).offsets == {place: 4}


def test_a_bucket_too(bucket: str, memory: Memory) -> None:
    """The same over S3."""
    store = open_store(bucket)
    run(ParquetArchive(store, max_rows=4_000), memory, batch_size=2_000)
    proved(store, memory)
    ((_, before, after),) = compact(store, NEXT)
    assert (before > 3, after) == (True, 1)
    proved(store, memory)


# --- polls ------------------------------------------------------------------------------------------------------------


def test_every_change_has_its_poll(tmp_path: Path) -> None:
    """Beside an archive of the markers: numbered without a hole, and counting what is here."""
    trades, polls = Folder(tmp_path / "trades"), Folder(tmp_path / "polls")
    log = Memory()
    changes: list[TradeEvent] = [
        trade(sequence=n, poll_sequence=n, volume=n, volume_delta=1, value=0, value_delta=0, trade_count=0,
              trade_count_delta=0, op="OPENED" if n == 1 else "TRADED") for n in (1, 2, 3)
    ]  # fmt: skip
    log.append(*changes)
    run(ParquetArchive(trades, TRADES), log)

    def keep(*sequences: int, **counts: int) -> None:
        shutil.rmtree(tmp_path / "polls", ignore_errors=True)
        markers = Memory()
        nothing = dict.fromkeys(("opened", "traded", "revised", "cancelled"), 0)
        for n in sequences:
            counted = {**nothing, **({"opened": 1} if n == 1 else {"traded": 1}), **counts}
            markers.append(one(PollMarker, poll_sequence=n, source="s", outcome="PUBLISHED", **counted))
        run(ParquetArchive(polls, POLLS), markers)

    keep(1, 2, 3)
    assert verify(trades, polls=polls).faults == verify(polls).faults == []
    keep(1, 3)
    assert "poll 3 does not follow" in verify(polls).faults[0]["what"]
    assert "poll 2 has changes here and no marker" in verify(trades, polls=polls).faults[0]["what"]
    keep(1, 2, 3, traded=0)
    assert "more changes here than its marker counts" in verify(trades, polls=polls).faults[0]["what"]


# --- bars, exports ----------------------------------------------------------------------------------------------------


def test_bars_of_a_real_day_agree_with_the_exchange(whole: Path, events: list[TradeEvent]) -> None:
    """Minutes add up to the day's totals, and their highs, lows and last prices are the exchange's own."""
    table = read(Folder(whole))
    days = {row["instrument"]: row for row in day_bars(table).iter_rows(named=True)}
    last = {event.instrument: event for event in events}
    assert days.keys() == last.keys()
    minutes: dict[str, list[dict[str, Any]]] = {}
    for row in minute_bars(table).iter_rows(named=True):
        minutes.setdefault(row["instrument"], []).append(row)
    for code, event in last.items():
        day, bars = days[code], minutes[code]
        assert (day["high"], day["low"], day["open"]) == (event.high_price, event.low_price, event.open_price)
        assert (day["volume"], day["value"], day["trade_count"]) == (event.volume, event.value, event.trade_count)
        for total in ("volume", "value", "trade_count"):
            assert sum(bar[total] for bar in bars) == day[total]
        assert bars[-1]["last"] == day["last"] == event.last_price
        highs = [bar["high"] for bar in bars if bar["high"] is not None]
        lows = [bar["low"] for bar in bars if bar["low"] is not None]
        assert max(highs, default=None) == event.high_price, code
        assert min(lows, default=None) == event.low_price, code
        assert [bar["minute"] for bar in bars] == sorted({bar["minute"] for bar in bars})


def call(*words: str) -> Any:
    """Run `bourse archive`."""
    return CliRunner().invoke(archive, list(words))


def test_the_commands(folder: Path, tmp_path: Path, events: list[TradeEvent]) -> None:
    """Verify, compact, export, bars: as one calls them."""
    to = ["--to", str(folder)]
    assert "well: nothing is missing" in call("verify", *to, "--no-topic").stdout
    assert json.loads(call("verify", *to, "--no-topic", "--json").stdout)["ok"] is True
    assert "→ 1 files" in call("compact", *to).stdout
    code = events[0].instrument
    lines = call("export", *to, "--day", f"{DAY}", "--format", "ndjson", "--instrument", code).stdout.splitlines()
    mine = [event for event in events if event.instrument == code]
    assert [json.loads(line)["event_id"] for line in lines] == [event.event_id for event in mine]
    rows = call("export", *to, "--day", f"{DAY}").stdout.splitlines()
    assert len(rows) == len(events) + 1
    out = tmp_path / "bars.parquet"
    assert call("bars", *to, "--every", "day", "--format", "parquet", "--output", str(out)).exit_code == 0
    assert pl.read_parquet(out).height == len({event.instrument for event in events})
    assert call("bars", *to, "--instrument", mine[0].symbol).stdout.startswith("instrument,trading_day,minute,symbol")
    (folder / Folder(folder).paths()[0]).unlink()
    shutil.copytree(folder, tmp_path / "empty")
    assert call("verify", "--to", str(tmp_path / "empty"), "--no-topic").exit_code == 0


@pytest.fixture
def mistakes(folder: Path) -> Callable[..., str]:
    """Return a function that calls a command and returns what it refuses."""

    def refused(*words: str) -> str:
        result = CliRunner().invoke(archive, [word.replace("ARCHIVE", str(folder)) for word in words])
        assert result.exit_code != 0
        return str(result.exception) + result.output

    return refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "--to", "nowhere"], "there is no such folder"),
        (["export", "--to", "ARCHIVE", "--day", "2019-08-22"], "has nothing of 2019-08-22"),
        (["export", "--to", "ARCHIVE", "--day", "yesterday"], "no day such as"),
        (["bars", "--to", "ARCHIVE", "--instrument", "nobody"], "no rows of nobody"),
        (["export", "--to", "ARCHIVE", "--day", "2019-08-21", "--output", "no/where"], "--output no/where: No such"),
    ],
)
def test_mistakes_are_named(mistakes: Callable[..., str], words: list[str], said: str) -> None:
    """In a line that says what to change."""
    assert said in mistakes(*words)


@pytest.mark.parametrize("form", ["csv", "ndjson", "parquet"])
def test_a_reader_of_an_export_that_goes_away(form: str) -> None:
    """`bourse archive export | head`: no error that names no file."""
    code = (
        "import sys, polars; from bourse_consumers.archive_cli import _out\n"
        "try: _out(polars.DataFrame({'a': range(300_000)}), sys.argv[1], None)\n"
        "except BrokenPipeError: sys.exit(7)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, form], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(30) == 7
