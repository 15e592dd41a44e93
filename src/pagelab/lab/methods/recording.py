"""What the methods have in common when they write down a workload: steps, times, the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagelab.metrics import output_rate
from pagelab.results import LedgerSummary, Preemption, RequestResult, Steps, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest


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
        "shared_saved": [],
    }


@dataclass(slots=True)
class StepRecorder:
    """Steps of a method that has no blocks; slots are counted by hand.

    `free` is what the given states leave of the pool.
    """

    pool: int
    steps: Steps = field(default_factory=empty_steps)

    def record(
        self,
        t: float,
        *,
        new_tokens: int,
        running: int,
        waiting: int,
        live: int,
        reserved: int = 0,
        internal: int = 0,
        external: int = 0,
    ) -> None:
        """Add a step that ended at `t` seconds of the workload."""
        free = self.pool - live - reserved - internal - external
        assert free >= 0, "more slots than the pool has"
        entry = {
            "t": micro(t),
            "new_tokens": new_tokens,
            "running": running,
            "waiting": waiting,
            "live": live,
            "reserved": reserved,
            "internal": internal,
            "cached": 0,
            "free": free,
            "external": external,
            "shared_saved": 0,
        }
        for name, value in entry.items():
            self.steps[name].append(value)  # type: ignore[literal-required]


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
        "mean_running": weighted(steps["running"]),
        "peak_running": max(steps["running"], default=0),
        "peak_live_slots": max(steps["live"], default=0),
        "peak_allocated_slots": max(allocated, default=0),
    }


def micro(seconds: float) -> float:
    """Whole microseconds: finer digits are noise, and three times the file."""
    return round(seconds, 6)


def wait_until(started: float, arrival_s: float) -> None:
    """Sleep until a request arrives; `started` is the workload's `time.perf_counter()`."""
    delay = started + arrival_s - time.perf_counter()
    if delay > 0:
        time.sleep(delay)


def request_result(
    request: WorkloadRequest,
    token_ids: Sequence[int],
    token_times: Sequence[float],
    first_scheduled: float,
) -> RequestResult:
    """A request that generated everything that was asked, without a cache or preemptions."""
    return {
        "id": request.id,
        "output_token_ids": list(token_ids),
        "finish_reason": "length",
        "arrival_s": request.arrival_s,
        "first_scheduled_s": micro(first_scheduled),
        "first_token_s": micro(token_times[0]),
        "finish_s": micro(token_times[-1]),
        "token_times_s": [micro(t) for t in token_times],
        "cached_tokens": 0,
        "preemptions": 0,
        "recomputed_tokens": 0,
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
        "prefix_queries": prefix_queries,
        "prefix_hits": prefix_hits,
    }
