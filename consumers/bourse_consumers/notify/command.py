"""`bourse consume notify` and `bourse notify`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.inputs import parse_duration
from bourse_schemas.errors import BourseError, ConfigurationError

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer
    from bourse_consumers.notify.channels import Channel

__all__ = ["consume_notify", "notify"]


class _Span(click.ParamType[timedelta]):
    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return a duration such as 30s, 5m, 1h or 2d."""
        if isinstance(value, timedelta):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SPAN = _Span()
channels_option = click.option(
    "--channels", required=True, type=click.Path(path_type=Path), help="YAML file with the channels."
)


def _read_channels(path: Path) -> dict[str, Channel]:
    """Return the channels of a file; raise ConfigurationError where they, or what sends to them, are not there."""
    try:
        from bourse_consumers.notify.channels import load
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"notifications need the module {error.name}: pip install 'bourse-stream[notify]'"
        ) from error
    return load(path)


@click.command("notify")
@channels_option
@click.option(
    "--max-age",
    type=SPAN,
    default="1h",
    show_default=True,
    help="Of alerts older than this when they are read, send only the number.",
)
@click.option(
    "--give-up",
    type=SPAN,
    default="15m",
    show_default=True,
    help="How long to try a channel that fails.",
)
def consume_notify(channels: Path, *, max_age: timedelta, give_up: timedelta) -> dict[str, Consumer]:
    """Send alerts to people: Telegram, mail, ntfy, webhooks and what else Apprise supports."""
    found = _read_channels(channels)
    from bourse_consumers.notify.consumer import Notify

    return {name: Notify(name, found, max_age=max_age, patience=give_up) for name in found}


@click.group
def notify() -> None:
    """Test the channels of alerts."""


@notify.command
@click.argument("channel")
@channels_option
def test(*, channel: str, channels: Path) -> None:
    """Send a sample to a channel. Exit 1 if it does not accept it."""
    found = _read_channels(channels)
    from bourse_consumers.notify import words
    from bourse_consumers.notify.sending import NotSent

    if channel not in found:
        raise ConfigurationError(f"{channels} has no channel {channel!r}: there are {', '.join(found)}")
    text = words.sample(channel, words.example(datetime.now(UTC)), found[channel].policy.manner)
    try:
        found[channel].sender.send(text)
    except NotSent as error:
        raise BourseError(f"channel {channel} does not accept it: {error}") from None
    click.echo(f"sent to {channel}:\n{text.title}\n{text.body}")
