"""The service with fakes on all sides: one poll, one publication, one marker, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from structlog.testing import capture_logs

from bourse_cli.health import Monitor
from bourse_producer import publisher
from bourse_producer.calendar import Calendar
from bourse_producer.patience import Call
from bourse_producer.publisher import NoRoom, State
from bourse_producer.responses import Reading
from bourse_schemas.errors import (
    ConfigurationError,
    ExchangeError,
    ExchangeNonsense,
    ExchangeRefused,
    ExchangeUnavailable,
    Fenced,
    PublishError,
    Stuck,
    Unreachable,
)
from bourse_schemas.events import FeedState, Op, Outcome, Phase, PollMarker
from tests.producer.fakes import (
    DAY,
    Answer,
    ByTheClock,
    FakeClock,
    FakeExchange,
    Log,
    Office,
    at,
    row,
    run_until,
    service,
)

TOMORROW = DAY + timedelta(days=1)
GONE = ExchangeUnavailable("network", "gone")


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that begins at 10:00 of an open session."""
    return FakeClock(at("10:00:00"))


def polled(exchange: FakeExchange, log: Log, polls: int, **changes: Any) -> None:
    """Poll a simulated market this many times, without beats."""
    clock = FakeClock(at("09:30:00"), simulated=True)
    producer = service(clock, log, exchange, **{"poll_seconds": 0, **changes})
    for _ in range(polls):
        producer.poll()


# --- one poll after another -------------------------------------------------------------------------------------------


def test_poll_by_poll() -> None:
    """Opened, unchanged, traded: events, candles and a marker that counts them, sequence by sequence."""
    exchange = FakeExchange(
        [(at("09:31:00"), [row(), row("IRO1XXXX0001")]), (at("09:32:00"), [row()]), (at("09:33:00"), [row(volume=11)])]
    )
    log = Log()
    polled(exchange, log, 3)
    assert [(m.poll_sequence, m.outcome, m.rows, m.opened, m.traded, m.charged_calls) for m in log.markers] == [
        (1, Outcome.PUBLISHED, 2, 2, 0, 1),
        (2, Outcome.UNCHANGED, 1, 0, 0, 1),
        (3, Outcome.PUBLISHED, 1, 0, 1, 1),
    ]
    assert [(e.op, e.sequence, e.poll_sequence, e.observed_at) for e in log.events] == [
        (Op.OPENED, 1, 1, at("09:31:00")),
        (Op.OPENED, 1, 1, at("09:31:00")),
        (Op.TRADED, 2, 3, at("09:33:00")),
    ]
    marker = log.markers[0]
    assert (marker.phase, marker.session_day, marker.received_at, marker.latest_traded_at, marker.simulated) == (
        Phase.OPEN,
        DAY,
        at("09:31:00"),
        at("09:30:00"),
        True,
    )
    assert marker.poll_id is not None
    assert (marker.rights_poll_id, marker.gap_from, marker.error_kind, marker.day_final) == (None, None, None, False)
    assert (log.opened, exchange.asked) == (1, [Call.SHARES] * 3)


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
    log = Log()
    polled(FakeExchange([(at("09:31:00"), [row()]), error, (at("09:33:00"), [row(volume=11)])]), log, 3)
    failed, good = log.markers[1:]
    assert (failed.outcome, failed.feed_state, failed.error_kind, failed.error_code, failed.error_message) == (
        Outcome.FAILED,
        FeedState.DOWN,
        kind,
        error.code,
        str(error),
    )
    assert (failed.poll_id, failed.received_at, failed.rows, failed.charged_calls) == ("t", None, 0, 0)
    assert (good.outcome, good.gap_from, good.poll_sequence) == (Outcome.PUBLISHED, at("09:31:00"), 3)


def test_a_restart_publishes_nothing_again() -> None:
    """Another process goes on from what is committed."""
    log = Log()
    polled(FakeExchange([(at("09:31:00"), [row()])]), log, 2)
    polled(FakeExchange([(at("09:32:00"), [row()]), (at("09:33:00"), [row(volume=11)])]), log, 2)
    assert log.outcomes() == "PUUP"
    assert [e.sequence for e in log.events] == [1, 2]


def test_two_calls_are_one_transaction() -> None:
    """With rights switched on a poll asks twice and publishes once; a rejected row names its own call."""
    bad = row("IRR1BADX0101", PrecedencyRight=True, MaxPrice=1.5)
    exchange = FakeExchange(
        [(at("09:31:00"), [row()])], [(at("09:31:01"), [row("IRR1MADN0101", PrecedencyRight=True), bad])]
    )
    log = Log()
    polled(exchange, log, 1, rights=True)
    (marker,) = log.markers
    assert exchange.asked == [Call.SHARES, Call.RIGHTS]
    assert [(e.instrument, e.is_right) for e in log.events] == [("IRO1MADN0001", False), ("IRR1MADN0101", True)]
    assert (marker.rows, marker.opened, marker.feed_state, marker.charged_calls) == (3, 2, FeedState.FRESH, 2)
    assert None not in {marker.poll_id, marker.rights_poll_id}
    assert [letter.poll_id for letter in log.letters] == [marker.rights_poll_id]
    assert marker.poll_id != marker.rights_poll_id


