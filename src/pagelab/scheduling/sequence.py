"""Requests and the sequences they own: progress, and nothing about memory or tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from pagelab.memory.allocators import Demand
from pagelab.scheduling.batch import LogitsInputs
from pagelab.scheduling.constraint import Constraint
from pagelab.types import (
    FinishReason,
    RequestId,
    RequestMetrics,
    SampledToken,
    SamplingParams,
    SequenceId,
    TokenLogprobs,
)


class Status(Enum):
    """Where a sequence is.

    ::

        FORKING ──▶ WAITING ──▶ RUNNING ──▶ FINISHED
                       ▲           │
                       └ PREEMPTED ┘   (its steps in flight come back first)
    """

    FORKING = auto()  # a parallel sample that waits for its prompt to be computed once
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence: tokens, and how far their K/V is computed.

    ::

        tokens   | prompt ················| output ··········| pending ····|
                 0      num_computed   num_scheduled    num_tokens   num_expected
                             └ in flight ┘

    Pending tokens are sampled by steps in flight: they exist, their ids are not known yet.
    What a step may schedule is `num_expected - num_scheduled`; whether that is called prefill,
    decode or recompute makes no difference.

    What every step asks and never changes (limits, stop ids, seed) is worked out once.

    Where the next token depends on the one before by more than K/V (penalties, a constraint), the
    host has to know that one first: `max_expected` then keeps the sequence out of steps while
    one of its tokens is pending.
    """

    id: SequenceId
    request: Request
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_tokens: int  # prompt and output; it ends there in any case
    min_num_tokens: int  # prompt and output; no stop id counts before
    stop_ids: frozenset[int]  # tokens that end it
    seed: int
    leads: bool  # other samples wait until it has computed their prompt
    num_expected: int  # tokens, pending ones included
    max_expected: int  # no step is scheduled from here on: the end, or one token ahead of the host
    needs_host: bool  # the host has to know each token before the next one is sampled
    changes_logits: bool  # by penalties, a bias or a constraint
    asks_host: bool  # its steps may need `logits_inputs`
    constraint: Constraint | None  # its own
    status: Status = Status.WAITING
    num_computed: int = 0  # tokens whose K/V is there
    num_scheduled: int = 0  # the same, and those of steps in flight
    max_computed: int = 0  # the most that was ever computed: what a preemption makes us redo
    finish_reason: FinishReason | None = None
    error: str | None = None
    stop_token_id: int | None = None  # the token that ended it, which is no part of the text
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, sample: int, eos_token_ids: frozenset[int]) -> Sequence:
        """A new one: the request's sample of this index."""
        params, prompt = request.params, request.num_prompt_tokens
        eos = frozenset[int]() if params.ignore_eos else eos_token_ids
        most = prompt + request.final_output_tokens
        constraint = request.constraint
        needs_host = constraint is not None or params.penalizes
        changes_logits = needs_host or params.logit_bias is not None
        return cls(
            SequenceId(request.id, sample),
            request,
            list(request.prompt_token_ids),
            prompt,
            max_num_tokens=most,
            min_num_tokens=prompt + params.min_tokens,
            stop_ids=eos.union(params.stop_token_ids),
            seed=request.seed + sample,
            leads=sample == 0 and params.n > 1,
            num_expected=prompt,
            max_expected=min(most, prompt + 1) if needs_host else most,
            needs_host=needs_host,
            changes_logits=changes_logits,
            asks_host=changes_logits or params.prompt_logprobs is not None,
            constraint=None if constraint is None else constraint.copy(),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens whose ids are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """Generated tokens."""
        return tuple(self.token_ids[self.num_prompt_tokens :])

    @property
    def is_in_flight(self) -> bool:
        """Whether a step that is not collected works on it."""
        return self.num_scheduled > self.num_computed

    @property
    def num_schedulable(self) -> int:
        """Tokens that a step could compute now."""
        if self.num_expected >= self.max_expected:
            return 0  # everything that it may still yield, before the host knows more, is in flight
        return self.num_expected - self.num_scheduled

    @property
    def priority_key(self) -> tuple[int, int, int]:
        """Order of service: lower first; the last of the running ones is preempted first."""
        return (self.request.priority, self.request.arrival_index, self.id.sample)

    def logits_inputs(self, start: int, end: int, samples: bool) -> LogitsInputs | None:
        """What a step on the tokens from `start` to `end` needs beside them."""
        request = self.request
        targets: tuple[int, ...] = ()
        if request.lacks_prompt_logprobs:
            targets = request.prompt_token_ids[start + 1 : end + 1]
        if not (samples and self.changes_logits):
            return LogitsInputs(targets=targets) if targets else None
        allowed = None if self.constraint is None else self.constraint.allowed
        if not request.params.penalizes:
            return LogitsInputs(allowed=allowed, targets=targets)
        return LogitsInputs(request.prompt_token_ids, self.output_token_ids, allowed, targets)

    def demand(self, num_tokens: int, max_model_len: int) -> Demand:
        """What the allocator may know when it has to hold `num_tokens` tokens."""
        prompt, request = self.num_prompt_tokens, self.request
        return Demand(
            prompt,
            num_tokens,
            prompt + request.final_output_tokens,
            prompt + request.max_output_tokens,
            max_model_len,
        )

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id}, {self.status.name}, computed {self.num_computed} and scheduled "
            f"{self.num_scheduled} of {self.num_tokens} tokens, {self.num_expected} expected)"
        )


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, how to continue it, and the sequences that do so."""

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_output_tokens: int  # params.max_tokens, or what the model's length leaves
    final_output_tokens: int  # where it ends in any case: the above, or less in a replay
    seed: int  # params.seed, or one drawn for this request
    arrival_index: int
    metrics: RequestMetrics
    priority: int = 0
    constraint: Constraint | None = None  # in its first state; each sequence follows a copy
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt were asked for and are not all there yet.

        While that is so its sequences compute the whole prompt: what the prefix cache holds has
        no logits.
        """
        return (
            self.params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
        )

    @property
    def finished(self) -> bool:
        """Whether all its sequences have ended."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)


class TokenEvent(NamedTuple):
    """One sequence's news of a step: a token, an end, or both."""

    sequence: Sequence
    token: SampledToken | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class PreemptionRecord:
    """Who was preempted, when, and what it cost."""

    step: int
    sequence_id: SequenceId
    num_tokens: int  # computed tokens whose blocks it gave back; the cache may still find some
