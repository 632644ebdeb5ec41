"""Notifications: what is written, what is told when, and what arrives at real servers on this machine."""

from __future__ import annotations

import base64
import hmac
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, time, timedelta
from email import message_from_bytes
from email.policy import default as mail_policy
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from bidi import get_display
from click.testing import CliRunner
from msgspec import structs

from bourse_cli.root import bourse
from bourse_consumers.api import Partition
from bourse_consumers.notify import words
from bourse_consumers.notify.channels import Channel, load
from bourse_consumers.notify.consumer import Notify
from bourse_consumers.notify.policy import Kind, Message, Policy, Quiet, message
from bourse_consumers.notify.sending import Apprised, NotSent, Sender, Webhook
from bourse_consumers.notify.words import Manner, Text
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, MemoryStream, run, runner, stream_of
from bourse_sandbox.kafka import free_port
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import (
    AlertState,
    DeadLetter,
    PriceAlert,
    Reason,
    ResolvedBy,
    Scope,
    Severity,
    Stage,
)
from tests.web import Web, serving

NOON = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)  # 12:00 in Tehran, 2 Azar 1405
ALERTS_0 = Partition("bourse.alerts", 0)
FA, EN = Manner(), Manner("en", "en", "gregorian")
MARKS = re.compile("[\u200f\u2066\u2068\u2069]")


def alert(number: int = 1, poll: int | None = 1, **fields: Any) -> PriceAlert:
    """Return an alert of a poll, with an id of its own."""
    plausible = {"alert_id": f"alert-{number}", "poll_sequence": poll, "channels": ["desk"], "title": None}
    return structs.replace(words.example(NOON), **{**plausible, **fields})


# --- words ------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a text without the marks of direction."""
    return MARKS.sub("", text)


def test_an_alert_in_persian() -> None:
    """Persian digits and separators, the day of the Jalali calendar, the time of Tehran."""
    text = words.group([alert()], FA)
    assert plain(text.title) == "🔵 ومعادن fast-move"
    assert plain(text.body) == "۳٫۲ درصد در پنج دقیقه، اکنون ۵٬۴۸۸، ۱۲:۰۰:۰۰\n۱۴۰۵/۰۹/۰۲"


def test_an_alert_in_english() -> None:
    """With the digits and the calendar of the language, unless told."""
    text = words.group([alert()], EN)
    assert plain(text.body) == "3.2 % in five minutes, now 5,488, 12:00:00\n2026-11-23"
    mixed = words.group([alert()], Manner("en", "fa", "jalali"))
    assert plain(mixed.body).endswith("now 5,488, ۱۲:۰۰:۰۰\n۱۴۰۵/۰۹/۰۲")


def test_persian_reads_right() -> None:
    """On the screen, by Unicode's algorithm: from the right, with numbers and Latin words in their own direction."""
    for english_digits in (False, True):
        manner = Manner("fa", "en" if english_digits else "fa", "jalali")
        line = words.group(
            [alert(title="fast-move", message={"fa": manner.ltr("-3.25%" if english_digits else "-۳٫۲۵٪")})] * 2, manner
        ).body.splitlines()[0]
        shown = MARKS.sub("", get_display(line, base_dir=None))
        number, at = ("-3.25%", "12:00:00") if english_digits else ("-۳٫۲۵٪", "۱۲:۰۰:۰۰")
        assert number in shown
        assert at in shown
        assert "fast-move" in shown
        assert "ومعادن"[::-1] in shown
        # The line begins at the right: mark, symbol, rule, number, time.
        places = [shown.index(each) for each in ("🔵", "ومعادن"[::-1], "fast-move", number, at)]
        assert places == sorted(places, reverse=True)


def test_without_the_marks_persian_would_read_wrong() -> None:
    """The test above can fail."""
    line = plain(words.group([alert(message={"fa": f"تغییر {FA.ltr('-۳٫۲۵٪')}"})] * 2, FA).body.splitlines()[0])
    assert "-۳٫۲۵٪" not in get_display(line, base_dir=None)


