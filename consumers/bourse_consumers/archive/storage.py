"""The files of a folder or of an object store, by their paths in it. What is put into a folder is synced."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import obstore
import pyarrow as pa
from deltalake.exceptions import DeltaError
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from bourse_schemas.errors import BourseError, ConfigurationError, Unreachable

__all__ = ["Damaged", "Storage", "StoreError", "store_errors", "sync"]

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
NOISE = re.compile(r"\x1b\[[0-9;]*m|↳")
# The server did not answer, or had no time: it is worth waiting for.
AWAY = re.compile(r"HTTP error: |status code: 5\d\d")
SECRET = re.compile(r"(?i)(key|secret|token|signature|credential)(\w*[=: ]+)[^\s,;&]+")


class StoreError(BourseError):
    """The folder or the object store failed, for now; the message has no secret."""


class Damaged(StoreError):
    """A file was read, and its content is wrong."""


@contextmanager
def store_errors(kind: type[StoreError] = StoreError, what: str = "") -> Iterator[None]:
    """Raise the errors of delta-rs, obstore, Arrow and the file system as StoreError, or as this kind of it."""
    try:
        yield
    except (DeltaError, BaseError, OSError, pa.ArrowException) as error:
        text = " ".join(NOISE.sub("", str(error)).partition("Debug source")[0].split())
        code = re.search(r"<Code>(\w+)</Code>", str(error))
        message = SECRET.sub(r"\1\2…", f"{code[1]}: {text}" if code else text)
        raise (StoreError if isinstance(error, MemoryError) else kind)((what + message)[:300]) from error


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Storage:
    """A folder, or a place in an object store that the provider's usual environment variables give access to.

    Its methods raise StoreError.
    """

    def __init__(self, uri: str) -> None:
        scheme = uri.partition("://")[0] if "://" in uri else ""
        if (scheme and scheme not in SCHEMES) or re.match(r"\w{2,}:(?!//)", uri):
            raise ConfigurationError(f"--to {uri}: use a folder, s3://BUCKET/PREFIX, gs://… or az://…")
        self.uri = uri.rstrip("/")
        self.folder = None if scheme else Path(uri)
        self.options = None
        try:
            if self.folder is not None:
                self._store: Any = LocalStore(self.folder) if self.folder.is_dir() else None
            else:
                http: Any = {"timeout": "30s", "allow_http": "true"}
                retries = {"max_retries": 2, "retry_timeout": timedelta(seconds=30)}
                self._store = from_url(self.uri, client_options=http, retry_config=cast("Any", retries))
                self.options = {**http, "max_retries": "2", "retry_timeout": "30s"}
        except (BaseError, ValueError) as error:
            raise ConfigurationError(f"--to {uri}: {str(error).partition(chr(10))[0]}") from error

    def require(self) -> None:
        """Raise ConfigurationError if nothing can be written, or if a conditional put is not conditional.

        Raises Unreachable if the server does not answer.
        """
        path = f".bourse-probe-{uuid4().hex}"
        try:
            with store_errors():
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._store = LocalStore(self.folder)
                obstore.put(self._store, path, b"", mode="create")
                with suppress(AlreadyExistsError):
                    obstore.put(self._store, path, b"", mode="create")
                    raise ConfigurationError(
                        f"--to {self.uri}: the server ignores If-None-Match, so two archivers would overwrite each "
                        "other's commits: use a server that supports conditional writes, or a folder"
                    )
        except StoreError as error:
            if AWAY.search(str(error.__cause__)):
                raise Unreachable(f"--to {self.uri}: {error}") from error
            hint = "" if self.folder is not None else "; check the bucket's name and the variables in docs/archive.md"
            raise ConfigurationError(f"--to {self.uri}: cannot write there: {error}{hint}") from error
        finally:
            with suppress(BaseError, OSError, ValueError):
                obstore.delete(self._store, path)

    def put(self, path: str, content: bytes) -> None:
        """Write a new file."""
        with store_errors():
            obstore.put(self._store, path, content, mode="create")
            if self.folder is not None:
                sync(self.folder / path)
                sync((self.folder / path).parent)
                sync(self.folder)

    def get(self, path: str) -> memoryview:
        """Return a file's content. Raises Damaged if it is not there."""
        with store_errors():
            try:
                return memoryview(obstore.get(self._store, path).bytes())
            except FileNotFoundError as error:
                raise Damaged("file is missing") from error

    def folders(self) -> list[str]:
        """Return the names of the folders in it."""
        if self._store is None:
            return []
        with store_errors():
            found = obstore.list_with_delimiter(self._store)["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)
