"""What a person reads: alerts as a message in Persian or English.

Persian lines begin with a right-to-left mark, and what runs from left to right in them (times, codes, Latin words) is
isolated, so that each is read in its own direction in every app.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from html import escape
from importlib.resources import files

from persiantools import digits

from bourse_schemas.events import TEHRAN, AlertState, PriceAlert, ResolvedBy, Scope, Severity

LINES = 20
AGED = timedelta(minutes=2)
PRACTICE = timedelta(days=366)  # an alert that is older is of a replayed day: it counts as new
RLM, LRI, FSI, PDI = "\u200f", "\u2066", "\u2068", "\u2069"
MARKS = {Severity.CRITICAL: "🔴", Severity.INFO: "🔵"}  # 🟠 for others
UNITS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds"))
PHRASES = tomllib.loads((files("bourse_consumers.notify") / "phrases.toml").read_text("utf-8"))


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent to a channel at once: a title, lines, and the alerts that they are about."""

    title: str
    lines: Sequence[str]
    alerts: Sequence[PriceAlert]

    @property
    def id(self) -> str:
        """Return the same for the same alerts: a receiver recognizes a message that comes again."""
        return sha256("\n".join(sorted(f"{a.alert_id}-{a.state}" for a in self.alerts)).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes messages in a language: fa or en."""

    language: str = "fa"

    def message(
        self, alerts: Sequence[PriceAlert], now: datetime, digest_above: int = 10, max_age: timedelta = timedelta.max
    ) -> Message:
        """Return alerts, at least one, as one message.

        More than `digest_above` are folded to the last state of each, those that still fire first. Of those older than
        `max_age` only the number is written.
        """
        fresh, old = list[PriceAlert](), list[PriceAlert]()
        for each in alerts:
            (old if max_age < now - each.raised_at < PRACTICE else fresh).append(each)
        if len(fresh) > digest_above:
            fresh = list({each.alert_id: each for each in fresh}.values())
            fresh.sort(key=lambda each: each.raised_at, reverse=True)
        fresh.sort(key=lambda each: "🔴🟠🔵✅".index(_mark(each)))
        parts = [self.say("old", self._digits(len(old)), self._span(max_age)), *self._counts(old)] if old else []
        title = self._title(fresh) if fresh else f"📋 {parts.pop(0)}"
        mark = RLM if self.language == "fa" else ""
        return Message(mark + title, [mark + line for line in (*self._lines(fresh, now), *parts)], alerts)

    def title(self, alert: PriceAlert) -> str:
        """Return which alert it is, and whether it is over."""
        over = "removed" if alert.resolved_by is ResolvedBy.RULE_REMOVED else "ended"
        who = alert.symbol or alert.instrument or ("" if alert.scope is Scope.MARKET else alert.source)
        names = " ".join(_isolated(each) for each in (who, alert.title or alert.rule) if each)
        return f"{_mark(alert)} {self.say(over) if alert.state is AlertState.RESOLVED else ''}{names}"

    def text(self, alert: PriceAlert) -> str:
        """Return the rule's text, in another language if there is no other, or the expression of a rule without."""
        texts = alert.message or {}
        text = texts.get(self.language) or next(iter(texts.values()), "")
        return _isolated(" ".join(text.split())) or self._ltr(alert.when)

    def say(self, phrase: str, *values: str) -> str:
        """Return a phrase with its values."""
        return str(PHRASES[phrase][self.language].format(*values))

    def _title(self, alerts: Sequence[PriceAlert]) -> str:
        if len(alerts) == 1:
            return self.title(alerts[0])
        over = sum(each.state is AlertState.RESOLVED for each in alerts)
        counts = {"firing": len(alerts) - over, "over": over}
        parts = [self.say(phrase, self._digits(count)) for phrase, count in counts.items() if count]
        return f"{_mark(alerts[0])} {self.say('comma').join(parts)}"

    def _lines(self, alerts: Sequence[PriceAlert], now: datetime) -> list[str]:
        lines = []
        for each in alerts[:LINES]:
            age, text = now - each.raised_at, self.text(each)
            at = self._ltr(self._digits(f"{each.raised_at.astimezone(TEHRAN):%H:%M:%S}"))
            ago = [self.say("ago", self._span(age))] if AGED < age < PRACTICE else []
            line = self.say("comma").join((text, at, *ago))
            # Most texts of alerts that fire name the symbol themselves.
            named = each.symbol is not None and each.symbol in text and each.state is not AlertState.RESOLVED
            head = "" if len(alerts) == 1 else f"{_mark(each)} " if named else f"{self.title(each)}: "
            lines.append(head + line)
        more = alerts[LINES:]
        return [*lines, self.say("more", self._digits(len(more))), *self._counts(more)] if more else lines

    def _counts(self, alerts: Sequence[PriceAlert]) -> list[str]:
        counted = Counter(alert.title or alert.rule for alert in alerts).most_common(LINES)
        return [f"{_isolated(rule)}: {self._digits(count)}" for rule, count in counted]

    def _span(self, span: timedelta) -> str:
        seconds = max(int(span.total_seconds()), 1)
        size, unit = next((size, unit) for size, unit in UNITS if seconds >= size)
        return self.say(unit, self._digits(seconds // size))

    def _digits(self, text: object) -> str:
        return str(digits.en_to_fa(str(text))) if self.language == "fa" else str(text)

    def _ltr(self, text: str) -> str:
        return f"{LRI}{text}{PDI}" if self.language == "fa" else text


def _isolated(text: str) -> str:
    return f"{FSI}{text}{PDI}" if text else ""


def _mark(alert: PriceAlert) -> str:
    return "✅" if alert.state is AlertState.RESOLVED else MARKS.get(alert.severity, "🟠")


def split(lines: Sequence[str], most: int) -> list[str]:
    """Return texts of whole lines, none longer than `most` as HTML but for a single line that is longer itself."""
    parts = [""]
    for line in lines:
        longer = f"{parts[-1]}\n{line}" if parts[-1] else line
        if parts[-1] and len(escape(longer).replace("\n", "<br/>")) > most:
            parts.append(line)
        else:
            parts[-1] = longer
    return parts


def example(now: datetime) -> PriceAlert:
    """Return an alert as it might be, raised now."""
    texts = {"fa": "ومعادن در پنج دقیقه ۳٫۲ درصد، اکنون ۵٬۴۸۸", "en": "ومعادن 3.2 % in five minutes, now 5,488"}
    return PriceAlert(
        alert_id="00000000-0000-0000-0000-000000000000", state=AlertState.FIRING, rule="notify-test", title="آزمایش",
        severity=Severity.INFO, scope=Scope.INSTRUMENT, trading_day=now.astimezone(TEHRAN).date(), source="test",
        instrument="IRO1MADN0001", symbol="ومعادن", poll_sequence=1, when="plp >= 3", values={},
        last_price=5488, since=now, raised_at=now, message=texts, labels={}, channels=[],
    )  # fmt: skip
