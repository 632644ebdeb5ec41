"""The producer on real Kafka: exact days, one transaction a poll, restarts, deaths, and what a consumer sees."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx2
import pytest
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]  # not in its __all__
from msgspec import structs
from structlog.testing import capture_logs

from bourse_cli.topics import apply_topics, plan_topics
from bourse_producer.clock import PracticeClock
from bourse_producer.diff import Changes
from bourse_producer.finnotech import Credentials, Finnotech
from bourse_producer.markers import History
from bourse_producer.publisher import Publisher, committed_state
from bourse_producer.responses import PROFILES, SOURCE, TRADES_REALTIME, Profile
from bourse_producer.service import Producer, Settings
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.registry import serve_registry
from bourse_schemas import reading
from bourse_schemas.election import Election
from bourse_schemas.errors import ConfigurationError, Fenced, PublishError
from bourse_schemas.events import Candle, Change, Event, Op, Outcome, PollMarker, TradeEvent
from bourse_schemas.kafka import Cluster, producer_id
from bourse_schemas.reading import TopicRecord
from bourse_schemas.topics import CANDLES, POLLS, TRADES, Topic
from reliability.alone import Alone

pytestmark = [
    pytest.mark.kafka,
    # A fenced producer says so while it is closed; as an error the client turns this warning into a SystemError.
    pytest.mark.filterwarnings("ignore:Producer abort_transaction failed:RuntimeWarning"),
]

SECOND_DAY = Path(__file__).parents[3] / "shared" / "data" / "day-2019-08-24.ndjson.gz"
PRACTICE = Credentials("practice", "practice", "0123456789")
SUCCESSOR = PROFILES["realTimeTrades"]
WaitFor = Callable[..., Any]


@pytest.fixture
def cluster(kafka: Kafka, prefix: str) -> Iterator[Cluster]:
    """Return topics and schemas of this test's own, which take records of any time."""
    with serve_registry() as registry:
        cluster = Cluster(kafka.bootstrap_servers, registry.url, prefix)
        prepare(cluster)
        yield cluster


def prepare(cluster: Cluster, *, any_time: bool = True) -> None:
    """Create the topics and register the schemas."""
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=any_time))
    cluster.registry().register_all(cluster.prefix)


class Read(NamedTuple):
    """What a read_committed consumer sees of a topic: the events, and the records they came in."""

    events: list[Any]
    records: list[TopicRecord]


def read(cluster: Cluster, topic: Topic) -> Read:
    """Read a topic from its beginning to its end."""
    decode = cluster.registry().deserializer(topic.event)
    records = list(reading.read(cluster, topic.full_name(cluster.prefix)))
    return Read([decode(record.value) for record in records], records)


def _settled(cluster: Cluster) -> tuple[list[TradeEvent], list[Candle]]:
    """Return events and candles once both show the last commit: its markers reach one partition after the other."""
    deadline = time.monotonic() + 10
    while True:
        events, candles = read(cluster, TRADES).events, read(cluster, CANDLES).events
        newest = [max((event.poll_sequence for event in part), default=0) for part in (events, candles)]
        if (newest[0] == newest[1] and len(events) == len(candles)) or time.monotonic() > deadline:
            return events, candles


def check(cluster: Cluster) -> list[TradeEvent]:
    """Check what holds of the topics whatever happened, and return the events."""
    events, candles = _settled(cluster)
    assert len({event.event_id for event in events}) == len(events)
    chains: dict[tuple[str, Any], list[TradeEvent]] = defaultdict(list)
    for event in events:
        chains[event.instrument, event.trading_day].append(event)
    for chain in chains.values():
        assert [event.sequence for event in chain] == list(range(1, len(chain) + 1))
        for total in ("volume", "value", "trade_count"):
            assert sum(getattr(event, f"{total}_delta") for event in chain) == getattr(chain[-1], total)
    last: dict[str, TradeEvent] = {event.instrument: event for event in events}
    kept: dict[str, Candle] = {candle.instrument: candle for candle in candles}
    fields = Candle.__struct_fields__
    assert kept.keys() == last.keys()
    for code, candle in kept.items():
        assert [getattr(candle, name) for name in fields] == [getattr(last[code], name) for name in fields]
    markers: list[PollMarker] = read(cluster, POLLS).events
    assert [marker.poll_sequence for marker in markers] == list(range(1, len(markers) + 1))
    for marker in markers:
        found = Counter(event.op for event in events if event.poll_sequence == marker.poll_sequence)
        counted = {Op.OPENED: marker.opened, Op.TRADED: marker.traded}
        counted |= {Op.REVISED: marker.revised, Op.CANCELLED: marker.cancelled}
        assert counted == {op: found[op] for op in counted}
        assert (marker.outcome is Outcome.PUBLISHED) == bool(found)
    # Partitions come in any order.
    return sorted(events, key=lambda event: event.event_id)


