"""Paged attention by the Triton kernels, behind the Protocol: everything from the blocks, nothing
gathered. `execution.gpu_runner` launches the same kernels inside CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagelab.attention.base import Span
from pagelab.kernels.decode_items import DecodePlan, cut_items
from pagelab.kernels.launch import device_of
from pagelab.kernels.paged_decode import decode_attention
from pagelab.kernels.paged_prefill import cut_tiles, prefill_attention, queries_per_tile

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A step's sequences: with one token each (as descriptors), with several (as spans)."""

    block_tables: torch.Tensor
    singles: Columns  # sequences, rows of the table, rows of q, positions
    several: Columns  # rows of the table, rows of q, tokens, first positions


class TritonAttention:
    """See `kernels.paged_decode` and `kernels.paged_prefill`."""

    name = "triton"

    def plan(self, spans: Sequence[Span], cache: torch.Tensor) -> TritonPlan:
        """Block tables, and who brings one token."""
        tables = np.zeros((len(spans), max(len(span.block_ids) for span in spans)), np.int32)
        for i, span in enumerate(spans):
            tables[i, : len(span.block_ids)] = span.block_ids
        index = np.arange(len(spans))
        rows = np.array([span.row for span in spans])
        counts = np.array([span.num_queries for span in spans])
        starts = np.array([span.num_keys - span.num_queries for span in spans])
        one, more = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
        return TritonPlan(
            torch.from_numpy(tables).to(cache.device),
            (index[one], index[one], rows[one], starts[one]),
            (index[more], rows[more], counts[more], starts[more]),
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        plan: TritonPlan,
        scale: float,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Reads K/V from the cache only."""
        device = device_of(q.device)
        q = q.contiguous()
        out = torch.empty_like(q)
        heads, kv_heads, dim = q.shape[1], cache.shape[1], q.shape[2]
        if len(plan.singles[0]):
            target = max(1, 4 * device.num_sms // kv_heads)
            num_seqs = len(plan.block_tables)
            items = cut_items(*plan.singles, target)
            decode = DecodePlan(num_seqs, heads, kv_heads, dim, target, q.device)
            decode_attention(
                q,
                out,
                cache,
                plan.block_tables,
                decode.over(*_counted(items, q.device)),
                scale,
                device,
                num_seqs=num_seqs,
            )
        if len(plan.several[0]):
            tiles = cut_tiles(*plan.several, queries_per_tile(heads, kv_heads))
            prefill_attention(
                q, out, cache, plan.block_tables, *_counted(tiles, q.device), scale, device
            )
        return out


def _counted(rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.tensor([len(rows)], dtype=torch.int32, device=device)
    return torch.from_numpy(rows).to(device), count
