"""`bourse topics`: create and show the topics on a cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import click

from bourse_cli.configuration import config_name
from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS, Topic

__all__ = ["Plan", "apply_topics", "plan_topics", "topics"]

TIMEOUT_SECONDS = 8.0
OVERRIDES: dict[str, type] = {"config": dict, "partitions": int, "replication_factor": int}


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
    help="Replicas of new topics. [default: 3 if there are at least three brokers, otherwise required]",
)
@click.option("--any-time", is_flag=True, help="Keep records of any past or future day: for replays and practice.")
@cluster_options
@click.pass_context
def apply(
    ctx: click.Context, cluster: Cluster, *, dry_run: bool, replication_factor: int | None, any_time: bool
) -> None:
    """Create what is declared and missing, alter what differs; never delete.

    Overrides per topic belong in bourse.toml: [topic.trades] partitions = 12, replication_factor = 3, and
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
                f"put `partitions = {has}` under [topic.{declared.name}] in {config_name()}"
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
        raise ConfigurationError(f"{config_name()}: overrides belong in a table per topic, such as [topic.trades]")
    for name, override in overrides.items():
        if name not in names or not override.keys() <= OVERRIDES.keys():
            raise ConfigurationError(
                f"{config_name()}: [topic.{name}] is unknown; topics are {', '.join(names)}, "
                f"keys {', '.join(OVERRIDES)}"
            )
        for key, value in override.items():
            if type(value) is not OVERRIDES[key] or (isinstance(value, int) and value < 1):
                what = "a table" if OVERRIDES[key] is dict else "a whole number from 1 on"
                raise ConfigurationError(f"{config_name()}: {key} of [topic.{name}] must be {what}")


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
