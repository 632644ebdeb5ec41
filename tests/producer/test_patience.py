"""Who may be called when: by hand, and over simulated days with any mix of answers."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bourse_cli.logs import configure_logging
from bourse_producer.deadline import Transfer
from bourse_producer.finnotech import Credentials, Finnotech
from bourse_producer.patience import Call, Patience
from bourse_schemas.errors import ExchangeError, ExchangeRefused, ExchangeUnavailable
from tests.producer.scripted import DONE, NID, SECRET, ManualClock

HOUR, BEAT, BEATS = 3600.0, 60.0, 495
DATA = (Call.SHARES, Call.RIGHTS)


def error(kind: str, retry_after: float | None = None) -> ExchangeError:
    """Return an error of the class that goes with its kind."""
    refused = kind in {"token", "scope", "address", "quota", "internal"}
    return (ExchangeRefused if refused else ExchangeUnavailable)(kind, kind, retry_after=retry_after)


def held_for(patience: Patience, call: Call, now: float = 0.0) -> float:
    """Return for how long a call is not allowed."""
    hold = patience.may_call(call, now)
    return hold.until - now if hold else 0.0


@pytest.mark.parametrize(
    ("kind", "retry_after", "own", "other"),
    [
        ("provider", None, 0, 0),
        ("provider", 120, 120, 0),
        ("provider", 86_400, 900, 0),
        ("timeout", 30, 30, 0),
        ("internal", None, 0, 0),
        ("rate", None, 60, 60),
        ("rate", 7200, 7200, 7200),
        ("quota", None, 3600, 3600),
        ("quota", 60, 3600, 3600),
        ("address", None, 0, 0),
        ("address", 86_400, 900, 900),
    ],
)
def test_one_answer(kind: str, retry_after: float | None, own: float, other: float) -> None:
    """A hold is of the call, or of the account; a maintenance page cannot silence us for a day."""
    patience = Patience()
    patience.after(Call.SHARES, error(kind, retry_after), 0.0)
    assert [held_for(patience, call) for call in DATA] == [own, other]
    assert held_for(patience, Call.TOKEN) == 0


def test_a_refused_account_is_asked_less_and_less_often() -> None:
    """At the next beat, then every five minutes; a success ends it."""
    patience, now, pauses = Patience(), 0.0, []
    for _ in range(6):
        patience.after(Call.SHARES, error("address"), now)
        pauses.append(held_for(patience, Call.RIGHTS, now))
        now += pauses[-1]
    assert pauses == [0, 90, 210, 270, 270, 270]
    patience.after(Call.SHARES, None, now)
    patience.after(Call.RIGHTS, error("address"), now)
    assert held_for(patience, Call.SHARES, now) == 0


def test_tokens() -> None:
    """One a minute; one an hour while a new one is refused; at once again after a success."""
    patience = Patience()
    patience.after(Call.TOKEN, None, 0.0)
    assert held_for(patience, Call.TOKEN) == 60
    patience.after(Call.SHARES, None, 1.0)
    patience.after(Call.SHARES, error("token"), 100.0)
    assert held_for(patience, Call.TOKEN, 100.0) == 0
    patience.after(Call.TOKEN, None, 100.0)
    patience.after(Call.SHARES, error("scope"), 101.0)
    assert held_for(patience, Call.TOKEN, 100.0) == HOUR
    patience.after(Call.SHARES, None, 102.0)
    assert held_for(patience, Call.TOKEN, 160.0) == 0


def test_a_token_that_is_not_given() -> None:
    """Is asked for again a minute later; wrong credentials less and less often."""
    for kind, pauses in (("timeout", [60, 60, 60]), ("token", [60, 90, 210]), ("quota", [3600] * 3)):
        patience, now = Patience(), 0.0
        for pause in pauses:
            patience.after(Call.TOKEN, error(kind), now)
            assert held_for(patience, Call.TOKEN, now) == pause
            assert held_for(patience, Call.SHARES, now) == 0
            now += pause


def test_the_budget() -> None:
    """Charged calls count, failed ones do not; the final poll may use what is kept for it."""
    patience = Patience(max_calls_per_day=3, reserved_calls=1)
    patience.begin(1, final=False)
    patience.after(Call.SHARES, error("provider"), 0.0)
    assert held_for(patience, Call.SHARES) == 0
    patience.after(Call.SHARES, None, 0.0)
    assert [held_for(patience, call) for call in (*DATA, Call.MINUTES, Call.TOKEN)] == [math.inf] * 3 + [0]
    patience.begin(2, final=False)
    assert held_for(patience, Call.SHARES) == math.inf
    patience.begin(2, final=True)
    assert held_for(patience, Call.SHARES) == 0


def test_in_practice_nothing_is_held_for_long() -> None:
    """Where time passes faster, patience is shorter; a budget is a budget."""
    patience = Patience(longest_seconds=2.0)
    patience.after(Call.TOKEN, None, 0.0)
    patience.after(Call.SHARES, error("quota"), 0.0)
    assert [held_for(patience, call) for call in Call] == [2.0] * 4


# --- simulated days ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the exchange answers, and after how long."""

    status: int
    body: bytes = b""
    retry_after: int | None = None
    seconds: float = 0.2


