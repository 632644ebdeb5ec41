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


@click.command
@click.option(
    "--dsn",
    envvar="BOURSE_DSN",
    required=True,
    metavar="postgresql://…",
    help="The database. A password belongs into BOURSE_DSN, PGPASSFILE or PGPASSWORD.",
)
@click.option(
    "--topic",
    type=click.Choice([topic.name for topic in TOPICS]),
    default="trades",
    show_default=True,
    help="Which topic to keep; each has a table of its own.",
)
@click.option("--schema", default="bourse", show_default=True, help="The database's schema that holds the tables.")
@click.option("--apply-schema", is_flag=True, help="Make the tables, or add the columns of this release.")
@click.option(
    "--accept-loss", is_flag=True, help="Go on where the topic has deleted what the archive lacks; the hole is noted."
)
@click.pass_context
def archive_postgres(
    ctx: click.Context, dsn: str, topic: str, schema: str, *, apply_schema: bool, accept_loss: bool
) -> Consumer:
    """Write every event of a topic to PostgreSQL, exactly once."""
    from bourse_consumers.postgres.sink import PostgresArchive

    if ctx.get_parameter_source("dsn") is ParameterSource.COMMANDLINE:
        require_no_password(dsn, "--dsn")
    declared = next(each for each in TOPICS if each.name == topic)
    return PostgresArchive(dsn, declared, schema=schema, apply_schema=apply_schema, accept_loss=accept_loss)


def require_no_password(dsn: str, option: str) -> None:
    """Raise ConfigurationError where an address given on the command line is none, or holds a password."""
    from bourse_consumers.postgres.sink import require_address

    if require_address(dsn, option).keys() & {"password", "sslpassword", "oauth_client_secret"}:
        raise ConfigurationError(f"{option} holds a password that others can see: use PGPASSFILE or PGPASSWORD")
