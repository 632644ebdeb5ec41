"""The exchange's client over real HTTP: tokens, refusals, and a network that fails."""

from __future__ import annotations

import gzip
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from structlog.testing import capture_logs

from bourse_producer.finnotech import Credentials, Finnotech, Received
from bourse_producer.responses import PROFILES, Reading, parse
from bourse_sandbox.exchange import PracticeExchange, practice_exchange
from bourse_sandbox.serving import serve
from bourse_schemas.errors import (
    ConfigurationError,
    ExchangeError,
    ExchangeNonsense,
    ExchangeRefused,
    ExchangeUnavailable,
)

SECRET, NID = "s3cr3t-of-mine", "0123456789"
TOKEN = {"result": {"value": "tok3n-value", "lifeTime": 864_000_000, "refreshToken": "r3fresh-value"}, "status": "DONE"}
DONE = b'{"result":[],"state":"DONE"}'


@contextmanager
def against_practice(
    options: dict[str, Any] | None = None, **account: Any
) -> Iterator[tuple[Finnotech, PracticeExchange]]:
    """Run the practice exchange and a client of it."""
    practice = practice_exchange("real", "poll", client_secret=SECRET, nid=NID, **account)
    with practice.serve() as server, httpx.Client() as client:
        yield Finnotech(client, server.url + "/", Credentials("practice", SECRET, NID), **options or {}), practice


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
def against(script: Script, *, timeout: float = 5.0, **options: Any) -> Iterator[Finnotech]:
    """Run a script and a client of it; where nothing else is said it may ask for token after token."""
    with serve(script.app, "127.0.0.1") as server, httpx.Client(timeout=timeout) as http:
        yield Finnotech(http, server.url, Credentials("me", SECRET, NID), **{"mint_seconds": 0, **options})


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
    context = Reading(1, datetime.now(UTC), datetime(2019, 8, 22, tzinfo=UTC), date(2019, 8, 21), False, "")
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
    with against_practice({"mint_seconds": 0}, token_seconds=0.5) as (exchange, practice):
        exchange._client.event_hooks = {"response": [lambda response: statuses.add(response.status_code)]}
        began = time.monotonic()
        while practice.tokens < 3 and time.monotonic() < began + 10:
            exchange.realtime(rights=False)
        assert 0.8 < time.monotonic() - began < 5
    assert statuses == {200}


def test_a_used_up_refresh_token_does_not_matter() -> None:
    """The token in use still stands, and so do the credentials, of which the next one is asked for."""
    refusal = (400, b'{"error":{"code":"VALIDATION_ERROR","message":"used"}}')
    script = Script((200, DONE), tokens=[(200, json.dumps(TOKEN).encode()), refusal])
    with against(script) as exchange:
        exchange.realtime(rights=False)
        for _ in range(2):
            assert exchange._token is not None
            exchange._token = replace(exchange._token, renew_at=0)
            exchange.realtime(rights=False)
    assert [grant["grant_type"] for grant in script.grants] == [
        "client_credentials",
        "refresh_token",
        "client_credentials",
    ]
    assert len(script.calls) == 3


def test_a_token_that_still_stands_is_used_while_none_is_given() -> None:
    """An exchange that has data but no new tokens is polled on, and asked for a token again later, the same way."""
    script = Script((200, DONE), tokens=[(200, json.dumps(TOKEN).encode()), (503, b""), (503, b"")])
    with against(script) as exchange:
        exchange.realtime(rights=False)
        for _ in range(2):
            assert exchange._token is not None
            exchange._token = replace(exchange._token, renew_at=0)
            exchange.realtime(rights=False)
    assert [grant["grant_type"] for grant in script.grants] == ["client_credentials", *["refresh_token"] * 2]
    assert len(script.calls) == 3


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
    with against(script, mint_seconds=60) as exchange:
        errors = [refused(exchange) for _ in range(4)]
        assert (len(script.grants), len(script.calls)) == (1, 4)
        exchange._minted_at -= 60
        errors.append(refused(exchange))
    assert (len(script.grants), len(script.calls)) == (2, 6)
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
        (200, b'{"result":{"value":"x","lifeTime":' + b"9" * 400 + b"}}", ExchangeNonsense, "nonsense"),
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


@pytest.mark.parametrize("value", ["tok3n-value ", " tok3n-value", "tok3n value", "tok3n\tvalue", ""])
def test_a_token_that_no_header_can_hold_is_none(value: str) -> None:
    """The HTTP client would quote it in its own complaint, which is logged and published."""
    granted = {"result": {"value": value, "lifeTime": 864_000_000}, "status": "DONE"}
    script = Script((200, DONE), tokens=[(200, json.dumps(granted).encode())])
    with against(script, mint_seconds=60) as exchange:
        error = refused(exchange)
    assert ("tok3n" in str(error), script.calls) == (False, [])


