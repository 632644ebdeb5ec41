"""What a response says: the documented example, everything odd that is still used, everything that is not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from bourse_producer.diff import Snapshot, diff
from bourse_producer.refusals import is_done, refusal, retry_seconds
from bourse_producer.responses import PROFILES, SOURCE, Memo, Reading, derive, merge, parse, parse_minutes
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.codec import encoder
from bourse_schemas.errors import ExchangeError, ExchangeNonsense, ExchangeRefused, ExchangeUnavailable
from bourse_schemas.events import Candle, Reason, TradeEvent

TRACK_ID = "0123456789abcdef0123456789abcdef"
NOW = datetime(2020, 1, 19, 5, 32, tzinfo=UTC)
FN = "FN-BRSE-40000100001"
TIMEOUT = "timeout of 40000ms exceeded"
GOLDEN = Path(__file__).parents[1] / "golden" / "producer"

# As the documentation prints it, with both of its track ids.
DOCUMENTED = (
    '{"trackId":"get-tradesRealtime-01","result":[{"CoID":5,"BourseSymbol":"ومعادن","TseSymbolCode":"IRO1MADN0001",'
    '"FullTitle":"سرمایه گذاری توسعه معادن و فلزات","PrecedencyRight":false,"TradeDateGre":"2020/01/19 09:01:37",'
    '"TradeDate":"1398/10/29","MaxPrice":5488,"minPrice":5480,"OpeningPrice":5488,"ClosingPrice":5477,"LastPrice":5488,'
    '"TradeVolume":51205,"TradeValue":281013040,"TradeQty":16,"PreviousClosingPrice":5477,"ClosingPriceChange":0,'
    '"ClosingPChgPercent":0,"ShareCount":40300000000,"MarketValue":220723100000000,"Type":null}],'
    f'"trackId":"{TRACK_ID}","state":"DONE"}}'
)
ROW: dict[str, Any] = json.loads(DOCUMENTED)["result"][0]


def context(**changes: Any) -> Reading:
    """Return the context of a call for shares, answered at NOW."""
    usual = {
        "poll_sequence": 7,
        "received_at": NOW,
        "dated": NOW,
        "session_day": date(2020, 1, 19),
        "is_right": False,
        "track_id": TRACK_ID,
    }
    return Reading(**{**usual, **changes})


def body(*rows: object, **envelope: object) -> bytes:
    """Return a response with these rows."""
    return json.dumps({"trackId": TRACK_ID, "result": list(rows), "state": "DONE", **envelope}).encode()


def row(**changes: object) -> dict[str, Any]:
    """Return the documented row with other values."""
    return {**ROW, **changes}


def read(*rows: object, **changes: Any) -> Snapshot:
    """Return what a response with these rows contains."""
    return parse(body(*rows), context(**changes))


def only(found: Snapshot) -> Candle:
    """Return the one candle of a snapshot that has nothing else."""
    assert (len(found.candles), list(found.rejected)) == (1, [])
    return next(iter(found.candles.values()))


def test_documented_example() -> None:
    """The documentation's own response, field by field, says nothing odd."""
    found = parse(DOCUMENTED.encode(), context())
    assert (found.rows, found.duplicate_rows, dict(found.oddities)) == (1, 0, {})
    assert only(found) == Candle(
        instrument="IRO1MADN0001",
        sequence=0,
        trading_day=date(2020, 1, 19),
        trading_day_jalali="1398/10/29",
        traded_at=datetime(2020, 1, 19, 5, 31, 37, tzinfo=UTC),
        traded_at_estimated=False,
        observed_at=NOW,
        poll_sequence=7,
        source=SOURCE,
        company_id=5,
        symbol="ومعادن",
        symbol_raw="ومعادن",
        title="سرمایه گذاری توسعه معادن و فلزات",
        is_right=False,
        open_price=5488,
        high_price=5488,
        low_price=5480,
        last_price=5488,
        closing_price=5477,
        previous_close=5477,
        volume=51205,
        value=281013040,
        trade_count=16,
        closing_change=0,
        closing_change_percent=0.0,
        shares_outstanding=40300000000,
        market_value=220723100000000,
        exchange_type=None,
    )


@pytest.mark.parametrize("echo", ["first", "second"])
def test_either_track_id_may_be_the_echo(echo: str) -> None:
    """Only where neither is ours is it counted, and the rows are used all the same."""
    ids = [TRACK_ID, "x"] if echo == "first" else ["x", TRACK_ID]
    text = f'{{"trackId":"{ids[0]}","result":[{json.dumps(ROW)}],"trackId":"{ids[1]}","state":"DONE"}}'.encode()
    assert dict(parse(text, context()).oddities) == {}
    foreign = parse(text, context(track_id="f" * 32))
    assert (dict(foreign.oddities), len(foreign.candles)) == ({"foreign_track_id": 1}, 1)


