"""What `bourse demo` does: services as processes of their own, an observer that counts, a summary at the end."""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx2

from bourse_cli.options import stop_on_signals
from bourse_consumers.archive.table import Table
from bourse_sandbox.faults import Fault
from bourse_sandbox.kafka import free_port
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.stack import BOURSE, Stack, program
from bourse_schemas.errors import BourseError, ConfigurationError, Unreachable
from bourse_schemas.events import Op, Outcome, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import follow, group_lag
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, POLLS, TRADES

__all__ = ["Options", "run"]

_OPS = tuple(op.value for op in (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED))
WARM_UP_POLLS = 5
START_SECONDS = 30.0
SETTLE_SECONDS = 60.0
COMMITS = ("--commit-seconds", "2", "--no-optimize")
END_SECONDS = 1.5  # for the services after Ctrl-C


@dataclass(frozen=True, slots=True)
class Options:
    """The demo's options, as on the command line."""

    replay: str
    speed: str
    broker: str
    seconds: float | None
    as_json: bool
    rules: Path | None
    data: Path
    faults: Sequence[str]

    def market(self) -> tuple[list[str], float]:
        """Return the exchange's options and the seconds between polls; raise ConfigurationError."""
        if self.replay != "real" and not Path(self.replay).is_file():
            raise ConfigurationError(f"--replay {self.replay}: no such file; `real` is the bundled day")
        market = ["--replay", self.replay, *(word for fault in self.faults for word in ("--fault", fault))]
        if self.speed == "max":
            return [*market, "--advance", "poll"], 0.0
        try:
            speed = float(self.speed)
        except ValueError:
            speed = 0.0
        if not 0 < speed < float("inf"):
            raise ConfigurationError(f"--speed {self.speed}: give a number above 0, or max")
        return [*market, "--speed", str(speed)], 60 / speed


def run(options: Options) -> int:
    """Run the demo; return its exit code."""
    for fault in options.faults:
        Fault.parse(fault)
    rules = options.rules or REAL_DAY.with_name("rules.yaml").resolve()
    if not rules.is_file():
        raise ConfigurationError(f"--rules {rules}: no such file")
    options.market()
    folder = options.data / f"demo-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  # a name for people: their own time
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(f"--data {options.data}: cannot make {folder}: {error.strerror}") from error
    stop, began = stop_on_signals(), time.monotonic()
    if not options.as_json:
        day = "21 August 2019, a real trading day" if options.replay == "real" else options.replay
        click.echo(
            f"Replays {day} at the Tehran exchange. Nothing here is live.\n"
            "practice exchange → producer → Kafka → alerts, archive, this screen. Ctrl-C ends it.\n"
        )
    with ExitStack() as services:
        with _step("Kafka, registry, topics", options.as_json):
            stack = services.enter_context(Stack(options.broker))
        if stack.note:
            click.echo(stack.note, err=True)
        run = _Run(options, stack, folder, services, stop)
        try:
            run.start(rules)
        except _Stopped:
            return 0
        finished = run.play(began)
        summary = run.summary(time.monotonic() - began)
    click.echo(json.dumps(summary) if options.as_json else _text(summary, run.table))
    return 0 if finished else 1


@dataclass
class Observer:
    """A read_committed consumer that counts what every topic gets, and when; it runs in its own thread."""

    cluster: Cluster
    polls: list[PollMarker] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    last_event_ms: dict[int, float] = field(default_factory=dict)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:  # otherwise a thread's error is lost
            self.failure = error

    def _read(self) -> None:
        registry, prefix = self.cluster.registry(), self.cluster.prefix
        event_of, marker_of = registry.deserializer(TradeEvent), registry.deserializer(PollMarker)
        trades, polls = TRADES.full_name(prefix), POLLS.full_name(prefix)
        names = [trades, polls, ALERTS.full_name(prefix), DEAD_LETTERS.full_name(prefix)]
        for batch in follow(self.cluster, dict.fromkeys(names)):
            arrived = time.time() * 1000
            for record in batch.records:
                if record.place[0] == trades:
                    fields = event_of.fields(record.value)
                    self.ops[Op(fields["op"]).value] += 1
                    self.last_event_ms[fields["poll_sequence"]] = arrived
                elif record.place[0] == polls:
                    self.polls.append(marker_of(record.value))
                else:
                    self.others[record.place[0]] += 1
            if self._stop.is_set():
                return


class _Stopped(Exception):
    """Ctrl-C while the services start."""


