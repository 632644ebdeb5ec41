"""Finnotech's `trades/realtime`: calls, tokens, and (pure) what a response says.

Source: the exchange's documentation and what public clients have seen of it; `docs/exchange.md` has both.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from bourse_producer.calendar import TEHRAN
from bourse_producer.diff import RejectedRow, Snapshot
from bourse_schemas.errors import ExchangeError, ExchangeNonsense, ExchangeRefused, ExchangeUnavailable
from bourse_schemas.events import Candle, Reason, tidy

__all__ = ["ADDRESSES", "SOURCE", "Context", "Credentials", "Finnotech", "Reply", "merge", "parse"]

SOURCE = "finnotech/trades-realtime"
SCOPE = "bourse:trades-realtime:get"
ADDRESSES = {"production": "https://apibeta.finnotech.ir", "sandbox": "https://sandboxapi.finnotech.ir"}
FUTURE = timedelta(minutes=5)
MINT_SECONDS = 60.0
# An error body is short; a market is not.
SHORT = 10_000


# --- what a response says (pure) --------------------------------------------------------------------------------------

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

_NAMES = {name.lower(): name for name in _Row.__struct_fields__} | {"tradedateger": "TradeDateGre"}
_TEXTS = {"BourseSymbol", "TseSymbolCode", "FullTitle", "TradeDateGre", "TradeDate", "Type", "PrecedencyRight"}
_CODE = re.compile(r"[A-Z0-9]{12}")
# What a decoder says of bytes that are no JSON, no UTF-8, or nested beyond reason.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]*)?([eE][+-]?[0-9]{1,4})?")
_TIME = re.compile(r"(\d{4})[/-](\d{1,2})[/-](\d{1,2})[ T](\d{1,2}):(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True, slots=True)
class Context:
    """What a response does not say of itself.

    `received_at` is when it arrived; `dated` is its `Date` header, or our clock where it had none; `track_id` is what
    was sent with the call, `is_right` which of the two calls it was.
    """

    poll_sequence: int
    received_at: datetime
    dated: datetime
    session_day: date | None
    is_right: bool
    track_id: str


class _BadRow(Exception):
    def __init__(self, reason: Reason, message: str, field_name: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field_name


def parse(body: bytes, context: Context) -> Snapshot:
    """Return what a response says.

    Raises ExchangeNonsense when the body is no response, and the matching ExchangeError when it says that the call
    failed. A row that cannot be used is in `rejected`; the others count.
    """
    try:
        envelope = _envelope.decode(body)
    except _UNREADABLE as error:
        raise ExchangeNonsense("nonsense", f"the body is no response: {error}", track_id=context.track_id) from error
    state = envelope.state or envelope.status
    if state != "DONE":
        raise _refusal(200, body, context.track_id)
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
    except _UNREADABLE:
        rows = _raw_rows.decode(result)
    for number, row in enumerate(rows):
        try:
            known = row if isinstance(row, _Row) else _patiently(row)
            candle = _candle(known, context, latest)
        except _BadRow as bad:
            raws = raws or _raw_rows.decode(result)
            rejected.append(_rejected(bytes(raws[number]), bad))
            continue
        candles.append(candle)
        if known.PrecedencyRight is not None and known.PrecedencyRight is not context.is_right:
            oddities["right_contradicted"] += 1
        if known.TradeDate and not _names_day(known.TradeDate, candle.trading_day):
            oddities["jalali_contradicted"] += 1
    best, duplicates = _best(candles)
    return Snapshot(best, context.received_at, context.session_day, rejected, len(rows), duplicates, oddities)


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


def _candle(row: _Row, context: Context, latest: datetime) -> Candle:
    instrument = row.TseSymbolCode
    if not _is_code(instrument):
        raise _BadRow(
            Reason.INVALID_VALUE, f"TseSymbolCode {instrument[:40]!r} is not 12 of A-Z and 0-9", "TseSymbolCode"
        )
    traded_at, trading_day = _trade_time(row.TradeDateGre)
    if traded_at is None or trading_day is None:
        raise _BadRow(Reason.INVALID_VALUE, f"TradeDateGre {row.TradeDateGre[:40]!r} is no time", "TradeDateGre")
    if traded_at > latest:
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
        traded_at_estimated=False,
        observed_at=context.received_at,
        poll_sequence=context.poll_sequence,
        source=SOURCE,
        company_id=row.CoID,
        symbol=tidy(row.BourseSymbol),
        symbol_raw=row.BourseSymbol,
        title=tidy(row.FullTitle),
        is_right=context.is_right,
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
    except _UNREADABLE as error:
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


def _rejected(payload: bytes, bad: _BadRow) -> RejectedRow:
    try:
        fields = _anything.decode(payload)
    except _UNREADABLE:
        fields = None
    named = {name.lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
    who = named.get("tsesymbolcode") or named.get("coid") or sha256(payload).hexdigest()
    identity = f"{str(who)[:64]}/{bad.reason}/{bad.field}"
    return RejectedRow(bad.reason, str(bad)[:MOST_MESSAGE], payload[:MOST_PAYLOAD], identity)


@lru_cache(1 << 16)
def _is_code(code: str) -> bool:
    return _CODE.fullmatch(code) is not None


@lru_cache(1 << 14)
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


# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Credentials:
    """An account at the exchange; the secret and the national id are never shown."""

    client_id: str
    secret: str = field(repr=False)
    nid: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """A response as it came: `dated` is its `Date` header, `received_at` our clock."""

    track_id: str
    body: bytes = field(repr=False)
    received_at: datetime
    dated: datetime | None


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    refresh: str | None = field(repr=False)
    renew_at: float


class _TokenRefused(Exception):
    def __init__(self, status: int, error: ExchangeError) -> None:
        super().__init__(str(error))
        self._status = status
        self._error = error

    def told(self) -> ExchangeError:
        """Return what it means where a new token is refused too."""
        error = self._error
        if self._status != 403:
            return error
        said = f"a new token is refused: the client needs the scope {SCOPE} and a whitelisted address ({error})"
        return ExchangeRefused("scope", said, code=error.code, track_id=error.track_id)


class Finnotech:
    """The exchange's API, one call at a time. Every method raises ExchangeError when a call gave nothing."""

    def __init__(self, client: httpx.Client, address: str, credentials: Credentials) -> None:
        self._client = client
        self._address = address.rstrip("/")
        self._credentials = credentials
        self._token: _Token | None = None
        self._patient_until = 0.0

    def realtime(self, *, rights: bool, company_id: int | None = None, minutes: tuple[str, str] | None = None) -> Reply:
        """Return the last state of all companies' shares, or of all subscription rights.

        With `company_id` of that one only; with `minutes` (from, to: HHMM of the current day, Tehran) its minute rows,
        which the exchange gives for a named company only.

        A refused token is renewed once and the call repeated once, with a new trackId as every attempt needs. Where
        that did not help no other token is minted for a minute.
        """
        asked = {"isTimePeriod": "true" if minutes else "false", "precedencyRight": "true" if rights else "false"}
        if company_id is not None:
            asked["coId"] = str(company_id)
        if minutes is not None:
            asked["fromTime"], asked["toTime"] = minutes
        try:
            return self._realtime(self._valid_token(), asked)
        except _TokenRefused as refused:
            if time.monotonic() < self._patient_until:
                raise refused.told() from refused
        self._token = None
        try:
            return self._realtime(self._valid_token(), asked)
        except _TokenRefused as refused:
            self._patient_until = time.monotonic() + MINT_SECONDS
            raise refused.told() from refused

    def _realtime(self, token: str, asked: dict[str, str]) -> Reply:
        track_id = uuid4().hex
        response = self._send(
            "GET",
            f"/bourse/v2/clients/{quote(self._credentials.client_id, safe='')}/trades/realtime",
            track_id,
            params={"trackId": track_id, **asked},
            headers={"Authorization": f"Bearer {token}"},
        )
        # Refusals come with 200 too, and a refused token must be noticed here, where it can be renewed.
        if response.status_code != 200 or (len(response.content) < SHORT and b"DONE" not in response.content):
            error = _refusal(response.status_code, response.content, track_id, response.headers.get("retry-after"))
            if error.kind == "token":
                raise _TokenRefused(response.status_code, error)
            raise error
        return Reply(track_id, response.content, datetime.now(UTC), _dated(response))

    def _valid_token(self) -> str:
        token = self._token
        if token is None or time.monotonic() >= token.renew_at:
            token = self._token = self._renew(token)
        return token.value

    def _renew(self, old: _Token | None) -> _Token:
        if old is not None and old.refresh is not None:
            try:
                return self._mint(
                    {"grant_type": "refresh_token", "token_type": "CLIENT-CREDENTIAL", "refresh_token": old.refresh}
                )
            except ExchangeRefused:
                # A refresh token can be used up or revoked; the credentials still stand.
                self._token = None
        return self._mint({"grant_type": "client_credentials", "nid": self._credentials.nid, "scopes": SCOPE})

    def _mint(self, grant: dict[str, str]) -> _Token:
        asked = time.monotonic()
        response = self._send(
            "POST",
            "/dev/v2/oauth2/token",
            None,
            json=grant,
            auth=httpx.BasicAuth(self._credentials.client_id, self._credentials.secret),
        )
        try:
            result = _anything.decode(response.content)["result"]
            value, life_ms, refresh = result["value"], float(result["lifeTime"]), result.get("refreshToken")
            # What cannot stand in a header would come back in the client's own error message.
            if not (isinstance(value, str) and value.isascii() and value.isprintable() and math.isfinite(life_ms)):
                raise ValueError("no token")
        except (*_UNREADABLE, KeyError, TypeError, ValueError, AttributeError):
            if response.status_code in {400, 401, 403}:
                code, message = _said(response.content)
                said = f"the exchange gives no token: {message or response.status_code}"
                raise ExchangeRefused("token", said, code=code) from None
            raise _refusal(response.status_code, response.content, None) from None
        # Counted from our own clock; a tenth of its life before the end it is renewed.
        return _Token(value, refresh if isinstance(refresh, str) else None, asked + life_ms / 1000 * 0.9)

    def _send(self, method: str, path: str, track_id: str | None, **request: Any) -> httpx.Response:
        try:
            response = self._client.request(method, self._address + path, **request)
        except httpx.TimeoutException as error:
            raise ExchangeUnavailable(
                "timeout", f"the exchange did not answer in time ({type(error).__name__})", track_id=track_id
            ) from error
        except httpx.DecodingError as error:
            raise ExchangeNonsense("nonsense", f"the body cannot be unpacked: {error}", track_id=track_id) from error
        except httpx.HTTPError as error:
            raise ExchangeUnavailable(
                "network", f"{type(error).__name__}: {error}".rstrip(": "), track_id=track_id
            ) from error
        return response


