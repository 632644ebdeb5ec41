"""The board over HTTP: a page, the state as JSON and CSV, and its changes as server-sent events.

A frame is encoded and compressed once for all clients; a client is the id of the last frame that it has.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import math
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bourse_cli.health import Monitor
from bourse_consumers.board.feed import Feed
from bourse_consumers.board.state import CHANGE, OPS, State, row
from bourse_schemas.events import TEHRAN, PollMarker, PriceAlert
from bourse_schemas.topics import event_id

PAGE = Path(__file__).parent / "page"
TICK_SECONDS, BEAT_SECONDS, RING, STRIP, LAST = 1.0, 5.0, 256, 60, 20
PROBES = ("/livez", "/readyz", "/metrics")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
ROW = (
    *("instrument", "symbol", "title", "is_right", "last_price", "closing_price", "previous_close", "open_price"),
    *("high_price", "low_price", "volume", "value", "trade_count", "market_value", "traded_at", "sequence"),
)
POLL, ALERT = PollMarker.__struct_fields__, PriceAlert.__struct_fields__


def _object(event: object, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, row(event, names), strict=True))


def _head(state: State, now: float) -> dict[str, Any]:
    """Return everything but rows, alerts and polls; no trouble's text, which may hold a broker's address."""
    letter = state.last_letter
    return {
        "live": state.live_since is not None,
        "day": state.day,
        "poll_age": now - state.marker_at if state.marker else None,
        "silent": state.silent(now),
        "troubles": sorted(state.troubles),
        "totals": {op: state.totals[op] for op in OPS},
        "gaps": state.gaps(),
        "groups": [each._asdict() for each in state.groups or ()],
        "dead_letters": state.dead_letters,
        "last_letter": _object(letter, ("reason", "failed_at")) if letter else None,
        "undecodable": state.undecodable,
        "incomplete_polls": state.incomplete,
    }


def _alerts(state: State) -> list[dict[str, Any]]:
    episodes = (
        (alert, row(end, ("raised_at", "resolved_by")) if end else (None, None)) for alert, end in state.alerts()
    )
    return [_object(alert, ALERT) | {"resolved_at": at, "resolved_by": by} for alert, (at, by) in episodes]


class Publisher:
    """Turns the feed's state into frames, once a second at most."""

    def __init__(
        self, feed: Feed, monitor: Monitor, *, notice: Path | None = None, stop: threading.Event | None = None
    ) -> None:
        """Show the text of the file `notice` too; when `stop` is set, clients get one more frame and their end."""
        self.clients, self.has_font, self.ended = 0, False, False
        self.feed, self.woken = feed, asyncio.Event()
        self.monitor, self.metrics = monitor, monitor.board
        self.metrics.clients.set_function(lambda: self.clients)
        self.metrics.poll_age.set_function(lambda: time.monotonic() - (feed.state.marker_at or math.nan))
        self._notice, self._stop = notice, stop or threading.Event()
        self.last = int(time.time() * 1000)  # an id that no frame of an earlier run has
        self.frames: deque[tuple[int, bytes, bytes]] = deque(maxlen=RING)
        self._state: State | None = None
        self._shown: tuple[float, Any, Any, int] = (0.0, None, None, 0)
        self._snapshot: tuple[Any, bytes] = (None, b"")

    def tick(self, now: float) -> None:
        """Make a frame if the state changed, or as a sign of life."""
        with self.feed.lock:
            state = self.feed.settled(now)
            if state is not self._state:
                self.metrics.rebuilds.inc(self._state is not None)
                self._state, self._shown = state, (0.0, None, None, 0)
                self.frames.clear()
                self.last += 1  # nobody has this frame: each client begins again with a snapshot
            at, shown, episodes, poll = self._shown
            content = state.version, self.notice()
            if shown == content and now - at < BEAT_SECONDS:
                return
            frame = _head(state, now) | {"notice": content[1]}
            rows = {candle.instrument: row(candle, ROW) for candle in state.today() if candle.instrument in state.dirty}
            frame["rows"], frame["gone"] = list(rows.values()), sorted(state.dirty - rows.keys())
            frame["polls"] = [_object(each, POLL) for each in state.markers if each.poll_sequence > poll][-STRIP:]
            if episodes != state.episodes:
                frame["alerts"] = _alerts(state)
            state.dirty.clear()
            newest = state.marker.poll_sequence if state.marker else 0
            self._shown = now, content, dict(state.episodes), newest
        self.last += 1
        plain = b"id: %d\ndata: %s\n\n" % (self.last, msgspec.json.encode(frame))
        self.frames.append((self.last, plain, _deflate(plain)))
        self.metrics.frames.inc()

    def notice(self) -> dict[str, str] | None:
        """Return the notice by language: the first line of its file is Persian, the last one English."""
        try:
            lines = self._notice.read_text("utf-8-sig").splitlines() if self._notice else []
        except (OSError, UnicodeDecodeError):
            lines = []
        return {"fa": lines[0], "en": lines[-1]} if lines else None

    def snapshot(self) -> bytes:
        """Return the whole state as JSON, compressed."""
        with self.feed.lock:
            state = self.feed.state
            if self._snapshot[0] != (key := (state, state.version, self.last)):
                polls = list(state.markers)[-STRIP:]
                body = {"id": self.last, **_head(state, time.monotonic()), "columns": ROW, "font": self.has_font}
                body["notice"] = self.notice()
                body["rows"] = [row(candle, ROW) for candle in state.today()]
                body |= {"alerts": _alerts(state), "polls": [_object(each, POLL) for each in polls]}
                self._snapshot = key, gzip.compress(msgspec.json.encode(body), 5)
            return self._snapshot[1]

    def day(self, instrument: str, after: int = 0) -> dict[str, Any] | None:
        """Return an instrument's changes of the day after a sequence, None if it has no candle today."""
        with self.feed.lock:
            state = self.feed.state
            if (candle := state.candles.get(instrument)) is None or candle.trading_day != state.day:
                return None
            changes = sorted(each for each in state.changes.get(instrument, {}).values() if each[0] > after)
            polls = {each[CHANGE.index("poll_sequence")] for each in changes[-LAST:]}
            name = "rights_poll_id" if candle.is_right else "poll_id"
            ids = {each.poll_sequence: getattr(each, name) for each in state.markers if each.poll_sequence in polls}
        what = {
            "instrument": instrument,
            "trading_day": candle.trading_day,
            "columns": (*CHANGE, "partition", "offset"),
        }
        return {**what, "changes": changes, "poll_ids": ids}

    async def stream(self, after: int, packed: bool) -> AsyncIterator[bytes]:
        """Yield frames after one, and a reset to a client that cannot go on from there."""
        self.clients += 1
        try:
            yield b"\x1f\x8b\x08\0\0\0\0\0\0\xff" if packed else b": frames\n\n"
            while True:
                woken, frames = self.woken, list(self.frames)
                if after > self.last or after < (frames[0][0] - 1 if frames else self.last):
                    plain, after = b"event: reset\ndata: {}\n\n", self.last
                    yield _deflate(plain) if packed else plain
                for number, plain, small in frames:
                    if number > after:
                        after = number
                        yield small if packed else plain
                if self.ended:
                    return
                await woken.wait()
        finally:
            self.clients -= 1

    async def run(self) -> None:
        """Make frames until `stop` is set, and a last one then. An error is the feed's, and ends the board."""
        while not self.ended:
            ending = self._stop.is_set()
            try:
                await asyncio.to_thread(self.tick, time.monotonic())
            except Exception as error:  # the command waits for this
                self.feed.failed = error
                return
            self.monitor.beat(10 * BEAT_SECONDS)
            self.ended = ending
            woken, self.woken = self.woken, asyncio.Event()
            woken.set()
            await asyncio.to_thread(self._stop.wait, TICK_SECONDS * (not ending))


