"""Whether an archive holds exactly what it must: checks over its rows, whatever stores them.

Offsets: each once, between the first and the next offset of its partition. While the topic has the records: equal rows,
nothing missing. For ever: every poll has the rows that its marker counts, the sequence of an instrument is 1 to n on
each day, and its deltas sum to its totals. What a recorded hole may have taken is not a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from bourse_consumers.rows import plain_json

__all__ = ["COUNTED", "Kept", "Markers", "Report", "Stored", "prove"]

COUNTED = {"OPENED": "opened", "TRADED": "traded", "REVISED": "revised", "CANCELLED": "cancelled"}
TOTALS = ("volume", "value", "trade_count")
ENDLESS = 2**63 - 1
PARTITION, OFFSET, POLL = pl.col("_partition"), pl.col("_offset"), pl.col("poll_sequence")

# The first and the end offset of each partition.
Ends = Mapping[int, tuple[int, int]]
# A partition, and the first and the end offset of what was lost.
Hole = tuple[int, int, int]


class Markers(NamedTuple):
    """The counts of all archived polls, and whether these begin at the first offset of their topic."""

    counts: pl.DataFrame
    from_start: bool


class Stored(NamedTuple):
    """What an archive has of a topic: all rows of a day in one part, in the order of days.

    `markers` are those of its polls, or why there are none; they were read before the topic.
    """

    ends: Ends
    holes: list[Hole]
    parts: Iterable[pa.Table]
    markers: Markers | str = ""


class Kept(NamedTuple):
    """What the topic still has; `rows` yields those of a partition between two offsets, in their order."""

    ends: Ends
    rows: Callable[[int, int, int], Iterator[pa.Table]]


@dataclass
class Report:
    """What was checked and found: `behind` counts rows that are not archived yet, `lost` offsets in recorded holes.

    `notes` are what was not checked.
    """

    topic: str
    files: int = 0
    days: int = 0
    rows: int = 0
    compared: int = 0
    behind: int = 0
    lost: int = 0
    polls: tuple[int, int] | None = None
    partitions: dict[int, tuple[int, int]] = field(default_factory=dict)
    damaged: set[tuple[date, int]] = field(default_factory=set)
    findings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, what: str, day: date | None = None, partitions: Any = (), offsets: Any = (), file: str = "") -> None:
        """Add a finding, with the first and the last partition and offset if they are known."""
        self.findings.append({"file": file, "day": day, "partitions": partitions, "offsets": offsets, "what": what})
        if day is not None:
            self.damaged |= {(day, number) for number in range(partitions[0], partitions[1] + 1)}

    def find_rows(self, what: str, rows: pl.DataFrame) -> None:
        """Add a finding for each day and partition of these rows."""
        bad = rows.group_by("_day", "_partition").agg(OFFSET.min(), last=OFFSET.max(), count=pl.len())
        for day, number, first, last, count in bad.sort("_partition", "_offset").iter_rows():
            self.find(f"{what}: {count}", day, (number, number), (first, last))


def prove(stored: Stored, report: Report, kept: Kept | None = None) -> None:
    """Check everything that can be checked, and report it."""
    report.partitions, report.lost = dict(stored.ends), sum(end - start for _, start, end in stored.holes)
    proof = _Proof(stored, report)
    for part in stored.parts:
        proof.add(_frame(part))
    proof.places = pl.concat([*proof.parts, EMPTY]).sort("_partition", "_offset")
    proof.offsets()
    complete = {number for number in kept.ends if proof.compare(number, kept) == 0} if kept else set()
    if not report.rows and report.behind:
        report.find(f"archive empty, rows on the topic: {report.behind}")
    if isinstance(stored.markers, Markers):
        proof.polls(stored.markers, complete)
    elif stored.markers:
        report.notes.append(f"NOT CHECKED: whether each poll has its rows: {stored.markers}")


def _frame(rows: pa.Table) -> pl.DataFrame:
    """Return rows with maps and lists as JSON: what is equal then is equal."""
    columns = {}
    for name in sorted(rows.column_names):
        nested = pa.types.is_nested(rows[name].type)
        columns[name] = pl.Series(plain_json(rows[name]), dtype=pl.String) if nested else pl.from_arrow(rows[name])
    return pl.DataFrame(columns)


def _places(rows: pl.DataFrame) -> pl.DataFrame:
    """Return where rows are, and a hash of each."""
    day = next((name for name in ("trading_day", "_day") if name in rows.columns), None)
    poll = POLL if "poll_sequence" in rows.columns else pl.lit(None, pl.Int64).alias("poll_sequence")
    found = pl.lit(None, pl.Date) if day is None else pl.col(day)
    return rows.select("_partition", "_offset", poll, _day=found, hash=rows.hash_rows())


EMPTY = pl.DataFrame(
    schema={"_partition": pl.Int32, "_offset": pl.Int64, "poll_sequence": pl.Int64, "_day": pl.Date, "hash": pl.UInt64}
)


def _within(spans: Iterable[Hole]) -> pl.Expr:
    inside = [(number == PARTITION) & OFFSET.is_between(start, end - 1) for number, start, end in spans]
    return pl.any_horizontal(pl.lit(value=False), *inside)


class _Proof:
    def __init__(self, stored: Stored, report: Report) -> None:
        self.stored, self.report = stored, report
        self.parts: list[pl.DataFrame] = []
        self.counts: list[pl.DataFrame] = []
        self.places = EMPTY
        # What the topic had deleted before the archive began is a hole, too.
        self._holes = [*stored.holes, *((number, 0, first) for number, (first, _) in stored.ends.items() if first)]
        self._schema: dict[str, Any] = {}
        self._before: dict[int, int] = {}

    def add(self, rows: pl.DataFrame) -> None:
        """Take the rows of a day."""
        self._schema = dict(rows.schema)
        self.report.rows += rows.height
        self.parts.append(_places(rows))
        if "volume_delta" in rows.columns:
            self._sequences(rows)
            counted = [(pl.col("op") == op).sum().alias(name) for op, name in COUNTED.items()]
            self.counts.append(rows.group_by("poll_sequence").agg(counted))

    def _sequences(self, rows: pl.DataFrame) -> None:
        """Check that sequences are 1 to n and that deltas sum to totals."""
        keys, names = ["instrument", "trading_day"], ["sequence", *TOTALS, "_offset"]
        rows = rows.sort(*keys, "sequence", "_offset").with_columns(_day="trading_day")
        rows = rows.with_columns(pl.col(name).shift().over(keys).alias(f"{name}_before") for name in names)
        last = PARTITION.replace_strict(self._before, default=-1, return_dtype=pl.Int64)
        rows = rows.with_columns(before=pl.col("_offset_before").fill_null(last))
        apart = pl.col("sequence") - pl.col("sequence_before").fill_null(0) != 1
        sums = [pl.col(f"{name}_before").fill_null(0) + pl.col(f"{name}_delta") != pl.col(name) for name in TOTALS]
        self._find("rows out of the sequence of their instrument", rows.filter(apart))
        self._find("rows whose totals are not the sum of the deltas", rows.filter(~apart & pl.any_horizontal(sums)))
        self._before.update(rows.group_by("_partition").agg(OFFSET.max()).iter_rows())

    def _find(self, what: str, rows: pl.DataFrame) -> None:
        """Report rows that have no hole between the offset `before` and their own."""
        for number, start, end in self._holes:
            rows = rows.filter(~((number == PARTITION) & (pl.col("before") < start) & (end <= OFFSET)))
        self.report.find_rows(what, rows)

    def offsets(self) -> None:
        """Check that each offset is there once, and that the archive has committed it."""
        self.report.days = self.places["_day"].n_unique()
        twice = pl.struct("_partition", "_offset").is_duplicated()
        self.report.find_rows("rows stored twice", self.places.filter(twice))
        committed = _within((number, *ends) for number, ends in self.stored.ends.items())
        self.report.find_rows("rows outside the committed offsets", self.places.filter(~committed))
        if "day_final" in self._schema:
            rows = self.places.with_columns(before=OFFSET.shift(), last=POLL.shift())
            self._find("rows after missing polls", rows.filter(pl.col("last") + 1 < POLL))

    def compare(self, number: int, kept: Kept) -> int:
        """Compare a partition with what the topic still has of it; return how many rows are not archived yet."""
        start, end = kept.ends[number]
        first, following = self.stored.ends.get(number, (start, start))
        start = max(start, first)  # days before it were removed by `forget`
        if following > end:
            self.report.find(f"{number}: offsets up to {following - 1} are stored, the topic ends at {end}")
        mine, lost = self.places.filter(_partition=number), _within(self.stored.holes)
        behind, at, tables = 0, start, kept.rows(number, start, end)
        while (table := next(tables, None)) is not None or at < following:
            theirs = EMPTY if table is None else _places(self._aligned(_frame(table)))
            until = following if table is None else theirs["_offset"][-1] + 1
            ours = mine.filter(OFFSET.is_between(at, until - 1))
            at = until
            behind += theirs.filter(following <= OFFSET).height
            theirs = theirs.filter(following > OFFSET)
            self.report.compared += theirs.height
            if not (ours["_offset"].equals(theirs["_offset"]) and ours["hash"].equals(theirs["hash"])):
                missing = theirs.join(ours, "_offset", "anti").filter(~lost)
                both = ours.join(theirs, "_offset", suffix="_due").filter(pl.col("hash") != pl.col("hash_due"))
                self.report.find_rows("rows missing that the topic has", missing)
                self.report.find_rows("rows not on the topic", ours.join(theirs, "_offset", "anti"))
                self.report.find_rows("rows different from the topic", both)
        if behind and number not in self.stored.ends:
            self.report.find(f"partition {number} missing, rows on the topic: {behind}")
        self.report.behind += behind
        return behind

    def _aligned(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return the topic's rows with the archive's columns."""
        schema = self._schema or rows.schema
        for name in rows.columns:
            if name not in schema:
                lost = _places(rows.filter(pl.col(name).is_not_null()))
                self.report.find_rows(f"rows without the column {name} that the topic has", lost)
        nulls = {name: pl.lit(None, kind) for name, kind in schema.items() if name not in rows.columns}
        return rows.with_columns(**nulls).select(pl.col(name).cast(kind) for name, kind in schema.items())

    def polls(self, markers: Markers, complete: set[int]) -> None:
        """Check that polls have the rows that their markers count, as far as polls and partitions are archived."""
        if not self.counts:
            return
        due, names = markers.counts.unique(), list(COUNTED.values())
        ends = self.places.group_by("_partition").agg(POLL.max()).iter_rows()
        known: Any = due["poll_sequence"]
        low = 0 if markers.from_start else known.min() or 0
        high = min([known.max() or 0, *(last for number, last in ends if number not in complete)])
        self.report.polls = (low, high)
        has = pl.concat(self.counts).group_by("poll_sequence").sum()
        both = has.join(due, "poll_sequence", "full", suffix="_due", coalesce=True).fill_null(0)
        wrong = both.filter(pl.any_horizontal(pl.col(name) != pl.col(f"{name}_due") for name in names))
        wrong = wrong.filter(POLL.is_between(low, high))
        for number, start, end in self._holes:
            mine = self.places.filter(_partition=number)
            last, first = (mine.filter(side)["poll_sequence"] for side in (start > OFFSET, end <= OFFSET))
            wrong = wrong.filter(~POLL.is_between(last.max() or 0, first.min() or ENDLESS))
        for row in wrong.sort("poll_sequence").head(1).iter_rows(named=True):
            counts = ", ".join(f"{row[name]} of {row[f'{name}_due']} {name}" for name in names)
            what = f"polls without the rows that their marker counts: {wrong.height}"
            self.report.find(f"{what}; {row['poll_sequence']} has {counts}")
