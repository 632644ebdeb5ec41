"""The view of `bourse watch`: what it adds up, what it shows, and that it stays inside any terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx2
import msgspec
import pytest
from confluent_kafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bourse_consumers.watch import Group, View, groups_of, render, summary
from bourse_sandbox.kafka import Kafka
from bourse_schemas.codec import Serializer, schema_text
from bourse_schemas.events import (
    AlertState,
    DeadLetter,
    Event,
    FeedState,
    Op,
    Outcome,
    Phase,
    PollMarker,
    PriceAlert,
    Reason,
    Scope,
    Severity,
    Stage,
    TradeEvent,
)
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import GroupLag, read
from bourse_schemas.topics import CANDLES, POLLS, TOPICS, TRADES

Publish = Callable[..., None]
DAY = date(2019, 8, 24)
AT = datetime(2019, 8, 24, 5, 0, tzinfo=UTC)  # 09:30 in Tehran, which had summer time then
SYMBOL = "سرمایه\u200cگذاری"


def event(**changes: Any) -> TradeEvent:
    """Return a TradeEvent, up by 2.5 percent."""
    base = TradeEvent(
        event_id="IRO1MADN0001-20190824-1",
        op=Op.TRADED,
        instrument="IRO1MADN0001",
        sequence=1,
        trading_day=DAY,
        traded_at=AT,
        traded_at_estimated=False,
        observed_at=AT,
        poll_sequence=1,
        source="finnotech/trades-realtime",
        symbol=SYMBOL,
        symbol_raw=SYMBOL,
        title=SYMBOL,
        is_right=False,
        open_price=1000,
        last_price=1025,
        previous_close=1000,
        volume=1_234_567,
        value=1_265_431_175,
        trade_count=321,
        volume_delta=1200,
        value_delta=1_230_000,
        trade_count_delta=3,
        last_price_delta=5,
    )
    return msgspec.structs.replace(base, **changes)


def marker(sequence: int, **changes: Any) -> PollMarker:
    """Return the marker of a poll, a minute after the one before it."""
    at = AT + timedelta(minutes=sequence)
    base = PollMarker(
        poll_sequence=sequence,
        source="finnotech/trades-realtime",
        outcome=Outcome.PUBLISHED,
        phase=Phase.OPEN,
        feed_state=FeedState.FRESH,
        session_day=DAY,
        requested_at=at,
        received_at=at,
        next_poll_at=at + timedelta(seconds=60),
        day_final=False,
        rows=500,
        opened=10,
        traded=100,
        revised=2,
        cancelled=1,
        stale_rows=0,
        rejected_rows=0,
        duplicate_rows=0,
        charged_calls=1,
        simulated=False,
    )
    return msgspec.structs.replace(base, **changes)


def alert(**changes: Any) -> PriceAlert:
    """Return a firing alert."""
    base = PriceAlert(
        alert_id="a",
        state=AlertState.FIRING,
        rule="fast",
        severity=Severity.WARNING,
        scope=Scope.INSTRUMENT,
        trading_day=DAY,
        source="finnotech/trades-realtime",
        instrument="IRO1MADN0001",
        symbol=SYMBOL,
        poll_sequence=1,
        when="percent(last_price, 5m) >= 3",
        values={"percent(last_price, 5m)": 3.2},
        last_price=1025,
        since=AT,
        raised_at=AT,
        labels={},
        channels=[],
    )
    return msgspec.structs.replace(base, **changes)


def letter() -> DeadLetter:
    """Return a dead letter."""
    return DeadLetter(
        reason=Reason.INVALID_VALUE,
        message="a price with a fraction",
        stage=Stage.PARSE,
        origin="x",
        payload=b"",
        original_headers={},
        failed_at=AT,
    )


def test_a_market_consumer_runs_while_its_election_has_members() -> None:
    """Its own group has the offsets, and no members."""
    found = [
        GroupLag("bourse-alerts", 0, 0, None),
        GroupLag("bourse-alerts-election", 1, None, None),
        GroupLag("bourse-archive", 0, 7, 1),
    ]
    assert groups_of(found, "bourse-") == [Group("alerts", True, 0), Group("archive", False, 7)]


def live_view() -> View:
    """Return a view that has something of everything."""
    view = View()
    for number in range(40):
        change = (-1) ** number * number
        view.add(event(instrument=f"IRO1A{number:03}0001", last_price=1000 + change, sequence=2), 0.0)
    view.add(marker(1), 0.0)
    view.go_live(0.0)
    view.add(alert(), 1.0)
    view.add(alert(state=AlertState.RESOLVED, instrument=None, symbol=None), 1.0)
    view.add(letter(), 1.0)
    view.add(marker(2), 1.0)
    view.groups = [Group("alerts", True, 0), Group("archive", False, 12_345)]
    return view


def screen(view: View, width: int = 120, height: int = 40, now: float = 2.0) -> str:
    """Return the screen as text."""
    return "\n".join(line.plain for line in render(view, width, height, now))


def test_totals_are_those_of_the_markers_of_the_newest_session_day() -> None:
    """However late the view joins, the day's totals come whole from its markers."""
    view = View()
    view.add(marker(1, session_day=DAY - timedelta(days=1)), 0.0)
    view.add(marker(2), 0.0)
    view.add(marker(3, traded=50), 0.0)
    assert dict(view.totals) == {Op.OPENED: 20, Op.TRADED: 150, Op.REVISED: 4, Op.CANCELLED: 2}


