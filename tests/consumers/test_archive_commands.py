"""`bourse archive`: closed days are verified and merged, old days are removed, and a day leaves as a file."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result
from deltalake import DeltaTable

from bourse_cli.health import Monitor
from bourse_cli.root import bourse
from bourse_consumers.api import Assignment
from bourse_consumers.archive import maintenance, verify
from bourse_consumers.archive.maintenance import optimize, unoptimized
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.archive.storage import StoreError
from bourse_consumers.archive.table import Table
from bourse_consumers.testing import Memory, marker, run, trade
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN
from bourse_schemas.topics import POLLS, TRADES
from tests.consumers.test_archive_harms import kept
from tests.consumers.test_archive_table import TODAY, TOMORROW, TRADES_0, archived, events, ids, table

LATER, PAST = date(2027, 1, 1), date(2019, 8, 21)


def command(*words: object) -> Result:
    """Run `bourse archive …`."""
    return CliRunner().invoke(bourse, ["archive", *map(str, words)])


@pytest.fixture(params=["folder", "bucket"])
def to(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an empty place of either kind."""
    return str(tmp_path / "archive") if request.param == "folder" else str(request.getfixturevalue("bucket"))


def test_closed_days_become_one_file_each(to: str) -> None:
    """Rows, offsets and what readers see stay the same; a reader of the older snapshot can finish."""
    archived(to, *events(5), *events(4, trading_day=TOMORROW))
    before, older = ids(to), table(to)
    found = table(to)
    assert {day: len(files) for day, files in unoptimized(found, LATER).items()} == {TODAY: 3, TOMORROW: 3}
    assert list(unoptimized(found, TOMORROW)) == [TODAY]
    assert list(optimize(found, [TODAY])) == [(TODAY, 3, 1, [])]
    assert ids(to) == before
    assert {file.day: file.rows for file in table(to).files(TODAY)} == {TODAY: 5}
    assert len(table(to).files(TOMORROW)) == 3
    assert older.arrow(older.files())["event_id"].to_pylist() == before
    assert unoptimized(table(to), TOMORROW) == {}


def test_a_day_with_a_finding_is_left_as_it_is(tmp_path: Path) -> None:
    """Damage is never made permanent: rows that are stored twice, a file that is missing."""
    archived(tmp_path, *events(5, trading_day=PAST))
    found = table(tmp_path)
    found.commit(found.write(found.arrow(found.files()[:1])))
    files = table(tmp_path).files()
    ((day, had, has, findings),) = optimize(table(tmp_path), [PAST])
    assert (day, had, has) == (PAST, 4, 4)
    assert any("stored twice" in finding["what"] for finding in findings)
    (tmp_path / "bourse.trades" / files[0].path).unlink()
    ran = command("optimize", "--to", tmp_path)
    assert ran.exit_code == 1
    assert ran.stdout.startswith("FINDING ")
    assert "what file is missing" in ran.stdout
    assert ran.stdout.endswith("1 day: 4 → 4 files\n")
    assert table(tmp_path).files() == files


def test_what_failed_commits_left_is_deleted_after_a_week(tmp_path: Path) -> None:
    """Not sooner: it may be about to be committed."""
    archived(tmp_path)
    found, folder = table(tmp_path), tmp_path / "bourse.trades"
    old, young = (add.path for _ in range(2) for add in found.write(found.arrow(found.files()[:1])))
    active = [file.path for file in found.files()]
    for path in (old, *active):
        os.utime(folder / path, (0, 0))
    list(optimize(table(tmp_path), []))
    assert [(folder / path).exists() for path in (old, young, *active)] == [False, True, True, True, True]


def test_optimize_prints_what_it_did(tmp_path: Path) -> None:
    """As text and as JSON; a day that was not read does not count as verified."""
    archived(tmp_path, *events(5, trading_day=PAST))
    assert command("optimize", "--to", tmp_path).stdout == "1 day: 3 → 1 file\n"
    done = json.loads(command("optimize", "--to", tmp_path, "--json").stdout)
    assert done == {"verified_day": None, "days": 0, "files_before": 0, "files": 0, "findings": []}


def test_a_later_day_does_not_hide_one_with_findings(tmp_path: Path) -> None:
    """The verified day is the last one before it."""
    days = [date(2019, 8, day) for day in (21, 24, 25)]
    archived(tmp_path, *(event for day in days for event in events(4, trading_day=day)))
    (tmp_path / "bourse.trades" / table(tmp_path).files(days[1])[0].path).unlink()
    done = json.loads(command("optimize", "--to", tmp_path, "--json").stdout)
    assert (done["verified_day"], done["days"]) == ("2019-08-21", 3)


