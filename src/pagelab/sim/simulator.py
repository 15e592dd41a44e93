"""The real scheduler and allocators under a virtual clock.

::

    Workload ──▶ simulate ──▶ WorkloadRun      as the engine's own record, every step
    shapes   ──▶ simulate_stream (stream.py)   any number of requests, means and percentiles
    WorkloadRun of the engine ──▶ repeat       the same steps, to compare decision by decision
"""

from __future__ import annotations

from collections.abc import Callable

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import EngineCore, Runner
from pagelab.engine.replay import VirtualClock, replay
from pagelab.errors import ConfigError
from pagelab.memory.allocators import Allocator
from pagelab.results import WorkloadRun
from pagelab.sim.cost_model import CostModel
from pagelab.sim.runner import CostModelRunner, LockstepRunner
from pagelab.workloads import Workload

DEFAULT_SCHEDULING = SchedulerConfig()

MAX_OUTPUT_TOKENS = 200_000
"""What `simulate` writes down at most; beyond that, `simulate_stream` gives means."""


def simulate(
    workload: Workload,
    memory: MemoryConfig,
    scheduling: SchedulerConfig = DEFAULT_SCHEDULING,
    *,
    cost: CostModel,
    vocab_size: int,
    bytes_per_token: int = 1,
    seed: int = 0,
    allocator: Allocator | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> WorkloadRun:
    """Serve a workload in virtual time, and write it down as the engine would.

    Args:
        workload: requests with token ids.
        memory: the pool and its allocator.
        scheduling: as the engine's.
        cost: how long steps take.
        vocab_size: of the model; token ids are below it.
        bytes_per_token: of K/V.
        seed: of sampling, which changes nothing here but is written down.
        allocator: an instance, instead of `memory.allocator`'s name.
        on_progress: told (workload, output tokens so far, in all) after every step.

    Raises:
        ConfigError: the workload is too large to be written down.
    """
    if workload.output_tokens > MAX_OUTPUT_TOKENS:
        raise ConfigError(
            f"{workload.name} has {workload.output_tokens:,} output tokens, more than the "
            f"{MAX_OUTPUT_TOKENS:,} whose steps can be written down: lower --requests, or leave "
            "--out away"
        )
    clock = VirtualClock()
    runner = CostModelRunner(cost, clock, vocab_size)
    core = make_core(runner, clock, memory, scheduling, vocab_size, allocator)
    return replay(
        core,
        workload,
        clock,
        bytes_per_token=bytes_per_token,
        seed=seed,
        on_progress=on_progress,
    )


def repeat(
    workload: Workload,
    run: WorkloadRun,
    memory: MemoryConfig,
    scheduling: SchedulerConfig = DEFAULT_SCHEDULING,
    *,
    vocab_size: int,
    on_runner: Callable[[LockstepRunner], Runner] | None = None,
) -> WorkloadRun:
    """Run the scheduler and the allocator once more over the steps of an engine's record.

    Every step ends when the recorded one did and gives the recorded tokens, so every decision
    must come out the same: the ledger, the block tables, who is preempted.

    Args:
        workload: what the engine served.
        run: its record.
        memory: as the engine had it.
        scheduling: likewise.
        vocab_size: of the model.
        on_runner: wraps the runner, to watch batches.
    """
    clock = VirtualClock()
    tokens = {request["id"]: request["output_token_ids"] for request in run["requests"]}
    lockstep = LockstepRunner(clock, run["steps"]["t"], tokens)
    runner = lockstep if on_runner is None else on_runner(lockstep)
    core = make_core(runner, clock, memory, scheduling, vocab_size, None)
    return replay(core, workload, clock, bytes_per_token=1)


def make_core(
    runner: Runner,
    clock: VirtualClock,
    memory: MemoryConfig,
    scheduling: SchedulerConfig,
    vocab_size: int,
    allocator: Allocator | None,
) -> EngineCore:
    """An engine core in virtual time."""
    return EngineCore(
        runner, memory, scheduling, vocab_size=vocab_size, allocator=allocator, clock=clock
    )
