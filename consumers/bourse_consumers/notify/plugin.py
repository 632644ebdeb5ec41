"""`bourse consume notify`."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bourse_schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer
    from bourse_consumers.notify.channels import Channel

__all__ = ["channels_option", "notify", "read_channels"]

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class _Span(click.ParamType[timedelta]):
    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return a duration such as 30s, 5m, 1h or 2d."""
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"(\d{1,6})([smhd])", str(value).strip())
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is no duration such as 30s, 5m or 1h", param, ctx)
        return timedelta(**{UNITS[found[2]]: int(found[1])})


SPAN = _Span()
channels_option = click.option(
    "--channels", required=True, type=click.Path(path_type=Path), help="YAML file with the channels."
)


def read_channels(path: Path) -> dict[str, Channel]:
    """Return the channels of a file; raise ConfigurationError where they, or what sends to them, are not there."""
    try:
        from bourse_consumers.notify.channels import load
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"notifications need the module {error.name}: pip install 'bourse-stream[notify]'"
        ) from error
    return load(path)


@click.command
@channels_option
@click.option(
    "--max-age", type=SPAN, default="1h", show_default=True, help="Alerts older than this when read are summed up."
)
@click.option(
    "--give-up",
    type=SPAN,
    default="15m",
    show_default=True,
    help="How long a message is tried on a channel that fails.",
)
def notify(channels: Path, *, max_age: timedelta, give_up: timedelta) -> Consumer:
    """Send alerts to people: Telegram, mail, ntfy, webhooks and what else Apprise knows."""
    found = read_channels(channels)
    from bourse_consumers.notify.consumer import Notify

    return Notify(found, max_age=max_age, patience=give_up)
