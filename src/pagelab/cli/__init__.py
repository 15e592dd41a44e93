"""The command line: parse and wire, nothing else; one module a command. Heavy imports wait for the
command that needs them, so that `pagelab --help` is quick.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from pagelab import __version__
from pagelab.cli.bench import bench
from pagelab.cli.calibrate import calibrate
from pagelab.cli.check import check
from pagelab.cli.compare import compare, report
from pagelab.cli.generate import generate
from pagelab.cli.plan import plan
from pagelab.cli.reproduce import reproduce
from pagelab.cli.serve import serve
from pagelab.cli.simulate import simulate
from pagelab.errors import PageLabError


class _Commands(click.Group):
    """Turns our errors into one line and exit code 1, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PageLabError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pagelab")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def main(debug: bool) -> None:
    """PageLab: a PagedAttention engine that you can measure."""


for command in (
    check,
    bench,
    calibrate,
    generate,
    compare,
    plan,
    report,
    reproduce,
    serve,
    simulate,
):
    main.add_command(command)