def test_status_in_place_of_state() -> None:
    """Every other service says `status`."""
    text = body(ROW).replace(b'"state"', b'"status"')
    assert only(parse(text, context())) == only(read(ROW))


@pytest.mark.parametrize("result", ["[]", "{}", " { } ", "null"])
def test_an_empty_result_is_a_market_without_rows(result: str) -> None:
    """A list, an object, null: empty is empty; so is none at all."""
    found = parse(f'{{"trackId":"{TRACK_ID}","result":{result},"state":"DONE"}}'.encode(), context())
    assert (found.rows, dict(found.candles), list(found.rejected)) == (0, {}, [])
    assert parse(f'{{"trackId":"{TRACK_ID}","state":"DONE"}}'.encode(), context()).rows == 0


def test_one_object_is_one_row() -> None:
    """A result may be the row itself."""
    assert only(parse(body(result=ROW), context())) == only(read(ROW))


@pytest.mark.parametrize("result", ['"rows"', "5", "true"])
def test_another_result_is_nonsense(result: str) -> None:
    """A result of no right kind is no success."""
    with pytest.raises(ExchangeNonsense, match="neither rows nor a row"):
        parse(f'{{"result":{result},"state":"DONE"}}'.encode(), context())


@pytest.mark.parametrize(
    "odd",
    [
        {"TradeVolume": "51205", "MaxPrice": " 5488 ", "ClosingPChgPercent": "0"},
        {"TradeVolume": 51205.0, "CoID": 5.0, "TradeValue": 2.8101304e8},
        {"TradeVolume": "51205.0", "PrecedencyRight": "false"},
        {"ClosingPChgPercent": 0.0, "PrecedencyRight": 0},
    ],
)
def test_numbers_as_they_come(odd: dict[str, object]) -> None:
    """Strings and integral floats are read as what they say."""
    found = read(row(**odd))
    assert (only(found), dict(found.oddities)) == (only(read(ROW)), {})


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title, str.swapcase])
def test_any_letter_case(case: Callable[[str], str]) -> None:
    """The names of the fields are read in any letter case."""
    assert only(read({case(name): value for name, value in ROW.items()})) == only(read(ROW))


def test_the_other_spelling_of_the_time() -> None:
    """`TradeDateGer` occurs too, alone or beside an empty one."""
    other = {name: value for name, value in ROW.items() if name != "TradeDateGre"}
    assert only(read({**other, "TradeDateGer": ROW["TradeDateGre"]})) == only(read(ROW))
    assert only(read({**other, "TradeDateGer": ROW["TradeDateGre"], "TradeDateGre": None})) == only(read(ROW))


@pytest.mark.parametrize(
    "name",
    ["CoID", "PrecedencyRight", "TradeDate", "MaxPrice", "LastPrice", "ShareCount", "ClosingPChgPercent", "Type"],
)
def test_what_may_be_absent(name: str) -> None:
    """A nullable field may be null or missing, which is the same."""
    absent = only(read({key: value for key, value in ROW.items() if key != name}))
    assert absent == only(read(row(**{name: None})))


@pytest.mark.parametrize(("type_", "text"), [("5", "5"), (5, "5"), ("1e5", "1e5"), ("null", "null"), (True, "true")])
@pytest.mark.parametrize("volume", [51205, "51205"])
def test_the_undocumented_type_is_text(type_: object, text: str, volume: object) -> None:
    """Whatever it is, it reads the same beside clean rows and beside odd ones."""
    assert only(read(row(Type=type_, TradeVolume=volume))).exchange_type == text


def test_a_row_reads_the_same_beside_a_bad_one() -> None:
    """The quick way and the patient one agree on every row of a real response."""
    rows = real_rows()
    clean, mixed = parse(body(*rows), context(**LATER)), parse(body(*rows, {"bad": 1}), context(**LATER))
    assert mixed.candles == clean.candles
    assert (len(mixed.rejected), mixed.rows) == (1, len(rows) + 1)