def test_the_authors_own_message_is_the_text() -> None:
    """In the language of the channel, on one line; in another one if it has no other."""
    text = words.group([alert(message={"fa": "همین حالا\nببین"})], FA)
    assert (
        words.group([alert(message={"fa": "ببین"})], EN).body == words.group([alert(message={"en": "ببین"})], EN).body
    )
    assert plain(text.body).startswith("همین حالا ببین، ۱۲:۰۰:۰۰")


def test_the_end_of_an_alert() -> None:
    """Says that it is one, and so does that of a rule that is gone."""
    over = alert(state=AlertState.RESOLVED, resolved_by=ResolvedBy.CONDITION)
    assert plain(words.group([over], FA).title) == "✅ پایان: ومعادن fast-move"
    gone = structs.replace(over, resolved_by=ResolvedBy.RULE_REMOVED)
    assert "the rule was removed" in words.group([gone], EN).title


def test_an_alert_of_the_feed_says_what_is_wrong() -> None:
    """Without a message the rule's expression is printed, in a Persian line too."""
    feed = alert(scope=Scope.FEED, symbol=None, instrument=None, title=None, message=None, when="feed_state == DOWN")
    text = words.group([feed], FA)
    assert plain(text.title) == "🔵 sample fast-move"
    assert plain(text.body).startswith("feed_state == DOWN، ۱۲:۰۰:۰۰")


def test_a_channels_template() -> None:
    """It says the line, in the channel's digits; what it may name is checked when it is read."""
    manner = Manner("en", "en", "gregorian", template="{symbol} at {price} ({day})")
    assert plain(words.group([alert()], manner).body).startswith("ومعادن at 5,488 (2026-11-23)\n")
    assert words.template_mistake("{symbol} {price}") is None
    for bad in ("{simbol}", "{price:d}", "{symbol!r}", "{0}", "{", "{symbol.__class__}"):
        assert words.template_mistake(bad), bad


@pytest.mark.parametrize("manner", [FA, EN], ids=["fa", "en"])
def test_every_alert_can_be_written(manner: Manner) -> None:
    """Of any scope and state, with everything absent that may be."""
    bare = dict.fromkeys(
        ("instrument", "symbol", "title", "instrument_title", "last_price", "traded_at", "resolved_by", "message")
    )
    for scope in Scope:
        for state in AlertState:
            for fields in ({}, bare):
                text = words.group([structs.replace(alert(scope=scope, state=state), **fields)], manner)
                assert "None" not in text.title + text.body


def test_many_of_one_poll() -> None:
    """The most urgent first, twenty in full, the rest counted, in total and by rule."""
    many = [alert(number, rule=f"rule-{number % 2}") for number in range(30)]
    urgent, over = alert(77, severity=Severity.CRITICAL), alert(78, state=AlertState.RESOLVED)
    text = words.group([*many, over, urgent], EN)
    lines = plain(text.body).splitlines()
    assert plain(text.title) == "🔴 31 alerts, 1 over"
    assert lines[0].startswith("🔴")
    assert lines[20:] == ["… and 12 more", "", "rule-0: 15", "rule-1: 15", "fast-move: 2", "2026-11-23"]


def test_a_digest_counts_and_shows_the_most_urgent() -> None:
    """When it was, how many of each rule, and ten lines."""
    later = NOON + timedelta(hours=1)
    told = [*[alert(number) for number in range(12)], alert(99, rule="other", raised_at=later)]
    lines = plain(words.digest(told, EN).body).splitlines()
    assert lines[:4] == ["2026-11-23 12:00:00 to 2026-11-23 13:00:00", "fast-move: 12", "other: 1", ""]
    assert lines[4].startswith("🔵 ومعادن other")
    assert lines[-1] == "… and 3 more"


# --- messages ---------------------------------------------------------------------------------------------------------


def test_what_is_in_hand_is_one_message() -> None:
    """The alerts of one poll one by one, those of several polls as a digest, old ones as a count."""
    old = NOON - timedelta(hours=2)
    of_one, of_two = [alert(1), alert(2)], [alert(1), alert(2, 2)]
    kinds = [
        message(alerts, EN, alerts[0].raised_at, timedelta(hours=1)).kind
        for alerts in (of_one, of_two, [alert(1, None), alert(2, None)])
    ]
    assert kinds == [Kind.ALERTS, Kind.DIGEST, Kind.ALERTS]
    stale = message([alert(1, raised_at=old), alert(2, 2, raised_at=old)], EN, NOON, timedelta(hours=1))
    assert (stale.kind, len(stale.alerts)) == (Kind.STALE, 2)
    assert message(of_one, EN, NOON, None).id == message(of_one[::-1], EN, NOON, None).id


