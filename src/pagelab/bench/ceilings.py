"""Measures what this machine can do at most: memory bandwidth and matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pagelab.bench.limits import Ceilings
from pagelab.config import format_bytes

_SECONDS = 0.4  # for each measurement, at least
_LEAST = 3  # times each is done

_CPU_BYTES = 256 << 20  # beyond any cache
_GPU_BYTES = 2 << 30
_CPU_SIZE, _GPU_SIZE = 4096, 8192  # rows and columns of the product


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several tries, about two seconds in all.

    A copy is counted as its reads and its writes. On a CPU the larger of a copy's and a sum's
    rate counts: a write there may read its cache line first. The product is square, in the
    model's dtype, by the same library that the engine's linear layers use.
    """
    on_gpu = device.type == "cuda"
    size = _buffer_bytes(device)
    bandwidth = _bandwidth(size, device)
    n = _GPU_SIZE if on_gpu else _CPU_SIZE
    left = torch.randn(n, n, dtype=torch.float32, device=device).to(dtype)
    right = torch.randn(n, n, dtype=torch.float32, device=device).to(dtype)
    product = _best_seconds(lambda: torch.mm(left, right), device)
    what = "copy" if on_gpu else "better of copy and sum"
    return Ceilings(
        bytes_per_s=bandwidth,
        flops_per_s=2 * n**3 / product,
        how=f"{what} of {format_bytes(size)}; product of {n} x {n} in {dtype}".replace(
            "torch.", ""
        ),
    )


def _bandwidth(size: int, device: torch.device) -> float:
    """Bytes a second over buffers of so many bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _best_seconds(lambda: target.copy_(source), device)
    if device.type == "cuda":
        return copied
    return max(copied, size / _best_seconds(lambda: source.sum(), device))


def _buffer_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BYTES
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(1 << 20, min(_GPU_BYTES, free // 4)) // 4 * 4


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs, after one that is not counted."""
    _timed(work, device)
    best, started, count = float("inf"), time.perf_counter(), 0
    while count < _LEAST or time.perf_counter() - started < _SECONDS:
        best = min(best, _timed(work, device))
        count += 1
    return best


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
