"""The mutants follow the code: what they break is there, and so are the tests that must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.mutants import MUTANTS, Mutant, place

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(mutant: Mutant) -> None:
    """Its code is in one module, once; its test exists."""
    assert place(ROOT, mutant).is_file()
    file, _, test = mutant.test.partition("::")
    assert f"def {test}" in (ROOT / file).read_text("utf-8")


def test_code_that_is_gone_is_named() -> None:
    """Not skipped: a mutant that cannot be made proves nothing."""
    with pytest.raises(SystemExit, match=r"^gone: .* is in no module$"):
        place(ROOT, Mutant("gone", "no such code", "", ""))
