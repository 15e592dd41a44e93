"""Checks of what a method delivers: figures that do not add up must not reach a report."""

from __future__ import annotations

from pagelab.results import KVCapacity, RequestResult, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest

_STATES = ("live", "reserved", "internal", "cached", "free", "external")


def problem_with(run: WorkloadRun, capacity: KVCapacity | None, asked: Workload) -> str | None:
    """The first thing wrong with a workload's results, for people; None if nothing is.

    Checked: the requests are those asked for, each generated exactly its tokens, times and
    tokens agree, preemptions and recomputed tokens are counted right, and at every step the
    ledger's states add up to the pool.
    """
    if capacity is None:
        return "it reported no KV capacity before its results"
    ids = [request["id"] for request in run["requests"]]
    if ids != [request.id for request in asked.requests]:
        return f"its results are for other requests: {ids[:3]}…"
    for request, result in zip(asked.requests, run["requests"], strict=True):
        problem = _problem_with_request(request, result)
        if problem is not None:
            return f"request {request.id}: {problem}"
    output = sum(len(result["output_token_ids"]) for result in run["requests"])
    if run["output_tokens"] != output:
        return f"it says {run['output_tokens']} output tokens and delivered {output}"
    return _problem_with_counts(run) or _problem_with_steps(run, capacity)


def _problem_with_request(request: WorkloadRequest, result: RequestResult) -> str | None:
    count = len(result["output_token_ids"])
    if len(result["token_times_s"]) != count:
        return f"{count} tokens and {len(result['token_times_s'])} token times"
    if result["finish_reason"] in ("error", "cancelled"):
        return None
    if count != request.max_tokens:
        return f"{count} tokens instead of {request.max_tokens}"
    times = [result["arrival_s"], *result["token_times_s"], result["finish_s"]]
    if times != sorted(times):
        return "its times run backwards"
    return None


def _problem_with_counts(run: WorkloadRun) -> str | None:
    listed = len(run["preemptions"])
    if run["num_preemptions"] != listed:
        return f"it says {run['num_preemptions']} preemptions and lists {listed}"
    recomputed = sum(result["recomputed_tokens"] for result in run["requests"])
    if run["recomputed_tokens"] != recomputed:
        return f"it says {run['recomputed_tokens']} recomputed tokens, its requests {recomputed}"
    return None


def _problem_with_steps(run: WorkloadRun, capacity: KVCapacity) -> str | None:
    steps = run["steps"]
    columns: dict[str, list[int]] = {name: steps[name] for name in _STATES}  # type: ignore[literal-required]
    lengths = {name: len(column) for name, column in columns.items()}
    lengths |= {"t": len(steps["t"]), "running": len(steps["running"])}
    lengths |= {"waiting": len(steps["waiting"]), "new_tokens": len(steps["new_tokens"])}
    lengths |= {"rounding": len(steps["rounding"]), "shared_saved": len(steps["shared_saved"])}
    if len(set(lengths.values())) > 1:
        return f"its step columns differ in length: {lengths}"
    for step, slots in enumerate(zip(*columns.values(), strict=True)):
        if min(slots) < 0 or sum(slots) != capacity["slots"]:
            split = ", ".join(f"{n} {v}" for n, v in zip(_STATES, slots, strict=True))
            return f"at step {step} the ledger is not the pool of {capacity['slots']}: {split}"
    for step, (rounding, external) in enumerate(
        zip(steps["rounding"], steps["external"], strict=True)
    ):
        if not 0 <= rounding <= external:
            return f"at step {step} rounding is {rounding} of {external} external slots"
    return None
