"""Verify an archive: what the topic still has of it, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import click
import pyarrow as pa

from bourse_consumers.api import Batch, Partition, Record
from bourse_consumers.archive.proof import Kept, Report
from bourse_consumers.columns import Columns
from bourse_schemas.errors import Undecodable
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import FIRST, LAST, offsets, read
from bourse_schemas.topics import Topic

__all__ = ["kept_by", "show"]

CHUNK = 20_000


def kept_by(cluster: Cluster, topic: Topic, name: str) -> Kept:
    """Return what a topic still has, decoded by its writers' schemas."""
    places = [(name, number) for number in range(cluster.require_topics([name])[name])]
    first, end = (offsets(cluster, dict.fromkeys(places, which)) for which in (FIRST, LAST))
    decode = cluster.registry().deserializer(topic.event)
    columns = Columns(decode)

    def table(records: list[Record]) -> pa.Table:
        return Batch(records, {}, decode=lambda record: decode(record.value), columns=columns.read).table()

    def decodable(record: Record) -> bool:
        try:
            decode(record.value)
        except Undecodable:
            return False  # it is a dead letter, and not archived
        return True

    def rows(number: int, start: int, end: int) -> Iterator[pa.Table]:
        place = (name, number)
        # What the topic deletes meanwhile is not skipped silently.
        found = read(cluster, name, start={place: start}, end={place: end}, reset="error") if start < end else iter(())
        while chunk := list(islice(found, CHUNK)):
            records = [Record(Partition(*each.place), *each[1:]) for each in chunk]
            try:
                yield table(records)
            except Undecodable:
                if records := list(filter(decodable, records)):
                    yield table(records)

    return Kept({number: (first[place], end[place]) for place in places for number in place[1:]}, rows)


def show(report: Report, *, as_json: bool) -> None:
    """Print a report; the exit code is 1 if it has findings."""
    if as_json:
        click.echo(json.dumps({"ok": not report.findings, **asdict(report)}, default=str))
    else:
        for number, (first, following) in sorted(report.partitions.items()):
            click.echo(f"{report.topic}-{number}: offsets {first} to {following - 1}")
        for each in report.findings:
            place = [f"{name} {each[name]}" for name in ("file", "day", "partition") if name in each]
            place += [f"offsets {each['first']} to {each['last']}"] if "first" in each else []
            click.echo(f"FINDING {', '.join([*place, ''])}{each['what']}")
        click.echo(
            f"{report.rows:,} rows of {report.days} days in {report.files} files, {report.compared:,} compared with "
            f"the topic, {report.behind:,} not archived yet, {report.lost:,} offsets in recorded holes"
        )
        if report.polls:
            click.echo(f"polls {report.polls[0]} to {report.polls[1]} have the rows that their markers count")
        click.echo(f"{len(report.findings)} findings" if report.findings else "ok: nothing is missing or stored twice")
    click.get_current_context().exit(1 if report.findings else 0)
