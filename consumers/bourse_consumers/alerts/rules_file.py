"""Rules as people write them: YAML files, tables and lists, read with the place of every mistake."""

from __future__ import annotations

import ast
import csv
import keyword
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bourse_consumers.alerts import messages
from bourse_consumers.alerts.expressions import (
    ALIASES,
    COLUMNS,
    FUNCTIONS,
    PLAIN,
    STATES,
    Compiler,
    Expand,
    Expression,
    Mistake,
    Needs,
    Scope,
    overlap,
    parse,
    span,
)
from bourse_consumers.alerts.rule import CODE, MARKETS, Match, Rule, Table, form
from bourse_consumers.alerts.words import WORDS, WRITE, explain
from bourse_consumers.yaml_file import LARGEST, Document, entries, pointed
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Severity, tidy

__all__ = ["RuleFiles", "compile_rule", "load", "strangers"]

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
DAY_MS = 86_400_000
LONGEST_TEXT, LONGEST_NAME = 4_000, 100
SEVERITIES = ("info", "warning", "critical")
RESERVED = {*COLUMNS, *ALIASES, *FUNCTIONS, *STATES, "quiet", "silent", "feed_state"}
# What a corrected line has if nothing better is known.
EXAMPLES = WORDS["examples"]


def compile_rule(when: str, scope: Any = "instrument", **given: Any) -> Rule:
    """Return a rule of one expression; raise Mistake. Rules of files are made by `load`."""
    needs = Needs()
    compiler = Compiler(scope, {}, (), needs, "one" if scope == "market" else "")
    expression = compiler(parse(when), ["truth"])
    return Rule(
        "try", expression, scope=scope, needs=needs, numbers=tuple(compiler.numbers), places=len(compiler.numbers),
        members="one" if scope == "market" else "", **given,
    )  # fmt: skip


