"""The mirror on the device against the batches: what a step reads there is what its batch says.

A toy runner keeps the mirror as `GpuRunner` does, with NumPy in place of the kernels, and compares
all that a step would read of it, at every step of a whole engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the device's state is laid out beside its kernels")

from pagelab.execution.device_state import DeviceState
from pagelab.kernels.sizes import MAX_SUPPRESSED
from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.types import SamplingParams
from tests.support.engines import toy_engine
from tests.support.toy_runner import ToyRunner

MAX_SEQS, BLOCK_SIZE, MAX_MODEL_LEN = 3, 4, 32
VOCAB = 100


class MirrorRunner(ToyRunner):
    """Samples when a step is submitted, and keeps a mirror of every sequence."""

    def __init__(self, num_blocks: int, ahead: int) -> None:
        super().__init__(num_blocks, BLOCK_SIZE)
        self.state = DeviceState(
            max(2, ahead) * MAX_SEQS,
            -(-MAX_MODEL_LEN // BLOCK_SIZE),
            num_blocks,
            torch.device("cpu"),
            vocab_size=VOCAB,
        )
        self.collected = -1
        self._results: dict[int, StepResult] = {}

    def submit(self, batch: Batch) -> Batch:
        parts, state = batch.sequences, self.state
        rows = [state.row(part, batch.step, self.collected).index for part in parts]
        decode = all(part.num_tokens == 1 and part.samples for part in parts)
        if decode:
            state.set_order(rows)
        changes = state.take_changes()
        if changes is not None:
            assert len(set(changes[:, 0].tolist())) == len(changes), "a place comes up twice"
            state.arena.numpy()[changes[:, 0]] = changes[:, 1]
        last = dict(self._last)
        result = self._results[batch.step] = super().collect(batch)
        if decode:
            scratch = [state.num_rows] * (len(state.order) - len(rows))
            assert state.order.tolist() == rows + scratch
        assert len(set(rows)) == len(rows)
        for row, part in zip(rows, parts, strict=True):
            known = part.token_ids or (last[part.sequence_id],)
            self._check(row, part, known[0] if decode else None)
            state.rows.computed[row] += part.num_tokens
            if part.sequence_id in result.sampled:
                state.rows.next_token[row] = result.sampled[part.sequence_id].token_id
                state.rows.output_index[row] += 1
        assert (state.rows.block_tables[state.rows.scratch] == self.num_blocks).all()
        return batch

    @property
    def num_blocks(self) -> int:
        return len(self.slots) // BLOCK_SIZE

    def collect(self, handle: Batch) -> StepResult:
        self.collected = handle.step
        return self._results.pop(handle.step)

    def _check(self, row: int, part: ScheduledSequence, next_token: int | None) -> None:
        rows, sampling, params = self.state.rows, self.state.sampling, part.params
        seed, index = part.position_seed
        assert int(rows.computed[row]) == part.start
        assert int(rows.output_index[row]) == index
        assert next_token is None or int(rows.next_token[row]) == next_token
        table = part.block_ids[: self.state.max_blocks]
        assert tuple(rows.block_tables[row, : len(table)].tolist()) == table
        if not part.samples:
            return
        assert int(sampling.seed[row]) == int(np.uint64(seed % 2**64).view(np.int64))
        assert float(sampling.temperature[row]) == float(np.float32(params.temperature))
        assert int(sampling.top_k[row]) == params.top_k
        assert float(sampling.top_p[row]) == float(np.float32(params.top_p))
        assert float(sampling.min_p[row]) == float(np.float32(params.min_p))
        forbidden: list[int] = []
        if index < int(sampling.min_until[row]):
            forbidden = sampling.suppressed[row, : int(sampling.num_suppressed[row])].tolist()
        assert sorted(forbidden) == sorted(part.suppressed)


@dataclass(frozen=True)
class Asked:
    at: int  # the step before which it is added
    prompt: tuple[int, ...]
    params: SamplingParams
    cancel_after: int | None  # steps
    name: str


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(4, 12),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.7]),
    top_k=st.integers(0, 3),
    top_p=st.sampled_from([0.3, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(-(2**63), 2**63 - 4),
    n=st.sampled_from([1, 1, 3]),
    stop_token_ids=st.lists(st.integers(0, 96), max_size=MAX_SUPPRESSED - 1, unique=True),
)
ASKED = st.builds(
    Asked,
    at=st.integers(0, 25),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple),
    params=PARAMS,
    cancel_after=st.one_of(st.none(), st.integers(0, 12)),
    name=st.sampled_from("abcd"),  # a name may come again when the one before has ended
)


@settings(max_examples=100, deadline=None)
@given(
    asked=st.lists(ASKED, min_size=1, max_size=9),
    ahead=st.integers(1, 3),
    num_blocks=st.integers(8, 24),
    budget=st.sampled_from([1, 5, 64]),
    allocator=st.sampled_from(["paged", "paged", "contiguous-max"]),
)
def test_every_step_finds_its_batch_in_the_mirror(
    asked: list[Asked], ahead: int, num_blocks: int, budget: int, allocator: str
) -> None:
    core, _ = toy_engine(
        num_blocks,
        BLOCK_SIZE,
        ahead=ahead,
        budget=budget,
        allocator=allocator,
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_MODEL_LEN,
        eos=(5,),
    )
    core.runner = MirrorRunner(num_blocks, ahead)
    waiting, running, step = list(asked), list[tuple[int, str]](), 0
    while core.has_unfinished_requests or waiting:
        for a in [a for a in waiting if a.at <= step]:
            if not core._in_use(a.name):  # type: ignore[arg-type]
                waiting.remove(a)
                core.add_request(a.prompt, a.params, request_id=a.name)
                if a.cancel_after is not None:
                    running.append((step + a.cancel_after, a.name))
        for at, name in running:
            if at == step:
                core.cancel(name)
        if core.has_unfinished_requests:
            for event in core.step():
                assert event.sequence.error is None
        step += 1
    assert core.kv.pool.num_held == 0


def greedy_part(name: str, temperature: float, seed: int) -> ScheduledSequence:
    params = SamplingParams(temperature=temperature)
    identity = (name, 0)
    return ScheduledSequence(identity, 0, 1, (7,), (3,), True, (seed, 0), params)  # type: ignore[arg-type]


def test_a_name_that_comes_again_brings_its_own_parameters() -> None:
    state = DeviceState(2, 4, 9, torch.device("cpu"), vocab_size=VOCAB)
    for step, (temperature, seed) in enumerate([(0.0, 1), (0.5, 1), (0.5, 2)]):
        row = state.row(greedy_part("a", temperature, seed), step, step - 1)
        changes = state.take_changes()
        if changes is not None:
            state.arena.numpy()[changes[:, 0]] = changes[:, 1]
        assert float(state.sampling.temperature[row.index]) == temperature
        assert int(state.sampling.seed[row.index]) == seed


def test_rows_of_steps_in_flight_are_not_given_away() -> None:
    state = DeviceState(3, 4, 9, torch.device("cpu"), vocab_size=VOCAB)
    rows = [state.row(greedy_part(str(i), 0.0, i), i, -1).index for i in range(3)]
    assert sorted(rows) == [0, 1, 2]
    assert state.row(greedy_part("x", 0.0, 0), 3, collected=0).index == rows[0]
    assert state.row(greedy_part("1", 0.0, 1), 4, collected=0).index == rows[1]
    with pytest.raises(IndexError):
        state.row(greedy_part("y", 0.0, 0), 5, collected=0)


def test_a_change_that_changes_again_is_sent_once_as_it_is_last() -> None:
    state = DeviceState(4, 4, 9, torch.device("cpu"), vocab_size=VOCAB)
    state.set_order([1, 2])
    state.set_order([2])
    changes = state.take_changes()
    assert changes is not None
    state.arena.numpy()[changes[:, 0]] = changes[:, 1]
    assert len(changes) == 2
    assert state.order.tolist() == [2, 4, 4, 4]
    assert state.take_changes() is None
