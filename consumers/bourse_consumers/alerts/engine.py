"""Rules judged once per poll of the whole market, and their episodes. Pure: time comes with the polls and the calls.

Rules that differ by their numbers only are one group and are judged together, over pairs of a rule and an instrument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

import numpy as np
from msgspec import structs

from bourse_consumers.alerts.board import Board, Named, View
from bourse_consumers.alerts.expressions import STATES, Needs
from bourse_consumers.alerts.rendering import Change, Episode, Renderer, instant, millis, numbers_of, view_of
from bourse_consumers.alerts.rule import Rule, form
from bourse_schemas.events import (
    TEHRAN,
    AlertState,
    FeedState,
    Outcome,
    Phase,
    PollMarker,
    PriceAlert,
    ResolvedBy,
    Scope,
    TradeEvent,
)

GOOD = frozenset({Outcome.PUBLISHED, Outcome.UNCHANGED})
BLOCK = 4_000_000
REBUILT = 64
DAY_MS = 86_400_000
NEVER_MS = 2**62
UNUSED = {"rule": 0, "who": 0, "valid": 0, "since": NEVER_MS, "raised": -NEVER_MS, "fired": False, "firing": False}


def columns_of(events: Sequence[TradeEvent], names: Iterable[str]) -> dict[str, list[Any]]:
    """Return a poll's events by columns, as the engine takes them."""
    found = {name: [getattr(event, name) for event in events] for name in names}
    found["traded_at"] = [millis(event.traded_at) for event in events]
    return found


class Poll(NamedTuple):
    """A whole poll: its marker, and per column of TradeEvent the values of its events (`traded_at` in milliseconds).

    `replay`: it was judged before, and only rebuilds the state. Not `complete`: events of it are missing.
    """

    marker: PollMarker
    events: Mapping[str, Sequence[Any]]
    replay: bool = False
    complete: bool = True


class _Group:
    """Rules of one shape: the conditions, and for each of its pairs the instrument and the numbers in the places."""

    def __init__(self, rule: Rule) -> None:
        self.when, self.until = rule.when.node, rule.until.node if rule.until else None
        self.momentary, self.wide = rule.momentary, rule.scope == "instrument"
        self.clear()

    def clear(self) -> None:
        # Its first pairs are next to each other; those of instruments that came later are anywhere.
        self.first, self.rest, self.at = slice(0, 0), np.zeros(0, np.int64), np.zeros(0, np.int32)
        self.numbers: Any = None

    def add(self, begin: int, at: Any, numbers: Sequence[Sequence[float]]) -> None:
        table, end = np.array(numbers, float).T[:, None, :], begin + len(at)
        if self.numbers is None:
            self.first, self.at, self.numbers = slice(begin, end), at, table
        else:
            self.rest, self.at = np.append(self.rest, np.arange(begin, end)), np.append(self.at, at)
            self.numbers = np.concatenate([self.numbers, table], axis=2)

    def judge(self, board: Board, a: int, b: int, begins: Any, overs: Any) -> None:
        """Write where the rules may begin and where they are over, rows x pairs."""
        view = View(board, a, b, self.at if self.wide else None)
        view.numbers = self.numbers
        true, false = self.when.run(view)
        over = ~true if self.momentary else self.until.run(view)[0] if self.until else false
        begin, count = true & ~over, self.first.stop - self.first.start
        for whole, part in ((begins, begin), (overs, over)):
            whole[:, self.first] = part[:, :count]
            if len(self.rest):
                whole[:, self.rest] = part[:, count:]


class _Moment(NamedTuple):
    """When something is judged: the row of the board (-1: none), the time, the poll, the day."""

    row: int
    at: int
    sequence: int
    day: date


