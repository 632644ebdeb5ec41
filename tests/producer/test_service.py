"""The service with fakes on both sides: one poll, one publication, one marker, whatever happens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from bourse_cli.health import Monitor
from bourse_producer.calendar import Calendar
from bourse_producer.diff import Changes
from bourse_producer.finnotech import Reply
from bourse_producer.publisher import State
from bourse_producer.responses import SOURCE, Reading
from bourse_producer.service import Producer, Settings
from bourse_schemas.errors import (
    ConfigurationError,
    ExchangeError,
    ExchangeNonsense,
    ExchangeRefused,
    ExchangeUnavailable,
    Fenced,
    PublishError,
    Unreachable,
)
from bourse_schemas.events import TEHRAN, Candle, DeadLetter, FeedState, Op, Outcome, Phase, PollMarker, TradeEvent

DAY = date(2026, 11, 21)
ALL_DAYS = Calendar(holiday=lambda day: None)


def at(clock: str, day: date = DAY) -> datetime:
    """Return a time of a Tehran day."""
    return datetime.combine(day, datetime.fromisoformat(f"{day}T{clock}").time(), TEHRAN).astimezone(UTC)


def row(code: str = "IRO1MADN0001", clock: str = "09:30:00", volume: object = 10, **fields: object) -> dict[str, Any]:
    """Return a row as the exchange sends it."""
    usual = {"CoID": 5, "BourseSymbol": "x", "TseSymbolCode": code, "FullTitle": "x", "PrecedencyRight": False}
    times = {"TradeDateGre": f"{DAY:%Y/%m/%d} {clock}", "TradeDate": "1405/08/30"}
    totals = {"TradeVolume": volume, "TradeValue": 1000, "TradeQty": 1, "LastPrice": 100}
    return {**usual, **times, **totals, **fields}


Rows = Sequence[dict[str, Any]]
Answer = tuple[datetime, Rows] | ExchangeError | Callable[[], tuple[datetime, Rows]]


class FakeExchange:
    """Answers what the test says, shares and rights each in their order; the last answer is repeated."""

    def __init__(self, shares: Sequence[Answer], rights: Sequence[Answer] = ()) -> None:
        self.answers: dict[bool, list[Answer]] = {False: list(shares), True: list(rights)}
        self.asked: list[bool] = []

    def realtime(self, *, rights: bool, company_id: int | None = None, minutes: tuple[str, str] | None = None) -> Reply:
        """Return the next answer or raise it."""
        self.asked.append(rights)
        answers = self.answers[rights]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, ExchangeError):
            raise answer
        dated, rows = answer() if callable(answer) else answer
        track_id = uuid4().hex
        body = json.dumps({"trackId": track_id, "result": rows, "state": "DONE"}).encode()
        return Reply(track_id, body, datetime.now(UTC), datetime.now(UTC), dated)


class Log:
    """What was committed, by all publications of a producer, and how often one was opened and closed."""

    def __init__(self, *failures: Exception | None, opening: Sequence[Exception | None] = ()) -> None:
        self.failures = list(failures)
        self.opening = list(opening)
        self.events: list[TradeEvent] = []
        self.candles: dict[str, Candle] = {}
        self.letters: list[DeadLetter] = []
        self.markers: list[PollMarker] = []
        self.at: list[float] = []
        self.opened = self.closed = 0
        self.room: Exception | None = None
        self.on_publish: Callable[[], None] = lambda: None

    def __call__(self) -> Log.Publication:
        """Return a new publication."""
        self.opened += 1
        return Log.Publication(self)

    class Publication:
        """Commits to the log, or fails as the test says."""

        def __init__(self, log: Log) -> None:
            self.log = log

        def restore(self) -> State:
            """Return what is committed."""
            if self.log.opening and (failure := self.log.opening.pop(0)) is not None:
                raise failure
            sequence = self.log.markers[-1].poll_sequence if self.log.markers else 0
            return State(dict(self.log.candles), sequence, list(self.log.markers))

        def require_room_for(self, instant: datetime) -> None:
            """Raise what the test says."""
            if self.log.room is not None:
                raise self.log.room

        def publish(self, changes: Changes, letters: Sequence[DeadLetter], markers: Sequence[PollMarker]) -> None:
            """Commit, or raise what the test says."""
            self.log.on_publish()
            if self.log.failures and (failure := self.log.failures.pop(0)) is not None:
                raise failure
            self.log.events += changes.events
            self.log.candles |= {candle.instrument: candle for candle in changes.candles}
            self.log.letters += letters
            self.log.markers += markers
            self.log.at.append(time.time())

        def close(self) -> None:
            """Count it."""
            self.log.closed += 1


def settings(**changes: Any) -> Settings:
    """Return settings of a service that is told the time by the responses."""
    usual = {
        "source": SOURCE,
        "poll_seconds": 60,
        "response_clock": True,
        "calendar": lambda: ALL_DAYS,
        "retry_seconds": 0,
        "quota_seconds": 0,
    }
    return Settings(**{**usual, **changes})


def polled(exchange: FakeExchange, log: Log, polls: int, **changes: Any) -> Producer:
    """Poll so many times, without waiting for beats, and recover as the service does."""
    producer = Producer(exchange, log, settings(**changes))
    for _ in range(polls):
        producer._recoverable(producer._poll_once)
    return producer


def test_poll_by_poll() -> None:
    """Opened, unchanged, traded: events, candles and a marker that counts them, sequence by sequence."""
    exchange = FakeExchange(
        [(at("09:31:00"), [row(), row("IRO1XXXX0001")]), (at("09:32:00"), [row()]), (at("09:33:00"), [row(volume=11)])]
    )
    log = Log()
    polled(exchange, log, 3)
    assert [(m.poll_sequence, m.outcome, m.rows, m.opened, m.traded) for m in log.markers] == [
        (1, Outcome.PUBLISHED, 2, 2, 0),
        (2, Outcome.UNCHANGED, 1, 0, 0),
        (3, Outcome.PUBLISHED, 1, 0, 1),
    ]
    assert [(e.op, e.sequence, e.poll_sequence, e.observed_at) for e in log.events] == [
        (Op.OPENED, 1, 1, at("09:31:00")),
        (Op.OPENED, 1, 1, at("09:31:00")),
        (Op.TRADED, 2, 3, at("09:33:00")),
    ]
    marker = log.markers[0]
    assert (marker.phase, marker.session_day, marker.received_at, marker.latest_traded_at) == (
        Phase.OPEN,
        DAY,
        at("09:31:00"),
        at("09:30:00"),
    )
    assert marker.poll_id is not None
    assert (marker.rights_poll_id, marker.gap_from, marker.error_kind, marker.day_final) == (None, None, None, False)
    assert marker.next_poll_at is not None
    assert timedelta() < marker.next_poll_at - at("09:31:00") <= timedelta(seconds=60)
    assert (log.opened, exchange.asked) == (1, [False] * 3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ExchangeUnavailable("timeout", "late", code="REQUEST_TIME_OUT", track_id="t"), "timeout"),
        (ExchangeRefused("quota", "سقف", code="Q", track_id="t"), "quota"),
        (ExchangeNonsense("nonsense", "half", track_id="t"), "nonsense"),
    ],
)
def test_a_failed_poll_is_a_marker_and_the_next_goes_on(error: ExchangeError, kind: str) -> None:
    """FAILED and DOWN with the exchange's words; the next good poll names the gap."""
    exchange = FakeExchange([(at("09:31:00"), [row()]), error, (at("09:33:00"), [row(volume=11)])])
    log = Log()
    polled(exchange, log, 3)
    failed, good = log.markers[1:]
    assert (failed.outcome, failed.feed_state, failed.error_kind, failed.error_code, failed.error_message) == (
        Outcome.FAILED,
        FeedState.DOWN,
        kind,
        error.code,
        str(error),
    )
    assert (failed.poll_id, failed.received_at, failed.rows, failed.gap_from) == ("t", None, 0, None)
    assert (good.outcome, good.gap_from, good.poll_sequence) == (Outcome.PUBLISHED, at("09:31:00"), 3)


