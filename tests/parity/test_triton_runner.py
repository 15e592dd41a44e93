"""The GPU's runner against the CPU's: the same greedy tokens, whatever else goes on.

Without a GPU it runs in Triton's interpreter, where a step takes a quarter of a second: so few
tokens, and each test stands for several things. `tests/gpu` asks for more, on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the GPU's runner needs Triton")

import torch

from pagelab.engine.llm import LLM
from pagelab.types import BlockId, FinishReason, GuidedDecoding, RequestOutput, SamplingParams
from tests.support.engines import greedy
from tests.support.gpu_runners import gpu_runner_of
from tests.support.paged import DEVICE, HALF
from tests.support.tiny_models import TINY, tiny_model

STEPS = 3
SHORT, LONG, MIDDLE = (  # in steps of 16 tokens, beside the short one: 13 of the long one, then 1
    [random.Random(f"{length} {i}").randrange(256) for i in range(length)] for length in (3, 14, 6)
)


def engine(name: str, **options: Any) -> LLM:
    defaults: dict[str, Any] = {
        "device": DEVICE.type,
        "dtype": "float32",
        "attention": "triton",
        "kv_memory": "256KiB",
        "block_size": 4,
        "max_model_len": 32,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "check_invariants": True,
        "threads": 1,
    }
    return LLM(str(tiny_model(name)), **(defaults | options))


def cpu_engine(name: str, **options: Any) -> LLM:
    return engine(name, device="cpu", attention="cpu", **options)


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


@functools.cache
def expected(name: str, *prompts: tuple[int, ...], steps: int = STEPS) -> list[tuple[int, ...]]:
    return tokens(cpu_engine(name).generate(prompts, greedy(steps)))


def answer(name: str, prompt: list[int], steps: int = STEPS) -> tuple[int, ...]:
    """The CPU's, for the prompt alone."""
    return expected(name, tuple(prompt), steps=steps)[0]


@pytest.mark.parametrize(
    ("name", "ahead", "allocator"),
    [
        (name, 1 + 2 * (i % 2), ("paged", "paged", "contiguous-max")[i % 3])
        for i, name in enumerate(TINY)
    ],
)
def test_greedy_tokens_equal_the_cpus(name: str, ahead: int, allocator: str) -> None:
    llm = engine(name, max_steps_in_flight=ahead, allocator=allocator)
    outputs = llm.generate([SHORT, LONG], greedy(STEPS))
    assert tokens(outputs) == [answer(name, SHORT), answer(name, LONG)]


def test_preemptions_and_prefix_hits_change_nothing() -> None:
    block = 4 * cpu_engine("llama").spec.kv_layout("float32", 4).bytes_per_token
    llm = engine("llama", kv_memory=6 * block, watermark=0.0, max_steps_in_flight=3)
    want = [answer("llama", MIDDLE, 8), answer("llama", SHORT, 8)]
    assert tokens(llm.generate([MIDDLE, SHORT], greedy(8))) == want
    assert llm.core.scheduler.preemptions
    (again,) = llm.generate([MIDDLE], greedy(1))
    assert again.token_ids == want[0][:1]
    assert again.metrics.num_cached_tokens == 4
    assert llm.core.kv.pool.num_held == 0