def in_process(cluster: Cluster, url: str, client: httpx2.Client, profile: Profile = TRADES_REALTIME) -> Producer:
    """Return a producer of this process that goes by the exchange's time."""
    settings, clock = Settings(profile=profile, poll_seconds=0, always=True), PracticeClock()
    exchange = Finnotech(client, url, PRACTICE, profile, clock=clock)
    return Producer(exchange, lambda: Publisher(cluster), settings, clock, leadership=Alone())


def poll(producer: Producer, times: int) -> None:
    """Poll so many times, and give the producer up in good order."""
    for _ in range(times):
        producer.poll()
    producer._close()


DAYS = [
    pytest.param(REAL_DAY, 98, (548, 18_711, 2, 85), id="2019-08-21"),
    pytest.param(
        SECOND_DAY,
        147,
        (541, 41_293, 16, 80),
        id="2019-08-24",
        marks=pytest.mark.skipif(not SECOND_DAY.exists(), reason=f"{SECOND_DAY.name} is not beside the checkout"),
    ),
]


@pytest.mark.parametrize(("day", "responses", "counts"), DAYS)
def test_a_real_day_gives_exactly_its_events(
    cluster: Cluster, day: Path, responses: int, counts: tuple[int, int, int, int]
) -> None:
    """Through a restart after a third and another after two: every event once, every sequence without a hole."""
    practice = practice_exchange(day, "poll")
    assert practice.state()["responses"] == responses
    with practice.serve() as server, httpx2.Client() as client:
        third = responses // 3
        for polls in (third, third, responses - 2 * third):
            poll(in_process(cluster, server.url, client), polls)
        assert practice.state()["day_over"]
        poll(in_process(cluster, server.url, client), 2)
    events = check(cluster)
    found = Counter(event.op for event in events)
    assert (found[Op.OPENED], found[Op.TRADED], found[Op.REVISED], found[Op.CANCELLED]) == counts
    markers = read(cluster, POLLS).events
    assert [marker.outcome for marker in markers[-2:]] == [Outcome.UNCHANGED] * 2


def murmur2(key: bytes) -> int:
    """Return Kafka's murmur2, written down from the algorithm as it is published: 32 bits, seed 0x9747b28c."""
    multiplier, mask = 0x5BD1E995, 0xFFFFFFFF
    state = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for start in range(0, whole, 4):
        part = int.from_bytes(key[start : start + 4], "little") * multiplier & mask
        part = (part ^ part >> 24) * multiplier & mask
        state = (state * multiplier & mask) ^ part
    if rest := key[whole:]:
        state = (state ^ int.from_bytes(rest, "little")) * multiplier & mask
    state = (state ^ state >> 13) * multiplier & mask
    return state ^ state >> 15


