"""Captures: byte for byte, durable before they count, readable up to a torn end; and the events derived from them."""

from __future__ import annotations

import errno
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from bourse_producer.capture import Capture, Record, read
from bourse_producer.derive import derive
from bourse_producer.finnotech import Received
from bourse_producer.publisher import State
from bourse_producer.replay import Replay
from bourse_producer.replay_command import replay
from bourse_producer.responses import Reading
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.errors import ConfigurationError, PublishError
from bourse_schemas.events import Candle, Op, Outcome, PollMarker, TradeEvent

DAY = date(2026, 11, 21)
OPENS = datetime(2026, 11, 21, 5, 30, tzinfo=UTC)


def body(volume: int, track_id: str = "t") -> bytes:
    """Return a response with one row."""
    row = {"TseSymbolCode": "IRO1MADN0001", "BourseSymbol": "x", "FullTitle": "x", "CoID": 5, "LastPrice": 100}
    row |= {"TradeDateGre": "2026/11/21 09:00:00", "TradeVolume": volume, "TradeValue": volume, "TradeQty": volume}
    return json.dumps({"trackId": track_id, "result": [row], "state": "DONE"}, indent=1).encode()


def received(text: bytes, track_id: str) -> Received:
    """Return an answer as the exchange's client tells it."""
    headers = {"content-type": "application/json"}
    return Received(track_id, "/p", {"trackId": track_id}, 200, headers, text, OPENS, OPENS + timedelta(seconds=1))


def context(sequence: int, track_id: str) -> Reading:
    """Return how the answer of this poll is read."""
    at = OPENS + timedelta(minutes=sequence)
    return Reading(sequence, at, at, DAY, is_right=False, track_id=track_id)


class Service:
    """Polls and captures as the service does, without an exchange and without Kafka."""

    def __init__(self, capture: Capture, known: dict[str, Candle] | None = None, sequence: int = 0) -> None:
        self.capture, self.known, self.sequence = capture, known or {}, sequence
        self.events: list[TradeEvent] = []
        capture.restored(State(dict(self.known), sequence))

    def poll(self, volume: int, *, commit: bool = True, told: bool = True) -> None:
        """Poll once; the transaction fails, or the process dies before it could note the outcome."""
        sequence = self.sequence + 1
        track_id = f"t{sequence}-{volume}"
        text = body(volume, track_id)
        self.capture.response(received(text, track_id))
        self.capture.poll(sequence, [context(sequence, track_id)], self.known)
        if not commit:
            return
        derived = derive(self.known, [(text, context(sequence, track_id))])
        self.known.update((candle.instrument, candle) for candle in derived.changes.candles)
        self.events += derived.changes.events
        self.sequence = sequence
        if told:
            self.capture.committed(sequence, Outcome.PUBLISHED if derived.changes.events else Outcome.UNCHANGED)


def files(folder: Path) -> list[Path]:
    """Return the files of a capture, oldest first."""
    return sorted(folder.glob("capture-*.gz"))


def records(folder: Path) -> list[Record]:
    """Return all records of a capture, which must be whole."""
    oddities: Counter[str] = Counter()
    found = [record for path in files(folder) for record in read(path, oddities)]
    assert not oddities
    return found


def derived(paths: Sequence[Path], markers: dict[int, PollMarker] | None = None) -> Replay:
    """Return what a replay makes of these files."""
    found = Replay(markers)
    found.capture(paths)
    return found


def test_byte_for_byte(tmp_path: Path) -> None:
    """What was received stands in the file before the poll is published, whatever the bytes are."""
    capture = Capture(tmp_path / "new" / "folder")
    for number, text in enumerate([b"", b"\x00\xff\n{", body(5)]):
        capture.response(received(text, f"t{number}"))
    capture.poll(1, [context(1, "t2")], {})
    found = records(tmp_path / "new" / "folder")
    assert [record.head.kind for record in found] == ["start", "response", "response", "response", "poll"]
    assert [record.body for record in found if record.head.kind == "response"] == [b"", b"\x00\xff\n{", body(5)]
    (poll,) = [record for record in found if record.head.kind == "poll"]
    assert list(poll.head.calls) == [context(1, "t2")]
    (first, *_) = [record.head for record in found if record.head.kind == "response"]
    assert (first.track_id, first.status, first.received_at) == ("t0", 200, OPENS + timedelta(seconds=1))


def test_the_same_events_again(tmp_path: Path) -> None:
    """Through transactions that failed, a death before the outcome was noted, restarts and new files."""
    folder = tmp_path
    service = Service(Capture(folder, most_bytes=600))
    for volume in (1, 2, 2, 3):
        service.poll(volume)
    service.poll(9, commit=False)
    service.capture.restored(State(dict(service.known), service.sequence))
    service.poll(4)
    service.poll(5, told=False)
    again = Service(Capture(folder), service.known, service.sequence)
    again.poll(6)
    again.poll(7, commit=False)
    third = Service(Capture(folder), again.known, again.sequence)
    third.poll(8)
    third.capture.close()
    found = derived(files(folder))
    assert found.events == [*service.events, *again.events, *third.events]
    assert found.polls == set(range(1, 9))
    assert not found.said
    assert len(files(folder)) > 3


