"""Findings: what the figures of a run say, computed from them and from nothing else.

Two figures are the same when they differ by at most 5 %, or when the ranges of their repeats
overlap. Otherwise the one in the direction that the figure wants (more tokens a second, less
time, less memory) is better. Every sentence is made from that verdict: there is one for paging
winning, one for no difference and one for paging losing, whichever the run shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pagelab.config import format_bytes
from pagelab.metrics import percentile
from pagelab.results import Equality, Finding, LedgerSummary, MethodRun, Spread, Summary

SAME_WITHIN = 0.05
BUSY_CORES = 0.15  # of a core in other programs' use: more than a quiet machine's background
PAGED = "pagelab paged"
CONTIGUOUS = "pagelab contiguous-max"

Verdict = Literal["better", "worse", "same", "info"]


@dataclass(frozen=True, slots=True)
class _Measure:
    """A figure of `Summary`, how it is called and shown, and which direction is good."""

    key: Literal[
        "output_tokens_per_s", "mean_running", "ttft_mean_s", "live_share", "peak_rss_bytes"
    ]
    what: str
    unit: str
    more_is_better: bool
    figure: str  # stem of the names in `Finding.figures`


THROUGHPUT = _Measure(
    "output_tokens_per_s", "output tokens a second", "tok/s", True, "output_tokens_per_s"
)
CONCURRENCY = _Measure("mean_running", "requests running at a time", "", True, "mean_running")
TTFT = _Measure("ttft_mean_s", "mean time to first token", "s", False, "ttft_mean_s")
LIVE = _Measure("live_share", "share of the KV pool that holds tokens", "%", True, "live_share")
PEAK = _Measure("peak_rss_bytes", "peak memory of the process", "bytes", False, "peak_rss_bytes")


def compare_spreads(ours: Spread, theirs: Spread, *, more_is_better: bool) -> Verdict:
    """Ours against theirs: same within 5 % or where the repeats' ranges overlap, else by median."""
    overlap = ours["min"] <= theirs["max"] and theirs["min"] <= ours["max"]
    if overlap or _close(ours, theirs):
        return "same"
    return "better" if (ours["median"] > theirs["median"]) == more_is_better else "worse"


def _close(ours: Spread, theirs: Spread) -> bool:
    mine, other = ours["median"], theirs["median"]
    return abs(mine - other) <= SAME_WITHIN * max(abs(mine), abs(other))


def analyse(
    runs: Sequence[MethodRun],
    summary: Sequence[Summary],
    equality: Sequence[Equality],
    kv_memory_bytes: int,
    other_load: Mapping[str, float] | None = None,
) -> list[Finding]:
    """All findings of an experiment, workload by workload, the most telling first.

    `other_load` has the cores that other programs took from each method while it ran.
    """
    findings: list[Finding] = []
    for name in dict.fromkeys(entry["workload"] for entry in summary):
        entries = {e["label"]: e for e in summary if e["workload"] == name}
        paged = entries.get(PAGED)
        if paged is None:
            findings.append(_no_paging(runs, name))
            continue
        others = [entry for entry in entries.values() if entry is not paged]
        findings += [_compare(name, THROUGHPUT, paged, e, kv_memory_bytes) for e in others]
        findings += _against_contiguous(name, paged, entries.get(CONTIGUOUS), kv_memory_bytes)
        findings += [_compare(name, TTFT, paged, e, kv_memory_bytes) for e in others]
        findings += _waste(runs, name)
        findings += _preemption_price(runs, name)
    findings += _peak_memory(summary, kv_memory_bytes)
    findings += [_equality(entry) for entry in equality]
    findings += _failures(runs)
    findings += _busy_machine(other_load or {})
    if summary and all(entry["repeats"] == 1 for entry in summary):
        findings.append(_one_repeat())
    return findings


