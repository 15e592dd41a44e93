"""`pagelab bench latency`: how long one waits for the first token, and for each one after it."""

from __future__ import annotations

import dataclasses

from pagelab.bench.record import Record
from pagelab.bench.session import Stage, open_session
from pagelab.bench.settings import BenchSettings
from pagelab.bench.throughput import measure


def bench_latency(settings: BenchSettings, stage: Stage, command: str = "") -> Record:
    """Requests a few at a time, or as they arrive; percentiles of TTFT, ITL, TPOT and E2E.

    Without a concurrency and a rate, one request after another: what a single user sees.

    Args, returns and errors as `bench_throughput`.
    """
    if settings.concurrency is None and settings.workload.rate is None:
        settings = dataclasses.replace(settings, concurrency=1)
    return measure("latency", open_session(settings, stage), stage, command)
