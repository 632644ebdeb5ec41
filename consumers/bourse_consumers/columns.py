"""Decode a whole batch of Avro payloads to columns at once, or not at all.

Payloads of one writer schema become the only block of an Avro object container in memory, which polars reads into
columns. A payload that is not exactly one record would shift those after it without an error. So each is followed by
its number, which the schema in the container's header declares as the last field. If the column of numbers is not as
expected, or anything else is odd, there is no frame: decoding one by one finds the bad record. The numbers begin at
random: a payload may contain small numbers. Booleans and enums are read as numbers and looked up here.
Known gap: an invalid union branch followed by a valid value is not detected.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import fastavro
import polars as pl

from bourse_schemas.codec import FRAME, Deserializer, Schema, _bytes, _long, avro_schema
from bourse_schemas.errors import Undecodable
from bourse_schemas.events import Event

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "to_frame"]

GUARD = "_guard"
SYNC = bytes(16)
# The days, and milliseconds, since 1970 that Python's date and datetime can hold.
DAYS = -719_162, 2_932_896
MILLIS = -62_135_596_800_000, 253_402_300_799_999
_FIRST = secrets.randbits(62)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How payloads of one writer schema become our columns: the container's header, and the fields the writer lacks."""

    header: bytes
    types: dict[str, Any]
    constants: dict[str, pl.Expr]


class Columns:
    """Decodes batches of one event type; each batch was written with one schema, of any release."""

    def __init__(self, deserializer: Deserializer[Any]) -> None:
        self._deserializer = deserializer
        self._fields = [field["name"] for field in avro_schema(cast("type[Event]", deserializer.event))["fields"]]
        self._plans: dict[bytes, _Plan | None] = {}
        self._writers: dict[bytes, tuple[Schema, dict[str, Any]]] = {}

    def read(self, payloads: Sequence[bytes | None]) -> pl.DataFrame | None:
        """Return the events in their order, None if they have to be decoded one by one. May raise Unreachable."""
        values = [payload or b"" for payload in payloads]
        writers = {value[: FRAME.size] for value in values}
        if len(writers) > 1 or len(writer := writers.pop()) < FRAME.size:
            return None
        try:
            plan = self._plan(writer)
        except Undecodable:
            return None
        frame = _read(plan, [value[FRAME.size :] for value in values]) if plan else None
        return None if frame is None else frame.select(self._fields)

    def unknown(self, payloads: Sequence[bytes | None]) -> pa.Table | None:
        """Return the fields of the writers' schemas that our schema has not, row by row; None if there are none.

        They come from a newer release; decoding them one by one is slow, but nothing is lost until the upgrade.
        """
        values = [payload or b"" for payload in payloads]
        writers = {writer: self._newer(writer) for writer in {value[: FRAME.size] for value in values}}
        types = {name: kind for _, fields in writers.values() for name, kind in fields.items()}
        if not types:
            return None
        import pyarrow as pa

        rows = []
        for value in values:
            schema, fields = writers[value[: FRAME.size]]
            decoded = (
                cast("Any", fastavro.schemaless_reader(BytesIO(value[FRAME.size :]), schema, None)) if fields else {}
            )
            rows.append({name: decoded.get(name) for name in types})
        return pa.Table.from_pylist(rows, pa.schema(list(types.items())))

    def _newer(self, writer: bytes) -> tuple[Schema, dict[str, Any]]:
        if writer not in self._writers:
            schema = self._deserializer.schema(FRAME.unpack(writer)[1])
            fields = {each["name"]: each["type"] for each in schema["fields"] if each["name"] not in self._fields}
            self._writers[writer] = schema, {}
            if fields:
                from bourse_consumers.rows import arrow_type

                types = {name: arrow_type(kind) for name, kind in fields.items()}
                self._writers[writer] = cast("Schema", fastavro.parse_schema(schema)), types
        return self._writers[writer]

    def _plan(self, frame: bytes) -> _Plan | None:
        if frame not in self._plans:
            magic, schema_id = FRAME.unpack(frame)
            self._plans[frame] = (
                None if magic else _plan(self._deserializer.schema(schema_id), self._deserializer.event)
            )
        return self._plans[frame]


def to_frame(events: Sequence[Event], event: type[Event] | None = None) -> pl.DataFrame:
    """Return events of one type as a frame of the schema's fields; `event` is their type if there may be none."""
    fields = avro_schema(event or type(events[0]))["fields"]
    return pl.DataFrame(
        {field["name"]: [_entries(getattr(each, field["name"])) for each in events] for field in fields},
        {field["name"]: _dtype(field["type"]) for field in fields},
    )


def _entries(value: Any) -> Any:
    """Return a map as Arrow has it: a list of keys and values."""
    return [{"key": key, "value": each} for key, each in value.items()] if isinstance(value, dict) else value


