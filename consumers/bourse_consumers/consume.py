"""`bourse consume NAME`: a plug-in is a click command that returns a consumer, or several by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import click

from bourse_cli.health import Monitor
from bourse_cli.options import cluster_options, http_option
from bourse_cli.root import LazyGroup
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.watchdog import stop_on_signals


@click.command
@click.option(
    "--group", metavar="GROUP", help="Consumer group. [default: the topics' prefix and the name: bourse-NAME]"
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 100_000),
    help="The most records the consumer gets at a time. [default: the consumer's own, usually 1000]",
)
@click.option(
    "--max-rejected-share",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Stop if more than this share of the last 200 records, and at least 20, was rejected; 1 never stops.",
)
@http_option
@cluster_options
def _common(**ours: Any) -> dict[str, Any]:
    """Hold the options that every consumer has."""
    return ours


class Consumers(LazyGroup):
    """The installed consumers; each gets the common options next to its own."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the plug-in's command with the common options."""
        plugin = super().get_command(ctx, cmd_name)
        if plugin is None:
            return None
        make, names = plugin.callback, {str(param.name) for param in _common.params}
        taken = {spelling for param in plugin.params for spelling in (param.name, *param.opts)} & {
            spelling for param in _common.params for spelling in (param.name, *param.opts)
        }
        command = copy.copy(plugin)
        command.params = [*plugin.params, *(() if taken else _common.params)]

        def start(**options: Any) -> None:
            if taken:
                clash = ", ".join(sorted(map(str, taken)))
                raise ConfigurationError(f"the consumer {cmd_name!r} declares options that every consumer has: {clash}")
            ours = {name: options.pop(name) for name in names}
            from bourse_cli.logs import configure_logging

            configure_logging(ctx.find_root().obj or "info")
            made = make(**options) if make else None
            _run(made, cmd_name, **click.get_current_context().invoke(_common, **ours))

        command.callback = start
        return command


@click.group(cls=Consumers, entry_point_group="bourse.consumers")
def consume() -> None:
    """Run a consumer: alerts, notify, archive, or any plug-in that is installed."""


def _run(made: Any, name: str, cluster: Cluster, group: str | None, http: str | None, **limits: Any) -> None:
    from bourse_cli.logs import get_logger
    from bourse_consumers.api import Consumer, MarketConsumer

    parts = made if isinstance(made, Mapping) else {"": made}
    for each in parts.values():
        if not isinstance(each, Consumer | MarketConsumer):
            raise ConfigurationError(f"the consumer {name!r} returned {type(each).__name__}, not a Consumer")
    stop, monitor, group = stop_on_signals(), Monitor(name), group or f"{cluster.prefix}-{name}"
    with monitor.serve(http) as url:
        if url:
            get_logger(consumer=name).info("answering", url=url)
            cluster = replace(cluster, on_statistics=monitor.statistics)
        limits |= {"cluster": cluster, "stop": stop}
        if parts is not made:  # in the thread that made it
            return _serve(made, group=group, name=name, monitor=monitor, **limits)
        with ThreadPoolExecutor(len(made)) as pool:
            health = {key: monitor.part(key) for key in made}
            runs = [
                pool.submit(_serve, each, group=f"{group}-{key}", name=f"{name}-{key}", monitor=health[key], **limits)
                for key, each in made.items()
            ]
            try:
                for run in as_completed(runs):
                    run.result()
            finally:  # one that failed ends the others
                stop.set()


def _serve(
    consumer: Any, *, cluster: Cluster, group: str, name: str, stop: threading.Event, monitor: Monitor, **limits: Any
) -> None:
    """Run one consumer until it is stopped."""
    from bourse_consumers.api import MarketConsumer
    from bourse_consumers.kafka_market import KafkaMarket
    from bourse_consumers.kafka_stream import KafkaStream
    from bourse_consumers.runner import Runner, Stream, connect

    def make() -> Stream:
        if isinstance(consumer, MarketConsumer):
            return KafkaMarket(cluster, group, consumer.emits)
        return KafkaStream(cluster, group, consumer.topics, consumer.emits, from_end=consumer.from_end)

    if stream := connect(make, name, stop, monitor):
        Runner(consumer, stream, name=name, stop=stop, monitor=monitor, **limits).run()
