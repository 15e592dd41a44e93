"""Attention of several tokens a sequence by the Triton kernel, against its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.launch import device_of
from pagelab.kernels.paged_prefill import (
    cut_tiles,
    prefill_attention,
    queries_per_tile,
)
from pagelab.kernels.sizes import TILE
from tests.support.paged import DEVICE, HALF, TOLERANCE, attend, scattered


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch: (queries, keys) of each sequence; the last query sees the last key."""

    spans: tuple[tuple[int, int], ...] = ((5, 5), (40, 40), (2, 2))
    dim: int = 64
    kv_heads: int = 2
    group: int = 1
    block: int = 16
    window: int = 0
    softcap: float = 0.0
    block_m: int = 32
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shown = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(shown).replace(str(HALF), "half") or "default"


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(group=3, spans=((7, 70), (33, 40))),  # chunks with context; 8 queries a tile
        Case(group=4, kv_heads=1, dim=80, block=8, spans=((20, 20), (3, 50))),
        Case(group=8, kv_heads=1, dim=128, block=256, spans=((6, 6), (2, 90))),
        Case(group=3, kv_heads=1, dim=256, block=64, spans=((12, 30),)),
        Case(window=9, spans=((30, 30), (12, 80))),
        Case(window=1, kv_heads=1, spans=((5, 40),)),
        Case(window=20, softcap=3.0, block=8, group=3, spans=((3, 60), (9, 9))),
        Case(softcap=2.0, spans=((35, 35),)),
        Case(block_m=128, group=8, kv_heads=1, spans=((70, 130), (2, 2))),
        Case(dtype=HALF, group=3, spans=((7, 70), (33, 40))),
        Case(dtype=HALF, dim=80, block=32, spans=((10, 10), (17, 65))),
    ],
    ids=str,
)
def test_every_query_attends_to_its_own_past(case: Case) -> None:
    torch.manual_seed(0)
    keys = [n for _, n in case.spans]
    paged = scattered(
        keys, kv_heads=case.kv_heads, dim=case.dim, block_size=case.block, dtype=case.dtype
    )
    heads = case.kv_heads * case.group
    counts = np.array([n for n, _ in case.spans])
    first = np.cumsum(counts) - counts + 1  # row 0 is of nobody, nor is the last one
    q = torch.randn(int(counts.sum()) + 2, heads, case.dim).to(case.dtype)
    tiles = cut_tiles(
        np.array(paged.rows),
        first,
        counts,
        np.array(keys) - counts,
        queries_per_tile(heads, case.kv_heads, case.block_m),
    )
    room = torch.full((len(tiles) + 3, TILE), 1 << 20, dtype=torch.int32)  # padding: nobody reads
    room[: len(tiles)] = torch.from_numpy(tiles)
    out = torch.full_like(q, math.nan, device=DEVICE)
    prefill_attention(
        q.to(DEVICE),
        out,
        paged.cache,
        paged.tables,
        room.to(DEVICE),
        torch.tensor([len(tiles)], dtype=torch.int32, device=DEVICE),
        0.2,
        device_of(DEVICE),
        window=case.window,
        softcap=case.softcap,
        block_m=case.block_m,
    )
    got = out.cpu()
    assert got[[0, -1]].isnan().all()
    tolerance = TOLERANCE[case.dtype]
    for i, (count, total) in enumerate(case.spans):
        rows = slice(int(first[i]), int(first[i]) + count)
        want = attend(
            q[rows],
            paged.keys[i],
            paged.values[i],
            total - count,
            0.2,
            window=case.window,
            softcap=case.softcap,
        )
        torch.testing.assert_close(got[rows].double(), want, rtol=tolerance, atol=tolerance)
