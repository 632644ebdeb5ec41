"""Every response, byte for byte, before it is published: any event can be derived from it again.

A capture is a folder of gzip files of records: a line of JSON with the kind, then `body_bytes` bytes and a line feed.

state      what was known: each instrument's candle, the last poll's sequence, and after a restore the ids of the last
           polls committed
response   an answer of the exchange
poll       which responses a poll is made of, and how they are read

Each poll is a gzip member of its own, so that a torn end costs one poll. A new file begins with a state at every
restore, every day, every 64 MiB, and after a failure.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bourse_cli.logs import get_logger
from bourse_producer.diff import InstrumentCode
from bourse_producer.finnotech import Reply
from bourse_producer.publisher import State
from bourse_producer.responses import Reading
from bourse_schemas.errors import ConfigurationError
from bourse_schemas.events import Candle

FILE_BYTES = 64 << 20
# Polls whose ids a state names: more than can be undecided.
LAST_POLLS = 100


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """The line a record begins with; which fields it has depends on its kind."""

    kind: str
    body_bytes: int = 0
    poll_sequence: int = 0
    poll_ids: Sequence[str] | None = None
    readings: Sequence[Reading] = ()
    track_id: str = ""
    path: str | None = None
    query: Mapping[str, str] = {}
    status: int | None = None
    headers: Mapping[str, str] = {}
    requested_at: datetime | None = None
    received_at: datetime | None = None


class Capture:
    """Appends to a folder. A failure to write is logged and counted, and stops no publication."""

    def __init__(
        self, folder: Path, *, on_error: Callable[[], None] = lambda: None, max_bytes: int = FILE_BYTES
    ) -> None:
        self._folder, self._on_error, self._max_bytes = folder, on_error, max_bytes
        self._pending: list[bytes] = []
        # The polls committed at a restore, until they are written.
        self._ids: list[str] | None = None
        self._file: Path | None = None
        self._failed = False
        self._log = get_logger(capture=str(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(None, "no permission")
        except OSError as error:
            raise ConfigurationError(f"--capture {folder}: cannot write: {error.strerror}") from error

    def restored(self, state: State) -> None:
        """Keep what the next polls start from."""
        ids = [each for marker in state.markers[-LAST_POLLS:] for each in (marker.poll_id, marker.rights_poll_id)]
        self._ids = [each for each in ids if each is not None]
        self._begin_file(state.candles, state.poll_sequence)

    def response(self, reply: Reply) -> None:
        """Keep an answer of the exchange; it is written with the poll it belongs to."""
        fields = {name: getattr(reply, name) for name in Head.__struct_fields__ if hasattr(reply, name)}
        self._pending.append(_record(Head("response", **fields), reply.body))

    def poll(self, poll_sequence: int, readings: Sequence[Reading], known: Mapping[InstrumentCode, Candle]) -> None:
        """Write the responses, and how they are read; `known` is what they are compared with."""
        poll = _record(Head("poll", poll_sequence=poll_sequence, readings=readings))
        records, self._pending = [*self._pending, poll], []
        if self._file is None or self._is_full(self._file):
            self._begin_file(known, poll_sequence - 1)
        self._write(records)

    def _is_full(self, file: Path) -> bool:
        today = f"capture-{datetime.now(UTC):%Y%m%d}"
        try:
            return not file.name.startswith(today) or file.stat().st_size >= self._max_bytes
        except OSError:  # it is gone, or the folder is
            return True

    def _begin_file(self, known: Mapping[InstrumentCode, Candle], poll_sequence: int) -> None:
        self._file = self._folder / f"capture-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}.gz"
        body = msgspec.json.encode(list(known.values()))
        if self._write([_record(Head("state", poll_sequence=poll_sequence, poll_ids=self._ids), body)]):
            self._ids = None

    def _write(self, records: Sequence[bytes]) -> bool:
        """Append records as one gzip member; after a failure the next file begins with a state."""
        if self._file is None:
            return False
        try:
            self._file.touch(0o640)
            with self._file.open("ab") as file:
                file.write(gzip.compress(b"".join(records), 1))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._on_error()
            if not self._failed:
                self._log.error("capture failed", error=error.strerror)
            self._file, self._failed = None, True
            return False
        if self._failed:
            self._log.info("capture works again")
        self._failed = False
        return True


def _record(head: Head, body: bytes = b"") -> bytes:
    head = msgspec.structs.replace(head, body_bytes=len(body))
    return msgspec.json.encode(head) + b"\n" + body + b"\n"


def read_capture(path: Path, notes: Counter[str]) -> Iterator[tuple[Head, bytes]]:
    """Yield the records of a file; a torn end, as a crash leaves it, is counted in `notes` and ends it."""
    decode, count = msgspec.json.Decoder(Head).decode, 0
    try:
        with gzip.open(path) as file:
            while line := file.readline():
                head = decode(line)
                body = file.read(head.body_bytes)
                if len(body) < head.body_bytes or file.read(1) != b"\n":
                    raise EOFError
                yield head, body
                count += 1
    except (OSError, EOFError) as error:
        # Of the next member one byte may be there, which is not the beginning of one.
        if not (isinstance(error, EOFError) or (count and isinstance(error, gzip.BadGzipFile))):
            raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
        notes[f"{path.name}: its end is torn off"] += 1
    except (zlib.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not a capture, or is damaged: {error}") from error
