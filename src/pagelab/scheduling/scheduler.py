"""Who runs in the next step, with how many tokens.

There is no prefill phase and no decode phase: every running sequence has tokens whose K/V is
not computed yet, and a step computes some of them within one token budget. Whole prompts,
chunks of prompts, single tokens and recompute after a preemption are the same thing.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping
from operator import attrgetter

from pagelab.config import SchedulerConfig
from pagelab.memory.kv_manager import KVManager
from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.scheduling.sequence import (
    PreemptionRecord,
    Request,
    Sequence,
    Status,
    TokenEvent,
)
from pagelab.types import FinishReason, RequestId, SampledToken, SequenceId

KEPT_PREEMPTIONS = 10_000
"""Preemption records that a scheduler keeps; older ones are forgotten."""

_BY_PRIORITY = attrgetter("priority_key")


class Scheduler:
    """First come, first served within a priority; memory is given out by the KV manager.

    A step is made in two passes::

        running   oldest first: each gets tokens while the budget lasts. If the blocks for them
                  are not there, the latest running sequence is preempted: it gives its blocks
                  back and will be recomputed.
        waiting   in order, while budget, places and blocks last. The head of the queue is never
                  overtaken.

    The oldest sequence always gets its blocks in the end, so every request finishes.
    """

    def __init__(
        self, config: SchedulerConfig, kv: KVManager, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.config = config
        self.kv = kv
        self.max_model_len = kv.config.max_model_len  # tokens that a sequence may reach
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: list[Sequence] = []  # by priority key
        self.waiting: list[Sequence] = []  # by priority key
        self.preemptions: deque[PreemptionRecord] = deque(maxlen=KEPT_PREEMPTIONS)
        self.num_preemptions = 0
        self._in_flight: dict[SequenceId, Sequence] = {}  # with a step that is not collected
        self._released: dict[SequenceId, int] = {}
        self._preempted: list[PreemptionRecord] = []
        self._step = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs, waits, or is in a step that is not collected."""
        return bool(self.running or self.waiting or self._in_flight)

    @property
    def waiting_blocks(self) -> int | None:
        """Blocks that the head of the queue needs for its admission; None if nobody waits."""
        if not self.waiting:
            return None
        head = self.waiting[0]
        return self.kv.blocks_to_admit(head.demand(head.num_tokens, self.max_model_len))

    # In and out

    def add(self, request: Request) -> None:
        """Put a request's sequences into the queue.

        Where blocks can be shared, the parallel samples wait until the first one has computed
        the prompt, and then fork from it.
        """
        for index in range(request.params.n):
            sequence = Sequence(
                SequenceId(request.id, index),
                request,
                list(request.prompt_token_ids),
                request.num_prompt_tokens,
            )
            request.sequences.append(sequence)
            if index > 0 and not self.kv.allocator.contiguous:
                sequence.status = Status.FORKING
            else:
                insort(self.waiting, sequence, key=_BY_PRIORITY)

    def finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence now. Its blocks are free once no step in flight uses them."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.error = error
        self._release_when_idle(sequence)
        if sequence.id.sample == 0:
            self._start_forks(sequence.request)

    def take_released(self) -> Mapping[SequenceId, int]:
        """Sequences whose blocks were released since the last call → slots written by then."""
        released, self._released = self._released, {}
        return released

    def take_preempted(self) -> tuple[PreemptionRecord, ...]:
        """Preemptions since the last call."""
        preempted = tuple(self._preempted)
        self._preempted.clear()
        return preempted

    # One step

    def schedule(self) -> Batch | None:
        """Plan the next step; None when nothing can be scheduled."""
        scheduled: list[ScheduledSequence] = []
        budget = self.config.max_num_batched_tokens
        preemptions = self.num_preemptions
        for sequence in list(self.running):
            count = sequence.num_schedulable
            if count > budget:
                count = budget
            if count > 0 and sequence.status is Status.RUNNING and self._hold(sequence, count):
                scheduled.append(self._scheduled(sequence, count))
                budget -= count
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            # who was just preempted may not take the blocks that it gave
            if self.num_preemptions > preemptions or not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=_BY_PRIORITY)
            count = min(sequence.num_schedulable, budget)
            scheduled.append(self._scheduled(sequence, count))
            budget -= count
        if not scheduled:
            return None
        batch = Batch(self._step, tuple(scheduled), self.kv.take_copies())
        self._step += 1
        return batch

    def update(self, batch: Batch, result: StepResult) -> list[TokenEvent]:
        """Take a step's result in: tokens, ends, errors. Steps come back in order."""
        events: list[TokenEvent] = []
        for part in batch.sequences:
            sequence = self._take_back(part)
            if sequence.status is Status.FINISHED:
                self._release_when_idle(sequence)
                continue
            error = result.errors.get(part.sequence_id) if result.errors else None
            if error is not None:
                self.finish(sequence, FinishReason.ERROR, error)
                events.append(TokenEvent(sequence, None, FinishReason.ERROR))
                continue
            end = part.end
            if part.start < sequence.max_computed:
                again = min(end, sequence.max_computed) - part.start
                sequence.request.metrics.num_recomputed_tokens += again
            sequence.num_computed = end
            if end > sequence.max_computed:
                sequence.max_computed = end
            self.kv.commit(sequence.id, end, sequence.token_ids)
            if part.samples:
                events.append(self._append(sequence, result.sampled[part.sequence_id]))
            if sequence.status is Status.PREEMPTED:
                self._release_when_idle(sequence)
            if len(sequence.request.sequences) > 1 and sequence.id.sample == 0:
                self._start_forks(sequence.request)
        return events

    def fail(self, batch: Batch, error: str) -> list[TokenEvent]:
        """End every sequence of a step that failed; all others go on."""
        events = []
        for part in batch.sequences:
            sequence = self._take_back(part)
            if sequence.status is Status.FINISHED:
                self._release_when_idle(sequence)
            else:
                self.finish(sequence, FinishReason.ERROR, error)
                events.append(TokenEvent(sequence, None, FinishReason.ERROR))
        return events

    def abandon(self) -> list[Request]:
        """Forget all steps in flight and cancel their sequences (an interrupted step).

        Returns the requests that they belong to.
        """
        sequences = list(self._in_flight.values())
        self._in_flight.clear()
        self.kv.take_copies()
        for sequence in sequences:
            sequence.num_in_flight = sequence.num_pending = 0
            self.finish(sequence, FinishReason.CANCELLED, "interrupted")
            self._release_when_idle(sequence)
        return [sequence.request for sequence in sequences]

    def is_in_flight(self, request_id: RequestId) -> bool:
        """Whether a step that is not collected works on this request (ended or not)."""
        return any(sequence_id.request_id == request_id for sequence_id in self._in_flight)

    def check_invariants(self) -> None:
        """Assert that queues, sequences and memory agree."""
        self.kv.check_invariants()
        assert self.running == sorted(self.running, key=_BY_PRIORITY)
        assert self.waiting == sorted(self.waiting, key=_BY_PRIORITY)
        assert all(s.status is Status.RUNNING for s in self.running)
        assert all(s.status is Status.WAITING for s in self.waiting)
        assert len(self.running) <= self.config.max_num_seqs
        holders = {sequence_id for sequence_id, _ in self.kv.tables()}
        assert holders == {s.id for s in self.running} | self._in_flight.keys()
        for sequence_id, table in self.kv.tables():
            sequence = self._in_flight.get(sequence_id)
            if sequence is not None and sequence.status is Status.RUNNING:
                assert sequence.num_computed == table.num_written
                assert sequence.start <= len(table.block_ids) * self.kv.config.block_size

    # Its parts

    def _hold(self, sequence: Sequence, count: int) -> bool:
        """Get the blocks for `count` more tokens, preempting later sequences where needed."""
        start = sequence.num_computed + sequence.num_in_flight
        demand = sequence.demand(start + count, self.max_model_len)
        while not self.kv.hold(sequence.id, start, demand):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence or victim.num_in_flight > 0:
                return False  # in flight: its blocks come with a later step
        return True

    def _preempt(self, sequence: Sequence) -> None:
        record = PreemptionRecord(self._step, sequence.id, sequence.num_computed)
        self.running.remove(sequence)
        sequence.status = Status.PREEMPTED
        self.num_preemptions += 1
        self._preempted.append(record)
        self.preemptions.append(record)
        sequence.request.metrics.num_preemptions += 1
        self._release_when_idle(sequence)

    def _release_when_idle(self, sequence: Sequence) -> None:
        """Blocks that a step in flight uses are not reused before it is collected."""
        if sequence.num_in_flight > 0:
            return
        if self.kv.holds(sequence.id):
            self._released[sequence.id] = self.kv.release(sequence.id)
        if sequence.status is Status.PREEMPTED:
            sequence.num_computed = 0
            sequence.status = Status.WAITING
            insort(self.waiting, sequence, key=_BY_PRIORITY)

    def _admit(self, sequence: Sequence) -> bool:
        demand = sequence.demand(sequence.num_tokens, self.max_model_len)
        shared = sequence.request.num_prompt_tokens - 1  # the last one is computed, to sample
        sibling = self._sibling_with_prompt(sequence, shared)
        if sibling is not None:
            if not self.kv.fork(sibling.id, sequence.id, shared, demand):
                return False
            num_cached = shared
        else:
            cached = self.kv.admit(sequence.id, demand, sequence.token_ids)
            if cached is None:
                return False
            num_cached = cached
        sequence.num_computed = num_cached
        if sequence.id.sample == 0 and sequence.max_computed == 0:
            sequence.request.metrics.num_cached_tokens = num_cached
        return True

    def _sibling_with_prompt(self, sequence: Sequence, shared: int) -> Sequence | None:
        """A running sample of the same request whose prompt is computed, to fork from.

        A preempted sample comes back in this way, too: only its output is computed again.
        """
        siblings = sequence.request.sequences
        if len(siblings) == 1 or shared == 0 or self.kv.allocator.contiguous:
            return None
        for other in siblings:
            if (
                other is not sequence
                and other.status is Status.RUNNING
                and other.num_computed > shared
            ):
                return other
        return None

    def _scheduled(self, sequence: Sequence, count: int) -> ScheduledSequence:
        request, start = sequence.request, sequence.start
        num_tokens = len(sequence.token_ids) + sequence.num_pending
        samples = start + count == num_tokens
        output_index = num_tokens - sequence.num_prompt_tokens
        suppressed: tuple[int, ...] = ()
        if samples and output_index < request.params.min_tokens:
            suppressed = (*self.eos_token_ids, *request.params.stop_token_ids)
        part = ScheduledSequence(  # by position: names would cost a tenth of a step
            sequence.id,
            start,
            count,
            tuple(sequence.token_ids[start : start + count]),
            self.kv.block_ids(sequence.id),
            samples,
            (request.seed + sequence.id.sample, output_index),
            request.params,
            suppressed,
        )
        sequence.num_in_flight += count
        sequence.num_pending += samples
        self._in_flight[sequence.id] = sequence
        return part

    def _take_back(self, part: ScheduledSequence) -> Sequence:
        sequence = self._in_flight[part.sequence_id]
        sequence.num_in_flight -= part.num_tokens
        sequence.num_pending -= part.samples
        if sequence.num_in_flight == 0:
            del self._in_flight[part.sequence_id]
        return sequence

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        sequence.token_ids.append(token.token_id)
        if token.logprobs is not None:
            sequence.logprobs.append(token.logprobs)
        reason = self._finish_reason(sequence, token.token_id)
        if reason is not None:
            self.finish(sequence, reason)
        return TokenEvent(sequence, token, reason)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        request = sequence.request
        params = request.params
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        if num_output >= params.min_tokens:
            if not params.ignore_eos and token_id in self.eos_token_ids:
                return FinishReason.STOP
            if token_id in params.stop_token_ids:
                return FinishReason.STOP
        if num_output >= request.final_output_tokens:
            return FinishReason.LENGTH
        return None

    def _start_forks(self, request: Request) -> None:
        """Let parallel samples in once their prompt is computed (or never will be)."""
        if len(request.sequences) == 1:
            return
        first = request.sequences[0]
        if first.num_computed < request.num_prompt_tokens and first.status is not Status.FINISHED:
            return
        for sequence in request.sequences[1:]:
            if sequence.status is Status.FORKING:
                sequence.status = Status.WAITING
                insort(self.waiting, sequence, key=_BY_PRIORITY)
