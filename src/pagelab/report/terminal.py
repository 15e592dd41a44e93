"""The report in a terminal: the same figures, in as many columns as fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagelab.config import format_bytes
from pagelab.report.figures import interval, percent, rate, seconds
from pagelab.report.headline import headline
from pagelab.report.rows import Row, not_ok, shown_rows
from pagelab.report.terminal_grid import name_of, print_grid
from pagelab.report.words import STATES
from pagelab.results import Equality, Finding, Results, Spread

MOST_FINDINGS = 40  # the report has all

_STYLES = {
    "live": "blue",
    "reserved": "cyan",
    "internal": "yellow",
    "cached": "green",
    "free": "bright_black",
    "external": "magenta",
}
_VERDICTS = {
    "better": ("▲ better", "green"),
    "worse": ("▼ worse", "red"),
    "same": ("= same", "yellow"),
    "info": ("· note", "bright_black"),
}


class Column(NamedTuple):
    """A column of the side-by-side table; `wide` ones need a terminal of 120 columns."""

    head: str
    show: Callable[[Row], str]
    wide: bool = False


def _median(row: Row, name: str) -> float:
    spread: Spread = row.summary[name]  # type: ignore[literal-required]
    return spread["median"]


def _goodput(row: Row) -> str:
    met = row.summary["goodput_per_s"]
    return "–" if met is None else rate(met["median"])


def _speed_range(row: Row) -> str:
    spread = row.summary["output_tokens_per_s"]
    return interval(rate(spread["min"]), rate(spread["max"])) or "–"


_COLUMNS = (
    Column("tok/s", lambda r: rate(_median(r, "output_tokens_per_s"))),
    Column("repeats", _speed_range, wide=True),
    Column("goodput", _goodput, wide=True),
    Column("time", lambda r: seconds(_median(r, "duration_s"))),
    Column("TTFT", lambda r: seconds(_median(r, "ttft_mean_s"))),
    Column("TTFT p95", lambda r: seconds(_median(r, "ttft_p95_s")), wide=True),
    Column("ITL", lambda r: seconds(_median(r, "itl_mean_s"))),
    Column("at once", lambda r: rate(_median(r, "mean_running"))),
    Column("peak", lambda r: str(r.peak_running), wide=True),
    Column("live", lambda r: percent(_median(r, "live_share"))),
    Column("RSS", lambda r: format_bytes(_median(r, "peak_rss_bytes")).replace(".0 ", " ")),
    Column(
        "start-up",
        lambda r: "–" if r.method.startup_s is None else seconds(r.method.startup_s),
        wide=True,
    ),
)


def print_summary(
    results: Results, console: Console, files: Mapping[str, Path] | None = None
) -> None:
    """Print what an experiment found.

    Args:
        results: of the experiment.
        console: where to; its width decides how many columns there are, and where it is no
            terminal nothing is coloured.
        files: names and paths of what was written, named at the end.
    """
    console.print()
    console.print(Text(headline(results), style="bold"))
    if any(run["simulated"] for run in results["runs"]):
        model = results["experiment"]["cost_model"] or "not named"
        console.print(
            Text(f"Rows with ~ are simulated, not measured. Cost model: {model}", "yellow")
        )
    if not results["complete"]:
        note = results["note"] or "The experiment ended early."
        console.print(Text(f"Not complete. {note}", style="yellow"))
    for run in not_ok(results):
        repeat = f" (repeat {run['repeat'] + 1})" if results["experiment"]["repeats"] > 1 else ""
        line = f"{run['label']}{repeat} {run['status']}: {run['reason'] or 'no reason was given'}"
        console.print(Text(line, style="yellow"))
    for workload in results["experiment"]["workloads"]:
        table = shown_rows(results, workload["name"])
        if table:
            console.print()
            console.print(Text.assemble((workload["name"], "bold"), f"  {workload['title']}"))
            console.print(_side_by_side(table, console.width))
            _print_bars(table, console)
            print_grid(results, workload["name"], console)
    _print_equality(results["equality"], console)
    _print_analysis(results["analysis"], console)
    _print_files(files or {}, console)


def _side_by_side(table: list[Row], width: int) -> Table:
    columns = [c for c in _COLUMNS if width >= 120 or not c.wide]
    if all(row.summary["repeats"] == 1 for row in table):
        columns = [c for c in columns if c.head != "repeats"]
    if all(row.summary["goodput_per_s"] is None for row in table):
        columns = [c for c in columns if c.head != "goodput"]
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column("method", overflow="ellipsis", no_wrap=True)
    for column in columns:
        grid.add_column(column.head, justify="right", no_wrap=True)
    for row in table:
        style = "bold" if row.method.phase == "paged" else ""
        cells = (column.show(row) for column in columns)
        grid.add_row(Text(name_of(row)), *cells, style=style)
    return grid


def _print_bars(table: list[Row], console: Console) -> None:
    with_ledger = [row for row in table if row.shares]
    if not with_ledger:
        return
    longest = max(len(name_of(row)) for row in with_ledger)
    width = max(10, min(60, console.width - longest - len("  8.8 % live")))
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    grid.add_column("method", overflow="ellipsis", no_wrap=True)
    grid.add_column("bar", no_wrap=True)
    grid.add_column("live", justify="right", no_wrap=True)
    for row in with_ledger:
        live = f"{percent(row.shares['live'])} live"
        grid.add_row(Text(name_of(row)), ledger_bar(row.shares, width), live)
    console.print()
    console.print(_bar_legend())
    console.print(grid)


def ledger_bar(shares: Mapping[str, float], width: int) -> Text:
    """The division of the pool as a bar of `width` characters.

    Each state starts with its letter and goes on in its own shade, so that it reads without
    colour: `L███R▓I▒▒▒▒▒F··X░░`. Shares are rounded so that the bar is exactly full.
    """
    bar = Text()
    total = sum(shares.values()) or 1.0
    passed, drawn = 0.0, 0
    for state in STATES:
        passed += shares.get(state.name, 0.0) / total
        end = round(passed * width)
        cells = max(0, end - drawn)
        if cells:
            bar.append(state.letter + state.fill * (cells - 1), style=_STYLES[state.name])
        drawn = max(drawn, end)
    return bar


def _bar_legend() -> Text:
    legend = Text("KV pool", style="dim")
    for state in STATES:
        legend.append(f"  {state.letter}{state.fill}", style=_STYLES[state.name])
        legend.append(f" {state.name}", style="dim")
    return legend


def _print_equality(entries: list[Equality], console: Console) -> None:
    if not entries:
        return
    console.print()
    console.print(Text(f"Outputs, token by token against {entries[0]['reference']}", style="bold"))
    by_label: dict[str, list[Equality]] = {}
    for entry in entries:
        by_label.setdefault(entry["label"], []).append(entry)
    for label, group in by_label.items():
        equal = all(entry["equal"] == entry["total"] for entry in group)
        counts = ", ".join(f"{e['workload']} {e['equal']} of {e['total']}" for e in group)
        first = next((d for e in group for d in e["differences"]), None)
        where = f"; first: {first['request']}, output token {first['position']}" if first else ""
        style = "green" if equal else "yellow"
        console.print(Text.assemble(("= " if equal else "≠ ", style), f"{label}: {counts}{where}"))


def _print_analysis(findings: list[Finding], console: Console) -> None:
    if not findings:
        return
    console.print()
    console.print(Text("Analysis (of paging)", style="bold"))
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    grid.add_column("verdict", no_wrap=True)
    grid.add_column("text", ratio=1)
    for finding in findings[:MOST_FINDINGS]:
        word, style = _VERDICTS[finding["verdict"]]
        where = f"{finding['workload']}: " if finding["workload"] else ""
        grid.add_row(Text(word, style=style), Text(where + finding["text"]))
    console.print(grid)
    if len(findings) > MOST_FINDINGS:
        more = len(findings) - MOST_FINDINGS
        console.print(Text(f"{more} more findings are in the report.", style="dim"))


def _print_files(files: Mapping[str, Path], console: Console) -> None:
    if not files:
        return
    console.print()
    width = max(map(len, files))
    for name, path in files.items():
        line = Text.assemble((f"{name:{width}}  ", "dim"), str(path))
        console.print(line, soft_wrap=True)  # a path stays whole
