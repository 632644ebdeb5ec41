"""What rules mean, one small market at a time; files of rules; the commands; the consumer."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from deltalake import write_deltalake
from msgspec import structs
from structlog.testing import capture_logs

from bourse_cli.health import Monitor
from bourse_cli.root import bourse
from bourse_consumers.alerts.board import Named
from bourse_consumers.alerts.consumer import Alerts
from bourse_consumers.alerts.engine import Engine, Poll, columns_of
from bourse_consumers.alerts.rendering import millis
from bourse_consumers.alerts.rules_file import RuleFiles, compile_rule, load, strangers
from bourse_consumers.alerts.trial import Trial, polls_of
from bourse_consumers.api import Day, Reopen, WholePoll
from bourse_consumers.mistakes import Mistake
from bourse_consumers.records import Partition, Places
from bourse_consumers.rows import to_table
from bourse_consumers.runner import Runner
from bourse_consumers.testing import Memory, MemoryMarket, stream_of, trade
from bourse_producer.capture import Capture
from bourse_sandbox.demo import Demo
from bourse_sandbox.kafka import MockKafka
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import AlertState, Candle, FeedState, Outcome, Phase, PollMarker, PriceAlert, TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import ALERTS, CANDLES
from tests.producer.test_capture import Service

ROOT = Path(__file__).parents[2]
NINE = datetime(2019, 8, 24, 4, 30, tzinfo=UTC)  # 09:00 in Tehran
CODE = "IRO1TEST0001"


def event(price: int | None = 1000, volume: int = 1, **given: Any) -> TradeEvent:
    """Return an event of the poll it is given to."""
    usual: dict[str, Any] = {
        "trading_day": date(2019, 8, 24),
        "instrument": CODE,
        "symbol": "نماد",
        "previous_close": 1000,
        "closing_price": price,
        "trade_count": volume,
    }
    return trade(**{**usual, "last_price": price, "volume": volume, **given})


def marker(sequence: int, minute: float, **given: Any) -> PollMarker:
    """Return a good marker some minutes after nine."""
    at = NINE + timedelta(minutes=minute)
    counts = dict.fromkeys(
        ("rows", "opened", "traded", "revised", "cancelled", "stale_rows", "rejected_rows", "duplicate_rows"), 0
    )
    usual = {
        "poll_sequence": sequence, "simulated": False, "source": "test", "outcome": Outcome.PUBLISHED, "phase": Phase.OPEN,
        "feed_state": FeedState.FRESH, "requested_at": at, "received_at": at, "next_poll_at": at + timedelta(minutes=1),
        "day_final": False, "charged_calls": 1, **counts,
    }  # fmt: skip
    return PollMarker(**{**usual, **given})


class Market:
    """An engine, and polls for it."""

    def __init__(self, folder: Path, *rules: str, known: dict[str, Named] | None = None, **files: str) -> None:
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text, "utf-8")
        path = folder / "rules.yaml"
        path.write_text(
            "version: 1\nrules:\n" + "".join(f"  - {{name: r{n}, {rule}}}\n" for n, rule in enumerate(rules)), "utf-8"
        )
        self.rules = RuleFiles([path]).rules
        self.engine = Engine(self.rules, known)
        self.engine.open()
        self.sequence = 0
        self.alerts: list[PriceAlert] = []

    def poll(
        self, minute: float, *events: TradeEvent, complete: bool = True, replay: bool = False, **given: Any
    ) -> list[str]:
        """Judge a poll; return the states of the alerts, with the rule's number."""
        self.sequence += 1
        found = self.engine.take(
            Poll(marker(self.sequence, minute, **given), columns_of(events, self.engine.columns), replay, complete)
        )
        self.alerts += found
        return [f"{alert.state.value} {alert.rule}" for alert in found]


FIRING, RESOLVED = ["FIRING r0"], ["RESOLVED r0"]


# --- faults of the rules of before ------------------------------------------------------------------------------------


def test_an_alert_never_fires_below_its_own_threshold(tmp_path: Path) -> None:
    """Between `until` and `when` a pending condition is not true; an open episode goes on."""
    market = Market(tmp_path, "when: plp >= 3, until: plp < 1.5, for: 3m")
    assert market.poll(0, event(1030)) == []
    assert market.poll(1, event(1020, 2)) == []
    assert [market.poll(minute) for minute in range(2, 8)] == [[]] * 6
    market.poll(8, event(1030, 3))
    assert [market.poll(minute) for minute in (9, 10, 11)] == [[], [], FIRING]
    assert market.poll(12, event(1020, 4)) == []
    assert market.poll(13, event(1014, 5)) == RESOLVED


def test_windows_slide_in_minutes_without_a_trade(tmp_path: Path) -> None:
    """The episode ends when the window has passed, though nobody traded."""
    market = Market(tmp_path, 'when: "percent(last_price, 5m) >= 3"')
    market.poll(0, event(1000))
    assert market.poll(1, event(1050, 2)) == FIRING
    assert [market.poll(minute, outcome=Outcome.UNCHANGED) for minute in range(2, 7)] == [[], [], [], [], RESOLVED]


def test_silence_is_measured_by_the_clock_and_survives_restarts(tmp_path: Path) -> None:
    """From when the next marker was due; a new process knows it from the last marker."""
    market = Market(tmp_path, "scope: feed, when: silent >= 3m")
    due = millis(NINE + timedelta(minutes=1))
    market.poll(0)
    assert market.engine.tick(due + 179_000, 0) == []
    (alert,) = market.engine.tick(due + 180_000, 0)
    assert (alert.values, alert.poll_sequence) == ({"silent": 180.0}, 1)
    again = Engine(market.rules)
    again.open([alert])
    again.take(Poll(marker(1, 0), {}, replay=True))
    assert again.tick(due + 240_000, 5) == []
    assert [each.state.value for each in again.take(Poll(marker(2, 6), {}))] == ["RESOLVED"]
    fresh = Engine(market.rules)
    fresh.open()
    fresh.take(Poll(marker(1, 0), {}, replay=True))
    assert [each.state.value for each in fresh.tick(due + 240_000, 5)] == ["FIRING"]


def test_in_a_practice_market_silence_counts_from_the_last_marker(tmp_path: Path) -> None:
    """The wall clock means nothing there; times are those of the market."""
    market = Market(tmp_path, "scope: feed, when: silent >= 3m")
    market.poll(0, simulated=True)
    assert market.engine.tick(millis(NINE) * 2, 179_000) == []
    (alert,) = market.engine.tick(millis(NINE) * 2, 180_000)
    assert alert.raised_at == NINE + timedelta(minutes=3)


def test_a_feed_rule_falls_due_though_the_producer_died(tmp_path: Path) -> None:
    """Its time goes on by the clock."""
    market = Market(tmp_path, 'scope: feed, when: "feed_state in (DOWN, STALE)", for: 3m')
    assert market.poll(0, feed_state=FeedState.DOWN) == []
    assert market.engine.tick(millis(NINE) + 179_999, 0) == []
    assert len(market.engine.tick(millis(NINE) + 180_000, 0)) == 1


