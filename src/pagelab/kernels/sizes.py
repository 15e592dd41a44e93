"""Sizes that kernels and those who count their memory share. Knows no tensors."""

from __future__ import annotations

MAX_SUPPRESSED = 16
"""Ids that a sequence can forbid at most, on the device."""

SAMPLING_LEVELS = 16
"""Levels below a row's highest logit that `sampling` tells apart; the last is below all of them."""

SAMPLING_TILE = 2048
"""Tokens of the vocabulary that one program of `sampling` reads."""

SAMPLING_CANDIDATES = 4096
"""Tokens of a row that `sampling`'s threshold search has room for."""

DESCRIPTOR = 8
"""Words that describe an item of `paged_decode`: sequence, row of q, row of the block table, first
key, one past the last key, index in the sequence, items of the sequence, position of the token."""

TILE = 4
"""Words that describe a tile of `paged_prefill`: row of the block table, first row of q, queries in
the tile, position of its first query."""

TILE_ROWS = 128
"""Rows of such a tile: queries times the query heads that share a K/V head."""

MAX_LINEAR_ROWS = 256
"""Rows of a product of our own at most; above, the matrix rate counts, and cuBLAS is ahead."""

MAX_SPLIT = 4
"""Parts that a product's inputs are split into at most."""

SMALLEST_LINEAR_BLOCK = 16
"""Outputs of a tile of `linear` at least, and rows."""

SMALLEST_PEAK_BLOCK = 32
"""Outputs of a block of `linear.Peaks` at least."""

MAX_CHANGES = 1 << 16
"""Changes of the device's state that are sent at once (`updates`)."""


def aligned(num_words: int) -> int:
    """Words (of 4 bytes) rounded up to 16 bytes: kernels are compiled anew for pointers that do not
    start there.
    """
    return -(-num_words // 4) * 4


def row_stats_width(hidden: int) -> int:
    """Blocks of outputs that `row_stats` has room for in a row of `hidden` numbers."""
    return -(-hidden // SMALLEST_LINEAR_BLOCK)


def split_sums(hidden: int) -> int:
    """Sums that split products (those into the residual stream) leave for each other at most."""
    return MAX_SPLIT * MAX_LINEAR_ROWS * hidden


def split_blocks(hidden: int) -> int:
    """Tiles of such a product at most."""
    return MAX_LINEAR_ROWS // SMALLEST_LINEAR_BLOCK * row_stats_width(hidden)
