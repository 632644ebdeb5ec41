"""Publishing compared: GET → committed with others, a transaction with a bare one, many instruments with few."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.figures import NAMES, PEER, ROOT, Figure
from benchmarks.market import received_at, rows
from benchmarks.plain import Fields, Record, records
from bourse_sandbox.kafka import VERSION as KAFKA_VERSION
from bourse_sandbox.kafka import KafkaUnavailable
from bourse_sandbox.stack import Stack
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import CANDLES, POLLS, TRADES

__all__ = ["check", "digest", "growth", "publish", "publishing", "transaction"]

WARM_UP = 3
CLOCKED = {"poll_id", "requested_at", "next_poll_at"}  # what no two runs have in common
BROKERS = {"mock": "librdkafka's mock broker", "kafka": f"Apache Kafka {KAFKA_VERSION}"}


def publish(
    kind: str, count: int, polls: int, contestants: dict[str, Path], every: int = 1
) -> dict[str, list[list[float]]]:
    """Return each contestant's polls after the warm-up, in ms: to get, to work out, to publish.

    They take turns, poll by poll, each a process with a broker of its own; what is then on the topics is checked.
    """
    total = WARM_UP + polls
    found: dict[str, list[list[float]]] = {}
    with ExitStack() as stack:
        market = [sys.executable, "-m", "benchmarks.market", str(count), str(total), str(every)]
        server = stack.enter_context(subprocess.Popen(market, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        stack.callback(server.kill)
        url = _line(server)
        running = {}
        for name, python in contestants.items():
            cluster = stack.enter_context(Stack(kind)).cluster
            where = (f"{url}/{name}", cluster.bootstrap_servers, cluster.registry_url, cluster.prefix)
            command: list[str | Path] = [python, "-m", f"benchmarks.{name}", *where]
            worker = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(worker.kill)
            running[name] = stack.enter_context(worker), cluster
            found[name] = []
        for _ in range(total):
            for name, (worker, _) in running.items():
                print(file=worker.stdin, flush=True)
                found[name].append([1000 * seconds for seconds in json.loads(_line(worker))])
        for worker, cluster in running.values():
            worker.communicate(timeout=30)
            check(cluster, count, total, every)
    return {name: laps[WARM_UP:] for name, laps in found.items()}


def _line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline().strip() if process.stdout else ""
    if not line:
        raise SystemExit(f"error: {process.args!r} ended with {process.wait()}")
    return line


def check(cluster: Cluster, count: int, polls: int, every: int = 1) -> None:
    """Raise unless exactly what these polls amount to is on the topics: keys, values, times and headers."""
    known: dict[str, Fields] = {}
    wanted: list[Record] = []
    for poll in range(1, polls + 1):
        wanted += records(known, rows(poll, count, every), poll, "", received_at(poll))
    found = digest(_read(cluster))
    if found != digest(wanted):
        raise SystemExit(f"error: on the topics is {found}, not {digest(wanted)} (records, digest of what they say)")


def digest(found: Iterable[Record]) -> tuple[int, str]:
    """Return how many records there are, and a digest of all they say, in whatever order."""
    lines = []
    for record in found:
        value = {name: field for name, field in record.value.items() if name not in CLOCKED}
        lines.append(json.dumps([*record[:2], value, record.headers, record.timestamp], default=str, sort_keys=True))
    return len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _read(cluster: Cluster) -> Iterator[Record]:
    """Yield what is committed to the topics."""
    for topic in (TRADES, CANDLES, POLLS):
        decode = cluster.registry().deserializer(topic.event)
        for record in read(cluster, topic.full_name(cluster.prefix)):
            if record.key is not None and record.value is not None:
                fields = decode.fields(record.value)
                yield Record(topic.name, record.key.decode(), fields, dict(record.headers), record.timestamp)


def publishing(kind: str, polls: int, every: int = 1) -> Figure:
    """Return the ratio of the peers' medians to ours, and how the first one's spread from poll to poll."""
    wanted = 5.0 if every > 1 else {"mock": 3.5, "kafka": 2.7}[kind]
    mix = "2,000 rows, a third changed" if every > 1 else "2,000 changed rows"
    what, target = f"{mix}, GET → committed, {BROKERS[kind]}", f"≥ {wanted:g} × quixstreams"
    try:
        laps = publish(kind, 2000, polls, {"ours": Path(sys.executable), "peer": PEER, "aio": PEER}, every)
    except KafkaUnavailable as error:
        return Figure(what, None, target, None, {"reason": str(error)})
    totals = {name: [sum(lap) for lap in laps[name]] for name in laps}
    medians = {name: statistics.median(each) for name, each in totals.items()}
    ratio = medians["peer"] / medians["ours"]
    pairs = zip(totals["ours"], totals["peer"], strict=True)
    low, *_, high = statistics.quantiles((b / a for a, b in pairs), n=10)
    found = (
        f"**{ratio:.2f} ×** (poll by poll {low:.2f} to {high:.2f}): {medians['ours']:.1f} ms, "
        f"quixstreams {medians['peer']:.1f} ms; aiokafka {medians['aio']:.1f} ms"
    )
    values = {
        "ratio": round(ratio, 2),
        "ratio_p10_p90": [round(low, 2), round(high, 2)],
        "polls": polls,
        "steps_ms": {
            name: [round(statistics.median(step), 1) for step in zip(*laps[name], strict=True)] for name in laps
        },
    }
    bars = {NAMES[name]: 2000 / median * 1000 for name, median in medians.items()}
    return Figure(what, found, target, ratio >= wanted, values, bars)


def growth(polls: int = 4) -> Figure:
    """Return how a row's time grows from 2,000 instruments to 50,000."""
    what, target = f"Time per row at 50,000 instruments, of that at 2,000, {BROKERS['kafka']}", "within 20 %"
    medians = {}
    for count, times in ((2_000, 5 * polls), (50_000, polls)):
        laps = publish("kafka", count, times, {"ours": Path(sys.executable)})["ours"]
        medians[count] = statistics.median(sum(lap) for lap in laps) / count * 1000
    ratio = medians[50_000] / medians[2_000]
    found = f"**{ratio:.2f}**: {medians[2_000]:.1f} µs, {medians[50_000]:.1f} µs"
    return Figure(what, found, target, ratio <= 1.2, {"us_per_row": medians, "ratio": ratio})


