"""The state of every slot of the pool, at every step.

::

    pool = live + unwritten + cached + free + external
                  └ reserved + internal, once the allocation has ended

A slot is counted in exactly one state. Of the external ones, `rounding` says how many only the
placement rounded up (a buddy's share). `take_ledger` looks at the pool now; `LedgerRecorder`
keeps the series of a run and splits `unwritten` when each allocation ends, since only then it is
known which of its empty slots were going to be written. `LedgerMeter` gives the means of a run of
any length, split likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from pagelab.memory.kv_manager import KVManager
from pagelab.types import BlockId, SequenceId


class LedgerEntry(NamedTuple):
    """Slots by state at one moment. The first five add up to the pool."""

    live: int
    unwritten: int
    cached: int
    free: int
    external: int
    shared_saved: int  # slots that would be live too if no block were shared
    rounding: int  # of `external`: in no allocation, lost because a range was rounded up

    @property
    def pool(self) -> int:
        """All slots."""
        return self.live + self.unwritten + self.cached + self.free + self.external


def take_ledger(kv: KVManager, waiting_blocks: int | None) -> LedgerEntry:
    """Count the slots of the pool by state.

    Args:
        kv: whose pool.
        waiting_blocks: blocks that the request at the head of the queue needs for its
            admission; None when nothing waits.
    """
    size, pool = kv.config.block_size, kv.pool
    written = kv.num_written_slots
    rounding = pool.placement.num_rounding * size
    small = 0 if waiting_blocks is None else pool.placement.num_in_small_holes(waiting_blocks)
    return LedgerEntry(
        live=pool.num_live_slots,
        unwritten=kv.num_table_slots - written,
        cached=pool.num_cached * size,
        free=(pool.placement.num_free - small) * size,
        external=rounding + small * size,
        shared_saved=written - pool.num_live_slots,
        rounding=rounding,
    )


@dataclass(slots=True)
class LedgerColumns:
    """The ledger of a run, one entry a step; see `pagelab.results.Steps`."""

    live: list[int]
    reserved: list[int]
    internal: list[int]
    cached: list[int]
    free: list[int]
    external: list[int]
    shared_saved: list[int]
    rounding: list[int]


FREE, CACHED = -1, -2
"""Holders of a block in block events, besides request indices."""


def holder_events(
    step: int, before: Mapping[int, int], after: Mapping[int, int]
) -> Iterator[tuple[int, int, int]]:
    """What changed: (step, block, its holder now) for every block that has another one."""
    for block_id in before.keys() - after.keys():
        yield step, block_id, FREE
    for block_id, holder in after.items():
        if before.get(block_id) != holder:
            yield step, block_id, holder


class LedgerRecorder:
    """Records the ledger and the holders of blocks, step by step.

    Call `record` after each step and `finish` at the end. An allocation is followed from the
    first step that sees it to the first one that does not; its empty slots at a step are then
    `reserved` as far as they were written in the end, and `internal` beyond that::

        slots of one allocation   | written now | written later | never written |
                                      live          reserved         internal

    A step costs O(1), and O(blocks) for those that changed hands: with 256 sequences 0.1 ms, where
    going through all tables took 1.5. An open allocation needs only the steps at which it came
    to hold so many slots (see `LedgerMeter`); what of them it kept to be written is known at its
    end, and counted as two changes of a running sum for each.
    """

    def __init__(self, kv: KVManager, holder_of: Callable[[SequenceId], int]) -> None:
        """`holder_of` names a sequence in block events (say, the index of its request).

        A KV manager has one recorder, the latest, until `finish`.
        """
        self._kv = kv
        self._holder_of = holder_of
        self._entries: list[LedgerEntry] = []
        self._written: list[int] = []  # slots of all tables at each step
        # what slots of allocations that ended were written in the end: changes at each step
        self._kept: list[int] = [0]
        self._open: dict[SequenceId, list[tuple[int, int]]] = {}  # (since step, slots held)
        self._changed: dict[SequenceId, None] = {}  # hold other blocks than at the last step
        self._released: dict[SequenceId, int] = {}  # since the last step → slots written by then
        # of each held block its sequences, the first to take it first; and as the events have it
        self._sequences: dict[BlockId, dict[SequenceId, None]] = {}
        self._holders: dict[BlockId, int] = {}
        self._touched: set[BlockId] = set(kv.pool.cached_blocks())  # since the last step
        self.block_events: list[tuple[int, int, int]] = []  # (step, block, holder)
        for sequence_id, table in kv.tables():
            self.took(sequence_id, table.block_ids)
        kv.watcher = self

    def took(self, sequence_id: SequenceId, block_ids: Sequence[BlockId]) -> None:
        """The KV manager's word."""
        self._changed[sequence_id] = None
        self._touched.update(block_ids)
        for block_id in block_ids:
            self._sequences.setdefault(block_id, {})[sequence_id] = None

    def gave(self, sequence_id: SequenceId, block_ids: Sequence[BlockId]) -> None:
        """The KV manager's word."""
        self._touched.update(block_ids)
        for block_id in block_ids:
            sequences = self._sequences[block_id]
            del sequences[sequence_id]
            if not sequences:
                del self._sequences[block_id]

    def released(self, sequence_id: SequenceId, num_written: int) -> None:
        """The KV manager's word."""
        self._released[sequence_id] = num_written

    def record(self, waiting_blocks: int | None, released: Mapping[SequenceId, int]) -> LedgerEntry:
        """Record one step.

        Args:
            waiting_blocks: see `take_ledger`.
            released: sequences whose blocks were released since the last record (even if they
                have been admitted anew: a preemption ends an allocation), with the slots that
                were written by then.
        """
        step = len(self._entries)
        entry = take_ledger(self._kv, waiting_blocks)
        self._entries.append(entry)
        self._written.append(self._kv.num_written_slots)
        self._kept.append(0)
        for sequence_id, num_written in released.items():
            self._close(sequence_id, num_written, step)
        self._released.clear()
        for sequence_id in self._changed:
            if self._kv.holds(sequence_id):  # else it came and went within one step
                held = len(self._kv.block_ids(sequence_id)) * self._kv.config.block_size
                self._open.setdefault(sequence_id, []).append((step, held))
        self._changed.clear()
        self._record_holders(step)
        return entry

    def finish(self) -> LedgerColumns:
        """Close what is still open and return the columns."""
        if self._kv.watcher is self:
            self._kv.watcher = None
        for sequence_id, table in self._kv.tables():
            self._released.setdefault(sequence_id, table.num_written)
        for sequence_id, num_written in self._released.items():
            self._close(sequence_id, num_written, len(self._entries))
        entries = self._entries
        kept = accumulate(self._kept)
        reserved = [k - written for k, written in zip(kept, self._written, strict=False)]
        return LedgerColumns(
            live=[e.live for e in entries],
            reserved=reserved,
            internal=[e.unwritten - r for e, r in zip(entries, reserved, strict=True)],
            cached=[e.cached for e in entries],
            free=[e.free for e in entries],
            external=[e.external for e in entries],
            shared_saved=[e.shared_saved for e in entries],
            rounding=[e.rounding for e in entries],
        )

    def _close(self, sequence_id: SequenceId, finally_written: int, step: int) -> None:
        levels = self._open.pop(sequence_id, None)
        if levels is None:  # it came and went within one step
            return
        ends = [since for since, _ in levels[1:]] + [step]
        for (since, held), until in zip(levels, ends, strict=True):
            self._kept[since] += min(finally_written, held)
            self._kept[until] -= min(finally_written, held)

    def _record_holders(self, step: int) -> None:
        for block_id in sorted(self._touched):
            sequences = self._sequences.get(block_id)
            if sequences:
                holder = self._holder_of(next(iter(sequences)))  # shared: its first holder
            else:
                holder = CACHED if self._kv.pool.is_cached(block_id) else FREE
            if self._holders.get(block_id, FREE) != holder:
                self._holders[block_id] = holder
                self.block_events.append((step, block_id, holder))
        self._touched.clear()


