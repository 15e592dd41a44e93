"""How products of few rows are cut up, as measured on an H100 (docs/log.md); None: leave them to
cuBLAS. There is no search at start-up.
"""

from __future__ import annotations

from dataclasses import replace

from pagelab.kernels.linear import Tiling
from pagelab.kernels.sizes import MAX_LINEAR_ROWS

INVARIANT = Tiling(64, 64, 64, stages=4)
"""Of every product under `--batch-invariant`: an output's sum is made in the same order whatever
else is in the step."""


def tiling_for(rows: int, n: int, k: int, *, gated: bool, norm: bool) -> Tiling | None:
    """The tiling of an `[rows, k] · [n, k]ᵀ` product, `n` counted before a gate doubles it."""
    if rows > MAX_LINEAR_ROWS:
        return None
    size = n * k * (2 if gated else 1)
    big = size > 12_000_000
    whole = gated or norm  # K is not split
    if rows <= 16 and not big:
        return fitted(_up_to_16(k, whole=whole, gated=gated), k)
    # tiles of 64 rows are multiplied by faster instructions, which also few rows of a large
    # weight gain from; 32 are ahead only where a weight is small
    block_m = 32 if rows <= 32 and size < 2_500_000 else 64
    found = _up_to_64(block_m, k, whole=whole, gated=gated, big=big)
    return None if found is None else fitted(found, k)


def _up_to_16(k: int, *, whole: bool, gated: bool) -> Tiling:
    if whole:
        if k > 1024:
            return Tiling(16, 64, 128, stages=4, prefetch=512)
        if gated:
            return Tiling(16, 16, 256, resident=True)
        return Tiling(16, 32, 256, warps=8, resident=True)
    if k < 2048:
        return Tiling(16, 16, 128, stages=6, prefetch=1024)
    return Tiling(16, 32, 256, split=4, resident=True)


def _up_to_64(block_m: int, k: int, *, whole: bool, gated: bool, big: bool) -> Tiling | None:
    if whole:
        if gated:
            return Tiling(block_m, 64, 128, stages=4, warps=8, prefetch=512)
        if big:
            return None
        if k > 1024:
            return Tiling(block_m, 64, 64, stages=6, prefetch=512)
        return Tiling(block_m, 32, 128, resident=True)
    if k < 2048:
        return Tiling(block_m, 32, 64, stages=6, prefetch=1024)
    return Tiling(block_m, 32, 128, split=2 if big else 4, stages=4, prefetch=1024)


def head_tiling(rows: int, k: int) -> Tiling | None:
    """The same for the output head, whose n is the vocabulary."""
    if rows > MAX_LINEAR_ROWS:
        return None
    if rows <= 16:
        return fitted(Tiling(16, 32, 128, stages=4, prefetch=512), k)
    block_m = 32 if rows <= 32 else 64
    return fitted(Tiling(block_m, 64, 64, stages=5, prefetch=512), k)


def fitted(tiling: Tiling, k: int) -> Tiling | None:
    """The tiling with parts and tiles that divide k; None where k is too odd."""
    split = tiling.split
    while split > 1 and k % (split * 16):
        split //= 2
    part = k // split
    block_k = tiling.block_k
    while block_k > 16 and part % block_k:
        block_k //= 2
    if part % block_k:
        return None
    # pieces of a row are asked for by 128 / block_n threads, in multiples of 16 bytes
    step = 8 * (128 // tiling.block_n)
    prefetch = min(tiling.prefetch, part) // step * step
    return replace(tiling, block_k=block_k, split=split, prefetch=prefetch)
