"""A real day on real Kafka while producers are killed and frozen and brokers restarted: `make chaos KILLS=200 SEED=1`.

The exchange speaks TLS, and some of its answers come byte by byte. It moves to its next response only when a PUBLISHED
or UNCHANGED marker is visible whose poll it answered with the present one, so the day's exact events must come out
whatever dies. Producers are processes; results are read from the topics.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from msgspec import structs

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.exchange import PracticeExchange
from bourse_sandbox.faults import Fault, Faults
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY, PracticeMarket
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.registry import serve_registry
from bourse_sandbox.serving import serve
from bourse_schemas.events import Candle, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import follow
from bourse_schemas.topics import CANDLES, POLLS, TRADES
from reliability.brokers import Brokers
from reliability.certificate import self_signed
from reliability.day import expected_events, held

__all__ = ["Options", "compare", "main", "run"]

GOOD = {"PUBLISHED", "UNCHANGED"}
# Of a group's session, which a dead or frozen leader outlasts or not.
SESSION_SECONDS = 6.0
SETTLED_SECONDS = 3 * SESSION_SECONDS
STUCK_SECONDS = 90.0
BROKER_SHARE = 0.2
DRIP_EVERY = 20  # strikes; an answer that drips costs the producer's whole deadline
WHEN = {"observed_at", "poll_sequence"}


@dataclass(frozen=True, slots=True)
class Options:
    """How much is done to how many."""

    kills: int
    seed: int = 1
    brokers: int = 1
    instances: int = 2
    freeze_share: float = 0.2
    broker_restarts: bool = True
    drip: bool = True


class Responses:
    """The exchange's clock: it stands at a response until that one is published."""

    def __init__(self, times: Sequence[datetime]) -> None:
        self._times = times
        self.at = 0
        self.answered: dict[str, int] = {}
        self.last_instance = 0
        self.drip_next = False

    def now(self) -> datetime:
        """Return when the present response was received."""
        return self._times[min(self.at, len(self._times) - 1)]

    def polled(self) -> None:
        """Stand still: only a publication counts."""

    def published(self, poll_id: str | None) -> None:
        """Go on if the poll was answered with the present response."""
        if poll_id is not None and self.answered.get(poll_id) == self.at:
            self.at += 1

    @property
    def over(self) -> bool:
        """Return whether every response was published."""
        return self.at >= len(self._times)

    def door(self, app: Any, instance: int) -> Any:
        """Return the exchange as one instance sees it; it records who polls, and which response was the answer."""
        dripping = Faults(app, [Fault("drip")], forget=lambda _: None)

        async def entered(scope: Any, receive: Any, send: Any) -> None:
            chosen = app
            if scope["type"] == "http" and scope["path"].endswith("/trades/realtime"):
                (track_id,) = parse_qs(scope["query_string"].decode())["trackId"]
                self.answered[track_id], self.last_instance = self.at, instance
                if self.drip_next:
                    self.drip_next, chosen = False, dripping
            await chosen(scope, receive, send)

        return entered


@dataclass
class Observer:
    """A read_committed consumer of the markers, in a thread; it moves the exchange on."""

    cluster: Cluster
    responses: Responses
    markers: list[PollMarker] = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        decode = self.cluster.registry().deserializer(PollMarker)
        try:
            for batch in follow(self.cluster, {POLLS.full_name(self.cluster.prefix): None}):
                for record in batch.records:
                    self.markers.append(marker := decode(record.value))
                    if marker.outcome in GOOD:
                        self.responses.published(marker.poll_id)
                if self._stop.is_set():
                    return
        except Exception as error:  # a thread's error would be lost
            self.failure = error

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()


@dataclass
class Damage:
    """What was done, and the result."""

    kills: int = 0
    freezes: int = 0
    broker_restarts: int = 0
    drips: int = 0
    takeovers: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    polls: int = 0
    found: Counter[str] = field(default_factory=Counter)

    @property
    def strikes(self) -> int:
        """Return how often something was done."""
        return self.kills + self.freezes + self.broker_restarts + self.drips


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--brokers", type=int, choices=[1, 3], default=1)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--freeze-share", type=float, default=0.2)
    for name in ("--broker-restarts", "--drip"):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=True)
    result = run(Options(**vars(parser.parse_args())))
    print(json.dumps(result))
    return int(any(result[name] for name in ("lost", "twice", "wrong", "holes")))


