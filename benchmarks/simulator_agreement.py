"""The simulator against the real engine: makespan and mean TTFT on a load not used for fitting.

    python benchmarks/simulator_agreement.py [--rounds 3]

Calibrates, then serves `mixed` and a Poisson load with the real engine on the default model and in
virtual time, under 192 MiB for K/V and under a budget that is always full. A ratio of 1 is perfect.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from pagelab.engine.llm import LLM
from pagelab.engine.replay import RealClock, replay
from pagelab.lab.calibrate import calibrate
from pagelab.metrics import mean, ttft
from pagelab.results import WorkloadRun
from pagelab.sim.simulator import simulate
from pagelab.telemetry import available_cores
from pagelab.workloads import ShapeOptions, load_workload, random_ids

BUDGETS = {"192 MiB": 192 << 20, "24 MiB": 24 << 20}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cost = calibrate()
    error = cost.provenance["held_out_mean_relative_error"]
    print(f"{cost.name}; mean error of held-out steps {error:.1%}")
    print(f"{'load':28}{'makespan':>22}{'ratio':>8}{'mean TTFT':>22}{'ratio':>8}")
    for budget, size in BUDGETS.items():
        llm = LLM(
            device="cpu",
            dtype="float32",
            kv_memory=size,
            max_model_len=512,
            threads=available_cores(),
        )
        vocab = llm.spec.vocab_size
        loads = {
            "mixed": random_ids(load_workload("mixed", 0), vocab),
            "poisson:3": random_ids(
                load_workload(
                    "uniform:in=16..200,out=16..64,n=24", 5, ShapeOptions(rate="poisson:3")
                ),
                vocab,
            ),
        }
        for name, workload in loads.items():
            guess = simulate(
                workload,
                llm.core.kv.config,
                llm.core.scheduler.config,
                cost=cost,
                vocab_size=vocab,
            )
            for number in range(args.rounds):
                # other ids a round, or the prefix cache would know the prompts
                fresh = random_ids(
                    replace(workload, name=f"{name}-{budget}-{number}"), vocab, number + 1
                )
                _row(
                    f"{name}, {budget}",
                    guess,
                    replay(llm.core, fresh, RealClock(), bytes_per_token=1),
                )


def _row(name: str, guess: WorkloadRun, real: WorkloadRun) -> None:
    first, second = (mean([ttft(r) for r in run["requests"]]) for run in (guess, real))
    makespan = f"{guess['duration_s']:.2f} / {real['duration_s']:.2f} s"
    latency = f"{first:.3f} / {second:.3f} s"
    print(
        f"{name:28}{makespan:>22}{guess['duration_s'] / real['duration_s']:>8.3f}"
        f"{latency:>22}{first / second:>8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
