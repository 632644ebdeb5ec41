"""What the feed's state is after each poll, by the markers alone."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bourse_producer.calendar import Calendar
from bourse_producer.freshness import Freshness
from bourse_sandbox.market import REAL_DAY, PracticeMarket
from bourse_schemas.events import TEHRAN, FeedState, Outcome, Phase, PollMarker

SATURDAY = date(2026, 11, 21)
TEN = datetime.combine(SATURDAY, time(10), TEHRAN).astimezone(UTC)
COUNTS = (
    "rows",
    "opened",
    "traded",
    "revised",
    "cancelled",
    "stale_rows",
    "rejected_rows",
    "duplicate_rows",
    "charged_calls",
)
OTHER_DAY = Path(__file__).parents[3] / "shared" / "data" / "day-2019-08-24.ndjson.gz"


def states(*polls: PollMarker) -> list[FeedState]:
    """Return the state after each poll."""
    known, found = Freshness(), []
    for poll in polls:
        known = known.after(poll)
        found.append(known.state)
    return found


def poll(seconds: float, outcome: Outcome = Outcome.PUBLISHED, phase: Phase = Phase.OPEN, **other: Any) -> PollMarker:
    """Return the marker of a poll of an open session, `seconds` after ten."""
    at = TEN + timedelta(seconds=seconds)
    usual: dict[str, Any] = {"rows": 600, "latest_traded_at": TEN, "session_day": SATURDAY}
    counts = dict.fromkeys(COUNTS, 0)
    return PollMarker(
        **{
            **counts,
            **usual,
            **other,
            "poll_sequence": 1,
            "source": "s",
            "outcome": outcome,
            "phase": phase,
            "feed_state": FeedState.UNKNOWN,
            "requested_at": at,
            "day_final": False,
            "simulated": False,
        }
    )


def test_frozen_after_three_minutes_without_a_change() -> None:
    """It takes 180 s of an open session, and ends with the first change."""
    unchanged = [poll(seconds, Outcome.UNCHANGED) for seconds in (60, 120, 179.4, 179.9, 240)]
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
    assert states(poll(0, Outcome.UNCHANGED), poll(179, Outcome.UNCHANGED)) == [FeedState.FRESH, FeedState.FRESH]


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
    yesterday = TEN - timedelta(days=3)
    assert states(poll(0, latest_traded_at=yesterday), poll(1, rows=0, latest_traded_at=None)) == [
        FeedState.STALE,
        FeedState.FRESH,
    ]
    assert states(poll(1, rows=0, latest_traded_at=None)) == [FeedState.FRESH]


def test_partial_while_the_response_is_far_shorter() -> None:
    """Less than half of the response before on the same day, as long as it lasts; a new session begins again."""
    rows = [600, 300, 149, 140, 300, 299, 100]
    found = states(*(poll(seconds, rows=count) for seconds, count in enumerate(rows)))
    assert [state is FeedState.PARTIAL for state in found] == [False, False, True, True, False, False, True]
    tomorrow = timedelta(days=1)
    next_day = poll(0, rows=5, session_day=SATURDAY + tomorrow, latest_traded_at=TEN + tomorrow)
    assert states(poll(0), next_day) == [FeedState.FRESH, FeedState.FRESH]
    assert states(poll(0, error_kind="network")) == [FeedState.PARTIAL]


def test_stale_rows_are_no_measure_of_a_whole_response() -> None:
    """Yesterday's whole table, then the first rows of today: not PARTIAL."""
    yesterday = TEN - timedelta(days=3)
    old = poll(0, rows=600, stale_rows=600, latest_traded_at=yesterday)
    mixed = poll(60, rows=600, stale_rows=560)
    few = poll(120, rows=45)
    assert states(old, mixed, few) == [FeedState.STALE, FeedState.FRESH, FeedState.FRESH]
    assert states(poll(0), poll(60, rows=600, stale_rows=600), poll(120, rows=100))[-1] is FeedState.PARTIAL


