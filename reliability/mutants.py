"""Break the code on purpose and see which test goes red: `make mutants`. A mutant that no test notices is a failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOMS = ("schemas", "producer", "consumers", "sandbox")


class Mutant(NamedTuple):
    """A mistake somebody could make: in which file, instead of what, and the test that must notice."""

    name: str
    file: str
    good: str
    bad: str
    test: str


PUBLISHER, SERVICE = "producer/bourse_producer/publisher.py", "producer/bourse_producer/service.py"
DIFF, FRESHNESS = "producer/bourse_producer/diff.py", "producer/bourse_producer/freshness.py"
KAFKA, UNIT = "tests/kafka/test_producer.py", "tests/producer"

INITIALISE = "        self._initialise()\n"
READ = "        return committed_state(self._cluster)\n"

MUTANTS = [
    Mutant(
        "commit before all of the poll is sent",
        PUBLISHER,
        "        for marker in markers:\n",
        "        self._producer.commit_transaction()\n        self._producer.begin_transaction()\n"
        "        for marker in markers:\n",
        f"{KAFKA}::test_a_death_before_the_marker_leaves_nothing",
    ),
    Mutant(
        "restore before init",
        PUBLISHER,
        f"{INITIALISE}{READ}",
        f"        state = committed_state(self._cluster)\n{INITIALISE}        return state\n",
        f"{KAFKA}::test_what_an_older_instance_commits_at_the_last_moment_is_known",
    ),
    Mutant(
        "no fencing check",
        PUBLISHER,
        "        if error.code() in FENCED:\n",
        "        if False:\n",
        f"{KAFKA}::test_an_older_instance_is_fenced",
    ),
    Mutant(
        "<= for < in stale",
        DIFF,
        "candle.traded_at < known.traded_at",
        "candle.traded_at <= known.traded_at",
        f"{UNIT}/test_diff.py",
    ),
    Mutant(
        "a fall of the totals is a trade",
        DIFF,
        "if volume < 0 or value < 0 or count < 0:",
        "if volume < 0 and value < 0 and count < 0:",
        f"{UNIT}/test_diff.py",
    ),
    Mutant(
        "state read uncommitted",
        "schemas/bourse_schemas/kafka.py",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        f"{KAFKA}::test_an_open_transaction_is_settled_by_the_next_instance",
    ),
    Mutant(
        "fenced, and goes on owning the partition",
        SERVICE,
        "            self._leadership.resign()\n",
        "",
        f"{UNIT}/test_service.py::test_a_fenced_leader_stands_again",
    ),
    Mutant(
        "a failed transaction is not read back",
        SERVICE,
        "            self._close()\n            self._metrics.failures",
        "            self._metrics.failures",
        f"{UNIT}/test_service.py::test_a_publication_that_had_succeeded_is_not_repeated",
    ),
    Mutant(
        "missed beats leave no marker",
        SERVICE,
        "missed = self._missed_beats(poll)",
        "missed: list[datetime] = []",
        f"{UNIT}/test_service.py::test_beats_missed_between_runs_are_skipped",
    ),
    Mutant(
        "a frozen feed is fresh",
        FRESHNESS,
        "state = FeedState.FROZEN",
        "state = FeedState.FRESH",
        f"{UNIT}/test_freshness.py",
    ),
    Mutant(
        "yesterday's prices after the open",
        DIFF,
        "candle.trading_day < now.session_day",
        "False",
        f"{UNIT}/test_diff.py",
    ),
]


def main() -> int:
    """Try every mutant in a copy of the checkout; return the exit code."""
    began = time.monotonic()
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory(prefix="bourse-mutants-") as folder:
        copy = Path(folder) / "checkout"
        kept = shutil.ignore_patterns(".venv", ".git", "data-*", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=kept, symlinks=True)
        tests = sorted({mutant.test for mutant in chosen})
        if _red(copy, *tests):
            print("the tests are red before anything is broken", file=sys.stderr)
            return 1
        survivors = []
        for mutant in chosen:
            file = copy / mutant.file
            text = file.read_text("utf-8")
            if text.count(mutant.good) != 1:
                raise SystemExit(f"{mutant.name}: what is to be broken is not found once in {mutant.file}")
            file.write_text(text.replace(mutant.good, mutant.bad), "utf-8")
            red = _red(copy, mutant.test)
            file.write_text(text, "utf-8")
            print(f"| {mutant.name} | {'red: `' + red + '`' if red else '**survives**'} |", flush=True)
            if not red:
                survivors.append(mutant.name)
    result = {"mutants": len(chosen), "survivors": survivors, "seconds": round(time.monotonic() - began)}
    print(json.dumps(result))
    return 1 if survivors else 0


def _red(checkout: Path, *tests: str) -> str:
    """Return the first test that fails, nothing where all pass."""
    path = os.pathsep.join(str(checkout / room) for room in ROOMS)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    failed = [line.split()[1] for line in run.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
    if run.returncode and not failed:
        raise SystemExit(run.stdout + run.stderr)
    return failed[0] if failed else ""


if __name__ == "__main__":
    sys.exit(main())
