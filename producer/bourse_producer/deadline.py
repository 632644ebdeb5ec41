"""One HTTP call with a deadline for the whole of it, from the name look-up to the last byte.

Time-outs of an HTTP client are per read: a server that sends a byte now and then never trips one, and a name look-up
has none. So the call runs in a thread, which is given up at the deadline.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2
from socksio.exceptions import SOCKSError

from bourse_schemas.errors import ExchangeNonsense, ExchangeUnavailable, Stuck

MOST_BYTES = 64 << 20
MOST_ABANDONED = 2
# How soon a stop is noticed, and how long a connection that was shut down takes to end its thread.
STOP_SECONDS, HANG_UP_SECONDS = 0.2, 0.5


@dataclass(eq=False)
class Transfer:
    """A call, as far as it came: `status` is None until the response's headers are read."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    stream: Any = None
    given_up: bool = False


class Transport:
    """Makes calls through an HTTP client, one at a time; `stopping` returns whether the process is to end."""

    def __init__(self, client: httpx2.Client, stopping: Callable[[], bool], most_bytes: int = MOST_BYTES) -> None:
        self._client, self._stopping, self._most_bytes = client, stopping, most_bytes
        self._stream: Any = None
        self._abandoned: list[threading.Thread] = []

    def call(self, transfer: Transfer, seconds: float, method: str, url: str, **request: Any) -> None:
        """Make a call within this time; raise ExchangeError if it failed.

        Raises Stuck if it is the third whose thread does not end: the process cannot be trusted any more.
        """
        if self._stopping():
            raise ExchangeUnavailable("internal", "stopped before the call")
        thread = threading.Thread(target=self._run, args=[transfer, method, url, request], daemon=True)
        thread.start()
        slices = math.ceil(seconds / STOP_SECONDS)
        for _ in range(slices):
            if transfer.done.wait(seconds / slices) or self._stopping():
                break
        if not transfer.done.is_set():
            self._give_up(transfer, thread)
            if self._stopping():
                raise ExchangeUnavailable("internal", "stopped during the call")
            raise ExchangeUnavailable("timeout", f"the answer took longer than {seconds:g} s")
        self._stream = transfer.stream or self._stream
        error = transfer.error
        if isinstance(error, httpx2.TimeoutException):
            message = f"the exchange did not answer in time ({type(error).__name__})"
            raise ExchangeUnavailable("timeout", message) from error
        if isinstance(error, httpx2.DecodingError):
            raise ExchangeNonsense("nonsense", f"the body cannot be unpacked: {error}") from error
        if isinstance(error, httpx2.HTTPError | SOCKSError):
            raise ExchangeUnavailable("network", f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if error is not None:
            raise error

    def _run(self, transfer: Transfer, method: str, url: str, request: dict[str, Any]) -> None:
        try:
            self._transfer(transfer, method, url, request)
        except BaseException as error:  # raised again by the thread that waits
            transfer.error = error
        finally:
            transfer.done.set()

    def _transfer(self, transfer: Transfer, method: str, url: str, request: dict[str, Any]) -> None:
        def note_stream(event: str, info: Mapping[str, Any]) -> None:
            if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                transfer.stream = info["return_value"]
                if transfer.given_up:
                    # A name look-up that ends at last must not lead to a call that nobody waits for.
                    transfer.stream.close()
                    raise httpx2.ConnectTimeout("given up")

        extensions = {"trace": note_stream}
        with self._client.stream(method, url, extensions=extensions, **request) as response:
            transfer.headers, transfer.status = response.headers, response.status_code
            if "," in response.headers.get("content-encoding", ""):
                # Each layer may be a thousand times as large as the one around it.
                raise ExchangeNonsense("nonsense", "the body is compressed more than once")
            for chunk in response.iter_bytes():
                transfer.body += chunk
                if len(transfer.body) > self._most_bytes:
                    raise ExchangeNonsense("nonsense", f"the body is larger than {self._most_bytes >> 20} MiB")

    def _give_up(self, transfer: Transfer, thread: threading.Thread) -> None:
        """Shut the connection down, so that the thread ends; count the thread if it does not."""
        transfer.given_up = True
        with suppress(OSError, AttributeError):
            # Closing it here would free its number for the next connection, from which this thread would then read.
            # The method of TLS sockets would take their state away under the reader.
            socket.socket.shutdown((transfer.stream or self._stream).get_extra_info("socket"), socket.SHUT_RDWR)
        thread.join(HANG_UP_SECONDS)
        self._abandoned = [each for each in (*self._abandoned, thread) if each.is_alive()]
        if len(self._abandoned) > MOST_ABANDONED:
            raise Stuck(f"{len(self._abandoned)} calls to the exchange have not ended after their deadline")
