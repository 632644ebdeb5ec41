"""Operators read plain English: words that are banned in help texts, errors, log events, metrics and pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bourse_cli.health import Monitor
from bourse_cli.root import bourse

ROOT = Path(__file__).parent.parent
ROOMS = ("schemas", "cli", "producer", "consumers", "sandbox")

# What is not written, and what is written instead.
BANNED = {
    r"said|told|says|tells": "prints, reports, logs; message",
    r"(?<!as )well(?!-| (as|known))": "ok",
    r"(is|goes|went|something|anything|what) wrong": "failed",
    r"(?<!there )(is|are) no (?!longer|more)|there (is|are) none": "is not a; not found",
    r"where (it|they|there|nothing|one|no|that) ": "if",
    r"so many|so long as|for so long|of which|whoever|whichever": "N, which, a consumer that",
    r"anew|aloud|nought": "again, log, 0",
    r"mend(s|ed|ing)?|beside(?!s)": "fix; next to",
    r"stands?(?!-?by| by|-| for)|lies|lay|lain|carried|put(s|ting)? (\w+ )?aside|look(s|ed|ing)? (at|after)": (
        "is; delivered; sent to dead letters; check"
    ),
    r"at fault|thrown (out|away)|throws? (\w+ )?away|(is|are|was|were) away": "failed; was removed; is unreachable",
    r"cannot be had|is not had|patiently|gone wrong|whatever is|lets? go of": "is not available",
}
PATTERN = re.compile(r"\b(" + "|".join(BANNED) + r")\b", re.IGNORECASE)


LOGGED = {"debug", "info", "warning", "error", "critical", "exception", "echo", "fail"}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Return what a module prints: the strings of errors that are raised, log events and echoed lines."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        prints = isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGED
        )
        if prints:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def helps(command: click.Command, *path: str) -> Iterator[tuple[str, str]]:
    """Return the help texts of a command, its options and the commands below it."""
    name = " ".join(path)
    yield name, command.help or ""
    for option in command.params:
        yield f"{name} {option.opts[0]}", getattr(option, "help", None) or ""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for each in command.list_commands(context):
            below = command.get_command(context, each)
            if below:
                yield from helps(below, *path, each)


def faults(text: str) -> list[str]:
    """Return the banned words of a text with some words around them."""
    return [text[max(0, found.start() - 40) : found.end() + 30] for found in PATTERN.finditer(text)]


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Return a page's lines without its code."""
    text = re.sub(
        r"^```.*?^```$",
        lambda code: "\n" * code[0].count("\n"),
        page.read_text("utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    yield from enumerate(text.splitlines(), 1)


SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_errors_and_log_events(path: Path) -> None:
    """What the code prints."""
    found = [f"{path.name}:{line}: {fault}" for line, text in texts_of(path) for fault in faults(text)]
    assert found == []


def test_help_texts() -> None:
    """Of every command and option."""
    assert [f"{name}: {fault}" for name, text in helps(bourse) for fault in faults(text)] == []


def test_metrics() -> None:
    """Their documentation, which dashboards show."""
    monitor = Monitor("test")
    assert all((monitor.producer, monitor.consumer, monitor.notify, monitor.archive, monitor.kafka))
    assert [fault for metric in monitor.registry.collect() for fault in faults(metric.documentation)] == []


def test_alarms() -> None:
    """The texts that an engineer on call reads first."""
    lines = (ROOT / "prometheus-alerts.yaml").read_text("utf-8").splitlines()
    assert [f"{number}: {fault}" for number, line in enumerate(lines, 1) for fault in faults(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path) -> None:
    """The prose; code may contain anything."""
    assert [f"{page.name}:{line}: {fault}" for line, text in prose(page) for fault in faults(text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is said in the log.", 1),
        ("All is well.", 1),
        ("It does as well.", 0),
        ("x is no number", 1),
        ("it is no longer there", 0),
        ("on standby, stands by", 0),
        ("the value stands there", 1),
        ("Look at the log", 1),
        ("besides", 0),
    ],
)
def test_the_list_finds_words(text: str, found: int) -> None:
    """And leaves others alone."""
    assert len(faults(text)) == found
