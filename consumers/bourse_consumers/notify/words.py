"""What a person reads: alerts in Persian or English, in the digits and the calendar of the channel.

Persian lines begin with a right-to-left mark, and what runs from left to right in them (numbers with a sign, times,
Latin words) stands between isolates, so that each is read in its own direction, whatever the app takes a line for.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from persiantools import digits
from persiantools.jdatetime import JalaliDate

from bourse_schemas.events import TEHRAN, AlertState, PriceAlert, ResolvedBy, Scope, Severity

__all__ = [
    "TEHRAN",
    "TEMPLATE_FIELDS",
    "Manner",
    "Text",
    "digest",
    "example",
    "group",
    "sample",
    "stale",
    "template_mistake",
    "trouble",
]

LINES, RULES = 20, 10
RLM, LRI, FSI, PDI = "\u200f", "\u2066", "\u2068", "\u2069"
MARKS = {Severity.CRITICAL: "🔴", Severity.WARNING: "🟠", Severity.INFO: "🔵"}
RESOLVED, SUMMARY, TROUBLE, SAMPLE = "✅", "📋", "⚠️", "👋"
# How urgent: an unknown severity, of a later release, is taken for a warning.
RANKS = {Severity.CRITICAL: 2, Severity.WARNING: 1, Severity.UNKNOWN: 1, Severity.INFO: 0}

FA = {
    "alerts": "{} هشدار",
    "ended": "{} پایان‌یافته",
    "over": "پایان: ",
    "removed": "پایان (قاعده برداشته شد): ",
    "day_end": "پایان روز: ",
    "more": "… و {} مورد دیگر",
    "digest": "خلاصهٔ {} هشدار",
    "stale": "{} هشدار قدیمی فرستاده نشد",
    "stale_why": "از هر یک هنگام خواندن بیش از {} گذشته بود.",
    "trouble": "کانال {} پیام نمی‌گیرد",
    "trouble_why": "{} هشدار به آن نرسید و به bourse.dead-letters رفت. علت: {}",
    "sample": "پیام آزمایشی کانال {}",
    "sample_why": "اگر این را می‌خوانید، هشدارها هم می‌رسند. نمونه:",
    "from_to": "از {} تا {}",
    "comma": "، ",
    "hour": "{} ساعت",
    "minute": "{} دقیقه",
    "second": "{} ثانیه",
}
EN = {
    "alerts": "{} alerts",
    "ended": "{} over",
    "over": "over: ",
    "removed": "over (the rule was removed): ",
    "day_end": "over with the day: ",
    "more": "… and {} more",
    "digest": "{} alerts in short",
    "stale": "{} old alerts were not sent",
    "stale_why": "Each was older than {} when it was read.",
    "trouble": "Channel {} takes no messages",
    "trouble_why": "{} alerts did not get there and went to bourse.dead-letters. Why: {}",
    "sample": "A sample on channel {}",
    "sample_why": "If you can read this, alerts will arrive too. One of them:",
    "from_to": "{} to {}",
    "comma": ", ",
    "hour": "{} h",
    "minute": "{} min",
    "second": "{} s",
}


class Text(NamedTuple):
    """A message's title, of one line, and its body."""

    title: str
    body: str


