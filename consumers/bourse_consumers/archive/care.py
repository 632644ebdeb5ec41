"""Whether an archive holds exactly what it must, and how its many small files become few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from hashlib import sha256
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from bourse_consumers.api import Partition
from bourse_consumers.archive.files import File, Range, compacted_path, current, describe, joined, read, runs, write
from bourse_consumers.archive.store import Store, StoreError
from bourse_schemas.errors import ConfigurationError

__all__ = ["MARKED", "Report", "Topics", "compact", "compare", "prove_polls", "prove_sequences", "row_hashes", "verify"]

FILE_BYTES = 128 << 20
TOTALS = ("volume", "value", "trade_count")
COUNTED = {"OPENED": "opened", "TRADED": "traded", "REVISED": "revised", "CANCELLED": "cancelled"}
MARKED = ["poll_sequence", "outcome", *COUNTED.values()]


@dataclass
class Report:
    """What was looked at, and what is wrong with it. `holes` are offsets whose loss was accepted."""

    files: int = 0
    rows: int = 0
    days: int = 0
    holes: int = 0
    compared: int = 0
    partitions: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[dict[str, str]] = field(default_factory=list)

    def fault(self, what: str, path: str = "", span: Range | None = None) -> None:
        """Add what is wrong, in which file and where in it."""
        self.faults.append({"file": path, "range": str(span or ""), "what": what})


class Topics:
    """The records that a topic still has: of a range of a partition, as a table like the archive's.

    `first` is, per partition, the oldest offset that is there; `rows` gives the rows of a range.
    """

    def __init__(self, first: Mapping[Partition, int], rows: Callable[[Range], pa.Table | None]) -> None:
        self.first = first
        self.rows = rows


def verify(
    store: Store, day: date | None = None, *, topics: Topics | None = None, polls: Store | None = None
) -> Report:
    """Look at an archive, or at one day of it; beside the topic, and beside an archive of the polls, where given."""
    report = Report()
    found = []
    for path in store.paths():
        try:
            found.append(describe(store, path))
        except ConfigurationError as error:
            report.fault(str(error), path)
    files = current(found)
    _ranges(files, report)
    by_day: dict[date, list[File]] = defaultdict(list)
    for file in files:
        if day in {None, file.day}:
            by_day[file.day].append(file)
    if day is not None and not by_day:
        raise ConfigurationError(f"{store} has nothing of {day}")
    begins = min(span.start for file in files for span in file.ranges) if files else 0
    digests: dict[Partition, Any] = defaultdict(sha256)
    for each, of_day in sorted(by_day.items()):
        tables = []
        for file in of_day:
            table = _content(store, file, report)
            if table is None:
                continue
            _beside(file, table, topics, digests, report)
            tables.append(table.append_column("_file", pa.array([file.path] * table.num_rows, pa.string())))
        rows = pl.DataFrame(pa.concat_tables(tables, promote_options="default")) if tables else pl.DataFrame()
        if "volume_delta" in rows.columns:
            prove_sequences(rows, report, late=begins > 0 and each == min(by_day))
            if polls is not None:
                kept = current([file for file in (describe(polls, path) for path in polls.paths()) if file.rows])
                prove_polls(rows, each, pl.DataFrame(read(polls, kept, MARKED)), report)
        elif "day_final" in rows.columns:
            _markers(rows, report)
        report.days += 1
        report.rows += rows.height
    report.files = sum(map(len, by_day.values()))
    for partition, digest in sorted(digests.items()):
        report.partitions[f"{partition.topic}-{partition.number}"]["digest"] = digest.hexdigest()
    return report


def _ranges(files: Iterable[File], report: Report) -> None:
    """See that the ranges of each partition join."""
    spans: dict[Partition, list[tuple[Range, File]]] = defaultdict(list)
    for file in files:
        for span in file.ranges:
            spans[span.partition].append((span, file))
            report.holes += (span.next - span.start) * file.lost
        if not file.compacted and not file.path.endswith(f"{file.ranges[0].start:020d}.parquet"):
            report.fault("its name and its metadata do not agree", file.path, file.ranges[0])
    for partition, held in sorted(spans.items()):
        held.sort(key=lambda pair: pair[0])
        for (before, one), (after, other) in pairwise(held):
            gap = Range(partition, before.next, after.start)
            if after.start > before.next:
                report.fault(f"offsets are missing between {one.path} and this file", other.path, gap)
            elif after.start < before.next:
                report.fault(f"{one.path} holds the same offsets", other.path, after)
        about = {"start": held[0][0].start, "next": held[-1][0].next, "files": len(held)}
        report.partitions[f"{partition.topic}-{partition.number}"] = about


def _content(store: Store, file: File, report: Report) -> pa.Table | None:
    """Return a file's rows in the order of offsets, where it can be read; see that they are its own."""
    try:
        table = read(store, [file])
    except (pa.ArrowException, StoreError, OSError, ValueError) as error:
        report.fault(f"it cannot be read: {f'{error}'.partition(chr(10))[0]}", file.path, file.ranges[0])
        return None
    if table.num_rows != file.rows:
        report.fault(f"{table.num_rows} rows, not {file.rows}", file.path, file.ranges[0])
    if table.num_rows and any(each != file.day for _, each, _ in runs(table)):
        report.fault(f"rows of another day than {file.day}", file.path, file.ranges[0])
    inside = 0
    for span in file.ranges:
        offsets = _of(table, span)["_offset"]
        inside += len(offsets)
        if pc.count_distinct(offsets).as_py() != len(offsets):
            report.fault("an offset stands there twice", file.path, span)
    if inside != table.num_rows:
        report.fault("rows outside its ranges", file.path, file.ranges[0])
    return table


