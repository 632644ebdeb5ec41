"""The codec against fastavro and Confluent's own serdes, over every value the schemas allow."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, cast

import fastavro
import msgspec
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.base import Format
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bourse_schemas.codec import (
    Deserializer,
    Record,
    Serializer,
    avro_schema,
    candle_and_event_records,
    encoder,
    millis,
    schema_text,
    to_json,
)
from bourse_schemas.errors import Undecodable
from bourse_schemas.events import Candle, Change, DeadLetter, Event, Op, PriceAlert, TradeEvent
from bourse_schemas.topics import CANDLES, DEAD_LETTERS, TOPICS, TRADES, Topic, event_id, topic_of
from tests.strategies import LONGS, all_of, any_event, framed, one

EVENTS = [topic.event for topic in TOPICS]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _ours(event: Event) -> bytes:
    return encoder(type(event))(event)


def _theirs(schema: dict[str, Any], fields: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), fields)
    return stream.getvalue()


def _decoder(event: type[Event], writer: dict[str, Any] | None = None) -> Deserializer[Any]:
    return Deserializer(event, lambda _: writer if writer is not None else avro_schema(event))


# --- encoding ---------------------------------------------------------------------------------------------------------


@given(any_event())
def test_every_event_is_encoded_as_fastavro_does_and_comes_back(event: Event) -> None:
    """Byte for byte, for all five types."""
    body = _ours(event)
    assert body == _theirs(avro_schema(type(event)), msgspec.structs.asdict(event))
    assert _decoder(type(event))(framed(body)) == event


@given(LONGS, st.floats())
def test_numbers_of_any_size(number: int, real: float) -> None:
    """All 64 bits, infinities and NaN."""
    alert = one(PriceAlert, last_price=number, values={"x": real})
    assert _ours(alert) == _theirs(avro_schema(PriceAlert), msgspec.structs.asdict(alert))
    back = _decoder(PriceAlert)(framed(_ours(alert)))
    assert back.last_price == number
    assert back.values["x"] == real or math.isnan(real)


@given(st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)), st.integers(-14 * 60, 14 * 60))  # noqa: DTZ001
def test_instants_of_any_zone_and_precision_lose_what_is_below_a_millisecond(naive: datetime, minutes: int) -> None:
    """Always towards the past, as fastavro, JSON and the record's timestamp do; never a neighbour's millisecond."""
    at = naive.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    alert = one(PriceAlert, raised_at=at)
    assert _ours(alert) == _theirs(avro_schema(PriceAlert), msgspec.structs.asdict(alert))
    back = _decoder(PriceAlert)(framed(_ours(alert)))
    assert timedelta(0) <= at - back.raised_at < timedelta(milliseconds=1)
    assert EPOCH + timedelta(milliseconds=millis(at)) == back.raised_at
    assert json.loads(to_json({"at": at})) == json.loads(to_json({"at": back.raised_at}))


@pytest.mark.parametrize(
    ("event", "field", "value", "error"),
    [
        (Candle, "volume", 2**63, OverflowError),
        (Candle, "volume", -(2**63) - 1, OverflowError),
        (DeadLetter, "original_partition", 2**31, OverflowError),
        (DeadLetter, "original_partition", -(2**31) - 1, OverflowError),
        (TradeEvent, "op", "BOUGHT", KeyError),
        (Candle, "observed_at", datetime(2019, 8, 24), TypeError),  # noqa: DTZ001
        (Candle, "symbol", "\ud800", UnicodeEncodeError),
    ],
)
def test_what_the_schema_does_not_allow_is_not_encoded(
    event: type[Event], field: str, value: Any, error: type[Exception]
) -> None:
    """An integer too wide, an enum's unknown symbol, an instant without a zone, half a character."""
    with pytest.raises(error):
        _ours(msgspec.structs.replace(one(event), **{field: value}))


@given(all_of(TradeEvent))
def test_what_candle_and_event_share_is_encoded_once(event: Event) -> None:
    """The pair of records equals the two made one by one."""
    fields = msgspec.structs.asdict(event)
    candle = msgspec.convert({name: fields[name] for name in Candle.__struct_fields__}, Candle)
    assert isinstance(event, TradeEvent)
    event = msgspec.structs.replace(event, event_id=event_id(event.instrument, event.trading_day, event.sequence))
    candles: Serializer[Candle] = Serializer(CANDLES, 4, "p")
    trades: Serializer[TradeEvent] = Serializer(TRADES, 9, "p")
    change = Change(*(getattr(event, name) for name in Change._fields))
    assert candle_and_event_records(candles, trades, candle, change) == (candles(candle), trades(event))


def test_a_record_is_framed_keyed_and_timed() -> None:
    """As the contract says."""
    event = one(TradeEvent)
    record: Record = Serializer(TRADES, 258, "tehran")(event)
    assert (record.topic, record.key) == ("tehran.trades", b"x")
    assert record.value == b"\x00\x00\x00\x01\x02" + _ours(event)
    assert record.timestamp == 1_566_628_200_123