def test_zero_prices_beside_a_last_price_are_not_known() -> None:
    """A zero open, high or low is null where there is a last price, and a price where there is none."""
    zeros = {"OpeningPrice": 0, "MaxPrice": 0, "minPrice": 0}
    known = only(read(row(**zeros)))
    assert (known.open_price, known.high_price, known.low_price, known.last_price) == (None, None, None, 5488)
    for last in (0, None):
        quiet = only(read(row(**zeros, LastPrice=last, ClosingPrice=0)))
        assert (quiet.open_price, quiet.high_price, quiet.low_price, quiet.closing_price) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ("كيمياي", "کیمیای"),
        ("  بانک \u00a0 ملت ", "بانک ملت"),
        ("سرمايه\u200cگذاري", "سرمایه\u200cگذاری"),
        ("می\u200c\u200cشود", "می\u200cشود"),
        ("\u200cالف \u200c ب\u200c", "الف ب"),
        ("\u200c", ""),
    ],
)
def test_persian_text(raw: str, tidy: str) -> None:
    """Arabic letters, ZWNJ and spaces are tidied; the symbol as received is kept; tidying twice changes nothing."""
    found = only(read(row(FullTitle=raw, BourseSymbol=raw)))
    assert (found.title, found.symbol, found.symbol_raw) == (tidy, tidy, raw)
    assert only(read(row(FullTitle=tidy))).title == tidy


@pytest.mark.parametrize(
    ("jalali", "counted"),
    [("1398/10/29", 0), ("1398-10-29", 0), (None, 0), ("", 0), ("1398/10/28", 1), ("1398/13/40", 1), ("soon", 1)],
)
def test_a_jalali_day_that_names_another_day_is_counted(jalali: str | None, counted: int) -> None:
    """The trade time rules; what came is kept."""
    found = read(row(TradeDate=jalali))
    assert found.oddities.get("jalali_contradicted", 0) == counted
    assert (only(found).trading_day, only(found).trading_day_jalali) == (date(2020, 1, 19), jalali)


@pytest.mark.parametrize(("flag", "is_right", "counted"), [(True, False, 1), (False, True, 1), (True, True, 0)])
def test_the_call_decides_what_is_a_right(flag: bool, is_right: bool, counted: int) -> None:
    """The row's own flag is only compared."""
    found = read(row(PrecedencyRight=flag), is_right=is_right)
    assert (only(found).is_right, found.oddities.get("right_contradicted", 0)) == (is_right, counted)


def test_duplicates() -> None:
    """The later trade time wins, then the higher trade count, wherever they stand; all others are counted."""
    late, busy = row(TradeDateGre="2020/01/19 09:01:38", TradeQty=1), row(TradeQty=17)
    for rows, count in [((ROW, late, busy), 1), ((late, busy, ROW), 1), ((busy, ROW), 17), ((ROW, busy), 17)]:
        found = read(*rows)
        assert (only(found).trade_count, found.duplicate_rows, found.rows) == (count, len(rows) - 1, len(rows))


def test_merge() -> None:
    """Two calls are one snapshot: rows, duplicates and oddities of both, the later receipt."""
    right = row(TseSymbolCode="IRR1MADN0101", PrecedencyRight=True)
    later = NOW + timedelta(seconds=2)
    found = merge([read(ROW, {}), read(right, ROW, is_right=True, received_at=later)])
    assert list(found.candles) == ["IRO1MADN0001", "IRR1MADN0101"]
    assert [found.candles[code].is_right for code in found.candles] == [False, True]
    assert (found.rows, found.duplicate_rows, len(found.rejected), found.received_at) == (4, 1, 1, later)
    assert dict(found.oddities) == {"right_contradicted": 1}


def test_future_rows() -> None:
    """More than five minutes after the response is a dead letter; five are a clock's business."""
    edge = NOW + timedelta(minutes=5)
    tehran = edge + timedelta(hours=3, minutes=30)
    assert only(read(row(TradeDateGre=f"{tehran:%Y/%m/%d %H:%M:%S}"))).traded_at == edge
    (bad,) = read(row(TradeDateGre=f"{tehran + timedelta(seconds=1):%Y/%m/%d %H:%M:%S}")).rejected
    assert bad.letter.reason is Reason.FUTURE_ROW
    assert not read(row(TradeDateGre="2020/01/19 09:10:00"), dated=NOW + timedelta(hours=1)).rejected


@pytest.mark.parametrize(
    ("gregorian", "hour"),
    [
        ("2019/08/21 09:00:00", 4.5),
        ("2023/08/21 09:00:00", 5.5),
        ("2019-12-21T9:00:00", 5.5),
        ("2022/03/23 09:00:00", 4.5),
    ],
)
def test_tehran_time(gregorian: str, hour: float) -> None:
    """Half past four from UTC in the summers up to 2022, half past three ever since."""
    traded_at = only(read(row(TradeDateGre=gregorian, TradeDate=None), dated=NOW + timedelta(days=9999))).traded_at
    assert traded_at.hour + traded_at.minute / 60 == hour


