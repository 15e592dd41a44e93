"""A stand-in for the `vllm` package, with the parts of vLLM 0.26 that the method uses.

It has real paged bookkeeping (a null block, growth by blocks, preemption of the latest request,
events that come with a request's next token, statistics after a step) and no model: the token at a
position follows from the prompt. It refuses arguments that vLLM does not have.
"""

from __future__ import annotations

import enum
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class _EventType(enum.IntEnum):
    QUEUED = 1
    SCHEDULED = 2
    PREEMPTED = 3


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class _Request:
    id: str
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: int = 0
    cached: int = 0
    preempted: bool = False
    events: list[Any] = field(default_factory=list)

    def note(self, kind: _EventType) -> None:
        self.events.append(SimpleNamespace(type=kind, timestamp=time.monotonic()))


class _Stats:
    """The engine's loggers; counts what it is told."""

    def __init__(self) -> None:
        self.records = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None
    ) -> None:
        self.records += 1


class _OutputProcessor:
    def process_outputs(
        self, outputs: list[Any], engine_core_timestamp: float, iteration_stats: Any
    ) -> list[Any]:
        return [output.made for output in outputs]


class LLMEngine:
    def __init__(self, num_blocks: int, block_size: int, batch: int, finish_reason: str) -> None:
        cache = SimpleNamespace(num_gpu_blocks=num_blocks, block_size=block_size)
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.logger_manager = _Stats()
        self.output_processor = _OutputProcessor()
        self._size, self._free, self._batch = block_size, num_blocks - 1, batch
        self._usable = num_blocks - 1
        self._finish_reason = finish_reason
        self.waiting: list[_Request] = []
        self.running: list[_Request] = []
        self.truth: list[tuple[int, int]] = []  # (slots written, slots in blocks) after each step

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> str:
        assert set(prompt) == {"prompt_token_ids"}
        internal = f"{request_id}-{len(self.waiting):08x}"
        request = _Request(internal, prompt["prompt_token_ids"], params)
        request.note(_EventType.QUEUED)
        self.waiting.append(request)
        return internal

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        self._prefix = SimpleNamespace(
            queries=0, hits=0, preempted_queries=0, preempted_hits=0, requests=0
        )
        scheduled = self._schedule()
        outputs = [self._advance(request, count) for request, count in scheduled]
        outputs = [output for output in outputs if output is not None]
        stats = SimpleNamespace(
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            num_skipped_waiting_reqs=0,
            kv_cache_usage=1.0 - self._free / self._usable,
            prefix_cache_stats=self._prefix,
        )
        made = self.output_processor.process_outputs(
            outputs, engine_core_timestamp=time.monotonic(), iteration_stats=None
        )
        if outputs:
            self.truth.append(
                (
                    sum(r.computed for r in self.running),
                    sum(r.blocks for r in self.running) * self._size,
                )
            )
            self.logger_manager.record(
                scheduler_stats=stats, iteration_stats=None, mm_cache_stats=None
            )
        return made

    def _schedule(self) -> list[tuple[_Request, int]]:
        budget, scheduled = self._batch, []
        for request in list(self.running):
            if request not in self.running or not budget:
                continue  # preempted by one before it
            count = min(budget, len(request.prompt) + len(request.tokens) - request.computed)
            while not self._grow(request, count):
                victim = self.running.pop()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                scheduled.append((request, count))
                budget -= count
        while self.waiting and budget:
            request = self.waiting[0]
            admitted = self._admit(request, budget)
            if admitted is None:
                break
            self.waiting.pop(0)
            self.running.append(request)
            scheduled.append((request, admitted))
            budget -= admitted
        return scheduled

    def _admit(self, request: _Request, budget: int) -> int | None:
        total = len(request.prompt) + len(request.tokens)
        # what it had is still there, all but its last block
        found = (total - 1) // self._size * self._size if request.preempted else 0
        request.computed = found
        count = min(budget, total - found)
        if not self._grow(request, count):
            request.computed = 0
            return None
        request.note(_EventType.SCHEDULED)
        if request.preempted:
            self._prefix.preempted_queries += total
            self._prefix.preempted_hits += found
        else:
            self._prefix.queries += total
        return count

    def _grow(self, request: _Request, count: int) -> bool:
        needed = -(-(request.computed + count) // self._size) - request.blocks
        if needed > self._free:
            return False
        request.blocks += needed
        self._free -= needed
        return True

    def _preempt(self, request: _Request) -> None:
        self._free += request.blocks
        request.blocks = request.computed = 0
        request.preempted = True
        request.note(_EventType.PREEMPTED)
        self.waiting.insert(0, request)

    def _advance(self, request: _Request, count: int) -> Any:
        request.computed += count
        if request.computed < len(request.prompt) + len(request.tokens):
            return None
        token = (sum(request.prompt) + 7 * len(request.tokens)) % 251
        request.tokens.append(token)
        finished = len(request.tokens) == request.params.max_tokens
        if finished:
            self.running.remove(request)
            self._free += request.blocks
        assert request.params.output_kind is RequestOutputKind.DELTA
        reason = self._finish_reason if finished else None
        made = SimpleNamespace(
            request_id=request.id.rsplit("-", 1)[0],
            outputs=[SimpleNamespace(token_ids=[token], finish_reason=reason)],
            finished=finished,
            num_cached_tokens=0,
        )
        events, request.events = request.events, []
        return SimpleNamespace(
            request_id=request.id, events=events or None, new_token_ids=[token], made=made
        )


class FakeVllm:
    """Installs the stand-in; `bytes_per_token` is what vLLM would find in the model's config."""

    def __init__(
        self,
        bytes_per_token: int,
        *,
        error: Exception | None = None,
        finish_reason: str = "length",
    ) -> None:
        self.arguments: dict[str, Any] = {}
        self.files: set[str] = set()
        self.engine: LLMEngine | None = None
        fake = self

        class LLM:
            def __init__(
                self,
                model: str,
                *,
                dtype: str = "auto",
                seed: int = 0,
                skip_tokenizer_init: bool = False,
                kv_cache_memory_bytes: int | None = None,
                block_size: int = 16,
                max_model_len: int | None = None,
                max_num_batched_tokens: int = 8192,
                disable_log_stats: bool = True,
            ) -> None:
                fake.arguments = {"model": model, "dtype": dtype, "seed": seed}
                fake.files = {path.name for path in Path(model).iterdir()}
                if error is not None:
                    raise error
                assert kv_cache_memory_bytes is not None
                assert skip_tokenizer_init
                assert not disable_log_stats
                self.llm_engine = fake.engine = LLMEngine(
                    kv_cache_memory_bytes // (block_size * bytes_per_token),
                    block_size,
                    max_num_batched_tokens,
                    finish_reason,
                )

        self.module = types.ModuleType("vllm")
        self.sampling = types.ModuleType("vllm.sampling_params")
        vars(self.module).update(LLM=LLM, SamplingParams=SamplingParams, __version__="0.26.0")
        vars(self.sampling).update(
            SamplingParams=SamplingParams, RequestOutputKind=RequestOutputKind
        )

    @property
    def modules(self) -> dict[str, types.ModuleType]:
        """For `sys.modules`."""
        return {"vllm": self.module, "vllm.sampling_params": self.sampling}
