"""The practice exchange over real HTTP: token, parameters, quirks, errors, clocks, TLS, and the command."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from bourse_sandbox.exchange import SCOPE, MarketClock, PollClock, PracticeExchange, exchange, practice_exchange
from bourse_sandbox.market import REAL_DAY, PracticeMarket
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN
from reliability.certificate import self_signed

NOON = datetime(2019, 8, 21, 12, 0, tzinfo=TEHRAN)
PATH = "/bourse/v2/clients/practice/trades/realtime"
CREDENTIALS = {"grant_type": "client_credentials", "nid": "0123456789", "scopes": SCOPE}


class Hand:
    """A wall clock that moves by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Caller:
    """A client of the practice exchange with a token."""

    def __init__(self, client: httpx2.Client, practice: PracticeExchange) -> None:
        self.client, self.practice = client, practice
        self.token: str = self.grant()["value"]

    def grant(self, **body: str) -> dict[str, Any]:
        response = self.client.post("/dev/v2/oauth2/token", auth=("practice", "practice"), json={**CREDENTIALS, **body})
        assert response.status_code == 200, response.text
        result: dict[str, Any] = response.json()["result"]
        return result

    def call(self, **changed: str | None) -> httpx2.Response:
        """Poll the whole market; None leaves a parameter out."""
        path = changed.pop("path", None) or PATH
        wanted = {"trackId": uuid4().hex, "isTimePeriod": "false", "precedencyRight": "false", **changed}
        params = {name: value for name, value in wanted.items() if value is not None}
        return self.client.get(path, params=params, headers={"Authorization": f"Bearer {self.token}"})

    def rows(self, **changed: str | None) -> list[dict[str, Any]]:
        response = self.call(**changed)
        assert response.status_code == 200, response.text
        result: list[dict[str, Any]] = response.json()["result"]
        return result

    def refused(self, status: int, code: str, message: str, **changed: str | None) -> None:
        track_id = changed.setdefault("trackId", uuid4().hex)
        response = self.call(**changed)
        body = response.json()
        assert (response.status_code, body["status"], body["error"]["code"]) == (status, "FAILED", code)
        assert message in body["error"]["message"]
        assert not track_id or body["trackId"] == track_id


@contextmanager
def calling(practice: PracticeExchange) -> Iterator[Caller]:
    with practice.serve() as server, httpx2.Client(base_url=server.url) as client:
        yield Caller(client, practice)


@pytest.fixture(scope="module")
def at_noon() -> Iterator[Caller]:
    """The real day where it stays noon."""
    hand, market = Hand(), PracticeMarket.load(REAL_DAY)
    clock = MarketClock(market, wall=hand)
    hand.seconds = (NOON - market.times[0]).total_seconds()
    with calling(PracticeExchange(market, clock)) as caller:
        yield caller


def wait_for(condition: Callable[[], bool], deadline: float = 10) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


# --- the token ---


def test_a_token_is_as_documented(at_noon: Caller) -> None:
    """The result has the documented fields; life in milliseconds, creation in Jalali market time."""
    result = at_noon.grant(scopes=f"{SCOPE},bourse:realTime-trades:get")
    assert set(result) == {"value", "scopes", "lifeTime", "creationDate", "refreshToken"}
    assert result["scopes"] == [SCOPE, "bourse:realTime-trades:get"]
    assert (result["lifeTime"], result["creationDate"]) == (864_000_000, "13980530120000")


def test_a_refresh_token_rotates(at_noon: Caller) -> None:
    """A refresh token gives a new pair with the same scopes, once."""
    first = at_noon.grant()
    refresh = {"grant_type": "refresh_token", "token_type": "CLIENT-CREDENTIAL", "refresh_token": first["refreshToken"]}
    second = at_noon.grant(**refresh)
    assert second["scopes"] == first["scopes"]
    assert {second["value"], second["refreshToken"]}.isdisjoint({first["value"], first["refreshToken"]})
    again = at_noon.client.post("/dev/v2/oauth2/token", auth=("practice", "practice"), json=refresh)
    assert (again.status_code, again.json()["error"]["code"]) == (400, "VALIDATION_ERROR")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"nonsense", "not a token request"),
        (b"[]", "not a token request"),
        (b'{"grant_type":"\xff"}', "not a token request"),
        (json.dumps(CREDENTIALS | {"nid": "123"}).encode(), "nid"),
        (json.dumps(CREDENTIALS | {"scopes": "other"}).encode(), "scopes"),
        (json.dumps(CREDENTIALS | {"grant_type": "password"}).encode(), "grant_type"),
        (json.dumps({"grant_type": "refresh_token", "refresh_token": "x"}).encode(), "token_type"),
    ],
)
def test_a_bad_token_request(at_noon: Caller, body: bytes, message: str) -> None:
    """The documented error body names what is wrong."""
    response = at_noon.client.post("/dev/v2/oauth2/token", auth=("practice", "practice"), content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "VALIDATION_ERROR")
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "header", [b"", b"Basic", b"Basic %%%", b"Basic \xe9", b"Basic eDp5", b"Bearer cHJhY3RpY2U6cHJhY3RpY2U="]
)
def test_bad_credentials(at_noon: Caller, header: bytes) -> None:
    """Whatever is not the one account's Basic authorization is a 401."""
    sent = {b"Authorization": header}
    response = at_noon.client.post("/dev/v2/oauth2/token", headers=sent, json=CREDENTIALS)
    assert (response.status_code, response.json()["status"]) == (401, "FAILED")


