"""Runs a decoder by the compiled extension: a step is one call, from token ids to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from pagelab.execution.kv_cache import KVCache
from pagelab.execution.logits.logprobs import PromptRows, prompt_logprobs, prompt_rows
from pagelab.execution.logits.process import changes_logits
from pagelab.execution.oom import in_step
from pagelab.execution.sampler import NO_TOKEN, sample
from pagelab.models.native_decoder import NativeDecoder, address
from pagelab.native.structures import PARTS, CStep
from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.types import SampledToken, SequenceId, TokenLogprobs

_NOT_FINITE = "the model's output is not finite here: try --dtype float32"


class NativeRunner:
    """The `engine.core.Runner` of a real model on a CPU. Runs each step when it is submitted.

    Nothing of a row depends on the rows beside it: the extension adds up each row's numbers in
    one order whatever the batch.
    """

    def __init__(self, decoder: NativeDecoder, cache: KVCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.device = torch.device("cpu")
        self._native = decoder.threads.native
        self._seconds = np.zeros(len(PARTS))
        self._layers = np.array([layer.data_ptr() for layer in cache.layers], np.uint64)

    def submit(self, batch: Batch) -> StepResult:
        """Run a step.

        Raises:
            InsufficientMemoryError: there is no memory for its intermediate results.
        """
        with in_step(batch, self.device), torch.inference_mode():
            self.cache.copy_blocks(batch.copies)
            return self._run(batch)

    def collect(self, handle: StepResult) -> StepResult:
        """The result is there already."""
        return handle

    def seconds_by_part(self) -> dict[str, float]:
        """The extension's time by part of a step, since the runner was made."""
        return dict(zip(PARTS, self._seconds.tolist(), strict=True))

    def _run(self, batch: Batch) -> StepResult:
        parts = batch.sequences
        sampling = [part for part in parts if part.samples]
        asked = prompt_rows(parts)
        # the greatest logit is found where logits are made; they are stored for anything else
        logits = None
        if asked or not all(_takes_greatest(part) for part in sampling):
            columns = -(-self.decoder.spec.vocab_size // 32) * 32
            count = len(sampling) + sum(len(some.targets) for some in asked)
            logits = torch.empty(count, columns)[:, : self.decoder.spec.vocab_size]
        tokens, finite = self._step(batch, asked, logits)
        errors: dict[SequenceId, str] = {}
        for part, fine in zip(parts, finite, strict=True):
            if not fine:
                errors[part.sequence_id] = _NOT_FINITE
                # only blocks from this step's first token on: those before may be shared
                first = part.start // self.cache.layout.block_size
                self.cache.clear_blocks(part.block_ids[first:])
        chosen: list[SampledToken | str]
        prompts: dict[SequenceId, tuple[TokenLogprobs, ...]] = {}
        if logits is None:
            chosen = [SampledToken(token, None) if token >= 0 else NO_TOKEN for token in tokens]
        else:
            with _one_thread():
                prompts = _prompts(asked, logits[len(sampling) :])
                chosen = sample(logits[: len(sampling)], sampling) if sampling else []
        sampled: dict[SequenceId, SampledToken] = {}
        for part, token in zip(sampling, chosen, strict=True):
            if isinstance(token, str):
                errors.setdefault(part.sequence_id, token)
            else:
                sampled[part.sequence_id] = token
        return StepResult(batch.step, sampled, errors, prompts)

    def _step(
        self, batch: Batch, asked: Sequence[PromptRows], logits: torch.Tensor | None
    ) -> tuple[list[int], list[int]]:
        """The greatest logit's token of each sampled row, and whether each sequence is finite.

        `logits` takes those of the rows that sample, then those of the prompts in `asked`.
        """
        parts = batch.sequences
        ids: list[int] = []
        table: list[int] = []
        blocks: list[int] = []
        rows: list[int] = []
        for part in parts:
            assert len(part.token_ids) == part.num_tokens, "this runner needs every token id"
            ids += part.token_ids
            table.append(len(blocks))
            blocks += part.block_ids
            if part.samples:
                rows.append(len(ids) - 1)
        for some in asked:
            rows += range(some.first, some.first + len(some.targets))
        counts = [part.num_tokens for part in parts]
        keys = [part.end for part in parts]
        return self._call((ids, counts, keys, table, blocks, rows), logits)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits `[T, vocab]` at every position of a text of T tokens, from one step.

        The engine must be idle and keep no prefixes: the first blocks of the pool are written.
        """
        count, vocab = len(token_ids), self.decoder.spec.vocab_size
        blocks = range(-(-count // self.cache.layout.block_size))
        assert len(blocks) <= self.cache.num_blocks
        logits = torch.empty(count, -(-vocab // 32) * 32)
        self._call((token_ids, [count], [count], [0], blocks, range(count)), logits)
        return logits[:, :vocab]

    def _call(
        self, inputs: Sequence[Sequence[int]], logits: torch.Tensor | None
    ) -> tuple[list[int], list[int]]:
        """One step of token ids, counts, keys, starts of block tables, block ids, sampled rows."""
        arrays = [np.array(x, np.int32) for x in inputs]
        ids, counts, *_, rows = arrays
        tokens, finite = np.empty(len(rows), np.int32), np.empty(len(counts), np.uint8)
        step = CStep(
            len(ids),
            len(counts),
            len(rows),
            self.cache.num_blocks,
            self.cache.layout.block_size,
            0,
            *(array.ctypes.data for array in arrays),
            self._layers.ctypes.data,
            None if logits is None else logits.data_ptr(),
            tokens.ctypes.data,
            finite.ctypes.data,
            self._seconds.ctypes.data,
        )
        native, threads = self._native, self.decoder.threads
        failed = native.library.pagelab_step(
            native.isa, threads.pointer, address(self.decoder.model), address(step)
        )
        if failed:
            raise MemoryError("out of memory for a step's intermediate results")
        return tokens.tolist(), finite.tolist()


def _takes_greatest(part: ScheduledSequence) -> bool:
    plain = part.params.greedy and part.params.logprobs is None and not part.suppressed
    return plain and not changes_logits(part)


def _prompts(
    asked: Sequence[PromptRows], logits: torch.Tensor
) -> dict[SequenceId, tuple[TokenLogprobs, ...]]:
    """Log probabilities of prompt tokens, from logits of their rows, one prompt after another."""
    found: dict[SequenceId, tuple[TokenLogprobs, ...]] = {}
    at = 0
    for some in asked:
        own = logits[at : at + len(some.targets)]
        at += len(some.targets)
        for sequence_id, rows in prompt_logprobs([some._replace(first=0)], own.__getitem__):
            found[sequence_id] = (*found.get(sequence_id, ()), *rows.read())
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's own threads would spin on the cores that the extension's need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
