"""Paged attention for sequences that bring several tokens each: prompts and chunks of prompts.

A program takes a tile of queries of one sequence, for all the query heads that share a K/V head,
and walks over that head's keys::

    tile      | seq 0, queries 0..31 | seq 0, 32..63 | seq 2, 0..31 |      (G = 4: 128 rows)
    its rows    query 0 · head 0, query 0 · head 1, …, query 31 · head 3
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from pagelab.kernels.launch import Device, begin
from pagelab.kernels.sizes import TILE, TILE_ROWS
from pagelab.kernels.softmax import LOG2_E, fold, squash


@triton.jit
def _walk(
    q,
    acc,
    m,
    norm,
    keys_of_head,
    values_of_head,
    table,
    first,
    end,
    position,
    scale_log2,
    D: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        if MASKED:
            block = tl.load(table + n // BS, mask=n < end, other=0).to(tl.int64)
        else:
            block = tl.load(table + n // BS).to(tl.int64)
        slot = (block * BS + n % BS) * D
        if D == BLOCK_D:
            k = tl.load(keys_of_head + slot[None, :] + d[:, None])
        else:
            k = tl.load(keys_of_head + slot[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)
        s = squash(tl.dot(q, k, input_precision=PRECISION) * scale_log2, SOFTCAP)
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        p, m, norm, acc = fold(s, m, norm, acc, MASKED)
        if MASKED or D != BLOCK_D:  # slots past the end may hold anything
            v = tl.load(
                values_of_head + slot[:, None] + d[None, :],
                mask=(n < end)[:, None] & (d < D)[None, :],
                other=0.0,
            )
        else:
            v = tl.load(values_of_head + slot[:, None] + d[None, :])
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, m, norm


@triton.jit
def _prefill(
    q,
    out,
    cache,
    block_tables,
    tiles,
    num_tiles,
    num_blocks,
    table_stride,
    scale,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    G: tl.constexpr = H // KH
    total = tl.load(num_tiles)
    tile = total - 1 - tl.program_id(1)  # the last tiles of a prompt, which have most to do, first
    head = tl.program_id(0)
    if tile < 0:
        return
    at = tiles + tile * 4
    table = block_tables + tl.load(at).to(tl.int64) * table_stride
    first_row = tl.load(at + 1).to(tl.int64)
    count = tl.load(at + 2)
    start_position = tl.load(at + 3)

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = r // BLOCK_G
    g = r % BLOCK_G
    live = (query < count) & (g < G)
    rows = (first_row + query) * (H * D) + (head * G + g) * D
    mask = live[:, None] & (d < D)[None, :]
    queries = tl.load(q + rows[:, None] + d[None, :], mask=mask, other=0.0)
    position = start_position + query
    keys_of_head = cache + head.to(tl.int64) * num_blocks * (BS * D)
    values_of_head = cache + (head + KH).to(tl.int64) * num_blocks * (BS * D)
    scale_log2 = scale * LOG2_E

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = start_position + count
    if WINDOW > 0:
        low = tl.maximum(start_position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        middle = low
    else:
        low = 0
        middle = (start_position + 1) // BLOCK_N * BLOCK_N  # keys that every query sees
    acc, m, norm = _walk(
        queries,
        acc,
        m,
        norm,
        keys_of_head,
        values_of_head,
        table,
        low,
        middle,
        position,
        scale_log2,
        D,
        BS,
        BLOCK_D,
        BLOCK_N,
        False,
        WINDOW,
        SOFTCAP,
        STAGES,
        PRECISION,
    )
    acc, m, norm = _walk(
        queries,
        acc,
        m,
        norm,
        keys_of_head,
        values_of_head,
        table,
        middle,
        end,
        position,
        scale_log2,
        D,
        BS,
        BLOCK_D,
        BLOCK_N,
        True,
        WINDOW,
        SOFTCAP,
        STAGES,
        PRECISION,
    )
    norm = tl.where(norm == 0.0, 1.0, norm)  # rows of padding
    tl.store(
        out + rows[:, None] + d[None, :], (acc / norm[:, None]).to(out.dtype.element_ty), mask=mask
    )


def queries_per_tile(num_heads: int, num_kv_heads: int, block_m: int = TILE_ROWS) -> int:
    """Queries of one tile: block_m rows hold all the query heads of a K/V head."""
    return max(1, block_m // int(triton.next_power_of_2(num_heads // num_kv_heads)))


def prefill_attention(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    scale: float,
    device: Device,
    *,
    window: int = 0,
    softcap: float = 0.0,
    block_m: int = TILE_ROWS,
    block_n: int | None = None,
    num_stages: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Attend for the tiles of a step; keys of this step's own tokens lie in the cache already.

    Args:
        q, out: `[T, H, D]`; rows that no tile names are left alone.
        cache: one layer's, `[2, KH, num_blocks, block_size, D]`.
        block_tables: `[rows, blocks]` int32.
        tiles: `[most, TILE]` int32; `num_tiles` `[1]` int32 are in use.
    """
    _, kv_heads, num_blocks, block_size, head_dim = cache.shape
    num_heads = q.shape[1]
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = cache.element_size() == 4
    if block_n is None:
        block_n = 32 if wide or block_d > 128 else 64
    device.launch(
        _prefill,
        (kv_heads, len(tiles)),
        q,
        out,
        cache,
        block_tables,
        tiles,
        num_tiles,
        num_blocks,
        block_tables.stride(0),
        scale,
        num_heads,
        kv_heads,
        head_dim,
        block_size,
        triton.next_power_of_2(num_heads // kv_heads),
        block_m,
        block_d,
        block_n,
        window,
        softcap,
        num_stages or (2 if wide or block_d <= 64 else 3),
        "ieee" if wide else "tf32",
        device.pdl,
        num_warps=num_warps or (4 if block_d == 128 and not wide else 8),
    )


def cut_tiles(
    rows: np.ndarray, first: np.ndarray, counts: np.ndarray, starts: np.ndarray, tile: int
) -> np.ndarray:
    """The tiles `[n, TILE]` of sequences with several tokens each, on the host.

    For each sequence: its row of the block table, its first row of q, its tokens, and the
    position of the first of them.
    """
    each = -(-counts // tile)
    within = (np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)) * tile
    out = np.empty((int(each.sum()), TILE), np.int32)
    out[:, 0] = np.repeat(rows, each)
    out[:, 1] = np.repeat(first, each) + within
    out[:, 2] = np.minimum(tile, np.repeat(counts, each) - within)
    out[:, 3] = np.repeat(starts, each) + within
    # by the keys that they see: the kernel takes the last tiles, with most to do, first
    return out[np.argsort(out[:, 3], kind="stable")]
