"""`bourse topics`: create, alter and show the topics on a cluster."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import click

from bourse_cli.configuration import config_name
from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TOPICS, Topic

__all__ = ["Plan", "apply_topics", "plan_topics", "topics"]

TIMEOUT_SECONDS = 8.0
USUAL_REPLICAS = 3
OVERRIDES: dict[str, type] = {"config": dict, "partitions": int, "replication_factor": int}


@click.group
def topics() -> None:
    """Create and show the topics on a cluster."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to make a topic as declared: nothing to do if `create`, `grow_from` and `alter` are empty."""

    topic: Topic
    name: str
    replicas: int
    settings: Mapping[str, str]
    create: bool
    grow_from: int | None = None
    alter: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.create:
            shown = " ".join(f"{key}={value}" for key, value in self.settings.items())
            return f"{self.name}: create, {self.topic.partitions} partitions, {self.replicas} replicas, {shown}"
        changes = [f"{key} {old} → {new}" for key, (old, new) in self.alter.items()]
        if self.grow_from is not None:
            changes.insert(0, f"partitions {self.grow_from} → {self.topic.partitions}")
        return f"{self.name}: {', '.join(changes) or 'as declared'}"

    def commands(self, bootstrap_servers: str) -> Iterator[str]:
        """Yield the commands of Apache Kafka that create the topic, and set its settings if it exists."""
        where = f"--bootstrap-server {bootstrap_servers}"
        pairs = [f"{key}={f'[{value}]' if ',' in value else value}" for key, value in self.settings.items()]
        yield (
            f"kafka-topics {where} --create --if-not-exists --topic {self.name} --partitions {self.topic.partitions} "
            f"--replication-factor {self.replicas}"
        )
        yield (
            f"kafka-configs {where} --alter --entity-type topics --entity-name {self.name} "
            f"--add-config {shlex.quote(','.join(pairs))}"
        )


@topics.command
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@click.option(
    "--print",
    "as_commands",
    is_flag=True,
    help="Only print kafka-topics and kafka-configs commands, for a person who may create topics; Kafka is not asked.",
)
@click.option(
    "--replication-factor",
    type=click.IntRange(min=1),
    help="Replicas of new topics. [default: 3 if there are at least three brokers, otherwise required]",
)
@click.option("--any-time", is_flag=True, help="Keep records of any past or future day: for replays and practice.")
@cluster_options
@click.pass_context
def apply(
    ctx: click.Context,
    cluster: Cluster,
    *,
    dry_run: bool,
    as_commands: bool,
    replication_factor: int | None,
    any_time: bool,
) -> None:
    """Create what is declared and missing, alter what differs; never delete.

    Overrides per topic belong in bourse.toml: [topic.trades] partitions = 12, replication_factor = 3, and
    [topic.trades.config] with any of Kafka's topic settings.
    """
    overrides = (ctx.find_root().default_map or {}).get("topic", {})
    if as_commands:
        for plan in declared_topics(cluster, overrides, replication_factor or USUAL_REPLICAS, any_time=any_time):
            click.echo("\n".join(plan.commands(cluster.bootstrap_servers)))
        return
    plans = plan_topics(cluster, overrides, replication_factor, any_time=any_time)
    if not dry_run:
        apply_topics(cluster, plans)
    for plan in plans:
        click.echo(f"{'(dry run) ' if dry_run else ''}{plan}")


@topics.command(name="list")
@cluster_options
def list_topics(cluster: Cluster) -> None:
    """Show what is declared, and what of it the cluster has."""
    found = cluster.topics(topic.full_name(cluster.prefix) for topic in TOPICS)
    for topic in TOPICS:
        name = topic.full_name(cluster.prefix)
        state = f"{found[name].partitions} partitions" if name in found else "missing"
        if name in found and not found[name].partitions:
            state = "no right to see"
        click.echo(
            f"{name:<24} {state:<15} {topic.cleanup:<8} key: {topic.key_doc:<38} {topic.event.__name__:<11} {topic.doc}"
        )


def declared_topics(cluster: Cluster, overrides: Mapping[str, Any], replicas: int, *, any_time: bool) -> list[Plan]:
    """Return the topics as they are to be created, with the overrides. Raises ConfigurationError if one is wrong."""
    _check_overrides(overrides)
    plans = []
    for declared in TOPICS:
        override = overrides.get(declared.name, {})
        topic = replace(declared, partitions=override.get("partitions", declared.partitions))
        factor = override.get("replication_factor", replicas)
        plan = Plan(topic, topic.full_name(cluster.prefix), factor, {}, create=True)
        plans.append(replace(plan, settings=_settings(plan, override, any_time=any_time)))
        cluster.require_size(plan.name, plans[-1].settings)
    return plans


