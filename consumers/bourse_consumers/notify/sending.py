"""Handing a message to a channel: through Apprise, or as a signed webhook."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from time import time
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2
import requests
from apprise import Apprise, AppriseAsset, NotifyFormat, NotifyType, OverflowMode
from socksio.exceptions import SOCKSError

from bourse_cli.proxies import proxy_for
from bourse_consumers.notify.policy import Message
from bourse_consumers.notify.words import Text
from bourse_schemas.codec import to_json
from bourse_schemas.errors import BourseError
from bourse_schemas.events import PriceAlert, Severity

__all__ = ["Apprised", "NotSent", "Sender", "Webhook", "require_address"]

SECONDS = 10.0
LEAST_PAUSE_SECONDS = 1.0
REFUSALS = {400, 401, 403, 404, 410, 413}
TYPES = {Severity.CRITICAL: NotifyType.FAILURE, Severity.WARNING: NotifyType.WARNING, Severity.INFO: NotifyType.INFO}

# What Apprise has to say is taken from each call's result; elsewhere it might show a channel's address.
_logger = logging.getLogger("apprise")
_logger.setLevel(logging.WARNING)
_logger.propagate = False
_logger.addHandler(logging.NullHandler())


class NotSent(BourseError):
    """A channel did not accept a message; the text gives the reason, and nothing of its address but the host.

    If `permanent`, trying again is no use.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class Sender(Protocol):
    """A way to one channel. Used from several threads."""

    def send(self, text: Text, message: Message | None = None) -> None:
        """Hand a text over, with the message that it tells where there is one; raise NotSent where that fails."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How requests of the calling thread get out: through a proxy, to another host than the plug-in's own."""

    proxy: str | None = None
    address: str | None = None


_way: ContextVar[_Way] = ContextVar("way", default=_Way())  # noqa: B039  # frozen


class _Session(requests.Session):
    """What Apprise's plug-ins send with, sent the way of the channel in hand."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request as the channel says."""
        way = _way.get()
        if way.address is not None and request.url is not None:
            base, asked = urlsplit(way.address), urlsplit(request.url)
            if asked.netloc != base.netloc:  # else a redirection, which is there already
                path = base.path.rstrip("/") + asked.path
                request.url = urlunsplit((base.scheme, base.netloc, path, asked.query, ""))
        if way.proxy is not None:
            options["proxies"] = {"http": way.proxy, "https": way.proxy}
        return super().send(request, **options)


def _use_our_sessions() -> None:
    """Make `requests.post` and its like use our sessions: plug-ins call them without a session of their own.

    Apprise knows no proxy but the environment's, which is one for all channels, and no other host for a service.
    """
    requests.sessions.Session = _Session  # type: ignore[misc]


class Apprised:
    """A channel of Apprise's. `address` and `proxy` are for those that speak HTTP."""

    def __init__(self, url: str, proxy: str | None = None, address: str | None = None) -> None:
        asset = AppriseAsset(
            app_id="bourse",
            app_desc="bourse-stream",
            # No pictures of Apprise's, from a host that may be blocked.
            image_url_mask="",
            image_url_logo="",
            async_mode=False,
            secure_logging=True,
        )
        service = Apprise.instantiate(url, asset=asset)
        if service is None:
            scheme = re.match(r"[a-z0-9+]{1,20}://", url)
            raise ValueError(f"Apprise knows no such address ({scheme[0] if scheme else 'it has no scheme'}…)")
        if service.overflow_mode is OverflowMode.UPSTREAM:
            service.overflow_mode = OverflowMode.SPLIT  # a long message comes in parts instead of not at all
        # How many messages a channel gets is ours to say; a burst is told in seconds, not in minutes.
        service.request_rate_per_sec = min(service.request_rate_per_sec, LEAST_PAUSE_SECONDS)
        if proxy is not None or address is not None:
            if url.startswith("mailto"):
                raise ValueError("mail takes neither address nor proxy; where the proxy is a default say `proxy: null`")
            _use_our_sessions()
        self._apprise = Apprise(asset=asset)
        self._apprise.add(service)
        self._way = _Way(proxy, address)
        self._secrets = _secrets(url, proxy)
        self._one_at_a_time = threading.Lock()

    def send(self, text: Text, message: Message | None = None) -> None:
        """Hand a text over."""
        kind = TYPES.get(message.severity, NotifyType.WARNING) if message else NotifyType.INFO
        with self._one_at_a_time, _set(self._way):
            result = self._apprise.notify(text.body, text.title, notify_type=kind, body_format=NotifyFormat.TEXT)
        if not result:
            said = [entry.message for service in result.results for entry in service.logs()]
            raise NotSent(scrub(said[-1] if said else "Apprise does not say why", self._secrets))


