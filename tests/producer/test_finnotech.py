"""The exchange's client over real HTTP: tokens, refusals, holds, and a network that fails."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import httpx2
import pytest
from starlette.responses import Response
from structlog.testing import capture_logs

from bourse_producer.finnotech import Credentials, Finnotech, Reply
from bourse_producer.patience import Call, Patience
from bourse_producer.refusals import clock_skew
from bourse_producer.responses import PROFILES, Reading, parse
from bourse_sandbox.exchange import PracticeExchange, practice_exchange
from bourse_sandbox.serving import serve
from bourse_schemas.errors import ExchangeError, ExchangeNonsense, ExchangeRefused, ExchangeUnavailable
from tests.producer.scripted import DONE, NID, SECRET, TOKEN, ManualClock, Script

NEW_TOKEN = (200, json.dumps(TOKEN).encode())
NINE_DAYS = 9 * 86_400.0


@contextmanager
def against_practice(**account: Any) -> Iterator[tuple[Finnotech, PracticeExchange]]:
    """Run the practice exchange and a client of it."""
    practice = practice_exchange("real", "poll", client_secret=SECRET, nid=NID, **account)
    with practice.serve() as server, httpx2.Client() as client:
        yield Finnotech(client, server.url + "/", Credentials("practice", SECRET, NID)), practice


@contextmanager
def against(script: Script, *, timeout: float = 5.0, **options: Any) -> Iterator[Finnotech]:
    """Run a script and a client of it."""
    with serve(script.app, "127.0.0.1") as server, httpx2.Client(timeout=timeout) as http:
        yield Finnotech(http, server.url, Credentials("me", SECRET, NID), **options)


def refused(exchange: Finnotech, call: Call = Call.SHARES, **options: Any) -> ExchangeError:
    """Return the error of a call that must fail."""
    with pytest.raises(ExchangeError) as caught:
        exchange.fetch(call, **options)
    return caught.value


def failed(code: str | None = None, message: str | None = None) -> bytes:
    """Return an error body as documented."""
    return json.dumps({"status": "FAILED", "error": {"code": code, "message": message}}).encode()


# --- calls for data ---------------------------------------------------------------------------------------------------


def test_one_token_for_many_calls() -> None:
    """A token is requested at the first call and used until it is due; shares and rights are different calls."""
    with against_practice() as (exchange, practice):
        replies = [exchange.fetch(call) for call in (Call.SHARES, Call.RIGHTS, Call.SHARES)]
        assert (practice.tokens, practice.calls, practice.served) == (1, 3, 2)
    assert len({reply.track_id for reply in replies}) == 3
    reading = Reading(1, datetime.now(UTC), datetime(2019, 8, 22, tzinfo=UTC), date(2019, 8, 21), False, "")
    assert [parse(reply.body, reading).rows > 100 for reply in replies] == [True, False, True]
    assert [reply.dated and reply.dated.date() for reply in replies] == [date(2019, 8, 21)] * 3


def test_parameters_are_always_sent() -> None:
    """Both flags, a trackId of 32 hex digits, and no company."""
    script = Script((200, DONE))
    with against(script) as exchange:
        exchange.fetch(Call.RIGHTS)
    query = dict(script.calls[0].query_params)
    assert len(bytes.fromhex(query.pop("trackId"))) == 16
    assert query == {"isTimePeriod": "false", "precedencyRight": "true"}
    assert script.calls[0].headers["authorization"] == "Bearer tok3n-value"


def test_one_company_and_its_minutes_can_be_asked_for() -> None:
    """All six parameters of the API are understood by the exchange as they are sent."""
    with against_practice() as (client, _):
        market = json.loads(client.fetch(Call.SHARES).body)["result"]
        company = market[0]["CoID"]
        (row,) = json.loads(client.fetch(Call.SHARES, company_id=company).body)["result"]
        period = ("0900", "1230")
        minutes = json.loads(client.fetch(Call.MINUTES, company_id=company, period=period).body)["result"]
        right = client.fetch(Call.MINUTES, company_id=company, rights=True)
    assert row == market[0]
    assert minutes
    assert {minute["CoID"] for minute in minutes} == {company}
    assert json.loads(right.body)["result"] == []


def test_the_successor_is_asked_its_own_way() -> None:
    """Path, scope and parameters are the profile's."""
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(200, json=TOKEN if request.method == "POST" else {"result": [], "status": "DONE"})

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as client:
        exchange = Finnotech(client, "http://h", Credentials("me", SECRET, NID), PROFILES["realTimeTrades"])
        exchange.fetch(Call.SHARES)
        exchange.fetch(Call.SHARES, company_id=5)
    assert json.loads(asked[0].content)["scopes"] == "bourse:realTime-trades:get"
    assert [request.url.path for request in asked[1:]] == ["/bourse/v2/clients/me/realTimeTrades"] * 2
    assert [sorted(request.url.params) for request in asked[1:]] == [["trackId"], ["companyId", "trackId"]]


