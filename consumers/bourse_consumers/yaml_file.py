"""Files that people write: YAML read into models. Mistakes are shown all at once, with places and corrected lines."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bourse_cli.inputs import read_text
from bourse_consumers.mistakes import EXAMPLES, WRITE, Mistake, explain
from bourse_schemas.errors import ConfigurationError, printable

LARGEST = 16 << 20
MOST = 100
# How alike a value and a choice must be for the choice to be proposed: another one would change what is meant.
ALIKE = 0.7
# Mistakes of a key, not of its value.
AT_KEY = {"unknown_key", "let_name", "feed_match", "channel_name", "unfit"}
# What pydantic finds, as a mistake without more to explain.
SIMPLE = {"missing": "missing", "string_type": "text", "model_type": "mapping", "dict_type": "mapping"}
MERGE, NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


class Strict(BaseModel):
    """The base of the models of such files: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, coerce_numbers_to_str=True)


def given(model: Strict | None) -> dict[str, Any]:
    """Return what is written of a model, in the order of its fields."""
    return {name: value for name, value in model or () if name in model.model_fields_set}  # type: ignore[union-attr]


M = TypeVar("M", bound=Strict)
Location = Sequence[int | str]


def pointed(line: str, column: int, end: int, corrected: str | None, language: str = "en") -> str:
    """Return a line with a caret under the characters from `column` to `end`, and the corrected line if it differs."""
    body = line.lstrip()
    at, length = max(column - len(line) + len(body), 0), max(min(end, len(line)) - column, 1)
    shown = f"\n    {printable(body.rstrip())}\n    {' ' * at}{'^' * length}"
    if corrected is None or corrected.strip() == body.strip():
        return shown
    return f"{shown}\n    {WRITE[language]}: {printable(corrected.strip())}"


