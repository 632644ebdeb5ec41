"""A broker that wants credentials and does not like ours."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.kafka import Cluster

API_VERSIONS, SASL_HANDSHAKE, SASL_AUTHENTICATE = 18, 17, 36
AUTHENTICATION_FAILED = 58


def _answer(key: int, correlation: int) -> bytes:
    """Answer as a broker does that knows PLAIN and refuses every password."""
    head = struct.pack(">i", correlation)
    if key == API_VERSIONS:
        # Version 0 of each: enough for a client to come as far as its password.
        apis = [(API_VERSIONS, 0, 0), (SASL_HANDSHAKE, 0, 1), (SASL_AUTHENTICATE, 0, 0), (3, 0, 4)]
        return head + struct.pack(">hi", 0, len(apis)) + b"".join(struct.pack(">hhh", *api) for api in apis)
    if key == SASL_HANDSHAKE:
        return head + struct.pack(">hi", 0, 1) + struct.pack(">h", 5) + b"PLAIN"
    refusal = b"wrong password"
    return head + struct.pack(">hh", AUTHENTICATION_FAILED, len(refusal)) + refusal + struct.pack(">i", 0)


def _serve(connection: socket.socket) -> None:
    with connection, suppress(OSError, struct.error):
        while size := connection.recv(4, socket.MSG_WAITALL):
            request = connection.recv(struct.unpack(">i", size)[0], socket.MSG_WAITALL)
            key, version, correlation = struct.unpack(">hhi", request[:8])
            if key == API_VERSIONS and version > 0:
                # "Unsupported version", in version 0's form: the client asks again.
                answer = struct.pack(">ihihhh", correlation, 35, 1, API_VERSIONS, 0, 0)
            else:
                answer = _answer(key, correlation)
            connection.sendall(struct.pack(">i", len(answer)) + answer)


@pytest.fixture
def strict_broker() -> Iterator[str]:
    """Run a broker that refuses every password; return its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=_serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_refused_credentials_are_the_operators_to_change(strict_broker: str) -> None:
    """Not an outage that a service would wait for."""
    settings = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "me",
        "sasl.password": "s3cr3t",
    }
    cluster = Cluster(strict_broker, "http://127.0.0.1:9", settings=settings)
    with pytest.raises(ConfigurationError, match=r"refuses User:me: .*wrong password") as caught:
        cluster.metadata(timeout=4)
    assert not isinstance(caught.value, Unreachable)
    assert "s3cr3t" not in str(caught.value)
