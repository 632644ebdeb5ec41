"""The demo's run: services as processes of their own, an observer that counts, a summary at the end."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import httpx
from confluent_kafka import OFFSET_BEGINNING, KafkaException, TopicPartition

from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.stack import Stack
from bourse_schemas.errors import BourseError, ConfigurationError
from bourse_schemas.events import Op, Outcome, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, DEAD_LETTERS, POLLS, TRADES

__all__ = ["Options", "run"]

WARM_UP_POLLS = 5
FINISH_SECONDS = 60.0
BOURSE = (sys.executable, "-m", "bourse_cli")


@dataclass(frozen=True, slots=True)
class Options:
    """The demo's options, as on the command line."""

    replay: str | None
    speed: str
    broker: str
    seconds: float | None
    as_json: bool
    seed: int
    rules: Path | None
    data: Path
    faults: Sequence[str] = ()
    kill_every: float | None = None

    @property
    def at_max(self) -> bool:
        """Say whether a captured day runs as fast as it goes."""
        return self.speed == "max"

    def market_speed(self) -> float:
        """Return market seconds a second; raise ConfigurationError where the options contradict each other."""
        if self.at_max:
            if self.replay is None:
                raise ConfigurationError("--speed max needs a captured day: add --replay real or --replay FILE")
            return 1.0
        try:
            speed = float(self.speed)
        except ValueError:
            speed = 0.0
        if not 0 < speed < float("inf"):
            raise ConfigurationError(f"--speed {self.speed}: give a number above 0, or max with --replay")
        return speed


