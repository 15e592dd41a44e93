"""`pagelab reproduce`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pagelab.sim.reproduce import Reproduction


@click.command()
@click.argument("figure", type=click.Choice(["fig2", "fig13", "fig15"]))
@click.option("--trace", metavar="SPEC", help="Other lengths: a trace file or a generator.")
@click.option("--seed", default=0, show_default=True, help="Of the generated lengths.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def reproduce(figure: str, trace: str | None, seed: int, as_json: bool) -> None:
    """Replay a memory FIGURE of the PagedAttention paper, beside its own numbers.

    fig2: where the pool goes. fig13: requests in a batch. fig15: what parallel samples save. All
    figures are simulated: the real scheduler and allocators, with OPT-13B's budget.
    """
    from rich.console import Console

    from pagelab.sim.reproduce import FIGURES

    with Console(stderr=True).status("replaying") as status:
        found = FIGURES[figure](trace, seed=seed, on_start=status.update)
    if as_json:
        data = {
            "figure": found.figure,
            "title": found.title,
            "lengths": found.lengths,
            "simulated": True,
            "comparisons": [item._asdict() for item in found.comparisons],
        }
        click.echo(json.dumps(data, indent=2))
    else:
        _print(found)


def _print(found: Reproduction) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{found.figure}: {found.title} (simulated)", style="bold"))
    console.print(Text(found.lengths, style="dim"))
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column("")
    grid.add_column("figure", no_wrap=True)
    for head in ("here", "paper", "off"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("within", no_wrap=True)
    grid.add_column("note", ratio=1)
    last = ""
    for item in found.comparisons:
        off = "" if item.paper is None else f"{item.measured - item.paper:+.1f}"
        grid.add_row(
            Text(item.row if item.row != last else ""),
            item.figure,
            f"{item.measured:.1f}",
            "–" if item.paper is None else f"{item.paper:.1f}",
            off,
            {True: "yes", False: "NO", None: ""}[item.within],
            Text(item.note, style="dim"),
        )
        last = item.row
    console.print(grid)
