"""How soon an alert is with its channel: events on Kafka, `bourse consume alerts` and `notify`, a webhook."""

from __future__ import annotations

import json
import queue
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from msgspec import structs

from benchmarks.figures import Figure
from benchmarks.topic import events
from bourse_sandbox.kafka import VERSION as KAFKA_VERSION
from bourse_sandbox.kafka import KafkaUnavailable
from bourse_sandbox.processes import spawn
from bourse_sandbox.stack import Stack
from bourse_schemas.codec import Serializer
from bourse_schemas.events import TEHRAN, TradeEvent
from bourse_schemas.topics import TRADES

__all__ = ["handing"]

# Every event is an alert: its price is another one than the last alert's.
RULES = "version: 1\nrules:\n- {name: any, type: change, amount: 1, since: last_alert, notify: [robot]}\n"
CHANNELS = "version: 1\nchannels:\n  robot: {webhook: {env: ROBOT}, limit: 600}\n"
LONGEST_SECONDS = 60


def handing(polls: int = 100, apart: float = 0.5) -> Figure:
    """Return how long after an event could be read its alert was handed over, over so many polls of one event."""
    what = f"Event visible → its alert handed to a webhook, {polls} polls, Apache Kafka {KAFKA_VERSION}"
    target = "p99 ≤ 2 s"
    came: queue.Queue[tuple[str, float]] = queue.Queue()

    class Robot(BaseHTTPRequestHandler):
        """Notes when which event's alert came."""

        def do_POST(self) -> None:
            """Take a message."""
            now = time.monotonic()
            for alert in json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"]:
                came.put((alert["event_id"], now))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    robot = ThreadingHTTPServer(("127.0.0.1", 0), Robot)
    threading.Thread(target=robot.serve_forever, daemon=True).start()
    try:
        with Stack("kafka") as stack, tempfile.TemporaryDirectory() as folder:
            rules, channels = Path(folder) / "rules.yaml", Path(folder) / "channels.yaml"
            rules.write_text(RULES, "utf-8")
            channels.write_text(CHANNELS, "utf-8")
            ids = stack.cluster.registry().register(TRADES, stack.cluster.prefix)
            serialize = Serializer[TradeEvent](TRADES, ids, stack.cluster.prefix)
            producer = stack.cluster.transactional_producer("benchmark")
            producer.init_transactions(30)
            example = next(event for event in events(1000) if event.last_price)

            def publish(number: int) -> tuple[str, float]:
                now, price = datetime.now(UTC).replace(microsecond=0), example.last_price or 0
                event = structs.replace(
                    example,
                    event_id=f"{example.instrument}-{number}",
                    trading_day=now.astimezone(TEHRAN).date(),
                    sequence=number,
                    observed_at=now,
                    last_price=price + number % 2,
                )
                record = serialize(event)
                producer.begin_transaction()
                producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
                producer.commit_transaction(30)
                return event.event_id, time.monotonic()

            def handed(event_id: str, since: float) -> float:
                while True:
                    found, at = came.get(timeout=LONGEST_SECONDS)
                    if found == event_id:
                        return at - since

            bourse = [sys.executable, "-m", "bourse_cli", "consume"]
            environment = stack.environment | {"ROBOT": f"http://127.0.0.1:{robot.server_port}/"}
            with (
                spawn([*bourse, "alerts", "--rules", str(rules)], env=environment),
                spawn([*bourse, "notify", "--channels", str(channels)], env=environment),
            ):
                publish(1)  # the price that the first alert's differs from
                handed(*publish(2))  # both are there
                seconds = []
                for number in range(3, polls + 3):
                    seconds.append(handed(*publish(number)))
                    time.sleep(apart)
    except KafkaUnavailable as error:
        return Figure(what, None, target, None, {"reason": str(error)})
    finally:
        robot.shutdown()
        robot.server_close()
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    values = {"seconds": [round(each, 3) for each in seconds]}
    return Figure(what, f"p50 {p50:.2f} s, p99 {p99:.2f} s", target, p99 <= 2, values)
