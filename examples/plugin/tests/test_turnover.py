"""How a plug-in is tested without Kafka."""

import pytest
from bourse_example_turnover import Turnover

from bourse_consumers.testing import Memory, run, trade


def test_prints_large_turnovers_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A change below the limit is not worth a line."""
    memory = Memory()
    memory.append(trade(sequence=1, value_delta=999), trade(sequence=2, value_delta=1_000))
    run(Turnover(rial=1_000), memory)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "rial" in line] == [
        ["IRO1MADN0001", "1,000"]
    ]
