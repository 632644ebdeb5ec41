"""`bourse archive`: proves, compacts and reads an archive."""

from __future__ import annotations

import json
import sys
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError, PublishError
from bourse_schemas.events import TEHRAN
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS

if TYPE_CHECKING:
    from bourse_consumers.archive.store import Store

__all__ = ["archive"]


class _Day(click.ParamType[date]):
    name = "DATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        """Return a Gregorian day."""
        try:
            return value if isinstance(value, date) else date.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no day such as 2026-12-05", param, ctx)


DAY = _Day()


@click.group
def archive() -> None:
    """Prove, compact and read an archive of Parquet files."""


def _existing(to: str) -> Store:
    from bourse_consumers.archive.store import Folder, StoreError, open_store

    store = open_store(to)
    if isinstance(store, Folder) and not Path(to).is_dir():
        raise ConfigurationError(f"--to {to}: there is no such folder")
    try:
        store.paths()
    except StoreError as error:
        raise ConfigurationError(f"--to {to}: cannot be read: {error}") from error
    return store


TO = click.option(
    "--to", required=True, metavar="FOLDER|s3://BUCKET/PREFIX", help="Folder, bucket or database of the archive."
)


@archive.command
@click.option(
    "--to", required=True, metavar="FOLDER|s3://…|postgresql://…", help="Folder, bucket or database of the archive."
)
@click.option("--day", type=DAY, help="Check one day only.")
@click.option(
    "--polls", metavar="FOLDER|s3://…", help="An archive of the polls topic: every change must have its poll."
)
@click.option(
    "--table", type=click.Choice([topic.name for topic in TOPICS]), default="trades", help="Which topic, in a database."
)
@click.option("--schema", default="bourse", help="The schema that holds the tables, in a database.")
@click.option("--topic/--no-topic", "beside", default=True, help="Compare with what the topic still has, or do not.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@cluster_options
@click.pass_context
def verify(
    ctx: click.Context,
    cluster: Cluster,
    *,
    to: str,
    day: date | None,
    polls: str | None,
    table: str,
    schema: str,
    beside: bool,
    as_json: bool,
) -> None:
    """Prove that an archive holds every event once: offsets, sequences, totals, and the topic itself.

    Exit 0 if it does, otherwise 1.
    """
    from dataclasses import asdict

    from bourse_consumers.archive.care import verify as examine
    from bourse_consumers.archive.topic import topics_of

    if to.startswith(("postgresql://", "postgres://")):
        if polls:
            raise ConfigurationError(
                "--polls is for archives of files: a table of polls in the same schema is looked at"
            )
        _verify_postgres(to, cluster, table, schema, beside=beside, as_json=as_json)
    else:
        store = _existing(to)
        topics = topics_of(cluster, store) if beside else None
        report = examine(store, day, topics=topics, polls=_existing(polls) if polls else None)
    if as_json:
        click.echo(json.dumps({"ok": not report.faults, **asdict(report)}, default=str))
    else:
        for name, about in report.partitions.items():
            click.echo(f"{name:<24} [{about['start']}, {about['next']})  {about.get('digest', '')[:16]}")
        for fault in report.faults:
            click.echo(f"FAULT {fault['file']} {fault['range']}: {fault['what']}")
        if report.holes:
            click.echo(f"{report.holes} offsets were deleted by the topic before they were read; that was accepted")
        beside_topic = f", {report.compared:,} compared with the topic" if beside else ""
        click.echo(f"{report.rows:,} rows of {report.days} days in {report.files} files{beside_topic}")
        click.echo(f"{len(report.faults)} faults" if report.faults else "well: nothing is missing, nothing is twice")
    ctx.exit(1 if report.faults else 0)


def _verify_postgres(dsn: str, cluster: Cluster, table: str, schema: str, *, beside: bool, as_json: bool) -> None:
    from bourse_consumers.archive.verify import kept_by, show
    from bourse_consumers.postgres.command import require_no_password
    from bourse_consumers.postgres.proof import verify as examine

    require_no_password(dsn, "--to")
    topic = next(each for each in TOPICS if each.name == table)
    kept = partial(kept_by, cluster, topic, topic.full_name(cluster.prefix)) if beside else None
    show(examine(dsn, topic, schema=schema, prefix=cluster.prefix, kept=kept), as_json=as_json)


@archive.command
@TO
@click.option("--before", type=DAY, help="Days before this one. [default: today in Tehran]")
@click.option("--day", type=DAY, help="This day only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a day.")
def compact(*, to: str, before: date | None, day: date | None, as_json: bool) -> None:
    """Put the many small files of closed days together: about 128 MiB each, sorted by instrument.

    May be interrupted at any point, and may run while others write and read.
    """
    from bourse_consumers.archive.care import compact as put_together
    from bourse_consumers.archive.store import StoreError

    store = _existing(to)
    today = datetime.now(TEHRAN).date()
    try:
        for each, had, has in put_together(store, min(before or today, today), day):
            if as_json:
                click.echo(json.dumps({"day": f"{each}", "files_before": had, "files": has}))
            else:
                click.echo(f"{each}: {had} → {has} files")
    except StoreError as error:
        raise PublishError(f"stopped, nothing is lost: {error}; run it again") from error


def _rows(to: str, day: date | None, instruments: tuple[str, ...], columns: list[str] | None = None) -> Any:
    """Return the events of a day, of some instruments or all, in the order of their offsets."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from bourse_consumers.archive.files import catalog, read

    store = _existing(to)
    files = [file for file in catalog(store, day) if file.rows]
    if not files:
        raise ConfigurationError(f"{to} has nothing{f' of {day}' if day else ''}")
    table = read(store, files, columns)
    if instruments:
        if "instrument" not in table.column_names:
            raise ConfigurationError("--instrument: the rows of this topic have none")
        wanted = pa.array(instruments)
        table = table.filter(pc.or_(pc.is_in(table["instrument"], wanted), pc.is_in(table["symbol"], wanted)))
        if not table.num_rows:
            raise ConfigurationError(f"no rows of {', '.join(instruments)}: give codes or symbols")
    return table


