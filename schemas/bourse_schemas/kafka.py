"""How to reach the cluster, and the client settings that correctness needs."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.topics import DEFAULT_PREFIX

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Producer
    from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]  # not in its __all__

    from bourse_schemas.registry import Registry

__all__ = ["Cluster", "abandon", "kafka_logger"]

# Where a transaction cannot be aborted its successor does it: nothing an operator need read.
warnings.filterwarnings("ignore", "Producer abort_transaction failed during close", RuntimeWarning)

C = TypeVar("C")

STATISTICS_MS = 15_000
ABANDON_SECONDS = 2.0
REGISTRY_KEYS = "schema.registry."


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Kafka cluster and its schema registry, as the operator named them.

    `settings` are librdkafka's (`-X key=value`); they may hold secrets and are therefore never shown. `on_statistics`
    is called with librdkafka's statistics, on the thread that polls a client. `registry_proxy` is the proxy for the
    registry, None for a direct connection; bourse_cli.proxies decides.
    """

    bootstrap_servers: str
    registry_url: str
    prefix: str = DEFAULT_PREFIX
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    registry_proxy: str | None = field(default=None, repr=False)
    on_statistics: Callable[[str], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if "@" in self.registry_url:
            raise ConfigurationError(
                "--registry-url holds credentials: put USER:PASSWORD into a file and say "
                "-X schema.registry.basic.auth.user.info=@FILE"
            )

    def client(self, pinned: Mapping[str, Any]) -> dict[str, Any]:
        """Return a client's settings: ours, then the operator's, then those that correctness needs."""
        pinned = {**pinned, "bootstrap.servers": self.bootstrap_servers}
        for key, value in self.settings.items():
            if key in pinned and str(pinned[key]).lower() != value.lower():
                raise ConfigurationError(f"-X {key}={value}: this setting is fixed to {pinned[key]}; leave it out")
        operator = {key: value for key, value in self.settings.items() if not key.startswith(REGISTRY_KEYS)}
        return {"client.id": "bourse-stream", **operator, **pinned}

    def transactional_producer(
        self, transactional_id: str, timeout_ms: int = 20_000, **callbacks: Callable[..., Any]
    ) -> Producer:
        """Return a transactional producer, not yet initialised; `callbacks` such as error_cb."""
        from confluent_kafka import Producer

        # A commit sends at once what lingers; without it the sending of tiny batches slows our own thread down.
        tuned = {"linger.ms": 20, "compression.type": "lz4"}
        pinned = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": timeout_ms,
            "message.timeout.ms": timeout_ms,
            "enable.idempotence": True,
            "acks": "all",
            # From the first day, so that Java, Flink and ksqlDB can co-partition.
            "partitioner": "murmur2_random",
        }
        settings = {**tuned, **self._told(), **self.client(pinned), **callbacks}
        return self._make(Producer, settings, logger=kafka_logger())

    def consumer(self, group: str | None = None, **pinned: Any) -> Consumer:
        """Return a read_committed consumer that never commits by itself.

        `pinned` are more settings (`a_b` is a.b) and callbacks such as error_cb and on_commit.
        """
        from confluent_kafka import Consumer

        tuned = {
            "fetch.wait.max.ms": 10,
            "fetch.queue.backoff.ms": 5,
            # What lies ready is 60 MB by default, and no reader is faster for more than this.
            "queued.min.messages": 2000,
            "queued.max.messages.kbytes": 2048,
            "fetch.message.max.bytes": 1 << 18,
        }
        fixed = {
            "group.id": group or "bourse-unused",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            **{key if callable(value) else key.replace("_", "."): value for key, value in pinned.items()},
        }
        return self._make(Consumer, {**tuned, **self._told(), **self.client(fixed)}, logger=kafka_logger())

    def admin(self) -> AdminClient:
        """Return an administration client."""
        from confluent_kafka.admin import AdminClient

        return self._make(AdminClient, self.client({}), logger=kafka_logger())

    def registry(self) -> Registry:
        """Return the schema registry's client."""
        from bourse_schemas.registry import Registry

        prefix = len(REGISTRY_KEYS)
        own = {key[prefix:]: value for key, value in self.settings.items() if key.startswith(REGISTRY_KEYS)}
        if self.registry_proxy is not None:
            own.setdefault("proxy", self.registry_proxy)
        return Registry(self.registry_url, own)

    def metadata(self, timeout: float = 8.0) -> ClusterMetadata:
        """Return the cluster's brokers and topics.

        Raises Unreachable when no broker answers within `timeout` seconds, ConfigurationError when it refuses us.
        """
        from confluent_kafka import KafkaError, KafkaException
        from confluent_kafka.admin import AdminClient

        said: list[KafkaError] = []
        admin = self._make(AdminClient, {**self.client({}), "error_cb": said.append}, logger=kafka_logger())
        try:
            return admin.list_topics(timeout=timeout)
        except KafkaException as error:
            # Why it did not come to a connection is said beside the time-out.
            admin.poll(0)
            for refusal in said:
                if refusal.code() in {KafkaError._AUTHENTICATION, KafkaError._SSL}:  # noqa: SLF001  # its public names
                    raise ConfigurationError(
                        f"Kafka at {self.bootstrap_servers} refuses us: {refusal.str()}; see -X sasl… and -X ssl…"
                    ) from error
            raise Unreachable(
                f"Kafka at {self.bootstrap_servers} does not answer ({error.args[0].str()}): "
                "is it running, and is --bootstrap-servers right?"
            ) from error

    def require_topics(self, names: Sequence[str]) -> dict[str, int]:
        """Return the number of partitions of each topic; raise ConfigurationError when one is missing."""
        found = self.metadata().topics
        missing = [name for name in names if name not in found or found[name].error is not None]
        if missing:
            raise ConfigurationError(
                f"no topic {', '.join(missing)} on {self.bootstrap_servers}: create what is declared with "
                f"`bourse topics apply --bootstrap-servers {self.bootstrap_servers}`"
            )
        return {name: len(found[name].partitions) for name in names}

    def _told(self) -> dict[str, Any]:
        if self.on_statistics is None:
            return {}
        return {"statistics.interval.ms": STATISTICS_MS, "stats_cb": self.on_statistics}

    @staticmethod
    def _make(client: Callable[..., C], settings: dict[str, Any], **extra: Any) -> C:
        from confluent_kafka import KafkaException

        try:
            return client(settings, **extra)
        except KafkaException as error:
            raise ConfigurationError(f"Kafka settings are refused: {error.args[0].str()}; see -X") from error
        except (TypeError, ValueError, AttributeError) as error:  # names that mean a Python object to the client
            raise ConfigurationError(f"Kafka settings are refused: {error}; see -X") from error


