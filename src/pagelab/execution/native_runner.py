"""Runs a decoder by the compiled extension: a step is one call, from token ids to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

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


@dataclass(slots=True)
class Work:
    """What a runner's steps had to do, added up; `bench.native_parts` makes bytes of it.

    Attributes:
        steps: how many.
        tokens: rows of their layers.
        keys: tokens in the cache of each step's sequences, this step's among them.
        pairs: of a query and a key that it sees.
        sampled: rows of the head.
        head_steps: steps that have such rows.
    """

    steps: int = 0
    tokens: int = 0
    keys: int = 0
    pairs: int = 0
    sampled: int = 0
    head_steps: int = 0

    def add(self, queries: Sequence[int], keys: Sequence[int], sampled: int) -> None:
        """A step whose sequences bring `queries` new tokens each and then have `keys`."""
        self.steps += 1
        self.tokens += sum(queries)
        self.keys += sum(keys)
        # the last of q queries sees all k keys, the one before it one less, ...
        self.pairs += sum(q * k - q * (q - 1) // 2 for q, k in zip(queries, keys, strict=True))
        self.sampled += sampled
        self.head_steps += sampled > 0

    def since(self, before: Work) -> Work:
        """What came after `before`, an earlier copy."""
        return Work(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


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
        self.work = Work()
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
        plain = all(_takes_greatest(part) for part in sampling)
        logits = None if plain else self._empty_logits(len(sampling))
        tokens, finite, hidden = self._step(batch, asked, logits)
        errors: dict[SequenceId, str] = {}
        for part, fine in zip(parts, finite, strict=True):
            if not fine:
                errors[part.sequence_id] = _NOT_FINITE
                # only blocks from this step's first token on: those before may be shared
                first = part.start // self.cache.layout.block_size
                self.cache.clear_blocks(part.block_ids[first:])
        chosen: list[SampledToken | str]
        if logits is None:
            chosen = [SampledToken(token, None) if token >= 0 else NO_TOKEN for token in tokens]
        else:
            with _one_thread():
                chosen = sample(logits, sampling)
        sampled: dict[SequenceId, SampledToken] = {}
        for part, token in zip(sampling, chosen, strict=True):
            if isinstance(token, str):
                errors.setdefault(part.sequence_id, token)
            else:
                sampled[part.sequence_id] = token
        return StepResult(batch.step, sampled, errors, self._prompts(asked, hidden))

    def _step(
        self, batch: Batch, asked: Sequence[PromptRows], logits: torch.Tensor | None
    ) -> tuple[list[int], list[int], torch.Tensor]:
        """The greatest logit's token of each row that samples, whether each sequence is finite,
        and the hidden states of the rows in `asked`, one prompt behind the other.

        `logits` takes those of the rows that sample.
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
        kept = [some.first + i for some in asked for i in range(len(some.targets))]
        hidden = torch.empty(len(kept), _padded(self.decoder.spec.hidden_size))
        counts = [part.num_tokens for part in parts]
        keys = [part.end for part in parts]
        tokens, finite = self._call((ids, counts, keys, table, blocks, rows), logits, kept, hidden)
        return tokens, finite, hidden

    def _prompts(
        self, asked: Sequence[PromptRows], hidden: torch.Tensor
    ) -> dict[SequenceId, tuple[TokenLogprobs, ...]]:
        """Log probabilities of prompt tokens; logits are made and let go a few rows at a time."""
        found: dict[SequenceId, tuple[TokenLogprobs, ...]] = {}
        at = 0
        for some in asked:
            own = hidden[at : at + len(some.targets)]
            at += len(some.targets)
            for sequence_id, rows in prompt_logprobs([some._replace(first=0)], self._of(own)):
                with _one_thread():
                    found[sequence_id] = (*found.get(sequence_id, ()), *rows.read())
        return found

    def _of(self, hidden: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from rows of `hidden`, as a step keeps it, to their logits `[rows, vocab]`."""

        def logits_of(rows: torch.Tensor) -> torch.Tensor:
            own = hidden[rows]  # a copy: its rows lie one behind the other
            logits = self._empty_logits(len(own))
            native, threads = self._native, self.decoder.threads
            failed = native.library.pagelab_logits(
                native.isa,
                threads.pointer,
                address(self.decoder.model),
                own.data_ptr(),
                len(own),
                logits.data_ptr(),
            )
            if failed:
                raise MemoryError("out of memory for a prompt's logits")
            return logits

        return logits_of

    def _empty_logits(self, rows: int) -> torch.Tensor:
        """Room for logits `[rows, vocab]`, its rows as far apart as the extension has them."""
        vocab = self.decoder.spec.vocab_size
        return torch.empty(rows, _padded(vocab))[:, :vocab]

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits `[T, vocab]` at every position of a text of T tokens, from one step.

        The engine must be idle and keep no prefixes: the first blocks of the pool are written.
        """
        count = len(token_ids)
        blocks = range(-(-count // self.cache.layout.block_size))
        assert len(blocks) <= self.cache.num_blocks
        logits = self._empty_logits(count)
        self._call((token_ids, [count], [count], [0], blocks, range(count)), logits)
        return logits

    def _call(
        self,
        inputs: Sequence[Sequence[int]],
        logits: torch.Tensor | None,
        kept: Sequence[int] = (),
        hidden: torch.Tensor | None = None,
    ) -> tuple[list[int], list[int]]:
        """One step of token ids, counts, keys, starts of block tables, block ids, sampled rows.

        `hidden` takes the last hidden states of the rows in `kept`.
        """
        arrays = [np.array(x, np.int32) for x in inputs]
        ids, counts, *_, rows = arrays
        kept_rows = np.array(kept, np.int32)
        tokens, finite = np.empty(len(rows), np.int32), np.empty(len(counts), np.uint8)
        step = CStep(
            len(ids),
            len(counts),
            len(rows),
            self.cache.num_blocks,
            self.cache.layout.block_size,
            len(kept),
            *(array.ctypes.data for array in arrays),
            self._layers.ctypes.data,
            None if logits is None else logits.data_ptr(),
            tokens.ctypes.data,
            finite.ctypes.data,
            kept_rows.ctypes.data,
            None if hidden is None else hidden.data_ptr(),
            self._seconds.ctypes.data,
        )
        self.work.add(inputs[1], inputs[2], len(rows))
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


def _padded(size: int) -> int:
    return -(-size // 32) * 32


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's own threads would spin on the cores that the extension's need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
