"""Harms to an archive: what verify prints of each, and whether repair fixes it. docs/archive.md has the same table."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner
from deltalake import DeltaTable, write_deltalake

from bourse_consumers import archive_cli as cli
from bourse_consumers.api import Batch
from bourse_consumers.archive.command import one_table
from bourse_consumers.archive.maintenance import forget
from bourse_consumers.archive.proof import Kept, Report
from bourse_consumers.archive.repair import repair
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.archive.storage import Storage, StoreError, store_errors
from bourse_consumers.archive.table import Table
from bourse_consumers.archive.verify import show, verify
from bourse_consumers.runner import Runner
from bourse_consumers.testing import SCHEMAS, SERIALIZERS, Memory, marker, stream_of, trade
from bourse_schemas.codec import FRAME
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TRADES, Topic

DAYS = [date(2026, 11, 23), date(2026, 11, 24), date(2026, 11, 25)]
# A later release's schema of events.
NEWER = {
    **SCHEMAS[1],
    "fields": [*SCHEMAS[1]["fields"], {"name": "yield_ppm", "type": ["null", "long"], "default": None}],
}
REPAIRED, FOUND, READ_AGAIN, HARMLESS = "repaired", "found only", "archived again", "nothing is lost"


def kept(memory: Memory, topic: Topic, first: int = 0) -> Kept:
    """Return what the topic in memory still has from an offset on, in chunks of ten."""
    logs = {place.number: log for place, log in memory.records.items() if place.topic == topic.full_name()}

    def rows(number: int, start: int, end: int) -> Iterator[pa.Table]:
        found = [record for record in logs[number][start:end] if record is not None]
        for at in range(0, len(found), 10):
            yield Batch(found[at : at + 10], {}, memory.decoders).all_fields()

    return Kept({number: (first, len(log)) for number, log in logs.items()}, rows)


class Archive:
    """A folder with the tables of trades and polls, and the topics in memory."""

    def __init__(self, folder: Path, memory: Memory) -> None:
        self.folder, self.memory = folder, memory
        self.trades = folder / "bourse.trades"

    def run(self) -> None:
        """Archive what comes next."""
        for topic in (TRADES, POLLS):
            consumer = DeltaArchive(str(self.folder), topic, commit_rows=8)
            runner = Runner(consumer, stream_of(consumer, self.memory), name="test", batch_size=4)
            while runner.step():
                pass
            runner.stop()
            runner.run()

    def table(self, topic: Topic = TRADES) -> Table:
        """Open a table."""
        return one_table(str(self.folder), topic.name)

    def verify(self, topic: Topic = TRADES, *, topic_is_there: bool = True) -> Report:
        """Verify a table."""
        of_topic = partial(kept, self.memory, topic)
        return verify(self.table(topic), (lambda _: of_topic()) if topic_is_there else None)

    def repair(self, topic: Topic = TRADES, first: int = 0) -> tuple[set[date], set[date]]:
        """Repair a table from a topic that has the offsets from `first` on."""
        return repair(self.table(topic), self.verify(topic), kept(self.memory, topic, first))

    def file(self, day: date = DAYS[1]) -> Path:
        """Return a data file of a day."""
        return self.trades / self.table().files(day)[0].path

    def commit(self, back: int = 0) -> Path:
        """Return the newest commit, or one before it."""
        return sorted((self.trades / "_delta_log").glob("*.json"))[-1 - back]

    def delta(self, topic: Topic = TRADES) -> DeltaTable:
        """Return the table as other programs open it."""
        return DeltaTable(f"{self.folder}/{topic.full_name()}")


@pytest.fixture(scope="session")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Archive three days of two partitions once."""
    memory = Memory(partitions=2, markers=True)
    poll = 0
    for day in DAYS:
        for sequence in range(1, 7):
            poll += 1
            both = [
                trade(sequence=sequence, trading_day=day, poll_sequence=poll, instrument=f"IRO1MADN000{number}")
                for number in range(2)
            ]
            for number, event in enumerate(both):
                memory.append(event, partition=number)
            memory.append(marker(*both))
    archive = Archive(tmp_path_factory.mktemp("harms"), memory)
    archive.run()
    return archive