def test_an_exchange_that_quotes_secrets() -> None:
    """Its words go to logs and to a topic, our secrets do not."""

    def quoting(*words: str) -> tuple[int, bytes]:
        return 400, json.dumps({"error": {"code": "E", "message": f"no good: {', '.join(words)}"}}).encode()

    with against(Script((200, DONE), tokens=[quoting(SECRET, NID)]), mint_seconds=60) as exchange:
        assert str(refused(exchange)) == "the exchange gives no token: no good: …, …"
        assert str(refused(exchange)).endswith("(the exchange gives no token: no good: …, …)")
    with against(Script(quoting("tok3n-value")), mint_seconds=60) as exchange:
        assert str(refused(exchange)) == "no good: …"


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


# --- the token file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[Script, Callable[[], Finnotech], Path]]:
    """Return an exchange, what makes a client of it as a new process would, and the file of the token."""
    script, file = Script((200, DONE)), tmp_path / "token"
    with serve(script.app) as server, httpx.Client() as http:
        yield script, lambda: Finnotech(http, server.url, Credentials("me", SECRET, NID), token_file=file), file


def test_a_token_outlives_a_restart(kept: tuple[Script, Callable[[], Finnotech], Path]) -> None:
    """In a file that only its owner can read; without one, or of another account, a new one is asked for."""
    script, client, file = kept
    for _ in range(3):
        client().realtime(rights=False)
    assert (len(script.grants), len(script.calls)) == (1, 3)
    assert file.stat().st_mode & 0o777 == 0o600
    assert SECRET not in file.read_text()
    other = client()
    other._identity = "another account"
    other._token = None
    other._minted_at = 0.0
    other._load_token(file)
    assert other._token is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"for": 5}', "\x00\xff", "[" * 10_000, '{"asked": "x"}'])
def test_a_token_file_that_cannot_be_used_is_not(kept: tuple[Script, Callable[[], Finnotech], Path], text: str) -> None:
    """It is said, and a new token takes its place."""
    script, client, file = kept
    file.write_text(text)
    file.chmod(0o600)
    client().realtime(rights=False)
    client().realtime(rights=False)
    assert (len(script.grants), len(script.calls)) == (1, 2)


def test_a_token_file_that_others_can_read_is_not_used(kept: tuple[Script, Callable[[], Finnotech], Path]) -> None:
    """The token may be known to them; the new one is not."""
    script, client, file = kept
    client().realtime(rights=False)
    file.chmod(0o644)
    with capture_logs() as lines:
        client().realtime(rights=False)
    assert [line["event"] for line in lines] == ["the token file is not used: others can read it"]
    assert (len(script.grants), file.stat().st_mode & 0o777) == (2, 0o600)


def test_a_token_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Is told before anything is asked for."""
    with httpx.Client() as http, pytest.raises(ConfigurationError, match=r"--token-file .* cannot write"):
        Finnotech(http, "http://h", Credentials("me", SECRET, NID), token_file=tmp_path / "none" / "token")


def test_never_more_than_one_token_a_minute_even_across_restarts(
    kept: tuple[Script, Callable[[], Finnotech], Path],
) -> None:
    """A service that is restarted in a loop does not mint in a loop; the exchange's reason is repeated."""
    script, client, _ = kept
    script.tokens = [(401, b'{"error":{"code":"UNAUTHORIZED","message":"who?"}}')] * 9
    first = refused(client())
    assert "who?" in str(first)
    again = client()
    second, third = refused(again), refused(again)
    assert (len(script.grants), len(script.calls)) == (1, 0)
    assert {error.kind for error in (first, second, third)} == {"token"}
    assert 50 < (second.retry_after or 0) <= 60


@pytest.mark.parametrize(
    "odd",
    [{"ends": 10**400}, {"asked": 10**400}, {"renews": None}, {"value": "a\nb"}, {"value": "توکن"}, {"value": 5}],
)
def test_a_token_file_with_odd_values(
    kept: tuple[Script, Callable[[], Finnotech], Path], odd: dict[str, object]
) -> None:
    """What can be no token, or no time, is not used."""
    script, client, file = kept
    client().realtime(rights=False)
    file.write_text(json.dumps({**json.loads(file.read_text()), "asked": 0, **odd}))
    with capture_logs():
        client().realtime(rights=False)
    assert (len(script.grants), len(script.calls)) == (2, 2)


