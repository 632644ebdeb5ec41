"""What the exchange's responses mean, and which events they make. Pure: bytes in, values out.

`derive` is the one path from the bytes of a poll to its events: live, in a dry run and in `bourse replay`.

Source: the exchange's documentation and captured trading days; docs/exchange.md describes both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, Struct

from bourse_producer.calendar import parse_day
from bourse_producer.diff import Changes, InstrumentCode, Rejected, Snapshot, diff
from bourse_producer.refusals import UNREADABLE, Envelope, refusal
from bourse_schemas.errors import ExchangeError, ExchangeNonsense
from bourse_schemas.events import TEHRAN, Candle, DeadLetter, Reason, Stage, tidy

FUTURE = timedelta(minutes=5)
# With fewer bad rows than this a response is not taken for a changed API; else this many rows are kept as a sample.
FEW_REJECTED, SAMPLE = 20, 3


@dataclass(frozen=True, slots=True)
class Profile:
    """One of the exchange's services: its addresses, its scope, and how its rows differ.

    With `one_call` shares and rights come together, and each row's own flag names its kind; with `dates_only` a trade
    time at midnight is a date and nothing more.
    """

    name: str
    source: str
    path: str
    scope: str
    production: str
    sandbox: str = "https://sandboxapi.finnotech.ir"
    one_call: bool = False
    dates_only: bool = False


TRADES_REALTIME = Profile(
    name="trades-realtime",
    source="finnotech/trades-realtime",
    path="trades/realtime",
    scope="bourse:trades-realtime:get",
    production="https://apibeta.finnotech.ir",
)
SUCCESSOR = Profile(
    name="realTimeTrades",
    source="finnotech/real-time-trades",
    path="realTimeTrades",
    scope="bourse:realTime-trades:get",
    production="https://api.finnotech.ir",
    one_call=True,
    dates_only=True,
)
PROFILES = {profile.name: profile for profile in (TRADES_REALTIME, SUCCESSOR)}
SOURCE = TRADES_REALTIME.source


Rial = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Percent = Annotated[float, Meta(ge=-1e300, le=1e300)]
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
    ClosingPChgPercent: Percent | None
    ShareCount: Rial | None
    MarketValue: Rial | None
    Type: Any


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
_TIME = re.compile(r"(\d{4})[/-](\d{1,2})[/-](\d{1,2})[ T](\d{1,2}):(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a response does not contain and reading it needs.

    `received_at` is when it arrived; `dated` is its `Date` header, or our clock if it had none; `track_id` is what was
    sent with the call, `is_right` which of the two calls it was; `profile` is a profile's name.
    """

    poll_sequence: int
    received_at: datetime
    dated: datetime
    session_day: date | None
    is_right: bool
    track_id: str
    profile: str = TRADES_REALTIME.name


# A response's bytes, and how they are read.
Answer = tuple[bytes, Reading]


