"""The state that `bourse watch` and `bourse board` show: a fold over records, without Kafka."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from bourse_consumers.board.feed import Feed, groups_of
from bourse_consumers.board.state import Group, Located, State, percent
from bourse_sandbox.kafka import MockKafka
from bourse_schemas.events import AlertState, Op, Outcome, Phase
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import GroupLag
from tests.samples import AT, DAY, alert, event, marker

NOTHING = {"opened": 0, "traded": 0, "revised": 0, "cancelled": 0}
ONE = {**NOTHING, "traded": 1}


def at(**changes: Any) -> Located:
    """Return an event with a place."""
    return Located(event(**changes), 3, changes.get("sequence", 1) + 100)


def live() -> State:
    """Return a live state after poll 1, which had one instrument."""
    state = State()
    state.add(at(), 0.0)
    state.add(marker(1, **ONE), 0.0)
    state.go_live(0.0)
    return state


def test_a_market_consumer_runs_while_its_election_has_members() -> None:
    """Its own group has the offsets, and no members."""
    found = [
        GroupLag("bourse-alerts", 0, 0, None),
        GroupLag("bourse-alerts-election", 1, None, None),
        GroupLag("bourse-archive", 0, 7, 1),
    ]
    assert groups_of(found, "bourse-") == [Group("alerts", True, 0), Group("archive", False, 7)]


def test_a_group_that_cannot_be_asked_for_is_no_trouble_with_prices(
    mock_kafka: MockKafka, prefix: str, wait_for: Callable[..., Any]
) -> None:
    """The mock cluster does not describe groups: all else that is asked, it answers."""
    with Feed(Cluster(mock_kafka.bootstrap_servers, "http://127.0.0.1:9", prefix), ["another"]) as feed:
        wait_for(lambda: feed.state.troubles, 30)
        assert feed.state.troubles.keys() == {"groups"}
        assert "group another" in feed.state.troubles["groups"]
        assert feed.trouble() == "being read"


def test_a_poll_is_applied_when_all_its_events_have_come() -> None:
    """Events of a poll are shown together, whichever partition is late, and its marker not before them."""
    state = live()
    state.add(marker(2, **{**NOTHING, "traded": 2}), 1.0)
    state.add(at(sequence=2, last_price=1030, poll_sequence=2), 1.0)
    state.settle(1.0)
    assert state.candles["IRO1MADN0001"].last_price == 1025
    assert state.marker
    assert state.marker.poll_sequence == 1
    state.add(at(instrument="IRO1FOLD0001", poll_sequence=2), 2.0)
    state.settle(2.0)
    assert state.candles["IRO1MADN0001"].last_price == 1030
    assert state.marker.poll_sequence == 2
    assert (state.marker_at, state.incomplete) == (2.0, 0)


def test_polls_are_applied_in_their_order() -> None:
    """The events of a later poll wait for the poll before."""
    state = live()
    state.add(marker(2, **ONE), 1.0)
    state.add(marker(3, **ONE), 1.0)
    state.add(at(sequence=3, last_price=1040, poll_sequence=3), 1.0)
    state.settle(1.0)
    assert state.candles["IRO1MADN0001"].sequence == 1
    state.add(at(sequence=2, poll_sequence=2), 1.5)
    state.settle(1.5)
    assert state.candles["IRO1MADN0001"].sequence == 3


def test_a_poll_whose_events_do_not_come_is_applied_after_five_seconds() -> None:
    """And counted; what comes of it later is applied at once."""
    state = live()
    state.add(marker(2, **ONE), 1.0)
    state.settle(5.9)
    assert state.incomplete == 0
    state.settle(6.0)
    assert state.incomplete == 1
    state.add(at(sequence=2, last_price=1030, poll_sequence=2), 7.0)
    assert state.candles["IRO1MADN0001"].last_price == 1030


def test_an_event_that_was_read_before_its_marker_is_counted_for_it() -> None:
    """The end of the backlog may be in the middle of a poll."""
    state = State()
    state.add(at(poll_sequence=2), 0.0)
    state.add(marker(1, **NOTHING), 0.0)
    state.go_live(0.0)
    state.add(marker(2, **ONE), 1.0)
    state.settle(1.0)
    assert state.marker
    assert state.marker.poll_sequence == 2


def test_totals_are_those_of_the_markers_of_the_newest_session_day() -> None:
    """However late the state begins, the day's totals come whole from its markers."""
    state = State()
    state.add(marker(1, session_day=DAY - timedelta(days=1)), 0.0)
    state.add(marker(2), 0.0)
    state.add(marker(3, traded=50), 0.0)
    assert dict(state.totals) == {Op.OPENED: 20, Op.TRADED: 150, Op.REVISED: 4, Op.CANCELLED: 2}
    assert [each.poll_sequence for each in state.markers] == [2, 3]


def test_percentages_are_of_the_previous_close_only() -> None:
    """Without it there is no percentage: the first price of the day is another quantity."""
    assert percent(event()) == 2.5
    assert percent(event(previous_close=None)) is None
    assert percent(event(previous_close=0)) is None
    assert percent(event(last_price=None)) is None


def test_movers_are_of_this_day_only() -> None:
    """The largest rise comes first; yesterday's candles are not movers."""
    state = State()
    state.add(marker(1), 0.0)
    state.add(at(instrument="UP"), 0.0)
    state.add(at(instrument="DOWN", last_price=800), 0.0)
    state.add(at(instrument="SAME", last_price=1000), 0.0)
    state.add(at(instrument="OLD", trading_day=DAY - timedelta(days=1)), 0.0)
    assert [(candle.instrument, change) for change, candle in state.movers()] == [
        ("UP", 2.5),
        ("SAME", 0.0),
        ("DOWN", -20.0),
    ]


