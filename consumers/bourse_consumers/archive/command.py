"""`bourse consume archive`, and the tables that an archive has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import declared_topic
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import TOPICS

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer
    from bourse_consumers.archive.table import Table

__all__ = ["ACCEPT_LOSS", "NAMES", "TO", "TOPIC", "consume_archive", "one_table", "tables"]

NAMES = click.Choice([topic.name for topic in TOPICS if topic.cleanup == "delete"])
TO = click.option("--to", required=True, metavar="FOLDER|s3://…", help="Where the tables are, one for each topic.")
# A stop has to fit within 4.5 s: a turn, the last commit, and leaving the group.
PATIENCE = 1.5
TOPIC = click.option("--topic", type=NAMES, default="trades", show_default=True, help="Which topic.")
ACCEPT_LOSS = click.option(
    "--accept-loss", is_flag=True, help="Go on if the topic has deleted what the archive lacks; records the hole."
)


@click.command
@TO
@TOPIC
@click.option(
    "--commit-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="An event is readable in the table after at most this time.",
)
@click.option(
    "--commit-rows", type=click.IntRange(1), default=50_000, show_default=True, help="Commit earlier at N rows."
)
@ACCEPT_LOSS
@click.option("--optimize/--no-optimize", default=True, help="Merge the files of closed days, or do not.")
def consume_archive(to: str, topic: str, **options: Any) -> Consumer:
    """Write every event of a topic to a Delta table, exactly once."""
    import pyarrow as pa

    from bourse_consumers.archive.sink import DeltaArchive

    # Arrow's own allocator keeps for itself what it once had.
    pa.set_memory_pool(pa.system_memory_pool())
    return DeltaArchive(to, declared_topic(topic, ""), patience=PATIENCE, **options)


def tables(to: str, topic: str | None) -> list[Table]:
    """Return the archive's tables, or the one of a topic; raise ConfigurationError if there is none."""
    from bourse_consumers.archive.storage import Storage, StoreError
    from bourse_consumers.archive.table import Table

    try:
        names = Storage(to).folders()
        wanted = [name for name in names if name.rpartition(".")[2] in ([topic] if topic else NAMES.choices)]
        uris = [to] if "_delta_log" in names else [f"{to.rstrip('/')}/{name}" for name in wanted]
        found = [table for uri in uris if (table := Table.open(uri)) is not None]
    except StoreError as error:
        advice = "if commits are lost, archive what the topic still has into a new folder"
        raise ConfigurationError(f"--to {to}: cannot be opened: {error}; {advice}") from error
    if not found:
        raise ConfigurationError(f"--to {to}: there is no table{f' of {topic}' if topic else ''}")
    for table in found:
        if topic not in {None, table.topic.name}:
            raise ConfigurationError(
                f"{table.storage.uri} is the table of {table.name}: use --topic {table.topic.name}"
            )
    return found


def one_table(to: str, topic: str) -> Table:
    """Return the table of a topic; raise ConfigurationError if there are several."""
    found = tables(to, topic)
    if len(found) > 1:
        raise ConfigurationError(f"--to {to}: name one of {', '.join(table.storage.uri for table in found)}")
    return found[0]