def _deflate(plain: bytes) -> bytes:
    """Return blocks that may follow any other blocks cut by a full flush."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return deflate.compress(plain) + deflate.flush(zlib.Z_FULL_FLUSH)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Response:
    """Return a table as spreadsheets open it: with a BOM, Tehran times, and texts that are never formulas."""

    def cell(name: str, value: Any) -> Any:
        if name.endswith("_at") and value is not None:
            return f"{datetime.fromtimestamp(value / 1000, TEHRAN):%Y-%m-%d %H:%M:%S}"
        return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value

    text = io.StringIO("\ufeff")
    text.seek(1)
    csv.writer(text).writerows([columns, *([cell(*pair) for pair in zip(columns, each, strict=True)] for each in rows)])
    return Response(text.getvalue(), media_type="text/csv")


def _number(text: str) -> int:
    """Return a number of a request, 0 if it is not one or has more digits than ours."""
    return int(text) if text.isdecimal() and len(text) <= 18 else 0


class _Guard:
    """Answers GET only, to the names that are ours, with headers that keep a browser to this server."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], root: str) -> None:
        self._app, self._hosts, self._root = app, hosts, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if self._root and scope["path"] == self._root:
                app = RedirectResponse(f"{self._root}/")
            path = scope["path"].removeprefix(self._root)
            scope = {**scope, "path": path}
            if scope["method"] != "GET":
                app = PlainTextResponse("use GET\n", 405, {"Allow": "GET"})
            elif path not in PROBES and host not in self._hosts:
                app = PlainTextResponse("this name is not served here: see --allowed-host\n", 400)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, guarded)


