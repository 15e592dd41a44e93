"""The step loop over a toy model: whatever happens, outputs are those of the request alone."""

from __future__ import annotations

import itertools
import random

import pytest

from pagelab.errors import ConfigError, RequestError, RequestTooLongError
from pagelab.types import FinishReason, SamplingParams
from tests.support.engines import greedy, outputs, run, toy_engine
from tests.support.toy_runner import generate


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{length} {seed}").randrange(97) for _ in range(length)]


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 3, 64])
@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(
    ("allocator", "placement"),
    [("paged", "buddy"), ("contiguous-max", "buddy"), ("contiguous-max", "first-fit")],
)
def test_outputs_do_not_depend_on_memory_or_batching(
    ahead: int, budget: int, block_size: int, prefix_caching: bool, allocator: str, placement: str
) -> None:
    core, _ = toy_engine(
        96 // block_size,
        block_size,
        allocator=allocator,
        placement=placement,
        prefix_caching=prefix_caching,
        budget=budget,
        ahead=ahead,
    )
    prompts = [prompt(n) for n in (1, 5, 17, 5, 9, 16)] + [[*prompt(16), 3]]
    requests = [core.add_request(p, greedy(3 + i)) for i, p in enumerate(prompts)]
    run(core)
    for i, (p, request) in enumerate(zip(prompts, requests, strict=True)):
        assert outputs(request) == [generate(p, 3 + i, 0, 97)]
        assert request.sequences[0].finish_reason is FinishReason.LENGTH
    assert core.kv.pool.num_held == 0
    assert core.kv.num_sequences == 0


@pytest.mark.parametrize("ahead", [1, 2])
def test_preemption_recomputes_and_changes_nothing(ahead: int) -> None:
    core, _ = toy_engine(8, 4, budget=64, ahead=ahead)  # 32 slots for 3 × 24 tokens
    prompts = [prompt(8, seed) for seed in range(3)]
    requests = [core.add_request(p, greedy(16)) for p in prompts]
    run(core)
    for p, request in zip(prompts, requests, strict=True):
        assert outputs(request) == [generate(p, 16, 0, 97)]
    assert core.scheduler.preemptions[0].sequence_id.request_id == "2"
    assert requests[0].metrics.num_preemptions == 0, "the oldest is never preempted"
    assert sum(r.metrics.num_recomputed_tokens for r in requests) > 0


def test_recompute_after_preemption_is_counted_by_what_was_lost() -> None:
    core, _ = toy_engine(8, 4, budget=64, prefix_caching=False)
    requests = [core.add_request(prompt(8, s), greedy(16)) for s in range(3)]
    run(core)
    lost = {r.sequence_id.request_id: 0 for r in core.scheduler.preemptions}
    for record in core.scheduler.preemptions:
        lost[record.sequence_id.request_id] += record.num_tokens
    assert {r.id: r.metrics.num_recomputed_tokens for r in requests if r.id in lost} == lost


def test_latest_request_of_the_lowest_priority_is_preempted_first() -> None:
    core, _ = toy_engine(8, 4, budget=64)
    core.add_request(prompt(8, 1), greedy(16), priority=5)
    core.add_request(prompt(8, 2), greedy(16), priority=0)
    core.add_request(prompt(8, 3), greedy(16), priority=5)
    run(core)
    order = [record.sequence_id.request_id for record in core.scheduler.preemptions]
    assert order[0] == "2"
    assert "1" not in order


def test_head_of_the_queue_is_not_overtaken() -> None:
    core, runner = toy_engine(8, 4, budget=64)
    core.add_request(prompt(20), greedy(12))
    core.add_request(prompt(24), greedy(4))  # must wait
    core.add_request(prompt(2), greedy(2))  # would fit
    run(core)
    first_seen: dict[str, int] = {}
    for batch in runner.batches:
        for part in batch.sequences:
            first_seen.setdefault(part.sequence_id.request_id, batch.step)
    assert first_seen["0"] < first_seen["1"] <= first_seen["2"]


