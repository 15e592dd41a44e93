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
        """Tell of no stages meanwhile: a warm-up is none of the run's. Progress is its own."""
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
        if due:
            self._last = now
            name = "warm-up" if self._muted else workload
            self._channel.send(
                {"event": "progress", "workload": name, "done": done, "total": total}
            )


def _gpu_in_use() -> bool:
    """Whether this process computes on a GPU: then it has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _bytes_of_torch() -> int | None:
    """What torch's allocator has of all GPUs."""
    if not _gpu_in_use():
        return None
    cuda = sys.modules["torch"].cuda
    return sum(int(cuda.memory_reserved(i)) for i in range(cuda.device_count()))


def _with_other_tokens(workload: Workload, shift: int) -> Workload:
    """The same requests, lengths and common beginnings, but every token another one."""
    ids = [token for request in workload.requests for token in request.token_ids]
    limit = max(ids, default=0) + 1  # the model has ids up to here
    requests = tuple(
        dataclasses.replace(
            request,
            prompt_token_ids=tuple((token + shift) % limit for token in request.token_ids),
            prompt_text=None,
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
        graphs captured), so the workloads themselves run before they are measured, each time with
        other tokens: nothing that is cached of them serves a later run.
        """
        self.run(self.job.warm_up)
        if self.on_gpu():
            for shift in range(1, RUNS_BEFORE_ON_GPU + 1):
                for workload in self.job.workloads:
                    self.run(_with_other_tokens(workload, shift))

    def on_gpu(self) -> bool:
        """Whether it computes on a GPU; asked after `setup`."""
        return _gpu_in_use()
