"""`bourse consume NAME`: a plug-in is a click command that returns a Consumer."""

from __future__ import annotations

import copy
from typing import Any

import click

from bourse_schemas.cli import LazyGroup
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster, cluster_options

__all__ = ["consume"]


@click.command
@click.option(
    "--group", metavar="GROUP", help="Consumer group. [default: the topics' prefix and the name, bourse-NAME]"
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="Most records the consumer gets at a time.",
)
@cluster_options
def _common(cluster: Cluster, group: str | None, batch_size: int) -> tuple[Cluster, str | None, int]:
    """Hold the options that every consumer has."""
    return cluster, group, batch_size


class Consumers(LazyGroup):
    """The consumers installed; each gets the common options beside its own and is run by us."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the plug-in's command with the common options."""
        plugin = super().get_command(ctx, cmd_name)
        if plugin is None:
            return None
        make, names = plugin.callback, {str(param.name) for param in _common.params}
        command = copy.copy(plugin)
        taken = names & {str(param.name) for param in plugin.params}
        if taken:
            raise ConfigurationError(f"the consumer {cmd_name!r} declares options of ours: {', '.join(sorted(taken))}")
        command.params = [*plugin.params, *_common.params]

        def start(**options: Any) -> None:
            ours = {name: options.pop(name) for name in names}
            from bourse_schemas.telemetry import configure_logging

            configure_logging(ctx.find_root().obj or "info")
            consumer = ctx.invoke(make, **options) if make else None
            cluster, group, batch_size = ctx.invoke(_common, **ours)
            _run(consumer, cmd_name, cluster, group, batch_size)

        command.callback = start
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the consumers there are where an unknown one is asked for."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = ", ".join(self.list_commands(ctx))
            raise ConfigurationError(f"no consumer {args[0]!r} is installed: there are {known}")
        return super().resolve_command(ctx, args)


@click.group(cls=Consumers, entry_point_group="bourse.consumers")
def consume() -> None:
    """Run a consumer: alerts, archive, or any plug-in that is installed."""


def _run(consumer: Any, name: str, cluster: Cluster, group: str | None, batch_size: int) -> None:
    from bourse_consumers.api import Consumer
    from bourse_consumers.kafka_stream import KafkaStream
    from bourse_consumers.runner import Runner, patiently

    if not isinstance(consumer, Consumer):
        raise ConfigurationError(f"the consumer {name!r} returned {type(consumer).__name__}, not a Consumer")
    stream = patiently(
        lambda: KafkaStream(cluster, group or f"{cluster.prefix}-{name}", consumer.topics, consumer.emits), name
    )
    if stream is None:
        return
    runner = Runner(consumer, stream, stream.decode, name=name, batch_size=batch_size)
    runner.stop_on_signals()
    runner.run()
