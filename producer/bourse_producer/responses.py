"""What the exchange's responses mean. Pure: bytes in, values out.

Source: the exchange's documentation and captured trading days; docs/exchange.md describes both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from bourse_producer.diff import RejectedRow, Snapshot
from bourse_schemas.errors import ExchangeError, ExchangeNonsense, ExchangeRefused, ExchangeUnavailable
from bourse_schemas.events import TEHRAN, Candle, Reason, tidy

__all__ = [
    "PROFILES",
    "SOURCE",
    "TRADES_REALTIME",
    "Profile",
    "Reading",
    "merge",
    "parse",
    "parse_minutes",
    "refusal",
]

FUTURE = timedelta(minutes=5)
DAY_SECONDS = 86_400.0
# An error body is short; a market is not.
SHORT = 10_000


@dataclass(frozen=True, slots=True)
class Profile:
    """One of the exchange's services: where it is, what it asks for, and how its rows differ.

    With `one_call` shares and rights come together, each row saying which it is; with `dates_only` a trade time at
    midnight is a date and nothing more.
    """

    name: str
    source: str
    path: str
    scope: str
    addresses: Mapping[str, str]
    one_call: bool = False
    dates_only: bool = False


TRADES_REALTIME = Profile(
    name="trades-realtime",
    source="finnotech/trades-realtime",
    path="trades/realtime",
    scope="bourse:trades-realtime:get",
    addresses={"production": "https://apibeta.finnotech.ir", "sandbox": "https://sandboxapi.finnotech.ir"},
)
PROFILES = {
    profile.name: profile
    for profile in (
        TRADES_REALTIME,
        Profile(
            name="realTimeTrades",
            source="finnotech/real-time-trades",
            path="realTimeTrades",
            scope="bourse:realTime-trades:get",
            addresses={"production": "https://api.finnotech.ir", "sandbox": "https://sandboxapi.finnotech.ir"},
            one_call=True,
            dates_only=True,
        ),
    )
}
SOURCE = TRADES_REALTIME.source


Rial = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Signed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
# Brokers refuse records above a megabyte: no text, and no dead letter, may come near it.
Text = Annotated[str, Meta(max_length=1000)]
MOST_PAYLOAD, MOST_MESSAGE = 100_000, 1000


class _Row(Struct):
    """A row as documented. No field has a default, so that a renamed one is noticed and read by the patient way."""

    CoID: Signed | None
    BourseSymbol: Text
    TseSymbolCode: Text
    FullTitle: Text
    PrecedencyRight: bool | None
    TradeDateGre: Text
    TradeDate: Text | None
    MaxPrice: Rial | None
    minPrice: Rial | None  # noqa: N815  # the API's own spelling
    OpeningPrice: Rial | None
    ClosingPrice: Rial | None
    LastPrice: Rial | None
    TradeVolume: Rial
    TradeValue: Rial
    TradeQty: Rial
    PreviousClosingPrice: Rial | None
    ClosingPriceChange: Signed | None
    ClosingPChgPercent: float | None
    ShareCount: Rial | None
    MarketValue: Rial | None
    Type: Any


class _Envelope(Struct):
    result: Raw | UnsetType = UNSET
    state: str | None = None
    status: str | None = None


_envelope = msgspec.json.Decoder(_Envelope)
_rows = msgspec.json.Decoder(list[_Row])
_raw_rows = msgspec.json.Decoder(list[Raw])
_anything = msgspec.json.Decoder()

# The names in any case, and what the successor calls them.
_NAMES = {name.lower(): name for name in _Row.__struct_fields__} | {
    "tradedateger": "TradeDateGre",
    "gregoriandate": "TradeDateGre",
    "jalaalidate": "TradeDate",
    "companyid": "CoID",
    "companysymbol": "BourseSymbol",
    "closingpricechangepercent": "ClosingPChgPercent",
    "sharedcount": "ShareCount",
}
_TEXTS = {"BourseSymbol", "TseSymbolCode", "FullTitle", "TradeDateGre", "TradeDate", "Type", "PrecedencyRight"}
_CODE = re.compile(r"[A-Z0-9]{12}")
# No part of JSON, but some gateways put one there.
_BOM = b"\xef\xbb\xbf"
# What a decoder says of bytes that are no JSON, no UTF-8, or nested beyond reason.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]*)?([eE][+-]?[0-9]{1,4})?")
_FN_CODE = re.compile(rb'"FN-[A-Z]{4}-(\d{3})\d{8}"')
_ADDRESS_WORDS = re.compile(r"\bip\b|\baddress\b|white ?-?list|آی[ \u200c]?پی|نشانی|آدرس")
_TIME = re.compile(r"(\d{4})[/-](\d{1,2})[/-](\d{1,2})[ T](\d{1,2}):(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a response does not say of itself.

    `received_at` is when it arrived; `dated` is its `Date` header, or our clock where it had none; `track_id` is what
    was sent with the call, `is_right` which of the two calls it was; `profile` is a profile's name.
    """

    poll_sequence: int
    received_at: datetime
    dated: datetime
    session_day: date | None
    is_right: bool
    track_id: str
    profile: str = TRADES_REALTIME.name


