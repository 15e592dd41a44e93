"""Work on single tokens, fused so that the residual stream is read and written once.

::

    add_norm        x += bias; h = norm(x), whose weight is in the next linear layer
    project         raw q, k, v → norm of q and k, rotary embedding → q, and k and v in the cache
    gated           pairs of gate and up → activation(gate) · up
    sum_rows        x += bias; the sums that a norm inside the next linear layer needs
    last_norm       the rows that are sampled → norm, and whether they are finite
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagelab.kernels.launch import Device, begin
from pagelab.kernels.paged_decode import Projections, load_head
from pagelab.kernels.row_stats import RowStats


@triton.jit
def normalize(x, j, hidden, eps, LAYER: tl.constexpr):
    """RMSNorm or LayerNorm of a row in float32, without weight and bias."""
    if LAYER:
        x = tl.where(j < hidden, x - tl.sum(x, 0) / hidden, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """silu, gelu_tanh or gelu of float32 numbers."""
    if KIND == "silu":
        return x / (1 + tl.exp(-x))
    if KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1 - 1 / (1 + tl.exp(2 * inner)))
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _with_bias(x, bias, at, j, live, ADD: tl.constexpr):
    """A row of the residual stream, and the bias that is still to be added to it, in float32."""
    row = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(bias + j, mask=live, other=0.0).to(tl.float32)
    return row


@triton.jit
def _add_norm(
    x,
    add_bias,
    h,
    hidden,
    eps,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    live = j < hidden
    at = i * hidden + j
    dtype = x.dtype.element_ty
    row = _with_bias(x, add_bias, at, j, live, ADD)
    if ADD:
        rounded = row.to(dtype)
        tl.store(x + at, rounded, mask=live)
        row = rounded.to(tl.float32)
    tl.store(h + at, normalize(row, j, hidden, eps, LAYER).to(dtype), mask=live)


@triton.jit
def _sum_rows(
    x,
    add_bias,
    stats,
    hidden,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    live = j < hidden
    at = i * hidden + j
    row = _with_bias(x, add_bias, at, j, live, ADD)
    if ADD:
        rounded = row.to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=live)
        row = rounded.to(tl.float32)
    tl.store(stats + i * (2 * WIDTH), tl.sum(row * row, 0))
    if LAYER:
        tl.store(stats + i * (2 * WIDTH) + WIDTH, tl.sum(row, 0))


@triton.jit
def _last_norm(
    x,
    add_bias,
    last,
    weight,
    bias,
    h,
    finite,
    hidden,
    eps,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    live = j < hidden
    at = tl.load(last + i).to(tl.int64) * hidden + j
    row = _with_bias(x, add_bias, at, j, live, ADD)
    # a NaN or an infinity is the only number whose difference to itself is not 0
    tl.store(finite + i, (tl.sum(tl.where(row - row == 0.0, 0, 1), 0) == 0).to(tl.int32))
    out = normalize(row, j, hidden, eps, LAYER)
    w = tl.load(weight + j, mask=live, other=0.0)
    if LAYER:
        out = out * w.to(tl.float32) + tl.load(bias + j, mask=live, other=0.0).to(tl.float32)
    else:
        out = (out.to(w.dtype) * w).to(tl.float32)  # in the model's dtype, as it was trained
    tl.store(h + i * hidden + j, out.to(h.dtype.element_ty), mask=live)


@triton.jit
def _gated(x, out, inner, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = j < inner
    both = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(x + i * 2 * inner + both, mask=both < 2 * inner, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    tl.store(out + i * inner + j, (activate(gate, KIND) * up).to(x.dtype.element_ty), mask=live)


@triton.jit
def _activate(x, inner, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = j < inner
    value = tl.load(x + i * inner + j, mask=live, other=0.0)
    tl.store(x + i * inner + j, activate(value.to(tl.float32), KIND).to(value.dtype), mask=live)


@triton.jit
def _project(
    x,
    q_out,
    cache,
    block_tables,
    token_rows,
    positions,
    cos,
    sin,
    q_weight,
    k_weight,
    num_blocks,
    table_stride,
    eps,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    G: tl.constexpr = H // KH
    i = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    x += i * ((H + 2 * KH) * D)
    cos += i * (D // 2)
    sin += i * (D // 2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    heads = head * G + g
    q = load_head(x, q_weight, cos, sin, heads, g < G, eps, D, BLOCK_D, NORM, ROPE)
    tl.store(
        q_out + i * (H * D) + heads[:, None] * D + d[None, :],
        q.to(q_out.dtype.element_ty),
        mask=(g < G)[:, None] & (d < D)[None, :],
    )
    one = tl.zeros([1], tl.int32)
    k = load_head(x, k_weight, cos, sin, one + H + head, one == 0, eps, D, BLOCK_D, NORM, ROPE)
    v = tl.load(x + (H + KH + head) * D + d, mask=d < D, other=0.0)
    row = tl.load(token_rows + i).to(tl.int64)
    position = tl.load(positions + i)
    block = tl.load(block_tables + row * table_stride + position // BS).to(tl.int64)
    slot = (block * BS + position % BS) * D
    keys = cache + head.to(tl.int64) * num_blocks * (BS * D) + slot
    values = cache + (head + KH).to(tl.int64) * num_blocks * (BS * D) + slot
    dtype = cache.dtype.element_ty
    tl.store(keys + d[None, :], k.to(dtype), mask=(d < D)[None, :])
    tl.store(values + d, v.to(dtype), mask=d < D)


class NormWeights:
    """A norm's kind and weights: `layer` is LayerNorm, otherwise RMSNorm (without a bias)."""

    __slots__ = ("bias", "eps", "layer", "weight")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, layer: bool
    ) -> None:
        self.weight, self.eps, self.layer = weight, eps, layer
        self.bias = weight if bias is None else bias


