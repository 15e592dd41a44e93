"""The simulator against the real engine: makespan and mean TTFT on loads not used for fitting.

    python benchmarks/simulator_agreement.py [--rounds 3]

Each round calibrates, then serves `mixed` and a Poisson load with the real engine on the default
model and in virtual time, under 192 MiB for K/V and under 24 MiB, which are always full. A ratio of
1 is perfect. Shared machines drift by a tenth within minutes, which no model can know: calibration
and measurement take turns, and the last lines are the medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace

from pagelab.engine.llm import LLM
from pagelab.engine.replay import RealClock, replay
from pagelab.lab.calibrate import calibrate
from pagelab.metrics import mean, ttft
from pagelab.results import WorkloadRun
from pagelab.sim.cost_model import CostModel
from pagelab.sim.simulator import simulate
from pagelab.telemetry import available_cores
from pagelab.workloads import ShapeOptions, Workload, load_workload, random_ids

BUDGETS = {"192 MiB": 192 << 20, "24 MiB": 24 << 20}


Ratios = dict[str, list[tuple[float, float]]]


def main() -> None:
    """Print a row for each load and round, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ratios: Ratios = defaultdict(list)
    for number in range(args.rounds):
        cost = calibrate()
        error = cost.provenance["held_out_mean_relative_error"]
        print(f"{cost.name}; mean error of held-out steps {error:.1%}")
        print(f"{'load':28}{'makespan':>22}{'ratio':>8}{'mean TTFT':>22}{'ratio':>8}")
        for budget, size in BUDGETS.items():
            _compare(cost, budget, size, number, ratios)
    print("medians")
    for name, found in ratios.items():
        makespan, latency = map(statistics.median, zip(*found, strict=True))
        print(f"{name:28}{'':22}{makespan:>8.3f}{'':22}{latency:>8.3f}")


def _compare(cost: CostModel, budget: str, size: int, number: int, ratios: Ratios) -> None:
    llm = LLM(
        device="cpu", dtype="float32", kv_memory=size, max_model_len=512, threads=available_cores()
    )
    vocab = llm.spec.vocab_size
    for name, workload in _loads().items():
        # other ids for the warm-up, or the prefix cache would know the prompts
        for ids, measured in ((100 + number, False), (number, True)):
            fresh = random_ids(replace(workload, name=f"{name}-{ids}"), vocab, ids)
            if not measured:
                fresh = replace(fresh, requests=fresh.requests[:4])
            real = replay(llm.core, fresh, RealClock(), bytes_per_token=1)
        guess = simulate(
            fresh, llm.core.kv.config, llm.core.scheduler.config, cost=cost, vocab_size=vocab
        )
        ratios[f"{name}, {budget}"].append(_row(f"{name}, {budget}", guess, real))


def _loads() -> dict[str, Workload]:
    options = ShapeOptions(rate="poisson:3")
    return {
        "mixed": load_workload("mixed", 0),
        "poisson:3": load_workload("uniform:in=16..200,out=16..64,n=24", 5, options),
    }


def _row(name: str, guess: WorkloadRun, real: WorkloadRun) -> tuple[float, float]:
    first, second = (mean([ttft(r) for r in run["requests"]]) for run in (guess, real))
    makespan = f"{guess['duration_s']:.2f} / {real['duration_s']:.2f} s"
    latency = f"{first:.3f} / {second:.3f} s"
    ratio = (guess["duration_s"] / real["duration_s"], first / second)
    print(f"{name:28}{makespan:>22}{ratio[0]:>8.3f}{latency:>22}{ratio[1]:>8.3f}", flush=True)
    return ratio


if __name__ == "__main__":
    main()