def _compare(
    workload: str | None, measure: _Measure, paged: Summary, other: Summary, budget: int
) -> Finding:
    """One figure of paging against one other method's."""
    ours, theirs = paged[measure.key], other[measure.key]
    verdict = compare_spreads(ours, theirs, more_is_better=measure.more_is_better)
    mine, its = ours["median"], theirs["median"]
    figures = {f"paged_{measure.figure}": mine, f"other_{measure.figure}": its}
    values = f"{_show(mine, measure)} against {_show(its, measure)}"
    scope = f"{measure.what} at a KV budget of {format_bytes(budget)}"
    if its > 0:
        figures["ratio"] = mine / its
    label = other["label"]
    if verdict == "same":
        why = "within 5 %" if _close(ours, theirs) else "within the spread of the repeats"
        text = f"No difference between paging and {label} in {scope}: {values} ({why})."
    elif verdict == "better":
        text = f"Paging beats {label} in {scope}: {values}{_times(mine, its)}."
    else:
        text = f"Paging lost here to {label} in {scope}: {values}{_times(mine, its)}."
    return {"workload": workload, "verdict": verdict, "text": text, "figures": figures}


def _show(value: float, measure: _Measure) -> str:
    if measure.unit == "bytes":
        return format_bytes(value)
    if measure.unit == "%":
        return f"{value:.1%}"
    if measure.unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms"
    number = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{number} {measure.unit}".rstrip()


def _times(mine: float, its: float) -> str:
    """How many times more or less, in the direction that reads well."""
    if mine <= 0 or its <= 0:
        return ""
    ratio = mine / its
    return f" ({ratio:.2f} times)" if ratio >= 1 else f" ({1 / ratio:.2f} times less)"


def _against_contiguous(
    workload: str, paged: Summary, contiguous: Summary | None, budget: int
) -> list[Finding]:
    if contiguous is None:
        return []
    return [_compare(workload, m, paged, contiguous, budget) for m in (CONCURRENCY, LIVE)]


def _no_paging(runs: Sequence[MethodRun], workload: str) -> Finding:
    tried = [run for run in runs if run["label"] == PAGED]
    why = f": {_first_line(tried[0]['reason'])}" if tried and tried[0]["reason"] else ""
    state = "did not finish" if tried else "was not run"
    return {
        "workload": workload,
        "verdict": "info",
        "text": f"Paging {state} on this workload{why}; there is nothing to compare it with.",
        "figures": {},
    }


def _ledgers(runs: Sequence[MethodRun], workload: str) -> dict[str, list[LedgerSummary]]:
    """Ledger summaries of each method's repeats."""
    found: dict[str, list[LedgerSummary]] = {}
    for run in runs:
        for entry in run["workloads"]:
            if entry["name"] == workload:
                found.setdefault(run["label"], []).append(entry["ledger"])
    return found


def _waste(runs: Sequence[MethodRun], workload: str) -> list[Finding]:
    """Each method's live and wasted share of the pool; paging's waste against contiguous-max's."""
    wasted: dict[str, float] = {}
    parts: list[str] = []
    figures: dict[str, float] = {}
    for label, ledgers in _ledgers(runs, workload).items():
        live, reserved, internal, external = (
            percentile([ledger[state] for ledger in ledgers], 50)
            for state in ("live", "reserved", "internal", "external")
        )
        wasted[label] = reserved + internal + external
        figures[f"{label}: live"] = live
        figures[f"{label}: waste"] = wasted[label]
        parts.append(
            f"{label} {live:.1%} live, {wasted[label]:.1%} wasted (reserved {reserved:.1%}, "
            f"internal {internal:.1%}, external {external:.1%})"
        )
    text = f"Of the KV pool, weighted by time: {'; '.join(parts)}. "
    verdict: Verdict = "info"
    if CONTIGUOUS in wasted:
        ours, theirs = _point(wasted[PAGED]), _point(wasted[CONTIGUOUS])
        verdict = compare_spreads(ours, theirs, more_is_better=False)
        text += {
            "better": "Paging wastes less than contiguous-max.",
            "worse": "Paging wastes more than contiguous-max here.",
        }.get(verdict, "Paging and contiguous-max waste the same.")
    finding: Finding = {
        "workload": workload,
        "verdict": verdict,
        "text": text.strip(),
        "figures": figures,
    }
    return [finding]


