"""The engine's process: `python -m pagelab.engine.worker FD`, started by `engine.process`.

::

    socket ──▶ reader thread ──▶ inbox ──▶ main thread: take messages, step, tell
    socket ◀── writer thread ◀── outbox ◀────────┘

The main thread never waits for the socket: what a step gave is put into the outbox, and pickled and
sent by the writer. When the socket closes, the front is gone and so is this process.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pagelab.engine.block_watch import BlockWatch, describe_block
from pagelab.engine.core import EngineCore
from pagelab.engine.messages import (
    HEADER,
    AddRequest,
    CancelRequest,
    DescribeBlock,
    EngineInfo,
    News,
    Shutdown,
    Start,
    StartFailed,
    StepStats,
    StopSequence,
    TokenNews,
    WatchBlocks,
    frame,
    unframe,
)
from pagelab.errors import PageLabError, RequestError
from pagelab.memory.ledger import take_ledger
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.scheduling.constraint import Constraint
from pagelab.scheduling.sequence import Request, TokenEvent
from pagelab.types import FinishReason, RequestMetrics, SamplingParams, TokenLogprobs

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_BROKEN = 3
EXIT_ORPHANED = 4

Constrain = Callable[[SamplingParams], Constraint | None]
"""Makes what `params.guided` asks for; called in another thread than the engine's."""

Loaded = tuple[EngineCore, EngineInfo, Constrain | None]
"""What a factory gives."""

LOOK_SHARE = 120
"""A look at the blocks waits for so many times as long as the last one took: under 1 % of the
time, whatever the pool and the pace of steps (7 ms with 256 sequences and steps of 1 ms)."""

MOST_FAILURES = 5
"""Failed steps in a row after which the process gives up, to be started anew."""