def test_a_bad_body_is_a_marker_too() -> None:
    """What only parsing finds out is told like any other failure."""

    class Garbled(FakeExchange):
        def realtime(self, **_: Any) -> Reply:
            return Reply("t", b"<html>", datetime.now(UTC), datetime.now(UTC), at("09:31:00"))

    log = Log()
    polled(Garbled([]), log, 2)
    assert [(m.outcome, m.error_kind, m.poll_id) for m in log.markers] == [(Outcome.FAILED, "nonsense", "t")] * 2


def test_a_failed_publication_starts_over_from_what_is_committed() -> None:
    """A new publication, the restored state, another poll; no hole, nothing twice, the gap on the marker."""
    answers: list[Answer] = [(at(f"09:3{n}:00"), [row(volume=n)]) for n in range(1, 5)]
    log = Log(None, PublishError("commit"), None, None)
    started = time.monotonic()
    polled(FakeExchange(answers), log, 3)
    assert [m.poll_sequence for m in log.markers] == [1, 2, 3]
    assert [m.gap_from for m in log.markers] == [None, at("09:31:00"), None]
    assert [(e.sequence, e.volume, e.volume_delta) for e in log.events] == [(1, 1, 1), (2, 3, 2), (3, 4, 1)]
    assert (log.opened, log.closed) == (2, 1)
    assert 1 <= time.monotonic() - started < 3


