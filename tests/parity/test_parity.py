"""Greedy tokens and log probabilities against transformers, in float32, for every architecture.

The reference is `generate()` on each prompt alone. Ours must give the same tokens however memory
is given out and whatever else runs.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagelab.engine.llm import LLM
from pagelab.models.fetch import ModelSource, resolve
from pagelab.models.hf_export import to_transformers
from pagelab.models.registry import load_spec
from pagelab.types import RequestOutput, SamplingParams
from tests.support.engines import greedy
from tests.support.tiny_models import TINY, tiny_model

STEPS = 64
TINY_PROMPTS = [
    [random.Random(f"{length} {i}").randrange(256) for _ in range(length)]
    for i, length in enumerate((1, 7, 16, 33, 64, 130, 2))
]
REAL_TEXTS = [
    "Hello!",
    "How are you doing today? I hope everything is going well.",
    "Tell me a story about artificial intelligence and machine learning. " * 10,
    "def fibonacci(n):\n    ",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "contiguous, buddy": {"allocator": "contiguous-max"},
    "contiguous, first fit": {"allocator": "contiguous-max", "placement": "first-fit"},
    "blocks of 1": {"block_size": 1},
    "blocks of 8": {"block_size": 8},
    "blocks of 64": {"block_size": 64},
    "one token a step": {"max_num_batched_tokens": 1},
    "seven tokens a step": {"max_num_batched_tokens": 7},
    "no prefix cache": {"prefix_caching": False},
    "one at a time": {"max_num_seqs": 1},
    "the oracle's attention": {"attention": "reference"},
    "torch's operations": {"attention": "cpu"},
    "torch's operations, seven tokens a step": {"attention": "cpu", "max_num_batched_tokens": 7},
}


def transformers_tokens(model: Any, prompt: Sequence[int], steps: int) -> tuple[int, ...]:
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(ids[0, len(prompt) :].tolist())


@functools.cache
def reference_model(name: str) -> Any:
    source = resolve(str(tiny_model(name)))
    model = to_transformers(source, load_spec(source))
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def expected(name: str) -> list[tuple[int, ...]]:
    return [transformers_tokens(reference_model(name), p, STEPS) for p in TINY_PROMPTS]


def engine(name: str, **options: Any) -> LLM:
    defaults: dict[str, Any] = {"kv_memory": "4MiB", "max_model_len": 256, "check_invariants": True}
    return LLM(str(tiny_model(name)), device="cpu", dtype="float32", **(defaults | options))


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TINY)
def test_tokens_equal_transformers(name: str, variant: str) -> None:
    llm = engine(name, **VARIANTS[variant])
    assert tokens(llm.generate(TINY_PROMPTS, greedy(STEPS))) == expected(name)


@pytest.mark.parametrize("name", TINY)
def test_full_prefix_hits_change_nothing(name: str) -> None:
    llm = engine(name)
    llm.generate(TINY_PROMPTS, greedy(STEPS))
    again = llm.generate(TINY_PROMPTS, greedy(STEPS))
    assert tokens(again) == expected(name)
    hits = [output.metrics.num_cached_tokens for output in again]
    assert hits == [16 * ((len(prompt) - 1) // 16) for prompt in TINY_PROMPTS]


@pytest.mark.parametrize("name", TINY)
def test_preemptions_change_nothing(name: str) -> None:
    bytes_per_token = (
        load_spec(resolve(str(tiny_model(name)))).kv_layout("float32", 8).bytes_per_token
    )
    llm = engine(
        name, kv_memory=280 * bytes_per_token, block_size=8, watermark=0.0, prefix_caching=False
    )
    assert tokens(llm.generate(TINY_PROMPTS, greedy(STEPS))) == expected(name)
    assert llm.core.scheduler.preemptions


@pytest.mark.parametrize("name", TINY)
def test_cancellations_beside_them_change_nothing(name: str) -> None:
    llm = engine(name, max_num_batched_tokens=32)
    requests = []
    others = []
    for prompt in TINY_PROMPTS:
        requests.append(llm.core.add_request(prompt, greedy(STEPS)))
        others.append(llm.core.add_request(prompt[::-1], greedy(STEPS)))
    step = 0
    while llm.core.has_unfinished_requests:
        llm.core.step()
        step += 1
        if step % 5 == 0 and others:
            llm.core.cancel(others.pop().id)
    assert [r.sequences[0].output_token_ids for r in requests] == expected(name)
    assert llm.core.kv.pool.num_held == 0


@pytest.mark.parametrize("name", TINY)
def test_greedy_parallel_samples_are_all_the_greedy_answer(name: str) -> None:
    llm = engine(name)
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, n=3)
    for output, want in zip(llm.generate(TINY_PROMPTS, params), expected(name), strict=True):
        assert {sample.token_ids for sample in output.outputs} == {want[:16]}


@pytest.mark.parametrize("name", TINY)
def test_log_probabilities_equal_transformers(name: str) -> None:
    llm = engine(name, max_num_batched_tokens=24)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=5)
    outputs = llm.generate(TINY_PROMPTS, params)
    for prompt, output in zip(TINY_PROMPTS, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        with torch.inference_mode():
            logits = reference_model(name)(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(dim=-1)
        assert output.outputs[0].logprobs is not None
        for position, got in enumerate(output.outputs[0].logprobs):
            assert got.chosen == pytest.approx(
                float(want[position, output.token_ids[position]]), abs=2e-4
            )
            for token, logprob in got.top:
                assert logprob == pytest.approx(float(want[position, token]), abs=2e-4)


@pytest.mark.parametrize("name", TINY)
def test_a_seeded_request_gives_the_same_tokens_in_any_company(name: str) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=11, ignore_eos=True)
    alone = engine(name).generate([TINY_PROMPTS[3]], params)[0].token_ids
    others = [SamplingParams(max_tokens=30, ignore_eos=True)] * len(TINY_PROMPTS)
    several: list[dict[str, Any]] = [{}, {"max_num_batched_tokens": 5}, {"block_size": 4}]
    for options in several:
        llm = engine(name, **options)
        outputs = llm.generate([*TINY_PROMPTS, TINY_PROMPTS[3]], [*others, params])
        assert outputs[-1].token_ids == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TINY)
def test_lower_precision_is_no_worse_than_transformers_own(name: str, dtype: str) -> None:
    """Both against float32, by relative error of log probabilities over whole prompts."""
    llm = LLM(str(tiny_model(name)), device="cpu", dtype=dtype, kv_memory="4MiB", max_model_len=256)
    source = resolve(str(tiny_model(name)))
    theirs = to_transformers(source, load_spec(source), dtype=dtype)
    errors = {"ours": 0.0, "theirs": 0.0}
    for prompt in TINY_PROMPTS:
        vocab = llm.spec.vocab_size
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=vocab)
        (got,) = llm.generate([prompt], params)[0].outputs[0].logprobs or ()
        ours = torch.empty(vocab)
        for token, logprob in got.top:
            ours[token] = logprob
        with torch.inference_mode():
            want = reference_model(name)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            other = theirs(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        errors["ours"] += float((ours - want).norm() / want.norm())
        errors["theirs"] += float((other - want).norm() / want.norm())
    assert errors["ours"] < 1.5 * errors["theirs"] + 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_repetition_penalties_are_transformers(name: str) -> None:
    def theirs(prompt: list[int], steps: int, penalty: float) -> tuple[int, ...]:
        with torch.inference_mode():
            ids = reference_model(name).generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=steps,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(ids[0, len(prompt) :].tolist())

    kinds = [replace(greedy(24), repetition_penalty=p) for p in (1.05, 1.5, 0.9, 8.0)]
    prompts = TINY_PROMPTS[1:5]
    got = tokens(engine(name).generate(prompts, kinds))
    want = [theirs(p, 24, kind.repetition_penalty) for p, kind in zip(prompts, kinds, strict=True)]
    assert got == want
    assert got != [each[:24] for each in expected(name)[1:5]]


@pytest.mark.parametrize("name", TINY)
def test_log_probabilities_of_prompts_are_transformers(name: str) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=4)
    for prompt, output in zip(
        TINY_PROMPTS,
        engine(name, max_num_batched_tokens=50).generate(TINY_PROMPTS, params),
        strict=True,
    ):
        with torch.inference_mode():
            want = reference_model(name)(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(prompt)
        for row, token, got in zip(want, prompt[1:], output.prompt_logprobs[1:], strict=False):
            assert got is not None
            assert got.chosen == pytest.approx(float(row[token]), abs=1e-4)
            assert [p for _, p in got.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


@pytest.mark.slow
def test_gpt2_at_its_true_shape_equals_transformers(tmp_path: Path) -> None:
    """124 M random parameters: the hub's weights cannot be had everywhere, their shape can."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=0.06)).eval()
    model.save_pretrained(tmp_path)
    prompts = [[random.Random(n).randrange(50257) for _ in range(n)] for n in (2, 40)]
    want = [transformers_tokens(model, prompt, 16) for prompt in prompts]
    assert len(set(want[0] + want[1])) > 4, "a constant answer would prove little"
    for block_size, budget in ((16, 512), (64, 16)):
        llm = LLM(
            str(tmp_path),
            device="cpu",
            dtype="float32",
            kv_memory="32MiB",
            block_size=block_size,
            max_num_batched_tokens=budget,
        )
        assert tokens(llm.generate(prompts, greedy(16))) == want
        assert llm.spec.num_parameters == 124_439_808


