"""Trading days, phases of a session, and what the feed's state is after each poll."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bourse_producer.calendar import TEHRAN, Calendar, official_holiday
from bourse_producer.freshness import Freshness, Poll
from bourse_schemas.events import FeedState, Outcome, Phase

PLAIN = Calendar(is_holiday=lambda day: False)
SATURDAY = date(2026, 11, 21)


def at(text: str, day: date = SATURDAY) -> datetime:
    """Return a time of a Tehran day in UTC, so that no test leans on the zone of its argument."""
    return datetime.combine(day, time.fromisoformat(text), TEHRAN).astimezone(UTC)


@pytest.mark.parametrize(
    ("clock", "phase"),
    [
        ("00:00:00", Phase.CLOSED),
        ("08:44:59", Phase.CLOSED),
        ("08:45:00", Phase.PRE_OPEN),
        ("08:59:59", Phase.PRE_OPEN),
        ("09:00:00", Phase.OPEN),
        ("12:29:59", Phase.OPEN),
        ("12:30:00", Phase.AFTER_CLOSE),
        ("16:59:59", Phase.AFTER_CLOSE),
        ("17:00:00", Phase.CLOSED),
        ("23:59:59", Phase.CLOSED),
    ],
)
def test_phases_of_a_trading_day(clock: str, phase: Phase) -> None:
    """Each phase begins on its second and ends before the next one's."""
    assert PLAIN.phase(at(clock)) == phase


def test_saturday_to_wednesday() -> None:
    """Thursday and Friday are closed."""
    week = [PLAIN.is_trading_day(SATURDAY + timedelta(days=n)) for n in range(7)]
    assert week == [True, True, True, True, True, False, False]


def test_official_holidays() -> None:
    """Nowruz is closed, and so is every phase of it."""
    nowruz = date(2026, 3, 21)
    assert (nowruz.weekday(), official_holiday(nowruz), Calendar().is_trading_day(nowruz)) == (5, True, False)
    assert Calendar().phase(at("10:00:00", nowruz)) is Phase.CLOSED
    assert Calendar().is_trading_day(date(2019, 8, 21))
    assert Calendar().is_trading_day(date(2019, 8, 24))


def test_session_day_begins_with_continuous_trading() -> None:
    """Before nine the session is the trading day's before, over a weekend too."""
    assert PLAIN.session_day(at("09:00:00")) == SATURDAY
    assert PLAIN.session_day(at("08:59:59")) == SATURDAY - timedelta(days=3)
    assert PLAIN.session_day(at("12:00:00", SATURDAY + timedelta(days=6))) == SATURDAY + timedelta(days=4)
    assert Calendar(is_holiday=lambda day: True).session_day(at("12:00:00")) is None


def test_session_day_in_a_summer_with_daylight_saving() -> None:
    """At 04:30 UTC it was nine in Tehran in August 2019, and half past eight is not nine in 2023."""
    assert PLAIN.session_day(datetime(2019, 8, 24, 4, 30, tzinfo=UTC)) == date(2019, 8, 24)
    assert PLAIN.session_day(datetime(2019, 8, 24, 4, 29, tzinfo=UTC)) == date(2019, 8, 21)
    assert PLAIN.session_day(datetime(2023, 8, 26, 5, 29, tzinfo=UTC)) == date(2023, 8, 23)
    assert PLAIN.session_day(datetime(2023, 8, 26, 5, 30, tzinfo=UTC)) == date(2023, 8, 26)


def test_next_session_over_evenings_weekends_and_holidays() -> None:
    """It is the next pre-open that is still to come."""
    wednesday, saturday = SATURDAY - timedelta(days=3), SATURDAY
    assert PLAIN.next_session(at("03:00:00")) == at("08:45:00")
    assert PLAIN.next_session(at("08:45:00")) == at("08:45:00", SATURDAY + timedelta(days=1))
    assert PLAIN.next_session(at("17:00:00", wednesday)) == at("08:45:00", saturday)
    closed = Calendar(is_holiday=lambda day: day == saturday)
    assert closed.next_session(at("17:00:00", wednesday)) == at("08:45:00", saturday + timedelta(days=1))


@given(
    st.integers(0, 15 * 365 * 86_400).map(lambda seconds: datetime(2015, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds))
)
def test_phase_and_next_session_agree(now: datetime) -> None:
    """The next session begins a pre-open, and no session lies before it but the one under way."""
    begins = Calendar().next_session(now)
    assert begins > now
    assert Calendar().phase(begins) is Phase.PRE_OPEN
    assert Calendar().phase(begins - timedelta(seconds=1)) is Phase.CLOSED
    if Calendar().phase(now) is Phase.CLOSED:
        between = [now + (begins - now) * share / 50 for share in range(50)]
        assert {Calendar().phase(moment) for moment in between} == {Phase.CLOSED}


