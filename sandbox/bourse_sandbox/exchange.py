"""A practice exchange: the exchange's API as a real HTTP server, so that no account is needed to try or to test.

PracticeMarket                         what is traded (market.py)
Clock         what time it is there    MarketClock | PollClock
PracticeExchange(market, clock)        the API as an ASGI application, with its errors and quirks
"""

from __future__ import annotations

import base64
import gzip
import hmac
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from uuid import uuid4

import click
import msgspec
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from bourse_sandbox.faults import PEEK, Fault, Faults
from bourse_sandbox.market import REAL_DAY, PracticeMarket, Row, jalali
from bourse_sandbox.options import market_options
from bourse_sandbox.serving import Server, serve
from bourse_schemas.watchdog import stop_on_signals

T = TypeVar("T")

SCOPE: Final = "bourse:trades-realtime:get"
SUCCESSOR_SCOPE: Final = "bourse:realTime-trades:get"
_SCOPES: Final = frozenset({SCOPE, SUCCESSOR_SCOPE})
# Names of the successor, where they are not the legacy name with a small first letter.
_RENAMED: Final = {
    "CoID": "companyId",
    "BourseSymbol": "companySymbol",
    "TradeDateGre": "gregorianDate",
    "TradeDate": "jalaaliDate",
    "ClosingPChgPercent": "closingPriceChangePercent",
    "ShareCount": "sharedCount",
}
# What a parameter must be: a pattern, and its description.
_NUMBER: Final = "[0-9]{0,9}", "a number"
_SUCCESSOR: Final = {"companyId": _NUMBER}
_LEGACY: Final = {
    **dict.fromkeys(["isTimePeriod", "precedencyRight"], ("true|false", "true or false")),
    **dict.fromkeys(["fromTime", "toTime"], ("(([01][0-9]|2[0-3])[0-5][0-9])?", "HHMM")),
    "coId": _NUMBER,
}
_GZIP: Final = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
_AFTER_THE_LAST: Final = timedelta(minutes=5)


class MarketClock:
    """A clock `speed` times as fast as the wall clock; five minutes after a day's last response the next day begins."""

    def __init__(self, market: PracticeMarket, speed: float = 1, wall: Callable[[], float] = time.monotonic) -> None:
        self._market, self._speed, self._wall, self._since = market, speed, wall, wall()
        self._day = market.times[-1] - market.times[0] + _AFTER_THE_LAST

    def now(self) -> datetime:
        """Return the market's time."""
        elapsed, responses = timedelta(seconds=(self._wall() - self._since) * self._speed), len(self._market.times)
        day = elapsed // self._day
        if self._market.responses is not None:  # the last day goes on
            day = min(day, self._market.responses // responses - 1)
        return self._market.moment(day * responses) + (elapsed - day * self._day)

    def polled(self) -> None:
        """Do nothing: time passes by itself."""


class PollClock:
    """A clock that stands still until it is polled: each accepted call for all shares moves it to the next response."""

    def __init__(self, market: PracticeMarket) -> None:
        self._market, self._polls = market, 0

    def now(self) -> datetime:
        """Return when the newest response served was received; before the first poll, a second earlier."""
        return self._market.moment(self._polls - 1) if self._polls else self._market.times[0] - timedelta(seconds=1)

    def polled(self) -> None:
        """Move to the next response; the last one is repeated."""
        self._polls += 1


class _Refused(HTTPException):
    """A call the exchange answers with an error body."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message)
        self.code = code


def _invalid(message: str) -> _Refused:
    return _Refused(400, "VALIDATION_ERROR", message)


class Clock(Protocol):
    """What time it is at the market."""

    def now(self) -> datetime:
        """Return the market's time."""

    def polled(self) -> None:
        """Note that an accepted call for all shares is about to be answered."""


def _remember(known: dict[str, T], key: str, value: T, most: int) -> None:
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]


