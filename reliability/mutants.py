"""Break the code on purpose and check that a test goes red: `make mutants`. A mutant that survives is a failure."""

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
ROOMS = ("schemas", "cli", "producer", "consumers", "sandbox")


class Mutant(NamedTuple):
    """A mistake that somebody could make: what replaces which code, and the test that must notice."""

    name: str
    good: str  # found once in the product, in whichever module
    bad: str
    test: str


KAFKA, UNIT = "tests/kafka/test_producer.py", "tests/producer"
BOARD = "tests/consumers/test_board"

INITIALISE = "        self._initialise()\n"
READ = "        return committed_state(self._cluster)\n"

MUTANTS = [
    Mutant(
        "commit before all of the poll is sent",
        "        for marker in markers:\n            self._produce(",
        "        self._producer.commit_transaction()\n        self._producer.begin_transaction()\n"
        "        for marker in markers:\n            self._produce(",
        f"{KAFKA}::test_a_death_before_the_marker_leaves_nothing",
    ),
    Mutant(
        "restore before init",
        f"{INITIALISE}{READ}",
        f"        state = committed_state(self._cluster)\n{INITIALISE}        return state\n",
        f"{KAFKA}::test_what_an_older_instance_commits_at_the_last_moment_is_known",
    ),
    Mutant(
        "fencing is an error like others",
        "    if error.code() in FENCED:\n",
        "    if False:\n",
        f"{KAFKA}::test_an_older_instance_is_fenced",
    ),
    Mutant(
        "the archive does not compare offsets before a commit",
        "if table.stored(partition) != self._stored[partition]:",
        "if False:",
        "tests/consumers/test_archive_table.py::test_a_repetition_from_a_newer_snapshot_is_noticed",
    ),
    Mutant(
        "maintenance without its transaction",
        "versions = transactions or {MAINTENANCE: (self.stored(MAINTENANCE) or 0) + 1}",
        "versions = transactions or {}",
        "tests/consumers/test_archive_table.py::test_files_are_replaced_once",
    ),
    Mutant(
        "verify does not compare values",
        'ours["hash"].equals(theirs["hash"])',
        "True",
        "tests/consumers/test_archive_harms.py::test_a_harm_is_found_and_fixed",
    ),
    Mutant(
        "PostgreSQL moves offsets from wherever they are",
        "SET next = EXCLUDED.next WHERE known.next = EXCLUDED.first",
        "SET next = EXCLUDED.next",
        "tests/consumers/test_postgres.py::test_of_two_writers_at_the_same_place_one_wins",
    ),
    Mutant(
        "<= for < in stale",
        "candle.traded_at < before.traded_at",
        "candle.traded_at <= before.traded_at",
        f"{UNIT}/test_diff.py::test_older_rows_are_stale_and_equal_times_are_not",
    ),
    Mutant(
        "a fall of the totals is a trade",
        "if volume < 0 or value < 0 or count < 0:",
        "if volume < 0 and value < 0 and count < 0:",
        f"{UNIT}/test_diff.py::test_any_total_that_falls_is_a_cancellation",
    ),
    Mutant(
        "state read uncommitted",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        f"{KAFKA}::test_an_open_transaction_is_settled_by_the_next_instance",
    ),
    Mutant(
        "fenced, and keeps the partition",
        "            self._leadership.resign()\n",
        "            pass\n",
        f"{UNIT}/test_service.py::test_a_fenced_leader_joins_the_election_again",
    ),
    Mutant(
        "missed beats leave no marker",
        "missed = self._missed_beats(poll)",
        "missed: list[datetime] = []",
        f"{UNIT}/test_service.py::test_beats_missed_between_runs_are_skipped",
    ),
    Mutant(
        "a frozen feed is fresh",
        "state = FeedState.FROZEN",
        "state = FeedState.FRESH",
        f"{UNIT}/test_freshness.py::test_frozen_after_three_minutes_without_a_change",
    ),
    Mutant(
        "yesterday's prices after the open",
        "candle.trading_day < now.session_day",
        "False",
        f"{UNIT}/test_diff.py::test_rows_from_before_the_session_are_stale_even_unknown",
    ),
    Mutant(
        "a hold of the account stops one call only",
        "            held = None if error.kind in OF_THE_ACCOUNT else call\n",
        "            held = call\n",
        f"{UNIT}/test_finnotech.py::test_a_hold_of_the_account_stops_both",
    ),
    Mutant(
        "the whole budget is spent before the final poll",
        "- (0 if final else self.reserved_calls)",
        "",
        f"{UNIT}/test_finnotech.py::test_the_budget_of_a_day",
    ),
    Mutant(
        "a practice day starts from the captured prices",
        'previous = self._closes.get(row["TseSymbolCode"], ',
        'previous = {}.get("", ',
        "tests/sandbox/test_market.py::test_later_days_repeat_the_first",
    ),
    Mutant(
        "the board shows a poll before all of its events came",
        "            if missing and now - since < INCOMPLETE_SECONDS:\n",
        "            if False:\n",
        f"{BOARD}_state.py::test_a_poll_is_applied_when_all_its_events_have_come",
    ),
    Mutant(
        "a name is a formula in a spreadsheet",
        'value[:1] in tuple("=+-@\\t\\r")',
        'value[:1] in tuple("=")',
        f"{BOARD}_server.py::test_csv_opens_in_a_spreadsheet",
    ),
    Mutant(
        "the board answers to any name",
        "path not in PROBES and host not in self._hosts",
        "False",
        f"{BOARD}_server.py::test_only_names_that_are_ours_are_answered",
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
            file = place(copy, mutant)
            text = file.read_text("utf-8")
            file.write_text(text.replace(mutant.good, mutant.bad), "utf-8")
            red = _red(copy, mutant.test)
            file.write_text(text, "utf-8")
            print(f"| {mutant.name} | {'red: `' + red + '`' if red else '**survives**'} |", flush=True)
            if not red:
                survivors.append(mutant.name)
    result = {"mutants": len(chosen), "survivors": survivors, "seconds": round(time.monotonic() - began)}
    print(json.dumps(result))
    return 1 if survivors else 0


def place(checkout: Path, mutant: Mutant) -> Path:
    """Return the module with the code to break; raise SystemExit unless the product has it exactly once."""
    modules = [module for room in ROOMS for module in (checkout / room).rglob("*.py")]
    counts = {module: module.read_text("utf-8").count(mutant.good) for module in modules}
    found = [module for module, count in counts.items() if count]
    if len(found) != 1 or counts[found[0]] != 1:
        where = ", ".join(str(module.relative_to(checkout)) for module in found) or "no module"
        raise SystemExit(f"{mutant.name}: the code to break must be in the product once, and is in {where}")
    return found[0]


def _red(checkout: Path, *tests: str) -> str:
    """Return the first test that fails, nothing if all pass."""
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
