"""Which call to the exchange is allowed when. Pure: time comes in as an argument.

Every HTTP call asks `may_call` first and reports to `after` how it ended. A hold stops one call; if its reason
concerns the account it stops every call for data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from bourse_schemas.errors import ExchangeError, ExchangeRefused

# A new refusal is often one of a moment; an account that stays refused is rarely fixed within minutes.
REFUSED_SECONDS, MOST_REFUSED_SECONDS = 60.0, 300.0
RATE_SECONDS = 60.0
# A token is asked for this often at most, and this rarely while calls with a new one are refused.
TOKEN_SECONDS, REFUSED_TOKEN_SECONDS = 60.0, 3600.0
# A maintenance page asks for a day; only a limit of calls is obeyed for as long.
MOST_RETRY_AFTER_SECONDS = 900.0
OF_THE_ACCOUNT = {"quota", "rate", "token", "scope", "address"}
REFUSED = {"token", "scope", "address"}


class Call(StrEnum):
    """What is asked of the exchange."""

    SHARES = "shares"
    RIGHTS = "rights"
    MINUTES = "minutes"
    TOKEN = "token"  # noqa: S105  # the name of a call


@dataclass(frozen=True, slots=True)
class Hold:
    """A call is not made before `until`, in monotonic seconds, because of `error`."""

    until: float
    error: ExchangeError


@dataclass(kw_only=True, eq=False, repr=False)
class Patience:
    """Decides which call may be made now.

    `quota_seconds` is the pause after the exchange reports that the paid calls are used up. `max_calls_per_day` limits
    charged calls; `reserved_calls` of them are kept for the day's final poll. No hold is longer than `longest_seconds`,
    except that of the budget.
    """

    quota_seconds: float = 3600.0
    max_calls_per_day: int | None = None
    reserved_calls: int = 1
    longest_seconds: float = math.inf

    def __post_init__(self) -> None:
        self._calls_left = math.inf
        # By the call that they stop; those of the account, by None, stop every call for data.
        self._holds: dict[Call | None, Hold] = {}
        self._refusals = self._token_refusals = 0
        self._minted_at = -math.inf
        self._token_accepted = True
        self._new_token_refused: ExchangeError | None = None

    def begin(self, charged_today: int, final: bool) -> None:
        """Start a poll: `charged_today` calls are spent; the day's `final` poll may use the calls kept for it."""
        if self.max_calls_per_day is not None:
            self._calls_left = self.max_calls_per_day - charged_today - (0 if final else self.reserved_calls)

    def may_call(self, call: Call, now: float) -> Hold | None:
        """Return what forbids this call now, the longest hold of several; None if it may be made."""
        holds = [self._holds.get(call), self._new_token_hold() if call is Call.TOKEN else self._holds.get(None)]
        if call is not Call.TOKEN and self._calls_left < 1:
            message = f"the budget of {self.max_calls_per_day} charged calls a day is spent"
            holds.append(Hold(math.inf, ExchangeRefused("budget", message)))
        return max((hold for hold in holds if hold and now < hold.until), key=lambda hold: hold.until, default=None)

    def after(self, call: Call, error: ExchangeError | None, now: float) -> None:
        """Take note of how a call ended: with an error, or None if it was DONE."""
        if call is Call.TOKEN:
            self._after_token(error, now)
        elif error is None:
            self._calls_left -= 1
            self._refusals, self._token_accepted, self._new_token_refused = 0, True, None
        else:
            self._refusals += error.kind in REFUSED
            if error.kind in {"token", "scope"} and not self._token_accepted:
                self._new_token_refused = error
            held = None if error.kind in OF_THE_ACCOUNT else call
            self._holds[held] = self._hold(error, self._refusals, now)

    def _after_token(self, error: ExchangeError | None, now: float) -> None:
        if error is None:
            self._minted_at, self._token_accepted, self._new_token_refused = now, False, None
            self._token_refusals = 0
            self._holds.pop(Call.TOKEN, None)
            if None in self._holds and self._holds[None].error.kind in {"token", "scope"}:
                # What was refused was the token before.
                del self._holds[None]
        else:
            self._token_refusals += error.kind in REFUSED
            hold = self._hold(error, self._token_refusals, now)
            soonest = now + min(TOKEN_SECONDS, self.longest_seconds)
            self._holds[Call.TOKEN] = Hold(max(hold.until, soonest), error)

    def _new_token_hold(self) -> Hold:
        refused = self._new_token_refused
        seconds = REFUSED_TOKEN_SECONDS if refused else TOKEN_SECONDS
        error = refused or ExchangeRefused("token", "a token was issued less than a minute ago")
        return Hold(self._minted_at + min(seconds, self.longest_seconds), error)

    def _hold(self, error: ExchangeError, refusals: int, now: float) -> Hold:
        """Return how long an error forbids to call again; a hold of no length if it does not."""
        seconds = error.retry_after or 0.0
        if error.kind != "rate":
            seconds = min(seconds, MOST_RETRY_AFTER_SECONDS)
        if error.kind == "quota":
            seconds = max(seconds, self.quota_seconds)
        elif error.kind == "rate":
            seconds = seconds or RATE_SECONDS
        elif error.kind in REFUSED and refusals > 1:
            # Half a minute less, so that it ends before a beat and not just after it.
            pause = min(REFUSED_SECONDS * 2 ** (refusals - 1), MOST_REFUSED_SECONDS) - REFUSED_SECONDS / 2
            seconds = max(seconds, pause)
        return Hold(now + min(seconds, self.longest_seconds), error)
