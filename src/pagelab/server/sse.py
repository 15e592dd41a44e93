"""Answers that stop when their client goes away: server-sent events, and whole ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagelab.server.errors import of_exception

T = TypeVar("T")

_encode = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
).encode

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


def event(data: Any) -> bytes:
    """One event with JSON in it."""
    return b"data: " + _encode(data).encode(errors="replace") + b"\n\n"


class EventStream(Response):
    """Sends events as they come. At its end, and when the client goes away, `events` is closed and
    `close` is called (a generator that was never begun does nothing when it is closed).

    A slow reader makes only its own generator wait (uvicorn's flow control), and one that does not
    read at all is given up after `timeout_s` seconds.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        timeout_s: float | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._timeout_s = timeout_s
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _until_gone(self._pump(send), receive, self._timeout_s)
        except TimeoutError as error:
            last = event(of_exception(error).body())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # it may be the client that does not read
                    await send({"type": "http.response.body", "body": last})
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._events.aclose()


async def answer(
    request: Request, work: Coroutine[Any, Any, T], timeout_s: float | None = None
) -> T:
    """The result of `work`, which is cancelled when the client goes away meanwhile.

    Raises:
        ClientGoneError: it went away.
        TimeoutError: it took longer than `timeout_s` seconds.
    """
    done = await _until_gone(work, request.receive, timeout_s)
    if done is None:
        raise ClientGoneError
    return done[0]


async def _until_gone(
    work: Coroutine[Any, Any, T], receive: Receive, timeout_s: float | None
) -> tuple[T] | None:
    """Run `work`; None if the client went away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return (task.result(),)
        if not gone.done():
            raise TimeoutError
        return None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
