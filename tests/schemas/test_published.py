"""What others take of the contract: it is derived, valid, and says what changed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import fastavro
import jsonschema
import pytest
import yaml

from bourse_schemas.codec import avro_schema
from bourse_schemas.compatibility import gate, refusal
from bourse_schemas.events import PriceAlert, TradeEvent
from bourse_schemas.topics import TOPICS
from scripts.contract_page import asyncapi_text, contract

ROOT = Path(__file__).parents[2]
ASYNCAPI = Path(__file__).with_name("asyncapi-3.0.0.json.gz")


def test_asyncapi_is_what_the_script_writes_and_valid() -> None:
    """By AsyncAPI's own JSON Schema; a release cannot forget it."""
    text = (ROOT / "asyncapi.yaml").read_text("utf-8")
    assert text == asyncapi_text(), "run `python scripts/contract_page.py`"
    document = yaml.safe_load(text)
    rules = json.loads(gzip.decompress(ASYNCAPI.read_bytes()))
    jsonschema.Draft7Validator(rules).validate(document)
    assert [channel["address"] for channel in document["channels"].values()] == [t.full_name() for t in TOPICS]
    for topic in TOPICS:
        message = document["components"]["messages"][topic.event.__name__]
        assert fastavro.parse_schema(message["payload"]["schema"])
        assert message["payload"]["schema"] == avro_schema(topic.event)


def test_the_validation_would_notice() -> None:
    """A channel whose address is a number, an unknown key."""
    rules = json.loads(gzip.decompress(ASYNCAPI.read_bytes()))
    document = yaml.safe_load(asyncapi_text())
    spoils: list[Callable[[Any], object]] = [
        lambda found: found["channels"]["trades"].update(address=7),
        lambda found: found.update(chanels={}),
        lambda found: found["components"]["messages"]["Candle"].update(headers="none"),
    ]
    for spoil in spoils:
        spoilt = deepcopy(document)
        spoil(spoilt)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft7Validator(rules).validate(spoilt)


def test_the_tables_are_what_the_script_writes() -> None:
    """Every topic, field, symbol and header is in them."""
    text = (ROOT / "docs" / "contract.md").read_text("utf-8")
    assert text == contract(), "run `python scripts/contract_page.py`"
    for topic in TOPICS:
        assert f"`{topic.full_name()}`" in text
        for field in avro_schema(topic.event)["fields"]:
            assert f"| `{field['name']}` |" in text


def field(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a field of a schema."""
    found: dict[str, Any] = next(each for each in schema["fields"] if each["name"] == name)
    return found


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str | None]] = {
    "a field with a default": (
        lambda s: s["fields"].append({"name": "venue", "type": ["null", "string"], "default": None, "doc": "Where."}),
        None,
    ),
    "a symbol": (lambda s: field(s, "op")["type"]["symbols"].insert(4, "SUSPENDED"), None),
    "another doc": (lambda s: field(s, "title").update(doc="Its name."), None),
    "a field without a default": (
        lambda s: s["fields"].append({"name": "venue", "type": "string", "doc": "Where."}),
        "venue is new and has no default",
    ),
    "a field gone": (lambda s: s["fields"].remove(field(s, "volume")), "volume is gone"),
    "an optional field gone": (lambda s: s["fields"].remove(field(s, "exchange_type")), "exchange_type is gone"),
    "another type": (lambda s: field(s, "volume").update(type="string"), "the type of volume is string, was long"),
    "another logical type": (
        lambda s: field(s, "trading_day").update(type="int"),
        "the type of trading_day is int, was",
    ),
    "the enum's default": (
        lambda s: field(s, "op")["type"].update(default="TRADED"),
        "the enum's default of op is 'TRADED', was 'UNKNOWN'",
    ),
    "another default": (
        lambda s: field(s, "open_price").update(type=["null", "long"], default=0),
        "default of open_price is 0, was None",
    ),
    "another order": (lambda s: s["fields"].reverse(), "the fields are in another order"),
    "a symbol gone": (lambda s: field(s, "op")["type"]["symbols"].remove("REVISED"), "op is no longer REVISED"),
    "another unit": (
        lambda s: field(s, "last_price").update(doc="Price of the last trade, toman."),
        "the doc of last_price names ['toman'], was ['rial']",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_readers_would_misread_is_refused(kind: str) -> None:
    """The field and the rule are named, and what to do instead."""
    change, fault = CHANGES[kind]
    changed = deepcopy(avro_schema(TradeEvent))
    change(changed)
    faults = gate(changed, {1: avro_schema(TradeEvent)})
    assert bool(faults) == (fault is not None)
    if fault is not None:
        assert any(fault in each for each in faults)
        assert "Released schemas are frozen" in refusal(faults)


def test_an_enum_in_a_union_is_looked_at_too() -> None:
    """`resolved_by` of an alert may be null."""
    changed = deepcopy(avro_schema(PriceAlert))
    field(changed, "resolved_by")["type"][1]["default"] = "CONDITION"
    assert gate(changed, {3: avro_schema(PriceAlert)}) == [
        "compared with version 3, the enum's default of resolved_by is 'CONDITION', was 'UNKNOWN'"
    ]


@pytest.mark.parametrize("old", ["string", {"type": "enum", "name": "E", "symbols": ["A"]}])
def test_a_subject_that_holds_something_else(old: Any) -> None:
    """Is a fault, and no crash; so is a schema of ours that Avro does not take."""
    assert gate(avro_schema(TradeEvent), {1: old})
    broken = deepcopy(avro_schema(TradeEvent))
    field(broken, "open_price")["type"] = "long"
    assert any("open_price" in fault or "not an Avro" in fault for fault in gate(broken, {1: avro_schema(TradeEvent)}))


def test_an_older_release_goes_on_beside_a_newer_one() -> None:
    """While some have been upgraded and others have not."""
    ours, later = avro_schema(TradeEvent), deepcopy(avro_schema(TradeEvent))
    later["fields"].append({"name": "venue", "type": ["null", "string"], "default": None, "doc": "Where."})
    assert gate(ours, {1: ours, 2: later}) == []
    assert gate(ours, {1: later})