def test_quiet_counts_for_every_instrument_at_every_poll(tmp_path: Path) -> None:
    """By the time in which anybody traded; not by the partition's next trade."""
    market = Market(tmp_path, f"when: quiet >= 2m, match: {{instruments: [{CODE}]}}")
    other: dict[str, Any] = {"instrument": "IRO1TEST0002"}
    market.poll(0, event(), event(**other))
    market.poll(5)  # nobody traded: a rest of the market counts for nobody
    assert market.poll(6, event(volume=2, **other)) == []
    assert market.poll(7, event(volume=3, **other)) == FIRING
    assert market.poll(8, event(volume=2)) == RESOLVED


def test_an_annulment_and_a_trade_in_one_poll_is_a_trade(tmp_path: Path) -> None:
    """Totals decide: fewer trades and more shares."""
    market = Market(tmp_path, "when: quiet >= 1m")
    market.poll(0, event(volume=10, trade_count=10))
    assert market.poll(1, event(volume=20, trade_count=6, op="CANCELLED")) == []


def test_the_end_of_a_moment_has_its_own_poll_and_no_message(tmp_path: Path) -> None:
    """It is published at the next poll, also if nobody trades then; channels send no alert without a message."""
    market = Market(tmp_path, "when: annulled(volume) >= 5")
    market.poll(0, event(volume=10))
    assert market.poll(1, event(volume=3)) == FIRING
    assert market.poll(2, outcome=Outcome.UNCHANGED) == RESOLVED
    assert [alert.message is None for alert in market.alerts] == [False, True]


def test_an_edited_rule_keeps_its_episode_and_a_removed_one_ends(tmp_path: Path) -> None:
    """What was published continues; `once` counts what was published."""
    market = Market(tmp_path, "when: plp >= 3, once: true", "when: plp >= 2")
    assert market.poll(0, event(1030)) == ["FIRING r0", "FIRING r1"]
    edited = Market(tmp_path, "when: plp >= 2.5, once: true, message: edited")
    edited.engine.open(market.alerts)
    edited.poll(0, event(1030), replay=True)
    assert edited.poll(1) == ["RESOLVED r1"]
    assert edited.alerts[0].resolved_by == "RULE_REMOVED"
    assert edited.alerts[0].alert_id == market.alerts[1].alert_id
    assert edited.poll(2, event(1000, 2)) == RESOLVED
    assert edited.poll(3, event(1040, 3)) == []


def test_a_new_rule_says_at_the_next_poll_what_holds_then(tmp_path: Path) -> None:
    """With the time since when it holds."""
    market = Market(tmp_path, "when: plp >= 3, for: 2m")
    for minute in range(4):
        market.poll(minute, *([event(1030)] if minute == 0 else []), replay=True)
    assert market.poll(4) == FIRING
    assert market.alerts[0].since == NINE


def test_rows_of_yesterday_raise_nothing(tmp_path: Path) -> None:
    """Corrected before the open, they are of an earlier trading day."""
    market = Market(tmp_path, "when: plp >= 3")
    yesterday = event(1050, trading_day=date(2019, 8, 23))
    assert market.poll(-20, yesterday) == []
    assert market.poll(0, event(1000, trading_day=date(2019, 8, 24)), yesterday) == []
    assert market.engine.board.day == date(2019, 8, 24)


def test_conditions_that_could_not_be_said_before(tmp_path: Path) -> None:
    """Two prices, and with or, the whole market, what did not open, a table of levels."""
    market = Market(
        tmp_path,
        'when: "percent(last_price, closing_price) <= -3"',
        "when: plp >= 4.9 and quiet >= 1m or volume >= 500",
        "scope: market, when: share(plp < 0) >= 0.5 and count(plp < 0) >= 1",
        "when: quiet >= 2m, match: {symbols: [غایب]}",
        "when: last_price <= stop, match: {table: levels.csv}",
        known={"IRO1GONE0001": Named(0, "غایب", "شرکت غایب", is_right=False)},
        levels_csv="\ufeffنماد;stop\nنماد;۹۷۰\nدیگر;\n",
    )
    assert market.poll(0, event(1049, closing_price=1049)) == []
    assert market.poll(1, event(970, 500, closing_price=1001)) == ["FIRING r0", "FIRING r1", "FIRING r2", "FIRING r4"]
    assert market.poll(2, event(970, 501, closing_price=1001)) == ["FIRING r3"]
    missing = market.alerts[-1]
    assert (missing.instrument, missing.symbol, missing.last_price) == ("IRO1GONE0001", "غایب", None)
    assert market.alerts[3].when == "last_price <= 970"


@pytest.mark.parametrize(
    "written",
    ["اخزا۱۰۱", "اخزا101", "\u2068اخزا۱۰۱\u2069", "اخـزا١٠١", "\ufeffاخزا101\u200f", "اخزا\u200e101 "],
)
def test_spellings_of_a_symbol_mean_the_same(tmp_path: Path, written: str) -> None:
    """Digits, direction marks, isolates, byte order marks, tatweel: what is copied from a message matches."""
    market = Market(tmp_path, f'when: plp > 0, match: {{symbols: ["{written}"]}}')
    assert market.poll(0, event(1001, symbol="اخزا101")) == FIRING


def test_decomposed_letters_match(tmp_path: Path) -> None:
    """Alef with a separate madda is آ; Arabic yeh and kaf are Persian ones."""
    market = Market(tmp_path, 'when: plp > 0, match: {symbols: ["ا\u0653ريك"]}')
    assert market.poll(0, event(1001, symbol="آریک")) == FIRING


def test_a_template_cannot_ask_for_memory(tmp_path: Path) -> None:
    """Widths and conversions are mistakes; a null is a dash."""
    for bad in ("{symbol:>9999999999}", "{last_price!s}", "{last_price:>9999999999}", "{last_price:0{volume}d}"):
        with pytest.raises(ConfigurationError, match=r"rules.yaml:3:\d+"):
            Market(tmp_path, f'when: volume > 0, message: "{bad}"')
    market = Market(tmp_path, 'when: volume > 0, message: "{last_price:,} {plp:+.1f}"')
    market.poll(0, event(None))
    assert market.alerts[0].message == {"fa": "– –", "en": "– –"}


def test_terminal_escapes_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """Neither in alerts nor in mistakes."""
    lines = tmp_path / "events.ndjson"
    from msgspec.structs import asdict

    from bourse_schemas.codec import to_json

    # Not only ESC: click removes that itself if output is not a terminal.
    lines.write_text(to_json(asdict(event(1050, symbol="\x07\x9b31mنماد"))) + "\n", "utf-8")
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        'version: 1\nrules:\n  - {name: "r\\a\\e[31m", when: plp > 3}\n  - {name: "n\\a", when: plp > 9}\n'
    )
    for form, name in (("--list", "نماد"), ("--csv", "نماد"), ("--instrument=x", "never fired: n")):
        output = invoke("alerts", "test", str(rules), str(lines), form).output
        assert name in output
        assert not re.search(r"[^\n\x20-\x7e\xa0-\uffff]", output), output
    rules.write_text('version: 1\nrules: [{name: "\\a\\e[31m", whem: plp > 3}]\n', "utf-8")
    assert re.fullmatch(r"[\n\x20-\x7e\xa0-\uffff]+", str(invoke("alerts", "check", str(rules)).exception))


