"""Notifications: what is written, who gets it when, and what arrives at real servers on this machine."""

from __future__ import annotations

import base64
import hmac
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.policy import default as mail_policy
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from bidi import get_display
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from structlog.testing import capture_logs

from bourse_cli.health import Monitor
from bourse_cli.root import bourse
from bourse_consumers.api import Partition
from bourse_consumers.notify.channels import Apprised, Channel, NotSent, Refused, Webhook, load
from bourse_consumers.notify.consumer import Notify
from bourse_consumers.notify.words import Message, Writer, example, split
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, MemoryStream, run, stream_of
from bourse_sandbox.kafka import free_port
from bourse_sandbox.processes import spawn
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import AlertState, DeadLetter, PriceAlert, Reason, ResolvedBy, Scope, Severity, Stage
from tests.web import Web, serving

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "notify.md"
NOON = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)  # 12:00 in Tehran
HOUR = timedelta(hours=1)
ALERTS_0 = Partition("bourse.alerts", 0)
FA, EN = Writer(), Writer("en")
MARKS = re.compile("[\u200f\u2066\u2068\u2069]")
TOKEN = "123456789:AAAAbbbbCCCCddddEEEEffffGGGGhhhhIII"


def alert(number: int = 1, **fields: Any) -> PriceAlert:
    """Return an alert with an id of its own."""
    return structs.replace(
        example(NOON), **{"alert_id": f"alert-{number}", "rule": "fast-move", "title": None, **fields}
    )


def over(number: int = 1, **fields: Any) -> PriceAlert:
    """Return the end of an alert."""
    return alert(number, **{"state": AlertState.RESOLVED, "resolved_by": ResolvedBy.CONDITION, **fields})


def plain(text: str) -> str:
    """Return a text without the marks of direction."""
    return MARKS.sub("", text)


def lines(message: Message) -> list[str]:
    """Return the lines of a message without the marks of direction."""
    return [plain(line) for line in message.lines]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "title", "line"),
    [
        (FA, "🔵 ومعادن fast-move", "ومعادن در پنج دقیقه ۳٫۲ درصد، اکنون ۵٬۴۸۸، ۱۲:۰۰:۰۰"),
        (EN, "🔵 ومعادن fast-move", "ومعادن 3.2 % in five minutes, now 5,488, 12:00:00"),
    ],
    ids=["fa", "en"],
)
def test_an_alert_in_the_channels_language(writer: Writer, title: str, line: str) -> None:
    """Its text, and the time in Tehran, in the digits of the language."""
    message = writer.message([alert()], NOON)
    assert plain(message.title) == title
    assert lines(message) == [line]


def test_an_old_alert_carries_its_age() -> None:
    """From two minutes on, in its largest unit; one of a day that is replayed years later has none."""
    for age, text in ((120, None), (121, "2 min ago"), (3 * 3600, "3 h ago"), (49 * 3600, "2 d ago"), (4e7, None)):
        (line,) = lines(EN.message([alert()], NOON + timedelta(seconds=age)))
        assert line.endswith(text or "12:00:00")
    (line,) = lines(FA.message([alert()], NOON + timedelta(minutes=12)))
    assert line.endswith("، ۱۲:۰۰:۰۰، ۱۲ دقیقه پیش")


def test_persian_reads_right() -> None:
    """On the screen, by Unicode's algorithm: from the right, with numbers and Latin words in their own direction."""
    pair = [alert(number, title="fast-move", message={"fa": "تغییر \u2066-۳٫۲۵٪\u2069"}) for number in (1, 2)]
    line = FA.message(pair, NOON).lines[0]
    shown = MARKS.sub("", get_display(line, base_dir=None))
    places = [shown.index(each) for each in ("🔵", "ومعادن"[::-1], "fast-move", "-۳٫۲۵٪", "۱۲:۰۰:۰۰")]
    assert places == sorted(places, reverse=True)
    assert "-۳٫۲۵٪" not in get_display(plain(line), base_dir=None), "the marks are needed"


def test_the_authors_own_message_is_the_text() -> None:
    """In the language of the channel, on one line; in another one if there is no other; else the expression."""
    assert plain(FA.text(alert(message={"fa": "همین حالا\nببین", "en": "look"}))) == "همین حالا ببین"
    assert plain(EN.text(alert(message={"fa": "ببین"}))) == "ببین"
    assert plain(FA.text(alert(message=None, when="feed_state == DOWN"))) == "feed_state == DOWN"


def test_the_end_of_an_alert() -> None:
    """The title shows that it is over, and whether because its rule was removed."""
    assert plain(FA.title(over())) == "✅ پایان: ومعادن fast-move"
    assert "over (rule removed)" in EN.title(over(resolved_by=ResolvedBy.RULE_REMOVED))


@pytest.mark.parametrize("writer", [FA, EN], ids=["fa", "en"])
def test_every_alert_can_be_written(writer: Writer) -> None:
    """Of any scope, state and severity, with everything absent that may be."""
    bare: dict[str, Any] = dict.fromkeys(("instrument", "symbol", "title", "instrument_title", "last_price", "message"))
    for scope in Scope:
        for state in AlertState:
            for severity in Severity:
                for fields in ({}, bare):
                    each = alert(1, scope=scope, state=state, severity=severity, **fields)
                    message = writer.message([each], NOON)
                    assert "None" not in message.title + "".join(message.lines)


