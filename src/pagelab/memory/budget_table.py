"""A memory budget as one table: every row in bytes and in percent of the device."""

from __future__ import annotations

from rich.table import Table

from pagelab.config import format_bytes
from pagelab.memory.budget import MemoryBudget

Row = tuple[str, int, str]
"""Name, bytes, remark; names of parts of the row above begin with two spaces."""


def budget_rows(budget: MemoryBudget) -> list[Row]:
    """The rows of the sum, from the total to what is left; parts of activations are indented."""
    share = budget.utilization
    return [
        ("total", budget.total_bytes, ""),
        ("in use before", budget.used_before_bytes, _users(budget)),
        ("weights", budget.weight_bytes, ""),
        ("activations", budget.activation_bytes, "allocated once, or a step's peak"),
        *((f"  {name}", size, "") for name, size in budget.activations.items()),
        ("graphs", budget.graph_bytes, "an allowance" if budget.graph_bytes else ""),
        (
            "K/V",
            budget.kv_bytes,
            f"{budget.num_blocks:,} blocks, {budget.tokens:,} tokens,\n"
            f"{budget.full_requests:,.2f} requests of {budget.max_model_len:,}",
        ),
        (
            "left free",
            budget.left_bytes,
            "K/V as given" if share is None else f"{share:g} of what was free is used",
        ),
    ]


def budget_table(budget: MemoryBudget) -> Table:
    """The table for people."""
    table = Table(
        title=f"memory of {budget.device}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for name in ("bytes", "", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, size, remark in budget_rows(budget):
        part = name.startswith(" ")
        share = f"{size / budget.total_bytes:.1%}" if budget.total_bytes else ""
        label = name if part else f"[bold]{name}[/]"
        table.add_row(
            label, f"{size:,}", format_bytes(size), share, remark, style="dim" if part else None
        )
    return table


def _users(budget: MemoryBudget) -> str:
    if budget.device.startswith("cuda"):
        return "others, and this process's CUDA context"
    return "others, and this process so far"
