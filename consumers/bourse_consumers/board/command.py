"""`bourse board`: the page that shows the market, the feed and the alerts."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import click

from bourse_cli.health import Monitor, parse_address
from bourse_cli.logs import configure_logging, get_logger
from bourse_cli.options import cluster_options
from bourse_schemas.errors import BourseError, ConfigurationError
from bourse_schemas.kafka import Cluster, kafka_logger
from bourse_schemas.watchdog import stop_on_signals


@click.command()
@click.option(
    "--http",
    metavar="[HOST:]PORT",
    default="8090",
    show_default=True,
    help="Serve page, JSON and probes here; without a host on this machine only.",
)
@click.option("--allowed-host", "hosts", multiple=True, metavar="NAME", help="Also answer to this name. Repeatable.")
@click.option("--root-path", "root", default="", metavar="/PATH", help="The path of the page at the proxy in front.")
@click.option("--font", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A font of your own, woff2.")
@click.option("--max-clients", type=click.IntRange(1), default=200, show_default=True, help="Refuse more than N pages.")
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Also show this consumer group. Repeatable.")
@click.option(
    "--notice",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Show the text of this file: a line in Persian, then one in English. It may come, change and go meanwhile.",
)
@cluster_options
@click.pass_context
def board(
    context: click.Context,
    cluster: Cluster,
    *,
    http: str,
    hosts: tuple[str, ...],
    root: str,
    font: Path | None,
    max_clients: int,
    groups: tuple[str, ...],
    notice: Path | None,
) -> None:
    """Show the market, the feed and the alerts live on a page in the browser, from Kafka alone."""
    try:
        import uvicorn

        from bourse_consumers.board.server import Publisher, application
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "`bourse board` needs starlette and uvicorn: pip install 'bourse-stream[board]'"
        ) from error
    from bourse_consumers.board.feed import Feed

    configure_logging(context.find_root().obj or "info")
    kafka_logger().disabled = True  # page and /readyz show what does not work
    host, port = parse_address(http)
    if root and not root.startswith("/"):
        raise ConfigurationError(f"--root-path {root}: begin it with /, as in /{root}")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"--http {http}: cannot listen on this address: {error.strerror}") from error
    stop, monitor, feed = stop_on_signals(), Monitor("board"), Feed(cluster, groups)
    monitor.unready("starting", None)
    monitor.check("topics", feed.trouble)
    publisher = Publisher(feed, monitor, notice=notice, stop=stop)
    app = application(publisher, hosts=(host, *hosts), root=root, font=font, max_clients=max_clients)
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1)
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    with feed:
        thread.start()
        name = f"[{host}]" if ":" in host else host
        get_logger().info("board ready", url=f"http://{name}:{listener.getsockname()[1]}{root.rstrip('/')}/")
        reported: str | None = "being read"
        while not stop.wait(0.25) and thread.is_alive() and feed.failed is None:
            trouble = feed.trouble()
            if trouble and trouble != reported:
                with feed.lock:
                    get_logger().warning("waiting", reason=trouble, **feed.state.troubles)
            reported = trouble
        web.should_exit = True
        thread.join(3)
    if feed.failed:
        raise feed.failed
    if not stop.is_set():
        raise BourseError("the HTTP server ended: start the board again")