def test_the_archiver_optimizes_in_a_child_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    """The member that has partition 0 does it, and exports what came of it."""
    memory = archived(tmp_path, *events(5, trading_day=PAST))
    monkeypatch.setattr(maintenance, "FIRST_SECONDS", 0.0)
    writer = DeltaArchive(str(tmp_path), optimize=True)
    writer.monitor = monitor = Monitor("archive")

    def is_done() -> bool:
        writer.idle(datetime.now(UTC))
        return bool(monitor.registry.get_sample_value("bourse_archive_verified_day"))

    writer.open(Assignment({}))
    writer.idle(datetime.now(UTC))
    assert writer._optimizer is not None
    assert writer._optimizer._child is None
    writer.open(Assignment({TRADES_0: 0}, first={TRADES_0: 0}))
    wait_for(is_done, 60)
    assert (
        monitor.registry.get_sample_value("bourse_archive_verified_day")
        == datetime(2019, 8, 21, tzinfo=TEHRAN).timestamp()
    )
    assert monitor.registry.get_sample_value("bourse_archive_findings") == 0
    assert len(table(tmp_path).files()) == 1
    writer._optimizer._due = 0.0
    writer.idle(datetime.now(UTC))
    child = writer._optimizer._child
    assert child is not None
    writer.close()
    assert child[0].returncode is not None
    assert memory.records


@pytest.mark.parametrize(("end", "findings"), [("]}", 100_000), ("", None)])
def test_whatever_the_child_prints_the_archiver_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any], end: str, findings: int | None
) -> None:
    """More than a pipe holds, or half of it."""
    monkeypatch.setattr(maintenance, "FIRST_SECONDS", 0.0)
    optimizer, monitor = maintenance.Optimizer(str(tmp_path), "trades"), Monitor("archive")
    text = f"""print('{{"verified_day": null, "findings": [0' + ', 0' * 99_999 + '{end}')"""
    optimizer._command = [sys.executable, "-c", text]
    optimizer.step(monitor)
    assert optimizer._child is not None

    def is_done() -> bool:
        optimizer.step(monitor)
        return optimizer._child is None

    wait_for(is_done, 30)
    optimizer.stop()
    assert monitor.registry.get_sample_value("bourse_archive_findings") == findings


def test_old_days_are_forgotten(to: str) -> None:
    """The rows go, the offsets stay: the archiver goes on where it was."""
    memory = archived(to, *events(5), *events(4, trading_day=TOMORROW))
    maintenance.forget(table(to), TOMORROW)
    assert ids(to) == [f"IRO1MADN0001-20261124-{number}" for number in range(1, 5)]
    found = table(to)
    assert found.about["first"] == {"0": 5}
    run(DeltaArchive(to), memory)
    assert len(ids(to)) == 4
    assert command("forget", "--to", to, "--before", PAST).stdout == "0 days removed, 0 rows\n"
    assert "is in the future" in str(command("forget", "--to", to, "--before", "2999-01-01").exception)


def test_a_day_leaves_as_a_file(tmp_path: Path) -> None:
    """CSV for spreadsheets, Parquet for everything else; one instrument by its code or its symbol."""
    archived(tmp_path, *events(3), *events(2, instrument="IRO1FOLD0001", symbol="فولاد"))
    for name in ("day.csv", "day.parquet"):
        ran = command("export", "--to", tmp_path, "--day", TODAY, "--instrument", "فولاد", tmp_path / name)
        assert (ran.exit_code, ran.output) == (0, "")
    content = (tmp_path / "day.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfevent_id,")
    assert pl.read_csv(tmp_path / "day.csv")["symbol"].to_list() == ["فولاد"] * 2
    assert pl.read_parquet(tmp_path / "day.parquet")["_offset"].to_list() == [3, 4]


