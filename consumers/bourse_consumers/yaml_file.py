"""Files that people write: YAML whose mistakes are shown all at once, with their lines and corrected ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bourse_cli.inputs import read_text
from bourse_schemas.errors import ConfigurationError

__all__ = ["Document", "Strict", "entries", "locate", "place", "pointed", "printable", "read"]

LARGEST = 16 << 20
MOST = 100
DEEPEST = 64


class Strict(BaseModel):
    """The base of the models of such files: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


M = TypeVar("M", bound=Strict)
Location = Sequence[int | str]


def printable(text: str) -> str:
    """Return a text without what a terminal would obey: control characters become spaces."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)


def pointed(line: str, column: int, end: int, corrected: str | None, write: str = "write") -> str:
    """Return a line with a caret under the characters from `column` to `end`, and the corrected line if it differs."""
    body = line.lstrip()
    indent = len(line) - len(body)
    at, length = max(column - indent, 0), max(min(end, len(line)) - column, 1)
    shown = f"\n    {printable(body.rstrip())}\n    {' ' * at}{'^' * length}"
    if corrected is None or corrected.strip() == body.strip():
        return shown
    return f"{shown}\n    {write}: {printable(corrected.strip())}"


class Document:
    """A YAML file as nodes, which know their places, and the mistakes found in it so far."""

    def __init__(self, path: Path, what: str, *, write: str = "write", secret: bool = False) -> None:
        """Read a file that `what` names in errors, as in `the channels`; raise ConfigurationError if it is not YAML.

        Of a `secret` file only the keys in question are shown.
        """
        self.path, self._write, self._secret = path, write, secret
        self._found: dict[tuple[int, int, str], str] = {}
        self.text = read_text(path, what)
        if len(self.text) > LARGEST:
            raise ConfigurationError(f"{path}: {what} are larger than {LARGEST >> 20} MiB")
        # Lines end where libyaml ends them.
        self._raw = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", self.text)
        try:
            # libyaml's loader is twenty times as fast, if PyYAML was built with it.
            loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(self.text)
            try:
                self.root = loader.get_single_node()
            finally:
                loader.dispose()
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            why = getattr(error, "problem", None) or str(error)
            if mark is None:
                raise ConfigurationError(f"{path}: not YAML: {printable(why)}") from error
            shown = "" if secret else pointed(self._line(mark.line), mark.column, mark.column + 1, None)
            self._add(mark.line, mark.column, f"not YAML: {why}", shown)
            raise self.error() from error

        if self.root is None:
            raise ConfigurationError(f"{path}: this is not {what}: the file is empty")

    def mistake(
        self, node: Any, message: str, at: int = 0, end: int | None = None, *, fix: str | None = None,
        whole: str | None = None,
    ) -> None:  # fmt: skip
        """Add a mistake in the characters `at` to `end` of a scalar, or in another node.

        The corrected line has `fix` instead of these characters, or `whole` instead of the whole node.
        """
        first, last = node.start_mark, node.end_mark
        line, column, stop = first.line, first.column, first.column + 1
        if isinstance(node, yaml.ScalarNode):
            line, column = self._place(node, at)
            bottom, stop = self._place(node, max((len(node.value) if end is None else end) - 1, at))
            stop = stop + 1 if bottom == line else len(self._line(line))
        text, corrected = self._line(line), None
        if whole is not None:
            quote = node.style if isinstance(node, yaml.ScalarNode) and node.style in {"'", '"'} else ""
            rest = self._line(last.line)[last.column :] if first.line == last.line else ""
            corrected = f"{self._line(first.line)[: first.column]}{quote}{whole}{quote}{rest}"
        elif fix is not None:
            corrected = text[:column] + fix + text[stop:]
        if self._secret:
            text = text[column:stop]
            self._add(line, column, message, pointed(text, 0, len(text), fix, self._write))
        else:
            self._add(line, column, message, pointed(text, column, stop, corrected, self._write))

    def unquoted(self, first: Any, last: Any, message: str) -> None:
        """Add a mistake from one node to another on its line: both in quotes are meant."""
        line, begin, end = first.start_mark.line, first.start_mark.column, last.end_mark.column
        text = self._line(line)
        corrected = f'{text[:begin]}"{text[begin:end]}"{text[end:]}' if last.end_mark.line == line else None
        self._add(line, begin, message, pointed(text, begin, end, corrected, self._write))

    def _line(self, number: int) -> str:
        return self._raw[number] if number < len(self._raw) else ""

    def _add(self, line: int, column: int, message: str, shown: str) -> None:
        place = f"{self.path}:{line + 1}:{column + 1}"
        self._found.setdefault((line, column, message), f"{place}: {printable(message)}{shown}")

    @property
    def wrong(self) -> bool:
        """Return whether there are mistakes."""
        return bool(self._found)

    def error(self) -> ConfigurationError:
        """Return the mistakes in their order, as an error."""
        lines = [text for _, text in sorted(self._found.items())]
        if len(lines) > MOST:
            lines = [*lines[:MOST], f"… and {len(lines) - MOST} more"]
        return ConfigurationError("\n".join(lines))

    def _place(self, node: Any, at: int) -> tuple[int, int]:
        """Return line and column of a character of a scalar's value: what folding and quoting add is skipped."""
        line, column = node.start_mark.line, node.start_mark.column
        for char in node.value[: at + 1]:
            while line <= node.end_mark.line and line < len(self._raw):
                if column >= len(self._raw[line]):
                    if char in " \n" and node.style is not None:
                        break
                    line, column = line + 1, 0
                    continue
                if self._raw[line][column] == char:
                    break
                column += 1
            else:
                return node.start_mark.line, node.start_mark.column
            column += 1
        return line, max(column - 1, 0)


