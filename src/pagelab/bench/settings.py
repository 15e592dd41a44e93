"""What a benchmark is asked to do, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagelab.bench.workloads import WorkloadChoice
from pagelab.errors import ConfigError
from pagelab.models.spec import ModelSpec

USUAL_LENGTH = 4096
"""Tokens a request may reach where nobody says: a model's own maximum may be 131,072."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The engine, in `LLM`'s words; None leaves the engine's own default.

    Prefix caching is off, so that a repeat is no cheaper than the run before it.
    """

    model: str | None = None
    random_weights: bool = False
    device: str = "auto"
    dtype: str = "auto"
    kv_memory: int | str | None = None
    gpu_memory_utilization: float | None = None
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_steps_in_flight: int | None = None
    cuda_graphs: bool = True
    batch_invariant: bool = False
    attention: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    threads: int | None = None
    prefix_caching: bool = False

    def length(self, spec: ModelSpec, longest: int | None) -> int:
        """Tokens a request may reach: as said, or the usual, or the workload's longest."""
        if self.max_model_len is not None:
            return self.max_model_len
        return min(spec.max_position, max(USUAL_LENGTH, longest or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """One benchmark.

    Attributes:
        engine: what runs.
        workload: what it is asked.
        temperature: 0 is greedy.
        warmup: runs of the whole workload that are not counted.
        repeats: runs that are.
        seed: of token ids, arrivals and sampling.
        concurrency: requests at the same time at most, the next as one ends; None: all.
        limits: measure what the machine could do.
        profile: where the trace of an extra run goes; None: no such run.
    """

    engine: EngineChoice = field(default_factory=EngineChoice)
    workload: WorkloadChoice = field(default_factory=WorkloadChoice)
    temperature: float = 0.0
    warmup: int = 1
    repeats: int = 3
    seed: int = 0
    concurrency: int | None = None
    limits: bool = True
    profile: Path | None = None

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--warmup", self.warmup, 0),
            ("--repeats", self.repeats, 1),
            ("--concurrency", 1 if self.concurrency is None else self.concurrency, 1),
        ):
            if value < least:
                raise ConfigError(f"{option} must be at least {least}, not {value}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature must be at least 0, not {self.temperature}")
        if self.concurrency is not None and self.workload.rate is not None:
            raise ConfigError("--rate says when requests arrive: leave --concurrency out")

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the record."""
        return {
            "temperature": self.temperature,
            "warmup": self.warmup,
            "repeats": self.repeats,
            "seed": self.seed,
            "concurrency": self.concurrency,
            "rate": self.workload.rate,
            "limits": self.limits,
        }