def test_records_of_a_topic_cannot_steer_the_terminal(
    tmp_path: Path, mock_kafka: MockKafka, small_registry: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither with tail, nor in the list of alerts, nor in the demo; of those listed as open the day is the latest."""
    market = Market(tmp_path, "when: plp >= 3, message: '{symbol}'")
    market.poll(0, event(1030, symbol="\x07\x9b31mدیروز", trading_day=date(2019, 8, 24)))
    old = market.alerts[0]
    new = structs.replace(old, alert_id="2", trading_day=date(2019, 8, 25), message={"en": "\x07\x9b31mامروز"})
    ended = structs.replace(new, alert_id="3")
    options = [
        *("--bootstrap-servers", mock_kafka.bootstrap_servers, "--registry-url", small_registry),
        *("--topic-prefix", prefix),
    ]
    cluster = Cluster(mock_kafka.bootstrap_servers, small_registry, prefix)
    cluster.registry().register(ALERTS, prefix)
    serialize = cluster.registry().serializer(ALERTS, prefix)
    producer = cluster.transactional_producer(f"{prefix}-test")
    producer.init_transactions(10)
    producer.begin_transaction()
    for alert in (old, new, ended, structs.replace(ended, state=AlertState.RESOLVED)):
        producer.produce(ALERTS.full_name(prefix), serialize(alert).value, b"key", 0)
    producer.commit_transaction(10)
    producer.close()
    listed = invoke("alerts", "list", "--open", *options).output
    assert ("امروز" in listed, listed.count("\n")) == (True, 1)
    tailed = invoke("tail", "alerts", "--from-beginning", "--exit-at-end", *options).output
    assert tailed.count("\n") == 4
    demo = Demo(
        rules=tmp_path,
        market=[],
        poll_seconds=1,
        broker="mock",
        seconds=None,
        as_json=False,
        data=tmp_path,
        no_open=True,
        loop=False,
        stop=threading.Event(),
    )
    demo._take_alert(old)
    shown = capsys.readouterr().out
    assert "دیروز" in shown
    for output in (listed, tailed, shown):
        assert not re.search(r"[^\n\x20-\x7e\xa0-\uffff]", output), output


# --- semantics --------------------------------------------------------------------------------------------------------


def test_the_day_ends_what_is_open(tmp_path: Path) -> None:
    """With day_final; else with the first good poll of a later day, which need not have events."""
    market = Market(tmp_path, "when: plp >= 3")
    market.poll(0, event(1030))
    assert market.poll(1, day_final=True) == RESOLVED
    assert market.alerts[-1].resolved_by == "DAY_END"
    assert market.poll(2, event(1050, 2)) == []
    market = Market(tmp_path, "when: plp >= 3")
    market.poll(0, event(1030))
    assert market.poll(20 * 60, outcome=Outcome.FAILED) == []
    assert market.poll(24 * 60 - 30, outcome=Outcome.UNCHANGED) == RESOLVED


def test_after_a_gap_a_window_that_begins_in_it_is_unknown(tmp_path: Path) -> None:
    """And `for` starts again; before, crossings and annulments go across it."""
    market = Market(
        tmp_path,
        'when: "percent(last_price, 5m) >= 3"',
        "when: plp >= 3, for: 2m",
        'when: "crossed_up(last_price, 1030)"',
    )
    market.poll(0, event(1000))
    assert market.poll(20, event(1050, 2), gap_from=NINE) == ["FIRING r2"]
    assert market.poll(21) == ["RESOLVED r2"]
    assert market.poll(22) == ["FIRING r1"]


def test_an_incomplete_poll_is_not_judged(tmp_path: Path) -> None:
    """Its events are used; the next poll is judged as after a gap."""
    market = Market(tmp_path, "when: plp >= 3, for: 1m")
    market.poll(0, event(1030))
    assert market.poll(1, event(1031, 2), complete=False) == []
    assert market.poll(2) == []
    assert market.poll(3) == FIRING


def test_levels_of_the_first_poll_come_from_yesterday(tmp_path: Path) -> None:
    """Crossings and steps compare with the previous close; before() is unknown."""
    market = Market(
        tmp_path, 'when: "crossed_up(last_price, 1020)"', 'when: "stepped(plp, 2)"', "when: before(last_price) > 0",
        'when: "crossed_down(volume, 5)"',
    )  # fmt: skip
    assert market.poll(0, event(1030)) == ["FIRING r0", "FIRING r1"]


def test_equal_is_equal_to_a_billionth(tmp_path: Path) -> None:
    """3 % of 1000 is reached at 1030; 4.9 % of 30,020 at 31,491 and not before."""
    market = Market(tmp_path, "when: plp >= 3", "when: plp >= 4.9, match: {symbols: [ب]}")
    assert market.poll(0, event(1029), event(31490, instrument="IRO1TEST0002", symbol="ب", previous_close=30020)) == [
        "FIRING r0"
    ]
    market.alerts.clear()
    assert market.poll(1, event(1030, 2), event(31491, 2, instrument="IRO1TEST0002", symbol="ب", previous_close=30020)) == [
        "FIRING r0", "FIRING r1",
    ]  # fmt: skip


def test_unknown_neither_begins_nor_ends(tmp_path: Path) -> None:
    """A null price, a previous close of 0: not (unknown) is unknown."""
    market = Market(tmp_path, "when: plp >= 3", "when: not plp < 3")
    assert market.poll(0, event(1030, previous_close=0)) == []
    assert market.poll(1, event(1030, 2)) == ["FIRING r0", "FIRING r1"]
    assert market.poll(2, event(None, 3)) == []
    assert market.poll(3, event(1000, 4)) == ["RESOLVED r0", "RESOLVED r1"]


def test_a_renamed_symbol_is_covered_from_then_on(tmp_path: Path) -> None:
    """By either name, for the rest of the day."""
    market = Market(tmp_path, "when: last_price > 1000, match: {symbols: [نو]}, cooldown: 0s")
    assert market.poll(0, event(1001)) == []
    assert market.poll(1, event(1002, 2, symbol="نو")) == FIRING
    assert market.poll(2, event(1003, 3)) == []
    assert market.poll(3, event(1000, 4)) == RESOLVED


def test_cooldown_and_hours(tmp_path: Path) -> None:
    """What still holds is raised when they are over."""
    market = Market(tmp_path, "when: plp >= 1, cooldown: 5m, active: 09:02-09:20")
    assert [market.poll(minute, event(1010, minute + 1)) for minute in range(3)] == [[], [], FIRING]
    assert market.poll(3, event(1000, 9)) == RESOLVED
    assert [market.poll(minute, event(1010, 10 + minute)) for minute in (4, 6, 7)] == [[], [], FIRING]
    assert market.poll(21, event(1000, 90)) == RESOLVED
    assert market.poll(22, event(1010, 91)) == []


def test_prices_beyond_a_float_are_printed_exactly(tmp_path: Path) -> None:
    """A market value of 10^16 + 1 keeps its last rial in messages."""
    market = Market(tmp_path, 'when: volume > 0, message: {en: "{market_value:,}", fa: "{market_value:,} {quiet}"}')
    market.poll(0, event(market_value=10**16 + 1))
    assert market.alerts[0].message == {"en": "10,000,000,000,000,001", "fa": "۱۰٬۰۰۰٬۰۰۰٬۰۰۰٬۰۰۰٬۰۰۱ ۰ ثانیه"}


def test_the_usual_message_names_what_is_compared(tmp_path: Path) -> None:
    """In words, with values; durations as people say them."""
    market = Market(tmp_path, "when: plp >= 3 and quiet >= 12m")
    market.poll(0, event(1032, title="شرکت"), event(instrument="IRO1TEST0002"))
    market.poll(12, event(volume=2, instrument="IRO1TEST0002"))
    (alert,) = market.alerts
    assert alert.message
    assert (
        alert.message["en"]
        == "نماد (شرکت): 1,032 (+3.20%), last price against yesterday's price +3.20%, not traded for 12 min"
    )
    assert re.sub("[\u2066\u2069]", "", alert.message["fa"]) == (
        "نماد (شرکت): ۱٬۰۳۲ (+۳٫۲۰٪)، آخرین قیمت نسبت به قیمت دیروز +۳٫۲۰٪، بدون معامله به مدت ۱۲ دقیقه"
    )
    assert alert.values == {"percent(last_price, previous_close)": pytest.approx(3.2), "quiet": 720.0}


def test_many_rules_that_name_instruments_are_found_by_name(tmp_path: Path) -> None:
    """Market, except and patterns limit them."""
    market = Market(
        tmp_path, "when: volume > 0, match: {market: farabourse}", "when: volume > 0, except: {symbols: [نماد]}",
        'when: volume > 0, match: {patterns: ["نم*"]}', "when: volume > 0, match: {rights: true}",
    )  # fmt: skip
    other = event(instrument="IRO3TEST0001", symbol="دیگر")
    assert market.poll(0, event(), other) == ["FIRING r0", "FIRING r1", "FIRING r2"]


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("last_price >", "not_an_expression"), ("", "empty"), ("last_price", "kind"), ("tmax > 3", "not_sent"),
        ("lastprice > 3", "unknown_name"), ("percnt(last_price, 5m) > 3", "unknown_function"), ("quiet() > 5m", "no_brackets"),
        ("change(volume) > 3", "arguments"), ("quiet >= 10", "compared"), ("share(plp > 0) > 1", "market_only"),
        ("().__class__ > 3", "not_part"), ("last_price ** 2 > 3", "not_part"), ("'a' > 3", "not_part"), ("(" * 150, "not_an_expression"),
        ("-" * 1500 + "1 > 0", "too_deep"), ("1e999 > 0", "too_large"), ("x" * 3000, "too_long"), ("ago(volume, 0s) > 1", "window"),
        ("stepped(plp, 0)", "step"), ("9" * 5000 + " > 1", "too_long"), ("9" * 400 + " > last_price", "too_large"), ("True", "not_part"),
        ("(last_price := 3) > 2", "not_part"), ("lambda: 3", "not_part"), ("last_price > 3 if volume else 2", "not_part"),
    ],
)  # fmt: skip
def test_what_is_not_an_expression(expression: str, text: str) -> None:
    """Is a mistake with its place, and nothing is evaluated."""
    with pytest.raises(Mistake) as caught:
        compile_rule(expression)
    assert caught.value.text == text
    assert 0 <= caught.value.at <= len(expression)


# --- files ------------------------------------------------------------------------------------------------------------


def wrong(folder: Path, text: str, **files: str) -> str:
    """Return the mistakes of a file of rules."""
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, "utf-8")
    path = folder / "rules.yaml"
    path.write_text(text, "utf-8")
    _, _, error = load(path)
    assert error, "no mistake was found"
    return error.replace(str(folder) + "/", "")


def test_every_mistake_at_once_with_a_line_to_paste(tmp_path: Path) -> None:
    """File, line, column, caret, and the corrected line; numbers are read as they are written."""
    found = wrong(
        tmp_path,
        """version: 1
rules:
  - name: one
    when: percnt(last_price, 5m) >= 3
    cooldwn: 5m
  - name: two
    when: plp > 0550
    for: 1:30
    active: 9:30-12:15
  - {name: three, when: percent(last_price, 5m) >= 3, severity: critcal}
  - name: four
    when: plp >= 3
    until: plp < 4
  - name: five
    when: crossed_up(last_price, 5)
    for: 5m
    message: "{symbl} {last_price"
  - name: four
    when: last_price <= stop
    match: {table: levels.csv}
""",
        levels_csv="نماد;stop;5x\nالف;12x;3\nالف;5;6\n",
    )
    for expected in (
        "rules.yaml:4:11: one: when: no function is called 'percnt'; did you mean percent?\n    when: percnt(last_price, 5m) >= 3\n          ^^^^^^\n    write: when: percent(last_price, 5m) >= 3",
        "rules.yaml:5:5: rule one: unknown key; did you mean cooldown?",
        "write: when: plp > 550",
        "write: for: 1m30s",
        "write: active: 09:30-12:15",
        '    write: - {name: three, when: "percent(last_price, 5m) >= 3", severity: critcal}',
        "rules.yaml:13:12: four: until: `until` is true while `when` holds",
        "rules.yaml:16:10: five: for: `when` can hold for one poll only",
        "a brace without its partner",
        "rules.yaml:18:11: two rules are called 'four'",
        "levels.csv:1:11: '5x' cannot be the name of a column",
        "levels.csv:2:5: '12x' is not a number\n    الف;12x;3\n        ^^^\n    write: الف;12;3",
        "levels.csv:3:1: 'الف' is in the table twice",
    ):
        assert expected in found, (expected, found)
    assert len(re.findall(r"^\S+:\d+:\d+: ", found, re.MULTILINE)) == len(
        re.findall(r"^    write: ", found, re.MULTILINE)
    )


def test_no_other_rule_is_proposed(tmp_path: Path) -> None:
    """If what is meant cannot be known, nothing is proposed: no other severity, channel, column or level."""
    urgent = wrong(tmp_path, "version: 1\nrules:\n  - {name: a, when: plp > 3, severity: urgent}\n")
    assert "rule a: Input should be 'info', 'warning' or 'critical'\n" in urgent
    path = tmp_path / "rules.yaml"
    path.write_text("version: 1\nrules:\n  - {name: a, when: plp > 3, notify: [mail, deks]}\n", "utf-8")
    channels = load(path, ["risk", "desk"])[2] or ""
    assert re.findall(r"no channel is called (.*)", channels) == [
        "'mail'; there are risk, desk",
        "'deks'; did you mean desk?",
    ]
    rule = "version: 1\nrules:\n  - {name: a, match: {MATCH}, when: last_price <= stop and plp > limt, message: '{stop}'}\n"
    for match in ("table: missing.csv", "tabel: levels.csv", "table: empty.csv"):
        unread = wrong(tmp_path, rule.replace("MATCH", match), empty_csv="")
        assert "no column is called" not in unread
        assert len(re.findall(r":\d+:\d+: ", unread)) == 1
    assert "no column is called 'limt'" in wrong(
        tmp_path, rule.replace("MATCH", "table: t.csv"), t_csv="symbol,stop\nنماد,5\n"
    )
    cells = ("خطایی", "5k", "1e5", "12,5", "۵ میلیون", "12x", "-5 %", "۱۲۰۰ ریال")
    table = "symbol;stop\n" + "".join(f"نماد{n};{cell}\n" for n, cell in enumerate(cells))
    levels = wrong(tmp_path, rule.replace("MATCH", "table: t.csv"), t_csv=table)
    assert re.findall(r"write: نماد\d;(.*)", levels) == ["", "", "", "", "", "12", "-5", "1200"]
    assert len(re.findall(r"is not a number", levels)) == len(cells)
    assert all(text.count("write:") == 0 for text in (urgent, channels.partition("deks")[0]))


@pytest.mark.parametrize(
    ("rule", "key"),
    [("{name: a, wen: last_price >= 5}", "when"), ("{nmae: a, when: last_price >= 5}", "name")],
)
def test_a_misspelt_key_is_not_missing_too(tmp_path: Path, rule: str, key: str) -> None:
    """It is one mistake, and the value that was written is kept."""
    found = wrong(tmp_path, f"version: 1\nrules:\n  - {rule}\n")
    assert re.findall(r":\d+:\d+: (.*)", found) == [f"rule{' a' * (key == 'when')}: unknown key; did you mean {key}?"]
    assert "    write: - {name: a, when: last_price >= 5}" in found
    found = wrong(tmp_path, "version: 1\nrles:\n  - {name: a, when: plp > 3}\n")
    assert re.findall(r":\d+:\d+: (.*)", found) == ["unknown key; did you mean rules?"]
    assert "'when' is missing" in wrong(tmp_path, "version: 1\nrules:\n  - {name: a, when: , other: 5}\n")


def test_a_corrected_line_is_correct(tmp_path: Path) -> None:
    """Pasting what is proposed leaves no mistake."""
    text = 'version: 1\nrules:\n  - name: a\n    when: abs(percnt(last_price, 5 minutes)) >= 3\n    for: "10"\n    once: yes\n'
    for _ in range(4):
        path = tmp_path / "rules.yaml"
        path.write_text(text, "utf-8")
        _, _, error = load(path)
        if error is None:
            return
        lines = text.splitlines()
        for line, fix in re.findall(r"rules.yaml:(\d+):\d+: .*\n.*\n.*\n    write: (.*)", error):
            lines[int(line) - 1] = "    " + fix
        text = "\n".join(lines) + "\n"
    pytest.fail(str(error))


@pytest.mark.parametrize(
    ("written", "corrected"),
    [
        ("percnt(last_price, 5 minutes) => 3 && PLP > 5%", "percent(last_price, 5m) >= 3 and plp > 5"),
        ("abs(percent(last_price, 5m) >= 3", "abs(percent(last_price, 5m)) >= 3"),
        ("abs(percent(last_price, 5m) >= 3 and volume > 5", "abs(percent(last_price, 5m)) >= 3 and volume > 5"),
        ("plp >= 3) and volume > 5", "plp >= 3 and volume > 5"),
        ("quiet >= 10 and plp > 3", "quiet >= 10m and plp > 3"),
        ("change(volume, 5) > 3", "change(volume, 5m) > 3"),
        ("change(volume) > 3", "change(volume, 5m) > 3"),
        ("ago(last_price, 5m, 3) > lastPrice", "ago(last_price, 5m) > last_price"),
        ("plp and volume > 3", "plp > 0 and volume > 3"),
        ("plp > 3 & volume > 1,000,000", "plp > 3 and volume > 1_000_000"),
        ("volume = 3 or quiet() > 5m", "volume == 3 or quiet > 5m"),
        ("percent > 3", "percent(last_price, 5m) > 3"),
        ("last_price <= stopp", "last_price <= stop"),
        ("plp > (lim", "plp > (lim1)"),
        ("percent(last_price, 5x) > 3", "percent(last_price, 5m) > 3"),
        ("plp > 3x", "plp > 3"),
        ("quiet >= 90sec", "quiet >= 90s"),
        ("quiet >= 5M", "quiet >= 5m"),
        ("volume > 5M and plp > 3", "volume > 5_000_000 and plp > 3"),
        ("change(value, 5m) > 2b", "change(value, 5m) > 2_000_000_000"),
        ("volume > 5m", "volume > 5_000_000"),
    ],
)
def test_an_expression_is_corrected_as_a_whole(tmp_path: Path, written: str, corrected: str) -> None:
    """Near names, functions, kinds, brackets, operators: every mistake of it, and it is quoted if it needs that."""
    for text in ("  - name: a\n    let: {lim1: 4}\n    match: {table: levels.csv}\n    when: WHEN\n",
                 "  - {name: a, let: {lim1: 4}, match: {table: levels.csv}, when: \"WHEN\"}\n"):  # fmt: skip
        found = wrong(
            tmp_path, "version: 1\nrules:\n" + text.replace("WHEN", written), levels_csv="symbol,stop\nنماد,5\n"
        )
        assert f"    write: {text.strip().splitlines()[-1].strip().replace('WHEN', corrected)}" in found
        path = tmp_path / "rules.yaml"
        path.write_text("version: 1\nrules:\n" + text.replace("WHEN", corrected), "utf-8")
        assert load(path)[2] is None


@pytest.mark.parametrize(
    "written",
    [
        "plp > 5M",
        "pcp >= 3k",
        "percent(volume, 5m) > 5M",
        "move > 2b",
        "quiet > 5K",
        "volume / 2 > 5M",
        "plp > 5m",
        "plp > quiet",
    ],
)
def test_an_amount_is_proposed_for_amounts_only(tmp_path: Path, written: str) -> None:
    """A percentage of millions, or of minutes, is not what was meant: the place is shown, and nothing to paste."""
    rule = f"{{name: a, let: {{move: plp}}, when: '{written}', message: '{{{written.partition(' >')[0]} + 5K}}'}}"
    found = wrong(tmp_path, f"version: 1\nrules:\n  - {rule}\n")
    assert re.findall(r":3:(\d+): a: when: ", found), found
    assert "write:" not in found


def test_an_expression_to_try_is_corrected(tmp_path: Path) -> None:
    """Like that of a rule, and those in a message."""
    shown = str(invoke("alerts", "try", "abs(percnt(last_price, 5) >= 3").exception)
    assert shown.endswith("    write: abs(percent(last_price, 5)) >= 3")
    shown = str(invoke("alerts", "try", "percent(last_price, 5x) >= 3").exception)
    assert shown.startswith("'5x' is neither a number nor a duration\n")
    text = "version: 1\nrules:\n  - {name: a, when: plp > 3, message: '{symbol} {change(volum):,} {abs(plp:.1f}'}\n"
    found = wrong(tmp_path, text)
    assert "{change(volume, 5m):,}" in found
    assert "{abs(plp):.1f}" in found


def test_mistakes_in_persian(tmp_path: Path) -> None:
    """With --language fa."""
    (tmp_path / "rules.yaml").write_text("version: 1\nrules:\n  - {name: a, whem: plp > 3}\n", "utf-8")
    done = invoke("alerts", "check", "--language", "fa", str(tmp_path / "rules.yaml"))
    assert isinstance(done.exception, ConfigurationError)
    assert "منظور when بود؟" in str(done.exception)
    assert "بنویسید: " in str(done.exception)


def test_yaml_anchors_and_merge_keys(tmp_path: Path) -> None:
    """A key of its own replaces the merged one; the same key twice is a mistake."""
    path = tmp_path / "rules.yaml"
    path.write_text(
        "version: 1\nrules:\n  - &base {name: a, when: plp > 3, cooldown: 5m}\n  - {<<: *base, name: b, cooldown: 1m}\n",
        "utf-8",
    )
    rules, _, error = load(path)
    assert error is None
    assert rules
    assert [(rule.name, rule.cooldown) for rule in rules] == [("a", 300_000), ("b", 60_000)]
    assert "name: the key is given twice" in wrong(
        tmp_path, "version: 1\nrules:\n  - {name: a, name: b, when: plp > 3}\n"
    )


def test_named_expressions(tmp_path: Path) -> None:
    """They may use each other, of the file and of the rule; a circle is a mistake."""
    market = Market(
        tmp_path, 'let: {w: 5m, move: "percent(last_price, w)", big: move >= limit, limit: 3}, when: big and plp > 0'
    )
    assert market.rules[0].when.text == "percent(last_price, 5m) >= 3 and percent(last_price, previous_close) > 0"
    assert "'a' depends on itself" in wrong(
        tmp_path, "version: 1\nrules:\n  - {name: x, when: a > 1, let: {a: b, b: a}}\n"
    )


def test_rules_that_differ_by_numbers_are_judged_together(tmp_path: Path) -> None:
    """One shape, whatever the numbers, a table's too."""
    market = Market(
        tmp_path, "when: last_price <= 900", "when: last_price <= 950.5", "when: last_price <= stop, match: {table: t.csv}",
        "when: last_price >= 900", t_csv="symbol,stop\nنماد,990\n",
    )  # fmt: skip
    assert len({rule.when.node.key for rule in market.rules}) == 2
    assert market.poll(0, event(945)) == ["FIRING r1", "FIRING r2", "FIRING r3"]


def test_a_bad_file_keeps_its_rules_while_others_load(tmp_path: Path) -> None:
    """Of a folder; tables count as well; a deleted file takes its rules along."""
    (tmp_path / "a.yaml").write_text("version: 1\nrules: [{name: x, when: plp > 3, match: {table: t.csv}}]\n", "utf-8")
    (tmp_path / "b.yaml").write_text("version: 1\nrules: [{name: x, when: plp > 4}]\n", "utf-8")
    (tmp_path / "t.csv").write_text("symbol,stop\nالف,1\n", "utf-8")
    files = RuleFiles([tmp_path])
    assert [rule.name for rule in files.rules] == ["a/x", "b/x"]
    assert not files.refresh()
    (tmp_path / "t.csv").write_text("symbol,stop\nالف,one\n", "utf-8")
    (tmp_path / "b.yaml").write_text("version: 1\nrules: [{name: y, when: plp > 4}]\n", "utf-8")
    assert files.refresh()
    assert [rule.name for rule in files.rules] == ["a/x", "b/y"]
    assert files.trouble
    assert "t.csv:2:5: 'one' is not a number" in files.trouble
    (tmp_path / "t.csv").write_text("symbol,stop\nالف,10\n", "utf-8")
    assert files.refresh()
    assert files.trouble is None
    (tmp_path / "b.yaml").unlink()
    assert files.refresh()
    assert [rule.name for rule in files.rules] == ["x"]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """Their rules would have the same names. While it runs, the file that was read first stays in force."""
    paths = [tmp_path / name for name in ("a/rules.yaml", "b/rules.yaml", "a/rules.yml")]
    for n, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"version: 1\nrules: [{{name: r{n}, when: plp > 3}}]\n", "utf-8")
    for given in ([paths[0], paths[1]], [paths[0], paths[2]], [tmp_path / "a"]):
        done = invoke("alerts", "check", *map(str, given))
        other = paths[1] if given[-1] == paths[1] else paths[2]
        assert str(done.exception) == f"{paths[0]} and {other} have the same name, and so do their rules: rename one"
    assert invoke("alerts", "check", str(paths[1]), str(tmp_path / "b")).output.endswith(": 1 rules, ok\n")
    paths[0].unlink()
    files = RuleFiles([tmp_path / "a"])
    paths[0].write_text("version: 1\nrules: [{name: new, when: plp > 3}]\n", "utf-8")
    assert not files.refresh()
    assert [rule.name for rule in files.rules] == ["r2"]
    assert f"{paths[2]} and {paths[0]} have the same name" in (files.trouble or "")
    paths[2].unlink()
    assert files.refresh()
    assert ([rule.name for rule in files.rules], files.trouble) == (["new"], None)


