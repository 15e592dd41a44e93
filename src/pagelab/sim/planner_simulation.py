"""The planner's second opinion: the real allocators, replayed at saturation."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from pagelab.config import MemoryConfig
from pagelab.errors import ConfigError
from pagelab.sim.planner import MemoryPlan
from pagelab.sim.planner_workload import WorkloadPlan
from pagelab.sim.saturation import replay as replay_at_saturation
from pagelab.workloads.shapes import RequestShape

Replay = Callable[[Iterable[RequestShape], MemoryConfig], float]
"""Mean requests running at saturation, by replaying the requests through this memory."""

LEAST_REQUESTS = 600
REQUESTS_A_PLACE = 10
"""A replay's length: so many requests for each that the formula lets run, and at least 600.

A compromise with time. contiguous-oracle, whose holes build up slowly, came to 185, 188, 201 and
209 with 6, 10, 12 and 24 on the Azure conversations; paged stayed within 351 to 355.
"""

ONE_GROUP = "the engine has one KV group, and no windows: by formula only"


class Simulated(NamedTuple):
    """What a replay found for one allocator: mean requests running, or why there was none."""

    running: float | None
    why: str | None = None


def simulate(
    plan: MemoryPlan,
    workload: WorkloadPlan,
    shapes: Iterable[RequestShape],
    replay: Replay,
    *,
    placement: str = "buddy",
    watermark: float = 0.0,
    num_requests: int | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Mapping[str, Simulated]:
    """Replay a workload under every allocator that can run.

    Args:
        plan: the pool.
        workload: its plan by formula.
        shapes: the requests once more; can be read several times.
        replay: the simulator.
        placement: where contiguous ranges go.
        watermark: share of the blocks that an admission leaves free, where requests grow.
        num_requests: of each replay; None: as many as it takes (`REQUESTS_A_PLACE`).
        on_start: told the name of each allocator before its replay.
    """
    if len(plan.layout.groups) > 1 or plan.layout.groups[0].window is not None:
        return {name: Simulated(None, ONE_GROUP) for name in workload.allocators}
    results = {}
    for name, found in workload.allocators.items():
        if found.formula is None:
            results[name] = Simulated(None, found.why)
            continue
        if on_start is not None:
            on_start(name)
        memory = MemoryConfig(
            num_blocks=plan.num_pages,
            block_size=plan.layout.block_size,
            max_model_len=plan.max_model_len,
            allocator=name,
            placement=placement,
            prefix_caching=False,  # the formula shares nothing either
            watermark=watermark,
        )
        count = num_requests or max(LEAST_REQUESTS, int(REQUESTS_A_PLACE * found.formula))
        try:
            results[name] = Simulated(replay(_Sample(plan, workload, shapes, count), memory))
        except ConfigError as error:
            results[name] = Simulated(None, str(error))
    return results


class _Sample:
    """So many requests of a workload, can be read several times.

    Of a longer one every k-th, so that they are spread over all of it as the formula is; a
    shorter one begins again. What the whole pool could not hold is left out, as in the formula.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        workload: WorkloadPlan,
        shapes: Iterable[RequestShape],
        count: int,
    ) -> None:
        self._plan, self._shapes, self._count = plan, shapes, count
        self._every = max(1, workload.moments.num_requests // count)

    def __iter__(self) -> Iterator[RequestShape]:
        return itertools.islice(self._endless(), self._count)

    def _endless(self) -> Iterator[RequestShape]:
        pages, limit = self._plan.layout.pages, self._plan.num_pages
        while True:
            fitting = (s for s in self._shapes if pages(s.input_tokens + s.output_tokens) <= limit)
            yield from itertools.islice(fitting, 0, None, self._every)


def replay_mean_running(shapes: Iterable[RequestShape], memory: MemoryConfig) -> float:
    """`Replay` by the simulator: the real scheduler and memory, and steps of any size."""
    return replay_at_saturation(shapes, memory, max_requests=sys.maxsize).mean_running
