"""How the K/V of a decode step is cut into items (`paged_decode`), and where they lie.

`step_state` cuts on the device, by the same rule as `cut_items` here does on the host.
"""

from __future__ import annotations

from copy import copy

import numpy as np
import torch

from pagelab.kernels.sizes import DESCRIPTOR

PART = 32
"""Keys that an item is a multiple of, unless it is a sequence's last."""


def shortest_item(num_seqs: int, target: int) -> int:
    """Keys of an item at least: adding parts up costs more than a short context does.

    Where the sequences themselves are about as many as the items that are wanted (`target`), only
    a long one is worth cutting (docs/log.md).
    """
    return 512 if num_seqs >= target else 256


class DecodePlan:
    """Where the items of a step are written, and the workspace of sequences that are split.

    Args:
        max_seqs: the most sequences of a step.
        num_heads, num_kv_heads, head_dim: of the model.
        target_items: items that a step's K/V is cut into, about; more balance better, and cost
            more adding up.
        device: where.
    """

    def __init__(
        self,
        max_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        target_items: int,
        device: torch.device,
    ) -> None:
        self.target_items = target_items
        self.max_seqs = max_seqs
        capacity = max_seqs + target_items
        self.items = torch.zeros(capacity, DESCRIPTOR, dtype=torch.int32, device=device)
        self.num_items = torch.zeros(1, dtype=torch.int32, device=device)
        parts = capacity * num_heads
        self.partial = torch.empty(parts, head_dim, dtype=torch.float32, device=device)
        self.partial_ml = torch.empty(parts, 2, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max_seqs * num_kv_heads, dtype=torch.int32, device=device)

    def over(self, items: torch.Tensor, num_items: torch.Tensor) -> DecodePlan:
        """The same workspace, with items that come from elsewhere."""
        plan = copy(self)
        plan.items, plan.num_items = items, num_items
        return plan


def cut_items(
    seqs: np.ndarray, rows: np.ndarray, first: np.ndarray, positions: np.ndarray, target: int
) -> np.ndarray:
    """The items `[n, DESCRIPTOR]` of sequences with one token each, cut as `step_state` does.

    For each sequence: its index, its row of the block table, its row of q, its position; and how
    many items to cut into, about.
    """
    lengths = positions + 1
    each = max(-(-int(lengths.sum()) // target), shortest_item(len(lengths), target))
    each = -(-each // 64) * 64
    # a sequence's items are about as long as each other
    part = -(-lengths // -(-lengths // each))
    part = -(-part // PART) * PART
    counts = -(-lengths // part)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    part = np.repeat(part, counts)
    out = np.empty((int(counts.sum()), DESCRIPTOR), np.int32)
    out[:, 0] = np.repeat(seqs, counts)
    out[:, 1] = np.repeat(first, counts)
    out[:, 2] = np.repeat(rows, counts)
    out[:, 3] = index * part
    out[:, 4] = np.minimum((index + 1) * part, np.repeat(lengths, counts))
    out[:, 5] = index
    out[:, 6] = np.repeat(counts, counts)
    out[:, 7] = np.repeat(positions, counts)
    return out
