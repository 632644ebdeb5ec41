"""The fuzz run finds nothing, and would find what is broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import structlog
from msgspec import structs

from bourse_producer import derive, service
from bourse_producer.diff import Changes, Snapshot, diff
from bourse_producer.responses import Reading
from bourse_schemas.events import Candle
from reliability.fuzz import Fuzz


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Log nothing: every case is a line or two."""
    structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_found(seed: int) -> None:
    """Hundreds of events of mutated responses, none of them wrong, and no crash."""
    fuzz = Fuzz(seed)
    fuzz.run(500)
    assert (fuzz.counts["crashes"], fuzz.counts["wrong_events"]) == (0, 0), fuzz.first[:3]
    assert fuzz.counts["events"] > 200
    assert min(fuzz.counts["rejected_rows"], fuzz.counts["refused_bodies"]) > 50


def test_a_service_that_makes_up_totals_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the pure core made them up as well: no row of the body says so."""

    def inflated(known: Mapping[str, Candle], snapshot: Snapshot) -> Changes:
        found = {code: structs.replace(candle, value=candle.value + 1) for code, candle in snapshot.candles.items()}
        return diff(known, Snapshot(found, snapshot.received_at, snapshot.session_day))

    for module in (service, derive):
        monkeypatch.setattr(module, "diff", inflated)
    fuzz = Fuzz(1)
    fuzz.run(50)
    assert fuzz.counts["wrong_events"] > 10


def test_a_service_that_publishes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bytes say is what must come out."""

    def forgetful(known: Mapping[str, Candle], snapshot: Snapshot) -> Changes:
        return diff({}, snapshot)

    monkeypatch.setattr(service, "diff", forgetful)
    fuzz = Fuzz(1)
    fuzz.run(50)
    assert fuzz.counts["wrong_events"] > 10


def test_a_crash_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is no ExchangeError."""

    def broken(body: bytes, context: Reading) -> Snapshot:
        raise KeyError("state")

    monkeypatch.setattr(service, "parse", broken)
    fuzz = Fuzz(1)
    fuzz.run(20)
    assert fuzz.counts["crashes"] > 10
