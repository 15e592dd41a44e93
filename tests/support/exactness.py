"""How exact the GPU's runner is: greedy tokens in float32, and logits in lower precision.

Used by `tests/gpu`, which judges, and `benchmarks/gpu_exactness.py`, which prints.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagelab.engine.llm import LLM
from pagelab.models.fetch import resolve
from pagelab.models.hf_export import to_transformers
from pagelab.models.registry import load_spec
from pagelab.types import SamplingParams
from tests.support.engines import greedy
from tests.support.tiny_models import tiny_model

STEPS = 48
PROMPTS = [
    [random.Random(f"{length} {i}").randrange(256) for _ in range(length)]
    for i, length in enumerate((1, 7, 16, 33, 64, 130, 2))
]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one step in flight": {"max_steps_in_flight": 1},
    "three steps in flight": {"max_steps_in_flight": 3},
    "without graphs": {"cuda_graphs": False},
    "contiguous": {"allocator": "contiguous-max"},
    "blocks of 64, seven tokens a step": {"block_size": 64, "max_num_batched_tokens": 7},
    "one at a time": {"max_num_seqs": 1},
    "batch-invariant": {"batch_invariant": True},
    "preemptions": {"watermark": 0.0, "block_size": 8, "prefix_caching": False},
}
"""Ways to run that must not change a token."""

PREEMPTING = "preemptions"


def tiny_engine(name: str, **options: Any) -> LLM:
    """A tiny model in float32."""
    defaults: dict[str, Any] = {"kv_memory": "8MiB", "max_model_len": 256, "dtype": "float32"}
    return LLM(str(tiny_model(name)), check_invariants=True, progress=False, **(defaults | options))


@functools.cache
def tokens_of_the_cpu(name: str) -> list[tuple[int, ...]]:
    """The greedy tokens of each prompt, by the runner that is held to transformers'."""
    outputs = tiny_engine(name, device="cpu").generate(PROMPTS, greedy(STEPS), progress=False)
    return [output.token_ids for output in outputs]


def variant_engine(name: str, variant: str, device: str) -> LLM:
    """A tiny model on a device, run in one of the ways."""
    options = dict(VARIANTS[variant])
    if variant == PREEMPTING:
        layout = load_spec(resolve(str(tiny_model(name)))).kv_layout("float32", 8)
        options["kv_memory"] = 264 * layout.bytes_per_token
    return tiny_engine(name, device=device, attention="triton", **options)


def equal_tokens(llm: LLM, name: str) -> tuple[int, int]:
    """(tokens that equal the CPU's, tokens); each prompt twice, with prefix hits where they are."""
    right = total = 0
    for _ in range(2):
        outputs = llm.generate(PROMPTS, greedy(STEPS), progress=False)
        for output, want in zip(outputs, tokens_of_the_cpu(name), strict=True):
            right += sum(a == b for a, b in zip(output.token_ids, want, strict=False))
            total += len(want)
    return right, total


@dataclass(frozen=True, slots=True)
class Errors:
    """Log probabilities against float32's: mean KL divergence, and the largest difference."""

    mean_kl: float
    largest: float


@dataclass(frozen=True, slots=True)
class Precision:
    """Ours and transformers' own, in the same dtype with the same weights."""

    ours: Errors
    theirs: Errors
    positions: int


def precision(folder: Path, prompts: Sequence[list[int]], dtype: str, device: str) -> Precision:
    """Compare the log probabilities after each prompt and after each of 8 tokens from there.

    The reference is transformers in float32 with the weights as they are in `dtype`, on the
    tokens that we chose: prompts go through the kernels for prompts, tokens through those for
    single tokens.
    """
    source = resolve(folder)
    llm = LLM(
        str(folder),
        device=device,
        dtype=dtype,
        attention="triton",
        kv_memory="64MiB",
        max_model_len=256,
        progress=False,
    )
    vocab = llm.spec.vocab_size
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=vocab)
    outputs = llm.generate(prompts, params, progress=False)
    ours: list[torch.Tensor] = []
    for output in outputs:
        for each in output.outputs[0].logprobs or ():
            ids, values = zip(*each.top, strict=True)
            row = torch.empty(vocab)
            row[list(ids)] = torch.tensor(values)
            ours.append(row)
    contexts = [[*p, *o.token_ids[:-1]] for p, o in zip(prompts, outputs, strict=True)]
    starts = [len(prompt) - 1 for prompt in prompts]
    del llm
    theirs_model = to_transformers(source, load_spec(source), dtype=dtype).to(device)
    theirs = _log_probabilities(theirs_model, contexts, starts)
    exact = _log_probabilities(theirs_model.float(), contexts, starts)
    return Precision(
        _errors(torch.stack(ours), exact), _errors(theirs, exact), positions=len(exact)
    )


def _log_probabilities(
    model: Any, contexts: Sequence[list[int]], starts: Sequence[int]
) -> torch.Tensor:
    rows = []
    with torch.inference_mode():
        for ids, start in zip(contexts, starts, strict=True):
            logits = model(torch.tensor([ids], device=model.device)).logits[0, start:]
            rows.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(rows)


def _errors(got: torch.Tensor, exact: torch.Tensor) -> Errors:
    kl = (exact.double().exp() * (exact.double() - got.double())).sum(-1)
    return Errors(float(kl.mean()), float((got - exact).abs().max()))


def save_true_shape(name: str, folder: Path) -> None:
    """A random model of a true shape, `gpt2` or `qwen3-0.6b`, in bfloat16 as it is published."""
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(initializer_range=0.06)
    else:
        config = transformers.Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            max_position_embeddings=40_960,
            initializer_range=0.04,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
