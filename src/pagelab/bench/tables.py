"""A benchmark's record as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagelab.bench.record import Record
from pagelab.config import format_bytes
from pagelab.memory.budget import MemoryBudget
from pagelab.memory.budget_table import budget_table

_POOLS = {
    "ttft": "first token (TTFT)",
    "itl": "between tokens (ITL)",
    "tpot": "a token of a request (TPOT)",
    "e2e": "whole request (E2E)",
}
_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
_MOST_OPERATIONS = 12
_BUSY_CORES = 0.1  # that others used: figures are then not to be believed


def print_record(record: Record, console: Console) -> None:
    """The settings, the figures, the limits, and where a step's time went."""
    _print(console, _settings(record))
    _print(console, budget_table(MemoryBudget(**record["memory_budget"])))
    _print(console, _figures(record))
    if record["kind"] == "latency":
        _print(console, _latencies(record))
    if record["reference"] is not None:
        _print(console, _reference(record))
    elif record["settings"]["limits"] and record["ceilings"] is None:
        console.print("[yellow]no limits: the device has no memory left to measure them in")
    if record["profile"] is not None:
        _print(console, _parts(record["profile"]))
        if record["profile"].get("native"):
            _print(console, _native(record["profile"], record["ceilings"]))
        _print(console, _operations(record["profile"]))
        console.print(f"trace: {escape(record['profile']['trace'])} (open it in Perfetto)")
    busy = max(repeat["other_load_cores"] for repeat in record["repeats"])
    if busy > _BUSY_CORES:
        console.print(
            f"[yellow]other programs used {busy:.1f} cores of a full machine meanwhile: "
            "repeat this when it is quiet"
        )


def seconds(value: float) -> str:
    """Three digits and a unit: `4.32 ms`."""
    if value >= 1000:
        return f"{value:,.0f} s"
    factor, unit = next(u for u in _UNITS if value * u[0] >= 1 or u is _UNITS[-1])
    number = value * factor
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"


def _print(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _table(title: str, *columns: str, header: bool = True) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=header)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right" if header else "left")
    return table


def _settings(record: Record) -> Table:
    engine, settings, environment = record["engine"], record["settings"], record["environment"]
    on_gpu = engine["device"].startswith("cuda")
    cards = [gpu["name"] for gpu in environment["gpus"]]
    machine = cards[0] if on_gpu and cards else environment["cpu"]["model"]
    torch = environment["torch"] or {"version": "unknown"}
    when = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    if settings["concurrency"] is not None:
        when += f", {settings['concurrency']} at a time"
    if settings["rate"] is not None:
        when += f", arrivals {settings['rate']}"
    startup = record["startup"]
    warmups = ", ".join(seconds(s) for s in startup["warmup_s"]) or "none"
    table = _table(f"pagelab bench {record['kind']}", "", "", header=False)
    for name, text in (
        (
            "model",
            f"{engine['model']}, {engine['parameters'] / 1e6:,.1f} M parameters"
            + (", random weights" if engine["random_weights"] else ""),
        ),
        (
            "machine",
            f"{machine}, {engine['device']}, {engine['dtype']}, torch {torch['version']}"
            + ("" if on_gpu else f", {engine['threads']} threads"),
        ),
        (
            "engine",
            f"{engine['num_blocks']:,} blocks of {engine['block_size']} "
            f"({format_bytes(engine['kv_bytes'])}), {engine['max_num_seqs']} sequences, "
            f"{engine['max_num_batched_tokens']:,} tokens a step, length "
            f"{engine['max_model_len']:,}, {engine['max_steps_in_flight']} steps in flight, "
            f"attention {engine['attention']}"
            + (f", {engine['quantization']} weights" if engine.get("quantization") else "")
            + (f", {kv} K/V" if (kv := engine.get("kv_dtype")) == "int8" else ""),
        ),
        ("workload", f"{record['workload']['name']}: {record['workload']['title']}; {when}"),
        (
            "start-up",
            f"import {seconds(startup['import_s'])}, construct {seconds(startup['construct_s'])}, "
            f"first token {seconds(startup['first_token_s'])}; warm-up {warmups}",
        ),
        ("peak memory", _memory(record["memory"])),
    ):
        table.add_row(f"[bold]{name}[/]", escape(text))
    return table


def _memory(memory: dict[str, int | None]) -> str:
    names = {
        "peak_rss_bytes": "host",
        "peak_device_allocated_bytes": "GPU allocated",
        "peak_device_reserved_bytes": "GPU reserved",
        "device_process_bytes": "GPU, whole process",
    }
    known = [(text, memory[name]) for name, text in names.items()]
    return ", ".join(f"{text} {format_bytes(size)}" for text, size in known if size is not None)