class _Pairs:
    """Rules and the instruments they cover: the state of each, one array per property, and the open episodes."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.count = 0
        self.rule, self.who = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.valid = np.zeros(0, np.int32)  # the row from which it is judged
        # When the condition began to hold, and when it was raised last.
        self.since, self.raised = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.fired, self.firing = np.zeros(0, bool), np.zeros(0, bool)
        # What limits the begins, per rule.
        self._hold, self._cooldown = (
            np.array([getattr(rule, name) for rule in rules], np.int64) for name in ("hold", "cooldown")
        )
        self._once = np.array([rule.once for rule in rules], bool)
        self._active = np.array([rule.active or (0, DAY_MS) for rule in rules], np.int64).reshape(-1, 2)
        self.episodes: dict[int, Episode] = {}
        # The poll of a pair's last begin, and which one of that poll it was.
        self._last: dict[int, tuple[int, int]] = {}

    def add(self, rules: Any, who: Any, row: Any) -> int:
        """Add pairs; return the number of the first one."""
        first, end = self.count, self.count + len(rules)
        if end > len(self.rule):
            for name, value in UNUSED.items():
                old = getattr(self, name)[: self.count]
                more = np.full(max(end, self.count * 5 // 4, 64) - self.count, value, old.dtype)
                setattr(self, name, np.concatenate([old, more]))
        self.rule[first:end], self.who[first:end], self.valid[first:end] = rules, who, row
        self.count = end
        return first

    def of(self, place: int) -> Any:
        """Return the pairs of an instrument."""
        return np.flatnonzero(self.who[: self.count] == place)

    def adopt(self, pair: int, alert: PriceAlert) -> None:
        """Continue what is published."""
        self.firing[pair] = alert.state is AlertState.FIRING
        self.fired[pair] = True
        self.episodes.pop(pair, None)
        if alert.state is AlertState.FIRING:
            raised = self.raised[pair] = millis(alert.raised_at)
            ordinal = self._ordinal(pair, alert.poll_sequence)
            found = millis(alert.since), raised, alert.poll_sequence, alert.trading_day, ordinal, alert.alert_id
            self.episodes[pair] = Episode(*found)

    def step(self, now: _Moment, begin: Any, over: Any, *, torn: bool = False, silent: bool = False) -> list[Change]:
        """Take what may begin and what is over; `silent` keeps only since when each condition holds."""
        since, firing = self.since[: self.count], self.firing[: self.count]
        since[:] = np.where(begin, now.at if torn else np.minimum(since, now.at), NEVER_MS)
        if silent:
            return []
        out = self.end(firing & over, now, ResolvedBy.CONDITION)
        clock = instant(now.at).astimezone(TEHRAN)
        ms = millis(clock) - millis(clock.replace(hour=0, minute=0, second=0, microsecond=0))
        due = np.flatnonzero(begin & ~firing)
        rule = self.rule[due]
        due = due[
            (now.at - since[due] >= self._hold[rule])
            & (now.at - self.raised[due] >= self._cooldown[rule])
            & ~(self._once[rule] & self.fired[due])
            & (self._active[rule, 0] <= ms)
            & (ms < self._active[rule, 1])
        ]
        firing[due], self.raised[due], self.fired[due] = True, now.at, True
        for pair in due.tolist():
            ordinal = self._ordinal(pair, now.sequence)
            episode = self.episodes[pair] = Episode(int(since[pair]), now.at, now.sequence, now.day, ordinal)
            out.append(self._change(AlertState.FIRING, pair, now, episode))
        return out

    def end(self, which: Any, now: _Moment, why: ResolvedBy) -> list[Change]:
        """End episodes."""
        pairs = np.flatnonzero(which)
        self.firing[pairs] = False
        return [self._change(AlertState.RESOLVED, pair, now, self.episodes.pop(pair), why) for pair in pairs.tolist()]

    def _change(
        self, state: AlertState, pair: int, now: _Moment, episode: Episode, why: ResolvedBy | None = None
    ) -> Change:
        return Change(state, int(self.rule[pair]), int(self.who[pair]), now.row, now.at, now.sequence, episode, why)

    def _ordinal(self, pair: int, sequence: int) -> int:
        last, ordinal = self._last.get(pair, (None, 0))
        self._last[pair] = sequence, ordinal + 1 if last == sequence else 0
        return self._last[pair][1]


class _Feed:
    """The rules about the feed: judged at every marker and by the clock. Nothing outlasts the Tehran day.

    It is what their expressions see.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._all, self._rules = rules, [(n, rule) for n, rule in enumerate(rules) if rule.scope == "feed"]
        self.index = {n: pair for pair, (n, _) in enumerate(self._rules)}
        self._values: dict[str, float] = {}
        self.forget(None)

    def column(self, name: str) -> float:
        return self._values[name]

    def forget(self, day: date | None) -> None:
        self.day, self.pairs = day, _Pairs(self._all)
        self.pairs.add([n for n, _ in self._rules], -1, 0)

    def take(self, marker: PollMarker, at: int, silent: int = 0, *, live: bool = True) -> list[Change]:
        """Judge at an instant, at which no marker has come for `silent` milliseconds."""
        self._values = {"feed_state": float(STATES.index(FeedState(marker.feed_state))), "silent": float(silent)}
        found = [(rule.when.node.run(self), rule.until and rule.until.node.run(self)) for _, rule in self._rules]
        over = np.array([bool(until[0] if until else when[1]) for when, until in found], bool)
        begin = np.array([bool(when[0]) for when, _ in found], bool) & ~over
        day, out = marker.requested_at.astimezone(TEHRAN).date(), list[Change]()
        now = _Moment(-1, at, marker.poll_sequence, day)
        if day != self.day:
            for which, why in ((over, ResolvedBy.CONDITION), (~over, ResolvedBy.DAY_END)) if live else ():
                out += self.pairs.end(self.pairs.firing[: self.pairs.count] & which, now, why)
            self.forget(day)
        return out + self.pairs.step(now, begin, over, silent=not live)


