"""The fuzz run finds nothing, and would find what is broken on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import structlog
from msgspec import structs

from bourse_producer import responses, service
from bourse_producer.conceal import Concealer
from bourse_producer.diff import Changes, Snapshot, diff
from bourse_producer.responses import Derived, Memo, Reading
from bourse_schemas.events import Candle
from reliability.fuzz import Fuzz


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(("seed", "tls"), [(1, False), (2, True)])
def test_nothing_is_found(seed: int, tls: bool) -> None:
    """Hundreds of events of mutated responses, none of them wrong, no crash, and no secret that was quoted."""
    fuzz = Fuzz(seed)
    fuzz.run(500, tls=tls)
    assert [fuzz.counts[fault] for fault in ("crashes", "wrong_events", "leaks")] == [0, 0, 0], fuzz.first[:3]
    assert fuzz.counts["events"] > 200
    assert min(fuzz.counts["rejected_rows"], fuzz.counts["refused_bodies"]) > 50
    assert fuzz.counts["quoted"] > 20


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In topics, logs and captures."""
    monkeypatch.setattr(Concealer, "text", lambda _, text: text)
    monkeypatch.setattr(Concealer, "data", lambda _, data: data)
    fuzz = Fuzz(1)
    fuzz.run(400)
    assert fuzz.counts["leaks"] > 10
    shown = " ".join(fuzz.first)
    assert all(place in shown for place in ("'event': 'poll published'", "'poll_sequence'", "Reply("))


def test_a_service_that_makes_up_totals_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the pure core makes them up as well: no row of the body has them."""

    def inflated(known: Mapping[str, Candle], snapshot: Snapshot) -> Changes:
        found = {code: structs.replace(candle, value=candle.value + 1) for code, candle in snapshot.candles.items()}
        return diff(known, Snapshot(found, snapshot.received_at, snapshot.session_day))

    monkeypatch.setattr(responses, "diff", inflated)
    fuzz = Fuzz(1)
    fuzz.run(50)
    assert fuzz.counts["wrong_events"] > 10


def test_a_service_that_publishes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bytes contain is what must come out."""

    def forgetful(known: Mapping[str, Candle], *rest: Any) -> Derived:
        return responses.derive({}, *rest)

    monkeypatch.setattr(service, "derive", forgetful)
    fuzz = Fuzz(1)
    fuzz.run(50)
    assert fuzz.counts["wrong_events"] > 10


def test_a_crash_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but an ExchangeError."""

    def broken(body: bytes, reading: Reading, memo: Memo) -> Snapshot:
        raise KeyError("state")

    monkeypatch.setattr(responses, "parse", broken)
    fuzz = Fuzz(1)
    fuzz.run(20)
    assert fuzz.counts["crashes"] > 10