def test_movers_are_by_previous_close_then_by_open_and_of_this_day_only() -> None:
    """Up and down are apart, and yesterday's candles are no movers."""
    view = View()
    view.add(marker(1), 0.0)
    view.add(event(instrument="UP"), 0.0)
    view.add(event(instrument="DOWN", previous_close=None, open_price=1250, last_price=1000), 0.0)
    view.add(event(instrument="SAME", last_price=1000), 0.0)
    view.add(event(instrument="OLD", trading_day=DAY - timedelta(days=1)), 0.0)
    view.add(event(instrument="UNKNOWN", previous_close=None, open_price=None), 0.0)
    up, down = view.movers(5)
    assert [(candle.instrument, change) for change, candle in up] == [("UP", 2.5)]
    assert [(candle.instrument, change) for change, candle in down] == [("DOWN", -20.0)]


def test_an_older_change_does_not_replace_a_newer_candle() -> None:
    """Candles and events come from different partitions, in any order."""
    view = View()
    view.add(event(sequence=9, last_price=900), 0.0)
    view.add(event(sequence=8), 0.0)
    assert view.candles["IRO1MADN0001"].last_price == 900


def test_rate_leaves_the_backlog_out() -> None:
    """Events per second are those that came while we watched, over one interval of polls."""
    view = View()
    view.add(event(), 0.0)
    view.add(marker(1), 0.0)
    assert view.rate(0.0) == 0.0
    view.go_live(0.0)
    for _ in range(120):
        view.add(event(), 30.0)
    assert view.rate(60.0) == 2.0
    assert view.rate(95.0) == 0.0


def test_silence_is_measured_by_our_clock_and_the_markers_own_interval() -> None:
    """Years between the market's clock and ours do not matter, the time since the last marker does."""
    view = View()
    view.add(marker(1), 0.0)
    view.go_live(0.0)
    assert view.silent(100.0) is None
    assert view.silent(126.0) == 126.0
    view.add(marker(2), 130.0)
    assert view.silent(200.0) is None
    assert "no poll for" not in screen(view, now=200.0)
    assert "no poll for 4 min" in screen(view, now=400.0)
    view.tell_silence(400.0)
    view.tell_silence(401.0)
    assert len([line for line in view.news if line.startswith("no poll for")]) == 1
    view.add(marker(3, day_final=True, next_poll_at=AT + timedelta(hours=15)), 500.0)
    assert view.silent(53_000.0) is None
    assert "no poll for 15 h" in screen(view, now=500.0 + 15 * 3600)


def test_the_header_tells_freshness_lag_totals_and_errors() -> None:
    """What an operator looks for first stands at the top."""
    view = live_view()
    view.undecodable = 3
    failed = {
        "outcome": Outcome.FAILED,
        "feed_state": FeedState.DOWN,
        "error_kind": "provider",
        "error_message": "x\ny",
    }
    view.add(marker(3, **failed), 1.5)
    view.trouble("kafka", "no answer")
    text = screen(view)
    for part in (
        "kafka: no answer",
        "OPEN  DOWN  Sat 2019-08-24 09:33:00  poll 3 FAILED  0 s ago",
        "provider: x y",
        "traded 300",
        "dead letters 1 (INVALID_VALUE 09:30:00)",
        "alerts 0  archive 12,345 (stopped)  undecodable 3",
        "● FIRING",
    ):
        assert part in text
    view.trouble("kafka", None)
    assert "kafka" not in screen(view)


