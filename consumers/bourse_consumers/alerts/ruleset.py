"""Alert rules as people write them: YAML, checked, every mistake named with its line and key."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from difflib import get_close_matches
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from bourse_consumers.alerts.rules import (
    MESSAGE_FIELDS,
    PRICES,
    Band,
    Cancelled,
    Change,
    Crossing,
    Direction,
    Feed,
    Match,
    Quiet,
    Rule,
    Test,
    Traded,
    fill,
)
from bourse_consumers.yaml_file import Strict, explain, open_file, place
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import AlertKind, FeedState, Severity, Unit, tidy

__all__ = ["load", "schema", "strangers"]

UNITS = {"s": "seconds", "m": "minutes", "h": "hours"}
DAY = timedelta(days=1)
MOST = 1 << 62  # as what it is compared with; nor is NaN below it
CODE = r"^[A-Z0-9]{12}$"


def _duration(value: Any) -> Any:
    found = re.fullmatch(r"(\d+)\s*([smh])", str(value).strip())
    if found is None or not int(found[1][:9]):
        raise ValueError("give a duration such as 30s, 5m or 1h")
    if len(found[1]) > 9 or (span := timedelta(**{UNITS[found[2]]: int(found[1])})) >= DAY:
        raise ValueError("can never be over: everything ends with its trading day; give less than 24h")
    return span


def _exact(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST < value < MOST:
        raise ValueError("give a number")  # pydantic collects ValueErrors only
    return Fraction(str(value))


def _hours(value: Any) -> Any:
    found = re.fullmatch(r"(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)", str(value).strip())
    if found is None:
        raise ValueError("give hours of Tehran such as 09:00-12:30")
    numbers = [int(group) for group in found.groups()]
    begin, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
    if numbers[1] > 59 or numbers[3] > 59 or end > 24 * 60:
        raise ValueError("give hours of Tehran such as 09:00-12:30")
    if begin >= end:
        raise ValueError("never holds: the end must come after the begin")
    return begin, end


def _names(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError("give a list of texts, at least one; quote what YAML reads as something else")
    return value


def _schema(**said: Any) -> WithJsonSchema:
    return WithJsonSchema(said)


Duration = Annotated[timedelta, BeforeValidator(_duration), _schema(type="string", pattern=r"^\d+\s*[smh]$")]
Amount = Annotated[
    Fraction, BeforeValidator(_exact), Field(gt=0), _schema(type="number", exclusiveMinimum=0)
]  # fmt: skip
Margin = Annotated[Fraction, BeforeValidator(_exact), Field(ge=0), _schema(type="number", minimum=0)]
Hours = Annotated[
    tuple[int, int], BeforeValidator(_hours), _schema(type="string", pattern=r"^\d{1,2}:\d\d\s*-\s*\d{1,2}:\d\d$")
]
Names = Annotated[list[str], BeforeValidator(_names)]
Price = Annotated[int, Field(gt=0, lt=MOST, strict=True)]
SeverityName = Literal["info", "warning", "critical"]
Label = Annotated[dict[str, str], Field()]


class _Match(Strict):
    """Which instruments: any of what is named here; all where nothing is."""

    instruments: Names | None = None
    symbols: Names | None = None
    patterns: Names | None = None
    lists: Names | None = None
    rights: bool | None = None

    @field_validator("instruments")
    @classmethod
    def _codes(cls, codes: list[str] | None) -> list[str] | None:
        for code in codes or ():
            if not re.match(CODE, code):
                raise ValueError(f"{code!r} is no code: 12 of A-Z and 0-9; symbols stand under `symbols`")
        return codes


class _Resolve(Strict):
    """Below what, or how far back, an episode is over."""

    percent: Margin | None = None
    amount: Margin | None = None


class _Any(Strict):
    severity: SeverityName | None = None
    labels: Label = Field(default_factory=dict)
    notify: list[str] | None = None
    message: str | None = None
    hold: Duration | None = Field(None, alias="for")
    keep_firing_for: Duration | None = None
    cooldown: Duration | None = None
    once: bool | None = None
    active: Hours | None = None

    @field_validator("message")
    @classmethod
    def _known_fields(cls, text: str | None) -> str | None:
        if text is not None:
            for _, name, form, _ in string.Formatter().parse(text):
                if name is not None and name not in MESSAGE_FIELDS:
                    raise ValueError(f"{{{name}}} is unknown; there are {', '.join(sorted(MESSAGE_FIELDS))}")
                if "{" in (form or ""):
                    raise ValueError(f"{{{name}:{form}}}: a format must not hold another field")
            # With values of the kinds they will have: a template must not fail when the alert comes.
            fill(text, MESSAGE_FIELDS)
        return text


class _Defaults(_Any):
    resolve: _Resolve | None = None


Wrong = Iterator[tuple[str, str]]


class _Rule(_Any):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    match: _Match = _Match()

    def wrong(self) -> Wrong:
        """Yield what no single value shows: a key and what is wrong with it."""
        yield from ()

    def test(self, default: _Resolve | None) -> Test:
        """Return what is tested; a default that fits no rule of this type is left out."""
        raise NotImplementedError


def _one(rule: BaseModel, *keys: str) -> Wrong:
    given = [key for key in keys if getattr(rule, key) is not None]
    if len(given) != 1:
        yield given[-1] if given else keys[0], f"give {'either ' if len(keys) > 1 else ''}{' or '.join(keys)}"


class _Priced(_Rule):
    price: Literal[PRICES] = "last_price"  # type: ignore[valid-type]  # one list serves people and checker
    resolve: _Resolve | None = None


class _Directed(_Priced):
    direction: Literal["up", "down", "both"] = "both"


class _Change(_Directed):
    type: Literal["change"]
    percent: Amount | None = None
    amount: Amount | None = None
    window: Duration | None = None
    since: Literal["open", "previous_close", "last_alert"] | None = None

    def wrong(self) -> Wrong:
        yield from _one(self, "percent", "amount")
        yield from _one(self, "window", "since")
        if self.percent is not None and self.direction == "down" and self.percent > 100:
            yield "percent", "can never hold: no price falls by more than 100 %"
        threshold = self.percent if self.percent is not None else self.amount
        if self.since == "last_alert":
            for key, alias in (("resolve", "resolve"), ("keep_firing_for", "keep_firing_for")):
                if getattr(self, key) is not None:
                    yield alias, "does nothing here: since the last alert an episode is over with the next event"
        elif self.resolve is not None:
            ours, theirs = ("percent", "amount") if self.percent is not None else ("amount", "percent")
            back = getattr(self.resolve, ours)
            if getattr(self.resolve, theirs) is not None or back is None:
                yield "resolve", f"resolve must be in the unit of the rule: give {ours}"
            elif threshold is not None and back > threshold:
                yield "resolve", "resolve must not be above the threshold: it would be over where it begins"

    def test(self, default: _Resolve | None) -> Test:
        unit = "percent" if self.percent is not None else "amount"
        threshold = cast("Fraction", getattr(self, unit))
        back = getattr(self.resolve or default, unit, None)
        # Half the threshold, unless told: an alert that ends where it begins flaps.
        resolve = threshold / 2 if back is None or back > threshold else back
        since = cast("Any", self.window or self.since)
        return Change(threshold, resolve, Unit.PERCENT if unit == "percent" else Unit.RIAL, since)


def _margin(resolve: _Resolve | None, of: int) -> Fraction:
    if resolve is None:
        return Fraction()
    return of * resolve.percent / 100 if resolve.percent is not None else resolve.amount or Fraction()


class _Crossing(_Directed):
    type: Literal["crossing"]
    level: Price

    def wrong(self) -> Wrong:
        if self.resolve is not None:
            for key, what in _one(self.resolve, "percent", "amount"):
                yield f"resolve.{key}", what
            if self.direction != "down" and _margin(self.resolve, self.level) >= self.level:
                yield "resolve", "never resolves: that far below the level there is no price"

    def test(self, default: _Resolve | None) -> Test:
        return Crossing(self.level, _margin(self.resolve or default, self.level))


class _Band(_Priced):
    type: Literal["band"]
    low: Annotated[int, Field(ge=0, strict=True)]
    high: Price
    side: Literal["outside", "inside"] = "outside"

    def wrong(self) -> Wrong:
        if self.low > self.high:
            yield "low", f"{'always' if self.side == 'outside' else 'never'} holds: low is above high"
        if self.resolve is not None:
            for key, what in _one(self.resolve, "percent", "amount"):
                yield f"resolve.{key}", what
            if self.side == "outside" and 2 * _margin(self.resolve, self.high) > self.high - self.low:
                yield "resolve", "never resolves: the band is narrower than twice that"

    def test(self, default: _Resolve | None) -> Test:
        margin = _margin(self.resolve or default, self.high)
        if self.resolve is None and 2 * margin > self.high - self.low:
            margin = Fraction()
        return Band(self.low, self.high, self.side == "outside", margin)


class _Traded(_Rule):
    times: Amount | None = None
    window: Duration | None = None
    resolve: _Resolve | None = None

    def unit(self) -> str:
        return "shares" if "shares" in type(self).model_fields else "rial"

    def wrong(self) -> Wrong:
        yield from _one(self, self.unit(), "times")
        if self.times is not None and self.window is None:
            yield "window", "is missing: a multiple of its pace is taken within a window"
        if self.resolve is not None and (self.resolve.percent is None or self.resolve.amount is not None):
            yield "resolve", "give percent: of the threshold"
        elif self.resolve is not None and cast("Fraction", self.resolve.percent) > 100:
            yield "resolve.percent", "resolve must not be above the threshold: it would be over where it begins"

    def test(self, default: _Resolve | None) -> Test:  # noqa: ARG002  # percent means something else here
        given = getattr(self, self.unit())
        threshold = cast("Fraction", self.times if given is None else given)
        share = self.resolve.percent if self.resolve and self.resolve.percent is not None else Fraction(100)
        kind = AlertKind.VOLUME if self.unit() == "shares" else AlertKind.VALUE
        return Traded(kind, threshold, threshold * share / 100, self.times is not None, self.window)


class _Volume(_Traded):
    type: Literal["volume"]
    shares: Price | None = None


class _Value(_Traded):
    type: Literal["value"]
    rial: Price | None = None


class _Cancelled(_Rule):
    type: Literal["cancelled"]
    shares: Price | None = None
    rial: Price | None = None
    trades: Price | None = None

    def wrong(self) -> Wrong:
        yield from _one(self, "shares", "rial", "trades")
        if self.hold is not None:
            yield "for", "can never hold: an annulment is of a moment"

    def test(self, default: _Resolve | None) -> Test:  # noqa: ARG002
        units = (self.shares, Unit.SHARES), (self.rial, Unit.RIAL), (self.trades, Unit.COUNT)
        return next(Cancelled(size, unit) for size, unit in units if size is not None)


class _Quiet(_Rule):
    type: Literal["quiet"]
    after: Duration

    def test(self, default: _Resolve | None) -> Test:  # noqa: ARG002
        return Quiet(self.after)


class _Feed(_Any):
    type: Literal["feed"]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    states: (
        Annotated[list[Literal["FRESH", "STALE", "FROZEN", "PARTIAL", "DOWN", "IDLE"]], Field(min_length=1)] | None
    ) = None
    silent: Duration | None = None

    def wrong(self) -> Wrong:
        yield from _one(self, "states", "silent")
        if len(set(self.states or ())) == 6:
            yield "states", "always holds: that is every state there is"
        if self.silent is not None and self.hold is not None:
            yield "for", "does nothing here: silence has its own time"

    def test(self, default: _Resolve | None) -> Test:  # noqa: ARG002
        return Feed(frozenset(map(FeedState, self.states or ())), self.silent)


AnyRule = _Change | _Crossing | _Band | _Volume | _Value | _Cancelled | _Quiet | _Feed
TYPES: dict[str, type[AnyRule]] = {
    get_args(model.model_fields["type"].annotation)[0]: model for model in get_args(AnyRule)
}


class _File(Strict):
    version: Literal[1]
    defaults: _Defaults = Field(default_factory=lambda: _Defaults.model_validate({}))
    rules: Annotated[list[Annotated[AnyRule, Field(discriminator="type")]], Field(min_length=1)]


class _Head(Strict):
    version: Literal[1]
    defaults: _Defaults = Field(default_factory=lambda: _Defaults.model_validate({}))
    rules: Annotated[list[Any], Field(min_length=1)]


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a rules file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_File.model_json_schema(by_alias=True)}


def load(path: Path, channels: Collection[str] | None = None) -> list[Rule]:
    """Return the rules of a file; raise ConfigurationError with every mistake: file, line and key.

    With `channels`, a rule that notifies any other is a mistake.
    """
    node, data, twice = open_file(path, "the rules", "`version: 1` and a list `rules`")
    mistakes = [(0, each) for each in twice]

    def mistake(location: Sequence[int | str], what: str) -> None:
        line, keys = place(node, location)
        mistakes.append((line, f"{path}:{line}: {keys or 'the file'}: {what}"))

    head: _Head | None = None
    try:
        head = _Head.model_validate(data)
    except ValidationError as error:
        for location, what in explain(error, _Head):
            mistake(location, what)
    read: list[tuple[int, AnyRule]] = []
    raw = data.get("rules")
    names: dict[Any, int] = {}
    for number, each in enumerate(raw if isinstance(raw, list) else ()):
        at: tuple[int | str, ...] = ("rules", number)
        if not isinstance(each, dict):
            mistake(at, "a rule is a mapping of keys, such as {name: …, type: …}")
            continue
        if isinstance(name := each.get("name"), str) and names.setdefault(name, number) != number:
            mistake((*at, "name"), f"two rules are named {name!r}")
        kind = str(each.get("type"))
        if kind not in TYPES:
            near = get_close_matches(kind, TYPES, 1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(TYPES)}"
            mistake((*at, "type"), f"no type {kind!r}; {known}" if "type" in each else f"is missing; {known}")
            continue
        try:
            rule = TYPES[kind].model_validate(each)
        except ValidationError as error:
            for location, what in explain(error, TYPES[kind]):
                mistake((*at, *location), what)
            continue
        for key, what in rule.wrong():
            mistake((*at, *key.split(".")), what)
        read.append((number, rule))
    if channels is not None:
        for at, owner in [(("defaults",), head and head.defaults), *((("rules", n), rule) for n, rule in read)]:
            for channel in (owner and owner.notify) or ():
                if channel not in channels:
                    near = get_close_matches(str(channel), channels, 1)
                    known = f"did you mean {near[0]}?" if near else f"there are {', '.join(channels) or 'none'}"
                    mistake((*at, "notify"), f"no channel {channel!r}; {known}")
    rules: list[Rule] = []
    if head is not None and not mistakes:
        for number, rule in read:
            try:
                rules.append(_rule(rule, head.defaults, path.parent))
            except ValueError as error:
                mistake(("rules", number, "match", "lists"), str(error))
    if mistakes:
        raise ConfigurationError("\n".join(dict.fromkeys(text for _, text in sorted(mistakes))))
    return rules


def _listed(folder: Path, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        try:
            lines = (folder / name).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the list {name}: {getattr(error, 'strerror', None) or error}") from error
        found = [text for line in lines if (text := line.partition("#")[0].strip())]
        if not found:
            raise ValueError(f"the list {name} names nothing: the rule could never match")
        yield from found


def _rule(rule: AnyRule, defaults: _Defaults, folder: Path) -> Rule:
    def given(key: str) -> Any:
        own = getattr(rule, key)
        return getattr(defaults, key) if own is None else own

    found = getattr(rule, "match", _Match())
    listed = list(_listed(folder, found.lists or ()))
    codes = {each for each in listed if re.match(CODE, each)}
    match = Match(
        frozenset([*(found.instruments or ()), *codes]),
        frozenset(tidy(symbol) for symbol in (*(found.symbols or ()), *listed) if symbol not in codes),
        tuple(sorted(tidy(pattern) for pattern in found.patterns or ())),
        found.rights,
    )
    direction = getattr(rule, "direction", "none")
    directions = (Direction.UP, Direction.DOWN) if direction == "both" else (Direction[direction.upper()],)
    # What cannot be held for, silence and annulments, takes no default either.
    momentary = isinstance(rule, _Cancelled) or (isinstance(rule, _Feed) and rule.silent is not None)
    none = timedelta()
    made = partial(
        Rule,
        name=rule.name,
        test=rule.test(defaults.resolve),
        directions=directions,
        match=match,
        price=getattr(rule, "price", "last_price"),
        hold=(None if momentary else given("hold")) or none,
        keep=(None if getattr(rule, "since", None) == "last_alert" else given("keep_firing_for")) or none,
        cooldown=given("cooldown") or none,
        once=bool(given("once")),
        active=given("active"),
        severity=Severity[(given("severity") or "info").upper()],
        labels={**defaults.labels, **rule.labels},
        channels=given("notify") or [],
        message=given("message"),
    )
    said = {key: _normal(value) for key, value in made.keywords.items()}
    text = json.dumps([rule.type, said], ensure_ascii=False, sort_keys=True)
    return made(version=hashlib.sha256(text.encode()).hexdigest()[:12])


def _normal(value: Any) -> Any:
    """Return a value such that equal ones look the same: the version of a rule must not hang on the order of a set."""
    if isinstance(value, frozenset):
        return sorted(map(str, value))
    if hasattr(value, "__dataclass_fields__"):
        return {name: _normal(getattr(value, name)) for name in value.__dataclass_fields__}
    return value if isinstance(value, dict | list) else str(value)


def strangers(rules: Iterable[Rule], known: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield the rules that are about nothing that is known, and why: `known` are events or candles."""
    instruments = {(each.instrument, each.symbol, each.is_right): each for each in known}
    symbols = sorted({symbol for _, symbol, _ in instruments})
    codes = {code for code, _, _ in instruments}
    for rule in rules:
        match = rule.match
        if isinstance(rule.test, Feed) or not instruments:
            continue
        for text in sorted((match.symbols - set(symbols)) | (match.instruments - codes)):
            near = get_close_matches(text, symbols if text in match.symbols else sorted(codes), 1, 0.5)
            yield rule.name, f"no instrument {text}" + (f"; did you mean {near[0]}?" if near else "")
        if not any(match(each) for each in instruments.values()) and not (match.symbols or match.instruments):
            yield rule.name, "matches no instrument"
