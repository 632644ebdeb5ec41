"""`bourse topics`, `bourse schemas` and `bourse tail`: the contract on a cluster."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.kafka import Cluster, cluster_options
from bourse_schemas.topics import TOPICS, Topic

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message

__all__ = ["Plan", "apply_topics", "plan_topics", "read_topic", "schemas", "tail", "topics"]

TIMEOUT_SECONDS = 8.0
OVERRIDES: dict[str, type] = {"config": dict, "partitions": int, "replication_factor": int}


# --- topics -----------------------------------------------------------------------------------------------------------


@click.group
def topics() -> None:
    """Create and show the topics on a cluster."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What applying the declaration does to one topic: nothing where `create`, `grow_from` and `alter` are empty."""

    topic: Topic
    name: str
    replicas: int
    settings: Mapping[str, str]
    create: bool
    grow_from: int | None
    alter: Mapping[str, tuple[str | None, str]]

    def __str__(self) -> str:
        if self.create:
            shown = " ".join(f"{key}={value}" for key, value in self.settings.items())
            return f"{self.name}: create, {self.topic.partitions} partitions, {self.replicas} replicas, {shown}"
        changes = [f"{key} {old} → {new}" for key, (old, new) in self.alter.items()]
        if self.grow_from is not None:
            changes.insert(0, f"partitions {self.grow_from} → {self.topic.partitions}")
        return f"{self.name}: {', '.join(changes) or 'as declared'}"


@topics.command
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@click.option(
    "--replication-factor",
    type=click.IntRange(min=1),
    help="Replicas of new topics. [default: 3 on three brokers or more; else it must be said]",
)
@click.option("--any-time", is_flag=True, help="Keep records of any past or future day: for replays and practice.")
@cluster_options
@click.pass_context
def apply(
    ctx: click.Context, cluster: Cluster, *, dry_run: bool, replication_factor: int | None, any_time: bool
) -> None:
    """Create what is declared and missing, alter what differs; never delete.

    Per-topic overrides stand in bourse.toml: [topic.trades] partitions = 12, replication_factor = 3, and
    [topic.trades.config] with any of Kafka's topic settings.
    """
    overrides = (ctx.find_root().default_map or {}).get("topic", {})
    plans = plan_topics(cluster, overrides, replication_factor, any_time=any_time)
    if not dry_run:
        apply_topics(cluster, plans)
    for plan in plans:
        click.echo(f"{'(dry run) ' if dry_run else ''}{plan}")


@topics.command(name="list")
@cluster_options
def list_topics(cluster: Cluster) -> None:
    """Show what is declared, and what of it the cluster has."""
    found = cluster.metadata().topics
    for topic in TOPICS:
        name = topic.full_name(cluster.prefix)
        state = f"{len(found[name].partitions)} partitions" if name in found else "missing"
        click.echo(
            f"{name:<24} {state:<14} {topic.cleanup:<8} key: {topic.key_doc:<38} {topic.event.__name__:<11} {topic.doc}"
        )