class _Avro:
    """CloudEvents' view of data that is left as it is."""

    def read_data(self, body: Any, _: str | None) -> Any:
        return body


@pytest.mark.parametrize("event", [TOPIC.event for TOPIC in TOPICS if TOPIC.cloudevents_type])
def test_the_headers_are_a_cloud_event_to_its_own_sdk(event: type[Event]) -> None:
    """CloudEvents 1.0, Kafka binding, binary mode."""
    topic, value = topic_of(event), one(event)
    serialize: Serializer[Any] = Serializer(topic, 1, "bourse")
    record = serialize(value)
    headers = {name: data for name, data in record.headers if isinstance(data, bytes)}
    assert len(headers) == len(record.headers)
    parsed = from_binary(KafkaMessage(headers, record.key, record.value), cast("Format", _Avro()), CloudEvent)
    assert parsed.get_attributes() == {
        "specversion": "1.0",
        "id": topic.identity and topic.identity(value),
        "source": value.source,
        "type": topic.cloudevents_type,
        "time": datetime(2019, 8, 24, 6, 30, 0, 123_000, UTC),
        "subject": topic.key(value),
        "datacontenttype": "application/vnd.apache.avro",
        "partitionkey": topic.key(value),
    }
    assert parsed.get_data() == record.value


@pytest.mark.parametrize("topic", [CANDLES, DEAD_LETTERS])
def test_a_table_and_dead_letters_carry_no_headers(topic: Topic) -> None:
    """Each header costs as much as a field, and neither is an event."""
    serialize: Serializer[Any] = Serializer(topic, 1, "bourse")
    assert serialize(one(topic.event)).headers == []


# --- Confluent's own serdes -------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(event=any_event())
def test_confluents_own_serdes_write_the_same_bytes_and_read_ours(small_registry: str, event: Event) -> None:
    """Framing and all; what they wrote is ours to read."""
    topic = topic_of(type(event))
    with SchemaRegistryClient({"url": small_registry}) as client:
        schema_id = client.register_schema(topic.subject(), Schema(schema_text(topic.event), "AVRO"))
        context = SerializationContext(topic.full_name(), MessageField.VALUE)
        write = AvroSerializer(
            client,
            schema_text(topic.event),
            lambda value, _: msgspec.structs.asdict(value),
            {"auto.register.schemas": False},
        )
        read = AvroDeserializer(client)
        serialize: Serializer[Any] = Serializer(topic, schema_id or 0, "bourse")
        ours = serialize(event).value
        theirs = write(event, context)
        assert theirs == ours
        assert read(ours, context) == msgspec.structs.asdict(event)
        decode = Deserializer(topic.event, lambda i: dict(json.loads(client.get_schema(i).schema_str or "")))
        assert decode(theirs) == event


# --- older and newer writers ------------------------------------------------------------------------------------------


