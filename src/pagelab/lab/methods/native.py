"""`pagelab`: this project's engine, under the allocator that the job names."""

from __future__ import annotations

import time
from collections.abc import Callable

from pagelab.engine.core import EngineCore, StepRecord
from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError, RequestError
from pagelab.lab.methods.base import Method, Reporter
from pagelab.lab.methods.recording import empty_steps, micro, wait_until, workload_run
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.memory.ledger import LedgerEntry, LedgerRecorder
from pagelab.results import KVCapacity, Preemption, RequestResult, Steps, WorkloadRun
from pagelab.scheduling.sequence import Request
from pagelab.types import SamplingParams, SequenceId
from pagelab.workloads import Workload, WorkloadRequest


class Native(Method):
    """The engine's own step loop, without text: token ids in, token ids out."""

    core: EngineCore
    bytes_per_token: int

    def setup(self) -> KVCapacity:
        """Load model and pool; refuse a pool that could never hold a request of the job."""
        job = self.job
        if job.allocator is None:
            raise ConfigError("the method pagelab needs an allocator")
        llm = LLM(
            job.model,
            device="cpu",
            dtype=job.dtype,
            kv_memory=job.kv_memory,
            block_size=job.block_size,
            max_model_len=job.max_model_len,
            allocator=job.allocator,
            max_num_batched_tokens=job.max_num_batched_tokens,
            watermark=job.watermark,
            threads=job.threads,
        )
        self.core = llm.core
        layout = llm.spec.kv_layout(llm.dtype, job.block_size)
        self.bytes_per_token = layout.bytes_per_token
        memory = self.core.kv.config
        slots = memory.num_blocks * memory.block_size
        for workload in job.workloads:
            for request in workload.requests:
                if not self.core.kv.fits_ever(request.total_tokens):
                    raise MethodUnavailableError(
                        f"{job.allocator} cannot place {request.id} ({request.total_tokens} "
                        f"tokens, maximum length {job.max_model_len}) in a pool of {slots} slots: "
                        "raise --kv-memory or lower --max-model-len"
                    )
        return {
            "bytes": memory.num_blocks * layout.bytes_per_block,
            "slots": slots,
            "num_blocks": memory.num_blocks,
            "block_size": memory.block_size,
            "note": f"{memory.num_blocks} blocks of {memory.block_size} slots, "
            f"given out by {job.allocator}"
            + (f", {memory.placement} placement" if self.core.kv.allocator.contiguous else ""),
        }

    def run(self, workload: Workload) -> WorkloadRun:
        """Add requests as they arrive, and step until all have ended."""
        core = self.core
        pool = core.kv.config.num_blocks * core.kv.config.block_size
        prefix = core.kv.prefix_cache
        before = (prefix.num_queried_tokens, prefix.num_hit_tokens) if prefix else (0, 0)
        preempted = len(core.scheduler.preemptions)
        started = core.clock()
        watch = _Watch(self, workload, started)
        core.on_step = watch.step
        try:
            results = self._serve(workload, started)
        finally:
            core.on_step = None
        duration = core.clock() - started
        self.reporter.stage(f"{workload.name}: batch complete")
        after = (prefix.num_queried_tokens, prefix.num_hit_tokens) if prefix else (0, 0)
        preemptions: list[Preemption] = [
            {
                "step": watch.index_of(record.step),
                "request": record.sequence_id.request_id,
                "tokens": record.num_tokens,
            }
            for record in core.scheduler.preemptions[preempted:]
        ]
        return workload_run(
            workload,
            results,
            watch.finish(),
            pool,
            duration_s=duration,
            block_events=watch.recorder.block_events,
            preemptions=preemptions,
            prefix_queries=after[0] - before[0],
            prefix_hits=after[1] - before[1],
        )

    def _serve(self, workload: Workload, started: float) -> list[RequestResult]:
        core = self.core
        queue = list(workload.requests)
        served: list[Callable[[], RequestResult]] = []
        while queue or core.has_unfinished_requests:
            while queue and queue[0].arrival_s <= core.clock() - started:
                served.append(self._add(queue.pop(0), started))
            if core.has_unfinished_requests:
                core.step()
            elif queue:
                wait_until(started, queue[0].arrival_s)
        return [result() for result in served]

    def _add(self, request: WorkloadRequest, started: float) -> Callable[[], RequestResult]:
        """Queue a request; returns what tells its result once it has ended."""
        params = SamplingParams(
            max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True, seed=self.job.seed
        )
        try:
            added = self.core.add_request(
                request.token_ids,
                params,
                request_id=request.id,
                arrival_time=started + request.arrival_s,
            )
        except RequestError as error:
            message = str(error)
            return lambda: _refused(request, message)
        return lambda: _result(request, added, started)


class _Watch:
    """Writes down every step: the ledger, holders of blocks, progress, memory."""

    def __init__(self, method: Native, workload: Workload, started: float) -> None:
        self._core = method.core
        self._reporter: Reporter = method.reporter
        self._bytes = method.bytes_per_token
        self._workload, self._started = workload, started
        self._index = {request.id: i for i, request in enumerate(workload.requests)}
        self._total, self._done = workload.output_tokens, 0
        self._steps: Steps = empty_steps()
        self._first_step: int | None = None
        self._entry: LedgerEntry | None = None
        self.recorder = LedgerRecorder(method.core.kv, self._holder)

    def _holder(self, sequence_id: SequenceId) -> int:
        return self._index[sequence_id.request_id]

    def step(self, record: StepRecord) -> None:
        """The engine's hook."""
        if self._first_step is None and record.step >= 0:
            self._first_step = record.step
        entry = self.recorder.record(record.waiting_blocks, record.released)
        before, self._entry = self._entry or entry, entry
        self._steps["t"].append(micro(record.time - self._started))
        self._steps["new_tokens"].append(record.num_tokens)
        self._steps["running"].append(record.num_running)
        self._steps["waiting"].append(record.num_waiting)
        self._done += sum(event.token is not None for event in record.events)
        self._reporter.progress(self._workload.name, self._done, self._total)
        for event in record.events:
            if event.finish_reason is not None:
                number = self._holder(event.sequence.id) + 1
                self._reporter.stage(
                    f"{self._workload.name}: request {number} done",
                    # as it was when the request still had its blocks
                    kv_allocated_bytes=(before.live + before.unwritten) * self._bytes,
                    kv_live_bytes=before.live * self._bytes,
                )

    def index_of(self, step: int) -> int:
        """Index into the columns of a step of the scheduler's count."""
        last = len(self._steps["t"]) - 1
        return max(0, min(last, step - (self._first_step or 0)))

    def finish(self) -> Steps:
        """All columns."""
        columns = self.recorder.finish()
        steps = self._steps
        steps["live"], steps["reserved"] = columns.live, columns.reserved
        steps["internal"], steps["cached"] = columns.internal, columns.cached
        steps["free"], steps["external"] = columns.free, columns.external
        steps["shared_saved"] = columns.shared_saved
        return steps


def _result(asked: WorkloadRequest, request: Request, started: float) -> RequestResult:
    (sequence,) = request.sequences
    metrics = request.metrics
    now = time.perf_counter()
    finish = metrics.finish_time if metrics.finish_time is not None else now
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
