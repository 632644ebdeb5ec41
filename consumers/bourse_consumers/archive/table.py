"""A topic's Delta table: rows and offsets in one commit, on the disk before anybody relies on it.

delta-rs never calls fsync, and it reads a commit file that a power cut has emptied as "nothing was added". So we write
the Parquet files ourselves, with page checksums, sync them, commit them, and sync the log. An application transaction
per partition (`bourse.trades-0`) holds the next offset. A commit that conflicts with another writer's is refused by
delta-rs if the snapshot it is made from is older; a repetition from a newer snapshot it accepts. So callers `refresh`,
compare `stored` with what they hold, and commit. Maintenance has an application transaction of its own, which keeps a
file from being replaced twice.

Python's own values are not given to Arrow here, nor is `pq.read_table` used: Arrow would import pandas, if that is
installed, which takes seconds and 50 MB.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from bourse_cli.logs import get_logger
from bourse_cli.options import declared_topic
from bourse_consumers.archive.storage import Damaged, Storage, StoreError, store_errors, sync
from bourse_consumers.records import Partition
from bourse_consumers.rows import WHERE, arrow_schema
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN

__all__ = ["ORDER", "File", "Table"]

MAINTENANCE, ABOUT = "bourse.maintenance", "bourse.archive"
ORDER = ("_partition", "_offset")
STATISTICS = (*ORDER, "poll_sequence")
# Topics whose events have no trading day: the instant whose date in Tehran is the column `_day`.
DAY_OF = {"polls": "requested_at", "dead-letters": "failed_at"}
RETRIES = 20
# Commits that are older than these many were written back by the kernel long ago.
RECENT = 100
ROW_GROUP = 250_000


class File(NamedTuple):
    """An active file of the table: its path, day, size in bytes, rows, and its rows' least and greatest places."""

    path: str
    day: date
    size: int
    rows: int
    partitions: tuple[int | None, int | None]
    offsets: tuple[int | None, int | None]


NEW_FOLDER = "use a new folder (docs/archive.md shows how to move to another cluster)"


