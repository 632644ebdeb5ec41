"""Whether a schema may follow those that are released: decided offline, stricter than a registry is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import fastavro

__all__ = ["compatible", "gate", "refusal"]

WAY_OUT = "Released schemas are frozen. Add a field with a default; for a changed meaning, add a new field or topic"
UNITS = re.compile(r"\b(?:rial|toman|percent|shares|lots|milliseconds|seconds|minutes|UTC)\b")
_PROMOTED = {
    "int": {"long", "float", "double"},
    "long": {"float", "double"},
    "float": {"double"},
    "string": {"bytes"},
    "bytes": {"string"},
}


def compatible(new: dict[str, Any], olds: list[dict[str, Any]]) -> list[str]:
    """Return what keeps a schema from being fully compatible with every older one, one line a fault.

    Avro's own rules of resolution, both ways; and a changed logical type, precision, scale or unit is a fault, which
    Avro would let pass.
    """
    return [fault for version, old in enumerate(olds, 1) for fault in _incompatible(new, old, version)]


def _incompatible(new: Any, old: Any, version: int) -> Iterator[str]:
    expand = fastavro.schema.expand_schema
    yield from (f"version {version} cannot read it: {why}" for why in _unreadable(expand(new), expand(old), ""))
    yield from (f"it cannot read version {version}: {why}" for why in _unreadable(expand(old), expand(new), ""))


def gate(new: dict[str, Any], released: Mapping[int, Any]) -> list[str]:
    """Return what keeps a schema from following the released ones, by their versions; one line a fault.

    What is not compatible, and what readers would take for something else: a field or a symbol that is gone, another
    default of a field or an enum, another unit in a doc, fields in another order; and what nothing explains.
    """
    faults: list[str] = []
    try:
        for version, old in released.items():
            if old == new:
                break  # what came later was judged when it came
            faults += _incompatible(new, old, version)
            if isinstance(old, dict) and "fields" in old:
                faults += [f"beside version {version}: {why}" for why in _changed(old, new)]
    except fastavro.schema.SchemaParseException as error:
        return [f"it is no Avro schema: {error}"]
    explained = [(new["name"], new)]
    for field in new["fields"]:
        explained += [(field["name"], field), *((each["name"], each) for each in _enums(field))]
    return faults + [f"{name} has no doc" for name, part in explained if not part.get("doc")]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield what resolves, and means something else."""
    before, after = ({field["name"]: field for field in schema["fields"]} for schema in (old, new))
    shared = [name for name in before if name in after]
    if shared != [name for name in after if name in before]:
        yield "the fields stand in another order"
    yield from (f"{name} is gone" for name in before if name not in after)
    for name in shared:
        then, now = before[name], after[name]
        yield from _another("default", name, then, now)
        units = [sorted(set(UNITS.findall(field.get("doc", "")))) for field in (then, now)]
        if units[0] != units[1]:
            yield f"the doc of {name} speaks of {units[1] or 'no unit'}, was {units[0] or 'none'}"
        for was, is_ in zip(_enums(then), _enums(now), strict=False):
            yield from _another("the enum's default", name, was, is_)
            if gone := [symbol for symbol in was["symbols"] if symbol not in is_["symbols"]]:
                yield f"{name} is no longer {', '.join(gone)}"


def _another(what: str, name: str, then: Any, now: Any) -> Iterator[str]:
    if then.get("default", ...) != now.get("default", ...):
        yield f"{what} of {name} is {now.get('default', 'none')!r}, was {then.get('default', 'none')!r}"


def _enums(field: Any) -> list[Any]:
    branches = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return [branch for branch in branches if isinstance(branch, dict) and branch.get("type") == "enum"]


def _unreadable(writer: Any, reader: Any, at: str) -> Iterator[str]:
    if isinstance(writer, list):
        for branch in writer:
            yield from _unreadable(branch, reader, at)
        return
    if isinstance(reader, list):
        if all(any(_unreadable(writer, branch, at)) for branch in reader):
            yield f"{at} may hold what the reader's union has not"
        return
    wrote: dict[str, Any] = {"type": writer} if isinstance(writer, str) else writer
    reads: dict[str, Any] = {"type": reader} if isinstance(reader, str) else reader
    for attribute in ("logicalType", "precision", "scale", "unit", "size", "name"):
        if wrote.get(attribute) != reads.get(attribute):
            yield f"{attribute} of {at or 'the record'} is {wrote.get(attribute)} or {reads.get(attribute)}"
    match wrote["type"], reads["type"]:
        case "record", "record":
            written = {field["name"]: field for field in wrote["fields"]}
            for field in reads["fields"]:
                path = f"{at}.{field['name']}".lstrip(".")
                if field["name"] in written:
                    yield from _unreadable(written[field["name"]]["type"], field["type"], path)
                elif "default" not in field:
                    yield f"{path} is not written and has no default"
        case "enum", "enum":
            if "default" not in reads and (unknown := set(wrote["symbols"]) - set(reads["symbols"])):
                yield f"{at} may be {', '.join(sorted(unknown))}"
        case ("map" | "array" as kind, other) if kind == other:
            inner = "values" if kind == "map" else "items"
            yield from _unreadable(wrote[inner], reads[inner], f"{at}[]")
        case kind, other if kind != other and other not in _PROMOTED.get(kind, ()):
            yield f"{at} is {kind} or {other}"


def refusal(faults: list[str]) -> str:
    """Return the faults that `gate` found as one line, with the way out."""
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return f"{'; '.join(faults[:3])}{more}. {WAY_OUT}"
