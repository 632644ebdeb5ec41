"""Whatever the exchange does, the producer makes no wrong event of it, reports what it was, and goes on."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from bourse_producer.clock import PracticeClock
from bourse_producer.diff import Changes
from bourse_producer.finnotech import Credentials, Finnotech
from bourse_producer.patience import Patience
from bourse_producer.publisher import State
from bourse_producer.responses import PROFILES
from bourse_producer.service import Producer, Settings
from bourse_sandbox.exchange import SCOPE, practice_exchange
from bourse_sandbox.faults import KINDS, Fault
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Candle, DeadLetter, FeedState, Outcome, PollMarker, TradeEvent
from reliability.alone import Alone
from reliability.certificate import self_signed

PUBLISHED, UNCHANGED, FAILED = Outcome.PUBLISHED, Outcome.UNCHANGED, Outcome.FAILED


class Log:
    """Keeps what is published, as Kafka would."""

    def __init__(self) -> None:
        self.events: list[TradeEvent] = []
        self.candles: dict[str, Candle] = {}
        self.markers: list[PollMarker] = []
        self.letters = 0

    def restore(self) -> State:
        """Return what is committed."""
        return State(dict(self.candles), len(self.markers), list(self.markers))

    def require_room_for(self, instant: Any) -> None:
        """Have room for everything."""

    def publish(self, changes: Changes, letters: Sequence[DeadLetter], markers: Sequence[PollMarker]) -> None:
        """Commit."""
        self.events += changes.events
        self.candles |= {candle.instrument: candle for candle in changes.candles}
        self.markers += markers
        self.letters += len(letters)

    def idle(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def play(*faults: str, polls: int = 5, profile: str = "trades-realtime", **options: Any) -> tuple[Log, dict[str, Any]]:
    """Poll the real day's first responses over real HTTP, through these faults; return the result."""
    practice = practice_exchange("real", "poll", faults=faults)
    log = Log()
    chosen, clock = PROFILES[profile], PracticeClock()
    settings = Settings(**{"poll_seconds": 0, "always": True, **options}, profile=chosen)
    with practice.serve() as server, httpx2.Client(timeout=0.5) as client:
        account = Credentials("practice", "practice", "0123456789")
        patience = Patience(longest_seconds=0)
        exchange = Finnotech(client, server.url, account, chosen, clock=clock, patience=patience, deadline_seconds=1.5)
        producer = Producer(exchange, lambda: log, settings, clock, leadership=Alone())
        for _ in range(polls):
            producer.poll()
        return log, practice.state()


def business(event: TradeEvent) -> tuple[Any, ...]:
    """Return what an event says, but for when and in which poll it was seen."""
    return event.event_id, event.op, event.volume, event.value_delta, event.last_price, event.traded_at


EXPECTED = {
    "expired": (PUBLISHED, None),
    "revoked": (PUBLISHED, None),
    "token-401": (FAILED, "token"),
    "token-403": (FAILED, "scope"),
    "token-400": (FAILED, "token"),
    "token-200": (FAILED, "token"),
    "token-bare": (FAILED, "token"),
    "scope": (FAILED, "scope"),
    "address": (FAILED, "address"),
    "quota": (FAILED, "quota"),
    "quota-503": (FAILED, "provider"),
    "rate": (FAILED, "rate"),
    "duplicate-track-id": (FAILED, "internal"),
    "provider": (FAILED, "provider"),
    "timeout": (FAILED, "timeout"),
    "failed-200": (FAILED, "provider"),
    "html": (FAILED, "provider"),
    "forbidden-page": (FAILED, "address"),
    "maintenance": (FAILED, "provider"),
    "empty": (FAILED, "nonsense"),
    "truncated": (FAILED, "network"),
    "reset": (FAILED, "network"),
    "broken-gzip": (FAILED, "nonsense"),
    "huge": (FAILED, "nonsense"),
    "wrong-encoding": (FAILED, "nonsense"),
    "nesting": (FAILED, "nonsense"),
    "nan": (FAILED, "nonsense"),
    "silence": (FAILED, "timeout"),
    "slow": (FAILED, "timeout"),
    "stall": (FAILED, "timeout"),
    "drip": (FAILED, "timeout"),
    "duplicates": (PUBLISHED, None),
    "half": (UNCHANGED, None),
    "bad-rows": (UNCHANGED, None),
    "renamed": (FAILED, "nonsense"),
    "other-day": (FAILED, "nonsense"),
    "yesterday": (UNCHANGED, None),
    "old-response": (UNCHANGED, None),
    "frozen": (UNCHANGED, None),
    "skew": (PUBLISHED, None),
    "wrong-type": (PUBLISHED, None),
}


