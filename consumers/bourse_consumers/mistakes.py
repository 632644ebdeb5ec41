"""Mistakes in what people write, in English and in Persian. Their texts are in mistakes.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

TEXTS: dict[str, Any] = tomllib.loads((files("bourse_consumers") / "mistakes.toml").read_text("utf-8"))
# What a corrected line has for a key if nothing better is known.
EXAMPLES: dict[str, str] = TEXTS["examples"]
WRITE = {"en": "write", "fa": "بنویسید"}


class Mistake(ValueError):
    """What is wrong in a text: the name of its explanation, its values, the characters, and what to write instead.

    Without `end` the characters up to the end of the text are meant. `whole` is the whole text without its mistakes,
    empty if nothing is known that could be written instead.
    """

    def __init__(
        self, text: str, at: int = 0, end: int | None = None, fix: str | None = None, whole: str | None = None,
        **values: Any,
    ) -> None:  # fmt: skip
        super().__init__(text)
        self.text, self.at, self.end, self.fix, self.whole, self.values = text, at, end, fix, whole, values


def explain(mistake: Mistake, language: str) -> str:
    """Return what is wrong. Instead of all that is known, it names the nearest."""
    kinds, texts = TEXTS["kinds"], TEXTS["mistakes"]
    shown = {
        key: kinds[each][language] if key != "name" and each in kinds else each for key, each in mistake.values.items()
    }
    whole = str(texts[mistake.text][language])
    if language == "fa" and "known" in shown:
        shown["known"] = shown["known"].replace(" or ", " یا ")
    if "known" in shown and mistake.fix is not None:
        whole = whole.partition("؛ " if language == "fa" else "; ")[0] + str(texts["meant"][language])
        shown = {"meant": mistake.fix, **shown}
    return whole.format(**shown)


def near(kind: str, text: str, good: Callable[[str], object]) -> str | None:
    """Return what was probably meant by a text of a kind; None if that is not right either."""
    for pattern, right in TEXTS["near"][kind]:
        text = re.sub(pattern, right, text)
    return text if good(text) else None
