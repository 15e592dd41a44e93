"""Block tables: which sequence holds which blocks, in what order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pagelab.config import MemoryConfig
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.memory.allocators import Allocator, Demand, Paged, make_allocator
from pagelab.memory.block_pool import BlockPool
from pagelab.memory.placement import Anywhere, make_placement
from pagelab.memory.prefix_cache import BlockHash, PrefixCache, hash_block, root_hash
from pagelab.types import BlockId, SequenceId


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks.

    ::

        block_ids      ( 7      , 3      , 12     , 5      )
        slots          | written ··········| unwritten ····|
                       0            num_written       len · block_size
        hashes         [ h0     | h1     ]              (full blocks, with a prefix cache)
        writable                                           ┘

    `block_ids` is a tuple, replaced when a block is added or copied: while the table stays as it
    is (15 of 16 decode steps), everyone gets the same object and may compare by identity.

    Up to `writable`, `KVManager.hold` has nothing to do: the blocks are there, the allocator
    wants no more, and nobody else holds those that are still written to. 0: it must look.
    """

    block_ids: tuple[BlockId, ...] = ()
    num_written: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    writable: int = 0


class HolderWatcher(Protocol):
    """Told of every change of who holds which blocks."""

    def took(self, sequence_id: SequenceId, block_ids: Sequence[BlockId]) -> None:
        """A sequence holds these, too."""
        ...

    def gave(self, sequence_id: SequenceId, block_ids: Sequence[BlockId]) -> None:
        """A sequence holds these no longer."""
        ...

    def released(self, sequence_id: SequenceId, num_written: int) -> None:
        """A sequence holds nothing any more; so many of its slots were written."""
        ...


