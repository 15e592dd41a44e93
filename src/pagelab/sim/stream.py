"""Simulating any number of requests in bounded memory.

A request exists from shortly before it may be admitted until it ends; what is kept of it then is
a few counts in histograms::

    shapes (lazy) ──▶ at most max_num_seqs waiting ──▶ running ──▶ histograms, ledger means
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import EngineCore, StepRecord
from pagelab.engine.replay import VirtualClock
from pagelab.errors import RequestError
from pagelab.memory.allocators import Allocator
from pagelab.memory.ledger import LedgerMeter, LedgerShares
from pagelab.scheduling.sequence import Request
from pagelab.sim.cost_model import CostModel
from pagelab.sim.histogram import LogHistogram
from pagelab.sim.runner import CostModelRunner
from pagelab.sim.simulator import DEFAULT_SCHEDULING, make_core
from pagelab.types import SamplingParams
from pagelab.workloads import RequestShape
from pagelab.workloads.token_ids import random_source

Progress = Callable[[int, float], None]
"""Told after a step now and then: requests finished, seconds of virtual time."""


class Latency(NamedTuple):
    """One kind of latency, seconds; percentiles to within 1 %."""

    mean: float
    p50: float
    p95: float
    p99: float


class StreamSummary(NamedTuple):
    """What a simulation of a stream found.

    Attributes:
        requests: that ended.
        refused: that could never fit; `first_refusal` says why the first one could not.
        duration_s: until the last one ended.
        prompt_tokens, output_tokens: of those that ended.
        steps: of the engine.
        ledger: shares of the pool, weighted by time, while requests were running.
        mean_running, peak_running: requests at once; the mean weighted likewise.
        preemptions: in all.
        recomputed_tokens: computed again after a preemption.
        cached_tokens: prompt tokens that were found in the prefix cache, at first admission.
        ttft, tpot, itl, e2e, queue: latencies (docs/metrics.md); queue is from arrival to a first
            step.
    """

    requests: int
    refused: int
    first_refusal: str | None
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    steps: int
    ledger: LedgerShares
    mean_running: float
    peak_running: int
    preemptions: int
    recomputed_tokens: int
    cached_tokens: int
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2e: Latency
    queue: Latency

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens a second of virtual time."""
        return self.output_tokens / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def requests_per_s(self) -> float:
        """Requests a second of virtual time."""
        return self.requests / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def recomputed_per_output_token(self) -> float:
        """Tokens computed again, for each one generated."""
        return self.recomputed_tokens / self.output_tokens if self.output_tokens else 0.0


def simulate_stream(
    shapes: Iterable[RequestShape],
    memory: MemoryConfig,
    scheduling: SchedulerConfig = DEFAULT_SCHEDULING,
    *,
    cost: CostModel,
    name: str = "stream",
    vocab_size: int = 32_000,
    seed: int = 0,
    samples: int = 1,
    allocator: Allocator | None = None,
    on_progress: Progress | None = None,
) -> StreamSummary:
    """Serve a stream in virtual time.

    Where `memory.prefix_caching` is off, prompts are all the same token, which is quick. Where it
    is on, they are those of `workloads.request_of`.

    Args:
        shapes: in order of arrival; may be endless in memory's eyes, is read once.
        memory: the pool and its allocator.
        scheduling: as the engine's.
        cost: how long steps take.
        name: of the workload, for the prompts.
        vocab_size: of the model.
        seed: of the prompts.
        samples: parallel samples of each prompt, each of the shape's output length. Running ones
            are then counted, not requests; latencies are those of the first sample.
        allocator: an instance, instead of `memory.allocator`'s name.
        on_progress: see `Progress`.
    """
    clock = VirtualClock()
    runner = CostModelRunner(cost, clock, vocab_size)
    core = make_core(runner, clock, memory, scheduling, vocab_size, allocator)
    runner.distinct = core.kv.prefix_cache is not None
    meter = _Meter(core, on_progress)
    core.on_step = meter.step
    feed = _Feed(core, shapes, _prompts(core, name, vocab_size, seed), samples)
    while True:
        feed.fill(clock.now)
        if core.has_unfinished_requests:
            core.step()
        elif feed.next_arrival is not None:
            clock.wait_until(feed.next_arrival)
            meter.idle(clock.now)
        else:
            break
    return meter.summary(feed)


Prompts = Callable[[RequestShape, int], tuple[int, ...]]


def _prompts(core: EngineCore, name: str, vocab_size: int, seed: int) -> Prompts:
    if core.kv.prefix_cache is None:
        return lambda shape, index: (0,) * shape.input_tokens
    source = random_source(vocab_size, name, seed)
    return lambda shape, index: source.prompt(shape.input_tokens, index, shape.hash_ids)