def _of(table: pa.Table, span: Range) -> pa.Table:
    offsets, number = table["_offset"], span.partition.number
    within = pc.and_(pc.greater_equal(offsets, span.start), pc.less(offsets, span.next))
    return table.filter(pc.and_(within, pc.equal(table["_partition"], number)))


def _beside(file: File, table: pa.Table, topics: Topics | None, digests: dict[Partition, Any], report: Report) -> None:
    """Take a file's rows into the digests; compare them with what the topic still has of its ranges."""
    for span in file.ranges:
        ours = _of(table, span)
        digests[span.partition].update(row_hashes(ours))
        if not file.lost:
            compare(file.path, ours, span, topics, report)


def compare(path: str, ours: pa.Table, span: Range, topics: Topics | None, report: Report) -> None:
    """Compare the rows of a range, in the order of offsets, with what the topic still has of it."""
    first = topics.first.get(span.partition) if topics else None
    if topics is None or first is None or span.next <= first:
        return
    there = span._replace(start=max(span.start, first))
    ours, theirs = _of(ours, there), topics.rows(there)
    # Fields that came later are null in what an older release wrote.
    theirs = ours.slice(0, 0) if theirs is None else theirs.select(ours.column_names)
    report.compared += theirs.num_rows
    if row_hashes(ours) != row_hashes(theirs):
        report.fault(_difference(ours, theirs), path, there)


def row_hashes(table: pa.Table) -> bytes:
    """Return eight bytes for each row, equal for equal rows."""
    if any(pa.types.is_nested(kind) for kind in table.schema.types):
        return b"".join(sha256(repr(row).encode()).digest()[:8] for row in table.to_pylist())
    hashes = pl.DataFrame(table).hash_rows().rechunk().to_arrow()
    return bytes(memoryview(hashes.buffers()[1])[: 8 * len(hashes)])


def _difference(ours: pa.Table, theirs: pa.Table) -> str:
    kept, there = (dict(zip(table["_offset"].to_pylist(), table.to_pylist(), strict=True)) for table in (ours, theirs))
    for offset in sorted(kept.keys() | there.keys()):
        if offset not in kept:
            return f"offset {offset} is on the topic, and not here"
        if offset not in there:
            return f"offset {offset} is here, and not on the topic"
        if kept[offset] != there[offset]:
            name = next(name for name in kept[offset] if kept[offset][name] != there[offset].get(name))
            return f"{name} at offset {offset} is {kept[offset][name]!r}, on the topic {there[offset].get(name)!r}"
    return "the same values, of other types"