# The real model


@pytest.fixture(scope="module")
def real(default_model: ModelSource) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Token ids of the real model's prompts, and transformers' 64 greedy tokens for each."""
    spec = load_spec(default_model)
    model = to_transformers(default_model, spec)
    model.generation_config.eos_token_id = None
    llm = LLM(device="cpu", dtype="float32", kv_memory="64MiB")
    prompts = [llm.tokenizer.encode(text) for text in REAL_TEXTS]
    return prompts, [transformers_tokens(model, prompt, STEPS) for prompt in prompts]


@pytest.mark.default_model
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocator": "contiguous-max", "max_model_len": 256, "block_size": 8},
        {"block_size": 1, "max_num_batched_tokens": 50, "prefix_caching": False},
        {"kv_memory": 224 * 46_080, "watermark": 0.0, "block_size": 8},  # preempts
    ],
    ids=["default", "contiguous", "blocks of 1, chunks", "preemptions"],
)
def test_the_real_model_equals_transformers(
    real: tuple[list[list[int]], list[tuple[int, ...]]], options: dict[str, Any]
) -> None:
    prompts, want = real
    llm = LLM(
        device="cpu", dtype="float32", check_invariants=True, **({"kv_memory": "64MiB"} | options)
    )
    assert tokens(llm.generate(prompts, greedy(STEPS))) == want
    assert tokens(llm.generate(prompts, greedy(STEPS))) == want  # with prefix hits, where on
    assert bool(llm.core.scheduler.preemptions) == ("watermark" in options)
