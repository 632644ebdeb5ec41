"""A real Alertmanager: what it knows while alerts begin and end, and while it or the consumer is restarted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from msgspec import structs

from bourse_consumers.api import Partition
from bourse_consumers.notify.channels import Channel, Webhook
from bourse_consumers.notify.consumer import Alertmanager
from bourse_consumers.notify.words import example
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, stream_of
from bourse_sandbox.kafka import free_port
from bourse_sandbox.processes import spawn
from bourse_schemas.events import AlertState, DeadLetter, PriceAlert, ResolvedBy, Scope, Severity
from tests.web import Asked, Web, serving

EXAMPLE = Path(__file__).parents[2] / "examples" / "alertmanager.yml"
ALERTS_0 = Partition("bourse.alerts", 0)


def alert(alert_id: str, rule: str, instrument: str | None, **fields: Any) -> PriceAlert:
    """Return an alert that is raised now."""
    given: dict[str, Any] = {
        "labels": {"team": "metals", "my-label": "x"},
        "channels": [],
        "symbol": (instrument or "")[4:8] or None,
    }
    return structs.replace(
        example(datetime.now(UTC)), **{**given, "alert_id": alert_id, "rule": rule, "instrument": instrument, **fields}
    )


def over(of: PriceAlert, why: ResolvedBy = ResolvedBy.CONDITION) -> PriceAlert:
    """Return the end of an alert."""
    return structs.replace(of, state=AlertState.RESOLVED, resolved_by=why, raised_at=datetime.now(UTC))


class Place:
    """An Alertmanager with the example's routes, and a consumer over alerts in memory."""

    def __init__(self, folder: Path, web: Web, wait_for: Callable[..., Any]) -> None:
        self.folder, self.web, self.wait_for = folder, web, wait_for
        self.url = f"http://127.0.0.1:{free_port()}"
        text = (
            EXAMPLE.read_text("utf-8")
            .replace("http://127.0.0.1:9095", web.url)
            .replace("group_interval: 1m", "group_interval: 1s")
        )
        (folder / "alertmanager.yml").write_text(text, "utf-8")
        self.memory = Memory()
        self.memory.committed[ALERTS_0] = 0
        self.runner = self.consume()

    def consume(self) -> Runner:
        """Return a runner of a new consumer, as after a restart."""
        channel = Channel.model_construct(alertmanager=self.url, language="en")
        channel.__dict__["sender"] = Webhook(f"{self.url}/api/v2/alerts")
        consumer = Alertmanager("robot", {"robot": channel})
        consumer.interval = 0.2
        return Runner(consumer, stream_of(consumer, self.memory), name="test")

    @contextmanager
    def alertmanager(self, number: int) -> Iterator[None]:
        """Run Alertmanager, each time without what an earlier one knew, and kill it in the end."""
        log = self.folder / f"log-{number}"
        command = [
            "prometheus-alertmanager", f"--config.file={self.folder / 'alertmanager.yml'}",
            f"--storage.path={self.folder / str(number)}", f"--web.listen-address={self.url.removeprefix('http://')}",
            "--cluster.listen-address=",
        ]  # fmt: skip
        with spawn(command, stdout=log, stderr=log):
            self.wait_for(self.answers, 30)
            yield

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/-/ready").is_success
        except httpx2.TransportError:
            return False

    def get(self, path: str) -> Any:
        return httpx2.get(f"{self.url}/api/v2/{path}").json()

    def states(self) -> dict[tuple[str, str], str]:
        """Return the state of each alert that Alertmanager has as open."""
        return {
            (each["labels"]["alertname"], each["labels"]["instrument"]): each["status"]["state"]
            for each in self.get("alerts")
        }

    def becomes(self, expected: dict[tuple[str, str], str]) -> None:
        """Run the consumer until Alertmanager has exactly these alerts."""

        def there() -> bool:
            self.runner.step(0)
            return self.states() == expected

        self.wait_for(there, 30)

    def received(self, receiver: str, status: str) -> set[str]:
        """Return the instruments for which a receiver got a message of this status."""
        got = [json.loads(asked.body) for asked in list(self.web.asked) if asked.path == f"/{receiver}"]
        return {each["labels"]["instrument"] for body in got for each in body["alerts"] if each["status"] == status}


