"""Runs a decoder for the engine: one batch in, one token for each sequence that samples."""

from __future__ import annotations

import torch

from pagelab.attention.base import AttentionBackend
from pagelab.execution.inputs import StepInputs, build_inputs
from pagelab.execution.kv_cache import KVCache
from pagelab.execution.logits.logprobs import prompt_logprobs, prompt_rows
from pagelab.execution.oom import in_step
from pagelab.execution.sampler import sample
from pagelab.models.decoder import Decoder
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.types import SampledToken, SequenceId, TokenLogprobs


class ModelRunner:
    """The `engine.core.Runner` of a real model. Runs each step when it is submitted.

    ::

        copies of blocks → inputs → for each layer: write K/V, attend → logits of the rows
        that sample → tokens
    """

    def __init__(self, decoder: Decoder, cache: KVCache, attention: AttentionBackend) -> None:
        self.decoder = decoder
        self.cache = cache
        self.attention = attention
        self.device = decoder.embedding.device
        self._scale = decoder.spec.head_dim**-0.5

    def submit(self, batch: Batch) -> StepResult:
        """Run a step.

        Raises:
            InsufficientMemoryError: there is no memory for its intermediate results.
        """
        with in_step(batch, self.device), torch.inference_mode():
            self.cache.copy_blocks(batch.copies)
            inputs = build_inputs(batch, self.cache.layout.block_size, self.device)
            hidden = self._forward(inputs)
            return self._sample(batch, inputs, hidden)

    def collect(self, handle: StepResult) -> StepResult:
        """The result is there already."""
        return handle

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        cache, attention, scale = self.cache, self.attention, self._scale
        plan = attention.plan(inputs.spans, cache.layers[0])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(layer, inputs.slots, k, v)
            return attention.attend(q, k, v, cache.layers[layer], plan, scale)

        return self.decoder.forward(inputs.token_ids, inputs.positions, attend)

    def _sample(self, batch: Batch, inputs: StepInputs, hidden: torch.Tensor) -> StepResult:
        sampled: dict[SequenceId, SampledToken] = {}
        errors = self._not_finite(batch, inputs, hidden)
        if inputs.sampling:
            logits = self.decoder.logits(hidden[inputs.sampled])
            for part, token in zip(inputs.sampling, sample(logits, inputs.sampling), strict=True):
                if isinstance(token, str):
                    errors.setdefault(part.sequence_id, token)
                else:
                    sampled[part.sequence_id] = token
        return StepResult(batch.step, sampled, errors, self._prompts(batch, hidden))

    def _prompts(
        self, batch: Batch, hidden: torch.Tensor
    ) -> dict[SequenceId, tuple[TokenLogprobs, ...]]:
        """Log probabilities of prompt tokens, where they are asked for."""
        rows = prompt_rows(batch.sequences)
        found: dict[SequenceId, tuple[TokenLogprobs, ...]] = {}
        for sequence_id, some in prompt_logprobs(rows, lambda at: self.decoder.logits(hidden[at])):
            found[sequence_id] = (*found.get(sequence_id, ()), *some.read())
        return found

    def _not_finite(
        self, batch: Batch, inputs: StepInputs, hidden: torch.Tensor
    ) -> dict[SequenceId, str]:
        """Sequences whose hidden states are not finite: nothing of theirs may be reused.

        The last row has attended to all of a sequence's rows, so it tells for all of them.
        """
        finite: list[bool] = hidden[inputs.last].isfinite().all(dim=-1).tolist()
        errors: dict[SequenceId, str] = {}
        block_size = self.cache.layout.block_size
        for part, fine in zip(batch.sequences, finite, strict=True):
            if not fine:
                errors[part.sequence_id] = (
                    "the model's output is not finite here: try --dtype float32"
                )
                # only blocks from this step's first token on: those before may be shared
                self.cache.clear_blocks(part.block_ids[part.start // block_size :])
        return errors
