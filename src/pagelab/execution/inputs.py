"""A step's inputs as tensors, rebuilt from the batch every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagelab.attention.base import Span
from pagelab.scheduling.batch import Batch, ScheduledSequence


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, flattened: sequences follow each other in the order of the batch.

    ::

        token_ids   | seq 0 | seq 1 ········ | seq 2 |     T rows
        positions     17      0 1 2 3 … 129    5
        slots         where each token's K/V is written: block_id · block_size + offset
        sampled     rows of the last token of each sequence that samples
        last        rows of the last token of every sequence
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sampled: torch.Tensor
    last: torch.Tensor
    spans: tuple[Span, ...]
    sampling: tuple[ScheduledSequence, ...]  # the sequences of `sampled`, in its order


def build_inputs(batch: Batch, block_size: int, device: torch.device) -> StepInputs:
    """Flatten a batch. All its token ids must be known (a runner that does not run ahead)."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    spans: list[Span] = []
    for part in batch.sequences:
        assert len(part.token_ids) == part.num_tokens, "this runner needs every token id"
        spans.append(Span(len(token_ids), part.num_tokens, part.end, part.block_ids))
        token_ids += part.token_ids
        positions += range(part.start, part.end)
        slots += slot_mapping(part, block_size)
        if part.samples:
            sampled.append(len(token_ids) - 1)
    return StepInputs(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        sampled=torch.tensor(sampled, dtype=torch.int64, device=device),
        last=torch.tensor([s.row + s.num_queries - 1 for s in spans], device=device),
        spans=tuple(spans),
        sampling=tuple(part for part in batch.sequences if part.samples),
    )


def slot_mapping(part: ScheduledSequence, block_size: int) -> list[int]:
    """The slots of a sequence's new tokens."""
    table = part.block_ids
    return [
        table[position // block_size] * block_size + position % block_size
        for position in range(part.start, part.end)
    ]
