"""The figures of the main experiment: paged against the others on the mixed load, in turn.

    python benchmarks/mixed_load.py [--rounds 3] [--model NAME] [--dtype float32]

Each round runs every method once, one after the other, each in a process of its own, so that a
machine that is slower for a while is so for all of them. A ratio is taken within a round; printed
are the least, the median and the greatest over the rounds, beside the target of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from pagelab.lab.experiment import prepare, run_experiment
from pagelab.lab.progress import CompareProgress
from pagelab.lab.settings import ExperimentSettings
from pagelab.results import Results

TARGETS = {"hf-generate": 8.0, "hf-static": 2.0, "pagelab contiguous-max": 2.0}
PAGED = "pagelab paged"


def rates(results: Results) -> dict[str, float]:
    """Output tokens a second of every method that ran."""
    return {
        run["label"]: workload["output_tokens_per_s"]
        for run in results["runs"]
        if run["status"] == "ok"
        for workload in run["workloads"]
    }


def main() -> int:
    """Run the rounds and print the table; 1 if a target was missed in the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workload", default="mixed")
    args = parser.parse_args()
    console = Console()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = ExperimentSettings(
            model=args.model,
            dtype=args.dtype,
            workloads=(args.workload,),
            axes=("budget",),
            out=Path(folder),
        )
        plan = prepare(settings)
        for i in range(args.rounds):
            console.rule(f"round {i + 1} of {args.rounds}")
            with CompareProgress(console) as progress:
                rounds.append(rates(run_experiment(settings, progress, plan=plan)))
    workload = plan.workloads[0]
    print(
        f"\n{workload.name}: {len(workload.requests)} requests, "
        f"{sum(len(r.token_ids) for r in workload.requests)} tokens in, "
        f"{workload.output_tokens} out; {args.dtype}, {plan.threads} threads, KV budget "
        f"{plan.grid.base.kv_memory >> 20} MiB, max length {plan.max_model_len}; "
        f"{args.rounds} rounds"
    )
    print(f"{'':24}{'tok/s':>10}{'paged is so many times faster':>36}{'target':>10}")
    missed = False
    for label in (*TARGETS, PAGED):
        values = [r[label] for r in rounds if label in r]
        if not values:
            print(f"{label:24}  did not run")
            continue
        line = f"{label:24}{statistics.median(values):10.1f}"
        if label in TARGETS:
            ratios = sorted(r[PAGED] / r[label] for r in rounds if label in r and PAGED in r)
            median = statistics.median(ratios)
            missed |= median < TARGETS[label]
            spread = f"{ratios[0]:.2f} … {median:.2f} … {ratios[-1]:.2f}"
            line += f"{spread:>36}{TARGETS[label]:>10.0f}"
        print(line)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
