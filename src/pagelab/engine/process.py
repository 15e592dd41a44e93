"""The front's end of an engine process: start it, talk to it, notice its death, end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from pagelab import errors
from pagelab.engine.messages import HEADER, EngineInfo, Shutdown, Start, StartFailed, frame, unframe
from pagelab.errors import EngineError

_LIMIT = 1 << 20  # bytes that are read ahead


class EngineProcess:
    """One engine process, from its start to its end. Make it with `start`."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
    ) -> None:
        self.info = info
        self._child = child
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, factory: str, options: Mapping[str, Any]) -> EngineProcess:
        """Start a process and wait until its model is loaded.

        It gets our environment and our import path, and a session of its own, so that Ctrl-C on a
        terminal reaches only us.

        Raises:
            PageLabError: the factory's own error.
            EngineError: the process died meanwhile.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "pagelab.engine.worker_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=_LIMIT)
            writer.write(frame(Start(factory, dict(options))))
            answer = await _read(reader)
        except BaseException:
            await _kill(child)
            raise
        if isinstance(answer, EngineInfo):
            return cls(child, reader, writer, answer)
        writer.close()
        code = await _kill(child)
        if isinstance(answer, StartFailed):
            kind = getattr(errors, answer.error, EngineError)
            raise kind(answer.message)
        raise EngineError(f"the engine's process ended while it loaded the model ({_ending(code)})")

    def send(self, message: object) -> None:
        """Say something; never blocks, and does nothing once the process is dead."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> Any:
        """What the engine says next; None once it is dead."""
        return await _read(self._reader)

    async def end(self, grace_s: float = 5.0) -> str:
        """Ask it to end, kill it after `grace_s` seconds; how it ended, in words."""
        self.send(Shutdown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._child.wait, grace_s + 1), grace_s)
        self._writer.close()
        return _ending(await _kill(self._child))


async def _read(reader: asyncio.StreamReader) -> Any:
    try:
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        return unframe(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def _kill(child: subprocess.Popen[bytes]) -> int:
    """End a process for certain and return its exit code."""
    for _ in range(20):  # its socket may have closed a moment before it is gone
        if (code := child.poll()) is not None:
            return code
        await asyncio.sleep(0.01)
    child.kill()
    return await asyncio.to_thread(child.wait)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
