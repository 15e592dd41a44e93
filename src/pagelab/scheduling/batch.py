"""What a step is asked to do, and what it gives back: plain, picklable data.

A batch can be rebuilt from the scheduler's state at any step; what a device keeps is a mirror.
There is no prefill and no decode here: a sequence brings any number of new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pagelab.types import BlockId, SampledToken, SamplingParams, SequenceId, TokenLogprobs


class LogitsInputs(NamedTuple):
    """What a step needs for sequences whose logits are changed or asked for. Few have one.

    Attributes:
        prompt_token_ids: the prompt, where a penalty looks at it or at the output.
        output_token_ids: all tokens that were sampled so far, likewise.
        allowed: bit `t % 8` of byte `t // 8` says whether token t may be sampled; None: all may.
        targets: the tokens after the first `len(targets)` of this step's tokens, whose log
            probabilities are asked for (`prompt_logprobs`).
    """

    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    allowed: bytes | None = None
    targets: tuple[int, ...] = ()


class ScheduledSequence(NamedTuple):
    """One sequence's part of a step. (A tuple: hundreds are made every step.)

    ::

        position   0 ········· start ············ start + num_tokens
                   |  in cache  |  this step's tokens  |
                                  └ token_ids ┘└ not known yet ┘

    `token_ids` holds the new tokens whose ids the host knows. Where it is shorter than
    `num_tokens` (by at most one, when the device runs ahead), the missing one is the token
    that the sequence's previous step samples.
    """

    sequence_id: SequenceId
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_ids: tuple[BlockId, ...]  # the whole block table, this step's new blocks included
    samples: bool  # whether a token is sampled after the last of these
    position_seed: tuple[int, int]  # (seed, index of the sampled token in the output)
    params: SamplingParams
    suppressed: tuple[int, ...] = ()  # ids that may not be sampled yet (min_tokens)
    logits: LogitsInputs | None = None  # None: nothing of that kind

    @property
    def end(self) -> int:
        """One past the last position of this step."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Copies of blocks come first, then every sequence's new tokens."""

    step: int
    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[BlockId, BlockId], ...] = ()  # (from, to), before anything is written

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(sequence.num_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave back: a sampled token for every sequence that asked for one.

    A sequence in `errors` gets no token; it alone fails, with that message. `prompt_logprobs` are
    those of the `targets` that its part of the step named.
    """

    step: int
    sampled: Mapping[SequenceId, SampledToken]
    errors: Mapping[SequenceId, str] = field(default_factory=dict)
    prompt_logprobs: Mapping[SequenceId, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
