"""The product's producer as `bourse produce` runs it, timed at its two ends: EXCHANGE BOOTSTRAP REGISTRY PREFIX."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpx2

from bourse_cli.logs import configure_logging
from bourse_producer.clock import PracticeClock
from bourse_producer.diff import Changes
from bourse_producer.finnotech import Credentials, Finnotech, Reply
from bourse_producer.patience import Call
from bourse_producer.publisher import Publisher
from bourse_producer.service import Producer, Settings
from bourse_schemas.errors import ExchangeUnavailable
from bourse_schemas.events import DeadLetter, PollMarker
from bourse_schemas.kafka import Cluster
from reliability.alone import Alone


def main(exchange: str, bootstrap_servers: str, registry: str, prefix: str) -> None:
    """Poll and publish for every line of stdin; print the poll's seconds: to get, to work out, to publish."""
    configure_logging("warning")
    began = got = 0.0

    class Exchange(Finnotech):
        def fetch(self, call: Call, **options: Any) -> Reply:
            nonlocal began, got
            if not sys.stdin.readline():
                stop.set()
                raise ExchangeUnavailable("internal", "stopped during the call")
            began = time.perf_counter()
            reply = super().fetch(call, **options)
            got = time.perf_counter()
            return reply

    class Publication(Publisher):
        def publish(self, changes: Changes, letters: Iterable[DeadLetter], markers: Iterable[PollMarker]) -> None:
            worked_out = time.perf_counter()
            super().publish(changes, letters, markers)
            print(json.dumps((got - began, worked_out - got, time.perf_counter() - worked_out)), flush=True)

    cluster = Cluster(bootstrap_servers, registry, prefix)
    settings = Settings(poll_seconds=0, always=True)
    stop = threading.Event()
    clock = PracticeClock(stop)
    with httpx2.Client(headers={"User-Agent": "bourse-stream"}) as client:
        account = Credentials("bench", "bench", "0123456789")
        finnotech = Exchange(client, exchange, account, clock=clock)
        Producer(finnotech, lambda: Publication(cluster), settings, clock, leadership=Alone()).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
