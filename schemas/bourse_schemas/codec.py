"""Events to bytes and back: Avro in the Confluent wire format, and the record around it.

Encoders are Python source generated once from the schema: per field one expression, joined in one go, which is about
twice as fast as a generic writer. Decoding goes through fastavro, which resolves any writer's schema, older or newer,
against ours.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Generic, NamedTuple, TypeVar, cast

import fastavro
import msgspec
from fastavro.read import SchemaResolutionError

from bourse_schemas.errors import Undecodable
from bourse_schemas.events import Candle, Change, Event, TradeEvent
from bourse_schemas.topics import Topic

E = TypeVar("E", bound=Event)
Schema = dict[str, Any]
Header = tuple[str, str | bytes | None]

MAGIC = 0
FRAME = struct.Struct(">bI")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LONGEST = 1 << 63
EPOCH_DAY = EPOCH.toordinal()
MILLISECOND = timedelta(milliseconds=1)
# Strings that every poll repeats: their encoded form is kept.
RECURRING = {"instrument", "symbol", "symbol_raw", "title", "source", "trading_day_jalali", "exchange_type"}


@cache
def schema_text(event: type[Event]) -> str:
    """Return the `.avsc` of an event type as it ships."""
    return (resources.files("bourse_schemas") / "avro" / f"{event.__name__}.avsc").read_text("utf-8")


@cache
def avro_schema(event: type[Event]) -> Schema:
    """Return the schema of an event type, parsed from JSON."""
    return cast("Schema", json.loads(schema_text(event)))


@cache
def _parsed(event: type[Event]) -> Schema:
    return cast("Schema", fastavro.parse_schema(avro_schema(event)))


def millis(instant: datetime) -> int:
    """Return whole milliseconds since the epoch of an aware datetime."""
    return (instant - EPOCH) // MILLISECOND


# --- encoding ---------------------------------------------------------------------------------------------------------

_ONE = [bytes([i]) for i in range(0x80)] + [bytes([i & 0x7F | 0x80, i >> 7]) for i in range(0x80, 0x4000)]
_TWO_MORE = [bytes([i & 0x7F | 0x80, i >> 7 | 0x80]) for i in range(0x4000)]


def _long(number: int) -> bytes:
    """Encode a 64-bit integer: zigzag, then base 128; two base-128 digits at a time from a table."""
    rest = number << 1 if number >= 0 else (-number << 1) - 1
    if rest < 0x4000:
        return _ONE[rest]
    if rest < 0x1000_0000:
        return _TWO_MORE[rest & 0x3FFF] + _ONE[rest >> 14]
    if rest < 0x400_0000_0000:
        return _TWO_MORE[rest & 0x3FFF] + _TWO_MORE[rest >> 14 & 0x3FFF] + _ONE[rest >> 28]
    if rest >> 64:
        raise OverflowError(f"{number} does not fit into an Avro long")
    parts = []
    while rest >= 0x4000:
        parts.append(_TWO_MORE[rest & 0x3FFF])
        rest >>= 14
    parts.append(_ONE[rest])
    return b"".join(parts)


def _int(number: int) -> bytes:
    if not -0x8000_0000 <= number < 0x8000_0000:
        raise OverflowError(f"{number} does not fit into an Avro int")
    return _long(number)


def _bytes(value: bytes) -> bytes:
    return _long(len(value)) + value


def _string(value: str) -> bytes:
    return _bytes(value.encode())


def _blocks(items: list[bytes]) -> bytes:
    """Encode an array or a map, its items given: one block and the end."""
    return _long(len(items)) + b"".join(items) + b"\0" if items else b"\0"


_recurring = lru_cache(1 << 14)(_string)


@lru_cache(64)
def _date(value: date) -> bytes:
    return _long(value.toordinal() - EPOCH_DAY)


@lru_cache(1 << 12)
def _instant(value: datetime) -> bytes:
    return _long(millis(value))


_RUNTIME: dict[str, Any] = {
    "long_": _long,
    "int_": _int,
    "string_": _string,
    "bytes_": _bytes,
    "blocks": _blocks,
    "recurring": _recurring,
    "date": _date,
    "instant": _instant,
    "double_": struct.Struct("<d").pack,
    "join": b"".join,
}


def _expression(avro: Any, value: str, name: str, names: dict[str, Any]) -> str:
    """Return the Python expression that encodes `value` as `avro`; constants it needs are added to `names`."""
    match avro:
        case ["null", inner]:
            return f"(b'\\0' if {value} is None else b'\\2' + {_expression(inner, value, name, names)})"
        case {"logicalType": "timestamp-millis"}:
            return f"instant({value})"
        case {"logicalType": "date"}:
            return f"date({value})"
        case {"type": "enum", "name": enum, "symbols": symbols}:
            names[enum] = {symbol: _long(index) for index, symbol in enumerate(symbols)}
            return f"{enum}[{value}]"
        case "boolean":
            return f"(b'\\1' if {value} else b'\\0')"
        case "string" if name in RECURRING:
            return f"recurring({value})"
        case {"type": "array", "items": items}:
            return f"blocks([{_expression(items, 'x', name, names)} for x in {value}])"
        case {"type": "map", "values": values}:
            return f"blocks([string_(key) + {_expression(values, 'x', name, names)} for key, x in {value}.items()])"
        case "long" | "int" | "string" | "bytes" | "double":
            return f"{avro}_({value})"
    raise ValueError(f"no encoder for the Avro type {avro!r} of field {name!r}")


def _compile(fields: list[Any], names: dict[str, Any], arguments: str = "e") -> Callable[..., bytes]:
    """Compile an encoder of these fields of `e`; a field given as a plain string is an argument already encoded."""
    parts = [f if isinstance(f, str) else _expression(f["type"], f"e.{f['name']}", f["name"], names) for f in fields]
    code = f"lambda {arguments}: join(({', '.join(parts)},))"
    # The source is made of our own schema files only.
    return cast("Callable[..., bytes]", eval(code, {**_RUNTIME, **names}))  # noqa: S307


@cache
def encoder(event: type[E]) -> Callable[[E], bytes]:
    """Return the encoder of an event type: an event in, its Avro binary out (without the frame)."""
    return _compile(avro_schema(event)["fields"], {})


@cache
def _around_candle() -> Callable[[Change, bytes], bytes]:
    """Return an encoder of TradeEvents that takes the bytes of the event's candle, which are part of it unchanged."""
    fields = avro_schema(TradeEvent)["fields"]
    block = [field["name"] for field in avro_schema(Candle)["fields"]]
    first = [field["name"] for field in fields].index(block[0])
    return _compile([*fields[:first], "candle", *fields[first + len(block) :]], {}, "e, candle")


