"""The runner of an engine on the Triton kernels."""

from __future__ import annotations

from pagelab.engine.llm import LLM
from pagelab.execution.gpu_runner import GpuRunner


def gpu_runner_of(llm: LLM) -> GpuRunner:
    """An engine's runner, which is the GPU's."""
    runner = llm.core.runner
    assert isinstance(runner, GpuRunner)
    return runner
