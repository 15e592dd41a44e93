"""Linear layers for few rows: bound by reading the weight, so everything else is hidden behind it.

A program takes BLOCK_N outputs, and a part of K where one alone would leave multiprocessors idle::

        K ──▶
      N |  program (0, 0)  |  program (0, 1)  |      the last program of a row of parts to finish
      │ |  program (1, 0)  |  program (1, 1)  |      adds them up, in their order
      ▼

The norm before it, the activation after it and the residual add go along. The norm costs nothing
more, since its weight is folded into W beforehand (`FoldedNorm`) and what depends on the row
factors out of the product::

    RMSNorm(x) Wᵀ     = (x · 1/rms) (g ∘ W)ᵀ                 = 1/rms · (x W'ᵀ)
    LayerNorm(x) Wᵀ   = ((x - mean) · 1/std) (g ∘ W)ᵀ + b Wᵀ = 1/std · (x W'ᵀ - mean · Σ W') + b Wᵀ

where the row's mean and mean square come from who wrote x (`row_stats`). While the kernel before
still runs, the weight is already on its way into the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pagelab.kernels.elementwise import activate
from pagelab.kernels.launch import Device, prefetch_rows
from pagelab.kernels.row_stats import RowStats, load_row_stats, store_row_stats
from pagelab.kernels.sizes import SMALLEST_PEAK_BLOCK

SMALL_ROWS = 64
"""Rows up to which a product is bound by reading the weight, and takes tiles of as many rows."""

LARGEST_TILE_ROWS = 128


@triton.jit
def _prefetch(
    w,
    row0,
    k0,
    N,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    # 128 requests, one a thread: each a piece of a row
    PIECES: tl.constexpr = 128 // BLOCK_N
    PIECE: tl.constexpr = LENGTH // PIECES
    i = tl.arange(0, 128)
    row = row0 + i // PIECES
    row = tl.minimum(row, N - 1)
    address = w + row.to(tl.int64) * K + k0 + (i % PIECES) * PIECE
    prefetch_rows(address, PIECE * BYTES)


@triton.jit(do_not_specialize=["M"])  # the rows of a step, which vary
def _linear(
    x,
    w,
    x_tiles,
    w_tiles,
    bias,
    residual,
    out,
    partial,
    arrived,
    row_sums,
    peaks,
    best,
    stats,
    M,
    N,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    STATS: tl.constexpr,
    STAT_WIDTH: tl.constexpr,
    STAT_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    RESIDENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PEAKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    PART: tl.constexpr = K // SPLIT
    EVEN: tl.constexpr = PART % BLOCK_K == 0
    AT_ONCE: tl.constexpr = BLOCK_M * PART <= 16384  # of x, in registers
    # tiles of rows next to each other, so that they find the weight in the L2 cache
    block = tl.program_id(1)
    part = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = part * PART
    k = tl.arange(0, BLOCK_K)
    live_n = n < N
    safe_n = tl.where(live_n, n, 0).to(tl.int64)  # outputs past the end are not stored
    live_m = m < M
    live = live_m[:, None] & live_n[None, :]
    at_out = m.to(tl.int64)[:, None] * N + n[None, :]
    # before the wait, everything that the kernel before does not write: what the end needs
    # would otherwise be waited for there, 0.7 µs each
    if BIAS:
        own_bias = tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
    if NORM == 2:
        sums = tl.load(row_sums + n, mask=live_n, other=0.0)
    if ADD:
        before = tl.load(residual + at_out, mask=live, other=0.0)
    held = ()
    if RESIDENT:  # the whole part of the weight, before the wait
        tl.static_assert(EVEN)
        for at in tl.static_range(0, PART, BLOCK_K):
            held = held + (tl.load(w + safe_n[None, :] * K + (k0 + at + k)[:, None]),)
    if PDL:
        if PREFETCH > 0:
            _prefetch(w, block * BLOCK_N, k0, N, K, PREFETCH, BLOCK_N, 2)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = x + m.to(tl.int64)[:, None] * K
    if NORM > 0:  # on their way while the tiles are multiplied
        squares = load_row_stats(stats, m, live_m, STAT_WIDTH, STAT_BLOCKS)
        if NORM == 2:
            totals = load_row_stats(stats + STAT_WIDTH, m, live_m, STAT_WIDTH, STAT_BLOCKS)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if RESIDENT:
        inputs = ()
        if AT_ONCE:
            for at in tl.static_range(0, PART, BLOCK_K):
                inputs = inputs + (
                    tl.load(rows + (k0 + at + k)[None, :], mask=live_m[:, None], other=0.0),
                )
        for i in tl.static_range(PART // BLOCK_K):
            if AT_ONCE:
                given = inputs[i]
            else:
                given = tl.load(
                    rows + (k0 + i * BLOCK_K + k)[None, :], mask=live_m[:, None], other=0.0
                )
            acc = tl.dot(given, held[i], acc, input_precision=PRECISION)
    else:
        for at in tl.range(k0, k0 + PART, BLOCK_K, num_stages=STAGES):
            here = at + k
            if DESCRIPTORS:
                a = x_tiles.load([tl.program_id(0) * BLOCK_M, at])
                b = w_tiles.load([block * BLOCK_N, at]).T
            elif EVEN:
                a = tl.load(rows + here[None, :], mask=live_m[:, None], other=0.0)
                b = tl.load(w + safe_n[None, :] * K + here[:, None], eviction_policy="evict_first")
            else:
                in_part = here < k0 + PART
                a = tl.load(
                    rows + here[None, :], mask=live_m[:, None] & in_part[None, :], other=0.0
                )
                b = tl.load(
                    w + safe_n[None, :] * K + here[:, None], mask=in_part[:, None], other=0.0
                )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if NORM > 0:
        if NORM == 2:
            mean = tl.sum(totals, 1) / K
            variance = tl.maximum(tl.sum(squares, 1) / K - mean * mean, 0.0)
            scale = tl.rsqrt(variance + eps)
            acc = acc - mean[:, None] * sums[None, :]
        else:
            scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)
        acc = acc * scale[:, None]
    last = True
    if SPLIT > 1:
        size = M * N
        tl.store(partial + part.to(tl.int64) * size + at_out, acc, mask=live)
        tl.debug_barrier()
        counter = arrived + tl.program_id(0) * tl.num_programs(1) + block
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            tl.store(counter, 0)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.static_range(SPLIT):
                acc += tl.load(
                    partial + i * size + at_out, mask=live, other=0.0, cache_modifier=".cg"
                )
    if last:
        if BIAS:
            acc += own_bias[None, :]
        if GATED:  # a gate and what it lets through are next to each other
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
            pair = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            to = out + m.to(tl.int64)[:, None] * (N // 2) + pair[None, :]
            there = live_m[:, None] & (pair < N // 2)[None, :]
            tl.store(to, (activate(gate, ACT) * up).to(out.dtype.element_ty), mask=there)
        else:
            if ACT != "none":
                acc = activate(acc, ACT)
            if ADD:
                acc += before.to(tl.float32)
            if PEAKS:  # of each row of this block, instead of its outputs
                seen = tl.where(live_n[None, :], acc, float("-inf"))
                nan = tl.max(tl.where(seen == seen, 0, 1), 1) > 0
                peak, at_peak = tl.max(
                    tl.where(seen == seen, seen, float("-inf")), 1, return_indices=True
                )
                to = m * tl.num_programs(1) + block
                tl.store(peaks + to, tl.where(nan, float("nan"), peak), mask=live_m)
                tl.store(best + to, block * BLOCK_N + at_peak, mask=live_m)
            else:
                rounded = acc.to(out.dtype.element_ty)
                tl.store(out + at_out, rounded, mask=live)
                if STATS > 0:
                    seen = tl.where(live_n[None, :], rounded.to(tl.float32), 0.0)
                    store_row_stats(stats, m, block, seen, live_m, STAT_WIDTH, STATS == 2)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut up.

    Attributes:
        block_m, block_n, block_k: rows, outputs (before a gate halves them) and elements of K of a
            tile.
        split: parts of K.
        stages: tiles of the weight on their way.
        warps: of a program.
        prefetch: elements of each row of the weight brought into the L2 cache before the wait.
        resident: load the program's whole weight into shared memory before the wait, instead.
        descriptors: tiles are copied by the card's own copy unit, where it has one.
    """

    block_m: int
    block_n: int
    block_k: int
    split: int = 1
    stages: int = 4
    warps: int = 4
    prefetch: int = 0
    resident: bool = False
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class FoldedNorm:
    """A norm whose weight is in the linear layer that follows.

    Attributes:
        eps: of the norm.
        row_sums: LayerNorm: `[N]` float32, the sums of the folded weight's rows; RMSNorm: None.
    """

    eps: float
    row_sums: torch.Tensor | None


