"""Which proxy leads where: one table of cases."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from bourse_cli.proxies import proxy_for
from bourse_schemas.errors import ConfigurationError

HTTPS = "https://apibeta.example.ir/x"
HTTP = "http://registry.example.ir:8081"
PROXY = "http://proxy:3128"
SECRET = "hush-hush"


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        (HTTPS, {}, None),
        (HTTPS, {"HTTPS_PROXY": PROXY}, PROXY),
        (HTTPS, {"https_proxy": PROXY, "HTTPS_PROXY": "http://other:1"}, PROXY),
        (HTTPS, {"https_proxy": " ", "HTTPS_PROXY": PROXY}, PROXY),
        (HTTPS, {"HTTP_PROXY": PROXY}, None),
        (HTTP, {"HTTP_PROXY": PROXY}, PROXY),
        (HTTP, {"http_proxy": PROXY}, PROXY),
        (HTTP, {"ALL_PROXY": PROXY}, PROXY),
        (HTTP, {"all_proxy": PROXY, "HTTP_PROXY": "http://first:1"}, "http://first:1"),
        (HTTPS, {"ALL_PROXY": "socks5://127.0.0.1:10808"}, "socks5://127.0.0.1:10808"),
        (HTTPS, {"ALL_PROXY": "socks5h://127.0.0.1:10808/"}, "socks5h://127.0.0.1:10808/"),
        (HTTPS, {"HTTPS_PROXY": "proxy:3128"}, "http://proxy:3128"),
        (HTTPS, {"HTTPS_PROXY": f"http://me:{SECRET}@proxy:3128"}, f"http://me:{SECRET}@proxy:3128"),
        # Loopback is never proxied, so a bad variable does not matter there.
        ("http://127.0.0.1:28382", {"HTTP_PROXY": PROXY}, None),
        ("http://127.8.8.8/", {"ALL_PROXY": "socks://127.0.0.1:1"}, None),
        ("http://localhost:1", {"HTTP_PROXY": PROXY}, None),
        ("http://a.localhost.", {"HTTP_PROXY": PROXY}, None),
        ("http://[::1]:1", {"HTTP_PROXY": PROXY, "NO_PROXY": "[::1"}, None),
        # NO_PROXY
        (HTTP, {"HTTP_PROXY": PROXY, "NO_PROXY": "*"}, None),
        (HTTP, {"HTTP_PROXY": PROXY, "NO_PROXY": "127.0.0.1, Example.IR"}, None),
        (HTTP, {"HTTP_PROXY": PROXY, "no_proxy": ".example.ir,"}, None),
        (HTTP, {"HTTP_PROXY": PROXY, "no_proxy": "*.example.ir"}, None),
        (HTTP, {"HTTP_PROXY": PROXY, "no_proxy": "ample.ir"}, PROXY),
        (HTTP, {"HTTP_PROXY": PROXY, "no_proxy": "registry.example.ir:8081"}, None),
        (HTTP, {"HTTP_PROXY": PROXY, "no_proxy": "registry.example.ir:80"}, PROXY),
        (HTTPS, {"HTTPS_PROXY": PROXY, "no_proxy": "example.ir:443"}, None),
        ("http://10.1.2.3", {"HTTP_PROXY": PROXY, "NO_PROXY": "10.0.0.0/8"}, None),
        ("http://11.1.2.3", {"HTTP_PROXY": PROXY, "NO_PROXY": "10.0.0.0/8,fe80::/10,[::1]"}, PROXY),
        ("http://10.1.2.3:81", {"HTTP_PROXY": PROXY, "NO_PROXY": "10.1.2.3:80"}, PROXY),
        ("http://[fe80::1]:1", {"HTTP_PROXY": PROXY, "NO_PROXY": "fe80::/10"}, None),
        ("http://[2001:db8::1]:81", {"HTTP_PROXY": PROXY, "NO_PROXY": "[2001:db8::1]:81"}, None),
        ("http://[2001:db8::1]:81", {"HTTP_PROXY": PROXY, "NO_PROXY": "2001:db8::1"}, None),
    ],
)
def test_the_environment(url: str, environ: dict[str, str], expected: str | None) -> None:
    """The variables of curl, in curl's order; httpx2 can use every result."""
    assert proxy_for(url, environ=environ) == expected
    httpx2.HTTPTransport(proxy=expected).close()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"ALL_PROXY": f"socks://me:{SECRET}@127.0.0.1:1"},
            "ALL_PROXY: socks:// is not a supported proxy scheme; did you mean socks5://?",
        ),
        ({"https_proxy": f"nonsense://me:{SECRET}@h"}, "https_proxy is not a proxy address such as"),
        ({"HTTPS_PROXY": f"http://me:{SECRET}@h:port"}, "HTTPS_PROXY is not a proxy address such as"),
        ({"HTTPS_PROXY": "http://"}, "HTTPS_PROXY is not a proxy address such as"),
        ({"HTTPS_PROXY": "http://a b"}, "HTTPS_PROXY is not a proxy address such as"),
        ({"HTTPS_PROXY": "http://[::1"}, "HTTPS_PROXY is not a proxy address such as"),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "[::1"}, "NO_PROXY: [::1 is not a host name, an address or a network"),
        ({"HTTPS_PROXY": PROXY, "no_proxy": "*,10.0.0.0/33"}, "no_proxy: 10.0.0.0/33 is not a host name, an address"),
    ],
)
def test_a_bad_variable_is_named(environ: dict[str, str], message: str) -> None:
    """One line that names the variable and does not show the password."""
    with pytest.raises(ConfigurationError) as caught:
        proxy_for(HTTPS, environ=environ)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_options_go_before_the_environment(tmp_path: Path) -> None:
    """A file may hold a password and a byte order mark."""
    environ = {"HTTPS_PROXY": "http://other:1", "NO_PROXY": "*"}
    assert proxy_for(HTTPS, proxy=PROXY, environ=environ) == PROXY
    file = tmp_path / "proxy"
    file.write_bytes(f"\ufeffsocks5://me:{SECRET}@proxy:1\r\n".encode())
    assert proxy_for(HTTPS, proxy_file=file, environ=environ) == f"socks5://me:{SECRET}@proxy:1"
    assert proxy_for("http://127.0.0.1", proxy_file=file, environ=environ) is None


@pytest.mark.parametrize(
    ("proxy", "file", "message"),
    [
        (f"http://me:{SECRET}@proxy:1", None, "--proxy holds a password: write the URL to a file and use --proxy-file"),
        (f"nonsense://me:{SECRET}@h", None, "--proxy is not a proxy address"),
        ("socks://h:1", None, "--proxy: socks:// is not a supported proxy scheme; did you mean socks5://?"),
        (PROXY, "nowhere", "--proxy and --proxy-file: use one of them"),
        (None, "nowhere", "--proxy-file: cannot read nowhere: No such file"),
    ],
)
def test_a_bad_option_is_named(proxy: str | None, file: str | None, message: str) -> None:
    """Also for a loopback address; the password is not shown."""
    with pytest.raises(ConfigurationError) as caught:
        proxy_for("http://127.0.0.1", proxy=proxy, proxy_file=Path(file) if file else None, environ={})
    assert str(caught.value).startswith(message)
    assert SECRET not in str(caught.value)
