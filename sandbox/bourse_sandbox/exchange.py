"""A practice exchange: the exchange's API as a real HTTP server, so that no account is needed to try or to test.

Market        what is traded           SimulatedMarket | CapturedDay   (market.py)
Clock         what time it is there    MarketClock | PollClock
PracticeExchange(market, clock)        the API, as an ASGI app, with its errors and quirks
"""

from __future__ import annotations

import base64
import gzip
import hmac
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from datetime import time as wall_time
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from uuid import uuid4

import click
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bourse_sandbox.faults import PEEK, Fault, Faults, fault_option
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
from bourse_sandbox.serving import Server, serve
from bourse_schemas.errors import ConfigurationError

__all__ = ["SCOPE", "Clock", "MarketClock", "PollClock", "PracticeExchange", "exchange", "practice_exchange"]

T = TypeVar("T")

SCOPE: Final = "bourse:trades-realtime:get"
SUCCESSOR_SCOPE: Final = "bourse:realTime-trades:get"
_SCOPES: Final = frozenset({SCOPE, SUCCESSOR_SCOPE})
# What the successor calls fields other than the legacy name with a small first letter.
_RENAMED: Final = {
    "CoID": "companyId",
    "BourseSymbol": "companySymbol",
    "TradeDateGre": "gregorianDate",
    "TradeDate": "jalaaliDate",
    "ClosingPChgPercent": "closingPriceChangePercent",
    "ShareCount": "sharedCount",
}
_TOTALS: Final = ("TradeVolume", "TradeValue", "TradeQty")
_GZIP: Final = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
_DAY_STARTS: Final = wall_time(8, 59)
_DAY_ENDS: Final = wall_time(13, 5)


def _at(day: date, at: wall_time) -> datetime:
    return datetime.combine(day, at, TEHRAN)


class Clock(Protocol):
    """What time it is at the market."""

    def now(self) -> datetime:
        """Return the market's time, in Tehran."""

    def polled(self) -> None:
        """Take notice that an accepted call for all shares is about to be answered."""


class MarketClock:
    """A clock `speed` times as fast as the wall's; with `skip_nights` the next day's 08:59 follows 13:05."""

    def __init__(
        self, start: datetime, speed: float = 1, *, skip_nights: bool = True, wall: Callable[[], float] = time.monotonic
    ) -> None:
        self._market, self._speed, self._wall, self._since = start.astimezone(TEHRAN), speed, wall, wall()
        self._ends = datetime.max.replace(tzinfo=UTC)
        if skip_nights:
            close = _at(self._market.date(), _DAY_ENDS)
            self._ends = close if is_trading_day(close.date()) and self._market < close else self._market

    def now(self) -> datetime:
        """Return the market's time, in Tehran."""
        wall = self._wall()
        now = self._market + timedelta(seconds=(wall - self._since) * self._speed)
        while now >= self._ends:
            day = next_trading_day(self._ends.date())
            now = _at(day, _DAY_STARTS) + (now - self._ends)
            self._market, self._since, self._ends = now, wall, _at(day, _DAY_ENDS)
        return now

    def polled(self) -> None:
        """Do nothing: this clock goes by itself."""


class PollClock:
    """A clock that stands until it is polled: each accepted call for all shares moves it to the next response."""

    def __init__(self, times: Sequence[datetime]) -> None:
        self._times, self._polls = times, 0

    def now(self) -> datetime:
        """Return when the response whose turn it is was received; before the first, a second earlier."""
        return self._times[self._polls - 1] if self._polls else self._times[0] - timedelta(seconds=1)

    def polled(self) -> None:
        """Move to the next response; the last one is repeated."""
        self._polls = min(self._polls + 1, len(self._times))


