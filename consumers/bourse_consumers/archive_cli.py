"""`bourse archive`: verifies, optimizes and reads an archive."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from bourse_cli.options import cluster_options
from bourse_consumers.archive.command import NAMES, TO, TOPIC, one_table, tables
from bourse_schemas.errors import BourseError, ConfigurationError, counted
from bourse_schemas.events import TEHRAN
from bourse_schemas.kafka import Cluster

__all__ = ["archive"]

# Options that are Gregorian days.
DAY: dict[str, Any] = {
    "type": click.DateTime(["%Y-%m-%d"]),
    "metavar": "DATE",
    "callback": lambda _, __, value: value and value.date(),
}


@contextmanager
def whole_days() -> Iterator[None]:
    """Raise the store's error as what it means to the operator of a command that changes a table."""
    from bourse_consumers.archive.storage import StoreError

    try:
        yield
    except StoreError as error:
        raise BourseError(f"{error}; no day is half changed: run it again when the cause is gone") from error


@click.group
def archive() -> None:
    """Verify, optimize and read an archive."""


ONE = click.option("--topic", type=NAMES, help="Only this topic. [default: all that are there]")


@archive.command
@click.option("--to", required=True, metavar="FOLDER|s3://…|postgresql://…", help="Where the archive is.")
@ONE
@click.option("--schema", default="bourse", show_default=True, help="Schema of the tables in a database.")
@click.option("--no-topic", "alone", is_flag=True, help="Do not compare with what the topics still have.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each table.")
@cluster_options
@click.pass_context
def verify(
    ctx: click.Context, cluster: Cluster, *, to: str, topic: str | None, schema: str, alone: bool, as_json: bool
) -> None:
    """Prove that an archive has every event once: files, offsets, sequences, totals, polls, and the topic itself.

    Exit 1 if there are findings.
    """
    from bourse_consumers.archive.verify import kept_by, kept_for, show
    from bourse_consumers.archive.verify import verify as check

    if to.startswith(("postgresql://", "postgres://")):
        from bourse_consumers.postgres.command import require_no_password
        from bourse_consumers.postgres.proof import verify as check_tables

        require_no_password(to, "--to")
        kept = None if alone else partial(kept_by, cluster)
        reports = check_tables(to, topic, schema=schema, prefix=cluster.prefix, kept=kept)
    else:
        reports = [check(each, None if alone else kept_for(cluster, each)) for each in tables(to, topic)]
    for report in reports:
        show(report, as_json=as_json)
    ctx.exit(any(report.findings for report in reports))


@archive.command
@TO
@ONE
@click.option("--from-topic", is_flag=True, help="Write them again. Without it they are listed.")
@cluster_options
@click.pass_context
@whole_days()
def repair(ctx: click.Context, cluster: Cluster, *, to: str, topic: str | None, from_topic: bool) -> None:
    """Verify an archive and write the days and partitions that have findings again, from what the topics still have.

    Archivers and readers may run meanwhile. Exit 1 if findings are left.
    """
    from bourse_consumers.archive.repair import repair as write_again
    from bourse_consumers.archive.verify import kept_for, progress, show
    from bourse_consumers.archive.verify import verify as check

    left = False
    for table in tables(to, topic):
        kept = kept_for(cluster, table)
        report = check(table, kept)
        show(report)
        if from_topic and report.damaged:
            with progress(range(0), f"{table.name} again") as bar:
                there = kept(bar.update)
                bar.length = sum(end - start for start, end in there.ends.values())
                repaired, lost = write_again(table, report, there)
            click.echo(f"{table.name}: written again: {', '.join(map(str, sorted(repaired))) or 'nothing'}")
            if lost:
                click.echo(f"{table.name}: not whole on the topic any more: {', '.join(map(str, sorted(lost)))}")
            report = check(table, kept)
            show(report)
        left = left or bool(report.findings)
    ctx.exit(left)