@pytest.mark.parametrize(
    ("start", "end", "hours"),
    [(time(11), time(13), 1.0), (time(12), time(7), 19.0), (time(22), time(12, 30), 0.5), (time(13), time(11), 0.0)],
)
def test_quiet_hours_are_those_of_tehran(start: time, end: time, hours: float) -> None:
    """At noon in Tehran; they may run over midnight."""
    assert Quiet(start, end).seconds(NOON) == hours * 3600


@pytest.mark.parametrize(
    ("policy", "fields", "wanted"),
    [
        ({}, {}, True),
        ({}, {"channels": []}, False),
        ({"unnamed": True}, {"channels": []}, True),
        ({"unnamed": True}, {"channels": ["misspelt"]}, True),
        ({"unnamed": True}, {"channels": ["mail"]}, False),
        ({"named": False, "unnamed": True}, {}, False),
        ({"severities": frozenset({Severity.CRITICAL})}, {"severity": Severity.WARNING}, False),
        ({"severities": frozenset({Severity.CRITICAL})}, {"severity": Severity.CRITICAL}, True),
        ({"severities": frozenset({Severity.CRITICAL})}, {"severity": Severity.UNKNOWN}, True),
        ({"labels": {"team": frozenset({"a", "b"})}}, {"labels": {"team": "b", "more": "x"}}, True),
        ({"labels": {"team": frozenset({"a", "b"})}}, {"labels": {"team": "c"}}, False),
        ({"labels": {"team": frozenset({"a", "b"})}}, {}, False),
        ({"resolved": False}, {"state": AlertState.RESOLVED}, False),
        ({}, {"state": AlertState.RESOLVED}, True),
        ({}, {"state": AlertState.RESOLVED, "message": None}, False),
    ],
)
def test_who_is_told(policy: dict[str, Any], fields: dict[str, Any], wanted: bool) -> None:
    """By names, severity, labels and state."""
    assert Policy("desk", **policy).wants(alert(**fields), frozenset({"desk", "mail"})) is wanted


# --- real servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[Web]:
    """Return a web server."""
    with serving() as server:
        yield server


def sent(*alerts: PriceAlert) -> Message:
    """Return the message about alerts."""
    return message(alerts, FA, NOON, None)


def test_mail_arrives_at_a_mail_server(wait_for: Callable[..., Any]) -> None:
    """Over SMTP, in Persian, as it was written."""
    mails: list[bytes] = []

    class Handler:
        async def handle_DATA(self, _: Any, __: Any, envelope: Any) -> str:  # noqa: N802  # its own name for it
            mails.append(envelope.content)
            return "250 OK"

    server = Controller(Handler(), hostname="127.0.0.1", port=free_port())
    server.start()
    try:
        url = f"mailto://127.0.0.1:{server.port}?from=bourse@example.ir&to=trader@example.ir&mode=insecure&format=text"
        told = sent(alert())
        Apprised(url).send(told.text, told)
    finally:
        server.stop()
    mail = message_from_bytes(mails[0], policy=mail_policy)
    assert mail["To"] == "trader@example.ir"
    assert str(mail["Subject"]) == told.text.title
    assert mail.get_content_type() == "text/plain"
    assert told.text.body in mail.get_content().replace("\r\n", "\n")


def test_ntfy_gets_what_was_written(web: Web) -> None:
    """One of Apprise's HTTP APIs, on a server of one's own."""
    told = sent(alert(severity=Severity.CRITICAL))
    Apprised(web.url.replace("http", "ntfy") + "/metals").send(told.text, told)
    (body,) = web.bodies()
    assert (body["topic"], body["title"], body["message"]) == ("metals", told.text.title, told.text.body)


def test_no_picture_is_fetched_from_elsewhere(web: Web) -> None:
    """Services show what the message says, and nothing of Apprise's."""
    told = sent(alert())
    Apprised("discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js", address=web.url).send(told.text, told)
    assert b"http" not in web.asked[0].body


