"""Figures as people read them, and the rows in which methods stand side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from pagelab.config import format_bytes
from pagelab.report.words import STATES
from pagelab.results import (
    KVCapacity,
    MethodRun,
    Phase,
    Results,
    Spread,
    Startup,
    Status,
    Summary,
    WorkloadRun,
)


def seconds(value: float) -> str:
    """A duration with about three digits: `0.4 ms`, `120 ms`, `1.23 s`, `54.9 s`."""
    if value == 0:
        return "0 s"
    if abs(value) < 0.0995:
        return f"{value * 1e3:.1f} ms"
    if abs(value) < 0.9995:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if abs(value) < 9.995 else f"{value:,.1f} s"


def rate(value: float) -> str:
    """A rate or a mean with about three digits: `0.83`, `9.6`, `119`."""
    if abs(value) < 0.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share of one in percent: `55 %`, `1.2 %` where small."""
    value = share * 100
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


def times(ratio: float) -> str:
    """How many times as much: `2.6`, `0.83`."""
    return f"{ratio:.2f}" if ratio < 0.995 else f"{ratio:.1f}" if ratio < 99.5 else f"{ratio:,.0f}"


def interval(low: str, high: str) -> str:
    """Two figures as a range with one unit: `54.5–58.4 ms`; empty where they read the same."""
    if low == high:
        return ""
    number, _, unit = low.partition(" ")
    return f"{number if unit and high.endswith(f' {unit}') else low}–{high}"


def joined(names: Iterable[str]) -> str:
    """Names as a list in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def differ(a: Spread, b: Spread) -> int:
    """1 if `a` is larger than `b`, -1 if smaller, 0 if no difference can be claimed.

    Within 5 % of each other, or with overlapping repeats, two figures count as the same.
    """
    if a["min"] <= b["max"] and b["min"] <= a["max"]:
        return 0
    if abs(a["median"] - b["median"]) <= 0.05 * max(abs(a["median"]), abs(b["median"])):
        return 0
    return 1 if a["median"] > b["median"] else -1


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the experiment, over its repeats."""

    label: str
    phase: Phase
    engine: str  # hf-generate, hf-static, pagelab
    status: Status  # ok when any repeat is
    reason: str | None
    kv: KVCapacity | None
    startup: Startup | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    first: MethodRun  # the first repeat that went through, else the first
    color: str  # a CSS value
    dash: tuple[int, ...]  # of its line in charts, so that colour alone is never needed

    @property
    def startup_s(self) -> float | None:
        """Seconds before the first measured request."""
        if self.startup is None:
            return None
        return self.startup["import_s"] + self.startup["load_s"] + self.startup["warmup_s"]


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one workload, over its repeats."""

    method: Method
    summary: Summary
    peak_running: int
    shares: dict[str, float]  # of the pool by ledger state; empty where nothing was recorded


# Lines are told apart by dashes as well as colours; the first paged method's is solid.
_DASHES: dict[Phase, tuple[tuple[int, ...], ...]] = {
    "paged": ((), (12, 3), (12, 3, 3, 3), (9, 2, 2, 2, 2, 2), (16, 4)),
    "traditional": ((2, 2), (6, 3), (6, 2, 2, 2), (3, 4), (9, 5)),
}


def methods(results: Results) -> list[Method]:
    """The methods in the order in which they ran."""
    groups: dict[str, list[MethodRun]] = {}
    for run in results["runs"]:
        groups.setdefault(run["label"], []).append(run)
    found: list[Method] = []
    for label, runs in groups.items():
        good = [r for r in runs if r["status"] == "ok"]
        first = (good or [r for r in runs if r["workloads"]] or runs)[0]
        # Methods without figures are in no chart and take no style from those that are.
        style = sum(m.phase == first["phase"] and bool(m.first["workloads"]) for m in found) % 5
        found.append(
            Method(
                label=label,
                phase=first["phase"],
                engine=first["method"],
                status=first["status"],
                reason=first["reason"],
                kv=first["kv"],
                startup=first["startup"],
                peak_rss_bytes=max((r["peak_rss_bytes"] or 0 for r in runs), default=0) or None,
                peak_device_bytes=max(r["peak_device_bytes"] or 0 for r in runs) or None,
                first=first,
                color=f"var(--{first['phase']}-{style})",
                dash=_DASHES[first["phase"]][style],
            )
        )
    return found


def rows(results: Results, workload: str) -> list[Row]:
    """The methods that have figures for a workload, side by side."""
    summaries = {s["label"]: s for s in results["summary"] if s["workload"] == workload}
    table: list[Row] = []
    for method in methods(results):
        summary = summaries.get(method.label)
        if summary is not None:
            done = workload_runs(results, method.label, workload)
            peak = max((w["ledger"]["peak_running"] for w in done), default=0)
            table.append(Row(method, summary, peak, _shares(done)))
    return table


def workload_runs(results: Results, label: str, workload: str) -> list[WorkloadRun]:
    """Every repeat of one method on one workload."""
    return [
        w
        for r in results["runs"]
        if r["label"] == label
        for w in r["workloads"]
        if w["name"] == workload
    ]


def first_run(method: Method, workload: str) -> WorkloadRun | None:
    """The repeat that charts over time show."""
    return next((w for w in method.first["workloads"] if w["name"] == workload), None)


def not_ok(results: Results) -> list[MethodRun]:
    """Runs that failed, were interrupted, or could not start."""
    return [r for r in results["runs"] if r["status"] != "ok"]


def capacity(kv: KVCapacity | None) -> str:
    """A method's KV capacity: `127.9 MiB, 2,912 slots`."""
    return "–" if kv is None else f"{format_bytes(kv['bytes'])}, {kv['slots']:,} slots"


def _shares(runs: list[WorkloadRun]) -> dict[str, float]:
    shares = {
        state.name: fmean(run["ledger"][state.name] for run in runs)  # type: ignore[literal-required]
        for state in STATES
        if runs
    }
    return shares if sum(shares.values()) > 0 else {}