class Record(NamedTuple):
    """A Kafka record, ready to be produced: `producer.produce(topic, value, key, timestamp=…, headers=…)`."""

    topic: str
    key: bytes
    value: bytes
    timestamp: int
    headers: list[Header]


SPECIFICATION: Header = ("ce_specversion", b"1.0")
CONTENT_TYPE: Header = ("content-type", b"application/vnd.apache.avro")


class Serializer(Generic[E]):
    """Turn events into records of their topic: framed Avro, key, timestamp, CloudEvents headers."""

    def __init__(self, topic: Topic, schema_id: int, prefix: str) -> None:
        self.topic = topic.full_name(prefix)
        self.frame = FRAME.pack(MAGIC, schema_id)
        self._declared = topic
        self._encode: Callable[[E], bytes] = encoder(topic.event)
        self._type: Header | None = ("ce_type", topic.cloudevents_type.encode()) if topic.cloudevents_type else None

    def __call__(self, event: E) -> Record:
        """Return the event's record."""
        identity = self._declared.identity
        return self.record(event, self._encode(event), identity(event) if identity else "")

    def record(self, event: Event, body: bytes, identity: str) -> Record:
        """Return an event's record; its Avro binary is given, and its id. `event` has the rest, as its candle has."""
        declared = self._declared
        timestamp, ce_time = _time(declared.timestamp(event))
        key = declared.key(event).encode()
        if self._type is None:
            return Record(self.topic, key, self.frame + body, timestamp, [])
        named: Header = ("ce_id", identity.encode())
        source, subject = _source(getattr(event, "source", self.topic)), ("ce_subject", key)
        headers = [SPECIFICATION, named, source, self._type, ce_time, subject, CONTENT_TYPE]
        return Record(self.topic, key, self.frame + body, timestamp, headers)


