"""`hf-static`: padded batches on transformers' preallocated `StaticCache`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import transformers
from transformers import StaticCache

from pagelab.config import format_bytes
from pagelab.lab.methods.base import Reporter
from pagelab.lab.methods.hf_model import OnToken, TransformersMethod
from pagelab.lab.methods.recording import StepRecorder, request_result, wait_until, workload_run
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.results import KVCapacity, RequestResult, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CACHE_ARGUMENT = "cache" if _VERSION >= (5, 24) else "past_key_values"  # renamed there


class HfStatic(TransformersMethod):
    """As many rows as the budget holds at the maximum length, each padded on the left.

    ::

        row 0  |pad|pad| prompt          | output      | surplus | never written  |
        row 1  | prompt                  | output                | never written  |
               └───────────────────── max_model_len slots a row ──────────────────┘
                                                       ▲ row 0's request has ended; its row
                                                         goes on until the batch does

    The batch runs until its longest request ends; what the other rows generate beyond their
    own end is thrown away, and no new request takes their place. That is the method's price.
    """

    rows: int

    def setup(self) -> KVCapacity:
        """Load the model, if the budget holds at least one row."""
        self.load_model()
        length = self.job.max_model_len
        row_bytes = length * self.bytes_per_token
        self.rows = self.job.kv_memory // row_bytes
        if self.rows == 0:
            raise MethodUnavailableError(
                f"the KV budget of {format_bytes(self.job.kv_memory)} holds no row of {length} "
                f"tokens ({format_bytes(row_bytes)}): raise --kv-memory or lower --max-model-len"
            )
        return {
            "bytes": self.rows * row_bytes,
            "slots": self.pool,
            "num_blocks": None,
            "block_size": None,
            "device": str(self.device),
            "note": f"{self.rows} {'row' if self.rows == 1 else 'rows'} of {length} slots, "
            "allocated for each batch; padding, and rows whose request has ended, count as "
            "internal waste, the rest of the budget as external while requests wait",
        }

    def run(self, workload: Workload) -> WorkloadRun:
        """Serve the requests in order of arrival, batch after batch."""
        self.seed()
        recorder = StepRecorder(self.pool)
        results: list[RequestResult] = []
        queue = list(workload.requests)
        total, done = workload.output_tokens, 0
        started = time.perf_counter()
        while queue:
            wait_until(started, queue[0].arrival_s)
            begun = time.perf_counter() - started
            batch = self._next_batch(queue, begun)
            del queue[: len(batch)]
            waiting = sum(request.arrival_s <= begun for request in queue)
            watch = _Watch(started, batch, waiting, self, recorder, workload.name, done, total)
            results += self._run_batch(batch, watch, begun)
            done += sum(request.max_tokens for request in batch)
            self.reporter.stage(
                f"{workload.name}: requests {len(results) - len(batch) + 1} to {len(results)} done"
                if len(batch) > 1
                else f"{workload.name}: request {len(results)} done",
                kv_allocated_bytes=watch.allocated * self.bytes_per_token,
                kv_live_bytes=watch.live * self.bytes_per_token,
            )
        duration = time.perf_counter() - started
        self.reporter.stage(f"{workload.name}: batch complete")
        return workload_run(workload, results, recorder.steps, self.pool, duration_s=duration)

    def _next_batch(self, queue: Sequence[WorkloadRequest], now: float) -> list[WorkloadRequest]:
        """The next requests that have arrived and whose padded lengths fit into the rows."""
        batch: list[WorkloadRequest] = []
        for request in queue[: self.rows]:
            together = [*batch, request]
            longest_prompt = max(len(r.token_ids) for r in together)
            longest_output = max(r.max_tokens for r in together)
            too_long = longest_prompt + longest_output > self.job.max_model_len
            if request.arrival_s > now or (batch and too_long):
                break
            batch.append(request)
        return batch

    def _run_batch(
        self, batch: list[WorkloadRequest], watch: _Watch, begun: float
    ) -> list[RequestResult]:
        outputs = self.generate(
            [list(request.token_ids) for request in batch],
            max(request.max_tokens for request in batch),
            watch,
            **{
                _CACHE_ARGUMENT: StaticCache(
                    config=self.model.config, max_cache_len=self.job.max_model_len
                )
            },
            # compiling takes longer than such a run, and on a CPU it did not pay
            disable_compile=True,
        )
        results = []
        for request, tokens in zip(batch, outputs, strict=True):
            count = request.max_tokens
            results.append(request_result(request, tokens[:count], watch.times[:count], begun))
        return results


class _Watch(OnToken):
    """Writes down every step of one batch."""

    def __init__(
        self,
        started: float,
        batch: list[WorkloadRequest],
        waiting: int,
        method: HfStatic,
        recorder: StepRecorder,
        workload: str,
        done: int,
        total: int,
    ) -> None:
        super().__init__(started)
        self._batch, self._waiting = batch, waiting
        self._recorder = recorder
        self._reporter: Reporter = method.reporter
        self._workload, self._done, self._total = workload, done, total
        self._length = method.job.max_model_len
        self.allocated = len(batch) * self._length
        # what the rows leave of the budget is of no use to those who wait
        self._external = method.pool - self.allocated if waiting else 0
        self.live = 0

    def token(self, t: float, count: int) -> None:
        """The newest token of a row has no K/V yet; the last one never gets any."""
        running = [r for r in self._batch if count <= r.max_tokens]
        self.live = sum(len(r.token_ids) + count - 1 for r in running)
        finally_live = sum(len(r.token_ids) + r.max_tokens - 1 for r in running)
        self._recorder.record(
            t,
            new_tokens=sum(len(r.token_ids) for r in running) if count == 1 else len(running),
            running=len(running),
            waiting=self._waiting,
            live=self.live,
            reserved=finally_live - self.live,
            internal=self.allocated - finally_live,
            external=self._external,
        )
        done = sum(min(count, r.max_tokens) for r in self._batch)
        self._reporter.progress(self._workload, self._done + done, self._total)