class Peaks:
    """The largest outputs of each row, by blocks: what a greedy choice needs of the logits.

    Args:
        max_rows: rows at most.
        num_outputs: N.
        device: where.

    Attributes:
        values: float32 `[rows · blocks]`; NaN where any output is.
        tokens: int32, their indices.
    """

    SMALLEST_BLOCK = SMALLEST_PEAK_BLOCK

    def __init__(self, max_rows: int, num_outputs: int, device: torch.device) -> None:
        size = max_rows * triton.cdiv(num_outputs, self.SMALLEST_BLOCK)
        self.values = torch.empty(size, dtype=torch.float32, device=device)
        self.tokens = torch.empty(size, dtype=torch.int32, device=device)


class SplitWorkspace:
    """Where the parts of split products meet; used by one product after the other.

    Args:
        max_elements: `split · rows · outputs` at most.
        max_blocks: blocks of outputs at most.
    """

    def __init__(self, max_elements: int, max_blocks: int, device: torch.device) -> None:
        self.partial = torch.empty(max_elements, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max_blocks, dtype=torch.int32, device=device)


def empty_rows(like: torch.Tensor, rows: int, *shape: int) -> torch.Tensor:
    """An uninitialized `[rows, *shape]` that ends in whole tiles: see `_whole_tiles`."""
    room = rows if rows <= SMALL_ROWS else -(-rows // LARGEST_TILE_ROWS) * LARGEST_TILE_ROWS
    return like.new_empty(room, *shape)[:rows]


def _whole_tiles(x: torch.Tensor, block_m: int, block_k: int) -> TensorDescriptor:
    """Tiles of x. They go on past its last row where memory does: a tile that has to be filled up
    takes longer to copy (192 rows as two of 128: 8 to 17 %).
    """
    rows, k = x.shape
    there = (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()) // k
    whole = -(-rows // block_m) * block_m
    return TensorDescriptor(x, [min(whole, there), k], [k, 1], [block_m, block_k])


def within(tiling: Tiling, k: int, element_size: int, *, shared_bytes: int) -> Tiling:
    """The tiling with as much on its way as fits into a program's shared memory.

    The tilings were measured where a program can have 227 KiB; many cards give 99.
    """
    inputs = tiling.block_m * tiling.block_k
    if (
        tiling.resident
        and (tiling.block_n * (k // tiling.split) + inputs) * element_size > shared_bytes
    ):
        tiling = replace(tiling, resident=False)
    stage = (inputs + tiling.block_n * tiling.block_k) * element_size
    return replace(tiling, stages=max(1, min(tiling.stages, shared_bytes // stage)))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    tiling: Tiling,
    workspace: SplitWorkspace,
    device: Device,
    *,
    bias: torch.Tensor | None = None,
    norm: FoldedNorm | None = None,
    activation: str = "none",
    gated: bool = False,
    residual: torch.Tensor | None = None,
    peaks: Peaks | None = None,
    stats: RowStats | None = None,
) -> None:
    """`out = residual + activation(norm(x) Wᵀ + bias)`.

    Args:
        x: `[M, K]`.
        weight: `[N, K]`; with `gated` `[2 · N, K]`, in which each row of the gate is followed by
            the one that it is multiplied with after its activation.
        out: `[M, N]`; may be the residual itself.
        tiling: from `tilings`, or measured.
        residual: `[M, N]`, not written by the kernel launched right before (with PDL it is read
            before that one has ended); x is what that one may write.
        peaks: take the largest output of each block and row instead; out gives the shape only.
        stats: with `norm`, those of x, to be read; otherwise those of out are written there.
    """
    rows, k = x.shape
    n = out.shape[1] * (2 if gated else 1)
    tiling = within(tiling, k, x.element_size(), shared_bytes=device.shared_bytes)
    assert norm is None or tiling.split == 1, "a part of a row has not its mean square"
    assert not gated or tiling.split == 1
    assert norm is None or stats is not None, "the norm's sums come from who wrote x"
    kind = 0 if stats is None else 2 if stats.layer else 1
    if norm is None and stats is not None:
        stats.blocks = triton.cdiv(n, tiling.block_n)
    grid = (triton.cdiv(rows, tiling.block_m), triton.cdiv(n, tiling.block_n), tiling.split)
    tiles = tiling.descriptors and device.descriptors
    block_m, block_n, block_k = tiling.block_m, tiling.block_n, tiling.block_k
    device.launch(
        _linear,
        grid,
        x,
        weight,
        _whole_tiles(x, block_m, block_k) if tiles else x,
        TensorDescriptor.from_tensor(weight, [block_n, block_k]) if tiles else weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        workspace.partial,
        workspace.arrived,
        workspace.partial if norm is None or norm.row_sums is None else norm.row_sums,
        workspace.partial if peaks is None else peaks.values,
        workspace.arrived if peaks is None else peaks.tokens,
        workspace.partial if stats is None else stats.values,
        rows,
        n,
        0.0 if norm is None else norm.eps,
        k,
        block_m,
        block_n,
        block_k,
        tiling.split,
        0 if norm is None else kind,
        activation,
        gated,
        bias is not None,
        residual is not None,
        0 if norm is not None else kind,
        1 if stats is None else stats.width,
        1 if stats is None or norm is None else stats.blocks,
        tiling.stages,
        tiling.prefetch if device.pdl and not tiling.resident else 0,
        tiling.resident,
        tiles,
        peaks is not None,
        "ieee" if x.dtype is torch.float32 else "tf32",
        device.pdl,
        num_warps=tiling.warps,
    )
