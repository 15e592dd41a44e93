"""GPU memory, the memory of processes, and the load that other programs make.

::

    MemorySampler (a thread) ──▶ columns: seconds, RSS bytes, GPU bytes of a process tree
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from pagelab.results import MemorySamples
from pagelab.telemetry.machine import _lines

# GPUs


def gpus() -> list[dict[str, Any]]:
    """Each NVIDIA GPU with its memory in bytes, by NVML; empty without a driver.

    `compute_capability` is `[8, 0]`, say; None where NVML does not know it.
    """
    found: list[dict[str, Any]] = []
    with _Nvml() as nvml:
        for index, handle in enumerate(nvml.handles):
            try:
                memory = nvml.api.nvmlDeviceGetMemoryInfo(handle)
                name = nvml.api.nvmlDeviceGetName(handle)
            except nvml.api.NVMLError:
                continue
            found.append(
                {
                    "index": index,
                    "name": name.decode() if isinstance(name, bytes) else str(name),
                    "memory_total_bytes": int(memory.total),
                    "memory_free_bytes": int(memory.free),
                    "compute_capability": _capability(nvml.api, handle),
                }
            )
    return found


def _capability(api: Any, handle: Any) -> list[int] | None:
    try:
        return [int(part) for part in api.nvmlDeviceGetCudaComputeCapability(handle)]
    except (api.NVMLError, AttributeError):
        return None


class _Nvml:
    """NVML while it is open; `handles` is empty where there is no driver, which is normal."""

    def __init__(self) -> None:
        self.api: Any = None
        self.handles: list[Any] = []

    def __enter__(self) -> _Nvml:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # not installed, no library, no driver, no permission
            return self
        self.api = pynvml
        try:
            count = pynvml.nvmlDeviceGetCount()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError:
            self.handles = []
        return self

    def __exit__(self, *_: object) -> None:
        if self.api is not None:
            with contextlib.suppress(self.api.NVMLError):
                self.api.nvmlShutdown()

    def process_bytes(self, pids: set[int]) -> int | None:
        """GPU memory of these processes; None where NVML cannot say."""
        total, known = 0, False
        for handle in self.handles:
            try:
                processes = self.api.nvmlDeviceGetComputeRunningProcesses(handle)
            except self.api.NVMLError:
                continue
            known = True
            total += sum(int(p.usedGpuMemory or 0) for p in processes if p.pid in pids)
        return total if known else None


# Memory of processes


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def rss_bytes(pid: int, children: bool = True) -> int:
    """Resident bytes of a process (and its descendants); 0 when it is gone.

    Pages that processes share are counted in each of them.
    """
    return _sum_rss(process_tree(pid) if children else [pid])


def _sum_rss(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # it vanished, or is not ours
            continue
    return total


def own_peak_rss_bytes() -> int | None:
    """This process's peak since it started, as the kernel kept it; None where it does not.

    Linux only: `getrusage` would include the memory of the process that forked this one.
    """
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


class MemorySampler:
    """Samples the memory of a process and its children from outside, in a thread.

    Use it as a context manager, or `start` and `stop`. Listing children walks the process
    table, so that is done ten times less often than reading their sizes.

    Args:
        pid: the process.
        interval_s: seconds between samples.
        started: the `time.time()` that counts as 0; now, if not given.
    """

    CHILDREN_EVERY = 10

    def __init__(self, pid: int, interval_s: float = 0.05, started: float | None = None) -> None:
        self._pid = pid
        self._interval = interval_s
        self._started = time.time() if started is None else started
        self._t: list[float] = []
        self._rss: list[int] = []
        self._device: list[int] = []
        self._device_known = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="memory-sampler", daemon=True)
        self._nvml = _Nvml()
        self._lock = threading.Lock()
        self._pids: list[int] = [pid]

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin sampling."""
        self._nvml.__enter__()
        self._thread.start()

    def stop(self) -> None:
        """End sampling; what was sampled stays."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._nvml.__exit__()

    def sample(self) -> tuple[float, int, int | None]:
        """Take a sample now: (seconds, RSS bytes, GPU bytes or None); kept in the columns.

        Where the process has ended by now, its last sample is repeated.
        """
        with self._lock:
            self._pids = process_tree(self._pid)
            t, rss, device = self._take()
            if rss == 0 and self._rss:
                rss, device = self._rss[-1], self._device[-1] if self._device_known else None
            return t, rss, device

    @property
    def peak_rss_bytes(self) -> int | None:
        """The largest sample."""
        return max(self._rss, default=None)

    @property
    def peak_device_bytes(self) -> int | None:
        """The largest GPU sample; None without a GPU."""
        return max(self._device, default=None) if self._device_known else None

    def columns(self, limit: int = 2000) -> MemorySamples:
        """The samples so far; those in which the process was gone already are left out.

        Of more than `limit` samples, the largest of each of `limit` stretches is kept.
        """
        with self._lock:
            count = len(self._t)
            stretches = [range(k * count // limit, (k + 1) * count // limit) for k in range(limit)]
            kept = (
                range(count)
                if count <= limit
                else [max(stretch, key=self._rss.__getitem__) for stretch in stretches]
            )
            return {
                "t": [self._t[i] for i in kept],
                "rss_bytes": [self._rss[i] for i in kept],
                "device_bytes": [self._device[i] for i in kept] if self._device_known else None,
                "source": "psutil, children included"
                + ("; NVML per process" if self._device_known else ""),
            }

    def _loop(self) -> None:
        count = 0
        while not self._stop.is_set():
            with self._lock:
                if count % self.CHILDREN_EVERY == 0:
                    self._pids = process_tree(self._pid)
                self._take()
            count += 1
            self._stop.wait(self._interval)

    def _take(self) -> tuple[float, int, int | None]:
        now = round(time.time() - self._started, 4)
        rss = _sum_rss(self._pids)
        device = self._nvml.process_bytes(set(self._pids)) if self._nvml.handles else None
        if rss > 0:  # otherwise it has ended
            self._t.append(now)
            self._rss.append(rss)
            self._device.append(device or 0)
            self._device_known = self._device_known or device is not None
        return now, rss, device


class OtherLoad:
    """Whether other programs took processor time from ours, from construction to `cores`.

    OpenMP programs collapse when another program takes a core, so figures from a busy machine
    are not to be believed.
    """

    BUSY = 0.85  # of the hardware threads in use: below that, ours had what it asked for

    def __init__(self) -> None:
        self._t, self._all, self._ours = time.monotonic(), _busy_seconds(), _our_seconds()

    def cores(self) -> float:
        """Cores that others used on average; 0 while the machine had cores to spare."""
        elapsed = time.monotonic() - self._t
        if elapsed <= 0:
            return 0.0
        everyone = (_busy_seconds() - self._all) / elapsed
        others = everyone - (_our_seconds() - self._ours) / elapsed
        return max(0.0, others) if everyone >= self.BUSY * (os.cpu_count() or 1) else 0.0


def _busy_seconds() -> float:
    """Processor seconds that the whole machine has worked so far."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def _our_seconds() -> float:
    """Those of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