class _BadRow(Exception):
    def __init__(self, reason: Reason, message: str, field_name: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field_name


def parse(body: bytes, context: Reading) -> Snapshot:
    """Return what a response says.

    Raises ExchangeNonsense when the body is no response, and the matching ExchangeError when it says that the call
    failed. A row that cannot be used is in `rejected`; the others count.
    """
    candles, rejected, oddities = _read(body, context)
    best, duplicates = _best(candles)
    rows = len(candles) + len(rejected)
    return Snapshot(best, context.received_at, context.session_day, rejected, rows, duplicates, oddities)


def parse_minutes(body: bytes, context: Reading) -> list[Candle]:
    """Return the usable rows of a response of minute rows, oldest first; raises as `parse` does."""
    return sorted(_read(body, context)[0], key=lambda candle: candle.traded_at)


def _read(body: bytes, context: Reading) -> tuple[list[Candle], list[RejectedRow], Counter[str]]:
    try:
        envelope = _envelope.decode(body.removeprefix(_BOM))
    except UNREADABLE as error:
        raise ExchangeNonsense("nonsense", f"the body is no response: {error}", track_id=context.track_id) from error
    state = envelope.state or envelope.status
    if state != "DONE":
        raise refusal(200, body, context.track_id)
    result = b"null" if envelope.result is UNSET else bytes(envelope.result).strip()
    if result == b"null" or not result.strip(b"{} \t\r\n"):
        result = b"[]"
    elif result[:1] == b"{":
        result = b"[" + result + b"]"
    elif result[:1] != b"[":
        raise ExchangeNonsense("nonsense", "the result is neither rows nor a row", track_id=context.track_id)
    oddities: Counter[str] = Counter()
    if b'"' + context.track_id.encode() + b'"' not in body:
        oddities["foreign_track_id"] += 1
    candles: list[Candle] = []
    rejected: list[RejectedRow] = []
    raws: Sequence[Raw] = ()
    latest = context.dated + FUTURE
    try:
        rows: Sequence[_Row | Raw] = _rows.decode(result)
    except UNREADABLE:
        rows = _raw_rows.decode(result)
    for number, row in enumerate(rows):
        try:
            known = row if isinstance(row, _Row) else _patiently(row)
            candle = _candle(known, context, latest)
        except _BadRow as bad:
            raws = raws or _raw_rows.decode(result)
            rejected.append(_rejected(bytes(raws[number]), bad, context.track_id))
            continue
        candles.append(candle)
        if known.PrecedencyRight is not None and known.PrecedencyRight is not candle.is_right:
            oddities["right_contradicted"] += 1
        if known.TradeDate and not _names_day(known.TradeDate, candle.trading_day):
            oddities["jalali_contradicted"] += 1
    return candles, rejected, oddities


def merge(parts: Sequence[Snapshot]) -> Snapshot:
    """Return the responses of one poll's calls as one snapshot."""
    if len(parts) == 1:
        return parts[0]
    best, duplicates = _best(candle for part in parts for candle in part.candles.values())
    return Snapshot(
        best,
        max(part.received_at for part in parts),
        parts[0].session_day,
        [row for part in parts for row in part.rejected],
        sum(part.rows for part in parts),
        duplicates + sum(part.duplicate_rows for part in parts),
        sum((Counter(part.oddities) for part in parts), Counter()),
    )


def _best(candles: Iterable[Candle]) -> tuple[dict[str, Candle], int]:
    """Return per instrument its best row: the later trade time wins, then the higher trade count."""
    best: dict[str, Candle] = {}
    duplicates = 0
    for candle in candles:
        other = best.get(candle.instrument)
        if other is not None:
            duplicates += 1
            if (other.traded_at, other.trade_count) >= (candle.traded_at, candle.trade_count):
                continue
        best[candle.instrument] = candle
    return best, duplicates


def _candle(row: _Row, context: Reading, latest: datetime) -> Candle:
    instrument = row.TseSymbolCode
    if not _is_code(instrument):
        raise _BadRow(
            Reason.INVALID_VALUE, f"TseSymbolCode {instrument[:40]!r} is not 12 of A-Z and 0-9", "TseSymbolCode"
        )
    traded_at, trading_day = _trade_time(row.TradeDateGre)
    if traded_at is None or trading_day is None:
        raise _BadRow(Reason.INVALID_VALUE, f"TradeDateGre {row.TradeDateGre[:40]!r} is no time", "TradeDateGre")
    profile = PROFILES[context.profile]
    estimated = profile.dates_only and traded_at.astimezone(TEHRAN).time() == time_of_day.min
    if estimated:
        # Seen on its day: now; later: at the day's end, so that it is never older than what was seen on the day.
        today = context.received_at.astimezone(TEHRAN).date() == trading_day
        ends = datetime.combine(trading_day, time_of_day.max, TEHRAN).astimezone(UTC)
        traded_at = context.received_at if today else ends.replace(microsecond=999_000)
    # Our own clock is not held against a row that has none.
    if traded_at > latest and traded_at is not context.received_at:
        raise _BadRow(
            Reason.FUTURE_ROW,
            f"TradeDateGre {row.TradeDateGre} is more than 5 minutes after the response",
            "TradeDateGre",
        )
    unknown = 0 if row.LastPrice else None
    return Candle(
        instrument=instrument,
        sequence=0,
        trading_day=trading_day,
        trading_day_jalali=row.TradeDate,
        traded_at=traded_at,
        traded_at_estimated=estimated,
        observed_at=context.received_at,
        poll_sequence=context.poll_sequence,
        source=profile.source,
        company_id=row.CoID,
        symbol=tidy(row.BourseSymbol),
        symbol_raw=row.BourseSymbol,
        title=tidy(row.FullTitle),
        is_right=bool(row.PrecedencyRight) if profile.one_call else context.is_right,
        # Beside a last price a zero here is not a price but "not known".
        open_price=None if row.OpeningPrice == unknown else row.OpeningPrice,
        high_price=None if row.MaxPrice == unknown else row.MaxPrice,
        low_price=None if row.minPrice == unknown else row.minPrice,
        last_price=row.LastPrice,
        closing_price=row.ClosingPrice,
        previous_close=row.PreviousClosingPrice,
        volume=row.TradeVolume,
        value=row.TradeValue,
        trade_count=row.TradeQty,
        closing_change=row.ClosingPriceChange,
        closing_change_percent=row.ClosingPChgPercent,
        shares_outstanding=row.ShareCount,
        market_value=row.MarketValue,
        exchange_type=None if row.Type is None else _type(row.Type),
    )


def _patiently(raw: Raw) -> _Row:
    """Read a row whose names are in another case or whose numbers are texts or integral floats."""
    try:
        fields = _anything.decode(raw)
    except UNREADABLE as error:
        raise _BadRow(Reason.MALFORMED_ROW, f"the row cannot be read: {error}", "") from error
    if not isinstance(fields, dict):
        raise _BadRow(Reason.MALFORMED_ROW, "the row is no object", "")
    row: dict[str, Any] = dict.fromkeys(_Row.__struct_fields__)
    for name, value in fields.items():
        ours = _NAMES.get(name.lower())
        if ours is not None and (value is not None or row[ours] is None):
            row[ours] = value if ours in _TEXTS else _number(ours, value)
    try:
        return msgspec.convert(row, _Row, strict=False)
    except msgspec.ValidationError as error:
        found = re.search(r"\$\.(\w+)", str(error))
        where = found[1] if found else ""
        raise _BadRow(
            Reason.MALFORMED_ROW if row.get(where) is None else Reason.INVALID_VALUE, f"{where}: {error}", where
        ) from error


def _number(name: str, value: Any) -> Any:
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return None
        if not _NUMBER.fullmatch(text):
            raise _BadRow(Reason.INVALID_VALUE, f"{name} {value[:40]!r} is no number", name)
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise _BadRow(Reason.INVALID_VALUE, f"{name} is too large", name)
    if isinstance(value, float) and name != "ClosingPChgPercent":
        if not value.is_integer():
            raise _BadRow(Reason.INVALID_VALUE, f"{name} {value!r} has a fraction", name)
        if abs(value) > 2**53:
            raise _BadRow(Reason.INVALID_VALUE, f"{name} {value!r} is too large to be exact", name)
        return int(value)
    return value


def _rejected(payload: bytes, bad: _BadRow, track_id: str) -> RejectedRow:
    try:
        fields = _anything.decode(payload)
    except UNREADABLE:
        fields = None
    named = {name.lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
    who = named.get("tsesymbolcode") or named.get("coid") or sha256(payload).hexdigest()
    identity = f"{str(who)[:64]}/{bad.reason}/{bad.field}"
    return RejectedRow(bad.reason, str(bad)[:MOST_MESSAGE], payload[:MOST_PAYLOAD], identity, track_id)


@lru_cache(1 << 16)
def _is_code(code: str) -> bool:
    return _CODE.fullmatch(code) is not None


@lru_cache(1 << 12)
def _trade_time(text: str) -> tuple[datetime, date] | tuple[None, None]:
    found = _TIME.fullmatch(text.strip())
    if found is None:
        return None, None
    try:
        local = datetime(*map(int, found.groups()), tzinfo=TEHRAN)  # type: ignore[misc,arg-type]
        return local.astimezone(UTC), local.date()
    except (ValueError, OverflowError):
        return None, None


def _type(value: Any) -> str:
    return (value if isinstance(value, str) else msgspec.json.encode(value).decode())[:MOST_MESSAGE]


@lru_cache(256)
def _names_day(jalali: str, day: date) -> bool:
    from persiantools.jdatetime import JalaliDate

    try:
        named = JalaliDate(*map(int, re.findall(r"\d+", jalali)))  # type: ignore[no-untyped-call]
        return bool(named.to_gregorian() == day)
    except (ValueError, TypeError, OverflowError):
        return False


def error_in(body: bytes) -> tuple[str | None, str]:
    """Return the error code and message in a body, wherever it hides them."""
    try:
        answer = _anything.decode(body.removeprefix(_BOM))
    except UNREADABLE:
        return None, ""
    for holder in (answer, answer.get("result") if isinstance(answer, dict) else None):
        if isinstance(holder, dict):
            error = holder.get("error") or holder
            if not isinstance(error, dict):
                return None, str(error)[:MOST_MESSAGE]
            code = error.get("code") or holder.get("responseCode")
            if code or error.get("message"):
                return (str(code)[:MOST_MESSAGE] if code else None), str(error.get("message") or "")[:MOST_MESSAGE]
    return None, ""


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds that a Retry-After, in seconds or a date, asks us to wait: a day at most."""
    if not retry_after:
        return None
    if retry_after.isdecimal():
        return min(float(retry_after[:9]), DAY_SECONDS)
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    until = (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)
    return min(max(until.total_seconds(), 0.0), DAY_SECONDS)


def refusal(status: int, body: bytes, track_id: str | None, retry_after: str | None = None) -> ExchangeError:
    """Return the error that a response which is not DONE amounts to."""
    code, message = error_in(body)
    if status == 200 and (found := _FN_CODE.search(body, 0, SHORT)):
        status = int(found[1])
    text = message or f"HTTP {status} without a reason"
    said = message.lower()
    told: dict[str, Any] = {"code": code, "track_id": track_id, "retry_after": _seconds(retry_after)}
    if "quota" in said or "سقف" in said:
        return ExchangeRefused("quota", text, **told)
    if status == 403 and _ADDRESS_WORDS.search(said):
        return ExchangeRefused("address", f"this address is not whitelisted: {text}", **told)
    if status in {401, 403} or code == "UNAUTHORIZED" or "invalid token" in said:
        return ExchangeRefused("token", text, **told)
    if status == 429:
        return ExchangeUnavailable("rate", text, **told)
    if status == 408 or code == "REQUEST_TIME_OUT":
        return ExchangeUnavailable("timeout", text, **told)
    if status in {200, 400} and code == "VALIDATION_ERROR":
        return ExchangeRefused("internal", text, **told)
    if status == 200 and code is None and not message:
        return ExchangeNonsense("nonsense", "the response is neither DONE nor an error", track_id=track_id)
    return ExchangeUnavailable("provider", text, **told)
