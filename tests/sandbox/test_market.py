"""The markets of the practice exchange: the simulated one's properties, and the captured day's exact responses."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bourse_sandbox.market import (
    REAL_DAY,
    TEHRAN,
    CapturedDay,
    Market,
    Row,
    SimulatedMarket,
    is_trading_day,
    jalali,
    next_trading_day,
)
from bourse_schemas.errors import ConfigurationError

SATURDAY = date(2026, 11, 21)
SECOND_DAY = Path(__file__).parents[3] / "shared" / "data" / "day-2019-08-24.ndjson.gz"
TOTALS = ("TradeVolume", "TradeValue", "TradeQty")


def at(hour: int, minute: int = 0, day: date = SATURDAY) -> datetime:
    return datetime.combine(day, time(hour, minute), TEHRAN)


def minutes(day: date = SATURDAY) -> Iterator[datetime]:
    return (at(9, 0, day) + timedelta(minutes=minute) for minute in range(246))


def everything(market: Market, now: datetime) -> dict[str, Row]:
    return {row["TseSymbolCode"]: row for rights in (False, True) for row in market.rows(now, rights)}


def changes(before: Mapping[str, Row], after: Mapping[str, Row]) -> Counter[str]:
    """Count the changes as the contract names them, told from the rows alone."""
    counted: Counter[str] = Counter()
    for code, row in after.items():
        known = before.get(code)
        if known is None:
            counted["OPENED"] += 1
        elif any(row[name] < known[name] for name in TOTALS):
            counted["CANCELLED"] += 1
        elif any(row[name] > known[name] for name in TOTALS):
            counted["TRADED"] += 1
        elif {**row, "TradeDateGre": ""} != {**known, "TradeDateGre": ""}:
            counted["REVISED"] += 1
    return counted


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        (date(1979, 2, 11), "1357/11/22"),
        (date(2017, 3, 20), "1395/12/30"),
        (date(2018, 9, 22), "1397/06/31"),
        (date(2018, 9, 23), "1397/07/01"),
        (date(2019, 8, 21), "1398/05/30"),
        (date(2021, 3, 20), "1399/12/30"),
        (date(2025, 3, 21), "1404/01/01"),
        (date(2030, 3, 20), "1408/12/30"),
    ],
)
def test_jalali(day: date, expected: str) -> None:
    """Known days, leap years and both kinds of month among them."""
    assert jalali(day) == expected


@given(st.dates(date(1900, 1, 1), date(2200, 1, 1)))
def test_jalali_days_follow_each_other(day: date) -> None:
    """The day after is one more, or the first of the month after."""
    year, month, number = map(int, jalali(day).split("/"))
    following = {(year, month, number + 1), (year, month + 1, 1), (year + 1, 1, 1)}
    assert tuple(map(int, jalali(day + timedelta(days=1)).split("/"))) in following


def test_trading_days() -> None:
    """The market opens on Saturday to Wednesday, not on official holidays."""
    week = [SATURDAY + timedelta(days=number) for number in range(7)]
    assert [is_trading_day(day) for day in week] == [True] * 5 + [False] * 2
    assert not is_trading_day(date(2026, 3, 21))  # Nowruz, a Saturday
    assert next_trading_day(date(2026, 11, 25)) == date(2026, 11, 28)


@pytest.fixture(scope="module")
def day() -> list[dict[str, Row]]:
    """Every minute's state of one simulated day, shares and rights."""
    market = SimulatedMarket(1, SATURDAY)
    return [everything(market, now) for now in minutes()]


def test_nothing_is_traded_before_the_open(day: list[dict[str, Row]]) -> None:
    """An instrument appears after its first trade: none at 09:00, some a minute later, nearly all by the close."""
    assert not day[0]
    assert 100 < len(day[1]) < 600
    assert 650 < len(day[-1]) <= 660
    assert len({code for state in day for code in state}) == len(day[-1])