def test_a_failed_call_is_repeated_within_its_beat() -> None:
    """With growing pauses, a new trackId each, and not after the beat's end; never without `until`."""
    script, clock = Script((503, b""), (503, b""), (200, DONE)), ManualClock()
    with against(script, clock=clock, retry_seconds=1.0) as exchange:
        exchange.fetch(Call.SHARES, until=clock.monotonic() + 60)
        assert (len(set(script.track_ids())), 1.5 <= clock.elapsed <= 3) == (3, True)
        script.answers = [(503, b"")]
        refused(exchange, until=clock.monotonic() + 60)
        assert 8 <= len(script.calls) <= 10
        assert clock.elapsed < 63
        calls = len(script.calls)
        refused(exchange)
    assert len(script.calls) == calls + 1


def test_what_is_refused_is_not_repeated() -> None:
    """A VALIDATION_ERROR is permanent; the exchange's own words are shown."""
    script = Script((400, failed("VALIDATION_ERROR", "trackId is duplicated")))
    with against(script, clock=(clock := ManualClock()), retry_seconds=1.0) as exchange:
        error = refused(exchange, until=clock.monotonic() + 60)
    assert (type(error), error.kind, str(error)) == (ExchangeRefused, "internal", "trackId is duplicated")
    assert len(script.calls) == 1


def test_a_hold_of_one_call_does_not_stop_the_other() -> None:
    """Retry-After on the rights call: shares are called on, and the held call's error shows until when it is."""
    busy = partial(Response, status_code=503, headers={"Retry-After": "120"})
    script, clock = Script(busy, (200, DONE)), ManualClock()
    with against(script, clock=clock, retry_seconds=1.0) as exchange:
        assert not refused(exchange, Call.RIGHTS, until=clock.monotonic() + 60).held
        for _ in range(2):
            exchange.fetch(Call.SHARES)
            held = refused(exchange, Call.RIGHTS, until=clock.monotonic() + 60)
            assert (held.held, held.kind) == (True, "provider")
            assert str(held) == "not called before 10:02:00: HTTP 503 without a reason"
        clock.elapsed = 120
        exchange.fetch(Call.RIGHTS)
    assert len(script.calls) == 4


@pytest.mark.parametrize(("status", "body"), [(400, failed("Q", "سقف مجاز")), (429, b"")])
def test_a_hold_of_the_account_stops_both(status: int, body: bytes) -> None:
    """Quota and rate are the account's: the second call of the same poll is not made either."""
    script, clock = Script((status, body)), ManualClock()
    with against(script, clock=clock, retry_seconds=1.0) as exchange:
        first = refused(exchange, until=clock.monotonic() + 50)
        second = refused(exchange, Call.RIGHTS, until=clock.monotonic() + 50)
    assert (len(script.calls), first.held, second.held, second.kind) == (1, False, True, first.kind)


def test_a_beat_that_comes_a_little_early_waits() -> None:
    """A hold that ends within a moment does not cost a poll."""
    script, clock = Script((429, b""), (200, DONE)), ManualClock()
    with against(script, clock=clock) as exchange:
        refused(exchange)
        clock.elapsed = 59.5
        exchange.fetch(Call.SHARES, until=clock.monotonic() + 60)
    assert clock.elapsed == 60