@pytest.fixture
def archive(_whole: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Return a copy of the archive."""
    monkeypatch.setitem(SCHEMAS, 99, NEWER)
    return Archive(Path(shutil.copytree(_whole.folder, tmp_path / "archive")), _whole.memory)


def truncate(archive: Archive) -> None:
    """Cut a file."""
    file = archive.file()
    file.write_bytes(file.read_bytes()[:-100])


def flip(archive: Archive) -> None:
    """Flip a byte of a page."""
    file = archive.file()
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content)


def write_twice(archive: Archive) -> None:
    """Append rows that are there."""
    write_deltalake(archive.delta(), archive.delta().to_pyarrow_table().slice(0, 3), mode="append")


def tear_checkpoint(archive: Archive) -> None:
    """Cut a checkpoint."""
    archive.delta().create_checkpoint()
    (checkpoint,) = (archive.trades / "_delta_log").glob("*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])


def alter(archive: Archive) -> None:
    """Change a price."""
    archive.delta().update(new_values={"last_price": 1}, predicate="_partition = 0 AND _offset = 4")


def drop_column(archive: Archive) -> None:
    """Have a table whose schema does not know a column."""
    rows = archive.delta().to_pyarrow_table().drop_columns(["previous_close"])
    write_deltalake(archive.delta(), rows, mode="overwrite", schema_mode="overwrite")


def delete(where: str, topic: Topic = TRADES) -> Callable[[Archive], object]:
    """Return a harm that deletes rows, in a commit as any other program makes it."""
    return lambda archive: archive.delta(topic).delete(where)


def add_field(archive: Archive) -> None:
    """Publish an event of a newer release, with a field that the archiver does not know."""
    whole, archive.memory = archive.memory, Memory(partitions=2, markers=True)
    archive.memory.records = {partition: list(log) for partition, log in whole.records.items()}
    event = trade(sequence=7, trading_day=DAYS[2], poll_sequence=19, instrument="IRO1MADN0000")
    value = SERIALIZERS[TradeEvent](event).value or b""
    archive.memory.append_bytes(TradeEvent, FRAME.pack(0, 99) + value[FRAME.size :] + b"\x02\x54")
    archive.run()
    assert 42 in archive.delta().to_pyarrow_table()["yield_ppm"].to_pylist()


def empty(archive: Archive) -> None:
    """Delete everything, and the offsets with it."""
    shutil.rmtree(archive.trades)
    Table.create(str(archive.trades), "bourse.trades")


# The harm, what does it, what verify prints, and what becomes of it.
HARMS: dict[str, tuple[Callable[[Archive], Any], str, str]] = {
    "a data file is deleted": (lambda it: it.file().unlink(), "file is missing", REPAIRED),
    "a data file is truncated": (truncate, "file has N bytes, not N", REPAIRED),
    "a byte of a page is flipped": (flip, "file is damaged", REPAIRED),
    "the newest commit is emptied": (
        lambda it: it.commit().write_bytes(b""),
        "is torn: start the archiver",
        READ_AGAIN,
    ),
    "a commit before it is emptied": (lambda it: it.commit(2).write_bytes(b""), "is empty: what", FOUND),
    "a commit in the middle is deleted": (lambda it: it.commit(2).unlink(), "found gap", FOUND),
    "the newest commit is deleted": (lambda it: it.commit().unlink(), "N not archived yet", READ_AGAIN),
    "a checkpoint is torn": (tear_checkpoint, "is torn: start the archiver", READ_AGAIN),
    "rows are written twice": (write_twice, "rows stored twice: N", REPAIRED),
    "rows are deleted": (delete("_offset = 4"), "rows missing that the topic has: N", REPAIRED),
    "values are altered": (alter, "rows different from the topic: N", REPAIRED),
    "all rows of a partition are deleted": (delete("_partition = 1"), "rows missing that the topic has: N", REPAIRED),
    "the first day is deleted": (delete("trading_day = '2026-11-23'"), "rows missing that the topic has: N", REPAIRED),
    "the last day is deleted": (delete("trading_day = '2026-11-25'"), "rows missing that the topic has: N", REPAIRED),
    "the table is replaced by an empty one": (empty, "archive empty, rows on the topic: N", READ_AGAIN),
    "the folder is emptied": (lambda it: shutil.rmtree(it.trades), "there is no table", READ_AGAIN),
    "the polls are archived less far than the trades": (
        delete("poll_sequence > 9", POLLS),
        "polls N to 9 were compared with their markers",
        HARMLESS,
    ),
    "a field is added while an older archiver runs": (add_field, "ok: nothing is missing or stored twice", HARMLESS),
    "the table has the columns of an older release": (
        drop_column,
        "rows without the column previous_close that the topic has: N",
        REPAIRED,
    ),
}


def printed(archive: Archive, capsys: pytest.CaptureFixture[str]) -> tuple[str, bool]:
    """Return what verify prints, with N for numbers, and whether it is ok."""
    capsys.readouterr()
    report = archive.verify()
    show(report, as_json=False)
    return capsys.readouterr().out, not report.findings


@pytest.mark.parametrize("harm", HARMS)
def test_a_harm_is_found_and_fixed(harm: str, archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    """With what docs/archive.md promises."""
    output, ok = printed(archive, capsys)
    assert ok, output
    damage, message, outcome = HARMS[harm]
    damage(archive)
    pattern = re.escape(message).replace("N", r"[\d,]+")
    try:
        output, ok = printed(archive, capsys)
    except (ConfigurationError, Exception) as error:  # judged below
        output, ok = str(error), False
    assert re.search(pattern, output), output
    assert ok == (outcome == HARMLESS or "not archived yet" in message), output
    if outcome == FOUND:
        return
    if outcome == REPAIRED:
        repaired, lost = archive.repair()
        assert repaired
        assert lost == set()
    archive.run()
    output, ok = printed(archive, capsys)
    assert ok, output
    report = archive.verify()
    assert report.rows == report.compared >= 36


def test_the_manual_lists_the_harms() -> None:
    """With what verify prints, and what becomes of each."""
    manual = (Path(__file__).parents[2] / "docs" / "archive.md").read_text("utf-8")
    lines = [f"| {harm} | `{message}` | {outcome} |" for harm, (_, message, outcome) in HARMS.items()]
    assert "\n".join(["|---|---|---|", *lines, ""]) in manual


def test_what_the_topic_no_longer_has_whole_is_not_repaired(archive: Archive) -> None:
    """The day of its oldest record and those before stay as they are; later ones are repaired."""
    for day in DAYS[1:]:
        archive.file(day).unlink()
    before = archive.table().delta.version()
    # The oldest record that is left is one of the second day.
    repaired, lost = archive.repair(first=15)
    assert (repaired, lost) == ({DAYS[2]}, {DAYS[1]})
    assert archive.table().delta.version() == before + 1
    assert {each["day"] for each in archive.verify().findings if each["day"]} == {DAYS[1]}


def test_a_file_that_fails_after_it_was_verified_is_not_dropped(archive: Archive) -> None:
    """The rows of a partition without findings are copied, or nothing is changed."""
    before = archive.table().files(DAYS[0])
    archive.delta().delete("_offset = 4 AND _partition = 0")
    report = archive.verify()
    assert report.damaged == {(DAYS[0], 0)}
    path = archive.trades / next(file.path for file in archive.table().files(DAYS[0]) if file in before)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(StoreError, match="was damaged since it was verified"):
        repair(archive.table(), report, kept(archive.memory, TRADES))
    path.write_bytes(content)
    assert repair(archive.table(), report, kept(archive.memory, TRADES)) == ({DAYS[0]}, set())
    assert archive.verify().findings == []


def test_a_file_that_cannot_be_read_is_not_damage(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify stops: that proves nothing."""

    def get(*_: object) -> memoryview:
        with store_errors():
            raise OSError("Too many open files")

    monkeypatch.setattr(Storage, "get", get)
    with pytest.raises(StoreError, match="Too many open files"):
        archive.verify()


@pytest.mark.parametrize(
    ("harm", "why"),
    [(shutil.rmtree, "there is no table"), (lambda polls: next(polls.glob("*/*.parquet")).unlink(), "has findings")],
)
def test_verify_prints_that_polls_were_not_compared(
    harm: Callable[[Path], Any], why: str, archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although it is ok otherwise."""
    harm(archive.folder / "bourse.polls")
    output, ok = printed(archive, capsys)
    assert ok
    assert re.search(rf"^NOT CHECKED: whether each poll has its rows: .*{why}", output, re.MULTILINE)


def test_verify_without_the_topic(archive: Archive) -> None:
    """Sequences, totals and polls prove rows for ever."""
    assert archive.verify(topic_is_there=False).findings == []
    archive.delta().delete("poll_sequence = 8 AND _partition = 1")
    found = [each["what"] for each in archive.verify(topic_is_there=False).findings]
    counts = "8 has 0 of 0 opened, 1 of 2 traded, 0 of 0 revised, 0 of 0 cancelled"
    assert found == [
        "rows out of the sequence of their instrument: 1",
        f"polls without the rows that their marker counts: 1; {counts}",
    ]
    archive.delta(POLLS).delete("poll_sequence = 5")
    assert "rows after missing polls: 1" in [
        each["what"] for each in archive.verify(POLLS, topic_is_there=False).findings
    ]


def test_days_that_were_removed_on_purpose_are_not_findings(archive: Archive) -> None:
    """Although the topic still has them."""
    assert forget(archive.table(), DAYS[1])
    report = archive.verify()
    assert (report.findings, report.rows, report.behind) == ([], 24, 0)


def test_polls_are_compared_with_their_topic(archive: Archive) -> None:
    """Their table has a column of the day that the topic does not have; repair fixes it."""
    archive.delta(POLLS).delete("poll_sequence > 15")
    assert [each["what"] for each in archive.verify(POLLS).findings] == ["rows missing that the topic has: 3"]
    assert archive.repair(POLLS)[1] == set()
    report = archive.verify(POLLS)
    assert (report.findings, report.rows) == ([], 18)


def test_the_command_verifies_all_tables(archive: Archive) -> None:
    """One JSON object each; the exit code is 1 if one of them has findings."""
    command = ["verify", "--to", str(archive.folder), "--no-topic", "--json"]
    first = CliRunner().invoke(cli.archive, command)
    reports = [json.loads(line) for line in first.stdout.splitlines()]
    assert [(each["topic"], each["ok"], each["rows"]) for each in reports] == [
        ("bourse.polls", True, 18),
        ("bourse.trades", True, 36),
    ]
    assert first.exit_code == 0
    archive.file().unlink()
    assert CliRunner().invoke(cli.archive, command).exit_code == 1


class _Elsewhere(Cluster):
    """A cluster with another identity."""

    def identity(self, name: str) -> tuple[str, str]:
        return "elsewhere", f"the id of {name}"


@pytest.mark.parametrize("command", [["verify"], ["repair", "--from-topic"]])
def test_another_cluster_is_refused(command: list[str], archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows would be findings, or worse: they would replace ours."""
    table = Table.create(str(archive.folder / "of-here" / "bourse.trades"), "bourse.trades", "here", "")
    assert table.about["cluster"] == "here"
    monkeypatch.setattr("bourse_cli.options.Cluster", _Elsewhere)
    ran = CliRunner().invoke(cli.archive, [*command, "--to", str(archive.folder / "of-here")])
    assert isinstance(ran.exception, ConfigurationError), ran.output
    assert "was written from cluster here, this is elsewhere" in str(ran.exception)
