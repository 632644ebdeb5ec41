"""Events of all kinds: whatever a schema allows, and one of each with something in every field."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import msgspec
from hypothesis import strategies as st

from bourse_schemas.codec import FRAME, avro_schema
from bourse_schemas.events import Event
from bourse_schemas.topics import TOPICS

__all__ = ["LONGS", "MILLISECONDS", "all_of", "any_event", "framed", "one", "values"]

INSTANTS = st.datetimes(timezones=st.just(UTC))
MILLISECONDS = INSTANTS.map(lambda at: at.replace(microsecond=at.microsecond // 1000 * 1000))
LONGS = st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 20_000)
LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(),
    "long": LONGS,
    "int": st.integers(-(2**31), 2**31 - 1),
    "double": st.floats(allow_nan=False),
    "boolean": st.booleans(),
    "bytes": st.binary(),
}


def values(avro: Any) -> st.SearchStrategy[Any]:
    """Return the values that a type of a schema allows."""
    match avro:
        case ["null", inner]:
            return st.none() | values(inner)
        case {"logicalType": "date"}:
            return st.dates()
        case {"logicalType": "timestamp-millis"}:
            return MILLISECONDS
        case {"type": "enum", "symbols": symbols}:
            return st.sampled_from(symbols)
        case {"type": "map", "values": inner}:
            return st.dictionaries(st.text(), values(inner), max_size=4)
        case {"type": "array", "items": inner}:
            return st.lists(values(inner), max_size=4)
    return LEAVES[avro]


def all_of(event: type[Event]) -> st.SearchStrategy[Any]:
    """Return the events of a type."""
    fields = {field["name"]: values(field["type"]) for field in avro_schema(event)["fields"]}
    return st.fixed_dictionaries(fields).map(lambda values: msgspec.convert(values, event))


def any_event() -> st.SearchStrategy[Event]:
    """Return the events of all types."""
    return st.sampled_from([topic.event for topic in TOPICS]).flatmap(all_of)


def one(event: type[Event], **changes: Any) -> Any:
    """Return an event with something in every field."""
    some = {"string": "x", "long": 7, "int": 7, "double": 0.5, "boolean": True, "bytes": b"\x00\xff"}

    def value(avro: Any) -> Any:
        match avro:
            case ["null", inner]:
                return value(inner)
            case {"logicalType": "date"}:
                return date(2019, 8, 24)
            case {"logicalType": "timestamp-millis"}:
                return datetime(2019, 8, 24, 6, 30, 0, 123_000, UTC)
            case {"type": "enum", "symbols": [first, *_]}:
                return first
            case {"type": "map", "values": inner}:
                return {"k": value(inner)}
            case {"type": "array", "items": inner}:
                return [value(inner)]
        return some[avro]

    fields = {field["name"]: value(field["type"]) for field in avro_schema(event)["fields"]}
    return msgspec.convert({**fields, **changes}, event)


def framed(body: bytes, schema_id: int = 1) -> bytes:
    """Return Avro binary as Confluent frames it."""
    return FRAME.pack(0, schema_id) + body