BAD = [
    (row(MaxPrice=5488.5), Reason.INVALID_VALUE, "MaxPrice"),
    (row(LastPrice="5488.5"), Reason.INVALID_VALUE, "LastPrice"),
    (row(LastPrice="5,488"), Reason.INVALID_VALUE, "LastPrice"),
    (row(LastPrice="١٢"), Reason.INVALID_VALUE, "LastPrice"),
    (row(LastPrice=-1), Reason.INVALID_VALUE, "LastPrice"),
    (row(LastPrice=[5]), Reason.INVALID_VALUE, "LastPrice"),
    (row(TradeVolume=-1), Reason.INVALID_VALUE, "TradeVolume"),
    (row(TradeValue="-1"), Reason.INVALID_VALUE, "TradeValue"),
    (row(TradeQty=True), Reason.INVALID_VALUE, "TradeQty"),
    (row(TradeVolume=2**63), Reason.INVALID_VALUE, "TradeVolume"),
    (row(TradeVolume=10**40), Reason.INVALID_VALUE, "TradeVolume"),
    (row(TradeVolume=1e20), Reason.INVALID_VALUE, "TradeVolume"),
    (row(TradeVolume="9" * 5000), Reason.INVALID_VALUE, "TradeVolume"),
    (row(ClosingPChgPercent="NaN"), Reason.INVALID_VALUE, "ClosingPChgPercent"),
    (row(ClosingPChgPercent="1e999"), Reason.INVALID_VALUE, "ClosingPChgPercent"),
    (row(TseSymbolCode="IRO1MADN001"), Reason.INVALID_VALUE, "TseSymbolCode"),
    (row(TseSymbolCode="iro1madn0001"), Reason.INVALID_VALUE, "TseSymbolCode"),
    (row(TseSymbolCode="IRO1MADN0001\n"), Reason.INVALID_VALUE, "TseSymbolCode"),
    (row(TradeDateGre="yesterday"), Reason.INVALID_VALUE, "TradeDateGre"),
    (row(TradeDateGre="2020/02/30 09:00:00"), Reason.INVALID_VALUE, "TradeDateGre"),
    (row(TradeDateGre="2020/01/19"), Reason.INVALID_VALUE, "TradeDateGre"),
    (row(TradeDateGre="0001/01/01 00:00:00"), Reason.INVALID_VALUE, "TradeDateGre"),
    (row(FullTitle="x" * 1001), Reason.INVALID_VALUE, "FullTitle"),
    (row(TradeVolume=None), Reason.MALFORMED_ROW, "TradeVolume"),
    (row(TradeDateGre=None), Reason.MALFORMED_ROW, "TradeDateGre"),
    ({"CoID": 5}, Reason.MALFORMED_ROW, "BourseSymbol"),
    ([], Reason.MALFORMED_ROW, "object"),
    (None, Reason.MALFORMED_ROW, "object"),
]


@pytest.mark.parametrize(("bad", "reason", "message"), BAD)
def test_a_bad_row_is_reported_and_the_rest_is_used(bad: object, reason: Reason, message: str) -> None:
    """The dead letter has the reason and the very bytes; its neighbours are published."""
    other = row(TseSymbolCode="IRO1XXXX0001")
    found = read(ROW, bad, other)
    assert list(found.candles) == ["IRO1MADN0001", "IRO1XXXX0001"]
    ((_, rejected),) = found.rejected
    assert (rejected.reason, rejected.payload, found.rows) == (reason, json.dumps(bad).encode(), 3)
    assert message in rejected.message
    assert len(rejected.message) <= 1000


def test_the_same_mistake_has_the_same_identity() -> None:
    """Numbers that move on do not make it another mistake; another instrument, or field, does."""
    identities = [
        read(bad).rejected[0].identity
        for bad in (
            row(LastPrice=1.5, TradeVolume=1),
            row(LastPrice=2.5, TradeVolume=2),
            {key.lower(): value for key, value in row(LastPrice=3.5).items()},
            row(LastPrice=1.5, TseSymbolCode="IRO1XXXX0001"),
            row(MaxPrice=1.5),
        )
    ]
    assert [identities.index(each) for each in identities] == [0, 0, 0, 3, 4]


