"""The registry's client against servers that are none, and the offline check of compatibility."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from bourse_sandbox.serving import serve
from bourse_schemas.codec import avro_schema
from bourse_schemas.compatibility import gate
from bourse_schemas.errors import ConfigurationError, SchemaIncompatible, Undecodable, Unreachable
from bourse_schemas.events import TradeEvent
from bourse_schemas.registry import Registry
from bourse_schemas.topics import TOPICS, TRADES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """Return `answering(status, body)`: the address of a server that gives every call this answer."""
    servers = []

    def start(status: int, body: bytes) -> str:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": body})

        servers.append(serve(app))
        return servers[-1].url

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (401, b'{"error_code": 40101, "message": "no"}', ConfigurationError, "refuses this client to "),
        (403, b"", ConfigurationError, "refuses this client to "),
        (404, b"<html>nothing here</html>", ConfigurationError, "is --registry-url right"),
        (405, b'{"error_code": 405, "message": "no"}', ConfigurationError, "is --registry-url right"),
        (302, b"", ConfigurationError, "is --registry-url right"),
        (200, b"<html>welcome</html>", ConfigurationError, "is --registry-url right"),
        (200, b"[1]", ConfigurationError, "is --registry-url right"),
        (200, b"3", ConfigurationError, "is --registry-url right"),
        (500, b'{"error_code": 50001, "message": "store"}', Unreachable, "fails .HTTP 500.: store"),
        (503, b"<html>" + b"x" * 5000, Unreachable, "fails .HTTP 503."),
        (429, b'{"error_code": 429, "message": "slowly"}', Unreachable, "slowly"),
        (409, b'{"error_code": 409, "message": "not the leader"}', Unreachable, "fails .HTTP 409.: not the leader"),
    ],
)
def test_an_answer_that_is_no_registrys(
    answering: Callable[[int, bytes], str], status: int, body: bytes, error: type[Exception], says: str
) -> None:
    """One short line, whatever is asked: unreachable for a while, or for the operator to fix."""
    registry = Registry(answering(status, body))
    questions: list[Callable[[], object]] = [
        lambda: registry.serializer(TRADES, "bourse"),
        lambda: registry.register(TRADES, "bourse"),
        lambda: registry.check(TRADES, "bourse"),
        lambda: registry.schema(1),
    ]
    for ask in questions:
        with pytest.raises(error, match=says) as caught:
            ask()
        assert type(caught.value) is error
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


def test_a_conflict_when_a_schema_is_registered_is_about_the_schema() -> None:
    """It is refused for good; any other conflict passes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            status = {"GET": 404, "PUT": 200, "POST": 409}[scope["method"]]
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error_code": 40401, "message": "it does not fit"}'})

    server = serve(app)
    try:
        with pytest.raises(SchemaIncompatible, match=r"cannot write subject bourse\.trades-value: it does not fit"):
            Registry(server.url).register(TRADES, "bourse")
    finally:
        server.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_a_registry_that_is_not_there(bourse: Run, url: str) -> None:
    """Exit 2 with what to look at."""
    for command in ("register", "check"):
        code, out, err = bourse("schemas", command, "--registry-url", url)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"the schema registry at {url} does not answer" in err


def test_a_registry_that_is_silent_is_given_up_within_ten_seconds(bourse: Run) -> None:
    """It takes the call and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        code, _, err = bourse("schemas", "check", "--registry-url", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert (code, time.monotonic() - begin < 10) == (2, True)
        assert "does not answer" in err


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("nonsense", {}),
        ("", {}),
        ("http://127.0.0.1:1", {"nope": "1"}),
        ("http://127.0.0.1:1", {"basic.auth.user.info": "hush-hush"}),
        ("http://127.0.0.1:1", {"ssl.ca.location": "/nowhere"}),
        ("http://127.0.0.1:1", {"ssl.key.location": "/nowhere"}),
    ],
)
def test_settings_that_the_client_refuses(url: str, settings: dict[str, str]) -> None:
    """One line, without the secret."""
    with pytest.raises(ConfigurationError, match="the schema registry's settings are refused") as error:
        Registry(url, settings)
    assert "hush-hush" not in str(error.value)


def test_an_address_that_cannot_be_one() -> None:
    """It is found only when it is used."""
    with pytest.raises(ConfigurationError):
        Registry("http://127.0.0.1:port").check(TRADES, "bourse")


@pytest.mark.parametrize("text", ['"string"', "[]", "syntax = proto3;", '{"type": "object"}'])
def test_a_schema_that_is_no_avro_record_is_undecodable(answering: Callable[[int, bytes], str], text: str) -> None:
    """Another team's subject may hold anything."""
    escaped = text.replace('"', '\\"')
    registry = Registry(answering(200, f'{{"schema": "{escaped}"}}'.encode()))
    with pytest.raises(Undecodable):
        registry.deserializer(TradeEvent)(b"\x00\x00\x00\x00\x01abc")


