"""The bundled real day in a `State` without Kafka, and the board's server on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from bourse_cli.health import Monitor
from bourse_consumers.alerts.trial import read, real_day
from bourse_consumers.board.server import Publisher, application
from bourse_consumers.board.state import Located, State
from bourse_sandbox.serving import serve
from bourse_schemas.events import Op, PollMarker, TradeEvent
from tests.samples import alert, marker

__all__ = ["Feed", "alerts_of_day", "polls_of_day", "serving"]


@cache
def polls_of_day() -> Sequence[tuple[PollMarker, Sequence[TradeEvent]]]:
    """Return the real day's polls, each with its events."""
    polls = []
    events = [event for event in read([real_day()]) if isinstance(event, TradeEvent)]
    events.sort(key=lambda event: event.poll_sequence)
    for sequence, group in groupby(events, key=lambda event: event.poll_sequence):
        these = list(group)
        ops = [event.op for event in these]
        at: datetime = these[0].observed_at
        counts = {op.lower(): ops.count(op) for op in Op if op is not Op.UNKNOWN}
        day = max(event.trading_day for event in these)
        times = {"requested_at": at, "received_at": at, "next_poll_at": at + timedelta(seconds=60)}
        latest = max(event.traded_at for event in these)
        made = marker(sequence, **counts, **times, simulated=True, session_day=day, latest_traded_at=latest)
        polls.append((made, these))
    return polls


def alerts_of_day() -> Iterator[Any]:
    """Yield alerts on instruments that the real day has."""
    marker, events = polls_of_day()[len(polls_of_day()) // 2]
    for number, event in enumerate(events[:60]):
        rule = ("fast-move", "surge", "my-stops")[number % 3]
        yield alert(
            alert_id=f"alert-{number}",
            rule=rule,
            title={"fast-move": "حرکت تند", "surge": "جهش حجم"}.get(rule),
            severity=("INFO", "WARNING", "CRITICAL")[number % 3],
            trading_day=event.trading_day,
            instrument=event.instrument,
            symbol=event.symbol,
            instrument_title=event.title,
            poll_sequence=event.poll_sequence,
            last_price=event.last_price,
            since=marker.received_at,
            raised_at=marker.received_at,
            traded_at=event.traded_at,
            message={"fa": f"{event.symbol}: تغییر ۵ دقیقه ۳٫۲٪", "en": f"{event.symbol}: 3.2 % in 5 minutes"},
        )


class Feed:
    """What the server needs of a feed, without Kafka."""

    def __init__(self) -> None:
        self.state, self.lock = State(), threading.Lock()
        self.failed: BaseException | None = None

    def settled(self, now: float) -> State:
        """Return the state."""
        self.state.settle(now)
        return self.state

    def trouble(self) -> str | None:
        """Return that nothing is the matter."""
        return None

    def add(self, *events: object) -> None:
        """Fold events in; those of trades get a place."""
        with self.lock:
            for event in events:
                what = Located(event, 2, event.sequence + 1000) if isinstance(event, TradeEvent) else event
                self.state.add(what, time.monotonic())
            self.state.settle(time.monotonic())

    def play(self, begin: int = 0, end: int | None = None, live: bool = True) -> None:
        """Fold polls of the real day in, and be live."""
        for poll, events in polls_of_day()[begin:end]:
            self.add(*events, poll)
        if live:
            with self.lock:
                self.state.go_live(time.monotonic())


@contextmanager
def serving(feed: Any, port: int = 0, *, notice: Path | None = None, **options: Any) -> Iterator[str]:
    """Serve the board on this feed; gives its URL."""
    publisher = Publisher(feed, Monitor("board"), notice=notice)
    with serve(application(publisher, **options), port=port) as server:
        yield server.url
