"""`bourse topics`: create, alter and show the topics on a cluster."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import click
import msgspec

from bourse_cli.configuration import config_name
from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError, Unreachable, counted
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, POLLS, TOPICS, Topic

TIMEOUT_SECONDS = 8.0
USUAL_REPLICAS = 3
# Topics that have exactly one partition, and what needs it.
SINGLE = {POLLS.name: "the order of polls and the leader's election", ALERTS.name: "the order of alerts"}
Count = Annotated[int, msgspec.Meta(ge=1)]


class Override(msgspec.Struct, forbid_unknown_fields=True):
    """What [topic.NAME] of bourse.toml changes."""

    partitions: Count | None = None
    replication_factor: Count | None = None
    config: dict[str, str | int | float | bool] = {}


@click.group
def topics() -> None:
    """Create and show the topics on a cluster."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A topic as it is wanted, and what to do for that: nothing if it `has` all partitions and `alter` is empty."""

    topic: Topic
    name: str
    replicas: int
    config: Mapping[str, str]
    any_time: bool
    has: int = 0
    alter: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """Return the declared settings with the overrides."""
        return self.topic.settings(replicas=self.replicas, any_time=self.any_time) | dict(self.config)

    def __str__(self) -> str:
        if not self.has:
            shown = " ".join(f"{key}={value}" for key, value in self.settings.items())
            size = f"{counted(self.topic.partitions, 'partition')}, {counted(self.replicas, 'replica')}"
            return f"{self.name}: create, {size}, {shown}"
        changes = [f"{key} {old} → {new}" for key, (old, new) in self.alter.items()]
        if self.has < self.topic.partitions:
            changes.insert(0, f"partitions {self.has} → {self.topic.partitions}")
        return f"{self.name}: {', '.join(changes) or 'as declared'}"

    def commands(self, bootstrap_servers: str) -> Iterator[str]:
        """Yield the commands of Apache Kafka that create the topic, and set its settings if it exists."""
        server = f"--bootstrap-server {bootstrap_servers}"
        pairs = [f"{key}={f'[{value}]' if ',' in value else value}" for key, value in self.settings.items()]
        size = f"--partitions {self.topic.partitions} --replication-factor {self.replicas}"
        yield f"kafka-topics {server} --create --if-not-exists --topic {self.name} {size}"
        entity = f"--entity-type topics --entity-name {self.name}"
        yield f"kafka-configs {server} --alter {entity} --add-config {shlex.quote(','.join(pairs))}"


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
    for plan in plans:
        _require_longer(plan)
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
        name, state = topic.full_name(cluster.prefix), "missing"
        if name in found:
            state = counted(found[name].partitions, "partition") if found[name].partitions else "no right to see"
        key, event = f"key: {topic.key_doc}", topic.event.__name__
        click.echo(f"{name:<24} {state:<15} {topic.cleanup:<8} {key:<43} {event:<11} {topic.doc}")


def declared_topics(cluster: Cluster, overrides: Mapping[str, Any], replicas: int, *, any_time: bool) -> list[Plan]:
    """Return the topics as they are to be created, with the overrides. Raises ConfigurationError for a bad override."""
    known, plans = _read_overrides(overrides), []
    for declared in TOPICS:
        override = known.get(declared.name, Override())
        topic = replace(declared, partitions=override.partitions or declared.partitions)
        config = override.config.items()
        texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in config}
        factor = override.replication_factor or replicas
        plans.append(plan := Plan(topic, topic.full_name(cluster.prefix), factor, texts, any_time))
        cluster.require_size(plan.name, plan.settings)
    return plans


def plan_topics(
    cluster: Cluster, overrides: Mapping[str, Any], replication_factor: int | None, *, any_time: bool
) -> list[Plan]:
    """Return, per declared topic, what has to be done on this cluster.

    Raises ConfigurationError for an override that is bad or removes partitions, and if the user may not see a topic.
    """
    wanted = declared_topics(cluster, overrides, replication_factor or 0, any_time=any_time)
    found = cluster.topics(plan.name for plan in wanted)
    brokers = len(cluster.metadata().brokers)
    current = cluster.topic_settings(name for name, state in found.items() if state.partitions)
    plans = []
    for plan in wanted:
        name, wants = plan.name, plan.topic.partitions
        if name not in found:
            if not plan.replicas and brokers < USUAL_REPLICAS:
                raise ConfigurationError(
                    f"the cluster has too few brokers: pass --replication-factor (at most {brokers})"
                )
            plans.append(replace(plan, replicas=plan.replicas or USUAL_REPLICAS))
            continue
        if not (has := found[name].partitions):
            raise cluster.not_allowed(f"DESCRIBE (part of ALTER) on topic {name}")
        if has > wants:
            advice = f"put `partitions = {has}` under [topic.{plan.topic.name}] in {config_name()}"
            if what := SINGLE.get(plan.topic.name):
                advice = f"{what} needs it: delete the topic"
            held = counted(has, "partition")
            raise ConfigurationError(f"{name} has {held}, which cannot be reduced to {wants}: {advice}")
        # min.insync.replicas depends on the replicas that the topic has: they are not altered here.
        existing, settings = replace(plan, has=has, replicas=found[name].replicas), current.get(name, {})
        cluster.require_size(name, {**settings, **existing.settings})
        alter = {key: (settings.get(key), new) for key, new in existing.settings.items() if settings.get(key) != new}
        plans.append(replace(existing, alter=alter))
    return plans


