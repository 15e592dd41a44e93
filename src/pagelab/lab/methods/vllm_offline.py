"""`vllm`: vLLM's offline engine, driven step by step, where it is installed.

::

    this process                              vLLM's own process
      LLM(…), one budget of K/V bytes           scheduler, model, K/V blocks
      add_request, as they arrive  ──────────▶
      step()  ◀── new tokens, statistics ─────  one step of its scheduler

`LLM.generate` is the same loop without arrivals. vLLM's settings are its own (prefix cache,
compilation, CUDA graphs, asynchronous scheduling), but for the model, the dtype, the lengths, the
seed and the budget. Written for vLLM 0.26.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagelab.config import format_bytes
from pagelab.lab.methods.base import Method, Reporter
from pagelab.lab.methods.recording import micro, request_result, wait_until, workload_run
from pagelab.lab.methods.vllm_ledger import Decoding, SchedulerReport, VllmRecorder
from pagelab.lab.protocol import Job, MethodUnavailableError
from pagelab.models.fetch import ModelSource, resolve
from pagelab.models.registry import load_spec
from pagelab.models.spec import ModelSpec
from pagelab.results import KVCapacity, Preemption, RequestResult, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest

ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is the experiment's
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit that, and threads' locks
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set where it is not set yet, before vLLM is imported."""