def plan_topics(
    cluster: Cluster, overrides: Mapping[str, Any], replication_factor: int | None, *, any_time: bool
) -> list[Plan]:
    """Return, per declared topic, what has to be done on this cluster.

    Raises ConfigurationError where an override is wrong, or would lose partitions.
    """
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # not in its __all__

    _check_overrides(overrides)
    admin = cluster.admin()
    existing = cluster.metadata()
    brokers = len(existing.brokers)
    plans = []
    for declared in TOPICS:
        override = overrides.get(declared.name, {})
        topic = replace(declared, partitions=override.get("partitions", declared.partitions))
        name = topic.full_name(cluster.prefix)
        found = existing.topics[name].partitions if name in existing.topics else None
        has = None if found is None else len(found)
        if found:
            # What it has, not what is asked for: it cannot be altered here, and min.insync.replicas hangs on it.
            replicas: int | None = min(len(partition.replicas) for partition in found.values())
        else:
            replicas = override.get("replication_factor") or replication_factor or (3 if brokers >= 3 else None)
        if replicas is None:
            raise ConfigurationError(
                f"the cluster has {brokers} broker{'s' * (brokers != 1)}: say how many replicas new topics get, "
                f"--replication-factor {brokers} at most"
            )
        if has is not None and has > topic.partitions:
            raise ConfigurationError(
                f"{name} has {has} partitions and {topic.partitions} are declared: partitions cannot be taken away; "
                f"put `partitions = {has}` under [topic.{declared.name}] in bourse.toml"
            )
        settings = topic.settings(replicas=replicas, any_time=any_time)
        settings |= {key: _setting(value) for key, value in override.get("config", {}).items()}
        alter: dict[str, tuple[str | None, str]] = {}
        if has is not None:
            resource = ConfigResource(ResourceType.TOPIC, name)
            try:
                current = admin.describe_configs([resource], request_timeout=TIMEOUT_SECONDS)[resource].result()
            except KafkaException as error:
                raise ConfigurationError(
                    f"{name}: the cluster does not show its settings: {error.args[0].str()}"
                ) from error
            values = {key: current[key].value if key in current else None for key in settings}
            alter = {key: (values[key], value) for key, value in settings.items() if values[key] != value}
        grow_from = has if has is not None and has < topic.partitions else None
        plans.append(Plan(topic, name, replicas, settings, has is None, grow_from, alter))
    return plans


def _check_overrides(overrides: Any) -> None:
    names = [topic.name for topic in TOPICS]
    if not isinstance(overrides, dict) or not all(isinstance(table, dict) for table in overrides.values()):
        raise ConfigurationError("bourse.toml: overrides stand in a table per topic, [topic.trades] and the like")
    for name, override in overrides.items():
        if name not in names or not override.keys() <= OVERRIDES.keys():
            raise ConfigurationError(
                f"bourse.toml: [topic.{name}] is not understood; topics are {', '.join(names)}, "
                f"keys {', '.join(OVERRIDES)}"
            )
        for key, value in override.items():
            if type(value) is not OVERRIDES[key] or (isinstance(value, int) and value < 1):
                what = "a table" if OVERRIDES[key] is dict else "a whole number from 1 on"
                raise ConfigurationError(f"bourse.toml: {key} of [topic.{name}] must be {what}")


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def apply_topics(cluster: Cluster, plans: list[Plan]) -> None:
    """Do what is planned; return when all of it is done. Raises ConfigurationError where the cluster refuses."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not in its __all__
        AlterConfigOpType,
        ConfigEntry,
        ConfigResource,
        NewPartitions,
        NewTopic,
        ResourceType,
    )

    admin = cluster.admin()
    pending: list[tuple[str, Any]] = []  # a topic may be here twice: grown and altered
    new = [
        NewTopic(plan.name, plan.topic.partitions, plan.replicas, config=dict(plan.settings))
        for plan in plans
        if plan.create
    ]
    grown = [NewPartitions(plan.name, plan.topic.partitions) for plan in plans if plan.grow_from is not None]
    altered = [
        ConfigResource(
            ResourceType.TOPIC,
            plan.name,
            incremental_configs=[
                ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
                for key, (_, value) in plan.alter.items()
            ],
        )
        for plan in plans
        if plan.alter
    ]
    limit = {"request_timeout": TIMEOUT_SECONDS}
    pending += admin.create_topics(new, **limit).items() if new else ()
    pending += admin.create_partitions(grown, **limit).items() if grown else ()
    pending += ((r.name, f) for r, f in admin.incremental_alter_configs(altered, **limit).items()) if altered else ()
    for name, done in pending:
        try:
            done.result()
        except KafkaException as error:
            raise ConfigurationError(f"{name}: the cluster refuses: {error.args[0].str()}") from error
    # The controller has done it, the brokers hear of it a moment later: the next command must find its topics.
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        known = cluster.metadata().topics
        if all(plan.name in known and len(known[plan.name].partitions) >= plan.topic.partitions for plan in plans):
            break
        time.sleep(0.02)


# --- schemas ----------------------------------------------------------------------------------------------------------


@click.group
def schemas() -> None:
    """Register, check and show the schemas of the topics."""


@schemas.command
@cluster_options
def register(cluster: Cluster) -> None:
    """Register every topic's schema, compatibility FULL_TRANSITIVE. Repeating it changes nothing."""
    for subject, schema_id in cluster.registry().register_all(cluster.prefix).items():
        click.echo(f"{subject}: id {schema_id}")