def test_the_close_shows_and_tells_a_summary_once() -> None:
    """At the close comes a summary of the day; the next day begins from nothing."""
    view = live_view()
    assert "summary" not in screen(view)
    view.news.clear()
    view.add(marker(3, phase=Phase.AFTER_CLOSE), 2.0)
    view.add(marker(4, phase=Phase.AFTER_CLOSE), 3.0)
    told = [line for line in view.news if "summary of 2019-08-24" in line]
    assert len(told) == 1
    for part in (
        "30 opened",
        "300 traded",
        "40 instruments: 19 up, 20 down",
        "IRO1A0380001 +3.80 %",
        "1 fired, 1 resolved",
    ):
        assert part in told[0]
    assert "summary of 2019-08-24" in screen(view, 40, 24)
    view.add(marker(5, session_day=DAY + timedelta(days=2)), 4.0)
    assert "summary of" not in "".join(list(view.news)[-1:])
    assert view.totals[Op.TRADED] == 100
    assert "0 instruments: 0 up, 0 down" in summary(view)


def test_a_close_that_was_missed_is_summed_up_at_the_next_day() -> None:
    """The day changes without a marker of its close: a producer that was down."""
    view = live_view()
    view.add(marker(3, session_day=DAY + timedelta(days=2)), 2.0)
    assert [line for line in view.news if line.startswith("summary of 2019-08-24")]
    assert "summary of 2019-08-24" in screen(view, now=5.0)
    assert "summary of" not in screen(view, now=15.0)


def test_lines_without_a_terminal_begin_with_the_newest_poll() -> None:
    """The backlog is not told, but for its end."""
    view = View()
    view.add(marker(1), 0.0)
    view.add(alert(), 0.0)
    view.add(marker(2), 0.0)
    view.go_live(0.0)
    view.add(alert(), 0.0)
    first, second = view.news
    assert first.startswith("2019-08-24 09:32:00 OPEN FRESH poll 2 PUBLISHED; 500 rows, 10 opened, 100 traded")
    assert second.startswith("09:30:00 FIRING IRO1MADN0001 3.2; fast; percent(last_price, 5m) >= 3; ")


@pytest.mark.parametrize("view", [View(), live_view()], ids=["empty", "full"])
@pytest.mark.parametrize("width", [10, 40, 41, 79, 80, 109, 110, 164, 165, 200, 300])
@pytest.mark.parametrize("height", [1, 5, 10, 24, 60])
def test_the_screen_fits_every_terminal(view: View, width: int, height: int) -> None:
    """No line is wider, and none more, than the terminal has."""
    lines = render(view, width, height, 2.0)
    assert len(lines) <= height
    assert max(cell_len(line.plain) for line in lines) <= width


def test_narrow_terminals_keep_code_percent_price_and_symbol() -> None:
    """At 40 columns there is room for what matters."""
    (row,) = [line for line in screen(live_view(), 40, 30).splitlines() if line.startswith("IRO1A0380001")]
    assert row == "IRO1A0380001   +3.80     1,038 \u200eسرمایه\u200cگذ…\u200e"


def test_persian_text_is_last_in_its_column_and_closed_by_marks() -> None:
    """Where a terminal reorders, neither the border nor the next column's numbers may join a Persian run."""
    view = live_view()
    for width in (80, 120, 200):
        for line in screen(view, width).splitlines():
            left = line.replace(" │ ", "\n").splitlines()
            for cell in left:
                if "سر" in cell:
                    assert cell.rstrip().endswith("\u200e")
                    assert cell.count("\u200e") == 2


@given(st.text(max_size=80), st.integers(40, 200))
def test_foreign_text_cannot_steer_the_terminal(text: str, width: int) -> None:
    """Names and messages come from outside: no control or direction character reaches the screen."""
    view = View()
    view.add(event(symbol=text), 0.0)
    view.add(marker(1, error_kind="provider", error_message=text), 0.0)
    view.go_live(0.0)
    view.add(alert(symbol=None, rule=text, when=text), 0.0)
    view.trouble("registry", text)
    lines = render(view, width, 40, 0.0)
    assert max(cell_len(line.plain) for line in lines) <= width
    shown = "".join(line.plain for line in lines) + "".join(view.news)
    assert all(character.isprintable() or character in "\u200c\u200e" for character in shown)


# --- real Kafka -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return a cluster that has our topics, under a prefix of the test's own."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    config = {"message.timestamp.after.max.ms": str(2**63 - 1), "retention.ms": "-1"}
    from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # missing in its __all__

    topics = [NewTopic(topic.full_name(prefix), topic.partitions, 1, config=config) for topic in TOPICS]
    admin = cluster.admin()
    for created in admin.create_topics(topics).values():
        created.result(10)
    return cluster