@dataclass(frozen=True, slots=True)
class Pending:
    """What is left to do on the residual stream: a bias to add, if any, and to sum up its rows
    (`row_stats`), which who wrote it did not do.
    """

    bias: torch.Tensor | None = None


def add_norm(
    x: torch.Tensor,
    pending: Pending | None,
    h: torch.Tensor,
    device: Device,
    *,
    eps: float,
    layer: bool,
) -> None:
    """`x += bias` in place, if one is pending, then `h = norm(x)` without weight and bias; both
    `[T, hidden]`.
    """
    hidden = x.shape[1]
    bias = None if pending is None else pending.bias
    device.launch(
        _add_norm,
        (len(x),),
        x,
        x if bias is None else bias,
        h,
        hidden,
        eps,
        bias is not None,
        layer,
        triton.next_power_of_2(hidden),
        device.pdl,
        num_warps=_warps(hidden),
    )


def sum_rows(x: torch.Tensor, pending: Pending, stats: RowStats, device: Device) -> None:
    """Do what is pending on x `[T, hidden]`, in place: the sums of its rows are one block then."""
    hidden = x.shape[1]
    stats.blocks = 1
    device.launch(
        _sum_rows,
        (len(x),),
        x,
        x if pending.bias is None else pending.bias,
        stats.values,
        hidden,
        pending.bias is not None,
        stats.layer,
        stats.width,
        triton.next_power_of_2(hidden),
        device.pdl,
        num_warps=_warps(hidden),
    )


def last_norm(
    x: torch.Tensor,
    pending: Pending | None,
    last: torch.Tensor,
    norm: NormWeights,
    h: torch.Tensor,
    finite: torch.Tensor,
    device: Device,
) -> None:
    """`h[i] = norm((x + bias)[last[i]])`; `finite[i]` (int32) says whether that row was."""
    hidden = x.shape[1]
    bias = None if pending is None else pending.bias
    device.launch(
        _last_norm,
        (len(h),),
        x,
        x if bias is None else bias,
        last,
        norm.weight,
        norm.bias,
        h,
        finite,
        hidden,
        norm.eps,
        bias is not None,
        norm.layer,
        triton.next_power_of_2(hidden),
        device.pdl,
        num_warps=_warps(hidden),
    )


def gated(x: torch.Tensor, out: torch.Tensor, kind: str, device: Device) -> None:
    """`out [T, inner] = activation(gate) · up`, with pairs of the two in x `[T, 2 · inner]`."""
    inner = out.shape[1]
    block = min(1024, triton.next_power_of_2(inner))
    grid = (len(x), triton.cdiv(inner, block))
    device.launch(_gated, grid, x, out, inner, kind, block, device.pdl, num_warps=4)


def activate_(x: torch.Tensor, kind: str, device: Device) -> None:
    """The activation of x `[T, inner]`, in place."""
    inner = x.shape[1]
    block = min(1024, triton.next_power_of_2(inner))
    grid = (len(x), triton.cdiv(inner, block))
    device.launch(_activate, grid, x, inner, kind, block, device.pdl, num_warps=4)


def project(
    x: torch.Tensor,
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    projections: Projections,
    device: Device,
) -> None:
    """Raw `[T, (H + 2·KH)·D]` → q `[T, H, D]`, and k and v into the cache's slots."""
    _, kv_heads, num_blocks, block_size, head_dim = cache.shape
    num_heads = q.shape[1]
    p = projections
    device.launch(
        _project,
        (len(x), kv_heads),
        x,
        q,
        cache,
        block_tables,
        token_rows,
        positions,
        x if p.cos is None else p.cos,
        x if p.sin is None else p.sin,
        x if p.q_weight is None else p.q_weight,
        x if p.k_weight is None else p.k_weight,
        num_blocks,
        block_tables.stride(0),
        p.eps,
        num_heads,
        kv_heads,
        head_dim,
        block_size,
        triton.next_power_of_2(num_heads // kv_heads),
        triton.next_power_of_2(head_dim),
        p.q_weight is not None,
        p.cos is not None,
        device.pdl,
        num_warps=1,
    )


def _warps(hidden: int) -> int:
    return 4 if hidden <= 2048 else 8