def test_random_files_are_mistakes_and_never_tracebacks(tmp_path: Path) -> None:
    """Mutated rules, tables and expressions; each within seconds."""
    chance = random.Random(5)  # repeatable on purpose
    seeds = [(ROOT / "examples" / "rules.yaml").read_text("utf-8"), "version: 1\nrules: [{name: a, when: plp > 1}]\n"]
    pieces = ["{", "}", "[", "]", ": ", "\n", "&a ", "*a", "<<: ", "- ", "!!int ", "'", '"', "\\", "|", "> ", "plp", "((", "5m", "۱۲", "\u200f",
              "\ufeff", "\x00", "\x85", "\t", "#", "1:30", "0x", "1e999", "~", "when", "*" * 30, "?", "%", "@", "`"]  # fmt: skip
    (tmp_path / "levels.csv").write_text("symbol;stop;target\nالف;1;2\n", "utf-8")
    path = tmp_path / "rules.yaml"
    seconds = float(os.environ.get("FUZZ_SECONDS", "4"))
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    while datetime.now(UTC) < end:
        text = chance.choice(seeds)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(pieces) + text[at + chance.randint(0, 9) :]
        path.write_text(text, "utf-8", errors="surrogatepass")
        began = datetime.now(UTC)
        rules, _, error = load(path)
        assert (rules is None) == (error is not None)
        assert datetime.now(UTC) - began < timedelta(seconds=5)


