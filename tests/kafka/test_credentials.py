"""Clusters that refuse us, or send us to an address that we cannot reach."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from bourse_sandbox import kafka
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.registry import serve_registry
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


def test_the_assignment_strategy_is_fixed() -> None:
    """A house-wide setting is refused in a line; producers and administration clients do not mind it."""
    cluster = Cluster(
        "127.0.0.1:9", "http://127.0.0.1:9", settings={"partition.assignment.strategy": "cooperative-sticky"}
    )
    message = "-X partition.assignment.strategy=cooperative-sticky: this setting is fixed to range; leave it out"
    with pytest.raises(ConfigurationError) as caught:
        cluster.consumer("any")
    assert str(caught.value) == message
    cluster.admin()


@pytest.mark.kafka
def test_an_advertised_address_that_cannot_be_reached_is_named(
    own_kafka: Callable[..., Kafka], monkeypatch: pytest.MonkeyPatch, bourse: Callable[..., tuple[int, str, str]]
) -> None:
    """The bootstrap address answers; tail, doctor and produce name the other one, and the reason, within 15 seconds."""
    usual = "advertised.listeners=PLAINTEXT://127.0.0.1:{broker}"
    assert usual in kafka._PROPERTIES
    elsewhere = kafka._PROPERTIES.replace(usual, "advertised.listeners=PLAINTEXT://kafka.invalid:9092")
    monkeypatch.setattr(kafka, "_PROPERTIES", elsewhere)
    address = own_kafka().bootstrap_servers
    with serve_registry() as registry, practice_exchange("real", "poll").serve() as exchange:
        Cluster(address, registry.url).registry().register_all("bourse")
        where = ("--bootstrap-servers", address, "--registry-url", registry.url)
        account = ("--address", exchange.url, "--client-id", "practice", "--schedule", "always", "--clock", "response")
        monkeypatch.setenv("BOURSE_CLIENT_SECRET", "practice")
        monkeypatch.setenv("BOURSE_NID", "0123456789")
        for command in (("tail", "trades"), ("produce", "--once", *account), ("doctor", *account)):
            began = time.monotonic()
            code, out, err = bourse(*command, *where)
            assert code in ((1, 2) if command[0] == "doctor" else (2,))
            assert "broker 1 cannot be reached at kafka.invalid:9092 (Failed to resolve" in out + err, command
            assert time.monotonic() - began < 15
