"""What K/V costs a request when a model's layers do not all keep the same: groups and pages.

Layers with one geometry and one window form a group, and a request has one block table a group.
All groups take pages of equal bytes from one pool::

    group                      a block (block_size tokens)   in pages
    52 layers, window 1,024    52 layers' K/V                26
    10 layers, full            10 layers' K/V                5         a page: 2 layers' K/V

A model with one group has pages that are blocks: the engine's own count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pagelab.errors import ConfigError
from pagelab.memory.layout import DTYPE_BYTES, KVLayout

KV_DTYPE_BYTES = {**DTYPE_BYTES, "fp8": 1, "int8": 1}
"""Bytes of a number in K/V that can be planned for; the scales of fp8 and int8 are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that keep K/V of the same shape, for the same tokens.

    Attributes:
        num_layers: layers in the group.
        num_kv_heads: K/V heads of one layer.
        head_dim: numbers in one head's key (the value has as many).
        window: tokens that a query sees, itself included; None: all of them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_per_token(self, dtype: str, tp: int = 1) -> int:
        """Bytes of one token's K and V in all layers of the group, on one of `tp` devices.

        Heads are split over the devices; where there are more devices than heads, each holds a
        copy of one head.
        """
        heads = max(1, self.num_kv_heads // tp)
        one_byte = KVLayout(self.num_layers, heads, self.head_dim, "float32", 1).bytes_per_token
        return one_byte // DTYPE_BYTES["float32"] * KV_DTYPE_BYTES[dtype]

    def tokens_kept(self, num_tokens: int) -> int:
        """Tokens whose K/V is read when the last of `num_tokens` is computed."""
        return num_tokens if self.window is None else min(num_tokens, self.window)

    def most_blocks(self, block_size: int) -> int | None:
        """Blocks that the group holds at most, whatever the length; None without a window.

        The w tokens of a window straddle at most ceil((w - 1) / B) + 1 blocks (a step that
        computes several tokens of a prompt at once needs room for those on top, for that step)::

            B = 4, w = 6     |....|...w|wwww|w...|     ceil(5 / 4) + 1 = 3
        """
        if self.window is None:
            return None
        return -(-(self.window - 1) // block_size) + 1

    def blocks(self, num_tokens: int, block_size: int) -> int:
        """Blocks that a request of this length holds."""
        count = -(-num_tokens // block_size)
        most = self.most_blocks(block_size)
        return count if most is None else min(count, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """How a pool of equal pages serves the groups of a model.

    Attributes:
        block_size: tokens a block.
        groups: the groups, and
        pages_per_block: the pages that one block of each takes.
        page_bytes: bytes of a page, on one device.
    """

    block_size: int
    groups: tuple[KVGroup, ...]
    pages_per_block: tuple[int, ...]
    page_bytes: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds while no window is full, on one device."""
        return self.page_bytes * sum(self.pages_per_block) // self.block_size

    def group_pages(self, num_tokens: int) -> tuple[int, ...]:
        """Pages that a request of this length holds in each group."""
        return tuple(
            group.blocks(num_tokens, self.block_size) * pages
            for group, pages in zip(self.groups, self.pages_per_block, strict=True)
        )

    def pages(self, num_tokens: int) -> int:
        """Pages that a request of this length holds."""
        return sum(self.group_pages(num_tokens))


def page_layout(groups: Sequence[KVGroup], dtype: str, block_size: int, tp: int = 1) -> PageLayout:
    """The pages of a model: as large as possible, so that every group's block is whole pages.

    Raises:
        ConfigError: a dtype that K/V cannot have, or a block size below 1.
    """
    if dtype not in KV_DTYPE_BYTES:
        raise ConfigError(f"no --kv-dtype {dtype!r}: choose one of {', '.join(KV_DTYPE_BYTES)}")
    if block_size < 1:
        raise ConfigError(f"--block-size must be at least 1, not {block_size}")
    block_bytes = [group.bytes_per_token(dtype, tp) * block_size for group in groups]
    page_bytes = math.gcd(*block_bytes)
    return PageLayout(
        block_size=block_size,
        groups=tuple(groups),
        pages_per_block=tuple(size // page_bytes for size in block_bytes),
        page_bytes=page_bytes,
    )
