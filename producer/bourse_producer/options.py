"""The options that name an exchange and an account, shared by every command that calls the exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
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

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(dir_okay=False, path_type=Path)
SECONDS = click.FloatRange(min=0.1)
ENVIRONMENTS = click.Choice(["production", "sandbox"])
SERVICES = click.Choice(["trades-realtime", "realTimeTrades"])


def option(text: str, kind: Any = None, default: Any = None, *, flag: str | None = None, **details: Any) -> Any:
    """Return a dataclass field that is an option of the command line; `details` are those of click.option.

    The flag is the field's name, `nid_file` is --nid-file, unless `flag` is given.
    """
    shown = {"help": text, "type": kind, "default": default, "show_default": default is not None}
    return field(metadata={"flag": flag, "details": shown | details})


def options_of(parameter: str, kind: type[Any], *, shared: bool = False) -> Callable[[F], F]:
    """Add an option for each field of a dataclass; the command gets an instance of it as `parameter`.

    If the options are `shared` by several commands, each has a variable that all of them read: BOURSE_ADDRESS.
    """

    def add(command: F) -> F:
        @wraps(command)
        def with_options(*args: Any, **given: Any) -> Any:
            ours = kind(**{each.name: given.pop(each.name) for each in fields(kind)})
            return command(*args, **{parameter: ours}, **given)

        for each in reversed(fields(kind)):
            flag = each.metadata["flag"] or "--" + each.name.replace("_", "-")
            variable = f"BOURSE_{each.name.upper()}" if shared else None
            with_options = click.option(flag, each.name, envvar=variable, **each.metadata["details"])(with_options)
        return with_options  # type: ignore[return-value]  # click's decorators keep the callable

    return add


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """The exchange and the account as the operator named them."""

    address: str | None = option("The exchange's address, instead of --environment.", metavar="URL")
    environment: str = option("Which of Finnotech's two addresses to use.", ENVIRONMENTS, "production")
    profile: str = option("The exchange's documented service, or its successor.", SERVICES, "trades-realtime")
    client_id: str | None = option("Client id of the account at the exchange.")
    client_secret_file: Path | None = option("File with the client secret, instead of BOURSE_CLIENT_SECRET.", FILE)
    nid_file: Path | None = option("File with the national id of 10 digits, instead of BOURSE_NID.", FILE)
    proxy: str | None = option("Proxy for the calls to the exchange, without a password.", metavar="URL")
    proxy_file: Path | None = option("File with the proxy's URL, which may hold a password.", FILE)
    connect_timeout_seconds: float = option("How long a connection may take.", SECONDS, 10.0)
    read_timeout_seconds: float = option("How long the exchange may be silent; its gateway waits 40 s.", SECONDS, 45.0)

    @property
    def service(self) -> Profile:
        """Return which of the exchange's services is called."""
        from bourse_producer.responses import PROFILES

        return PROFILES[self.profile]

    def where(self) -> str:
        """Return the address; raise ConfigurationError if it is not one."""
        import httpx2

        service = self.service
        address = self.address or (service.sandbox if self.environment == "sandbox" else service.production)
        try:
            url = httpx2.URL(address)
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or (url.port or 1) > 65535:
            raise ConfigurationError(f"--address is not an address like {service.production}, without a password")
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
        return Finnotech(self.http(stack), address, credentials, self.service, **settings)


def _secret(what: str, variable: str, option: str, file: Path | None) -> str:
    value, where = os.environ.get(variable, ""), variable
    if file is not None:
        value, where = read_text(file, option), f"{option} {file}"
    if not value.strip():
        raise ConfigurationError(f"no {what} in {where}: set {variable} or name a file with {option}")
    return value.strip()


# The command gets `exchange: ExchangeOptions`.
exchange_options = options_of("exchange", ExchangeOptions, shared=True)