def test_a_few_are_listed_and_many_are_folded() -> None:
    """A digest has the last state of each, those that fire first, the urgent ones before others, then counts."""
    few = [alert(1), over(1), alert(2, severity=Severity.CRITICAL)]
    message = EN.message(few, NOON, digest_above=3)
    assert plain(message.title) == "🔴 2 firing, 1 over"
    assert [line[0] for line in lines(message)] == ["🔴", "🔵", "✅"]
    many = [*few, *[alert(number, rule=f"rule-{number % 2}") for number in range(3, 27)]]
    message = EN.message(many, NOON, digest_above=3)
    assert plain(message.title) == "🔴 25 firing, 1 over"
    assert [line[0] for line in lines(message)[:20]] == ["🔴", *"🔵" * 19]
    assert lines(message)[20:] == ["… and 6 more", "rule-0: 3", "rule-1: 2", "fast-move: 1"]
    assert len(message.alerts) == 27, "a program gets all"


def test_what_is_too_old_is_only_counted() -> None:
    """Next to what is not, or alone."""
    old = [alert(number, raised_at=NOON - 2 * HOUR) for number in range(3)]
    message = EN.message([*old, alert(9)], NOON, max_age=HOUR)
    assert plain(message.title) == "🔵 ومعادن fast-move"
    assert lines(message)[1:] == ["alerts older than 1 h: 3", "fast-move: 3"]
    message = FA.message(old, NOON, max_age=HOUR)
    assert plain(message.title) == "📋 ۳ هشدار قدیمی‌تر از ۱ ساعت"
    assert lines(message) == ["fast-move: ۳"]
    assert len(lines(FA.message(old, NOON + timedelta(days=400), max_age=HOUR))) == 3, "the practice exchange"


@given(st.lists(st.text(max_size=60), min_size=1, max_size=9), st.integers(61 * 6, 900))
def test_long_messages_are_split_by_lines(texts: list[str], most: int) -> None:
    """No line is lost or cut, and no part is longer than the service accepts."""
    parts = split(texts, most)
    assert "\n".join(parts).replace("\n", "") == "".join(texts).replace("\n", "")
    assert all(len(part) <= most for part in parts)


def test_the_id_is_that_of_the_alerts() -> None:
    """The same for a repetition, another one for the end."""
    assert EN.message([alert(1), alert(2)], NOON).id == FA.message([alert(2), alert(1)], NOON + HOUR).id
    assert EN.message([alert(1)], NOON).id != EN.message([over(1)], NOON).id


# --- who gets what ----------------------------------------------------------------------------------------------------


def channel(sender: Any = None, **fields: Any) -> Channel:
    """Return a channel; `sender` is what it sends with."""
    made = Channel.model_construct(**fields)
    made.__dict__["sender"] = sender
    return made


@pytest.mark.parametrize(
    ("fields", "of_alert", "selected"),
    [
        ({}, {"channels": ["desk"]}, True),
        ({}, {"channels": ["mail"]}, False),
        ({}, {"channels": []}, True),
        ({}, {"channels": ["misspelt"]}, True),
        ({"alerts": "labels"}, {"channels": ["mail"]}, True),
        ({"severity": ("critical",)}, {"severity": Severity.WARNING}, False),
        ({"severity": ("critical",)}, {"severity": Severity.CRITICAL}, True),
        ({"severity": ("critical",)}, {"severity": Severity.UNKNOWN}, True),
        ({"labels": {"team": ("a", "b")}}, {"labels": {"team": "b", "more": "x"}}, True),
        ({"labels": {"team": ("a", "b")}}, {"labels": {"team": "c"}}, False),
        ({"labels": {"team": ("a", "b")}}, {"labels": {}}, False),
    ],
)
def test_which_alerts_a_channel_gets(fields: dict[str, Any], of_alert: dict[str, Any], selected: bool) -> None:
    """By the names in rules, severity and labels."""
    assert channel(**fields).selects("desk", alert(**of_alert), {"desk", "mail"}) is selected


@pytest.mark.parametrize(
    ("hours", "wait"), [("11:00-13:00", 0), ("12:00-07:00", 0), ("12:30-22:00", 1800), ("13:00-12:00", 3600)]
)
def test_active_hours_are_those_of_tehran(hours: str, wait: float, tmp_path: Path) -> None:
    """At noon in Tehran; they may run over midnight."""
    text = f"version: 1\nchannels: {{desk: {{webhook: {{clear: 'http://127.0.0.1/'}}, active: {hours}}}}}"
    assert channels(tmp_path, text)["desk"].wait(NOON) == wait


# --- real servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[Web]:
    """Return a web server."""
    with serving() as server:
        yield server


@pytest.fixture
def apprised() -> Iterator[Callable[..., Apprised]]:
    """Return a function that opens channels of Apprise's, which are closed after the test."""
    opened: list[Apprised] = []

    def opening(*given: Any, **named: Any) -> Apprised:
        opened.append(Apprised(*given, **named))
        return opened[-1]

    yield opening
    for each in opened:
        each.close()


def deliver(sender: Any, *alerts: PriceAlert, writer: Writer = FA) -> Message:
    """Send a message about alerts, and return it."""
    message = writer.message(alerts or [alert()], NOON)
    for part in sender.parts(message):
        sender.send(part)
    return message


