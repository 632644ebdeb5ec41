"""The markets a practice exchange can serve: a simulated one, and a day that happened.

Pure but for `CapturedDay.load`: time arrives as an argument, and the same seed and time give the same rows. A market is
read forwards: a time before one already asked for gives the state of the later one.
"""

from __future__ import annotations

import copy
import gzip
import math
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
from persiantools.jdatetime import JalaliDate

from bourse_producer.calendar import Calendar
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN

__all__ = [
    "REAL_DAY",
    "TEHRAN",
    "CapturedDay",
    "Market",
    "Row",
    "SimulatedMarket",
    "is_trading_day",
    "jalali",
    "next_trading_day",
]

REAL_DAY: Final = Path(__file__).parent / "data" / "day-2019-08-21.ndjson.gz"

Row = dict[str, Any]
"""One instrument in the legacy shape. Rows are shared with the market: never change one."""

# Minutes after midnight. What is traded in one minute is seen from the next one on.
_OPEN: Final = 9 * 60
_CLOSE: Final = 12 * 60 + 30
_AT_LAST: Final = 12 * 60 + 45
_END: Final = 13 * 60
_QUIET: Final = _END + 4  # until here trades may still be annulled


class Market(Protocol):
    """What the practice exchange serves."""

    responses: int | None
    """How many responses the market has in all; None where it never ends."""

    def rows(self, now: datetime, rights: bool) -> list[Row]:
        """Return the last state of each share, or right, traded today, by CoID: the same list while nothing changed."""

    def history(self, now: datetime, company: int, start: str, end: str) -> list[Row]:
        """Return one company's last row of every minute of today in [start, end], both `HH:MM`, totals cumulative."""

    def over(self, now: datetime) -> bool:
        """Tell whether the trading day has ended."""


is_trading_day = Calendar().is_trading_day


def next_trading_day(day: date) -> date:
    """Return the first trading day after `day`."""
    day += timedelta(days=1)
    while not is_trading_day(day):
        day += timedelta(days=1)
    return day


@cache
def jalali(day: date) -> str:
    """Return the Jalali date as `YYYY/MM/DD`."""
    return str(JalaliDate(day).strftime("%Y/%m/%d"))  # type: ignore[no-untyped-call]


class _CapturedRow(msgspec.Struct):
    company: int = msgspec.field(name="CoID")
    code: str = msgspec.field(name="TseSymbolCode")
    time: str = msgspec.field(name="TradeDateGre")
    right: bool = msgspec.field(name="PrecedencyRight")


class _Captured(msgspec.Struct):
    received_at: datetime
    changed: list[_CapturedRow]


class _Line(msgspec.Struct):
    changed: list[Row]


