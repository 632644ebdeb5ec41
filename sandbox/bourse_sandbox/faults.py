"""A practice exchange that misbehaves on purpose: everything that was seen of the real one, and worse.

A fault spoils answers to calls for all shares. Answers that are spoilt are not the exchange's next ones: what was not
delivered whole is served again, so that a captured day comes out exact whatever happened on the way.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bourse_schemas.errors import ConfigurationError

__all__ = ["KINDS", "Fault", "Faults", "fault_option"]

Row = dict[str, Any]

KINDS = {
    "token-401": "the token is refused with 401",
    "token-403": "the token is refused with 403",
    "token-400": "the token is refused with 400 VALIDATION_ERROR",
    "token-200": "the token is refused with 200, code UNAUTHORIZED and a Persian text",
    "token-bare": "the token is refused with a bare message",
    "scope": "403: the client has not this scope",
    "address": "403: the caller's address is not whitelisted",
    "quota": "the account's calls are used up",
    "rate": "429 with Retry-After",
    "duplicate-track-id": "400: the trackId was used before",
    "provider": "400 SERVICE_CALL_ERROR",
    "timeout": "408 REQUEST_TIME_OUT",
    "failed-200": "200 with status FAILED",
    "html": "502 with a page of a gateway's",
    "empty": "200 without a body",
    "truncated": "the connection ends in the middle of the body",
    "reset": "the connection is reset in the middle of the body",
    "broken-gzip": "the compressed body breaks off",
    "huge": "200 MB of body",
    "wrong-encoding": "the body is UTF-16",
    "nesting": "JSON nested a hundred thousand deep",
    "nan": "NaN for a number",
    "silence": "no answer at all",
    "slow": "the body drips for half a minute",
    "duplicates": "every instrument twice",
    "half": "less than half of the rows",
    "bad-rows": "every tenth row cannot be used",
    "renamed": "a field of every row has another name: a changed API",
    "other-day": "rows of the next day",
    "yesterday": "rows of the day before",
    "old-response": "an earlier response again",
    "frozen": "the data stand still, in fresh envelopes",
    "skew": "the exchange's clock is ten minutes ahead",
    "wrong-type": "a good body that calls itself HTML",
}
_REFUSALS: dict[str, tuple[int, str, str]] = {
    "token-401": (401, "UNAUTHORIZED", "expired"),
    "token-403": (403, "FORBIDDEN", "not allowed"),
    "token-400": (400, "VALIDATION_ERROR", "invalid token"),
    "token-200": (200, "UNAUTHORIZED", "توکن نامعتبر است"),
    "scope": (403, "FORBIDDEN", "the client has no such scope"),
    "address": (403, "FORBIDDEN", "your IP address is not whitelisted"),
    "quota": (400, "QUOTA", "quota exceeded"),
    "rate": (429, "TOO_MANY_REQUESTS", "slow down"),
    "duplicate-track-id": (400, "VALIDATION_ERROR", "trackId is duplicated"),
    "provider": (400, "SERVICE_CALL_ERROR", "the provider does not answer"),
    "timeout": (408, "REQUEST_TIME_OUT", "timeout of 40000ms exceeded"),
    "failed-200": (200, "SERVICE_CALL_ERROR", "failed"),
}
HUGE_MEGABYTES, DRIPS = 200, 30
_DAY = re.compile(rb'("TradeDateGre":")(\d{4}/\d{2}/)(\d{2})')


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when: with a probability, or from one call to another."""

    kind: str
    probability: float = 1.0
    first: int = 1
    last: float = float("inf")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read KIND, KIND:PROBABILITY, KIND@CALL or KIND@FIRST-LAST; raise ConfigurationError."""
        found = re.fullmatch(r"([\w-]+)(?::([0-9.]+)|@(\d+)(?:-(\d+))?)?", text)
        if found is None or found[1] not in KINDS:
            kinds = "\n".join(f"  {kind:<20}{doc}" for kind, doc in KINDS.items())
            raise ConfigurationError(
                f"--fault {text}: give KIND, KIND:PROBABILITY, KIND@CALL or KIND@FIRST-LAST, with a KIND of\n{kinds}"
            )
        kind, share, first, last = found.groups()
        try:
            probability = float(share or 1)
        except ValueError:
            probability = -1.0
        if not 0 < probability <= 1:
            raise ConfigurationError(f"--fault {text}: a probability lies between 0 and 1")
        begin = int(first or 1)
        return cls(kind, probability, begin, int(last) if last else float(begin) if first else float("inf"))


class Faults:
    """An ASGI application around the exchange's own, which spoils some of its answers.

    `rows` gives the market's present rows without moving it on; `envelope` puts rows into a response's body.
    """

    def __init__(
        self,
        app: ASGIApp,
        faults: Sequence[Fault],
        *,
        rows: Callable[[], list[Row]],
        envelope: Callable[[str, bytes], bytes],
        seed: int = 1,
    ) -> None:
        self._app, self._faults, self._rows, self._envelope = app, faults, rows, envelope
        self._chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
        self._calls = 0
        self._earlier: list[list[Row]] = []
        self._frozen: list[Row] | None = None
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope.get("query_string", b"")
        is_call = scope["type"] == "http" and scope["path"].endswith(("/trades/realtime", "/realTimeTrades"))
        if not is_call or b"precedencyRight=true" in query or b"isTimePeriod=true" in query:
            return await self._app(scope, receive, send)
        self._calls += 1
        kind = self._kind()
        if kind != "frozen":
            self._frozen = None
        if kind is None:
            if rows := self._rows():
                self._earlier = [*self._earlier[-9:], rows]
            return await self._app(scope, receive, send)
        self.counts[kind] += 1
        found = re.search(rb"trackId=(\w+)", query)
        return await self._spoil(kind, found[1].decode() if found else "", scope, receive, send)

    def _kind(self) -> str | None:
        for fault in self._faults:
            if fault.first <= self._calls <= fault.last and self._chance.random() < fault.probability:
                return fault.kind
        return None

    async def _spoil(self, kind: str, track_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        if kind in _REFUSALS:
            status, code, message = _REFUSALS[kind]
            error = {"status": "FAILED", "trackId": track_id, "error": {"code": code, "message": message}}
            extra = [(b"retry-after", b"5")] if kind == "rate" else []
            return await _send(send, status, msgspec.json.encode(error), extra)
        if kind in {"skew", "wrong-type"}:
            return await self._app(scope, receive, _changed(send, kind))
        if kind == "silence":
            while (await receive())["type"] != "http.disconnect":
                pass
            return None
        if kind == "huge":
            return await _drip(send, (b" " * 1_000_000 for _ in range(HUGE_MEGABYTES)), 0)
        body = self._body(kind, track_id)
        if kind == "slow":
            step = max(1, len(body) // DRIPS)
            return await _drip(send, (body[at : at + step] for at in range(0, len(body), step)), 1)
        if kind in {"truncated", "reset"}:
            await _begin(send, 200, [(b"content-length", str(len(body)).encode())])
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            return _cut(send, hard=kind == "reset")
        if kind == "broken-gzip":
            packed = gzip.compress(body, 1)
            return await _send(send, 200, packed[: len(packed) // 2], [(b"content-encoding", b"gzip")])
        return await _send(send, 502 if kind == "html" else 200, body)

    def _body(self, kind: str, track_id: str) -> bytes:
        rows = self._rows()
        if kind == "frozen":
            rows = self._frozen = self._frozen or rows
        elif kind == "old-response" and self._earlier:
            rows = self._earlier[0]
        elif kind == "half":
            rows = rows[: len(rows) * 2 // 5]
        elif kind == "duplicates":
            rows = [*rows, *rows]
        elif kind == "bad-rows":
            rows = [{**row, "TradeVolume": -1} if number % 10 == 0 else row for number, row in enumerate(rows)]
        elif kind == "renamed":
            rows = [{("Volume" if name == "TradeVolume" else name): row[name] for name in row} for row in rows]
        good = self._envelope(track_id, msgspec.json.encode(rows))
        if kind in {"other-day", "yesterday"}:
            step = 1 if kind == "other-day" else -1
            return _DAY.sub(lambda found: b"%b%b%02d" % (found[1], found[2], max(1, int(found[3]) + step)), good)
        spoilt = {
            "token-bare": b'{"message":"invalid token"}',
            "html": b"<html><body>502 Bad Gateway</body></html>",
            "empty": b"",
            "wrong-encoding": good.decode().encode("utf-16"),
            "nesting": b'{"result":' + b"[" * 100_000,
            "nan": re.sub(rb'"LastPrice":\d+', b'"LastPrice":NaN', good, count=1),
        }
        return spoilt.get(kind, good)


def _changed(send: Send, kind: str) -> Send:
    """Return a `send` that lies about the time or the kind of what it sends."""
    from datetime import timedelta
    from email.utils import format_datetime, parsedate_to_datetime

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            if kind == "wrong-type":
                headers[b"content-type"] = b"text/html"
            else:
                ahead = parsedate_to_datetime(headers[b"date"].decode()) + timedelta(minutes=10)
                headers[b"date"] = format_datetime(ahead, usegmt=True).encode()
            message = {**message, "headers": list(headers.items())}
        await send(message)

    return changed


async def _begin(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
    kind = (b"content-type", b"application/json; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *headers]})


async def _send(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    await _begin(send, status, [(b"content-length", str(len(body)).encode()), *headers])
    await send({"type": "http.response.body", "body": body})


async def _drip(send: Send, pieces: Any, seconds: float) -> None:
    await _begin(send, 200, [])
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(seconds)
    await send({"type": "http.response.body", "body": b""})


def _cut(send: Send, *, hard: bool) -> None:
    """End the connection with half an answer on it: closed in good order, or reset."""
    transport = send.__self__.transport  # type: ignore[attr-defined]  # uvicorn's own
    if hard:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def fault_option(command: Any) -> Any:
    """Add `--fault`, repeatable; the command gets `faults: tuple[str, ...]`."""
    return click.option(
        "--fault",
        "faults",
        metavar="KIND[:PROBABILITY|@CALL]",
        multiple=True,
        help="Misbehave: always, with a probability, at one call for all shares or from one to another (@7-20). "
        "Repeatable; `--fault help` lists what there is.",
    )(command)
