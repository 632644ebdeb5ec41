"""Secrets out of what others report: the exchange's words are logged, captured and published. Pure."""

from __future__ import annotations

import html
import json
from base64 import b64encode
from urllib.parse import quote

# Anything shorter would be found in ordinary words; real secrets are longer.
SHORTEST = 6
MOST_TOKENS = 8


class Concealer:
    """Replaces secrets, in every usual spelling, by `…`: those of the account, and the latest tokens."""

    def __init__(self, *account: str) -> None:
        self._account = [spelling for secret in account for spelling in _spellings(secret)]
        self._tokens: dict[str, list[str]] = {}

    def add(self, *tokens: object) -> None:
        """Conceal these tokens too, from now on; what is not a string is not a token."""
        self._tokens |= {token: _spellings(token) for token in tokens if isinstance(token, str)}
        for oldest in list(self._tokens)[:-MOST_TOKENS]:
            del self._tokens[oldest]

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        spellings = {*self._account, *(each for token in self._tokens.values() for each in token)}
        # The longest first: one may contain another.
        for spelling in sorted(spellings, key=len, reverse=True):
            text = text.replace(spelling, "…")
        return text

    def data(self, data: bytes) -> bytes:
        """Return bytes without secrets."""
        return self.text(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _spellings(secret: str) -> list[str]:
    if len(secret) < SHORTEST:
        return []
    in_json = [json.dumps(secret, ensure_ascii=escaped)[1:-1] for escaped in (True, False)]
    slashes = [each.replace("/", "\\/") for each in in_json]
    in_base64 = b64encode(secret.encode()).decode()
    return [secret, quote(secret, safe=""), html.escape(secret), *in_json, *slashes, in_base64, in_base64.rstrip("=")]