def run(options: Options) -> dict[str, Any]:
    """Run as many days as the strikes take; return the figures."""
    chance, damage = random.Random(options.seed), Damage()
    folder = Path(tempfile.mkdtemp(prefix="bourse-chaos-"))
    with ExitStack() as stack:
        brokers: Kafka | Brokers = (
            stack.enter_context(Kafka(folder / "kafka")) if options.brokers == 1 else stack.enter_context(Brokers())
        )
        registry = stack.enter_context(serve_registry())
        expected, certificate, days = expected_events(), self_signed(folder / "exchange.pem"), 0
        while damage.strikes < options.kills:
            days += 1
            cluster = Cluster(brokers.bootstrap_servers, registry.url, f"chaos{days}")
            apply_topics(cluster, plan_topics(cluster, {}, options.brokers, any_time=True))
            cluster.registry().register_all(cluster.prefix)
            day = _Day(cluster, options, chance, damage, folder=folder / f"day-{days}", brokers=brokers)
            day.live(certificate)
            damage.found += compare(expected, *(held(cluster, topic) for topic in (TRADES, CANDLES, POLLS)))
    found = damage.found
    bad = any(found[name] for name in ("lost", "twice", "wrong", "holes"))
    if bad:
        print(f"logs and Kafka's data are in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return {
        "kills": damage.kills,
        "freezes": damage.freezes,
        "broker_restarts": damage.broker_restarts,
        "drips": damage.drips,
        # After a broker's restart the group forms again: a leader that dies meanwhile costs more than one session.
        "takeover_s": _times(damage.takeovers),
        "recovery_s": _times(damage.recoveries),
        "polls": damage.polls,
        **{name: found[name] for name in ("expected", "found", "lost", "twice", "wrong", "holes")},
    }


def _times(seconds: Sequence[float]) -> dict[str, float]:
    times = {"p50": statistics.median(seconds or [0.0]), "max": max(seconds, default=0.0)}
    return {"count": len(seconds), **{name: round(value, 1) for name, value in times.items()}}


class _Day:
    """One day in topics of its own, from its first response to its last."""

    def __init__(
        self,
        cluster: Cluster,
        options: Options,
        chance: random.Random,
        damage: Damage,
        *,
        folder: Path,
        brokers: Kafka | Brokers,
    ) -> None:
        self._cluster, self._options, self._chance, self._damage = cluster, options, chance, damage
        self._brokers = brokers
        self._folder = folder
        folder.mkdir(parents=True)
        day = PracticeMarket.load(REAL_DAY)
        self._responses = Responses(day.times)
        self._exchange = PracticeExchange(day, self._responses)
        self._settled_at = 0.0  # when the group has forgotten the last restart of a broker
        self._children: list[Child] = []
        self._urls: list[str] = []

    def live(self, certificate: Path) -> None:
        """Play the day while things die."""
        with ExitStack() as stack:
            for instance in range(self._options.instances):
                server = stack.enter_context(serve(self._responses.door(self._exchange.app, instance), tls=certificate))
                self._urls.append(server.url)
                self._certificate = certificate
                self._children.append(self._start(instance))
            stack.callback(lambda: [child.kill() for child in self._children])
            observer = Observer(self._cluster, self._responses)
            stack.callback(observer.close)
            self._observer = observer
            self._await_markers(1)
            while not self._responses.over:
                if self._damage.strikes < self._options.kills:
                    self._strike()
                else:
                    self._await_markers(1)
            for child in self._children:
                child.send(signal.SIGCONT)
                # One that was just started again has no handler yet.
                if (code := child.terminate(10)) not in {0, -signal.SIGTERM}:
                    raise RuntimeError(f"a producer ended with {code}: {child.log_tail()}")
        self._damage.polls += len(observer.markers)

    def _start(self, instance: int) -> Child:
        account = {"BOURSE_CLIENT_ID": "practice", "BOURSE_CLIENT_SECRET": "practice", "BOURSE_NID": "0123456789"}
        where = {
            "BOURSE_BOOTSTRAP_SERVERS": self._cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": self._cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": self._cluster.prefix,
            "SSL_CERT_FILE": str(self._certificate),
        }
        timing = ["--schedule", "always", "--clock", "response", "--poll-seconds", "0"]
        command = [sys.executable, "-m", "bourse_cli", "produce", "--address", self._urls[instance], *timing]
        log = self._folder / f"producer-{instance}.log"
        return spawn(command, env={**os.environ, **account, **where}, stdout=log, stderr=log)

    def _await_markers(self, count: int) -> float:
        """Wait for N more markers; return how long it took."""
        began, before = time.monotonic(), len(self._observer.markers)
        while len(self._observer.markers) < before + count and not self._responses.over:
            if self._observer.failure is not None:
                raise self._observer.failure
            if time.monotonic() - began > STUCK_SECONDS:
                raise RuntimeError(f"nothing was published for {STUCK_SECONDS:.0f} s; the logs are in {self._folder}")
            time.sleep(0.005)
        return time.monotonic() - began

    def _strike(self) -> None:
        chance, damage = self._chance, self._damage
        self._await_markers(chance.randint(1, 3))
        if self._responses.over:
            return
        # Somewhere between the answer and the commit, or a moment before or after.
        time.sleep(chance.uniform(0, 0.15))
        if self._options.drip and damage.strikes % DRIP_EVERY == DRIP_EVERY // 4:
            damage.drips += 1
            self._responses.drip_next = True
            self._await_markers(2)
            return
        if self._options.broker_restarts and chance.random() < BROKER_SHARE:
            damage.broker_restarts += 1
            self._restart_broker()
            self._settled_at = time.monotonic() + SETTLED_SECONDS
            self._await_markers(1)
            return
        leader = self._responses.last_instance
        victim = leader if self._options.instances == 1 or chance.random() < 0.8 else 1 - leader
        child = self._children[victim]
        if chance.random() < self._options.freeze_share:
            damage.freezes += 1
            self._signal(child, signal.SIGSTOP)
            seconds = chance.choice([chance.uniform(0.1, 2), chance.uniform(SESSION_SECONDS, SESSION_SECONDS * 2)])
            time.sleep(seconds)
            self._signal(child, signal.SIGCONT)
            self._await_markers(1)
        else:
            damage.kills += 1
            began = time.monotonic()
            child.kill()
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0, 1))
            self._children[victim] = self._start(victim)
            took = self._await_markers(1)
            if victim == leader:
                (damage.takeovers if began > self._settled_at else damage.recoveries).append(took)
        if (done := damage.strikes) % 10 == 0:
            print(f"{done} strikes, response {self._responses.at}, {self._cluster.prefix}", file=sys.stderr, flush=True)

    def _restart_broker(self) -> None:
        """Kill one of three brokers, or kill or stop the only one; it comes back a moment later."""
        if isinstance(self._brokers, Brokers):
            node = self._chance.randrange(3)
            self._brokers.kill(node)
            self._await_markers(1)
            self._brokers.start(node)
            self._brokers.await_all()
            return
        self._chance.choice([self._brokers.kill, self._brokers.stop])()
        time.sleep(self._chance.uniform(0, 2))
        self._brokers.start()

    @staticmethod
    def _signal(child: Child, number: int) -> None:
        os.killpg(child.pid, number)


