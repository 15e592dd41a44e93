"""PageLab: a PagedAttention engine that you can measure.

>>> from pagelab import LLM, SamplingParams
>>> llm = LLM()                                             # the default model
>>> llm.generate(["Hello!"], SamplingParams(max_tokens=8))  # doctest: +SKIP

Importing this package does not import torch; `LLM` does, when it is first used. `AsyncLLM` leaves
that to the process in which it runs its engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagelab.errors import PageLabError
from pagelab.types import (
    CompletionOutput,
    FinishReason,
    GuidedDecoding,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    from pagelab.engine.async_llm import AsyncLLM
    from pagelab.engine.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "FinishReason",
    "GuidedDecoding",
    "PageLabError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from pagelab.engine.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from pagelab.engine.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'pagelab' has no attribute {name!r}")
