"""`bourse demo`: a real day through the whole chain, each service a process of its own, and a proof at the end."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
import webbrowser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import httpx2

from bourse_consumers.archive.table import Table
from bourse_producer.replay import Replay
from bourse_sandbox.faults import Fault
from bourse_sandbox.kafka import are_free, free_port
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.options import fault_option
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.stack import BOURSE, Stack, program
from bourse_schemas.errors import BourseError, ConfigurationError, Unreachable
from bourse_schemas.events import TEHRAN, AlertState, Op, Outcome, PollMarker, PriceAlert, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import TopicRecord, follow, group_lag, read
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, POLLS, TRADES
from bourse_schemas.watchdog import stop_on_signals

__all__ = ["demo"]

WARM_UP_POLLS = 5
START_SECONDS, SETTLE_SECONDS = 30.0, 60.0
END_SECONDS, LONGEST_END_SECONDS = 2.0, 15.0  # for the services after Ctrl-C; for the proof too, on a busy machine
BOARD_PORT = 8090


@click.command
@click.option(
    "--replay", default="real", show_default=True, metavar="FILE|real", help="A captured day; real: 2019-08-21."
)
@click.option("--speed", default="60", show_default=True, metavar="N|max", help="Market seconds per second.")
@click.option(
    "--broker",
    default="auto",
    show_default=True,
    metavar="auto|kafka|mock|HOST:PORT",
    help="auto: Apache Kafka, or librdkafka's mock cluster if Kafka is not available.",
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after N seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print nothing but one JSON object at the end.")
@click.option(
    "--rules",
    type=click.Path(dir_okay=False, path_type=Path),
    default=REAL_DAY.with_name("rules.yaml").resolve(),
    help="Alert rules. [default: examples/rules.yaml as shipped]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Folder in which each run gets a folder for its archive, captures and logs.",
)
@click.option("--loop", is_flag=True, help="Begin again after the day's end, with empty topics.")
@click.option("--no-open", is_flag=True, help="Do not open the board in a browser.")
@fault_option
def demo(*, loop: bool, rules: Path, speed: str, replay: str, faults: Sequence[str], **given: Any) -> None:
    """Replay a real trading day through the whole chain: exchange, producers, Kafka, alerts, archive, board."""
    for fault in faults:
        Fault.parse(fault)
    if not rules.is_file():
        raise ConfigurationError(f"--rules {rules}: no such file")
    if replay != "real" and not Path(replay).is_file():
        raise ConfigurationError(f"--replay {replay}: no such file; `real` is the bundled day")
    market = ["--replay", replay, "--days", "1", *(word for fault in faults for word in ("--fault", fault))]
    market += ["--advance", "poll"] if speed == "max" else ["--speed", speed]
    stop, again = stop_on_signals(LONGEST_END_SECONDS), True
    while again:
        Demo(rules=rules, market=market, poll_seconds=_poll_seconds(speed), loop=loop, stop=stop, **given).run()
        again = loop and not stop.is_set()


def _poll_seconds(speed: str) -> float:
    try:
        number = float("inf") if speed == "max" else float(speed)
    except ValueError:
        number = 0.0
    if number <= 0 or (number == float("inf")) != (speed == "max"):
        raise ConfigurationError(f"--speed {speed}: give a number above 0, or max")
    return 60 / number


@dataclass
class Observer:
    """A read_committed consumer that counts what every topic gets, and when; it runs in its own thread."""

    cluster: Cluster
    show: Callable[[str], None]
    polls: list[PollMarker] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    alerts: int = 0
    dead_letters: int = 0
    last_event_ms: dict[int, float] = field(default_factory=dict)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        registry, prefix = self.cluster.registry(), self.cluster.prefix
        self._event_of = registry.deserializer(TradeEvent)
        self._marker_of = registry.deserializer(PollMarker)
        self._alert_of = registry.deserializer(PriceAlert)
        self._topics = {topic.full_name(prefix): topic for topic in (TRADES, POLLS, ALERTS, DEAD_LETTERS)}
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def complete(self) -> bool:
        """Return whether every event that the markers count was seen."""
        return self.ops.total() == sum(marker.events for marker in self.polls)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for batch in follow(self.cluster, dict.fromkeys(self._topics)):
                arrived = time.time() * 1000
                for record in batch.records:
                    self._take(record, arrived)
                if self._stop.is_set():
                    return
        except Exception as error:  # otherwise a thread's error is lost
            self.failure = error

    def _take(self, record: TopicRecord, arrived: float) -> None:
        topic = self._topics[record.place[0]]
        if topic is TRADES:
            event = self._event_of.fields(record.value)
            self.ops[Op(event["op"]).value] += 1
            self.last_event_ms[event["poll_sequence"]] = arrived
        elif topic is POLLS:
            marker = self._marker_of(record.value)
            self.polls.append(marker)
            self.show(f"{marker.requested_at.astimezone(TEHRAN):%H:%M} poll {marker.poll_sequence:<4} {_poll(marker)}")
        elif topic is DEAD_LETTERS:
            self.dead_letters += 1
        else:
            self._take_alert(self._alert_of(record.value))

    def _take_alert(self, alert: PriceAlert) -> None:
        fires, text = alert.state is AlertState.FIRING, (alert.message or {}).get("en")
        self.alerts += fires
        # The end of an alert without a message of its own is no news.
        if text or fires:
            shown = text or alert.title or alert.rule
            self.show(f"{alert.raised_at.astimezone(TEHRAN):%H:%M} {alert.state} {alert.rule}: {shown}")


def _poll(marker: PollMarker) -> str:
    if marker.outcome is Outcome.PUBLISHED:
        return f"{marker.events:>4} events of {marker.rows} instruments"
    return marker.outcome.lower() + (f": {marker.error_kind}" if marker.error_kind else "")


class _Stopped(Exception):
    """Ctrl-C while the services start."""


@dataclass(kw_only=True)
class Demo:
    """One day: the services, the observer, and their end. `market` are options of the practice exchange."""

    rules: Path
    market: list[str]
    poll_seconds: float
    broker: str
    seconds: float | None
    as_json: bool
    data: Path
    no_open: bool
    loop: bool
    stop: threading.Event

    def run(self) -> None:
        """Run the day; raise BourseError if not everything was processed. Ctrl-C before the end is no failure."""
        self._folder = self.data / f"demo-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  # for people: their own time
        try:
            (self._folder / "logs").mkdir(parents=True)
        except OSError as error:
            raise ConfigurationError(f"--data {self.data}: cannot make {self._folder}: {error.strerror}") from error
        began, self._children, self._board = time.monotonic(), dict[str, Child](), ""
        self._day_calls: frozenset[str] | None = None
        self._served: dict[str, Any] = {"day_over": False, "sent": {}}
        day = "21 August 2019, a real trading day" if "real" in self.market else self.market[1]
        self._show(
            f"Replays {day} at the Tehran exchange. Nothing here is live.\n"
            "Real: the market's data, Apache Kafka, every service. Simulated: the exchange's server, and its clock.\n"
            "practice exchange → two producers → Kafka → alerts, archive, board. Ctrl-C ends it.\n"
        )
        with ExitStack() as self._services:
            with self._step("Kafka, registry, topics"):
                self._stack = self._services.enter_context(Stack(self.broker))
            if self._stack.note:
                click.echo(self._stack.note, err=True)
            self._http = self._services.enter_context(httpx2.Client(trust_env=False, timeout=2))
            self._observer = Observer(self._stack.cluster, self._show)
            self._services.callback(self._observer.close)
            with suppress(_Stopped):
                self._start()
                finished = self._play(began)
                summary = self._summary(time.monotonic() - began)
                click.echo(json.dumps(summary) if self.as_json else _text(summary, self._folder))
                if not finished or any(summary["proof"][kind] for kind in ("lost", "twice", "unknown")):
                    raise BourseError(f"the proof failed; the services' logs are in {self._folder / 'logs'}")
                self._linger()

    def _show(self, text: str) -> None:
        if not self.as_json:
            click.echo(text)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Print a line of the check list."""
        began = time.monotonic()
        if sys.stdout.isatty() and not self.as_json:
            click.echo(f"  … {name}\r", nl=False)
        yield
        self._show(f"  ✓ {name} ({time.monotonic() - began:.1f} s)")

    def _start(self) -> None:
        """Start every service and wait until it is ready."""
        archive = ["--to", str(self._folder / "archive"), "--commit-seconds", "2"]
        ready = {
            "archive": self._serve("archive", "consume", "archive", *archive),
            "alerts": self._serve("alerts", "consume", "alerts", "--rules", str(self.rules)),
        }
        if not self.as_json:
            ready["board"] = self._serve("board", "board", port=_free(BOARD_PORT))
            self._board = ready["board"]
        for name, url in ready.items():
            with self._step(name):
                self._await(name, lambda url=url: self._is_ready(url))  # type: ignore[misc]  # mypy: no default
        # Last, as its clock does not wait for the others.
        self._spawn("exchange", "sandbox", "exchange", "--port", "0", *self.market)
        with self._step("exchange"):
            log = self._folder / "logs" / "exchange.log"
            self._await("exchange", lambda: log.is_file() and "\n" in log.read_text("utf-8"))
            self._exchange = log.read_text("utf-8").split()[2]
        self._produce("producer")
        with self._step("producer: first poll published"):
            self._await("producer", lambda: self._observer.polls)
        # Only now: the one that the introduction names to be killed is to be the leader.
        self._produce("standby")
        self._show(self._introduction())

    def _produce(self, name: str) -> None:
        timing = ["--schedule", "always", "--clock", "response", "--poll-seconds", str(self.poll_seconds)]
        captured = ["--capture", str(self._folder / "capture" / name)]
        self._serve(name, "produce", "--address", self._exchange, *timing, *captured)

    def _introduction(self) -> str:
        seen = f"\nThe board: {self._board}/\n" if self._board else "\n"
        if "SSH_CONNECTION" in os.environ and self._board:
            port = self._board.rpartition(":")[2]
            seen += f"From your own machine: ssh -L {port}:127.0.0.1:{port} {os.uname().nodename}\n"
        elif self._board and not self.no_open and sys.stdout.isatty() and _has_desktop():
            webbrowser.open(self._board)
        return f"{seen}Kill the producer and watch the standby take over: kill -9 {self._children['producer'].pid}\n"

    def _serve(self, name: str, *command: str, port: int = 0) -> str:
        port = port or free_port()
        self._spawn(name, *command, "--http", str(port))
        return f"http://127.0.0.1:{port}"

    def _spawn(self, name: str, *command: str) -> None:
        log = self._folder / "logs" / f"{name}.log"
        child = spawn([*BOURSE, *command], env=self._stack.environment, stdout=log, stderr=log)
        self._children[name] = self._services.enter_context(child)

    def _is_ready(self, url: str) -> bool:
        try:
            return self._http.get(f"{url}/readyz").is_success
        except httpx2.TransportError:
            return False

    def _await(self, name: str, condition: Callable[[], Any]) -> None:
        done = _wait(lambda: self._alive() and condition(), START_SECONDS, self.stop)
        if self.stop.is_set():
            raise _Stopped
        if not done:
            raise BourseError(f"{name} did not start within {START_SECONDS:.0f} s: see {self._folder / 'logs'}")

    def _alive(self) -> bool:
        """Raise if a service has ended by itself: the rest would mislead. A killed producer has its standby."""
        for name, child in list(self._children.items()):
            code = child.poll()
            if code == 2:  # the operator must change something: the service has printed what
                raise ConfigurationError(child.log_tail(2).rpartition("Error: ")[2])
            if (
                code == -signal.SIGKILL
                and name in {"producer", "standby"}
                and {"producer", "standby"} <= {*self._children}
            ):
                del self._children[name]
                self._show(f"The {name} was killed; the other one takes over.")
            elif code is not None:
                raise BourseError(f"{name} ended with exit code {code}:\n{child.log_tail(10)}")
        if self._observer.failure is not None:
            raise self._observer.failure
        self._stack.require_running()
        return True

    def _play(self, began: float) -> bool:
        """Wait for the end: of the day, of the time, or Ctrl-C. Return False if not everything was processed then."""
        end = began + (self.seconds or float("inf"))
        while self._alive() and not self.stop.is_set() and time.monotonic() < end and not self._day_is_over():
            self.stop.wait(0.05)
        self._sent = self._state()["sent"]
        if self.stop.is_set():
            self._signal(*self._children)
        self._end("producer", "standby")
        self._derive()
        settled = _wait(self._settled, SETTLE_SECONDS, self.stop)
        self._end(*(name for name in self._children if name != "board"))
        return bool(settled) or self.stop.is_set()

    def _linger(self) -> None:
        """Keep the board until Ctrl-C, if somebody is there to look at it."""
        if self._board and sys.stdout.isatty() and not (self.stop.is_set() or self.seconds or self.loop):
            self._show(f"\nThe board still shows the day: {self._board}/ . Ctrl-C ends it.")
            while self._alive() and not self.stop.wait(0.5):
                pass
        self._end(*self._children)

    def _signal(self, *names: str) -> None:
        for name in names:
            if name in self._children:
                self._children[name].send(signal.SIGTERM)

    def _end(self, *names: str) -> None:
        """Ask services to end, all at once; kill those that take too long."""
        self._signal(*names)
        children = [self._children.pop(name) for name in names if name in self._children]
        deadline = time.monotonic() + (END_SECONDS if self.stop.is_set() else 10)
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                child.kill()

    def _state(self) -> dict[str, Any]:
        """Return what the practice exchange has served; the answer before if it is too busy to answer."""
        with suppress(httpx2.TransportError):
            self._served = self._http.get(f"{self._exchange}/practice/state").json()
        return self._served

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
        if not self._observer.complete() or len(self._event_ids) != self._archived():
            return False
        if (
            not self._event_ids or self._stack.kind == "mock"
        ):  # the mock cluster forgets offsets committed in a transaction
            return True
        try:
            (alerts,) = group_lag(self._stack.cluster, [f"{self._stack.cluster.prefix}-alerts"])
        except Unreachable:
            return False  # a busy broker is asked again
        return alerts.lag == 0

    def _archived(self) -> int:
        """Return how many rows the archive has, by its log."""
        table = self._archive()
        return sum(file.rows for file in table.files()) if table else 0

    def _archive(self) -> Table | None:
        return Table.open(str(self._folder / "archive" / TRADES.full_name(self._stack.cluster.prefix)))

    def _derive(self) -> None:
        """Read what the ended producers published, and derive it again from the bytes that they captured."""
        registry, prefix = self._stack.cluster.registry(), self._stack.cluster.prefix
        marker_of, event_of = registry.deserializer(PollMarker), registry.deserializer(TradeEvent)
        markers = [marker_of(record.value) for record in read(self._stack.cluster, POLLS.full_name(prefix))]
        trades = read(self._stack.cluster, TRADES.full_name(prefix))
        self._event_ids = [event_of.fields(record.value)["event_id"] for record in trades]
        self._replay = Replay({each for marker in markers for each in (marker.poll_id, marker.rights_poll_id) if each})
        captures = (self._folder / "capture").glob("*/capture-*.gz")
        self._replay.capture(sorted(captures, key=lambda path: path.name))

    def _proof(self) -> dict[str, int]:
        """Compare the events derived again with those on Kafka and in the archive, by id."""
        events = {event.event_id for event in self._replay.events}
        table = self._archive()
        archived = table.arrow(table.files(), ["event_id"])["event_id"].to_pylist() if table else []
        held = {"kafka": self._event_ids, "archive": archived}
        return {
            "derived": len(self._replay.events),
            **{name: len(ids) for name, ids in held.items()},
            # After Ctrl-C an archive that had no time to commit lacks the last seconds: they are still on Kafka.
            "lost": sum(
                len(events - set(ids)) for name, ids in held.items() if name == "kafka" or not self.stop.is_set()
            ),
            "twice": sum(len(ids) - len(set(ids)) for ids in held.values()),
            "unknown": sum(len(set(ids) - events) for ids in held.values()),
        }

    def _summary(self, seconds: float) -> dict[str, Any]:
        """Return the result, counted from the topics, the captures and the archive."""
        seen, proof = self._observer, self._proof()
        visible = sorted(
            seen.last_event_ms[marker.poll_sequence] - self._sent[marker.poll_id]
            for marker in seen.polls[WARM_UP_POLLS:]
            if marker.poll_id in self._sent and marker.poll_sequence in seen.last_event_ms
        )
        p99 = visible[min(len(visible) - 1, int(len(visible) * 0.99))] if visible else None
        ops = {op.value: seen.ops[op] for op in (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)}
        return {
            "broker": self._stack.kind,
            "polls": len(seen.polls),
            "rows": sum(marker.rows for marker in seen.polls),
            "events": {**ops, "total": seen.ops.total()},
            "alerts": seen.alerts,
            "archived_rows": proof["archive"],
            "dead_letters": seen.dead_letters,
            "visible_ms": {"p50": round(statistics.median(visible), 1), "p99": round(p99, 1)} if p99 else None,
            "proof": proof,
            "seconds": round(seconds, 1),
        }