def _point(value: float) -> Spread:
    return {"median": value, "min": value, "max": value}


def _preemption_price(runs: Sequence[MethodRun], workload: str) -> list[Finding]:
    """What paging paid for filling the pool: tokens computed again."""
    found = [
        entry
        for run in runs
        if run["label"] == PAGED
        for entry in run["workloads"]
        if entry["name"] == workload
    ]
    preempted = percentile([float(len(entry["preemptions"])) for entry in found], 50)
    recomputed = percentile(
        [float(sum(r["recomputed_tokens"] for r in entry["requests"])) for entry in found], 50
    )
    output = percentile([float(entry["output_tokens"]) for entry in found], 50)
    price = recomputed / output if output else 0.0
    if preempted == 0:
        verdict: Verdict = "info"
        text = "Paging preempted nobody: the pool was never full, and nothing was recomputed."
    else:
        verdict = "worse" if price > SAME_WITHIN else "info"
        text = (
            f"Paging preempted {preempted:g} times and recomputed {recomputed:g} tokens, "
            f"{price:.2f} for each token generated."
        )
    return [
        {
            "workload": workload,
            "verdict": verdict,
            "text": text,
            "figures": {
                "preemptions": preempted,
                "recomputed_tokens": recomputed,
                "recomputed_per_output_token": price,
            },
        }
    ]


def _peak_memory(summary: Sequence[Summary], budget: int) -> list[Finding]:
    """Peak memory is the process's, over all workloads: one finding for each other method."""
    first: dict[str, Summary] = {}
    for entry in summary:
        first.setdefault(entry["label"], entry)
    paged = first.get(PAGED)
    if paged is None:
        return []
    return [
        _compare(None, PEAK, paged, other, budget)
        for label, other in first.items()
        if label != PAGED and other["peak_rss_bytes"]["median"] > 0
    ]


def _equality(entry: Equality) -> Finding:
    equal, total = entry["equal"], entry["total"]
    figures = {"equal": float(equal), "total": float(total)}
    if equal == total:
        text = f"{entry['label']} gave the same tokens as {entry['reference']} for all {total}."
    else:
        earliest = min(entry["differences"], key=lambda difference: difference["position"])
        figures["first_position"] = float(earliest["position"])
        text = (
            f"{entry['label']} gave other tokens than {entry['reference']} for "
            f"{total - equal} of {total}; the earliest at position {earliest['position']} "
            f"of {earliest['request']}."
        )
    return {"workload": entry["workload"], "verdict": "info", "text": text, "figures": figures}


def _failures(runs: Sequence[MethodRun]) -> list[Finding]:
    return [
        {
            "workload": None,
            "verdict": "info",
            "text": f"{run['label']} (repeat {run['repeat'] + 1}) is {run['status']}: "
            f"{_first_line(run['reason'])}",
            "figures": {},
        }
        for run in runs
        if run["status"] != "ok"
    ]


def _busy_machine(other_load: Mapping[str, float]) -> list[Finding]:
    busy = {label: cores for label, cores in other_load.items() if cores >= BUSY_CORES}
    if not busy:
        return []
    parts = ", ".join(f"{cores:.1f} while {label} ran" for label, cores in busy.items())
    return [
        {
            "workload": None,
            "verdict": "info",
            "text": f"The machine was not idle: other programs used this many cores: {parts}. "
            "Times and rates of these methods, and what is said of them, are not to be trusted.",
            "figures": {f"{label}: other cores": cores for label, cores in busy.items()},
        }
    ]


def _first_line(text: str | None) -> str:
    return text.splitlines()[0] if text else "no reason known"


def _one_repeat() -> Finding:
    return {
        "workload": None,
        "verdict": "info",
        "text": "Each method ran once, so the spread between runs is not known: differences of "
        "10 or 15 % may be noise of the machine. --repeats 3 shows it.",
        "figures": {"repeats": 1.0},
    }
