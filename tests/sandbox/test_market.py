"""The market of the practice exchange: the captured day exactly, and the days that repeat it."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bourse_sandbox.market import REAL_DAY, PracticeMarket, Row, jalali
from bourse_schemas.errors import ConfigurationError

SECOND_DAY = Path(__file__).parents[3] / "shared" / "data" / "day-2019-08-24.ndjson.gz"
TOTALS = ("TradeVolume", "TradeValue", "TradeQty")


def everything(market: PracticeMarket, now: datetime) -> dict[str, Row]:
    return {row["TseSymbolCode"]: row for rights in (False, True) for row in market.rows(now, rights)}


def changes(before: Mapping[str, Row], after: Mapping[str, Row]) -> Counter[str]:
    """Count the changes as the contract names them, from the rows alone."""
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


CHANGES = {"OPENED": 548, "TRADED": 18_711, "REVISED": 2, "CANCELLED": 85}


def day_of(market: PracticeMarket, number: int, rights: bool = False) -> tuple[Counter[str], list[Row]]:
    """Return what changes on a day of the market, counted from 0, and its last rows."""
    before: dict[str, Row] = {}
    counted: Counter[str] = Counter()
    rows: list[Row] = []
    for index in range(len(market.times)):
        rows = market.rows(market.moment(number * len(market.times) + index), rights)
        assert [row["CoID"] for row in rows] == sorted(row["CoID"] for row in rows)
        after = {row["TseSymbolCode"]: row for row in rows}
        assert before.keys() <= after.keys()
        counted += changes(before, after)
        before = after
    return counted, rows


def test_later_days_repeat_the_first() -> None:
    """On the next trading days, weekend skipped, with the same changes, each price continued from the day before."""
    market = PracticeMarket.load(REAL_DAY, days=None)
    days = [day_of(market, number) for number in range(4)]
    assert [counted for counted, _ in days] == [CHANGES] * 4
    dates = [rows[0]["TradeDateGre"][:10] for _, rows in days]
    assert dates == ["2019/08/21", "2019/08/24", "2019/08/25", "2019/08/26"]
    assert [rows[0]["TradeDate"] for _, rows in days][1:] == ["1398/06/02", "1398/06/03", "1398/06/04"]
    for (_, yesterday), (_, today) in pairwise(days):
        closes = {row["TseSymbolCode"]: row["ClosingPrice"] for row in yesterday}
        for row in today:
            assert row["PreviousClosingPrice"] == closes[row["TseSymbolCode"]]
            assert row["ClosingPriceChange"] == row["ClosingPrice"] - row["PreviousClosingPrice"]
            assert row["minPrice"] <= row["LastPrice"] <= row["MaxPrice"] or row["MaxPrice"] == 0


def test_prices_stay_in_range_for_years() -> None:
    """Every second day moves the other way: after 200 days a price is near the first day's."""
    market = PracticeMarket.load(REAL_DAY, days=None, instruments=30)
    first = {row["TseSymbolCode"]: row["ClosingPrice"] for row in market.rows(market.moment(97), rights=False)}
    later = {
        row["TseSymbolCode"]: row["ClosingPrice"] for row in market.rows(market.moment(200 * 98 + 97), rights=False)
    }
    assert first.keys() == later.keys()
    assert all(abs(later[code] / first[code] - 1) < 0.01 for code in first)


def test_one_share_in_ten_has_a_right() -> None:
    """With a code, a symbol and a company of its own, on every day; the shares are as captured."""
    market = PracticeMarket.load(REAL_DAY, days=None)
    (counted, rights), (_, later) = day_of(market, 0, rights=True), day_of(market, 1, rights=True)
    assert counted["OPENED"] == len(rights) == len(later) == 54
    shares = {row["TseSymbolCode"][3:8]: row for row in market.rows(market.moment(2 * 98 - 1), rights=False)}
    for right in later:
        share = shares[right["TseSymbolCode"][3:8]]
        assert right["TseSymbolCode"] == f"IRR{share['TseSymbolCode'][3:8]}0101"
        assert right["BourseSymbol"] == share["BourseSymbol"] + "ح"
        assert right["PrecedencyRight"] is True
        assert right["CoID"] != share["CoID"]


