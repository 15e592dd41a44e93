"""What an allocator holds when requests never run out: a closed loop, one step a second.

::

    requests ended   0 ······· a third of them ············ no more to feed ····· all
                     warm-up │  measured: every step counts the same  │ drain, to know
                             │                                        │ who wrote what

Whole prompts are computed in one step, as the PagedAttention paper's figures have it: a running
request makes one token a step, and no time is lost to long steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import EngineCore, StepRecord
from pagelab.engine.replay import VirtualClock
from pagelab.errors import ConfigError, RequestError
from pagelab.memory.allocators import Allocator
from pagelab.memory.ledger import LedgerMeter, LedgerShares
from pagelab.sim.cost_model import UNIT
from pagelab.sim.runner import CostModelRunner
from pagelab.sim.simulator import make_core
from pagelab.types import SamplingParams
from pagelab.workloads import RequestShape

UNBOUNDED = SchedulerConfig(max_num_batched_tokens=1 << 30, max_num_seqs=1 << 20)
"""Steps of any size: only memory limits who runs."""

_QUEUE = 32  # requests that wait, at least, while there are more


class SaturationResult(NamedTuple):
    """What a replay found, over the measured steps.

    Attributes:
        mean_running: sequences at once (requests, unless they have several samples).
        ledger: shares of the pool, a step as good as another.
        preemptions_per_request: of the requests that ended.
        recomputed_per_output_token: tokens computed again, for each one generated.
        steps: measured.
        requests: that ended in them.
        refused: requests that the empty pool could not hold; left out.
    """

    mean_running: float
    ledger: LedgerShares
    preemptions_per_request: float
    recomputed_per_output_token: float
    steps: int
    requests: int
    refused: int


def replay(
    shapes: Iterable[RequestShape],
    memory: MemoryConfig,
    scheduling: SchedulerConfig = UNBOUNDED,
    *,
    max_requests: int = 2000,
    n: int = 1,
    allocator: Allocator | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SaturationResult:
    """Serve requests at saturation.

    Args:
        shapes: the requests, in order; their arrivals do not matter.
        memory: the pool and its allocator. Prompts are all alike, so `prefix_caching` must be
            off.
        scheduling: how much a step may do.
        max_requests: to read at most.
        n: parallel samples of each prompt, each of the shape's output length.
        allocator: an instance, instead of `memory.allocator`'s name.
        on_progress: told how many requests have ended, now and then.

    Raises:
        ConfigError: `prefix_caching` is on; or there were too few requests to fill the pool.
    """
    if memory.prefix_caching:
        raise ConfigError("a replay at saturation has no prompts to find: prefix_caching=False")
    clock = VirtualClock()
    runner = CostModelRunner(UNIT, clock, 1, distinct=False)
    core = make_core(runner, clock, memory, scheduling, 1, allocator)
    loop = _Loop(core, n)
    for shape in itertools.islice(shapes, max_requests):
        loop.add(shape)
    core.on_step = loop.step
    loop.fill()
    while core.has_unfinished_requests:
        core.step()
        loop.fill()
        if on_progress is not None:
            on_progress(loop.ended)
    return loop.result()


class _Loop:
    """The queue that never runs empty, and what is measured meanwhile."""

    def __init__(self, core: EngineCore, n: int) -> None:
        self._core, self._n = core, n
        self._shapes: list[RequestShape] = []
        self._fed = self._refused = 0
        self.ended = 0
        self._meter = LedgerMeter(core.kv)
        self._steps = self._running = self._requests = 0
        self._preemptions = self._recomputed = self._output = 0

    def add(self, shape: RequestShape) -> None:
        """One more request to feed."""
        self._shapes.append(shape)

    def fill(self) -> None:
        """Keep requests waiting while there are more."""
        waiting = self._core.scheduler.waiting
        # as many as run: with short outputs, more than _QUEUE of them can end in one step
        enough = max(_QUEUE, len(self._core.scheduler.running))
        while self._fed < len(self._shapes) and len(waiting) < enough:
            shape = self._shapes[self._fed]
            self._fed += 1
            most = max(shape.output_tokens, shape.max_tokens or 0)
            params = SamplingParams(
                max_tokens=most, temperature=0, ignore_eos=True, seed=0, n=self._n
            )
            try:
                self._core.add_request(
                    (0,) * shape.input_tokens, params, output_tokens=shape.output_tokens
                )
            except RequestError:
                self._refused += 1
                self.ended += 1

    def step(self, record: StepRecord) -> None:
        """The engine's hook."""
        more = self._fed < len(self._shapes)
        measured = more and self.ended >= len(self._shapes) // 3
        self._meter.record(record.waiting_blocks, record.released, 1.0 if measured else 0.0)
        ended = [e.sequence.request for e in record.events if e.sequence.request.finished]
        self.ended += len(set(map(id, ended)))
        if not measured:
            return
        self._steps += 1
        self._running += record.num_running
        self._preemptions += len(record.preempted)
        self._output += sum(event.token is not None for event in record.events)
        for request in {request.id: request for request in ended}.values():
            self._requests += 1
            self._recomputed += request.metrics.num_recomputed_tokens

    def result(self) -> SaturationResult:
        """All figures."""
        if not self._steps:
            raise ConfigError(
                f"{len(self._shapes):,} requests are too few to fill the pool and keep it full: "
                "give more, or lower --kv-memory"
            )
        return SaturationResult(
            mean_running=self._running / self._steps,
            ledger=self._meter.finish(),
            preemptions_per_request=self._preemptions / max(1, self._requests),
            recomputed_per_output_token=self._recomputed / max(1, self._output),
            steps=self._steps,
            requests=self._requests,
            refused=self._refused,
        )
