"""Released schemas and bytes: what was once published can be read for ever.

`tests/golden/<Event>.v<N>.avsc` are the released schemas; they are never changed. `<Event>.v<N>.hex` are records
written with them, one a line. A schema that grows becomes a version more: copy it to tests/golden under the next number
and write the bytes with `pytest tests/schemas --rewrite-golden`, which leaves those of older versions alone.
"""

from __future__ import annotations

import io
import json
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import fastavro
import msgspec
import pytest

from bourse_schemas.codec import FRAME, Deserializer, avro_schema, encoder
from bourse_schemas.compatibility import gate
from bourse_schemas.events import Event
from bourse_schemas.topics import TOPICS

GOLDEN = Path(__file__).parent.parent / "golden"
EVENTS = [topic.event for topic in TOPICS]
# A schema that changes after its release would be another one under the same name: add a version instead.
RELEASED = {
    "Candle.v1": "f0a48a4363468548",
    "DeadLetter.v1": "6bbaf809e4e3513f",
    "PollMarker.v1": "0e986df49bf5bea0",
    "PriceAlert.v1": "656cbb7c6ff28a27",
    "TradeEvent.v1": "3e60705fd1e46f2b",
}


def _released(event: type[Event]) -> list[dict[str, Any]]:
    """Return the released schemas of an event type, the first one first."""
    names = [name for name in RELEASED if name.startswith(f"{event.__name__}.v")]
    return [json.loads((GOLDEN / f"{name}.avsc").read_text("utf-8")) for name in names]


def _shape(schema: Any) -> Any:
    """Return a schema without what says nothing to a program."""
    if isinstance(schema, dict):
        return {key: _shape(value) for key, value in schema.items() if key != "doc"}
    return [_shape(inner) for inner in schema] if isinstance(schema, list) else schema


def _samples(event: type[Event]) -> list[Event]:
    """Return one event with everything in it and one with nothing that may be left out."""
    full = {
        "string": "ومعادن\u200c ۱",
        "long": 2**53 + 1,
        "int": -7,
        "double": -2.75,
        "boolean": True,
        "bytes": b"\x00\xff",
    }

    def value(avro: Any, bare: bool) -> Any:
        match avro:
            case ["null", inner]:
                return None if bare else value(inner, bare)
            case {"logicalType": "date"}:
                return date(1969, 12, 30) if bare else date(2019, 8, 24)
            case {"logicalType": "timestamp-millis"}:
                return datetime(2019, 8, 24, 6, 30, 0, 0 if bare else 123_000, UTC)
            case {"type": "enum", "symbols": symbols}:
                return symbols[-1 if bare else 1]
            case {"type": "map", "values": inner}:
                return {} if bare else {"k": value(inner, bare), "": value(inner, bare)}
            case {"type": "array", "items": inner}:
                return [] if bare else [value(inner, bare)] * 2
        return type(full[avro])() if bare else full[avro]

    fields = avro_schema(event)["fields"]
    return [
        msgspec.convert({field["name"]: value(field["type"], bare) for field in fields}, event)
        for bare in (False, True)
    ]


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_schema_is_frozen(name: str) -> None:
    """Not a field, not a symbol, not an order."""
    schema = json.loads((GOLDEN / f"{name}.avsc").read_text("utf-8"))
    assert sha256(json.dumps(_shape(schema)).encode()).hexdigest()[:16] == RELEASED[name]


def test_every_golden_file_is_looked_at() -> None:
    """A version added is a line in RELEASED."""
    for suffix in ("avsc", "hex"):
        assert {path.stem for path in GOLDEN.glob(f"*.v*.{suffix}")} == set(RELEASED)


@pytest.mark.parametrize("event", EVENTS)
def test_this_releases_schema_goes_with_every_released_one(event: type[Event]) -> None:
    """Both ways; and it is the last of them, or it is not released yet under a number of its own."""
    released = _released(event)
    assert gate(avro_schema(event), dict(enumerate(released, 1))) == []
    assert _shape(avro_schema(event)) == _shape(released[-1]), "copy the schema to tests/golden as the next version"


@pytest.mark.parametrize("event", EVENTS)
def test_this_releases_bytes_are_the_golden_ones(event: type[Event], rewrite_golden: bool) -> None:
    """The same event is the same bytes, on every machine and in every release of this schema."""
    file = GOLDEN / f"{event.__name__}.v{len(_released(event))}.hex"
    lines = "".join(f"{encoder(type(sample))(sample).hex()}\n" for sample in _samples(event))
    if rewrite_golden:
        file.write_text(lines)
    assert lines == file.read_text()


@pytest.mark.parametrize("event", EVENTS)
def test_bytes_of_every_release_are_read_today_and_todays_by_every_release(event: type[Event]) -> None:
    """With fastavro's own resolution."""
    samples = _samples(event)
    for version, schema in enumerate(_released(event), 1):
        decode = Deserializer(event, lambda _, schema=schema: schema)  # type: ignore[misc]
        lines = (GOLDEN / f"{event.__name__}.v{version}.hex").read_text().splitlines()
        read = [decode(FRAME.pack(0, version) + bytes.fromhex(line)) for line in lines]
        assert len(read) == len(samples)
        if version == len(_released(event)):
            assert read == samples
        for sample in samples:
            parsed = fastavro.parse_schema(schema)
            old: Any = fastavro.schemaless_reader(
                io.BytesIO(encoder(type(sample))(sample)), fastavro.parse_schema(avro_schema(event)), parsed
            )
            assert set(old) == {field["name"] for field in schema["fields"]}
