"""The example plug-in, installed next to the product as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the plug-in's wheel and install it into a folder on the path; return the environment that sees it."""
    folder = tmp_path_factory.mktemp("plugin")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=PLUGIN, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return {**os.environ, "PYTHONPATH": str(folder / "site")}


def bourse(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "bourse_cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_it_is_listed_with_its_one_line_next_to_ours(environment: dict[str, str]) -> None:
    """Installing it is all there is to do."""
    shown = bourse(environment, "consume", "--help")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert shown.returncode == 0
    assert lines["turnover"] == "Print large turnovers."
    assert {"alerts", "archive"} <= set(lines)


def test_it_has_its_own_options_and_those_of_every_consumer(environment: dict[str, str]) -> None:
    """A plug-in declares only what is its own."""
    shown = bourse(environment, "consume", "turnover", "--help").stdout
    assert all(option in shown for option in ("--rial", "--bootstrap-servers", "--group", "-X"))


def test_it_runs_and_reports_what_is_missing(environment: dict[str, str]) -> None:
    """Its mistakes end like ours: one line, exit code 2."""
    ran = bourse(environment, "consume", "turnover", "--rial", "many")
    assert ran.returncode == 2
    assert "--rial" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_an_unknown_consumer_is_answered_with_the_nearest(environment: dict[str, str]) -> None:
    """A typing error gets a suggestion."""
    ran = bourse(environment, "consume", "turnovers")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "No such command 'turnovers'; did you mean turnover?" in ran.stderr


def test_a_broken_plugin_takes_no_other_down(environment: dict[str, str], tmp_path: Path) -> None:
    """A foreign package that cannot be imported is shown as such; the others run."""
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bourse.consumers]\nbroken = no_such_module:it\n")
    path = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    shown = bourse({**environment, "PYTHONPATH": path}, "consume", "--help")
    assert shown.returncode == 0
    assert "(broken)" in shown.stdout
    assert "Print large turnovers." in shown.stdout


def test_two_of_one_name_are_an_error_that_names_both(environment: dict[str, str], tmp_path: Path) -> None:
    """Which of them runs must not depend on the order of installation."""
    info = tmp_path / "rival-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bourse.consumers]\nturnover = rival:it\n")
    path = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    ran = bourse({**environment, "PYTHONPATH": path}, "consume", "--help")
    assert ran.returncode == 2
    assert "rival" in ran.stderr
    assert "bourse-example-turnover" in ran.stderr


def test_its_own_tests_pass(environment: dict[str, str]) -> None:
    """What the example shows of testing works."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=PLUGIN, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