def _out(frame: Any, form: str, output: Path | None) -> None:
    """Write a table as CSV, lines of JSON, or Parquet."""
    import polars as pl

    from bourse_schemas.codec import to_json

    if form == "parquet" and output is None and sys.stdout.isatty():
        raise ConfigurationError("Parquet is nothing for a terminal: give --output FILE")
    try:
        with output.open("wb") if output else click.open_file("-", "wb") as out:
            if form == "ndjson":
                for row in frame.iter_rows(named=True):
                    out.write(to_json(row).encode() + b"\n")
            elif form == "csv":
                nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
                frame.drop(nested).write_csv(out)
            else:
                frame.write_parquet(out)
    except (OSError, pl.exceptions.ComputeError) as error:
        if "Broken pipe" in str(error):  # polars hides the number
            raise BrokenPipeError from error
        raise ConfigurationError(f"--output {output or '-'}: {getattr(error, 'strerror', None) or error}") from error


FORMAT = click.option(
    "--format", "form", type=click.Choice(["csv", "ndjson", "parquet"]), default="csv", show_default=True
)
INSTRUMENT = click.option(
    "--instrument", "instruments", multiple=True, help="Only these, by code or by symbol. Repeatable."
)
OUTPUT = click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Into this file. [default: standard output]"
)


@archive.command
@TO
@click.option("--day", type=DAY, required=True, help="Which trading day.")
@FORMAT
@INSTRUMENT
@OUTPUT
def export(*, to: str, day: date, form: str, instruments: tuple[str, ...], output: Path | None) -> None:
    """Write a day's rows as CSV, lines of JSON, or Parquet, in the order of their offsets."""
    import polars as pl

    _out(pl.DataFrame(_rows(to, day, instruments)), form, output)


@archive.command
@TO
@click.option("--day", type=DAY, help="Only this trading day.")
@click.option("--every", type=click.Choice(["minute", "day"]), default="minute", show_default=True)
@FORMAT
@INSTRUMENT
@OUTPUT
def bars(
    *, to: str, day: date | None, every: str, form: str, instruments: tuple[str, ...], output: Path | None
) -> None:
    """Write bars of trades: open, high, low, last, volume. Prices in rial, minutes in UTC."""
    from bourse_consumers.archive.bars import day_bars, minute_bars

    table = _rows(to, day, instruments)
    if "volume_delta" not in table.column_names:
        raise ConfigurationError(f"--to {to}: bars are made of an archive of trades")
    _out(day_bars(table) if every == "day" else minute_bars(table), form, output)
