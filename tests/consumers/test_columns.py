"""A batch at once gives what one by one gives, or nothing; what cannot be read is never a row, and never shifts one."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import fastavro
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from bourse_consumers.api import Batch, Consumer, Decoders, Partition, Places, Record
from bourse_consumers.rows import to_table
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, MemoryStream
from bourse_schemas.codec import Deserializer, avro_schema, encoder
from bourse_schemas.errors import Undecodable
from bourse_schemas.events import Candle, DeadLetter, Event, PollMarker, PriceAlert, TradeEvent
from bourse_schemas.topics import TRADES
from tests.strategies import all_of, framed, one

OURS = avro_schema(TradeEvent)


def other(*changes: str) -> dict[str, Any]:
    """Return the schema of another release."""
    schema = deepcopy(OURS)
    if "older" in changes:
        schema["fields"] = [field for field in schema["fields"] if field["name"] != "exchange_type"]
    if "newer" in changes:
        schema["fields"].insert(3, {"name": "mood", "type": ["null", "string"], "default": None})
    if "reordered" in changes:
        schema["fields"].reverse()
    if "narrower" in changes:
        next(field for field in schema["fields"] if field["name"] == "volume")["type"] = "int"
    return schema


WRITERS = {1: OURS, 2: other("older"), 3: other("newer", "reordered"), 4: other("narrower"), 5: avro_schema(Candle)}
EVENTS: st.SearchStrategy[TradeEvent] = all_of(TradeEvent)


def writer(schema_id: int) -> dict[str, Any]:
    """Return a schema as a registry would."""
    if schema_id not in WRITERS:
        raise Undecodable(f"schema id {schema_id} is unknown")
    return WRITERS[schema_id]


def written(event: Any, schema_id: int) -> bytes:
    """Return an event's payload as another release wrote it."""
    fields = {name: getattr(event, name) for name in event.__struct_fields__} | {"mood": "bright"}
    fields["volume"] = min(max(fields["volume"], -(2**31)), 2**31 - 1)
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(deepcopy(WRITERS[schema_id])), fields)
    return framed(stream.getvalue(), schema_id)


@st.composite
def payload(draw: st.DrawFn, *, flips: bool = True) -> bytes | None:
    """Return a payload of every kind that a topic may hold; `flips` are single bytes that went wrong."""
    kinds = ["good"] * 6 + ["older", "extended", "cut", "doubled", "random", "none"] + ["flipped"] * flips
    kind = draw(st.sampled_from(kinds))
    if kind == "random":
        return draw(st.binary(max_size=300)) if draw(st.booleans()) else framed(draw(st.binary(max_size=300)))
    event = draw(EVENTS)
    good = framed(encoder(TradeEvent)(event))
    match kind:
        case "older":
            return written(event, draw(st.sampled_from([2, 3, 4])))
        case "extended":
            return good + draw(st.binary(min_size=1, max_size=20))
        case "cut":
            return good[: draw(st.integers(0, len(good) - 1))]
        case "doubled":
            return good + good[5:]
        case "flipped":
            spoilt = bytearray(good)
            spoilt[draw(st.integers(0, len(good) - 1))] = draw(st.integers(0, 255))
            return bytes(spoilt)
        case "none":
            return None
    return good


def records(payloads: Sequence[bytes | None]) -> list[Record]:
    """Return records of two partitions."""
    return [
        Record(Partition("bourse.trades", number % 2), number, 1_000 * number, None, value, {})
        for number, value in enumerate(payloads)
    ]


def one_by_one(found: Sequence[Record]) -> tuple[pa.Table | None, dict[int, Undecodable]]:
    """Return what can be read as a table, and why the others cannot, by their offsets."""
    decode = Deserializer(TradeEvent, writer)
    events, good, bad = [], [], {}
    for record in found:
        try:
            events.append(decode(record.value))
            good.append(record)
        except Undecodable as error:
            bad[record.offset] = error
    return (to_table(events, Places.of(good)) if good else None), bad


def at_once(decode: Deserializer[Any], found: Sequence[Record]) -> pa.Table | None:
    """Return the records as the columns give them, as a table and as a frame."""
    decoders = Decoders({TRADES.full_name(): decode})
    places, one_by_one = Places.of(found), Batch(found, {}, decoders)
    frame = decoders.frame(places)
    if frame is None:
        return None
    with suppress(Undecodable):  # all that may pass, see below
        assert one_by_one.events
        assert_frame_equal(frame, one_by_one.frame())
    return decoders.table(places)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(st.lists(payload(), min_size=1, max_size=12))
