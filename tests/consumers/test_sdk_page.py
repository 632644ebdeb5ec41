"""docs/consumers.md: every block of code runs, and every consumer in it keeps the contract."""

from __future__ import annotations

import gc
import re
import sqlite3
import tomllib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bourse_consumers import api
from bourse_consumers.testing import ConsumerContract, Memory, marker, run, trade
from bourse_schemas.events import DeadLetter, Event

PAGE = (Path(__file__).parents[2] / "docs/consumers.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def _page() -> dict[str, Any]:
    """Run each block by itself; those about tests use the consumers before them."""
    names: dict[str, Any] = {}
    for language, code in BLOCKS:
        if language == "python":
            alone = dict(names) if "bourse_consumers.testing" in code else {}
            exec(compile(code, "docs/consumers.md", "exec", dont_inherit=True), alone)
            names |= alone
    return names


page = _page()


def test_every_block_is_tried() -> None:
    """Python runs above; the rest is TOML."""
    others = [tomllib.loads(code) for language, code in BLOCKS if language != "python"]
    assert others == [{"project": {"entry-points": {"bourse.consumers": {"turnover": "my_package:turnover"}}}}]
    assert len(BLOCKS) == 9


def test_the_command_returns_the_consumer() -> None:
    """With the option it declares."""
    result = CliRunner().invoke(page["turnover"], ["--rial", "7"], standalone_mode=False)
    assert (type(result.return_value), result.return_value.rial) == (page["Turnover"], 7)


def test_every_name_of_the_sdk_that_authors_use_is_on_the_page() -> None:
    """What the page does not name is of no use to its reader."""
    internal = {"Health", "Member", "Places", "Record", "Records", "Start", "Unreadable"}
    assert [name for name in api.__all__ if name not in internal and f"{name}" not in PAGE] == []


def test_resume_publishes_what_it_should() -> None:
    """Rights only."""
    memory = Memory()
    memory.append(trade(is_right=True), trade(sequence=2))
    run(page["Rights"](), memory)
    assert [emit.event.sequence for emit in memory.emitted] == [1]  # type: ignore[attr-defined]


def test_errors_do_what_the_table_promises() -> None:
    """A price that is refused becomes a dead letter, a service that is down is waited for."""
    sent: list[int] = []
    failures = [ConnectionError("down")]

    def send(_: str, price: int) -> bool:
        if failures:
            raise failures.pop()
        sent.append(price)
        return price != 6

    memory = Memory()
    memory.append(trade(last_price=5), trade(sequence=2, last_price=6), trade(sequence=3, last_price=7))
    run(page["Prices"](send), memory)
    assert sent[-2:] == [5, 7]
    assert [type(emit.event) for emit in memory.emitted] == [DeadLetter]


def test_whole_polls(capsys: pytest.CaptureFixture[str]) -> None:
    """The market consumer prints one line a poll."""
    memory = Memory()
    first = trade(last_price=5400, previous_close=5500)
    second = trade(sequence=2, last_price=5600, previous_close=5500)
    memory.append(first, marker(first), second, marker(second))
    run(page["Breadth"](), memory)
    printed = [line for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"\d+ \d+", line)]
    assert printed == ["1 1", "2 0"]


class TestActive(ConsumerContract):
    """`Rebuild`."""

    def make(self, folder: Path) -> api.Consumer:
        consumer: api.Consumer = page["Active"]()
        consumer.every = 2  # type: ignore[attr-defined]  # the page's
        return consumer

    def events(self) -> Sequence[Event]:
        return [trade(sequence=number) for number in range(1, 6)]


class TestTable(ConsumerContract):
    """`Own`, by the page's own test."""

    def make(self, folder: Path) -> api.Consumer:
        gc.collect()  # connections of consumers that were killed
        folder.mkdir(parents=True, exist_ok=True)
        consumer: api.Consumer = page["Table"](str(folder / "table.db"))
        return consumer

    def events(self) -> Sequence[Event]:
        events: list[Event] = page["TestTable"]().events()
        return events

    def outcome(self, memory: Memory, folder: Path) -> object:
        with closing(sqlite3.connect(folder / "table.db")) as db:
            return db.execute("SELECT * FROM changes ORDER BY 1").fetchall()
