"""Channels: the file that describes them, which alerts each one gets and when, and the ways to them."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import httpx2
import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from socksio.exceptions import SOCKSError
from standardwebhooks.webhooks import EmptyWebhookSecretError
from standardwebhooks.webhooks import Webhook as Signer

from bourse_cli.inputs import read_text
from bourse_cli.proxies import proxy_environment, proxy_for
from bourse_consumers.mistakes import Mistake, near
from bourse_consumers.notify.apprise_process import open_service
from bourse_consumers.notify.words import Message, split
from bourse_consumers.yaml_file import Document, Strict
from bourse_schemas.codec import to_json
from bourse_schemas.errors import BourseError, ConfigurationError
from bourse_schemas.events import TEHRAN, PriceAlert

__all__ = ["Apprised", "Channel", "NotSent", "Refused", "Webhook", "load"]

REFUSALS = {400, 401, 403, 404, 410, 413}
HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
DAY_SECONDS = 86_400
ONLY_FOR_PEOPLE = {"key", "resolved", "digest_above", "active"}


# --- the ways ---------------------------------------------------------------------------------------------------------


class NotSent(BourseError):
    """A channel did not accept a message; the text gives the reason, and nothing of its address but the host."""


class Refused(NotSent):
    """It would not accept the message later either."""


class Webhook:
    """JSON over HTTP: messages with the alerts as on the topic, signed as Standard Webhooks if there is a key."""

    def __init__(self, url: str, key: str | None = None, proxy: str | None = None, seconds: float = 10.0) -> None:
        """Raises ValueError, InvalidURL or ConfigurationError if this is not an address, or the proxy's is not one."""
        if re.match(r"https?://[^/?#]", url) is None:
            raise ValueError("give an address such as https://host/path")
        self._url, self._host, self._scrub = url, httpx2.URL(url).host, _scrubber(url, proxy)
        transport = httpx2.HTTPTransport(proxy=proxy_for(url, environ={"all_proxy": proxy} if proxy else os.environ))
        self._client = httpx2.Client(timeout=seconds, transport=transport)
        self._signer = None if key is None else Signer(key)

    def parts(self, message: Message) -> Sequence[Any]:
        """Return the message in parts that are each sent, and each repeated, as a whole: it is one."""
        alerts = [msgspec.Raw(to_json(msgspec.structs.asdict(alert)).encode()) for alert in message.alerts]
        data = {"title": message.title, "body": "\n".join(message.lines), "alerts": alerts}
        body = {"type": "alerts", "timestamp": datetime.now(UTC), "data": data}
        return [(message.id, msgspec.json.encode(body).decode())]

    def send(self, part: Any) -> None:
        """Post a part, signed with the time of this attempt. Raises NotSent."""
        (identifier, body), now = part, datetime.now(UTC)
        headers = {"webhook-id": identifier, "webhook-timestamp": str(int(now.timestamp()))}
        if self._signer is not None:
            headers["webhook-signature"] = self._signer.sign(identifier, now, body)
        self.post(body, headers)

    def post(self, body: str, headers: Mapping[str, str]) -> None:
        """Post a body; any answer but 2xx is a failure. Raises NotSent."""
        try:
            sent = {"Content-Type": "application/json", **headers}
            with self._client.stream("POST", self._url, content=body.encode(), headers=sent) as answer:
                status = f"{answer.status_code} {answer.reason_phrase}"
        except (httpx2.HTTPError, httpx2.InvalidURL, SOCKSError, OSError, UnicodeError) as error:
            raise NotSent(self._scrub(f"{type(error).__name__}: {error}")) from None
        if not answer.is_success:
            raise (Refused if answer.status_code in REFUSALS else NotSent)(f"{self._host} answers {status}")

    def close(self) -> None:
        """Do nothing: an idle connection needs no end."""