@pytest.mark.parametrize(
    "bad",
    [b'{"CoID":"\xff"}', b'{"\xff":1}', b'{"CoID":' + b"1" * 5000 + b"}", b'{"CoID":1e999}', b'{"a":"' + b"x" * 10**6],
)
def test_unreadable_rows(bad: bytes) -> None:
    """Bytes that are no text and numbers that are none cost the row, not the response, and its letter stays small."""
    bad += b'"}' * bad.endswith(b"x")
    found = parse(body(ROW).replace(b"]", b"," + bad + b"]"), context())
    assert len(found.candles) == 1
    ((_, rejected),) = found.rejected
    assert rejected.payload == bad[:100_000]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"<html><body>502 Bad Gateway</body></html>",
        DOCUMENTED.encode()[:-1],
        DOCUMENTED.encode()[: len(DOCUMENTED) // 2],
        DOCUMENTED.encode() + b"x",
        DOCUMENTED.encode("utf-16"),
        b"[" * 100_000,
        b'{"result":' + b"[" * 100_000 + b"]" * 100_000 + b',"state":"DONE"}',
        b'{"result":[NaN],"state":"DONE"}',
        b'{"state":5}',
        b'{"state":"FAILED"}',
        b"{}",
    ],
)
def test_a_bad_body_is_nonsense(text: bytes) -> None:
    """HTML, nothing, half a response, and what no reader can take."""
    with pytest.raises(ExchangeNonsense) as caught:
        parse(text, context())
    assert (caught.value.kind, caught.value.track_id) == ("nonsense", TRACK_ID)


def failed(code: str | None, message: str | None, **more: object) -> bytes:
    """Return an error body as documented."""
    return json.dumps({"status": "FAILED", "error": {"code": code, "message": message}, **more}).encode()


ERRORS: list[tuple[int, bytes, type[ExchangeError], str, str | None]] = [
    (400, failed("VALIDATION_ERROR", "trackId is duplicated"), ExchangeRefused, "internal", "VALIDATION_ERROR"),
    (400, failed("VALIDATION_ERROR", "invalid token"), ExchangeRefused, "token", "VALIDATION_ERROR"),
    (400, failed("SERVICE_CALL_ERROR", "provider"), ExchangeUnavailable, "provider", "SERVICE_CALL_ERROR"),
    (401, failed("UNAUTHORIZED", "توکن نامعتبر است"), ExchangeRefused, "token", "UNAUTHORIZED"),
    (200, failed("UNAUTHORIZED", "توکن نامعتبر است"), ExchangeRefused, "token", "UNAUTHORIZED"),
    (200, b'{"message":"invalid token"}', ExchangeRefused, "token", None),
    (400, b'{"message":"Invalid Token"}', ExchangeRefused, "token", None),
    (401, b"", ExchangeRefused, "token", None),
    (403, failed("FORBIDDEN", "no"), ExchangeRefused, "scope", "FORBIDDEN"),
    (403, failed("FORBIDDEN", "invalid token"), ExchangeRefused, "token", "FORBIDDEN"),
    (403, b"<html>", ExchangeRefused, "address", None),
    (403, b"", ExchangeRefused, "address", None),
    (503, failed("X", "Quota service is unavailable"), ExchangeUnavailable, "provider", "X"),
    (500, failed("X", "خطا در محاسبه سقف"), ExchangeUnavailable, "provider", "X"),
    (200, failed("X", "quota"), ExchangeUnavailable, "provider", "X"),
    (408, failed("REQUEST_TIME_OUT", TIMEOUT), ExchangeUnavailable, "timeout", "REQUEST_TIME_OUT"),
    (429, b"", ExchangeUnavailable, "rate", None),
    (400, failed("X", "Quota exceeded"), ExchangeRefused, "quota", "X"),
    (500, b"<html>", ExchangeUnavailable, "provider", None),
    (502, b"", ExchangeUnavailable, "provider", None),
    (400, failed("NEVER_SEEN", "as it is"), ExchangeUnavailable, "provider", "NEVER_SEEN"),
    (200, failed("VALIDATION_ERROR", "no"), ExchangeRefused, "internal", "VALIDATION_ERROR"),
    (200, b'{"result":{"error":{"code":"ANY","message":"x"}}}', ExchangeUnavailable, "provider", "ANY"),
    (400, b'{"responseCode":"FN-BRSE-40000100001","error":{"message":"x"}}', ExchangeUnavailable, "provider", FN),
    (400, b'{"error":null,"code":"C","message":"m"}', ExchangeUnavailable, "provider", "C"),
    (400, b'{"error":"text only"}', ExchangeUnavailable, "provider", None),
]  # fmt: skip


