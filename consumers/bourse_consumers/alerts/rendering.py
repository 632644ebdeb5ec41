"""Episodes as alerts: identity, values and texts. Pure.

What one rule begins and ends at one poll is worked out together: an alert costs about as much as its texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from hashlib import sha1
from math import isnan
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np

from bourse_consumers.alerts import messages
from bourse_consumers.alerts.board import EXACT, Board, Named, View
from bourse_consumers.alerts.expressions import Node, fill, percent
from bourse_consumers.alerts.rule import Rule, form
from bourse_schemas.events import AlertState, PollMarker, PriceAlert, ResolvedBy, Scope

NAMESPACE = UUID("5a0e6c0e-6f0f-5c53-9a51-0d8f1b1f7d11")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MS = timedelta(milliseconds=1)
NOBODY = Named(0, None, None, is_right=False)
SCOPES = {"instrument": Scope.INSTRUMENT, "market": Scope.MARKET, "feed": Scope.FEED}


def millis(at: datetime) -> int:
    """Return an instant as milliseconds since 1970."""
    return (at - EPOCH) // MS


@lru_cache(1 << 12)
def instant(ms: int) -> datetime:
    """Return milliseconds since 1970 as an instant."""
    return EPOCH + ms * MS


class Episode(NamedTuple):
    """An alert that is firing; its id follows from the rest unless it was read from the topic."""

    since: int
    raised: int
    sequence: int
    day: date
    ordinal: int = 0
    alert_id: str | None = None


class Change(NamedTuple):
    """The begin or end of an episode, at a row of the board; `place` is the instrument's, -1 if there is none."""

    state: AlertState
    rule: int
    place: int
    row: int
    at: int
    sequence: int
    episode: Episode
    resolved_by: ResolvedBy | None = None


def _table_row(rule: Rule, board: Board, place: int) -> Mapping[str, float]:
    """Return the numbers of an instrument in the rule's table, by column."""
    if place < 0 or not rule.table.columns:
        return {}
    symbols = [form(each.symbol or "") for each in board.names[place]]
    return rule.table.row(board.codes[place], next((each for each in symbols if each in rule.table.rows), ""))


def numbers_of(rule: Rule, board: Board, place: int) -> list[float]:
    """Return what is in the places of a rule's expressions for an instrument."""
    row = _table_row(rule, board, place)
    return [row[each] if isinstance(each, str) else each for each in rule.numbers]


def view_of(board: Board, a: int, b: int, pairs: Sequence[tuple[Rule, int]]) -> View:
    """Return the rows a to b of pairs of a rule and an instrument; the rules differ by their numbers only."""
    places = np.array([place for _, place in pairs]) if pairs[0][0].scope == "instrument" else None
    view = View(board, a, b, places)
    view.numbers = np.array([numbers_of(rule, board, place) for rule, place in pairs], float).T[:, None, :]
    return view


