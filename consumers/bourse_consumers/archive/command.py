"""`bourse consume archive`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from bourse_schemas.topics import TOPICS

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer

__all__ = ["archive"]


@click.command
@click.option("--to", required=True, metavar="FOLDER|s3://BUCKET/PREFIX", help="Where the files lie.")
@click.option(
    "--topic",
    type=click.Choice([topic.name for topic in TOPICS]),
    default="trades",
    show_default=True,
    help="Which topic to keep; each has a place of its own.",
)
@click.option("--max-rows", type=click.IntRange(1), default=50_000, show_default=True, help="Close a file at N rows.")
@click.option(
    "--max-bytes",
    type=click.IntRange(1),
    default=16 << 20,
    show_default=True,
    help="Close the largest open file when all of them hold N bytes in memory.",
)
@click.option(
    "--max-age-seconds",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="… or when its first row is so old.",
)
@click.option(
    "--accept-loss", is_flag=True, help="Go on where the topic has deleted what the archive lacks; the hole is noted."
)
def archive(  # an option each
    to: str, topic: str, *, max_rows: int, max_bytes: int, max_age_seconds: float, accept_loss: bool
) -> Consumer:
    """Write every event of a topic to Parquet files, exactly once."""
    import pyarrow as pa

    from bourse_consumers.archive.parquet import ParquetArchive
    from bourse_consumers.archive.store import open_store

    # Arrow's own allocator keeps for itself what it once had.
    pa.set_memory_pool(pa.system_memory_pool())
    return ParquetArchive(
        open_store(to),
        next(each for each in TOPICS if each.name == topic),
        max_rows=max_rows,
        max_bytes=max_bytes,
        max_age_seconds=max_age_seconds,
        accept_loss=accept_loss,
    )
