"""A topic as a table of an SQL engine: its definition, derived from the Avro schema."""

from __future__ import annotations

import json
from typing import Any

from bourse_schemas.codec import avro_schema, schema_text
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import CANDLES, Topic

ENGINES = ("flink", "spark", "duckdb", "postgres")
COMMON = {"long": "BIGINT", "int": "INTEGER", "double": "DOUBLE", "boolean": "BOOLEAN", "date": "DATE"}
# `{}` is the type of the elements of a map or an array.
FLINK = COMMON | {
    "string": "STRING",
    "bytes": "BYTES",
    "timestamp-millis": "TIMESTAMP(3)",  # Flink reads this Avro type in UTC and refuses TIMESTAMP_LTZ
    "map": "MAP<STRING NOT NULL, {} NOT NULL>",
    "array": "ARRAY<{} NOT NULL>",
}
STORED = {
    "duckdb": COMMON
    | {
        "string": "VARCHAR",
        "bytes": "BLOB",
        "timestamp-millis": "TIMESTAMPTZ",
        "map": "MAP(VARCHAR, {})",
        "array": "{}[]",
    },
    "postgres": COMMON
    | {"string": "TEXT", "bytes": "BYTEA", "timestamp-millis": "TIMESTAMPTZ", "map": "JSONB", "array": "JSONB"}
    | {"double": "DOUBLE PRECISION"},
}
KEYS = {"trades": "event_id", "candles": "instrument", "polls": "poll_sequence", "alerts": "alert_id, state"}
EVENT_TIMES = {"polls": "requested_at", "alerts": "raised_at", "dead-letters": "failed_at"}


def table_definition(engine: str, topic: Topic, cluster: Cluster) -> str:
    """Return the statements that make the topic a table: over Kafka (Flink, Spark), or an empty one to write to."""
    if engine == "flink":
        return _flink(topic, cluster)
    return _spark(topic, cluster) if engine == "spark" else _stored(topic, STORED[engine])


def _type(avro: Any, names: dict[str, str]) -> str:
    match avro:
        case ["null", inner]:
            return _type(inner, names)
        case {"type": "enum"}:
            return names["string"]
        case {"type": "map" | "array" as kind}:
            return names[kind].format(_type(avro.get("values") or avro["items"], names))
        case {"logicalType": kind}:
            return names[kind]
    return names[avro]


def _columns(topic: Topic, names: dict[str, str], quote: str) -> list[str]:
    fields = avro_schema(topic.event)["fields"]
    null = {field["name"]: "" if isinstance(field["type"], list) else " NOT NULL" for field in fields}
    return [f"{quote}{field['name']}{quote} {_type(field['type'], names)}{null[field['name']]}" for field in fields]


def _schema(topic: Topic) -> str:
    """Return the Avro schema in one line, without its docs."""
    without_doc = lambda node: {name: value for name, value in node.items() if name != "doc"}  # noqa: E731
    return json.dumps(json.loads(schema_text(topic.event), object_hook=without_doc), separators=(",", ":"))


def _in_lines(lines: list[str]) -> str:
    return "(\n  " + ",\n  ".join(lines) + "\n)"


def _flink(topic: Topic, cluster: Cluster) -> str:
    time = EVENT_TIMES.get(topic.name, "observed_at")
    columns = [*_columns(topic, FLINK, "`"), f"WATERMARK FOR `{time}` AS `{time}` - INTERVAL '1' SECOND"]
    options = {
        "connector": "kafka",
        "topic": topic.full_name(cluster.prefix),
        "properties.bootstrap.servers": cluster.bootstrap_servers,
        "properties.isolation.level": "read_committed",
        "value.format": "avro-confluent",
        "value.avro-confluent.url": cluster.registry_url,
        "value.avro-confluent.schema": _schema(topic),
    }
    if topic is CANDLES:  # a table: the latest row of each key, and a null value deletes it
        columns.append("PRIMARY KEY (`instrument`) NOT ENFORCED")
        options |= {"connector": "upsert-kafka", "key.format": "raw"}
    else:
        options["scan.startup.mode"] = "earliest-offset"
    settings = [f"'{name}' = '{value}'" for name, value in options.items()]
    return f"CREATE TABLE `{topic.name}` {_in_lines(columns)} WITH {_in_lines(settings)};\n"


def _spark(topic: Topic, cluster: Cluster) -> str:
    options = [
        f"`kafka.bootstrap.servers` '{cluster.bootstrap_servers}'",
        "`kafka.isolation.level` 'read_committed'",
        f"subscribe '{topic.full_name(cluster.prefix)}'",
        "startingOffsets 'earliest'",
    ]
    # The value without its five bytes of framing.
    event = f"from_avro(substring(value, 6), '{_schema(topic)}')"
    return (
        f"CREATE TEMPORARY VIEW `{topic.name}-records` USING kafka OPTIONS {_in_lines(options)};\n"
        f"CREATE TEMPORARY VIEW `{topic.name}` AS SELECT event.* FROM (\n"
        f"  SELECT {event} AS event FROM `{topic.name}-records`\n);\n"
    )


def _stored(topic: Topic, names: dict[str, str]) -> str:
    key = [f"PRIMARY KEY ({KEYS[topic.name]})"] if topic.name in KEYS else []
    return f'CREATE TABLE "{topic.name}" {_in_lines([*_columns(topic, names, chr(34)), *key])};\n'
