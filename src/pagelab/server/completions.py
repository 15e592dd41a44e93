"""`POST /v1/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from pagelab.engine.async_llm import Prompt
from pagelab.engine.request_stream import CompletionDelta
from pagelab.server.documents import COMPLETION_RESPONSES
from pagelab.server.errors import of_exception
from pagelab.server.logprobs import CompletionLogprobs
from pagelab.server.parameters import to_sampling_params
from pagelab.server.schemas import CompletionRequest
from pagelab.server.service import Generation, Service
from pagelab.server.sse import DONE, EventStream, answer, event
from pagelab.server.tracing import trace_of
from pagelab.types import FinishReason

router = APIRouter()


@router.post("/v1/completions", responses=COMPLETION_RESPONSES)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue prompts."""
    service: Service = request.app.state.service
    limit = service.settings.limits.timeout_s
    deadline = time.monotonic() + limit
    service.check_ready()
    service.check_model(body.model)
    params = to_sampling_params(body)
    work = service.begin(
        _prompts(body),
        params,
        priority=body.priority or 0,
        add_special_tokens=body.add_special_tokens,
        trace=trace_of(request),
    )
    generation = await answer(request, work, limit)
    reply = _Reply(service, generation, body)
    if body.stream:
        return EventStream(reply.events(), deadline - time.monotonic(), generation.close)
    try:
        return await answer(request, reply.whole(), deadline - time.monotonic())
    finally:
        generation.close()


def _prompts(body: CompletionRequest) -> list[Prompt]:
    """A text, a list of texts, one list of token ids, or a list of such."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


class _Reply:
    """One completion, whole or as events."""

    def __init__(self, service: Service, generation: Generation, body: CompletionRequest) -> None:
        self._generation = generation
        self._body = body
        self._prompt_only = body.max_tokens == 0
        n = body.n or 1
        tokenizer = service.llm.tokenizer if service.llm.has_tokenizer else None
        self._echoes = [""] * (n * len(generation.streams))
        if body.echo and tokenizer is not None:
            for i, stream in enumerate(generation.streams):
                given = _prompts(body)[i]
                text = (
                    given if isinstance(given, str) else tokenizer.decode(stream.prompt_token_ids)
                )
                self._echoes[i * n : (i + 1) * n] = [text] * n
        self._logprobs: list[CompletionLogprobs] | None = None
        if body.logprobs is not None:
            self._logprobs = [
                CompletionLogprobs(service.llm.tokenizer, echo, body.logprobs)
                for echo in self._echoes
            ]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def _deltas(self) -> AsyncIterator[tuple[int, CompletionDelta]]:
        """The generation's; with `max_tokens` 0 without the one token that nobody asked for."""
        async for number, delta in self._generation.deltas():
            if self._prompt_only:
                reason = None if delta.finish_reason is None else FinishReason.LENGTH
                delta = replace(delta, text="", token_ids=(), logprobs=(), finish_reason=reason)
            yield number, delta

    def _usage(self) -> dict[str, object]:
        return self._generation.usage(with_output=not self._prompt_only)

    async def whole(self) -> JSONResponse:
        """Everything at once."""
        deltas: list[list[CompletionDelta]] = [[] for _ in self._echoes]
        async for number, delta in self._deltas():
            deltas[number].append(delta)
        choices = [
            {
                "index": number,
                "text": echo + "".join(delta.text for delta in deltas[number]),
                "logprobs": self._all_logprobs(number, deltas[number]),
                "finish_reason": deltas[number][-1].finish_reason,
            }
            for number, echo in enumerate(self._echoes)
        ]
        return JSONResponse({**self._head, "choices": choices, "usage": self._usage()})

    def _prompt_logprobs(self, number: int) -> dict[str, list[Any]] | None:
        stream = self._generation.streams[number // (self._body.n or 1)]
        if self._logprobs is None or not self._body.echo or stream.prompt_logprobs is None:
            return None
        return self._logprobs[number].prompt(stream.prompt_token_ids, stream.prompt_logprobs)

    def _all_logprobs(
        self, number: int, deltas: list[CompletionDelta]
    ) -> dict[str, list[Any]] | None:
        if self._logprobs is None:
            return None
        prompt = self._prompt_logprobs(number)
        output = self._logprobs[number].take(
            [token for delta in deltas for token in delta.token_ids],
            [entry for delta in deltas for entry in delta.logprobs],
        )
        return output if prompt is None else {key: prompt[key] + output[key] for key in output}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A chunk a delta, then `[DONE]`."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        usage = {"usage": None} if with_usage else {}
        try:
            echoed: set[int] = set()
            async for number, delta in self._deltas():
                if self._body.echo and number not in echoed:
                    echoed.add(number)  # not before: its log probabilities come with the first
                    choice = _choice(number, self._echoes[number])
                    choice["logprobs"] = self._prompt_logprobs(number)
                    yield event({**self._head, "choices": [choice], **usage})
                choice = _choice(number, delta.text)
                if self._logprobs is not None:
                    choice["logprobs"] = self._logprobs[number].take(
                        delta.token_ids, delta.logprobs
                    )
                elif not delta.text and delta.finish_reason is None:
                    continue  # a character is not complete yet
                choice["finish_reason"] = delta.finish_reason
                yield event({**self._head, "choices": [choice], **usage})
            if with_usage:
                yield event({**self._head, "choices": [], "usage": self._usage()})
            yield DONE
        except Exception as error:
            yield event(of_exception(error).body())
        finally:
            self._generation.close()


def _choice(number: int, text: str) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": None}
