"""What an experiment will do, every figure known and checked, before anything runs.

This process stays free of torch: token ids come from the tokenizer alone, sizes from the model's
description.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagelab.errors import ConfigError
from pagelab.lab.grid import Grid, expand, held_at_once
from pagelab.lab.methods import NATIVE, Variant
from pagelab.lab.model_facts import ModelFacts, model_facts
from pagelab.lab.protocol import Job
from pagelab.lab.settings import (
    ExperimentSettings,
    check_budget,
    check_length,
    check_max_model_len,
    default_kv_memory,
)
from pagelab.memory.allocators import ContiguousMax
from pagelab.results import Counts, ExperimentInfo, RequestInfo, WorkloadInfo
from pagelab.telemetry import available_cores
from pagelab.workloads import (
    ShapeCounts,
    ShapeOptions,
    Workload,
    WorkloadRequest,
    load_workload,
    open_shapes,
    random_ids,
    tokenize,
)
from pagelab.workloads.named import BUILDERS

_SHOWN_PROMPT = 120  # characters of a prompt that are kept for display


@dataclass(frozen=True, slots=True)
class Plan:
    """An experiment that can run: every figure is known and checked."""

    settings: ExperimentSettings
    facts: ModelFacts
    variants: tuple[Variant, ...]
    workloads: tuple[Workload, ...]
    rates: tuple[str | None, ...]  # of each workload, as asked
    warm_up: Workload
    grid: Grid
    batch: int | None  # of the same-batch axis
    max_model_len: int
    threads: int

    def job(self, variant: Variant) -> Job:
        """What one method is told."""
        settings = self.settings
        cell = variant.cell or self.grid.base
        return Job(
            method=variant.method,
            allocator=variant.allocator,
            model=settings.model,
            dtype=settings.dtype,
            kv_memory=cell.kv_memory,
            block_size=cell.block_size,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            watermark=cell.watermark,
            placement=cell.placement,
            max_num_seqs=cell.max_num_seqs,
            temperature=settings.temperature,
            device=settings.device,
            threads=self.threads,
            seed=settings.seed,
            warm_up=self.warm_up,
            workloads=self.workloads,
            debug=settings.debug,
        )


def prepare(settings: ExperimentSettings, facts: ModelFacts | None = None) -> Plan:
    """Find the model, make token ids of the workloads, and check that all can work.

    Raises:
        ConfigError: the budget or the length cannot work, with the option to change.
        ModelError: the model cannot be found, fetched or read.
    """
    for spec in settings.workloads:  # a wrong name is said before a model is fetched
        for rate in settings.rates or (None,):
            open_shapes(spec, seed=settings.seed, options=settings.shape_options(rate, None))
    if facts is None:
        facts = model_facts(settings.model, settings.dtype)
    max_model_len = check_max_model_len(settings.max_model_len, facts.max_position)
    workloads = _workloads(settings, facts, max_model_len)
    bytes_per_token = facts.info["kv_bytes_per_token"]
    grid = Grid(
        settings.kv_memories or (default_kv_memory(max_model_len, bytes_per_token),),
        settings.block_sizes,
        settings.watermarks,
        settings.placements,
    )
    least = min(grid.kv_memories)
    for workload in workloads:
        longest = max(workload.requests, key=lambda request: request.total_tokens)
        what = f"{longest.id} of workload {workload.name}"
        check_length(longest.total_tokens, max_model_len, what)
        check_budget(least, bytes_per_token, longest.total_tokens, what)
    held = held_at_once(grid.base, max_model_len, bytes_per_token)
    batch = _batch(settings, held)
    return Plan(
        settings=settings,
        facts=facts,
        variants=expand(
            settings.methods,
            settings.allocators,
            grid,
            budget_axis="budget" in settings.axes,
            batch=batch,
            held=held,
        ),
        workloads=workloads,
        rates=(settings.rates or (None,)) * len(settings.workloads),
        warm_up=_warm_up(facts.info["vocab_size"], min(max_model_len, least // bytes_per_token)),
        grid=grid,
        batch=batch,
        max_model_len=max_model_len,
        threads=settings.threads or available_cores(),
    )


def _batch(settings: ExperimentSettings, held: int) -> int | None:
    """Requests at once on the same-batch axis; None: that axis has no rows.

    It needs an allocator to compare with `contiguous-max`, which holds `held`.
    """
    if "batch" not in settings.axes or NATIVE not in settings.methods:
        if settings.batch is not None:
            raise ConfigError("--batch needs the method pagelab: add it to --methods")
        return None
    reference = ContiguousMax.name in settings.allocators
    if settings.batch is not None:
        if reference and settings.batch > held:
            raise ConfigError(
                f"--batch {settings.batch} is more than contiguous-max holds at once, {held}: "
                "lower it, or raise --kv-memory"
            )
        return settings.batch
    return held if reference and held and len(settings.allocators) > 1 else None


def _workloads(
    settings: ExperimentSettings, facts: ModelFacts, max_model_len: int
) -> tuple[Workload, ...]:
    """Every workload at every rate, with token ids."""
    found = [
        _at_rate(
            _with_ids(_load(spec, rate, settings, facts, max_model_len), settings.seed, facts), rate
        )
        for spec in settings.workloads
        for rate in settings.rates or (None,)
    ]
    names = [workload.name for workload in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two workloads are called {twice}: rename the file of one, or drop it from --workload"
        )
    return tuple(found)


def _load(
    spec: str, rate: str | None, settings: ExperimentSettings, facts: ModelFacts, limit: int
) -> Workload:
    options = settings.shape_options(rate, limit)
    ours = spec in BUILDERS or spec == "seed"
    if ours and settings.shape_options(rate, None) == ShapeOptions():
        options = ShapeOptions()  # as they are; `check_length` looks at their lengths
    return load_workload(spec, settings.seed, options, facts.encode)


def _at_rate(workload: Workload, rate: str | None) -> Workload:
    """Named by its rate; its tokens are the same at every rate."""
    return workload if rate is None else replace(workload, name=f"{workload.name}@{rate}")


def _with_ids(workload: Workload, seed: int, facts: ModelFacts) -> Workload:
    if facts.encode is None:
        return random_ids(workload, facts.info["vocab_size"], seed)
    return tokenize(workload, facts.encode, facts.decode)


def _warm_up(vocab_size: int, room: int) -> Workload:
    """Two short requests: the first calls of every kernel, for one row and for several.

    Their tokens occur in no workload's prompts in this order, so no prefix is cached for them.
    """
    length = max(1, min(24, room // 4))
    requests = tuple(
        WorkloadRequest(
            id=f"warm-up-{i}",
            prompt_token_ids=tuple((7 + 3 * i + 11 * k) % vocab_size for k in range(length)),
            prompt_tokens=length,
            max_tokens=max(1, min(4, room // 4)),
        )
        for i in range(2)
    )
    return Workload("warm-up", "Two short requests", requests)


def experiment_info(plan: Plan) -> ExperimentInfo:
    """What was asked, for the results."""
    settings, grid = plan.settings, plan.grid
    return {
        "command": settings.command_line(),
        "model": plan.facts.info,
        "device": settings.device,
        "dtype": settings.dtype,
        "kv_memory_bytes": grid.base.kv_memory,
        "block_size": grid.base.block_size,
        "watermark": grid.base.watermark,
        "placement": grid.base.placement,
        "kv_memories": list(grid.kv_memories),
        "block_sizes": list(grid.block_sizes),
        "watermarks": list(grid.watermarks),
        "placements": list(grid.placements),
        "batch": plan.batch,
        "max_model_len": plan.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "threads": plan.threads,
        "sampling": settings.sampling,
        "temperature": settings.temperature,
        "objectives": settings.objectives,
        "cost_model": None,
        "workloads": [
            workload_info(w, rate) for w, rate in zip(plan.workloads, plan.rates, strict=True)
        ],
    }


def workload_info(workload: Workload, rate: str | None) -> WorkloadInfo:
    """A workload as it was asked, with its `--rate` if it had one, for the results."""
    requests: list[RequestInfo] = [
        {
            "id": request.id,
            "prompt": _shortened(request.prompt_text),
            "prompt_tokens": len(request.token_ids),
            "max_tokens": request.max_tokens,
            "arrival_s": request.arrival_s,
            "asked_tokens": request.asked_tokens,
        }
        for request in workload.requests
    ]
    return {
        "name": workload.name,
        "title": workload.title,
        "requests": requests,
        "rate": rate,
        "counts": None if workload.counts is None else _counts(workload.counts),
    }


def _counts(counts: ShapeCounts) -> Counts:
    return {
        "read": counts.read,
        "bad": counts.bad,
        "dropped": counts.dropped,
        "clipped": counts.clipped,
        "left_out": counts.left_out,
        "first_bad": counts.first_bad,
    }


def _shortened(text: str | None) -> str | None:
    if text is None or len(text) <= _SHOWN_PROMPT:
        return text
    return text[: _SHOWN_PROMPT - 1].rstrip() + "…"
