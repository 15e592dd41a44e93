"""A realistic `Results` of a whole grid without a model: the real scheduler and allocators, in
virtual time (`pagelab.sim`), under every combination of settings.

The records are what the engine would write down, so ledgers, block events, times and preemptions
agree with each other; only the cost of a step is made up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagelab import metrics
from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.lab.grid import Grid, expand
from pagelab.lab.methods import Variant
from pagelab.results import (
    SCHEMA,
    VERSION,
    ExperimentInfo,
    MemorySamples,
    MethodRun,
    Objectives,
    Results,
    RunSettings,
    WorkloadInfo,
    WorkloadRun,
)
from pagelab.sim.cost_model import CostModel
from pagelab.sim.simulator import simulate
from pagelab.workloads import Workload, WorkloadRequest
from tests.support.synthetic_results import KV_BYTES_PER_TOKEN, MIB, make_results

ALLOCATORS = (
    "contiguous-max",
    "contiguous-pow2",
    "contiguous-oracle",
    "reserved-paged",
    "paged",
)
OTHERS = ("hf-generate", "hf-static", "hf-continuous-batching", "vllm")
COST = CostModel(
    name="synthetic", constant=0.02, knots=(0.0,), slopes=(0.0011,), per_sequence=0.0009
)
OBJECTIVES: Objectives = {"ttft_s": 2.0, "tpot_s": 0.06, "e2e_s": None}
VOCAB = 512


@dataclass(frozen=True, slots=True)
class Sweep:
    """The size of a synthetic grid. The first value of each tuple is the base's."""

    kv_memories: tuple[int, ...] = (64 * MIB,)
    block_sizes: tuple[int, ...] = (16,)
    watermarks: tuple[float, ...] = (0.01,)
    placements: tuple[str, ...] = ("buddy",)
    methods: tuple[str, ...] = ("pagelab",)
    allocators: tuple[str, ...] = ALLOCATORS
    batch: int | None = None
    requests: int = 24
    prompt: tuple[int, int] = (8, 300)
    output: tuple[int, int] = (10, 90)
    max_model_len: int = 512
    repeats: int = 1
    simulated: bool = False
    rate: float | None = None  # requests a second; None: all at the start


GRID = Sweep(
    kv_memories=(64 * MIB, 32 * MIB, 128 * MIB),
    block_sizes=(16, 4, 64),
    watermarks=(0.01, 0.0, 0.1),
    placements=("buddy", "first-fit"),
    allocators=("contiguous-max", "contiguous-oracle", "paged"),
    batch=2,
)


def make_grid_results(sweep: Sweep = GRID) -> Results:
    """Every combination of a grid's values, on one workload."""
    workload = _workload(sweep)
    grid = Grid(sweep.kv_memories, sweep.block_sizes, sweep.watermarks, sweep.placements)
    held = sweep.batch or 0
    variants = expand(sweep.methods, sweep.allocators, grid, batch=sweep.batch, held=held)
    runs = [
        _run(sweep, variant, workload, repeat)
        for repeat in range(sweep.repeats)
        for variant in variants
    ]
    results = make_results()
    return {
        **results,
        "schema": SCHEMA,
        "version": VERSION,
        "experiment": _experiment(results["experiment"], sweep, workload),
        "runs": runs,
        "summary": metrics.summarize(runs, OBJECTIVES),
        "equality": [],
        "analysis": [],
    }


def make_all_methods_results() -> Results:
    """Five allocators and four methods of others, in one cell."""
    return make_grid_results(Sweep(methods=(*OTHERS, "pagelab"), rate=6.0, repeats=2))


def make_long_grid_results() -> Results:
    """Five allocators; more than 10,000 steps under the slowest of them."""
    long = Sweep(kv_memories=(24 * MIB,), requests=40, prompt=(10, 190), output=(250, 320))
    return make_grid_results(long)


def _workload(sweep: Sweep) -> Workload:
    rng = random.Random(7)
    requests: list[WorkloadRequest] = []
    now = 0.0
    for i in range(sweep.requests):
        low, high = sweep.prompt
        length = min(high, round(low * (high / low) ** rng.random()))
        ids = tuple(rng.randrange(VOCAB) for _ in range(length))
        output = rng.randint(*sweep.output)
        now += rng.expovariate(sweep.rate) if sweep.rate else 0.0
        asked = min(2 * output, sweep.max_model_len - length)
        requests.append(
            WorkloadRequest(
                id=f"chat-{i + 1}",
                prompt_tokens=length,
                max_tokens=output,
                prompt_token_ids=ids,
                arrival_s=round(now, 4),
                asked_tokens=asked if asked > output else None,
            )
        )
    title = f"{sweep.requests} conversations of a made-up trace"
    return Workload("chat", title, tuple(requests))


