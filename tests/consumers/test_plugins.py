"""`bourse consume`: how a plug-in becomes a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = '''
import click
from bourse_consumers.api import Consumer

class Mine(Consumer):
    def process(self, batch):
        return None

@click.command
@click.option("--limit", type=int, default=1)
def good(limit):
    """Do something good."""
    click.echo(f"{click.get_current_context().info_name} {limit}")
    return None

@click.command
@click.option("--group")
def greedy(group):
    """Have an option that everyone has."""
    return Mine()

def function():
    """Be no command."""
'''


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which some more plug-ins are installed."""
    info = tmp_path / "more-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1\n")
    names = ("good", "greedy", "function")
    (info / "entry_points.txt").write_text(
        "[bourse.consumers]\n" + "".join(f"{name} = more_plugins:{name}\n" for name in names)
    )
    (tmp_path / "more_plugins.py").write_text(PLUGINS)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def consume(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `bourse consume`."""
    command = [sys.executable, "-m", "bourse_cli", "consume", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_plugin_gets_its_own_options_and_its_own_context(environment: dict[str, str]) -> None:
    """Flags and variables reach it; what it returns has to be a Consumer."""
    ran = consume({**environment, "BOURSE_CONSUME_GOOD_LIMIT": "7"}, "good", "--bootstrap-servers", "127.0.0.1:1")
    assert ran.stdout == "good 7\n"
    assert (ran.returncode, ran.stderr) == (2, "Error: the consumer 'good' returned NoneType, not a Consumer\n")


def test_a_plugin_with_an_option_of_ours_gets_an_error_and_harms_no_other(environment: dict[str, str]) -> None:
    """Two meanings of one flag would be worse than an error."""
    assert "Have an option that everyone has." in consume(environment, "--help").stdout
    ran = consume(environment, "greedy")
    assert ran.returncode == 2
    assert ran.stderr == "Error: the consumer 'greedy' declares options that every consumer has: --group, group\n"


def test_an_entry_point_that_is_not_a_command_harms_no_other(environment: dict[str, str]) -> None:
    """It is listed as broken, and prints why when it is called."""
    assert "Do something good." in consume(environment, "--help").stdout
    ran = consume(environment, "function", "--whatever")
    assert ran.returncode == 2
    assert "more_plugins:function" in ran.stderr
    assert "Traceback" not in ran.stderr
