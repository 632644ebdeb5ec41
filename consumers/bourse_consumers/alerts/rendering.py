"""Episodes as alerts: identity, values and texts. Pure.

What one rule begins and ends at one poll is worked out together: an alert costs about as much as its texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from hashlib import sha1
from itertools import groupby
from math import isnan
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np

from bourse_consumers.alerts import messages
from bourse_consumers.alerts.board import EXACT, Board, View
from bourse_consumers.alerts.expressions import Node, fill, percent
from bourse_consumers.alerts.rule import Rule, form
from bourse_schemas.events import AlertState, PollMarker, PriceAlert, ResolvedBy, Scope

__all__ = ["Change", "Episode", "Renderer", "instant", "millis", "numbers_of"]

NAMESPACE = UUID("5a0e6c0e-6f0f-5c53-9a51-0d8f1b1f7d11")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MS = timedelta(milliseconds=1)
SCOPES = {"instrument": Scope.INSTRUMENT, "market": Scope.MARKET, "feed": Scope.FEED}


def millis(at: datetime) -> int:
    """Return an instant as milliseconds since 1970."""
    return (at - EPOCH) // MS


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


def _place(change: Change) -> tuple[int, int]:
    return change.row, change.rule


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


class Renderer:
    """Makes alerts of changes, with the board as it was at their rows. `feed` is what rules about the feed see."""

    def __init__(self, rules: Sequence[Rule], board: Board, feed: Any) -> None:
        self._rules, self._board, self._feed = rules, board, feed
        # Per rule and language the compared quantities in words, made when first needed.
        self._phrases: dict[tuple[int, str], list[str]] = {}

    def render(self, changes: Sequence[Change], marker: PollMarker | None) -> list[PriceAlert]:
        """Return changes as alerts, by row and rule."""
        out: list[PriceAlert] = []
        for (row, n), some in groupby(sorted(changes, key=_place), _place):
            assert marker is not None  # noqa: S101  # changes come from polls
            with np.errstate(all="ignore"):
                out += self._alerts(n, row, list(some), marker)
        return out

    def _alerts(self, n: int, row: int, changes: Sequence[Change], marker: PollMarker) -> Iterator[PriceAlert]:
        rule, board, count = self._rules[n], self._board, len(changes)
        instrument = rule.scope == "instrument"
        places = np.array([each.place for each in changes])
        view: Any = self._feed
        if rule.scope != "feed":
            view = View(board, row, row + 1, places if instrument else None)
            view.numbers = np.array([numbers_of(rule, board, each) for each in places], float).T[:, None, :]

        def values(node: Node) -> list[float]:
            found = np.asarray(node.run(view), float).reshape(-1)
            return (found if len(found) == count else np.broadcast_to(found, count)).tolist()  # type: ignore[no-any-return]

        sides = [(side, values(side.node)) for side in rule.when.sides]
        wanted = {
            id(part): values(part.expression.node)
            for texts in rule.texts.values() for parts in texts.values() for part in parts if part.expression
        }  # fmt: skip
        columns = {name: [np.nan] * count for name in ("last_price", "traded_at")}
        rises = [np.nan] * count
        if instrument:
            columns = {name: view.column(name)[0].tolist() for name in columns}
            rises = percent(view.column("last_price"), view.column("previous_close"))[0].tolist()
        for k, change in enumerate(changes):
            i, episode, firing = change.place, change.episode, change.state is AlertState.FIRING
            named, code = (board.named(i, row), board.codes[i]) if instrument else (None, None)
            numbers = _table_row(rule, board, i)
            last, traded = (self._whole(found[k], name, row, i) for name, found in columns.items())
            subject = {
                "rule": rule.name, "title": rule.title or "", "severity": rule.severity.value,
                "state": change.state.value, "instrument": code or "", "symbol": (named and named.symbol) or "",
                "instrument_title": (named and named.title) or "", "source": marker.source,
            }  # fmt: skip
            message: dict[str, str] | None = None
            if firing or not rule.momentary:
                message = {}
                for language in rule.texts or messages.LANGUAGES:
                    if rule.texts:
                        parts = rule.texts[language]["firing" if firing else "resolved"]
                        message[language] = "".join(
                            self._filled(part, wanted.get(id(part), ()), (row, i), subject, language=language, k=k)
                            for part in parts
                        )
                    else:
                        phrases = self._words(n, language)
                        shown = [
                            f"{phrase} {messages.quantity(side, found[k], language)}"
                            for phrase, (side, found) in zip(phrases, sides, strict=True)
                        ]
                        if rule.scope == "feed":
                            shown.insert(0, messages.describe_feed(marker.feed_state, language))
                        message[language] = messages.usual(subject, (last, rises[k]), shown, rule.scope, language)
            yield PriceAlert(
                alert_id=episode.alert_id or _alert_id(rule, code, episode),
                state=change.state,
                rule=rule.name,
                title=rule.title,
                severity=rule.severity,
                scope=SCOPES[rule.scope],
                trading_day=episode.day,
                source=marker.source,
                instrument=code,
                symbol=named.symbol if named else None,
                instrument_title=named.title if named else None,
                poll_sequence=change.sequence,
                when=fill(rule.when.text, numbers),
                values={
                    fill(side.text, numbers): found[k] / 1000 if side.node.kind == "time" else found[k]
                    for side, found in sides if not isnan(found[k])
                },
                last_price=last,
                traded_at=instant(traded) if traded else None,
                since=instant(episode.since),
                raised_at=instant(change.at),
                resolved_by=change.resolved_by,
                message=message,
                labels=dict(rule.labels),
                channels=list(rule.channels),
            )  # fmt: skip

    def _words(self, n: int, language: str) -> list[str]:
        if (n, language) not in self._phrases:
            sides = self._rules[n].when.sides
            self._phrases[n, language] = [messages.describe(side.tree, language) for side in sides]
        return self._phrases[n, language]

    def _whole(self, value: float, name: str, row: int, place: int) -> int | None:
        """Return a column's value as the whole number it was."""
        if isnan(value):
            return None
        return int(value) if abs(value) < EXACT else self._board.exact(name, row, place)

    def _filled(
        self, part: messages.Part, values: Sequence[float], place: tuple[int, int], subject: Mapping[str, str], *,
        language: str, k: int,
    ) -> str:  # fmt: skip
        """Return a part of a text; a column alone is printed as the whole number it was."""
        if part.expression is None:
            return subject[part.word] if part.word else part.text
        node, value = part.expression.node, values[k]
        whole = self._whole(value, node.key, *place) if place[1] >= 0 and node.key in self._board.columns else value
        return messages.show(whole, node.kind, part.spec, language)


def _alert_id(rule: Rule, code: str | None, episode: Episode) -> str:
    """Return the uuid5 of what makes an episode the same one."""
    parts = (rule.name, rule.scope, code or "", episode.day, episode.sequence, episode.ordinal)
    digest = bytearray(sha1(NAMESPACE.bytes + "\0".join(map(str, parts)).encode(), usedforsecurity=False).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x50, digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
