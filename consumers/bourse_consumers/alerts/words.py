"""The words that alerts and mistakes are made of, in English and in Persian; they are in words.toml."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

__all__ = ["WORDS", "WRITE", "explain"]

WORDS: dict[str, Any] = tomllib.loads((files("bourse_consumers.alerts") / "words.toml").read_text("utf-8"))
WRITE = {"en": "write", "fa": "بنویسید"}


def explain(text: str, language: str, fix: str | None = None, **values: Any) -> str:
    """Return the text of a mistake with its values. Instead of all that there is, it names the nearest, `fix`."""
    kinds, texts = WORDS["kinds"], WORDS["mistakes"]
    shown = {key: kinds[each][language] if each in kinds and key != "name" else each for key, each in values.items()}
    whole = str(texts[text][language])
    if "known" in values and fix is not None:
        meant = str(texts["meant"][language])
        return whole.partition("؛ " if language == "fa" else "; ")[0].format(**shown) + meant.format(name=fix)
    return whole.format(**shown)
