"""Files that people write: YAML, checked by a pydantic model, every mistake named with its line and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bourse_schemas.errors import ConfigurationError

__all__ = ["Strict", "explain", "open_file", "parse", "place", "read"]


class Strict(BaseModel):
    """What such files are made of: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


M = TypeVar("M", bound=Strict)
Location = Sequence[int | str]


def parse(path: Path, what: str) -> tuple[Any, Any]:
    """Return a YAML file as nodes, which know their lines, and as data; `what` names it, as in `the channels`."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        # Twenty times as fast, where PyYAML was built with libyaml.
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            node = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigurationError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error


def open_file(path: Path, what: str, keys: str, version: int = 1) -> tuple[Any, Any, list[str]]:
    """Return a file of ours as nodes and as data, a mapping of this version at most, and which keys are there twice.

    Raises ConfigurationError where it is another file; `keys` says what ours has.
    """
    node, data = parse(path, what)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: this is not {what}: such a file has {keys}")
    if isinstance(found := data.get("version"), int) and not isinstance(found, bool) and found > version:
        line, _ = place(node, ["version"])
        raise ConfigurationError(
            f"{path}:{line}: version: {found} is newer than this release reads: upgrade, or write {version}"
        )
    return node, data, [f"{path}:{line}: {key}: is there twice" for line, key in _twice(node, set())]


def read(path: Path, model: type[M], what: str) -> tuple[M, Any]:
    """Return a file's contents and its YAML nodes; `what` names it, as in `the channels`.

    Raises ConfigurationError with every mistake at once: file, line and key.
    """
    keys = " and ".join(name for name, field in model.model_fields.items() if field.is_required())
    node, data, mistakes = open_file(path, what, f"the keys {keys}")
    try:
        contents = model.model_validate(data)
    except ValidationError as error:
        for location, why in explain(error, model):
            line, key = place(node, location)
            mistakes.append(f"{path}:{line}: {key or 'the file'}: {why}")
        raise ConfigurationError("\n".join(mistakes)) from error
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    return contents, node


def _twice(node: Any, seen: set[int]) -> Iterator[tuple[int, str]]:
    """Return line and name of each key that its mapping has already: YAML would take the last one in silence."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, value) in enumerate(node.value):
            if key.value in keys[:index]:
                yield key.start_mark.line + 1, key.value
            yield from _twice(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value, seen)


def explain(error: ValidationError, model: type[Strict]) -> Iterator[tuple[Location, str]]:
    """Yield where a mistake is, and what: in words for whoever wrote the file."""
    for mistake in error.errors():
        location = mistake["loc"]
        what = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, 1)
            what = "unknown key; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
        elif mistake["type"] == "missing":
            what = "is missing"
        yield location, what


def _known_keys(model: type[Strict], location: Location) -> list[str]:
    """Return the keys that the model at a location has."""
    for part in location:
        field = next((field for name, field in model.model_fields.items() if part in {name, field.alias}), None)
        if field is not None:  # else an index, or the key of a mapping whose values are the model
            model = next(_models(field.annotation), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def place(node: Any, location: Location) -> tuple[int, str]:
    """Return the line of what a location names, or of the nearest thing around it, and the location in words."""
    line: int = node.start_mark.line + 1
    words = ""
    for part in location:
        words += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if words else str(part)
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line, words
