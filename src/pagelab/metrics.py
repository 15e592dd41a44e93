"""Latency and throughput, by formula. Seconds and tokens; no torch, no numpy.

For one request with arrival `a`, token times `t[0] … t[n-1]` and end `e`::

    arrival        first token                                    last token, end
    a ─────────────── t[0] ───── t[1] ─────── t[2] ─── … ─────────── t[n-1] = e
    │      TTFT       │   ITL    │    ITL     │                         │
    └───────────────────────────── E2E ────────────────────────────────┘

- TTFT = t[0] − a, queueing included
- ITL: every gap t[k] − t[k−1], pooled over all requests
- TPOT = (E2E − TTFT) / (n − 1), one figure a request, for n ≥ 2
- E2E = e − a

Goodput is requests a second that met every stated objective. A request with one token has no TPOT,
so no objective for TPOT that it could miss.

Requests that failed or were cancelled have no latencies. Where there is nothing to average
(no gap, say, with one output token) a figure is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from pagelab.results import (
    MethodRun,
    Objectives,
    RequestResult,
    Spread,
    Summary,
    WorkloadRun,
)

SAME_WITHIN = 0.05  # figures that differ by less count as the same


def completed(requests: Iterable[RequestResult]) -> list[RequestResult]:
    """Requests that ended as asked, with at least one token."""
    return [r for r in requests if r["finish_reason"] in ("stop", "length") and r["token_times_s"]]


def ttft(request: RequestResult) -> float:
    """Time to first token: `first_token − arrival`, seconds."""
    return request["first_token_s"] - request["arrival_s"]


def inter_token_latencies(request: RequestResult) -> list[float]:
    """ITL: the gaps between a request's tokens, seconds; empty with fewer than two."""
    return [after - before for before, after in pairwise(request["token_times_s"])]


def tpot(request: RequestResult) -> float | None:
    """Time per output token: `(E2E − TTFT) / (n − 1)`, seconds; None with fewer than two."""
    tokens = len(request["output_token_ids"])
    return (end_to_end(request) - ttft(request)) / (tokens - 1) if tokens > 1 else None


def end_to_end(request: RequestResult) -> float:
    """E2E: `end − arrival`, seconds."""
    return request["finish_s"] - request["arrival_s"]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; 0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) by linear interpolation between closest ranks; 0 of nothing.

    With the values sorted, `x[0] … x[n-1]`, it is the value at rank `r = q/100 · (n−1)`:
    `x[⌊r⌋] + (r − ⌊r⌋) · (x[⌊r⌋+1] − x[⌊r⌋])`, as numpy's default.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile is from 0 to 100, not {q}")
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = q / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of the repeats' figures; zeros of nothing."""
    if not values:
        return {"median": 0.0, "min": 0.0, "max": 0.0}
    return {"median": percentile(values, 50), "min": min(values), "max": max(values)}


def is_close(a: Spread, b: Spread) -> bool:
    """Whether the medians differ by at most 5 % of the larger."""
    mine, other = a["median"], b["median"]
    return abs(mine - other) <= SAME_WITHIN * max(abs(mine), abs(other))


def differ(a: Spread, b: Spread) -> int:
    """1 if `a` is larger than `b`, -1 if smaller, 0 if no difference can be claimed.

    Within 5 % of each other, or with overlapping repeats, two figures count as the same.
    """
    overlap = a["min"] <= b["max"] and b["min"] <= a["max"]
    if overlap or is_close(a, b):
        return 0
    return 1 if a["median"] > b["median"] else -1


def output_rate(output_tokens: int, duration_s: float) -> float:
    """Output tokens a second; 0 when no time passed."""
    return output_tokens / duration_s if duration_s > 0 else 0.0


def meets(request: RequestResult, objectives: Objectives) -> bool:
    """Whether a completed request was as fast as stated, in everything that is stated."""
    values = (ttft(request), tpot(request), end_to_end(request))
    limits = (objectives["ttft_s"], objectives["tpot_s"], objectives["e2e_s"])
    return all(
        value is None or limit is None or value <= limit
        for value, limit in zip(values, limits, strict=True)
    )


