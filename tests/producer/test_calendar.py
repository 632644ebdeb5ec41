"""Trading days and the phases of a session."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bourse_producer.calendar import Calendar, official_holiday
from bourse_schemas.events import TEHRAN, Phase

PLAIN = Calendar(holiday=lambda day: None)
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
    assert (nowruz.weekday(), bool(official_holiday(nowruz)), Calendar().is_trading_day(nowruz)) == (5, True, False)
    assert Calendar().phase(at("10:00:00", nowruz)) is Phase.CLOSED
    assert Calendar().is_trading_day(date(2019, 8, 21))
    assert Calendar().is_trading_day(date(2019, 8, 24))


def test_session_day_begins_with_continuous_trading() -> None:
    """Before nine the session is the trading day's before, over a weekend too."""
    assert PLAIN.session_day(at("09:00:00")) == SATURDAY
    assert PLAIN.session_day(at("08:59:59")) == SATURDAY - timedelta(days=3)
    assert PLAIN.session_day(at("12:00:00", SATURDAY + timedelta(days=6))) == SATURDAY + timedelta(days=4)
    assert Calendar(holiday=lambda day: "a holiday").session_day(at("12:00:00")) is None


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
    closed = Calendar(closed=frozenset({saturday}))
    assert closed.next_session(at("17:00:00", wednesday)) == at("08:45:00", saturday + timedelta(days=1))


@given(
    st.integers(0, 15 * 365 * 86_400).map(lambda seconds: datetime(2015, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds))
)
def test_phase_and_next_session_agree(now: datetime) -> None:
    """The next session begins a pre-open, and no session is before it but the one under way."""
    begins = Calendar().next_session(now)
    assert begins > now
    assert Calendar().phase(begins) is Phase.PRE_OPEN
    assert Calendar().phase(begins - timedelta(seconds=1)) is Phase.CLOSED
    if Calendar().phase(now) is Phase.CLOSED:
        between = [now + (begins - now) * share / 50 for share in range(50)]
        assert {Calendar().phase(moment) for moment in between} == {Phase.CLOSED}
