"""A rule as it is judged: which instruments it covers, its conditions and its texts. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import Any

from bourse_consumers.alerts.expressions import Expression, Needs, Scope
from bourse_consumers.alerts.messages import LANGUAGES, Part, Texts, described
from bourse_schemas.events import Severity, tidy

CODE = re.compile(r"[A-Z0-9]{12}")
# By the first four letters of the code.
MARKETS = {
    "bourse": ("IRO1",), "farabourse": ("IRO3",), "base": ("IRO5", "IRO7"),
    "rights": ("IRR1", "IRR3", "IRR5", "IRR7"),
    "funds": ("IRT1", "IRT3"),
}  # fmt: skip


@lru_cache(1 << 16)
def form(text: str) -> str:
    """Return what two spellings of one symbol have in common: NFKC, digits, no invisible marks, no tatweel."""
    text = tidy(unicodedata.normalize("NFKC", text).replace("\u0640", "")).replace("\u200c", "")
    return text.upper() if text.isascii() else text


@lru_cache(4096)
def _pattern(pattern: str) -> Any:
    return re.compile(translate(pattern)).match


@dataclass(frozen=True, slots=True)
class Match:
    """Which instruments: named by code, symbol or pattern, of these markets, rights or not; all if nothing is given.

    Symbols and patterns are in matching form.
    """

    instruments: frozenset[str] = frozenset()
    symbols: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    markets: tuple[str, ...] = ()
    rights: bool | None = None

    @property
    def names(self) -> bool:
        """Return whether instruments are named."""
        return bool(self.instruments or self.symbols or self.patterns)

    def named(self, code: str, symbol: str) -> bool:
        """Return whether a code or symbol is named."""
        if code in self.instruments or symbol in self.symbols:
            return True
        return any(_pattern(pattern)(text) for pattern in self.patterns for text in (code, symbol))

    def every(self, code: str, symbol: str, *, is_right: bool) -> bool:
        """Return whether all that is given holds."""
        return (
            (not self.names or self.named(code, symbol))
            and (not self.markets or code.startswith(self.markets))
            and self.rights in {None, is_right}
        )

    def some(self, code: str, symbol: str, *, is_right: bool) -> bool:
        """Return whether anything that is given holds."""
        return self.named(code, symbol) or code.startswith(self.markets or ("\0",)) or self.rights == is_right


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers per instrument: `rows` by code or symbol in matching form, each with a number per column."""

    columns: tuple[str, ...] = ()
    rows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def row(self, code: str, symbol: str) -> dict[str, float]:
        """Return the numbers of an instrument by column."""
        found = self.rows.get(code) or self.rows.get(symbol) or (float("nan"),) * len(self.columns)
        return dict(zip(self.columns, found, strict=True))


@dataclass(frozen=True)
class Rule:
    """A rule, read and checked. Times are milliseconds; `active` are those of the Tehran day, the end excluded.

    `numbers` are what is in the places of its expressions, of `when` and `until` the first `places` ones.
    """

    name: str
    when: Expression
    until: Expression | None = None
    scope: Scope = "instrument"
    title: str | None = None
    hold: int = 0
    cooldown: int = 0
    once: bool = False
    active: tuple[int, int] | None = None
    match: Match = field(default_factory=Match)
    excluded: Match | None = None
    table: Table = field(default_factory=Table)
    severity: Severity = Severity.INFO
    labels: Mapping[str, str] = field(default_factory=dict)
    channels: Sequence[str] = ()
    texts: Texts = field(default_factory=dict)
    numbers: Sequence[float | str] = ()
    places: int = 0
    needs: Needs = field(default_factory=Needs)
    members: str = ""

    @cached_property
    def fixed(self) -> tuple[float, ...]:
        """Return the numbers of its conditions if they are the same for every instrument."""
        return () if self.table.columns else tuple(self.numbers[: self.places])  # type: ignore[arg-type]

    @property
    def parts(self) -> list[tuple[tuple[str, str, int], Part]]:
        """Return the parts of its texts with their language, state and number."""
        texts = [((language, state), parts) for language, by in self.texts.items() for state, parts in by.items()]
        return [((*place, n), part) for place, parts in texts for n, part in enumerate(parts)]

    @cached_property
    def shape(self) -> Any:
        """Return what rules have in common whose values are worked out together."""
        if self.scope != "instrument":
            return self.name
        parts = tuple((place, part.expression.node.key) for place, part in self.parts if part.expression)
        return len(self.numbers), *(side.node.key for side in self.when.sides), parts

    @cached_property
    def phrases(self) -> dict[str, list[tuple[str, str]]]:
        """Return per language each compared quantity in words, and how it is printed."""
        return {language: [described(side, language) for side in self.when.sides] for language in LANGUAGES}

    @property
    def momentary(self) -> bool:
        """Return whether it can hold for one poll only, and ends with the next."""
        return self.until is None and self.when.node.momentary

    def covers(self, code: str, symbol: str, *, is_right: bool) -> bool:
        """Return whether the rule is about an instrument; the symbol is in matching form."""
        return self.match.every(code, symbol, is_right=is_right) and not (
            self.excluded and self.excluded.some(code, symbol, is_right=is_right)
        )