def test_a_broker_or_registry_that_is_away_is_waited_for() -> None:
    """Also where opening, or reading the state back, is what fails."""
    log = Log(opening=[Unreachable("away")])
    polled(FakeExchange([(at("09:31:00"), [row()])]), log, 1)
    assert (log.opened, log.closed, len(log.markers)) == (2, 1, 1)


@pytest.mark.parametrize("error", [Fenced("another one"), ConfigurationError("no topic")])
def test_what_waiting_does_not_mend_is_raised(error: Exception) -> None:
    """A successor, or a mistake of the operator's, ends the service."""
    log = Log(error)
    with pytest.raises(type(error)):
        polled(FakeExchange([(at("09:31:00"), [row()])]), log, 1)
    assert log.markers == []


def test_no_room_for_the_day_is_raised() -> None:
    """A record that would not stay is refused before anything is published."""
    log = Log()
    log.room = ConfigurationError("would not stay")
    with pytest.raises(ConfigurationError, match="would not stay"):
        polled(FakeExchange([(at("09:31:00"), [row()])]), log, 1)


def test_a_restart_publishes_nothing_again() -> None:
    """Another process goes on where this one stopped."""
    log = Log()
    polled(FakeExchange([(at("09:31:00"), [row()])]), log, 2)
    polled(FakeExchange([(at("09:32:00"), [row()]), (at("09:33:00"), [row(volume=11)])]), log, 2)
    assert [(m.poll_sequence, m.outcome) for m in log.markers] == [
        (1, Outcome.PUBLISHED),
        (2, Outcome.UNCHANGED),
        (3, Outcome.UNCHANGED),
        (4, Outcome.PUBLISHED),
    ]
    assert [e.sequence for e in log.events] == [1, 2]


def test_two_calls_are_one_transaction() -> None:
    """With rights switched on a poll asks twice and publishes once."""
    exchange = FakeExchange(
        [(at("09:31:00"), [row()])], [(at("09:31:01"), [row("IRR1MADN0101", PrecedencyRight=True)])]
    )
    log = Log()
    polled(exchange, log, 1, rights=True)
    (marker,) = log.markers
    assert exchange.asked == [False, True]
    assert [(e.instrument, e.is_right) for e in log.events] == [("IRO1MADN0001", False), ("IRR1MADN0101", True)]
    assert (marker.rows, marker.opened, marker.feed_state) == (2, 2, FeedState.FRESH)
    assert None not in {marker.poll_id, marker.rights_poll_id}
    assert marker.poll_id != marker.rights_poll_id


@pytest.mark.parametrize("failing", [False, True])
def test_of_two_calls_one_fails(failing: bool) -> None:
    """The other's rows are published, PARTIAL, and the error names the call."""
    calls: dict[bool, list[Answer]] = {
        False: [(at("09:31:00"), [row()])],
        True: [(at("09:31:00"), [row("IRR1MADN0101", PrecedencyRight=True)])],
    }
    calls[failing] = [ExchangeUnavailable("provider", "broken", code="C", track_id="t")]
    log = Log()
    polled(FakeExchange(calls[False], calls[True]), log, 1, rights=True)
    (marker,) = log.markers
    assert (marker.outcome, marker.feed_state, marker.rows) == (Outcome.PUBLISHED, FeedState.PARTIAL, 1)
    name = "rights" if failing else "shares"
    assert (marker.error_kind, marker.error_code, marker.error_message) == ("provider", "C", f"{name}: broken")
    assert (marker.rights_poll_id if failing else marker.poll_id) == "t"


def test_both_calls_fail() -> None:
    """One FAILED marker that names both."""
    error = ExchangeUnavailable("network", "gone")
    log = Log()
    polled(FakeExchange([error], [error]), log, 1, rights=True)
    assert [(m.outcome, m.error_message) for m in log.markers] == [(Outcome.FAILED, "shares: gone; rights: gone")]


def test_a_dead_letter_once_a_run_and_day() -> None:
    """The same bad row is told once, another at once, all again on the next day; each is counted each time."""
    bad, other = row(MaxPrice=1.5), row("IRO1XXXX0001", MaxPrice=1.5)
    tomorrow = at("09:31:00", DAY + timedelta(days=1))
    polls: list[Answer] = [
        (at("09:31:00"), [bad]),
        (at("09:32:00"), [row(MaxPrice=1.5, TradeVolume=12)]),
        (at("09:33:00"), [bad, other]),
        (tomorrow, [bad]),
    ]
    log = Log()
    polled(FakeExchange(polls), log, 4)
    assert [letter.poll_sequence for letter in log.letters] == [1, 3, 4]
    assert [m.rejected_rows for m in log.markers] == [1, 1, 2, 1]
    letter = log.letters[0]
    assert (json.loads(letter.payload), letter.origin, letter.poll_id, letter.failed_at) == (
        bad,
        SOURCE,
        log.markers[0].poll_id,
        at("09:31:00"),
    )


