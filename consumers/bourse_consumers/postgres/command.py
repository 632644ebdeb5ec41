"""`bourse consume archive-postgres`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bourse_cli.options import declared_topic
from bourse_consumers.archive.command import ACCEPT_LOSS, TOPIC
from bourse_schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from bourse_consumers.api import Consumer

__all__ = ["archive_postgres", "require_no_password"]


@click.command
@click.option("--dsn", envvar="BOURSE_DSN", required=True, metavar="postgresql://…", help="Address of the database.")
@TOPIC
@click.option("--schema", default="bourse", show_default=True, help="Schema of the tables.")
@click.option("--apply-schema", is_flag=True, help="Create the tables, or add the columns of this release.")
@ACCEPT_LOSS
@click.pass_context
def archive_postgres(ctx: click.Context, /, dsn: str, topic: str, **options: Any) -> Consumer:
    """Write every event of a topic to PostgreSQL, exactly once.

    Set a password in BOURSE_DSN, PGPASSFILE or PGPASSWORD.
    """
    from bourse_consumers.postgres.sink import PostgresArchive

    if ctx.get_parameter_source("dsn") is ParameterSource.COMMANDLINE:
        require_no_password(dsn, "--dsn")
    return PostgresArchive(dsn, declared_topic(topic, ""), **options)


def require_no_password(dsn: str, option: str) -> None:
    """Raise ConfigurationError if an address from the command line is not one, or contains a password."""
    from bourse_consumers.postgres.sink import require_address

    if require_address(dsn, option).keys() & {"password", "sslpassword", "oauth_client_secret"}:
        raise ConfigurationError(f"{option} contains a password that others can see: use PGPASSFILE or PGPASSWORD")
