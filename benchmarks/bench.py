"""`make bench`: what the product promises of speed and memory, measured; writes docs/benchmarks.md and .json."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import pty
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, TopicPartition

from benchmarks.market import received_at, rows
from benchmarks.plain import Fields, Record, records
from bourse_sandbox.kafka import VERSION as KAFKA_VERSION
from bourse_sandbox.kafka import KafkaUnavailable
from bourse_sandbox.processes import spawn
from bourse_sandbox.stack import Stack
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import CANDLES, POLLS, TRADES

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PEER = ROOT / ".venv" / "bench" / "bin" / "python"
WARM_UP = 3
CLOCKED = {"poll_id", "requested_at"}  # what no two runs have in common
EVENT_ON_SCREEN = re.compile(rb"(OPENED|TRADED)[^\n]{0,40}?IR[A-Z0-9]{10}")


@dataclass(frozen=True)
class Figure:
    """A figure found, None where it could not be had; `met` is None where nothing was promised."""

    what: str
    found: str | None
    target: str
    met: bool | None
    values: dict[str, Any] = field(default_factory=dict)


# --- publishing -------------------------------------------------------------------------------------------------------


def publish(kind: str, count: int, polls: int, contestants: dict[str, Path]) -> dict[str, list[list[float]]]:
    """Return each contestant's polls after the warm-up, in ms: to get, to work out, to publish.

    They take turns, poll by poll, each a process with a broker of its own; what is then on the topics is checked.
    """
    total = WARM_UP + polls
    found: dict[str, list[list[float]]] = {}
    with ExitStack() as stack:
        market = [sys.executable, "-m", "benchmarks.market", str(count), str(total)]
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
            check(cluster, count, total)
    return {name: laps[WARM_UP:] for name, laps in found.items()}


def _line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline().strip() if process.stdout else ""
    if not line:
        raise SystemExit(f"error: {process.args!r} ended with {process.wait()}")
    return line


def check(cluster: Cluster, count: int, polls: int) -> None:
    """Raise unless exactly what these polls amount to is on the topics: keys, values, times and headers."""
    known: dict[str, Fields] = {}
    wanted: list[Record] = []
    for poll in range(1, polls + 1):
        wanted += records(known, rows(poll, count), poll, "", received_at(poll))
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
    topics = {topic.full_name(cluster.prefix): topic for topic in (TRADES, CANDLES, POLLS)}
    decode = {name: cluster.registry().deserializer(topic.event) for name, topic in topics.items()}
    partitions = [(name, n) for name, many in cluster.require_topics(list(topics)).items() for n in range(many)]
    consumer = cluster.consumer(enable_partition_eof=True)
    try:
        consumer.assign([TopicPartition(name, n, OFFSET_BEGINNING) for name, n in partitions])
        ended: set[tuple[str | None, int | None]] = set()
        while len(ended) < len(partitions):
            for message in consumer.consume(1000, 0.1):
                name, value, key, headers = message.topic(), message.value(), message.key(), message.headers()
                if message.error():
                    ended.add((name, message.partition()))
                elif name and isinstance(value, bytes) and isinstance(key, bytes):
                    said = {header: text for header, text in dict(headers or []).items() if isinstance(text, bytes)}
                    fields = decode[name].fields(value)
                    yield Record(topics[name].name, key.decode(), fields, said, message.timestamp()[1])
    finally:
        consumer.close()


def publishing(kind: str, polls: int) -> Figure:
    """Return the ratio of the peer's median to ours, and how it spread from poll to poll."""
    broker = {"mock": "librdkafka's mock broker", "kafka": f"Apache Kafka {KAFKA_VERSION}"}[kind]
    what, target = f"2,000 changed rows, GET → committed, {broker}", "≥ 2.5 × quixstreams" if kind == "mock" else "—"
    try:
        laps = publish(kind, 2000, polls, {"ours": Path(sys.executable), "peer": PEER})
    except KafkaUnavailable as error:
        return Figure(what, None, target, None, {"reason": str(error)})
    ours, peer = ([sum(lap) for lap in laps[name]] for name in ("ours", "peer"))
    ratio = statistics.median(peer) / statistics.median(ours)
    low, *_, high = statistics.quantiles((b / a for a, b in zip(ours, peer, strict=True)), n=10)
    found = (
        f"**{ratio:.2f} ×** (poll by poll {low:.2f} to {high:.2f}): {statistics.median(ours):.1f} ms, "
        f"quixstreams {statistics.median(peer):.1f} ms"
    )
    steps = {name: [round(statistics.median(step), 1) for step in zip(*laps[name], strict=True)] for name in laps}
    values = {
        "ratio": round(ratio, 2),
        "ratio_p10_p90": [round(low, 2), round(high, 2)],
        "polls": polls,
        "steps_ms": steps,
    }
    return Figure(what, found, target, ratio >= 2.5 if kind == "mock" else None, values)


