"""What an answer means that is not DONE. Pure: bytes in, an error out. docs/exchange.md lists the cases."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from bourse_schemas.errors import ExchangeError, ExchangeNonsense, ExchangeRefused, ExchangeUnavailable

# What a decoder raises for bytes that are not JSON, not UTF-8, or nested beyond reason.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Not part of JSON, but some gateways put one there.
_BOM = b"\xef\xbb\xbf"
# An error's body is short, a market's is not; of a market's, both ends are enough to find its state.
SHORT, EDGE = 10_000, 500
MOST_MESSAGE = 1000
DAY_SECONDS = 86_400.0
_DONE = re.compile(rb'"(?:state|status)"\s*:\s*"DONE"')
_FN_CODE = re.compile(rb'"FN-[A-Z]{4}-(\d{3})\d{8}"')
_ADDRESS_WORDS = re.compile(r"\bip\b|\baddress\b|white ?-?list|آی[ \u200c]?پی|نشانی|آدرس")


class Envelope(Struct):
    """What every response has around its rows. The legacy service has `state`, every other one `status`."""

    result: Raw | UnsetType = UNSET
    state: str | None = None
    status: str | None = None

    @classmethod
    def of(cls, body: bytes) -> Envelope:
        """Return the envelope of a body; raise one of UNREADABLE if it has none."""
        return _envelope.decode(body.removeprefix(_BOM))

    @property
    def done(self) -> bool:
        """Return whether the call succeeded."""
        return (self.state or self.status) == "DONE"


_envelope = msgspec.json.Decoder(Envelope)
_anything = msgspec.json.Decoder()


def is_done(body: bytes) -> bool:
    """Return whether a body with HTTP status 200 is a success: refusals come with 200 too."""
    if len(body) > SHORT and (_DONE.search(body, 0, EDGE) or _DONE.search(body, len(body) - EDGE)):
        return True
    try:
        return Envelope.of(body).done
    except UNREADABLE:
        return False


def http_date(header: str) -> datetime | None:
    """Return the time in a header, None if it is not one."""
    try:
        at = parsedate_to_datetime(header)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def clock_skew(requested_at: datetime, received_at: datetime, dated: datetime) -> float:
    """Return by how many seconds at least the exchange's clock is ahead of ours, below 0 if it is behind.

    Its Date header is a time between request and receipt, cut to the second: 0 if the clocks may agree.
    """
    least, most = (dated - received_at).total_seconds(), (dated - requested_at).total_seconds() + 1
    return max(least, 0.0) + min(most, 0.0)


def retry_seconds(header: str, now: datetime) -> float | None:
    """Return for how long a Retry-After, in seconds or as a date, asks us to wait: a day at most."""
    if header.isdecimal():
        return min(float(header[:9]), DAY_SECONDS)
    at = http_date(header)
    return None if at is None else min(max((at - now).total_seconds(), 0.0), DAY_SECONDS)


def refusal(status: int, body: bytes, track_id: str | None, retry_after: float | None = None) -> ExchangeError:
    """Return the error that an answer which is not DONE amounts to."""
    answer = _json(body)
    code, message = _code_and_message(answer)
    if status == 200 and (found := _FN_CODE.search(body, 0, SHORT)):
        status = int(found[1])
    text, lower = message or f"HTTP {status} without a reason", message.lower()
    details: dict[str, Any] = {"code": code, "track_id": track_id, "retry_after": retry_after}
    if 400 <= status < 500 and ("quota" in lower or "سقف" in lower):
        return ExchangeRefused("quota", text, **details)
    if status == 403 and (answer is UNSET or _ADDRESS_WORDS.search(lower)):
        # Without JSON it is not the API's own answer but that of a gateway before it.
        return ExchangeRefused("address", f"this address is refused: {text}", **details)
    if status == 401 or code == "UNAUTHORIZED" or "invalid token" in lower:
        return ExchangeRefused("token", text, **details)
    if status == 403:
        return ExchangeRefused("scope", text, **details)
    if status == 429:
        return ExchangeUnavailable("rate", text, **details)
    if status == 408 or code == "REQUEST_TIME_OUT":
        return ExchangeUnavailable("timeout", text, **details)
    if status in {200, 400} and code == "VALIDATION_ERROR":
        return ExchangeRefused("internal", text, **details)
    if status == 200 and code is None and not message:
        message = "the body is not JSON" if answer is UNSET else "the response is neither DONE nor an error"
        return ExchangeNonsense("nonsense", message, track_id=track_id)
    return ExchangeUnavailable("provider", text, **details)


def _json(body: bytes) -> Any:
    """Return what a body holds; UNSET if it is not JSON."""
    try:
        return _anything.decode(body.removeprefix(_BOM))
    except UNREADABLE:
        return UNSET


def _code_and_message(answer: Any) -> tuple[str | None, str]:
    """Return an answer's error code and message: at its top, in `error`, or in `result`."""
    for holder in (answer, answer.get("result") if isinstance(answer, dict) else None):
        if isinstance(holder, dict):
            error = holder.get("error") or holder
            if not isinstance(error, dict):
                return None, str(error)[:MOST_MESSAGE]
            code = error.get("code") or holder.get("responseCode")
            if code or error.get("message"):
                return (str(code)[:MOST_MESSAGE] if code else None), str(error.get("message") or "")[:MOST_MESSAGE]
    return None, ""
