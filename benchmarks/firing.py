"""How soon an alert is published, and with its channel: a poll on Kafka, `bourse consume alerts` and `notify`."""

from __future__ import annotations

import json
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.figures import Figure
from bourse_consumers.testing import marker, trade
from bourse_sandbox.kafka import VERSION as KAFKA_VERSION
from bourse_sandbox.kafka import KafkaUnavailable
from bourse_sandbox.processes import spawn
from bourse_sandbox.stack import Stack
from bourse_schemas.events import TEHRAN, PriceAlert
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import follow, group_lag
from bourse_schemas.topics import ALERTS, POLLS, TRADES

__all__ = ["firing"]

# Every second poll fires: the price jumps up and down.
RULES = "version: 1\nrules:\n- {name: high, when: last_price > 5500, notify: [robot]}\n"
CHANNELS = "version: 1\nchannels:\n  robot: {webhook: {env: ROBOT}, resolved: false}\n"
LONGEST_SECONDS = 60.0

Came = queue.Queue[tuple[int, float]]


def _robot(came: Came) -> ThreadingHTTPServer:
    class Robot(BaseHTTPRequestHandler):
        """Notes when which poll's alert came."""

        def do_POST(self) -> None:
            now = time.monotonic()
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            for alert in body["data"]["alerts"]:
                came.put((alert["poll_sequence"], now))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Robot)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _read_alerts(cluster: Cluster, came: Came) -> None:
    decode = cluster.registry().deserializer(PriceAlert)
    for batch in follow(cluster, {ALERTS.full_name(cluster.prefix): 0}):
        now = time.monotonic()
        for record in batch.records:
            alert = decode(record.value)
            if alert.state == "FIRING":
                came.put((alert.poll_sequence, now))


def firing(polls: int = 100, apart: float = 0.4) -> Iterator[Figure]:
    """Yield how long after a poll could be read its alert could be read, and was with a webhook."""
    visible: Came = queue.Queue()
    handed: Came = queue.Queue()
    robot = _robot(handed)
    try:
        with Stack("kafka") as stack, tempfile.TemporaryDirectory() as folder:
            cluster = stack.cluster
            rules, channels = Path(folder) / "rules.yaml", Path(folder) / "channels.yaml"
            rules.write_text(RULES, "utf-8")
            channels.write_text(CHANNELS, "utf-8")
            threading.Thread(target=_read_alerts, args=(cluster, visible), daemon=True).start()
            serialize = {topic: cluster.registry().serializer(topic, cluster.prefix) for topic in (TRADES, POLLS)}
            producer = cluster.transactional_producer("benchmark")
            producer.init_transactions(30)
            began = datetime.now(UTC).replace(microsecond=0)

            def publish(number: int) -> float:
                at = began + timedelta(seconds=number)
                day, price = at.astimezone(TEHRAN).date(), 5000 + 1000 * (number % 2)
                event = trade(sequence=number, trading_day=day, observed_at=at, last_price=price)
                producer.begin_transaction()
                for topic, made in ((TRADES, event), (POLLS, marker(event))):
                    record = serialize[topic](made)
                    producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
                producer.commit_transaction(30)
                return time.monotonic()

            bourse = [sys.executable, "-m", "bourse_cli", "consume"]
            environment = stack.environment | {"ROBOT": f"http://127.0.0.1:{robot.server_port}/"}
            with (
                spawn([*bourse, "alerts", "--rules", str(rules)], env=environment),
                spawn([*bourse, "notify", "--channels", str(channels)], env=environment),
            ):
                groups = [f"{cluster.prefix}-alerts", f"{cluster.prefix}-notify-robot"]
                until = time.monotonic() + LONGEST_SECONDS
                while any(each.lag is None for each in group_lag(cluster, groups)) and time.monotonic() < until:
                    time.sleep(0.5)  # what comes before a group's first commit is not for it
                _when(visible, 1, publish(1)), _when(handed, 1, 0)
                times: dict[str, list[float]] = {"visible": [], "handed": []}
                for number in range(2, 2 * polls, 2):
                    publish(number)
                    sent = publish(number + 1)
                    times["visible"].append(_when(visible, number + 1, sent))
                    times["handed"].append(_when(handed, number + 1, sent))
                    time.sleep(apart)
    except KafkaUnavailable as error:
        yield Figure("Event visible → FIRING visible", None, "p99 ≤ 0.2 s", None, {"reason": str(error)})
        return
    finally:
        robot.shutdown()
        robot.server_close()
    for name, what, limit in (("visible", "its FIRING visible", 0.2), ("handed", "its alert with a webhook", 0.5)):
        p50, p99 = statistics.median(times[name]), statistics.quantiles(times[name], n=100)[98]
        values = {"seconds": [round(each, 3) for each in times[name]]}
        text = f"Event visible → {what}, {len(times[name])} polls, Apache Kafka {KAFKA_VERSION}"
        yield Figure(text, f"p50 {p50:.3f} s, p99 {p99:.3f} s", f"p99 ≤ {limit} s", p99 <= limit, values)


def _when(came: Came, number: int, since: float) -> float:
    """Return how long after `since` the alert of a poll came."""
    while True:
        found, at = came.get(timeout=LONGEST_SECONDS)
        if found == number:
            return at - since


if __name__ == "__main__":
    for figure in firing():
        print(figure.line())
