"""A toy engine in a process of its own: starts in a quarter of a second, and fails on demand."""

from __future__ import annotations

import os
import time
from typing import Any

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.async_llm import AsyncLLM
from pagelab.engine.core import EngineCore
from pagelab.engine.launch import Launch
from pagelab.engine.messages import EngineInfo
from pagelab.engine.worker_process import Loaded
from pagelab.errors import ConfigError
from pagelab.models.tokenizer import Tokenizer
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.types import SampledToken, TokenLogprobs
from tests.support.toy_runner import ToyRunner

VOCAB = 258  # 256 bytes and two special tokens: `tiny_models.byte_tokenizer`
POISON, POISON_ALL, DEADLY = 250, 251, 252  # first tokens that fail a sequence, a step, a process


class SlowToyRunner(ToyRunner):
    """A step takes `step_s` seconds; poisonous prompts fail as their names say."""

    def __init__(self, num_blocks: int, block_size: int, step_s: float) -> None:
        super().__init__(num_blocks, block_size, VOCAB)
        self.step_s = step_s

    def submit(self, batch: Batch) -> Batch:
        self.batches.clear()  # a server runs for long
        return super().submit(batch)

    def collect(self, handle: Batch) -> StepResult:
        time.sleep(self.step_s)
        for part in handle.sequences:
            first = part.token_ids[0] if part.start == 0 else None
            if first == POISON:
                self.fail_sequences.add(part.sequence_id)
            if first == POISON_ALL:
                raise RuntimeError("toy failure")
            if first == DEADLY:
                os.abort()
        result = super().collect(handle)
        parts = {part.sequence_id: part for part in handle.sequences}
        sampled = {
            key: SampledToken(token, _logprobs(token, parts[key].params.logprobs))
            for key, (token, _) in result.sampled.items()
        }
        prompts = {
            part.sequence_id: tuple(
                found
                for token in part.logits.targets
                if (found := _logprobs(token, part.params.prompt_logprobs)) is not None
            )
            for part in handle.sequences
            if part.logits is not None and part.logits.targets
        }
        return StepResult(result.step, sampled, result.errors, prompts)


def _logprobs(token: int, top: int | None) -> TokenLogprobs | None:
    """The token and its successors, each half as probable."""
    if top is None:
        return None
    others = tuple(((token + i) % VOCAB, -0.5 - 0.7 * i) for i in range(top))
    return TokenLogprobs(-0.5, others)


def make(
    num_blocks: int = 256,
    block_size: int = 4,
    step_s: float = 0.0,
    max_model_len: int = 512,
    max_num_seqs: int = 64,
    error: str = "",
) -> Loaded:
    """The factory that `engine.worker_process` calls."""
    if error:
        raise ConfigError(error)
    memory = MemoryConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        check_invariants=True,
    )
    scheduling = SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=max_num_seqs)
    runner = SlowToyRunner(num_blocks, block_size, step_s)
    core = EngineCore(runner, memory, scheduling, vocab_size=VOCAB, eos_token_ids=(257,))
    return core, EngineInfo(
        "toy", os.getpid(), max_model_len, VOCAB, num_blocks, block_size, 64, max_num_seqs, 256,
        "paged", True, "cpu", "float32", 0.0,
    ), None  # fmt: skip


def toy_tokenizer() -> Tokenizer:
    """A byte a token."""
    from tests.support.tiny_models import CHAT_TEMPLATE, byte_tokenizer

    return Tokenizer(
        byte_tokenizer(),
        eos_token_ids=(257,),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=CHAT_TEMPLATE,
    )


def toy_launch(**options: Any) -> Launch:
    """An engine of `make`, with a byte a token."""
    return Launch("tests.support.toy_process:make", options, toy_tokenizer)


def toy_llm(*, max_waiting: int = 2048, **options: Any) -> AsyncLLM:
    """An `AsyncLLM` over it."""
    return AsyncLLM(max_waiting=max_waiting, launch=toy_launch(**options))
