"""Files from a Maven repository, pinned by sha256, downloaded once by jgo and cached."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bourse_schemas.errors import ConfigurationError

_ATTEMPTS = 3  # per file, if the connection fails


class KafkaUnavailable(ConfigurationError):
    """Apache Kafka, or Java, is not available here; the text gives the reason and what helps."""


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
    """Read a lock file: sha256, bytes and coordinate on each line; `#` begins a comment."""
    lines = (line.split() for line in lock.read_text("utf-8").splitlines() if not line.startswith("#"))
    return [Artifact(coordinate, sha256, int(size)) for sha256, size, coordinate in lines]


def fetch(artifacts: Sequence[Artifact], title: str) -> list[Path]:
    """Return the files' paths in the cache; download those that are missing.

    A file enters the cache whole and only with the right hash. Of several processes one downloads and the others wait.
    `BOURSE_MAVEN_REPOSITORY` is the base URL of a mirror. Raises KafkaUnavailable.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bourse-stream" / "maven"
    if any(not (cache / artifact.path).exists() for artifact in artifacts):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with (cache / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                _download([each for each in artifacts if not (cache / each.path).exists()], cache, title)
        except OSError as error:
            megabytes = sum(artifact.size for artifact in artifacts) // 1_000_000
            full = f"no disk space for {title}: {cache} needs {megabytes} MB"
            refused = f"cannot write {title} to {cache}: {error.strerror} (XDG_CACHE_HOME moves it)"
            raise KafkaUnavailable(full if error.errno == errno.ENOSPC else refused) from None
    return [cache / artifact.path for artifact in artifacts]


def _download(missing: Sequence[Artifact], cache: Path, title: str) -> None:
    import requests  # slow imports that only the first start needs
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext
    from rich.console import Console
    from rich.progress import track

    base = (os.environ.get("BOURSE_MAVEN_REPOSITORY") or MAVEN_CENTRAL_URL).rstrip("/")
    # Messages have its host only: the whole address of a mirror may hold a password.
    host = urlsplit(base).hostname
    hint = "connect to the network, or set BOURSE_MAVEN_REPOSITORY to a mirror of Maven Central"

    def download(artifact: Artifact) -> None:
        group, name, version, *rest = artifact.coordinate.split(":")
        wanted = context.project(group, name).at_version(version).artifact(*rest)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found = wanted.resolve()
                break
            except requests.RequestException as error:
                if attempt == _ATTEMPTS:
                    why = type(error).__name__
                    raise KafkaUnavailable(f"cannot download {wanted.filename} from {host} ({why}): {hint}") from None
                (Path(folder) / artifact.path).unlink(missing_ok=True)
            except RuntimeError:
                raise KafkaUnavailable(f"{host} does not serve {wanted.filename}: {hint}") from None
        if hashlib.sha256(found.read_bytes()).hexdigest() != artifact.sha256:
            raise KafkaUnavailable(f"{host} serves another {found.name} than the one pinned here: {hint}")
        (cache / artifact.path).parent.mkdir(parents=True, exist_ok=True)
        found.replace(cache / artifact.path)

    megabytes, console = sum(artifact.size for artifact in missing) // 1_000_000, Console(stderr=True)
    label = f"downloading {title}, {megabytes} MB"
    if missing and not console.is_terminal:
        console.print(label, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder, ThreadPoolExecutor(8) as pool:
        context = MavenContext(repo_cache=Path(folder), remote_repos={"maven": base}, timeout=30)
        jobs = [pool.submit(download, artifact) for artifact in missing]
        try:
            ended = track(as_completed(jobs), label, len(jobs), console=console, disable=not console.is_terminal)
            for job in ended:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