def test_instruments_look_real(day: list[dict[str, Row]]) -> None:
    """Codes, names, rights, 64-bit values and nulls are as on the real exchange."""
    rows = list(day[-1].values())
    rights = [row for row in rows if row["PrecedencyRight"]]
    assert len(rights) == 60
    assert all(re.fullmatch("IRR[A-Z0-9]{9}", row["TseSymbolCode"]) for row in rights)
    assert all(row["BourseSymbol"].endswith("ح") for row in rights)
    assert all(re.fullmatch("IRO[A-Z0-9]{9}", row["TseSymbolCode"]) for row in rows if not row["PrecedencyRight"])
    for unique in ("CoID", "TseSymbolCode", "BourseSymbol"):
        assert len({row[unique] for row in rows}) == len(rows)
    titles = "".join(row["FullTitle"] for row in rows)
    assert set("\u200cيكیک") <= set(titles)
    assert any(row["FullTitle"] != " ".join(row["FullTitle"].split()) for row in rows)
    assert max(row["TradeValue"] for row in rows) > 2**32
    assert any(row["PreviousClosingPrice"] is None for row in rows)
    assert all(row["Type"] is None for row in rows)
    assert {row["TradeDate"] for row in rows} == {"1405/08/30"}


def test_totals_fall_only_where_trades_are_annulled(day: list[dict[str, Row]]) -> None:
    """Every fall of a total is counted by the market, and a fall is all that is counted; highs come late at times."""
    market = SimulatedMarket(1, SATURDAY)
    everything(market, at(13, 5))
    seen: Counter[str] = sum((changes(*pair) for pair in pairwise(day)), Counter())
    assert 0 < market.annulments == seen["CANCELLED"] < 200
    assert seen["OPENED"] == len(day[-1])
    assert seen["REVISED"] > 0
    assert 40_000 < seen["TRADED"] < 120_000


def test_prices_are_plausible(day: list[dict[str, Row]]) -> None:
    """Ticks, limits and the volume-weighted closing price hold at every minute."""
    for row in (row for state in day for row in state.values()):
        previous, closing, last = row["PreviousClosingPrice"], row["ClosingPrice"], row["LastPrice"]
        assert row["minPrice"] <= row["MaxPrice"]
        assert min(row[name] for name in TOTALS) > 0
        if previous is not None:
            assert abs(last - previous) <= 0.1 * previous
            assert row["ClosingPriceChange"] == closing - previous
            assert min(previous, row["minPrice"] * 0.99) <= closing <= max(previous, row["MaxPrice"] * 1.01)
        if row["MaxPrice"] > 50_000 and row["TradeDateGre"][11:] < "12:45":
            assert last % 10 == 0


def test_the_market_is_lively(day: list[dict[str, Row]]) -> None:
    """A rule of one percent within five minutes trips in the first market minutes, but not for everything."""
    tripped = set()
    for start, end in zip(day[1:4], day[3:6], strict=True):
        tripped |= {code for code in start if abs(end[code]["LastPrice"] / start[code]["LastPrice"] - 1) >= 0.01}
    assert 5 < len(tripped) < 300


@settings(max_examples=10, deadline=None)
@given(st.integers(), st.lists(st.integers(0, 250), max_size=5))
def test_same_seed_same_market(seed: int, polled: list[int]) -> None:
    """The state depends on seed and time, not on how often it is looked at."""
    watched, skipped = SimulatedMarket(seed, SATURDAY, 40, 4), SimulatedMarket(seed, SATURDAY, 40, 4)
    for minute in sorted(polled):
        everything(watched, at(9) + timedelta(minutes=minute))
    sunday = at(10, 30, SATURDAY + timedelta(days=1))
    assert everything(watched, sunday) == everything(skipped, sunday)


def test_another_seed_is_another_market() -> None:
    """Two seeds share neither prices nor totals."""
    one, other = (everything(SimulatedMarket(seed, SATURDAY), at(11)) for seed in (1, 2))
    assert one != other


def test_the_next_day_starts_from_the_closing_prices() -> None:
    """The close before is the day before's closing price, totals start again, and after the weekend it is the same."""
    market = SimulatedMarket(3, date(2026, 11, 25))  # a Wednesday
    wednesday = everything(market, at(13, 4, date(2026, 11, 25)))
    assert everything(market, at(12, 0, date(2026, 11, 27))) == wednesday
    assert not everything(market, at(9, 0, date(2026, 11, 28)))
    saturday = everything(market, at(12, 30, date(2026, 11, 28)))
    both = wednesday.keys() & saturday.keys()
    assert len(both) > 600
    assert all(saturday[code]["PreviousClosingPrice"] == wednesday[code]["ClosingPrice"] for code in both)
    assert all(saturday[code]["TradeDateGre"].startswith("2026/11/28") for code in both)


