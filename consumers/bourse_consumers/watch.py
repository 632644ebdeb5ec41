"""`bourse watch`: market, feed and alerts live on a terminal, from Kafka alone; `render` is a function of the state."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from itertools import zip_longest
from typing import TYPE_CHECKING
from unicodedata import bidirectional

import click

from bourse_cli.options import cluster_options
from bourse_consumers.board.state import OPS, Episode, State, error_of
from bourse_schemas.errors import ConfigurationError, counted
from bourse_schemas.events import TEHRAN, Candle, Phase, PollMarker, PriceAlert
from bourse_schemas.kafka import Cluster
from bourse_schemas.watchdog import stop_on_signals

if TYPE_CHECKING:
    from rich.text import Text

FRAME_SECONDS = 0.25
GOOD, BAD, FAINT = "green", "bold red", "dim"
STYLES = {
    **dict.fromkeys(("OPEN", "FRESH", "PUBLISHED"), GOOD),
    **dict.fromkeys(("DOWN", "FAILED", "FROZEN", "STALE", "CANCELLED", "CRITICAL"), BAD),
    **dict.fromkeys(("PRE_OPEN", "PARTIAL", "SKIPPED", "REVISED", "WARNING"), "yellow"),
}
MOVERS = f"{{:<12}} {'%':>7} {'last':>9} "
AMOUNTS = f"{'volume':>6} {'value':>6} "
# Narrower tables have neither the amounts of movers nor the rules, quantities and durations of alerts.
WIDE = 63
LRM = "\u200e"
ALLOWED = {LRM, "\u200c"}  # and the zero-width non-joiner, which Persian words are written with

# --- text -------------------------------------------------------------------------------------------------------------


def _clock(instant: datetime | None) -> str:
    return f"{instant.astimezone(TEHRAN):%H:%M:%S}" if instant else "-"


def _age(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"


def _short(number: float, sign: str = "-") -> str:
    """Return a number in five characters and its sign, which is always there with `sign="+"`: 51.2K, -3.07M."""
    for unit in ("", "K", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:{sign}.3g}{unit}"
        number /= 1000
    return f"{number:{sign}.4g}T"


def _clean(text: str) -> str:
    """Replace what could steer a terminal or turn the line around: control and direction characters."""
    return "".join(c if c.isprintable() or c in ALLOWED else " " for c in text)


def _fit(text: str, width: int) -> str:
    """Return the text in at most `width` cells.

    Text with right-to-left letters is between left-to-right marks: if a terminal reorders, what follows on the line
    (padding, borders, numbers) stays in its place. The marks take no cell anywhere, unlike the newer isolates, which
    some terminals draw as boxes.
    """
    from rich.cells import cell_len, set_cell_size

    text = _clean(text)
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return f"{LRM}{text}{LRM}" if any(bidirectional(c) in {"R", "AL"} for c in text) else text


def _cell(text: str, width: int) -> str:
    from rich.cells import cell_len

    text = _fit(text, width)
    return text + " " * (width - cell_len(text))


def _quantity(alert: PriceAlert) -> tuple[str, str]:
    """Return the first quantity that the rule compares, as the rule has it, and its value with its unit."""
    name, value = next(iter(alert.values.items()), ("", None))
    unit = "%" if name.removeprefix("abs(").startswith("percent(") else " s" if name in {"quiet", "silent"} else ""
    return name, "" if value is None else (f"{value:.2f}" if abs(value) < 1000 else _short(value)) + unit


def line_of(state: State, news: PollMarker | PriceAlert | str) -> str:
    """Return a line for what happened."""
    if isinstance(news, PriceAlert):
        about = [
            _fit(part, 200) for part in (" ".join(_quantity(news)).strip(), news.rule, news.when, news.symbol) if part
        ]
        return f"{_clock(news.raised_at)} {news.state} {news.instrument or news.source} " + "; ".join(about)
    if isinstance(news, str):
        return _clean(news)
    at = (news.received_at or news.requested_at).astimezone(TEHRAN)
    counts = zip((news.opened, news.traded, news.revised, news.cancelled), OPS, strict=True)
    parts = [
        f"{at:%Y-%m-%d %H:%M:%S} {news.phase} {news.feed_state} poll {news.poll_sequence} {news.outcome}",
        ", ".join([counted(news.rows, "row"), *(f"{count} {op.lower()}" for count, op in counts)]),
        *(["lag " + ", ".join(f"{group.name} {group.lag}" for group in state.groups)] if state.groups else []),
        *([f"{state.dead_letters} dead letters"] if state.dead_letters else []),
        *([f"{state.undecodable} undecodable"] if state.undecodable else []),
        *([f"error {error_of(news)}"] if news.error_kind else []),
    ]
    return _clean("; ".join(parts))


# --- screen -----------------------------------------------------------------------------------------------------------


Row = tuple[str, str, str]
Cell = str | tuple[str, str]


def _table(head: str, rows: Sequence[Row], width: int) -> list[Text]:
    """Return heading and rows: what each begins with, its style, and a name in what is left of the line."""
    from rich.cells import cell_len
    from rich.text import Text

    rows = [(head, "bold", "symbol"), *rows]
    return [Text(left + _fit(name, width - cell_len(left)), style) for left, style, name in rows]


def _flow(parts: Sequence[Cell], width: int) -> list[Text]:
    """Return the parts side by side, two cells apart, on as many lines as they need."""
    from rich.text import Text

    lines: list[Text] = []
    for part in parts:
        text, style = part if isinstance(part, tuple) else (part, "")
        piece = Text(_fit(text, width), style, no_wrap=True, overflow="crop")
        if lines and lines[-1].cell_len + 2 + piece.cell_len <= width:
            lines[-1].append("  ").append_text(piece)
        else:
            lines.append(Text(no_wrap=True, overflow="crop").append_text(piece))
    return lines


def _header(state: State, width: int, now: float) -> list[Text]:
    marker, silent = state.marker, state.silent(now)
    bad = [f"{subject}: {text}" for subject, text in state.troubles.items()]
    if marker and marker.error_kind:
        bad.append(error_of(marker))
    feed: list[Cell] = []
    if marker:
        at = (marker.received_at or marker.requested_at).astimezone(TEHRAN)
        seen = "" if state.live_since in {None, state.marker_at} else f"{_age(now - state.marker_at)} ago"
        feed = [
            *([("SIMULATED", "reverse")] if marker.simulated else []),
            *((word.value, STYLES.get(word.value, "")) for word in (marker.phase, marker.feed_state)),
            f"{at:%a %Y-%m-%d %H:%M:%S}",
            (f"poll {marker.poll_sequence} {marker.outcome}", STYLES.get(marker.outcome, "")),
            (f"no poll for {_age(silent)}", BAD) if silent else (seen or "before this view", FAINT),
            *([(f"newest trade {_clock(marker.latest_traded_at)}", FAINT)] if marker.latest_traded_at else []),
            *([(f"polls missed since {_clock(marker.gap_from)}", "yellow")] if marker.gap_from else []),
        ]
    elif state.live_since is not None:
        feed = [("no poll on this cluster yet: is `bourse produce` running?", BAD if silent else "yellow")]
    counts: list[Cell] = [f"{op.lower()} {state.totals[op]:,}" for op in OPS]
    if letter := state.last_letter:
        counts.append((f"dead letters {state.dead_letters:,} ({letter.reason} {_clock(letter.failed_at)})", BAD))
    if state.undecodable:
        counts.append((f"undecodable {state.undecodable:,}", BAD))
    groups: list[Cell] = [
        (f"{each.name} {each.lag:,}{'' if each.alive else ' (stopped)'}", "" if each.alive else "yellow")
        for each in state.groups or ()
    ]
    return [
        *(
            line
            for text in bad
            for line in _flow([(each, BAD) for each in textwrap.wrap(_clean(text), width)[:2]], width)
        ),
        *_flow(feed if state.live_since is not None else [*feed, ("reading…", "yellow")], width),
        *_flow(counts, width),
        *_flow([("lag", FAINT), *(groups or [("no consumer groups" if state.groups == [] else "-", FAINT)])], width),
    ]


def _mover_row(change: float, candle: Candle, wide: bool) -> Row:
    amounts = f"{_short(candle.volume):>6} {_short(candle.value):>6} " * wide
    left = f"{_cell(candle.instrument, 12)} {change:>+7.2f} {candle.last_price:>9,} {amounts}"
    return left, GOOD if change > 0 else "red", candle.symbol


def _alert_row(state: State, episode: Episode, room: int) -> Row:
    """Return an alert as a row; `room` is that of the rule and its quantity, 0 if there is none."""
    alert, resolved = episode
    quantity, value = _quantity(alert)
    newest = state.marker and (state.marker.received_at or state.marker.requested_at)
    until = resolved.raised_at if resolved else newest
    lasted = _age((until - alert.raised_at).total_seconds()) if until and until > alert.raised_at else "-"
    about = f"{_cell(alert.instrument or alert.scope, 12)} {value:>8} "
    style = FAINT if resolved else STYLES.get(alert.severity, "bold")
    rule = _cell(": ".join(filter(None, (_fit(alert.rule, room), quantity))), room)
    left = f"{_clock(alert.raised_at)} " + (f"{lasted:>7} {about}{rule} " if room else about)
    return left, style, alert.symbol or alert.title or alert.when


def render(state: State, width: int, height: int, now: float) -> list[Text]:
    """Return the screen: at most `height` lines of at most `width` cells."""
    from rich.text import Text

    lines = _header(state, width, now)
    if state.marker and state.marker.phase is not Phase.OPEN and state.totals.total() > 0:
        lines += [Text(f"── summary of {state.day} ".ljust(width, "─"), "bold"), *_flow(state.summary(), width)]
    # On a short terminal the state comes before the tables, but never alone.
    lines = lines[: max(3, height - 6)]
    rest = max(0, height - len(lines))
    each = width if width < 140 else (width - 3) // 2
    movers, episodes, wide = state.movers(), state.alerts(), each >= WIDE
    room = min(46, max(22, each - 54)) * wide
    up = [_mover_row(*pair, wide) for pair in movers[:rest] if pair[0] > 0]
    down = [_mover_row(*pair, wide) for pair in reversed(movers[-rest:]) if pair[0] < 0]
    begun, about = f"{sum(resolved is None for _, resolved in episodes)} open", f"{'instrument':<12} {'value':>8} "
    head = f"{begun:<12} for {about}{'rule: quantity':<{room}} " if wide else f"{begun:<8} {about}"
    alerts = _table(head, [_alert_row(state, episode, room) for episode in episodes[:rest]], each)
    heads = [MOVERS.format(way) + AMOUNTS * wide for way in ("most up", "most down")]
    market = [_table(left, rows, each) for left, rows in zip(heads, (up, down), strict=True)]
    if each == width:
        lines += _stack([alerts, *market], rest)
    else:
        border = Text(" │ ", FAINT)
        for left, right in zip_longest(_stack([alerts], rest), _stack(market, rest), fillvalue=Text()):
            lines.append(Text.assemble(left, " " * (each - left.cell_len), border, right))
    for line in lines:
        line.truncate(width)
    return lines[:height]


def _stack(tables: Sequence[list[Text]], height: int) -> list[Text]:
    """Return the tables below each other, each with a fair share of the height; one without room is left out."""
    tables = tables[: max(1, height // 2)]
    lines: list[Text] = []
    for number, table in enumerate(tables):
        share = (height - len(lines)) // (len(tables) - number)
        lines += table[:share]
    return lines


# --- command ----------------------------------------------------------------------------------------------------------


@click.command()
@cluster_options
@click.option("--seconds", type=click.FloatRange(min=0), help="End after N seconds. [default: at Ctrl-C]")
def watch(cluster: Cluster, seconds: float | None) -> None:
    """Show the market, the feed and the alerts live, from Kafka alone.

    On a terminal a screen that fits its size; otherwise a line for every poll and every alert.
    """
    try:
        from rich.console import Console, Group
        from rich.live import Live
    except ModuleNotFoundError as error:
        raise ConfigurationError("`bourse watch` needs rich: pip install 'bourse-stream[watch]'") from error
    from bourse_consumers.board.feed import Feed
    from bourse_schemas.kafka import kafka_logger

    kafka_logger().disabled = True  # the view itself shows what does not work, once
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal cannot show Persian, but all the rest
    console, feed = Console(), Feed(cluster)
    feed.require()
    on_screen = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
    screen = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    stop, began = stop_on_signals(), time.monotonic()
    with feed, screen if on_screen else nullcontext() as live:
        while not stop.is_set() and (seconds is None or time.monotonic() - began < seconds):
            now = time.monotonic()
            with feed.lock:
                state = feed.settled(now)
                news = [line_of(state, each) for each in state.news]
                state.news.clear()
                if live:
                    live.update(Group(*render(state, console.width, console.height, now)))
            if live:
                live.refresh()
            else:
                for line in news:
                    click.echo(line)
            stop.wait(FRAME_SECONDS)