class _Run:
    """The services, the observer, and their end."""

    def __init__(
        self, options: Options, stack: Stack, folder: Path, services: ExitStack, stop: threading.Event
    ) -> None:
        self._options, self._stack, self._folder, self._services, self._stop = options, stack, folder, services, stop
        self.table = f"{folder}/archive/{TRADES.full_name(stack.cluster.prefix)}"
        self._children: dict[str, Child] = {}
        self._url = ""
        self._sent: dict[str, float] = {}
        self._day_calls: frozenset[str] | None = None
        self._http = services.enter_context(httpx2.Client(trust_env=False))
        self._observer = Observer(stack.cluster)
        services.callback(self._observer.close)

    def start(self, rules: Path) -> None:
        """Start every service and wait until it is ready."""
        market, seconds = self._options.market()
        archive, quiet = str(self._folder / "archive"), self._options.as_json
        timing = ["--schedule", "always", "--clock", "response", "--poll-seconds", str(seconds)]
        self._spawn("exchange", "sandbox", "exchange", "--port", "0", *market)
        ready = {
            "archive": self._serve("archive", "consume", "archive", "--to", archive, *COMMITS),
            "alerts": self._serve("alerts", "consume", "alerts", "--rules", str(rules)),
        }
        with _step("practice exchange", quiet):
            log = self._folder / "logs" / "exchange.log"
            self._await("exchange", lambda: log.is_file() and "\n" in log.read_text("utf-8"))
            self._url = log.read_text("utf-8").split()[2]
        self._serve("producer", "produce", "--address", self._url, *timing)
        for name, url in ready.items():
            with _step(name, quiet):
                self._await(name, partial(self._is_ready, url))
        with _step("producer: first poll published", quiet):
            self._await("producer", lambda: self._observer.polls)
        if not quiet:
            self._spawn("watch", "watch", terminal=True)

    def _serve(self, name: str, *command: str) -> str:
        port = str(free_port())
        self._spawn(name, *command, "--http", port)
        return f"http://127.0.0.1:{port}/readyz"

    def _spawn(self, name: str, *command: str, terminal: bool = False) -> None:
        log = self._folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        out = None if terminal else log
        child = spawn(
            [*BOURSE, *command], env=self._stack.environment, stdout=out, stderr=log, inherit_terminal=terminal
        )
        self._children[name] = self._services.enter_context(child)

    def _is_ready(self, url: str) -> bool:
        try:
            return self._http.get(url).is_success
        except httpx2.TransportError:
            return False

    def _await(self, name: str, condition: Callable[[], Any]) -> None:
        done = _wait(lambda: self._alive() and condition(), START_SECONDS, self._stop)
        if self._stop.is_set():
            raise _Stopped
        if not done:
            raise BourseError(
                f"{name} did not start within {START_SECONDS:.0f} s; its log is in {self._folder / 'logs'}"
            )

    def _alive(self) -> bool:
        """Raise if a service has ended by itself: the rest would mislead."""
        for name, child in self._children.items():
            code = child.poll()
            if name == "watch" and code == 0:
                self._stop.set()
            elif code == 2:  # the operator must change something: the service has printed what
                raise ConfigurationError(child.log_tail(2).rpartition("Error: ")[2])
            elif code is not None:
                raise BourseError(f"{name} ended with exit code {code}:\n{child.log_tail(10)}")
        if self._observer.failure is not None:
            raise self._observer.failure
        self._stack.require_running()
        return True

    def play(self, began: float) -> bool:
        """Wait for the end: of the day, of the time, or Ctrl-C. Return False if not everything was processed then."""
        seconds = self._options.seconds or float("inf")
        over = False
        while self._alive() and not self._stop.is_set() and not over and time.monotonic() - began < seconds:
            over = self._options.speed == "max" and self._day_is_over()
            self._stop.wait(0.05)
        self._sent = self._state()["sent"]
        if not self._stop.is_set():
            self._end("producer")
            settled = _wait(self._settled, SETTLE_SECONDS, self._stop)
        self._end(*self._children)
        return self._stop.is_set() or bool(settled)

    def _end(self, *names: str) -> None:
        """Ask services to end, all at once; kill those that take too long."""
        children = [self._children.pop(name) for name in names if name in self._children]
        for child in children:
            child.send(signal.SIGTERM)
        deadline = time.monotonic() + (END_SECONDS if self._stop.is_set() else 10)
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                child.kill()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._http.get(f"{self._url}/practice/state").json()
        return state

    def _day_is_over(self) -> bool:
        """Return whether the whole day is published: asked again after its last response, nothing had changed."""
        polls = self._observer.polls
        if not polls or polls[-1].outcome is not Outcome.UNCHANGED:
            return False
        state = self._state()
        if state["day_over"] and self._day_calls is None:
            self._day_calls = frozenset(state["sent"])
        return self._day_calls is not None and polls[-1].poll_id in state["sent"].keys() - self._day_calls

    def _settled(self) -> bool:
        """Return whether every event of the markers was seen, archived, and read by the alerts."""
        counted = ((marker.opened, marker.traded, marker.revised, marker.cancelled) for marker in self._observer.polls)
        events = self._observer.ops.total()
        if events != sum(map(sum, counted)) or events != self._archived():
            return False
        if not events or self._stack.kind == "mock":  # the mock cluster forgets offsets committed in a transaction
            return True
        try:
            (alerts,) = group_lag(self._stack.cluster, [f"{self._stack.cluster.prefix}-alerts"])
        except Unreachable:
            return False  # a busy broker is asked again
        return alerts.lag == 0

    def _archived(self, *, read: bool = False) -> int:
        """Return how many rows the archive has: by its log, or by reading them."""
        table = Table.open(self.table)
        if table is None:
            return 0
        files = table.files()
        return table.arrow(files, ["_offset"]).num_rows if read else sum(file.rows for file in files)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the result, counted from the topics and the archive."""
        seen, prefix = self._observer, self._stack.cluster.prefix
        visible = sorted(
            seen.last_event_ms[marker.poll_sequence] - self._sent[marker.poll_id]
            for marker in seen.polls[WARM_UP_POLLS:]
            if marker.poll_id in self._sent and marker.poll_sequence in seen.last_event_ms
        )
        p99 = visible[min(len(visible) - 1, int(len(visible) * 0.99))] if visible else None
        return {
            "broker": self._stack.kind,
            "polls": len(seen.polls),
            "rows": sum(marker.rows for marker in seen.polls),
            "events": {**{op: seen.ops[op] for op in _OPS}, "total": seen.ops.total()},
            "alerts": seen.others[ALERTS.full_name(prefix)],
            "archived_rows": self._archived(read=not self._stop.is_set()),
            "dead_letters": seen.others[DEAD_LETTERS.full_name(prefix)],
            "visible_ms": {"p50": round(statistics.median(visible), 1), "p99": round(p99, 1)} if p99 else None,
            "seconds": round(seconds, 1),
        }


@contextmanager
def _step(name: str, quiet: bool) -> Iterator[None]:
    """Print a line of the check list."""
    began = time.monotonic()
    yield
    if not quiet:
        click.echo(f"  ✓ {name} ({time.monotonic() - began:.1f} s)")


def _wait(condition: Callable[[], Any], seconds: float, stop: threading.Event) -> Any:
    """Return the condition's first true value, or its last one when the time is over or `stop` is set."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline and not stop.wait(0.05):
        pass
    return value


