"""How products of few rows are cut up, as measured on an H100 (docs/log.md); None: leave them to
cuBLAS. There is no search at start-up.
"""

from __future__ import annotations

from dataclasses import replace

from pagelab.kernels.linear import SMALL_ROWS, Tiling
from pagelab.kernels.sizes import MAX_LINEAR_ROWS

INVARIANT = Tiling(64, 64, 64, stages=5, prefetch=512, descriptors=True)
"""Of every product under `--batch-invariant`: an output's sum is made in the same order whatever
else is in the step."""

BIG = 12_000_000
"""Numbers in a weight from which on it is read for so long that little else counts."""


def tiling_for(rows: int, n: int, k: int, *, gated: bool, norm: bool) -> Tiling | None:
    """The tiling of an `[rows, k] · [n, k]ᵀ` product, `n` counted before a gate doubles it.

    `norm`: of a product that reads the residual stream; others write it.
    """
    size = n * k * (2 if gated else 1)
    if rows > MAX_LINEAR_ROWS:
        found = None
    elif rows <= 16 and size <= BIG:
        found = _up_to_16(k, gated=gated, norm=norm)
    elif rows <= SMALL_ROWS:
        found = _up_to_64(rows, k, size, gated=gated, norm=norm)
    else:
        found = _up_to_256(rows, size, gated=gated, norm=norm)
    return None if found is None else fitted(found, k)


def _up_to_16(k: int, *, gated: bool, norm: bool) -> Tiling:
    if gated:
        n = 128 if k > 1024 else 64
        return Tiling(16, n, 128, stages=4, prefetch=512, descriptors=True)
    if norm and k > 1024:
        return Tiling(16, 64, 128, stages=4, prefetch=512)
    if norm or k < 2048:
        return Tiling(16, 32, 256, warps=8, resident=True)
    return Tiling(16, 32, 256, split=4, resident=True)


def _up_to_64(rows: int, k: int, size: int, *, gated: bool, norm: bool) -> Tiling | None:
    # tiles of 64 rows, however few there are: these are multiplied by faster instructions
    if size > BIG:
        if gated:
            return Tiling(64, 128, 128, stages=3, warps=8, prefetch=512, descriptors=True)
        if norm:
            return None
        if k > 8192:
            return Tiling(64, 64, 128, split=2, stages=4, prefetch=512, descriptors=True)
        return Tiling(64, 32, 128, stages=5, prefetch=1024, descriptors=True)
    if norm and not gated:
        if k > 1024:
            return Tiling(64, 64, 64, stages=6, prefetch=512)
        stages = 3 if size < 2_000_000 else 5
        return Tiling(64, 32, 128, stages=stages, prefetch=1024, descriptors=True)
    if gated or k < 2048:
        return Tiling(64, 32, 128, stages=5, prefetch=1024, descriptors=True)
    if rows > 32 and k < 3072:
        return Tiling(64, 16, 256, stages=4, prefetch=1024, descriptors=True)
    return Tiling(64, 32, 128, split=4, stages=4, prefetch=1024)


def _up_to_256(rows: int, size: int, *, gated: bool, norm: bool) -> Tiling | None:
    if gated and size > BIG:
        if 128 < rows <= 192:
            return None
        n, stages = (128, 4) if rows <= 128 else (256, 3)
        return Tiling(128, n, 64, stages=stages, warps=8, descriptors=True)
    if size > BIG:
        return None
    if gated:
        if rows <= 128:
            return Tiling(128, 64, 64, stages=5, prefetch=512, descriptors=True)
        return Tiling(128, 128, 64, stages=4, warps=8, descriptors=True)
    if norm:
        if rows <= 128:
            return Tiling(64, 64, 128, stages=4, prefetch=512, descriptors=True)
        return Tiling(64, 64, 64, stages=6, prefetch=512, descriptors=True)
    return Tiling(64, 32, 128, stages=5, prefetch=1024, descriptors=True)


def head_tiling(rows: int, k: int) -> Tiling | None:
    """The same for the output head, whose n is the vocabulary."""
    if rows > MAX_LINEAR_ROWS:
        return None
    if rows <= 16:
        found = Tiling(16, 64, 128, stages=4, descriptors=True)
    elif rows <= SMALL_ROWS:
        found = Tiling(64, 64, 64, stages=6, prefetch=512, descriptors=True)
    else:
        n, stages = (128, 4) if rows <= 128 else (256, 3)
        found = Tiling(128, n, 64, stages=stages, warps=8, descriptors=True)
    return fitted(found, k)


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
    step = 8 * max(1, 128 // tiling.block_n)
    prefetch = min(tiling.prefetch, part) // step * step
    return replace(tiling, block_k=block_k, split=split, prefetch=prefetch)