@dataclass
class _Reader:
    """Reads one file of rules. `depends` are the other files it was made of."""

    document: Document
    language: str
    channels: Sequence[str] | None
    depends: list[Path] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def mistake(
        self, node: Any, text: str, at: int = 0, end: int | None = None, fix: str | None = None, *, key: str = "",
        prefix: str = "", example: str | None = None, **values: Any,
    ) -> None:  # fmt: skip
        """Add a mistake in a node; without a better one the corrected line has the key's example."""
        whole = None if fix is not None else example or EXAMPLES.get(key)
        if whole is not None and getattr(node, "style", None):
            whole = whole.strip('"')
        self.document.mistake(node, prefix + explain(text, self.language, fix, **values), at, end, fix=fix, whole=whole)

    # --- mappings -----------------------------------------------------------------------------------------------------

    def keys(self, node: Any, known: Mapping[str, Callable[[Any], Any]], what: str, key: str = "") -> dict[str, Any]:
        """Return the values of a mapping by its keys, each as its reader returns it."""
        if not isinstance(node, yaml.MappingNode):
            self.mistake(node, "mapping", key=key, what=what)
            return {}
        found: dict[str, Any] = {}
        own = {id(key_node) for key_node, _ in node.value}
        before: Any = None
        last: Any = None
        for key_node, value in entries(node):
            name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            before, last = last, (name, value)
            if name in known:
                if name in found and id(key_node) in own:
                    self.mistake(key_node, "twice", fix=f"# {name}", name=name)
                found[name] = known[name](value)
            elif node.flow_style and ")" in name and before is not None:
                self.document.unquoted(before[1], key_node, explain("comma", self.language))
                found[before[0]] = None
            else:
                near = next(iter(get_close_matches(name, known, 1)), None)
                self.mistake(
                    key_node, "unknown_key", fix=near, example="# " + name, what=what, name=name, known=", ".join(known)
                )
        return found

    def text(self, node: Any, key: str = "", most: int = LONGEST_TEXT) -> str | None:
        """Return a scalar as it was written."""
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            self.mistake(node, "text", key=key)
            return None
        if len(node.value) > most:
            self.mistake(node, "long_text", 0, 1, key=key, most=most)
            return None
        return str(node.value)

    def texts(self, node: Any, key: str) -> list[tuple[Any, str]]:
        """Return a scalar or the scalars of a list, with their nodes."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not nodes:
            self.mistake(node, "names_nothing", example=f"[{EXAMPLES.get(key, '…')}]")
        return [(each, text) for each in nodes if (text := self.text(each, key)) is not None]

    def one_of(self, key: str, *known: str) -> Callable[[Any], str | None]:
        def read(node: Any) -> str | None:
            text = (self.text(node, key) or known[0]).strip()
            if text in known:
                return text
            near = next(iter(get_close_matches(text.lower(), known, 1, 0.5)), known[0])
            self.mistake(node, "one_of", fix=near, known=", ".join(known))
            return None

        return read

    def span(self, node: Any, key: str) -> int:
        text = self.text(node, key) or "1s"
        ms = span(text)
        if ms is None:
            clock = re.fullmatch(r"(\d{1,2}):([0-5]\d)", text)
            number = re.fullmatch(r"0*(\d{1,5})\s*(m|min|minutes?|دقیقه)?", text.translate(PLAIN))
            near = f"{clock[1]}m{clock[2]}s" if clock else f"{number[1]}m" if number else None
            self.mistake(node, "duration", fix=near, key=key)
        elif ms > DAY_MS:
            self.mistake(node, "long_duration", key=key)
        return ms or 0

    def hours(self, node: Any) -> tuple[int, int]:
        text = (self.text(node, "active") or "00:00-24:00").translate(PLAIN).strip()
        found = HOURS.fullmatch(text)
        low, high = (0, 0) if not found else (_ms(found[1], found[2]), _ms(found[3], found[4]))
        if low >= high or high > DAY_MS:
            near = re.fullmatch(r"(\d{1,2}):(\d\d)\s*(?:-|to|تا)\s*(\d{1,2}):(\d\d)", text)
            fix = f"{near[1]:0>2}:{near[2]}-{near[3]:0>2}:{near[4]}" if near else None
            good = fix is not None and fix != text and HOURS.fullmatch(fix)
            self.mistake(node, "hours", fix=fix if good else None, key="active")
        return low, high

    def labels(self, node: Any) -> dict[str, str]:
        if not isinstance(node, yaml.MappingNode):
            self.mistake(node, "mapping", key="labels", what="labels")
            return {}
        pairs = [(self.text(key), self.text(value)) for key, value in entries(node)]
        return {key: value for key, value in pairs if key is not None and value is not None}

    def notify(self, node: Any) -> list[str]:
        found = self.texts(node, "notify")
        for each, name in found if self.channels is not None else ():
            known = self.channels or ()
            if name not in known:
                near = next(iter(get_close_matches(name, known, 1)), None)
                self.mistake(
                    each, "channel", fix=near, example=next(iter(known), "…"), name=name, known=", ".join(known)
                )
        return [name for _, name in found]

    # --- instruments --------------------------------------------------------------------------------------------------

    def match(self, node: Any) -> dict[str, Any]:
        """Return what a `match` or `except` gives, ready for Match."""
        return self.keys(
            node,
            {
                "instruments": self._codes,
                "symbols": lambda n: frozenset(form(text) for _, text in self.texts(n, "symbols")),
                "patterns": self._patterns,
                "lists": lambda n: [each for path, text in self.texts(n, "lists") for each in self._list(path, text)],
                "market": lambda n: tuple(p for _, text in self._markets(n) for p in MARKETS[text]),
                "rights": lambda n: self.one_of("rights", "true", "false")(n) == "true",
                "table": self._table,
            },
            "match",
            "match",
        )

    def _codes(self, node: Any) -> frozenset[str]:
        codes = set()
        for each, text in self.texts(node, "instruments"):
            if CODE.fullmatch(form(text)):
                codes.add(form(text))
            else:
                self.mistake(each, "code", key="instruments")
        return frozenset(codes)

    def _patterns(self, node: Any) -> tuple[str, ...]:
        patterns = self.texts(node, "patterns")
        for each, text in patterns:
            if len(text) > LONGEST_NAME:
                self.mistake(each, "pattern", 0, 1, key="patterns")
        return tuple(form(text) for _, text in patterns if len(text) <= LONGEST_NAME)

    def _markets(self, node: Any) -> list[tuple[Any, str]]:
        found = []
        for each, text in self.texts(node, "market"):
            if self.one_of("market", *MARKETS)(each) is not None:
                found.append((each, text.strip()))
        return found

    def _lines(self, node: Any, name: str) -> tuple[Path, list[str]] | None:
        path = self.document.path.parent / name
        try:
            self.depends.append(path)
            if path.stat().st_size > LARGEST:
                raise OSError(0, f"larger than {LARGEST >> 20} MiB")
            data = path.read_bytes()
            text = data.decode("utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8 text"
            self.mistake(node, "unreadable", example=name, name=name, why=why)
            return None
        return path, text.splitlines()

    def _list(self, node: Any, name: str) -> Iterator[str]:
        found = self._lines(node, name)
        names = [text for line in (found[1] if found else ()) if (text := line.partition("#")[0].strip())]
        if found and not names:
            self.mistake(node, "names_nothing", key="lists")
        yield from map(form, names)

    def _table(self, node: Any) -> Table:
        found = self._lines(node, self.text(node, "table") or "")
        if found is None:
            return Table()
        path, lines = found
        table, wrong = read_table(path, lines, self.language)
        self.wrong += wrong
        return table

    @staticmethod
    def matched(found: Mapping[str, Any]) -> tuple[Match, Table]:
        table = found.get("table", Table())
        named = [*found.get("lists", ()), *table.rows]
        codes = {name for name in named if CODE.fullmatch(name)}
        match = Match(
            found.get("instruments", frozenset()) | codes,
            found.get("symbols", frozenset()) | (set(named) - codes),
            found.get("patterns", ()),
            found.get("market", ()),
            found.get("rights"),
        )
        return match, table

    # --- expressions --------------------------------------------------------------------------------------------------

    def lets(self, node: Any) -> dict[str, tuple[Any, ast.expr]]:
        """Return the named expressions of a mapping, each with its node; they may name each other."""
        found: dict[str, tuple[Any, ast.expr]] = {}
        if not isinstance(node, yaml.MappingNode):
            self.mistake(node, "mapping", key="let", what="let")
            return found
        for key, value in entries(node):
            name = identifier(str(key.value))
            if name is None:
                self.mistake(key, "let_name", fix="limit", name=str(key.value))
            elif (text := self.text(value, "when")) is not None:
                tree = self.guard(value, partial(parse, text))
                if tree is not None:
                    found[name] = value, tree
        return found

    def guard(self, node: Any, work: Callable[[], Any], key: str = "when", prefix: str = "", begin: int = 0) -> Any:
        """Return what `work` does; a mistake in an expression becomes one of the file."""
        try:
            return work()
        except Mistake as mistake:
            end = None if mistake.end is None else begin + mistake.end
            whole = mistake.whole if begin == 0 else None
            self.mistake(
                node, mistake.text, begin + mistake.at, end, mistake.fix, key=key, prefix=prefix, example=whole,
                **mistake.values,
            )  # fmt: skip
        return None

    def resolve(self, written: Mapping[str, tuple[Any, ast.expr]]) -> dict[str, ast.expr] | None:
        """Return the named expressions with those in them filled in; None if one depends on itself."""
        done: dict[str, ast.expr] = {}
        begun: set[str] = set()

        def fill(name: str) -> None:
            tree = written[name][1]
            begun.add(name)
            for each in ast.walk(tree):
                if isinstance(each, ast.Name) and each.id in written and each.id not in done:
                    if each.id in begun:
                        raise Mistake("let_circle", each.col_offset, each.end_col_offset, "1", name=each.id)
                    fill(each.id)
            done[name] = Expand(done).visit(tree)

        for name, (node, _) in written.items():
            if name not in done:
                self.guard(node, partial(fill, name))
                if name not in done:
                    return None
        return done

    # --- rules --------------------------------------------------------------------------------------------------------

    def common(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "for": lambda n: self.span(n, "for"),
            "cooldown": lambda n: self.span(n, "cooldown"),
            "once": lambda n: self.one_of("once", "true", "false")(n) == "true",
            "active": self.hours,
            "match": self.match,
            "except": self.match,
            "severity": self.one_of("severity", *SEVERITIES),
            "labels": self.labels,
            "notify": self.notify,
            "message": lambda n: n,
        }

    def rules(self) -> list[Rule]:
        """Return the rules of the file; what is wrong is in the document."""
        head = self.keys(
            self.document.root,
            {
                "version": self.one_of("version", "1"),
                "defaults": lambda n: self.keys(n, self.common(), "defaults", "defaults"),
                "let": self.lets,
                "rules": lambda n: n,
            },
            "the file",
        )
        for key in ("version", "rules"):
            if key not in head and isinstance(self.document.root, yaml.MappingNode):
                self.mistake(
                    self.document.root, "missing", what="the file", name=key, example=f"{key}: {EXAMPLES[key]}"
                )
        node = head.get("rules")
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        if node is not None and not items:
            self.mistake(node, "no_rules", key="rules", example=EXAMPLES["rules"])
        rules, names = list[Rule](), set[str]()
        for item in items:
            rule = self.rule(item, head.get("defaults", {}), head.get("let", {}))
            if rule is not None:
                if rule.name in names:
                    self.mistake(_value(item, "name"), "name_twice", fix=f"{rule.name}-2", name=rule.name)
                names.add(rule.name)
                rules.append(rule)
        return rules

    def rule(self, node: Any, defaults: Mapping[str, Any], lets: Mapping[str, tuple[Any, ast.expr]]) -> Rule | None:
        known = {
            "name": lambda n: self.text(n, "name"),
            "title": lambda n: self.text(n, "title"),
            "when": lambda n: self.text(n, "when") and n,
            "until": lambda n: self.text(n, "until") and n,
            "scope": self.one_of("scope", "instrument", "market", "feed"),
            "let": self.lets,
            **self.common(),
        }
        named = str(getattr(_value(node, "name"), "value", ""))
        own = self.keys(node, known, f"rule {named}".strip(), "rules")
        if not isinstance(node, yaml.MappingNode):
            return None
        for key in ("name", "when"):
            if key not in own:
                self.mistake(node, "missing", what=f"rule {named}".strip(), name=key, example=f"{key}: {EXAMPLES[key]}")
        if own.get("name") is None or own.get("when") is None:
            return None
        if "/" in own["name"] or len(own["name"]) > LONGEST_NAME:
            self.mistake(_value(node, "name"), "name", fix=own["name"].replace("/", "-")[:LONGEST_NAME])
        given = {**defaults, **own}
        scope: Scope = own.get("scope") or "instrument"
        if scope == "feed" and "match" in own:
            self.mistake(_key(node, "match"), "feed_match", fix="# match")
        match, table = self.matched({**defaults.get("match", {}), **own.get("match", {})} if scope != "feed" else {})
        excluded = self.matched(given["except"])[0] if "except" in given and scope != "feed" else None
        members = f"{match!r} {excluded!r}" if scope == "market" else ""
        needs = Needs()
        trees = self.resolve({**lets, **own.get("let", {})})
        if trees is None:
            return None
        for name, (each, tree) in own.get("let", {}).items() if scope != "market" else ():
            alone = Compiler(scope, trees, table.columns, Needs())
            self.guard(each, partial(alone, tree), prefix=f"let {name}: ")
        compiler = Compiler(scope, trees, table.columns, needs, members)

        def compiled(key: str) -> Expression | None:
            each = own.get(key)
            if each is None:
                return None
            found: Expression | None = self.guard(
                each, lambda: compiler(parse(each.value), ["truth"]), key, f"{named}: {key}: "
            )
            return found

        when, until = compiled("when"), compiled("until")
        places = len(compiler.numbers)
        texts = self._texts(given.get("message"), compiler, f"{named}: message: ")
        if when is None:
            return None
        if given.get("for") and when.node.momentary:
            where, fix = (_value(node, "for"), "0s") if "for" in own else (own["when"], None)
            self.mistake(where, "moment", fix=fix, prefix=f"{named}: for: ")
        if until is not None and (name := overlap(when.tree, until.tree)) is not None:
            self.mistake(
                own["until"], "overlap", fix=f"not ({own['when'].value.strip()})", prefix=f"{named}: until: ", name=name
            )
        return Rule(
            own["name"], when, until, scope, own.get("title"), given.get("for", 0), given.get("cooldown", 0),
            given.get("once", False), given.get("active"), match, excluded, table,
            Severity[(given.get("severity") or "info").upper()],
            {**defaults.get("labels", {}), **own.get("labels", {})},
            tuple(given.get("notify", ())), texts, tuple(compiler.numbers), places, needs, members,
        )  # fmt: skip

    def _texts(self, node: Any, compiler: Compiler, prefix: str) -> messages.Texts:
        """Return the texts of a message: per language and state the parts."""
        if node is None:
            return {}
        names = {str(key.value) for key, _ in entries(node)} if isinstance(node, yaml.MappingNode) else set()
        if names & {*messages.LANGUAGES}:
            return self.keys(
                node, {each: lambda n: self._states(n, compiler, prefix) for each in messages.LANGUAGES}, "message"
            )
        return dict.fromkeys(messages.LANGUAGES, self._states(node, compiler, prefix))

    def _states(self, node: Any, compiler: Compiler, prefix: str) -> Mapping[str, Sequence[messages.Part]]:
        if isinstance(node, yaml.ScalarNode):
            parts = self._parts(node, compiler, prefix)
            return {"firing": parts, "resolved": parts}
        known = {state: lambda n: self._parts(n, compiler, prefix) for state in ("firing", "resolved")}
        found = self.keys(node, known, "message", "message")
        if found and "firing" not in found:
            self.mistake(node, "missing", what="message", name="firing", example=f"firing: {EXAMPLES['firing']}")
        return {"firing": found.get("firing", ()), "resolved": found.get("resolved", found.get("firing", ()))}

    def _parts(self, node: Any, compiler: Compiler, prefix: str) -> Sequence[messages.Part]:
        text, parts = self.text(node, "message"), list[messages.Part]()
        try:
            pieces = messages.split(text or "")
        except ValueError as error:
            at = int(error.args[0])
            self.mistake(node, "brace", at, at + 1, (text or "")[at] * 2, prefix=prefix)
            return parts
        for at, literal, inside, spec in pieces:
            if inside is None:
                parts += [messages.Part(literal)] if literal else []
                continue
            word = inside.strip()
            if word in messages.FIELDS and not spec:
                parts.append(messages.Part("", word=word))
                continue
            if not messages.SPEC.fullmatch(spec):
                self.mistake(node, "spec", at + len(inside) + 1, at + len(inside) + 1 + len(spec), ",", prefix=prefix)
                continue

            def work(inside: str = inside, word: str = word) -> Expression:
                try:
                    return compiler(parse(inside), ["number", "time", "state"])
                except Mistake as mistake:
                    near = get_close_matches(word, messages.FIELDS, 1)
                    if mistake.text == "unknown_name" and near and not mistake.fix:
                        mistake.fix = near[0]
                    raise

            found = self.guard(node, work, "message", prefix, at)
            if found is not None:
                parts.append(messages.Part("", found, spec))
        return parts


def _ms(hours: str, minutes: str) -> int:
    return (int(hours) * 60 + int(minutes)) * 60_000


def _value(node: Any, name: str) -> Any:
    return next((value for key, value in reversed(entries(node)) if key.value == name), node)


def _key(node: Any, name: str) -> Any:
    return next((key for key, _ in reversed(entries(node)) if key.value == name), node)


def identifier(text: str) -> str | None:
    """Return a name of the user's as expressions have it, None if it cannot be one."""
    name = re.sub(r"[\s\u200c-]+", "_", tidy(unicodedata.normalize("NFKC", text).replace("\u0640", "")))
    return name if name.isidentifier() and not keyword.iskeyword(name) and name not in RESERVED else None


