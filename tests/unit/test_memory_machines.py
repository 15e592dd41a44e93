"""Random operations on the memory core, beside models so simple that they must be right."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pagelab.config import MemoryConfig
from pagelab.memory.allocators import ALLOCATORS, Demand
from pagelab.memory.block_pool import BlockPool
from pagelab.memory.kv_manager import KVManager
from pagelab.memory.ledger import take_ledger
from pagelab.memory.placement import Anywhere, Buddy, FirstFit, Placement
from pagelab.memory.prefix_cache import BlockHash, PrefixCache
from pagelab.types import BlockId, RequestId, SequenceId

MACHINE = settings(max_examples=60, stateful_step_count=40, deadline=None)


class PlacementMachine(RuleBasedStateMachine):
    """Each placement against a row of free/taken cells."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[list[BlockId]] = []

    @initialize(kind=st.sampled_from([Anywhere, FirstFit, Buddy]), size=st.integers(1, 70))
    def start(self, kind: type[Anywhere] | type[FirstFit] | type[Buddy], size: int) -> None:
        self.kind = kind
        self.size = size
        self.placement: Placement = kind(size)
        self.cells: list[int | None] = [None] * size

    @rule(count=st.integers(1, 40))
    def take(self, count: int) -> None:
        fits = self._fits(count)
        got = self.placement.take(count)
        assert (got is not None) == fits
        if got is None:
            return
        assert len(got) == count
        assert all(self.cells[b] is None for b in got), "a block was given out twice"
        if self.kind is not Anywhere:
            assert got == list(range(got[0], got[0] + count))
        if self.kind is FirstFit:
            assert got[0] == min(s for s, n in self._holes() if n >= count)
        owner = len(self.ranges)
        self.ranges.append(got)
        for block in got:
            self.cells[block] = owner
        if self.kind is Buddy:
            chunk = 1 << (count - 1).bit_length()
            for rounded in range(got[0] + count, got[0] + chunk):
                assert self.cells[rounded] is None
                self.cells[rounded] = -1 - owner

    @precondition(lambda self: self.ranges)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        live = [i for i, r in enumerate(self.ranges) if r]
        if not live:
            return
        i = data.draw(st.sampled_from(live))
        self.placement.give_back(self.ranges[i])
        self.ranges[i] = []
        self.cells = [None if c in (i, -1 - i) else c for c in self.cells]

    @invariant()
    def counts(self) -> None:
        assert self.placement.num_free == self.cells.count(None)
        rounding = sum(c is not None and c < 0 for c in self.cells)
        assert self.placement.num_rounding == rounding

    @invariant()
    def small_holes(self) -> None:
        for count in (1, 3, 8):
            small = self.placement.num_in_small_holes(count)
            if self.kind is FirstFit:
                assert small == sum(n for _, n in self._holes() if n < count)
            assert 0 <= small <= self.placement.num_free
            if not self._fits(count) and self.kind is not Anywhere:
                assert small == self.placement.num_free

    def _holes(self) -> list[tuple[int, int]]:
        holes: list[tuple[int, int]] = []
        for i, cell in enumerate(self.cells):
            if cell is None:
                if holes and sum(holes[-1]) == i:
                    holes[-1] = (holes[-1][0], holes[-1][1] + 1)
                else:
                    holes.append((i, 1))
        return holes

    def _fits(self, count: int) -> bool:
        if self.kind is Anywhere:
            return self.cells.count(None) >= count
        if self.kind is FirstFit:
            return any(n >= count for _, n in self._holes())
        chunk = 1 << (count - 1).bit_length()  # an aligned, wholly free chunk of the buddy system
        starts: list[int] = []
        base = 0
        for order in reversed(range(self.size.bit_length())):
            if self.size >> order & 1:
                starts += range(base, base + (1 << order), chunk) if chunk <= 1 << order else []
                base += 1 << order
        return any(all(c is None for c in self.cells[s : s + chunk]) for s in starts)


class BlockPoolMachine(RuleBasedStateMachine):
    """Reference counts, written slots and LRU reuse against dictionaries."""

    SIZE = 4

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.cache = PrefixCache()
        self.pool = BlockPool(num_blocks, self.SIZE, prefix_cache=self.cache)
        self.num_blocks = num_blocks
        self.refs: dict[BlockId, int] = {}
        self.written: dict[BlockId, int] = {}
        self.cached: OrderedDict[BlockId, None] = OrderedDict()
        self.content: dict[BlockId, BlockHash] = {}
        self.counter = 0

    @rule(count=st.integers(0, 5))
    def take(self, count: int) -> None:
        free = self.num_blocks - len(self.refs) - len(self.cached)
        got = self.pool.take(count)
        if count > free + len(self.cached):
            assert got is None
            return
        assert got is not None
        assert len(set(got)) == count
        for _ in range(max(0, count - free)):  # least recently used first
            evicted, _ = self.cached.popitem(last=False)
            assert evicted in got
            del self.content[evicted]
        for block in got:
            assert block not in self.refs
            assert block not in self.cached
            self.refs[block] = 1
            self.written[block] = 0

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.refs)), unique=True, max_size=4))
        self.pool.release(chosen)
        for block in reversed(chosen):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                del self.refs[block]
                if block in self.content:
                    self.cached[block] = None
                else:
                    del self.written[block]

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), count=st.integers(0, SIZE))
    def write(self, data: st.DataObject, count: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.refs)))
        if block in self.content:
            return
        self.pool.set_written(block, count)
        self.written[block] = count
        if count == self.SIZE:
            self.counter += 1
            self.content[block] = BlockHash(self.counter.to_bytes(4, "little"))
            self.cache.insert(self.content[block], block)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content)))
        assert self.cache.find([self.content[block]]) == [block]
        self.pool.share(block)
        self.cached.pop(block, None)
        self.refs[block] = self.refs.get(block, 0) + 1

    @invariant()
    def agrees(self) -> None:
        self.pool.check_invariants()
        assert self.pool.num_held == len(self.refs)
        assert self.pool.cached_blocks() == tuple(self.cached)
        assert self.pool.num_live_slots == sum(self.written[b] for b in self.refs)
        for block, count in self.refs.items():
            assert self.pool.ref_count(block) == count
            assert self.pool.is_shared(block) == (count > 1 or block in self.content)


