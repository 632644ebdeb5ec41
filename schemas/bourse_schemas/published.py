"""The contract as others take it: AsyncAPI, tables for people, a bundle of schemas, and what differs between two.

All of it is derived from `topics.py` and the `.avsc` files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastavro.schema

from bourse_schemas.codec import Schema, avro_schema, schema_text
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import DAY_MS, DEFAULT_PREFIX, TOPICS, Topic

__all__ = ["asyncapi", "contract", "differences", "export"]

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


# --- AsyncAPI ---------------------------------------------------------------------------------------------------------


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
        "operations": {
            f"publish-{topic.name}": {
                "action": "send",
                "channel": {"$ref": f"#/channels/{topic.name}"},
                "summary": f"{topic.full_name(prefix)}: {topic.doc}",
            }
            for topic in TOPICS
        },
        "components": {"messages": {topic.event.__name__: _message(topic) for topic in TOPICS}},
    }


def _channel(topic: Topic, prefix: str) -> dict[str, Any]:
    name = topic.event.__name__
    settings: dict[str, Any] = {"cleanup.policy": [topic.cleanup]}
    if topic.retention_ms is not None:
        settings["retention.ms"] = topic.retention_ms
    return {
        "address": topic.full_name(prefix),
        "description": topic.doc,
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        "bindings": {
            "kafka": {"partitions": topic.partitions, "topicConfiguration": settings, "bindingVersion": BINDING}
        },
    }


def _message(topic: Topic) -> dict[str, Any]:
    schema = avro_schema(topic.event)
    headers = {
        name: {"type": "string", "description": doc} | ({"const": topic.cloudevents_type} if name == "ce_type" else {})
        for name, doc in HEADERS.items()
    }
    return {
        "name": topic.event.__name__,
        "title": topic.doc,
        "summary": schema["doc"],
        "contentType": "application/vnd.apache.avro",
        "headers": {"type": "object", "required": [*headers], "properties": headers},
        "payload": {"schemaFormat": "application/vnd.apache.avro;version=1.9.0", "schema": schema},
        "bindings": {
            "kafka": {
                "key": {"type": "string", "description": topic.key_doc},
                "schemaIdLocation": "payload",
                "schemaIdPayloadEncoding": "confluent",
                "bindingVersion": BINDING,
            }
        },
    }


# --- tables for people ------------------------------------------------------------------------------------------------


def contract() -> str:
    """Return docs/contract.md."""
    lines = [
        "# The contract",
        "",
        "Every topic, field, symbol and header. Written by `bourse schemas contract`; what can be relied on stands in",
        "[Subscribing](subscribe.md), the same for programs in [asyncapi.yaml](../asyncapi.yaml).",
        "",
        "| topic | key | value | partitions | kept | `ce_type` | what it is |",
        "|---|---|---|--:|---|---|---|",
    ]
    for topic in TOPICS:
        kept = "the last of each key" if topic.cleanup == "compact" else f"{(topic.retention_ms or 0) // DAY_MS} days"
        event = topic.event.__name__
        lines.append(
            f"| `{topic.full_name()}` | {topic.key_doc} | [{event}](#{event.lower()}) | {topic.partitions} | {kept} "
            f"| `{topic.cloudevents_type}` | {topic.doc} |"
        )
    lines += ["", "## Headers", "", "| header | holds |", "|---|---|"]
    lines += [f"| `{name}` | {doc} |" for name, doc in HEADERS.items()]
    for topic in TOPICS:
        lines += ["", *_table(topic)]
    return "\n".join(lines) + "\n"


def _table(topic: Topic) -> Iterator[str]:
    schema = avro_schema(topic.event)
    yield from (f"## {schema['name']}", "", f"On `{topic.full_name()}`. {_cell(schema['doc'])}", "")
    yield from ("| field | type | meaning |", "|---|---|---|")
    enums = []
    for field in schema["fields"]:
        enums += [each for each in _branches(field["type"]) if isinstance(each, dict) and each["type"] == "enum"]
        yield f"| `{field['name']}` | {_words(field['type'])} | {_cell(field['doc'])} |"
    for enum in enums:
        symbols = ", ".join(f"`{symbol}`" for symbol in enum["symbols"])
        yield from ("", f"**{enum['name']}**: {symbols}. {_cell(enum['doc'])}")


def _words(avro: Any) -> str:
    match avro:
        case ["null", inner]:
            return f"{_words(inner)}, or null"
        case {"logicalType": "timestamp-millis"}:
            return "instant, UTC, milliseconds"
        case {"logicalType": "date"}:
            return "date"
        case {"type": "enum", "name": name}:
            return f"{name}"
        case {"type": "map", "values": inner}:
            return f"map of {_words(inner)}"
        case {"type": "array", "items": inner}:
            return f"list of {_words(inner)}"
    return str(avro)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


# --- the bundle -------------------------------------------------------------------------------------------------------


def export(folder: Path, prefix: str = DEFAULT_PREFIX) -> list[Path]:
    """Write the schemas and manifest.json into a folder; return the files. Raises ConfigurationError.

    The manifest says of each file its subject and two fingerprints: sha256 of the file, and Rabin's of the canonical
    form, which Avro's own libraries compute.
    """
    files = []
    manifest: dict[str, Any] = {"version": version("bourse-stream"), "schemas": {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for topic in TOPICS:
            text = schema_text(topic.event)
            files.append(folder / f"{topic.event.__name__}.avsc")
            files[-1].write_text(text, "utf-8")
            canonical = fastavro.schema.to_parsing_canonical_form(json.loads(text))
            manifest["schemas"][files[-1].name] = {
                "topic": topic.full_name(prefix),
                "subject": topic.subject(prefix),
                "type": topic.cloudevents_type,
                "sha256": sha256(text.encode()).hexdigest(),
                "rabin": fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"),
            }
        files.append(folder / "manifest.json")
        files[-1].write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigurationError(f"--to {folder}: cannot write there: {error.strerror}") from error
    return files


# --- what differs -----------------------------------------------------------------------------------------------------


def differences(old: Schema, new: Schema) -> Iterator[str]:
    """Yield what differs between two record schemas, in words, a line each."""
    before, after = ({field["name"]: field for field in schema["fields"]} for schema in (old, new))
    if old.get("name") != new.get("name"):
        yield f"the record is {new.get('name')}, was {old.get('name')}"
    for name, field in after.items():
        if name not in before:
            default = (
                f", {json.dumps(field['default'])} where it is not written"
                if "default" in field
                else ", without default"
            )
            yield f"new: {name}, {_words(field['type'])}{default}: {field.get('doc', 'no doc')}"
    for name, field in before.items():
        if name not in after:
            yield f"gone: {name}, {_words(field['type'])}"
            continue
        now = after[name]
        if _words(field["type"]) != _words(now["type"]):
            yield f"{name} is {_words(now['type'])}, was {_words(field['type'])}"
        yield from _symbols(name, field["type"], now["type"])
        if field.get("default", ...) != now.get("default", ...):
            yield f"{name}: the default is {_default(now)}, was {_default(field)}"
        if field.get("doc") != now.get("doc"):
            yield f"{name}: its doc is now: {now.get('doc')}"
    shared = [name for name in before if name in after]
    if shared != [name for name in after if name in before]:
        yield "the fields stand in another order"


def _default(field: Any) -> str:
    return json.dumps(field["default"]) if "default" in field else "none"


def _symbols(name: str, old: Any, new: Any) -> Iterator[str]:
    old, new = (next((each for each in _branches(avro) if isinstance(each, dict)), {}) for avro in (old, new))
    before, after = old.get("symbols", []), new.get("symbols", [])
    if more := [symbol for symbol in after if symbol not in before]:
        yield f"{name} may also be {', '.join(more)}"
    if less := [symbol for symbol in before if symbol not in after]:
        yield f"{name} is no longer {', '.join(less)}"


def _branches(avro: Any) -> list[Any]:
    return avro if isinstance(avro, list) else [avro]