class _Refused(Exception):
    """A call the exchange answers with an error body."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def _invalid(message: str) -> _Refused:
    return _Refused(400, "VALIDATION_ERROR", message)


def _remember(known: dict[str, T], key: str, value: T, most: int) -> None:
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]


class _Timed(Response):
    """A response that says when its last byte was handed to the socket."""

    sent: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)
        if self.sent is not None:
            self.sent()


class _TokenRequest(msgspec.Struct):
    grant_type: str
    nid: str = ""
    scopes: str = ""
    token_type: str = ""
    refresh_token: str = ""


class _Grant(msgspec.Struct, frozen=True):
    scopes: list[str]
    expires: float


class PracticeExchange:
    """The API of the exchange, the legacy one and its successor, over a market and a clock.

    Quirks of the real one are kept: `trackId` stands twice in a response, either may be the echo; `status_key` is
    `state` where every other service says `status`; the lowest price is `minPrice`. `calls` counts the calls that would
    be charged. `nid` None accepts any ten digits.
    """

    def __init__(
        self,
        market: Market,
        clock: Clock,
        *,
        client_id: str = "practice",
        client_secret: str = "practice",  # noqa: S107 - a practice exchange has nothing to protect
        nid: str | None = None,
        token_seconds: float = 864_000,
        status_key: str = "state",
        minutes: str = "cumulative",
        faults: Sequence[str] = (),
        seed: int = 1,
        wall: Callable[[], float] = time.monotonic,
    ) -> None:
        self._market, self._clock, self._token_seconds, self._status_key = market, clock, token_seconds, status_key
        self._client_id, self._basic, self._nid = client_id, f"{client_id}:{client_secret}".encode(), nid
        self._wall, self._minutes = wall, minutes
        self._grants: dict[str, _Grant] = {}
        self._refreshes: dict[str, list[str]] = {}
        self._track_ids: dict[str, None] = {}
        self._sent: dict[str, float] = {}
        self._encoded: dict[bool, tuple[list[Row], bytes]] = {}
        self._last_poll: datetime | None = None
        self.calls = self.served = self.tokens = 0
        routes = [
            Route("/dev/v2/oauth2/token", self._token, methods=["POST"]),
            Route("/bourse/v2/clients/{client_id}/trades/realtime", self._realtime),
            Route("/bourse/v2/clients/{client_id}/realTimeTrades", self._realtime),
            Route("/practice/state", self._state),
            Route("/{path:path}", self._unknown),
        ]
        self._faults = Faults(
            Starlette(routes=routes), [Fault.parse(fault) for fault in faults], forget=self._forget, seed=seed
        )
        self.app: ASGIApp = self._faults if faults else self._faults.app

    def _forget(self, refreshes: bool) -> None:
        self._grants.clear()
        if refreshes:
            self._refreshes.clear()

    def state(self) -> dict[str, Any]:
        """Return what `GET /practice/state` shows; `sent` is epoch milliseconds by track id, of the last calls."""
        now = self._clock.now()
        seen = now if self._market.responses is None else self._last_poll
        return {
            "day_over": seen is not None and self._market.over(seen),
            "market_time": now.isoformat(timespec="seconds"),
            "served": self.served,
            "responses": self._market.responses,
            "calls": self.calls,
            "tokens": self.tokens,
            "faults": dict(self._faults.counts),
            "sent": dict(self._sent),
        }

    async def _state(self, request: Request) -> Response:
        return self._respond(request, msgspec.json.encode(self.state()))

    async def _unknown(self, request: Request) -> Response:
        return self._refuse(request, _Refused(404, "NOT_FOUND", "there is no such service"))

    def _respond(self, request: Request, body: bytes, status: int = 200) -> _Timed:
        now = self._clock.now()
        date_header = format_datetime(now.astimezone(UTC), usegmt=True)
        headers = {"Date": date_header, "Content-Type": "application/json; charset=utf-8"}
        if len(body) > 1_000 and _GZIP.search(request.headers.get("accept-encoding", "")):
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        return _Timed(body, status, headers)

    def _refuse(self, request: Request, refused: _Refused) -> Response:
        body = {
            "status": "FAILED",
            "trackId": request.query_params.get("trackId") or uuid4().hex,
            "error": {"code": refused.code, "message": refused.message},
        }
        return self._respond(request, msgspec.json.encode(body), refused.status)

    async def _token(self, request: Request) -> Response:
        try:
            return self._respond(request, msgspec.json.encode(self._grant(request, await request.body())))
        except _Refused as refused:
            return self._refuse(request, refused)

    def _grant(self, request: Request, body: bytes) -> dict[str, Any]:
        kind, _, credentials = request.headers.get("authorization", "").partition(" ")
        try:
            given = base64.b64decode(credentials, validate=True)
        except ValueError:
            given = b""
        if kind.lower() != "basic" or not hmac.compare_digest(given, self._basic):
            raise _Refused(401, "UNAUTHORIZED", "invalid client credentials")
        try:
            asked = msgspec.json.decode(body, type=_TokenRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _invalid(f"the body is no token request: {error}") from None
        if asked.grant_type == "client_credentials":
            scopes = [scope.strip() for scope in asked.scopes.split(",")]
            if not re.fullmatch("[0-9]{10}", asked.nid) or self._nid not in {None, asked.nid}:
                raise _invalid("invalid nid")
            if not _SCOPES.issuperset(scopes):
                raise _invalid("invalid scopes")
        elif asked.grant_type == "refresh_token":
            if asked.token_type != "CLIENT-CREDENTIAL":  # noqa: S105 - the name of a kind
                raise _invalid("invalid token_type")
            if asked.refresh_token not in self._refreshes:
                raise _invalid("invalid refresh token")
            scopes = self._refreshes.pop(asked.refresh_token)
        else:
            raise _invalid("invalid grant_type")
        self.tokens += 1
        now, wall, value, refresh = self._clock.now(), self._wall(), uuid4().hex, uuid4().hex
        self._grants = {token: grant for token, grant in self._grants.items() if grant.expires > wall}
        self._grants[value] = _Grant(scopes, wall + self._token_seconds)
        self._refreshes[refresh] = scopes
        result = {
            "value": value,
            "scopes": scopes,
            "lifeTime": round(self._token_seconds * 1000),
            "creationDate": jalali(now.date()).replace("/", "") + f"{now:%H%M%S}",
            "refreshToken": refresh,
        }
        return {"result": result, "status": "DONE"}

    async def _realtime(self, request: Request) -> Response:
        try:
            return self._answer(request)
        except _Refused as refused:
            return self._refuse(request, refused)

    def _authorise(self, request: Request, scope: str) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        grant = self._grants.get(token)
        if kind.lower() != "bearer" or grant is None or grant.expires <= self._wall():
            raise _Refused(401, "UNAUTHORIZED", "invalid token")
        if request.path_params["client_id"] != self._client_id:
            raise _Refused(403, "FORBIDDEN", "the token belongs to another client")
        if scope not in grant.scopes:
            raise _Refused(403, "FORBIDDEN", f"the token has no scope {scope}")

    def _answer(self, request: Request) -> Response:
        successor = request.url.path.endswith("/realTimeTrades")
        self._authorise(request, SUCCESSOR_SCOPE if successor else SCOPE)
        query = request.query_params
        track_id = query.get("trackId", "")
        if not re.fullmatch("[0-9A-Za-z]{1,40}", track_id):
            raise _invalid("trackId must be 1 to 40 letters and digits")
        if track_id in self._track_ids:
            raise _invalid("trackId is duplicated")
        _remember(self._track_ids, track_id, None, 100_000)
        if successor:
            return self._done(request, track_id, self._successor(request), successor=True)
        for name in ("isTimePeriod", "precedencyRight"):
            if query.get(name) not in {"true", "false"}:
                raise _invalid(f"{name} must be true or false")
        for name in ("fromTime", "toTime"):
            if not re.fullmatch("(([01][0-9]|2[0-3])[0-5][0-9])?", query.get(name, "")):
                raise _invalid(f"{name} must be HHMM")
        if not re.fullmatch("[0-9]{0,9}", query.get("coId", "")):
            raise _invalid("coId must be a number")
        company = int(query.get("coId") or 0)
        period, rights = query["isTimePeriod"] == "true", query["precedencyRight"] == "true"
        if period:
            if not company:
                raise _invalid("coId is required when isTimePeriod is true")
            start, end = query.get("fromTime") or "0000", query.get("toTime") or "2359"
            if start > end:
                raise _invalid("fromTime is after toTime")
            rows = self._market.history(self._clock.now(), company, "00:00", f"{end[:2]}:{end[2:]}")
            rows = [row for row in rows if row["PrecedencyRight"] is rights]
            rows = _each(rows) if self._minutes == "each" else rows
            begin = f"{start[:2]}:{start[2:]}"
            result = msgspec.json.encode([row for row in rows if row["TradeDateGre"][11:16] >= begin])
        elif company:
            rows = self._market.rows(self._clock.now(), rights)
            result = msgspec.json.encode([row for row in rows if row["CoID"] == company])
        else:
            if not rights:
                self._next(request)
            result = self._whole_market(rights)
        return self._done(request, track_id, result)

    def _next(self, request: Request) -> None:
        if request.scope.get(PEEK):
            return
        self._clock.polled()
        self.served += 1
        self._last_poll = self._clock.now()

    def _successor(self, request: Request) -> bytes:
        """Return the rows as the successor has them: other names, dates for times, shares and rights together."""
        company = request.query_params.get("companyId", "")
        if not re.fullmatch("[0-9]{0,9}", company):
            raise _invalid("companyId must be a number")
        if not company:
            self._next(request)
        now = self._clock.now()
        rows = [*self._market.rows(now, rights=False), *self._market.rows(now, rights=True)]
        chosen = [row for row in rows if not company or row["CoID"] == int(company)]
        return msgspec.json.encode(
            [
                {_RENAMED.get(name, name[0].lower() + name[1:]): value for name, value in row.items() if name != "Type"}
                | {"gregorianDate": row["TradeDateGre"][:10].replace("/", "-") + "T00:00:00"}
                for row in chosen
            ]
        )

    def _done(self, request: Request, track_id: str, result: bytes, *, successor: bool = False) -> Response:
        counted = not request.scope.get(PEEK)
        self.calls += counted
        # As the documentation shows it: two values, and either may be the echo.
        ids = [track_id.encode(), uuid4().hex.encode()]
        first, second = ids if self.calls % 2 else reversed(ids)
        key = b'responseCode":"FN-BRSE-20000000000","status' if successor else self._status_key.encode()
        body = b'{"trackId":"%b","result":%b,"trackId":"%b","%b":"DONE"}' % (first, result, second, key)
        response = self._respond(request, body)
        if counted:
            response.sent = lambda: _remember(self._sent, track_id, time.time_ns() / 1e6, 1_000)
        return response

    def _whole_market(self, rights: bool) -> bytes:
        rows = self._market.rows(self._clock.now(), rights)
        known = self._encoded.get(rights)
        if known is None or known[0] is not rows:
            known = self._encoded[rights] = rows, msgspec.json.encode(rows)
        return known[1]

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> Server:
        """Serve in a thread until the handle is closed; port 0 takes any free one."""
        return serve(self.app, host, port)


def _each(rows: list[Row]) -> list[Row]:
    """Return minute rows whose totals are the minute's own."""
    before = [dict.fromkeys(_TOTALS, 0), *rows]
    return [
        {**row, **{name: row[name] - last[name] for name in _TOTALS}} for last, row in zip(before, rows, strict=False)
    ]


