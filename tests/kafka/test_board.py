"""`bourse board` as it runs: real Kafka that stops, topics that are created again, a board that is killed; nginx."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from playwright.sync_api import Page, expect

from bourse_cli.topics import apply_topics, plan_topics
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.faults import Fault
from bourse_sandbox.kafka import Kafka, free_port
from bourse_sandbox.processes import spawn
from bourse_sandbox.stack import Stack
from bourse_schemas.events import Event
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS, topic_of
from reliability.certificate import self_signed
from tests.consumers.test_board_page import PAGE, browser, visit  # noqa: F401  # fixtures
from tests.samples import alert, event, marker

ROOT = Path(__file__).parents[2]
ONE = {"opened": 0, "traded": 1, "revised": 0, "cancelled": 0}


def publish(cluster: Cluster, *events: Event) -> None:
    """Publish events in one transaction."""
    producer = cluster.transactional_producer(f"{cluster.prefix}-test")
    producer.init_transactions(30)
    producer.begin_transaction()
    for each in events:
        record = cluster.registry().serializer(topic_of(type(each)), cluster.prefix)(each)
        producer.produce(record.topic, record.value, record.key, timestamp=record.timestamp)
    producer.commit_transaction(30)


def create(cluster: Cluster) -> None:
    """Create the topics."""
    apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))


@contextmanager
def running(cluster: Cluster, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run `bourse board`."""
    at = ("--bootstrap-servers", cluster.bootstrap_servers, "--registry-url", cluster.registry_url)
    command = [sys.executable, "-m", "bourse_cli", "board", "--http", str(port), *at, "--topic-prefix", cluster.prefix]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as board:
        try:
            yield board
        finally:
            board.kill()


def answers(url: str, status: int = 200, **options: Any) -> bool:
    """Return whether a server answers so."""
    try:
        return httpx2.get(url, timeout=5, **options).status_code == status
    except httpx2.TransportError:
        return False


@pytest.mark.kafka
def test_the_page_goes_on_whatever_happens_to_kafka_and_to_the_board(
    own_kafka: Callable[..., Kafka],
    small_registry: str,
    prefix: str,
    visit: Callable[..., Page],  # noqa: F811
    wait_for: Callable[..., Any],
) -> None:
    """One page, never reloaded, from the first poll to a board that was killed."""
    kafka, port = own_kafka(), free_port()
    cluster = Cluster(kafka.bootstrap_servers, small_registry, prefix)
    create(cluster)
    cluster.registry().register_all(prefix)
    publish(cluster, event(), marker(1, **ONE))
    url = f"http://127.0.0.1:{port}"
    with running(cluster, port) as board:
        wait_for(lambda: answers(f"{url}/readyz"), 30)
        page = visit(url)
        price, banner, poll = page.locator("tr.on td.last"), page.locator("#banner"), page.locator("body")
        expect(price).to_have_text("۱٬۰۲۵")
        publish(cluster, event(sequence=2, poll_sequence=2, last_price=1030), marker(2, **ONE), alert())
        expect(price).to_have_text("۱٬۰۳۰")
        expect(page.locator(".alert.fresh")).to_have_count(1)
        page.click("#source summary")
        expect(page.locator("#source tbody tr").first).to_contain_text("IRO1MADN0001-20190824-2")

        kafka.stop()
        expect(banner).to_have_text("کافکا پاسخ نمی‌دهد؛ قیمت‌ها به‌روز نیستند", timeout=60_000)
        expect(poll).to_have_class(re.compile("stale"))
        assert answers(f"{url}/readyz", 503)
        assert answers(f"{url}/livez")
        assert str(cluster.bootstrap_servers) not in httpx2.get(f"{url}/api/snapshot").text
        kafka.start()
        expect(banner).to_be_hidden(timeout=60_000)
        publish(cluster, event(sequence=3, poll_sequence=3, last_price=1040), marker(3, **ONE))
        expect(price).to_have_text("۱٬۰۴۰", timeout=60_000)

        admin = cluster.admin()
        for deleted in admin.delete_topics([topic.full_name(prefix) for topic in TOPICS]).values():
            deleted.result(30)
        wait_for(lambda: not cluster.topics([topic.full_name(prefix) for topic in TOPICS]), 30)
        create(cluster)
        publish(cluster, event(last_price=990), marker(1, **ONE))
        expect(price).to_have_text("۹۹۰", timeout=60_000)
        expect(page.locator(".alert")).to_have_count(0)

        board.kill()
        expect(banner).to_have_text("ارتباط با تابلو قطع است؛ دوباره تلاش می‌شود", timeout=30_000)
    publish(cluster, event(sequence=2, poll_sequence=2, last_price=995), marker(2, **ONE))
    with running(cluster, port) as board:
        expect(price).to_have_text("۹۹۵", timeout=60_000)
        expect(banner).to_be_hidden(timeout=30_000)
        board.send_signal(signal.SIGTERM)
        assert board.wait(5) == 0


