"""Ledgers of foreign caches: what blocks say, and what vLLM's figures say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.lab.methods.block_recording import BlockRecorder, HeldBlocks
from pagelab.lab.methods.hf_paged_cache import blocks_in_budget, read_paged_cache
from pagelab.lab.methods.vllm_ledger import Decoding, SchedulerReport, VllmRecorder
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.results import Steps

STATES = ("live", "reserved", "internal", "cached", "free", "external")
SIZE = 4


def states(steps: Steps, step: int) -> tuple[int, ...]:
    """live, reserved, internal, cached, free, external"""
    return tuple(steps[name][step] for name in STATES)  # type: ignore[literal-required]


def test_an_allocation_is_reserved_as_far_as_it_was_written_and_internal_beyond() -> None:
    recorder = BlockRecorder(num_blocks=6, block_size=SIZE)
    recorder.record(0.1, {0: HeldBlocks([5, 2], 5)}, (), new_tokens=5, waiting=1)
    recorder.record(0.2, {0: HeldBlocks([5, 2], 6)}, (), new_tokens=1, waiting=1)
    recorder.release(0, 6)
    recorder.record(0.3, {1: HeldBlocks([0], 1)}, {5}, new_tokens=1, waiting=0)
    steps = recorder.finish()
    assert states(steps, 0) == (5, 1, 2, 0, 16, 0)
    assert states(steps, 1) == (6, 0, 2, 0, 16, 0)
    assert states(steps, 2) == (1, 0, 3, 4, 16, 0)
    assert recorder.block_events == [
        (0, 5, 0),
        (0, 2, 0),
        (2, 2, -1),
        (2, 0, 1),
        (2, 5, -2),
    ]


def test_a_shared_block_is_live_once_and_its_saving_is_told() -> None:
    recorder = BlockRecorder(num_blocks=6, block_size=SIZE)
    held = {0: HeldBlocks([3, 1], 6), 1: HeldBlocks([3, 4], 5)}
    recorder.record(0.1, held, (), new_tokens=3, waiting=0)
    assert (recorder.live, recorder.allocated) == (7, 12)
    steps = recorder.finish()
    assert steps["shared_saved"] == [4]
    assert steps["running"] == [2]
    assert states(steps, 0) == (7, 0, 5, 0, 12, 0)


@given(st.data())
def test_states_are_the_pool_whatever_requests_do(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 12))
    recorder = BlockRecorder(num_blocks, SIZE)
    free = list(range(num_blocks))
    tables: dict[int, tuple[list[int], int]] = {}
    cached: list[int] = []
    lengths: list[int] = []  # slots written, by a count of our own
    for step in range(data.draw(st.integers(1, 8))):
        for request in list(tables):
            blocks, written = tables[request]
            if data.draw(st.booleans()):
                del tables[request]
                recorder.release(request, written)
                kept = data.draw(st.integers(0, len(blocks)))
                cached += blocks[:kept]
                free += blocks[kept:]
        if data.draw(st.booleans()):
            free += cached
            cached.clear()
        for request in range(step, step + data.draw(st.integers(0, 2))):
            if free and request not in tables:
                tables[request] = ([free.pop()], 0)
        for request, (blocks, written) in list(tables.items()):
            room = len(blocks) * SIZE - written
            tables[request] = (blocks, written + data.draw(st.integers(0, room)))
        held = {request: HeldBlocks(*table) for request, table in tables.items()}
        recorder.record(step / 10, held, cached, new_tokens=1, waiting=0)
        lengths.append(sum(written for _, written in tables.values()))
    steps = recorder.finish()
    for step in range(len(lengths)):
        slots = states(steps, step)
        assert min(slots) >= 0
        assert sum(slots) == num_blocks * SIZE
    assert steps["live"] == lengths


@given(st.integers(0, 10_000_000), st.integers(1, 5_000))
def test_the_cache_asked_for_stays_within_the_budget_with_its_padding(
    budget: int, bytes_per_block: int
) -> None:
    blocks = blocks_in_budget(budget, bytes_per_block)
    assert blocks == 0 or (blocks + 2) * bytes_per_block <= budget
    if bytes_per_block % 128 == 0:  # nothing is lost to alignment
        assert blocks == max(0, budget // bytes_per_block - 2)


def groups_cache(**other: Any) -> SimpleNamespace:
    """A paged cache as transformers 5.17 has it."""
    manager = SimpleNamespace(block_table={"a": [4, 0]})
    fields: dict[str, Any] = {
        "group_cache_managers": [manager],
        "num_full_attention_groups": 1,
        "_block_manager": SimpleNamespace(_init_block_ids={2: None, 3: None}),
        "num_blocks": 6,
        "block_size": SIZE,
        "key_cache": [SimpleNamespace(nbytes=800)] * 2,
        "value_cache": [SimpleNamespace(nbytes=800)] * 2,
        "use_prefix_sharing": True,
    }
    return SimpleNamespace(**(fields | other))


def sectors_cache(**other: Any) -> SimpleNamespace:
    """A paged cache as transformers 5.23 has it: two sectors of padding come first."""
    allocator = SimpleNamespace(
        block_table={"a": [6, 2]},
        num_blocks=6,
        tokens_per_page=SIZE,
        blocks_per_sector=1,
        ledger=SimpleNamespace(cached_blocks={4: None, 5: None}),
    )
    fields: dict[str, Any] = {
        "cache_allocators": {"full_attention": allocator},
        "pool": SimpleNamespace(num_reserved_sectors=2),
        "cache_tensor": SimpleNamespace(nbytes=3200),
        "use_prefix_sharing": True,
    }
    return SimpleNamespace(**(fields | other))


@pytest.mark.parametrize("shape", [groups_cache, sectors_cache])
def test_both_shapes_of_the_cache_are_read_alike(shape: Any) -> None:
    cache = read_paged_cache(shape())
    first = cache.first_block()
    assert (cache.num_blocks, cache.block_size, cache.tensor_bytes) == (6, SIZE, 3200)
    assert [block - first for block in cache.tables()["a"]] == [4, 0]
    assert [block - first for block in cache.cached_blocks()] == [2, 3]
    assert cache.shares_prefixes


def test_a_cache_of_unknown_shape_says_which_versions_are_known() -> None:
    with pytest.raises(MethodUnavailableError, match=r"install transformers 5\.17 to 5\.23"):
        read_paged_cache(SimpleNamespace())
    cache = sectors_cache()
    del cache.cache_allocators["full_attention"].ledger
    with pytest.raises(MethodUnavailableError, match=r"install transformers 5\.17 to 5\.23"):
        read_paged_cache(cache)


@pytest.mark.parametrize(
    "cache",
    [
        groups_cache(num_full_attention_groups=0),
        groups_cache(group_cache_managers=[SimpleNamespace()] * 2),
        sectors_cache(cache_allocators={"sliding_attention": SimpleNamespace()}),
    ],
)
def test_sliding_windows_are_refused_with_the_option_to_change(cache: Any) -> None:
    with pytest.raises(MethodUnavailableError, match=r"sliding-window.*--model"):
        read_paged_cache(cache)


def report(usage: float, running: int, waiting: int = 0) -> SchedulerReport:
    return SchedulerReport(usage, running, waiting, 0, 0, 0)


def test_vllms_blocks_in_use_are_split_by_the_requests_lengths() -> None:
    recorder = VllmRecorder(num_blocks=11, block_size=SIZE)
    # 6 and 9 tokens in 2 and 3 blocks, and one more block for a prompt on its way
    decoding = [Decoding(6, 20), Decoding(9, 10)]
    recorder.record(0.5, report(6 / 10, 3, 2), decoding, 7)
    assert states(recorder.steps, 0) == (19, 3, 2 + SIZE, 0, 16, 0)
    assert (recorder.live, recorder.allocated) == (19, 24)
    assert recorder.steps["running"] == [3]
    assert recorder.steps["waiting"] == [2]
    assert recorder.steps["new_tokens"] == [7]


def test_vllms_preempted_requests_hold_nothing() -> None:
    recorder = VllmRecorder(num_blocks=11, block_size=SIZE)
    recorder.record(0.5, report(2 / 10, 1, 1), [Decoding(6, 20), Decoding(9, 10)], 1)
    assert states(recorder.steps, 0) == (6, 2, SIZE, 0, 32, 0)


def test_fewer_blocks_than_lengths_need_means_that_some_are_shared() -> None:
    recorder = VllmRecorder(num_blocks=11, block_size=SIZE)
    recorder.record(0.5, report(3 / 10, 2), [Decoding(6, 6), Decoding(6, 6)], 1)
    assert recorder.steps["shared_saved"] == [SIZE]
    assert recorder.steps["live"] == [8]


@given(
    st.integers(2, 50),
    st.integers(1, 32),
    st.floats(0, 1),
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=20),
)
def test_vllms_states_are_the_pool_even_if_its_figures_lag(
    num_blocks: int, size: int, usage: float, running: int, lengths: list[tuple[int, int]]
) -> None:
    recorder = VllmRecorder(num_blocks, size)
    decoding = [Decoding(written, written + more) for written, more in lengths]
    recorder.record(0.1, report(usage, running), decoding, 1)
    slots = states(recorder.steps, 0)
    assert min(slots) >= 0
    assert sum(slots) == num_blocks * size


def test_an_event_belongs_to_the_step_in_which_it_happened() -> None:
    recorder = VllmRecorder(num_blocks=3, block_size=SIZE)
    for t in (0.1, 0.2, 0.3):
        recorder.record(t, report(0, 0), [], 0)
    assert [recorder.step_at(t) for t in (0.0, 0.1, 0.15, 0.3, 9.0)] == [0, 0, 1, 2, 2]