@schemas.command
@cluster_options
@click.pass_context
def check(ctx: click.Context, cluster: Cluster) -> None:
    """Say whether the registry has, or would take, this release's schemas. Exit 1 where not."""
    registry = cluster.registry()
    wrong = 0
    for topic in TOPICS:
        problem = registry.check(topic, cluster.prefix)
        wrong += problem is not None
        click.echo(problem or f"{topic.subject(cluster.prefix)}: well")
    ctx.exit(1 if wrong else 0)


@schemas.command
@click.argument("topic", metavar="TOPIC")
def show(topic: str) -> None:
    """Print the schema of a topic's values."""
    from bourse_schemas.codec import schema_text

    click.echo(schema_text(_declared(topic, None).event), nl=False)


@schemas.command
@click.option("--bootstrap-servers", default="127.0.0.1:9092", show_default=True, help="What stands under `servers`.")
@click.option("--registry-url", default="http://127.0.0.1:8081", show_default=True, help="The registry beside it.")
def asyncapi(bootstrap_servers: str, registry_url: str) -> None:
    """Print the contract as an AsyncAPI 3.0 document: topics, keys, headers, schemas."""
    import yaml

    from bourse_schemas.published import asyncapi as document

    found = document(bootstrap_servers, registry_url)
    click.echo(yaml.safe_dump(found, allow_unicode=True, sort_keys=False, width=120), nl=False)


@schemas.command
def contract() -> None:
    """Print docs/contract.md: every topic, field, symbol and header in tables."""
    from bourse_schemas.published import contract as page

    click.echo(page(), nl=False)


@schemas.command
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The folder.")
def export(to: Path) -> None:
    """Write the schemas into a folder, with manifest.json: subjects and fingerprints."""
    from bourse_schemas.published import export as write

    for file in write(to):
        click.echo(str(file))


@schemas.command
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@click.pass_context
def diff(ctx: click.Context, old: str, new: str) -> None:
    """Say in words what differs between two schemas: .avsc files, or topics as this release has them.

    Exit 1 where NEW may not follow OLD.
    """
    from bourse_schemas.published import differences
    from bourse_schemas.registry import WAY_OUT, gate

    then, now = _schema_of(old), _schema_of(new)
    for line in differences(then, now):
        click.echo(line)
    faults = gate(now, {1: then})
    for fault in faults:
        click.echo(f"FAULT {fault}")
    if faults:
        click.echo(WAY_OUT)
    ctx.exit(1 if faults else 0)


