"""How to reach the cluster, the client settings that correctness needs, and what a refusal of the brokers means."""

from __future__ import annotations

import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.topics import DEFAULT_PREFIX
from bourse_schemas.watchdog import deadline

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Producer
    from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]  # not in its __all__

    from bourse_schemas.registry import Registry

# If a transaction cannot be aborted, its successor aborts it: an operator need not read of it.
warnings.filterwarnings("ignore", "Producer abort_transaction failed during close", RuntimeWarning)

C = TypeVar("C")
R = TypeVar("R")

STATISTICS_MS = 15_000
ABANDON_SECONDS = 2.0
# Metadata and brokers together take at most 11 s, however the cluster fails.
METADATA_SECONDS, BROKER_SECONDS, STEP_SECONDS = 6.0, 5.0, 0.5
# More than any request's own time-out: an answer that takes so long never comes.
ANSWER_SECONDS = 10.0
# librdkafka forgets its brokers when one that is starting or stopping reports an empty list of them, and may never find
# them again (its issue 5301). A client that has reached no broker for this time is replaced.
LOST_SECONDS, PROBE_EVERY_SECONDS, PROBE_SECONDS, HANG_SECONDS = 9.0, 3.0, 1.0, 30.0
REGISTRY_KEYS = "schema.registry."
# Kafka allows 249 characters in a topic's name; the longest of ours after the prefix is `.dead-letters`.
PREFIX = re.compile(r"[a-zA-Z0-9._-]{1,200}")
# The most that one of our producers sends in a batch (librdkafka's default), and the largest record it has to send.
BATCH_BYTES, RECORD_BYTES = 1_000_000, 128 * 1024
# The protocol's error codes for a missing right, the kind of resource, and the right that we need on it.
REFUSALS = {29: ("topic", ""), 30: ("group", "READ"), 31: ("cluster", ""), 53: ("transactional id", "WRITE")}
# UNKNOWN_TOPIC_OR_PART, _UNKNOWN_TOPIC, _UNKNOWN_PARTITION, _FATAL: trying again does not help.
PERMANENT = {3, -188, -190, -150}
# INVALID_PRODUCER_EPOCH, PRODUCER_FENCED, _FENCED: another producer of this transactional id was initialised.
FENCED = {47, 90, -144}


