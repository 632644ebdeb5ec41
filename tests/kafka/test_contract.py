"""Topics, registry and tail on real Kafka, on Apicurio and on the small registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.base import Format
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import KafkaException
from confluent_kafka.admin import ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

from bourse_cli.root import main
from bourse_consumers.testing import trade
from bourse_sandbox.kafka import Kafka, free_port
from bourse_sandbox.registry import serve_registry
from bourse_schemas.codec import Serializer, avro_schema
from bourse_schemas.compatibility import gate
from bourse_schemas.errors import ConfigurationError, SchemaIncompatible, Undecodable
from bourse_schemas.events import DeadLetter, Reason, Stage
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import read
from bourse_schemas.registry import Registry
from bourse_schemas.topics import DEAD_LETTERS, POLLS, TOPICS, TRADES

pytestmark = pytest.mark.kafka
Run = Callable[..., tuple[int | str | None, str, str]]
NOW = datetime.now(UTC).replace(microsecond=123_000)


@pytest.fixture
def bourse(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Return `bourse(*arguments)`: runs the command line on this broker; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BOURSE_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
    monkeypatch.setenv("BOURSE_TOPIC_PREFIX", prefix)

    def run(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["bourse", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def cluster(kafka: Kafka, prefix: str) -> Cluster:
    """Return the broker as a cluster without a registry."""
    return Cluster(kafka.bootstrap_servers, "http://127.0.0.1:1", prefix)


def _settings(cluster: Cluster, topic: str) -> dict[str, str | None]:
    resource = ConfigResource(ResourceType.TOPIC, f"{cluster.prefix}.{topic}")
    admin = cluster.admin()
    found = admin.describe_configs([resource])[resource].result(10)
    return {name: entry.value for name, entry in found.items()}


def _partitions(cluster: Cluster) -> dict[str, int]:
    found = cluster.admin().list_topics(timeout=10).topics
    return {name: len(topic.partitions) for name, topic in found.items() if name.startswith(f"{cluster.prefix}.")}


# --- topics -----------------------------------------------------------------------------------------------------------


def test_apply_creates_what_is_declared_and_repeating_it_changes_nothing(bourse: Run, cluster: Cluster) -> None:
    """A dry run shows the same lines and does nothing; list says what there is."""
    code, plan, err = bourse("topics", "apply", "--replication-factor", "1", "--dry-run")
    assert (code, err, _partitions(cluster)) == (0, "", {})
    lines = plan.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"(dry run) {t.full_name(cluster.prefix)}" for t in TOPICS]
    assert lines[2].endswith(
        ".polls: create, 1 partition, 1 replica, cleanup.policy=delete min.insync.replicas=1 "
        "retention.ms=2592000000 message.timestamp.after.max.ms=3600000"
    )
    assert bourse("topics", "list")[1].count("missing") == 5
    assert bourse("topics", "apply", "--replication-factor", "1") == (0, plan.replace("(dry run) ", ""), "")
    assert _partitions(cluster) == {topic.full_name(cluster.prefix): topic.partitions for topic in TOPICS}
    for topic in TOPICS:
        declared = topic.settings(replicas=1, any_time=False)
        assert declared.items() <= _settings(cluster, topic.name).items()
    code, again, _ = bourse("topics", "apply")
    assert (code, again) == (0, "".join(f"{t.full_name(cluster.prefix)}: as declared\n" for t in TOPICS))
    listed = bourse("topics", "list")[1]
    assert (listed.count("missing"), listed.count("6 partitions"), listed.count("1 partition")) == (0, 2, 3)


def test_apply_alters_what_differs(bourse: Run, cluster: Cluster, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Settings drifted, overridden, for any time and back; partitions grow; both for one topic at once."""
    assert bourse("topics", "apply", "--replication-factor", "1")[0] == 0
    code, out, _ = bourse("topics", "apply", "--any-time")
    assert code == 0
    assert f"{cluster.prefix}.trades: retention.ms 2592000000 → -1, message.timestamp.after.max.ms 3600000 → " in out
    # The broker hears of it from its controller, a moment later.
    wait_for(lambda: _settings(cluster, "trades")["retention.ms"] == "-1")
    wait_for(lambda: _settings(cluster, "trades")["message.timestamp.after.max.ms"] == str(2**63 - 1))
    (tmp_path / "bourse.toml").write_text(
        "[topic.trades]\npartitions = 8\nreplication_factor = 1\n"
        '[topic.trades.config]\n"retention.ms" = 1000\npreallocate = true\n"compression.type" = "zstd"\n'
    )
    for options in ([], ["--dry-run"]):
        code, _, err = bourse("topics", "apply", *options)
        assert (code, _settings(cluster, "polls")["retention.ms"]) == (2, "-1")
        assert f"{cluster.prefix}.polls keeps its records for ever" in err
    kept = "".join(f'[topic.{name}.config]\n"retention.ms" = -1\n' for name in ("polls", "alerts", "dead-letters"))
    with (tmp_path / "bourse.toml").open("a") as file:
        file.write(kept)
    code, out, _ = bourse("topics", "apply")
    assert code == 0
    assert f"{cluster.prefix}.trades: partitions 6 → 8, retention.ms -1 → 1000, " in out
    wait_for(lambda: _settings(cluster, "trades")["retention.ms"] == "1000")
    found = _settings(cluster, "trades")
    assert (found["compression.type"], found["preallocate"]) == ("zstd", "true")
    assert _partitions(cluster)[f"{cluster.prefix}.trades"] == 8
    wait_for(lambda: bourse("topics", "apply", "--dry-run")[1].count("as declared") == 5)


