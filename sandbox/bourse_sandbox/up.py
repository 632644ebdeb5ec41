"""`bourse sandbox up`: practice exchange, Kafka and registry on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bourse_cli.root import LazyGroup
from bourse_sandbox.options import market_options

F = TypeVar("F", bound=Callable[..., Any])
CHECK_SECONDS = 0.5
FOLDER, SPEED = click.Path(file_okay=False, path_type=Path), click.FloatRange(0, min_open=True)
DATA_HELP = "Keep Kafka's records and the registry's schemas in this folder. [default: a temporary one]"


@click.group(cls=LazyGroup, entry_point_group="bourse.sandbox")
def sandbox() -> None:
    """Practise: an exchange, Apache Kafka and a registry on this machine, without account, Docker or Java."""


def _port(name: str, server: str) -> Callable[[F], F]:
    text = f"Port of {server}. [default: any free one]"
    return click.option(f"--{name}-port", type=click.IntRange(0, 65535), default=0, help=text)


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as one JSON object.")
@click.option("--data", type=FOLDER, help=DATA_HELP)
@click.option("--produce", "producing", is_flag=True, help="Run a producer too, which polls once a second.")
@_port("exchange", "the exchange")
@_port("kafka", "Kafka")
@_port("registry", "the registry")
@click.option("--speed", type=SPEED, default=60.0, show_default=True, help="Market seconds per second.")
@market_options
def up(
    *,
    as_json: bool,
    data: Path | None,
    producing: bool,
    exchange_port: int,
    kafka_port: int,
    registry_port: int,
    **market: Any,
) -> None:
    """Run exchange, Kafka and registry, with topics and schemas, until Ctrl-C."""
    import json
    import tempfile
    from contextlib import ExitStack, suppress

    from bourse_sandbox.exchange import practice_exchange
    from bourse_sandbox.processes import interruptible, spawn
    from bourse_sandbox.stack import BOURSE, CLIENT_ID, NID, SECRET, Stack, private_file, program
    from bourse_schemas.errors import BourseError
    from bourse_schemas.watchdog import stop_on_signals

    stop = stop_on_signals()
    with (
        suppress(KeyboardInterrupt),
        interruptible(),
        tempfile.TemporaryDirectory(prefix="bourse-sandbox-") as folder,
        (practice := practice_exchange(client_id=CLIENT_ID, client_secret=SECRET, **market)).serve(
            port=exchange_port
        ) as exchange,
        Stack("kafka", data=data, kafka_port=kafka_port, registry_port=registry_port) as stack,
        ExitStack() as ours,
    ):
        secret_file = private_file(Path(folder) / "client-secret", SECRET)
        nid_file = private_file(Path(folder) / "nid", NID)
        kafka, registry, bourse = stack.cluster.bootstrap_servers, stack.cluster.registry_url, program("bourse")
        day = practice.state()["market_time"][:10]
        timing = ["--schedule", "always", "--clock", "response", "--address", exchange.url]
        if as_json:
            addresses = {"bootstrap_servers": kafka, "registry_url": registry, "exchange_url": exchange.url}
            account = {"client_id": CLIENT_ID, "client_secret_file": str(secret_file), "nid": NID}
            click.echo(json.dumps(addresses | account))
        else:
            at = f"--bootstrap-servers {kafka} --registry-url {registry}"
            login = f"--client-id {CLIENT_ID} --client-secret-file {secret_file} --nid-file {nid_file}"
            produce = f"  {bourse} produce --poll-seconds 1 {' '.join(timing)} {login} {at}\n"
            click.echo(
                f"Kafka      {kafka}\nregistry   {registry}\nexchange   {exchange.url} (simulated, {day})\n\n"
                f"In another terminal:\n{'' if producing else produce}"
                f"  {bourse} tail trades --from-beginning {at}\n  {bourse} watch {at}\n"
                f"  kcat -b {kafka} -t {stack.cluster.prefix}.trades -C -o beginning -f '%k %o %S bytes\\n' -e\n\n"
                "Ctrl-C ends it."
            )
        command = [*BOURSE, "--log-level", "warning", "produce", "--poll-seconds", "1", *timing]
        child = ours.enter_context(spawn(command, env=stack.environment, inherit_terminal=True)) if producing else None
        while not stop.wait(CHECK_SECONDS):
            stack.require_running()
            if not exchange.running:
                raise BourseError("the practice exchange has ended")
            if child is not None and (code := child.poll()) is not None:
                raise BourseError(f"the producer has ended with exit code {code}")
