"""What a running service reports over HTTP: /livez, /readyz (and if not ready, why) and /metrics."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from bourse_schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from socketserver import TCPServer

    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["ConsumerMetrics", "KafkaMetrics", "Monitor", "NotifyMetrics", "ProducerMetrics"]

START_SECONDS = 120.0  # a service that gives no sign of life within this time after its start is stuck
TEXT = "text/plain; charset=utf-8"


def _kinds(registry: CollectorRegistry, *labels: str) -> tuple[partial[Counter], partial[Gauge], partial[Histogram]]:
    from prometheus_client import Counter, Gauge, Histogram

    fixed: dict[str, Any] = {"registry": registry, **({"labelnames": labels} if labels else {})}
    return partial(Counter, **fixed), partial(Gauge, **fixed), partial(Histogram, **fixed)


class ProducerMetrics:
    """Metrics of the producer. A gauge without a value yet is 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge, histogram = _kinds(registry)
        self.calls = counter(
            "bourse_exchange_calls_total", "Calls to the exchange. Those with outcome done are billed.", ["outcome"]
        )
        self.calls_left = gauge(
            "bourse_calls_left", "Billed calls left today, NaN without a limit. At 0 polls are skipped."
        )
        self.calls_left.set(float("nan"))
        self.token_minted = gauge(
            "bourse_token_minted_timestamp_seconds", "Time of the last granted token. Several a day mean trouble."
        )
        self.token_expires = gauge(
            "bourse_token_expires_timestamp_seconds", "End of the token's life. Polls fail after it until a renewal."
        )
        self.polls = counter(
            "bourse_polls_total", "Polls committed. FAILED and SKIPPED ones bring no data.", ["outcome"]
        )
        self.events = counter(
            "bourse_events_total", "Trade events committed. None in an open session is unusual.", ["op"]
        )
        self.rejected_rows = counter(
            "bourse_rejected_rows_total", "Rows that cannot be read. They become dead letters, not events."
        )
        self.stale_rows = counter(
            "bourse_stale_rows_total", "Rows older than the committed candle. They make no event."
        )
        self.contradictions = counter(
            "bourse_contradictions_total", "Responses that contradict themselves. The API may have changed.", ["kind"]
        )
        self.feed_state = gauge(
            "bourse_feed_state", "1 for the feed's current state. Only FRESH and IDLE data are reliable.", ["state"]
        )
        self.poll_sequence = gauge(
            "bourse_poll_sequence", "Sequence of the last committed poll. It rises with every poll."
        )
        self.last_good_poll = gauge(
            "bourse_last_good_poll_timestamp_seconds", "Arrival of the last good response. If old, events are late."
        )
        self.last_change = gauge(
            "bourse_last_change_timestamp_seconds", "Arrival of the last change. If old, the feed may be frozen."
        )
        self.session_open = gauge(
            "bourse_session_open", "1 in the continuous session, by the calendar. Only then data are due."
        )
        self.clock_skew = gauge(
            "bourse_clock_skew_seconds", "The exchange's clock minus ours. Beyond 5 s sessions are misjudged."
        )
        self.calendar_days_known = gauge(
            "bourse_calendar_days_known", "Days until the known holidays end. Later holidays are estimates."
        )
        self.leader = gauge("bourse_leader", "1 if this instance polls, 0 on standby. Without a leader no data arrive.")
        self.fenced = counter(
            "bourse_fenced_total", "Take-overs by another instance. Repeated ones mean a stalling machine."
        )
        self.failures = counter(
            "bourse_publication_failures_total", "Failed steps: publish, restore. The poll's events are late.", ["step"]
        )
        self.restore_seconds = gauge(
            "bourse_restore_seconds", "Duration of the last restore of the state. A take-over is late by this time."
        )
        self.fetch_seconds = histogram(
            "bourse_fetch_seconds", "Time from request to parsed response. Events are late by this time."
        )
        self.publish_seconds = histogram(
            "bourse_publish_seconds", "Time from parsed response to commit. Events are late by this time."
        )
        self.capture_errors = counter(
            "bourse_capture_errors_total", "Responses that could not be captured. `bourse replay` will lack them."
        )