def test_apply_never_takes_partitions_or_topics_away(bourse: Run, cluster: Cluster) -> None:
    """More partitions than declared: exit 2 with what to write; another topic is left alone."""
    admin = cluster.admin()
    others = [NewTopic(f"{cluster.prefix}.{name}", 7, 1) for name in ("trades", "theirs")]
    for done in admin.create_topics(others).values():
        done.result(10)
    code, out, err = bourse("topics", "apply", "--replication-factor", "1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "put `partitions = 7` under [topic.trades] in bourse.toml" in err
    Path("bourse.toml").write_text("[topic.trades]\npartitions = 7\n")
    assert bourse("topics", "apply", "--replication-factor", "1")[0] == 0
    assert _partitions(cluster)[f"{cluster.prefix}.theirs"] == 7


def test_one_broker_does_not_choose_the_number_of_replicas(bourse: Run, cluster: Cluster) -> None:
    """It must be given; more than there are brokers, and unknown settings, are the cluster's to refuse."""
    for arguments, says in (
        ([], "the cluster has too few brokers: pass --replication-factor (at most 1)"),
        (["--replication-factor", "3"], "the cluster refuses"),
    ):
        code, out, err = bourse("topics", "apply", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
    Path("bourse.toml").write_text("[topic.polls.config]\nnonsense = 1\n")
    code, _, err = bourse("topics", "apply", "--replication-factor", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert "nonsense" in err


def test_what_a_topic_has_decides_on_its_replicas_in_sync(bourse: Run, cluster: Cluster) -> None:
    """A topic with one replica that needed two in sync would take nothing any more."""
    assert bourse("topics", "apply", "--replication-factor", "1")[0] == 0
    code, out, err = bourse("topics", "apply", "--replication-factor", "3")
    assert (code, out.count("as declared"), err) == (0, 5, "")
    assert _settings(cluster, "trades")["min.insync.replicas"] == "1"


def test_a_missing_topic_names_the_command_that_creates_it(bourse: Run) -> None:
    """Exit 2."""
    code, out, err = bourse("tail", "trades", "--exit-at-end")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "create what is declared with `bourse topics apply" in err
    assert "or see --topic-prefix" in err


def test_a_broker_that_is_not_there_is_given_up_within_ten_seconds() -> None:
    """Every command: exit 2, one line, no traceback."""
    where = ["--bootstrap-servers", f"127.0.0.1:{free_port()}"]
    commands = [["topics", "list"], ["topics", "apply"], ["tail", "trades"]]
    begin = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "bourse_cli", *command, *where],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    for process in running:
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
        assert "does not answer" in err
    assert time.monotonic() - begin < 10


# --- registry ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["small", "apicurio"])
def registry_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the address of each registry in turn."""
    if request.param == "apicurio":
        yield request.getfixturevalue("apicurio_url")
    else:
        with serve_registry(compatible=gate) as registry:
            yield registry.url


def test_a_service_finds_its_schema_or_names_the_command(bourse: Run, registry_url: str, prefix: str) -> None:
    """Looking up registers nothing; registering is done once."""
    where = ("--registry-url", registry_url)
    registry = Registry(registry_url)
    with pytest.raises(
        ConfigurationError, match=rf"{prefix}.trades-value is not registered .*`bourse schemas register"
    ):
        registry.serializer(TRADES, prefix)
    code, out, _ = bourse("schemas", "check", *where)
    assert (code, out.count("is not registered: run `bourse schemas register")) == (1, 5)
    with SchemaRegistryClient({"url": registry_url}) as client:
        assert [subject for subject in client.get_subjects() if subject.startswith(prefix)] == []
        code, first, err = bourse("schemas", "register", *where)
        assert (code, err) == (0, "")
        assert [line.partition(":")[0] for line in first.splitlines()] == [t.subject(prefix) for t in TOPICS]
        assert bourse("schemas", "register", *where) == (0, first, "")
        for topic in TOPICS:
            assert client.get_versions(topic.subject(prefix)) == [1]
            assert client.get_compatibility(topic.subject(prefix)) == "FULL_TRANSITIVE"
    code, out, _ = bourse("schemas", "check", *where)
    assert (code, out) == (0, "".join(f"{topic.subject(prefix)}: ok\n" for topic in TOPICS))
    assert Registry(registry_url).schema(int(first.splitlines()[0].rpartition(" ")[2])) == avro_schema(TRADES.event)


def test_a_subject_with_another_schema(bourse: Run, registry_url: str, prefix: str) -> None:
    """Compatible: a version more. Not compatible: refused with the reason, found by check, exit 1."""
    where = ("--registry-url", registry_url)
    smaller, other = deepcopy(avro_schema(TRADES.event)), deepcopy(avro_schema(POLLS.event))
    smaller["fields"] = [field for field in smaller["fields"] if field["name"] != "exchange_type"]
    other["fields"] = [{"name": "rows", "type": "string"}]
    with SchemaRegistryClient({"url": registry_url}) as client:
        client.register_schema(TRADES.subject(prefix), Schema(json.dumps(smaller), "AVRO"))
        client.register_schema(POLLS.subject(prefix), Schema(json.dumps(other), "AVRO"))
    registry = Registry(registry_url)
    with pytest.raises(ConfigurationError, match="has no version equal to this release's schema"):
        registry.serializer(TRADES, prefix)
    registry.register(TRADES, prefix)
    assert registry.serializer(TRADES, prefix).topic == f"{prefix}.trades"
    with pytest.raises(SchemaIncompatible, match=POLLS.subject(prefix)):
        registry.register(POLLS, prefix)
    code, out, err = bourse("schemas", "register", *where)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {POLLS.subject(prefix)}: ")
    code, out, _ = bourse("schemas", "check", *where)
    assert code == 1
    assert f"{TRADES.subject(prefix)}: ok\n" in out
    assert f"{POLLS.subject(prefix)}: compared with version 1, the type of rows is " in out
    assert "Released schemas are frozen" in out


def test_a_weaker_compatibility_is_found_and_fixed(bourse: Run, registry_url: str, prefix: str) -> None:
    """Somebody set it by hand."""
    where = ("--registry-url", registry_url)
    assert bourse("schemas", "register", *where)[0] == 0
    with SchemaRegistryClient({"url": registry_url}) as client:
        client.set_compatibility(TRADES.subject(prefix), "NONE")
    code, out, _ = bourse("schemas", "check", *where)
    assert (code, out.count(": ok")) == (1, 4)
    assert f"{TRADES.subject(prefix)}: compatibility is NONE, not FULL_TRANSITIVE" in out
    assert bourse("schemas", "register", *where)[0] == 0
    assert bourse("schemas", "check", *where)[0] == 0


def test_an_id_that_the_registry_does_not_know_is_undecodable(registry_url: str) -> None:
    """The record is at fault."""
    with pytest.raises(Undecodable, match="schema id 4000000 is unknown"):
        Registry(registry_url).deserializer(DeadLetter)(b"\x00" + (4_000_000).to_bytes(4, "big") + b"abc")


# --- tail -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(bourse: Run, small_registry: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `bourse` with topics and schemas in place."""
    monkeypatch.setenv("BOURSE_REGISTRY_URL", small_registry)
    assert bourse("topics", "apply", "--replication-factor", "1", "--any-time")[0] == 0
    assert bourse("schemas", "register")[0] == 0
    return bourse


def _letter(number: int, origin: str = "ours") -> DeadLetter:
    return DeadLetter(
        reason=Reason.REJECTED,
        message=f"n{number}",
        stage=Stage.CONSUME,
        origin=origin,
        payload=b"\x00\xff",
        original_headers={},
        failed_at=NOW + timedelta(milliseconds=number),
    )


@pytest.fixture
def publish(cluster: Cluster, small_registry: str) -> Callable[..., None]:
    """Return `publish(letters, commit=True)`: one transaction; bytes among the letters are produced as they are."""

    def publish(letters: Sequence[DeadLetter | bytes], commit: bool = True) -> None:
        serialize: Serializer[Any] = Registry(small_registry).serializer(DEAD_LETTERS, cluster.prefix)
        producer = cluster.transactional_producer(f"{cluster.prefix}-test")
        producer.init_transactions(10)
        producer.begin_transaction()
        for letter in letters:
            if isinstance(letter, bytes):
                producer.produce(DEAD_LETTERS.full_name(cluster.prefix), letter)
            else:
                record = serialize(letter)
                producer.produce(
                    record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers
                )
        assert producer.flush(10) == 0
        if commit:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
        producer.close()

    return publish


TAIL = ("tail", "dead-letters", "--from-beginning", "--exit-at-end")


def _messages(out: str) -> list[str]:
    return [json.loads(line)["message"] for line in out.splitlines()]


def test_an_empty_topic_ends_at_once(ready: Run) -> None:
    """All six partitions of it."""
    assert ready("tail", "trades", "--from-beginning", "--exit-at-end") == (0, "", "")
    assert ready("tail", "trades", "--exit-at-end", "--json") == (0, "", "")


def test_tail_shows_what_is_committed(ready: Run, publish: Callable[..., None], cluster: Cluster) -> None:
    """Markers and aborted transactions are invisible; the end is found behind them."""
    publish([_letter(1), _letter(2)])
    publish([_letter(3)], commit=False)
    publish([_letter(4)])
    publish([_letter(5)], commit=False)
    code, out, err = ready(*TAIL, "--json")
    assert (code, _messages(out), err) == (0, ["n1", "n2", "n4"], "")
    assert ready("tail", f"{cluster.prefix}.dead-letters", *TAIL[2:], "--json")[1] == out
    assert ready("tail", "dead-letters", "--exit-at-end") == (0, "", "")


@pytest.mark.usefixtures("ready")
def test_what_is_on_the_wire_is_a_cloud_event_to_its_own_sdk(cluster: Cluster, small_registry: str) -> None:
    """CloudEvents 1.0, Kafka binding, binary mode: headers as the broker hands them out."""
    event = trade()
    sent = Registry(small_registry).serializer(TRADES, cluster.prefix)(event)
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(sent.topic, sent.value, sent.key, timestamp=sent.timestamp, headers=sent.headers)
    producer.commit_transaction()
    producer.close()
    (record,) = read(cluster, sent.topic)
    message = KafkaMessage(cast("Any", record.headers), record.key or b"", record.value or b"")
    parsed = from_binary(message, cast("Format", _Avro()), CloudEvent)
    assert parsed.get_attributes() == {
        "specversion": "1.0",
        "id": event.event_id,
        "source": event.source,
        "type": "ir.bourse.trade.v1",
        "time": event.observed_at,
        "subject": event.instrument,
        "datacontenttype": "application/vnd.apache.avro",
        "partitionkey": event.instrument,
    }
    assert parsed.get_data() == record.value


class _Avro:
    """CloudEvents' view of data that is left as it is."""

    def read_data(self, body: Any, _: str | None) -> Any:
        return body


def test_json_and_metadata(ready: Run, publish: Callable[..., None], cluster: Cluster) -> None:
    """One object a line with the Avro field names; `_…` beside them when asked for."""
    publish([_letter(0)])
    code, out, err = ready(*TAIL, "--json", "--with-metadata")
    assert (code, err, out.count("\n")) == (0, "", 1)
    instant = NOW.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    shown = json.loads(out)
    assert [name for name in shown if not name.startswith("_")] == list(DeadLetter.__struct_fields__)
    assert (shown["reason"], shown["payload"], shown["failed_at"]) == ("REJECTED", "AP8=", instant)
    assert {name: value for name, value in shown.items() if name.startswith("_")} == {
        "_topic": f"{cluster.prefix}.dead-letters",
        "_partition": 0,
        "_offset": 0,
        "_timestamp": instant,
        "_key": "ours",
        "_headers": {},
    }
    plain = ready(*TAIL, "--with-metadata")[1]
    assert "message=n0" in plain
    assert "_offset=0" in plain
    assert "consumer=" not in plain


def test_chosen_fields(ready: Run, publish: Callable[..., None]) -> None:
    """Only these, in this order, null or not; the record's metadata can be chosen too; an unknown one is refused."""
    publish([_letter(0), _letter(1)])
    assert ready(*TAIL, "--fields", "message,consumer,reason")[1].splitlines() == [
        "message=n0 consumer=- reason=REJECTED",
        "message=n1 consumer=- reason=REJECTED",
    ]
    assert ready(*TAIL, "--fields", "_offset, message", "--json", "--limit", "1")[1] == '{"_offset":0,"message":"n0"}\n'
    code, out, err = ready(*TAIL, "--fields", "mesage")
    assert (code, out) == (2, "")
    assert err == "Error: --fields: dead-letters has no field 'mesage'; did you mean message?\n"


def test_a_topic_that_cannot_be_decoded_at_all(ready: Run, publish: Callable[..., None]) -> None:
    """A few foreign records are passed over; after twenty in a row it is the registry that is wrong."""
    publish([*[b"foreign"] * 19, _letter(0), *[b"foreign"] * 30])
    code, out, err = ready(*TAIL, "--json")
    assert (code, _messages(out)) == (2, ["n0"])
    assert err.count("not in the Confluent wire format") == 19 + 20
    assert "Error: 20 records in a row cannot be decoded: is --registry-url " in err.splitlines()[-1]


def test_key_and_limit(ready: Run, publish: Callable[..., None]) -> None:
    """The limit counts what is shown."""
    publish([_letter(number, "even" if number % 2 == 0 else "odd") for number in range(10)])
    assert _messages(ready(*TAIL, "--json", "--key", "even")[1]) == ["n0", "n2", "n4", "n6", "n8"]
    assert _messages(ready(*TAIL, "--json", "--key", "odd", "--limit", "2")[1]) == ["n1", "n3"]
    assert ready(*TAIL, "--key", "none") == (0, "", "")
    code, out, _ = ready("tail", "dead-letters", "--from-beginning", "--limit", "3", "--json")
    assert (code, _messages(out)) == (0, ["n0", "n1", "n2"])


def test_a_record_that_cannot_be_decoded_is_a_line_on_stderr(ready: Run, publish: Callable[..., None]) -> None:
    """The others are shown."""
    publish([_letter(1), b"nonsense", b"", b"\x00\x00\x00\x0f\xff", b"\x00\x00\x00\x00\x01abc", _letter(2)])
    code, out, err = ready(*TAIL, "--json")
    assert (code, _messages(out)) == (0, ["n1", "n2"])
    assert [line.partition(":")[0].rpartition("-")[2] for line in err.splitlines()] == ["1", "2", "3", "4"]


def test_a_registry_that_is_away_ends_tail(ready: Run, publish: Callable[..., None]) -> None:
    """Exit 2: no record can be shown without it."""
    publish([_letter(1)])
    code, out, err = ready(*TAIL, "--registry-url", "http://127.0.0.1:1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the schema registry at http://127.0.0.1:1 does not answer" in err


def test_a_pinned_setting_is_refused(ready: Run) -> None:
    """It would show what was never committed."""
    code, _, err = ready(*TAIL, "-X", "isolation.level=read_uncommitted")
    assert (code, err) == (
        2,
        "Error: -X isolation.level=read_uncommitted: this setting is fixed to read_committed; leave it out\n",
    )


def test_a_reader_that_goes_away_is_no_error(ready: Run, publish: Callable[..., None], tmp_path: Path) -> None:
    """`bourse tail … | head -1`: more than a pipe holds, and nothing on stderr."""
    publish([_letter(number, "x" * 100) for number in range(2000)])
    command = f"{sys.executable} -m bourse_cli {' '.join(TAIL)} --json --with-metadata 2>{tmp_path / 'err'} | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True, timeout=30
    )
    first, code = done.stdout.splitlines()
    assert json.loads(first)["message"] == "n0"
    assert (code, (tmp_path / "err").read_text()) == ("0", "")


def test_tail_follows_until_it_is_interrupted(
    ready: Run, publish: Callable[..., None], wait_for: Callable[..., Any], tmp_path: Path
) -> None:
    """Records appear as they are committed, line by line, into a pipe too; Ctrl-C ends it with exit 0."""
    publish([_letter(0)])
    out, err = tmp_path / "out", tmp_path / "err"
    command = [sys.executable, "-m", "bourse_cli", "tail", "dead-letters", "--from-beginning", "--json"]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=os.environ)
        try:
            wait_for(lambda: out.read_text().count("\n") == 1)
            publish([_letter(1)])
            wait_for(lambda: out.read_text().count("\n") == 2)
            process.send_signal(2)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
    assert (_messages(out.read_text()), err.read_text()) == (["n0", "n1"], "")


# --- one record, as the contract has it -------------------------------------------------------------------------------


def test_a_timestamp_far_ahead_needs_any_time(bourse: Run, cluster: Cluster, wait_for: Callable[..., Any]) -> None:
    """Kafka refuses event time an hour ahead of its own unless the topics were made for it."""
    far = int((NOW + timedelta(days=400)).timestamp() * 1000)
    assert bourse("topics", "apply", "--replication-factor", "1")[0] == 0
    assert refusal(cluster, far) is not None
    assert bourse("topics", "apply", "--any-time")[0] == 0
    wait_for(lambda: refusal(cluster, far) is None)


def refusal(cluster: Cluster, timestamp: int) -> str | None:
    producer = cluster.transactional_producer(f"{cluster.prefix}-far")
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(POLLS.full_name(cluster.prefix), b"x", b"k", timestamp=timestamp)
    try:
        producer.commit_transaction()
    except KafkaException as error:
        return str(error.args[0].str())
    finally:
        producer.close()
    return None