@pytest.mark.parametrize(("status", "text", "error", "kind", "code"), ERRORS)
def test_errors_differ_by_kind(
    status: int, text: bytes, error: type[ExchangeError], kind: str, code: str | None
) -> None:
    """Every documented error body, wherever it hides its words, is of the right kind; the words are verbatim."""
    found = refusal(status, text, TRACK_ID)
    assert (type(found), found.kind, found.code, found.track_id) == (error, kind, code, TRACK_ID)
    if status == 200:
        with pytest.raises(error) as caught:
            parse(text, context())
        assert caught.value.kind == kind


@pytest.mark.parametrize("rows", [0, 1, 200])
@pytest.mark.parametrize("key", ["state", "status"])
@pytest.mark.parametrize("first", [True, False])
def test_a_success_is_found_in_the_envelope(rows: int, key: str, first: bool) -> None:
    """Before the rows or after them, under either name; a row that contains the word is not one."""
    result = {"result": [row(FullTitle='"state":"DONE"')] * rows}
    for state in ("DONE", "FAILED", None):
        text = json.dumps({key: state, **result} if first else {**result, key: state}).encode()
        assert is_done(text) is (state == "DONE")
    assert not any(map(is_done, (b"", b"<html>", b"[]", b"null", b"[" * 20_000)))
    assert is_done(b"\xef\xbb\xbf" + body(row()))


def test_words_of_any_length_stay_within_a_record() -> None:
    """An error message of a megabyte must not make the marker one that brokers refuse."""
    found = refusal(500, failed("C" * 10**6, "m" * 10**6), None)
    assert len(str(found)) <= 1000
    assert found.code is not None
    assert len(found.code) <= 1000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("30", 30.0),
        ("9" * 5000, 86_400.0),
        ("Wed, 21 Aug 2019 06:27:17 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("Wed, 21 Aug 99999999999999 06:27:17 GMT", None),
        ("Wed, 21 Aug 2019 06:27:17 +99999999999999", None),
        ("²", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    """It is read where it is a number or a date, and never more than a day."""
    assert retry_seconds(header, NOW) == seconds


def real_lines(count: int) -> list[dict[str, Any]]:
    """Return the first captured responses of the real day."""
    with gzip.open(REAL_DAY) as lines:
        return [json.loads(next(lines)) for _ in range(count)]


def real_rows() -> list[dict[str, Any]]:
    """Return the rows of the real day's first response."""
    rows: list[dict[str, Any]] = real_lines(1)[0]["changed"]
    return rows


LATER = {
    "dated": datetime(2019, 8, 21, 14, tzinfo=UTC),
    "received_at": datetime(2019, 8, 21, 14, tzinfo=UTC),
    "session_day": None,
}
REAL = body(*real_rows()[:4])


def survive(text: bytes) -> None:
    """Read anything: a snapshot whose events can be written and that repeats itself, or an ExchangeError."""
    try:
        found = parse(text, context(**LATER))
    except ExchangeError:
        return
    changes = diff({}, found)
    for event, candle in zip(changes.events, changes.candles, strict=True):
        encoder(TradeEvent)(event)
        encoder(Candle)(candle)
    assert not diff({each.instrument: each for each in changes.candles}, found).events
    for rejected in found.rejected:
        rejected.letter.message.encode()


@given(st.binary(max_size=300))
@example(b'{"state":"DONE","result":[{"":"\\ud800"}]}')
def test_any_bytes(text: bytes) -> None:
    """Arbitrary bytes never raise anything else."""
    survive(text)
    survive(b'{"state":"DONE","result":' + text + b"}")
    survive(b'{"state":"DONE","result":[' + text + b"]}")


odd_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["NaN", "inf", "1e400", "-0", "0x10", "1_0", "²", "9" * 4999, 10**30, "2019/08/21 24:00:00"])
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(sorted(ROW)), odd_values, max_size=4))
def test_any_values(values: dict[str, object]) -> None:
    """A row with anything in any of its fields is used or rejected, and its neighbour is used."""
    text = body(ROW, {**ROW, "TseSymbolCode": "IRO1XXXX0001", **values})
    survive(text)
    try:
        found = parse(text, context(dated=datetime(9999, 1, 1, tzinfo=UTC)))
    except ExchangeNonsense:
        # Python writes NaN and lone surrogates; JSON has neither.
        assert b"NaN" in text or b"Infinity" in text or b"\\ud" in text
    else:
        assert "IRO1MADN0001" in found.candles