def test_records_are_as_in_the_contract(cluster: Cluster) -> None:
    """Keys, partitions, timestamps and headers of events, candles and markers."""
    # Kafka's own test vectors for its murmur2.
    assert [murmur2(key) for key in (b"21", b"foobar", b"a-little-bit-long-string")] == [
        (-973932308) & 0xFFFFFFFF,
        (-790332482) & 0xFFFFFFFF,
        (-985981536) & 0xFFFFFFFF,
    ]
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 2)
    kinds: Sequence[tuple[Topic, str | None, Callable[[Any], tuple[str, str, datetime]]]] = [
        (TRADES, "ir.bourse.trade.v1", lambda e: (e.instrument, e.event_id, e.observed_at)),
        (CANDLES, None, lambda c: (c.instrument, "", c.observed_at)),
        (POLLS, "ir.bourse.poll.v1", lambda m: (m.source, f"{m.source}-{m.poll_sequence}", m.received_at)),
    ]
    for topic, kind, of in kinds:
        found = read(cluster, topic)
        assert found.events
        for event, record in zip(found.events, found.records, strict=True):
            key, identity, instant = of(event)
            assert record.key == key.encode()
            assert record.place[1] == (murmur2(key.encode()) & 0x7FFFFFFF) % topic.partitions
            assert record.timestamp == round(instant.timestamp() * 1000)
            expected = {
                "ce_specversion": b"1.0",
                "ce_id": identity.encode(),
                "ce_source": SOURCE.encode(),
                "ce_type": (kind or "").encode(),
                "ce_time": instant.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode(),
                "ce_subject": key.encode(),
                "content-type": b"application/vnd.apache.avro",
            }
            # A table holds no events.
            assert record.headers == (expected if kind else {})
    assert {record.place[1] for record in read(cluster, TRADES).records} == set(range(6))


def test_an_older_instance_is_fenced(cluster: Cluster) -> None:
    """A second instance of the same source takes over; the first one's next poll publishes nothing and says so."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        old, new = in_process(cluster, server.url, client), in_process(cluster, server.url, client)
        old.poll()
        new._take_over(1)
        with pytest.raises(Fenced):
            old.poll()
        poll(new, 2)
    check(cluster)


def test_what_retention_would_delete_is_refused(kafka: Kafka, prefix: str) -> None:
    """Without --any-time a day of the past is refused, with the reason, before anything is written."""
    with serve_registry() as registry, practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        cluster = Cluster(kafka.bootstrap_servers, registry.url, prefix)
        prepare(cluster, any_time=False)
        producer = in_process(cluster, server.url, client)
        with pytest.raises(ConfigurationError, match=r"keeps 30 days.*--any-time"):
            producer.run_once()
        assert read(cluster, POLLS).events == []
        publisher = Publisher(cluster)
        publisher.require_room_for(datetime.now(UTC) - timedelta(days=29))
        for far in (timedelta(days=-31), timedelta(hours=2)):
            with pytest.raises(ConfigurationError):
                publisher.require_room_for(datetime.now(UTC) + far)
        publisher.close()


def bourse(cluster: Cluster, url: str, secret: Path, log: Path, *options: str) -> Child:
    """Start a real `bourse produce`."""
    environment = {
        **os.environ,
        "BOURSE_BOOTSTRAP_SERVERS": cluster.bootstrap_servers,
        "BOURSE_REGISTRY_URL": cluster.registry_url,
        "BOURSE_TOPIC_PREFIX": cluster.prefix,
        "BOURSE_CLIENT_ID": "practice",
        "BOURSE_NID": "0123456789",
    }
    usual: list[str | Path] = [
        "--address",
        url,
        "--client-secret-file",
        secret,
        "--clock",
        "response",
        "--schedule",
        "always",
    ]
    return spawn(
        [sys.executable, "-m", "bourse_cli", "produce", *usual, *options], env=environment, stdout=log, stderr=log
    )


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Return a file with the practice exchange's secret."""
    file = tmp_path / "secret"
    file.write_text("practice\n")
    return file


def test_kill_9_leaves_no_trace(cluster: Cluster, secret: Path, tmp_path: Path, wait_for: WaitFor) -> None:
    """A real process is killed again and again while it publishes: the day comes out whole, and nothing twice."""
    practice = practice_exchange("real", "poll")
    log = tmp_path / "log"
    with practice.serve() as server, ExitStack() as stack:
        for kill in range(3):
            before = practice.served
            child = stack.enter_context(bourse(cluster, server.url, secret, log, "--poll-seconds", "0"))
            # Asked for a response, it is parsing, publishing or committing at some moment of the next few.
            wait_for(lambda before=before, kill=kill: practice.served > before + 3 + kill, 30)
            child.kill()
        child = stack.enter_context(bourse(cluster, server.url, secret, log, "--poll-seconds", "0"))
        wait_for(lambda: practice.state()["day_over"], 60)
        served = practice.served
        wait_for(lambda: practice.served > served + 1, 30)
        child.send(signal.SIGTERM)
        assert child.wait(5) == 0, log.read_text()
    assert sum(event.op is Op.OPENED for event in check(cluster)) == 548


