"""`bourse replay`: what captured responses must have given, beside what the topics hold."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import click

from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import POLLS, TRADES

__all__ = ["replay"]


@click.command
@click.argument("captures", nargs=-1, required=True, metavar="CAPTURE…", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One event a line, as `bourse tail --json` shows them.")
@click.option(
    "--against",
    metavar="HOST:PORT",
    help="Compare with the topics of these brokers.",
)
@cluster_options
@click.pass_context
def replay(
    ctx: click.Context, cluster: Cluster, captures: tuple[Path, ...], *, as_json: bool, against: str | None
) -> None:
    """Derive the events again, from a producer's captures or from captured days (*.ndjson.gz).

    The same bytes give the same events. With --against they are compared with the topics; exit 1 if they differ.
    """
    from msgspec.structs import asdict

    from bourse_producer.replay import Replay, Topics
    from bourse_schemas.codec import to_json
    from bourse_schemas.events import Op

    found = None
    derived = Replay()
    if against is not None:
        cluster = replace(cluster, bootstrap_servers=against)
        cluster.require_topics([topic.full_name(cluster.prefix) for topic in (POLLS, TRADES)])
        found = Topics(cluster)
        derived.markers = found.markers
    files = [file for path in captures for file in (sorted(path.glob("capture-*.gz")) if path.is_dir() else [path])]
    if missing := [path for path in files if not path.is_file()]:
        raise ConfigurationError(f"{missing[0]}: no such file")
    if not files:
        raise ConfigurationError(f"{captures[0]} holds no capture-*.gz")
    days = [file for file in files if file.name.endswith(".ndjson.gz")]
    derived.capture([file for file in files if file not in days])
    for file in days:
        derived.day(file)
    for words in derived.said:
        click.echo(words, err=True)
    if found is not None:
        counts = found.compare(derived)
        click.echo(json.dumps(counts))
        ctx.exit(int(counts["equal"] != counts["derived"] or counts["found"] != counts["derived"]))
    if as_json:
        for event in derived.events:
            click.echo(to_json(asdict(event)))
        return
    by_day: dict[date, Counter[str]] = {}
    for event in derived.events:
        by_day.setdefault(event.trading_day, Counter())[event.op] += 1
    ops = (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)
    for day, count in sorted(by_day.items()):
        click.echo(f"{day}  {count.total():>8,} events  " + "  ".join(f"{count[op]:>7,} {op}" for op in ops))
    click.echo(f"{len(derived.polls):,} polls, {len(derived.events):,} events")
