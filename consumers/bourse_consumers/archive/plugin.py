"""`bourse consume archive`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer

__all__ = ["archive"]


@click.command
@click.option("--to", "root", required=True, type=click.Path(path_type=Path), help="Folder of the archive.")
@click.option(
    "--max-rows", type=click.IntRange(1), default=50_000, show_default=True, help="Close a file at so many rows."
)
@click.option(
    "--max-bytes", type=click.IntRange(1), default=64 << 20, show_default=True, help="… or at so many bytes in memory."
)
@click.option(
    "--max-age-seconds",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="… or when its first row is so old.",
)
def archive(root: Path, max_rows: int, max_bytes: int, max_age_seconds: float) -> Consumer:
    """Write every trade event to Parquet files, exactly once."""
    from bourse_consumers.archive.parquet import ParquetArchive

    return ParquetArchive(root, max_rows, max_bytes, max_age_seconds)