def practice_exchange(
    replay: str | Path | None = None,
    advance: str = "clock",
    *,
    speed: float = 1,
    seed: int = 1,
    instruments: int = 660,
    start: datetime | None = None,
    **account: Any,
) -> PracticeExchange:
    """Make a practice exchange as the command does; `account` goes on to `PracticeExchange`.

    `replay` is a capture or "real"; without it the market is simulated, one instrument in eleven a right. `start` is
    market time: by default 08:59 of the latest trading day, or the first response of the capture.
    """
    if replay is not None:
        day = CapturedDay.load(REAL_DAY if replay == "real" else Path(replay))
        if advance == "poll":
            return PracticeExchange(day, PollClock(day.times), seed=seed, **account)
        return PracticeExchange(day, MarketClock(start or day.times[0], speed, skip_nights=False), seed=seed, **account)
    if advance == "poll":
        raise ConfigurationError("--advance poll needs a captured day: give one with --replay FILE or --replay real")
    if start is None:
        today = datetime.now(TEHRAN).date()
        while not is_trading_day(today):
            today -= timedelta(days=1)
        start = _at(today, _DAY_STARTS)
    clock, rights = MarketClock(start, speed), instruments // 11
    market = SimulatedMarket(seed, clock.now().date(), instruments - rights, rights)
    return PracticeExchange(market, clock, seed=seed, **account)


