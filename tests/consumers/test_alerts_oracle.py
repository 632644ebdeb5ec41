"""The engine against a second implementation in loops and exact fractions: on real days and on generated ones."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from functools import lru_cache
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from bourse_consumers.alerts.engine import Engine, Poll, columns_of
from bourse_consumers.alerts.rendering import millis
from bourse_consumers.alerts.rule import Rule
from bourse_consumers.alerts.rules_file import RuleFiles
from bourse_consumers.alerts.trial import Past, polls_of
from bourse_consumers.testing import trade
from bourse_producer.replay import Replay
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.events import (
    TEHRAN,
    AlertState,
    FeedState,
    Outcome,
    Phase,
    PollMarker,
    PriceAlert,
    Scope,
    TradeEvent,
)

OTHER_DAY = Path(__file__).parents[3] / "shared" / "data" / "day-2019-08-24.ndjson.gz"
RULES = """
version: 1
rules:
  - {name: move, when: "abs(percent(last_price, 5m)) >= 3", until: "abs(percent(last_price, 5m)) < 1.5", cooldown: 15m}
  - {name: limit, when: "plp >= 4 and quiet >= 3m", until: "plp < 3.5 or quiet < 1m", once: true}
  - {name: held, when: "percent(last_price, closing_price) <= -1 and not value < 1000", for: 3m}
  - {name: surge, when: "change(volume, 4m) >= 3 * pace(volume, 4m)", until: "change(volume, 4m) < pace(volume, 4m)"}
  - {name: high, when: "last_price > before(highest(last_price, 10m))", cooldown: 6m, active: 09:05-12:10}
  - {name: low, when: "last_price <= lowest(closing_price, 7m) or last_price * 2 < mean(high_price, 7m)"}
  - {name: up, when: "crossed_up(last_price, 1_000)", until: last_price <= 990}
  - {name: down, when: "crossed_down(percent(last_price, previous_close), -1)"}
  - {name: both, when: "crossed_up(last_price, mean(last_price, 10m)) or crossed_down(closing_price, open_price)"}
  - {name: step, when: "stepped(plp, 2)"}
  - {name: undone, when: "annulled(volume) >= 10", until: annulled(volume) == 0}
  - {name: undone-moment, when: annulled(trade_count) > 0}
  - {name: chain, when: "0 < change(value, 6m) / before(volume) <= 1e6 and ago(last_price, 6m) != last_price"}
  - {name: nested, when: "ago(change(volume, 3m), 3m) > max(10, change(volume, 3m))", for: 2m}
  - {name: deep, when: "before(before(highest(last_price, 4m))) < before(last_price)", cooldown: 5m}
  - {name: still, when: "quiet >= 4m", match: {symbols: [الف, پ], instruments: [IRO1TEST0009]}, cooldown: 5m}
  - {name: level, when: last_price <= stop or last_price >= 2 * stop, match: {table: levels.csv}}
  - {name: bourse, when: "market_value / shares_outstanding > 0", match: {market: bourse}, except: {patterns: ["ب*"]}}
  - {name: breadth, scope: market, when: "share(last_price < previous_close) >= 0.5 and count(plp < 0) >= 2", for: 1m}
  - {name: total, scope: market, match: {symbols: [الف, ب]}, when: "change(total(value), 5m) > 500 and total(quiet_) >= 0"}
  - {name: turn, scope: market, when: "crossed_up(share(last_price > previous_close), 0.4) or annulled(total(volume)) > 5"}
  - {name: bad, scope: feed, when: "feed_state in (DOWN, STALE)", for: 2m, cooldown: 3m}
  - {name: silent, scope: feed, when: silent >= 3m, until: "silent == 0s and feed_state != DOWN"}
