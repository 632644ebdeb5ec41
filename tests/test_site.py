"""The site: built strictly, whole, and loading nothing from anywhere else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
ADDRESS = {"src", "srcset", "poster", "data", "action"}


class Reader(HTMLParser):
    """What a page loads, where it links to, and its text by paragraph."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.paragraphs: list[str] = []
        self._open = False
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect addresses: those of <a> are links, all others are loaded."""
        for name, value in attrs:
            if name == "href" or name in ADDRESS:
                (self.links if tag == "a" else self.loads).append(value or "")
        if tag == "p":
            self.paragraphs.append("")
        self._open = tag == "p" or (self._open and tag not in ("pre", "table", "div"))

    def handle_endtag(self, tag: str) -> None:
        """Close a paragraph."""
        self._open = self._open and tag != "p"

    def handle_data(self, data: str) -> None:
        """Take a paragraph's text."""
        if self._open:
            self.paragraphs[-1] += data


def build(root: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Run what `make docs` runs, into another folder."""
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(to)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of all that the site may show."""
    to = tmp_path_factory.mktemp("site") / "repository"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "target", "data", "node_modules", "__pycache__", "golden")
    shutil.copytree(ROOT, to, ignore=unwanted)
    return to


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site."""
    to = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, to)
    assert done.returncode == 0, done.stderr
    return to


def pages(site: Path) -> list[Path]:
    """Return all pages but the one for what is missing, which only a server shows."""
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


def test_target_builds_it_strictly() -> None:
    """`make docs` is the same command."""
    assert re.search(
        r"^docs:.*\n\t@\$\(BIN\)/properdocs build --strict$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )


def test_every_page_is_in_it_and_in_its_navigation(site: Path) -> None:
    """README, docs/ whatever is in it, and what they link to."""
    home = Reader(site / "index.html")
    wanted = {"index.html", "CHANGELOG.html", "CONTRIBUTING.html", "DECISIONS.html", "examples/index.html"}
    wanted |= {f"docs/{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    assert wanted <= {str(page.relative_to(site)) for page in pages(site)}
    assert {str(page.relative_to(site)) for page in pages(site)} <= {*home.links, "index.html"}


def test_nothing_comes_from_another_host(site: Path) -> None:
    """Not a style, script, font or picture: each is a file of the site."""
    seen = 0
    for page in pages(site):
        for address in Reader(page).loads:
            parts = urlsplit(address)
            assert not parts.scheme, (page, address)
            assert not parts.netloc, (page, address)
            assert (page.parent / unquote(parts.path)).resolve().is_file(), (page, address)
            seen += 1
        assert not re.search(r"(?:import\s*\(|fetch\()\s*['\"]https?:", page.read_text("utf-8"))
    assert seen > 5 * len(pages(site))
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", text), style


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    """Also from the disc, where no server turns a folder into its page."""
    for page in pages(site):
        for address in Reader(page).links:
            parts = urlsplit(address)
            if not parts.scheme and parts.path:
                assert (page.parent / unquote(parts.path)).resolve().is_file(), (page, address)


def test_pages_are_rendered_as_they_were_meant(site: Path) -> None:
    """Lists and tables are lists and tables, not text with dashes and bars; code is not cut."""
    for page in pages(site):
        for paragraph in Reader(page).paragraphs:
            assert not re.search(r"^(?:[-*] |\d+\. |\||```|#+ )", paragraph, re.MULTILINE), (page, paragraph)


def test_persian_text_runs_from_the_right(site: Path) -> None:
    """Each page has the style that lets a paragraph run as its first letter does; the letters are as written."""
    style = (site / "scripts" / "site.css").read_text("utf-8")
    assert re.search(r"\bp, li, th, td\b[^{]*\{ unicode-bidi: plaintext; text-align: start; \}", style)
    for page in pages(site):
        assert any(address.endswith("scripts/site.css") for address in Reader(page).loads), page
    assert "دسبحا" in (site / "docs" / "subscribe.html").read_text("utf-8")


@pytest.mark.parametrize(
    "link",
    ["nowhere.md", "../nowhere.md", "../examples/nowhere.sh", "operate.md#nowhere", "#nowhere", "/operate.md"],
)
def test_a_dead_link_is_an_error(copy: Path, tmp_path: Path, link: str) -> None:
    """A page, a file, an anchor, and an address that means another place on every host."""
    page = copy / "docs" / "broken.md"
    page.write_text(f"# Broken\n\n[text]({link})\n", "utf-8")
    try:
        done = build(copy, tmp_path)
    finally:
        page.unlink()
    assert done.returncode != 0
    assert "broken.md" in done.stderr
    assert link in done.stderr


def test_a_folder_without_readme_is_a_list(copy: Path, tmp_path: Path) -> None:
    """Every file of it can be opened."""
    page = copy / "docs" / "more.md"
    page.write_text("# More\n\n[schemas](../schemas/bourse_schemas/avro)\n", "utf-8")
    try:
        done = build(copy, tmp_path)
    finally:
        page.unlink()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "schemas" / "bourse_schemas" / "avro"
    names = {file.name for file in (ROOT / "schemas" / "bourse_schemas" / "avro").iterdir() if file.is_file()}
    assert names <= {file.name for file in folder.iterdir()}
    assert names <= set(Reader(folder / "index.html").links)
