"""Channels: the file that describes them, which alerts each one gets and when, and the ways to them."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import httpx2
import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from socksio.exceptions import SOCKSError
from standardwebhooks.webhooks import Webhook as Signer

from bourse_cli.proxies import proxy_environment, proxy_for
from bourse_consumers.mistakes import Mistake, near
from bourse_consumers.notify.apprise_process import open_service
from bourse_consumers.notify.words import Message, split
from bourse_consumers.yaml_file import Document, Strict, given, known_channel
from bourse_schemas.codec import to_json
from bourse_schemas.errors import BourseError, ConfigurationError
from bourse_schemas.events import TEHRAN, PriceAlert

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
DAY_SECONDS = 86_400
WAYS = {"url", "webhook", "alertmanager"}
ONLY_FOR_PEOPLE = {"key", "resolved", "digest_above", "active"}
MOST_ALERTS = 1000
MOST_CHANNELS = 32  # each has a Kafka client and a thread


# --- the ways ---------------------------------------------------------------------------------------------------------


class NotSent(BourseError):
    """A channel did not accept a message; the text gives the reason, and nothing of its address but the host."""


class Refused(NotSent):
    """It would not accept the message later either."""


class Unacceptable(Refused):
    """It does not accept what is in the message; `alerts` are those it is about, if that is known."""

    def __init__(self, message: str, alerts: Sequence[PriceAlert] = ()) -> None:
        super().__init__(message)
        self.alerts = alerts


REFUSALS: dict[int, type[Refused]] = dict.fromkeys((401, 403, 404, 410), Refused)
REFUSALS |= dict.fromkeys((400, 413), Unacceptable)


class Webhook:
    """JSON over HTTP: messages with the alerts as on the topic, signed as Standard Webhooks if there is a key."""

    def __init__(self, url: str, key: str | None = None, proxy: str | None = None, seconds: float = 10.0) -> None:
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
            why = self._scrub(f"{type(error).__name__}: {error}")
            raise NotSent(f"no answer from {self._host}: {why}") from None
        if not answer.is_success:
            raise REFUSALS.get(answer.status_code, NotSent)(f"{self._host} answers {status}")

    def close(self) -> None:
        """Do nothing: an idle connection needs no end."""


class Apprised:
    """A service of Apprise's, in a process that starts for the first message and is killed if it does not answer."""

    def __init__(self, url: str, proxy: str | None = None, seconds: float = 30.0) -> None:
        self._url, self._seconds, self._scrub = url, seconds, _scrubber(url, proxy)
        self._most = open_service(url).body_maxlen
        self._environment = proxy_environment(os.environ, proxy)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def parts(self, message: Message) -> Sequence[Any]:
        """Return title and body of as many messages as the service's limit demands."""
        bodies = split(message.lines, max(self._most - 2 * len(message.title) - 40, 40))
        ends = [f" ({number}/{len(bodies)})" for number in range(1, len(bodies) + 1)] if len(bodies) > 1 else [""]
        return [(message.title + end, body) for end, body in zip(ends, bodies, strict=True)]

    def send(self, part: Any) -> None:
        """Hand a part over and wait for the answer. Raises NotSent."""
        with self._lock:
            # In a session of its own, so that Ctrl-C does not reach it while it sends.
            process = self._process = self._process or subprocess.Popen(
                [sys.executable, "-m", "bourse_consumers.notify.apprise_process"], env=self._environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True,
            )  # fmt: skip
            try:
                print(json.dumps([self._url, *part]), file=process.stdin, flush=True)
                answers: Any = process.stdout
                if not select.select([answers], [], [], self._seconds)[0]:
                    raise TimeoutError
                reason = json.loads(answers.readline())
            except (OSError, ValueError):
                self.close()
                raise NotSent(f"Apprise did not answer within {self._seconds:g} s, or ended") from None
        if reason is not None:
            codes = {int(code) for code in re.findall(r"error\W{1,2}(\d{3})", reason)}
            raise (Refused if codes & REFUSALS.keys() else NotSent)(self._scrub(reason))

    def close(self) -> None:
        """End the process, also if another thread waits for its answer."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


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


def _variable(channel: str, key: str | None) -> str:
    """Return what a secret is replaced with: the channel's own variable, or file if no shell accepts such a name."""
    if not channel.isascii():
        name = re.sub(r"[^\w.-]", "-", channel)
        return f"{{file: {name}-{key}}}"
    name = re.sub(r"\W+", "_", f"{channel}_{key}".upper(), flags=re.ASCII).lstrip("_")
    return f"{{env: {'_' * name[0].isdigit()}{name}}}"


def _secret(check: Callable[[str], object], mistake: str, *, plain: bool = False) -> BeforeValidator:
    """Return a reader of what a variable or a file holds; `plain` ones may be in the channels file, but for users."""

    def read(value: Any, info: ValidationInfo[Any]) -> str:
        folder, environment, _, channel = info.context
        own = _variable(channel, info.field_name)
        # No other line of this file corrects what is wrong in a variable or in another file.
        whole: str | None = ""
        empty = "no_value"
        match [*value.items()] if isinstance(value, dict) else value:
            case [("env" | "file", str())] if environment is None:
                return ""
            case [("env", str(name))]:
                found, empty = str(environment.get(name, "")), "no_variable"
            case [("file", str(name))]:
                try:
                    found = (folder / name).read_text("utf-8-sig")
                except FileNotFoundError:
                    raise Mistake("no_file", whole=whole, name=folder / name) from None
                except (OSError, ValueError) as error:
                    why = getattr(error, "strerror", None) or "not UTF-8 text"
                    raise Mistake("unreadable", whole=whole, name=name, why=why) from None
            case [("clear", str(found))]:
                name, whole = "clear", None if plain else own
            case str(found) if plain and "@" not in found:
                name, whole = "clear", None
            case _:
                raise Mistake("secret", fix=own)
        if not (found := found.strip()):
            raise Mistake(empty, whole=whole, name=name)
        try:
            good = check(found)
        except (ConfigurationError, ValueError, httpx2.InvalidURL):
            good = False
        if not good:
            raise Mistake(mistake, whole=whole)
        return found

    return BeforeValidator(read)


