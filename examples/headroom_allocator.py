r"""An allocator of one's own: pages, and some more of them ahead.

`paged` takes a block when the last one is full, so a request at the edge of a full pool is
preempted for want of a single block. `Headroom` holds a few slots more than it needs now. That
may save preemptions, and it costs slots that stay empty longer. Is it worth it? Ask::

    pagelab compare --allocators paged,examples/headroom_allocator.py:Headroom \
        --workload large --kv-memory 128MiB --watermark 0,0.05

    prompt and output so far          ahead
    ├──────────────────────────────┤╌╌╌╌╌╌╌╌╌╌┤
    0                      num_tokens          num_tokens + AHEAD, at most max_tokens

An allocator is a class with four members (`pagelab.memory.allocators.Allocator`), made without
arguments. The same class runs in the engine, in `pagelab compare` and in `pagelab simulate`; the
block pool, the scheduler and the kernels stay as they are.
"""

from __future__ import annotations

from pagelab.memory.allocators import Demand

AHEAD = 32  # slots


class Headroom:
    """The tokens that a request has, and room for the next `AHEAD` ones."""

    name = "headroom"  # what the report calls it
    contiguous = False  # blocks anywhere; True: one range, which can neither grow nor be shared
    grows = True  # `slots` is asked again before every step; False: at admission only

    def slots(self, demand: Demand) -> int:
        """Slots to hold now, at least `demand.num_tokens`; rounded up to blocks by the caller.

        Never beyond what the client asked for: those slots could not be used.
        """
        return max(demand.num_tokens, min(demand.num_tokens + AHEAD, demand.max_tokens))