TOKEN = "123456789:AAAAbbbbCCCCddddEEEEffffGGGGhhhhIII"


def test_a_bot_of_a_messenger_on_another_host(web: Web) -> None:
    """Messengers with Telegram's Bot API: the plug-in is Telegram's, the address the channel's."""
    told = sent(alert())
    Apprised(f"tgram://{TOKEN}/4242", address=f"{web.url}/api").send(told.text, told)
    (asked,) = web.asked
    (body,) = web.bodies()
    assert asked.path == f"/api/bot{TOKEN}/sendMessage"
    assert str(body["chat_id"]) == "4242"
    assert told.text.body.splitlines()[0] in body["text"]


def test_each_channel_has_its_own_proxy(web: Web) -> None:
    """One goes through it, another of the same process does not."""
    with serving() as proxy:
        told = sent(alert())
        through = Apprised("ntfy://ntfy.example.ir/metals", proxy=proxy.url)
        direct = Apprised(web.url.replace("http", "ntfy") + "/metals")
        through.send(told.text, told)
        direct.send(told.text, told)
        Webhook("http://hooks.example.ir/x", proxy=proxy.url).send(told.text, told)
        assert [asked.path for asked in proxy.asked] == ["http://ntfy.example.ir/", "http://hooks.example.ir/x"]
    assert len(web.asked) == 1


