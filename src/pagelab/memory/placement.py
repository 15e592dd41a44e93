"""Where blocks are taken from: anywhere (paging), or as ranges of consecutive ids.

A contiguous reservation is a block table whose ids are consecutive; the placements below are
the classic ways to find room for one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

from pagelab.errors import ConfigError
from pagelab.types import BlockId


class Placement(Protocol):
    """Keeps the free blocks, and decides which of them a request gets."""

    @property
    def num_free(self) -> int:
        """Blocks in no allocation and not lost to rounding."""
        ...

    @property
    def num_rounding(self) -> int:
        """Blocks in no allocation that cannot be taken: the placement rounded a range up."""
        ...

    def take(self, count: int) -> list[BlockId] | None:
        """Take blocks, or None (and change nothing) when there is no room for them."""
        ...

    def give_back(self, block_ids: Sequence[BlockId]) -> None:
        """Return blocks in the order they were taken: for ranges, exactly one that was taken."""
        ...

    def num_in_small_holes(self, count: int) -> int:
        """Free blocks in holes that are too small for a request of this many blocks."""
        ...

    @property
    def largest_possible(self) -> int:
        """Blocks that one request could take from an empty pool."""
        ...


class Anywhere:
    """Any free block serves any request: there are no holes. O(1) a block, last in first out."""

    num_rounding = 0

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._free = [BlockId(i) for i in reversed(range(num_blocks))]  # pops 0, 1, 2, …

    @property
    def num_free(self) -> int:
        """Blocks in no allocation."""
        return len(self._free)

    @property
    def largest_possible(self) -> int:
        """The whole pool."""
        return self._num_blocks

    def take(self, count: int) -> list[BlockId] | None:
        """Take the most recently returned blocks."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, block_ids: Sequence[BlockId]) -> None:
        """Return blocks, given in the order of their table; they are taken again in it."""
        self._free.extend(reversed(block_ids))

    def num_in_small_holes(self, count: int) -> int:
        """Always 0: one block is as good as another."""
        return 0


class FirstFit:
    """Ranges of consecutive blocks, each at the lowest address where it fits.

    ::

        pool   [####....##..........####]    # taken, . free
        holes       (4,4)  (10,10)           (start, length), neighbours merged
    """

    num_rounding = 0

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._holes: list[tuple[int, int]] = [(0, num_blocks)]  # by start
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks in no allocation."""
        return self._num_free

    @property
    def largest_possible(self) -> int:
        """The whole pool."""
        return self._num_blocks

    def take(self, count: int) -> list[BlockId] | None:
        """Take the first `count` blocks of the first hole that is large enough."""
        for i, (start, length) in enumerate(self._holes):
            if length >= count:
                if length == count:
                    del self._holes[i]
                else:
                    self._holes[i] = (start + count, length - count)
                self._num_free -= count
                return [BlockId(b) for b in range(start, start + count)]
        return None

    def give_back(self, block_ids: Sequence[BlockId]) -> None:
        """Return one range, merging it with the holes beside it."""
        start, length = _as_range(block_ids)
        self._num_free += length
        i = bisect_left(self._holes, (start, 0))
        if i < len(self._holes) and self._holes[i][0] == start + length:
            length += self._holes.pop(i)[1]
        if i > 0 and sum(self._holes[i - 1]) == start:
            before = self._holes.pop(i - 1)
            start, length = before[0], before[1] + length
        insort(self._holes, (start, length))

    def num_in_small_holes(self, count: int) -> int:
        """Free blocks in holes shorter than `count`."""
        return sum(length for _, length in self._holes if length < count)


class Buddy:
    """Ranges in chunks of a power of two, split and merged in pairs (Knowlton 1965).

    A pool that is no power of two starts as several chunks, largest first, each aligned to its
    own size. A request for n blocks takes a chunk of the next power of two; the blocks beyond n
    are lost to rounding until it is returned::

        take(5):  [ n n n n n . . . ]     5 in the allocation, 3 rounding
    """

    def __init__(self, num_blocks: int) -> None:
        self._free: dict[int, list[int]] = {}  # order → sorted starts of free chunks
        self._home: dict[int, int] = {}  # start → order of the chunks of the empty pool
        self._taken: dict[int, tuple[int, int]] = {}  # start → (order, blocks asked for)
        start = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._home[start] = order
                self._free.setdefault(order, []).append(start)
                start += 1 << order
        self._largest_order = num_blocks.bit_length() - 1
        self._num_free = num_blocks
        self._num_rounding = 0

    @property
    def num_free(self) -> int:
        """Blocks in free chunks."""
        return self._num_free

    @property
    def num_rounding(self) -> int:
        """Blocks of taken chunks that no request holds."""
        return self._num_rounding

    @property
    def largest_possible(self) -> int:
        """The largest chunk of the empty pool."""
        return 1 << self._largest_order

    def take(self, count: int) -> list[BlockId] | None:
        """Take the lowest chunk of the smallest order that is large enough, splitting it."""
        want = (count - 1).bit_length()
        order = next((o for o in range(want, self._largest_order + 1) if self._free.get(o)), None)
        if order is None:
            return None
        start = self._free[order].pop(0)
        while order > want:  # keep the lower half, free the upper one
            order -= 1
            insort(self._free.setdefault(order, []), start + (1 << order))
        self._taken[start] = (want, count)
        self._num_free -= 1 << want
        self._num_rounding += (1 << want) - count
        return [BlockId(b) for b in range(start, start + count)]

    def give_back(self, block_ids: Sequence[BlockId]) -> None:
        """Return one range, merging its chunk with its buddy as long as that is free."""
        start, length = _as_range(block_ids)
        order, count = self._taken.pop(start)
        assert length == count, f"a range of {count} blocks came back as {length}"
        self._num_free += 1 << order
        self._num_rounding -= (1 << order) - count
        while self._home.get(start) != order:
            buddy = start ^ (1 << order)
            if buddy not in self._free.get(order, []):
                break
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        insort(self._free.setdefault(order, []), start)

    def num_in_small_holes(self, count: int) -> int:
        """Free blocks in chunks smaller than the one that `count` blocks would take."""
        want = (count - 1).bit_length()
        return sum(len(starts) << order for order, starts in self._free.items() if order < want)


PLACEMENTS: dict[str, type[Buddy] | type[FirstFit]] = {"buddy": Buddy, "first-fit": FirstFit}


def make_placement(name: str, num_blocks: int) -> Placement:
    """A placement of contiguous ranges by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PLACEMENTS:
        raise ConfigError(f"no placement {name!r}: choose one of {', '.join(PLACEMENTS)}")
    return PLACEMENTS[name](num_blocks)


def _as_range(block_ids: Sequence[BlockId]) -> tuple[int, int]:
    start = block_ids[0]
    assert list(block_ids) == list(range(start, start + len(block_ids))), "not a range of blocks"
    return start, len(block_ids)
