"""Packed weights and the thread pool, as Python objects that free what they hold."""

from __future__ import annotations

import weakref
from ctypes import POINTER, cast
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagelab.native.library import Native
from pagelab.native.structures import BF16, F32, INT8, Q4, Q8, CLinear

KINDS = {"float32": F32, "bfloat16": BF16, "int8": INT8, "q8": Q8, "q4": Q4}
"""Kinds of packed weights by name."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of ggml's quantized blocks, as a file holds them.

    Attributes:
        type: ggml's number of the type: 2 (Q4_0), 3 (Q4_1) or 8 (Q8_0).
        data: uint8 `[rows, bytes a row]`.
        k: values a row.
    """

    type: int
    data: npt.NDArray[np.uint8]
    k: int

    @property
    def kind(self) -> int:
        """The kind of packed weight that holds them as they are."""
        return Q8 if self.type == 8 else Q4


class Threads:
    """A pool of threads, the caller's own among them, and the memory of the weights."""

    def __init__(self, native: Native, count: int) -> None:
        self.native, self.count = native, count
        self.pointer: int = native.library.pagelab_pool_new(count)
        if not self.pointer:
            raise MemoryError("no memory for a thread pool")
        weakref.finalize(self, native.library.pagelab_pool_free, self.pointer)


class PackedLinear:
    """`x Wᵀ + b` with W in the extension's own layout.

    Args:
        threads: that pack it, and in whose memory it lies as long as they exist.
        kind: of `KINDS`' values.
        weight: `[out, in]`, floats; or blocks, taken over bit by bit where `kind` is theirs.
        bias: `[out]`, or None.
    """

    def __init__(
        self,
        threads: Threads,
        kind: int,
        weight: torch.Tensor | Blocks,
        bias: torch.Tensor | None = None,
    ) -> None:
        native = threads.native
        self._threads = threads  # whose memory it lies in
        if isinstance(weight, Blocks):
            rows, k = len(weight.data), weight.k
        else:
            rows, k = weight.shape
        self.pointer: int = native.library.pagelab_linear_new(
            threads.pointer, kind, rows, k, bias is not None
        )
        if not self.pointer:
            raise MemoryError("no memory for a packed weight")
        weakref.finalize(self, native.library.pagelab_linear_free, self.pointer)
        self.fields = cast(self.pointer, POINTER(CLinear)).contents
        if not self.fields.data:
            raise MemoryError(f"no memory for a packed weight of {rows} x {k}")
        own_bias = None if bias is None else bias.float().contiguous()
        bias_pointer = None if own_bias is None else own_bias.data_ptr()
        head = (native.isa, threads.pointer, self.pointer)
        if isinstance(weight, Blocks):
            data = np.ascontiguousarray(weight.data)
            native.library.pagelab_pack_blocks(*head, weight.type, data.ctypes.data, bias_pointer)
        else:
            floats = weight.float().contiguous()
            native.library.pagelab_pack(*head, floats.data_ptr(), bias_pointer)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return int(self.fields.panel_bytes * (self.fields.np // 32))

    def __call__(self, threads: Threads, x: torch.Tensor) -> torch.Tensor:
        """x `[rows, in]` float32 → `[rows, out]` float32. For tests and measurements."""
        x = x.contiguous()
        out = torch.empty(len(x), self.fields.np)
        native = self._threads.native
        native.library.pagelab_linear(
            native.isa, threads.pointer, self.pointer, x.data_ptr(), len(x), out.data_ptr()
        )
        return out[:, : self.fields.n]
