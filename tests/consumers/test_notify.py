"""Notifications: what is written, what is told when, and what arrives at real servers on this machine."""

from __future__ import annotations

import base64
import hmac
import json
import re
import subprocess
import sys
import threading
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
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from bourse_cli.health import Monitor
from bourse_cli.root import bourse
from bourse_consumers.api import Partition, Record
from bourse_consumers.notify import words
from bourse_consumers.notify.channels import Channel, load
from bourse_consumers.notify.consumer import Notify
from bourse_consumers.notify.lane import Kind, Lane, Message, Policy, Quiet
from bourse_consumers.notify.sending import Apprised, NotSent, Sender, Webhook
from bourse_consumers.notify.words import Manner, Text
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, MemoryStream
from bourse_sandbox.kafka import free_port
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import (
    AlertKind,
    AlertState,
    DeadLetter,
    PriceAlert,
    Reason,
    ResolvedBy,
    Severity,
    Stage,
    Unit,
)
from tests.web import Web, serving

NOON = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)  # 12:00 in Tehran, 2 Azar 1405
ALERTS_0, ALERTS_1 = Partition("bourse.alerts", 0), Partition("bourse.alerts", 1)
FA, EN = Manner(), Manner("en", "en", "gregorian")
MARKS = re.compile("[\u200f\u2066\u2068\u2069]")


def alert(number: int = 1, poll: int | None = 1, **fields: Any) -> PriceAlert:
    """Return an alert of a poll, with an id of its own."""
    plausible = {"alert_id": f"alert-{number}", "poll_sequence": poll, "channels": ["desk"]}
    return structs.replace(words.example(NOON), **{**plausible, **fields})


# --- words ------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a text without the marks of direction."""
    return MARKS.sub("", text)


def test_an_alert_in_persian() -> None:
    """Persian digits and separators, the day of the Jalali calendar, the time of Tehran."""
    text = words.group([alert(observed=-3.25, price=1_205_488)], FA)
    assert plain(text.title) == "🔵 ومعادن fast-move"
    assert plain(text.body) == ("تغییر قیمت -۳٫۲۵٪ (آستانه +۳٪)، قیمت ۱٬۲۰۵٬۴۸۸، ۱۲:۰۰:۰۰\n۱۴۰۵/۰۹/۰۲")


def test_an_alert_in_english() -> None:
    """With the digits and the calendar of the language, unless told."""
    text = words.group([alert()], EN)
    assert plain(text.body) == ("change +3.2% (threshold +3%), price 5,488, 12:00:00\n2026-11-23")
    mixed = words.group([alert()], Manner("en", "fa", "jalali"))
    assert plain(mixed.body).endswith("price ۵٬۴۸۸, ۱۲:۰۰:۰۰\n۱۴۰۵/۰۹/۰۲")


def test_persian_reads_right() -> None:
    """On the screen, by Unicode's algorithm: from the right, with numbers and Latin words in their own direction."""
    for english_digits in (False, True):
        manner = Manner("fa", "en" if english_digits else "fa", "jalali")
        line = words.group([alert(observed=-3.25)] * 2, manner).body.splitlines()[0]
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
    line = plain(words.group([alert(observed=-3.25)] * 2, FA).body.splitlines()[0])
    assert "-۳٫۲۵٪" not in get_display(line, base_dir=None)


def test_the_authors_own_message_is_the_text() -> None:
    """The rule's template, filled in, stands in the place of what was measured."""
    text = words.group([alert(message="همین حالا\nببین")], FA)
    assert plain(text.body).startswith("همین حالا ببین، ۱۲:۰۰:۰۰")


def test_the_end_of_an_alert() -> None:
    """Says that it is one, and so does that of a rule that is gone."""
    over = alert(state=AlertState.RESOLVED, resolved_by=ResolvedBy.CONDITION)
    assert plain(words.group([over], FA).title) == "✅ پایان: ومعادن fast-move"
    gone = structs.replace(over, resolved_by=ResolvedBy.RULE_REMOVED)
    assert "the rule was removed" in words.group([gone], EN).title


