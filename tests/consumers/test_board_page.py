"""The board's page in a real browser (Debian's Chromium), on the bundled real day without Kafka."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bourse_consumers.board import server
from bourse_consumers.board.state import State
from bourse_schemas.events import AlertState, FeedState, Outcome, Phase
from tests.real_day import Feed, alerts_of_day, polls_of_day, serving
from tests.samples import alert, event

ROOT = Path(__file__).parents[2]
SCREENS = ROOT / "build" / "screens"
PAGE = ROOT / "consumers" / "bourse_consumers" / "board" / "page"
FOLD = "IRO1FOLD0001"
# A machine may be three times slower than the one that this was written on.
expect.set_options(timeout=30_000)
# Half a day: later polls are there to come.
BEGIN = 50
UNITS = """import("/page/units.js").then(async u => {
  const { WORDS } = await import("/page/words.js");
  const words = n => Object.fromEntries(Object.entries(WORDS).map(([key, pair]) => [key, pair[n]]));
  const fa = words(0), en = words(1);
  return [CALLS];
})"""


@pytest.fixture(scope="module")
def browser(demand: Callable[[str], None]) -> Iterator[Browser]:
    """Run Chromium."""
    demand("chromium")
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Return a feed in the middle of the real day, with a frame every 50 ms."""
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)
    feed = Feed()
    feed.play(0, BEGIN)
    return feed


@pytest.fixture
def url(feed: Feed) -> Iterator[str]:
    """Serve it."""
    with serving(feed) as url:
        yield url


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return `visit(url, …)`: opens a page; at the end there was no error and no request to anybody else."""
    opened, faults, foreign = [], list[str](), list[str]()

    def visit(url: str, *, width: int = 1440, height: int = 900, ready: bool = True, **context: Any) -> Page:
        settings = {"viewport": {"width": width, "height": height}, "color_scheme": "dark", **context}
        page = browser.new_page(**settings)
        opened.append(page)
        page.set_default_timeout(30_000)
        base = "/".join(url.split("/")[:3])
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type in {"error", "warning"} else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith((base, "data:")) else foreign.append(request.url),
        )
        page.goto(url)
        if ready:
            expect(page.locator("#scroll tbody tr[data-id]").first).to_be_visible()
        return page

    yield visit
    for page in opened:
        page.close()
    # A server that is stopped on purpose is reported by the browser.
    assert [text for text in faults if "Failed to load resource" not in text and "ERR_" not in text] == []
    assert foreign == []


def bars(events: list[Any], minutes: int) -> list[dict[str, Any]]:
    """Return an instrument's bars as docs/contract.md defines them."""
    found: dict[int, list[Any]] = defaultdict(list)
    for each in events:
        step = minutes * 60_000
        found[int(each.observed_at.timestamp() * 1000) // step * step].append(each)
    return [
        {
            "at": at,
            "open": these[0].last_price,
            "high": max(each.last_price for each in these),
            "low": min(each.last_price for each in these),
            "close": these[-1].last_price,
            "volume": sum(each.volume_delta for each in these),
            "count": sum(each.trade_count_delta for each in these),
        }
        for at, these in sorted(found.items())
    ]


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("u.price(12345, 'rial', 'en')", "12,345"),
        ("u.price(12345, 'toman', 'en')", "1,234.5"),
        ("u.price(12340, 'toman', 'fa')", "۱٬۲۳۴"),
        ("u.price(null, 'rial', 'fa')", "–"),
        ("u.percent(u.change(1025, 1000), 'en')", "+2.50%"),
        ("u.percent(u.change(975, 1000), 'fa')", "−۲٫۵۰٪"),
        ("u.percent(u.change(1000, 1000), 'fa')", "۰٫۰۰٪"),
        ("u.percent(0.004, 'en')", "0.00%"),
        ("u.percent(u.change(1000, null), 'fa')", "–"),
        ("u.percent(u.change(1000, 0), 'fa')", "–"),
        ("u.money(9_994_000_000_000, 'rial', 'fa', fa)", "۹٬۹۹۴\u00a0میلیارد"),
        ("u.money(9_995_000_000_000, 'rial', 'fa', fa)", "۱\u00a0همت"),
        ("u.money(1e13, 'rial', 'fa', fa)", "۱\u00a0همت"),
        ("u.money(1e13, 'toman', 'fa', fa)", "۱\u00a0همت"),
        ("u.money(18_703_000_000_000, 'rial', 'en', en)", "1.87\u00a0hemmat"),
        ("u.money(2.345e15, 'rial', 'fa', fa)", "۲۳۵\u00a0همت"),
        ("u.money(485_000_000_000, 'rial', 'fa', fa)", "۴۸۵\u00a0میلیارد"),
        ("u.money(485_000_000_000, 'toman', 'fa', fa)", "۴۸٫۵\u00a0میلیارد"),
        ("u.money(999_499_999, 'rial', 'en', en)", "999M"),
        ("u.money(999_500_000, 'rial', 'en', en)", "1B"),
        ("u.money(999_499, 'rial', 'en', en)", "999,499"),
        ("u.money(999_500, 'rial', 'en', en)", "1M"),
        ("u.money(null, 'rial', 'en', en)", "–"),
        ("u.amount(34_700_000, 'fa', fa)", "۳۴٫۷\u00a0میلیون"),
        ("u.amount(1e13, 'en', en)", "10,000B"),
        ("u.amount(-34_700_000, 'fa', fa)", "\u2066−۳۴٫۷\u2069\u00a0میلیون"),
        ("u.date('2019-08-21', 'fa')", "چهارشنبه ۳۰ مرداد ۱۳۹۸"),
        ("u.date('2019-08-21', 'en')", "Wed 21 Aug 2019"),
        ("u.date('2025-03-20', 'fa')", "پنجشنبه ۳۰ اسفند ۱۴۰۳"),
        ("u.shortDate('2019-08-21', 'fa')", "۱۳۹۸/۰۵/۳۰"),
        ("u.clock(1566374385000)", "12:29:45"),
        ("u.clock(1700000000000, false)", "01:43"),
        ("u.plain('كچاد ي ٣ ۳')", "کچادی33"),
        ("u.plain('سرمایه\\u200cگذاری')", "سرمایهگذاری"),
        ("u.market({instrument: 'IRO3BDYZ0001'})", "farabourse"),
        ("u.market({instrument: 'IRO1BDYZ0001', is_right: true})", "rights"),
        ("u.market({instrument: 'IRT1ABCD0001'})", "funds"),
    ],
)
def test_known_answers_of_units(units_answers: dict[str, Any], call: str, shown: str) -> None:
    """At each boundary: hemmat is 10^13 rial in both units and only for sums."""
    assert units_answers[call] == shown