@dataclass
class Observer:
    """A read_committed consumer of every topic that counts what it sees and when; runs in a thread of its own."""

    cluster: Cluster
    polls: list[PollMarker] = field(default_factory=list)
    ops: Counter[Op] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    sequences: dict[tuple[str, Any], int] = field(default_factory=dict)
    alerts: int = 0
    dead_letters: int = 0
    ends: dict[tuple[str, int], int] = field(default_factory=dict)
    last_event_ms: dict[int, float] = field(default_factory=dict)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Return how many rows the polls so far held."""
        return sum(marker.rows for marker in self.polls)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:  # a thread's error would be lost: it is the demo's
            self.failure = error

    def _read(self) -> None:
        registry = self.cluster.registry()
        event_of = registry.deserializer(TradeEvent)
        marker_of = registry.deserializer(PollMarker)
        trades, polls, alerts, letters = (
            topic.full_name(self.cluster.prefix) for topic in (TRADES, POLLS, ALERTS, DEAD_LETTERS)
        )
        partitions = self.cluster.require_topics([trades, polls, alerts, letters])
        consumer = self.cluster.consumer()
        consumer.assign(
            [TopicPartition(name, n, OFFSET_BEGINNING) for name, count in partitions.items() for n in range(count)]
        )
        try:
            while not self._stop.is_set():
                messages = consumer.consume(500, 0.01)
                arrived = time.time() * 1000
                for message in messages:
                    topic, partition, offset, value = (
                        message.topic(),
                        message.partition(),
                        message.offset(),
                        message.value(),
                    )
                    if message.error() is not None or topic is None or partition is None or offset is None:
                        continue
                    self.ends[topic, partition] = offset + 1
                    payload = value.encode() if isinstance(value, str) else value
                    if topic == trades:
                        fields = event_of.fields(payload)
                        self.ops[Op(fields["op"])] += 1
                        self.seen.add(fields["event_id"])
                        of_day = fields["instrument"], fields["trading_day"]
                        self.sequences[of_day] = max(self.sequences.get(of_day, 0), fields["sequence"])
                        self.last_event_ms[fields["poll_sequence"]] = arrived
                    elif topic == polls:
                        self.polls.append(marker_of(payload))
                    elif topic == alerts:
                        self.alerts += 1
                    else:
                        self.dead_letters += 1
        finally:
            consumer.close()


def run(options: Options) -> int:
    """Run the demo; return its exit code."""
    options.market_speed()
    if options.replay not in {None, "real"} and not Path(str(options.replay)).is_file():
        raise ConfigurationError(
            f"--replay {options.replay}: no such file; `real` is the day that ships with the product"
        )
    rules = options.rules or REAL_DAY.with_name("rules.yaml").resolve()
    if not rules.is_file():
        raise ConfigurationError(f"--rules {rules}: no such file")
    folder = options.data / f"demo-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  # a name for people: their own time
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(f"--data {options.data}: cannot make {folder}: {error.strerror}") from error
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    began = time.monotonic()
    with Stack(options.broker) as stack, ExitStack() as services:
        if stack.note:
            click.echo(stack.note, err=True)
        show = _Show(options, stack, folder, rules=rules, services=services, stop=stop)
        code = show.play(began)
        summary = show.summary(time.monotonic() - began)
    if options.as_json:
        click.echo(json.dumps(summary))
    else:
        _print(summary, folder / "archive", rules)
    return code


class _Show:
    """The services, the observer and the end of it all."""

    def __init__(
        self, options: Options, stack: Stack, folder: Path, *, rules: Path, services: ExitStack, stop: threading.Event
    ) -> None:
        speed = options.market_speed()
        self._options = options
        self._stack = stack
        self._folder = folder
        self._stop = stop
        self._sent: dict[str, float] = {}
        self._day_calls: frozenset[str] | None = None
        self._services: dict[str, Child] = {}
        self._commands: dict[str, Sequence[str]] = {}
        self._kills = 0
        self._kill_due = time.monotonic() + (options.kill_every or float("inf"))
        self._stack_of_services = services
        self._http = services.enter_context(httpx.Client())
        self._observer = Observer(stack.cluster)
        services.callback(self._observer.close)
        market = ["--replay", options.replay] if options.replay else ["--seed", str(options.seed)]
        advance = ["--advance", "poll"] if options.at_max else ["--speed", str(speed)]
        faults = [word for fault in options.faults for word in ("--fault", fault)]
        self._start("exchange", "sandbox", "exchange", "--port", "0", *market, *advance, *faults)
        self._exchange_url = self._exchange_address()
        # Consumers first, so that nothing waits for them; the order does not matter for what they see.
        archive = ["--to", str(folder / "archive"), "--max-age-seconds", "5"]
        self._start("archive", "consume", "archive", *archive)
        self._start("alerts", "consume", "alerts", "--rules", str(rules))
        beat = ["--poll-seconds", "0" if options.at_max else str(60 / speed)]
        timing = ["--schedule", "always", "--clock", "response", *beat]
        self._start("producer", "produce", "--address", self._exchange_url, *timing)
        if not options.as_json:
            self._start("watch", "watch", inherit_terminal=True)

    def _start(self, name: str, *command: str, inherit_terminal: bool = False) -> None:
        log = self._folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        child = spawn(
            [*BOURSE, *command],
            env=self._stack.environment,
            stdout=None if inherit_terminal else log,
            stderr=log,
            inherit_terminal=inherit_terminal,
        )
        self._services[name] = self._stack_of_services.enter_context(child)
        self._commands[name] = command

    def _kill_one(self) -> None:
        """Kill the next service in turn where it is time, and start it again."""
        if self._options.kill_every is None or time.monotonic() < self._kill_due:
            return
        self._kill_due = time.monotonic() + self._options.kill_every
        name = ("producer", "archive", "alerts")[self._kills % 3]
        self._kills += 1
        self._services.pop(name).kill()
        self._start(name, *self._commands[name])

    def _exchange_address(self) -> str:
        log = self._folder / "logs" / "exchange.log"
        line = _wait(lambda: self._alive() and log.is_file() and log.read_text("utf-8"), 20, threading.Event())
        if not line:
            raise BourseError(f"the practice exchange did not start: {log}")
        return str(line).split()[2]

    def _alive(self) -> bool:
        """Raise where a service has ended by itself: the demo would show a lie."""
        for name, child in self._services.items():
            code = child.poll()
            if code is not None and not (name == "watch" and self._stop.is_set()):
                if name == "watch" and code == 0:
                    self._stop.set()
                    return True
                if code == 2:  # the operator's to change, in the service's own words
                    raise ConfigurationError(child.log_tail(2).rpartition("Error: ")[2])
                raise BourseError(f"{name} ended with exit code {code}:\n{child.log_tail(10)}")
        if self._observer.failure is not None:
            raise self._observer.failure
        return True

    def play(self, began: float) -> int:
        """Wait for the end (of the day, of the time, Ctrl-C), then end the services so that nothing is left behind."""
        day_over = False
        while self._alive() and not self._stop.is_set() and not day_over:
            self._kill_one()
            day_over = self._options.at_max and self._day_is_over()
            if self._options.seconds is not None and time.monotonic() - began >= self._options.seconds:
                break
            self._stop.wait(0.05)
        self._end("producer")
        self._sent = self._http.get(f"{self._exchange_url}/practice/state").json()["sent"]
        # Everything published is counted, archived and has been looked at by the alerts before they end.
        finished = _wait(self._settled, FINISH_SECONDS, self._stop if not day_over else threading.Event())
        for name in ("watch", "archive", "alerts", "exchange"):
            self._end(name)
        return 0 if finished or not day_over else 1

    def _end(self, name: str) -> None:
        child = self._services.pop(name, None)
        if child is not None:
            child.terminate(10)

    def _day_is_over(self) -> bool:
        """Say whether all of the day is published: asked again after its last response, the producer made no event."""
        polls = self._observer.polls
        if not polls or polls[-1].outcome is not Outcome.UNCHANGED:
            return False
        state = self._http.get(f"{self._exchange_url}/practice/state").json()
        if state["day_over"] and self._day_calls is None:
            self._day_calls = frozenset(state["sent"])
        return self._day_calls is not None and polls[-1].poll_id in state["sent"].keys() - self._day_calls

    def _settled(self) -> bool:
        cluster, ends = self._stack.cluster, self._observer.ends
        trades = TRADES.full_name(cluster.prefix)
        read = {partition: end for (topic, partition), end in ends.items() if topic == trades}
        # The mock cluster forgets offsets that are committed in a transaction; the archive closes its files much later.
        groups = ("archive",) if self._stack.kind == "mock" else ("alerts", "archive")
        for group in groups:
            consumer = cluster.consumer(f"{cluster.prefix}-{group}")
            try:
                committed = consumer.committed([TopicPartition(trades, partition) for partition in read], timeout=5)
            except KafkaException:
                return False  # a busy broker is asked again
            finally:
                consumer.close()
            if any(position.offset < read[position.partition] for position in committed):
                return False
        return sum(self._observer.ops.values()) == sum(
            marker.opened + marker.traded + marker.revised + marker.cancelled for marker in self._observer.polls
        )

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return what came out, counted from the topics and the files."""
        from bourse_consumers.archive.files import count_rows
        from bourse_consumers.archive.store import Folder

        observer = self._observer
        after = [marker for marker in observer.polls[WARM_UP_POLLS:] if marker.poll_id in self._sent]
        visible = sorted(
            observer.last_event_ms[marker.poll_sequence] - self._sent[marker.poll_id]
            for marker in after
            if marker.poll_id is not None and marker.poll_sequence in observer.last_event_ms
        )
        damage = {}
        if self._options.kill_every is not None:
            # Each change of a day has the next sequence: what is not there was lost, what is there again came twice.
            lost = sum(observer.sequences.values()) - len(observer.seen)
            damage = {"kills": self._kills, "lost": lost, "twice": sum(observer.ops.values()) - len(observer.seen)}
        p50 = statistics.median(visible) if visible else None
        p99 = visible[min(len(visible) - 1, int(len(visible) * 0.99))] if visible else None
        return {
            "broker": self._stack.kind,
            "polls": len(observer.polls),
            "rows": observer.rows,
            "events": {
                **{op.value: observer.ops[op] for op in (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)},
                "total": sum(observer.ops.values()),
            },
            "alerts": observer.alerts,
            "archived_rows": count_rows(Folder(self._folder / "archive")),
            "dead_letters": observer.dead_letters,
            "visible_ms": {
                "p50": None if p50 is None else round(p50, 1),
                "p99": None if p99 is None else round(p99, 1),
            },
            "seconds": round(seconds, 1),
            **damage,
        }


