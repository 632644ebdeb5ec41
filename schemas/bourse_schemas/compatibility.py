"""Whether a schema may follow those that are released: decided offline, stricter than a registry is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastavro.schema import SchemaParseException, expand_schema

WAY_OUT = "Released schemas are frozen. Add a field with a default; for a changed meaning, add a new field or topic"
UNITS = re.compile(r"\b(?:rial|toman|percent|shares|lots|milliseconds|seconds|minutes|UTC)\b")


def gate(new: Any, released: Mapping[int, Any]) -> list[str]:
    """Return what keeps a schema from following the released ones, by their versions; one line a fault.

    Faults are what is not compatible, and what readers would misread although Avro lets it pass: another type, logical
    type or unit, a field or symbol that is gone, another default of a field or enum, fields in another order.
    """
    faults: list[str] = []
    for version, old in released.items():
        if old == new:
            break  # what came later was judged when it came
        try:
            faults += [f"compared with version {version}, {why}" for why in _changed(old, new)]
        except SchemaParseException as error:
            return [f"it is not an Avro schema: {error}"]
    return faults


def refusal(faults: list[str]) -> str:
    """Return the faults that `gate` found as one line, with the way out."""
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return f"{'; '.join(faults[:3])}{more}. {WAY_OUT}"


def _changed(old: Any, new: Any) -> Iterator[str]:
    old, new = map(expand_schema, (old, new))
    was, is_ = (each["name"] if isinstance(each, dict) and "fields" in each else each for each in (old, new))
    if was != is_:
        yield f"it is {is_}, was {was}"
    if was != is_ or was == old:  # not records
        return
    before, after = ({field["name"]: field for field in schema["fields"]} for schema in (old, new))
    shared = [name for name in before if name in after]
    if shared != [name for name in after if name in before]:
        yield "the fields are in another order"
    for name in shared:
        then, now = before[name], after[name]
        if _shape(then["type"]) != _shape(now["type"]):
            yield f"the type of {name} is {_shape(now['type'])}, was {_shape(then['type'])}"
        yield from _another("default", name, then, now)
        units = [sorted(set(UNITS.findall(field.get("doc", "")))) for field in (then, now)]
        if units[0] != units[1]:
            yield f"the doc of {name} names {units[1] or 'no unit'}, was {units[0] or 'none'}"
        for one, other in zip(_enums(then["type"]), _enums(now["type"]), strict=False):
            yield from _another("the enum's default", name, one, other)
            if gone := [symbol for symbol in one["symbols"] if symbol not in other["symbols"]]:
                yield f"{name} is no longer {', '.join(gone)}"
            elif one["symbols"] != other["symbols"] and "default" not in one:
                yield f"{name} has other symbols and no default"
    yield from (f"{name} is gone" for name in before if name not in after)
    new_names = (name for name in after if name not in before)
    yield from (f"{name} is new and has no default" for name in new_names if "default" not in after[name])


def _another(what: str, name: str, then: Any, now: Any) -> Iterator[str]:
    if then.get("default", ...) != now.get("default", ...):
        yield f"{what} of {name} is {now.get('default', 'none')!r}, was {then.get('default', 'none')!r}"


def _enums(avro: Any) -> list[Any]:
    branches = avro if isinstance(avro, list) else [avro]
    return [branch for branch in branches if isinstance(branch, dict) and branch.get("type") == "enum"]


def _shape(avro: Any) -> Any:
    """Return a type without docs, and without what may differ between enums."""
    if isinstance(avro, list):
        return [_shape(each) for each in avro]
    if not isinstance(avro, dict):
        return avro
    shape = {key: _shape(value) for key, value in avro.items() if key not in {"doc", "symbols", "default"}}
    return shape["type"] if len(shape) == 1 else shape
