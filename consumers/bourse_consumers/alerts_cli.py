"""`bourse alerts`: rules checked and tried out, and the alerts there are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import cluster_options
from bourse_schemas.errors import ConfigurationError, Undecodable
from bourse_schemas.events import TEHRAN
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, CANDLES

if TYPE_CHECKING:
    from bourse_consumers.alerts.rules import Rule
    from bourse_consumers.alerts.trial import Event
    from bourse_schemas.events import PriceAlert

__all__ = ["alerts"]

FILE = click.Path(path_type=Path)


@click.group
def alerts() -> None:
    """Check alert rules, try them out on past days, list the alerts there are."""


@alerts.command
def schema() -> None:
    """Print the JSON Schema of rules files, for editors."""
    from bourse_consumers.alerts.ruleset import schema as made

    click.echo(json.dumps(made(), indent=2, ensure_ascii=False))


@alerts.command
@click.argument("rules", metavar="FILE", type=FILE)
@click.option("--channels", type=FILE, help="The channels file: every `notify` must be in it.")
@cluster_options
@click.pass_context
def check(ctx: click.Context, cluster: Cluster, *, rules: Path, channels: Path | None) -> None:
    """Name every mistake in a rules file: line and key. Exit 2 where there is one.

    With --bootstrap-servers, or its variable, rules about instruments that bourse.candles does not have are named too.
    """
    from bourse_consumers.alerts.ruleset import load, strangers

    found = load(rules, _channels(channels))
    source = ctx.get_parameter_source("bootstrap_servers")
    lost = []
    if source not in {click.core.ParameterSource.DEFAULT, None}:
        lost = list(strangers(found, _candles(cluster)))
    if lost:
        raise ConfigurationError("\n".join(f"{rules}: {rule}: {why}" for rule, why in lost))
    click.echo(f"{rules}: {len(found)} rules, well")


def _channels(path: Path | None) -> list[str] | None:
    from bourse_consumers.yaml_file import parse

    if path is None:
        return None
    _, data = parse(path, "the channels")
    found = data.get("channels") if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path}: not a channels file: it has a mapping `channels`")
    return [str(name) for name in found]


def _candles(cluster: Cluster) -> Iterator[Any]:
    from bourse_schemas.events import Candle

    return _records(cluster, CANDLES.full_name(cluster.prefix), Candle)


def _records(cluster: Cluster, name: str, event: Any) -> Iterator[Any]:
    from bourse_schemas.reading import read

    decode = cluster.registry().deserializer(event)
    for record in read(cluster, name):
        try:
            yield decode(record.value)
        except Undecodable as error:
            click.echo(f"{name}-{record.place[1]}-{record.offset}: {error}", err=True)


@alerts.command
@click.argument("rules", metavar="RULES", type=FILE)
@click.option("--events", metavar="FILE|-", help="What `bourse replay --json` or `bourse tail --json` printed.")
@click.option("--archive", metavar="FOLDER|s3://…", help="An archive of trades, instead.")
@click.option("--days", metavar="A..B", help="Of the archive, these days; one alone is that day.")
@click.option("--cases", type=FILE, help="Unit tests of the rules, instead: events and the alerts they must bring.")
@click.option("--partitions", type=click.IntRange(1), help="Of bourse.trades. [default: as declared]")
@click.option("--json", "as_json", is_flag=True, help="One alert a line, with the fields of the topic.")
@click.pass_context
def test(
    ctx: click.Context,
    *,
    rules: Path,
    events: str | None,
    archive: str | None,
    days: str | None,
    cases: Path | None,
    partitions: int | None,
    as_json: bool,
) -> None:
    """Say what rules would have said of past events, or whether they say what their cases want. Exit 1 if not."""
    from msgspec.structs import asdict

    from bourse_consumers.alerts import trial
    from bourse_consumers.alerts.ruleset import load
    from bourse_schemas.codec import to_json
    from bourse_schemas.topics import TRADES

    found = load(rules)
    if (events is not None) + (archive is not None) + (cases is not None) != 1:
        raise ConfigurationError("give one of --events, --archive and --cases")
    if cases is not None:
        ctx.exit(_cases(cases, found))
    source = _archived(archive, days) if archive is not None else _lines(str(events))
    tried, summary, count = trial.Trial(found, partitions or TRADES.partitions), trial.Summary(), 0
    said: list[PriceAlert] = []
    for event in source:
        count += 1
        said += tried.take(event)
    for alert in sorted(said, key=lambda alert: alert.raised_at):
        summary.add(alert)
        click.echo(to_json(asdict(alert)) if as_json else _line(alert))
    if not as_json:
        click.echo("\n".join(["", *summary.lines(found), f"{count:,} events, {summary.fired.total():,} alerts"]))


def _cases(path: Path, rules: list[Rule]) -> int:
    from bourse_consumers.alerts.trial import cases

    failed = 0
    for name, wrong in cases(path, rules):
        failed += bool(wrong)
        click.echo(f"{'FAILED' if wrong else 'well'}  {name}")
        for line in wrong:
            click.echo(f"    {line}")
    return int(failed > 0)


def _lines(name: str) -> Iterator[Event]:
    from bourse_consumers.alerts.trial import read_events

    if name == "-":
        yield from read_events(sys.stdin.buffer, "standard input")
        return
    try:
        with Path(name).open("rb") as lines:
            yield from read_events(lines, name)
    except OSError as error:
        raise ConfigurationError(f"--events {name}: {error.strerror}") from error


def _archived(path: str, days: str | None) -> Iterator[Event]:
    import msgspec

    from bourse_consumers.archive.files import catalog, read
    from bourse_consumers.archive.store import Folder, StoreError, open_store
    from bourse_schemas.events import TradeEvent

    first, _, last = (days or "0001-01-01..9999-12-31").partition("..")
    try:
        begin, end = date.fromisoformat(first), date.fromisoformat(last or first)
    except ValueError:
        raise ConfigurationError(f"--days {days}: give days such as 2026-11-21..2026-11-25") from None
    store = open_store(path)
    if isinstance(store, Folder) and not Path(path).is_dir():
        raise ConfigurationError(f"--archive {path}: there is no such folder")
    try:
        files = [file for file in catalog(store) if file.rows and begin <= file.day <= end]
        if not files:
            raise ConfigurationError(f"--archive {path} has nothing of these days")
        for day in sorted({file.day for file in files}):
            table = read(store, [file for file in files if file.day == day])
            if "event_id" not in table.column_names:
                raise ConfigurationError(f"--archive {path}: rules are tried out on an archive of trades")
            ordered = table.sort_by([("_partition", "ascending"), ("_offset", "ascending")])
            for batch in ordered.select(list(TradeEvent.__struct_fields__)).to_batches(10_000):
                for row in batch.to_pylist():
                    yield msgspec.convert(row, TradeEvent)
    except StoreError as error:
        raise ConfigurationError(f"--archive {path}: cannot be read: {error}") from error


def _line(alert: PriceAlert) -> str:
    from bourse_schemas.events import Unit

    who = alert.symbol or alert.source
    observed = ""
    if alert.observed is not None:
        unit = {Unit.PERCENT: "%", Unit.NONE: "times"}.get(alert.unit, alert.unit.lower())
        # Plus nought: what rounds to -0 is 0.
        observed = f"{round(alert.observed, 2) + 0.0:,.2f}".removesuffix(".00") + f" {unit}"
    when = f"{alert.raised_at.astimezone(TEHRAN):%Y-%m-%d %H:%M:%S}"
    return f"{when}  {alert.state:<8}  {alert.rule}  {who}  {observed}  {alert.message or alert.condition}"


@alerts.command("list")
@click.option("--open", "only_open", is_flag=True, help="Only what is firing now: of its partition's last day.")
@click.option("--day", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="Of this trading day only.")
@click.option("--json", "as_json", is_flag=True, help="One alert a line, with the fields of the topic.")
@cluster_options
def list_alerts(cluster: Cluster, *, only_open: bool, day: Any, as_json: bool) -> None:
    """List the alerts on the topic, the newest last."""
    from msgspec.structs import asdict

    from bourse_schemas.codec import to_json
    from bourse_schemas.events import AlertState, PriceAlert

    found: list[PriceAlert] = list(_records(cluster, ALERTS.full_name(cluster.prefix), PriceAlert))
    found.sort(key=lambda alert: alert.raised_at)
    if day is not None:
        found = [alert for alert in found if alert.trading_day == day.date()]
    if only_open:
        ended = {alert.alert_id for alert in found if alert.state is AlertState.RESOLVED}
        last = max((alert.trading_day for alert in found), default=None)
        found = [alert for alert in found if alert.alert_id not in ended and alert.trading_day == last]
    if not found:
        click.echo("none", err=True)
    for alert in found:
        click.echo(to_json(asdict(alert)) if as_json else _line(alert))
