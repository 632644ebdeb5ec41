"""`bourse produce`, and the options that say which exchange and which account."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from bourse_cli.health import Monitor
from bourse_cli.options import cluster_options, http_option
from bourse_producer.calendar_file import CalendarFile, calendar_option
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster

if TYPE_CHECKING:
    import httpx

    from bourse_producer.finnotech import Credentials, Finnotech
    from bourse_producer.responses import Profile

__all__ = ["ExchangeOptions", "exchange_options", "produce"]

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(dir_okay=False, path_type=Path)


def _secret(what: str, variable: str, option: str, file: Path | None) -> str:
    if file is None:
        value = os.environ.get(variable, "")
        where = variable
    else:
        where = f"{option} {file}"
        try:
            value = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigurationError(f"{option}: cannot read {file}: {reason}") from error
    if not value.strip():
        raise ConfigurationError(f"no {what} in {where}: set {variable} or name a file with {option}")
    return value.strip()


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """The exchange as the operator named it."""

    address: str | None
    environment: str
    profile_name: str
    client_id: str | None
    client_secret_file: Path | None
    nid_file: Path | None
    token_file: Path | None
    proxy: str | None
    connect_timeout_seconds: float
    read_timeout_seconds: float

    @property
    def profile(self) -> Profile:
        """Return the profile: which of the exchange's services is called."""
        from bourse_producer.responses import PROFILES

        return PROFILES[self.profile_name]

    def where(self) -> str:
        """Return the address; raise ConfigurationError where it is none."""
        import httpx

        address = self.address or self.profile.addresses[self.environment]
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or (url.port or 1) > 65535:
            usual = self.profile.addresses["production"]
            raise ConfigurationError(f"--address is no address such as {usual}, without a password")
        return address

    def credentials(self) -> Credentials:
        """Return the account; raise ConfigurationError where a part of it is missing."""
        from bourse_producer.finnotech import Credentials

        if not self.client_id:
            raise ConfigurationError("no client id: give --client-id or set BOURSE_CLIENT_ID")
        secret = _secret("client secret", "BOURSE_CLIENT_SECRET", "--client-secret-file", self.client_secret_file)
        nid = _secret("national id", "BOURSE_NID", "--nid-file", self.nid_file)
        if not (nid.isascii() and nid.isdigit() and len(nid) == 10):
            raise ConfigurationError("the national id (BOURSE_NID or --nid-file) must be 10 digits")
        return Credentials(self.client_id, secret, nid)

    def http(self, stack: ExitStack) -> httpx.Client:
        """Return an HTTP client with the operator's time-outs and proxy, closed with the stack."""
        import httpx

        timeout = httpx.Timeout(self.read_timeout_seconds, connect=self.connect_timeout_seconds)
        try:
            client = httpx.Client(timeout=timeout, proxy=self.proxy, headers={"User-Agent": "bourse-stream"})
        except (ValueError, httpx.InvalidURL) as error:
            # The reason may quote a password.
            raise ConfigurationError("--proxy is no address such as http://127.0.0.1:3128") from error
        return stack.enter_context(client)

    def connect(self, stack: ExitStack, **hooks: Any) -> Finnotech:
        """Return the exchange's client, closed with the stack; `hooks` are its `on_call` and `on_response`."""
        from bourse_producer.finnotech import Finnotech

        credentials, address = self.credentials(), self.where()
        return Finnotech(self.http(stack), address, credentials, self.profile, token_file=self.token_file, **hooks)


def exchange_options(command: F) -> F:
    """Add the options that name exchange and account; the command gets `exchange: ExchangeOptions` in their place."""

    @wraps(command)
    def with_exchange(*args: Any, profile: str, **options: Any) -> Any:
        ours = {name: options.pop(name) for name in ExchangeOptions.__dataclass_fields__ if name != "profile_name"}
        return command(*args, exchange=ExchangeOptions(profile_name=profile, **ours), **options)

    options = [
        click.option(
            "--address",
            envvar="BOURSE_ADDRESS",
            metavar="URL",
            help="The exchange's address, instead of --environment.",
        ),
        click.option(
            "--environment",
            type=click.Choice(["production", "sandbox"]),
            default="production",
            show_default=True,
            help="Which of Finnotech's two addresses to use.",
        ),
        click.option(
            "--profile",
            type=click.Choice(["trades-realtime", "realTimeTrades"]),
            default="trades-realtime",
            show_default=True,
            help="Which of the exchange's services: the documented one, or its successor.",
        ),
        click.option("--client-id", envvar="BOURSE_CLIENT_ID", help="Client id of the account at the exchange."),
        click.option(
            "--client-secret-file",
            envvar="BOURSE_CLIENT_SECRET_FILE",
            type=FILE,
            help="File with the client secret, instead of BOURSE_CLIENT_SECRET.",
        ),
        click.option(
            "--nid-file",
            envvar="BOURSE_NID_FILE",
            type=FILE,
            help="File with the national id of 10 digits, instead of BOURSE_NID.",
        ),
        click.option(
            "--token-file",
            envvar="BOURSE_TOKEN_FILE",
            type=FILE,
            help="Keep the exchange's token here, readable by its owner only, so that a restart needs no new one.",
        ),
        click.option("--proxy", metavar="URL", envvar="BOURSE_PROXY", help="Proxy for the calls to the exchange."),
        click.option("--connect-timeout-seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True),
        click.option(
            "--read-timeout-seconds",
            type=click.FloatRange(min=0.1),
            default=45.0,
            show_default=True,
            help="The exchange's gateway itself waits 40 s.",
        ),
    ]
    for option in reversed(options):
        with_exchange = option(with_exchange)
    return with_exchange  # type: ignore[return-value]  # click's decorators keep the callable


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
