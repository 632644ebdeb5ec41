"""The exchange's client over real HTTP: tokens, refusals, and a network that fails."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bourse_producer.finnotech import Context, Credentials, Finnotech, parse
from bourse_sandbox.exchange import PracticeExchange, practice_exchange
from bourse_sandbox.serving import serve
from bourse_schemas.errors import ExchangeError, ExchangeNonsense, ExchangeRefused, ExchangeUnavailable

SECRET, NID = "s3cr3t-of-mine", "0123456789"
TOKEN = {"result": {"value": "tok3n-value", "lifeTime": 864_000_000, "refreshToken": "r3fresh-value"}, "status": "DONE"}
DONE = b'{"result":[],"state":"DONE"}'


@contextmanager
def against_practice(**account: Any) -> Iterator[tuple[Finnotech, PracticeExchange]]:
    """Run the practice exchange and a client of it."""
    practice = practice_exchange("real", "poll", client_secret=SECRET, nid=NID, **account)
    with practice.serve() as server, httpx.Client() as client:
        yield Finnotech(client, server.url + "/", Credentials("practice", SECRET, NID)), practice


class Script:
    """An exchange that answers what the test says; it remembers the calls."""

    def __init__(self, *answers: tuple[int, bytes] | Callable[[], Response], tokens: Any = None) -> None:
        self.answers = list(answers)
        self.tokens: list[tuple[int, bytes]] = list(tokens or [])
        self.grants: list[dict[str, Any]] = []
        self.calls: list[Request] = []
        self.app = Starlette(
            routes=[
                Route("/dev/v2/oauth2/token", self._token, methods=["POST"]),
                Route("/bourse/v2/clients/me/trades/realtime", self._realtime),
            ]
        )

    async def _token(self, request: Request) -> Response:
        self.grants.append(await request.json())
        default = (200, json.dumps(TOKEN).encode())
        status, body = self.tokens.pop(0) if self.tokens else default
        return Response(body, status)

    async def _realtime(self, request: Request) -> Response:
        self.calls.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer() if callable(answer) else Response(answer[1], answer[0])

    def track_ids(self) -> list[str]:
        """Return the trackId of each call."""
        return [call.query_params["trackId"] for call in self.calls]


@contextmanager
def against(script: Script, **client: Any) -> Iterator[Finnotech]:
    """Run a script and a client of it."""
    with serve(script.app, "127.0.0.1") as server, httpx.Client(**client) as http:
        yield Finnotech(http, server.url, Credentials("me", SECRET, NID))


def refused(exchange: Finnotech) -> ExchangeError:
    """Return the error of a call that must fail."""
    with pytest.raises(ExchangeError) as caught:
        exchange.realtime(rights=False)
    return caught.value


def test_one_token_for_many_calls() -> None:
    """A token is minted at the first call and used until it is due; shares and rights are different calls."""
    with against_practice() as (exchange, practice):
        replies = [exchange.realtime(rights=rights) for rights in (False, True, False)]
        assert (practice.tokens, practice.calls, practice.served) == (1, 3, 2)
    assert len({reply.track_id for reply in replies}) == 3
    context = Context(1, datetime.now(UTC), datetime(2019, 8, 22, tzinfo=UTC), date(2019, 8, 21), False, "")
    assert [parse(reply.body, context).rows > 100 for reply in replies] == [True, False, True]
    assert [reply.dated and reply.dated.date() for reply in replies] == [date(2019, 8, 21)] * 3


def test_parameters_are_always_sent() -> None:
    """Both flags, a trackId of 32 hex digits, and no company."""
    script = Script((200, DONE))
    with against(script) as exchange:
        exchange.realtime(rights=True)
    query = dict(script.calls[0].query_params)
    assert len(bytes.fromhex(query.pop("trackId"))) == 16
    assert query == {"isTimePeriod": "false", "precedencyRight": "true"}
    assert script.calls[0].headers["authorization"] == "Bearer tok3n-value"


def test_a_token_is_renewed_early_by_its_refresh_token() -> None:
    """At nine tenths of its life; no call is refused for it."""
    statuses: set[int] = set()
    with against_practice(token_seconds=0.5) as (exchange, practice):
        exchange._client.event_hooks = {"response": [lambda response: statuses.add(response.status_code)]}
        began = time.monotonic()
        while practice.tokens < 3 and time.monotonic() < began + 10:
            exchange.realtime(rights=False)
        assert 0.8 < time.monotonic() - began < 5
    assert statuses == {200}


def test_a_used_up_refresh_token_does_not_matter() -> None:
    """The credentials still stand."""
    short = {**TOKEN, "result": {"value": "short", "lifeTime": 0, "refreshToken": "used"}}
    tokens = [(200, json.dumps(short).encode()), (400, b'{"error":{"code":"VALIDATION_ERROR","message":"used"}}')]
    script = Script((200, DONE), tokens=tokens)
    with against(script) as exchange:
        exchange.realtime(rights=False)
        exchange.realtime(rights=False)
    assert [grant["grant_type"] for grant in script.grants] == [
        "client_credentials",
        "refresh_token",
        "client_credentials",
    ]
    assert script.calls[1].headers["authorization"] == "Bearer tok3n-value"


REFUSALS = [
    (401, b""),
    (403, b'{"error":{"code":"FORBIDDEN","message":"no"}}'),
    (400, b'{"status":"FAILED","error":{"code":"VALIDATION_ERROR","message":"invalid token"}}'),
    (200, '{"status":"FAILED","error":{"code":"UNAUTHORIZED","message":"توکن"}}'.encode()),
    (200, b'{"message":"invalid token"}'),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_token_is_renewed_once_and_the_call_repeated_once(refusal: tuple[int, bytes]) -> None:
    """In each of the five shapes a refusal has, and with a new trackId."""
    script = Script((200, DONE), refusal, (200, DONE))
    with against(script) as exchange:
        exchange.realtime(rights=False)
        reply = exchange.realtime(rights=False)
    assert (len(script.grants), len(script.calls)) == (2, 3)
    assert len(set(script.track_ids())) == 3
    assert script.track_ids()[-1] == reply.track_id


@pytest.mark.parametrize("refusal", REFUSALS)
def test_no_token_is_minted_in_a_loop(refusal: tuple[int, bytes]) -> None:
    """A refusal that a new token does not help ends in an error, and the next polls mint nothing for a while."""
    script = Script(refusal)
    with against(script) as exchange:
        errors = [refused(exchange) for _ in range(4)]
    assert (len(script.grants), len(script.calls)) == (2, 5)
    assert {type(error) for error in errors} == {ExchangeRefused}
    assert {error.kind for error in errors} == {"scope" if refusal[0] == 403 else "token"}
    assert errors[-1].track_id == script.track_ids()[-1]


def test_a_scope_refusal_says_which() -> None:
    """403 with a new token: the operator must ask for the scope, or for the address."""
    script = Script((403, b'{"error":{"code":"FORBIDDEN","message":"no scope"}}'))
    with against(script) as exchange:
        error = refused(exchange)
    assert "bourse:trades-realtime:get" in str(error)
    assert "whitelisted" in str(error)
    assert "no scope" in str(error)
    assert error.code == "FORBIDDEN"


def test_wrong_credentials_are_asked_once_a_poll() -> None:
    """The exchange's words are shown, and no second request follows the first."""
    practice = practice_exchange("real", "poll", client_secret="other")
    with practice.serve() as server, httpx.Client() as client:
        error = refused(Finnotech(client, server.url, Credentials("practice", SECRET, NID)))
    assert (error.kind, error.code, str(error)) == (
        "token",
        "UNAUTHORIZED",
        "the exchange gives no token: invalid client credentials",
    )
    script = Script((200, DONE), tokens=[(401, b"")] * 5)
    with against(script) as exchange:
        refused(exchange)
    assert (len(script.grants), len(script.calls)) == (1, 0)


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
        (500, b"<html>", ExchangeUnavailable, "provider"),
        (429, b"", ExchangeUnavailable, "rate"),
        (408, b"", ExchangeUnavailable, "timeout"),
        (403, b"<html>", ExchangeRefused, "token"),
    ],
)
def test_a_token_that_is_none(status: int, body: bytes, error: type[ExchangeError], kind: str) -> None:
    """Whatever the token's address answers is an ExchangeError without a word of the answer's token."""
    script = Script((200, DONE), tokens=[(status, body)])
    with against(script) as exchange:
        found = refused(exchange)
    assert (type(found), found.kind, len(script.calls)) == (error, kind, 0)
    assert "a\nb" not in str(found)