@pytest.mark.parametrize("words", [["verify", "--no-topic"], ["optimize"], ["export", "--day", "2019-08-21", "x.csv"]])
def test_a_terminal_shows_progress(tmp_path: Path, words: list[str]) -> None:
    """On standard error: the output can be piped."""
    archived(tmp_path / "archive", *events(5, trading_day=PAST))
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "bourse_cli", "archive", words[0], "--to", "archive", *words[1:]]
    subprocess.run(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    assert b"100%" in os.read(ours, 65_536)
    os.close(ours)


def test_no_text_of_a_csv_is_a_formula(tmp_path: Path) -> None:
    """As on the board; numbers stay numbers."""
    archived(tmp_path, trade(symbol="=1+1", title="-x", volume_delta=-5))
    ran = command("export", "--to", tmp_path, "--day", TODAY, tmp_path / "day.csv")
    assert (ran.exit_code, ran.output) == (0, "")
    (row,) = pl.read_csv(tmp_path / "day.csv").to_dicts()
    assert (row["symbol"], row["title"], row["volume_delta"]) == ("'=1+1", "'-x", -5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "{to}", "--day", "2026-11-23", "{to}/x.xls"), "the name ends with neither .csv nor .parquet"),
        (("--to", "{to}", "--day", "2026-11-25", "{to}/x.csv"), "has no rows of 2026-11-25"),
        (("--to", "{to}", "--day", "2026-11-23", "--instrument", "x", "{to}/x.csv"), "no rows of x on 2026-11-23"),
        (("--to", "{to}", "--day", "2026-11-23", "{to}/no/x.csv"), "x.csv: cannot be written"),
        (("--to", "{to}/nothing", "--day", "2026-11-23", "{to}/x.csv"), "there is no table of trades"),
        (("--to", "{to}", "--topic", "polls", "--day", "2026-11-23", "{to}/x.csv"), "there is no table of polls"),
        (
            ("--to", "{to}/bourse.trades", "--topic", "polls", "--day", "2026-11-23", "{to}/x.csv"),
            "is the table of bourse.trades: use --topic trades",
        ),
        (("--to", "s3:x", "--day", "2026-11-23", "{to}/x.csv"), "use a folder, s3://BUCKET/PREFIX"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    """Exit code 2, and what to change."""
    archived(tmp_path)
    ran = command("export", *(word.format(to=tmp_path) for word in words))
    assert isinstance(ran.exception, ConfigurationError)
    assert message in str(ran.exception)
    assert "\n" not in str(ran.exception)


@pytest.mark.parametrize(
    "words", [("optimize",), ("forget", "--before", f"{TOMORROW}"), ("repair", "--from-topic")], ids=itemgetter(0)
)
def test_a_store_that_fails_halfway_changes_no_day_by_half(
    tmp_path: Path,
    bourse: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    """The commands that change a table print that, and end with 1."""
    memory = archived(tmp_path)
    if words[0] == "repair":
        for file in table(tmp_path).files():
            (tmp_path / "bourse.trades" / file.path).unlink()
        topic = kept(memory, TRADES)
        monkeypatch.setattr(verify, "kept_for", lambda *_: lambda _: topic)
    before = table(tmp_path).files()

    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Table, "commit", fail)
    code, _, errors = bourse("archive", words[0], "--to", str(tmp_path), *words[1:])
    assert errors == "Error: the disk is full; no day is half changed: run it again when the cause is gone\n"
    assert code == 1
    assert table(tmp_path).files() == before


def test_two_prefixes_in_one_folder_have_to_be_named(tmp_path: Path) -> None:
    """The table itself may be named too."""
    archived(tmp_path)
    shutil.copytree(tmp_path / "bourse.trades", tmp_path / "demo.trades")
    ran = command("export", "--to", tmp_path, "--day", TODAY, tmp_path / "x.csv")
    assert "demo.trades" in str(ran.exception)
    assert command("export", "--to", tmp_path / "bourse.trades", "--day", TODAY, tmp_path / "x.csv").exit_code == 0


def test_a_restored_backup_goes_on(tmp_path: Path) -> None:
    """Data first, log last, while the archiver goes on; what the copy lacks is read from Kafka again."""
    memory = archived(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("_delta_log"))
    memory.append(*events(5)[:3])
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    run(DeltaArchive(str(tmp_path / "a")), memory)
    run(DeltaArchive(str(tmp_path / "b")), memory)
    assert ids(tmp_path / "a") == ids(tmp_path / "b")
    assert len(ids(tmp_path / "b")) == 8


def test_other_readers_take_the_table(tmp_path: Path) -> None:
    """A merge replaces files, and readers of the table count each row once."""
    archived(tmp_path)
    path = tmp_path / "bourse.trades"
    list(optimize(table(tmp_path), [TODAY]))
    assert DeltaTable(path).to_pandas()["event_id"].nunique() == len(DeltaTable(path).to_pandas()) == 5
    assert pl.scan_delta(str(path)).select(pl.len()).collect().item() == 5
    assert pl.scan_parquet(f"{path}/**/*.parquet").select(pl.len()).collect().item() == 10  # what the page warns about


def test_polls_are_optimized_by_their_day(tmp_path: Path) -> None:
    """They have no trading day."""
    memory = Memory()
    memory.append(*(marker(poll_sequence=number) for number in range(1, 6)))
    run(DeltaArchive(str(tmp_path), POLLS, commit_rows=2), memory, batch_size=2)
    found = table(tmp_path, "bourse.polls")
    assert list(optimize(found, unoptimized(found, LATER))) == [(TODAY, 3, 1, [])]