def plan_topics(
    cluster: Cluster, overrides: Mapping[str, Any], replication_factor: int | None, *, any_time: bool
) -> list[Plan]:
    """Return, per declared topic, what has to be done on this cluster.

    Raises ConfigurationError if an override is wrong or would remove partitions, or if the user may not see a topic.
    """
    wanted = declared_topics(cluster, overrides, replication_factor or 0, any_time=any_time)
    names = [plan.name for plan in wanted]
    found = cluster.topics(names)
    brokers = len(cluster.metadata().brokers)
    usual = USUAL_REPLICAS if brokers >= USUAL_REPLICAS else 0
    current = cluster.topic_settings(name for name, state in found.items() if state.partitions)
    plans = []
    for declared in wanted:
        name, override = declared.name, overrides.get(declared.topic.name, {})
        if name not in found:
            if not (replicas := declared.replicas or usual):
                raise ConfigurationError(
                    f"the cluster has {brokers} broker{'s' * (brokers != 1)}: pass --replication-factor "
                    f"(at most {brokers})"
                )
            plan = replace(declared, replicas=replicas)
            plans.append(replace(plan, settings=_settings(plan, override, any_time=any_time)))
            continue
        has, wants, settings = found[name].partitions, declared.topic.partitions, current.get(name, {})
        if not has:
            raise cluster.not_allowed(f"DESCRIBE (part of ALTER) on topic {name}")
        if has > wants:
            advice = f"put `partitions = {has}` under [topic.{declared.topic.name}] in {config_name()}"
            if declared.topic.name == POLLS.name:
                advice = "the order of polls and the election of the leader need exactly one: delete the topic"
            raise ConfigurationError(
                f"{name} has {has} partitions and {wants} are declared: partitions cannot be removed; {advice}"
            )
        # min.insync.replicas depends on the replicas that the topic has: they are not altered here.
        plan = replace(declared, replicas=found[name].replicas, create=False, grow_from=has if has < wants else None)
        plan = replace(plan, settings=_settings(plan, override, any_time=any_time))
        cluster.require_size(name, {**settings, **plan.settings})
        alter = {key: (settings.get(key), value) for key, value in plan.settings.items() if settings.get(key) != value}
        plans.append(replace(plan, alter=alter))
    return plans


def _settings(plan: Plan, override: Mapping[str, Any], *, any_time: bool) -> dict[str, str]:
    config = override.get("config", {}).items()
    chosen = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in config}
    return plan.topic.settings(replicas=plan.replicas, any_time=any_time) | chosen


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
                what = "a table" if OVERRIDES[key] is dict else "an integer, at least 1"
                raise ConfigurationError(f"{config_name()}: {key} of [topic.{name}] must be {what}")
    if overrides.get(POLLS.name, {}).get("partitions", 1) != 1:
        raise ConfigurationError(
            f"{config_name()}: partitions of [topic.{POLLS.name}] must be 1: the order of polls and the election of "
            "the leader depend on it"
        )


def apply_topics(cluster: Cluster, plans: list[Plan]) -> None:
    """Do what is planned; return when all of it is done. Raises ConfigurationError if the cluster refuses."""
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
    pending: list[tuple[str, str, Any]] = []  # right, topic, answer
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
    if new:
        pending += (("CREATE", name, answer) for name, answer in admin.create_topics(new, **limit).items())
    if grown:
        pending += (("ALTER", name, answer) for name, answer in admin.create_partitions(grown, **limit).items())
    if altered:
        answers = admin.incremental_alter_configs(altered, **limit)
        pending += (("ALTER_CONFIGS", resource.name, answer) for resource, answer in answers.items())
    for right, name, answer in pending:
        try:
            answer.result()
        except KafkaException as error:
            raise cluster.refusal(error.args[0], right, topic=name) or ConfigurationError(
                f"{name}: the cluster refuses: {error.args[0].str()}"
            ) from error
    # The controller has done it, the brokers hear of it a moment later: the next command must find its topics.
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        known = cluster.topics(plan.name for plan in plans)
        if all(plan.name in known and known[plan.name].partitions >= plan.topic.partitions for plan in plans):
            break
        time.sleep(0.02)
    cluster.require_sizes(plan.name for plan in plans)
