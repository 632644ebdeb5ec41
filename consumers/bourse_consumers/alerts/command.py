"""`bourse consume alerts` and `bourse alerts`: rules checked and tried out, and the alerts that were raised."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator, Sequence
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import cluster_options, language_option
from bourse_schemas.errors import ConfigurationError, Undecodable, counted, printable
from bourse_schemas.events import TEHRAN, AlertState, Candle, PollMarker, PriceAlert, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, CANDLES, POLLS, TRADES

if TYPE_CHECKING:
    from bourse_consumers.alerts.trial import Past
    from bourse_consumers.api import MarketConsumer

PATH = click.Path(path_type=Path)
DAY = click.DateTime(["%Y-%m-%d"])
SHOWN = 20


@click.command("alerts")
@click.option(
    "--rules", required=True, multiple=True, type=PATH, help="YAML file with rules, or a folder of them. Repeatable."
)
def consume(rules: tuple[Path, ...]) -> MarketConsumer:
    """Raise alerts by the rules of files, which are read again when they change, and at SIGHUP."""
    from bourse_consumers.alerts.consumer import Alerts
    from bourse_consumers.alerts.rules_file import RuleFiles

    consumer = Alerts(RuleFiles(rules))

    def again(*_: object) -> None:
        consumer.reload = True

    signal.signal(signal.SIGHUP, again)
    return consumer


@click.group
def alerts() -> None:
    """Check alert rules, try them out on past days, list the alerts that were raised."""


@alerts.command
@click.argument("rules", nargs=-1, required=True, metavar="RULES…", type=PATH)
@click.option("--channels", type=PATH, help="Channels file: every `notify` must be in it.")
@language_option
@cluster_options
@click.pass_context
def check(
    ctx: click.Context, cluster: Cluster, *, rules: tuple[Path, ...], channels: Path | None, language: str
) -> None:
    """Print every mistake in files of rules, with a corrected line. Exit 2 if there is one.

    With --bootstrap-servers, or its variable, names that no instrument of bourse.candles has are mistakes too.
    """
    from bourse_consumers.alerts.rules_file import RuleFiles, strangers

    found = RuleFiles(rules, _channels(channels), language).rules
    if _asked(ctx):
        known = {candle.instrument: candle.symbol for candle in _events(cluster, CANDLES, Candle)}
        if lost := list(strangers(found, known, language)):
            RuleFiles(rules, language=language, known=known)
            raise ConfigurationError("\n".join(lost))
    click.echo(f"{', '.join(map(str, rules))}: {len(found)} rules, ok")


@alerts.command("try")
@click.argument("expression")
@click.option("--file", "files", multiple=True, type=PATH, help="Captures or captured days instead. Repeatable.")
@language_option
@cluster_options
@click.pass_context
def try_out(ctx: click.Context, cluster: Cluster, *, expression: str, files: tuple[Path, ...], language: str) -> None:
    """Show for which instruments EXPRESSION holds.

    With --bootstrap-servers, or its variable: now, by the topics. Else: when it held on the real day that ships with
    the sandbox, or in the files.
    """
    from bourse_consumers.alerts.expressions import corrected
    from bourse_consumers.alerts.rules_file import compile_rule
    from bourse_consumers.alerts.trial import Trial, past
    from bourse_consumers.mistakes import Mistake, explain
    from bourse_consumers.yaml_file import pointed

    try:
        rule = compile_rule(expression)
    except Mistake as mistake:
        at, end = mistake.at, len(expression) if mistake.end is None else mistake.end
        shown = pointed(expression, at, end, corrected(expression, compile_rule), language)
        raise ConfigurationError(f"{printable(explain(mistake, language))}{shown}") from None
    live = _asked(ctx) and not files
    trial = Trial([rule]).run(_topics(cluster, last_day=True) if live else past(files))
    fired = _open(trial.alerts) if live else trial.episodes()[0].fired
    for alert in fired[: None if live else SHOWN]:
        click.echo(_line(alert))
    if len(fired) > SHOWN and not live:
        click.echo(f"… and {len(fired) - SHOWN:,} more")
    click.echo(next(trial.summary()))
    who, held = len({alert.instrument for alert in fired}), "holds now" if live else "held"
    click.echo(f"{held} for {counted(who, 'instrument')}, {counted(len(fired), 'episode')}")


@alerts.command
@click.argument("rules", metavar="RULES", type=PATH)
@click.argument("files", nargs=-1, metavar="[FILE|-]…", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--topics", is_flag=True, help="Try them on what the topics hold, instead of files.")
@click.option("--day", "days", multiple=True, type=DAY, metavar="DATE", help="Only on this day. Repeatable.")
@click.option("--list", "form", flag_value="list", help="Print every alert, one a line.")
@click.option("--json", "form", flag_value="json", help="Print every alert as JSON, with the fields of the topic.")
@click.option("--csv", "form", flag_value="csv", help="Print every alert as CSV.")
@click.option("--html", type=PATH, help="Write a page with charts to this file.")
@click.option(
    "--instrument",
    "instruments",
    multiple=True,
    help="Symbol or code to chart. Repeatable. [default: the six with most episodes]",
)
@cluster_options
def test(
    cluster: Cluster, *, rules: Path, files: tuple[Path, ...], topics: bool, days: tuple[datetime, ...],
    form: str | None, html: Path | None, instruments: tuple[str, ...],
) -> None:  # fmt: skip
    """Show what rules would have raised in the past: on the real day that ships with the sandbox, or in files.

    FILE is a capture of the producer, a captured day, an archive's folder, or what `replay --json` and `tail --json`
    print.
    """
    from bourse_consumers.alerts.rules_file import RuleFiles, strangers
    from bourse_consumers.alerts.trial import Trial, days_of, past

    if topics and files:
        raise ConfigurationError("give files or --topics, not both")
    found, dates = RuleFiles([rules]).rules, {day.date() for day in days}
    polls_on = partial(_topics, cluster) if topics else partial(past, files)
    polls = polls_on(dates)
    if missing := dates - days_of(polls):
        there = ", ".join(map(str, sorted(days_of(polls_on()))[-SHOWN:]))
        raise ConfigurationError(f"--day {min(missing)}: nothing is known of that day; the days are: {there or 'none'}")
    if html is not None:
        _write(html)
    trial = Trial(found).run(polls)
    if html is not None:
        from bourse_consumers.alerts.report import page

        _write(html, page(trial, instruments))
    if form == "csv":
        _csv(trial.alerts)
    elif form is not None:
        for alert in trial.alerts:
            click.echo(_line(alert, as_json=form == "json"))
    else:
        for line in (*strangers(found, trial.symbols), *trial.summary()):
            click.echo(printable(line))


@alerts.command("list")
@click.option("--open", "only_open", is_flag=True, help="Only what is firing now, on the latest trading day there.")
@click.option("--day", type=DAY, metavar="DATE", help="Of this trading day only.")
@click.option("--json", "as_json", is_flag=True, help="One alert a line, with the fields of the topic.")
@cluster_options
def list_alerts(cluster: Cluster, *, only_open: bool, day: Any, as_json: bool) -> None:
    """List the alerts on the topic, the newest last."""
    found = sorted(_events(cluster, ALERTS, PriceAlert), key=lambda alert: alert.raised_at)
    found = _open(found) if only_open else found
    if day is not None:
        found = [alert for alert in found if alert.trading_day == day.date()]
    if not found:
        click.echo("none", err=True)
    for alert in found:
        click.echo(_line(alert, as_json=as_json))


def _open(found: Sequence[PriceAlert]) -> list[PriceAlert]:
    """Return those of the latest trading day that have not ended."""
    latest = max((alert.trading_day for alert in found), default=None)
    ended = {alert.alert_id for alert in found if alert.state is AlertState.RESOLVED}
    return [alert for alert in found if alert.trading_day == latest and alert.alert_id not in ended]


def _asked(ctx: click.Context) -> bool:
    """Return whether the operator named a cluster."""
    source = ctx.get_parameter_source("bootstrap_servers")
    return source not in {click.core.ParameterSource.DEFAULT, None}


def _channels(path: Path | None) -> list[str] | None:
    from bourse_consumers.yaml_file import Document

    if path is None:
        return None
    found = Document(path, "--channels").data.get("channels")
    if not isinstance(found, dict) or not found:
        raise ConfigurationError(f"{path}: not a channels file: it has a mapping `channels`")
    return [*found]


def _events(cluster: Cluster, topic: Any, event: type[Any]) -> Iterator[Any]:
    from bourse_schemas.reading import read

    name, decode = topic.full_name(cluster.prefix), cluster.registry().deserializer(event)
    for record in read(cluster, name):
        try:
            yield decode(record.value)
        except Undecodable as error:
            click.echo(f"{name}-{record.place[1]}-{record.offset}: {error}", err=True)


def _topics(cluster: Cluster, days: Collection[date] = (), *, last_day: bool = False) -> list[Past]:
    from bourse_consumers.alerts.trial import day_of, polls_of

    polls = polls_of((*_events(cluster, POLLS, PollMarker), *_events(cluster, TRADES, TradeEvent)), days)
    latest = max((event.trading_day for poll in polls for event in poll.events), default=None)
    return [poll for poll in polls if day_of(poll.marker) == latest] if last_day else polls


def _write(html: Path, text: str | None = None) -> None:
    """Write a page; without a text only see that it can be written."""
    try:
        with html.open("a" if text is None else "w", encoding="utf-8") as file:
            file.write(text or "")
    except OSError as error:
        raise ConfigurationError(f"--html: {html} cannot be written: {error.strerror}") from error


def _line(alert: PriceAlert, *, as_json: bool = False) -> str:
    from msgspec.structs import asdict

    from bourse_schemas.codec import to_json

    if as_json:
        return to_json(asdict(alert))
    texts = alert.message or {}
    values = ", ".join(f"{name} = {value:,.6g}" for name, value in alert.values.items())
    who = f"{alert.symbol or alert.source} ({alert.instrument})" if alert.instrument else alert.source
    text = texts.get("en") or next(iter(texts.values()), values)
    when = f"{alert.raised_at.astimezone(TEHRAN):%Y-%m-%d %H:%M:%S}"
    return printable(f"{when}  {alert.state.value:<8}  {alert.rule}  {who}  {text}")


def _csv(found: Sequence[PriceAlert]) -> None:
    import csv
    import json
    import sys

    names = ("raised_at", "state", "rule", "instrument", "symbol", "last_price", "since", "resolved_by", "alert_id")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*names, "values"])
    for alert in found:
        cells: dict[str, Any] = {name: getattr(alert, name) for name in names}
        for name in ("raised_at", "since"):
            cells[name] = cells[name].astimezone(TEHRAN).isoformat()
        texts = (cell and printable(str(cell)) for cell in cells.values())
        writer.writerow([*texts, json.dumps(alert.values, ensure_ascii=False)])
