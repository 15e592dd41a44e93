"""Random K/V in scattered blocks, everything else poisoned, and attention as its definition.

What no sequence has written is NaN, so a kernel that lets one such slot count gives NaN.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter."""

HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""Triton's interpreter computes with a bfloat16's bits as if they were a whole number."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of results that are near 1, by the dtype that they are computed in."""


def synchronize() -> None:
    """Wait for the GPU, where the host is to read what a kernel wrote into its memory."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Paged:
    """K/V of several sequences: `keys[i]`, `values[i]` `[KH, length, D]` lie in the cache."""

    cache: torch.Tensor  # [2, KH, blocks, BS, D]
    tables: torch.Tensor  # [rows, most blocks] int32
    rows: list[int]  # each sequence's row of `tables`, the others are of nobody
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def slot(self, sequence: int, position: int) -> tuple[int, int]:
        """Block and offset of a token."""
        size = self.cache.shape[3]
        return int(self.tables[self.rows[sequence], position // size]), position % size


def scattered(
    lengths: Sequence[int],
    *,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    written: Sequence[int] | None = None,
) -> Paged:
    """Blocks for `lengths` tokens, the first `written` of each in the cache (default: all)."""
    rng = random.Random(f"{lengths} {block_size}")
    counts = [-(-length // block_size) for length in lengths]
    ids = rng.sample(range(sum(counts) + 2), sum(counts))
    rows = rng.sample(range(len(lengths) + 1), len(lengths))
    tables = torch.zeros(len(lengths) + 1, max(counts) + 1, dtype=torch.int32)
    cache = torch.full((2, kv_heads, sum(counts) + 2, block_size, dim), math.nan, dtype=dtype)
    paged = Paged(cache, tables, rows, [], [])
    for i, length in enumerate(lengths):
        tables[rows[i], : counts[i]] = torch.tensor([ids.pop() for _ in range(counts[i])])
        keys, values = torch.randn(2, kv_heads, length, dim).to(dtype)
        for position in range(length if written is None else written[i]):
            block, offset = paged.slot(i, position)
            cache[0, :, block, offset], cache[1, :, block, offset] = (
                keys[:, position],
                values[:, position],
            )
        paged.keys.append(keys)
        paged.values.append(values)
    paged.cache, paged.tables = cache.to(DEVICE), tables.to(DEVICE)
    return paged


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """q `[T, H, D]` at positions from `start` on, over `[KH, length, D]`, in float64."""
    group = q.shape[1] // keys.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    scores = torch.einsum("thd,hkd->thk", q.double(), k) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    position = torch.arange(start, start + len(q))[:, None, None]
    key = torch.arange(k.shape[1])[None, None]
    seen = (key <= position) & ((key > position - window) if window else (key >= 0))
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("thk,hkd->thd", weights, v)


def turned(
    raw: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Heads `[T, H, D]`, normed with a weight `[D]` and rotated by angles `[T, D / 2]`."""
    x = raw.float()
    if weight is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        x = (x.to(raw.dtype) * weight).float()
    if cos is not None and sin is not None:
        c, s = (torch.cat([a, a], -1)[:, None] for a in (cos, sin))
        first, second = x.chunk(2, -1)
        x = x * c + torch.cat([-second, first], -1) * s
    return x