# --- compatibility, offline -------------------------------------------------------------------------------------------


def _changed(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> dict[str, Any]:
    schema = deepcopy(avro_schema(TradeEvent))
    change(schema, {field["name"]: field for field in schema["fields"]})
    return schema


FAULTLESS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "nothing": lambda s, f: None,
    "docs": lambda s, f: f["op"].update(doc="new"),
    "a new nullable field": lambda s, f: s["fields"].append({"name": "x", "type": ["null", "long"], "default": None}),
    "a new symbol": lambda s, f: f["op"]["type"]["symbols"].append("SUSPENDED"),
}
FAULTY: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "string as bytes": (lambda s, f: f["title"].update(type="bytes"), "the type of title is bytes, was string"),
    "a field without a default": (
        lambda s, f: s["fields"].append({"name": "x", "type": "long"}),
        "version 1, x is new and has no default",
    ),
    "a needed field gone": (
        lambda s, f: s["fields"].remove(f["volume"]),
        "version 1, volume is gone",
    ),
    "another name": (lambda s, f: f["volume"].update(name="shares"), "shares is new and has no default"),
    "wider": (lambda s, f: f["volume"].update(type="double"), "version 1, the type of volume is double, was long"),
    "narrower": (lambda s, f: f["volume"].update(type="int"), "version 1, the type of volume is int, was long"),
    "nullable": (
        lambda s, f: f["volume"].update(type=["null", "long"]),
        "the type of volume is ['null', 'long'], was long",
    ),
    "no longer nullable": (
        lambda s, f: (f["company_id"].update(type="long"), f["company_id"].pop("default")),
        "the type of company_id is long, was ['null', 'long']",
    ),
    "another branch": (
        lambda s, f: f["company_id"].update(type=["null", "string"]),
        "the type of company_id is ['null', 'string'], was",
    ),
    "no logical type": (lambda s, f: f["traded_at"].update(type="long"), "the type of traded_at is long, was"),
    "micros": (
        lambda s, f: f["traded_at"]["type"].update(logicalType="timestamp-micros"),
        "'logicalType': 'timestamp-micros'",
    ),
    "another unit": (
        lambda s, f: f["volume"].update(type={"type": "long", "unit": "lots"}),
        "'unit': 'lots'",
    ),
    "a symbol gone": (
        lambda s, f: (f["op"]["type"]["symbols"].remove("REVISED"), f["op"]["type"].pop("default")),
        "version 1, op is no longer REVISED",
    ),
    "another enum": (
        lambda s, f: f["op"]["type"].update(name="Kind"),
        "the type of op is {'type': 'enum', 'name': 'ir.bourse.Kind'}, was",
    ),
    "another record": (lambda s, f: s.update(name="Trade"), "version 1, it is "),
    "another namespace": (lambda s, f: s.update(namespace="com"), "version 1, it is "),
}


@pytest.mark.parametrize("name", FAULTLESS)
def test_what_may_change(name: str) -> None:
    """Old readers and new ones go on."""
    changed = _changed(FAULTLESS[name])
    assert gate(changed, dict.fromkeys((1, 2), avro_schema(TradeEvent))) == []


@pytest.mark.parametrize("name", FAULTY)
def test_what_may_not_change(name: str) -> None:
    """Each fault names its field and the version it breaks."""
    change, says = FAULTY[name]
    faults = gate(_changed(change), {1: avro_schema(TradeEvent)})
    assert any(says in fault for fault in faults), faults