def test_an_alert_of_the_feed_says_what_is_wrong() -> None:
    """Nothing is measured there; the rule's condition stands for it, in a Persian line too."""
    feed = alert(kind=AlertKind.FEED, symbol=None, instrument=None, observed=None, price=None, condition="feed is DOWN")
    text = words.group([feed], FA)
    assert plain(text.title) == "🔵 sample fast-move"
    assert plain(text.body).startswith("جریان داده (feed is DOWN)، ۱۲:۰۰:۰۰")


def test_a_channels_template() -> None:
    """It says the line, in the channel's digits; what it may name is checked when it is read."""
    manner = Manner("en", "en", "gregorian", template="{symbol} at {price} ({day})")
    assert plain(words.group([alert()], manner).body).startswith("ومعادن at 5,488 (2026-11-23)\n")
    assert words.template_mistake("{symbol} {price}") is None
    for bad in ("{simbol}", "{price:d}", "{symbol!r}", "{0}", "{", "{symbol.__class__}"):
        assert words.template_mistake(bad), bad


@pytest.mark.parametrize("manner", [FA, EN], ids=["fa", "en"])
def test_every_alert_can_be_written(manner: Manner) -> None:
    """Of any kind, unit and state, with everything absent that may be."""
    bare = dict.fromkeys(
        ("instrument", "symbol", "title", "event_id", "poll_sequence", "observed", "threshold", "price")
    )
    for kind in AlertKind:
        for unit in Unit:
            for state in AlertState:
                for fields in ({}, bare):
                    changed = structs.replace(alert(kind=kind, unit=unit, state=state), **fields)
                    text = words.group([changed], manner)
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


# --- lanes ------------------------------------------------------------------------------------------------------------


class Desk:
    """A lane with a clock, which is handed alerts at offsets that count up."""

    def __init__(self, policy: Policy | None = None, max_age: timedelta | None = timedelta(hours=1)) -> None:
        self.lane = Lane(policy or Policy("desk"), frozenset({"desk", "mail"}), {ALERTS_0: 0, ALERTS_1: 0}, max_age)
        self.now = NOON
        self.offsets = {ALERTS_0: 0, ALERTS_1: 0}
        self.lane._behind = False  # as after its first message

    def take(self, *alerts: PriceAlert, partition: Partition = ALERTS_0) -> None:
        for each in alerts:
            self.lane.take(Record(partition, self.offsets[partition], 0, None, b"", {}), each, self.now)
            self.offsets[partition] += 1

    def due(self, seconds: float = 1) -> Message | None:
        self.now += timedelta(seconds=seconds)
        return self.lane.due(self.now)

    def told(self, seconds: float = 1) -> tuple[Kind, list[str]] | None:
        """Return the next message's kind and alerts, and let it have arrived."""
        message = self.due(seconds)
        if message is None:
            return None
        self.lane.done()
        return message.kind, [each.alert_id for each in message.alerts]


def test_what_fired_in_one_poll_is_one_message() -> None:
    """Of all partitions; the next poll's is another."""
    desk = Desk()
    desk.take(alert(1, 7), alert(2, 7), alert(3, 8))
    desk.take(alert(4, 7), partition=ALERTS_1)
    assert desk.due(0.1) is None, "the rest of the poll may be on its way"
    assert desk.told() == (Kind.ALERTS, ["alert-1", "alert-2", "alert-4"])
    assert desk.told() == (Kind.ALERTS, ["alert-3"])
    assert desk.told() is None


def test_nothing_is_told_out_of_turn() -> None:
    """An alert of the same poll behind one of another waits: how far a channel is, is an offset."""
    desk = Desk()
    desk.take(alert(1, 7), alert(2, 8), alert(3, 7))
    assert desk.told() == (Kind.ALERTS, ["alert-1"])
    assert desk.lane.progress() == {ALERTS_0: 1, ALERTS_1: 0}