def test_mail_arrives_at_a_mail_server(apprised: Callable[..., Apprised]) -> None:
    """Over SMTP, in Persian, as it was written."""
    mails: list[bytes] = []

    class Handler:
        async def handle_DATA(self, _: Any, __: Any, envelope: Any) -> str:  # noqa: N802  # its own name for it
            mails.append(envelope.content)
            return "250 OK"

    server = Controller(Handler(), hostname="127.0.0.1", port=free_port())
    server.start()
    try:
        options = "from=bourse@example.ir&to=trader@example.ir&mode=insecure&format=text"
        message = deliver(apprised(f"mailto://127.0.0.1:{server.port}?{options}"))
    finally:
        server.stop()
    mail = message_from_bytes(mails[0], policy=mail_policy)
    assert mail["To"] == "trader@example.ir"
    assert str(mail["Subject"]) == message.title
    assert "\n".join(message.lines) in mail.get_content().replace("\r\n", "\n")


def test_ntfy_gets_what_was_written_and_nothing_through_a_proxy_unasked(
    web: Web, apprised: Callable[..., Apprised], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's proxy is for hosts elsewhere, the channel's own goes before it."""
    with serving() as proxy, serving() as other:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "[::1]")
        sender = apprised(web.url.replace("http", "ntfy") + "/metals")
        message = deliver(sender)
        (body,) = web.bodies()
        assert (body["topic"], body["title"], body["message"]) == ("metals", message.title, message.lines[0])
        assert proxy.asked == []
        sender._url = "ntfy://ntfy.example.ir/metals"
        deliver(sender)
        assert [asked.path for asked in proxy.asked] == ["http://ntfy.example.ir/"]
        deliver(apprised("ntfy://ntfy.example.ir/metals", other.url))
        deliver(Webhook("http://hooks.example.ir/x", proxy=other.url))
        assert [asked.path for asked in other.asked] == ["http://ntfy.example.ir/", "http://hooks.example.ir/x"]
        deliver(Webhook("http://hooks.example.ir/y"))
        deliver(Webhook(f"{web.url}/z"))
        assert [len(each.asked) for each in (proxy, web)] == [2, 2]
        monkeypatch.setenv("HTTP_PROXY", "socks://127.0.0.1:1")
        with pytest.raises(ConfigurationError, match="HTTP_PROXY: socks:// is not a supported proxy scheme"):
            Webhook("http://hooks.example.ir/x")


def test_a_messenger_with_telegrams_api_gets_long_messages_in_parts(
    web: Web, apprised: Callable[..., Apprised]
) -> None:
    """As the page shows it; a failure repeats only the parts that are missing."""
    address = web.url.replace("http", "json") + f"/bot{TOKEN}/sendMessage"
    sender = apprised(f"{address}?:chat_id=4242&:message=text&:title=&:version=&:type=&:attachments=")
    memory, many = Memory(), [alert(number, message={"fa": f"{number} " * 700}) for number in range(30)]
    memory.committed[ALERTS_0] = 0
    memory.append(*many)
    sender._most = 9_000  # the plug-in's limit is larger than that of messengers
    web.then = lambda: setattr(web, "status", 500 if len(web.asked) == 2 and web.status == 200 else 200)
    consumer = Notify("desk", {"desk": channel(sender)}, now=lambda: NOON)
    run(consumer, memory, stream=(stream := stream_of(consumer, memory)))
    assert len(stream.waited) == 1
    assert {asked.path for asked in web.asked} == {f"/bot{TOKEN}/sendMessage"}
    assert not any(b"http" in asked.body for asked in web.asked), "no picture is fetched from elsewhere"
    texts = [body["text"] for body in web.bodies()]
    assert {body["chat_id"] for body in web.bodies()} == {"4242"}
    assert len(texts) == len(set(texts)) > 3


def test_a_webhook_is_signed_and_a_repetition_is_recognized(web: Web) -> None:
    """As Standard Webhooks has it; the alerts are those of the topic, field for field."""
    key = base64.b64encode(b"a key of some length").decode()
    hook = Webhook(f"{web.url}/hook", f"whsec_{key}")
    message = deliver(hook, alert(1), alert(2))
    deliver(hook, alert(2), alert(1))
    (_, headers, body, _), (_, again, _, _) = web.asked
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    signature = base64.b64encode(hmac.digest(b"a key of some length", signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"
    assert headers["webhook-id"] == again["webhook-id"] == message.id
    *_, example_of_the_page = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"key": key, "body": body, "headers": headers}
    exec(compile(example_of_the_page, PAGE.name, "exec"), names)
    content = names["content"]
    assert content["type"] == "alerts"
    assert [each["alert_id"] for each in content["data"]["alerts"]] == ["alert-1", "alert-2"]
    assert set(content["data"]["alerts"][0]) == set(PriceAlert.__struct_fields__)
    assert (content["data"]["title"], content["data"]["body"]) == (message.title, "\n".join(message.lines))


def test_a_failure_has_a_reason_and_no_secret(web: Web, apprised: Callable[..., Apprised]) -> None:
    """The server's answer, or that there is none; no token, path or password; a refusal is distinguished."""
    web.status = 403
    gone = f"127.0.0.1:{free_port()}"
    ways = [
        (apprised(web.url.replace("http://", "ntfy://trader:passw0rd@") + "/secret-topic"), True, "error=403"),
        (apprised(f"json://trader:passw0rd@{gone}/secret-topic"), False, "onnection error"),
        (Webhook(f"{web.url}/secret-topic?token=passw0rd"), True, "127.0.0.1 answers 403 Forbidden"),
        (Webhook(f"http://{gone}/secret-topic?token=passw0rd"), False, "no answer from 127.0.0.1: ConnectError"),
        (Webhook("http://hooks.invalid/secret-topic", proxy=f"http://me:passw0rd@{gone}"), False, "ConnectError"),
    ]
    for sender, refused, reason in ways:
        with pytest.raises(NotSent, match=reason) as caught:
            deliver(sender)
        assert isinstance(caught.value, Refused) is refused
        shown = f"{caught.value} {caught.value!r} {sender!r}"
        for secret in ("secret-topic", "passw0rd", "trader"):
            assert secret not in shown
    web.status = 429
    with pytest.raises(NotSent, match="answers 429") as caught:
        deliver(ways[2][0])
    assert not isinstance(caught.value, Refused)


def test_a_service_that_does_not_answer_is_ended(web: Web, apprised: Callable[..., Apprised]) -> None:
    """Neither Apprise nor a webhook waits longer than its deadline; the next message gets a new process."""
    hanging = threading.Event()
    web.then = lambda: (hanging.wait(20), None)[1]
    sender = apprised(web.url.replace("http", "json") + "/x?rto=30", seconds=3)
    for each, reason in ((sender, "Apprise did not answer within 3 s"), (Webhook(web.url, seconds=0.3), "ReadTimeout")):
        with pytest.raises(NotSent, match=reason):
            deliver(each)
    hanging.set()
    sender._seconds = 30.0
    count = len(web.asked)
    deliver(sender)
    assert len(web.asked) > count


# --- the file ---------------------------------------------------------------------------------------------------------

VARIABLES = {"DESK": f"tgram://{TOKEN}/4242", "HOOK": "https://example.ir/hidden", "EMPTY": " "}


def channels(folder: Path, text: str) -> dict[str, Channel]:
    """Return the channels of a file."""
    (folder / "channels.yaml").write_text(text, "utf-8")
    return load(folder / "channels.yaml", VARIABLES)


def test_channels_are_read_with_their_defaults(tmp_path: Path) -> None:
    """What a channel has goes before what the defaults have."""
    (tmp_path / "secret").write_text("ntfy://127.0.0.1/mail\n", "utf-8-sig")  # as some editors save it
    found = channels(
        tmp_path,
        """
version: 1
defaults: {language: en, digest_above: 5, fallback: mail, severity: [info], active: 08:30-17:30}
channels:
  desk: {url: {env: DESK}, severity: warning, labels: {team: [a, b], desk: 5}, alerts: labels, active: null}
  mail: {url: {file: secret}, resolved: false, proxy: "socks5://127.0.0.1:1080"}
  hook: {webhook: {env: HOOK}, key: {clear: whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3}, language: fa}
  robot: {alertmanager: "http://127.0.0.1:9093/"}
""",
    )
    desk, mail, hook, robot = (found[name] for name in ("desk", "mail", "hook", "robot"))
    assert desk.severity == ("warning", "critical")
    assert desk.labels == {"team": ("a", "b"), "desk": ("5",)}
    assert (desk.alerts, desk.digest_above, desk.active, desk.resolved) == ("labels", 5, None, True)
    assert (mail.alerts, mail.resolved, mail.severity, mail.proxy) == (
        "rules", False, ("info",), "socks5://127.0.0.1:1080",
    )  # fmt: skip
    assert mail.active == (8 * 3600 + 1800, 9 * 3600)
    midnight = NOON - 12 * HOUR
    assert [each.wait(midnight) for each in (desk, mail, robot)] == [0, 8.5 * 3600, 0], "a default is for people"
    assert (hook.language, mail.language) == ("fa", "en")
    assert [each.fallback for each in (desk, hook, robot)] == ["mail"] * 3
    assert [type(each.sender).__name__ for each in (desk, hook, robot)] == ["Apprised", "Webhook", "Webhook"]
    assert not any(secret in repr(found) for secret in (TOKEN, "hidden", "MDEyMzQ1"))


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    """With file, line, column and key, the nearest known key, and without the secret."""
    (tmp_path / "odd").write_text("nonsense://hidden-token/x", "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        channels(
            tmp_path,
            """version: 1
defaults: {langauge: fa}
channels:
  plain:
    url: tgram://hidden-token/1
  both: {url: {env: DESK}, webhook: {env: HOOK}}
  none: {}
  words:
    url: {env: DESK}
    severity: urgent
    active: 8-17
    digest_above: 0
    fallback: nobody
  "a b": {url: {env: DESK}}
  none: {url: {env: DESK}}
  robot: {alertmanager: "http://127.0.0.1:9093", active: "08:00-09:00", fallback: robot}
  c: {url: {env: NOWHERE}}
  d: {url: {env: EMPTY}}
  e: {url: {file: nofile}}
  f: {url: {file: odd}}
  g: {webhook: {env: DESK}}
  h: {webhook: {env: HOOK}, key: {clear: "?"}}
  i: {url: {env: DESK}, proxy: "socks://127.0.0.1:1080"}
  j: {url: {env: DESK}, proxy: "http://me:hidden-token@127.0.0.1:1080"}
""",
        )
    shown = str(caught.value).replace(f"{tmp_path}/channels", "channels")
    for expected in (
        "channels.yaml:2:12: defaults.langauge: unknown key; did you mean language?",
        "channels.yaml:5:5: channels.plain.url: a secret: write {env: …}, {file: …}, or",
        "channels.yaml:6:3: channels.both: give one of url, webhook and alertmanager",
        "channels.yaml:10:5: channels.words.severity[1]: Input should be 'info', 'warning' or 'critical'",
        "channels.yaml:11:5: channels.words.active: hours of a day are expected here",
        "channels.yaml:12:5: channels.words.digest_above: a whole number from 1 to 1000 is expected here",
        "channels.yaml:13:5: channels.words.fallback: no channel is called 'nobody'; there are plain, both",
        "channels.yaml:14:3: channels.a b",
        "channels.yaml:15:3: none: the key is given twice",
        "channels.robot.fallback: no channel is called 'robot'",
        "channels.yaml:17:7: channels.c.url: NOWHERE is empty or does not exist: set NOWHERE\n    url\n    ^^^\nch",
        "channels.yaml:18:7: channels.d.url: EMPTY is empty",
        f"channels.yaml:19:7: channels.e.url: {tmp_path}/nofile does not exist: create it\n    url\n    ^^^\nch",
        "channels.yaml:20:7: channels.f.url: Apprise does not know this address",
        "channels.yaml:21:7: channels.g.webhook: an address such as https://host/path is expected here",
        "channels.yaml:22:29: channels.h.key: a key has 24 to 64 bytes",
        "channels.yaml:23:25: channels.i.proxy: a proxy is expected here: http, https, socks5",
        "channels.yaml:24:25: channels.j.proxy: a secret",
        "    url\n    ^^^\n    write: url: {env: PLAIN_URL}\n",
        "    proxy\n    ^^^^^\n    write: proxy: {env: J_PROXY}",
        "    both\n    ^^^^\n    write: both: {url: {env: BOTH_URL}}\n",
        "    active\n    ^^^^^^\n    write: active: 09:30-12:15\n",
    ):
        assert expected in shown
    assert "hidden" not in shown
    with pytest.raises(ConfigurationError) as caught:
        channels(
            tmp_path,
            'version: 1\nchannels: {a: {alertmanager: "http://h:1", active: 08:00-09:00, resolved: false}}',
        )
    for name in ("active", "resolved"):
        assert f"this kind of channel does not have {name}\n    {name}\n" in str(caught.value)


WRONG = """version: 2
defaults:
  langauge: fa
channels:
  one:
    url: tgram://hidden-token/1
    severity: warnings
    labels: 5
    resolved: flase
    language: FA
    alerts: rule
    active: 8-17
    digest_above: 0
    fallback: two2
  two:
    webhook: {env: HOOK}
    key: {clear: hidden}
    proxy: {clear: "socks://127.0.0.1:1080"}
  "a b":
    url: {env: NOWHERE}
  three: {}
  four:
    alertmanager: {clear: "x"}
    key: {env: HOOK_KEY}
    severity:
      - crtical
  five: 5
"""


def test_every_mistake_has_a_corrected_line_in_two_languages(tmp_path: Path) -> None:
    """With the lines pasted and the variable set the file has no mistake; in Persian no sentence is English."""
    path = tmp_path / "channels.yaml"
    key = base64.b64encode(b"0123456789" * 4).decode()
    addresses = dict.fromkeys(("ONE_URL", "THREE_URL", "FIVE_URL"), VARIABLES["DESK"])
    variables = VARIABLES | addresses | {"TWO_KEY": key, "HOOK_KEY": key}
    path.write_text(WRONG, "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load(path, variables, "fa")
    found = re.findall(r"^\S+:\d+:\d+: (.*)$", str(caught.value), re.MULTILINE)
    written = re.findall("^    بنویسید: ", str(caught.value), re.MULTILINE)
    assert (len(found), len(written)) == (19, 18), str(caught.value)
    assert all(re.search("[آ-ی].*[آ-ی].*[آ-ی]", mistake.rpartition(": ")[2]) for mistake in found), found
    assert "hidden" not in str(caught.value)
    text, variables["NOWHERE"] = WRONG, VARIABLES["DESK"]
    for _ in range(4):
        path.write_text(text, "utf-8")
        try:
            assert set(load(path, variables)) == {"one", "two", "a-b", "three", "four", "five"}
        except ConfigurationError as error:
            shown, lines = str(error), text.splitlines()
            for number, fix in re.findall(r"channels.yaml:(\d+):\d+: .*\n.*\n.*\n    write: (.*)", shown):
                line = lines[int(number) - 1]
                indent, old = re.findall(r"^( *(?:- )?)(.*)", line)[0]
                _, colon, rest = old.partition(":")
                is_key = colon and ": " not in fix and fix[0] != "#"
                lines[int(number) - 1] = f"{indent}{fix}:{rest}" if is_key else indent + fix
            text = "\n".join(lines) + "\n"
        else:
            return
    pytest.fail(shown)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("desk", "{env: DESK_WEBHOOK}"),
        ("night-desk.2", "{env: NIGHT_DESK_2_WEBHOOK}"),
        ("2nd", "{env: _2ND_WEBHOOK}"),
        ("میز", "{file: میز-webhook}"),
    ],
)
def test_a_secret_goes_into_a_place_named_after_its_channel(tmp_path: Path, name: str, place: str) -> None:
    """A variable, or a file if no shell accepts the name; the line is right when pasted, once the place is filled."""
    with pytest.raises(ConfigurationError) as caught:
        channels(tmp_path, f"version: 1\nchannels: {{{name}: {{webhook: 'https://example.ir/hidden'}}}}")
    assert str(caught.value).endswith(f"\n    write: webhook: {place}")
    assert "hidden" not in str(caught.value)
    path = tmp_path / "channels.yaml"
    path.write_text(f"version: 1\nchannels: {{{name}: {{webhook: {place}}}}}", "utf-8")
    (tmp_path / "میز-webhook").write_text(VARIABLES["HOOK"], "utf-8")
    variables = {place[6:-1]: VARIABLES["HOOK"]}
    assert load(path, variables)[name].webhook == VARIABLES["HOOK"]


