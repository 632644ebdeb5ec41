"""A trial as one self-contained page: a summary, a chart per chosen instrument, and the episodes marked on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape

from bourse_consumers.alerts.rule import form
from bourse_consumers.alerts.trial import Trial
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN, AlertState, PriceAlert

__all__ = ["page"]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 1000, 260, 70, 14, 24
COLORS = (
    "#c2410c",
    "#1d4ed8",
    "#15803d",
    "#7e22ce",
    "#be123c",
    "#0e7490",
    "#a16207",
    "#4d7c0f",
    "#9d174d",
    "#3730a3",
    "#115e59",
    "#57534e",
)
STYLE = """
body{font:15px/1.5 Vazirmatn,'Noto Sans Arabic',Tahoma,system-ui,sans-serif;margin:2rem auto;max-width:1040px;color:#1c1917}
h2{margin:2.2rem 0 .3rem}h2 small{font-weight:400;color:#78716c}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem;border-bottom:1px solid #e7e5e4;text-align:start}
td.n,th.n{text-align:end;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;background:#fafaf9}text{font-size:12px;fill:#57534e}
.line{fill:none;stroke:#1c1917;stroke-width:1.5}.grid{stroke:#e7e5e4}
.dot{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-inline-end:.4em}.never{color:#78716c}
"""


def page(trial: Trial, chosen: Sequence[str], most: int = 6) -> str:
    """Return the page; without chosen symbols or codes the instruments with the most episodes have charts."""
    colors = {rule.name: COLORS[n % len(COLORS)] for n, rule in enumerate(trial.rules)}
    titles = {rule.name: rule.title or rule.name for rule in trial.rules}
    fired = [alert for alert in trial.alerts if alert.state is AlertState.FIRING]
    parts = [f"<h1>Alerts</h1><p>{escape(next(trial.summary()))}</p>", _rules(trial, colors)]
    counts = Counter(alert.instrument for alert in fired).most_common()
    busiest = [str(code) for code, _ in counts if code in trial.prices][:most]
    parts += [_chart(trial, code, colors, titles) for code in _chosen(trial, chosen) or busiest]
    body = "".join(parts)
    return f'<!doctype html><html lang="fa"><meta charset="utf-8"><title>Alerts</title><style>{STYLE}</style>{body}</html>\n'


def _chosen(trial: Trial, names: Sequence[str]) -> list[str]:
    codes = {form(symbol): code for code, symbol in trial.symbols.items()} | {code: code for code in trial.symbols}
    if unknown := [name for name in names if form(name) not in codes]:
        raise ConfigurationError(f"--instrument {unknown[0]}: no instrument of these days is called that")
    return [codes[form(name)] for name in names]


def _rules(trial: Trial, colors: dict[str, str]) -> str:
    rows = []
    for rule in trial.rules:
        found = trial.fired(rule.name)
        lengths = sorted(trial.lengths(rule.name))
        middle = str(lengths[len(lengths) // 2]).split(".")[0] if lengths else "–"
        first = f"{found[0].raised_at.astimezone(TEHRAN):%H:%M}" if found else "–"
        who = len({alert.instrument for alert in found})
        rows.append(
            f'<tr class="{"" if found else "never"}"><td><span class="dot" style="background:{colors[rule.name]}"></span>'
            f"<bdi>{escape(rule.title or rule.name)}</bdi></td><td><code>{escape(rule.when.text.replace('{', '').replace('}', ''))}</code></td>"
            f'<td class="n">{len(found):,}</td><td class="n">{who:,}</td><td class="n">{middle}</td><td class="n">{first}</td></tr>'
        )
    head = "<th>rule</th><th>when</th><th class=n>episodes</th><th class=n>instruments</th><th class=n>median</th><th class=n>first</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _chart(trial: Trial, code: str, colors: dict[str, str], titles: dict[str, str]) -> str:
    prices = trial.prices[code]
    begin, end = prices[0][0], max(prices[-1][0], prices[0][0] + timedelta(minutes=1))
    low, high = min(price for _, price in prices), max(price for _, price in prices)

    def x(at: datetime) -> float:
        return LEFT + (min(max(at, begin), end) - begin) / (end - begin) * (WIDTH - LEFT - 10)

    def y(price: float) -> float:
        return TOP + (high - price) / max(high - low, 1) * (HEIGHT - TOP - BOTTOM)

    shapes, rows = list[str](), list[str]()
    for first, last in _episodes(trial, code):
        color, until = colors[first.rule], last.raised_at if last else end
        label = escape(titles[first.rule], quote=True)
        width = max(x(until) - x(first.raised_at), 2)
        shapes.append(
            f'<rect x="{x(first.raised_at):.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}" '
            f'fill="{color}" fill-opacity=".14"><title>{label}</title></rect>'
            f'<line x1="{x(first.raised_at):.1f}" x2="{x(first.raised_at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{color}"/>'
        )
        text = (first.message or {}).get("fa") or first.when
        times = [f"{each.raised_at.astimezone(TEHRAN):%H:%M:%S}" if each else "–" for each in (first, last)]
        rows.append(
            f'<tr><td class="n">{times[0]}</td><td class="n">{times[1]}</td><td><span class="dot" style="background:{color}">'
            f"</span><bdi>{label}</bdi></td><td><bdi>{escape(text)}</bdi></td></tr>"
        )
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(price):.1f}" y2="{y(price):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(price) + 4:.1f}" text-anchor="end">{price:,.0f}</text>'
        for price in sorted({low, (low + high) / 2, high})
    )
    hour = begin.astimezone(TEHRAN).replace(minute=0, second=0, microsecond=0)
    while (hour := hour + timedelta(hours=1)) < end:
        grid += f'<line class="grid" x1="{x(hour):.1f}" x2="{x(hour):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        grid += f'<text x="{x(hour):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{hour:%H:%M}</text>'
    path = f"M{x(begin):.1f} {y(prices[0][1]):.1f}" + "".join(f"H{x(at):.1f}V{y(price):.1f}" for at, price in prices)
    head = f"<h2><bdi>{escape(trial.symbols[code])}</bdi> <small>{escape(code)}, {begin.astimezone(TEHRAN):%Y-%m-%d}</small></h2>"
    drawn = f'<path class="line" d="{path}H{x(end):.1f}"/>'
    table = f"<table><tr><th class=n>from</th><th class=n>until</th><th>rule</th><th>message</th></tr>{''.join(rows)}</table>"
    return f'{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}">{grid}{"".join(shapes)}{drawn}</svg>{table if rows else ""}'


def _episodes(trial: Trial, code: str) -> list[tuple[PriceAlert, PriceAlert | None]]:
    ends = {alert.alert_id: alert for alert in trial.alerts if alert.state is AlertState.RESOLVED}
    return [
        (alert, ends.get(alert.alert_id))
        for alert in trial.alerts if alert.state is AlertState.FIRING and alert.instrument == code
    ]  # fmt: skip
