"""Penalties, bias and constraints: a row of logits becomes what is sampled from.

::

    the model's logits ─▶ repetition ─▶ frequency, presence ─▶ + bias ─▶ allowed only ─▶ sampling
        │                  · or ÷            − count · f − p                −∞ elsewhere
        └─▶ log probabilities

A row depends on its own sequence alone, so tokens do not change with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pagelab.scheduling.batch import LogitsInputs, ScheduledSequence
from pagelab.types import SamplingParams


def changes_logits(sequence: ScheduledSequence) -> bool:
    """Whether `process` does anything to a sequence's row."""
    return sequence.samples and sequence.logits is not None


def process(logits: torch.Tensor, sequences: Sequence[ScheduledSequence]) -> dict[int, str]:
    """Change the rows of logits `[rows, vocab]` (float32), in place, as their sequences ask.

    Returns:
        What went wrong, by row: such a row is as it was or half-changed, others are not affected.
    """
    failed: dict[int, str] = {}
    for row, sequence in enumerate(sequences):
        if changes_logits(sequence):
            assert sequence.logits is not None
            try:
                _process_row(logits[row], sequence.params, sequence.logits)
            except Exception as error:  # a row's failure is its request's, not the step's
                failed[row] = f"its logits cannot be processed: {type(error).__name__}: {error}"
    return failed


def _process_row(logits: torch.Tensor, params: SamplingParams, inputs: LogitsInputs) -> None:
    if params.penalizes:
        penalize(logits, params, inputs.prompt_token_ids, inputs.output_token_ids)
    if params.logit_bias is not None:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if inputs.allowed is not None:
        logits.masked_fill_(~_mask(inputs.allowed, logits), -math.inf)


def penalize(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
) -> None:
    """Apply the three penalties to logits `[vocab]`, in place.

    Repetition (Keskar et al. 2019, CTRL) is over prompt and output; frequency and presence, as
    OpenAI's API defines them, are over the output.
    """
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(
            list({*prompt_token_ids, *output_token_ids}), dtype=torch.int64, device=logits.device
        )
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output_token_ids and (params.frequency_penalty or params.presence_penalty):
        ids, counts = np.unique(np.array(output_token_ids), return_counts=True)
        less = counts * params.frequency_penalty + params.presence_penalty
        logits[torch.from_numpy(ids).to(logits.device)] -= torch.tensor(
            less, dtype=logits.dtype, device=logits.device
        )


def _mask(allowed: bytes, logits: torch.Tensor) -> torch.Tensor:
    """The bits as `[vocab]` bool, where the logits are; tokens beyond them are not allowed."""
    vocab = logits.shape[0]
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little", count=vocab)
    return torch.from_numpy(bits.view(np.bool_)).to(logits.device)