def test_progress_waits_for_what_is_in_hand() -> None:
    """It moves when a message is done, beyond what the channel does not want."""
    desk = Desk()
    desk.take(alert(1, channels=["mail"]), alert(2), alert(3, channels=["mail"]))
    assert desk.lane.progress()[ALERTS_0] == 1
    assert desk.due()
    assert desk.due() is None, "one at a time"
    assert desk.lane.progress()[ALERTS_0] == 1
    desk.lane.done()
    assert desk.lane.progress()[ALERTS_0] == 3


def test_what_was_told_before_is_passed_over() -> None:
    """A lane that is ahead of the committed offset begins where it was."""
    lane = Lane(Policy("desk"), frozenset({"desk"}), {ALERTS_0: 2}, None)
    for offset in range(3):
        lane.take(Record(ALERTS_0, offset, 0, None, b"", {}), alert(offset), NOON)
    message = lane.due(NOON + timedelta(seconds=1))
    assert message
    assert [each.alert_id for each in message.alerts] == ["alert-2"]


def test_what_a_lane_finds_at_its_start_is_one_message() -> None:
    """What its predecessor had in hand comes again with whatever was read since; then all is as ever."""
    desk = Desk()
    desk.lane = Lane(Policy("desk"), frozenset({"desk"}), {ALERTS_0: 0, ALERTS_1: 0}, None)
    desk.take(alert(1, 1), alert(2, 2))
    assert desk.due(0.2) is None
    desk.take(alert(3, 1), partition=ALERTS_1)
    assert desk.due(0.2) is None, "there was more to read a moment ago"
    assert desk.told(0.1) == (Kind.DIGEST, ["alert-1", "alert-2", "alert-3"])
    desk.take(alert(4, 4), alert(5, 5))
    assert desk.told() == (Kind.ALERTS, ["alert-4"])


def test_a_digest_does_not_wait_for_ever() -> None:
    """Alerts that never stop coming do not hold it back."""
    desk = Desk()
    desk.lane = Lane(Policy("desk"), frozenset({"desk"}), {ALERTS_0: 0, ALERTS_1: 0}, None)
    for number in range(12):
        desk.take(alert(number, number))
        if message := desk.due(0.2):
            break
    assert message
    assert len(message.alerts) == 5, "of one second"


def test_the_limit_of_a_minute_and_the_digest_of_the_rest() -> None:
    """Never more messages in any minute; what had to wait is told at once, and the time after it is as before."""
    desk = Desk(Policy("desk", limit=2))
    desk.take(*[alert(number, number) for number in range(6)])
    assert desk.told() == (Kind.ALERTS, ["alert-0"])
    assert desk.told() == (Kind.ALERTS, ["alert-1"])
    assert desk.told() is None
    assert desk.told(57) is None
    assert desk.told(1) == (Kind.DIGEST, ["alert-2", "alert-3", "alert-4", "alert-5"])
    desk.take(alert(8, 8))
    assert desk.told() == (Kind.ALERTS, ["alert-8"])


def test_one_group_that_had_to_wait_is_no_digest() -> None:
    """A digest of one poll would say less than its message."""
    desk = Desk(Policy("desk", limit=1))
    desk.take(alert(1, 1), alert(2, 2))
    assert desk.told()
    assert desk.told() is None
    assert desk.told(60) == (Kind.ALERTS, ["alert-2"])


def test_quiet_hours_end_with_a_digest() -> None:
    """Nothing leaves in them, nothing is lost: the lane stays where it was."""
    desk = Desk(Policy("desk", quiet=Quiet(time(11), time(13))))
    desk.take(alert(1, 1), alert(2, 2))
    assert desk.told() is None
    assert desk.lane.progress()[ALERTS_0] == 0
    assert desk.told(3600) == (Kind.DIGEST, ["alert-1", "alert-2"])


def test_quiet_hours_that_drop() -> None:
    """What comes in them is done with."""
    desk = Desk(Policy("desk", quiet=Quiet(time(11), time(13), drop=True)))
    desk.take(alert(1, 1), alert(2, 2))
    assert desk.told() is None
    assert desk.lane.progress()[ALERTS_0] == 2
    assert desk.told(3600) is None