class _TokenRequest(msgspec.Struct):
    grant_type: str
    nid: str = ""
    scopes: str = ""
    token_type: str = ""
    refresh_token: str = ""


class PracticeExchange:
    """The API of the exchange, the legacy one and its successor, over a market and a clock.

    Quirks of the real one are kept: `trackId` is twice in a response, and either may be the echo; the outcome is called
    `state`, not `status`; the lowest price is `minPrice`. `calls` counts the calls that would be charged. `nid` None
    accepts any ten digits.
    """

    def __init__(
        self,
        market: PracticeMarket,
        clock: Clock,
        *,
        client_id: str = "practice",
        client_secret: str = "practice",  # noqa: S107 - a practice exchange has nothing to protect
        nid: str | None = None,
        token_seconds: float = 864_000,
        faults: Sequence[str] = (),
        seed: int = 1,
        wall: Callable[[], float] = time.monotonic,
    ) -> None:
        self._market, self._clock, self._token_seconds = market, clock, token_seconds
        self._client_id, self._basic, self._nid = client_id, f"{client_id}:{client_secret}".encode(), nid
        self._wall = wall
        self._grants: dict[str, tuple[list[str], float]] = {}  # scopes and end, by token
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
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: self._refuse})
        self.faults = Faults(app, [*map(Fault.parse, faults)], forget=self._forget, seed=seed)
        self.app: ASGIApp = self.faults if faults else self.faults.app

    def _forget(self, refreshes: bool) -> None:
        self._grants.clear()
        if refreshes:
            self._refreshes.clear()

    def state(self) -> dict[str, Any]:
        """Return what `GET /practice/state` shows; `sent` is epoch milliseconds by track id, of the last calls."""
        return {
            "day_over": self._last_poll is not None and self._market.over(self._last_poll),
            "market_time": self._clock.now().isoformat(timespec="seconds"),
            "served": self.served,
            "responses": self._market.responses,
            "calls": self.calls,
            "tokens": self.tokens,
            "faults": dict(self.faults.counts),
            "sent": dict(self._sent),
        }

    async def _state(self, request: Request) -> Response:
        return self._respond(request, msgspec.json.encode(self.state()))

    def _respond(
        self, request: Request, body: bytes, status: int = 200, sent: BackgroundTask | None = None
    ) -> Response:
        date_header = format_datetime(self._clock.now().astimezone(UTC), usegmt=True)
        headers = {"Date": date_header, "Content-Type": "application/json; charset=utf-8"}
        if len(body) > 1_000 and _GZIP.search(request.headers.get("accept-encoding", "")):
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        return Response(body, status, headers, background=sent)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        status, message = getattr(error, "status_code", 500), getattr(error, "detail", "")
        body = {
            "status": "FAILED",
            "trackId": request.query_params.get("trackId") or uuid4().hex,
            "error": {"code": getattr(error, "code", "NOT_FOUND"), "message": message},
        }
        return self._respond(request, msgspec.json.encode(body), status)

    async def _token(self, request: Request) -> Response:
        return self._respond(request, msgspec.json.encode(self._grant(request, await request.body())))

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
            raise _invalid(f"the body is not a token request: {error}") from None
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
        self._grants = {token: grant for token, grant in self._grants.items() if grant[1] > wall}
        self._grants[value] = scopes, wall + self._token_seconds
        self._refreshes[refresh] = scopes
        result = {
            "value": value,
            "scopes": scopes,
            "lifeTime": round(self._token_seconds * 1000),
            "creationDate": jalali(now.date()).replace("/", "") + f"{now:%H%M%S}",
            "refreshToken": refresh,
        }
        return {"result": result, "status": "DONE"}

    def _authorise(self, request: Request, scope: str) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        scopes, expires = self._grants.get(token, ([], 0.0))
        if kind.lower() != "bearer" or expires <= self._wall():
            raise _Refused(401, "UNAUTHORIZED", "invalid token")
        if request.path_params["client_id"] != self._client_id:
            raise _Refused(403, "FORBIDDEN", "the token belongs to another client")
        if scope not in scopes:
            raise _Refused(403, "FORBIDDEN", f"the token has no scope {scope}")

    async def _realtime(self, request: Request) -> Response:
        successor = request.url.path.endswith("/realTimeTrades")
        self._authorise(request, SUCCESSOR_SCOPE if successor else SCOPE)
        query, track_id = request.query_params, request.query_params.get("trackId", "")
        if not re.fullmatch("[0-9A-Za-z]{1,40}", track_id):
            raise _invalid("trackId must be 1 to 40 letters and digits")
        if track_id in self._track_ids:
            raise _invalid("trackId is duplicated")
        _remember(self._track_ids, track_id, None, 100_000)
        for name, (pattern, text) in (_SUCCESSOR if successor else _LEGACY).items():
            if not re.fullmatch(pattern, query.get(name, "")):
                raise _invalid(f"{name} must be {text}")
        if successor:
            return self._done(request, track_id, self._successor(request), successor=True)
        company = int(query.get("coId") or 0)
        period, rights = query["isTimePeriod"] == "true", query["precedencyRight"] == "true"
        if period:
            if not company:
                raise _invalid("coId is required when isTimePeriod is true")
            times = query.get("fromTime") or "0000", query.get("toTime") or "2359"
            start, end = (f"{time_of_day[:2]}:{time_of_day[2:]}" for time_of_day in times)
            if start > end:
                raise _invalid("fromTime is after toTime")
            rows = self._market.history(self._clock.now(), company, start, end)
            result = msgspec.json.encode([row for row in rows if row["PrecedencyRight"] is rights])
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
        key = b'responseCode":"FN-BRSE-20000000000","status' if successor else b"state"
        body = b'{"trackId":"%b","result":%b,"trackId":"%b","%b":"DONE"}' % (first, result, second, key)

        async def sent() -> None:  # runs when the last byte was handed to the socket
            _remember(self._sent, track_id, time.time_ns() / 1e6, 1_000)

        return self._respond(request, body, sent=BackgroundTask(sent) if counted else None)

    def _whole_market(self, rights: bool) -> bytes:
        rows = self._market.rows(self._clock.now(), rights)
        known = self._encoded.get(rights)
        if known is None or known[0] is not rows:
            known = self._encoded[rights] = rows, msgspec.json.encode(rows)
        return known[1]

    def serve(self, host: str = "127.0.0.1", port: int = 0, tls: Path | None = None) -> Server:
        """Serve in a thread until the handle is closed; port 0 takes any free one."""
        return serve(self.app, host, port, tls)


def practice_exchange(
    replay: str | Path = "real",
    advance: str = "clock",
    *,
    speed: float = 1,
    days: int | None = None,
    instruments: int | None = None,
    **account: Any,
) -> PracticeExchange:
    """Make a practice exchange as the command does; `account` goes on to `PracticeExchange`.

    `replay` is a capture, or "real" for the bundled day. `days` None is one day if polls move it on, else no end.
    """
    days = 1 if days is None and advance == "poll" else days
    market = PracticeMarket.load(REAL_DAY if replay == "real" else Path(replay), days, instruments)
    return PracticeExchange(market, PollClock(market) if advance == "poll" else MarketClock(market, speed), **account)


@click.command(context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on; 0 takes any free one.")
@click.option("--speed", type=click.FloatRange(0, min_open=True), default=1, help="Market seconds per second.")
@market_options
def exchange(host: str, port: int, **market: Any) -> None:
    """Run a practice exchange: the exchange's API over a captured day, for the client `practice`, secret `practice`."""
    practice, stop = practice_exchange(**market), stop_on_signals()
    with practice.serve(host, port) as server:
        click.echo(f"practice exchange: {server.url}  market time: {practice.state()['market_time']}")
        stop.wait()