def entries(node: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values of a mapping; those of `<<: *anchor` come first, so that its own replace them."""
    return list(_entries(node, {}, 0))


def _entries(node: Any, seen: dict[int, list[tuple[Any, Any]]], depth: int) -> list[tuple[Any, Any]]:
    if not isinstance(node, yaml.MappingNode) or depth > DEEPEST:
        return []
    if id(node) not in seen:
        seen[id(node)] = []
        own, merged = list[tuple[Any, Any]](), dict[str, tuple[Any, Any]]()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                own.append((key, value))
                continue
            for each in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                merged.update((str(k.value), (k, v)) for k, v in _entries(each, seen, depth + 1))
        mine = {str(key.value) for key, _ in own}
        seen[id(node)] = [pair for name, pair in merged.items() if name not in mine] + own
    return seen[id(node)]


def read(path: Path, model: type[M], what: str) -> tuple[M, Document]:
    """Return a file's contents and the document; `what` names it, as in `the channels`.

    Raises ConfigurationError with every mistake at once.
    """
    document = Document(path, what, secret=True)
    if not isinstance(document.root, yaml.MappingNode):
        keys = " and ".join(name for name, field in model.model_fields.items() if field.is_required())
        raise ConfigurationError(f"{path}: this is not {what}: such a file has the keys {keys}")
    loader: Any = yaml.SafeLoader("")
    try:
        data = loader.construct_document(document.root)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ConfigurationError(f"{path}: {printable(str(getattr(error, 'problem', None) or error))}") from error
    for key, name in _twice(document.root, set()):
        document.mistake(key, f"{name}: the key is given twice")
    contents = None
    try:
        contents = model.model_validate(data)
    except ValidationError as error:
        for location, why, fix in _explain(error, model):
            node, keys = locate(document.root, location)
            document.mistake(node, f"{keys or 'the file'}: {why}", fix=fix)
    if document.wrong or contents is None:
        raise document.error()
    return contents, document


def _twice(node: Any, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """Yield each key that its mapping has already: YAML would take the last one silently."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, value) in enumerate(node.value):
            if key.value in keys[:index]:
                yield key, key.value
            yield from _twice(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value, seen)


def _explain(error: ValidationError, model: type[Strict]) -> Iterator[tuple[Location, str, str | None]]:
    """Yield the location of each mistake, what it is, and what to write instead of the key if that is known."""
    for mistake in error.errors():
        location, fix = mistake["loc"], None
        what = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            fix = next(iter(difflib.get_close_matches(str(location[-1]), known, 1)), None)
            what = "unknown key; " + (f"did you mean {fix}?" if fix else f"there are {', '.join(known)}")
        elif mistake["type"] == "missing":
            what = "is missing"
        yield location, what, fix


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


def place(document: Document, location: Location) -> tuple[int, str]:
    """Return the line of what a location names, or of the nearest thing around it, and the location in words."""
    node, words = locate(document.root, location)
    return node.start_mark.line + 1, words


def locate(node: Any, location: Location) -> tuple[Any, str]:
    """Return the key or item that a location names, or the nearest one around it, and the location in words."""
    found, words = node, ""
    for part in location:
        words += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if words else str(part)
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if pair is not None:
                found, node = pair
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node = node.value[part]
    return found, words
