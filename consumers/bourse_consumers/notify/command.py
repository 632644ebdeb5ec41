"""`bourse consume notify` and `bourse notify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_cli.options import duration_option, language_option
from bourse_schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from bourse_consumers.notify.consumer import Notify


def _consumers(path: Path, language: str = "en", only: str | None = None, **options: Any) -> dict[str, Notify]:
    try:
        from bourse_consumers.notify.channels import load
        from bourse_consumers.notify.consumer import consumer_of
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"notifications need the module {error.name}: in the folder of bourse-stream run pip install '.[notify]'"
        ) from error
    channels = load(path, language=language, only=only)
    if only is not None and only not in channels:
        raise ConfigurationError(f"{path} has no channel {only!r}: there are {', '.join(channels)}")
    return {name: consumer_of(name, channels, **options) for name in channels if only in {None, name}}


CHANNELS = click.option(
    "--channels", required=True, type=click.Path(path_type=Path), help="YAML file with the channels."
)


@click.command("notify")
@CHANNELS
@duration_option("--max-age", "1h", "Of alerts that are older when they are read, send only the number.")
@duration_option("--give-up", "15m", "Send alerts to the fallback and to dead letters if a channel fails for longer.")
@click.option("--from-start", is_flag=True, help="Begin a new channel with the oldest alert. [default: with the next]")
def consume_notify(channels: Path, **options: Any) -> dict[str, Notify]:
    """Send alerts to people and programs: Telegram, mail, webhooks, Alertmanager and what else Apprise supports."""
    return _consumers(channels, **options)


@click.group
def notify() -> None:
    """Test the channels of alerts."""


@notify.command
@click.argument("channel")
@CHANNELS
@language_option
def test(*, channel: str, channels: Path, language: str) -> None:
    """Send a sample to a channel. Exit 1 if it does not accept it, 2 with every mistake in the file.

    Of the secrets only those of the channel are read.
    """
    text = _consumers(channels, language, channel)[channel].test()
    click.echo(f"sent to {channel}:\n{text}")
