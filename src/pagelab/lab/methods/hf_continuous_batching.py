"""`hf-continuous-batching`: transformers' own continuous batching on its own paged cache.

transformers runs its loop in a thread; here the same calls are made in this one, so that every
step can be looked at between them::

    prepare_next_batch   its scheduler: who runs, with which blocks
    _generation_step     its model runner: forward and sampling
       (look)            tables, tokens written, blocks kept for reuse
    update_batch         new tokens; who has ended gives its blocks back

Its scheduler ("fifo") and its safety margin (15 % of the blocks stay free of new prompts) are left
as they are. The overlap of host and device is off: a step's memory is looked at when it is over.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch
import transformers

from pagelab.config import format_bytes
from pagelab.lab.methods.block_recording import BlockRecorder, HeldBlocks
from pagelab.lab.methods.hf_model import TransformersMethod
from pagelab.lab.methods.hf_paged_cache import (
    PADDING_BLOCKS,
    PagedCache,
    blocks_in_budget,
    read_paged_cache,
)
from pagelab.lab.methods.recording import micro, request_result, wait_until, workload_run
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.results import KVCapacity, Preemption, RequestResult, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest

_MIN_BLOCK_SIZE = 4  # transformers' own bound


class HfContinuousBatching(TransformersMethod):
    """As many requests as the blocks hold, each step with whoever is there."""

    manager: Any
    processor: Any
    cache: PagedCache

    def setup(self) -> KVCapacity:
        """Load the model and have transformers lay out a cache of the budget."""
        self._check_versions()
        self.load_model()
        self._make_cache()
        slots = self.cache.num_blocks * self.cache.block_size
        for workload in (self.job.warm_up, *self.job.workloads):
            for request in workload.requests:
                if request.total_tokens - 1 > slots:
                    raise MethodUnavailableError(
                        f"{request.id} ({request.total_tokens} tokens) can never fit into "
                        f"{self.cache.num_blocks} blocks of {self.cache.block_size} slots: "
                        "raise --kv-memory"
                    )
        sharing = "shared" if self.cache.shares_prefixes else "not shared"
        return {
            "bytes": self.cache.tensor_bytes,
            "slots": slots,
            "num_blocks": self.cache.num_blocks,
            "block_size": self.cache.block_size,
            "device": str(self.device),
            "note": f"{self.cache.num_blocks} blocks of {self.cache.block_size} slots and "
            f"{PADDING_BLOCKS} for padding, as transformers {transformers.__version__} laid "
            f"them out; prefixes are {sharing}; attention: "
            f"{self.model.config._attn_implementation}",
        }

    def warm_up(self) -> None:
        """transformers' own warm-up (it captures graphs, where there are any), then ours."""
        with torch.no_grad():
            self.manager.warmup()
        super().warm_up()

    def run(self, workload: Workload) -> WorkloadRun:
        """Add requests as they arrive, and step until all have ended."""
        self.seed()
        drive = _Drive(self, workload)
        with torch.no_grad():
            drive.serve()
        return drive.result()

    def _check_versions(self) -> None:
        job = self.job
        version = transformers.__version__
        if not hasattr(transformers, "ContinuousBatchingConfig"):
            raise MethodUnavailableError(
                f"transformers {version} has no ContinuousBatchingConfig: install 5.17 to 5.23"
            )
        if job.block_size < _MIN_BLOCK_SIZE:
            raise MethodUnavailableError(
                f"transformers' paged cache takes blocks of {_MIN_BLOCK_SIZE} slots at least, "
                f"not {job.block_size}: raise --block-size"
            )

    def _make_cache(self) -> None:
        job = self.job
        bytes_per_block = job.block_size * self.bytes_per_token
        num_blocks = blocks_in_budget(job.kv_memory, bytes_per_block)
        if num_blocks == 0:
            raise MethodUnavailableError(
                f"the KV budget of {format_bytes(job.kv_memory)} holds no block beside the "
                f"{PADDING_BLOCKS} that transformers' paged cache keeps for padding "
                f"({format_bytes(bytes_per_block)} each): raise --kv-memory or lower --block-size"
            )
        try:
            sampling = copy.deepcopy(self.model.generation_config)
            sampling.eos_token_id = -1  # their word for none; they warn of any other
            self.manager = self.model.init_continuous_batching(
                generation_config=sampling,
                continuous_batching_config=_configuration(
                    num_blocks=num_blocks,
                    block_size=job.block_size,
                    max_batch_tokens=job.max_num_batched_tokens,
                ),
            )
            with torch.no_grad():
                self.processor = self.manager._create_batch_processor()
            self.manager.batch_processor = self.processor
        except MemoryError as error:
            raise MethodUnavailableError(
                f"transformers finds no memory for it: {error}; lower --kv-memory or "
                "--max-num-batched-tokens (its attention mask has one value for each pair)"
            ) from error
        except (AttributeError, TypeError) as error:
            raise MethodUnavailableError(
                f"continuous batching of transformers {transformers.__version__} is not as "
                f"expected ({error}): install 5.17 to 5.23"
            ) from error
        self.cache = read_paged_cache(self.processor.cache)


