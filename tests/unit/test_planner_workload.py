"""The planner's formulas for mean concurrency, against brute force and the real allocators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.config import MemoryConfig
from pagelab.errors import ConfigError
from pagelab.memory.allocators import Demand, make_allocator
from pagelab.memory.placement import make_placement
from pagelab.models.kv_geometry import KVGroup, PageLayout, page_layout
from pagelab.models.model_shape import shape_of_config
from pagelab.models.shape_source import built_in_shape
from pagelab.sim.planner import MemoryPlan, PlanSettings, plan_memory
from pagelab.sim.planner_simulation import replay_mean_running, simulate
from pagelab.sim.planner_workload import (
    ALLOCATOR_NAMES,
    decode_limit,
    most_slots,
    plan_workload,
    range_pages,
    summed_pages,
)
from pagelab.workloads import RequestShape

GIB = 1 << 30
lengths = st.integers(1, 2000)


def opt(blocks: int = 983, **settings: Any) -> MemoryPlan:
    """OPT-13B with so many blocks of 16 tokens: 12 GiB, as the PagedAttention paper has it."""
    size = blocks * 16 * 819_200
    return plan_memory(built_in_shape("opt-13b"), PlanSettings(kv_memory=size, **settings))


def sharegpt_like(count: int, seed: int = 0) -> list[RequestShape]:
    draw = random.Random(seed)
    return [
        RequestShape(min(1000, int(draw.expovariate(1 / 160)) + 1), draw.randrange(1, 700))
        for _ in range(count)
    ]


layouts = st.builds(
    lambda full, windowed, window, block: page_layout(
        [
            KVGroup(num_layers=full, num_kv_heads=2, head_dim=64),
            KVGroup(num_layers=windowed, num_kv_heads=2, head_dim=64, window=window),
        ],
        "bfloat16",
        block,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 300),
    st.integers(1, 40),
)


@given(layout=layouts, first=lengths, count=st.integers(1, 300))
def test_summed_pages_are_the_sum_of_pages(layout: PageLayout, first: int, count: int) -> None:
    expected = sum(layout.pages(first + k) for k in range(count))
    assert summed_pages(layout, first, count) == expected


@given(
    i=st.integers(1, 1500),
    o=st.integers(1, 500),
    asked=st.none() | st.integers(1, 3000),
    name=st.sampled_from(ALLOCATOR_NAMES[:-1]),
)
def test_reservations_are_the_allocators_own(i: int, o: int, asked: int | None, name: str) -> None:
    most = min(i + max(o, asked or 0), 2048)
    demand = Demand(i, i, i + o, most, 2048)
    ours = most_slots(name, RequestShape(i, o, max_tokens=asked), 2048)
    assert ours == make_allocator(name).slots(demand)


@given(tokens=lengths, block=st.integers(1, 32))
def test_ranges_take_what_the_placements_take(tokens: int, block: int) -> None:
    layout = page_layout(built_in_shape("gpt2").groups, "bfloat16", block)
    for name in ("buddy", "first-fit"):
        placement = make_placement(name, 4096)
        blocks = -(-tokens // block)
        assert placement.take(blocks) is not None
        assert range_pages(layout, tokens, name == "buddy") == 4096 - placement.num_free


def test_paging_s_formula_is_the_one_of_the_moments() -> None:
    plan, shapes = opt(), sharegpt_like(4000)
    found = plan_workload(plan, shapes)
    outputs = sum(s.output_tokens for s in shapes)
    live = sum(s.input_tokens * s.output_tokens for s in shapes) / outputs
    live += sum(s.output_tokens**2 for s in shapes) / (2 * outputs) - 0.5
    assert found.moments.mean_live == pytest.approx(live)
    by_moments = 983 * 16 / (live + 15 / 2)
    assert found.allocators["paged"].formula == pytest.approx(by_moments, rel=0.01)


def test_contiguous_max_holds_whole_ranges_only() -> None:
    shapes = sharegpt_like(10)
    assert plan_workload(opt(), shapes).allocators["contiguous-max"].formula == 7
    plan = opt(300, max_model_len=1700)  # 107 blocks: the buddy takes 128
    for placement, count in (("buddy", 2), ("first-fit", 2)):
        found = plan_workload(plan, shapes, placement=placement)
        assert found.allocators["contiguous-max"].formula == count
    plan = opt(330, max_model_len=1700)
    for placement, count in (("buddy", 2), ("first-fit", 3)):
        found = plan_workload(plan, shapes, placement=placement)
        assert found.allocators["contiguous-max"].formula == count


def test_what_clients_ask_for_costs_only_the_allocator_that_reserves_it() -> None:
    plain = sharegpt_like(500)
    asking = [shape._replace(max_tokens=2048) for shape in plain]
    before, after = (plan_workload(opt(), shapes).allocators for shapes in (plain, asking))
    for name in ALLOCATOR_NAMES:
        if name == "reserved-paged":
            assert after[name].formula == pytest.approx(983 / 128)
        else:
            assert after[name] == before[name]


def test_formulas_order_the_allocators_by_what_they_know() -> None:
    found = plan_workload(opt(), sharegpt_like(2000)).allocators
    running = [found[name].formula or 0 for name in ALLOCATOR_NAMES]
    assert running == sorted(running)


def test_a_pool_without_a_long_enough_range_runs_no_contiguous_allocator() -> None:
    plan = opt(120)
    found = plan_workload(plan, sharegpt_like(100))
    assert found.allocators["paged"].formula is not None
    oracle = found.allocators["contiguous-oracle"]
    assert oracle.formula is None
    assert "--max-model-len" in (oracle.why or "")
    simulated = simulate(plan, found, sharegpt_like(100), lambda *_: 1.0)
    assert simulated["contiguous-oracle"].why == oracle.why


def test_requests_larger_than_the_pool_are_left_out_and_counted() -> None:
    shapes = [RequestShape(10, 10), RequestShape(1900, 100)]
    found = plan_workload(opt(100), shapes)
    assert (found.moments.num_requests, found.too_large) == (1, 1)
    with pytest.raises(ConfigError, match="--workload"):
        plan_workload(opt(100), shapes[1:])


def test_live_bytes_stop_growing_at_the_window() -> None:
    model = built_in_shape("mistral-7b")
    plan = plan_memory(model, PlanSettings(kv_memory=8 * GIB))
    long = plan_workload(plan, [RequestShape(20_000, 100)])
    assert long.live_bytes == 4096 * 131_072
    assert long.allocators["paged"].held_pages == 257


@pytest.mark.parametrize("tp", [1, 2])
def test_the_decode_limit_reads_weights_once_and_live_k_v_once(tp: int) -> None:
    plan = plan_memory(built_in_shape("gpt2"), PlanSettings(kv_memory=GIB, tp=tp))
    p = plan.shape.parameters
    weights = -(-p.embedding // tp) + (p.sharded + p.kv) // tp + p.replicated
    limit = decode_limit(plan, 10, 1_000_000, 1e12)
    assert limit == pytest.approx(10 * 1e12 / (2 * weights + 10 * 1_000_000))


def test_experts_that_a_token_does_not_use_are_not_read() -> None:
    fields: dict[str, Any] = {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    p = shape_of_config(fields, Path("config.json"), "moe").parameters
    assert p.idle == 2 * 6 * 3 * 64 * 128
    assert p.read_by_a_step(1, 2) == p.total - p.idle - p.embedding


# The formulas against the real scheduler and allocators


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("contiguous-max", -0.01, 0.02),
        ("contiguous-pow2", 0.0, 0.25),  # holes, which the formula leaves out
        ("contiguous-oracle", 0.0, 0.35),
        ("reserved-paged", -0.05, 0.12),  # the head of the queue waits for room
        ("paged", -0.05, 0.06),
    ],
)
def test_replays_agree_but_for_holes(name: str, least: float, most: float) -> None:
    plan, shapes = opt(), sharegpt_like(300)
    found = plan_workload(plan, shapes).allocators[name].formula
    assert found is not None
    memory = MemoryConfig(
        num_blocks=983, allocator=name, max_model_len=2048, prefix_caching=False, watermark=0.0
    )
    assert least <= found / replay_mean_running(shapes, memory) - 1 <= most


def test_a_replay_gets_requests_from_all_over_the_workload_and_enough_of_them() -> None:
    plan = opt(64, max_model_len=600)
    short = [RequestShape(100, 50 + k) for k in range(7)]
    long = [RequestShape(100, 50 + k % 7, float(k)) for k in range(6000)]
    seen: list[list[RequestShape]] = []

    def replay(shapes: Any, _: MemoryConfig) -> float:
        seen.append(list(shapes))
        return 1.0

    for shapes in (short, long):
        seen.clear()
        simulate(plan, plan_workload(plan, shapes), shapes, replay)
        assert all(len(fed) == 600 for fed in seen)
        assert len(seen) == len(ALLOCATOR_NAMES)
    assert max(shape.arrival_s for shape in seen[-1]) >= 5900
