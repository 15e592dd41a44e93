"""The options of an engine, by name and type, for those that pass them on without torch."""

from __future__ import annotations

from typing_extensions import TypedDict


class EngineOptions(TypedDict, total=False):
    """`LLM`'s keywords, whose meaning is said there. What is left out keeps `LLM`'s default."""

    device: str
    dtype: str
    kv_memory: int | str | None
    gpu_memory_utilization: float | None
    block_size: int
    max_model_len: int | None
    allocator: str
    placement: str
    prefix_caching: bool
    watermark: float
    max_num_batched_tokens: int | None
    max_num_seqs: int
    attention: str
    threads: int | None
    max_steps_in_flight: int | None
    random_weights: bool
    cuda_graphs: bool
    batch_invariant: bool
    quantization: str | None
    kv_cache_dtype: str
    progress: bool
    check_invariants: bool