def test_a_batch_gives_what_one_by_one_gives_or_nothing(payloads: list[bytes | None]) -> None:
    """Whatever stands between the good ones."""
    found = records(payloads)
    expected, bad = one_by_one(found)
    table = at_once(Deserializer(TradeEvent, writer), found)
    if bad and table is not None:
        # All that may pass: a branch of a union that is not there, before a value that is.
        assert all("list index out of range" in str(error) for error in bad.values())
    elif table is not None:
        assert expected is not None
        assert table.equals(expected)
        assert table.schema.equals(expected.schema, check_metadata=True)


class Collect(Consumer):
    """Keeps every table."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []

    def process(self, batch: Batch) -> None:
        """Keep it."""
        self.tables.append(batch.table())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(st.lists(payload(flips=False), min_size=1, max_size=8))
def test_the_bad_ones_are_exactly_the_dead_letters(payloads: list[bytes | None]) -> None:
    """The rest of their batch is delivered as a table all the same."""
    memory = Memory()
    for value in payloads:
        memory.append_bytes(TradeEvent, value)  # type: ignore[arg-type]  # a tombstone may be there
    consumer, stream = Collect(), MemoryStream(memory, [TRADES])
    stream.decoders = Decoders({TRADES.full_name(): Deserializer(TradeEvent, writer)})
    runner = Runner(consumer, stream, name="t", max_rejected_share=1)
    while runner.step():
        pass
    expected, bad = one_by_one(memory.records[Partition("bourse.trades", 0)])  # type: ignore[arg-type]  # no markers
    letters = [emit.event for emit in memory.emitted if isinstance(emit.event, DeadLetter)]
    assert [letter.original_offset for letter in letters] == list(bad)
    if expected is None:
        assert consumer.tables == []
    else:
        assert pa.concat_tables(consumer.tables).equals(expected)


@pytest.mark.parametrize("schema_id", [1, 2, 3])
def test_it_is_the_columns_that_are_used(schema_id: int) -> None:
    """For a batch of one writer, whichever release it is of; a batch of two is decoded one by one."""
    event = one(TradeEvent, exchange_type=None)
    found = records([written(event, schema_id)] * 60)
    mixed = records([written(event, schema_id), written(event, 1)])
    assert (at_once(Deserializer(TradeEvent, writer), mixed) is None) == (schema_id != 1)
    table = at_once(Deserializer(TradeEvent, writer), found)
    assert table is not None
    assert table.equals(one_by_one(found)[0])


@pytest.mark.parametrize("event", [TradeEvent, Candle, PollMarker])
def test_every_flat_event_type_has_columns(event: type[Event]) -> None:
    """Trades, candles, polls: with something in every field, and with nothing where that may be."""
    full: Any = one(event)
    empty: Any = one(event, **{f["name"]: None for f in avro_schema(event)["fields"] if isinstance(f["type"], list)})
    events = [full, empty] * 3
    found = records([framed(encoder(event)(each)) for each in events])
    table = at_once(Deserializer(event, lambda _: avro_schema(event)), found)
    assert table is not None
    assert table.equals(to_table(events, Places.of(found)))


@pytest.mark.parametrize("event", [PriceAlert, DeadLetter])
def test_nested_event_types_are_read_one_by_one(event: type[Event]) -> None:
    """Maps and lists are rare, and so are their records."""
    found = records([framed(encoder(event)(one(event)))])
    assert at_once(Deserializer(event, lambda _: avro_schema(event)), found) is None


def test_two_halves_that_make_a_whole_are_noticed() -> None:
    """Without the guard the rows after them would be shifted, and nobody would know."""
    good = framed(encoder(TradeEvent)(one(TradeEvent)))
    for cut in random.Random(1).sample(range(6, len(good) - 1), 20):
        found = records([good, good[:cut], framed(good[cut:]), good])
        assert at_once(Deserializer(TradeEvent, writer), found) is None


def test_days_that_python_has_not_are_refused() -> None:
    """As one by one: year 10,000."""
    event = one(TradeEvent, traded_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    body = encoder(TradeEvent)(event)
    far = body.replace(encoder_of_millis(event.traded_at), encoder_of_millis(event.traded_at, 3_600_000), 1)
    assert far != body
    found = records([framed(body), framed(far)])
    assert list(one_by_one(found)[1]) == [1]
    assert at_once(Deserializer(TradeEvent, writer), found) is None


def encoder_of_millis(at: datetime, more: int = 0) -> bytes:
    """Return an instant as Avro has it, so many milliseconds later."""
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, "long", int(at.timestamp() * 1000) + more)
    return stream.getvalue()
