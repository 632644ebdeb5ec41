"""The small registry, and Apicurio beside it: what a client sees is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient, SchemaRegistryError

from bourse_sandbox.registry import serve_registry
from bourse_schemas.errors import ConfigurationError


def _schema(*fields: dict[str, Any]) -> Schema:
    return Schema(json.dumps({"type": "record", "name": "R", "fields": list(fields)}), "AVRO")


A = {"name": "a", "type": "long"}
B = {"name": "b", "type": "string"}
B_OPTIONAL = {"name": "b", "type": ["null", "string"], "default": None}


def _no_b(new: dict[str, Any], old: dict[int, Any]) -> list[str]:
    """Refuse a second field without a default: a compatibility rule small enough for a test."""
    names = {field["name"] for schema in old.values() for field in schema["fields"]}
    return [f"{f['name']} has no default" for f in new["fields"] if f["name"] not in names and "default" not in f]


def _code(error: pytest.ExceptionInfo[SchemaRegistryError]) -> int:
    return int(error.value.error_code)


@pytest.fixture(params=["small", pytest.param("apicurio", marks=pytest.mark.kafka)])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the address of each registry in turn."""
    if request.param == "apicurio":
        yield request.getfixturevalue("apicurio_url")
    else:
        with serve_registry(compatible=_no_b) as registry:
            yield registry.url


@pytest.fixture
def client(url: str) -> Iterator[SchemaRegistryClient]:
    """Give a client of the registry."""
    with SchemaRegistryClient({"url": url}) as client:
        yield client


def test_a_schema_lives_through_its_versions(url: str, client: SchemaRegistryClient, prefix: str) -> None:
    """Register, look up, list, fetch by id, latest: what the schemas room does."""
    subject = f"{prefix}.trades-value"
    client.set_compatibility(subject, "FULL_TRANSITIVE")
    first = client.register_schema(subject, _schema(A))
    second = client.register_schema(subject, _schema(A, B_OPTIONAL))
    with SchemaRegistryClient({"url": url}) as fresh:  # the other one answers from its cache
        assert fresh.register_schema(subject, _schema(A)) == first
        assert subject in fresh.get_subjects()
        assert fresh.get_versions(subject) == [1, 2]
        assert fresh.lookup_schema(subject, _schema(A, B_OPTIONAL)).schema_id == second
        assert fresh.get_latest_version(subject).version == 2
        assert fresh.get_version(subject, 1).schema_id == first
        assert json.loads(str(fresh.get_schema(first).schema_str)) == json.loads(str(_schema(A).schema_str))
        assert fresh.get_compatibility(subject) == "FULL_TRANSITIVE"


def test_an_incompatible_schema_is_refused_with_the_reason(client: SchemaRegistryClient, prefix: str) -> None:
    """A check says no, registering is a 409, and NONE lets it pass."""
    subject = f"{prefix}.trades-value"
    client.set_compatibility(subject, "FULL_TRANSITIVE")
    client.register_schema(subject, _schema(A))
    assert client.test_compatibility(subject, _schema(A, B_OPTIONAL)) is True
    assert client.test_compatibility(subject, _schema(A, B)) is False
    with pytest.raises(SchemaRegistryError) as error:
        client.register_schema(subject, _schema(A, B))
    assert error.value.http_status_code == 409
    client.set_compatibility(subject, "NONE")
    assert client.register_schema(subject, _schema(A, B)) > 0


def test_what_is_missing_has_its_own_code(client: SchemaRegistryClient, prefix: str) -> None:
    """Subject, version, schema: 40401, 40402, 40403."""
    with pytest.raises(SchemaRegistryError) as error:
        client.lookup_schema(f"{prefix}-none", _schema(A))
    assert _code(error) == 40401
    client.register_schema(f"{prefix}-value", _schema(A))
    with pytest.raises(SchemaRegistryError) as error:
        client.get_version(f"{prefix}-value", 7)
    assert _code(error) == 40402
    with pytest.raises(SchemaRegistryError) as error:
        client.lookup_schema(f"{prefix}-value", _schema(B))
    assert _code(error) == 40403
    with pytest.raises(SchemaRegistryError) as error:
        client.get_schema(999_999)
    assert _code(error) == 40403


def test_the_same_schema_has_one_id_in_all_subjects_however_it_is_written(small_registry: str) -> None:
    """White space and the order of attributes make no new schema."""
    text = str(_schema(A).schema_str)
    again = json.dumps(dict(reversed(list(json.loads(text).items()))), indent=3)
    with SchemaRegistryClient({"url": small_registry}) as client:
        first = client.register_schema("one", Schema(text, "AVRO"))
        assert client.register_schema("two", Schema(again, "AVRO")) == first
        assert client.register_schema("one", Schema(again, "AVRO")) == first
        assert client.get_versions("one") == [1]


def test_it_remembers_across_a_restart_on_the_same_file(tmp_path: Path) -> None:
    """Ids in Kafka's records must mean the same tomorrow."""
    file = tmp_path / "registry.json"
    with serve_registry(file=file) as registry, SchemaRegistryClient({"url": registry.url}) as client:
        client.set_compatibility("s", "NONE")
        identity = client.register_schema("s", _schema(A))
    with serve_registry(file=file) as registry, SchemaRegistryClient({"url": registry.url}) as client:
        assert client.lookup_schema("s", _schema(A)).schema_id == identity
        assert client.get_compatibility("s") == "NONE"
        assert client.register_schema("s", _schema(B)) == identity + 1


def test_a_file_that_is_no_registry_is_the_operators_to_mend(tmp_path: Path) -> None:
    """It is never overwritten."""
    file = tmp_path / "registry.json"
    file.write_text("[]")
    with pytest.raises(ConfigurationError, match="is not a schema registry"):
        serve_registry(file=file)


def test_the_level_of_a_subject(small_registry: str) -> None:
    """A subject without a level of its own is a 40408; an unknown level is a 42203."""
    assert httpx2.get(f"{small_registry}/config/s").json()["error_code"] == 40408
    assert httpx2.put(f"{small_registry}/config/s", json={"compatibility": "FOO"}).json()["error_code"] == 42203
    httpx2.put(f"{small_registry}/config/s", json={"compatibility": "FULL"}).raise_for_status()
    assert httpx2.get(f"{small_registry}/config/s").json() == {"compatibilityLevel": "FULL"}


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"{}", b'{"schema": "nonsense"}', b'{"schema": "{}"}', b'{"schema": "{}", "schemaType": "JSON"}'],
)
def test_an_invalid_schema_is_a_42201(small_registry: str, body: bytes) -> None:
    """Whatever the client sends, it gets an answer of the API."""
    answer = httpx2.post(f"{small_registry}/subjects/s/versions", content=body)
    assert (answer.status_code, answer.json()["error_code"]) == (422, 42201)


def test_an_unknown_path_is_an_answer_of_the_api(small_registry: str) -> None:
    """Clients parse error_code in every body."""
    assert httpx2.get(f"{small_registry}/nowhere").json() == {"error_code": 404, "message": "Not Found"}


def test_the_port_given_is_taken(small_registry: str) -> None:
    """Said in one line."""
    port = int(small_registry.rsplit(":", 1)[1])
    with pytest.raises(ConfigurationError, match=f"port {port} is taken"):
        serve_registry(port=port)
