"""What our OpenAPI description says about answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """An answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """An answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: Usage


class ResponseObject(BaseModel):
    """An answer of `/v1/responses`; OpenAI's object has more fields, all of them there."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pagelab"
    max_model_len: int


class ModelList(BaseModel):
    """An answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    """An answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizedText(BaseModel):
    """An answer of `/detokenize`."""

    prompt: str


class Status(BaseModel):
    """An answer of `/health` and `/ready`."""

    status: str


class Version(BaseModel):
    """An answer of `/version`."""

    version: str


def errors(*statuses: int) -> Responses:
    """Errors that an endpoint may answer with."""
    return {status: {"model": ErrorBody} for status in statuses}


_GENERATING = (400, 401, 404, 408, 413, 429, 500, 503)


def _streaming(model: type[BaseModel]) -> Responses:
    return {
        200: {
            "model": model,
            "description": "The answer; with stream = true, events with chunks of it.",
            "content": {"text/event-stream": {}},
        },
        422: {"model": ErrorBody, "description": "Never: errors of validation are 400."},
        **errors(*_GENERATING),
    }


COMPLETION_RESPONSES = _streaming(Completion)
CHAT_RESPONSES = _streaming(ChatCompletion)
RESPONSE_RESPONSES = _streaming(ResponseObject)
SMALL_RESPONSES: Responses = {
    422: {"model": ErrorBody, "description": "Never: errors of validation are 400."},
    **errors(400, 401, 404, 413, 500, 503),
}