def test_a_dead_letter_that_was_not_committed_is_sent_again() -> None:
    """What failed with its transaction was not told."""
    log = Log(PublishError("commit"))
    polled(FakeExchange([(at("09:31:00"), [row(MaxPrice=1.5)])]), log, 2)
    assert len(log.letters) == 1


def test_the_day_ends_once_and_the_next_poll_is_the_next_session() -> None:
    """The marker of the last poll before 17:00 is final, and readers know not to wait through the night."""
    log = Log()
    clocks = ["16:49:59", "16:59:59.999", "17:00:01"]
    polled(FakeExchange([(at(clock), [row()]) for clock in clocks]), log, 3, poll_seconds=300)
    assert [(m.day_final, m.phase) for m in log.markers] == [
        (False, Phase.AFTER_CLOSE),
        (True, Phase.AFTER_CLOSE),
        (False, Phase.CLOSED),
    ]
    assert log.markers[1].next_poll_at == at("08:45:00", DAY + timedelta(days=1))


def test_gaps_between_runs_by_the_system_clock() -> None:
    """Beats missed since the last good poll are a gap; a night and a weekend without beats are none."""
    wednesday = DAY - timedelta(days=3)
    producer = Producer(FakeExchange([]), Log(), settings(response_clock=False))

    def gap(before: datetime, now: datetime) -> bool:
        producer._last_good_at = before
        return producer._gap_from(now, []) is not None

    assert not gap(at("10:00:00"), at("10:01:30"))
    assert gap(at("10:00:00"), at("10:02:00"))
    assert not gap(at("16:55:00", wednesday), at("08:45:03"))
    assert gap(at("16:55:00", wednesday), at("08:47:00"))
    assert gap(at("11:00:00", wednesday), at("08:45:03"))
    assert not gap(at("13:00:00"), at("13:05:00"))
    assert not gap(at("10:00:00"), at("20:00:00"))


def test_beats_lie_on_multiples_and_a_slow_poll_skips_some() -> None:
    """No drift, and no pile-up when a poll takes longer than an interval."""
    interval = 0.25

    def slow() -> tuple[datetime, Rows]:
        threading.Event().wait(2.5 * interval)
        return at("09:33:00"), [row()]

    exchange = FakeExchange([(at("09:31:00"), [row()]), (at("09:32:00"), [row()]), slow, (at("09:34:00"), [row()])])
    log = Log()
    producer = Producer(exchange, log, settings(poll_seconds=interval, always=True))
    log.on_publish = lambda: producer._stop.set() if len(log.markers) == 6 else None
    started: list[float] = []
    ask = exchange.realtime

    def realtime(**asked: Any) -> Reply:
        started.append(time.time())
        return ask(**asked)

    exchange.realtime = realtime  # type: ignore[method-assign]
    loop(producer)
    late = [beat % interval for beat in started[1:]]
    assert max(late) < 0.15
    gaps = [round((b - a) / interval) for a, b in pairwise(started[1:])]
    assert gaps[1] >= 3
    assert [each for number, each in enumerate(gaps) if number != 1] == [1] * (len(gaps) - 1)


def loop(producer: Producer) -> None:
    """Do what `run` does, but for the signals, which belong to the process of the tests."""
    while not producer._stop.is_set():
        producer._recoverable(producer._poll_once)
        producer._sleep(producer._next_beat() - time.time())


CLOSED = Calendar(holiday=lambda day: "a holiday")


def test_closed_days_cost_no_call() -> None:
    """The publication is given up meanwhile, so that the next session starts with a fresh one, and it is said."""
    log = Log()
    producer = Producer(FakeExchange([]), log, settings(response_clock=False, calendar=lambda: CLOSED))
    producer._recoverable(lambda: None)
    producer._stop.set()
    with capture_logs() as lines:
        assert not producer._is_due()
    assert (log.opened, log.closed, [line["event"] for line in lines]) == (1, 1, ["session closed"])


def test_only_a_response_tells_the_hour_of_a_simulated_market() -> None:
    """Without one yet, or after one from a closed hour, the exchange is asked."""
    exchange = FakeExchange([(at("20:00:00"), [])])
    producer = polled(exchange, Log(), 0, poll_seconds=0, calendar=lambda: CLOSED)
    assert producer._is_due()
    producer._recoverable(producer._poll_once)
    assert producer._is_due()