def failed(message: str) -> bytes:
    """Return an error body."""
    return json.dumps({"error": {"code": "X", "message": message}}).encode()


ANSWERS = {
    "done": Answer(200, DONE),
    "slow": Answer(200, DONE, seconds=20),
    "silence": Answer(0, seconds=55),
    "nonsense": Answer(200, b"<html>"),
    "error": Answer(500, b"<html>"),
    "busy": Answer(503, b"", 30),
    "maintenance": Answer(503, b"", 86_400),
    "rate": Answer(429),
    "rate, a while": Answer(429, b"", 150),
    "rate, two hours": Answer(429, b"", 7200),
    "quota": Answer(403, failed("quota exceeded")),
    "quota of the provider": Answer(503, failed("quota service is unavailable")),
    "token": Answer(401, failed("invalid token")),
    "scope": Answer(403, failed("no scope")),
    "address": Answer(403, b"<html>"),
    "ours": Answer(400, b'{"error":{"code":"VALIDATION_ERROR","message":"no"}}'),
}
TOKENS = {
    "token": Answer(200, seconds=0.1),
    "refused": Answer(401, failed("wrong secret")),
    "error": Answer(503),
    "maintenance": Answer(503, b"", 86_400),
    "silence": Answer(0, seconds=55),
}
ACCOUNT = {"rate", "rate, a while", "rate, two hours", "quota", "token", "scope", "address"}
REFUSED = {"token", "scope", "address"}
UNAVAILABLE = {"silence", "error", "busy", "maintenance", "quota of the provider"}


class Made(NamedTuple):
    """A call, when it began and ended, and its answer."""

    call: Call
    began: float
    ended: float
    answer: str


class Exchange:
    """Stands in for the transport: answers in turn, while the clock moves on."""

    def __init__(self, clock: ManualClock, answers: Sequence[str], tokens: Sequence[str], life: float) -> None:
        self._clock, self._answers, self._tokens, self._life = clock, cycle(answers), cycle(tokens), life
        self.made: list[Made] = []

    def call(self, transfer: Transfer, seconds: float, method: str, url: str, **request: Any) -> None:
        """Answer a call."""
        began, call = self._clock.monotonic(), Call.TOKEN
        if method == "GET":
            call = Call.RIGHTS if request["params"]["precedencyRight"] == "true" else Call.SHARES
        kind = next(self._tokens if call is Call.TOKEN else self._answers)
        answer = (TOKENS if call is Call.TOKEN else ANSWERS)[kind]
        self._clock.wait(min(answer.seconds, seconds))
        self.made.append(Made(call, began, self._clock.monotonic(), kind))
        if not answer.status:
            raise ExchangeUnavailable("timeout", "the answer took too long")
        transfer.status, transfer.headers = answer.status, {}
        if answer.retry_after is not None:
            transfer.headers = {"retry-after": str(answer.retry_after)}
        body = answer.body
        if call is Call.TOKEN and kind == "token":
            result = {"value": f"token-{len(self.made)}", "lifeTime": self._life * 1000, "refreshToken": "refresh"}
            body = json.dumps({"result": result, "status": "DONE"}).encode()
        transfer.body += body


class Day(NamedTuple):
    """A day of polls: the calls made, and per beat when it began and the error of each call."""

    made: list[Made]
    beats: list[tuple[float, dict[Call, ExchangeError | None]]]


