"""The engine's process: `python -m pagelab.engine.worker_process FD`, started by `engine.process`.

::

    socket ──▶ reader thread ──▶ inbox ──▶ main thread: take messages, step, tell
    socket ◀── writer thread ◀── outbox ◀────────┘

The main thread never waits for the socket: what a step gave is put into the outbox, and pickled and
sent by the writer. When the socket closes, the front is gone and so is this process.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

from pagelab.engine.constraint_maker import Constrain
from pagelab.engine.core import EngineCore
from pagelab.engine.messages import HEADER, EngineInfo, Start, StartFailed, frame, unframe
from pagelab.engine.worker import EngineWorker
from pagelab.errors import PageLabError

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_BROKEN = 3
EXIT_ORPHANED = 4

Loaded = tuple[EngineCore, EngineInfo, Constrain | None]
"""What a factory gives."""


def load_llm(**options: Any) -> Loaded:
    """The default factory: an `LLM`'s engine. Options and errors are those of `LLM`."""
    from pagelab.engine.llm import LLM

    started = time.perf_counter()
    llm = LLM(options.pop("model", None), **options)
    config, scheduling = llm.core.kv.config, llm.core.scheduler.config
    budget = llm.memory_budget
    return (
        llm.core,
        EngineInfo(
            llm.source.name,
            os.getpid(),
            config.max_model_len,
            llm.spec.vocab_size,
            config.num_blocks,
            config.block_size,
            budget.block_bytes,
            scheduling.max_num_seqs,
            scheduling.max_num_batched_tokens,
            llm.core.kv.allocator.name,
            llm.core.kv.prefix_cache is not None,
            str(llm.device),
            str(llm.dtype).removeprefix("torch."),
            time.perf_counter() - started,
        ),
        llm.constraint,
    )


def main(fd: int) -> int:
    """Serve the socket with this descriptor. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle
    logging.basicConfig(level=logging.WARNING, format="engine: %(levelname)s %(message)s")
    channel = socket.socket(fileno=fd)
    stream = channel.makefile("rb")
    start = _read(stream)
    assert isinstance(start, Start)
    try:
        module, _, name = start.factory.partition(":")
        core, info, constrain = getattr(importlib.import_module(module), name)(**start.options)
    except PageLabError as error:
        channel.sendall(frame(StartFailed(type(error).__name__, str(error))))
        return EXIT_FAILED
    except Exception as error:
        logger.exception("the engine could not be made")
        channel.sendall(frame(StartFailed("EngineError", f"{type(error).__name__}: {error}")))
        return EXIT_FAILED
    gc.freeze()  # a collection between two steps need not go through libraries and weights
    outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    worker = EngineWorker(core, outbox.put, constrain)
    outbox.put(info)
    threads = (
        threading.Thread(target=_receive, args=(stream, worker.inbox), daemon=True),
        threading.Thread(target=_send, args=(channel, outbox), daemon=True),
    )
    for thread in threads:
        thread.start()
    try:
        worker.run()
    except RuntimeError as error:
        logger.critical("%s: the process ends, to be started anew", error)
        _finish(outbox, threads[1])
        return EXIT_BROKEN
    _finish(outbox, threads[1])
    return 0


def _finish(outbox: queue.SimpleQueue[object], writer: threading.Thread) -> None:
    outbox.put(None)
    writer.join(timeout=5)


def _read(stream: Any) -> Any:
    """The next message; None at the end."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    body = stream.read(length)
    return unframe(body) if len(body) == length else None


def _receive(stream: Any, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while (message := _read(stream)) is not None:
            inbox.put(message)
    except OSError:
        pass
    os._exit(EXIT_ORPHANED)  # nobody is there to serve, however long the step in the works takes


def _send(channel: socket.socket, outbox: queue.SimpleQueue[object]) -> None:
    while (message := outbox.get()) is not None:
        try:
            channel.sendall(frame(message))
        except OSError:
            return


if __name__ == "__main__":
    # _exit: native threads of a runner have no say in how long the end takes
    code = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