@pytest.mark.parametrize(
    "text",
    ["a: &a [x]\nb: &b [*a,*a]\n" + "".join(f"c{n}: &c{n} [*b,*b]\n" for n in range(9)), "[" * 5000, "{" * 5000, "a: &a {<<: *a}\n",
     "&a {" + ", ".join(f"<<: *a, k{n}: 1" for n in range(99)) + "}", "- " * 5000, "version: 1\nrules:\n  - " + "{a: " * 900],
)  # fmt: skip
def test_files_that_mean_harm(tmp_path: Path, text: str) -> None:
    """Aliases, merges and depth: a mistake within a moment."""
    assert wrong(tmp_path, text)


def test_names_that_nothing_has_are_named_with_the_nearest(tmp_path: Path) -> None:
    """By symbol and by code."""
    market = Market(tmp_path, "when: plp > 1, match: {symbols: [فولاذ], instruments: [IRO1TEST0009]}")
    known = {"IRO1FOLD0001": "فولاد", "IRO1TEST0001": "نماد"}
    assert list(strangers(market.rules, known)) == [
        "rule r0: no instrument is called 'IRO1TEST0009'; did you mean IRO1TEST0001?",
        "rule r0: no instrument is called 'فولاذ'; did you mean فولاد?",
    ]
    with pytest.raises(ConfigurationError) as caught:
        RuleFiles([tmp_path / "rules.yaml"], known=known)
    assert str(caught.value).splitlines()[4:] == [
        f"{tmp_path}/rules.yaml:3:71: rule r0: no instrument is called 'IRO1TEST0009'; did you mean IRO1TEST0001?",
        "    - {name: r0, when: plp > 1, match: {symbols: [فولاذ], instruments: [IRO1TEST0009]}}",
        f"{' ' * 72}{'^' * 12}",
        "    write: - {name: r0, when: plp > 1, match: {symbols: [فولاذ], instruments: [IRO1TEST0001]}}",
    ]
    with pytest.raises(ConfigurationError) as caught:
        RuleFiles([tmp_path / "rules.yaml"], known={"XXXXXXXXXXXX": "?"})
    assert str(caught.value).count("no instrument is called") == 2
    assert "write:" not in str(caught.value)