# (status, content type, Retry-After, does the body end within a second)
ON_THE_WIRE = {
    "quota-503": (503, "application/json; charset=utf-8", None, True),
    "forbidden-page": (403, "text/html", None, True),
    "maintenance": (503, "text/html", "86400", True),
    "rate": (429, "application/json; charset=utf-8", "5", True),
    "stall": (200, "application/json; charset=utf-8", None, False),
    "drip": (200, "application/json; charset=utf-8", None, False),
}


def test_every_kind_is_tried() -> None:
    """Each has an expectation."""
    assert EXPECTED.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", ON_THE_WIRE)
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_what_a_client_sees(kind: str, secure: bool, tmp_path: Path) -> None:
    """Status, headers, and whether the body ends; the next call gets the response that was not delivered."""
    status, content_type, retry_after, ends = ON_THE_WIRE[kind]
    practice = practice_exchange("real", "poll", faults=[f"{kind}@1"])
    pem = self_signed(tmp_path / "exchange.pem") if secure else None
    trusted: Any = ssl.create_default_context(cafile=str(pem)) if secure else True
    with practice.serve(tls=pem) as server, httpx2.Client(base_url=server.url, verify=trusted, timeout=0.5) as client:
        body = {"grant_type": "client_credentials", "nid": "0123456789", "scopes": SCOPE}
        grant = client.post("/dev/v2/oauth2/token", auth=("practice", "practice"), json=body).json()["result"]
        call: dict[str, Any] = {
            "url": "/bourse/v2/clients/practice/trades/realtime",
            "headers": {"Authorization": f"Bearer {grant['value']}"},
        }
        params = {"isTimePeriod": "false", "precedencyRight": "false"}
        with client.stream("GET", params=params | {"trackId": uuid4().hex}, **call) as response:
            assert response.status_code == status
            assert response.headers["content-type"] == content_type
            assert response.headers.get("retry-after") == retry_after
            began, length = time.monotonic(), 0
            try:
                for piece in response.iter_raw():
                    length += len(piece)
                    if time.monotonic() - began > 1:
                        break
                else:
                    assert ends
            except httpx2.ReadTimeout:
                assert kind == "stall"
        if kind == "drip":
            assert 0 < length < 10
        assert practice.state()["served"] == 0
        assert len(client.get(params=params | {"trackId": uuid4().hex}, **call).json()["result"]) == 533


@pytest.fixture(scope="module")
def undisturbed() -> list[TradeEvent]:
    """Return the events of the first five responses."""
    return play()[0].events


