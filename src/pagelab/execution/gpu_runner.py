"""Runs a decoder on a GPU that is a step or more ahead of the host.

::

    host    schedule n+1 | submit n+1 | collect n | schedule n+2 | …
    device  ······· step n ·······| ······· step n+1 ·······| ······· step n+2 ·······|

A decode step, from the last sampled tokens to the next ones, is one CUDA graph over state that
lies on the device (`device_state`); the host sends changes of membership and new block ids, and
reads tokens back when it gets to them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from pagelab.config import SchedulerConfig
from pagelab.execution.buckets import (
    MAX_GRAPH_TOKENS,
    decode_bucket,
    largest_step,
    ragged_seqs,
    token_bucket,
)
from pagelab.execution.cuda_graphs import GraphCache
from pagelab.execution.device_state import DeviceState, Row
from pagelab.execution.kv_cache import KVCache
from pagelab.execution.logits.logprobs import (
    ROWS_AT_ONCE,
    RowLogprobs,
    prompt_logprobs,
    prompt_rows,
)
from pagelab.execution.logits.process import process
from pagelab.execution.oom import in_step
from pagelab.execution.ragged_inputs import RaggedShape, fill, split
from pagelab.execution.sampler import NO_TOKEN
from pagelab.kernels.decode_items import DecodePlan
from pagelab.kernels.elementwise import Pending, project
from pagelab.kernels.launch import device_of
from pagelab.kernels.linear import Peaks, empty_rows
from pagelab.kernels.mailbox import Mailbox
from pagelab.kernels.paged_decode import Projections, decode_attention
from pagelab.kernels.paged_prefill import prefill_attention, queries_per_tile
from pagelab.kernels.sampling import (
    SamplingMode,
    SamplingWorkspace,
    sample_tokens,
)
from pagelab.kernels.sizes import MAX_CHANGES, MAX_LINEAR_ROWS, MAX_SUPPRESSED
from pagelab.kernels.step_state import (
    advance,
    begin_decode,
    begin_ragged,
    pick_and_advance,
)
from pagelab.kernels.updates import apply_updates
from pagelab.models.decoder import Decoder
from pagelab.models.fused_decoder import FusedDecoder
from pagelab.scheduling.batch import Batch, ScheduledSequence, StepResult
from pagelab.types import SampledToken, SequenceId, TokenLogprobs


@dataclass(slots=True)
class InFlight:
    """A step that was submitted."""

    batch: Batch
    results: torch.Tensor  # [3, S] int32: tokens, usable, finite; S with padding
    done: torch.cuda.Event | None
    logprobs: dict[SequenceId, _Logprobs] = field(default_factory=dict)
    prompts: list[tuple[SequenceId, RowLogprobs]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)  # rows whose logits were not to process


@dataclass(frozen=True, slots=True)
class _Sampling:
    """How a step's tokens are chosen.

    Attributes:
        mode: of the sampling kernels.
        logprobs: somebody wants log probabilities.
        plain: everyone takes the most probable token and nothing is forbidden: no logits needed.
        masked: rows with more forbidden ids than the device keeps, and these.
        processed: sequences whose logits the host changes or reads; None: nobody's. Such a step
            runs kernel by kernel.
        failed: what went wrong with that, by row.
        prompts: what it read of prompts.
    """

    mode: SamplingMode
    logprobs: bool
    plain: bool
    masked: tuple[tuple[int, tuple[int, ...]], ...] = ()
    processed: tuple[ScheduledSequence, ...] | None = None
    failed: dict[int, str] = field(default_factory=dict)
    prompts: list[tuple[SequenceId, RowLogprobs]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    count: int
    chosen: torch.Tensor  # [1]
    values: torch.Tensor  # [count]
    ids: torch.Tensor


class GpuRunner:
    """The `engine.core.Runner` of a model on an NVIDIA GPU, by Triton kernels.

    Also runs in Triton's interpreter on a CPU, slowly, which is how it is tested without a GPU.

    Args:
        decoder: built with `pack=False`; taken over.
        cache: with a scratch block behind the pool's.
        config: of the scheduler whose batches it gets.
        max_model_len: tokens that a sequence may reach.
        graphs: run steps as CUDA graphs.
        batch_invariant: a sequence's tokens do not depend on what else is in its steps, to the
            bit, in any dtype: the same tiles and splits for every batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        config: SchedulerConfig,
        *,
        max_model_len: int,
        graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        spec = decoder.spec
        self.cache = cache
        self.device = decoder.embedding.device
        cuda = self.device.type == "cuda"
        self._launch = device_of(self.device)
        self.decoder = FusedDecoder(
            decoder,
            self._launch,
            max_tokens=largest_step(config.max_num_batched_tokens, config.max_num_seqs)[0],
            batch_invariant=batch_invariant,
        )
        self._invariant = batch_invariant
        self.graphs = GraphCache(enabled=graphs and cuda)
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self._scale = spec.head_dim**-0.5
        self._max_seqs = decode_bucket(config.max_num_seqs)
        size = cache.layout.block_size
        self.state = DeviceState(
            # sequences may be cancelled and others come while each of these steps is under way
            max(2, config.max_steps_in_flight) * self._max_seqs,
            -(-max_model_len // size),
            cache.num_blocks,
            self.device,
            vocab_size=spec.vocab_size,
        )
        self._tile = queries_per_tile(spec.num_heads, spec.num_kv_heads)
        self._target_items = max(1, 2 * self._launch.num_sms // spec.num_kv_heads)
        self._plan = DecodePlan(
            max(self._max_seqs, ragged_seqs(self._max_seqs)),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            self._target_items,
            self.device,
        )
        self._allocate(config)
        self._under_way: list[int] = []  # steps
        if self._stream is not None:
            # the weights, the cache and all of the above were written on another stream
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            self._compile_ahead()

    def _allocate(self, config: SchedulerConfig) -> None:
        spec = self.decoder.spec
        tokens, seqs = largest_step(config.max_num_batched_tokens, config.max_num_seqs)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=self.device)

        half = max(1, spec.head_dim // 2)
        self._x = empty(tokens, spec.hidden_size, dtype=self.decoder.dtype)
        self._cos = empty(tokens, half, dtype=torch.float32)
        self._sin = empty(tokens, half, dtype=torch.float32)
        self._logits = empty(seqs, spec.vocab_size, dtype=torch.float32)
        self._results = empty(3, seqs, dtype=torch.int32)
        self._mailbox = Mailbox(max(2, config.max_steps_in_flight), seqs, self.device)
        self._each = torch.arange(seqs, dtype=torch.int32, device=self.device)
        self._sampling = SamplingWorkspace(seqs, spec.vocab_size, self.device)
        self._peaks = Peaks(min(seqs, MAX_LINEAR_ROWS), spec.vocab_size, self.device)
        self._upload = torch.zeros(2 + 2 * MAX_CHANGES, dtype=torch.int32, device=self.device)
        largest = RaggedShape(tokens, seqs, self._tile, self._target_items)
        self._ragged = empty(largest.num_words, dtype=torch.int32)

    # The Runner

    def submit(self, batch: Batch) -> InFlight:
        """Start a step."""
        try:
            return self._submit(batch)
        except BaseException:
            self.state.forget_order()
            self._mailbox.lose()
            raise

    def _submit(self, batch: Batch) -> InFlight:
        with torch.inference_mode(), self._on_stream(), in_step(batch, self.device):
            self.cache.copy_blocks(batch.copies)
            parts = batch.sequences
            state, step = self.state, batch.step
            # a step that failed is not under way, and never will be collected
            collected = self._under_way[0] - 1 if self._under_way else step - 1
            known = [state.row(part, step, collected) for part in parts]
            rows = [row.index for row in known]
            how = self._sampling_of(parts, known)
            if not self._invariant and all(part.num_tokens == 1 and part.samples for part in parts):
                results = self._submit_decode(rows, how)
            else:
                results = self._submit_ragged(rows, parts, how)
            in_flight = InFlight(batch, results, None)
            if how.logprobs:
                self._add_logprobs(in_flight)
            in_flight.failed, in_flight.prompts = how.failed, how.prompts
            in_flight.done = self._record()
            self._under_way.append(step)
            self._mailbox.keep()
            return in_flight

    def collect(self, handle: InFlight) -> StepResult:
        """Wait for a step and read its tokens."""
        if handle.done is not None:
            handle.done.synchronize()
        batch = handle.batch
        self._under_way = [step for step in self._under_way if step > batch.step]
        tokens, usable, finite = handle.results.tolist()
        if 0 not in finite and 0 not in usable and not handle.logprobs and not handle.failed:
            parts = zip(batch.sequences, tokens, strict=False)  # behind them is padding
            each = {p.sequence_id: SampledToken(token) for p, token in parts if p.samples}
            return StepResult(batch.step, each, prompt_logprobs=_read_prompts(handle))
        sampled: dict[SequenceId, SampledToken] = {}
        errors: dict[SequenceId, str] = {}
        for i, part in enumerate(batch.sequences):
            if not finite[i]:
                errors[part.sequence_id] = (
                    "the model's output is not finite here: try --dtype float32"
                )
                first = part.start // self.cache.layout.block_size
                with torch.inference_mode(), self._on_stream():
                    # only blocks from this step's first token on: those before may be shared
                    self.cache.clear_blocks(part.block_ids[first:])
            elif part.samples and (i in handle.failed or not usable[i]):
                errors[part.sequence_id] = handle.failed.get(i, NO_TOKEN)
            elif part.samples:
                logprobs = handle.logprobs.get(part.sequence_id)
                sampled[part.sequence_id] = SampledToken(
                    tokens[i], None if logprobs is None else _read(logprobs)
                )
        return StepResult(batch.step, sampled, errors, _read_prompts(handle))

    # Two forms of a step

    def _submit_decode(self, rows: list[int], how: _Sampling) -> torch.Tensor:
        """Every sequence brings one token, and the device knows it."""
        seqs = decode_bucket(len(rows))
        self.state.set_order(rows)
        self._send_changes()
        results = self._mailbox.open(seqs)
        self._run(("decode", seqs, how.mode, how.plain), partial(self._decode, seqs, how), how)
        return results

    def _decode(self, seqs: int, how: _Sampling) -> None:
        order, x = self.state.order[:seqs], self._x[:seqs]
        cos, sin, plan = self._cos[:seqs], self._sin[:seqs], self._plan
        spec, tables = self.decoder.spec, self.state.rows.block_tables
        apply_updates(self._upload, self.state.arena, self._launch, self._mailbox)
        begin_decode(
            order,
            self.state.rows,
            self.decoder.embeddings,
            x,
            cos,
            sin,
            plan,
            self._launch,
            stats=self.decoder.stats_of(seqs),
        )

        def attend(layer: int, qkv: torch.Tensor, p: Projections) -> torch.Tensor:
            out = empty_rows(qkv, seqs, spec.num_heads, spec.head_dim)
            decode_attention(
                qkv,
                out,
                self.cache.layers[layer],
                tables,
                plan,
                self._scale,
                self._launch,
                num_seqs=seqs,
                projections=p,
            )
            return out.flatten(1)

        pending = self.decoder.forward(x, cos, sin, attend)
        results = self._results_of(seqs)
        finite = results[2]
        if how.plain:
            blocks = self.decoder.peaks(x, pending, self._each[:seqs], finite, self._peaks)
            if blocks is not None:
                pick_and_advance(
                    self._peaks,
                    blocks,
                    order,
                    self.state.rows,
                    results,
                    self._upload,
                    self._mailbox,
                    self._launch,
                )
                return
        self.decoder.logits(x, pending, self._each[:seqs], finite, self._logits[:seqs])
        self._sample(order, how)
        advance(order, results, self.state.rows, self._upload, self._mailbox, self._launch)

    def _submit_ragged(
        self, rows: list[int], parts: tuple[ScheduledSequence, ...], how: _Sampling
    ) -> torch.Tensor:
        """Sequences bring any number of tokens."""
        tokens = sum(part.num_tokens for part in parts)
        large = tokens > MAX_GRAPH_TOKENS
        shape = RaggedShape(
            tokens if large else token_bucket(tokens),
            ragged_seqs(len(parts)),
            self._tile,
            self._target_items,
            tiles_only=self._invariant,
        )
        words = self._pinned(shape.num_words)
        fill(words.numpy(), shape, parts, rows, self.state.num_rows)
        self._ragged[: shape.num_words].copy_(words, non_blocking=True)
        self._send_changes()
        singles = not self._invariant and any(part.num_tokens == 1 for part in parts)
        work = partial(self._run_ragged, shape, singles, how)
        results = self._mailbox.open(shape.seqs)
        self._run(None if large else ("ragged", shape, singles, how.mode), work, how)
        return results

    def _run_ragged(self, shape: RaggedShape, singles: bool, how: _Sampling) -> None:
        tokens, seqs = shape.tokens, shape.seqs
        inputs = split(self._ragged, shape)
        x, cos, sin = self._x[:tokens], self._cos[:tokens], self._sin[:tokens]
        plan = self._plan.over(inputs["items"], inputs["num_items"])
        spec, tables = self.decoder.spec, self.state.rows.block_tables
        rows, positions = inputs["token_rows"], inputs["positions"]
        apply_updates(self._upload, self.state.arena, self._launch, self._mailbox)
        begin_ragged(
            inputs["token_ids"],
            rows,
            positions,
            self.state.rows,
            self.decoder.embeddings,
            x,
            cos,
            sin,
            self._launch,
            stats=self.decoder.stats_of(tokens),
        )

        def attend(layer: int, qkv: torch.Tensor, p: Projections) -> torch.Tensor:
            cache = self.cache.layers[layer]
            q = qkv.new_empty(tokens, spec.num_heads, spec.head_dim)
            out = empty_rows(qkv, tokens, spec.num_heads, spec.head_dim)
            project(qkv, q, cache, tables, rows, positions, p, self._launch)
            if singles:
                decode_attention(
                    q, out, cache, tables, plan, self._scale, self._launch, num_seqs=seqs
                )
            prefill_attention(
                q,
                out,
                cache,
                tables,
                inputs["tiles"],
                inputs["num_tiles"],
                self._scale,
                self._launch,
            )
            return out.flatten(1)

        pending = self.decoder.forward(x, cos, sin, attend)
        results = self._results_of(seqs)
        self.decoder.logits(x, pending, inputs["last"], results[2], self._logits[:seqs])
        self._sample(inputs["order"], how)
        if how.processed is not None:
            self._read_prompts(x, pending, how.processed, how.prompts)
        advance(
            inputs["order"],
            results,
            self.state.rows,
            self._upload,
            self._mailbox,
            self._launch,
            samples=inputs["samples"],
            counts=inputs["counts"],
        )

    def _sample(self, order: torch.Tensor, how: _Sampling) -> None:
        seqs = len(order)
        logits = self._logits[:seqs]
        if how.logprobs and (how.masked or how.processed is not None):
            logits = logits.clone()  # log probabilities are the model's own, of all tokens
        if how.processed is not None:
            how.failed.update(process(logits, how.processed))
        for row, ids in how.masked:
            logits[row, list(ids)] = float("-inf")
        tokens, usable, _ = self._results_of(seqs)
        state, workspace = self.state.sampling, self._sampling
        sample_tokens(logits, order, state, tokens, usable, workspace, how.mode, self._launch)

    def _run(
        self, key: tuple[object, ...] | None, work: Callable[[], None], how: _Sampling
    ) -> None:
        if key is None or how.masked or how.processed is not None:
            work()
        else:
            self.graphs.run(key, work)

    def _sampling_of(self, parts: tuple[ScheduledSequence, ...], rows: list[Row]) -> _Sampling:
        mode, logprobs, suppressed, processed = SamplingMode.GREEDY, False, False, False
        for part, row in zip(parts, rows, strict=True):  # once, since there may be hundreds
            if row.mode > mode:
                mode = row.mode
            if row.logprobs:
                logprobs = True
            if part.suppressed:
                suppressed = True
            if part.logits is not None:
                processed = True
        if not suppressed and not processed:
            return _Sampling(mode, logprobs, mode == SamplingMode.GREEDY and not logprobs)
        masked = tuple(
            (row, part.suppressed)
            for row, part in enumerate(parts)
            if len(part.suppressed) > MAX_SUPPRESSED
        )
        return _Sampling(mode, logprobs, False, masked, parts if processed else None)

    def _read_prompts(
        self,
        x: torch.Tensor,
        pending: Pending | None,
        parts: tuple[ScheduledSequence, ...],
        found: list[tuple[SequenceId, RowLogprobs]],
    ) -> None:
        """Log probabilities of prompt tokens, where they are asked for."""
        rows = prompt_rows(parts)
        if not rows:
            return
        shape = (ROWS_AT_ONCE, self._logits.shape[1])
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        finite = torch.empty(ROWS_AT_ONCE, dtype=torch.int32, device=self.device)

        def logits_of(at: torch.Tensor) -> torch.Tensor:
            out = logits[: len(at)]
            at = at.to(device=self.device, dtype=torch.int32)
            self.decoder.logits(x, pending, at, finite[: len(at)], out)
            return out

        for sequence_id, some in prompt_logprobs(rows, logits_of):
            found.append(
                (sequence_id, RowLogprobs(*(t.to("cpu", non_blocking=True) for t in some)))
            )

    def _compile_ahead(self) -> None:
        """Compile what the first prompt and the first greedy steps need, on all cores at once."""
        from triton import AsyncCompileMode

        kernels: list[Any] = []
        dry = copy(self)
        dry._launch = replace(self._launch, compiled=kernels)
        dry.decoder = copy(self.decoder)
        dry.decoder.device = dry._launch
        shape = RaggedShape(16, 16, self._tile, self._target_items, tiles_only=self._invariant)
        greedy = _Sampling(SamplingMode.GREEDY, logprobs=False, plain=True)
        with torch.inference_mode(), self._on_stream(), ThreadPoolExecutor() as pool:
            with AsyncCompileMode(pool):
                dry._run_ragged(shape, False, greedy)
                if not self._invariant:
                    dry._decode(1, greedy)
            # and load them, each with a launcher of its own that a C compiler builds
            for _ in pool.map(_load, kernels):
                pass

    # Transfers

    def _send_changes(self) -> None:
        changes = self.state.take_changes()
        if changes is None:
            return
        for start in range(0, len(changes), MAX_CHANGES):
            if start > 0:  # the step's own kernel applies the last ones
                apply_updates(self._upload, self.state.arena, self._launch)
            some = changes[start : start + MAX_CHANGES]
            words = self._pinned(2 + some.size)
            array = words.numpy()
            array[0], array[1] = len(some), 0
            array[2:] = some.reshape(-1)
            self._upload[: len(words)].copy_(words, non_blocking=True)

    def _pinned(self, num_words: int) -> torch.Tensor:
        """Host memory for one transfer; torch does not reuse it before the transfer is done."""
        if self._stream is None:
            return torch.empty(num_words, dtype=torch.int32)
        return torch.empty(num_words, dtype=torch.int32, pin_memory=True)

    def _results_of(self, num_seqs: int) -> torch.Tensor:
        """`[3, num_seqs]`: tokens, usable, finite."""
        return self._results[:, :num_seqs]

    def _add_logprobs(self, step: InFlight) -> None:
        for i, part in enumerate(step.batch.sequences):
            count = part.params.logprobs
            if count is None or not part.samples:
                continue
            logprobs = self._logits[i].log_softmax(dim=-1)
            top = logprobs.topk(min(count, len(logprobs)))
            chosen = logprobs[self._results[0, i].long()[None]]
            step.logprobs[part.sequence_id] = _Logprobs(
                count,
                chosen.to("cpu", non_blocking=True),
                top.values.to("cpu", non_blocking=True),
                top.indices.to("cpu", non_blocking=True),
            )

    def _record(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _load(kernel: Any) -> None:
    """Load a kernel that was compiled ahead, or by an engine before this one."""
    compiled = kernel.result() if hasattr(kernel, "result") else kernel
    compiled.run  # noqa: B018 (a property that loads it)


def _read_prompts(handle: InFlight) -> dict[SequenceId, tuple[TokenLogprobs, ...]]:
    prompts: dict[SequenceId, tuple[TokenLogprobs, ...]] = {}
    for sequence_id, some in handle.prompts:
        prompts[sequence_id] = (*prompts.get(sequence_id, ()), *some.read())
    return prompts


def _read(logprobs: _Logprobs) -> TokenLogprobs:
    pairs = zip(logprobs.ids.tolist(), logprobs.values.tolist(), strict=True)
    return TokenLogprobs(float(logprobs.chosen), tuple(pairs))