@given(
    st.lists(
        st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=5
    )
)
def test_mutated_real_responses(cuts: list[tuple[int, int, bytes]]) -> None:
    """Real bytes with pieces cut out and others put in never raise anything else."""
    text = REAL
    for start, length, new in cuts:
        text = text[:start] + new + text[start + length :]
    survive(text)


def test_recorded_responses_give_the_recorded_events(rewrite_golden: bool) -> None:
    """Twelve recorded responses of the real day give, for thirty companies, event by event what is on file."""
    known: dict[str, Candle] = {}
    rows: dict[str, dict[str, Any]] = {}
    found = []
    for number, line in enumerate(real_lines(12)):
        rows |= {each["TseSymbolCode"]: each for each in line["changed"] if each["CoID"] in range(100, 130)}
        at = datetime.fromisoformat(line["received_at"]).astimezone(UTC)
        when = {"poll_sequence": number + 1, "received_at": at, "dated": at, "session_day": at.date()}
        changes = diff(known, parse(body(*sorted(rows.values(), key=lambda each: each["CoID"])), context(**when)))
        known |= {each.instrument: each for each in changes.candles}
        found += [msgspec.json.encode(event).decode() for event in changes.events]
    file = GOLDEN / "2019-08-21.events.ndjson"
    if rewrite_golden:
        file.write_text("\n".join(found) + "\n", "utf-8")
    assert len(found) > 50
    assert file.read_text("utf-8").splitlines() == found


def test_a_candle_is_its_row_whatever_the_poll() -> None:
    """Nothing of the poll but its number, time and call goes into a candle."""
    first, second = only(read(ROW)), only(read(ROW, poll_sequence=8, received_at=NOW + timedelta(seconds=60)))
    assert structs.replace(first, poll_sequence=8, observed_at=second.observed_at) == second


CODES = ("IRO1MADN0001", "IRO1XXXX0001")
some_rows = st.fixed_dictionaries(
    {
        "TseSymbolCode": st.sampled_from([*CODES, *CODES, "bad"]),
        "TradeVolume": st.sampled_from([51205, 51204, "51205", -1]),
        "LastPrice": st.sampled_from([5488, 5488, None]),
        "Type": st.sampled_from([None, None, 1, True, 1.0, "1"]),
        "PrecedencyRight": st.sampled_from([False, False, True, None]),
        "TradeDate": st.sampled_from(["1398/10/29", "1398/10/30"]),
        "TradeDateGre": st.sampled_from(
            [
                "2020/01/19 09:01:37",
                "2020/01/19 09:01:38",
                "2020/01/19 09:07:10",
                "2020/01/18 09:01:37",
                "2020-01-19T00:00:00",
            ]
        ),
    }
).map(lambda some: row(**some))
some_polls = st.lists(
    st.tuples(st.lists(some_rows, max_size=3), st.lists(some_rows, max_size=2), st.booleans(), st.booleans()),
    max_size=8,
)


@given(some_polls, st.sampled_from(["trades-realtime", "realTimeTrades"]))
def test_a_memo_changes_nothing(polls: list[tuple[list[Any], list[Any], bool, bool]], profile: str) -> None:
    """Whatever follows on what, and whether a poll is committed or not: the events' bytes are the same without one."""
    known: dict[str, Candle] = {}
    memos: Mapping[bool, Memo] = {}
    repeated: list[Any] = []
    for number, (shares, rights, again, committed) in enumerate(polls):
        repeated = [*repeated, *shares][-3:] if again else shares
        at = NOW + timedelta(seconds=20 * number)
        readings = [
            context(
                poll_sequence=number,
                received_at=at + timedelta(seconds=right),
                dated=at,
                is_right=right,
                profile=profile,
            )
            for right in (False, True)
        ]
        answers = [(body(*rows), reading) for rows, reading in zip((repeated, rights), readings, strict=True)]
        plain, remembered = derive(known, answers), derive(known, answers, memos=memos)
        memos = remembered.memos
        encoded = [[encoder(TradeEvent)(event) for event in each.changes.events] for each in (plain, remembered)]
        assert encoded[0] == encoded[1]
        assert plain.changes == remembered.changes
        assert plain.rejected == remembered.rejected
        assert plain.snapshot is not None
        assert remembered.snapshot is not None
        assert plain.snapshot.oddities == remembered.snapshot.oddities
        assert plain.snapshot.candles.keys() == remembered.snapshot.candles.keys()
        if committed:
            known |= {candle.instrument: candle for candle in plain.changes.candles}