class KVManager:
    """Gives sequences their blocks, under one allocator.

    The life of a sequence here::

        admit (or fork) ──▶ hold ──▶ commit ──▶ hold ──▶ commit ──▶ … ──▶ release
        blocks for the       blocks for the      K/V of these            finish, or
        tokens it has        next step           tokens is there         preemption

    Raises (when constructed):
        ConfigError: an allocator or placement that does not exist.
        InsufficientMemoryError: the pool could not hold a single reservation.
    """

    def __init__(self, config: MemoryConfig, allocator: Allocator | None = None) -> None:
        self.config = config
        self.allocator = allocator if allocator is not None else make_allocator(config.allocator)
        contiguous = self.allocator.contiguous
        # Others that grow (examples/headroom_allocator.py) may want more before room is used up.
        self._room_is_enough = type(self.allocator) is Paged or not self.allocator.grows
        self.prefix_cache = PrefixCache() if config.prefix_caching and not contiguous else None
        self.pool = BlockPool(
            config.num_blocks,
            config.block_size,
            make_placement(config.placement, config.num_blocks)
            if contiguous
            else Anywhere(config.num_blocks),
            self.prefix_cache,
        )
        self._tables: dict[SequenceId, BlockTable] = {}
        self._copies: list[tuple[BlockId, BlockId]] = []
        self._root = root_hash()
        self._looked_up: tuple[Sequence[int], list[BlockHash]] = ((), [])
        self._num_table_blocks = 0  # of all tables, shared ones once a table
        self._num_written = 0  # slots of all tables, likewise
        self.watcher: HolderWatcher | None = None
        shortest = Demand(1, 1, 1, 1, config.max_model_len)
        if contiguous and not self.fits_ever(shortest):
            slots = config.num_blocks * config.block_size
            raise InsufficientMemoryError(
                f"{self.allocator.name} reserves {self.allocator.slots(shortest)} tokens for each "
                f"sequence (max_model_len = {config.max_model_len}), and the KV pool of {slots} "
                "slots has no range that long: raise --kv-memory or lower --max-model-len"
            )

    # What is held

    @property
    def num_sequences(self) -> int:
        """Sequences that hold blocks."""
        return len(self._tables)

    def tables(self) -> Iterator[tuple[SequenceId, BlockTable]]:
        """All block tables, in the order of admission. For reading only."""
        return iter(self._tables.items())

    def block_ids(self, sequence_id: SequenceId) -> tuple[BlockId, ...]:
        """A sequence's block table as of now: the same tuple object while it does not change."""
        return self._tables[sequence_id].block_ids

    def writable_block_ids(self, sequence_id: SequenceId, end: int) -> tuple[BlockId, ...] | None:
        """The block table, if K/V up to position `end` can be written without asking `hold`.

        None: ask `hold`. In 15 of 16 decode steps this is all that memory has to say, at a tenth
        of the price (0.1 µs; a `Demand` and `hold` cost 1).
        """
        table = self._tables[sequence_id]
        return table.block_ids if end <= table.writable else None

    def holds(self, sequence_id: SequenceId) -> bool:
        """Whether a sequence holds blocks."""
        return sequence_id in self._tables

    @property
    def num_table_slots(self) -> int:
        """Slots of all block tables; a shared block counts once for each table."""
        return self._num_table_blocks * self.config.block_size

    @property
    def num_written_slots(self) -> int:
        """Written slots of all sequences; a shared one counts once for each of them."""
        return self._num_written

    def fits_ever(self, demand: Demand) -> bool:
        """Whether such a sequence fits into the pool when it is empty."""
        return self._blocks(demand) <= self.pool.placement.largest_possible

    def blocks_to_admit(self, demand: Demand) -> int:
        """Blocks that a sequence would hold after its admission (hits included)."""
        return self._blocks(demand)

    # Admission

    def admit(
        self, sequence_id: SequenceId, demand: Demand, token_ids: Sequence[int]
    ) -> int | None:
        """Give a sequence its first blocks, those with its prefix in the cache first.

        At least one token is left to compute, since a token is sampled after it.

        Returns:
            Tokens whose K/V is in those blocks already; None (and nothing changed) if the
            blocks are not there, or would take the watermark's.
        """
        assert sequence_id not in self._tables, f"{sequence_id} is admitted twice"
        hashes = self._prefix_hashes(token_ids)
        hits = self.prefix_cache.find(hashes) if self.prefix_cache is not None else []
        new = self._blocks(demand) - len(hits)
        revived = sum(self.pool.ref_count(block_id) == 0 for block_id in hits)
        if not self._may_admit(new + revived):
            return None
        for block_id in hits:  # first, so that they are not evicted for the new ones
            self.pool.share(block_id)
        block_ids = self.pool.take(new)
        if block_ids is None:
            self.pool.release(hits)
            return None
        num_cached = len(hits) * self.config.block_size
        self._tables[sequence_id] = BlockTable((*hits, *block_ids), num_cached, hashes[: len(hits)])
        self._looked_up = ((), [])
        self._took(sequence_id, self._tables[sequence_id].block_ids)
        self._num_written += num_cached
        if self.prefix_cache is not None:
            self.prefix_cache.num_queried_tokens += len(token_ids)
            self.prefix_cache.num_hit_tokens += num_cached
        return num_cached

    def fork(
        self, parent_id: SequenceId, child_id: SequenceId, num_tokens: int, demand: Demand
    ) -> bool:
        """Let a new sequence share the parent's blocks of its first `num_tokens` tokens.

        The child's next write into a block that is shared copies that block first. Returns
        False (and nothing changed) if the blocks for that are not there.
        """
        assert child_id not in self._tables, f"{child_id} is admitted twice"
        parent = self._tables[parent_id]
        assert num_tokens <= parent.num_written, "a fork shares what is written"
        size = self.config.block_size
        shared = parent.block_ids[: -(-num_tokens // size)]
        copied = 1 if num_tokens % size else 0
        if not self._may_admit(self._blocks(demand) - len(shared) + copied):
            return False
        for block_id in shared:
            self.pool.share(block_id)
        full = num_tokens // size
        parent.writable = 0  # its last block may be shared from now on
        self._tables[child_id] = BlockTable(shared, num_tokens, parent.hashes[:full])
        self._took(child_id, shared)
        self._num_written += num_tokens
        held = self.hold(child_id, num_tokens, demand)
        assert held, "the blocks were there"
        return True

    # Steps

    def hold(self, sequence_id: SequenceId, start: int, demand: Demand) -> bool:
        """Make room for writing K/V from position `start` on, as the allocator says.

        Returns False (and nothing changed) if the blocks are not there.
        """
        table = self._tables[sequence_id]
        size = self.config.block_size
        missing = max(0, self._blocks(demand) - len(table.block_ids))
        index = start // size
        copy = index < len(table.block_ids) and self.pool.is_shared(table.block_ids[index])
        if missing or copy:
            taken = self.pool.take(missing + copy)
            if taken is None:
                return False
            self._took(sequence_id, taken)
            if copy:
                self._replace_by_copy(sequence_id, index, taken.pop(), start % size)
            table.block_ids += tuple(taken)
        if self._room_is_enough:
            table.writable = len(table.block_ids) * size
        return True

    def take_copies(self) -> tuple[tuple[BlockId, BlockId], ...]:
        """The copies (from, to) that the next step must make before it writes. Clears them."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def commit(self, sequence_id: SequenceId, num_computed: int, token_ids: Sequence[int]) -> None:
        """Say that the K/V of the first `num_computed` tokens is there, for good.

        Full blocks become findable by their content. Only what a collected step wrote and
        nobody threw away is committed, so nothing has to be taken back here.
        """
        table = self._tables[sequence_id]
        written = table.num_written
        assert num_computed >= written, f"{sequence_id}: committed tokens are taken back"
        size = self.config.block_size
        first = written // size
        table.num_written = num_computed
        self._num_written += num_computed - written
        if num_computed == written + 1:  # a token, as in most steps: 0.2 µs, a range costs 1
            filled = num_computed - first * size
            self.pool.set_written(table.block_ids[first], filled)
            if filled < size:
                return
        else:
            for i in range(first, -(-num_computed // size)):
                self.pool.set_written(table.block_ids[i], min(size, num_computed - i * size))
        if self.prefix_cache is not None:
            self._register_full_blocks(table, self.prefix_cache, token_ids)

    def release(self, sequence_id: SequenceId) -> int:
        """Give all blocks of a sequence back. Returns how many of their slots were written."""
        table = self._tables.pop(sequence_id)
        self._num_written -= table.num_written
        self._give_back(sequence_id, table.block_ids)
        if self.watcher is not None:
            self.watcher.released(sequence_id, table.num_written)
        return table.num_written

    def check_invariants(self) -> None:
        """Assert that block tables and pool agree."""
        self.pool.check_invariants()
        holders: dict[BlockId, int] = {}
        size = self.config.block_size
        for sequence_id, table in self._tables.items():
            assert len(set(table.block_ids)) == len(table.block_ids), (
                f"{sequence_id}: a block twice"
            )
            assert table.num_written <= len(table.block_ids) * size
            if self.prefix_cache is not None:
                assert len(table.hashes) == table.num_written // size
            if table.writable:
                assert table.writable == len(table.block_ids) * size
                for block_id in table.block_ids[table.num_written // size :]:
                    assert not self.pool.is_shared(block_id), f"{sequence_id} writes for others"
            for i, block_id in enumerate(table.block_ids):
                holders[block_id] = holders.get(block_id, 0) + 1
                expected = min(size, max(0, table.num_written - i * size))
                assert self.pool.written(block_id) >= expected
            if self.allocator.contiguous:
                first = table.block_ids[0]
                assert table.block_ids == tuple(range(first, first + len(table.block_ids)))
        for block_id, count in holders.items():
            assert self.pool.ref_count(block_id) == count
        assert len(holders) == self.pool.num_held
        assert sum(len(t.block_ids) for t in self._tables.values()) == self._num_table_blocks
        assert sum(t.num_written for t in self._tables.values()) == self._num_written

    def _blocks(self, demand: Demand) -> int:
        slots = self.allocator.slots(demand)
        if slots < demand.num_tokens:  # somebody's own class
            raise ConfigError(
                f"allocator {self.allocator.name}: slots({demand}) gave {slots}, fewer than the "
                f"{demand.num_tokens} tokens that must be held"
            )
        return -(-slots // self.config.block_size)

    def _may_admit(self, blocks: int) -> bool:
        """The watermark keeps blocks back for running sequences to grow into."""
        keep = 0
        if self.allocator.grows and self._tables:
            keep = int(self.config.watermark * self.config.num_blocks)
        return self.pool.num_allocatable - blocks >= keep

    def _prefix_hashes(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Hashes of the full blocks before the last token, which is always computed.

        The head of the queue asks at every step until it is admitted, so what was hashed for it
        is kept; its tokens only grow.
        """
        if self.prefix_cache is None:
            return []
        size, count = self.config.block_size, (len(token_ids) - 1) // self.config.block_size
        known, hashes = self._looked_up
        if known is not token_ids:
            hashes = []
            self._looked_up = (token_ids, hashes)
        parent = hashes[-1] if hashes else self._root
        for i in range(len(hashes), count):
            parent = hash_block(parent, token_ids[i * size : (i + 1) * size])
            hashes.append(parent)
        return hashes[:count]

    def _register_full_blocks(
        self, table: BlockTable, cache: PrefixCache, token_ids: Sequence[int]
    ) -> None:
        size = self.config.block_size
        for i in range(len(table.hashes), table.num_written // size):
            parent = table.hashes[-1] if table.hashes else self._root
            table.hashes.append(hash_block(parent, token_ids[i * size : (i + 1) * size]))
            if not cache.holds(table.block_ids[i]):
                cache.insert(table.hashes[-1], table.block_ids[i])

    def _took(self, sequence_id: SequenceId, block_ids: Sequence[BlockId]) -> None:
        self._num_table_blocks += len(block_ids)
        if self.watcher is not None:
            self.watcher.took(sequence_id, block_ids)

    def _give_back(self, sequence_id: SequenceId, block_ids: Sequence[BlockId]) -> None:
        self._num_table_blocks -= len(block_ids)
        self.pool.release(block_ids)
        if self.watcher is not None:
            self.watcher.gave(sequence_id, block_ids)

    def _replace_by_copy(
        self, sequence_id: SequenceId, index: int, copy: BlockId, num_written: int
    ) -> None:
        table = self._tables[sequence_id]
        original = table.block_ids[index]
        self._copies.append((original, copy))
        table.block_ids = (*table.block_ids[:index], copy, *table.block_ids[index + 1 :])
        self.pool.set_written(copy, num_written)
        self._give_back(sequence_id, [original])
