"""The options that name an exchange and an account, shared by every command that calls the exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bourse_cli.inputs import read_text
from bourse_cli.proxies import proxy_for
from bourse_schemas.errors import ConfigurationError

if TYPE_CHECKING:
    import httpx2

    from bourse_producer.finnotech import Credentials, Finnotech
    from bourse_producer.responses import Profile

__all__ = ["ExchangeOptions", "exchange_options"]

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """The exchange and the account as the operator named them."""

    address: str | None
    environment: str
    profile_name: str
    client_id: str | None
    client_secret_file: Path | None
    nid_file: Path | None
    proxy: str | None
    proxy_file: Path | None
    connect_timeout_seconds: float
    read_timeout_seconds: float

    @property
    def profile(self) -> Profile:
        """Return the profile: which of the exchange's services is called."""
        from bourse_producer.responses import PROFILES

        return PROFILES[self.profile_name]

    def where(self) -> str:
        """Return the address; raise ConfigurationError if it is not one."""
        import httpx2

        address = self.address or self.profile.addresses[self.environment]
        try:
            url = httpx2.URL(address)
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or (url.port or 1) > 65535:
            usual = self.profile.addresses["production"]
            raise ConfigurationError(f"--address is not an address like {usual}, without a password")
        return address

    def credentials(self) -> Credentials:
        """Return the account; raise ConfigurationError if a part of it is missing."""
        from bourse_producer.finnotech import Credentials

        if not self.client_id:
            raise ConfigurationError("no client id: set --client-id or BOURSE_CLIENT_ID")
        secret = _secret("client secret", "BOURSE_CLIENT_SECRET", "--client-secret-file", self.client_secret_file)
        nid = _secret("national id", "BOURSE_NID", "--nid-file", self.nid_file)
        if not (nid.isascii() and nid.isdigit() and len(nid) == 10):
            raise ConfigurationError("the national id (BOURSE_NID or --nid-file) must be 10 digits")
        return Credentials(self.client_id, secret, nid)

    def http(self, stack: ExitStack) -> httpx2.Client:
        """Return an HTTP client with the operator's time-outs and proxy, closed with the stack."""
        import httpx2

        timeout = httpx2.Timeout(self.read_timeout_seconds, connect=self.connect_timeout_seconds)
        proxy = proxy_for(self.where(), proxy=self.proxy, proxy_file=self.proxy_file, environ=os.environ)
        transport = httpx2.HTTPTransport(proxy=proxy)
        client = httpx2.Client(timeout=timeout, transport=transport, headers={"User-Agent": "bourse-stream"})
        return stack.enter_context(client)

    def connect(self, stack: ExitStack, **settings: Any) -> Finnotech:
        """Return the exchange's client, closed with the stack; `settings` are keyword arguments of Finnotech."""
        from bourse_producer.finnotech import Finnotech

        credentials, address = self.credentials(), self.where()
        return Finnotech(self.http(stack), address, credentials, self.profile, **settings)


def _secret(what: str, variable: str, option: str, file: Path | None) -> str:
    value, where = os.environ.get(variable, ""), variable
    if file is not None:
        value, where = read_text(file, option), f"{option} {file}"
    if not value.strip():
        raise ConfigurationError(f"no {what} in {where}: set {variable} or name a file with {option}")
    return value.strip()


OPTIONS = [
    click.option(
        "--address", envvar="BOURSE_ADDRESS", metavar="URL", help="The exchange's address, instead of --environment."
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
        "--proxy",
        metavar="URL",
        envvar="BOURSE_PROXY",
        help="Proxy for the calls to the exchange, without a password.",
    ),
    click.option(
        "--proxy-file",
        envvar="BOURSE_PROXY_FILE",
        type=FILE,
        help="File with the proxy's URL, which may hold a password.",
    ),
    click.option(
        "--connect-timeout-seconds",
        type=click.FloatRange(min=0.1),
        default=10.0,
        show_default=True,
        help="How long a connection may take.",
    ),
    click.option(
        "--read-timeout-seconds",
        type=click.FloatRange(min=0.1),
        default=45.0,
        show_default=True,
        help="How long the exchange may be silent. Its gateway itself waits 40 s.",
    ),
]


def exchange_options(command: F) -> F:
    """Add the options that name exchange and account; the command gets `exchange: ExchangeOptions` in their place."""

    @wraps(command)
    def with_exchange(*args: Any, profile: str, **options: Any) -> Any:
        ours = {name: options.pop(name) for name in ExchangeOptions.__dataclass_fields__ if name != "profile_name"}
        return command(*args, exchange=ExchangeOptions(profile_name=profile, **ours), **options)

    for option in reversed(OPTIONS):
        with_exchange = option(with_exchange)
    return with_exchange  # type: ignore[return-value]  # click's decorators keep the callable
