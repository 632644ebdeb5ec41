"""`bourse doctor`: checks everything a producer and its consumers need; what is not ok comes with advice.

Each check is a function that returns its findings. Checks run side by side, so that none hides another; a check is
skipped if the one that it needs failed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from bourse_cli.configuration import prepare
from bourse_cli.options import cluster_options
from bourse_cli.topics import plan_topics
from bourse_producer.calendar_command import CalendarFile, calendar_option
from bourse_producer.command import produce
from bourse_producer.options import ExchangeOptions, exchange_options
from bourse_producer.refusals import clock_skew, http_date
from bourse_producer.reporting import KNOWN_DAYS
from bourse_schemas.errors import BourseError, ExchangeError, Undecodable, UnknownSchema, counted
from bourse_schemas.events import TEHRAN, FeedState, PollMarker
from bourse_schemas.kafka import Cluster, producer_id
from bourse_schemas.topics import CANDLES, DEAD_LETTERS, POLLS, TOPICS, TRADES

if TYPE_CHECKING:
    from bourse_schemas.reading import GroupLag

# No step takes longer, also if a server is down.
STEP_SECONDS = 6.0
SKEW_SECONDS = 5.0
# The beat, the exchange's own 40 s, and some air.
LATE = timedelta(minutes=2)
# A consumer whose oldest unread record is older than this does not keep up; sources within this time run side by side.
BEHIND = RECENT = timedelta(minutes=10)
# In offsets: transaction markers and aborted records are among them.
MARKERS_TAIL = 1_000
REMEDIES = {
    "token": "check --client-id, the client secret, the national id, and that they belong together",
    "scope": "ask the exchange's provider for the scope, and whitelist your address",
    "address": "have the address you call from whitelisted, or call through one that is (--proxy)",
    "quota": "the paid calls are used up: buy more, or wait",
    "rate": "another program calls with the same account: stop it, or wait a minute",
    "timeout": "try again; --read-timeout-seconds may be too short",
    "network": "check --address, --proxy, the network and its name service",
    "nonsense": "is --address the exchange's?",
}


class Status(StrEnum):
    """How a check ended; SKIPPED: something that it needs is not ok."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


UNREADABLE = {Status.WARNING: "find out who writes there", Status.FAILED: "restore the registry's schemas"}
COLOURS = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "red", Status.SKIPPED: "cyan"}


class Finding(NamedTuple):
    """What a check found, and what to do about it."""

    name: str
    status: Status
    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked, as the operator's options describe it."""

    cluster: Cluster
    topic_overrides: Mapping[str, Any]
    exchange: ExchangeOptions
    calendar: CalendarFile


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
@click.option("--verbose", is_flag=True, help="Print the findings that are ok, too.")
@click.option("--json", "as_json", is_flag=True, help="Print all findings as one JSON object.")
@cluster_options
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    cluster: Cluster,
    exchange: ExchangeOptions,
    *,
    calendar_file: CalendarFile,
    verbose: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Check everything a producer and its consumers need. It takes the options of `bourse produce`.

    Exit 0 if nothing failed, otherwise 1.
    """
    import bourse_schemas.registry  # noqa: F401  # not by two threads at once: its client's modules import each other
    from bourse_cli.logs import configure_logging

    configure_logging("critical")  # the findings contain what the clients report
    overrides = (ctx.find_root().default_map or {}).get("topic", {})
    findings = examine(Subject(cluster, overrides, exchange, calendar_file))
    counts = Counter(finding.status for finding in findings)
    if as_json:
        shown = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"ok": not counts[Status.FAILED], "findings": shown}, ensure_ascii=False))
    else:
        for name, status, message, advice in findings:
            if verbose or status is not Status.OK:
                text = " ".join(f"{message}{'; ' * bool(advice)}{advice}".split())
                click.echo(f"{click.style(f'{status:<8}', fg=COLOURS[status])} {name:<10} {text}")
        counted = ", ".join(f"{counts[status]} {status}" for status in Status if counts[status])
        click.echo(f"{len(findings)} checks: {counted}")
    ctx.exit(int(counts[Status.FAILED] > 0))


# All that `bourse produce` takes, so that its command line can be used as it is.
_ours = {option.name for option in doctor.params}
doctor.params += [option for option in produce.params if option.name not in _ours]


def examine(subject: Subject) -> list[Finding]:
    """Run all checks, each after the one that it needs."""
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        running: dict[str, Future[list[Finding]]] = {}
        for name, (check, needs) in CHECKS.items():
            running[name] = pool.submit(_run, name, partial(check, subject), running.get(needs))
        return [finding for found in running.values() for finding in found.result()]


def _run(name: str, check: Callable[[], Finding | list[Finding]], needs: Future[list[Finding]] | None) -> list[Finding]:
    # The first finding of a check is the one that others need.
    if needs and (needed := needs.result()[0]).status in {Status.FAILED, Status.SKIPPED}:
        return [Finding(name, Status.SKIPPED, f"it needs: {needed.name}")]
    try:
        found = check()
    except ExchangeError as error:
        message = f"refused ({error.kind}): {error}"
        return [Finding(name, Status.FAILED, message, REMEDIES.get(error.kind, ""))]
    except BourseError as error:
        return [Finding(name, Status.FAILED, str(error))]
    return [found] if isinstance(found, Finding) else found


def _exchange(subject: Subject) -> Finding:
    """Ask the exchange for nothing in particular: any answer shows that it is reachable, and its time."""
    import httpx2

    address, asked = subject.exchange.where(), datetime.now(UTC)
    try:
        with ExitStack() as stack, subject.exchange.http(stack).stream("GET", address, timeout=STEP_SECONDS) as answer:
            status, dated = answer.status_code, answer.headers.get("date", "")
    except (httpx2.HTTPError, OSError) as error:
        message = f"{address} does not answer ({type(error).__name__})"
        return Finding("exchange", Status.FAILED, message, REMEDIES["network"])
    answered = datetime.now(UTC)
    message = f"{address} answers in {(answered - asked).total_seconds() * 1000:.0f} ms"
    if status >= 500:
        return Finding("exchange", Status.WARNING, f"{message}, with HTTP {status}", "it may be down for a while")
    if (date := http_date(dated)) is None:
        return Finding("exchange", Status.WARNING, f"{message}, without its time", "the clocks cannot be compared")
    if abs(ahead := clock_skew(asked, answered, date)) <= SKEW_SECONDS:
        return Finding("exchange", Status.OK, f"{message}, and the clocks agree")
    message += f"; its clock differs from ours by {ahead:+.0f} s"
    return Finding("exchange", Status.WARNING, message, "keep this machine's clock by NTP; practice has its own time")


def _token(subject: Subject) -> Finding:
    """Get a token, which must have the profile's scope."""
    scope = subject.exchange.service.scope
    with ExitStack() as stack:
        scopes, life = subject.exchange.connect(stack, deadline_seconds=STEP_SECONDS).authorise()
    if scopes and scope not in scopes:
        return Finding("token", Status.FAILED, f"no scope {scope}, only {', '.join(scopes)}", REMEDIES["scope"])
    return Finding("token", Status.OK, f"valid for {_duration(life)}; scopes: {', '.join(scopes) or 'not reported'}")


