"""Every response, byte for byte, before it is published: what any event can be proved from.

A capture is a folder of gzip files of records, each a line of JSON with the kind, then `body_bytes` bytes and a line
feed. Every file stands alone: it begins with the state that the first of its polls started from.

start      who wrote it                       state      what was known: the last poll, and each instrument's candle
response   an answer of the exchange          poll       which responses a poll is made of, and how they are read
committed  that the poll is published, and with which outcome
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path

import msgspec

from bourse_cli.logs import get_logger
from bourse_producer.diff import InstrumentCode
from bourse_producer.finnotech import Received
from bourse_producer.publisher import State
from bourse_producer.responses import Reading
from bourse_schemas.errors import ConfigurationError, PublishError
from bourse_schemas.events import Candle, Outcome

__all__ = ["Capture", "Record", "read"]

FILE_BYTES = 64 << 20
Known = Mapping[InstrumentCode, Candle]


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """The line a record begins with; which fields it has depends on its kind."""

    kind: str
    body_bytes: int = 0
    at: datetime | None = None
    poll_sequence: int | None = None
    outcome: Outcome | None = None
    calls: Sequence[Reading] = ()
    track_id: str | None = None
    path: str | None = None
    query: Mapping[str, str] = {}
    status: int | None = None
    headers: Mapping[str, str] = {}
    requested_at: datetime | None = None
    received_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A record read back."""

    head: Head
    body: bytes

    def candles(self) -> dict[InstrumentCode, Candle]:
        """Return what a `state` knew."""
        return {candle.instrument: candle for candle in msgspec.json.decode(self.body, type=list[Candle])}


class Capture:
    """Appends to a folder; where it cannot, publication stops (`required`) or goes on, and it is told."""

    def __init__(
        self,
        folder: Path,
        *,
        required: bool = False,
        on_error: Callable[[], None] = lambda: None,
        most_bytes: int = FILE_BYTES,
    ) -> None:
        self._folder, self._required, self._on_error, self._most_bytes = folder, required, on_error, most_bytes
        self._pending = BytesIO()
        self._file: int | None = None
        self._day: date | None = None
        self._failed = False
        self._log = get_logger(capture=str(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise ConfigurationError(f"--capture {folder}: cannot write there: {error.strerror}") from error

    def restored(self, state: State) -> None:
        """Keep what the next polls start from."""
        self._pending.write(_state(state.candles, state.poll_sequence))
        self._sync(anew=self._file is None)

    def response(self, received: Received) -> None:
        """Keep an answer of the exchange; it is durable with the poll it belongs to."""
        fields = {name: getattr(received, name) for name in received.__dataclass_fields__ if name != "body"}
        self._pending.write(_record(Head("response", **fields), received.body))

    def poll(self, poll_sequence: int, contexts: Sequence[Reading], known: Known) -> None:
        """Make the responses durable, and how they are read; `known` is what they are compared with."""
        self._pending.write(_record(Head("poll", poll_sequence=poll_sequence, calls=contexts)))
        full = self._file is None or os.fstat(self._file).st_size >= self._most_bytes
        anew = full or self._day != datetime.now(UTC).date()
        if anew:
            rest = self._pending.getvalue()
            self._pending = BytesIO()
            self._pending.write(_state(known, poll_sequence - 1) + rest)
        self._sync(anew=anew)

    def committed(self, poll_sequence: int, outcome: Outcome) -> None:
        """Note that the poll is published; durable with the next one."""
        self._pending.write(_record(Head("committed", poll_sequence=poll_sequence, outcome=outcome)))

    def close(self) -> None:
        """Write what is left."""
        self._required = False
        self._sync()
        self._shut()

    # --- files --------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._shut()
        now = datetime.now(UTC)
        number = 0
        while True:
            path = self._folder / f"capture-{now:%Y%m%dT%H%M%S}-{number}.gz"
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
                break
            except FileExistsError:
                number += 1
        self._day = now.date()
        self._append(_record(Head("start", at=now)))

    def _shut(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):
                os.close(file)

    def _sync(self, *, anew: bool = False) -> None:
        """Append what is pending as one gzip member: whatever happens to the next one, this one can be read.

        Where it cannot, it is dropped: the next file begins with a state of its own.
        """
        pending = self._pending.getvalue()
        self._pending = BytesIO()
        try:
            if anew:
                self._open()
            self._append(pending)
        except OSError as error:
            self._on_error()
            self._shut()
            if not self._failed:
                self._failed = True
                self._log.error("responses are not captured", error=error.strerror, required=self._required)
            if self._required:
                raise PublishError(f"responses cannot be captured in {self._folder}: {error.strerror}") from error

    def _append(self, pending: bytes) -> None:
        if self._file is None:
            raise OSError(None, "the last attempt failed")
        if pending:
            member = memoryview(gzip.compress(pending, 1))
            while member:
                member = member[os.write(self._file, member) :]
            os.fsync(self._file)
            if self._failed:
                self._failed = False
                self._log.info("capturing again")


def _record(head: Head, body: bytes = b"") -> bytes:
    head = msgspec.structs.replace(head, body_bytes=len(body))
    return msgspec.json.encode(head) + b"\n" + body + b"\n"


def _state(known: Known, poll_sequence: int) -> bytes:
    return _record(Head("state", poll_sequence=poll_sequence), msgspec.json.encode(list(known.values())))


def read(path: Path, oddities: Counter[str]) -> Iterator[Record]:
    """Yield the records of a file; a torn end, as a crash leaves it, is counted in `oddities` and ends it."""
    head_of = msgspec.json.Decoder(Head)
    try:
        with gzip.open(path) as file:
            while line := file.readline():
                head = head_of.decode(line)
                body = file.read(head.body_bytes)
                if len(body) < head.body_bytes or file.read(1) != b"\n":
                    raise EOFError
                yield Record(head, body)
    except EOFError:
        oddities[f"{path.name}: its end is torn off"] += 1
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zlib.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no capture, or a damaged one: {error}") from error
