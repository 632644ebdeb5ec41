"""What `bourse doctor` makes of groups, markers and sources; tests/kafka/test_doctor.py has the command."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bourse_producer.doctor import Finding, Status, judge_groups, judge_poll, judge_sources
from bourse_schemas.events import FeedState, Outcome, Phase, PollMarker
from bourse_schemas.reading import GroupLag

NOW = datetime(2026, 11, 21, 6, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def marker(number: int, **changes: Any) -> PollMarker:
    """Return the marker of a poll, NUMBER minutes ago."""
    at = NOW - number * MINUTE
    usual: dict[str, Any] = {
        "poll_sequence": 100 - number,
        "source": "finnotech/a",
        "outcome": Outcome.PUBLISHED,
        "phase": Phase.OPEN,
        "feed_state": FeedState.FRESH,
        "requested_at": at,
        "received_at": at,
        "next_poll_at": at + MINUTE,
        "day_final": False,
        "simulated": False,
        **dict.fromkeys(("rows", "opened", "traded", "revised", "cancelled", "charged_calls"), 0),
        **dict.fromkeys(("stale_rows", "rejected_rows", "duplicate_rows"), 0),
    }
    return PollMarker(**{**usual, **changes})


def ago(minutes: int) -> int:
    """Return a time in milliseconds."""
    return round((NOW - minutes * MINUTE).timestamp() * 1000)


@pytest.mark.parametrize(
    ("group", "status", "message", "advice"),
    [
        (GroupLag("g", 1, 0, None), Status.OK, "g: 1 running, no lag", ""),
        (GroupLag("g", 0, 0, None), Status.OK, "g: 0 running, no lag", ""),
        (GroupLag("g", 2, None, None), Status.OK, "g: 2 running", ""),
        (GroupLag("g", 1, 7, ago(10)), Status.OK, "g: 1 running, lag 7 offsets, oldest unread record 10 min old", ""),
        (
            GroupLag("g", 1, 7, ago(11)),
            Status.WARNING,
            "g: 1 running, lag 7 offsets, oldest unread record 11 min old",
            "see its log and /readyz",
        ),
        (
            GroupLag("g", 0, 7, ago(-1)),
            Status.WARNING,
            "g: 0 running, lag 7 offsets, oldest unread record 0 min old",
            "start it, or delete it",
        ),
    ],
)
def test_a_consumer_group(group: GroupLag, status: Status, message: str, advice: str) -> None:
    """It is judged by its members and by the age of the oldest record it has not read."""
    assert judge_groups([group], "bourse-producer", NOW) == [Finding("consumer", status, message, advice)]


def test_members_in_a_group_of_their_own() -> None:
    """A market consumer commits for one group and elects its active member in another."""
    groups = [GroupLag("g", 0, 7, ago(1)), GroupLag("g-election", 2, None, None), GroupLag("p", 2, None, None)]
    shown = [(each.name, each.status, each.message) for each in judge_groups(groups, "p", NOW)]
    assert shown == [
        ("consumer", Status.OK, "g: 2 running, lag 7 offsets, oldest unread record 1 min old"),
        ("consumer", Status.OK, "g-election: 2 running"),
        ("producers", Status.OK, "p: 2 running"),
    ]


def test_sources() -> None:
    """Two within ten minutes fail; a change of the source earlier than that does not."""
    old, new = {"source": "finnotech/a"}, {"source": "finnotech/b"}
    assert judge_sources([]).status is Status.OK
    assert judge_sources([marker(11, **old), marker(1, **new), marker(0, **new)]).status is Status.OK
    found = judge_sources([marker(9, **old), marker(0, **new)])
    assert (found.status, found.message) == (Status.FAILED, "finnotech/a and finnotech/b published within 10 min")


@pytest.mark.parametrize(
    ("changes", "age", "status", "shown"),
    [
        ({}, 0, Status.OK, "feed FRESH"),
        ({"feed_state": FeedState.IDLE}, 0, Status.OK, "feed IDLE"),
        ({"feed_state": FeedState.PARTIAL}, 0, Status.WARNING, "feed PARTIAL"),
        ({"feed_state": FeedState.FROZEN}, 0, Status.FAILED, "feed FROZEN"),
        (
            {"feed_state": FeedState.DOWN, "error_kind": "quota", "error_message": "no more"},
            0,
            Status.FAILED,
            "(quota: no more)",
        ),
        ({}, 3, Status.OK, "feed FRESH"),
        ({}, 4, Status.FAILED, "the next one is 3 min late"),
        ({"next_poll_at": None}, 99, Status.OK, "feed FRESH"),
    ],
)
def test_the_last_poll(changes: dict[str, Any], age: int, status: Status, shown: str) -> None:
    """Late, failed, or of a feed that is not fresh."""
    found = judge_poll([marker(age + 1), marker(age, **changes)], NOW)
    assert found.status is status
    assert shown in found.message
    assert judge_poll([], NOW).status is Status.WARNING