@pytest.mark.parametrize("kind", EXPECTED)
def test_no_wrong_event_the_outcome_on_the_marker_and_on_it_goes(kind: str, undisturbed: list[TradeEvent]) -> None:
    """The third call fails, and its retry if a new token is tried; all five responses come out nevertheless."""
    retried = kind.startswith("token") or kind == "scope"
    log, state = play(f"{kind}@3-4" if retried else f"{kind}@3", polls=6)
    marker = log.markers[2]
    assert (marker.outcome, marker.error_kind) == EXPECTED[kind], marker.error_message
    assert state["faults"] == {kind: 2 if retried else 1}
    delivered = marker.outcome is PUBLISHED
    events = log.events if not delivered else [event for event in log.events if event.poll_sequence <= 5]
    assert [business(event) for event in events] == [business(event) for event in undisturbed]
    assert [each.outcome for each in log.markers[3:5]] == [PUBLISHED] * 2
    assert [each.poll_sequence for each in log.markers] == list(range(1, 7))
    states = {"half": FeedState.PARTIAL, "yesterday": FeedState.STALE}
    assert marker.feed_state is states.get(kind, FeedState.DOWN if marker.outcome is FAILED else FeedState.FRESH)
    if kind == "bad-rows":
        assert (marker.rejected_rows, log.letters) == (-(-marker.rows // 10), marker.rejected_rows)
    if kind == "duplicates":
        assert marker.duplicate_rows == marker.rows // 2


def test_a_frozen_feed_is_reported() -> None:
    """Answers come, with a fresh Date, and nothing moves."""
    settings = Settings()
    frozen = replace(settings.freshness, frozen_after=timedelta(seconds=-1))
    log, _ = play("frozen@3-5", polls=5, freshness=frozen)
    assert [marker.feed_state for marker in log.markers[2:]] == [FeedState.FROZEN] * 3


def test_the_successor_gives_the_same_market() -> None:
    """Through its own path, names and dates: the same totals of shares and rights, times of receipt, flagged."""
    ours, _ = play(polls=3)
    theirs, state = play(polls=3, profile="realTimeTrades")
    assert (state["calls"], state["served"]) == (3, 3)
    assert {event.traded_at_estimated for event in theirs.events} == {True}
    assert {event.source for event in theirs.events} == {"finnotech/real-time-trades"}
    shares = [event for event in theirs.events if not event.is_right]
    assert [(e.event_id, e.volume, e.closing_price) for e in shares] == [
        (e.event_id, e.volume, e.closing_price) for e in ours.events
    ]


@pytest.mark.parametrize(
    "text",
    [
        "html:",
        "html:2",
        "html:0",
        "html:1.2.3",
        "html@",
        "html@x",
        "html@1-2-3",
        "html@0",
        "html@3-2",
    ],
)
def test_a_bad_time_is_reported_in_one_line(text: str) -> None:
    """The kind is right."""
    with pytest.raises(ConfigurationError, match=r"KIND@FIRST-LAST$"):
        Fault.parse(text)


@pytest.mark.parametrize(("text", "near"), [("htm:0.2", "; did you mean html?"), ("nosuch:0.1", ""), ("", "")])
def test_an_unknown_fault_is_reported_with_the_nearest_kind(text: str, near: str) -> None:
    """Two lines: what was given, and where the kinds are listed."""
    with pytest.raises(ConfigurationError) as caught:
        Fault.parse(text)
    assert str(caught.value) == f"--fault {text}: unknown kind of fault{near}\n`--fault help` lists the kinds"


def test_when_a_fault_happens() -> None:
    """Always, by chance, once, or for a while."""
    assert Fault.parse("html") == Fault("html")
    assert Fault.parse("html:0.25") == Fault("html", 0.25)
    assert Fault.parse("html@7") == Fault("html", 1.0, 7, 7)
    assert Fault.parse("html@7-20") == Fault("html", 1.0, 7, 20)
    log, state = play("html:0.5", polls=12)
    assert 0 < state["faults"]["html"] < 12
    assert sum(marker.outcome is FAILED for marker in log.markers) == state["faults"]["html"]
    assert play("html:0.5", polls=12)[1]["faults"] == state["faults"]


def test_only_an_accepted_call_is_changed() -> None:
    """Calls that would be refused anyway, for rights, or for one company are answered as usual and do not count."""
    practice = practice_exchange("real", "poll", faults=["html@1"])
    with practice.serve() as server, httpx2.Client(base_url=server.url) as client:
        body = {"grant_type": "client_credentials", "nid": "0123456789", "scopes": SCOPE}
        grant = client.post("/dev/v2/oauth2/token", auth=("practice", "practice"), json=body).json()["result"]

        def call(**params: str) -> int:
            wanted = {"trackId": uuid4().hex, "isTimePeriod": "false", "precedencyRight": "false"} | params
            path = "/bourse/v2/clients/practice/trades/realtime"
            return client.get(path, params=wanted, headers={"Authorization": f"Bearer {grant['value']}"}).status_code

        assert [call(trackId="-"), call(precedencyRight="true"), call(coId="1"), call(isTimePeriod="x")] == [
            *(400, 200, 200, 400),
        ]
        assert practice.state()["faults"] == {}
        assert [call(), call()] == [502, 200]
        state = practice.state()
        assert (state["faults"], state["served"], state["calls"]) == ({"html": 1}, 1, 3)


@pytest.mark.parametrize("kind", ["truncated", "reset", "slow", "huge", "silence", "nesting"])
def test_the_server_does_not_log_it(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Hanging up, and being hung up on, leaves no line in the exchange's log."""
    play(f"{kind}@1", polls=2)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")] == []