class _BadRow(Exception):
    def __init__(self, reason: Reason, message: str, field_name: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field_name


# The rows of a call's last response and what was made of them: candle, and oddities.
Memo = Mapping[str, tuple[_Row, Candle, Sequence[str]]]


def parse(body: bytes, reading: Reading, memo: Memo | None = None) -> Snapshot:
    """Return what a response contains, faster if `memo` is that of the same call's last snapshot.

    Raises ExchangeNonsense if the body is not a response, and the matching ExchangeError if it reports that the call
    failed. A row that cannot be used is in `rejected`; the others count. The candle of a row that has not changed is
    the last response's, with its receipt: `diff` corrects it in an event.
    """
    candles, rejected, oddities, memo = _read(body, reading, memo or {})
    best, duplicates = _best(candles)
    rows, at = len(candles) + len(rejected), reading.received_at
    seen = dict.fromkeys({candle.is_right for candle in best.values()}, (reading.poll_sequence, at))
    return Snapshot(best, at, reading.session_day, rejected, rows, duplicates, oddities, seen, memo)


def parse_minutes(body: bytes, reading: Reading) -> tuple[list[Candle], Sequence[Rejected]]:
    """Return the rows of a response of minute rows, oldest first, and those that cannot be used; raises as `parse`."""
    candles, rejected, _, _ = _read(body, reading, {})
    return sorted(candles, key=lambda candle: candle.traded_at), rejected


def _read(body: bytes, reading: Reading, memo: Memo) -> tuple[list[Candle], list[Rejected], Counter[str], Memo]:
    result = _result(body, reading.track_id)
    oddities: Counter[str] = Counter()
    if b'"' + reading.track_id.encode() + b'"' not in body:
        oddities["foreign_track_id"] += 1
    candles: list[Candle] = []
    rejected: list[Rejected] = []
    remembered: dict[str, tuple[_Row, Candle, Sequence[str]]] = {}
    raws: Sequence[Raw] = ()
    latest = reading.dated + FUTURE
    try:
        rows: Sequence[_Row | Raw] = _rows.decode(result)
    except UNREADABLE:
        rows = _raw_rows.decode(result)
    for number, each in enumerate(rows):
        try:
            row = each if isinstance(each, _Row) else _lenient(each)
            known = memo.get(row.TseSymbolCode)
            if known is None or known[0] != row or known[1].traded_at > latest:
                candle = _candle(row, reading, latest)
                known = row, candle, _oddities(row, candle)
        except _BadRow as bad:
            raws = raws or _raw_rows.decode(result)
            rejected.append(_rejected(bytes(raws[number]), bad, reading))
            continue
        candles.append(known[1])
        if known[2]:
            oddities.update(known[2])
        # Equal values of other types, such as 1 and true, are other texts; an estimated time is that of the receipt.
        if (row.Type is None or isinstance(row.Type, str)) and not known[1].traded_at_estimated:
            remembered[row.TseSymbolCode] = known
    return candles, rejected, oddities, remembered


def _oddities(row: _Row, candle: Candle) -> Sequence[str]:
    odd = []
    if row.PrecedencyRight is not None and row.PrecedencyRight is not candle.is_right:
        odd.append("right_contradicted")
    if row.TradeDate and not _names_day(row.TradeDate, candle.trading_day):
        odd.append("jalali_contradicted")
    return odd


def _result(body: bytes, track_id: str) -> bytes:
    """Return the rows of a response, as a JSON array."""
    try:
        envelope = Envelope.of(body)
    except UNREADABLE as error:
        raise ExchangeNonsense("nonsense", f"the body is not a response: {error}", track_id=track_id) from error
    if not envelope.done:
        raise refusal(200, body, track_id)
    result = b"null" if envelope.result is UNSET else bytes(envelope.result).strip()
    if result == b"null" or not result.strip(b"{} \t\r\n"):
        return b"[]"
    if result[:1] == b"{":
        return b"[" + result + b"]"
    if result[:1] != b"[":
        raise ExchangeNonsense("nonsense", "the result is neither rows nor a row", track_id=track_id)
    return result


def merge(parts: Sequence[Snapshot]) -> Snapshot:
    """Return the responses of one poll's calls as one snapshot."""
    if len(parts) == 1:
        return parts[0]
    best, duplicates = _best(candle for part in parts for candle in part.candles.values())
    return replace(
        parts[0],
        candles=best,
        received_at=max(part.received_at for part in parts),
        rejected=[row for part in parts for row in part.rejected],
        rows=sum(part.rows for part in parts),
        duplicate_rows=duplicates + sum(part.duplicate_rows for part in parts),
        oddities=sum((Counter(part.oddities) for part in parts), Counter()),
        seen=dict(seen for part in parts for seen in part.seen.items()),
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


def _candle(row: _Row, reading: Reading, latest: datetime) -> Candle:
    instrument, profile = row.TseSymbolCode, PROFILES[reading.profile]
    if not _is_code(instrument):
        raise _invalid("TseSymbolCode", f"{instrument[:40]!r} is not 12 of A-Z and 0-9")
    time = _trade_time(row.TradeDateGre)
    if time is None:
        raise _invalid("TradeDateGre", f"{row.TradeDateGre[:40]!r} is not a time")
    traded_at, trading_day, is_midnight = time
    estimated = profile.dates_only and is_midnight
    if estimated:
        # Seen on its day: now; later: at the day's end, so that it is never older than what was seen on the day.
        today = reading.received_at.astimezone(TEHRAN).date() == trading_day
        ends = datetime.combine(trading_day, time_of_day.max, TEHRAN).astimezone(UTC)
        traded_at = reading.received_at if today else ends.replace(microsecond=999_000)
    # An estimated time of today is our own clock's, which may be ahead.
    if traded_at > latest and traded_at is not reading.received_at:
        message = f"TradeDateGre {row.TradeDateGre} is more than 5 minutes after the response"
        raise _BadRow(Reason.FUTURE_ROW, message, "TradeDateGre")
    unknown = 0 if row.LastPrice else None
    return Candle(
        instrument=instrument,
        sequence=0,
        trading_day=trading_day,
        trading_day_jalali=row.TradeDate,
        traded_at=traded_at,
        traded_at_estimated=estimated,
        observed_at=reading.received_at,
        poll_sequence=reading.poll_sequence,
        source=profile.source,
        company_id=row.CoID,
        symbol=tidy(row.BourseSymbol),
        symbol_raw=row.BourseSymbol,
        title=tidy(row.FullTitle),
        is_right=bool(row.PrecedencyRight) if profile.one_call else reading.is_right,
        # Next to a last price a 0 here means "not known".
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
        exchange_type=None if row.Type is None else _text(row.Type),
    )


def _invalid(name: str, message: str) -> _BadRow:
    return _BadRow(Reason.INVALID_VALUE, f"{name} {message}", name)


def _lenient(raw: Raw) -> _Row:
    """Read a row whose names are in another case or whose numbers are strings or integral floats."""
    try:
        fields = _anything.decode(raw)
    except UNREADABLE as error:
        raise _BadRow(Reason.MALFORMED_ROW, f"the row cannot be read: {error}", "") from error
    if not isinstance(fields, dict):
        raise _BadRow(Reason.MALFORMED_ROW, "the row is not an object", "")
    row: dict[str, Any] = dict.fromkeys(_Row.__struct_fields__)
    for name, value in fields.items():
        ours = _NAMES.get(name.lower())
        if ours is not None and (value is not None or row[ours] is None):
            as_it_is = not isinstance(value, str) or ours in _TEXTS
            row[ours] = value if as_it_is else value.strip().removeprefix("+") or None
    try:
        return msgspec.convert(row, _Row, strict=False)
    except msgspec.ValidationError as error:
        found = re.search(r"\$\.(\w+)", str(error))
        name = found[1] if found else ""
        reason = Reason.MALFORMED_ROW if row.get(name) is None else Reason.INVALID_VALUE
        raise _BadRow(reason, f"{name}: {error}", name) from error


def _rejected(payload: bytes, bad: _BadRow, reading: Reading) -> Rejected:
    try:
        fields = _anything.decode(payload)
    except UNREADABLE:
        fields = None
    named = {name.lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
    who = named.get("tsesymbolcode") or named.get("coid") or sha256(payload).hexdigest()
    letter = DeadLetter(
        reason=bad.reason,
        message=str(bad)[:MOST_MESSAGE],
        stage=Stage.PARSE,
        origin=PROFILES[reading.profile].source,
        payload=payload[:MOST_PAYLOAD],
        original_headers={},
        poll_sequence=reading.poll_sequence,
        poll_id=reading.track_id,
        failed_at=reading.received_at,
    )
    return Rejected(f"{str(who)[:64]}/{bad.reason}/{bad.field}", letter)


@lru_cache(1 << 16)
def _is_code(code: str) -> bool:
    return _CODE.fullmatch(code) is not None


@lru_cache(1 << 12)
def _trade_time(text: str) -> tuple[datetime, date, bool] | None:
    """Return a trade time, its day in Tehran, and whether it is midnight there."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        return None
    try:
        local = datetime(*map(int, found.groups()), tzinfo=TEHRAN)  # type: ignore[misc,arg-type]
        return local.astimezone(UTC), local.date(), local.time() == time_of_day.min
    except (ValueError, OverflowError):
        return None


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else msgspec.json.encode(value).decode())[:MOST_MESSAGE]


@lru_cache(256)
def _names_day(text: str, day: date) -> bool:
    try:
        return parse_day(text) == day
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Derived:
    """What a poll's responses amount to; `snapshot` is None if none of them can be used.

    `rejected` are the rows that could not be used, `errors` why a whole response is not used, by whether it is that
    of the rights. `memos` make the next poll faster.
    """

    snapshot: Snapshot | None
    changes: Changes
    rejected: Sequence[Rejected] = ()
    errors: Mapping[bool, ExchangeError] = field(default_factory=dict)
    memos: Mapping[bool, Memo] = field(default_factory=dict)


def derive(
    known: Mapping[InstrumentCode, Candle],
    answers: Sequence[Answer],
    max_rejected_share: float = 1.0,
    memos: Mapping[bool, Memo] | None = None,
) -> Derived:
    """Return what the responses of a poll change. A response with a larger share of bad rows is not used."""
    parts: list[Snapshot] = []
    rejected: list[Rejected] = []
    errors: dict[bool, ExchangeError] = {}
    memos = dict(memos or {})
    for body, reading in answers:
        try:
            part = parse(body, reading, memos.get(reading.is_right))
        except ExchangeError as error:
            errors[reading.is_right] = error
            continue
        memos[reading.is_right] = part.memo
        bad = len(part.rejected)
        if bad >= FEW_REJECTED and bad > max_rejected_share * part.rows:
            # A changed API must not pour the market into dead letters.
            rejected += part.rejected[:SAMPLE]
            first = part.rejected[0].letter.message
            message = f"{bad} of {part.rows} rows cannot be used: has the API changed? The first: {first}"
            errors[reading.is_right] = ExchangeNonsense("nonsense", message, track_id=reading.track_id)
        else:
            rejected += part.rejected
            parts.append(part)
    snapshot = merge(parts) if parts else None
    return Derived(snapshot, diff(known, snapshot) if snapshot else Changes([], [], 0), rejected, errors, memos)