@pytest.mark.parametrize(
    ("start", "end", "quiet"),
    [(time(11), time(13), True), (time(12), time(13), True), (time(10), time(12), False), (time(21), time(7), False),
     (time(21), time(12, 1), True), (time(12), time(7), True)],
)  # fmt: skip
def test_quiet_hours_are_those_of_tehran(start: time, end: time, quiet: bool) -> None:
    """The end is out, and they may run over midnight."""
    assert Quiet(start, end).holds(NOON) is quiet


def test_what_is_old_when_it_is_read_is_summed_up() -> None:
    """After an outage: one message for all of it, when all is read, and then the present."""
    desk = Desk()
    old = NOON - timedelta(hours=2)
    desk.take(*[alert(number, number, raised_at=old) for number in range(5)])
    assert desk.due(0.2) is None
    desk.take(alert(5, 5, raised_at=old), alert(6, 6))
    assert desk.due(0.2) is None, "there was more to read a moment ago"
    message = desk.due(0.2)
    assert message
    assert message.kind is Kind.STALE
    assert plain(message.text.title) == "📋 ۶ هشدار قدیمی فرستاده نشد"
    assert "بیش از ۱ ساعت" in plain(message.text.body)
    desk.lane.done()
    assert desk.told() == (Kind.ALERTS, ["alert-6"])


def test_a_channel_that_was_late_gets_the_rest_in_a_digest() -> None:
    """What piled up while it took nothing does not storm."""
    desk = Desk()
    desk.take(*[alert(number, number) for number in range(4)])
    assert desk.due()
    desk.lane.done(late=True)
    assert desk.told() == (Kind.DIGEST, ["alert-1", "alert-2", "alert-3"])


@settings(max_examples=300, deadline=None)
@given(
    alerts=st.lists(
        st.tuples(st.sampled_from([ALERTS_0, ALERTS_1]), st.integers(1, 4), st.sampled_from([False, False, True])),
        min_size=5,
        max_size=25,
    ),
    steps=st.lists(st.sampled_from(["take", "take", "take", "wait", "long", "late", "kill"]), min_size=10, max_size=60),
    limit=st.integers(1, 3),
    hours=st.sampled_from([None, Quiet(time(12, 1), time(12, 3))]),
)
def test_whatever_happens_none_is_left_out_and_a_kill_repeats_one_message(
    alerts: list[tuple[Partition, int, bool]], steps: list[str], limit: int, hours: Quiet | None
) -> None:
    """Alerts in any order of polls, old ones among them; what counts is how far a lane was when it was killed."""
    policy = Policy("desk", limit=limit, quiet=hours)
    desk, log = Desk(policy), dict[Partition, list[PriceAlert]]({ALERTS_0: [], ALERTS_1: []})
    told, in_hand, kills = list[list[str]](), False, 0
    for number, (partition, poll, old) in enumerate(alerts):
        raised = NOON - timedelta(days=1) if old else NOON + timedelta(hours=1)
        log[partition].append(alert(number, poll, raised_at=raised))
    for step in [*steps, *["take"] * len(alerts), *["done", "wait"] * 100]:
        if step == "take":
            for partition, offset in desk.offsets.items():
                desk.take(*log[partition][offset : offset + 1], partition=partition)
        elif step == "kill":
            # What was in hand had been handed over, and nobody knows.
            start, read = desk.lane.progress(), dict(desk.offsets)
            desk.lane = Lane(policy, frozenset({"desk"}), start, timedelta(hours=1))
            desk.offsets, in_hand, kills = dict(start), False, kills + 1
            # A successor reads what is there before it tells any of it.
            for partition, end in read.items():
                desk.take(*log[partition][start[partition] : end], partition=partition)
        elif step in {"wait", "long"}:
            if (message := desk.due(20 if step == "wait" else 120)) is not None:
                assert not in_hand
                told.append([each.alert_id for each in message.alerts])
                in_hand = True
        elif in_hand:
            desk.lane.done(late=step == "late")
            in_hand = False
    assert {each for ids in told for each in ids} == {f"alert-{number}" for number in range(len(alerts))}
    seen, repeated = set[str](), set[int]()
    for index, ids in enumerate(told):
        repeated.update([index] if not seen.isdisjoint(ids) else [])
        seen.update(ids)
    assert len(repeated) <= kills
    assert desk.lane.progress() == {partition: len(each) for partition, each in log.items()}


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


