"""`bourse demo`: the whole chain on this machine, watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bourse_sandbox.faults import fault_option

__all__ = ["demo"]


@click.command
@click.option("--replay", metavar="FILE|real", help="A captured day instead of the simulated market; real: 2019-08-21.")
@click.option(
    "--speed",
    default="60",
    show_default=True,
    metavar="N|max",
    help="Market seconds a second; max: a captured day as fast as it goes.",
)
@click.option(
    "--broker",
    default="auto",
    show_default=True,
    metavar="auto|kafka|mock|HOST:PORT",
    help="auto: Apache Kafka, or where it cannot be had librdkafka's mock cluster.",
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after so long. [default: at Ctrl-C]")
@click.option("--json", "as_json", is_flag=True, help="No screen; the last line of stdout is one JSON object.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the simulated market.")
@click.option(
    "--rules",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Alert rules. [default: examples/rules.yaml as shipped]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Where a folder for this run is made: Parquet files and logs.",
)
@fault_option
@click.option(
    "--kill-every",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Kill the services in turn, as kill -9 does, and start them again; the summary says what came of it.",
)
@click.pass_context
def demo(ctx: click.Context, /, **options: Any) -> None:
    """Run everything: practice exchange → producer → Apache Kafka → alerts and archive, and watch it."""
    from bourse_sandbox.faults import Fault
    from bourse_sandbox.show import Options, run

    chosen = Options(**options)
    for fault in chosen.faults:
        Fault.parse(fault)
    if chosen.rules is not None:
        from bourse_consumers.alerts.ruleset import load

        load(chosen.rules)
    ctx.exit(run(chosen))