@pytest.mark.parametrize("failing", [Call.SHARES, Call.RIGHTS])
def test_of_two_calls_one_fails(failing: Call) -> None:
    """The other's rows are published, PARTIAL, and the error names the call."""
    calls: dict[Call, list[Answer]] = {
        Call.SHARES: [(at("09:31:00"), [row()])],
        Call.RIGHTS: [(at("09:31:00"), [row("IRR1MADN0101", PrecedencyRight=True)])],
    }
    calls[failing] = [ExchangeUnavailable("provider", "broken", code="C", track_id="t")]
    log = Log()
    polled(FakeExchange(calls[Call.SHARES], calls[Call.RIGHTS]), log, 1, rights=True)
    (marker,) = log.markers
    assert (marker.outcome, marker.feed_state, marker.rows) == (Outcome.PUBLISHED, FeedState.PARTIAL, 1)
    assert (marker.error_kind, marker.error_code, marker.error_message) == ("provider", "C", f"{failing}: broken")
    assert (marker.rights_poll_id if failing is Call.RIGHTS else marker.poll_id) == "t"


def test_both_calls_fail() -> None:
    """One FAILED marker that names both."""
    log = Log()
    polled(FakeExchange([GONE], [GONE]), log, 1, rights=True)
    assert [(m.outcome, m.error_message) for m in log.markers] == [(Outcome.FAILED, "shares: gone; rights: gone")]


def test_a_dead_letter_once_a_run_and_day() -> None:
    """The same bad row is reported once, another at once, all again on the next day; each is counted each time."""
    bad, other = row(MaxPrice=1.5), row("IRO1XXXX0001", MaxPrice=1.5)
    polls: list[Answer] = [
        (at("09:31:00"), [bad]),
        (at("09:32:00"), [row(MaxPrice=1.5, TradeVolume=12)]),
        (at("09:33:00"), [bad, other]),
        (at("09:31:00", TOMORROW), [bad]),
    ]
    log = Log()
    polled(FakeExchange(polls), log, 4)
    assert [letter.poll_sequence for letter in log.letters] == [1, 3, 4]
    assert [m.rejected_rows for m in log.markers] == [1, 1, 2, 1]
    letter = log.letters[0]
    assert (json.loads(letter.payload), letter.poll_id, letter.failed_at) == (
        bad,
        log.markers[0].poll_id,
        at("09:31:00"),
    )


def test_a_changed_api_is_not_poured_into_dead_letters() -> None:
    """If most rows cannot be used none is published: FAILED, the reason, and a sample of the rows."""
    bad = [row(f"IRO1AAAA{n:04}", MaxPrice="a lot") for n in range(30)]
    good = [row(f"IRO1BBBB{n:04}") for n in range(60)]
    log = Log()
    polled(FakeExchange([(at("09:31:00"), [*good, *bad])]), log, 2)
    assert [(m.outcome, m.error_kind, m.rows, m.charged_calls) for m in log.markers] == [
        (Outcome.FAILED, "nonsense", 0, 1)
    ] * 2
    assert "30 of 90 rows cannot be used: has the API changed?" in str(log.markers[0].error_message)
    assert (len(log.letters), log.events) == (3, [])
    few = Log()
    polled(FakeExchange([(at("09:31:00"), [*good, *bad[:15]])]), few, 1)
    assert (few.markers[0].outcome, few.markers[0].rejected_rows, len(few.letters)) == (Outcome.PUBLISHED, 15, 15)


def test_one_line_a_poll() -> None:
    """Counts that are zero are left out; a failure is a warning with kind and words."""
    with capture_logs() as lines:
        polled(FakeExchange([(at("09:31:00"), [row()]), ExchangeUnavailable("provider", "broken")]), Log(), 2)
    polls = [line for line in lines if line["event"] == "poll published"]
    assert [(line["log_level"], line["sequence"], line["outcome"]) for line in polls] == [
        ("info", 1, "PUBLISHED"),
        ("warning", 2, "FAILED"),
    ]
    assert (polls[0]["opened"], "traded" in polls[0], "error" in polls[0]) == (1, False, False)
    assert (polls[1]["error_kind"], polls[1]["error"]) == ("provider", "broken")


def test_once() -> None:
    """One poll returns its marker and closes; what fails is raised."""
    log, clock = Log(), FakeClock(at("09:30:00"))
    marker = service(clock, log).run_once()
    assert marker is not None
    assert (marker.outcome, log.opened, log.closed) == (Outcome.PUBLISHED, 1, 1)
    with pytest.raises(PublishError):
        service(clock, Log(PublishError("x"))).run_once()


