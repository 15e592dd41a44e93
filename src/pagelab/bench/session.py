"""An engine and its workload, ready to be measured, and how long that took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pagelab.bench.limits import Ceilings, ReferenceTime, reference_time
from pagelab.bench.run import OnTokens, Run, run_workload
from pagelab.bench.settings import BenchSettings, EngineChoice
from pagelab.bench.workloads import build_workload
from pagelab.engine.garbage import no_full_collections
from pagelab.models.fetch import ModelSource, resolve
from pagelab.models.registry import load_spec
from pagelab.models.shape_source import resolve_shape
from pagelab.telemetry import MemorySampler, available_cores, own_peak_rss_bytes
from pagelab.types import SamplingParams
from pagelab.workloads import Workload

if TYPE_CHECKING:
    from pagelab.engine.llm import LLM

Stage = Callable[[str, int], AbstractContextManager[OnTokens]]
"""`with stage("repeat 1 of 3", output_tokens) as on_tokens`: shows one run's progress."""

_FIRST_PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """Seconds from nothing to a first token, in a process that had Python and PageLab's core only.

    Attributes:
        import_s: of torch and the engine.
        construct_s: of `LLM`: weights, KV pool.
        first_token_s: of a prompt of 8 tokens, alone.
        warmup_s: of each warm-up run (kernels are compiled and graphs captured in the first).
    """

    import_s: float
    construct_s: float
    first_token_s: float
    warmup_s: tuple[float, ...] = ()


@dataclass(slots=True, kw_only=True)
class Session:
    """What a benchmark has: the engine, the workload, and what it is asked."""

    settings: BenchSettings
    llm: LLM
    workload: Workload
    startup: Startup

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(tokens in, tokens out) of each request."""
        return [(len(r.token_ids), r.max_tokens) for r in self.workload.requests]

    def run(self, on_tokens: OnTokens | None = None) -> Run:
        """The whole workload once."""
        settings = self.settings
        with no_full_collections():  # as in `LLM.generate`
            return run_workload(
                self.llm.core,
                self.workload,
                temperature=settings.temperature,
                seed=settings.seed,
                concurrency=settings.concurrency,
                on_tokens=on_tokens,
            )

    def ceilings(self) -> Ceilings | None:
        """What the machine can do; None where the device has no memory left to measure it in."""
        import torch

        from pagelab.bench.ceilings import measure_ceilings
        from pagelab.execution.kv_cache import DTYPES

        try:
            return measure_ceilings(self.llm.device, DTYPES[self.llm.dtype])
        except torch.OutOfMemoryError:
            return None

    def reference(self, ceilings: Ceilings) -> ReferenceTime:
        """The workload's reference time under these ceilings."""
        return reference_time(
            self.llm.spec,
            self.llm.dtype,
            self.lengths,
            ceilings,
            concurrency=self.settings.concurrency,
            kv_dtype=self.llm.kv_dtype,
        )

    def engine_settings(self) -> dict[str, Any]:
        """The engine as it was built, `auto` resolved."""
        llm, memory = self.llm, self.llm.core.kv.config
        scheduling = llm.core.scheduler.config
        layout = llm.spec.kv_layout(llm.kv_dtype, memory.block_size)
        engine = self.settings.engine
        return {
            "model": llm.source.name,
            "random_weights": engine.random_weights,
            "parameters": llm.spec.num_parameters,
            "device": str(llm.device),
            "dtype": llm.dtype,
            "attention": llm.attention,
            "quantization": engine.quantization,
            "kv_dtype": llm.kv_dtype,
            "threads": _threads(engine),
            "allocator": memory.allocator,
            "prefix_caching": memory.prefix_caching,
            "block_size": memory.block_size,
            "num_blocks": memory.num_blocks,
            "kv_bytes": memory.num_blocks * layout.bytes_per_block,
            "kv_bytes_per_token": layout.bytes_per_token,
            "max_model_len": memory.max_model_len,
            "max_num_seqs": scheduling.max_num_seqs,
            "max_num_batched_tokens": scheduling.max_num_batched_tokens,
            "max_steps_in_flight": scheduling.max_steps_in_flight,
            "cuda_graphs": engine.cuda_graphs,
            "batch_invariant": engine.batch_invariant,
        }

    def memory(self) -> dict[str, int | None]:
        """Bytes so far: this process's peak RSS, and on a GPU what torch and the process took."""
        peak: dict[str, int | None] = {
            "peak_rss_bytes": own_peak_rss_bytes(),
            "peak_device_allocated_bytes": None,
            "peak_device_reserved_bytes": None,
            "device_process_bytes": None,
        }
        if self.llm.device.type == "cuda":
            import torch

            peak["peak_device_allocated_bytes"] = torch.cuda.max_memory_allocated(self.llm.device)
            peak["peak_device_reserved_bytes"] = torch.cuda.max_memory_reserved(self.llm.device)
            with MemorySampler(os.getpid()) as sampler:
                peak["device_process_bytes"] = sampler.sample()[2] or None
        return peak


def open_session(settings: BenchSettings, stage: Stage) -> Session:
    """Build the workload, then the engine, generate a first token, and warm up.

    Raises:
        ConfigError, ModelError: what `LLM` and `build_workload` raise, before anything is loaded
            where that can be known.
        RequestError, StepError: the engine cannot serve the workload.
    """
    engine = settings.engine
    spec = load_spec(_source(engine))
    max_model_len = engine.length(spec, settings.workload.longest)
    workload = build_workload(
        settings.workload,
        vocab_size=spec.vocab_size,
        max_model_len=min(max_model_len, spec.max_position),
        seed=settings.seed,
    )
    with stage("loading", 0):
        started = time.perf_counter()
        from pagelab.engine.llm import LLM  # torch

        imported = time.perf_counter()
        llm = LLM(engine.model, max_model_len=max_model_len, **_options(engine))
        constructed = time.perf_counter()
        prompt = [token % spec.vocab_size for token in _FIRST_PROMPT][: max_model_len - 1]
        one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        llm.core.add_request(prompt, one)
        while llm.core.has_unfinished_requests:
            llm.core.step()
        first = time.perf_counter()
    startup = Startup(
        import_s=imported - started,
        construct_s=constructed - imported,
        first_token_s=first - constructed,
    )
    session = Session(settings=settings, llm=llm, workload=workload, startup=startup)
    warmups = []
    for number in range(settings.warmup):
        name = f"warm-up {number + 1} of {settings.warmup}"
        with stage(name, workload.output_tokens) as on_tokens:
            warmups.append(session.run(on_tokens).duration_s)
    session.startup = replace(startup, warmup_s=tuple(warmups))
    return session


def _source(engine: EngineChoice) -> ModelSource:
    return resolve_shape(engine.model) if engine.random_weights else resolve(engine.model)


def _threads(engine: EngineChoice) -> int:
    return available_cores() if engine.threads is None else engine.threads


def _options(engine: EngineChoice) -> dict[str, Any]:
    """`LLM`'s keywords; those that are None stay the engine's own."""
    options = {
        "random_weights": engine.random_weights,
        "device": engine.device,
        "dtype": engine.dtype,
        "kv_memory": engine.kv_memory,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "block_size": engine.block_size,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "max_steps_in_flight": engine.max_steps_in_flight,
        "cuda_graphs": engine.cuda_graphs,
        "batch_invariant": engine.batch_invariant,
        "attention": engine.attention,
        "quantization": engine.quantization,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "threads": _threads(engine),
        "prefix_caching": engine.prefix_caching,
        "progress": False,  # the benchmark has its own
    }
    return {name: value for name, value in options.items() if value is not None}
