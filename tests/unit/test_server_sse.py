"""Streams end what they stand for, whenever their client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pagelab.server.sse import EventStream, event
from pagelab.server.turnstile import A_TURN, Turnstile


def run(stream: EventStream, receive: Any, send: Any) -> None:
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def there() -> dict[str, Any]:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits so long")


def test_a_client_that_is_gone_before_the_first_event_ends_the_request() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(60)
        yield b""

    async def send(_: Any) -> None: ...

    run(EventStream(events(), close=lambda: closed.append(True)), gone, send)
    assert closed == [True]


def test_a_client_that_cannot_be_sent_to_ends_the_request() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never"

    async def send(_: Any) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run(EventStream(events(), close=lambda: closed.append(True)), there, send)
    assert closed == [True]


def test_a_client_that_does_not_read_is_given_up() -> None:
    closed: list[bool] = []
    sent: list[Any] = []

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"x"

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.sleep(60)

    run(EventStream(events(), 0.1, lambda: closed.append(True)), there, send)
    assert closed == [True]


def test_events_are_one_line_of_json_whatever_is_in_them() -> None:
    data = event({"text": "a\n\nb \ud800"})
    assert data.startswith(b"data: {")
    assert data.count(b"\n") == 2


def test_requests_enter_a_few_a_turn_in_their_order() -> None:
    entered: list[int] = []
    sizes: list[int] = []

    async def app(scope: Any, _: Any, __: Any) -> None:
        entered.append(scope["number"])

    async def main() -> None:
        turnstile = Turnstile(app)

        async def nothing(*_: Any) -> Any: ...

        tasks = [
            asyncio.ensure_future(turnstile({"type": "http", "number": i}, nothing, nothing))
            for i in range(50)
        ]
        while not all(task.done() for task in tasks):
            before = len(entered)
            await asyncio.sleep(0)
            sizes.append(len(entered) - before)

    asyncio.run(main())
    assert entered == list(range(50))
    assert max(sizes) <= A_TURN
