"""`bourse doctor`: looks at everything a producer needs, a line each, with what to do about it.

settings ── exchange: clock, token, --call ──┐
       └─── Kafka: topics, lead, lag, marker ┼─ side by side, and none hides another
       └─── registry: subjects ──────────────┘
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bourse_cli.configuration import prepare
from bourse_cli.options import cluster_options
from bourse_cli.topics import Plan, plan_topics
from bourse_producer.calendar_command import CalendarFile, calendar_option
from bourse_producer.command import produce
from bourse_producer.options import ExchangeOptions, exchange_options
from bourse_schemas.errors import BourseError, ConfigurationError, ExchangeError
from bourse_schemas.events import FeedState, PollMarker
from bourse_schemas.kafka import Cluster, producer_id
from bourse_schemas.topics import POLLS, TOPICS

if TYPE_CHECKING:
    import httpx2
    from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]  # not in its __all__

__all__ = ["Check", "Status", "doctor"]

# No step takes longer, whatever is down.
STEP_SECONDS = 6.0
SKEW = timedelta(seconds=5)
# The beat, the exchange's own 40 s, and some air.
LATE = timedelta(minutes=2)
# Lost markers and aborted records lie between them.
MARKERS_TAIL = 1_000
FEW_BYTES, TOO_FEW_BYTES = 5 << 30, 256 << 20
KNOWN_DAYS = 30
SOURCES = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "bourse.toml",
    ParameterSource.DEFAULT: "default",
}


class Status(StrEnum):
    """How a check ended: well; worth knowing; wrong; or not to be told, as something it needs is missing."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding, and what to do about it."""

    name: str
    status: Status
    message: str
    advice: str = ""


def _ok(name: str, message: str) -> Check:
    return Check(name, Status.OK, message)


class _Doctor(click.Command):
    """Reads what `bourse produce` reads: its table of bourse.toml, and its environment variables."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        table = ((parent.default_map if parent else None) or {}).get("produce", {})
        if parent:
            prepare(parent, "produce", self, table)
        return super().make_context(info_name, args, parent, default_map=table, **extra)


@click.command(cls=_Doctor, context_settings={"auto_envvar_prefix": "BOURSE_PRODUCE"})
@exchange_options
@calendar_option
@click.option("--call", is_flag=True, help="Make one call for the whole market as well: it is charged.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@cluster_options
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    cluster: Cluster,
    exchange: ExchangeOptions,
    *,
    calendar_file: CalendarFile,
    capture: Path | None,
    clock: str,
    call: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Check everything a producer needs; takes the options of `bourse produce`.

    Exit 0 if every check is ok, 1 if one failed, 2 if one could not be made.
    """
    import bourse_schemas.registry  # noqa: F401  # its client's modules import each other: not by two threads at once
    from bourse_cli.logs import configure_logging

    configure_logging("critical")  # what the clients have to say is in the findings
    overrides = (ctx.find_root().default_map or {}).get("topic", {})
    parts: list[Iterator[Check]] = [
        _exchange(exchange, call=call),
        _kafka(cluster, overrides, exchange.profile.source, response_clock=clock == "response"),
        _registry(cluster),
        _around(calendar_file, [Path(), *([capture] if capture else [])]),
    ]
    checks: list[Check] = []
    with ThreadPoolExecutor(len(parts)) as pool:
        found = pool.map(list[Check], parts)
        for check in chain(_settings(ctx, cluster, exchange), chain.from_iterable(found)):
            checks.append(check)
            if not as_json:
                click.echo(_line(check))
    statuses = {check.status for check in checks}
    code = 1 if Status.FAIL in statuses else 2 if Status.SKIP in statuses else 0
    if as_json:
        click.echo(json.dumps({"ok": code == 0, "checks": [asdict(check) for check in checks]}, ensure_ascii=False))
    ctx.exit(code)


# All that `bourse produce` takes, so that its line can be used as it is.
_ours = {option.name for option in doctor.params}
doctor.params += [option for option in produce.params if option.name not in _ours]


