"""`pagelab simulate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pagelab.cli.options import command_line, grid_options, names, workload_options

if TYPE_CHECKING:
    from pagelab.lab.settings import ExperimentSettings
    from pagelab.lab.simulated import SimulatedCell
    from pagelab.sim.cost_model import CostModel


@click.command()
@click.option(
    "--allocators",
    callback=names,
    metavar="NAMES",
    help="As in compare.  [default: contiguous-max,paged]",
)
@grid_options
@workload_options
@click.option(
    "--cost-model",
    metavar="NAME",
    help="unit (a step is a second), roofline:h100 (a card's limits), or a file of `pagelab "
    "calibrate`.  [default: this machine's calibration]",
)
@click.option("--max-num-seqs", default=256, show_default=True, help="Requests at once.")
@click.option("--no-prefix-cache", is_flag=True, help="Look no prefixes up.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write every step of a small simulation, and a report, into this folder.",
)
def simulate(
    cost_model: str | None,
    max_num_seqs: int,
    no_prefix_cache: bool,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Serve a workload in virtual time: the real scheduler and allocators, no model.

    Options with several values make a grid, as in compare. Needs no weights: --model takes the
    built-in shapes of `pagelab plan` too (gpt2, llama-3.1-8b, …).
    """
    from pagelab.lab.settings import ExperimentSettings
    from pagelab.lab.simulated import find_cost_model
    from pagelab.models.shape_source import load_shape

    options["methods"] = ("pagelab",)
    given = {name: value for name, value in options.items() if value is not None}
    settings = ExperimentSettings(command=command_line(), **given)
    shape = load_shape(settings.model)
    cost = find_cost_model(cost_model, shape, settings.dtype)
    if out is not None:
        _write(settings, cost, out, max_num_seqs, not no_prefix_cache)
        return
    cells = _run(settings, shape, cost, max_num_seqs, not no_prefix_cache)
    if as_json:
        click.echo(json.dumps([_plain(cell) for cell in cells], indent=2))
    else:
        _print(cells, cost)
    if all(cell.summary is None for cell in cells):
        sys.exit(1)


def _run(
    settings: ExperimentSettings,
    shape: Any,
    cost: CostModel,
    max_num_seqs: int,
    prefix_caching: bool,
) -> list[SimulatedCell]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from pagelab.lab.simulated import simulate_cells

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f} requests, {task.speed:,.0f} a second"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task("", total=None, speed=0.0)

        def start(label: str, stream: Any) -> None:
            p.reset(task, description=label)

        return list(
            simulate_cells(
                settings,
                shape,
                cost,
                max_num_seqs=max_num_seqs,
                prefix_caching=prefix_caching,
                on_start=start,
                on_progress=lambda done, virtual: p.update(task, completed=done),
            )
        )


def _write(
    settings: ExperimentSettings,
    cost: CostModel,
    out: Path,
    max_num_seqs: int,
    prefix_caching: bool,
) -> None:
    from rich.console import Console

    from pagelab.lab.experiment import RESULTS_FILE
    from pagelab.lab.ledger_file import LEDGER_FILE, append_ledger, start_ledger
    from pagelab.lab.simulated import simulated_results
    from pagelab.report.html import write_html
    from pagelab.report.terminal import print_summary
    from pagelab.results import save_results

    with Console(stderr=True).status("simulating") as status:
        results = simulated_results(
            settings,
            cost,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
            on_start=status.update,
        )
    save_results(results, out / RESULTS_FILE)
    start_ledger(out / LEDGER_FILE)
    for run in results["runs"]:
        append_ledger(out / LEDGER_FILE, run)
    write_html(results, out / "report.html")
    files = {
        "results": out / RESULTS_FILE,
        "ledger": out / LEDGER_FILE,
        "report": out / "report.html",
    }
    print_summary(results, Console(), files)


def _plain(cell: SimulatedCell) -> dict[str, Any]:
    summary = cell.summary
    found: dict[str, Any] = {
        "workload": cell.workload,
        "label": cell.variant.label,
        "settings": cell.cell._asdict(),
        "simulated": True,
        "reason": cell.reason,
    }
    if summary is not None:
        figures = summary._asdict()
        for name, value in figures.items():
            found[name] = value._asdict() if hasattr(value, "_asdict") else value
        found["output_tokens_per_s"] = summary.output_tokens_per_s
        found["requests_per_s"] = summary.requests_per_s
        found["recomputed_per_output_token"] = summary.recomputed_per_output_token
    return found


def _print(cells: list[SimulatedCell], cost: CostModel) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"Simulated, with the cost model {cost.name}", style="bold"))
    console.print(
        Text(
            "once: requests running at a time; live, waste: shares of the pool; redone: tokens "
            "computed again for each one generated",
            style="dim",
        )
    )
    for workload in dict.fromkeys(cell.workload for cell in cells):
        mine = [cell for cell in cells if cell.workload == workload]
        first = next((cell.summary for cell in mine if cell.summary is not None), None)
        console.print()
        if first is not None:
            console.print(
                Text.assemble(
                    (workload, "bold"),
                    f"  {first.requests:,} requests, {first.prompt_tokens:,} tokens in, "
                    f"{first.output_tokens:,} out",
                )
            )
        grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        grid.add_column("allocator", min_width=17, overflow="fold")
        for head in "tok/s once live waste TTFT p99 TPOT preempt redone".split():
            grid.add_column(head, justify="right", no_wrap=True)
        for cell in mine:
            if cell.summary is not None:
                grid.add_row(Text(cell.variant.label.removeprefix("pagelab ")), *_figures(cell))
        console.print(grid)
        for cell in mine:
            if cell.summary is None:
                console.print(Text(f"{cell.variant.label}: {cell.reason}", style="yellow"))
            elif cell.summary.refused:
                console.print(
                    Text(
                        f"{cell.variant.label}: {cell.summary.refused:,} requests refused: "
                        f"{cell.summary.first_refusal}",
                        style="yellow",
                    )
                )


def _figures(cell: SimulatedCell) -> list[str]:
    from pagelab.report.figures import percent, rate, seconds

    found = cell.summary
    assert found is not None
    ledger = found.ledger
    return [
        rate(found.output_tokens_per_s),
        rate(found.mean_running),
        percent(ledger.live),
        percent(ledger.reserved + ledger.internal + ledger.external),
        seconds(found.ttft.mean),
        seconds(found.ttft.p99),
        seconds(found.tpot.mean),
        f"{found.preemptions:,}",
        f"{found.recomputed_per_output_token:.2f}",
    ]