def _configuration(*, num_blocks: int, block_size: int, max_batch_tokens: int) -> Any:
    kind = transformers.ContinuousBatchingConfig
    known = {field.name for field in dataclasses.fields(kind)}
    # 5.17 says block_size, 5.23 page_size (and warns about the old name)
    named = {"page_size" if "page_size" in known else "block_size": block_size}
    return kind(
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        use_async_batching=False,
        **named,
    )


@dataclasses.dataclass(slots=True)
class _Served:
    """One request on its way."""

    index: int
    asked: WorkloadRequest
    state: Any = None  # transformers' state of it while it holds blocks; a new one after preemption
    written: int = 0
    max_written: int = 0
    first_scheduled: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0
    recomputed: int = 0
    result: RequestResult | None = None


class _Drive:
    """One workload: transformers' loop, and what is written down about it."""

    def __init__(self, method: HfContinuousBatching, workload: Workload) -> None:
        self._method, self._workload = method, workload
        self._processor, self._cache = method.processor, method.cache
        self._recorder = BlockRecorder(self._cache.num_blocks, self._cache.block_size)
        self._served = {
            request.id: _Served(index, request) for index, request in enumerate(workload.requests)
        }
        self._holding: dict[str, _Served] = {}  # those that hold blocks
        self._unfinished = self._done = 0
        self._preemptions: list[Preemption] = []
        self._queries = self._hits = 0
        self._duration = 0.0
        self._started = time.perf_counter()

    def serve(self) -> None:
        """Until every request has ended."""
        queue = list(self._workload.requests)
        self._started = time.perf_counter()
        while queue or self._unfinished:
            while queue and queue[0].arrival_s <= self._now():
                self._add(queue.pop(0))
            if self._unfinished:
                self._step()
            elif queue:
                wait_until(self._started, queue[0].arrival_s)
        self._duration = self._now()
        self._method.reporter.stage(f"{self._workload.name}: batch complete")

    def result(self) -> WorkloadRun:
        """Everything about the workload."""
        results = [served.result for served in self._served.values()]
        return workload_run(
            self._workload,
            [result for result in results if result is not None],
            self._recorder.finish(),
            self._cache.num_blocks * self._cache.block_size,
            duration_s=self._duration,
            block_events=self._recorder.block_events,
            preemptions=self._preemptions,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _add(self, request: WorkloadRequest) -> None:
        self._method.manager.add_request(
            list(request.token_ids),
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            eos_token_id=-1,
        )
        self._unfinished += 1

    def _step(self) -> None:
        processor = self._processor
        try:
            ready = processor.prepare_next_batch()
        except RuntimeError as error:  # nobody can run, and nobody can be preempted
            raise MethodUnavailableError(f"{error} Raise --kv-memory") from error
        scheduled_at = self._now()
        if not ready:
            self._collect()
            assert not self._unfinished, "transformers has nothing to do, and requests wait"
            return
        batch = list(processor.inputs_and_outputs.requests_in_batch)
        processor._generation_step(self._method.model)
        held = self._look({f.state.request_id: f.query_length for f in batch}, scheduled_at)
        first = self._cache.first_block()
        cached = [block_id - first for block_id in self._cache.cached_blocks()]
        waiting = len(processor.scheduler.waiting_requests)
        processor.update_batch()
        now = self._now()
        self._recorder.record(
            now,
            held,
            cached,
            new_tokens=sum(f.query_length for f in batch),
            waiting=waiting,
        )
        for future in batch:
            if future.has_new_token:
                self._served[future.state.request_id].token_times.append(now)
                self._done += 1
        self._method.reporter.progress(
            self._workload.name, self._done, self._workload.output_tokens
        )
        self._collect()

    def _look(self, scheduled: dict[str, int], scheduled_at: float) -> dict[int, HeldBlocks]:
        """Who holds what, now that the forward pass is over; notices preemptions first."""
        active = self._processor.scheduler.active_requests
        for served in list(self._holding.values()):
            if active.get(served.asked.id) is not served.state:
                self._preempted(served)
        first = self._cache.first_block()
        held: dict[int, HeldBlocks] = {}
        for request_id, table in self._cache.tables().items():
            served = self._served[request_id]
            state, count = active[request_id], scheduled.get(request_id, 0)
            served.written = state.position_offset
            start = served.written - count
            if served.state is None:
                self._admitted(served, state, start)
            served.recomputed += max(0, min(served.written, served.max_written) - start)
            served.max_written = max(served.max_written, served.written)
            if count and served.first_scheduled is None:
                served.first_scheduled = scheduled_at
            held[served.index] = HeldBlocks([b - first for b in table], served.written)
        return held

    def _admitted(self, served: _Served, state: Any, found: int) -> None:
        """It got blocks; `found` of its tokens were in them already."""
        if self._cache.shares_prefixes:
            self._queries += len(state.initial_tokens)
            self._hits += found
        if served.max_written == 0:
            served.cached_tokens = found
        served.state = state
        self._holding[served.asked.id] = served

    def _preempted(self, served: _Served) -> None:
        self._preemptions.append(
            {
                "step": self._recorder.num_steps,
                "request": served.asked.id,
                "tokens": served.written,
            }
        )
        self._release(served)
        served.preemptions += 1
        served.written = 0

    def _release(self, served: _Served) -> None:
        """It has given its blocks back."""
        self._recorder.release(served.index, served.written)
        del self._holding[served.asked.id]
        served.state = None

    def _collect(self) -> None:
        """Take the requests that have ended."""
        router = self._method.manager.output_router
        while not router.output_queue.empty():
            output = router.output_queue.get()
            served = self._served[output.request_id]
            served.result = _result(served, output, self._now())
            self._unfinished -= 1
            if served.state is not None:
                self._release(served)
            bytes_per_token = self._method.bytes_per_token
            self._method.reporter.stage(
                f"{self._workload.name}: request {served.index + 1} done",
                # as it was while the request still had its blocks
                kv_allocated_bytes=self._recorder.allocated * bytes_per_token,
                kv_live_bytes=self._recorder.live * bytes_per_token,
            )


def _result(served: _Served, output: Any, now: float) -> RequestResult:
    tokens = list(output.generated_tokens)
    times = served.token_times
    scheduled = now if served.first_scheduled is None else served.first_scheduled
    result = request_result(served.asked, tokens, times or [now], scheduled)
    result["cached_tokens"] = served.cached_tokens
    result["preemptions"] = served.preemptions
    result["recomputed_tokens"] = served.recomputed
    if output.error is not None:
        result["finish_reason"], result["error"] = "error", str(output.error)
        result["token_times_s"] = [micro(t) for t in times[: len(tokens)]]
        result["finish_s"] = micro(now)
    return result