class Document:
    """A YAML file: its contents as dicts, lists and scalars, and the mistakes found in it so far.

    Scalars are texts as they are written, but for null and whole numbers.
    """

    def __init__(self, path: Path, what: str, *, language: str = "en", secret: bool = False) -> None:
        """Read a file that `what` names in errors, as in `the channels`; raise ConfigurationError if it is not YAML.

        Of a `secret` file only the keys in question are shown.
        """
        self.path, self._language, self._secret = path, language, secret
        self._found: dict[tuple[int, int, str], str] = {}
        self._done: dict[int, Any] = {}
        # Per dict or list, by key or index: the node of the key and that of the value.
        self._nodes: dict[int, dict[int | str, tuple[Any, Any]]] = {}
        text = read_text(path, what)
        if len(text) > LARGEST:
            raise ConfigurationError(f"{path}: {what} are larger than {LARGEST >> 20} MiB")
        # Lines end where libyaml ends them.
        self._raw = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)
        self._root = None
        try:
            # libyaml's loader is twenty times as fast, if PyYAML was built with it.
            loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
            try:
                self._root = loader.get_single_node()
            finally:
                loader.dispose()
            self.data = self._plain(self._root)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
            line, column = (mark.line, mark.column) if mark else (0, 0)
            shown = "" if secret or mark is None else pointed(self._line(line), column, column + 1, None)
            self._add(line, column, Mistake("not_yaml", why=why), "", shown)
            raise self.error() from error
        if not isinstance(self.data, dict):
            self._add(0, 0, Mistake("not_keys" if self._root else "empty_file", what=what), "", "")
            raise self.error()

    def _plain(self, node: Any) -> Any:
        """Return a node as Python's types. An alias is the same object again; own keys replace those of `<<`."""
        if id(node) in self._done:
            return self._done[id(node)]
        if isinstance(node, yaml.ScalarNode):
            whole = not node.style and re.fullmatch(r"0|-?[1-9][0-9]{0,17}", node.value)
            return None if node.tag == NULL else int(node.value) if whole else node.value
        if not isinstance(node, yaml.MappingNode):
            items = self._done[id(node)] = list[Any]()
            each: Any
            for each in node.value if node else ():
                self._nodes.setdefault(id(items), {})[len(items)] = each, each
                items.append(self._plain(each))
            return items
        found = self._done[id(node)] = dict[str, Any]()
        nodes = self._nodes[id(found)] = {}
        for value in [value for key, value in node.value if key.tag == MERGE]:
            for merged in map(self._plain, value.value if isinstance(value, yaml.SequenceNode) else [value]):
                for name in [name for name in merged if name not in found] if isinstance(merged, dict) else ():
                    found[name], nodes[name] = merged[name], self._nodes[id(merged)][name]
        own: list[str] = []
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if key.tag == MERGE:
                continue
            if own and node.flow_style and ")" in name and value.tag == NULL:
                # A comma in an expression ended it: both parts in quotes are meant.
                self._unquoted(nodes[own[-1]][1], key)
                found[own[-1]] = f"{found[own[-1]]}, {name}"
                continue
            if name in own:
                self._note(key, Mistake("twice", fix=f"# {name}", name=name), "")
            own.append(name)
            found[name], nodes[name] = self._plain(value), (key, value)
        return found

    def _unquoted(self, first: Any, last: Any) -> None:
        line, begin, end = first.start_mark.line, first.start_mark.column, last.end_mark.column
        text = self._line(line)
        corrected = f'{text[:begin]}"{text[begin:end]}"{text[end:]}' if last.end_mark.line == line else None
        self._add(line, begin, Mistake("comma"), "", pointed(text, begin, end, corrected, self._language))

    # --- mistakes -----------------------------------------------------------------------------------------------------

    def check(
        self, model: type[M], data: Any, location: Location = (), what: str = "", context: Any = None
    ) -> M | None:
        """Return data as a model, without what is wrong in it, which becomes mistakes that begin with `what`.

        Returns None if nothing can be left out.
        """
        try:
            return model.model_validate(data, context=context)
        except ValidationError as error:
            wrong = error.errors(include_url=False)
        scope = str(data.get("scope", "")) if isinstance(data, dict) else ""
        for each in wrong:
            self.mistake([*location, *each["loc"]], _mistake(each, model), what and f"{what}: ", scope)
        bad = {each["loc"][0] for each in wrong if each["loc"]}
        if isinstance(data, dict) and bad:
            with suppress(ValidationError):
                return model.model_validate({k: v for k, v in data.items() if k not in bad}, context=context)
        return None

    def mistake(self, location: Location, mistake: Mistake, prefix: str = "", scope: str = "") -> None:
        """Add a mistake in what a location names, or in the nearest around it.

        Without a fix the corrected line has the example of the key, that of the rule's scope first.
        """
        key, value, words = self._find(location)
        names, scope = [name for name in location if isinstance(name, str)], "channel" if self._secret else scope
        missing = mistake.values["name"] if mistake.text == "missing" else ""
        name = missing or (names[-1] if names else "")
        example = EXAMPLES.get(f"{scope}.{name}", EXAMPLES.get(name, "…" if missing else None))
        if mistake.whole == "":
            example = None
        if missing:
            example = f"{missing}: {example}"
        if example and location and isinstance(location[-1], int):
            example = example.removeprefix("[").removesuffix("]")
        at_key = mistake.text in AT_KEY
        if self._secret:
            whole = at_key or bool(missing) or key is value
            self._note_key(key if words else None, mistake, words, whole, example)
        else:
            self._note(key if at_key else value, mistake, prefix, None if at_key else example)

    def _note_key(self, node: Any, mistake: Mistake, words: str, whole: bool, example: str | None) -> None:
        """Add a mistake, showing no more than the key."""
        place: Any = node or self._root
        line, column = place.start_mark.line, place.start_mark.column
        name = "" if node is None else self._line(line)[column : place.end_mark.column]
        fix = mistake.fix or mistake.whole or example
        corrected = fix if whole or fix is None else f"{name}: {fix}"
        shown = pointed(name, 0, len(name), corrected, self._language)
        self._add(line, column, mistake, f"{words}: " if words else "", shown)

    def _note(self, node: Any, mistake: Mistake, prefix: str, example: str | None = None) -> None:
        first, last, fix = node.start_mark, node.end_mark, mistake.fix
        line, column, stop = first.line, first.column, first.column + 1
        if isinstance(node, yaml.ScalarNode):
            line, column = self._place(node, mistake.at)
            end = len(node.value) if mistake.end is None else mistake.end
            bottom, stop = self._place(node, max(end - 1, mistake.at))
            stop = stop + 1 if bottom == line else len(self._line(line))
        text, corrected = self._line(line), None
        if mistake.whole or (fix is None and example is not None):
            value = mistake.whole or example or ""
            text_of = self._line(first.line)
            rest = text_of[last.column :] if first.line == last.line else ""
            quote = getattr(node, "style", None) or ('"' if "," in value and "{" in text_of[: first.column] else "")
            if isinstance(node, yaml.ScalarNode) and quote in {"'", '"'} and not (example == value and not node.style):
                value = quote + value.strip('"') + quote
            elif mistake.text == "missing" and node.flow_style:
                value, rest = f"{{{value}, ", text_of[first.column + 1 :]
            elif mistake.text == "missing":
                text_of, rest = "", ""
            corrected = text_of[: first.column] + value + rest
        elif fix is not None:
            remark = fix.startswith("#") and text[:column].strip()  # there is more on the line
            corrected = None if remark else text[:column] + fix + text[stop:]
        self._add(line, column, mistake, prefix, pointed(text, column, stop, corrected, self._language))

    def _add(self, line: int, column: int, mistake: Mistake, prefix: str, shown: str) -> None:
        message = printable(prefix + explain(mistake, self._language))
        place = f"{self.path}:{line + 1}:{column + 1}"
        self._found.setdefault((line, column, message), f"{place}: {message}{shown}")

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

    # --- places -------------------------------------------------------------------------------------------------------

    def _line(self, number: int) -> str:
        return self._raw[number] if number < len(self._raw) else ""

    def _find(self, location: Location) -> tuple[Any, Any, str]:
        """Return the nodes of key and value that a location names, or of the nearest around it, and it in words."""
        data, found, words = self.data, (self._root, self._root), ""
        for part in location:
            words += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if words else part
        for part in location:
            nodes = self._nodes.get(id(data), {})
            if part in nodes:
                found, data = nodes[part], data[part]
        return *found, words

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