class Apprised:
    """A service of Apprise's, in a process that starts for the first message and is killed if it does not answer."""

    def __init__(self, url: str, proxy: str | None = None, seconds: float = 30.0) -> None:
        """Raises ValueError if Apprise does not know the address, ConfigurationError if the proxy's is not one."""
        if (service := open_service(url)) is None:
            raise ValueError("Apprise does not know this address, see https://appriseit.com/services")
        self._url, self._most, self._seconds, self._scrub = url, service.body_maxlen, seconds, _scrubber(url, proxy)
        self._environment = proxy_environment(os.environ, proxy)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.RLock()

    def parts(self, message: Message) -> Sequence[Any]:
        """Return title and body of as many messages as the service's limit demands."""
        bodies = split(message.lines, max(self._most - 2 * len(message.title) - 40, 40))
        ends = [f" ({number}/{len(bodies)})" for number in range(1, len(bodies) + 1)] if len(bodies) > 1 else [""]
        return [(message.title + end, body) for end, body in zip(ends, bodies, strict=True)]

    def send(self, part: Any) -> None:
        """Hand a part over and wait for the answer. Raises NotSent."""
        with self._lock:
            if self._process is None:
                # In a session of its own, so that Ctrl-C does not reach it while it sends.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "bourse_consumers.notify.apprise_process"], env=self._environment,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                    start_new_session=True,
                )  # fmt: skip
            try:
                print(json.dumps([self._url, *part]), file=self._process.stdin, flush=True)
                answers: Any = self._process.stdout
                if not select.select([answers], [], [], self._seconds)[0]:
                    raise TimeoutError
                reason = json.loads(answers.readline())
            except (OSError, ValueError):
                self.close()
                raise NotSent(f"Apprise did not answer within {self._seconds:g} s, or ended") from None
        if reason is not None:
            codes = {int(code) for code in re.findall(r"error\W{1,2}(\d{3})", reason)}
            raise (Refused if codes & REFUSALS else NotSent)(self._scrub(reason))

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None


def _scrubber(*urls: str | None) -> Callable[[str], str]:
    """Return a function that makes a text one line without secrets: without all of the addresses but their hosts."""
    found: set[str] = set()
    for url in filter(None, urls):
        user, _, rest = url.partition("://")[2].rpartition("@")
        host, *pieces = re.split(r"[/?&=#]", rest)
        # Some services have a token in the host's place: it has no dot.
        found.update((*user.split(":"), *pieces, *([] if "." in host or host.startswith("localhost") else [host])))
    secrets = sorted({form for each in found for form in (each, unquote(each)) if len(form) > 2}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, secrets)) or r"(?!)")
    return lambda text: " ".join(pattern.sub("…", text).split())[:300]


# --- the file ---------------------------------------------------------------------------------------------------------


def _secret(check: Callable[[str], object], *, plain: bool = False) -> BeforeValidator:
    """Return a reader of what a variable or a file holds; `plain` ones may be in the channels file, but for users."""

    def read(value: Any, info: ValidationInfo[Any]) -> str:
        folder, environment, _ = info.context
        try:
            match [*value.items()] if isinstance(value, dict) else value:
                case [("env", str(name))]:
                    found = str(environment.get(name, ""))
                case [("file", str(name))]:
                    found = read_text(folder / name, "the file")
                case [("clear", str(found))]:
                    name = "this"
                case str(found) if plain and "@" not in found:
                    name = "this"
                case _:
                    raise Mistake(
                        "plain",
                        fix="{env: NAME}",
                        why="a secret: write {env: …}, {file: …}, or {clear: …} if all may read it",
                    )
            if not (found := found.strip()):
                raise ValueError(f"{name} is empty or does not exist")
            check(found)
        except (ConfigurationError, EmptyWebhookSecretError, httpx2.InvalidURL) as error:
            raise ValueError(str(error).replace("all_proxy", "this")) from error
        return found

    return BeforeValidator(read)


def _hours(value: Any) -> tuple[int, int]:
    """Return where in a day hours begin, and how long they are, in seconds."""
    found = HOURS.fullmatch(str(value))
    if found is None or found.group(1, 2) == found.group(3, 4):
        raise Mistake("hours", fix=near("hours", str(value), HOURS.fullmatch) or "08:30-17:30")
    start, end = (int(found[n]) * 3600 + int(found[n + 1]) * 60 for n in (1, 3))
    return start, (end - start) % DAY_SECONDS


def _fallback(name: str, info: ValidationInfo[Any]) -> str:
    if name not in (known := info.context[-1]):
        fix = next(iter(get_close_matches(name, known, 1)), None)
        raise Mistake("channel", fix=fix, name=name, known=", ".join(known))
    return name


SeverityName = Literal["info", "warning", "critical"]
SEVERITIES: tuple[SeverityName, ...] = ("info", "warning", "critical")


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _at_least(value: Any) -> Any:
    return SEVERITIES[SEVERITIES.index(value) :] if value in SEVERITIES else _several(value)