class Webhook:
    """JSON over HTTP, with the alerts as on the topic; signed as Standard Webhooks has it where there is a key."""

    def __init__(self, url: str, key: str | None = None, proxy: str | None = None) -> None:
        require_address(url)
        self._url, self._secrets = url, _secrets(url, proxy)
        self._key = _key(key) if key is not None else None
        transport = httpx2.HTTPTransport(proxy=proxy or proxy_for(url, environ=os.environ))
        self._client = httpx2.Client(timeout=SECONDS, transport=transport, follow_redirects=False)

    def send(self, text: Text, message: Message | None = None) -> None:
        """Post a text and its alerts; any answer but 2xx is a failure."""
        alerts: Sequence[PriceAlert] = message.alerts if message else ()
        told = message.id if message else sha256("\n".join((*text, str(time()))).encode()).hexdigest()[:32]
        content = {
            "id": told,
            "kind": message.kind if message else "notice",
            "title": text.title,
            "body": text.body,
            "alerts": [json.loads(to_json(_fields(alert))) for alert in alerts],
        }
        body = json.dumps(content, ensure_ascii=False).encode()
        try:
            answer = self._client.post(self._url, content=body, headers=self._headers(told, body))
        except (httpx2.HTTPError, SOCKSError) as error:
            raise NotSent(scrub(f"{type(error).__name__}: {error}", self._secrets)) from None
        if not answer.is_success:
            raise NotSent(
                f"{urlsplit(self._url).hostname} answers {answer.status_code} {answer.reason_phrase}",
                permanent=answer.status_code in REFUSALS,
            )

    def _headers(self, told: str, body: bytes) -> dict[str, str]:
        at = str(int(time()))
        headers = {"Content-Type": "application/json", "Idempotency-Key": told, "webhook-id": told}
        headers["webhook-timestamp"] = at
        if self._key is not None:
            signed = hmac.digest(self._key, f"{told}.{at}.".encode() + body, "sha256")
            headers["webhook-signature"] = f"v1,{base64.b64encode(signed).decode()}"
        return headers


@contextmanager
def _set(way: _Way) -> Iterator[None]:
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)


def _fields(alert: PriceAlert) -> Mapping[str, Any]:
    return {name: getattr(alert, name) for name in alert.__struct_fields__}


def _key(text: str) -> bytes:
    """Return the bytes of a signing key: `whsec_` and base64, or any text as it is."""
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ValueError("a key that begins with whsec_ goes on in base64") from None


def require_address(url: str) -> None:
    """Raise ValueError where this is not an address of HTTP."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("give an address such as https://host/path")


def _secrets(*urls: str | None) -> list[str]:
    """Return what must not be shown of addresses: all but scheme, host and port, as written and decoded."""
    found: set[str] = set()
    for url in filter(None, urls):
        rest = url.partition("://")[2]
        user, at, _ = rest.rpartition("@")
        if at:
            found.update((user, *user.split(":")))
            rest = rest.rpartition("@")[2]
        host, *pieces = re.split(r"[/?&=#]", rest)
        # Where services put a token in the host's place it has no dot.
        found.update(pieces if "." in host or ":" in host or host == "localhost" else (host, *pieces))
    return sorted({form for each in found for form in (each, unquote(each)) if len(form) >= 3}, key=len, reverse=True)


def scrub(text: str, secrets: list[str]) -> str:
    """Return a text in one line, of 300 characters at most, without any of the secrets."""
    for secret in secrets:
        text = text.replace(secret, "…")
    return " ".join(text.split())[:300]
