"""Finnotech's `trades/realtime` and its successor: calls for data, and the tokens they need.

docs/exchange.md describes the API. A call asks `Patience` first, then takes a token, then goes out with a deadline.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx2
import msgspec

from bourse_cli.logs import get_logger
from bourse_producer.clock import Clock
from bourse_producer.conceal import Concealer
from bourse_producer.deadline import MOST_BYTES, Transfer, Transport
from bourse_producer.patience import Call, Hold, Patience
from bourse_producer.refusals import UNREADABLE, http_date, is_done, refusal, retry_seconds
from bourse_producer.responses import TRADES_REALTIME, Profile
from bourse_schemas.errors import ExchangeError, ExchangeRefused, ExchangeUnavailable
from bourse_schemas.events import TEHRAN

DEADLINE_SECONDS = 55.0
# A token is renewed in the last tenth of its life, while it is good: nothing waits for a slow answer.
RENEW_DEADLINE_SECONDS, RENEW_AGAIN_SECONDS = 5.0, 3600.0
# A longer life is a mistake, and beyond reason no date.
MOST_LIFE_SECONDS = 366 * 86_400.0
# A hold that ends in a moment is waited for, so that a beat a little too early is not lost.
MOMENT_SECONDS = 5.0
KEPT_HEADERS = ("date", "content-type", "content-length", "content-encoding", "retry-after")


@dataclass(frozen=True, slots=True)
class Credentials:
    """An account at the exchange; the secret and the national id are never shown."""

    client_id: str
    secret: str = field(repr=False)
    nid: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a call for data, as far as it came: its times by our clock, and `dated`, its Date header.

    Only that of a call which is DONE, and charged, is returned. Nothing in it is secret.
    """

    track_id: str
    body: bytes = field(repr=False)
    requested_at: datetime
    received_at: datetime
    dated: datetime | None
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Token:
    """A token: its times are monotonic, its scopes those that the exchange named."""

    value: str = field(repr=False)
    refresh: str | None = field(repr=False)
    renew_at: float
    ends_at: float
    scopes: tuple[str, ...] = ()