def test_a_renewal_that_fails_does_not_cost_the_kept_token(
    kept: tuple[Script, Callable[[], Finnotech], Path],
) -> None:
    """A restart goes on with the token that still stands."""
    script, client, _ = kept
    script.tokens = [(200, json.dumps(TOKEN).encode()), (503, b"")]
    exchange = client()
    exchange.realtime(rights=False)
    assert exchange._token is not None
    exchange._token, exchange._minted_at = replace(exchange._token, renew_at=0), 0.0
    exchange.realtime(rights=False)
    client().realtime(rights=False)
    assert (len(script.grants), len(script.calls)) == (2, 3)


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


def test_a_body_that_drips_ends_at_the_deadline() -> None:
    """Each piece in time is not enough."""
    release = threading.Event()

    def drip() -> Iterator[bytes]:
        while not release.wait(0.05):
            yield b" "

    script = Script(lambda: StreamingResponse(drip()))
    with against(script, deadline_seconds=0.5) as exchange:
        error = refused(exchange)
        release.set()
    assert (type(error), error.kind) == (ExchangeUnavailable, "timeout")
    assert error.track_id in script.track_ids()


@pytest.mark.parametrize("piece", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + DONE])
@pytest.mark.parametrize("drips", [True, False])
def test_the_deadline_holds_wherever_the_answer_stops(piece: bytes, drips: bool) -> None:
    """In its headers, in a body without a length; dripping on, or silent for less than a read may take."""
    release = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.recv(65_536)
                connection.sendall(piece)
                while not release.wait(0.02):
                    connection.sendall(b" " if drips else b"")

        thread = threading.Thread(target=answer)
        thread.start()
        began = time.monotonic()
        with httpx.Client(timeout=20) as client:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            error = refused(Finnotech(client, url, Credentials("me", SECRET, NID), deadline_seconds=0.3))
        release.set()
        thread.join(10)
    assert (type(error), error.kind, str(error)) == (
        ExchangeUnavailable,
        "timeout",
        "the answer took longer than 0.3 s",
    )
    assert time.monotonic() - began < 10


def test_a_body_packed_more_than_once_is_not_unpacked() -> None:
    """A bomb within a bomb would fill the memory before its size could be seen."""
    packed = gzip.compress(gzip.compress(DONE))
    script = Script(lambda: Response(packed, headers={"Content-Encoding": "gzip, gzip"}))
    with against(script) as exchange:
        error = refused(exchange)
    assert (type(error), str(error)) == (ExchangeNonsense, "the body is packed more than once")


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream"])
def test_the_content_type_does_not_matter(kind: str) -> None:
    """A body that can be read is used, whatever it is called; a byte order mark is no part of it."""
    script = Script(lambda: Response(b"\xef\xbb\xbf" + DONE, media_type=kind))
    with against(script) as exchange:
        reply = exchange.realtime(rights=False)
    context = Reading(1, datetime.now(UTC), datetime.now(UTC), None, False, reply.track_id)
    assert parse(reply.body, context).rows == 0


def test_every_call_is_counted_and_every_answer_kept() -> None:
    """Tokens apart: their answers hold secrets. Good and bad, as far as they came."""
    outcomes: list[str] = []
    kept: list[Received] = []
    script = Script((200, DONE), (500, b"<html>"), (401, b"no"), (200, DONE))
    with against(script, on_call=outcomes.append, on_response=kept.append) as exchange:
        exchange.realtime(rights=False)
        refused(exchange)
        exchange.realtime(rights=True)
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


# --- the successor ----------------------------------------------------------------------------------------------------


def test_the_successor_is_asked_its_own_way() -> None:
    """Path, scope and parameters are the profile's."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=TOKEN if request.method == "POST" else {"result": [], "status": "DONE"})

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        exchange = Finnotech(client, "http://h", Credentials("me", SECRET, NID), PROFILES["realTimeTrades"])
        exchange.realtime(rights=False)
        exchange.realtime(rights=False, company_id=5)
    assert json.loads(asked[0].content)["scopes"] == "bourse:realTime-trades:get"
    assert [request.url.path for request in asked[1:]] == ["/bourse/v2/clients/me/realTimeTrades"] * 2
    assert [sorted(request.url.params) for request in asked[1:]] == [["trackId"], ["companyId", "trackId"]]


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
def test_refusals_are_told_apart(status: int, body: str, kind: str) -> None:
    """Whatever shape they come in; an address that is not whitelisted needs no new token to be known."""
    script = Script((status, body.encode()))
    with against(script) as exchange:
        assert refused(exchange).kind == kind
    assert len(script.grants) == 1
