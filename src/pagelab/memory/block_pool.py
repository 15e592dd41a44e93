"""The blocks of the KV pool: how many hold each, and how much of each is written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pagelab.memory.placement import Anywhere, Placement
from pagelab.memory.prefix_cache import PrefixCache
from pagelab.types import BlockId


class BlockPool:
    """Takes, shares and releases blocks.

    A block is in one of three states::

              take                    release, last holder
        free ──────▶ held (ref ≥ 1) ──────────────────────▶ free     content unknown
         ▲              ▲   │
         │ evict        │   └─────────────────────────────▶ cached   content findable
         └── cached ◀───┘ share (a prefix hit)

    Cached blocks are evicted least recently used first, and only when no free block is left;
    of one sequence the last blocks go first, since a prefix is useless without its beginning.

    Every operation costs O(1) a block (for ranges, what the placement costs).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        placement: Placement | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.placement = placement if placement is not None else Anywhere(num_blocks)
        self.prefix_cache = prefix_cache
        self._ref_counts = [0] * num_blocks
        self._written = [0] * num_blocks  # slots of each block that hold K/V
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._num_live_slots = 0
        self.version = 0  # counts changes of holders, so that observers can skip quiet steps

    @property
    def num_cached(self) -> int:
        """Blocks that no one holds and whose content can be reused."""
        return len(self._cached)

    def is_cached(self, block_id: BlockId) -> bool:
        """Whether no one holds this block and its content can be reused."""
        return block_id in self._cached

    def cached_blocks(self) -> tuple[BlockId, ...]:
        """The cached blocks, the next to be evicted first."""
        return tuple(self._cached)

    @property
    def num_allocatable(self) -> int:
        """Blocks that could be taken now: free and cached ones."""
        return self.placement.num_free + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with at least one holder."""
        return self.num_blocks - self.num_allocatable - self.placement.num_rounding

    @property
    def num_live_slots(self) -> int:
        """Written slots in held blocks, each counted once."""
        return self._num_live_slots

    def ref_count(self, block_id: BlockId) -> int:
        """How many sequences hold this block."""
        return self._ref_counts[block_id]

    def written(self, block_id: BlockId) -> int:
        """How many slots of this block hold K/V."""
        return self._written[block_id]

    def is_shared(self, block_id: BlockId) -> bool:
        """Whether a write into this block would be seen by someone else."""
        if self._ref_counts[block_id] > 1:
            return True
        return self.prefix_cache is not None and self.prefix_cache.holds(block_id)

    def take(self, count: int) -> list[BlockId] | None:
        """Take blocks for one holder, evicting cached ones where needed; None if too few."""
        if count == 0:
            return []
        missing = count - self.placement.num_free
        if missing > len(self._cached):
            return None
        for _ in range(missing):
            self._evict()
        block_ids = self.placement.take(count)
        if block_ids is None:
            return None
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        self.version += 1
        return block_ids

    def share(self, block_id: BlockId) -> None:
        """Add a holder: to a held block (a fork, a hit), or to a cached one (a hit)."""
        if self._ref_counts[block_id] == 0:
            del self._cached[block_id]
            self._num_live_slots += self._written[block_id]
        self._ref_counts[block_id] += 1
        self.version += 1

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Drop one holder of each of a sequence's blocks, given in the order of its table."""
        freed: list[BlockId] = []
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._num_live_slots -= self._written[block_id]
                if self.prefix_cache is not None and self.prefix_cache.holds(block_id):
                    self._cached[block_id] = None
                else:
                    self._written[block_id] = 0
                    freed.append(block_id)
        if freed:
            self.placement.give_back(freed[::-1])
        self.version += 1

    def drop_cached(self) -> None:
        """Make free blocks of all cached ones: their content is not found any more."""
        while self._cached:
            self._evict()
        self.version += 1

    def set_written(self, block_id: BlockId, count: int) -> None:
        """Say that the first `count` slots of a held block hold K/V."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is written and nobody holds it"
        self._num_live_slots += count - self._written[block_id]
        self._written[block_id] = count

    def check_invariants(self) -> None:
        """Assert what must hold between any two operations."""
        held = [b for b in range(self.num_blocks) if self._ref_counts[b] > 0]
        assert len(held) == self.num_held
        assert self._num_live_slots == sum(self._written[b] for b in held)
        assert all(0 <= written <= self.block_size for written in self._written)
        for block_id in self._cached:
            assert self._ref_counts[block_id] == 0
            assert self._written[block_id] == self.block_size
            assert self.prefix_cache is not None
            assert self.prefix_cache.holds(block_id)
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()

    def _evict(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        assert self.prefix_cache is not None
        self.prefix_cache.forget(block_id)
        self._written[block_id] = 0
        self.placement.give_back([block_id])
