"""Online softmax over tiles of scores, in base 2: what both attention kernels do with a tile."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def squash(s, SOFTCAP: tl.constexpr):
    """Scores (times log2 e) kept within ± SOFTCAP, smoothly; 0: as they are."""
    if SOFTCAP > 0:
        cap: tl.constexpr = SOFTCAP * LOG2_E
        # numbers that the compiler knows on the right: its interpreter wants them there
        s = (2 / (1 + tl.exp2(s * (-2 * LOG2_E) / cap)) - 1) * cap
    return s


@triton.jit
def fold(s, m, norm, acc, HIDDEN: tl.constexpr):
    """One more tile of scores `[rows, keys]`: its weights, and m, norm and acc brought up to it.

    The weights times the tile's values are still to be added to acc. HIDDEN: a row may have seen
    no key yet, which shows as scores of -inf alone.
    """
    new = tl.maximum(m, tl.max(s, 1))
    if HIDDEN:
        base = tl.where(new == float("-inf"), 0.0, new)
    else:
        base = new
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    return p, new, norm * alpha + tl.sum(p, 1), acc * alpha[:, None]
