"""Fake methods, run in real processes by other tests, and hand-made results.

The classes here are named to the worker as `tests.unit.test_lab_fakes:Class`.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from pagelab.lab.methods.base import Method
from pagelab.lab.methods.recording import StepRecorder, wait_until
from pagelab.lab.methods.recording import request_result as make_request_result
from pagelab.lab.methods.recording import workload_run as make_workload_run
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.results import (
    Axis,
    ExperimentInfo,
    KVCapacity,
    LedgerSummary,
    MethodRun,
    RequestResult,
    RunSettings,
    Status,
    WorkloadRun,
)
from pagelab.workloads import Workload

POOL = 1000


class Honest(Method):
    """Answers each request with its prompt's first token, in no time, in one slot each."""

    def setup(self) -> KVCapacity:
        return {
            "bytes": POOL * 10,
            "slots": POOL,
            "num_blocks": None,
            "block_size": None,
            "note": "fake",
        }

    def token(self, request: int, position: int, first: int) -> int:
        return first

    def run(self, workload: Workload) -> WorkloadRun:
        recorder, results = StepRecorder(POOL), []
        started = time.perf_counter()
        done = 0
        for index, request in enumerate(workload.requests):
            wait_until(started, request.arrival_s)
            begun = time.perf_counter() - started
            tokens, times = [], []
            for position in range(request.max_tokens):
                tokens.append(self.token(index, position, request.token_ids[0]))
                times.append(time.perf_counter() - started)
                done += 1
                self.reporter.progress(workload.name, done, workload.output_tokens)
                recorder.record(
                    times[-1], new_tokens=1, running=1, waiting=0, live=position + 1, internal=3
                )
            results.append(make_request_result(request, tokens, times, begun))
            self.reporter.stage(
                f"{workload.name}: request {index + 1} done",
                kv_allocated_bytes=40,
                kv_live_bytes=10,
            )
        duration = time.perf_counter() - started
        return make_workload_run(workload, results, recorder.steps, POOL, duration_s=duration)


class Noisy(Honest):
    """Prints where the protocol is."""

    def setup(self) -> KVCapacity:
        print("a library greets you")  # noqa: T201
        os.write(1, b"{not an event\n")
        sys.stdout.write("no newline")
        return super().setup()


class Different(Honest):
    """Departs from the others in the second request's third token."""

    def token(self, request: int, position: int, first: int) -> int:
        return first + 1 if (request, position) == (1, 2) else first


class Unavailable(Honest):
    def setup(self) -> KVCapacity:
        raise MethodUnavailableError("needs a flux capacitor: raise --kv-memory")


class Raises(Honest):
    def run(self, workload: Workload) -> WorkloadRun:
        if workload.name == "second":
            raise RuntimeError("the tensors are of the wrong shape")
        return super().run(workload)


