"""`bourse minutes`: what one company's trading was like, minute by minute, asked of the exchange directly."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime

import click

from bourse_producer.options import ExchangeOptions, exchange_options
from bourse_schemas.errors import ConfigurationError, counted
from bourse_schemas.events import TEHRAN, Candle

PRICES = ("last_price", "open_price", "high_price", "low_price", "closing_price")
COLUMNS = ("traded_at", *PRICES, "volume", "value", "trade_count")
HHMM = click.DateTime(["%H%M", "%H:%M"])
FORMS = click.Choice(["table", "csv", "json"])
NAMES = ("instrument", "symbol", "company_id", "is_right")


@click.command
@exchange_options
@click.option("--company-id", type=click.IntRange(min=1), required=True, help="The company's number, its CoID.")
@click.option("--rights", is_flag=True, help="The company's subscription right instead of its share.")
@click.option("--from", "begin", type=HHMM, metavar="HHMM", help="First minute. [default: start of the day]")
@click.option("--to", "end", type=HHMM, metavar="HHMM", help="Last minute. [default: now]")
@click.option("--format", "form", type=FORMS, default="table", show_default=True, help="json: one object a line.")
def minutes(
    exchange: ExchangeOptions, *, company_id: int, rights: bool, begin: datetime | None, end: datetime | None, form: str
) -> None:
    """Print one company's rows of the current day, minute by minute (Tehran time), with one charged call.

    Kafka is not needed. Whether the totals of a minute row are the day's so far is not documented.
    """
    from bourse_producer.calendar import Calendar
    from bourse_producer.patience import Call
    from bourse_producer.responses import Reading, parse_minutes
    from bourse_schemas.errors import ExchangeRefused

    if exchange.service.one_call:
        raise ConfigurationError(f"--profile {exchange.profile} has no minute rows: use trades-realtime")
    if begin and end and begin > end:
        raise ConfigurationError(f"--from {begin:%H%M} is after --to {end:%H%M}")
    first, last = (f"{each:%H%M}" if each else None for each in (begin, end))
    with ExitStack() as stack:
        client = exchange.connect(stack)
        click.echo("making one call, which the exchange charges if it succeeds", err=True)
        try:
            reply = client.fetch(Call.MINUTES, company_id=company_id, period=(first, last), rights=rights)
        except ExchangeRefused as error:
            raise ConfigurationError(f"the exchange refuses the call ({error.kind}): {error}") from error
    dated = reply.dated or reply.received_at
    day = Calendar().session_day(dated)
    reading = Reading(0, reply.received_at, dated, day, is_right=rights, track_id=reply.track_id)
    candles, rejected = parse_minutes(reply.body, reading)
    _print(candles, form)
    if not candles:
        click.echo("no rows: is the company listed, and was it traded in this period?", err=True)
    if rejected:
        click.echo(f"{counted(len(rejected), 'row')} cannot be used. The first: {rejected[0].letter.message}", err=True)


def _print(candles: Sequence[Candle], form: str) -> None:
    rows = [{name: getattr(candle, name) for name in (*NAMES, *COLUMNS)} for candle in candles]
    for row in rows:
        row["traded_at"] = row["traded_at"].astimezone(TEHRAN).isoformat(timespec="seconds")
        if form == "json":
            click.echo(json.dumps(row, ensure_ascii=False))
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, (*NAMES, *COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    elif form == "table" and rows:
        lines = [["time", *(name.removesuffix("_price") for name in COLUMNS[1:])]]
        for row in rows:
            numbers = ("-" if row[name] is None else f"{row[name]:,}" for name in COLUMNS[1:])
            lines.append([row["traded_at"][11:19], *numbers])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        first = candles[0]
        click.echo(f"{first.symbol} ({first.instrument}) on {first.trading_day}, prices and values in rial")
        for line in lines:
            click.echo("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
