"""The loop around the step loop, in the engine's process: messages in, steps, news out."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from typing import Any

from pagelab.engine.block_watch import BlockWatch, describe_block
from pagelab.engine.constraint_maker import Compiled, Constrain, ConstraintMaker
from pagelab.engine.core import EngineCore, StepRecord
from pagelab.engine.messages import (
    AddRequest,
    CancelRequest,
    DescribeBlock,
    News,
    Shutdown,
    StepStats,
    StopSequence,
    TokenNews,
    WatchBlocks,
)
from pagelab.engine.timed_runner import TimedRunner
from pagelab.errors import PageLabError, RequestError
from pagelab.memory.ledger import take_ledger
from pagelab.scheduling.constraint import Constraint
from pagelab.scheduling.sequence import Request, TokenEvent
from pagelab.types import FinishReason, RequestMetrics, TokenLogprobs

logger = logging.getLogger(__name__)

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
        self._compiler = ConstraintMaker(constrain, self.inbox)
        self._compiling: set[str] = set()
        self._lack_prompts: set[str] = set()  # requests whose prompt's logprobs are not told yet
        self._prompts: list[tuple[str, tuple[TokenLogprobs | None, ...]]] = []
        self._watch: BlockWatch | None = None
        self._watch_every = 0.0
        self._next_look = 0.0
        self._accepted: list[str] = []
        self._refused: list[tuple[str, str, str]] = []
        self._ended: list[tuple[str, RequestMetrics]] = []
        self._timed = TimedRunner(core.runner)
        core.runner = self._timed
        self._step = self._total_tokens = self._num_tokens = self._recomputed = 0
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
        elif isinstance(message, Compiled):
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

    def _take_compiled(self, compiled: Compiled) -> None:
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
        else:
            tokens = [self._token_news(event) for event in events]
        self._step_s = time.perf_counter() - started
        self._steps_s += self._step_s
        self._total_tokens += self._num_tokens
        if self._timed.num_failures >= MOST_FAILURES:
            self._tell_news(tuple(tokens))
            raise RuntimeError(f"{self._timed.num_failures} steps in a row failed")
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

    def _count(self, record: StepRecord) -> None:
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


class _EndError(Exception):
    """`Shutdown` has come."""
