"""A small HTTP server in a thread of this process."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Self

import uvicorn

from bourse_schemas.errors import ConfigurationError


class Server:
    """A running server; a context manager that stops it."""

    def __init__(self, server: uvicorn.Server, thread: threading.Thread, url: str) -> None:
        self._server = server
        self._thread = thread
        self.url = url  # without a slash at the end

    @property
    def running(self) -> bool:
        """Return whether it still serves."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop it; calls in progress get a second to end."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(app: Any, host: str = "127.0.0.1", port: int = 0, tls: Path | None = None) -> Server:
    """Serve an ASGI application, by default on a free port, and return when it answers.

    `tls` is a PEM file with a private key and its certificate: the server then speaks HTTPS. Raises ConfigurationError
    when the port is taken.
    """
    # asyncio switches Nagle's algorithm off only if the protocol is named; with it a large answer takes 40 ms more.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        raise ConfigurationError(f"port {port} is taken: stop what listens there, or choose another port") from None
    # uvicorn adds no Date header: the practice exchange sends the market's time. It logs nothing either: answers that
    # are cut off on purpose are not errors.
    quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
    config = uvicorn.Config(app, date_header=False, timeout_graceful_shutdown=1, ssl_certfile=tls, **quiet)
    server = uvicorn.Server(config)
    run = partial(asyncio.run, _serve(server, listener))
    thread = threading.Thread(target=run, name="http-server", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the HTTP server ended while it started")
        time.sleep(0.002)
    return Server(server, thread, f"{'https' if tls else 'http'}://{host}:{listener.getsockname()[1]}")


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve, and close every connection before the event loop ends: uvicorn leaves those of slow clients open."""
    try:
        await server.serve(sockets=[listener])
    finally:
        # asyncio has no public list of its transports, and uvicorn's own of connections is not complete.
        for transport in list(asyncio.get_running_loop()._transports.values()):  # type: ignore[attr-defined]  # noqa: SLF001
            transport.abort()
        await asyncio.sleep(0)
