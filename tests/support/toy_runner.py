"""A model without tensors whose memory is real: slots hold token ids.

A step writes its tokens into their slots, then reads each sampled sequence's whole context back
through its block table and derives the next token from it. So a block that is shared wrongly,
reused too early, copied late or found under a wrong hash gives a wrong token.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.types import SampledToken, SequenceId

EMPTY = 1 << 40


def next_token(context: Sequence[int], seed: int, vocab_size: int) -> int:
    """The toy model: any change of the context or the seed changes the token."""
    return zlib.crc32(array("q", [seed, *context]).tobytes()) % vocab_size


def generate(prompt: Sequence[int], count: int, seed: int, vocab_size: int) -> list[int]:
    """What the toy model must answer, without any paging."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, vocab_size))
    return tokens[len(prompt) :]


class ToyRunner:
    """Runs batches in order, at the moment they are collected (so it may lag behind)."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 97) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.slots = [EMPTY] * (num_blocks * block_size)
        self.batches: list[Batch] = []
        self.fail_steps: set[int] = set()
        self.fail_sequences: set[SequenceId] = set()
        self._last: dict[SequenceId, int] = {}

    def submit(self, batch: Batch) -> Batch:
        self.batches.append(batch)
        return batch

    def collect(self, handle: Batch) -> StepResult:
        if handle.step in self.fail_steps:
            raise RuntimeError("toy failure")
        size = self.block_size
        for source, target in handle.copies:
            self.slots[target * size : (target + 1) * size] = self.slots[
                source * size : (source + 1) * size
            ]
        for part in handle.sequences:
            tokens = list(part.token_ids)
            if len(tokens) < part.num_tokens:  # the one that the step before sampled
                tokens.append(self._last[part.sequence_id])
            assert len(tokens) == part.num_tokens
            for position, token in zip(range(part.start, part.end), tokens, strict=True):
                self.slots[self._slot(part.block_ids, position)] = token
        sampled: dict[SequenceId, SampledToken] = {}
        errors: dict[SequenceId, str] = {}
        for part in handle.sequences:
            if part.sequence_id in self.fail_sequences:
                errors[part.sequence_id] = "toy error"
            elif part.samples:
                context = [self.slots[self._slot(part.block_ids, p)] for p in range(part.end)]
                assert EMPTY not in context, f"{part.sequence_id} reads a slot nobody wrote"
                token = self.choose(part, context)
                sampled[part.sequence_id] = SampledToken(token)
                self._last[part.sequence_id] = token
        return StepResult(handle.step, sampled, errors)

    def choose(self, part: ScheduledSequence, context: Sequence[int]) -> int:
        """The token that a sequence samples after this context."""
        seed = 0 if part.params.greedy else part.position_seed[0]
        token = next_token(context, seed, self.vocab_size)
        while token in part.suppressed:
            token = (token + 1) % self.vocab_size
        return token

    def _slot(self, block_ids: Sequence[int], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + (
            position % self.block_size
        )