def _schema_of(name: str) -> dict[str, Any]:
    import fastavro

    from bourse_schemas.codec import avro_schema

    if not name.endswith(".avsc"):
        return avro_schema(_declared(name, None).event)
    try:
        found = json.loads(Path(name).read_text("utf-8"))
        fastavro.parse_schema(found)
        if found["type"] != "record":
            raise ValueError("no record")
    except OSError as error:
        raise ConfigurationError(f"{name}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, fastavro.schema.SchemaParseException) as error:
        raise ConfigurationError(f"{name}: no Avro record schema: {error}") from error
    return dict(found)


def _declared(name: str, prefix: str | None) -> Topic:
    """Return the topic of this name, with its prefix or without; with any prefix where that is None."""
    for topic in TOPICS:
        if name in {topic.name, topic.full_name(name.rpartition(".")[0] if prefix is None else prefix)}:
            return topic
    raise ConfigurationError(f"no topic {name!r}: there are {', '.join(topic.name for topic in TOPICS)}")


# --- tail -------------------------------------------------------------------------------------------------------------


@click.command
@click.argument("topic", metavar="TOPIC")
@click.option("--from-beginning", is_flag=True, help="Begin with the oldest record instead of the next one.")
@click.option("--exit-at-end", is_flag=True, help="End when all that is there has been shown.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with the Avro field names.")
@click.option("--with-metadata", is_flag=True, help="Add _topic, _partition, _offset, _timestamp, _key and _headers.")
@click.option("--key", help="Only records with this key.")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many records.")
@cluster_options
def tail(
    cluster: Cluster,
    *,
    topic: str,
    from_beginning: bool,
    exit_at_end: bool,
    as_json: bool,
    with_metadata: bool,
    key: str | None,
    limit: int | None,
) -> None:
    """Show the decoded records of a topic (trades, candles, polls, alerts, dead-letters) as they are committed."""
    from bourse_schemas.codec import to_json

    declared = _declared(topic, cluster.prefix)
    name = declared.full_name(cluster.prefix)
    partitions = cluster.require_topics([name])[name]
    decode = cluster.registry().deserializer(declared.event)
    consumer = cluster.consumer(enable_partition_eof=True)
    shown = 0
    # Ctrl-C is heard in the background too, as the services do.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for message in _messages(consumer, name, partitions, from_beginning=from_beginning, exit_at_end=exit_at_end):
            raw_key = message.key()
            text_key = raw_key.decode(errors="replace") if isinstance(raw_key, bytes) else raw_key
            if key is not None and text_key != key:
                continue
            try:
                fields = decode.fields(_bytes(message.value()))
            except Undecodable as error:
                click.echo(f"{name}-{message.partition()}-{message.offset()}: {error}", err=True)
                continue
            if with_metadata:
                fields |= _metadata(message, text_key)
            click.echo(to_json(fields) if as_json else _line(fields, text_key, declared))
            shown += 1
            if shown == limit:
                break
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # The reader is gone (`bourse tail … | head`): nothing is left to say, not even when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        consumer.close()


def read_topic(cluster: Cluster, name: str) -> Iterator[Message]:
    """Yield a topic's committed records from its beginning to its present end."""
    partitions = cluster.require_topics([name])[name]
    consumer = cluster.consumer(enable_partition_eof=True)
    try:
        yield from _messages(consumer, name, partitions, from_beginning=True, exit_at_end=True)
    finally:
        consumer.close()


def _messages(
    consumer: Consumer, topic: str, partitions: int, *, from_beginning: bool, exit_at_end: bool
) -> Iterator[Message]:
    from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, TopicPartition

    start = OFFSET_BEGINNING if from_beginning else OFFSET_END
    consumer.assign([TopicPartition(topic, number, start) for number in range(partitions)])
    ended: set[int | None] = set()
    while not (exit_at_end and len(ended) == partitions):
        for message in consumer.consume(1000, 0.2):
            error = message.error()
            if error is None:
                ended.discard(message.partition())
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                ended.add(message.partition())
            elif error.code() in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.UNKNOWN_TOPIC_OR_PART}:
                raise ConfigurationError(f"{topic} cannot be read: {error.str()}")


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _metadata(message: Message, key: str | None) -> dict[str, Any]:
    from datetime import UTC, datetime

    pairs: Any = message.headers() or []
    headers = {name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in pairs}
    return {
        "_topic": message.topic(),
        "_partition": message.partition(),
        "_offset": message.offset(),
        "_timestamp": datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC),
        "_key": key,
        "_headers": headers,
    }


def _line(fields: Mapping[str, Any], key: str | None, topic: Topic) -> str:
    """Return a record as a line for people: what is null or repeats the key is left out."""
    from bourse_schemas.codec import to_json

    plain = json.loads(to_json({name: value for name, value in fields.items() if value not in (None, {}, [])}))
    instant = str(plain.get("observed_at") or plain.get("received_at") or plain.get("raised_at") or "")
    hidden = {"symbol_raw", "instrument", "observed_at", "event_id", topic.key_doc}
    shown = (f"{name}={value}" for name, value in plain.items() if name not in hidden)
    return f"{instant} {key or '-'} {' '.join(shown)}".strip()
