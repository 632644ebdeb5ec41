"""What an alert says to people, in Persian and in English: the rule's own text filled in, or one made of its parts."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from math import isnan
from typing import Any, NamedTuple

from bourse_consumers.alerts.expressions import STATES, Expression, Kind, Side, Span

LANGUAGES = ("fa", "en")
COMMA = {"fa": "، ", "en": ", "}
# What may be in braces besides expressions.
FIELDS = ("rule", "title", "severity", "state", "instrument", "symbol", "instrument_title", "source")
SPEC = re.compile(r"\+?,?(\.[0-9])?[f%]?")
UNKNOWN = "–"
PERSIAN = str.maketrans("0123456789,.%", "۰۱۲۳۴۵۶۷۸۹٬٫٪")
LRI, PDI = "\u2066", "\u2069"
UNITS = {"fa": ("ساعت", "دقیقه", "ثانیه"), "en": ("h", "min", "s")}
WORDS: dict[str, Any] = tomllib.loads((files("bourse_consumers.alerts") / "words.toml").read_text("utf-8"))
COLUMNS: dict[str, dict[str, str]] = WORDS["columns"]
FUNCTIONS: dict[str, dict[str, str]] = WORDS["functions"]
SIGNS = {"Lt": "<", "LtE": "≤", "Gt": ">", "GtE": "≥", "Eq": "=", "NotEq": "≠", "Add": "+", "Sub": "−", "Mult": "×",
         "Div": "÷", "And": ("و", "and"), "Or": ("یا", "or")}  # fmt: skip


class Part(NamedTuple):
    """A part of a text: itself, a word, or an expression and how to print it."""

    text: str
    expression: Expression | None = None
    spec: str = ""
    word: str | None = None


# Per language and state (firing, resolved) the parts.
Texts = Mapping[str, Mapping[str, Sequence[Part]]]


def split(text: str) -> list[tuple[int, str, str | None, str]]:
    """Return the pieces of a template: where each is, its text, what is in its braces, and how to print that.

    Raises ValueError with the position of a brace without its partner.
    """
    pieces, at = list[tuple[int, str, str | None, str]](), 0
    for found in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]", text):
        if found[0] in {"{", "}"}:
            raise ValueError(found.start())
        pieces.append((at, text[at : found.start()] + (found[0][0] if found[1] is None else ""), None, ""))
        if found[1] is not None:
            inside, colon, spec = found[1].rpartition(":")
            pieces.append((found.start() + 1, "", inside if colon else spec, spec if colon else ""))
        at = found.end()
    return [piece for piece in [*pieces, (at, text[at:], None, "")] if piece[1] or piece[2] is not None]


def show(value: float | None, kind: Kind, spec: str, language: str, unit: str = "") -> str:
    """Return a value as a text shows it; an unknown one is a dash."""
    if value is None or isnan(value):
        return UNKNOWN
    if kind == "time":
        return _duration(int(value), language)
    if kind == "state":
        return str(STATES[int(value)])
    text = _number(value, spec) + unit
    if language == "en":
        return text
    text = text.translate(PERSIAN)
    return f"{LRI}{text}{PDI}" if text[0] in "+-" or text[-1] == "٪" else text


@lru_cache(1 << 12)
def _number(value: float, spec: str) -> str:
    """Return a number as English texts show it; it is asked for once per language."""
    if "." in spec or spec[-1:] in {"f", "%"}:
        spec += "" if spec[-1] in "f%" else "f"
    elif float(value).is_integer():
        value, spec = int(value), spec or ","
    else:
        spec = (spec or ",") + ".2f"
    text = format(value, spec)
    return text[1:] if text[0] == "-" and not text.strip("-0.,%") else text


@lru_cache(1 << 12)
def _duration(ms: int, language: str) -> str:
    seconds = ms // 1000
    counts = (seconds // 3600, seconds // 60 % 60, seconds % 60 if seconds < 60 else 0)
    parts = [f"{count} {unit}" for count, unit in zip(counts, UNITS[language], strict=True) if count]
    text = (" و " if language == "fa" else " ").join(parts) or f"0 {UNITS[language][2]}"
    return text.translate(PERSIAN) if language == "fa" else text


def describe(tree: ast.expr, language: str) -> str:
    """Return an expression in words."""
    n = LANGUAGES.index(language)

    def words(each: ast.expr) -> str:
        return describe(each, language)

    match tree:
        case ast.Name(id=name) if name in COLUMNS:
            return COLUMNS[name][language]
        case ast.Constant(value=Span() as ms):
            return _duration(int(ms), language)
        case ast.Constant(value=number) if type(number) in {int, float}:
            return show(float(number), "number", "", language)  # type: ignore[arg-type]
        case ast.Call(func=ast.Name(id="percent"), args=[x, y]) if not isinstance(y, ast.Constant):
            return FUNCTIONS["percent of"][language].format(words(x), words(y))
        case ast.Call(func=ast.Name(id=name), args=args) if name in FUNCTIONS:
            parts = [words(each) for each in args]
            if name in {"min", "max"}:
                parts = [COMMA[language].join(parts)]
            return FUNCTIONS[name][language].format(*parts)
        case ast.Compare(left=left, ops=[op], comparators=[right]) | ast.BinOp(left=left, op=op, right=right):
            return f"{words(left)} {SIGNS[type(op).__name__]} {words(right)}"
        case ast.BoolOp(op=op, values=values):
            return f" {SIGNS[type(op).__name__][n]} ".join(words(each) for each in values)
    return ast.unparse(tree).strip("{}")


def described(side: Side, language: str) -> tuple[str, str]:
    """Return a side of a comparison in words, and how it is printed: nothing if it is not a percentage."""
    spec = ""
    if side.node.kind == "number" and side.text.removeprefix("abs(").startswith("percent("):
        spec = "+,.2f" if side.text[0] == "p" else ",.2f"
    return describe(side.tree, language), spec


def usual(subject: Mapping[str, str], price: float | None, percent: float, sides: Sequence[str], language: str) -> str:
    """Return the text of a rule that has none: who, last price with percent, and each compared quantity."""
    comma = COMMA[language]
    if not subject["instrument"]:
        return comma.join([subject["title"] or subject["rule"], *sides])
    title = f" ({subject['instrument_title']})" if subject["instrument_title"] else ""
    now = show(price, "number", ",", language)
    if not isnan(percent):
        now = f"{now} ({show(percent, 'number', '+.2f', language, '%')})"
    return f"{subject['symbol'] or subject['instrument']}{title}: {comma.join([now, *sides])}"