def _plan(writer: Schema, event: type[Event]) -> _Plan | None:
    """Return the plan for a writer's schema, None if fastavro has to resolve it."""
    theirs = {field["name"]: field for field in writer["fields"]}
    constants = {}
    for field in avro_schema(event)["fields"]:
        name = field["name"]
        if name not in theirs:
            if "default" not in field or isinstance(field["type"], dict):
                return None
            constants[name] = pl.lit(field["default"], _dtype(field["type"])).alias(name)
        elif not _flat(field["type"]) or _bare(theirs[name]["type"]) != _bare(field["type"]):
            return None
    plain = [{"name": field["name"], "type": _plain(field["type"])} for field in writer["fields"]]
    guarded = {**writer, "fields": [*plain, {"name": GUARD, "type": "long"}]}
    about = {"avro.schema": json.dumps(guarded).encode(), "avro.codec": b"null"}
    items = b"".join(_bytes(key.encode()) + _bytes(value) for key, value in about.items())
    types = {field["name"]: field["type"] for field in avro_schema(event)["fields"] if field["name"] in theirs}
    return _Plan(b"Obj\x01" + _long(len(about)) + items + _long(0) + SYNC, types, constants)


def _bare(avro: Any) -> Any:
    """Return a type without the attributes that do not change its bytes."""
    if isinstance(avro, list):
        return [_bare(branch) for branch in avro]
    if isinstance(avro, dict):
        return {key: _bare(value) for key, value in avro.items() if key not in {"doc", "default", "aliases"}}
    return avro


def _plain(avro: Any) -> Any:
    """Return the type as which a field is read: an invalid boolean or symbol must not pass as a valid one."""
    match avro:
        case [*branches]:
            return [_plain(branch) for branch in branches]
        case {"type": "enum"} | "boolean":
            return "int"
    return avro


def _flat(avro: Any) -> bool:
    """Return whether polars reads this type as we do."""
    match avro:
        case ["null", inner]:
            return _flat(inner)
        case {"logicalType": "timestamp-millis" | "date"} | {"type": "enum"}:
            return True
    return avro in ("string", "long", "boolean", "double")


def _dtype(avro: Any) -> Any:
    """Return the polars type of a type."""
    match avro:
        case ["null", inner]:
            return _dtype(inner)
        case {"logicalType": "timestamp-millis"}:
            return pl.Datetime("ms", "UTC")
        case {"logicalType": "date"}:
            return pl.Date
        case {"type": "map", "values": inner}:
            return pl.List(pl.Struct({"key": pl.String, "value": _dtype(inner)}))
        case {"type": "array", "items": inner}:
            return pl.List(_dtype(inner))
    plain = {"long": pl.Int64, "int": pl.Int32, "boolean": pl.Boolean, "double": pl.Float64, "bytes": pl.Binary}
    return plain.get(str(avro), pl.String)


@lru_cache(4)
def _guards(count: int) -> tuple[pl.Series, list[bytes]]:
    """Return `count` numbers, and the bytes of each."""
    numbers = range(_FIRST, _FIRST + count)
    return pl.Series(GUARD, numbers), list(map(_long, numbers))


def _read(plan: _Plan, bodies: Sequence[bytes]) -> pl.DataFrame | None:
    count = len(bodies)
    numbers, encoded = _guards(1 << max(count - 1, 0).bit_length())
    data = b"".join(chain.from_iterable(zip(bodies, encoded, strict=False)))
    container = b"".join((plan.header, _long(count), _long(len(data)), data, SYNC))
    try:
        frame = pl.read_avro(BytesIO(container))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, OverflowError, ValueError):
        return None
    if frame.height != count or not frame[GUARD].equals(numbers.head(count)) or not _sensible(frame):
        return None
    try:
        columns = pl.DataFrame([_column(frame[name], avro) for name, avro in plan.types.items()])
    except _Odd:
        return None
    return columns.with_columns(plan.constants.values())


class _Odd(Exception):
    """A byte that is not a boolean, or not a symbol of its enum."""


def _column(column: pl.Series, avro: Any) -> pl.Series:
    match avro:
        case ["null", inner]:
            return _column(column, inner)
        case "boolean":
            # Read as an int, 1 is -1.
            return _pick(-column, [False, True])
        case {"type": "enum", "symbols": symbols}:
            return _pick(column, symbols)
    return column


def _pick(indices: pl.Series, values: Sequence[Any]) -> pl.Series:
    low, high = indices.min(), indices.max()
    if low is not None and not 0 <= low <= high < len(values):  # type: ignore[operator]  # numbers both
        raise _Odd
    return pl.Series(indices.name, values).gather(indices)


def _sensible(frame: pl.DataFrame) -> bool:
    """Return whether Python can hold all dates and instants."""
    for column in frame.iter_columns():
        if isinstance(column.dtype, (pl.Date, pl.Datetime)) and column.null_count() < column.len():
            low, high = DAYS if column.dtype == pl.Date else MILLIS
            numbers = column.to_physical()
            if not (low <= numbers.min() and numbers.max() <= high):  # type: ignore[operator]  # numbers all of them
                return False
    return True
