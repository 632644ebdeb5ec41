"""`bourse acls` and `bourse topics apply --print`: commands for others, without asking Kafka."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from bourse_cli.acls import SERVICES, Right, rights
from bourse_schemas.topics import TOPICS

Run = Callable[..., tuple[int, str, str]]
NOBODY = ("--bootstrap-servers", "127.0.0.1:9")


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("wide", [(), ("--prefixed",)])
def test_commands_and_json_are_the_same_rights(bourse: Run, service: str, wide: tuple[str, ...]) -> None:
    """Every right is in exactly one command."""
    options = ("acls", "--service", service, "--principal", "User:me", *NOBODY, *wide)
    code, out, err = bourse(*options, "--json")
    assert (code, err) == (0, "")
    expected = {Right(*list(json.loads(line).values())[:4]) for line in out.splitlines()}
    code, out, err = bourse(*options)
    assert (code, err) == (0, "")
    found: list[Right] = []
    for line in out.splitlines():
        words = shlex.split(line)
        head = ["kafka-acls", "--bootstrap-server", "127.0.0.1:9", "--add", "--allow-principal", "User:me"]
        assert words[:6] == head
        operations = [word for before, word in itertools.pairwise(words) if before == "--operation"]
        resource, name, flag, pattern = words[-4:]
        assert flag == "--resource-pattern-type"
        operations = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", each).upper() for each in operations]
        found += [Right(resource.removeprefix("--"), pattern, name, operation) for operation in operations]
    assert sorted(found) == sorted(expected)


def test_a_group_and_topics_of_ones_own() -> None:
    """Everything that follows the group changes with it."""
    assert set(rights("p", "archive", group="g", reads=[TOPICS[2]])) == {
        Right("topic", "literal", "p.polls", "READ"),
        Right("topic", "literal", "p.dead-letters", "WRITE"),
        Right("group", "literal", "g", "READ"),
        Right("transactional-id", "prefixed", "g-", "WRITE"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--service", "produce", "--principal", "User:me", "--topic", "polls"), "--topic is for archive"),
        (("--service", "tail", "--principal", "me"), "--principal me is not like User:NAME"),
        (("--service", "tail", "--principal", "User:me", "--topic", "none"), "no topic 'none'"),
    ],
)
def test_mistakes(bourse: Run, options: tuple[str, ...], message: str) -> None:
    """One line, exit 2."""
    code, out, err = bourse("acls", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_topics_are_printed_for_those_who_may_create_them(bourse: Run) -> None:
    """Two commands per topic with the declared partitions and settings; Kafka is not asked."""
    code, out, err = bourse("topics", "apply", "--print", *NOBODY)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 2 * len(TOPICS)
    assert lines[0] == (
        "kafka-topics --bootstrap-server 127.0.0.1:9 --create --if-not-exists --topic bourse.trades --partitions 6 "
        "--replication-factor 3"
    )
    assert "--entity-name bourse.candles --add-config cleanup.policy=compact,min.insync.replicas=2," in out


@pytest.mark.parametrize("prefix", ["", "with space", "بورس", "a/b", "x" * 201])
@pytest.mark.parametrize("command", [("topics", "apply", "--dry-run"), ("tail", "trades"), ("schemas", "check")])
def test_an_illegal_prefix_is_refused_before_anything_is_asked(
    bourse: Run, prefix: str, command: tuple[str, ...]
) -> None:
    """By every command, at once, although no broker is there."""
    code, out, err = bourse(*command, *NOBODY, "--topic-prefix", prefix)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "use 1 to 200 of a-z" in err


PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")


def test_the_manual_has_the_rights_of_every_service() -> None:
    """Every operation of every service is in its row."""
    rows = {name: line for line in PAGE.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    for service in SERVICES:
        for right in rights("bourse", service):
            assert right.operation in rows[service], right
