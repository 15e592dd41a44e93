"""Block tables: which sequence holds which blocks, in what order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pagelab.config import MemoryConfig
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.memory.allocators import Allocator, Demand, make_allocator
from pagelab.memory.block_pool import BlockPool
from pagelab.memory.placement import Anywhere, make_placement
from pagelab.memory.prefix_cache import BlockHash, PrefixCache, hash_block, root_hash
from pagelab.types import BlockId, SequenceId


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks.

    ::

        block_ids      [ 7      | 3      | 12     | 5      ]
        slots          | written ··········| unwritten ····|
                       0            num_written       len · block_size
        hashes         [ h0     | h1     ]                       (full blocks, as far as known)
    """

    block_ids: list[BlockId] = field(default_factory=list)
    num_written: int = 0
    hashes: list[BlockHash] = field(default_factory=list)


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
        """A sequence's block table as of now."""
        return tuple(self._tables[sequence_id].block_ids)

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
        self._tables[sequence_id] = BlockTable(hits + block_ids, num_cached, hashes[: len(hits)])
        self._looked_up = ((), [])
        self._num_table_blocks += len(hits) + len(block_ids)
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
        self._tables[child_id] = BlockTable(list(shared), num_tokens, parent.hashes[:full])
        self._num_table_blocks += len(shared)
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
        missing = self._blocks(demand) - len(table.block_ids)
        index = start // self.config.block_size
        copy = index < len(table.block_ids) and self.pool.is_shared(table.block_ids[index])
        if missing <= 0 and not copy:
            return True
        taken = self.pool.take(max(missing, 0) + copy)
        if taken is None:
            return False
        if copy:
            self._replace_by_copy(table, index, taken.pop(), start % self.config.block_size)
        table.block_ids += taken
        self._num_table_blocks += len(taken)
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
        assert num_computed >= table.num_written, f"{sequence_id}: committed tokens are taken back"
        size = self.config.block_size
        written = table.num_written
        if num_computed == written + 1:  # a token, as in most steps
            self.pool.set_written(table.block_ids[written // size], written % size + 1)
        else:
            for i in range(written // size, -(-num_computed // size)):
                self.pool.set_written(table.block_ids[i], min(size, num_computed - i * size))
        self._num_written += num_computed - written
        table.num_written = num_computed
        if self.prefix_cache is not None:
            self._register_full_blocks(table, self.prefix_cache, token_ids)

    def release(self, sequence_id: SequenceId) -> int:
        """Give all blocks of a sequence back. Returns how many of their slots were written."""
        table = self._tables.pop(sequence_id)
        self._num_table_blocks -= len(table.block_ids)
        self._num_written -= table.num_written
        self.pool.release(table.block_ids)
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
            for i, block_id in enumerate(table.block_ids):
                holders[block_id] = holders.get(block_id, 0) + 1
                expected = min(size, max(0, table.num_written - i * size))
                assert self.pool.written(block_id) >= expected
            if self.allocator.contiguous:
                first = table.block_ids[0]
                assert table.block_ids == list(range(first, first + len(table.block_ids)))
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

    def _replace_by_copy(
        self, table: BlockTable, index: int, copy: BlockId, num_written: int
    ) -> None:
        original = table.block_ids[index]
        self._copies.append((original, copy))
        table.block_ids[index] = copy
        self.pool.set_written(copy, num_written)
        self.pool.release([original])
