"""Rules as people write them: YAML files, tables and lists, read with the place of every mistake."""

from __future__ import annotations

import ast
import csv
import keyword
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from bourse_consumers.alerts import messages
from bourse_consumers.alerts.expressions import (
    KINDS,
    PLAIN,
    RESERVED,
    Compiler,
    Expression,
    Needs,
    Scope,
    corrected,
    overlap,
    parse,
    span,
)
from bourse_consumers.alerts.rule import CODE, MARKETS, Match, Rule, Table, form
from bourse_consumers.mistakes import Mistake, explain, near
from bourse_consumers.yaml_file import LARGEST, Document, Location, Strict, given, known_channel, pointed
from bourse_schemas.errors import ConfigurationError, printable
from bourse_schemas.events import Severity, tidy

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
DAY_MS = 86_400_000
LONGEST_TEXT, LONGEST_NAME = 4_000, 100


def compile_rule(when: str) -> Rule:
    """Return a rule of one expression; raise Mistake. Rules of files are made by `load`."""
    compiler = Compiler("instrument", {}, (), needs := Needs())
    expression = compiler(parse(when), ["truth"])
    numbers = tuple(compiler.numbers)
    return Rule("try", expression, needs=needs, numbers=numbers, places=len(numbers))


# --- values of keys ---------------------------------------------------------------------------------------------------


def _text(value: Any, most: int = LONGEST_TEXT) -> str:
    if not isinstance(value, str | int) or not str(value).strip():
        raise Mistake("text")
    if len(str(value)) > most:
        raise Mistake("long_text", 0, 1, most=most)
    return str(value)


def _name(value: str) -> str:
    if "/" in value or len(value) > LONGEST_NAME:
        raise Mistake("name", fix=value.replace("/", "-")[:LONGEST_NAME])
    return value


def _many(value: Any) -> Any:
    if value == []:
        raise Mistake("names_nothing")
    return value if isinstance(value, list) else [value]


def _duration(value: Any) -> int:
    ms = span(text := _text(value))
    if ms is None:
        raise Mistake("duration", fix=near("duration", text.translate(PLAIN).strip(), span))
    if ms > DAY_MS:
        raise Mistake("long_duration")
    return int(ms)


def _day_hours(text: str) -> tuple[int, int] | None:
    found = HOURS.fullmatch(text)
    low, high = [(int(found[n]) * 60 + int(found[n + 1])) * 60_000 for n in (1, 3)] if found else (0, 0)
    return (low, high) if low < high <= DAY_MS else None


def _hours(value: Any) -> tuple[int, int]:
    text = _text(value).translate(PLAIN).strip()
    found = _day_hours(text)
    if found is None:
        raise Mistake("hours", fix=near("hours", text, _day_hours))
    return found


def _code(text: str) -> str:
    if not CODE.fullmatch(form(text)):
        raise Mistake("code")
    return form(text)


def _message(value: Any) -> Any:
    """Return a message per language."""
    by_language = isinstance(value, dict) and value.keys() & {*messages.LANGUAGES}
    return value if by_language else dict.fromkeys(messages.LANGUAGES, value)


def _states(value: Any) -> Any:
    return value if isinstance(value, dict) else {"firing": value, "resolved": value}


def _pieces(value: Any) -> Any:
    text = _text(value)
    try:
        return messages.split(text)
    except ValueError as error:
        at = int(error.args[0])
        raise Mistake("brace", at, at + 1, text[at] * 2) from None


def _instrument(name: str, info: ValidationInfo[Any], kind: int) -> str:
    known = info.context.known
    if known is not None and (mistake := _stranger(name, known[kind])):
        raise mistake
    return name


T = TypeVar("T")
Many = Annotated[tuple[T, ...], BeforeValidator(_many)]
Text = Annotated[str, BeforeValidator(_text)]
Duration = Annotated[int, BeforeValidator(_duration)]
Pieces = Annotated[Any, BeforeValidator(_pieces)]


class _Match(Strict):
    instruments: Many[Annotated[Text, AfterValidator(_code), AfterValidator(partial(_instrument, kind=0))]] = ()
    symbols: Many[Annotated[Text, AfterValidator(form), AfterValidator(partial(_instrument, kind=1))]] = ()
    patterns: Many[Annotated[str, BeforeValidator(partial(_text, most=LONGEST_NAME)), AfterValidator(form)]] = ()
    lists: Many[Annotated[Any, BeforeValidator(lambda name, info: info.context.names(name))]] = ()
    market: Many[Literal["bourse", "farabourse", "base", "rights", "funds"]] = ()
    rights: bool | None = None
    table: Annotated[Table, BeforeValidator(lambda name, info: info.context.table(name))] | None = None


