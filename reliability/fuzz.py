"""Mutated real responses through the client, the parser and the service: `make fuzz N=10000 SEED=1`.

A crash is anything but a marker. A wrong event is one that differs from what the pure core (`parse`, `diff`) makes of
the bytes delivered, that names values no row of the body holds, or that breaks a sequence or a sum. A leak is a secret
in a marker, a dead letter, an event, a log line or a capture: errors of the exchange quote our secrets in every field.
A tenth of the cases goes over TLS.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import random
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bourse_producer.clock import PracticeClock
from bourse_producer.diff import Changes
from bourse_producer.finnotech import Credentials, Finnotech, Reply
from bourse_producer.patience import Patience
from bourse_producer.publisher import State
from bourse_producer.responses import Reading, derive
from bourse_producer.service import Producer, Settings
from bourse_sandbox.serving import serve
from bourse_schemas.events import Candle, DeadLetter, Outcome, PollMarker, TradeEvent
from reliability.alone import Alone
from reliability.certificate import self_signed

__all__ = ["Fuzz", "main"]

REAL_DAY = Path(__file__).parents[1] / "sandbox/bourse_sandbox/data/day-2019-08-21.ndjson.gz"
SECRET, NID = "s3cr3t/of-the?account", "7340219856"
BASIC = base64.b64encode(f"fuzz:{SECRET}".encode()).decode()
TOTALS = ("volume", "value", "trade_count")
ROWS = 25
BOM = "\ufeff".encode()
ODD: Sequence[Any] = (
    None,
    True,
    -1,
    0,
    1.5,
    5488.0,
    1e308,
    2**63,
    2**70,
    "",
    "x",
    "۱۲",
    "7",
    "7.0",
    [],
    {},
    [[]],
    "2019/13/45 99:99:99",
)
BODIES = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"<html>",
    b'{"state":"DONE"}',
    b'{"result":[[[]]],"state":"DONE"}',
    b"[" * 99_999,
)
# What is answered instead of rows or of a token; %s is where a secret is quoted.
ERRORS = (
    (400, b'{"status":"FAILED","error":{"code":"VALIDATION_ERROR","message":"trackId is duplicated"}}'),
    (400, b'{"status":"FAILED","trackId":"%s","error":{"code":"%s","message":"no good: %s"}}'),
    (401, b'{"message":"invalid token %s"}'),
    (403, b'{"error":{"message":"ip %s"}}'),
    (403, b"<html>%s</html>"),
    (429, b"%s"),
    (500, b"<html>%s"),
    (400, b'{"responseCode":"%s","error":"%s"}'),
    (200, b'{"result":{"error":{"code":5,"message":["%s"]}},"status":"FAILED"}'),
    (200, b'{"responseCode":"FN-ABCD-40800000000","error":{"code":"%s"}}'),
    (200, b'{"result":{"value":"%s","scopes":["%s"],"lifeTime":"%s","refreshToken":"%s"},"error":{"message":"%s"}}'),
)


def responses() -> list[tuple[datetime, list[dict[str, Any]]]]:
    """Return the real day's responses, each with its first rows only, so that many fit into a run."""
    found, latest = [], dict[str, dict[str, Any]]()
    with gzip.open(REAL_DAY) as lines:
        for line in lines:
            said = json.loads(line)
            latest.update((row["TseSymbolCode"], row) for row in said["changed"])
            rows = sorted(latest.values(), key=lambda row: row["CoID"])[:ROWS]
            found.append((datetime.fromisoformat(said["received_at"]).astimezone(UTC), rows))
    return found


