"""`bourse tail`: show the decoded records of a topic as they are committed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import cluster_options, declared_topic
from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import Topic

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message

__all__ = ["read_topic", "tail"]


@click.command
@click.argument("topic", metavar="TOPIC")
@click.option("--from-beginning", is_flag=True, help="Begin with the oldest record instead of the next one.")
@click.option("--exit-at-end", is_flag=True, help="End after the last record of the topic.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with the Avro field names.")
@click.option("--with-metadata", is_flag=True, help="Add _topic, _partition, _offset, _timestamp, _key and _headers.")
@click.option("--key", help="Only records with this key.")
@click.option("--limit", type=click.IntRange(min=1), help="End after N records.")
@cluster_options
def tail(
    cluster: Cluster,
    *,
    topic: str,
    from_beginning: bool,
    exit_at_end: bool,
    as_json: bool,
    with_metadata: bool,
    key: str | None,
    limit: int | None,
) -> None:
    """Show the decoded records of a topic (trades, candles, polls, alerts, dead-letters) as they are committed."""
    from bourse_schemas.codec import to_json

    declared = declared_topic(topic, cluster.prefix)
    name = declared.full_name(cluster.prefix)
    partitions = cluster.require_topics([name])[name]
    decode = cluster.registry().deserializer(declared.event)
    consumer = cluster.consumer(enable_partition_eof=True)
    shown = 0
    # Ctrl-C is heard in the background too, as the services do.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for message in _messages(consumer, name, partitions, from_beginning=from_beginning, exit_at_end=exit_at_end):
            raw_key = message.key()
            text_key = raw_key.decode(errors="replace") if isinstance(raw_key, bytes) else raw_key
            if key is not None and text_key != key:
                continue
            try:
                fields = decode.fields(_bytes(message.value()))
            except Undecodable as error:
                click.echo(f"{name}-{message.partition()}-{message.offset()}: {error}", err=True)
                continue
            if with_metadata:
                fields |= _metadata(message, text_key)
            click.echo(to_json(fields) if as_json else _line(fields, text_key, declared))
            shown += 1
            if shown == limit:
                break
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # The reader is gone (`bourse tail … | head`): nothing is left to say, not even when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        consumer.close()


def read_topic(cluster: Cluster, name: str) -> Iterator[Message]:
    """Yield a topic's committed records from its beginning to its present end."""
    partitions = cluster.require_topics([name])[name]
    consumer = cluster.consumer(enable_partition_eof=True)
    try:
        yield from _messages(consumer, name, partitions, from_beginning=True, exit_at_end=True)
    finally:
        consumer.close()


def _messages(
    consumer: Consumer, topic: str, partitions: int, *, from_beginning: bool, exit_at_end: bool
) -> Iterator[Message]:
    from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, TopicPartition

    start = OFFSET_BEGINNING if from_beginning else OFFSET_END
    consumer.assign([TopicPartition(topic, number, start) for number in range(partitions)])
    ended: set[int | None] = set()
    while not (exit_at_end and len(ended) == partitions):
        for message in consumer.consume(1000, 0.2):
            error = message.error()
            if error is None:
                ended.discard(message.partition())
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # the client's public name for it
                ended.add(message.partition())
            elif error.code() in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.UNKNOWN_TOPIC_OR_PART}:
                raise ConfigurationError(f"{topic} cannot be read: {error.str()}")


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _metadata(message: Message, key: str | None) -> dict[str, Any]:
    from datetime import UTC, datetime

    pairs: Any = message.headers() or []
    headers = {name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in pairs}
    return {
        "_topic": message.topic(),
        "_partition": message.partition(),
        "_offset": message.offset(),
        "_timestamp": datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC),
        "_key": key,
        "_headers": headers,
    }


def _line(fields: Mapping[str, Any], key: str | None, topic: Topic) -> str:
    """Return a record as a line for people: what is null or repeats the key is left out."""
    from bourse_schemas.codec import to_json

    plain = json.loads(to_json({name: value for name, value in fields.items() if value not in (None, {}, [])}))
    instant = str(plain.get("observed_at") or plain.get("received_at") or plain.get("raised_at") or "")
    hidden = {"symbol_raw", "instrument", "observed_at", "event_id", topic.key_doc}
    shown = (f"{name}={value}" for name, value in plain.items() if name not in hidden)
    return f"{instant} {key or '-'} {' '.join(shown)}".strip()