def transaction(kind: str, rounds: int = 200) -> Iterator[Figure]:
    """Yield our transaction's rate and p99 as shares of those of a bare one, and what the headers cost."""
    what, target = (
        f"Transaction of 4,001 records, as a share of a bare one's rate, {BROKERS[kind]}",
        "≥ 0.9, p99 ≤ 1.3 ×",
    )
    try:
        with Stack(kind) as stack:
            where = stack.cluster.bootstrap_servers, stack.cluster.registry_url, stack.cluster.prefix, str(rounds)
            worker = [sys.executable, "-m", "benchmarks.bare", *where]
            ran = subprocess.run(worker, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    except KafkaUnavailable as error:
        yield Figure(what, None, target, None, {"reason": str(error)})
        return
    *timed, (size, weight) = json.loads(ran.stdout)
    ours, bare, headless = (sorted(1000 * seconds for seconds in laps) for laps in timed)
    rate = statistics.median(bare) / statistics.median(ours)
    slow = int(len(ours) * 0.99)
    tail = ours[slow] / bare[slow]
    found = (
        f"**{rate:.2f}**, p99 **{tail:.2f} ×**: p50 {statistics.median(ours):.1f} and {statistics.median(bare):.1f}, "
        f"p99 {ours[slow]:.1f} and {bare[slow]:.1f} ms"
    )
    yield Figure(what, found, target, rate >= 0.9 and tail <= 1.3, {"rate": rate, "p99": tail, "rounds": rounds})
    price = (statistics.median(ours) - statistics.median(headless)) * 1000 / 4001
    what = f"Price of a record's CloudEvents headers, {BROKERS[kind]}"
    found = f"{weight:.0f} bytes, next to {size:.0f} of key and value, {price:.1f} µs"
    yield Figure(what, found, "—", None, {"bytes": weight, "us": price})
