"""`bourse sandbox`: the outside world, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bourse_cli.root import LazyGroup
from bourse_sandbox.faults import fault_option

__all__ = ["sandbox", "up"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=LazyGroup, entry_point_group="bourse.sandbox")
def sandbox() -> None:
    """Practise: an exchange, Apache Kafka and a registry on this machine, without account, Docker or Java."""


def _port(whose: str) -> Callable[[F], F]:
    text = f"Port of the {whose}. [default: any free one]".replace("the kafka", "Kafka")
    return click.option(f"--{whose}-port", type=click.IntRange(0, 65535), default=0, help=text)


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as one JSON object.")
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), help="Keep Kafka's data here. [default: nowhere]"
)
@click.option("--produce", "producing", is_flag=True, help="Run a producer too, which polls once a second.")
@_port("exchange")
@_port("kafka")
@_port("registry")
@click.option("--replay", metavar="FILE|real", help="A captured day instead of the simulated market.")
@click.option("--advance", type=click.Choice(["poll", "clock"]), default="clock", show_default=True)
@click.option(
    "--speed", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="Market seconds a second."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the simulated market.")
@fault_option
def up(
    *,
    as_json: bool,
    data: Path | None,
    producing: bool,
    exchange_port: int,
    kafka_port: int,
    registry_port: int,
    replay: str | None,
    advance: str,
    speed: float,
    seed: int,
    faults: tuple[str, ...],
) -> None:
    """Run exchange, Kafka and registry, topics and schemas in place, until Ctrl-C."""
    import json
    import signal
    import sys
    import tempfile
    import threading
    from contextlib import ExitStack

    from bourse_sandbox.exchange import practice_exchange
    from bourse_sandbox.processes import spawn
    from bourse_sandbox.show import program
    from bourse_sandbox.stack import CLIENT_ID, NID, SECRET, Stack, private_file

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    practice = practice_exchange(
        replay, advance, speed=speed, seed=seed, faults=faults, client_id=CLIENT_ID, client_secret=SECRET
    )
    with (
        tempfile.TemporaryDirectory(prefix="bourse-sandbox-") as folder,
        practice.serve(port=exchange_port) as exchange,
        Stack("kafka", kafka_data=data, kafka_port=kafka_port, registry_port=registry_port) as stack,
        ExitStack() as running,
    ):
        secret_file = private_file(Path(folder) / "client-secret", SECRET)
        nid_file = private_file(Path(folder) / "nid", NID)
        cluster = stack.cluster
        if as_json:
            addresses = {
                "bootstrap_servers": cluster.bootstrap_servers,
                "registry_url": cluster.registry_url,
                "exchange_url": exchange.url,
                "client_id": CLIENT_ID,
                "client_secret_file": str(secret_file),
                "nid": NID,
            }
            click.echo(json.dumps(addresses))
        else:
            at = f"--bootstrap-servers {cluster.bootstrap_servers} --registry-url {cluster.registry_url}"
            topic, bourse = f"{cluster.prefix}.trades", program("bourse")
            account = (
                f"--schedule always --clock response --address {exchange.url} --client-id {CLIENT_ID} "
                f"--client-secret-file {secret_file} --nid-file {nid_file} {at}"
            )
            click.echo(
                f"Kafka      {cluster.bootstrap_servers}\n"
                f"registry   {cluster.registry_url}\n"
                f"exchange   {exchange.url}\n\n"
                "In another terminal:\n"
                + (not producing)
                * (f"  {bourse} produce --once {account}\n  {bourse} produce --poll-seconds 1 {account}\n")
                + f"  {bourse} doctor {account}\n"
                f"  {bourse} tail trades --from-beginning {at}\n"
                f"  {bourse} watch {at}\n"
                f"  kcat -b {cluster.bootstrap_servers} -t {topic} -C -o beginning -f '%k %o %S bytes\\n' -e\n\n"
                "Ctrl-C ends it."
            )
        if producing:
            command = [sys.executable, "-m", "bourse_cli", "--log-level", "warning", "produce"]
            how = ["--poll-seconds", "1", "--schedule", "always", "--clock", "response", "--address", exchange.url]
            child = running.enter_context(spawn([*command, *how], env=stack.environment, inherit_terminal=True))
            while not stop.wait(0.5):
                if child.poll() is not None:
                    raise click.ClickException("the producer has ended")
        stop.wait()