def test_a_day_without_a_candle_is_summed_up() -> None:
    """As of an exchange that failed all day."""
    assert "0 instruments: 0 up, 0 down" in State().summary()


def test_an_older_change_does_not_replace_a_newer_candle() -> None:
    """Candles and events come from different partitions, in any order."""
    state = State()
    state.add(at(sequence=9, last_price=900), 0.0)
    state.add(at(sequence=8), 0.0)
    assert state.candles["IRO1MADN0001"].last_price == 900
    assert sorted(state.changes["IRO1MADN0001"]) == [8, 9]


def test_a_change_is_kept_once_with_its_place() -> None:
    """A record that is read twice replaces itself."""
    state = State()
    state.add(at(sequence=2), 0.0)
    state.add(at(sequence=2), 0.0)
    (change,) = state.changes["IRO1MADN0001"].values()
    assert change[:2] == (2, Op.TRADED)
    assert change[2] == AT.timestamp() * 1000
    assert change[-3:] == (1, 3, 102)


def test_a_new_day_begins_with_nothing() -> None:
    """Changes, markers, totals and alerts of the day before are dropped, and it is summed up once."""
    state = live()
    state.add(alert(), 1.0)
    state.add(marker(2, **NOTHING, phase=Phase.AFTER_CLOSE), 1.0)
    state.add(marker(3, **NOTHING, phase=Phase.AFTER_CLOSE), 2.0)
    state.settle(2.0)
    (line,) = [each for each in state.news if isinstance(each, str)]
    assert line.startswith("summary of 2019-08-24; 0 opened; 1 traded")
    for part in ("1 instrument: 1 up, 0 down", "most up IRO1MADN0001 +2.50 %", "1 fired, 0 resolved"):
        assert part in line
    tomorrow = DAY + timedelta(days=1)
    state.add(marker(4, **ONE, session_day=tomorrow), 3.0)
    state.add(at(instrument="NEW", trading_day=tomorrow, poll_sequence=4), 3.0)
    state.settle(3.0)
    assert [candle.instrument for candle in state.today()] == ["NEW"]
    assert list(state.changes) == ["NEW"]
    assert not state.episodes
    assert len([each for each in state.news if isinstance(each, str)]) == 1
    assert dict(state.totals)[Op.TRADED] == 1


def test_a_close_that_was_missed_is_summed_up_at_the_next_day() -> None:
    """The day changes without a marker of its close: a producer that was down."""
    state = live()
    state.add(marker(3, **NOTHING, session_day=DAY + timedelta(days=2)), 2.0)
    state.settle(2.0)
    assert [
        each for each in state.news if isinstance(each, str) and each.startswith("summary of 2019-08-24; 0 opened; 1")
    ]


def test_an_episode_has_its_begin_and_its_end() -> None:
    """Open ones come first, whatever their age."""
    state = live()
    state.add(alert(alert_id="open", raised_at=AT), 1.0)
    state.add(alert(alert_id="over", raised_at=AT + timedelta(minutes=1)), 1.0)
    ended = alert(alert_id="over", state=AlertState.RESOLVED, raised_at=AT + timedelta(minutes=2))
    state.add(ended, 1.0)
    state.add(ended, 1.0)
    assert [(fired.alert_id, resolved) for fired, resolved in state.alerts()] == [("open", None), ("over", ended)]


def test_gaps_are_the_spans_without_a_good_poll() -> None:
    """With the last error of the failed polls; a span that lasts has no end."""
    state = live()
    failed = {"outcome": Outcome.FAILED, "error_kind": "network", "error_message": "no route"}
    state.add(marker(2, **NOTHING, **failed), 1.0)
    state.add(marker(3, **NOTHING, gap_from=AT + timedelta(minutes=1)), 1.0)
    state.settle(1.0)
    start = round(AT.timestamp() * 1000)
    assert state.gaps() == [(start + 60_000, start + 180_000, "network: no route")]
    state.add(marker(4, **NOTHING, **failed), 2.0)
    state.settle(2.0)
    assert state.gaps()[1:] == [(start + 180_000, None, "network: no route")]
    state.add(marker(5, **NOTHING, gap_from=AT + timedelta(minutes=3)), 3.0)
    state.settle(3.0)
    assert state.gaps()[1:] == [(start + 180_000, start + 300_000, "network: no route")]


def test_silence_is_measured_by_our_clock_and_the_markers_own_interval() -> None:
    """Years between the market's clock and ours do not matter, the time since the last marker does."""
    state = live()
    assert state.silent(100.0) is None
    assert state.silent(126.0) == 126.0
    state.settle(126.0)
    state.settle(127.0)
    assert [each for each in state.news if isinstance(each, str)] == ["no poll for 126 s"]
    state.add(marker(2, **NOTHING), 130.0)
    state.settle(130.0)
    assert state.silent(200.0) is None
    state.add(marker(3, **NOTHING, day_final=True, next_poll_at=AT + timedelta(hours=15)), 500.0)
    state.settle(500.0)
    assert state.silent(53_000.0) is None


def test_an_instrument_that_was_removed_is_gone() -> None:
    """A tombstone on the candles is its code; what cannot be decoded is only counted."""
    state = live()
    state.add("IRO1MADN0001", 1.0)
    state.add(None, 1.0)
    assert not state.candles
    assert state.undecodable == 1
    assert "IRO1MADN0001" in state.dirty
