"""The rows of a comparison: which methods there are, and what each has on a workload.

A method in one cell of the grid is one `Method` (its `label` is unique), on one workload one
`Row`. Charts over time show the rows of the base cell (`shown`), tables all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean

from pagelab.memory.allocators import ALLOCATORS
from pagelab.metrics import spread
from pagelab.report.styles import Style, styles
from pagelab.report.words import STATES
from pagelab.results import (
    Axis,
    KVCapacity,
    LedgerShare,
    MethodRun,
    Phase,
    Results,
    RunSettings,
    Spread,
    Startup,
    Status,
    Summary,
    WorkloadRun,
    is_base,
)

MOST_SHOWN = 12  # methods in charts over time, where nothing ran in the base cell


@dataclass(frozen=True, slots=True)
class Method:
    """One method in one cell of the grid, over its repeats."""

    label: str  # unique
    name: str  # method and allocator; the same in every cell
    base: bool
    phase: Phase
    engine: str  # hf-generate, hf-static, pagelab
    allocator: str | None
    axis: Axis
    settings: RunSettings
    simulated: bool
    status: Status  # ok when any repeat is
    reason: str | None
    kv: KVCapacity | None
    startup: Startup | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    first: MethodRun  # the first repeat that went through, else the first
    style: Style

    @property
    def color(self) -> str:
        """A CSS value."""
        return self.style.color

    @property
    def dash(self) -> tuple[int, ...]:
        """Of its line in charts, so that colour alone is never needed."""
        return self.style.dash

    @property
    def startup_s(self) -> float | None:
        """Seconds before the first measured request."""
        if self.startup is None:
            return None
        return self.startup["import_s"] + self.startup["load_s"] + self.startup["warmup_s"]

    @property
    def cell(self) -> str:
        """What its label says beyond its name: where it stands in the grid."""
        return self.label.removeprefix(self.name).removeprefix(", ")

    @property
    def contiguous(self) -> bool:
        """Whether it is one of PageLab's contiguous allocators."""
        allocator = ALLOCATORS.get(self.allocator or "")
        return allocator is not None and allocator.contiguous


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one workload, over its repeats."""

    method: Method
    summary: Summary
    runs: list[WorkloadRun]

    @property
    def peak_running(self) -> int:
        """The most requests that ever ran at once."""
        return max((run["ledger"]["peak_running"] for run in self.runs), default=0)

    @property
    def shares(self) -> dict[str, float]:
        """Mean shares of the pool by ledger state; empty where nothing was recorded."""
        means: dict[str, float] = {
            state.name: self.share(state.name) for state in STATES if self.runs
        }
        return means if sum(means.values()) > 0 else {}

    def share(self, name: LedgerShare) -> float:
        """The mean of one share of the pool: a ledger state, `rounding` or `shared_saved`."""
        return fmean(run["ledger"][name] for run in self.runs) if self.runs else 0.0

    def share_spread(self, name: LedgerShare) -> Spread:
        """The same over the repeats."""
        return spread([run["ledger"][name] for run in self.runs])


def methods(results: Results) -> list[Method]:
    """The methods, cell by cell, in the order in which they ran."""
    groups: dict[str, list[MethodRun]] = {}
    for run in results["runs"]:
        groups.setdefault(run["label"], []).append(run)
    firsts = {label: _first(runs) for label, runs in groups.items()}
    names = _names(results, list(firsts.values()))
    # Methods without figures are in no chart and take no style from those that are.
    order = sorted(firsts.values(), key=lambda run: not run["workloads"])
    looks = styles((names[run["label"]], run["phase"]) for run in order)
    return [
        _method(results, names[label], looks[names[label]], first, groups[label])
        for label, first in firsts.items()
    ]


def _first(runs: list[MethodRun]) -> MethodRun:
    good = [run for run in runs if run["status"] == "ok"]
    return (good or [run for run in runs if run["workloads"]] or runs)[0]


def _names(results: Results, runs: list[MethodRun]) -> dict[str, str]:
    """Method and allocator of each label; the label itself where two shown rows were alike."""
    names = {
        run["label"]: f"pagelab {run['allocator']}" if run["allocator"] else run["method"]
        for run in runs
    }
    drawn = [run["label"] for run in _shown(results, runs)]
    counts = Counter(names[label] for label in drawn)
    alike = {label for label in drawn if counts[names[label]] > 1}
    return {label: label if label in alike else name for label, name in names.items()}


def _shown(results: Results, runs: list[MethodRun]) -> list[MethodRun]:
    """Of the first runs of all cells those of the base cell, else the first that have figures."""
    base = [run for run in runs if is_base(run, results["experiment"])]
    if any(run["workloads"] for run in base):
        return base
    return [run for run in runs if run["workloads"]][:MOST_SHOWN]


def _method(
    results: Results, name: str, style: Style, first: MethodRun, runs: list[MethodRun]
) -> Method:
    return Method(
        label=first["label"],
        name=name,
        base=is_base(first, results["experiment"]),
        phase=first["phase"],
        engine=first["method"],
        allocator=first["allocator"],
        axis=first["axis"],
        settings=first["settings"],
        simulated=first["simulated"],
        status=first["status"],
        reason=first["reason"],
        kv=first["kv"],
        startup=first["startup"],
        peak_rss_bytes=max((r["peak_rss_bytes"] or 0 for r in runs), default=0) or None,
        peak_device_bytes=max(r["peak_device_bytes"] or 0 for r in runs) or None,
        first=first,
        style=style,
    )


def shown(results: Results) -> list[Method]:
    """The methods of the base cell; where none has figures there, the first that have any."""
    every = methods(results)
    labels = {run["label"] for run in _shown(results, [method.first for method in every])}
    return [method for method in every if method.label in labels]


def rows(results: Results, workload: str) -> list[Row]:
    """All methods that have figures for a workload: those of the base cell first."""
    return _rows(results, sorted(methods(results), key=lambda m: not m.base), workload)


def shown_rows(results: Results, workload: str) -> list[Row]:
    """Of these the ones that charts over time show."""
    return _rows(results, shown(results), workload)


def _rows(results: Results, found: list[Method], workload: str) -> list[Row]:
    summaries = {s["label"]: s for s in results["summary"] if s["workload"] == workload}
    return [
        Row(method, summaries[method.label], workload_runs(results, method.label, workload))
        for method in found
        if method.label in summaries
    ]


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


def workload_names(results: Results) -> list[str]:
    """Workloads that any method finished, in the order in which they were asked."""
    done = {w["name"] for run in results["runs"] for w in run["workloads"]}
    return [w["name"] for w in results["experiment"]["workloads"] if w["name"] in done]
