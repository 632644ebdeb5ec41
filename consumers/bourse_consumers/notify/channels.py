"""The channels as people write them: YAML, checked, every mistake named with its line and key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from bourse_consumers.notify.policy import Policy, Quiet
from bourse_consumers.notify.sending import Apprised, Sender, Webhook, require_address
from bourse_consumers.notify.words import Manner, template_mistake
from bourse_consumers.yaml_file import Strict, place, read
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Severity

__all__ = ["Channel", "load"]

MOST_CHANNELS = 32  # each has a Kafka client and a thread
ORDER = ("info", "warning", "critical")
SeverityName = Literal["info", "warning", "critical"]


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel: what it is told, the way to it, and where its failures are told."""

    policy: Policy
    sender: Sender = field(repr=False)
    fallback: str | None = None


def _clock(value: Any) -> Any:
    # YAML 1.1 reads 21:30 as so many minutes.
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 24 * 60:
        return time(value // 60, value % 60)
    found = re.fullmatch(r"(\d{1,2}):(\d\d)", str(value))
    if found is None or int(found[1]) > 23 or int(found[2]) > 59:
        raise ValueError("give a time of day such as 07:30")
    return time(int(found[1]), int(found[2]))


def _values(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _at_least(value: Any) -> Any:
    # One severity means that and whatever is more urgent, a list just what it says.
    return list(ORDER[ORDER.index(value) :]) if value in ORDER else _values(value)


class _Secret(Strict):
    """Where a secret is: a variable of the environment, or a file (beside this one, where it is no absolute path)."""

    env: Annotated[str, Field(min_length=1)] | None = None
    file: Annotated[str, Field(min_length=1)] | None = None
    clear: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _pointed_to(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("this is a secret: say {env: NAME} or {file: PATH}, or {clear: …} if all may read it")
        return value

    @model_validator(mode="after")
    def _one(self) -> _Secret:
        if sum(each is not None for each in (self.env, self.file, self.clear)) != 1:
            raise ValueError("give one of env, file and clear")
        return self

    def read(self, folder: Path, environment: Mapping[str, str]) -> str:
        """Return the secret; raise ValueError that says where it is not."""
        if self.clear is not None:
            return self.clear
        if self.env is not None:
            if not (found := environment.get(self.env, "").strip()):
                raise ValueError(f"the environment has no {self.env}")
            return found
        path = folder / (self.file or "")
        try:
            found = path.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
            ) from None
        if not found:
            raise ValueError(f"{path} is empty")
        return found


class _Quiet(Strict):
    start: Annotated[time, BeforeValidator(_clock), Field(alias="from")]
    end: Annotated[time, BeforeValidator(_clock), Field(alias="to")]
    then: Literal["digest", "drop"] = "digest"

    @model_validator(mode="after")
    def _some(self) -> _Quiet:
        if self.start == self.end:
            raise ValueError("from and to are the same: nothing would ever be sent, or always")
        return self


class _Manners(Strict):
    language: Literal["fa", "en"] | None = None
    digits: Literal["fa", "en"] | None = None
    calendar: Literal["jalali", "gregorian"] | None = None
    template: str | None = None
    alerts: Literal["named", "unnamed", "all"] | None = None
    severity: Annotated[list[SeverityName], BeforeValidator(_at_least), Field(min_length=1)] | None = None
    labels: dict[str, Annotated[list[str], BeforeValidator(_values), Field(min_length=1)]] | None = None
    resolved: bool | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] | None = None
    quiet: _Quiet | None = None
    proxy: _Secret | None = None
    fallback: str | None = None

    @field_validator("template")
    @classmethod
    def _good_template(cls, template: str | None) -> str | None:
        if template is not None and (mistake := template_mistake(template)):
            raise ValueError(mistake)
        return template


class _Channel(_Manners):
    url: _Secret | None = None
    webhook: _Secret | None = None
    key: _Secret | None = None
    address: str | None = None

    @field_validator("address")
    @classmethod
    def _good_address(cls, address: str | None) -> str | None:
        if address is not None:
            require_address(address)
            if "@" in address:
                raise ValueError("an address without credentials: those belong into the url")
        return address

    @model_validator(mode="after")
    def _one(self) -> _Channel:
        if (self.url is None) == (self.webhook is None):
            raise ValueError("give either url (of Apprise) or webhook")
        if self.key is not None and self.webhook is None:
            raise ValueError("key signs a webhook: leave it out")
        if self.address is not None and self.webhook is not None:
            raise ValueError("address is for Apprise's url: a webhook has its own address, leave it out")
        return self


class _File(Strict):
    version: Literal[1]
    defaults: _Manners = _Manners()
    channels: Annotated[
        dict[Annotated[str, Field(pattern=r"^[\w.-]{1,32}$")], _Channel],
        Field(min_length=1, max_length=MOST_CHANNELS),
    ]


def load(path: Path, environment: Mapping[str, str] = os.environ) -> dict[str, Channel]:
    """Return the channels of a file by name; raise ConfigurationError with every mistake: file, line and key."""
    file, node = read(path, _File, "the channels")
    mistakes: list[str] = []

    def mistake(what: str, *keys: str) -> None:
        line, words = place(node, [*keys])
        mistakes.append(f"{path}:{line}: {words}: {what}")

    found = {}
    for name, written in file.channels.items():
        given = {key: getattr(file.defaults, key) for key in file.defaults.model_fields_set}
        channel = _Channel.model_construct(
            **{**given, **{key: getattr(written, key) for key in written.model_fields_set}}
        )
        here = "channels", name
        if written.fallback is not None and (written.fallback == name or written.fallback not in file.channels):
            mistake("name another of the channels of this file", *here, "fallback")
        sender = _sender(channel, path.parent, environment, lambda what, key, here=here: mistake(what, *here, key))
        if sender is not None:
            # A default that names the channel itself is none for it.
            fallback = None if channel.fallback == name else channel.fallback
            found[name] = Channel(_policy(name, channel), sender, fallback)
    if file.defaults.fallback is not None and file.defaults.fallback not in file.channels:
        mistake("name one of the channels of this file", "defaults", "fallback")
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    return found


def _sender(channel: _Channel, folder: Path, environment: Mapping[str, str], mistake: Any) -> Sender | None:
    """Return the way to a channel, None after telling what is wrong with it."""
    secrets: dict[str, str | None] = {}
    for key in ("url", "webhook", "key", "proxy"):
        try:
            secret: _Secret | None = getattr(channel, key)
            secrets[key] = None if secret is None else secret.read(folder, environment)
            if key == "proxy" and secret is not None:
                require_address(secrets[key] or "")
        except ValueError as error:
            mistake(str(error), key)
            return None
    url, webhook = secrets["url"], secrets["webhook"]
    try:
        if webhook is not None:
            return Webhook(webhook, secrets["key"], secrets["proxy"])
        return Apprised(url or "", secrets["proxy"], channel.address)
    except ValueError as error:
        mistake(str(error), "url" if webhook is None else "webhook")
        return None


def _policy(name: str, channel: _Channel) -> Policy:
    language, quiet, alerts = channel.language or "fa", channel.quiet, channel.alerts or "named"
    return Policy(
        name=name,
        named=alerts != "unnamed",
        unnamed=alerts != "named",
        severities=frozenset(Severity[each.upper()] for each in channel.severity or ORDER),
        labels={label: frozenset(values) for label, values in (channel.labels or {}).items()},
        resolved=channel.resolved is not False,
        limit=channel.limit or 20,
        quiet=None if quiet is None else Quiet(quiet.start, quiet.end, quiet.then == "drop"),
        manner=Manner(
            language=language,
            digits=channel.digits or language,
            calendar=channel.calendar or ("jalali" if language == "fa" else "gregorian"),
            template=channel.template,
        ),
    )
