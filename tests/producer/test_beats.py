"""When polls are due, which beats were missed, and which poll is a day's last: property by property."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bourse_producer.beats import Beats
from bourse_schemas.events import TEHRAN, Phase
from tests.producer.fakes import ALL_DAYS, DAY, at

BEATS = Beats(calendar=ALL_DAYS)
MONTH = timedelta(days=30).total_seconds()
instants = st.floats(0, MONTH).map(lambda seconds: at("00:00:00") + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("clock", "seconds"),
    [("08:50:00", 60), ("12:29:59", 60), ("12:59:59", 60), ("13:00:00", 300), ("16:59:59", 300), ("17:00:00", 300)],
)
def test_intervals(clock: str, seconds: float) -> None:
    """A minute while trades can happen, five after that; always the same with --schedule always."""
    assert BEATS.interval(at(clock)) == seconds
    assert Beats(always=True, calendar=ALL_DAYS).interval(at(clock)) == 60


@pytest.mark.parametrize(("poll_seconds", "owed"), [(0, 130), (10, 130), (60, 180), (300, 240)])
def test_how_long_a_leader_may_owe_a_poll(poll_seconds: float, owed: float) -> None:
    """Three beats, four minutes at most; a lawful poll of two slow calls must fit in."""
    assert Beats(poll_seconds).owed_seconds() == owed


@given(instants, st.floats(0, 10_000))
def test_missed_beats_are_those_between_the_polls(since: datetime, seconds: float) -> None:
    """Every whole minute of now's open session after the last poll's beat and before this one's; by hand."""
    now = since + timedelta(seconds=seconds)
    minute = since.replace(second=0, microsecond=0) + timedelta(minutes=1)
    expected = []
    while minute < now:
        same_day = ALL_DAYS.session_day(minute) == ALL_DAYS.session_day(now)
        if ALL_DAYS.phase(minute) is Phase.OPEN and same_day and minute + timedelta(minutes=1) <= now:
            expected.append(minute)
        minute += timedelta(minutes=1)
    near = min((each.timestamp() % 60 for each in (since, now)), key=lambda part: min(part, 60 - part))
    if 0.1 < near < 59.9:  # a poll may begin a moment before its beat
        assert BEATS.missed(since, now) == expected


@given(instants)
def test_a_beat_is_served_once(now: datetime) -> None:
    """The poll of a beat is not repeated on it, and does not stand for the next one."""
    interval = BEATS.interval(now)
    beat = datetime.fromtimestamp(now.timestamp() // interval * interval, UTC)
    assert BEATS.served(beat, beat + timedelta(seconds=interval - 1))
    assert not BEATS.served(beat - timedelta(seconds=1), beat + timedelta(seconds=1))


@given(instants, st.booleans(), st.booleans())
def test_a_final_poll_is_at_or_after_the_corrections_and_once_a_day(now: datetime, done: bool, polled: bool) -> None:
    """Whatever was polled before: never before 17:00 of its session's day, never again."""
    day = ALL_DAYS.session_day(now)
    final = BEATS.final(now, day if done else None, day if polled else None)
    if final:
        assert day is not None
        assert not done
        assert now >= datetime(day.year, day.month, day.day, 17, tzinfo=TEHRAN)
    evening = now.astimezone(TEHRAN).date() == day and now.astimezone(TEHRAN).hour >= 17
    assert final or done or not evening


@given(instants)
def test_the_next_poll_is_a_beat_at_which_polls_are_due(now: datetime) -> None:
    """A reader waits for no poll through the night."""
    final_day = ALL_DAYS.session_day(now)
    moment = BEATS.moment(now, now + timedelta(minutes=1), final_day)
    assert moment["next_poll_at"] > now
    assert BEATS.due(moment["next_poll_at"], final_day)
    assert moment["session_day"] == final_day


def test_no_distance_between_simulated_times_means_anything() -> None:
    """A practice market passes at another pace than the beats."""
    beats = Beats(simulated=True, calendar=ALL_DAYS)
    assert beats.due(at("03:00:00"), DAY)
    assert beats.missed(at("10:00:00"), at("12:00:00")) == []
    assert not beats.served(at("10:00:00"), at("10:00:00"))
    assert not beats.gap(at("10:00:00"), at("12:00:00"), [], None)
    assert BEATS.gap(at("10:00:00"), at("12:00:00"), [], None)
