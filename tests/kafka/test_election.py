"""Who leads: one of several instances, the next one at once after a clean stop, within ten seconds after a death."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from structlog.testing import capture_logs

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.kafka import Kafka, MockKafka
from bourse_schemas.election import Election
from bourse_schemas.kafka import Cluster, abandon

pytestmark = pytest.mark.kafka
WaitFor = Callable[..., Any]


@pytest.fixture
def members(kafka: Kafka, prefix: str) -> Iterator[Callable[[], Election]]:
    """Return what makes one more instance."""
    cluster = Cluster(kafka.bootstrap_servers, "http://127.0.0.1:9", prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    with ExitStack() as stack:

        def member() -> Election:
            election = Election(cluster, f"{cluster.prefix}-producer", 600)
            stack.callback(election.close)
            return election

        yield member


def leaders(elections: list[Election]) -> list[Election]:
    """Return those that lead."""
    return [election for election in elections if election.term() is not None]


def test_one_leads_and_stays_in_office(members: Callable[[], Election], wait_for: WaitFor) -> None:
    """Others that come do not take over; after a clean stop one of them does at once, in a term of its own."""
    first = members()
    assert first.term(10) == 1
    others = [members(), members()]
    began = time.monotonic()
    while time.monotonic() - began < 3:
        assert leaders([first, *others]) == [first]
    first.close()
    assert first.term() is None
    began = time.monotonic()
    wait_for(lambda: leaders(others), 5)
    assert time.monotonic() - began < 3
    assert len(leaders(others)) == 1


def test_a_leader_that_resigns_joins_again(members: Callable[[], Election], wait_for: WaitFor) -> None:
    """A fenced leader gives its term up; alone it gets a new one, among others the one that the group chooses does."""
    first = members()
    assert first.term(10) == 1
    first.resign()
    assert first.term() is None
    assert wait_for(lambda: first.term(1), 10) == 2
    second = members()
    assert second.term(2) is None
    first.resign()
    assert first.term() is None
    (leader,) = wait_for(lambda: leaders([first, second]), 10)
    assert leader.term() == (3 if leader is first else 1)


def test_a_leader_that_does_not_poll_leaves(kafka: Kafka, prefix: str, wait_for: WaitFor) -> None:
    """Its service hangs: a standby leads within seconds. The one that hung joins again once its service asks."""
    cluster = Cluster(kafka.bootstrap_servers, "http://127.0.0.1:9", prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    hangs, healthy = (
        Election(cluster, f"{cluster.prefix}-producer", 3.0),
        Election(cluster, f"{cluster.prefix}-producer", 600),
    )
    try:
        assert wait_for(lambda: hangs.term(1), 15) == 1
        assert healthy.term() is None
        assert wait_for(lambda: healthy.term(1), 20) == 1
        assert (hangs.leads, hangs.overdue()) == (False, True)
        hangs.owe(None)
        assert (hangs.term(3), hangs.overdue(), healthy.leads) == (None, False, True)
        healthy.close()
        assert wait_for(lambda: hangs.term(1), 15) == 2
    finally:
        hangs.close()
        healthy.close()


def test_a_leader_that_polls_stays(kafka: Kafka, prefix: str, wait_for: WaitFor) -> None:
    """Each poll moves the deadline, and while no poll is due there is none."""
    cluster = Cluster(kafka.bootstrap_servers, "http://127.0.0.1:9", prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    now = [0.0]
    election = Election(cluster, f"{cluster.prefix}-producer", 100.0, lambda: now[0])
    try:
        assert wait_for(lambda: election.term(1), 15) == 1
        for due in (60.0, 300.0):
            election.owe(due)
            now[0] += due + 99
            assert (election.term(0.5), election.overdue()) == (1, False)
        election.owe(None)
        now[0] += 100_000
        assert (election.term(0.5), election.overdue()) == (1, False)
        election.owe(0)
        now[0] += 101
        assert election.overdue()
        wait_for(lambda: not election.leads)
    finally:
        election.close()


def test_a_member_whose_client_fails_for_good_joins_again(kafka: Kafka, prefix: str, wait_for: WaitFor) -> None:
    """A consumer of the same static member fences it: a fatal error. It takes its place back, in a new term."""
    static = {"group.instance.id": "one"}
    cluster = Cluster(kafka.bootstrap_servers, "http://127.0.0.1:9", prefix, static)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    election = Election(cluster, f"{prefix}-producer", 600)
    with capture_logs() as lines, ExitStack() as stack:
        stack.callback(election.close)
        assert election.term(15) == 1
        other = cluster.consumer(f"{prefix}-producer", partition_assignment_strategy="cooperative-sticky")
        stack.callback(abandon, other)
        other.subscribe([f"{prefix}.polls"])
        wait_for(lambda: (other.poll(0.1), election.term())[1] == 2, 30)
    (again,) = [line["error"] for line in lines if line["event"] == "joining the group again"]
    assert "Static consumer fenced" in again


def test_the_mock_cluster_elects_too(mock_kafka: MockKafka, prefix: str) -> None:
    """So that whatever runs without Kafka's jars runs the same way."""
    cluster = Cluster(mock_kafka.bootstrap_servers, "http://127.0.0.1:9", prefix)
    cluster.transactional_producer("maker").list_topics(f"{prefix}.polls", timeout=10)
    election = Election(cluster, f"{cluster.prefix}-producer", 600)
    assert election.term(15) == 1
    election.close()


class Lost(Cluster):
    """The first consumer of each group reaches no broker, as after an empty list of brokers."""

    def consumer(self, group: str | None = None, **pinned: Any) -> Any:
        """Return one."""
        made: set[str | None] = self.__dict__.setdefault("made", set())
        servers = self.bootstrap_servers if group in made else "127.0.0.1:9"
        made.add(group)
        return Cluster(servers, self.registry_url, self.prefix).consumer(group, **pinned)


def test_a_member_that_has_lost_its_brokers_joins_with_a_new_client(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look like a standby for ever."""
    monkeypatch.setattr("bourse_schemas.kafka.LOST_SECONDS", 1.0)
    cluster = Lost(kafka.bootstrap_servers, "http://127.0.0.1:9", prefix)
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
    election = Election(cluster, f"{prefix}-producer", 600)
    assert election.term(30) == 1
    election.close()


class Mistaken(Cluster):
    """Whatever nobody has thought of."""

    def consumer(self, group: str | None = None, **pinned: Any) -> Any:
        """Fail."""
        raise RuntimeError("a mistake of ours")


def test_who_can_no_longer_be_elected_does_not_stand_by_for_ever() -> None:
    """An error that nobody expected ends the producer, and with it the orchestrator's patience."""
    election = Election(Mistaken("127.0.0.1:9", "http://127.0.0.1:9"), "group", 600)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            election.term(10)
    election.close()
