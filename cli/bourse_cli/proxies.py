"""One decision for every HTTP client: which proxy, if any, leads to an address."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from bourse_cli.inputs import read_text
from bourse_schemas.errors import ConfigurationError

SCHEMES = ("http", "https", "socks5", "socks5h")


def proxy_for(
    url: str, *, proxy: str | None = None, proxy_file: Path | None = None, environ: Mapping[str, str]
) -> str | None:
    """Return the URL of the proxy for `url`, or None for a direct connection. The result may hold a password.

    `proxy` and `proxy_file` are the operator's options and go before the environment: `<SCHEME>_PROXY`, then
    `ALL_PROXY`, unless `NO_PROXY` names the host. Of two spellings the lower-case one wins, as in curl. A loopback
    address is never proxied, so the variables of a desktop do not break a local set-up.

    Raises ConfigurationError that names the option or variable and never quotes its value. Pass the result on as
    `httpx2.Client(transport=httpx2.HTTPTransport(proxy=...))`: a client without a transport reads the environment
    again.
    """
    chosen, target = None, urlsplit(url)
    if proxy is not None and proxy_file is not None:
        raise ConfigurationError("--proxy and --proxy-file: use one of them")
    if proxy is not None:
        chosen = _proxy_url("--proxy", proxy)
        if urlsplit(chosen).password is not None:
            raise ConfigurationError("--proxy holds a password: write the URL to a file and use --proxy-file FILE")
    elif proxy_file is not None:
        chosen = _proxy_url(f"--proxy-file {proxy_file}", read_text(proxy_file, "--proxy-file").strip())
    host = (target.hostname or "").rstrip(".")
    address = _address(host)
    if host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback):
        return None
    if chosen is not None:
        return chosen
    for name in (f"{target.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if value := environ.get(variable, "").strip():
                return None if _exempt(host, target, environ) else _proxy_url(variable, value)
    return None


def proxy_environment(environ: Mapping[str, str], proxy: str | None = None) -> dict[str, str]:
    """Return the environment for a child process whose HTTP client decides by its variables, like requests.

    With `proxy` that is the only one; loopback is never proxied.
    """
    given = environ if proxy is None else {"all_proxy": proxy}
    exempt = given.get("no_proxy") or given.get("NO_PROXY", "")
    proxies = {f"{scheme}_proxy": proxy_for(f"{scheme}://host", environ=given) or "" for scheme in ("http", "https")}
    others = {key: value for key, value in environ.items() if not key.lower().endswith("_proxy")}
    return {**others, **proxies, "no_proxy": f"localhost,127.0.0.1,::1,{exempt}"}


def _proxy_url(origin: str, value: str) -> str:
    url = value if "://" in value else f"http://{value}"  # as curl reads it
    if url.startswith("socks://"):
        raise ConfigurationError(f"{origin}: socks:// is not a supported proxy scheme; did you mean socks5://?")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in SCHEMES and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(f"{origin} is not a proxy address such as http://HOST:3128 ({', '.join(SCHEMES)})")
    return url


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _exempt(host: str, target: SplitResult, environ: Mapping[str, str]) -> bool:
    """Return whether NO_PROXY names the host: a name with its subdomains, an address, a network, or *; maybe a port."""
    variable = "no_proxy" if environ.get("no_proxy", "").strip() else "NO_PROXY"
    port, address = target.port or (443 if target.scheme == "https" else 80), _address(host)
    exempt = False
    for entry in filter(None, (each.strip().lower() for each in environ.get(variable, "").split(","))):
        with_port = re.fullmatch(r"(\[.+\]|[^:]+):(\d+)", entry)
        name, number = with_port.groups() if with_port else (entry, port)
        name = re.sub(r"^\[(.+)\]$", r"\1", name)
        if ":" in name or "/" in name:
            try:
                network = ip_network(name, strict=False)
            except ValueError:
                raise ConfigurationError(f"{variable}: {entry} is not a host name, an address or a network") from None
            named = address is not None and address in network
        else:
            suffix = name.removeprefix("*").lstrip(".")
            named = name == "*" or host == suffix or host.endswith(f".{suffix}")
        exempt |= named and int(number) == port
    return exempt
