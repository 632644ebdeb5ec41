"""Memory of one producer over many polls of the practice market: `make soak POLLS=10000`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.stack import SECRET, Stack

MOST_GROWTH = 10.0
FIRST_POLLS = 10
SAMPLE_SECONDS = 0.05


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--polls", type=int, default=10_000)
    parser.add_argument("--broker", choices=["kafka", "mock"], default="kafka")
    parser.add_argument("--instruments", type=int, default=2000)
    options = parser.parse_args()
    # A new trading day every 98 polls, with all its events, quiet evenings included.
    practice = practice_exchange(advance="poll", days=1 + options.polls // 90, instruments=options.instruments)
    with tempfile.TemporaryDirectory(prefix="bourse-soak-") as folder, ExitStack() as stack:
        log = Path(folder) / "log"
        server = stack.enter_context(practice.serve())
        kafka = stack.enter_context(Stack(options.broker))
        environment = {**kafka.environment, "BOURSE_CLIENT_SECRET": SECRET}
        timing = ["--schedule", "always", "--clock", "response", "--poll-seconds", "0"]
        command = [sys.executable, "-m", "bourse_cli", "produce", "--address", server.url, *timing]

        def start() -> Child:
            return stack.enter_context(spawn(command, env=environment, stdout=log, stderr=log))

        began = time.monotonic()
        child = start()
        first = _resident(child, log, FIRST_POLLS)
        last = _resident(child, log, options.polls)
        child.terminate()
        lines = _lines(log)
        mark = len(lines)
        again = start()
        _resident(again, log, _polls(lines) + 1)
        ready = next(line for line in _lines(log)[mark:] if line["event"] == "leadership acquired")
        again.terminate()
    growth = round(100 * (last / first - 1), 1)
    counts = [line for line in lines if line["event"] == "poll published"]
    result = {
        "polls": len(counts),
        "events": sum(line.get(op, 0) for line in counts for op in ("opened", "traded", "revised", "cancelled")),
        "rss_mb_after_10": first,
        "rss_mb_end": last,
        "growth_percent": growth,
        "restore_seconds": ready["restore_seconds"],
        "instruments": ready["instruments"],
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result))
    return int(growth > MOST_GROWTH)


def _resident(child: Child, log: Path, polls: int) -> float:
    """Return the resident megabytes as soon as the log has N polls."""
    shown = 0
    while (done := _polls(_lines(log))) < polls:
        if child.poll() is not None:
            raise RuntimeError(f"the producer ended: {child.log_tail()}")
        if done - shown >= 1000:
            shown = done
            print(f"{done} polls, {_megabytes(child)} MB", file=sys.stderr, flush=True)
        time.sleep(SAMPLE_SECONDS if polls <= FIRST_POLLS else 2.0)
    return _megabytes(child)


def _megabytes(child: Child) -> float:
    status = Path(f"/proc/{child.pid}/status").read_text("utf-8")
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


def _polls(lines: list[dict[str, Any]]) -> int:
    return sum(line["event"] == "poll published" for line in lines)


def _lines(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    whole = log.read_text("utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    sys.exit(main())