@pytest.mark.parametrize("counts", [True, False])
def test_what_a_death_left_undecided_is_the_topics_to_say(tmp_path: Path, counts: bool) -> None:
    """Without the topic it is left out, and told; with it the marker of the poll and its trackId decide."""
    service = Service(Capture(tmp_path))
    service.poll(1)
    service.poll(2, told=False)
    without = derived(files(tmp_path))
    assert ([event.volume for event in without.events], len(without.said)) == ([1], 1)
    counted = dict.fromkeys(("rows", "opened", "traded", "revised", "cancelled", "stale_rows"), 0)
    counted |= dict.fromkeys(("rejected_rows", "duplicate_rows", "charged_calls"), 0)
    fields: dict[str, Any] = {
        "poll_sequence": 2,
        "simulated": True,
        "source": "s",
        "outcome": "PUBLISHED",
        "phase": "OPEN",
    }
    fields |= {"feed_state": "FRESH", "requested_at": OPENS, "day_final": False, **counted}
    marker = PollMarker(poll_id="t2-2" if counts else "another", **fields)
    found = derived(files(tmp_path), {2: marker})
    assert [event.volume for event in found.events] == ([1, 2] if counts else [1])


def test_a_torn_end_is_told_and_the_rest_is_used(tmp_path: Path) -> None:
    """As a crash or a full disk leaves it; bytes that are no capture are an error with words."""
    service = Service(Capture(tmp_path))
    for volume in (1, 2, 3):
        service.poll(volume)
    service.capture.close()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for cut in (1, 7, len(whole) // 3):
        file.write_bytes(whole[:-cut])
        found = derived([file])
        assert found.events == service.events[: len(found.events)]
        assert any("torn off" in words for words in found.said)
    file.write_bytes(whole[:200] + b"\xff" * 50 + whole[250:])
    with pytest.raises(ConfigurationError, match=r"is no capture, or a damaged one|cannot be read"):
        derived([file])
    file.write_bytes(gzip.compress(b"something else\n"))
    with pytest.raises(ConfigurationError, match="is no capture"):
        derived([file])


@pytest.mark.parametrize("required", [True, False])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    """It is told once; publication stops or goes on as was chosen; with room again the next file stands alone."""
    errors: list[int] = []
    service = Service(Capture(tmp_path, required=required, on_error=lambda: errors.append(1)))
    service.poll(1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr("os.fsync", full)
        for volume in (2, 3):
            if required:
                with pytest.raises(PublishError, match="No space left"):
                    service.poll(volume)
            else:
                service.poll(volume)
    told = [line["event"] for line in lines if line["log_level"] == "error"]
    assert (told, len(errors) >= 2) == (["responses are not captured"], True)
    service.poll(4)
    service.poll(5)
    service.capture.close()
    last = files(tmp_path)[-1]
    alone = derived([last])
    assert alone.events == service.events[-2:]


@pytest.mark.parametrize("required", [True, False])
def test_with_room_again_a_restart_captures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    """After the transaction that the full disk stopped comes the restored state: it begins a file of its own."""
    service = Service(Capture(tmp_path, required=required))
    service.poll(1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        if required:
            with pytest.raises(PublishError, match="No space left"):
                service.poll(2)
            with pytest.raises(PublishError, match="No space left"):
                service.capture.restored(State(dict(service.known), service.sequence))
        else:
            service.poll(2)
    service.capture.restored(State(dict(service.known), service.sequence))
    service.poll(3)
    service.capture.close()
    alone = derived([files(tmp_path)[-1]])
    assert (alone.events, alone.said) == (service.events[-1:], Counter())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Is told before anything is published."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"--capture .*: cannot write there"):
        Capture(tmp_path / "file" / "folder")


def test_more_known_than_captured_is_told(tmp_path: Path) -> None:
    """Another instance published meanwhile: its polls are in its own capture."""
    service = Service(Capture(tmp_path))
    service.poll(1)
    service.capture.close()
    elsewhere = Service(Capture(tmp_path / "elsewhere"), dict(service.known), service.sequence)
    elsewhere.poll(2)
    back = Service(Capture(tmp_path), elsewhere.known, elsewhere.sequence)
    back.poll(3)
    back.capture.close()
    found = derived(files(tmp_path))
    assert [event.volume for event in found.events] == [1, 3]
    assert list(found.said) == ["before poll 3 more is known than was captured"]


def test_the_command_on_a_captured_day() -> None:
    """Exactly the counts that the day must give, and the same lines each time."""
    table = CliRunner().invoke(replay, [str(REAL_DAY)])
    assert table.exit_code == 0, table.output
    assert table.output.split()[:10] == [
        *("2019-08-21", "19,346", "events", "548", "OPENED"),
        *("18,711", "TRADED", "2", "REVISED", "85"),
    ]
    first, second = (CliRunner().invoke(replay, [str(REAL_DAY), "--json"]).stdout for _ in range(2))
    assert first == second
    lines = [json.loads(line) for line in first.splitlines()]
    assert Counter(line["op"] for line in lines) == {"OPENED": 548, "TRADED": 18711, "REVISED": 2, "CANCELLED": 85}
    assert lines[0]["trading_day"] == "2019-08-21"
    assert Op(lines[0]["op"]) is Op.OPENED


@pytest.mark.parametrize("text", [b"", b"no gzip", gzip.compress(b"{}\n"), gzip.compress(b'{"received_at": 5}\n')])
def test_the_command_and_bad_files(tmp_path: Path, text: bytes) -> None:
    """Missing, empty, foreign: words and exit code 2, never a traceback."""
    file = tmp_path / "day.ndjson.gz"
    file.write_bytes(text)
    for path in (file, tmp_path / "missing.gz", tmp_path):
        run = CliRunner().invoke(replay, [str(path)])
        if text or path != file:
            assert isinstance(run.exception, ConfigurationError), path
