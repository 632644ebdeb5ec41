"""The command line's root: a lazy group over the entry points `bourse.commands`, so that no room names another."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click

from bourse_schemas.errors import BourseError, ConfigurationError

__all__ = ["LazyGroup", "bourse", "main"]

# What may stand at the top of bourse.toml, besides a table per command.
SHARED = ("bootstrap_servers", "registry_url", "topic_prefix", "kafka_settings", "log_level", "topic")


class LazyGroup(click.Group):
    """A group whose commands come from an entry-point group; each is imported when it is looked at.

    One that cannot be imported does not take the others down; two of one name are an error that names both origins.
    """

    def __init__(self, *args: Any, entry_point_group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entry_point_group = entry_point_group

    def _found(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.entry_point_group):
            other = found.setdefault(point.name, point)
            if other.value != point.value:
                raise ConfigurationError(
                    f"two installed packages provide {self.entry_point_group} {point.name!r}: "
                    f"{_origin(other)} and {_origin(point)}; uninstall one"
                )
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *self._found()})

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command called; its part of the configuration file must be a table."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            table = (ctx.default_map or {}).get(name, {})
            require_options(name, command, table)
            if ctx.parent is None:
                shared = {*SHARED, *self.list_commands(ctx)}
                _require_known(ctx.default_map or {}, shared, "")
            if not isinstance(command, LazyGroup):
                known = {option.name for option in command.params} | set(getattr(command, "commands", ()))
                _require_known(table, known, f" of [{name}]")
        return name, command, rest

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command; one whose import fails becomes a command that says why."""
        own = super().get_command(ctx, cmd_name)
        point = self._found().get(cmd_name)
        if own is not None or point is None:
            return own
        try:
            command = point.load()
        except Exception as error:  # a foreign module may raise anything; the others must still work
            return _broken(cmd_name, point, error)
        if not isinstance(command, click.Command):
            return _broken(cmd_name, point, TypeError(f"{point.value} is no click command"))
        return command


def _require_known(table: Mapping[str, Any], known: Iterable[str | None], where: str) -> None:
    """Raise ConfigurationError for a key that means nothing; a table may be that of a plug-in not installed here."""
    names = [name.replace("-", "_") for name in known if name]
    for key, value in table.items():
        near = get_close_matches(key, names, 1)
        if key.replace("-", "_") in names or (isinstance(value, dict) and not near):
            continue
        raise ConfigurationError(f"bourse.toml: unknown key {key}{where}" + (f": is {near[0]} meant?" if near else ""))


def require_options(name: str, command: click.Command, table: Any) -> None:
    """Bring a command's part of the configuration file to what stands on a command line: one text an option.

    Raises ConfigurationError where it is no table of such. (click takes a number for an open file.)
    """
    if not isinstance(table, dict):
        raise ConfigurationError(f"bourse.toml: {name} is a command, its options stand in a table: [{name}]")
    options = {option.name: option for option in command.params}
    for key in list(table):
        if (option := options.get(key.replace("-", "_"))) is not None:
            multiple = getattr(option, "multiple", False)
            value = table.pop(key)
            values = value if multiple and isinstance(value, list) else [value]
            if any(isinstance(each, list | dict) for each in values):
                wanted = "a list of texts" if multiple else "one value"
                raise ConfigurationError(f"bourse.toml: {key} of [{name}] must be {wanted}")
            table[option.name] = [str(each) for each in values] if multiple else str(value)
    for inner, subcommand in getattr(command, "commands", {}).items():
        require_options(f"{name}.{inner}", subcommand, table.get(inner, {}))


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} ({point.value})" if point.dist else point.value


def _broken(name: str, point: EntryPoint, error: Exception) -> click.Command:
    hint = f"{_origin(point)} cannot be imported: {error!r}"
    if isinstance(error, ModuleNotFoundError) and point.dist and point.dist.name == "bourse-stream":
        hint = f"`{name}` needs the module {error.name}: pip install 'bourse-stream[sandbox]' brings everything"

    def fail(**_: Any) -> None:
        raise ConfigurationError(hint)

    return click.Command(
        name,
        callback=fail,
        help=hint,
        short_help=f"(broken) {hint}",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        if not Path("bourse.toml").is_file():
            return
        path = Path("bourse.toml")
    try:
        ctx.default_map = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise click.BadParameter(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from error


@click.group(
    cls=LazyGroup,
    entry_point_group="bourse.commands",
    context_settings={"auto_envvar_prefix": "BOURSE", "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="bourse-stream")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_read_config,
    is_eager=True,
    expose_value=False,
    help="Defaults for any option, a table per command. [default: bourse.toml, where there is one]",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def bourse(log_level: str) -> None:
    """The Tehran exchange's market on Apache Kafka: nothing lost, nothing twice, nothing stale unnoticed."""
    context = click.get_current_context()
    context.obj = log_level


def main() -> None:
    """Run the command line; an operator's mistake is a line or two on stderr and exit code 2."""
    try:
        code = bourse.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 3
    except KeyboardInterrupt:
        code = 3
    except BourseError as error:
        click.echo(f"Error: {error}", err=True)
        code = 2 if isinstance(error, ConfigurationError) else 1
    sys.exit(code if isinstance(code, int) else 0)
