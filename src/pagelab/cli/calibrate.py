"""`pagelab calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--model", metavar="NAME", help="As in compare; default: SmolLM2-135M-Instruct.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: physical cores.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file; default: in the cache folder, where `pagelab simulate` finds it.",
)
def calibrate(out: Path | None, **options: Any) -> None:
    """Measure what steps cost on this machine, for `pagelab simulate`.

    Runs the real engine for about a minute; keep the machine quiet meanwhile.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pagelab.lab.calibrate import calibrate as run
    from pagelab.lab.calibrate import calibration_path

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading the model", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description="measuring steps")

        model = run(**options, on_progress=show)
    notes = model.provenance
    path = out or calibration_path(notes["model"], notes["dtype"])
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    click.echo(f"{model.name}: {notes['steps']} steps measured")
    click.echo(
        f"error of the {notes['held_out_steps']} steps that were not fitted: "
        f"{notes['held_out_mean_relative_error']:.1%} on average, "
        f"{notes['held_out_total_ratio'] - 1:+.1%} of their total time"
    )
    click.echo(str(path))