@pytest.fixture(scope="module")
def units_answers(browser: Browser) -> dict[str, Any]:
    """Return what each call gives, all asked at once."""
    calls = next(mark.args[1] for mark in test_known_answers_of_units.pytestmark)
    names = [call for call, _ in calls]
    with serving(Feed()) as url:
        page = browser.new_page()
        page.goto(url)
        answers = page.evaluate(UNITS.replace("CALLS", ", ".join(names)))
        page.close()
    return dict(zip(names, answers, strict=True))


def test_persian_from_right_to_left_and_english_from_left_to_right(visit: Callable[..., Page], url: str) -> None:
    """Persian is the default; the choice is kept."""
    page = visit(url)
    assert page.evaluate("document.dir + getComputedStyle(document.body).direction") == "rtlrtl"
    first, last = (page.locator("#scroll thead th").nth(n).bounding_box() for n in (0, -1))
    assert first
    assert last
    assert first["x"] > last["x"]
    expect(page.locator("#simulated")).to_have_text("بازپخش روز واقعی ۱۳۹۸/۰۵/۳۰ — زنده نیست")
    expect(page.locator("#date")).to_have_text("چهارشنبه ۳۰ مرداد ۱۳۹۸")
    expect(page.locator("th.last")).to_have_text("آخرین (ریال)")
    page.click("#unit")
    expect(page.locator("th.last")).to_have_text("آخرین (تومان)")
    page.click("#lang")
    assert page.evaluate("document.dir") == "ltr"
    expect(page.locator("th.last")).to_have_text("Last (toman)")
    expect(page.locator(f"tr[data-id={FOLD}] td.last")).to_have_text(re.compile(r"^\d{3}(\.\d)?$"))
    page.reload()
    expect(page.locator("#simulated")).to_have_text("Replay of the real day 2019-08-21 — not live")
    # Whatever text a person can see is in the table of words or is a value.
    assert (
        page.evaluate("document.body.innerText.includes('undefined') || document.body.innerText.includes('{}')")
        is False
    )