class _States(Strict):
    firing: Pieces
    resolved: Pieces = None


class _Message(Strict):
    fa: Annotated[_States | None, BeforeValidator(_states)] = None
    en: Annotated[_States | None, BeforeValidator(_states)] = None


class _Common(Strict):
    hold: Duration = Field(default=0, alias="for")
    cooldown: Duration = 0
    once: bool = False
    active: Annotated[tuple[int, int], BeforeValidator(_hours)] | None = None
    match: _Match | None = None
    excluded: _Match | None = Field(default=None, alias="except")
    severity: Literal["info", "warning", "critical"] = "info"
    labels: dict[str, Text] | None = None
    notify: Many[Annotated[Text, AfterValidator(lambda name, info: known_channel(name, info.context.channels))]] = ()
    message: Annotated[_Message, BeforeValidator(_message)] | None = None


class _Rule(_Common):
    name: Annotated[Text, AfterValidator(_name)] | None = None
    title: Text | None = None
    when: Text | None = None
    until: Text | None = None
    scope: Scope = "instrument"
    let: dict[str, Any] = Field(default_factory=dict)


class _Head(Strict):
    version: Literal[1] | None = None
    defaults: _Common = Field(default_factory=_Common)
    let: dict[str, Any] = Field(default_factory=dict)
    rules: tuple[Any, ...] = ()


def _matched(*written: _Match | None) -> tuple[Match, Table]:
    """Return what the last of the given ones say per key."""
    found = _Match.model_construct(**{key: value for each in written for key, value in given(each).items()})
    table = found.table or Table()
    named = {*(name for names in found.lists for name in names), *table.rows}
    codes = {name for name in named if CODE.fullmatch(name)}
    markets = tuple(letters for market in found.market for letters in MARKETS[market])
    return Match(
        frozenset({*found.instruments, *codes}), frozenset({*found.symbols, *named - codes}), tuple(found.patterns),
        markets, found.rights,
    ), table  # fmt: skip


