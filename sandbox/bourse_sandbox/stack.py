"""What a producer and its consumers need around them, on this machine: Kafka, a registry, topics and schemas."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from confluent_kafka import Producer

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.kafka import Kafka, KafkaUnavailable, MockKafka
from bourse_sandbox.registry import serve_registry
from bourse_schemas.compatibility import compatible
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS

__all__ = ["CLIENT_ID", "NID", "SECRET", "Stack", "private_file"]

# The practice exchange's only account; nothing about it is secret.
CLIENT_ID, SECRET, NID = "practice", "practice", "0123456789"


class Stack:
    """Kafka and a registry with our topics and schemas; a context manager that ends both.

    `broker` is auto, kafka, mock or host:port; `kind` says which it came to be: kafka, mock or external.
    """

    def __init__(
        self, broker: str, *, kafka_data: Path | None = None, kafka_port: int = 0, registry_port: int = 0
    ) -> None:
        self.kind = ""
        self.note = ""
        self.cluster = Cluster("", "")
        self._broker = broker
        self._kafka_data, self._kafka_port = kafka_data, kafka_port
        self._registry_port = registry_port
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with self._open:
            bootstrap_servers = self._start()
            registry = self._open.enter_context(serve_registry(port=self._registry_port, compatible=compatible))
            self.cluster = Cluster(bootstrap_servers, registry.url)
            self._declare()
            # Everything answers: from here on it is closed when we are.
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment that points our commands at this cluster."""
        return {
            **os.environ,
            "BOURSE_BOOTSTRAP_SERVERS": self.cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": self.cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": self.cluster.prefix,
            "BOURSE_CLIENT_ID": CLIENT_ID,
            "BOURSE_CLIENT_SECRET": SECRET,
            "BOURSE_NID": NID,
        }

    def _start(self) -> str:
        if self._broker not in {"auto", "kafka", "mock"}:
            if ":" not in self._broker:
                raise ConfigurationError(f"--broker {self._broker}: give auto, kafka, mock or HOST:PORT")
            self.kind = "external"
            return self._broker
        if self._broker != "mock":
            try:
                kafka = self._open.enter_context(Kafka(self._kafka_data, self._kafka_port))
            except KafkaUnavailable as error:
                if self._broker == "kafka":
                    raise
                self.note = f"Apache Kafka cannot be had ({error}); going on with librdkafka's mock cluster instead."
            else:
                self.kind = "kafka"
                return kafka.bootstrap_servers
        self.kind = "mock"
        return self._open.enter_context(MockKafka()).bootstrap_servers

    def _declare(self) -> None:
        names = [topic.full_name(self.cluster.prefix) for topic in TOPICS]
        if self.kind == "mock":
            # It has no CreateTopics: a producer that asks for a topic makes it.
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
