"""`bourse consume archive-postgres`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from bourse_schemas.errors import ConfigurationError
from bourse_schemas.topics import TOPICS

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer

__all__ = ["archive_postgres", "require_no_password"]

ARCHIVED = {topic.name: topic for topic in TOPICS if topic.cleanup != "compact"}


@click.command
@click.option("--dsn", envvar="BOURSE_DSN", required=True, metavar="postgresql://…", help="Address of the database.")
@click.option("--topic", type=click.Choice(list(ARCHIVED)), default="trades", show_default=True, help="What to keep.")
@click.option("--schema", default="bourse", show_default=True, help="Schema of the tables.")
@click.option("--apply-schema", is_flag=True, help="Create the tables, or add the columns of this release.")
@click.option("--accept-loss", is_flag=True, help="Go on after records that the topic has deleted; record the hole.")
@click.pass_context
def archive_postgres(
    ctx: click.Context, dsn: str, topic: str, schema: str, *, apply_schema: bool, accept_loss: bool
) -> Consumer:
    """Write every event of a topic to PostgreSQL, exactly once.

    Set a password in BOURSE_DSN, PGPASSFILE or PGPASSWORD.
    """
    from bourse_consumers.postgres.sink import PostgresArchive

    if ctx.get_parameter_source("dsn") is ParameterSource.COMMANDLINE:
        require_no_password(dsn, "--dsn")
    return PostgresArchive(dsn, ARCHIVED[topic], schema=schema, apply_schema=apply_schema, accept_loss=accept_loss)


def require_no_password(dsn: str, option: str) -> None:
    """Raise ConfigurationError if an address from the command line is not one, or contains a password."""
    from bourse_consumers.postgres.sink import require_address

    if require_address(dsn, option).keys() & {"password", "sslpassword", "oauth_client_secret"}:
        raise ConfigurationError(f"{option} contains a password that others can see: use PGPASSFILE or PGPASSWORD")