@pytest.mark.parametrize(
    ("key", "good"),
    [
        (base64.b64encode(b"k" * 24).decode(), True), ("whsec_" + base64.b64encode(b"k" * 64).decode(), True),
        (base64.b64encode(b"k" * 23).decode(), False), (base64.b64encode(b"k" * 65).decode(), False),
        ("whsec_", False), ("a word that is not base64, but long enough", False), ("whsec_ünïcödé" * 4, False),
    ],
)  # fmt: skip
def test_a_weak_or_malformed_key_is_refused_at_the_start(tmp_path: Path, key: str, good: bool) -> None:
    """With one line that does not print it."""
    path = tmp_path / "channels.yaml"
    path.write_text("version: 1\nchannels:\n  robot:\n    webhook: {env: HOOK}\n    key: {env: KEY}\n", "utf-8")
    if good:
        assert load(path, VARIABLES | {"KEY": key})["robot"].key == key
        return
    with pytest.raises(ConfigurationError) as caught:
        load(path, VARIABLES | {"KEY": key})
    assert str(caught.value).startswith(f"{path}:5:5: channels.robot.key: a key has 24 to 64 bytes, written in base64")
    assert key.removeprefix("whsec_")[:8] not in str(caught.value) or key == "whsec_"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the channels: cannot read"),
        ("", "this is not the channels"),
        ("a: [", "not YAML"),
        ("version: 2\nchannels: {}", "version: "),
        ("version: 1\nchannels: {}", "channels: "),
        ("version: 1\nchannels: {desk: 1, mail: null}", "channels.desk: "),
    ],
)
def test_a_file_that_is_not_one_is_an_operators_mistake(tmp_path: Path, text: str | None, message: str) -> None:
    """On the consumer and on the test of a channel."""
    path = tmp_path / "channels.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    for command in (["consume", "notify"], ["notify", "test", "desk"]):
        error = CliRunner().invoke(bourse, [*command, "--channels", str(path)]).exception
        assert isinstance(error, ConfigurationError)
        assert message in str(error)