def _figures(record: Record) -> Table:
    summary, repeats = record["summary"], record["repeats"]
    title = f"{len(repeats)} repeat{'s' * (len(repeats) > 1)}"
    table = _table(title, "", "median", "smallest", "largest")
    rows: list[tuple[str, str, Any]] = [
        ("time", "duration_s", seconds),
        ("output tokens/s", "output_tokens_per_s", _rate),
        ("all tokens/s", "total_tokens_per_s", _rate),
        ("time / reference", "times_reference", lambda x: f"{x:.2f}x"),
    ]
    for name, key, show in rows:
        if key in summary:
            spread = summary[key]
            table.add_row(name, *(show(spread[figure]) for figure in ("median", "min", "max")))
    for name, key in (
        ("steps", "steps"),
        ("preemptions", "preemptions"),
        ("recomputed tokens", "recomputed_tokens"),
        ("cached prompt tokens", "cached_tokens"),
    ):
        counts = sorted(repeat[key] for repeat in repeats)
        if key == "steps" or key == "preemptions" or counts[-1]:
            middle = counts[len(counts) // 2]
            table.add_row(name, *(f"{count:,}" for count in (middle, counts[0], counts[-1])))
    return table


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _latencies(record: Record) -> Table:
    pools = record["summary"]["latency_s"]
    figures = list(pools["ttft"])
    table = _table("latency, median of the repeats", "", *figures)
    for name, text in _POOLS.items():
        table.add_row(text, *(seconds(pools[name][figure]["median"]) for figure in figures))
    return table


def _reference(record: Record) -> Table:
    reference, ceilings = record["reference"], record["ceilings"]
    bandwidth, rate = ceilings["bytes_per_s"] / 1e9, ceilings["flops_per_s"] / 1e12
    table = _table(f"reference at {bandwidth:,.0f} GB/s and {rate:.3g} TFLOP/s", "", "time")
    for name, key in (
        ("prompts' arithmetic", "prompt_s"),
        ("weights, once a step", "weights_s"),
        ("K/V, once a generated token", "kv_s"),
        ("generated tokens' arithmetic, meanwhile", "decode_arithmetic_s"),
        ("reference", "total_s"),
    ):
        table.add_row(name, seconds(reference[key]))
    return table


def _parts(profile: Record) -> Table:
    steps, whole = profile["steps"], profile["seconds"]
    title = f"a step of {steps}: {seconds(whole / steps)} under the profiler"
    table = _table(title, "part", "time", "share", "calls")
    for part in profile["parts"]:
        calls = f"{part['calls'] / steps:,.0f}" if part["calls"] else ""
        table.add_row(part["name"], seconds(part["seconds"] / steps), f"{part['share']:.1%}", calls)
    return table


def _native(profile: Record, ceilings: Record | None) -> Table:
    """The extension's parts, each as a share of what the machine was measured to do."""
    title = "the extension's parts: what they move and compute a second"
    if ceilings is not None:
        bandwidth, rate = ceilings["bytes_per_s"] / 1e9, ceilings["flops_per_s"] / 1e9
        title += f", of {bandwidth:,.0f} GB/s and {rate:,.0f} GFLOP/s"
    table = _table(title, "part", "time", "share", "GB/s", "", "GFLOP/s", "")
    steps, whole = profile["steps"], sum(part["seconds"] for part in profile["native"])
    for part in profile["native"]:
        time = part["seconds"] or float("inf")
        shares = ["", ""]
        if ceilings is not None:
            shares = [
                f"{part['bytes'] / time / ceilings['bytes_per_s']:.0%}",
                f"{part['operations'] / time / ceilings['flops_per_s']:.0%}",
            ]
        table.add_row(
            part["name"],
            seconds(part["seconds"] / steps),
            f"{part['seconds'] / whole:.1%}",
            f"{part['bytes'] / time / 1e9:,.1f}",
            shares[0],
            f"{part['operations'] / time / 1e9:,.1f}",
            shares[1],
        )
    return table


def _operations(profile: Record) -> Table:
    steps, whole = profile["steps"], profile["seconds"]
    table = _table(f"longest {profile['of']} of a step", "", "time", "share", "calls")
    for operation in profile["operations"][:_MOST_OPERATIONS]:
        time = operation["seconds"]
        table.add_row(
            escape(operation["name"][:60]),
            seconds(time / steps),
            f"{time / whole:.1%}",
            f"{operation['calls'] / steps:,.0f}",
        )
    return table