def test_one_line_a_poll() -> None:
    """Counts that are zero are left out; a failure is a warning with kind and words."""
    exchange = FakeExchange([(at("09:31:00"), [row()]), ExchangeUnavailable("provider", "broken")])
    with capture_logs() as lines:
        polled(exchange, Log(), 2)
    polls = [line for line in lines if line["event"] == "poll"]
    assert [(line["log_level"], line["sequence"], line["outcome"]) for line in polls] == [
        ("info", 1, "PUBLISHED"),
        ("warning", 2, "FAILED"),
    ]
    assert (polls[0]["opened"], "traded" in polls[0]) == (1, False)
    assert (polls[1]["error_kind"], polls[1]["error"]) == ("provider", "broken")


def test_once() -> None:
    """One poll returns its marker and closes; what goes wrong is raised."""
    log = Log()
    producer = Producer(FakeExchange([(at("09:31:00"), [row()])]), log, settings())
    assert producer.run_once().outcome is Outcome.PUBLISHED
    assert (log.opened, log.closed) == (1, 1)
    with pytest.raises(PublishError):
        Producer(FakeExchange([(at("09:31:00"), [row()])]), Log(PublishError("x")), settings()).run_once()


# --- beats, by a clock of the test's own ------------------------------------------------------------------------------


class Time:
    """A wall clock that can be set, and a steady one."""

    def __init__(self, now: datetime) -> None:
        self.wall, self.steady = now.timestamp(), 1000.0

    def time(self) -> float:
        """Return the wall clock's time."""
        return self.wall

    def monotonic(self) -> float:
        """Return the steady clock's."""
        return self.steady

    perf_counter = monotonic

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Return the clock the service goes by; it begins at 10:00 of an open session."""
    clock = Time(at("10:00:00"))
    monkeypatch.setattr("bourse_producer.service.time", clock)
    return clock


class ByTheClock(FakeExchange):
    """Answers by the test's clock, with one row whose volume grows from call to call."""

    def __init__(self, clock: Time, *failures: ExchangeError | None) -> None:
        super().__init__([])
        self.clock, self.failures, self.minutes = clock, list(failures), list[Any]()
        self.minute_rows: Rows = []
        self.takes, self.moves = 0.0, True

    def realtime(self, *, rights: bool, company_id: int | None = None, minutes: tuple[str, str] | None = None) -> Reply:
        """Return the next answer or raise the next failure."""
        self.asked.append(rights)
        self.clock.pass_by(self.takes)
        if minutes is None and self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        now = datetime.fromtimestamp(self.clock.wall, UTC)
        times = {"TradeDateGre": f"{now.astimezone(TEHRAN):%Y/%m/%d} 08:30:00"}
        moves = len(self.asked) if self.moves else 1
        rows: Rows = [row(volume=moves * 10, TradeQty=moves * 10, TradeValue=moves * 1000, **times)]
        if minutes is not None:
            self.minutes.append((company_id, minutes))
            rows = list(self.minute_rows)
        track_id = uuid4().hex
        body = json.dumps({"trackId": track_id, "result": rows, "state": "DONE"}).encode()
        return Reply(track_id, body, now, now, now)


def beat(producer: Producer, clock: Time, polls: int) -> None:
    """Poll on so many beats, as `run` does."""
    for _ in range(polls):
        assert producer._is_due()
        assert producer._recoverable(producer._poll_once)
        clock.pass_by(producer._next_beat() - clock.time())


def served(clock: Time, log: Log, *failures: ExchangeError | None, **changes: Any) -> tuple[Producer, ByTheClock]:
    """Return a producer by the system's clock, and its exchange."""
    exchange = ByTheClock(clock, *failures)
    return Producer(exchange, log, settings(**{"response_clock": False, **changes})), exchange


def outcomes(log: Log) -> list[str]:
    """Return the outcomes of all markers, which must have no hole."""
    assert [m.poll_sequence for m in log.markers] == list(range(1, len(log.markers) + 1))
    return [m.outcome.value[0] for m in log.markers]


def test_beats_missed_by_a_slow_poll_are_skipped_with_the_reason(clock: Time) -> None:
    """Each beat of an open session has a marker, in order, and the poll after names the gap."""
    log = Log()
    producer, exchange = served(clock, log)
    beat(producer, clock, 1)
    exchange.takes = 130.0
    beat(producer, clock, 1)
    exchange.takes = 0.0
    beat(producer, clock, 2)
    assert outcomes(log) == ["P", "P", "S", "S", "P", "P"]
    skipped = log.markers[2:4]
    assert [m.requested_at for m in skipped] == [at("10:02:00"), at("10:03:00")]
    assert {(m.feed_state, m.error_kind, m.error_message, m.received_at) for m in skipped} == {
        (FeedState.DOWN, "internal", "the poll before was still under way", None)
    }
    assert [m.gap_from for m in log.markers[4:]] == [at("10:03:10"), None]
    assert {m.poll_sequence for m in log.markers if m.traded or m.opened} == {e.poll_sequence for e in log.events}


