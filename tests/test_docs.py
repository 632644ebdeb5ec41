"""Documentation that cannot lie: commands, options, variables, targets, links and examples are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from bourse_cli.root import bourse
from bourse_consumers.alerts.rules_file import RuleFiles
from bourse_consumers.archive.sink import DeltaArchive
from bourse_consumers.testing import Memory, marker
from bourse_consumers.testing import run as archive_all
from bourse_producer.replay import Replay
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import spawn
from bourse_schemas.topics import POLLS, TOPICS

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")})
SETTINGS = sorted((ROOT / "compose").rglob("settings.env*"))
SOURCES = [*PAGES, *SETTINGS, ROOT / "docker-compose.yml", ROOT / "Makefile", ROOT / "Dockerfile"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def walk(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Return every command below, with the words that lead to it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below, name
            yield from walk(below, *path, name)


COMMANDS = dict(walk(bourse))
COMMON = {"--help", "-h", "--version"}
EXAMPLES = {("consume", "turnover")}  # examples/plugin, not installed here


def options_of(command: click.Command) -> dict[str, click.Parameter]:
    """Return a command's options by each of their spellings."""
    return {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}


def known_variables() -> set[str]:
    """Return every variable that means something: options', and those that the code reads itself."""
    known = set()
    for path, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option):
                known.add("_".join(("BOURSE", *path, option.name or "")).upper().replace("-", "_"))
                known.update([option.envvar] if isinstance(option.envvar, str) else option.envvar or ())
    for folder in ("schemas", "producer", "consumers", "sandbox"):
        for file in (ROOT / folder).rglob("*.py"):
            known.update(re.findall(r'"(BOURSE_[A-Z_]+)"', file.read_text("utf-8")))
    return known


def check_command(words: list[str]) -> None:
    """Fail unless `bourse` with these words is a command, with options that it has."""
    path: tuple[str, ...] = ()
    allowed = COMMON | set(options_of(bourse))
    wants_value = False
    for word in words:
        name = word.split("=")[0]
        if wants_value:
            wants_value = False
        elif word.startswith("-") and len(word) > 1:
            assert name in allowed, f"bourse {' '.join(path)} has no option {name}"
            option = options_of(COMMANDS[path]).get(name)
            wants_value = isinstance(option, click.Option) and not option.is_flag and "=" not in word
        elif (*path, word) in COMMANDS:
            path = (*path, word)
            allowed |= set(options_of(COMMANDS[path]))
        elif (*path, word) in EXAMPLES:
            return
        else:
            assert not isinstance(COMMANDS[path], click.Group), f"no command: bourse {' '.join((*path, word))}"


def code_of(page: Path) -> Iterator[str]:
    """Return the lines of a page's shell examples, and what stands between backquotes."""
    text = page.read_text("utf-8")
    for language, block in FENCE.findall(text):
        if language in ("sh", "console"):
            yield from block.splitlines()
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))


def runs(line: str, program: str) -> Iterator[list[str]]:
    """Return the words after each call of a program in a line of shell."""
    for part in re.split(r"\s*(?:&&|\|\|?|;)\s", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue  # not shell
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] in (program, f".venv/bin/{program}"):
            yield words[1:]


@by_name
def test_commands_in_the_pages_exist(page: Path) -> None:
    """Every `bourse …` is a command, and its options are options of it."""
    for line in code_of(page):
        for words in runs(line, "bourse"):
            check_command(words)


@by_name
def test_targets_in_the_pages_exist(page: Path) -> None:
    """Every `make …` is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for line in code_of(page):
        for words in runs(line, "make"):
            assert {word for word in words if "=" not in word} <= targets, line


@by_name
def test_options_in_the_pages_exist(page: Path) -> None:
    """An option that is named alone is an option of some command."""
    known = COMMON | {name for command in COMMANDS.values() for name in options_of(command)}
    for code in code_of(page):
        if re.match(r"--\w|-\w\b(?!-)", code):
            assert re.split(r"[ =]", code)[0] in known, code


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_variables_exist(source: Path) -> None:
    """Every BOURSE_ variable is one that a command or the code reads."""
    named = set(re.findall(r"\bBOURSE_[A-Z][A-Z_]*[A-Z]\b", source.read_text("utf-8")))
    assert named - known_variables() == set()


def test_commands_of_compose_and_makefile_exist() -> None:
    """What containers and targets start is there, with these options."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    started = [list(map(str, service["command"])) for service in services.values() if "command" in service]
    assert len(started) == 7
    for words in started:
        check_command(words)
    lines = [*services["setup"]["entrypoint"][-1:], *(ROOT / "Makefile").read_text("utf-8").splitlines()]
    found = [words for line in lines for words in runs(line.strip().replace("$(BIN)/", ""), "bourse")]
    assert len(found) == 3
    for words in found:
        check_command([word for word in words if word != "$(ARGS)"])


def test_every_command_is_in_the_manual() -> None:
    """docs/operate.md lists every command that can be called."""
    manual = (ROOT / "docs" / "operate.md").read_text("utf-8")
    callable_ = [path for path, command in COMMANDS.items() if path and not isinstance(command, click.Group)]
    missing = [" ".join(path) for path in callable_ if f"| `bourse {' '.join(path)}` |" not in manual]
    assert missing == []