def read_table(path: Path, lines: Sequence[str], language: str = "en") -> tuple[Table, list[str]]:
    """Return a table of numbers per instrument, as Excel writes CSV, and what is wrong with it."""
    wrong: list[str] = []

    def mistake(number: int, cell: str, text: str, fix: str, **values: Any) -> None:
        column = max(lines[number].find(cell), 0) if lines else 0
        line = lines[number] if lines else ""
        corrected = line[:column] + fix + line[column + len(cell) :]
        shown = pointed(line, column, column + len(cell), corrected, WRITE[language])
        wrong.append(f"{path}:{number + 1}:{column + 1}: {explain(text, language, **values)}{shown}")

    head = next((line for line in lines if line.strip()), "")
    delimiter = max(";\t,", key=head.count)
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
            while cells and not cells[-1]:
                cells.pop()
            columns = []
            for cell in cells[1:]:
                name = identifier(cell)
                if name is None or name in columns:
                    mistake(number, cell, "column", f"level{len(columns) + 1}", name=cell)
                columns.append(name or f"level{len(columns) + 1}")
            if not columns:
                mistake(number, line, "no_columns", f"symbol{delimiter}stop")
            continue
        name = form(cells[0])
        if any(cells[len(columns) + 1 :]) or not name:
            mistake(
                number,
                line,
                "cells",
                delimiter.join(cells[: len(columns) + 1]),
                given=len(cells),
                count=len(columns) + 1,
            )
            continue
        if name in rows:
            mistake(number, cells[0], "row_twice", f"# {cells[0]}", name=cells[0])
            continue
        numbers = []
        for cell in [*cells[1:], *[""] * len(columns)][: len(columns)]:
            value = _number(cell)
            if value is None:
                mistake(
                    number,
                    cell,
                    "cell",
                    re.sub(r"[^0-9.-]", "", cell.translate(PLAIN)) or "0",
                    name=cell,
                )
            numbers.append(float("nan") if value is None else value)
        rows[name] = tuple(numbers)
    if columns is None:
        mistake(0, "", "no_columns", "symbol,stop")
    elif not rows and not wrong:
        mistake(0, lines[0], "names_nothing", lines[0])
    return Table(tuple(columns or ()), rows), wrong


