"""A plan for people (a table) and for programs (plain data)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from pagelab.config import format_bytes
from pagelab.sim.planner import MemoryPlan, kv_dtype
from pagelab.sim.planner_explain import Line, explain_memory, explain_workload
from pagelab.sim.planner_simulation import Simulated
from pagelab.sim.planner_workload import WorkloadPlan

LIMIT_NOTE = (
    "decode limit: each weight read once a step and live K/V once a token, at full bandwidth, "
    "at the concurrency by formula; a limit, not a promise"
)
FORMULA_NOTE = (
    "formula: the pool at saturation, with no holes between ranges and no preemptions; the "
    "simulation has both"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that `pagelab plan` found.

    Attributes:
        memory: what fits.
        workload: the workload by formula; None without one.
        simulated: the same by replay; empty without one.
        workload_title: the workload, for people.
        dropped: requests longer than `max_model_len`, left out.
        left_out: what else the workload left out, a sentence.
        bandwidth: bytes a second of a device.
    """

    memory: MemoryPlan
    workload: WorkloadPlan | None = None
    simulated: Mapping[str, Simulated] = field(default_factory=dict)
    workload_title: str = ""
    dropped: int = 0
    left_out: str = ""
    bandwidth: float | None = None

    def notes(self) -> tuple[str, ...]:
        """What the reader should know, a sentence each."""
        notes = list(self.memory.shape.notes)
        if self.memory.full_requests < 1:
            notes.append(
                f"not even one request of {self.memory.max_model_len:,} tokens fits: lower "
                "--max-model-len or raise --kv-memory"
            )
        if self.workload is not None:
            notes += [self.left_out] if self.left_out else []
            if self.workload.too_large:
                notes.append(f"{self.workload.too_large:,} larger than the whole pool, left out")
            notes.append(FORMULA_NOTE)
            if self.bandwidth is not None:
                notes.append(LIMIT_NOTE)
        return tuple(notes)

    def explain(self) -> tuple[Line, ...]:
        """The arithmetic, line by line."""
        lines = list(explain_memory(self.memory))
        if self.workload is not None:
            lines += explain_workload(self.memory, self.workload, self.bandwidth)
        return tuple(lines)


