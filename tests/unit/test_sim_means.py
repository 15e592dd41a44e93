"""Means and percentiles in bounded memory, against the records that they stand for."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import StepRecord
from pagelab.memory.allocators import ALLOCATORS
from pagelab.memory.ledger import LedgerMeter, LedgerRecorder
from pagelab.sim.cost_model import UNIT, CostModel
from pagelab.sim.histogram import LogHistogram
from pagelab.sim.saturation import replay
from pagelab.sim.stream import simulate_stream
from pagelab.types import SamplingParams
from pagelab.workloads import RequestShape
from tests.support.engines import greedy, run, toy_engine

# The ledger's meter


@settings(max_examples=60, deadline=None)
@given(
    allocator=st.sampled_from(sorted(ALLOCATORS)),
    placement=st.sampled_from(["buddy", "first-fit"]),
    block_size=st.sampled_from([1, 4, 5]),
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 11), st.integers(1, 3)),
        min_size=1,
        max_size=8,
    ),
    prefix_caching=st.booleans(),
    weights=st.randoms(use_true_random=False),
)
def test_the_meter_gives_the_weighted_means_of_the_recorders_columns(
    allocator: str,
    placement: str,
    block_size: int,
    requests: list[tuple[int, int, int]],
    prefix_caching: bool,
    weights: random.Random,
) -> None:
    core, _ = toy_engine(
        64 // block_size,
        block_size,
        allocator=allocator,
        placement=placement,
        prefix_caching=prefix_caching,
        max_model_len=32,
    )
    recorder = LedgerRecorder(core.kv, lambda sequence: int(sequence.request_id))
    meter = LedgerMeter(core.kv)
    chosen: list[float] = []

    def on_step(step: StepRecord) -> None:
        chosen.append(weights.choice([0.0, 0.25, 1.0, 3.0]))
        entry = recorder.record(step.waiting_blocks, step.released)
        assert meter.record(step.waiting_blocks, step.released, chosen[-1]) == entry

    core.on_step = on_step
    for number, (prompt, output, samples) in enumerate(requests):
        params = SamplingParams(max_tokens=output, temperature=1.0, seed=number, n=samples)
        core.add_request([1 + (number % 2)] * prompt, params)
    run(core)
    columns, found = recorder.finish(), meter.finish()
    pool = 64 // block_size * block_size
    total = sum(chosen)
    for state in found._fields:
        column = getattr(columns, state)
        mean = sum(w * slots for w, slots in zip(chosen, column, strict=True)) / (total or 1)
        assert getattr(found, state) == pytest.approx(mean / pool, abs=1e-9), state
    if total:
        assert sum(found[:6]) == pytest.approx(1.0)


def test_a_meter_of_no_weight_is_all_zeros() -> None:
    core, _ = toy_engine()
    meter = LedgerMeter(core.kv)
    core.add_request([1, 2, 3], greedy(2))
    core.step()
    meter.record(None, {}, 0.0)
    assert set(meter.finish()) == {0.0}


def test_what_still_runs_at_the_end_counts_as_written_so_far() -> None:
    core, _ = toy_engine(8, 4, allocator="contiguous-max", max_model_len=16)
    meter = LedgerMeter(core.kv)
    core.on_step = lambda step: meter.record(step.waiting_blocks, step.released) and None
    core.add_request([1, 2, 3], greedy(8))
    core.step()  # 3 written
    core.step()  # 4
    found = meter.finish()
    assert found.live * 32 == pytest.approx(3.5)
    assert found.reserved * 32 == pytest.approx(0.5)  # the fourth, at the first step
    assert found.internal * 32 == pytest.approx(12.0)


# Percentiles


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=60), st.floats(0, 100))
def test_a_percentile_is_within_a_percent_of_the_exact_rank(values: list[float], q: float) -> None:
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[math.floor(q / 100 * (len(values) - 1))]
    assert histogram.percentile(q) == pytest.approx(exact, rel=0.0101, abs=1e-9)
    assert histogram.mean == pytest.approx(math.fsum(values) / len(values))
    assert (histogram.least, histogram.greatest) == (min(values), max(values))


def test_counting_a_value_often_is_adding_it_often() -> None:
    one, many = LogHistogram(), LogHistogram()
    many.add(0.3, 5)
    many.add(2.0, 1)
    for value in [0.3] * 5 + [2.0]:
        one.add(value)
    assert [one.percentile(q) for q in (0, 50, 80, 81, 100)] == [
        many.percentile(q) for q in (0, 50, 80, 81, 100)
    ]
    assert many.count == 6


def test_an_empty_histogram_has_zeros() -> None:
    assert LogHistogram().percentile(99) == LogHistogram().mean == 0.0
    with pytest.raises(ValueError, match="0 to 100"):
        LogHistogram().percentile(101)


# Streams


def _memory(**changes: object) -> MemoryConfig:
    fields = {"num_blocks": 24, "block_size": 4, "max_model_len": 64, "prefix_caching": False}
    return MemoryConfig(**(fields | changes))  # type: ignore[arg-type]


def _shapes(count: int, gap: float = 0.0, seed: int = 1) -> list[RequestShape]:
    rng = random.Random(seed)
    return [
        RequestShape(1 + rng.randrange(20), 1 + rng.randrange(12), gap * i) for i in range(count)
    ]


def test_a_short_queue_decides_as_if_all_waited() -> None:
    """Requests come into being late; nobody else is served because of it."""
    shapes = _shapes(120)
    few = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4)  # 4 wait at most
    found = simulate_stream(shapes, _memory(), few, cost=UNIT)
    core, _ = toy_engine(24, 4, prefix_caching=False, watermark=0.05, max_model_len=64, budget=64)
    core.scheduler.config = few
    steps: list[StepRecord] = []
    core.on_step = steps.append
    for shape in shapes:
        core.add_request([1] * shape.input_tokens, greedy(shape.output_tokens))
    run(core)
    assert found.steps == len(steps)
    assert found.preemptions == core.scheduler.num_preemptions
    assert found.mean_running * (len(steps) - 1) == pytest.approx(
        sum(step.num_running for step in steps)
    )


def test_the_engine_never_holds_more_than_a_step_could_admit() -> None:
    produced: list[int] = []

    def endless() -> object:
        for index, shape in enumerate(_shapes(400)):
            produced.append(index)
            yield shape

    most = 0
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=3)
    finished = 0

    def progress(done: int, _: float) -> None:
        nonlocal most, finished
        finished = done
        most = max(most, len(produced) - done)

    simulate_stream(endless(), _memory(), config, cost=UNIT, on_progress=progress)  # type: ignore[arg-type]
    assert finished > 100
    assert most <= 3 + 3 + 1  # running, waiting, and the next one


def test_a_request_that_never_fits_is_counted_and_said() -> None:
    shapes = [RequestShape(4, 2), RequestShape(63, 5), RequestShape(4, 2)]
    found = simulate_stream(shapes, _memory(), cost=UNIT)
    assert (found.requests, found.refused) == (2, 1)
    assert "max_model_len = 64" in (found.first_refusal or "")


def test_time_stands_still_while_nobody_runs() -> None:
    shapes = [RequestShape(4, 3, 0.0), RequestShape(4, 3, 100.0)]
    found = simulate_stream(shapes, _memory(), cost=UNIT)
    assert found.duration_s == 103.0
    assert found.ttft.mean == 1.0  # each at its own arrival
    assert found.queue.mean == 0.0
    assert found.mean_running == 1.0  # while somebody runs
    assert found.output_tokens_per_s == pytest.approx(6 / 103)


def test_parallel_samples_share_their_prompt_in_a_stream() -> None:
    shapes = [RequestShape(17, 8, 30.0 * i) for i in range(5)]
    one = simulate_stream(shapes, _memory(), cost=UNIT)
    three = simulate_stream(shapes, _memory(), cost=UNIT, samples=3)
    assert one.ledger.shared_saved == 0
    assert three.requests == 5
    assert three.output_tokens == 3 * one.output_tokens
    assert three.ledger.shared_saved > 0.2
    assert three.ttft == one.ttft


# Saturation


def test_saturation_ignores_arrivals_and_keeps_the_pool_full() -> None:
    shapes = [
        shape._replace(output_tokens=shape.output_tokens + 30) for shape in _shapes(200, gap=1000.0)
    ]
    found = replay(shapes, _memory(watermark=0.0, num_blocks=100))
    assert found.ledger.free < 0.1  # what a step ended is free at its end
    assert found.mean_running > 10
    assert found.preemptions_per_request > 0
    assert found.requests > 80
    assert sum(found.ledger[:6]) == pytest.approx(1.0)


def test_more_watermark_means_less_recomputing() -> None:
    shapes = _shapes(400)
    found = [replay(shapes, _memory(watermark=w)) for w in (0.0, 0.1, 0.3)]
    redone = [result.recomputed_per_output_token for result in found]
    assert all(more > less for more, less in pairwise(redone))


def test_a_dearer_model_only_takes_longer() -> None:
    cheap = CostModel(name="cheap", constant=0.01)
    dear = CostModel(name="dear", constant=0.05)
    first, second = (simulate_stream(_shapes(60), _memory(), cost=cost) for cost in (cheap, dear))
    assert second.duration_s == pytest.approx(5 * first.duration_s)
    assert second.steps == first.steps
    assert second.ledger == pytest.approx(first.ledger)
