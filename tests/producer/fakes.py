"""What the tests of the service put on its sides: a clock set by hand, an exchange, a log of what is committed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

from bourse_producer.calendar import Calendar
from bourse_producer.clock import Clock
from bourse_producer.diff import Changes
from bourse_producer.finnotech import Reply
from bourse_producer.markers import was_committed
from bourse_producer.patience import Call
from bourse_producer.publisher import State
from bourse_producer.service import Producer, Settings
from bourse_schemas.errors import ExchangeError
from bourse_schemas.events import TEHRAN, Candle, DeadLetter, PollMarker, TradeEvent
from reliability.alone import Alone

__all__ = ["ALL_DAYS", "DAY", "ByTheClock", "FakeClock", "FakeExchange", "Log", "Office", "at", "row", "was_committed"]

DAY = date(2026, 11, 21)
ALL_DAYS = Calendar(holiday=lambda day: None)
Rows = Sequence[dict[str, Any]]
Answer = tuple[datetime, Rows] | ExchangeError


def at(clock: str, day: date = DAY) -> datetime:
    """Return a time of a Tehran day."""
    return datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=TEHRAN).astimezone(UTC)


def row(code: str = "IRO1MADN0001", clock: str = "09:30:00", volume: object = 10, **fields: object) -> dict[str, Any]:
    """Return a row as the exchange sends it."""
    usual = {"CoID": 5, "BourseSymbol": "x", "TseSymbolCode": code, "FullTitle": "x", "PrecedencyRight": False}
    times = {"TradeDateGre": f"{DAY:%Y/%m/%d} {clock}", "TradeDate": "1405/08/30"}
    totals = {"TradeVolume": volume, "TradeValue": 1000, "TradeQty": 1, "LastPrice": 100}
    return {**usual, **times, **totals, **fields}


class FakeClock(Clock):
    """A clock that stops until time passes, and that ends its waits at `stop_at`."""

    def __init__(self, now: datetime, *, simulated: bool = False) -> None:
        super().__init__()
        self.wall, self.steady, self.simulated = now, 1000.0, simulated
        self.stop_at = float("inf")
        self.waited: list[float] = []

    def now(self) -> datetime:
        """Return the wall clock's time."""
        return self.wall

    def monotonic(self) -> float:
        """Return the elapsed time."""
        return self.steady

    def wait(self, seconds: float) -> bool:
        """Let time pass at once."""
        if seconds > 0:
            self.waited.append(seconds)
        self.go(min(max(0.0, seconds), max(0.0, self.stop_at - self.steady)))
        return self.steady >= self.stop_at

    def seconds_to_beat(self, interval: float) -> float:
        """Return the seconds to the next multiple of the interval."""
        return interval - self.wall.timestamp() % interval if interval else 0.0

    def arrived(self, received_at: datetime, dated: datetime | None) -> datetime:
        """Return the time of the response if it is that of a simulated market, which goes on from there."""
        if self.simulated and dated is not None:
            self.wall = dated
        return self.wall

    def go(self, seconds: float) -> None:
        """Let time pass."""
        self.wall += timedelta(seconds=seconds)
        self.steady += seconds

    def until(self, clock: str, day: date = DAY) -> None:
        """Let time pass until a time of a Tehran day."""
        self.go((at(clock, day) - self.wall).total_seconds())


class FakeExchange:
    """Gives the answers of the test, shares and rights each in their order; the last answer is repeated."""

    def __init__(self, shares: Sequence[Answer], rights: Sequence[Answer] = ()) -> None:
        self.answers = {Call.SHARES: list(shares), Call.RIGHTS: list(rights)}
        self.asked: list[Call] = []
        self.begun: list[tuple[int, bool]] = []
        self.renewals = 0

    def begin(self, charged_today: int, final: bool) -> None:
        """Take note."""
        self.begun.append((charged_today, final))

    def renew(self) -> None:
        """Take note."""
        self.renewals += 1

    def fetch(self, call: Call, *, until: float) -> Reply:
        """Return the next answer or raise it."""
        self.asked.append(call)
        answers = self.answers[call]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, ExchangeError):
            raise answer
        dated, rows = answer
        return reply(dated, rows)


def reply(dated: datetime, rows: Rows) -> Reply:
    """Return a response of this time."""
    track_id = uuid4().hex
    body = json.dumps({"trackId": track_id, "result": rows, "state": "DONE"}).encode()
    return Reply(track_id, body, dated, dated, dated)