def test_once_beside_a_leader_is_refused(clock: FakeClock) -> None:
    """One poll would push the leader out: the message says what to do instead, and nothing is restored."""
    log, office = Log(), Office(None)
    with pytest.raises(ConfigurationError, match="another instance leads this prefix"):
        service(clock, log, leadership=office).run_once()
    assert (office.closed, log.closed, log.markers) == (1, 1, [])


def test_a_dry_run_publishes_nothing(clock: FakeClock) -> None:
    """It works out what would be published after what is committed."""
    log, exchange = Log(), ByTheClock(clock)
    run_until(service(clock, log, exchange), clock, "10:00:30")
    clock.until("10:05:00")
    trial = service(clock, log, exchange).try_out(log.state())
    assert [event.op for event in trial.derived.changes.events] == [Op.TRADED]
    assert [(m.poll_sequence, m.outcome) for m in trial.markers][-1] == (6, Outcome.PUBLISHED)
    assert (log.outcomes(), log.opened) == ("P", 1)


# --- beats ------------------------------------------------------------------------------------------------------------


def test_a_poll_on_every_beat(clock: FakeClock) -> None:
    """A poll at once, then on the minutes; the token is renewed after each poll; readers know the next one."""
    log, exchange, office = Log(), ByTheClock(clock), Office(1)
    clock.until("10:00:20")
    run_until(service(clock, log, exchange, leadership=office), clock, "10:05:30")
    assert [m.requested_at for m in log.markers] == [at("10:00:20"), *(at(f"10:0{n}:00") for n in range(1, 6))]
    assert [m.next_poll_at for m in log.markers] == [at(f"10:0{n}:00") for n in range(1, 7)]
    assert (log.outcomes(), exchange.renewals, office.closed) == ("PPPPPP", 6, 1)
    assert [round(owed or 0) for owed in office.owed] == [40, 60, 60, 60, 60, 60]


def test_a_poll_of_this_beat_is_not_repeated_by_the_next_leader(clock: FakeClock) -> None:
    """A call is charged: a successor waits for its own beat."""
    log = Log()
    run_until(service(clock, log), clock, "10:01:20")
    run_until(service(clock, log), clock, "10:02:30")
    assert [m.requested_at for m in log.markers] == [at(f"10:0{n}:00") for n in range(3)]


def test_beats_missed_by_a_slow_poll_are_skipped_with_the_reason(clock: FakeClock) -> None:
    """Each beat of an open session has a marker, in order, and the poll after names the gap."""
    log, exchange = Log(), ByTheClock(clock)
    exchange.slow = {2: 130.0}
    run_until(service(clock, log, exchange), clock, "10:05:30")
    assert log.outcomes() == "PPSSPP"
    skipped = log.markers[2:4]
    assert [m.requested_at for m in skipped] == [at("10:02:00"), at("10:03:00")]
    assert {(m.feed_state, m.error_kind, m.error_message, m.received_at) for m in skipped} == {
        (FeedState.DOWN, "internal", "the poll before was still under way", None)
    }
    assert [m.gap_from for m in log.markers[4:]] == [at("10:03:10"), None]
    assert {m.poll_sequence for m in log.markers if m.traded or m.opened} == {e.poll_sequence for e in log.events}


def test_beats_missed_between_runs_are_skipped(clock: FakeClock) -> None:
    """After a pause of minutes, of the open session only; a night makes none."""
    log = Log()
    run_until(service(clock, log), clock, "10:01:30")
    clock.until("10:05:30")
    run_until(service(clock, log), clock, "10:05:40")
    assert log.outcomes() == "PPSSSP"
    assert {m.error_message for m in log.markers if m.outcome is Outcome.SKIPPED} == {"no instance was running"}
    assert log.markers[-1].gap_from == at("10:01:00")
    clock.until("08:50:00", TOMORROW)
    run_until(service(clock, log), clock, "08:50:30", TOMORROW)
    assert log.outcomes()[6:] == "P"
    clock.until("09:03:00", TOMORROW)
    run_until(service(clock, log), clock, "09:03:30", TOMORROW)
    assert log.outcomes()[7:] == "SSSU"


def test_a_clock_that_is_set_makes_no_beats(clock: FakeClock) -> None:
    """An hour forwards or backwards: logged, nothing skipped that was not missed, and the beats go on."""
    log = Log()
    producer = service(clock, log)
    run_until(producer, clock, "10:01:30")
    with capture_logs() as lines:
        clock.wall += timedelta(hours=1)
        run_until(producer, clock, "11:02:30")
        clock.wall -= timedelta(hours=2)
        run_until(producer, clock, "09:04:30")
    assert set(log.outcomes()) == {"P"}
    assert [line["by_seconds"] for line in lines if line["event"] == "the clock was set"] == [3600.0, -7200.0]