def test_beats_missed_between_runs_are_skipped(clock: Time) -> None:
    """After a pause of minutes, of the open session only; a night makes none."""
    log = Log()
    beat(served(clock, log)[0], clock, 2)
    clock.pass_by(4 * 60)
    beat(served(clock, log)[0], clock, 1)
    assert outcomes(log) == ["P", "P", "S", "S", "S", "S", "P"]
    assert {m.error_message for m in log.markers if m.outcome is Outcome.SKIPPED} == {"no instance was running"}
    assert log.markers[-1].gap_from == at("10:01:00")
    clock.wall = at("08:50:00", DAY + timedelta(days=1)).timestamp()
    beat(served(clock, log)[0], clock, 1)
    assert outcomes(log)[7:] == ["P"]
    clock.wall = at("09:03:00", DAY + timedelta(days=1)).timestamp()
    beat(served(clock, log)[0], clock, 1)
    assert outcomes(log)[8:] == ["S", "S", "S", "U"]


def test_a_clock_that_is_set_makes_no_beats(clock: Time) -> None:
    """An hour forwards or backwards: said, nothing skipped that was not missed, and the beats go on."""
    log = Log()
    producer, _ = served(clock, log)
    beat(producer, clock, 2)
    with capture_logs() as lines:
        clock.wall += 3600
        beat(producer, clock, 2)
        clock.wall -= 7200
        beat(producer, clock, 2)
    assert outcomes(log) == ["P"] * 6
    assert [line["by_seconds"] for line in lines if line["event"] == "the clock was set"] == [3600.0, -7200.0]


