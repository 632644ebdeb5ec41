"""Three brokers on this machine, one of which at a time may be killed and started again."""

from __future__ import annotations

import base64
import os
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from bourse_sandbox.jars import fetch, read_lock
from bourse_sandbox.kafka import _JVM, _PROPERTIES, VERSION, free_port, java
from bourse_sandbox.processes import Child, spawn, tail

__all__ = ["Brokers"]

START_SECONDS = 90.0


class Brokers:
    """A cluster of three, each broker and controller in one; a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bourse-brokers-")
        self._ports = [(free_port(), free_port()) for _ in range(3)]
        self._children: list[Child | None] = [None] * 3
        jars = fetch(
            read_lock(Path(__file__).parents[1] / "sandbox/bourse_sandbox/jars.lock"), f"Apache Kafka {VERSION}"
        )
        self._environment = os.environ | {"CLASSPATH": os.pathsep.join(map(str, jars)), "LC_ALL": "C.UTF-8"}
        self.bootstrap_servers = ",".join(f"127.0.0.1:{broker}" for broker, _ in self._ports)

    def __enter__(self) -> Self:
        identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
        voters = ",".join(f"{node}@127.0.0.1:{port}" for node, (_, port) in enumerate(self._ports, 1))
        factors = [f"{topic}.replication.factor=3" for topic in ("offsets.topic", "transaction.state.log")]
        for node, (broker, controller) in enumerate(self._ports, 1):
            folder = self._data(node - 1)
            folder.mkdir()
            # Of two lines with the same key the later one counts.
            ours = [f"node.id={node}", f"controller.quorum.voters={voters}", *factors]
            settings = _PROPERTIES.format(broker=broker, controller=controller)
            text = settings + "\n".join([*ours, "transaction.state.log.min.isr=2", "min.insync.replicas=2", ""])
            (folder / "server.properties").write_text(text)
        formats = [self._launch(node, "kafka.tools.StorageTool", "format", "-t", identity, "-c") for node in range(3)]
        if any(child.wait(60) for child in formats):
            raise RuntimeError(f"cannot format: {tail(self._data(0) / 'log.txt')}")
        for node in range(3):
            self.start(node)
        self._await(3)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child is not None:
                child.kill()
        self._folder.cleanup()

    def start(self, node: int) -> None:
        """Start a broker; it joins by itself."""
        self._children[node] = self._launch(node, "kafka.Kafka")

    def kill(self, node: int) -> None:
        """Kill a broker as kill -9 does."""
        child, self._children[node] = self._children[node], None
        if child is not None:
            child.kill()

    def await_all(self) -> None:
        """Wait until all three are there and every replica is in step: only then may the next one die."""
        self._await(3)

    def _data(self, node: int) -> Path:
        return Path(self._folder.name) / f"node-{node}"

    def _launch(self, node: int, *arguments: str) -> Child:
        folder = self._data(node)
        log = folder / "log.txt"
        command: list[str | Path] = [java(), *_JVM, *arguments, "server.properties"]
        return spawn(command, env=self._environment, cwd=folder, stdout=log, stderr=log)

    def _await(self, count: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        while time.monotonic() < deadline:
            with suppress(KafkaException):
                found = admin.list_topics(timeout=2)
                partitions = [each for topic in found.topics.values() for each in topic.partitions.values()]
                if len(found.brokers) == count and all(len(each.isrs) == len(each.replicas) for each in partitions):
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the brokers are not all there: {tail(self._data(0) / 'log.txt')}")