def message(*alerts: PriceAlert) -> Message:
    """Return the message about alerts."""
    desk = Desk()
    desk.take(*alerts)
    found = desk.due()
    assert found
    return found


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
        told = message(alert())
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
    told = message(alert(severity=Severity.CRITICAL))
    Apprised(web.url.replace("http", "ntfy") + "/metals").send(told.text, told)
    (body,) = web.bodies()
    assert (body["topic"], body["title"], body["message"]) == ("metals", told.text.title, told.text.body)


def test_no_picture_is_fetched_from_elsewhere(web: Web) -> None:
    """Services show what the message says, and nothing of Apprise's."""
    told = message(alert())
    Apprised("discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js", address=web.url).send(told.text, told)
    assert b"http" not in web.asked[0].body


TOKEN = "123456789:AAAAbbbbCCCCddddEEEEffffGGGGhhhhIII"


def test_a_bot_of_a_messenger_on_another_host(web: Web) -> None:
    """Messengers with Telegram's Bot API: the plug-in is Telegram's, the address the channel's."""
    told = message(alert())
    Apprised(f"tgram://{TOKEN}/4242", address=f"{web.url}/api").send(told.text, told)
    (asked,) = web.asked
    (body,) = web.bodies()
    assert asked.path == f"/api/bot{TOKEN}/sendMessage"
    assert str(body["chat_id"]) == "4242"
    assert told.text.body.splitlines()[0] in body["text"]


def test_each_channel_has_its_own_proxy(web: Web) -> None:
    """One goes through it, another of the same process does not."""
    with serving() as proxy:
        told = message(alert())
        through = Apprised("ntfy://ntfy.example.ir/metals", proxy=proxy.url)
        direct = Apprised(web.url.replace("http", "ntfy") + "/metals")
        through.send(told.text, told)
        direct.send(told.text, told)
        Webhook("http://hooks.example.ir/x", proxy=proxy.url).send(told.text, told)
        assert [asked.path for asked in proxy.asked] == ["http://ntfy.example.ir/", "http://hooks.example.ir/x"]
    assert len(web.asked) == 1


