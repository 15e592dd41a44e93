"""Reads transformers' paged cache, in the two shapes that its versions gave it.

==================  ==========================  ==================================
                    groups (5.17)               sectors (5.23)
==================  ==========================  ==================================
tensors             a K and a V for each layer  one for everything
block tables        `group_cache_managers`      `cache_allocators`
blocks to reuse     `_block_manager`            the allocator's own ledger
padding             two blocks behind the last  two sectors before the first
==================  ==========================  ==================================
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import transformers

from pagelab.lab.protocol import MethodUnavailableError

PADDING_BLOCKS = 2  # never given out: padding tokens read and write there
_SECTOR_ALIGNMENT = 128  # bytes; a sector is a whole number of blocks and of these


class PagedCache(Protocol):
    """What can be read of a paged cache whose layers all have full attention."""

    num_blocks: int  # that requests can hold
    block_size: int
    tensor_bytes: int  # of its tensors, padding included
    shares_prefixes: bool

    def tables(self) -> Mapping[str, Sequence[int]]:
        """Request id → its blocks, in order; ids count from the cache's first block."""
        ...

    def cached_blocks(self) -> Collection[int]:
        """Blocks that no request holds and whose content is kept for reuse."""
        ...

    def first_block(self) -> int:
        """The least block id; ids of block events are counted from it."""
        ...


def blocks_in_budget(budget: int, bytes_per_block: int) -> int:
    """Blocks to ask for, so that all tensors, padding included, stay within `budget` bytes."""
    sector = math.lcm(bytes_per_block, _SECTOR_ALIGNMENT)
    return max(0, budget // sector - PADDING_BLOCKS) * (sector // bytes_per_block)


def read_paged_cache(cache: Any) -> PagedCache:
    """A reader for the cache of this version.

    Raises:
        MethodUnavailableError: it is of a shape that is not known, or has sliding windows.
    """
    try:
        return _Sectors(cache) if hasattr(cache, "cache_allocators") else _Groups(cache)
    except AttributeError as error:
        raise MethodUnavailableError(
            f"the paged cache of transformers {transformers.__version__} cannot be read "
            f"({error}): install transformers 5.17 to 5.23"
        ) from error


def _only(groups: Collection[Any], full: bool) -> Any:
    if len(groups) != 1 or not full:
        raise MethodUnavailableError(
            "the model has sliding-window layers, whose blocks transformers counts in another "
            "size: take a --model with full attention, or leave this method out of --methods"
        )
    return next(iter(groups))


class _Sectors:
    def __init__(self, cache: Any) -> None:
        allocators = cache.cache_allocators
        full = all(kind == "full_attention" for kind in allocators)
        self._allocator = _only(allocators.values(), full)
        self._reserved = cache.pool.num_reserved_sectors
        self.num_blocks: int = self._allocator.num_blocks
        self.block_size: int = self._allocator.tokens_per_page
        self.tensor_bytes: int = cache.cache_tensor.nbytes
        self.shares_prefixes: bool = cache.use_prefix_sharing
        self.cached_blocks()

    def tables(self) -> Mapping[str, Sequence[int]]:
        tables: dict[str, list[int]] = self._allocator.block_table
        return tables

    def cached_blocks(self) -> Collection[int]:
        blocks: dict[int, None] = self._allocator.ledger.cached_blocks
        return blocks.keys()

    def first_block(self) -> int:
        return int(self._reserved * self._allocator.blocks_per_sector)


class _Groups:
    def __init__(self, cache: Any) -> None:
        self._manager = _only(cache.group_cache_managers, cache.num_full_attention_groups == 1)
        self._blocks = cache._block_manager
        self.num_blocks: int = cache.num_blocks
        self.block_size: int = cache.block_size
        self.tensor_bytes: int = sum(t.nbytes for t in [*cache.key_cache, *cache.value_cache])
        self.shares_prefixes: bool = cache.use_prefix_sharing
        self.cached_blocks()

    def tables(self) -> Mapping[str, Sequence[int]]:
        tables: dict[str, list[int]] = self._manager.block_table
        return tables

    def cached_blocks(self) -> Collection[int]:
        blocks: dict[int, None] = self._blocks._init_block_ids
        return blocks.keys()

    def first_block(self) -> int:
        return 0
