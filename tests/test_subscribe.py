"""What docs/subscribe.md promises: its rows are those of a real day, its numbers the code's, its recipe runs."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]  # not in its __all__

from bourse_cli.topics import apply_topics, plan_topics
from bourse_producer.replay import Replay
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import spawn
from bourse_schemas.codec import avro_schema
from bourse_schemas.events import Candle, FeedState, Op, Outcome, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import CANDLES, TOPICS, TRADES

PAGE = (Path(__file__).parent.parent / "docs" / "subscribe.md").read_text("utf-8")
TABLE = re.compile(r"^\|(.*)\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", re.MULTILINE)


def cells(line: str) -> list[str]:
    """Return a table row's cells, backquotes taken off."""
    return [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]


TABLES = [(cells(head), [cells(row) for row in rows.splitlines()]) for head, rows in TABLE.findall(PAGE)]


def rows_under(*head: str) -> list[list[str]]:
    """Return the rows of the tables with this head."""
    return [row for found, rows in TABLES if found[: len(head)] == list(head) for row in rows]


@pytest.fixture(scope="module")
def events() -> Sequence[TradeEvent]:
    """Return the day that ships with the sandbox."""
    replay = Replay()
    replay.day(REAL_DAY)
    return replay.events


def shown(event: TradeEvent, columns: Sequence[str]) -> list[str]:
    """Return an event's fields as the page writes them."""
    values = msgspec.to_builtins(event)
    return ["null" if values[column] is None else str(values[column]) for column in columns]


@pytest.mark.parametrize(("instrument", "op"), [("IRO1DSOB0001", Op.CANCELLED), ("IRO3CHRZ0001", Op.REVISED)])
def test_the_worked_examples_are_of_the_real_day(events: Sequence[TradeEvent], instrument: str, op: Op) -> None:
    """Row by row, under the instrument's ticker."""
    day = {str(event.sequence): event for event in events if event.instrument == instrument}
    section = PAGE[PAGE.index(f"({instrument})") :].split("\n#", 1)[0]
    assert f"{day['1'].symbol} ({instrument})" in PAGE
    ((head, table),) = TABLE.findall(section)
    columns, rows = cells(head), [cells(row) for row in table.splitlines()]
    assert rows == [shown(day[row[0]], columns) for row in rows]
    assert op.value in {row[1] for row in rows}


def test_the_words_about_the_annulled_trade_are_true(events: Sequence[TradeEvent]) -> None:
    """Prices per share, the day's end, and that deltas add up."""
    day = [event for event in events if event.instrument == "IRO1DSOB0001"]
    for sequence in (49, 50, 51):
        event = day[sequence - 1]
        assert f"{event.value_delta // event.volume_delta:,}" in PAGE
        assert event.value_delta % event.volume_delta == 0
    last = day[-1]
    assert f"{last.volume:,} shares in {last.trade_count:,} trades" in re.sub(r"\s+", " ", PAGE)
    assert f"all {len(day)} events" in PAGE
    for total in ("volume", "value", "trade_count"):
        assert sum(getattr(event, f"{total}_delta") for event in day) == getattr(last, total)
    assert f"`{day[49].event_id}`" in PAGE


def test_how_late_is_as_measured(events: Sequence[TradeEvent]) -> None:
    """Half of the day's events, and 95 of 100."""
    late = sorted((event.observed_at - event.traded_at).total_seconds() for event in events if event.op != Op.OPENED)
    half, most = late[len(late) // 2], late[len(late) * 95 // 100]
    words = f"arrived within {half:.0f} seconds of the trade, 95 of 100 within {most:.0f} seconds"
    assert words in re.sub(r"\s+", " ", PAGE)


def test_topics_are_as_declared() -> None:
    """Partitions and retention."""
    days = {None: "the latest of each key, without end", 30 * 86_400_000: "30 days"}
    declared = [
        [topic.full_name(), topic.event.__name__, topic.cleanup, str(topic.partitions), days[topic.retention_ms]]
        for topic in TOPICS
    ]
    assert [[row[0], *row[2:6]] for row in rows_under("topic")] == declared


def test_every_symbol_is_explained() -> None:
    """Each kind of change, each outcome, each state of the feed; and fields that are named exist."""
    assert {row[0].split(",")[0] for row in rows_under("op")} == {op.value for op in Op}
    outcomes = {match[1] for row in rows_under("what you see") if (match := re.match(r"outcome` ([A-Z]+)", row[0]))}
    assert outcomes == {outcome.value for outcome in Outcome} - {"UNKNOWN"}
    assert [state.value for state in FeedState if state.value != "UNKNOWN" and f"{state.value} (" not in PAGE] == []
    known = {field["name"] for topic in TOPICS for field in avro_schema(topic.event)["fields"]}
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", prose))
    headers = {"ce_id", "ce_type", "ce_source", "ce_subject", "ce_time"}
    assert named - known == headers
    assert len(named & known) > 20
    assert {field["name"] for field in avro_schema(Candle)["fields"]} <= {
        field["name"] for field in avro_schema(TradeEvent)["fields"]
    }


@pytest.fixture
def cluster(kafka: Kafka, small_registry: str, prefix: str) -> Cluster:
    """Return topics without records."""
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    cluster.registry().register_all(prefix)
    return cluster


def publish(cluster: Cluster, events: Sequence[TradeEvent]) -> None:
    """Publish polls as the producer does: a poll's events and candles are one transaction."""
    trades, candles = (cluster.registry().serializer(topic, cluster.prefix) for topic in (TRADES, CANDLES))
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    for _, poll in groupby(events, lambda event: event.poll_sequence):
        producer.begin_transaction()
        for event in poll:
            candle = Candle(**{name: getattr(event, name) for name in Candle.__struct_fields__})
            for record in (trades(event), candles(candle)):
                producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
        producer.commit_transaction()
    producer.close()


@pytest.mark.kafka
@pytest.mark.parametrize("partitions", [6, 9])
def test_joining_in_the_middle_of_a_day(
    events: Sequence[TradeEvent], cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any], partitions: int
) -> None:
    """The page's own program sees every change after it joined, once, also after partitions were added."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for said, here in {
        "127.0.0.1:9092": cluster.bootstrap_servers,
        "http://127.0.0.1:8081": cluster.registry_url,
        '"bourse.': f'"{cluster.prefix}.',
    }.items():
        assert said in program
        program = program.replace(said, here)
    before = [event for event in events if event.poll_sequence <= 40]
    instruments = {event.instrument for event in before}
    after = [event for event in events if event.poll_sequence > 40]
    if partitions > 6:
        publish(cluster, [event for event in before if event.poll_sequence <= 20])
        admin = cluster.admin()
        for topic in (TRADES, CANDLES):
            more = NewPartitions(topic.full_name(cluster.prefix), partitions)
            admin.create_partitions([more])[more.topic].result(10)
        before = [event for event in before if event.poll_sequence > 20]
    publish(cluster, before)
    out, errors = tmp_path / "out", tmp_path / "errors"
    with spawn([sys.executable, "-u", "-c", program], stdout=out, stderr=errors) as child:

        def lines(count: int) -> list[str]:
            wait_for(lambda: out.read_text("utf-8").count("\n") >= count or child.poll() is not None, 60)
            return out.read_text("utf-8").splitlines()

        assert lines(1) == [f"joined with {len(instruments)} instruments"], errors.read_text("utf-8")
        publish(cluster, after)
        found = lines(1 + len(after))[1:]
    assert Counter(found) == Counter(f"{event.event_id} {event.op.value} {event.volume}" for event in after)
