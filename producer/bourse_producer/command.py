"""`bourse produce`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from bourse_cli.health import Monitor
from bourse_cli.options import cluster_options, http_option
from bourse_producer.calendar_file import CalendarFile, calendar_option
from bourse_producer.options import ExchangeOptions, exchange_options
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster

__all__ = ["produce"]


@click.command
@exchange_options
@click.option(
    "--rights/--no-rights",
    default=False,
    show_default=True,
    help="Poll subscription rights too: a second call, charged.",
)
@click.option(
    "--poll-seconds", type=click.FloatRange(0, 3600), default=60.0, show_default=True, help="Seconds from poll to poll."
)
@click.option(
    "--schedule",
    type=click.Choice(["session", "always"]),
    default="session",
    show_default=True,
    help="When to poll: in the exchange's sessions, or always.",
)
@click.option(
    "--clock",
    type=click.Choice(["system", "response"]),
    default="system",
    show_default=True,
    help="What tells the time: our clock, or the responses' Date header (for a day of the past or a simulated one).",
)
@calendar_option
@click.option(
    "--frozen-seconds",
    type=click.FloatRange(min=1),
    default=180.0,
    show_default=True,
    help="An open market that does not move for so long is FROZEN.",
)
@click.option(
    "--partial-share",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="A response with less than this share of the rows of the one before it is PARTIAL.",
)
@click.option(
    "--max-rejected-share",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="A response of which more rows than this cannot be used is not published.",
)
@click.option(
    "--quota-seconds",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="How long to leave an exchange alone that says our calls are used up.",
)
@click.option(
    "--capture",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="BOURSE_CAPTURE",
    help="Keep every response in this folder, byte for byte; see `bourse replay`.",
)
@click.option(
    "--capture-required/--no-capture-required",
    default=False,
    show_default=True,
    help="Publish nothing that could not be captured.",
)
@http_option
@click.option(
    "--once", is_flag=True, help="Poll once; exit 0 if it was published or unchanged, else 1, or 2 if refused."
)
@cluster_options
@click.pass_context
def produce(
    ctx: click.Context,
    cluster: Cluster,
    exchange: ExchangeOptions,
    *,
    rights: bool,
    poll_seconds: float,
    schedule: str,
    clock: str,
    calendar_file: CalendarFile,
    frozen_seconds: float,
    partial_share: float,
    max_rejected_share: float,
    quota_seconds: float,
    capture: Path | None,
    capture_required: bool,
    http: str | None,
    once: bool,
) -> None:
    """Poll the exchange and publish what changed, exactly once; of several instances one polls, the others stand by."""
    from datetime import timedelta

    from bourse_cli.health import CAPTURE_ERRORS, EXCHANGE_CALLS
    from bourse_cli.logs import configure_logging
    from bourse_producer.election import Election
    from bourse_producer.freshness import Freshness
    from bourse_producer.publisher import Publisher
    from bourse_producer.service import Producer, Settings
    from bourse_schemas.events import Outcome

    configure_logging(ctx.find_root().obj or "info")
    if once and ctx.get_parameter_source("http") is not ParameterSource.COMMANDLINE:
        http = None  # from file or environment it is meant for the service, which may run next to this command
    profile = exchange.profile
    if rights and profile.name == "realTimeTrades":
        raise ConfigurationError("--rights is for --profile trades-realtime: leave it out")
    settings = Settings(
        source=profile.source,
        poll_seconds=poll_seconds,
        always=schedule == "always",
        response_clock=clock == "response",
        rights=rights,
        profile=profile,
        calendar=calendar_file.calendar,
        freshness=Freshness(timedelta(seconds=frozen_seconds), partial_share),
        quota_seconds=quota_seconds,
        # A service tries again while the beat lasts; whoever polls once is told at once.
        retry_seconds=0.0 if once else 1.0,
        max_rejected_share=max_rejected_share,
    )
    monitor = Monitor("producer")
    watched = replace(cluster, on_statistics=monitor.statistics) if http else cluster
    with ExitStack() as stack:
        stack.enter_context(monitor.serve(http))
        kept = None
        if capture is not None:
            from bourse_producer.capture import Capture

            kept = Capture(capture, required=capture_required, on_error=lambda: monitor.count(CAPTURE_ERRORS))
            stack.callback(kept.close)
        finnotech = exchange.connect(
            stack,
            on_call=lambda outcome: monitor.count(EXCHANGE_CALLS, outcome=outcome),
            on_response=kept.response if kept else None,
        )
        producer = Producer(
            finnotech,
            lambda: Publisher(watched, profile.source),
            settings,
            leadership=Election(watched, profile.source),
            capture=kept,
            monitor=monitor,
        )
        if not once:
            producer.run()
            return
        marker = producer.run_once()
    if marker.outcome is Outcome.FAILED:
        if marker.error_kind in {"token", "scope", "address"}:
            raise ConfigurationError(
                f"the exchange refuses us: {marker.error_message}\n"
                "check the client id, its secret, the national id, the scope, and that your address is whitelisted"
            )
        ctx.exit(1)
