"""The frame: what is shipped, what is locked, and how a checkout becomes an environment."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = [ROOT / folder for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
LOCKS = [
    ROOT / "requirements.lock",
    *(ROOT / folder / "requirements.lock" for folder in ("benchmarks", "tests/engines")),
]


def our_files() -> list[Path]:
    """Return the files that are, or are about to be, in the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what belongs to the repository is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [file for name in listed.split("\0") if name and (file := ROOT / name).is_file()]


def entries(lock: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Return a lock's packages: name, version, hashes."""
    for block in re.split(r"\n(?=\S)", lock.read_text("utf-8")):
        if not block.startswith("#"):
            name, version = block.split()[0].split("==")
            yield name, version, re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    """Return scripts/bootstrap.py as a module."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what is in the repository and in the wheel -----------------------------------------------------------------------


def test_no_file_names_a_package_registry() -> None:
    """Where packages come from is for the operator's settings to say."""
    hosts = ("pypi.", "pythonhosted.", "repo1.maven.", "repo.maven.", "registry.npmjs.", "deb.debian.", "golang.")
    pattern = re.compile("|".join(rf"{re.escape(host)}(?:org|com|io)\b" for host in hosts))
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in our_files()
        for match in pattern.finditer(file.read_bytes().decode("utf-8", "replace"))
    ]
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    """A module that is not empty begins with its docstring."""
    modules = [file for file in our_files() if file.suffix == ".py" and file.stat().st_size]
    assert modules
    assert [str(file) for file in modules if not ast.get_docstring(ast.parse(file.read_text("utf-8")))] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Build the wheel with the locked hatchling; return its root."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("bourse_stream-*.whl")
    return zipfile.Path(file)


