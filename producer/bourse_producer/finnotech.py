"""Finnotech's `trades/realtime` and its successor: calls, tokens, and (pure) what a response says.

Source: the exchange's documentation and what public clients have seen of it; `docs/exchange.md` has both.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from bourse_producer.calendar import TEHRAN
from bourse_producer.diff import RejectedRow, Snapshot
from bourse_schemas.errors import (
    ConfigurationError,
    ExchangeError,
    ExchangeNonsense,
    ExchangeRefused,
    ExchangeUnavailable,
)
from bourse_schemas.events import Candle, Reason, tidy
from bourse_schemas.telemetry import get_logger

__all__ = [
    "PROFILES",
    "SOURCE",
    "TRADES_REALTIME",
    "Context",
    "Credentials",
    "Finnotech",
    "Profile",
    "Received",
    "Reply",
    "merge",
    "parse",
    "parse_minutes",
]

FUTURE = timedelta(minutes=5)
MINT_SECONDS = 60.0
DEADLINE_SECONDS = 55.0
DAY_SECONDS = 86_400.0
MOST_BYTES = 64 << 20
# An error body is short; a market is not.
SHORT = 10_000
KEPT_HEADERS = ("date", "content-type", "content-length", "content-encoding", "retry-after")


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
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]*)?([eE][+-]?[0-9]{1,4})?")
_FN_CODE = re.compile(rb'"FN-[A-Z]{4}-(\d{3})\d{8}"')
_ADDRESS_WORDS = re.compile(r"\bip\b|\baddress\b|white ?-?list|آی[ \u200c]?پی|نشانی|آدرس")
_TIME = re.compile(r"(\d{4})[/-](\d{1,2})[/-](\d{1,2})[ T](\d{1,2}):(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True, slots=True)
class Context:
    """What a response does not say of itself.

    `received_at` is when it arrived; `dated` is its `Date` header, or our clock where it had none; `track_id` is what
    was sent with the call, `is_right` which of the two calls it was, `minutes` that it asked for minute rows; `profile`
    is a profile's name.
    """

    poll_sequence: int
    received_at: datetime
    dated: datetime
    session_day: date | None
    is_right: bool
    track_id: str
    minutes: bool = False
    profile: str = TRADES_REALTIME.name


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
    candles, rejected, oddities = _read(body, context)
    best, duplicates = _best(candles)
    rows = len(candles) + len(rejected)
    return Snapshot(best, context.received_at, context.session_day, rejected, rows, duplicates, oddities)


def parse_minutes(body: bytes, context: Context) -> list[Candle]:
    """Return the usable rows of a response of minute rows, oldest first; raises as `parse` does."""
    return sorted(_read(body, context)[0], key=lambda candle: candle.traded_at)


def _read(body: bytes, context: Context) -> tuple[list[Candle], list[RejectedRow], Counter[str]]:
    try:
        envelope = _envelope.decode(body.removeprefix(_BOM))
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


def _candle(row: _Row, context: Context, latest: datetime) -> Candle:
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
class Received:
    """An answer to a call for data, as far as it came; `query` and `headers` hold nothing secret."""

    track_id: str
    path: str
    query: Mapping[str, str]
    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    requested_at: datetime
    received_at: datetime


@dataclass(frozen=True, slots=True)
class _Token:
    """A token; `renew_at` and `ends_at` are of the steady clock. `scopes` are what was granted, where that was said."""

    value: str = field(repr=False)
    refresh: str | None = field(repr=False)
    renew_at: float
    ends_at: float
    scopes: tuple[str, ...] = ()


class _TokenRefused(Exception):
    def __init__(self, status: int, error: ExchangeError) -> None:
        super().__init__(str(error))
        self._status = status
        self._error = error

    def told(self, scope: str) -> ExchangeError:
        """Return what it means where a new token is refused too."""
        error = self._error
        if self._status != 403:
            return error
        said = f"a new token is refused: the client needs the scope {scope} and a whitelisted address ({error})"
        return ExchangeRefused("scope", said, code=error.code, track_id=error.track_id)


class Finnotech:
    """The exchange's API, one call at a time. Every method raises ExchangeError when a call gave nothing.

    `on_call` is told how each HTTP call ended: done, or an error's kind; with token_ before it for a token's.
    `on_response` gets every answer to a call for data before it is judged.
    """

    def __init__(
        self,
        client: httpx.Client,
        address: str,
        credentials: Credentials,
        profile: Profile = TRADES_REALTIME,
        *,
        token_file: Path | None = None,
        on_call: Callable[[str], None] | None = None,
        on_response: Callable[[Received], None] | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
        mint_seconds: float = MINT_SECONDS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._client = client
        self._address = address.rstrip("/")
        self._credentials = credentials
        self._profile = profile
        self._on_call = on_call or (lambda _: None)
        self._on_response = on_response or (lambda _: None)
        self._deadline_seconds, self._mint_seconds, self._most_bytes = deadline_seconds, mint_seconds, most_bytes
        self._token: _Token | None = None
        self._minted_at = -math.inf
        self._refused: ExchangeError | None = None
        self._socket: socket.socket | None = None
        self._token_file = token_file
        # A token is good for one account at one address with one scope only.
        identity = (self._address, credentials.client_id, credentials.nid, profile.scope)
        self._identity = sha256("\0".join(identity).encode()).hexdigest()
        if token_file is not None:
            self._load_token(token_file)

    def realtime(self, *, rights: bool, company_id: int | None = None, minutes: tuple[str, str] | None = None) -> Reply:
        """Return the last state of all companies' shares, or of all subscription rights.

        With `company_id` of that one only; with `minutes` (from, to: HHMM of the current day, Tehran) its minute rows,
        which the exchange gives for a named company only.

        A refused token is renewed once and the call repeated once, with a new trackId as every attempt needs. Never
        more than one token a minute is asked for.
        """
        asked = {"companyId": company_id} if self._profile.one_call else {
            "isTimePeriod": "true" if minutes else "false",
            "precedencyRight": "true" if rights else "false",
            "coId": company_id,
            "fromTime": minutes and minutes[0],
            "toTime": minutes and minutes[1],
        }  # fmt: skip
        query = {name: str(value) for name, value in asked.items() if value is not None}
        try:
            return self._realtime(self._valid_token().value, query)
        except _TokenRefused as refused:
            if self._must_wait():
                raise refused.told(self._profile.scope) from refused
            self._token = None
        try:
            return self._realtime(self._valid_token().value, query)
        except _TokenRefused as refused:
            raise refused.told(self._profile.scope) from refused

    def _realtime(self, token: str, query: dict[str, str]) -> Reply:
        track_id = uuid4().hex
        client_id = quote(self._credentials.client_id, safe="")
        path = f"/bourse/v2/clients/{client_id}/{self._profile.path}"
        query = {"trackId": track_id, **query}
        try:
            status, headers, body = self._send(
                "GET", path, track_id, params=query, headers={"Authorization": f"Bearer {token}"}
            )
            # Refusals come with 200 too, and a refused token must be noticed here, where it can be renewed.
            if status != 200 or (len(body) < SHORT and b"DONE" not in body):
                raise _refusal(status, body, track_id, headers.get("retry-after"))
        except ExchangeError as error:
            self._conceal(error, token)
            self._on_call(error.kind)
            if error.kind == "token":
                raise _TokenRefused(status, error) from error
            raise
        self._on_call("done")
        return Reply(track_id, body, datetime.now(UTC), _dated(headers))

    # --- tokens -------------------------------------------------------------------------------------------------------

    def authorise(self) -> tuple[Sequence[str], timedelta]:
        """Get a token unless there is a good one; return its scopes, if the exchange named them, and the life left."""
        token = self._valid_token()
        return token.scopes, timedelta(seconds=token.ends_at - time.monotonic())

    def _valid_token(self) -> _Token:
        token, now = self._token, time.monotonic()
        if token is not None and (now < token.renew_at or (self._must_wait() and now < token.ends_at)):
            return token
        if self._must_wait():
            wait = self._mint_seconds - (now - self._minted_at)
            why = f" ({self._refused})" if self._refused else ""
            code = self._refused.code if self._refused else None
            said = f"no token: one was asked for less than a minute ago{why}"
            raise ExchangeRefused("token", said, code=code, retry_after=max(wait, 1.0))
        try:
            token = self._token = self._mint(self._grant(token))
        except ExchangeError as error:
            if token is None or now >= token.ends_at:
                self._token = None
                raise
            # The token in use still stands. A refresh token can be used up; the credentials stand, a minute later.
            refresh = token.refresh if isinstance(error, ExchangeUnavailable) else None
            token = self._token = replace(token, refresh=refresh, renew_at=now + self._mint_seconds)
        return token

    def _grant(self, old: _Token | None) -> dict[str, str]:
        if old is not None and old.refresh is not None and time.monotonic() < old.ends_at:
            return {"grant_type": "refresh_token", "token_type": "CLIENT-CREDENTIAL", "refresh_token": old.refresh}
        return {"grant_type": "client_credentials", "nid": self._credentials.nid, "scopes": self._profile.scope}

    def _conceal(self, error: ExchangeError, token: str) -> None:
        """Take our secrets out of what the exchange says of them: its words are logged and published."""
        for secret in filter(None, (self._credentials.secret, self._credentials.nid, token)):
            error.args = (str(error).replace(secret, "…"),)

    def _must_wait(self) -> bool:
        return time.monotonic() < self._minted_at + self._mint_seconds

    def _mint(self, grant: dict[str, str]) -> _Token:
        self._minted_at = asked = time.monotonic()
        self._keep_token(self._token)
        account = httpx.BasicAuth(self._credentials.client_id, self._credentials.secret)
        try:
            status, headers, body = self._send("POST", "/dev/v2/oauth2/token", None, json=grant, auth=account)
            token = _granted(body, asked)
            if token is None:
                raise _no_token(status, body, headers.get("retry-after"))
        except ExchangeError as error:
            self._conceal(error, grant.get("refresh_token", ""))
            self._on_call(f"token_{error.kind}")
            self._refused = error
            raise
        self._on_call("token_done")
        self._refused = None
        self._keep_token(token)
        return token

    def _load_token(self, file: Path) -> None:
        """Take over the token of an earlier run, where it is ours and nobody else could read it."""
        log = get_logger()
        try:
            if file.stat().st_mode & 0o077:
                log.warning("the token file is not used: others can read it", file=str(file), advice="chmod 600")
            else:
                kept = json.loads(file.read_text("utf-8"))
                now, steady = time.time(), time.monotonic()
                if kept["for"] == self._identity:
                    self._minted_at = steady - max(0.0, now - kept["asked"])
                    if _is_token(kept["value"]) and now < kept["ends"]:
                        ends = steady + kept["ends"] - now
                        renews = steady + kept["renews"] - now
                        self._token = _Token(kept["value"], kept["refresh"], renews, ends, tuple(kept["scopes"] or ()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("the token file is not used: it cannot be read", file=str(file), error=type(error).__name__)
        self._keep_token(self._token, at_start=True)

    def _keep_token(self, token: _Token | None, *, at_start: bool = False) -> None:
        if self._token_file is None:
            return
        now, steady = time.time(), time.monotonic()
        kept = {
            "for": self._identity,
            "asked": now - min(steady - self._minted_at, now),
            "value": token and token.value,
            "refresh": token and token.refresh,
            "scopes": token and token.scopes,
            "renews": token and now + token.renew_at - steady,
            "ends": token and now + token.ends_at - steady,
        }
        new = self._token_file.with_name(f"{self._token_file.name}.{os.getpid()}.new")
        try:
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                json.dump(kept, out)
            new.replace(self._token_file)
        except OSError as error:
            if at_start:
                raise ConfigurationError(f"--token-file {self._token_file}: cannot write: {error.strerror}") from error
            get_logger().warning("the token is not kept", file=str(self._token_file), error=error.strerror)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _send(
        self, method: str, path: str, track_id: str | None, **request: Any
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body; a body too large, too slow or broken is an ExchangeError."""
        requested_at, chunks, size = datetime.now(UTC), list[bytes](), 0
        request["extensions"] = {"trace": self._note_socket}
        try:
            with self._deadline(track_id), self._client.stream(method, self._address + path, **request) as response:
                try:
                    if "," in response.headers.get("content-encoding", ""):
                        # Each layer may be a thousand times the one around it, before any of it can be counted.
                        raise ExchangeNonsense("nonsense", "the body is packed more than once", track_id=track_id)
                    for chunk in response.iter_bytes():
                        chunks.append(chunk)
                        size += len(chunk)
                        if size > self._most_bytes:
                            said = f"the body is larger than {self._most_bytes >> 20} MiB"
                            raise ExchangeNonsense("nonsense", said, track_id=track_id)
                finally:
                    body = b"".join(chunks)
                    if track_id is not None:
                        kept = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
                        status, query = response.status_code, request["params"]
                        at = requested_at, datetime.now(UTC)
                        self._on_response(Received(track_id, path, query, status, kept, body[: self._most_bytes], *at))
                return response.status_code, response.headers, body
        except httpx.TimeoutException as error:
            said = f"the exchange did not answer in time ({type(error).__name__})"
            raise ExchangeUnavailable("timeout", said, track_id=track_id) from error
        except httpx.DecodingError as error:
            raise ExchangeNonsense("nonsense", f"the body cannot be unpacked: {error}", track_id=track_id) from error
        except httpx.HTTPError as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ExchangeUnavailable("network", said, track_id=track_id) from error

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    @contextmanager
    def _deadline(self, track_id: str | None) -> Iterator[None]:
        """Hang up when an attempt takes too long: what drips is in time for every single read."""
        overdue = threading.Event()

        def hang_up() -> None:
            overdue.set()
            with suppress(OSError, AttributeError):
                # Not the TLS socket's own, which would take its state away from under the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # type: ignore[arg-type]

        timer = threading.Timer(self._deadline_seconds, hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except httpx.HTTPError:
            if not overdue.is_set():
                raise
        finally:
            timer.cancel()
        # A body without a length ends where the connection does.
        if overdue.is_set():
            said = f"the answer took longer than {self._deadline_seconds:g} s"
            raise ExchangeUnavailable("timeout", said, track_id=track_id)


def _is_token(value: Any) -> bool:
    """Tell what can stand in a header: the client would show anything else in its own error message."""
    return isinstance(value, str) and re.fullmatch("[!-~]+", value) is not None


def _granted(body: bytes, asked: float) -> _Token | None:
    """Return the token in an answer; `asked` is when it was asked for."""
    try:
        result = _anything.decode(body)["result"]
        value, life, refresh = result["value"], float(result["lifeTime"]) / 1000, result.get("refreshToken")
        scopes = tuple(map(str, result.get("scopes") or ()))
    except (*_UNREADABLE, KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    if not (_is_token(value) and math.isfinite(life)):
        return None
    # Counted from our own clock; a tenth of its life before the end it is renewed.
    return _Token(value, refresh if isinstance(refresh, str) else None, asked + life * 0.9, asked + life, scopes)


def _no_token(status: int, body: bytes, retry_after: str | None) -> ExchangeError:
    error = _refusal(status, body, None, retry_after)
    if status in {400, 401, 403} and error.kind in {"token", "internal", "provider", "nonsense"}:
        message = _said(body)[1] or status
        return ExchangeRefused("token", f"the exchange gives no token: {message}", code=error.code)
    return error


def _dated(headers: Mapping[str, str]) -> datetime | None:
    try:
        dated = parsedate_to_datetime(headers["date"])
        # Beyond reason it would only break the arithmetic.
        return (dated if dated.tzinfo else dated.replace(tzinfo=UTC)).astimezone(UTC) if dated.year < 2200 else None
    except (KeyError, ValueError, OverflowError):
        return None


def _said(body: bytes) -> tuple[str | None, str]:
    """Return the error code and message in a body, wherever it hides them."""
    try:
        answer = _anything.decode(body.removeprefix(_BOM))
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


def _refusal(status: int, body: bytes, track_id: str | None, retry_after: str | None = None) -> ExchangeError:
    """Return the error that a response which is not DONE amounts to."""
    code, message = _said(body)
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