def test_an_outage_of_the_brokers_is_told_beat_by_beat(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service starts over until it can publish; what was missed meanwhile is skipped, and says why."""
    log = Log(None, *[PublishError("brokers are away")] * 8)
    producer, _ = served(clock, log)
    monkeypatch.setattr(producer, "_sleep", clock.pass_by)
    beat(producer, clock, 2)
    assert outcomes(log)[0] == "P"
    assert outcomes(log)[-1] == "P"
    skipped = [m for m in log.markers if m.outcome is Outcome.SKIPPED]
    assert {m.error_message for m in skipped} == {"cannot publish: brokers are away"}
    assert [m.requested_at for m in skipped] == [at(f"10:0{n}:00") for n in range(1, len(skipped) + 1)]
    assert log.markers[-1].gap_from == at("10:00:00")


def test_a_quota_is_left_alone(clock: Time) -> None:
    """No call is made until it is over, each beat says so, then polling goes on."""
    log = Log()
    quota = ExchangeRefused("quota", "used up", code="Q")
    producer, exchange = served(clock, log, None, quota, quota_seconds=170)
    beat(producer, clock, 6)
    assert outcomes(log) == ["P", "F", "S", "S", "P", "P"]
    assert len(exchange.asked) == 4
    assert (log.markers[2].error_kind, log.markers[2].error_code) == ("quota", "Q")
    assert str(log.markers[2].error_message).startswith("not called before 10:03:50: used up")


def test_retry_after_is_honoured(clock: Time) -> None:
    """Whatever the error was."""
    log = Log()
    busy = ExchangeUnavailable("rate", "busy", retry_after=100.0)
    producer, exchange = served(clock, log, busy, retry_seconds=1)
    beat(producer, clock, 3)
    assert outcomes(log) == ["F", "S", "P"]
    assert len(exchange.asked) == 2


def test_a_refused_account_is_asked_less_and_less_often(clock: Time) -> None:
    """At the next beat at first, then every five minutes; once it is let in again, every beat."""
    log = Log()
    no = ExchangeRefused("address", "not whitelisted")
    producer, _ = served(clock, log, *[no] * 6)
    beat(producer, clock, 24)
    told = "".join(outcomes(log))
    assert told.startswith("FFSFSS")
    assert told.count("F") == 6
    assert "SSSSS" not in told
    assert told.endswith("PP")


def test_a_failed_call_is_repeated_within_its_beat(clock: Time) -> None:
    """With growing pauses, not beyond the next beat, and not where it is of no use."""
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        clock.pass_by(seconds)
        return False

    log = Log()
    gone = ExchangeUnavailable("network", "gone")
    producer, exchange = served(clock, log, gone, gone, gone, retry_seconds=1)
    producer._stop.wait = wait  # type: ignore[method-assign, assignment]
    beat(producer, clock, 1)
    assert (outcomes(log), len(exchange.asked)) == (["P"], 4)
    assert 0.5 <= waited[0] <= 1 <= waited[1] <= 2 <= waited[2] <= 4
    waited.clear()
    exchange.failures = [gone] * 50
    beat(producer, clock, 1)
    assert outcomes(log) == ["P", "F"]
    assert 25 < sum(waited) < 60
    exchange.failures = [ExchangeNonsense("nonsense", "half"), ExchangeRefused("scope", "no")]
    waited.clear()
    beat(producer, clock, 2)
    assert (outcomes(log)[2:], waited) == (["F", "F"], [])


def test_the_last_poll_of_a_day_is_made_up_for(clock: Time) -> None:
    """Missed by a failure or because nothing ran: asked for until midnight, once it is there the day is final."""
    log = Log()
    clock.wall = at("16:50:00").timestamp()
    gone = ExchangeUnavailable("network", "gone")
    producer, _ = served(clock, log, None, gone, gone)
    beat(producer, clock, 2)
    assert [m.day_final for m in log.markers] == [False, False]
    assert clock.wall == at("17:00:00").timestamp()
    beat(producer, clock, 2)
    assert [(m.outcome, m.phase, m.day_final) for m in log.markers[2:]] == [
        (Outcome.FAILED, Phase.CLOSED, False),
        (Outcome.PUBLISHED, Phase.CLOSED, True),
    ]
    assert log.markers[-1].next_poll_at == at("08:45:00", DAY + timedelta(days=1))
    producer._stop.set()
    assert not producer._is_due()
    evening = Log()
    clock.wall = at("21:00:00").timestamp()
    beat(served(clock, evening)[0], clock, 1)
    assert [m.day_final for m in evening.markers] == [True]
    clock.wall = at("00:30:00", DAY + timedelta(days=1)).timestamp()
    night, _ = served(clock, Log())
    night._stop.set()
    assert not night._is_due()


def test_freshness_outlives_a_restart(clock: Time) -> None:
    """A market that stood still before and after a restart is FROZEN, not fresh."""
    log = Log()
    for _ in range(5):
        producer, exchange = served(clock, log)
        exchange.moves = False
        beat(producer, clock, 1)
    assert [m.feed_state for m in log.markers] == [FeedState.FRESH] * 3 + [FeedState.FROZEN] * 2


def test_a_changed_api_is_not_poured_into_dead_letters() -> None:
    """Where most rows cannot be used none is published: FAILED, the reason, and a sample of the rows."""
    bad = [row(f"IRO1AAAA{n:04}", MaxPrice="a lot") for n in range(30)]
    good = [row(f"IRO1BBBB{n:04}") for n in range(60)]
    log = Log()
    polled(FakeExchange([(at("09:31:00"), [*good, *bad])]), log, 2)
    assert [(m.outcome, m.error_kind, m.rows) for m in log.markers] == [(Outcome.FAILED, "nonsense", 0)] * 2
    assert "30 of 90 rows cannot be used: has the API changed?" in str(log.markers[0].error_message)
    assert (len(log.letters), log.events) == (3, [])
    few = Log()
    polled(FakeExchange([(at("09:31:00"), [*good, *bad[:15]])]), few, 1)
    assert (few.markers[0].outcome, few.markers[0].rejected_rows, len(few.letters)) == (Outcome.PUBLISHED, 15, 15)


# --- several instances ------------------------------------------------------------------------------------------------


class Office:
    """Who leads, as the test says."""

    def __init__(self, *terms: int | None) -> None:
        self.terms = list(terms)
        self.resigned = self.closed = 0

    def term(self, wait_seconds: float = 0.0) -> int | None:
        """Return the present term; waiting brings the next one."""
        if wait_seconds and len(self.terms) > 1:
            self.terms.pop(0)
        return self.terms[0]

    def resign(self) -> None:
        """Give the term up."""
        self.resigned += 1
        self.terms[0] = None

    def close(self) -> None:
        """Count it."""
        self.closed += 1


def test_a_standby_is_warm_and_publishes_nothing() -> None:
    """It connects, so that mistakes are told; once elected it restores and polls; replaced, it ends."""
    log, office = Log(), Office(None, None, 7)
    exchange = FakeExchange([(at("09:31:00"), [row()])])
    producer = Producer(exchange, log, settings(), leadership=office)
    with capture_logs() as lines:
        assert not producer._leads()
    assert (log.opened, exchange.asked, [line["event"] for line in lines]) == (
        1,
        [],
        ["standing by: another instance of this source leads"],
    )
    assert producer._leads()
    assert producer._recoverable(producer._poll_once)
    assert (log.opened, len(log.markers)) == (1, 1)
    office.terms = [None]
    assert not producer._recoverable(producer._poll_once)
    assert not producer._leads()
    assert (log.closed, len(log.markers)) == (1, 1)


def test_a_fenced_leader_says_so_and_stands_again() -> None:
    """Nothing is published, nothing is initialised again before a new term."""
    log, office = Log(None, Fenced("another")), Office(1)
    producer = Producer(FakeExchange([(at("09:31:00"), [row()])]), log, settings(), leadership=office)
    assert producer._leads()
    assert producer._recoverable(producer._poll_once)
    with capture_logs() as lines:
        assert not producer._recoverable(producer._poll_once)
    assert [line["event"].partition(":")[0] for line in lines] == ["fenced"]
    assert (office.resigned, log.opened, log.closed, len(log.markers)) == (1, 1, 1, 1)
    assert not producer._leads()
    office.terms = [2]
    assert producer._leads()
    assert producer._recoverable(producer._poll_once)
    assert [m.poll_sequence for m in log.markers] == [1, 2]


def test_what_another_leader_polled_was_not_missed(clock: Time) -> None:
    """Elected again, an instance counts from the last poll of the source, not from its own."""
    log, office = Log(), Office(1)
    first = Producer(ByTheClock(clock), log, settings(response_clock=False), leadership=office)
    assert first._leads()
    beat(first, clock, 2)
    office.terms = [None]
    assert not first._leads()
    beat(served(clock, log)[0], clock, 5)
    office.terms = [2]
    assert first._leads()
    beat(first, clock, 2)
    assert outcomes(log) == ["P"] * 9
    assert {m.gap_from for m in log.markers} == {None}


def test_who_no_longer_leads_has_nothing_to_say_of_the_feed(clock: Time) -> None:
    """A standby is ready: what it last saw of exchange and market is its successor's to judge now."""
    log, office, monitor = Log(), Office(1), Monitor("producer")
    exchange = ByTheClock(clock, ExchangeUnavailable("network", "gone"))
    exchange.moves = False
    producer = Producer(exchange, log, settings(response_clock=False), leadership=office, monitor=monitor)
    assert producer._leads()
    beat(producer, clock, 1)
    assert list(monitor.reasons()) == ["exchange"]
    beat(producer, clock, 5)
    assert list(monitor.reasons()) == ["feed"]
    office.terms = [None]
    assert not producer._leads()
    assert monitor.reasons() == {}


def test_waiting_for_kafka_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long brokers are away, a restart would not bring them back: the service is alive, and not ready."""
    signs: list[float] = []
    monitor = Monitor("producer")
    monkeypatch.setattr(monitor, "beat", signs.append)
    producer = Producer(
        FakeExchange([(at("09:31:00"), [row()])]), Log(opening=[Unreachable("away")] * 4), settings(), monitor=monitor
    )
    waited: list[float] = []
    monkeypatch.setattr(producer, "_sleep", waited.append)
    assert producer._recoverable(producer._poll_once)
    assert len(signs) == 5
    assert all(sign > wait + 60 for sign, wait in zip(signs, waited, strict=False))


def test_bad_rows_of_other_days_are_forgotten() -> None:
    """What was told once is kept for the day: a service runs for years."""
    bad = [row(f"IRO1AAAA{n:04}", MaxPrice=1.5) for n in range(10)]
    days = [at("09:31:00", DAY + timedelta(days=n)) for n in range(5)]
    producer = polled(FakeExchange([(day, bad) for day in days]), log := Log(), 5)
    assert (len(log.letters), len(producer._lettered)) == (50, 10)


def test_once_beside_a_leader_is_refused() -> None:
    """One poll would push the leader out: it is told what to do instead, and nothing is restored."""
    log, office = Log(), Office(None)
    with pytest.raises(ConfigurationError, match="another instance of this source leads"):
        Producer(FakeExchange([]), log, settings(), leadership=office).run_once()
    assert (office.closed, log.closed, log.markers) == (1, 1, [])


def test_the_capture_comes_before_the_publication() -> None:
    """State, bytes, publication, outcome: in this order, and nothing is published that could not be kept."""
    told: list[str] = []

    class Tape:
        def restored(self, state: State) -> None:
            told.append(f"state {state.poll_sequence}")

        def poll(self, poll_sequence: int, contexts: Sequence[Reading], known: Any) -> None:
            told.append(f"poll {poll_sequence} {[context.is_right for context in contexts]}")
            if len(told) > 6:
                raise PublishError("disk full")

        def committed(self, poll_sequence: int, outcome: Outcome) -> None:
            told.append(f"{outcome} {poll_sequence}")

    log = Log()
    log.on_publish = lambda: told.append("publish")
    producer = Producer(FakeExchange([(at("09:31:00"), [row()])]), log, settings(), capture=Tape())
    for _ in range(2):
        producer._recoverable(producer._poll_once)
    assert told == [
        "state 0",
        "poll 1 [False]",
        "publish",
        "PUBLISHED 1",
        "poll 2 [False]",
        "publish",
        "UNCHANGED 2",
    ]
    with pytest.raises(PublishError):
        producer._poll_once()
    assert len(log.markers) == 2
