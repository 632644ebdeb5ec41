"""A practice exchange that misbehaves on purpose: an ASGI wrapper with all that was seen of the real one, and worse.

A fault changes answers to accepted calls for all shares. A response that was not delivered whole is served again, so
that a captured day comes out exact whatever happened on the way.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import re
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import msgspec

from bourse_schemas.errors import ConfigurationError, did_you_mean

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Row = dict[str, Any]
_Answer = tuple[int, dict[bytes, bytes], bytes]

PEEK: Final = "practice.peek"
"""In a request's scope: true if the answer will not be delivered and must not count."""

_REFUSALS: Final[dict[str, tuple[int, str, str]]] = {
    "scope": (403, "FORBIDDEN", "the client has no such scope"),
    "token-401": (401, "UNAUTHORIZED", "expired"),
    "token-403": (403, "FORBIDDEN", "not allowed"),
    "token-400": (400, "VALIDATION_ERROR", "invalid token"),
    "token-200": (200, "UNAUTHORIZED", "توکن نامعتبر است"),
    "address": (403, "FORBIDDEN", "your IP address is not whitelisted"),
    "quota": (400, "QUOTA", "quota exceeded"),
    "quota-503": (503, "SERVICE_UNAVAILABLE", "the quota service is down"),
    "rate": (429, "TOO_MANY_REQUESTS", "slow down"),
    "duplicate-track-id": (400, "VALIDATION_ERROR", "trackId is duplicated"),
    "provider": (400, "SERVICE_CALL_ERROR", "the provider does not answer"),
    "timeout": (408, "REQUEST_TIME_OUT", "timeout of 40000ms exceeded"),
    "failed-200": (200, "SERVICE_CALL_ERROR", "failed"),
}
_BODIES: Final[dict[str, tuple[str, Callable[[bytes], bytes]]]] = {
    "token-bare": ("200 with nothing but a message", lambda _: b'{"message":"invalid token"}'),
    "html": ("502 with a gateway's page", lambda _: b"<html><body>502 Bad Gateway</body></html>"),
    "forbidden-page": ("403 with a page, not JSON", lambda _: b"<html><body>403 Forbidden</body></html>"),
    "maintenance": ("503 with a page and Retry-After: 86400", lambda _: b"<html><body>Maintenance</body></html>"),
    "empty": ("200 without a body", lambda _: b""),
    "broken-gzip": ("the compressed body breaks off", lambda body: gzip.compress(body, 1)[:-20]),
    "wrong-encoding": ("the body is UTF-16", lambda body: body.decode().encode("utf-16")),
    "nesting": ("JSON nested deeply", lambda _: b'{"state":"DONE","result":%b%b}' % (b"[" * 100_000, b"]" * 100_000)),
    "nan": ("NaN for a number", lambda body: re.sub(rb'("[Ll]astPrice":)\d+', rb"\1NaN", body, count=1)),
}
_ROWS: Final[dict[str, tuple[str, Callable[[list[Row]], list[Row]]]]] = {
    "duplicates": ("every instrument twice", lambda rows: [*rows, *rows]),
    "half": ("less than half of the rows", lambda rows: rows[: len(rows) * 2 // 5]),
    "bad-rows": (
        "every tenth row cannot be used",
        lambda rows: [_bad(row) if n % 10 == 0 else row for n, row in enumerate(rows)],
    ),
    "renamed": ("a field has another name: a changed API", lambda rows: [*map(_renamed, rows)]),
    "other-day": ("rows of the next day", lambda rows: [_dated(row, 1) for row in rows]),
    "yesterday": ("rows of the day before", lambda rows: [_dated(row, -1) for row in rows]),
}
_STATUS: Final = {"html": 502, "forbidden-page": 403, "maintenance": 503}
_RETRY_AFTER: Final = {"rate": b"5", "maintenance": b"86400"}
KINDS: Final[dict[str, str]] = {
    **{kind: f"{status} {code}: {message}" for kind, (status, code, message) in _REFUSALS.items()},
    **{kind: doc for kind, (doc, _) in (*_BODIES.items(), *_ROWS.items())},
    "expired": "the token has expired",
    "revoked": "no token and no refresh token given so far is valid any more",
    "truncated": "the connection ends in the middle of the body",
    "reset": "the connection is reset in the middle of the body",
    "silence": "nothing comes, and the connection stays open",
    "stall": "half of the body comes, and the connection stays open",
    "slow": "the body takes half a minute",
    "drip": "the body comes byte by byte, five a second",
    "huge": "200 MB of body",
    "wrong-type": "a good body that is labelled as HTML",
    "old-response": "the rows of an earlier response again",
    "frozen": "the data do not change, in fresh envelopes (reported once the market's time has passed for 3 minutes)",
    "skew": "the exchange's clock is ten minutes ahead",
}
"""What can go wrong, each with a description."""

_DELIVERED: Final = {None, "duplicates", "wrong-type", "skew"}
_RESULT: Final = re.compile(rb'(?<="result":)\[.*\]', re.DOTALL)


def _bad(row: Row) -> Row:
    return row | dict.fromkeys(row.keys() & {"TradeVolume", "tradeVolume"}, -1)


def _renamed(row: Row) -> Row:
    return {name.replace("Volume", "Amount"): value for name, value in row.items()}


def _dated(row: Row, days: int) -> Row:
    (name,) = row.keys() & {"TradeDateGre", "gregorianDate"}
    day = date.fromisoformat(row[name][:10].replace("/", "-")) + timedelta(days)
    return row | {name: day.isoformat().replace("-", row[name][4]) + row[name][10:]}


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong and when: with a probability, or from one call to another."""

    kind: str
    probability: float = 1.0
    first: int = 1
    last: float = float("inf")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read KIND, KIND:PROBABILITY, KIND@CALL or KIND@FIRST-LAST; raise ConfigurationError."""
        found = re.fullmatch(r"([\w-]+)(?::(0?\.\d+|[01](?:\.0*)?)|@(\d+)(?:-(\d+))?)?", text, re.ASCII)
        kind, share, first, last = found.groups() if found else ("",) * 4
        fault = cls(kind, float(share or 1), int(first or 1), int(last or first) if first else float("inf"))
        if kind in KINDS and fault.probability and 1 <= fault.first <= fault.last:
            return fault
        given, how = re.split("[:@]", text)[0], "give KIND, KIND:PROBABILITY (0 to 1), KIND@CALL or KIND@FIRST-LAST"
        if given not in KINDS:
            how = f"unknown kind of fault{did_you_mean(given, KINDS)}\n`--fault help` lists the kinds"
        raise ConfigurationError(f"--fault {text}: {how}")


class Faults:
    """An ASGI application around the exchange's own that changes some of its answers.

    A request with PEEK in its scope must be answered without a step of the market. `forget(refreshes)` makes every
    token unknown, and the refresh tokens too.
    """

    def __init__(self, app: ASGIApp, faults: Sequence[Fault], *, forget: Callable[[bool], None], seed: int = 1) -> None:
        self.app, self.due, self._forget = app, faults, forget
        self._chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
        self._calls = 0
        self._earlier: deque[bytes] = deque(maxlen=10)
        self._frozen: bytes | None = None
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = parse_qs(scope.get("query_string", b"").decode("ascii", "replace"))
        is_data = scope["type"] == "http" and scope["path"].endswith(("/trades/realtime", "/realTimeTrades"))
        if not is_data or query.keys() & {"coId", "companyId"} or query.get("precedencyRight") == ["true"]:
            await self.app(scope, receive, send)
            return
        due = (fault for fault in self.due if fault.first <= self._calls + 1 <= fault.last)
        kind = next((fault.kind for fault in due if self._chance.random() < fault.probability), None)
        answer = await self._ask(scope, receive, kind)
        if answer[0] == 200:
            self._calls += 1
            self.counts.update([kind] if kind else [])
            if kind in {"expired", "revoked"}:
                self._forget(kind == "revoked")
                answer = await self._ask(scope, receive, None)
            else:
                answer = self._changed(kind, answer, query["trackId"][0])
        await _deliver(kind, answer, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, kind: str | None) -> _Answer:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        plain = [header for header in scope["headers"] if kind is None or header[0] != b"accept-encoding"]
        await self.app({**scope, "headers": plain, PEEK: kind not in _DELIVERED}, receive, keep)
        body = b"".join(message.get("body", b"") for message in messages)
        headers = {name: value for name, value in messages[0]["headers"] if name != b"content-length"}
        return messages[0]["status"], headers, body

    def _changed(self, kind: str | None, answer: _Answer, track_id: str) -> _Answer:
        status, headers, body = answer
        rows = _RESULT.search(gzip.decompress(body) if b"content-encoding" in headers else body)
        result = rows[0] if rows else b""
        self._frozen = (self._frozen or result) if kind == "frozen" else None
        if kind is None:
            self._earlier.append(result)
            return answer
        if kind in _REFUSALS:
            status, code, message = _REFUSALS[kind]
            error = {"status": "FAILED", "trackId": track_id, "error": {"code": code, "message": message}}
            return status, headers | _retry(kind), msgspec.json.encode(error)
        if kind == "skew":
            ahead = parsedate_to_datetime(headers[b"date"].decode()) + timedelta(minutes=10)
            headers[b"date"] = format_datetime(ahead, usegmt=True).encode()
        elif kind == "broken-gzip":
            headers[b"content-encoding"] = b"gzip"
        elif kind in {*_STATUS, "wrong-type"}:
            headers[b"content-type"] = b"text/html"
        if kind in _BODIES:
            return _STATUS.get(kind, status), headers | _retry(kind), _BODIES[kind][1](body)
        if kind == "old-response" and self._earlier:
            result = self._earlier[0]
        elif self._frozen is not None:
            result = self._frozen
        elif kind in _ROWS:
            result = msgspec.json.encode(_ROWS[kind][1](msgspec.json.decode(result)))
        return status, headers, _RESULT.sub(lambda _: result, body)


def _retry(kind: str) -> dict[bytes, bytes]:
    return {b"retry-after": _RETRY_AFTER[kind]} if kind in _RETRY_AFTER else {}


async def _deliver(kind: str | None, answer: _Answer, receive: Receive, send: Send) -> None:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    (status, headers, body), left = answer, asyncio.ensure_future(gone())
    streamed, cut = kind in {"huge", "slow", "drip"}, kind in {"truncated", "reset"}
    headers |= {} if streamed else {b"content-length": b"%d" % len(body)}
    seconds = {"slow": 1.0, "drip": 0.2}.get(kind or "", 0.0)
    step = max(1, {"slow": len(body) // 30, "drip": 1}.get(kind or "", len(body)))
    pieces = (body[at : at + step] for at in range(0, len(body), step))
    if kind != "silence":
        await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
        for piece in repeat(b" " * 1_000_000, 200) if kind == "huge" else pieces:
            half = len(piece) // (1 + (cut or kind == "stall"))
            await send({"type": "http.response.body", "body": piece[:half], "more_body": True})
            if streamed and (await asyncio.wait({left}, timeout=seconds))[0]:
                return
    if cut:
        transport = send.__self__.transport  # type: ignore[attr-defined]  # uvicorn's: ASGI itself cannot hang up
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)  # with no time to linger a close is a reset
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()
        transport.close()
    if cut or kind in {"silence", "stall"}:
        await left
    else:
        left.cancel()
        await send({"type": "http.response.body"})