def test_account_of_ones_own() -> None:
    """Client, secret and national id can be given; any other is refused."""
    practice = practice_exchange("real", "poll", client_id="me", client_secret="hush", nid="1111111111")
    with practice.serve() as server, httpx2.Client(base_url=server.url) as client:
        mine = client.post("/dev/v2/oauth2/token", auth=("me", "hush"), json=CREDENTIALS | {"nid": "1111111111"})
        other = client.post("/dev/v2/oauth2/token", auth=("me", "hush"), json=CREDENTIALS)
    assert (mine.status_code, other.status_code) == (200, 400)


def test_an_expired_token_is_refused() -> None:
    """A token lives as long as it says, then the call is a 401 and a new token helps."""
    hand, day = Hand(), PracticeMarket.load(REAL_DAY)
    with calling(PracticeExchange(day, PollClock(day), token_seconds=60, wall=hand)) as caller:
        assert caller.grant()["lifeTime"] == 60_000
        hand.seconds = 59.9
        assert caller.call().status_code == 200
        hand.seconds = 60
        caller.refused(401, "UNAUTHORIZED", "invalid token")
        caller.token = caller.grant()["value"]
        assert caller.call().status_code == 200
        assert caller.client.get("/practice/state").json()["tokens"] == 3


def test_token_scope_and_client(at_noon: Caller) -> None:
    """A call needs a known token, of this client, with the scope."""
    unknown = Caller(at_noon.client, at_noon.practice)
    unknown.token = "unknown"
    unknown.refused(401, "UNAUTHORIZED", "invalid token")
    assert at_noon.client.get(PATH).status_code == 401
    unknown.token = unknown.grant(scopes="bourse:realTime-trades:get")["value"]
    unknown.refused(403, "FORBIDDEN", SCOPE)
    at_noon.refused(403, "FORBIDDEN", "client", path=PATH.replace("practice", "other"))


# --- parameters and quirks ---


def test_track_id_is_unique(at_noon: Caller) -> None:
    """A track id is good once, even where its call was refused."""
    track_id = "a1" * 20
    at_noon.refused(400, "VALIDATION_ERROR", "isTimePeriod", trackId=track_id, isTimePeriod=None)
    at_noon.refused(400, "VALIDATION_ERROR", "trackId is duplicated", trackId=track_id)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("trackId", {"trackId": None}),
        ("trackId", {"trackId": "a" * 41}),
        ("trackId", {"trackId": str(uuid4())}),
        ("isTimePeriod", {"isTimePeriod": "yes"}),
        ("precedencyRight", {"precedencyRight": None}),
        ("fromTime", {"fromTime": "2400"}),
        ("toTime", {"toTime": "9:00"}),
        ("coId", {"coId": "five"}),
        ("coId is required", {"isTimePeriod": "true"}),
        ("fromTime is after toTime", {"isTimePeriod": "true", "coId": "5", "fromTime": "1100", "toTime": "1000"}),
    ],
)
def test_bad_parameters(at_noon: Caller, message: str, changed: dict[str, str | None]) -> None:
    """Each parameter is checked, by name, and no refused call is charged."""
    before = at_noon.practice.calls
    at_noon.refused(400, "VALIDATION_ERROR", message, **changed)
    assert at_noon.practice.calls == before


def test_the_response_has_the_quirks(at_noon: Caller) -> None:
    """`trackId` twice, either may be the echo; `state`; `minPrice`; the market's own date, once."""
    echoes = []
    for _ in range(2):
        track_id = uuid4().hex
        response = at_noon.call(trackId=track_id)
        pairs = json.loads(response.content, object_pairs_hook=list)
        assert [name for name, _ in pairs] == ["trackId", "result", "trackId", "state"]
        echoes.append([pairs[0][1], pairs[2][1]].index(track_id))
    assert sorted(echoes) == [0, 1]
    body = response.json()
    assert body["state"] == "DONE"
    assert {"minPrice", "MaxPrice"} < set(body["result"][0])
    assert [parsedate_to_datetime(value) for value in response.headers.get_list("date")] == [NOON]
    assert response.headers["content-type"].startswith("application/json")