# A poll's records have most of their headers in common.


@lru_cache(4096)
def _time(instant: datetime) -> tuple[int, Header]:
    return millis(instant), ("ce_time", _iso(instant).encode())


@lru_cache(64)
def _source(name: str) -> Header:
    return "ce_source", name.encode()


def candle_and_event_records(
    candles: Serializer[Candle], trades: Serializer[TradeEvent], candle: Candle, change: Change
) -> tuple[Record, Record]:
    """Return the records of a candle and of the event that led to it; what they share is encoded once."""
    body = encoder(Candle)(candle)
    event = trades.record(candle, _around_candle()(change, body), change.event_id)
    return Record(candles.topic, event.key, candles.frame + body, event.timestamp, []), event


# --- decoding ---------------------------------------------------------------------------------------------------------


class Deserializer(Generic[E]):
    """Turn payloads into events, whatever schema wrote them.

    `writer` maps a schema id to the writer's schema (`Registry.schema`); each id is asked for once.
    """

    def __init__(self, event: type[E], writer: Callable[[int], Schema]) -> None:
        self.event = event
        self._writer = writer
        self._parsed: dict[int, Schema] = {}

    def __call__(self, payload: bytes | None) -> E:
        """Return the event.

        Raises Undecodable when the bytes are not one framed Avro record, whole and nothing else, that resolves
        against our schema.
        """
        fields = self.fields(payload)
        try:
            return msgspec.convert(fields, self.event)
        except msgspec.ValidationError as error:  # the writer's types resolve, but not the logical ones
            raise Undecodable(f"not a {self.event.__name__}: {error}") from error

    def fields(self, payload: bytes | None) -> dict[str, Any]:
        """Return the event as a mapping of Avro field names: dates, datetimes and enum symbols as plain values."""
        if payload is None or len(payload) < FRAME.size or payload[0] != MAGIC:
            raise Undecodable("not in the Confluent wire format (magic byte 0 and a 4-byte schema id)")
        schema_id: int = FRAME.unpack_from(payload)[1]
        parsed = self._parsed.get(schema_id)
        if parsed is None:
            parsed = self._parsed[schema_id] = self._resolve(schema_id)
        ours = _parsed(self.event)
        stream = io.BytesIO(payload)
        stream.seek(FRAME.size)
        try:
            fields = fastavro.schemaless_reader(stream, parsed, None if parsed is ours else ours)
        except (EOFError, ValueError, LookupError, TypeError, OverflowError, SchemaResolutionError) as error:
            raise Undecodable(f"not a {self.event.__name__} by schema id {schema_id}: {error!r}") from error
        if stream.tell() != len(payload):
            raise Undecodable(f"{len(payload) - stream.tell()} bytes after the record")
        if any(type(value) is int and not -LONGEST <= value < LONGEST for value in fields.values()):  # type: ignore[union-attr]
            raise Undecodable("a number is longer than 64 bits")
        return cast("dict[str, Any]", fields)

    def schema(self, schema_id: int) -> Schema:
        """Return the schema that wrote payloads of this id; one that is not of the event is Undecodable."""
        schema = self._writer(schema_id)
        if str(schema.get("name")).rpartition(".")[2] != self.event.__name__:
            raise Undecodable(f"schema id {schema_id} is {schema.get('name')!r}, not {self.event.__name__!r}")
        return schema

    def _resolve(self, schema_id: int) -> Schema:
        schema = self.schema(schema_id)
        if schema == avro_schema(self.event):
            return _parsed(self.event)
        try:
            return cast("Schema", fastavro.parse_schema(schema))
        except (fastavro.schema.SchemaParseException, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Undecodable(f"schema id {schema_id} is not Avro: {error!r}") from error


def _iso(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_json(fields: Mapping[str, Any]) -> str:
    """Return one line of JSON: dates as YYYY-MM-DD, instants as ISO 8601 in UTC with milliseconds, bytes as base64."""
    values = {key: _iso(value) if isinstance(value, datetime) else value for key, value in fields.items()}
    return msgspec.json.encode(values).decode()
