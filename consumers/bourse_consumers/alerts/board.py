"""The trading day as matrices of polls x instruments, and the past of what rules look back at. Pure.

A row is a good poll, every column of it is filled: an instrument without an event keeps its values. NaN is unknown.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from bourse_consumers.alerts.expressions import Needs, Node

__all__ = ["EXACT", "NEVER", "Board", "Named", "View"]

NEVER = 2**31 - 1
EXACT = 2**53
ALWAYS = ("last_price", "previous_close", "traded_at")


class Named(NamedTuple):
    """What an instrument is called from a poll on."""

    row: int
    symbol: str | None
    title: str | None
    is_right: bool


class Board:
    """The day so far. `needs` says which columns and whose past are kept."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.columns = {name: n for n, name in enumerate(sorted(needs.columns.union(ALWAYS)))}
        # Per members of a market rule: the instruments, and the row from which each is one.
        self.members: dict[str, tuple[Any, Any]] = {}
        self.day: date | None = None
        self.clear()

    def clear(self, day: date | None = None, opened: int | None = None) -> None:
        """Forget the day; `opened` is the time of the new day's first marker of an open session, if there was one."""
        self.day, self.opened = day, opened
        self.rows, self.index, self.codes = 0, dict[str, int](), list[str]()
        self.names: list[list[Named]] = []
        self.times, self.sequences = np.zeros(0, np.int64), list[int]()
        self.first = np.zeros(0, np.int64)
        self.data = np.zeros((len(self.columns), 0, 0))
        self.past: dict[str, Any] = {}
        # The gaps before rows, in which polls were missed, and the rows that come after one.
        self.gaps: list[tuple[int, int]] = []
        self.torn: set[int] = set()
        # What a float does not hold: per column and instrument the rows and whole numbers.
        self._exact: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._absent = 0.0
        self.cache: dict[Any, Any] = {}

    def known(self, code: str, symbol: str | None, title: str | None, *, is_right: bool) -> int:
        """Return the place of an instrument; one that has no event yet is unknown in every column."""
        if (at := self.index.get(code)) is None:
            at = self.index[code] = len(self.codes)
            self.codes.append(code)
            self.names.append([Named(0, symbol, title, is_right)])
            self._room(self.rows, len(self.codes))
        return at

    def append(
        self, time: int, sequence: int, events: Mapping[str, Sequence[Any]], gap_from: int | None = None
    ) -> list[int]:
        """Add a row; return the instruments that are new or have another symbol.

        `events` has, per column of TradeEvent, the values of the poll's events. An instrument may have two in one poll
        (it was opened and changed): the last one counts.
        """
        row, changed = self.rows, list[int]()
        at: list[int] = []
        for code, symbol, title, right in zip(
            events.get("instrument", ()), events.get("symbol", ()), events.get("title", ()), events.get("is_right", ()),
            strict=True,
        ):  # fmt: skip
            i = self.known(code, symbol, title, is_right=right)
            at.append(i)
            renamed = self.names[i][-1].symbol != symbol
            if renamed:
                self.names[i].append(Named(row, symbol, title, right))
            if renamed or self.first[i] == NEVER:
                changed.append(i)
            self.first[i] = min(self.first[i], row)
        self._room(row + 1, len(self.codes))
        self.data[:, row] = self.data[:, row - 1] if row else np.nan
        for name, n in self.columns.items():
            if at:
                values = np.asarray(events[name], float)
                self.data[n, row, at] = values
                if (np.abs(values) >= EXACT).any():
                    for i, value in zip(at, events[name], strict=True):
                        if value is not None and abs(value) >= EXACT:
                            self._exact.setdefault((name, i), []).append((row, int(value)))
        self.times[row] = max(time, int(self.times[row - 1])) if row else time
        self.sequences.append(sequence)
        if gap_from is not None and row:
            self.gaps.append((gap_from, int(self.times[row])))
            self.torn.add(row)
        self.rows += 1
        return changed

    def advance(self, a: int, b: int) -> None:
        """Work out, for the rows a to b, the past that rules will look back at."""
        self.cache.clear()
        view, n = View(self, a, b), len(self.codes)
        for key, (node, members) in self.needs.past.items():
            matrix = self.past[key]
            matrix[a:b] = np.nan
            if node is None:
                self._quiet(matrix, a, b)
            else:
                matrix[a:b, : 1 if members is not None else n] = node.run(view)

    def exact(self, name: str, row: int, i: int) -> int | None:
        """Return a column's value of one row and instrument as the whole number it was; None if it is unknown."""
        value = self.data[self.columns[name], row, i]
        if np.isnan(value) or abs(value) < EXACT:
            return None if np.isnan(value) else int(value)
        kept = self._exact[name, i]
        return kept[bisect_right(kept, row, key=lambda each: each[0]) - 1][1]

    def named(self, i: int, row: int) -> Named:
        """Return what an instrument was called at a row."""
        kept = self.names[i]
        return kept[max(bisect_right(kept, row, key=lambda each: each.row) - 1, 0)]

    def _room(self, rows: int, instruments: int) -> None:
        """Make room. What is not used yet is left untouched, so that it costs no memory."""
        _, p, n = self.data.shape
        if rows <= p and instruments <= n:
            return
        p2 = p if rows <= p else max(rows, 64, p * 3 // 2)
        n2 = n if instruments <= n else max(instruments, 64, n * 5 // 4)

        def larger(old: Any, width: int) -> Any:
            new = np.empty((*old.shape[:-2], p2, width))
            new[..., : self.rows, old.shape[-1] :] = np.nan
            new[..., : self.rows, : old.shape[-1]] = old[..., : self.rows, :]
            return new

        self.data = larger(self.data, n2)
        if p2 > p:
            self.times = np.concatenate([self.times, np.zeros(p2 - p, np.int64)])
        self.first = np.concatenate([self.first, np.full(n2 - n, NEVER)])
        for key, (_, members) in self.needs.past.items():
            self.past[key] = larger(self.past.get(key, np.zeros((0, 0))), 1 if members is not None else n2)

    def _quiet(self, quiet: Any, a: int, b: int) -> None:
        """Per row, for how long each instrument has not traded, counting the time in which any did."""
        volume, count = (self.data[self.columns[name]] for name in ("volume", "trade_count"))
        n = len(self.codes)
        for row in range(a, b):
            opened = self.first[:n] == row
            if row:
                risen = (volume[row, :n] > volume[row - 1, :n]) | (count[row, :n] > count[row - 1, :n])
                traded, begin = risen | opened, self.times[row - 1]
                before = quiet[row - 1, :n]
            else:
                traded, begin, before = opened, self.times[0] if self.opened is None else self.opened, np.nan
            passed = max(self.times[row] - begin, 0) if traded.any() else 0
            quiet[row, :n] = np.where(traded, 0, before + passed)
            # An instrument without an event has been quiet since the session opened.
            absent = np.nan
            if self.opened is not None and self.times[row] >= self.opened:
                self._absent += max(self.times[row] - max(begin, self.opened), 0) if traded.any() else 0
                absent = self._absent
            quiet[row, :n] = np.where(self.first[:n] > row, absent, quiet[row, :n])


class View:
    """What an expression sees: the rows a to b of some instruments, one column for each of a group's pairs."""

    numbers: Any = None

    def __init__(self, board: Board, a: int, b: int, at: Any = None, *, market: bool = False) -> None:
        self.board, self.a, self.b, self.at, self.market = board, a, b, at, market
        self.first = np.zeros(1, np.int64) if market else board.first[: len(board.codes)]
        self.rows = np.arange(a, b)[:, None]

    def column(self, name: str) -> Any:
        """Return a column of TradeEvent."""
        return self._of(self.board.data[self.board.columns[name], self.a : self.b, : len(self.board.codes)])

    def past(self, key: str) -> Any:
        """Return what the board worked out."""
        return self._of(self.board.past[key][self.a : self.b, : len(self.board.codes)])

    def members(self, key: str) -> tuple[View, Any]:
        """Return the view of a market rule's instruments, and where each is one of them."""
        at, since = self.board.members[key]
        return View(self.board, self.a, self.b, at), since <= self.rows

    def shared(self, key: str, members: str | None, work: Callable[[View], Any]) -> Any:
        """Return what is worked out once for all instruments and rules."""
        place = key, self.a, self.b
        if place not in self.board.cache:
            self.board.cache[place] = work(View(self.board, self.a, self.b, market=members is not None))
        value = self.board.cache[place]
        return value if members is not None else self._of(value)

    def matrix(self, key: str) -> Any:
        """Return all rows of a column, or of what the board worked out."""
        board = self.board
        found = board.data[board.columns[key]] if key in board.columns else board.past[key]
        return found[:, : len(self.first)]

    def _of(self, matrix: Any) -> Any:
        return matrix if self.at is None else np.take(matrix, self.at, axis=1)

    def _gather(self, matrix: Any, rows: Any) -> Any:
        """Return the values of those rows, the instrument's first if it came later; NaN before it came."""
        place = np.maximum(rows, self.first)
        known = place <= self.rows
        return np.where(known, matrix[np.where(known, place, 0), np.arange(len(self.first))], np.nan)

    def before(self, x: Node, *, opening: bool) -> Any:
        """Return the values of x at the rows before.

        With `opening` the value before an instrument's first row is what x would have been the day before.
        """
        board, n = self.board, len(self.first)
        earlier = View(board, max(self.a - 1, 0), self.b - 1, market=self.market)
        value = np.full((self.b - self.a, n), np.nan)
        if earlier.b > earlier.a:
            value[earlier.a - earlier.b :] = x.run(earlier)
        value = np.where(self.rows > self.first, value, np.nan)
        if opening and not self.market:
            value = np.where(self.rows == self.first, x.run(_Opening(self)), value)
        return value

    def _begin(self, ms: int) -> tuple[Any, Any]:
        """Return the row in force when each window begins (-1: none yet), and whether that is inside a gap."""
        begins = self.board.times[self.a : self.b] - ms
        rows = np.searchsorted(self.board.times[: self.b], begins, "right") - 1
        blind = np.zeros(len(rows), bool)
        for begin, end in self.board.gaps:
            blind |= (begin < begins) & (begins < end)
        return rows[:, None], blind[:, None]

    def ago(self, matrix: Any, ms: int) -> Any:
        """Return the value that was in force `ms` ago, or the first of the day."""
        rows, blind = self._begin(ms)
        return np.where(blind & (rows >= self.first), np.nan, self._gather(matrix, rows))

    def over(self, matrix: Any, ms: int, name: str) -> Any:
        """Return the highest, lowest or mean of the values in force in the window, its begin and now included."""
        rows, blind = self._begin(ms)
        out = np.full((self.b - self.a, len(self.first)), np.nan)
        for n, low in enumerate(np.maximum(rows[:, 0], 0)):
            part = matrix[low : self.a + n + 1]
            if name == "mean":
                known = np.sum(~np.isnan(part), axis=0)
                out[n] = np.nansum(part, axis=0) / np.where(known, known, np.nan)
            else:
                out[n] = (np.fmax if name == "highest" else np.fmin).reduce(part, axis=0)
        return np.where(blind & (rows >= self.first), np.nan, out)

    def pace(self, matrix: Any, ms: int) -> Any:
        """Return what a window brought on average since the instrument's first row of the day, before this window."""
        times = self.board.times
        first = self._gather(matrix, self.first)
        age = times[self.a : self.b, None] - ms - times[np.minimum(self.first, self.b - 1)]
        brought = self.ago(matrix, ms) - first
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((age >= ms) & (brought > 0), brought * ms / age, np.nan)


class _Opening:
    """What was known before the day's first event: last and closing price were the previous close."""

    def __init__(self, view: View) -> None:
        self._view = view

    def column(self, name: str) -> Any:
        if name in {"last_price", "closing_price", "previous_close"}:
            return self._view.column("previous_close")
        return np.full((1, 1), np.nan)

    def past(self, _key: str) -> Any:
        return np.full((1, 1), np.nan)

    def shared(self, _key: str, _members: str | None, _work: Callable[[View], Any]) -> Any:
        return np.full((1, 1), np.nan)

    def members(self, _key: str) -> tuple[_Opening, Any]:
        return self, np.full((1, 1), fill_value=False)
