"""Whole batches of Avro payloads to columns at once, guarded, or not at all.

Payloads of one writer schema become the only block of an Avro object container in memory, which polars reads into
columns. A payload that is not exactly one record would shift those behind it without an error; so each is followed by
its number, which the schema in the container's header declares as a last field. Where the column of numbers is not what
it must be, or anything else is odd, there is no table: decoding one by one finds the record at fault. The numbers begin
somewhere no payload can know: small ones look like what a payload may well hold. Booleans and enums are read as numbers
and looked up here. What passes, as polars sees to unions alone: a branch that is not there, before a value that is.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import Any, cast

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from bourse_consumers.api import Places
from bourse_consumers.rows import arrow_schema, with_places
from bourse_schemas.codec import FRAME, Deserializer, Schema, _bytes, _long, avro_schema
from bourse_schemas.errors import Undecodable
from bourse_schemas.events import Event

__all__ = ["Columns"]

GUARD = "_guard"
SYNC = bytes(16)
# Of what Python's own date and datetime can hold: days, and milliseconds, since 1970.
DAYS = -719_162, 2_932_896
MILLIS = -62_135_596_800_000, 253_402_300_799_999
_FIRST = secrets.randbits(62)
_NUMBERS: list[bytes] = []


@dataclass(frozen=True, slots=True)
class _Plan:
    """How payloads of one writer schema become our columns: the container's header, and what the writer has not."""

    header: bytes
    types: dict[str, Any]
    constants: dict[str, Any]


class Columns:
    """Decodes batches of one event type, whatever schemas wrote them."""

    def __init__(self, deserializer: Deserializer[Any]) -> None:
        self._deserializer = deserializer
        self._event = cast("type[Event]", deserializer.event)
        self._schema = arrow_schema(self._event)
        self._plans: dict[bytes, _Plan | None] = {}

    def table(self, places: Places) -> pa.Table | None:
        """Return the records as one table in their order, None where they have to be looked at one by one.

        May raise Unreachable, where a schema is asked for.
        """
        groups: dict[bytes, list[int]] = {}
        for index, value in enumerate(places.values):
            if value is None or len(value) < FRAME.size:
                return None
            groups.setdefault(value[: FRAME.size], []).append(index)
        tables = []
        for frame, indices in groups.items():
            try:
                plan = self._plan(frame)
            except Undecodable:
                return None
            bodies = [places.values[index][FRAME.size :] for index in indices]  # type: ignore[index]  # none is None
            table = _read(plan, bodies, self._schema) if plan else None
            if table is None:
                return None
            tables.append(table)
        table = pa.concat_tables(tables)
        if len(tables) > 1:
            came = list(chain.from_iterable(groups.values()))
            table = table.take(pc.sort_indices(pa.array(came)))
        return with_places(table, places)

    def _plan(self, frame: bytes) -> _Plan | None:
        if frame not in self._plans:
            magic, schema_id = FRAME.unpack(frame)
            self._plans[frame] = (
                None if magic else _plan(self._deserializer.schema(schema_id), self._deserializer.event)
            )
        return self._plans[frame]


def _plan(writer: Schema, event: type[Event]) -> _Plan | None:
    """Return the plan for a writer's schema, None where fastavro has to resolve it."""
    theirs = {field["name"]: field for field in writer["fields"]}
    constants = {}
    for field in avro_schema(event)["fields"]:
        name = field["name"]
        if name not in theirs:
            if "default" not in field or isinstance(field["type"], dict):
                return None
            constants[name] = field["default"]
        elif not _flat(field["type"]) or _bare(theirs[name]["type"]) != _bare(field["type"]):
            return None
    plain = [{"name": field["name"], "type": _plain(field["type"])} for field in writer["fields"]]
    guarded = {**writer, "fields": [*plain, {"name": GUARD, "type": "long"}]}
    about = {"avro.schema": json.dumps(guarded).encode(), "avro.codec": b"null"}
    items = b"".join(_bytes(key.encode()) + _bytes(value) for key, value in about.items())
    types = {field["name"]: field["type"] for field in avro_schema(event)["fields"] if field["name"] in theirs}
    return _Plan(b"Obj\x01" + _long(len(about)) + items + _long(0) + SYNC, types, constants)


def _bare(avro: Any) -> Any:
    """Return a type without what does not matter to its bytes."""
    if isinstance(avro, list):
        return [_bare(branch) for branch in avro]
    if isinstance(avro, dict):
        return {key: _bare(value) for key, value in avro.items() if key not in {"doc", "default", "aliases"}}
    return avro


def _plain(avro: Any) -> Any:
    """Return the type as which a field is read: bytes that are no boolean, or no symbol, must not pass for one."""
    match avro:
        case [*branches]:
            return [_plain(branch) for branch in branches]
        case {"type": "enum"} | "boolean":
            return "int"
    return avro


def _flat(avro: Any) -> bool:
    """Say whether a type is one that polars reads as we do."""
    match avro:
        case ["null", inner]:
            return _flat(inner)
        case {"logicalType": "timestamp-millis" | "date"} | {"type": "enum"}:
            return True
    return avro in ("string", "long", "boolean", "double")


def _read(plan: _Plan, bodies: Sequence[bytes], schema: pa.Schema) -> pa.Table | None:
    count = len(bodies)
    if len(_NUMBERS) < count:
        _NUMBERS.extend(map(_long, range(_FIRST + len(_NUMBERS), _FIRST + count)))
    data = b"".join(chain.from_iterable(zip(bodies, _NUMBERS, strict=False)))
    container = b"".join((plan.header, _long(count), _long(len(data)), data, SYNC))
    try:
        frame = pl.read_avro(BytesIO(container))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, OverflowError, ValueError):
        return None
    if (
        frame.height != count
        or not (frame[GUARD] - _FIRST == pl.int_range(count, eager=True)).all()
        or not _sensible(frame)
    ):
        return None
    columns = frame.select(list(plan.types)).to_arrow()
    try:
        return pa.Table.from_arrays(
            [
                pa.repeat(pa.scalar(plan.constants[field.name], field.type), count)
                if field.name in plan.constants
                else _column(columns[field.name], plan.types[field.name], field.type)
                for field in schema
            ],
            schema=schema,
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, _Odd):
        return None


class _Odd(Exception):
    """A byte that is no boolean, or no symbol of its enum."""


def _column(column: pa.ChunkedArray, avro: Any, type_: pa.DataType) -> Any:
    match avro:
        case ["null", inner]:
            return _column(column, inner, type_)
        case "boolean":
            # Read as an int, 1 is -1.
            return _take(pc.negate(column), [False, True], type_)
        case {"type": "enum", "symbols": symbols}:
            return _take(column, symbols, type_)
    return column if column.type == type_ else column.cast(type_)


def _take(indices: pa.ChunkedArray, values: Sequence[Any], type_: pa.DataType) -> Any:
    span = pc.min_max(indices).as_py()
    if span["min"] is not None and not 0 <= span["min"] <= span["max"] < len(values):
        raise _Odd
    return pa.chunked_array([pa.array(values, type_).take(chunk) for chunk in indices.chunks], type_)


def _sensible(frame: pl.DataFrame) -> bool:
    """Say whether all dates and instants are such that Python could hold them."""
    for column in frame.iter_columns():
        if isinstance(column.dtype, (pl.Date, pl.Datetime)) and column.null_count() < column.len():
            low, high = DAYS if column.dtype == pl.Date else MILLIS
            numbers = column.to_physical()
            if not (low <= numbers.min() and numbers.max() <= high):  # type: ignore[operator]  # numbers all of them
                return False
    return True
