"""`LLM`: prompts in, texts out, on top of the step loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pagelab.config import MemoryConfig, SchedulerConfig, parse_bytes
from pagelab.engine.core import EngineCore
from pagelab.engine.garbage import no_full_collections
from pagelab.engine.guided import GrammarCompiler
from pagelab.engine.text import TextStream
from pagelab.errors import ConfigError, ModelError, RequestError
from pagelab.execution.loading import (
    DeviceConfig,
    load_runner,
    resolve_backend,
    resolve_device,
    resolve_kv_dtype,
)
from pagelab.execution.memory_plan import measure_device, plan_memory
from pagelab.memory.budget import MemoryBudget
from pagelab.models.fetch import resolve
from pagelab.models.registry import load_spec, load_tokenizer
from pagelab.models.shape_source import resolve_shape
from pagelab.models.tokenizer import Tokenizer
from pagelab.scheduling.constraint import Constraint
from pagelab.scheduling.sequence import Request, TokenEvent
from pagelab.types import (
    CompletionOutput,
    RequestId,
    RequestOutput,
    SamplingParams,
    SequenceId,
    TokenLogprobs,
)

Prompt = str | Sequence[int]
"""A text, or its token ids."""

Message = Mapping[str, str]
"""`{"role": "user", "content": "…"}`."""


class LLM:
    """A model and an engine around it.

    >>> llm = LLM()                                      # doctest: +SKIP
    >>> llm.generate("Hello!", SamplingParams(temperature=0))[0].text  # doctest: +SKIP

    Args:
        model: None for the default model; a folder, a `.gguf` file or a hub id.
        device: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one.
        dtype: `float32`, `bfloat16`, `float16`; `auto`: float32 on a CPU, bfloat16 on a GPU.
        kv_memory: bytes for K/V, as a number or `"256MiB"`; None: 1 GiB on a CPU, on a GPU what
            `gpu_memory_utilization` leaves.
        gpu_memory_utilization: share of the GPU memory that is free at start which weights,
            activations, graphs and K/V may take together; None: 0.9. Not beside `kv_memory`.
        block_size: slots a block.
        max_model_len: tokens a request may reach; None: the model's own maximum.
        allocator: who gets what of the KV pool: `paged`, `contiguous-max`, … (one of
            `pagelab.memory.allocators.ALLOCATORS`), or one's own, as `module:Class` or
            `file.py:Class`.
        placement: where contiguous ranges go, `buddy` or `first-fit`.
        prefix_caching: reuse the K/V of prefixes that were seen before.
        watermark: share of the blocks that an admission must leave free.
        max_num_batched_tokens: the token budget of a step; None: 512 on a CPU, 8192 on a GPU.
        max_num_seqs: sequences that run at the same time.
        attention: `auto`, `triton`, `native` (the whole step in the compiled extension, on a
            CPU), `cpu` or `reference`.
        quantization: `int8` or `q4`: weights in fewer bits, inputs in 8 by token and group of 32
            (on a CPU, by the extension); None: neither.
        kv_cache_dtype: `int8`: K/V in 8 bits with a scale a token and head, half of bfloat16's room
            (on a CPU, by the extension); `auto`: in the model's dtype.
        threads: CPU threads; None: one for each physical core that this process may use.
        max_steps_in_flight: steps submitted before the oldest is collected; None: 1 on a CPU, 2
            on a GPU, which then works while the host schedules.
        random_weights: draw the weights instead of reading them (for timing): the model may then
            be a name of `pagelab.models.shapes.BUILT_IN`, or a folder with only a config.json.
        batch_invariant: a request's tokens do not depend on what shares its steps, to the bit, in
            any dtype (`native`, which always is so; `triton`, which is slower then).
        cuda_graphs: on a GPU, run steps as CUDA graphs (off: kernel by kernel, for finding faults).
        progress: show a bar on a terminal while weights are loaded.
        check_invariants: check the memory core after every step (slow).

    Raises:
        ModelError: the model cannot be found, read or run.
        ConfigError: a setting that cannot work, with the option to change.
        InsufficientMemoryError: the memory does not suffice, with what is needed and what is there.

    Attributes:
        memory_budget: who gets what of the device's memory, in bytes.
        attention: the backend, `auto` resolved.
        kv_dtype: what K/V is kept in, `auto` resolved.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_memory: int | str | None = None,
        gpu_memory_utilization: float | None = None,
        block_size: int = 16,
        max_model_len: int | None = None,
        allocator: str = "paged",
        placement: str = "buddy",
        prefix_caching: bool = True,
        watermark: float = 0.05,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int = 256,
        attention: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        threads: int | None = None,
        max_steps_in_flight: int | None = None,
        random_weights: bool = False,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
        progress: bool = True,
        check_invariants: bool = False,
    ) -> None:
        self.source = resolve_shape(model) if random_weights else resolve(model)
        self.spec = load_spec(self.source)
        devices = DeviceConfig(
            device=device,
            dtype=dtype,
            attention=attention,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            random_weights=random_weights,
            cuda_graphs=cuda_graphs,
            batch_invariant=batch_invariant,
            progress=progress,
        )
        self.device, self.dtype = resolve_device(devices)
        if max_model_len is not None and max_model_len > self.spec.max_position:
            raise ConfigError(
                f"max_model_len {max_model_len} is more than the model's own "
                f"{self.spec.max_position}: lower --max-model-len"
            )
        self.attention = resolve_backend(devices, self.device, self.dtype, self.spec)
        self.kv_dtype = resolve_kv_dtype(devices, self.attention, self.dtype, self.spec)
        runs_ahead = self.attention == "triton"
        if max_steps_in_flight is None:
            max_steps_in_flight = 2 if runs_ahead else 1
        elif max_steps_in_flight > 1 and not runs_ahead:
            raise ConfigError(
                "only --attention triton, on a GPU, runs ahead: leave --max-steps-in-flight out"
            )
        scheduling = SchedulerConfig(
            max_num_batched_tokens=_default_tokens(self.device)
            if max_num_batched_tokens is None
            else max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_steps_in_flight=max_steps_in_flight,
        )
        self.memory_budget: MemoryBudget = plan_memory(
            self.spec,
            self.dtype,
            measure_device(self.device),
            scheduling,
            max_model_len=self.spec.max_position if max_model_len is None else max_model_len,
            block_size=block_size,
            kv_memory=None if kv_memory is None else parse_bytes(kv_memory),
            utilization=gpu_memory_utilization,
            fused=runs_ahead,
            quantization=quantization,
            kv_dtype=self.kv_dtype,
            graphs=cuda_graphs,
        )
        memory = MemoryConfig(
            num_blocks=self.memory_budget.num_blocks,
            block_size=block_size,
            max_model_len=self.memory_budget.max_model_len,
            allocator=allocator,
            placement=placement,
            prefix_caching=prefix_caching,
            watermark=watermark,
            check_invariants=check_invariants,
        )
        runner = load_runner(self.source, self.spec, devices, memory=memory, scheduling=scheduling)
        self.core = EngineCore(
            runner,
            memory,
            scheduling,
            vocab_size=self.spec.vocab_size,
            eos_token_ids=self.spec.eos_token_ids,
        )
        self.last_output: RequestOutput | None = None  # of the stream that ended last
        self._tokenizer: Tokenizer | None = None
        self._texts: dict[SequenceId, TextStream] = {}
        self._grammars: GrammarCompiler | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read when it is first used.

        Raises:
            ModelError: the model has none that can be read.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source)
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts; results come in their order.

        Args:
            prompts: one prompt or several, each a text or a list of token ids.
            params: the same for all, or one for each; None: `SamplingParams()`.
            priority: lower ones run first and are preempted last, each in the order of arrival;
                the same for all, or one for each.
            progress: show a bar with rates while it runs (only on a terminal).

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing was started.
        """
        several = _as_prompts(prompts)
        requests = self._add_all(
            several, _as_params(params, len(several)), _as_priorities(priority, len(several))
        )
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        try:
            with no_full_collections(), _Bar(len(requests), progress) as bar:
                while not all(request.finished for request in requests):
                    bar.update(self._step())
        except BaseException:
            self._forget(requests)
            raise
        return [self._output(r, text) for r, text in zip(requests, texts, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        Raises:
            RequestError: as `generate`, or the model has no chat template.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise RequestError("messages are a list of at least one {'role': …, 'content': …}")
        one = isinstance(messages[0], Mapping)
        conversations = [messages] if one else messages
        prompts = [self.tokenizer.apply_chat_template(c) for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, params, priority=priority, progress=progress)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[str]:
        """Continue one prompt (its first sequence), yielding text as it comes.

        What a stop string might still take back is held until that is decided.
        """
        (request,) = self._add_all([prompt], [params or SamplingParams()], [priority])
        text = self._texts.get(request.sequences[0].id)
        if text is None:
            self._forget([request])
            raise RequestError("this model has no tokenizer: use generate() with token ids")
        try:
            while not request.finished:
                self._step()
                first = request.sequences[0]
                if delta := text.delta(finished=first.finish_reason is not None):
                    yield delta
            if delta := text.delta(finished=True):  # somebody else's call made the last steps
                yield delta
        finally:
            self.core.cancel(request.id)
            self.last_output = self._output(request, prompt if isinstance(prompt, str) else None)

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """What `params.guided` becomes, for `EngineCore.add_request`; None where it is not set.

        May be called in another thread than the engine's: a large schema takes a while.

        Raises:
            RequestError: a schema, expression or grammar that is wrong; a model without an
                end-of-sequence token.
            ConfigError: the grammar library is not installed.
            ModelError: the model has no tokenizer.
        """
        if params.guided is None:
            return None
        if self._grammars is None:
            self._grammars = GrammarCompiler(
                self.tokenizer, self.core.vocab_size, self.core.eos_token_ids
            )
        return self._grammars.compile(params.guided)

    def _add_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
    ) -> list[Request]:
        requests: list[Request] = []
        try:
            for prompt, param, priority in zip(prompts, params, priorities, strict=True):
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                needs_text = isinstance(prompt, str) or bool(param.stop)
                constraint = self.constraint(param)
                requests.append(
                    self.core.add_request(ids, param, priority=priority, constraint=constraint)
                )
                self._open_texts(requests[-1], needs_text)
        except BaseException:
            self._forget(requests)
            raise
        return requests

    def _open_texts(self, request: Request, needs_text: bool) -> None:
        """A text for each sequence; none where token ids came in and the model has no tokenizer."""
        try:
            tokenizer = self.tokenizer
        except ModelError:
            if needs_text:
                raise
            return
        for sequence in request.sequences:
            self._texts[sequence.id] = TextStream(
                tokenizer.decode_stream(), request.params.stop, request.params.min_tokens
            )

    def _step(self) -> list[TokenEvent]:
        events = self.core.step()
        for event in events:
            text = self._texts.get(event.sequence.id)
            if text is None or event.token is None:
                continue
            # the end-of-sequence token that ended it is no part of the text
            if event.finish_reason is None or event.sequence.stop_token_id is None:
                text.feed(event.token.token_id)
            if text.stopped:
                self.core.stop(event)
            elif event.finish_reason is not None:
                text.finish()
        return events

    def _forget(self, requests: Sequence[Request]) -> None:
        """Cancel what still runs (after an error or Ctrl-C), and its texts."""
        for request in requests:
            self.core.cancel(request.id)
            for sequence in request.sequences:
                self._texts.pop(sequence.id, None)

    def _output(self, request: Request, prompt: str | None) -> RequestOutput:
        outputs = []
        for sequence in request.sequences:
            text = self._texts.pop(sequence.id, None)
            wants_logprobs = request.params.logprobs is not None
            outputs.append(
                CompletionOutput(
                    index=sequence.id.sample,
                    text=text.text if text is not None else "",
                    token_ids=sequence.output_token_ids,
                    finish_reason=sequence.finish_reason,
                    logprobs=tuple(sequence.logprobs) if wants_logprobs else None,
                    error=sequence.error,
                )
            )
        return RequestOutput(
            request_id=RequestId(request.id),
            prompt=prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=tuple(outputs),
            metrics=request.metrics,
            finished=True,
            prompt_logprobs=_prompt_logprobs(request),
        )


class _Bar:
    """Progress of `generate`: requests done, tokens a second, time left."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            transient=True,
        )
        self._progress.disable = not enabled or not self._progress.console.is_terminal
        self._task = self._progress.add_task("generate", total=total, rate="")
        self._tokens = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, events: Sequence[TokenEvent]) -> None:
        """Count a step's tokens and the requests that it ended."""
        self._tokens += sum(event.token is not None for event in events)
        done = {e.sequence.request.id for e in events if e.sequence.request.finished}
        elapsed = self._progress.tasks[self._task].elapsed or 0.0
        rate = f"{self._tokens / elapsed:,.0f} tok/s" if elapsed > 0 else ""
        self._progress.update(self._task, advance=len(done), rate=rate)


def _default_tokens(device: torch.device) -> int:
    """Tokens of a step where nobody says: more than fill a GPU, and what a CPU does in a second."""
    return 8192 if device.type == "cuda" else 512


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes):
        raise RequestError("a prompt is a text or token ids, not bytes: decode it first")
    try:
        several = list(prompts)
    except TypeError as error:
        raise RequestError(f"prompts are texts or lists of token ids, not {prompts!r}") from error
    if several and all(hasattr(item, "__index__") for item in several):
        return [several]  # type: ignore[list-item]
    return several  # type: ignore[return-value]


def _as_priorities(priority: int | Sequence[int], count: int) -> list[int]:
    several = [priority] * count if isinstance(priority, int) else priority
    if not isinstance(several, Sequence) or any(type(each) is not int for each in several):
        raise RequestError("priority must be a whole number, or one for each prompt")
    if len(several) != count:
        raise RequestError(f"{len(several)} priorities for {count} prompts")
    return list(several)


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...] | None:
    """None too where the request ended before all were there."""
    if request.params.prompt_logprobs is None or request.lacks_prompt_logprobs:
        return None
    return (None, *request.prompt_logprobs)


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError("params must be SamplingParams, or one SamplingParams for each prompt")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts")
    return list(params)