def _require_longer(plan: Plan) -> None:
    """Raise ConfigurationError if a topic would keep records for a shorter time, which nobody asked for."""
    old, new = plan.alter.get("retention.ms", (None, "-1"))
    before, after = int(old or -1), int(new)
    if after >= 0 and not 0 <= before <= after and "retention.ms" not in plan.config:
        kept = "for ever" if before < 0 else f"for {before} ms"
        raise ConfigurationError(
            f"{plan.name} keeps its records {kept}; the brokers would delete those older than the declared {after} ms: "
            f"put the time that is wanted under [topic.{plan.topic.name}.config] in {config_name()}, as "
            f'"retention.ms" = "{before}"; or pass --any-time'
        )


def _read_overrides(tables: Any) -> dict[str, Override]:
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigurationError(f"{config_name()}: overrides belong in a table per topic, such as [topic.trades]")
    names, overrides = [topic.name for topic in TOPICS], {}
    for name, table in tables.items():
        if name not in names:
            raise ConfigurationError(f"{config_name()}: [topic.{name}] is unknown; topics are {', '.join(names)}")
        try:
            overrides[name] = msgspec.convert(table, Override)
        except msgspec.ValidationError as error:
            raise ConfigurationError(
                f"{config_name()}: [topic.{name}]: {error}; keys are {', '.join(Override.__struct_fields__)}; Kafka's "
                'own settings belong in config, such as config = {"retention.ms" = "1209600000"}'
            ) from error
        if name in SINGLE and overrides[name].partitions not in {None, 1}:
            raise ConfigurationError(
                f"{config_name()}: partitions of [topic.{name}] must be 1: {SINGLE[name]} needs it"
            )
    return overrides


def apply_topics(cluster: Cluster, plans: list[Plan]) -> None:
    """Do what is planned; return when all of it is done. Raises ConfigurationError if the cluster refuses."""
    from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not in its __all__
        AlterConfigOpType,
        ConfigEntry,
        ConfigResource,
        NewPartitions,
        NewTopic,
        ResourceType,
    )

    admin, limit = cluster.admin(), {"request_timeout": TIMEOUT_SECONDS}
    answers: list[tuple[str, str, Any]] = []
    for plan in plans:
        name, partitions = plan.name, plan.topic.partitions
        if not plan.has:
            topic = NewTopic(name, partitions, plan.replicas, config=plan.settings)
            answers.append((name, "CREATE", admin.create_topics([topic], **limit)[name]))
        elif plan.has < partitions:
            answers.append((name, "ALTER", admin.create_partitions([NewPartitions(name, partitions)], **limit)[name]))
        if plan.alter:
            changes = {key: new for key, (_, new) in plan.alter.items()}
            entries = [ConfigEntry(*each, incremental_operation=AlterConfigOpType.SET) for each in changes.items()]
            resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
            answers.append((name, "ALTER_CONFIGS", admin.incremental_alter_configs([resource], **limit)[resource]))
    for name, right, answer in answers:
        cluster.answer(answer, f"{name}: the cluster refuses", 2 * TIMEOUT_SECONDS, right, topic=name)
    # The controller has done it, the brokers learn of it a moment later: the next command must find its topics.
    wanted, until = {plan.name: plan.topic.partitions for plan in plans}, time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < until:
        grown = {name for name, state in cluster.topics(wanted).items() if state.partitions >= wanted[name]}
        if wanted.keys() == grown == cluster.topic_settings(wanted).keys():
            break
        time.sleep(0.02)
    else:
        raise Unreachable(f"not every broker has {', '.join(wanted)} within {TIMEOUT_SECONDS:.0f} s: run it again")
    cluster.require_sizes(wanted)