class ByTheClock(FakeExchange):
    """Answers by the test's clock, with one row whose volume grows from call to call."""

    def __init__(self, clock: FakeClock, *failures: ExchangeError | None) -> None:
        super().__init__([])
        self.clock, self.failures = clock, list(failures)
        # By the number of the call, from 1 on: how many seconds it takes.
        self.slow: dict[int, float] = {}
        self.moves = True

    def fetch(self, call: Call, *, until: float) -> Reply:
        """Return the next answer or raise the next failure."""
        self.asked.append(call)
        self.clock.go(self.slow.get(len(self.asked), 0.0))
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        now = self.clock.now()
        times = {"TradeDateGre": f"{now.astimezone(TEHRAN):%Y/%m/%d} 08:30:00"}
        moves = len(self.asked) if self.moves else 1
        return reply(now, [row(volume=moves * 10, TradeQty=moves * 10, TradeValue=moves * 1000, **times)])


class Log:
    """What was committed, by all publications of a producer, and how often one was opened and closed.

    A failure of `failures` is raised instead of a commit; with `committing` the commit succeeds all the same.
    """

    def __init__(self, *failures: Exception | None, opening: Sequence[Exception | None] = ()) -> None:
        self.failures, self.opening, self.committing = list(failures), list(opening), False
        self.events: list[TradeEvent] = []
        self.candles: dict[str, Candle] = {}
        self.letters: list[DeadLetter] = []
        self.markers: list[PollMarker] = []
        self.opened = self.closed = self.idled = 0
        self.room: Exception | None = None
        self.on_publish: Callable[[], None] = lambda: None

    def __call__(self) -> Log.Publication:
        """Return a new publication."""
        self.opened += 1
        return Log.Publication(self)

    def state(self) -> State:
        """Return what is committed."""
        sequence = self.markers[-1].poll_sequence if self.markers else 0
        return State(dict(self.candles), sequence, list(self.markers))

    def outcomes(self) -> str:
        """Return the first letters of all outcomes; the markers must have no hole."""
        assert [m.poll_sequence for m in self.markers] == list(range(1, len(self.markers) + 1))
        assert len({event.event_id for event in self.events}) == len(self.events)
        return "".join(m.outcome.value[0] for m in self.markers)

    class Publication:
        """Commits to the log, or fails as the test has it."""

        def __init__(self, log: Log) -> None:
            self.log = log

        def restore(self) -> State:
            """Return what is committed."""
            if self.log.opening and (failure := self.log.opening.pop(0)) is not None:
                raise failure
            return self.log.state()

        def require_room_for(self, instant: datetime) -> None:
            """Raise what the test has."""
            if self.log.room is not None:
                raise self.log.room

        def publish(self, changes: Changes, letters: Sequence[DeadLetter], markers: Sequence[PollMarker]) -> None:
            """Commit, or raise what the test has."""
            log = self.log
            log.on_publish()
            failure = log.failures.pop(0) if log.failures else None
            if failure is None or log.committing:
                log.events += changes.events
                log.candles |= {candle.instrument: candle for candle in changes.candles}
                log.letters += letters
                log.markers += markers
            if failure is not None:
                raise failure

        def idle(self) -> None:
            """Count it."""
            self.log.idled += 1

        def close(self) -> None:
            """Count it."""
            self.log.closed += 1


class Office:
    """Which instance leads, as the test has it."""

    def __init__(self, *terms: int | None, clock: FakeClock | None = None) -> None:
        self.terms, self.clock = list(terms), clock
        self.resigned = self.closed = 0
        self.owed: list[float | None] = []
        self.is_overdue = False

    @property
    def leads(self) -> bool:
        """Return whether there is a term."""
        return self.terms[0] is not None

    def term(self, wait_seconds: float = 0.0) -> int | None:
        """Return the present term; waiting brings the next one, and time passes."""
        if self.clock is not None:
            self.clock.wait(wait_seconds)
        if wait_seconds and len(self.terms) > 1:
            self.terms.pop(0)
        return self.terms[0]

    def owe(self, in_seconds: float | None) -> None:
        """Take note."""
        self.owed.append(in_seconds)

    def overdue(self) -> bool:
        """Return what the test has."""
        return self.is_overdue

    def resign(self) -> None:
        """Give the term up."""
        self.resigned += 1
        self.terms[0] = None

    def close(self) -> None:
        """Count it."""
        self.closed += 1


def service(clock: FakeClock, log: Log, exchange: FakeExchange | None = None, **changes: Any) -> Producer:
    """Return a producer by this clock, on every day."""
    extras = {name: changes.pop(name) for name in ("leadership", "capture", "monitor") if name in changes}
    extras.setdefault("leadership", Alone())
    settings = Settings(**{"calendar": lambda: ALL_DAYS, **changes})
    return Producer(exchange or ByTheClock(clock), log, settings, clock, **extras)


def run_until(producer: Producer, clock: FakeClock, clock_time: str, day: date = DAY) -> None:
    """Run the service until this time of a Tehran day."""
    clock.stop_at = clock.steady + (at(clock_time, day) - clock.wall).total_seconds()
    producer.run()
    clock.stop_at = float("inf")