def test_every_topic_is_in_the_manual() -> None:
    """docs/subscribe.md lists the topics as they are declared."""
    rows = re.findall(
        r"^\| `(\S+)` \| .* \| `(\w+)` \| (\w+) \|", (ROOT / "docs/subscribe.md").read_text("utf-8"), re.MULTILINE
    )
    assert rows == [(topic.full_name(), topic.event.__name__, topic.cleanup) for topic in TOPICS]


def test_partitions_in_the_page_of_subscribers_are_the_declared_ones() -> None:
    """The first table has every topic."""
    page = (ROOT / "docs" / "subscribe.md").read_text("utf-8")
    rows = re.findall(r"^\| `bourse\.([a-z-]+)` \|(?:[^|]*\|){3} (\d+) \|", page, re.MULTILINE)
    assert {name: int(number) for name, number in rows} == {topic.name: topic.partitions for topic in TOPICS}


def slug(heading: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    """Files that are linked exist, and so do the headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@by_name
def test_python_in_the_pages_compiles(page: Path) -> None:
    """Examples are Python, and import what exists."""
    for language, block in FENCE.findall(page.read_text("utf-8")):
        if language == "python":
            compile(block, page.name, "exec")
            imports = "\n".join(line for line in block.splitlines() if line.startswith(("import ", "from ")))
            subprocess.run([sys.executable, "-c", imports], check=True)


def test_the_plug_in_of_the_pages_is_the_example() -> None:
    """CONTRIBUTING shows the example as it is, entry point included."""
    example = ROOT / "examples" / "plugin"
    blocks = dict(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    assert blocks["python"] == (example / "src" / "bourse_example_turnover" / "__init__.py").read_text("utf-8")
    assert blocks["toml"] in (example / "pyproject.toml").read_text("utf-8")


def test_rules_in_the_manual_are_rules(tmp_path: Path) -> None:
    """The manual's rules and its table are read without a mistake, and so are the examples."""
    manual = FENCE.findall((ROOT / "docs" / "alerts.md").read_text("utf-8"))
    (rules,) = (block for language, block in manual if language == "yaml")
    (table,) = (block for language, block in manual if language == "csv")
    (tmp_path / "rules.yaml").write_text(rules, "utf-8")
    (tmp_path / "levels.csv").write_text(table, "utf-8")
    assert {rule.scope for rule in RuleFiles([tmp_path / "rules.yaml"]).rules} == {"instrument", "market", "feed"}
    assert len(RuleFiles([ROOT / "examples" / "rules.yaml"]).rules) == 12


@pytest.mark.kafka
def test_the_subscriber_of_the_readme_runs(
    kafka: Kafka, small_registry: str, prefix: str, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """The README's own program prints what one poll of the producer published."""
    with practice_exchange("real", "poll").serve("127.0.0.1", 0) as exchange:
        environment = os.environ | {
            "BOURSE_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "BOURSE_REGISTRY_URL": small_registry,
            "BOURSE_TOPIC_PREFIX": prefix,
            "BOURSE_ADDRESS": exchange.url,
            "BOURSE_CLIENT_ID": "practice",
            "BOURSE_CLIENT_SECRET": "practice",
            "BOURSE_NID": "0123456789",
        }
        for line in (
            "topics apply --any-time --replication-factor 1",
            "schemas register",
            "produce --once --schedule always --clock response",
        ):
            command = [sys.executable, "-c", "from bourse_cli.root import main; main()", *line.split()]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    (program,) = (
        block for language, block in FENCE.findall((ROOT / "README.md").read_text("utf-8")) if language == "python"
    )
    for said, here in {
        "127.0.0.1:9092": kafka.bootstrap_servers,
        "http://127.0.0.1:8081": small_registry,
        "bourse.trades": f"{prefix}.trades",
        '"mine"': f'"{prefix}"',
    }.items():
        assert said in program
        program = program.replace(said, here)
    shown = tmp_path / "shown"
    with spawn([sys.executable, "-u", "-c", program], stdout=shown, stderr=shown) as child:
        wait_for(lambda: "\n" in shown.read_text("utf-8") or child.poll() is not None, 30)
    assert "'op': 'OPENED'" in shown.read_text("utf-8")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with archives of the day that ships with the sandbox."""
    replay = Replay()
    replay.day(REAL_DAY)
    memory = Memory()
    memory.append(*replay.events)
    folder = tmp_path_factory.mktemp("lake")
    for to in ("data/archive", "data/archive-2"):
        archive_all(DeltaArchive(str(folder / to), commit_rows=5_000), memory)
    polls = Memory()
    for _, poll in groupby(replay.events, key=lambda event: event.poll_sequence):
        polls.append(marker(*poll))
    archive_all(DeltaArchive(str(folder / "data" / "archive"), POLLS), polls)
    return folder


ARCHIVE_EXAMPLES = [block for language, block in FENCE.findall((ROOT / "docs" / "archive.md").read_text("utf-8"))
                    if language == "python"]  # fmt: skip


@pytest.mark.parametrize("code", ARCHIVE_EXAMPLES, ids=lambda code: code.split()[1])
def test_examples_of_reading_the_archive_run(code: str, lake: Path) -> None:
    """As they stand, and print something."""
    run = subprocess.run([sys.executable, "-c", code], cwd=lake, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 5


def test_there_are_examples_of_reading_the_archive() -> None:
    """One for each of the tools it names."""
    tools = [code.split()[1] for code in ARCHIVE_EXAMPLES]
    assert tools == ["deltalake", "polars", "duckdb", "polars", "duckdb", "polars", "duckdb", "polars"]