@pytest.mark.parametrize(("lang", "unit", "size"), [("fa", "ریال", 1), ("fa", "تومان", 10), ("en", "toman", 10)])
def test_money_is_in_the_chosen_unit_and_every_heading_names_it(
    visit: Callable[..., Page], url: str, feed: Feed, lang: str, unit: str, size: int
) -> None:
    """Of table, instrument, events and movers; also at the pointer of the chart and of the map."""
    page = visit(f"{url}/#/{FOLD}", width=2600)
    page.click("#source summary")
    if lang == "en":
        page.click("#lang")
    if size == 10:
        page.click("#unit")
    expect(page.locator("#source tbody tr")).to_have_count(20)
    words = page.evaluate("import('/page/words.js').then(m => m.WORDS)")
    for place, keys in {
        "#scroll th": "- symbol last* - closing* - volume value* count time",
        "#quote div:not(.title) small": "last* closing*",
        "#facts dt": "yesterday* first* high* low* volume value* count marketValue*",
        "#source th": "observed kind last* priceChange* volume value* count event place track",
        "#which button": "up down byValue*",
    }.items():
        shown = page.locator(place).all_text_contents()
        for text, key in zip(shown, keys.split(), strict=True):
            if key != "-":
                word = words[key.strip("*")][lang == "en"]
                assert text == (f"{word} ({unit})" if key.endswith("*") else word)

    def shows(number: float) -> str:
        text = f"{number:,.1f}".removesuffix(".0")
        return text if lang == "en" else text.translate(str.maketrans("0123456789,.", "۰۱۲۳۴۵۶۷۸۹٬٫"))

    def change(number: float) -> str:
        return ("+" if number > 0 else "−" if number < 0 else "") + shows(abs(number))

    mine = [each for _, these in polls_of_day()[:BEGIN] for each in these if each.instrument == FOLD][:-21:-1]
    assert any(each.last_price_delta for each in mine)
    for number, each in enumerate(mine):
        cells = page.locator("#source tbody tr").nth(number).locator("td").all_text_contents()
        assert each.last_price is not None
        assert [cells[2], *cells[4:6]] == [
            shows(each.last_price / size),
            change(each.volume_delta),
            change(each.value_delta / size),
        ]
        assert cells[3] == ("–" if each.last_price_delta is None else change(each.last_price_delta / size))
    expect(page.locator("#turnover")).to_have_text(re.compile(f"{unit}$|{words['hemmat'][lang == 'en']}$"))
    page.hover("#tree canvas")
    expect(page.locator("#tree canvas")).to_have_attribute("title", re.compile(f"[0-9۰-۹] {unit}"))
    page.focus("#plot canvas")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip")).to_contain_text(f"{words['last'][lang == 'en']} ({unit})")


def test_a_change_that_is_not_known_is_none_of_up_same_and_down(
    visit: Callable[..., Page], url: str, feed: Feed
) -> None:
    """Without a previous close there is nothing to compare with."""
    page = visit(url)
    page.click("#lang")
    changes = [change for change, _ in feed.state.movers()]
    known = [sum(each > 0 for each in changes), sum(each == 0 for each in changes), sum(each < 0 for each in changes)]
    counts = page.locator("#breadth i")
    expect(counts).to_have_text([str(each) for each in known])
    new = {"trading_day": feed.state.day, "last_price": 1000}
    feed.add(event(instrument="NEW1", previous_close=None, **new), event(instrument="NEW2", previous_close=0, **new))
    feed.add(event(instrument="NEW3", **new))
    expect(counts).to_have_text([str(known[0]), str(known[1] + 1), str(known[2])])


