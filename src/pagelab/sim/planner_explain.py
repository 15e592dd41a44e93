"""The planner's arithmetic, line by line, with the numbers filled in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pagelab.config import format_bytes
from pagelab.models.kv_geometry import KV_DTYPE_BYTES, KVGroup
from pagelab.sim.planner import WEIGHT_BYTES, MemoryPlan, graph_sizes, kv_dtype
from pagelab.sim.planner_workload import WorkloadPlan


class Line(NamedTuple):
    """`label = expression = value`."""

    label: str
    expression: str
    value: str

    def __str__(self) -> str:
        return f"{self.label} = {self.expression} = {self.value}"


def explain_memory(plan: MemoryPlan) -> Iterator[Line]:
    """Weights to full-length requests."""
    settings, layout = plan.settings, plan.layout
    yield _weights(plan)
    if settings.activation_memory is None:
        yield _activations(plan)
    if settings.graph_memory is None:
        graphs, layers = graph_sizes(settings.max_num_seqs), plan.shape.dimensions.num_layers
        yield Line(
            "graphs (estimate)",
            f"{graphs} batch sizes × {layers} layers × 0.25 MiB",
            format_bytes(plan.graph_bytes),
        )
    if settings.kv_memory is None:
        assert settings.gpu_memory is not None
        yield Line(
            "K/V",
            f"{settings.gpu_memory:,} × {settings.gpu_memory_utilization:g} - "
            f"{plan.weight_bytes:,} - {plan.activation_bytes:,} - {plan.graph_bytes:,}",
            _bytes(plan.kv_bytes),
        )
    for group in layout.groups:
        yield _bytes_per_token(plan, group)
    yield from _pages(plan)
    yield Line(
        f"{plan.unit} of a full-length request",
        " + ".join(_blocks_of(plan, group, k) for group, k in _groups(plan)),
        f"{plan.pages_per_full_request:,}",
    )
    yield Line(
        "full-length requests",
        f"{plan.num_pages:,} / {plan.pages_per_full_request:,}",
        f"{plan.full_requests:,.2f}",
    )
    if _has_windows(plan):
        expression = f"{plan.full_requests:,.2f} × {plan.max_model_len:,}"
    else:
        expression = f"{plan.num_pages:,} × {layout.block_size}"
    yield Line("tokens", expression, f"{plan.tokens:,}")


def explain_workload(
    plan: MemoryPlan, workload: WorkloadPlan, bandwidth: float | None
) -> Iterator[Line]:
    """Moments to mean concurrency and decode limits."""
    m = workload.moments
    yield Line(
        "tokens with K/V of a running request",
        f"E[i·o]/E[o] + E[o²]/2E[o] - 1/2 = "
        f"{m.input_weighted:,.2f} + {m.output_weighted:,.2f} - 0.5",
        f"{m.mean_live:,.2f}",
    )
    if not _has_windows(plan):
        tail = (plan.layout.block_size - 1) / 2
        capacity = plan.num_pages * plan.layout.block_size
        yield Line(
            "paged, by the moments",
            f"{capacity:,} slots / ({m.mean_live:,.2f} + {tail:g} of a last block)",
            f"{capacity / (m.mean_live + tail):,.2f}",
        )
    for name, found in workload.allocators.items():
        if found.formula is None:
            yield Line(name, f"{found.held_pages:,.2f} {plan.unit} a request", found.why or "none")
            continue
        whole = ", whole ranges" if name == "contiguous-max" else ""
        yield Line(
            name,
            f"{plan.num_pages:,} / {found.held_pages:,.2f} {plan.unit} a running request{whole}",
            f"{found.formula:,.2f}",
        )
    if bandwidth is not None:
        yield from _decode_limits(plan, workload, bandwidth)


def _decode_limits(plan: MemoryPlan, workload: WorkloadPlan, bandwidth: float) -> Iterator[Line]:
    shape, settings = plan.shape, plan.settings
    read = shape.parameters.read_by_a_step(settings.tp, shape.dimensions.num_kv_heads)
    weights = read * WEIGHT_BYTES[settings.dtype]
    for name, found in workload.allocators.items():
        if found.formula is not None and found.decode_limit is not None:
            yield Line(
                f"decode limit, {name}",
                f"{found.formula:,.2f} × {bandwidth:,.0f} B/s / ({weights:,} B of weights + "
                f"{found.formula:,.2f} × {workload.live_bytes:,.0f} B of K/V)",
                f"{found.decode_limit:,.0f} tok/s",
            )


def _weights(plan: MemoryPlan) -> Line:
    p, tp = plan.shape.parameters, plan.settings.tp
    size = WEIGHT_BYTES[plan.settings.dtype]
    if tp == 1:
        return Line("weights", f"{p.total:,} × {size} B", _bytes(plan.weight_bytes))
    d = plan.shape.dimensions
    held = max(1, d.num_kv_heads // tp)
    return Line(
        "weights of a device",
        f"(({p.embedding + p.head:,} + {p.sharded:,}) / {tp} + "
        f"{p.kv:,} × {held}/{d.num_kv_heads} + {p.positions + p.replicated:,}) × {size} B",
        _bytes(plan.weight_bytes),
    )


def _activations(plan: MemoryPlan) -> Line:
    d, settings = plan.shape.dimensions, plan.settings
    logits = settings.max_num_seqs * d.vocab_size * 8
    size = 4 if settings.dtype == "float32" else 2
    rows = (plan.activation_bytes - logits) // (settings.max_num_batched_tokens * size)
    return Line(
        "activations (estimate)",
        f"{settings.max_num_batched_tokens} tokens × {rows:,} numbers × {size} B + "
        f"{settings.max_num_seqs} requests × {d.vocab_size:,} logits × 8 B",
        _bytes(plan.activation_bytes),
    )


def _bytes_per_token(plan: MemoryPlan, group: KVGroup) -> Line:
    dtype, tp = kv_dtype(plan.settings), plan.settings.tp
    heads = max(1, group.num_kv_heads // tp)
    window = "" if group.window is None else f", window {group.window:,}"
    return Line(
        f"K/V bytes a token ({group.num_layers} layers{window})",
        f"2 × {group.num_layers} layers × {heads} heads × {group.head_dim} × "
        f"{KV_DTYPE_BYTES[dtype]} B",
        f"{group.bytes_per_token(dtype, tp):,}",
    )


def _pages(plan: MemoryPlan) -> Iterator[Line]:
    layout = plan.layout
    if len(layout.groups) > 1:
        sizes = ", ".join(f"{k * layout.page_bytes:,}" for k in layout.pages_per_block)
        yield Line("page bytes", f"greatest common divisor of {sizes}", f"{layout.page_bytes:,}")
    page = (
        f"{layout.page_bytes:,}"
        if len(layout.groups) > 1
        else f"({layout.block_size} × {layout.bytes_per_token:,})"
    )
    yield Line(plan.unit, f"floor({plan.kv_bytes:,} / {page})", f"{plan.num_pages:,}")


def _blocks_of(plan: MemoryPlan, group: KVGroup, pages: int) -> str:
    size, length = plan.layout.block_size, plan.max_model_len
    text = f"ceil({length:,} / {size})"
    if group.window is not None:
        text = f"min({text}, ceil({group.window - 1:,} / {size}) + 1)"
    return text if pages == 1 else f"{text} × {pages}"


def _groups(plan: MemoryPlan) -> Iterator[tuple[KVGroup, int]]:
    yield from zip(plan.layout.groups, plan.layout.pages_per_block, strict=True)


def _has_windows(plan: MemoryPlan) -> bool:
    return any(group.window is not None for group in plan.layout.groups)


def _bytes(size: int) -> str:
    return f"{size:,} B ({format_bytes(size)})"