def test_an_open_transaction_is_settled_by_the_next_instance(cluster: Cluster) -> None:
    """Records that were flushed but not committed are never seen, and not taken for state."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 2)
        seen = check(cluster)
        left_open = Publisher(cluster)
        left_open.restore()
        left_open._producer.begin_transaction()
        for topic in (TRADES, CANDLES):
            record = read(cluster, topic).records[0]
            left_open._producer.produce(topic.full_name(cluster.prefix), record.value, record.key)
        left_open._producer.flush()
        poll(in_process(cluster, server.url, client), 2)
        left_open.close()
    assert len(check(cluster)) > len(seen)


def test_a_death_before_the_marker_leaves_nothing(cluster: Cluster) -> None:
    """Events without their marker are never seen: a poll is published whole or not at all."""

    def dies() -> Iterator[PollMarker]:
        raise RuntimeError("killed")
        yield

    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 2)
    events = check(cluster)
    publisher = Publisher(cluster)
    state = publisher.restore()
    candles = [structs.replace(candle, sequence=candle.sequence + 1) for candle in state.candles.values()][:5]
    made = [Change(event.event_id, event.op, 1, 1, 1, None, None) for event in events][:5]
    with pytest.raises(RuntimeError, match="killed"):
        publisher.publish(Changes(candles, made, 0), [], dies())
    publisher.close()
    again = Publisher(cluster)
    assert again.restore() == state
    again.close()
    assert check(cluster) == events


def test_an_instrument_that_an_operator_took_out_is_unknown(cluster: Cluster) -> None:
    """By a record without a value; whether Kafka has compacted the topic makes no difference."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 2)
    publisher = Publisher(cluster)
    gone = next(iter(publisher.restore().candles))
    producer = cluster.transactional_producer(f"{cluster.prefix}-operator")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(CANDLES.full_name(cluster.prefix), None, gone.encode())
    producer.commit_transaction()
    producer.close()
    publisher.close()
    again = Publisher(cluster)
    known = again.restore().candles
    again.close()
    assert gone not in known
    assert len(known) > 500


def test_what_an_older_instance_commits_at_the_last_moment_is_known(cluster: Cluster) -> None:
    """Until the new instance has fenced it the older one may commit: state is read after that, not before."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        old, new = in_process(cluster, server.url, client), Publisher(cluster)
        poll(old, 1)
        fence = new._initialise

        def late() -> None:
            old.poll()
            fence()

        new._initialise = late  # type: ignore[method-assign]
        state = new.restore()
        assert state.poll_sequence == max(candle.poll_sequence for candle in state.candles.values()) == 2
        new.close()
        old._close()


def test_sigterm_while_the_exchange_is_slow(cluster: Cluster, secret: Path, tmp_path: Path, wait_for: WaitFor) -> None:
    """A response that does not come holds nothing up: exit 0 at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        log = tmp_path / "log"
        with bourse(cluster, f"http://127.0.0.1:{silent.getsockname()[1]}", secret, log) as child:
            silent.settimeout(30)
            connection, _ = silent.accept()
            with connection:
                began = time.monotonic()
                child.send(signal.SIGTERM)
                assert child.wait(10) == 0, log.read_text()
                assert time.monotonic() - began < 5
    assert "Traceback" not in log.read_text()


def test_the_broker_goes_and_comes_back(
    own_kafka: Callable[..., Kafka], prefix: str, secret: Path, tmp_path: Path, wait_for: WaitFor
) -> None:
    """Away in the middle: the service says so, waits, goes on by itself; SIGTERM meanwhile ends it within 5 s."""
    broker = own_kafka()
    practice = practice_exchange("real", "poll")
    log = tmp_path / "log"
    with serve_registry() as registry, practice.serve() as server:
        cluster = Cluster(broker.bootstrap_servers, registry.url, prefix)
        prepare(cluster)
        with bourse(cluster, server.url, secret, log, "--poll-seconds", "0.2") as child:
            wait_for(lambda: practice.served > 3, 30)
            broker.kill()
            wait_for(lambda: "publish failed" in log.read_text(), 60)
            began = time.monotonic()
            broker.start()
            served = practice.served
            wait_for(lambda: practice.served > served + 3, 60)
            assert time.monotonic() - began < 60
            broker.kill()
            served = practice.served
            child.send(signal.SIGTERM)
            began = time.monotonic()
            assert child.wait(10) in {0, 1}, log.read_text()
            assert time.monotonic() - began < 5.5
        broker.start()
        check(cluster)
        assert any(marker.gap_from for marker in read(cluster, POLLS).events)
    assert "Traceback" not in log.read_text()