# --- the other figures ------------------------------------------------------------------------------------------------


def memory(polls: int = 100) -> Figure:
    """Return the most memory that `bourse produce` had resident while the practice exchange's market went by."""
    what, target = f"Producer's resident memory, 2,000 instruments and their rights, {polls} polls", "≤ 100 MB"
    if not Path("/proc/self/status").exists():
        return Figure(what, None, target, None, {"reason": "is read from /proc, which is not here"})
    bourse = [sys.executable, "-m", "bourse_schemas"]
    with Stack("mock") as stack, tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "exchange.log", Path(folder) / "produce.log"
        market = ["sandbox", "exchange", "--port", "0", "--instruments", "2000", "--speed", "300"]
        with spawn([*bourse, *market], stdout=out):
            _until(lambda: out.exists() and b"\n" in out.read_bytes(), 30)
            address = out.read_text("utf-8").split()[2]
            options = ["--poll-seconds", "0.2", "--schedule", "always", "--clock", "response", "--rights"]
            with spawn([*bourse, "produce", "--address", address, *options], env=stack.environment, stderr=log) as ours:
                _until(lambda: log.exists() and log.read_bytes().count(b'"event": "poll"') >= polls, 120)
                status = Path(f"/proc/{ours.pid}/status").read_text("utf-8")
    peak, now = (
        int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0]) / 1024 for name in ("VmHWM", "VmRSS")
    )
    values = {"rss_mb": round(now, 1), "peak_mb": round(peak, 1)}
    return Figure(what, f"{now:.0f} MB, at most {peak:.0f} MB", target, peak <= 100, values)


def visible() -> Figure:
    """Return how long after the exchange's last byte a consumer had the poll's last event, on a real day."""
    with tempfile.TemporaryDirectory() as folder:
        demo = ["demo", "--replay", "real", "--speed", "max", "--broker", "kafka", "--json", "--data", folder]
        ran = subprocess.run([BIN / "bourse", *demo], stdout=subprocess.PIPE, check=False)
    what = "`visible_ms`: a real day at full speed on Apache Kafka, alerts and archive running"
    target = "p50 ≤ 60 ms, p99 ≤ 150 ms"
    if ran.returncode:
        return Figure(what, None, target, None, {"reason": f"`bourse demo` ended with {ran.returncode}"})
    summary = json.loads(ran.stdout.splitlines()[-1])
    p50, p99 = summary["visible_ms"]["p50"], summary["visible_ms"]["p99"]
    return Figure(what, f"p50 {p50} ms, p99 {p99} ms", target, p50 <= 60 and p99 <= 150, summary)