class KVManagerMachine(RuleBasedStateMachine):
    """Admissions, forks, growth and releases; content is checked against what was written."""

    SIZE = 4

    @initialize(
        num_blocks=st.integers(8, 24),
        allocator=st.sampled_from(list(ALLOCATORS)),
        placement=st.sampled_from(["buddy", "first-fit"]),
        prefix=st.booleans(),
    )
    def start(self, num_blocks: int, allocator: str, placement: str, prefix: bool) -> None:
        self.config = MemoryConfig(
            num_blocks=num_blocks,
            block_size=self.SIZE,
            max_model_len=32,
            allocator=allocator,
            placement=placement,
            prefix_caching=prefix,
            watermark=0.0,
        )
        self.kv = KVManager(self.config)
        self.tokens: dict[SequenceId, list[int]] = {}
        self.computed: dict[SequenceId, int] = {}
        self.slots: dict[int, tuple[int, ...]] = {}  # slot → the tokens up to its own
        self.ends: dict[SequenceId, tuple[int, int, int]] = {}  # prompt, final, most
        self.next_id = 0

    def _demand(self, sequence: SequenceId, num_tokens: int) -> Demand:
        prompt, final, most = self.ends[sequence]
        return Demand(prompt, num_tokens, final, most, 32)

    def _new_id(self) -> SequenceId:
        self.next_id += 1
        return SequenceId(RequestId(str(self.next_id)), 0)

    def _slot(self, sequence: SequenceId, position: int) -> int:
        return self.kv.block_ids(sequence)[position // self.SIZE] * self.SIZE + position % self.SIZE

    def _apply_copies(self) -> None:
        for source, target in self.kv.take_copies():
            for offset in range(self.SIZE):
                content = self.slots.get(source * self.SIZE + offset)
                if content is not None:
                    self.slots[target * self.SIZE + offset] = content

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), ends=st.data())
    def admit(self, prompt: list[int], ends: st.DataObject) -> None:
        sequence = self._new_id()
        final = ends.draw(st.integers(len(prompt) + 1, 32))
        self.ends[sequence] = (len(prompt), final, ends.draw(st.integers(final, 32)))
        before = self.kv.pool.num_allocatable
        cached = self.kv.admit(sequence, self._demand(sequence, len(prompt)), prompt)
        if cached is None:
            assert not self.kv.holds(sequence)
            assert self.kv.pool.num_allocatable == before
            return
        assert cached < len(prompt)
        assert cached % self.SIZE == 0
        self.tokens[sequence], self.computed[sequence] = list(prompt), cached

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(1, 9), extra=st.integers(0, 1))
    def step(self, data: st.DataObject, count: int, extra: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens, start = self.tokens[sequence], self.computed[sequence]
        if start == len(tokens):
            if len(tokens) == self.ends[sequence][1]:
                return
            tokens.append(extra)
        end = min(len(tokens), start + count)
        if not self.kv.hold(sequence, start, self._demand(sequence, end)):
            return
        self._apply_copies()
        for position in range(start, end):
            self.slots[self._slot(sequence, position)] = tuple(tokens[: position + 1])
        self.kv.commit(sequence, end, tokens)
        self.computed[sequence] = end

    @precondition(lambda self: self.tokens and not self.kv.allocator.contiguous)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        if self.computed[parent] == 0:
            return
        shared = data.draw(st.integers(1, self.computed[parent]))
        child = self._new_id()
        tokens = [*self.tokens[parent][:shared], 7]
        final = max(shared + 1, self.ends[parent][1])
        self.ends[child] = (shared, final, max(final, self.ends[parent][2]))
        if self.kv.fork(parent, child, shared, self._demand(child, shared + 1)):
            self._apply_copies()
            self.tokens[child], self.computed[child] = tokens, shared

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        assert self.kv.release(sequence) == self.computed.pop(sequence)
        del self.tokens[sequence]

    @invariant()
    def everyone_reads_what_they_wrote(self) -> None:
        self.kv.check_invariants()
        for sequence, computed in self.computed.items():
            for position in range(computed):
                expected = tuple(self.tokens[sequence][: position + 1])
                assert self.slots[self._slot(sequence, position)] == expected

    @invariant()
    def ledger_sums_to_the_pool(self) -> None:
        for waiting in (None, 1, 8):
            entry = take_ledger(self.kv, waiting)
            assert entry.pool == self.config.num_blocks * self.SIZE
            assert min(entry) >= 0
            distinct = {
                self._slot(s, p) for s, computed in self.computed.items() for p in range(computed)
            }
            assert entry.live == len(distinct)
            assert entry.shared_saved == sum(self.computed.values()) - len(distinct)


TestPlacement = PlacementMachine.TestCase
TestPlacement.settings = MACHINE
TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = MACHINE
TestKVManager = KVManagerMachine.TestCase
TestKVManager.settings = MACHINE