@dataclass(frozen=True, slots=True)
class Manner:
    """How a channel's messages are written; `template` is an alert's line, with fields as `TEMPLATE_FIELDS` has."""

    language: Literal["fa", "en"] = "fa"
    digits: Literal["fa", "en"] = "fa"
    calendar: Literal["jalali", "gregorian"] = "jalali"
    template: str | None = None

    @property
    def words(self) -> Mapping[str, str]:
        """Return the phrases of the language."""
        return FA if self.language == "fa" else EN

    def say(self, phrase: str, *values: str) -> str:
        """Return a phrase with its values."""
        return self.words[phrase].format(*values)

    def number(self, value: float, *, sign: bool = False) -> str:
        """Return a number with separators, of at most two decimals; Persian ones are isolated."""
        text = f"{value:{'+' if sign else ''},.2f}"
        return self.ltr(self._digits(text.rstrip("0").rstrip(".")))

    def moment(self, at: datetime) -> str:
        """Return the time in Tehran."""
        return self.ltr(self._digits(f"{at.astimezone(TEHRAN):%H:%M:%S}", number=False))

    def day(self, at: datetime) -> str:
        """Return the day in Tehran."""
        local = at.astimezone(TEHRAN)
        if self.calendar == "jalali":
            jalali: JalaliDate = JalaliDate.to_jalali(local.date())  # type: ignore[no-untyped-call]
            return self.ltr(self._digits(f"{jalali.year}/{jalali.month:02}/{jalali.day:02}", number=False))
        return self.ltr(self._digits(f"{local:%Y-%m-%d}", number=False))

    def span(self, span: timedelta) -> str:
        """Return how long something is, in its largest whole unit."""
        seconds = int(span.total_seconds())
        for size, unit in ((3600, "hour"), (60, "minute")):
            if seconds >= size and seconds % size == 0:
                return self.say(unit, self.number(seconds // size))
        return self.say("second", self.number(seconds))

    def ltr(self, text: str) -> str:
        """Return text that runs from left to right, safe in a Persian line."""
        return f"{LRI}{text}{PDI}" if self.language == "fa" else text

    def any(self, text: str) -> str:
        """Return text of either direction, safe in a line of the other."""
        return f"{FSI}{text}{PDI}" if text else ""

    def lines(self, *lines: str) -> str:
        """Return lines as one text, each of which runs as the language does."""
        return "\n".join(RLM + line if self.language == "fa" and line else line for line in lines)

    def _digits(self, text: str, *, number: bool = True) -> str:
        if self.digits == "en":
            return text
        if number:
            text = text.replace(",", "٬").replace(".", "٫").replace("%", "٪")
        return str(digits.en_to_fa(text))


TEMPLATE_FIELDS = (
    "mark",
    "state",
    "rule",
    "title",
    "severity",
    "when",
    "instrument",
    "symbol",
    "instrument_title",
    "message",
    "price",
    "time",
    "day",
)


def template_mistake(template: str) -> str | None:
    """Return what is wrong with a template, None where nothing is. All its fields are text."""
    try:
        for _, name, form, conversion in string.Formatter().parse(template):
            if name is not None and name not in TEMPLATE_FIELDS:
                return f"{{{name}}} is unknown; there are {', '.join(TEMPLATE_FIELDS)}"
            if form or conversion:
                return f"{{{name}}}: values are text already; leave the format out"
    except ValueError as error:
        return str(error)
    return None


def _fields(alert: PriceAlert, manner: Manner) -> dict[str, str]:
    texts = alert.message or {}
    message = texts.get(manner.language) or next(iter(texts.values()), "")
    return {
        "mark": RESOLVED if alert.state is AlertState.RESOLVED else MARKS.get(alert.severity, "🟠"),
        "state": alert.state.value,
        "rule": manner.any(alert.rule),
        "title": manner.any(alert.title or alert.rule),
        "severity": alert.severity.value,
        "when": manner.ltr(alert.when),
        "instrument": manner.ltr(alert.instrument or ""),
        "symbol": manner.any(alert.symbol or alert.instrument or alert.source),
        "instrument_title": manner.any(alert.instrument_title or ""),
        "message": manner.any(message),
        "price": "" if alert.last_price is None else manner.number(alert.last_price),
        "time": manner.moment(alert.raised_at),
        "day": manner.day(alert.raised_at),
    }


def _head(alert: PriceAlert, manner: Manner) -> str:
    """Return which alert it is, in few words."""
    value = _fields(alert, manner)
    ends = {ResolvedBy.RULE_REMOVED: "removed", ResolvedBy.DAY_END: "day_end"}
    over = "" if alert.state is not AlertState.RESOLVED else manner.words[ends.get(alert.resolved_by, "over")]  # type: ignore[arg-type]
    return f"{value['mark']} {over}{value['symbol']} {value['title']}"


def _said(alert: PriceAlert, manner: Manner) -> str:
    """Return the rule's text, filled in, or else its expression, and the time."""
    value = _fields(alert, manner)
    text = " ".join((value["message"] or value["when"]).split("\n"))
    return manner.words["comma"].join((text, value["time"]))


def _line(alert: PriceAlert, manner: Manner) -> str:
    """Return an alert in a line: by the channel's template, where it has one."""
    if manner.template is not None:
        return " ".join(manner.template.format_map(_fields(alert, manner)).split("\n"))
    return f"{_head(alert, manner)}: {_said(alert, manner)}"


def _urgent_first(alerts: Sequence[PriceAlert]) -> list[PriceAlert]:
    return sorted(alerts, key=lambda each: (each.state is AlertState.RESOLVED, -RANKS[each.severity]))


def _counts(alerts: Sequence[PriceAlert], manner: Manner) -> list[str]:
    """Return a line per rule with how many of its alerts there are, the noisiest first."""
    counted = Counter(alert.rule for alert in alerts).most_common()
    lines = [f"{manner.any(rule)}: {manner.number(count)}" for rule, count in counted[:RULES]]
    left = sum(count for _, count in counted[RULES:])
    return [*lines, manner.say("more", manner.number(left))] if left else lines


def _listed(alerts: Sequence[PriceAlert], manner: Manner, most: int) -> list[str]:
    lines = [_line(alert, manner) for alert in alerts[:most]]
    return [*lines, manner.say("more", manner.number(len(alerts) - most))] if len(alerts) > most else lines


def _period(alerts: Sequence[PriceAlert], manner: Manner) -> str:
    begin, end = (pick(alert.raised_at for alert in alerts) for pick in (min, max))
    return manner.say(
        "from_to", f"{manner.day(begin)} {manner.moment(begin)}", f"{manner.day(end)} {manner.moment(end)}"
    )


def group(alerts: Sequence[PriceAlert], manner: Manner) -> Text:
    """Return the message about alerts of one poll, at least one."""
    ordered = _urgent_first(alerts)
    first = _fields(ordered[0], manner)
    if len(alerts) == 1:
        said = _said(ordered[0], manner) if manner.template is None else _line(ordered[0], manner)
        return Text(manner.lines(_head(ordered[0], manner)), manner.lines(said, first["day"]))
    ended = sum(alert.state is AlertState.RESOLVED for alert in alerts)
    fired = len(alerts) - ended
    parts = [manner.say("alerts", manner.number(fired))] if fired else []
    parts += [manner.say("ended", manner.number(ended))] if ended else []
    title = f"{first['mark']} " + manner.words["comma"].join(parts)
    lines = _listed(ordered, manner, LINES)
    if len(alerts) > LINES:
        lines += ["", *_counts(alerts, manner)]
    return Text(manner.lines(title), manner.lines(*lines, first["day"]))


def digest(alerts: Sequence[PriceAlert], manner: Manner) -> Text:
    """Return the message about alerts that had to wait: how many of each rule, and the most urgent of the latest."""
    title = f"{SUMMARY} " + manner.say("digest", manner.number(len(alerts)))
    latest = _urgent_first(sorted(alerts, key=lambda alert: alert.raised_at, reverse=True))
    lines = [_period(alerts, manner), *_counts(alerts, manner), "", *_listed(latest, manner, RULES)]
    return Text(manner.lines(title), manner.lines(*lines))


def stale(alerts: Sequence[PriceAlert], manner: Manner, max_age: timedelta) -> Text:
    """Return the message about alerts that are too old to be told one by one."""
    title = f"{SUMMARY} " + manner.say("stale", manner.number(len(alerts)))
    why = manner.say("stale_why", manner.span(max_age))
    return Text(manner.lines(title), manner.lines(why, _period(alerts, manner), *_counts(alerts, manner)))


def trouble(channel: str, count: int, why: str, manner: Manner) -> Text:
    """Return the message about another channel that does not take its messages."""
    title = f"{TROUBLE} " + manner.say("trouble", manner.any(channel))
    return Text(manner.lines(title), manner.lines(manner.say("trouble_why", manner.number(count), manner.any(why))))


def sample(channel: str, alert: PriceAlert, manner: Manner) -> Text:
    """Return the message of `bourse notify test`."""
    title = f"{SAMPLE} " + manner.say("sample", manner.any(channel))
    return Text(
        manner.lines(title), manner.lines(manner.words["sample_why"], _line(alert, manner), manner.day(alert.raised_at))
    )


def example(now: datetime) -> PriceAlert:
    """Return an alert as it might be, raised now."""
    return PriceAlert(
        alert_id="00000000-0000-0000-0000-000000000000",
        state=AlertState.FIRING,
        rule="fast-move",
        title="تغییر سریع",
        severity=Severity.INFO,
        scope=Scope.INSTRUMENT,
        trading_day=now.astimezone(TEHRAN).date(),
        source="sample",
        instrument="IRO1MADN0001",
        symbol="ومعادن",
        instrument_title="سرمایه گذاری توسعه معادن و فلزات",
        poll_sequence=1,
        when="abs(percent(last_price, 5m)) >= 3",
        values={"abs(percent(last_price, 5m))": 3.2},
        last_price=5488,
        since=now,
        raised_at=now,
        message={"fa": "۳٫۲ درصد در پنج دقیقه، اکنون ۵٬۴۸۸", "en": "3.2 % in five minutes, now 5,488"},
        labels={},
        channels=[],
    )
