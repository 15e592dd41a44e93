"""How a step's attention is cut into items and tiles, against a model that counts one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.decode_items import cut_items, shortest_item
from pagelab.kernels.paged_prefill import cut_tiles, queries_per_tile

SINGLES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 99), st.integers(0, 5000)), min_size=1, max_size=9
)


@settings(deadline=None)
@given(singles=SINGLES, target=st.integers(1, 40))
def test_items_cover_every_key_once(singles: list[tuple[int, int, int]], target: int) -> None:
    rows, first, positions = (np.array(column) for column in zip(*singles, strict=True))
    seqs = np.arange(len(singles)) + 3
    items = cut_items(seqs, rows, first, positions, target)
    assert items.dtype == np.int32
    assert len(items) <= len(singles) + target, "there is room for no more"
    shortest = shortest_item(len(singles), target)
    longest = max(shortest, -(-int((positions + 1).sum()) // target)) + 63
    at = 0
    for i, (row, q_row, position) in enumerate(singles):
        count, covered = int(items[at, 6]), list[int]()
        for index in range(count):
            seq, its_q_row, its_row, start, stop, its_index, its_count, its_position = items[
                at
            ].tolist()
            assert (seq, its_q_row, its_row, its_position) == (i + 3, q_row, row, position)
            assert (its_index, its_count) == (index, count)
            assert 0 < stop - start <= longest
            covered += range(start, stop)
            at += 1
        lengths = np.diff(items[at - count : at, 3:5]).ravel()
        assert lengths[-1] > lengths[0] - 32 * count, "a sequence's items are about equal"
        assert covered == list(range(position + 1))
    assert at == len(items)


SEVERAL = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(0, 90)), min_size=1, max_size=7
)


@settings(deadline=None)
@given(several=SEVERAL, tile=st.sampled_from([1, 4, 16, 42]))
def test_tiles_cover_every_query_once_and_those_with_most_keys_come_last(
    several: list[tuple[int, int, int]], tile: int
) -> None:
    rows, counts, starts = (np.array(column) for column in zip(*several, strict=True))
    first = np.cumsum(counts) - counts + 2
    tiles = cut_tiles(rows, first, counts, starts, tile)
    assert tiles.dtype == np.int32
    assert tiles[:, 3].tolist() == sorted(tiles[:, 3].tolist())
    got = [
        (row, q_row + i, position + i)
        for row, q_row, count, position in tiles.tolist()
        for i in range(count)
    ]
    want = [
        (row, q_row + i, start + i)
        for (row, count, start), q_row in zip(several, first.tolist(), strict=True)
        for i in range(count)
    ]
    assert sorted(got) == sorted(want)
    assert 1 <= tiles[:, 2].min() <= tiles[:, 2].max() <= tile
    assert len(tiles) == sum(-(-count // tile) for count in counts.tolist())


def test_nothing_is_cut_into_nothing() -> None:
    none = np.array([], np.int32)
    assert cut_tiles(none, none, none, none, 32).shape == (0, 4)
    assert cut_items(none, none, none, none, 4).shape == (0, 8)


@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(12, 12, 128), (9, 3, 32), (8, 1, 16)])
def test_all_heads_of_a_tile_fit_its_rows(heads: int, kv_heads: int, queries: int) -> None:
    assert queries_per_tile(heads, kv_heads) == queries
    assert queries * heads // kv_heads <= 128