class Vllm(Method):
    """Continuous batching on vLLM's paged cache."""

    llm: Any
    num_blocks: int
    block_size: int
    bytes_per_token: int

    def __init__(self, job: Job, reporter: Reporter) -> None:
        """Import vLLM, so that it counts as importing."""
        super().__init__(job, reporter)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            self._vllm: Any = importlib.import_module("vllm")
            self._engine_class: Any = self._vllm.LLM  # its import is put off until it is asked for
            kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
            self._as_they_come: Any = kinds.DELTA
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise MethodUnavailableError(f"vllm lacks what it needs: {error}") from error
            raise MethodUnavailableError(
                "vllm is not installed: pip install vllm (it wants a GPU and a torch of its own "
                "version), or leave it out of --methods"
            ) from error
        except (ImportError, OSError) as error:
            raise MethodUnavailableError(f"vllm is installed and does not load: {error}") from error

    def setup(self) -> KVCapacity:
        """Start vLLM with the job's budget, and ask it what it made of it."""
        job = self.job
        source = resolve(job.model)
        spec = load_spec(source)
        self.bytes_per_token = spec.kv_layout(job.dtype, 1).bytes_per_token
        self._check_lengths()
        self._check_device()
        with _hf_folder(source, spec, job.dtype) as folder:
            self.llm = self._start(folder)
        engine = self.llm.llm_engine
        if getattr(engine, "logger_manager", None) is None:
            raise MethodUnavailableError(
                f"vllm {self._vllm.__version__} gives no statistics of its steps: install 0.26"
            )
        cache = engine.vllm_config.cache_config
        self.num_blocks, self.block_size = int(cache.num_gpu_blocks), int(cache.block_size)
        slots = self.num_blocks * self.block_size
        return {
            "bytes": slots * self.bytes_per_token,
            "slots": slots,
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "device": _device_of_vllm() or "unknown",
            "note": f"{self.num_blocks} blocks of {self.block_size} slots, as vllm "
            f"{self._vllm.__version__} says; one of them is its null block, never given out "
            "(counted as internal); blocks in use by its own statistics, the tails of last blocks "
            "by the requests' lengths; what its prefix cache keeps counts as free",
        }

    def run(self, workload: Workload) -> WorkloadRun:
        """Add requests as they arrive, and step until all have ended."""
        return _Drive(self, workload).serve()

    def sampling(self, request: WorkloadRequest) -> Any:
        """Exactly `max_tokens`, told as they come; the engine's seed is the job's."""
        return self._vllm.SamplingParams(
            temperature=self.job.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._as_they_come,
        )

    def _check_lengths(self) -> None:
        """vLLM stops requests at the maximum length, and starts only if one such fits."""
        job = self.job
        needed = -(-job.max_model_len // job.block_size) + 1  # and the null block
        if needed * job.block_size * self.bytes_per_token > job.kv_memory:
            raise MethodUnavailableError(
                f"vllm starts only with room for one request of --max-model-len "
                f"{job.max_model_len} ({needed} blocks of {job.block_size} slots), and "
                f"{format_bytes(job.kv_memory)} is less: raise --kv-memory or lower "
                "--max-model-len"
            )
        for workload in (job.warm_up, *job.workloads):
            for request in workload.requests:
                if request.total_tokens > job.max_model_len:
                    raise MethodUnavailableError(
                        f"{request.id} needs {request.total_tokens} tokens, more than "
                        f"{job.max_model_len}: raise --max-model-len"
                    )

    def on_gpu(self) -> bool:
        """The model is in a process of vLLM's own."""
        return _device_of_vllm() == "cuda"

    def _check_device(self) -> None:
        """An installation of vLLM runs on one kind of device, and there on the first one."""
        own = _device_of_vllm()
        if own is None:
            return
        asked, _, index = self.job.device.partition(":")
        if asked == "auto":  # as the other methods take it
            import torch

            asked = "cuda" if torch.cuda.is_available() else "cpu"
        if asked != own:
            raise MethodUnavailableError(
                f"the vllm that is installed runs on {own}, and the other methods on {asked}: "
                f"leave it out of --methods, or say --device {own}"
            )
        if index not in ("", "0"):
            raise MethodUnavailableError(
                f"vllm takes the first GPU: set CUDA_VISIBLE_DEVICES={index} instead of --device "
                f"{self.job.device}"
            )

    def _start(self, folder: Path) -> Any:
        job = self.job
        try:
            return self._engine_class(
                model=str(folder),
                dtype=job.dtype,
                seed=job.seed,
                max_model_len=job.max_model_len,
                max_num_batched_tokens=job.max_num_batched_tokens,
                block_size=job.block_size,
                kv_cache_memory_bytes=job.kv_memory,
                skip_tokenizer_init=True,  # prompts are token ids
                disable_log_stats=False,
            )
        except Exception as error:  # of many kinds; the engine's own are told by its log
            raise MethodUnavailableError(
                f"vllm {self._vllm.__version__} does not start with --dtype {job.dtype}, "
                f"--block-size {job.block_size}, --max-model-len {job.max_model_len} and "
                f"--kv-memory {format_bytes(job.kv_memory)}: {type(error).__name__}: {error}"
            ) from error


def _device_of_vllm() -> str | None:
    """`cuda` or `cpu`; None where vLLM does not say."""
    try:
        return str(importlib.import_module("vllm.platforms").current_platform.device_type)
    except (ImportError, AttributeError):
        return None


@contextlib.contextmanager
def _hf_folder(source: ModelSource, spec: ModelSpec, dtype: str) -> Iterator[Path]:
    """The model as a folder that vLLM reads; a GGUF is written as one, and deleted afterwards."""
    if source.kind == "folder":
        yield source.path
        return
    from pagelab.models.hf_export import to_transformers

    folder = Path(tempfile.mkdtemp(prefix="pagelab-vllm-"))
    try:
        to_transformers(source, spec, dtype=dtype).save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(slots=True)
class _Served:
    """One request on its way."""

    index: int
    asked: WorkloadRequest
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    scheduled: float | None = None
    cached_tokens: int = 0
    preempted: list[tuple[float, int]] = field(default_factory=list)  # (when, tokens given back)
    reason: str | None = None  # why it ended, once it has
    finished: float = 0.0

    def decoding(self) -> Decoding:
        """The newest token has no K/V yet; the last one never gets any."""
        prompt = len(self.asked.token_ids)
        return Decoding(prompt + len(self.tokens) - 1, prompt + self.asked.max_tokens - 1)


class _Drive:
    """One workload: vLLM's loop, and what is written down about it."""

    def __init__(self, method: Vllm, workload: Workload) -> None:
        self._method, self._workload = method, workload
        self._engine = method.llm.llm_engine
        self._recorder = VllmRecorder(method.num_blocks, method.block_size)
        self._served: dict[str, _Served] = {}
        self._internal: dict[str, _Served] = {}  # by the id that vLLM gave it
        self._unfinished: dict[str, _Served] = {}  # in order of arrival
        self._report: SchedulerReport | None = None
        self._done = 0
        self._started = self._clock = 0.0

    def serve(self) -> WorkloadRun:
        """Until every request has ended."""
        with self._listening():
            queue = list(self._workload.requests)
            # vLLM's processes stamp events with this clock, which Linux shares among them
            self._started, self._clock = time.perf_counter(), time.monotonic()
            while queue or self._engine.has_unfinished_requests():
                while queue and queue[0].arrival_s <= self._now():
                    self._add(queue.pop(0))
                if self._engine.has_unfinished_requests():
                    self._step()
                elif queue:
                    wait_until(self._started, queue[0].arrival_s)
            duration = self._now()
        self._method.reporter.stage(f"{self._workload.name}: batch complete")
        recomputed = self._recomputed()
        return workload_run(
            self._workload,
            [_result(served, recomputed) for served in self._served.values()],
            self._recorder.steps,
            self._method.num_blocks * self._method.block_size,
            duration_s=duration,
            preemptions=self._preemptions(),
            prefix_queries=self._recorder.prefix_queries,
            prefix_hits=self._recorder.prefix_hits,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Hear what vLLM tells its own loggers and output processor.

        `get_metrics` would tell part of it, but collects every histogram at each call.
        """
        manager, processor = self._engine.logger_manager, self._engine.output_processor
        record, process = manager.record, processor.process_outputs

        def heard(scheduler_stats: Any, iteration_stats: Any, *rest: Any, **named: Any) -> Any:
            if scheduler_stats is not None:
                self._report = _report(scheduler_stats)
            return record(scheduler_stats, iteration_stats, *rest, **named)

        def processed(outputs: Any, *rest: Any, **named: Any) -> Any:
            self._hear_events(outputs)
            return process(outputs, *rest, **named)

        manager.record, processor.process_outputs = heard, processed
        try:
            yield
        finally:
            manager.record, processor.process_outputs = record, process

    def _hear_events(self, outputs: Any) -> None:
        """A request's events come with its next token, so before that token is counted."""
        for output in outputs:
            served = self._internal.get(output.request_id)
            if served is None:  # of an earlier workload
                continue
            for event in output.events or ():
                if event.type.name == "PREEMPTED":
                    when = event.timestamp - self._clock
                    given_back = served.decoding().written if served.tokens else 0
                    served.preempted.append((when, given_back))
                elif event.type.name == "SCHEDULED" and served.scheduled is None:
                    served.scheduled = event.timestamp - self._clock

    def _add(self, request: WorkloadRequest) -> None:
        served = _Served(len(self._served), request)
        self._served[request.id] = self._unfinished[request.id] = served
        internal = self._engine.add_request(
            request.id,
            {"prompt_token_ids": list(request.token_ids)},
            self._method.sampling(request),
        )
        self._internal[internal or request.id] = served

    def _step(self) -> None:
        outputs = self._engine.step()
        now = self._now()
        new_tokens = 0
        for output in outputs:
            served = self._served[output.request_id]
            fresh = list(output.outputs[0].token_ids)
            if fresh and not served.tokens:
                served.cached_tokens = output.num_cached_tokens or 0
                new_tokens += len(served.asked.token_ids) - served.cached_tokens - 1
            new_tokens += len(fresh)
            served.tokens += fresh
            served.times += [now] * len(fresh)
            self._done += len(fresh)
            if output.finished:
                served.reason, served.finished = str(output.outputs[0].finish_reason), now
                del self._unfinished[output.request_id]
        report, self._report = self._report, None
        if report is not None:
            decoding = [served.decoding() for served in self._unfinished.values() if served.tokens]
            self._recorder.record(now, report, decoding, new_tokens)
        reporter = self._method.reporter
        reporter.progress(self._workload.name, self._done, self._workload.output_tokens)
        for output in outputs:
            if output.finished:
                reporter.stage(
                    f"{self._workload.name}: request {self._served[output.request_id].index + 1}"
                    " done",
                    kv_allocated_bytes=self._recorder.allocated * self._method.bytes_per_token,
                    kv_live_bytes=self._recorder.live * self._method.bytes_per_token,
                )

    def _preemptions(self) -> list[Preemption]:
        found = [
            (when, served.asked.id, tokens)
            for served in self._served.values()
            for when, tokens in served.preempted
        ]
        return [
            {"step": self._recorder.step_at(when), "request": request_id, "tokens": tokens}
            for when, request_id, tokens in sorted(found)
        ]

    def _recomputed(self) -> dict[str, int]:
        """Tokens computed again, by request: given back, less what the prefix cache kept.

        vLLM tells what it kept for all of them together; it is set off in order of time, so the
        sum is right and the shares are not quite.
        """
        kept = self._recorder.preempted_hits
        again: dict[str, int] = {}
        for preemption in self._preemptions():
            found = min(kept, preemption["tokens"])
            kept -= found
            request_id = preemption["request"]
            again[request_id] = again.get(request_id, 0) + preemption["tokens"] - found
        return again


def _report(stats: Any) -> SchedulerReport:
    prefix = stats.prefix_cache_stats
    return SchedulerReport(
        usage=stats.kv_cache_usage,
        running=stats.num_running_reqs,
        waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
        prefix_queries=prefix.queries + prefix.preempted_queries,
        prefix_hits=prefix.hits + prefix.preempted_hits,
        preempted_hits=prefix.preempted_hits,
    )


def _result(served: _Served, recomputed: dict[str, int]) -> RequestResult:
    scheduled = served.finished if served.scheduled is None else max(0.0, served.scheduled)
    result = request_result(
        served.asked, served.tokens, served.times or [served.finished], scheduled
    )
    result["finish_s"] = micro(served.finished)
    result["cached_tokens"] = served.cached_tokens
    result["preemptions"] = len(served.preempted)
    result["recomputed_tokens"] = recomputed.get(served.asked.id, 0)
    if served.reason != "length":
        result["finish_reason"] = "error"
        result["error"] = f"vllm ended it: {served.reason}"
        if not served.times:
            result["token_times_s"] = []
    return result
