"""The event types against the schemas they mirror."""

from __future__ import annotations

import types
import typing
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any

import msgspec
import pytest

from bourse_schemas import errors, events
from bourse_schemas.codec import avro_schema
from bourse_schemas.events import Candle, Event, TradeEvent
from bourse_schemas.topics import TOPICS

EVENTS = [topic.event for topic in TOPICS]
PRIMITIVES = {"string": str, "long": int, "int": int, "double": float, "boolean": bool, "bytes": bytes}
NOON = datetime(2019, 8, 24, 12, tzinfo=UTC)
LOGICAL = {"date": date, "timestamp-millis": datetime}


def _python(avro: Any) -> Any:
    """Return the Python type that an Avro type must have."""
    match avro:
        case ["null", inner]:
            return _python(inner) | None
        case {"logicalType": logical}:
            return LOGICAL[logical]
        case {"type": "enum", "name": name}:
            return getattr(events, name)
        case {"type": "map", "values": inner}:
            return types.GenericAlias(dict, (str, _python(inner)))
        case {"type": "array", "items": inner}:
            return types.GenericAlias(list, (_python(inner),))
    return PRIMITIVES[avro]


def _enums(avro: Any) -> typing.Iterator[dict[str, Any]]:
    if isinstance(avro, dict) and avro["type"] == "enum":
        yield avro
    for inner in avro if isinstance(avro, list) else ():
        yield from _enums(inner)


@pytest.mark.parametrize("event", EVENTS)
def test_the_type_has_the_fields_types_and_defaults_of_its_schema(event: type[Event]) -> None:
    """By name; a nullable field defaults to None, and nothing else has a default."""
    schema = avro_schema(event)
    assert schema["name"] == event.__name__
    hints = typing.get_type_hints(event)
    typed = {ours.name: ours for ours in msgspec.structs.fields(event)}
    assert typed.keys() == {field["name"] for field in schema["fields"]}
    for field in schema["fields"]:
        ours = typed[field["name"]]
        assert _python(field["type"]) == hints[ours.name], ours.name
        nullable = isinstance(field["type"], list)
        assert ("default" in field, field.get("default")) == (nullable, None), ours.name
        assert ours.default is (None if nullable else msgspec.NODEFAULT), ours.name


@pytest.mark.parametrize("event", EVENTS)
def test_everything_in_a_schema_is_documented_and_every_enum_can_grow(event: type[Event]) -> None:
    """A symbol of tomorrow reads as UNKNOWN today."""
    schema = avro_schema(event)
    assert schema["doc"]
    for field in schema["fields"]:
        assert field["doc"].strip(), field["name"]
        for enum in _enums(field["type"]):
            python: type[StrEnum] = getattr(events, enum["name"])
            assert enum["symbols"] == list(python)
            assert [member.name for member in python] == [member.value for member in python]
            assert enum["default"] == "UNKNOWN"


def test_a_trade_event_is_its_candle_and_six_fields_around_it() -> None:
    """The candle's fields are one block in it, so they are encoded once."""
    trade = [(field["name"], field["type"]) for field in avro_schema(TradeEvent)["fields"]]
    candle = [(field["name"], field["type"]) for field in avro_schema(Candle)["fields"]]
    first = trade.index(candle[0])
    assert trade[first : first + len(candle)] == candle
    around = {name for name, _ in trade} - {name for name, _ in candle}
    deltas = {"volume_delta", "value_delta", "trade_count_delta", "last_price_delta", "closing_price_delta"}
    assert around == {"event_id", "op", *deltas}


def test_an_event_is_a_value() -> None:
    """It cannot be changed and is compared by what it holds."""
    fields = {"reason": "REJECTED", "message": "a", "stage": "PARSE", "origin": "a", "payload": "", "failed_at": NOON}
    one, other = (msgspec.convert({**fields, "original_headers": {}}, events.DeadLetter) for _ in range(2))
    assert one == other
    with pytest.raises(AttributeError):
        one.message = "b"  # type: ignore[misc]


def test_the_tree_of_errors_is_the_one_drawn() -> None:
    """Read from the docstring: every class is below its base, none is missing."""
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if name in errors.__all__:
            depth = (len(line) - len(line.lstrip("│├└─ "))) // 3
            above[depth:] = [name]
            drawn[name] = above[depth - 1] if depth else "Exception"
    assert drawn == {name: getattr(errors, name).__base__.__name__ for name in errors.__all__ if name[0].isupper()}
