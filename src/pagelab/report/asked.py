"""What was asked of an experiment, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagelab.config import format_bytes
from pagelab.report.figures import seconds, size, watermark
from pagelab.results import Counts, ExperimentInfo, Objectives, WorkloadInfo

Fact = tuple[str, str]


def asked(experiment: ExperimentInfo, devices: Sequence[str] = ()) -> list[Fact]:
    """Names and values; of what varies, the base's value first. `devices`: where it ran."""
    model = experiment["model"]
    per_token = model["kv_bytes_per_token"]
    slots = experiment["kv_memory_bytes"] // per_token if per_token else 0
    budgets = [size(value) for value in experiment["kv_memories"]]
    blocks = [f"{value}" for value in experiment["block_sizes"]]
    marks = [watermark(value) for value in experiment["watermarks"]]
    facts = [
        ("Model", f"{model['name']} ({model['num_parameters'] / 1e6:,.0f} M parameters)"),
        ("Type", f"{experiment['dtype']}, on {experiment['threads']} threads"),
        ("Device", ", ".join(devices) or experiment.get("device", "cpu")),
        ("KV budget", f"{_values(budgets)}: {slots:,} slots of {format_bytes(per_token)}"),
        ("Block size", f"{_values(blocks)} slots"),
        ("Maximum length", f"{experiment['max_model_len']:,} tokens a request"),
        ("Token budget", f"{experiment['max_num_batched_tokens']:,} tokens a step"),
        ("Watermark", f"{_values(marks)} of the blocks kept free at admission"),
        ("Placement", f"{_values(experiment['placements'])}, of contiguous ranges"),
        ("Sampling", _sampling(experiment)),
        ("Repeats", f"{experiment['repeats']}, seed {experiment['seed']}"),
        ("Objectives", objectives(experiment["objectives"]) or "none"),
    ]
    if experiment["batch"] is not None:
        facts.append(("Same batch", f"{experiment['batch']} requests at once"))
    if experiment["cost_model"] is not None:
        facts.append(("Cost model", experiment["cost_model"]))
    return facts


def objectives(stated: Objectives) -> str:
    """The stated objectives in words; empty where none is."""
    parts = [
        (f"TTFT {seconds(stated['ttft_s'])}" if stated["ttft_s"] is not None else ""),
        (f"TPOT {seconds(stated['tpot_s'])}" if stated["tpot_s"] is not None else ""),
        (f"E2E {seconds(stated['e2e_s'])}" if stated["e2e_s"] is not None else ""),
    ]
    return ", ".join(part for part in parts if part)


def workload_facts(workload: WorkloadInfo) -> tuple[WorkloadInfo, str, str]:
    """A workload, its size in words, and what was left out of it."""
    requests = workload["requests"]
    tokens_in = sum(request["prompt_tokens"] for request in requests)
    tokens_out = sum(request["max_tokens"] for request in requests)
    last = max((request["arrival_s"] for request in requests), default=0.0)
    text = (
        f"{workload['title']}: {len(requests):,} requests, {tokens_in:,} tokens in, "
        f"up to {tokens_out:,} out, "
    )
    text += f"arriving over {seconds(last)}" if last > 0 else "all there at the start"
    if workload["rate"] is not None:
        text += f" (rate {workload['rate']})"
    more = sum(request["asked_tokens"] is not None for request in requests)
    if more:
        text += f"; {more:,} asked for more tokens than they used"
    return workload, text, _counts(workload["counts"])


def _counts(counts: Counts | None) -> str:
    """What became of the requests of the source; empty where nothing was left out or cut."""
    if counts is None or not (counts["bad"] or counts["dropped"] or counts["clipped"]):
        return ""
    parts = []
    if counts["bad"]:
        first = f" (the first: {counts['first_bad']})" if counts["first_bad"] else ""
        parts.append(f"{counts['bad']:,} bad and left out{first}")
    if counts["dropped"]:
        parts.append(f"{counts['dropped']:,} too long and dropped")
    if counts["clipped"]:
        parts.append(f"{counts['clipped']:,} too long and cut")
    return f"of {counts['read']:,} read: {', '.join(parts)}"


def _sampling(experiment: ExperimentInfo) -> str:
    """As it was asked; at a temperature outputs are not compared."""
    if experiment["temperature"] == 0 or "temperature" in experiment["sampling"]:
        return experiment["sampling"]
    return f"{experiment['sampling']}, temperature {experiment['temperature']:g}"


def _values(values: list[str]) -> str:
    """The base's value, then the others."""
    first, *others = values or ["–"]
    return f"{first} (also {', '.join(others)})" if others else first


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat += flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                flat += flatten({str(i): item}, f"{name}.")
        elif isinstance(value, list):
            flat.append((name, ", ".join(map(str, value)) or "none"))
        elif name.endswith("bytes") and isinstance(value, int):
            flat.append((name.removesuffix("_bytes"), format_bytes(value)))
        else:
            flat.append((name, "–" if value is None else str(value)))
    return flat