@click.command(context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on; 0 takes any free one.")
@click.option("--replay", metavar="FILE|real", help="A captured day instead of the simulated market; real: 2019-08-21.")
@click.option(
    "--advance",
    type=click.Choice(["poll", "clock"]),
    default="clock",
    help="What moves a captured day on: each accepted call for all shares, or the market's clock.",
)
@click.option("--speed", type=click.FloatRange(0, min_open=True), default=1, help="Market seconds a second.")
@click.option("--seed", type=int, default=1, help="Of the simulated market: same seed, same market.")
@click.option("--instruments", type=click.IntRange(1, 300_000), default=660, help="How many; one in eleven is a right.")
@click.option(
    "--start",
    type=click.DateTime(["%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]),
    help="Market time, in Tehran, to begin at.  [default: 08:59 of the latest trading day, or the first response]",
)
@click.option(
    "--token-seconds", type=click.FloatRange(0, min_open=True), default=864_000, help="How long a token lives."
)
@click.option("--client-id", default="practice", help="The one client that has an account.")
@click.option("--client-secret-file", type=click.Path(path_type=Path), help="Its secret.  [default: the word practice]")
@click.option("--nid", help="The one national id that is accepted, made up.  [default: any ten digits]")
@click.option(
    "--status-key",
    type=click.Choice(["state", "status"]),
    default="state",
    help="What the outcome of a call is called; the provider's other services say status.",
)
@click.option(
    "--minutes",
    type=click.Choice(["cumulative", "each"]),
    default="cumulative",
    help="What the totals of minute rows are: the day's so far, or the minute's own.",
)
@fault_option
def exchange(host: str, port: int, start: datetime | None, client_secret_file: Path | None, **options: Any) -> None:
    """Run a practice exchange: the exchange's API over a made-up market or a day that happened."""
    try:
        options["client_secret"] = client_secret_file.read_text("utf-8").strip() if client_secret_file else "practice"
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--client-secret-file {client_secret_file} cannot be read: {error}") from None
    practice = practice_exchange(start=start.replace(tzinfo=TEHRAN) if start else None, **options)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with practice.serve(host, port) as server:
        market_time = practice.state()["market_time"]
        click.echo(f"practice exchange: {server.url}  client id: {options['client_id']}  market time: {market_time}")
        stop.wait()
