"""The board's server on the bundled real day, without Kafka: JSON, CSV, server-sent events, and whom it answers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bourse_cli.health import Monitor
from bourse_consumers.board import server
from bourse_consumers.board.state import State
from bourse_sandbox.serving import serve
from bourse_schemas.events import AlertState
from tests.real_day import Feed, polls_of_day, serving
from tests.samples import SYMBOL, alert, event, letter, marker

FOLD = "IRO1FOLD0001"


@pytest.fixture
def feed() -> Feed:
    """Return a feed that has read the real day but for its last ten polls."""
    feed = Feed()
    feed.play(0, -10)
    return feed


@pytest.fixture
def url(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve it, with a frame every 50 ms, and give the URL."""
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)
    with serving(feed, hosts=["board.example"], root="/market", max_clients=2) as url:
        yield url


def snapshot(url: str) -> dict[str, Any]:
    """Return the snapshot."""
    return dict(httpx2.get(f"{url}/api/snapshot").raise_for_status().json())


def events(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the frames of a stream; a reset has no id."""
    number = 0
    for line in lines:
        if line.startswith("id: "):
            number = int(line[4:])
        elif line.startswith("data: "):
            yield number, json.loads(line[6:])
            number = 0


def test_the_snapshot_has_each_instrument_of_the_day_as_its_last_event_has_it(url: str, feed: Feed) -> None:
    """Prices are exact, instants are in milliseconds."""
    found = snapshot(url)
    last: dict[str, Any] = {}
    for _, these in polls_of_day()[:-10]:
        last |= {each.instrument: each for each in these}
    assert len(found["rows"]) == len(last)
    for values in found["rows"]:
        row, newest = dict(zip(found["columns"], values, strict=True)), last[values[0]]
        assert row["last_price"] == newest.last_price
        assert row["volume"] == newest.volume
        assert row["traded_at"] == newest.traded_at.timestamp() * 1000
    assert found["live"] is True
    assert found["polls"][-1]["poll_sequence"] == polls_of_day()[-11][0].poll_sequence
    assert found["polls"][-1]["simulated"] is True
    assert len(found["polls"]) == 60


def test_the_day_of_an_instrument_is_its_events_with_their_places(url: str) -> None:
    """Whole, or after a sequence; of what did not change today there is none."""
    mine = [each for _, these in polls_of_day()[:-10] for each in these if each.instrument == FOLD]
    found = httpx2.get(f"{url}/api/day/{FOLD}").json()
    changes = [dict(zip(found["columns"], values, strict=True)) for values in found["changes"]]
    assert [each["sequence"] for each in changes] == [each.sequence for each in mine]
    assert [each["volume_delta"] for each in changes] == [each.volume_delta for each in mine]
    assert changes[4]["partition"] == 2
    assert changes[4]["offset"] == 1005
    assert found["trading_day"] == "2019-08-21"
    assert list(found["poll_ids"]) == [str(each.poll_sequence) for each in mine[-20:]]
    later = httpx2.get(f"{url}/api/day/{FOLD}?after={mine[-2].sequence}").json()
    assert later["changes"] == found["changes"][-1:]
    assert httpx2.get(f"{url}/api/day/{FOLD}?after={'9' * 5000}").json() == found
    assert httpx2.get(f"{url}/api/day/IRO1NONE0001").status_code == 404


def test_the_poll_of_a_change_has_the_exchanges_id(feed: Feed, url: str) -> None:
    """The rights' call has one of its own."""
    feed.add(event(instrument="A", poll_sequence=9001, trading_day=feed.state.day))
    feed.add(event(instrument="B", poll_sequence=9001, trading_day=feed.state.day, is_right=True))
    feed.add(marker(9001, session_day=feed.state.day, poll_id="one", rights_poll_id="two"))
    with feed.lock:
        feed.state.settle(time.monotonic() + 10)
    assert httpx2.get(f"{url}/api/day/A").json()["poll_ids"] == {"9001": "one"}
    assert httpx2.get(f"{url}/api/day/B").json()["poll_ids"] == {"9001": "two"}


def test_the_shapes_of_the_json_are_in_the_manual(url: str, feed: Feed) -> None:
    """Each field of the snapshot and of an instrument's day, and each column of its changes, in docs/board.md."""
    page = (Path(__file__).parents[2] / "docs" / "board.md").read_text("utf-8")
    whole, day = page.split("\nThe snapshot is an object")[1].split("\n## ")[0].split("\nAn instrument's day is")
    found = httpx2.get(f"{url}/api/day/{FOLD}").json()
    for text, fields in ((whole, snapshot(url)), (day, found)):
        rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(fields)
    columns = next(line for line in day.splitlines() if line.startswith("| `columns`"))
    assert re.findall(r"`(\w+)`", columns)[1:] == found["columns"]


def test_csv_opens_in_a_spreadsheet(url: str, feed: Feed) -> None:
    """A BOM, Tehran's time, and names that begin like a formula are texts."""
    feed.add(event(instrument="EVIL", symbol="=1+1", title='@SUM(A1)"', trading_day=feed.state.day, last_price=-5))
    answer = httpx2.get(f"{url}/api/snapshot.csv")
    assert answer.content.startswith(b"\xef\xbb\xbfinstrument,")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = {row["instrument"]: row for row in csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig")))}
    assert rows["EVIL"]["symbol"] == "'=1+1"
    assert rows["EVIL"]["title"] == "'@SUM(A1)\""
    assert rows["EVIL"]["last_price"] == "-5"
    day = httpx2.get(f"{url}/api/day/{FOLD}.csv").content.decode("utf-8-sig")
    first = next(csv.DictReader(io.StringIO(day)))
    assert first["event_id"] == f"{FOLD}-20190821-1"
    assert first["observed_at"] == "2019-08-21 10:57:17"


def test_a_stream_goes_on_after_the_snapshot(url: str, feed: Feed) -> None:
    """Each poll is a frame with the rows that changed, and nothing comes twice."""
    after = snapshot(url)["id"]
    with httpx2.stream("GET", f"{url}/api/events?after={after}", timeout=10) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        frames = events(answer.iter_lines())
        this, those = polls_of_day()[-10]
        feed.add(*those, this)
        number, frame = next(pair for pair in frames if pair[1]["rows"])
        assert number > after
        assert {row[0] for row in frame["rows"]} == {each.instrument for each in those}
        assert [poll["poll_sequence"] for poll in frame["polls"]] == [this.poll_sequence]
        assert "alerts" not in frame
        feed.add(alert(alert_id="new", trading_day=feed.state.day))
        alerts = next(frame["alerts"] for _, frame in frames if "alerts" in frame)
        assert [(each["alert_id"], each["resolved_at"]) for each in alerts] == [("new", None)]
        feed.add(alert(alert_id="new", trading_day=feed.state.day, state=AlertState.RESOLVED))
        assert next(frame["alerts"] for _, frame in frames if "alerts" in frame)[0]["resolved_at"]


def test_compressed_frames_are_one_gzip_stream_whoever_joins_when(url: str, feed: Feed) -> None:
    """Blocks that were compressed once for all clients fit behind each other."""
    after = snapshot(url)["id"]
    headers = {"Accept-Encoding": "gzip", "Last-Event-ID": str(after)}
    with httpx2.stream("GET", f"{url}/api/events", headers=headers, timeout=10) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        inflate, text = zlib.decompressobj(31), ""
        raw = answer.iter_raw()
        for this, those in polls_of_day()[-10:-7]:
            feed.add(*those, this)
            while f'"poll_sequence":{this.poll_sequence},' not in text:
                text += inflate.decompress(next(raw)).decode()
    assert text.count("event: reset") == 0
    assert next(number for number, _ in events(iter(text.splitlines()))) == after + 1


@pytest.mark.parametrize("after", ["0", "99999999999999", "9" * 5000, "nonsense"])
def test_a_client_that_cannot_go_on_is_told_to_begin_again(url: str, after: str) -> None:
    """It was too long away, or its ids are of an earlier run."""
    with httpx2.stream("GET", f"{url}/api/events?after={after}", timeout=10) as answer:
        lines = (line for line in answer.iter_lines() if line and line[0] != ":")
        assert next(lines) == "event: reset"


def test_clients_begin_again_when_the_state_is_another_one(url: str, feed: Feed) -> None:
    """Topics were created again: what the page has means nothing."""
    after = snapshot(url)["id"]
    with httpx2.stream("GET", f"{url}/api/events?after={after}", timeout=10) as answer:
        lines = answer.iter_lines()
        with feed.lock:
            feed.state = State()
        feed.play(0, 1)
        assert next(line for line in lines if line.startswith("event: ")) == "event: reset"
    assert len(snapshot(url)["rows"]) == len(polls_of_day()[0][1])


def test_a_notice_comes_and_goes_and_is_in_the_last_frame(feed: Feed, tmp_path: Path) -> None:
    """A client that is connected when the board ends gets it, and the end of the stream; a bad file is no notice."""
    file, stop = tmp_path / "notice", threading.Event()
    publisher = server.Publisher(feed, Monitor("board"), notice=file, stop=stop)  # type: ignore[arg-type]
    with serve(server.application(publisher)) as served:
        assert snapshot(served.url)["notice"] is None
        after = snapshot(served.url)["id"]
        with httpx2.stream("GET", f"{served.url}/api/events?after={after}", timeout=20) as answer:
            frames = events(answer.iter_lines())
            file.write_text("سلام\nHello\n", "utf-8-sig")  # as Windows writes it
            assert next(frame for _, frame in frames if frame["notice"])["notice"] == {"fa": "سلام", "en": "Hello"}
            assert snapshot(served.url)["notice"] == {"fa": "سلام", "en": "Hello"}
            file.write_bytes(b"\xff\xfe")
            assert next(frame for _, frame in frames if not frame["notice"])["notice"] is None
            file.write_text("Bye", "utf-8")
            stop.set()
            assert [frame["notice"] for _, frame in frames][-1] == {"fa": "Bye", "en": "Bye"}


def test_a_board_that_cannot_make_a_frame_does_not_go_on(
    feed: Feed, wait_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages would not change any more, and nobody would notice."""
    publisher = server.Publisher(feed, Monitor("board"))  # type: ignore[arg-type]
    feed.failed = None
    with serve(server.application(publisher)) as served:
        assert snapshot(served.url)["live"] is True
        monkeypatch.setattr(publisher, "tick", lambda _: 1 / 0)
        wait_for(lambda: isinstance(feed.failed, ZeroDivisionError))


def test_what_an_operator_needs_is_in_the_metrics(
    url: str, feed: Feed, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Clients, refusals, frames, rebuilds and the age of the newest poll; docs/board.md explains each."""

    def metric(name: str) -> float:
        text = httpx2.get(f"{url}/metrics").text
        return float(re.search(rf"^bourse_board_{name} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    with ExitStack() as stack:
        streams = [stack.enter_context(httpx2.stream("GET", f"{url}/api/events", timeout=10)) for _ in range(2)]
        lines = [stream.iter_lines() for stream in streams]
        assert [next(each) for each in lines] == ["event: reset"] * 2
        assert httpx2.get(f"{url}/api/events").status_code == 503
        assert [metric("clients"), metric("refused_clients_total")] == [2, 1]
    wait_for(lambda: metric("clients") == 0)
    frames = metric("frames_total")
    assert metric("rebuilds_total") == 0
    with feed.lock:
        feed.state = State()
    wait_for(lambda: metric("rebuilds_total") == 1 and metric("frames_total") > frames)
    assert math.isnan(metric("poll_age_seconds"))
    feed.play(0, 1)
    assert 0 <= metric("poll_age_seconds") < 60
    page = (Path(__file__).parents[2] / "docs" / "board.md").read_text("utf-8")
    kinds = [family for each in vars(Monitor("board").board).values() for family in each.describe()]
    rows = [f"| `{kind.name + '_total' * (kind.type == 'counter')}` | {kind.documentation} |" for kind in kinds]
    assert re.findall(r"^\| `bourse_board_.*$", page, re.MULTILINE) == rows


def test_more_clients_than_allowed_are_refused(url: str, wait_for: Callable[..., Any]) -> None:
    """With 503 and a time to come back; when one leaves, another may come."""
    with ExitStack() as stack:
        streams = [stack.enter_context(httpx2.stream("GET", f"{url}/api/events", timeout=10)) for _ in range(2)]
        lines = [stream.iter_lines() for stream in streams]
        assert [next(each) for each in lines] == ["event: reset"] * 2
        refused = httpx2.get(f"{url}/api/events")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "10"

    def joins() -> bool:
        with httpx2.stream("GET", f"{url}/api/events", timeout=10) as answer:
            return answer.status_code == 200

    wait_for(joins)


def test_only_names_that_are_ours_are_answered(url: str) -> None:
    """A name of somebody else that points here could read everything; probes are asked by address."""
    for host, status in {
        "evil.example": 400,
        "board.example": 200,
        "BOARD.example:8090": 200,
        "localhost": 200,
        "[::1]": 200,
        "[::1]:8090": 200,
        "[::2]": 400,
    }.items():
        assert httpx2.get(f"{url}/api/snapshot", headers={"Host": host}).status_code == status
    for probe in ("/livez", "/readyz", "/metrics"):
        assert httpx2.get(url + probe, headers={"Host": "10.1.2.3"}).status_code in {200, 503}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_nothing_but_get_is_answered(url: str, method: str) -> None:
    """Nothing can be changed here."""
    answer = httpx2.request(method, f"{url}/api/snapshot")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


def test_every_answer_keeps_the_browser_here(url: str) -> None:
    """Refusals too."""
    for path, host in (
        ("/", "localhost"),
        ("/page/board.js", "localhost"),
        ("/", "evil.example"),
        ("/no", "localhost"),
    ):
        headers = httpx2.get(url + path, headers={"Host": host}).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_a_path_of_the_proxy_is_ours_too(url: str) -> None:
    """Whether the proxy strips it or not."""
    assert httpx2.get(f"{url}/market/api/snapshot").status_code == 200
    moved = httpx2.get(f"{url}/market")
    assert (moved.status_code, moved.headers["location"]) == (307, "/market/")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--http", "[::1]:0"], "the HTTP server ended"),
        (["--http", "0", "--root-path", "market"], "--root-path market: begin it with /, as in /market"),
    ],
)
def test_the_command_fails_if_it_does_not_serve(options: list[str], message: str) -> None:
    """Whether its server ended or could not be as asked; addresses that it prints can be opened."""
    ends = "import uvicorn; uvicorn.Server.run = lambda *_, **__: None; from bourse_cli.root import main; main()"
    command = [sys.executable, "-c", ends, "board", "--bootstrap-servers", "127.0.0.1:9", *options]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode in {1, 2}
    assert message in ended.stderr
    assert ("http://[::1]:" in ended.stderr) == ("[::1]:0" in options)


def test_no_address_of_a_broker_is_in_an_answer(url: str, feed: Feed) -> None:
    """Troubles are words; what they are in detail is in the log and on the terminal."""
    with feed.lock:
        feed.state.trouble("kafka", "Kafka at broker-7.internal:9092 does not answer")
    feed.add(letter())
    found = snapshot(url)
    assert found["troubles"] == ["kafka"]
    assert found["last_letter"]["reason"] == "INVALID_VALUE"
    assert "internal" not in json.dumps(found)


def test_hostile_names_come_as_they_are_and_as_json(url: str, feed: Feed) -> None:
    """The page shows them as text; here they are strings."""
    hostile = "<script>alert(1)</script>\u202e" + SYMBOL
    feed.add(event(instrument="EVIL", symbol=hostile, trading_day=feed.state.day))
    assert next(row for row in snapshot(url)["rows"] if row[0] == "EVIL")[1] == hostile
