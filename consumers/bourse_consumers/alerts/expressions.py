"""Expressions of alert rules: a subset of Python's, parsed by `ast`, compiled to NumPy over polls x instruments. Pure.

A number is a float matrix with NaN for an unknown value. A condition is a pair of boolean matrices (surely true, surely
false), so that not, and, or are Kleene's: what depends on an unknown value is neither.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import reduce
from math import inf, isfinite, nan, nextafter
from typing import Any, Literal, NamedTuple

import numpy as np

from bourse_consumers.mistakes import Mistake, near
from bourse_schemas.events import FeedState

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
JOINED = re.compile(r"\b(?:and|or)\b")
NO_NUMBER = re.compile(r"(?<![\w.])(\d{1,9})[^\W\d_]\w*")
TOLERANCE, LARGEST_NUMBER = 1e-9, 1.7e308
LONGEST, LARGEST, MOST_VARIANTS = 2_000, 4_000, 40
# What people type and Excel or a phone inserts; invisible marks become spaces.
TYPED = {chr(zero + digit): str(digit) for zero in (0x660, 0x6F0) for digit in range(10)} | {
    "،": ",", "٫": ".", "٬": "_", "×": "*", "÷": "/", "−": "-", "–": "-", "≥": ">=", "≤": "<=", "≠": "!=", "ي": "ی",
    "ك": "ک", "\n": " ", "\r": " ", "\t": " ", "\xa0": " ",
} | dict.fromkeys(
    map(chr, (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0x0640)), " "
)  # fmt: skip
PLAIN = str.maketrans(TYPED)
# The functions, each with a call that is right.
FUNCTIONS = {name: f"{name}({given})" for given, names in {
    "last_price": "abs before", "last_price, closing_price": "min max", "last_price, 5m": "ago percent",
    "volume, 5m": "change pace", "last_price, 1h": "highest lowest mean", "volume": "annulled",
    "last_price, 5_000": "crossed_up crossed_down", "last_price, 100": "stepped",
    "last_price > previous_close": "count share", "value": "total",
}.items() for name in names.split()}  # fmt: skip
MARKET = ("count", "share", "total")
COMPARISONS = {"Lt", "LtE", "Gt", "GtE", "Eq", "NotEq"}
RESERVED = {*COLUMNS, *ALIASES, *FUNCTIONS, *STATES, "quiet", "silent", "feed_state"}
# What has amounts, unlike percentages, shares and counts, and the zeros of a suffix that people give them.
AMOUNTS = {*COLUMNS, *ALIASES, *FUNCTIONS} - {"plp", "pcp", "percent", "share", "count"}
ZEROS = {"k": "_000", "m": "_000_000", "b": "_000_000_000"}
Kind = Literal["number", "truth", "time", "state"]
KINDS: tuple[Kind, ...] = ("number", "truth", "time", "state")
Scope = Literal["instrument", "market", "feed"]
# What a corrected line has if another kind is expected.
OF_KIND = {"number": "5_000", "truth": "last_price >= 5_000", "time": "5m", "state": "DOWN"}


class Span(int):
    """A duration in milliseconds, written as 90s, 5m or 1h30m."""

    def __repr__(self) -> str:
        parts, rest = "", int(self)
        for unit in "hms":
            count, rest = divmod(rest, UNITS[unit])
            parts += f"{count}{unit}" if count else ""
        return parts or "0s"


class Past(NamedTuple):
    """What a board keeps because an expression looks back at it: of each instrument, or one value per members."""

    node: Node | None
    members: str | None = None


@dataclass
class Needs:
    """What expressions need of a board: columns, and the past of parts of them, in the order to work them out.

    `window` is how far they look back, in milliseconds, and `steps` by how many polls before that; `firsts` are what
    `pace` needs the day's first value of.
    """

    columns: set[str] = field(default_factory=set)
    past: dict[str, Past] = field(default_factory=dict)
    firsts: set[str] = field(default_factory=set)
    window: int = 0
    steps: int = 0

    def add(self, other: Needs) -> None:
        """Add what other expressions need."""
        self.columns |= other.columns
        self.firsts |= other.firsts
        self.window, self.steps = max(self.window, other.window), max(self.steps, other.steps)
        for key, past in other.past.items():
            self.past.setdefault(key, past)


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
    """Return the tree of an expression: positions are characters of the text, durations are spans."""
    if len(text) > LONGEST:
        raise Mistake("too_long", most=LONGEST)
    typed = [(char, at) for at, written in enumerate(text) for char in TYPED.get(written, written)]
    begin = next((n for n, (char, _) in enumerate(typed) if char != " "), 0)
    source = "".join(char for char, _ in typed[begin:]).rstrip(" ")
    if not source:
        raise Mistake("empty")
    chars = [at for _, at in typed[begin:]] + [len(text)]
    try:
        # Durations become numbers, as long as they are.
        tree: Any = ast.parse(DURATION.sub(lambda found: "1" * len(found[0]), source), mode="eval").body
    except SyntaxError as error:
        at = min(max((error.offset or 1) - 1, 0), len(source))
        for found in NO_NUMBER.finditer(source) if error.msg == "invalid decimal literal" else ():
            if found.start() <= at < found.end():
                at, end, (name, digits) = chars[found.start()], chars[found.end() - 1] + 1, (found[0], found[1])
                if (suffix := name[len(digits) :].lower()) in ZEROS:
                    around = JOINED.split(source[: found.start()])[-1] + JOINED.split(source[found.end() :])[0]
                    others = (digits + suffix, _in_full(name, around))
                    raise Mistake("amount", at, end, whole="", name=name, others=others) from None
                fix = near("expression", name, span) or f"{digits}m"
                raise Mistake("no_number", at, end, fix, name=name, others=(digits,)) from None
        raise Mistake("not_an_expression", chars[at], chars[at] + 1, why=error.msg) from None
    except (ValueError, RecursionError, MemoryError, OverflowError):
        raise Mistake("too_deep") from None
    spans = {chars[found.start()]: span(found[0]) for found in DURATION.finditer(source)}
    # Positions of trees are those of bytes.
    places = [at for char, at in typed[begin:] for _ in char.encode()] + [len(text)]
    node: Any
    for node in ast.walk(tree):
        if not hasattr(node, "col_offset"):
            continue
        node.col_offset, node.end_col_offset = places[node.col_offset], places[(node.end_col_offset or 1) - 1] + 1
        node.written = text[node.col_offset : node.end_col_offset]
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            node.value = spans.get(node.col_offset, node.value)
            if abs(node.value or 0) > LARGEST_NUMBER:
                raise Mistake("too_large", node.col_offset, node.end_col_offset, "1e15")
    return tree  # type: ignore[no-any-return]


def corrected(text: str, check: Callable[[str], object]) -> str | None:
    """Return an expression with every mistake corrected, as far as what is meant can be derived.

    `check` raises Mistake, also for what is made of the expression on the way; what needs the fewest changes is tried
    first.
    """
    tried = [text]
    for each in tried:
        try:
            check(each)
        except Mistake as mistake:
            tried += [other for other in _variants(each, mistake) if other not in tried][: MOST_VARIANTS - len(tried)]
        else:
            return each
    return None


def _variants(text: str, mistake: Mistake) -> Iterator[str]:
    """Yield what may be meant by an expression with a mistake."""
    if fixes := [fix for fix in (mistake.fix, *mistake.values.get("others", ())) if fix is not None]:
        for fix in fixes:
            yield text[: mistake.at] + fix + ("" if mistake.end is None else text[mistake.end :])
        return
    plain = text.translate(PLAIN).strip()
    yield near("expression", plain, bool) or text
    open_brackets = plain.count("(") - plain.count(")")
    if mistake.text == "not_an_expression" and open_brackets > 0:
        for found in re.finditer(r"\s*([<>=!]=?|\band\b|\bor\b|$)", plain):
            yield plain[: found.start()] + ")" * open_brackets + plain[found.start() :]
    elif mistake.text == "not_an_expression" and open_brackets < 0:
        for found in re.finditer(r"\)", plain):
            yield plain[: found.start()] + plain[found.end() :]


class _Expand(ast.NodeTransformer):
    """Puts what names stand for in their place; the positions are those of the use. A table's columns get braces."""

    def __init__(self, names: Mapping[str, ast.expr], table: Sequence[str]) -> None:
        self._names, self._table, self._size, self._open = names, table, 0, list[str]()

    def visit(self, node: ast.AST) -> Any:
        self._size += 1
        if self._size > LARGEST:
            raise Mistake(
                "too_long", getattr(node, "col_offset", 0), getattr(node, "end_col_offset", None), most=LARGEST
            )
        return super().visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._open:
            raise Mistake("let_circle", node.col_offset, node.end_col_offset, "1", name=node.id)
        if node.id in self._table:
            return ast.copy_location(ast.Name(f"{{{node.id}}}"), node)
        if node.id not in self._names:
            return node
        self._open.append(node.id)
        tree: Any = self.visit(copy.deepcopy(self._names[node.id]))
        self._open.pop()
        tree.written = node.id
        for each in ast.walk(tree):
            if isinstance(each, ast.expr):
                ast.copy_location(each, node)
        return tree  # type: ignore[no-any-return]


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
    value = nan
    match tree:
        case ast.Constant(value=number) if type(number) in {int, float}:
            value = float(number)  # type: ignore[arg-type]
        case ast.UnaryOp(op=ast.USub(), operand=operand) if (x := fold(operand)) is not None:
            value = -x
        case ast.BinOp(left=left, op=op, right=right) if type(op).__name__ in ARITHMETIC:
            x, y = fold(left), fold(right)
            if x is not None and y is not None:
                with np.errstate(all="ignore"):
                    value = float(ARITHMETIC[type(op).__name__](x, y))
    return value if isfinite(value) else None