def known_channel(name: str, known: Collection[str] | None) -> str:
    """Return the name of a channel; raise Mistake with a name that is nearly this one if there is no such channel."""
    if known is not None and name not in known:
        fix = next(iter(get_close_matches(name, known, 1, ALIKE)), None)
        raise Mistake("channel", fix=fix, whole="" if fix is None else None, name=name, known=", ".join(known))
    return name


def _mistake(found: Mapping[str, Any], model: type[Strict]) -> Mistake:
    """Return what pydantic found as a mistake."""
    values, location, kind = found.get("ctx", {}), found["loc"], found["type"]
    if isinstance(mistake := values.get("error"), Mistake):
        return mistake
    if kind in SIMPLE:
        return Mistake(SIMPLE[kind], name=str(location[-1]) if location else "")
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        fix = next(iter(get_close_matches(str(location[-1]), known, 1)), None)
        return Mistake("unknown_key", fix=fix, known=", ".join(known))
    if kind in {"literal_error", "bool_parsing", "bool_type"}:
        expected = values.get("expected", "'true' or 'false'")
        known = re.findall(r"'([^']*)'", expected) or [expected]
        fix = next(iter(get_close_matches(str(found["input"]).lower(), known, 1, ALIKE if known[1:] else 0)), None)
        return Mistake("one_of", fix=fix, whole="" if fix is None else None, known=expected)
    return Mistake("plain", why=str(found["msg"]).removeprefix("Value error, "))


def _known_keys(model: type[Strict], location: Location) -> list[str]:
    """Return the keys that the model at a location has."""
    for part in location:
        field = next((field for name, field in model.model_fields.items() if part in {name, field.alias}), None)
        if field is not None:  # else an index, or the key of a mapping whose values are the model
            model = next(iter(_models(field.annotation)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> list[Any]:
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, Strict) else []
    return own + [model for inner in get_args(annotation) for model in _models(inner)]