def application(
    publisher: Publisher, *, hosts: Iterable[str] = (), root: str = "", font: Path | None = None, max_clients: int = 200
) -> ASGIApp:
    """Return the ASGI application; it makes the publisher's frames while it runs."""
    publisher.has_font = font is not None

    async def snapshot(request: Request) -> Response:
        body = await asyncio.to_thread(publisher.snapshot)
        if request.url.path.endswith(".csv"):
            return _csv(ROW, msgspec.json.decode(gzip.decompress(body))["rows"])
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(body, media_type="application/json", headers={"Content-Encoding": "gzip"})
        return Response(gzip.decompress(body), media_type="application/json")

    async def day(request: Request) -> Response:
        name, dot, _ = request.path_params["instrument"].partition(".csv")
        after = request.query_params.get("after", "")
        found = publisher.day(name, _number(after))
        if found is None:
            return PlainTextResponse("this instrument did not change today\n", 404)
        if not dot:
            return Response(msgspec.json.encode(found), media_type="application/json")
        names, changes = found["columns"], found["changes"]
        return _csv(("event_id", *names), [(event_id(name, found["trading_day"], each[0]), *each) for each in changes])

    async def events(request: Request) -> Response:
        if publisher.clients >= max_clients:
            publisher.metrics.refused.inc()
            return PlainTextResponse("too many clients: see --max-clients\n", 503, {"Retry-After": "10"})
        after = request.headers.get("last-event-id") or request.query_params.get("after", "")
        packed = "gzip" in request.headers.get("accept-encoding", "")
        frames = publisher.stream(_number(after), packed)
        encoding = {"Content-Encoding": "gzip"} if packed else {}
        return StreamingResponse(frames, media_type="text/event-stream", headers=encoding)

    async def probe(request: Request) -> Response:
        status, body, kind = publisher.monitor.answer(request.url.path)
        return Response(body, status, {"Content-Type": kind})

    @asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        frames = asyncio.create_task(publisher.run())
        yield
        frames.cancel()
        with suppress(asyncio.CancelledError):
            await frames

    routes = [
        Route("/", lambda _: FileResponse(PAGE / "board.html")),
        *([Route("/font.woff2", lambda _: FileResponse(font, media_type="font/woff2"))] if font else []),
        Route("/api/snapshot", snapshot),
        Route("/api/snapshot.csv", snapshot),
        Route("/api/day/{instrument}", day),
        Route("/api/events", events),
        *(Route(path, probe) for path in PROBES),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    names = frozenset({"127.0.0.1", "localhost", "::1", *(host.lower() for host in hosts)})
    return _Guard(Starlette(routes=routes, lifespan=running), names, root.rstrip("/"))