def test_the_wheel_has_every_file_of_the_rooms(wheel: zipfile.Path) -> None:
    """Schemas, locks, data and typing markers are shipped, and nothing else lands in site-packages."""
    expected = {
        str(file.relative_to(package.parent))
        for package in PACKAGES
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    shipped = {name for name in wheel.root.namelist() if not name.startswith("bourse_stream-") and name[-1] != "/"}
    assert shipped == expected
    assert {name.rpartition("/")[2] for name in expected} >= {"TradeEvent.avsc", "day-2019-08-21.ndjson.gz", "py.typed"}


def test_the_wheel_has_the_license_the_notice_and_every_extra(wheel: zipfile.Path) -> None:
    """Whoever gets the wheel gets the terms, and the extras that the documentation names."""
    (info,) = (entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info"))
    assert {file.name for file in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    metadata = (info / "METADATA").read_text("utf-8")
    extras = re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)
    assert sorted(extras) == sorted(PROJECT["project"]["optional-dependencies"])


def test_help_names_every_command() -> None:
    """Every command that the distribution declares can be imported and has a line of help."""
    command = [sys.executable, "-c", "from bourse_cli.root import main; main()"]
    for group, arguments in {"bourse.commands": ["--help"], "bourse.consumers": ["consume", "--help"]}.items():
        shown = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout
        assert "(broken)" not in shown
        for name in PROJECT["project"]["entry-points"][group]:
            assert re.search(rf"^  {name}  +\S", shown, re.MULTILINE), f"{name} is not in {shown}"


# --- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.parent.name))
def test_a_lock_has_hashes_and_names_no_place(lock: Path) -> None:
    """Every package is pinned with its hashes; no index, no path, no command line."""
    text = lock.read_text("utf-8")
    assert [name for name, _, hashes in entries(lock) if not hashes] == []
    assert re.findall(r"^-.*|.*://.*|.*--(?:index|extra-index|find-links).*", text, re.MULTILINE) == []


def test_the_lock_is_what_the_project_asks_for() -> None:
    """Whoever changes a requirement has to write the lock anew: `make lock`."""
    pinned = {name: version for name, version, _ in entries(LOCKS[0])}
    wanted = [
        *PROJECT["build-system"]["requires"],
        *PROJECT["project"]["dependencies"],
        *(line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines),
        *PROJECT["dependency-groups"]["dev"],
    ]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != PROJECT["project"]["name"]:
            assert name in pinned, f"{requirement} is not in the lock"
            assert requirement.specifier.contains(pinned[name]), f"{requirement}, but the lock has {pinned[name]}"


# --- from a checkout to an environment --------------------------------------------------------------------------------


def test_ci_runs_the_command_of_the_readme() -> None:
    """What CI runs last is what the README tells a person to run."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    last = script.read_text("utf-8").splitlines()[-1]
    assert f"\n{last}\n```" in (ROOT / "README.md").read_text("utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with what `make` needs to begin."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "scripts/bootstrap.py"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return tmp_path


def make(folder: Path, *arguments: str, **environ: str) -> tuple[int, list[str]]:
    """Run make with an empty PATH, so that there is no uv; return its exit code and stderr without make's own lines."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    command = [shutil.which("make") or "make", "--no-print-directory", *arguments]
    environ = clean | {"PATH": str(folder)} | environ
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("make:")]


def test_make_alone_lists_the_targets() -> None:
    """`make` and `make help` are the same, and name every target that a person would call."""
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^make ([\w-]+)", done.stdout, re.MULTILINE)
    assert set(targets) >= {"demo", "test", "check", "bench", "help", "clean"}
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert declared
    assert sorted(declared[1].split()) == sorted(targets)


def test_an_old_python_is_one_line(checkout: Path) -> None:
    """An interpreter that is too old, or missing, is named, with the way to name another."""
    old = checkout / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    for python, seen in ((str(old), "Python 3.9.2"), ("python-nowhere", "missing")):
        expected = f"error: Python 3.11 or newer is needed, {python} is {seen}; name one: make PYTHON=python3.12"
        assert make(checkout, "test", f"PYTHON={python}") == (2, [expected])


def test_a_missing_venv_module_is_one_line(checkout: Path) -> None:
    """Debian ships the module apart: the package that brings it is named."""
    (checkout / "hidden").mkdir()
    (checkout / "hidden" / "ensurepip.py").write_text("raise ImportError\n")
    python = Path(sys.executable).resolve()  # the one that made our environment: no uv beside it
    code, lines = make(checkout, "test", f"PYTHON={python}", PYTHONPATH=str(checkout / "hidden"))
    package = f"python3.{sys.version_info.minor}-venv"
    expected = f"error: this Python has no venv module: `apt install {package}`, then again"
    assert (code, lines[-1]) == (2, expected)


def test_a_full_disk_is_one_line(bootstrap: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too little space is said before anything is downloaded."""
    with pytest.raises(SystemExit) as ended:
        bootstrap.require_space(tmp_path, 10**9)
    assert ended.value.code == 2
    assert re.fullmatch(r"error: no disk space: \d+ MB are free in .*\n", capsys.readouterr().err)


def test_an_installed_checkout_starts_at_once() -> None:
    """Nothing is done again while neither the lock nor the project file is newer than the environment."""
    stamp = ROOT / ".venv" / ".installed"
    newest = max((ROOT / name).stat().st_mtime for name in ("requirements.lock", "pyproject.toml"))
    if not stamp.exists() or stamp.stat().st_mtime < newest:
        pytest.skip("the environment was not made by make")
    assert subprocess.run(["make", "--question", ".venv/.installed"], cwd=ROOT, check=False).returncode == 0


def test_the_bootstrap_takes_uv_as_the_lock_pins_it(bootstrap: ModuleType) -> None:
    """The entry for uv comes whole: version and hashes."""
    entry = bootstrap.pinned_uv(LOCKS[0].read_text("utf-8"))
    ((version, hashes),) = ((version, hashes) for name, version, hashes in entries(LOCKS[0]) if name == "uv")
    assert entry.startswith(f"uv=={version} ")
    assert entry.count("--hash=") == len(hashes) > 0


def test_settings_of_pip_reach_uv(bootstrap: ModuleType, tmp_path: Path) -> None:
    """A mirror that pip knows is used by uv too; what is set for uv itself stays."""
    listing = (
        ":env:.find-links='/nowhere'\n"
        "global.cert='/etc/ca.pem'\n"
        "global.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'\n"
        f"install.find-links='{tmp_path} https://files.example/'\n"
        "install.trusted-host='mirror.example'\n"
    )
    expected = {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INSECURE_HOST": "mirror.example",
        "SSL_CERT_FILE": "/etc/ca.pem",
    }
    assert bootstrap.pip_settings_for_uv(listing, {}) == expected
    assert bootstrap.pip_settings_for_uv("global.index-url='https://m.example'\n", {"UV_INDEX_URL": "x"}) == {}
    links = bootstrap.pip_settings_for_uv(listing.replace(":env:.find-links='/nowhere'\n", ""), {})["UV_FIND_LINKS"]
    assert links == f"{tmp_path},https://files.example/"