NAMES = [
    "channels",
    "desk",
    "url",
    "webhook",
    "alertmanager",
    "key",
    "env",
    "file",
    "clear",
    "DESK",
    "HOOK",
    "version",
    "1",
    "severity",
    "info",
    "active",
    "08:00-07:00",
    "labels",
    "fallback",
    "proxy",
    "tgram://",
    "http://[",
    "mailto://x@y",
    "null",
    "<<",
    "*a",
    "&a",
    "{",
    "}",
    "[",
    "]",
    "'",
    "?",
    "|",
    "!!binary",
]
WORDS = st.sampled_from([*NAMES, ": ", "\n", "\n  ", ", ", "- ", "\u200c", "\x00"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.lists(WORDS, max_size=40).map("".join),
        st.tuples(st.integers(0, 2000), st.lists(WORDS, min_size=1, max_size=4).map("".join), st.integers(0, 30)),
    )
)
def test_random_files_are_channels_or_mistakes(tmp_path_factory: pytest.TempPathFactory, random: Any) -> None:
    """Words of such files in any order, and the example with something else somewhere: no traceback."""
    if not isinstance(random, str):
        at, insert, cut = random
        text = (ROOT / "examples" / "channels.yaml").read_text("utf-8")
        random = text[:at] + insert + text[at + cut :]
    with suppress(ConfigurationError):
        channels(tmp_path_factory.getbasetemp(), random)