# --- commands ---------------------------------------------------------------------------------------------------------


def invoke(*args: str) -> Result:
    """Run a command."""
    return CliRunner().invoke(bourse, args)


def test_the_examples_are_quiet_enough(tmp_path: Path) -> None:
    """Twelve rules with Persian titles: at most 150 alerts on a real day, at most 10 in a minute after ten past nine."""
    rules = RuleFiles([ROOT / "examples" / "rules.yaml"]).rules
    assert len(rules) == 12
    assert all(re.search("[آ-ی]", rule.title or "") for rule in rules)
    from bourse_consumers.alerts.trial import read, real_day

    for path in (real_day(), ROOT.parent / "shared" / "data" / "day-2019-08-24.ndjson.gz"):
        if not path.is_file():
            continue
        trial = Trial(rules)
        trial.run(polls_of(read([path])))
        fired = [alert for alert in trial.alerts if alert.state == "FIRING"]
        assert 20 < len(fired) <= 150
        minutes: dict[datetime, int] = {}
        for alert in fired:
            minute = alert.raised_at.replace(second=0, microsecond=0)
            minutes[minute] = minutes.get(minute, 0) + 1
        assert max(count for minute, count in minutes.items() if f"{minute.time()}" > "04:40") <= 10


def test_every_further_percent_is_raised_and_the_way_back_is_not(tmp_path: Path) -> None:
    """A trader wants to hear of 1 %, 2 %, 3 % up or down, also at the opening; not that the price is back."""
    (rule,) = [rule for rule in RuleFiles([ROOT / "examples" / "rules.yaml"]).rules if rule.name == "every-percent"]
    engine = Engine([replace(rule, cooldown=0)])
    engine.open()
    fired = []
    prices = [1031, 1031, 1042, 1039, 1021, 1003, 998, 1001, 988, 988, 975, 991, 1000, 1000, 1011]
    for n, price in enumerate(prices):
        some = event(price, n + 1, symbol="فولاد")
        found = engine.take(Poll(marker(n + 1, n), columns_of([some], engine.columns)))
        fired += [price for alert in found if alert.state == "FIRING"]
    assert fired == [1031, 1042, 988, 975, 1011]