def test_shares_rights_and_one_company(at_noon: Caller) -> None:
    """The parameter decides between shares and rights; coId picks one company of them."""
    shares, rights = at_noon.rows(), at_noon.rows(precedencyRight="true")
    assert len(shares) > 500
    assert not any(row["PrecedencyRight"] for row in shares)
    assert rights
    assert all(row["PrecedencyRight"] for row in rights)
    assert at_noon.rows(coId=str(shares[7]["CoID"])) == [shares[7]]
    assert at_noon.rows(coId=str(shares[7]["CoID"]), precedencyRight="true") == []
    assert at_noon.rows(coId="", fromTime="", toTime="") == shares


def test_minute_rows_of_one_company(at_noon: Caller) -> None:
    """With isTimePeriod the minutes of the day so far come back, within the times asked for."""
    share = max(at_noon.rows(), key=lambda row: row["TradeQty"])
    company = str(share["CoID"])
    rows = at_noon.rows(isTimePeriod="true", coId=company)
    minutes = [row["TradeDateGre"][11:16] for row in rows]
    assert minutes == sorted(set(minutes))
    assert rows[-1] == share
    some = at_noon.rows(isTimePeriod="true", coId=company, fromTime="1115", toTime="1129")
    assert some == [row for row in rows if "11:15" <= row["TradeDateGre"][11:16] <= "11:29"]
    assert some
    assert at_noon.rows(isTimePeriod="true", coId=company, precedencyRight="true") == []


def test_the_successor(at_noon: Caller) -> None:
    """Its path, scope, names and outcome; shares and rights in one answer, dates for times."""
    ours = [*at_noon.rows(), *at_noon.rows(precedencyRight="true")]
    path = "/bourse/v2/clients/practice/realTimeTrades"
    at_noon.refused(403, "FORBIDDEN", "bourse:realTime-trades:get", path=path)
    caller = Caller(at_noon.client, at_noon.practice)
    caller.token = caller.grant(scopes="bourse:realTime-trades:get")["value"]
    body = caller.call(path=path).json()
    assert body["status"] == "DONE"
    assert re.fullmatch(r"FN-[A-Z]{4}-200\d{8}", body["responseCode"])
    assert [(row["companyId"], row["precedencyRight"], row["tradeVolume"]) for row in body["result"]] == [
        (row["CoID"], row["PrecedencyRight"], row["TradeVolume"]) for row in ours
    ]
    assert {row["gregorianDate"] for row in body["result"]} == {"2019-08-21T00:00:00"}
    one = caller.rows(path=path, companyId=str(ours[0]["CoID"]))
    assert one == body["result"][:1]
    caller.refused(400, "VALIDATION_ERROR", "companyId", path=path, companyId="x")


def test_gzip_only_where_accepted(at_noon: Caller) -> None:
    """The body is compressed for who can read it, and is the same."""
    zipped = at_noon.call()
    at_noon.client.headers["accept-encoding"] = "gzip;q=0, identity"
    plain = at_noon.call()
    at_noon.client.headers["accept-encoding"] = "gzip"
    assert (zipped.headers.get("content-encoding"), plain.headers.get("content-encoding")) == ("gzip", None)
    assert zipped.json()["result"] == plain.json()["result"]


def test_calls_are_counted_and_timed(at_noon: Caller) -> None:
    """The state has how many calls would be charged and when each one's last byte was sent, by the system's clock."""
    calls, served, track_id, before = at_noon.practice.calls, at_noon.practice.served, uuid4().hex, time.time() * 1000
    at_noon.rows(trackId=track_id)
    at_noon.rows(precedencyRight="true")
    wait_for(lambda: track_id in at_noon.client.get("/practice/state").json()["sent"])
    state = at_noon.client.get("/practice/state").json()
    assert (state["calls"], state["served"]) == (calls + 2, served + 1)
    assert before <= state["sent"][track_id] <= time.time() * 1000
    assert (state["day_over"], state["responses"]) == (False, 98)
    assert datetime.fromisoformat(state["market_time"]) == NOON