class Fuzz:
    """A service between a mutating exchange and a log that checks whatever is published."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._day = responses()
        names = ("cases", "crashes", "wrong_events", "leaks", "events", "rejected_rows", "refused_bodies", "quoted")
        self.counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        self.first: list[str] = []
        self._at = 0
        self._known: dict[str, Candle] = {}
        self._last: PollMarker | None = None
        self._delivered: list[Reply] = []
        self._readings: list[Reading] = []
        self._tokens: list[str] = []
        self._shown: list[str] = []
        structlog.configure(processors=[self._log], logger_factory=structlog.ReturnLoggerFactory())

    def run(self, cases: int, *, tls: bool = False) -> None:
        """Try this many responses."""
        self._tokens = []
        with self._client(tls) as (client, url):
            account = Credentials("fuzz", SECRET, NID)
            patience = Patience(longest_seconds=0)
            clock, hook = PracticeClock(), self._delivered.append
            exchange = Finnotech(client, url, account, clock=clock, on_response=hook, patience=patience)
            settings = Settings(poll_seconds=0, always=True)
            producer = Producer(exchange, lambda: self, settings, clock, leadership=Alone(), capture=self)
            for _ in range(cases):
                self._try(producer)

    def _try(self, producer: Producer) -> None:
        self.counts["cases"] += 1
        self._at += self._chance.random() < 0.7
        if self._at == len(self._day):
            # The same day once more, to a service that knows nothing.
            self._at, self._known = 0, {}
        self._delivered.clear()
        self._shown.clear()
        self._readings = []
        try:
            producer.run_once()
        except Exception as error:  # that is what is looked for
            self.counts["crashes"] += 1
            self.first.append(f"{type(error).__name__}: {error}; body {self._delivered[-1:]!r}"[:500])
        self._shown += [f"{each} {each.headers} {each.body!r}" for each in self._delivered]
        for secret in (SECRET, NID, BASIC, *self._tokens):
            for shown in self._shown:
                if secret in shown:
                    self.counts["leaks"] += 1
                    self.first.append(f"leak of {secret}: {shown}"[:500])

    def _log(self, _: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        self._shown.append(repr(event))
        raise structlog.DropEvent

    # --- the exchange -------------------------------------------------------------------------------------------------

    @contextmanager
    def _client(self, tls: bool) -> Iterator[tuple[httpx2.Client, str]]:
        if not tls:
            transport = httpx2.MockTransport(self._answered)
            yield httpx2.Client(transport=transport), "http://exchange"
            return
        routes = [Route("/{path:path}", self._respond, methods=["GET", "POST"])]
        with tempfile.TemporaryDirectory() as folder:
            pem = self_signed(Path(folder) / "exchange.pem")
            trusted = ssl.create_default_context(cafile=str(pem))
            with (
                serve(Starlette(routes=routes), "127.0.0.1", tls=pem) as server,
                httpx2.Client(verify=trusted) as client,
            ):
                yield client, server.url

    def _answered(self, request: httpx2.Request) -> httpx2.Response:
        status, headers, body = self._answer(request.method, request.url.params.get("trackId", ""))
        return httpx2.Response(status, headers=headers, content=body)

    async def _respond(self, request: Request) -> Response:
        status, headers, body = self._answer(request.method, request.query_params.get("trackId", ""))
        return Response(body, status, headers)

    def _answer(self, method: str, track_id: str) -> tuple[int, dict[str, str], bytes]:
        if method == "POST":
            return self._token()
        chance = self._chance
        at, rows = self._day[self._at]
        rows = [dict(row) for row in rows]
        headers = {"Date": format_datetime(at + timedelta(seconds=chance.choice([0, 0, -600, 600])), usegmt=True)}
        if chance.random() < 0.1:
            status, body = chance.choice([self._error(headers), (200, chance.choice(BODIES))])
            return status, headers, body
        for _ in range(chance.choice([0, 0, 1, 1, 2, 5])):
            chance.choice(ROW_MUTATIONS)(chance, rows)
        envelope = {"trackId": track_id, "result": rows, "state": chance.choice(["DONE"] * 20 + ["FAILED", None])}
        body = json.dumps(envelope, ensure_ascii=chance.random() < 0.5).encode()
        for _ in range(chance.choice([0, 0, 0, 0, 0, 1, 1, 3])):
            body = chance.choice(BYTE_MUTATIONS)(chance, body)
        if chance.random() < 0.2:
            headers["Content-Encoding"] = chance.choice(["gzip", "gzip", "gzip", "deflate", "nonsense"])
            packed = gzip.compress(body, 1)
            body = chance.choice([packed, packed, packed[: len(packed) // 2], packed[:-4], body])
        return 200, headers, body

    def _token(self) -> tuple[int, dict[str, str], bytes]:
        headers: dict[str, str] = {}
        if self._chance.random() < 0.2:
            status, body = self._error(headers)
            return status, headers, body
        value, refresh = (f"{kind}-{self._chance.getrandbits(64):x}" for kind in ("token", "refresh"))
        self._tokens = [value, refresh, *self._tokens[:4]]
        life = self._chance.choice([864_000_000, 864_000_000, 864_000_000, 1])
        result = {"value": value, "lifeTime": life, "refreshToken": refresh, "scopes": ["a"]}
        return 200, headers, json.dumps({"result": result, "status": "DONE"}).encode()

    def _error(self, headers: dict[str, str]) -> tuple[int, bytes]:
        """Return an error that quotes one of our secrets wherever it can, in its headers too."""
        self.counts["quoted"] += 1
        secret = self._chance.choice([SECRET, NID, BASIC, f"Basic {BASIC}", *self._tokens])
        if self._chance.random() < 0.3:
            headers |= {"Retry-After": secret, "Content-Type": f"text/{secret}"}
        status, body = self._chance.choice(ERRORS)
        body = body.replace(b"%s", secret.encode())
        if self._chance.random() < 0.2:
            body = self._chance.choice(BYTE_MUTATIONS)(self._chance, body)
        return status, body

    # --- the log, and the capture: what is published, and from what ---------------------------------------------------

    def restore(self) -> State:
        """Return what was published."""
        return State(
            dict(self._known), self._last.poll_sequence if self._last else 0, [self._last] if self._last else []
        )

    def restored(self, state: State) -> None:
        """Know it already."""

    def require_room_for(self, instant: datetime) -> None:
        """Have room for everything."""

    def idle(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def poll(self, poll_sequence: int, readings: Sequence[Reading], known: Any) -> None:
        """Take how the responses were read."""
        self._readings = list(readings)

    def publish(self, changes: Changes, letters: Sequence[DeadLetter], markers: Sequence[PollMarker]) -> None:
        """Check, then keep."""
        self._shown += [repr(msgspec.to_builtins(each)) for each in (*letters, *markers, *changes.events)]
        self.counts["events"] += len(changes.events)
        self.counts["rejected_rows"] += markers[-1].rejected_rows
        self.counts["refused_bodies"] += markers[-1].outcome is Outcome.FAILED
        bodies = {received.track_id: received.body for received in self._delivered}
        calls = [(bodies[reading.track_id], reading) for reading in self._readings]
        expected: Sequence[TradeEvent] = derive(self._known, calls).changes.events if calls else []
        if list(expected) != list(changes.events):
            self._wrong("not what the bytes say", len(changes.events))
        held = _held(calls[0][0]) if calls else set()
        for event, candle in zip(changes.events, changes.candles, strict=True):
            before = self._known.get(event.instrument)
            same_day = before is not None and before.trading_day == event.trading_day
            old = before if before is not None and same_day else None
            sums = all(
                (getattr(old, total) if old else 0) + getattr(event, f"{total}_delta") == getattr(event, total)
                for total in TOTALS
            )
            if (
                event.sequence != (old.sequence if old else 0) + 1
                or not sums
                or (before and candle.trading_day < before.trading_day)
            ):
                self._wrong(f"a broken chain: {event}", 1)
            if (event.instrument, event.volume, event.value, event.trade_count, event.last_price) not in held:
                self._wrong(f"no row says so: {event}", 1)
        self._known |= {candle.instrument: candle for candle in changes.candles}
        self._last = markers[-1]

    def _wrong(self, words: str, count: int) -> None:
        self.counts["wrong_events"] += max(1, count)
        self.first.append(words[:500])


def _held(body: bytes) -> set[tuple[Any, ...]]:
    """Return, read by Python's own patient means, which totals and prices the rows of a body hold."""
    try:
        # Of a name that stands twice the later value counts, as in most readers.
        # A bad byte spoils its row, not the others.
        result = json.loads(body.removeprefix(BOM).decode("utf-8", "replace"), strict=False)["result"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
    held = set()
    for row in result if isinstance(result, list) else [result]:
        if isinstance(row, dict):
            named = {str(name).lower(): value for name, value in row.items() if value is not None}
            numbers = [_number(named.get(name)) for name in ("tradevolume", "tradevalue", "tradeqty", "lastprice")]
            held.add((str(named.get("tsesymbolcode")), *numbers))
    return held


def _number(value: Any) -> int | None:
    try:
        return None if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError):
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            return None


