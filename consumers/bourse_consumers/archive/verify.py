"""Verify a table: its files, then its rows, against what the topic still has; and print the report.

That no commit is missing is checked when a table is opened.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import click
import polars as pl
import pyarrow as pa

from bourse_consumers.api import Batch, Decoders, Partition, Places, Record, Records
from bourse_consumers.archive.proof import COUNTED, Kept, Markers, Report, Stored, prove
from bourse_consumers.archive.storage import Damaged
from bourse_consumers.archive.table import File, Table
from bourse_schemas.errors import Undecodable, counted
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import FIRST, LAST, offsets, read_values
from bourse_schemas.topics import TRADES, Topic

__all__ = ["kept_by", "kept_for", "progress", "readable", "show", "verify"]

CHUNK = 20_000
Done = Callable[[int], None]


def verify(table: Table, kept: Callable[[Done], Kept] | None = None) -> Report:
    """Check a table; `kept` returns what the topic has. Polls are counted if their table is next to it."""
    files, report = table.files(), Report(table.name, files=len(table.files()))
    markers = _markers(table) if table.topic is TRADES else ""
    with progress(range(sum(file.rows for file in files)), table.name) as bar:
        there = None
        if kept:
            ends, rows = kept(bar.update)
            bar.length += sum(end - start for start, end in ends.values())
            there = Kept(ends, lambda *span: map(table.with_day, rows(*span)))
        days = (list(same) for _, same in groupby(files, attrgetter("day")))
        parts = (readable(table, same, report, bar.update) for same in days)
        prove(Stored(table.ends(), table.about["holes"], parts, markers), report, there)
    return report


def progress(steps: Iterable[Any], label: str) -> Any:
    """Return the steps as a context, counted on standard error if that is a terminal."""
    return click.progressbar(steps, label=label, file=sys.stderr, hidden=not sys.stderr.isatty())


def _markers(table: Table) -> Markers | str:
    uri = f"{table.storage.uri.removesuffix('trades')}polls"
    polls = Table.open(uri)
    if polls is None:
        return f"there is no table {uri}"
    damage = Report(polls.name)
    counts = readable(polls, polls.files(), damage).select(["poll_sequence", *COUNTED.values()])
    if damage.findings:
        return f"{uri} has findings"
    return Markers(pl.DataFrame(counts), from_start=all(first == 0 for first, _ in polls.ends().values()))


def readable(table: Table, files: list[File], report: Report, done: Done = lambda _: None) -> pa.Table:
    """Return the rows of those files that are as the log has them; report the others."""
    good = [table.arrow([])]
    for file in files:
        try:
            good.append(table.read(file))
        except Damaged as error:  # a store that failed proves nothing
            report.find(str(error), file.day, file.partitions, file.offsets, file=file.path)
        done(file.rows)
    return pa.concat_tables(good, promote_options="permissive")


def kept_for(cluster: Cluster, table: Table) -> partial[Kept]:
    """Return `kept_by` for a table; raise ConfigurationError if its rows came from another cluster or topic."""
    table.require_from(table.name, *cluster.identity(table.name))
    return partial(kept_by, cluster, table.topic, table.name)


def kept_by(cluster: Cluster, topic: Topic, name: str, done: Done = lambda _: None) -> Kept:
    """Return what a topic still has, decoded by its writers' schemas; `done` gets how many offsets were read."""
    places = [(name, number) for number in range(cluster.require_topics([name])[name])]
    first, end = (offsets(cluster, dict.fromkeys(places, which)) for which in (FIRST, LAST))
    decoders = Decoders({name: cluster.registry().deserializer(topic.event)})

    def batch(places: Places) -> Batch:
        records = Records(places, lambda: [Record(*each[:3], None, each[3], {}) for each in zip(*places, strict=True)])
        return Batch(records, {}, decoders)

    def decoded(places: Places) -> list[pa.Table]:
        try:
            return [batch(places).all_fields()]
        except Undecodable:  # somewhere is a dead letter, which is not archived
            half = len(places.offsets) // 2
            halves = (Places(*(column[side] for column in places)) for side in (slice(half), slice(half, None)))  # type: ignore[arg-type]  # columns all of them
            return [table for each in halves if half for table in decoded(each)]

    def rows(number: int, start: int, end: int) -> Iterator[pa.Table]:
        ahead: Future[list[pa.Table]] | None = None
        found = read_values(cluster, (name, number), start, end, count=CHUNK) if start < end else iter(())
        with ThreadPoolExecutor(1) as decoder:  # one chunk is decoded while the next one is read
            for read in found:
                ready, ahead = ahead, decoder.submit(decoded, Places([Partition(name, number)] * len(read[0]), *read))
                yield from ready.result() if ready else ()
                done(read[0][-1] + 1 - start)
                start = read[0][-1] + 1
            yield from ahead.result() if ahead else ()

    return Kept({place[1]: (first[place], end[place]) for place in places}, rows)


def show(report: Report, *, as_json: bool = False) -> None:
    """Print a report."""
    if as_json:
        done = {"ok": not report.findings, **asdict(report), "damaged": sorted(report.damaged)}
        click.echo(json.dumps(done, default=str))
        return
    for number, (first, following) in sorted(report.partitions.items()):
        click.echo(f"{report.topic}-{number}: offsets {first} to {following - 1}")
    for each in report.findings:
        place = {name: " to ".join(map(str, it)) if isinstance(it, tuple) else it for name, it in each.items() if it}
        what = place.pop("what")
        click.echo(f"FINDING {', '.join([*(f'{name} {it}' for name, it in place.items()), what])}")
    click.echo(
        f"{counted(report.rows, 'row')} of {counted(report.days, 'day')} in {counted(report.files, 'file')}, "
        f"{report.compared:,} compared with the topic, {report.behind:,} not archived yet, "
        f"{counted(report.lost, 'offset')} in recorded holes"
    )
    if report.polls:
        click.echo(f"polls {report.polls[0]} to {report.polls[1]} were compared with their markers")
    for note in report.notes:
        click.echo(note)
    click.echo(
        counted(len(report.findings), "finding") if report.findings else "ok: nothing is missing or stored twice"
    )
