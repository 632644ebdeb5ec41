"""What the site is made of: README and docs/, and from there on every file of the repository that a page links to.

Files keep their places, so links that lead on GitHub lead here. A folder that is linked is its README, or a list of
its files.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from properdocs.config.defaults import ProperDocsConfig
from properdocs.structure.files import File, Files
from properdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
HOME, STYLE = "README.md", "scripts/site.css"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, /, *, config: ProperDocsConfig) -> Files:
    """Return the site's files, and set the order of its pages."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:  # the others are the theme's
        files.remove(file)
    found = dict.fromkeys([HOME, *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")), STYLE])
    waiting = list(found)
    for path in waiting:  # it grows
        targets = [target for target in _targets(path) if target not in found]
        found.update(dict.fromkeys(targets))
        waiting += targets
    for path in found:
        if (ROOT / path).exists():
            files.append(File(path, str(ROOT), config.site_dir, use_directory_urls=False))
        else:
            files.append(File.generated(config, path, content=_listing(path)))
    pages = [path for path in found if path.endswith(".md")]
    linked = [path for path in _targets(HOME) if path in pages]
    manual = sorted((path for path in pages if path.startswith("docs/")), key=lambda path: _place(linked, path))
    beside = [path for path in pages if "/" not in path and path != HOME]
    others = [path for path in pages if "/" in path and path not in manual]
    config.nav = [{"Home": HOME}, {"Manual": manual}, {"Project": beside}, {"Examples": others}]
    return files


def on_page_markdown(markdown: str, /, *, page: Page, config: ProperDocsConfig, files: Files) -> str:
    """Let links to folders lead to their pages."""
    del config, files
    folder = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda link: f"{link[0]}/{HOME}" if (ROOT / folder / link[0]).is_dir() else link[0], markdown)


def _targets(path: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to; the build itself complains of what is not there."""
    if not path.endswith(".md"):
        return
    text = (ROOT / path).read_text("utf-8") if (ROOT / path).exists() else _listing(path)
    for target in LINK.findall(FENCE.sub("", text)):
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if (ROOT / linked).is_dir():
            yield posixpath.join(linked, HOME)
        elif (ROOT / linked).is_file():
            yield linked


def _listing(path: str) -> str:
    """Return the page of a folder that has no README."""
    folder = posixpath.dirname(path)
    names = sorted(file.name for file in (ROOT / folder).iterdir() if file.is_file())
    return "\n".join([f"# {folder}", "", *(f"- [{name}]({name})" for name in names)])


def _place(linked: list[str], path: str) -> tuple[int, str]:
    """Return where a page stands: in the order in which the home page names them, then by name."""
    return (linked.index(path) if path in linked else len(linked), path)
