"""`bourse demo`: the whole chain on this machine, watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bourse_sandbox.options import fault_option

__all__ = ["demo"]


@click.command
@click.option(
    "--replay", default="real", show_default=True, metavar="FILE|real", help="A captured day; real: 2019-08-21."
)
@click.option(
    "--speed",
    default="60",
    show_default=True,
    metavar="N|max",
    help="Market seconds per second; max: as fast as it goes.",
)
@click.option(
    "--broker",
    default="auto",
    show_default=True,
    metavar="auto|kafka|mock|HOST:PORT",
    help="auto: Apache Kafka, or librdkafka's mock cluster if Kafka is not available.",
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after N seconds. [default: at Ctrl-C]")
@click.option("--json", "as_json", is_flag=True, help="No screen; the last line of stdout is one JSON object.")
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
    help="Folder in which each run gets a folder for its archive and logs.",
)
@fault_option
@click.pass_context
def demo(ctx: click.Context, /, **given: Any) -> None:
    """Replay a real trading day through the whole chain: exchange, producer, Apache Kafka, alerts, archive."""
    from bourse_sandbox.chain import Options, run

    ctx.exit(run(Options(**given)))