# --- what goes wrong --------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


def _odd_value(chance: random.Random, rows: Rows) -> None:
    row = chance.choice(rows)
    row[chance.choice(list(row))] = chance.choice(ODD)


def _nan(chance: random.Random, rows: Rows) -> None:
    chance.choice(rows)["LastPrice"] = chance.choice([float("nan"), float("inf")])


def _rename(chance: random.Random, rows: Rows) -> None:
    row = chance.choice(rows)
    name = chance.choice(list(row))
    row[chance.choice([name.upper(), name + "2", "TradeDateGer"])] = row.pop(name)


def _double(chance: random.Random, rows: Rows) -> None:
    row = dict(chance.choice(rows))
    if isinstance(row.get("TradeVolume"), int):
        row["TradeVolume"] += chance.randint(-5, 5)
    rows.insert(chance.randrange(len(rows)), row)


def _swap(chance: random.Random, rows: Rows) -> None:
    one, other = chance.choice(rows), chance.choice(rows)
    names = list(one.keys() & other.keys())
    if names:
        name = chance.choice(sorted(names))
        one[name], other[name] = other[name], one[name]


def _other_day(chance: random.Random, rows: Rows) -> None:
    row = chance.choice(rows)
    row["TradeDateGre"] = f"2019/08/{chance.randint(18, 25)} {chance.randint(0, 23):02}:00:00"