def test_rows_come_by_company_and_unchanged_lists_are_shared() -> None:
    """Rows are sorted by CoID; within a minute the very same list comes back."""
    market = SimulatedMarket(1, SATURDAY)
    rows = market.rows(at(10), False)
    assert [row["CoID"] for row in rows] == sorted(row["CoID"] for row in rows)
    assert market.rows(at(10) + timedelta(seconds=59), False) is rows
    assert market.rows(at(10, 1), False) is not rows


def test_history_is_what_was_served(day: list[dict[str, Row]]) -> None:
    """The minute rows of one company are those seen at the time, later ones of a minute winning."""
    market = SimulatedMarket(1, SATURDAY)
    code = next(code for code, row in day[-1].items() if row["TradeQty"] > 500)
    served = {row["TradeDateGre"][11:16]: row for state in day if (row := state.get(code))}
    rows = market.history(at(13, 5), day[-1][code]["CoID"], "10:00", "11:29")
    assert rows == [row for minute, row in served.items() if "10:00" <= minute <= "11:29"]
    assert len(rows) > 10
    assert market.history(at(13, 5), 999_999_999, "00:00", "23:59") == []


def replayed(captured: CapturedDay) -> Counter[str]:
    before: dict[str, Row] = {}
    counted: Counter[str] = Counter()
    for moment in captured.times:
        rows = captured.rows(moment, False)
        assert [row["CoID"] for row in rows] == sorted(row["CoID"] for row in rows)
        after = {row["TseSymbolCode"]: row for row in rows}
        assert before.keys() <= after.keys()
        counted += changes(before, after)
        before = after
    return counted


def test_the_real_day_is_replayed_exactly() -> None:
    """The day that ships with the sandbox has 98 responses, and exactly the changes that are known of it."""
    captured = CapturedDay.load(REAL_DAY)
    assert captured.responses == len(captured.times) == 98
    assert captured.rows(captured.times[0] - timedelta(seconds=1), False) == []
    assert replayed(captured) == {"OPENED": 548, "TRADED": 18_711, "REVISED": 2, "CANCELLED": 85}
    assert captured.rows(captured.times[-1], True) == []
    assert captured.over(captured.times[-1])
    assert not captured.over(captured.times[-2])


@pytest.mark.skipif(not SECOND_DAY.exists(), reason=f"the second real day is not there: {SECOND_DAY}")
def test_the_second_real_day_is_replayed_exactly() -> None:
    """So has the day that is test data outside the project."""
    captured = CapturedDay.load(SECOND_DAY)
    assert captured.responses == 147
    assert replayed(captured) == {"OPENED": 541, "TRADED": 41_293, "REVISED": 16, "CANCELLED": 80}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no gzip", "gzipped"),
        (gzip.compress(b""), "no response"),
        (gzip.compress(b"{}\n"), "line 1"),
        (gzip.compress(b'{"received_at":"2019-08-21T10:57:17+04:30","changed":[]}\n{"rows":[]}\n'), "line 2"),
        (gzip.compress(b'{"received_at":"2019-08-21T10:57:17+04:30","changed":[]}\n' * 99)[:-12], "gzipped"),
        (gzip.compress(b"\xff\xfe\n"), "line 1"),
    ],
)
def test_a_file_that_is_no_capture(tmp_path: Path, content: bytes, says: str) -> None:
    """The error names the option, the file and what is wrong."""
    path = tmp_path / "day.ndjson.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"--replay .*day.ndjson.gz: .*{says}"):
        CapturedDay.load(path)


def test_a_capture_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is the operator's to find."""
    with pytest.raises(ConfigurationError, match=r"--replay .*nothing\.gz: .*No such file"):
        CapturedDay.load(tmp_path / "nothing.gz")
