"""A web server on this machine that keeps what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

__all__ = ["Asked", "Web", "serving"]


class Asked(NamedTuple):
    """One request, and when it came, by the monotonic clock."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float


class Web:
    """What was accepted. It answers with `status`, which may depend on what is asked; `then` is called before."""

    def __init__(self) -> None:
        self.url = ""
        self.status: int | Callable[[Asked], int] = 200
        self.asked: list[Asked] = []
        self.then: Callable[[], None] = lambda: None

    def bodies(self) -> list[Any]:
        """Return what was posted, as JSON."""
        return [json.loads(each.body) for each in self.asked]


@contextmanager
def serving() -> Iterator[Web]:
    """Run a web server until the block ends."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            asked = Asked(self.path, dict(self.headers.items()), body, time.monotonic())
            status = web.status if isinstance(web.status, int) else web.status(asked)
            if status == 200:
                web.asked.append(asked)
            web.then()
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Say nothing: whoever asked may have been killed."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
