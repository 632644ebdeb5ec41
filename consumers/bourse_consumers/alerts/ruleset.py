"""Alert rules as people write them: YAML, checked, every mistake named with its line and key."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import string
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from bourse_consumers.alerts.rules import MESSAGE_FIELDS, Change, Crossing, Direction, Match, Rule
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Severity, Unit, tidy

__all__ = ["load"]

PRICES = ("open_price", "high_price", "low_price", "last_price", "closing_price")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours"}


def _duration(value: Any) -> Any:
    found = re.fullmatch(r"(\d+)\s*([smh])", str(value).strip())
    if found is None or not int(found[1]):
        raise ValueError("give a duration such as 30s, 5m or 1h")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _exact(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("give a number")  # pydantic collects ValueErrors only
    return Fraction(str(value))


Duration = Annotated[timedelta, BeforeValidator(_duration)]
Amount = Annotated[Fraction, BeforeValidator(_exact), Field(gt=0)]
Margin = Annotated[Fraction, BeforeValidator(_exact), Field(ge=0)]
SeverityName = Literal["info", "warning", "critical"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class _Match(_Strict):
    instruments: list[Annotated[str, Field(pattern=r"^[A-Z0-9]{12}$")]] | None = None
    symbols: list[str] | None = None
    rights: bool | None = None


class _Resolve(_Strict):
    percent: Margin | None = None
    amount: Margin | None = None

    @model_validator(mode="after")
    def _one(self) -> _Resolve:
        if (self.percent is None) == (self.amount is None):
            raise ValueError("give either percent or amount")
        return self


class _Rule(_Strict):
    sample_reference: ClassVar[int | None] = 1
    name: Annotated[str, Field(min_length=1, max_length=100)]
    match: _Match = _Match()
    price: Literal[PRICES] = "last_price"  # type: ignore[valid-type]  # one list serves people and checker
    direction: Literal["up", "down", "both"] = "both"
    resolve: _Resolve | None = None
    severity: SeverityName | None = None
    labels: dict[str, str] = {}
    notify: list[str] = []
    message: str | None = None

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
            try:
                text.format_map({**MESSAGE_FIELDS, "reference_price": cls.sample_reference})
            except TypeError as error:
                raise ValueError(
                    "reference_price is empty where there was no previous close: leave its format out"
                ) from error
        return text


class _Change(_Rule):
    type: Literal["change"]
    percent: Amount | None = None
    amount: Amount | None = None
    window: Duration

    @model_validator(mode="after")
    def _consistent(self) -> _Change:
        if (self.percent is None) == (self.amount is None):
            raise ValueError("give either percent or amount")
        if self.resolve is not None:
            ours, theirs = self.percent or self.amount, self.resolve.percent
            if (self.percent is None) != (theirs is None):
                raise ValueError("resolve must be in the unit of the rule")
            back = theirs if theirs is not None else self.resolve.amount
            if ours is not None and back is not None and back > ours:
                raise ValueError("resolve must not be above the threshold")
        return self


class _Crossing(_Rule):
    sample_reference: ClassVar[int | None] = None
    type: Literal["crossing"]
    level: Annotated[int, Field(gt=0)]


class _Defaults(_Strict):
    severity: SeverityName = "info"
    notify: list[str] = []
    labels: dict[str, str] = {}


class _File(_Strict):
    version: Literal[1]
    defaults: _Defaults = _Defaults()
    rules: Annotated[list[Annotated[_Change | _Crossing, Field(discriminator="type")]], Field(min_length=1)]

    @model_validator(mode="after")
    def _unique(self) -> _File:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are named {name!r}")
        return self


def load(path: Path) -> list[Rule]:
    """Return the rules of a file; raise ConfigurationError with every mistake: file, line and key."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read the rules {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigurationError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: not a rules file; it begins with `version: 1` and has a list `rules`")
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_mistakes(path, node, error))) from error
    return [_rule(rule, file.defaults) for rule in file.rules]


def _mistakes(path: Path, node: Any, error: ValidationError) -> list[str]:
    lines = []
    for mistake in error.errors():
        # A discriminated rule's own type stands in the location as if it were a key.
        location = [part for part in mistake["loc"] if part not in {"change", "crossing"}]
        line, keys = _line(node, location)
        what = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            what = "unknown key"
            near = difflib.get_close_matches(str(location[-1]), _known_keys(mistake["loc"]), 1)
            what += f"; did you mean {near[0]}?" if near else ""
        elif mistake["type"] == "missing":
            what = "is missing"
        lines.append(f"{path}:{line}: {keys or 'the file'}: {what}")
    return lines


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    models: dict[str, type[_Strict]] = {
        "match": _Match,
        "resolve": _Resolve,
        "defaults": _Defaults,
        "change": _Change,
        "crossing": _Crossing,
    }
    model = next((models[str(part)] for part in reversed(location[:-1]) if str(part) in models), _File)
    return list(model.model_fields)


def _line(node: Any, location: list[int | str]) -> tuple[int, str]:
    """Return the line of what a location names, or of the nearest thing around it, and the location in words."""
    line: int = node.start_mark.line + 1
    words = ""
    for part in location:
        words += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if words else str(part)
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                continue
            line, node = found[0].start_mark.line + 1, found[1]
            continue
        else:
            continue
        line = node.start_mark.line + 1
    return line, words


def _rule(rule: _Change | _Crossing, defaults: _Defaults) -> Rule:
    both = (Direction.UP, Direction.DOWN)
    directions = both if rule.direction == "both" else (Direction[rule.direction.upper()],)
    test: Change | Crossing
    if isinstance(rule, _Change):
        threshold = rule.percent or rule.amount or Fraction()
        given = None
        if rule.resolve is not None:
            given = rule.resolve.percent if rule.resolve.percent is not None else rule.resolve.amount
        test = Change(
            threshold=threshold,
            # Half the threshold, unless told: an alert that ends where it begins flaps.
            resolve=given if given is not None else threshold / 2,
            unit=Unit.PERCENT if rule.percent is not None else Unit.RIAL,
            window=rule.window,
        )
    else:
        margin = Fraction()
        if rule.resolve is not None:
            percent = rule.resolve.percent
            margin = rule.level * percent / 100 if percent is not None else rule.resolve.amount or margin
        test = Crossing(rule.level, margin)
    severity = rule.severity or defaults.severity
    labels, channels = {**defaults.labels, **rule.labels}, rule.notify or defaults.notify
    symbols = rule.match.symbols
    match = Match(
        None if rule.match.instruments is None else frozenset(rule.match.instruments),
        None if symbols is None else frozenset(tidy(symbol) for symbol in symbols),
        rule.match.rights,
    )
    normal = [
        rule.name,
        rule.type,
        rule.price,
        rule.direction,
        str(test),
        sorted(match.instruments or ()),
        sorted(match.symbols or ()),
        match.rights,
        severity,
        sorted(labels.items()),
        channels,
        rule.message,
    ]
    version = hashlib.sha256(json.dumps(normal, ensure_ascii=False).encode()).hexdigest()[:12]
    return Rule(
        name=rule.name,
        version=version,
        test=test,
        directions=directions,
        match=match,
        price=rule.price,
        severity=Severity[severity.upper()],
        labels=labels,
        channels=channels,
        message=rule.message,
    )