class CapturedDay:
    """A day that happened, as captured: a line a response, each with what differs from the response before.

    A response is the latest row of every instrument seen so far, at `times[i]`.
    """

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = list(lines)
        self.times: list[datetime] = []
        for line in self._lines:
            try:
                self.times.append(msgspec.json.decode(line, type=_Captured).received_at.astimezone(TEHRAN))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"line {len(self.times) + 1} is no captured response: {error}") from None
        if not self.times:
            raise ConfigurationError("there is no response in it; a capture has one JSON object a line")
        self.responses: int | None = len(self.times)
        self._served = 0
        self._state: dict[str, Row] = {}
        self._rows: dict[bool, list[Row]] = {False: [], True: []}

    @classmethod
    def load(cls, path: Path) -> CapturedDay:
        """Read a gzipped capture; raise `ConfigurationError` naming the file and the line at fault."""
        try:
            with gzip.open(path) as file:
                return cls(file)
        except ConfigurationError as error:
            raise ConfigurationError(f"--replay {path}: {error}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigurationError(f"--replay {path}: cannot be read as a gzipped capture: {error}") from None

    def _advance(self, now: datetime) -> None:
        until = bisect_right(self.times, now)
        if until <= self._served:
            return
        for line in self._lines[self._served : until]:
            self._state.update((row["TseSymbolCode"], row) for row in msgspec.json.decode(line, type=_Line).changed)
        self._served = until
        ordered = sorted(self._state.values(), key=lambda row: row["CoID"])
        self._rows = {right: [row for row in ordered if row["PrecedencyRight"] is right] for right in (False, True)}

    def rows(self, now: datetime, rights: bool) -> list[Row]:
        """See `Market`."""
        self._advance(now)
        return self._rows[rights]

    def history(self, now: datetime, company: int, start: str, end: str) -> list[Row]:
        """See `Market`."""
        self._advance(now)
        changed = (msgspec.json.decode(line, type=_Line).changed for line in self._lines[: self._served])
        return _by_minute((row for rows in changed for row in rows if row["CoID"] == company), start, end)

    def over(self, now: datetime) -> bool:
        """Tell whether the last response has its turn."""
        return now >= self.times[-1]


def _by_minute(rows: Iterable[Row], start: str, end: str) -> list[Row]:
    latest = {row["TradeDateGre"][11:16]: row for row in rows}
    return [latest[minute] for minute in sorted(latest) if start <= minute <= end]


_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15


def _mix(number: int) -> int:
    """Return 64 well mixed bits: a draw by place (instrument, day, minute), not by order, so any can be repeated."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


class _Instrument:
    """One instrument's day, prices in rial; high and low as `seen_` on the exchange are a refresh late at times."""

    def __init__(self, key: int, company: int, code: str, symbol: str, title: str, *, right: bool) -> None:
        bits = _mix(key)
        self.key, self.company, self.code, self.right = key, company, code, right
        self.symbol, self.title = symbol, title
        spread = (bits & 0xFFFF) / 65536
        self.born = int(400 * 250**spread)  # 400 to 100,000 rial
        self.tick = 1 if self.born < 20_000 else 10
        self.activity = 1500 + (bits >> 16 & 0xFFFF) * 62000 // 65536  # of 65536: chance to trade in a minute
        self.swing = 0.0008 + 0.01 * ((bits >> 32 & 0xFFFF) / 65536) ** 2  # a minute's largest move
        self.size = 2_000_000 // self.born * (2 + self.activity // 4096) + 20
        self.base_volume = self.size * 4
        self.reach = 0.10 if right else 0.03 if code.startswith("IRO7") else 0.05
        self.shares = None if right else (1 + (bits >> 48)) * 5_000_000
        self.previous: int | None = None if bits % 97 == 0 else self.born // self.tick * self.tick
        self.begin(date.min)

    def begin(self, day: date) -> None:
        """Start a day from the closing price of the day before."""
        self.day = f"{day:%Y/%m/%d}"
        self.jalali = jalali(day) if day > date.min else ""
        self.day_key = _mix(self.key ^ (day.toordinal() * _STEP & _MASK))
        self.open = self.high = self.low = self.seen_high = self.seen_low = self.volume = self.value = self.count = 0
        self.time, self.late = "", False
        self.row: Row | None = None
        self.last = self.born if self.previous is None else self.previous
        reach = self.reach if self.previous is not None else 0.5  # a first day has no close before it to be limited by
        ticks = self.last / self.tick
        self.limits = math.ceil(ticks * (1 - reach)) * self.tick, math.floor(ticks * (1 + reach)) * self.tick
        bits = _mix(self.day_key)
        start = _OPEN + bits % 180
        self.halt = range(start, start + 20 + (bits >> 8) % 70) if bits >> 48 < 2000 else range(0)

    def closing(self) -> int:
        """Return the volume-weighted average, pulled towards the close before while the base volume is not reached."""
        average = self.value / self.volume
        if self.previous is not None and self.volume < self.base_volume:
            average = self.previous + (average - self.previous) * self.volume / self.base_volume
        return round(average)

    def minute(self, minute: int) -> bool:
        """Trade through one minute; True where trades were annulled in it, the only time totals fall."""
        bits = _mix(self.day_key + minute * _STEP & _MASK)
        chance, event, draw = bits & 0xFFFF, bits >> 48, bits >> 32 & 0xFFFF
        if self.late:
            self.seen_high, self.seen_low, self.late, self.row = self.high, self.low, False, None
        if self.count > 1 and event < (100 if minute >= _CLOSE else 12):
            part = (draw / 65536) ** 6  # most lose little, a few nearly everything
            volume = min(self.volume - 1, 1 + int(self.volume * part))
            self.value -= max(1, self.value * volume // self.volume)
            self.volume -= volume
            self.count -= min(self.count - 1, 1 + int(self.count * part))
            self.row = None
            return True
        if minute < _CLOSE:
            if chance >= self.activity or minute in self.halt:
                return False
            move = ((bits >> 16 & 0xFFFF) / 32768 - 1) * self.swing
            if not self.count:
                move *= 5  # the opening auction has the whole night's news
            elif event > 65000 or minute < _OPEN + 10:
                move *= 2.5
            low, high = self.limits
            price = min(high, max(low, round(self.last * (1 + move) / self.tick) * self.tick))
        elif not (self.count and _AT_LAST <= minute < _END and chance < self.activity // 4):
            return False
        else:
            price = self.closing()
        first = not self.count
        trades = 1 + (draw * draw >> 27)
        volume = trades + int(self.size * (draw / 32768) ** 3)
        self.value += volume * (price if first else (self.last + price) // 2)
        self.volume += volume
        self.count += trades
        self.last = price
        if first:
            self.open = self.high = self.low = self.seen_high = self.seen_low = price
        self.high, self.low = max(self.high, price), min(self.low, price)
        self.late = not first and event % 128 == 0 and (self.high, self.low) != (self.seen_high, self.seen_low)
        if not self.late:
            self.seen_high, self.seen_low = self.high, self.low
        self.time = f"{self.day} {minute // 60:02}:{minute % 60:02}:{draw % 60:02}"
        self.row = None
        return False

    def as_row(self) -> Row:
        """Return the state in the legacy shape."""
        if self.row is None:
            closing, previous = self.closing(), self.previous
            change = None if previous is None else closing - previous
            self.row = {
                "CoID": self.company, "BourseSymbol": self.symbol, "TseSymbolCode": self.code, "FullTitle": self.title,
                "PrecedencyRight": self.right, "TradeDateGre": self.time, "TradeDate": self.jalali,
                "MaxPrice": self.seen_high, "minPrice": self.seen_low, "OpeningPrice": self.open,
                "ClosingPrice": closing, "LastPrice": self.last, "TradeVolume": self.volume, "TradeValue": self.value,
                "TradeQty": self.count, "PreviousClosingPrice": previous, "ClosingPriceChange": change,
                "ClosingPChgPercent": None if change is None or not previous else round(100 * change / previous, 2),
                "ShareCount": self.shares, "MarketValue": self.shares and self.shares * closing, "Type": None,
            }  # fmt: skip
        return self.row


# fmt: off
_SECTORS: Final = (
    ("سیمان", "س"), ("پتروشیمی", "ش"), ("سرمایه گذاری", "و"), ("بانک", "وب"), ("قند", "ق"), ("داروسازی", "د"),
    ("فولاد", "ف"), ("صنایع کاشی", "ک"), ("بیمه", "بی"), ("نساجی", "ن"), ("لیزینگ", "ول"), ("معادن", "کم"),
    ("نیروگاه", "بک"), ("صنایع غذایی", "غ"), ("حمل و نقل", "ح"), ("گروه خودروسازی", "خ"), ("کشت و صنعت", "ز"),
    ("فناوری اطلاعات", "ر"), ("پالایش نفت", "شپ"), ("کارخانجات تولیدی", "ت"),
)
_NAMES: Final = (
    "آذرخش", "سپیدار", "شبدیز", "کهربا", "نیلوفر", "ارغوان", "شقایق", "یاقوت", "زمرد", "کیمیا", "سحرگاه", "مهتاب",
    "آفتاب", "نسترن", "چکاوک", "سیمرغ", "ققنوس", "شاهین", "کبوتر", "مروارید", "فیروزه", "لاجورد", "بنفشه", "یاسمن",
    "کوهسار", "چشمه", "رودبار", "سایه", "پگاه", "شکوفه", "ستاره", "کیوان", "ناهید", "بهرام",
)
# fmt: on


def _listing(seed: int, shares: int, rights: int) -> Iterable[_Instrument]:
    """Make up the instruments in CoID order: names and codes like the real ones, each code once."""
    for number in range(shares):
        bits = _mix(_mix(seed & _MASK) + number * _STEP & _MASK)
        pair, (sector, prefix) = number // len(_SECTORS), _SECTORS[number % len(_SECTORS)]
        name, series = _NAMES[pair % len(_NAMES)], pair // len(_NAMES) + 1
        title, symbol = f"{sector} {name}", prefix + name[:4]
        if series > 1:
            title, symbol = f"{title} {series}", f"{symbol}{series}"
        if bits % 4 == 0:  # as the exchange does: letters of the Arabic keyboard, joiners, stray spaces
            symbol, title = (text.replace("ی", "ي").replace("ک", "ك") for text in (symbol, title))
        elif bits % 4 == 1:
            title = title.replace(" ", "\u200c", 1)
        elif bits % 31 == 2:
            title = title.replace(" ", "  ") + " "
        mixed = (number * 190_027 + 77_777) % 26**4  # 190,027 has no factor in common with 26: each comes once
        letters = "".join(chr(65 + mixed // 26**power % 26) for power in range(4))
        company = 1 + number * 23 + bits % 11
        board = "IRO7" if bits % 5 == 0 else "IRO3" if bits % 5 == 1 else "IRO1"
        yield _Instrument(bits, company, f"{board}{letters}0001", symbol, title, right=False)
        if number * rights // shares != (number + 1) * rights // shares:
            code, symbol, title = f"IRR{board[3]}{letters}0101", f"{symbol}ح", f"ح . {title}"
            yield _Instrument(_mix(bits), company + 11, code, symbol, title, right=True)


class SimulatedMarket:
    """A made-up market: plausible, seeded, the same for the same seed, first day and time.

    Refreshed on every full minute from 09:01 on. `first_day` is moved on to a trading day; on it every instrument
    starts at its seeded price, later days start from the closing prices of the day before. Before the first trade of a
    day there are no rows; on closed days and at night those of the day before. At most one right a share.
    """

    responses: int | None = None

    def __init__(self, seed: int, first_day: date, shares: int = 600, rights: int = 60) -> None:
        self._instruments = list(_listing(seed, shares, min(shares, rights)))
        self.annulments = 0
        """How often totals fell, over all instruments and minutes so far."""
        self._begin(next_trading_day(first_day - timedelta(days=1)))

    def _begin(self, day: date) -> None:
        self._day, self._minute = day, _OPEN
        self._rows: dict[bool, list[Row]] = {False: [], True: []}
        for instrument in self._instruments:
            if instrument.count:
                instrument.previous = instrument.closing()
            instrument.begin(day)

    def _trade(self, until: int) -> None:
        if until <= self._minute:
            return
        for minute in range(self._minute, until):
            self.annulments += sum([instrument.minute(minute) for instrument in self._instruments])
        self._minute = until
        traded = [instrument for instrument in self._instruments if instrument.count]
        self._rows = {right: [i.as_row() for i in traded if i.right is right] for right in (False, True)}

    def _advance(self, now: datetime) -> None:
        local = now.astimezone(TEHRAN)
        while self._day < local.date() and (day := next_trading_day(self._day)) <= local.date():
            self._trade(_QUIET)
            self._begin(day)
        if self._day <= local.date():
            self._trade(_QUIET if self._day < local.date() else min(_QUIET, local.hour * 60 + local.minute))

    def rows(self, now: datetime, rights: bool) -> list[Row]:
        """See `Market`."""
        self._advance(now)
        return self._rows[rights]

    def history(self, now: datetime, company: int, start: str, end: str) -> list[Row]:
        """See `Market`: trades the one instrument's day once more, so that no day has to be kept."""
        self._advance(now)
        rows = []
        for instrument in [copy.copy(each) for each in self._instruments if each.company == company]:
            instrument.begin(self._day)
            for minute in range(_OPEN, self._minute):
                instrument.minute(minute)
                if instrument.count and instrument.row is None:
                    rows.append(instrument.as_row())
        return _by_minute(rows, start, end)

    def over(self, now: datetime) -> bool:
        """Tell whether trading has ended for the day."""
        local = now.astimezone(TEHRAN)
        return local.hour * 60 + local.minute >= _END
