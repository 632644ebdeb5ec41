"""`bourse dead-letters`: what could not be used, why, and its bytes."""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Iterator
from datetime import datetime

import click
from msgspec.structs import asdict

from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS


def _letters(cluster: Cluster, offset: int | None = None) -> Iterator[tuple[int, DeadLetter]]:
    """Yield dead letters with their offsets, which name them; with `offset` only this one."""
    from bourse_schemas.reading import read

    name = DEAD_LETTERS.full_name(cluster.prefix)
    decode = cluster.registry().deserializer(DeadLetter)
    start = end = None
    if offset is not None:
        start = {(name, number): offset for number in range(cluster.require_topics([name])[name])}
        end = dict.fromkeys(start, offset + 1)
    for record in read(cluster, name, start=start, end=end):
        try:
            yield record.offset, decode(record.value)
        except Undecodable as error:
            click.echo(f"{record.offset}: {error}", err=True)


@click.group
def dead_letters() -> None:
    """Show what could not be used, with the reason and the bytes."""


@dead_letters.command("list")
@click.option("--stage", type=click.Choice([*Stage]), help="PARSE: rows of the exchange; CONSUME: records.")
@click.option("--reason", type=click.Choice([*Reason]), help="For this reason only.")
@click.option("--consumer", help="Of this consumer only.")
@click.option("--day", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="Of this day only, in UTC.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, payloads as base64.")
@cluster_options
def list_letters(
    cluster: Cluster,
    *,
    limit: int | None,
    as_json: bool,
    stage: str | None,
    reason: str | None,
    consumer: str | None,
    day: datetime | None,
) -> None:
    """List dead letters, a line each, the newest last."""
    from bourse_schemas.codec import to_json

    width = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10_000
    found = (
        (offset, letter)
        for offset, letter in _letters(cluster)
        if stage in {None, letter.stage}
        and reason in {None, letter.reason}
        and consumer in {None, letter.consumer}
        and (day is None or day.date() == letter.failed_at.date())
    )
    shown = False
    for offset, letter in found if limit is None else deque(found, limit):
        shown = True
        if as_json:
            click.echo(to_json({"offset": offset, **asdict(letter)}))
            continue
        who = letter.consumer or letter.stage
        line = f"{offset:>6}  {letter.failed_at:%Y-%m-%d %H:%M:%S}  {letter.reason}  {who}  {letter.origin}  "
        click.echo((line + letter.message)[:width])
    if not shown:
        click.echo("none", err=True)


@dead_letters.command
@click.argument("offset", type=click.IntRange(0))
@click.option("--raw", is_flag=True, help="Write the payload's bytes to stdout, and nothing else.")
@cluster_options
def show(cluster: Cluster, *, offset: int, raw: bool) -> None:
    """Show everything about one dead letter."""
    letter = next((letter for _, letter in _letters(cluster, offset)), None)
    if letter is None:
        raise ConfigurationError(f"no dead letter {offset}: `bourse dead-letters list` shows those that exist")
    if raw:
        sys.stdout.buffer.write(letter.payload)
        return
    for name, value in asdict(letter).items():
        if value not in (None, {}):
            click.echo(f"{name:<18}{_text(value) if isinstance(value, bytes) else value}")


def _text(payload: bytes) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError:
        return payload.hex(" ")