def test_closing_without_a_broker_does_not_hang(own_kafka: Callable[..., Kafka], prefix: str) -> None:
    """Not even with a transaction open, whose abort nobody answers; the next instance settles it."""
    broker = own_kafka()
    with serve_registry() as registry:
        cluster = Cluster(broker.bootstrap_servers, registry.url, prefix)
        prepare(cluster)
        publisher = Publisher(cluster)
        publisher.restore()
        publisher._producer.begin_transaction()
        publisher._producer.produce(TRADES.full_name(prefix), b"never seen", b"key")
        publisher._producer.flush()
        broker.kill()
        began = time.monotonic()
        publisher.close()
        assert time.monotonic() - began < 3
        broker.start()
        again = Publisher(cluster)
        assert again.restore().poll_sequence == 0
        again.close()
        assert read(cluster, TRADES).events == []


class Lost(Cluster):
    """Its producers reach no broker, as after an empty list of brokers."""

    def transactional_producer(self, transactional_id: str, *how: Any, **callbacks: Any) -> Any:
        """Return one."""
        return Cluster("127.0.0.1:9", "http://127.0.0.1:9").transactional_producer(transactional_id, *how, **callbacks)


def test_a_standby_that_has_lost_its_brokers_does_not_wait_for_its_election(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    """Only then it would need a new client, and the market would wait."""
    monkeypatch.setattr("bourse_schemas.kafka.LOST_SECONDS", 0.5)
    monkeypatch.setattr("bourse_schemas.kafka.PROBE_EVERY_SECONDS", 0.1)
    publisher = Publisher(Lost(cluster.bootstrap_servers, cluster.registry_url, cluster.prefix))

    def lost() -> bool:
        try:
            publisher.idle()
        except PublishError:
            return True
        return False

    wait_for(lost, 20)
    publisher.close()


def test_a_poll_is_there_although_the_broker_died_at_once(own_kafka: Callable[..., Kafka], prefix: str) -> None:
    """A broker answers a commit before it writes the transaction's end; some versions never write it after a kill."""
    broker = own_kafka()

    class Last(Publisher):
        def publish(self, *poll: Any) -> None:
            super().publish(*poll)
            broker.kill()

    with serve_registry() as registry, practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        cluster = Cluster(broker.bootstrap_servers, registry.url, prefix)
        prepare(cluster)
        producer = in_process(cluster, server.url, client)
        producer._new_publication = lambda: Last(cluster)
        poll(producer, 1)
        broker.start()
        again = Publisher(cluster)
        assert again.restore().poll_sequence == 1
        again.close()
        check(cluster)


def test_state_that_cannot_be_read_is_no_empty_state(cluster: Cluster) -> None:
    """A topic that is not there any more must not look like a market that was never seen."""
    publisher = Publisher(cluster)
    admin = cluster.admin()
    for done in admin.delete_topics([CANDLES.full_name(cluster.prefix)], operation_timeout=10).values():
        done.result()
    with pytest.raises(ConfigurationError, match=r"no topic .*candles"):
        publisher.restore()
    publisher.close()


def test_an_open_transaction_of_somebody_else_hides_nothing(cluster: Cluster) -> None:
    """What was committed after it began cannot be read yet: the state is complete, or it is waited for."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 1)
        stranger = cluster.transactional_producer(f"{cluster.prefix}-stranger")
        stranger.init_transactions(30)
        stranger.begin_transaction()
        for partition in range(CANDLES.partitions):
            stranger.produce(CANDLES.full_name(cluster.prefix), b"never committed", b"key", partition)
        stranger.flush()
        producer = in_process(cluster, server.url, client)
        with ThreadPoolExecutor(1) as pool:
            restored = pool.submit(producer._take_over, 1)
            with pytest.raises(TimeoutError):
                restored.result(4)
            stranger.abort_transaction()
            restored.result(30)
        known = {code: candle.sequence for code, candle in producer._known.items()}
        poll(producer, 3)
    check(cluster)
    assert known
    assert set(known.values()) == {1}


def test_a_topic_that_has_grown_gives_the_newest_candles(cluster: Cluster) -> None:
    """An instrument's older candle stays in the partition where its key was before; no event comes twice."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 3)
        admin = cluster.admin()
        for done in admin.create_partitions([NewPartitions(CANDLES.full_name(cluster.prefix), 13)]).values():
            done.result(10)
        poll(in_process(cluster, server.url, client), 5)
        before = in_process(cluster, server.url, client)
        before._take_over(1)
        newest = {code: candle.sequence for code, candle in before._known.items()}
        before._close()
        poll(in_process(cluster, server.url, client), 5)
    events = read(cluster, TRADES).events
    assert len({event.event_id for event in events}) == len(events)
    assert max(newest.values()) > 3
    sequences: dict[str, set[int]] = defaultdict(set)
    for event in events:
        sequences[event.instrument].add(event.sequence)
    assert all(found == set(range(1, len(found) + 1)) for found in sequences.values())


def test_one_source_follows_another(cluster: Cluster) -> None:
    """Another profile goes on where the first one stopped, in the sequences of instruments and of polls."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 2)
        poll(in_process(cluster, server.url, client, SUCCESSOR), 2)
        poll(in_process(cluster, server.url, client), 2)
    check(cluster)
    markers = read(cluster, POLLS).events
    assert [(marker.source, marker.poll_sequence) for marker in markers] == [
        *((SOURCE, 1), (SOURCE, 2)),
        *((SUCCESSOR.source, 3), (SUCCESSOR.source, 4)),
        *((SOURCE, 5), (SOURCE, 6)),
    ]
    assert not any(marker.stale_rows for marker in markers)


def test_two_profiles_on_one_prefix_have_one_leader(
    cluster: Cluster, secret: Path, tmp_path: Path, wait_for: WaitFor
) -> None:
    """A rolling change of --profile, back and forth: one polls at a time, and no event_id comes twice."""
    logs = [tmp_path / "legacy", tmp_path / "successor"]
    profiles = [["--profile", "trades-realtime"], ["--profile", "realTimeTrades"]]
    practice = practice_exchange("real", "poll")
    sources = (SOURCE, SUCCESSOR.source)

    def published(log: Path) -> int:
        return log.read_text().count("poll published") if log.exists() else 0

    with practice.serve() as server, ExitStack() as stack:

        def start(which: int) -> Child:
            options = [*profiles[which], "--poll-seconds", "0.1"]
            return stack.enter_context(bourse(cluster, server.url, secret, logs[which], *options))

        children = [start(0)]
        wait_for(lambda: published(logs[0]) > 3, 30)
        children.append(start(1))
        wait_for(lambda: "standing by" in logs[1].read_text(), 30)
        assert published(logs[1]) == 0
        for turn in range(3):
            leaves, follows = turn % 2, (turn + 1) % 2
            before = published(logs[follows])
            children[leaves].send(signal.SIGTERM)
            assert children[leaves].wait(10) == 0, logs[leaves].read_text()
            wait_for(lambda follows=follows, before=before: published(logs[follows]) > before + 3, 30)
            children[leaves] = start(leaves)
        for child in children:
            child.send(signal.SIGTERM)
            assert child.wait(10) in {0, -signal.SIGTERM}
    check(cluster)
    found = [marker.source for marker in read(cluster, POLLS).events]
    assert set(found) == set(sources)
    assert sum(a != b for a, b in pairwise(found)) == 3


# --- bytes in hand ----------------------------------------------------------------------------------------------------


class Failing(Publisher):
    """Reports failures that its class attribute holds: before the transaction, or after the commit."""

    failures: ClassVar[list[str]] = []

    def publish(self, *args: Any) -> None:
        """Publish, unless the transaction is to fail; report a failure."""
        failure = self.failures.pop(0) if self.failures else None
        if failure != "before":
            super().publish(*args)
        if failure is not None:
            raise PublishError(f"failed {failure} the commit")


def step(producer: Producer) -> None:
    """Do what the service does on a beat, its recovery included."""
    with producer._recovery():
        if producer._leads():
            producer.poll()


@pytest.fixture
def failing(cluster: Cluster) -> Iterator[tuple[Producer, Any]]:
    """Return a producer whose publications can fail, and its exchange."""
    practice = practice_exchange("real", "poll")
    with practice.serve() as server, httpx2.Client() as client:
        producer = in_process(cluster, server.url, client)
        producer._new_publication = lambda: Failing(cluster)
        Failing.failures = []
        step(producer)
        yield producer, practice
        producer._close()


def test_bytes_in_hand_are_published_without_another_call(cluster: Cluster, failing: tuple[Producer, Any]) -> None:
    """Under the sequence after the restored one, with the times of their receipt."""
    producer, practice = failing
    Failing.failures = ["before", "before"]
    step(producer)
    assert producer._in_hand is not None
    ((_, answered),) = producer._in_hand.answers
    step(producer)
    step(producer)
    assert practice.served == 2
    markers = read(cluster, POLLS).events
    assert [(m.poll_sequence, m.poll_id, m.received_at) for m in markers][1:] == [
        (2, answered.track_id, answered.received_at)
    ]
    assert {event.observed_at for event in check(cluster) if event.poll_sequence == 2} == {answered.received_at}


def test_a_commit_that_had_succeeded_is_not_repeated(cluster: Cluster, failing: tuple[Producer, Any]) -> None:
    """The marker with our poll_id is committed: the bytes are dropped, nothing comes twice."""
    producer, practice = failing
    Failing.failures = ["after"]
    step(producer)
    step(producer)
    assert (practice.served, producer._in_hand) == (3, None)
    markers = read(cluster, POLLS).events
    assert [m.poll_sequence for m in markers] == [1, 2, 3]
    assert len({m.poll_id for m in markers}) == 3
    assert markers[2].gap_from is None
    check(cluster)


def test_bytes_in_hand_are_dropped_with_their_term(cluster: Cluster, failing: tuple[Producer, Any]) -> None:
    """Another instance may lead meanwhile: the exchange is called again."""
    producer, practice = failing
    election = Election(cluster, producer_id(cluster.prefix), 600)
    producer._close()
    producer._leadership = election
    try:
        assert election.term(15) == 1
        step(producer)
        Failing.failures = ["before"]
        step(producer)
        election.resign()
        assert election.term(15) == 2
        assert producer._in_hand is not None
        step(producer)
    finally:
        election.close()
    assert practice.served == 4
    markers = read(cluster, POLLS).events
    assert [m.poll_sequence for m in markers] == [1, 2, 3]
    assert markers[2].gap_from == markers[1].received_at
    check(cluster)


def test_bytes_in_hand_are_dropped_after_a_later_poll(cluster: Cluster, failing: tuple[Producer, Any]) -> None:
    """Whoever published it: what came later is known already."""
    producer, practice = failing
    Failing.failures = ["before"]
    step(producer)
    with practice.serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 1)
    step(producer)
    assert (practice.served, producer._in_hand) == (4, None)
    assert [m.poll_sequence for m in read(cluster, POLLS).events] == [1, 2, 3]
    check(cluster)


def test_a_whole_day_of_markers_is_read_back(cluster: Cluster) -> None:
    """The day's charged calls count, however many polls it has; of days before as little as possible is read."""
    counts = ("rows", "opened", "traded", "revised", "cancelled", "stale_rows", "rejected_rows", "duplicate_rows")
    fields: dict[str, Any] = dict.fromkeys(counts, 0) | {"charged_calls": 1}
    fields |= {"simulated": False, "outcome": "UNCHANGED", "phase": "OPEN", "feed_state": "FRESH", "day_final": False}
    began = datetime(2026, 11, 21, 6, tzinfo=UTC)
    marker = PollMarker(poll_sequence=1, source=SOURCE, requested_at=began, **fields)
    publisher = Publisher(cluster)
    publisher.restore()
    for first, at in ((1, began - timedelta(days=1)), (4001, began), (8001, began)):
        found = [structs.replace(marker, poll_sequence=first + n, requested_at=at) for n in range(4000)]
        publisher.publish(Changes([], [], 0), [], found)
    publisher.close()
    state = committed_state(cluster)
    history = History()
    for each in state.markers:
        history = history.after(each)
    assert (state.poll_sequence, history.charged(began)) == (12_000, 8_000)


# --- foreign records --------------------------------------------------------------------------------------------------


def produce_plain(cluster: Cluster, topic: Topic, value: bytes | None, key: bytes, partition: int) -> None:
    """Publish what somebody else may have published."""
    producer = cluster.transactional_producer(f"{cluster.prefix}-stranger")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(topic.full_name(cluster.prefix), value, key, partition)
    producer.commit_transaction()
    producer.close()


def test_a_foreign_record_on_polls_is_skipped(cluster: Cluster) -> None:
    """It is logged with its place and counted, and the polls go on."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 2)
        produce_plain(cluster, POLLS, b"junk", b"x", 0)
        with capture_logs() as lines:
            again = in_process(cluster, server.url, client)
            poll(again, 2)
    assert again._metrics.foreign_records._value.get() == 1
    found = [line for line in lines if line["event"] == "foreign record skipped"]
    assert [line["place"] for line in found] == [f"{cluster.prefix}.polls-0"]
    assert found[0]["offset"] in {3, 4}  # the broker may write the end of the transaction before it after it
    state = committed_state(cluster)
    assert [marker.poll_sequence for marker in state.markers] == [1, 2, 3, 4]


def test_a_foreign_record_on_candles_is_named_and_the_command_printed_removes_it(cluster: Cluster) -> None:
    """Partition, offset and key, and a command that makes the state readable again."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        poll(in_process(cluster, server.url, client), 1)
        produce_plain(cluster, CANDLES, b"junk", b"it's \xff odd", 3)
        broken = in_process(cluster, server.url, client)
        with pytest.raises(ConfigurationError) as caught:
            broken.poll()
        broken._close()
        message, _, command = str(caught.value).partition("\nremove it: bourse ")
        assert re.search(rf"{cluster.prefix}\.candles-3 at offset \d+, key b\"it's .xff odd\": not a candle", message)
        line = [sys.executable, "-m", "bourse_cli", *command.split(), "--registry-url", cluster.registry_url]
        subprocess.run(line, check=True, timeout=60)
        poll(in_process(cluster, server.url, client), 1)
    assert [marker.poll_sequence for marker in read(cluster, POLLS).events] == [1, 2]


def test_a_candle_whose_schema_the_registry_lost_is_not_to_be_removed(cluster: Cluster) -> None:
    """The candle is all right, and removing it would begin its sequence again: the registry must be restored."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        produce_plain(cluster, CANDLES, b"\0\0\x0f\x42\x3f\x02", b"IRO1MADN0001", 3)
        broken = in_process(cluster, server.url, client)
        with pytest.raises(
            ConfigurationError, match=r"(?s)schema id 999999 is unknown .*restore the registry's schemas"
        ):
            broken.poll()
        broken._close()


def test_a_marker_whose_schema_the_registry_lost_is_not_skipped(cluster: Cluster) -> None:
    """Without the markers a poll's sequence would be published twice, and the day's charged calls begin at 0 again."""
    with practice_exchange("real", "poll").serve() as server, httpx2.Client() as client:
        produce_plain(cluster, POLLS, b"\0\0\x0f\x42\x3f\x02", b"x", 0)
        broken = in_process(cluster, server.url, client)
        with pytest.raises(
            ConfigurationError,
            match=r"(?s)polls-0 at offset 0, .*id 999999 is unknown .*restore the registry's schemas",
        ):
            broken.poll()
        broken._close()


def test_polls_without_changes_differ_from_polls_that_failed(cluster: Cluster) -> None:
    """Each poll leaves one marker, whatever it brought."""
    practice = practice_exchange("real", "poll")
    server = practice.serve()
    with server, httpx2.Client(timeout=1) as client:
        producer = in_process(cluster, server.url, client)
        producer.poll()
        server.close()
        poll(producer, 1)
    found: list[Event] = read(cluster, POLLS).events
    assert [getattr(marker, "outcome", None) for marker in found] == [Outcome.PUBLISHED, Outcome.FAILED]
    assert getattr(found[1], "error_kind", None) == "network"
