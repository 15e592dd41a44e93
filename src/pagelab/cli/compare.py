"""`pagelab compare` and `pagelab report`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pagelab.cli.options import command_line, model_options, names

if TYPE_CHECKING:
    from rich.console import Console

    from pagelab.results import Results


@click.command()
@model_options
@click.option(
    "--workload",
    "workloads",
    callback=names,
    metavar="NAMES",
    help="Of prompts, mixed, large; several with commas.  [default: prompts,mixed]",
)
@click.option(
    "--methods",
    callback=names,
    metavar="NAMES",
    help="Of hf-generate, hf-static, pagelab, module:Class.  [default: the first three]",
)
@click.option(
    "--allocators",
    callback=names,
    metavar="NAMES",
    help="Of the method pagelab.  [default: contiguous-max,paged]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The same for all methods.",
)
@click.option("--repeats", default=1, show_default=True, help="Runs of each method.")
@click.option("--seed", default=0, show_default=True, help="Of the generated workloads.")
@click.option("--watermark", default=0.05, show_default=True, help="Share kept at admission.")
@click.option("--max-num-batched-tokens", default=512, show_default=True, help="Of one step.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("pagelab-results"),
    show_default=True,
    help="Folder for results.json, report.html and logs.",
)
@click.option("--pause", is_flag=True, help="Wait for Enter between the phases.")
def compare(pause: bool, **options: Any) -> None:
    """Run the experiment: the traditional method, PagedAttention, and what the figures say.

    Every method runs in a process of its own, on the same prompts, under the same budget of
    bytes for K/V. About two minutes on 2 cores.
    """
    from rich.console import Console

    from pagelab.config import parse_bytes
    from pagelab.lab.experiment import RESULTS_FILE, run_experiment
    from pagelab.lab.progress import CompareProgress
    from pagelab.lab.settings import ExperimentSettings

    if options["kv_memory"] is not None:
        options["kv_memory"] = parse_bytes(options["kv_memory"])
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
    _render(results, settings.out / RESULTS_FILE, settings.out / "report.html", console)
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


def _render(data: Results, source: Path, html: Path, console: Console) -> None:
    from pagelab.report.html import write_html
    from pagelab.report.terminal import print_summary

    write_html(data, html)
    print_summary(data, console, {"results": source, "report": html})
