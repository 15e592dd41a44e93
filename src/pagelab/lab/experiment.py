"""The experiment: every row of the grid on every workload, each run in a process of its own.

::

    settings ──▶ prepare: model facts, token ids, the grid ──▶ Results (no runs yet)
                                                               │
       phase "traditional"   repeat 1: row, row, …             │  after every run:
                             repeat 2: …                       │  summary, equality, analysis,
       between_phases()      (the CLI may wait for Enter)      │  results.json, and its lines
       phase "paged"         repeat 1: …                       ▼  of ledger.jsonl

This process stays free of torch, so that what it takes is small and the same for all.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
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
from pagelab.lab.ledger_file import LEDGER_FILE, append_ledger, start_ledger
from pagelab.lab.methods import Variant
from pagelab.lab.preparation import Plan, experiment_info, prepare
from pagelab.lab.process import WORKER, run_method
from pagelab.lab.settings import ExperimentSettings
from pagelab.metrics import summarize
from pagelab.results import SCHEMA, VERSION, Phase, Results, save_results
from pagelab.telemetry import OtherLoad, describe_environment

__all__ = ["OTHER_LOAD", "RESULTS_FILE", "Plan", "conclude", "prepare", "run_experiment"]

RESULTS_FILE = "results.json"
OTHER_LOAD = "other_load_cores"  # in `environment`: label → cores that other programs used
PHASES: tuple[Phase, ...] = ("traditional", "paged")


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
    results = blank_results(plan)
    path = settings.out / RESULTS_FILE
    save_results(results, path)
    start_ledger(settings.out / LEDGER_FILE)
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
    conclude(results)
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
                conclude(results)
                save_results(results, path)
                append_ledger(settings.out / LEDGER_FILE, run)
                on_event(RunFinished(run))
                if run["status"] == "interrupted":
                    return f"in {variant.label}"
    return None


def conclude(results: Results) -> None:
    """Compute from the runs what is computed from them: summary, equality, analysis."""
    runs, asked = results["runs"], results["experiment"]
    results["summary"] = summarize(runs, asked["objectives"])
    results["equality"] = [] if asked["temperature"] > 0 else compare_outputs(runs)
    results["analysis"] = analyse(
        asked,
        runs,
        results["summary"],
        results["equality"],
        results["environment"].get(OTHER_LOAD, {}),
    )


def _log_name(variant: Variant, repeat: int) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", variant.label) + f"-{repeat + 1}.log"


def blank_results(plan: Plan) -> Results:
    """Results without a run: what was asked, and where."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "pagelab_version": __version__,
        "complete": False,
        "note": "still running, or it was killed: these are the runs that had ended",
        "environment": describe_environment(),
        "experiment": experiment_info(plan),
        "runs": [],
        "summary": [],
        "equality": [],
        "analysis": [],
    }