def abandon(client: Producer | Consumer) -> None:
    """Close a client, whatever state it is in, within two seconds; an open transaction is aborted.

    Without a broker an abort would wait for ever: it is then left to the next producer of the same transactional id,
    which settles it.
    """
    from confluent_kafka import KafkaException

    def close() -> None:
        # A fenced producer cannot abort any more, and need not: its successor did. It warns of it, too, and where
        # warnings are errors the client makes a SystemError of that.
        with suppress(KafkaException, RuntimeWarning, SystemError):
            client.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(ABANDON_SECONDS)


class _Once(logging.Filter):
    """Lets a line pass once in a while: of a broker that is away each thread of each client speaks all the time."""

    SECONDS = 30.0

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[Hashable, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # "FAIL [client] [thread]: broker: what happened (after 3ms in state CONNECT)": the same but for its last part.
        text, now = record.getMessage().partition(" (after")[0], time.monotonic()
        if now - self._passed.get(text, -self.SECONDS) < self.SECONDS:
            return False
        if len(self._passed) > 1_000:
            self._passed.clear()
        self._passed[text] = now
        return True


def kafka_logger() -> logging.Logger:
    """Return the logger of librdkafka's own lines; it is silent where no logs are configured."""
    logger = logging.getLogger("librdkafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
        logger.addFilter(_Once())
    return logger