class Dies(Honest):
    """Killed from outside in the second workload, as by the kernel when memory runs out."""

    def run(self, workload: Workload) -> WorkloadRun:
        if workload.name == "second":
            sys.stderr.write("the last words\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(workload)


class Exits(Honest):
    def setup(self) -> KVCapacity:
        sys.stderr.write("a library gave up\n")
        os._exit(7)


class Hangs(Honest):
    """Never says anything in the second workload; ignores polite requests to end."""

    def run(self, workload: Workload) -> WorkloadRun:
        if workload.name == "second":
            time.sleep(600)
        return super().run(workload)


class Lies(Honest):
    """Its ledger does not add up."""

    def run(self, workload: Workload) -> WorkloadRun:
        run = super().run(workload)
        run["steps"]["free"][-1] -= 1
        return run


class RunsOut(Honest):
    def setup(self) -> KVCapacity:
        raise MemoryError


def request_result(
    request_id: str, tokens: list[int], times: list[float], arrival: float = 0.0
) -> RequestResult:
    """A finished request by hand."""
    return {
        "id": request_id,
        "output_token_ids": tokens,
        "finish_reason": "length",
        "arrival_s": arrival,
        "first_scheduled_s": arrival,
        "first_token_s": times[0] if times else arrival,
        "finish_s": times[-1] if times else arrival,
        "token_times_s": times,
        "cached_tokens": 0,
        "preemptions": 0,
        "recomputed_tokens": 0,
    }


def workload_run(
    name: str,
    requests: list[RequestResult],
    *,
    duration: float = 1.0,
    live: float = 0.5,
    internal: float = 0.0,
    running: float = 1.0,
) -> WorkloadRun:
    """A workload by hand, without steps."""
    output = sum(len(request["output_token_ids"]) for request in requests)
    ledger: LedgerSummary = {
        "live": live,
        "reserved": 0.0,
        "internal": internal,
        "cached": 0.0,
        "free": 1.0 - live - internal,
        "external": 0.0,
        "rounding": 0.0,
        "shared_saved": 0.0,
        "mean_running": running,
        "peak_running": int(running),
        "peak_live_slots": 0,
        "peak_allocated_slots": 0,
    }
    return {
        "name": name,
        "duration_s": duration,
        "prompt_tokens": 0,
        "output_tokens": output,
        "output_tokens_per_s": output / duration,
        "requests": requests,
        "steps": StepRecorder(POOL).steps,
        "ledger": ledger,
        "block_events": [],
        "preemptions": [],
        "num_preemptions": 0,
        "recomputed_tokens": 0,
        "prefix_queries": 0,
        "prefix_hits": 0,
    }


def method_run(
    label: str,
    workloads: list[WorkloadRun],
    *,
    repeat: int = 0,
    status: Status = "ok",
    peak: int | None = 100,
    reason: str | None = None,
    axis: Axis = "budget",
    settings: RunSettings | None = None,
    simulated: bool = False,
) -> MethodRun:
    """A run by hand; `label` is a method or `pagelab allocator`, perhaps with its cell behind."""
    words = label.partition(",")[0].split()
    return {
        "method": words[0],
        "label": label,
        "phase": "paged" if words[1:] == ["paged"] else "traditional",
        "allocator": words[1] if len(words) > 1 else None,
        "axis": axis,
        "settings": settings or cell(),
        "simulated": simulated,
        "repeat": repeat,
        "status": status,
        "reason": reason,
        "pid": None,
        "startup": None,
        "kv": None,
        "snapshots": [],
        "memory": None,
        "peak_rss_bytes": peak,
        "peak_device_bytes": None,
        "workloads": workloads,
    }


BUDGET = 192 << 20


def cell(**values: object) -> RunSettings:
    """The base cell, with some settings of another."""
    base = {
        "kv_memory_bytes": BUDGET,
        "block_size": 16,
        "watermark": 0.05,
        "placement": "buddy",
        "max_num_seqs": None,
    }
    return {**base, **values}  # type: ignore[typeddict-item]


def experiment_info(**values: object) -> ExperimentInfo:
    """What was asked, by hand: the base cell alone."""
    asked: ExperimentInfo = {
        "command": "pagelab compare",
        "model": {
            "name": "fake",
            "source": "nowhere",
            "architecture": "llama",
            "num_parameters": 1000,
            "num_layers": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": 2,
            "vocab_size": 100,
            "kv_bytes_per_token": 16,
        },
        "dtype": "float32",
        "kv_memory_bytes": BUDGET,
        "block_size": 16,
        "watermark": 0.05,
        "placement": "buddy",
        "kv_memories": [BUDGET],
        "block_sizes": [16],
        "watermarks": [0.05],
        "placements": ["buddy"],
        "batch": None,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "repeats": 1,
        "seed": 0,
        "threads": 1,
        "sampling": "greedy",
        "temperature": 0.0,
        "objectives": {"ttft_s": None, "tpot_s": None, "e2e_s": None},
        "cost_model": None,
        "workloads": [],
    }
    return {**asked, **values}  # type: ignore[typeddict-item]
