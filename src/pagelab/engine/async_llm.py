"""`AsyncLLM`: an engine in a process of its own, for asynchronous programs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import Unpack

from pagelab import errors
from pagelab.engine.launch import EngineState, Launch, Observer, launch_of
from pagelab.engine.messages import (
    AddRequest,
    BlockFacts,
    BlockNews,
    CancelRequest,
    DescribeBlock,
    EngineInfo,
    News,
    StepStats,
    StopSequence,
    WatchBlocks,
)
from pagelab.engine.options import EngineOptions
from pagelab.engine.process import EngineProcess
from pagelab.engine.request_stream import CompletionDelta, RequestStream
from pagelab.engine.text import TextStream
from pagelab.errors import (
    ConfigError,
    EngineDeadError,
    EngineUnavailableError,
    OverloadedError,
    PageLabError,
    RequestError,
)
from pagelab.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from pagelab.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

Prompt = str | Sequence[int]
"""A text, or its token ids."""

LONG_TEXT = 20_000
"""Characters from which a text is tokenized in a thread: about 5 ms, which others need not wait."""

MANY_TOKENS = 5_000
"""Token ids from which their text is made in a thread."""

A_TURN = 32
"""Pieces of news handed out in one turn of the event loop: each wakes a task that works 0.1 to 0.2
ms. (500 requests that the engine took in one step stopped the loop for 0.15 s.)"""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0  # before an engine is started again


class AsyncLLM:
    """A model and an engine in a process of its own; this process does not import torch.

    >>> async with AsyncLLM() as llm:                       # doctest: +SKIP
    ...     async for delta in llm.stream("Hello!"):
    ...         print(delta.text, end="")

    One task reads what the engine says after each step and hands tokens out; the engine never waits
    for a reader. A process that dies takes its requests with it: they end with `EngineDeadError`,
    and a new process is started, again and again with growing pauses.

    Args:
        model: None for the default model; a folder, a `.gguf` file or a hub id.
        max_waiting: requests without a token at which new ones are refused.
        launch: makes the engine in another way than `LLM` does.
        options: of the engine: `LLM`'s keywords.

    Raises:
        ConfigError: an option that the engine does not have.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        max_waiting: int = 2048,
        launch: Launch | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        unknown = options.keys() - EngineOptions.__annotations__.keys()
        if unknown:
            raise ConfigError(f"the engine has no option {', '.join(sorted(unknown))}")
        if max_waiting < 1:
            raise ConfigError(f"max_waiting must be at least 1, not {max_waiting}")
        self.max_waiting = max_waiting
        self.state = EngineState.LOADING
        self.stats: StepStats | None = None
        self.num_restarts = 0
        self.observers: list[Observer] = []
        self._launch = launch or launch_of(model, options)
        self._info: EngineInfo | None = None
        self._process: EngineProcess | None = None
        self._tokenizer: Tokenizer | None = None
        self._streams: dict[str, RequestStream] = {}
        self._num_waiting = 0
        self._ids = itertools.count()
        self._serving: asyncio.Task[None] | None = None
        self._watch_every: float | None = None
        self._questions: dict[int, list[asyncio.Future[BlockFacts | None]]] = {}

    # Its life

    async def start(self) -> None:
        """Load the model. Waits until requests can be served.

        Raises:
            PageLabError: the engine could not be made; nothing is left running.
        """
        if self._serving is not None:
            raise EngineUnavailableError("this engine was started already")
        loading = asyncio.ensure_future(asyncio.to_thread(self._launch.load_tokenizer))
        try:
            process = await EngineProcess.start(self._launch.factory, self._launch.options)
            self._tokenizer = await loading
        except BaseException:
            loading.cancel()
            self.state = EngineState.CLOSED
            raise
        self._take_over(process)
        self._serving = asyncio.create_task(self._serve(process))

    async def close(self, drain_s: float = 0.0) -> bool:
        """End: take no new requests, let running ones finish for `drain_s` seconds, then stop.

        Returns whether every request had ended by itself.
        """
        if self.state is not EngineState.CLOSED:
            self.state = EngineState.DRAINING
        deadline = time.monotonic() + drain_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        drained = not self._streams
        self.state = EngineState.CLOSED
        await self._fail_all(EngineUnavailableError("the engine is closed"))
        if self._serving is not None:
            self._serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        if self._process is not None:
            await self._process.end()
            self._process = None
        return drained

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def info(self) -> EngineInfo:
        """What was loaded.

        Raises:
            EngineUnavailableError: nothing yet.
        """
        if self._info is None:
            raise EngineUnavailableError("the model is being loaded")
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: the model has none.
            EngineUnavailableError: it is not loaded yet.
        """
        if self._tokenizer is None:
            name = self.info.model
            raise RequestError(f"the model {name} has no tokenizer: give token ids, not texts")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be read and written."""
        return self._tokenizer is not None

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests that have no token yet."""
        return self._num_waiting

    # Requests

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Continue a prompt and give everything at its end; errors as `submit` and `stream`."""
        stream = await self.submit(prompt, params)
        try:
            return await stream.output()
        finally:
            stream.cancel()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[CompletionDelta]:
        """Continue a prompt, a piece at a time. Leaving the loop cancels the request.

        Raises:
            PageLabError: as `submit`.
            EngineDeadError: the engine's process ended meanwhile.
        """
        stream = await self.submit(prompt, params)
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.cancel()

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Queue a request; returns once the engine has taken it.

        Whoever reads the stream must `cancel` it if it is left before its end.

        Raises:
            RequestError: the prompt or its parameters cannot be served.
            RequestTooLongError: it could never fit.
            OverloadedError: `max_waiting` requests wait.
            EngineUnavailableError: the model is loading, or the engine is draining.
            EngineDeadError: the engine's process ended meanwhile.
        """
        arrival = time.perf_counter()
        params = params or SamplingParams()
        self.check_open()
        text = prompt if isinstance(prompt, str) else None
        ids = tuple(await self.encode(prompt) if isinstance(prompt, str) else prompt)
        self.check_open()  # somebody else may have come first, or the engine gone
        identity = request_id or f"request-{next(self._ids)}"
        if identity in self._streams:
            raise RequestError(f"request id {identity!r} is in use")
        stream = RequestStream(
            identity,
            text,
            ids,
            params,
            self._texts(params, needs_text=text is not None),
            stop_sequence=self._stop_sequence,
            cancel=self._cancel,
        )
        self._streams[identity] = stream
        self._num_waiting += 1
        self._send(AddRequest(identity, ids, params, priority, arrival))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    def check_open(self) -> None:
        """Whether a request would be taken now.

        Raises:
            EngineUnavailableError: the model is loading, or the engine is draining.
            OverloadedError: `max_waiting` requests wait.
        """
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(f"the engine is {self.state}")
        if self._num_waiting >= self.max_waiting:
            raise OverloadedError(f"the queue is full: {self._num_waiting} requests wait")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; a long one in a thread.

        Raises:
            RequestError: the model has no tokenizer, or the text is not valid Unicode.
        """
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; of many in a thread.

        Raises:
            RequestError: the model has no tokenizer.
        """
        if len(token_ids) < MANY_TOKENS:
            return self.tokenizer.decode(token_ids, skip_special_tokens)
        return await asyncio.to_thread(self.tokenizer.decode, token_ids, skip_special_tokens)

    # Looking

    def watch_blocks(self, every_s: float | None) -> None:
        """Have observers told of blocks this often (`Observer.blocks_changed`); None: no more."""
        self._watch_every = every_s
        self._send(WatchBlocks(every_s))

    async def describe_block(self, block_id: int) -> BlockFacts | None:
        """Everything about one block; None where there is no such block.

        Raises:
            EngineUnavailableError: nobody is there to say.
        """
        if self._process is None:
            raise EngineUnavailableError(f"the engine is {self.state}")
        answer: asyncio.Future[BlockFacts | None] = asyncio.get_running_loop().create_future()
        self._questions.setdefault(block_id, []).append(answer)
        self._send(DescribeBlock(block_id))
        return await answer

    # Its parts

    def _texts(self, params: SamplingParams, *, needs_text: bool) -> list[TextStream | None]:
        if self._tokenizer is None:
            if needs_text or params.stop:
                raise RequestError("this model has no tokenizer: give token ids, no stop strings")
            return [None] * params.n
        return [
            TextStream(self._tokenizer.decode_stream(), params.stop, params.min_tokens)
            for _ in range(params.n)
        ]

    def _send(self, message: object) -> None:
        if self._process is not None:
            self._process.send(message)

    def _stop_sequence(self, request_id: str, sample: int) -> None:
        self._send(StopSequence(request_id, sample))

    def _cancel(self, request_id: str) -> None:
        self._send(CancelRequest(request_id))
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.end("cancelled")
            self._forget(stream)

    def _take_over(self, process: EngineProcess) -> None:
        self._process, self._info = process, process.info
        if self.state is EngineState.LOADING:
            self.state = EngineState.READY
        for observer in self.observers:
            observer.started(process.info)
        if self._watch_every is not None:
            self._send(WatchBlocks(self._watch_every))

    async def _serve(self, process: EngineProcess) -> None:
        """Hand out what the engine says; when it dies, start another."""
        while True:
            while (message := await process.receive()) is not None:
                try:
                    await self._handle(message)
                except Exception:
                    logger.exception("a message of the engine could not be handled")
            how = await process.end(grace_s=0.5)
            self._process = None
            if self.state is EngineState.READY:
                self.state = EngineState.LOADING
            logger.error("the engine's process ended (%s); it is started again", how)
            await self._fail_all(EngineDeadError(f"the engine's process ended ({how})"))
            process = await self._start_again()
            self.num_restarts += 1
            self._take_over(process)

    async def _start_again(self) -> EngineProcess:
        pause = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause)
            try:
                return await EngineProcess.start(self._launch.factory, self._launch.options)
            except PageLabError as error:
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                logger.error("the engine did not start (%s); again in %.1f s", error, pause)

    async def _handle(self, message: Any) -> None:
        if isinstance(message, News):
            await self._take_news(message)
        elif isinstance(message, BlockNews):
            for observer in self.observers:
                observer.blocks_changed(message)
        else:
            question, facts = message
            assert isinstance(question, DescribeBlock), message
            for answer in self._questions.pop(question.block_id, []):
                if not answer.done():
                    answer.set_result(facts)

    async def _take_news(self, news: News) -> None:
        """Hand a step out, a little in each turn of the event loop: others get theirs, too."""
        async for request_id in _in_turns(news.accepted):
            stream = self._streams.get(request_id)
            if stream is not None and not stream.accepted.done():
                stream.accepted.set_result(None)
        for request_id, kind, text in news.refused:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.end("refused")
                self._forget(stream)
                if not stream.accepted.done():
                    stream.accepted.set_exception(getattr(errors, kind, RequestError)(text))
        for request_id, logprobs in news.prompts:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.prompt_logprobs = logprobs
        async for token in _in_turns(news.tokens):
            stream = self._streams.get(token[0])
            if stream is not None:
                if not stream.has_tokens and token[2] is not None:
                    self._num_waiting -= 1
                stream.feed(token)
        async for request_id, metrics in _in_turns(news.ended):
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.finish(metrics)
                self._forget(stream)
        self.stats = news.stats
        for observer in self.observers:
            observer.stepped(news.stats)

    def _forget(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.id, None) is None:
            return
        if not stream.has_tokens:
            self._num_waiting -= 1
        for observer in self.observers:
            observer.ended(stream)

    async def _fail_all(self, error: PageLabError) -> None:
        async for stream in _in_turns(list(self._streams.values())):
            if stream.id in self._streams:  # else its reader left meanwhile
                stream.fail(error)
                self._forget(stream)
        for answers in self._questions.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(EngineUnavailableError(str(error)))
        self._questions.clear()


async def _in_turns(news: Sequence[T]) -> AsyncIterator[T]:
    """Pieces of news, `A_TURN` in each turn of the event loop."""
    for i, piece in enumerate(news):
        if i % A_TURN == A_TURN - 1:
            await asyncio.sleep(0)
        yield piece