def test_a_keep_alive_response_does_not_wait_for_an_acknowledgement(at_noon: Caller) -> None:
    """Small writes leave at once (TCP_NODELAY): without it every call would take the 40 ms of a delayed one."""
    took = []
    for _ in range(15):
        start = time.perf_counter()
        at_noon.rows(coId="999999")
        took.append(time.perf_counter() - start)
    assert sorted(took)[7] < 0.035  # the first few are acknowledged at once anyway


# --- clocks ---


def test_a_captured_day_by_poll() -> None:
    """Each accepted call for all shares moves on by one response, dated when it was received; the last is repeated."""
    with calling(practice_exchange("real", "poll")) as caller:
        times = PracticeMarket.load(REAL_DAY).times
        assert caller.rows(precedencyRight="true") == []
        dates, sizes = [], []
        for number in range(98):
            assert not caller.practice.state()["day_over"], number
            response = caller.call()
            dates.append(parsedate_to_datetime(response.headers["date"]))
            sizes.append(len(response.json()["result"]))
            caller.refused(400, "VALIDATION_ERROR", "trackId", trackId="-")  # a refused call does not move it
        assert dates == times
        assert (sizes[0], sizes[-1]) == (533, 548)
        assert caller.practice.state()["day_over"]
        last = caller.call()
        assert (parsedate_to_datetime(last.headers["date"]), len(last.json()["result"])) == (times[-1], 548)
        state = caller.client.get("/practice/state").json()
        assert (state["served"], state["responses"], state["calls"]) == (99, 98, 100)
        share = last.json()["result"][0]
        rows = caller.rows(isTimePeriod="true", coId=str(share["CoID"]), toTime="1130")
        assert rows
        assert all(row["TradeDateGre"] <= "2019/08/21 11:30:59" for row in rows)


def test_a_day_by_clock() -> None:
    """Rows remain until the next response's time; after the last one has been served the next day begins."""
    hand = Hand()
    market = PracticeMarket.load(REAL_DAY, days=None)
    with calling(PracticeExchange(market, MarketClock(market, 60, wall=hand))) as caller:
        first = caller.rows()
        assert caller.rows() == first
        hand.seconds = 10
        assert caller.rows() != first
        day = (market.times[-1] - market.times[0]).total_seconds() / 60
        hand.seconds = day + 1
        assert not caller.practice.state()["day_over"]
        assert len(caller.rows()) == 548
        assert caller.practice.state()["day_over"]
        assert caller.practice.state()["market_time"].startswith("2019-08-21T16:0")
        hand.seconds = day + 5.1
        assert {row["TradeDateGre"][:10] for row in caller.rows()} == {"2019/08/24"}
        assert not caller.practice.state()["day_over"]


def test_the_clock_of_one_day_goes_on_after_it() -> None:
    """Without a next day the evening has no end."""
    hand, market = Hand(), PracticeMarket.load(REAL_DAY)
    clock = MarketClock(market, wall=hand)
    assert clock.now() == market.times[0]
    hand.seconds = timedelta(days=1).total_seconds()
    assert clock.now() == market.times[0] + timedelta(days=1)


def test_a_poll_clock_stands_still() -> None:
    """Only polls move it; before the first it is just before the first response; days follow each other."""
    market = PracticeMarket.load(REAL_DAY, days=2)
    clock = PollClock(market)
    seen = [clock.now()]
    for _ in range(200):
        clock.polled()
        seen.append(clock.now())
    days = [market.times, [moment + timedelta(days=3) for moment in market.times]]
    assert seen == [market.times[0] - timedelta(seconds=1), *days[0], *days[1], *[days[1][-1]] * 4]


def test_it_can_speak_tls(tmp_path: Path) -> None:
    """With a private key and its certificate in one file; who does not trust it does not get an answer."""
    pem = self_signed(tmp_path / "exchange.pem")
    with practice_exchange().serve(tls=pem) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(pem))
        assert httpx2.get(f"{server.url}/practice/state", verify=trusting).json()["calls"] == 0
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx2.get(f"{server.url}/practice/state")


# --- the command ---


def test_a_port_that_is_taken() -> None:
    """The error names the port and the option."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"{port}.*port"):
            exchange.main(["--port", str(port)], standalone_mode=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(number: signal.Signals) -> None:
    """It prints its address, answers the practice account, and ends with 0."""
    options = ["--port", "0", "--advance", "poll"]
    code = "from bourse_sandbox.exchange import exchange; exchange()"
    command = [sys.executable, "-c", code, *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().split()[2]
            answer = httpx2.post(f"{url}/dev/v2/oauth2/token", auth=("practice", "practice"), json=CREDENTIALS)
            assert answer.status_code == 200
            child.send_signal(number)
            out, err = child.communicate(timeout=10)
            assert (child.returncode, out, err) == (0, "", "")
        finally:
            child.kill()
