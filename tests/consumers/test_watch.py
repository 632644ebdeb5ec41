"""The screen and the lines of `bourse watch`, and that they stay inside any terminal."""

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
from typing import Any

import httpx2
import pytest
from confluent_kafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bourse_consumers.board.state import Group, Located, State
from bourse_consumers.watch import line_of, render
from bourse_sandbox.kafka import Kafka
from bourse_schemas.codec import Serializer, schema_text
from bourse_schemas.events import AlertState, Event, FeedState, Outcome, Phase, Scope
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.topics import CANDLES, POLLS, TOPICS, TRADES
from tests.samples import AT, alert, event, letter, marker

Publish = Callable[..., None]


def live_state() -> State:
    """Return a state that has something of everything."""
    state = State()
    for number in range(40):
        change = (-1) ** number * number
        state.add(Located(event(instrument=f"IRO1A{number:03}0001", last_price=1000 + change, sequence=2), 0, 0), 0.0)
    state.add(marker(1), 0.0)
    state.go_live(0.0)
    state.add(alert(alert_id="first"), 1.0)
    state.add(alert(alert_id="second", scope=Scope.MARKET, instrument=None, symbol=None), 1.0)
    state.add(alert(alert_id="first", state=AlertState.RESOLVED, raised_at=AT.replace(minute=12)), 1.0)
    state.add(letter(), 1.0)
    state.add(marker(2, opened=0, traded=0, revised=0, cancelled=0), 1.0)
    state.settle(1.0)
    state.groups = [Group("alerts", True, 0), Group("archive", False, 12_345)]
    return state


def screen(state: State, width: int = 120, height: int = 40, now: float = 2.0) -> str:
    """Return the screen as text."""
    return "\n".join(line.plain for line in render(state, width, height, now))


def test_the_header_shows_what_does_not_work_then_feed_totals_and_lag() -> None:
    """What an operator needs first is at the top."""
    state = live_state()
    state.undecodable = 3
    failed = {
        "outcome": Outcome.FAILED,
        "feed_state": FeedState.DOWN,
        "error_kind": "provider",
        "error_message": "x\ny",
    }
    state.add(marker(3, opened=0, traded=0, revised=0, cancelled=0, simulated=True, **failed), 1.5)
    state.settle(1.5)
    state.trouble("kafka", "no answer")
    text = screen(state)
    for part in (
        "kafka: no answer",
        "SIMULATED  OPEN  DOWN  Sat 2019-08-24 09:33:00  poll 3 FAILED  0 s ago",
        "provider: x y",
        "traded 100",
        "dead letters 1 (INVALID_VALUE 09:30:00)",
        "alerts 0  archive 12,345 (stopped)",
        "undecodable 3",
    ):
        assert part in text
    state.trouble("kafka", None)
    assert "kafka" not in screen(state)


@pytest.mark.parametrize("width", [80, 160])
def test_open_alerts_come_first_with_rule_and_value(width: int) -> None:
    """At both usual widths; what was resolved is after what is open, and values are not cut."""
    lines = screen(live_state(), width).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("1 open"))
    first, second = lines[start + 1], lines[start + 2]
    assert first.startswith("09:30:00")
    assert "MARKET" in first
    assert "fast" in first
    assert " 3.20% fast: percent(last_pric" in first
    assert "IRO1MADN0001" in second
    assert "12 min" in second
    assert "rule: quantity" in lines[start]
    assert start < next(number for number, line in enumerate(lines) if "most up" in line) or width == 160


def test_after_the_close_the_screen_has_the_days_summary() -> None:
    """While the market is closed the day is what there is to show."""
    state = live_state()
    assert "summary of" not in screen(state)
    state.add(marker(3, phase=Phase.AFTER_CLOSE, opened=0, traded=0, revised=0, cancelled=0), 2.0)
    state.settle(2.0)
    assert "summary of 2019-08-24" in screen(state, 40, 24)


def test_silence_is_on_the_screen() -> None:
    """Instead of the newest poll's age."""
    state = live_state()
    assert "no poll for" not in screen(state, now=60.0)
    assert "no poll for 4 min" in screen(state, now=270.0)


def test_lines_without_a_terminal_begin_with_the_newest_poll() -> None:
    """The backlog makes no lines, but for its end."""
    state = State()
    state.add(marker(1), 0.0)
    state.add(alert(), 0.0)
    state.add(marker(2), 0.0)
    state.go_live(0.0)
    state.add(alert(alert_id="b"), 0.0)
    first, second = (line_of(state, news) for news in state.news)
    assert first.startswith("2019-08-24 09:32:00 OPEN FRESH poll 2 PUBLISHED; 500 rows, 10 opened, 100 traded")
    assert second.startswith(
        "09:30:00 FIRING IRO1MADN0001 percent(last_price, 5m) 3.20%; fast; percent(last_price, 5m) >= 3; "
    )


