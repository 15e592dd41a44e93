"""`POST /v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from pagelab.engine.request_stream import CompletionDelta
from pagelab.server.documents import CHAT_RESPONSES
from pagelab.server.errors import of_exception
from pagelab.server.logprobs import chat_logprobs
from pagelab.server.parameters import to_sampling_params
from pagelab.server.schemas import ChatMessage, ChatRequest
from pagelab.server.service import Generation, Service
from pagelab.server.sse import DONE, EventStream, answer, event
from pagelab.server.tracing import trace_of

router = APIRouter()


@router.post("/v1/chat/completions", responses=CHAT_RESPONSES)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, through the model's chat template."""
    service: Service = request.app.state.service
    limit = service.settings.limits.timeout_s
    deadline = time.monotonic() + limit
    service.check_ready()
    service.check_model(body.model)
    params = to_sampling_params(body)
    tools = None
    if body.tools and body.tool_choice != "none":
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    prompt = service.llm.tokenizer.render_chat(template_messages(body.messages), tools=tools)
    # the template wrote the special tokens itself
    work = service.begin(
        [prompt],
        params,
        priority=body.priority or 0,
        add_special_tokens=False,
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


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates know them: parts joined, `developer` as `system`."""
    found = []
    for message in messages:
        data = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            data["content"] = "".join(part.text for part in message.content)
        if message.role == "developer":
            data["role"] = "system"
        found.append(data)
    return found


class _Reply:
    """One answer, whole or as events."""

    def __init__(self, service: Service, generation: Generation, body: ChatRequest) -> None:
        self._tokenizer = service.llm.tokenizer
        self._generation = generation
        self._body = body
        self._name = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = service.model_name

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }

    def _logprobs(self, deltas: Sequence[CompletionDelta]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(
            self._tokenizer,
            [token for delta in deltas for token in delta.token_ids],
            [entry for delta in deltas for entry in delta.logprobs],
            self._body.top_logprobs or 0,
        )

    async def whole(self) -> JSONResponse:
        """Everything at once."""
        deltas: list[list[CompletionDelta]] = [[] for _ in range(self._body.n or 1)]
        async for number, delta in self._generation.deltas():
            deltas[number].append(delta)
        choices = [
            {
                "index": number,
                "message": {
                    "role": "assistant",
                    "content": "".join(delta.text for delta in found),
                    "refusal": None,
                },
                "logprobs": self._logprobs(found),
                "finish_reason": found[-1].finish_reason,
            }
            for number, found in enumerate(deltas)
        ]
        head = self._head("chat.completion")
        return JSONResponse({**head, "choices": choices, "usage": self._generation.usage()})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The role, a chunk a delta, then `[DONE]`."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        usage = {"usage": None} if with_usage else {}
        head = self._head("chat.completion.chunk")
        try:
            for number in range(self._body.n or 1):
                role = _choice(number, {"role": "assistant", "content": ""})
                yield event({**head, "choices": [role], **usage})
            async for number, delta in self._generation.deltas():
                if not delta.text and delta.finish_reason is None and not self._body.logprobs:
                    continue  # a character is not complete yet
                choice = _choice(number, {"content": delta.text} if delta.text else {})
                choice["logprobs"] = self._logprobs([delta])
                choice["finish_reason"] = delta.finish_reason
                yield event({**head, "choices": [choice], **usage})
            if with_usage:
                yield event({**head, "choices": [], "usage": self._generation.usage()})
            yield DONE
        except Exception as error:
            yield event(of_exception(error).body())
        finally:
            self._generation.close()


def _choice(number: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
