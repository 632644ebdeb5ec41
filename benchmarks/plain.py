"""From an exchange's rows to the records of a poll, in plain Python: what quixstreams is given to publish.

It shares no code with the product, so it also says what must be on the topics after a run of either contestant.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

__all__ = ["Record", "records"]

Fields = dict[str, Any]

TEHRAN = ZoneInfo("Asia/Tehran")
SOURCE = "finnotech/trades-realtime"
LETTERS = str.maketrans("يك", "یک")
business = itemgetter(
    *("company_id", "symbol", "symbol_raw", "title", "is_right", "open_price", "high_price", "low_price", "last_price"),
    *("closing_price", "previous_close", "volume", "value", "trade_count", "closing_change", "closing_change_percent"),
    *("shares_outstanding", "market_value", "exchange_type"),
)


class Record(NamedTuple):
    """A record, its value not yet encoded; the timestamp in milliseconds since the epoch."""

    topic: str
    key: str
    value: Fields
    headers: dict[str, bytes]
    timestamp: int


def _tidy(text: str) -> str:
    return " ".join(text.translate(LETTERS).split())


def _candle(row: Fields, poll: int, received: datetime) -> Fields:
    local = datetime.fromisoformat(row["TradeDateGre"].replace("/", "-")).replace(tzinfo=TEHRAN)
    return {
        "instrument": row["TseSymbolCode"], "sequence": 1, "trading_day": local.date(),
        "trading_day_jalali": row["TradeDate"], "traded_at": local.astimezone(UTC), "traded_at_estimated": False,
        "observed_at": received, "poll_sequence": poll, "source": SOURCE, "company_id": row["CoID"],
        "symbol": _tidy(row["BourseSymbol"]), "symbol_raw": row["BourseSymbol"], "title": _tidy(row["FullTitle"]),
        "is_right": False, "open_price": row["OpeningPrice"] or None, "high_price": row["MaxPrice"] or None,
        "low_price": row["minPrice"] or None, "last_price": row["LastPrice"], "closing_price": row["ClosingPrice"],
        "previous_close": row["PreviousClosingPrice"], "volume": row["TradeVolume"], "value": row["TradeValue"],
        "trade_count": row["TradeQty"], "closing_change": row["ClosingPriceChange"],
        "closing_change_percent": row["ClosingPChgPercent"], "shares_outstanding": row["ShareCount"],
        "market_value": row["MarketValue"], "exchange_type": row["Type"],
    }  # fmt: skip


def _event(before: Fields | None, candle: Fields) -> Fields:
    totals = [candle[name] - (before[name] if before else 0) for name in ("volume", "value", "trade_count")]
    fell, rose = any(total < 0 for total in totals), any(totals)
    return {
        "event_id": f"{candle['instrument']}-{candle['trading_day']:%Y%m%d}-{candle['sequence']}",
        "op": "OPENED" if before is None else "CANCELLED" if fell else "TRADED" if rose else "REVISED",
        **candle,
        **dict(zip(("volume_delta", "value_delta", "trade_count_delta"), totals, strict=True)),
        "last_price_delta": candle["last_price"] - before["last_price"] if before else None,
        "closing_price_delta": candle["closing_price"] - before["closing_price"] if before else None,
    }


def _record(topic: str, kind: bytes, identity: str, value: Fields, received: datetime) -> Record:
    key = value["source"] if topic == "polls" else value["instrument"]
    headers = {
        "ce_specversion": b"1.0", "ce_id": identity.encode(), "ce_source": SOURCE.encode(),
        "ce_type": b"ir.bourse.%s.v1" % kind, "ce_subject": key.encode(),
        "ce_time": received.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode(),
        "content-type": b"application/vnd.apache.avro",
    } if topic != "candles" else {}  # fmt: skip
    return Record(topic, key, value, headers, int(received.timestamp() * 1000))


def records(
    known: dict[str, Fields], rows: list[Fields], poll: int, track_id: str, received: datetime
) -> Iterator[Record]:
    """Yield the records of a poll: per change event and candle, then the marker; `known` takes the candles on."""
    ops = dict.fromkeys(("OPENED", "TRADED", "REVISED", "CANCELLED"), 0)
    latest, stale = None, 0
    for row in rows:
        candle = _candle(row, poll, received)
        latest = max(latest or candle["traded_at"], candle["traded_at"])
        before = known.get(candle["instrument"])
        if before is not None and candle["trading_day"] == before["trading_day"]:
            if candle["traded_at"] < before["traded_at"]:
                stale += 1
                continue
            if business(candle) == business(before):
                continue
            candle["sequence"] = before["sequence"] + 1
        else:
            before = None
        event = _event(before, candle)
        known[candle["instrument"]] = candle
        ops[event["op"]] += 1
        yield _record("trades", b"trade", event["event_id"], event, received)
        yield _record("candles", b"candle", event["event_id"], candle, received)
    marker = {
        "poll_sequence": poll, "simulated": True, "poll_id": track_id, "source": SOURCE, "phase": "OPEN",
        "feed_state": "FRESH",        "outcome": "PUBLISHED" if any(ops.values()) else "UNCHANGED", "day_final": False,
        "session_day": received.astimezone(TEHRAN).date(), "requested_at": received, "received_at": received,
        "next_poll_at": received, "latest_traded_at": latest, "rows": len(rows), "stale_rows": stale,
        **{op.lower(): count for op, count in ops.items()},
        "charged_calls": 1, **dict.fromkeys(("rejected_rows", "duplicate_rows"), 0),
        **dict.fromkeys(("rights_poll_id", "gap_from", "error_kind", "error_code", "error_message")),
    }  # fmt: skip
    yield _record("polls", b"poll", f"{SOURCE}-{poll}", marker, received)
