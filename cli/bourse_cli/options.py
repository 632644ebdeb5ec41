"""Options that many commands share, each declared once."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from bourse_cli.inputs import parse_duration, read_text
from bourse_cli.proxies import proxy_for
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import DEFAULT_PREFIX, TOPICS, Topic

F = TypeVar("F", bound=Callable[..., Any])
SECRETS = ("password", "secret", "passphrase", "key.pem", "auth.token", "user.info")  # how their names end


def _settings(_: click.Context, __: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            # A pair that is mistyped may hold a secret.
            raise click.BadParameter(f"{key.partition(':')[0]!r} is not followed by =VALUE")
        if value.startswith("@"):
            try:
                value = read_text(Path(value[1:]), key).strip()
            except ConfigurationError as error:
                raise click.BadParameter(str(error)) from error
        elif key.endswith(SECRETS):
            raise click.BadParameter(f"{key} is a secret: write it to a file and use -X {key}=@FILE")
        settings[key] = value
    return settings


language_option = click.option(
    "--language", type=click.Choice(["en", "fa"]), default="en", show_default=True, help="Language of the mistakes."
)


def cluster_options(command: F) -> F:
    """Add the options that name the cluster; the command gets `cluster: Cluster` in their place."""
    from functools import wraps

    @wraps(command)
    def with_cluster(
        bootstrap_servers: str, registry_url: str, topic_prefix: str, kafka_settings: Any, **rest: Any
    ) -> Any:
        proxy = proxy_for(registry_url, environ=os.environ)
        cluster = Cluster(bootstrap_servers, registry_url, topic_prefix, kafka_settings, registry_proxy=proxy)
        return command(cluster=cluster, **rest)

    for decorate in (
        click.option(
            "-X",
            "kafka_settings",
            metavar="KEY=VALUE",
            envvar="BOURSE_KAFKA_SETTINGS",
            multiple=True,
            callback=_settings,
            help="A librdkafka setting, or schema.registry.… for the registry's client; =@FILE reads it. Repeatable.",
        ),
        _shared("--topic-prefix", DEFAULT_PREFIX, "Prefix of the topics' names."),
        _shared("--registry-url", "http://127.0.0.1:8081", "Schema registry (Confluent's API).", metavar="URL"),
        _shared("--bootstrap-servers", "127.0.0.1:9092", "Kafka brokers.", metavar="HOST:PORT,…"),
    ):
        with_cluster = decorate(with_cluster)
    return with_cluster  # type: ignore[return-value]  # click's decorators keep the callable


def _shared(flag: str, default: str, text: str, metavar: str | None = None) -> Callable[[F], F]:
    variable = "BOURSE" + flag.removeprefix("-").replace("-", "_").upper()
    return click.option(flag, envvar=variable, default=default, show_default=True, help=text, metavar=metavar)


def http_option(command: Any) -> Any:
    """Add `--http`; the command gets `http: str | None`."""
    return click.option(
        "--http",
        metavar="[HOST:]PORT",
        envvar="BOURSE_HTTP",
        help="Answer /livez, /readyz and /metrics here; without a host on this machine only. [default: nowhere]",
    )(command)


def duration_option(flag: str, default: str, text: str) -> Callable[[F], F]:
    """Add an option that takes a duration such as 15m; the command gets a timedelta."""
    return click.option(flag, metavar="DURATION", default=default, show_default=True, callback=_duration, help=text)


def _duration(_: click.Context, __: click.Parameter, text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def declared_topic(name: str, prefix: str | None) -> Topic:
    """Return the topic of this name, with its prefix or without; with any prefix if that is None."""
    for topic in TOPICS:
        if name in {topic.name, topic.full_name(name.rpartition(".")[0] if prefix is None else prefix)}:
            return topic
    raise ConfigurationError(f"no topic {name!r}: there are {', '.join(topic.name for topic in TOPICS)}")