def test_trying_rules_on_the_real_day(tmp_path: Path) -> None:
    """Without a cluster: the summary first says what never fired and how near it came; JSON, CSV, a page."""
    (tmp_path / "rules.yaml").write_text(
        "version: 1\nrules:\n  - {name: never, when: plp >= 50}\n"
        "  - {name: some, title: حرکت, when: plp >= 4.9 and volume > 1e7, notify: [desk]}\n", "utf-8",
    )  # fmt: skip
    path = str(tmp_path / "rules.yaml")
    lines = invoke("alerts", "test", path).output.splitlines()
    assert lines[0].startswith("98 polls, 19,346 events")
    assert lines[2].startswith("never fired: never (percent(last_price, previous_close) reached ")
    assert any(line.endswith("  some") for line in lines)
    assert any(line.startswith("messages to desk: ") for line in lines)
    done = invoke("alerts", "test", path, "--json", "--html", str(tmp_path / "page.html"))
    alerts = [json.loads(line) for line in done.output.splitlines()]
    assert {alert["rule"] for alert in alerts} == {"some"}
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<svg") == 6
    assert "<bdi>حرکت</bdi>" in page
    assert "http" not in page.replace("http-equiv", "")
    assert len(invoke("alerts", "test", path, "--csv").output.splitlines()) == len(alerts) + 1