def test_parallel_samples_are_those_of_their_seeds_alone_and_in_any_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = engine("qwen2", max_steps_in_flight=3, prefix_caching=False)
    cache = gpu_runner_of(llm).cache
    copied: list[tuple[BlockId, BlockId]] = []
    copy_blocks = cache.copy_blocks

    def noted(copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        copied.extend(copies)
        copy_blocks(copies)

    monkeypatch.setattr(cache, "copy_blocks", noted)
    drawn = SamplingParams(max_tokens=STEPS, temperature=1.5, seed=11, n=3, ignore_eos=True)
    forked, other = llm.generate([MIDDLE, SHORT], [drawn, greedy(STEPS)])
    assert other.token_ids == answer("qwen2", SHORT)
    assert copied, "a block that is shared and not full is copied before it is written"
    samples = [output.token_ids for output in forked.outputs]
    assert len(set(samples)) > 1
    single = replace(drawn, n=1, seed=13)
    (alone,) = engine("qwen2", max_num_seqs=1).generate([MIDDLE], single)
    assert alone.token_ids == samples[2]


def test_more_sequences_than_run_at_once_may_be_cancelled_within_steps_in_flight() -> None:
    llm = engine("gpt2", max_steps_in_flight=3, max_num_seqs=1)
    for i in range(4):
        other = llm.core.add_request([i, 1], greedy(20))
        llm.core.step()
        assert other.sequences[0].error is None
        llm.core.cancel(other.id)
    (output,) = llm.generate([SHORT], greedy(STEPS))
    assert output.token_ids == answer("gpt2", SHORT)
    assert llm.core.kv.pool.num_held == 0


def fail(*args: Any) -> None:
    raise RuntimeError("no memory")


def test_a_step_that_fails_harms_only_those_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("llama", max_num_seqs=1, max_steps_in_flight=1)
    failed = llm.core.add_request([5, 6], greedy(8))
    llm.core.step()
    with monkeypatch.context() as broken:
        broken.setattr("pagelab.execution.gpu_runner.apply_updates", fail)
        llm.core.step()  # the first one that tells the device the order of the sequences
    assert failed.sequences[0].finish_reason is FinishReason.ERROR
    llm.generate([[1, 2], [3, 4]], greedy(1))  # now the failed one's row is given away
    (output,) = llm.generate([SHORT], greedy(STEPS))
    assert output.token_ids == answer("llama", SHORT)


def test_a_step_that_fails_takes_no_results_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(start, start + 16)) for start in (1, 30, 60)]
    llm = engine("llama", max_steps_in_flight=2, max_num_batched_tokens=16, prefix_caching=False)
    runner = gpu_runner_of(llm)
    run, calls = runner._run, itertools.count()

    def fails_the_second_time(*args: Any) -> None:
        if next(calls) == 1:
            fail()
        run(*args)

    monkeypatch.setattr(runner, "_run", fails_the_second_time)
    first, second, third = llm.generate([tuple(prompt) for prompt in prompts], greedy(1))
    assert second.outputs[0].error is not None
    # the first one's step was under way and not collected when the second one's failed
    assert first.token_ids == answer("llama", prompts[0], 1)
    assert third.token_ids == answer("llama", prompts[2], 1)


def test_a_temperature_beyond_float32_is_the_largest_one() -> None:
    hot = SamplingParams(max_tokens=2, temperature=1e39, seed=1, ignore_eos=True)
    prompt = list(range(5))
    llm = engine("llama")
    drawn, plain = llm.generate([tuple(prompt)] * 2, [hot, greedy(2)])
    assert len(drawn.token_ids) == 2
    assert plain.token_ids == answer("llama", prompt, 2)


def test_failures_one_after_the_other_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = engine("qwen2", max_num_seqs=1, max_steps_in_flight=1)
    with monkeypatch.context() as broken:
        broken.setattr(gpu_runner_of(llm).decoder, "forward", fail)
        failed = llm.generate([[1, 2]] * 5, greedy(2))
    assert {output.outputs[0].error for output in failed} == {"RuntimeError: no memory"}
    (output,) = llm.generate([SHORT], greedy(STEPS))
    assert output.token_ids == answer("qwen2", SHORT)


def test_conditions_and_log_probabilities_are_the_cpus() -> None:
    first = answer("llama3", SHORT)
    several = [
        SamplingParams(max_tokens=STEPS, temperature=0, stop_token_ids=[first[1]], logprobs=0),
        SamplingParams(
            max_tokens=STEPS,
            min_tokens=2,
            temperature=0,
            stop_token_ids=[*range(200), 263],  # more than the sampling kernel can forbid
            logprobs=3,
        ),
        SamplingParams(max_tokens=STEPS, min_tokens=2, temperature=0, stop_token_ids=first),
    ]
    prompts = [SHORT, MIDDLE, SHORT]
    got = engine("llama3", max_steps_in_flight=2).generate(prompts, several)
    want = cpu_engine("llama3").generate(prompts, several)
    assert tokens(got) == tokens(want)
    assert [o.finish_reason for o in got] == [o.finish_reason for o in want]
    assert len(got[0].token_ids) == 2
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        pairs = zip(ours.outputs[0].logprobs or (), theirs.outputs[0].logprobs or (), strict=True)
        for a, b in pairs:
            assert a.chosen == pytest.approx(b.chosen, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)
    assert got[2].outputs[0].logprobs is None


