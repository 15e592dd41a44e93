"""How a served workload is written down: steps, the ledger's means, the whole run.

The engine, the simulator and the methods of others use the same code, so that their records differ
in nothing but what happened.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagelab.metrics import output_rate
from pagelab.results import LedgerSummary, Preemption, RequestResult, Steps, WorkloadRun
from pagelab.workloads import Workload


def empty_steps() -> Steps:
    """Columns without an entry."""
    return {
        "t": [],
        "new_tokens": [],
        "running": [],
        "waiting": [],
        "live": [],
        "reserved": [],
        "internal": [],
        "cached": [],
        "free": [],
        "external": [],
        "rounding": [],
        "shared_saved": [],
    }


def micro(seconds: float) -> float:
    """Whole microseconds: finer digits are noise, and three times the file."""
    return round(seconds, 6)


def summarize_ledger(steps: Steps, pool: int) -> LedgerSummary:
    """Shares of the pool and concurrency, weighted by time, while requests were running.

    A step's entry counts for the time from the step before it to its own end.
    """
    weights = [
        (t - before) if running else 0.0
        for before, t, running in zip(
            [0.0, *steps["t"]], steps["t"], steps["running"], strict=False
        )
    ]
    total = sum(weights)

    def weighted(column: Sequence[int]) -> float:
        products = (w * value for w, value in zip(weights, column, strict=True))
        return sum(products) / total if total > 0 else 0.0

    allocated = [
        sum(s) for s in zip(steps["live"], steps["reserved"], steps["internal"], strict=True)
    ]
    return {
        "live": weighted(steps["live"]) / pool,
        "reserved": weighted(steps["reserved"]) / pool,
        "internal": weighted(steps["internal"]) / pool,
        "cached": weighted(steps["cached"]) / pool,
        "free": weighted(steps["free"]) / pool,
        "external": weighted(steps["external"]) / pool,
        "rounding": weighted(steps["rounding"]) / pool,
        "shared_saved": weighted(steps["shared_saved"]) / pool,
        "mean_running": weighted(steps["running"]),
        "peak_running": max(steps["running"], default=0),
        "peak_live_slots": max(steps["live"], default=0),
        "peak_allocated_slots": max(allocated, default=0),
    }


def workload_run(
    workload: Workload,
    requests: list[RequestResult],
    steps: Steps,
    pool: int,
    *,
    duration_s: float,
    block_events: list[tuple[int, int, int]] | None = None,
    preemptions: list[Preemption] | None = None,
    prefix_queries: int = 0,
    prefix_hits: int = 0,
) -> WorkloadRun:
    """Everything about one workload, with what follows from it. `pool` is in slots."""
    output = sum(len(request["output_token_ids"]) for request in requests)
    return {
        "name": workload.name,
        "duration_s": duration_s,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": output,
        "output_tokens_per_s": output_rate(output, duration_s),
        "requests": requests,
        "steps": steps,
        "ledger": summarize_ledger(steps, pool),
        "block_events": block_events or [],
        "preemptions": preemptions or [],
        "num_preemptions": len(preemptions or []),
        "recomputed_tokens": sum(request["recomputed_tokens"] for request in requests),
        "prefix_queries": prefix_queries,
        "prefix_hits": prefix_hits,
    }
