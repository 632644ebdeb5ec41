"""A call ends at its deadline wherever it hangs, over TLS too, and none is made behind anyone's back."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bourse_producer.deadline import Transfer, Transport
from bourse_schemas.errors import ExchangeUnavailable, Stuck
from reliability.certificate import self_signed
from tests.producer.scripted import DONE

SECONDS = 0.3
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
Handler = Callable[[socket.socket, threading.Event], None]


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a certificate and its key."""
    return self_signed(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.fixture(autouse=True)
def _no_thread_is_left(wait_for: Callable[..., Any]) -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_for(lambda: threading.active_count() <= before)


@contextmanager
def server(handler: Handler, tls: ssl.SSLContext | None) -> Iterator[tuple[str, list[bytes]]]:
    """Serve every connection by a handler, after its request was read; yield the address and the requests."""
    release = threading.Event()
    requests: list[bytes] = []
    threads: list[threading.Thread] = []

    def serve(raw: socket.socket) -> None:
        with suppress(OSError), tls.wrap_socket(raw, server_side=True) if tls else raw as connection:
            requests.append(connection.recv(65_536))
            handler(connection, release)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=[listening.accept()[0]]))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{listening.getsockname()[1]}", requests
        finally:
            release.set()
            listening.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(10)


@contextmanager
def transport(pem: Path, stopping: Callable[[], bool] = lambda: False) -> Iterator[Transport]:
    """Return what makes calls, with time-outs of the client that never strike."""
    with httpx2.Client(verify=ssl.create_default_context(cafile=str(pem)), timeout=30) as client:
        yield Transport(client, stopping)


def late(calls: Transport, url: str) -> float:
    """Make a call that must end at its deadline; return the seconds it took."""
    began = time.monotonic()
    with pytest.raises(ExchangeUnavailable, match=r"^the answer took longer than 0\.3 s$") as caught:
        calls.call(Transfer(), SECONDS, "GET", url)
    assert caught.value.kind == "timeout"
    return time.monotonic() - began


def dripping(head: bytes, piece: bytes) -> Handler:
    """Return a handler that sends a beginning, then a piece again and again."""

    def drip(connection: socket.socket, release: threading.Event) -> None:
        connection.sendall(head)
        while not release.wait(0.02):
            connection.sendall(piece)

    return drip


def answer(connection: socket.socket, release: threading.Event) -> None:
    """Answer as the exchange does."""
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(DONE) + DONE)


HANDLERS = {
    "drips in its headers": dripping(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "drips in its body": dripping(HEAD + b"Content-Length: 100000\r\n\r\n", b" "),
    "drips in a body without a length": dripping(HEAD + b"Connection: close\r\n\r\n" + DONE, b" "),
    "stalls before its headers": dripping(b"", b""),
    "stalls in its body": dripping(HEAD + b"Content-Length: 100000\r\n\r\n{", b""),
}


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
@pytest.mark.parametrize("secure", [True, False], ids=["https", "http"])
def test_a_server_that_drips_or_stalls(pem: Path, secure: bool, handler: Handler) -> None:
    """Time after time: the thread of each such call ends with it, so none is counted."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if secure else None
    if tls is not None:
        tls.load_cert_chain(pem)
    with server(handler, tls) as (url, requests), transport(pem) as calls:
        assert max(late(calls, url) for _ in range(4)) < 3
        assert len(requests) == 4


def test_a_reused_connection(pem: Path) -> None:
    """The second call over the first one's connection ends at its deadline too."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pem)

    def answer_once(connection: socket.socket, release: threading.Event) -> None:
        answer(connection, release)
        connection.recv(65_536)
        release.wait(10)

    with server(answer_once, tls) as (url, requests), transport(pem) as calls:
        transfer = Transfer()
        calls.call(transfer, 10, "GET", url)
        assert (transfer.status, bytes(transfer.body)) == (200, DONE)
        assert late(calls, url) < 3
        assert len(requests) == 1


def test_a_handshake_that_never_ends(pem: Path) -> None:
    """Nothing can end its thread: two are given up, with the third the process is not to be trusted."""
    with server(dripping(b"", b""), None) as (url, _), transport(pem) as calls:
        secure = url.replace("http:", "https:")
        assert max(late(calls, secure) for _ in range(2)) < 3
        with pytest.raises(Stuck, match="3 calls to the exchange have not ended after their deadline"):
            calls.call(Transfer(), SECONDS, "GET", secure)


def test_threads_that_end_at_last_are_not_counted(pem: Path, wait_for: Callable[..., Any]) -> None:
    """Two hanging calls, now and then, are no reason to end."""
    for _ in range(2):
        with transport(pem) as calls:
            before = threading.active_count()
            for _ in range(2):
                with server(dripping(b"", b""), None) as (url, _):
                    late(calls, url.replace("http:", "https:"))
                wait_for(lambda before=before: threading.active_count() <= before)


def test_a_name_that_is_not_resolved(pem: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]) -> None:
    """The call ends at its deadline; when the resolver answers at last, no call is made that nobody waits for."""
    release, resolved = threading.Event(), socket.getaddrinfo

    def hang(*args: Any, **options: Any) -> Any:
        release.wait(10)
        return resolved(*args, **options)

    with server(answer, None) as (url, requests), transport(pem) as calls:
        named = url.replace("127.0.0.1", "localhost")
        before = threading.active_count()
        monkeypatch.setattr(socket, "getaddrinfo", hang)
        assert max(late(calls, named) for _ in range(2)) < 3
        with pytest.raises(Stuck):
            calls.call(Transfer(), SECONDS, "GET", named)
        release.set()
        wait_for(lambda: threading.active_count() <= before)
        assert [request for request in requests if request] == []
        transfer = Transfer()
        calls.call(transfer, 10, "GET", named)
        assert transfer.body == DONE


def test_a_stop_ends_the_call(pem: Path) -> None:
    """A service must end within seconds, also in the middle of a call."""
    stop = threading.Event()
    with server(dripping(b"", b""), None) as (url, requests), transport(pem, stop.is_set) as calls:
        threading.Timer(0.2, stop.set).start()
        began = time.monotonic()
        with pytest.raises(ExchangeUnavailable, match="stopped"):
            calls.call(Transfer(), 30, "GET", url)
        assert time.monotonic() - began < 3
        with pytest.raises(ExchangeUnavailable, match="stopped before the call"):
            calls.call(Transfer(), 30, "GET", url)
        assert len(requests) == 1
