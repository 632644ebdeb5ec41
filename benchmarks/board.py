"""The board under load: 100 clients on a server that plays the real day, and the page in Chromium.

    python -m benchmarks.board

The server runs in this process on the bundled real day, a poll a second, without Kafka; clients are another process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from statistics import median

import httpx2
from msgspec.structs import replace
from playwright.sync_api import Page, sync_playwright

from bourse_consumers.board import server
from tests.real_day import Feed, polls_of_day, serving
from tests.samples import event

CLIENTS, SECONDS, NUMBERS = 100, 20, count()
READ = """
import asyncio, sys, time, urllib.parse
host, port, after, n, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
async def client():
    reader, writer = await asyncio.open_connection(host, port)
    head = f"GET /api/events?after={after} HTTP/1.1", f"Host: {host}", "Accept-Encoding: gzip", "", ""
    writer.write("\\r\\n".join(head).encode())
    total, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            total += len(await asyncio.wait_for(reader.read(65536), left))
        except TimeoutError:
            break
    writer.close()
    return total
async def main():
    print(sum(await asyncio.gather(*(client() for _ in range(n)))))
asyncio.run(main())
"""


def resident() -> float:
    """Return this process's memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@contextmanager
def playing(feed: Feed) -> Iterator[None]:
    """Play polls of the day's middle, one a second, over and over with sequences that go on."""
    stop = threading.Event()

    def play() -> None:
        for number in NUMBERS:
            if stop.wait(1.0):
                return
            marker, events = polls_of_day()[20 + number % 30]
            changed = [replace(each, sequence=1000 + number, poll_sequence=1000 + number) for each in events]
            feed.add(*changed, replace(marker, poll_sequence=1000 + number))

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def load(url: str, feed: Feed, clients: int) -> tuple[float, float, int]:
    """Return CPU (share of a core), memory in MB and bytes received with so many clients."""
    host, port = url.removeprefix("http://").split(":")
    after = httpx2.get(f"{url}/api/snapshot").json()["id"]
    arguments = [host, port, str(after), str(clients), str(SECONDS)]
    with playing(feed), subprocess.Popen([sys.executable, "-c", READ, *arguments], stdout=subprocess.PIPE) as child:
        time.sleep(3)
        began, cpu = time.monotonic(), time.process_time()
        time.sleep(SECONDS - 6)
        share, memory = (time.process_time() - cpu) / (time.monotonic() - began), resident()
        return share, memory, int(child.communicate()[0])


def page(url: str, feed: Feed) -> None:
    """Print first paint, first rows, and the paint of 2,000 changed instruments."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        tab.goto(url)
        tab.wait_for_selector("#scroll tbody tr[data-id]")
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        shown = tab.evaluate("performance.now()")
        print(f"first contentful paint {tab.evaluate(paint):.0f} ms, rows within {shown:.0f} ms")
        day, times = feed.state.day, []
        for price in range(1000, 1012):
            frames = tab.get_attribute("body", "data-frames")
            names = [f"IRO1X{number:04}001" for number in range(2000)]
            feed.add(*(event(instrument=name, last_price=price, trading_day=day, value=10**12) for name in names))
            tab.wait_for_function(f"() => document.body.dataset.frames !== '{frames}'")
            times.append(float(tab.get_attribute("body", "data-ms") or 0))
        print(
            f"2,000 changed instruments: {median(times):.0f} ms (median of {len(times)}), {max(times):.0f} ms at most"
        )
        week(tab, feed)
        browser.close()


def week(tab: Page, feed: Feed) -> None:
    """Play five days, 20 polls a second, and print the memory after each."""
    server.TICK_SECONDS = 0.05
    heap = tab.context.new_cdp_session(tab)
    for day in range(1, 6):
        for marker, events in [*polls_of_day()[:75]] * 4:
            number = next(NUMBERS)
            date = marker.session_day + timedelta(days=day) if marker.session_day else None
            same = {"sequence": 1000 + number, "poll_sequence": 1000 + number, "trading_day": date}
            feed.add(*(replace(each, **same) for each in events))
            feed.add(replace(marker, poll_sequence=1000 + number, session_day=date))
            time.sleep(0.05)
        heap.send("HeapProfiler.collectGarbage")
        used = heap.send("Runtime.getHeapUsage")["usedSize"] / 1e6
        print(f"after day {day}: {used:.1f} MB in the page, {resident():.0f} MB in the server")


def main() -> None:
    """Measure and print."""
    feed = Feed()
    feed.play(0, 50)
    with serving(feed) as url:
        for clients in (0, CLIENTS):
            cpu, memory, received = load(url, feed, clients)
            each = f", {received / clients / SECONDS / 1000:.1f} kB a client and second" if clients else ""
            print(f"{clients} clients: {100 * cpu:.1f} % of a core, {memory:.0f} MB{each}")
        page(url, feed)


if __name__ == "__main__":
    main()