def _drop(chance: random.Random, rows: Rows) -> None:
    if len(rows) > 1:
        del rows[chance.randrange(len(rows))]


ROW_MUTATIONS: Sequence[Callable[[random.Random, Rows], None]] = (
    _odd_value, _odd_value, _nan, _rename, _double, _swap, _other_day, _drop,
)  # fmt: skip


def _flip(chance: random.Random, body: bytes) -> bytes:
    if not body:
        return body
    at = chance.randrange(len(body))
    return body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :]


def _truncate(chance: random.Random, body: bytes) -> bytes:
    return body[: chance.randrange(len(body) + 1)]


def _repeat(chance: random.Random, body: bytes) -> bytes:
    begin = chance.randrange(len(body) + 1)
    return body[:begin] + body[begin : begin + chance.randrange(200)] * 2 + body[begin:]


def _encode(chance: random.Random, body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    return chance.choice([text.encode("utf-16"), text.encode("cp1256", "replace"), BOM + body])


def _digits(chance: random.Random, body: bytes) -> bytes:
    at = body.find(b":", chance.randrange(len(body) + 1))
    return body if at < 0 else body[: at + 1] + b"9" * chance.choice([1, 19, 400]) + body[at + 1 :]


BYTE_MUTATIONS: Sequence[Callable[[random.Random, bytes], bytes]] = (_flip, _flip, _truncate, _repeat, _encode, _digits)


def main() -> int:
    """Run as the command line asks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    fuzz = Fuzz(options.seed)
    fuzz.run(options.n - options.n // 10)
    fuzz.run(options.n // 10, tls=True)
    for words in sorted(set(fuzz.first), key=lambda each: each.startswith("no row"))[:10]:
        print(words, file=sys.stderr)
    print(json.dumps({**fuzz.counts, "seconds": round(time.monotonic() - began)}))
    return int(any(fuzz.counts[fault] for fault in ("crashes", "wrong_events", "leaks")))


if __name__ == "__main__":
    sys.exit(main())
