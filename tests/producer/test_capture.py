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

from bourse_producer.capture import Capture, Head, read_capture
from bourse_producer.finnotech import Reply
from bourse_producer.publisher import State
from bourse_producer.replay import Replay, replay
from bourse_producer.responses import Reading, derive
from bourse_sandbox.market import REAL_DAY
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Candle, Op, PollMarker, TradeEvent

DAY = date(2026, 11, 21)
OPENS = datetime(2026, 11, 21, 5, 30, tzinfo=UTC)


def body(volume: int, track_id: str = "t") -> bytes:
    """Return a response with one row."""
    row = {"TseSymbolCode": "IRO1MADN0001", "BourseSymbol": "x", "FullTitle": "x", "CoID": 5, "LastPrice": 100}
    row |= {"TradeDateGre": "2026/11/21 09:00:00", "TradeVolume": volume, "TradeValue": volume, "TradeQty": volume}
    return json.dumps({"trackId": track_id, "result": [row], "state": "DONE"}, indent=1).encode()


def received(text: bytes, track_id: str) -> Reply:
    """Return an answer as the exchange's client returns it."""
    headers = {"content-type": "application/json"}
    return Reply(track_id, text, OPENS, OPENS + timedelta(seconds=1), None, headers=headers)


def reading(sequence: int, track_id: str) -> Reading:
    """Return how the answer of this poll is read."""
    at = OPENS + timedelta(minutes=sequence)
    return Reading(sequence, at, at, DAY, is_right=False, track_id=track_id)


class Service:
    """Polls and captures as the service does, without an exchange and without Kafka."""

    def __init__(self, capture: Capture, before: Service | None = None) -> None:
        self.capture, self.known, self.markers = capture, dict[str, Candle](), list[PollMarker]()
        self.events: list[TradeEvent] = []
        if before is not None:
            self.known, self.markers = dict(before.known), list(before.markers)
        self.restore()

    def restore(self) -> None:
        """Read back what is committed."""
        self.capture.restored(State(dict(self.known), len(self.markers), list(self.markers)))

    def poll(self, volume: int, *, commit: bool = True, again: str | None = None) -> str:
        """Poll once, or publish the bytes of an earlier poll again; the transaction may fail. Return the track id."""
        sequence = len(self.markers) + 1
        track_id = again or f"t{sequence}-{volume}"
        text = body(volume, track_id)
        if again is None:
            self.capture.response(received(text, track_id))
        self.capture.poll(sequence, [reading(sequence, track_id)], self.known)
        if commit:
            changes = derive(self.known, [(text, reading(sequence, track_id))]).changes
            self.known.update((candle.instrument, candle) for candle in changes.candles)
            self.events += changes.events
            self.markers.append(marker(sequence, track_id))
        return track_id


def marker(sequence: int, track_id: str) -> PollMarker:
    """Return a poll's marker, as far as it matters here."""
    counted = dict.fromkeys(("rows", "opened", "traded", "revised", "cancelled", "stale_rows", "rejected_rows"), 0)
    counted |= dict.fromkeys(("duplicate_rows", "charged_calls"), 0)
    fields: dict[str, Any] = {
        "poll_sequence": sequence,
        "poll_id": track_id,
        "simulated": True,
        "source": "s",
        "outcome": "PUBLISHED",
        "phase": "OPEN",
        "feed_state": "FRESH",
        "requested_at": OPENS,
        "day_final": False,
        **counted,
    }
    return PollMarker(**fields)


def files(folder: Path) -> list[Path]:
    """Return the files of a capture, oldest first."""
    return sorted(folder.glob("capture-*.gz"))


def records(folder: Path) -> list[tuple[Head, bytes]]:
    """Return all records of a capture, which must be whole."""
    notes: Counter[str] = Counter()
    found = [record for path in files(folder) for record in read_capture(path, notes)]
    assert not notes
    return found


def derived(paths: Sequence[Path], committed: set[str] | None = None) -> Replay:
    """Return what a replay makes of these files."""
    found = Replay(committed)
    found.capture(paths)
    return found


