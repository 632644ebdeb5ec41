"""The same work in quixstreams, as a good engineer would write it: same arguments and output as read_ours.py.

It commits where the product does: behind files of 50,000 rows. Runs in .venv/bench.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid4, uuid5

from quixstreams import Application  # type: ignore[import-not-found]  # in an environment of its own
from quixstreams.models.serializers.avro import AvroDeserializer, AvroSerializer  # type: ignore[import-not-found]
from quixstreams.models.serializers.schema_registry import SchemaRegistryClientConfig as Registry  # type: ignore[import-not-found]
from quixstreams.sinks.community.file.formats import ParquetFormat  # type: ignore[import-not-found]
from quixstreams.sinks.community.file.local import LocalFileSink  # type: ignore[import-not-found]

from benchmarks.peak import peak_mb
from benchmarks.rules import WINDOW_MS, group_of, parameters

ROWS = 50_000
AVRO = Path(__file__).parent.parent / "schemas" / "bourse_schemas" / "avro"


def main(kind: str, bootstrap_servers: str, registry: str, count: str, where: str) -> None:
    """Read so many events once."""
    logging.disable(logging.WARNING)
    often = ROWS if kind == "parquet" else 10_000
    app = Application(
        bootstrap_servers,
        consumer_group=f"bench-{uuid4().hex}",
        auto_offset_reset="earliest",
        commit_every=often,
        commit_interval=60,
        consumer_extra_config={"isolation.level": "read_committed"},
    )
    registered = Registry(url=registry)
    topic = app.topic("bourse.trades", value_deserializer=AvroDeserializer(schema_registry_client_config=registered))
    began, left = 0.0, int(count)
    rows = app.dataframe(topic)
    if kind == "alerts":
        text = (AVRO / "PriceAlert.avsc").read_text("utf-8")
        alerts = AvroSerializer(json.loads(text), schema_registry_client_config=registered)

        # In memory: its own store, which a restart finds again, takes a millisecond an event.
        days: dict[str, dict[str, Any]] = {}

        def judge(event: dict[str, Any]) -> list[dict[str, Any]]:
            nonlocal began, left
            began, left = began or time.perf_counter(), left - 1
            if not left:
                app.stop()
            return list(by_hand(event, days.setdefault(event["instrument"], {})))

        rows.apply(judge, expand=True).to_topic(app.topic("bourse.alerts", value_serializer=alerts))
    else:
        Path(where).mkdir()
        os.chdir(where)  # it takes no other folder than one with a simple name
        sink = LocalFileSink(directory="files", format=ParquetFormat(compression="zstd"))
        add = sink.add

        def timed(*values: Any, **named: Any) -> Any:
            nonlocal began
            began, sink.add = time.perf_counter(), add
            return add(*values, **named)

        sink.add = timed
        rows.sink(sink)
    # It counts what comes out, and not every event is an alert.
    app.run(count=int(count) if kind == "parquet" else 0, collect=False)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}))


def by_hand(event: dict[str, Any], known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the alerts of an event by the five rules of its group; `known` is what is kept of its instrument's day."""
    day = event["trading_day"].isoformat()
    if known.get("of") != day:
        known.clear()
        known.update(of=day, window=[], open={}, beyond=None)
    group = group_of(event["symbol"])
    rules, price = parameters(group), event["last_price"]
    now = int(event["observed_at"].timestamp() * 1000)
    held: dict[str, tuple[bool, bool]] = {}
    if price is not None:
        window = known["window"]
        while len(window) > 1 and window[1][0] <= now - WINDOW_MS:
            window.pop(0)
        window.append((now, price))
        for sign in (1, -1):
            moved, reference = sign * (price - window[0][1]) * 100, window[0][1]
            begins, ends = moved >= rules["percent"] * reference, 2 * moved < rules["percent"] * reference
            held[f"0{sign}"] = bool(reference) and begins, not reference or ends
            beyond, before = sign * (price - rules["level"]) >= 0, known["beyond"]
            if before is None:
                before = event["previous_close"]
            crossed = before is not None and sign * (before - rules["level"]) < 0 and beyond
            held[f"1{sign}"] = crossed, not beyond
        known["beyond"] = price
        outside = not rules["low"] <= price <= rules["high"]
        held["2"] = outside, not outside
    for number, (name, threshold) in enumerate((("volume", "shares"), ("value", "rial")), 3):
        held[str(number)] = event[name] >= rules[threshold], event[name] < rules[threshold]
    for rule, (begins, ends) in held.items():
        if begins and rule not in known["open"]:
            known["open"][rule] = event["event_id"], now
            yield alert(event, f"r{group}-{rule[0]}", "FIRING", known["open"][rule])
        elif ends and rule in known["open"]:
            yield alert(event, f"r{group}-{rule[0]}", "RESOLVED", known["open"].pop(rule))


def alert(event: dict[str, Any], rule: str, state: str, began: tuple[str, int]) -> dict[str, Any]:
    """Return the record of an alert."""
    same = ("trading_day", "source", "instrument", "symbol", "title", "event_id", "poll_sequence", "traded_at")
    return {
        **{name: event[name] for name in same},
        "alert_id": str(uuid5(NAMESPACE_OID, f"{rule} {began[0]}")),
        "state": state,
        "kind": "CHANGE",
        "rule": rule,
        "rule_version": "0",
        "severity": "INFO",
        "condition": rule,
        "unit": "NONE",
        "price": event["last_price"],
        "started_at": datetime.fromtimestamp(began[1] / 1000, UTC),
        "raised_at": event["observed_at"],
        "labels": {},
        "channels": [],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