def test_a_webhook_follows_the_environments_proxy(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one decision for all clients: loopback is not proxied, and a bad variable is named."""
    told = sent(alert())
    with serving() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "[::1]")
        Webhook("http://hooks.example.ir/x").send(told.text, told)
        assert [asked.path for asked in proxy.asked] == ["http://hooks.example.ir/x"]
        Webhook(f"{web.url}/x").send(told.text, told)
    assert len(web.asked) == 1
    monkeypatch.setenv("HTTP_PROXY", "socks://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="HTTP_PROXY: socks:// is not a supported proxy scheme"):
        Webhook("http://hooks.example.ir/x")


def test_a_webhook_is_signed_and_can_be_told_from_a_repetition(web: Web) -> None:
    """As Standard Webhooks has it; the alerts are those of the topic, field for field."""
    key = base64.b64encode(b"a key of some length").decode()
    hook = Webhook(f"{web.url}/hook", f"whsec_{key}")
    told = sent(alert(1), alert(2))
    hook.send(told.text, told)
    hook.send(told.text, told)
    (_, headers, body, _), (_, again, _, _) = web.asked
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    signature = base64.b64encode(hmac.digest(b"a key of some length", signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"
    assert (
        headers["Idempotency-Key"] == headers["webhook-id"] == again["Idempotency-Key"] == sent(alert(2), alert(1)).id
    )
    content = json.loads(body)
    assert [each["alert_id"] for each in content["alerts"]] == ["alert-1", "alert-2"]
    assert set(content["alerts"][0]) == set(PriceAlert.__struct_fields__)
    assert (content["title"], content["body"], content["kind"]) == (told.text.title, told.text.body, "alerts")


def test_a_failure_says_why_and_shows_no_secret(web: Web) -> None:
    """The server's answer, or that there is none; no token, path, or password."""
    web.status = 403
    gone = web.url.rpartition(":")[0] + ":1"
    ways: list[Sender] = [
        Apprised(f"tgram://{TOKEN}/4242", address=web.url),
        Apprised(web.url.replace("http://", "ntfy://trader:passw0rd@") + "/secret-topic"),
        Apprised(gone.replace("http://", "json://trader:passw0rd@") + "/secret-topic"),
        Webhook(f"{web.url}/secret-topic?token=passw0rd"),
        Webhook(f"{gone}/secret-topic?token=passw0rd"),
    ]
    told = sent(alert())
    for way in ways:
        with pytest.raises(NotSent) as caught:
            way.send(told.text, told)
        assert re.search("403|onnect", str(caught.value)), str(caught.value)
        shown = f"{caught.value} {way!r} {Channel(Policy('desk'), way)!r}"
        for secret in (TOKEN, "4242", "secret-topic", "passw0rd"):
            assert secret not in shown


# --- the file ---------------------------------------------------------------------------------------------------------


def channels(folder: Path, text: str) -> dict[str, Channel]:
    """Return the channels of a file."""
    (folder / "channels.yaml").write_text(text, "utf-8")
    return load(
        folder / "channels.yaml", {"DESK": "ntfy://127.0.0.1/desk", "HOOK": "https://example.ir/x", "EMPTY": ""}
    )


def test_channels_are_read_with_their_defaults(tmp_path: Path) -> None:
    """What a channel says goes before what the defaults say, and that before what we say."""
    (tmp_path / "secret").write_text("ntfy://127.0.0.1/mail\n", "utf-8")
    found = channels(
        tmp_path,
        """
version: 1
defaults: {language: en, limit: 5, fallback: mail, severity: [info], quiet: {from: 21:00, to: 07:30}}
channels:
  desk: {url: {env: DESK}, severity: warning, labels: {team: [a, b], desk: c}, alerts: all, quiet: null}
  mail: {url: {file: secret}, digits: fa, resolved: false}
  hook: {webhook: {env: HOOK}, key: {clear: whsec_YQ==}, language: fa, alerts: unnamed}
""",
    )
    desk, mail, hook = (found[name].policy for name in ("desk", "mail", "hook"))
    assert desk.severities == {Severity.WARNING, Severity.CRITICAL}
    assert desk.labels == {"team": {"a", "b"}, "desk": {"c"}}
    assert (desk.named, desk.unnamed, desk.limit, desk.quiet, desk.resolved) == (True, True, 5, None, True)
    assert (mail.named, mail.unnamed, mail.resolved) == (True, False, False)
    assert mail.severities == {Severity.INFO}
    assert mail.quiet == Quiet(time(21), time(7, 30))
    assert mail.manner == Manner("en", "fa", "gregorian")
    assert (hook.manner, hook.named, hook.unnamed) == (Manner(), False, True)
    assert [found[name].fallback for name in ("desk", "mail", "hook")] == ["mail", None, "mail"]


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    """With file, line and key, the nearest known key, and without the secret."""
    with pytest.raises(ConfigurationError) as caught:
        channels(
            tmp_path,
            """version: 1
defaults: {langauge: fa}
channels:
  plain:
    url: tgram://123456789:secret/1
  both: {url: {env: DESK}, webhook: {env: HOOK}}
  few: {limit: 0}
  none: {}
  words:
    url: {env: DESK}
    severity: urgent
    template: "{simbol}"
    quiet: {from: "25:00", to: 07:00}
    address: example.ir
  "a b": {url: {env: DESK}}
  none: {url: {env: DESK}, quiet: {from: 1:00, too: 2:00}}
""",
        )
    said = str(caught.value)
    for expected in (
        "channels.yaml:2:12: defaults.langauge: unknown key; did you mean language?",
        "channels.yaml:5:5: channels.plain.url: this is a secret: say {env: NAME}",
        "channels.yaml:6:3: channels.both: give either url",
        "channels.yaml:7:9: channels.few.limit: Input should be greater",
        "channels.yaml:16:3: none: the key is given twice",
        "channels.none.quiet.too: unknown key; did you mean to?",
        "channels.yaml:11:5: channels.words.severity[1]: Input should be 'info', 'warning' or 'critical'",
        "channels.yaml:12:5: channels.words.template: {simbol} is unknown",
        "channels.yaml:13:13: channels.words.quiet.from: give a time of day",
        "channels.yaml:14:5: channels.words.address: give an address",
        "channels.yaml:15:4: channels.a b",
    ):
        assert expected in said
    assert "secret/1" not in said
    assert "Traceback" not in said


def test_secrets_that_are_not_there_are_named_at_once(tmp_path: Path) -> None:
    """So are addresses that Apprise does not know, and fallbacks that do not exist; none is shown."""
    (tmp_path / "odd").write_text("nonsense://hidden-token/x", "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        channels(
            tmp_path,
            """version: 1
channels:
  a: {url: {env: NOWHERE}}
  b: {url: {env: EMPTY}}
  c: {url: {file: nofile}}
  d: {url: {file: odd}}
  e: {webhook: {env: DESK}}
  f: {webhook: {env: HOOK}, key: {clear: "whsec_?"}}
  g: {url: {env: DESK}, proxy: {clear: "socks5://127.0.0.1:1080"}}
  h: {url: {clear: "mailto://user:pass@example.ir"}, proxy: {clear: "http://127.0.0.1:1080"}}
  i: {url: {env: DESK}, fallback: j}
""",
        )
    lines = str(caught.value).splitlines()
    expected = [
        "3: channels.a.url: the environment has no NOWHERE",
        "4: channels.b.url: the environment has no EMPTY",
        "5: channels.c.url: cannot read",
        "6: channels.d.url: Apprise knows no such address (nonsense://…)",
        "7: channels.e.webhook: give an address such as https://host/path",
        "8: channels.f.webhook: a key that begins with whsec_",
        "9: channels.g.proxy: give an address",
        "10: channels.h.url: mail takes neither",
        "11: channels.i.fallback: name another",
    ]
    assert [
        line.partition("channels.yaml:")[2][: len(want)] for line, want in zip(lines, expected, strict=True)
    ] == expected
    assert "hidden-token" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "the channels: cannot read"),
        ("", "this is not the channels: the file is empty"),
        ("a: [", "not YAML"),
        ("version: 2\nchannels: {}", "version: Input should be 1"),
        ("version: 1\nchannels: {}", "at least 1"),
    ],
)
def test_a_file_that_is_none_is_an_operators_mistake(tmp_path: Path, text: str | None, said: str) -> None:
    """On the consumer and on the test of a channel."""
    path = tmp_path / "channels.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    for command in (["consume", "notify"], ["notify", "test", "desk"]):
        error = CliRunner().invoke(bourse, [*command, "--channels", str(path)]).exception
        assert isinstance(error, ConfigurationError)
        assert said in str(error)