def test_alertmanager_knows_what_is_open(
    demand: Callable[[str], None], tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Firing, grouped, silenced, inhibited and resolved; a restart of either side resolves nothing."""
    demand("prometheus-alertmanager")
    first, second = alert("1", "fast-move", "IRO1AAAA0001"), alert("2", "fast-move", "IRO1BBBB0001")
    critical = alert("3", "limit", "IRO1CCCC0001", severity=Severity.CRITICAL)
    lesser = alert("4", "surge", "IRO1CCCC0001", raised_at=datetime.now(UTC) + timedelta(hours=1))
    with serving() as web:
        place = Place(tmp_path, web, wait_for)
        place.memory.append(first, second, critical, lesser)
        everything = {
            ("fast-move", "IRO1AAAA0001"): "active",
            ("fast-move", "IRO1BBBB0001"): "active",
            ("limit", "IRO1CCCC0001"): "active",
            ("surge", "IRO1CCCC0001"): "suppressed",
        }
        with place.alertmanager(1):
            place.becomes(everything)
            (found,) = [each for each in place.get("alerts") if each["labels"]["alertname"] == "limit"]
            assert found["labels"] == {
                "alertname": "limit", "instrument": "IRO1CCCC0001", "symbol": "CCCC", "severity": "critical",
                "scope": "instrument", "source": "test", "team": "metals", "my_label": "x",
            }  # fmt: skip
            assert "now 5,488" in found["annotations"]["description"]
            groups = [
                [each["labels"]["instrument"] for each in group["alerts"]] for group in place.get("alerts/groups")
            ]
            assert sorted(["IRO1AAAA0001", "IRO1BBBB0001"]) in [sorted(group) for group in groups]
            silence = {
                "matchers": [{"name": "instrument", "value": "IRO1BBBB0001", "isRegex": False, "isEqual": True}],
                "startsAt": datetime.now(UTC).isoformat(),
                "endsAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
                "createdBy": "test",
                "comment": "results today",
            }
            assert httpx2.post(f"{place.url}/api/v2/silences", json=silence).is_success
            place.becomes(everything | {("fast-move", "IRO1BBBB0001"): "suppressed"})
            wait_for(lambda: {"IRO1AAAA0001", "IRO1CCCC0001"} <= place.received("desk", "firing"), 30)
        # The next one knows nothing, and has no silence.
        with place.alertmanager(2):
            place.becomes(everything)
            place.runner = place.consume()
            place.becomes(everything)
            assert place.received("desk", "resolved") == set()
            place.memory.append(over(first), over(second, ResolvedBy.DAY_END))
            place.becomes({key: state for key, state in everything.items() if key[0] != "fast-move"})
            wait_for(lambda: "IRO1AAAA0001" in place.received("desk", "resolved"), 30)
        assert place.received("desk", "resolved") <= {"IRO1AAAA0001", "IRO1BBBB0001"}
        assert place.received("head-of-desk", "firing") == set(), "it is not open for ten minutes"
        assert place.memory.committed == {ALERTS_0: 6}


def test_a_renamed_symbol_ends_under_its_old_name(wait_for: Callable[..., Any]) -> None:
    """Another set of labels would be another alert, and the first one would stay open."""
    first = alert("1", "fast-move", "IRO1AAAA0001")
    with serving() as web:
        channel = Channel.model_construct(alertmanager=web.url, language="fa")
        channel.__dict__["sender"] = Webhook(f"{web.url}/api/v2/alerts")
        memory = Memory()
        memory.committed[ALERTS_0] = 1  # the first alert is from before a restart
        feed = alert("2", "feed-bad", None, scope=Scope.FEED)
        memory.append(first, over(structs.replace(first, symbol="NEW", severity=Severity.WARNING)), feed)
        consumer = Alertmanager("robot", {"robot": channel})
        running = Runner(consumer, stream_of(consumer, memory), name="test")
        wait_for(lambda: (running.step(0), len(web.asked) >= 2)[1])
        ended, opened = web.bodies()[0]
        assert (ended["labels"]["symbol"], ended["labels"]["severity"]) == ("AAAA", "info")
        assert ended["startsAt"] < ended["endsAt"] < opened["endsAt"]
        assert [each["labels"]["alertname"] for each in web.bodies()[1]] == ["feed-bad"]


def test_an_alertmanager_that_is_unreachable_is_waited_for() -> None:
    """Nothing is committed that it does not have."""
    channel = Channel.model_construct(alertmanager="x")
    channel.__dict__["sender"] = Webhook(f"http://127.0.0.1:{free_port()}")
    memory = Memory()
    memory.committed[ALERTS_0] = 0
    memory.append(alert("1", "fast-move", "IRO1AAAA0001"))
    consumer = Alertmanager("robot", {"robot": channel})
    running = Runner(consumer, (stream := stream_of(consumer, memory)), name="test")
    with pytest.raises(AssertionError, match="has asked to wait"):
        running.run()
    assert memory.committed == {ALERTS_0: 0}
    assert stream.waited


@pytest.mark.parametrize(("status", "open_after"), [(503, ["first", "second"]), (400, ["first"])])
def test_an_alertmanager_that_fails_with_alerts_open_holds_up_no_new_alert(
    wait_for: Callable[..., Any], status: int, open_after: list[str]
) -> None:
    """It goes to the dead letters, and does not spoil the next post of the open alerts if it was refused."""
    with serving() as web:
        asked: list[None] = []
        web.then = lambda: asked.append(None)
        channel = Channel.model_construct(alertmanager=web.url)
        channel.__dict__["sender"] = Webhook(f"{web.url}/api/v2/alerts")
        memory = Memory()
        memory.committed[ALERTS_0] = 0
        memory.append(alert("1", "first", "IRO1AAAA0001"))
        consumer = Alertmanager("robot", {"robot": channel}, give_up=timedelta(0))
        consumer.interval = 0.0
        running = Runner(consumer, (stream := stream_of(consumer, memory)), name="test")

        def asked_again(times: int = 2) -> None:
            most = len(asked) + times
            wait_for(lambda: (running.step(0), len(asked) >= most)[1])

        asked_again()
        assert consumer.trouble() is None
        web.status = status
        asked_again()
        assert "127.0.0.1 answers" in (consumer.trouble() or "")
        memory.append(alert("2", "second", "IRO1BBBB0001"))
        wait_for(lambda: (running.step(0), memory.emitted)[1])
        assert [letter.original_offset for _, letter in memory.emitted if isinstance(letter, DeadLetter)] == [1]
        assert memory.committed == {ALERTS_0: 2}
        web.status = 200
        asked_again()
        assert [each["labels"]["alertname"] for each in web.bodies()[-1]] == open_after
        assert consumer.trouble() is None
        assert stream.waited == []


def test_an_alert_that_is_refused_for_what_is_in_it(wait_for: Callable[..., Any]) -> None:
    """It alone goes to the dead letters, once; after a restart it is refused once more at most; others are posted."""
    refusals: list[int] = []

    def status(asked: Asked) -> int:
        if b'"bad"' not in asked.body:
            return 200
        refusals.append(len(json.loads(asked.body)))
        return 400

    with serving() as web:
        web.status = status
        channel = Channel.model_construct(alertmanager=web.url)
        channel.__dict__["sender"] = Webhook(f"{web.url}/api/v2/alerts")
        memory = Memory()
        memory.committed[ALERTS_0] = 0
        rules = ["first", "bad", "second"]
        memory.append(*(alert(rule, rule, f"IRO1AAAA000{n}") for n, rule in enumerate(rules)))
        for restart in range(2):
            consumer = Alertmanager("robot", {"robot": channel}, give_up=timedelta(0))
            consumer.interval = 0.0
            running = Runner(consumer, stream_of(consumer, memory), name="test")
            refusals.clear()
            began = len(web.asked)
            wait_for(lambda began=began, running=running: (running.step(0), len(web.asked) >= began + 5)[1])
            posts = [[each["labels"]["alertname"] for each in body] for body in web.bodies()[-2:]]
            assert posts == [["first", "second"]] * 2
            assert refusals.count(1) == 1, f"restart {restart}"
            assert consumer.trouble() is None
        letters = [letter for _, letter in memory.emitted if isinstance(letter, DeadLetter)]
        assert [(letter.original_offset, letter.message) for letter in letters] == [
            (1, "channel robot: 127.0.0.1 answers 400 Bad Request")
        ]