def test_only_stale_rows_are_not_fresh() -> None:
    """Every usable row is older than what is known: rejected and duplicate ones prove nothing."""
    stale = poll(60, Outcome.UNCHANGED, rows=10, stale_rows=7, rejected_rows=2, duplicate_rows=1)
    assert states(poll(0, rows=10), stale) == [FeedState.FRESH, FeedState.STALE]
    assert states(poll(0, rows=10), poll(60, rows=10, stale_rows=9)) == [FeedState.FRESH] * 2


def test_a_clock_set_back_begins_the_wait_for_frozen_again() -> None:
    """Otherwise nothing would be FROZEN until the clock has caught up."""
    back = [poll(seconds - 3600, Outcome.UNCHANGED) for seconds in (0, 60, 120, 180)]
    assert states(poll(0), *back) == [FeedState.FRESH] * 4 + [FeedState.FROZEN]


@given(st.lists(st.sampled_from([Outcome.PUBLISHED, Outcome.UNCHANGED, Outcome.FAILED]), max_size=30))
def test_frozen_against_a_naive_oracle(outcomes: list[Outcome]) -> None:
    """Minute polls of an open session: FROZEN is what counting the minutes by hand says."""
    found = states(*(poll(60 * number, outcome) for number, outcome in enumerate(outcomes)))
    good = [number for number, outcome in enumerate(outcomes) if outcome is not Outcome.FAILED]
    for number in good:
        moves = [each for each in good if each <= number and (outcomes[each] is Outcome.PUBLISHED or each == good[0])]
        assert (found[number] is FeedState.FROZEN) == (60 * (number - moves[-1]) >= 180)
    assert all(a <= b for a, b in pairwise(good))


DAYS = [
    REAL_DAY,
    pytest.param(OTHER_DAY, marks=pytest.mark.skipif(not OTHER_DAY.exists(), reason="not beside the checkout")),
]


@pytest.mark.parametrize("offset", [0, 17, 41])
@pytest.mark.parametrize("path", DAYS, ids=["2019-08-21", "2019-08-24"])
def test_frozen_where_a_real_day_pauses_and_nowhere_else(path: Path, offset: int) -> None:
    """Minute polls of a captured day by the clock: it is noticed within four minutes, and never without a reason."""
    day = PracticeMarket.load(path)
    calendar = Calendar()
    times = [moment.astimezone(UTC) for moment in day.times]
    opens = times[0].astimezone(TEHRAN).replace(hour=9, minute=0, second=0, microsecond=0).astimezone(UTC)
    begin, end = opens + timedelta(seconds=offset), opens + timedelta(hours=3, minutes=30)
    freshness, seen, frozen, when = Freshness(), 0, [], begin
    while when < end:
        held = sum(moment <= when for moment in times)
        outcome = Outcome.PUBLISHED if held > seen else Outcome.UNCHANGED
        seen = held
        session_day = calendar.session_day(when)
        traded = when if held else None
        seconds = (when - TEN).total_seconds()
        marker = poll(seconds, outcome, calendar.phase(when), latest_traded_at=traded, session_day=session_day)
        freshness = freshness.after(marker)
        if freshness.state is FeedState.FROZEN:
            frozen.append(when)
        when += timedelta(seconds=60)
    open_times = [begin, *(moment for moment in times if begin < moment < end), end]
    pauses = [(a, b) for a, b in pairwise(open_times) if b - a > timedelta(seconds=180)]
    # Nowhere else: each FROZEN is in a pause, three minutes from its beginning on.
    assert all(any(a + timedelta(seconds=120) <= moment < b for a, b in pauses) for moment in frozen)
    # Noticed: a pause of four minutes and more is reported before its fifth begins.
    for a, b in pauses:
        if b - a > timedelta(minutes=4):
            assert any(a < moment <= a + timedelta(minutes=4) for moment in frozen), (a, b)
    if path is REAL_DAY:
        silent = [moment for moment in frozen if moment.astimezone(TEHRAN).hour == 9]
        assert len(silent) >= 50
