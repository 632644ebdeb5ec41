"""`bourse minutes`: one call, its rows as table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from bourse_producer.minutes_command import minutes
from bourse_sandbox.exchange import PracticeExchange, practice_exchange
from bourse_schemas.errors import ConfigurationError

ACCOUNT = {"BOURSE_CLIENT_ID": "practice", "BOURSE_CLIENT_SECRET": "practice", "BOURSE_NID": "0123456789"}


@pytest.fixture(scope="module")
def practice() -> Iterator[tuple[PracticeExchange, str, int]]:
    """Run the real day to its end; return the exchange, its address and a company."""
    exchange = practice_exchange("real", "poll")
    for _ in range(60):
        exchange._clock.polled()
    rows = exchange._market.rows(exchange._clock.now(), rights=False)
    with exchange.serve() as server:
        yield exchange, server.url, max(rows, key=lambda row: int(row["TradeQty"]))["CoID"]


def ask(url: str, company: int, *options: str) -> Result:
    """Run the command."""
    runner = CliRunner()
    return runner.invoke(minutes, ["--address", url, "--company-id", str(company), *options], env=ACCOUNT)


def test_one_call_whose_rows_are_printed(practice: tuple[PracticeExchange, str, int]) -> None:
    """In three formats with the same rows, oldest first; stderr reports that the call is charged."""
    exchange, url, company = practice
    calls = exchange.calls
    table, text, lines = (ask(url, company, "--format", style) for style in ("table", "csv", "json"))
    assert exchange.calls == calls + 3
    for each in (table, text, lines):
        assert (each.exit_code, each.stderr) == (0, "making one call, which the exchange charges if it succeeds\n")
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [row["traded_at"] for row in rows] == sorted(row["traded_at"] for row in rows)
    assert {row["company_id"] for row in rows} == {company}
    assert rows[0]["traded_at"].startswith("2019-08-21T10:57")
    assert rows[0]["traded_at"].endswith("+04:30")
    read = list(csv.DictReader(io.StringIO(text.stdout)))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == read
    title, head, *printed = table.stdout.splitlines()
    assert rows[0]["symbol"] in title
    assert head.split() == ["time", "last", "open", "high", "low", "closing", "volume", "value", "trade_count"]
    assert len({len(line) for line in (head, *printed)}) == 1
    assert [line.split()[0] for line in printed] == [row["traded_at"][11:19] for row in rows]
    assert [line.split()[1].replace(",", "") for line in printed] == [str(row["last_price"]) for row in rows]


def test_a_period(practice: tuple[PracticeExchange, str, int]) -> None:
    """Of the day's minutes only some, or none."""
    _, url, company = practice
    lines = ask(url, company, "--from", "11:00", "--to", "1110", "--format", "json").stdout.splitlines()
    times = [json.loads(line)["traded_at"][11:16] for line in lines]
    assert times
    assert "11:00" <= min(times) <= max(times) <= "11:10"
    for options in (["--to", "0100"], ["--rights"]):
        none = ask(url, company, *options)
        assert (none.exit_code, none.stdout) == (0, "")
        assert none.stderr.splitlines()[1] == "no rows: is the company listed, and was it traded in this period?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "realTimeTrades"], "--profile realTimeTrades has no minute rows: use trades-realtime"),
        (["--from", "1000", "--to", "0900"], "--from 1000 is after --to 0900"),
    ],
)
def test_mistakes(practice: tuple[PracticeExchange, str, int], options: list[str], message: str) -> None:
    """A line, and no call."""
    exchange, url, company = practice
    calls = exchange.calls
    found = ask(url, company, *options).exception
    assert isinstance(found, ConfigurationError)
    assert (str(found), exchange.calls) == (message, calls)


@pytest.mark.parametrize("time", ["2400", "0960", "9", "now", "۰۹۰۰", "-900"])
def test_times(time: str) -> None:
    """Other than HHMM, with or without a colon, are mistakes."""
    found = ask("http://127.0.0.1:1", 1, "--from", time)
    assert (found.exit_code, "does not match the formats" in found.stderr) == (2, True)


def test_a_refusal(practice: tuple[PracticeExchange, str, int]) -> None:
    """The exchange's own words, and exit code 2."""
    _, url, company = practice
    runner = CliRunner()
    wrong = {**ACCOUNT, "BOURSE_CLIENT_SECRET": "wrong"}
    found = runner.invoke(minutes, ["--address", url, "--company-id", str(company)], env=wrong).exception
    assert isinstance(found, ConfigurationError)
    message = "the exchange gives no token: invalid client credentials"
    assert str(found) == f"the exchange refuses the call (token): {message}"