class Table:
    """An opened table. Its methods raise StoreError; `delta` is the snapshot that was loaded last."""

    def __init__(self, storage: Storage, delta: DeltaTable) -> None:
        self.storage, self.delta = storage, delta
        self._synced = delta.version() - RECENT
        about = self.about
        self.topic = declared_topic(about["topic"], None)
        self.name: str = about["topic"]
        self.day_column: str = delta.metadata().partition_columns[0]

    @classmethod
    def open(cls, uri: str, *, recover: bool = False) -> Table | None:
        """Open a table, None if there is none.

        `recover` removes what a power cut has torn, and is for an archiver; without it that is an error.
        """
        storage = Storage(uri)
        with store_errors():
            if storage.folder is not None and (storage.folder / "_delta_log").is_dir():
                _check_log(storage.folder / "_delta_log", recover=recover)
            try:
                delta = DeltaTable(storage.uri, storage_options=storage.options)
            except TableNotFoundError:
                return None
        if '"topic"' not in (delta.metadata().description or ""):
            raise ConfigurationError(f"{uri} is a Delta table of another program: use a new folder")
        return cls(storage, delta)

    @classmethod
    def create(cls, uri: str, topic: str, cluster: str = "", topic_id: str = "") -> Table:
        """Create the table of a topic, by its full name; a table that another member has created meanwhile is taken."""
        storage, kind = Storage(uri), declared_topic(topic, None)
        day = pa.field("_day" if kind.name in DAY_OF else "trading_day", pa.date32())
        schema = [*arrow_schema(kind.event), *WHERE, day]
        about = {"topic": topic, "cluster": cluster, "topic_id": topic_id}
        with store_errors():
            DeltaTable.create(
                storage.uri,
                pa.schema({field.name: _stored(field) for field in schema}.values()),
                mode="ignore",
                partition_by=[day.name],
                name=topic,
                description=json.dumps(about),
                configuration={
                    "delta.dataSkippingStatsColumns": ",".join(STATISTICS),
                    "delta.logRetentionDuration": "interval 365 days",
                },
                storage_options=storage.options,
            )
        table = cls.open(uri)
        if table is None:
            raise StoreError(f"{uri}: the table was deleted while it was created")
        table.sync()
        return table

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def about(self) -> dict[str, Any]:
        """Return what the table says about itself.

        The description has topic, cluster and topic_id. What changes is JSON in the metadata of the column `_offset`:
        first (the first offset by partition) and holes (partition, start, end).
        """
        fixed = json.loads(self.delta.metadata().description)
        offset = next(field for field in self.delta.schema().fields if field.name == "_offset")
        return {"first": {}, "holes": [], **fixed, **json.loads(str(offset.metadata.get(ABOUT, "{}")))}

    def require_from(self, topic: str, cluster: str, topic_id: str) -> None:
        """Raise ConfigurationError unless the rows came from this topic; an empty id is not known."""
        about, uri = self.about, self.storage.uri
        if about["topic"] != topic:
            raise ConfigurationError(f"{uri} is the table of {about['topic']}, not of {topic}: {NEW_FOLDER}")
        if cluster and about["cluster"] not in {"", cluster}:
            raise ConfigurationError(
                f"{uri} was written from cluster {about['cluster']}, this is {cluster}: {NEW_FOLDER}"
            )
        if topic_id and about["topic_id"] not in {"", topic_id}:
            raise ConfigurationError(f"{topic} was deleted and created again since {uri} was begun: {NEW_FOLDER}")

    def stored(self, partition: Partition | str) -> int | None:
        """Return a partition's next offset, None if nothing of it was committed."""
        app = partition if isinstance(partition, str) else f"{partition.topic}-{partition.number}"
        version: int | None = self.delta.transaction_version(app)
        return version

    def ends(self) -> dict[int, tuple[int, int]]:
        """Return, for each partition, the first offset of the table and the next one to store."""
        first = {int(number): at for number, at in self.about["first"].items()}
        return {number: (at, self.stored(f"{self.name}-{number}") or at) for number, at in first.items()}

    def files(self, day: date | None = None) -> list[File]:
        """Return the active files, those of one day if it is given, in the order of days and paths."""
        actions = pl.DataFrame(self.delta.get_add_actions(flatten=True)).to_dicts()
        found = [
            File(
                each["path"],
                each[f"partition.{self.day_column}"],
                each["size_bytes"],
                each["num_records"] or 0,
                (each.get("min._partition"), each.get("max._partition")),
                (each.get("min._offset"), each.get("max._offset")),
            )
            for each in actions
        ]
        return sorted((file for file in found if day in {None, file.day}), key=lambda file: (file.day, file.path))

    def arrow(self, files: Iterable[File], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of files in the order of partitions and offsets, with the table's columns or these."""
        fields = pa.schema(self.delta.schema().to_arrow()).remove_metadata()
        names = fields.names if columns is None else list(dict.fromkeys([*columns, *ORDER]))
        empty = pa.Table.from_batches([], pa.schema([fields.field(name) for name in names]))
        rows = pa.concat_tables([empty, *(self.read(file, names) for file in files)], promote_options="permissive")
        return rows.sort_by([(name, "ascending") for name in ORDER]).select(columns or names)

    def read(self, file: File, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of a file, as they are stored. Raises Damaged if they are not those that were written."""
        fields, content = pa.schema(self.delta.schema().to_arrow()), self.storage.get(file.path)
        if len(content) != file.size:
            raise Damaged(f"file has {len(content)} bytes, not {file.size}")
        with store_errors(Damaged, "file is damaged: "):
            parquet = pq.ParquetFile(pa.py_buffer(content), page_checksum_verification=True)
            rows = parquet.read([name for name in parquet.schema_arrow.names if columns is None or name in columns])
            # Others write string views.
            rows = rows.cast(pa.schema([fields.field(name) for name in rows.column_names])).replace_schema_metadata()
        if rows.num_rows != file.rows:
            raise Damaged(f"file has {rows.num_rows} rows, not {file.rows}")
        if columns is None or self.day_column in columns:
            day = pl.repeat(file.day, rows.num_rows, eager=True).to_arrow()
            rows = rows.append_column(self.day_column, day)
        return rows

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, rows: pa.Table, level: int = 1) -> list[AddAction]:
        """Write rows to new files, one for each day, and sync them; they count once they are committed.

        Columns that the table has not yet are added to it, which is a commit of its own.
        """
        rows = self.with_day(rows)
        rows = rows.cast(pa.schema([_stored(field) for field in rows.schema]))
        known = {field.name for field in self.delta.schema().fields}
        if new := [field for field in rows.schema if field.name not in known]:
            with store_errors():
                self.delta.alter.add_columns(Schema.from_arrow(pa.schema(new)).fields)
            self.refresh()
            self.sync()
        days = pc.unique(rows[self.day_column])
        if len(days) == 1:
            return [self._file(rows, days[0].as_py(), level)]
        return [self._file(rows.filter(pc.equal(rows[self.day_column], day)), day.as_py(), level) for day in days]

    def with_day(self, rows: pa.Table) -> pa.Table:
        """Return rows with the column of their day."""
        if self.day_column in rows.column_names:
            return rows
        instants = rows[DAY_OF[self.topic.name]].cast(pa.timestamp("ms", str(TEHRAN)))
        return rows.append_column(self.day_column, pc.local_timestamp(instants).cast(pa.date32(), safe=False))

    def _file(self, rows: pa.Table, day: date, level: int) -> AddAction:
        bounds = {name: pc.min_max(rows[name]).as_py() for name in STATISTICS if name in rows.column_names}
        content = BytesIO()
        pq.write_table(
            rows.drop_columns([self.day_column]),
            content,
            compression="zstd",
            compression_level=level,
            row_group_size=ROW_GROUP,
            write_page_checksum=True,
        )
        path = f"{self.day_column}={day}/{uuid4()}.parquet"
        self.storage.put(path, content.getvalue())
        statistics = {
            "numRecords": rows.num_rows,
            "nullCount": {name: rows[name].null_count for name in bounds},
            **{f"{end}Values": {name: found[end] for name, found in bounds.items()} for end in ("min", "max")},
        }
        now = int(time.time() * 1000)
        values = {self.day_column: f"{day}"}
        return AddAction(path, content.tell(), values, now, data_change=True, stats=json.dumps(statistics))

    def commit(
        self,
        adds: Sequence[AddAction] = (),
        removes: Sequence[File] = (),
        *,
        transactions: Mapping[str, int] | None = None,
        rewrites: bool = False,
    ) -> None:
        """Commit on the snapshot at hand, and sync.

        Without `transactions` it is maintenance, which has its own: it keeps files from being replaced twice.
        `rewrites`: the rows stay the same. Raises StoreError, also if another writer was faster.
        """
        if {file.path for file in removes} - {file.path for file in (self.files() if removes else ())}:
            raise StoreError("another writer has replaced files meanwhile")
        versions = transactions or {MAINTENANCE: (self.stored(MAINTENANCE) or 0) + 1}
        for add in adds:
            add.data_change = not rewrites
        now = int(time.time() * 1000)
        gone = [
            RemoveAction(
                path=file.path,
                deletion_timestamp=now,
                data_change=not rewrites,
                partition_values={self.day_column: f"{file.day}"},
                size=file.size,
            )
            for file in removes
        ]
        self.sync()
        with store_errors():
            self.delta.create_write_transaction(
                [*adds, *gone],
                "append",
                self.delta.schema(),
                partition_by=[self.day_column],
                commit_properties=CommitProperties(
                    app_transactions=[Transaction(app, version) for app, version in versions.items()],
                    max_commit_retries=RETRIES,
                ),
            )
        self.refresh()
        self.sync()

    def describe(self, first: Mapping[str, int] | None = None, hole: Sequence[int] | None = None) -> None:
        """Add first offsets, and a hole, to what `about` returns.

        Not in the description: delta-rs holds the interpreter's lock while it changes that, also if a store hangs.
        """
        about = self.about
        holes = [*about["holes"], *([hole] if hole and list(hole) not in about["holes"] else [])]
        changed = {"first": {**about["first"], **(first or {})}, "holes": holes}
        if any(changed[key] != about[key] for key in changed):
            with store_errors():
                self.delta.alter.set_column_metadata("_offset", {ABOUT: json.dumps(changed)})
            self.refresh()
            self.sync()

    def refresh(self) -> None:
        """Load the newest snapshot."""
        with store_errors():
            self.delta.update_incremental()

    def sync(self) -> None:
        """Sync all commits up to the snapshot's to disk, also other writers'; an object store needs nothing."""
        if self.storage.folder is None:
            return
        log, version = self.storage.folder / "_delta_log", self.delta.version()
        with store_errors():
            for number in range(max(0, self._synced + 1), version + 1):
                for path in (log / f"{number:020}.json", log / f"{number:020}.checkpoint.parquet"):
                    if path.exists():
                        sync(path)
            for path in (log / "_last_checkpoint", log, self.storage.folder):
                if path.exists():
                    sync(path)
        self._synced = version


def _stored(field: pa.Field) -> pa.Field:
    """Return a column as the table has it: nullable, instants in microseconds, no dictionaries."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_timestamp(kind):
        kind = pa.timestamp("us", "UTC")
    return pa.field(field.name, kind, nullable=True)


# --- after a power cut ------------------------------------------------------------------------------------------------


def _check_log(log: Path, *, recover: bool) -> None:
    """Remove the newest commit and the newest checkpoint if a power cut has torn them.

    The rows of such a commit are read from Kafka again: its offsets are gone with it.
    """

    def remove(path: Path) -> None:
        if not recover:
            raise StoreError(f"{path} is torn: start the archiver, which removes it")
        get_logger().warning("torn file of the log removed", file=str(path))
        path.unlink()

    names = sorted(os.listdir(log))  # noqa: PTH208  # a year has 75,000 commits, and paths are slow
    commits = {int(name[:20]): name for name in names if name[20:] == ".json" and name[:20].isdigit()}
    checkpoints = [-1, *(int(name[:20]) for name in names if name.endswith(".checkpoint.parquet"))]
    newest = max(commits, default=-1)
    if commits and not _is_whole(log / commits[newest]):
        remove(log / commits[newest])
    pointer, checkpoint = log / "_last_checkpoint", log / f"{checkpoints[-1]:020}.checkpoint.parquet"
    if checkpoint.exists() and not _is_whole(checkpoint):
        if any(version not in commits for version in range(checkpoints[-2] + 1, checkpoints.pop() + 1)):
            raise ConfigurationError(
                f"{checkpoint} is damaged and the commits before it are gone: restore the table from a backup, or "
                "archive into a new folder"
            )
        remove(checkpoint)
        pointer.unlink(missing_ok=True)
    if pointer.exists() and not _is_whole(pointer):
        remove(pointer)
    for version, name in commits.items():
        if checkpoints[-1] < version < newest and not (log / name).stat().st_size:
            raise ConfigurationError(
                f"{log / name} is empty: what it committed is lost. Move it and all later commits out of {log} to read "
                "their rows from Kafka again, or archive into a new folder"
            )
    if recover:
        sync(log)


def _is_whole(path: Path) -> bool:
    content = path.read_bytes()  # a file that cannot be read may be whole
    try:
        if path.suffix == ".parquet":
            pq.ParquetFile(pa.py_buffer(content)).read()
            return True
        return [json.loads(line) for line in content.decode().splitlines()] != []
    except (OSError, ValueError):
        return False
