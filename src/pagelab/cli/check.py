"""`pagelab check`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def check(as_json: bool) -> None:
    """Show what this machine has, what will run here and what will not."""
    from rich.console import Console

    from pagelab.lab.check import check_environment, render_check

    environment = check_environment()
    if as_json:
        click.echo(json.dumps(environment, indent=2))
    else:
        render_check(environment, Console())