def test_the_largest_files_take_bounded_time(tmp_path: Path) -> None:
    """Aliases that multiply, and thousands of channels."""
    anchors = "\n".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 40))
    for text in (
        f"a0: &a0 {{}}\n{anchors}\nchannels: *a39",
        "version: 1\nchannels: {" + ", ".join(f"c{n}: {{url: {{env: DESK}}}}" for n in range(5_000)) + "}",
    ):
        with pytest.raises(ConfigurationError):
            channels(tmp_path, text)


def test_without_apprise_it_prints_what_to_install(tmp_path: Path) -> None:
    """Exit code 2 and the extra's name; the other commands work."""
    program = "import sys; sys.modules['apprise'] = None; from bourse_cli.root import main; main()"
    command = [sys.executable, "-c", program, "notify", "test", "desk", "--channels", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: notifications need the module apprise: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("page", ["examples/channels.yaml", "docs/notify.md"])
def test_the_examples_are_channels_files(page: str, tmp_path: Path) -> None:
    """As they are, with the variables and files that they name."""
    text = (ROOT / page).read_text("utf-8")
    if page.endswith(".md"):
        blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        text = next(block for block in blocks if "channels:" in block and "desk:" in block)
    path = tmp_path / "channels.yaml"
    path.write_text(text, "utf-8")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "mail").write_text("mailtos://me:pw@example.ir", "utf-8")
    names = re.findall(r"env: (\w+)", text)
    addresses = dict.fromkeys(names, VARIABLES["DESK"]) | {
        "HOOK_URL": "https://example.ir/x", "HOOK_KEY": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "PROXY": "http://127.0.0.1:8118",
        "MAIL_URL": "mailtos://me:pw@example.ir",
    }  # fmt: skip
    assert {"desk", "mail", "robot"} <= set(load(path, addresses))


