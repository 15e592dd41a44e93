"""Serving a workload with any engine core, under any clock, and writing it down.

The real engine and the simulator differ in the runner and the clock that they bring; what is asked,
when, and how it is recorded is this one piece of code.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pagelab.engine.core import EngineCore, StepRecord
from pagelab.engine.garbage import no_full_collections
from pagelab.engine.workload_record import empty_steps, micro, workload_run
from pagelab.errors import RequestError
from pagelab.memory.allocators import Demand
from pagelab.memory.ledger import LedgerEntry, LedgerRecorder
from pagelab.results import Preemption, RequestResult, Steps, WorkloadRun
from pagelab.scheduling.sequence import Request
from pagelab.types import SamplingParams, SequenceId
from pagelab.workloads import Workload, WorkloadRequest


class Clock(Protocol):
    """Seconds since some moment, and waiting for one."""

    def __call__(self) -> float:
        """Now."""
        ...

    def wait_until(self, time: float) -> None:
        """Return when it is `time`, at once if that is past."""
        ...


class RealClock:
    """`time.perf_counter()`, the engine's own."""

    def __call__(self) -> float:
        """Now."""
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        """Sleep."""
        delay = moment - time.perf_counter()
        if delay > 0:
            time.sleep(delay)


class VirtualClock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def wait_until(self, moment: float) -> None:
        """Let it be `moment`, unless it is later."""
        self.now = max(self.now, moment)


class Stage(Protocol):
    """Told at named moments, with the K/V bytes in allocations and those that hold tokens."""

    def __call__(self, label: str, *, kv_allocated_bytes: int = 0, kv_live_bytes: int = 0) -> None:
        """A stage."""
        ...


def demand_of(request: WorkloadRequest, max_model_len: int) -> Demand:
    """What an allocator knows of this request when all of its tokens are there."""
    asked = len(request.token_ids) + (request.asked_tokens or request.max_tokens)
    total = request.total_tokens
    return Demand(len(request.token_ids), total, total, max(asked, total), max_model_len)


def sampling_of(request: WorkloadRequest, temperature: float, seed: int) -> SamplingParams:
    """As its client asked it: to the end, whatever tokens come."""
    return SamplingParams(
        max_tokens=max(request.asked_tokens or 0, request.max_tokens),
        temperature=temperature,
        ignore_eos=True,
        seed=seed,
    )


