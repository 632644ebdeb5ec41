"""What a running service says of itself over HTTP: alive, ready (and if not, why), and its metrics."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bourse_schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from socketserver import TCPServer

__all__ = ["METRICS", "Metric", "Monitor"]


class Metric(NamedTuple):
    """A metric's name, kind and meaning; the names of counters end in _total."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    doc: str
    labels: tuple[str, ...] = ()


EXCHANGE_CALLS = Metric(
    "bourse_exchange_calls_total", "counter", "Calls to the exchange: done ones cost.", ("outcome",)
)
POLLS = Metric("bourse_polls_total", "counter", "Polls by outcome.", ("outcome",))
EVENTS = Metric("bourse_events_total", "counter", "Trade events published, by kind.", ("op",))
REJECTED_ROWS = Metric("bourse_rejected_rows_total", "counter", "Rows that could not be used.")
STALE_ROWS = Metric("bourse_stale_rows_total", "counter", "Rows older than what was known.")
FEED_STATE = Metric("bourse_feed_state", "gauge", "1 for the feed's present state.", ("state",))
POLL_SEQUENCE = Metric("bourse_poll_sequence", "gauge", "The last poll's sequence.")
LAST_GOOD_POLL = Metric("bourse_last_good_poll_timestamp_seconds", "gauge", "When the last good poll was received.")
LAST_CHANGE = Metric("bourse_last_change_timestamp_seconds", "gauge", "When the last poll with a change was received.")
SESSION_OPEN = Metric("bourse_session_open", "gauge", "1 in the continuous session, by the calendar.")
CLOCK_SKEW = Metric("bourse_clock_skew_seconds", "gauge", "The exchange's clock less ours.")
CALENDAR_DAYS_KNOWN = Metric("bourse_calendar_days_known", "gauge", "Days until the calendar's knowledge ends.")
LEADER = Metric("bourse_leader", "gauge", "1 where this instance leads, 0 where it stands by.")
FENCED = Metric("bourse_fenced_total", "counter", "How often another instance took over.")
RESTORE_SECONDS = Metric("bourse_restore_seconds", "gauge", "How long the last restore of the state took.")
FETCH_SECONDS = Metric("bourse_fetch_seconds", "histogram", "From asking the exchange to having it all parsed.")
PUBLISH_SECONDS = Metric("bourse_publish_seconds", "histogram", "From the parsed response to the committed poll.")
CAPTURE_ERRORS = Metric("bourse_capture_errors_total", "counter", "Responses that could not be kept.")
ROWS = Metric("bourse_consumer_rows_total", "counter", "Records a consumer is done with.", ("consumer",))
EMITTED = Metric("bourse_consumer_emitted_total", "counter", "Events a consumer published.", ("consumer",))
DEAD_LETTERS_TOTAL = Metric("bourse_consumer_dead_letters_total", "counter", "Records put aside.", ("consumer",))
RETRIES = Metric("bourse_consumer_retries_total", "counter", "Batches that had to wait.", ("consumer",))
TROUBLE = Metric("bourse_consumer_trouble", "gauge", "1 while an operator has to mend something.", ("consumer",))
LAG = Metric("bourse_consumer_lag", "gauge", "Offsets between a consumer and the end.", ("consumer",))
BATCH_SECONDS = Metric("bourse_consumer_batch_seconds", "histogram", "Time a batch took.", ("consumer",))
NOTIFICATIONS = Metric(
    "bourse_notifications_total", "counter", "Messages to a channel: sent, failed, given_up.", ("channel", "outcome")
)
NOTIFY_SECONDS = Metric(
    "bourse_notify_seconds", "histogram", "From reading an alert to its being with its channel.", ("channel",)
)
KAFKA_QUEUE = Metric("bourse_kafka_queued_messages", "gauge", "Messages waiting in librdkafka.", ("client",))
KAFKA_SENT = Metric("bourse_kafka_sent_messages", "gauge", "Messages sent to the brokers.", ("client",))
KAFKA_RECEIVED = Metric("bourse_kafka_received_messages", "gauge", "Messages received from the brokers.", ("client",))
KAFKA_ERRORS = Metric("bourse_kafka_request_errors", "gauge", "Requests to a broker that failed.", ("client", "broker"))
KAFKA_UP = Metric("bourse_kafka_broker_up", "gauge", "1 while connected to the broker.", ("client", "broker"))
KAFKA_RTT = Metric("bourse_kafka_round_trip_seconds", "gauge", "Round trip to the broker, mean.", ("client", "broker"))
METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class Monitor:
    """What one service tells those who watch it; may be used from any thread, and costs little unless served."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._reasons = {"starting": "starting"}
        self._checks: dict[str, Callable[[], str | None]] = {}
        self._alive_until = float("inf")
        self._beaten = time.monotonic()
        self._registry: Any = None
        self._instruments: dict[Metric, Any] = {}
        self._brokers: dict[str, set[str]] = {}

    def unready(self, subject: str, why: str | None) -> None:
        """Name a reason not to be ready, or take the one of this subject back."""
        with self._lock:
            if why is None:
                self._reasons.pop(subject, None)
            else:
                self._reasons[subject] = why

    def reasons(self) -> dict[str, str]:
        """Return why the service is not ready, by subject; nothing when it is."""
        with self._lock:
            found = dict(self._reasons)
        return found | {subject: why for subject, check in self._checks.items() if (why := check()) is not None}

    def check(self, subject: str, reason: Callable[[], str | None]) -> None:
        """Ask `reason` at every request of /readyz why the service is not ready: also while the service is stuck."""
        self._checks[subject] = reason

    def watch(self, metric: Metric, value: Callable[[], float]) -> None:
        """Compute a gauge at every scrape instead of setting it: also while the service is stuck."""
        if self._registry is not None:
            self._child(metric, {}).set_function(value)

    def beat(self, within_seconds: float) -> None:
        """Give a sign of life; without another one within so long the service counts as dead."""
        self._beaten = time.monotonic()
        self._alive_until = self._beaten + within_seconds

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        if self._registry is not None:
            self._child(metric, labels).inc(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        if self._registry is not None:
            self._child(metric, labels).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        if self._registry is not None:
            self._child(metric, labels).observe(value)

    def statistics(self, text: str) -> None:
        """Take librdkafka's statistics (its `stats_cb`)."""
        told = json.loads(text)
        client, brokers = str(told["type"]), told["brokers"].values()
        self.set(KAFKA_QUEUE, told["msg_cnt"], client=client)
        self.set(KAFKA_SENT, told["txmsgs"], client=client)
        self.set(KAFKA_RECEIVED, told["rxmsgs"], client=client)
        named = {str(broker["nodeid"]): broker for broker in brokers if broker["nodeid"] >= 0}
        # The client forgets brokers that it cannot reach.
        for gone in self._brokers.get(client, set()) - named.keys():
            self.set(KAFKA_UP, 0, client=client, broker=gone)
        self._brokers.setdefault(client, set()).update(named)
        for node, broker in named.items():
            where = {"client": client, "broker": node}
            self.set(KAFKA_UP, broker["state"] == "UP", **where)
            self.set(KAFKA_ERRORS, broker["txerrs"] + broker["rxerrs"], **where)
            self.set(KAFKA_RTT, broker["rtt"]["avg"] / 1e6, **where)
        if client == "consumer":  # a producer with nothing to say may be without a connection
            connected = any(broker["state"] == "UP" for broker in brokers)
            self.unready("Kafka", None if connected else "no connection to any broker")

    @contextmanager
    def serve(self, address: str | None) -> Iterator[str | None]:
        """Serve /livez, /readyz and /metrics on HOST:PORT, by default of loopback; without an address do nothing."""
        if address is None:
            yield None
            return
        host, _, port = address.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise ConfigurationError(f"--http {address}: give HOST:PORT, or the port alone for this machine only")
        from prometheus_client import CollectorRegistry, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call]

        self._registry = CollectorRegistry()
        # A rate needs the 0 before the first; a gauge that nobody has set would say something that is not so.
        for metric in METRICS:
            if metric.kind == "counter" and not metric.labels:
                self.count(metric, 0)
        try:
            server = _server(host or "127.0.0.1", int(port), self._answer)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--http {address}: cannot listen there: {why}") from error
        name = f"{self._service}-http"
        threading.Thread(target=server.serve_forever, args=(0.1,), name=name, daemon=True).start()
        try:
            yield "http://{}:{}".format(*server.server_address)
        finally:
            server.shutdown()
            server.server_close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _child(self, metric: Metric, labels: dict[str, str]) -> Any:
        if metric not in self._instruments:
            from prometheus_client import Counter, Gauge, Histogram

            kinds: dict[str, Callable[..., Any]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
            with self._lock:
                if metric not in self._instruments:
                    made = kinds[metric.kind](metric.name, metric.doc, metric.labels, registry=self._registry)
                    self._instruments[metric] = made
        instrument = self._instruments[metric]
        return instrument.labels(**labels) if labels else instrument

    def _answer(self, path: str) -> tuple[int, str, str]:
        text = "text/plain; charset=utf-8"
        if path == "/livez":
            if time.monotonic() > self._alive_until:
                return 503, f"no sign of life for {time.monotonic() - self._beaten:.0f} s\n", text
            return 200, "alive\n", text
        if path == "/readyz":
            told = {subject: " ".join(why.split()) for subject, why in self.reasons().items()}
            said = [why if why == subject else f"{subject}: {why}" for subject, why in told.items()]
            return (503, "\n".join(said) + "\n", text) if said else (200, "ready\n", text)
        if path == "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            return 200, generate_latest(self._registry).decode(), CONTENT_TYPE_LATEST
        return 404, "there are /livez, /readyz and /metrics\n", text


def _server(host: str, port: int, answer: Callable[[str], tuple[int, str, str]]) -> TCPServer:
    from http.server import BaseHTTPRequestHandler
    from socketserver import ThreadingTCPServer

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds a caller may say nothing

        def do_GET(self) -> None:  # the server's own name for it
            status, body, kind = answer(self.path.partition("?")[0])
            payload = body.encode()
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Say nothing: it is asked every few seconds."""

    class Server(ThreadingTCPServer):  # unlike HTTPServer it looks no name up, which can take seconds
        daemon_threads = allow_reuse_address = True

    return Server((host, port), Handler)
