"""The command line's frame: plug-ins, configuration, secrets, exit codes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from bourse_cli.options import cluster_options
from bourse_cli.root import bourse as root
from bourse_cli.topics import Plan, apply_topics
from bourse_schemas.errors import BourseError, ConfigurationError, Unreachable
from bourse_schemas.kafka import Cluster, TopicState
from bourse_schemas.topics import TOPICS, TRADES

Run = Callable[..., tuple[int, str, str]]
HEAVY = {
    "confluent_kafka",
    "fastavro",
    "httpx2",
    "pyarrow",
    "prometheus_client",
    "pydantic",
    "rich",
    "starlette",
    "structlog",
    "yaml",
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Cluster, str]]:
    """Add a command that remembers the cluster it was given, `bourse where`."""
    seen: list[tuple[Cluster, str]] = []

    @click.command
    @cluster_options
    def where(cluster: Cluster) -> None:
        seen.append((cluster, click.get_current_context().find_root().obj))

    monkeypatch.setitem(root.commands, "where", where)
    return seen


def _install(site: Path, name: str, commands: dict[str, str]) -> None:
    """Lay a distribution of this name into a folder, as an installer does."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{command} = {target}\n" for command, target in commands.items())
    (info / "entry_points.txt").write_text(f"[bourse.commands]\n{lines}")


