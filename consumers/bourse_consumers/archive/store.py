"""Where an archive's files lie: a folder, or a bucket. A file appears whole and once, or not at all."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol
from uuid import uuid4

from bourse_schemas.errors import ConfigurationError

__all__ = ["Bucket", "Folder", "Store", "StoreError", "open_store"]

STAGING = ".incomplete"
SECONDS = 30


class StoreError(Exception):
    """The store failed, for now; the text says how, without a secret."""


class Store(Protocol):
    """Files by their paths, `trading_day=…/name.parquet`. Every method raises StoreError while the store fails."""

    def require(self) -> None:
        """Raise ConfigurationError where files cannot be written here."""

    def paths(self, prefix: str = "") -> list[str]:
        """Return the Parquet files under a folder of the store, sorted."""

    def create(self, path: str, write: Callable[[IO[bytes]], object]) -> bool:
        """Make a file of what `write` writes; return False, and change nothing, where there is one already."""

    def open(self, path: str) -> Any:
        """Return a file to read, a context manager."""

    def delete(self, path: str) -> None:
        """Delete a file; one that is gone is no error."""


class Folder:
    """A folder: files are staged, synced and linked into place."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def require(self) -> None:
        """See `Store`."""
        try:
            staging = self._root / STAGING
            staging.mkdir(parents=True, exist_ok=True)
            probe = staging / uuid4().hex
            probe.touch()
            probe.unlink()
            for left in staging.glob("*.part"):
                _sweep(left)
        except OSError as error:
            raise ConfigurationError(f"--to {self._root}: cannot write there: {error.strerror}") from error

    def paths(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        with self._failing():
            found = (self._root / prefix).glob("**/*.parquet")
            relative = (path.relative_to(self._root) for path in found)
            return sorted(path.as_posix() for path in relative if path.parts[0] != STAGING)

    def create(self, path: str, write: Callable[[IO[bytes]], object]) -> bool:
        """See `Store`."""
        final = self._root / path
        staged = self._root / STAGING / f"{uuid4().hex}.part"
        with self._failing():
            try:
                with staged.open("wb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # we live
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                if not final.parent.is_dir():
                    final.parent.mkdir(parents=True, exist_ok=True)
                    _sync(final.parent.parent)
                try:
                    os.link(staged, final)
                except FileExistsError:
                    return False
                _sync(final.parent)
                return True
            finally:
                staged.unlink(missing_ok=True)

    def open(self, path: str) -> Any:
        """See `Store`."""
        with self._failing():
            return (self._root / path).open("rb")

    def delete(self, path: str) -> None:
        """See `Store`."""
        with self._failing():
            (self._root / path).unlink(missing_ok=True)
            _sync((self._root / path).parent)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self._root}: {error.strerror or error}") from error


def _sweep(staged: Path) -> None:
    """Delete what a writer that was killed left behind; one that lives holds a lock."""
    with suppress(OSError), staged.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        staged.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Bucket:
    """A bucket of an S3 server, reached as the AWS_… environment variables say; files are put only if absent."""

    def __init__(self, url: str) -> None:
        from obstore.store import S3Store

        plain = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://")
        options: Any = {"timeout": f"{SECONDS} s", "allow_http": plain}
        self._url = url
        try:
            self._store = S3Store.from_url(
                url, client_options=options, retry_config={"max_retries": 2, "retry_timeout": _seconds(SECONDS)}
            )
        except Exception as error:  # the library has many
            raise ConfigurationError(f"--to {url}: {_first_line(error)}") from error

    def __str__(self) -> str:
        return self._url

    def require(self) -> None:
        """See `Store`."""
        path = f"{STAGING}/{uuid4().hex}"
        try:
            self.create(path, lambda file: file.write(b""))
            self.delete(path)
        except StoreError as error:
            raise ConfigurationError(
                f"--to {self._url}: cannot write there: {error}; see the bucket's name and AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL"
            ) from error

    def paths(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        with _failing():
            listed = (entry["path"] for entries in self._store.list(prefix or None) for entry in entries)
            return sorted(path for path in listed if path.endswith(".parquet"))

    def create(self, path: str, write: Callable[[IO[bytes]], object]) -> bool:
        """See `Store`."""
        from io import BytesIO

        from obstore.exceptions import AlreadyExistsError

        content = BytesIO()
        write(content)
        with _failing():
            try:
                self._store.put(path, content.getvalue(), mode="create")
            except AlreadyExistsError:
                return False
            return True

    def open(self, path: str) -> Any:
        """See `Store`."""
        from io import BytesIO

        with _failing():
            return BytesIO(memoryview(self._store.get(path).bytes()))

    def delete(self, path: str) -> None:
        """See `Store`."""
        with _failing(), suppress(FileNotFoundError):
            self._store.delete(path)


@contextmanager
def _failing() -> Iterator[None]:
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        yield
    except AlreadyExistsError:
        raise
    except (BaseError, OSError) as error:
        raise StoreError(_first_line(error)) from error


def _seconds(seconds: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=seconds)


def _first_line(error: Exception) -> str:
    """Return the server's code, where there is one, and what the library says first: the rest shows requests."""
    text = str(error).strip()
    code = re.search(r"<Code>(\w+)</Code>", text)
    words = re.sub(r"(?i)(key|secret|token|signature)[^ ]*", r"\1…", text.partition("\n")[0])
    return f"{code[1]}: {words}"[:300] if code else words[:300]


def open_store(to: str) -> Store:
    """Return the store of a folder's path or of s3://BUCKET/PREFIX; raise ConfigurationError."""
    if to.startswith("s3://"):
        if not PurePosixPath(to[5:]).parts:
            raise ConfigurationError(f"--to {to}: name a bucket, s3://BUCKET/PREFIX")
        return Bucket(to)
    if re.match(r"\w{2,}:", to):  # a letter alone is a drive
        raise ConfigurationError(f"--to {to}: give a folder or s3://BUCKET/PREFIX")
    return Folder(Path(to))
