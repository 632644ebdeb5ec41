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
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import click
import httpx2

from bourse_sandbox.faults import Fault
from bourse_sandbox.kafka import are_free, free_port
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.options import fault_option
from bourse_sandbox.processes import Child, interruptible, spawn
from bourse_sandbox.stack import Stack, private_file, program
from bourse_schemas.errors import BourseError, ConfigurationError, Unreachable, counted, printable
from bourse_schemas.events import TEHRAN, AlertState, Op, Outcome, PollMarker, PriceAlert
from bourse_schemas.reading import Partition, follow, group_lag, read
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, POLLS, TRADES, Topic
from bourse_schemas.watchdog import stop_on_signals, unwatched

WARM_UP_POLLS = 5
START_SECONDS, SETTLE_SECONDS = 30.0, 60.0
END_SECONDS, LONGEST_END_SECONDS = 2.0, 15.0  # after Ctrl-C: for the services; for all but the comparison
BOARD_PORT = 8090
PERSIAN = str.maketrans("0123456789,", "۰۱۲۳۴۵۶۷۸۹٬")
# What each service imports while it waits for others.
IMPORTS = {
    "board": "bourse_consumers.board.server",
    "archive": "bourse_consumers.archive.sink",
    "alerts": "bourse_consumers.alerts.consumer",
    "exchange": "bourse_sandbox.exchange",
    "producer": "bourse_producer.command",
    "standby": "bourse_producer.command",
}


FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
RULES = REAL_DAY.with_name("rules.yaml").resolve()
BROKERS = "auto|kafka|mock|HOST:PORT"
BROKER_HELP = "auto: Apache Kafka, or librdkafka's mock cluster if Kafka is not available."
RULES_HELP = "Alert rules. [default: examples/rules.yaml as shipped]"
DATA_HELP = "Folder in which each run gets a folder for its archive, captures and logs."


@click.command(context_settings={"show_default": True})
@click.option("--replay", default="real", metavar="FILE|real", help="A captured day; real: 2019-08-21.")
@click.option("--speed", default="60", metavar="N|max", help="Market seconds per second.")
@click.option("--broker", default="auto", metavar=BROKERS, help=BROKER_HELP)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after N seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print nothing but one JSON object at the end.")
@click.option("--rules", type=FILE, default=RULES, show_default=False, help=RULES_HELP)
@click.option("--data", type=FOLDER, default=Path("data"), help=DATA_HELP)
@click.option("--loop", is_flag=True, help="Begin again after the day's end, with empty topics.")
@click.option("--no-open", is_flag=True, help="Do not open the board in a browser.")
@fault_option
def demo(*, loop: bool, rules: Path, speed: str, replay: str, faults: Sequence[str], **given: Any) -> None:
    """Replay a real trading day through the whole chain: exchange, producers, Kafka, alerts, archive, board."""
    for fault in faults:
        Fault.parse(fault)
    if not rules.is_file():
        raise ConfigurationError(f"--rules {rules}: no such file")
    if rules != RULES:
        from bourse_consumers.alerts.rules_file import load

        if wrong := load(rules)[2]:
            raise ConfigurationError(wrong)
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
    if not number > 0 or (number == float("inf")) != (speed == "max"):
        raise ConfigurationError(f"--speed {speed}: give a number above 0, or max")
    return 60 / number


