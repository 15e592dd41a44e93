"""What a method is, and what it tells while it works."""

from __future__ import annotations

import dataclasses
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from pagelab.lab.protocol import Channel, Job
from pagelab.results import KVCapacity, WorkloadRun
from pagelab.workloads import Workload

RUNS_BEFORE_ON_GPU = 2
"""Of every workload: a shape's CUDA graph is captured when it comes for the second time."""


class Reporter:
    """Tells the parent about progress and memory. Cheap enough to be called at every step."""

    PROGRESS_EVERY_S = 0.1

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._last = 0.0
        self._muted = False

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Tell nothing meanwhile: a warm-up is no stage of the run."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def stage(
        self,
        label: str,
        *,
        kv_allocated_bytes: int = 0,
        kv_live_bytes: int = 0,
        device_bytes: int | None = None,
    ) -> None:
        """A named moment, with the K/V bytes in allocations and those that hold tokens.

        `device_bytes` is for where NVML does not know this process; None: what torch's allocator
        has of a GPU.
        """
        if self._muted:
            return
        if device_bytes is None:
            device_bytes = _bytes_of_torch()
        self._channel.send(
            {
                "event": "stage",
                "label": label,
                "t": time.time(),
                "kv_allocated_bytes": kv_allocated_bytes,
                "kv_live_bytes": kv_live_bytes,
                "device_bytes": device_bytes,
            }
        )

    def progress(self, workload: str, done: int, total: int) -> None:
        """Output tokens so far; told a few times a second at most, and at the end."""
        now = time.monotonic()
        due = done >= total or now - self._last >= self.PROGRESS_EVERY_S
        if due and not self._muted:
            self._last = now
            self._channel.send(
                {"event": "progress", "workload": workload, "done": done, "total": total}
            )


def _gpu_in_use() -> bool:
    """Whether this process computes on a GPU: then it has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _bytes_of_torch() -> int | None:
    return int(sys.modules["torch"].cuda.memory_reserved()) if _gpu_in_use() else None


def _backwards(workload: Workload) -> Workload:
    """The same lengths, all there at the start, with every prompt's tokens in reverse order."""
    requests = tuple(
        dataclasses.replace(
            request, prompt_token_ids=request.token_ids[::-1], prompt_text=None, arrival_s=0.0
        )
        for request in workload.requests
    )
    return dataclasses.replace(workload, requests=requests)


class Method(ABC):
    """One way of serving requests. The worker calls `setup`, `warm_up`, then `run` repeatedly.

    Raise `MethodUnavailableError` from `setup` when it cannot run here, with the reason and the
    option to change; any other exception is a failure.
    """

    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job = job
        self.reporter = reporter

    @abstractmethod
    def setup(self) -> KVCapacity:
        """Load the model and lay out the K/V memory; time counts as start-up."""

    @abstractmethod
    def run(self, workload: Workload) -> WorkloadRun:
        """Serve a workload, generating exactly `max_tokens` for each request."""

    def kv_bytes(self) -> tuple[int, int]:
        """K/V bytes (allocated, live) now, between workloads."""
        return 0, 0

    def warm_up(self) -> None:
        """Do everything once that is slow the first time; time counts as warm-up.

        On a GPU every shape of a step is slow the first time (kernels are loaded or compiled,
        graphs captured), so the workloads themselves run before they are measured, with other
        tokens: nothing that is cached of them serves the measured run.
        """
        self.run(self.job.warm_up)
        if _gpu_in_use():
            for _ in range(RUNS_BEFORE_ON_GPU):
                for workload in self.job.workloads:
                    self.run(_backwards(workload))