def test_the_budget_of_a_day() -> None:
    """Charged calls of the day count, whichever instance made them; one poll is kept for the end of the day."""
    script = Script((200, DONE))
    with against(script, patience=Patience(max_calls_per_day=10, reserved_calls=2)) as exchange:
        exchange.begin(7, final=False)
        exchange.fetch(Call.SHARES)
        error = refused(exchange, Call.RIGHTS)
        assert (error.kind, error.held) == ("budget", True)
        assert str(error) == "the budget of 10 charged calls a day is spent"
        exchange.begin(8, final=True)
        exchange.fetch(Call.SHARES)
        exchange.fetch(Call.RIGHTS)
        assert refused(exchange).held
    assert len(script.calls) == 3


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_is_renewed_after_a_poll_by_its_refresh_token() -> None:
    """In the last tenth of its life, when it is asked for; a poll itself never renews a good token."""
    script, clock = Script((200, DONE)), ManualClock()
    with against(script, clock=clock) as exchange:
        exchange.renew()
        exchange.fetch(Call.SHARES)
        clock.elapsed = NINE_DAYS - 1
        exchange.renew()
        assert script.grant_types() == ["client_credentials"]
        clock.elapsed = NINE_DAYS + 1
        exchange.fetch(Call.SHARES)
        assert script.grant_types() == ["client_credentials"]
        exchange.renew()
        exchange.renew()
        ends_at = exchange.token_ends_at()
    assert script.grant_types() == ["client_credentials", "refresh_token"]
    assert ends_at == clock.now() + timedelta(days=10)


def test_a_token_endpoint_that_hangs_never_delays_a_poll() -> None:
    """With a good token, polls are made as ever: the renewal has a short time-out and is tried once an hour."""
    release = threading.Event()

    async def hang() -> Response:
        await asyncio.to_thread(release.wait, 10)
        return Response(b"")

    script, clock = Script((200, DONE), tokens=[NEW_TOKEN, hang, hang]), ManualClock()
    with against(script, clock=clock, deadline_seconds=0.2) as exchange, capture_logs() as lines:
        exchange.fetch(Call.SHARES)
        clock.elapsed = NINE_DAYS + 1
        for _ in range(70):
            exchange.fetch(Call.SHARES)
            exchange.renew()
            clock.elapsed += 60
        release.set()
    assert script.grant_types() == ["client_credentials", "refresh_token", "refresh_token"]
    assert [line["event"] for line in lines] == ["the token is not renewed"] * 2
    assert len(script.calls) == 71


def test_a_used_up_refresh_token_does_not_matter() -> None:
    """The token in use is still good, and so are the credentials, which an hour later bring the next one."""
    script = Script((200, DONE), tokens=[NEW_TOKEN, (400, failed("VALIDATION_ERROR", "used"))])
    clock = ManualClock()
    with against(script, clock=clock) as exchange, capture_logs():
        exchange.fetch(Call.SHARES)
        for _ in range(3):
            clock.elapsed = max(clock.elapsed, NINE_DAYS) + 1801
            exchange.fetch(Call.SHARES)
            exchange.renew()
    assert script.grant_types() == ["client_credentials", "refresh_token", "client_credentials"]
    assert len(script.calls) == 4


def test_an_ended_token_is_replaced_before_the_call() -> None:
    """By the credentials: a refresh token is good before the end only."""
    script, clock = Script((200, DONE)), ManualClock()
    with against(script, clock=clock) as exchange:
        exchange.fetch(Call.SHARES)
        clock.elapsed = 10 * 86_400.0
        exchange.renew()
        exchange.fetch(Call.SHARES)
    assert script.grant_types() == ["client_credentials"] * 2


def test_a_poll_whose_token_call_fails_was_tried() -> None:
    """Its error is that of the token's call, not held; the calls after it are held until a minute has passed."""
    script, clock = Script((200, DONE), tokens=[(503, b""), (503, b"")]), ManualClock()
    with against(script, clock=clock, retry_seconds=1.0) as exchange:
        first = refused(exchange, until=clock.monotonic() + 60)
        second = refused(exchange, Call.RIGHTS, until=clock.monotonic() + 50)
        assert [(each.kind, each.held) for each in (first, second)] == [("provider", False), ("provider", True)]
        clock.elapsed = 60
        assert not refused(exchange, until=clock.monotonic() + 50).held
        clock.elapsed = 120
        exchange.fetch(Call.SHARES, until=clock.monotonic() + 60)
    assert (len(script.grants), len(script.calls)) == (3, 1)