def _proxy(url: str) -> object:
    return proxy_for("http://host", environ={"all_proxy": url})


class _Common(Strict):
    proxy: Annotated[str, _secret(_proxy, plain=True)] | None = Field(default=None, repr=False)
    alerts: Literal["rules", "labels"] = "rules"
    severity: Annotated[tuple[SeverityName, ...], BeforeValidator(_at_least)] = SEVERITIES
    labels: Mapping[str, Annotated[tuple[str, ...], BeforeValidator(_several)]] = {}
    resolved: bool = True
    language: Literal["fa", "en"] = "fa"
    digest_above: Annotated[int, Field(ge=1, le=1000)] = 10
    active: Annotated[tuple[int, int], BeforeValidator(_hours)] | None = None
    fallback: Annotated[str, AfterValidator(_fallback)] | None = None


class Channel(_Common):
    """A channel of the file.

    With `alerts: rules` it gets alerts whose rules name it, and those whose rules name no channel of the file; with
    `labels` those of any rule. In both cases only of its severities and with its labels, each with one of its values.
    """

    url: Annotated[str, _secret(Apprised)] | None = Field(default=None, repr=False)
    webhook: Annotated[str, _secret(Webhook)] | None = Field(default=None, repr=False)
    alertmanager: Annotated[str, _secret(Webhook, plain=True)] | None = Field(default=None, repr=False)
    key: Annotated[str, _secret(Signer)] | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _fits(self) -> Channel:
        given = {each for each in self.model_fields_set if getattr(self, each) is not None}
        if len(given & {"url", "webhook", "alertmanager"}) != 1:
            raise ValueError("give one of url, webhook and alertmanager")
        if unfit := given & ({"key"} if self.url else ONLY_FOR_PEOPLE if self.alertmanager else set()):
            raise ValueError(f"leave out what this kind of channel does not have: {', '.join(sorted(unfit))}")
        return self

    @cached_property
    def sender(self) -> Any:
        """Return the way to it."""
        if self.url is not None:
            return Apprised(self.url, self.proxy)
        if self.webhook is not None:
            return Webhook(self.webhook, self.key, self.proxy)
        return Webhook(f"{(self.alertmanager or '').rstrip('/')}/api/v2/alerts", proxy=self.proxy)

    def selects(self, name: str, alert: PriceAlert, channels: Iterable[str]) -> bool:
        """Return whether an alert is for this channel, of this name; `channels` are the names of all."""
        if alert.severity.lower() not in {*self.severity, "unknown"}:  # one of a later release is for everybody
            return False
        if any(alert.labels.get(label) not in values for label, values in self.labels.items()):
            return False
        return self.alerts == "labels" or name in alert.channels or not {*channels} & {*alert.channels}

    def wait(self, now: datetime) -> float:
        """Return the seconds until the active hours begin, 0 if it is within them. They may run over midnight."""
        # A default for people is not for Alertmanager, which would end what is not posted.
        start, length = (None if self.alertmanager else self.active) or (0, DAY_SECONDS)
        at = now.astimezone(TEHRAN)
        since = (at.hour * 3600 + at.minute * 60 + at.second - start) % DAY_SECONDS
        return 0 if since < length else DAY_SECONDS - since


class _File(Strict):
    version: Literal[1]
    defaults: _Common = Field(default_factory=_Common)
    # Each has a Kafka client and a thread.
    channels: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,32}$")], Channel] = Field(min_length=1, max_length=32)


def load(path: Path, environment: Mapping[str, str] = os.environ) -> dict[str, Channel]:
    """Return the channels of a file by name; raise ConfigurationError with every mistake."""
    document = Document(path, "the channels", secret=True)
    channels: Any = document.data.get("channels")
    pairs = channels.items() if isinstance(channels, dict) else ()
    people = [name for name, each in pairs if isinstance(each, dict) and "alertmanager" not in each]
    file = document.check(_File, document.data, context=(path.parent, environment, people))
    if document.wrong or file is None:
        raise document.error()
    given = {key: getattr(file.defaults, key) for key in file.defaults.model_fields_set}
    return {
        name: Channel.model_construct(**given | {key: getattr(channel, key) for key in channel.model_fields_set})
        for name, channel in file.channels.items()
    }