def _is_known(url: str) -> bool:
    return open_service(url) is not None


def _is_address(url: str) -> bool:
    return re.match(r"https?://[^/?#]", url) is not None and bool(httpx2.URL(url).host)


def _is_proxy(url: str) -> bool:
    return proxy_for("http://host", environ={"all_proxy": url}) is not None


def _is_key(key: str) -> bool:
    return 24 <= len(b64decode(key.removeprefix("whsec_"), validate=True)) <= 64


def _hours(value: Any) -> tuple[int, int]:
    """Return where in a day hours begin, and how long they are, in seconds."""
    found = HOURS.fullmatch(str(value))
    if found is None or found.group(1, 2) == found.group(3, 4):
        raise Mistake("hours", fix=near("hours", str(value), HOURS.fullmatch))
    start, end = (int(found[n]) * 3600 + int(found[n + 1]) * 60 for n in (1, 3))
    return start, (end - start) % DAY_SECONDS


def _count(value: Any) -> int:
    if not (isinstance(value, int) and 1 <= value <= MOST_ALERTS):
        raise Mistake("whole_number", low=1, high=MOST_ALERTS)
    return value


SeverityName = Literal["info", "warning", "critical"]
SEVERITIES: tuple[SeverityName, ...] = ("info", "warning", "critical")


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _at_least(value: Any) -> Any:
    return SEVERITIES[SEVERITIES.index(value) :] if value in SEVERITIES else _several(value)


class _Common(Strict):
    proxy: Annotated[str, _secret(_is_proxy, "proxy", plain=True)] | None = Field(default=None, repr=False)
    alerts: Literal["rules", "labels"] = "rules"
    severity: Annotated[tuple[SeverityName, ...], BeforeValidator(_at_least)] = SEVERITIES
    labels: dict[str, Annotated[tuple[str, ...], BeforeValidator(_several)]] = Field(default_factory=dict)
    resolved: bool = True
    language: Literal["fa", "en"] = "fa"
    digest_above: Annotated[int, BeforeValidator(_count)] = 10
    active: Annotated[tuple[int, int], BeforeValidator(_hours)] | None = None
    fallback: Annotated[str, AfterValidator(lambda name, info: known_channel(name, info.context[2]))] | None = None


class Channel(_Common):
    """A channel of the file.

    With `alerts: rules` it gets alerts whose rules name it, and those whose rules name no channel of the file; with
    `labels` those of any rule. In both cases only of its severities and with its labels, each with one of its values.
    """

    url: Annotated[str, _secret(_is_known, "apprise")] | None = Field(default=None, repr=False)
    webhook: Annotated[str, _secret(_is_address, "address")] | None = Field(default=None, repr=False)
    alertmanager: Annotated[str, _secret(_is_address, "address", plain=True)] | None = Field(default=None, repr=False)
    key: Annotated[str, _secret(_is_key, "key")] | None = Field(default=None, repr=False)

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
    channels: dict[str, Any]


def load(
    path: Path, environment: Mapping[str, str] = os.environ, language: str = "en", only: str | None = None
) -> dict[str, Channel]:
    """Return the channels of a file by name; raise ConfigurationError with every mistake.

    With `only` the secrets of other channels are not read: they are empty.
    """
    document = Document(path, "the channels", language=language, secret=True)
    written: Any = document.data.get("channels")
    channels: dict[str, Any] = written if isinstance(written, dict) else {}
    people = [name for name, each in channels.items() if isinstance(each, dict) and "alertmanager" not in each]
    file = document.check(_File, document.data, context=(path.parent, environment, people, "defaults"))
    if written is not None and not 1 <= len(channels) <= MOST_CHANNELS:
        document.mistake(("channels",), Mistake("how_many_channels", most=MOST_CHANNELS))
    found: dict[str, Channel] = {}
    for name, each in channels.items() if len(channels) <= MOST_CHANNELS else ():
        at = "channels", name
        if not re.fullmatch(r"[\w.-]{1,32}", name):
            document.mistake(at, Mistake("channel_name", fix=re.sub(r"[^\w.-]", "-", name)[:32] or "desk"))
        if not isinstance(each, dict) or sum(each.get(way) is not None for way in WAYS) != 1:
            document.mistake(at, Mistake("one_way", fix=f"{{url: {_variable(name, 'url')}}}"))
        context = path.parent, environment if only in {None, name} else None, people, name
        channel = document.check(Channel, each, at, context=context) if isinstance(each, dict) else None
        if channel is None:
            continue
        unfit = {"key"} if channel.url else ONLY_FOR_PEOPLE if channel.alertmanager else set[str]()
        for key in [key for key, value in given(channel).items() if key in unfit and value is not None]:
            document.mistake((*at, key), Mistake("unfit", fix=f"# {key}", name=key))
        found[name] = channel
    if document.wrong or file is None:
        raise document.error()
    defaults = given(file.defaults)
    return {name: Channel.model_construct(**defaults | given(channel)) for name, channel in found.items()}