def replay(
    core: EngineCore,
    workload: Workload,
    clock: Clock,
    *,
    bytes_per_token: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_stage: Stage | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> WorkloadRun:
    """Add requests as they arrive, and step until all have ended.

    ::

        steps        |─── step 0 ───|──── step 1 ────|─ idle ─|── step 2 …
        arrivals       ▲ ▲           ▲                         ▲
        added               here ────┘ ──────────────┘         └ at its own time

    A request is added at the first end of a step (as recorded, in whole microseconds) that is not
    before its arrival; while nothing runs, at its arrival. So a record's times and arrivals say
    exactly what the scheduler saw, and the simulator can repeat it (`pagelab.sim`).

    Args:
        core: the engine, idle, under the same clock.
        workload: requests in order of arrival, with token ids.
        clock: real or virtual.
        bytes_per_token: of K/V, for the bytes that stages are told with.
        temperature: 0 is greedy.
        seed: of sampling.
        on_stage: told when requests end.
        on_progress: told (workload, output tokens so far, in all) after every step.
    """
    started = clock()
    prefix = core.kv.prefix_cache
    before = (prefix.num_queried_tokens, prefix.num_hit_tokens) if prefix else (0, 0)
    watch = _Watch(core, workload, started, bytes_per_token, on_stage, on_progress)
    core.on_step = watch.step
    try:
        with no_full_collections():
            results = _serve(core, workload, clock, watch, temperature, seed)
    finally:
        core.on_step = None
    duration = clock() - started
    after = (prefix.num_queried_tokens, prefix.num_hit_tokens) if prefix else (0, 0)
    if on_stage is not None:
        on_stage(f"{workload.name}: batch complete")
    return workload_run(
        workload,
        results,
        watch.finish(),
        core.kv.config.num_blocks * core.kv.config.block_size,
        duration_s=duration,
        block_events=watch.recorder.block_events,
        preemptions=watch.preemptions,
        prefix_queries=after[0] - before[0],
        prefix_hits=after[1] - before[1],
    )


def _serve(
    core: EngineCore,
    workload: Workload,
    clock: Clock,
    watch: _Watch,
    temperature: float,
    seed: int,
) -> list[RequestResult]:
    queue = deque(workload.requests)
    served: list[Callable[[], RequestResult]] = []
    started, now = watch.started, 0.0
    while queue or core.has_unfinished_requests:
        if not core.has_unfinished_requests:
            clock.wait_until(started + queue[0].arrival_s)
            now = max(now, queue[0].arrival_s)
        while queue and queue[0].arrival_s <= now:
            served.append(_add(core, queue.popleft(), clock, started, temperature, seed))
        if core.has_unfinished_requests:
            core.step()
            now = watch.last_t
    return [result() for result in served]


def _add(
    core: EngineCore,
    asked: WorkloadRequest,
    clock: Clock,
    started: float,
    temperature: float,
    seed: int,
) -> Callable[[], RequestResult]:
    """Queue a request; returns what tells its result once it has ended."""
    try:
        added = core.add_request(
            asked.token_ids,
            sampling_of(asked, temperature, seed),
            request_id=asked.id,
            arrival_time=started + asked.arrival_s,
            output_tokens=asked.max_tokens,
        )
    except RequestError as error:
        message = str(error)
        return lambda: _refused(asked, message)
    return lambda: result_of(asked, added, clock, started)


class _Watch:
    """Writes down every step: the ledger, holders of blocks, progress, memory."""

    def __init__(
        self,
        core: EngineCore,
        workload: Workload,
        started: float,
        bytes_per_token: int,
        on_stage: Stage | None,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.started = started
        self.last_t = 0.0
        self.preemptions: list[Preemption] = []
        self._stage, self._progress = on_stage, on_progress
        self._bytes = bytes_per_token
        self._name = workload.name
        self._index = {request.id: i for i, request in enumerate(workload.requests)}
        self._total, self._done = workload.output_tokens, 0
        self._steps: Steps = empty_steps()
        self._entry: LedgerEntry | None = None
        self.recorder = LedgerRecorder(core.kv, self._holder)

    def _holder(self, sequence_id: SequenceId) -> int:
        return self._index[sequence_id.request_id]

    def step(self, record: StepRecord) -> None:
        """The engine's hook."""
        for preempted in record.preempted:
            self.preemptions.append(
                {
                    "step": len(self._steps["t"]),
                    "request": preempted.sequence_id.request_id,
                    "tokens": preempted.num_tokens,
                }
            )
        entry = self.recorder.record(record.waiting_blocks, record.released)
        before, self._entry = self._entry or entry, entry
        self.last_t = micro(record.time - self.started)
        self._steps["t"].append(self.last_t)
        self._steps["new_tokens"].append(record.num_tokens)
        self._steps["running"].append(record.num_running)
        self._steps["waiting"].append(record.num_waiting)
        self._done += sum(event.token is not None for event in record.events)
        if self._progress is not None:
            self._progress(self._name, self._done, self._total)
        if self._stage is None:
            return
        for event in record.events:
            if event.finish_reason is not None:
                number = self._holder(event.sequence.id) + 1
                self._stage(
                    f"{self._name}: request {number} done",
                    # as it was when the request still had its blocks
                    kv_allocated_bytes=(before.live + before.unwritten) * self._bytes,
                    kv_live_bytes=before.live * self._bytes,
                )

    def finish(self) -> Steps:
        """All columns."""
        columns = self.recorder.finish()
        steps = self._steps
        steps["live"], steps["reserved"] = columns.live, columns.reserved
        steps["internal"], steps["cached"] = columns.internal, columns.cached
        steps["free"], steps["external"] = columns.free, columns.external
        steps["rounding"], steps["shared_saved"] = columns.rounding, columns.shared_saved
        return steps


def result_of(
    asked: WorkloadRequest, request: Request, clock: Clock, started: float
) -> RequestResult:
    """An ended request as records hold it; times count from `started`, a time of the clock."""
    (sequence,) = request.sequences
    metrics = request.metrics
    finish = metrics.finish_time if metrics.finish_time is not None else clock()
    first = metrics.first_token_time if metrics.first_token_time is not None else finish
    scheduled = metrics.first_scheduled_time
    result: RequestResult = {
        "id": asked.id,
        "output_token_ids": list(sequence.output_token_ids),
        "finish_reason": str(sequence.finish_reason),
        "arrival_s": asked.arrival_s,
        "first_scheduled_s": micro((finish if scheduled is None else scheduled) - started),
        "first_token_s": micro(first - started),
        "finish_s": micro(finish - started),
        "token_times_s": [micro(t - started) for t in metrics.token_times],
        "cached_tokens": metrics.num_cached_tokens,
        "preemptions": metrics.num_preemptions,
        "recomputed_tokens": metrics.num_recomputed_tokens,
    }
    if sequence.error is not None:
        result["error"] = sequence.error
    return result


def _refused(asked: WorkloadRequest, message: str) -> RequestResult:
    return {
        "id": asked.id,
        "output_token_ids": [],
        "finish_reason": "error",
        "error": message,
        "arrival_s": asked.arrival_s,
        "first_scheduled_s": asked.arrival_s,
        "first_token_s": asked.arrival_s,
        "finish_s": asked.arrival_s,
        "token_times_s": [],
        "cached_tokens": 0,
        "preemptions": 0,
        "recomputed_tokens": 0,
    }