# --- start ------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """`bourse --help` and a subcommand's `--help` are light; the former imports no command at all."""
    for arguments in (["--help"], ["tail", "--help"], ["topics", "apply", "--help"]):
        code = (
            "import sys, json; from bourse_cli.root import bourse\n"
            f"bourse.main({arguments}, standalone_mode=False)\nprint('\\n' + json.dumps(sorted(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        imported = set(json.loads(done.stdout.splitlines()[-1]))
        assert not HEAVY & imported
        if arguments == ["--help"]:
            assert not {"importlib.metadata", "msgspec", "tomllib", "zoneinfo"} & imported
            ours = {name for name in imported if name.startswith("bourse_") and "." in name}
            empty = {
                "bourse_consumers.alerts",
                "bourse_consumers.board",
                "bourse_consumers.notify",
            }  # packages, imported to find commands in them
            assert ours - empty == {"bourse_cli.root", "bourse_cli.configuration", "bourse_schemas.errors"}


def test_the_list_of_commands_shows_the_texts_of_the_commands() -> None:
    """They are read from the sources without an import; here the commands are imported and compared."""
    context = click.Context(root, info_name="bourse", max_content_width=100)
    with context:
        lines = root.get_help(context).partition("Commands:\n")[2].splitlines()
        names = root.list_commands(context)
        assert len(lines) == len(names) > 12
        for name, line in zip(names, lines, strict=True):
            command = root.get_command(context, name)
            assert command
            limit = context.make_formatter().width - 6 - max(map(len, names))
            assert line.split(maxsplit=1) == [name, command.get_short_help_str(limit)]


def test_every_command_has_one_line_in_the_help(bourse: Run) -> None:
    """None is broken."""
    code, out, _ = bourse("--help")
    assert code == 0
    assert "(broken)" not in out
    for name in ("tail", "topics", "schemas", "produce", "consume", "watch", "sandbox", "demo"):
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name


def test_the_module_is_the_command() -> None:
    """`python -m bourse_cli`."""
    done = subprocess.run(
        [sys.executable, "-m", "bourse_cli", "schemas", "show", "trades"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["name"] == "TradeEvent"


# --- plug-ins ---------------------------------------------------------------------------------------------------------


def test_a_broken_plug_in_takes_no_other_down(bourse: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is named in the help; called, it says why it cannot be, and that is all."""
    site = tmp_path / "site"
    broken = {"broken": "their_broken:command", "missing": "their_missing:x", "wrong": "json:dumps", "no": "json:no"}
    _install(site, "theirs", broken)
    (site / "their_broken.py").write_text("raise RuntimeError('half\\nbaked')")
    monkeypatch.syspath_prepend(site)
    code, out, _ = bourse("--help")
    assert code == 0
    assert "(broken) theirs (their_broken:command)" in " ".join(out.split())
    assert "Show the decoded records" in out
    for name, target in broken.items():
        code, out, err = bourse(name, "--some", "thing")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"Error: theirs ({target}) cannot be imported: ")
    assert bourse("schemas", "show", "trades")[0] == 0


def test_two_plug_ins_of_one_name_are_an_error_that_names_both(
    bourse: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody has to guess which one ran."""
    _install(tmp_path / "a", "one", {"same": "one:x"})
    _install(tmp_path / "b", "other", {"same": "other:x"})
    monkeypatch.syspath_prepend(tmp_path / "a")
    monkeypatch.syspath_prepend(tmp_path / "b")
    code, out, err = bourse("same")
    assert (code, out) == (2, "")
    assert "'same'" in err
    assert "one (one:x)" in err
    assert "other (other:x)" in err


# --- configuration ----------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_environment_and_that_the_file(
    bourse: Run, shown: list[tuple[Cluster, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And in the file a command's own table beats the top level, which all commands share."""

    def now(*arguments: str) -> tuple[str, str, str, str]:
        assert bourse(*arguments) == (0, "", "")
        cluster, level = shown[-1]
        return cluster.bootstrap_servers, cluster.registry_url, cluster.prefix, level

    assert now("where") == ("127.0.0.1:9092", "http://127.0.0.1:8081", "bourse", "info")
    top = 'bootstrap_servers = "shared:1"\nregistry_url = "http://shared"\ntopic_prefix = "p"\nlog_level = "error"\n'
    (tmp_path / "bourse.toml").write_text(top)
    assert now("where") == ("shared:1", "http://shared", "p", "error")
    for key in "bootstrap-servers", "bootstrap_servers":
        (tmp_path / "bourse.toml").write_text(f'{top}[where]\n{key} = "own:1"\n')
        assert now("where") == ("own:1", "http://shared", "p", "error")
    monkeypatch.setenv("BOURSE_BOOTSTRAP_SERVERS", "environment:1")
    monkeypatch.setenv("BOURSE_LOG_LEVEL", "debug")
    assert now("where") == ("environment:1", "http://shared", "p", "debug")
    assert now("where", "--bootstrap-servers", "flag:1") == ("flag:1", "http://shared", "p", "debug")
    other = tmp_path / "other.toml"
    other.write_text('topic_prefix = "q"')
    assert now("--config", str(other), "--log-level", "info", "where")[1:] == ("http://127.0.0.1:8081", "q", "info")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bootstrap_server = 'x'", "bourse.toml:1: unknown key bootstrap_server; did you mean bootstrap_servers?"),
        (
            "[where]\nbootstrap_server = 'x'",
            "bourse.toml:2: unknown key bootstrap_server of [where]; did you mean bootstrap_servers?",
        ),
        ("[wher]\nx = 1", "unknown key wher; did you mean where?"),
        ("nosuch = 1", "unknown key nosuch"),
        ("nonsense", "bourse.toml is not TOML"),
        ("a = '\\xff'", "bourse.toml is not UTF-8 text"),
        ("log_level = 3", "'--log-level' (from bourse.toml:1): 3 is not one of"),
        ("[where]\nregistry_url = [3]", "registry_url of [where] must be one value"),
        ("[where]\nregistry_url = {a = 1}", "registry_url of [where] must be one value"),
        ("[where]\nkafka_settings = [[3]]", "kafka_settings of [where] must be a list of strings"),
        ("where = 3", "bourse.toml:1: options of `where` belong in the table [where]"),
        ('bootstrap_servers = ["a:1", "b:1"]', "bootstrap_servers must be a string"),
        ("registry_url = 3", "registry_url must be a string"),
        ("kafka_settings = 'a=b'", "kafka_settings must be a list of strings"),
        ("[kafka_settings]\na = 1", "kafka_settings must be a list of strings"),
        ("kafka_settings = [3]", "'3' is not followed by =VALUE"),
        ('kafka_settings = ["sasl.password=hidden"]', "sasl.password is a secret"),
    ],
)
def test_a_wrong_configuration_file_is_reported_in_a_line(
    bourse: Run, shown: list[tuple[Cluster, str]], tmp_path: Path, text: str, says: str
) -> None:
    """Exit 2, no traceback, nothing run."""
    (tmp_path / "bourse.toml").write_bytes(text.encode().replace(b"\\xff", b"\xff"))
    code, out, err = bourse("where")
    assert (code, out, shown) == (2, "", [])
    assert says in err
    assert "hidden" not in err


ORIGINS = """
registry_url = "http://me:hidden@h"
[where]
kafka_settings = ["nonsense"]
topic-prefix = "p"
"""


def test_a_bad_value_names_its_origin(
    bourse: Run, shown: list[tuple[Cluster, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable, or the file that was really read and the line; nothing for a flag, which the reader has typed."""
    (tmp_path / "mine.toml").write_text(ORIGINS)

    def error(*arguments: str) -> str:
        code, out, err = bourse(*arguments)
        assert (code, out, shown) == (2, "", [])
        return err

    with monkeypatch.context() as only:
        only.setenv("BOURSE_REGISTRY_URL", "http://me:hidden@h")
        assert error("where").endswith("@FILE (--registry-url is set by BOURSE_REGISTRY_URL)\n")
    file = ("--config", "mine.toml", "where")
    assert "'-X' (from mine.toml:4): 'nonsense' is not" in error(*file)
    assert error(*file, "-X", "a=b").endswith("@FILE (--registry-url is set by mine.toml:2)\n")
    monkeypatch.setenv("BOURSE_KAFKA_SETTINGS", "nonsense")
    assert "'-X' (from BOURSE_KAFKA_SETTINGS): 'nonsense' is not" in error("where")
    monkeypatch.setenv("BOURSE_WHERE_REGISTRY_URL", "http://me:hidden@h")
    assert error("where", "-X", "a=b").endswith("@FILE (--registry-url is set by BOURSE_WHERE_REGISTRY_URL)\n")
    assert "'-X': 'nonsense' is not" in error("where", "-X", "nonsense")
    assert error("where", "-X", "a=b", "--registry-url", "http://me@h").endswith("@FILE\n")
    monkeypatch.setenv("BOURSE_LOG_LEVEL", "loud")
    assert "'--log-level' (from BOURSE_LOG_LEVEL): 'loud' is not one of" in error("where")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("BOURSE_LOG_LEVL", "Error: unknown variable BOURSE_LOG_LEVL; did you mean BOURSE_LOG_LEVEL?\n"),
        ("BOURSE_TOPIC_PERFIX", "Error: unknown variable BOURSE_TOPIC_PERFIX; did you mean BOURSE_TOPIC_PREFIX?\n"),
        ("BOURSE_TAIL_LIMITS", "Error: unknown variable BOURSE_TAIL_LIMITS; did you mean BOURSE_TAIL_LIMIT?\n"),
        ("BOURSE_NONSENSE", "Warning: unknown variable BOURSE_NONSENSE\n"),
        ("BOURSE_TOPIC_PREFIX", ""),
        # Variables of other commands, right or wrong
        ("BOURSE_PRODUCE_POLL_SECONDS", ""),
        ("BOURSE_PRODUCE_NONSENSE", ""),
        ("BOURSE_CLIENT_ID", ""),
        ("BOURSE_CLIENT_SECRET", ""),
        ("BOURSE_CLIENT_SECRT", ""),
        ("BOURSE_DSN", ""),
        # What Kubernetes sets for a service called bourse-board
        ("BOURSE_BOARD_SERVICE_HOST", ""),
        ("BOURSE_BOARD_SERVICE_PORT", ""),
        ("BOURSE_BOARD_SERVICE_PORT_HTTP", ""),
        ("BOURSE_BOARD_PORT", ""),
        ("BOURSE_BOARD_PORT_8080_TCP", ""),
        ("BOURSE_BOARD_PORT_8080_TCP_ADDR", ""),
    ],
)
def test_an_unknown_variable(bourse: Run, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    """An error if it is nearly one that the command reads, else a warning; its value is never shown."""
    monkeypatch.setenv(name, "hush")
    code, _, err = bourse("tail", "nonsense")
    rest = "Error: no topic 'nonsense'"
    assert code == 2
    assert err.startswith(says if says.startswith("Error") else says + rest)
    assert "hush" not in err
    assert bourse("tail", "--help")[0] == 0


def test_the_file_may_begin_with_a_byte_order_mark(
    bourse: Run, shown: list[tuple[Cluster, str]], tmp_path: Path
) -> None:
    """As Windows' editors write it, and so may the files of secrets."""
    (tmp_path / "bourse.toml").write_bytes(b"\xef\xbb\xbf" + b'topic_prefix = "p"\r\n')
    (tmp_path / "secret").write_bytes(b"\xef\xbb\xbfhush\r\n")
    assert bourse("where", "-X", "sasl.password=@secret") == (0, "", "")
    assert (shown[-1][0].prefix, shown[-1][0].settings) == ("p", {"sasl.password": "hush"})


OLD = Path(__file__).parent.parent / "golden" / "bourse-0.1.toml"
# What it sets and this release does not have.
REMOVED = [
    "alerts.schema",
    "alerts.test.archive",
    "alerts.test.as_json",
    "alerts.test.cases",
    "alerts.test.events",
    "alerts.test.partitions",
    "archive.bars.day",
    "archive.bars.every",
    "archive.bars.form",
    "archive.bars.instruments",
    "archive.bars.output",
    "archive.bars.to",
    "archive.compact.as_json",
    "archive.compact.before",
    "archive.compact.day",
    "archive.compact.to",
    "archive.export.form",
    "archive.export.output",
    "archive.verify.beside",
    "archive.verify.day",
    "archive.verify.polls",
    "archive.verify.table",
    "consume.archive.max_age_seconds",
    "consume.archive.max_bytes",
    "consume.archive.max_rows",
    "dead-letters.redrive.consumer",
    "dead-letters.redrive.day",
    "dead-letters.redrive.everything",
    "dead-letters.redrive.reason",
    "dead-letters.redrive.stage",
    "dead-letters.redrive.target",
    "dead-letters.redrive.yes",
    "demo.kill_every",
    "demo.seed",
    "doctor.backfill_calls",
    "doctor.call",
    "doctor.capture_required",
    "doctor.token_file",
    "produce.backfill_calls",
    "produce.capture_required",
    "produce.token_file",
    "sandbox.exchange.client_id",
    "sandbox.exchange.client_secret_file",
    "sandbox.exchange.minutes",
    "sandbox.exchange.nid",
    "sandbox.exchange.seed",
    "sandbox.exchange.start",
    "sandbox.exchange.status_key",
    "sandbox.exchange.token_seconds",
    "sandbox.up.seed",
    "schemas.asyncapi",
    "schemas.contract",
    "schemas.diff",
    "schemas.export.to",
]


def _options(table: dict[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Return every option of a file: its table, its key, its value; an empty table is one too."""
    if not table:
        yield path[:-1], path[-1], {}
    for key, value in table.items():
        if isinstance(value, dict) and path != ("topic", "trades"):
            yield from _options(value, *path, key)
        else:
            yield path, key, value


def test_the_options_file_of_the_previous_release(bourse: Run, tmp_path: Path) -> None:
    """Each option is still one, or an error names it; with the former ones the new release starts."""
    still: dict[str, Any] = {}
    gone = set()
    for path, key, value in _options(tomllib.loads(OLD.read_text())):
        inner: dict[str, Any] = {key: value}
        for name in reversed(path):
            inner = {name: inner}
        (tmp_path / "bourse.toml").write_text(_toml(inner))
        command = [*path, key] if value == {} else path
        code, _, err = bourse(*(command if path and path[0] != "topic" else ["calendar"]), "--help")
        if code == 0:
            table = still
            for name in path:
                table = table.setdefault(name, {})
            table[key] = value
        else:
            unknown = rf"Error: bourse.toml(:\d+)?: unknown key {key} of \[{'.'.join(path)}\]"
            assert re.search(rf"^{unknown}|^Error: No such command '({path[-1]}|{key})'", err, re.MULTILINE), err
            gone.add(".".join([*path, key]))
    assert sorted(gone) == REMOVED
    still["calendar"] = {"as_json": True}
    (tmp_path / "bourse.toml").write_text(_toml(still))
    assert bourse("calendar")[0] == 0


def _toml(table: dict[str, Any], *path: str) -> str:
    """Return the file of these tables."""
    own = "".join(f'"{key}" = {json.dumps(value)}\n' for key, value in table.items() if not isinstance(value, dict))
    below = "".join(_toml(value, *path, key) for key, value in table.items() if isinstance(value, dict))
    return (f"[{'.'.join(path)}]\n" if path else "") + own + below


@pytest.mark.parametrize("path", [".", "nowhere.toml"])
def test_a_configuration_file_that_cannot_be_read(bourse: Run, shown: list[tuple[Cluster, str]], path: str) -> None:
    """The one named must be there."""
    code, out, err = bourse("--config", path, "where")
    assert (code, out, shown) == (2, "", [])
    assert path in err


def test_a_subcommands_part_of_the_file_must_be_a_table(bourse: Run, tmp_path: Path) -> None:
    """However deep it is."""
    (tmp_path / "bourse.toml").write_text("[topics]\napply = 3")
    code, _, err = bourse("topics", "list")
    assert (code, err.count("\n")) == (2, 1)
    assert "[topics.apply]" in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("topic = 3", "a table per topic, such as [topic.trades]"),
        ("[topic]\ntrades = 12", "a table per topic, such as [topic.trades]"),
        (
            "[topic.trade]\npartitions = 12",
            "[topic.trade] is unknown; topics are trades, candles, polls, alerts",
        ),
        (
            "[topic.trades]\npartition = 12",
            "[topic.trades]: Object contains unknown field `partition`; keys are partitions",
        ),
        ("[topic.trades]\n'retention.ms' = 5", "settings belong in config, such as config = {"),
        ("[topic.trades]\npartitions = '12'", "[topic.trades]: Expected `int | null`, got `str` - at `$.partitions`"),
        ("[topic.polls]\npartitions = 2", "partitions of [topic.polls] must be 1: the order of polls"),
        ("[topic.alerts]\npartitions = 3", "partitions of [topic.alerts] must be 1: the order of alerts"),
        ("[topic.trades]\npartitions = 0", "[topic.trades]: Expected `int` >= 1 - at `$.partitions`"),
        ("[topic.trades]\npartitions = 6.5", "[topic.trades]: Expected `int | null`, got `float` - at `$.partitions`"),
        ("[topic.trades]\npartitions = true", "[topic.trades]: Expected `int | null`, got `bool` - at `$.partitions`"),
        (
            "[topic.polls]\nreplication_factor = -1",
            "[topic.polls]: Expected `int` >= 1 - at `$.replication_factor`",
        ),
        ("[topic.polls]\nconfig = 'x'", "[topic.polls]: Expected `object`, got `str` - at `$.config`"),
    ],
)
def test_a_wrong_override_is_refused_before_the_cluster_is_asked(
    bourse: Run, tmp_path: Path, text: str, says: str
) -> None:
    """The key is named, and what it must be."""
    (tmp_path / "bourse.toml").write_text(text)
    code, out, err = bourse("topics", "apply", "--bootstrap-servers", "127.0.0.1:1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


class Behind(Cluster):
    """A cluster whose brokers report the new partitions of a topic only when asked for the third time."""

    known = iter([1, 1, TRADES.partitions])

    def topics(self, names: Iterable[str], *, every_broker: bool = False) -> dict[str, TopicState]:
        """Return the topics with as many partitions as the next broker knows."""
        return {name: TopicState(next(self.known, 1), 1, None) for name in names}

    def topic_settings(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return no settings."""
        return {name: {} for name in names}


def test_apply_waits_until_every_broker_has_the_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller has them first; brokers that lag for too long are an error that advises."""
    cluster = Behind("127.0.0.1:1", "")
    plans = [Plan(TRADES, "bourse.trades", 1, {}, any_time=True, has=TRADES.partitions)]
    apply_topics(cluster, plans)
    assert next(Behind.known, None) is None
    monkeypatch.setattr("bourse_cli.topics.TIMEOUT_SECONDS", 0.1)
    with pytest.raises(Unreachable, match=r"^not every broker has bourse.trades within 0 s: run it again$"):
        apply_topics(cluster, plans)


# --- settings and secrets ---------------------------------------------------------------------------------------------


def test_the_settings_in_the_manual_are_settings(bourse: Run, tmp_path: Path, shown: list[tuple[Cluster, str]]) -> None:
    """The page's bourse.toml is one, and the clients take what it says."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for file in ("kafka-password", "registry-user"):
        (tmp_path / file).write_text("me:hush\n", "utf-8")
    (tmp_path / "bourse.toml").write_text(block.replace("/run/secrets", str(tmp_path)), "utf-8")
    assert bourse("where")[0] == 0
    ((cluster, _),) = shown
    assert cluster.user == "User:bourse-producer"
    assert cluster.settings["sasl.password"] == "me:hush"


def test_settings_pass_through_and_secrets_come_from_files(
    bourse: Run, shown: list[tuple[Cluster, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cluster's repr shows none of them."""
    (tmp_path / "secret").write_text("hush-hush\n")
    own = ["-X", "sasl.password=@secret", "-X", "socket.keepalive.enable=true"]
    assert bourse("where", *own, "-X", "schema.registry.bearer.auth.token=@secret") == (0, "", "")
    cluster, _ = shown[-1]
    assert dict(cluster.settings) == {
        "sasl.password": "hush-hush",
        "socket.keepalive.enable": "true",
        "schema.registry.bearer.auth.token": "hush-hush",
    }
    assert "hush-hush" not in repr(cluster)
    assert cluster.client({"acks": "all"}) == {
        "client.id": "bourse-stream",
        "sasl.password": "hush-hush",
        "socket.keepalive.enable": "true",
        "acks": "all",
        "bootstrap.servers": "127.0.0.1:9092",
    }
    monkeypatch.setenv("BOURSE_KAFKA_SETTINGS", "a=1 b=2")
    assert bourse("where") == (0, "", "")
    assert shown[-1][0].settings == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    "key",
    [
        "sasl.password",
        "ssl.key.password",
        "ssl.key.pem",
        "ssl.keystore.password",
        "sasl.oauthbearer.client.secret",
        "schema.registry.basic.auth.user.info",
        "schema.registry.bearer.auth.token",
        "schema.registry.bearer.auth.client.secret",
        "schema.registry.ssl.key.password",
    ],
)
def test_a_secret_on_the_command_line_is_refused(bourse: Run, shown: list[tuple[Cluster, str]], key: str) -> None:
    """Other users of the machine could read it; the error does not repeat it."""
    code, _, err = bourse("where", "-X", f"{key}=hush-hush")
    assert (code, shown) == (2, [])
    assert f"-X {key}=@FILE" in err
    assert "hush-hush" not in err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("nonsense", "'nonsense' is not followed by =VALUE"),
        ("=x", "'' is not followed by =VALUE"),
        ("sasl.password:hunter2", "'sasl.password' is not followed by =VALUE"),
        ("sasl.password=@nowhere", "cannot read nowhere: No such file"),
        ("sasl.password=@binary", "binary is not UTF-8 text"),
    ],
)
def test_an_unknown_setting(
    bourse: Run, shown: list[tuple[Cluster, str]], tmp_path: Path, setting: str, says: str
) -> None:
    """The error has the option's name."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    code, _, err = bourse("where", "-X", setting)
    assert (code, shown) == (2, [])
    assert says in err
    assert "-X" in err


def test_credentials_in_the_registrys_address_are_refused(bourse: Run, shown: list[tuple[Cluster, str]]) -> None:
    """It would be in logs and errors."""
    code, _, err = bourse("where", "--registry-url", "http://me:hush-hush@127.0.0.1:1")
    assert (code, shown, err.count("\n")) == (2, [], 1)
    assert "hush-hush" not in err


@pytest.mark.parametrize("servers", ["http://me:hush-hush@127.0.0.1:1", "127.0.0.1:1,SASL_SSL://127.0.0.1:2"])
def test_a_brokers_address_has_no_scheme(bourse: Run, shown: list[tuple[Cluster, str]], servers: str) -> None:
    """At once, and with what to change."""
    code, _, err = bourse("where", "--bootstrap-servers", servers)
    assert (code, shown) == (2, [])
    assert re.fullmatch("Error: --bootstrap-servers: leave (http|SASL_SSL):// out, give HOST:PORT\n", err)


@pytest.mark.parametrize(
    ("setting", "value"), [("isolation.level", "read_uncommitted"), ("bootstrap.servers", "x:1"), ("group.id", "g")]
)
def test_what_correctness_needs_cannot_be_set(setting: str, value: str) -> None:
    """The error names the setting and what it is fixed to; saying the same is no error."""
    with pytest.raises(ConfigurationError, match=f"-X {setting}={value}: this setting is fixed to"):
        Cluster("127.0.0.1:1", "", settings={setting: value}).consumer("theirs")
    Cluster("127.0.0.1:1", "", settings={"enable.auto.commit": "False"}).consumer("theirs").close()
    for pinned in ("enable.idempotence=false", "acks=1", "partitioner=random", "transactional.id=x"):
        key, _, other = pinned.partition("=")
        with pytest.raises(ConfigurationError, match=f"-X {key}=" if key in pinned else ""):
            Cluster("127.0.0.1:1", "", settings={key: other}).transactional_producer("ours")


@pytest.mark.parametrize(
    "setting", ["nope=1", "security.protocol=nope", "error_cb=1", "default.topic.config=1", "on_commit=1"]
)
def test_a_setting_that_the_client_refuses(setting: str) -> None:
    """Whatever the client raises."""
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigurationError, match=r"Kafka settings are refused: .*see -X"):
        Cluster("127.0.0.1:1", "", settings={key: value}).consumer()


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (ConfigurationError("fix it"), 2, "Error: fix it\n"),
        (BourseError("failed"), 1, "Error: failed\n"),
        (click.ClickException("clicked"), 1, "Error: clicked\n"),
        (KeyboardInterrupt(), 3, "\n"),
        (click.exceptions.Exit(7), 7, ""),
    ],
)
def test_exit_codes(bourse: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, says: str) -> None:
    """0 done, 1 failed, 2 for the operator to fix, 3 stopped before it was done."""

    @click.command
    def fail() -> None:
        raise raised

    monkeypatch.setitem(root.commands, "fail", fail)
    assert bourse("fail") == (code, "", says)


@pytest.mark.parametrize("command", ["tail trades", "tail trades --exit-at-end", "watch", "topics list"])
def test_ctrl_c_is_not_held_up_by_a_broker_that_does_not_answer(command: str) -> None:
    """A command that was stopped before it had begun ends with 3, and at once."""
    with socket.create_server(("127.0.0.1", 0)) as broker:
        at = ["--bootstrap-servers", f"127.0.0.1:{broker.getsockname()[1]}"]
        program = [sys.executable, "-m", "bourse_cli", *command.split(), *at]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            broker.settimeout(60)
            with broker.accept()[0]:
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=4)[0] == "\n"
            assert process.returncode == 3


@pytest.mark.parametrize("arguments", [["nonsense"], ["tail"], ["tail", "trades", "--limit", "0"], ["tail", "-z"]])
def test_wrong_usage_is_exit_2(bourse: Run, arguments: list[str]) -> None:
    """Printed with the usage."""
    code, out, err = bourse(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


@pytest.mark.parametrize("command", [["tail", "nonsense"], ["tail", "other.trades"], ["schemas", "show", "nonsense"]])
def test_an_unknown_topic_names_those_there_are(bourse: Run, command: list[str]) -> None:
    """Another prefix's topic is not shown as ours; no cluster is asked."""
    code, out, err = bourse(*command)
    assert (code, out) == (2, "")
    assert err == f"Error: no topic '{command[-1]}': there are {', '.join(topic.name for topic in TOPICS)}\n"


@pytest.mark.parametrize("name", ["trades", "bourse.trades", "tehran.trades"])
def test_show_prints_the_schema_as_it_ships(bourse: Run, name: str) -> None:
    """With any prefix."""
    code, out, _ = bourse("schemas", "show", name)
    assert (code, json.loads(out)["name"]) == (0, "TradeEvent")


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    """`bourse … | head`: exit 0 and nothing on stderr."""
    command = [sys.executable, "-m", "bourse_cli", "schemas", "show", "trades"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 0)


@pytest.mark.parametrize(
    ("command", "known"), [("calender", "; did you mean calendar?"), ("topic", "; did you mean topics?"), ("xyz", "")]
)
def test_an_unknown_command_names_a_near_one(bourse: Run, command: str, known: str) -> None:
    """Lazy commands count."""
    code, out, err = bourse(command, "--help")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"Error: No such command '{command}'{known}"
