"""Penalties, bias and prompt log probabilities on an engine: in any company, after preemption."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from pagelab.engine.llm import LLM
from pagelab.errors import RequestError
from pagelab.types import FinishReason, RequestOutput, SamplingParams
from tests.support.engines import greedy
from tests.support.tiny_models import VOCAB, tiny_model

PROMPT = [random.Random(i).randrange(256) for i in range(37)]


def engine(name: str = "llama", **options: Any) -> LLM:
    options = {"kv_memory": "4MiB", "device": "cpu", "dtype": "float32"} | options
    return LLM(str(tiny_model(name)), check_invariants=True, **options)


def tokens(output: RequestOutput) -> list[tuple[int, ...]]:
    return [each.token_ids for each in output.outputs]


def by_hand(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    """Greedy decoding, one request a token, penalties and bias worked out from the log
    probabilities of all tokens (which differ from logits by a constant a row).
    """
    output: list[int] = []
    assert params.max_tokens is not None
    for _ in range(params.max_tokens):
        ask = SamplingParams(max_tokens=1, temperature=0, logprobs=VOCAB)
        (found,) = llm.generate([[*prompt, *output]], ask)
        scores = dict((found.outputs[0].logprobs or ())[0].top)
        for token, count in Counter(output).items():
            scores[token] -= params.presence_penalty + count * params.frequency_penalty
        for token, bias in (params.logit_bias or {}).items():
            scores[token] += bias
        output.append(max(scores, key=lambda token: scores[token]))
    return tuple(output)


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"frequency_penalty": -2.0, "presence_penalty": 0.5},
        {"logit_bias": {7: 3.0, 11: 2.5, 13: -100}, "frequency_penalty": 1.5},
    ],
)
def test_penalties_and_bias_give_the_tokens_worked_out_by_hand(changes: dict[str, Any]) -> None:
    llm = engine()
    params = replace(greedy(12), **changes)
    (output,) = llm.generate([PROMPT], params)
    assert output.token_ids == by_hand(llm, PROMPT, params)


def test_repetition_is_over_the_prompt_too() -> None:
    llm = engine()
    strong = replace(greedy(24), repetition_penalty=1e6)
    (output,) = llm.generate([PROMPT], strong)
    assert len(set(output.token_ids)) == 24
    assert not set(output.token_ids) & set(PROMPT)


def test_a_large_bias_forces_or_forbids_a_token() -> None:
    llm = engine()
    first = llm.generate([PROMPT], greedy(8))[0].token_ids
    forced = llm.generate([PROMPT], replace(greedy(8), logit_bias={9: 100}))[0].token_ids
    assert set(forced) == {9}
    forbidden = replace(greedy(8), logit_bias=dict.fromkeys(first, -100.0))
    assert not set(llm.generate([PROMPT], forbidden)[0].token_ids) & set(first)


KINDS: list[SamplingParams] = [
    SamplingParams(max_tokens=20, seed=1, repetition_penalty=1.3, n=3),
    SamplingParams(max_tokens=20, seed=2, frequency_penalty=1.0, presence_penalty=-1.0),
    SamplingParams(max_tokens=20, temperature=0, presence_penalty=2.0, logit_bias={3: 4.0}),
    # (with seed 3 a number lies within 2e-7 of a border between two tokens: rounding decides)
    SamplingParams(max_tokens=20, seed=5, logit_bias={3: 4.0}, min_tokens=5, prompt_logprobs=2),
    SamplingParams(max_tokens=20, temperature=0, n=2, prompt_logprobs=0),
    SamplingParams(max_tokens=20, seed=4),
]


@pytest.mark.parametrize("allocator", ["paged", "contiguous-max"])
def test_the_same_tokens_alone_in_a_batch_and_after_preemptions(allocator: str) -> None:
    roomy = engine()
    prompts = [PROMPT[: 5 + 3 * i] for i in range(len(KINDS))]
    want = [roomy.generate([p], k)[0] for p, k in zip(prompts, KINDS, strict=True)]
    block = 8 * roomy.spec.kv_layout("float32", 8).bytes_per_token
    tight = engine(
        kv_memory=12 * block,
        block_size=8,
        watermark=0.0,
        max_model_len=64,
        max_num_batched_tokens=7,
        allocator=allocator,
    )
    got = tight.generate(prompts, KINDS)
    assert (tight.core.scheduler.num_preemptions > 0) == (allocator == "paged")
    for ours, theirs in zip(got, want, strict=True):
        assert tokens(ours) == tokens(theirs)
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        for a, b in zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.chosen == pytest.approx(b.chosen, abs=1e-4)
                assert [token for token, _ in a.top] == [token for token, _ in b.top]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [3, 512])
def test_log_probabilities_of_a_prompt_are_those_of_the_same_tokens_when_generated(
    name: str, budget: int
) -> None:
    llm = engine(name, max_num_batched_tokens=budget)
    (made,) = llm.generate([PROMPT], replace(greedy(40), logprobs=3))
    whole = [*PROMPT, *made.token_ids]
    (read,) = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert read.metrics.num_cached_tokens == 0
    assert read.prompt_logprobs is not None
    assert len(read.prompt_logprobs) == len(whole)
    assert read.prompt_logprobs[0] is None
    got = read.prompt_logprobs[len(PROMPT) :]
    for a, b in zip(got, made.outputs[0].logprobs or (), strict=True):
        assert a is not None
        assert a.chosen == pytest.approx(b.chosen, abs=1e-4)
        assert [token for token, _ in a.top] == [token for token, _ in b.top]


def test_every_position_of_a_prompt_is_there_whatever_the_cache_holds() -> None:
    llm = engine()
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    first, again = (llm.generate([PROMPT], params)[0] for _ in range(2))
    assert first.prompt_logprobs is not None
    assert again.prompt_logprobs is not None
    pairs = zip(first.prompt_logprobs[1:], again.prompt_logprobs[1:], strict=True)
    assert all(a == b for a, b in pairs)
    total = sum(each.chosen for each in first.prompt_logprobs[1:] if each is not None)
    (plain,) = llm.generate([PROMPT], greedy(1))
    assert plain.metrics.num_cached_tokens == 32
    assert plain.prompt_logprobs is None
    assert total < 0
    (one,) = llm.generate([[5]], params)
    assert one.prompt_logprobs == (None,)


def test_a_request_that_fails_has_no_half_of_a_prompt() -> None:
    llm = engine(max_num_batched_tokens=8, attention="cpu")
    with torch.inference_mode():
        llm.core.runner.decoder.embedding[200] = torch.nan  # type: ignore[attr-defined]
    bad = [*[p for p in PROMPT if p != 200][:20], 200]
    params = SamplingParams(max_tokens=2, prompt_logprobs=1)
    (output,) = llm.generate([bad], params)
    assert output.finish_reason is FinishReason.ERROR
    assert output.prompt_logprobs is None


def test_a_row_that_fails_takes_nobody_else_along(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine()
    prompts = [PROMPT, PROMPT[:9], PROMPT[:4]]
    kinds = [greedy(6), replace(greedy(6), presence_penalty=1.0), greedy(6)]
    want = llm.generate(prompts, kinds)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("pagelab.execution.logits.process.penalize", broken)
    got = llm.generate(prompts, kinds)
    assert got[1].finish_reason is FinishReason.ERROR
    assert "RuntimeError: broken" in (got[1].outputs[0].error or "")
    assert [tokens(got[i]) for i in (0, 2)] == [tokens(want[i]) for i in (0, 2)]
    assert llm.core.kv.pool.num_held == 0


def test_priorities_decide_who_runs_first() -> None:
    llm = engine(max_num_seqs=1)
    outputs = llm.generate([[1], [2], [3]], greedy(3), priority=[2, 0, 1])
    starts = [output.metrics.first_scheduled_time or 0.0 for output in outputs]
    assert sorted(range(3), key=lambda i: starts[i]) == [1, 2, 0]


@pytest.mark.parametrize("priority", [[1], "a", 1.5, [1, None], True])
def test_priorities_that_are_none_are_request_errors(priority: Any) -> None:
    llm = engine()
    with pytest.raises(RequestError, match="priorit"):
        llm.generate([[1], [2]], greedy(3), priority=priority)
    assert not llm.core.has_unfinished_requests


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"frequency_penalty": "1"},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": {1: 101}},
        {"logit_bias": {1: None}},
        {"logit_bias": [1]},
        {"prompt_logprobs": -1},
        {"prompt_logprobs": True},
    ],
)
def test_values_out_of_range_are_request_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(changes))):
        SamplingParams(**changes)


def test_a_bias_on_a_token_that_is_none_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        engine().generate([[1]], SamplingParams(logit_bias={VOCAB: 1.0}))


def test_parameters_are_kept_apart_from_the_dictionary_they_came_from() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}
    assert hash(params) == hash(SamplingParams(logit_bias={3: 1.0}))
    assert SamplingParams(logit_bias={}).logit_bias is None