def test_without_apprise_it_says_what_to_install(tmp_path: Path) -> None:
    """Exit code 2 and the extra's name; the other commands work."""
    program = "import sys; sys.modules['apprise'] = None; from bourse_cli.root import main; main()"
    command = [sys.executable, "-c", program, "notify", "test", "desk", "--channels", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: notifications need the module apprise: pip install 'bourse-stream[notify]'\n"


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["examples/channels.yaml", "docs/notify.md"])
def test_the_examples_are_channels_files(page: str, tmp_path: Path) -> None:
    """As they stand, with the variables and files that they name."""
    text = (ROOT / page).read_text("utf-8")
    if page.endswith(".md"):
        (text,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / "channels.yaml"
    path.write_text(text, "utf-8")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "mail").write_text("mailtos://me:pw@example.ir", "utf-8")
    names = re.findall(r"env: (\w+)", text)
    addresses = dict.fromkeys(names, f"tgram://{TOKEN}/4242") | {
        "HOOK_URL": "https://example.ir/x", "HOOK_KEY": "whsec_YQ==", "PROXY": "http://127.0.0.1:8118",
        "MAIL_URL": "mailtos://me:pw@example.ir",
    }  # fmt: skip
    assert {"desk", "mail", "robot"} <= set(load(path, addresses))


def test_a_channel_is_tried_out(web: Web, tmp_path: Path) -> None:
    """`bourse notify test`: a sample arrives; where it does not, it fails and says why, and no secret."""
    path = tmp_path / "channels.yaml"
    path.write_text(f"version: 1\nchannels: {{desk: {{webhook: {{clear: '{web.url}/passw0rd'}}}}}}", "utf-8")
    command = ["notify", "test", "--channels", str(path)]
    result = CliRunner().invoke(bourse, [*command, "desk"])
    assert result.exit_code == 0, result.output
    assert plain(web.bodies()[0]["title"]) == "👋 پیام آزمایشی کانال desk"
    web.status = 500
    error = CliRunner().invoke(bourse, [*command, "desk"]).exception
    assert str(error) == "channel desk does not accept it: 127.0.0.1 answers 500 Internal Server Error"
    error = CliRunner().invoke(bourse, [*command, "dekc"]).exception
    assert isinstance(error, ConfigurationError)
    assert "there are desk" in str(error)


# --- the consumer -----------------------------------------------------------------------------------------------------


