"""Steps of a method whose block tables can be read: the same ledger as the engine's own.

::

    request 0  [7][3][9|  ]      a table: block ids, and how many tokens are written
    request 1  [7][4|     ]      block 7 is shared: its slots are live once, and saved once
    cached     {5, 2}            held by nobody, reusable
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pagelab.lab.methods.recording import empty_steps, micro
from pagelab.memory.ledger import CACHED, holder_events
from pagelab.results import Steps


class HeldBlocks(NamedTuple):
    """What one request holds."""

    block_ids: Sequence[int]
    written: int  # tokens whose K/V are in them, from the first block on


class BlockRecorder:
    """Writes down, step by step, who holds which blocks and what of them is written.

    A step's entry is what was held while it ran: before requests that ended in it gave their
    blocks back. An allocation is followed from the first step that sees it to `release`; its
    empty slots are `reserved` as far as they were written by then, `internal` beyond that.

    Costs O(held blocks) a step.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks, self._block_size = num_blocks, block_size
        self._steps: Steps = empty_steps()
        self._unwritten: list[int] = []
        # open allocations: (step, slots held, slots written) at every step so far
        self._open: dict[int, list[tuple[int, int, int]]] = {}
        self._holders: dict[int, int] = {}
        self.block_events: list[tuple[int, int, int]] = []
        self.live = self.allocated = 0  # slots, at the last step

    @property
    def num_steps(self) -> int:
        """Steps so far; the next one has this index."""
        return len(self._steps["t"])

    def record(
        self,
        t: float,
        held: Mapping[int, HeldBlocks],
        cached: Collection[int],
        *,
        new_tokens: int,
        waiting: int,
    ) -> None:
        """Add a step that ended at `t` seconds of the workload.

        Args:
            t: seconds.
            held: request index → what it held while the step ran.
            cached: ids of blocks that no request held and whose content could be reused.
            new_tokens: tokens computed.
            waiting: requests that have arrived and hold nothing.
        """
        step, size = self.num_steps, self._block_size
        holders: dict[int, int] = {}
        written = saved = 0
        for request, (block_ids, tokens) in held.items():
            assert 0 <= tokens <= len(block_ids) * size, "more tokens than slots"
            written += tokens
            for position, block_id in enumerate(block_ids):
                if holders.setdefault(block_id, request) != request:
                    saved += max(0, min(size, tokens - position * size))
            self._open.setdefault(request, []).append((step, len(block_ids) * size, tokens))
        self.live, self.allocated = written - saved, len(holders) * size
        only_cached = set(cached) - holders.keys()
        steps = self._steps
        steps["t"].append(micro(t))
        steps["new_tokens"].append(new_tokens)
        steps["running"].append(len(held))
        steps["waiting"].append(waiting)
        steps["live"].append(self.live)
        steps["reserved"].append(0)
        self._unwritten.append(self.allocated - self.live)
        steps["cached"].append(len(only_cached) * size)
        free = self._num_blocks - len(holders) - len(only_cached)
        assert free >= 0, "more blocks than the pool has"
        steps["free"].append(free * size)
        steps["external"].append(0)  # any free block serves any request
        steps["shared_saved"].append(saved)
        steps["rounding"].append(0)
        holders |= dict.fromkeys(only_cached, CACHED)
        self.block_events += holder_events(step, self._holders, holders)
        self._holders = holders

    def release(self, request: int, written: int) -> None:
        """A request gave its blocks back after the last step, with so many tokens written."""
        for step, slots, tokens in self._open.pop(request, ()):
            self._steps["reserved"][step] += min(written, slots) - tokens

    def finish(self) -> Steps:
        """All columns; what is still held is released as it was last seen."""
        for request, spans in list(self._open.items()):
            self.release(request, spans[-1][2])
        steps = self._steps
        steps["internal"] = [
            unwritten - reserved
            for unwritten, reserved in zip(self._unwritten, steps["reserved"], strict=True)
        ]
        return steps
