"""`bourse schemas`: register, check and show the schemas of the topics."""

from __future__ import annotations

import click

from bourse_cli.ddl import ENGINES, table_definition
from bourse_cli.options import cluster_options, declared_topic
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS


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
    """Check that the registry has, or would accept, this release's schemas. Exit 1 if not."""
    registry = cluster.registry()
    wrong = 0
    for topic in TOPICS:
        problem = registry.check(topic, cluster.prefix)
        wrong += problem is not None
        click.echo(problem or f"{topic.subject(cluster.prefix)}: ok")
    ctx.exit(1 if wrong else 0)


@schemas.command
@click.argument("topic", metavar="TOPIC")
def show(topic: str) -> None:
    """Print the schema of a topic's values."""
    from bourse_schemas.codec import schema_text

    click.echo(schema_text(declared_topic(topic, None).event), nl=False)


@schemas.command
@click.argument("engine", type=click.Choice(ENGINES))
@click.argument("topic", metavar="TOPIC")
@cluster_options
def ddl(engine: str, topic: str, cluster: Cluster) -> None:
    """Print the SQL that makes a topic a table: over Kafka (flink, spark), or empty (duckdb, postgres)."""
    click.echo(table_definition(engine, declared_topic(topic, cluster.prefix), cluster), nl=False)