def test_the_sleep_of_a_machine_is_no_clock_that_was_set(clock: FakeClock) -> None:
    """The time it slept has passed: its beats are skipped, and nothing is logged of a clock."""
    log = Log()
    producer = service(clock, log)
    run_until(producer, clock, "10:01:30")
    clock.go(300)
    with capture_logs() as lines:
        run_until(producer, clock, "10:06:45")
    assert log.outcomes() == "PPSSSSP"
    assert "the clock was set" not in {line["event"] for line in lines}


def test_closed_days_cost_no_call(clock: FakeClock) -> None:
    """It is logged once, no poll is owed, and the next session starts with a new connection."""
    closed = Calendar(holiday=lambda day: "a holiday" if day == DAY else None)
    log, office, exchange = Log(), Office(1), ByTheClock(clock)
    producer = service(clock, log, exchange, leadership=office, calendar=lambda: closed)
    with capture_logs() as lines:
        run_until(producer, clock, "08:45:30", TOMORROW)
    assert (exchange.asked, log.opened, office.owed[0]) == ([Call.SHARES], 2, None)
    assert [line["event"] for line in lines if line["event"] == "session closed"] == ["session closed"]
    assert log.markers[0].requested_at - at("08:45:00", TOMORROW) < timedelta(seconds=1)


def test_a_simulated_market_is_polled_whatever_the_hour() -> None:
    """Only a response shows what time it is there."""
    log = Log()
    polled(FakeExchange([(at("20:00:00"), []), (at("20:10:00"), [])]), log, 2)
    assert log.outcomes() == "UU"


def test_a_simulated_market_that_was_not_polled_for_a_while_has_a_gap() -> None:
    """Its own times do not show that: a restart, or a poll that is late by this machine's clock, does."""
    log, clock = Log(), FakeClock(at("09:30:00"), simulated=True)
    producer = service(clock, log, FakeExchange([(at("10:00:00"), []), (at("10:01:00"), [])]), poll_seconds=1)
    producer.poll()
    clock.wait(1)
    producer.poll()
    clock.wait(10)
    producer.poll()
    service(clock, log, FakeExchange([(at("10:09:00"), [])]), poll_seconds=1).poll()
    gaps = [marker.gap_from is not None for marker in log.markers]
    assert gaps == [False, False, True, True]


def test_freshness_outlives_a_restart(clock: FakeClock) -> None:
    """A market that stood still before and after a restart is FROZEN, not fresh."""
    log = Log()
    for minute in range(5):
        exchange = ByTheClock(clock)
        exchange.moves = False
        run_until(service(clock, log, exchange), clock, f"10:0{minute}:30")
        clock.until(f"10:0{minute + 1}:00")
    assert [m.feed_state for m in log.markers] == [FeedState.FRESH] * 3 + [FeedState.FROZEN] * 2


# --- the end of the day -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [False, True])
def test_the_first_good_poll_after_the_corrections_is_final(clock: FakeClock, always: bool) -> None:
    """Once a day, at 17:00 and not before; with --schedule always too."""
    log = Log()
    clock.until("16:40:00")
    run_until(service(clock, log, always=always), clock, "09:10:00", TOMORROW)
    assert [m.requested_at for m in log.markers if m.day_final] == [at("17:00:00")]
    final = next(m for m in log.markers if m.day_final)
    before = log.markers[final.poll_sequence - 2]
    assert (final.session_day, final.phase, before.next_poll_at) == (DAY, Phase.CLOSED, at("17:00:00"))
    if not always:
        assert final.next_poll_at == at("08:45:00", TOMORROW)
        assert [m.requested_at for m in log.markers][-1] == at("09:10:00", TOMORROW) - timedelta(minutes=1)


def test_a_final_poll_that_fails_is_repeated_until_midnight(clock: FakeClock) -> None:
    """What the day lacks is asked for every five minutes; nothing is a gap after it."""
    log = Log()
    clock.until("16:50:00")
    run_until(service(clock, log, ByTheClock(clock, None, GONE, GONE)), clock, "21:00:00")
    assert [(m.outcome, m.day_final) for m in log.markers] == [
        (Outcome.PUBLISHED, False),
        (Outcome.FAILED, False),
        (Outcome.FAILED, False),
        (Outcome.PUBLISHED, True),
    ]
    assert log.markers[2].next_poll_at == at("17:05:00")
    clock.until("22:00:00")
    run_until(service(clock, log), clock, "08:46:30", TOMORROW)
    assert [m.gap_from for m in log.markers[4:]] == [None, None]
    assert not any(m.day_final for m in log.markers[4:])


def test_a_poll_without_the_rights_is_not_final(clock: FakeClock) -> None:
    """Their corrections would be events of a day that is called complete: the poll is repeated."""
    log = Log()
    clock.until("16:58:00")
    exchange = ByTheClock(clock, None, None, None, GONE)
    run_until(service(clock, log, exchange, rights=True), clock, "17:20:00")
    assert [(m.feed_state, m.day_final) for m in log.markers[1:]] == [
        (FeedState.PARTIAL, False),
        (FeedState.IDLE, True),
    ]
    assert (log.markers[1].next_poll_at, log.markers[2].requested_at) == (at("17:05:00"), at("17:05:00"))


