"""The contract as an AsyncAPI 3.0 document, derived from `topics.py` and the `.avsc` files."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from bourse_schemas.codec import avro_schema
from bourse_schemas.topics import DEFAULT_PREFIX, TOPICS, Topic

__all__ = ["HEADERS", "asyncapi"]

# CloudEvents 1.0, the Kafka binding in binary mode: header, and what it holds.
HEADERS = {
    "ce_specversion": "Always `1.0`.",
    "ce_id": "What the record is about, the same whenever it is published: `event_id` of a change.",
    "ce_source": "Where the data comes from: `source` of the event.",
    "ce_type": "Kind and major version of the event.",
    "ce_time": "The record's timestamp, in UTC with milliseconds.",
    "ce_subject": "The record's key.",
    "content-type": "Always `application/vnd.apache.avro`.",
}
ABOUT = (
    "Trades of the Tehran exchange, as changes between two polls. A poll is one transaction: read with "
    "isolation.level=read_committed. Values are Avro in the Confluent wire format: a zero byte, four bytes of schema "
    "id, then Avro."
)
BINDING = "0.5.0"


def asyncapi(bootstrap_servers: str, registry_url: str, prefix: str = DEFAULT_PREFIX) -> dict[str, Any]:
    """Return the contract as an AsyncAPI 3.0 document: channels, messages, keys, headers, Kafka's settings."""
    kafka = {"schemaRegistryUrl": registry_url, "schemaRegistryVendor": "confluent", "bindingVersion": BINDING}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "bourse-stream",
            "version": version("bourse-stream"),
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/vnd.apache.avro",
        "servers": {"kafka": {"host": bootstrap_servers, "protocol": "kafka", "bindings": {"kafka": kafka}}},
        "channels": {topic.name: _channel(topic, prefix) for topic in TOPICS},
        "operations": {f"publish-{topic.name}": _operation(topic, prefix) for topic in TOPICS},
        "components": {"messages": {topic.event.__name__: _message(topic) for topic in TOPICS}},
    }


def _channel(topic: Topic, prefix: str) -> dict[str, Any]:
    name = topic.event.__name__
    settings: dict[str, Any] = {"cleanup.policy": [topic.cleanup]}
    if topic.retention_ms is not None:
        settings["retention.ms"] = topic.retention_ms
    kafka = {"partitions": topic.partitions, "topicConfiguration": settings, "bindingVersion": BINDING}
    return {
        "address": topic.full_name(prefix),
        "description": topic.doc,
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        "bindings": {"kafka": kafka},
    }


def _operation(topic: Topic, prefix: str) -> dict[str, Any]:
    summary = f"{topic.full_name(prefix)}: {topic.doc}"
    return {"action": "send", "channel": {"$ref": f"#/channels/{topic.name}"}, "summary": summary}


def _message(topic: Topic) -> dict[str, Any]:
    schema = avro_schema(topic.event)
    headers = {
        name: {"type": "string", "description": doc} | ({"const": topic.cloudevents_type} if name == "ce_type" else {})
        for name, doc in HEADERS.items()
        if topic.cloudevents_type
    }
    kafka = {
        "key": {"type": "string", "description": topic.key_doc},
        "schemaIdLocation": "payload",
        "schemaIdPayloadEncoding": "confluent",
        "bindingVersion": BINDING,
    }
    return {
        "name": topic.event.__name__,
        "title": topic.doc,
        "summary": schema["doc"],
        "contentType": "application/vnd.apache.avro",
        **({"headers": {"type": "object", "required": [*headers], "properties": headers}} if headers else {}),
        "payload": {"schemaFormat": "application/vnd.apache.avro;version=1.9.0", "schema": schema},
        "bindings": {"kafka": kafka},
    }
