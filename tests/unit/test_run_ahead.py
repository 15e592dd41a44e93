"""Steps submitted before earlier ones are collected: the same tokens, no stall, no leak."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelab.engine.core import EngineCore, StepRecord
from pagelab.memory.ledger import take_ledger
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.scheduling.sequence import Sequence, Status, TokenEvent
from pagelab.types import FinishReason, SamplingParams, SequenceId
from tests.support.engines import greedy, outputs, run, toy_engine
from tests.support.toy_runner import ToyRunner, generate

VOCAB, EOS = 97, 5


class EarlyRunner(ToyRunner):
    """Writes and samples when a step is submitted, as early as a device could."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size, VOCAB)
        self._results: dict[int, StepResult] = {}

    def submit(self, batch: Batch) -> Batch:
        super().submit(batch)
        self._results[batch.step] = super().collect(batch)
        return batch

    def collect(self, handle: Batch) -> StepResult:
        return self._results.pop(handle.step)


class OrderRunner(ToyRunner):
    """Notes how many steps are submitted and not collected whenever one is collected."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size, VOCAB)
        self.in_flight = 0
        self.depths: list[int] = []

    def submit(self, batch: Batch) -> Batch:
        self.in_flight += 1
        return super().submit(batch)

    def collect(self, handle: Batch) -> StepResult:
        self.depths.append(self.in_flight)
        self.in_flight -= 1
        return super().collect(handle)


def is_preempted(sequence: Sequence) -> bool:
    return sequence.status is Status.PREEMPTED


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{length} {seed}").randrange(VOCAB) for _ in range(length)]


@dataclass(frozen=True)
class Asked:
    at: int  # the step before which it is added
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    priority: int
    ignore_eos: bool
    cancel_after: int | None  # steps

    def expected(self, seed: int) -> list[int]:
        tokens = generate(self.prompt, self.max_tokens, seed, VOCAB)
        if not self.ignore_eos and EOS in tokens:
            tokens = tokens[: tokens.index(EOS) + 1]
        return tokens


ASKED = st.builds(
    Asked,
    at=st.integers(0, 12),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple),
    max_tokens=st.integers(1, 14),
    n=st.sampled_from([1, 1, 3]),
    priority=st.integers(0, 2),
    ignore_eos=st.booleans(),
    cancel_after=st.one_of(st.none(), st.integers(0, 12)),
)


@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(ASKED, min_size=1, max_size=7),
    ahead=st.integers(1, 4),
    early=st.booleans(),
    num_blocks=st.integers(8, 24),
    budget=st.sampled_from([1, 5, 64]),
    prefix_caching=st.booleans(),
    allocator=st.sampled_from(["paged", "paged", "contiguous-max", "reserved-paged"]),
)
def test_tokens_and_ledger_are_right_however_late_steps_are_collected(
    asked: list[Asked],
    ahead: int,
    early: bool,
    num_blocks: int,
    budget: int,
    prefix_caching: bool,
    allocator: str,
) -> None:
    core, _ = toy_engine(
        num_blocks,
        4,
        ahead=ahead,
        budget=budget,
        eos=(EOS,),
        prefix_caching=prefix_caching,
        allocator=allocator,
    )
    if early:
        core.runner = EarlyRunner(num_blocks, 4)

    def on_step(record: StepRecord) -> None:
        entry = take_ledger(core.kv, record.waiting_blocks)
        assert entry.pool == num_blocks * 4
        assert min(entry) >= 0

    core.on_step = on_step
    requests, events, step = {}, list[TokenEvent](), 0
    while core.has_unfinished_requests or any(a.at >= step for a in asked):
        for i, a in enumerate(asked):
            if a.at == step and len(a.prompt) + a.max_tokens <= min(32, num_blocks * 4):
                params = SamplingParams(
                    max_tokens=a.max_tokens, n=a.n, seed=i, ignore_eos=a.ignore_eos
                )
                requests[i] = core.add_request(a.prompt, params, priority=a.priority)
            if i in requests and a.cancel_after is not None and a.at + a.cancel_after == step:
                core.cancel(requests[i].id)
        if core.has_unfinished_requests:
            events += core.step()
        step += 1

    assert core.kv.pool.num_held == 0
    said: dict[SequenceId, list[int]] = {}
    ended: set[SequenceId] = set()
    for sequence, token, reason in events:
        assert sequence.id not in ended, "news of a sequence that has ended"
        if token is not None:
            said.setdefault(sequence.id, []).append(token.token_id)
        if reason is not None:
            ended.add(sequence.id)
    for i, request in requests.items():
        for sequence in request.sequences:
            tokens = said.get(sequence.id, [])
            expected = asked[i].expected(i + sequence.id.sample)
            assert tokens == list(sequence.output_token_ids), "events tell what there is"
            assert tokens == expected[: len(tokens)]
            if sequence.finish_reason is not FinishReason.CANCELLED:
                assert tokens == expected
                assert sequence.id in ended


def with_order_runner(
    ahead: int, num_blocks: int, budget: int = 64
) -> tuple[EngineCore, OrderRunner]:
    core, _ = toy_engine(num_blocks, 4, ahead=ahead, budget=budget, eos=(EOS,), max_num_seqs=6)
    runner = OrderRunner(num_blocks, 4)
    core.runner = runner
    return core, runner


@pytest.mark.parametrize("ahead", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [3, 64])
def test_neither_admission_nor_ends_stall_the_pipeline(ahead: int, budget: int) -> None:
    core, runner = with_order_runner(ahead, 128, budget)
    requests = [core.add_request(prompt(3 + i, i), greedy(2 + i)) for i in range(12)]
    late = [core.add_request(prompt(9, 50 + i), SamplingParams(max_tokens=20)) for i in range(4)]
    last = core.add_request(prompt(5, 99), greedy(26))
    for i in range(12):
        core.step()
        late.append(core.add_request(prompt(4, 200 + i), greedy(3)))
    run(core)
    assert all(request.finished for request in (*requests, *late, last))
    tail = ahead - 1  # when the last tokens of all are in flight, nothing is left to schedule
    assert runner.depths[: len(runner.depths) - tail] == [ahead] * (len(runner.depths) - tail)
    assert runner.depths[len(runner.depths) - tail :] == list(range(tail, 0, -1))


@pytest.mark.parametrize("ahead", [2, 3, 4])
def test_nobody_else_is_preempted_while_blocks_are_on_their_way_back(ahead: int) -> None:
    def preempted(ahead: int) -> list[str]:
        core, _ = toy_engine(12, 4, ahead=ahead, budget=64, prefix_caching=False)
        requests = [core.add_request(prompt(8, s), greedy(5)) for s in range(6)]  # 6 · 2 blocks
        run(core)
        for s, request in enumerate(requests):
            assert outputs(request) == [generate(prompt(8, s), 5, 0, VOCAB)]
        return [record.sequence_id.request_id for record in core.scheduler.preemptions]

    # all six need a third block in the same step: two give theirs to the other four
    assert preempted(1) == ["5", "4"]
    assert preempted(ahead) == ["5", "4"]


@pytest.mark.parametrize("ahead", [2, 3])
def test_blocks_of_a_late_stop_are_waited_for_instead_of_preempting(ahead: int) -> None:
    # both need a third block in step 3; of step 3 - ahead the stop is known just then
    stop = generate(prompt(6, 1), 4, 0, VOCAB)[3 - ahead]
    core, _ = toy_engine(4, 4, ahead=ahead, budget=64, prefix_caching=False)
    going = core.add_request(prompt(6), greedy(10))
    ending = core.add_request(prompt(6, 1), greedy(10, stop_token_ids=[stop]))
    run(core)
    assert core.scheduler.num_preemptions == 0
    assert outputs(going) == [generate(prompt(6), 10, 0, VOCAB)]
    assert outputs(ending)[0][-1] == stop


@pytest.mark.parametrize("ahead", [2, 3, 4])
def test_what_a_late_stop_overshot_is_never_live_and_never_told(ahead: int) -> None:
    p = prompt(6)
    stop = generate(p, 4, 0, VOCAB)[3]
    core, runner = toy_engine(16, 4, ahead=ahead, prefix_caching=False)
    live: list[int] = []
    core.on_step = lambda record: live.append(take_ledger(core.kv, None).live)
    request = core.add_request(p, greedy(20, stop_token_ids=[stop]))
    events = run(core)
    told = [event.token.token_id for event in events if event.token is not None]
    assert told == generate(p, 4, 0, VOCAB)
    assert len(runner.batches) == 4 + ahead - 1, "steps that were submitted before the stop came"
    # the stop token has no K/V: 6, 7, 8, 9 slots, and those until the steps in flight are back
    assert live == [6, 7, 8, *[9] * (ahead - 1), 9 if ahead == 1 else 0]
    assert request.sequences[0].num_scheduled == request.sequences[0].num_computed == 9


@pytest.mark.parametrize("ahead", [3, 4])  # with 2, the only step in flight is back by then
def test_a_sequence_preempted_in_flight_keeps_the_tokens_of_its_steps(ahead: int) -> None:
    core, _ = toy_engine(6, 4, ahead=ahead, budget=64, prefix_caching=False)
    first = core.add_request(prompt(8), greedy(12))
    second = core.add_request(prompt(8, 1), greedy(12))
    victim = second.sequences[0]
    while not is_preempted(victim):
        assert core.step(), "it is preempted while both have something to say"
    known, expected = victim.num_tokens, victim.num_expected
    assert victim.is_in_flight
    assert core.kv.holds(victim.id), "a step in flight writes there"
    while is_preempted(victim):
        assert core.step()
    assert victim.num_tokens == expected > known
    assert victim.num_computed == victim.num_scheduled == 0
    run(core)
    assert outputs(first) == [generate(prompt(8), 12, 0, VOCAB)]
    assert outputs(second) == [generate(prompt(8, 1), 12, 0, VOCAB)]


def test_a_block_table_is_the_same_object_until_it_changes() -> None:
    core, runner = toy_engine(16, 4, ahead=2)
    core.add_request(prompt(3), greedy(9))
    run(core)
    tables = [batch.sequences[0].block_ids for batch in runner.batches]
    ends = [batch.sequences[0].end for batch in runner.batches]
    assert ends == list(range(3, 12))
    for before, after, end in zip(tables, tables[1:], ends[1:], strict=False):
        assert (after is before) == (end % 4 != 1), "a new one for each new block, and only then"
        assert after[: len(before)] == before
