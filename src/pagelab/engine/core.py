"""The step loop: schedule, submit, collect. Knows no tensors, no text and no clock but its own."""

from __future__ import annotations

import itertools
import logging
import operator
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.errors import RequestError, RequestTooLongError
from pagelab.memory.allocators import Allocator, Demand
from pagelab.memory.kv_manager import KVManager
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.scheduling.constraint import Constraint
from pagelab.scheduling.scheduler import Scheduler
from pagelab.scheduling.sequence import PreemptionRecord, Request, TokenEvent
from pagelab.types import FinishReason, RequestId, RequestMetrics, SamplingParams, SequenceId

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Does the work of steps: a model on a device, or a cost model in a simulator.

    Steps are submitted and collected in order; a runner may be a step or more behind.
    """

    def submit(self, batch: Batch) -> Any:
        """Start a step and return a handle for it at once, if the device can run ahead."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a step's result."""
        ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, for those who watch."""

    step: int
    time: float  # of the engine's clock, at the step's end
    num_tokens: int
    num_running: int
    num_waiting: int
    waiting_blocks: int | None
    events: tuple[TokenEvent, ...]
    released: Mapping[SequenceId, int]  # blocks given back in it → slots written by then
    preempted: tuple[PreemptionRecord, ...] = ()


class EngineCore:
    """Requests in, tokens out, one step at a time.

    ::

        add_request ──▶ Scheduler ──▶ Batch ──▶ Runner.submit ──▶ in flight ─┐
                            ▲                                                │
                            └──────── tokens, ends ◀── Runner.collect ◀──────┘

    A step that raises ends the requests that were in it and nothing else.
    """

    def __init__(
        self,
        runner: Runner,
        memory: MemoryConfig,
        scheduling: SchedulerConfig,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        allocator: Allocator | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner = runner
        self.kv = KVManager(memory, allocator)
        known = tuple(token for token in eos_token_ids if token < vocab_size)
        self.scheduler = Scheduler(scheduling, self.kv, known)
        self.vocab_size = vocab_size
        self.clock = clock
        self.on_step: Callable[[StepRecord], None] | None = None
        self._check = memory.check_invariants
        self._requests: dict[RequestId, Request] = {}
        self._in_flight: deque[tuple[Batch, Any]] = deque()
        self._arrivals = itertools.count()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        return tuple(sorted(self.scheduler.eos_token_ids))

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` still has something to do."""
        return self.scheduler.has_work or bool(self._in_flight)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        output_tokens: int | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queue a request. Lower priorities are served first.

        `constraint` is what `params.guided` became (`engine.guided`); required where that is set.

        `output_tokens` is for replays: the request ends after so many tokens at the latest,
        although `max_tokens` allows more, and the allocators that need to know that may.

        Raises:
            RequestError: the prompt is empty or no list of token ids, or the id is in use.
            RequestTooLongError: it could never fit into the model's length or the pool.
        """
        prompt = self._checked_prompt(prompt_token_ids)
        self._check_tokens("stop token id", params.stop_token_ids)
        self._check_tokens("logit_bias: token id", params.logit_bias or ())
        if params.guided is not None and constraint is None:
            raise RequestError("guided decoding needs a grammar made by pagelab.engine.guided")
        max_output = self._checked_length(len(prompt), params, output_tokens)
        index = next(self._arrivals)
        identity = RequestId(request_id if request_id is not None else str(index))
        while request_id is None and self._in_use(identity):  # somebody chose a number
            identity = RequestId(f"{identity}'")
        if self._in_use(identity):
            raise RequestError(f"request id {identity!r} is in use")
        request = Request(
            id=identity,
            prompt_token_ids=prompt,
            params=params,
            max_output_tokens=max_output,
            final_output_tokens=self._checked_end(output_tokens, max_output),
            seed=params.seed if params.seed is not None else secrets.randbits(62),
            arrival_index=index,
            metrics=RequestMetrics(self.clock() if arrival_time is None else arrival_time),
            priority=priority,
            constraint=constraint,
        )
        self._requests[identity] = request
        self.scheduler.add(request)
        return request

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request's running and waiting sequences. Unknown or ended ones are ignored."""
        request = self._requests.get(RequestId(request_id))
        if request is not None:
            for sequence in request.sequences:
                self.scheduler.finish(sequence, reason)
            self._forget_if_finished(request)

    def stop(self, event: TokenEvent) -> None:
        """End one sequence by a condition that the core does not know (a stop string)."""
        self.scheduler.finish(event.sequence, FinishReason.STOP)
        event.sequence.finish_reason = FinishReason.STOP  # also where the length ended it just now
        self._forget_if_finished(event.sequence.request)

    def step(self) -> list[TokenEvent]:
        """Submit steps as far ahead as allowed, collect the oldest, return its news.

        Ctrl-C ends every request that was in a step, and leaves an engine that can go on.
        """
        try:
            return self._step()
        except BaseException:
            self._in_flight.clear()
            for request in self.scheduler.abandon():
                self._forget_if_finished(request)
            raise

    def _step(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while len(self._in_flight) < self.scheduler.config.max_steps_in_flight:
            batch = self.scheduler.schedule()
            if batch is None:
                break
            self._note_scheduled()
            try:
                self._in_flight.append((batch, self.runner.submit(batch)))
            except Exception as error:
                events += self._fail(batch, error)
        collected: Batch | None = None
        if self._in_flight:
            batch, handle = self._in_flight.popleft()
            collected = batch
            try:
                result = self.runner.collect(handle)
            except Exception as error:
                events += self._fail(batch, error)
            else:
                events += self.scheduler.update(batch, result)
        elif not events:
            assert not self.scheduler.has_work, "requests wait and none can ever be scheduled"
        self._after_step(collected, events)
        return events

    def _after_step(self, batch: Batch | None, events: list[TokenEvent]) -> None:
        now = self.clock()
        for sequence, token, finish_reason in events:
            request = sequence.request
            if token is not None:
                metrics = request.metrics
                if sequence.id.sample == 0:
                    metrics.token_times.append(now)
                if metrics.first_token_time is None:
                    metrics.first_token_time = now
            if finish_reason is not None:
                self._forget_if_finished(request)
        if self._check:
            self.scheduler.check_invariants()
        released = self.scheduler.take_released()
        preempted = self.scheduler.take_preempted()
        if self.on_step is not None:
            scheduler = self.scheduler
            self.on_step(
                StepRecord(
                    -1 if batch is None else batch.step,
                    now,
                    0 if batch is None else batch.num_tokens,
                    len(scheduler.running),
                    len(scheduler.waiting),
                    scheduler.waiting_blocks,
                    tuple(events),
                    released,
                    preempted,
                )
            )

    def _note_scheduled(self) -> None:
        now = self.clock()
        for sequence in self.scheduler.take_admitted():
            metrics = sequence.request.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now

    def _fail(self, batch: Batch, error: Exception) -> list[TokenEvent]:
        logger.error("step %d failed: %s: %s", batch.step, type(error).__name__, error)
        logger.debug("where it failed", exc_info=error)
        return self.scheduler.fail(batch, f"{type(error).__name__}: {error}")

    def _forget_if_finished(self, request: Request) -> None:
        if request.finished and request.metrics.finish_time is None:
            request.metrics.finish_time = self.clock()
            self._requests.pop(request.id, None)

    def _in_use(self, request_id: RequestId) -> bool:
        return request_id in self._requests or self.scheduler.is_in_flight(request_id)

    def _checked_prompt(self, prompt_token_ids: Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt_token_ids, bytes):
            raise RequestError("a prompt is a text or token ids, not bytes: decode it first")
        try:
            prompt = tuple(map(operator.index, prompt_token_ids))  # numpy's, too
        except TypeError as error:
            raise RequestError(
                f"a prompt is a text or a list of token ids, not {prompt_token_ids!r}"
            ) from error
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            token = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"{token!r} in the prompt is no token id of this model (0 to {self.vocab_size - 1})"
            )
        return prompt

    def _check_tokens(self, name: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            if token >= self.vocab_size:
                raise RequestError(
                    f"{name} {token} is no token of this model (0 to {self.vocab_size - 1})"
                )

    def _checked_end(self, output_tokens: int | None, max_output: int) -> int:
        if output_tokens is None:
            return max_output
        if not 1 <= output_tokens <= max_output:
            raise RequestError(f"output_tokens must be from 1 to {max_output}, not {output_tokens}")
        return output_tokens

    def _checked_length(
        self, num_prompt: int, params: SamplingParams, output_tokens: int | None
    ) -> int:
        """Tokens that a request may generate."""
        limit = self.scheduler.max_model_len
        if num_prompt >= limit:
            raise RequestTooLongError(
                f"the prompt has {num_prompt} tokens and leaves no room for an answer within "
                f"max_model_len = {limit}: shorten it or raise --max-model-len"
            )
        max_output = limit - num_prompt if params.max_tokens is None else params.max_tokens
        if num_prompt + max_output > limit:
            raise RequestTooLongError(
                f"{num_prompt} prompt tokens + max_tokens {max_output} are more than "
                f"max_model_len = {limit}: lower max_tokens or raise --max-model-len"
            )
        if params.min_tokens > max_output:
            raise RequestError(f"min_tokens {params.min_tokens} is more than {max_output} allowed")
        most = num_prompt + max_output
        final = most if output_tokens is None else num_prompt + output_tokens
        if not self.kv.fits_ever(Demand(num_prompt, final, final, most, limit)):
            slots = self.kv.config.num_blocks * self.kv.config.block_size
            raise RequestTooLongError(
                f"{num_prompt} prompt tokens + {max_output} output tokens do not fit into the KV "
                f"pool of {slots} slots even alone (allocator {self.kv.allocator.name}): raise "
                "--kv-memory or lower max_tokens"
            )
        return max_output
