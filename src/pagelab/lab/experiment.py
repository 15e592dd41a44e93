"""The experiment: every method on every workload, each run in a process of its own.

::

    settings ──▶ prepare: model facts, token ids, budget ──▶ Results (no runs yet)
                                                               │
       phase "traditional"   repeat 1: method, method, …       │  after every run:
                             repeat 2: …                       │  summary, equality, analysis,
       between_phases()      (the CLI may wait for Enter)      │  results.json
       phase "paged"         repeat 1: …                       ▼

This process stays free of torch, so that what it takes is small and the same for all.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagelab import __version__
from pagelab.lab.analysis import analyse
from pagelab.lab.equality import compare_outputs
from pagelab.lab.events import (
    Event,
    ExperimentFinished,
    ExperimentStarted,
    PhaseStarted,
    RunFinished,
    RunStarted,
)
from pagelab.lab.methods import Variant, variants
from pagelab.lab.model_facts import ModelFacts, model_facts
from pagelab.lab.process import WORKER, run_method
from pagelab.lab.protocol import Job
from pagelab.lab.settings import (
    ExperimentSettings,
    check_budget,
    check_length,
    check_max_model_len,
    default_kv_memory,
)
from pagelab.metrics import summarize
from pagelab.results import (
    SCHEMA,
    VERSION,
    ExperimentInfo,
    Phase,
    RequestInfo,
    Results,
    WorkloadInfo,
    save_results,
)
from pagelab.telemetry import OtherLoad, available_cores, describe_environment
from pagelab.workloads import Workload, WorkloadRequest, load_workload, random_ids, tokenize

RESULTS_FILE = "results.json"
OTHER_LOAD = "other_load_cores"  # in `environment`: label → cores that other programs used
SAMPLING = "greedy, end-of-sequence ignored"
PHASES: tuple[Phase, ...] = ("traditional", "paged")

_SHOWN_PROMPT = 120  # characters of a prompt that are kept for display


@dataclass(frozen=True, slots=True)
class Plan:
    """An experiment that can run: every figure is known and checked."""

    settings: ExperimentSettings
    facts: ModelFacts
    variants: tuple[Variant, ...]
    workloads: tuple[Workload, ...]
    warm_up: Workload
    kv_memory: int
    max_model_len: int
    threads: int

    def job(self, variant: Variant) -> Job:
        """What one method is told."""
        settings = self.settings
        return Job(
            method=variant.method,
            allocator=variant.allocator,
            model=settings.model,
            dtype=settings.dtype,
            kv_memory=self.kv_memory,
            block_size=settings.block_size,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            watermark=settings.watermark,
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
    if facts is None:
        facts = model_facts(settings.model, settings.dtype)
    max_model_len = check_max_model_len(settings.max_model_len, facts.max_position)
    workloads = tuple(_with_ids(name, settings.seed, facts) for name in settings.workloads)
    bytes_per_token = facts.info["kv_bytes_per_token"]
    kv_memory = settings.kv_memory or default_kv_memory(max_model_len, bytes_per_token)
    for workload in workloads:
        longest = max(workload.requests, key=lambda request: request.total_tokens)
        what = f"{longest.id} of workload {workload.name}"
        check_length(longest.total_tokens, max_model_len, what)
        check_budget(kv_memory, bytes_per_token, longest.total_tokens, what)
    return Plan(
        settings=settings,
        facts=facts,
        variants=tuple(variants(settings.methods, settings.allocators)),
        workloads=workloads,
        warm_up=_warm_up(
            facts.info["vocab_size"], min(max_model_len, kv_memory // bytes_per_token)
        ),
        kv_memory=kv_memory,
        max_model_len=max_model_len,
        threads=settings.threads or available_cores(),
    )


def run_experiment(
    settings: ExperimentSettings,
    on_event: Callable[[Event], None],
    *,
    between_phases: Callable[[], None] | None = None,
    plan: Plan | None = None,
    worker: Sequence[str] = WORKER,
) -> Results:
    """Run an experiment and return its results, complete or not.

    `results.json` is written after every run, so that what was measured survives a crash.
    Ctrl-C ends the running method and returns what there is: `complete` is false, and `note`
    says why. A method that fails or cannot run is a run that says why; the others go on.

    Args:
        settings: what to do.
        on_event: called for everything that happens, from this thread.
        between_phases: called after the traditional phase, if both phases have runs.
        plan: what `prepare(settings)` gave, if it was called before.
        worker: the command that starts a method's process.

    Raises:
        ConfigError, ModelError: before anything runs, as `prepare`.
        ReportError: the results or a log cannot be written.
    """
    if plan is None:
        plan = prepare(settings)
    results = _blank_results(plan)
    path = settings.out / RESULTS_FILE
    save_results(results, path)
    interrupted: str | None = None
    try:
        on_event(ExperimentStarted(results, plan.variants, str(path)))
        interrupted = _run_phases(plan, results, path, on_event, between_phases, worker)
    except KeyboardInterrupt:
        interrupted = "between two runs"
    if interrupted is not None:
        results["note"] = f"interrupted by Ctrl-C {interrupted}; later runs were not started"
    else:
        results["complete"], results["note"] = True, None
    _conclude(results)
    save_results(results, path)
    on_event(ExperimentFinished(results))
    return results


def _run_phases(
    plan: Plan,
    results: Results,
    path: Path,
    on_event: Callable[[Event], None],
    between_phases: Callable[[], None] | None,
    worker: Sequence[str],
) -> str | None:
    """Run everything; returns where it was interrupted, None if it was not."""
    settings = plan.settings
    for phase in PHASES:
        members = tuple(variant for variant in plan.variants if variant.phase == phase)
        if not members:
            continue
        if results["runs"] and between_phases is not None:
            between_phases()
        on_event(PhaseStarted(phase, members))
        for repeat in range(settings.repeats):
            for variant in members:
                on_event(RunStarted(variant, repeat, settings.repeats))
                others = OtherLoad()
                run = run_method(
                    plan.job(variant),
                    variant,
                    repeat,
                    log_path=settings.out / "logs" / _log_name(variant, repeat),
                    on_event=on_event,
                    silence_timeout_s=settings.silence_timeout_s,
                    command=worker,
                )
                results["runs"].append(run)
                load = results["environment"].setdefault(OTHER_LOAD, {})
                load[variant.label] = max(load.get(variant.label, 0.0), round(others.cores(), 3))
                _conclude(results)
                save_results(results, path)
                on_event(RunFinished(run))
                if run["status"] == "interrupted":
                    return f"in {variant.label}"
    return None


def _conclude(results: Results) -> None:
    """Compute from the runs what is computed from them."""
    runs = results["runs"]
    results["summary"] = summarize(runs)
    results["equality"] = compare_outputs(runs)
    results["analysis"] = analyse(
        runs,
        results["summary"],
        results["equality"],
        results["experiment"]["kv_memory_bytes"],
        results["environment"].get(OTHER_LOAD, {}),
    )


def _log_name(variant: Variant, repeat: int) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", variant.label) + f"-{repeat + 1}.log"


def _with_ids(name: str, seed: int, facts: ModelFacts) -> Workload:
    workload = load_workload(name, seed)
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


def _blank_results(plan: Plan) -> Results:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "pagelab_version": __version__,
        "complete": False,
        "note": "still running, or it was killed: these are the runs that had ended",
        "environment": describe_environment(),
        "experiment": _experiment_info(plan),
        "runs": [],
        "summary": [],
        "equality": [],
        "analysis": [],
    }


def _experiment_info(plan: Plan) -> ExperimentInfo:
    settings = plan.settings
    return {
        "command": settings.command_line(),
        "model": plan.facts.info,
        "dtype": settings.dtype,
        "kv_memory_bytes": plan.kv_memory,
        "block_size": settings.block_size,
        "max_model_len": plan.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "watermark": settings.watermark,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "threads": plan.threads,
        "sampling": SAMPLING,
        "workloads": [_workload_info(workload) for workload in plan.workloads],
    }


def _workload_info(workload: Workload) -> WorkloadInfo:
    requests: list[RequestInfo] = [
        {
            "id": request.id,
            "prompt": _shortened(request.prompt_text),
            "prompt_tokens": len(request.token_ids),
            "max_tokens": request.max_tokens,
        }
        for request in workload.requests
    ]
    return {"name": workload.name, "title": workload.title, "requests": requests}


def _shortened(text: str | None) -> str | None:
    if text is None or len(text) <= _SHOWN_PROMPT:
        return text
    return text[: _SHOWN_PROMPT - 1].rstrip() + "…"
