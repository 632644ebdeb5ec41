"""An archive's files: their names, what their metadata says they hold, and how they are written and read.

A file holds rows of one topic and one day, sorted by instrument. A plain one holds one range [start, next) of one
partition, and its name says where that starts: `bourse.trades-0-00000000000000000017.parquet`. A compacted one holds
all the ranges of a day that its metadata lists, and replaces the plain ones that held them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bourse_consumers.api import Partition
from bourse_consumers.archive.store import Store
from bourse_consumers.rows import dictionary_columns
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN

__all__ = [
    "File",
    "Range",
    "catalog",
    "compact",
    "count_rows",
    "current",
    "describe",
    "ends",
    "joined",
    "own",
    "plain_path",
    "read",
    "rivals",
    "runs",
    "write",
]

VERSION = 1
ABOUT = b"bourse.archive"
NAME = re.compile(
    r"trading_day=(?P<day>\d{4}-\d\d-\d\d)/(?P<topic>.+)-(?P<partition>\d+|compacted)-(?P<rest>\w+)\.parquet"
)
ROW_GROUP = 250_000
RECURRING = pa.dictionary(pa.int32(), pa.string())


class Range(NamedTuple):
    """The offsets [start, next) of one partition; `next` is where its reader was, beyond transaction markers."""

    partition: Partition
    start: int
    next: int

    def holds(self, other: Range) -> bool:
        """Say whether it holds all of another."""
        return self.partition == other.partition and self.start <= other.start and other.next <= self.next

    def __str__(self) -> str:
        return f"{self.partition.topic}-{self.partition.number} [{self.start}, {self.next})"


@dataclass(frozen=True, slots=True)
class File:
    """A file, by its name and its metadata. `lost` says that the topic had deleted the range before it was read."""

    path: str
    day: date
    ranges: tuple[Range, ...]
    rows: int
    schema_ids: tuple[int, ...] = ()
    lost: bool = False

    @property
    def compacted(self) -> bool:
        """Say whether it replaces others."""
        return "-compacted-" in self.path


def _named(path: str) -> re.Match[str]:
    found = NAME.fullmatch(path)
    if found is None:
        raise ConfigurationError(f"{path} is not a file of this archive: move it elsewhere")
    return found


def plain_path(day: date, partition: Partition, start: int) -> str:
    """Return the path of the file whose range starts there."""
    return f"trading_day={day}/{partition.topic}-{partition.number}-{start:020d}.parquet"


def compacted_path(day: date, ranges: Sequence[Range]) -> str:
    """Return the path of the file that replaces those of these ranges: the same for the same ones."""
    digest = sha256(json.dumps(ranges).encode()).hexdigest()[:20]
    return f"trading_day={day}/{ranges[0].partition.topic}-compacted-{digest}.parquet"


def describe(store: Store, path: str) -> File:
    """Return what a file says of itself; raise ConfigurationError where it is none of an archive, or a newer one's."""
    named = _named(path)
    try:
        with store.open(path) as content:
            metadata = pq.read_metadata(content)
        about = json.loads((metadata.metadata or {})[ABOUT])
        if about["version"] > VERSION:
            raise ConfigurationError(f"{store}/{path} was written by a newer version: upgrade bourse-stream")
        ranges = tuple(Range(Partition(about["topic"], number), *span) for number, *span in about["ranges"])
        day, ids = date.fromisoformat(named["day"]), tuple(about.get("schema_ids", ()))
        return File(path, day, ranges, metadata.num_rows, ids, about.get("lost", False))
    except (pa.ArrowInvalid, OSError, KeyError, ValueError, TypeError) as error:
        reason = f"{error}".partition("\n")[0]
        raise ConfigurationError(f"{store}/{path} is not a file of this archive, or damaged ({reason})") from error


def catalog(store: Store, day: date | None = None) -> list[File]:
    """Return the files that count, of one day or all, in the order of their paths.

    One whose ranges a compacted one holds does not count: it is about to be deleted.
    """
    return current([describe(store, path) for path in store.paths(f"trading_day={day}" if day else "")])


def current(found: Sequence[File]) -> list[File]:
    """Return the files that no compacted one replaces."""
    compacted = [file for file in found if file.compacted]
    return [file for file in found if not any(_replaces(other, file) for other in compacted)]