def test_every_older_version_counts() -> None:
    """A field may not come back with another type."""
    without = _changed(lambda s, f: s["fields"].remove(f["exchange_type"]))
    back = _changed(lambda s, f: f["exchange_type"].update(type=["null", "long"]))
    assert gate(back, {2: without}) == []
    (fault,) = gate(back, {1: avro_schema(TradeEvent), 2: without})
    assert fault.startswith("compared with version 1, the type of exchange_type is ")


def test_an_enum_without_a_default_cannot_grow() -> None:
    """Older readers would not know what to make of a new symbol."""
    old, new = (_changed(lambda s, f: f["op"]["type"].pop("default")) for _ in range(2))
    new["fields"][[field["name"] for field in new["fields"]].index("op")]["type"]["symbols"].append("SUSPENDED")
    assert gate(new, {1: old}) == ["compared with version 1, op has other symbols and no default"]


def test_arrays_maps_and_fixed_are_looked_into() -> None:
    """And a union of records is compared branch by branch."""

    def record(kind: Any) -> dict[str, Any]:
        return {"type": "record", "name": "R", "fields": [{"name": "a", "type": kind}]}

    same = [{"type": "map", "values": {"type": "array", "items": "long"}}, {"type": "fixed", "name": "F", "size": 4}]
    for kind in (*same, ["null", *same], [record("long") | {"name": "X"}, record("string") | {"name": "Y"}]):
        assert gate(deepcopy(record(kind)) | {"doc": "new"}, {1: record(kind)}) == []
    assert gate(record({"type": "map", "values": "long"}), {1: record({"type": "map", "values": "string"})})
    assert gate(record({"type": "fixed", "name": "F", "size": 5}), {1: record(same[1])})
    assert gate(record({"type": "array", "items": "long"}), {1: record({"type": "map", "values": "long"})})


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_a_schema_is_compatible_with_itself_and_with_no_other(topic: Any) -> None:
    """All five."""
    for other in TOPICS:
        assert (not gate(avro_schema(topic.event), {1: avro_schema(other.event)})) == (topic is other)


@pytest.mark.parametrize(
    "variables",
    [
        {"ALL_PROXY": "socks://127.0.0.1:1"},
        {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1,[::1]"},
        {"http_proxy": "http://127.0.0.1:1"},
    ],
)
def test_a_registry_on_loopback_is_not_proxied(
    bourse: Run, monkeypatch: pytest.MonkeyPatch, small_registry: str, variables: dict[str, str]
) -> None:
    """Whatever a desktop's variables hold."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bourse("schemas", "register", "--registry-url", small_registry)[0] == 0
    assert {name: os.environ[name] for name in variables} == variables


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpcore2 leaves the socket open
@pytest.mark.parametrize("reply", [b"\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_registry_is_asked_through_a_socks_proxy(bourse: Run, monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    """The proxy is given the registry's name; its refusal, or an answer that is not SOCKS, is no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        asked: list[bytes] = []

        def answer() -> None:
            while True:
                try:
                    connection = proxy.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(b"\x05\x00")  # no authentication
                    asked.append(connection.recv(100))
                    connection.sendall(reply)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        monkeypatch.setenv("ALL_PROXY", f"socks5://127.0.0.1:{proxy.getsockname()[1]}")
        code, _, err = bourse("schemas", "check", "--registry-url", "http://registry.invalid:8081")
    assert (code, "does not answer" in err) == (2, True)
    assert b"registry.invalid" in asked[0]
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    code, _, err = bourse("schemas", "check", "--registry-url", "http://registry.invalid:8081")
    assert (code, err) == (2, "Error: ALL_PROXY: socks:// is not a supported proxy scheme; did you mean socks5://?\n")
    gc.collect()


def test_an_unknown_id_is_asked_for_once() -> None:
    """Thousands of records of a foreign schema do not ask the registry thousands of times."""
    asked: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked.append(scope["path"])
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error_code": 40403, "message": "Schema not found"}'})

    server = serve(app)
    try:
        registry = Registry(server.url)
        for _ in range(50):
            with pytest.raises(Undecodable, match="schema id 7 is unknown"):
                registry.schema(7)
    finally:
        server.close()
    assert len(asked) == 1