def compare(
    expected: Iterable[TradeEvent],
    events: Sequence[TradeEvent],
    candles: Sequence[Candle],
    markers: Sequence[PollMarker],
) -> Counter[str]:
    """Count what differs from the events expected, when and in which poll they were seen apart."""
    counts = Counter(expected=0, found=len(events), lost=0, twice=0, wrong=0, holes=0)
    times = Counter(event.event_id for event in events)
    by_id = {event.event_id: event for event in events}
    names = [name for name in TradeEvent.__struct_fields__ if name not in WHEN]
    known = set()
    for event in expected:
        counts["expected"] += 1
        known.add(event.event_id)
        found = by_id.get(event.event_id)
        if found is None:
            counts["lost"] += 1
        elif any(getattr(found, name) != getattr(event, name) for name in names):
            counts["wrong"] += 1
    counts["wrong"] += len(times.keys() - known)
    counts["twice"] += sum(count - 1 for count in times.values())
    chains: dict[tuple[str, Any], list[int]] = defaultdict(list)
    per_poll: Counter[int] = Counter()
    for event in events:
        chains[event.instrument, event.trading_day].append(event.sequence)
        per_poll[event.poll_sequence] += 1
    counts["holes"] += sum(chain != list(range(1, len(chain) + 1)) for chain in chains.values())
    counts["holes"] += int([marker.poll_sequence for marker in markers] != list(range(1, len(markers) + 1)))
    counts["holes"] += sum(per_poll[marker.poll_sequence] != marker.events for marker in markers)
    last = {event.instrument: event for event in events}
    kept = {candle.instrument: candle for candle in candles}
    fields = Candle.__struct_fields__
    counts["holes"] += len(last.keys() ^ kept.keys())
    counts["holes"] += sum(
        structs.asdict(candle) != {name: getattr(last[code], name) for name in fields}
        for code, candle in kept.items()
        if code in last
    )
    return counts


if __name__ == "__main__":
    sys.exit(main())
