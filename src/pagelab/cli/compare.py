"""`pagelab compare` and `pagelab report`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pagelab.cli.options import command_line, grid_options, names, workload_options

if TYPE_CHECKING:
    from rich.console import Console

    from pagelab.results import Objectives, Results


def _objectives(_: click.Context, __: click.Parameter, value: str) -> Objectives:
    from pagelab.lab.settings import parse_objectives

    return parse_objectives(value)


@click.command()
@click.option(
    "--methods",
    callback=names,
    metavar="NAMES",
    help="Of hf-generate, hf-static, hf-continuous-batching, vllm, pagelab, module:Class.  "
    "[default: hf-generate,hf-static,pagelab]",
)
@click.option(
    "--allocators",
    callback=names,
    metavar="NAMES",
    help="Of the method pagelab: contiguous-max, contiguous-pow2, contiguous-oracle, "
    "reserved-paged, paged, or your own as module:Class or file.py:Class.  "
    "[default: contiguous-max,paged]",
)
@grid_options
@workload_options
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="auto (a GPU if there is one), cpu, cuda or cuda:N; the same for all methods.",
)
@click.option(
    "--axes",
    callback=names,
    metavar="NAMES",
    help="Of budget (the same bytes for all) and batch (the same number of requests at once: "
    "what contiguous-max holds, or --batch).  [default: both]",
)
@click.option("--batch", type=int, help="Requests at once on the same-batch axis.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    help="0 is greedy; above, the methods' tokens are not compared.",
)
@click.option(
    "--objective",
    "objectives",
    callback=_objectives,
    default="ttft=2,tpot=0.2",
    show_default=True,
    metavar="SECONDS",
    help="What goodput counts, of ttft, tpot and e2e; 0.2 s a token is about a reader's pace. "
    "none: no goodput.",
)
@click.option("--repeats", default=1, show_default=True, help="Runs of each row.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("pagelab-results"),
    show_default=True,
    help="Folder for results.json, ledger.jsonl, report.html and logs.",
)
@click.option("--pause", is_flag=True, help="Wait for Enter between the phases.")
def compare(pause: bool, **options: Any) -> None:
    """Run the experiment: the traditional method, PagedAttention, and what the figures say.

    Every method runs in a process of its own, on the same prompts, under the same budget of
    bytes for K/V. Options with several values, as --kv-memory 64MiB,128MiB, make a grid: every
    combination is a run. Without options about three minutes on 2 cores.
    """
    from rich.console import Console

    from pagelab.lab.experiment import RESULTS_FILE, run_experiment
    from pagelab.lab.ledger_file import LEDGER_FILE
    from pagelab.lab.progress import CompareProgress
    from pagelab.lab.settings import ExperimentSettings

    given = {name: value for name, value in options.items() if value is not None}
    settings = ExperimentSettings(
        command=command_line(),
        debug=click.get_current_context().find_root().params["debug"],
        **given,
    )
    console = Console()
    with CompareProgress(console) as progress:

        def wait() -> None:
            progress.close()
            with contextlib.suppress(EOFError):  # nobody there to press it
                console.input("\nPress Enter for PagedAttention ")

        results = run_experiment(settings, progress, between_phases=wait if pause else None)
    _render(
        results,
        settings.out / RESULTS_FILE,
        settings.out / "report.html",
        console,
        {"ledger": settings.out / LEDGER_FILE},
    )
    if not results["complete"]:
        sys.exit(130)


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Where the page goes.")
def report(results: Path, html: Path | None) -> None:
    """Render the report of a RESULTS file (results.json) again."""
    from rich.console import Console

    from pagelab.results import load_results

    _render(load_results(results), results, html or results.with_name("report.html"), Console())


def _render(
    data: Results, source: Path, html: Path, console: Console, more: dict[str, Path] | None = None
) -> None:
    from pagelab.report.html import write_html
    from pagelab.report.terminal import print_summary

    write_html(data, html)
    print_summary(data, console, {"results": source, **(more or {}), "report": html})
