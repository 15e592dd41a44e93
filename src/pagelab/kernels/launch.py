"""How kernels are launched: what the device can do, and programmatic dependent launch.

With programmatic dependent launch (PDL, compute capability 9.0 and up) a kernel's programs start
while the kernel before it still runs, and wait for it inside::

    kernel n      | wait | trigger | work ······························|
    kernel n + 1                   | prefetch weights ····| wait ·······| trigger | work ···

A kernel triggers after its own wait. So before its wait a kernel may read whatever the kernel
before the last one wrote, and must not touch what its direct predecessor writes.
Every kernel of a chain waits, also where it has nothing to read: its end then means that all
kernels before it have ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Device:
    """What a kernel's launch depends on.

    Attributes:
        num_sms: multiprocessors.
        pdl: programmatic dependent launch works here.
        shared_bytes: shared memory that a program can have.
        descriptors: tiles can be copied by tensor descriptors.
        compiled: where kernels go that are compiled and not run; None: they run.
    """

    num_sms: int
    pdl: bool
    shared_bytes: int = 1 << 20
    descriptors: bool = True
    compiled: list[Any] | None = None

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int) -> None:
        """Launch a kernel on the current stream, or compile what such a launch needs."""
        options: dict[str, Any] = {"num_warps": num_warps}
        if self.pdl:
            options["launch_pdl"] = True
        if self.compiled is not None:
            self.compiled.append(kernel.warmup(*arguments, grid=grid, **options))
        else:
            kernel[grid](*arguments, **options)


@lru_cache(maxsize=8)
def device_of(device: torch.device) -> Device:
    """The launch properties of a device; Triton's interpreter stands in for a small one."""
    if device.type != "cuda":
        return Device(num_sms=4, pdl=False)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.major >= 9,
        properties.shared_memory_per_multiprocessor - 1024,  # the system keeps 1 KiB a program
        descriptors=properties.major >= 9,
    )


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernel before, then let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(pointers, BYTES: tl.constexpr):
    """Ask for BYTES (a multiple of 16) from each of the pointers to be brought into the L2 cache.

    A request for each; with fewer pointers than threads, several threads ask for the same.
    """
    tl.inline_asm_elementwise(
        "{ .reg .u32 n; mov.u32 n, $2; cp.async.bulk.prefetch.L2.global [$1], n; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers.to(tl.uint64, bitcast=True), tl.full(pointers.shape, BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
