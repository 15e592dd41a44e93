"""What every endpoint works with: the engine, the settings, and generations in progress."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from pagelab.engine.async_llm import AsyncLLM, Prompt
from pagelab.engine.launch import EngineState
from pagelab.engine.request_stream import CompletionDelta, RequestStream
from pagelab.errors import EngineError, EngineUnavailableError, RequestTooLongError
from pagelab.server.errors import ApiError
from pagelab.server.metrics import ServerMetrics
from pagelab.server.page_map import PageMap
from pagelab.server.settings import ServerSettings
from pagelab.server.tracing import RequestTrace
from pagelab.types import FinishReason, SamplingParams


class Generation:
    """The streams of one request: one for each of its prompts, each with `n` sequences.

    Results are numbered through: prompt 0's sequences first, then prompt 1's, … Close it in any
    case; what still runs is then cancelled.
    """

    def __init__(self, streams: Sequence[RequestStream], n: int) -> None:
        self.streams = streams
        self._n = n

    async def deltas(self) -> AsyncIterator[tuple[int, CompletionDelta]]:
        """(number, delta) as they come, of all streams.

        Raises:
            EngineError: a sequence failed, or the engine's process ended.
        """
        if len(self.streams) == 1:
            async for delta in self.streams[0]:
                yield delta.index, _checked(delta)
            return
        news: asyncio.Queue[tuple[int, CompletionDelta] | BaseException | None] = asyncio.Queue()

        async def read(place: int, stream: RequestStream) -> None:
            try:
                async for delta in stream:
                    news.put_nowait((place * self._n + delta.index, delta))
                news.put_nowait(None)
            except Exception as error:
                news.put_nowait(error)

        readers = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(self.streams)]
        try:
            left = len(readers)
            while left:
                item = await news.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item[0], _checked(item[1])
        finally:
            for reader in readers:
                reader.cancel()

    def close(self) -> None:
        """Cancel what still runs."""
        for stream in self.streams:
            stream.cancel()

    def usage(self, *, with_output: bool = True) -> dict[str, object]:
        """OpenAI's counts of tokens; without those of the answer where nobody was given them."""
        prompt = sum(len(stream.prompt_token_ids) for stream in self.streams)
        output = sum(stream.num_output_tokens for stream in self.streams) if with_output else 0
        cached = sum(s.metrics.num_cached_tokens for s in self.streams if s.metrics is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


@dataclass(slots=True)
class Service:
    """One server's parts."""

    llm: AsyncLLM
    settings: ServerSettings
    metrics: ServerMetrics
    page_map: PageMap
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.settings.served_name or self.llm.info.model

    def check_ready(self) -> None:
        """Refuse what needs the model while it is not there.

        Raises:
            EngineUnavailableError: it is loading, draining or closed.
        """
        if self.llm.state is not EngineState.READY:
            raise EngineUnavailableError(f"the engine is {self.llm.state}")

    def check_model(self, name: str | None) -> None:
        """Refuse requests for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in (self.model_name, self.llm.info.model):
            raise ApiError(
                404,
                f"the model {name!r} does not exist: this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def begin(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        add_special_tokens: bool = True,
        trace: RequestTrace | None = None,
    ) -> Generation:
        """Queue all prompts of a request; returns once the engine has taken them.

        `trace` is told what is asked, and of the streams.

        Raises:
            ApiError: more than the limits allow.
            PageLabError: as `AsyncLLM.submit`; then none of them is left running.
        """
        limits, llm = self.settings.limits, self.llm
        if trace is not None:
            trace.asked(self.model_name, params)
        if len(prompts) * params.n > limits.max_sequences:
            raise ApiError(
                400,
                f"{len(prompts)} prompts times n = {params.n} are more than "
                f"{limits.max_sequences} sequences (--max-sequences)",
                param="n",
            )
        llm.check_open()
        name = secrets.token_hex(8)
        ids: list[Sequence[int]] = []
        for prompt in prompts:
            if ids:
                await asyncio.sleep(0)  # a hundred texts of 5 ms each would stop everybody else
            if isinstance(prompt, str):
                prompt = await llm.encode(prompt, add_special_tokens)
            ids.append(prompt)
            self._check_length(len(ids[-1]))
        tasks = [
            asyncio.create_task(
                llm.submit(
                    tokens,
                    self._bounded(params, len(tokens)),
                    request_id=f"{name}-{i}",
                    priority=priority,
                )
            )
            for i, tokens in enumerate(ids)
        ]
        try:
            streams = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is None:
                    task.result().cancel()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        if trace is not None:
            trace.began(streams)
        return Generation(streams, params.n)

    def _check_length(self, tokens: int) -> None:
        most = self.settings.limits.max_prompt_tokens
        if most is not None and tokens > most:
            raise RequestTooLongError(
                f"the prompt has {tokens} tokens, and this server takes {most} "
                "(--max-prompt-tokens)"
            )

    def _bounded(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """With no `max_tokens`: as many as model and pool have room for."""
        if params.max_tokens is not None:
            return params
        info = self.llm.info
        room = min(info.max_model_len, info.num_blocks * info.block_size) - prompt_tokens
        return replace(params, max_tokens=max(1, params.min_tokens, room))


def _checked(delta: CompletionDelta) -> CompletionDelta:
    if delta.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise EngineError(delta.error or "the request was cancelled")
    return delta