def test_the_final_poll_before_a_closed_weekend_is_read_back(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart two days later, with --schedule always, calls no second poll of the session final."""
    weekend = Calendar(holiday=lambda day: "a holiday" if day > DAY else None)
    log = Log()
    clock.until("16:58:00")
    run_until(service(clock, log, always=True, calendar=lambda: weekend), clock, "10:00:00", DAY + timedelta(days=2))

    def tail(cluster: object, offsets: int | None) -> tuple[list[PollMarker], int]:
        return log.markers[-offsets // 2 :] if offsets else log.markers, 0

    monkeypatch.setattr(publisher, "_last_markers", tail)
    found, _ = publisher._markers(None)  # type: ignore[arg-type]
    assert [m.requested_at for m in found if m.day_final] == [at("17:00:00")]


def test_an_owed_final_poll_answered_after_midnight_is_final(clock: FakeClock) -> None:
    """The day is complete, although another one has begun."""
    log, exchange = Log(), ByTheClock(clock)
    clock.until("23:58:00")
    exchange.slow = {1: 150.0}
    run_until(service(clock, log, exchange), clock, "00:10:00", TOMORROW)
    assert [(m.day_final, m.session_day) for m in log.markers] == [(True, DAY)]


def test_a_day_that_was_missed_at_its_end_is_final_the_next_morning(clock: FakeClock) -> None:
    """The first good poll after its corrections; a day that was never polled is not called complete."""
    log = Log()
    clock.until("16:00:00")
    run_until(service(clock, log), clock, "16:10:00")
    clock.until("08:47:00", TOMORROW)
    run_until(service(clock, log), clock, "09:02:00", TOMORROW)
    assert [(m.requested_at, m.session_day) for m in log.markers if m.day_final] == [(at("08:47:00", TOMORROW), DAY)]
    fresh = Log()
    clock.until("08:47:00", TOMORROW + timedelta(days=1))
    run_until(service(clock, fresh), clock, "09:02:00", TOMORROW + timedelta(days=1))
    assert not any(m.day_final for m in fresh.markers)


# --- the budget -------------------------------------------------------------------------------------------------------


def test_the_days_charged_calls_survive_a_restart(clock: FakeClock) -> None:
    """The markers hold them; the next day begins at 0; the final poll may use what is kept for it."""
    log, exchange = Log(), ByTheClock(clock, None, GONE)
    run_until(service(clock, log, exchange), clock, "10:02:30")
    again = ByTheClock(clock)
    clock.until("10:03:00")
    run_until(service(clock, log, again), clock, "10:04:30")
    assert exchange.begun == [(0, False), (1, False), (1, False)]
    assert again.begun == [(2, False), (3, False)]
    clock.until("17:00:00")
    evening = ByTheClock(clock)
    run_until(service(clock, log, evening), clock, "17:00:10")
    assert evening.begun == [(4, True)]
    clock.until("09:00:00", TOMORROW)
    tomorrow = ByTheClock(clock)
    run_until(service(clock, log, tomorrow), clock, "09:00:10", TOMORROW)
    assert tomorrow.begun == [(0, False)]


def test_a_poll_for_which_no_call_may_be_made_is_skipped(clock: FakeClock) -> None:
    """SKIPPED with the reason; the budget that is left is measured."""
    log, monitor = Log(), Monitor("producer")
    spent = ExchangeRefused("budget", "the budget of 1 charged call a day is spent", held=True)
    producer = service(clock, log, ByTheClock(clock, None, spent, spent), monitor=monitor, max_calls_per_day=2)
    run_until(producer, clock, "10:02:30")
    assert log.outcomes() == "PSS"
    assert {(m.error_kind, m.charged_calls) for m in log.markers[1:]} == {("budget", 0)}
    assert monitor.registry.get_sample_value("bourse_calls_left") == 1


def test_one_call_of_two_that_is_held_skips_no_poll() -> None:
    """A poll of which a call was made is not SKIPPED."""
    held = ExchangeRefused("rate", "wait", held=True)
    log = Log()
    polled(FakeExchange([held], [GONE]), log, 1, rights=True)
    polled(FakeExchange([held], [held]), log, 1, rights=True)
    assert log.outcomes() == "FS"


# --- bytes in hand ----------------------------------------------------------------------------------------------------


def test_a_failed_publication_costs_no_other_call(clock: FakeClock) -> None:
    """The bytes in hand are published with their own times; missed beats are SKIPPED after them, with the reason."""
    log, exchange = Log(None, *[PublishError("brokers are away")] * 18), ByTheClock(clock)
    run_until(service(clock, log, exchange, leadership=Office(1)), clock, "10:03:40")
    assert (log.outcomes(), exchange.asked) == ("PPSP", [Call.SHARES] * 3)
    in_hand = log.markers[1]
    assert (in_hand.requested_at, in_hand.received_at) == (at("10:01:00"), at("10:01:00"))
    assert in_hand.next_poll_at == at("10:03:00")
    assert (log.markers[2].requested_at, log.markers[2].error_message) == (
        at("10:02:00"),
        "publish failed: brokers are away",
    )
    assert log.markers[3].gap_from == at("10:01:00")
    assert {e.observed_at for e in log.events if e.poll_sequence == 2} == {at("10:01:00")}


def test_a_publication_that_had_succeeded_is_not_repeated(clock: FakeClock) -> None:
    """What is committed is read back: the marker has our poll_id; no call is made before the next beat."""
    log, exchange = Log(None, PublishError("time-out")), ByTheClock(clock)
    log.committing = True
    run_until(service(clock, log, exchange, leadership=Office(1)), clock, "10:02:30")
    assert (log.outcomes(), len(exchange.asked)) == ("PPP", 3)
    assert [m.gap_from for m in log.markers] == [None] * 3


def test_bytes_in_hand_do_not_outlive_their_term(clock: FakeClock) -> None:
    """Another instance may have led meanwhile: they are dropped, logged, and the exchange is called again."""
    log, office, exchange = Log(None, PublishError("away")), Office(1), ByTheClock(clock)
    producer = service(clock, log, exchange, leadership=office)
    run_until(producer, clock, "10:00:30")
    log.on_publish = lambda: office.terms.__setitem__(0, 2)
    with capture_logs() as lines:
        run_until(producer, clock, "10:01:30")
    assert [line["reason"] for line in lines if line["event"] == "poll dropped"] == ["another term began"]
    assert (log.outcomes(), len(exchange.asked)) == ("PP", 3)
    assert [charged for charged, _ in exchange.begun] == [0, 1, 2], "what was dropped is billed all the same"
    assert log.markers[1].gap_from == at("10:00:00")


def test_bytes_in_hand_are_dropped_after_a_later_poll(clock: FakeClock) -> None:
    """Although the term is the same: what came later is known already."""
    log, exchange = Log(None, PublishError("away")), ByTheClock(clock)
    producer = service(clock, log, exchange, leadership=Office(1))
    run_until(producer, clock, "10:00:30")
    other = Log()
    clock.until("10:01:00")

    def another_instance() -> None:
        log.on_publish = lambda: None
        clock.go(0.5)
        other.markers, other.candles = log.markers, log.candles
        service(FakeClock(clock.now()), other, ByTheClock(clock)).poll()

    log.on_publish = another_instance
    with capture_logs() as lines:
        run_until(producer, clock, "10:02:30")
    assert [line["reason"] for line in lines if line["event"] == "poll dropped"] == ["a later poll is committed"]
    assert [m.poll_sequence for m in log.markers] == [1, 2, 3]


def test_a_dead_letter_that_was_not_committed_is_published_with_the_bytes_in_hand(clock: FakeClock) -> None:
    """What failed with its transaction was not reported."""
    log = Log(PublishError("commit"))
    exchange = FakeExchange([(at("10:00:00"), [row(MaxPrice=1.5)])])
    run_until(service(clock, log, exchange, leadership=Office(1)), clock, "10:01:30")
    assert (log.outcomes(), len(log.letters), len(exchange.asked)) == ("UU", 1, 2)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_broker_or_registry_that_is_unreachable_is_waited_for(clock: FakeClock) -> None:
    """Also if opening, or reading the state back, is what fails; each failure is counted."""
    log, monitor = Log(opening=[Unreachable("away"), PublishError("away")]), Monitor("producer")
    run_until(service(clock, log, monitor=monitor, leadership=Office(1)), clock, "10:00:40")
    assert (log.opened, log.outcomes()) == (3, "P")
    sample = monitor.registry.get_sample_value
    assert sample("bourse_publication_failures_total", {"step": "restore"}) == 2
    assert sample("bourse_publication_failures_total", {"step": "publish"}) is None
    assert clock.waited[0] == 1.0
    assert 1.5 < clock.waited[1] <= 2.0


def test_a_mistake_at_the_start_ends_the_service_and_a_later_one_does_not(clock: FakeClock) -> None:
    """After the first good start a passing answer of registry or broker is waited for, with a log line, not ready."""
    with pytest.raises(ConfigurationError, match="no topic"):
        run_until(
            service(clock, Log(opening=[ConfigurationError("no topic")]), leadership=Office(1)), clock, "10:01:00"
        )
    monitor = Monitor("producer")
    refused = ConfigurationError("no token for the schema registry")
    log = Log(None, PublishError("a broker was restarted"), opening=[None, refused, refused])
    reasons = []
    log.on_publish = lambda: reasons.append(dict(monitor.reasons()))
    with capture_logs() as lines:
        run_until(service(clock, log, monitor=monitor, leadership=Office(1)), clock, "10:02:30")
    assert log.outcomes() == "PPP"
    assert [line["error"] for line in lines if line["event"] == "restore failed"] == [str(refused)] * 2
    assert reasons[2] == {"kafka": f"restore failed: {refused}"}
    assert "kafka" not in monitor.reasons()


def test_no_room_for_the_day_is_a_mistake_until_something_was_published(clock: FakeClock) -> None:
    """A record that would not stay is refused before anything is published."""
    log = Log()
    log.room = NoRoom("would not stay")
    with pytest.raises(ConfigurationError, match="would not stay"):
        run_until(service(clock, log, leadership=Office(1)), clock, "10:01:00")
    assert log.markers == []


def test_calls_that_cannot_be_ended_end_the_service(clock: FakeClock) -> None:
    """Stuck is nothing to wait for."""
    log, exchange = Log(), ByTheClock(clock)

    def stuck(call: Call, *, until: float) -> Any:
        raise Stuck("two calls do not end")

    exchange.fetch = stuck  # type: ignore[method-assign]
    with pytest.raises(Stuck):
        run_until(service(clock, log, exchange, leadership=Office(1)), clock, "10:01:00")
    assert (log.closed, log.markers) == (1, [])


def test_a_stop_while_the_exchange_fails_publishes_nothing_more(clock: FakeClock) -> None:
    """The call was given up because of the stop; an answer that is paid for is published all the same."""
    for failure, expected in ((GONE, ""), (None, "P")):
        log, exchange = Log(), ByTheClock(clock, failure)
        exchange.slow = {1: 30.0}
        clock.stop_at = clock.steady + 20
        service(clock, log, exchange, leadership=Office(1)).run()
        assert log.outcomes() == expected
        clock.stop_at = float("inf")


def test_a_stop_during_the_second_call_publishes_the_first_ones_answer(clock: FakeClock) -> None:
    """It is paid for: PARTIAL, and counted."""
    log, exchange = Log(), ByTheClock(clock, None, ExchangeUnavailable("internal", "stopped during the call"))
    exchange.slow = {2: 30.0}
    clock.stop_at = clock.steady + 20
    service(clock, log, exchange, rights=True, leadership=Office(1)).run()
    assert [(m.feed_state, m.charged_calls) for m in log.markers] == [(FeedState.PARTIAL, 1)]


# --- several instances ------------------------------------------------------------------------------------------------


def test_a_standby_is_connected_and_publishes_nothing(clock: FakeClock) -> None:
    """It connects, so that mistakes show; its client is served; it is ready; once elected it restores and polls."""
    log, office, exchange, monitor = Log(), Office(None, clock=clock), ByTheClock(clock), Monitor("producer")
    producer = service(clock, log, exchange, leadership=office, monitor=monitor)
    with capture_logs() as lines:
        run_until(producer, clock, "10:00:30")
    assert (log.opened, exchange.asked, monitor.reasons()) == (1, [], {})
    assert log.idled >= 20
    assert [line["event"] for line in lines] == ["standing by", "stopped"]
    office.terms = [7]
    run_until(producer, clock, "10:01:30")
    assert log.outcomes() == "PP"


def test_a_fenced_leader_joins_the_election_again(clock: FakeClock) -> None:
    """Nothing is published, nothing is initialised again before a new term."""
    log, office = Log(None, Fenced("another")), Office(1, 2)
    with capture_logs() as lines:
        run_until(service(clock, log, leadership=office), clock, "10:01:30")
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["fenced", "poll dropped"]
    assert (office.resigned, log.outcomes()) == (1, "PP")


def test_what_another_leader_polled_was_not_missed(clock: FakeClock) -> None:
    """Elected again, an instance counts from the last poll of the prefix, not from its own."""
    log, office = Log(), Office(1)
    first = service(clock, log, leadership=office)
    run_until(first, clock, "10:01:30")
    run_until(service(clock, log), clock, "10:06:30")
    office.terms = [2]
    run_until(first, clock, "10:08:30")
    assert log.outcomes() == "P" * 9
    assert {m.gap_from for m in log.markers} == {None}


def test_who_no_longer_leads_reports_nothing_of_the_feed(clock: FakeClock) -> None:
    """A standby is ready: what it last saw of exchange and market is its successor's to judge now."""
    log, office, monitor = Log(), Office(1, clock=clock), Monitor("producer")
    exchange = ByTheClock(clock, GONE)
    exchange.moves = False
    producer = service(clock, log, exchange, leadership=office, monitor=monitor)
    run_until(producer, clock, "10:00:30")
    assert list(monitor.reasons()) == ["exchange"]
    run_until(producer, clock, "10:06:30")
    assert list(monitor.reasons()) == ["feed"]
    office.terms = [None]
    run_until(producer, clock, "10:06:40")
    assert monitor.reasons() == {}


def test_a_term_that_begins_when_no_poll_is_due_owes_none(clock: FakeClock) -> None:
    """Elected in a closed session, or between two beats: it does not give its term up before the next poll."""
    log, office = Log(), Office(1)
    producer = service(clock, log, leadership=office)
    clock.until("14:00:00")
    run_until(producer, clock, "14:00:10")

    def elected(term: int) -> None:
        office.terms[0] = term
        office.owe(0.0)  # as the election does

    elected(2)
    run_until(producer, clock, "14:00:20")
    assert office.owed[-1] == pytest.approx(290.0)
    run_until(producer, clock, "17:10:00")
    elected(3)
    run_until(producer, clock, "17:20:00")
    assert office.owed[-1] is None
    clock.until("08:45:00", TOMORROW)
    log.failures = [PublishError("away")] * 100
    run_until(producer, clock, "08:50:00", TOMORROW)
    assert office.owed[-1] == 0.0, "a leader that does not publish the first poll of a day leaves, too"


def test_a_restore_that_fails_for_ever_is_tried_for_ever_and_never_ready(clock: FakeClock) -> None:
    """Also between two terms; once it succeeds the service is ready and polls."""
    monitor, office = Monitor("producer"), Office(1, clock=clock)
    open_transaction = Unreachable("bourse.candles-0: a transaction is open there")
    log = Log(opening=[open_transaction] * 3)
    producer = service(clock, log, monitor=monitor, leadership=office)
    run_until(producer, clock, "10:00:02")
    office.terms = [None, None, None, 2]
    run_until(producer, clock, "10:00:04")
    assert not office.leads
    assert monitor.reasons()["kafka"] == f"restore failed: {open_transaction}"
    run_until(producer, clock, "10:01:30")
    assert monitor.registry.get_sample_value("bourse_publication_failures_total", {"step": "restore"}) == 3
    assert (monitor.reasons(), log.outcomes()) == ({}, "PP")


def test_after_a_long_outage_polling_goes_on_within_seconds(clock: FakeClock) -> None:
    """An instance may be elected while it pauses between two attempts: the pauses stay short."""
    log = Log(opening=[Unreachable("away")] * 1000)
    producer = service(clock, log, leadership=Office(1, clock=clock))
    run_until(producer, clock, "10:05:02")
    assert 50 < 1000 - len(log.opening) < 90
    log.opening.clear()
    run_until(producer, clock, "10:05:08")
    assert log.outcomes() == "P"


def test_readiness_and_session_do_not_depend_on_a_service_that_is_stuck(clock: FakeClock) -> None:
    """Both are computed at the request: a registry away since before the open does not hide the open session."""
    monitor, office = Monitor("producer"), Office(1)
    clock.until("08:59:00", TOMORROW)
    service(clock, Log(), leadership=office, monitor=monitor)
    sample = monitor.registry.get_sample_value
    assert (sample("bourse_session_open"), sample("bourse_leader")) == (0, 1)
    clock.until("09:00:00", TOMORROW)
    office.is_overdue, office.terms = True, [None]
    assert (sample("bourse_session_open"), sample("bourse_leader")) == (1, 0)
    assert monitor.reasons()["polls"] == "no poll was published in time"


def test_waiting_and_every_call_are_signs_of_life(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long brokers are away, a restart would not bring them back: the service is alive, and not ready."""
    signs: list[float] = []
    monitor = Monitor("producer")
    monkeypatch.setattr(monitor, "beat", lambda within: signs.append(clock.steady))
    log = Log(opening=[Unreachable("away")] * 8)
    exchange = FakeExchange([GONE], [GONE])
    run_until(service(clock, log, exchange, rights=True, monitor=monitor), clock, "12:00:00")
    assert max(later - earlier for earlier, later in pairwise(signs)) < 61
    assert log.markers


def test_the_capture_comes_before_the_publication(clock: FakeClock) -> None:
    """State, bytes, publication; again after a failure; a response that is not used is not part of the poll."""
    order: list[str] = []

    class Tape:
        def restored(self, state: State) -> None:
            order.append(f"state {state.poll_sequence}")

        def poll(self, poll_sequence: int, readings: Sequence[Reading], known: Any) -> None:
            order.append(f"poll {poll_sequence} {len(readings)}")

    log = Log(None, PublishError("away"))
    log.on_publish = lambda: order.append("publish")
    bad = [row(f"IRO1AAAA{n:04}", MaxPrice="a lot") for n in range(30)]
    exchange = FakeExchange([(at("10:00:00"), [row()]), (at("10:01:00"), [row()]), (at("10:02:00"), bad)])
    run_until(service(clock, log, exchange, capture=Tape(), leadership=Office(1)), clock, "10:02:30")
    assert order == [
        *("state 0", "poll 1 1", "publish"),
        *("poll 2 1", "publish", "state 1", "poll 2 1", "publish"),
        *("poll 3 0", "publish"),
    ]