def _dated(response: httpx.Response) -> datetime | None:
    try:
        dated = parsedate_to_datetime(response.headers["date"])
        # Beyond reason it would only break the arithmetic.
        return (dated if dated.tzinfo else dated.replace(tzinfo=UTC)).astimezone(UTC) if dated.year < 2200 else None
    except (KeyError, ValueError, OverflowError):
        return None


def _said(body: bytes) -> tuple[str | None, str]:
    """Return the error code and message in a body, wherever it hides them."""
    try:
        answer = _anything.decode(body)
    except _UNREADABLE:
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


def _refusal(status: int, body: bytes, track_id: str | None, retry_after: str | None = None) -> ExchangeError:
    """Return the error that a response which is not DONE amounts to."""
    code, message = _said(body)
    text = message or f"HTTP {status} without a reason"
    said = message.lower()
    wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
    if status in {401, 403} or code == "UNAUTHORIZED" or "invalid token" in said:
        return ExchangeRefused("token", text, code=code, track_id=track_id)
    if "quota" in said or "سقف" in said:
        return ExchangeRefused("quota", text, code=code, track_id=track_id, retry_after=wait)
    if status == 429:
        return ExchangeUnavailable("rate", text, code=code, track_id=track_id, retry_after=wait)
    if status == 408 or code == "REQUEST_TIME_OUT":
        return ExchangeUnavailable("timeout", text, code=code, track_id=track_id)
    if status in {200, 400} and code == "VALIDATION_ERROR":
        return ExchangeRefused("internal", text, code=code, track_id=track_id)
    if status == 200 and code is None and not message:
        return ExchangeNonsense("nonsense", "the response is neither DONE nor an error", track_id=track_id)
    return ExchangeUnavailable("provider", text, code=code, track_id=track_id, retry_after=wait)
