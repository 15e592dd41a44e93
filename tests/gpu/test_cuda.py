"""On an NVIDIA GPU: the CPU's tokens in float32 however they are computed, and in bfloat16 no
worse than transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pagelab.types import SamplingParams
from tests.support.engines import greedy
from tests.support.exactness import (
    PREEMPTING,
    PROMPTS,
    STEPS,
    VARIANTS,
    Precision,
    equal_tokens,
    precision,
    save_true_shape,
    tiny_engine,
    tokens_of_the_cpu,
    variant_engine,
)
from tests.support.gpu_runners import gpu_runner_of
from tests.support.tiny_models import TINY, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DRAWN = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)


def gpu_engine(name: str, **options: Any) -> Any:
    return tiny_engine(name, device="cuda", attention="triton", **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_equal_the_cpus(name: str, variant: str) -> None:
    llm = variant_engine(name, variant, "cuda")
    right, total = equal_tokens(llm, name)
    assert right == total
    graphs = len(gpu_runner_of(llm).graphs)
    assert (graphs > 0) == VARIANTS[variant].get("cuda_graphs", True)
    assert bool(llm.core.scheduler.preemptions) == (variant == PREEMPTING)
    assert llm.core.kv.pool.num_held == 0


@pytest.mark.parametrize("name", TINY)
def test_cancellations_beside_them_change_nothing(name: str) -> None:
    llm = gpu_engine(name, max_num_batched_tokens=32, max_num_seqs=8, max_steps_in_flight=3)
    requests, others = [], []
    for prompt in PROMPTS:
        requests.append(llm.core.add_request(prompt, greedy(STEPS)))
        others.append(llm.core.add_request(prompt[::-1], greedy(STEPS)))
    for step in range(10_000):
        if not llm.core.has_unfinished_requests:
            break
        llm.core.step()
        if step % 5 == 0 and others:
            llm.core.cancel(others.pop().id)
    assert [r.sequences[0].output_token_ids for r in requests] == tokens_of_the_cpu(name)
    assert llm.core.kv.pool.num_held == 0


@pytest.mark.parametrize("name", TINY)
def test_a_seeded_request_gives_the_same_tokens_in_any_company(name: str) -> None:
    (alone,) = gpu_engine(name).generate([PROMPTS[3]], DRAWN)
    others = [SamplingParams(max_tokens=30, ignore_eos=True)] * len(PROMPTS)
    several: list[dict[str, Any]] = [
        {},
        {"max_num_batched_tokens": 5},
        {"block_size": 8, "max_steps_in_flight": 3},
        {"cuda_graphs": False},
    ]
    for options in several:
        llm = gpu_engine(name, **options)
        *_, among = llm.generate([*PROMPTS, PROMPTS[3]], [*others, DRAWN])
        assert among.token_ids == alone.token_ids


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_parallel_samples_are_those_of_their_seeds(name: str) -> None:
    llm = gpu_engine(name, prefix_caching=False)
    params = SamplingParams(max_tokens=24, temperature=0.9, seed=11, n=3, ignore_eos=True)
    (forked,) = llm.generate([PROMPTS[3]], params)
    singles = [
        SamplingParams(max_tokens=24, temperature=0.9, seed=11 + i, ignore_eos=True)
        for i in range(3)
    ]
    alone = llm.generate([PROMPTS[3]] * 3, singles)
    assert [o.token_ids for o in forked.outputs] == [o.token_ids for o in alone]
    assert len({o.token_ids for o in alone}) == 3


@pytest.mark.parametrize("name", TINY)
def test_log_probabilities_equal_the_cpus(name: str) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=5)
    got = gpu_engine(name, max_num_batched_tokens=24).generate(PROMPTS, params)
    want = tiny_engine(name, device="cpu").generate(PROMPTS, params)
    for ours, theirs in zip(got, want, strict=True):
        pairs = zip(ours.outputs[0].logprobs or (), theirs.outputs[0].logprobs or (), strict=True)
        for a, b in pairs:
            assert a.chosen == pytest.approx(b.chosen, abs=2e-4)
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=2e-4)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_batch_invariant_tokens_and_log_probabilities_are_the_same_to_the_bit(name: str) -> None:
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=264)
    llm = gpu_engine(name, dtype="bfloat16", batch_invariant=True, prefix_caching=False)
    together = llm.generate(PROMPTS, params)
    for prompt, among in zip(PROMPTS, together, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert alone.outputs[0].logprobs == among.outputs[0].logprobs


def no_worse(found: Precision) -> None:
    """Mean KL within 1.5 times transformers', and the largest difference within 2 times."""
    assert found.ours.mean_kl < 1.5 * found.theirs.mean_kl + 1e-7
    assert found.ours.largest < 2 * found.theirs.largest + 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TINY)
def test_lower_precision_is_no_worse_than_transformers_own(name: str, dtype: str) -> None:
    no_worse(precision(tiny_model(name), PROMPTS, dtype, "cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3-0.6b"])
def test_true_shapes_in_bfloat16_are_no_worse_than_transformers_own(
    name: str, tmp_path: Path
) -> None:
    save_true_shape(name, tmp_path)
    no_worse(precision(tmp_path, PROMPTS, "bfloat16", "cuda"))
