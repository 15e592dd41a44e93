"""What the methods have in common when they write down a workload: steps, times, the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagelab.engine.replay import RealClock
from pagelab.engine.workload_record import empty_steps, micro, summarize_ledger, workload_run
from pagelab.results import RequestResult, Steps
from pagelab.workloads import WorkloadRequest

__all__ = [
    "StepRecorder",
    "empty_steps",
    "micro",
    "request_result",
    "summarize_ledger",
    "wait_until",
    "workload_run",
]


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
            "rounding": 0,
            "shared_saved": 0,
        }
        for name, value in entry.items():
            self.steps[name].append(value)  # type: ignore[literal-required]


def wait_until(started: float, arrival_s: float) -> None:
    """Sleep until a request arrives; `started` is the workload's `time.perf_counter()`."""
    RealClock().wait_until(started + arrival_s)


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