def _kafka(subject: Subject) -> Finding:
    """Ask each broker, at the address that it advertises."""
    subject.cluster.metadata(every_broker=True)
    return Finding("kafka", Status.OK, "every broker answers at its advertised address")


def _topics(subject: Subject) -> list[Finding]:
    """All topics exist; they are as declared and take our largest batch."""
    cluster = subject.cluster
    brokers = min(len(cluster.metadata(STEP_SECONDS).brokers), 3)
    both = [plan_topics(cluster, subject.topic_overrides, brokers, any_time=any_time) for any_time in (False, True)]
    plans = min(both, key=lambda plans: sum(len(plan.alter) for plan in plans))
    if missing := [plan.name for plan in plans if not plan.has]:
        advice = "is --topic-prefix right? if so, run `bourse topics apply`" + " --replication-factor 1" * (brokers < 3)
        return [Finding("topics", Status.FAILED, f"missing: {', '.join(missing)}", advice)]
    exist = Finding("topics", Status.OK, f"all {len(TOPICS)} exist")
    if wrong := [str(plan) for plan in plans if plan.has < plan.topic.partitions or plan.alter]:
        advice = "run `bourse topics apply`, or declare it in bourse.toml"
        return [exist, Finding("settings", Status.FAILED, "; ".join(wrong), advice)]
    try:
        cluster.require_sizes(topic.full_name(cluster.prefix) for topic in (TRADES, CANDLES, POLLS, DEAD_LETTERS))
    except BourseError as error:
        return [exist, Finding("settings", Status.FAILED, str(error))]
    return [exist, Finding("settings", Status.OK, "topics are as declared")]


def _polls(subject: Subject) -> list[Finding]:
    """Judge the producers and consumers of the prefix by the latest markers and by the groups' offsets."""
    from bourse_schemas.reading import group_lag, read

    cluster, markers, skipped = subject.cluster, list[PollMarker](), dict[Status, Finding]()
    decode = cluster.registry().deserializer(PollMarker)
    for record in read(cluster, POLLS.full_name(cluster.prefix), tail=MARKERS_TAIL, timeout=STEP_SECONDS):
        try:
            markers.append(decode(record.value))
        except Undecodable as error:
            # With a schema that is lost no producer starts. Of each kind the latest record is shown.
            status = Status.FAILED if isinstance(error, UnknownSchema) else Status.WARNING
            message = f"{'-'.join(map(str, record.place))} at offset {record.offset}: {error}"
            skipped[status] = Finding("polls", status, message, UNREADABLE[status])
    now = markers[-1].requested_at if markers and markers[-1].simulated else datetime.now(UTC)
    groups = judge_groups(group_lag(cluster, timeout=STEP_SECONDS), producer_id(cluster.prefix), now)
    return [judge_poll(markers, now), judge_sources(markers), *skipped.values(), *groups]


