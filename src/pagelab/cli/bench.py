"""`pagelab bench throughput`, `pagelab bench latency` and `pagelab bench serve`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pagelab.cli.options import (
    ENGINE_NAMES,
    F,
    apply_options,
    command_line,
    engine_options,
    names,
)

if TYPE_CHECKING:
    from pagelab.bench.record import Record
    from pagelab.bench.settings import BenchSettings
    from pagelab.results import Objectives

_FILE = click.Path(path_type=Path, dir_okay=False)


def _engine_options(command: F) -> F:
    return apply_options(
        command,
        click.option(
            "--model",
            metavar="NAME",
            help="A folder, a .gguf file or a hub id; with --random-weights also the name of a "
            "built-in shape: gpt2, qwen3-0.6b, llama-3.1-8b, …  [default: SmolLM2-135M-Instruct]",
        ),
        click.option("--random-weights", is_flag=True, help="Draw the weights; no files needed."),
        engine_options,
        click.option(
            "--prefix-caching", is_flag=True, help="On: a repeat then finds its own prompts."
        ),
    )


def _run_options(command: F) -> F:
    return apply_options(
        command,
        click.option(
            "--workload",
            metavar="SPEC",
            help="prompts4, batch64, nano256, w2, or what `pagelab compare --workload` takes.  "
            "[default: prompts4]",
        ),
        click.option("--num-requests", type=int, help="How many, with lengths or a generator."),
        click.option("--input-len", type=int, help="Tokens of every prompt."),
        click.option("--output-len", type=int, help="Tokens that every request generates."),
        click.option("--temperature", default=0.0, show_default=True, help="0 is greedy."),
        click.option("--warmup", default=1, show_default=True, help="Runs that are not counted."),
        click.option("--repeats", default=3, show_default=True, help="Runs that are."),
        click.option("--seed", default=0, show_default=True, help="Of ids, arrivals, sampling."),
        click.option(
            "--limits/--no-limits",
            default=True,
            show_default=True,
            help="Measure what this machine could do (two seconds).",
        ),
        click.option("--json", "json_path", type=_FILE, help="Write everything here."),
        click.option("--csv", "csv_path", type=_FILE, help="Write a line a repeat here."),
        click.option(
            "--profile", type=_FILE, help="Write a trace of an extra run here, for Perfetto."
        ),
    )


def _objectives(_: click.Context, __: click.Parameter, value: str) -> Objectives:
    from pagelab.lab.settings import parse_objectives

    return parse_objectives(value)


@click.group()
def bench() -> None:
    """Measure speed and waiting times, against what this machine could do."""


@bench.command()
@_engine_options
@_run_options
def throughput(**options: Any) -> None:
    """All requests at once: tokens a second, and how far that is from the machine's limit."""
    from pagelab.bench.throughput import bench_throughput

    _run(bench_throughput, options)


@bench.command()
@_engine_options
@_run_options
@click.option(
    "--concurrency", type=int, help="Requests at the same time.  [default: 1, without --rate]"
)
@click.option(
    "--rate",
    metavar="RATE",
    help="When requests arrive: burst, 4 or poisson:4 (requests a second), gamma:4,cv=2, trace.",
)
def latency(**options: Any) -> None:
    """One request after another, or as they arrive: TTFT, ITL, TPOT and their percentiles."""
    from pagelab.bench.latency import bench_latency

    _run(bench_latency, options)