def test_a_duplicate_track_id_is_told() -> None:
    """Permanent, and the exchange's words."""
    script = Script((400, b'{"error":{"code":"VALIDATION_ERROR","message":"trackId is duplicated"}}'))
    with against(script) as exchange:
        error = refused(exchange)
    assert (type(error), error.kind, str(error), len(script.calls)) == (
        ExchangeRefused,
        "internal",
        "trackId is duplicated",
        1,
    )


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
        with httpx.Client() as client:
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
        with httpx.Client() as client:
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
    with app, httpx.Client() as client:
        reply = Finnotech(client, app.url, Credentials("me", SECRET, NID)).realtime(rights=False)
    assert reply.dated == dated


def test_secrets_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Not in a repr, not in an error, not in a log, whatever goes wrong."""
    caplog.set_level(logging.INFO)
    shown = io.StringIO()
    script = Script((200, DONE), *REFUSALS, (500, b""))
    with against(script) as exchange:
        for _ in range(5):
            try:
                print(exchange.realtime(rights=False), file=shown)
            except ExchangeError as error:
                print(repr(error), error, error.__dict__, repr(error.__cause__), file=shown)
        print(exchange, exchange._token, exchange._credentials, file=shown)
    text = shown.getvalue() + caplog.text
    assert not [word for word in (SECRET, NID, "tok3n-value", "r3fresh-value") if word in text]


def test_one_company_and_its_minutes_can_be_asked_for() -> None:
    """All six parameters of the API are understood by the exchange as they are sent."""
    with against_practice() as (client, _):
        market = json.loads(client.realtime(rights=False).body)["result"]
        company = market[0]["CoID"]
        (row,) = json.loads(client.realtime(rights=False, company_id=company).body)["result"]
        minutes = json.loads(client.realtime(rights=False, company_id=company, minutes=("0900", "1230")).body)["result"]
    assert row == market[0]
    assert minutes
    assert {minute["CoID"] for minute in minutes} == {company}