class Renderer:
    """Makes alerts of changes, with the board as it was at their rows. `feed` is what rules about the feed see."""

    def __init__(self, rules: Sequence[Rule], board: Board, feed: Any) -> None:
        self._rules, self._board, self._feed = rules, board, feed

    def render(self, changes: Sequence[Change], marker: PollMarker) -> list[PriceAlert]:
        """Return changes as alerts, by row and rule."""
        groups: dict[Any, list[Change]] = {}
        for change in changes:
            groups.setdefault((change.row, self._rules[change.rule].shape), []).append(change)
        with np.errstate(all="ignore"):
            found = [(change, alert) for some in groups.values() for change, alert in self._alerts(some, marker)]
        found.sort(key=lambda each: (each[0].row, each[0].rule))
        return [alert for _, alert in found]

    def _alerts(self, changes: Sequence[Change], marker: PollMarker) -> Iterator[tuple[Change, PriceAlert]]:
        """Yield the alerts of changes of one row, of rules that differ by their numbers and words."""
        board, count, row = self._board, len(changes), changes[0].row
        like = self._rules[changes[0].rule]
        instrument = like.scope == "instrument"
        view: Any = self._feed
        if like.scope != "feed":
            view = view_of(board, row, row + 1, [(self._rules[each.rule], each.place) for each in changes])

        def worked_out(node: Node) -> list[float]:
            found = np.asarray(node.run(view), float).reshape(-1)
            return (found if len(found) == count else np.broadcast_to(found, count)).tolist()  # type: ignore[no-any-return]

        sides = [worked_out(side.node) for side in like.when.sides]
        parts = {place: worked_out(part.expression.node) for place, part in like.parts if part.expression}
        unknown = [np.nan] * count
        prices, times, rises = unknown, unknown, unknown
        if instrument:
            prices, times = (view.column(name)[0].tolist() for name in ("last_price", "traded_at"))
            rises = percent(view.column("last_price"), view.column("previous_close"))[0].tolist()
        for k, change in enumerate(changes):
            rule, i, episode = self._rules[change.rule], change.place, change.episode
            firing = change.state is AlertState.FIRING
            named, code = (board.named(i, row), board.codes[i]) if instrument else (NOBODY, None)
            last = self._whole(prices[k], "last_price", row, i)
            traded = self._whole(times[k], "traded_at", row, i)
            subject = {
                "rule": rule.name, "title": rule.title or "", "severity": rule.severity, "state": change.state,
                "instrument": code or "", "symbol": named.symbol or "",
                "instrument_title": named.title or "", "source": marker.source,
            }  # fmt: skip
            message: dict[str, str] | None = None
            if firing or not rule.momentary:
                message = {}
                for language in rule.texts or messages.LANGUAGES:
                    if rule.texts:
                        state = "firing" if firing else "resolved"
                        message[language] = "".join(
                            self._filled(part, parts.get((language, state, m), unknown)[k], (row, i), subject, language)
                            for m, part in enumerate(rule.texts[language][state])
                        )
                        continue
                    feed = f"{messages.COLUMNS['feed_state'][language]} {marker.feed_state}"
                    shown = [feed] if rule.scope == "feed" else []
                    for side, (phrase, spec), found in zip(rule.when.sides, rule.phrases[language], sides, strict=True):
                        text = messages.show(found[k], side.node.kind, spec, language, "%" if spec else "")
                        shown.append(f"{phrase} {text}")
                    message[language] = messages.usual(subject, last, rises[k], shown, language)
            row_of = _table_row(rule, board, i)
            values = {
                fill(side.text, row_of): found[k] / 1000 if side.node.kind == "time" else found[k]
                for side, found in zip(rule.when.sides, sides, strict=True) if not isnan(found[k])
            }  # fmt: skip
            yield change, PriceAlert(
                alert_id=episode.alert_id or _alert_id(rule, code, episode), state=change.state, rule=rule.name,
                title=rule.title, severity=rule.severity, scope=SCOPES[rule.scope], trading_day=episode.day,
                source=marker.source, instrument=code, symbol=named.symbol, instrument_title=named.title,
                poll_sequence=change.sequence, when=fill(rule.when.text, row_of), values=values, last_price=last,
                traded_at=instant(traded) if traded else None, since=instant(episode.since),
                raised_at=instant(change.at), resolved_by=change.resolved_by, message=message,
                labels=dict(rule.labels), channels=list(rule.channels),
            )  # fmt: skip

    def _whole(self, value: float, name: str, row: int, place: int) -> int | None:
        """Return a column's value as the whole number it was."""
        if isnan(value):
            return None
        return int(value) if abs(value) < EXACT else self._board.exact(name, row, place)

    def _filled(
        self, part: messages.Part, value: float, place: tuple[int, int], subject: Mapping[str, str], language: str
    ) -> str:
        """Return a part of a text; a column alone is printed as the whole number it was."""
        if part.expression is None:
            return subject[part.word] if part.word else part.text
        node = part.expression.node
        whole = self._whole(value, node.key, *place) if place[1] >= 0 and node.key in self._board.columns else value
        return messages.show(whole, node.kind, part.spec, language)


def _alert_id(rule: Rule, code: str | None, episode: Episode) -> str:
    """Return the uuid5 of what makes an episode the same one."""
    parts = (rule.name, rule.scope, code or "", episode.day, episode.sequence, episode.ordinal)
    # uuid5 itself takes three times as long.
    digest = bytearray(sha1(NAMESPACE.bytes + "\0".join(map(str, parts)).encode(), usedforsecurity=False).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x50, digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