class Phone:
    """A channel that keeps what it gets, or does not accept it."""

    def __init__(self) -> None:
        self.got: list[Message] = []
        self.failing: NotSent | None = None

    def send(self, text: Text, message: Message | None = None) -> None:
        if self.failing is not None:
            raise self.failing
        assert message is not None
        self.got.append(message)

    def ids(self) -> list[list[str]]:
        return [[each.alert_id for each in message.alerts] for message in self.got]


class House:
    """A consumer for the channel `mail`, and another channel."""

    def __init__(self, patience: float = 60, fallback: str | None = None, **policy: Any) -> None:
        self.memory, self.phones = Memory(), {"desk": Phone(), "mail": Phone()}
        self.memory.committed[ALERTS_0] = 0
        channels = {
            "desk": Channel(Policy("desk", manner=EN), self.phones["desk"]),
            "mail": Channel(Policy("mail", manner=EN, **policy), self.phones["mail"], fallback),
        }
        self.consumer = Notify("mail", channels, max_age=None, patience=timedelta(seconds=patience), now=lambda: NOON)

    def run(self) -> MemoryStream:
        stream = stream_of(self.consumer, self.memory)
        run(self.consumer, self.memory, stream=stream)
        return stream


def test_a_channel_gets_its_alerts_in_order_and_once() -> None:
    """What it does not want is passed over; a restart repeats nothing."""
    house = House()
    house.memory.append(alert(1, channels=["mail"]), alert(2), alert(3, channels=["mail", "desk"]))
    house.run()
    house.run()
    assert house.phones["mail"].ids() == [["alert-1", "alert-3"]]
    assert house.phones["desk"].ids() == []
    assert house.memory.committed == {ALERTS_0: 3}


def test_a_new_channel_begins_at_the_end() -> None:
    """Nobody wants the alerts of a month at once."""
    house = House()
    house.memory.committed.clear()
    house.memory.append(alert(1, channels=["mail"]))
    house.run()
    house.memory.append(alert(2, channels=["mail"]))
    house.run()
    assert house.phones["mail"].ids() == [["alert-2"]]


def test_a_failure_that_passes_is_waited_for() -> None:
    """The same message comes again, later."""
    house = House()
    house.phones["mail"].failing = NotSent("it is switched off")

    class Waiting(MemoryStream):
        def wait(self, seconds: float, stopped: Callable[[], bool]) -> bool:
            house.phones["mail"].failing = None
            return super().wait(seconds, stopped)

    house.memory.append(alert(1, channels=["mail"]))
    stream = Waiting(house.memory, house.consumer.topics)
    run(house.consumer, house.memory, stream=stream)
    assert house.phones["mail"].ids() == [["alert-1"]]
    assert len(stream.waited) == 1


@pytest.mark.parametrize("permanent", [True, False])
def test_what_cannot_be_delivered_goes_to_the_fallback_and_to_dead_letters(permanent: bool) -> None:
    """The alert itself, with the record's bytes; and on with what comes."""
    house = House(patience=60 if permanent else 0, fallback="desk")
    house.phones["mail"].failing = NotSent("no such user", permanent=permanent)
    house.memory.append(alert(1, channels=["mail"]), alert(2, channels=["mail"]))
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
    assert house.phones["desk"].ids() == [["alert-1", "alert-2"]]
    assert house.memory.committed == {ALERTS_0: 2}


def exhaust(running: Runner) -> None:
    while running.step():
        pass


def test_quiet_hours_and_a_limit_hold_alerts_back() -> None:
    """They wait with the offset, so that a restart does not lose them; or are dropped if the channel says so."""
    for policy, waited in (({"quiet": Quiet(time(11), time(13))}, 3600), ({"limit": 1}, 60)):
        house = House(**policy)
        house.memory.append(alert(1, channels=["mail"]))
        stream = stream_of(house.consumer, house.memory)
        running = runner(house.consumer, house.memory, batch_size=1, stream=stream)
        house.memory.append(alert(2, channels=["mail"]))
        with pytest.raises(AssertionError, match="has asked to wait"):
            exhaust(running)
        assert stream.waited[0] == pytest.approx(waited, abs=1)
    house = House(quiet=Quiet(time(11), time(13), drop=True))
    house.memory.append(alert(1, channels=["mail"]))
    house.run()
    assert (house.phones["mail"].ids(), house.memory.committed) == ([], {ALERTS_0: 1})