def _has_desktop() -> bool:
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def _free(port: int) -> int:
    """Return this port, or the next one that is free."""
    while not are_free([port]):
        port += 1
    return port


def _wait(condition: Callable[[], Any], seconds: float, stop: threading.Event) -> Any:
    """Return the condition's first true value, or its last one when the time is over or `stop` is set."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline and not stop.wait(0.05):
        pass
    return value


def _text(summary: dict[str, Any], folder: Path) -> str:
    proof, visible, bourse = summary["proof"], summary["visible_ms"], program("bourse")
    kinds = ", ".join(f"{count:,} {op}" for op, count in summary["events"].items() if op != "total")
    shown = (
        f"From the exchange's last byte to a consumer: p50 {visible['p50']} ms, p99 {visible['p99']} ms.\n"
        if visible
        else ""
    )
    trades = folder / "archive" / TRADES.full_name("bourse")
    columns = "'symbol', 'traded_at', 'last_price', 'op'"
    return (
        f"\n{summary['polls']:,} polls, {summary['rows']:,} rows → {kinds}; "
        f"{summary['alerts']:,} alerts fired, {summary['dead_letters']:,} dead letters.\n{shown}"
        f"Proof: {proof['derived']:,} events derived again from the exchange's bytes, {proof['kafka']:,} on Kafka, "
        f"{proof['archive']:,} in the archive; lost {proof['lost']}, twice {proof['twice']}, "
        f"unknown {proof['unknown']}.\n"
        "\nNext:\n"
        f"  {bourse} replay {folder / 'capture'}/* --json | head -3\n"
        f'  {program("python")} -c "import polars as pl; '
        f"print(pl.read_delta('{trades}').select({columns}).head())\"\n"
        f"  {bourse} archive verify --to {folder / 'archive'} --no-topic\n"
        f"  {bourse} sandbox up --produce --kafka-port 9092 --registry-port 8081\n"
        "With an account at the exchange: docs/operate.md."
    )
