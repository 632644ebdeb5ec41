"""Bars from events: open, high, low, last and volume of a minute or a day, right through cancellations."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

__all__ = ["day_bars", "minute_bars"]

KEYS = ["instrument", "trading_day"]


def _events(table: pa.Table) -> pl.DataFrame:
    return pl.DataFrame(table).sort([*KEYS, "sequence"])


def day_bars(table: pa.Table) -> pl.DataFrame:
    """Return, per instrument and day, the exchange's own figures as they stood at the day's last change.

    Prices in rial, null where there was none; cancelled trades are taken out of all of it by the exchange.
    """
    last = _events(table).group_by(KEYS, maintain_order=True).last()
    return last.select(
        *KEYS,
        "symbol",
        open="open_price",
        high="high_price",
        low="low_price",
        last="last_price",
        close="closing_price",
        volume="volume",
        value="value",
        trade_count="trade_count",
        changes="sequence",
    )


def minute_bars(table: pa.Table) -> pl.DataFrame:
    """Return, per instrument and minute of the trades' time (UTC), what changed in it; no bar where nothing did.

    A price between two polls is seen only where it made the day's high or low. A bar's volume, value and count are the
    changes of the totals: those of a day add up to the exchange's, and a minute in which trades were annulled takes
    away. Highs and lows that were annulled later are not kept: none lies outside the day's own.
    """
    events = _events(table).with_columns(minute=pl.col("traded_at").dt.truncate("1m"))
    before_high, before_low = (pl.col(name).shift().over(KEYS) for name in ("high_price", "low_price"))
    day_high, day_low = (pl.col(name).last().over(KEYS) for name in ("high_price", "low_price"))
    new_high = pl.when(before_high.is_null() | (pl.col("high_price") > before_high)).then(pl.col("high_price"))
    new_low = pl.when(before_low.is_null() | (pl.col("low_price") < before_low)).then(pl.col("low_price"))
    # The first price of a day is its open; of a later minute the last one of the minute before.
    opens = pl.coalesce(pl.col("last_price").shift().over(KEYS), pl.col("open_price"))
    events = events.with_columns(
        opens=opens,
        top=pl.min_horizontal(pl.max_horizontal("last_price", new_high), day_high),
        bottom=pl.max_horizontal(pl.min_horizontal("last_price", new_low), day_low),
    )
    bars = events.group_by([*KEYS, "minute"], maintain_order=True).agg(
        symbol=pl.col("symbol").last(),
        open=pl.col("opens").first(),
        high=pl.col("top").max(),
        low=pl.col("bottom").min(),
        last=pl.col("last_price").last(),
        volume=pl.col("volume_delta").sum(),
        value=pl.col("value_delta").sum(),
        trade_count=pl.col("trade_count_delta").sum(),
        changes=pl.len(),
    )
    return bars.sort([*KEYS, "minute"])
