"""`POST /v1/responses`, without state: texts in, one message out."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from starlette.responses import Response

from pagelab.server.chat import template_messages
from pagelab.server.documents import RESPONSE_RESPONSES
from pagelab.server.errors import of_exception
from pagelab.server.schemas import IGNORED, ChatMessage
from pagelab.server.service import Generation, Service
from pagelab.server.sse import EventStream, answer, event
from pagelab.server.tracing import trace_of
from pagelab.types import GuidedDecoding, SamplingParams

router = APIRouter()

_IGNORED = IGNORED | {"include", "truncation", "background", "stream_options", "top_logprobs"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["input_text", "output_text", "text"]
    text: str


class _Item(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _Format(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_schema(self) -> _Format:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("json_schema needs a schema")
        return self


class _Text(BaseModel):
    model_config = ConfigDict(extra="ignore")

    format: _Format | None = None


class ResponsesRequest(BaseModel):
    """The body. Unknown fields are refused, as everywhere; nothing is stored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    input: Annotated[str, Field(min_length=1)] | Annotated[list[_Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    text: _Text | None = None
    stream: StrictBool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in _IGNORED}

    def params(self) -> SamplingParams:
        """The engine's parameters."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        fields: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        wanted = None if self.text is None else self.text.format
        if wanted is not None and wanted.type == "json_object":
            fields["guided"] = GuidedDecoding(json_object=True)
        elif wanted is not None and wanted.type == "json_schema":
            fields["guided"] = GuidedDecoding(json_schema=wanted.schema_)
        return SamplingParams(max_tokens=self.max_output_tokens, **fields)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, for the chat template."""
        found: list[ChatMessage] = []
        if self.instructions:
            found.append(ChatMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            found.append(ChatMessage(role="user", content=self.input))
        else:
            for item in self.input:
                parts = item.content
                text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
                found.append(ChatMessage(role=item.role, content=text))
        return template_messages(found)


@router.post(
    "/v1/responses",
    responses=RESPONSE_RESPONSES,
)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer, once or as events."""
    service: Service = request.app.state.service
    limit = service.settings.limits.timeout_s
    deadline = time.monotonic() + limit
    service.check_ready()
    service.check_model(body.model)
    prompt = service.llm.tokenizer.render_chat(body.messages())
    work = service.begin([prompt], body.params(), add_special_tokens=False, trace=trace_of(request))
    generation = await answer(request, work, limit)
    reply = _Reply(service, generation, body)
    if body.stream:
        return EventStream(reply.events(), deadline - time.monotonic(), generation.close)
    try:
        return await answer(request, reply.whole(), deadline - time.monotonic())
    finally:
        generation.close()


class _Reply:
    """One response object, and the events of its making."""

    def __init__(self, service: Service, generation: Generation, body: ResponsesRequest) -> None:
        self._generation = generation
        self._body = body
        self._model = service.model_name
        self._id = f"resp_{secrets.token_hex(12)}"
        self._item_id = f"msg_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._text = ""
        self._reason: str | None = None

    async def whole(self) -> JSONResponse:
        """Everything at once."""
        async for _, delta in self._generation.deltas():
            self._text += delta.text
            self._reason = delta.finish_reason or self._reason
        return JSONResponse(self._object(done=True))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """As OpenAI's API tells them."""
        numbers = itertools.count()

        def tell(kind: str, **fields: Any) -> bytes:
            data = {"type": kind, "sequence_number": next(numbers), **fields}
            return f"event: {kind}\n".encode() + event(data)

        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        try:
            yield tell("response.created", response=self._object(done=False))
            yield tell("response.in_progress", response=self._object(done=False))
            started = self._item("in_progress") | {"content": []}
            yield tell("response.output_item.added", output_index=0, item=started)
            yield tell("response.content_part.added", **place, part=_part(""))
            async for _, delta in self._generation.deltas():
                self._text += delta.text
                self._reason = delta.finish_reason or self._reason
                if delta.text:
                    yield tell("response.output_text.delta", **place, delta=delta.text, logprobs=[])
            yield tell("response.output_text.done", **place, text=self._text, logprobs=[])
            yield tell("response.content_part.done", **place, part=_part(self._text))
            done = self._object(done=True)
            yield tell("response.output_item.done", output_index=0, item=done["output"][0])
            yield tell(f"response.{done['status']}", response=done)
        except Exception as error:
            detail = of_exception(error).body()["error"]
            fields = {key: detail[key] for key in ("code", "message", "param")}
            yield tell("error", **fields)
        finally:
            self._generation.close()

    def _object(self, *, done: bool) -> dict[str, Any]:
        cut = self._reason == "length"
        status = ("incomplete" if cut else "completed") if done else "in_progress"
        usage = self._generation.usage()
        details = usage["prompt_tokens_details"]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if done and cut else None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": [self._item(status)] if done else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self._body.temperature,
            "top_p": self._body.top_p,
            "tool_choice": "none",
            "tools": [],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": details,
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
            if done
            else None,
        }

    def _item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(self._text)],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