def test_the_pages_first_example_runs_as_it_is(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """Without an account of anybody: its files, its receiver, its command, on another port."""
    port = str(free_port())
    page = PAGE.read_text("utf-8").replace("8123", port)
    for name, kind in (("channels.yaml", "yaml"), ("receiver.py", "python")):
        (tmp_path / name).write_text(page.partition(f"```{kind}\n")[2].partition("```")[0], "utf-8")
    command = page.partition("```sh\n")[2].partition("```")[0].splitlines()[1]
    with spawn([sys.executable, str(tmp_path / "receiver.py")], stdout=tmp_path / "out"):

        def accepted() -> bool:
            words = [sys.executable, "-m", "bourse_cli", *command.split()[1:]]
            return subprocess.run(words, cwd=tmp_path, check=False, capture_output=True).returncode == 0

        wait_for(accepted, 60)
        wait_for(lambda: "notify-test" in (tmp_path / "out").read_text("utf-8"), 30)


def test_a_channel_is_tried_out(web: Web, tmp_path: Path) -> None:
    """`bourse notify test`: a sample arrives; otherwise it fails with the reason and no secret."""
    path = tmp_path / "channels.yaml"
    path.write_text(f"version: 1\nchannels: {{desk: {{webhook: {{clear: '{web.url}/passw0rd'}}}}}}", "utf-8")
    command = ["notify", "test", "--channels", str(path)]
    result = CliRunner().invoke(bourse, [*command, "desk"])
    assert result.exit_code == 0, result.output
    assert "sent to desk:" in result.output
    assert web.bodies()[0]["data"]["alerts"][0]["rule"] == "notify-test"
    web.status = 500
    error = CliRunner().invoke(bourse, [*command, "desk"]).exception
    assert str(error) == "channel desk: 127.0.0.1 answers 500 Internal Server Error"
    error = CliRunner().invoke(bourse, [*command, "dekc"]).exception
    assert isinstance(error, ConfigurationError)
    assert "there are desk" in str(error)
    path.write_text(
        f"version: 1\nchannels:\n  desk: {{webhook: {{clear: '{web.url}'}}, fallback: mail}}\n"
        "  mail: {url: {env: UNSET_ADDRESS}}\n  hook: {webhook: {file: none}}\n", "utf-8"
    )  # fmt: skip
    web.status = 200
    assert CliRunner().invoke(bourse, [*command, "desk"]).exit_code == 0, "the secrets of others are not asked for"
    error = CliRunner().invoke(bourse, [*command, "mail"]).exception
    assert "UNSET_ADDRESS is empty or does not exist: set UNSET_ADDRESS" in str(error)
    assert "none" not in str(error)


# --- the consumer -----------------------------------------------------------------------------------------------------


class Phone:
    """A channel that keeps what it gets, or does not accept it."""

    def __init__(self) -> None:
        self.got: list[Message] = []
        self.failing: NotSent | None = None

    def parts(self, message: Message) -> list[Message]:
        return [message]

    def send(self, part: Message) -> None:
        if self.failing is not None:
            raise self.failing
        self.got.append(part)

    def close(self) -> None:
        pass

    def ids(self) -> list[list[str]]:
        return [[each.alert_id for each in message.alerts] for message in self.got]


class House:
    """A consumer for the channel `mail`, and another channel; it is noon."""

    def __init__(self, give_up: float = 60, **fields: Any) -> None:
        self.memory, self.desk, self.mail = Memory(), Phone(), Phone()
        self.memory.committed[ALERTS_0] = 0
        self.now = NOON
        both = {"desk": channel(self.desk, language="en"), "mail": channel(self.mail, **fields)}
        self.consumer = Notify("mail", both, give_up=timedelta(seconds=give_up), now=lambda: self.now)

    def run(self, stream: MemoryStream | None = None) -> None:
        run(self.consumer, self.memory, stream=stream or stream_of(self.consumer, self.memory))


def to_mail(number: int, **fields: Any) -> PriceAlert:
    """Return an alert whose rule names the channel."""
    return alert(number, channels=["mail"], **fields)


def test_a_channel_gets_its_alerts_in_order_and_once() -> None:
    """Others are passed over; a restart repeats nothing."""
    house = House()
    house.memory.append(to_mail(1), alert(2, channels=["desk"]), alert(3, channels=["mail", "desk"]))
    house.run()
    house.run()
    assert house.mail.ids() == [["alert-1", "alert-3"]]
    assert house.desk.ids() == []
    assert house.memory.committed == {ALERTS_0: 3}


def test_which_ends_are_sent() -> None:
    """Not that of the day, nor that of an alert that holds for one poll only."""
    ends = [over(1), over(2, resolved_by=ResolvedBy.DAY_END), over(3, message=None), alert(4, message=None)]
    for fields, expected in (({}, [["alert-1", "alert-4"]]), ({"resolved": False}, [["alert-4"]])):
        house = House(**fields)
        house.memory.append(*ends)
        house.run()
        assert house.mail.ids() == expected


def test_a_new_channel_begins_at_the_end() -> None:
    """Nobody wants the alerts of a month at once; `--from-start` is for those who do."""
    house = House()
    house.memory.committed.clear()
    house.memory.append(to_mail(1))
    house.run()
    house.memory.append(to_mail(2))
    house.run()
    assert house.mail.ids() == [["alert-2"]]
    house = House()
    house.consumer.from_end = False
    house.memory.committed.clear()
    house.memory.append(to_mail(1))
    house.run()
    assert house.mail.ids() == [["alert-1"]]


class Waiting(MemoryStream):
    """A stream on which something happens while the consumer waits."""

    def __init__(self, house: House, meanwhile: Callable[[float], None]) -> None:
        super().__init__(house.memory, house.consumer.topics)
        self.meanwhile = meanwhile

    def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        self.meanwhile(seconds)
        return super().wait(seconds, stopped)


def test_a_failure_that_passes_is_waited_for() -> None:
    """The same message comes again, later, and has its age."""
    house = House()
    house.mail.failing = NotSent("it is switched off")

    def meanwhile(_: float) -> None:
        house.now += timedelta(minutes=5)
        house.mail.failing = None

    house.memory.append(to_mail(1))
    house.run(stream := Waiting(house, meanwhile))
    assert house.mail.ids() == [["alert-1"]]
    assert plain(house.mail.got[0].lines[0]).endswith("۵ دقیقه پیش")
    assert len(stream.waited) == 1


def test_outside_the_active_hours_alerts_wait_and_come_as_one_digest() -> None:
    """Those too that come while it waits; the offset waits with them, so a restart does not lose them."""
    house = House(active=(13 * 3600, 3600), digest_above=1)

    def meanwhile(seconds: float) -> None:
        if seconds == 3600:
            house.now += timedelta(seconds=seconds)
            house.memory.append(over(1, raised_at=house.now), to_mail(2))

    house.memory.append(to_mail(1))
    house.run(stream := Waiting(house, meanwhile))
    assert stream.waited[0] == 3600
    assert house.mail.ids() == [["alert-1", "alert-1", "alert-2"]]
    assert plain(house.mail.got[0].title) == "🔵 ۱ هشدار، ۱ پایان‌یافته"


@pytest.mark.parametrize("refused", [True, False])
def test_what_is_refused_goes_to_the_fallback_and_to_dead_letters(refused: bool) -> None:
    """The alert itself, in the language of the fallback; and so does what fails for too long."""
    house = House(give_up=60 if refused else 0, fallback="desk")
    house.mail.failing = (Refused if refused else NotSent)("no such user")
    house.memory.append(to_mail(1), to_mail(2))
    house.run()
    letters = [emit.event for emit in house.memory.emitted]
    for offset, letter in enumerate(letters):
        assert isinstance(letter, DeadLetter)
        assert (letter.reason, letter.stage, letter.consumer) == (Reason.NOTIFICATION_FAILED, Stage.NOTIFY, "notify")
        assert letter.message == "channel mail: no such user"
        record = house.memory.records[ALERTS_0][offset]
        assert record
        assert (letter.original_offset, letter.payload) == (offset, record.value)
    assert len(letters) == 2
    assert house.desk.ids() == [["alert-1", "alert-2"]]
    assert "now 5,488" in house.desk.got[0].lines[0]
    assert house.memory.committed == {ALERTS_0: 2}


def test_a_fallback_that_fails_too_is_not_the_end() -> None:
    """The dead letters have the alerts, and the next ones are sent."""
    house = House(fallback="desk")
    house.mail.failing = house.desk.failing = Refused("no such user")
    house.memory.append(to_mail(1))
    house.run()
    house.mail.failing = None
    house.memory.append(to_mail(2))
    house.run()
    assert house.mail.ids() == [["alert-2"]]
    assert len(house.memory.emitted) == 1


@pytest.mark.parametrize("kind", ["webhook", "apprise", "fallback"])
def test_a_stop_does_not_wait_for_a_channel_that_hangs(
    web: Web, apprised: Callable[..., Apprised], wait_for: Callable[..., Any], kind: str
) -> None:
    """Within five seconds; the message in hand comes again after the restart."""
    released = threading.Event()
    web.then = lambda: (released.wait(60), None)[1]
    sender: Any = apprised(web.url.replace("http", "json") + "/x?rto=60") if kind == "apprise" else Webhook(web.url)
    house = House(fallback="desk")
    hanging = "desk" if kind == "fallback" else "mail"
    house.consumer._channels[hanging].__dict__["sender"] = sender
    house.mail.failing = Refused("no such user")
    if kind != "fallback":
        house.consumer._sender = sender
    house.memory.append(to_mail(1))
    stop = threading.Event()
    stream = stream_of(house.consumer, house.memory)
    thread = threading.Thread(target=Runner(house.consumer, stream, name="mail", stop=stop).run)
    thread.start()
    wait_for(lambda: web.asked, 30)
    stop.set()
    began = time.monotonic()
    thread.join(30)
    lasted = time.monotonic() - began
    released.set()
    sender.close()
    assert lasted < 4
    assert house.memory.committed == {ALERTS_0: 0}
    assert house.memory.emitted == []


def test_waiting_for_the_active_hours_is_not_a_fault() -> None:
    """The service stays ready, no failure is counted, and the log shows until when."""
    house, monitor = House(active=(13 * 3600, 3600)), Monitor("mail")
    reasons: list[dict[str, str]] = []

    def meanwhile(seconds: float) -> None:
        reasons.append(monitor.reasons())
        house.now += timedelta(seconds=seconds)

    house.memory.append(to_mail(1))
    stream = Waiting(house, meanwhile)
    running = Runner(house.consumer, stream, name="mail", monitor=monitor)
    with capture_logs() as lines:
        while running.step(0) or house.mail.got == []:
            pass
    assert reasons[0] == {}
    assert 'bourse_consumer_retries_total{consumer="mail"} 0.0' in monitor.answer("/metrics")[1]
    logged = [(line["event"], line["reason"]) for line in lines if "reason" in line]
    assert logged == [("waiting", "outside the active hours"), ("opening again", "the active hours begin")]
    assert {line["log_level"] for line in lines} == {"info"}
    assert not any(reasons)
