"""`bourse produce`."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from bourse_cli.health import Monitor
from bourse_cli.logs import get_logger
from bourse_cli.options import cluster_options, http_option
from bourse_producer.calendar_command import CalendarFile, calendar_option
from bourse_producer.options import ExchangeOptions, exchange_options, option, options_of
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.watchdog import stop_on_signals

if TYPE_CHECKING:
    from bourse_producer.markers import Trial
    from bourse_producer.service import Producer
    from bourse_schemas.events import PollMarker

PRACTICE_HOLD_SECONDS = 2.0
STOP_SECONDS = 3.5
FOLDER = click.Path(file_okay=False, path_type=Path)
SHARE, FROM_0, FROM_1 = click.FloatRange(0, 1), click.FloatRange(min=0), click.FloatRange(min=1)
SCHEDULES, CLOCKS = click.Choice(["session", "always"]), click.Choice(["system", "response"])


@dataclass(frozen=True, slots=True)
class ProduceOptions:
    """How to poll, and what to do with what comes."""

    rights: bool = option(
        "Poll subscription rights too: a second call, charged.", default=False, flag="--rights/--no-rights"
    )
    poll_seconds: float = option("Seconds from poll to poll.", click.FloatRange(0, 3600), 60.0)
    schedule: str = option("Poll in the exchange's sessions, or always.", SCHEDULES, "session")
    clock: str = option("Take the time from our clock, or from the responses (a day of the past).", CLOCKS, "system")
    frozen_seconds: float = option("An open market that does not move for this time is FROZEN.", FROM_1, 180.0)
    partial_share: float = option("With less than this share of the last response's rows one is PARTIAL.", SHARE, 0.5)
    max_rejected_share: float = option("A response with a larger share of bad rows is not published.", SHARE, 0.2)
    quota_seconds: float = option("Pause after the exchange reports that the paid calls are used up.", FROM_0, 3600.0)
    max_calls_per_day: int | None = option(
        "Charged calls a day (Tehran), restarts included; one poll is kept for the day's end. [default: no limit]",
        click.IntRange(min=1),
    )
    capture: Path | None = option("Keep every response in this folder, byte for byte; see `bourse replay`.", FOLDER)
    once: bool = option("Poll once; exit 0 if it was published or unchanged, else 1, or 2 if refused.", is_flag=True)
    dry_run: bool = option("Poll once (charged), print what would be published, write nothing.", is_flag=True)
    remove_candle: str | None = option(
        "Only remove a record from the candles: a delisted instrument, or not a candle.", metavar="PARTITION/KEY"
    )


@click.command
@exchange_options
@options_of("options", ProduceOptions)
@calendar_option
@http_option
@cluster_options
@click.pass_context
def produce(
    ctx: click.Context,
    cluster: Cluster,
    exchange: ExchangeOptions,
    options: ProduceOptions,
    *,
    calendar_file: CalendarFile,
    http: str | None,
) -> None:
    """Poll the exchange and publish what changed, exactly once; of several instances one polls, the others stand by."""
    from datetime import timedelta

    from bourse_cli.logs import configure_logging
    from bourse_producer.beats import Beats
    from bourse_producer.clock import Clock, PracticeClock
    from bourse_producer.freshness import GOOD, Freshness
    from bourse_producer.patience import Patience
    from bourse_producer.publisher import Publisher, committed_state
    from bourse_producer.service import ALIVE_SECONDS, Producer, Settings
    from bourse_schemas.election import Election
    from bourse_schemas.kafka import producer_id

    configure_logging(ctx.find_root().obj or "info")
    if options.remove_candle is not None:
        publisher = Publisher(cluster)
        publisher.remove(options.remove_candle)
        publisher.close()
        return
    once = options.once or options.dry_run
    if once and ctx.get_parameter_source("http") is not ParameterSource.COMMANDLINE:
        http = None  # from file or environment it is meant for the service, which may run next to this command
    profile = exchange.service
    if options.rights and profile.one_call:
        raise ConfigurationError("--rights is for --profile trades-realtime: leave it out")
    settings = Settings(
        profile=profile,
        rights=options.rights,
        poll_seconds=options.poll_seconds,
        always=options.schedule == "always",
        calendar=calendar_file.calendar,
        freshness=Freshness(timedelta(seconds=options.frozen_seconds), options.partial_share),
        max_rejected_share=options.max_rejected_share,
        max_calls_per_day=options.max_calls_per_day,
    )
    stop = stop_on_signals()
    ours = PracticeClock(stop) if options.clock == "response" else Clock(stop)
    patience = Patience(
        quota_seconds=options.quota_seconds,
        max_calls_per_day=options.max_calls_per_day,
        reserved_calls=2 if options.rights else 1,
        # A simulated market's time is not that of its holds.
        longest_seconds=PRACTICE_HOLD_SECONDS if ours.simulated else math.inf,
    )
    monitor = Monitor("producer")
    metrics = monitor.producer

    def on_call(outcome: str) -> None:
        monitor.beat(ALIVE_SECONDS)
        metrics.calls.labels(outcome).inc()
        if outcome == "token_done":
            metrics.token_minted.set_to_current_time()

    watched = replace(cluster, on_statistics=monitor.statistics) if http else cluster
    with ExitStack() as stack:
        stack.enter_context(monitor.serve(http))
        kept = None
        if options.capture is not None:
            from bourse_producer.capture import Capture

            kept = Capture(options.capture, on_error=metrics.capture_errors.inc)
        hooks = {"on_call": on_call} | ({"on_response": kept.response} if kept else {})
        # A service tries again while the beat lasts; a command that polls once reports a failure at once.
        retry_seconds = 0.0 if once else 1.0
        finnotech = exchange.connect(stack, clock=ours, patience=patience, retry_seconds=retry_seconds, **hooks)
        metrics.token_expires.set_function(lambda: ends.timestamp() if (ends := finnotech.token_ends_at()) else 0.0)
        producer = Producer(
            finnotech,
            lambda: Publisher(watched),
            settings,
            ours,
            leadership=Election(watched, producer_id(cluster.prefix), Beats(options.poll_seconds).owed_seconds()),
            capture=kept,
            monitor=monitor,
        )
        if not once:
            _run(producer, stop)
            return
        marker = _print(producer.try_out(committed_state(cluster))) if options.dry_run else producer.run_once()
    if marker is None:
        ctx.exit(3)
    if marker.error_kind in {"token", "scope", "address"}:
        raise ConfigurationError(
            f"the exchange refuses the call: {marker.error_message}\n"
            "check the client id, its secret, the national id, the scope, and that your address is whitelisted"
        )
    ctx.exit(int(marker.outcome not in GOOD))


def _run(producer: Producer, stop: threading.Event) -> None:
    """Run the service in a thread of its own, which is left alone if a call into Kafka's client outlasts a stop.

    Nothing is lost with a commit that is not waited for: the next leader settles it and reads back what is committed.
    """
    running = ThreadPoolExecutor(1, "producer").submit(producer.run)
    running.add_done_callback(lambda _: stop.set())
    stop.wait()
    wait([running], STOP_SECONDS)
    if not running.done():
        get_logger().warning("stopped", reason="a call into Kafka's client did not return")
        os._exit(0)
    running.result()


def _print(trial: Trial) -> PollMarker:
    """Print a poll that is not published: its events, a line each, then in one line what it amounts to."""
    from msgspec.structs import asdict

    from bourse_producer.markers import COUNTS, ODD
    from bourse_schemas.codec import to_json

    marker = trial.markers[-1]
    for event in trial.derived.changes.events:
        click.echo(to_json(asdict(event)))
    for letter in trial.letters:
        click.echo(f"dead letter: {letter.reason}: {letter.message}", err=True)
    counts = ", ".join(f"{getattr(marker, name)} {name}" for name in ("rows", *COUNTS, *ODD))
    click.echo(f"dry run, nothing is written: {marker.outcome} {marker.feed_state}: {counts}", err=True)
    if marker.error_kind:
        click.echo(f"{marker.error_kind}: {marker.error_message}", err=True)
    return marker