class TopicState(NamedTuple):
    """A topic as the brokers describe it; `rights` are this user's, None if the brokers do not report them.

    `topic_id` is another one when a topic was deleted and created again; empty if the brokers do not report it.
    """

    partitions: int
    replicas: int
    rights: frozenset[str] | None
    topic_id: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Kafka cluster and its schema registry, as the operator named them.

    `settings` are librdkafka's (`-X key=value`); they may hold secrets and are therefore never shown. `on_statistics`
    is called with librdkafka's statistics, on the polling thread. `registry_proxy` is the proxy for the
    registry, None for a direct connection; bourse_cli.proxies decides.
    """

    bootstrap_servers: str
    registry_url: str
    prefix: str = DEFAULT_PREFIX
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    registry_proxy: str | None = field(default=None, repr=False)
    on_statistics: Callable[[str], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if scheme := re.search(r"\w+://", self.bootstrap_servers):
            raise ConfigurationError(f"--bootstrap-servers: leave {scheme[0]} out, give HOST:PORT")
        if "@" in self.registry_url:
            remedy = "put them into a file and pass -X schema.registry.basic.auth.user.info=@FILE"
            raise ConfigurationError(f"--registry-url contains credentials: {remedy}")
        if not PREFIX.fullmatch(self.prefix):
            raise ConfigurationError(f"--topic-prefix {self.prefix!r}: use 1 to 200 of a-z A-Z 0-9 . _ -")

    @property
    def user(self) -> str:
        """Return the principal that brokers know us by, as far as the settings tell."""
        if name := self.settings.get("sasl.username"):
            return f"User:{name}"
        secured = self.settings.get("security.protocol", "PLAINTEXT").upper() != "PLAINTEXT"
        return "the user of this client" if secured else "User:ANONYMOUS"

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
        settings = {**tuned, **self._statistics(), **self.client(pinned), **callbacks}
        return self._make(Producer, settings, kafka_logger())

    def consumer(self, group: str | None = None, **pinned: Any) -> Consumer:
        """Return a read_committed consumer that never commits by itself.

        `pinned` are more settings (`a_b` is a.b) and callbacks such as error_cb and on_commit. Without a group it can
        only be assigned partitions. The client needs a group's name all the same and asks for its coordinator; the
        answer, GROUP_AUTHORIZATION_FAILED for a user without rights on it, comes out of `consume` once and means
        nothing: a reader ignores it.
        """
        from confluent_kafka import Consumer

        tuned = {
            "fetch.wait.max.ms": 10,
            "fetch.queue.backoff.ms": 5,
            # The client prefetches 60 MB by default; no reader is faster for more than this.
            "queued.min.messages": 2000,
            "queued.max.messages.kbytes": 2048,
            "fetch.message.max.bytes": 1 << 18,
        }
        fixed = {
            "group.id": group or f"{self.prefix}-reader",
            "isolation.level": "read_committed",
            # With the commits of its own a consumer without rights on its group closes only after 45 s.
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            # Eager `assign()` fails with a cooperative strategy.
            "partition.assignment.strategy": "range",
            **{key if callable(value) else key.replace("_", "."): value for key, value in pinned.items()},
        }
        return self._make(Consumer, {**tuned, **self._statistics(), **self.client(fixed)}, kafka_logger())

    def admin(self) -> AdminClient:
        """Return an administration client."""
        from confluent_kafka.admin import AdminClient

        return self._make(AdminClient, self.client({}), kafka_logger())

    def registry(self) -> Registry:
        """Return the schema registry's client."""
        from bourse_schemas.registry import Registry

        prefix = len(REGISTRY_KEYS)
        own = {key[prefix:]: value for key, value in self.settings.items() if key.startswith(REGISTRY_KEYS)}
        return Registry(self.registry_url, own, self.registry_proxy)

    def metadata(self, timeout: float = METADATA_SECONDS, *, every_broker: bool = False) -> ClusterMetadata:
        """Return the cluster's brokers and topics; topics that this user may not see are missing.

        With `every_broker` each one is asked at the address it advertises. Raises Unreachable when no broker answers
        within `timeout` seconds, or one of them does not answer there; ConfigurationError when we are refused.
        """
        return self._connect(timeout, every_broker=every_broker)[1]

    def require_topics(self, reads: Iterable[str], writes: Iterable[str] = ()) -> dict[str, int]:
        """Return the number of partitions of each topic, once all of them exist and may be read or written.

        Also asks every broker at the address it advertises. Raises ConfigurationError with topic, right and user, and
        Unreachable with the broker's address, within 15 seconds.
        """
        wanted = [("WRITE", name) for name in writes] + [("READ", name) for name in reads]
        names = dict.fromkeys(name for _, name in wanted)
        found = self.topics(names, every_broker=True)
        if refused := [
            f"{right} on topic {name}"
            for right, name in wanted
            if name in found and (rights := found[name].rights) is not None and right not in rights
        ]:
            raise self.not_allowed(", ".join(refused))
        if missing := [name for name in names if name not in found]:
            raise ConfigurationError(
                f"no topic {', '.join(missing)} on {self.bootstrap_servers}: create what is declared with "
                f"`bourse topics apply --bootstrap-servers {self.bootstrap_servers}`, or see --topic-prefix"
            )
        return {name: found[name].partitions for name in names}

    def topics(self, names: Iterable[str], *, every_broker: bool = False) -> dict[str, TopicState]:
        """Return those of these topics that exist; one that this user may not see has no partitions and no rights."""
        from confluent_kafka import KafkaError, TopicCollection

        admin, metadata = self._connect(every_broker=every_broker)
        if _is_mock(metadata):
            known = {name: metadata.topics[name] for name in names if name in metadata.topics}
            return {name: TopicState(len(it.partitions), 1, None) for name, it in known.items() if not it.error}
        states, wanted, limit = {}, TopicCollection(list(names)), METADATA_SECONDS
        answers = admin.describe_topics(wanted, include_authorized_operations=True, request_timeout=limit)
        for name, answer in answers.items():
            if (code := error_code(answer)) == KafkaError.UNKNOWN_TOPIC_OR_PART:
                continue
            if code in REFUSALS:
                states[name] = TopicState(0, 0, frozenset())
                continue
            topic = self.answer(answer, f"cannot describe {name}")
            replicas = min(len(partition.replicas) for partition in topic.partitions)
            operations = topic.authorized_operations
            rights = None if operations is None else frozenset(right.name for right in operations)
            states[name] = TopicState(len(topic.partitions), replicas, rights, _id(topic.topic_id))
        return states

    def identity(self, name: str) -> tuple[str, str]:
        """Return the ids of the cluster and of a topic, "" if the brokers have none. May raise Unreachable."""
        topic = self.topics([name]).get(name)
        return str(self.metadata().cluster_id or ""), topic.topic_id if topic else ""

    def topic_settings(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the settings of those of these topics that exist; nothing if the brokers cannot report them."""
        from confluent_kafka import KafkaError
        from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # not in its __all__

        admin, metadata = self._connect()
        asked = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        if not asked or _is_mock(metadata):
            return {}
        found = {}
        for resource, answer in admin.describe_configs(asked, request_timeout=METADATA_SECONDS).items():
            name, what = resource.name, f"cannot read the settings of {resource.name}"
            if error_code(answer) != KafkaError.UNKNOWN_TOPIC_OR_PART:
                entries = self.answer(answer, what, right="DESCRIBE_CONFIGS", topic=name)
                found[name] = {key: entry.value for key, entry in entries.items()}
        return found

    def require_sizes(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the settings of topics; raise ConfigurationError if one refuses the largest batch that we send."""
        found = self.topic_settings(names)
        for name, settings in found.items():
            self.require_size(name, settings)
        return found

    def require_size(self, name: str, settings: Mapping[str, str]) -> None:
        """Raise ConfigurationError if these settings of a topic refuse the largest batch that our producers send."""
        limit = settings.get("max.message.bytes")
        batch = int(self.settings.get("message.max.bytes", BATCH_BYTES))
        if batch < RECORD_BYTES:
            raise ConfigurationError(f"-X message.max.bytes={batch} is too small: our records need {RECORD_BYTES}")
        if limit is not None and int(limit) < batch:
            raise ConfigurationError(
                f"{name} refuses our largest batch, {batch} bytes: its max.message.bytes is {limit}; raise it, "
                f"or send smaller batches with -X message.max.bytes (at least {RECORD_BYTES})"
            )

    def refusal(self, error: KafkaError, right: str = "READ", **names: str) -> ConfigurationError | None:
        """Return what to raise for an error that means a missing right, None for any other error.

        `names` are those of the resources in use: topic, group, transactional_id. `right` is the one on the topic.
        """
        kind, only = REFUSALS.get(error.code(), ("", ""))
        name = names.get(kind.replace(" ", "_")) or f"({error.str()})"
        return self.not_allowed(f"{only or right} on {kind} {name}") if kind else None

    def failure(self, error: KafkaError, what: str, right: str = "READ", **names: str) -> ConfigurationError:
        """Return what to raise for an error: a missing right (see `refusal`), or that `what` failed."""
        kind = ConfigurationError if error.code() in PERMANENT else Unreachable
        return self.refusal(error, right, **names) or kind(f"{what}: {error.str()}")

    def answer(
        self, answer: Future[R], what: str, timeout: float = ANSWER_SECONDS, right: str = "READ", **names: str
    ) -> R:
        """Return an administration client's answer; its own time-out does not cover the wait for a coordinator."""
        from confluent_kafka import KafkaException

        try:
            return answer.result(timeout)
        except TimeoutError as error:
            raise Unreachable(f"{what}: no answer from Kafka within {timeout:.0f} s") from error
        except KafkaException as error:
            raise self.failure(error.args[0], what, right, **names) from error

    def not_allowed(self, what: str) -> ConfigurationError:
        """Return the error for a missing right, such as `READ on topic bourse.trades`."""
        return ConfigurationError(f"Kafka does not allow {self.user}: {what}; `bourse acls` prints a service's rights")

    def _connect(
        self, timeout: float = METADATA_SECONDS, *, every_broker: bool = False
    ) -> tuple[AdminClient, ClusterMetadata]:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        failures, logger = _Failures(), logging.Logger("librdkafka.admin")
        logger.addHandler(failures)
        admin = self._make(AdminClient, {**self.client({}), "error_cb": failures.note}, logger)
        try:
            metadata = _list_topics(admin, timeout)
        except KafkaException as error:
            admin.poll(0)  # calls back with what the client reported meanwhile
            if failures.refusal:
                refusal = f"Kafka at {self.bootstrap_servers} refuses {self.user}: {failures.refusal}"
                raise ConfigurationError(f"{refusal}; see -X sasl… and -X ssl…") from error
            reason = next(reversed(failures.reasons.values()), error.args[0].str())
            raise Unreachable(
                f"Kafka at {self.bootstrap_servers} does not answer ({reason}): "
                f"is it running, and is --bootstrap-servers right?{self._hint(reason)}"
            ) from error
        if every_broker:
            self._require_brokers(admin, failures, metadata)
        return admin, metadata

    def _hint(self, reason: str) -> str:
        protocol = self.settings.get("security.protocol", "PLAINTEXT").upper()
        expected = "TLS (SSL or SASL_SSL)" if "SSL" not in protocol else "SASL, or no TLS"
        return f" The port may expect {expected}: -X security.protocol is {protocol}" * ("Disconnected" in reason)

    def _require_brokers(self, admin: AdminClient, failures: _Failures, metadata: ClusterMetadata) -> None:
        from confluent_kafka import KafkaError
        from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # not in its __all__

        # Sent to the broker itself; a refusal is an answer, too.
        resources = {ConfigResource(ResourceType.BROKER, str(each.id)): each for each in metadata.brokers.values()}
        asked = [admin.describe_configs([resource], request_timeout=BROKER_SECONDS) for resource in resources]
        for resource, answer in (pair for answers in asked for pair in answers.items()):
            code, broker = error_code(answer), resources[resource]
            if code < 0 and code != KafkaError._UNSUPPORTED_FEATURE:  # noqa: SLF001  # its public name
                admin.poll(0)
                address = f"{broker.host}:{broker.port}"
                reason = failures.reasons.get(f"{address}/{broker.id}", "no answer")
                raise Unreachable(
                    f"broker {broker.id} cannot be reached at {address} ({reason}): {self.bootstrap_servers} answers, "
                    f"and this address comes from the brokers' advertised.listeners{self._hint(reason)}"
                )

    def _statistics(self) -> dict[str, Any]:
        if self.on_statistics is None:
            return {}
        return {"statistics.interval.ms": STATISTICS_MS, "stats_cb": self.on_statistics}

    @staticmethod
    def _make(client: Callable[..., C], settings: dict[str, Any], logger: logging.Logger) -> C:
        from confluent_kafka import KafkaException

        try:
            return client(settings, logger=logger)
        except (KafkaException, TypeError, ValueError, AttributeError) as error:  # some names mean a Python object
            reason = error.args[0].str() if isinstance(error, KafkaException) else error
            raise ConfigurationError(f"Kafka settings are refused: {reason}; see -X") from error


def producer_id(prefix: str) -> str:
    """Return the group in which producers elect a leader, and the leader's transactional id."""
    return f"{prefix}-producer"


def error_code(answer: Future[Any], timeout: float = ANSWER_SECONDS) -> int:
    """Return the code of the error that an administration client's answer is, 0 if it is not one."""
    from confluent_kafka import KafkaError, KafkaException

    try:
        error = answer.exception(timeout)
    except TimeoutError:
        return KafkaError._TIMED_OUT  # noqa: SLF001  # its public name
    return error.args[0].code() if isinstance(error, KafkaException) else 0


def _list_topics(admin: AdminClient, timeout: float) -> ClusterMetadata:
    """Return the metadata; until a broker is connected in short calls, as Ctrl-C waits for the end of a call."""
    from confluent_kafka import KafkaException

    until, step = time.monotonic() + timeout, min(timeout, STEP_SECONDS)
    while True:
        try:
            return admin.list_topics(timeout=step)
        except KafkaException as error:
            left, name = until - time.monotonic(), error.args[0].name()
            if left <= 0 or name not in {"_TRANSPORT", "_TIMED_OUT"}:
                raise
            step = left if name == "_TIMED_OUT" else min(step, left)


def _id(uuid: Any) -> str:
    """Return a topic's id; brokers without ids report zeros."""
    text = str(uuid or "")
    return text if text.strip("A=") else ""


def _is_mock(metadata: ClusterMetadata) -> bool:
    """Return whether this is librdkafka's mock cluster, which has no controller and cannot describe topics."""
    return metadata.controller_id not in metadata.brokers


def abandon(*clients: Any) -> None:
    """Close clients, whatever state they are in, within two seconds; an open transaction is aborted.

    Without a broker an abort would wait for ever. It is then left to the next producer of the same transactional id.
    """
    from confluent_kafka import KafkaException

    def close(client: Any) -> None:
        # A fenced producer cannot abort, and need not: its successor did. The client warns of it, and makes a
        # SystemError of the warning if warnings are errors.
        with suppress(KafkaException, RuntimeWarning, SystemError):
            client.close()

    until = time.monotonic() + ABANDON_SECONDS
    threads = [threading.Thread(target=close, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


class Contact:
    """Whether a client still reaches its brokers; asked by the thread that polls it."""

    def __init__(self) -> None:
        self._reached = self._asked = time.monotonic()

    def require(self, client: Consumer | Producer, topic: str) -> None:
        """Ask for the topic now and then; raise KafkaException if no broker has answered for LOST_SECONDS."""
        from confluent_kafka import KafkaException

        if (now := time.monotonic()) - self._asked < PROBE_EVERY_SECONDS:
            return
        # Another call may have taken long meanwhile: only time in which questions were asked counts.
        self._reached += max(0.0, now - self._asked - 2 * PROBE_EVERY_SECONDS)
        self._asked = now
        try:
            with deadline("list_topics", HANG_SECONDS):
                client.list_topics(topic, PROBE_SECONDS)
        except KafkaException:
            if now - self._reached > LOST_SECONDS:
                raise
        else:
            self._reached = now


class _Failures(logging.Handler):
    """Remembers why connections failed, from what an administration client logs and calls back with."""

    # FAIL [client] [thread]: sasl_ssl://host:port/id: reason (after 3ms in state CONNECT)
    LINE = re.compile(r"\]: (?:\w+://)?(\S+?): (.+?)(?: \(after .*)?$")

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}  # by "host:port/id", the latest one last
        self.refusal = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Note a line of librdkafka's."""
        if found := self.LINE.search(record.getMessage()):
            self.reasons.pop(found[1], None)
            self.reasons[found[1]] = found[2]

    def note(self, error: KafkaError) -> None:
        """Note an error that is called back with."""
        if error.code() in {error._AUTHENTICATION, error._SSL}:  # noqa: SLF001  # its public names
            self.refusal = error.str().partition(" (after")[0]


class _Once(logging.Filter):
    """Lets a line pass every 30 seconds: while a broker is down, every client thread logs continuously."""

    SECONDS = 30.0

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[Hashable, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # "FAIL [client] [thread]: broker: reason (after 3ms in state CONNECT)": only the last part differs.
        text, now = record.getMessage().partition(" (after")[0], time.monotonic()
        if now - self._passed.get(text, -self.SECONDS) < self.SECONDS:
            return False
        if len(self._passed) > 1_000:
            self._passed.clear()
        self._passed[text] = now
        return True


def kafka_logger() -> logging.Logger:
    """Return the logger of librdkafka's own lines; it is silent unless logs are configured."""
    logger = logging.getLogger("librdkafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
        logger.addFilter(_Once())
    return logger