def _line(check: Check) -> str:
    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red", Status.SKIP: "cyan"}
    words = " ".join(f"{check.message}{': ' * bool(check.advice)}{check.advice}".split())
    return f"{click.style(f'{check.status:<5}', fg=colours[check.status])} {check.name:<21} {words}"


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(ctx: click.Context, cluster: Cluster, exchange: ExchangeOptions) -> Iterator[Check]:
    """Yield what is set and where it came from; of secrets only that they are."""
    shared = ctx.find_root().default_map or {}
    shown: dict[str, Any] = {name: value for name, value in ctx.params.items() if name not in {"call", "as_json"}}
    shown["proxy"] = exchange.proxy and "set"
    shown["kafka_settings"] = ", ".join(cluster.settings)
    for option in ctx.command.params:
        name = option.name or ""
        value = shown.get(name)
        if value in (None, "") or isinstance(value, CalendarFile):
            continue
        source = SOURCES.get(ctx.get_parameter_source(name) or ParameterSource.DEFAULT, "default")
        if source == "default" and name in shared:
            source = "bourse.toml"
        if name == "address":
            try:
                value = exchange.where()
            except ConfigurationError as error:
                yield Check("--address", Status.FAIL, str(error))
                continue
        elif name == "registry_url":
            value = cluster.registry_url
        elif name in {"client_secret_file", "nid_file"} and not Path(value).is_file():
            yield Check(max(option.opts, key=len), Status.FAIL, f"{value} ({source}) is not there", "name another file")
            continue
        yield _ok(max(option.opts, key=len), f"{value} ({source})")
    for variable, file in (("CLIENT_SECRET", exchange.client_secret_file), ("NID", exchange.nid_file)):
        if file is None and os.environ.get(f"BOURSE_{variable}"):
            yield _ok(f"BOURSE_{variable}", "set (environment)")


# --- the exchange -----------------------------------------------------------------------------------------------------


def _exchange(exchange: ExchangeOptions, *, call: bool) -> Iterator[Check]:
    with ExitStack() as stack:
        try:
            address = exchange.where()
            quick = replace(
                exchange,
                connect_timeout_seconds=min(exchange.connect_timeout_seconds, STEP_SECONDS),
                read_timeout_seconds=min(exchange.read_timeout_seconds, STEP_SECONDS),
            )
            client = quick.http(stack)
        except ConfigurationError as error:
            yield Check("exchange", Status.FAIL, str(error))
            return
        reached = yield from _reach(client, address)
        if not reached:
            yield Check("token", Status.SKIP, "not asked for: the exchange does not answer")
            return
        try:
            asking = exchange if call else quick
            finnotech = asking.connect(stack, **({} if call else {"deadline_seconds": STEP_SECONDS}))
        except ConfigurationError as error:
            # Nothing is wrong out there, as far as one can tell without them.
            yield Check("token", Status.SKIP, "cannot be asked for", str(error))
            return
        scope = exchange.profile.scope
        try:
            scopes, life = finnotech.authorise()
        except ExchangeError as error:
            yield Check("token", Status.FAIL, f"refused ({error.kind}): {error}", _REMEDIES.get(error.kind, ""))
            return
        yield _ok("token", f"good for {_duration(life)}")
        if scopes and scope not in scopes:
            advice = f"ask the exchange's provider for the scope {scope} for this client"
            yield Check("scopes", Status.FAIL, f"{scope} is not among {', '.join(scopes)}", advice)
        else:
            yield _ok("scopes", ", ".join(scopes) or "not named by the exchange; a call will tell")
        if call:
            yield _call(finnotech, exchange)


_REMEDIES = {
    "token": "check --client-id, the client secret, the national id, and that they belong together",
    "scope": "ask the exchange's provider for the scope, and whitelist your address",
    "address": "have the address you call from whitelisted, or call by way of one that is (--proxy)",
    "quota": "the calls that were paid for are used up: buy more, or wait",
    "rate": "another program calls with the same account: stop it, or wait a minute",
    "timeout": "try again; --read-timeout-seconds may be too short",
    "network": "check --address and --proxy",
    "nonsense": "is --address the exchange's?",
}