class ConsumerMetrics:
    """Metrics of the consumers of one process, each labelled with the consumer's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge, histogram = _kinds(registry, "consumer")
        self.rows = counter(
            "bourse_consumer_rows_total", "Records processed. A rate of 0 while the lag rises means a stuck consumer."
        )
        self.emitted = counter(
            "bourse_consumer_emitted_total", "Events committed to the consumer's own topic. Its readers see only these."
        )
        self.dead_letters = counter(
            "bourse_consumer_dead_letters_total", "Records sent to dead letters. The consumer's results lack them."
        )
        self.retries = counter(
            "bourse_consumer_retries_total", "Batches repeated because an external system failed. Results are late."
        )
        self.incomplete = counter(
            "bourse_consumer_incomplete_polls_total", "Polls whose events are missing for good. They are not judged."
        )
        self.trouble = gauge(
            "bourse_consumer_trouble", "1 while operator action is required, see /readyz. Results may be incomplete."
        )
        self.lag = gauge(
            "bourse_consumer_lag", "Offsets from the consumer's position to the end. If it rises, results are late."
        )
        self.batch_seconds = histogram(
            "bourse_consumer_batch_seconds", "Time needed for a batch. Results are late by at least this time."
        )


class NotifyMetrics:
    """Metrics of the notifications, each labelled with the channel's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.messages = _kinds(registry, "channel", "outcome")[0](
            "bourse_notifications_total", "Messages: sent, failed (repeated), given_up. The last did not arrive."
        )
        self.seconds = _kinds(registry, "channel")[2](
            "bourse_notify_seconds", "Time from reading an alert to its delivery. Readers are late by this time."
        )


