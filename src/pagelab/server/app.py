"""The application: endpoints, access and errors around one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.responses import Response

from pagelab import __version__
from pagelab.engine.async_llm import AsyncLLM
from pagelab.server import chat, completions, errors, page, responses, status, tokens
from pagelab.server.access import Access
from pagelab.server.metrics import ServerMetrics
from pagelab.server.page_map import PageMap
from pagelab.server.service import Service
from pagelab.server.settings import ServerSettings
from pagelab.server.sse import ClientGoneError
from pagelab.server.tracing import Traced, Tracing
from pagelab.server.turnstile import Turnstile

_LAG_EVERY_S = 0.05


def make_app(
    llm: AsyncLLM,
    settings: ServerSettings,
    *,
    on_failure: Callable[[BaseException], None] | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """An ASGI application. The engine is started with it, and closed with it.

    While the model loads, requests are answered with 503. `on_failure` is told if it cannot be
    loaded. Spans of requests go to `tracing`, which is closed with the application.
    """
    metrics = ServerMetrics(llm)
    page_map = PageMap(llm, metrics)
    llm.observers += [metrics, page_map]
    service = Service(llm, settings, metrics, page_map)

    async def load() -> None:
        try:
            await llm.start()
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(load()), asyncio.create_task(_watch_loop(metrics))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await llm.close()
            if tracing is not None:
                await tracing.close()

    app = FastAPI(
        title="PageLab",
        version=__version__,
        description="An OpenAI-compatible server over a PagedAttention engine.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages fetch scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    app.add_exception_handler(ClientGoneError, _nobody_listens)
    for module in (completions, chat, responses, tokens, status):
        app.include_router(module.router)
    if settings.page_map:
        app.include_router(page.router)
    app.add_middleware(
        Access, api_keys=settings.api_keys, max_body_bytes=settings.limits.max_body_bytes
    )
    app.add_middleware(Turnstile)
    if tracing is not None:
        app.add_middleware(Traced, tracing=tracing)  # the outermost: waiting counts
    return app


async def _nobody_listens(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # never sent; nginx's number for it


async def _watch_loop(metrics: ServerMetrics) -> None:
    """Note how late the event loop is."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(_LAG_EVERY_S)
        metrics.loop_lag.observe(time.monotonic() - before - _LAG_EVERY_S)