def _reach(client: httpx2.Client, address: str) -> Generator[Check, None, bool]:
    """Ask for nothing in particular: whoever answers is reachable, and says what time it is."""
    import httpx2

    started, asked = time.monotonic(), datetime.now(UTC)
    try:
        with client.stream("GET", address) as answer:
            status, dated = answer.status_code, answer.headers.get("date", "")
    except (httpx2.HTTPError, OSError) as error:
        advice = "check --address, --proxy, the network and its name service"
        yield Check("exchange", Status.FAIL, f"{address} does not answer ({type(error).__name__})", advice)
        yield Check("clock", Status.SKIP, "nobody to compare it with")
        return False
    took = time.monotonic() - started
    told = f"{address} answers in {took * 1000:.0f} ms"
    if status >= 500:
        yield Check("exchange", Status.WARN, f"{told}, with HTTP {status}", "it may be down for a while")
    else:
        yield _ok("exchange", told)
    try:
        # Dates are whole seconds: half of one more, and half of the way.
        exact = parsedate_to_datetime(dated) + timedelta(seconds=0.5) - asked - timedelta(seconds=took / 2)
    except (TypeError, ValueError, OverflowError):
        yield Check("clock", Status.WARN, "the exchange does not say what time it has")
        return True
    seconds = exact.total_seconds()
    if abs(exact) <= SKEW:
        yield _ok("clock", f"agrees with the exchange's to {max(abs(seconds), 1):.0f} s")
    else:
        message = f"the exchange's is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} ours"
        yield Check("clock", Status.WARN, message, "keep this machine's clock by NTP; practice has a time of its own")
    return True


def _call(finnotech: Any, exchange: ExchangeOptions) -> Check:
    from bourse_producer.calendar import Calendar
    from bourse_producer.patience import Call
    from bourse_producer.responses import Reading, parse

    try:
        reply = finnotech.fetch(Call.SHARES)
        now = reply.dated or reply.received_at
        day = Calendar().session_day(now)
        context = Reading(0, now, now, day, is_right=False, track_id=reply.track_id, profile=exchange.profile_name)
        snapshot = parse(reply.body, context)
    except ExchangeError as error:
        return Check("call", Status.FAIL, f"refused ({error.kind}): {error}", _REMEDIES.get(error.kind, ""))
    newest = max((candle.traded_at for candle in snapshot.candles.values()), default=None)
    message = f"{snapshot.rows} rows, {len(snapshot.rejected)} rejected, newest trade {_time(newest)}"
    if snapshot.rejected:
        reason = snapshot.rejected[0]
        return Check("call", Status.WARN, message, f"the first of the rejected: {reason.reason}: {reason.message}")
    if not snapshot.rows:
        return Check("call", Status.WARN, "no rows", "before the open of a trading day that is usual")
    return _ok("call", message)


# --- Kafka ------------------------------------------------------------------------------------------------------------


def _kafka(cluster: Cluster, overrides: Mapping[str, Any], source: str, *, response_clock: bool) -> Iterator[Check]:
    try:
        metadata = cluster.metadata(STEP_SECONDS, every_broker=True)
    except ConfigurationError as error:
        yield Check("kafka", Status.FAIL, str(error))
        for name in ("topics", "lead", "consumer groups", "last poll"):
            yield Check(name, Status.SKIP, "Kafka does not answer")
        return
    admin = cluster.admin()
    brokers = len(metadata.brokers)
    yield _ok("kafka", f"{_version(admin, metadata)}, {brokers} broker{'s' * (brokers != 1)}")
    yield _topics(cluster, overrides, brokers)
    if POLLS.full_name(cluster.prefix) not in metadata.topics:
        for name in ("lead", "consumer groups", "last poll"):
            yield Check(name, Status.SKIP, f"there is no topic {POLLS.full_name(cluster.prefix)}")
        return
    yield _lead(cluster, admin)
    yield from _groups(cluster, admin)
    yield _last_poll(cluster, source, response_clock=response_clock)


