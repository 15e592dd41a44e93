"""`pagelab generate`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from pagelab.cli.options import ENGINE_NAMES, engine_options, model_options

if TYPE_CHECKING:
    from pagelab.engine.llm import LLM
    from pagelab.types import RequestOutput, SamplingParams


@click.command()
@click.argument("prompts", nargs=-1, required=True)
@model_options
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
@engine_options
@click.option(
    "--allocator", default="paged", show_default=True, help="One of the five, or module:Class."
)
@click.option(
    "-v",
    "--explain-memory",
    is_flag=True,
    help="Show who gets what of the memory (to standard error).",
)
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

    chosen = {name: options[name] for name in ENGINE_NAMES if options[name] is not None}
    llm = LLM(options["model"], allocator=options["allocator"], **chosen)
    if options["explain_memory"]:
        from rich.console import Console

        from pagelab.memory.budget_table import budget_table

        Console(stderr=True).print(budget_table(llm.memory_budget))
    return llm


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
