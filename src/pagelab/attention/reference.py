"""The oracle: paged attention written as its definition, in plain torch, one sequence a time.

Slow on purpose. Every other backend is tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pagelab.attention.base import Span


class ReferenceAttention:
    """`softmax(q kᵀ · scale + causal mask) v`, computed in float32."""

    name = "reference"

    def plan(self, spans: Sequence[Span], cache: torch.Tensor) -> Sequence[Span]:
        """Nothing to prepare."""
        return spans

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        plan: Sequence[Span],
        scale: float,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Reads K/V from the cache only."""
        out = torch.empty_like(q)
        for span in plan:
            rows = slice(span.row, span.row + span.num_queries)
            out[rows] = _attend_one(q[rows], cache, span, scale)
        return out


def _attend_one(q: torch.Tensor, cache: torch.Tensor, span: Span, scale: float) -> torch.Tensor:
    num_queries, num_heads, _ = q.shape
    kv_heads = cache.shape[1]
    blocks = torch.tensor(span.block_ids, device=q.device)
    # [2, kv_heads, blocks, block_size, D] → [2, kv_heads, keys, D]
    kv = cache[:, :, blocks].flatten(2, 3)[:, :, : span.num_keys].float()
    kv = kv.repeat_interleave(num_heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,hkd->hqk", q.float(), kv[0]) * scale
    query_position = torch.arange(span.num_keys - num_queries, span.num_keys, device=q.device)
    key_position = torch.arange(span.num_keys, device=q.device)
    hidden = key_position[None, :] > query_position[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,hkd->qhd", weights, kv[1]).to(q.dtype)
