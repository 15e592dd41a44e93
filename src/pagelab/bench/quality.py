"""How good a precision is: a fixed text under it and under float32, position by position.

::

    perplexity   e^(mean of -log p(next token)) over the text's tokens
    top-1        share of positions at which both find the same token the most probable
    divergence   mean of KL(float32 ‖ precision) over the whole vocabulary, in nats

The text is PageLab's own documentation (`quality_text.txt`), cut into windows; each window is one
step from an empty context, by the same kernels that serve requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch

from pagelab.errors import ConfigError

if TYPE_CHECKING:
    from pagelab.engine.llm import LLM

PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "q4": {"quantization": "q4"},
}
"""Precisions by name, as `LLM`'s keywords."""

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Token ids `[T]` → logits `[T, vocab]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One precision's figures; see the module."""

    precision: str
    tokens: int
    perplexity: float
    top1_agreement: float
    divergence: float


def quality_text() -> str:
    """The fixed text."""
    return resources.files("pagelab.bench").joinpath("quality_text.txt").read_text()


def windows(token_ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut a text; a last window too short to predict anything is left out."""
    cuts = [token_ids[at : at + size] for at in range(0, len(token_ids), size)]
    return [cut for cut in cuts if len(cut) > 1]


def measure_quality(
    precision: str, logits: Logits, exact: Iterable[torch.Tensor], texts: Sequence[Sequence[int]]
) -> Quality:
    """Compare a precision with float32's log probabilities (`exact`, one `[T, vocab]` a window)."""
    loss = agreement = divergence = 0.0
    positions = predicted = 0
    for ids, want in zip(texts, exact, strict=True):
        got = logits(ids).log_softmax(dim=-1)
        loss -= float(got[:-1].gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
        agreement += int((got.argmax(dim=-1) == want.argmax(dim=-1)).sum())
        divergence += float((want.exp() * (want - got)).sum(dim=-1).double().sum())
        positions += len(ids)
        predicted += len(ids) - 1
    return Quality(
        precision=precision,
        tokens=positions,
        perplexity=math.exp(loss / predicted),
        top1_agreement=agreement / positions,
        divergence=divergence / positions,
    )


def bench_quality(
    model: str | None,
    precisions: Sequence[str],
    *,
    window: int = 512,
    max_tokens: int | None = None,
    token_ids: Sequence[int] | None = None,
    kv_cache_dtype: str = "auto",
) -> Iterator[Quality]:
    """Measure precisions one after the other, float32 first; only one model is loaded at a time.

    Args:
        model: as `LLM`'s.
        precisions: names of `PRECISIONS`.
        window: tokens of a window.
        max_tokens: of the text; None: all of it.
        token_ids: another text.
        kv_cache_dtype: as `LLM`'s, for the precisions: what they are compared with, float32, keeps
            K/V in float32. With `int8`, float32 itself may be among the precisions.

    Raises:
        ConfigError: an unknown precision, or the compiled extension does not run here.
    """
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown:
        raise ConfigError(f"no precision {unknown[0]!r}: choose of {', '.join(PRECISIONS)}")
    llm = _load(model, "float32", window)
    text = llm.tokenizer.encode(quality_text()) if token_ids is None else token_ids
    texts = windows(text[:max_tokens], window)
    exact = [_score(llm, ids).log_softmax(dim=-1) for ids in texts]
    yield measure_quality("float32", lambda ids: _score(llm, ids), exact, texts)
    for name in dict.fromkeys(precisions):
        if name == "float32" and kv_cache_dtype == "auto":
            continue
        del llm  # before the next one is there
        llm = _load(model, name, window, kv_cache_dtype)
        title = name if kv_cache_dtype == "auto" else f"{name}, {kv_cache_dtype} K/V"
        yield measure_quality(title, lambda ids, llm=llm: _score(llm, ids), exact, texts)  # type: ignore[misc]


def _load(model: str | None, precision: str, window: int, kv_cache_dtype: str = "auto") -> LLM:
    from pagelab.engine.llm import LLM

    return LLM(
        model,
        device="cpu",
        attention="native",
        prefix_caching=False,
        max_num_batched_tokens=window,
        kv_memory="256MiB",
        progress=False,
        kv_cache_dtype=kv_cache_dtype,
        **PRECISIONS[precision],  # type: ignore[arg-type]
    )


def _score(llm: LLM, token_ids: Sequence[int]) -> torch.Tensor:
    scored: torch.Tensor = llm.core.runner.score(token_ids)  # type: ignore[attr-defined]
    return scored
