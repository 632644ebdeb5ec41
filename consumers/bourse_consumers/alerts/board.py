"""The trading day as matrices of polls x instruments, and the past of what rules look back at. Pure.

A row is a good poll, every column of it is filled: an instrument without an event keeps its values. NaN is unknown.
Rows that no rule looks back at any more are dropped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from bourse_consumers.alerts.expressions import Needs, Node, Past

NEVER = 2**31 - 1
EXACT = 2**53
SPARE = 32
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
        self.clear()

    def clear(self, day: date | None = None, opened: int | None = None) -> None:
        """Forget the day; `opened` is the time of the new day's first marker of an open session, if there was one."""
        self.day, self.opened = day, opened
        self.rows, self.index, self.codes = 0, dict[str, int](), list[str]()
        self.names: list[list[Named]] = []
        self.times, self.sequences = np.zeros(0, np.int64), list[int]()
        self.first = np.zeros(0, np.int64)
        # The row that the matrices begin with.
        self.base = 0
        self.data = np.zeros((len(self.columns), 0, 0))
        self.past: dict[str, Any] = {}
        self.firsts: dict[str, Any] = {}
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
        row, changed, at = self.rows, list[int](), list[int]()
        who: Any = [events.get(name, ()) for name in ("instrument", "symbol", "title", "is_right")]
        for code, symbol, title, right in zip(*who, strict=True):
            i = self.known(code, symbol, title, is_right=right)
            at.append(i)
            renamed = self.names[i][-1].symbol != symbol
            if renamed:
                self.names[i].append(Named(row, symbol, title, right))
            if renamed or self.first[i] == NEVER:
                changed.append(i)
            self.first[i] = min(self.first[i], row)
        self._room(row + 1, len(self.codes))
        here = row - self.base
        self.data[:, here] = self.data[:, here - 1] if row else np.nan
        for name, n in self.columns.items() if at else ():
            values = np.asarray(events[name], float)
            self.data[n, here, at] = values
            for k in np.flatnonzero(np.abs(values) >= EXACT).tolist():
                self._exact.setdefault((name, at[k]), []).append((row, int(events[name][k])))
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
        view, rows, n = View(self, a, b), slice(a - self.base, b - self.base), len(self.codes)
        for key, (node, members) in self.needs.past.items():
            if node is None:
                self._quiet(self.past[key], a, b)
            else:
                self.past[key][rows] = np.nan
                self.past[key][rows, : n if members is None else 1] = node.run(view)
        for key in self.needs.firsts:
            market = self.needs.past.get(key, Past(None)).members is not None
            view = View(self, a, b, market=market)
            new = np.flatnonzero((view.first >= a) & (view.first < b))
            self.firsts[key][new] = view.matrix(key)[view.first[new] - self.base, new]

    def trim(self) -> None:
        """Drop rows before all windows, if they are many."""
        last = max(self.rows - 2 - self.needs.steps, 0)
        begin = np.searchsorted(self.times[: self.rows], self.times[last] - self.needs.window, "right")
        drop = min(int(begin) - 1, last) - self.base
        if drop >= SPARE:
            for matrices in (self.data, *self.past.values()):
                matrices[..., : self.rows - self.base - drop, :] = matrices[..., drop : self.rows - self.base, :]
            self.base += drop

    def exact(self, name: str, row: int, i: int) -> int:
        """Return a column's value that a float does not hold, as the whole number it was."""
        kept = self._exact[name, i]
        return kept[bisect_right(kept, row, key=lambda each: each[0]) - 1][1]

    def named(self, i: int, row: int) -> Named:
        """Return what an instrument was called at a row."""
        kept = self.names[i]
        return kept[0] if len(kept) == 1 else kept[max(bisect_right(kept, row, key=lambda each: each.row) - 1, 0)]

    def _room(self, rows: int, instruments: int) -> None:
        """Make room. What is not used yet is left untouched, so that it costs no memory."""
        _, p, n = self.data.shape
        used = self.rows - self.base
        if rows > len(self.times):
            self.times = np.concatenate([self.times, np.zeros(max(rows, SPARE), np.int64)])
        if rows - self.base <= p and instruments <= n:
            return
        p2 = max(p, min(rows - self.base, 1) * max(SPARE * 2, p * 3 // 2)) if rows - self.base > p else p
        n2 = n if instruments <= n else max(instruments, SPARE, n * 5 // 4)

        def larger(old: Any, width: int) -> Any:
            new = np.empty((*old.shape[:-2], p2, width))
            new[..., :used, old.shape[-1] :] = np.nan
            new[..., :used, : old.shape[-1]] = old[..., :used, :]
            return new

        self.data = larger(self.data, n2)
        self.first = np.concatenate([self.first, np.full(n2 - n, NEVER)])
        for key, (_, members) in self.needs.past.items():
            self.past[key] = larger(self.past.get(key, np.zeros((0, 0))), n2 if members is None else 1)
        for key in self.needs.firsts:
            self.firsts[key] = np.append(self.firsts.get(key, ()), np.full(n2 - n, np.nan))

    def _quiet(self, quiet: Any, a: int, b: int) -> None:
        """Per row, for how long each instrument has not traded, counting the time in which any did."""
        volume, count = (self.data[self.columns[name]] for name in ("volume", "trade_count"))
        n = len(self.codes)
        for row in range(a, b):
            here = row - self.base
            traded = self.first[:n] == row
            if row:
                risen = (volume[here, :n] > volume[here - 1, :n]) | (count[here, :n] > count[here - 1, :n])
                traded, begin, before = risen | traded, self.times[row - 1], quiet[here - 1, :n]
            else:
                begin, before = self.times[0] if self.opened is None else self.opened, np.nan
            anybody, time = traded.any(), self.times[row]
            # An instrument without an event has been quiet since the session opened.
            absent = np.nan
            if self.opened is not None and time >= self.opened:
                self._absent += max(time - max(begin, self.opened), 0) if anybody else 0
                absent = self._absent
            passed = np.where(traded, 0, before + (max(time - begin, 0) if anybody else 0))
            quiet[here, :n] = np.where(self.first[:n] > row, absent, passed)


class View:
    """What an expression sees: the rows a to b of some instruments, one column for each of a group's pairs."""

    numbers: Any = None

    def __init__(self, board: Board, a: int, b: int, at: Any = None, *, market: bool = False) -> None:
        self.board, self.a, self.b, self.at, self.market = board, a, b, at, market
        self.first = np.zeros(1, np.int64) if market else board.first[: len(board.codes)]
        self.rows = np.arange(a, b)[:, None]

    def column(self, key: str) -> Any:
        """Return a column of TradeEvent, or of what the board worked out."""
        return self._of(self.matrix(key)[self.a - self.board.base : self.b - self.board.base])

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
        """Return the rows from the board's base on of a column, or of what the board worked out."""
        board = self.board
        found = board.data[board.columns[key]] if key in board.columns else board.past[key]
        return found[:, : len(self.first)]

    def _of(self, matrix: Any) -> Any:
        return matrix if self.at is None else np.take(matrix, self.at, axis=1)

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
        """Return the row in force when each window begins (-1: none yet), and where that is inside a gap."""
        begins = self.board.times[self.a : self.b] - ms
        rows = np.searchsorted(self.board.times[: self.b], begins, "right")[:, None] - 1
        blind = np.zeros(len(rows), bool)
        for begin, end in self.board.gaps:
            blind |= (begin < begins) & (begins < end)
        return rows, blind[:, None] & (rows >= self.first)

    def ago(self, key: str, ms: int) -> Any:
        """Return the value that was in force `ms` ago, or the first of the day."""
        rows, blind = self._begin(ms)
        place = np.maximum(rows, self.first)
        known = (place <= self.rows) & ~blind
        at = np.where(known, place - self.board.base, 0)
        return np.where(known, self.matrix(key)[at, np.arange(len(self.first))], np.nan)

    def over(self, key: str, ms: int, name: str) -> Any:
        """Return the highest, lowest or mean of the values in force in the window, its begin and now included."""
        rows, blind = self._begin(ms)
        matrix, base = self.matrix(key), self.board.base
        out = np.full((self.b - self.a, len(self.first)), np.nan)
        for n, low in enumerate(np.maximum(rows[:, 0], 0)):
            part = matrix[low - base : self.a + n + 1 - base]
            if name == "mean":
                known = np.sum(~np.isnan(part), axis=0)
                out[n] = np.nansum(part, axis=0) / np.where(known, known, np.nan)
            else:
                out[n] = (np.fmax if name == "highest" else np.fmin).reduce(part, axis=0)
        return np.where(blind, np.nan, out)

    def pace(self, key: str, ms: int) -> Any:
        """Return what a window brought on average since the instrument's first row of the day, before this window."""
        times = self.board.times
        age = times[self.a : self.b, None] - ms - times[np.minimum(self.first, self.b - 1)]
        brought = self.ago(key, ms) - self.board.firsts[key][: len(self.first)]
        return np.where((age >= ms) & (brought > 0), brought * ms / age, np.nan)


class _Opening:
    """What was known before the day's first event: last and closing price were the previous close."""

    def __init__(self, view: View) -> None:
        self._view = view

    def column(self, name: str) -> Any:
        if name in {"last_price", "closing_price", "previous_close"}:
            return self._view.column("previous_close")
        return np.full((1, 1), np.nan)

    def shared(self, *_: Any) -> Any:
        return np.full((1, 1), np.nan)