@pytest.fixture
def publish(cluster: Cluster) -> Publish:
    """Return `publish(*events)`: one transaction; the schemas are registered."""
    serializers = {}
    for topic in TOPICS:
        subject = f"{cluster.registry_url}/subjects/{topic.subject(cluster.prefix)}/versions"
        answer = httpx2.post(subject, json={"schema": schema_text(topic.event)}).raise_for_status()
        serializers[topic.event] = Serializer[Any](topic, answer.json()["id"], cluster.prefix)
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(30)

    def publish(*events: Event) -> None:
        producer.begin_transaction()
        for each in events:
            record = serializers[type(each)](each)
            producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        producer.commit_transaction()

    return publish


@pytest.fixture
def command(cluster: Cluster) -> list[str]:
    """Return the command line of `bourse watch` for this cluster."""
    return [
        *(sys.executable, "-c", "from bourse_cli.root import main; main()", "watch"),
        *("--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url),
        *("--topic-prefix", cluster.prefix),
    ]


@pytest.fixture
def lines(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """Run `bourse watch` without a terminal; give the process and its lines."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, iter(process.stdout or ())
        finally:
            process.kill()


def _read_all(cluster: Cluster, group: str) -> None:
    """Read every trade as a group would, and commit the position after the last one."""
    topic = TRADES.full_name(cluster.prefix)
    ends = {record.place: record.offset + 1 for record in read(cluster, topic)}
    with closing(cluster.consumer(group)) as consumer:
        consumer.commit(offsets=[TopicPartition(*place, end) for place, end in ends.items()], asynchronous=False)


@pytest.mark.kafka
def test_without_a_terminal_polls_and_alerts_are_lines(
    publish: Publish, cluster: Cluster, lines: tuple[subprocess.Popen[str], Iterator[str]]
) -> None:
    """The newest poll of what was there, then each as it comes; SIGTERM ends it well."""
    process, line = lines
    publish(event(), marker(1), alert(), letter())
    assert next(line).startswith("2019-08-24 09:31:00 OPEN FRESH poll 1 PUBLISHED")
    publish(event(sequence=2), marker(2))
    assert next(line).startswith("2019-08-24 09:32:00 OPEN FRESH poll 2 PUBLISHED; 500 rows")
    publish(alert())
    assert " FIRING IRO1MADN0001 3.2; fast; " in next(line)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert process.stderr
    assert process.stderr.read() == ""


@pytest.mark.kafka
def test_a_terminal_gets_a_screen_and_is_left_clean(
    publish: Publish, cluster: Cluster, command: list[str], wait_for: Callable[..., Any]
) -> None:
    """On a terminal of 100 columns: state, movers, a group without lag, an undecodable record; Ctrl-C leaves.

    A tombstone, which takes an instrument out of the candles, is none.
    """
    publish(event(), marker(1), alert(), letter())
    publish(event(sequence=2), marker(2))
    _read_all(cluster, f"{cluster.prefix}-alerts")
    _read_all(cluster, f"{cluster.prefix}-archive")
    publish(event(sequence=3), event(sequence=4), marker(3))
    _read_all(cluster, f"{cluster.prefix}-alerts")
    producer = cluster.transactional_producer(f"{cluster.prefix}-bad")
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(POLLS.full_name(cluster.prefix), b"no Avro")
    producer.produce(CANDLES.full_name(cluster.prefix), None, b"IRO1MADN0001")
    producer.commit_transaction()
    terminal, theirs = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    try:
        seen = ""

        def shows(*parts: str) -> bool:
            nonlocal seen
            seen += os.read(terminal, 65536).decode(errors="replace")
            return all(part in seen for part in parts)

        wait_for(lambda: shows("poll 3 PUBLISHED", "alerts 0 (stopped)  archive 3 (stopped)", "undecodable 1"), 20)
        assert "undecodable 2" not in seen
        process.send_signal(signal.SIGINT)
        wait_for(lambda: shows("\x1b[?1049h", "\x1b[?25h\x1b[?1049l"))
        assert "\x1b[3" not in seen, "colour in spite of NO_COLOR"
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(theirs)
        os.close(terminal)


@pytest.mark.kafka
def test_missing_topics_name_the_command_that_creates_them(command: list[str]) -> None:
    """One line, exit 2."""
    done = subprocess.run([*command[:-1], "nothere"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "bourse topics apply" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.kafka
def test_a_cluster_that_is_not_there_ends_within_ten_seconds(command: list[str]) -> None:
    """One line, exit 2."""
    done = subprocess.run(
        [*command, "--bootstrap-servers", "127.0.0.1:1"], capture_output=True, text=True, timeout=10, check=False
    )
    assert done.returncode == 2
    assert "--bootstrap-servers" in done.stderr
