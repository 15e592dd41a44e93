"""Sampling: filters by hand-made distributions, independence, reproducibility."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from pagelab.execution.sampler import NO_TOKEN, filtered_probabilities, sample, uniform
from pagelab.scheduling.batch import ScheduledSequence
from pagelab.types import RequestId, SampledToken, SamplingParams, SequenceId

PROBABILITIES = [0.5, 0.25, 0.15, 0.07, 0.03]
LOGITS = torch.tensor(PROBABILITIES).log()


def part(
    params: SamplingParams, seed: int = 0, index: int = 0, suppressed: tuple[int, ...] = ()
) -> ScheduledSequence:
    return ScheduledSequence(
        SequenceId(RequestId("r"), 0), 0, 1, (0,), (), True, (seed, index), params, suppressed
    )


def one(logits: torch.Tensor, sequence: ScheduledSequence) -> SampledToken:
    (token,) = sample(logits[None].clone(), [sequence])
    assert not isinstance(token, str)
    return token


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"min_p": 0.2}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
    ],
)
def test_filters_keep_what_their_definitions_say(
    changes: dict[str, float], kept: list[float]
) -> None:
    params = replace(SamplingParams(), **changes)  # type: ignore[arg-type]
    got = filtered_probabilities(LOGITS, params)
    torch.testing.assert_close(got, torch.tensor(kept).double(), rtol=1e-6, atol=1e-7)


def test_temperature_divides_logits() -> None:
    got = filtered_probabilities(LOGITS, SamplingParams(temperature=2.0))
    torch.testing.assert_close(got, (LOGITS.double() / 2).softmax(0))


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    token = one(torch.tensor([3.0, 9.0, -1e30]), part(SamplingParams(temperature=1e-300)))
    assert token.token_id == 1


def test_draws_follow_the_distribution() -> None:
    counts = Counter(
        one(LOGITS, part(SamplingParams(), seed=1, index=i)).token_id for i in range(4000)
    )
    for token, probability in enumerate(PROBABILITIES):
        sigma = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(counts[token] / 4000 - probability) < 4 * sigma


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 500)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=5, logprobs=2),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0.3),
    ]
    parts = [part(params, seed=i) for i, params in enumerate(kinds)]
    together = sample(logits, parts)
    assert together == [one(row, p) for row, p in zip(logits, parts, strict=True)]
    assert together[::-1] == sample(logits.flip(0), parts[::-1])


def test_seeds_and_positions_give_different_numbers_and_the_same_ones_again() -> None:
    numbers = {uniform(seed, index) for seed in range(50) for index in range(50)}
    assert len(numbers) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(3, 4) == uniform(3, 4)
    assert 0.45 < sum(numbers) / 2500 < 0.55


def test_suppressed_tokens_are_never_chosen() -> None:
    greedy = SamplingParams(temperature=0)
    assert one(LOGITS, part(greedy, suppressed=(0, 1))).token_id == 2
    for index in range(200):
        assert one(LOGITS, part(SamplingParams(), index=index, suppressed=(0,))).token_id != 0


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(temperature=5.0, top_k=1, logprobs=3)
    token = one(LOGITS, part(params))
    assert token.token_id == 0
    assert token.logprobs is not None
    assert token.logprobs.chosen == pytest.approx(math.log(0.5), abs=1e-5)
    assert [t for t, _ in token.logprobs.top] == [0, 1, 2]
    assert one(LOGITS, part(SamplingParams(logprobs=0))).logprobs is not None
    assert one(LOGITS, part(SamplingParams())).logprobs is None


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams()])
def test_rows_that_are_not_finite_give_nothing_and_others_go_on(params: SamplingParams) -> None:
    logits = torch.stack(
        [LOGITS, torch.full((5,), math.nan), LOGITS, torch.full((5,), -math.inf), LOGITS]
    )
    logits[4, 2] = math.nan
    tokens = sample(logits, [part(params)] * 5)
    assert [token == NO_TOKEN for token in tokens] == [False, True, False, True, True]