def test_an_unchanged_row_is_not_read_again() -> None:
    """Its candle is that of the poll before, unless its time is now in the future; an event has its own poll."""
    first = parse(body(ROW), context())
    second = parse(body(ROW), context(poll_sequence=8, received_at=NOW + timedelta(seconds=60)), first.memo)
    assert only(second) is only(first)
    (candle,) = diff({}, second).candles
    assert (candle.poll_sequence, candle.observed_at) == (8, NOW + timedelta(seconds=60))
    early = parse(body(ROW), context(dated=NOW - timedelta(minutes=10)), first.memo)
    assert [bad.letter.reason for bad in early.rejected] == [Reason.FUTURE_ROW]


# --- the successor, and minute rows -----------------------------------------------------------------------------------

SUCCESSOR: dict[str, Any] = {
    "companyId": 5,
    "companySymbol": "ومعادن",
    "tseSymbolCode": "IRO1MADN0001",
    "fullTitle": "توسعه معادن",
    "precedencyRight": True,
    "gregorianDate": "2020-01-19T00:00:00",
    "jalaaliDate": "1398/10/29",
    "maxPrice": 5488,
    "minPrice": 5480,
    "openingPrice": 5488,
    "closingPrice": 5477,
    "lastPrice": 5488,
    "tradeVolume": 51205,
    "tradeValue": 281013040,
    "tradeQty": 16,
    "previousClosingPrice": 5477,
    "closingPriceChange": 0,
    "closingPriceChangePercent": 0.5,
    "sharedCount": 40300000000,
    "marketValue": 220723100000000,
}


def test_the_successor_gives_the_same_candle() -> None:
    """Its own names; a midnight is a date, the time of receipt stands in, flagged; each row says if it is a right."""
    profile = PROFILES["realTimeTrades"]
    text = json.dumps({"trackId": TRACK_ID, "result": [SUCCESSOR], "status": "DONE"}).encode()
    candle = only(parse(text, context(profile=profile.name)))
    usual = only(read(row(ClosingPChgPercent=0.5, FullTitle="توسعه معادن")))
    changed = {"source": profile.source, "is_right": True, "traded_at": NOW, "traded_at_estimated": True}
    assert candle == structs.replace(usual, **changed)
    exact = only(parse(text.replace(b"T00:00:00", b"T09:01:37"), context(profile=profile.name)))
    assert (exact.traded_at, exact.traded_at_estimated) == (usual.traded_at, False)


def test_estimated_times_never_make_a_row_older() -> None:
    """Seen on its day, later that day, and on the next morning: no event, and none is stale."""
    profile = PROFILES["realTimeTrades"]
    text = json.dumps({"result": [SUCCESSOR], "status": "DONE"}).encode()
    known: dict[str, Candle] = {}
    for hours, day in ((0, 19), (6, 19), (23, 19), (27, 19)):
        at = NOW + timedelta(hours=hours)
        found = parse(text, context(profile=profile.name, received_at=at, dated=at, session_day=date(2020, 1, day)))
        changes = diff(known, found)
        assert (len(changes.events), changes.stale_rows) == (int(hours == 0), 0)
        known.update((candle.instrument, candle) for candle in changes.candles)
        assert only(found).trading_day == date(2020, 1, 19)


def test_estimated_times_are_not_of_the_future() -> None:
    """Where our clock is ahead of the exchange's, its rows are no dead letters for it."""
    text = json.dumps({"result": [SUCCESSOR], "status": "DONE"}).encode()
    ahead = context(profile="realTimeTrades", received_at=NOW + timedelta(minutes=6))
    assert only(parse(text, ahead)).traded_at == ahead.received_at
    (bad,) = parse(text.replace(b"-19T", b"-20T"), ahead).rejected
    assert bad.letter.reason is Reason.FUTURE_ROW


def test_minute_rows_come_oldest_first_and_all_of_them() -> None:
    """Several of one instrument, in order of their time; bad ones are left out."""
    clocks = ["09:03:00", "09:01:00", "09:02:00"]
    rows = [row(TradeDateGre=f"2020/01/19 {clock}") for clock in clocks] + [row(TradeVolume=-1)]
    found, rejected = parse_minutes(body(*rows), context())
    assert [row.letter.poll_id for row in rejected] == [TRACK_ID]
    assert [candle.traded_at.minute for candle in found] == [31, 32, 33]
    with pytest.raises(ExchangeNonsense):
        parse_minutes(b"<html>", context())
