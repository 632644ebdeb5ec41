"""What a running service reports over HTTP: /livez, /readyz (and if not ready, why) and /metrics."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from socketserver import TCPServer, ThreadingTCPServer
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from bourse_schemas.errors import ConfigurationError

START_SECONDS = 120.0  # a service that gives no sign of life within this time after its start is stuck
TEXT = "text/plain; charset=utf-8"


def _kinds(registry: CollectorRegistry, *labels: str) -> tuple[partial[Counter], partial[Gauge], partial[Histogram]]:
    """Return constructors of metrics with these labels; names get `bourse_` in front, counters `_total` behind."""
    fixed: dict[str, Any] = {"namespace": "bourse", "registry": registry} | ({"labelnames": labels} if labels else {})
    return partial(Counter, **fixed), partial(Gauge, **fixed), partial(Histogram, **fixed)


class ProducerMetrics:
    """Metrics of the producer. A gauge without a value yet is 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge, histogram = _kinds(registry)
        self.calls = counter("exchange_calls", "Calls to the exchange. Those that are done are billed.", ["outcome"])
        self.calls_left = gauge("calls_left", "Billed calls left today, NaN without a limit. At 0 polls are skipped.")
        self.calls_left.set(float("nan"))
        self.token_minted = gauge("token_minted_timestamp_seconds", "Last grant of a token. Several a day are unusual.")
        self.token_expires = gauge("token_expires_timestamp_seconds", "End of the token's life. Polls fail after it.")
        self.polls = counter("polls", "Polls committed. FAILED and SKIPPED ones bring no data.", ["outcome"])
        self.events = counter("events", "Trade events committed. None in an open session is unusual.", ["op"])
        self.rejected_rows = counter("rejected_rows", "Rows that cannot be read. They become dead letters, not events.")
        self.stale_rows = counter("stale_rows", "Rows older than the committed candle. They make no event.")
        self.contradictions = counter("contradictions", "Inconsistent responses. The API may have changed.", ["kind"])
        self.foreign_records = counter("foreign_records", "Records on polls by others. Every reader skips them.")
        self.feed_state = gauge("feed_state", "1 for the feed's state. Only FRESH and IDLE are reliable.", ["state"])
        self.poll_sequence = gauge("poll_sequence", "Sequence of the last committed poll. It rises with every poll.")
        self.last_good_poll = gauge("last_good_poll_timestamp_seconds", "Last good response. If old, events are late.")
        self.last_change = gauge("last_change_timestamp_seconds", "Last change. If old, the feed may be frozen.")
        self.session_open = gauge("session_open", "1 in the continuous session by the calendar. Data are due then.")
        self.clock_skew = gauge("clock_skew_seconds", "Exchange's clock minus ours. Over 5 s sessions are misjudged.")
        self.calendar_days_known = gauge("calendar_days_known", "Days with known holidays. Later ones are estimates.")
        self.leader = gauge("leader", "1 if this instance polls, 0 on standby. Without a leader no data arrive.")
        self.fenced = counter("fenced", "Take-overs by another instance. Repeated ones mean a stalling machine.")
        self.failures = counter("publication_failures", "Failed publish or restore. Events are late.", ["step"])
        self.restore_seconds = gauge("restore_seconds", "Time of the last restore. Take-overs are late by this time.")
        self.fetch_seconds = histogram("fetch_seconds", "From request to response. Events are late by this time.")
        self.publish_seconds = histogram("publish_seconds", "From response to commit. Events are late by this time.")
        self.capture_errors = counter("capture_errors", "Responses not captured. `bourse replay` will lack them.")


class ConsumerMetrics:
    """Metrics of the consumers of one process, each labelled with the consumer's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge, histogram = _kinds(registry, "consumer")
        self.rows = counter("consumer_rows", "Records processed. A rate of 0 while the lag rises means it is stuck.")
        self.emitted = counter("consumer_emitted", "Events committed to the consumer's topic. Readers see only these.")
        self.dead_letters = counter("consumer_dead_letters", "Records sent to dead letters. The results lack them.")
        self.retries = counter("consumer_retries", "Batches repeated after an external failure. Results are late.")
        self.incomplete = counter("consumer_incomplete_polls", "Polls whose events are missing. They are not judged.")
        self.trouble = gauge("consumer_trouble", "1 while an operator must act, see /readyz. Results may lack rows.")
        self.lag = gauge("consumer_lag", "Offsets from the position to the end. If it rises, results are late.")
        self.batch_seconds = histogram("consumer_batch_seconds", "Time for a batch. Results are late by at least this.")


class NotifyMetrics:
    """Metrics of the notifications, each labelled with the channel's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, _, _ = _kinds(registry, "channel", "outcome")
        _, _, histogram = _kinds(registry, "channel")
        self.messages = counter("notifications", "Sent, failed (repeated), given_up. The last ones did not arrive.")
        self.seconds = histogram("notify_seconds", "From reading an alert to delivery. Readers are late by this time.")