def states(*polls: Poll) -> list[FeedState]:
    """Return the state after each poll."""
    known, found = Freshness(), []
    for poll in polls:
        known = known.after(poll)
        found.append(known.state)
    return found


def poll(seconds: float, outcome: Outcome = Outcome.PUBLISHED, phase: Phase = Phase.OPEN, **other: object) -> Poll:
    """Return a poll of an open session, `seconds` after ten."""
    fields: dict[str, object] = {"rows": 600, "latest_traded_day": SATURDAY, "session_day": SATURDAY} | other
    return Poll(outcome, phase, at("10:00:00") + timedelta(seconds=seconds), **fields)  # type: ignore[arg-type]


def test_frozen_after_three_minutes_without_a_change() -> None:
    """It takes more than 180 s of an open session, and ends with the first change."""
    unchanged = [poll(seconds, Outcome.UNCHANGED) for seconds in (60, 120, 180, 181, 240)]
    assert states(poll(0), *unchanged, poll(300)) == [
        FeedState.FRESH,
        FeedState.FRESH,
        FeedState.FRESH,
        FeedState.FRESH,
        FeedState.FROZEN,
        FeedState.FROZEN,
        FeedState.FRESH,
    ]


def test_what_was_before_the_open_does_not_count() -> None:
    """Quiet hours before the session are no frozen feed."""
    quiet = poll(-3600, Outcome.UNCHANGED, Phase.PRE_OPEN)
    assert states(quiet, poll(0, Outcome.UNCHANGED), poll(170, Outcome.UNCHANGED)) == [
        FeedState.IDLE,
        FeedState.FRESH,
        FeedState.FRESH,
    ]
    assert states(poll(0, Outcome.UNCHANGED), poll(180, Outcome.UNCHANGED)) == [FeedState.FRESH, FeedState.FRESH]


@pytest.mark.parametrize("phase", [Phase.CLOSED, Phase.PRE_OPEN, Phase.AFTER_CLOSE])
def test_idle_outside_of_the_open_session(phase: Phase) -> None:
    """Where nothing need move nothing is missed."""
    assert states(poll(0, phase=phase), poll(9999, Outcome.UNCHANGED, phase)) == [FeedState.IDLE, FeedState.IDLE]


def test_down_and_back() -> None:
    """A failed or skipped poll says DOWN, the next good one says what it is."""
    assert states(poll(0), poll(60, Outcome.FAILED, rows=0), poll(90, Outcome.SKIPPED), poll(120)) == [
        FeedState.FRESH,
        FeedState.DOWN,
        FeedState.DOWN,
        FeedState.FRESH,
    ]


def test_stale_with_yesterdays_rows() -> None:
    """Rows of another day after the open are STALE; no rows at all are not."""
    yesterday = SATURDAY - timedelta(days=3)
    assert states(poll(0, latest_traded_day=yesterday), poll(1, rows=0, latest_traded_day=None)) == [
        FeedState.STALE,
        FeedState.PARTIAL,
    ]
    assert states(poll(1, rows=0, latest_traded_day=None)) == [FeedState.FRESH]


def test_partial_while_the_response_is_far_shorter() -> None:
    """Less than half of the response before on the same day, as long as it lasts; a new session begins anew."""
    rows = [600, 300, 149, 140, 300, 299, 100]
    found = states(*(poll(seconds, rows=count) for seconds, count in enumerate(rows)))
    assert [state is FeedState.PARTIAL for state in found] == [False, False, True, True, False, False, True]
    next_day = poll(0, rows=5, session_day=SATURDAY + timedelta(days=1), latest_traded_day=SATURDAY + timedelta(days=1))
    assert states(poll(0), next_day) == [FeedState.FRESH, FeedState.FRESH]
    assert states(poll(0, partial=True)) == [FeedState.PARTIAL]


@given(st.lists(st.sampled_from([Outcome.PUBLISHED, Outcome.UNCHANGED, Outcome.FAILED]), max_size=30))
def test_frozen_against_a_naive_oracle(outcomes: list[Outcome]) -> None:
    """Minute polls of an open session: FROZEN is what counting the minutes by hand says."""
    found = states(*(poll(60 * number, outcome) for number, outcome in enumerate(outcomes)))
    good = [number for number, outcome in enumerate(outcomes) if outcome is not Outcome.FAILED]
    for number in good:
        moves = [each for each in good if each <= number and (outcomes[each] is Outcome.PUBLISHED or each == good[0])]
        assert (found[number] is FeedState.FROZEN) == (60 * (number - moves[-1]) > 180)
    assert all(a <= b for a, b in pairwise(good))