def _number(cell: str) -> float | None:
    """Return a cell as a number, NaN if it is empty, None if it is neither."""
    text = cell.replace("٬", "").replace("٫", ".").translate(PLAIN).replace(" ", "").replace("_", "")
    if not text or text == "-":
        return float("nan")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return float(text) if re.fullmatch(r"-?\d{1,18}(\.\d{1,9})?", text) else None


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

    def __init__(self, paths: Sequence[Path], channels: Sequence[str] | None = None, language: str = "en") -> None:
        """Read the rules; raise ConfigurationError with every mistake in any of the files."""
        self._paths, self._channels, self._language = paths, channels, language
        self._read: dict[Path, _File] = {}
        self.rules: list[Rule] = []
        self.refresh()
        if wrong := [each.error for each in self._read.values() if each.error]:
            raise ConfigurationError("\n".join(wrong))
        if not self._read:
            raise ConfigurationError(f"{paths[0]}: the folder has no *.yaml files")

    @property
    def trouble(self) -> str | None:
        """Return which files are wrong and keep their rules of before."""
        wrong = [each.error for each in self._read.values() if each.error]
        return f"the rules of before are in force: {'; '.join(wrong)}" if wrong else None

    def refresh(self, *, force: bool = False) -> bool:
        """Read what has changed; return whether the rules in force have."""
        files = self._files()
        changed = bool(self._read.keys() - files)
        self._read = {path: each for path, each in self._read.items() if path in files}
        for path in files:
            before = self._read.get(path)
            if before and not force and before.look == _look([path, *before.depends]):
                continue
            rules, depends, error = load(path, self._channels, self._language)
            look = _look([path, *depends])
            if rules is None:
                self._read[path] = _File(look, depends, before.rules if before else [], error)
            else:
                self._read[path] = _File(look, depends, rules)
                changed = True
        if changed:
            several = len(self._read) > 1
            self.rules = [
                replace(rule, name=f"{path.stem}/{rule.name}") if several else rule
                for path, each in self._read.items() for rule in each.rules
            ]  # fmt: skip
        return changed

    def _files(self) -> list[Path]:
        files: dict[str, Path] = {}
        for path in self._paths:
            for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]:
                if not file.name.startswith("."):
                    files.setdefault(file.stem, file)
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
    path: Path, channels: Sequence[str] | None = None, language: str = "en"
) -> tuple[list[Rule] | None, list[Path], str | None]:
    """Return the rules of a file, the other files they were made of, and every mistake; no rules if there is one."""
    try:
        reader = _Reader(Document(path, "the rules", write=WRITE[language]), language, channels)
    except ConfigurationError as error:
        return None, [], str(error)
    rules = reader.rules()
    wrong = [str(reader.document.error())] if reader.document.wrong else []
    if wrong or reader.wrong:
        return None, reader.depends, "\n".join([*wrong, *dict.fromkeys(reader.wrong)])
    return rules, reader.depends, None


def strangers(rules: Iterable[Rule], known: Mapping[str, str], language: str = "en") -> Iterator[str]:
    """Yield what rules name and no instrument is called, with the nearest; `known` are symbols by code."""
    symbols = {form(symbol): symbol for symbol in known.values()}
    for rule in rules:
        for match in filter(None, (rule.match, rule.excluded)):
            for name in sorted((match.symbols - symbols.keys()) | (match.instruments - known.keys())):
                near = get_close_matches(name, symbols if name in match.symbols else [*known], 1, 0.5)
                meant = symbols.get(near[0], near[0]) if near else None
                text = explain("nothing_matches", language, rule=rule.name, name=name)
                yield text + (explain("meant", language, name=meant) if meant else "")
