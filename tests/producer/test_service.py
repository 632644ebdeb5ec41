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

from bourse_producer.calendar import TEHRAN, Calendar
from bourse_producer.diff import Changes
from bourse_producer.finnotech import SOURCE, Reply
from bourse_producer.publisher import State
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
from bourse_schemas.events import Candle, DeadLetter, FeedState, Op, Outcome, Phase, PollMarker, TradeEvent

DAY = date(2026, 11, 21)
ALL_DAYS = Calendar(is_holiday=lambda day: False)


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

    def realtime(self, *, rights: bool) -> Reply:
        """Return the next answer or raise it."""
        self.asked.append(rights)
        answers = self.answers[rights]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, ExchangeError):
            raise answer
        dated, rows = answer() if callable(answer) else answer
        track_id = uuid4().hex
        body = json.dumps({"trackId": track_id, "result": rows, "state": "DONE"}).encode()
        return Reply(track_id, body, datetime.now(UTC), dated)


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
            good = [m for m in self.log.markers if m.outcome in {Outcome.PUBLISHED, Outcome.UNCHANGED}]
            sequence = self.log.markers[-1].poll_sequence if self.log.markers else 0
            return State(dict(self.log.candles), sequence, good[-1].received_at if good else None)

        def require_room_for(self, instant: datetime) -> None:
            """Raise what the test says."""
            if self.log.room is not None:
                raise self.log.room

        def publish(self, changes: Changes, letters: list[DeadLetter], marker: PollMarker) -> None:
            """Commit, or raise what the test says."""
            self.log.on_publish()
            if self.log.failures and (failure := self.log.failures.pop(0)) is not None:
                raise failure
            self.log.events += changes.events
            self.log.candles |= {candle.instrument: candle for candle in changes.candles}
            self.log.letters += letters
            self.log.markers.append(marker)
            self.log.at.append(time.time())

        def close(self) -> None:
            """Count it."""
            self.log.closed += 1


def settings(**changes: Any) -> Settings:
    """Return settings of a service that is told the time by the responses."""
    usual = {"source": SOURCE, "poll_seconds": 60, "response_clock": True, "calendar": ALL_DAYS}
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
        def realtime(self, *, rights: bool) -> Reply:
            return Reply("t", b"<html>", datetime.now(UTC), at("09:31:00"))

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
        return producer._gap_from(now, ALL_DAYS.phase(now)) is not None

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

    def realtime(*, rights: bool) -> Reply:
        started.append(time.time())
        return ask(rights=rights)

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


CLOSED = Calendar(is_holiday=lambda day: True)


def test_closed_days_cost_no_call() -> None:
    """The publication is given up meanwhile, so that the next session starts with a fresh one, and it is said."""
    log = Log()
    producer = Producer(FakeExchange([]), log, settings(response_clock=False, calendar=CLOSED))
    producer._open()
    producer._stop.set()
    with capture_logs() as lines:
        assert not producer._wait_for_session()
    assert (log.opened, log.closed, [line["event"] for line in lines]) == (1, 1, ["session closed"])


def test_only_a_response_tells_the_hour_of_a_simulated_market() -> None:
    """Without one yet, or after one from a closed hour, the exchange is asked."""
    exchange = FakeExchange([(at("20:00:00"), [])])
    producer = polled(exchange, Log(), 0, poll_seconds=0, calendar=CLOSED)
    assert producer._wait_for_session()
    producer._recoverable(producer._poll_once)
    assert producer._wait_for_session()


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
