"""PageLab: a PagedAttention engine that you can measure.

>>> from pagelab import LLM, SamplingParams
>>> llm = LLM()                                             # the default model
>>> llm.generate(["Hello!"], SamplingParams(max_tokens=8))  # doctest: +SKIP

Importing this package does not import torch; `LLM` does, when it is first used.
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
    from pagelab.engine.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
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
    raise AttributeError(f"module 'pagelab' has no attribute {name!r}")
