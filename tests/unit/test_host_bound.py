"""Sequences that need the host between tokens: the right inputs, in any company, not too early."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelab.engine.core import EngineCore
from pagelab.errors import RequestError
from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.scheduling.sequence import Request
from pagelab.types import FinishReason, GuidedDecoding, SamplingParams, SequenceId, TokenLogprobs
from tests.support.engines import outputs, run, toy_engine
from tests.support.toy_runner import ToyRunner

VOCAB, EOS = 97, 5
PENALTY: dict[str, Any] = {"presence_penalty": 1.0}
GUIDED = GuidedDecoding(regex="toy")


class ToyConstraint:
    """Tokens leave remainder `len(output) % 3` by 3, but the end, which may come after two."""

    def __init__(self, fail_at: int | None = None, end_at: int | None = None) -> None:
        self.fail_at, self.end_at = fail_at, end_at
        self.seen: list[int] = []

    @property
    def allowed(self) -> bytes:
        kind = len(self.seen) % 3
        tokens = [t for t in range(VOCAB) if t % 3 == kind and t != EOS]
        if self.complete:
            tokens.append(EOS)
        return sum(1 << token for token in tokens).to_bytes(13, "little")

    @property
    def complete(self) -> bool:
        return len(self.seen) >= 2

    @property
    def ended(self) -> bool:
        return len(self.seen) == self.end_at

    def advance(self, token_id: int) -> None:
        assert self.allowed[token_id // 8] >> token_id % 8 & 1
        if len(self.seen) == self.fail_at:
            raise RequestError("too complex")
        self.seen.append(token_id)

    def copy(self) -> ToyConstraint:
        other = ToyConstraint(self.fail_at, self.end_at)
        other.seen = list(self.seen)
        return other


class HostRunner(ToyRunner):
    """Checks what a step says of the past against the slots; tokens depend on it, too."""

    def choose(self, part: ScheduledSequence, context: Sequence[int]) -> int:
        token = super().choose(part, context)
        assert (part.logits is not None) >= part.params.penalizes
        if part.logits is None:
            return token
        if part.params.penalizes:
            prompt, output = part.logits.prompt_token_ids, part.logits.output_token_ids
            assert (*prompt, *output) == tuple(context)
            assert len(output) == part.position_seed[1]
            token = (token + 7 * len(set(output))) % self.vocab_size
        allowed = part.logits.allowed
        while allowed is not None and not allowed[token // 8] >> token % 8 & 1:
            token = (token + 1) % self.vocab_size
        return token

    def collect(self, handle: Batch) -> StepResult:
        assert pickle.loads(pickle.dumps(handle)) == handle
        result = super().collect(handle)
        prompts: dict[SequenceId, tuple[TokenLogprobs, ...]] = {}
        for part in handle.sequences:
            if part.logits is not None and part.logits.targets:
                targets = part.logits.targets
                assert len(targets) <= part.num_tokens
                prompts[part.sequence_id] = tuple(
                    TokenLogprobs(float(token), ((part.start + i, 0.0),))
                    for i, token in enumerate(targets)
                )
        return StepResult(handle.step, result.sampled, result.errors, prompts)


def engine(num_blocks: int = 64, **options: object) -> EngineCore:
    core, _ = toy_engine(num_blocks, eos=(EOS,), **options)  # type: ignore[arg-type]
    core.runner = HostRunner(num_blocks, 4, VOCAB)
    return core


def add(core: EngineCore, prompt: list[int], priority: int = 0, **changes: Any) -> Request:
    params = SamplingParams(**({"max_tokens": 9, "seed": 3} | changes))
    constraint = ToyConstraint() if params.guided else None
    return core.add_request(prompt, params, priority=priority, constraint=constraint)


def alone(prompt: list[int], **changes: Any) -> list[list[int]]:
    core = engine()
    request = add(core, prompt, **changes)
    run(core)
    return outputs(request)


KINDS = st.fixed_dictionaries(
    {
        "guided": st.sampled_from([None, GUIDED]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "logit_bias": st.sampled_from([None, {3: 1.0}]),
        "prompt_logprobs": st.sampled_from([None, 0]),
        "n": st.sampled_from([1, 1, 3]),
        "max_tokens": st.integers(1, 10),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), KINDS),
        min_size=1,
        max_size=5,
    ),
    ahead=st.integers(1, 3),
    budget=st.sampled_from([1, 5, 64]),
    num_blocks=st.integers(8, 20),
    allocator=st.sampled_from(["paged", "paged", "contiguous-max"]),
    max_num_seqs=st.sampled_from([2, 256]),
)
def test_any_company_gives_the_tokens_of_each_request_alone(
    requests: list[tuple[list[int], dict[str, Any]]],
    ahead: int,
    budget: int,
    num_blocks: int,
    allocator: str,
    max_num_seqs: int,
) -> None:
    """With preemptions (small pools), steps in flight, chunked prompts and forks."""
    core = engine(
        num_blocks, ahead=ahead, budget=budget, allocator=allocator, max_num_seqs=max_num_seqs
    )
    added = [add(core, prompt, **kind) for prompt, kind in requests]
    run(core)
    assert core.kv.pool.num_held == 0
    for request, (prompt, kind) in zip(added, requests, strict=True):
        assert outputs(request) == alone(prompt, **kind)
        if kind["prompt_logprobs"] is not None:
            assert [int(each.chosen) for each in request.prompt_logprobs] == prompt[1:]
            assert [each.top[0][0] for each in request.prompt_logprobs] == list(
                range(len(prompt) - 1)
            )
            assert not request.lacks_prompt_logprobs


@pytest.mark.parametrize("changes", [PENALTY, {"guided": GUIDED}, {"repetition_penalty": 1.1}])
def test_a_step_is_not_made_before_the_token_before_it_is_known(
    changes: dict[str, Any],
) -> None:
    core = engine(ahead=3)
    bound, free = add(core, [1, 2], **changes), add(core, [3, 4], ignore_eos=True)
    core.step()
    scheduled = [s.num_expected - s.num_tokens for r in (bound, free) for s in r.sequences]
    assert scheduled == [0, 2]
    assert not bound.sequences[0].is_in_flight
    run(core)


def test_a_bias_does_not_keep_a_sequence_out_of_the_run_ahead() -> None:
    core = engine(ahead=3)
    request = add(core, [1, 2], logit_bias={3: 1.0}, ignore_eos=True)
    core.step()
    assert request.sequences[0].num_expected - request.sequences[0].num_tokens == 2
    run(core)


def test_prompts_chunks_do_run_ahead() -> None:
    core = engine(ahead=3, budget=2)
    request = add(core, list(range(9)), **PENALTY)
    core.step()
    assert request.sequences[0].num_scheduled == 6
    run(core)


def test_requests_of_the_usual_kind_carry_nothing() -> None:
    core = engine(ahead=2)
    add(core, [1, 2, 3], logprobs=2, stop_token_ids=[4], min_tokens=2, n=2)
    run(core)
    runner = core.runner
    assert isinstance(runner, HostRunner)
    assert all(part.logits is None for batch in runner.batches for part in batch.sequences)


def test_a_guided_sequence_ends_where_its_constraint_does() -> None:
    core = engine()
    params = SamplingParams(max_tokens=9, seed=1, guided=GUIDED, min_tokens=7, ignore_eos=True)
    request = core.add_request([1], params, constraint=ToyConstraint(end_at=4))
    run(core)
    (sequence,) = request.sequences
    assert sequence.num_output_tokens == 4
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.stop_token_id is None


def test_a_stop_id_ends_a_guided_sequence_only_where_it_may_end() -> None:
    core = engine()
    params = SamplingParams(
        max_tokens=9, temperature=0, guided=GUIDED, stop_token_ids=list(range(VOCAB))
    )
    request = core.add_request([1], params, constraint=ToyConstraint())
    run(core)
    (sequence,) = request.sequences
    assert sequence.num_output_tokens == 3
    assert sequence.stop_token_id == sequence.output_token_ids[-1]


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_constraint_that_fails_ends_its_own_sequence_with_its_words(ahead: int) -> None:
    core = engine(ahead=ahead)
    params = SamplingParams(max_tokens=9, seed=3, guided=GUIDED, n=2)
    bad = core.add_request([1, 2], params, constraint=ToyConstraint(fail_at=1))
    good = add(core, [3, 4], guided=GUIDED)
    events = run(core)
    assert outputs(good) == alone([3, 4], guided=GUIDED)
    for sequence in bad.sequences:
        assert sequence.finish_reason is FinishReason.ERROR
        assert sequence.error == "too complex"
    assert sum(event.finish_reason is FinishReason.ERROR for event in events) == 2
    assert core.kv.pool.num_held == 0


def test_guidance_without_a_grammar_is_refused() -> None:
    with pytest.raises(RequestError, match=r"engine\.guided"):
        engine().add_request([1], SamplingParams(guided=GUIDED))


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, PENALTY, {"guided": GUIDED}])
def test_cancelled_sequences_give_their_blocks_back_within_the_steps_in_flight(
    ahead: int, changes: dict[str, Any]
) -> None:
    core = engine(ahead=ahead)
    add(core, [9, 9], ignore_eos=True, max_tokens=25)
    request = add(core, [1, 2], n=2, **changes)
    for _ in range(3):
        core.step()
    core.cancel(request.id)
    for _ in range(ahead):
        core.step()
    assert core.kv.num_sequences == 1
    assert all(s.finish_reason is not None for s in request.sequences)
    run(core)


def test_prompt_log_probabilities_pass_the_prefix_cache_by_and_fill_it() -> None:
    core = engine()
    prompt = list(range(16))
    for changes, cached in (
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": 0, "n": 3}, 0),
        ({}, 12),
    ):
        request = add(core, prompt, **changes)
        run(core)
        assert request.metrics.num_cached_tokens == cached
        assert len(request.prompt_logprobs) == (15 if changes else 0)


@pytest.mark.parametrize("allocator", ["paged", "contiguous-max"])
@pytest.mark.parametrize("budget", [4, 64])
def test_samples_that_each_compute_the_prompt_give_it_once(allocator: str, budget: int) -> None:
    core = engine(allocator=allocator, budget=budget, ahead=2)
    request = add(core, [4, 3, 2, 1, 0, 7], prompt_logprobs=0, n=3)
    run(core)
    assert [int(each.chosen) for each in request.prompt_logprobs] == [3, 2, 1, 0, 7]


def test_the_lowest_priority_waits_longest_and_is_preempted_first() -> None:
    core = engine(9, max_num_seqs=2)
    kinds: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    late, first, urgent = (
        add(core, [i] * 4, priority=p, **kinds) for i, p in enumerate((2, 0, -1))
    )
    core.step()
    assert [s.request for s in core.scheduler.running] == [urgent, first]
    more = add(core, [7] * 4, priority=0, **kinds)
    ends = [event.sequence.request for event in run(core) if event.finish_reason is not None]
    assert ends == [urgent, first, more, late]
    core = engine(6)
    low, high = add(core, [1] * 8, priority=1, **kinds), add(core, [2] * 8, priority=0, **kinds)
    run(core)
    assert low.metrics.num_preemptions > 0
    assert high.metrics.num_preemptions == 0
