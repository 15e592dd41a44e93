"""Requests enter a few at a time, so that a thousand at once do not stop the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

A_TURN = 8
"""Requests that may begin in one turn of the event loop: parsing one takes about a millisecond."""


class Turnstile:
    """Lets requests in, in their order, `A_TURN` in each turn of the event loop.

    Between two turns the loop does everything else: tokens of running requests go out, and health
    checks wait for one turn instead of for all who came before them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            loop = asyncio.get_running_loop()
            turn = loop.create_future()
            self._waiting.append(turn)
            if not self._turning:
                self._turning = True
                loop.call_soon(self._let_in, loop)
            await turn
        await self._app(scope, receive, send)

    def _let_in(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(A_TURN, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():  # its client may have gone
                turn.set_result(None)
        self._turning = bool(self._waiting)
        if self._turning:
            loop.call_soon(self._let_in, loop)
