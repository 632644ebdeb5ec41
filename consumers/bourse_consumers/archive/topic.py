"""What a topic still has of an archive's ranges, read from Kafka."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pyarrow as pa

from bourse_consumers.api import Partition, Places
from bourse_consumers.archive.care import Topics
from bourse_consumers.archive.files import Range
from bourse_consumers.archive.store import Store
from bourse_consumers.columns import Columns
from bourse_consumers.rows import to_table
from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import FIRST, TopicRecord, offsets, read
from bourse_schemas.topics import TOPICS, Topic

__all__ = ["read_topic", "topics_of"]

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

    # Ranges mostly join: the reader stays where it is, with the record that follows the last range.
    position: tuple[Partition, int] | None = None
    records: Iterator[TopicRecord] = iter(())

    def rows(span: Range) -> pa.Table | None:
        nonlocal position, records
        if position != (span.partition, span.start):
            # What the topic deletes meanwhile is not passed over.
            records = read(cluster, name, start={(name, span.partition.number): span.start}, reset="error")
        position, tables, found = None, [], Found()
        for record in records:
            if record.offset >= span.next:
                position, records = (span.partition, span.next), chain([record], records)
                break
            found.append((record.offset, record.timestamp, record.value))
            if len(found) == CHUNK:
                tables.append(table(found, span.partition))
                found = Found()
        if found:
            tables.append(table(found, span.partition))
        filled = [part for part in tables if part is not None]
        return pa.concat_tables(filled) if filled else None

    places = [(name, number) for number in range(partitions)]
    first = offsets(cluster, dict.fromkeys(places, FIRST))
    return Topics({Partition(*place): at for place, at in first.items()}, rows)


def _places(found: Found, partition: Partition) -> Places:
    offsets, timestamps, values = zip(*found, strict=True)
    return Places([partition] * len(found), offsets, timestamps, values)
