"""`make bench`: what the product promises of speed and memory, measured; it writes docs/benchmarks.md, json, charts."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.alerts import judging
from benchmarks.archiving import archiving
from benchmarks.figures import PEER, ROOT, Figure, chart, machine, page
from benchmarks.firing import firing
from benchmarks.peak import peak_mb
from benchmarks.publishing import growth, publish, publishing, transaction
from benchmarks.reading import READERS, reading
from bourse_sandbox.processes import spawn
from bourse_sandbox.stack import Stack

BIN = Path(sys.executable).parent
EVENT_ON_SCREEN = re.compile(rb"poll \d+ +\d+ events of ")


def memory(polls: int = 100) -> Figure:
    """Return the most memory that `bourse produce` had resident while the practice exchange's market went by."""
    what, target = f"Producer's resident memory, 2,000 instruments and their rights, {polls} polls", "≤ 88 MB"
    bourse = [sys.executable, "-m", "bourse_cli"]
    with Stack("mock") as stack, tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "exchange.log", Path(folder) / "produce.log"
        market = ["sandbox", "exchange", "--port", "0", "--instruments", "2200", "--speed", "300"]
        with spawn([*bourse, *market], stdout=out):
            _until(lambda: out.exists() and b"\n" in out.read_bytes(), 30)
            address = out.read_text("utf-8").split()[2]
            options = ["--poll-seconds", "0.2", "--schedule", "always", "--clock", "response", "--rights"]
            with spawn([*bourse, "produce", "--address", address, *options], env=stack.environment, stderr=log) as ours:
                _until(lambda: log.exists() and log.read_bytes().count(b'"event": "poll ') >= polls, 120)
                peak = peak_mb(ours.pid)
    if peak is None:
        return Figure(what, None, target, None, {"reason": "is read from /proc, which is not here"})
    return Figure(what, f"at most {peak:.0f} MB", target, peak <= 88, {"peak_mb": round(peak, 1)})


def visible() -> Figure:
    """Return how long after the exchange's last byte a consumer had the poll's last event, on a real day."""
    with tempfile.TemporaryDirectory() as folder:
        demo = ["demo", "--speed", "max", "--broker", "kafka", "--json", "--data", folder]
        ran = subprocess.run([BIN / "bourse", *demo], stdout=subprocess.PIPE, check=False)
    what = "`visible_ms`: a real day at full speed on Apache Kafka, alerts and archive running"
    target = "p50 ≤ 60 ms, p99 ≤ 150 ms"
    if ran.returncode:
        return Figure(what, None, target, None, {"reason": f"`bourse demo` ended with {ran.returncode}"})
    summary = json.loads(ran.stdout.splitlines()[-1])
    p50, p99 = summary["visible_ms"]["p50"], summary["visible_ms"]["p99"]
    return Figure(what, f"p50 {p50} ms, p99 {p99} ms", target, p50 <= 60 and p99 <= 150, summary)


def start() -> Figure:
    """Return the median time of `bourse --help` as a multiple of `python -c pass`."""
    commands = {"help": [str(BIN / "bourse"), "--help"], "pass": [sys.executable, "-c", "pass"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(20):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - began)
    ours, bare = (statistics.median(each) for each in seconds.values())
    found = f"**{ours / bare:.1f} ×**: {ours:.2f} s"
    return Figure("`bourse --help` against `python -c pass`, median of 20", found, "≤ 10 ×", ours <= 10 * bare, seconds)


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


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small polls on the mock broker, nothing written")
    parser.add_argument("--fresh", action="store_true", help="a fresh clone with empty caches too: downloads 400 MB")
    parser.add_argument("--polls", type=int, default=30, help="polls a contestant and broker (30)")
    parser.add_argument("--events", type=int, default=500_000, help="events on the topic that is read (500000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of those who read it (3)")
    parser.add_argument("--only", default="", help="one kind: publishing, reading, memory and so on")
    options = parser.parse_args()
    if options.quick:
        contestants = {"ours": Path(sys.executable)} | ({"peer": PEER} if PEER.exists() else {})
        print(json.dumps(publish("mock", 50, 2, contestants)))
        return
    if not PEER.exists():
        parser.error("the peer has no environment of its own yet: run `make bench`, which makes it")
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **machine()}
    measures: dict[str, Callable[[], Iterable[Figure]]] = {
        "publishing": lambda: (
            publishing(kind, options.polls, every) for kind, every in (("mock", 1), ("kafka", 1), ("kafka", 3))
        ),
        "growth": lambda: [growth()],
        "transaction": lambda: (figure for kind in ("mock", "kafka") for figure in transaction(kind)),
        "reading": lambda: reading(options.events, options.rounds),
        "archiving": archiving,
        "judging": judging,
        "firing": firing,
        "memory": lambda: [memory()],
        "start": lambda: [start()],
        "visible": lambda: [visible()],
        "fresh": fresh,
    }
    if options.only in READERS:
        measures = {options.only: lambda: reading(options.events, options.rounds, [options.only])}
    if options.only not in {"", *measures}:
        parser.error(f"--only: there are {', '.join([*measures, *READERS])}")
    figures = []
    for name, measure in measures.items():
        if options.only in {"", name} and (name != "fresh" or options.fresh or options.only):
            for figure in measure():
                print(figure.line(), flush=True)
                figures.append(figure)
    if options.only:
        return
    command = "make bench" + (f' ARGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else "")
    docs = ROOT / "docs"
    for old in docs.glob("benchmarks-*.svg"):
        old.unlink()
    for number, figure in enumerate(figures, 1):
        if figure.bars:
            (docs / f"benchmarks-{number}.svg").write_text(chart(figure), "utf-8")
    (docs / "benchmarks.md").write_text(page(command, about, figures), "utf-8")
    found = {"command": command, **about, "figures": [asdict(figure) for figure in figures]}
    (docs / "benchmarks.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