class ArchiveMetrics:
    """Metrics of the archiver that optimizes the closed days of its topic."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _, gauge, _ = _kinds(registry)
        self.verified_day = gauge("archive_verified_day", "Start of the last verified day. If old, days have findings.")
        self.findings = gauge("archive_findings", "Findings of the last verification. Days with any are not merged.")


class BoardMetrics:
    """Metrics of the board."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge, _ = _kinds(registry)
        self.clients = gauge("board_clients", "Pages that receive frames. At --max-clients others are refused.")
        self.refused = counter("board_refused_clients", "Pages refused for lack of room. They show old prices.")
        self.frames = counter("board_frames", "Frames made. If it does not rise every 5 s, all pages are frozen.")
        self.rebuilds = counter("board_rebuilds", "Topics found created again. Each time all pages load the day again.")
        self.poll_age = gauge("board_poll_age_seconds", "Since the newest poll arrived. If high, all prices are old.")


class KafkaMetrics:
    """Metrics of librdkafka's clients, from its statistics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _, gauge, _ = _kinds(registry, "client", "broker")
        self.up = gauge("kafka_broker_up", "1 while connected to the broker. At 0 its partitions are unreachable.")
        self.errors = gauge("kafka_request_errors", "Failed requests to the broker so far. Each costs a retry.")
        self.round_trip = gauge("kafka_round_trip_seconds", "Mean round trip to the broker. Each commit takes several.")


class Monitor:
    """Liveness, readiness and metrics of one service. Any thread may use it.

    Each monitor has a registry of its own, so that several services of one process do not share metrics. A service
    creates its group of metrics by touching it (`monitor.producer`) once before it starts threads.
    """

    producer = cached_property(lambda self: ProducerMetrics(self.registry))
    consumer = cached_property(lambda self: ConsumerMetrics(self.registry))
    notify = cached_property(lambda self: NotifyMetrics(self.registry))
    archive = cached_property(lambda self: ArchiveMetrics(self.registry))
    board = cached_property(lambda self: BoardMetrics(self.registry))
    kafka = cached_property(lambda self: KafkaMetrics(self.registry))

    def __init__(self, service: str) -> None:
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
        host, port = parse_address(address)
        self.kafka  # noqa: B018  # created before other threads use it
        try:
            server = _server(host, port, self.answer)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--http {address}: cannot listen on this address: {reason}") from error
        self.beat(START_SECONDS)
        name = f"{self._service}-http"
        threading.Thread(target=server.serve_forever, args=(0.1,), name=name, daemon=True).start()
        bound, number = map(str, server.server_address[:2])
        try:
            yield f"http://[{bound}]:{number}" if ":" in host else f"http://{bound}:{number}"
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, path: str) -> tuple[int, str, str]:
        """Return status, body and content type for /livez, /readyz and /metrics."""
        if path == "/livez":
            silence = self.silence()
            return (200, "alive\n", TEXT) if silence is None else (503, f"no sign of life for {silence:.0f} s\n", TEXT)
        if path == "/readyz":
            reasons = {subject: " ".join(why.split()) for subject, why in self.reasons().items()}
            lines = [why if why == subject else f"{subject}: {why}" for subject, why in reasons.items()]
            return (503, "\n".join(lines) + "\n", TEXT) if lines else (200, "ready\n", TEXT)
        if path == "/metrics":
            return 200, generate_latest(self.registry).decode(), CONTENT_TYPE_LATEST
        return 404, "use /livez, /readyz or /metrics\n", TEXT


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of `--http`, by default on loopback."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not port.isdecimal() or int(port) > 65535 or (":" in host and not bracketed):
        raise ConfigurationError(f"--http {address}: use PORT, HOST:PORT or [IPV6]:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def _server(host: str, port: int, answer: Callable[[str], tuple[int, str, str]]) -> TCPServer:
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