# --- a file -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads one file of rules. `depends` are the other files it was made of, `wrong` the mistakes in those."""

    def __init__(
        self, document: Document, language: str, channels: Sequence[str] | None, known: Mapping[str, str] | None
    ) -> None:
        self.document, self.language, self.channels = document, language, channels
        self.known = None if known is None else _spellings(known)
        self.depends: list[Path] = []
        self.wrong: list[str] = []

    def names(self, name: Any) -> list[str]:
        """Return the codes and symbols of a list, a line each."""
        names = [text for line in self._lines(name)[1] if (text := line.partition("#")[0].strip())]
        if not names:
            raise Mistake("names_nothing")
        return [*map(form, names)]

    def table(self, name: Any) -> Table:
        """Return a table."""
        table, wrong = read_table(*self._lines(name), self.language)
        self.wrong += wrong
        return table

    def _lines(self, name: Any) -> tuple[Path, list[str]]:
        path = self.document.path.parent / _text(name)
        self.depends.append(path)
        try:
            if path.stat().st_size > LARGEST:
                raise OSError(0, f"larger than {LARGEST >> 20} MiB")
            data = path.read_bytes()
            text = data.decode("utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8 text"
            raise Mistake("unreadable", fix=str(name), name=str(name), why=why) from None
        return path, text.splitlines()

    def rules(self) -> list[Rule]:
        """Return the rules of the file; what is wrong is in the document."""
        document, data = self.document, self.document.data
        head = document.check(_Head, data, context=self) or _Head()
        for key in ("version", "rules"):
            if data.get(key) is None and not get_close_matches(key, data.keys() - {key}):
                document.mistake((), Mistake("missing", name=key))
        if data.get("rules") == []:
            document.mistake(("rules",), Mistake("no_rules"))
        lets, rules, names = self._lets(head.let, ("let",)), list[Rule](), set[str]()
        for n, item in enumerate(head.rules):
            rule = self._rule(("rules", n), item, head.defaults, lets)
            if rule is not None:
                if rule.name in names:
                    document.mistake(("rules", n, "name"), Mistake("name_twice", fix=f"{rule.name}-2", name=rule.name))
                names.add(rule.name)
                rules.append(rule)
        return rules

    def _lets(self, written: Mapping[str, Any], location: Location) -> dict[str, ast.expr]:
        """Return named expressions; they may name each other."""
        found: dict[str, ast.expr] = {}
        for key, value in written.items():
            name = identifier(key)
            if name is None:
                self.document.mistake([*location, key], Mistake("let_name", fix="limit", name=key))
            elif (tree := self._read([*location, key], value, parse)) is not None:
                found[name] = tree
        return found

    def _read(self, at: Location, value: Any, read: Callable[[str], T], prefix: str = "", scope: str = "") -> T | None:
        """Return what `read` makes of an expression; a mistake becomes one of the file, with the whole corrected."""
        try:
            return read(text := _text(value))
        except Mistake as mistake:
            if mistake.text not in {"text", "long_text"}:
                mistake.whole = corrected(text, read) or mistake.whole
            self.document.mistake(at, mistake, prefix, scope)
            return None

    def _rule(self, at: Location, item: Any, defaults: _Common, lets: Mapping[str, ast.expr]) -> Rule | None:
        document = self.document
        raw = item if isinstance(item, dict) else {}
        named = raw.get("name") or "rule"
        what = f"rule {named}" if named != "rule" else "rule"
        own = document.check(_Rule, item, at, what, self)
        if own is None:
            return None
        scope, values = own.scope, {**given(defaults), **given(own)}
        # What is misspelt is not missing too.
        for key in ("name", "when"):
            if raw.get(key) is None and not get_close_matches(key, raw.keys() - {key}):
                document.mistake(at, Mistake("missing", name=key), f"{what}: ", scope)
        match, table = _matched(defaults.match, own.match) if scope != "feed" else (Match(), Table())
        excluded = _matched(values["excluded"])[0] if values.get("excluded") and scope != "feed" else None
        if scope == "feed" and own.match:
            document.mistake([*at, "match"], Mistake("feed_match", fix="# match"))
        members = f"{match!r} {excluded!r}" if scope == "market" else ""
        own_lets, needs = self._lets(own.let, [*at, "let"]), Needs()
        names = {**lets, **own_lets}
        # If a table cannot be read, any name may be one of its columns.
        written = [each.get("match") for each in (raw, document.data.get("defaults")) if isinstance(each, dict)]
        unread = any(isinstance(match, dict) and get_close_matches("table", match) for match in written)
        columns = table.columns or (None if unread else ())
        alone = Compiler(scope, names, columns, Needs())
        for name, value in own.let.items() if scope != "market" else ():
            if identifier(name) in own_lets:
                self._read([*at, "let", name], value, lambda text: alone(parse(text), KINDS), f"let {name}: ")
        compiler = Compiler(scope, names, columns, needs, members)

        def compiled(key: str, value: str | None) -> Expression | None:
            read = partial(self._read, [*at, key], value, lambda text: compiler(parse(text), ["truth"]))
            return None if value is None else read(f"{named}: {key}: ", scope)

        when, until = compiled("when", own.when), compiled("until", own.until)
        places = len(compiler.numbers)
        place = [*at, "message"] if own.message else ["defaults", "message"]
        texts = self._texts(place, values.get("message"), compiler, f"{named}: message: ", scope)
        if own.name is None or when is None:
            return None
        if values.get("hold") and when.node.momentary:
            document.mistake([*at, "for" if own.hold else "when"], Mistake("moment", fix="0s" if own.hold else None),
                             f"{named}: for: ")  # fmt: skip
        if until is not None and (both := overlap(when.tree, until.tree)) is not None:
            fix = f"not ({str(raw['when']).strip()})"
            document.mistake([*at, "until"], Mistake("overlap", fix=fix, name=both), f"{named}: until: ")
        return Rule(
            own.name, when, until, scope, own.title, values.get("hold", 0), values.get("cooldown", 0),
            values.get("once", False), values.get("active"), match, excluded, table,
            Severity[values.get("severity", "info").upper()], {**(defaults.labels or {}), **(own.labels or {})},
            tuple(values.get("notify", ())), texts, tuple(compiler.numbers), places, needs, members,
        )  # fmt: skip

    def _texts(
        self, at: Location, message: _Message | None, compiler: Compiler, prefix: str, scope: str
    ) -> messages.Texts:
        """Return the texts of a message: per language and state the parts."""
        found: dict[str, dict[str, list[messages.Part]]] = {}
        for language, states in given(message).items():
            for state, pieces in given(states).items():
                parts = found.setdefault(language, {})[state] = []
                for piece in pieces or ():
                    try:
                        parts.append(_part(piece, compiler))
                    except Mistake as mistake:
                        self.document.mistake([*at, language, state], mistake, prefix, scope)
        return {language: {"resolved": states.get("firing", []), **states} for language, states in found.items()}


def _part(piece: tuple[int, str, str | None, str], compiler: Compiler) -> messages.Part:
    at, literal, inside, spec = piece
    if inside is None:
        return messages.Part(literal)
    word, end = inside.strip(), at + len(inside)
    if word in messages.FIELDS and not spec:
        return messages.Part("", word=word)
    if not messages.SPEC.fullmatch(spec):
        raise Mistake("spec", end + 1, end + 1 + len(spec), ",")

    def read(text: str) -> Expression:
        return compiler(parse(text), ["number", "time", "state"])

    try:
        return messages.Part("", read(inside), spec)
    except Mistake as mistake:
        if mistake.text == "unknown_name" and (field := get_close_matches(word, messages.FIELDS, 1)):
            mistake.fix = field[0]
        elif whole := corrected(inside, read):
            mistake.at, mistake.end, mistake.fix = 0, None, whole
        mistake.at, mistake.end = at + mistake.at, end if mistake.end is None else at + mistake.end
        raise


def identifier(text: str) -> str | None:
    """Return a name of the user's as expressions have it, None if it cannot be one."""
    name = re.sub(r"[\s\u200c-]+", "_", tidy(unicodedata.normalize("NFKC", text).replace("\u0640", "")))
    return name if name.isidentifier() and not keyword.iskeyword(name) and name not in RESERVED else None


# --- tables -----------------------------------------------------------------------------------------------------------


def read_table(path: Path, lines: Sequence[str], language: str = "en") -> tuple[Table, list[str]]:
    """Return a table of numbers per instrument, as Excel writes CSV, and what is wrong with it."""
    wrong: list[str] = []

    def mistake(number: int, cell: str, text: str, fix: str, **values: Any) -> None:
        line = lines[number] if lines else ""
        column = max(line.find(cell), 0)
        corrected = line[:column] + fix + line[column + len(cell) :]
        why = printable(explain(Mistake(text, **values), language))
        shown = pointed(line, column, column + len(cell), corrected, language)
        wrong.append(f"{path}:{number + 1}:{column + 1}: {why}{shown}")

    delimiter = max(";\t,", key=next((line for line in lines if line.strip()), "").count)
    columns: list[str] | None = None
    rows: dict[str, tuple[float, ...]] = {}
    for number, line in enumerate(lines):
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
        except csv.Error:
            cells = line.split(delimiter)
        if not any(cells) or cells[0].startswith("#"):
            continue
        if columns is None:
            columns = []
            for n, cell in enumerate(re.sub(f"{delimiter}+$", "", delimiter.join(cells)).split(delimiter)[1:], 1):
                name = identifier(cell)
                if name is None or name in columns:
                    mistake(number, cell, "column", f"level{n}", name=cell)
                columns.append(name or f"level{n}")
            if not columns:
                mistake(number, line, "no_columns", f"symbol{delimiter}stop")
            continue
        name, width = form(cells[0]), len(columns) + 1
        if any(cells[width:]) or not name:
            mistake(number, line, "cells", delimiter.join(cells[:width]), given=len(cells), count=width)
        elif name in rows:
            mistake(number, cells[0], "row_twice", f"# {cells[0]}", name=cells[0])
        else:
            rows[name] = tuple(map(_number, [*cells[1:], *[""] * width][: width - 1]))
            for cell, value in zip(cells[1:], rows[name], strict=False):
                if value == NOT_A_NUMBER:
                    # A part of what is not a number is another number: of 5k, 1e5, 12,5.
                    fix = re.sub(r"^(-?\d+) ?(?:x|%|ریال)?$|.*", r"\1", cell.translate(PLAIN))
                    mistake(number, cell, "cell", fix, name=cell)
    if columns is None:
        mistake(0, "", "no_columns", "symbol,stop")
    elif not rows and not wrong:
        mistake(0, lines[0], "names_nothing", lines[0])
    return Table(tuple(columns or ()), rows), wrong


NOT_A_NUMBER = float("inf")


def _number(cell: str) -> float:
    """Return a cell as a number, NaN if it is empty, infinite if it is neither."""
    text = cell.translate(PLAIN).replace(" ", "").replace("_", "")
    if text in {"", "-"}:
        return float("nan")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return float(text) if re.fullmatch(r"-?\d{1,18}(\.\d{1,9})?", text) else NOT_A_NUMBER


# --- all files --------------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """A file as it was read last: what it looked like, its rules, why they are those of before."""

    look: Any
    depends: list[Path]
    rules: list[Rule]
    error: str | None = None


class RuleFiles:
    """The rules of files and of folders of files, read again when one of them changes.

    A file that has changed and is wrong keeps its rules of before; `trouble` says why.
    """

    def __init__(
        self, paths: Sequence[Path], channels: Sequence[str] | None = None, language: str = "en",
        known: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Read the rules; raise ConfigurationError with every mistake in any of the files.

        With `known`, symbols by code, other names are mistakes too, but for those of lists and tables.
        """
        self._paths, self._channels, self._language, self._known = paths, channels, language, known
        self._read: dict[Path, _File] = {}
        self.rules: list[Rule] = []
        self.refresh()
        if wrong := self._errors():
            raise ConfigurationError("\n".join(wrong))
        if not self._read:
            raise ConfigurationError(f"{paths[0]}: the folder has no *.yaml files")

    @property
    def trouble(self) -> str | None:
        """Return which files are wrong and keep their rules of before."""
        wrong = self._errors()
        return f"the rules of before are in force: {'; '.join(wrong)}" if wrong else None

    def _errors(self) -> list[str]:
        return self._same + [each.error for each in self._read.values() if each.error]

    def refresh(self, *, force: bool = False) -> bool:
        """Read what has changed; return whether the rules in force have."""
        files = self._files()
        changed = bool(self._read.keys() - files)
        self._read = {path: each for path, each in self._read.items() if path in files}
        for path in files:
            before = self._read.get(path)
            if before and not force and before.look == _look([path, *before.depends]):
                continue
            rules, depends, error = load(path, self._channels, self._language, self._known)
            kept = rules if rules is not None else before.rules if before else []
            self._read[path] = _File(_look([path, *depends]), depends, kept, error)
            changed = changed or rules is not None
        if changed:
            several = len(self._read) > 1
            self.rules = [
                replace(rule, name=f"{path.stem}/{rule.name}") if several else rule
                for path, each in self._read.items() for rule in each.rules
            ]  # fmt: skip
        return changed

    def _files(self) -> list[Path]:
        files: dict[str, Path] = {}
        each = (sorted([*p.glob("*.yaml"), *p.glob("*.yml")]) if p.is_dir() else [p] for p in self._paths)
        self._same: list[str] = []
        # Of two files the one that is in force stays in force.
        for file in sorted(chain(*each), key=lambda file: file not in self._read):
            first = file if file.name.startswith(".") else files.setdefault(file.stem, file)
            if first.absolute() != file.absolute():
                self._same.append(f"{first} and {file} have the same name, and so do their rules: rename one")
        return list(files.values())


def _look(paths: Iterable[Path]) -> Any:
    """Return what changes when one of the files does."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError:
            found.append(None)
    return found


def load(
    path: Path, channels: Sequence[str] | None = None, language: str = "en", known: Mapping[str, str] | None = None
) -> tuple[list[Rule] | None, list[Path], str | None]:
    """Return the rules of a file, the other files they were made of, and every mistake; no rules if there is one."""
    try:
        reader = _Reader(Document(path, "the rules", language=language), language, channels, known)
    except ConfigurationError as error:
        return None, [], str(error)
    rules = reader.rules()
    wrong = [str(reader.document.error())] if reader.document.wrong else []
    if wrong or reader.wrong:
        return None, reader.depends, "\n".join([*wrong, *dict.fromkeys(reader.wrong)])
    return rules, reader.depends, None


def strangers(rules: Iterable[Rule], known: Mapping[str, str], language: str = "en") -> Iterator[str]:
    """Yield what rules name and no instrument is called, with the nearest; `known` are symbols by code."""
    codes, symbols = _spellings(known)
    for rule in rules:
        for match in filter(None, (rule.match, rule.excluded)):
            for name in sorted(match.symbols | match.instruments):
                if mistake := _stranger(name, symbols if name in match.symbols else codes):
                    yield printable(f"rule {rule.name}: {explain(mistake, language)}")


def _spellings(known: Mapping[str, str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the codes and the symbols as they are written, by their matching form; `known` are symbols by code."""
    return {code: code for code in known}, {form(symbol): symbol for symbol in known.values()}


def _stranger(name: str, known: Mapping[str, str]) -> Mistake | None:
    """Return that no instrument is called this, with the nearest name; None if one is."""
    if name in known:
        return None
    nearest = next(iter(get_close_matches(name, known, 1, 0.5)), None)
    return Mistake(
        "nothing_matches", fix=nearest and known[nearest], whole="" if nearest is None else None, name=name, known=""
    )
