"""The grid of `pagelab compare` in virtual time: the real scheduler and allocators, no model.

::

    ExperimentSettings ─┬─▶ simulate_cells   any number of requests: means and percentiles
                        └─▶ simulated_results   a few: results.json, as compare writes it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.lab.calibrate import calibration_path
from pagelab.lab.experiment import blank_results, conclude
from pagelab.lab.grid import Grid, expand
from pagelab.lab.methods import Cell, Variant
from pagelab.lab.preparation import prepare
from pagelab.lab.process import empty_run
from pagelab.lab.settings import ExperimentSettings, check_max_model_len, default_kv_memory
from pagelab.memory.allocators import make_allocator
from pagelab.memory.layout import whole_blocks
from pagelab.models.model_shape import ModelShape
from pagelab.results import Results
from pagelab.sim.cost_model import UNIT, CostModel
from pagelab.sim.prices import bytes_per_token, card_roofline
from pagelab.sim.simulator import MAX_OUTPUT_TOKENS, simulate
from pagelab.sim.stream import StreamSummary, simulate_stream
from pagelab.workloads import ShapeStream, open_shapes


@dataclass(frozen=True, slots=True)
class SimulatedCell:
    """One row: an allocator on a workload in one cell; `summary` is None where it cannot run."""

    workload: str
    variant: Variant
    cell: Cell
    summary: StreamSummary | None
    reason: str | None = None


def find_cost_model(name: str | None, shape: ModelShape, dtype: str) -> CostModel:
    """The prices that `--cost-model` names.

    Args:
        name: `unit`, `roofline:GPU`, a file of `pagelab calibrate`; None: this machine's
            calibration of the model.
        shape: of the model, for a roofline.
        dtype: of weights and K/V.

    Raises:
        ConfigError: there is no such model, or nothing was calibrated yet.
    """
    if name is None:
        path = calibration_path(shape.name, dtype)
        if not path.is_file():
            raise ConfigError(
                f"what a step of {shape.name} in {dtype} costs is not known here: run "
                "`pagelab calibrate` first, or give --cost-model (unit, roofline:h100, a file)"
            )
        return CostModel.load(path)
    if name == "unit":
        return UNIT
    kind, colon, card = name.partition(":")
    if kind == "roofline" and colon:
        return card_roofline(card, shape, dtype)
    return CostModel.load(Path(name))


def simulate_cells(
    settings: ExperimentSettings,
    shape: ModelShape,
    cost: CostModel,
    *,
    max_num_seqs: int = SchedulerConfig().max_num_seqs,
    prefix_caching: bool = True,
    on_start: Callable[[str, ShapeStream], None] | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> Iterator[SimulatedCell]:
    """Simulate every cell; one row at a time.

    Args:
        settings: of the grid; its methods are not looked at.
        shape: of the model.
        cost: how long steps take.
        max_num_seqs: sequences at once.
        prefix_caching: where the workload says which prompts share their beginnings; elsewhere
            prompts are all the same token and nothing is looked up.
        on_start: told the row and its workload before it runs.
        on_progress: told requests that ended, and seconds of virtual time, now and then.

    Raises:
        ConfigError: a setting that cannot work.
    """
    limit = check_max_model_len(settings.max_model_len, shape.max_position)
    per_token = bytes_per_token(shape, settings.dtype)
    grid = Grid(
        settings.kv_memories or (default_kv_memory(limit, per_token),),
        settings.block_sizes,
        settings.watermarks,
        settings.placements,
    )
    rows = expand(("pagelab",), settings.allocators, grid)
    scheduling = SchedulerConfig(
        max_num_batched_tokens=settings.max_num_batched_tokens, max_num_seqs=max_num_seqs
    )
    for spec, rate in itertools.product(settings.workloads, settings.rates or (None,)):
        options = settings.shape_options(rate, limit)
        for variant in rows:
            stream = open_shapes(spec, seed=settings.seed, options=options)
            name = stream.name if rate is None else f"{stream.name}@{rate}"
            first = next(iter(stream), None)
            if first is None:
                raise ConfigError(f"workload {name} has no request: see --too-long, --skip-bad")
            cell = variant.cell or grid.base
            if on_start is not None:
                on_start(f"{variant.label} on {name}", stream)
            try:
                shared = prefix_caching and bool(first.hash_ids)
                memory = _memory(cell, per_token, limit, shared)
                summary = simulate_stream(
                    stream,
                    memory,
                    scheduling,
                    cost=cost,
                    name=name,
                    vocab_size=shape.dimensions.vocab_size,
                    seed=settings.seed,
                    allocator=make_allocator(variant.allocator or "paged"),
                    on_progress=on_progress,
                )
            except InsufficientMemoryError as error:
                yield SimulatedCell(name, variant, cell, None, str(error))
                continue
            yield SimulatedCell(name, variant, cell, summary)


def _memory(cell: Cell, bytes_per_token: int, limit: int, prefix_caching: bool) -> MemoryConfig:
    """The pool of a cell.

    Raises:
        InsufficientMemoryError: its budget holds no block.
    """
    return MemoryConfig(
        num_blocks=whole_blocks(cell.kv_memory, cell.block_size, bytes_per_token),
        block_size=cell.block_size,
        max_model_len=limit,
        placement=cell.placement,
        prefix_caching=prefix_caching,
        watermark=cell.watermark,
    )


def simulated_results(
    settings: ExperimentSettings,
    cost: CostModel,
    *,
    max_num_seqs: int = SchedulerConfig().max_num_seqs,
    prefix_caching: bool = True,
    on_start: Callable[[str], None] | None = None,
) -> Results:
    """Simulate a small grid, every step written down, as `pagelab compare` would measure it.

    `max_num_seqs` and `prefix_caching` are the engine's own settings.

    Raises:
        ConfigError: a setting that cannot work, or too many tokens to write down.
        ModelError: the model cannot be found or read.
    """
    plan = prepare(settings)
    total = sum(workload.output_tokens for workload in plan.workloads)
    if total > MAX_OUTPUT_TOKENS:
        raise ConfigError(
            f"{total:,} output tokens are more than the {MAX_OUTPUT_TOKENS:,} whose steps are "
            "written down: lower --requests, or leave --out away"
        )
    results = blank_results(plan)
    results["experiment"]["cost_model"] = cost.name
    info = plan.facts.info
    per_token = info["kv_bytes_per_token"]
    for variant in plan.variants:
        job = plan.job(variant)
        if on_start is not None:
            on_start(variant.label)
        run = empty_run(job, variant, 0)
        run["simulated"] = True
        cell = variant.cell or plan.grid.base
        try:
            memory = _memory(cell, per_token, plan.max_model_len, prefix_caching)
            run["kv"] = {
                "bytes": memory.num_blocks * cell.block_size * per_token,
                "slots": memory.num_blocks * cell.block_size,
                "num_blocks": memory.num_blocks,
                "block_size": cell.block_size,
                "note": f"simulated: {memory.num_blocks} blocks of {cell.block_size} slots",
            }
            scheduling = SchedulerConfig(
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_num_seqs=min(cell.max_num_seqs or max_num_seqs, max_num_seqs),
            )
            for workload in plan.workloads:
                run["workloads"].append(
                    simulate(
                        workload,
                        memory,
                        scheduling,
                        cost=cost,
                        vocab_size=info["vocab_size"],
                        bytes_per_token=per_token,
                        seed=settings.seed,
                        allocator=make_allocator(variant.allocator or "paged"),
                    )
                )
            run["status"] = "ok"
        except InsufficientMemoryError as error:
            run["status"], run["reason"] = "unavailable", str(error)
        results["runs"].append(run)
    results["complete"], results["note"] = True, None
    conclude(results)
    return results