def start() -> Figure:
    """Return the median time of `bourse --help`."""
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run([BIN / "bourse", "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    values = {"seconds": seconds}
    return Figure("`bourse --help`, median of 10", f"{median:.2f} s", "≤ 0.3 s", median <= 0.3, values)


def fresh() -> list[Figure]:
    """Return how long `make demo` takes to the first event on the screen: with nothing there, and once more."""
    listed = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "bourse-stream"
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, checkout / name)
        found = []
        for when, target in (("every download included", 120), ("the second time", 10)):
            seconds = _first_event(checkout, Path(folder))
            what = f"Fresh clone, `make demo` → first event on the screen, {when}"
            found.append(Figure(what, f"{seconds:.1f} s", f"≤ {target} s", seconds <= target, {"seconds": seconds}))
    return found


def _first_event(checkout: Path, caches: Path) -> float:
    began = time.perf_counter()
    pid, terminal = pty.fork()
    if not pid:
        own = {name: str(caches / name) for name in ("XDG_CACHE_HOME", "UV_CACHE_DIR", "PIP_CACHE_DIR")}
        os.chdir(checkout)
        # A make that runs us hands its own arguments on.
        outer = {
            name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKEOVERRIDES", "ARGS"}
        }
        os.execvpe("make", ["make", "demo"], outer | own | {"TERM": "xterm", "COLUMNS": "160", "LINES": "50"})
    screen, seconds = b"", None
    try:
        while some := os.read(terminal, 65536):
            screen = screen[-65536:] + some
            if seconds is None and EVENT_ON_SCREEN.search(re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", screen)):
                seconds = time.perf_counter() - began
                os.write(terminal, b"\x03")
    except OSError:  # how a terminal whose processes have ended says so
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    if seconds is None:
        raise SystemExit(f"error: `make demo` showed no event:\n{screen[-2000:].decode(errors='replace')}")
    return seconds


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: not within {seconds:.0f} s")
        time.sleep(0.05)


# --- the page ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    asked = "import confluent_kafka as c; from importlib.metadata import version as v; print('confluent-kafka', "
    asked += "v('confluent-kafka'), 'librdkafka', c.libversion()[0]"
    known = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", known.read_text("utf-8") if known.exists() else "")
    ours, peer = (
        subprocess.run([python, "-c", f"{asked}{more})"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        for python, more in ((sys.executable, ""), (PEER, ", 'quixstreams', v('quixstreams')"))
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = cpu[1] if cpu else platform.machine()
    return {
        "machine": f"{os.cpu_count()} cores ({processor}), {memory_gb:.0f} GiB, {platform.system()}",
        "load before the run": f"{os.getloadavg()[0]:.1f}",
        "bourse-stream": f"Python {platform.python_version()}, {ours}, Apache Kafka {KAFKA_VERSION}",
        "the peer": f"the same Python, {peer}",
    }


def page(command: str, about: dict[str, str], figures: list[Figure]) -> str:
    """Return docs/benchmarks.md."""
    lines = [f"| {f.what} | {f.target} | {f.found or f.values['reason']} | {MET[f.met]} |" for f in figures]
    steps = [
        f"| {figure.what.rpartition(', ')[2]}, {who} | " + " | ".join(map(str, figure.values["steps_ms"][name])) + " |"
        for figure in figures
        if "steps_ms" in figure.values
        for name, who in (("ours", "bourse-stream"), ("peer", "quixstreams"))
    ]
    return PAGE.format(
        command=command,
        about="\n".join(f"* {k}: {v}" for k, v in about.items()),
        lines="\n".join(lines),
        steps="\n".join(steps),
    )


MET = {True: "yes", False: "**no**", None: "—"}
PAGE = """\
# Benchmarks

Written by `{command}`; [benchmarks.json](benchmarks.json) holds the figures behind the table.

{about}

| what | target | found | met |
|---|---|---|---|
{lines}

Where a poll's time goes, medians in milliseconds:

| | GET | parse and compare | encode and commit |
|---|--:|--:|--:|
{steps}

How it is measured:

* Both contestants get the same bodies from the same server, of 2,000 rows that all differ from the poll before, and
  write the same events, candles and poll marker with the same keys, times and headers. They take turns, poll by poll,
  in processes of their own, each with a broker of its own. Afterwards all that is on the topics is compared with what
  must be there.
* The product is its own service as it stands. quixstreams stands for what a good engineer writes with it: httpx, plain
  dicts, its Avro serializer with the registry, a flush for every poll. It neither checks the rows nor writes a
  transaction, which is less of a promise and less work.
* A ratio is that of the medians. The range is that of neighbouring polls, without the highest and the lowest tenth.
* `visible_ms` runs from the practice exchange's last byte to the poll's last event in a consumer, on one clock.
"""


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small polls on the mock broker, nothing written")
    parser.add_argument("--fresh", action="store_true", help="a fresh clone with empty caches too: downloads 400 MB")
    parser.add_argument("--polls", type=int, default=30, help="polls a contestant and broker (30)")
    options = parser.parse_args()
    if options.quick:
        contestants = {"ours": Path(sys.executable)} | ({"peer": PEER} if PEER.exists() else {})
        print(json.dumps(publish("mock", 50, 2, contestants)))
        return
    if not PEER.exists():
        parser.error("the peer has no environment of its own yet: run `make bench`, which makes it")
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **machine()}
    figures = []
    measures: list[Callable[[], list[Figure]]] = [
        lambda: [publishing("mock", options.polls)],
        lambda: [publishing("kafka", options.polls)],
        lambda: [memory()],
        lambda: [start()],
        lambda: [visible()],
        *([fresh] if options.fresh else []),
    ]
    for measure in measures:
        for figure in measure():
            print(
                f"{figure.what}: {figure.found or figure.values['reason']} ({figure.target}: {MET[figure.met]})",
                flush=True,
            )
            figures.append(figure)
    command = "make bench" + (f' ARGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else "")
    (ROOT / "docs" / "benchmarks.md").write_text(page(command, about, figures), "utf-8")
    found = {"command": command, **about, "figures": [asdict(figure) for figure in figures]}
    (ROOT / "docs" / "benchmarks.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
