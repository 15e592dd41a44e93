"""Work on single tokens, fused so that the residual stream is read and written once.

::

    add_norm        x += y + bias; h = norm(x), whose weight is in the next linear layer
    project         raw q, k, v → norm of q and k, rotary embedding → q, and k and v in the cache
    gated           [gate | up] → activation(gate) · up
    last_norm       the rows that are sampled → norm, and whether they are finite
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagelab.kernels.launch import Device, begin
from pagelab.kernels.paged_decode import Projections, load_head


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
def _with_pending(x, y, bias, at, j, live, ADD: tl.constexpr, ADD_BIAS: tl.constexpr):
    """A row of the residual stream, and what is still to be added to it, in float32."""
    row = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(y + at, mask=live, other=0.0).to(tl.float32)
        if ADD_BIAS:
            row += tl.load(bias + j, mask=live, other=0.0).to(tl.float32)
    return row


@triton.jit
def _add_norm(
    x,
    y,
    add_bias,
    h,
    hidden,
    eps,
    ADD: tl.constexpr,
    ADD_BIAS: tl.constexpr,
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
    row = _with_pending(x, y, add_bias, at, j, live, ADD, ADD_BIAS)
    if ADD:
        rounded = row.to(dtype)
        tl.store(x + at, rounded, mask=live)
        row = rounded.to(tl.float32)
    tl.store(h + at, normalize(row, j, hidden, eps, LAYER).to(dtype), mask=live)


@triton.jit
def _last_norm(
    x,
    y,
    add_bias,
    last,
    weight,
    bias,
    h,
    finite,
    hidden,
    eps,
    ADD: tl.constexpr,
    ADD_BIAS: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    live = j < hidden
    at = tl.load(last + i).to(tl.int64) * hidden + j
    row = _with_pending(x, y, add_bias, at, j, live, ADD, ADD_BIAS)
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
    gate = tl.load(x + i * 2 * inner + j, mask=live, other=0.0)
    up = tl.load(x + i * 2 * inner + inner + j, mask=live, other=0.0)
    gate = activate(gate.to(tl.float32), KIND)
    tl.store(out + i * inner + j, (gate * up.to(tl.float32)).to(up.dtype), mask=live)


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


class Pending:
    """What is still to be added to the residual stream: `y` `[T, hidden]`, and a bias."""

    __slots__ = ("bias", "y")

    def __init__(self, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.y, self.bias = y, bias


def add_norm(
    x: torch.Tensor,
    pending: Pending | None,
    h: torch.Tensor,
    device: Device,
    *,
    eps: float,
    layer: bool,
) -> None:
    """`x += pending` in place, then `h = norm(x)` without weight and bias; all `[T, hidden]`."""
    hidden = x.shape[1]
    y, bias = (None, None) if pending is None else (pending.y, pending.bias)
    device.launch(
        _add_norm,
        (len(x),),
        x,
        x if y is None else y,
        x if bias is None else bias,
        h,
        hidden,
        eps,
        y is not None,
        bias is not None,
        layer,
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
    """`h[i] = norm((x + pending)[last[i]])`; `finite[i]` (int32) says whether that row was."""
    hidden = x.shape[1]
    y, bias = (None, None) if pending is None else (pending.y, pending.bias)
    device.launch(
        _last_norm,
        (len(h),),
        x,
        x if y is None else y,
        x if bias is None else bias,
        last,
        norm.weight,
        norm.bias,
        h,
        finite,
        hidden,
        norm.eps,
        y is not None,
        bias is not None,
        norm.layer,
        triton.next_power_of_2(hidden),
        device.pdl,
        num_warps=_warps(hidden),
    )


def gated(x: torch.Tensor, out: torch.Tensor, kind: str, device: Device) -> None:
    """`out [T, inner] = activation(gate) · up`, with x `[T, 2 · inner]` as `[gate | up]`."""
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
