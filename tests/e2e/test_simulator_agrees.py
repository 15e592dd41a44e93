"""The simulator against the real engine in lockstep: ledger and block tables, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pagelab.engine.core import Runner
from pagelab.engine.llm import LLM
from pagelab.engine.replay import RealClock, replay
from pagelab.memory.allocators import ALLOCATORS
from pagelab.scheduling.batch import Batch
from pagelab.sim.simulator import repeat
from pagelab.workloads import ShapeOptions, Workload, load_workload, random_ids
from tests.support.tiny_models import tiny_model


class Watched:
    """A runner that notes every batch's block tables."""

    def __init__(self, runner: Runner, seen: list[Any]) -> None:
        self._runner, self._seen = runner, seen

    def submit(self, batch: Batch) -> Any:
        self._seen.append(
            [(p.sequence_id, p.start, p.num_tokens, p.block_ids) for p in batch.sequences]
        )
        return self._runner.submit(batch)

    def collect(self, handle: Any) -> Any:
        return self._runner.collect(handle)


def agree(load: Callable[[int], Workload], **options: Any) -> int:
    """Run both; returns how many were preempted."""
    llm = LLM(device="cpu", dtype="float32", threads=1, watermark=0.0, **options)
    workload = load(llm.spec.vocab_size)
    real: list[Any] = []
    llm.core.runner = Watched(llm.core.runner, real)
    measured = replay(llm.core, workload, RealClock(), bytes_per_token=1)
    simulated: list[Any] = []
    again = repeat(
        workload,
        measured,
        llm.core.kv.config,
        llm.core.scheduler.config,
        vocab_size=llm.spec.vocab_size,
        on_runner=lambda runner: Watched(runner, simulated),
    )
    assert simulated == real
    for column, values in measured["steps"].items():
        assert again["steps"][column] == values, column  # type: ignore[literal-required]
    assert again["block_events"] == measured["block_events"]
    assert again["preemptions"] == measured["preemptions"]
    return len(measured["preemptions"])


def tight(vocab_size: int) -> Workload:
    """Arrivals within the run, and more tokens than the pool holds."""
    options = ShapeOptions(rate="poisson:400")
    return random_ids(load_workload("uniform:in=4..40,out=4..40,n=24", 1, options), vocab_size)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_allocator_decides_alike_on_a_tiny_model(allocator: str) -> None:
    folder = str(tiny_model("llama"))
    preempted = agree(
        tight,
        model=folder,
        allocator=allocator,
        block_size=4,
        max_model_len=96,
        kv_memory=200 * bytes_per_token(folder),
        max_num_batched_tokens=48,
    )
    assert preempted > 0 or allocator != "paged"


@pytest.mark.default_model
def test_the_default_model_decides_alike_under_pressure() -> None:
    def load(vocab_size: int) -> Workload:
        return random_ids(load_workload("uniform:in=8..60,out=6..24,n=10", 2), vocab_size)

    preempted = agree(load, block_size=8, max_model_len=128, kv_memory=160 * 46_080)
    assert preempted > 0


def bytes_per_token(folder: str) -> int:
    from pagelab.models.fetch import resolve
    from pagelab.models.registry import load_spec

    return load_spec(resolve(folder)).kv_layout("float32", 1).bytes_per_token