def test_watermark_keeps_blocks_for_those_who_run() -> None:
    core, _ = toy_engine(10, 4, budget=64, watermark=0.3)
    core.add_request(prompt(16), greedy(2))
    core.add_request(prompt(16, 1), greedy(2))
    core.step()
    assert [len(core.scheduler.running), len(core.scheduler.waiting)] == [1, 1]
    run(core)


def test_one_token_budget_is_shared_in_order() -> None:
    core, runner = toy_engine(16, 4, budget=6)
    core.add_request(prompt(4), greedy(4))
    core.add_request(prompt(9, 1), greedy(4))
    run(core)
    plan = [[(p.start, p.num_tokens) for p in b.sequences] for b in runner.batches[:3]]
    assert plan == [[(0, 4), (0, 2)], [(4, 1), (2, 5)], [(5, 1), (7, 2)]]


def test_full_prefix_hit_computes_one_block_again() -> None:
    core, runner = toy_engine(16, 4)
    p = prompt(12)
    first = core.add_request(p, greedy(2))
    run(core)
    runner.batches.clear()
    second = core.add_request(p, greedy(2))
    run(core)
    assert outputs(first) == outputs(second)
    assert second.metrics.num_cached_tokens == 8
    assert (runner.batches[0].sequences[0].start, runner.batches[0].num_tokens) == (8, 4)


