"""The command line's root: a lazy group over the entry points `bourse.commands`, so that no room names another."""

from __future__ import annotations

import os
import re
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from bourse_cli.configuration import configure, origin, read_config
from bourse_schemas.errors import BourseError, ConfigurationError, did_you_mean

# The name of threads that may be in a call which does not return, and which the end of the process does not wait for.
UNATTENDED = "unattended"


class EntryPoint(NamedTuple):
    """A command that an installed distribution provides: `value` is module:attribute."""

    name: str
    value: str
    distribution: str

    def __str__(self) -> str:
        return f"{self.distribution} ({self.value})"

    def load(self) -> Any:
        """Import the module and return the attribute."""
        module, _, attribute = self.value.partition(":")
        return getattr(import_module(module), attribute)

    def help(self) -> str | None:
        """Return the command's help text without importing it, None if the source does not show it plainly."""
        from importlib.util import find_spec

        module, _, attribute = self.value.partition(":")
        try:
            spec = find_spec(module)
            source = Path(spec.origin).read_text("utf-8") if spec and spec.origin else ""
        except (ImportError, OSError, ValueError):
            return None
        signature = rf"^def {re.escape(attribute)}\((?:(?!\ndef ).)*?:\n +"
        found = re.search(rf'{signature}"""(.*?)"""', source, re.DOTALL | re.MULTILINE)
        return found[1] if found else None


@lru_cache
def entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group in the distributions on a path, sorted by name.

    importlib.metadata does the same, and importing it takes as long as all of `bourse --help`.
    """
    texts: dict[str, str] = {}
    for file in (file for folder in path for file in Path(folder).glob("*-info/entry_points.txt")):
        texts.setdefault(file.parent.name.partition("-")[0].replace("_", "-"), file.read_text("utf-8"))
    found = []
    for distribution, text in texts.items():
        _, _, section = text.partition(f"[{group}]\n")
        for line in section.partition("\n[")[0].splitlines():
            name, equals, value = line.partition("=")
            if equals:
                found.append(EntryPoint(name.strip(), value.strip(), distribution))
    return tuple(sorted(found))


class LazyGroup(click.Group):
    """A group whose commands come from an entry-point group; a command is imported when it is used.

    One that cannot be imported does not disable the others; two of one name are an error that names both origins.
    """

    def __init__(self, *args: Any, entry_point_group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entry_point_group = entry_point_group

    def _found(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(self.entry_point_group, tuple(sys.path)):
            other = found.setdefault(point.name, point)
            if other.value != point.value:
                both = f"{other} and {point} provide {self.entry_point_group} {point.name!r}"
                raise ConfigurationError(f"two installed packages, {both}: uninstall one")
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *self._found()})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each command, without importing those whose source shows their help text."""
        found, rows = self._found(), []
        limit = formatter.width - 6 - max(map(len, self.list_commands(ctx)), default=0)
        for name in self.list_commands(ctx):
            text = found[name].help() if name in found and name not in self.commands else None
            command = click.Command(name, help=text) if text else self.get_command(ctx, name)
            if command is not None:
                rows.append((name, command.get_short_help_str(limit)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command to run, with its configuration; --help does not need valid variables."""
        if not args[0].startswith("-") and args[0] not in (names := self.list_commands(ctx)):
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], names)}")
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            configure(self, ctx, name, command, check=not {"-h", "--help"} & set(rest))
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; it ends quietly if the reader of its output goes away (`… | head`)."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Not even Python's flush at exit may fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command; one whose import fails becomes a command that prints why."""
        own = super().get_command(ctx, cmd_name)
        point = self._found().get(cmd_name)
        if own is not None or point is None:
            return own
        try:
            command = point.load()
            if isinstance(command, click.Command):
                return command
            raise TypeError(f"{point.value} is not a click command")
        except Exception as error:  # a foreign module may raise anything; the others must still work
            return _broken(cmd_name, point, error)


def _broken(name: str, point: EntryPoint, error: Exception) -> click.Command:
    hint = f"{point} cannot be imported: {error!r}"
    if isinstance(error, ModuleNotFoundError) and point.distribution == "bourse-stream":
        hint = f"`{name}` needs the module {error.name}: pip install 'bourse-stream[sandbox]' installs everything"

    def fail(**_: Any) -> None:
        raise ConfigurationError(hint)

    lenient = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, lenient, fail, help=hint, short_help=f"(broken) {hint}", add_help_option=False)


@click.group(
    cls=LazyGroup,
    entry_point_group="bourse.commands",
    context_settings={"auto_envvar_prefix": "BOURSE", "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="bourse-stream")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    callback=read_config,
    is_eager=True,
    expose_value=False,
    help="File with defaults for any option, a table per command. [default: bourse.toml, if it exists]",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def bourse(log_level: str) -> None:
    """Publish the Tehran exchange's market on Apache Kafka: nothing lost, nothing twice, nothing stale unnoticed."""
    context = click.get_current_context()
    context.obj = log_level


def main() -> None:
    """Run the command line; an operator's mistake is a line or two on stderr and exit code 2."""
    try:
        code = bourse.main(standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, click.BadParameter) and error.ctx and error.param:
            place = origin(error.ctx, error.param)
            error.param_hint = error.param.get_error_hint(error.ctx) + (f" (from {place})" if place else "")
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 3
    except BourseError as error:
        click.echo(f"Error: {error}", err=True)
        code = 2 if isinstance(error, ConfigurationError) else 1
    except Exception as error:  # a bug: Python's own traceback
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    _end(code if isinstance(code, int) else 0)


def _end(code: int) -> NoReturn:
    """End the process, at once if there are unattended threads.

    One that comes back from Rust or C++ while Python ends would abort it.
    """
    if any(thread.name == UNATTENDED for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
