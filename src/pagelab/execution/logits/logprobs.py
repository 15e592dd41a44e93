"""Log probabilities of given tokens, and of the most probable ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from pagelab.scheduling.batch import ScheduledSequence
from pagelab.types import SequenceId, TokenLogprobs

ROWS_AT_ONCE = 32
"""Rows of logits that are in memory together: 6 MiB at 49,152 tokens, 19 MiB at 151,936."""


class PromptRows(NamedTuple):
    """The rows of a step whose logits a sequence's `prompt_logprobs` need.

    ::

        the step's tokens   first · · · · first + len(targets) · ·
        targets               └ the token after each ┘
    """

    sequence_id: SequenceId
    first: int
    targets: tuple[int, ...]
    num_top: int


class RowLogprobs(NamedTuple):
    """Log probabilities of some rows, still where they were computed."""

    chosen: torch.Tensor  # [rows]
    values: torch.Tensor  # [rows, count]
    ids: torch.Tensor  # [rows, count]

    def read(self) -> list[TokenLogprobs]:
        """One for each row."""
        pairs = zip(self.chosen.tolist(), self.ids.tolist(), self.values.tolist(), strict=True)
        return [TokenLogprobs(c, tuple(zip(i, v, strict=True))) for c, i, v in pairs]


def row_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> RowLogprobs:
    """Of `tokens` `[rows]` and the `count` most probable ones, by logits `[rows, vocab]`."""
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(count, logits.shape[1]))
    return RowLogprobs(logprobs.gather(1, tokens[:, None])[:, 0], top.values, top.indices)


def prompt_rows(sequences: Sequence[ScheduledSequence]) -> list[PromptRows]:
    """What a step's sequences ask about their prompts."""
    found: list[PromptRows] = []
    row = 0
    for part in sequences:
        if part.logits is not None and part.logits.targets:
            count = part.params.prompt_logprobs
            assert count is not None
            found.append(PromptRows(part.sequence_id, row, part.logits.targets, count))
        row += part.num_tokens
    return found


def prompt_logprobs(
    rows: Sequence[PromptRows], logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[SequenceId, RowLogprobs]]:
    """Log probabilities for each of `rows`, a few at a time.

    `logits_of` gives logits `[rows, vocab]` for a range of the step's rows (int64).
    """
    for sequence_id, first, targets, num_top in rows:
        for at in range(0, len(targets), ROWS_AT_ONCE):
            some = targets[at : at + ROWS_AT_ONCE]
            logits = logits_of(torch.arange(first + at, first + at + len(some)))
            yield (
                sequence_id,
                row_logprobs(logits, torch.tensor(some, device=logits.device), num_top),
            )