def _text(summary: dict[str, Any], archive: str) -> str:
    events, visible, bourse = summary["events"], summary["visible_ms"], program("bourse")
    at = "--bootstrap-servers 127.0.0.1:9092 --registry-url http://127.0.0.1:8081"
    behind = summary["archived_rows"] < events["total"]
    kinds = ", ".join(f"{events[op]:,} {op}" for op in _OPS)
    shown = (
        f"From the exchange's last byte to a consumer: p50 {visible['p50']} ms, p99 {visible['p99']} ms.\n"
        if visible
        else ""
    )
    return (
        f"\n{summary['polls']:,} polls, {summary['rows']:,} rows → {events['total']:,} events ({kinds}), "
        f"{summary['alerts']:,} alerts, {summary['dead_letters']:,} dead letters; "
        f"{summary['archived_rows']:,} rows archived{' so far' * behind}.\n{shown}"
        "\nNext:\n"
        f"  {bourse} replay {REAL_DAY} --json | head -3\n"
        f"  {program('python')} -c \"import polars as pl; print(pl.scan_delta('{archive}').head(5).collect())\"\n"
        f"  {bourse} sandbox up --produce --kafka-port 9092 --registry-port 8081\n"
        "and while it runs, in a second terminal:\n"
        f"  {bourse} tail trades --from-beginning {at}\n"
        "With an account at the exchange: docs/operate.md."
    )
