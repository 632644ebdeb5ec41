"""`bourse notify`: tries a channel out."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from bourse_consumers.notify.plugin import channels_option, read_channels
from bourse_schemas.errors import BourseError, ConfigurationError

__all__ = ["notify"]


@click.group
def notify() -> None:
    """Try the channels of alerts out."""


@notify.command
@click.argument("channel")
@channels_option
def test(*, channel: str, channels: Path) -> None:
    """Send a sample to a channel: in its language, on its way. Exit 1 where it does not take it."""
    found = read_channels(channels)
    from bourse_consumers.notify import words
    from bourse_consumers.notify.sending import NotSent

    if channel not in found:
        raise ConfigurationError(f"{channels} has no channel {channel!r}: there are {', '.join(found)}")
    text = words.sample(channel, words.example(datetime.now(UTC)), found[channel].policy.manner)
    try:
        found[channel].sender.send(text)
    except NotSent as error:
        raise BourseError(f"channel {channel} does not take it: {error}") from None
    click.echo(f"sent to {channel}:\n{text.title}\n{text.body}")