@pytest.mark.parametrize(("life", "days"), [(1e300, 366), (-1e300, 0)])
def test_a_life_beyond_reason(life: float, days: int) -> None:
    """The end of the token is a date all the same: it is a metric."""
    granted = json.dumps({"result": {"value": "tok3n-value", "lifeTime": life}, "status": "DONE"}).encode()
    clock = ManualClock()
    with against(Script((200, DONE), tokens=[(200, granted)]), clock=clock) as exchange:
        exchange.fetch(Call.SHARES)
        assert exchange.token_ends_at() == clock.now() + timedelta(days=days)


def test_a_refusal_to_give_a_token_is_obeyed_for_as_long_as_it_asks() -> None:
    """Its Retry-After holds the token's call, and with it every call for data."""
    busy = partial(Response, failed("X", "no"), 403, {"Retry-After": "600"})
    script, clock = Script((200, DONE), tokens=[busy]), ManualClock()
    with against(script, clock=clock) as exchange:
        assert not refused(exchange).held
        clock.elapsed = 590
        assert refused(exchange).held
        clock.elapsed = 600
        exchange.fetch(Call.SHARES)
    assert len(script.grants) == 2


REFUSALS = [
    (401, b""),
    (403, b'{"error":{"code":"FORBIDDEN","message":"no"}}'),
    (400, failed("VALIDATION_ERROR", "invalid token")),
    (200, failed("UNAUTHORIZED", "توکن")),
    (200, b'{"message":"invalid token"}'),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_token_is_renewed_once_and_the_call_repeated_once(refusal: tuple[int, bytes]) -> None:
    """In each of the five shapes a refusal has, and with a new trackId."""
    script, clock = Script((200, DONE), refusal, (200, DONE)), ManualClock()
    with against(script, clock=clock) as exchange:
        exchange.fetch(Call.SHARES)
        clock.elapsed = 61
        reply = exchange.fetch(Call.SHARES)
    assert (len(script.grants), len(script.calls)) == (2, 3)
    assert len(set(script.track_ids())) == 3
    assert script.track_ids()[-1] == reply.track_id


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_fresh_token_that_is_refused_is_kept(refusal: tuple[int, bytes]) -> None:
    """A whole session of refusals costs a token an hour; the first call that succeeds ends it."""
    script, clock = Script(refusal), ManualClock()
    with against(script, clock=clock, retry_seconds=1.0) as exchange:
        errors = []
        while clock.elapsed < 8.25 * 3600:
            errors.append(refused(exchange, until=clock.monotonic() + 60))
            clock.elapsed = (clock.elapsed // 60 + 1) * 60
        assert (len(script.grants), len(errors)) == (9, 495)
        assert len(script.calls) < 130
        script.answers = [(200, DONE)]
        clock.elapsed += 300
        exchange.fetch(Call.SHARES)
        assert len(script.grants) == 9
    assert {type(error) for error in errors} == {ExchangeRefused}
    assert {error.kind for error in errors} == {"scope" if refusal[0] == 403 else "token"}


@pytest.mark.parametrize("body", [b"", b"<html>403 Forbidden</html>"])
def test_a_403_without_json_is_not_about_the_token(body: bytes) -> None:
    """It comes from a gateway; a new token would not help, and none is requested."""
    script, clock = Script((403, body)), ManualClock()
    with against(script, clock=clock) as exchange:
        errors = [refused(exchange)]
        clock.elapsed = 7200
        errors.append(refused(exchange))
    assert (len(script.grants), len(script.calls)) == (1, 2)
    assert {error.kind for error in errors} == {"address"}


def test_a_scope_refusal_names_the_scope() -> None:
    """403 with a new token: the operator must ask for the scope, or for the address."""
    script = Script((403, failed("FORBIDDEN", "no scope")))
    with against(script) as exchange:
        error = refused(exchange)
    assert "bourse:trades-realtime:get" in str(error)
    assert "whitelisted" in str(error)
    assert "no scope" in str(error)
    assert (error.code, error.track_id) == ("FORBIDDEN", script.track_ids()[-1])


def test_wrong_credentials_are_sent_once_a_minute_then_less_often() -> None:
    """The exchange's words are shown, and no call for data follows."""
    practice = practice_exchange("real", "poll", client_secret="other")
    with practice.serve() as server, httpx2.Client() as client:
        error = refused(Finnotech(client, server.url, Credentials("practice", SECRET, NID)))
    message = "the exchange gives no token: invalid client credentials"
    assert (error.kind, error.code, str(error)) == ("token", "UNAUTHORIZED", message)
    script, clock = Script((200, DONE), tokens=[(401, b"")] * 99), ManualClock()
    with against(script, clock=clock) as exchange:
        for beat in range(60):
            clock.elapsed = beat * 60
            error = refused(exchange, until=clock.monotonic() + 60)
    assert (len(script.grants), len(script.calls), error.held) == (14, 0, True)


@pytest.mark.parametrize(
    ("status", "body", "error", "kind"),
    [
        (200, b"", ExchangeNonsense, "nonsense"),
        (200, b"<html>", ExchangeNonsense, "nonsense"),
        (200, b'{"result":5}', ExchangeNonsense, "nonsense"),
        (200, b"[" * 100_000, ExchangeNonsense, "nonsense"),
        (200, b'{"result":{"value":"a\\nb","lifeTime":1}}', ExchangeNonsense, "nonsense"),
        (200, '{"result":{"value":"توکن","lifeTime":1}}'.encode(), ExchangeNonsense, "nonsense"),
        (200, b'{"result":{"value":"x","lifeTime":"soon"}}', ExchangeNonsense, "nonsense"),
        (200, b'{"result":{"value":"x","lifeTime":' + b"9" * 400 + b"}}", ExchangeNonsense, "nonsense"),
        (500, b"<html>", ExchangeUnavailable, "provider"),
        (429, b"", ExchangeUnavailable, "rate"),
        (408, b"", ExchangeUnavailable, "timeout"),
        (403, b"<html>", ExchangeRefused, "address"),
        (403, failed("X", "no"), ExchangeRefused, "token"),
    ],
)
def test_an_answer_without_a_token(status: int, body: bytes, error: type[ExchangeError], kind: str) -> None:
    """Whatever the token's address answers is an ExchangeError that shows nothing of the answer's token."""
    script = Script((200, DONE), tokens=[(status, body)])
    with against(script) as exchange:
        found = refused(exchange)
    assert (type(found), found.kind, len(script.calls)) == (error, kind, 0)
    assert "a\nb" not in str(found)


@pytest.mark.parametrize("value", ["tok3n-value ", " tok3n-value", "tok3n value", "tok3n\tvalue", ""])
def test_a_token_that_no_header_can_hold_is_not_used(value: str) -> None:
    """The HTTP client would quote it in its own error, which is logged and published."""
    granted = {"result": {"value": value, "lifeTime": 864_000_000}, "status": "DONE"}
    script = Script((200, DONE), tokens=[(200, json.dumps(granted).encode())])
    with against(script) as exchange:
        error = refused(exchange)
    assert ("tok3n" in str(error), script.calls) == (False, [])


# --- secrets ----------------------------------------------------------------------------------------------------------

BASIC = b64encode(f"me:{SECRET}".encode()).decode()
SECRETS = (SECRET, NID, BASIC, "tok3n-value", "r3fresh-value", SECRET.replace("/", "\\/"), SECRET.replace("/", "%2F"))


def test_secrets_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Not in a repr, not in an error, not in a log, whatever goes wrong."""
    caplog.set_level(logging.INFO)
    shown = io.StringIO()
    script = Script((200, DONE), *REFUSALS, (500, b""))
    with against(script, patience=Patience(longest_seconds=0)) as exchange:
        for _ in range(5):
            try:
                print(exchange.fetch(Call.SHARES), file=shown)
            except ExchangeError as error:
                print(repr(error), error, error.__dict__, repr(error.__cause__), file=shown)
        print(exchange, exchange._token, exchange.credentials, file=shown)
    text = shown.getvalue() + caplog.text
    assert not [word for word in SECRETS if word in text]


@pytest.mark.parametrize("secret", SECRETS)
def test_an_exchange_that_quotes_secrets(secret: str) -> None:
    """Its words go to logs, a topic and captures, our secrets do not: not in code, message, headers or body."""
    quoted = json.dumps({"error": {"code": f"E {secret}", "message": f"no good: {secret}"}, secret: [secret]}).encode()
    quoted = quoted.replace(b"\\\\/", b"\\/")
    headers = {"Content-Type": f"text/{secret}", "Retry-After": secret}
    kept: list[Reply] = []

    def quoting() -> Response:
        return Response(quoted, 400, headers)

    with against(Script(quoting), on_response=kept.append) as exchange:
        errors = [refused(exchange)]
    script = Script((200, DONE), tokens=[(400, quoted)])
    with against(script) as exchange:
        errors += [refused(exchange), refused(exchange)]
    if secret.endswith("-value"):
        # No token was ever issued: it is not a secret.
        errors[1:] = []
    assert [errors[0].code, str(errors[0])] == ["E …", "no good: …"]
    assert [str(error)[-39:] for error in errors[1:]] == ["the exchange gives no token: no good: …"] * len(errors[1:])
    assert {error.code for error in errors} == {"E …"}
    (answer,) = kept
    assert not [word for word in SECRETS if word in answer.body.decode() + str(answer.headers)]
    assert answer.body.count("…".encode()) == 4


def test_a_token_in_an_answer_that_gives_none_is_not_shown() -> None:
    """Each field of such an answer may be quoted in its error."""
    answer = {
        "result": {"value": "an0ther-token", "refreshToken": "an0ther-refresh"},
        "error": {"code": "an0ther-token"},
    }
    answer["error"]["message"] = "an0ther-refresh and an0ther-token"
    with against(Script((200, DONE), tokens=[(400, json.dumps(answer).encode())])) as exchange:
        error = refused(exchange)
    assert (error.code, str(error)) == ("…", "the exchange gives no token: … and …")


def test_a_good_response_is_kept_byte_for_byte() -> None:
    """Also if a number in it happens to be the national id."""
    body = b'{"result":[{"TradeValue":1' + NID.encode() + b'}],"state":"DONE"}'
    kept: list[Reply] = []
    with against(Script((200, body)), on_response=kept.append) as exchange:
        assert exchange.fetch(Call.SHARES).body == body
    assert kept[0].body == body


# --- the network ------------------------------------------------------------------------------------------------------


def test_time_out() -> None:
    """A response that does not come in time is the network's or the exchange's fault, with the attempt's trackId."""
    release = threading.Event()

    def late() -> Response:
        release.wait(10)
        return Response(DONE)

    script = Script(late)
    with against(script, timeout=0.2) as exchange:
        error = refused(exchange)
        release.set()
    assert (type(error), error.kind) == (ExchangeUnavailable, "timeout")
    assert error.track_id in script.track_ids()


def test_nobody_listens() -> None:
    """Connection refused is kind network."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with httpx2.Client() as client:
            error = refused(Finnotech(client, f"http://127.0.0.1:{port}", Credentials("me", SECRET, NID)))
    assert (type(error), error.kind) == (ExchangeUnavailable, "network")
    assert "refused" in str(error)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", ExchangeUnavailable),
        (b"no http at all\r\n\r\n", ExchangeUnavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", ExchangeUnavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nrest", ExchangeNonsense),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", ExchangeUnavailable),
    ],
)
def test_a_broken_connection(raw: bytes, error: type[ExchangeError]) -> None:
    """Cut off, garbled, half a body, no gzip, another address: each is an ExchangeError."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(raw)

        thread = threading.Thread(target=answer)
        thread.start()
        with httpx2.Client() as client:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            assert type(refused(Finnotech(client, url, Credentials("me", SECRET, NID)))) is error
        thread.join(10)


@pytest.mark.parametrize(
    ("header", "dated"),
    [
        ("Wed, 21 Aug 2019 06:27:17 GMT", datetime(2019, 8, 21, 6, 27, 17, tzinfo=UTC)),
        ("Wed, 21 Aug 2019 06:27:17 -0000", datetime(2019, 8, 21, 6, 27, 17, tzinfo=UTC)),
        ("Fri, 31 Dec 9999 23:59:59 -1200", None),
        ("soon", None),
        ("", None),
    ],
)
def test_the_date_header(header: str, dated: datetime | None) -> None:
    """One that cannot be read is none."""
    script = Script(lambda: Response(DONE, headers={"Date": header}))
    app = serve(script.app, "127.0.0.1")
    with app, httpx2.Client() as client:
        reply = Finnotech(client, app.url, Credentials("me", SECRET, NID)).fetch(Call.SHARES)
    assert reply.dated == dated


@pytest.mark.parametrize(
    ("dated", "agrees"),
    [("06:29:59", False), ("06:30:00", True), ("06:30:12", True), ("06:30:13", True), ("06:30:14", False)],
)
def test_a_slow_answer_is_not_a_wrong_clock(dated: str, agrees: bool) -> None:
    """The Date header is from some moment of the call, cut to the second: the difference is an interval."""
    day = "2026-11-28T"
    began, ended = (datetime.fromisoformat(f"{day}06:30:{second}+00:00") for second in ("00.700", "13.200"))
    reply = Reply("t", DONE, began, ended, datetime.fromisoformat(f"{day}{dated}+00:00"))
    assert reply.dated
    assert (clock_skew(reply.requested_at, reply.received_at, reply.dated) == 0) is agrees


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_a_body_too_large_is_not_read_to_its_end() -> None:
    """Not even one that is small on the wire."""
    big = b'{"result":[' + b" " * 3_000_000 + b'],"state":"DONE"}'
    packed = gzip.compress(big)
    for answer in (Response(big), Response(packed, headers={"Content-Encoding": "gzip"})):
        script = Script(partial(lambda answer: answer, answer))
        with against(script, most_bytes=1 << 20) as exchange:
            error = refused(exchange)
        assert (type(error), str(error)) == (ExchangeNonsense, "the body is larger than 1 MiB")


def test_a_body_compressed_more_than_once_is_not_read() -> None:
    """A bomb within a bomb would fill the memory before its size could be seen."""
    packed = gzip.compress(gzip.compress(DONE))
    script = Script(lambda: Response(packed, headers={"Content-Encoding": "gzip, gzip"}))
    with against(script) as exchange:
        error = refused(exchange)
    assert (type(error), str(error)) == (ExchangeNonsense, "the body is compressed more than once")


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream"])
def test_the_content_type_does_not_matter(kind: str) -> None:
    """A body that can be read is used, whatever it is called; a byte order mark is no part of it."""
    script = Script(lambda: Response(b"\xef\xbb\xbf" + DONE, media_type=kind))
    with against(script) as exchange:
        reply = exchange.fetch(Call.SHARES)
    context = Reading(1, datetime.now(UTC), datetime.now(UTC), None, False, reply.track_id)
    assert parse(reply.body, context).rows == 0


def test_every_call_is_counted_and_every_answer_kept() -> None:
    """Tokens apart: their answers hold secrets. Good and bad, as far as they came."""
    outcomes: list[str] = []
    kept: list[Reply] = []
    script = Script((200, DONE), (500, b"<html>"), (401, b"no"), (200, DONE))
    patience = Patience(longest_seconds=0)
    with against(script, patience=patience, on_call=outcomes.append, on_response=kept.append) as exchange:
        exchange.fetch(Call.SHARES)
        refused(exchange)
        exchange.fetch(Call.RIGHTS)
    assert outcomes == ["token_done", "done", "provider", "token", "token_done", "done"]
    assert [(answer.status, answer.body) for answer in kept] == [
        (200, DONE),
        (500, b"<html>"),
        (401, b"no"),
        (200, DONE),
    ]
    assert [answer.track_id for answer in kept] == script.track_ids()
    assert all(answer.query["trackId"] == answer.track_id for answer in kept)
    assert "tok3n-value" not in repr([(answer, answer.headers, answer.query) for answer in kept])


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (403, '{"error":{"code":"FORBIDDEN","message":"Your IP is not allowed"}}', "address"),
        (403, '{"error":{"code":"FORBIDDEN","message":"آی‌پی شما مجاز نیست"}}', "address"),
        (
            200,
            '{"status":"FAILED","responseCode":"FN-BRSE-40300000001","error":{"message":"not in whitelist"}}',
            "address",
        ),
        (200, '{"responseCode":"FN-BRSE-42900000001","status":"FAILED"}', "rate"),
        (200, '{"responseCode":"FN-BRSE-42900000001","error":{"code":"X","message":"slower"}}', "rate"),
        (400, '\ufeff{"error":{"code":"VALIDATION_ERROR","message":"no such trackId"}}', "internal"),
        (400, '{"error":{"code":"X","message":"سقف مجاز"}}', "quota"),
        (400, '{"result":{"error":{"code":"SERVICE_CALL_ERROR","message":"later"}},"status":"FAILED"}', "provider"),
    ],
)
def test_refusals_differ_by_kind(status: int, body: str, kind: str) -> None:
    """Whatever shape they come in; an address that is not whitelisted needs no new token to be known."""
    script = Script((status, body.encode()))
    with against(script) as exchange:
        assert refused(exchange).kind == kind
    assert len(script.grants) == 1
