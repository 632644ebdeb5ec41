"""What docs/engines.md shows is what the repository has; `make test-engines` runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.sizing import table

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "engines.md").read_text("utf-8")


def test_the_sizing_table_is_the_computed_one() -> None:
    """Every cell, as `python -m scripts.sizing` prints it."""
    assert table() in PAGE


def test_the_flink_job_is_the_example() -> None:
    """Line by line."""
    (job,) = re.findall(r"^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert job == (ROOT / "examples" / "flink" / "bars.sql").read_text("utf-8")


@pytest.mark.parametrize("example", ["flink", "spark", "streams", "node"])
def test_an_example_is_short(example: str) -> None:
    """Each program has less than 150 lines."""
    files = [file for kind in ("sql", "py", "java", "js") for file in (ROOT / "examples" / example).rglob(f"*.{kind}")]
    programs = [file for file in files if "node_modules" not in file.parts]
    assert 0 < max(len(file.read_text("utf-8").splitlines()) for file in programs) < 150