""".replace("total(quiet_) >= 0", "mean(total(volume), 4m) >= 0")
# Edited: thresholds, a rule that is gone, a new one, and other instruments.
EDITED = (
    RULES.replace(">= 3 *", ">= 2 *").replace("plp >= 4", "plp >= 3.8").replace("name: held", "name: held-again")
    .replace("[الف, پ]", "[ب]").replace("stop or", "stop * 1.01 or").replace("cooldown: 15m", "cooldown: 1m")
)  # fmt: skip
LEVELS = "symbol;stop\nالف;۱٬۰۰۰\nIRO1TEST0002;990,5\n" + "فولاد;3890\nشپنا;11700\nخودرو;\n"
NAMES = {
    "plp": "percent(last_price, previous_close)",
}
OPERATORS: dict[str, Any] = {"Add": "__add__", "Sub": "__sub__", "Mult": "__mul__"}
DAY_MS = 86_400_000


def rules_of(folder: Path, text: str = RULES, levels: str = LEVELS) -> list[Rule]:
    """Return rules of a file in a folder."""
    (folder / "rules.yaml").write_text(text, "utf-8")
    (folder / "levels.csv").write_text(levels.replace("990,5", "990.5"), "utf-8")
    return RuleFiles([folder / "rules.yaml"]).rules


# --- the second implementation ----------------------------------------------------------------------------------------


@lru_cache(1000)
def tree_of(text: str) -> ast.expr:
    """Return the tree of an expression, durations as strings."""
    for name, meaning in NAMES.items():
        text = re.sub(rf"\b{name}\b", f"({meaning})", text)
    return ast.parse(re.sub(r"\b(\d+)([smh])\b", r"'\1\2'", text), mode="eval").body


def span_of(text: str) -> int:
    """Return a duration in milliseconds."""
    return int(text[:-1]) * {"s": 1_000, "m": 60_000, "h": 3_600_000}[text[-1]]


def near(x: Fraction, y: Fraction) -> bool:
    """Return whether two numbers count as equal."""
    return abs(x - y) <= Fraction(1, 10**9) * max(abs(x), abs(y))


def compared(op: ast.cmpop, x: Fraction | None, y: Fraction | None) -> bool | None:
    """Return a comparison; None if it is unknown."""
    if x is None or y is None:
        return None
    same, less = near(x, y), x < y
    return {
        "Lt": less and not same, "LtE": less or same, "Gt": not less and not same, "GtE": not less or same,
        "Eq": same, "NotEq": not same,
    }[type(op).__name__]  # fmt: skip


def inverted(x: bool | None) -> bool | None:
    """Return not x."""
    return None if x is None else not x


def every(parts: Sequence[bool | None]) -> bool | None:
    """Return whether all hold."""
    return False if False in parts else None if None in parts else True


@dataclass
class Row:
    """A good poll: its time, the values in force, and what is special about it."""

    at: int
    sequence: int
    values: dict[str, dict[str, Fraction | None]]
    gap_from: int | None
    judged: bool
    begins: bool


@dataclass
class Oracle:
    """Judges polls one by one, each value worked out again from the rows."""

    rules: Sequence[Rule]
    texts: dict[str, tuple[str, str | None]]
    rows: list[Row] = field(default_factory=list)
    day: date | None = None
    first: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    rights: dict[str, bool] = field(default_factory=dict)
    opened: tuple[date, int] | None = None
    closed: bool = False
    hole: int | None = None
    since: dict[Any, int] = field(default_factory=dict)
    open: dict[Any, tuple[int, int]] = field(default_factory=dict)
    raised: dict[Any, int] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    feed_day: date | None = None
    feed_since: dict[str, int] = field(default_factory=dict)
    feed_open: dict[str, tuple[int, int]] = field(default_factory=dict)
    feed_raised: dict[str, int] = field(default_factory=dict)
    marker: PollMarker | None = None

    # expressions

    def value(self, tree: ast.expr, i: str, p: int, rule: Rule) -> Any:
        """Return the value of an expression for an instrument at a row ("" is the market)."""
        key = id(tree), i, p, rule.members
        if key not in self.memo:
            self.memo[key] = self._value(tree, i, p, rule), tree
        return self.memo[key][0]

    def _value(self, tree: ast.expr, i: str, p: int, rule: Rule) -> Any:
        def at(each: ast.expr, q: int = p) -> Any:
            return self.value(each, i, q, rule)

        match tree:
            case ast.Constant(value=str() as text):
                return Fraction(span_of(text))
            case ast.Constant(value=int() | float() as number):
                return Fraction(str(number))
            case ast.Name(id="quiet"):
                return self.quiet(i, p)
            case ast.Name(id=name) if name in rule.table.columns:
                number = self.level(rule, i, name)
                return None if isnan(number) else Fraction(str(number))
            case ast.Name(id=name):
                return self.rows[p].values.get(i, {}).get(name)
            case ast.UnaryOp(op=ast.Not(), operand=x):
                return inverted(at(x))
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return None if at(x) is None else -at(x)
            case ast.BoolOp(op=ast.And(), values=parts):
                return every([at(part) for part in parts])
            case ast.BoolOp(op=ast.Or(), values=parts):
                return inverted(every([inverted(at(part)) for part in parts]))
            case ast.Compare(left=left, ops=ops, comparators=rest):
                sides = [at(each) for each in (left, *rest)]
                return every([compared(op, x, y) for op, x, y in zip(ops, sides, sides[1:], strict=False)])
            case ast.BinOp(left=left, op=op, right=right):
                x, y = at(left), at(right)
                if x is None or y is None or (isinstance(op, ast.Div) and y == 0):
                    return None
                return x / y if isinstance(op, ast.Div) else getattr(x, OPERATORS[type(op).__name__])(y)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self.call(name, args, i, p, rule)
        raise AssertionError(ast.dump(tree))

    def call(self, name: str, args: list[ast.expr], i: str, p: int, rule: Rule) -> Any:
        """Return the value of a function."""

        def at(each: ast.expr, q: int = p) -> Any:
            return self.value(each, i, q, rule)

        if name in {"count", "share", "total"}:
            return self.market(name, args[0], p, rule)
        x = at(args[0])
        if name in {"abs", "min", "max"}:
            parts = [at(arg) for arg in args]
            functions: dict[str, Any] = {"abs": abs, "min": min, "max": max}
            return None if None in parts else functions[name](*parts)
        if name == "before":
            return self.before(args[0], i, p, rule)
        if name == "annulled":
            then = self.before(args[0], i, p, rule)
            return None if x is None or then is None else max(then - x, Fraction(0))
        if name in {"crossed_up", "crossed_down"}:
            up = name == "crossed_up"
            x0, y0 = (self.earlier(arg, i, p, rule) for arg in args)
            return every([compared(ast.Lt() if up else ast.Gt(), x0, y0),
                          compared(ast.GtE() if up else ast.LtE(), x, at(args[1]))])  # fmt: skip
        if name == "stepped":
            then, n = self.earlier(args[0], i, p, rule), at(args[1])
            return None if x is None or then is None else self.step(x / n) != self.step(then / n)
        if name == "percent" and not isinstance(args[1], ast.Constant):
            y = at(args[1])
            return None if x is None or not y else (x - y) / abs(y) * 100
        assert isinstance(args[1], ast.Constant)
        span, first = span_of(str(args[1].value)), self.first.get(i, p + 1) if i else 0
        start = self.rows[p].at - span
        q = max((n for n in range(p + 1) if self.rows[n].at <= start), default=-1)
        blind = q >= first and any(row.gap_from is not None and row.gap_from < start < row.at for row in self.rows[1:])
        if first > p:
            return None
        if name in {"highest", "lowest", "mean"}:
            known = [each for n in range(max(q, 0), p + 1) if (each := at(args[0], n)) is not None]
            if blind or not known:
                return None
            return {"highest": max, "lowest": min}[name](known) if name != "mean" else sum(known) / len(known)
        then = None if blind else at(args[0], max(q, first))
        if name == "ago":
            return then
        if name == "pace":
            begin, age = at(args[0], first), start - self.rows[first].at
            unknown = then is None or begin is None or age < span or then <= begin
            return None if unknown else (then - begin) * span / age
        if x is None or then is None:
            return None
        if name == "change":
            return x - then
        return None if then == 0 else (x - then) / abs(then) * 100

    @staticmethod
    def step(quotient: Fraction) -> int:
        """Return the number of whole steps."""
        return round(quotient) if near(quotient, Fraction(round(quotient))) else quotient.__floor__()

    def before(self, tree: ast.expr, i: str, p: int, rule: Rule) -> Any:
        """Return the value at the row before, after the first one."""
        return self.value(tree, i, p - 1, rule) if p > (self.first.get(i, p) if i else 0) else None

    def earlier(self, tree: ast.expr, i: str, p: int, rule: Rule) -> Any:
        """Return the same; before the first row last and closing price were the previous close."""
        if not any(isinstance(each, ast.Name | ast.Call) for each in ast.walk(tree)):
            return self.value(tree, i, p, rule)
        if not i or self.first.get(i) != p:
            return self.before(tree, i, p, rule)
        if any(isinstance(each, ast.Call) and each.func.id not in {"abs", "percent"} for each in ast.walk(tree)):  # type: ignore[attr-defined]
            return None
        yesterday = self.rows[p].values[i]["previous_close"]
        row = Row(
            0, 0, {i: dict.fromkeys(("last_price", "closing_price", "previous_close"), yesterday)}, None, True, True
        )
        other = Oracle(self.rules, self.texts, [row], first={i: 0})
        other.symbols = self.symbols
        return other.value(tree, i, 0, rule)

    def quiet(self, i: str, p: int) -> Fraction | None:
        """Return for how long an instrument has not traded."""
        begin = self.first.get(i, p + 1)
        opened = self.opened[1] if self.opened and self.opened[0] == self.day else None
        if begin > p:
            if opened is None or self.rows[p].at < opened:
                return None
            total = 0
            for q in range(p + 1):
                since = self.rows[q - 1].at if q else opened
                total += max(self.rows[q].at - max(since, opened), 0) if self.anybody(q) else 0
            return Fraction(total)
        last = max(q for q in range(begin, p + 1) if self.traded(i, q))
        return Fraction(sum(self.rows[q].at - self.rows[q - 1].at for q in range(last + 1, p + 1) if self.anybody(q)))

    def traded(self, i: str, p: int) -> bool:
        """Return whether an instrument traded between a row and the one before."""
        if self.first.get(i) == p:
            return True
        if p == 0 or self.first.get(i, p) > p:
            return False
        now, then = self.rows[p].values[i], self.rows[p - 1].values[i]
        return any((now[name] or 0) > (then[name] or 0) for name in ("volume", "trade_count"))

    def anybody(self, p: int) -> bool:
        """Return whether any instrument did."""
        key = "anybody", p
        if key not in self.memo:
            self.memo[key] = any(self.traded(i, p) for i in self.first)
        return bool(self.memo[key])

    def market(self, name: str, tree: ast.expr, p: int, rule: Rule) -> Any:
        """Return the number, the share or the sum over the instruments that a rule covers."""
        values = [self.value(tree, i, p, rule) for i in self.first if self.covered(rule, i, p)]
        known = [each for each in values if each is not None]
        if name == "total":
            return sum(known, Fraction(0))
        count = Fraction(sum(known))
        return count if name == "count" else count / len(known) if known else None

    # instruments

    def covered(self, rule: Rule, i: str, p: int) -> bool:
        """Return whether a rule covers an instrument at a row."""
        names = [symbol for row, symbol in self.symbols[i] if row <= p and symbol]
        if not names:
            return i in rule.match.instruments and rule.covers(i, "", is_right=self.rights[i])
        return any(rule.covers(i, symbol, is_right=self.rights[i]) for symbol in names)

    def level(self, rule: Rule, i: str, name: str) -> float:
        """Return an instrument's number in the rule's table."""
        symbols = [symbol for _, symbol in self.symbols[i]]
        found = next((each for each in (i, *symbols) if each in rule.table.rows), "")
        return rule.table.row(found, found)[name]

    # polls

    def take(self, past: Past, *, complete: bool = True, silent: bool = False) -> Iterator[tuple[Any, ...]]:
        """Judge a poll; yield what changes."""
        marker, events = past
        self.marker = marker
        at = millis(marker.received_at or marker.requested_at)
        day = (marker.received_at or marker.requested_at).astimezone(TEHRAN).date()
        yield from self.feed(marker, at, 0, silent=silent)
        if marker.phase is Phase.OPEN and (self.opened is None or self.opened[0] != day):
            self.opened = day, at
        if marker.outcome not in {Outcome.PUBLISHED, Outcome.UNCHANGED}:
            return
        latest = max((event.trading_day for event in events), default=None)
        if latest is not None and (self.day is None or latest > self.day):
            yield from self.end_day(at, marker)
            self.day, self.closed, self.hole = latest, False, None
            for each in (self.rows, self.first, self.symbols, self.since, self.raised, self.memo):
                each.clear()
            for rule in self.rules:
                for code in rule.match.instruments if rule.scope != "feed" else ():
                    self.symbols[code].append((0, ""))
                    self.rights[code] = False
        elif self.day is not None and day > self.day and not self.closed:
            yield from self.end_day(at, marker)
            self.closed = True
        if self.day is None:
            return
        events = [event for event in events if event.trading_day == self.day]
        p = len(self.rows)
        values = {i: dict(each) for i, each in self.rows[-1].values.items()} if self.rows else {}
        for event in events:
            self.first.setdefault(event.instrument, p)
            self.symbols[event.instrument].append((p, event.symbol))
            self.rights[event.instrument] = event.is_right
            fields = {name: getattr(event, name) for name in TradeEvent.__struct_fields__}
            values[event.instrument] = {
                name: None if each is None else Fraction(each)
                for name, each in fields.items() if each is None or type(each) is int
            }  # fmt: skip
        gaps = [millis(marker.gap_from)] if marker.gap_from else []
        gaps += [self.hole] if self.hole is not None else []
        if complete:
            self.hole = None
        elif self.hole is None:
            self.hole = self.rows[-1].at if self.rows else at
        gap = min(gaps) if gaps and complete and p else None
        self.rows.append(Row(at, marker.poll_sequence, values, gap, complete, day == self.day and not self.closed))
        if complete:
            yield from self.judge(p, silent=silent)
        if marker.day_final and day == self.day:
            yield from self.end_day(at, marker)
            self.closed = True

    def end_day(self, at: int, marker: PollMarker) -> Iterator[tuple[Any, ...]]:
        """Resolve what is open."""
        for (name, i), (since, _) in self.open.items():
            yield "RESOLVED", name, i, marker.poll_sequence, since, at, "DAY_END"
        self.open.clear()

    def judge(self, p: int, *, silent: bool) -> Iterator[tuple[Any, ...]]:
        """Judge the instrument and market rules at a row."""
        row = self.rows[p]
        clock = datetime.fromtimestamp(row.at / 1000, TEHRAN)
        ms = millis(clock) - millis(clock.replace(hour=0, minute=0, second=0, microsecond=0))
        for rule in self.rules:
            if rule.scope == "feed":
                continue
            who = [""] if rule.scope == "market" else [i for i in self.symbols if self.covered(rule, i, p)]
            when, until = self.texts[rule.name]
            for i in who:
                key = rule.name, i or None
                true = self.value(tree_of(when), i, p, rule)
                moment = until is None and any(each in when for each in ("crossed", "annulled", "stepped"))
                over = true is not True if moment else (
                    true is False if until is None else self.value(tree_of(until), i, p, rule) is True)  # fmt: skip
                begins = true is True and not over and row.begins
                if not begins:
                    self.since.pop(key, None)
                elif row.gap_from is not None or key not in self.since:
                    self.since[key] = row.at
                if silent:
                    continue
                if over and key in self.open:
                    yield "RESOLVED", *key, row.sequence, self.open.pop(key)[0], row.at, "CONDITION"
                low, high = rule.active or (0, DAY_MS)
                if (
                    begins and key not in self.open and row.at - self.since[key] >= rule.hold
                    and (key not in self.raised or row.at - self.raised[key] >= rule.cooldown)
                    and not (rule.once and key in self.raised) and low <= ms < high
                ):  # fmt: skip
                    self.open[key], self.raised[key] = (self.since[key], row.at), row.at
                    yield "FIRING", *key, row.sequence, self.since[key], row.at, None

    def feed(self, marker: PollMarker, at: int, silence: int, *, silent: bool = False) -> Iterator[tuple[Any, ...]]:
        """Judge the feed rules at a marker, or by the clock."""
        day = marker.requested_at.astimezone(TEHRAN).date()
        state = marker.feed_state.value
        holds = {
            "bad": (state in {"DOWN", "STALE"}, state not in {"DOWN", "STALE"}),
            "silent": (silence >= 180_000, silence == 0 and state != "DOWN"),
        }
        if day != self.feed_day:
            for name, (since, _) in self.feed_open.items():
                why = "CONDITION" if name in holds and holds[name][1] else "DAY_END"
                yield "RESOLVED", name, None, marker.poll_sequence, since, at, why
            self.feed_day = day
            for each in (self.feed_open, self.feed_since, self.feed_raised):
                each.clear()
        for rule in self.rules:
            if rule.scope != "feed":
                continue
            true, over = holds[rule.name]
            if not true or over:
                self.feed_since.pop(rule.name, None)
            else:
                self.feed_since.setdefault(rule.name, at)
            if silent:
                continue
            if over and rule.name in self.feed_open:
                since, _ = self.feed_open.pop(rule.name)
                yield "RESOLVED", rule.name, None, marker.poll_sequence, since, at, "CONDITION"
            elif (
                rule.name in self.feed_since and rule.name not in self.feed_open
                and at - self.feed_since[rule.name] >= rule.hold
                and (rule.name not in self.feed_raised or at - self.feed_raised[rule.name] >= rule.cooldown)
            ):  # fmt: skip
                self.feed_open[rule.name] = self.feed_since[rule.name], at
                self.feed_raised[rule.name] = at
                yield "FIRING", rule.name, None, marker.poll_sequence, self.feed_since[rule.name], at, None

    def adopt(self, published: Sequence[PriceAlert], at: int, sequence: int) -> Iterator[tuple[Any, ...]]:
        """Continue the published episodes; end those that no rule covers."""
        last: dict[Any, PriceAlert] = {}
        scopes = {(rule.name, rule.scope): rule for rule in self.rules}
        for alert in published:
            key = alert.rule, alert.instrument
            last[*key, alert.scope] = alert
            rule = scopes.get((alert.rule, alert.scope.value.lower()))  # type: ignore[arg-type]
            since, raised = millis(alert.since), millis(alert.raised_at)
            if alert.scope is Scope.FEED and rule is not None and alert.trading_day == self.feed_day:
                self.feed_open.pop(alert.rule, None)
                if alert.state is AlertState.FIRING:
                    self.feed_open[alert.rule], self.feed_raised[alert.rule] = (since, raised), raised
            elif alert.scope is not Scope.FEED and rule is not None and alert.trading_day == self.day:
                i = alert.instrument
                if i is not None and not (i in self.symbols and self.covered(rule, i, len(self.rows) - 1)):
                    continue
                self.open.pop(key, None)
                if alert.state is AlertState.FIRING:
                    self.open[key], self.raised[key] = (since, raised), raised
        for (name, i, scope), alert in last.items():
            kept = name in self.feed_open if scope is Scope.FEED else (name, i) in self.open
            if alert.state is AlertState.FIRING and not kept:
                today = self.feed_day if scope is Scope.FEED else self.day
                why = "RULE_REMOVED" if alert.trading_day == today else "DAY_END"
                yield "RESOLVED", name, i, sequence, millis(alert.since), at, why


# --- comparing --------------------------------------------------------------------------------------------------------


def seen(alert: PriceAlert) -> tuple[Any, ...]:
    """Return of an alert what is compared."""
    return (
        alert.state.value, alert.rule, alert.instrument, alert.poll_sequence, millis(alert.since),
        millis(alert.raised_at), alert.resolved_by and alert.resolved_by.value,
    )  # fmt: skip


def oracle_of(rules: Sequence[Rule], text: str) -> Oracle:
    """Return the second implementation of the rules of a text."""
    found = {}
    for line in text.splitlines():
        if name := re.search(r"name: ([\w-]+)", line):
            when, until = (
                re.search(rf'{key}: (?:"([^"]*)"|([^",}}]*(?:\([^)]*\))?[^",}}]*))', line) for key in ("when", "until")
            )
            assert when
            found[name[1]] = when[1] or when[2], (until[1] or until[2]) if until else None
    return Oracle(rules, found)


def ordered(some: Any) -> list[Any]:
    """Return in an order that does not depend on the implementation."""
    return sorted(some, key=repr)


def differences(rules: Sequence[Rule], text: str, polls: Sequence[tuple[Past, bool]]) -> int:
    """Judge polls live with both; return how many alerts agreed. They must agree after each poll."""
    engine, oracle = Engine(rules), oracle_of(rules, text)
    engine.open()
    total = 0
    for past, complete in polls:
        poll = Poll(past.marker, columns_of(past.events, engine.columns), complete=complete)
        ours, theirs = ordered(map(seen, engine.take(poll))), ordered(oracle.take(past, complete=complete))
        assert ours == theirs, (past.marker.poll_sequence, *(set(ours) ^ set(theirs)))
        total += len(ours)
    return total


def real(path: Path, every_: int) -> list[tuple[Past, bool]]:
    """Return the polls of a real day, with every so many instruments."""
    replay = Replay()
    replay.day(path)
    codes = sorted({event.instrument for event in replay.events})[::every_]
    keep = {*codes, *(event.instrument for event in replay.events if event.symbol in {"فولاد", "شپنا", "خودرو"})}
    return [(past, True) for past in polls_of(event for event in replay.events if event.instrument in keep)]


@pytest.mark.parametrize("path", [REAL_DAY, OTHER_DAY], ids=["2019-08-21", "2019-08-24"])
def test_real_days(path: Path, tmp_path: Path) -> None:
    """Poll by poll, with a gap of half an hour in the middle."""
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    polls = real(path, 12)
    middle = len(polls) // 2
    past, _ = polls[middle]
    gap_from = polls[middle - 1][0].marker.received_at
    polls[middle] = Past(structs.replace(past.marker, gap_from=gap_from), past.events), True
    assert differences(rules_of(tmp_path), RULES, polls) > 500


# --- generated days ---------------------------------------------------------------------------------------------------

CODES = ("IRO1TEST0001", "IRO1TEST0002", "IRO3TEST0003")
PRICES = st.sampled_from([None, 930, 960, 990, 1000, 1020, 1040, 1050])


class Days(list[tuple[Past, bool]]):
    """Polls, and whether each is complete."""

    def __repr__(self) -> str:
        """Return a short text."""
        return f"{len(self)} polls"


@st.composite
def days(draw: st.DrawFn) -> Days:
    """Return polls of up to three days: gaps, failures, incomplete polls, renames, annulments, corrections."""
    at = datetime(2019, 8, 24, 4, 25, tzinfo=UTC)
    day, totals = date(2019, 8, 24), dict.fromkeys(CODES, 0)
    polls = Days()
    symbols = dict(zip(CODES, ("الف", "ب", "پ"), strict=True))
    sequences = dict.fromkeys(CODES, 0)
    last_good = None
    for sequence in range(1, draw(st.integers(4, 22))):
        at += timedelta(seconds=draw(st.sampled_from([60, 60, 60, 61, 120, 400])))
        if draw(st.integers(0, 11)) == 0:
            # The next day: first perhaps a poll with yesterday's rows, corrected before the open.
            at = at.replace(hour=draw(st.sampled_from([4, 20])), minute=20) + timedelta(days=1)
            if draw(st.booleans()):
                day = at.astimezone(TEHRAN).date()
                totals, sequences = dict.fromkeys(CODES, 0), dict.fromkeys(CODES, 0)
        outcome = draw(st.sampled_from([Outcome.PUBLISHED] * 5 + [Outcome.UNCHANGED, Outcome.FAILED]))
        events = []
        for code in CODES if outcome is Outcome.PUBLISHED else ():
            if draw(st.booleans()):
                continue
            if draw(st.integers(0, 9)) == 0:
                symbols[code] = draw(st.sampled_from(["الف", "ب", "پ", "ت"]))
            totals[code] = max(0, totals[code] + draw(st.sampled_from([0, 10, 50, 400, -10, -30])))
            sequences[code] += 1
            events.append(_event(code, symbols[code], sequences[code], sequence, at, day, totals[code], draw))
        gap = last_good if draw(st.integers(0, 6)) == 0 else None
        marker = PollMarker(
            poll_sequence=sequence, simulated=False, source="t", outcome=outcome,
            phase=draw(st.sampled_from([Phase.OPEN, Phase.OPEN, Phase.PRE_OPEN])),
            feed_state=draw(st.sampled_from([FeedState.FRESH, FeedState.DOWN, FeedState.STALE])),
            requested_at=at, received_at=at if outcome is not Outcome.FAILED else None,
            next_poll_at=at + timedelta(minutes=1), day_final=draw(st.integers(0, 20)) == 0, gap_from=gap,
            rows=0, opened=0, traded=len(events), revised=0, cancelled=0, stale_rows=0, rejected_rows=0,
            duplicate_rows=0, charged_calls=1,
        )  # fmt: skip
        if outcome is not Outcome.FAILED:
            last_good = at
        polls.append((Past(marker, events), draw(st.integers(0, 12)) > 0))
    return polls


def _event(
    code: str, symbol: str, sequence: int, poll: int, at: datetime, day: date, volume: int, draw: st.DrawFn
) -> TradeEvent:
    last, closing = draw(PRICES), draw(PRICES)
    return trade(
        instrument=code, symbol=symbol, sequence=sequence, poll_sequence=poll, observed_at=at, traded_at=at,
        trading_day=day, last_price=last, closing_price=closing, previous_close=draw(st.sampled_from([1000, 1000, 0, None])),
        open_price=1000, high_price=last, low_price=last, volume=volume, value=volume * 1000,
        trade_count=volume // 10 + draw(st.integers(0, 2)), market_value=draw(st.sampled_from([None, 10**16 + 1])),
        shares_outstanding=draw(st.sampled_from([None, 0, 10**6])),
    )  # fmt: skip


GENERATED = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> list[Rule]:
    """Return the rules."""
    return rules_of(tmp_path_factory.mktemp("rules"))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> list[Rule]:
    """Return the rules after an edit, of the table as well."""
    return rules_of(tmp_path_factory.mktemp("edited"), EDITED, LEVELS.replace("الف;۱٬۰۰۰", "الف;980\nپ;1,000"))


@GENERATED
@given(days())
def test_generated_days(rules: list[Rule], polls: Days) -> None:
    """Poll by poll, over days, midnights, gaps, renames and incomplete polls."""
    differences(rules, RULES, polls)


@GENERATED
@given(days())
def test_judging_many_rows_at_once_gives_the_same_alerts(rules: list[Rule], polls: Days) -> None:
    """In every field, messages included: a trial says what happens live."""
    live, deferred = Engine(rules), Engine(rules)
    ours, theirs = list[PriceAlert](), list[PriceAlert]()
    for past, complete in polls:
        poll = Poll(past.marker, columns_of(past.events, live.columns), complete=complete)
        ours += live.take(poll)
        theirs += deferred.take(poll, defer=True)
    theirs += deferred.finish()
    assert ordered(ours) == ordered(theirs)


@GENERATED
@given(days(), st.data())
def test_a_restart_at_any_poll_changes_nothing(rules: list[Rule], polls: Days, data: st.DataObject) -> None:
    """The day is rebuilt silently, the open episodes come from the published alerts: the rest is the same."""
    cut = data.draw(st.integers(0, len(polls)))
    whole = Engine(rules)
    taken = [whole.take(Poll(past.marker, columns_of(past.events, whole.columns), complete=ok)) for past, ok in polls]
    again = Engine(rules)
    again.open(alert for alerts in taken[:cut] for alert in alerts)
    day = polls[cut - 1][0].marker.requested_at.astimezone(TEHRAN).date() if cut else None
    for n, (past, ok) in enumerate(polls):
        if n < cut and past.marker.requested_at.astimezone(TEHRAN).date() != day:
            continue  # the runner replays the day under way
        found = again.take(Poll(past.marker, columns_of(past.events, again.columns), replay=n < cut, complete=ok))
        if n >= cut:
            assert ordered(found) == ordered(taken[n]), n


@GENERATED
@given(days(), st.data())
def test_rules_and_tables_edited_at_any_poll(
    rules: list[Rule], edited: list[Rule], polls: Days, data: st.DataObject
) -> None:
    """Open episodes continue or end at the next poll, new rules judge from there, what is gone is resolved."""
    cut = data.draw(st.integers(0, len(polls)))
    before = Engine(rules)
    published = [
        alert for past, ok in polls[:cut]
        for alert in before.take(Poll(past.marker, columns_of(past.events, before.columns), complete=ok))
    ]  # fmt: skip
    after, oracle = Engine(edited), oracle_of(edited, EDITED)
    after.open(published)
    for n, (past, ok) in enumerate(polls):
        found = after.take(Poll(past.marker, columns_of(past.events, after.columns), replay=n < cut, complete=ok))
        expected = list[Any]()
        if n == cut:
            at = millis(past.marker.received_at or past.marker.requested_at)
            expected += oracle.adopt(published, at, past.marker.poll_sequence)
        expected += oracle.take(past, complete=ok, silent=n < cut)
        if n >= cut:
            assert ordered(map(seen, found)) == ordered(expected), n
    open_ = {alert.alert_id for alert in published if alert.state is AlertState.FIRING}
    assert len({(alert.alert_id, alert.state) for alert in published}) == len(published), open_
