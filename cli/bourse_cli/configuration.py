"""Where an option's value comes from: `bourse.toml` and the environment, checked, and named when a value is bad."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from bourse_schemas.errors import ConfigurationError, did_you_mean

# Options that many commands share: they may also be set at the top of the file, next to the tables of the commands.
SHARED = ("bootstrap_servers", "registry_url", "topic_prefix", "kafka_settings")
TOP = (*SHARED, "log_level", "topic")
# Read by the code itself. Besides, NAME may be set for each option with NAME_FILE: a secret, without a file.
ALSO_READ = ("BOURSE_MAVEN_REPOSITORY",)
KUBERNETES = re.compile(r".*_SERVICE_HOST|.*_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?|_.*)?")
KEY = "bourse_cli.configuration"


class _File(NamedTuple):
    path: str
    text: str

    def place(self, table: str, key: str) -> str:
        """Return `file:line` of a key, or the file alone if the key is written in an unusual way."""
        here = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                here = header[1].replace('"', "")
            elif here == table and (found := re.match(r'\s*"?([\w-]+)"?\s*=', line)) and _name(found[1]) == key:
                return f"{self.path}:{number}"
        return self.path


def _name(key: str) -> str:
    return key.replace("-", "_")


def _file(ctx: click.Context | None) -> _File:
    found: _File = (ctx.meta if ctx else {}).get(KEY, _File("bourse.toml", ""))
    return found


def config_name() -> str:
    """Return the name of the configuration file in use, for messages."""
    return _file(click.get_current_context(silent=True)).path


def read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Read the file of --config, else bourse.toml if it exists."""
    named = path or Path("bourse.toml")
    if path is None and not named.is_file():
        return
    import tomllib

    from bourse_cli.inputs import read_text

    text = read_text(named, "--config")
    ctx.meta[KEY] = file = _File(str(named), text)
    try:
        ctx.default_map = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{named} is not TOML: {error}") from error
    for key in SHARED:
        value, kind = ctx.default_map.get(key), list if key == "kafka_settings" else str
        if value is not None and not isinstance(value, kind):
            what = "a list of strings" if kind is list else "a string"
            raise ConfigurationError(f"{file.place('', key)}: {key} must be {what}")


def configure(group: click.Group, ctx: click.Context, name: str, command: click.Command, *, check: bool) -> None:
    """Give a command, the one of this name in the group, its part of the file; check the variables if `check`."""
    _use_context(command)
    if ctx.default_map is not None:
        if ctx.parent is None:
            _check_keys(ctx, ctx.default_map, {*TOP, *group.list_commands(ctx)}, "")
        prepare(ctx, ".".join([*ctx.command_path.split()[1:], name]), command, ctx.default_map.setdefault(name, {}))
    if ctx.parent is None and check:
        _check_environment(group, ctx, name, command)


def prepare(ctx: click.Context, path: str, command: click.Command, table: Any) -> None:
    """Bring a command's table of the file to the form of a command line, each value a string; add the shared options.

    `path` is the table's name. Raises ConfigurationError if it is not a table of such values.
    """
    file, shared = _file(ctx), ctx.find_root().default_map or {}
    if not isinstance(table, dict):
        outer, _, key = path.rpartition(".")
        raise ConfigurationError(f"{file.place(outer, key)}: options of `{path}` belong in the table [{path}]")
    options = {option.name: option for option in command.params if option.name}
    own = {key: _name(key) for key in table if _name(key) in options}
    for name in options.keys() & shared.keys() & set(SHARED) - set(own.values()):
        table[name], own[name] = shared[name], name
    for key, name in own.items():
        value, multiple = table.pop(key), getattr(options[name], "multiple", False)
        values = value if multiple and isinstance(value, list) else [value]
        if any(isinstance(each, list | dict) for each in values):
            what = "a list of strings" if multiple else "one value"
            raise ConfigurationError(f"{file.place(path, name)}: {key} of [{path}] must be {what}")
        table[name] = [str(each) for each in values] if multiple else str(value)
    inner_commands = getattr(command, "commands", {})
    if not hasattr(command, "entry_point_group"):  # a lazy group does not know its commands yet
        _check_keys(ctx, table, {*options, *inner_commands}, path)
    for name, inner in inner_commands.items():
        prepare(ctx, f"{path}.{name}", inner, table.setdefault(name, {}))