@pytest.mark.kafka
@pytest.mark.usefixtures("kafka")
def test_what_the_exchange_does_is_at_the_head_of_the_page(
    visit: Callable[..., Page],  # noqa: F811
    wait_for: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """A real exchange, producer and board: half an answer, data of yesterday, frozen data, no answer, and all ok again.

    Each fault lasts until the page shows it: the market runs 30 times as fast, and data are frozen after 3 minutes.
    """
    practice, port = practice_exchange(speed=30, faults=["skew@999999"]), free_port()
    words = dict(re.findall(r'(\w+): \["([^"]*)"', (PAGE / "words.js").read_text("utf-8")))
    polling = ["--schedule", "always", "--clock", "response", "--poll-seconds", "1"]
    bourse = [sys.executable, "-m", "bourse_cli"]
    log = tmp_path / "log"
    with Stack("kafka") as stack, practice.serve() as exchange, ExitStack() as running:
        for command in (["produce", "--address", exchange.url, *polling], ["board", "--http", str(port)]):
            running.enter_context(spawn([*bourse, *command], env=stack.environment, stdout=log, stderr=log))
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/livez"), 60)
        page = visit(f"http://127.0.0.1:{port}", ready=False)
        feed, banner, poll = page.locator("#feed"), page.locator("#banner"), page.locator("#poll")

        def shows(fault: str | None, state: str, text: str | re.Pattern[str], outcome: str) -> None:
            practice.faults.due = [Fault.parse(fault)] if fault else []
            expect(feed).to_have_attribute("data-value", state, timeout=60_000)
            expect(feed).to_have_text(words[state])
            if text:
                expect(banner).to_have_text(text)
            else:
                expect(banner).to_be_hidden()
            expect(page.locator("body")).to_have_class(re.compile("stale" if text else "^(?!.*stale)"))
            expect(poll).to_have_attribute("data-outcome", re.compile(outcome))

        good, unreliable = "PUBLISHED|UNCHANGED", words["feedBad"]
        shows(None, "FRESH", "", good)
        shows("half", "PARTIAL", "", good)
        shows("yesterday", "STALE", f"{words['STALE']}: {unreliable}", good)
        shows("frozen", "FROZEN", f"{words['FROZEN']}: {unreliable}", "UNCHANGED")
        shows("forbidden-page", "DOWN", re.compile(f"^{words['FAILED']}: "), "FAILED")
        shows(None, "FRESH", "", good)


@pytest.mark.kafka
def test_a_board_without_kafka_answers_and_without_topics_ends(kafka: Kafka, wait_for: Callable[..., Any]) -> None:
    """It waits for brokers, but topics that are missing are a mistake: one line, exit code 2."""
    port = free_port()
    with running(Cluster("127.0.0.1:1", "http://127.0.0.1:1"), port) as board:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/readyz", 503), 40)
        assert answers(f"http://127.0.0.1:{port}/livez")
        board.send_signal(signal.SIGTERM)
        assert board.wait(5) == 0
    with running(Cluster(kafka.bootstrap_servers, "http://127.0.0.1:1", "nothere"), port) as board:
        assert board.wait(30) == 2
        assert board.stderr
        assert "bourse topics apply" in board.stderr.read().splitlines()[-1]


def test_nginx_in_front_with_tls_and_a_password(
    demand: Callable[[str], None],
    tmp_path: Path,
    visit: Callable[..., Page],  # noqa: F811
    wait_for: Callable[..., Any],
) -> None:
    """The server block of docs/board.md as it is: live through it, and nobody enters without the password."""
    from tests.real_day import Feed, polls_of_day, serving

    demand("nginx")
    feed, port = Feed(), free_port()
    feed.play(0, 5)
    certificate = tmp_path / "board.pem"
    self_signed(certificate)
    (tmp_path / "board.htpasswd").write_text("trader:{PLAIN}secret\n")
    block = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "board.md").read_text("utf-8"), re.DOTALL)
    assert block
    with serving(feed, hosts=["board.example.ir"]) as url:
        server = block[1].replace("/etc/nginx/board.key", str(certificate)).replace("/etc/nginx/", f"{tmp_path}/")
        server = server.replace("listen 443", f"listen 127.0.0.1:{port}").replace("http://127.0.0.1:8090", url)
        kinds = ["client_body_temp_path", "proxy_temp_path", "fastcgi_temp_path", "uwsgi_temp_path", "scgi_temp_path"]
        temporary = "".join(f"{kind} {tmp_path}/{kind};\n" for kind in kinds)
        settings = "user root;\n" if os.geteuid() == 0 else ""
        settings += f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\nevents {{}}\n"
        settings += f"http {{ access_log off;\n{temporary}{server} }}\n"
        (tmp_path / "nginx.conf").write_text(settings)
        nginx = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
        try:
            proxy = f"https://127.0.0.1:{port}"
            host = {"Host": "board.example.ir"}
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            wait_for(lambda: answers(f"{proxy}/", 401, headers=host, verify=context))
            login = {**host, "Authorization": "Basic " + b64encode(b"trader:secret").decode()}
            assert answers(f"{proxy}/api/snapshot", headers=login, verify=context)
            assert answers(f"{proxy}/api/snapshot", 400, headers={**login, "Host": "evil.example"}, verify=context)
            after = httpx2.get(f"{proxy}/api/snapshot", headers=login, verify=context).json()["id"]
            path = f"{proxy}/api/events?after={after}"
            with httpx2.stream("GET", path, headers=login, verify=context, timeout=20) as stream:
                feed.play(5, 6)
                lines = (line for line in stream.iter_lines() if line.startswith("data: "))
                polls = next(found for line in lines if (found := msgspec.json.decode(line[6:])["polls"]))
                assert polls[0]["poll_sequence"] == polls_of_day()[5][0].poll_sequence
        finally:
            nginx.terminate()
            nginx.wait(10)
