"""Jobs and workloads for tests that run a method of the experiment in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagelab.lab.methods.base import Method, Reporter
from pagelab.lab.protocol import Channel, Job
from pagelab.lab.validate import problem_with
from pagelab.results import KVCapacity, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest


def workload(
    name: str, lengths: Sequence[tuple[int, int]], *, every_s: float = 0.0, vocab: int = 256
) -> Workload:
    """Requests of (prompt, output) tokens, one every so many seconds."""
    requests = tuple(
        WorkloadRequest(
            id=f"{name}-{i}",
            prompt_token_ids=tuple((17 * i + 5 * k) % vocab for k in range(prompt)),
            prompt_tokens=prompt,
            max_tokens=output,
            arrival_s=every_s * i,
        )
        for i, (prompt, output) in enumerate(lengths)
    )
    return Workload(name, name, requests)


def job(model: Path, *workloads: Workload, **options: Any) -> Job:
    """A small job; `options` are fields of it."""
    fields: dict[str, Any] = {
        "method": "under test",
        "allocator": None,
        "model": str(model),
        "dtype": "float32",
        "kv_memory": 1 << 20,
        "block_size": 8,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "watermark": 0.01,
        "threads": 1,
        "seed": 0,
        "temperature": 0.0,
        "warm_up": workload("warm-up", [(3, 2)]),
        "workloads": workloads,
    }
    return Job(**(fields | options))


def start(kind: type[Method], job: Job) -> tuple[Method, KVCapacity, io.StringIO]:
    """Make a method, set it up and warm it up, as the worker does; and what it reports."""
    told = io.StringIO()
    method = kind(job, Reporter(Channel(told)))
    capacity = method.setup()
    with method.reporter.muted():
        method.warm_up()
    return method, capacity, told


def run_all(kind: type[Method], job: Job) -> tuple[KVCapacity, list[WorkloadRun]]:
    """Run a job's workloads; everything it delivers is checked as the parent would."""
    method, capacity, _ = start(kind, job)
    runs = []
    for asked in job.workloads:
        run = method.run(asked)
        problem = problem_with(run, capacity, asked)
        assert problem is None, problem
        runs.append(run)
    return capacity, runs


def tokens(run: WorkloadRun) -> list[list[int]]:
    """Output tokens, request by request."""
    return [request["output_token_ids"] for request in run["requests"]]


def stages(told: io.StringIO) -> list[dict[str, Any]]:
    """The stages that a method has reported."""
    events = [json.loads(line) for line in told.getvalue().splitlines()]
    return [event for event in events if event["event"] == "stage"]
