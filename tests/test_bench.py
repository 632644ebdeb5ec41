"""The benchmark itself: a small run of it, and that it would notice wrong records."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PEER = ROOT / ".venv" / "bench" / "bin" / "python"


def test_a_quick_run_times_and_checks_both_contestants() -> None:
    """Two polls each, the right records on the topics; the peer takes part where `make bench` made its environment."""
    command = [sys.executable, "-m", "benchmarks.bench", "--quick"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    laps = json.loads(ran.stdout)
    assert set(laps) == ({"ours", "peer"} if PEER.exists() else {"ours"})
    for name, polls in laps.items():
        assert [len(steps) for steps in polls] == [3, 3], name
        assert all(milliseconds > 0 for steps in polls for milliseconds in steps), name


def test_the_check_notices_a_wrong_value_and_a_missing_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the topics is compared to the last rial and the last record."""
    monkeypatch.syspath_prepend(ROOT)
    bench, market, plain = (import_module(f"benchmarks.{name}") for name in ("publishing", "market", "plain"))
    rows = market.rows(1, 3)
    right = list(plain.records({}, rows, 1, "a", market.received_at(1)))
    again = list(plain.records({}, rows, 1, "b", market.received_at(1)))
    wrong = list(plain.records({}, [{**rows[0], "LastPrice": 1}, *rows[1:]], 1, "a", market.received_at(1)))
    assert len(right) == 3 * 2 + 1
    assert bench.digest(right) == bench.digest(reversed(again))
    assert bench.digest(right) != bench.digest(wrong)
    assert bench.digest(right) != bench.digest(right[:-1])
