"""The schema registry, through Confluent's REST interface: services look ids up and never register."""

from __future__ import annotations

import json
import ssl
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

import httpx2
import msgspec
from socksio.exceptions import SOCKSError

from bourse_schemas.codec import Deserializer, Serializer, avro_schema
from bourse_schemas.compatibility import gate, refusal
from bourse_schemas.errors import ConfigurationError, SchemaIncompatible, Undecodable, UnknownSchema, Unreachable
from bourse_schemas.events import Event
from bourse_schemas.topics import TOPICS, Topic

E = TypeVar("E", bound=Event)
R = TypeVar("R")

COMPATIBILITY = "FULL_TRANSITIVE"
TIMEOUT_SECONDS = 4.0
UNKNOWN_SECONDS = 30.0
# The settings, named as in Confluent's clients.
CLIENT_CERTIFICATE = ("ssl.certificate.location", "ssl.key.location", "ssl.key.password")
SETTINGS = ("basic.auth.user.info", "bearer.auth.token", "ssl.ca.location", *CLIENT_CERTIFICATE)


class _Answer(msgspec.Struct):
    id: int = 0
    schema: str = ""
    level: str | None = msgspec.field(name="compatibilityLevel", default=None)
    error_code: int = 0
    message: str = ""


class _Missing(Exception):
    """The registry has no such subject, version or id."""