@dataclass(kw_only=True)
class Demo:
    """One day: the services, what they publish, and their end. `market` are options of the practice exchange."""

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
    _children: dict[str, Child] = field(default_factory=dict)
    _board: str = ""
    _last: PollMarker | None = None
    # By partition and offset, so that each is read once.
    _events: dict[tuple[Partition, int], dict[str, Any]] = field(default_factory=dict)
    _alerts: int = 0
    _dead_letters: int = 0
    # When the newest event of a poll was seen here, and when the exchange had sent a response: epoch milliseconds.
    _seen_ms: dict[int, float] = field(default_factory=dict)
    _served: dict[str, Any] = field(default_factory=lambda: {"day_over": False, "sent": {}})
    _day_calls: frozenset[str] | None = None

    def run(self) -> None:
        """Run the day; raise BourseError if not everything was processed. Ctrl-C before the end is no failure."""
        now = datetime.now()  # noqa: DTZ005  # for people: their own time
        self._folder = self.data / f"demo-{now:%Y%m%d-%H%M%S}-{os.getpid()}"
        self._logs = self._folder / "logs"
        try:
            self._logs.mkdir(parents=True)
        except OSError as error:
            raise ConfigurationError(f"--data {self.data}: cannot make {self._folder}: {error.strerror}") from error
        self._began = time.monotonic()
        day = "21 August 2019, a real trading day" if "real" in self.market else self.market[1]
        self._show(
            f"Replays {day} at the Tehran exchange. Nothing here is live.\n"
            "Real: the market's data, Apache Kafka, every service. Simulated: the exchange's server, and its clock.\n"
            "practice exchange → two producers → Kafka → alerts, archive, board. Ctrl-C ends it.\n"
        )
        with ExitStack() as self._services:
            try:
                with interruptible():
                    self._start()
            except KeyboardInterrupt:
                self._show("\nStopped before the day began.")
                return
            finished = self._play()
            summary = self._summary()
            click.echo(json.dumps(summary) if self.as_json else _text(summary, self._folder))
            if self._board:
                self._show_on_board(summary["proof"])
            if not finished or any(summary["proof"][kind] for kind in ("lost", "twice", "unknown")):
                raise BourseError(f"the proof failed; the services' logs are in {self._logs}")
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
        """Start every service and wait until it is ready; the board imports its modules while Kafka starts."""
        self._http = self._services.enter_context(httpx2.Client(trust_env=False, timeout=2))
        self._stack = Stack(self.broker)
        self._services.push(self._stack)
        self._services.callback(lambda: self._end(*self._children))
        if not self.as_json:
            self._spawn("board", "board", "--notice", str(self._folder / "notice"))
        with self._step("Kafka, registry, topics"):
            self._stack.__enter__()
        if not self.as_json:
            # Not earlier: another demo may have taken it meanwhile.
            port = next(port for port in count(BOARD_PORT) if are_free([port]))
            self._board = f"http://127.0.0.1:{port}"
            self._let("board", BOURSE_BOARD_HTTP=str(port))
        self._let("archive", "alerts")
        if self._stack.note:
            click.echo(self._stack.note, err=True)
        registry, prefix = self._stack.cluster.registry(), self._stack.cluster.prefix
        self._topics = {topic.full_name(prefix): topic for topic in (TRADES, POLLS, ALERTS, DEAD_LETTERS)}
        self._decode: dict[Topic, Any] = {topic: registry.deserializer(topic.event) for topic in self._topics.values()}
        self._batches = follow(self._stack.cluster, dict.fromkeys(self._topics))
        archive = ["--to", str(self._folder / "archive"), "--commit-seconds", "2"]
        consumers = {
            "archive": self._serve("archive", "consume", "archive", *archive),
            "alerts": self._serve("alerts", "consume", "alerts", "--rules", str(self.rules)),
        }
        if self._board:
            with self._step("board"):
                self._await("board", lambda: self._answers(f"{self._board}/livez"))
            self._introduce()
        self._spawn("exchange", "sandbox", "exchange", "--port", "0", *self.market)
        self._produce("producer")
        for name, url in consumers.items():
            with self._step(name):
                self._await(name, lambda url=url: self._answers(f"{url}/readyz"))  # type: ignore[misc]  # no default
        # Last, as its clock does not wait for the others.
        with self._step("exchange"):
            self._let("exchange")
            self._exchange = self._await("exchange", self._reported_address)
        with self._step("producer: first poll"):
            self._let("producer", BOURSE_ADDRESS=self._exchange)
            self._await("producer", lambda: self._last)
        # Only now: the one that is to be killed is to be the leader.
        self._produce("standby")
        self._let("standby", BOURSE_ADDRESS=self._exchange)
        self._show(f"\nKill the producer and see the standby take over: kill -9 {self._children['producer'].pid}\n")

    def _introduce(self) -> None:
        cluster = self._stack.cluster
        seen = (
            f"    The board, which fills in a moment: {self._board}/\n    For commands that the page shows: "
            f"export BOURSE_BOOTSTRAP_SERVERS={cluster.bootstrap_servers} BOURSE_REGISTRY_URL={cluster.registry_url}"
        )
        if "SSH_CONNECTION" in os.environ:
            port = self._board.rpartition(":")[2]
            seen += f"\n    From your own machine: ssh -L {port}:127.0.0.1:{port} {os.uname().nodename}"
        elif not self.no_open and sys.stdout.isatty() and _has_desktop():
            webbrowser.open(self._board)
        self._show(seen)

    def _produce(self, name: str) -> None:
        timing = ["--schedule", "always", "--clock", "response", "--poll-seconds", str(self.poll_seconds)]
        captured = ["--capture", str(self._folder / "capture" / name)]
        self._serve(name, "produce", *timing, *captured)

    def _serve(self, name: str, *command: str) -> str:
        port = free_port()
        self._spawn(name, *command, "--http", str(port))
        return f"http://127.0.0.1:{port}"

    def _spawn(self, name: str, *command: str) -> None:
        """Start a service; it imports its modules, and begins when it is let."""
        log, begin = self._logs / f"{name}.log", self._logs / f"{name}.begin"
        warm = [sys.executable, "-m", "bourse_sandbox.warm", str(begin), IMPORTS[name]]
        self._children[name] = spawn([*warm, *command], stdout=log, stderr=log)

    def _let(self, *names: str, **more: str) -> None:
        """Let services begin, in the environment of the cluster."""
        for name in names:
            new = private_file(self._logs / "new", json.dumps(self._stack.variables | more))
            new.replace(self._logs / f"{name}.begin")

    def _answers(self, url: str) -> bool:
        try:
            return self._http.get(url).is_success
        except httpx2.TransportError:
            return False

    def _reported_address(self) -> str:
        """Return where the practice exchange listens, once it does."""
        return self._children["exchange"].log_tail(1).partition("practice exchange: ")[2].partition(" ")[0]

    def _await(self, name: str, condition: Callable[[], Any]) -> Any:
        """Return what is true within START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while not (value := condition()):
            self._take_batch()
            if time.monotonic() > deadline:
                raise BourseError(f"{name} did not start within {START_SECONDS:.0f} s: see {self._logs}")
        return value

    def _require_alive(self) -> None:
        """Raise if a service has ended by itself: the rest would mislead. A killed producer has its standby."""
        for name, child in list(self._children.items()):
            code = child.poll()
            if code == 2:  # the operator must change something: the service has printed what
                raise ConfigurationError(child.log_tail(2).rpartition("Error: ")[2])
            producers = {"producer", "standby"}
            if code == -signal.SIGKILL and name in producers and producers <= self._children.keys():
                del self._children[name]
                self._show(f"The {name} was killed; the other one takes over.")
            elif code is not None:
                raise BourseError(f"{name} ended with exit code {code}:\n{child.log_tail(10)}")
        self._stack.require_running()

    def _take_batch(self) -> None:
        """Show what the services publish within a moment."""
        self._require_alive()
        batch = next(self._batches)
        arrived = time.time() * 1000
        for record in batch.records:
            topic = self._topics[record.place[0]]
            if topic is TRADES:
                event = self._events[record.place, record.offset] = self._decode[topic].fields(record.value)
                self._seen_ms[event["poll_sequence"]] = arrived
            elif topic is DEAD_LETTERS:
                self._dead_letters += 1
            elif topic is ALERTS:
                self._take_alert(self._decode[topic](record.value))
            else:
                self._last = marker = self._decode[topic](record.value)
                at = f"{(marker.received_at or marker.requested_at).astimezone(TEHRAN):%H:%M}"
                self._show(f"{at} poll {marker.poll_sequence:<4} {_poll(marker)}")

    def _take_alert(self, alert: PriceAlert) -> None:
        fires, text = alert.state is AlertState.FIRING, (alert.message or {}).get("en")
        self._alerts += fires
        # The end of an alert without a message of its own is no news.
        if text or fires:
            shown = printable(f"{alert.rule}: {text or alert.title or alert.rule}")
            self._show(f"{alert.raised_at.astimezone(TEHRAN):%H:%M} {alert.state} {shown}")

    def _play(self) -> bool:
        """Wait for the end: of the day, of the time, or Ctrl-C. Return False if not everything was processed then."""
        for module in ("bourse_consumers.archive.table", "bourse_producer.replay"):  # Ctrl-C is not to wait for them
            threading.Thread(target=import_module, args=[module], daemon=True).start()
        end = self._began + (self.seconds or float("inf"))
        while not self.stop.is_set() and time.monotonic() < end and not self._day_is_over():
            self._take_batch()
        self._ask_exchange()
        if self.stop.is_set():
            self._show("\nStopping; comparing every event …")
            self._signal(*(name for name in self._children if name != "board"))
        self._end("producer", "standby")
        self._derive()
        deadline = time.monotonic() + SETTLE_SECONDS
        while not (settled := self.stop.is_set() or self._is_settled()) and time.monotonic() < deadline:
            self._take_batch()
        self._end(*(name for name in self._children if name != "board"))
        return settled

    def _linger(self) -> None:
        """Keep the board until Ctrl-C, if somebody is there to look at it."""
        if self._board and sys.stdout.isatty() and not (self.stop.is_set() or self.seconds or self.loop):
            self._show(f"\nThe board still shows the day: {self._board}/ . Ctrl-C ends it.")
            while not self.stop.wait(0.5):
                self._require_alive()

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
            child.terminate(max(0.0, deadline - time.monotonic()))

    def _ask_exchange(self) -> None:
        """Note what the practice exchange has served; it may be too busy to answer."""
        with suppress(httpx2.TransportError):
            self._served = self._http.get(f"{self._exchange}/practice/state").json()

    def _day_is_over(self) -> bool:
        """Return whether the whole day is published: asked again after its last response, nothing had changed."""
        if self._last is None or self._last.outcome is not Outcome.UNCHANGED:
            return False
        self._ask_exchange()
        if self._served["day_over"] and self._day_calls is None:
            self._day_calls = frozenset(self._served["sent"])
        return self._day_calls is not None and self._last.poll_id in self._served["sent"].keys() - self._day_calls

    def _is_settled(self) -> bool:
        """Return whether every event was archived, and read by the alerts."""
        table = self._archive()
        rows = sum(file.rows for file in table.files()) if table else 0
        if rows != len(self._events):
            return False
        if not self._events or self._stack.kind == "mock":  # which forgets offsets committed in a transaction
            return True
        try:
            (alerts,) = group_lag(self._stack.cluster, [f"{self._stack.cluster.prefix}-alerts"])
        except Unreachable:
            return False  # a busy broker is asked again
        return alerts.lag == 0

    def _archive(self) -> Any:
        from bourse_consumers.archive.table import Table

        return Table.open(str(self._folder / "archive" / TRADES.full_name(self._stack.cluster.prefix)))

    def _derive(self) -> None:
        """Read the rest of what the ended producers published, and derive all from the bytes that they captured."""
        from bourse_producer.replay import Replay

        cluster, (trades, polls, *_) = self._stack.cluster, self._topics
        start = {(trades, number): 0 for number in range(cluster.require_topics([trades])[trades])}
        start |= {place: offset + 1 for place, offset in self._events}  # in the order of offsets
        for record in read(cluster, trades, start=start):
            self._events[record.place, record.offset] = self._decode[TRADES].fields(record.value)
        self._markers: list[PollMarker] = [self._decode[POLLS](record.value) for record in read(cluster, polls)]
        derived = Replay({each for marker in self._markers for each in (marker.poll_id, marker.rights_poll_id) if each})
        captures = (self._folder / "capture").glob("*/capture-*.gz")
        with unwatched:
            derived.capture(sorted(captures, key=lambda path: path.name))
        self._derived = [event.event_id for event in derived.events]

    def _proof(self) -> dict[str, int]:
        """Compare the events derived again with those on Kafka and in the archive, by id."""
        table = self._archive()
        archived = table.arrow(table.files(), ["event_id"])["event_id"].to_pylist() if table else []
        events, kafka = {*self._derived}, [event["event_id"] for event in self._events.values()]
        return {
            "derived": len(self._derived),
            "kafka": len(kafka),
            "archive": len(archived),
            # After Ctrl-C an archive that had no time to commit lacks the last seconds: they are still on Kafka.
            "lost": len(events.difference(kafka)) + (0 if self.stop.is_set() else len(events.difference(archived))),
            "twice": len(kafka) - len({*kafka}) + len(archived) - len({*archived}),
            "unknown": len({*kafka} - events) + len({*archived} - events),
        }

    def _summary(self) -> dict[str, Any]:
        """Return the result, counted from the topics, the captures and the archive."""
        proof, sent, ops = self._proof(), self._served["sent"], Counter(each["op"] for each in self._events.values())
        visible = sorted(
            self._seen_ms[marker.poll_sequence] - sent[marker.poll_id]
            for marker in self._markers[WARM_UP_POLLS:]
            if marker.poll_id in sent and marker.poll_sequence in self._seen_ms
        )
        p99 = visible[min(len(visible) - 1, int(len(visible) * 0.99))] if visible else None
        counts = {op.value: ops[op] for op in (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)}
        return {
            "broker": self._stack.kind,
            "polls": len(self._markers),
            "rows": sum(marker.rows for marker in self._markers),
            "events": {**counts, "total": ops.total()},
            "alerts": self._alerts,
            "archived_rows": proof["archive"],
            "dead_letters": self._dead_letters,
            "visible_ms": {"p50": round(statistics.median(visible), 1), "p99": round(p99, 1)} if p99 else None,
            "proof": proof,
            "seconds": round(time.monotonic() - self._began, 1),
        }

    def _show_on_board(self, proof: dict[str, int]) -> None:
        """Give the board the proof: it shows it within a second, or before it ends."""
        new = self._folder / "notice.new"
        persian, english = _sentences(proof)
        new.write_text(f"اثبات: {persian}\nProof: {english}", "utf-8")
        new.replace(self._folder / "notice")


def _has_desktop() -> bool:
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def _poll(marker: PollMarker) -> str:
    if marker.outcome is Outcome.PUBLISHED:
        return f"{counted(marker.events, 'event'):>11} of {counted(marker.rows, 'instrument')}"
    return marker.outcome.lower() + (f": {marker.error_kind}" if marker.error_kind else "")


def _sentences(proof: dict[str, int]) -> tuple[str, str]:
    """Return the proof in Persian and in English."""
    derived, kafka, archive = (proof[name] for name in ("derived", "kafka", "archive"))
    if not (derived or kafka or archive):
        return "هیچ رویدادی منتشر نشد", "no event was published"
    one, two = ("=" if pair else "≠" for pair in (derived == kafka, kafka == archive))
    left = max(0, kafka - archive - proof["lost"])  # after Ctrl-C
    later = (f"، در راه بایگانی {left:,}", f", not yet in the archive {left:,}") if left else ("", "")
    persian = (
        f"{derived:,} رویداد، دوباره به‌دست‌آمده از بایت‌های بورس {one} {kafka:,} در کافکا {two} {archive:,} در بایگانی؛ "
        f"گم‌شده {proof['lost']:,}، تکراری {proof['twice']:,}، ناشناخته {proof['unknown']:,}{later[0]}"
    )
    english = (
        f"{derived:,} events derived again from the exchange's bytes {one} {kafka:,} on Kafka {two} {archive:,} in the "
        f"archive; lost {proof['lost']:,}, twice {proof['twice']:,}, unknown {proof['unknown']:,}{later[1]}"
    )
    return persian.translate(PERSIAN), english


def _text(summary: dict[str, Any], folder: Path) -> str:
    visible, bourse = summary["visible_ms"], program("bourse")
    kinds = ", ".join(f"{count:,} {op}" for op, count in summary["events"].items() if op != "total")
    shown = ""
    if visible:
        shown = f"From the exchange's last byte to a consumer: p50 {visible['p50']} ms, p99 {visible['p99']} ms.\n"
    trades = folder / "archive" / TRADES.full_name("bourse")
    columns = "'symbol', 'traded_at', 'last_price', 'op'"
    return (
        f"\n{counted(summary['polls'], 'poll')}, {counted(summary['rows'], 'row')} → {kinds}; "
        f"{counted(summary['alerts'], 'alert')} fired, {counted(summary['dead_letters'], 'dead letter')}.\n{shown}"
        f"Proof: {_sentences(summary['proof'])[1]}.\n"
        "\nNext:\n"
        f"  {bourse} replay {folder / 'capture'}/* --json | head -3\n"
        f'  {program("python")} -c "import polars as pl; '
        f"print(pl.read_delta('{trades}').select({columns}).head())\"\n"
        f"  {bourse} archive verify --to {folder / 'archive'} --no-topic\n"
        f"  {bourse} sandbox up --produce --kafka-port 9092 --registry-port 8081\n"
        "With an account at the exchange: docs/operate.md."
    )
