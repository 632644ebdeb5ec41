"""Whether a schema may follow those that are released: decided offline, stricter than a registry is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import fastavro

__all__ = ["compatible", "gate", "refusal"]

WAY_OUT = "Released schemas are frozen. Add a field with a default; for a changed meaning, add a new field or topic"
UNITS = re.compile(r"\b(?:rial|toman|percent|shares|lots|milliseconds|seconds|minutes|UTC)\b")


def compatible(new: Any, olds: list[Any]) -> list[str]:
    """Return what keeps a schema from being fully compatible with every older one, one line a fault.

    Fields that only one of them has need a default. The types of the others must be equal but for docs and the symbols
    of enums with a default: Avro would also let a unit, a logical type, or bytes for a string pass.
    """
    return [f"version {version}: {fault}" for version, old in enumerate(olds, 1) for fault in _incompatible(new, old)]


def _incompatible(new: Any, old: Any) -> Iterator[str]:
    new, old = map(fastavro.schema.expand_schema, (new, old))
    was, is_ = (each["name"] if isinstance(each, dict) and "fields" in each else each for each in (old, new))
    if was != is_:
        yield f"it is {is_}, was {was}"
    elif isinstance(new, dict) and "fields" in new:
        before, after = _fields(old), _fields(new)
        for name, field in (before | after).items():
            if name not in before or name not in after:
                if "default" not in field:
                    yield f"{name} is in one schema only and has no default"
                continue
            then, now = before[name]["type"], after[name]["type"]
            if _shape(then) != _shape(now):
                yield f"the type of {name} is {_shape(now)}, was {_shape(then)}"
            pairs = zip(_enums(then), _enums(now), strict=False)
            if any(a["symbols"] != b["symbols"] and "default" not in a.keys() & b.keys() for a, b in pairs):
                yield f"{name} has other symbols and no default"


def _fields(schema: Any) -> dict[str, Any]:
    return {field["name"]: field for field in schema["fields"]}


def _shape(avro: Any) -> Any:
    """Return a type without docs, and without what may differ between enums."""
    if isinstance(avro, list):
        return [_shape(each) for each in avro]
    if not isinstance(avro, dict):
        return avro
    shape = {key: _shape(value) for key, value in avro.items() if key not in {"doc", "symbols", "default"}}
    return shape["type"] if len(shape) == 1 else shape


def gate(new: dict[str, Any], released: Mapping[int, Any]) -> list[str]:
    """Return what keeps a schema from following the released ones, by their versions; one line a fault.

    Faults are what is not compatible, and what readers would misread: a field or symbol that is gone, another default
    of a field or enum, another unit in a doc, fields in another order; also a field or enum without a doc.
    """
    faults: list[str] = []
    try:
        for version, old in released.items():
            if old == new:
                break  # what came later was judged when it came
            changed = _changed(old, new) if isinstance(old, dict) and "fields" in old else ()
            faults += [f"compared with version {version}, {why}" for why in (*_incompatible(new, old), *changed)]
    except fastavro.schema.SchemaParseException as error:
        return [f"it is not an Avro schema: {error}"]
    explained = [(new["name"], new)]
    for field in new["fields"]:
        explained += [(field["name"], field), *((each["name"], each) for each in _enums(field["type"]))]
    return faults + [f"{name} has no doc" for name, part in explained if not part.get("doc")]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield what can be read, but means something else."""
    before, after = _fields(old), _fields(new)
    shared = [name for name in before if name in after]
    if shared != [name for name in after if name in before]:
        yield "the fields are in another order"
    yield from (f"{name} is gone" for name in before if name not in after)
    for name in shared:
        then, now = before[name], after[name]
        yield from _another("default", name, then, now)
        units = [sorted(set(UNITS.findall(field.get("doc", "")))) for field in (then, now)]
        if units[0] != units[1]:
            yield f"the doc of {name} names {units[1] or 'no unit'}, was {units[0] or 'none'}"
        for was, is_ in zip(_enums(then["type"]), _enums(now["type"]), strict=False):
            yield from _another("the enum's default", name, was, is_)
            if gone := [symbol for symbol in was["symbols"] if symbol not in is_["symbols"]]:
                yield f"{name} is no longer {', '.join(gone)}"


def _another(what: str, name: str, then: Any, now: Any) -> Iterator[str]:
    if then.get("default", ...) != now.get("default", ...):
        yield f"{what} of {name} is {now.get('default', 'none')!r}, was {then.get('default', 'none')!r}"


def _enums(avro: Any) -> list[Any]:
    branches = avro if isinstance(avro, list) else [avro]
    return [branch for branch in branches if isinstance(branch, dict) and branch.get("type") == "enum"]


def refusal(faults: list[str]) -> str:
    """Return the faults that `gate` found as one line, with the way out."""
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return f"{'; '.join(faults[:3])}{more}. {WAY_OUT}"