def test_a_webhook_is_signed_and_can_be_told_from_a_repetition(web: Web) -> None:
    """As Standard Webhooks has it; the alerts are those of the topic, field for field."""
    key = base64.b64encode(b"a key of some length").decode()
    hook = Webhook(f"{web.url}/hook", f"whsec_{key}")
    told = message(alert(1), alert(2))
    hook.send(told.text, told)
    hook.send(told.text, told)
    (_, headers, body, _), (_, again, _, _) = web.asked
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    signature = base64.b64encode(hmac.digest(b"a key of some length", signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"
    assert (
        headers["Idempotency-Key"]
        == headers["webhook-id"]
        == again["Idempotency-Key"]
        == message(alert(2), alert(1)).id
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
    told = message(alert())
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
        "channels.yaml:2: defaults.langauge: unknown key; did you mean language?",
        "channels.yaml:5: channels.plain.url: this is a secret: say {env: NAME}",
        "channels.yaml:6: channels.both: give either url",
        "channels.yaml:7: channels.few.limit: Input should be greater",
        "channels.yaml:16: none: is there twice",
        "channels.none.quiet.too: unknown key; did you mean to?",
        "channels.yaml:11: channels.words.severity[1]: Input should be 'info', 'warning' or 'critical'",
        "channels.yaml:12: channels.words.template: {simbol} is unknown",
        "channels.yaml:13: channels.words.quiet.from: give a time of day",
        "channels.yaml:14: channels.words.address: give an address",
        "channels.yaml:15: channels.a b",
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
        (None, "cannot read the channels"),
        ("", "this is not the channels: such a file has the keys version and channels"),
        ("a: [", "not YAML"),
        ("version: 2\nchannels: {}", "version: 2 is newer than this release reads"),
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
    assert str(error) == "channel desk does not take it: 127.0.0.1 answers 500 Internal Server Error"
    error = CliRunner().invoke(bourse, [*command, "dekc"]).exception
    assert isinstance(error, ConfigurationError)
    assert "there are desk" in str(error)


# --- the consumer -----------------------------------------------------------------------------------------------------


class Phone:
    """A channel that keeps what it gets, or does not take it."""

    def __init__(self) -> None:
        self.got: list[tuple[Text, Message | None]] = []
        self.works = threading.Event()
        self.works.set()

    def send(self, text: Text, message: Message | None = None) -> None:
        if not self.works.is_set():
            raise NotSent("it is switched off")
        self.got.append((text, message))

    def ids(self) -> list[list[str]]:
        return [[each.alert_id for each in message.alerts] for _, message in self.got if message]


class House:
    """The consumer over a stream in memory, with channels that are phones."""

    def __init__(self, memory: Memory, patience: float = 60, **fallback: str) -> None:
        self.memory = memory
        self.phones = {"desk": Phone(), "mail": Phone()}
        self.patience, self.fallback = timedelta(seconds=patience), fallback
        self.consumer = Notify({})
        self.start()

    def start(self) -> None:
        """Begin anew, as after a kill."""
        for delivery in self.consumer._deliveries.values():
            delivery.stop()
        channels = {
            name: Channel(Policy(name, manner=EN), phone, self.fallback.get(name))
            for name, phone in self.phones.items()
        }
        self.consumer = Notify(channels, max_age=None, patience=self.patience)
        self.stream = MemoryStream(self.memory, self.consumer.topics)
        # By the clock of `idle` nothing more of a poll is to be waited for.
        ahead = lambda: datetime.now(UTC) + timedelta(seconds=1)  # noqa: E731
        self.monitor = Monitor("notify")
        self.runner = Runner(
            self.consumer, self.stream, self.memory.decode, name="notify", now=ahead, monitor=self.monitor
        )

    def until(self, wait_for: Callable[..., Any], condition: Callable[[], Any]) -> None:
        def turn() -> Any:
            self.runner.step()
            return condition()

        wait_for(turn)


BOTH = ["desk", "mail"]


def test_a_channel_that_fails_holds_up_no_other(wait_for: Callable[..., Any]) -> None:
    """The offset stays for it, the other goes on; after a kill neither is told twice, and none is left out."""
    memory = Memory()
    house = House(memory)
    house.phones["mail"].works.clear()
    memory.append(alert(1, 1, channels=BOTH))
    house.until(wait_for, lambda: house.phones["desk"].ids() == [["alert-1"]])
    memory.append(alert(2, 2, channels=BOTH))
    house.until(wait_for, lambda: house.phones["desk"].ids() == [["alert-1"], ["alert-2"]])
    house.until(wait_for, lambda: memory.notes.get(ALERTS_0) == '{"desk":2}')
    assert memory.committed[ALERTS_0] == 0
    assert house.monitor.reasons() == {"channel mail": "takes nothing: it is switched off"}
    house.start()
    house.phones["mail"].works.set()
    memory.append(alert(3, 3, channels=BOTH))
    house.until(wait_for, lambda: memory.committed[ALERTS_0] == 3)
    assert house.phones["desk"].ids() == [["alert-1"], ["alert-2"], ["alert-3"]]
    assert [each for told in house.phones["mail"].ids() for each in told] == ["alert-1", "alert-2", "alert-3"]
    assert memory.notes[ALERTS_0] == ""
    assert house.monitor.reasons() == {}


def test_the_next_message_waits_for_the_commit_of_the_last(wait_for: Callable[..., Any]) -> None:
    """Killed at any point, no channel is told more than one message twice."""

    class Watching(Phone):
        def send(self, text: Text, message: Message | None = None) -> None:
            uncommitted.append(len(self.got) - _progress(memory, "desk"))
            super().send(text, message)

    uncommitted: list[int] = []
    memory = Memory()
    memory.append(alert(1, 1))
    house = House(memory)
    house.phones["desk"] = Watching()
    house.start()
    house.until(wait_for, lambda: memory.committed.get(ALERTS_0) == 1)
    memory.append(*[alert(number, number) for number in range(2, 8)])
    house.until(wait_for, lambda: memory.committed[ALERTS_0] == 7)
    assert house.phones["desk"].ids() == [[f"alert-{each}"] for each in range(1, 8)]
    assert uncommitted == [0] * 7


def _progress(memory: Memory, name: str) -> int:
    """Return how many alerts a channel has been told, as far as is committed."""
    noted = json.loads(memory.notes.get(ALERTS_0) or "{}")
    return int(noted.get(name, memory.committed.get(ALERTS_0, 0)))


def test_a_channel_that_fails_for_long_is_given_up_and_told_about_elsewhere(wait_for: Callable[..., Any]) -> None:
    """Dead letters with the record's bytes, a message on another channel, and on with what comes."""
    memory = Memory()
    house = House(memory, patience=0.1, mail="desk")
    house.phones["mail"].works.clear()
    memory.append(alert(1, channels=["mail"]), alert(2, channels=["mail"]))
    house.until(wait_for, lambda: memory.committed.get(ALERTS_0) == 2)
    letters = [emit.event for emit in memory.emitted]
    assert all(isinstance(letter, DeadLetter) for letter in letters)
    for offset, letter in enumerate(letters):
        assert isinstance(letter, DeadLetter)
        assert (letter.reason, letter.stage, letter.consumer) == (Reason.NOTIFICATION_FAILED, Stage.NOTIFY, "notify")
        assert letter.message == "channel mail: it is switched off"
        record = memory.records[ALERTS_0][offset]
        assert record
        assert (letter.original_offset, letter.payload) == (offset, record.value)
    ((text, _),) = house.phones["desk"].got
    assert plain(text.title) == "⚠️ Channel mail takes no messages"
    assert "2 alerts" in plain(text.body)
    assert "it is switched off" in plain(text.body)
    house.phones["mail"].works.set()
    memory.append(alert(3, channels=["mail"]))
    house.until(wait_for, lambda: house.phones["mail"].ids() == [["alert-3"]])


def test_a_rule_that_names_a_channel_there_is_not(wait_for: Callable[..., Any]) -> None:
    """It is got through, and goes where the unnamed go; nothing waits for it."""
    memory = Memory()
    memory.append(alert(1, channels=["dekc"]), alert(2, channels=["desk"]))
    house = House(memory)
    house.until(wait_for, lambda: memory.committed.get(ALERTS_0) == 2)
    assert house.phones["desk"].ids() == [["alert-2"]]


def test_what_others_wrote_beside_the_offset_is_passed_over(wait_for: Callable[..., Any]) -> None:
    """A note that is none of ours is as none."""
    memory = Memory()
    memory.append(alert(1), alert(2))
    memory.committed[ALERTS_0], memory.notes[ALERTS_0] = 1, "{cut off"
    house = House(memory)
    house.until(wait_for, lambda: memory.committed[ALERTS_0] == 2)
    assert house.phones["desk"].ids() == [["alert-2"]]


def test_a_clean_stop_waits_for_what_is_on_its_way(wait_for: Callable[..., Any]) -> None:
    """And commits it: nothing is told twice after a restart."""

    class Slow(Phone):
        def send(self, text: Text, message: Message | None = None) -> None:
            sending.set()
            let_go.wait(10)
            super().send(text, message)

    sending, let_go = threading.Event(), threading.Event()
    memory = Memory()
    memory.append(alert(1))
    house = House(memory)
    house.phones["desk"] = Slow()
    house.start()
    house.until(wait_for, sending.is_set)
    threading.Timer(0.2, let_go.set).start()
    house.runner.stop()
    house.runner.run()
    assert memory.committed[ALERTS_0] == 1
    assert house.phones["desk"].ids() == [["alert-1"]]