def difference(formula: float | None, simulated: float | None) -> float | None:
    """By how much the formula is above the simulation, as a share of the simulation."""
    if formula is None or not simulated:
        return None
    return formula / simulated - 1


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data; sizes in bytes, of one device."""
    memory, shape = plan.memory, plan.memory.shape
    return {
        "model": {
            "name": shape.name,
            "num_parameters": shape.parameters.total,
            "num_parameters_exact": shape.exact,
            "max_position": shape.max_position,
            "kv_groups": [
                {
                    "num_layers": group.num_layers,
                    "num_kv_heads": group.num_kv_heads,
                    "head_dim": group.head_dim,
                    "window": group.window,
                    "pages_per_block": pages,
                }
                for group, pages in zip(
                    memory.layout.groups, memory.layout.pages_per_block, strict=True
                )
            ],
        },
        "dtype": memory.settings.dtype,
        "kv_dtype": kv_dtype(memory.settings),
        "tp": memory.settings.tp,
        "max_model_len": memory.max_model_len,
        "block_size": memory.layout.block_size,
        "weight_bytes": memory.weight_bytes,
        "activation_bytes": memory.activation_bytes,
        "graph_bytes": memory.graph_bytes,
        "kv_bytes": memory.kv_bytes,
        "total_bytes": memory.total_bytes,
        "kv_bytes_per_token": memory.layout.bytes_per_token,
        "page_bytes": memory.layout.page_bytes,
        "unit": memory.unit,
        "num_pages": memory.num_pages,
        "tokens": memory.tokens,
        "full_length_requests": memory.full_requests,
        "bandwidth": plan.bandwidth,
        "workload": None if plan.workload is None else _workload_json(plan, plan.workload),
        "notes": list(plan.notes()),
        "explain": [str(line) for line in plan.explain()],
    }


def _workload_json(plan: Plan, workload: WorkloadPlan) -> dict[str, Any]:
    allocators = {}
    for name, found in workload.allocators.items():
        simulated = plan.simulated.get(name, Simulated(None, "not simulated"))
        allocators[name] = {
            "held_pages": found.held_pages,
            "mean_running_formula": found.formula,
            "mean_running_simulated": simulated.running,
            "difference": difference(found.formula, simulated.running),
            "why_no_formula": found.why,
            "why_no_simulation": simulated.why,
            "decode_limit_tokens_per_s": found.decode_limit,
        }
    return {
        "title": plan.workload_title,
        "num_requests": workload.moments.num_requests,
        "num_dropped": plan.dropped,
        "num_too_large": workload.too_large,
        "mean_input_tokens": workload.moments.mean_input,
        "mean_output_tokens": workload.moments.mean_output,
        "mean_live_tokens": workload.moments.mean_live,
        "live_bytes": workload.live_bytes,
        "allocators": allocators,
    }


def print_plan(plan: Plan, console: Console, *, explain: bool = False) -> None:
    """Print a plan as tables; with its arithmetic if wanted."""
    each = " on each device" if plan.memory.settings.tp > 1 else ""
    table = Table(title=f"{plan.memory.shape.name}{each}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for label, value in _rows(plan.memory):
        table.add_row(label, value)
    console.print(table)
    if plan.workload is not None:
        console.print(_workload_table(plan, plan.workload))
    for note in plan.notes():
        console.print(f"· {note}", style="bright_black", highlight=False, markup=False)
    if explain:
        console.print()
        for line in plan.explain():
            console.print(str(line), highlight=False, markup=False, soft_wrap=True)


def _rows(memory: MemoryPlan) -> Iterator[tuple[str, str]]:
    settings, layout = memory.settings, memory.layout
    exact = "" if memory.shape.exact else "about "
    yield (
        f"weights ({exact}{memory.shape.parameters.total:,}, {settings.dtype})",
        format_bytes(memory.weight_bytes),
    )
    estimate = {True: " (estimate)", False: ""}
    yield (
        f"activations{estimate[settings.activation_memory is None]}",
        format_bytes(memory.activation_bytes),
    )
    yield f"graphs{estimate[settings.graph_memory is None]}", format_bytes(memory.graph_bytes)
    yield f"K/V ({kv_dtype(settings)})", format_bytes(memory.kv_bytes)
    yield "in all", format_bytes(memory.total_bytes)
    yield "K/V bytes a token", f"{layout.bytes_per_token:,}"
    for group, pages in zip(layout.groups, layout.pages_per_block, strict=True):
        if group.window is not None:
            taken = f", {pages} pages a block" if len(layout.groups) > 1 else ""
            yield f"  {group.num_layers} layers, window {group.window:,}{taken}", ""
        elif len(layout.groups) > 1:
            yield f"  {group.num_layers} layers, full, {pages} pages a block", ""
    yield f"{memory.unit} (block size {layout.block_size})", f"{memory.num_pages:,}"
    yield "tokens", f"{memory.tokens:,}"
    yield f"requests of {memory.max_model_len:,} tokens", f"{memory.full_requests:,.2f}"


def _workload_table(plan: Plan, workload: WorkloadPlan) -> Table:
    m = workload.moments
    table = Table(
        title=f"{plan.workload_title}: {m.num_requests:,} requests, on average "
        f"{m.mean_input:,.0f} tokens in, {m.mean_output:,.0f} out",
        title_justify="left",
        caption="mean requests running at saturation",
        caption_justify="left",
    )
    table.add_column("allocator", no_wrap=True)
    heads = ["formula", "simulated", "difference"]
    heads += ["decode limit"] if plan.bandwidth is not None else []
    for head in heads:
        table.add_column(head, justify="right")
    for name, found in workload.allocators.items():
        simulated = plan.simulated.get(name, Simulated(None)).running
        gap = difference(found.formula, simulated)
        cells = [
            "–" if found.formula is None else f"{found.formula:,.2f}",
            "–" if simulated is None else f"{simulated:,.2f}",
            "–" if gap is None else f"{gap:+.1%}",
        ]
        if plan.bandwidth is not None:
            limit = found.decode_limit
            cells.append("–" if limit is None else f"{limit:,.0f} tok/s")
        table.add_row(name, *cells)
    return table
