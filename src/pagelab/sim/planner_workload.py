"""How many requests of a workload run at once when memory is the limit: by formula.

At saturation a request holds pages while it makes its o output tokens, one a step. With h pages
held on average over those steps, the pool of C pages serves (Little's law, a step as the unit)::

    N = C / (E[o · h] / E[o])

and the allocators differ only in h (derived in docs/planner.md). What a formula leaves out, the
simulation has: holes between ranges, the head of the queue that waits for one, the watermark,
preemptions, and a pool of few requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pagelab.errors import ConfigError
from pagelab.models.kv_geometry import KVGroup, PageLayout
from pagelab.sim.planner import WEIGHT_BYTES, MemoryPlan
from pagelab.workloads.shapes import RequestShape

ALLOCATOR_NAMES = (
    "contiguous-max",
    "contiguous-pow2",
    "contiguous-oracle",
    "reserved-paged",
    "paged",
)
PLACEMENT_NAMES = ("buddy", "first-fit")


class Moments(NamedTuple):
    """A workload in figures. `i` and `o`: a request's input and output tokens."""

    num_requests: int
    mean_input: float
    mean_output: float
    input_weighted: float  # E[i·o] / E[o]: the mean input of a running request
    output_weighted: float  # E[o²] / 2E[o]: half of its mean output
    mean_live: float  # tokens with K/V of a running request


class Concurrency(NamedTuple):
    """What one allocator makes of a workload.

    Attributes:
        held_pages: pages that a running request holds on average; with the buddy's rounding.
        formula: mean requests running at saturation; None where it cannot run.
        why: it cannot run, for this reason.
        decode_limit: output tokens a second that all devices' memory allows at that concurrency.
    """

    held_pages: float
    formula: float | None
    why: str | None = None
    decode_limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadPlan:
    """A workload under every allocator.

    `too_large`: requests that the whole pool could not hold; left out, like those longer than
    `max_model_len`, which the workload's own counts tell.
    """

    moments: Moments
    allocators: Mapping[str, Concurrency]
    too_large: int
    live_bytes: float  # K/V bytes that one running request's step reads, on one device


@dataclass(slots=True)
class _Sums:
    """Sums over requests, each weighted by the steps that it runs: its output tokens."""

    requests: int = 0
    inputs: int = 0
    outputs: int = 0
    input_output: int = 0
    output_squares: int = 0
    live_bytes: int = 0  # · 1 step
    too_large: int = 0
    pages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ALLOCATOR_NAMES, 0))


def plan_workload(
    plan: MemoryPlan,
    shapes: Iterable[RequestShape],
    *,
    placement: str = "buddy",
    bandwidth: float | None = None,
) -> WorkloadPlan:
    """Plan a workload, in one pass over it.

    Args:
        plan: the pool.
        shapes: the requests, none longer than the plan's `max_model_len`.
        placement: where contiguous ranges go: `buddy` or `first-fit`.
        bandwidth: bytes a second that a device reads; None: no decode limits.

    Raises:
        ConfigError: no such placement, or no request is left.
    """
    if placement not in PLACEMENT_NAMES:
        raise ConfigError(f"no --placement {placement!r}: choose {' or '.join(PLACEMENT_NAMES)}")
    buddy = placement == "buddy"
    sums = _Sums()
    for shape in shapes:
        if plan.layout.pages(shape.input_tokens + shape.output_tokens) > plan.num_pages:
            sums.too_large += 1
        else:
            _add(sums, plan, shape, buddy)
    if sums.outputs == 0:
        raise ConfigError(
            "--workload has no request that fits: raise --max-model-len or --kv-memory"
        )
    moments = _moments(sums)
    live_bytes = sums.live_bytes / sums.outputs
    return WorkloadPlan(
        moments=moments,
        allocators={
            name: _concurrency(name, plan, sums, buddy, bandwidth) for name in ALLOCATOR_NAMES
        },
        too_large=sums.too_large,
        live_bytes=live_bytes,
    )


def most_slots(name: str, shape: RequestShape, max_model_len: int) -> int:
    """Tokens that a reserving allocator makes room for, when a request is admitted."""
    i, o = shape.input_tokens, shape.output_tokens
    if name == "contiguous-max":
        return max_model_len
    if name == "contiguous-pow2":
        return min(i + (1 << (o - 1).bit_length()), max_model_len)
    if name == "contiguous-oracle":
        return i + o
    return min(i + max(o, shape.max_tokens or 0), max_model_len)  # reserved-paged