def _field(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return next(field for field in schema["fields"] if field["name"] == name)


def _newer(schema: dict[str, Any], fields: dict[str, Any]) -> None:
    schema["fields"].insert(3, {"name": "mood", "type": ["null", "string"], "default": None})
    schema["fields"].append({"name": "tags", "type": {"type": "array", "items": "long"}, "default": []})
    fields |= {"mood": "bright", "tags": [1, 2]}


def _older(schema: dict[str, Any], fields: dict[str, Any]) -> None:
    schema["fields"].remove(_field(schema, "exchange_type"))


def _reordered(schema: dict[str, Any], fields: dict[str, Any]) -> None:
    schema["fields"].reverse()


def _narrower(schema: dict[str, Any], fields: dict[str, Any]) -> None:
    _field(schema, "volume")["type"] = "int"
    _field(schema, "closing_change_percent")["type"] = ["null", "float"]


def _full_name(schema: dict[str, Any], fields: dict[str, Any]) -> None:
    schema["name"] = f"{schema.pop('namespace')}.{schema['name']}"


@pytest.mark.parametrize("change", [_newer, _older, _reordered, _narrower, _full_name])
def test_another_writers_schema_is_resolved_against_ours(change: Callable[..., None]) -> None:
    """Fields added, missing, elsewhere, narrower: what we know is read, what was not written is null."""
    schema, event = deepcopy(avro_schema(TradeEvent)), one(TradeEvent)
    fields = msgspec.structs.asdict(event)
    change(schema, fields)
    expected = event if change is not _older else msgspec.structs.replace(event, exchange_type=None)
    assert _decoder(TradeEvent, schema)(framed(_theirs(schema, fields))) == expected


def test_a_symbol_of_tomorrow_is_unknown() -> None:
    """A new kind of change does not stop an old consumer."""
    schema = deepcopy(avro_schema(TradeEvent))
    _field(schema, "op")["type"]["symbols"].insert(0, "SUSPENDED")
    fields = {**msgspec.structs.asdict(one(TradeEvent)), "op": "SUSPENDED"}
    assert _decoder(TradeEvent, schema)(framed(_theirs(schema, fields))) == one(TradeEvent, op=Op.UNKNOWN)


def _plain_number(schema: dict[str, Any]) -> None:
    _field(schema, "traded_at")["type"] = "long"


def _no_date(schema: dict[str, Any]) -> None:
    _field(schema, "trading_day")["type"] = "string"


def _missing(schema: dict[str, Any]) -> None:
    schema["fields"].remove(_field(schema, "volume"))


def _no_type(schema: dict[str, Any]) -> None:
    _field(schema, "volume")["type"] = "nonsense"


def _no_fields(schema: dict[str, Any]) -> None:
    del schema["fields"]


def _other_name(schema: dict[str, Any]) -> None:
    schema["name"] = "Trade"


def _no_name(schema: dict[str, Any]) -> None:
    schema["name"] = 5


@pytest.mark.parametrize(
    "change", [_plain_number, _no_date, _missing, _no_type, _no_fields, _other_name, _no_name], ids=lambda f: f.__name__
)
def test_a_writers_schema_that_is_not_ours_is_undecodable(change: Callable[[dict[str, Any]], None]) -> None:
    """Of another name, not resolvable, or no schema at all: the record is at fault, not the consumer."""
    schema = deepcopy(avro_schema(Candle))
    change(schema)
    with pytest.raises(Undecodable):
        _decoder(Candle, schema)(framed(_ours(one(Candle))))


# --- bytes that are no event ------------------------------------------------------------------------------------------

WHOLE = framed(_ours(one(TradeEvent)))


@pytest.mark.parametrize(
    "payload",
    [None, b"", b"\x00", b"\x00\x00\x00\x00\x01", b"\x01" + WHOLE[1:], WHOLE + b"\x00", WHOLE * 2, WHOLE + WHOLE[5:]]
    + [WHOLE[:length] for length in range(len(WHOLE))],
)
def test_part_of_a_record_or_more_than_one_is_undecodable(payload: bytes | None) -> None:
    """Every truncation, every extension, no payload at all."""
    with pytest.raises(Undecodable):
        _decoder(TradeEvent)(payload)


@settings(max_examples=400)
@given(
    event=st.sampled_from(EVENTS),
    body=st.binary(max_size=300),
    position=st.integers(0, 10_000),
    foreign=st.booleans(),
    in_frame=st.booleans(),
)
def test_any_bytes_are_an_event_or_undecodable(
    event: type[Event], body: bytes, position: int, foreign: bool, in_frame: bool
) -> None:
    """And nothing else, ever: random bytes, and a good record with random bytes in its middle."""
    writer = deepcopy(avro_schema(event))
    if foreign:
        writer["fields"].reverse()
    whole = framed(_theirs(writer, msgspec.structs.asdict(one(event))))
    at = 5 + position % (len(whole) - 5)
    decode = _decoder(event, writer)
    for payload in (framed(body) if in_frame else body, whole[:at] + body + whole[at + len(body) :]):
        try:
            decoded = decode(payload)
        except Undecodable:
            continue
        assert isinstance(decoded, event)
        assert json.loads(to_json(decode.fields(payload)))


@pytest.mark.parametrize("length", [2**62, -(2**62), -1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("event", EVENTS)
def test_a_length_that_cannot_be_is_undecodable(event: type[Event], length: int) -> None:
    """Neither memory for it nor a negative one is asked for."""
    fields = avro_schema(event)["fields"]
    lengthy = next(i for i, field in enumerate(fields) if field["type"] in ("string", "bytes"))
    prefix = {**avro_schema(event), "fields": fields[:lengthy]}
    head = _theirs(prefix, msgspec.structs.asdict(one(event)))
    with pytest.raises(Undecodable):
        _decoder(event)(framed(head + _theirs({"type": "long"}, length) + b"abc"))  # type: ignore[arg-type]


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json() -> None:
    """One line; days, instants, bytes and symbols as the command promises."""
    fields = _decoder(DeadLetter)(framed(_ours(one(DeadLetter, message="خط\n", poll_id=None))))
    assert to_json(msgspec.structs.asdict(fields)) == (
        '{"reason":"MALFORMED_ROW","message":"خط\\n","stage":"PARSE","origin":"x","consumer":"x","payload":"AP8=",'
        '"original_topic":"x","original_key":"AP8=","original_partition":7,"original_offset":7,'
        '"original_headers":{"k":"AP8="},"poll_sequence":7,"poll_id":null,"failed_at":"2019-08-24T06:30:00.123Z"}'
    )
    assert to_json({"day": date(2019, 8, 4), "at": datetime(2019, 8, 4, tzinfo=UTC)}) == (
        '{"day":"2019-08-04","at":"2019-08-04T00:00:00.000Z"}'
    )


@given(any_event())
def test_every_event_has_a_json_line_with_the_fields_of_its_schema(event: Event) -> None:
    """In the schema's order."""
    line = to_json(_decoder(type(event)).fields(framed(_ours(event))))
    assert "\n" not in line
    assert list(json.loads(line)) == [field["name"] for field in avro_schema(type(event))["fields"]]