def test_search_markets_sort_and_watch_list(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """Arabic letters and digits find Persian names; the watch list outlives the page."""
    page = visit(url)
    page.keyboard.press("/")
    page.keyboard.type("فولاد مباركه")
    expect(page.locator("#scroll tbody tr[data-id]")).to_have_count(1)
    expect(page.locator("#scroll tbody tr[data-id] td.symbol bdi")).to_have_text("فولاد")
    page.click(f"[data-star={FOLD}]")
    page.fill("#search", "iro1fold")
    expect(page.locator("#scroll tbody tr[data-id]")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#count")).to_have_text(re.compile("۵[۰-۹]{2}"))
    page.click("[data-chip=watchList]")
    expect(page.locator("#scroll tbody tr[data-id]")).to_have_count(1)
    page.click("[data-chip=farabourse]")
    shown = page.locator("#scroll tbody tr[data-id]").evaluate_all("rows => rows.map(r => r.dataset.id.slice(0, 4))")
    assert set(shown) == {"IRO3"}
    page.click("[data-chip=all]")
    page.click("[data-sort=change]")
    expect(page.locator("th.change")).to_have_attribute("aria-sort", "descending")
    best = feed.state.movers()[0][1]
    expect(page.locator("#scroll tbody tr[data-id]").first).to_have_attribute("data-id", best.instrument)
    page.click("[data-sort=change]")
    expect(page.locator("#scroll tbody tr[data-id]").first).to_have_attribute(
        "data-id", feed.state.movers()[-1][1].instrument
    )
    page.reload()
    page.click("[data-chip=watchList]")
    expect(page.locator(f"[data-star={FOLD}]").first).to_have_attribute("aria-pressed", "true")


def test_keyboard_moves_through_the_table(visit: Callable[..., Page], url: str) -> None:
    """Arrows select, also beyond what is in sight; few rows exist."""
    page = visit(url)
    page.focus("#scroll")
    for _ in range(60):
        page.keyboard.press("ArrowDown")
    selected = page.locator("#scroll tbody tr.on")
    expect(selected).to_be_visible()
    assert selected.get_attribute("aria-rowindex") == "61"
    assert page.locator("#scroll tbody tr").count() < 60
    assert page.url.endswith(str(selected.get_attribute("data-id")))


@pytest.mark.parametrize(("kind", "minutes"), [("line", 1), ("candle", 5)])
def test_the_chart_is_the_events(visit: Callable[..., Page], url: str, feed: Feed, kind: str, minutes: int) -> None:
    """Each bar as the contract defines it; the next poll is added; the previous close is in sight."""
    page = visit(f"{url}/#/{FOLD}")
    page.click(f"[data-kind={kind}]")
    canvas = page.locator("#plot canvas")

    def drawn() -> list[dict[str, Any]]:
        return list(canvas.evaluate("c => c.chart.model.bars"))

    for end in (BEGIN, BEGIN + 5):
        feed.play(BEGIN, end)
        mine = [each for _, these in polls_of_day()[:end] for each in these if each.instrument == FOLD]
        wanted = bars(mine, minutes)
        expect(canvas).to_have_attribute("data-last", str(mine[-1].sequence))
        assert [{name: bar[name] for name in wanted[0]} for bar in drawn()] == wanted
    model = canvas.evaluate("c => ({low: c.chart.model.low, high: c.chart.model.high})")
    assert model["low"] < mine[-1].previous_close < model["high"]
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    expect(page.locator("#tip")).to_contain_text("حجم")


def test_annulled_volume_and_missed_polls(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """A bar below zero; the span without polls has its reason, and no line goes through it."""
    page = visit(f"{url}/#/{FOLD}")
    last = feed.state.marker
    assert last
    assert last.received_at
    known = feed.state.candles[FOLD]
    nothing = {"opened": 0, "traded": 0, "revised": 0, "cancelled": 0}
    failed = {
        "outcome": Outcome.FAILED,
        "feed_state": FeedState.DOWN,
        "error_kind": "network",
        "error_message": "no route",
    }
    at = last.received_at + timedelta(minutes=10)
    feed.add(msgspec.structs.replace(last, poll_sequence=last.poll_sequence + 1, **nothing, **failed))
    expect(page.locator("#banner")).to_have_text("بدون داده: network: no route")
    expect(page.locator("body")).to_have_class(re.compile("stale"))
    change = {"observed_at": at, "poll_sequence": last.poll_sequence + 2, "sequence": known.sequence + 1}
    fall = {"volume_delta": -5000, "volume": known.volume - 5000, "op": "CANCELLED"}
    feed.add(msgspec.structs.replace(known, **change, **fall))
    back = {"received_at": at, "poll_sequence": last.poll_sequence + 2, "gap_from": last.received_at}
    feed.add(msgspec.structs.replace(last, **{**nothing, "cancelled": 1}, **back))
    canvas = page.locator("#plot canvas")
    expect(canvas).to_have_attribute("data-last", str(known.sequence + 1))
    expect(page.locator("#banner")).to_be_hidden()
    bar, spans = canvas.evaluate("c => [c.chart.model.bars.at(-1), c.chart.model.spans]")
    assert bar["volume"] == -5000
    assert spans == [[last.received_at.timestamp() * 1000, at.timestamp() * 1000, "network: no route"]]
    box = canvas.bounding_box()
    assert box
    middle = canvas.evaluate("c => { const m = c.chart.model; return (m.x(m.spans[0][0]) + m.x(m.spans[0][1])) / 2; }")
    page.mouse.move(box["x"] + middle, box["y"] + 60)
    expect(page.locator("#tip")).to_contain_text("network: no route")


def test_alerts_by_rule_with_the_moment_on_the_chart(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """A new one is marked within one poll; filters and mutes; an end is shown."""
    feed.add(*alerts_of_day())
    page = visit(url)
    expect(page.locator("#open")).to_have_text("۶۰ باز")
    expect(page.locator("#groups details").first).to_contain_text("my-stops")
    assert page.locator("#groups details").count() == 3
    moment = feed.state.markers[-5].received_at
    new = {
        "trading_day": feed.state.day,
        "instrument": FOLD,
        "symbol": "فولاد",
        "raised_at": moment,
        "rule": "new-rule",
    }
    feed.add(alert(alert_id="new", message={"fa": "آزمون"}, **new))
    expect(page.locator(".alert.fresh")).to_contain_text("آزمون")
    page.click("[data-alert=new]")
    expect(page.locator("#name")).to_have_text("فولاد")
    assert page.url.endswith(f"#/{FOLD}")
    expect(page.locator("#tip")).to_contain_text("آزمون")
    expect(page.locator(".alert.fresh")).to_have_count(0)
    feed.add(alert(alert_id="new", state=AlertState.RESOLVED, **new))
    expect(page.locator("[data-alert=new]")).to_contain_text("پایان")
    page.select_option("#severity", "CRITICAL")
    assert page.locator("#groups details").count() == 1
    page.select_option("#severity", "")
    page.click("summary [data-mute='rule surge']")
    expect(page.locator("#groups details[data-rule=surge]")).to_have_count(0)
    page.reload()
    expect(page.locator(".unmute")).to_contain_text("۲۰")
    page.click(".unmute")
    expect(page.locator("#groups details[data-rule=surge]")).to_have_count(1)
    page.click("#lang")
    expect(page.locator("[data-alert=alert-1] > span").last).to_have_text(re.compile(": 3.2 % in 5 minutes$"))
    assert page.locator("[data-alert=alert-1] > span bdi").count() == 1


def test_a_browser_without_idle_callbacks_or_notifications(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """As Safari and Chrome on Android: the page follows, and its fixture sees no error; an address may be nonsense."""
    page = visit(url, permissions=["notifications"])
    page.add_init_script("""
        Object.defineProperty(globalThis, "requestIdleCallback", { value: undefined });
        globalThis.Notification = class {
          static permission = "granted";
          static requestPermission = async () => "granted";
          constructor() { document.body.dataset.notified = +(document.body.dataset.notified ?? 0) + 1; throw new TypeError("Illegal constructor"); }
        };
    """)
    page.goto(f"{url}/#/%")
    page.reload()
    expect(page.locator("#scroll tbody tr[data-id]").first).to_be_visible()
    page.click("#notify")
    expect(page.locator("#notify")).to_have_attribute("aria-pressed", "true")
    for number in (1, 2):
        feed.add(alert(alert_id=f"new-{number}", trading_day=feed.state.day, instrument=FOLD, message={"fa": "آزمون"}))
        expect(page.locator("body")).to_have_attribute("data-notified", str(number))
        expect(page.locator(f"[data-alert=new-{number}]")).to_be_attached()
    expect(page.locator("#banner")).to_be_hidden()


def test_where_a_number_comes_from(visit: Callable[..., Page], url: str) -> None:
    """The last 20 events with their places, and the line that prints the newest one."""
    page = visit(f"{url}/#/{FOLD}")
    page.click("#source summary")
    mine = [each for _, these in polls_of_day()[:BEGIN] for each in these if each.instrument == FOLD]
    rows = page.locator("#source tbody tr")
    expect(rows).to_have_count(20)
    assert rows.evaluate_all("all => all.map(r => r.dataset.event)") == [each.event_id for each in mine[:-21:-1]]
    expect(rows.first).to_contain_text(f"2 / {mine[-1].sequence + 1000}")
    expect(page.locator("#tail")).to_have_text(
        f"bourse tail trades --from-beginning --exit-at-end --json --with-metadata --key {FOLD} | grep '\"{mine[-1].event_id}\"'"
    )


def test_states_of_the_feed_are_told_apart(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """No change is not no data; what is bad is a banner and grey, and goes away by itself."""
    page = visit(url)
    last = feed.state.marker
    assert last
    banner, n = page.locator("#banner"), last.poll_sequence

    def poll(**changes: Any) -> None:
        nonlocal n
        n += 1
        nothing = {"opened": 0, "traded": 0, "revised": 0, "cancelled": 0}
        feed.add(msgspec.structs.replace(last, poll_sequence=n, **{**nothing, **changes}))

    poll(outcome=Outcome.UNCHANGED)
    expect(page.locator("#poll")).to_contain_text("بدون تغییر")
    expect(banner).to_be_hidden()
    poll(outcome=Outcome.UNCHANGED, feed_state=FeedState.FROZEN)
    expect(banner).to_have_text("بی‌حرکت: داده‌ها قابل اتکا نیستند")
    poll(feed_state=FeedState.PARTIAL)
    expect(page.locator("#feed")).to_have_text("ناقص")
    expect(banner).to_be_hidden()
    poll(outcome=Outcome.SKIPPED, error_kind="budget", error_message="no calls left")
    expect(banner).to_have_text("بدون پرسش: budget: no calls left")
    poll(phase=Phase.CLOSED, feed_state=FeedState.IDLE)
    expect(page.locator("#phase")).to_have_text("بازار بسته")
    with feed.lock:
        feed.state.trouble("kafka", "localhost:9092 is down")
    expect(banner).to_have_text("کافکا پاسخ نمی‌دهد؛ قیمت‌ها به‌روز نیستند")
    expect(page.locator("#lamp")).to_have_class("lamp bad")
    assert "9092" not in page.content()
    with feed.lock:
        feed.state.trouble("kafka", None)
        feed.state.trouble("groups", "group another: not allowed")
    expect(banner).to_be_hidden()
    expect(page.locator("#lamp")).to_have_attribute("title", "وضعیت مصرف‌کننده‌ها معلوم نیست")
    page.click("#lamp")
    assert page.url.endswith("#/ops")
    expect(page.locator("#ops")).to_contain_text("no calls left")
    page.click("#back")
    expect(page.locator("#market")).to_be_visible()


def test_a_notice_is_announced_and_can_be_closed(visit: Callable[..., Page], feed: Feed, tmp_path: Path) -> None:
    """In both languages, in a live region; a closed one stays closed until the text is another one."""
    file = tmp_path / "notice"
    with serving(feed, notice=file) as url:
        page = visit(url)
        notice = page.locator("[role=status] #notice")
        expect(notice).to_be_hidden()
        file.write_text("سامانه ساعت ۱۶ به‌روز می‌شود\n<b>Update</b> at 16:00", "utf-8")
        expect(notice).to_contain_text("سامانه ساعت ۱۶ به‌روز می‌شود")
        page.click("#lang")
        expect(notice.locator("span")).to_have_text("<b>Update</b> at 16:00")
        page.click("#close")
        expect(notice).to_be_hidden()
        page.click("#lang")
        expect(notice).to_be_hidden()
        file.write_text("۲\n2", "utf-8")
        expect(notice).to_be_visible()
        file.unlink()
        expect(notice).to_be_hidden()


def test_without_market_values_the_page_gives_the_reason(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """The bundled day has none: the map is by turnover, and the other choice is disabled until values come."""
    page = visit(f"{url}/#/{FOLD}")
    choice, other = page.locator("[data-area=market_value]"), page.locator("[data-area=value]")
    expect(choice).to_be_disabled()
    expect(choice).to_have_attribute("title", "بورس این مقدار را نفرستاده است")
    expect(other).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#facts dd").last).to_have_attribute("title", "بورس این مقدار را نفرستاده است")
    expect(page.locator("#facts dd").last).to_have_text("–")
    known = feed.state.candles[FOLD]
    feed.add(msgspec.structs.replace(known, sequence=known.sequence + 1, market_value=10**13))
    expect(choice).to_be_enabled()
    expect(choice).to_have_attribute("title", "")
    choice.click()
    expect(choice).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#facts dd").last).to_have_text("۱\u00a0همت")


def test_hostile_names_are_text(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """Markup, direction controls, 10,000 characters: shown as text, and nothing moves."""
    day = feed.state.day
    feed.add(
        event(
            instrument="EVIL1",
            symbol="<img src=x onerror=alert(1)>",
            title="<script>alert(1)</script>",
            trading_day=day,
        ),
        event(instrument="EVIL2", symbol="\u202eabc\u2066", title="x" * 10_000, trading_day=day),
        event(instrument='"><b>', symbol="quote", title="''", trading_day=day),
        alert(
            alert_id="e", symbol="<b>x</b>", message={"fa": "<i>" + "y" * 10_000}, trading_day=day, instrument="EVIL1"
        ),
    )
    page = visit(url)
    page.fill("#search", "evil1")
    expect(page.locator("tr[data-id] td.symbol bdi")).to_have_text("<img src=x onerror=alert(1)>")
    page.click("tr[data-id=EVIL1] td.last")
    expect(page.locator("#name")).to_have_text("<img src=x onerror=alert(1)>")
    page.fill("#search", "evil2")
    assert page.locator("tr[data-id] td.symbol bdi").text_content() == " abc "
    changed = {"instrument": "EVIL2", "symbol": "\u202eabc\u2066", "title": "x" * 10_000, "trading_day": day}
    feed.add(event(**changed, sequence=2, last_price=1050))
    expect(page.locator("tr[data-id=EVIL2] td.last")).to_have_text("۱٬۰۵۰")
    assert page.locator("tr[data-id] td.symbol bdi").text_content() == " abc "
    assert page.evaluate("document.querySelectorAll('main img, main script, td b').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_begins_again_when_topics_were_created_again(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """What was there is gone without a reload."""
    page = visit(url)
    count = page.locator("#count")
    expect(count).to_have_text(re.compile("۵[۰-۹]{2}"))
    with feed.lock:
        feed.state = State()
    few = polls_of_day()[0][1][:7]
    feed.add(*few, msgspec.structs.replace(polls_of_day()[0][0], opened=7))
    with feed.lock:
        feed.state.go_live(time.monotonic())
    expect(count).to_have_text("۷")


def test_the_page_comes_back_after_the_board_was_restarted(visit: Callable[..., Page], feed: Feed) -> None:
    """The banner is there while it is down; the new one has other ids."""
    with serving(feed) as url:
        port = int(url.rsplit(":", 1)[1])
        page = visit(url)
    expect(page.locator("#banner")).to_have_text("ارتباط با تابلو قطع است؛ دوباره تلاش می‌شود")
    expect(page.locator("body")).to_have_class(re.compile("stale"))
    feed.play(BEGIN, BEGIN + 1)
    with serving(feed, port):
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("body")).to_have_attribute("data-poll", str(polls_of_day()[BEGIN][0].poll_sequence))


def test_a_page_that_is_refused_tries_again(visit: Callable[..., Page], feed: Feed) -> None:
    """It shows its snapshot and why it does not move, and is let in when there is room."""
    with serving(feed, max_clients=1) as url:
        first, second = visit(url), visit(url)
        expect(second.locator("#banner")).to_have_text("تابلو جای خالی ندارد؛ دوباره تلاش می‌شود")
        first.goto("about:blank")
        expect(second.locator("#banner")).to_be_hidden()


def test_a_page_that_nobody_sees_costs_nothing(
    visit: Callable[..., Page], url: str, feed: Feed, wait_for: Callable[..., Any]
) -> None:
    """It leaves after half a minute, and goes on where it was when somebody looks again."""
    page, asked, ended = visit(url), list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url.split("/")[-1].partition("?")[0]))
    page.on("requestfailed", lambda request: ended.append(request.url.split("/")[-1].partition("?")[0]))
    page.clock.install()
    page.reload()
    body, poll = page.locator("body"), polls_of_day()[BEGIN - 1][0].poll_sequence
    expect(body).to_have_attribute("data-poll", str(poll))
    turn = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); "
    turn += "document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(turn, True)
    streams = ended.count("events")
    page.clock.fast_forward(31_000)
    wait_for(lambda: page.title() and ended.count("events") > streams)
    feed.play(BEGIN, BEGIN + 2)
    page.evaluate(turn, False)
    expect(body).to_have_attribute("data-poll", str(polls_of_day()[BEGIN + 1][0].poll_sequence))
    names = [name for name in asked if name in {"events", "snapshot"}]
    assert names[names.index("snapshot") :] == [
        "snapshot",
        "events",
        "events",
    ]  # "events" of the first load may be late


def test_two_thousand_changes_touch_only_rows_in_sight(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """Whatever changes, the page has some fifty rows; nothing is animated for who does not want it."""
    page = visit(url, reduced_motion="reduce")
    day = feed.state.day
    names = [f"IRO1X{number:04}001" for number in range(2000)]
    for last in (1000, 1010):
        feed.add(*(event(instrument=name, last_price=last, trading_day=day, value=10**12) for name in names))
        expect(page.locator("#scroll tbody tr[data-id] td.last").first).to_have_text(
            "۱٬۰" + ("۰۰" if last == 1000 else "۱۰")
        )
    assert page.locator("#scroll tbody tr").count() < 60
    assert page.evaluate("document.getAnimations().length") == 0
    assert float(page.get_attribute("body", "data-ms") or "inf") < 1000


CLIPPED = """() => {
  const out = [];
  for (const card of document.querySelectorAll(".card, header, nav, #banner, #simulated")) {
    if (!card.checkVisibility()) continue;
    const box = card.getBoundingClientRect();
    for (const e of card.querySelectorAll("h2, button, dt, dd, bdi, input, select, canvas, th, .chip")) {
      if (!e.checkVisibility() || e.closest(".hidden, .skip")) continue;
      const r = e.getBoundingClientRect(), scrolls = e.closest(".scroll, #instrument, #ops") ;
      if (r.left < box.left - 1 || r.right > box.right + 1) out.push([card.id, e.tagName, e.id || e.textContent.slice(0, 30), "sideways"]);
      if (!scrolls && (r.top < box.top - 1 || r.bottom > box.bottom + 1)) out.push([card.id, e.tagName, e.textContent.slice(0, 30), "below"]);
      if (/^(BUTTON|DD|BDI|H2)$/.test(e.tagName) && !e.closest(".symbol, .title, .alert, #name, th") && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline") out.push([card.id, e.tagName, e.textContent.slice(0, 30), "cut"]);
    }
    for (const e of card.querySelectorAll("#scroll td.n, #scroll th.n button, #facts dt")) if (e.scrollWidth > e.clientWidth + 1) out.push([card.id, e.tagName, e.textContent, "cut"]);
  }
  if (document.documentElement.scrollWidth > innerWidth) out.push(["page", document.documentElement.scrollWidth]);
  return out;
}"""


@pytest.mark.parametrize(("lang", "theme"), [("fa", "dark"), ("en", "light")])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (820, 1180), (1440, 900)])
def test_nothing_is_cut_off_at_any_size(
    visit: Callable[..., Page], url: str, feed: Feed, width: int, height: int, lang: str, theme: str
) -> None:
    """Every part is inside its card; pictures are in build/screens."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    feed.add(*alerts_of_day())
    page = visit(f"{url}/#/{FOLD}", width=width, height=height)
    if lang == "en":
        page.click("#lang")
    if theme == "light":
        page.click("#theme")
        page.click("#unit")
    tabs = ["market", "instrument", "map", "alerts"] if width < 700 else [""]
    for tab in tabs:
        if tab:
            page.click(f"nav [data-tab={tab}]")
        if tab in {"", "instrument"}:
            expect(page.locator("#plot canvas")).to_have_attribute("data-bars", re.compile(r"\d+"))
        assert page.evaluate(CLIPPED) == []
        page.screenshot(path=SCREENS / f"{width}-{lang}-{theme}{tab and '-' + tab}.png")
    page.goto(f"{url}/#/ops")
    expect(page.locator("#ops .card").first).to_be_visible()
    assert page.evaluate(CLIPPED) == []


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement), pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = name => {
    pixel.fillStyle = style.getPropertyValue("--" + name).trim(); pixel.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  return ["ink", "dim", "up", "down", "warn", "hot"].flatMap(a => ["bg", "card", "raised", "on"].map(b => [a, b, ratio(a, b)]));
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_every_text_has_the_contrast_of_wcag_aa(visit: Callable[..., Page], url: str, theme: str) -> None:
    """4.5 to 1 for each colour of text on each colour of ground."""
    page = visit(url, color_scheme=theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert [pair for pair in page.evaluate(CONTRAST) if pair[2] < 4.5] == []


def test_everything_that_can_be_pressed_has_a_name(visit: Callable[..., Page], url: str, feed: Feed) -> None:
    """For screen readers, in both languages."""
    feed.add(*alerts_of_day())
    page = visit(url)
    for _ in range(2):
        nameless = "all => all.filter(e => !(e.getAttribute('aria-label') || e.title || e.placeholder || e.textContent.trim())).map(e => e.outerHTML)"
        assert page.locator("button, input, select, canvas, #scroll").evaluate_all(nameless) == []
        page.click("#lang")


def test_a_font_of_ones_own(visit: Callable[..., Page], feed: Feed) -> None:
    """It is loaded from here; without one nothing is asked for."""
    font = next(Path("/usr/share/fonts").rglob("DejaVuSans.ttf"), None)
    if font is None:
        pytest.skip("there is no font to load")
    with serving(feed, font=font) as url:
        page = visit(url)
        page.wait_for_function("() => [...document.fonts].some(f => f.family === 'own' && f.status === 'loaded')")


def test_every_word_is_in_the_manual() -> None:
    """The table of words in docs/board.md is that of the page."""
    words = re.findall(r'\w+: \["([^"]*)", "([^"]*)"\]', (PAGE / "words.js").read_text("utf-8"))
    table = (ROOT / "docs" / "board.md").read_text("utf-8").split("## Words\n")[1]
    assert table.strip().splitlines()[2:] == [f"| {fa} | {en} |" for fa, en in dict.fromkeys(words)]
    used = set(re.findall(r'\bt\("(\w+)"', (PAGE / "board.js").read_text("utf-8")))
    used |= set(re.findall(r'data-t="(\w+)"', (PAGE / "board.html").read_text("utf-8")))
    assert used <= set(re.findall(r'(\w+): \["', (PAGE / "words.js").read_text("utf-8")))


def test_the_page_is_small_and_asks_nobody_else() -> None:
    """Under 150 kB in all and 1,100 lines of scripts and styles."""
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files if path.suffix in {".js", ".css"}) <= 1100
    for path in files:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text("utf-8"))
        assert "innerHTML" not in path.read_text("utf-8")