class _Feed:
    """Hands arrived requests to the engine: no more than it could admit in one step."""

    def __init__(
        self,
        core: EngineCore,
        shapes: Iterable[RequestShape],
        prompts: Prompts,
        samples: int,
    ) -> None:
        self._core, self._prompts, self._samples = core, prompts, samples
        self._shapes: Iterator[RequestShape] = iter(shapes)
        self._next = next(self._shapes, None)
        self._params: dict[int, SamplingParams] = {}
        self._most = core.scheduler.config.max_num_seqs
        self.count = self.refused = 0
        self.first_refusal: str | None = None

    @property
    def next_arrival(self) -> float | None:
        """When the next request arrives; None when there is none."""
        return None if self._next is None else self._next.arrival_s

    def fill(self, now: float) -> None:
        """Queue what has arrived, as far as a step could reach.

        The queue is served in order, so what stays outside could not have been admitted.
        """
        waiting = self._core.scheduler.waiting
        while self._next is not None and self._next.arrival_s <= now and len(waiting) < self._most:
            self._add(self._next)
            self._next = next(self._shapes, None)

    def _add(self, shape: RequestShape) -> None:
        try:
            self._core.add_request(
                self._prompts(shape, self.count),
                self._sampling(max(shape.output_tokens, shape.max_tokens or 0)),
                arrival_time=shape.arrival_s,
                output_tokens=shape.output_tokens,
            )
        except RequestError as error:
            self.refused += 1
            self.first_refusal = self.first_refusal or str(error)
        self.count += 1

    def _sampling(self, max_tokens: int) -> SamplingParams:
        """Kept by length: there are few, and checking one takes longer than finding it."""
        params = self._params.get(max_tokens)
        if params is None:
            params = SamplingParams(
                max_tokens=max_tokens, temperature=0, ignore_eos=True, seed=0, n=self._samples
            )
            if len(self._params) < 10_000:
                self._params[max_tokens] = params
        return params


class _Meter:
    """Sums up steps and requests."""

    REPORT_EVERY = 256  # steps

    def __init__(self, core: EngineCore, on_progress: Progress | None) -> None:
        self._core, self._on_progress = core, on_progress
        self._ledger = LedgerMeter(core.kv)
        self._then = 0.0  # the end of the step before
        self._busy = self._running = 0.0
        self._peak = self._steps = 0
        self._requests = self._prompt_tokens = self._output_tokens = 0
        self._recomputed = self._cached = 0
        self.ttft, self.tpot, self.itl = LogHistogram(), LogHistogram(), LogHistogram()
        self.e2e, self.queue = LogHistogram(), LogHistogram()

    def idle(self, now: float) -> None:
        """Nothing ran until now."""
        self._then = now

    def step(self, record: StepRecord) -> None:
        """The engine's hook."""
        now, then = record.time, self._then
        running = record.num_running
        weight = now - then if running else 0.0
        self._ledger.record(record.waiting_blocks, record.released, weight)
        self._busy += weight
        self._running += weight * running
        if running > self._peak:
            self._peak = running
        self._steps += 1
        in_turn = 0  # tokens that followed one of the step before
        ended: dict[str, Request] = {}
        for sequence, _, finish_reason in record.events:
            request = sequence.request
            times = request.metrics.token_times
            if len(times) > 1 and sequence.id.sample == 0:
                if times[-2] == then:
                    in_turn += 1
                else:
                    self.itl.add(now - times[-2])
            if finish_reason is not None and request.finished:
                ended[request.id] = request
        for request in ended.values():
            self._finished(request)
        if in_turn:
            self.itl.add(now - then, in_turn)
        self._then = now
        if self._on_progress is not None and self._steps % self.REPORT_EVERY == 0:
            self._on_progress(self._requests, now)

    def _finished(self, request: Request) -> None:
        metrics = request.metrics
        times, arrival = metrics.token_times, metrics.arrival_time
        self._requests += 1
        self._prompt_tokens += request.num_prompt_tokens
        self._output_tokens += sum(s.num_output_tokens for s in request.sequences)
        self._recomputed += metrics.num_recomputed_tokens
        self._cached += metrics.num_cached_tokens
        assert metrics.first_scheduled_time is not None
        self.queue.add(metrics.first_scheduled_time - arrival)
        self.ttft.add(times[0] - arrival)
        self.e2e.add(times[-1] - arrival)
        if len(times) > 1:
            self.tpot.add((times[-1] - times[0]) / (len(times) - 1))

    def summary(self, feed: _Feed) -> StreamSummary:
        """All figures."""
        return StreamSummary(
            requests=self._requests,
            refused=feed.refused,
            first_refusal=feed.first_refusal,
            duration_s=self._then,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            steps=self._steps,
            ledger=self._ledger.finish(),
            mean_running=self._running / self._busy if self._busy else 0.0,
            peak_running=self._peak,
            preemptions=self._core.scheduler.num_preemptions,
            recomputed_tokens=self._recomputed,
            cached_tokens=self._cached,
            ttft=_latency(self.ttft),
            tpot=_latency(self.tpot),
            itl=_latency(self.itl),
            e2e=_latency(self.e2e),
            queue=_latency(self.queue),
        )


def _latency(histogram: LogHistogram) -> Latency:
    return Latency(histogram.mean, *(histogram.percentile(q) for q in (50, 95, 99)))
