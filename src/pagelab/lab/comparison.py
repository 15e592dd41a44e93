"""Rows of the comparison, and sentences about one against another.

Two figures are the same when they differ by at most 5 %, or when the ranges of their repeats
overlap. Otherwise the one in the direction that the figure wants (more tokens a second, less
time, less memory) is better. Every sentence is made from that verdict: there is one for winning,
one for no difference and one for losing, whichever the run shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pagelab.config import format_bytes
from pagelab.lab.methods import NATIVE
from pagelab.memory.allocators import ALLOCATORS, ContiguousMax, Paged
from pagelab.metrics import differ, is_close, percentile
from pagelab.results import (
    ExperimentInfo,
    Finding,
    LedgerShare,
    LedgerSummary,
    MethodRun,
    RunSettings,
    Spread,
    Summary,
    is_base,
)

Verdict = Literal["better", "worse", "same", "info"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of `Summary`, how it is called and shown, and which direction is good."""

    key: Literal[
        "output_tokens_per_s", "mean_running", "ttft_mean_s", "live_share", "peak_rss_bytes"
    ]
    what: str
    unit: str
    more_is_better: bool

    def show(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "bytes":
            return format_bytes(value)
        if self.unit == "%":
            return f"{value:.1%}"
        if self.unit == "s" and value < 1:
            return f"{value * 1e3:.3g} ms"
        number = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        return f"{number} {self.unit}".rstrip()


THROUGHPUT = Measure("output_tokens_per_s", "output tokens a second", "tok/s", True)
CONCURRENCY = Measure("mean_running", "requests running at a time", "", True)
TTFT = Measure("ttft_mean_s", "mean time to first token", "s", False)
LIVE = Measure("live_share", "share of the KV pool that holds tokens", "%", True)
PEAK = Measure("peak_rss_bytes", "peak memory of the process", "bytes", False)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the comparison on one workload.

    Attributes:
        summary: its figures over the repeats.
        run: its first run.
        ledgers: of its repeats.
    """

    summary: Summary
    run: MethodRun
    ledgers: tuple[LedgerSummary, ...]

    @property
    def label(self) -> str:
        """Its name, with its cell."""
        return self.run["label"]

    @property
    def name(self) -> str:
        """Its method and allocator, without its cell."""
        allocator = self.run["allocator"]
        return self.run["method"] if allocator is None else f"{NATIVE} {allocator}"

    @property
    def settings(self) -> RunSettings:
        """Its cell."""
        return self.run["settings"]

    @property
    def paged(self) -> bool:
        """Whether it is PagedAttention as this engine has it."""
        return self.run["allocator"] == Paged.name

    @property
    def contiguous_max(self) -> bool:
        """Whether it is this engine under the traditional reservation."""
        return self.run["allocator"] == ContiguousMax.name

    @property
    def contiguous(self) -> bool:
        """Whether it is this engine under one of its contiguous allocators."""
        allocator = ALLOCATORS.get(self.run["allocator"] or "")
        return allocator is not None and allocator.contiguous

    def share(self, state: LedgerShare) -> float:
        """The median share of the pool in a state, weighted by time."""
        return percentile([ledger[state] for ledger in self.ledgers], 50)


def rows_of(workload: str, runs: Sequence[MethodRun], summary: Sequence[Summary]) -> list[Row]:
    """All rows that finished a workload."""
    first: dict[str, MethodRun] = {}
    ledgers: dict[str, list[LedgerSummary]] = {}
    for run in runs:
        for entry in run["workloads"]:
            if entry["name"] == workload:
                first.setdefault(run["label"], run)
                ledgers.setdefault(run["label"], []).append(entry["ledger"])
    return [
        Row(entry, first[entry["label"]], tuple(ledgers[entry["label"]]))
        for entry in summary
        if entry["workload"] == workload
    ]


def base_rows(rows: Sequence[Row], experiment: ExperimentInfo) -> list[Row]:
    """Those of the base cell."""
    return [row for row in rows if is_base(row.run, experiment)]


def ours_among(rows: Sequence[Row]) -> Row | None:
    """The row that is compared with the others: paging, else one's own allocator that pages."""
    own = [r for r in rows if r.run["method"] == NATIVE and r.run["phase"] == "paged"]
    return next((row for row in own if row.paged), next(iter(own), None))


def compare_spreads(ours: Spread, theirs: Spread, *, more_is_better: bool) -> Verdict:
    """Ours against theirs: same within 5 % or where the repeats' ranges overlap, else by median."""
    order = differ(ours, theirs)
    if order == 0:
        return "same"
    return "better" if (order > 0) == more_is_better else "worse"


def compare(workload: str | None, measure: Measure, ours: Row, theirs: Row, where: str) -> Finding:
    """One figure of a row against the same figure of another; `where` says in which cell."""
    mine, other = ours.summary[measure.key], theirs.summary[measure.key]
    verdict = compare_spreads(mine, other, more_is_better=measure.more_is_better)
    left, right = mine["median"], other["median"]
    figures = {f"paged_{measure.key}": left, f"other_{measure.key}": right}
    if right > 0:
        figures["ratio"] = left / right
    values = f"{measure.show(left)} against {measure.show(right)}"
    scope = f"{measure.what} {where}"
    we = "paging" if ours.paged else ours.label
    if verdict == "same":
        why = "within 5 %" if is_close(mine, other) else "within the spread of the repeats"
        text = f"No difference between {we} and {theirs.label} in {scope}: {values} ({why})."
    elif verdict == "better":
        text = f"{we} beats {theirs.label} in {scope}: {values}{_times(left, right)}."
    else:
        text = f"{we} lost here to {theirs.label} in {scope}: {values}{_times(left, right)}."
    if ours.paged:
        text = text[0].upper() + text[1:]
    return {"workload": workload, "verdict": verdict, "text": text, "figures": figures}


def _times(mine: float, its: float) -> str:
    """How many times more or less, in the direction that reads well."""
    if mine <= 0 or its <= 0:
        return ""
    ratio = mine / its
    return f" ({ratio:.2f} times)" if ratio >= 1 else f" ({1 / ratio:.2f} times less)"


def in_cell(settings: RunSettings, experiment: ExperimentInfo) -> str:
    """In words: the budget, and the block size where several were tried."""
    text = f"at a KV budget of {format_bytes(settings['kv_memory_bytes'])}"
    if len(experiment["block_sizes"]) > 1:
        text += f" and blocks of {settings['block_size']}"
    return text


def info(workload: str | None, text: str, figures: dict[str, float] | None = None) -> Finding:
    """A finding that is neither for nor against."""
    return {"workload": workload, "verdict": "info", "text": text, "figures": figures or {}}


def point(value: float) -> Spread:
    """A figure without a spread."""
    return {"median": value, "min": value, "max": value}
