"""`bourse consume alerts`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer

__all__ = ["alerts"]


@click.command
@click.option("--rules", required=True, type=click.Path(path_type=Path), help="YAML file with the rules.")
def alerts(rules: Path) -> Consumer:
    """Raise price alerts by the rules of a file; read again when it changes, and at SIGHUP."""
    from bourse_consumers.alerts.consumer import Alerts

    consumer = Alerts(rules)

    def again(*_: object) -> None:
        consumer.reload = True

    signal.signal(signal.SIGHUP, again)
    return consumer
