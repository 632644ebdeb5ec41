"""Files that people write: YAML, checked by a pydantic model, every mistake named with its line and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bourse_schemas.errors import ConfigurationError

__all__ = ["Strict", "place", "read"]


class Strict(BaseModel):
    """What such files are made of: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


M = TypeVar("M", bound=Strict)


def read(path: Path, model: type[M], what: str, version: int = 1) -> tuple[M, Any]:
    """Return a file's contents and its YAML nodes; `what` names it, as in `the channels`.

    Raises ConfigurationError with every mistake at once: file, line and key.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigurationError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        keys = " and ".join(name for name, field in model.model_fields.items() if field.is_required())
        raise ConfigurationError(f"{path}: this is not {what}: such a file has the keys {keys}")
    if isinstance(found := data.get("version"), int) and found > version:
        line, _ = place(node, ["version"])
        raise ConfigurationError(f"{path}:{line}: version: {found} is newer than this release reads ({version})")
    mistakes = [f"{path}:{line}: {key}: is there twice" for line, key in _twice(node, set())]
    try:
        contents = model.model_validate(data)
    except ValidationError as error:
        raise ConfigurationError("\n".join([*mistakes, *_mistakes(path, node, model, error)])) from error
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


def _mistakes(path: Path, node: Any, model: type[Strict], error: ValidationError) -> Iterator[str]:
    for mistake in error.errors():
        line, keys = place(node, list(mistake["loc"]))
        what = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(mistake["loc"][-1]), _known_keys(model, mistake["loc"][:-1]), 1)
            what = "unknown key" + (f"; did you mean {near[0]}?" if near else "")
        elif mistake["type"] == "missing":
            what = "is missing"
        yield f"{path}:{line}: {keys or 'the file'}: {what}"


def _known_keys(model: type[Strict], location: tuple[int | str, ...]) -> list[str]:
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


def place(node: Any, location: list[int | str]) -> tuple[int, str]:
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
