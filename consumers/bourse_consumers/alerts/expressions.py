"""Expressions of alert rules: a subset of Python's, parsed by `ast`, compiled to NumPy over polls x instruments. Pure.

A number is a float matrix with NaN for an unknown value. A condition is a pair of boolean matrices (surely true, surely
false), so that not, and, or are Kleene's: what depends on an unknown value is neither.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import reduce
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from bourse_schemas.events import FeedState

__all__ = [
    "ALIASES",
    "COLUMNS",
    "FUNCTIONS",
    "PLAIN",
    "STATES",
    "Compiler",
    "Expand",
    "Expression",
    "Mistake",
    "Needs",
    "Node",
    "Past",
    "Side",
    "Span",
    "fill",
    "limits",
    "overlap",
    "parse",
    "span",
]

COLUMNS = (
    "open_price", "high_price", "low_price", "last_price", "closing_price", "previous_close", "volume", "value",
    "trade_count", "shares_outstanding", "market_value",
)  # fmt: skip
STATES = tuple(FeedState)
ALIASES = {
    "pl": "last_price", "pc": "closing_price", "py": "previous_close", "pf": "open_price", "pmax": "high_price",
    "pmin": "low_price", "tvol": "volume", "tval": "value", "tno": "trade_count",
    "plp": "percent(last_price, previous_close)", "pcp": "percent(closing_price, previous_close)",
    "plc": "last_price - previous_close", "pcc": "closing_price - previous_close", "z": "shares_outstanding",
}  # fmt: skip
# Names of TSETMC's filters whose data the service does not send.
NOT_SENT = re.compile(r"tmax|tmin|bvol|eps|pe|cs|mv|[pqz][do]\d?|ct|ih|is\d*|l18|l30|buy_\w+|sell_\w+", re.IGNORECASE)
UNITS = {"s": 1_000, "m": 60_000, "h": 3_600_000}
DURATION = re.compile(r"(?<![\w.])(?:\d{1,9}[hms])+(?!\w)")
TOLERANCE = 1e-9
LONGEST, LARGEST = 2_000, 4_000
# What people type and Excel or a phone inserts; invisible marks become spaces.
TYPED = {chr(zero + digit): str(digit) for zero in (0x660, 0x6F0) for digit in range(10)} | {
    "،": ",", "٫": ".", "٬": "_", "×": "*", "÷": "/", "−": "-", "–": "-", "≥": ">=", "≤": "<=", "≠": "!=", "ي": "ی",
    "ك": "ک", "\n": " ", "\r": " ", "\t": " ", "\xa0": " ",
} | dict.fromkeys(
    map(chr, (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0x0640)), " "
)  # fmt: skip
PLAIN = str.maketrans(dict(TYPED.items()))
# The number of values each function takes.
FUNCTIONS = {
    "abs": 1, "min": 2, "max": 2, "ago": 2, "change": 2, "percent": 2, "highest": 2, "lowest": 2, "mean": 2, "pace": 2,
    "before": 1, "crossed_up": 2, "crossed_down": 2, "annulled": 1, "stepped": 2, "count": 1, "share": 1, "total": 1,
}  # fmt: skip
MARKET = ("count", "share", "total")
COMPARISONS = {"Lt", "LtE", "Gt", "GtE", "Eq", "NotEq"}
Kind = Literal["number", "truth", "time", "state"]
Scope = Literal["instrument", "market", "feed"]


class Mistake(Exception):
    """What is wrong in an expression: the name of a text, its values, the characters, and what to write instead."""

    def __init__(
        self, text: str, at: int = 0, end: int | None = None, fix: str | None = None, *, whole: str | None = None,
        **values: Any,
    ) -> None:  # fmt: skip
        super().__init__(text)
        self.text, self.at, self.end, self.values = text, at, at + 1 if end is None else end, values
        self.fix, self.whole = fix, whole  # what to write instead of the characters, or of the whole expression


class Span(int):
    """A duration in milliseconds, written as 90s, 5m or 1h30m."""

    def __repr__(self) -> str:
        parts, rest = "", int(self)
        for unit in "hms":
            count, rest = divmod(rest, UNITS[unit])
            parts += f"{count}{unit}" if count else ""
        return parts or "0s"


class Number(float):
    """A number that is shown as it was written."""

    text: str

    def __new__(cls, value: float, text: str) -> Self:
        self = super().__new__(cls, value)
        self.text = text
        return self

    def __deepcopy__(self, memo: Any) -> Number:
        return self

    def __repr__(self) -> str:
        return self.text


class Past(NamedTuple):
    """What a board keeps because an expression looks back at it: of each instrument, or one value per members."""

    node: Node | None
    members: str | None = None


@dataclass
class Needs:
    """What expressions need of a board: columns, and the past of parts of them, in the order to work them out."""

    columns: set[str] = field(default_factory=set)
    past: dict[str, Past] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Node:
    """A compiled part of an expression. `key` names its value: what has the same key is computed once.

    `fixed` values are the rule's own numbers and its table's; a `momentary` condition can hold at one poll only.
    """

    kind: Kind
    key: str
    run: Callable[[Any], Any]
    constant: float | None = None
    fixed: bool = False
    momentary: bool = False


class Side(NamedTuple):
    """A quantity that a condition compares: its text, its value, its tree."""

    text: str
    node: Node
    tree: ast.expr


class Expression(NamedTuple):
    """A compiled expression, its text with every `let` filled in, and the sides of its comparisons, which alerts show.

    `text` and the texts of the sides hold a table's columns as `{name}`; `fill` puts the numbers in.
    """

    node: Node
    text: str
    sides: tuple[Side, ...]
    tree: ast.expr


def span(text: str) -> Span | None:
    """Return a duration such as 90s, 5m or 1h30m; None if it is not one."""
    text = text.translate(PLAIN).strip()
    if not DURATION.fullmatch(text):
        return None
    return Span(sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+)([hms])", text)))


def parse(text: str) -> ast.expr:
    """Return the tree of an expression: positions are characters of the text, durations and numbers keep theirs."""
    if len(text) > LONGEST:
        raise Mistake("too_long", 0, len(text), most=LONGEST)
    typed = [(char, at) for at, written in enumerate(text) for char in TYPED.get(written, written)]
    begin = next((n for n, (char, _) in enumerate(typed) if char != " "), 0)
    source = "".join(char for char, _ in typed[begin:]).rstrip(" ")
    places = [at for _, at in typed[begin:]] + [len(text)]
    if not source:
        raise Mistake("empty", 0, len(text))
    spans = {found.start(): Span(span(found[0]) or 0) for found in DURATION.finditer(source)}
    python = DURATION.sub(lambda found: "_" * len(found[0]), source)
    try:
        tree = ast.parse(python, mode="eval").body
    except SyntaxError as error:
        at = places[min(max((error.offset or 1) - 1, 0), len(source))]
        raise Mistake("not_an_expression", at, whole=_near_expression(source), why=error.msg) from None
    except (ValueError, RecursionError, MemoryError, OverflowError):
        raise Mistake("too_deep", 0, len(text)) from None
    wide = python.isascii()
    chars = (
        range(len(python) + 1) if wide else [n for n, char in enumerate(python) for _ in char.encode()] + [len(python)]
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.expr):
            first, last = chars[node.col_offset], chars[node.end_col_offset or node.col_offset]
            if isinstance(node, ast.Constant) and type(node.value) in {int, float}:
                node.value = Number(_float(node.value, places[first], places[last]), source[first:last])
            if isinstance(node, ast.Name) and set(node.id) == {"_"} and first in spans:
                node.id = f"\0{int(spans[first])}"
            node.col_offset, node.end_col_offset = places[first], places[last - 1] + 1
    return tree


def _float(value: Any, at: int, end: int) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number == float("inf"):
        raise Mistake("too_large", at, end, fix="1e15")
    return number


def _near_expression(source: str) -> str | None:
    """Return what was probably meant by a text that is not an expression."""
    words = {"minutes": "m", "minute": "m", "min": "m", "seconds": "s", "sec": "s", "hours": "h", "hour": "h",
             "دقیقه": "m", "ثانیه": "s", "ساعت": "h"}  # fmt: skip
    near = re.sub(rf"(\d+)\s*({'|'.join(words)})\b", lambda found: found[1] + words[found[2]], source)
    for wrong, right in ((r"\bAND\b|&&|&", "and"), (r"\bOR\b|\|\||\|", "or"), (r"=>", ">="), (r"=<", "<="),
                         (r"<>", "!="), (r"(?<![<>=!])=(?!=)", "=="), (r"(?<=\d)\s*[%٪]", ""),
                         (r"(?<=\d),(?=\d{3}\b)", "_"),
                         (r"\b0+(?=\d)", "")):  # fmt: skip
        near = re.sub(wrong, right, near)
    near += ")" * (near.count("(") - near.count(")"))
    try:
        ast.parse(DURATION.sub(lambda found: "_" * len(found[0]), near), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return near if near != source else None


class Expand(ast.NodeTransformer):
    """Puts what names stand for in their place; the positions are those of the use."""

    def __init__(self, lets: Mapping[str, ast.expr]) -> None:
        self._lets, self.size = lets, 0

    def visit(self, node: ast.AST) -> Any:
        self.size += 1
        if self.size > LARGEST:
            raise Mistake("too_long", getattr(node, "col_offset", 0), most=LARGEST)
        return super().visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id.startswith("\0"):
            return ast.copy_location(ast.Constant(Span(node.id[1:])), node)
        found = self._lets.get(node.id)
        if found is None:
            return node
        tree = copy.deepcopy(found)
        for each in ast.walk(tree):
            self.size += 1
            if isinstance(each, ast.expr):
                ast.copy_location(each, node)
        return tree


BUILT_IN = {name: parse(text) for name, text in ALIASES.items()}


def compare(op: str, x: Any, y: Any) -> tuple[Any, Any]:
    """Return where a comparison is surely true and surely false; equal is equal to a relative 1e-9."""
    difference, near = x - y, TOLERANCE * np.maximum(np.abs(x), np.abs(y))
    match op:
        case "Lt" | "GtE":
            low, high = difference < -near, difference >= -near
            return (low, high) if op == "Lt" else (high, low)
        case "Gt" | "LtE":
            low, high = difference <= near, difference > near
            return (high, low) if op == "Gt" else (low, high)
    same, other = np.abs(difference) <= near, np.abs(difference) > near
    return (same, other) if op == "Eq" else (other, same)


def divide(x: Any, y: Any) -> Any:
    """Return x / y, unknown where y is 0."""
    return np.asarray(x) / np.where(np.equal(y, 0), np.nan, y)


def percent(x: Any, y: Any) -> Any:
    """Return by how many percent x is above y."""
    return (x - y) * 100 / np.where(np.equal(y, 0), np.nan, np.abs(y))


def steps(x: Any, n: Any) -> Any:
    """Return floor(x / n); a quotient within 1e-9 of a whole number is that number."""
    quotient = divide(x, n)
    whole = np.rint(quotient)
    near = np.abs(quotient - whole) <= TOLERANCE * np.maximum(np.abs(quotient), np.abs(whole))
    return np.where(near, whole, np.floor(quotient))


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mult": np.multiply, "Div": divide,
}  # fmt: skip


def fold(tree: ast.expr) -> float | None:
    """Return the value of an expression of numbers only; None if it is not one, or unknown."""
    match tree:
        case ast.Constant(value=Number() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = fold(operand)
            return None if value is None else -value
        case ast.BinOp(left=left, op=op, right=right) if type(op).__name__ in ARITHMETIC:
            x, y = fold(left), fold(right)
            if x is None or y is None or (isinstance(op, ast.Div) and y == 0):
                return None
            with np.errstate(all="ignore"):
                value = float(ARITHMETIC[type(op).__name__](x, y))
            return value if abs(value) < float("inf") else None
    return None


def fill(text: str, numbers: Mapping[str, float]) -> str:
    """Return a text with the numbers of a table's row in the places of its columns."""
    if "{" not in text:
        return text
    return re.sub(r"\{(\w+)\}", lambda found: f"{numbers.get(found[1], float('nan')):.15g}", text)