def _run(sweep: Sweep, variant: Variant, workload: Workload, repeat: int) -> MethodRun:
    cell = variant.cell
    assert cell is not None
    blocks = cell.kv_memory // (cell.block_size * KV_BYTES_PER_TOKEN)
    done = _served(sweep, variant, workload, repeat, blocks)
    settings: RunSettings = {
        "kv_memory_bytes": cell.kv_memory,
        "block_size": cell.block_size,
        "watermark": cell.watermark,
        "placement": cell.placement,
        "max_num_seqs": cell.max_num_seqs,
    }
    pages = variant.method in ("pagelab", "hf-continuous-batching", "vllm")
    slots = blocks * cell.block_size
    samples = _memory(done, 900 * MIB + slots * KV_BYTES_PER_TOKEN)
    return {
        "method": variant.method,
        "label": variant.label,
        "phase": variant.phase,
        "allocator": variant.allocator_name,
        "axis": variant.axis,
        "settings": settings,
        "simulated": sweep.simulated,
        "repeat": repeat,
        "status": "ok",
        "reason": None,
        "pid": 100 + repeat,
        "startup": {"import_s": 2.0, "load_s": 1.0, "warmup_s": 0.5},
        "kv": {
            "bytes": slots * KV_BYTES_PER_TOKEN,
            "slots": slots,
            "num_blocks": blocks if pages else None,
            "block_size": cell.block_size if pages else None,
            "note": f"{blocks} blocks of {cell.block_size} slots" if pages else "rows",
        },
        "snapshots": [],
        "memory": samples,
        "peak_rss_bytes": max(samples["rss_bytes"]),
        "peak_device_bytes": None,
        "workloads": [done],
    }


def _served(
    sweep: Sweep, variant: Variant, workload: Workload, repeat: int, blocks: int
) -> WorkloadRun:
    """Other methods are the same scheduler under the allocator that is most like them."""
    cell = variant.cell
    assert cell is not None
    stand_in = {"hf-generate": "contiguous-oracle", "hf-static": "contiguous-max"}
    rows = {"hf-generate": 1, "hf-static": 2}
    memory = MemoryConfig(
        num_blocks=blocks,
        block_size=cell.block_size,
        max_model_len=sweep.max_model_len,
        allocator=variant.allocator_name or stand_in.get(variant.method, "paged"),
        placement=cell.placement,
        watermark=cell.watermark,
    )
    most = cell.max_num_seqs or rows.get(variant.method, SchedulerConfig().max_num_seqs)
    slower = 1.0 + 0.3 * (variant.method != "pagelab") + 0.02 * repeat
    cost = replace(COST, constant=COST.constant * slower)
    run = simulate(
        workload, memory, SchedulerConfig(max_num_seqs=most), cost=cost, vocab_size=VOCAB
    )
    if variant.method != "pagelab":
        run["block_events"] = []
    return run


def _memory(run: WorkloadRun, peak: int) -> MemorySamples:
    times = [round(i * run["duration_s"] / 100, 3) for i in range(101)]
    return {
        "t": times,
        "rss_bytes": [min(peak, 400 * MIB + i * 40 * MIB) for i in range(101)],
        "device_bytes": None,
        "source": "psutil, children included",
    }


def _experiment(base: ExperimentInfo, sweep: Sweep, workload: Workload) -> ExperimentInfo:
    info: WorkloadInfo = {
        "name": workload.name,
        "title": workload.title,
        "requests": [
            {
                "id": request.id,
                "prompt": None,
                "prompt_tokens": len(request.token_ids),
                "max_tokens": request.max_tokens,
                "arrival_s": request.arrival_s,
                "asked_tokens": request.asked_tokens,
            }
            for request in workload.requests
        ],
        "rate": f"poisson:{sweep.rate:g}" if sweep.rate else None,
        "counts": {
            "read": sweep.requests + 6,
            "bad": 1,
            "dropped": 3,
            "clipped": 2,
            "first_bad": "line 4: no number",
        },
    }
    return {
        **base,
        "kv_memory_bytes": sweep.kv_memories[0],
        "block_size": sweep.block_sizes[0],
        "watermark": sweep.watermarks[0],
        "placement": sweep.placements[0],
        "kv_memories": _listed(sweep.kv_memories),
        "block_sizes": _listed(sweep.block_sizes),
        "watermarks": list(sweep.watermarks),
        "placements": list(sweep.placements),
        "batch": sweep.batch,
        "max_model_len": sweep.max_model_len,
        "repeats": sweep.repeats,
        "objectives": OBJECTIVES,
        "cost_model": "calibrated on this machine" if sweep.simulated else None,
        "workloads": [info],
    }


def _listed(values: Sequence[int]) -> list[int]:
    return list(values)
