"""Logits to tokens. A row's result depends on that row alone.

Random choice takes one uniform number a token, derived from (seed, index of the token), and
inverts the distribution with it. So the same request with the same seed gets the same tokens
whatever shares its batch, in whatever steps, and after a preemption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch

from pagelab.execution.logits.process import changes_logits, process
from pagelab.scheduling.batch import ScheduledSequence
from pagelab.types import SampledToken, SamplingParams, TokenLogprobs

NO_TOKEN = (
    "no token can be chosen: logits are not finite, or every token is suppressed (min_tokens with "
    "stop_token_ids)"
)


def sample(
    logits: torch.Tensor, sequences: Sequence[ScheduledSequence]
) -> list[SampledToken | str]:
    """One token for each row of logits `[rows, vocab]` (float32), or why there is none: the row
    holds a NaN or no finite number, or what the sequence asks cannot be done to it.

    Overwrites the rows of sequences that change their logits, and no others.
    """
    own, failed = _process(logits, sequences)
    best, greedy = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    usable = best.isfinite().tolist()
    chosen: list[int] = greedy.tolist()
    for row, sequence in enumerate(sequences):
        if usable[row] and not sequence.params.greedy:
            chosen[row] = _draw(logits[row], sequence.params, uniform(*sequence.position_seed))
    logprobs = _logprobs(logits, own, sequences, chosen)
    return [
        SampledToken(token, logprobs.get(row))
        if usable[row] and row not in failed
        else failed.get(row, NO_TOKEN)
        for row, token in enumerate(chosen)
    ]


def uniform(seed: int, index: int) -> float:
    """A number from [0, 1) that depends on the seed and the token's index only."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)  # a double's 53 bits


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution `[vocab]` (float64) that is sampled from: temperature, then top-k, then
    top-p, then min-p, each over what the one before it left.

    Ties at a threshold are all kept, so that the result does not depend on a sort's order.
    """
    scaled = logits.double()
    scaled = (scaled - scaled.max()) / params.temperature  # first: a tiny temperature overflows
    if 0 < params.top_k < len(scaled):
        threshold = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, -math.inf)
    probabilities = scaled.softmax(dim=-1)
    if params.top_p < 1.0:
        ordered = probabilities.sort(descending=True).values
        # the first position at which the sum reaches top_p is the last one kept
        last = int((ordered.cumsum(0) < params.top_p).sum())
        threshold = ordered[min(last, len(ordered) - 1)]
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    if params.min_p > 0.0:
        threshold = probabilities.max() * params.min_p
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    return probabilities / probabilities.sum()


def _draw(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    cumulative = filtered_probabilities(logits, params).cumsum(0)
    # the first token whose cumulative probability exceeds the number; tokens of probability 0
    # never do so first. Scaled, since rounding may leave the last sum a little under 1.
    target = number * float(cumulative[-1])
    return int(torch.searchsorted(cumulative, target, right=True).clamp(max=len(cumulative) - 1))


def _process(
    logits: torch.Tensor, sequences: Sequence[ScheduledSequence]
) -> tuple[dict[int, torch.Tensor], dict[int, str]]:
    """Change rows as their sequences ask. Returns, by row: the model's own logits where those are
    asked for and do not stay, and what went wrong.

    Rows are copied and not all of the logits: 6 MB in a step of 32 rows take as long as sampling.
    """
    own: dict[int, torch.Tensor] = {}
    changed = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.suppressed or changes_logits(sequence)
    ]
    if not changed:
        return own, {}
    for row in changed:
        if sequences[row].params.logprobs is not None:
            own[row] = logits[row].clone()
    failed = process(logits, sequences)
    for row in changed:
        logits[row, list(sequences[row].suppressed)] = -math.inf
    return own, failed


def _logprobs(
    logits: torch.Tensor,
    own: dict[int, torch.Tensor],
    sequences: Sequence[ScheduledSequence],
    chosen: list[int],
) -> dict[int, TokenLogprobs]:
    wanted = {
        row: sequence.params.logprobs
        for row, sequence in enumerate(sequences)
        if sequence.params.logprobs is not None
    }
    result: dict[int, TokenLogprobs] = {}
    for row, count in wanted.items():
        logprobs = own.get(row, logits[row]).log_softmax(dim=-1)
        top = logprobs.topk(min(count, len(logprobs)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        result[row] = TokenLogprobs(float(logprobs[chosen[row]]), pairs)
    return result
