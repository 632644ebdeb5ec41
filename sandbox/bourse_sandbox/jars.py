"""Files from a Maven repository, pinned by sha256, downloaded once and cached."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bourse_schemas.errors import ConfigurationError

__all__ = ["Artifact", "KafkaUnavailable", "fetch", "read_lock"]

_ATTEMPTS = 3  # a file: the network may hiccup in one of 46


class KafkaUnavailable(ConfigurationError):
    """Apache Kafka, or Java, cannot be had here; the text says why and what helps."""


@dataclass(frozen=True)
class Artifact:
    """One file of a Maven repository."""

    coordinate: str  # group:artifact:version, or group:artifact:version:classifier:extension
    sha256: str
    size: int  # bytes

    @property
    def path(self) -> str:
        """Its place in any Maven repository."""
        group, name, version, *rest = self.coordinate.split(":")
        classifier, extension = rest or ("", "jar")
        suffix = f"-{classifier}" if classifier else ""
        return f"{group.replace('.', '/')}/{name}/{version}/{name}-{version}{suffix}.{extension}"


def read_lock(lock: Path) -> list[Artifact]:
    """Read a lock file: a line each of sha256, bytes and coordinate; `#` begins a comment."""
    lines = (line.split() for line in lock.read_text().splitlines() if not line.startswith("#"))
    return [Artifact(coordinate, sha256, int(size)) for sha256, size, coordinate in lines]


def fetch(artifacts: Sequence[Artifact], title: str) -> list[Path]:
    """Return the files' paths in the cache, downloading what is not there yet.

    A file enters the cache whole and only with the right hash, so what is there is trusted. Of several processes one
    downloads and the others wait. `BOURSE_MAVEN_REPOSITORY` is the base URL of a mirror. Raises KafkaUnavailable.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bourse-stream" / "maven"
    files = [cache / artifact.path for artifact in artifacts]
    if all(file.exists() for file in files):
        return files
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = [(a, f) for a, f in zip(artifacts, files, strict=True) if not f.exists()]
            if missing:
                _download(missing, title)
    except OSError as error:
        megabytes = sum(artifact.size for artifact in artifacts) // 1_000_000
        if error.errno == errno.ENOSPC:
            raise KafkaUnavailable(f"no disk space for {title}: {cache} needs {megabytes} MB") from None
        raise KafkaUnavailable(f"cannot keep {title} in {cache}: {error.strerror} (XDG_CACHE_HOME moves it)") from None
    return files


def _download(missing: Sequence[tuple[Artifact, Path]], title: str) -> None:
    from jgo.constants import MAVEN_CENTRAL_URL  # slow to import, and only the first start needs it

    try:
        base = httpx.URL((os.environ.get("BOURSE_MAVEN_REPOSITORY") or MAVEN_CENTRAL_URL).rstrip("/"))
    except httpx.InvalidURL:
        raise KafkaUnavailable("BOURSE_MAVEN_REPOSITORY is not the address of a Maven repository") from None
    hint = "connect to the network, or name a mirror of Maven Central in BOURSE_MAVEN_REPOSITORY"
    total = sum(artifact.size for artifact, _ in missing)
    stop = threading.Event()  # set at the first failure and at Ctrl-C, so that the other downloads end too

    def download(artifact: Artifact, file: Path) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            seen = 0
            try:
                with client.stream("GET", f"{base}/{artifact.path}") as response, part_of(file).open("wb") as out:
                    response.raise_for_status()
                    digest = hashlib.sha256()
                    for chunk in response.iter_bytes():
                        if stop.is_set():
                            return
                        out.write(chunk)
                        digest.update(chunk)
                        seen += len(chunk)
                        advance(len(chunk))
                if digest.hexdigest() != artifact.sha256:
                    raise KafkaUnavailable(f"{base.host} serves another {file.name} than the one pinned here: {hint}")
                part_of(file).replace(file)
                return
            except httpx.HTTPError as error:
                advance(-seen)
                status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
                if attempt == _ATTEMPTS or 400 <= status < 500:
                    # Its host only: a mirror's whole address may hold a password.
                    why = f"status {status}" if status else str(error) or type(error).__name__
                    raise KafkaUnavailable(f"cannot download {file.name} from {base.host} ({why}): {hint}") from None
                stop.wait(attempt)
            finally:
                part_of(file).unlink(missing_ok=True)

    def part_of(file: Path) -> Path:
        return file.with_name(f".{file.name}.part")

    with (
        _progress(f"downloading {title} ({len(missing)} files)", total) as advance,
        httpx.Client(timeout=30, follow_redirects=True) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        try:
            for _, file in missing:
                file.parent.mkdir(parents=True, exist_ok=True)
            for job in as_completed([pool.submit(download, artifact, file) for artifact, file in missing]):
                job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal's standard error, one plain line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}, {total // 1_000_000} MB", highlight=False, soft_wrap=True)
        yield lambda _: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