@bench.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Of the server.")
@click.option("--api-key", envvar="PAGELAB_API_KEY", metavar="KEY", help="For it.")
@click.option("--model", metavar="NAME", help="To ask for.  [default: the server's first]")
@click.option(
    "--tokenizer",
    metavar="NAME",
    help="Prompts are counted in its tokens: a folder, a .gguf file or a hub id.  [default: the "
    "default model's]",
)
@click.option("--send-ids", is_flag=True, help="Send prompts as token ids, exact in length.")
@click.option("--chat", is_flag=True, help="Use /v1/chat/completions.")
@click.option(
    "--workload",
    default="uniform:in=16..256,out=16..128,n=64",
    show_default=True,
    metavar="SPEC",
    help="What `pagelab compare --workload` takes.",
)
@click.option("--requests", "num_requests", type=int, help="How many of it.")
@click.option(
    "--rate",
    metavar="RATE",
    help="Open loop: 4 or poisson:4 (requests a second), gamma:4,cv=2, trace, trace:2, burst.  "
    "[default: the workload's own times]",
)
@click.option("--concurrency", type=int, help="Closed loop: so many at a time.")
@click.option("--warmup", default=2, show_default=True, help="Requests that are not counted.")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    show_default=True,
    help="Have every token generated (a field that PageLab and vLLM know; others may refuse it).",
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", default=0, show_default=True, help="Of lengths, arrivals, intervals.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Of one request.")
@click.option(
    "--objective",
    "objectives",
    callback=_objectives,
    default="ttft=2,tpot=0.2",
    show_default=True,
    help="What goodput counts, of ttft, tpot and e2e, in seconds.",
)
@click.option(
    "--offline",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A record of `pagelab bench throughput --json`: how far is the server behind it?",
)
@click.option("--json", "json_path", type=_FILE, help="Write everything here.")
@click.option("--html", "html_path", type=_FILE, help="Write the report page here.")
def serve(**options: Any) -> None:
    """Load on an OpenAI-compatible server: TTFT, ITL, TPOT and goodput with their confidence."""
    from rich.console import Console

    from pagelab.bench.record import check_paths
    from pagelab.bench.serve import ServeBench, bench_serve, save, table

    json_path, html_path = options.pop("json_path"), options.pop("html_path")
    check_paths(json_path, html_path)
    settings = ServeBench(**options)
    console = Console(stderr=True)
    with console.status("warming up") as status:
        record = bench_serve(
            settings,
            command_line(),
            lambda ended, of, _: status.update(f"{ended} of {of} requests have ended"),
        )
    click.echo(table(record))
    if json_path is not None:
        save(record, json_path)
    if html_path is not None:
        from pagelab.report.load import write_load_html

        write_load_html(record, html_path)
    if record["num_failed"]:
        raise click.exceptions.Exit(1)


@bench.command()
@click.option("--model", metavar="NAME", help="As for `throughput`.")
@click.option(
    "--precisions",
    default="bfloat16,int8,q4",
    show_default=True,
    callback=names,
    help="Each against float32, on a CPU by the compiled extension.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="K/V of the precisions; float32, which they are compared with, keeps float32.",
)
@click.option("--max-tokens", type=int, help="Of the fixed text.  [default: all of it]")
@click.option("--json", "json_path", type=_FILE, help="Write the figures here.")
def quality(
    model: str | None,
    precisions: tuple[str, ...],
    kv_cache_dtype: str,
    max_tokens: int | None,
    json_path: Path | None,
) -> None:
    """What lower precision costs: perplexity, top-1 agreement and divergence from float32."""
    import dataclasses
    import json

    from rich.console import Console
    from rich.table import Table

    from pagelab.bench.quality import bench_quality

    table = Table(title="quality on a fixed text", title_justify="left", box=None)
    for heading in ("precision", "tokens", "perplexity", "top-1 agreement", "KL (nats)"):
        table.add_column(heading, justify="right")
    found = []
    rows = bench_quality(model, precisions, max_tokens=max_tokens, kv_cache_dtype=kv_cache_dtype)
    for row in rows:
        found.append(dataclasses.asdict(row))
        figures = (f"{row.perplexity:.3f}", f"{row.top1_agreement:.1%}", f"{row.divergence:.4f}")
        table.add_row(row.precision, f"{row.tokens:,}", *figures)
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def _run(bench: Callable[[BenchSettings, Any, str], Record], options: dict[str, Any]) -> None:
    from rich.console import Console

    from pagelab.bench.progress import BenchProgress
    from pagelab.bench.record import check_paths, save_csv, save_json
    from pagelab.bench.tables import print_record

    settings = _settings(options)
    json_path, csv_path = options["json_path"], options["csv_path"]
    check_paths(json_path, csv_path, settings.profile)
    record = bench(settings, BenchProgress(Console(stderr=True)), command_line())
    print_record(record, Console())
    if json_path is not None:
        save_json(record, json_path)
    if csv_path is not None:
        save_csv(record, csv_path)


def _settings(options: dict[str, Any]) -> BenchSettings:
    from pagelab.bench.settings import BenchSettings, EngineChoice
    from pagelab.bench.workloads import WorkloadChoice

    def taken(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    engine = EngineChoice(**taken("model", "random_weights", "prefix_caching", *ENGINE_NAMES))
    workload = WorkloadChoice(
        name=options["workload"], **taken("num_requests", "input_len", "output_len", "rate")
    )
    return BenchSettings(
        engine=engine,
        workload=workload,
        **taken("temperature", "warmup", "repeats", "seed", "limits", "profile", "concurrency"),
    )