@archive.command
@TO
@ONE
@click.option("--before", **DAY, help="Days before this one. [default: today in Tehran]")
@click.option("--day", **DAY, help="Only this day.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
@whole_days()
def optimize(
    ctx: click.Context, *, to: str, topic: str | None, before: date | None, day: date | None, as_json: bool
) -> None:
    """Verify closed days and merge their files. Readers and archivers may run meanwhile.

    Exit 1 if a day has findings; such a day is left as it is.
    """
    from bourse_consumers.archive.maintenance import optimize as merge
    from bourse_consumers.archive.maintenance import unoptimized
    from bourse_consumers.archive.verify import progress

    today = datetime.now(TEHRAN).date()
    done: list[tuple[date, int, int, list[Any]]] = []
    for table in tables(to, topic):
        with progress(unoptimized(table, min(before or today, today), day), table.name) as days:
            done += merge(table, days)
    findings = [finding for *_, found in done for finding in found]
    first_bad = min((each for each, *_, found in done if found), default=date.max)  # no later day may hide it
    verified = max((each for each, *_ in done if each < first_bad), default=None)
    had, has = sum(each[1] for each in done), sum(each[2] for each in done)
    if as_json:
        about = {"verified_day": verified, "days": len(done), "files_before": had, "files": has}
        click.echo(json.dumps({**about, "findings": findings}, default=str))
    else:
        for finding in findings:
            click.echo(f"FINDING {', '.join(f'{name} {value}' for name, value in finding.items())}")
        click.echo(f"{counted(len(done), 'day')}: {had} → {counted(has, 'file')}")
    ctx.exit(1 if findings else 0)


@archive.command
@TO
@TOPIC
@click.option("--before", **DAY, required=True, help="Remove the days before this one.")
@whole_days()
def forget(*, to: str, topic: str, before: date) -> None:
    """Remove old days from the table. Their files are deleted when it is optimized, seven days later."""
    from bourse_consumers.archive.maintenance import forget as remove

    if before > datetime.now(TEHRAN).date():
        raise ConfigurationError(f"--before {before}: this day is in the future")
    files = remove(one_table(to, topic), before)
    days, rows = len({file.day for file in files}), sum(file.rows for file in files)
    click.echo(f"{counted(days, 'day')} removed, {counted(rows, 'row')}")


@archive.command
@TO
@TOPIC
@click.option("--day", **DAY, required=True, help="Which day.")
@click.option("--instrument", "instruments", multiple=True, help="Only these, by code or symbol. Repeatable.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def export(*, to: str, topic: str, day: date, instruments: tuple[str, ...], file: Path) -> None:
    """Write a day's rows to FILE.csv or FILE.parquet, in the order of their offsets.

    CSV is for spreadsheets: UTF-8 with a byte order mark, without the columns that have maps, lists or bytes. A text
    that a spreadsheet would calculate begins with '.
    """
    import polars as pl

    from bourse_consumers.archive.verify import progress

    if file.suffix not in {".csv", ".parquet"}:
        raise ConfigurationError(f"{file}: the name ends with neither .csv nor .parquet")
    table = one_table(to, topic)
    if not (files := table.files(day)):
        raise ConfigurationError(f"{table.storage.uri} has no rows of {day}")
    with progress(files, f"{day}") as steps:
        frame = pl.DataFrame(table.arrow(steps))
    if instruments and "instrument" in frame.columns:
        frame = frame.filter(pl.col("instrument").is_in(instruments) | pl.col("symbol").is_in(instruments))
    if frame.is_empty() or (instruments and "instrument" not in frame.columns):
        raise ConfigurationError(f"no rows of {', '.join(instruments)} on {day}: use codes or symbols")
    try:
        if file.suffix == ".parquet":
            frame.write_parquet(file)
        else:
            plain = [name for name, kind in frame.schema.items() if not kind.is_nested() and kind != pl.Binary]
            # Spreadsheets calculate a text that begins like a formula.
            text, formula = pl.col(pl.String), r"^[=+\-@\t\r]"
            safe = pl.when(text.str.contains(formula)).then(pl.lit("'") + text).otherwise(text).name.keep()
            frame.select(plain).with_columns(safe).write_csv(file, include_bom=True)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be written: {error.strerror or error}") from error
