"""`bourse produce`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster, cluster_options

if TYPE_CHECKING:
    from bourse_producer.finnotech import Credentials

__all__ = ["produce"]

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


def _credentials(client_id: str | None, secret_file: Path | None, nid_file: Path | None) -> Credentials:
    from bourse_producer.finnotech import Credentials

    if not client_id:
        raise ConfigurationError("no client id: give --client-id or set BOURSE_CLIENT_ID")
    secret = _secret("client secret", "BOURSE_CLIENT_SECRET", "--client-secret-file", secret_file)
    nid = _secret("national id", "BOURSE_NID", "--nid-file", nid_file)
    if not (nid.isascii() and nid.isdigit() and len(nid) == 10):
        raise ConfigurationError("the national id (BOURSE_NID or --nid-file) must be 10 digits")
    return Credentials(client_id, secret, nid)


@click.command
@click.option(
    "--address", envvar="BOURSE_ADDRESS", metavar="URL", help="The exchange's address, instead of --environment."
)
@click.option(
    "--environment",
    type=click.Choice(["production", "sandbox"]),
    default="production",
    show_default=True,
    help="Which of Finnotech's two addresses to use.",
)
@click.option("--client-id", envvar="BOURSE_CLIENT_ID", help="Client id of the account at the exchange.")
@click.option(
    "--client-secret-file",
    envvar="BOURSE_CLIENT_SECRET_FILE",
    type=FILE,
    help="File with the client secret, instead of BOURSE_CLIENT_SECRET.",
)
@click.option(
    "--nid-file",
    envvar="BOURSE_NID_FILE",
    type=FILE,
    help="File with the national id of 10 digits, instead of BOURSE_NID.",
)
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
@click.option("--proxy", metavar="URL", envvar="BOURSE_PROXY", help="Proxy for the calls to the exchange.")
@click.option("--connect-timeout-seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True)
@click.option(
    "--read-timeout-seconds",
    type=click.FloatRange(min=0.1),
    default=45.0,
    show_default=True,
    help="The exchange's gateway itself waits 40 s.",
)
@click.option(
    "--once", is_flag=True, help="Poll once; exit 0 if it was published or unchanged, else 1, or 2 if refused."
)
@cluster_options
@click.pass_context
def produce(
    ctx: click.Context,
    cluster: Cluster,
    *,
    address: str | None,
    environment: str,
    client_id: str | None,
    client_secret_file: Path | None,
    nid_file: Path | None,
    rights: bool,
    poll_seconds: float,
    schedule: str,
    clock: str,
    proxy: str | None,
    connect_timeout_seconds: float,
    read_timeout_seconds: float,
    once: bool,
) -> None:
    """Poll the exchange and publish what changed, exactly once."""
    import httpx

    from bourse_producer.finnotech import ADDRESSES, SOURCE, Finnotech
    from bourse_producer.publisher import Publisher
    from bourse_producer.service import Producer, Settings
    from bourse_schemas.events import Outcome
    from bourse_schemas.telemetry import configure_logging

    configure_logging(ctx.find_root().obj or "info")
    credentials = _credentials(client_id, client_secret_file, nid_file)
    address = address or ADDRESSES[environment]
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or url.userinfo or (url.port or 1) > 65535:
        raise ConfigurationError(f"--address is no address such as {ADDRESSES['production']}, without a password")

    settings = Settings(
        source=SOURCE,
        poll_seconds=poll_seconds,
        always=schedule == "always",
        response_clock=clock == "response",
        rights=rights,
    )
    timeout = httpx.Timeout(read_timeout_seconds, connect=connect_timeout_seconds)
    try:
        client = httpx.Client(timeout=timeout, proxy=proxy, headers={"User-Agent": "bourse-stream"})
    except (ValueError, httpx.InvalidURL) as error:
        # The reason may quote a password.
        raise ConfigurationError("--proxy is no address such as http://127.0.0.1:3128") from error
    with client:
        producer = Producer(Finnotech(client, address, credentials), lambda: Publisher(cluster, SOURCE), settings)
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
