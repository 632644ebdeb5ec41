"""An exchange that answers from memory, as a process of its own: one row in EVERY changes from poll to poll.

`python -m benchmarks.market ROWS POLLS EVERY` prints its address. A client puts a word of its own before the API's path
(`ADDRESS/WORD/bourse/v2/…`) and is served the polls from the first on; the `Date` header is the market's time.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["received_at", "rows"]

OPENS = datetime(2019, 8, 24, 4, 30, tzinfo=UTC)  # a Saturday, 09:00 in Tehran
NAMES = ("سيمان آبيك", "پتروشيمي كرمان", "سرمایه گذاری توسعه معادن و فلزات", "بانک تجارت", "فولاد مبارکه اصفهان")


def received_at(poll: int) -> datetime:
    """Return the time of a poll's response; polls count from 1, one a minute."""
    return OPENS + timedelta(minutes=poll)


def rows(poll: int, count: int, every: int = 1) -> list[dict[str, Any]]:
    """Return a poll's rows; one in `every` has traded since the poll before."""
    now, market = poll, []
    for number in range(count):
        poll = max(1, now - (number + now) % every)
        minute = received_at(poll - 1) + timedelta(hours=4, minutes=30)
        previous = 1000 + number * 7919 % 40_000
        last = previous + (number + 37 * poll) % 97 - 48
        closing = previous + (number + 11 * poll) % 53 - 26
        volume = 1000 + number * 1009 % 900_000 + poll * (number % 500 + 1)
        shares = (1 + number % 900) * 5_000_000
        market.append({
            "CoID": number + 1, "BourseSymbol": f"نماد{number}", "TseSymbolCode": f"IRO{number % 7 + 1}B{number:05}01",
            "FullTitle": f"{NAMES[number % len(NAMES)]} {number}", "PrecedencyRight": False,
            "TradeDateGre": f"{minute:%Y/%m/%d %H:%M}:{number % 60:02}", "TradeDate": "1398/06/02",
            "MaxPrice": previous + 60, "minPrice": previous - 60, "OpeningPrice": previous + number % 9,
            "ClosingPrice": closing, "LastPrice": last, "TradeVolume": volume, "TradeValue": volume * previous,
            "TradeQty": 10 + number % 400 + poll, "PreviousClosingPrice": previous,
            "ClosingPriceChange": closing - previous,
            "ClosingPChgPercent": round(100 * (closing - previous) / previous, 2),
            "ShareCount": shares, "MarketValue": shares * closing, "Type": None if number % 2 else "N2",
        })  # fmt: skip
    return market


def serve(count: int, polls: int, every: int) -> None:
    """Serve until killed."""
    bodies = [json.dumps(rows(poll, count, every), ensure_ascii=False).encode() for poll in range(1, polls + 1)]
    served: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body leave together

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(b'{"result":{"value":"token","lifeTime":864000000},"status":"DONE"}', OPENS)

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            client = url.path.split("/")[1]
            served[client] += 1
            (track_id,) = parse_qs(url.query)["trackId"]
            head = f'{{"trackId":"{track_id}","result":'.encode()
            self._answer(head + bodies[served[client] - 1] + b',"state":"DONE"}', received_at(served[client]))

        def _answer(self, body: bytes, at: datetime) -> None:
            self.send_response_only(200)
            self.send_header("Date", format_datetime(at, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
