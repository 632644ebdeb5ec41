"""Options that the commands of the sandbox share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def _list_faults(ctx: click.Context, _: click.Parameter, faults: tuple[str, ...]) -> tuple[str, ...]:
    if "help" in faults:
        from bourse_sandbox.faults import KINDS

        click.echo("\n".join(f"{kind:<20}{doc}" for kind, doc in KINDS.items()))
        ctx.exit()
    return faults


fault_option = click.option(
    "--fault",
    "faults",
    metavar="KIND[:PROBABILITY|@CALL]",
    multiple=True,
    callback=_list_faults,
    help="Misbehave: always, with a probability, at one call for all shares, or from one call to another (@7-20). "
    "Repeatable; `--fault help` lists the kinds.",
)
"""Adds `--fault` to a command, which gets `faults: tuple[str, ...]`."""


def market_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose a market to a command."""
    instruments = "How many shares and rights. [default: the day's own]"
    days = "How many trading days, repetitions included. [default: no end, 1 with --advance poll]"
    advance = "What moves the day on: each accepted call for all shares, or the market's clock."
    replay = "The captured day; real: 2019-08-21, which is bundled."
    for option in (
        fault_option,
        click.option("--instruments", type=click.IntRange(1, 300_000), help=instruments),
        click.option("--days", type=click.IntRange(1), help=days),
        click.option(
            "--advance", type=click.Choice(["poll", "clock"]), default="clock", show_default=True, help=advance
        ),
        click.option("--replay", metavar="FILE|real", default="real", show_default=True, help=replay),
    ):
        command = option(command)
    return command
