"""Rules judged once per poll of the whole market, and their episodes. Pure: time comes with the polls and the calls.

Rules that differ by their numbers only are one group and are judged together, over pairs of a rule and an instrument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

import numpy as np
from msgspec import structs

from bourse_consumers.alerts.board import NEVER, Board, View
from bourse_consumers.alerts.expressions import STATES, Needs, Node
from bourse_consumers.alerts.rendering import Change, Episode, Renderer, instant, millis, numbers_of
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

__all__ = ["GOOD", "Engine", "Known", "Poll", "columns_of", "millis"]

GOOD = frozenset({Outcome.PUBLISHED, Outcome.UNCHANGED})
BLOCK = 4_000_000
LONG_AGO = -(2**62)


def _tehran(ms: int) -> datetime:
    return instant(ms).astimezone(TEHRAN)


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


class Known(NamedTuple):
    """What is known of an instrument before its first event of the day."""

    symbol: str
    title: str
    is_right: bool


class _Group:
    """Rules of one shape: the conditions, and for each of its pairs the instrument and the numbers in the places."""

    def __init__(self, when: Node, until: Node | None, *, momentary: bool) -> None:
        self.when, self.until, self.momentary = when, until, momentary
        self.clear()

    def clear(self) -> None:
        self.new: list[tuple[int, Sequence[float]]] = []
        self.places = np.zeros(0, np.int64)
        self.table: Any = None
        self.at: Any = None

    @property
    def any(self) -> bool:
        """Return whether it has pairs."""
        return bool(self.new) or self.at is not None

    def judge(self, board: Board, a: int, b: int, who: Any, *, wide: bool) -> tuple[Any, Any]:
        """Return where the rules may begin and where they are over, rows x pairs."""
        if self.new:
            self.places = np.append(self.places, [pair for pair, _ in self.new])
            numbers = np.array([numbers for _, numbers in self.new], float).T[:, None, :]
            self.table = numbers if self.table is None else np.concatenate([self.table, numbers], axis=2)
            self.at, self.new = who[self.places], []
        view = View(board, a, b, self.at if wide else None)
        view.numbers = self.table
        true, false = self.when.run(view)
        over = ~true if self.momentary else self.until.run(view)[0] if self.until else false
        return true & ~over, over


class _Pairs:
    """The state of each rule and instrument, one array per property."""

    KINDS: Mapping[str, tuple[Any, Any]] = {
        "rule": (np.int32, 0),
        "who": (np.int32, 0),
        "valid": (np.int32, 0),  # the row from which it is judged
        "since": (np.int32, NEVER),  # the row at which the condition began to hold
        "raised": (np.int64, LONG_AGO),
        "fired": (bool, False),
        "firing": (bool, False),
    }

    def __init__(self) -> None:
        self.count = 0
        for name, (kind, value) in self.KINDS.items():
            setattr(self, name, np.full(0, value, kind))

    def of(self, rule: int, span: slice) -> list[int]:
        """Return the pairs of a rule among those of an instrument."""
        return [span.start + int(n) for n in np.flatnonzero(self.rule[span] == rule)]

    def add(self, rules: Sequence[int], who: int, row: int) -> None:
        end = self.count + len(rules)
        if end > len(self.rule):
            for name, (kind, value) in self.KINDS.items():
                new = np.full(max(end, self.count * 5 // 4, 64), value, kind)
                new[: self.count] = getattr(self, name)[: self.count]
                setattr(self, name, new)
        self.rule[self.count : end], self.who[self.count : end], self.valid[self.count : end] = rules, who, row
        self.count = end

    rule: Any
    who: Any
    valid: Any
    since: Any
    raised: Any
    fired: Any
    firing: Any


class Engine:
    """The rules, the board of the day, and the episodes.

    `known` are the instruments that earlier days had, by code: rules that name one judge it before its first event.
    """

    def __init__(self, rules: Sequence[Rule], known: Mapping[str, Known] | None = None) -> None:
        self.rules, self.known = rules, known or {}
        needs = Needs()
        for rule in rules:
            needs.columns |= rule.needs.columns
            needs.past.update({key: past for key, past in rule.needs.past.items() if key not in needs.past})
        self.board = Board(needs)
        self.columns = ("instrument", "symbol", "title", "is_right", "trading_day", *self.board.columns)
        shapes: dict[Any, _Group] = {}
        self._groups: list[_Group | None] = []
        for n, rule in enumerate(rules):
            until = rule.until.node if rule.until else None
            alone = rule.scope == "instrument" or n
            shape = (alone, rule.when.node.key, until and until.key)
            new = _Group(rule.when.node, until, momentary=rule.momentary)
            self._groups.append(shapes.setdefault(shape, new) if rule.scope != "feed" else None)
        self._shapes = [(group, shape[0] is True) for shape, group in shapes.items()]
        # Rules that only name instruments, by name; the others are tried on every instrument.
        self._by_name: dict[str, list[int]] = {}
        self._others: list[int] = []
        for n, rule in enumerate(rules):
            if rule.scope == "feed":
                continue
            for name in (*rule.match.instruments, *rule.match.symbols):
                self._by_name.setdefault(name, []).append(n)
            if rule.match.patterns or not rule.match.names:
                self._others.append(n)
        self._holds = np.array([rule.hold for rule in rules], np.int64)
        self._cooldowns = np.array([rule.cooldown for rule in rules], np.int64)
        self._once = np.array([rule.once for rule in rules], bool)
        hours = [rule.active or (0, 86_400_000) for rule in rules]
        self._active = np.array(hours, np.int64).reshape(-1, 2)
        self._by_rule = {(rule.name, rule.scope): n for n, rule in enumerate(rules)}
        self._feed = _Feed([(n, rule) for n, rule in enumerate(rules) if rule.scope == "feed"])
        self._renderer = Renderer(rules, self.board, self._feed.view)
        self.open()

    def open(self, alerts: Iterable[PriceAlert] = ()) -> None:
        """Forget everything; `alerts` are the published ones of the day, in their order."""
        self._published: list[PriceAlert] | None = list(alerts)
        self.marker: PollMarker | None = None
        self._opened: tuple[date, int] | None = None
        self._feed.clear()
        self._clear(None)

    def _clear(self, day: date | None) -> None:
        opened = self._opened[1] if self._opened and self._opened[0] == day else None
        self.board.clear(day, opened)
        self._pairs = _Pairs()
        self._spans: dict[int, list[slice]] = {}  # per instrument where its pairs are
        self._order: Any = None  # where the pairs are in the groups' results
        self._episodes: dict[int, Episode] = {}
        self._judged, self._begins = list[bool](), list[bool]()
        self._done, self._closed = 0, False
        self._hole: int | None = None  # the last complete row before incomplete ones
        for group, _ in self._shapes:
            group.clear()
        self.board.members = {
            rule.members: (np.zeros(0, np.int64), np.zeros(0, np.int64))
            for rule in self.rules if rule.scope == "market"
        }  # fmt: skip
        if day is not None:
            self._add([n for n, rule in enumerate(self.rules) if rule.scope == "market"], -1)
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
        out += self._render(self._feed.marker(marker, at)) if live else self._feed.replay(marker, at)
        day = _tehran(at).date()
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
        out = self._adopt(now, marker)
        return out + self._render(self._feed.judge(marker, now, silent))

    def view_of(self, n: int) -> View | None:
        """Return the view of all rows of a rule's pairs, None if it has none."""
        pairs = np.flatnonzero(self._pairs.rule[: self._pairs.count] == n)
        if not len(pairs) or not self.board.rows:
            return None
        places = self._pairs.who[pairs]
        view = View(self.board, 0, self.board.rows, places if self.rules[n].scope == "instrument" else None)
        numbers = [numbers_of(self.rules[n], self.board, each) for each in places]
        view.numbers = np.array(numbers, float).T[:, None, :]
        return view

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
        if marker.day_final and day == board.day:
            out += self._end_day(at, marker) if live else []
            self._closed = True
        return out

    def _end_day(self, at: int, marker: PollMarker) -> list[PriceAlert]:
        out, row = self._render(self._judge()), self.board.rows - 1
        ends = []
        for pair, episode in sorted(self._episodes.items()):
            rule, who = int(self._pairs.rule[pair]), int(self._pairs.who[pair])
            ends.append(
                Change(AlertState.RESOLVED, rule, who, row, at, marker.poll_sequence, episode, ResolvedBy.DAY_END)
            )
        self._pairs.firing[:] = False
        self._episodes.clear()
        return out + self._render(ends)

    def _adopt(self, at: int, marker: PollMarker) -> list[PriceAlert]:
        """Continue what is published; end what no rule covers any more."""
        if self._published is None:
            return []
        published, self._published = self._published, None
        self._judge(silent=True)
        last: dict[tuple[str, str, str | None], PriceAlert] = {}
        for alert in published:
            last[alert.rule, alert.scope, alert.instrument] = alert
            rule = self._by_rule.get((alert.rule, alert.scope.value.lower()))  # type: ignore[arg-type]
            if alert.scope is Scope.FEED:
                self._feed.adopt(rule, alert)
            elif rule is not None and alert.trading_day == self.board.day:
                place = self.board.index.get(alert.instrument or "", -1)
                spans = self._spans.get(place, ())
                pair = next((pair for span in spans for pair in self._pairs.of(rule, span)), None)
                if pair is None:
                    continue
                self._pairs.firing[pair] = alert.state is AlertState.FIRING
                self._episodes.pop(pair, None)
                self._pairs.fired[pair] = True
                if alert.state is AlertState.FIRING:
                    self._pairs.raised[pair] = millis(alert.raised_at)
                    since = millis(alert.since), millis(alert.raised_at)
                    self._episodes[pair] = Episode(*since, alert.poll_sequence, alert.trading_day, 0, alert.alert_id)
        ours = {episode.alert_id for episode in self._episodes.values()} | self._feed.open()
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
        return self._renderer.render(changes, self.marker)

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
        covered = {int(n) for span in self._spans.get(place, ()) for n in self._pairs.rule[span]}
        new = []
        for n in rules:
            if n in covered or not self.rules[n].covers(code, symbol, is_right=named.is_right):
                continue
            if self.rules[n].scope == "instrument":
                new.append(n)
                continue
            at, since = self.board.members[self.rules[n].members]
            if place not in at:
                self.board.members[self.rules[n].members] = np.append(at, place), np.append(since, row)
        self._add(new, place)

    def _add(self, rules: Sequence[int], place: int) -> None:
        if not rules:
            return
        first = self._pairs.count
        self._pairs.add(rules, place, max(self.board.rows - 1, 0))
        self._spans.setdefault(place, []).append(slice(first, self._pairs.count))
        self._order = None
        for pair, n in enumerate(rules, first):
            group = self._groups[n]
            assert group is not None  # noqa: S101  # feed rules have no pairs
            rule = self.rules[n]
            group.new.append((pair, rule.fixed or numbers_of(rule, self.board, place)[: rule.places]))

    # --- judging ------------------------------------------------------------------------------------------------------

    def _judge(self, *, silent: bool = False) -> list[Change]:
        """Judge the rows that were not judged yet; `silent` finds out only since when each condition holds."""
        board, pairs, out = self.board, self._pairs, list[Change]()
        step = max(1, BLOCK // max(len(board.codes), pairs.count, 1))
        while self._done < board.rows:
            a = self._done
            b = self._done = min(a + step, board.rows)
            with np.errstate(all="ignore"):
                board.advance(a, b)
                found = [group.judge(board, a, b, pairs.who, wide=wide) for group, wide in self._shapes if group.any]
                if self._order is None:
                    self._order = np.argsort(np.concatenate([[], *(group.places for group, _ in self._shapes)]))
                begin, over = (
                    np.take(np.concatenate([np.zeros((b - a, 0), bool), *each], axis=1), self._order, axis=1)
                    for each in (zip(*found, strict=True) if found else ([], []))
                )
            for row in range(a, b):
                if self._judged[row]:
                    out += self._step(row, begin[row - a], over[row - a], silent=silent)
        return out

    def _step(self, row: int, begin: Any, over: Any, *, silent: bool) -> list[Change]:
        pairs, count, t, sequence = (
            self._pairs,
            self._pairs.count,
            int(self.board.times[row]),
            self.board.sequences[row],
        )
        begin &= pairs.valid[:count] <= row
        if not self._begins[row]:
            begin[:] = False
        since = pairs.since[:count]
        since[:] = np.where(begin, row if row in self.board.torn else np.minimum(since, row), NEVER)
        if silent:
            return []
        firing = pairs.firing[:count]
        out = []
        ended = np.flatnonzero(firing & over)
        for pair in ended:
            rule, who = int(pairs.rule[pair]), int(pairs.who[pair])
            episode = self._episodes.pop(int(pair))
            out.append(Change(AlertState.RESOLVED, rule, who, row, t, sequence, episode, ResolvedBy.CONDITION))
        firing[ended] = False
        due = np.flatnonzero(begin & ~firing)
        rule = pairs.rule[due]
        clock = _tehran(t)
        ms = millis(clock) - millis(clock.replace(hour=0, minute=0, second=0, microsecond=0))
        due = due[
            (t - self.board.times[since[due]] >= self._holds[rule])
            & (t - pairs.raised[due] >= self._cooldowns[rule])
            & ~(self._once[rule] & pairs.fired[due])
            & (self._active[rule, 0] <= ms)
            & (ms < self._active[rule, 1])
        ]
        firing[due], pairs.raised[due], pairs.fired[due] = True, t, True
        day = self.board.day
        assert day is not None  # noqa: S101  # a board with rows has a day
        for pair in due:
            episode = Episode(int(self.board.times[since[pair]]), t, sequence, day)
            self._episodes[int(pair)] = episode
            out.append(
                Change(AlertState.FIRING, int(pairs.rule[pair]), int(pairs.who[pair]), row, t, sequence, episode)
            )
        return out


class _FeedView:
    """What feed rules see: the last marker's state, and for how long no marker has come."""

    def __init__(self) -> None:
        self.state, self.silent = float("nan"), float("nan")

    def column(self, name: str) -> float:
        return self.state if name == "feed_state" else self.silent


class _Feed:
    """The episodes of the feed rules: judged at every marker and by the clock. Nothing outlasts the Tehran day."""

    def __init__(self, rules: Sequence[tuple[int, Rule]]) -> None:
        self._rules, self.view = rules, _FeedView()
        self.clear()

    def clear(self) -> None:
        self.view.state = self.view.silent = float("nan")
        self._forget(None)

    def _forget(self, day: date | None) -> None:
        self.day = day
        self._since: dict[int, int] = {}
        self._raised: dict[int, int] = {}
        self._begun: Counter[tuple[int, int]] = Counter()
        self._episodes: dict[int, Episode] = {}

    def replay(self, marker: PollMarker, at: int) -> list[PriceAlert]:
        """Rebuild from a marker that was judged before."""
        day = marker.requested_at.astimezone(TEHRAN).date()
        if day != self.day:
            self._forget(day)
        for n, _, true, over in self._look(marker, 0):
            self._hold(n, at, holds=true and not over)
        return []

    def adopt(self, n: int | None, alert: PriceAlert) -> None:
        """Continue what is published of a rule."""
        if n is None or alert.trading_day != self.day:
            return
        self._episodes.pop(n, None)
        if alert.state is AlertState.FIRING:
            raised = millis(alert.raised_at)
            ordinal = self._begun[n, alert.poll_sequence]
            self._begun[n, alert.poll_sequence] += 1
            self._raised[n] = raised
            found = millis(alert.since), raised, alert.poll_sequence, alert.trading_day, ordinal, alert.alert_id
            self._episodes[n] = Episode(*found)

    def open(self) -> set[str | None]:
        """Return the ids of the published alerts that go on."""
        return {episode.alert_id for episode in self._episodes.values()}

    def marker(self, marker: PollMarker, at: int) -> list[Change]:
        """Judge at a marker; what is open when a day begins ends there."""
        day, out = marker.requested_at.astimezone(TEHRAN).date(), list[Change]()
        if day != self.day:
            found = {n: over for n, _, _, over in self._look(marker, 0)}
            for n, episode in self._episodes.items():
                why = ResolvedBy.CONDITION if found[n] else ResolvedBy.DAY_END
                out.append(Change(AlertState.RESOLVED, n, -1, -1, at, marker.poll_sequence, episode, why))
            self._forget(day)
        return out + self.judge(marker, at, 0)

    def judge(self, marker: PollMarker, at: int, silent: int) -> list[Change]:
        """Judge at an instant, at which no marker has come for `silent` milliseconds."""
        out, clock = list[Change](), _tehran(at)
        ms = ((clock.hour * 60 + clock.minute) * 60 + clock.second) * 1000 + clock.microsecond // 1000
        for n, rule, true, over in self._look(marker, silent):
            self._hold(n, at, holds=true and not over)
            low, high = rule.active or (0, 86_400_000)
            if over and n in self._episodes:
                episode, why = self._episodes.pop(n), ResolvedBy.CONDITION
                out.append(Change(AlertState.RESOLVED, n, -1, -1, at, marker.poll_sequence, episode, why))
            elif (
                n in self._since and n not in self._episodes and self.day is not None
                and at - self._since[n] >= rule.hold
                and at - self._raised.get(n, LONG_AGO) >= rule.cooldown
                and not (rule.once and n in self._raised) and low <= ms < high
            ):  # fmt: skip
                key = n, marker.poll_sequence
                episode = Episode(self._since[n], at, marker.poll_sequence, self.day, self._begun[key])
                self._begun[key] += 1
                self._raised[n], self._episodes[n] = at, episode
                out.append(Change(AlertState.FIRING, n, -1, -1, at, marker.poll_sequence, episode))
        return out

    def _hold(self, n: int, at: int, *, holds: bool) -> None:
        if holds:
            self._since.setdefault(n, at)
        else:
            self._since.pop(n, None)

    def _look(self, marker: PollMarker, silent: int) -> Iterator[tuple[int, Rule, bool, bool]]:
        self.view.state, self.view.silent = float(STATES.index(FeedState(marker.feed_state))), float(silent)
        for n, rule in self._rules:
            true, false = (bool(each) for each in rule.when.node.run(self.view))
            yield n, rule, true, bool(rule.until.node.run(self.view)[0]) if rule.until else false
