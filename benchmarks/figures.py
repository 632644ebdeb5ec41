"""What was measured, and the page that shows it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from bourse_sandbox.kafka import VERSION as KAFKA_VERSION

__all__ = ["PEER", "ROOT", "Figure", "chart", "machine", "page"]

ROOT = Path(__file__).parent.parent
PEER = ROOT / ".venv" / "bench" / "bin" / "python"


@dataclass(frozen=True)
class Figure:
    """A figure found, None where it could not be had; `met` is None where nothing was promised.

    `bars` are what a chart shows of it: per contestant how much it did in a second, in `unit`.
    """

    what: str
    found: str | None
    target: str
    met: bool | None
    values: dict[str, Any] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    unit: str = "rows/s"

    def line(self) -> str:
        """Return what `make bench` says of it."""
        return f"{self.what}: {self.found or self.values['reason']} ({self.target}: {MET[self.met]})"


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    asked = "import confluent_kafka as c; from importlib.metadata import version as v; print('confluent-kafka', "
    asked += "v('confluent-kafka'), 'librdkafka', c.libversion()[0]"
    known = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", known.read_text("utf-8") if known.exists() else "")
    ours, peer = (
        subprocess.run([python, "-c", f"{asked}{more})"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        for python, more in ((sys.executable, ""), (PEER, "".join(f", '{name}', v('{name}')" for name in OTHERS)))
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = cpu[1] if cpu else platform.machine()
    return {
        "machine": f"{os.cpu_count()} cores ({processor}), {memory_gb:.0f} GiB, {platform.system()}",
        "load before the run": f"{os.getloadavg()[0]:.1f}",
        "bourse-stream": f"Python {platform.python_version()}, {ours}, Apache Kafka {KAFKA_VERSION}",
        "the others": f"the same Python, {peer}",
    }


def page(command: str, about: dict[str, str], figures: list[Figure]) -> str:
    """Return docs/benchmarks.md."""
    lines = [f"| {f.what} | {f.target} | {f.found or f.values['reason']} | {MET[f.met]} |" for f in figures]
    steps = [
        f"| {figure.what.rpartition(', ')[2]}, {who} | " + " | ".join(map(str, figure.values["steps_ms"][name])) + " |"
        for figure in figures
        if "steps_ms" in figure.values
        for name, who in NAMES.items()
        if name in figure.values["steps_ms"]
    ]
    return PAGE.format(
        command=command,
        about="\n".join(f"* {k}: {v}" for k, v in about.items()),
        lines="\n".join(lines),
        steps="\n".join(steps),
        charts="\n".join(f"![{escape(f.what)}](benchmarks-{n}.svg)" for n, f in enumerate(figures, 1) if f.bars),
    )


def chart(figure: Figure) -> str:
    """Return its bars as an SVG image, which reads on light and dark pages."""
    most, rows = max(figure.bars.values()), []
    for number, (name, rate) in enumerate(figure.bars.items()):
        y, width = 40 + 34 * number, max(2, 420 * rate / most)
        color = "#0a7d5a" if name == "bourse-stream" else "#8a94a0"
        rows.append(f'<text x="8" y="{y + 17}">{escape(name)}</text>')
        rows.append(f'<rect x="230" y="{y}" width="{width:.0f}" height="24" fill="{color}"/>')
        rows.append(f'<text x="{238 + width:.0f}" y="{y + 17}">{rate:,.0f}</text>')
    height = 48 + 34 * len(figure.bars)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" role="img" '
        'font-family="sans-serif" font-size="14" fill="#6b7280">\n'
        f'<text x="8" y="24" font-weight="bold">{escape(figure.what)}, {escape(figure.unit)}</text>\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


MET = {True: "yes", False: "**no**", None: "—"}
OTHERS = ("quixstreams", "aiokafka", "fastavro", "pyarrow")
NAMES = {
    "ours": "bourse-stream",
    "peer": "quixstreams",
    "aio": "aiokafka + fastavro",
    "plain": "confluent-kafka + write_deltalake",
    "executemany": "the same loop, executemany",
}
PAGE = """\
# Benchmarks

Written by `{command}`; [benchmarks.json](benchmarks.json) holds the figures behind the table.

{about}

| what | target | found | met |
|---|---|---|---|
{lines}

{charts}

Where a poll's time goes, medians in milliseconds:

| | GET | parse and compare | encode and commit |
|---|--:|--:|--:|
{steps}

What is not reached:

* **Publishing.** CPU time of a poll of 2,000 changed rows, 57 ms: parsing 12 (half of it the JSON), comparing 9,
  encoding 24 (21 numbers a row, in Python), the transaction 12: two calls of librdkafka's binding for each row, and the
  commit. Other threads wait for the broker meanwhile. A smaller poll does not make the commit shorter, and both sides
  pay for it, which limits the ratio if a third of the rows changed. Encoders in C were slower for whole events, and
  keeping the bytes of what does not change saved 2 %.
* **Alert rules.** Of 4.1 s for 200,000 events 1.6 s are judging and the texts of 15,166 alerts, 1.4 s reading, decoding
  and putting polls together, 1.1 s forty transactions. The other judges an event when it comes; the product judges each
  pair of rule and instrument at every poll, also those that did not trade. Imports alone hold 100 MB.
* **Verify.** 7 to 8 µs of CPU time a row in one thread: 3 reading Parquet, 2.8 decoding the topic, 1 the sequences.

How it is measured:

* Contestants take turns, in processes of their own. A ratio is that of the medians; a range is that of neighbouring
  rounds, without the highest and the lowest tenth if there are that many.
* Publishing: all get the same bodies from the same server, of 2,000 rows that all differ from the poll before, and
  write the same events, candles and poll marker with the same keys, times and headers, each to a broker of its own.
  Afterwards all that is on the topics is compared with what must be there. The product is its own service, unchanged.
  The others are what a good engineer writes with these libraries: httpx2, plain dicts, the library's Avro serializer or
  fastavro, a flush for every poll (quixstreams) or a transaction (aiokafka). They do not check the rows.
* Reading: the events of the real days, over and over and each time of other instruments, in six partitions of Apache
  Kafka, written in transactions; every reader begins at the start, sees only what is committed, and commits its offsets
  behind what is written. Timed from the first batch to the last one's being durable, imports and the group's forming
  left out. What was written is counted and summed up.
* Alert rules: a hundred of five kinds, five about each instrument. The product is its own consumer: whole polls, alerts
  and offsets in transactions. The others judge event by event with the same tests written by hand, and keep their state
  in memory. Stored days and live polls: CPU time of the engine with the texts of its alerts. A poll is visible when its
  transaction is committed; its alert when a reader of `bourse.alerts`, or a local webhook, has it.
* `visible_ms` runs from the practice exchange's last byte to the poll's last event in a consumer, on one clock.
"""