def fill(text: str, numbers: Mapping[str, float]) -> str:
    """Return a text with the numbers of a table's row in the places of its columns."""
    if not numbers:
        return text
    return re.sub(r"\{(\w+)\}", lambda found: f"{numbers.get(found[1], nan):.15g}", text)


class Compiler:
    """Compiles the expressions of one rule. `needs` collects what they need of a board.

    Numbers of conditions become places (`$0`), so that rules of one shape have one key and are judged together;
    `numbers` holds what is in the places: a number, or the name of a table's column. If the table is None, it cannot be
    read: any unknown name may be one of its columns.
    """

    def __init__(
        self, scope: Scope, lets: Mapping[str, ast.expr], table: Sequence[str] | None, needs: Needs, members: str = ""
    ) -> None:
        self._scope, self._needs, self._members, self._table = scope, needs, members, table
        self._names = {**({} if scope == "feed" else BUILT_IN), **lets}
        self._inside = False  # of what a market rule counts
        self._deep = False  # in what is looked back at: its numbers stay in its key, as its past is kept under it
        self.numbers: list[float | str] = []

    def __call__(self, tree: ast.expr, kinds: Sequence[Kind]) -> Expression:
        """Compile a tree, which it changes; raise Mistake."""
        self._sides: dict[str, Side] = {}
        self._inside = self._deep = False
        try:
            whole = _Expand(self._names, self._table or ()).visit(tree)
            node = self._want(whole, *kinds)
        except RecursionError:
            raise Mistake("too_deep") from None
        return Expression(node, ast.unparse(whole), tuple(self._sides.values()), whole)

    @staticmethod
    def _wrong(text: str, tree: ast.expr, fix: str | None = None, **values: Any) -> Mistake:
        return Mistake(text, tree.col_offset, tree.end_col_offset, fix, **values)

    def _want(self, tree: ast.expr, *kinds: Kind) -> Node:
        node = self._node(tree)
        if node.kind not in kinds:
            is_number = (kinds[0], node.kind) == ("truth", "number")
            fix = f"{_written(tree)} > 0" if is_number else _as(kinds[0], tree)
            raise self._wrong("kind", tree, fix, wanted=kinds[0], found=node.kind)
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

    def _number(self, number: float | str) -> Node:
        constant = None if isinstance(number, str) else number
        if constant is not None and (self._deep or self._scope != "instrument"):
            return Node("number", repr(number), lambda _: number, constant, fixed=True)
        self.numbers.append(number)
        k = len(self.numbers) - 1
        return Node("number", f"${k}", lambda v: v.numbers[k], constant, fixed=True)

    def _name(self, tree: ast.Name, name: str) -> Node:
        if self._scope == "feed":
            if name in STATES:
                code = float(STATES.index(FeedState(name)))
                return Node("state", name, lambda _: code, code, fixed=True)
            if name not in {"feed_state", "silent"}:
                raise self._unknown("name", tree, name, ["feed_state", "silent", *STATES, *self._names])
            return Node("state" if name == "feed_state" else "time", name, lambda v: v.column(name))
        if name.startswith("{"):
            if self._deep or self._scope != "instrument":
                raise self._wrong("table_in_past", tree, name=name.strip("{}"))
            return self._number(name.strip("{}"))
        if name != "quiet" and name not in COLUMNS:
            if name in FUNCTIONS:
                raise self._wrong("brackets", tree, FUNCTIONS[name], name=name)
            if self._table is None:
                return self._number(name)
            raise self._unknown("name", tree, name, ["quiet", *COLUMNS, *self._names, *self._table])
        if self._scope == "market" and not self._inside:
            raise self._wrong("of_one_instrument", tree, f"total({name})", name=name)
        self._needs.columns |= {"volume", "trade_count"} if name == "quiet" else {name}
        if name == "quiet":
            self._needs.past.setdefault(name, Past(None))
        return Node("time" if name == "quiet" else "number", name, lambda v: v.column(name))

    def _unknown(self, what: str, tree: ast.expr, name: str, known: Sequence[str]) -> Mistake:
        if what == "name" and NOT_SENT.fullmatch(name):
            return self._wrong("not_sent", tree, name=name)
        upper = {each.upper(): each for each in known}
        fix = next((upper[each] for each in get_close_matches(name.upper(), upper, 1, 0.5)), None)
        end = tree.col_offset + len(name) if what == "function" else tree.end_col_offset
        return Mistake(f"unknown_{what}", tree.col_offset, end, fix, name=name, known=", ".join(known))

    def _side(self, tree: ast.expr, node: Node) -> None:
        if not (node.fixed or self._inside or self._deep or node.kind == "state"):
            text = ast.unparse(tree)
            self._sides.setdefault(text, Side(text, node, tree))

    def _compared(self, tree: ast.expr, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Node:
        name = type(op).__name__
        if name in {"In", "NotIn"} and isinstance(right, ast.Tuple | ast.List | ast.Set) and right.elts:
            found = _joined([self._compared(tree, left, ast.Eq(), one) for one in right.elts], every=False)
            return found if name == "In" else Node("truth", f"not {found.key}", lambda v: found.run(v)[::-1])
        if name not in COMPARISONS:
            raise self._wrong("not_part", tree, what=name)
        x, y = self._want(left, "number", "time", "state"), self._node(right)
        if x.kind != y.kind:
            wrong, other, wanted = right, left, x.kind
            if x.constant is not None and y.kind == "time":
                wrong, other, wanted = left, right, y.kind
            fix = _in_full(_written(wrong), _written(other)) if wanted == "number" else _as(wanted, wrong)
            raise self._wrong("compared", wrong, fix, whole="" if fix is None else None, left=x.kind, right=y.kind)
        if x.kind == "state" and name not in {"Eq", "NotEq"}:
            raise self._wrong("no_order", tree, f"{_written(left)} == {_written(right)}")
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
        count = FUNCTIONS[name].count(",") + 1
        if len(args) != count and not (name in {"min", "max"} and len(args) > 2):
            usual = FUNCTIONS[name][len(name) + 1 : -1].split(", ")
            fix = f"{name}({', '.join([*map(_written, args), *usual[len(args) :]][:count])})"
            raise self._wrong("arguments", tree, fix, name=name, count=count, given=len(args))
        if name in MARKET:
            return self._market(tree, name, args[0])
        if name == "abs":
            x = self._want(args[0], "number")
            return Node("number", f"abs({x.key})", lambda v: np.abs(x.run(v)), fixed=x.fixed)
        if name in {"min", "max"}:
            xs, f = [self._want(arg, "number") for arg in args], np.minimum if name == "min" else np.maximum
            key = f"{name}({[each.key for each in xs]})"
            return Node("number", key, lambda v: reduce(f, [o.run(v) for o in xs]), fixed=all(o.fixed for o in xs))
        if name == "percent" and not (isinstance(args[1], ast.Constant) and isinstance(args[1].value, Span)):
            x, y = self._want(args[0], "number"), self._want(args[1], "number")
            return Node("number", f"percent({x.key}, {y.key})", lambda v: percent(x.run(v), y.run(v)))
        x = self._past(args[0])
        if name in {"crossed_up", "crossed_down"}:
            return self._crossed(x, args[0], args[1], name)
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

    def _past(self, tree: ast.expr) -> Node:
        """Compile what is looked back at."""
        deep, self._deep = self._deep, True
        try:
            return self._want(tree, "number")
        finally:
            self._deep = deep

    def _window(self, x: Node, tree: ast.expr, name: str) -> Node:
        window = self._want(tree, "time")
        if not window.constant:
            raise self._wrong("window", tree, _as("time", tree))
        ms, key, members = int(window.constant), f"{name}({x.key}, {window.key})", self._members_of()
        self._needs.window = max(self._needs.window, ms)
        if x.key not in COLUMNS:
            self._needs.past.setdefault(x.key, Past(x, members))
        if name == "pace":
            self._needs.firsts.add(x.key)
            return Node("number", key, lambda v: v.shared(key, members, lambda w: w.pace(x.key, ms)))
        if name in {"highest", "lowest", "mean"}:
            return Node("number", key, lambda v: v.shared(key, members, lambda w: w.over(x.key, ms, name)))
        past = f"ago({x.key}, {window.key})"
        ago = Node("number", past, lambda v: v.shared(past, members, lambda w: w.ago(x.key, ms)))
        if name == "ago":
            return ago
        work = percent if name == "percent" else np.subtract
        return Node("number", key, lambda v: work(x.run(v), ago.run(v)))

    def _crossed(self, x: Node, left: ast.expr, right: ast.expr, name: str) -> Node:
        y = self._want(right, "number")
        if not y.fixed:
            y = self._past(right)
        self._side(left, x)
        self._side(right, y)
        x0, y0 = self._earlier(x), self._earlier(y)
        far, close = ("Lt", "GtE") if name == "crossed_up" else ("Gt", "LtE")

        def crossed(v: Any) -> Any:
            then, now = compare(far, x0.run(v), y0.run(v)), compare(close, x.run(v), y.run(v))
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
        self._needs.steps += 1
        key, members = f"{'earlier' if opening else 'before'}({x.key})", self._members_of()
        return Node("number", key, lambda v: v.shared(key, members, lambda w: w.before(x, opening=opening)))

    def _members_of(self) -> str | None:
        return self._members if self._scope == "market" and not self._inside else None

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


def _in_full(number: str, around: str) -> str | None:
    """Return a number with a suffix, such as 5M, without it, if all that is around it are amounts."""
    zeros, names = ZEROS.get(number.lstrip("0123456789").lower()), set(re.findall(r"\b[^\W\d]\w*", around))
    return number[:-1] + zeros if zeros and names and names <= AMOUNTS and "/" not in around else None


def _written(tree: ast.expr) -> str:
    """Return a part of an expression as it is written."""
    return str(getattr(tree, "written", "")) or ast.unparse(tree)


def _as(kind: Kind, tree: ast.expr) -> str:
    """Return what a number or duration is as another kind: minutes are what people leave out."""
    number = _fixed(tree)
    if kind == "time" and number and number > 0 and number == int(number):
        return f"{int(number)}m"
    return OF_KIND[kind]


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


def overlap(when: ast.expr, until: ast.expr) -> str | None:
    """Return a quantity for which values exist that make both `when` and `until` true; None if none is seen.

    Seen are comparisons of one quantity with numbers, joined by `and` in `when`, by `or` in `until`.
    """
    wanted: dict[str, tuple[float, float]] = {}
    for text, low, high in limits(when, ast.And):
        a, b = wanted.get(text, (-inf, inf))
        wanted[text] = max(a, low), min(b, high)
    for text, low, high in limits(until, ast.Or):
        a, b = wanted.get(text, (inf, -inf))
        if max(a, low) <= min(b, high):
            return text
    return None


def limits(tree: ast.expr, joined: type[ast.boolop]) -> Iterator[tuple[str, float, float]]:
    """Yield each quantity that a comparison limits, with its lowest and highest value."""
    if isinstance(tree, ast.BoolOp) and isinstance(tree.op, joined):
        for value in tree.values:
            yield from limits(value, joined)
    elif isinstance(tree, ast.Compare) and len(tree.ops) == 1:
        op, left, right = type(tree.ops[0]).__name__, tree.left, tree.comparators[0]
        if _fixed(left) is not None:
            op = {"Lt": "Gt", "LtE": "GtE", "Gt": "Lt", "GtE": "LtE"}.get(op, op)
            left, right = right, left
        number = _fixed(right)
        if number is not None and op in COMPARISONS - {"NotEq"}:
            low = {"Gt": nextafter(number, inf), "GtE": number, "Eq": number}.get(op, -inf)
            yield ast.unparse(left), low, {"Lt": nextafter(number, -inf), "LtE": number, "Eq": number}.get(op, inf)


def _fixed(tree: ast.expr) -> float | None:
    return float(tree.value) if isinstance(tree, ast.Constant) and isinstance(tree.value, Span) else fold(tree)