@dataclass(eq=False, repr=False)
class Finnotech:
    """The exchange's API, one call at a time. Every method raises ExchangeError when a call gave nothing.

    `on_call` gets how each HTTP call ended: done, or an error's kind, with token_ before it for a token's.
    `on_response` gets every answer to a call for data before it is judged. `retry_seconds` is the first pause before a
    failed call is repeated, 0 for never.
    """

    client: httpx2.Client
    address: str
    credentials: Credentials
    profile: Profile = TRADES_REALTIME
    _: KW_ONLY
    clock: Clock = field(default_factory=Clock)
    patience: Patience = field(default_factory=Patience)
    on_call: Callable[[str], None] = lambda _: None
    on_response: Callable[[Reply], None] = lambda _: None
    retry_seconds: float = 0.0
    deadline_seconds: float = DEADLINE_SECONDS
    most_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        self._transport = Transport(self.client, lambda: self.clock.wait(0), self.most_bytes)
        account = self.credentials
        self._basic = httpx2.BasicAuth(account.client_id, account.secret)
        self._secrets = Concealer(account.secret, account.nid, f"{account.client_id}:{account.secret}")
        self._token: _Token | None = None

    def begin(self, charged_today: int, final: bool) -> None:
        """Start a poll: how many calls are spent today, and whether it is the day's final poll."""
        self.patience.begin(charged_today, final)

    def fetch(
        self,
        call: Call,
        *,
        until: float = -math.inf,
        company_id: int | None = None,
        period: tuple[str | None, str | None] = (None, None),
        rights: bool = False,
    ) -> Reply:
        """Return all shares, all rights, or a company's minute rows of a period (HHMM, HHMM), shares' or `rights`'.

        Repeats a failed call while its next attempt begins before `until`, in monotonic seconds. The error's `held` is
        true if no call was made.
        """
        query = self._query(call, company_id, period, rights=rights or call is Call.RIGHTS)
        pause = self.retry_seconds
        while True:
            try:
                return self._call_for_data(call, query, until)
            except ExchangeUnavailable as error:
                now = self.clock.monotonic()
                hold = self._forbidden(call, now)
                wait = max(pause * random.uniform(0.5, 1.0), hold.until - now if hold else 0.0)  # noqa: S311  # jitter
                if not pause or now + wait >= until:
                    raise
                details = {"error_kind": error.kind, "error": str(error), "wait_seconds": round(wait, 1)}
                get_logger().warning("calling again", call=call.value, **details)
                if self.clock.wait(wait):
                    raise
                pause *= 2

    def renew(self) -> None:
        """Renew a token that is about to end. Call it after a poll: no poll waits for it while the token is good."""
        token, now = self._token, self.clock.monotonic()
        if token is None or not token.renew_at <= now < token.ends_at or self.patience.may_call(Call.TOKEN, now):
            return
        try:
            self._token = self._request_token(token.refresh, min(RENEW_DEADLINE_SECONDS, self.deadline_seconds))
        except ExchangeError as error:
            # A refresh token may be used up. The credentials are not.
            refresh = token.refresh if isinstance(error, ExchangeUnavailable) else None
            self._token = replace(token, refresh=refresh, renew_at=now + RENEW_AGAIN_SECONDS)
            details = {"error_kind": error.kind, "error": str(error), "good_for_seconds": round(token.ends_at - now)}
            get_logger().warning("the token is not renewed", **details)

    def authorise(self) -> tuple[Sequence[str], timedelta]:
        """Get a token unless there is one; return its scopes, if the exchange named them, and how long it is good."""
        if not self._has_token():
            self._require_allowed(Call.TOKEN, -math.inf)
        token = self._good_token()
        return token.scopes, timedelta(seconds=token.ends_at - self.clock.monotonic())

    def token_ends_at(self) -> datetime | None:
        """Return when the token in use ends; None without one."""
        if self._token is None:
            return None
        return self.clock.now() + timedelta(seconds=self._token.ends_at - self.clock.monotonic())

    # --- calls for data -----------------------------------------------------------------------------------------------

    def _query(
        self, call: Call, company_id: int | None, period: tuple[str | None, str | None], *, rights: bool
    ) -> dict[str, str]:
        if self.profile.one_call:
            return {} if company_id is None else {"companyId": str(company_id)}
        flags = {"isTimePeriod": call is Call.MINUTES, "precedencyRight": rights}
        given = {"coId": company_id, "fromTime": period[0], "toTime": period[1]}
        query = {name: "true" if flag else "false" for name, flag in flags.items()}
        return query | {name: str(value) for name, value in given.items() if value is not None}

    def _call_for_data(self, call: Call, query: Mapping[str, str], until: float) -> Reply:
        """Make a call. If its token is refused, get another one and repeat the call once, if a new token is allowed."""
        self._require_allowed(call, until)
        try:
            return self._get(call, self._good_token(), query)
        except ExchangeRefused as refused:
            if refused.held or refused.kind not in {"token", "scope"}:
                raise
            if self.patience.may_call(Call.TOKEN, self.clock.monotonic()):
                raise self._explained(refused) from refused
        self._token = self._request_token(None, self.deadline_seconds)
        try:
            self._require_allowed(call, until)
            return self._get(call, self._token, query)
        except ExchangeRefused as refused:
            raise self._explained(refused) from refused

    def _explained(self, refused: ExchangeRefused) -> ExchangeError:
        """Return the error for a refusal that a new token does not change."""
        if refused.kind != "scope":
            return refused
        needs = f"the client needs the scope {self.profile.scope} and a whitelisted address"
        message = f"a new token is refused: {needs} ({refused})"
        return ExchangeRefused("scope", message, code=refused.code, track_id=refused.track_id)

    def _require_allowed(self, call: Call, until: float) -> None:
        """Raise what forbids a call, `held`; a hold of a moment is waited for, if it ends before `until`."""
        while hold := self._forbidden(call, now := self.clock.monotonic()):
            if hold.until >= min(until, now + MOMENT_SECONDS) or self.clock.wait(hold.until - now):
                raise self._held(hold, now)

    def _forbidden(self, call: Call, now: float) -> Hold | None:
        """Return what forbids a call: its own hold, or that of the token it needs and has not."""
        hold = self.patience.may_call(call, now)
        return hold if hold or self._has_token() else self.patience.may_call(Call.TOKEN, now)

    def _held(self, hold: Hold, now: float) -> ExchangeError:
        error, message = hold.error, str(hold.error)
        if hold.until < math.inf:
            again = (self.clock.now() + timedelta(seconds=hold.until - now)).astimezone(TEHRAN)
            message = f"not called before {again:%H:%M:%S}: {error}"
        return ExchangeRefused(error.kind, message, code=error.code, held=True)

    def _get(self, call: Call, token: _Token, query: Mapping[str, str]) -> Reply:
        track_id = uuid4().hex
        client_id = quote(self.credentials.client_id, safe="")
        path = f"/bourse/v2/clients/{client_id}/{self.profile.path}"
        query = {"trackId": track_id, **query}
        authorization = {"Authorization": f"Bearer {token.value}"}
        transfer, requested_at = Transfer(), self.clock.now()
        try:
            try:
                self._send(transfer, "GET", path, params=query, headers=authorization)
            finally:
                times, body = (requested_at, self.clock.now()), bytes(transfer.body)
                done = transfer.status == 200 and is_done(body)
                reply = self._reply(transfer, body if done else self._secrets.data(body), times, path, query)
                if transfer.status is not None:
                    self.on_response(reply)
            if not done:
                raise self._refusal(transfer, reply.body)
        except ExchangeError as error:
            error.track_id = track_id
            self._note(call, error)
            raise
        self._note(call, None)
        return reply

    def _reply(
        self, transfer: Transfer, body: bytes, times: tuple[datetime, datetime], path: str, query: Mapping[str, str]
    ) -> Reply:
        headers = {name: transfer.headers[name] for name in KEPT_HEADERS if name in transfer.headers}
        dated = http_date(headers.get("date", ""))
        if dated is not None and dated.year >= 2200:  # it would only break the arithmetic
            dated = None
        shown = {name: self._secrets.text(text) for name, text in headers.items()}
        return Reply(query["trackId"], body, *times, dated, path, query, transfer.status or 0, shown)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _has_token(self) -> bool:
        return self._token is not None and self.clock.monotonic() < self._token.ends_at

    def _good_token(self) -> _Token:
        if self._token is None or not self._has_token():
            self._token = self._request_token(None, self.deadline_seconds)
        return self._token

    def _request_token(self, refresh: str | None, seconds: float) -> _Token:
        """Get a token for a refresh token, or else for the credentials."""
        grant = {"grant_type": "client_credentials", "nid": self.credentials.nid, "scopes": self.profile.scope}
        if refresh is not None:
            grant = {"grant_type": "refresh_token", "token_type": "CLIENT-CREDENTIAL", "refresh_token": refresh}
        transfer, now = Transfer(), self.clock.monotonic()
        try:
            self._send(transfer, "POST", "/dev/v2/oauth2/token", seconds, json=grant, auth=self._basic)
            result = _result_in(bytes(transfer.body))
            self._secrets.add(result.get("value"), result.get("refreshToken"))
            token = _token_of(result, now)
            if token is None:
                raise self._token_refusal(transfer)
        except ExchangeError as error:
            self._note(Call.TOKEN, error)
            raise
        self._note(Call.TOKEN, None)
        return replace(token, scopes=tuple(map(self._secrets.text, token.scopes)))

    def _token_refusal(self, transfer: Transfer) -> ExchangeError:
        error = self._refusal(transfer, self._secrets.data(bytes(transfer.body)))
        if transfer.status in {400, 401, 403} and error.kind in {"token", "scope", "internal", "provider", "nonsense"}:
            message = f"the exchange gives no token: {error}"
            return ExchangeRefused("token", message, code=error.code, retry_after=error.retry_after)
        return error

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _send(self, transfer: Transfer, method: str, path: str, seconds: float | None = None, **request: Any) -> None:
        url = self.address.rstrip("/") + path
        self._transport.call(transfer, seconds or self.deadline_seconds, method, url, **request)

    def _refusal(self, transfer: Transfer, body: bytes) -> ExchangeError:
        """Return the error of an answer that is not DONE, without secrets."""
        retry_after = retry_seconds(transfer.headers.get("retry-after", ""), self.clock.now())
        return refusal(transfer.status or 0, body, None, retry_after)

    def _note(self, call: Call, error: ExchangeError | None) -> None:
        """Report how a call ended; what is reported has no secret in it."""
        if error is not None:
            error.args = (self._secrets.text(str(error)),)
            error.code = error.code and self._secrets.text(error.code)
        outcome = "done" if error is None else error.kind
        self.on_call(f"token_{outcome}" if call is Call.TOKEN else outcome)
        self.patience.after(call, error, self.clock.monotonic())


def _result_in(body: bytes) -> Mapping[str, Any]:
    """Return the result in a token's answer; empty without one."""
    try:
        result = msgspec.json.decode(body)["result"]
    except (*UNREADABLE, KeyError, TypeError):
        return {}
    return result if isinstance(result, dict) else {}


def _token_of(result: Mapping[str, Any], requested_at: float) -> _Token | None:
    """Return the token that a result describes. Its life counts from the request, by our own clock."""
    value, refresh = result.get("value"), result.get("refreshToken")
    try:
        life = float(result["lifeTime"]) / 1000
        scopes = tuple(map(str, result.get("scopes") or ()))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    # The client would show a value that no header can hold in its own error message.
    if not (isinstance(value, str) and re.fullmatch("[!-~]+", value) and math.isfinite(life)):
        return None
    refresh, life = refresh if isinstance(refresh, str) else None, min(max(life, 0.0), MOST_LIFE_SECONDS)
    return _Token(value, refresh, requested_at + life * 0.9, requested_at + life, scopes)