def range_pages(layout: PageLayout, num_tokens: int, buddy: bool) -> int:
    """Pages that ranges for this many tokens take, one range a group.

    A buddy allocator rounds each up to a power of two.
    """
    if not buddy:
        return layout.pages(num_tokens)
    return sum(1 << (pages - 1).bit_length() for pages in layout.group_pages(num_tokens))


def summed_pages(layout: PageLayout, first: int, count: int) -> int:
    """Pages held by paging, summed over the lengths first, first + 1, …: `count` of them."""
    return sum(
        pages
        * (
            _summed_blocks(group, first + count - 1, layout.block_size)
            - _summed_blocks(group, first - 1, layout.block_size)
        )
        for group, pages in zip(layout.groups, layout.pages_per_block, strict=True)
    )


def decode_limit(plan: MemoryPlan, running: float, live_bytes: float, bandwidth: float) -> float:
    """Output tokens a second if memory were read at full speed and nothing else took time.

    A step reads each weight once and each running request's live K/V once; all devices do it at
    the same time.
    """
    kv_heads = plan.shape.dimensions.num_kv_heads
    weights = plan.shape.parameters.read_by_a_step(plan.settings.tp, kv_heads)
    step_bytes = weights * WEIGHT_BYTES[plan.settings.dtype] + running * live_bytes
    return running * bandwidth / step_bytes


def _add(sums: _Sums, plan: MemoryPlan, shape: RequestShape, buddy: bool) -> None:
    i, o = shape.input_tokens, shape.output_tokens
    layout = plan.layout
    sums.requests += 1
    sums.inputs += i
    sums.outputs += o
    sums.input_output += i * o
    sums.output_squares += o * o
    sums.live_bytes += _summed_live_bytes(layout, i, o)
    for name in ALLOCATOR_NAMES:
        if name == "paged":
            sums.pages[name] += summed_pages(layout, i, o)
            continue
        slots = most_slots(name, shape, plan.max_model_len)
        contiguous = name.startswith("contiguous")
        sums.pages[name] += o * range_pages(layout, slots, buddy and contiguous)


def _moments(sums: _Sums) -> Moments:
    input_weighted = sums.input_output / sums.outputs
    output_weighted = sums.output_squares / (2 * sums.outputs)
    return Moments(
        num_requests=sums.requests,
        mean_input=sums.inputs / sums.requests,
        mean_output=sums.outputs / sums.requests,
        input_weighted=input_weighted,
        output_weighted=output_weighted,
        mean_live=input_weighted + output_weighted - 0.5,  # the newest token has no K/V yet
    )


def _concurrency(
    name: str, plan: MemoryPlan, sums: _Sums, buddy: bool, bandwidth: float | None
) -> Concurrency:
    held = sums.pages[name] / sums.outputs
    if name.startswith("contiguous"):
        longest = range_pages(plan.layout, plan.max_model_len, buddy)
        largest = 1 << (plan.num_pages.bit_length() - 1) if buddy else plan.num_pages
        if longest > largest:
            why = f"no range for {plan.max_model_len:,} tokens: lower --max-model-len"
            return Concurrency(held, None, why)
    running = plan.num_pages / held
    if name == "contiguous-max":  # all ranges are equal: exactly so many
        running = float(int(running))
    limit = None
    if bandwidth is not None:
        limit = decode_limit(plan, running, sums.live_bytes / sums.outputs, bandwidth)
    return Concurrency(held, running, None, limit)


def _summed_blocks(group: KVGroup, last: int, block_size: int) -> int:
    """min(ceil(n / B), most) summed over n = 1 … last."""
    most = group.most_blocks(block_size)
    full = last if most is None else min(last, most * block_size)
    quotient, rest = divmod(full, block_size)
    total = block_size * quotient * (quotient + 1) // 2 + rest * (quotient + 1)
    return total if most is None else total + (last - full) * most


def _summed_live_bytes(layout: PageLayout, i: int, o: int) -> int:
    """K/V bytes of the lengths i … i + o - 1, windows regarded."""
    total = 0
    for group, pages in zip(layout.groups, layout.pages_per_block, strict=True):
        tokens = _summed_kept(group, i + o - 1) - _summed_kept(group, i - 1)
        total += tokens * pages * layout.page_bytes // layout.block_size
    return total


def _summed_kept(group: KVGroup, last: int) -> int:
    growing = last if group.window is None else min(last, group.window)
    return growing * (growing + 1) // 2 + (last - growing) * growing
