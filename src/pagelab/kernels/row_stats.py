"""Sums over the rows of the residual stream, which the norm of the product that reads it needs.

Who writes the stream has each number at hand anyway::

    output product, outputs of block b │ x[m, outputs] += … → block b of row m: Σ x², Σ x
    next product, norm inside          │ Σ over all blocks of row m → 1/rms, or mean and 1/std

so no kernel goes through x for its norm alone, and the loop of a product does nothing but multiply.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagelab.kernels.sizes import row_stats_width


@triton.jit
def store_row_stats(stats, m, block, x, live, WIDTH: tl.constexpr, LAYER: tl.constexpr):
    """The sums of x `[M, N]` (float32, 0 where there is no output) as block `block` of rows m."""
    at = stats + m.to(tl.int64) * (2 * WIDTH) + block
    tl.store(at, tl.sum(x * x, 1), mask=live)
    if LAYER:
        tl.store(at + WIDTH, tl.sum(x, 1), mask=live)


@triton.jit
def load_row_stats(stats, m, live, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The blocks of rows m, not added up yet: `[M, BLOCKS or more]`, sums of squares; of x, with
    stats moved on by WIDTH.
    """
    b = tl.arange(0, triton.next_power_of_2(BLOCKS))
    at = stats + m.to(tl.int64)[:, None] * (2 * WIDTH) + b[None, :]
    return tl.load(at, mask=live[:, None] & (b < BLOCKS)[None, :], other=0.0)


class RowStats:
    """Room for the sums, and how many blocks there are of them at the moment.

    Args:
        max_rows: rows at most.
        hidden: numbers in a row.
        layer: for LayerNorm: the sums too; otherwise those of squares alone.
        device: where.

    Attributes:
        values: float32 `[max_rows, 2, width]`: sums of squares, sums.
        blocks: as the kernel launched last wrote them.
    """

    def __init__(self, max_rows: int, hidden: int, *, layer: bool, device: torch.device) -> None:
        self.width = row_stats_width(hidden)
        self.layer = layer
        self.values = torch.empty(max_rows, 2, self.width, dtype=torch.float32, device=device)
        self.blocks = 1