def _wait(condition: Callable[[], Any], seconds: float, stop: threading.Event) -> Any:
    """Return the condition's first true value, or its last one when the time is over or `stop` is set."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline and not stop.is_set():
        time.sleep(0.05)
    return value


def program(name: str) -> str:
    """Return how a program of our environment is called from here."""
    if shutil.which(name) == str(Path(sys.executable).with_name(name)):
        return name
    found = Path(sys.executable).with_name(name)
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)


def _print(summary: dict[str, Any], archive: Path, rules: Path) -> None:
    events, bourse = summary["events"], program("bourse")
    kinds = ", ".join(f"{events[op]:,} {op}" for op in ("OPENED", "TRADED", "REVISED", "CANCELLED"))
    visible = summary["visible_ms"]
    click.echo(
        f"\n{summary['polls']:,} polls, {summary['rows']:,} rows → {events['total']:,} events ({kinds}), "
        f"{summary['alerts']:,} alerts, {summary['dead_letters']:,} dead letters; "
        f"{summary['archived_rows']:,} rows archived."
    )
    if "kills" in summary:
        archived = (
            "all of them archived, each once" if summary["archived_rows"] == events["total"] else "NOT all archived"
        )
        click.echo(
            f"{summary['kills']} services were killed: {summary['lost'] or 'no'} events lost, "
            f"{summary['twice'] or 'none'} twice, {archived}.\n"
            "There may be fewer than without: what a killed producer had fetched is in its successor's poll."
        )
    if visible["p50"] is not None:
        click.echo(f"From the exchange's last byte to a consumer: p50 {visible['p50']} ms, p99 {visible['p99']} ms.")
    click.echo(
        f"\nParquet files: {archive}\n"
        f"  {program('python')} -c \"import pyarrow.dataset as d; print(d.dataset('{archive}').head(5))\"\n"
        "\nNext:\n"
        f"  1. edit the alert rules, {rules}, and try them: {bourse} demo --rules FILE\n"
        f"  2. subscribe: {bourse} sandbox up, then {bourse} tail trades, or your own code (docs/subscribe.md)\n"
        f"  3. use your own account: {bourse} produce --client-id … --client-secret-file … --nid-file …;\n"
        "     it needs the scope bourse:trades-realtime:get and a whitelisted address (docs/operate.md)"
    )