@pytest.mark.parametrize("count", [1, 5, 22, 660, 2000])
def test_its_size_can_be_chosen(count: int) -> None:
    """Shares and rights together, each code and company once."""
    market = PracticeMarket.load(REAL_DAY, days=1, instruments=count)
    rows = everything(market, market.times[-1])
    assert len(rows) == len({row["CoID"] for row in rows.values()}) == count
    assert all(re.fullmatch("IR[OR][0-9][A-Z0-9]{4}[0-9]{4}", code) for code in rows)


def test_the_list_is_the_same_while_nothing_changes() -> None:
    """So that it is encoded once; rows of the day before remain until the first response of the next day."""
    market = PracticeMarket.load(REAL_DAY, days=2)
    rows = market.rows(market.times[5], rights=False)
    assert market.rows(market.times[5] + timedelta(seconds=1), rights=False) is rows
    assert market.rows(market.times[4], rights=False) is rows
    last = market.rows(market.times[-1], rights=False)
    assert market.rows(market.moment(98) - timedelta(seconds=1), rights=False) is last
    assert market.rows(market.moment(98), rights=False)[0]["TradeDateGre"].startswith("2019/08/24")


@pytest.mark.parametrize("number", [0, 1])
def test_history_is_what_was_served(number: int) -> None:
    """The minute rows of one company are those seen at the time; a later row of a minute replaces an earlier one."""
    served, market = PracticeMarket.load(REAL_DAY, None, 700), PracticeMarket.load(REAL_DAY, None, 700)
    for rights, position in ((False, 3), (False, -1), (True, 2)):
        company = served.rows(served.moment(number * 98 + 97), rights)[position]["CoID"]
        seen = PracticeMarket.load(REAL_DAY, None, 700)
        latest: dict[str, Row] = {}
        for index in range(98):
            rows = seen.rows(seen.moment(number * 98 + index), rights)
            latest.update((row["TradeDateGre"][11:16], row) for row in rows if row["CoID"] == company)
        wanted = [latest[minute] for minute in sorted(latest) if "11:00" <= minute <= "12:10"]
        assert market.history(market.moment(number * 98 + 97), company, "11:00", "12:10") == wanted
        assert wanted
    assert market.history(market.moment(number * 98 + 97), 999_999_999, "00:00", "23:59") == []
    assert PracticeMarket.load(REAL_DAY).history(served.times[0] - timedelta(hours=1), 1, "00:00", "23:59") == []


def test_the_real_day_is_replayed_exactly() -> None:
    """The day that ships with the sandbox has 98 responses, and exactly the changes that are known of it."""
    market = PracticeMarket.load(REAL_DAY)
    assert market.responses == len(market.times) == 98
    assert market.rows(market.times[0] - timedelta(seconds=1), rights=False) == []
    assert not market.over(market.times[-2])
    assert market.over(market.times[-1])
    assert day_of(PracticeMarket.load(REAL_DAY), 0)[0] == CHANGES


@pytest.mark.skipif(not SECOND_DAY.exists(), reason=f"the second real day is not there: {SECOND_DAY}")
def test_the_second_real_day_is_replayed_exactly() -> None:
    """So does the day that is test data outside the project."""
    market = PracticeMarket.load(SECOND_DAY)
    assert market.responses == 147
    assert day_of(market, 0)[0] == {"OPENED": 541, "TRADED": 41_293, "REVISED": 16, "CANCELLED": 80}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no gzip", "gzipped"),
        (gzip.compress(b""), "no response"),
        (gzip.compress(b"{}\n"), "line 1"),
        (gzip.compress(b'{"received_at":"2019-08-21T10:57:17+04:30","changed":[]}\n{"rows":[]}\n'), "line 2"),
        (gzip.compress(b'{"received_at":"2019-08-21T10:57:17+04:30","changed":[]}\n' * 99)[:-12], "gzipped"),
        (gzip.compress(b"\xff\xfe\n"), "line 1"),
    ],
)
def test_a_file_that_is_no_capture(tmp_path: Path, content: bytes, reason: str) -> None:
    """The error names the option, the file and what is wrong."""
    path = tmp_path / "day.ndjson.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"--replay .*day.ndjson.gz: .*{reason}"):
        PracticeMarket.load(path)


def test_a_capture_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is named."""
    with pytest.raises(ConfigurationError, match=r"--replay .*nothing\.gz: .*No such file"):
        PracticeMarket.load(tmp_path / "nothing.gz")
