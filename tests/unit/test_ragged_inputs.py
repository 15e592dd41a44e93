"""The words of a ragged step against what its batch says, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="items and tiles are cut beside the kernels that read them")

from pagelab.execution.ragged_inputs import RaggedShape, fill, split
from pagelab.scheduling.batch import ScheduledSequence
from pagelab.types import BlockId, RequestId, SamplingParams, SequenceId

SCRATCH = 99


def part(index: int, start: int, count: int, unknown: bool, samples: bool) -> ScheduledSequence:
    tokens = tuple(1000 * index + start + i for i in range(count - unknown))
    identity = SequenceId(RequestId(str(index)), 0)
    return ScheduledSequence(
        identity, start, count, tokens, (BlockId(0),), samples, (0, 0), SamplingParams()
    )


PARTS = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.one_of(st.just(1), st.integers(1, 40)),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(asked=PARTS, spare=st.integers(0, 40), tile=st.sampled_from([4, 16, 128]), data=st.data())
def test_every_token_and_sequence_is_described_once(
    asked: list[tuple[int, int, bool, bool]], spare: int, tile: int, data: st.DataObject
) -> None:
    parts = [part(i, *each) for i, each in enumerate(asked)]
    count, seqs = sum(p.num_tokens for p in parts), len(parts)
    rows = data.draw(st.permutations(range(20)))[:seqs]
    shape = RaggedShape(count + spare, seqs + spare, tile, target_items=6)
    words = np.full(shape.num_words, -77, np.int32)  # what an earlier step left
    fill(words, shape, parts, rows, SCRATCH)
    got = split(torch.from_numpy(words), shape)

    ids, token_rows, positions, last, first = (list[int]() for _ in range(5))
    for p, row in zip(parts, rows, strict=True):
        first.append(len(ids))
        ids += [*p.token_ids, *[-1] * (p.num_tokens - len(p.token_ids))]
        token_rows += [row] * p.num_tokens
        positions += range(p.start, p.end)
        last.append(len(ids) - 1)
    padding = [0] * spare
    assert got["token_ids"].tolist() == ids + padding
    assert got["token_rows"].tolist() == token_rows + [SCRATCH] * spare
    assert got["positions"].tolist() == positions + padding
    assert got["order"].tolist() == rows + [SCRATCH] * spare
    assert got["samples"].tolist() == [int(p.samples) for p in parts] + padding
    assert got["counts"].tolist() == [p.num_tokens for p in parts] + padding
    assert got["last"].tolist() == last + padding

    queries = [
        (row, at + i, position + i)
        for row, at, n, position in got["tiles"][: int(got["num_tiles"])].tolist()
        for i in range(n)
    ]
    keys = [
        (seq, row, at, position, key)
        for seq, at, row, low, high, _, _, position in got["items"][
            : int(got["num_items"])
        ].tolist()
        for key in range(low, high)
    ]
    several = [i for i, p in enumerate(parts) if p.num_tokens > 1]
    assert sorted(queries) == sorted(
        (rows[i], first[i] + n, parts[i].start + n)
        for i in several
        for n in range(parts[i].num_tokens)
    )
    assert keys == [
        (i, rows[i], first[i], p.start, key)
        for i, p in enumerate(parts)
        if p.num_tokens == 1
        for key in range(p.end)
    ]


@pytest.mark.parametrize("seqs", [1, 7, 16])
@pytest.mark.parametrize("tokens", [16, 33, 400])
@pytest.mark.parametrize("tile", [4, 128])
def test_there_is_room_for_the_most_tiles_that_so_many_tokens_make(
    seqs: int, tokens: int, tile: int
) -> None:
    shape = RaggedShape(tokens, seqs, tile, target_items=3)
    most = 0
    for used in range(1, seqs + 1):  # all but the first bring two tokens, a tile each
        rest = tokens - 2 * (used - 1)
        if rest >= 2:
            most = max(most, -(-rest // tile) + used - 1)
    assert most <= shape.tiles


def test_parts_do_not_overlap() -> None:
    shape = RaggedShape(33, 5, 4, target_items=3)
    words = torch.zeros(shape.num_words, dtype=torch.int32)
    for i, view in enumerate(split(words, shape).values()):
        assert (view == 0).all()
        assert view.storage_offset() % 4 == 0
        view.fill_(i + 1)
