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
from pagelab.errors import PageLabError
from pagelab.memory.kv_manager import KVManager
from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.scheduling.constraint import Constraint
from pagelab.scheduling.sequence import (
    PreemptionRecord,
    Request,
    Sequence,
    Status,
    TokenEvent,
)
from pagelab.types import BlockId, FinishReason, RequestId, SampledToken, SequenceId, TokenLogprobs

KEPT_PREEMPTIONS = 10_000
"""Preemption records that a scheduler keeps; older ones are forgotten."""

_BY_PRIORITY = attrgetter("priority_key")

_new = tuple.__new__
"""Makes a NamedTuple of a tuple of its fields, in half the time of its own constructor (0.15 µs
against 0.29 for a `ScheduledSequence`): for the two that every sequence needs in every step."""


class Scheduler:
    """First come, first served within a priority; memory is given out by the KV manager.

    A step is made in two passes::

        running   oldest first: each gets tokens while the budget lasts. If the blocks for them
                  are not there, the latest running sequence is preempted: it gives its blocks
                  back and will be recomputed.
        waiting   in order, while budget, places and blocks last. The head of the queue is never
                  overtaken.

    The oldest sequence always gets its blocks in the end, so every request finishes.

    With steps in flight, blocks of an ended or preempted sequence come back only when the last of
    its steps is collected. Whoever lacks blocks waits for those, and nobody is preempted or
    admitted meanwhile; all others run on.

    `schedule` and `update` go through every running sequence at every step: 0.7 and 0.9 µs each
    (`benchmarks/core_cost.py`), while a GPU's step takes 0.15 ms for 4 of them and 0.6 ms for 64.
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
        self._in_flight: dict[int, list[Sequence]] = {}  # step not collected → its sequences
        self._released: dict[SequenceId, int] = {}
        self._preempted: list[PreemptionRecord] = []
        self._admitted: list[Sequence] = []
        self._leaving: set[Sequence] = set()  # ended or preempted, and still in flight
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
            sequence = Sequence.of(request, index, self.eos_token_ids)
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

    def take_admitted(self) -> tuple[Sequence, ...]:
        """Sequences admitted since the last call, those preempted before included."""
        admitted = tuple(self._admitted)
        self._admitted.clear()
        return admitted

    # One step

    def schedule(self) -> Batch | None:
        """Plan the next step; None when nothing can be scheduled."""
        parts: list[ScheduledSequence] = []
        members: list[Sequence] = []
        self._in_flight[self._step] = members  # filled below, so that `abandon` knows them
        budget = self.config.max_num_batched_tokens
        preemptions = self.num_preemptions
        writable = self.kv.writable_block_ids
        somebody_waits = False  # for blocks
        for sequence in self.running:  # preemption shortens it meanwhile, from its end
            count = sequence.num_schedulable
            if count > budget:
                count = budget
            if count > 0:
                end = sequence.num_scheduled + count
                block_ids = writable(sequence.id, end) or self._hold(sequence, end)
                if block_ids is None:
                    somebody_waits = True
                else:
                    members.append(sequence)
                    parts.append(self._scheduled(sequence, count, block_ids))
                    budget -= count
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            # who was just preempted may not take the blocks that it gave, nor anybody else those
            # that a running sequence waits for
            if somebody_waits or self.num_preemptions > preemptions:
                break
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=_BY_PRIORITY)
            count = min(sequence.num_schedulable, budget)
            members.append(sequence)
            parts.append(self._scheduled(sequence, count, self.kv.block_ids(sequence.id)))
            budget -= count
        if not parts:
            del self._in_flight[self._step]
            return None
        batch = Batch(self._step, tuple(parts), self.kv.take_copies())
        self._step += 1
        return batch

    def update(self, batch: Batch, result: StepResult) -> list[TokenEvent]:
        """Take a step's result in: tokens, ends, errors. Steps come back in order."""
        events: list[TokenEvent] = []
        sampled, errors, commit = result.sampled, result.errors, self.kv.commit
        finished, preempted = Status.FINISHED, Status.PREEMPTED  # 60 ns each time they are named
        for sequence, part in zip(self._in_flight[batch.step], batch.sequences, strict=True):
            sequence_id, start, num_tokens, _, _, samples, _, _, _, logits = part
            if sequence.status is finished:
                self._discard(sequence, part)
                continue
            if errors and sequence_id in errors:
                events.append(self._fail(sequence, part, errors[sequence_id]))
                continue
            end = start + num_tokens
            if start < sequence.max_computed:
                again = min(end, sequence.max_computed) - start
                sequence.request.metrics.num_recomputed_tokens += again
            if end > sequence.max_computed:
                sequence.max_computed = end
            sequence.num_computed = end
            commit(sequence_id, end, sequence.token_ids)
            if logits is not None and sequence_id in result.prompt_logprobs:
                _extend(sequence.request, start, result.prompt_logprobs[sequence_id])
            if samples:
                token = sampled[sequence_id]
                events.append(_new(TokenEvent, (sequence, token, self._append(sequence, token))))
            if sequence.status is preempted:
                self._release_when_idle(sequence)
            if sequence.leads:
                self._start_forks(sequence.request)
        del self._in_flight[batch.step]
        return events

    def fail(self, batch: Batch, error: str) -> list[TokenEvent]:
        """End every sequence of a step that failed; all others go on."""
        events = []
        for sequence, part in zip(self._in_flight[batch.step], batch.sequences, strict=True):
            if sequence.status is Status.FINISHED:
                self._discard(sequence, part)
            else:
                events.append(self._fail(sequence, part, error))
        del self._in_flight[batch.step]
        return events

    def abandon(self) -> list[Request]:
        """Forget all steps in flight and cancel their sequences (an interrupted step).

        Returns the requests that they belong to.
        """
        sequences = self._sequences_in_flight()
        self._in_flight.clear()
        self.kv.take_copies()
        for sequence in sequences:
            sequence.num_scheduled = sequence.num_computed
            self.finish(sequence, FinishReason.CANCELLED, "interrupted")
            self._release_when_idle(sequence)
        return [sequence.request for sequence in sequences]

    def is_in_flight(self, request_id: RequestId) -> bool:
        """Whether a step that is not collected works on this request (ended or not)."""
        return any(s.request.id == request_id for step in self._in_flight.values() for s in step)

    def check_invariants(self) -> None:
        """Assert that queues, sequences and memory agree."""
        self.kv.check_invariants()
        assert self.running == sorted(self.running, key=_BY_PRIORITY)
        assert self.waiting == sorted(self.waiting, key=_BY_PRIORITY)
        assert all(s.status is Status.RUNNING for s in self.running)
        assert all(s.status is Status.WAITING for s in self.waiting)
        assert len(self.running) <= self.config.max_num_seqs
        assert all(s.is_in_flight and s.status is not Status.RUNNING for s in self._leaving)
        holders = {sequence_id for sequence_id, _ in self.kv.tables()}
        in_flight = {s.id: s for s in self._sequences_in_flight()}
        assert holders == {s.id for s in self.running} | in_flight.keys()
        for sequence_id, table in self.kv.tables():
            sequence = in_flight.get(sequence_id)
            if sequence is not None and sequence.status is Status.RUNNING:
                assert sequence.num_computed == table.num_written
                assert sequence.num_scheduled <= len(table.block_ids) * self.kv.config.block_size

    # Its parts

    def _sequences_in_flight(self) -> list[Sequence]:
        """Sequences in any step that is not collected, each once."""
        return list(dict.fromkeys(s for step in self._in_flight.values() for s in step))

    def _hold(self, sequence: Sequence, end: int) -> tuple[BlockId, ...] | None:
        """The block table, with room up to position `end`; None if the sequence has to wait.

        Preempts later sequences where that is needed.
        """
        demand = sequence.demand(end, self.max_model_len)
        while not self.kv.hold(sequence.id, sequence.num_scheduled, demand):
            if self._leaving:
                return None  # those blocks come back with a step in flight: take nobody else's
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        return self.kv.block_ids(sequence.id)

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
        if sequence.is_in_flight:
            self._leaving.add(sequence)
            return
        self._leaving.discard(sequence)
        if self.kv.holds(sequence.id):
            self._released[sequence.id] = self.kv.release(sequence.id)
        if sequence.status is Status.PREEMPTED:
            sequence.num_computed = sequence.num_scheduled = 0
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
            lookup = () if sequence.request.lacks_prompt_logprobs else sequence.token_ids
            cached = self.kv.admit(sequence.id, demand, lookup)
            if cached is None:
                return False
            num_cached = cached
        self._admitted.append(sequence)
        sequence.num_computed = sequence.num_scheduled = num_cached
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

    def _scheduled(
        self, sequence: Sequence, count: int, block_ids: tuple[BlockId, ...]
    ) -> ScheduledSequence:
        start, num_tokens = sequence.num_scheduled, sequence.num_expected
        end = start + count
        samples = end == num_tokens
        suppressed: tuple[int, ...] = ()
        if samples:
            sequence.num_expected = num_tokens + 1
            if num_tokens < sequence.min_num_tokens:
                suppressed = (*self.eos_token_ids, *sequence.request.params.stop_token_ids)
        sequence.num_scheduled = end
        logits = None
        if sequence.asks_host:
            logits = sequence.logits_inputs(start, end, samples)
        return _new(
            ScheduledSequence,
            (
                sequence.id,
                start,
                count,
                tuple(sequence.token_ids[start:end]),
                block_ids,
                samples,
                (sequence.seed, num_tokens - sequence.num_prompt_tokens),
                sequence.request.params,
                suppressed,
                logits,
            ),
        )

    def _discard(self, sequence: Sequence, part: ScheduledSequence) -> None:
        """A step's part of a sequence that has ended meanwhile counts for nothing."""
        sequence.num_scheduled -= part.num_tokens
        sequence.num_expected -= part.samples
        self._release_when_idle(sequence)

    def _fail(self, sequence: Sequence, part: ScheduledSequence, error: str) -> TokenEvent:
        self.finish(sequence, FinishReason.ERROR, error)
        self._discard(sequence, part)
        return TokenEvent(sequence, None, FinishReason.ERROR)

    def _append(self, sequence: Sequence, token: SampledToken) -> FinishReason | None:
        """Take a sampled token in; end the sequence if that was its last."""
        token_id, logprobs = token
        sequence.token_ids.append(token_id)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        num_tokens = len(sequence.token_ids)
        if sequence.needs_host:
            sequence.max_expected = min(sequence.max_num_tokens, num_tokens + 1)
            if sequence.constraint is not None:
                return self._follow(sequence, token_id, sequence.constraint)
        if token_id in sequence.stop_ids and num_tokens >= sequence.min_num_tokens:
            reason = FinishReason.STOP
            sequence.stop_token_id = token_id
        elif num_tokens >= sequence.max_num_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        self.finish(sequence, reason)
        return reason

    def _follow(
        self, sequence: Sequence, token_id: int, constraint: Constraint
    ) -> FinishReason | None:
        """End a guided sequence where its constraint says so; a stop id counts where it may end."""
        reason: FinishReason | None = None
        error: str | None = None
        if token_id in sequence.stop_ids and constraint.complete:
            reason = FinishReason.STOP
            sequence.stop_token_id = token_id
        else:
            try:
                constraint.advance(token_id)
            except Exception as failure:  # whatever a grammar library raises: this sequence's alone
                reason = FinishReason.ERROR
                own = isinstance(failure, PageLabError)
                error = str(failure) if own else f"{type(failure).__name__}: {failure}"
            else:
                if constraint.ended:
                    reason = FinishReason.STOP
                elif sequence.num_tokens >= sequence.max_num_tokens:
                    reason = FinishReason.LENGTH
        if reason is not None:
            self.finish(sequence, reason, error)
        return reason

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


def _extend(request: Request, start: int, found: tuple[TokenLogprobs, ...]) -> None:
    """Take in the prompt's log probabilities from position `start` on; some may be known."""
    known = request.prompt_logprobs
    if start <= len(known):
        known.extend(found[len(known) - start :])
