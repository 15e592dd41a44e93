"""One request in front of an engine process: its tokens and texts as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pagelab.engine.messages import TokenNews
from pagelab.engine.text import TextStream
from pagelab.errors import PageLabError
from pagelab.types import (
    CompletionOutput,
    FinishReason,
    RequestId,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What one of the `n` sequences of a request yielded since its last delta.

    `logprobs` has an entry for each token where they were asked for, else none.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    error: str | None


@dataclass(slots=True)
class _Sample:
    text: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    taken: int = 0  # tokens that deltas have given
    end_taken: bool = False


class RequestStream:
    """The deltas of a request, for one reader: `async for delta in stream`.

    Tokens gather here while the reader is slow, and come as one delta a sequence when it is back.
    Iteration ends when the engine has ended the request; then `metrics` is there.

    Attributes:
        id: the request's.
        prompt: its text, where it was one.
        prompt_token_ids: what the engine was given.
        prompt_logprobs: where they were asked for, from the first delta on.
        metrics: the engine's times (of `time.perf_counter`) and counts; None before the end.
        outcome: how it ended: `stop`, `length`, `cancelled`, `error` (of its first sequence) or
            `lost`; None before.

    Raises (while iterated):
        EngineDeadError: the engine's process ended, and the request with it.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        texts: list[TextStream | None],
        *,
        stop_sequence: Callable[[str, int], None],
        cancel: Callable[[str], None],
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.metrics: RequestMetrics | None = None
        self.outcome: str | None = None
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_tokens = False
        self._samples = [_Sample(text) for text in texts]
        self._stop_sequence = stop_sequence
        self._cancel = cancel
        self._fresh: dict[int, None] = {}  # samples with something to give
        self._news = asyncio.Event()
        self._ended = False
        self._failure: PageLabError | None = None

    # The engine's side

    def feed(self, news: TokenNews) -> None:
        """Take one sequence's news of a step."""
        _, index, token_id, logprobs, reason, error, is_text = news
        sample = self._samples[index]
        if sample.finish_reason is not None:
            return  # tokens after a stop string: nobody asked for them
        if token_id is not None:
            self.has_tokens = True
            sample.token_ids.append(token_id)
            if logprobs is not None:
                sample.logprobs.append(logprobs)
            if sample.text is not None and is_text:
                sample.text.feed(token_id)
        if sample.text is not None and sample.text.stopped:
            sample.finish_reason = FinishReason.STOP
            self._stop_sequence(self.id, index)
        elif reason is not None:
            sample.finish_reason, sample.error = reason, error
            if sample.text is not None:
                sample.text.finish()
        self._fresh[index] = None
        self._news.set()

    def finish(self, metrics: RequestMetrics) -> None:
        """The engine has ended it."""
        self.metrics = metrics
        self.end(str(self._samples[0].finish_reason or FinishReason.CANCELLED))

    def fail(self, error: PageLabError) -> None:
        """The engine is gone."""
        self._failure = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self.end("lost")

    def end(self, outcome: str) -> None:
        """Nothing comes any more."""
        self.outcome = self.outcome or outcome
        self._ended = True
        self._news.set()

    # The reader's side

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> CompletionDelta:
        while True:
            while self._fresh:
                index = next(iter(self._fresh))
                del self._fresh[index]
                delta = self._take(index)
                if delta.token_ids or delta.text or delta.finish_reason is not None:
                    return delta
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    def cancel(self) -> None:
        """The reader wants no more; the engine frees its blocks within two steps."""
        if not self._ended:
            self._cancel(self.id)
            self.end("cancelled")

    async def output(self) -> RequestOutput:
        """Wait for the end, and give everything at once."""
        async for _ in self:
            pass
        return self.output_so_far()

    def output_so_far(self) -> RequestOutput:
        """Everything that has come."""
        wants_logprobs = self.params.logprobs is not None
        return RequestOutput(
            request_id=RequestId(self.id),
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(
                CompletionOutput(
                    index=index,
                    text=sample.text.text if sample.text is not None else "",
                    token_ids=tuple(sample.token_ids),
                    finish_reason=sample.finish_reason,
                    logprobs=tuple(sample.logprobs) if wants_logprobs else None,
                    error=sample.error,
                )
                for index, sample in enumerate(self._samples)
            ),
            metrics=self.metrics or RequestMetrics(0.0),
            finished=self._ended,
            prompt_logprobs=self.prompt_logprobs,
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all sequences so far."""
        return sum(len(sample.token_ids) for sample in self._samples)

    @property
    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Of each sequence, in order; one that was left before its end counts as cancelled."""
        return tuple(s.finish_reason or FinishReason.CANCELLED for s in self._samples)

    def _take(self, index: int) -> CompletionDelta:
        sample = self._samples[index]
        finished = sample.finish_reason is not None and not sample.end_taken
        text = "" if sample.text is None else sample.text.delta(finished=finished)
        since, sample.taken = sample.taken, len(sample.token_ids)
        sample.end_taken = sample.end_taken or finished
        return CompletionDelta(
            index,
            text,
            tuple(sample.token_ids[since:]),
            tuple(sample.logprobs[since:]),
            sample.finish_reason if finished else None,
            sample.error if finished else None,
        )
