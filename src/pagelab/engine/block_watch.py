"""Who holds which blocks, told as changes a few times a second, for the page map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

from pagelab.engine.core import EngineCore
from pagelab.engine.messages import BlockFacts, BlockNews, RequestRow, StepStats
from pagelab.memory.ledger import CACHED, FREE
from pagelab.scheduling.sequence import Sequence
from pagelab.types import BlockId, SequenceId

MOST_ROWS = 400
"""Sequences that a list names; more of them wait unnamed."""

_MOST_HOLDERS = 10
_FREE = (FREE, 0, 0)


class BlockWatch:
    """Follows the KV manager while somebody looks.

    Between two looks it only notes which blocks changed hands (0.2 µs a change). A look costs
    O(blocks that changed + running sequences), a few times a second
    (`benchmarks/page_map_cost.py`).
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._changes: list[tuple[bool, SequenceId, tuple[BlockId, ...]]] = []  # since a look
        self._numbers: dict[str, int] = {}  # request id → its number as a holder
        self._next = itertools.count()
        self._first: dict[BlockId, SequenceId] = {}  # held block → who took it first
        self._others: dict[BlockId, list[SequenceId]] = {}  # and who shares it
        self._touched: set[BlockId] = set(core.kv.pool.cached_blocks())
        self._told: dict[BlockId, tuple[int, int, int]] = {}
        self._told_tables: dict[SequenceId, int] = {}  # how many of its blocks a row has named
        self._seen: dict[SequenceId, int] = {}  # running → tokens computed at the last look
        self._everything = True
        for sequence_id, table in core.kv.tables():
            self.took(sequence_id, table.block_ids)
        core.kv.watcher = self

    def close(self) -> None:
        """Stop following."""
        if self._core.kv.watcher is self:
            self._core.kv.watcher = None

    def took(self, sequence_id: SequenceId, block_ids: SequenceOf[BlockId]) -> None:
        """The KV manager's word. (A copy: the KV manager changes its list.)"""
        self._changes.append((True, sequence_id, tuple(block_ids)))

    def gave(self, sequence_id: SequenceId, block_ids: SequenceOf[BlockId]) -> None:
        """The KV manager's word."""
        self._changes.append((False, sequence_id, tuple(block_ids)))

    @property
    def changed(self) -> bool:
        """Whether blocks changed hands since the last look."""
        return self._everything or bool(self._changes)

    def released(self, sequence_id: SequenceId, num_written: int) -> None:
        """The KV manager's word."""

    def look(self, stats: StepStats) -> BlockNews:
        """What changed since the last look; the first one tells everything."""
        scheduler, pool = self._core.scheduler, self._core.kv.pool
        running = tuple(scheduler.running)
        self._take_changes()
        seen, self._seen = self._seen, {}
        for sequence in running:  # their blocks fill up without changing hands
            computed = self._seen[sequence.id] = sequence.num_computed
            first = min(seen.get(sequence.id, 0), computed) // pool.block_size
            block_ids = self._core.kv.block_ids(sequence.id)
            self._touched.update(block_ids[first : -(-computed // pool.block_size)])
        blocks = []
        told, holder, refs, written = self._told, self._holder, pool.ref_count, pool.written
        for block_id in self._touched:
            now = (holder(block_id), refs(block_id), written(block_id))
            if told.get(block_id, _FREE) != now:
                told[block_id] = now
                blocks.append((block_id, *now))
        self._touched.clear()
        listed = (*running, *scheduler.waiting[: max(0, MOST_ROWS - len(running))])[:MOST_ROWS]
        rows = tuple(self._row(sequence) for sequence in listed)
        everything, self._everything = self._everything, False
        unlisted = len(running) + len(scheduler.waiting) - len(listed)
        self._forget(rows)
        return BlockNews(everything, tuple(blocks), rows, unlisted, stats)

    def _take_changes(self) -> None:
        """Work off what the KV manager said, in its order."""
        changes, self._changes = self._changes, []
        first, touched = self._first, self._touched
        for took, sequence_id, block_ids in changes:
            touched.update(block_ids)
            if took:
                for block_id in block_ids:
                    if first.setdefault(block_id, sequence_id) is not sequence_id:
                        self._others.setdefault(block_id, []).append(sequence_id)
                continue
            self._told_tables.pop(sequence_id, None)  # not the old table with more at its end
            for block_id in block_ids:
                others = self._others.get(block_id)
                if first[block_id] != sequence_id:
                    assert others is not None
                    others.remove(sequence_id)
                elif others:
                    first[block_id] = others.pop(0)
                else:
                    del first[block_id]
                if others is not None and not others:
                    del self._others[block_id]

    def _holder(self, block_id: BlockId) -> int:
        first = self._first.get(block_id)
        if first is not None:
            return self._number(first.request_id)
        return CACHED if self._core.kv.pool.is_cached(block_id) else FREE

    def _number(self, request_id: str) -> int:
        number = self._numbers.get(request_id)
        if number is None:
            number = self._numbers[request_id] = next(self._next)
        return number

    def _forget(self, rows: SequenceOf[RequestRow]) -> None:
        """Requests that have ended need no number; looked for only when many are kept."""
        if len(self._told_tables) > 2 * len(rows):
            listed = {(row.request_id, row.sample) for row in rows}
            self._told_tables = {k: v for k, v in self._told_tables.items() if k in listed}
        if len(self._numbers) > 4 * MOST_ROWS:
            kept = {row.request_id for row in rows}
            kept.update(sequence_id.request_id for sequence_id in self._first.values())
            self._numbers = {k: v for k, v in self._numbers.items() if k in kept}

    def _row(self, sequence: Sequence) -> RequestRow:
        request, kv = sequence.request, self._core.kv
        table = kv.block_ids(sequence.id) if kv.holds(sequence.id) else ()
        kept = min(self._told_tables.get(sequence.id, 0), len(table))
        self._told_tables[sequence.id] = len(table)
        return RequestRow(
            self._number(request.id),
            request.id,
            sequence.id.sample,
            sequence.status.name.lower(),
            sequence.num_prompt_tokens,
            sequence.num_output_tokens,
            request.max_output_tokens,
            sequence.num_computed,
            request.metrics.num_cached_tokens,
            request.metrics.num_preemptions,
            request.metrics.arrival_time,
            kept,
            table[kept:],
        )


def describe_block(core: EngineCore, block_id: int) -> BlockFacts | None:
    """Everything about one block now; None where there is no such block. Costs O(tables)."""
    pool = core.kv.pool
    if not 0 <= block_id < pool.num_blocks:
        return None
    block = BlockId(block_id)
    holders: list[SequenceId] = []
    position, token_ids = None, tuple[int, ...]()
    sequences = {s.id: s for s in core.scheduler.running}
    for sequence_id, table in core.kv.tables():
        if block not in table.block_ids:
            continue
        holders.append(sequence_id)
        sequence = sequences.get(sequence_id)
        if position is None and sequence is not None:
            position = table.block_ids.index(block) * pool.block_size
            token_ids = tuple(sequence.token_ids[position : position + pool.written(block)])
    cache = core.kv.prefix_cache
    digest = None if cache is None else cache.hash_of(block)
    return BlockFacts(
        block_id,
        pool.ref_count(block),
        pool.written(block),
        None if digest is None else digest.hex(),
        tuple((str(s.request_id), s.sample) for s in holders[:_MOST_HOLDERS]),
        position,
        token_ids,
    )