class Registry:
    """A schema registry; `proxy` is the URL of the proxy that leads to it.

    Every method raises Unreachable when the registry does not answer and ConfigurationError when it refuses us.
    """

    def __init__(self, url: str, settings: Mapping[str, str] | None = None, proxy: str | None = None) -> None:
        self.url, own = url, dict(settings or {})
        user, colon, password = own.get("basic.auth.user.info", "").partition(":")
        self._user = user if colon else "this client"
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if token := own.get("bearer.auth.token"):
            headers["Authorization"] = f"Bearer {token}"
        try:
            if unknown := own.keys() - set(SETTINGS):
                raise ValueError(f"{min(unknown)} is unknown; settings are {', '.join(SETTINGS)}")
            if user and not colon:
                raise ValueError("basic.auth.user.info is not USER:PASSWORD")
            if httpx2.URL(url).scheme not in {"http", "https"}:
                raise ValueError("the address does not begin with http:// or https://")
            tls = ssl.create_default_context(cafile=own.get("ssl.ca.location"))
            if own.keys() & set(CLIENT_CERTIFICATE):
                certificate, key, key_password = map(own.get, CLIENT_CERTIFICATE)
                tls.load_cert_chain(certificate or "", key, key_password)
            transport = httpx2.HTTPTransport(verify=tls, proxy=proxy, retries=1)
            how: dict[str, Any] = {"auth": (user, password) if colon else None, "headers": headers}
            client = httpx2.Client(base_url=url, transport=transport, timeout=TIMEOUT_SECONDS, trust_env=False, **how)
        except (ValueError, OSError, httpx2.InvalidURL) as error:
            raise ConfigurationError(
                f"the schema registry's settings are refused: {error}; see --registry-url"
            ) from error
        self._client = client
        self._schemas: dict[int, dict[str, Any]] = {}
        # Until when an id that the registry does not know is not asked for again: such records come by the thousand.
        self._unknown: dict[int, float] = {}
        weakref.finalize(self, client.close)

    def serializer(self, topic: Topic, prefix: str) -> Serializer[Any]:
        """Return the serializer of a topic; a subject or schema that is not registered is a ConfigurationError."""
        subject = topic.subject(prefix)
        released = self._released(subject)
        try:
            found = self._ask(f"read subject {subject}", _Answer, "POST", f"subjects/{subject}", _body(topic))
        except _Missing as error:
            what = "has no version equal to this release's schema" if released else "is not registered"
            raise ConfigurationError(
                f"subject {subject} {what} at {self.url}: run `bourse schemas register --registry-url {self.url} "
                f"--topic-prefix {prefix}`"
            ) from error
        if faults := gate(avro_schema(topic.event), released):
            raise ConfigurationError(f"subject {subject} at {self.url}: {refusal(faults)}")
        return Serializer(topic, found.id, prefix)

    def deserializer(self, event: type[E]) -> Deserializer[E]:
        """Return a deserializer that looks the writers' schemas up here."""
        return Deserializer(event, self.schema)

    def schema(self, schema_id: int) -> dict[str, Any]:
        """Return a writer's schema by id; an id unknown to the registry is an UnknownSchema."""
        unknown = f"schema id {schema_id} is unknown to the registry at {self.url}"
        if schema_id in self._schemas:
            return self._schemas[schema_id]
        if time.monotonic() < self._unknown.get(schema_id, 0.0):
            raise UnknownSchema(unknown)
        try:
            text = self._ask(f"read schema id {schema_id}", _Answer, "GET", f"schemas/ids/{schema_id}").schema
        except _Missing as error:
            self._unknown[schema_id] = time.monotonic() + UNKNOWN_SECONDS
            raise UnknownSchema(unknown) from error
        with suppress(ValueError):
            schema = json.loads(text)
            if isinstance(schema, dict):
                return self._schemas.setdefault(schema_id, schema)
        raise Undecodable(f"schema id {schema_id} is not an Avro record")

    def register(self, topic: Topic, prefix: str) -> int:
        """Set the subject's compatibility, register the topic's schema, return its id. Repeating it changes nothing.

        Raises SchemaIncompatible when the registry refuses the schema because of the versions it has.
        """
        subject = topic.subject(prefix)
        if faults := gate(avro_schema(topic.event), self._released(subject)):
            raise SchemaIncompatible(f"{subject}: {refusal(faults)}")
        level = {"compatibility": COMPATIBILITY}
        self._ask(f"set the compatibility of subject {subject}", _Answer, "PUT", f"config/{subject}", level)
        return self._ask(f"write subject {subject}", _Answer, "POST", f"subjects/{subject}/versions", _body(topic)).id

    def register_all(self, prefix: str) -> dict[str, int]:
        """Register every topic's schema; return the ids by subject."""
        return {topic.subject(prefix): self.register(topic, prefix) for topic in TOPICS}

    def check(self, topic: Topic, prefix: str) -> str | None:
        """Return None when the topic's schema is registered or may be; otherwise what prevents it, in one line."""
        subject = topic.subject(prefix)
        released = self._released(subject)
        if not released:
            return f"{subject} is not registered: run `bourse schemas register --topic-prefix {prefix}`"
        if faults := gate(avro_schema(topic.event), released):
            return f"{subject}: {refusal(faults)}"
        try:
            level = self._ask(f"read subject {subject}", _Answer, "GET", f"config/{subject}").level
        except _Missing:
            level = None
        return None if level == COMPATIBILITY else f"{subject}: compatibility is {level}, not {COMPATIBILITY}"

    def _released(self, subject: str) -> dict[int, Any]:
        """Return the schemas of a subject by version; nothing if it does not exist."""
        right, path = f"read subject {subject}", f"subjects/{subject}/versions"
        try:
            versions = self._ask(right, list[int], "GET", path)
        except _Missing:
            return {}
        texts = {number: self._ask(right, _Answer, "GET", f"{path}/{number}").schema for number in versions}
        try:
            return {number: json.loads(text) for number, text in texts.items()}
        except ValueError as error:
            raise ConfigurationError(f"subject {subject} at {self.url} is not Avro") from error

    def _ask(self, right: str, kind: type[R], method: str, path: str, body: Mapping[str, str] | None = None) -> R:
        """Return the answer to a call; `right` is what the user must be allowed to do. Raises _Missing."""
        try:
            answer = self._client.request(method, path, json=body)
        except (httpx2.HTTPError, SOCKSError) as error:
            raise self._unreachable(error) from error
        status, reported = answer.status_code, _Answer()
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            if status == 200:
                return msgspec.json.decode(answer.content, type=kind)
            reported = msgspec.json.decode(answer.content, type=_Answer)
        text = f"(HTTP {status}): {reported.message}".partition("\n")[0][:200]
        if status in {401, 403}:
            raise ConfigurationError(
                f"the schema registry at {self.url} refuses {self._user} to {right} (HTTP {status}): "
                "see -X schema.registry.basic.auth.user.info=@FILE and the rights of this user"
            )
        # Only to a registration is a conflict an answer about the schema.
        if status == 409 and method == "POST" and path.endswith("/versions"):
            raise SchemaIncompatible(f"cannot {right}: {reported.message}")
        if status >= 500 or status in {409, 429}:
            raise Unreachable(f"the schema registry at {self.url} fails {text}")
        if 40400 <= reported.error_code < 40500:
            raise _Missing(text)
        raise ConfigurationError(f"{self.url} does not answer like a schema registry {text}: is --registry-url right?")

    def _unreachable(self, error: Exception) -> ConfigurationError:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        if "[SSL" in reason or "certificate" in reason:
            return ConfigurationError(
                f"no TLS connection to the schema registry at {self.url} ({reason}): "
                "see -X schema.registry.ssl.ca.location=FILE, and whether the port expects https"
            )
        hint = "; the port may expect https" * (self.url.startswith("http:") and "Protocol" in type(error).__name__)
        question = f"is it running, and is --registry-url right?{hint}"
        return Unreachable(f"the schema registry at {self.url} does not answer ({reason}): {question}")


def _body(topic: Topic) -> dict[str, str]:
    return {"schema": json.dumps(avro_schema(topic.event), ensure_ascii=False)}
