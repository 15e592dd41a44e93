"""Penalties, bias and masks on rows of logits: by their definitions, and each row for itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelab.execution.logits import process as module
from pagelab.execution.logits.logprobs import ROWS_AT_ONCE, prompt_logprobs, prompt_rows
from pagelab.execution.logits.process import penalize, process
from pagelab.execution.sampler import NO_TOKEN, sample
from pagelab.scheduling.batch import LogitsInputs, ScheduledSequence
from pagelab.types import RequestId, SampledToken, SamplingParams, SequenceId

VOCAB = 11
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB)


def part(
    params: SamplingParams, inputs: LogitsInputs | None = None, name: str = "r", **changes: Any
) -> ScheduledSequence:
    sequence_id = SequenceId(RequestId(name), 0)
    return ScheduledSequence(
        sequence_id, 0, 1, (0,), (), True, (0, 0), params, logits=inputs
    )._replace(**changes)


def bits(tokens: Sequence[int]) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(-(-VOCAB // 8), "little")


@settings(deadline=None)
@given(
    logits=LOGITS,
    prompt=TOKENS,
    output=TOKENS,
    repetition=st.floats(0.1, 4),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_are_what_their_definitions_say(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    counts = Counter(output)
    want = []
    for token, logit in enumerate(logits):
        if token in prompt or token in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        want.append(logit - frequency * counts[token] - presence * (counts[token] > 0))
    got = torch.tensor(logits, dtype=torch.float32)
    penalize(got, params, prompt, output)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-4, atol=1e-4)


def test_no_penalty_changes_nothing_to_the_bit() -> None:
    logits = torch.randn(VOCAB)
    got = logits.clone()
    penalize(got, SamplingParams(), [1, 2], [3, 3])
    assert torch.equal(got, logits)


def test_a_bias_is_added_and_a_mask_leaves_only_what_it_allows() -> None:
    logits = torch.zeros(1, VOCAB)
    params = SamplingParams(logit_bias={2: 5.0, 4: -3.5})
    assert not process(logits, [part(params, LogitsInputs(allowed=bits([0, 2, 10])))])
    want = [0.0, -math.inf, 5.0, *[-math.inf] * 7, 0.0]
    assert logits[0].tolist() == want


@settings(deadline=None)
@given(tokens=st.sets(st.integers(0, VOCAB - 1), min_size=1), logits=LOGITS)
def test_what_is_sampled_is_allowed(tokens: set[int], logits: list[float]) -> None:
    row = torch.tensor([logits])
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=2.0, seed=1)):
        (token,) = sample(row.clone(), [part(params, LogitsInputs(allowed=bits(sorted(tokens))))])
        assert isinstance(token, SampledToken)
        assert token.token_id in tokens


def test_a_short_mask_allows_nothing_beyond_itself_and_a_long_one_is_cut() -> None:
    for mask, want in ((b"\x01", [0]), (bits(range(VOCAB)) + b"\xff\xff", list(range(VOCAB)))):
        logits = torch.zeros(1, VOCAB)
        process(logits, [part(SamplingParams(), LogitsInputs(allowed=mask))])
        assert logits[0].isfinite().nonzero().flatten().tolist() == want


def test_rows_do_not_depend_on_each_other_and_log_probabilities_are_the_models_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    parts = [
        part(SamplingParams(temperature=0, logprobs=2)),
        part(
            SamplingParams(temperature=0, repetition_penalty=3.0, logprobs=2),
            LogitsInputs((1, 2), tuple(range(6))),
        ),
        part(SamplingParams(temperature=0, logit_bias={7: 100.0}, logprobs=2), LogitsInputs()),
        part(SamplingParams(seed=3, logprobs=2), LogitsInputs(allowed=bits([4]))),
    ]
    together = sample(logits, parts)
    assert torch.equal(logits[0], before[0])
    logits = before
    alone = [sample(row[None].clone(), [p])[0] for row, p in zip(logits, parts, strict=True)]
    assert together == alone == sample(logits.flip(0), parts[::-1])[::-1]
    for row, token in zip(logits, together, strict=True):
        assert isinstance(token, SampledToken)
        assert token.logprobs is not None
        own = row.log_softmax(0)
        assert token.logprobs.chosen == pytest.approx(float(own[token.token_id]))
        assert token.logprobs.top[0][1] == pytest.approx(float(own.max()))
    tokens = [t.token_id for t in together if isinstance(t, SampledToken)]
    assert tokens[2:] == [7, 4]


def test_a_row_that_cannot_be_processed_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.penalize

    def broken(logits: torch.Tensor, params: SamplingParams, *history: Sequence[int]) -> None:
        if params.presence_penalty == 1.5:
            raise RuntimeError("broken")
        real(logits, params, *history)

    monkeypatch.setattr(module, "penalize", broken)
    good = part(SamplingParams(temperature=0, presence_penalty=2.0), LogitsInputs((), (3,)))
    bad = part(SamplingParams(temperature=0, presence_penalty=1.5), LogitsInputs((), (3,)))
    logits = torch.zeros(4, VOCAB)
    logits[:, 3], logits[:, 5] = 1.0, 0.5
    first, second, third, fourth = sample(logits, [good, bad, good, part(SamplingParams())])
    assert first == third == SampledToken(5)
    assert isinstance(second, str)
    assert "RuntimeError: broken" in second
    assert isinstance(fourth, SampledToken)


def test_nothing_allowed_is_no_token() -> None:
    nothing = part(SamplingParams(temperature=0), LogitsInputs(allowed=bits([])))
    assert sample(torch.zeros(1, VOCAB), [nothing]) == [NO_TOKEN]


def test_requests_that_change_nothing_cost_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("logits are copied or processed")

    monkeypatch.setattr(torch.Tensor, "clone", fail)
    usual = [part(SamplingParams(seed=1, logprobs=1)), part(SamplingParams(temperature=0))]
    biased = part(SamplingParams(logit_bias={1: 1.0}), LogitsInputs())
    tokens = sample(torch.zeros(3, VOCAB), [*usual, biased])
    assert all(isinstance(token, SampledToken) for token in tokens)
    monkeypatch.setattr("pagelab.execution.sampler.process", fail)
    assert sample(torch.zeros(2, VOCAB), usual) == tokens[:2]


def test_log_probabilities_of_prompts_come_in_pieces_for_the_rows_that_are_theirs() -> None:
    torch.manual_seed(1)
    length = 2 * ROWS_AT_ONCE + 3
    hidden = torch.randn(2 + length + 1, VOCAB)
    targets = tuple(int(t) for t in torch.randint(VOCAB, (length,)))
    asks = part(
        SamplingParams(prompt_logprobs=2), LogitsInputs(targets=targets), "a", num_tokens=length + 1
    )
    parts = [part(SamplingParams(), num_tokens=2), asks]
    found = list(prompt_logprobs(prompt_rows(parts), lambda rows: hidden[rows]))
    assert [sequence_id for sequence_id, _ in found] == [asks.sequence_id] * 3
    got = [each for _, rows in found for each in rows.read()]
    want = hidden[2 : 2 + length].log_softmax(-1)
    assert len(got) == length
    for row, each, target in zip(want, got, targets, strict=True):
        assert each.chosen == pytest.approx(float(row[target]))
        assert [token for token, _ in each.top] == row.topk(2).indices.tolist()
