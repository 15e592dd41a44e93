"""The ledger on cases small enough to count by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from pagelab.engine.core import EngineCore, StepRecord
from pagelab.memory.kv_manager import KVManager
from pagelab.memory.ledger import CACHED, FREE, LedgerColumns, LedgerRecorder, take_ledger
from pagelab.types import SamplingParams, SequenceId
from tests.support.engines import greedy, run, toy_engine


def record(core: EngineCore) -> tuple[LedgerColumns, LedgerRecorder]:
    recorder = LedgerRecorder(core.kv, lambda sequence: int(sequence.request_id))

    def on_step(step: StepRecord) -> None:
        recorder.record(step.waiting_blocks, step.released)

    core.on_step = on_step
    run(core)
    return recorder.finish(), recorder


def test_paged_splits_unwritten_slots_by_what_is_written_in_the_end() -> None:
    core, _ = toy_engine(4, 4, prefix_caching=False)
    core.add_request([1, 2, 3], greedy(4))  # K/V of 3, 4, 5, 6 tokens; the last has none
    columns, _ = record(core)
    assert columns.live == [3, 4, 5, 0]
    assert columns.reserved == [1, 0, 1, 0]  # 6 are written in the end
    assert columns.internal == [0, 0, 2, 0]
    assert columns.free == [12, 12, 8, 16]
    assert columns.cached == columns.external == columns.shared_saved == [0] * 4


def test_contiguous_max_wastes_what_the_request_never_writes() -> None:
    core, _ = toy_engine(8, 4, allocator="contiguous-max", max_model_len=16)
    core.add_request([1, 2, 3], greedy(3))
    columns, _ = record(core)
    assert columns.live == [3, 4, 0]
    assert columns.reserved == [2, 1, 0]  # 5 are written in the end
    assert columns.internal == [11, 11, 0]
    assert columns.free == [16, 16, 32]


def test_holes_too_small_for_the_head_of_the_queue_are_external() -> None:
    core, _ = toy_engine(12, 4, allocator="contiguous-max", max_model_len=32, budget=64)
    core.add_request([1, 2], greedy(3))
    core.add_request([1, 2], greedy(3))  # needs 8 blocks; 4 are left
    core.step()
    entry = take_ledger(core.kv, core.scheduler.waiting_blocks)
    assert (entry.free, entry.external) == (0, 16)
    assert take_ledger(core.kv, None).free == 16, "nobody waits: the same slots are free"
    run(core)


def test_buddy_rounding_is_external_even_when_nobody_waits() -> None:
    core, _ = toy_engine(8, 4, allocator="contiguous-max", max_model_len=20)  # 5 blocks → 8
    core.add_request([1, 2], greedy(2))
    core.step()
    entry = take_ledger(core.kv, None)
    assert (entry.live + entry.unwritten, entry.external, entry.free) == (20, 12, 0)
    run(core)


def test_finished_blocks_stay_cached_until_they_are_needed() -> None:
    core, _ = toy_engine(4, 4)
    core.add_request([1] * 9, greedy(2))
    columns, recorder = record(core)
    assert columns.cached[-1] == 8
    assert columns.free[-1] == 8
    assert {(b, h) for s, b, h in recorder.block_events if s == 1} == {
        (0, CACHED),
        (1, CACHED),
        (2, FREE),
    }


def test_block_events_name_the_holders_in_order() -> None:
    core, _ = toy_engine(4, 4, prefix_caching=False)
    core.add_request([1, 2, 3], greedy(4))
    _, recorder = record(core)
    assert recorder.block_events == [(0, 0, 0), (2, 1, 0), (3, 0, FREE), (3, 1, FREE)]


def test_sharing_is_counted_once_and_reported_beside() -> None:
    core, _ = toy_engine(16, 4, budget=64)
    core.add_request([1] * 8, SamplingParams(max_tokens=4, n=3, seed=0, ignore_eos=True))
    columns, _ = record(core)
    # after the second step: the parent has 8 + 1 slots, two forks 7 + 1 of which 4 are shared
    assert columns.live[1] == 9 + 4 + 4
    assert columns.shared_saved[1] == 8


def test_a_preemption_ends_an_allocation() -> None:
    core, _ = toy_engine(8, 4, budget=64, prefix_caching=False)
    for seed in range(3):
        core.add_request([seed] * 8, greedy(16))
    columns, _ = record(core)
    assert core.scheduler.preemptions
    pool = [
        sum(values)
        for values in zip(
            columns.live,
            columns.reserved,
            columns.internal,
            columns.cached,
            columns.free,
            columns.external,
            strict=True,
        )
    ]
    assert set(pool) == {32}
    assert min(min(c) for c in (columns.reserved, columns.internal)) >= 0


class NaiveRecorder:
    """What `LedgerRecorder` should say, by looking at every table at every step."""

    def __init__(self, kv: KVManager) -> None:
        self.kv = kv
        self.reserved: list[int] = []
        self.open: dict[SequenceId, list[tuple[int, int, int]]] = {}  # (step, held, written)
        self.holders: list[dict[int, int]] = []

    def record(self, released: Mapping[SequenceId, int]) -> None:
        step, size = len(self.reserved), self.kv.config.block_size
        for sequence_id, written in released.items():
            self.close(sequence_id, written)
        holders: dict[int, int] = dict.fromkeys(self.kv.pool.cached_blocks(), CACHED)
        for sequence_id, table in self.kv.tables():
            spans = self.open.setdefault(sequence_id, [])
            spans.append((step, len(table.block_ids) * size, table.num_written))
            for block_id in table.block_ids:
                holders.setdefault(block_id, int(sequence_id.request_id))
        self.holders.append(holders)
        self.reserved.append(0)

    def close(self, sequence_id: SequenceId, written_in_the_end: int) -> None:
        for step, held, written in self.open.pop(sequence_id, ()):
            self.reserved[step] += min(written_in_the_end, held) - written


@pytest.mark.parametrize("allocator", ["paged", "reserved-paged", "contiguous-max"])
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_recorder_says_what_looking_at_every_table_says(
    allocator: str, ahead: int, seed: int
) -> None:
    rng = random.Random(seed)
    core, runner = toy_engine(20, 4, allocator=allocator, ahead=ahead, budget=9, eos=(5,))
    if seed % 2:  # the pool is in use already, and blocks are cached
        core.add_request([1] * 9, greedy(2))
        run(core)
        core.add_request([2] * 7, SamplingParams(n=2, seed=1), request_id="0")
        core.step()
    recorder = LedgerRecorder(core.kv, lambda sequence: int(sequence.request_id))
    naive = NaiveRecorder(core.kv)

    def on_step(step: StepRecord) -> None:
        recorder.record(step.waiting_blocks, step.released)
        naive.record(step.released)

    core.on_step = on_step
    requests = []
    for step in range(80):
        if rng.random() < 0.4:
            params = SamplingParams(max_tokens=rng.randint(1, 12), n=rng.choice([1, 1, 3]), seed=1)
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
            requests.append(core.add_request(tokens, params, request_id=str(100 + step)))
        if requests and rng.random() < 0.1:
            core.cancel(rng.choice(requests).id)
        if rng.random() < 0.05:
            runner.fail_steps.add(len(runner.batches))
        if core.has_unfinished_requests:
            core.step()
    for sequence_id, table in core.kv.tables():
        naive.close(sequence_id, table.num_written)
    columns = recorder.finish()
    assert columns.reserved == naive.reserved
    holders: dict[int, int] = {}
    for step, expected in enumerate(naive.holders):
        for at, block, holder in recorder.block_events:
            if at == step:
                assert holders.get(block, FREE) != holder, "an event for no change"
                holders[block] = holder
        assert {b: h for b, h in holders.items() if h != FREE} == expected
