"""`hf-generate`, the traditional method: transformers' `generate()`, one request after another."""

from __future__ import annotations

import time

from pagelab.lab.methods.base import Reporter
from pagelab.lab.methods.hf_model import OnToken, TransformersMethod
from pagelab.lab.methods.recording import StepRecorder, request_result, wait_until, workload_run
from pagelab.results import KVCapacity, RequestResult, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest


class HfGenerate(TransformersMethod):
    """One request at a time, on transformers' default cache.

    The cache grows by concatenation, so what is allocated is what is live: the running
    request's tokens. Nothing is wasted, and nobody else runs.
    """

    def setup(self) -> KVCapacity:
        """Load the model; the cache is allocated request by request."""
        self.load_model()
        return {
            "bytes": self.pool * self.bytes_per_token,
            "slots": self.pool,
            "num_blocks": None,
            "block_size": None,
            "device": str(self.device),
            "note": "one request at a time; its cache grows by concatenation, and nothing holds "
            "it to the budget (each step copies a layer's K/V, which takes that much more "
            "for a moment)",
        }

    def run(self, workload: Workload) -> WorkloadRun:
        """Generate for one request after another, in order of arrival."""
        self.seed()
        recorder = StepRecorder(self.pool)
        results: list[RequestResult] = []
        total, done = workload.output_tokens, 0
        started = time.perf_counter()
        for index, request in enumerate(workload.requests):
            wait_until(started, request.arrival_s)
            begun = time.perf_counter() - started
            arrived = [r for r in workload.requests[index + 1 :] if r.arrival_s <= begun]
            watch = _Watch(
                started, request, recorder, self.reporter, workload.name, done, total, len(arrived)
            )
            (tokens,) = self.generate([list(request.token_ids)], request.max_tokens, watch)
            done += len(tokens)
            results.append(request_result(request, tokens, watch.times, begun))
            live = (len(request.token_ids) + len(tokens) - 1) * self.bytes_per_token
            self.reporter.stage(
                f"{workload.name}: request {index + 1} done",
                kv_allocated_bytes=live,
                kv_live_bytes=live,
            )
        duration = time.perf_counter() - started
        self.reporter.stage(f"{workload.name}: batch complete")
        return workload_run(workload, results, recorder.steps, self.pool, duration_s=duration)


class _Watch(OnToken):
    """Writes down every step of one request."""

    def __init__(
        self,
        started: float,
        request: WorkloadRequest,
        recorder: StepRecorder,
        reporter: Reporter,
        workload: str,
        done: int,
        total: int,
        waiting: int,
    ) -> None:
        super().__init__(started)
        self._prompt = len(request.token_ids)
        self._recorder, self._reporter = recorder, reporter
        self._workload, self._done, self._total = workload, done, total
        self._waiting = waiting

    def token(self, t: float, count: int) -> None:
        """The newest token has no K/V yet: it is computed by the next step, if there is one."""
        self._recorder.record(
            t,
            new_tokens=self._prompt if count == 1 else 1,
            running=1,
            waiting=self._waiting,
            live=self._prompt + count - 1,
        )
        self._reporter.progress(self._workload, self._done + count, self._total)
