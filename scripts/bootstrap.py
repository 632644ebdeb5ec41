"""Make a virtual environment and install from a lock, hashes checked: `bootstrap.py ENVIRONMENT LOCK [WHAT …]`.

Without WHAT all of the lock is installed; `--project` adds the checkout, editable. Other words are requirements: only
they and what they need are installed, as the lock pins it.

uv does the work: the one on PATH, else the one that the lock pins, brought by pip. Where packages come from is for
pip's or uv's own settings to say; pip's are handed on to uv.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main", "pinned_uv", "pip_settings_for_uv", "require_space"]

NEEDED_MB = 600  # an environment with everything in it has 0.5 GB
# What every start of `bourse` imports: where Python may not write bytecode, it would compile it each time.
COMPILE = """
import compileall, importlib.util, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
for name in ("click", "bourse_schemas", "bourse_cli", "bourse_producer", "bourse_consumers", "bourse_sandbox"):
    compileall.compile_dir(importlib.util.find_spec(name).submodule_search_locations[0], quiet=2)
"""
UV_FILES = ("~/.config/uv/uv.toml", "/etc/uv/uv.toml")


def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def require_space(folder: Path, needed_mb: int) -> None:
    """End where less than so many MB are free."""
    free_mb = shutil.disk_usage(folder).free // 2**20
    if free_mb < needed_mb:
        fail(
            f"no disk space: {free_mb} MB are free in {folder}, about {needed_mb} MB are needed; free some, then again"
        )


def run(command: list[str | Path], environ: Mapping[str, str] | None = None) -> None:
    """Run a step of the installation; where it fails, say what is likely to help, and end."""
    if subprocess.run(command, env=environ, check=False).returncode == 0:
        return
    for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        require_space(folder, 50)
    fail("the installation failed, see above; behind a mirror or proxy: `pip config set global.index-url ADDRESS`")


def works(python: Path) -> bool:
    """Tell whether the environment's Python runs: an upgrade of the system may have taken it away."""
    try:
        return subprocess.run([python, "-c", ""], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def pinned_uv(lock: str) -> str:
    """Return the lock's entry for uv, with its hashes."""
    entry = re.search(r"^uv==.*(\n .*)*", lock, re.MULTILINE)
    if entry is None:
        fail("the lock pins no uv; `make lock` writes it anew")
    return entry[0] + "\n"


def pip_settings_for_uv(listing: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that gives uv what `pip config list` printed; what is set for uv already stays."""
    found: dict[str, Any] = {}
    for section in ("global", "install", ":env:"):  # the later one wins, as in pip
        for name, value in re.findall(rf"^{section}\.([a-z-]+)=('.*'|\".*\")$", listing, re.MULTILINE):
            found[name] = str(ast.literal_eval(value)).split()
    links = [link for link in found.get("find-links", []) if "://" in link or Path(link).is_dir()]
    wanted = {
        "UV_DEFAULT_INDEX": found.get("index-url"),
        "UV_INDEX": found.get("extra-index-url"),
        # pip takes all indexes as one; hashes are checked, so no index can slip in another file.
        "UV_INDEX_STRATEGY": ["unsafe-best-match"] if "extra-index-url" in found else None,
        "UV_FIND_LINKS": [",".join(links)] if links else None,
        "UV_NO_INDEX": ["1"] if found.get("no-index") in (["true"], ["1"], ["yes"], ["on"]) else None,
        "UV_INSECURE_HOST": found.get("trusted-host"),
        "HTTPS_PROXY": found.get("proxy"),
        "SSL_CERT_FILE": found.get("cert"),
    }
    if "UV_INDEX_URL" in environ:
        del wanted["UV_DEFAULT_INDEX"]
    return {name: " ".join(value) for name, value in wanted.items() if value and name not in environ}


def uv_environ(pip: Path) -> dict[str, str]:
    """Return the environment for uv: pip's settings, where uv has none of its own."""
    environ = dict(os.environ)
    if any(Path(name).expanduser().is_file() for name in UV_FILES):
        return environ
    listed = subprocess.run([pip, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True)
    return environ | pip_settings_for_uv(listed.stdout if listed.returncode == 0 else "", environ)


def main(environment: Path, lock: Path, what: Sequence[str]) -> None:
    """Make the environment where there is none, and install."""
    python = environment / "bin" / "python"
    fresh = not works(python)
    if fresh:
        require_space(Path.cwd(), NEEDED_MB)
        sys.stderr.write(f"making {environment} from {lock}, this once\n")
        shutil.rmtree(environment, ignore_errors=True)
    uv = shutil.which("uv") or shutil.which("uv", path=f"{environment / 'bin'}:{Path(sys.executable).parent}")
    if uv and fresh:
        run([uv, "venv", "--quiet", "--python", sys.executable, environment])
    elif not uv:
        try:
            import ensurepip  # noqa: F401  # Debian ships it apart
            import venv
        except ImportError:
            fail(f"this Python has no venv module: `apt install python3.{sys.version_info.minor}-venv`, then again")
        venv.create(environment, with_pip=True, symlinks=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
            pinned.write(pinned_uv(lock.read_text("utf-8")))
            pinned.flush()
            run([python, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "-r", pinned.name])
        uv = str(environment / "bin" / "uv")
    environ = uv_environ(Path(sys.executable))
    install: list[str | Path] = [
        uv,
        "pip",
        "install",
        "--python",
        python,
        *([] if sys.stderr.isatty() else ["--quiet"]),
    ]
    if what in ([], ["--project"]):
        run([*install, "--require-hashes", "-r", lock], environ)
    else:
        run([*install, "--constraint", lock, "--build-constraint", lock, *what], environ)
    if "--project" in what:
        # The lock brings the build backend too: nothing is fetched that has no hash.
        run([*install, "--no-deps", "--no-build-isolation", "--editable", "."], environ)
    if what:
        run([python, "-c", COMPILE])


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except KeyboardInterrupt:
        fail("stopped; the next make goes on")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(f"no disk space left: {error}")
        fail(str(error))
