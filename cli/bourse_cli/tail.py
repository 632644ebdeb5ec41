"""`bourse tail`: show the decoded records of a topic as they are committed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import cluster_options, declared_topic
from bourse_schemas.errors import ConfigurationError, Undecodable, did_you_mean, printable
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import Topic

if TYPE_CHECKING:
    from bourse_schemas.reading import TopicRecord

# In a row; then it is not the records that are wrong.
MOST_UNDECODABLE = 20
METADATA = ("_topic", "_partition", "_offset", "_timestamp", "_key", "_headers")


@click.command
@click.argument("topic", metavar="TOPIC")
@click.option("--from-beginning", is_flag=True, help="Begin with the oldest record instead of the next one.")
@click.option("--exit-at-end", is_flag=True, help="End after the last record that is committed now.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with the Avro field names.")
@click.option("--fields", metavar="NAME,…", help="Only these fields, in this order; see also --with-metadata.")
@click.option("--with-metadata", is_flag=True, help=f"Add {', '.join(METADATA[:-1])} and {METADATA[-1]}.")
@click.option("--key", help="Only records with this key.")
@click.option("--limit", type=click.IntRange(min=1), help="End after N records.", metavar="N")
@cluster_options
def tail(
    cluster: Cluster,
    *,
    topic: str,
    from_beginning: bool,
    exit_at_end: bool,
    as_json: bool,
    fields: str | None,
    with_metadata: bool,
    key: str | None,
    limit: int | None,
) -> None:
    """Show the decoded records of a topic (trades, candles, polls, alerts, dead-letters) as they are committed."""
    from bourse_schemas.codec import to_json

    declared = declared_topic(topic, cluster.prefix)
    names = _names(fields, declared)
    decode = cluster.registry().deserializer(declared.event)
    shown = undecodable = 0
    # Python ignores Ctrl-C in the background otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for record in _records(cluster, declared.full_name(cluster.prefix), from_beginning, exit_at_end):
        text_key = record.key.decode(errors="replace") if record.key is not None else None
        if key is not None and text_key != key:
            continue
        try:
            values = decode.fields(record.value)
        except Undecodable as error:
            click.echo(f"{record.place[0]}-{record.place[1]}-{record.offset}: {error}", err=True)
            undecodable += 1
            if undecodable == MOST_UNDECODABLE:
                raise ConfigurationError(
                    f"{undecodable} records in a row cannot be decoded: is --registry-url {cluster.registry_url} "
                    "the registry that their producers use?"
                ) from error
            continue
        undecodable = 0
        if with_metadata or not names.keys().isdisjoint(METADATA):
            values |= _metadata(record, text_key)
        if names:
            values = {name: values[name] for name in names}
        click.echo(to_json(values) if as_json else _line(values, text_key, declared, chosen=bool(names)))
        shown += 1
        if shown == limit:
            break


def _names(fields: str | None, topic: Topic) -> dict[str, None]:
    names = dict.fromkeys(name.strip() for name in fields.split(",")) if fields is not None else {}
    known = (*topic.event.__struct_fields__, *METADATA)
    for name in names:
        if name not in known:
            raise ConfigurationError(f"--fields: {topic.name} has no field {name!r}{did_you_mean(name, known)}")
    return names


def _records(cluster: Cluster, name: str, from_beginning: bool, exit_at_end: bool) -> Iterator[TopicRecord]:
    from bourse_schemas.reading import follow, read

    tail = None if from_beginning else 0
    if exit_at_end:
        yield from read(cluster, name, tail=tail)
        return
    trouble = None
    for batch in follow(cluster, {name: tail}):
        signal.signal(signal.SIGINT, lambda *_: sys.exit())  # the usual end, once Kafka has answered
        yield from batch.records
        if batch.trouble not in {None, trouble}:
            click.echo(f"{name}: {batch.trouble}; trying again", err=True)
        trouble = batch.trouble


def _metadata(record: TopicRecord, key: str | None) -> dict[str, Any]:
    from datetime import UTC, datetime

    headers = {name: value.decode(errors="replace") for name, value in record.headers.items()}
    instant = datetime.fromtimestamp(record.timestamp / 1000, UTC)
    return dict(zip(METADATA, (*record.place, record.offset, instant, key, headers), strict=True))


def _line(fields: Mapping[str, Any], key: str | None, topic: Topic, *, chosen: bool) -> str:
    """Return a record as a line for people, without fields that are null or repeat the key unless they were chosen."""
    import json

    from bourse_schemas.codec import to_json

    plain = json.loads(to_json(fields))
    if chosen:
        return printable(" ".join(f"{name}={'-' if value is None else value}" for name, value in plain.items()))
    instant = plain.get("observed_at") or plain.get("received_at") or plain.get("raised_at") or ""
    hidden = {"symbol_raw", "instrument", "observed_at", "event_id", topic.key_doc}
    shown = (f"{name}={value}" for name, value in plain.items() if name not in hidden and value not in (None, {}, []))
    return printable(f"{instant} {key or '-'} {' '.join(shown)}".strip())