def _check_keys(ctx: click.Context, table: Mapping[str, Any], known: Iterable[str | None], path: str) -> None:
    """Raise ConfigurationError for an unknown key; an unknown table may be that of a plug-in that is not installed."""
    names = [_name(name) for name in known if name]
    for key, value in table.items():
        if _name(key) in names:
            continue
        hint = did_you_mean(key, names)
        if hint or not isinstance(value, dict):
            where = f" of [{path}]" if path else ""
            raise ConfigurationError(f"{_file(ctx).place(path, _name(key))}: unknown key {key}{where}{hint}")


def _use_context(command: click.Command) -> None:
    command.context_class = Context
    for inner in getattr(command, "commands", {}).values():
        _use_context(inner)


class Context(click.Context):
    """The context of a command: its configuration errors name the origin of the values they complain about."""

    def invoke(self, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run the command; add to its error where the options named in it were set."""
        try:
            return super().invoke(callback, *args, **kwargs)
        except ConfigurationError as error:
            text = str(error)
            for option in self.command.params:
                spelled = "|".join(map(re.escape, option.opts))
                if re.search(rf"(?<![\w-])({spelled})(?![\w-])", text) and (place := origin(self, option)):
                    text += f" ({option.opts[-1]} is set by {place})"
            error.args = (text,)
            raise


def origin(ctx: click.Context, option: click.Parameter) -> str | None:
    """Return the variable, or the file and line, that set an option; None if it is from the command line or unset."""
    source = ctx.get_parameter_source(option.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return next((name for name in _variables_of(option, ctx.auto_envvar_prefix) if os.environ.get(name)), None)
    if source is ParameterSource.DEFAULT_MAP:
        table, file = ".".join(ctx.command_path.split()[1:]), _file(ctx)
        place = file.place(table, option.name or "")
        return file.place("", option.name or "") if place == file.path else place
    return None


def _variables_of(option: click.Parameter, prefix: str | None) -> list[str]:
    named = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    return [*named, f"{prefix}_{(option.name or '').upper()}"]


def _variables(command: click.Command, prefix: str) -> set[str]:
    """Return the environment variables of a command and of the commands below it."""
    prefix = (command.context_settings or {}).get("auto_envvar_prefix", prefix)
    found = {name for option in command.params for name in _variables_of(option, prefix)}
    found |= {name.removesuffix("_FILE") for name in found}
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            if inner := command.get_command(ctx, name):
                found |= _variables(inner, f"{prefix}_{_name(name).upper()}")
    return found


def _check_environment(root: click.Group, ctx: click.Context, name: str, command: click.Command) -> None:
    """Raise ConfigurationError for a variable that is nearly one of this command's; warn of any other unknown one.

    Variables of other commands and those that Kubernetes sets for its services are ignored.
    """
    own = {"BOURSE_LOG_LEVEL", "BOURSE_CONFIG", *ALSO_READ, *_variables(command, f"BOURSE_{_name(name).upper()}")}
    others = tuple(f"BOURSE_{_name(other).upper()}_" for other in root.list_commands(ctx) if other != name)
    unknown = [
        variable
        for variable in sorted(os.environ.keys() - own)
        if variable.startswith("BOURSE_") and not variable.startswith(others) and not KUBERNETES.fullmatch(variable)
    ]
    known = _variables(root, "BOURSE") if unknown else set()  # imports every command, which takes a moment
    for variable in (each for each in unknown if each not in known):
        if near := [each for each in sorted(own) if _distance(variable, each) <= 2]:
            raise ConfigurationError(f"unknown variable {variable}; did you mean {near[0]}?")
        if not any(_distance(variable, each) <= 2 for each in known):
            click.echo(f"Warning: unknown variable {variable}", err=True)


def _distance(one: str, other: str) -> int:
    """Return how many letters must be inserted, deleted or replaced to make one text of the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row = row, [i]
        for j, theirs in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != theirs)))
    return row[-1]