def test_parallel_samples_share_the_prompt_and_copy_on_write() -> None:
    core, runner = toy_engine(16, 4, budget=64)
    p = prompt(10)
    request = core.add_request(
        p, SamplingParams(max_tokens=5, temperature=1.0, seed=7, n=3, ignore_eos=True)
    )
    core.step()
    core.step()
    tables = {s.sample: t.block_ids for s, t in core.kv.tables()}
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({tables[0][2], tables[1][2], tables[2][2]}) == 3
    assert [source for source, _ in runner.batches[1].copies] == [tables[0][2]] * 2
    run(core)
    assert outputs(request) == [generate(p, 5, 7 + i, 97) for i in range(3)]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize("allocator", ["paged", "contiguous-max"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_parallel_samples_are_right_at_every_prompt_length(
    length: int, allocator: str, ahead: int
) -> None:
    core, _ = toy_engine(32, 4, allocator=allocator, ahead=ahead, prefix_caching=False)
    request = core.add_request(
        prompt(length), SamplingParams(max_tokens=6, seed=1, n=4, ignore_eos=True)
    )
    run(core)
    assert outputs(request) == [generate(prompt(length), 6, 1 + i, 97) for i in range(4)]


def test_end_of_sequence_stops_and_its_surplus_is_thrown_away() -> None:
    p = prompt(6)
    eos = generate(p, 4, 0, 97)[3]
    for ahead in (1, 2, 3):
        core, _ = toy_engine(eos=(eos,), ahead=ahead)
        request = core.add_request(p, SamplingParams(max_tokens=9, temperature=0))
        run(core)
        assert outputs(request)[0] == generate(p, 9, 0, 97)[: outputs(request)[0].index(eos) + 1]
        assert request.sequences[0].finish_reason is FinishReason.STOP


def test_min_tokens_suppresses_stops() -> None:
    p = prompt(6)
    eos = generate(p, 1, 0, 97)[0]
    core, runner = toy_engine(eos=(eos,))
    request = core.add_request(p, SamplingParams(max_tokens=4, min_tokens=2, temperature=0))
    run(core)
    assert eos not in outputs(request)[0][:2]
    assert runner.batches[0].sequences[0].suppressed == (eos,)


def test_stop_token_ids_end_a_sequence_even_when_eos_is_ignored() -> None:
    p = prompt(6)
    stop = generate(p, 3, 0, 97)[2]
    core, _ = toy_engine()
    params = greedy(9, stop_token_ids=[stop])
    request = core.add_request(p, params)
    run(core)
    assert outputs(request)[0][-1] == stop
    assert request.sequences[0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("ahead", [1, 2])
def test_cancellation_frees_blocks_and_leaves_others_alone(ahead: int) -> None:
    core, _ = toy_engine(16, 4, ahead=ahead)
    keep = core.add_request(prompt(6), greedy(12))
    gone = core.add_request(prompt(7), greedy(12))
    waiting = core.add_request(prompt(8), greedy(12))
    for _ in range(3):
        core.step()
    core.cancel(gone.id)
    core.cancel(waiting.id)
    core.cancel("never was")
    run(core)
    assert gone.sequences[0].finish_reason is FinishReason.CANCELLED
    assert outputs(keep) == [generate(prompt(6), 12, 0, 97)]
    assert core.kv.pool.num_held == 0


def test_a_failing_step_ends_only_its_own_requests() -> None:
    core, runner = toy_engine(16, 4, budget=8, max_num_seqs=2)
    runner.fail_steps = {2}
    requests = [core.add_request(prompt(4, s), greedy(6)) for s in range(4)]
    run(core)
    reasons = [r.sequences[0].finish_reason for r in requests]
    assert reasons == [FinishReason.ERROR] * 2 + [FinishReason.LENGTH] * 2
    assert requests[0].sequences[0].error == "RuntimeError: toy failure"
    assert outputs(requests[3]) == [generate(prompt(4, 3), 6, 0, 97)]
    assert core.kv.pool.num_held == 0


def test_one_sequence_may_fail_alone() -> None:
    core, runner = toy_engine()
    good = core.add_request(prompt(4), greedy(3))
    bad = core.add_request(prompt(5), greedy(3))
    runner.fail_sequences = {bad.sequences[0].id}
    run(core)
    assert bad.sequences[0].error == "toy error"
    assert outputs(good) == [generate(prompt(4), 3, 0, 97)]


def test_interrupt_in_a_step_leaves_an_engine_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    core, runner = toy_engine()
    request = core.add_request(prompt(4), greedy(3))
    collect = runner.collect

    def interrupt(handle: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        core.step()
    assert request.sequences[0].finish_reason is FinishReason.CANCELLED
    assert core.kv.pool.num_held == 0
    monkeypatch.setattr(runner, "collect", collect)
    again = core.add_request(prompt(4), greedy(3))
    run(core)
    assert outputs(again) == [generate(prompt(4), 3, 0, 97)]


def test_blocks_of_a_step_in_flight_are_not_reused_before_it_is_collected() -> None:
    core, runner = toy_engine(16, 4, budget=64, ahead=2)
    victim = core.add_request(prompt(12), greedy(9))
    core.step()  # collects step 0; step 1 is in flight
    held = core.kv.block_ids(victim.sequences[0].id)
    core.cancel(victim.id)
    assert core.kv.holds(victim.sequences[0].id), "step 1 still writes there"
    core.add_request(prompt(8, 1), greedy(2))
    core.step()
    assert not set(held) & set(runner.batches[2].sequences[0].block_ids)
    run(core)
    assert core.kv.pool.num_held == 0


@pytest.mark.parametrize(
    ("tokens", "params", "error", "message"),
    [
        ([], {}, RequestError, "empty"),
        ([97], {}, RequestError, "no token id of this model"),
        ([-1], {}, RequestError, "no token id of this model"),
        ([1] * 32, {}, RequestTooLongError, "--max-model-len"),
        ([1] * 30, {"max_tokens": 3}, RequestTooLongError, "lower max_tokens"),
        ([1] * 30, {"max_tokens": None, "min_tokens": 3}, RequestError, "min_tokens"),
        ([1] * 10, {"max_tokens": 15}, RequestTooLongError, "--kv-memory"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    tokens: list[int], params: dict[str, int], error: type[Exception], message: str
) -> None:
    core, _ = toy_engine(6, 4)  # 24 slots
    with pytest.raises(error, match=message):
        core.add_request(tokens, SamplingParams(**params))  # type: ignore[arg-type]
    assert not core.has_unfinished_requests


def test_a_request_without_max_tokens_goes_on_to_the_models_length() -> None:
    core, _ = toy_engine()
    request = core.add_request(prompt(4), greedy(None))
    run(core)
    assert len(outputs(request)[0]) == 28


def test_an_id_cannot_be_used_twice_at_the_same_time() -> None:
    core, _ = toy_engine()
    core.add_request([1], SamplingParams(), request_id="a")
    with pytest.raises(RequestError, match="in use"):
        core.add_request([1], SamplingParams(), request_id="a")
    run(core)
    core.add_request([1], SamplingParams(), request_id="a")


def test_contiguous_reservation_that_can_never_fit_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="raise --kv-memory or lower --max-model-len"):
        toy_engine(7, 4, allocator="contiguous-max", max_model_len=32)


def test_contiguous_max_reserves_the_whole_length_and_limits_concurrency() -> None:
    core, runner = toy_engine(24, 4, allocator="contiguous-max", budget=64)  # 3 × 32 tokens
    for s in range(5):
        core.add_request(prompt(2, s), greedy(3))
    core.step()
    assert len(core.scheduler.running) == 3
    assert [len(p.block_ids) for p in runner.batches[0].sequences] == [8, 8, 8]
    run(core)


def test_metrics_are_in_order_and_counted_once_a_token() -> None:
    ticks = itertools.count()
    core, _ = toy_engine()
    core.clock = lambda: float(next(ticks))
    request = core.add_request(prompt(4), greedy(5))
    run(core)
    m = request.metrics
    assert m.first_scheduled_time is not None
    assert m.first_token_time is not None
    assert m.finish_time is not None
    assert m.arrival_time < m.first_scheduled_time < m.first_token_time < m.finish_time
    assert len(m.token_times) == 5
    assert m.token_times == sorted(m.token_times)


def test_an_id_is_in_use_until_its_last_step_is_collected() -> None:
    core, _ = toy_engine(ahead=2)
    core.add_request(prompt(4), greedy(8), request_id="x")
    core.step()
    core.cancel("x")
    with pytest.raises(RequestError, match="in use"):
        core.add_request(prompt(4), greedy(8), request_id="x")
    run(core)
    core.add_request(prompt(4), greedy(2), request_id="x")
    run(core)


def test_automatic_ids_avoid_those_that_people_choose() -> None:
    core, _ = toy_engine()
    core.add_request(prompt(4), greedy(2), request_id="1")
    assert core.add_request(prompt(5), greedy(2)).id != "1"
    run(core)


def test_stop_ids_outside_the_vocabulary_are_refused() -> None:
    core, _ = toy_engine(eos=(5, 10_000))
    with pytest.raises(RequestError, match="stop token id 97"):
        core.add_request(prompt(4), greedy(2, stop_token_ids=[97]))
    request = core.add_request(prompt(4), SamplingParams(max_tokens=4, min_tokens=3, seed=1))
    run(core)
    assert request.finished


def test_a_recompute_that_is_preempted_again_is_counted_as_far_as_it_went() -> None:
    core, runner = toy_engine(8, 4, budget=3, prefix_caching=False)
    requests = [core.add_request(prompt(8, s), greedy(16)) for s in range(4)]
    run(core)
    seen: dict[str, int] = {}
    again: dict[str, int] = {}
    for batch in runner.batches:
        for part in batch.sequences:
            name = part.sequence_id.request_id
            most = seen.get(name, 0)
            again[name] = again.get(name, 0) + max(0, min(part.end, most) - part.start)
            seen[name] = max(most, part.end)
    assert {r.id: r.metrics.num_recomputed_tokens for r in requests} == again