class EngineWorker:
    """The loop around the step loop.

    Args:
        core: the engine.
        tell: takes messages to the front; must not block.
        constrain: makes the constraint of a request with `guided`, in a thread of its own.
    """

    def __init__(
        self,
        core: EngineCore,
        tell: Callable[[object], None],
        constrain: Constrain | None = None,
    ) -> None:
        self.core = core
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tell = tell
        self._requests: dict[str, Request] = {}
        self._compiler = _Compiler(constrain, self.inbox)
        self._compiling: set[str] = set()
        self._lack_prompts: set[str] = set()  # requests whose prompt's logprobs are not told yet
        self._prompts: list[tuple[str, tuple[TokenLogprobs | None, ...]]] = []
        self._watch: BlockWatch | None = None
        self._watch_every = 0.0
        self._next_look = 0.0
        self._accepted: list[str] = []
        self._refused: list[tuple[str, str, str]] = []
        self._ended: list[tuple[str, RequestMetrics]] = []
        self._timed = _TimedRunner(core.runner)
        core.runner = self._timed
        self._step = self._total_tokens = self._num_tokens = self._recomputed = self._failures = 0
        self._step_s = self._steps_s = 0.0
        core.on_step = self._count

    def run(self) -> None:
        """Serve until `Shutdown`.

        Raises:
            RuntimeError: so many steps failed in a row that nothing is to be hoped for.
        """
        self._tell_news(())
        while self._take_messages():
            tokens: tuple[TokenNews, ...] = ()
            if self.core.has_unfinished_requests:
                tokens = self._make_step()
            if tokens or self._accepted or self._refused or self._ended:
                self._tell_news(tokens)
            self._look()

    def _take_messages(self) -> bool:
        """Handle what has come; wait for something where there is nothing else to do."""
        try:
            if not self.core.has_unfinished_requests:
                pending = self._watch is not None and self._watch.changed
                self._handle(self.inbox.get(timeout=self._watch_every if pending else None))
            while True:
                self._handle(self.inbox.get_nowait())
        except queue.Empty:
            return True
        except _EndError:
            return False

    def _handle(self, message: object) -> None:
        if isinstance(message, AddRequest):
            if message.params.guided is None:
                self._add(message, None)
            else:
                self._compiling.add(message.request_id)
                self._compiler.compile(message)
        elif isinstance(message, _Compiled):
            self._take_compiled(message)
        elif isinstance(message, CancelRequest):
            self._compiling.discard(message.request_id)
            self.core.cancel(message.request_id)
            self._note_end(message.request_id)
        elif isinstance(message, StopSequence):
            self._stop(message)
        elif isinstance(message, WatchBlocks):
            self._set_watch(message.every_s)
        elif isinstance(message, DescribeBlock):
            self._tell((message, describe_block(self.core, message.block_id)))
        else:
            assert isinstance(message, Shutdown), message
            raise _EndError

    def _take_compiled(self, compiled: _Compiled) -> None:
        request_id = compiled.message.request_id
        if request_id not in self._compiling:
            return  # cancelled meanwhile
        self._compiling.discard(request_id)
        if isinstance(compiled.found, PageLabError):
            kind = type(compiled.found).__name__
            if not isinstance(compiled.found, RequestError):
                kind = "RequestError"  # this engine cannot do it, and that is all it is
            self._refused.append((request_id, kind, str(compiled.found)))
        else:
            self._add(compiled.message, compiled.found)

    def _add(self, message: AddRequest, constraint: Constraint | None) -> None:
        try:
            self._requests[message.request_id] = self.core.add_request(
                message.prompt_token_ids,
                message.params,
                request_id=message.request_id,
                priority=message.priority,
                arrival_time=message.arrival_time,
                constraint=constraint,
            )
        except RequestError as error:
            self._refused.append((message.request_id, type(error).__name__, str(error)))
        else:
            self._accepted.append(message.request_id)
            if message.params.prompt_logprobs is not None:
                self._lack_prompts.add(message.request_id)

    def _stop(self, message: StopSequence) -> None:
        request = self._requests.get(message.request_id)
        if request is not None:
            self.core.stop(TokenEvent(request.sequences[message.sample], None, None))
            self._note_end(message.request_id)

    def _make_step(self) -> tuple[TokenNews, ...]:
        started = time.perf_counter()
        self._num_tokens = 0
        try:
            events = self.core.step()
        except Exception as error:  # not the runner's, which the core catches: a bug of ours
            logger.exception("the step loop failed")
            tokens = self._fail_abandoned(f"{type(error).__name__}: {error}")
            failed = True
        else:
            tokens = [self._token_news(event) for event in events]
            failed = bool(events) and all(e.finish_reason is FinishReason.ERROR for e in events)
        self._step_s = time.perf_counter() - started
        self._steps_s += self._step_s
        self._total_tokens += self._num_tokens
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= MOST_FAILURES:
            self._tell_news(tuple(tokens))
            raise RuntimeError(f"{self._failures} steps in a row failed")
        return tuple(tokens)

    def _token_news(self, event: TokenEvent) -> TokenNews:
        sequence, token, reason = event
        if reason is not None:
            self._note_end(sequence.request.id)
        token_id, logprobs = (None, None) if token is None else token
        request_id, sample = sequence.id
        if self._lack_prompts and request_id in self._lack_prompts:
            request = sequence.request
            self._lack_prompts.discard(request_id)
            if not request.lacks_prompt_logprobs:
                self._prompts.append((request_id, (None, *request.prompt_logprobs)))
        is_text = reason is None or sequence.stop_token_id is None
        return (request_id, sample, token_id, logprobs, reason, sequence.error, is_text)

    def _fail_abandoned(self, message: str) -> list[TokenNews]:
        """Requests that the core gave up in a step that raised: they end with an error."""
        tokens: list[TokenNews] = []
        for request in list(self._requests.values()):
            if any(s.finish_reason is FinishReason.CANCELLED for s in request.sequences):
                self.core.cancel(request.id, FinishReason.ERROR)
                tokens += [
                    (request.id, s.id.sample, None, None, FinishReason.ERROR, message, False)
                    for s in request.sequences
                    if s.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR)
                ]
                self._note_end(request.id)
        return tokens

    def _note_end(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.finished:
            del self._requests[request_id]
            self._lack_prompts.discard(request_id)
            self._recomputed += request.metrics.num_recomputed_tokens
            self._ended.append((request_id, request.metrics))

    def _count(self, record: Any) -> None:
        self._step, self._num_tokens = record.step, record.num_tokens

    def _stats(self) -> StepStats:
        scheduler, prefix = self.core.scheduler, self.core.kv.prefix_cache
        running = sum(r.metrics.num_recomputed_tokens for r in self._requests.values())
        return StepStats(
            self._step,
            time.perf_counter(),
            self._step_s,
            self._steps_s,
            self._timed.seconds,
            self._num_tokens,
            self._total_tokens,
            len(scheduler.running),
            len(scheduler.waiting),
            take_ledger(self.core.kv, scheduler.waiting_blocks),
            scheduler.num_preemptions,
            self._recomputed + running,
            prefix.num_queried_tokens if prefix is not None else 0,
            prefix.num_hit_tokens if prefix is not None else 0,
        )

    def _tell_news(self, tokens: tuple[TokenNews, ...]) -> None:
        self._tell(
            News(
                tuple(self._accepted),
                tuple(self._refused),
                tuple(self._prompts),
                tokens,
                tuple(self._ended),
                self._stats(),
            )
        )
        self._accepted.clear()
        self._refused.clear()
        self._prompts.clear()
        self._ended.clear()

    def _set_watch(self, every_s: float | None) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None if every_s is None else BlockWatch(self.core)
        self._watch_every, self._next_look = every_s or 0.0, 0.0

    def _look(self) -> None:
        now = time.perf_counter()
        if self._watch is None or now < self._next_look:
            return
        if self._watch.changed or self.core.has_unfinished_requests:
            self._tell(self._watch.look(self._stats()))
            cost = time.perf_counter() - now
            self._next_look = now + max(self._watch_every, LOOK_SHARE * cost)


class _Compiled(NamedTuple):
    """A guided request and its constraint, or why there is none."""

    message: AddRequest
    found: Constraint | PageLabError


class _Compiler:
    """Makes constraints beside the step loop: a large schema takes longer than a step."""

    def __init__(self, constrain: Constrain | None, inbox: queue.SimpleQueue[Any]) -> None:
        self._constrain = constrain
        self._inbox = inbox
        self._queue: queue.SimpleQueue[AddRequest] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def compile(self, message: AddRequest) -> None:
        """Have `_Compiled` put into the inbox in a while."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._queue.put(message)

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            self._inbox.put(_Compiled(message, self._found(message)))

    def _found(self, message: AddRequest) -> Constraint | PageLabError:
        try:
            found = None if self._constrain is None else self._constrain(message.params)
        except PageLabError as error:
            return error
        except Exception as error:  # of the grammar library, on a grammar that it did not expect
            logger.exception("a constraint could not be made")
            return RequestError(f"guided decoding failed: {error}")
        return found or RequestError("this engine has no guided decoding")


class _TimedRunner:
    """The runner, and how many seconds the host waited for it."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.seconds = 0.0

    def submit(self, batch: Batch) -> Any:
        started = time.perf_counter()
        try:
            return self._runner.submit(batch)
        finally:
            self.seconds += time.perf_counter() - started

    def collect(self, handle: Any) -> StepResult:
        started = time.perf_counter()
        try:
            return self._runner.collect(handle)  # type: ignore[no-any-return]
        finally:
            self.seconds += time.perf_counter() - started


class _EndError(Exception):
    """`Shutdown` has come."""


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