@pytest.mark.parametrize(
    ("values", "name", "value"),
    [
        ({"abs(percent(last_price, 5m))": 3.2, "volume": 1.0}, "abs(percent(last_price, 5m))", "3.20%"),
        ({"silent": 240.0}, "silent", "240.00 s"),
        ({"quiet": 3600.0}, "quiet", "3.6K s"),
        ({"change(volume, 5m)": 12_345_678.0}, "change(volume, 5m)", "12.3M"),
    ],
)
def test_a_value_has_the_name_and_the_unit_of_its_quantity(values: dict[str, float], name: str, value: str) -> None:
    """Percent and seconds; prices and counts have none. On a wide screen the name is whole."""
    state = live_state()
    state.add(alert(alert_id="third", values=values), 3.0)
    assert line_of(state, state.news[-1]).startswith(f"09:30:00 FIRING IRO1MADN0001 {name} {value}; fast; ")
    assert f" {value:>8} fast: {name} " in screen(state, 139)


def test_an_alert_without_values_has_its_rule_alone() -> None:
    """Everything that the rule compares may be unknown by its end."""
    state = live_state()
    state.add(alert(alert_id="third", values={}), 3.0)
    assert line_of(state, state.news[-1]).startswith("09:30:00 FIRING IRO1MADN0001 fast; percent")
    assert f"IRO1MADN0001 {'':>8} fast  " in screen(state, 139)


@pytest.mark.parametrize("state", [State(), live_state()], ids=["empty", "full"])
@pytest.mark.parametrize("width", [10, 40, 79, 80, 139, 140, 160, 300])
@pytest.mark.parametrize("height", [1, 5, 10, 24, 60])
def test_the_screen_fits_every_terminal(state: State, width: int, height: int) -> None:
    """No line is wider, and none more, than the terminal has."""
    lines = render(state, width, height, 2.0)
    assert len(lines) <= height
    assert max(cell_len(line.plain) for line in lines) <= width


def test_a_row_has_code_percent_price_volume_value_and_symbol() -> None:
    """At 80 columns there is room for all of it."""
    (row,) = [line for line in screen(live_state(), 80, 60).splitlines() if line.startswith("IRO1A0380001")]
    assert row == "IRO1A0380001   +3.80     1,038  1.23M  1.27B \u200eسرمایه\u200cگذاری\u200e"


@pytest.mark.parametrize("width", [40, 50, 62])
def test_a_narrow_screen_keeps_what_matters_most(width: int) -> None:
    """Instrument, percent, price and symbol; of an alert its time, instrument and value: whole, and no half columns."""
    lines = screen(live_state(), width, 60).splitlines()
    assert next(line for line in lines if line.startswith("IRO1A0380001")).startswith(
        "IRO1A0380001   +3.80     1,038 \u200eسرمایه"[: width - 1]
    )
    start = next(number for number, line in enumerate(lines) if line.startswith("1 open"))
    assert lines[start].startswith("1 open   instrument      value symbol")
    assert [line.split()[:3] for line in lines[start + 1 : start + 3]] == [
        ["09:30:00", "MARKET", "3.20%"],
        ["09:30:00", "IRO1MADN0001", "3.20%"],
    ]


def test_persian_text_is_last_in_its_column_and_closed_by_marks() -> None:
    """If a terminal reorders, neither the border nor the next column's numbers may join a Persian run."""
    state = live_state()
    for width in (80, 120, 200):
        for line in screen(state, width).splitlines():
            for cell in line.replace(" │ ", "\n").splitlines():
                if "سر" in cell:
                    assert cell.rstrip().endswith("\u200e")
                    assert cell.count("\u200e") == 2


@given(st.text(max_size=80), st.integers(40, 200))
def test_foreign_text_cannot_steer_the_terminal(text: str, width: int) -> None:
    """Names and messages come from outside: no control or direction character reaches the screen."""
    state = State()
    state.add(Located(event(symbol=text), 0, 0), 0.0)
    state.add(marker(1, error_kind="provider", error_message=text), 0.0)
    state.go_live(0.0)
    state.add(alert(symbol=None, rule=text, when=text), 0.0)
    state.trouble("registry", text)
    lines = render(state, width, 40, 0.0)
    assert max(cell_len(line.plain) for line in lines) <= width
    shown = "".join(line.plain for line in lines) + "".join(line_of(state, news) for news in state.news)
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
    """The newest poll of what was there, then each as it comes; SIGTERM ends it."""
    process, line = lines
    one = {"opened": 0, "traded": 1, "revised": 0, "cancelled": 0}
    publish(event(), marker(1, **one), alert(), letter())
    assert next(line).startswith("2019-08-24 09:31:00 OPEN FRESH poll 1 PUBLISHED")
    publish(event(sequence=2, poll_sequence=2), marker(2, **one))
    assert next(line).startswith("2019-08-24 09:32:00 OPEN FRESH poll 2 PUBLISHED; 500 rows")
    publish(alert(alert_id="b"))
    assert " FIRING IRO1MADN0001 percent(last_price, 5m) 3.20%; fast; " in next(line)
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
def test_a_cluster_that_is_not_there_is_reported(command: list[str]) -> None:
    """One line, exit 2."""
    done = subprocess.run(
        [*command, "--bootstrap-servers", "127.0.0.1:1"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert "--bootstrap-servers" in done.stderr
