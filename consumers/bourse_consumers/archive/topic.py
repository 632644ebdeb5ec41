"""What a topic still has of an archive's ranges, read from Kafka."""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import Any, cast

import pyarrow as pa
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from bourse_consumers.api import Partition, Places
from bourse_consumers.archive.care import Topics
from bourse_consumers.archive.files import Range
from bourse_consumers.archive.store import Store
from bourse_consumers.columns import Columns
from bourse_consumers.rows import to_table
from bourse_schemas.errors import ConfigurationError, Undecodable, Unreachable
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS, Topic

__all__ = ["read_topic", "topics_of"]

SECONDS = 30.0
CHUNK = 5_000
Found = list[tuple[int, int, bytes | None]]


def topics_of(cluster: Cluster, store: Store) -> Topics | None:
    """Return what the topic of an archive still has, None where the archive is empty; raise ConfigurationError."""
    paths = store.paths()
    if not paths:
        return None
    name = paths[0].rpartition("/")[2].rsplit("-", 2)[0]
    declared = next((topic for topic in TOPICS if topic.full_name(name.rpartition(".")[0]) == name), None)
    if declared is None:
        raise ConfigurationError(f"{store}: {name} is none of our topics")
    return read_topic(cluster, declared, name)


def read_topic(cluster: Cluster, declared: Topic, name: str) -> Topics:
    """Return what a topic of this name still has."""
    partitions = cluster.require_topics([name])[name]
    client = cluster.consumer(enable_partition_eof=True, auto_offset_reset="error")
    decode = cluster.registry().deserializer(declared.event)
    columns = Columns(decode)

    def table(found: Found, partition: Partition) -> pa.Table | None:
        whole = columns.read(_places(found, partition))
        if whole is not None:
            return whole.table()
        events, good = [], Found()
        for entry in found:
            # What cannot be decoded is a dead letter, and not in the archive.
            try:
                events.append(decode(entry[2]))
                good.append(entry)
            except Undecodable:
                continue
        return to_table(events, _places(good, partition)) if good else None

    # Ranges mostly join: what was fetched beyond the last one is kept, and the client stays where it is.
    ahead = Found()
    place: tuple[Partition, int] | None = None
    ended = False

    def rows(span: Range) -> pa.Table | None:
        nonlocal ahead, place, ended
        if place != (span.partition, span.start):
            client.assign([TopicPartition(*span.partition, span.start)])
            ahead, ended = Found(), False
        tables, found = [], ahead
        while not ended and (not found or found[-1][0] < span.next):
            for message in client.consume(CHUNK, 0.05):
                error, value = message.error(), cast("Any", message.value())
                if error is None:
                    found.append((int(message.offset() or 0), message.timestamp()[1], value))
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # its public name
                    ended = True
                else:
                    raise Unreachable(f"{name} cannot be read: {error.str()}")
            if found and found[-1][0] < span.next and (part := table(found, span.partition)) is not None:
                tables.append(part)
                found = Found()
        within = bisect_left(found, span.next, key=itemgetter(0))
        place, ahead = (span.partition, span.next), found[within:]
        if within and (part := table(found[:within], span.partition)) is not None:
            tables.append(part)
        return pa.concat_tables(tables) if tables else None

    try:
        places = [Partition(name, number) for number in range(partitions)]
        first = {each: client.get_watermark_offsets(TopicPartition(*each), SECONDS)[0] for each in places}
    except KafkaException as error:
        raise Unreachable(f"{name} cannot be read: {error.args[0].str()}") from error
    return Topics(first, rows)


def _places(found: Found, partition: Partition) -> Places:
    offsets, timestamps, values = zip(*found, strict=True)
    return Places([partition] * len(found), offsets, timestamps, values)
