"""The market of the practice exchange: a captured day, repeated over the trading days that follow.

The first day is served as captured. On each later day prices continue from the close of the day before, and every
second day moves the other way, so that prices stay in range. Where the capture has no subscription rights, one share in
ten gets a derived one. Read a market forwards: a time before the last one asked for gives the state of the later one.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from persiantools.jdatetime import JalaliDate

from bourse_producer.calendar import Calendar
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN

REAL_DAY: Final = Path(__file__).parent / "data" / "day-2019-08-21.ndjson.gz"
Row = dict[str, Any]
"""One instrument in the legacy shape. Rows are shared with the market: never change one."""

_RIGHT, _COPY = 500_000, 1_000_000  # added to the CoID of a derived right, and of each copy of a share


class _Response(msgspec.Struct):
    received_at: datetime
    changed: list[Row]


@cache
def jalali(day: date) -> str:
    """Return the Jalali date as `YYYY/MM/DD`."""
    return str(JalaliDate(day).strftime("%Y/%m/%d"))  # type: ignore[no-untyped-call]


class PracticeMarket:
    """What the practice exchange serves: the latest row of every instrument seen so far on the day.

    `lines` are a capture: one JSON object for each response, with the rows that differ from the response before.
    `days` is how many days there are, None for no end. `instruments` is how many shares and rights there are: they are
    cut, or copied under other codes. By default they are the capture's own.
    """

    def __init__(self, lines: Iterable[bytes], days: int | None = 1, instruments: int | None = None) -> None:
        self._captured: list[_Response] = []
        self._place: dict[str, int] = {}  # of each instrument, by its first appearance
        for number, line in enumerate(lines, 1):
            try:
                self._captured.append(msgspec.json.decode(line, type=_Response))
                for row in self._captured[-1].changed:
                    self._place.setdefault(row["TseSymbolCode"], len(self._place))
            except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
                raise ConfigurationError(f"line {number} is not a captured response: {error}") from None
        if not self._captured:
            raise ConfigurationError("no response in it; a capture has one JSON object on each line")
        self.times = [response.received_at.astimezone(TEHRAN) for response in self._captured]
        self.responses = None if days is None else days * len(self.times)
        self._derives_rights = not any(row["PrecedencyRight"] for each in self._captured for row in each.changed)
        self._shares = len(self._place)
        if instruments is not None:
            self._shares = instruments - instruments // 11 * self._derives_rights
        self._days = [self.times[0].date()]
        self._served = 0
        self._state: dict[str, Row] = {}
        self._closes: dict[str, int] = {}  # of the day before
        self._rows: dict[bool, list[Row]] = {False: [], True: []}

    @classmethod
    def load(cls, path: Path, days: int | None = 1, instruments: int | None = None) -> PracticeMarket:
        """Read a gzipped capture; raise ConfigurationError with the file and the line."""
        try:
            with gzip.open(path) as file:
                return cls(file, days, instruments)
        except ConfigurationError as error:
            raise ConfigurationError(f"--replay {path}: {error}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigurationError(f"--replay {path}: cannot be read as a gzipped capture: {error}") from None

    def moment(self, number: int) -> datetime:
        """Return when a response is received; they are counted from 0 over all days, and the last one is repeated."""
        day, index = divmod(number if self.responses is None else min(number, self.responses - 1), len(self.times))
        while len(self._days) <= day:
            opens = Calendar().next_session(datetime.combine(self._days[-1], self.times[-1].timetz()))
            self._days.append(opens.astimezone(TEHRAN).date())
        return self.times[index] + (self._days[day] - self._days[0])

    def rows(self, now: datetime, rights: bool) -> list[Row]:
        """Return each share, or right, seen today, by CoID: the same list as long as nothing changes."""
        before = self._served
        while self._served != self.responses and self.moment(self._served) <= now:
            day, index = divmod(self._served, len(self.times))
            if not index:
                self._closes |= {code: row["ClosingPrice"] for code, row in self._state.items()}
                self._state = {}
            self._state.update((row["TseSymbolCode"], row) for row in self._changed(day, index))
            self._served += 1
        if before != self._served:
            ordered = sorted(self._state.values(), key=lambda row: row["CoID"])
            self._rows = {right: [row for row in ordered if row["PrecedencyRight"] is right] for right in (False, True)}
        return self._rows[rights]

    def history(self, now: datetime, company: int, start: str, end: str) -> list[Row]:
        """Return one company's last row of every minute of today in [start, end], both `HH:MM`."""
        self.rows(now, rights=False)
        day, last = divmod(max(0, self._served - 1), len(self.times))
        seen = (row for index in range(last + 1) for row in self._changed(day, index, company % _RIGHT))
        latest = {row["TradeDateGre"][11:16]: row for row in seen if row["CoID"] == company and self._served}
        return [latest[minute] for minute in sorted(latest) if start <= minute <= end]

    def over(self, now: datetime) -> bool:
        """Return whether the last response of a day is the newest one."""
        self.rows(now, rights=False)
        return self._served > 0 and self._served % len(self.times) == 0

    def _changed(self, day: int, index: int, company: int | None = None) -> Iterator[Row]:
        """Return the rows that a response of a day changes, copies and rights included."""
        for captured in self._captured[index].changed:
            if company in {None, captured["CoID"]}:
                place = self._place[captured["TseSymbolCode"]]
                for copy, number in enumerate(range(place, self._shares, len(self._place))):
                    share = captured if not copy else _renamed(captured, _COPY * copy, "IRO", 1 + copy, f" {1 + copy}")
                    yield self._on(day, share)
                    if self._derives_rights and number % 10 == 9:
                        yield self._on(day, _renamed(share, _RIGHT, "IRR", 101 + copy, "ح") | {"PrecedencyRight": True})

    def _on(self, day: int, row: Row) -> Row:
        """Return a captured row as it is on a later day."""
        if not day:
            return row
        before = row["PreviousClosingPrice"] or row["OpeningPrice"] or row["LastPrice"]
        previous = self._closes.get(row["TseSymbolCode"], int(before or 0))
        falls = day % 2  # what rose on the day before falls

        def price(name: str) -> Any:
            return row[name] and max(1, round(previous * (before / row[name] if falls else row[name] / before)))

        today, closing = self._days[day], int(price("ClosingPrice") or previous)
        return row | {
            "TradeDateGre": f"{today:%Y/%m/%d}{row['TradeDateGre'][10:]}", "TradeDate": jalali(today),
            "OpeningPrice": price("OpeningPrice"), "LastPrice": price("LastPrice"), "ClosingPrice": closing,
            "MaxPrice": price(("MaxPrice", "minPrice")[falls]), "minPrice": price(("minPrice", "MaxPrice")[falls]),
            "TradeValue": round(row["TradeValue"] * previous / before), "PreviousClosingPrice": previous,
            "ClosingPriceChange": closing - previous, "ClosingPChgPercent": round(100 * closing / previous - 100, 2),
            "MarketValue": row["ShareCount"] and row["ShareCount"] * closing,
        }  # fmt: skip


def _renamed(row: Row, company: int, kind: str, suffix: int, mark: str) -> Row:
    """Return a row as another instrument's."""
    names = {name: f"{row[name]}{mark}" for name in ("BourseSymbol", "FullTitle")}
    return (
        row | names | {"CoID": row["CoID"] + company, "TseSymbolCode": f"{kind}{row['TseSymbolCode'][3:8]}{suffix:04}"}
    )