def play(answers: Sequence[str], tokens: Sequence[str], life: float) -> Day:
    """Poll shares and rights for a day as the service does."""
    clock = ManualClock()
    exchange = Exchange(clock, answers, tokens, life)
    client = Finnotech(None, "http://h", Credentials("me", SECRET, NID), clock=clock, retry_seconds=1.0)  # type: ignore[arg-type]
    client._transport = exchange  # type: ignore[assignment]
    beats = []
    while clock.elapsed < BEATS * BEAT:
        began = clock.monotonic()
        until = began + BEAT - clock.elapsed % BEAT
        errors: dict[Call, ExchangeError | None] = {}
        client.begin(0, final=False)
        for call in DATA:
            errors[call] = None
            try:
                client.fetch(call, until=until)
            except ExchangeError as found:
                errors[call] = found
        client.renew()
        beats.append((began, errors))
        clock.elapsed = (clock.elapsed // BEAT + 1) * BEAT
    return Day(exchange.made, beats)


def asked_to_wait(made: Made) -> float:
    """Return for how long an answer forbids its call, as documented."""
    answer = (TOKENS if made.call is Call.TOKEN else ANSWERS)[made.answer]
    if made.answer == "quota":
        return HOUR
    if answer.status == 429:
        return float(answer.retry_after or BEAT)
    return min(float(answer.retry_after or 0), 900.0)


mixes = st.lists(st.sampled_from(sorted(ANSWERS)), min_size=1, max_size=12)
token_mixes = st.lists(st.sampled_from(sorted(TOKENS)), max_size=3).map(lambda some: ["token", *some])


@settings(deadline=None, max_examples=40)
@given(mixes, token_mixes, st.sampled_from([864_000.0, 1800.0]))
def test_a_day_of_any_answers(answers: list[str], tokens: list[str], life: float) -> None:
    """Never more calls than beats and repetitions allow, never one that was forbidden, and none held without reason."""
    configure_logging("critical")
    made, beats = play(answers, tokens, life)
    data = [each for each in made if each.call is not Call.TOKEN]
    grants = [each for each in made if each.answer == "token" and each.call is Call.TOKEN]

    # A call is repeated if it, or the call for its token, failed; and with a new token.
    repetitions = sum(each.answer in UNAVAILABLE | {"rate"} for each in made) + len(grants)
    assert len(data) <= len(beats) * len(DATA) + repetitions
    in_a_beat = Counter((each.call, each.began // BEAT) for each in data)
    assert max(in_a_beat.values(), default=0) <= 9

    for first, second in pairwise(grants):
        between = {each.answer for each in data if first.ended <= each.began < second.began}
        assert second.began >= first.ended + BEAT
        if between & {"token", "scope"} and not between & {"done", "slow"}:
            assert second.began >= first.ended + HOUR

    for number, each in enumerate(made):
        until = each.ended + asked_to_wait(each)
        for later in made[number + 1 :]:
            if later.began >= until:
                break
            same = later.call is each.call or (each.answer in ACCOUNT and later.call is not Call.TOKEN)
            # A new token is a new chance for what was refused because of the old one.
            assert not same or (each.call is not Call.TOKEN and each.answer in {"token", "scope"})

    starts = [each.began for each in made]
    for began, errors in beats:
        # No answer forbids anything for longer than two hours.
        recent = made[bisect(starts, began - 2.1 * HOUR) : bisect(starts, began + BEAT)]
        for call, found in errors.items():
            if found is not None and found.held:
                assert any(forbids(each, call, began) for each in reversed(recent)), (began, call)


def forbids(made: Made, call: Call, beat: float) -> bool:
    """Return whether an answer is a reason not to make a call at a beat that began at this time."""
    if made.call is Call.TOKEN:
        return made.answer != "token" and beat < made.ended + max(asked_to_wait(made), 300)
    if made.answer in REFUSED:
        # Refused again and again: five minutes. Without a token, as the last one ended: an hour.
        return beat < made.ended + HOUR
    return (made.call is call or made.answer in ACCOUNT) and beat < made.ended + asked_to_wait(made)


def test_good_days_cost_a_token_and_a_call_a_beat() -> None:
    """What is most common is exact."""
    made, beats = play(["done"], ["token"], 864_000.0)
    assert [sum(each.call is call for each in made) for call in Call] == [BEATS, BEATS, 0, 1]
    assert not [errors for _, errors in beats if any(errors.values())]


@pytest.mark.parametrize(("answer", "calls", "tokens"), [("token", 115, 8), ("scope", 115, 8), ("address", 100, 1)])
def test_days_of_refusals(answer: str, calls: int, tokens: int) -> None:
    """A session that is refused from beginning to end: a token an hour at most, a call every five minutes."""
    made, _ = play([answer], ["token"], 864_000.0)
    assert sum(each.call is Call.TOKEN for each in made) == tokens
    assert sum(each.call is not Call.TOKEN for each in made) == pytest.approx(calls, abs=10)