def _replaces(one: File, other: File) -> bool:
    held = all(any(mine.holds(span) for mine in one.ranges) for span in other.ranges)
    return held and one.path != other.path and not other.lost


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in order, those that join as one."""
    found: list[Range] = []
    for span in sorted(ranges):
        if found and found[-1].partition == span.partition and found[-1].next == span.start:
            found[-1] = found[-1]._replace(next=span.next)
        else:
            found.append(span)
    return found


def ends(store: Store, topic: str) -> dict[Partition, int]:
    """Return, per partition, the end of what the archive holds; only the metadata that decide it are read."""
    last: dict[Partition, tuple[int, str]] = {}
    deciding = []
    for path in store.paths():
        named = _named(path)
        if named["topic"] != topic:
            raise ConfigurationError(f"{store} holds {named['topic']}: give {topic} a place of its own")
        if named["partition"] == "compacted":
            deciding.append(path)
        else:
            partition = Partition(topic, int(named["partition"]))
            last[partition] = max(last.get(partition, (-1, "")), (int(named["rest"]), path))
    deciding += [path for _, path in last.values()]
    found: dict[Partition, int] = {}
    for path in deciding:
        for span in describe(store, path).ranges:
            found[span.partition] = max(found.get(span.partition, 0), span.next)
    return found


def rivals(store: Store, day: date, span: Range) -> list[str]:
    """Return the files of a day that may hold what a range begins with: at most one plain one behind it."""
    behind: list[tuple[int, str]] = []
    others = []
    for path in store.paths(f"trading_day={day}"):
        named = _named(path)
        if named["partition"] == "compacted":
            others.append(path)
        elif Partition(named["topic"], int(named["partition"])) == span.partition:
            if int(named["rest"]) >= span.start:
                others.append(path)
            else:
                behind.append((int(named["rest"]), path))
    return [*others, max(behind)[1]] if behind else others


def write(store: Store, path: str, table: pa.Table, ranges: Sequence[Range], *, level: int = 3, **more: Any) -> bool:
    """Create a file of these rows, sorted; return False where there is one of this name already.

    `level` is zstd's.
    """
    about = {
        "version": VERSION,
        "topic": ranges[0].partition.topic,
        "ranges": [[span.partition.number, span.start, span.next] for span in ranges],
        **more,
    }
    table = _in_order(compact(table))
    # Readers get plain strings, which they can put together from many files: only the writing is of dictionaries.
    arrow = base64.b64encode(_plain(table.schema).serialize().to_pybytes())
    told = {ABOUT.decode(): json.dumps(about), "ARROW:schema": arrow.decode()}
    recurring = dictionary_columns(table.schema)
    encodings = {
        field.name: "DELTA_BINARY_PACKED"
        for field in table.schema
        if pa.types.is_integer(field.type) or pa.types.is_timestamp(field.type)
    }

    def to(file: IO[bytes]) -> None:
        with pq.ParquetWriter(
            file,
            table.schema,
            compression="zstd",
            compression_level=level,
            use_dictionary=recurring,
            column_encoding=encodings,
            store_schema=False,
        ) as writer:
            writer.write_table(table, ROW_GROUP)
            writer.add_key_value_metadata(told)

    made = store.create(path, to)
    pa.default_memory_pool().release_unused()
    return made


def read(store: Store, files: Iterable[File] | None = None, columns: list[str] | None = None) -> pa.Table:
    """Return files, all that count unless named, as one table in the order of partitions and offsets."""
    tables = []
    for file in catalog(store) if files is None else files:
        with store.open(file.path) as content:
            tables.append(pq.read_table(content, columns=columns).replace_schema_metadata(None))
    table = loose(pa.concat_tables(tables, promote_options="permissive"))
    order = [name for name in ("_partition", "_offset") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in order]) if order else table


def count_rows(store: Store) -> int:
    """Return how many rows the archive holds, by reading the files' columns back."""
    return sum(read(store, [file], ["_offset"]).num_rows for file in catalog(store))


def runs(table: pa.Table) -> Iterator[tuple[int, date, pa.Table]]:
    """Yield runs of rows of one partition and day, in order: the trading day, or else Tehran's day of the timestamp."""
    if "trading_day" in table.column_names:
        days = table["trading_day"]
    else:
        local = pc.local_timestamp(table["_timestamp"].cast(pa.timestamp("ms", str(TEHRAN))))
        days = pc.floor_temporal(local, unit="day").cast(pa.date32())
    encoded = [pc.run_end_encode(_whole(column)) for column in (table["_partition"], days)]
    start = 0
    for end in sorted({end for column in encoded for end in column.run_ends.to_pylist()}):
        partition, day = (column[start].as_py() for column in encoded)
        yield partition, day, table.slice(start, end - start)
        start = end


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def compact(table: pa.Table) -> pa.Table:
    """Return the table with what recurs as dictionaries: two thirds of the memory."""
    for name in dictionary_columns(table.schema):
        at = table.schema.get_field_index(name)
        if pa.types.is_string(table.schema.field(at).type):
            table = table.set_column(at, table.schema.field(at).with_type(RECURRING), table[name].dictionary_encode())
    return table


def own(table: pa.Table) -> pa.Table:
    """Return a copy: a slice keeps all alive that it is a slice of."""
    return pa.concat_tables([table, table.slice(0, 0)]).combine_chunks()


def _in_order(table: pa.Table) -> pa.Table:
    """Return the rows by instrument, partition and offset; what is a dictionary is compared by its ranks."""
    keys = {}
    table = table.unify_dictionaries().combine_chunks()
    for name in ("instrument", "_partition", "_offset"):
        if name in table.column_names and table.num_rows:
            column = table[name].chunk(0)
            keys[name] = pc.rank(column.dictionary).take(column.indices) if column.type == RECURRING else column
    return table.take(pc.sort_indices(pa.table(keys), [(name, "ascending") for name in keys])) if keys else table


def loose(table: pa.Table) -> pa.Table:
    """Return the table with plain strings again."""
    return table.cast(_plain(table.schema))


def _plain(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(pa.string()) if field.type == RECURRING else field for field in schema])
