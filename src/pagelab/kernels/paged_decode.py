"""Paged attention for sequences that bring one token each, split over their K/V.

The K/V of a step is cut into items of about equal length, so that the multiprocessors finish
together whatever the lengths are, and a single long context uses all of them::

    seq 0   |item 0···|item 1···|item 2·|            a grid of (items, K/V heads);
    seq 1   |item 3·|                                 a program reads an item of one K/V head once
    seq 2   |item 4···|item 5·····|                   for all the query heads that share it

The last program of a sequence to finish adds the parts up, in their order, so that results do
not depend on which one that was.

Fused, a program also turns this token's raw projections into q, k and v (norm of q and k, rotary
embedding) and writes k and v into the cache: then this token's own key never goes through memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from pagelab.kernels.decode_items import DecodePlan
from pagelab.kernels.launch import Device, begin, prefetch_rows
from pagelab.kernels.softmax import LOG2_E, fold, squash


@triton.jit
def load_head(
    x,
    weight,
    cos,
    sin,
    heads,
    mask,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Heads `[H', D]` of one token's raw projection, normed and rotated, in float32.

    `x` points at the token's row, `heads` `[H']` are the heads' indices in it.
    """
    d = tl.arange(0, BLOCK_D)
    live = mask[:, None] & (d < D)[None, :]
    at = x + heads[:, None] * D
    own = tl.load(at + d[None, :], mask=live, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        weights = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        dtype = x.dtype.element_ty
        own = ((own * scale).to(dtype) * weights.to(dtype)).to(tl.float32)
    if ROPE:
        half: tl.constexpr = D // 2
        partner = tl.where(d < half, d + half, d - half)
        other = tl.load(at + partner[None, :], mask=live, other=0.0).to(tl.float32)
        if NORM:
            weights = tl.load(weight + partner, mask=d < D, other=0.0).to(tl.float32)[None, :]
            dtype = x.dtype.element_ty
            other = ((other * scale).to(dtype) * weights.to(dtype)).to(tl.float32)
        angle = tl.where(d < half, d, d - half)
        c = tl.load(cos + angle, mask=d < D, other=0.0)[None, :]
        s = tl.load(sin + angle, mask=d < D, other=0.0)[None, :]
        own = own * c + other * tl.where((d < half)[None, :], -s, s)
    return own


@triton.jit
def _attend_tile(
    q,
    k,
    v,
    n,
    live,
    position,
    m,
    norm,
    acc,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over one more tile of keys: `k` `[D, N]`, `v` `[N, D]`, base 2."""
    s = squash(tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2_E), SOFTCAP)
    if WINDOW > 0:
        live = live & (n > position - WINDOW)
    s = tl.where(live[None, :], s, float("-inf"))
    p, m, norm, acc = fold(s, m, norm, acc, True)
    return m, norm, acc + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def _load_tile(keys, values, table, n, live, d, D: tl.constexpr, BS: tl.constexpr):
    """Keys `[D, N]` and values `[N, D]` at the positions `n`, through the block table."""
    block = tl.load(table + n // BS, mask=live, other=0).to(tl.int64)
    slot = (block * BS + n % BS) * D
    inside = d < D
    k = tl.load(keys + slot[None, :] + d[:, None], mask=live[None, :] & inside[:, None], other=0.0)
    v = tl.load(
        values + slot[:, None] + d[None, :], mask=live[:, None] & inside[None, :], other=0.0
    )
    return k, v


@triton.jit
def _add_up(
    partial,
    partial_ml,
    part,
    count,
    g,
    d,
    D: tl.constexpr,
    G: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A sequence's attention from its parts, `part` `[BLOCK_G]` being the first's rows."""
    here_g = g < G
    live = here_g[:, None] & (d < D)[None, :]
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for i in range(0, count, 4):
        for j in tl.static_range(4):
            at = partial_ml + (part + (i + j) * STRIDE) * 2
            mask = here_g & (i + j < count)
            m = tl.maximum(m, tl.load(at, mask=mask, other=float("-inf"), cache_modifier=".cg"))
    m = tl.where(here_g, m, 0.0)
    norm = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    # four parts at a time: their loads do not wait for each other
    for i in range(0, count, 4):
        for j in tl.static_range(4):
            row = part + (i + j) * STRIDE
            mask = here_g & (i + j < count)
            at = partial_ml + row * 2
            m_i = tl.load(at, mask=mask, other=float("-inf"), cache_modifier=".cg")
            norm_i = tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg")
            acc_i = tl.load(
                partial + row[:, None] * D + d[None, :],
                mask=live & (i + j < count),
                other=0.0,
                cache_modifier=".cg",
            )
            weight = tl.exp2(m_i - m)
            norm += norm_i * weight
            acc += acc_i * weight[:, None]
    return acc / norm[:, None]


@triton.jit
def _decode(
    qkv,
    out,
    cache,
    block_tables,
    items,
    num_items,
    cos,
    sin,
    q_weight,
    k_weight,
    partial,
    partial_ml,
    arrived,
    num_blocks,
    table_stride,
    scale,
    eps,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    G: tl.constexpr = H // KH
    item = tl.program_id(1)
    head = tl.program_id(0)
    total = tl.load(num_items)
    at = items + item * 8
    seq = tl.load(at)
    row = tl.load(at + 1)
    table = block_tables + tl.load(at + 2).to(tl.int64) * table_stride
    first = tl.load(at + 3)
    stop = tl.load(at + 4)
    index = tl.load(at + 5)
    count = tl.load(at + 6)
    position = tl.load(at + 7)
    dtype = cache.dtype.element_ty
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    keys_of_head = cache + head.to(tl.int64) * num_blocks * (BS * D)
    values_of_head = cache + (head + KH).to(tl.int64) * num_blocks * (BS * D)
    last = position if FUSED else position + 1  # keys that lie in the cache already
    end = tl.minimum(stop, last)
    if item >= total:  # nor does it wait: those with work do
        return
    if FUSED:
        own_block = tl.load(table + position // BS).to(tl.int64)
    if AHEAD == 1:
        # before the wait, since earlier steps wrote them: the first keys and values on their
        # way into the L2 cache, a key a thread
        n0 = first + tl.arange(0, 128)
        live0 = n0 < end
        block0 = tl.load(table + n0 // BS, mask=live0, other=0).to(tl.int64)
        slot0 = (block0 * BS + n0 % BS) * D
        prefetch_rows(keys_of_head + slot0, D * SIZE)
        prefetch_rows(values_of_head + slot0, D * SIZE)
    if AHEAD == 2:
        n0 = first + tl.arange(0, BLOCK_N)
        live0 = n0 < end
        k0, v0 = _load_tile(keys_of_head, values_of_head, table, n0, live0, d, D, BS)
    begin(PDL)
    heads = head * G + g
    stride: tl.constexpr = (H + 2 * KH) * D if FUSED else H * D
    x = qkv + row.to(tl.int64) * stride
    if FUSED:
        q = load_head(
            x,
            q_weight,
            cos + row * (D // 2),
            sin + row * (D // 2),
            heads,
            g < G,
            eps,
            D,
            BLOCK_D,
            NORM,
            ROPE,
        ).to(dtype)
    else:
        q = tl.load(
            x + heads[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0
        )
    if FUSED:
        one = tl.zeros([1], tl.int32)
        own_k = load_head(
            x,
            k_weight,
            cos + row * (D // 2),
            sin + row * (D // 2),
            one + H + head,
            one == 0,
            eps,
            D,
            BLOCK_D,
            NORM,
            ROPE,
        ).to(dtype)
        own_v = tl.load(x + (H + KH + head) * D + d, mask=d < D, other=0.0).to(dtype)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if AHEAD == 2:
        m, norm, acc = _attend_tile(
            q, k0, v0, n0, live0, position, m, norm, acc, scale, WINDOW, SOFTCAP, PRECISION
        )
        first += BLOCK_N
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        live = n < end
        k, v = _load_tile(keys_of_head, values_of_head, table, n, live, d, D, BS)
        m, norm, acc = _attend_tile(
            q, k, v, n, live, position, m, norm, acc, scale, WINDOW, SOFTCAP, PRECISION
        )
    if FUSED:
        if index == count - 1:  # the item that ends with this token itself
            slot = (own_block * BS + position % BS) * D
            tl.store(keys_of_head + slot + d[None, :], own_k, mask=(d < D)[None, :])
            tl.store(values_of_head + slot + d, own_v, mask=d < D)
            s = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * (scale * LOG2_E)
            s = squash(s, SOFTCAP)
            new = tl.maximum(m, s)
            p = tl.exp2(s - new)
            alpha = tl.exp2(m - new)
            norm = norm * alpha + p
            acc = acc * alpha[:, None] + p[:, None] * own_v.to(tl.float32)[None, :]
            m = new
    live_out = (g < G)[:, None] & (d < D)[None, :]
    to = out + row.to(tl.int64) * (H * D) + heads[:, None] * D + d[None, :]
    if count == 1:
        tl.store(to, (acc / norm[:, None]).to(out.dtype.element_ty), mask=live_out)
    else:
        part = (item * KH + head) * G + g
        tl.store(partial + part[:, None] * D + d[None, :], acc, mask=live_out)
        tl.store(partial_ml + part * 2, m, mask=g < G)
        tl.store(partial_ml + part * 2 + 1, norm, mask=g < G)
        tl.debug_barrier()
        counter = arrived + seq * KH + head
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before == count - 1:
            tl.store(counter, 0)  # for the next layer
            part = ((item - index) * KH + head) * G + g
            total_out = _add_up(
                partial, partial_ml, part, count, g, d, D, G, KH * G, BLOCK_G, BLOCK_D
            )
            tl.store(to, total_out.to(out.dtype.element_ty), mask=live_out)


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a program walks over its keys.

    Attributes:
        block_n: keys of a tile.
        num_stages: tiles on their way.
        num_warps: of a program.
        ahead: with PDL, what is asked for before the wait: 0 nothing, 1 the first keys and values
            into the L2 cache, 2 into registers.
    """

    block_n: int
    num_stages: int
    num_warps: int
    ahead: int


def decode_tiles(num_seqs: int, block_d: int, element_size: int) -> DecodeTiles:
    """What was fastest on an H100 for so many sequences (docs/log.md)."""
    if block_d > 128:
        tiles = DecodeTiles(32, 2, 4, 1)
    elif num_seqs <= 8:
        tiles = DecodeTiles(128 if block_d <= 64 else 64, 2, 4, 2)
    elif num_seqs <= 32 and block_d > 64:
        tiles = DecodeTiles(64, 3, 4, 1)
    elif num_seqs <= 64:
        tiles = DecodeTiles(64, 2, 2, 1)
    else:
        tiles = DecodeTiles(128, 3 if block_d <= 64 else 2, 4, 1)
    return replace(tiles, block_n=tiles.block_n // 2) if element_size == 4 else tiles


class Projections:
    """What turns a token's raw projections into q, k and v.

    Attributes:
        cos, sin: `[T, D / 2]` float32 of each token's position; None without rotary embedding.
        q_weight, k_weight: `[D]`, RMSNorm of each head; None without.
        eps: of that norm.
    """

    __slots__ = ("cos", "eps", "k_weight", "q_weight", "sin")

    def __init__(
        self,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self.cos, self.sin = cos, sin
        self.q_weight, self.k_weight, self.eps = q_weight, k_weight, eps


def decode_attention(
    x: torch.Tensor,
    out: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    scale: float,
    device: Device,
    *,
    num_seqs: int,
    projections: Projections | None = None,
    window: int = 0,
    softcap: float = 0.0,
    tiles: DecodeTiles | None = None,
) -> None:
    """Attend for the sequences of a plan, each with one token.

    Args:
        x: with `projections` the raw `[T, (H + 2·KH)·D]`; else q `[T, H, D]`, whose keys lie in
            the cache already.
        out: `[T, H, D]`; rows without a sequence in the plan are left alone.
        cache: one layer's, `[2, KH, num_blocks, block_size, D]`.
        block_tables: `[rows, blocks]` int32.
        plan: what `step_state` wrote for this step.
        scale: of the scores.
        num_seqs: sequences of this step at most (they bound the grid).
        projections: norm, rotary embedding and the write of k and v are done here.
        window: keys that a token sees, itself included; 0: all.
        softcap: scores are squashed to ± this; 0: not.
        tiles: how the work is cut; None: as measured.
    """
    _, kv_heads, num_blocks, block_size, head_dim = cache.shape
    num_heads = out.shape[1]
    block_d = max(16, triton.next_power_of_2(head_dim))
    if tiles is None:
        tiles = decode_tiles(num_seqs, block_d, cache.element_size())
    p = projections or Projections()
    dummy = plan.partial
    device.launch(
        _decode,
        (kv_heads, plan.target_items + num_seqs),
        x,
        out,
        cache,
        block_tables,
        plan.items,
        plan.num_items,
        dummy if p.cos is None else p.cos,
        dummy if p.sin is None else p.sin,
        dummy if p.q_weight is None else p.q_weight,
        dummy if p.k_weight is None else p.k_weight,
        plan.partial,
        plan.partial_ml,
        plan.arrived,
        num_blocks,
        block_tables.stride(0),
        scale,
        p.eps,
        num_heads,
        kv_heads,
        head_dim,
        block_size,
        max(16, triton.next_power_of_2(num_heads // kv_heads)),
        block_d,
        tiles.block_n,
        projections is not None,
        p.q_weight is not None,
        p.cos is not None,
        window,
        softcap,
        tiles.num_stages,
        "ieee" if cache.dtype is torch.float32 else "tf32",
        tiles.ahead if projections is not None and device.pdl else 0,
        cache.element_size(),
        device.pdl,
        num_warps=tiles.num_warps,
    )
