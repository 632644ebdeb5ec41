"""`bourse acls`: the least rights that a service needs on Kafka."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import click

from bourse_cli.options import cluster_options, declared_topic
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, CANDLES, DEAD_LETTERS, POLLS, TOPICS, TRADES, Topic


class Service(NamedTuple):
    """What a service does on Kafka.

    It is a member of `group` (after the topics' prefix and a dash) with each of these `members` endings, and publishes
    under a transactional id that is the group with the ending `ids`. An ending with a dash matches every name that
    begins with it.
    """

    reads: Sequence[Topic] = ()
    writes: Sequence[Topic] = ()
    group: str | None = None
    members: Sequence[str] = ("",)
    ids: str = "-"
    others: Sequence[str] = ()  # more rights, on these topics
    on: Sequence[Topic] = ()


PRODUCED = (TRADES, CANDLES, POLLS, DEAD_LETTERS)
# READ, WRITE and ALTER include DESCRIBE, ALTER_CONFIGS includes DESCRIBE_CONFIGS.
SERVICES = {
    "topics": Service(others=("CREATE", "ALTER", "ALTER_CONFIGS"), on=TOPICS),
    "register": Service(),
    "produce": Service((CANDLES, POLLS), PRODUCED, "producer", ids="", others=("DESCRIBE_CONFIGS",), on=PRODUCED),
    "alerts": Service((TRADES, POLLS, CANDLES, ALERTS), (ALERTS, DEAD_LETTERS), "alerts", ("", "-election"), ""),
    "archive": Service((TRADES,), (DEAD_LETTERS,), "archive"),
    "postgres": Service((TRADES,), (DEAD_LETTERS,), "archive-postgres"),
    "notify": Service((ALERTS,), (DEAD_LETTERS,), "notify", ("-",)),  # a group per channel
    "verify": Service((TRADES,)),
    "tail": Service(TOPICS),
    "board": Service(TOPICS),
    "doctor": Service(TOPICS, others=("DESCRIBE_CONFIGS",), on=TOPICS),
    "subscriber": Service((TRADES,), group="subscriber"),
}
OWN_TOPICS = ("archive", "postgres", "verify", "tail", "subscriber")


class Right(NamedTuple):
    """One ACL: `operation` on the resource `name`, or on all that begin with it."""

    resource: str
    pattern: str
    name: str
    operation: str


@click.command
@click.option("--service", type=click.Choice(list(SERVICES)), required=True, help="Whose rights.")
@click.option("--principal", required=True, metavar="User:NAME", help="The user that the brokers know it by.")
@click.option("--group", help="Its consumer group. [default: the topics' prefix and the service, bourse-archive]")
@click.option("--topic", "names", multiple=True, help=f"What it reads, for {', '.join(OWN_TOPICS)}. Repeatable.")
@click.option(
    "--prefixed", is_flag=True, help="Fewer and wider: on whatever begins with the topics' prefix or the group."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per right.")
@cluster_options
def acls(
    cluster: Cluster,
    *,
    service: str,
    principal: str,
    group: str | None,
    names: tuple[str, ...],
    prefixed: bool,
    as_json: bool,
) -> None:
    """Print the least rights that a service needs, as kafka-acls commands. Nothing is asked of Kafka.

    The schema registry has rights of its own: `register` writes subjects, everything else reads them.
    """
    if names and service not in OWN_TOPICS:
        raise ConfigurationError(f"--topic is for {', '.join(OWN_TOPICS)}: the topics of {service} are known")
    if not principal.partition(":")[2]:
        raise ConfigurationError(f"--principal {principal} is not like User:NAME")
    reads = [declared_topic(name, cluster.prefix) for name in names]
    found = sorted(set(rights(cluster.prefix, service, group=group, reads=reads, prefixed=prefixed)))
    if as_json:
        for right in found:
            click.echo(json.dumps({**right._asdict(), "principal": principal, "permission": "ALLOW"}))
        return
    for (resource, pattern, name), same in groupby(found, lambda right: right[:3]):
        # The tool knows DescribeConfigs, and not DESCRIBE_CONFIGS.
        operations = " ".join(f"--operation {right.operation.title().replace('_', '')}" for right in same)
        click.echo(
            f"kafka-acls --bootstrap-server {cluster.bootstrap_servers} --add --allow-principal "
            f"{shlex.quote(principal)} {operations} --{resource} {shlex.quote(name)} --resource-pattern-type {pattern}"
        )


def rights(
    prefix: str, service: str, *, group: str | None = None, reads: Sequence[Topic] = (), prefixed: bool = False
) -> Iterator[Right]:
    """Yield the rights of a service; `group` and `reads` replace its usual consumer group and topics."""
    needs = SERVICES[service]
    wide = "prefixed" if prefixed else "literal"
    wanted = [("READ", reads or needs.reads), ("WRITE", needs.writes), *((right, needs.on) for right in needs.others)]
    for operation, on in wanted:
        for topic in on:
            yield Right("topic", wide, f"{prefix}." if prefixed else topic.full_name(prefix), operation)
    if service in {"doctor", "board"}:
        yield Right("group", "prefixed", f"{prefix}-", "DESCRIBE")
    if needs.group:
        member = group or f"{prefix}-{needs.group}"
        used = [("group", "READ", ending) for ending in needs.members]
        used += [("transactional-id", "WRITE", needs.ids)] if needs.writes else []
        for resource, operation, ending in used:
            yield Right(resource, "prefixed" if ending == "-" else wide, member + ending, operation)