class KafkaMetrics:
    """Metrics of librdkafka's clients, from its statistics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _, gauge, _ = _kinds(registry, "client", "broker")
        self.up = gauge(
            "bourse_kafka_broker_up", "1 while connected to the broker. At 0 its partitions are not read or written."
        )
        self.errors = gauge(
            "bourse_kafka_request_errors", "Requests to the broker that failed since the start. Each costs a retry."
        )
        self.round_trip = gauge(
            "bourse_kafka_round_trip_seconds", "Mean round trip to the broker. Each commit takes several."
        )


class Monitor:
    """Liveness, readiness and metrics of one service. Any thread may use it.

    Each monitor has a registry of its own, so that several services of one process do not share metrics. A service
    creates its group of metrics by touching it (`monitor.producer`) once before it starts threads.
    """

    def __init__(self, service: str) -> None:
        from importlib.metadata import version

        from prometheus_client import CollectorRegistry, Info, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        build = "Release that this service runs. Instances of one prefix should run the same one."
        Info("bourse_build", build, registry=self.registry).info({"version": version("bourse-stream")})
        self._service = service
        self._lock = threading.Lock()
        self._reasons = {"starting": "starting"}
        self._checks: dict[str, Callable[[], str | None]] = {}
        self._beaten = time.monotonic()
        self._alive_until = self._beaten + START_SECONDS
        self._brokers: dict[str, set[str]] = {}
        self._parts: dict[str, Monitor] = {}

    def part(self, name: str) -> Monitor:
        """Return the health of one of several parts; the service is alive and ready if all of them are."""
        part = self._parts[name] = Monitor(name)
        part.__dict__.update(consumer=self.consumer, notify=self.notify)
        self._reasons.pop("starting", None)
        return part

    @cached_property
    def producer(self) -> ProducerMetrics:
        """Return the producer's metrics."""
        return ProducerMetrics(self.registry)

    @cached_property
    def consumer(self) -> ConsumerMetrics:
        """Return the consumers' metrics."""
        return ConsumerMetrics(self.registry)

    @cached_property
    def notify(self) -> NotifyMetrics:
        """Return the notifications' metrics."""
        return NotifyMetrics(self.registry)

    @cached_property
    def kafka(self) -> KafkaMetrics:
        """Return the metrics of librdkafka's clients."""
        return KafkaMetrics(self.registry)

    def unready(self, subject: str, why: str | None) -> None:
        """Set the reason of this subject not to be ready, or with None remove it."""
        with self._lock:
            if why is None:
                self._reasons.pop(subject, None)
            else:
                self._reasons[subject] = why

    def reasons(self) -> dict[str, str]:
        """Return why the service is not ready, by subject; empty if it is ready."""
        with self._lock:
            found = dict(self._reasons)
        for name, part in self._parts.items():
            found.update((f"{name}: {subject}", why) for subject, why in part.reasons().items())
        return found | {subject: why for subject, check in self._checks.items() if (why := check()) is not None}

    def silence(self) -> float | None:
        """Return for how many seconds there was no sign of life, None if the next one is not overdue."""
        if self._parts:
            return max((found for part in self._parts.values() if (found := part.silence()) is not None), default=None)
        now = time.monotonic()
        return now - self._beaten if now > self._alive_until else None

    def check(self, subject: str, reason: Callable[[], str | None]) -> None:
        """Ask `reason` at every request of /readyz why the service is not ready: also while the service is stuck."""
        self._checks[subject] = reason

    def beat(self, within_seconds: float) -> None:
        """Give a sign of life; /livez fails if the next one is not given within this time."""
        self._beaten = time.monotonic()
        self._alive_until = self._beaten + within_seconds

    def statistics(self, text: str) -> None:
        """Take librdkafka's statistics (its `stats_cb`)."""
        reported = json.loads(text)
        client, brokers = str(reported["type"]), reported["brokers"].values()
        named = {str(broker["nodeid"]): broker for broker in brokers if broker["nodeid"] >= 0}
        # The client forgets brokers that it cannot reach.
        for lost in self._brokers.get(client, set()) - named.keys():
            self.kafka.up.labels(client, lost).set(0)
        self._brokers.setdefault(client, set()).update(named)
        for node, broker in named.items():
            self.kafka.up.labels(client, node).set(broker["state"] == "UP")
            self.kafka.errors.labels(client, node).set(broker["txerrs"] + broker["rxerrs"])
            self.kafka.round_trip.labels(client, node).set(broker["rtt"]["avg"] / 1e6)
        if client == "consumer":  # an idle producer may have no connection
            connected = any(broker["state"] == "UP" for broker in brokers)
            self.unready("Kafka", None if connected else "no connection to any broker")

    @contextmanager
    def serve(self, address: str | None) -> Iterator[str | None]:
        """Serve /livez, /readyz and /metrics on [HOST:]PORT, by default on loopback; without an address do nothing.

        Yields the server's URL.
        """
        if address is None:
            yield None
            return
        host, _, port = address.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not port.isdecimal() or int(port) > 65535 or (":" in host and not bracketed):
            raise ConfigurationError(f"--http {address}: use PORT, HOST:PORT or [IPV6]:PORT")
        self.kafka  # noqa: B018  # created before other threads use it
        try:
            server = _server(host.strip("[]") or "127.0.0.1", int(port), self._answer)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--http {address}: cannot listen on this address: {reason}") from error
        self.beat(START_SECONDS)
        name = f"{self._service}-http"
        threading.Thread(target=server.serve_forever, args=(0.1,), name=name, daemon=True).start()
        bound, number = map(str, server.server_address[:2])
        try:
            yield f"http://[{bound}]:{number}" if bracketed else f"http://{bound}:{number}"
        finally:
            server.shutdown()
            server.server_close()

    def _answer(self, path: str) -> tuple[int, str, str]:
        if path == "/livez":
            if (silence := self.silence()) is not None:
                return 503, f"no sign of life for {silence:.0f} s\n", TEXT
            return 200, "alive\n", TEXT
        if path == "/readyz":
            reasons = {subject: " ".join(why.split()) for subject, why in self.reasons().items()}
            lines = [why if why == subject else f"{subject}: {why}" for subject, why in reasons.items()]
            return (503, "\n".join(lines) + "\n", TEXT) if lines else (200, "ready\n", TEXT)
        if path == "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            return 200, generate_latest(self.registry).decode(), CONTENT_TYPE_LATEST
        return 404, "use /livez, /readyz or /metrics\n", TEXT


def _server(host: str, port: int, answer: Callable[[str], tuple[int, str, str]]) -> TCPServer:
    import socket
    from http.server import BaseHTTPRequestHandler
    from socketserver import ThreadingTCPServer

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds until a silent client is disconnected

        def do_GET(self) -> None:  # the name that http.server calls
            status, body, kind = answer(self.path.partition("?")[0])
            payload = body.encode()
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Log nothing: probes come every few seconds."""

    class Server(ThreadingTCPServer):  # unlike HTTPServer it does not look its own name up, which can take seconds
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = allow_reuse_address = True

    return Server((host, port), Handler)