def judge_poll(markers: Sequence[PollMarker], now: datetime) -> Finding:
    """Judge the last poll: late, failed, or of a feed that is not fresh."""
    name = "last poll"
    if not markers:
        return Finding(name, Status.WARNING, "no poll was published", "run `bourse produce`")
    last = markers[-1]
    message = f"{last.outcome} at {_time(last.requested_at)}, feed {last.feed_state}, {counted(last.rows, 'row')}"
    if last.error_kind:
        message += f" ({last.error_kind}: {last.error_message})"
    if last.next_poll_at and now - last.next_poll_at > LATE:
        message += f"; the next one is {_duration(now - last.next_poll_at)} late"
        return Finding(name, Status.FAILED, message, "is `bourse produce` running? see its log and /readyz")
    if last.feed_state in {FeedState.FRESH, FeedState.IDLE}:
        return Finding(name, Status.OK, message)
    status = Status.FAILED if last.feed_state in {FeedState.DOWN, FeedState.FROZEN} else Status.WARNING
    return Finding(name, status, message, REMEDIES.get(last.error_kind or "", "docs/operate.md explains feed states"))


def judge_sources(markers: Sequence[PollMarker]) -> Finding:
    """Fail if more than one source has published lately: a prefix belongs to one producer at a time."""
    lately = [marker for marker in markers if marker.requested_at > markers[-1].requested_at - RECENT]
    sources = sorted({marker.source for marker in lately})
    if len(sources) > 1:
        message = f"{' and '.join(sources)} published within {_duration(RECENT)}"
        advice = "stop one, or give it a --topic-prefix of its own; after a change of --profile, wait"
        return Finding("sources", Status.FAILED, message, advice)
    return Finding("sources", Status.OK, ", ".join(sources) or "none has published")


def judge_groups(groups: Sequence[GroupLag], producers: str, now: datetime) -> list[Finding]:
    """Judge each consumer group by its members, its lag, and the age of the oldest record it has not read."""
    members = {group.group: group.members for group in groups}
    findings = []
    for group in groups:
        # A market consumer has its members in a group of their own.
        running = group.members + members.get(f"{group.group}-election", 0)
        name, message = "producers" if group.group == producers else "consumer", f"{group.group}: {running} running"
        if group.lag is None or group.oldest is None:
            findings.append(Finding(name, Status.OK, message + ", no lag" * (group.lag is not None)))
            continue
        age = max(now - datetime.fromtimestamp(group.oldest / 1000, UTC), timedelta(0))
        message += f", lag {group.lag} offsets, oldest unread record {_duration(age)} old"
        advice = "" if running and age <= BEHIND else "see its log and /readyz" if running else "start it, or delete it"
        findings.append(Finding(name, Status.WARNING if advice else Status.OK, message, advice))
    return findings


def _schemas(subject: Subject) -> Finding:
    """All subjects are registered with this release's schemas."""
    registry, prefix = subject.cluster.registry(), subject.cluster.prefix
    if problems := [problem for topic in TOPICS if (problem := registry.check(topic, prefix))]:
        more = f", and {len(problems) - 1} more (see `bourse schemas check`)" * (len(problems) > 1)
        return Finding("schemas", Status.FAILED, problems[0] + more)
    for topic in TOPICS:
        registry.serializer(topic, prefix)
    return Finding("schemas", Status.OK, f"all {len(TOPICS)} registered and compatible")


def _calendar(subject: Subject) -> Finding:
    """Holidays are known for some time to come."""
    calendar, now = subject.calendar.calendar(), datetime.now(UTC)
    today = now.astimezone(TEHRAN).date()
    message = f"next session {_time(calendar.next_session(now))}, holidays are known until {calendar.known_until}"
    if calendar.days_known(today) < KNOWN_DAYS:
        advice = "add later holidays, and known_until, to the file of --calendar"
        return Finding("calendar", Status.WARNING, message, advice)
    return Finding("calendar", Status.OK, message)


def _time(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def _duration(span: timedelta) -> str:
    minutes = span.total_seconds() / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h" if minutes < 2880 else f"{span.days} days"


# By name, with the check that it needs.
CHECKS: Mapping[str, tuple[Callable[[Subject], Finding | list[Finding]], str]] = {
    "exchange": (_exchange, ""),
    "token": (_token, "exchange"),
    "kafka": (_kafka, ""),
    "topics": (_topics, "kafka"),
    "schemas": (_schemas, ""),
    "polls": (_polls, "topics"),
    "calendar": (_calendar, ""),
}
