"""A trial as one self-contained page: a summary, a chart per chosen instrument, and the episodes marked on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape

from bourse_consumers.alerts.rule import form
from bourse_consumers.alerts.trial import Trial
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import TEHRAN, AlertState

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 1000, 260, 70, 14, 24
COLORS = ("c2410c", "1d4ed8", "15803d", "7e22ce", "be123c", "0e7490", "a16207", "4d7c0f", "9d174d", "3730a3", "115e59")
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
    known = {form(symbol): code for code, symbol in trial.symbols.items()} | {code: code for code in trial.symbols}
    if unknown := [name for name in chosen if form(name) not in known]:
        raise ConfigurationError(f"--instrument {unknown[0]}: no instrument of these days is called that")
    counts = Counter(alert.instrument for alert in trial.alerts if alert.state is AlertState.FIRING)
    busiest = [code for code, _ in counts.most_common() if code in trial.prices][:most]
    colors = {rule.name: COLORS[n % len(COLORS)] for n, rule in enumerate(trial.rules)}
    rules = {
        rule.name: f"{_dot(colors[rule.name])}<bdi>{escape(rule.title or rule.name)}</bdi>" for rule in trial.rules
    }
    rows = []
    for each in trial.episodes():
        first = f"{each.fired[0].raised_at.astimezone(TEHRAN):%H:%M}" if each.fired else "–"
        when = escape(each.rule.when.text.replace("{", "").replace("}", ""))
        cells = (f"{len(each.fired):,}", f"{each.instruments:,}", each.median, first)
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        never = "" if each.fired else ' class="never"'
        rows.append(f"<tr{never}><td>{rules[each.rule.name]}</td><td><code>{when}</code></td>{numbers}</tr>")
    head = "<th>rule</th><th>when</th><th class=n>episodes</th><th class=n>instruments</th><th class=n>median</th><th class=n>first</th>"
    body = f"<h1>Alerts</h1><p>{escape(next(trial.summary()))}</p><table><tr>{head}</tr>{''.join(rows)}</table>"
    body += "".join(
        _chart(trial, str(code), colors, rules) for code in [known[form(name)] for name in chosen] or busiest
    )
    return f'<!doctype html><html lang="fa"><meta charset="utf-8"><title>Alerts</title><style>{STYLE}</style>{body}</html>\n'


def _dot(color: str) -> str:
    return f'<span class="dot" style="background:#{color}"></span>'


def _chart(trial: Trial, code: str, colors: dict[str, str], rules: dict[str, str]) -> str:
    prices = trial.prices[code]
    begin, end = prices[0][0], max(prices[-1][0], prices[0][0] + timedelta(minutes=1))
    low, high = min(price for _, price in prices), max(price for _, price in prices)
    bottom, right = HEIGHT - BOTTOM, WIDTH - 10

    def x(at: datetime) -> float:
        return LEFT + (min(max(at, begin), end) - begin) / (end - begin) * (right - LEFT)

    def y(price: float) -> float:
        return TOP + (high - price) / max(high - low, 1) * (bottom - TOP)

    drawn = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(price):.1f}" y2="{y(price):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(price) + 4:.1f}" text-anchor="end">{price:,.0f}</text>'
        for price in sorted({low, (low + high) / 2, high})
    )
    hour = begin.astimezone(TEHRAN).replace(minute=0, second=0, microsecond=0)
    while (hour := hour + timedelta(hours=1)) < end:
        drawn += f'<line class="grid" x1="{x(hour):.1f}" x2="{x(hour):.1f}" y1="{TOP}" y2="{bottom}"/>'
        drawn += f'<text x="{x(hour):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{hour:%H:%M}</text>'
    ends = {alert.alert_id: alert.raised_at for alert in trial.alerts if alert.state is AlertState.RESOLVED}
    rows = ""
    for alert in trial.alerts:
        if alert.instrument != code or alert.state is not AlertState.FIRING:
            continue
        color, until = colors[alert.rule], ends.get(alert.alert_id)
        left = x(alert.raised_at)
        drawn += (
            f'<rect x="{left:.1f}" y="{TOP}" width="{max(x(until or end) - left, 2):.1f}" height="{bottom - TOP}" '
            f'fill="#{color}" fill-opacity=".14"><title>{escape(alert.title or alert.rule)}</title></rect>'
            f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{bottom}" stroke="#{color}"/>'
        )
        text = escape((alert.message or {}).get("fa") or alert.when)
        times = (f"{at.astimezone(TEHRAN):%H:%M:%S}" if at else "–" for at in (alert.raised_at, until))
        numbers = "".join(f'<td class="n">{time}</td>' for time in times)
        rows += f"<tr>{numbers}<td>{rules[alert.rule]}</td><td><bdi>{text}</bdi></td></tr>"
    path = f"M{x(begin):.1f} {y(prices[0][1]):.1f}" + "".join(f"H{x(at):.1f}V{y(price):.1f}" for at, price in prices)
    drawn += f'<path class="line" d="{path}H{x(end):.1f}"/>'
    head = f"<h2><bdi>{escape(trial.symbols[code])}</bdi> <small>{escape(code)}, {begin.astimezone(TEHRAN):%Y-%m-%d}</small></h2>"
    table = f"<table><tr><th class=n>from</th><th class=n>until</th><th>rule</th><th>message</th></tr>{rows}</table>"
    return f'{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}">{drawn}</svg>{table if rows else ""}'