def test_changed_logits_guidance_and_prompts_are_the_cpus() -> None:
    pytest.importorskip("llguidance", reason="guided decoding needs the extra pagelab[guided]")
    plain, kinds = (
        greedy(STEPS),
        [
            replace(greedy(STEPS), repetition_penalty=50.0, logprobs=1),
            replace(greedy(STEPS), frequency_penalty=2.0, presence_penalty=2.0, prompt_logprobs=2),
            replace(
                greedy(STEPS), logit_bias={7: 6.0}, min_tokens=2, stop_token_ids=[*range(200), 263]
            ),
            SamplingParams(max_tokens=8, seed=3, guided=GuidedDecoding(choice=["ab", "cad"]), n=2),
        ],
    )
    prompts = [SHORT, LONG, MIDDLE, SHORT, MIDDLE]
    got = engine("llama", max_steps_in_flight=3, max_num_seqs=6).generate(prompts, [*kinds, plain])
    want = cpu_engine("llama", max_num_seqs=6).generate(prompts, [*kinds, plain])
    for ours, theirs in zip(got, want, strict=True):
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
        assert [o.finish_reason for o in ours.outputs] == [o.finish_reason for o in theirs.outputs]
    assert {each.text for each in got[3].outputs} <= {"ab", "cad"}
    first = got[0].outputs[0].logprobs, want[0].outputs[0].logprobs
    for a, b in [*zip(*(rows or () for rows in first), strict=True)]:
        assert a.chosen == pytest.approx(b.chosen, abs=1e-4)
        assert a.top[0] == pytest.approx(b.top[0], abs=1e-4)  # the model's own
    rows = zip(got[1].prompt_logprobs or (), want[1].prompt_logprobs or (), strict=True)
    assert len(got[1].prompt_logprobs or ()) == len(LONG)
    for found, wanted in [*rows][1:]:
        assert found is not None
        assert wanted is not None
        assert found.chosen == pytest.approx(wanted.chosen, abs=1e-4)
        assert [token for token, _ in found.top] == [token for token, _ in wanted.top]


def test_logits_that_cannot_be_changed_fail_their_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = engine("qwen2", max_steps_in_flight=2)
    monkeypatch.setattr("pagelab.execution.logits.process.penalize", fail)
    bad = replace(greedy(STEPS), presence_penalty=1.0)
    failed, fine = llm.generate([MIDDLE, SHORT], [bad, greedy(STEPS)])
    assert failed.finish_reason is FinishReason.ERROR
    assert "RuntimeError: no memory" in (failed.outputs[0].error or "")
    assert fine.token_ids == answer("qwen2", SHORT)


def test_steps_that_change_logits_are_never_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("qwen2")
    ran: list[object] = []

    def noted(key: object, work: Callable[[], None]) -> None:
        ran.append(key)
        work()

    monkeypatch.setattr(gpu_runner_of(llm).graphs, "run", noted)
    llm.generate([SHORT], replace(greedy(2), logit_bias={3: 1.0}))
    assert not ran
    llm.generate([SHORT], greedy(2))
    assert len(ran) == 2


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_lower_precision_is_no_worse_than_the_cpus(name: str) -> None:
    """Its products go through the kernels for few rows, norms folded into the weights."""
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=264)
    dtype = str(HALF).removeprefix("torch.")
    engines = {
        "exact": cpu_engine(name),
        "cpu": cpu_engine(name, dtype=dtype),
        "ours": engine(name, dtype=dtype),
    }
    found: dict[str, torch.Tensor] = {}
    for kind, llm in engines.items():
        outputs = llm.generate([MIDDLE, SHORT], params)
        rows = [dict(each.top) for o in outputs for each in o.outputs[0].logprobs or ()]
        found[kind] = torch.tensor([[row[token] for token in range(264)] for row in rows])
    error = {kind: float((found[kind] - found["exact"]).norm()) for kind in ("cpu", "ours")}
    assert 0 < error["ours"] < 1.5 * error["cpu"] + 1e-3
    # greedy tokens without log probabilities come from the head's largest outputs, not its logits
    again = engines["ours"].generate([SHORT], greedy(2))
    assert again[0].token_ids == outputs[1].token_ids


def test_batch_invariant_logits_are_the_same_to_the_bit_in_any_batch() -> None:
    dtype = str(HALF).removeprefix("torch.")
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=264)
    several = engine("qwen2", dtype=dtype, batch_invariant=True)
    *_, among = several.generate([[7], SHORT], params)
    alone = engine("qwen2", dtype=dtype, batch_invariant=True, max_num_batched_tokens=2)
    (single,) = alone.generate([SHORT], params)
    assert single.outputs[0].logprobs == among.outputs[0].logprobs
