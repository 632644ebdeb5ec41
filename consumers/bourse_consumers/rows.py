"""Events as Arrow tables; the columns are derived from the events' Avro schema."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bourse_schemas.codec import RECURRING, avro_schema
from bourse_schemas.events import Event

if TYPE_CHECKING:
    import polars as pl

    from bourse_consumers.records import Places

__all__ = ["WHERE", "arrow_schema", "arrow_type", "as_json", "as_table", "dictionary_columns", "plain_json", "to_table"]

PLAIN = {
    "string": pa.string(),
    "long": pa.int64(),
    "int": pa.int32(),
    "boolean": pa.bool_(),
    "double": pa.float64(),
    "bytes": pa.binary(),
}
INSTANT = pa.timestamp("ms", "UTC")
WHERE = (pa.field("_partition", pa.int32()), pa.field("_offset", pa.int64()), pa.field("_timestamp", INSTANT))


def arrow_type(avro: Any) -> Any:
    """Return the Arrow type of an Avro type."""
    match avro:
        case ["null", inner]:
            return arrow_type(inner)
        case {"logicalType": "timestamp-millis"}:
            return INSTANT
        case {"logicalType": "date"}:
            return pa.date32()
        case {"type": "enum"}:
            return pa.string()
        case {"type": "map", "values": inner}:
            return pa.map_(pa.string(), arrow_type(inner))
        case {"type": "array", "items": inner}:
            return pa.list_(arrow_type(inner))
    return PLAIN[avro]


@cache
def arrow_schema(event: type[Event]) -> pa.Schema:
    """Return the columns of an event type: Avro's names, exact types, each field's doc as its `description`."""
    return pa.schema(
        [
            pa.field(
                field["name"],
                arrow_type(field["type"]),
                nullable=isinstance(field["type"], list),
                metadata={"description": field["doc"]},
            )
            for field in avro_schema(event)["fields"]
        ]
    )


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the columns whose values recur often."""
    return [name for name in schema.names if name in RECURRING or name in {"op", "trading_day"}]


def plain_json(column: pa.ChunkedArray) -> list[str | None]:
    """Return a column of maps or lists as JSON."""
    of_map = pa.types.is_map(column.type)
    return [as_json(dict(value) if of_map and value is not None else value) for value in column.to_pylist()]


def as_json(value: Any) -> str | None:
    """Return a map or a list as JSON with sorted keys: bytes as base64, every number as a float; None stays None."""
    return None if value is None else json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return float(value) if isinstance(value, int | float) else value


def to_table(events: Sequence[Event], places: Places) -> pa.Table:
    """Return events of one type as a table: the schema's columns, then `_partition`, `_offset` and `_timestamp`."""
    schema = arrow_schema(type(events[0]))
    columns = [pa.array(map(attrgetter(field.name), events), field.type) for field in schema]
    return _with_places(pa.Table.from_arrays(columns, schema=schema), places)


def as_table(frame: pl.DataFrame, event: type[Event], places: Places) -> pa.Table:
    """Return a frame that has the schema's columns as the same table."""
    columns, schema = frame.to_arrow(), arrow_schema(event)
    return _with_places(
        pa.Table.from_arrays([columns[field.name].cast(field.type) for field in schema], schema=schema), places
    )


def _with_places(table: pa.Table, places: Places) -> pa.Table:
    """Return the table with `_partition`, `_offset` and `_timestamp` at its end."""
    numbers = [partition.number for partition in places.partitions], places.offsets, places.timestamps
    # Not pa.array(): if pandas is installed it imports that first, which takes two seconds and 50 MB.
    columns = [
        pa.Array.from_buffers(field.type, len(numbers[0]), [None, pa.py_buffer(array(code, each))])
        for field, code, each in zip(WHERE, "iqq", numbers, strict=True)
    ]
    return pa.Table.from_arrays([*table.columns, *columns], schema=pa.schema([*table.schema, *WHERE]))
