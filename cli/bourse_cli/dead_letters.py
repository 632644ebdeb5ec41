"""`bourse dead-letters`: what could not be used, why, and its bytes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import click

from bourse_cli.options import cluster_options
from bourse_cli.tail import read_topic
from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEAD_LETTERS

__all__ = ["dead_letters"]


class Found(NamedTuple):
    """A dead letter and its offset, by which it is named."""

    offset: int
    letter: DeadLetter


def _letters(cluster: Cluster, chosen: dict[str, Any]) -> Iterator[Found]:
    decode = cluster.registry().deserializer(DeadLetter)
    for message in read_topic(cluster, DEAD_LETTERS.full_name(cluster.prefix)):
        value = message.value()
        try:
            letter = decode(value if isinstance(value, bytes) else None)
        except Undecodable as error:
            click.echo(f"{message.offset()}: {error}", err=True)
            continue
        day = chosen["day"]
        if (
            (chosen["stage"] in {None, letter.stage})
            and (chosen["reason"] in {None, letter.reason})
            and (chosen["consumer"] in {None, letter.consumer})
            and (day is None or day <= letter.failed_at < day + timedelta(days=1))
        ):
            yield Found(int(message.offset() or 0), letter)


def _day(_: click.Context, __: click.Parameter, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a date such as 2026-11-23") from None


def _filters(command: Any) -> Any:
    for option in (
        click.option("--day", callback=_day, metavar="DATE", help="Of this day only, in UTC."),
        click.option("--consumer", help="Of this consumer only."),
        click.option("--reason", type=click.Choice([*Reason]), help="For this reason only."),
        click.option("--stage", type=click.Choice([*Stage]), help="PARSE: rows of the exchange; CONSUME: records."),
    ):
        command = option(command)
    return command


@click.group
def dead_letters() -> None:
    """Show what could not be used, with the reason and the bytes."""


@dead_letters.command("list")
@_filters
@click.option("--limit", type=click.IntRange(1), help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, payloads as base64.")
@cluster_options
def list_letters(cluster: Cluster, *, limit: int | None, as_json: bool, **chosen: Any) -> None:
    """List dead letters, a line each, the newest last."""
    from bourse_schemas.codec import to_json

    width = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10_000
    found = list(_letters(cluster, chosen))
    if not found:
        click.echo("none", err=True)
    for offset, letter in found[-(limit or 0) :]:
        if as_json:
            click.echo(to_json({"offset": offset, **_fields(letter)}))
            continue
        who = letter.consumer or letter.stage
        line = f"{offset:>6}  {letter.failed_at:%Y-%m-%d %H:%M:%S}  {letter.reason}  {who}  {letter.origin}  "
        click.echo((line + letter.message)[:width])


@dead_letters.command
@click.argument("offset", type=click.IntRange(0))
@click.option("--raw", is_flag=True, help="Write the payload's bytes to stdout, and nothing else.")
@cluster_options
def show(cluster: Cluster, *, offset: int, raw: bool) -> None:
    """Show everything about one dead letter."""
    (found,) = _named(cluster, [offset])
    if raw:
        sys.stdout.buffer.write(found.letter.payload)
        return
    for name, value in _fields(found.letter).items():
        if value not in (None, {}):
            click.echo(f"{name:<18}{_text(value) if isinstance(value, bytes) else value}")


def _named(cluster: Cluster, offsets: Sequence[int]) -> list[Found]:
    wanted = set(offsets)
    found = [each for each in _letters(cluster, dict.fromkeys(CHOICES)) if each.offset in wanted]
    if missing := wanted - {each.offset for each in found}:
        raise ConfigurationError(f"no dead letter {min(missing)}: `bourse dead-letters list` shows those there are")
    return found


CHOICES = ("stage", "reason", "consumer", "day")


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return {name: getattr(letter, name) for name in letter.__struct_fields__}


def _text(payload: bytes) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError:
        return payload.hex(" ")