class Compiler:
    """Compiles the expressions of one rule. `needs` collects what they need of a board.

    Numbers of conditions become places (`$0`), so that rules of one shape have one key and are judged together;
    `numbers` holds what is in the places: a number, or the name of a table's column.
    """

    def __init__(
        self, scope: Scope, lets: Mapping[str, ast.expr], table: Sequence[str], needs: Needs, members: str = ""
    ) -> None:
        self._scope, self._needs, self._members, self._table = scope, needs, members, table
        self._aliases = BUILT_IN if scope != "feed" else {}
        self._lets = lets
        self._inside = self._deep = False
        self._literal = scope != "instrument"
        self.numbers: list[float | str] = []

    def __call__(self, tree: ast.expr, kinds: Iterable[Kind] | None = None) -> Expression:
        """Compile a tree; raise Mistake."""
        self._sides: dict[str, Side] = {}
        self._inside = False
        try:
            # Named expressions may hold aliases, which are expanded after them.
            whole = Expand(self._aliases).visit(Expand(self._lets).visit(copy.deepcopy(tree)))
            node = self._want(whole, *kinds) if kinds else self._node(whole)
        except RecursionError:
            raise Mistake("too_deep", 0, None) from None
        return Expression(node, self._text(whole), tuple(self._sides.values()), whole)

    def _text(self, tree: ast.expr) -> str:
        if self._table:
            tree = copy.deepcopy(tree)
            for each in ast.walk(tree):
                if isinstance(each, ast.Name) and each.id in self._table:
                    each.id = f"{{{each.id}}}"
        return ast.unparse(tree)

    def _wrong(self, text: str, tree: ast.expr, fix: str | None = None, **values: Any) -> Mistake:
        return Mistake(text, tree.col_offset, tree.end_col_offset, fix, **values)

    def _want(self, tree: ast.expr, *kinds: Kind) -> Node:
        node = self._node(tree)
        if node.kind not in kinds:
            raise self._wrong("kind", tree, _as_kind(tree, kinds[0], node.kind), wanted=kinds[0], found=node.kind)
        return node

    def _node(self, tree: ast.expr) -> Node:
        if (number := fold(tree)) is not None:
            return self._number(number)
        match tree:
            case ast.Constant(value=Span() as ms):
                return Node("time", f"{int(ms)}ms", lambda _: float(ms), float(ms), fixed=True)
            case ast.Name(id=name):
                return self._name(tree, name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                x = self._want(operand, "truth")
                return Node("truth", f"not {x.key}", lambda v: x.run(v)[::-1])
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                x = self._want(operand, "number")
                return Node("number", f"-{x.key}", lambda v: -x.run(v), fixed=x.fixed)
            case ast.BoolOp(op=op, values=values):
                return _joined([self._want(value, "truth") for value in values], every=isinstance(op, ast.And))
            case ast.BinOp(left=left, op=op, right=right) if type(op).__name__ in ARITHMETIC:
                x, y, f = self._want(left, "number"), self._want(right, "number"), ARITHMETIC[type(op).__name__]
                key = f"({x.key} {type(op).__name__} {y.key})"
                return Node("number", key, lambda v: f(x.run(v), y.run(v)), fixed=x.fixed and y.fixed)
            case ast.Compare(left=left, ops=ops, comparators=rest):
                pairs = zip([left, *rest], ops, rest, strict=False)
                return _joined([self._compared(tree, a, op, b) for a, op, b in pairs], every=True)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._call(tree, name, args)
        raise self._wrong("not_part", tree, what=type(tree).__name__)

    def _number(self, number: float) -> Node:
        if self._literal:
            return Node("number", repr(number), lambda _: number, number, fixed=True)
        self.numbers.append(number)
        k = len(self.numbers) - 1
        return Node("number", f"${k}", lambda v: v.numbers[k], number, fixed=True)

    def _name(self, tree: ast.Name, name: str) -> Node:
        if self._scope == "feed":
            if name in STATES:
                code = float(STATES.index(FeedState(name)))
                return Node("state", name, lambda _: code, code, fixed=True)
            if name in {"feed_state", "silent"}:
                return Node("state" if name == "feed_state" else "time", name, lambda v: v.column(name))
            raise self._unknown("name", tree, name, ["feed_state", "silent", *STATES, *self._lets])
        if name in self._table:
            if self._literal:
                raise self._wrong("table_in_past", tree, name=name)
            self.numbers.append(name)
            k = len(self.numbers) - 1
            return Node("number", f"${k}", lambda v: v.numbers[k], fixed=True)
        if name != "quiet" and name not in COLUMNS:
            if name in FUNCTIONS:
                raise self._wrong("brackets", tree, _example(name), name=name)
            raise self._unknown("name", tree, name, ["quiet", *COLUMNS, *ALIASES, *self._table, *self._lets])
        if self._scope == "market" and not self._inside:
            raise self._wrong("of_one_instrument", tree, f"total({name})", name=name)
        if name == "quiet":
            self._needs.columns |= {"volume", "trade_count"}
            self._needs.past.setdefault("quiet", Past(None))
            return Node("time", name, lambda v: v.past("quiet"))
        self._needs.columns.add(name)
        return Node("number", name, lambda v: v.column(name))

    def _unknown(self, what: str, tree: ast.expr, name: str, known: Sequence[str]) -> Mistake:
        if what == "name" and NOT_SENT.fullmatch(name):
            return self._wrong("not_sent", tree, name=name)
        near = get_close_matches(name, known, 1, 0.5)
        at, end = tree.col_offset, tree.col_offset + len(name) if what == "function" else tree.end_col_offset
        return Mistake(f"unknown_{what}", at, end, near[0] if near else None, name=name, known=", ".join(known))

    def _side(self, tree: ast.expr, node: Node) -> None:
        if not (node.fixed or self._inside or self._deep or node.kind == "state"):
            text = self._text(tree)
            self._sides.setdefault(text, Side(text, node, tree))

    def _compared(self, tree: ast.expr, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Node:
        name = type(op).__name__
        if name in {"In", "NotIn"} and isinstance(right, ast.Tuple | ast.List | ast.Set) and right.elts:
            ones = [self._compared(tree, left, ast.Eq(), one) for one in right.elts]
            found = _joined(ones, every=False)
            return found if name == "In" else Node("truth", f"not {found.key}", lambda v: found.run(v)[::-1])
        if name not in COMPARISONS:
            raise self._wrong("not_part", tree, what=name)
        x, y = self._want(left, "number", "time", "state"), self._node(right)
        if x.kind != y.kind:
            raise self._wrong("compared", right, _as_kind(right, x.kind, y.kind), left=x.kind, right=y.kind)
        if x.kind == "state" and name not in {"Eq", "NotEq"}:
            raise self._wrong("no_order", tree, f"{ast.unparse(left)} == {ast.unparse(right)}")
        self._side(left, x)
        self._side(right, y)
        moment = (x.momentary and name in {"Gt", "GtE"}) or (y.momentary and name in {"Lt", "LtE"})
        key = f"({x.key} {name} {y.key})"
        return Node("truth", key, lambda v: compare(name, x.run(v), y.run(v)), momentary=moment)

    def _call(self, tree: ast.Call, name: str, args: list[ast.expr]) -> Node:
        if name in {"quiet", "silent"} and not args:
            raise self._wrong("no_brackets", tree, name, name=name)
        if name not in FUNCTIONS:
            raise self._unknown("function", tree, name, [*FUNCTIONS])
        if self._scope == "feed" and name not in {"abs", "min", "max"}:
            raise self._wrong("not_for_feed", tree, name=name)
        if len(args) != FUNCTIONS[name] and not (name in {"min", "max"} and len(args) > 2):
            raise self._wrong(
                "arguments", tree, _example(name, args), name=name, count=FUNCTIONS[name], given=len(args)
            )
        if name in MARKET:
            return self._market(tree, name, args[0])
        if name == "abs":
            x = self._want(args[0], "number")
            return Node("number", f"abs({x.key})", lambda v: np.abs(x.run(v)), fixed=x.fixed)
        if name in {"min", "max"}:
            xs, f = [self._want(arg, "number") for arg in args], np.minimum if name == "min" else np.maximum
            key = f"{name}({[each.key for each in xs]})"
            return Node("number", key, lambda v: reduce(f, [o.run(v) for o in xs]), fixed=all(o.fixed for o in xs))
        if name in {"crossed_up", "crossed_down"}:
            return self._crossed(args[0], args[1], name)
        if name == "percent" and not isinstance(args[1], ast.Constant) and self._kind(args[1]) == "number":
            x, y = self._want(args[0], "number"), self._want(args[1], "number")
            return Node("number", f"percent({x.key}, {y.key})", lambda v: percent(x.run(v), y.run(v)))
        x = self._past(args[0])
        if name == "before":
            return self._before(x)
        if name == "annulled":
            before = self._before(x)
            key = f"annulled({x.key})"
            return Node("number", key, lambda v: np.maximum(before.run(v) - x.run(v), 0), momentary=True)
        if name == "stepped":
            n = self._want(args[1], "number")
            if not n.fixed or (n.constant is not None and n.constant <= 0):
                raise self._wrong("step", args[1], "2")
            self._side(args[0], x)
            earlier = self._earlier(x)

            def stepped(v: Any) -> Any:
                by = n.run(v)
                return compare("NotEq", steps(x.run(v), by), steps(earlier.run(v), by))

            return Node("truth", f"stepped({x.key}, {n.key})", stepped, momentary=True)
        return self._window(x, args[1], name)

    def _kind(self, tree: ast.expr) -> Kind:
        """Return the kind of an expression without a trace of having looked."""
        numbers, sides = [*self.numbers], {**self._sides}
        kind = self._node(tree).kind
        self.numbers[:], self._sides = numbers, sides
        return kind

    def _past(self, tree: ast.expr) -> Node:
        """Compile what is looked back at: its numbers stay in its key, as its past is kept under it."""
        literal, self._literal, deep, self._deep = self._literal, True, self._deep, True
        try:
            return self._want(tree, "number")
        finally:
            self._literal, self._deep = literal, deep

    def _window(self, x: Node, tree: ast.expr, name: str) -> Node:
        window = self._want(tree, "time")
        if not window.constant or window.constant <= 0:
            raise self._wrong("window", tree, "5m")
        ms, key = int(window.constant), f"{name}({x.key}, {window.key})"
        if name in {"highest", "lowest", "mean"}:
            return self._history(key, x, lambda v, m: v.over(m, ms, name))
        if name == "pace":
            return self._history(key, x, lambda v, m: v.pace(m, ms))
        ago = self._history(f"ago({x.key}, {window.key})", x, lambda v, m: v.ago(m, ms))
        match name:
            case "ago":
                return ago
            case "change":
                return Node("number", key, lambda v: x.run(v) - ago.run(v))
        return Node("number", key, lambda v: percent(x.run(v), ago.run(v)))

    def _crossed(self, left: ast.expr, right: ast.expr, name: str) -> Node:
        x, y = self._past(left), self._want(right, "number")
        if not y.fixed:
            y = self._past(right)
        self._side(left, x)
        self._side(right, y)
        x0, y0 = self._earlier(x), self._earlier(y)
        far, near = ("Lt", "GtE") if name == "crossed_up" else ("Gt", "LtE")

        def crossed(v: Any) -> Any:
            then, now = compare(far, x0.run(v), y0.run(v)), compare(near, x.run(v), y.run(v))
            return then[0] & now[0], then[1] | now[1]

        return Node("truth", f"{name}({x.key}, {y.key})", crossed, momentary=True)

    def _earlier(self, x: Node) -> Node:
        """Return what x was at the poll before; before the day's first last and closing price were `previous_close`."""
        if x.fixed:
            return x
        if self._scope == "instrument":
            self._needs.columns.add("previous_close")
        return self._before(x, opening=True)

    def _before(self, x: Node, *, opening: bool = False) -> Node:
        """Return a node with the value at the poll before."""
        key, members = f"{'earlier' if opening else 'before'}({x.key})", self._members_of()
        return Node("number", key, lambda v: v.shared(key, members, lambda w: w.before(x, opening=opening)))

    def _members_of(self) -> str | None:
        return self._members if self._scope == "market" and not self._inside else None

    def _history(self, key: str, x: Node, f: Callable[[Any, Any], Any]) -> Node:
        """Return a node that reads the past of x, which the board keeps; shared by all rules."""
        members = self._members_of()
        if x.key not in COLUMNS:
            self._needs.past.setdefault(x.key, Past(x, members))
        return Node("number", key, lambda v: v.shared(key, members, lambda w: f(w, w.matrix(x.key))))

    def _market(self, tree: ast.expr, name: str, arg: ast.expr) -> Node:
        if self._scope != "market" or self._inside:
            raise self._wrong("market_only", tree, name=name)
        self._inside = True
        try:
            x = self._want(arg, "number" if name == "total" else "truth")
        finally:
            self._inside = False
        members = self._members

        def run(v: Any) -> Any:
            within, valid = v.members(members)
            value = x.run(within)
            if name == "total":
                return np.nansum(np.where(valid, value, np.nan), axis=1, keepdims=True)
            true, known = (np.sum(part & valid, axis=1, keepdims=True) for part in (value[0], value[0] | value[1]))
            return true.astype(float) if name == "count" else divide(true, known)

        return Node("number", f"{name}({x.key}) of {members}", run)


def _joined(parts: list[Node], *, every: bool) -> Node:
    if len(parts) == 1:
        return parts[0]

    def run(v: Any) -> Any:
        true, false = parts[0].run(v)
        for part in parts[1:]:
            t, f = part.run(v)
            true, false = (true & t, false | f) if every else (true | t, false & f)
        return true, false

    moment = (any if every else all)(part.momentary for part in parts)
    key = "(" + (" and " if every else " or ").join(part.key for part in parts) + ")"
    return Node("truth", key, run, momentary=moment)


def _as_kind(tree: ast.expr, wanted: Kind, found: Kind) -> str | None:
    """Return an example of how an expression of the wrong kind may have been meant."""
    match wanted, found:
        case "truth", "number":
            return f"{ast.unparse(tree)} > 0"
        case "truth", "time":
            return f"{ast.unparse(tree)} >= 10m"
        case "time", "number" if (number := fold(tree)) is not None:
            return f"{number:.0f}m"
        case "number", "time" if isinstance(tree, ast.Constant) and isinstance(tree.value, Span):
            return f"{tree.value / 60_000:.0f}"
    return None


def _example(name: str, args: Sequence[ast.expr] = ()) -> str:
    """Return a call of a function that is right, with the values given as far as they go."""
    given = [ast.unparse(arg) for arg in args]
    usual = ["last_price > previous_close" if name in {"count", "share"} else "last_price"]
    if FUNCTIONS[name] == 2:
        second = {"crossed_up": "5_000", "crossed_down": "5_000", "min": "closing_price", "max": "closing_price",
                  "stepped": "100"}  # fmt: skip
        usual.append(second.get(name, "5m"))
    return f"{name}({', '.join((given + usual[len(given) :])[: FUNCTIONS[name]])})"


def overlap(when: ast.expr, until: ast.expr) -> str | None:
    """Return a quantity for which values exist that make both `when` and `until` true; None if none is seen.

    Seen are comparisons of one quantity with numbers, joined by `and` in `when`, by `or` in `until`.
    """
    wanted: dict[str, tuple[float, bool, float, bool]] = {}
    for text, found in limits(when, ast.And):
        wanted[text] = _both(wanted[text], found) if text in wanted else found
    for text, found in limits(until, ast.Or):
        if text in wanted:
            low, low_in, high, high_in = _both(wanted[text], found)
            if low < high or (low == high and low_in and high_in):
                return text
    return None


def _both(a: tuple[float, bool, float, bool], b: tuple[float, bool, float, bool]) -> tuple[float, bool, float, bool]:
    low, low_out = max((a[0], not a[1]), (b[0], not b[1]))
    high, high_in = min((a[2], a[3]), (b[2], b[3]))
    return low, not low_out, high, high_in


def limits(tree: ast.expr, joined: type[ast.boolop]) -> Iterator[tuple[str, tuple[float, bool, float, bool]]]:
    """Yield each quantity that a comparison limits, and its limits: low, itself allowed, high, itself allowed."""
    most = float("inf")
    if isinstance(tree, ast.BoolOp) and isinstance(tree.op, joined):
        for value in tree.values:
            yield from limits(value, joined)
    elif isinstance(tree, ast.Compare) and len(tree.ops) == 1:
        op, left, right = type(tree.ops[0]).__name__, tree.left, tree.comparators[0]
        x, y = _fixed(left), _fixed(right)
        if x is not None and y is None:
            turned = {"Lt": "Gt", "LtE": "GtE", "Gt": "Lt", "GtE": "LtE"}
            op, left, y, x = turned.get(op, op), right, x, None
        if x is None and y is not None:
            allowed = {"Lt": (-most, False, y, False), "LtE": (-most, False, y, True), "Gt": (y, False, most, False),
                      "GtE": (y, True, most, False), "Eq": (y, True, y, True)}  # fmt: skip
            if op in allowed:
                yield ast.unparse(left), allowed[op]


def _fixed(tree: ast.expr) -> float | None:
    return float(tree.value) if isinstance(tree, ast.Constant) and isinstance(tree.value, Span) else fold(tree)