class LedgerShares(NamedTuple):
    """Means of a run, as shares of the pool (0..1). The first six add up to 1.

    `rounding` is a part of `external`, and `shared_saved` no part of the sum.
    """

    live: float
    reserved: float
    internal: float
    cached: float
    free: float
    external: float
    rounding: float
    shared_saved: float


class LedgerMeter:
    """Weighted means of the ledger, in memory for the allocations that are open.

    The means are those of a `LedgerRecorder`'s columns, without the columns. An open allocation
    needs only the weight that had passed when it came to hold so many slots::

        slots held    32 ────────┐ 48 ───────────┐ 64 ─────── ends; 57 were written
        weight so far 10         14.5            21           30
        reserved      4.5 · min(32, 57) + 6.5 · min(48, 57) + 9 · min(64, 57) - (written · weight)

    and what was written, weighted, need not be kept for each allocation: only its sum counts.
    Costs O(1) a step, and O(sequences) in steps in which holders changed.
    """

    def __init__(self, kv: KVManager) -> None:
        self._kv = kv
        self._weight = 0.0
        self._sums = [0.0] * len(LedgerEntry._fields)  # of entries, weighted
        self._written = 0.0  # slots of all tables that were written, weighted
        self._kept = 0.0  # the min(…) terms above of closed allocations
        self._open: dict[SequenceId, list[tuple[float, int]]] = {}  # (weight so far, slots held)
        self._version = -1

    def record(
        self, waiting_blocks: int | None, released: Mapping[SequenceId, int], weight: float = 1.0
    ) -> LedgerEntry:
        """Record one step that counts `weight` (seconds, say; 0: only follow the allocations).

        The other arguments are those of `LedgerRecorder.record`.
        """
        kv = self._kv
        entry = take_ledger(kv, waiting_blocks)
        for sequence_id, num_written in released.items():
            self._close(sequence_id, num_written)
        if kv.pool.version != self._version:
            self._version = kv.pool.version
            self._follow()
        if weight:
            sums = self._sums
            for i, slots in enumerate(entry):
                sums[i] += weight * slots
            self._written += weight * kv.num_written_slots
            self._weight += weight
        return entry

    def finish(self) -> LedgerShares:
        """Close what is still open, as it is now, and return the means (zeros of nothing)."""
        for sequence_id, table in self._kv.tables():
            self._close(sequence_id, table.num_written)
        total = self._weight * self._kv.config.num_blocks * self._kv.config.block_size
        if not total:
            return LedgerShares(*[0.0] * len(LedgerShares._fields))
        mean = LedgerEntry._make(value / total for value in self._sums)
        reserved = (self._kept - self._written) / total
        return LedgerShares(
            live=mean.live,
            reserved=reserved,
            internal=mean.unwritten - reserved,
            cached=mean.cached,
            free=mean.free,
            external=mean.external,
            rounding=mean.rounding,
            shared_saved=mean.shared_saved,
        )

    def _follow(self) -> None:
        size, opened, weight = self._kv.config.block_size, self._open, self._weight
        for sequence_id, table in self._kv.tables():
            held = len(table.block_ids) * size
            levels = opened.get(sequence_id)
            if levels is None:
                opened[sequence_id] = [(weight, held)]
            elif levels[-1][1] != held:
                levels.append((weight, held))

    def _close(self, sequence_id: SequenceId, finally_written: int) -> None:
        levels = self._open.pop(sequence_id, None)
        if levels is None:  # it came and went within one step
            return
        ends = [since for since, _ in levels[1:]] + [self._weight]
        for (since, held), until in zip(levels, ends, strict=True):
            self._kept += (until - since) * min(finally_written, held)
