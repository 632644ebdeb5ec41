"""What a producer and its consumers need around them, on this machine: Kafka, a registry, topics and schemas."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from confluent_kafka import Producer

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.kafka import Kafka, KafkaUnavailable, MockKafka
from bourse_sandbox.processes import tail
from bourse_sandbox.registry import serve_registry
from bourse_sandbox.serving import Server
from bourse_schemas.compatibility import gate
from bourse_schemas.errors import BourseError, ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS

BOURSE = (sys.executable, "-m", "bourse_cli")

# The practice exchange's only account; it is not secret.
CLIENT_ID, SECRET, NID = "practice", "practice", "0123456789"

# It gives every topic four partitions, and whole polls are read from one partition of the polls topic.
NO_ALERTS = "The mock cluster raises no alerts: they need Apache Kafka."


class Stack:
    """Kafka and a registry with our topics and schemas; a context manager that ends both.

    `broker` is auto, kafka, mock or host:port; `kind` is the result: kafka, mock or external. `data` is a folder that
    keeps Kafka's records and the registry's schemas.
    """

    def __init__(self, broker: str, *, data: Path | None = None, kafka_port: int = 0, registry_port: int = 0) -> None:
        self.kind = ""
        self.note = ""
        self.cluster = Cluster("", "")
        self._broker, self._data, self._kafka_port, self._registry_port = broker, data, kafka_port, registry_port
        self._kafka: Kafka | None = None
        self._registry: Server | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with self._open:
            bootstrap_servers = self._start()
            file = self._data and self._data / "registry.json"
            serving = serve_registry(port=self._registry_port, file=file, compatible=gate)
            self._registry = self._open.enter_context(serving)
            self.cluster = Cluster(bootstrap_servers, self._registry.url)
            self._declare()
            # Everything answers: from here on it is closed when this is.
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def require_running(self) -> None:
        """Raise BourseError if Kafka or the registry has ended."""
        if self._kafka is not None and (code := self._kafka.exit_code) is not None:
            log = tail(self._kafka.log)
            raise BourseError(f"Apache Kafka has ended with exit code {code}; the last lines of its log:\n{log}")
        if self._registry is not None and not self._registry.running:
            raise BourseError("the schema registry has ended")

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment that points our commands at this cluster."""
        return os.environ | self.variables

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables that do so; they hold no secret, the account is that of the practice exchange."""
        return {
            "BOURSE_BOOTSTRAP_SERVERS": self.cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": self.cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": self.cluster.prefix,
            "BOURSE_CLIENT_ID": CLIENT_ID,
            "BOURSE_CLIENT_SECRET": SECRET,
            "BOURSE_NID": NID,
        }

    def _start(self) -> str:
        if self._broker not in {"auto", "kafka", "mock"}:
            if ":" not in self._broker or "://" in self._broker:
                raise ConfigurationError(f"--broker {self._broker}: give auto, kafka, mock or HOST:PORT")
            self.kind = "external"
            return self._broker
        if self._broker != "mock":
            try:
                self._kafka = self._open.enter_context(Kafka(self._data, self._kafka_port))
            except KafkaUnavailable as error:
                if self._broker == "kafka":
                    raise
                self.note = f"Apache Kafka is not available ({error}); using librdkafka's mock cluster. {NO_ALERTS}"
            else:
                self.kind = "kafka"
                return self._kafka.bootstrap_servers
        self.kind, self.note = "mock", self.note or NO_ALERTS
        return self._open.enter_context(MockKafka()).bootstrap_servers

    def _declare(self) -> None:
        names = [topic.full_name(self.cluster.prefix) for topic in TOPICS]
        if self.kind == "mock":
            # It has no CreateTopics: a producer's metadata request creates the topic.
            producer = Producer({"bootstrap.servers": self.cluster.bootstrap_servers})
            for name in names:
                producer.list_topics(name, timeout=10)
        else:
            brokers = len(self.cluster.metadata().brokers)
            apply_topics(self.cluster, plan_topics(self.cluster, {}, min(3, brokers), any_time=True))
        self.cluster.registry().register_all(self.cluster.prefix)


def private_file(path: Path, text: str) -> Path:
    """Write a file that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, "utf-8")
    return path


def program(name: str) -> str:
    """Return how a program of this environment is called from here."""
    found = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(found):
        return name
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)
