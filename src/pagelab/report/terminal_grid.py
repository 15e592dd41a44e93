"""The cells beside the base one, in a terminal: sweeps as small tables, then every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagelab.report.figures import percent, rate, seconds, size, watermark
from pagelab.report.rows import Row, rows
from pagelab.report.sweeps import Measure, Sweep, placements, same_batch, sweeps
from pagelab.results import Results, RunSettings

MOST_CELLS = 60  # rows of the table of all cells; results.json and the report have all


class _Setting(NamedTuple):
    """A column of the table of all cells, shown where it varies."""

    head: str
    show: Callable[[RunSettings], str]


_SETTINGS = (
    _Setting("budget", lambda s: size(s["kv_memory_bytes"])),
    _Setting("block", lambda s: str(s["block_size"])),
    _Setting("mark", lambda s: watermark(s["watermark"])),
    _Setting("placement", lambda s: s["placement"]),
    _Setting("batch", lambda s: str(s["max_num_seqs"] or "–")),
)


def name_of(row: Row) -> str:
    """A row's method; a simulated one has a tilde before it."""
    return f"~ {row.method.name}" if row.method.simulated else row.method.name


def print_grid(results: Results, workload: str, console: Console) -> None:
    """What the cells beside the base one say; nothing where there are none."""
    for sweep in sweeps(results, workload):
        _print_sweep(sweep, console)
    _print_placements(placements(results, workload), console)
    _print_batch(same_batch(results, workload), console)
    _print_cells(rows(results, workload), console)


def _print_sweep(sweep: Sweep, console: Console) -> None:
    """A table a measure: methods down, values across."""
    labels = [sweep.setting.show(value) for value in sweep.values]
    for measure in sweep.setting.measures:
        grid = _grid(f"{sweep.setting.title}: {measure.title}")
        for label in labels:
            grid.add_column(label, justify="right", no_wrap=True)
        for line in sweep.lines:
            at = dict(line.points)
            cells = [_figure(measure, at[v]) if v in at else "–" for v in sweep.values]
            grid.add_row(Text(name_of(line.points[0][1])), *cells)
        console.print()
        console.print(grid)


def _print_placements(table: Sequence[Row], console: Console) -> None:
    if not table:
        return
    grid = _grid("Placement")
    for head in ("", "tok/s", "at once", "external", "rounded up"):
        grid.add_column(head, justify="right" if head else "left", no_wrap=True)
    for row in table:
        grid.add_row(
            Text(name_of(row)),
            row.method.settings["placement"],
            rate(row.summary["output_tokens_per_s"]["median"]),
            rate(row.summary["mean_running"]["median"]),
            percent(row.share("external")),
            percent(row.share("rounding")),
        )
    console.print()
    console.print(grid)


def _print_batch(table: Sequence[Row], console: Console) -> None:
    if len(table) < 2:
        return
    reference = table[0].summary["output_tokens_per_s"]["median"]
    grid = _grid("The same batch for all")
    for head in ("tok/s", "against the first", "ITL", "at once"):
        grid.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(table):
        speed = row.summary["output_tokens_per_s"]["median"]
        change = f"{(speed / reference - 1) * 100:+.1f} %" if i and reference else "–"
        grid.add_row(
            Text(name_of(row)),
            rate(speed),
            change,
            seconds(row.summary["itl_mean_s"]["median"]),
            rate(row.summary["mean_running"]["median"]),
        )
    console.print()
    console.print(grid)


def _print_cells(table: Sequence[Row], console: Console) -> None:
    """Every cell, where there are more than the tables before have shown."""
    if all(row.method.base or row.method.axis == "batch" for row in table):
        return
    settings = [s for s in _SETTINGS if len({s.show(r.method.settings) for r in table}) > 1]
    wide = console.width >= 120
    grid = _grid("Every cell")
    for setting in settings:
        grid.add_column(setting.head, justify="right", no_wrap=True)
    for head in ("tok/s", "at once", *(("TTFT", "ITL", "live", "preempted") if wide else ())):
        grid.add_column(head, justify="right", no_wrap=True)
    for row in table[:MOST_CELLS]:
        summary = row.summary
        figures = [
            rate(summary["output_tokens_per_s"]["median"]),
            rate(summary["mean_running"]["median"]),
            seconds(summary["ttft_mean_s"]["median"]),
            seconds(summary["itl_mean_s"]["median"]),
            percent(summary["live_share"]["median"]),
            f"{summary['num_preemptions']['median']:,.0f}",
        ]
        cells = [setting.show(row.method.settings) for setting in settings]
        style = "bold" if row.method.base else ""
        shown = figures if wide else figures[:2]
        grid.add_row(Text(name_of(row)), *cells, *shown, style=style)
    console.print()
    console.print(grid)
    if len(table) > MOST_CELLS:
        console.print(Text(f"and {len(table) - MOST_CELLS} more in results.json", style="dim"))


def _figure(measure: Measure, row: Row) -> str:
    return measure.show(measure.of(row)["median"])


def _grid(title: str) -> Table:
    """A table that says at the head of its first column what it shows."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column(title, overflow="ellipsis", no_wrap=True)
    return grid
