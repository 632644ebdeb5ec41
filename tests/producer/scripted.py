"""An exchange that answers what a test says, and a clock that moves when a test says so."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

SECRET, NID = "s3cr3t-of/mine", "0123456789"
TOKEN = {"result": {"value": "tok3n-value", "lifeTime": 864_000_000, "refreshToken": "r3fresh-value"}, "status": "DONE"}
DONE = b'{"result":[],"state":"DONE"}'


Answer = tuple[int, bytes] | Callable[[], Response] | Callable[[], Awaitable[Response]]


class ManualClock:
    """Time that passes only while something waits, or when a test moves it."""

    def __init__(self, start: datetime = datetime(2026, 11, 28, 6, 30, tzinfo=UTC)) -> None:
        self._start, self.elapsed = start, 0.0

    def now(self) -> datetime:
        """Return the start, and what has passed since."""
        return self._start + timedelta(seconds=self.elapsed)

    def monotonic(self) -> float:
        """Return seconds since some moment long ago."""
        return 1000.0 + self.elapsed

    def wait(self, seconds: float) -> bool:
        """Let the time pass at once."""
        self.elapsed += max(0.0, seconds)
        return False


class Script:
    """Answers in the order given, the last one for ever; remembers the calls."""

    def __init__(self, *answers: Answer, tokens: Any = None) -> None:
        self.answers = list(answers)
        self.tokens: list[Answer] = list(tokens or [])
        self.grants: list[dict[str, Any]] = []
        self.calls: list[Request] = []
        self.app = Starlette(
            routes=[
                Route("/dev/v2/oauth2/token", self._token, methods=["POST"]),
                Route("/bourse/v2/clients/me/trades/realtime", self._realtime),
            ]
        )

    async def _token(self, request: Request) -> Response:
        self.grants.append(await request.json())
        return await _answered(self.tokens.pop(0) if self.tokens else (200, json.dumps(TOKEN).encode()))

    async def _realtime(self, request: Request) -> Response:
        self.calls.append(request)
        return await _answered(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    def track_ids(self) -> list[str]:
        """Return the trackId of each call."""
        return [call.query_params["trackId"] for call in self.calls]

    def grant_types(self) -> list[str]:
        """Return how each token was asked for."""
        return [grant["grant_type"] for grant in self.grants]


async def _answered(answer: Answer) -> Response:
    if not callable(answer):
        return Response(answer[1], answer[0])
    response = answer()
    return response if isinstance(response, Response) else await response
