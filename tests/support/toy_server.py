"""A real server on a loopback port, over a toy engine in a real process of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn

from pagelab.engine.async_llm import AsyncLLM
from pagelab.server.app import make_app
from pagelab.server.settings import ServerSettings
from pagelab.server.tracing import Tracing
from tests.support.toy_process import toy_llm

T = TypeVar("T")


class RunningServer:
    """A server in a thread; `llm` belongs to its event loop."""

    def __init__(
        self, llm: AsyncLLM, settings: ServerSettings, tracing: Tracing | None = None
    ) -> None:
        self.llm = llm
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = make_app(llm, settings, tracing=tracing)
        config = uvicorn.Config(
            self.app, log_level="error", lifespan="on", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Wait until requests are served."""
        self._thread.start()
        self.until(lambda: self.llm.state == "ready")

    def stop(self) -> None:
        """End the server and its engine."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.app.state.service.page_map.close)
        self._server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()

    def call(self, work: Awaitable[T]) -> T:
        """Run something in the server's event loop."""
        assert self._loop is not None

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=30)

    def until(self, condition: Any, limit_s: float = 20.0) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.01)

    def idle(self) -> bool:
        """Whether no slot is held."""
        stats = self.llm.stats
        assert stats is not None
        return stats.num_running == stats.num_waiting == stats.ledger.live == 0

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._listener])

        asyncio.run(main())


@contextmanager
def running(
    settings: ServerSettings | None = None, tracing: Tracing | None = None, **options: Any
) -> Iterator[RunningServer]:
    """A server over the toy engine; options are those of `toy_process.make`."""
    settings = settings or ServerSettings(show_text=True)
    llm = toy_llm(max_waiting=settings.limits.max_waiting, **options)
    with serving(llm, settings, tracing) as server:
        yield server


@contextmanager
def serving(
    llm: AsyncLLM, settings: ServerSettings, tracing: Tracing | None = None
) -> Iterator[RunningServer]:
    """A server over any engine."""
    server = RunningServer(llm, settings, tracing)
    server.start()
    try:
        yield server
    finally:
        server.stop()
