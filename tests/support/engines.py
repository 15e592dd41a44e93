"""Engines over the toy runner."""

from __future__ import annotations

from collections.abc import Sequence

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import EngineCore
from pagelab.scheduling.sequence import Request, TokenEvent
from pagelab.types import SamplingParams
from tests.support.toy_runner import ToyRunner


def toy_engine(
    num_blocks: int = 16,
    block_size: int = 4,
    *,
    allocator: str = "paged",
    placement: str = "buddy",
    prefix_caching: bool = True,
    watermark: float = 0.0,
    max_model_len: int = 32,
    budget: int = 16,
    max_num_seqs: int = 256,
    ahead: int = 1,
    eos: tuple[int, ...] = (),
) -> tuple[EngineCore, ToyRunner]:
    """An engine whose invariants are checked after every step, and its runner."""
    runner = ToyRunner(num_blocks, block_size)
    memory = MemoryConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        allocator=allocator,
        placement=placement,
        prefix_caching=prefix_caching,
        watermark=watermark,
        max_model_len=max_model_len,
        check_invariants=True,
    )
    scheduling = SchedulerConfig(
        max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_steps_in_flight=ahead
    )
    core = EngineCore(runner, memory, scheduling, vocab_size=runner.vocab_size, eos_token_ids=eos)
    return core, runner


def greedy(max_tokens: int | None, *, stop_token_ids: Sequence[int] = ()) -> SamplingParams:
    """Exactly so many tokens, the most probable ones."""
    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, stop_token_ids=stop_token_ids
    )


def run(core: EngineCore, limit: int = 10_000) -> list[TokenEvent]:
    """Step until nothing is left."""
    events: list[TokenEvent] = []
    for _ in range(limit):
        if not core.has_unfinished_requests:
            return events
        events += core.step()
    raise AssertionError(f"not finished after {limit} steps")


def outputs(request: Request) -> list[list[int]]:
    """The generated tokens of each of its sequences."""
    return [list(sequence.output_token_ids) for sequence in request.sequences]