def test_what_a_trial_cannot_do_is_one_line(tmp_path: Path) -> None:
    """A page that cannot be written; a day that the files do not have."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("version: 1\nrules: [{name: r, when: plp >= 3}]\n", "utf-8")
    for page, why in ((tmp_path, "Is a directory"), (tmp_path / "none" / "page.html", "No such file or directory")):
        done = invoke("alerts", "test", str(rules), "--html", str(page))
        assert isinstance(done.exception, ConfigurationError)
        assert str(done.exception) == f"--html: {page} cannot be written: {why}"
    done = invoke("alerts", "test", str(rules), "--day", "2020-01-01", "--day", "2019-08-21")
    assert isinstance(done.exception, ConfigurationError)
    assert str(done.exception) == "--day 2020-01-01: nothing is known of that day; the days are: 2019-08-21"


def test_trying_an_expression(tmp_path: Path) -> None:
    """Who it held for on the real day; a mistake is shown with a caret."""
    done = invoke("alerts", "try", "plp >= 4.9 and quiet >= 30m")
    assert re.search(r"held for \d+ instruments, \d+ episodes", done.output)
    assert str(invoke("alerts", "try", "plp >= ").exception).startswith("this is not an expression")
    assert "^^^" in str(invoke("alerts", "try", "foo > 3").exception)


# --- the consumer -----------------------------------------------------------------------------------------------------


class Topics:
    """What the topics hold for a market consumer that becomes active."""

    def __init__(self, alerts: Sequence[PriceAlert] = (), candles: Sequence[Candle] = ()) -> None:
        self._held = {ALERTS.name: alerts, CANDLES.name: candles}

    def day(self) -> Day:
        return Day(lambda topic: self._held[topic.name])


def test_the_consumer_continues_after_a_restart_and_reads_changed_rules(tmp_path: Path) -> None:
    """Open episodes come from the topic, a changed file opens it again, a wrong one is trouble."""
    path = tmp_path / "rules.yaml"
    path.write_text("version: 1\nrules: [{name: a, when: plp >= 3}]\n", "utf-8")
    files = RuleFiles([path])
    consumer = Alerts(files)
    consumer.open(Topics().day())
    polls = [
        WholePoll(marker(1, 0, opened=1), load_events=lambda: [event(1030)]),
        WholePoll(marker(2, 1, traded=1), load_events=lambda: [event(1000, 2)]),
    ]
    (fired,) = consumer.process_poll(polls[0])
    again = Alerts(files)
    again.open(Topics([fired.event]).day())  # type: ignore[list-item]
    assert again.process_poll(WholePoll(polls[0].marker, replay=True, load_events=lambda: [event(1030)])) == []
    (resolved,) = again.process_poll(polls[1])
    assert resolved.event.alert_id == fired.event.alert_id  # type: ignore[attr-defined]
    path.write_text("version: 1\nrules: [{name: a, when: plp >= }]\n", "utf-8")
    assert again.idle(NINE) == []
    assert "rules.yaml:2:" in (again.trouble() or "")
    path.write_text("version: 1\nrules: [{name: a, when: plp >= 4}]\n", "utf-8")
    with pytest.raises(Reopen):
        again.idle(NINE)
    assert again.trouble() is None


def test_a_bad_change_keeps_the_rules_and_shows_in_log_readyz_and_metrics(
    tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """Until it is corrected."""
    path = tmp_path / "rules.yaml"
    path.write_text("version: 1\nrules: [{name: a, when: plp >= 3}]\n", "utf-8")
    memory, monitor = Memory(), Monitor("alerts")
    consumer = Alerts(RuleFiles([path]))
    stream = stream_of(consumer, memory)
    assert isinstance(stream, MemoryMarket)
    memory.append(event(1030), marker(1, 0, traded=1))
    running = Runner(consumer, stream, name="alerts", monitor=monitor)

    def stepped(held: Callable[[], object]) -> bool:
        running.step()
        return bool(held())

    wait_for(lambda: stepped(lambda: memory.emitted), 60)
    path.write_text("version: 1\nrules: [{name: a, when: plp >= }]\n", "utf-8")
    with capture_logs() as lines:
        wait_for(lambda: stepped(lambda: "trouble" in monitor.reasons()), 60)
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert line["event"] == "new rules are wrong, the rules of before are in force"
    assert f"{path}:2:" in line["error"]
    status, text, _ = monitor.answer("/readyz")
    assert (status, f"the rules of before are in force: {path}:2:" in text) == (503, True)
    metric = 'bourse_consumer_trouble{consumer="alerts"}'
    assert f"{metric} 1.0" in monitor.answer("/metrics")[1]
    memory.append(event(1000, 2, poll_sequence=2), marker(2, 1, traded=1))
    wait_for(lambda: stepped(lambda: len(memory.emitted) == 2), 60)
    path.write_text("version: 1\nrules: [{name: a, when: plp >= 4}]\n", "utf-8")
    wait_for(lambda: stepped(lambda: "trouble" not in monitor.reasons()), 60)
    assert f"{metric} 0.0" in monitor.answer("/metrics")[1]


def test_feed_rules_are_tried_on_captures(tmp_path: Path) -> None:
    """With markers derived from the captured polls."""
    service = Service(Capture(tmp_path / "capture"))
    for volume in (1, 2, 2, 2, 2, 2, 3):
        service.poll(volume)
    (tmp_path / "rules.yaml").write_text(
        "version: 1\nrules:\n  - {name: frozen, scope: feed, when: feed_state == FROZEN}\n", "utf-8"
    )
    done = invoke("alerts", "test", str(tmp_path / "rules.yaml"), str(tmp_path / "capture"), "--list")
    assert re.findall(r"(\d\d:\d\d):\d\d  (\w+) +frozen", done.output) == [("09:05", "FIRING"), ("09:07", "RESOLVED")]


def test_rules_are_tried_on_days_of_an_archive(tmp_path: Path) -> None:
    """On its tables of trades and polls, without the events of other days."""
    archive = tmp_path / "archive"
    for n in range(2):
        day = {"trading_day": date(2019, 8, 24) + timedelta(days=n)}
        events = [event(1000 + 30 * minute, minute + 1, poll_sequence=2 * n + minute + 1, observed_at=NINE, **day)
                  for minute in range(2)]  # fmt: skip
        markers = [marker(2 * n + minute + 1, n * 1440 + minute, traded=1) for minute in range(2)]
        for name, column, some in (("trades", "trading_day", events), ("polls", "_day", markers)):
            places = Places([Partition(f"bourse.{name}", 0)] * 2, [2 * n, 2 * n + 1], [0, 0], [None, None])
            table = to_table(some, places)
            if column not in table.column_names:
                table = table.append_column(column, pa.array([day["trading_day"]] * 2))
            write_deltalake(archive / f"bourse.{name}", table, mode="append", partition_by=[column])
    (tmp_path / "rules.yaml").write_text("version: 1\nrules: [{name: r, when: plp >= 3}]\n", "utf-8")
    args = ("alerts", "test", str(tmp_path / "rules.yaml"), str(archive), "--json")
    days = [json.loads(line)["trading_day"] for line in invoke(*args).output.splitlines()]
    assert days == ["2019-08-24", "2019-08-24", "2019-08-25"]
    days = [json.loads(line)["trading_day"] for line in invoke(*args, "--day", "2019-08-25").output.splitlines()]
    assert days == ["2019-08-25"]


def test_a_line_that_cannot_be_corrected_is_not_suggested(tmp_path: Path) -> None:
    """The list's name may be right, and its file missing."""
    path = tmp_path / "rules.yaml"
    path.write_text("version: 1\nrules:\n  - name: one\n    match: {lists: [missing.txt]}\n    when: plp > 3\n")
    with pytest.raises(ConfigurationError, match="cannot read") as caught:
        RuleFiles([path])
    assert "write:" not in str(caught.value)