def goodput(run: WorkloadRun, objectives: Objectives) -> float:
    """Requests a second that met every objective; 0 when no time passed."""
    good = sum(meets(request, objectives) for request in completed(run["requests"]))
    return good / run["duration_s"] if run["duration_s"] > 0 else 0.0


_FIGURES: dict[str, Callable[[WorkloadRun, list[RequestResult]], float]] = {
    "duration_s": lambda run, _: run["duration_s"],
    "output_tokens_per_s": lambda run, _: run["output_tokens_per_s"],
    "ttft_mean_s": lambda _, done: mean([ttft(r) for r in done]),
    "ttft_p95_s": lambda _, done: percentile([ttft(r) for r in done], 95),
    "itl_mean_s": lambda _, done: mean(_pooled_itl(done)),
    "itl_p95_s": lambda _, done: percentile(_pooled_itl(done), 95),
    "tpot_mean_s": lambda _, done: mean([x for r in done if (x := tpot(r)) is not None]),
    "e2e_mean_s": lambda _, done: mean([end_to_end(r) for r in done]),
    "mean_running": lambda run, _: run["ledger"]["mean_running"],
    "live_share": lambda run, _: run["ledger"]["live"],
    "num_preemptions": lambda run, _: run["num_preemptions"],
    "recomputed_per_output_token": lambda run, _: (
        run["recomputed_tokens"] / run["output_tokens"] if run["output_tokens"] else 0.0
    ),
}


def _pooled_itl(requests: Iterable[RequestResult]) -> list[float]:
    return [gap for request in requests for gap in inter_token_latencies(request)]


def summarize(runs: Sequence[MethodRun], objectives: Objectives | None = None) -> list[Summary]:
    """One entry for each label and workload, over every repeat that finished that workload.

    The peak RSS is the whole process's, so it is the same in all workloads of a run. Without
    `objectives`, or where none is stated, there is no goodput.
    """
    stated = objectives if objectives and any(v is not None for v in objectives.values()) else None
    groups: dict[tuple[str, str], list[tuple[MethodRun, WorkloadRun]]] = {}
    for run in runs:
        for workload in run["workloads"]:
            groups.setdefault((run["label"], workload["name"]), []).append((run, workload))
    return [_summary(label, name, pairs, stated) for (label, name), pairs in groups.items()]


def _summary(
    label: str,
    name: str,
    pairs: list[tuple[MethodRun, WorkloadRun]],
    objectives: Objectives | None,
) -> Summary:
    first = pairs[0][0]
    figures = {
        figure: spread([compute(w, completed(w["requests"])) for _, w in pairs])
        for figure, compute in _FIGURES.items()
    }
    return {
        "label": label,
        "workload": name,
        "axis": first["axis"],
        "settings": first["settings"],
        "simulated": first["simulated"],
        "repeats": len(pairs),
        "duration_s": figures["duration_s"],
        "output_tokens_per_s": figures["output_tokens_per_s"],
        "ttft_mean_s": figures["ttft_mean_s"],
        "ttft_p95_s": figures["ttft_p95_s"],
        "itl_mean_s": figures["itl_mean_s"],
        "itl_p95_s": figures["itl_p95_s"],
        "tpot_mean_s": figures["tpot_mean_s"],
        "e2e_mean_s": figures["e2e_mean_s"],
        "mean_running": figures["mean_running"],
        "peak_rss_bytes": spread([float(run["peak_rss_bytes"] or 0) for run, _ in pairs]),
        "live_share": figures["live_share"],
        "goodput_per_s": None
        if objectives is None
        else spread([goodput(workload, objectives) for _, workload in pairs]),
        "recomputed_per_output_token": figures["recomputed_per_output_token"],
        "num_preemptions": figures["num_preemptions"],
    }
