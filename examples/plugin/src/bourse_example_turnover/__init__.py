"""A consumer of your own: prints when much was traded in one instrument between two polls."""

from collections.abc import Sequence

import click

from bourse_consumers.api import Batch, Consumer, Emit


class Turnover(Consumer):
    """Prints every change whose value is at least `rial`."""

    def __init__(self, rial: int) -> None:
        self.rial = rial

    def process(self, batch: Batch) -> Sequence[Emit] | None:
        """Print the large ones; when this returns, the batch is done."""
        for event in batch.events:
            if event.value_delta >= self.rial:
                click.echo(f"{event.instrument} {event.value_delta:,} rial {event.symbol}")
        return None


@click.command
@click.option("--rial", default=10_000_000_000, show_default=True, help="From this value on.")
def turnover(rial: int) -> Turnover:
    """Print large turnovers."""
    return Turnover(rial)
