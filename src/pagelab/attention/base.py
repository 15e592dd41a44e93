"""The attention Protocol: queries of a ragged batch over K/V that lies in blocks.

One launch serves every sequence of a step, whatever number of new tokens each brings::

    queries      | seq 0: 1 token | seq 1: 130 tokens … | seq 2: 1 token |   rows of q, k, v
    its K/V      block table 0      block table 1         block table 2      in the KV cache

Shapes, with T the step's new tokens, H query heads, G = H / kv_heads, D head_dim:
`q [T, H, D]`, `k, v [T, kv_heads, D]`, one layer's cache
`[2, kv_heads, num_blocks, block_size, D]` (K at 0, V at 1), result `[T, H, D]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pagelab.types import BlockId

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step's attention.

    Its queries are rows `row .. row + num_queries` of q; the last of them stands at position
    `num_keys - 1`. Query i sees the keys up to its own position (causal).
    """

    row: int
    num_queries: int
    num_keys: int  # tokens in the cache once this step's are written
    block_ids: tuple[BlockId, ...]


class AttentionBackend(Protocol):
    """One way to compute paged attention.

    `plan` is called once a step and may build whatever all layers share (index tensors,
    masks); `attend` is called once a layer, after this step's k and v were written.
    """

    name: str

    def plan(self, spans: Sequence[Span], cache: torch.Tensor) -> Any:
        """Prepare a step. `cache` is any layer's: they all have the same shape."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        """Attend; see the module for shapes. k and v are this step's, as they were written."""
        ...
