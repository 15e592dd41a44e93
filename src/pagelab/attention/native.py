"""Paged attention by the compiled extension, as one backend among others.

The engine does not use it: there the whole step is one call (`execution.native_runner`). This is
the same code where attention alone is wanted: in tests against the oracle, and in measurements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from pagelab.attention.base import Span
from pagelab.errors import ConfigError
from pagelab.native.library import native
from pagelab.native.packed import Threads
from pagelab.native.structures import KV_TYPES, CModel, CStep
from pagelab.telemetry import available_cores

_TYPES = {
    torch.float32: KV_TYPES["float32"],
    torch.bfloat16: KV_TYPES["bfloat16"],
    torch.uint8: KV_TYPES["int8"],
}


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's sequences, as the extension reads them. The arrays are what the structure has."""

    step: CStep
    arrays: tuple[np.ndarray, ...]


class NativeAttention:
    """See the module. Caches in float32, bfloat16 or int8 (`execution.kv_cache` has the layout),
    heads of a multiple of 16.

    Args:
        threads: to use; None: one for each core of this process.

    Raises:
        ConfigError: the extension does not run here.
    """

    name = "native"

    def __init__(self, threads: int | None = None) -> None:
        found = native()
        if found is None:
            raise ConfigError("the compiled extension does not run here")
        self._native = found
        self._threads = Threads(found, threads or available_cores())

    def plan(self, spans: Sequence[Span], cache: torch.Tensor) -> NativePlan:
        """See `AttentionBackend.plan`."""
        assert all(a.row + a.num_queries == b.row for a, b in pairwise(spans))
        tables = [span.block_ids for span in spans]
        starts = np.cumsum([0, *map(len, tables)])[:-1]
        arrays = (
            np.array([span.num_queries for span in spans], np.int32),
            np.array([span.num_keys for span in spans], np.int32),
            starts.astype(np.int32),
            np.array([block for table in tables for block in table], np.int32),
        )
        step = CStep(
            num_tokens=int(arrays[0].sum()),
            num_seqs=len(spans),
            num_blocks=cache.shape[2],
            block_size=cache.shape[3],
        )
        step.queries, step.keys, step.table, step.block_ids = (a.ctypes.data for a in arrays)
        return NativePlan(step, arrays)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        plan: NativePlan,
        scale: float,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Reads K/V from the cache only."""
        _, num_heads, head_dim = q.shape
        model = CModel(
            heads=num_heads,
            kv_heads=cache.shape[1],
            head_dim=head_dim,
            kv_type=_TYPES[cache.dtype],
            scale=scale,
        )
        queries = q.float().contiguous()
        out = torch.empty_like(queries)
        layers = np.array([cache.data_ptr()], np.uint64)
        plan.step.kv = layers.ctypes.data
        self._native.library.pagelab_attend(
            self._native.isa,
            self._threads.pointer,
            ctypes.addressof(model),
            ctypes.addressof(plan.step),
            queries.data_ptr(),
            0,
            out.data_ptr(),
        )
        return out.to(q.dtype)