def _version(admin: AdminClient, metadata: ClusterMetadata) -> str:
    """Return what the brokers tell of their version: before 4.0 by a setting that later ones no longer have."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # not in its __all__

    resource = ConfigResource(ResourceType.BROKER, str(next(iter(metadata.brokers))))
    try:
        settings = admin.describe_configs([resource], request_timeout=STEP_SECONDS)[resource].result()
    except KafkaException:
        return "answers (its version is not ours to see)"
    old = settings.get("inter.broker.protocol.version")
    return f"protocol {old.value}" if old else "4.0 or later"


def _topics(cluster: Cluster, overrides: Mapping[str, Any], brokers: int) -> Check:
    def to_do(*, any_time: bool) -> list[Plan]:
        plans = plan_topics(cluster, overrides, min(brokers, 3), any_time=any_time)
        return [plan for plan in plans if plan.has < plan.topic.partitions or plan.alter]

    try:
        usual, any_time = to_do(any_time=False), to_do(any_time=True)
    except ConfigurationError as error:
        return Check("topics", Status.FAIL, str(error))
    if not usual or not any_time:
        kept = "" if not usual else ", for records of any time"
        return _ok("topics", f"all {len(TOPICS)} as declared{kept}")
    if missing := [plan.name for plan in usual if not plan.has]:
        few = f" --replication-factor {brokers}" * (brokers < 3)
        advice = f"is --topic-prefix right? if so, run `bourse topics apply{few}`"
        return Check("topics", Status.FAIL, f"not there: {', '.join(missing)}", advice)
    fewest = min(usual, any_time, key=lambda plans: sum(len(plan.alter) for plan in plans))
    return Check(
        "topics", Status.FAIL, "; ".join(map(str, fewest)), "run `bourse topics apply`, or say it in bourse.toml"
    )


def _lead(cluster: Cluster, admin: AdminClient) -> Check:
    """Say who may write under the transactional id of this source: whom the group of its producers has elected."""
    from confluent_kafka import KafkaException

    name = producer_id(cluster.prefix)
    try:
        group = admin.describe_consumer_groups([name], request_timeout=STEP_SECONDS)[name].result()
    except KafkaException as error:
        return Check("lead", Status.WARN, f"who leads {name} is not told: {error.args[0].str()}")
    leading = [each for each in group.members if each.assignment and each.assignment.topic_partitions]
    if not group.members:
        return _ok("lead", f"{name} is free: no producer runs")
    if not leading:
        return Check(
            "lead", Status.WARN, f"{len(group.members)} producers stand for {name}", "look again in ten seconds"
        )
    others = len(group.members) - len(leading)
    return _ok("lead", f"{name} is held by {leading[0].client_id} at {leading[0].host}; {others} on standby")


def _groups(cluster: Cluster, admin: AdminClient) -> Iterator[Check]:
    """Yield how far each of our consumer groups is behind, the offsets of transaction markers included."""
    from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
    from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]  # not in its __all__

    name = "consumer groups"
    try:
        listed = admin.list_consumer_groups(request_timeout=STEP_SECONDS).result()
        ours = sorted(
            group.group_id
            for group in listed.valid
            if group.group_id.startswith(f"{cluster.prefix}-") and group.group_id != producer_id(cluster.prefix)
        )
        if not ours:
            yield _ok(name, f"none begins with {cluster.prefix}-: nobody consumes")
            return
        members = admin.describe_consumer_groups(ours, request_timeout=STEP_SECONDS)
        for group in ours:
            asked = [ConsumerGroupTopicPartitions(group)]
            offsets = admin.list_consumer_group_offsets(asked, request_timeout=STEP_SECONDS)[group].result()
            known = [each for each in offsets.topic_partitions or [] if each.offset >= 0]
            latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
            ends = admin.list_offsets(dict.fromkeys(known, latest), request_timeout=STEP_SECONDS)
            behind = sum(max(0, end.result().offset - each.offset - 1) for each, end in ends.items())
            running = len(members[group].result().members)
            told = f"{group} is {behind} offsets behind, {running} running"
            if behind and not running:
                yield Check("consumer group", Status.WARN, told, "start it again")
            else:
                yield _ok("consumer group", told)
    except KafkaException as error:
        yield Check(name, Status.WARN, f"not told: {error.args[0].str()}")


def _last_poll(cluster: Cluster, source: str, *, response_clock: bool) -> Check:
    from bourse_schemas.reading import read

    decode = cluster.registry().deserializer(PollMarker)
    last: PollMarker | None = None
    try:
        for record in read(cluster, POLLS.full_name(cluster.prefix), tail=MARKERS_TAIL, timeout=STEP_SECONDS):
            marker = decode(record.value)
            last = marker if marker.source == source else last
    except BourseError as error:
        return Check("last poll", Status.SKIP, f"its marker cannot be read: {error}")
    if last is None:
        return Check("last poll", Status.WARN, f"nothing of {source} is on the topic", "run `bourse produce`")
    name = "last poll"
    told = f"{last.outcome} at {_time(last.requested_at)}, feed {last.feed_state}, {last.rows} rows"
    late = datetime.now(UTC) - (last.next_poll_at or datetime.max.replace(tzinfo=UTC))
    if last.error_kind:
        told += f" ({last.error_kind}: {last.error_message})"
    # A day of the past, or a simulated one, is not measured with our clock.
    if not response_clock and late > LATE:
        advice = "is `bourse produce` running? its log and /readyz say why not (practice and replays: --clock response)"
        return Check(name, Status.FAIL, f"{told}; the next is {_duration(late)} late", advice)
    if last.feed_state in {FeedState.FRESH, FeedState.IDLE}:
        return _ok(name, told)
    bad = last.feed_state in {FeedState.DOWN, FeedState.FROZEN}
    advice = _REMEDIES.get(last.error_kind or "", "docs/operate.md has an answer to each feed state")
    return Check(name, Status.FAIL if bad else Status.WARN, told, advice)


def _registry(cluster: Cluster) -> Iterator[Check]:
    try:
        registry = cluster.registry()
        problems = [problem for topic in TOPICS if (problem := registry.check(topic, cluster.prefix))]
    except ConfigurationError as error:
        yield Check("registry", Status.FAIL, str(error))
        yield Check("subjects", Status.SKIP, "the registry does not answer")
        return
    yield _ok("registry", f"{cluster.registry_url} answers")
    if problems:
        more = f", and {len(problems) - 1} more (see `bourse schemas check`)" * (len(problems) > 1)
        yield Check("subjects", Status.FAIL, problems[0] + more)
    if not problems:
        try:
            for topic in TOPICS:
                registry.serializer(topic, cluster.prefix)
            yield _ok("subjects", f"all {len(TOPICS)} registered and compatible")
        except ConfigurationError as error:
            yield Check("subjects", Status.FAIL, str(error))


# --- around -----------------------------------------------------------------------------------------------------------


def _around(calendar_file: CalendarFile, folders: list[Path]) -> Iterator[Check]:
    from bourse_schemas.events import TEHRAN

    calendar, now = calendar_file.calendar(), datetime.now(UTC)
    today = now.astimezone(TEHRAN).date()
    why = calendar.why_closed(today)
    left = calendar.days_known(today)
    state, opens = f"closed ({why})" if why else "a trading day", _time(calendar.next_session(now))
    told = f"{today} is {state}, next session {opens}, known until {calendar.known_until}"
    if left < KNOWN_DAYS:
        advice = "check the holidays after that day and say so: known_until in the file of --calendar"
        yield Check("calendar", Status.WARN, told, advice)
    else:
        yield _ok("calendar", told)
    for folder in folders:
        # A folder that is yet to be made will lie where its first ancestor does.
        there = next(each for each in [folder.absolute(), *folder.absolute().parents] if each.exists())
        total, _, free = shutil.disk_usage(there)
        told = f"{folder.absolute()} has {free / (1 << 30):.1f} GiB free"
        if not (total and there.is_dir() and os.access(there, os.W_OK)):
            yield Check(
                "disk",
                Status.FAIL,
                f"{folder.absolute()} cannot be written",
                "name another folder, or let this user write",
            )
        elif free < FEW_BYTES:
            status = Status.FAIL if free < TOO_FEW_BYTES else Status.WARN
            yield Check("disk", status, told, "free some")
        else:
            yield _ok("disk", told)


def _time(instant: datetime | None) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}" if instant else "none"


def _duration(span: timedelta) -> str:
    minutes = span.total_seconds() / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h" if minutes < 2880 else f"{span.days} days"