def prove_sequences(rows: pl.DataFrame, report: Report, *, late: bool) -> None:
    """See that each instrument's sequence is 1…n and its changes add up to its totals; `late`: its begin may lack."""
    keys = ["instrument", "trading_day"]
    rows = rows.sort([*keys, "sequence"])
    number = pl.int_range(pl.len()).over(keys) + (pl.col("sequence").first().over(keys) if late else 1)
    wrong = rows.with_columns(due=number).filter(pl.col("sequence") != pl.col("due")).head(1)
    for row in wrong.iter_rows(named=True):
        said = f"{row['instrument']}: sequence {row['sequence']} where {row['due']} is due"
        report.fault(said, row["_file"], _at(row))
    for total in TOTALS:
        before = pl.col(total).shift().over(keys).fill_null(pl.col(total) - pl.col(f"{total}_delta") if late else 0)
        wrong = rows.filter(before + pl.col(f"{total}_delta") != pl.col(total)).head(1)
        for row in wrong.iter_rows(named=True):
            report.fault(f"{row['event_id']}: {total} is not the sum of its changes", row["_file"], _at(row))


def _at(row: Mapping[str, Any]) -> Range:
    topic = row["_file"].rpartition("/")[2].rsplit("-", 2)[0]
    return Range(Partition(topic, row["_partition"]), row["_offset"], row["_offset"] + 1)


def _markers(rows: pl.DataFrame, report: Report) -> None:
    """See that the polls of each source are numbered without a hole."""
    rows = rows.sort(["source", "poll_sequence"])
    before = pl.col("poll_sequence").shift().over("source")
    for row in rows.filter(pl.col("poll_sequence") - before != 1).head(1).iter_rows(named=True):
        said = f"{row['source']}: poll {row['poll_sequence']} does not follow the one before it"
        report.fault(said, row["_file"], _at(row))


def prove_polls(rows: pl.DataFrame, day: date, markers: pl.DataFrame, report: Report) -> None:
    """See that every poll's marker is kept, and counts the changes that are here; `markers` have the columns MARKED."""
    known = {row["poll_sequence"]: row for row in markers.iter_rows(named=True)}
    counted = rows.group_by("poll_sequence", "op").len()
    ops: dict[int, dict[str, int]] = defaultdict(dict)
    for sequence, op, count in counted.iter_rows():
        ops[sequence][COUNTED.get(op, op)] = count
    for sequence, counts in sorted(ops.items()):
        marker = known.get(sequence)
        if marker is None or marker["outcome"] != "PUBLISHED":
            report.fault(f"{day}: poll {sequence} has changes here and no marker")
        elif any(counts.get(name, 0) > marker[name] for name in COUNTED.values()):
            report.fault(f"{day}: poll {sequence} has more changes here than its marker counts")


def compact(store: Store, before: date, day: date | None = None) -> Iterator[tuple[date, int, int]]:
    """Put the files of each day before `before` together; yield the day, and how many files it had and has.

    What replaces them is created first, and they are deleted afterwards: whenever it is interrupted every row is there,
    and what is left over no longer counts and goes the next time.
    """
    by_day: dict[date, list[File]] = defaultdict(list)
    for file in (describe(store, path) for path in store.paths()):
        if file.day < before and day in {None, file.day} and not file.lost:
            by_day[file.day].append(file)
    for each, files in sorted(by_day.items()):
        kept = current(files)
        made = [kept[0].path] if len(kept) == 1 else []
        for part in _parts(store, kept) if len(kept) > 1 else []:
            ranges = joined(span for file in part for span in file.ranges)
            made.append(compacted_path(each, ranges))
            ids = sorted({number for file in part for number in file.schema_ids})
            write(store, made[-1], read(store, part), ranges, level=9, schema_ids=ids)
        for file in files:
            if file.path not in made:
                store.delete(file.path)
        yield each, len(files), len(made)


def _parts(store: Store, files: list[File]) -> Iterator[list[File]]:
    """Yield files in order of their offsets, about as many at a time as fill one."""
    part: list[File] = []
    size = 0
    for file in sorted(files, key=lambda file: file.ranges):
        with store.open(file.path) as content:
            size += len(content.read())
        part.append(file)
        if size >= FILE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
