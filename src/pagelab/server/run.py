"""Run a server until a signal: listen, load, serve, drain, exit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from pagelab.engine.async_llm import AsyncLLM
from pagelab.errors import ConfigError
from pagelab.server.app import make_app
from pagelab.server.garbage import collect_when_idle
from pagelab.server.otlp import otlp_tracing
from pagelab.server.settings import ServerSettings

_BACKLOG = 2048
_LAST_CONNECTIONS_S = 3  # after draining


class _Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second ends at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come. (Not kept: uvicorn would raise it again and spoil the exit code.)"""
        self._signals += 1
        if self._signals == 1:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self.should_exit = self.force_exit = True


def run_server(
    llm: AsyncLLM, settings: ServerSettings, *, say: Callable[[str], None] = print
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish for `drain_s` seconds.

    Raises:
        PageLabError: the model cannot be loaded, the address cannot be listened on, or traces
            are asked for without their extra.
    """
    tracing = None if settings.traces_url is None else otlp_tracing(settings.traces_url)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = make_app(llm, settings, on_failure=fail, tracing=tracing)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        backlog=_BACKLOG,
        lifespan="on",
        timeout_graceful_shutdown=_LAST_CONNECTIONS_S,
        server_header=False,
    )

    async def drain() -> None:
        say(f"draining: {llm.num_requests} requests run, for {settings.drain_s:g} s at most")
        await llm.close(settings.drain_s)
        app.state.service.page_map.close()
        server.should_exit = True

    tasks: list[asyncio.Task[None]] = []
    server = _Server(config, lambda: tasks.append(asyncio.create_task(drain())))

    async def main() -> None:
        beside = [
            asyncio.create_task(_announce(llm, url, settings, say)),
            asyncio.create_task(collect_when_idle(llm)),
        ]
        try:
            await server.serve(sockets=[listener])
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, *tasks, return_exceptions=True)

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:  # uvloop, if there
        runner.run(main())
    if failures:
        raise failures[0]


async def _announce(
    llm: AsyncLLM, url: str, settings: ServerSettings, say: Callable[[str], None]
) -> None:
    say(f"listening on {url}, loading the model")
    while llm.state == "loading":
        await asyncio.sleep(0.05)
    if llm.state == "ready":
        info = llm.info
        say(
            f"serving {settings.served_name or info.model} ({info.dtype} on {info.device}, "
            f"{info.num_blocks} blocks of {info.block_size} tokens) at {url}/v1"
            + (f"; the page map is at {url}/" if settings.page_map else "")
        )


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port} ({error}): "
            "take another --host or --port"
        ) from error
    return listener
