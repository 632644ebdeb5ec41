"""The schema registry, through Confluent's client: services look ids up and never register."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar, cast

from confluent_kafka.schema_registry import ConfigCompatibilityLevel, Schema, SchemaRegistryClient, ServerConfig
from confluent_kafka.schema_registry.error import OAuthTokenError, SchemaRegistryError

from bourse_schemas.codec import Deserializer, Serializer, avro_schema
from bourse_schemas.compatibility import gate, refusal
from bourse_schemas.errors import ConfigurationError, SchemaIncompatible, Undecodable, UnknownSchema, Unreachable
from bourse_schemas.events import Event
from bourse_schemas.topics import TOPICS, Topic

E = TypeVar("E", bound=Event)
R = TypeVar("R")
P = ParamSpec("P")

COMPATIBILITY = ConfigCompatibilityLevel.FULL_TRANSITIVE
TIMEOUT_SECONDS = 4  # tried twice, and still an answer within ten seconds
UNKNOWN_SECONDS = 30.0
NUMBERS = ("timeout", "cache.", "max.retries", "retries.")  # how the names of numeric settings begin


class Registry:
    """A schema registry.

    Every method raises Unreachable when the registry does not answer and ConfigurationError when it refuses us.
    """

    def __init__(self, url: str, settings: Mapping[str, str] | None = None) -> None:
        self.url = url
        try:
            own = {key: int(value) if key.startswith(NUMBERS) else value for key, value in (settings or {}).items()}
            with _no_proxy_variables():
                self._client = SchemaRegistryClient(
                    {"timeout": TIMEOUT_SECONDS, "max.retries": 1, "retries.wait.ms": 100, **own, "url": url}
                )
        except (ValueError, TypeError, OSError) as error:
            raise ConfigurationError(
                f"the schema registry's settings are refused: {error}; see --registry-url and -X schema.registry.…"
            ) from error
        # Until when an id that the registry does not know is not asked for again: such records come by the thousand.
        self._unknown: dict[int, float] = {}
        self._user = str(own.get("basic.auth.user.info", "")).partition(":")[0] or "this client"
        weakref.finalize(self, self._client.close)

    def serializer(self, topic: Topic, prefix: str) -> Serializer[Any]:
        """Return the serializer of a topic; a subject or schema that is not registered is a ConfigurationError."""
        subject = topic.subject(prefix)
        try:
            found = self._ask(f"read subject {subject}", self._client.lookup_schema, subject, _schema(topic.event))
        except SchemaRegistryError as error:
            what = "is not registered" if error.error_code == 40401 else "has no version equal to this release's schema"
            raise ConfigurationError(
                f"subject {subject} {what} at {self.url}: run `bourse schemas register --registry-url {self.url} "
                f"--topic-prefix {prefix}`"
            ) from error
        if faults := gate(avro_schema(topic.event), self._released(subject)):
            raise ConfigurationError(f"subject {subject} at {self.url}: {refusal(faults)}")
        return Serializer(topic, cast("int", found.schema_id), prefix)

    def deserializer(self, event: type[E]) -> Deserializer[E]:
        """Return a deserializer that looks the writers' schemas up here."""
        return Deserializer(event, self.schema)

    def schema(self, schema_id: int) -> dict[str, Any]:
        """Return a writer's schema by id; an id unknown to the registry is an UnknownSchema."""
        unknown = f"schema id {schema_id} is unknown to the registry at {self.url}"
        if time.monotonic() < self._unknown.get(schema_id, 0.0):
            raise UnknownSchema(unknown)
        try:
            text = self._ask(f"read schema id {schema_id}", self._client.get_schema, schema_id).schema_str
        except SchemaRegistryError as error:
            self._unknown[schema_id] = time.monotonic() + UNKNOWN_SECONDS
            raise UnknownSchema(unknown) from error
        with suppress(ValueError):
            schema = json.loads(text or "")
            if isinstance(schema, dict):
                return schema
        raise Undecodable(f"schema id {schema_id} is not an Avro record")

    def register(self, topic: Topic, prefix: str) -> int:
        """Set the subject's compatibility, register the topic's schema, return its id. Repeating it changes nothing.

        Raises SchemaIncompatible when the registry refuses the schema because of the versions it has.
        """
        subject = topic.subject(prefix)
        if faults := gate(avro_schema(topic.event), self._released(subject)):
            raise SchemaIncompatible(f"{subject}: {refusal(faults)}")
        level = ServerConfig(compatibility=COMPATIBILITY)
        self._ask(f"set the compatibility of subject {subject}", self._client.set_config, subject, level)
        return self._ask(f"write subject {subject}", self._client.register_schema, subject, _schema(topic.event))

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
            level = self._ask(f"read subject {subject}", self._client.get_config, subject).compatibility_level
        except SchemaRegistryError:
            level = None
        if level is None or str(getattr(level, "value", level)) != COMPATIBILITY.value:
            return f"{subject}: compatibility is {level}, not {COMPATIBILITY.value}"
        return None

    def _released(self, subject: str) -> dict[int, Any]:
        """Return the schemas of a subject by version; nothing if it does not exist."""
        right = f"read subject {subject}"
        try:
            versions = self._ask(right, lambda: list(self._client.get_versions(subject)))
        except SchemaRegistryError:
            return {}
        found = {number: self._ask(right, self._client.get_version, subject, number) for number in versions}
        return {number: self._ask(right, json.loads, each.schema.schema_str or "") for number, each in found.items()}

    def _ask(self, right: str, question: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the answer to a question; `right` is what the user must be allowed to do.

        A SchemaRegistryError means that the registry has no such subject, version or id.
        """
        import httpx2
        from socksio.exceptions import SOCKSError  # what Confluent's client calls with

        try:
            return question(*args, **kwargs)
        except (httpx2.InvalidURL, ValueError, AttributeError, TypeError, KeyError) as error:
            # The client does not expect an answer that is not the API's.
            raise ConfigurationError(f"{self.url} is not a schema registry: is --registry-url right?") from error
        except OAuthTokenError as error:
            raise ConfigurationError(f"no token for the schema registry at {self.url}: {error}") from error
        except (httpx2.HTTPError, SOCKSError) as error:
            raise self._unreachable(error) from error
        except SchemaRegistryError as error:
            status = error.http_status_code
            text = f"(HTTP {status}): {error.error_message or ''}".partition("\n")[0][:200]
            if status in {401, 403}:
                raise ConfigurationError(
                    f"the schema registry at {self.url} refuses {self._user} to {right} (HTTP {status}): "
                    "see -X schema.registry.basic.auth.user.info=@FILE and the rights of this user"
                ) from error
            if status >= 500 or status == 429:
                raise Unreachable(f"the schema registry at {self.url} fails {text}") from error
            if status == 409:
                raise SchemaIncompatible(f"cannot {right}: {error.error_message}") from error
            if not 40400 <= (error.error_code or 0) < 40500:
                raise ConfigurationError(
                    f"{self.url} does not answer like a schema registry {text}: is --registry-url right?"
                ) from error
            raise

    def _unreachable(self, error: Exception) -> ConfigurationError:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        if "[SSL" in reason or "certificate" in reason:
            return ConfigurationError(
                f"no TLS connection to the schema registry at {self.url} ({reason}): "
                "see -X schema.registry.ssl.ca.location=FILE, and whether the port expects https"
            )
        hint = "; the port may expect https" * (self.url.startswith("http:") and "Protocol" in type(error).__name__)
        return Unreachable(
            f"the schema registry at {self.url} does not answer ({reason}): "
            f"is it running, and is --registry-url right?{hint}"
        )


@contextmanager
def _no_proxy_variables() -> Iterator[None]:
    """Hide the proxy variables: without a proxy Confluent's client would read them again, and fail on some values."""
    names = {f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")}
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _schema(event: type[Event]) -> Schema:
    return Schema(json.dumps(avro_schema(event), ensure_ascii=False), "AVRO")
