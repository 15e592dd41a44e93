"""`pagelab plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pagelab.sim.planner import MemoryPlan
    from pagelab.sim.planner_output import Plan
    from pagelab.sim.planner_simulation import Simulated

_SIZES = ("kv_memory", "gpu_memory", "activation_memory", "graph_memory")
_SETTINGS = (
    "gpu_memory_utilization",
    "tp",
    "dtype",
    "kv_dtype",
    "max_model_len",
    "block_size",
    "max_num_batched_tokens",
    "max_num_seqs",
)


@click.command()
@click.option(
    "--model",
    metavar="NAME",
    help="A folder, a .gguf file, a hub id (config.json alone is fetched) or a built-in shape: "
    "gpt2, qwen3-0.6b, llama-3.1-8b, gemma-3-27b, … Without it: the default model's.",
)
@click.option("--gpu", metavar="CARD", help="h100, a100-80, l4, rtx-4090, …: memory, bandwidth.")
@click.option("--gpu-memory", metavar="BYTES", help="The whole card, e.g. 24GiB.")
@click.option("--gpu-memory-utilization", default=0.9, show_default=True, help="Share to use.")
@click.option("--kv-memory", metavar="BYTES", help="For K/V on each device, instead.")
@click.option("--activation-memory", metavar="BYTES", help="Instead of the estimate.")
@click.option("--graph-memory", metavar="BYTES", help="Instead of the estimate; 0 without graphs.")
@click.option("--tp", default=1, show_default=True, help="Devices that share the model.")
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    help="Of the weights: float32, bfloat16, float16, fp8, int8.",
)
@click.option("--kv-dtype", help="Of K/V, the same choice.  [default: as the weights]")
@click.option("--max-model-len", type=int, help="Tokens a request may reach.")
@click.option("--block-size", default=16, show_default=True, help="Tokens a block of the pool.")
@click.option("--max-num-batched-tokens", default=512, show_default=True, help="Of one step.")
@click.option("--max-num-seqs", default=256, show_default=True, help="Of one step (estimates).")
@click.option("--bandwidth", metavar="RATE", help="Of a device, e.g. 3.35TB/s.")
@click.option("--workload", metavar="SPEC", help="A trace file, sharegpt-like:n=500, uniform:…, …")
@click.option("--skip-bad", is_flag=True, help="Leave malformed lines of a trace out.")
@click.option("--seed", default=0, show_default=True, help="Of generated workloads.")
@click.option("--placement", default="buddy", show_default=True, help="buddy or first-fit.")
@click.option("--watermark", default=0.05, show_default=True, help="Of the simulation.")
@click.option("--replay-requests", type=click.IntRange(1), help="Of the simulation.")
@click.option("--no-simulation", is_flag=True, help="Formulas only.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--explain", is_flag=True, help="Show the arithmetic line by line.")
def plan(as_json: bool, explain: bool, **options: Any) -> None:
    """Say what fits: blocks, tokens and requests of a model in a card's memory.

    Needs no weights and no GPU, only the model's config.json. With --workload: how many of its
    requests run at once under each allocator, by formula and by simulation.
    """
    from pagelab.sim.planner_output import print_plan, to_json

    found = _plan(options)
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
        return
    from rich.console import Console

    print_plan(found, Console(), explain=explain)


def _plan(options: dict[str, Any]) -> Plan:
    from pagelab.models.shape_source import load_shape
    from pagelab.sim.planner import PlanSettings, plan_memory
    from pagelab.sim.planner_cards import find_card, parse_bandwidth
    from pagelab.sim.planner_output import Plan

    sizes: dict[str, Any] = {name: _size(name, options[name]) for name in _SIZES}
    bandwidth = parse_bandwidth(options["bandwidth"]) if options["bandwidth"] else None
    if options["gpu"]:
        card = find_card(options["gpu"])
        bandwidth = bandwidth or card.bandwidth
        if sizes["gpu_memory"] is None:
            sizes["gpu_memory"] = card.memory_bytes
    given = sizes | {name: options[name] for name in _SETTINGS}
    settings = PlanSettings(**given)
    memory = plan_memory(load_shape(options["model"]), settings)
    if not options["workload"]:
        return Plan(memory=memory, bandwidth=bandwidth)
    return _with_workload(memory, bandwidth, options)


def _with_workload(memory: MemoryPlan, bandwidth: float | None, options: dict[str, Any]) -> Plan:
    from rich.console import Console

    from pagelab.sim.planner_output import Plan
    from pagelab.sim.planner_simulation import replay_mean_running, simulate
    from pagelab.sim.planner_workload import plan_workload
    from pagelab.workloads import ShapeOptions, open_shapes

    shape_options = ShapeOptions(
        max_model_len=memory.max_model_len, too_long="drop", skip_bad=options["skip_bad"]
    )
    stream = open_shapes(options["workload"], seed=options["seed"], options=shape_options)
    placement = options["placement"]
    workload = plan_workload(memory, stream, placement=placement, bandwidth=bandwidth)
    counts = stream.counts
    simulated: Mapping[str, Simulated] = {}
    if not options["no_simulation"]:
        with Console(stderr=True).status("replaying") as status:
            simulated = simulate(
                memory,
                workload,
                stream,
                replay_mean_running,
                placement=placement,
                watermark=options["watermark"],
                num_requests=options["replay_requests"],
                on_start=lambda name: status.update(f"replaying under {name}"),
            )
    return Plan(
        memory=memory,
        workload=workload,
        simulated=simulated,
        workload_title=stream.title,
        dropped=counts.dropped,
        left_out=counts.sentence(),
        bandwidth=bandwidth,
    )


def _size(name: str, text: str | None) -> int | None:
    """A size option; the error names it."""
    from pagelab.config import parse_bytes
    from pagelab.errors import ConfigError

    if text is None or (text.strip() == "0" and name.startswith(("graph", "activation"))):
        return None if text is None else 0
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"--{name.replace('_', '-')}: {error}") from error