class Engine:
    """The rules, the board of the day, and the episodes.

    `known` are the instruments that earlier days had, by code: rules that name one judge it before its first event.
    """

    def __init__(self, rules: Sequence[Rule], known: Mapping[str, Named] | None = None) -> None:
        self.rules, self.known = rules, known or {}
        needs, shapes = Needs(), dict[Any, int]()
        self._groups: list[_Group] = []
        self._group_of = np.full(len(rules), -1)
        # Rules that only name instruments, by name; the others are tried on every instrument.
        self._by_name: dict[str, list[int]] = {}
        self._others: list[int] = []
        for n, rule in enumerate(rules):
            needs.add(rule.needs)
            if rule.scope == "feed":
                continue
            shape = (rule.scope == "instrument" or n, rule.when.node.key, rule.until and rule.until.node.key)
            self._group_of[n] = shapes.setdefault(shape, len(shapes))
            if len(shapes) > len(self._groups):
                self._groups.append(_Group(rule))
            for name in (*rule.match.instruments, *rule.match.symbols):
                self._by_name.setdefault(name, []).append(n)
            if rule.match.patterns or not rule.match.names:
                self._others.append(n)
        self.board = Board(needs)
        self.columns = ("instrument", "symbol", "title", "is_right", "trading_day", *self.board.columns)
        self._by_rule = {(rule.name, str(rule.scope)): n for n, rule in enumerate(rules)}
        self._feed = _Feed(rules)
        self._renderer = Renderer(rules, self.board, self._feed)
        self.open()

    def open(self, alerts: Iterable[PriceAlert] = ()) -> None:
        """Forget everything; `alerts` are the published ones of the day, in their order."""
        self._published: list[PriceAlert] | None = list(alerts)
        self.marker: PollMarker | None = None
        self._opened: tuple[date, int] | None = None
        self._feed.forget(None)
        self._clear(None)

    def _clear(self, day: date | None) -> None:
        opened = self._opened[1] if self._opened and self._opened[0] == day else None
        self.board.clear(day, opened)
        self._pairs = _Pairs(self.rules)
        self._new: dict[int, list[tuple[int, int]]] = {}  # per instrument rules, and from which row, that become pairs
        self._judged, self._begins = list[bool](), list[bool]()
        self._done, self._closed = 0, False
        self._hole: int | None = None  # the last complete row before incomplete ones
        for group in self._groups:
            group.clear()
        self.board.members = {
            rule.members: (np.zeros(0, np.int64), np.zeros(0, np.int64))
            for rule in self.rules if rule.scope == "market"
        }  # fmt: skip
        if day is not None:
            self._new[-1] = [(n, 0) for n, rule in enumerate(self.rules) if rule.scope == "market"]
            self._foresee()

    # --- polls --------------------------------------------------------------------------------------------------------

    def take(self, poll: Poll, *, defer: bool = False) -> list[PriceAlert]:
        """Take a poll; return the alerts it begins and ends.

        With `defer` rows are judged many at once, when the day ends or with `finish`: the same alerts, sooner.
        """
        marker, live = poll.marker, not poll.replay
        at = millis(marker.received_at or marker.requested_at)
        out = self._adopt(at, marker) if live else []
        self.marker = marker
        out += self._render(self._feed.take(marker, at, live=live))
        day = instant(at).astimezone(TEHRAN).date()
        if marker.phase is Phase.OPEN and (self._opened is None or self._opened[0] != day):
            self._opened = day, at
            if self.board.day == day:
                self.board.opened = at
        if marker.outcome in GOOD:
            out += self._good(poll, at, day, live=live, defer=defer)
        return out

    def finish(self) -> list[PriceAlert]:
        """Judge the rows that were deferred."""
        return self._render(self._judge())

    def tick(self, now: int, elapsed: int) -> list[PriceAlert]:
        """Judge the feed rules by the clock; `elapsed` is the time since the last marker arrived, in milliseconds."""
        marker = self.marker
        if marker is None:
            return []
        silent = elapsed
        if marker.simulated:
            now = millis(marker.received_at or marker.requested_at) + elapsed
        else:
            silent = max(0, now - millis(marker.next_poll_at)) if marker.next_poll_at else 0
        return self._adopt(now, marker) + self._render(self._feed.take(marker, now, silent))

    def view_of(self, n: int) -> View | None:
        """Return the view of all rows of a rule's pairs, None if it has none."""
        pairs = np.flatnonzero(self._pairs.rule[: self._pairs.count] == n)
        if not len(pairs) or not self.board.rows:
            return None
        return view_of(self.board, 0, self.board.rows, [(self.rules[n], i) for i in self._pairs.who[pairs].tolist()])

    def _good(self, poll: Poll, at: int, day: date, *, live: bool, defer: bool) -> list[PriceAlert]:
        board, out, events, marker = self.board, list[PriceAlert](), poll.events, poll.marker
        days = events.get("trading_day", ())
        latest = max(days, default=None)
        if latest is not None and (board.day is None or latest > board.day):
            out += self._end_day(at, marker) if live else []
            self._clear(latest)
        elif board.day is not None and day > board.day and not self._closed:
            out += self._end_day(at, marker) if live else []
            self._closed = True
        if board.day is None:
            return out
        if board.rows and self._done == board.rows and not defer:
            board.trim()
        if any(each != board.day for each in days):
            keep = [n for n, each in enumerate(days) if each == board.day]
            events = {name: [values[n] for n in keep] for name, values in events.items()}
        gap = millis(marker.gap_from) if marker.gap_from else None
        if self._hole is not None:
            gap = self._hole if gap is None else min(gap, self._hole)
        if poll.complete:
            self._hole = None
        elif self._hole is None:
            self._hole = int(board.times[board.rows - 1]) if board.rows else at
        self._cover(board.append(at, marker.poll_sequence, events, gap if poll.complete else None))
        self._judged.append(poll.complete)
        self._begins.append(day == board.day and not self._closed)
        if live and not defer:
            out += self._render(self._judge())
        elif not live and board.rows - self._done >= REBUILT:
            self._judge(silent=True)
        if marker.day_final and day == board.day:
            out += self._end_day(at, marker) if live else []
            self._closed = True
        return out

    def _end_day(self, at: int, marker: PollMarker) -> list[PriceAlert]:
        out, pairs = self._render(self._judge()), self._pairs
        now = _Moment(self.board.rows - 1, at, marker.poll_sequence, self.board.day or date.min)
        return out + self._render(pairs.end(pairs.firing[: pairs.count], now, ResolvedBy.DAY_END))

    def _adopt(self, at: int, marker: PollMarker) -> list[PriceAlert]:
        """Continue what is published; end what no rule covers any more."""
        if self._published is None:
            return []
        published, self._published = self._published, None
        self._judge(silent=True)
        last: dict[tuple[str, str, str | None], PriceAlert] = {}
        for alert in published:
            last[alert.rule, alert.scope, alert.instrument] = alert
            n = self._by_rule.get((alert.rule, alert.scope.value.lower()), -1)
            if alert.scope is Scope.FEED:
                if n in self._feed.index and alert.trading_day == self._feed.day:
                    self._feed.pairs.adopt(self._feed.index[n], alert)
            elif alert.trading_day == self.board.day:
                for pair in self._pairs.of(self.board.index.get(alert.instrument or "", -1)).tolist():
                    if self._pairs.rule[pair] == n:
                        self._pairs.adopt(pair, alert)
        episodes = (*self._pairs.episodes.values(), *self._feed.pairs.episodes.values())
        ours = {episode.alert_id for episode in episodes}
        left = [each for each in last.values() if each.state is AlertState.FIRING and each.alert_id not in ours]
        days = {Scope.FEED: self._feed.day}
        return [
            structs.replace(
                alert, state=AlertState.RESOLVED, raised_at=instant(at), poll_sequence=marker.poll_sequence,
                resolved_by=ResolvedBy.RULE_REMOVED
                if alert.trading_day == days.get(alert.scope, self.board.day) else ResolvedBy.DAY_END,
            ) for alert in left
        ]  # fmt: skip

    def _render(self, changes: Sequence[Change]) -> list[PriceAlert]:
        return self._renderer.render(changes, self.marker) if self.marker else []

    # --- instruments --------------------------------------------------------------------------------------------------

    def _foresee(self) -> None:
        """Put the instruments that rules name on the board before their first event."""
        symbols = {form(each.symbol): code for code, each in self.known.items()}
        for name, rules in self._by_name.items():
            code = symbols.get(name, name)
            each = self.known.get(code)
            if each is None and len(code) != 12:
                continue
            is_right = each.is_right if each else code.startswith("IRR")
            place = self.board.known(code, each and each.symbol, each and each.title, is_right=is_right)
            self._add_covered(rules, place)

    def _cover(self, changed: Sequence[int]) -> None:
        """Put instruments that are new, or have another symbol, under the rules that cover them."""
        for place in changed:
            code, named = self.board.codes[place], self.board.names[place][-1]
            found = {n for name in (code, form(named.symbol or "")) for n in self._by_name.get(name, ())}
            self._add_covered(sorted(found.union(self._others)), place)

    def _add_covered(self, rules: Iterable[int], place: int) -> None:
        code, named = self.board.codes[place], self.board.names[place][-1]
        symbol, row = form(named.symbol or ""), max(self.board.rows - 1, 0)
        new = self._new.setdefault(place, [])
        covered = {*self._pairs.rule[self._pairs.of(place)].tolist(), *(n for n, _ in new)}
        for n in rules:
            if n in covered or not self.rules[n].covers(code, symbol, is_right=named.is_right):
                continue
            if self.rules[n].scope == "instrument":
                new.append((n, row))
                continue
            at, since = self.board.members[self.rules[n].members]
            if place not in at:
                self.board.members[self.rules[n].members] = np.append(at, place), np.append(since, row)

    def _lay_out(self) -> None:
        """Make pairs, those of a group next to each other, with the numbers that their rules have in its places."""
        new, self._new = [(n, who, row) for who, some in self._new.items() for n, row in some], {}
        if not new:
            return
        rules, (which, who, row) = self.rules, np.array(new, np.int32).T
        order = np.argsort(self._group_of[which], kind="stable")
        which, who = which[order], who[order]
        first, group_of = self._pairs.add(which, who, row[order]), self._group_of[which]
        for g in np.unique(group_of).tolist():
            some = slice(*np.searchsorted(group_of, [g, g + 1]))
            each = zip(which[some].tolist(), who[some].tolist(), strict=True)
            numbers = [rules[n].fixed or numbers_of(rules[n], self.board, i)[: rules[n].places] for n, i in each]
            self._groups[g].add(first + some.start, who[some], numbers)

    # --- judging ------------------------------------------------------------------------------------------------------

    def _judge(self, *, silent: bool = False) -> list[Change]:
        """Judge the rows that were not judged yet; `silent` finds out only since when each condition holds."""
        self._lay_out()
        board, pairs, day, out = self.board, self._pairs, self.board.day, list[Change]()
        step = max(1, BLOCK // max(len(board.codes), pairs.count, 1))
        while day is not None and self._done < board.rows:
            a = self._done
            b = self._done = min(a + step, board.rows)
            with np.errstate(all="ignore"):
                board.advance(a, b)
                begin, over = np.zeros((b - a, pairs.count), bool), np.zeros((b - a, pairs.count), bool)
                for group in self._groups:
                    if len(group.at):
                        group.judge(board, a, b, begin, over)
            for row in range(a, b):
                if self._judged[row]:
                    now = _Moment(row, int(board.times[row]), board.sequences[row], day)
                    may = begin[row - a] & (pairs.valid[: pairs.count] <= row) & self._begins[row]
                    out += pairs.step(now, may, over[row - a], torn=row in board.torn, silent=silent)
        return out
