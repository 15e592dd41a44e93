"""Runners without a model: time passes, tokens are made up or known."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from pagelab.engine.replay import VirtualClock
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.sim.cost_model import CostModel, features_of
from pagelab.types import SampledToken, SequenceId

_STRIDE = 7919  # between a sequence's tokens; a prime, so that they go through the vocabulary
_TOKEN = SampledToken(0)


class CostModelRunner:
    """An `engine.core.Runner` whose steps take as long as a cost model says.

    Sampled tokens depend on the sequence and the position, so that no prefix is found that a real
    model would not have; with `distinct=False` all are token 0, for when nothing is looked up.
    """

    def __init__(
        self, cost: CostModel, clock: VirtualClock, vocab_size: int, *, distinct: bool = True
    ) -> None:
        self.cost = cost
        self.clock = clock
        self.vocab_size = vocab_size
        self.distinct = distinct

    def submit(self, batch: Batch) -> Batch:
        """Take a step."""
        return batch

    def collect(self, handle: Batch) -> StepResult:
        """Let its time pass."""
        self.clock.advance(self.cost.seconds(features_of(handle)))
        sampled: dict[SequenceId, SampledToken] = {}
        for part in handle.sequences:
            if part[5]:  # samples
                sampled[part[0]] = self._token(part[0], part.end) if self.distinct else _TOKEN
        return StepResult(handle.step, sampled)

    def _token(self, sequence_id: SequenceId, position: int) -> SampledToken:
        first = zlib.crc32(f"{sequence_id.request_id}#{sequence_id.sample}".encode())
        return SampledToken((first + position * _STRIDE) % self.vocab_size)


class LockstepRunner:
    """An `engine.core.Runner` that repeats a recorded run: its steps' ends and its tokens."""

    def __init__(
        self,
        clock: VirtualClock,
        step_ends: Sequence[float],
        tokens: Mapping[str, Sequence[int]],
    ) -> None:
        """With the recorded ends of steps, and each request's output."""
        self.clock = clock
        self._ends = iter(step_ends)
        self._tokens = tokens

    def submit(self, batch: Batch) -> Batch:
        """Take a step."""
        return batch

    def collect(self, handle: Batch) -> StepResult:
        """Let it be the recorded time."""
        self.clock.wait_until(next(self._ends))
        return StepResult(
            handle.step,
            {
                part.sequence_id: SampledToken(
                    self._tokens[part.sequence_id.request_id][part.position_seed[1]]
                )
                for part in handle.sequences
                if part.samples
            },
        )
