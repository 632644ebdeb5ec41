"""Finnotech's `trades/realtime` and its successor: calls and tokens."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec

from bourse_cli.logs import get_logger
from bourse_producer.responses import SHORT, TRADES_REALTIME, UNREADABLE, Profile, error_in, refusal
from bourse_schemas.errors import (
    ConfigurationError,
    ExchangeError,
    ExchangeNonsense,
    ExchangeRefused,
    ExchangeUnavailable,
)

__all__ = ["Credentials", "Finnotech", "Received", "Reply"]

MINT_SECONDS = 60.0
DEADLINE_SECONDS = 55.0
MOST_BYTES = 64 << 20
KEPT_HEADERS = ("date", "content-type", "content-length", "content-encoding", "retry-after")


@dataclass(frozen=True, slots=True)
class Credentials:
    """An account at the exchange; the secret and the national id are never shown."""

    client_id: str
    secret: str = field(repr=False)
    nid: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """A response as it came: `dated` is its `Date` header, `received_at` our clock."""

    track_id: str
    body: bytes = field(repr=False)
    received_at: datetime
    dated: datetime | None


@dataclass(frozen=True, slots=True)
class Received:
    """An answer to a call for data, as far as it came; `query` and `headers` hold nothing secret."""

    track_id: str
    path: str
    query: Mapping[str, str]
    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    requested_at: datetime
    received_at: datetime


@dataclass(frozen=True, slots=True)
class _Token:
    """A token; `renew_at` and `ends_at` are of the steady clock. `scopes` are what was granted, where that was said."""

    value: str = field(repr=False)
    refresh: str | None = field(repr=False)
    renew_at: float
    ends_at: float
    scopes: tuple[str, ...] = ()


class _TokenRefused(Exception):
    def __init__(self, status: int, error: ExchangeError) -> None:
        super().__init__(str(error))
        self._status = status
        self._error = error

    def told(self, scope: str) -> ExchangeError:
        """Return what it means where a new token is refused too."""
        error = self._error
        if self._status != 403:
            return error
        said = f"a new token is refused: the client needs the scope {scope} and a whitelisted address ({error})"
        return ExchangeRefused("scope", said, code=error.code, track_id=error.track_id)


class Finnotech:
    """The exchange's API, one call at a time. Every method raises ExchangeError when a call gave nothing.

    `on_call` is told how each HTTP call ended: done, or an error's kind; with token_ before it for a token's.
    `on_response` gets every answer to a call for data before it is judged.
    """

    def __init__(
        self,
        client: httpx.Client,
        address: str,
        credentials: Credentials,
        profile: Profile = TRADES_REALTIME,
        *,
        token_file: Path | None = None,
        on_call: Callable[[str], None] | None = None,
        on_response: Callable[[Received], None] | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
        mint_seconds: float = MINT_SECONDS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._client = client
        self._address = address.rstrip("/")
        self._credentials = credentials
        self._profile = profile
        self._on_call = on_call or (lambda _: None)
        self._on_response = on_response or (lambda _: None)
        self._deadline_seconds, self._mint_seconds, self._most_bytes = deadline_seconds, mint_seconds, most_bytes
        self._token: _Token | None = None
        self._minted_at = -math.inf
        self._refused: ExchangeError | None = None
        self._socket: socket.socket | None = None
        self._token_file = token_file
        # A token is good for one account at one address with one scope only.
        identity = (self._address, credentials.client_id, credentials.nid, profile.scope)
        self._identity = sha256("\0".join(identity).encode()).hexdigest()
        if token_file is not None:
            self._load_token(token_file)

    def realtime(self, *, rights: bool, company_id: int | None = None, minutes: tuple[str, str] | None = None) -> Reply:
        """Return the last state of all companies' shares, or of all subscription rights.

        With `company_id` of that one only; with `minutes` (from, to: HHMM of the current day, Tehran) its minute rows,
        which the exchange gives for a named company only.

        A refused token is renewed once and the call repeated once, with a new trackId as every attempt needs. Never
        more than one token a minute is asked for.
        """
        asked = {"companyId": company_id} if self._profile.one_call else {
            "isTimePeriod": "true" if minutes else "false",
            "precedencyRight": "true" if rights else "false",
            "coId": company_id,
            "fromTime": minutes and minutes[0],
            "toTime": minutes and minutes[1],
        }  # fmt: skip
        query = {name: str(value) for name, value in asked.items() if value is not None}
        try:
            return self._realtime(self._valid_token().value, query)
        except _TokenRefused as refused:
            if self._must_wait():
                raise refused.told(self._profile.scope) from refused
            self._token = None
        try:
            return self._realtime(self._valid_token().value, query)
        except _TokenRefused as refused:
            raise refused.told(self._profile.scope) from refused

    def _realtime(self, token: str, query: dict[str, str]) -> Reply:
        track_id = uuid4().hex
        client_id = quote(self._credentials.client_id, safe="")
        path = f"/bourse/v2/clients/{client_id}/{self._profile.path}"
        query = {"trackId": track_id, **query}
        try:
            status, headers, body = self._send(
                "GET", path, track_id, params=query, headers={"Authorization": f"Bearer {token}"}
            )
            # Refusals come with 200 too, and a refused token must be noticed here, where it can be renewed.
            if status != 200 or (len(body) < SHORT and b"DONE" not in body):
                raise refusal(status, body, track_id, headers.get("retry-after"))
        except ExchangeError as error:
            self._conceal(error, token)
            self._on_call(error.kind)
            if error.kind == "token":
                raise _TokenRefused(status, error) from error
            raise
        self._on_call("done")
        return Reply(track_id, body, datetime.now(UTC), _dated(headers))

    # --- tokens -------------------------------------------------------------------------------------------------------

    def authorise(self) -> tuple[Sequence[str], timedelta]:
        """Get a token unless there is a good one; return its scopes, if the exchange named them, and the life left."""
        token = self._valid_token()
        return token.scopes, timedelta(seconds=token.ends_at - time.monotonic())

    def _valid_token(self) -> _Token:
        token, now = self._token, time.monotonic()
        if token is not None and (now < token.renew_at or (self._must_wait() and now < token.ends_at)):
            return token
        if self._must_wait():
            wait = self._mint_seconds - (now - self._minted_at)
            why = f" ({self._refused})" if self._refused else ""
            code = self._refused.code if self._refused else None
            said = f"no token: one was asked for less than a minute ago{why}"
            raise ExchangeRefused("token", said, code=code, retry_after=max(wait, 1.0))
        try:
            token = self._token = self._mint(self._grant(token))
        except ExchangeError as error:
            if token is None or now >= token.ends_at:
                self._token = None
                raise
            # The token in use still stands. A refresh token can be used up; the credentials stand, a minute later.
            refresh = token.refresh if isinstance(error, ExchangeUnavailable) else None
            token = self._token = replace(token, refresh=refresh, renew_at=now + self._mint_seconds)
        return token

    def _grant(self, old: _Token | None) -> dict[str, str]:
        if old is not None and old.refresh is not None and time.monotonic() < old.ends_at:
            return {"grant_type": "refresh_token", "token_type": "CLIENT-CREDENTIAL", "refresh_token": old.refresh}
        return {"grant_type": "client_credentials", "nid": self._credentials.nid, "scopes": self._profile.scope}

    def _conceal(self, error: ExchangeError, token: str) -> None:
        """Take our secrets out of what the exchange says of them: its words are logged and published."""
        for secret in filter(None, (self._credentials.secret, self._credentials.nid, token)):
            error.args = (str(error).replace(secret, "…"),)

    def _must_wait(self) -> bool:
        return time.monotonic() < self._minted_at + self._mint_seconds

    def _mint(self, grant: dict[str, str]) -> _Token:
        self._minted_at = asked = time.monotonic()
        self._keep_token(self._token)
        account = httpx.BasicAuth(self._credentials.client_id, self._credentials.secret)
        try:
            status, headers, body = self._send("POST", "/dev/v2/oauth2/token", None, json=grant, auth=account)
            token = _granted(body, asked)
            if token is None:
                raise _no_token(status, body, headers.get("retry-after"))
        except ExchangeError as error:
            self._conceal(error, grant.get("refresh_token", ""))
            self._on_call(f"token_{error.kind}")
            self._refused = error
            raise
        self._on_call("token_done")
        self._refused = None
        self._keep_token(token)
        return token

    def _load_token(self, file: Path) -> None:
        """Take over the token of an earlier run, where it is ours and nobody else could read it."""
        log = get_logger()
        try:
            if file.stat().st_mode & 0o077:
                log.warning("the token file is not used: others can read it", file=str(file), advice="chmod 600")
            else:
                kept = json.loads(file.read_text("utf-8"))
                now, steady = time.time(), time.monotonic()
                if kept["for"] == self._identity:
                    self._minted_at = steady - max(0.0, now - kept["asked"])
                    if _is_token(kept["value"]) and now < kept["ends"]:
                        ends = steady + kept["ends"] - now
                        renews = steady + kept["renews"] - now
                        self._token = _Token(kept["value"], kept["refresh"], renews, ends, tuple(kept["scopes"] or ()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("the token file is not used: it cannot be read", file=str(file), error=type(error).__name__)
        self._keep_token(self._token, at_start=True)

    def _keep_token(self, token: _Token | None, *, at_start: bool = False) -> None:
        if self._token_file is None:
            return
        now, steady = time.time(), time.monotonic()
        kept = {
            "for": self._identity,
            "asked": now - min(steady - self._minted_at, now),
            "value": token and token.value,
            "refresh": token and token.refresh,
            "scopes": token and token.scopes,
            "renews": token and now + token.renew_at - steady,
            "ends": token and now + token.ends_at - steady,
        }
        new = self._token_file.with_name(f"{self._token_file.name}.{os.getpid()}.new")
        try:
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                json.dump(kept, out)
            new.replace(self._token_file)
        except OSError as error:
            if at_start:
                raise ConfigurationError(f"--token-file {self._token_file}: cannot write: {error.strerror}") from error
            get_logger().warning("the token is not kept", file=str(self._token_file), error=error.strerror)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _send(
        self, method: str, path: str, track_id: str | None, **request: Any
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body; a body too large, too slow or broken is an ExchangeError."""
        requested_at, chunks, size = datetime.now(UTC), list[bytes](), 0
        request["extensions"] = {"trace": self._note_socket}
        try:
            with self._deadline(track_id), self._client.stream(method, self._address + path, **request) as response:
                try:
                    if "," in response.headers.get("content-encoding", ""):
                        # Each layer may be a thousand times the one around it, before any of it can be counted.
                        raise ExchangeNonsense("nonsense", "the body is packed more than once", track_id=track_id)
                    for chunk in response.iter_bytes():
                        chunks.append(chunk)
                        size += len(chunk)
                        if size > self._most_bytes:
                            said = f"the body is larger than {self._most_bytes >> 20} MiB"
                            raise ExchangeNonsense("nonsense", said, track_id=track_id)
                finally:
                    body = b"".join(chunks)
                    if track_id is not None:
                        kept = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
                        status, query = response.status_code, request["params"]
                        at = requested_at, datetime.now(UTC)
                        self._on_response(Received(track_id, path, query, status, kept, body[: self._most_bytes], *at))
                return response.status_code, response.headers, body
        except httpx.TimeoutException as error:
            said = f"the exchange did not answer in time ({type(error).__name__})"
            raise ExchangeUnavailable("timeout", said, track_id=track_id) from error
        except httpx.DecodingError as error:
            raise ExchangeNonsense("nonsense", f"the body cannot be unpacked: {error}", track_id=track_id) from error
        except httpx.HTTPError as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ExchangeUnavailable("network", said, track_id=track_id) from error

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    @contextmanager
    def _deadline(self, track_id: str | None) -> Iterator[None]:
        """Hang up when an attempt takes too long: what drips is in time for every single read."""
        overdue = threading.Event()

        def hang_up() -> None:
            overdue.set()
            with suppress(OSError, AttributeError):
                # Not the TLS socket's own, which would take its state away from under the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # type: ignore[arg-type]

        timer = threading.Timer(self._deadline_seconds, hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except httpx.HTTPError:
            if not overdue.is_set():
                raise
        finally:
            timer.cancel()
        # A body without a length ends where the connection does.
        if overdue.is_set():
            said = f"the answer took longer than {self._deadline_seconds:g} s"
            raise ExchangeUnavailable("timeout", said, track_id=track_id)


def _is_token(value: Any) -> bool:
    """Tell what can stand in a header: the client would show anything else in its own error message."""
    return isinstance(value, str) and re.fullmatch("[!-~]+", value) is not None


def _granted(body: bytes, asked: float) -> _Token | None:
    """Return the token in an answer; `asked` is when it was asked for."""
    try:
        result = msgspec.json.decode(body)["result"]
        value, life, refresh = result["value"], float(result["lifeTime"]) / 1000, result.get("refreshToken")
        scopes = tuple(map(str, result.get("scopes") or ()))
    except (*UNREADABLE, KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    if not (_is_token(value) and math.isfinite(life)):
        return None
    # Counted from our own clock; a tenth of its life before the end it is renewed.
    return _Token(value, refresh if isinstance(refresh, str) else None, asked + life * 0.9, asked + life, scopes)


def _no_token(status: int, body: bytes, retry_after: str | None) -> ExchangeError:
    error = refusal(status, body, None, retry_after)
    if status in {400, 401, 403} and error.kind in {"token", "internal", "provider", "nonsense"}:
        message = error_in(body)[1] or status
        return ExchangeRefused("token", f"the exchange gives no token: {message}", code=error.code)
    return error


def _dated(headers: Mapping[str, str]) -> datetime | None:
    try:
        dated = parsedate_to_datetime(headers["date"])
        # Beyond reason it would only break the arithmetic.
        return (dated if dated.tzinfo else dated.replace(tzinfo=UTC)).astimezone(UTC) if dated.year < 2200 else None
    except (KeyError, ValueError, OverflowError):
        return None