def test_byte_for_byte(tmp_path: Path) -> None:
    """What was received is in the file before the poll is published, whatever the bytes are."""
    capture = Capture(tmp_path / "new" / "folder")
    for number, text in enumerate([b"", b"\x00\xff\n{", body(5)]):
        capture.response(received(text, f"t{number}"))
    capture.poll(1, [reading(1, "t2")], {})
    found = records(tmp_path / "new" / "folder")
    assert [head.kind for head, _ in found] == ["state", "response", "response", "response", "poll"]
    assert [content for head, content in found if head.kind == "response"] == [b"", b"\x00\xff\n{", body(5)]
    assert list(found[-1][0].readings) == [reading(1, "t2")]
    first = found[1][0]
    assert (first.track_id, first.status, first.received_at) == ("t0", 200, OPENS + timedelta(seconds=1))


def test_the_same_events_again(tmp_path: Path) -> None:
    """Through transactions that failed, bytes published again, deaths before and after a commit, and new files."""
    service = Service(Capture(tmp_path, max_bytes=600))
    for volume in (1, 2, 2, 3):
        service.poll(volume)
    service.poll(9, commit=False)  # and the poll in hand is dropped
    service.restore()
    service.poll(4)
    in_hand = service.poll(5, commit=False)
    service.restore()
    service.poll(5, again=in_hand)
    service.poll(6)  # dies after the commit
    again = Service(Capture(tmp_path), service)
    again.poll(7)
    again.poll(8, commit=False)  # dies before the commit
    third = Service(Capture(tmp_path), again)
    third.poll(9)
    found = derived(files(tmp_path))
    expected = [*service.events, *again.events, *third.events]
    assert found.events == expected
    assert [event.volume for event in expected] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert found.polls == set(range(1, 10))
    assert not found.notes
    assert len(files(tmp_path)) > 3


def test_a_poll_without_an_answer_changes_nothing(tmp_path: Path) -> None:
    """A failed call leaves a poll with no readings."""
    service = Service(Capture(tmp_path))
    service.poll(1)
    service.capture.poll(2, [], service.known)
    service.markers.append(marker(2, "failed"))
    service.poll(3)
    assert derived(files(tmp_path)).events == service.events
    assert len(service.events) == 2


def test_the_topic_shows_which_polls_were_published(tmp_path: Path) -> None:
    """The last poll of a capture counts, unless its track id is not on the topic."""
    service = Service(Capture(tmp_path))
    ids = [service.poll(1), service.poll(2, commit=False)]
    assert [event.volume for event in derived(files(tmp_path)).events] == [1, 2]
    assert [event.volume for event in derived(files(tmp_path), {ids[0]}).events] == [1]


def test_a_torn_end_costs_one_poll(tmp_path: Path) -> None:
    """As a crash leaves it: wherever the file is cut, what was whole before is derived, and there is a note."""
    service = Service(Capture(tmp_path))
    service.poll(1)
    (file,) = files(tmp_path)
    whole = file.stat().st_size
    service.poll(2)
    data = file.read_bytes()
    assert derived([file]).notes == {}
    for cut in range(whole + 1, len(data), 7):
        file.write_bytes(data[:cut])
        found = derived([file])
        assert [event.volume for event in found.events][:1] == [1]
        assert found.notes or len(found.events) == 2


def test_a_full_disk_stops_nothing_and_the_next_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged once and counted each time; once there is room, a new file begins with a state."""
    errors: list[None] = []
    service = Service(Capture(tmp_path, on_error=lambda: errors.append(None)))
    service.poll(1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr("os.fsync", full)
        service.poll(2)
        service.poll(3)
    with capture_logs() as later:
        service.poll(4)
    assert [line["event"] for line in [*lines, *later]] == ["capture failed", "capture works again"]
    assert len(errors) >= 2
    alone = derived([files(tmp_path)[-1]])
    assert (alone.events, alone.notes) == (service.events[-1:], Counter())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Is reported before anything is published."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"--capture .*: cannot write"):
        Capture(tmp_path / "file" / "folder")


def test_more_known_than_captured_is_noted(tmp_path: Path) -> None:
    """Another instance published meanwhile: its polls are in its own capture."""
    service = Service(Capture(tmp_path))
    service.poll(1)
    elsewhere = Service(Capture(tmp_path / "elsewhere"), service)
    elsewhere.poll(2)
    back = Service(Capture(tmp_path), elsewhere)
    back.poll(3)
    found = derived(files(tmp_path))
    assert [event.volume for event in found.events] == [1, 3]
    assert list(found.notes) == ["before poll 3 more is known than was captured"]


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
